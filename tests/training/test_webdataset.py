"""Tar shards as a source: the same samples that reading the tars in order gives, and refusals by name."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import CHINA, gradient
from PIL import Image, ImageFile

from mage_fast.errors import InputError
from mage_fast.training import tar_shards
from mage_fast.training.augment import Augmentation
from mage_fast.training.data import batches, open_source, training_batches
from mage_fast.training.images import UnreadableImage
from mage_fast.training.sources import split_indices
from mage_fast.training.tar_shards import ShardReader, expand_braces
from mage_fast.training.webdataset import WebDatasetSource

Member = tuple[str, bytes | tarfile.TarInfo]


def encoded(shade: int, *, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 7)).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, members: Sequence[Member], *, layout: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of ten labelled images each, in the three layouts of tar, with names long and short."""
    folder = tmp_path / "shards"
    layouts = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.PAX_FORMAT]
    for shard, layout in enumerate(layouts):
        members: list[Member] = []
        for i in range(10 * shard, 10 * shard + 10):
            long = "" if layout == tarfile.USTAR_FORMAT else "größe-" * 30
            kind = ("png", "JPG", "webp", "bmp")[i % 4]
            pixels = encoded(i, kind={"JPG": "JPEG"}.get(kind, kind).upper())
            members += [
                (f"cats/{long}{i:04d}.{kind}", pixels),
                (f"cats/{long}{i:04d}.cls", b"%d\n" % (i % 3)),
            ]
            members.append((f"cats/{long}{i:04d}.caption.txt", b"a cat"))
        write_tar(folder / f"part-{shard:03d}.tar", members, layout=layout)
    return folder


def test_samples_are_those_of_the_tars_read_in_order(shards: Path) -> None:
    source = open_source(f"webdataset:{shards}", split="all")
    wanted, labels = [], []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith("cls"):
                    labels.append(int(content))
                elif not member.name.endswith("txt"):
                    wanted.append((f"{path}/{member.name}", content))
    assert len(source) == len(wanted) == 40
    assert [(source.name(i), source.encoded(i)) for i in range(40)] == wanted
    assert source.labels.tolist() == labels
    assert source.class_names == ("0", "1", "2")
    assert source.image(5).getpixel((0, 0))[0] in range(3, 8)
    assert not source.bad_files


@pytest.mark.parametrize("workers", [0, 2])
def test_order_resuming_and_shares_are_as_with_any_source(shards: Path, workers: int) -> None:
    def opened() -> WebDatasetSource:
        return open_source(f"webdataset:{shards}/part-{{000..003}}.tar", split="all")  # type: ignore[return-value]

    options = {"image_size": 8, "seed": 4, "augment": "strong", "workers": workers}
    unbroken = list(itertools.islice(training_batches(opened(), 12, **options), 8))
    assert sorted({int(i) for batch in unbroken[:3] for i in batch.indices}) != list(range(36))
    for batch, resumed in zip(unbroken[4:], training_batches(opened(), 12, step=4, **options), strict=False):
        assert all(torch.equal(x, y) for x, y in zip(batch, resumed, strict=True))
    for rank in range(2):
        share = training_batches(opened(), 12, split=2, shares=[rank], **options)
        for batch, part in zip(unbroken, share, strict=False):
            assert torch.equal(part.inputs, batch.inputs[6 * rank : 6 * rank + 6])
            assert torch.equal(part.labels, batch.labels[6 * rank : 6 * rank + 6])


def test_splits_are_stratified_and_stable(shards: Path) -> None:
    parts = {s: open_source(f"webdataset:{shards}", split=s) for s in ("train", "test", "all")}  # type: ignore[arg-type]
    names = {s: {source.name(i) for i in range(len(source))} for s, source in parts.items()}
    assert names["train"] | names["test"] == names["all"]
    assert not names["train"] & names["test"]
    assert np.bincount(parts["test"].labels).tolist() == [3, 3, 3]
    moved = shards.rename(shards.with_name("elsewhere"))
    again = open_source(f"webdataset:{moved}", split="test")
    assert {Path(again.name(i)).name for i in range(9)} == {Path(name).name for name in names["test"]}
    for part in ("train", "val"):
        write_tar(shards / part / "0.tar", [(f"{part}.png", encoded(1)), (f"{part}.cls", b"4")])
    held_out = open_source(f"webdataset:{shards}", split="test")
    assert (held_out.name(0), held_out.num_classes) == (f"{shards}/val/0.tar/val.png", 5)
    assert len(open_source(f"webdataset:{shards}", split="all")) == 2


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(-1, 4), max_size=60), salt=st.integers(0, 99))
def test_split_takes_a_fifth_of_every_class_by_hashed_name(labels: list[int], salt: int) -> None:
    names = [f"{salt}-{i}" for i in range(len(labels))]
    wanted: list[int] = []
    for label in set(labels):
        members = [i for i, other in enumerate(labels) if other == label]
        members.sort(key=lambda i: hashlib.sha256(names[i].encode()).digest())
        wanted += members[: round(len(members) * 0.2)]
    assert split_indices(np.array(labels, dtype=np.int64), iter(names), "test").tolist() == sorted(wanted)


