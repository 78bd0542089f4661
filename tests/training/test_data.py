"""Data sources and the resumable iterator, on real digits, photographs and made files."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import BAD, gradient
from PIL import Image
from sklearn.datasets import load_digits

from mage_fast.errors import InputError
from mage_fast.training.augment import Augmentation
from mage_fast.training.data import batches, open_source, steps_per_epoch, training_batches
from mage_fast.training.images import UnreadableImage
from mage_fast.training.sources import split_indices
from mage_fast.training.token_cache import TokenCacheWriter


def test_digits_are_the_real_ones_scaled_and_split() -> None:
    data = load_digits()
    train, test = (open_source("digits", image_size=8, split=split) for split in ("train", "test"))
    everything = open_source("digits", image_size=8, split="all")
    assert len(train) + len(test) == len(everything) == 1797
    assert abs(len(test) / 1797 - 0.2) < 0.01
    for digit in range(10):
        share = (test.labels == digit).sum() / (everything.labels == digit).sum()
        assert abs(share - 0.2) < 0.01
    batch = next(batches(everything, 1797, shuffle=False))
    assert batch.inputs.shape == (1797, 3, 8, 8)
    assert (batch.inputs[:, 0] == batch.inputs[:, 1]).all()
    error = (batch.inputs[:, 0] - torch.from_numpy(data.images / 16)).abs().max()
    assert error <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(batch.labels, data.target)
    pictures = {everything.image(i).tobytes() for i in range(1797)}
    held_out = {test.image(i).tobytes() for i in range(len(test))}
    seen = {train.image(i).tobytes() for i in range(len(train))}
    assert not held_out & seen
    assert len(held_out | seen) == len(pictures)


def test_digits_at_another_size_match_pillow_bicubic() -> None:
    source = open_source("digits", image_size=32, split="all")
    grey = np.round(load_digits().images[5] * 255 / 16).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.BICUBIC))
    inputs = next(batches(source, 6, shuffle=False)).inputs
    np.testing.assert_array_equal(inputs[5, 0].numpy() * 255, wanted)
    assert inputs.min() >= 0
    assert inputs.max() <= 1


def test_digits_are_never_mirrored() -> None:
    source = open_source("digits", image_size=16)
    flipped = Augmentation(crop="center", flip=True)
    plain = next(batches(source, 64, seed=3))
    same = next(batches(source, 64, seed=3, augment=flipped))
    assert torch.equal(plain.inputs, same.inputs)


def test_folder_classes_and_bad_files(zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(f"folder:{zoo}", split="all")
    assert source.class_names == ("drawings", "photographs")
    assert len(source) == 11 + len(BAD)
    assert not source.bad_files
    with caplog.at_level(logging.WARNING):
        found = list(batches(source, 4, image_size=32, shuffle=False, drop_last=False))
        list(batches(source, 4, image_size=32, shuffle=False, drop_last=False))
    assert {Path(name).name for name in source.bad_files} == BAD
    indices = torch.cat([batch.indices for batch in found]).tolist()
    assert len(indices) == len(set(indices)) == 11
    for batch in found:
        assert batch.inputs.shape[1:] == (3, 32, 32)
        assert batch.inputs.dtype == torch.float32
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
    for bad in BAD:
        named = [r for r in caplog.records if bad in r.getMessage() and r.getMessage().startswith("skipped")]
        assert len(named) == 1
    assert any("skipped 4 files in all" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_stay_full_with_bad_files(zoo: Path, workers: int) -> None:
    source = open_source(f"folder:{zoo}", split="all")
    bad = {i for i in range(len(source)) if Path(source.name(i)).name in BAD}
    options = {"image_size": 16, "seed": 5, "augment": "strong"}
    found = list(batches(source, 5, epochs=2, workers=workers, **options))  # type: ignore[arg-type]
    assert [len(batch.labels) for batch in found] == [5] * 6
    assert not {int(i) for batch in found for i in batch.indices} & bad
    assert len(source.bad_files) == len(BAD)
    alone = list(batches(source, 5, epochs=2, **options))  # type: ignore[arg-type]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(found, alone, strict=True))


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 25), seed=st.integers(0, 2**40), batch_size=st.integers(1, 40))
def test_resumed_iteration_equals_the_unbroken_one(start: int, seed: int, batch_size: int) -> None:
    source = open_source("digits", image_size=8, split="test")
    options = {"seed": seed, "augment": "strong"}
    unbroken = itertools.islice(training_batches(source, batch_size, **options), start, start + 3)
    resumed = training_batches(source, batch_size, step=start, **options)
    for a, b in zip(unbroken, resumed, strict=False):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epochs_differ_and_cover_everything() -> None:
    source = open_source("digits", image_size=8, split="test")
    steps = steps_per_epoch(source, 50, drop_last=False)
    found = list(batches(source, 50, epochs=2, drop_last=False, augment="weak"))
    first, second = (torch.cat([b.indices for b in half]) for half in (found[:steps], found[steps:]))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(source)))
    assert first.tolist() != second.tolist()
    same_order = list(batches(source, 360, epochs=2, shuffle=False, drop_last=False, augment="weak"))
    assert torch.equal(same_order[0].indices, same_order[1].indices)
    assert not torch.equal(same_order[0].inputs, same_order[1].inputs)
    again = list(batches(source, 50, epoch=1, drop_last=False, augment="weak"))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(again, found[steps:], strict=True))


def test_iteration_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    list(batches(open_source("digits", image_size=8), 500, augment="strong"))
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
    assert np.random.random() == np.random.RandomState(0).random()  # noqa: NPY002


def test_bad_sources_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiffs").mkdir()
    (tmp_path / "tiffs" / "a.tif").write_bytes(b"x")
    (tmp_path / "file.png").write_bytes(b"x")
    for spec, message in (
        ("imagenet", "unknown data source 'imagenet', wanted one of digits, folder:PATH"),
        ("digits:3", "unknown data source"),
        ("folder:", "no such folder"),
        (f"folder:{tmp_path}/missing", "no such folder"),
        (f"folder:{tmp_path}/file.png", "is a file, wanted a folder"),
        (f"folder:{tmp_path}/empty", "holds no PNG"),
        (f"folder:{tmp_path}/tiffs", "1 other files, as a.tif"),
        (f"tokens:{tmp_path}/missing", "there is no token cache"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="split is 'val'"):
        open_source("digits", split="val")  # type: ignore[arg-type]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_text("text")
    source = open_source(f"folder:{tmp_path}", split="all")
    for shuffle, workers in itertools.product((True, False), (0, 1)):
        with pytest.raises(InputError, match=r"^folder:.*: none of its 2 images is readable$"):
            list(batches(source, 1, shuffle=shuffle, workers=workers))
    with pytest.raises(InputError, match="has 2 items, wanted at least batch_size 3"):
        batches(source, 3, image_size=8)


def test_flat_folder_is_one_class_and_loose_images_come_last(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    assert open_source(f"folder:{tmp_path}").class_names == (".",)
    (tmp_path / "B" / "deeper").mkdir(parents=True)
    gradient().save(tmp_path / "B" / "deeper" / "b.png")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("B", ".")
    assert sorted(source.labels.tolist()) == [0, 1]


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    gradient().save(outside / "secret.png")
    gradient().save(inside / "own.png")
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "alias.png").symlink_to(inside / "own.png")
    (inside / "folder").symlink_to(outside)
    source = open_source(f"folder:{inside}", split="all")
    assert {Path(source.name(i)).name for i in range(len(source))} == {"own.png", "alias.png"}
    assert {Path(name).name for name in source.bad_files} == {"link.png", "folder"}
    (inside / "alias.png").unlink()
    (inside / "alias.png").symlink_to(outside / "secret.png")  # exchanged after the scan
    with pytest.raises(UnreadableImage, match="out of the folder"):
        source.image(0)


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                gradient().save(tmp_path / part / name / f"{i}.png")
    sizes = {split: len(open_source(f"folder:{tmp_path}", split=split)) for split in ("train", "test", "all")}  # type: ignore[arg-type]
    assert sizes == {"train": 6, "test": 4, "all": 10}
    assert open_source(f"folder:{tmp_path}", split="test").class_names == ("cat", "dog")
    (tmp_path / "train" / "bee").mkdir()
    gradient().save(tmp_path / "train" / "bee" / "0.png")
    test = open_source(f"folder:{tmp_path}", split="test")  # which has no bee: labels are those of training
    assert (test.class_names, test.labels.tolist()) == (("bee", "cat", "dog"), [1, 1, 2, 2])


def test_split_is_stable_when_files_are_added() -> None:
    names = [f"{i}.png" for i in range(200)]
    labels = np.zeros(200, dtype=np.int64)
    before = {names[i] for i in split_indices(labels[:190], names[:190], "test")}
    after = {names[i] for i in split_indices(labels, names, "test")}
    assert len(before) == 38
    assert len(before - after) <= 2


def test_without_resizing_a_small_image_is_refused_before_training(tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "large.png")
    gradient(64, 20).save(tmp_path / "small.png")
    source = open_source(f"folder:{tmp_path}", split="all")
    for crop in ("random", "center"):
        with pytest.raises(InputError, match=r"small.png is 64 x 20 pixels, wanted at least .* 32 x 32"):
            batches(source, 2, image_size=32, augment=Augmentation(crop=crop, resize=False))  # type: ignore[arg-type]
    batch = next(batches(source, 2, image_size=20, augment=Augmentation(resize=False, flip=False)))
    assert batch.inputs.shape == (2, 3, 20, 20)
    (upscaled,) = batches(source, 2, image_size=128)
    assert upscaled.inputs.shape == (2, 3, 128, 128)


def test_min_side_skips_tiny_images(tmp_path: Path) -> None:
    gradient(64, 64).save(tmp_path / "large.png")
    gradient(3, 64).save(tmp_path / "tiny.png")
    source = open_source(f"folder:{tmp_path}", split="all", min_side=8)
    (batch,) = batches(source, 2, image_size=16, shuffle=False)
    assert len(batch.labels) == 1
    assert list(source.bad_files.values()) == ["3 x 64 pixels, min_side is 8"]


def test_token_source_cycles_views(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (20, 3, 4))
    with TokenCacheWriter(tmp_path / "cache", length=4, codebook_size=50, views=3, split="train") as writer:
        writer.append(ids, torch.arange(20))
    source = open_source(f"tokens:{tmp_path}/cache")
    with pytest.raises(InputError, match="made from the train split, wanted test"):
        open_source(f"tokens:{tmp_path}/cache", split="test")
    for workers in (0, 1):
        for step, batch in enumerate(batches(source, 10, epochs=4, workers=workers)):
            assert batch.inputs.dtype == torch.uint16
            assert torch.equal(batch.inputs.long(), ids[batch.indices, step // 2 % 3])
            assert torch.equal(batch.labels, batch.indices)
