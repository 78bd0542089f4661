"""Decoding as a CUDA graph: when one is captured, when it is replayed, and that it gives the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from mage_fast import decoding
from mage_fast.decoding import Decoding
from mage_fast.kernels import dispatch
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig
from tests.models import tiny


def build(dtype: torch.dtype = torch.float64, encoder_tokens: str = "paper") -> MAGE:
    torch.manual_seed(0)
    model = MAGE(tiny(encoder_tokens=encoder_tokens)).eval()
    nn.init.normal_(model.embedding.word_embeddings.weight, std=0.5)
    return model.to(dtype)


class Recorder:
    """Stands for a graph: runs the captured function again on its own copies of the inputs."""

    captures = 0

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        type(self).captures += 1
        self.function, self.inputs = function, [x.clone() for x in inputs]

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        return True

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.function(*self.inputs)


def test_the_second_batch_of_a_kind_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CUDAGraph", Recorder)
    monkeypatch.setattr(Recorder, "captures", 0)
    model, config = build(), SamplerConfig(steps=3)
    decode, plain = Decoding(model, config), Decoding(model, config)
    captures = []

    def decodes(**given: object) -> None:
        got = decode(**given)  # type: ignore[arg-type]
        kind, inputs = plain._prepare(
            *(given.get(k) for k in ("batch", "ids_BL", "labels_B", "seed")), given.get("first_sample", 0)
        )
        assert torch.equal(got, plain._last(kind, inputs))
        captures.append(Recorder.captures)

    with torch.no_grad():
        decodes(batch=3, seed=1)
        decodes(batch=3, seed=1, first_sample=3)
        decodes(batch=3, seed=2, first_sample=6)
        decodes(batch=2, seed=1, first_sample=9)  # the last of a run
        decodes(batch=3, seed=3)
        assert captures == [0, 1, 1, 1, 1]
        labels = torch.tensor([4, 4, 1])
        decodes(batch=3, seed=1, labels_B=labels)
        decodes(batch=3, seed=1, labels_B=labels)
        decodes(batch=3, seed=1, labels_B=torch.tensor([0, 2, 2]))
        assert captures[5:] == [1, 2, 2]
        ids = torch.full((2, 16), model.config.mask_token_id)
        ids[:, :5] = 7
        decodes(ids_BL=ids, seed=1)
        decodes(ids_BL=ids.flip(1), seed=2)
        decodes(ids_BL=ids.roll(3, 1), seed=2)
        ids[0, 5] = 1
        decodes(ids_BL=ids, seed=2)
        assert captures[8:] == [2, 3, 3, 3]


def test_a_graph_sees_new_weights_and_never_stale_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "CUDAGraph", Recorder)
    monkeypatch.setattr(Recorder, "captures", 0)
    decode = Decoding(build(), SamplerConfig(steps=3))

    def twice() -> int:
        decode(3, seed=0)
        decode(3, seed=0)
        return Recorder.captures

    assert twice() == 1
    with torch.no_grad():
        decode.model.head.bias.add_(1.0)  # where it is
    assert twice() == 1
    decode.model.head.bias.data = decode.model.head.bias.data.clone()
    assert twice() == 2
    with dispatch.use_implementation("reference"):
        assert twice() == 3
    assert twice() == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.5}, {"top_k": 9, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_replays_give_the_ids_of_single_steps(encoder_tokens: str, options: dict, half: bool) -> None:
    model = build(torch.float32, encoder_tokens).cuda()
    config = SamplerConfig(steps=5, **options)
    decode = Decoding(model, config)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        for first_sample in range(0, 24, 4):
            given = {
                "labels_B": torch.tensor([first_sample % 11] * 4),
                "seed": 5,
                "first_sample": first_sample,
            }
            got = decode(4, **given)
            assert torch.equal(got, list(Decoding(model, config).steps(4, **given))[-1])
            assert (decode._graph is not None) == (first_sample > 0)
            with torch.no_grad():  # a step of training: the graph's copies of the weights are made anew
                for x in model.parameters():
                    x.mul_(1.01)
            torch.clear_autocast_cache()
