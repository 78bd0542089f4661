"""Writing a token cache by shards: in any order, killed at any point, and what a resumed writer refuses."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast.errors import InputError
from mage_fast.training.token_cache import TokenCache, TokenCacheWriter

ITEMS, SIZE = 103, 4
SETTINGS: dict[str, Any] = {"length": 64, "codebook_size": 1000, "views": 3, "shard_size": SIZE}
IDS = torch.randint(0, 1000, (ITEMS, 3, 64), generator=torch.Generator().manual_seed(0))
SHARDS = -(-ITEMS // SIZE)


def write_shard(writer: TokenCacheWriter, number: int) -> None:
    items = slice(number * SIZE, (number + 1) * SIZE)
    writer.write_shard(number, IDS[items], torch.arange(ITEMS)[items])


def whole(folder: Path) -> dict[str, bytes]:
    with TokenCacheWriter(folder, **SETTINGS) as writer:
        writer.append(IDS, torch.arange(ITEMS))
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(SHARDS)), stops=st.lists(st.integers(0, SHARDS), max_size=3))
def test_shards_in_any_order_by_any_writers(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    bounds = [0, *sorted(stops), SHARDS]
    for first, stop in itertools.pairwise(bounds):
        writer = TokenCacheWriter(folder, **SETTINGS)
        assert writer.missing(ITEMS) == sorted(order[first:])
        copy = pickle.loads(pickle.dumps(writer))
        for position, number in enumerate(order[first:stop]):
            assert not writer.is_done(number)
            write_shard(copy if position % 2 else writer, number)
            assert writer.is_done(number)
    writer = TokenCacheWriter(folder, **SETTINGS)
    assert writer.missing(ITEMS) == []
    with pytest.raises(InputError, match=rf"unfinished \({ITEMS} items\)"):
        TokenCache(folder)
    writer.close()
    assert writer.missing(ITEMS) == []
    assert files(folder) == whole(tmp_path_factory.mktemp("whole"))


def work(folder: Path) -> None:
    writer = TokenCacheWriter(folder, **SETTINGS)
    for number in writer.missing(ITEMS):
        write_shard(writer, number)
    writer.close()


def test_killed_at_any_point_it_goes_on(tmp_path: Path) -> None:
    """SIGKILL to a process that writes, at random times: in a shard, in its record, in the index."""
    folder = tmp_path / "broken"
    context = multiprocessing.get_context("fork")  # starts in no time
    kept: dict[Path, tuple[int, int]] = {}
    killed = 0
    while (
        not (folder / "index.json").exists()
        or not json.loads((folder / "index.json").read_text())["complete"]
    ):
        process = context.Process(target=work, args=(folder,))
        process.start()
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode != 0
        for path, stamp in kept.items():
            if path.suffix == ".bin":
                assert (path.stat().st_ino, path.stat().st_mtime_ns) == stamp, (
                    "a finished shard is written again"
                )
        done = {path.stem[-5:] for path in folder.glob("shard-*.json")}
        kept |= {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in folder.glob("*.bin")
            if path.stem[-5:] in done
        }
    work(folder)
    assert killed
    assert files(folder) == whole(tmp_path / "whole")


def test_a_full_disk_leaves_the_finished_shards(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path / "cache", **SETTINGS)
    for number in (0, 2):
        write_shard(writer, number)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=r"ids-00001\.bin"):
            write_shard(writer, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = TokenCacheWriter(tmp_path / "cache", **SETTINGS)
    assert again.missing(ITEMS) == [1, *range(3, SHARDS)]
    assert not list((tmp_path / "cache").glob(".*"))


def test_damaged_shards_of_an_unfinished_cache_are_named(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path, **SETTINGS)
    for number in (0, 3):
        write_shard(writer, number)
    shard, record = tmp_path / "ids-00003.bin", tmp_path / "shard-00003.json"
    content, said = shard.read_bytes(), record.read_text()
    for damage, message in (
        (content[:-1], "ids-00003.bin has 1535 bytes, wanted 1536"),
        (content[:-1] + bytes([content[-1] ^ 1]), "ids-00003.bin has CRC-32"),
        ((tmp_path / "ids-00000.bin").read_bytes(), "ids-00003.bin has CRC-32"),
    ):
        shard.write_bytes(damage)
        with pytest.raises(InputError, match=message):
            TokenCacheWriter(tmp_path, **SETTINGS)
    shard.write_bytes(content)
    for text, message in (
        (said[:-4], r"shard-00003\.json is damaged"),
        ("[]", r"shard-00003\.json is a list, wanted an object"),
        ("{}", r"shard-00003\.json has a damaged shard entry"),
        ((tmp_path / "shard-00000.json").read_text(), "shard 3 is in ids-00000.bin, wanted ids-00003.bin"),
    ):
        record.write_text(text)
        with pytest.raises(InputError, match=message):
            TokenCacheWriter(tmp_path, **SETTINGS)
    shard.unlink()
    record.write_text(said)
    with pytest.raises(InputError, match=r"ids-00003\.bin is missing"):
        TokenCacheWriter(tmp_path, **SETTINGS)


def test_other_data_is_refused(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path, **SETTINGS)
    write_shard(writer, SHARDS - 1)
    for items in (ITEMS - 4, ITEMS - 1, ITEMS + 1, ITEMS + 400):
        with pytest.raises(InputError, match=f"not those of {items} items: the data has changed"):
            TokenCacheWriter(tmp_path, **SETTINGS).missing(items)
    work(tmp_path)
    for items in (ITEMS - 4, ITEMS + 1, ITEMS + 4):
        with pytest.raises(InputError, match="the data has changed"):
            TokenCacheWriter(tmp_path, **SETTINGS).missing(items)


def test_wrong_shards_are_refused(tmp_path: Path) -> None:
    writer = TokenCacheWriter(tmp_path, **SETTINGS)
    for count in (0, SIZE + 1):
        with pytest.raises(InputError, match=f"shard 2 got {count} items, wanted 1 to 4"):
            writer.write_shard(2, IDS[:count], torch.arange(count))
    with pytest.raises(InputError, match="item 9 has id 1000"):
        writer.write_shard(2, IDS[:4].index_fill(0, torch.tensor([1]), 1000), torch.arange(4))
    write_shard(writer, 1)
    with pytest.raises(InputError, match="shard 0 is missing"):
        writer.close()
    with pytest.raises(InputError, match="codebook_size is 2147483649"):
        TokenCacheWriter(tmp_path / "x", length=1, codebook_size=2**31 + 1)


def test_shards_in_each_others_place_are_refused(tmp_path: Path) -> None:
    whole(tmp_path)
    first, second = tmp_path / "ids-00000.bin", tmp_path / "ids-00001.bin"
    os.rename(first, tmp_path / "x")
    os.rename(second, first)
    os.rename(tmp_path / "x", second)
    with pytest.raises(InputError, match=r"ids-00000\.bin has CRC-32"):
        TokenCache(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    index["shards"][:2] = index["shards"][1::-1]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"shard 0 is in ids-00001\.bin, wanted ids-00000\.bin"):
        TokenCache(tmp_path, verify=False)


def test_batches_over_many_shards_keep_their_order(tmp_path: Path) -> None:
    whole(tmp_path)
    cache = TokenCache(tmp_path)
    order = np.random.default_rng(0).integers(0, ITEMS, 500)
    for view in range(3):
        np.testing.assert_array_equal(cache.batch(order, view), IDS[order, view])
    assert cache.batch(np.empty(0, np.int64)).shape == (0, 64)
