"""The throughput meter, to the bit on a clock of its own; FLOPs of a step against torch's counter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import truncnorm
from torch.utils.flop_counter import FlopCounterMode

from mage_fast import counts, reference
from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.kernels.roofline import DEVICES, data_sheet
from mage_fast.training.throughput import Throughput, flops_per_image, peak_flops

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Clock:
    """Stands still unless told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def waiting(clock: Clock, seconds: list[float], closed: list[bool]) -> Iterator[int]:
    try:
        for number, wait in enumerate(seconds):
            clock.now += wait
            yield number
    finally:
        closed.append(True)


def test_a_window_is_what_happened_since_the_last_one() -> None:
    clock, closed = Clock(), []
    meter = Throughput(8, flops_per_image=1e9, peak_flops=64e9, device=CPU, clock=clock)
    clock.now += 50.0  # before the first batch is asked for: opening the data, compiling
    stream = meter.batches(waiting(clock, [1.0, 0.5, 0.25, 0.0, 9.0], closed))
    for number in (0, 1):
        assert next(stream) == number
        clock.now += 0.25
    # 2 steps of 8 images in 2 seconds, 1.5 of which were spent waiting; 8 GFLOP/s of 64
    assert meter.window() == {"images_per_second": 8.0, "data_wait": 0.75, "mfu": 0.125}
    with meter.paused():
        clock.now += 40.0  # a picture is made
    clock.now += 1.5
    assert next(stream) == 2
    clock.now += 0.25
    assert meter.window() == {"images_per_second": 4.0, "data_wait": 0.125, "mfu": 0.0625}
    assert meter.window() == {}
    clock.now += 1.0
    assert meter.window() == {}, "no step was done"
    assert next(stream) == 3
    clock.now += 2.0
    assert meter.window() == {"images_per_second": 4.0, "data_wait": 0.0, "mfu": 0.0625}
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True]


def test_the_batches_end_where_they_end() -> None:
    clock, closed = Clock(), []
    assert list(Throughput(1, clock=clock).batches(waiting(clock, [1.0] * 3, closed))) == [0, 1, 2]
    assert list(Throughput(1, clock=clock).batches(iter("ab"))) == ["a", "b"]
    assert closed == [True]


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.booleans()), min_size=1, max_size=30))
def test_the_share_of_waiting_is_a_share(steps: list[tuple[float, float, bool]]) -> None:
    clock = Clock()
    meter = Throughput(3, clock=clock)
    stream = meter.batches(waiting(clock, [wait for wait, _, _ in steps], []))
    images, seconds, start = 0.0, 0.0, clock.now
    for _, compute, logs in steps:
        next(stream)
        clock.now += compute
        if logs and (found := meter.window()):
            assert 0.0 <= found["data_wait"] <= 1.0
            assert set(found) == {"images_per_second", "data_wait"}
            images += found["images_per_second"] * (clock.now - start)
            seconds, start = seconds + clock.now - start, clock.now
    assert images <= 3 * len(steps) * (1 + 1e-9)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="images_per_step is 0, wanted more than 0"):
        Throughput(0)
    with pytest.raises(InputError, match=r"peak_flops is -1\.0, wanted more than 0"):
        Throughput(1, peak_flops=-1.0)
    with pytest.raises(InputError, match="flops_per_image is nan"):
        Throughput(1, flops_per_image=float("nan"))


# Operations


@pytest.mark.parametrize("drop_ratio", [0.5, 0.25])
def test_flops_are_those_that_torch_counts_without_the_head_s_waste(drop_ratio: float) -> None:
    """Of the reference at one mask ratio; its head at 17 rows over 44 ids is exchanged for 9 rows over 32."""
    config = MAGEConfig.tiny(mask_ratio_std=0.0, drop_ratio=drop_ratio)
    model = reference.MAGE.from_config(config).train()
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(2, 3, 16, 16)).loss.backward()
    d, rows, classes = 32, (17, 9), (44, 32)
    assert (config.num_tokens + 1, counts.masked(config)) == rows
    assert (config.vocabulary_size, config.codebook_size) == classes
    heads = [2 * n * d * (3 * d + 2 * c) for n, c in zip(rows, classes, strict=True)]
    wanted = counter.get_total_flops() / 2 - heads[0] + heads[1]
    assert flops_per_image(config, tokenizes=True) == wanted
    assert config.tokenizer is not None
    assert wanted - flops_per_image(config) == counts.tokenizer(config.tokenizer, "encode")


def test_flops_of_vit_b() -> None:
    """54 GFLOP forward, three times that in a step but for the tied weight's gradient; 129 to tokenize."""
    config = MAGEConfig.vit_b()
    forward = counts.forward(config, 129, 178, 1024)
    assert round(forward / 1e9) == 54
    assert flops_per_image(config) == 3 * forward - 2 * 178 * 768 * 1024
    assert round((flops_per_image(config, tokenizes=True) - flops_per_image(config)) / 1e9) == 129
    with pytest.raises(InputError, match="no tokenizer to count"):
        flops_per_image(config.replace(tokenizer=None), tokenizes=True)


def test_an_encoder_of_unmasked_tokens_needs_less() -> None:
    config = MAGEConfig.vit_b(encoder_tokens="unmasked")
    assert flops_per_image(config) == 3 * counts.forward(config, 257 - 178, 178, 1024) - 2 * 178 * 768 * 1024


@given(st.floats(0.0, 1.0), st.floats(0.01, 2.0), st.floats(0.0, 0.9), st.floats(0.05, 1.0))
def test_the_mean_mask_ratio_is_the_law_s(mode: float, std: float, low: float, width: float) -> None:
    high = min(low + width, 1.0)
    config = MAGEConfig.tiny(
        mask_ratio_mode=mode, mask_ratio_std=std, mask_ratio_min=low, mask_ratio_max=high, drop_ratio=0.0
    )
    a, b = (low - mode) / std, (high - mode) / std
    got = counts.mean_mask_ratio(config)
    assert low <= got <= high
    if max(abs(a), abs(b)) < 30:
        assert got == pytest.approx(truncnorm.mean(a, b, mode, std), abs=1e-6)


def test_the_mean_mask_ratio_at_the_ends() -> None:
    assert round(counts.mean_mask_ratio(MAGEConfig.vit_b()), 3) == 0.694
    assert counts.mean_mask_ratio(MAGEConfig.tiny(mask_ratio_std=0.0)) == 0.55
    far = {"mask_ratio_std": 0.001, "drop_ratio": 0.0}
    assert counts.mean_mask_ratio(MAGEConfig.tiny(mask_ratio_min=0.7, **far)) == 0.7
    assert counts.mean_mask_ratio(MAGEConfig.tiny(mask_ratio_min=0.0, mask_ratio_max=0.2, **far)) == 0.2


# Peaks


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_goes_by_the_board(name: str, half: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for precision in ("bf16", "fp16"):
        wanted = None if half is None else 4 * half
        assert peak_flops(CUDA, precision, ranks=4) == wanted  # type: ignore[arg-type]
    assert peak_flops(CPU, "bf16") is None
    sheet = data_sheet(name)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, dtype in ((True, "tf32"), (False, "float32")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert peak_flops(CUDA, "fp32") == (sheet and sheet.peak_flops[dtype])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert all(x.peak_flops["float32"] < x.peak_flops["tf32"] for x in DEVICES.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu() -> None:
    meter = Throughput(2, device=CUDA)
    for _ in meter.batches(iter([0])):
        x = torch.empty(2**20, device=CUDA)
    assert meter.window()["peak_memory_mib"] >= x.nbytes / 2**20
