"""The token cache: round trip, resuming, damage, and names that would leave the folder."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast.errors import InputError
from mage_fast.training.token_cache import TokenCache, TokenCacheWriter


def write(folder: Path, items: int = 10, **settings: Any) -> torch.Tensor:
    settings = {"length": 4, "codebook_size": 100, "views": 2, "shard_size": 4} | settings
    generator = torch.Generator().manual_seed(items)
    shape = (items, settings["views"], settings["length"])
    ids = torch.randint(0, settings["codebook_size"], shape, generator=generator)
    with TokenCacheWriter(folder, **settings) as writer:
        writer.append(ids, torch.arange(items))
    return ids


def edit_index(folder: Path, change: Any) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@settings(max_examples=20, deadline=None)
@given(
    items=st.integers(0, 23),
    views=st.integers(1, 3),
    shard_size=st.integers(1, 9),
    codebook_size=st.sampled_from([1, 1024, 65535, 65536, 2**20]),
    pieces=st.lists(st.integers(0, 7), max_size=8),
    data=st.data(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    items: int,
    views: int,
    shard_size: int,
    codebook_size: int,
    pieces: list[int],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    ids = torch.randint(0, codebook_size, (items, views, 5))
    labels = torch.randint(0, 1000, (items,))
    with TokenCacheWriter(
        folder, length=5, codebook_size=codebook_size, views=views, shard_size=shard_size
    ) as writer:
        for piece in [*pieces, items]:
            start = writer.next_item
            writer.append(ids[start : start + piece], labels[start : start + piece])
    cache = TokenCache(folder)
    assert len(cache) == items
    np.testing.assert_array_equal(cache.labels, labels)
    wanted_bytes = 2 if codebook_size <= 65535 else 4
    stored = sum(file.stat().st_size for file in folder.glob("ids-*.bin"))
    assert stored == items * views * 5 * wanted_bytes
    if items:
        indices = data.draw(st.lists(st.integers(0, items - 1), max_size=20))
        for view in range(views):
            batch = cache.batch(indices, view)
            assert batch.dtype == (np.uint16 if codebook_size <= 65535 else np.int32)
            np.testing.assert_array_equal(batch, ids[indices, view])


def test_an_interrupted_writer_goes_on(tmp_path: Path) -> None:
    ids = torch.randint(0, 100, (11, 4))
    settings: dict[str, Any] = {"length": 4, "codebook_size": 100, "shard_size": 4}
    with contextlib.suppress(ZeroDivisionError), TokenCacheWriter(tmp_path, **settings) as writer:
        writer.append(ids[:6], torch.arange(6))
        assert writer.next_item == 6
        raise ZeroDivisionError
    with pytest.raises(InputError, match=r"unfinished \(4 items\)"):
        TokenCache(tmp_path)
    for name, value in (("length", 5), ("codebook_size", 101), ("tokenizer_fingerprint", "other")):
        with pytest.raises(InputError, match=f"was begun with {name}"):
            TokenCacheWriter(tmp_path, **settings | {name: value})
    with TokenCacheWriter(tmp_path, **settings) as writer:
        assert writer.next_item == 4
        writer.append(ids[4:], torch.arange(4, 11))
    cache = TokenCache(tmp_path)
    np.testing.assert_array_equal(cache.batch(np.arange(11)), ids)
    np.testing.assert_array_equal(cache.labels, np.arange(11))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    again = TokenCacheWriter(tmp_path, **settings)
    assert again.complete
    with pytest.raises(InputError, match="is complete already"):
        again.append(ids[:1], torch.zeros(1, dtype=torch.int64))
    again.close()
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize("bad", [-1, 100, 65536 + 5])
def test_an_id_outside_the_codebook_is_named(tmp_path: Path, bad: int) -> None:
    ids = torch.zeros(3, 4, dtype=torch.int64)
    ids[1, 2] = bad
    writer = TokenCacheWriter(tmp_path, length=4, codebook_size=100)
    with pytest.raises(InputError, match=rf"item 1 has id {bad}, wanted 0 <= id < codebook_size 100"):
        writer.append(ids, torch.zeros(3, dtype=torch.int64))
    assert writer.next_item == 0


def test_wrong_shapes_and_settings_are_refused(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path / "a", length=4, codebook_size=100, views=2)
    for ids, labels in (((3, 4), 3), ((3, 2, 5), 3), ((3, 1, 4), 3), ((3, 2, 4), 2)):
        with pytest.raises(InputError, match=r"wanted \(B, 2, 4\) and \(B,\)"):
            writer.append(torch.zeros(ids).long(), torch.zeros(labels).long())
    for name in ("length", "codebook_size", "views", "shard_size"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            TokenCacheWriter(tmp_path / "b", **{"length": 4, "codebook_size": 9} | {name: 0})  # type: ignore[arg-type]


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "ids-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(InputError, match=r"ids-00001.bin has 61 bytes, wanted 64 \(4 items\)"):
        TokenCache(tmp_path, verify=False)
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(InputError, match=r"ids-00001.bin has CRC-32 \w{8}, wanted \w{8}"):
        TokenCache(tmp_path)
    TokenCache(tmp_path, verify=False)
    shard.unlink()
    with pytest.raises(InputError, match=r"ids-00001.bin is missing"):
        TokenCache(tmp_path)
    shard.symlink_to(tmp_path / "ids-00000.bin")
    with pytest.raises(InputError, match="a link"):
        TokenCache(tmp_path, verify=False)
    shard.unlink()
    shard.write_bytes(whole)
    (tmp_path / "labels-00002.bin").write_bytes(b"1234567")
    with pytest.raises(InputError, match=r"labels-00002.bin has 7 bytes, wanted 16"):
        TokenCache(tmp_path)


def test_stored_ids_outside_the_codebook_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    edit_index(tmp_path, lambda index: index.update(codebook_size=50))
    with pytest.raises(InputError, match="wanted below 50"):
        TokenCache(tmp_path)


@pytest.mark.parametrize("name", ["../ids-00000.bin", "/etc/passwd", "a/b.bin", "..", "", None, "x.bin\n"])
def test_shard_names_stay_in_the_folder(tmp_path: Path, name: str | None) -> None:
    write(tmp_path)
    edit_index(tmp_path, lambda index: index["shards"][0]["ids"].update(file=name))
    with pytest.raises(InputError, match="is not a plain file name"):
        TokenCache(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=2),
        lambda index: index.update(format="other"),
        lambda index: index.update(length=-4),
        lambda index: index.update(views=True),
        lambda index: index.update(views="2"),
        lambda index: index.pop("shards"),
        lambda index: index["shards"].append({"items": 3}),
        lambda index: index["shards"].append(None),
        lambda index: index["shards"][0].update(items=0),
    ],
)
def test_damaged_indices_are_refused(tmp_path: Path, change: Any) -> None:
    write(tmp_path)
    edit_index(tmp_path, change)
    with pytest.raises(InputError, match=r"index\.json"):
        TokenCache(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for content in ("", "[1, 2", "[1, 2]", '"x"'):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(InputError, match=r"index\.json"):
            TokenCache(tmp_path)


def test_indices_and_views_out_of_range(tmp_path: Path) -> None:
    write(tmp_path)
    cache = TokenCache(tmp_path)
    for indices in ([-1], [10], [0, 99]):
        with pytest.raises(InputError, match="wanted 0 to 9"):
            cache.batch(indices)
    with pytest.raises(InputError, match="view is 2"):
        cache.batch([0], 2)


def test_a_pickled_cache_maps_its_shards_again(tmp_path: Path) -> None:
    ids = write(tmp_path)
    pickled = pickle.dumps(TokenCache(tmp_path))
    assert len(pickled) < 500
    np.testing.assert_array_equal(pickle.loads(pickled).batch([9, 0], 1), ids[[9, 0], 1])


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    write(tmp_path)
    names = {f"{part}-0000{i}.bin" for part in ("ids", "labels") for i in range(3)}
    assert {file.name for file in tmp_path.iterdir()} == names | {"index.json"}
