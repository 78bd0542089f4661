"""Looking at a model in training: the training does not notice; pictures and probes are what they say."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import gradient
from PIL import Image
from torch import Tensor, nn

from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.model import MAGE
from mage_fast.probe import knn_accuracy, linear_probe
from mage_fast.sampler import generate
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.data import batches, open_source
from mage_fast.training.metrics import to_uint8
from mage_fast.training.optim import build_adamw
from mage_fast.training.run_state import module_fingerprint
from mage_fast.training.step import TrainStep
from mage_fast.training.token_cache import TokenCacheWriter
from mage_fast.training.watch import OnlineProbe, Watch, undisturbed
from tests.models import build, tiny

SAMPLER = SamplerConfig(steps=3)


@pytest.fixture
def model() -> MAGE:
    return build(MAGEConfig.tiny()).train()


def digits(split: Any) -> Any:
    return open_source("digits", image_size=16, split=split)


def probe(model: MAGE, kind: Any = "knn", **options: Any) -> OnlineProbe:
    return OnlineProbe(model, kind, digits("train"), digits("test"), **options)


def cache(folder: Path, model: MAGE, split: Any, **settings: Any) -> str:
    """Of the digits, as the probe's own crop has them."""
    source = digits(split)
    options = {"length": 16, "codebook_size": 32, "class_names": source.class_names, "split": split}
    assert isinstance(model.tokenizer, nn.Module)
    options["tokenizer_fingerprint"] = module_fingerprint(model.tokenizer)
    with TokenCacheWriter(folder, **(options | settings)) as writer:
        for batch in batches(source, 100, shuffle=False, drop_last=False, augment="eval"):
            writer.append(model.tokenize(batch.inputs)[:, None, : writer.settings["length"]], batch.labels)
    return f"tokens:{folder}"


