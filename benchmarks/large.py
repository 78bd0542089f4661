"""Ops on more than 2**31 elements, where a 32-bit address wraps: the end of the tensor must come out right.

Every op here treats its rows (sequences, images, samples) apart, so its results on the last few rows of a
large input are those on these rows alone, which fit 32-bit addresses and which the test suite checks. Each
function takes the number of elements to pass, the implementation, a dtype and a device, and returns what is
wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mage_fast.benchmark.cases import module, tensors
from mage_fast.kernels import rng
from mage_fast.kernels.ops.philox.reference import philox_4x32

#: Rows at the end that are compared.
LAST = 4


def _noise(*shape: int, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_().requires_grad_(grad)


def _run(op: str, name: str, inputs: Mapping[str, Any], grads: list[Tensor] | None) -> list[Tensor]:
    """Outputs and, given their gradients, the gradient of the first input."""
    call = getattr(module(op, "api"), op)
    if grads is None:
        with torch.no_grad():
            return tensors(call(**inputs, implementation=name))
    outputs = tensors(call(**inputs, implementation=name))
    first = tensors(inputs)[0]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, first, grads)]


def _differ(whole: list[Tensor], part: list[Tensor], dtype: torch.dtype) -> str:
    for index, (x, y) in enumerate(zip(whole, part, strict=True)):
        x = x[x.shape[0] - y.shape[0] :] if x.dim() else x
        scale = float(y.abs().max()) if y.is_floating_point() else 0.0
        off = float((x.double() - y.double()).abs().max())
        if not off <= 2 * torch.finfo(dtype).eps * scale:
            return f"result {index} of the last rows is off by {off:.3g}"
    return ""


def _last_rows(
    op: str, name: str, big: dict[str, Any], small: dict[str, Any], dtype: torch.dtype, shapes: list[Any]
) -> str:
    """Run on all rows and on the last; ``shapes`` of the gradients to give, none for an op without."""
    device = tensors(big)[0].device.type
    grads = [_noise(*shape, dtype=dtype, device=device, grad=False) for shape in shapes] or None
    whole = _run(op, name, big, grads)
    rows = [y.shape[0] for y in _run(op, name, small, None)]
    last = None if grads is None else [g[g.shape[0] - n :] for g, n in zip(grads, rows, strict=True)]
    return _differ(whole, _run(op, name, small, last), dtype)


def _end(x: Tensor, rows: int = LAST) -> Tensor:
    return x.detach()[x.shape[0] - rows :].clone().requires_grad_(x.requires_grad)


def philox(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    state, low = rng.new_state(7, 3, device), elements // 4 + LAST
    words = importlib.import_module("mage_fast.kernels.ops.philox.api").philox(
        state, 5, 1, low, implementation=name
    )
    return "" if torch.equal(words[0, -LAST:], _blocks(low - LAST, LAST, 5, device)) else "the last words"


def _blocks(first: int, count: int, stream: int, device: str) -> Tensor:
    """Blocks of words of seed 7, step 3, from the first one on."""
    counter = torch.arange(first, first + count, device=device)
    constants = [torch.full_like(counter, value) for value in (0, stream, 3)]
    key = (torch.full_like(counter, 7), torch.zeros_like(counter))
    words = torch.stack(philox_4x32((counter, *constants), key), -1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def bias_gelu(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    features = 64 if elements < 2**31 else 4096
    rows = elements // features + LAST
    x = _noise(rows, features, dtype=dtype, device=device)
    bias = _noise(features, dtype=dtype, device=device)
    small = {"x_TF": _end(x), "bias_F": bias}
    wrong = _last_rows("bias_gelu", name, {"x_TF": x, "bias_F": bias}, small, dtype, [x.shape])
    if wrong:
        return wrong
    random = {"dropout": 0.5, "rng_state": rng.new_state(7, 3, device), "stream": 5}
    (out,) = _run("bias_gelu", name, {"x_TF": x, "bias_F": bias, **random}, None)
    count = LAST * features // 8
    halves = _blocks(rows * features // 8 - count, count, 5, device).view(torch.int16).flatten()
    kept = (halves >= rng.least_kept(0.5, rng.ACTIVATION_BITS)).view(LAST, features)
    ours = out[-LAST:] != 0  # GELU is 0 at 0 and far below only
    return "" if bool((ours <= kept).all()) and (ours == kept).double().mean() > 0.99 else "dropout"


def add_norm(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    features = 64 if elements < 2**31 else 1024
    shape = (elements // features + LAST, features)
    branch, residual = (_noise(*shape, dtype=dtype, device=device) for _ in range(2))
    norm = {key: _noise(features, dtype=dtype, device=device) for key in ("weight_D", "bias_D")}
    small = {"branch_TD": _end(branch), "residual_TD": _end(residual), **norm}
    big = {"branch_TD": branch, "residual_TD": residual, **norm}
    return _last_rows("add_norm", name, big, small, dtype, [shape, shape])


def attention(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    heads, features, length = (2, 8, 5) if elements < 2**31 else (12, 64, 129)
    batch = elements // (3 * heads * features * length) + LAST
    qkv = _noise(batch * length, 3, heads, features, dtype=dtype, device=device)
    ends = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
    big = {"qkv_T3HD": qkv, "cu_seqlens": ends, "max_seqlen": length}
    small = {"qkv_T3HD": _end(qkv, LAST * length), "cu_seqlens": ends[: LAST + 1], "max_seqlen": length}
    return _last_rows("attention", name, big, small, dtype, [(batch * length, heads, features)])


def pad_decoder(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    tokens, features = (8, 16) if elements < 2**31 else (256, 768)
    batch = elements // ((tokens + 1) * features) + LAST
    rows = 1 + tokens // 2
    encoded = _noise(batch * rows, features, dtype=dtype, device=device)
    first = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
    source = torch.full((batch, tokens + 1), -1, dtype=torch.int32, device=device)
    source[:, :rows] = first[:-1, None] + torch.arange(rows, dtype=torch.int32, device=device)
    position = _noise(tokens + 1, features, dtype=dtype, device=device)
    big = {"encoded_TD": encoded, "source_BS": source, "cu_seqlens": first, "position_weight_SD": position}
    small = big | {"encoded_TD": _end(encoded, LAST * rows), "cu_seqlens": first[: LAST + 1]}
    small["source_BS"] = source[:LAST]
    return _last_rows("pad_decoder", name, big, small, dtype, [(batch, tokens + 1, features)])


def embed_kept(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    """Forward only: what comes back to the tables is a sum over all rows."""
    tokens, features = (8, 16) if elements < 2**31 else (256, 768)
    rows = 1 + tokens // 2
    batch = elements // (rows * features) + LAST
    first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * (tokens + 1)
    positions = (first + torch.arange(rows, dtype=torch.int32, device=device)).flatten()
    big = {
        "ids_BL": torch.randint(2025, (batch, tokens), device=device),
        "class_ids_B": torch.zeros(batch, dtype=torch.int64, device=device),
        "positions_T": positions,
        "is_masked_BL": torch.zeros(batch, tokens, dtype=torch.bool, device=device),
        "word_weight_VD": _noise(2025, features, dtype=dtype, device=device),
        "position_weight_SD": _noise(tokens + 1, features, dtype=dtype, device=device),
        "norm_weight_D": _noise(features, dtype=dtype, device=device),
        "norm_bias_D": _noise(features, dtype=dtype, device=device),
        "mask_token_id": 2024,
    }
    small = big | {"positions_T": positions[-LAST * rows :]}
    return _last_rows("embed_kept", name, big, small, dtype, [])


def masked_cross_entropy(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    classes = 64 if elements < 2**31 else 1024
    rows = elements // classes + LAST
    logits = _noise(rows, classes, dtype=dtype, device=device)
    targets = torch.full((rows,), -1, device=device)
    targets[-LAST:] = torch.arange(LAST, device=device)  # the only ones, so the loss is theirs
    big = {"logits_NC": logits, "targets_N": targets}
    small = {"logits_NC": _end(logits), "targets_N": targets[-LAST:]}
    grad = [torch.ones((), device=device)]
    whole = _run("masked_cross_entropy", name, big, grad)
    if bool(whole[1][:-LAST].any()):
        return "a padding row has a gradient"
    return _differ(whole, _run("masked_cross_entropy", name, small, grad), dtype)


def linear_cross_entropy(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    features = 16 if elements < 2**31 else 1024
    rows = elements // features + LAST
    shared = {
        "weight_CD": _noise(64, features, dtype=dtype, device=device, grad=False),
        "bias_C": _noise(64, dtype=dtype, device=device, grad=False),
    }
    hidden = _noise(rows, features, dtype=dtype, device=device)
    targets = torch.full((rows,), -1, device=device)
    targets[-LAST:] = torch.arange(LAST, device=device)  # the only ones, so the loss is theirs
    big = {"hidden_ND": hidden, "targets_N": targets} | shared
    small = {"hidden_ND": _end(hidden), "targets_N": targets[-LAST:]} | shared
    grad = [torch.ones((), device=device)]
    whole = _run("linear_cross_entropy", name, big, grad)
    if bool(whole[1][:-LAST].any()):
        return "a padding row has a gradient"
    return _differ(whole, _run("linear_cross_entropy", name, small, grad), dtype)


def group_norm_silu(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    channels, size = (64, 4) if elements < 2**31 else (128, 256)
    shape = (elements // (channels * size**2) + LAST, channels, size, size)
    x = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).normal_()
    norm = {key: _noise(channels, dtype=dtype, device=device) for key in ("weight_C", "bias_C")}
    big = {"x_NCHW": x.requires_grad_(), **norm, "num_groups": 32}
    return _last_rows("group_norm_silu", name, big, big | {"x_NCHW": _end(x)}, dtype, [shape])


def nearest_code(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    channels = 16 if elements < 2**31 else 256
    x = _noise(elements // channels + LAST, channels, dtype=dtype, device=device, grad=False)
    codes = _noise(1024, channels, dtype=dtype, device=device, grad=False)
    small = {"x_ND": _end(x), "codebook_KD": codes}
    return _last_rows("nearest_code", name, {"x_ND": x, "codebook_KD": codes}, small, dtype, [])


def sample_confident(elements: int, name: str, dtype: torch.dtype, device: str) -> str:
    length, codes = (8, 16) if elements < 2**31 else (256, 1024)
    batch = elements // (length * codes) + LAST
    big = {
        "logits_NC": _noise(batch, length, codes, dtype=dtype, device=device, grad=False),
        "ids_BL": torch.full((batch, length), codes, device=device),
        "num_masked_B": torch.full((batch,), length // 2, device=device),
    }
    big["samples_B"] = torch.arange(batch, device=device)
    small = {key: _end(x) for key, x in big.items()}
    same = {"mask_token_id": codes, "choice_temperature": 3.0, "rng_state": rng.new_state(0, device=device)}
    return _last_rows("sample_confident", name, big | same, small | same, dtype, [])


#: By op.
CHECKS: dict[str, Callable[[int, str, torch.dtype, str], str]] = {
    function.__name__: function
    for function in (
        *(philox, bias_gelu, add_norm, attention, pad_decoder, embed_kept, masked_cross_entropy),
        *(linear_cross_entropy, group_norm_silu, nearest_code, sample_confident),
    )
}