def test_bad_images_and_strangers_are_skipped_and_named(tmp_path: Path) -> None:
    link, hard, pipe = (tarfile.TarInfo(f"{name}.png") for name in ("link", "hard", "pipe"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    pipe.type = tarfile.FIFOTYPE
    folder = tarfile.TarInfo("folder.png")
    folder.type = tarfile.DIRTYPE
    photograph = CHINA.read_bytes()
    path = write_tar(
        tmp_path / "0.tar",
        [
            ("a.png", encoded(3)),
            *((info.name, info) for info in (link, hard, pipe, folder)),
            ("../../outside.png", encoded(5)),
            ("._a.png", b"resource fork"),
            ("notes.txt", b"text"),
            ("cut.jpg", photograph[: len(photograph) // 2]),
            ("empty.png", b""),
            ("lonely.json", b'{"label": 3}'),
            ("caption.json", b'{"text": "no label"}'),
            ("tiny.png", encoded(1, size=(2, 9))),
        ],
    )
    source = open_source(f"webdataset:{path}", split="all", min_side=3)
    assert {Path(name).name for name in source.bad_files} == {
        "link.png",
        "hard.png",
        "pipe.png",
        "lonely.json",
    }
    (batch,) = batches(source, 5, image_size=8, shuffle=False)
    assert [source.name(i) for i in batch.indices] == [f"{path}/a.png", f"{path}/../../outside.png"]
    assert source.num_classes == 1
    assert source.bad_files[f"{path}/tiny.png"] == "2 x 9 pixels, min_side is 3"
    assert "truncated" in source.bad_files[f"{path}/cut.jpg"]
    assert source.bad_count == 4 + 3
    assert not any((folder / "outside.png").exists() for folder in tmp_path.parents)


def test_shards_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    image = encoded(1)

    def refused(members: Sequence[Member], message: str) -> None:
        path = write_tar(tmp_path / "x.tar", members)
        with pytest.raises(InputError, match=message):
            open_source(f"webdataset:{path}")

    refused([("a.txt", b"text")], r"x\.tar holds no PNG, JPEG")
    refused([], r"x\.tar holds no PNG, JPEG")
    refused([("a.left.jpg", image)], "holds no PNG")
    refused([("a.png", image), ("a.cls", b"cat")], r"x\.tar/a\.cls has label 'cat', wanted an integer from 0")
    refused([("a.png", image), ("a.cls", b"-1")], r"has label '-1', wanted an integer")
    refused([("a.png", image), ("a.cls", b"9" * 15)], r"has label 999999999999999, wanted an integer")
    refused([("a.png", image), ("a.cls", b" " * 65)], r"a\.cls has 65 bytes, wanted a label in at most 64")
    refused([("a.png", image), ("a.json", b'{"label": true}')], r"a\.json has label True, wanted an integer")
    refused([("a.png", image), ("a.json", b'{"label": "3"}')], r"has label '3', wanted an integer")
    refused([("a.png", image), ("a.json", b'{"label": ')], r"a\.json is no JSON: Expecting value")
    refused([("a.png", image), ("a.json", b"\xff\xfe")], r"a\.json is no JSON")
    refused([("a.png", image), ("b.png", image), ("a.png", image)], r"two images of one sample, a\.png and a")
    refused([("a.png", image), ("a.jpg", image)], r"two images of one sample, a\.png and a\.jpg")
    refused(
        [("a.png", image), ("a.cls", b"1"), ("a.json", b'{"label": 2}')], "has label 2, another member has 1"
    )
    refused(
        [("a.png", image), ("a.cls", b"1"), ("b.png", image)],
        r"labels for some samples only: .*a\.png has label 1, .*b\.png none",
    )


def test_broken_and_missing_tars_are_refused_by_name(tmp_path: Path, shards: Path) -> None:
    whole = (shards / "part-000.tar").read_bytes()
    for content, message in (
        (whole[:1000], "truncated after byte|is truncated"),
        (whole[: len(whole) // 2 // 512 * 512], "truncated"),
        (whole[:512], "truncated after byte 0: unexpected end of data|truncated"),
        (b"", "is not an uncompressed tar file.*empty file"),
        (b"text" * 500, "is not an uncompressed tar file"),
        (gzip.compress(whole), "is not an uncompressed tar file"),
        (whole[:1024] + b"?" * 512 + whole[1536:], "damaged: there is no header of a member at byte 1024"),
    ):
        (shards / "part-001.tar").write_bytes(content)
        with pytest.raises(InputError, match=rf"part-001\.tar.*({message})"):
            open_source(f"webdataset:{shards}")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("", "files are missing, as no name; wanted"),
        (f"{tmp_path}/empty", "empty holds no .tar file"),
        (f"{tmp_path}/missing", "1 of 1 files are missing, as .*missing; wanted a folder of .tar files"),
        (f"{shards}/part-{{000..009}}.tar", r"6 of 10 files are missing, as .*part-004\.tar"),
        (f"{shards}/other-{{0..3}}.tar", "4 of 4 files are missing"),
        (f"{shards}/part-{{3..0}}.tar", r"range \{3\.\.0\} makes 0 names"),
        (f"{shards}/part-{{0..9999999}}.tar", "makes 10000000 names, wanted 1 to 1000000"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(f"webdataset:{path}")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layout=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_no_damage_gets_past_the_refusals(
    data: st.DataObject, layout: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes are changed, a tar opens, or is refused with an InputError; its end is never lost."""
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    long = "ä" * 120 if layout != tarfile.USTAR_FORMAT else "a"
    write_tar(
        path,
        [(f"{long}.png", b"pixels"), (f"{long}.cls", b"1"), ("b.png", b""), ("b.cls", b"2")],
        layout=layout,
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 12] = data.draw(st.binary(min_size=1, max_size=12))
    path.write_bytes(content[: data.draw(st.integers(0, len(content))) or None])
    try:
        source = open_source(f"webdataset:{path}", split="all")
    except InputError:
        return
    for index in range(len(source)):
        with pytest.raises(UnreadableImage):
            source.image(index)


def test_a_shard_that_cannot_be_opened_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"part-000\.tar cannot be read: Permission denied"):
        open_source(f"webdataset:{shards}")


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{0..1}/x{00..01}y") == ["0/x00y", "0/x01y", "1/x00y", "1/x01y"]
    assert expand_braces("plain{a}.tar") == ["plain{a}.tar"]


def test_few_files_are_open_and_none_is_shared_with_a_process(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "OPEN_FILES", 2)
    paths = sorted(shards.glob("*.tar"))
    reader = ShardReader(paths, [path.stat().st_size for path in paths])
    for shard in (0, 1, 0, 2, 3, 3, 0):
        assert reader.read(shard, 0, 600) == paths[shard].read_bytes()[:600]
        assert len(reader._open) <= 2
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy._open
    assert copy.read(1, 512, 9) == paths[1].read_bytes()[512:521]
    with pytest.raises(UnreadableImage, match="lost its end"):
        reader.read(0, paths[0].stat().st_size - 4, 5)
    reader.close()
    paths[0].write_bytes(b"other")
    paths[1].unlink()
    with pytest.raises(UnreadableImage, match="has 5 bytes, wanted the"):
        reader.read(0, 0, 1)
    with pytest.raises(UnreadableImage, match="No such file"):
        reader.read(1, 0, 1)
    copy.close()


def test_the_index_is_compact(tmp_path: Path) -> None:
    """Under 150 bytes an image, pickled as a loading process gets it: no object for each."""
    members: list[Member] = []
    for i in range(3000):
        members += [(f"n{i % 1000:08d}/image_{i:08d}.jpg", b""), (f"n{i % 1000:08d}/image_{i:08d}.cls", b"7")]
    source = open_source(f"webdataset:{write_tar(tmp_path / '0.tar', members)}", split="all")
    assert len(pickle.dumps(source)) < 150 * 3000
    assert (source.name(2999), source.num_classes) == (f"{tmp_path}/0.tar/n00000999/image_00002999.jpg", 8)


def test_small_images_are_refused_where_nothing_is_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**18)  # Pillow's buffer has to hold the whole header
    exif = Image.Exif()
    exif[0x9286] = "x" * 60_000  # pushes the header of the pixels back
    content = io.BytesIO()
    gradient(64, 64).save(content, "JPEG", exif=exif, comment="y" * 60_000)
    path = write_tar(tmp_path / "0.tar", [("large.jpg", content.getvalue()), ("bad.png", b"bad")])
    window = Augmentation(resize=False)
    source = open_source(f"webdataset:{path}", split="all")
    batches(source, 2, image_size=64, augment=window).close()
    with pytest.raises(InputError, match=r"large\.jpg is 64 x 64 pixels, wanted at least .* 65 x 65"):
        batches(source, 2, image_size=65, augment=window)


def test_the_webdataset_package_reads_the_same_samples(shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pattern = f"{shards}/part-{{000..003}}.tar"
    source = open_source(f"webdataset:{pattern}", split="all")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(samples) == len(source)
    for index, sample in enumerate(samples):
        image = next(sample[key] for key in ("png", "jpg", "webp", "bmp") if key in sample)
        assert image == source.encoded(index)
        assert json.loads(sample["cls"]) == source.labels[index]
