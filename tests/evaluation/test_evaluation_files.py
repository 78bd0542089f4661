"""Folders of PNG files and files of statistics: read as they are, or refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.evaluation import FeatureStatistics, PNGFolder, fid, read_statistics, write_statistics
from mage_fast.recipes.outputs import PNGWriter
from mage_fast.training.metrics import save_png, to_uint8


def pooled(images_B3HW: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images_B3HW.double(), 4).flatten(1)


def write(folder: Path, images: Tensor) -> PNGFolder:
    folder.mkdir()
    with PNGWriter() as writer:
        writer.write(images, [folder / f"{index:06d}.png" for index in range(len(images))])
    return PNGFolder(folder)


def test_files_hold_truncated_values_and_their_fid_is_that_of_truncated_values(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 8, 8, generator=generator) * 1.2 - 0.1
    real = [torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)]
    folder = write(tmp_path / "images", to_uint8(images))
    save_png(images[0], folder.folder / "grid.png")  # generate's, not an image
    read = torch.cat(list(PNGFolder(folder.folder).batches(16)))
    truncated = np.floor(np.clip(images.numpy() * np.float32(255), 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(read.numpy(), truncated)
    rounded = np.round(np.clip(images.numpy() * 255, 0, 255)).astype(np.uint8)
    reference = FeatureStatistics.of(real, pooled)
    of_files, of_truncated, of_rounded = (
        fid(FeatureStatistics.of([torch.as_tensor(x)], pooled), reference) for x in (read, truncated, rounded)
    )
    assert of_files == of_truncated
    assert abs(of_files - of_rounded) > 1e-3 * of_files


def test_wrong_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of images at"):
        PNGFolder(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no PNG files"):
        PNGFolder(tmp_path)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    folder = write(tmp_path / "images", images).folder
    Image.new("RGB", (9, 8)).save(folder / "000004.png")
    with pytest.raises(
        InputError, match=r"000004.png is 9 x 8 pixels, 000000.png 8 x 8: wanted images of one"
    ):
        PNGFolder(folder)
    save_png(images[4], folder / "000004.png")
    whole = (folder / "000003.png").read_bytes()
    (folder / "000003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"000003\.png: "):
        list(PNGFolder(folder).batches(2))
    (folder / "000003.png").write_text("no image\n")
    with pytest.raises(InputError, match=r"000003\.png: not a PNG"):
        PNGFolder(folder)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, FeatureStatistics]:
    images = [torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)]
    statistics = FeatureStatistics.of(images, pooled)
    write_statistics(tmp_path / "s.npz", statistics, {"features": {"name": "pooled"}})
    return tmp_path / "s.npz", statistics


def test_statistics_come_back_and_others_can_read_them(saved: tuple[Path, FeatureStatistics]) -> None:
    path, statistics = saved
    found, convention = read_statistics(path)
    assert convention == {"features": {"name": "pooled"}}
    assert found.count == 20
    for name in ("mean_D", "covariance_DD", "features_ND"):
        assert torch.equal(getattr(found, name), getattr(statistics, name))
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["mu"], statistics.mean_D)
        np.testing.assert_array_equal(archive["sigma"], statistics.covariance_DD)
    assert [file.name for file in path.parent.iterdir()] == ["s.npz"]


def test_statistics_of_adm_layout(tmp_path: Path) -> None:
    mu, sigma = np.arange(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2])
    found, convention = read_statistics(tmp_path / "adm.npz")
    assert convention is None
    assert found.count == 0
    assert found.features_ND is None
    assert found.mean_D.tolist() == [0, 1, 2]
    assert found.covariance_DD.dtype == torch.float64


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def test_damaged_and_foreign_statistics_are_refused_by_name(
    saved: tuple[Path, FeatureStatistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, _ = saved
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], whole[:-5], bytes(flipped), b"", pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.npz: not a whole \.npz file of statistics"):
            read_statistics(path)
    with pytest.raises(InputError, match=r"missing\.npz: not a whole .*No such file"):
        read_statistics(tmp_path / "missing.npz")
    np.savez(path, mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    with pytest.raises(InputError, match="allow_pickle=False"):
        read_statistics(path)
    assert not (tmp_path / "exploded").exists()
    for arrays, wanted in (
        ({"arr_0": np.zeros(3)}, "holds arr_0, wanted mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.array([1, np.nan]), "sigma": np.eye(2)}, "mu is float64 with values that are not finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu is <U1 with values that are not finite"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((4, 3))},
            r"features have shape \(4, 3\), wanted \(N, 2\)",
        ),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "convention": np.array("{")}, "count or convention is not"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "convention": np.array("[]")}, "count or convention is not"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=wanted):
            read_statistics(path)