# The training does not notice


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_watched_training_gives_the_same_bits(
    precision: Any, model: MAGE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and dropout come from torch's global generator here, which a look must leave alone."""
    start = copy.deepcopy(model.state_dict())
    images = torch.rand(4, 3, 16, 16)
    ended: list[Any] = []
    for watched in (False, True):
        model.load_state_dict(start)
        model.encoder.eval()  # a part that someone froze
        optimizer = build_adamw(model, 1e-2)
        step_fn = TrainStep(model, optimizer, precision=precision)
        torch.manual_seed(5)
        watch = None
        if watched:
            options = {"train_items": 60, "test_items": 30}
            watch = Watch(model, tmp_path, 2, sampler=SAMPLER, columns=2, probe=probe(model, **options))
        losses = []
        for step in range(1, 6):
            losses.append(step_fn(images)["loss"].item())
            if watch is not None and step % watch.every_steps == 0:
                gradients = {name: x.grad for name, x in model.named_parameters()}
                assert watch(step, model).keys() == {"knn_top1"}
                assert all(x.grad is gradients[name] for name, x in model.named_parameters())
        modes = [module.training for module in model.modules()]
        gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        state = copy.deepcopy(model.state_dict())
        ended.append((losses, state, gradients, modes, torch.get_rng_state()))
    assert ended[0][0] == ended[1][0]
    for one, other in zip(ended[0][1:3], ended[1][1:3], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert ended[0][3] == ended[1][3]
    assert torch.equal(ended[0][4], ended[1][4])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000000002.png",
        "step-000000004.png",
    ]


def test_a_tokenizer_that_draws_numbers_does_not_disturb_either(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        codebook_size, grid_size = 32, 4

        def encode(self, images: Tensor) -> Tensor:
            return torch.randint(32, (len(images), 16))

        def decode(self, ids: Tensor) -> Tensor:
            return torch.rand(len(ids), 3, 16, 16)

    model = MAGE(tiny(), Noisy())
    before = torch.get_rng_state()
    watch = Watch(model, tmp_path, 1, sampler=SAMPLER, probe=probe(model, train_items=20, test_items=10))
    watch(1, model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_look_that_fails_leaves_the_modes(
    model: MAGE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    watch = Watch(model, tmp_path, 1, sampler=SAMPLER)
    monkeypatch.setattr(model.tokenizer, "decode", broken)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        watch(1, model)
    assert model.training
    assert model.encoder.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert not list((tmp_path / "samples").iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_look_on_a_gpu_leaves_its_generator(model: MAGE, tmp_path: Path) -> None:
    model.cuda()
    before = torch.cuda.get_rng_state()
    watch = Watch(model, tmp_path, 1, sampler=SAMPLER, probe=probe(model, train_items=50, test_items=20))
    with undisturbed(model):
        torch.rand(3, device="cuda")
    assert 0 <= watch(1, model)["knn_top1"] <= 1
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Probes


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_probe_is_the_accuracy_on_the_features(kind: Any, model: MAGE) -> None:
    """Of all items: the features are computed again here, from images."""
    found = probe(model, kind, train_items=10**6, test_items=10**6, batch_size=200)(model)
    model.eval()
    parts: list[Tensor] = []
    for split in ("train", "test"):
        every = list(batches(digits(split), 300, shuffle=False, drop_last=False, augment="eval"))
        with torch.no_grad():
            parts.append(torch.cat([model.features(batch.inputs) for batch in every]))
        parts.append(torch.cat([batch.labels for batch in every]))
    wanted = knn_accuracy(*parts) if kind == "knn" else linear_probe(*parts).test_top1
    assert found == {f"{kind}_top1": pytest.approx(wanted, abs=0.006)}  # other batches, other rounding
    assert wanted > 0.2, "of ten classes"


def test_a_probe_takes_the_same_few_items_each_time_and_of_every_class(model: MAGE) -> None:
    first, again = (probe(model, train_items=200, test_items=50) for _ in range(2))
    assert torch.equal(first._train[0], again._train[0])
    assert torch.equal(first._test[1], again._test[1])
    assert (len(first._train[1]), len(first._test[1])) == (200, 50)
    assert set(first._train[1].tolist()) == set(range(10))
    assert first(model) == first(model)


def test_a_token_cache_is_read_as_it_is(model: MAGE, tmp_path: Path) -> None:
    train, test = (
        open_source(cache(tmp_path / split, model, split), split=split)  # type: ignore[arg-type]
        for split in ("train", "test")
    )
    options: dict[str, Any] = {"train_items": 150, "test_items": 60}
    of_tokens = OnlineProbe(model, "knn", train, test, **options)
    of_images = probe(model, **options)
    assert torch.equal(of_tokens._train[0], of_images._train[0])
    assert of_tokens(model) == of_images(model)
    without = MAGE(MAGEConfig.tiny(tokenizer=None))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("tokenizer.")})
    assert OnlineProbe(without, "knn", train, test, **options)(without) == of_images(model)


def test_damaged_images_are_left_out(model: MAGE, zoo: Path) -> None:
    source = open_source(f"folder:{zoo}", image_size=16, split="all")
    found = OnlineProbe(model, "knn", source, source)
    assert len(found._train[1]) == len(source) - 4
    assert len(source.bad_files) == 4
    assert found(model)["knn_top1"] > 0


def test_held_out_data_may_lack_the_last_classes(model: MAGE, tmp_path: Path) -> None:
    names = digits("train").class_names
    train, test = (
        open_source(cache(tmp_path / split, model, split, class_names=known), split=split)  # type: ignore[arg-type]
        for split, known in (("train", (*names, "10")), ("test", names))
    )
    options: dict[str, Any] = {"train_items": 150, "test_items": 60}
    wanted = probe(model, **options)(model)
    assert OnlineProbe(model, "knn", train, test, **options)(model) == wanted


# Pictures


def tile(path: Path, row: int, column: int, side: int = 64) -> np.ndarray:
    top, left = row * (side + 2), column * (side + 2)
    return np.asarray(Image.open(path))[top : top + side, left : left + side]


def test_a_picture_shows_the_samples_of_the_seed(model: MAGE, tmp_path: Path) -> None:
    watch = Watch(model, tmp_path, 100, columns=3, sampler=SAMPLER, seed=7)
    assert watch(1200, model) == {}
    path = tmp_path / "samples" / "step-000001200.png"
    assert path == watch.picture(1200)
    images = to_uint8(
        generate(model, 9, config=SAMPLER, seed=7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    for index, image in enumerate(images):
        assert (tile(path, index // 3, index % 3) == image.permute(1, 2, 0).numpy()).all()
    assert Image.open(path).size == (3 * 66 - 2, 3 * 66 - 2)
    written = path.read_bytes()
    watch(1200, model)
    assert path.read_bytes() == written, "written again, the same"


def test_classes_are_rows(model: MAGE, tmp_path: Path) -> None:
    watch = Watch(model, tmp_path, 1, columns=2, labels=[3, 0, 9], sampler=SAMPLER)
    watch(1, model)
    labels = torch.tensor([3, 3, 0, 0, 9, 9])
    images = to_uint8(generate(model, 6, labels_B=labels, config=SAMPLER, seed=0).repeat_interleave(4, 2))
    for index, image in enumerate(images):
        shown = tile(watch.picture(1), index // 2, index % 2)[:, ::4]
        assert (shown == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("labels", [None, (0, 1, 2)])
def test_progress_is_a_row_a_look(labels: Any, model: MAGE, tmp_path: Path) -> None:
    watch = Watch(model, tmp_path, 1, columns=2, labels=labels, sampler=SAMPLER)
    assert watch.write_progress(5) is None
    for step in range(1, 6):
        with torch.no_grad():
            model.head.bias.normal_()
        watch(step, model)
    watch(7, model)  # of a run that went further once
    Image.new("RGB", (50, 40)).save(watch.folder / "step-000000000.png")  # of other settings
    path = watch.write_progress(5, most_rows=4)
    assert path == tmp_path / "samples" / "progress.png"
    width = 2 if labels is None else 3
    # 6 pictures, the first of which does not fit; 4 evenly spaced: 0, 2, 3, 5
    assert Image.open(path).size == (width * 66 - 2, 3 * 66 - 2)
    for row, step in enumerate((2, 3, 5)):
        for column in range(width):
            corner = (0, column) if labels is None else (column, 0)
            assert (tile(path, row, column) == tile(watch.picture(step), *corner)).all()


def test_no_pictures(tmp_path: Path) -> None:
    model = MAGE(tiny())
    watch = Watch(model, tmp_path, 1, columns=0)
    assert watch(1, model) == {}
    assert watch.write_progress(1) is None
    assert not list(tmp_path.iterdir())


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps is 0, columns 4, wanted 1 or more and 0 or more"),
        ({"columns": -1}, "columns -1"),
        ({"labels": []}, "there are no labels, wanted one or more, or None"),
        ({"labels": [0, 11]}, "labels .* 11"),
        ({"labels": [0, 10]}, "labels holds 10, which is no class"),
        ({"sampler": SamplerConfig(approximation="drop_masked")}, "approximation is 'drop_masked'"),
    ],
)
def test_a_watch_refuses_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build(MAGEConfig.tiny(encoder_tokens="unmasked"))
    with pytest.raises(InputError, match=f"watch: .*{message}"):
        Watch(model, tmp_path, **({"every_steps": 5} | options))
    with pytest.raises(InputError, match="the model has no tokenizer"):
        Watch(MAGE(tiny()), tmp_path, 5)


def folder(path: Path, *files: str) -> str:
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        gradient(16, 16).save(path / file)
    return f"folder:{path}"


def other_classes(model: MAGE, path: Path) -> tuple[str, str]:
    return folder(path, "a/1.png", "b/1.png"), "digits"


def unlabelled(model: MAGE, path: Path) -> tuple[str, str]:
    return (folder(path, *(f"{n}.png" for n in range(6))),) * 2


def damaged(model: MAGE, path: Path) -> tuple[str, str]:
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        (path / name / "1.png").write_text("not an image")
    return (f"folder:{path}",) * 2


def other_tokenizer(model: MAGE, path: Path) -> tuple[str, str]:
    return (cache(path, model, "all", tokenizer_fingerprint="abc"),) * 2


def other_length(model: MAGE, path: Path) -> tuple[str, str]:
    return (cache(path, model, "all", length=9),) * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_classes, "has the classes a, b, digits 0, 1, 2, 3, 4, ..., wanted the same"),
        (unlabelled, "has 1 class, wanted labelled data of more"),
        (damaged, "none of its 2 images is readable"),
        (other_tokenizer, r"was made by another tokenizer than the model's \(abc and not "),
        (other_length, "has 9 tokens of 32 codes an image, the model 16 of 32"),
    ],
)
def test_a_probe_refuses_data_at_once(
    make: Callable[[MAGE, Path], tuple[str, str]], message: str, model: MAGE, tmp_path: Path
) -> None:
    train, test = (open_source(spec, image_size=16, split="all") for spec in make(model, tmp_path / "data"))
    with pytest.raises(InputError, match=message):
        OnlineProbe(model, "knn", train, test)


def test_a_probe_refuses_numbers_and_models_at_once(model: MAGE) -> None:
    with pytest.raises(InputError, match="probe is 'mlp', wanted knn or linear"):
        probe(model, "mlp")
    with pytest.raises(InputError, match="train_items 0, test_items 1000, batch_size 128"):
        probe(model, train_items=0)
    with pytest.raises(InputError, match="the 1 items taken of digits are of one class"):
        probe(model, train_items=1)
    with pytest.raises(InputError, match="digits holds images, but the model has no tokenizer"):
        probe(MAGE(tiny()))
    with pytest.raises(InputError, match='encoder_input is "features", wanted "tokens"'):
        probe(MAGE(MAGEConfig.tiny(encoder_input="features")))
