"""Batches in shares and in views: what several processes and contrastive pairs get is what one gets."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import BAD, gradient

from mage_fast.errors import InputError
from mage_fast.training.augment import AUGMENTATIONS, applied, drawn, item_generator
from mage_fast.training.data import Batch, batches, open_source, training_batches
from mage_fast.training.sources import Source, summary_of_bad_files
from mage_fast.training.token_cache import TokenCacheWriter


def joined(parts: list[Batch], *, images: int = 0) -> Batch:
    return Batch(
        torch.cat([part.inputs for part in parts], dim=images),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.indices for part in parts]),
    )


def assert_equal(found: Batch, wanted: Batch) -> None:
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    split=st.integers(1, 6),
    size=st.integers(1, 9),
    step=st.integers(0, 40),
    seed=st.integers(0, 2**40),
    views=st.integers(1, 2),
    workers=st.sampled_from([0, 0, 0, 2]),
)
def test_shares_in_number_order_are_the_batch(
    split: int, size: int, step: int, seed: int, views: int, workers: int
) -> None:
    source = open_source("digits", image_size=8, split="test")
    options = {"step": step, "seed": seed, "augment": "strong", "views": views, "workers": workers}
    whole = list(itertools.islice(training_batches(source, size * split, **options), 3))
    shares = [
        list(itertools.islice(training_batches(source, size * split, split=split, shares=[n], **options), 3))
        for n in range(split)
    ]
    assert all(len(batch.labels) == size for share in shares for batch in share)
    for wanted, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert_equal(joined(list(parts), images=int(views > 1)), wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_of_three_micro_batches_each(workers: int) -> None:
    """Rank r of W computes numbers r, r + W, ...: the two ranks alternate, in the middle of an epoch too."""
    source = open_source("digits", image_size=8, split="test")  # 359 items: 9 steps of 36 an epoch
    options = {"step": 7, "seed": 1, "augment": "weak", "workers": workers}
    whole = itertools.islice(training_batches(source, 36, **options), 4)
    ranks = [training_batches(source, 36, split=6, shares=range(rank, 6, 2), **options) for rank in (0, 1)]
    for wanted in whole:
        of_rank = [[next(rank) for _ in range(3)] for rank in ranks]
        assert_equal(joined([part for pair in zip(*of_rank, strict=True) for part in pair]), wanted)
    for rank in ranks:
        rank.close()


def test_an_incomplete_last_batch_is_shared_too() -> None:
    source = open_source("digits", image_size=8, split="test")
    options = {"shuffle": False, "drop_last": False}
    shares = [list(batches(source, 200, split=4, shares=[n], **options)) for n in range(4)]  # type: ignore[arg-type]
    assert [[len(batch.labels) for batch in share] for share in shares] == [[50, 50]] * 3 + [[50, 9]]
    assert sorted(i for share in shares for b in share for i in b.indices.tolist()) == list(range(359))
    (one,) = batches(source, 800, split=4, shares=[0], **options)  # type: ignore[arg-type]
    assert len(one.labels) == 200
    assert not list(batches(source, 800, split=4, shares=[3], **options))  # type: ignore[arg-type]


def test_a_damaged_file_has_one_substitute_in_every_process(zoo: Path) -> None:
    def opened() -> Source:
        return open_source(f"folder:{zoo}", split="all")

    options = {"image_size": 16, "seed": 3, "augment": "strong", "epochs": 3}
    whole = list(batches(opened(), 6, **options))  # type: ignore[arg-type]
    sources = [opened() for _ in range(3)]
    shares = [list(batches(s, 6, split=3, shares=[n], **options)) for n, s in enumerate(sources)]  # type: ignore[arg-type]
    for wanted, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert_equal(joined(list(parts)), wanted)
    together = sorted({name for source in sources for name in source.bad_files})
    assert {Path(name).name for name in together} == BAD
    assert sum(source.bad_count for source in sources) >= len(BAD) == len(together)
    assert summary_of_bad_files(together, first=2) == f"4 files in all: {together[0]}, {together[1]}, ..."
    assert summary_of_bad_files(together[:1]) == f"1 files in all: {together[0]}"


def test_a_share_of_bad_files_only_is_no_error_for_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    gradient().save(tmp_path / "b.png")
    source = open_source(f"folder:{tmp_path}", split="all")
    options = {"image_size": 8, "shuffle": False, "split": 2}
    assert not list(batches(source, 2, shares=[0], **options))  # type: ignore[arg-type]
    assert len(list(batches(source, 2, shares=[1], **options))) == 1  # type: ignore[arg-type]


def test_views_are_independent_crops_of_one_decoded_image(zoo: Path) -> None:
    source = open_source(f"folder:{zoo}/photographs", split="all")
    decoded: list[int] = []
    read = source.image
    source.image = lambda index: (decoded.append(index), read(index))[1]  # type: ignore[method-assign]
    options = {"image_size": 16, "seed": 9, "epoch": 2, "augment": "strong"}
    for batch, plain in zip(
        batches(source, 4, views=3, **options),  # type: ignore[arg-type]
        batches(open_source(f"folder:{zoo}/photographs", split="all"), 4, **options),  # type: ignore[arg-type]
        strict=True,
    ):
        assert batch.inputs.shape == (3, 4, 3, 16, 16)
        assert torch.equal(batch.inputs[0], plain.inputs)
        assert torch.equal(batch.labels, plain.labels)
        assert torch.equal(batch.indices, plain.indices)
        assert not torch.equal(batch.inputs[1], batch.inputs[2])
    assert len(decoded) == len(set(decoded)) + source.bad_count


def test_view_v_draws_from_a_generator_of_its_own() -> None:
    source = open_source("digits", image_size=16)
    batch = next(batches(source, 5, views=3, seed=7, epoch=4, augment="weak-no-flip"))
    for view, place in itertools.product(range(3), range(5)):
        index = int(batch.indices[place])
        key = (7, 4, index, view) if view else (7, 4, index)
        image = source.image(index)
        augmentation, generator = AUGMENTATIONS["weak-no-flip"], np.random.default_rng(key)
        image = applied(image, drawn(image.size, 16, augmentation, generator), 16)
        wanted = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
        np.testing.assert_array_equal(batch.inputs[view, place].numpy(), wanted)
    draws = {item_generator(7, 4, 11, view).random() for view in range(50)}
    assert len(draws) == 50


@pytest.mark.parametrize("split", [1, 2])
def test_token_views_pass_through_the_views_of_the_cache(tmp_path: Path, split: int) -> None:
    ids = torch.randint(0, 50, (12, 3, 4))
    with TokenCacheWriter(tmp_path / "cache", length=4, codebook_size=50, views=3, split="train") as writer:
        writer.append(ids, torch.arange(12))
    source = open_source(f"tokens:{tmp_path}/cache")
    found = list(batches(source, 12, views=2, epochs=4, split=split, shares=range(split)))
    assert len(found) == 4 * split
    for number, batch in enumerate(found):
        epoch = number // split
        assert batch.inputs.shape == (2, 12 // split, 4)
        assert batch.inputs.dtype == torch.uint16
        for view in range(2):
            assert torch.equal(batch.inputs[view].long(), ids[batch.indices, (2 * epoch + view) % 3])
    with pytest.raises(InputError, match=r"cache has 3 views an image, wanted at least the 4 of a batch"):
        batches(source, 12, views=4)


def test_bad_shares_are_refused_at_once() -> None:
    source = open_source("digits", image_size=8)
    for options, message in (
        ({"split": 3}, "batch_size is 10, wanted a multiple of split 3"),
        ({"split": 0}, "split 0, wanted 1 or more"),
        ({"views": 0}, "views 0, split 1, wanted 1 or more"),
        ({"split": 2, "shares": [2]}, r"shares are \[2\], wanted numbers from 0 to 1"),
        ({"split": 2, "shares": [-1, 0]}, r"shares are \[-1, 0\], wanted"),
        ({"shares": []}, r"shares are \[\], wanted"),
    ):
        with pytest.raises(InputError, match=message):
            batches(source, 10, **options)  # type: ignore[arg-type]
