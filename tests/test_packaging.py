"""What the package promises as a package: a light import, optional parts, one-way imports, a clean wheel."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mage_fast

ROOT = Path(__file__).parent.parent
HEAVY = {"triton", "sklearn", "matplotlib", "tensorboard", "PIL", "tyro", "rich", "datasets"}
TOUCH_EVERYTHING = "import mage_fast\nfor name in mage_fast.__all__: getattr(mage_fast, name)\n"


def python(code: str, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


# The import


def test_import_prints_nothing_and_imports_nothing_heavy() -> None:
    report = f"print(sorted({HEAVY} & ({{m.split('.')[0] for m in sys.modules}} - before)))"
    before = "import sys, torch\nbefore = {m.split('.')[0] for m in sys.modules}\n"
    assert python(before + TOUCH_EVERYTHING + report) == "[]\n"


def test_import_alone_does_not_even_import_torch() -> None:
    assert python("import sys, mage_fast; print('torch' in sys.modules)") == "False\n"


def test_import_adds_under_half_a_second_to_torch() -> None:
    start = "import time, torch\nstart = time.process_time()\n"
    code = f"{start}{TOUCH_EVERYTHING}print(time.process_time() - start)"
    assert statistics.median(float(python(code)) for _ in range(3)) < 0.5


def test_works_with_neither_triton_nor_the_extension() -> None:
    code = """
import sys
sys.modules["triton"] = None  # what makes `import triton` fail
from pathlib import Path
import torch
import mage_fast
from mage_fast.kernels import library
library.EXTENSION_FOLDER = Path("missing")
state = torch.tensor([7, 0])
print(mage_fast.ops.philox(state, 1, 2, 3).shape)
try:
    mage_fast.ops.philox(state, 1, 2, 3, implementation="cpp")
except mage_fast.Unsupported as error:
    print(error)
"""
    shape, reason = python(code).splitlines()
    assert shape == "torch.Size([2, 3, 4])"
    assert "philox: implementation 'cpp' cannot run here: the C++ extension was not built" in reason


def test_public_names_are_there_and_others_are_refused_by_name() -> None:
    assert set(mage_fast.__all__) == set(dir(mage_fast))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = mage_fast.magic
    with pytest.raises(AttributeError, match="no op 'magic'; the ops are add_norm"):
        _ = mage_fast.ops.magic


def test_every_op_is_exported() -> None:
    from mage_fast.kernels import dispatch

    assert set(mage_fast.ops.__all__) == set(dispatch.OPS)
    assert all(callable(getattr(mage_fast.ops, name)) for name in dispatch.OPS)


def test_kernels_refuses_to_be_a_top_level_package() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "import mage_fast.kernels" in done.stderr


# The source tree


def sources(*folders: str) -> list[Path]:
    """The project's Python files, relative to the root; the kernels under their own folder."""
    files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
    inside = [f.relative_to(ROOT) for f in files]
    return [f for f in inside if f.parts[:2] != ("mage_fast", "kernels")]


PACKAGE = sources("mage_fast", "kernels")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, ``from`` targets joined, relative ones resolved."""
    package = "mage_fast." * (path.parts[0] == "kernels") + ".".join(path.with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(dotted: str) -> int | None:
    """kernels 0, mage_fast 1, recipes 2, cli 3; None: not ours."""
    parts = dotted.split(".")
    if parts[0] != "mage_fast":
        return None
    return {"kernels": 0, "recipes": 2, "cli": 3, "__main__": 3}.get(parts[1] if len(parts) > 1 else "", 1)


def module_name(path: Path) -> str:
    return "mage_fast." * (path.parts[0] == "kernels") + ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    mine = layer(module_name(path))
    assert mine is not None
    for name in imports(path):
        other = layer(name)
        assert other is None or other <= mine, f"{path} imports {name}"
        if path.parts[:2] == ("mage_fast", "reference"):
            assert other is None or name.startswith("mage_fast.reference"), f"{path} imports {name}"
        if mine > 0:
            assert name.split(".")[0] != "triton", f"{path} imports {name}: Triton code lives in the kernels"


@pytest.mark.parametrize("path", [*PACKAGE, *sources("benchmarks")], ids=str)
def test_source_has_none_of_the_habits_we_avoid(path: Path) -> None:
    names = set(imports(path))
    assert not {n for n in names if n.split(".")[0] in {"cloudpickle", "dill", "marshal", "shelve"}}, path
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: catches everything"
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"{where}: catches everything"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "getenv", "putenv"}, f"{where}: environment variable"
            if isinstance(node.value, ast.Name) and node.value.id == "pickle":
                assert node.attr == "UnpicklingError", f"{where}: files of ours are not pickled"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
            assert safe == "True", f"{where}: torch.load runs code from the file without weights_only=True"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {"environ", "getenv"} & {a.name for a in node.names}, f"{where}: environment variable"


def test_no_file_is_longer_than_400_lines() -> None:
    files = [*PACKAGE, *sources("benchmarks", "tests"), Path("setup.py"), Path("Makefile")]
    files += [f.relative_to(ROOT) for f in (ROOT / "kernels" / "csrc").iterdir()]
    lines = {str(f): len((ROOT / f).read_text().splitlines()) for f in files}
    assert {f: n for f, n in lines.items() if n > 400} == {}


# The wheel


@pytest.fixture
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what was built in it; built trees are never reused."""
    ignore = shutil.ignore_patterns(
        *(".git", ".venv", "out", "build", "dist", "data", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    )
    copy = tmp_path_factory.mktemp("tree") / "mage_fast"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    return copy


def install(tree: Path, to: Path, path: str) -> tuple[Path, set[str]]:
    """Build a wheel with ``path`` as PATH and install it into the folder ``to``: the wheel and its files."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "--wheel-dir", str(to), str(tree)]
    subprocess.run(build, check=True, env=os.environ | {"PATH": path})
    (wheel,) = to.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", str(to / "site"), str(wheel)], check=True)
    return wheel, set(zipfile.ZipFile(wheel).namelist())


WHICH = """
import torch, mage_fast
from mage_fast.kernels import dispatch
print(mage_fast.__file__)
print(dispatch.select("philox", "auto", "cpu").__name__.split(".")[-1])
print(mage_fast.ops.philox(torch.tensor([7, 0]), 1, 1, 1).tolist())
from mage_fast.recipes.env import EnvConfig, run
print(run(EnvConfig())["C++ extension"])
"""


@pytest.mark.slow
def test_wheel_installs_and_runs_elsewhere(tree: Path, tmp_path: Path) -> None:
    here = str(Path(sys.executable).parent)
    wheel, files = install(tree, tmp_path, here + os.pathsep + os.environ["PATH"])
    assert wheel.name.startswith(f"mage_fast-{mage_fast.__version__}-py3-none-")
    assert "-any" not in wheel.name
    modules = {module_name(f).replace(".", "/") + ".py" for f in PACKAGE}
    metadata = {f for f in files if ".dist-info/" in f}
    sets = ("avx512", "avx2", "default") if platform.machine() == "x86_64" else ("default",)
    libraries = {f"mage_fast/kernels/libmage_fast_cpu_{name}.so" for name in sets}
    assert files - metadata == modules | libraries | {"mage_fast/py.typed"}
    assert any(f.endswith("licenses/LICENSE") for f in metadata)
    for library in (tmp_path / "site" / name for name in libraries):
        for builder in (ROOT, tree, sys.prefix):
            assert os.fsencode(builder) not in library.read_bytes()
        if shutil.which("readelf"):
            dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
            assert "libtorch_cpu" in dynamic
            assert "RUNPATH" not in dynamic
            assert "RPATH" not in dynamic
    place, chosen, *_, extension = python(WHICH, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert chosen == "cpp"
    assert extension.startswith("loaded, compiled for ")


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_falls_back(tree: Path, tmp_path: Path) -> None:
    wheel, files = install(tree, tmp_path, path=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(f.endswith(".so") for f in files)
    place, chosen, *_, extension = python(WHICH, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert Path(place).is_relative_to(tmp_path)
    assert chosen == "reference"
    assert extension.startswith("missing: the C++ extension was not built")
    assert extension.endswith("the CPU runs plain PyTorch")


@pytest.mark.slow
def test_source_distribution_holds_the_cpp_sources(tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    wanted = {"CMakeLists.txt", "LICENSE", "README.md", "kernels/dispatch.py", "kernels/csrc/philox.cpp"}
    wanted |= {"mage_fast/py.typed"}
    assert {f for f in wanted if not (root / f).is_file()} == set()


TYPED = """
import torch

import mage_fast
from mage_fast import MAGE, VQGAN, MAGEConfig, SamplerConfig
from mage_fast.export import export_encoder


def features(folder: str, images: torch.Tensor) -> torch.Tensor:
    model: MAGE = MAGE.from_pretrained(folder, revision="main")
    loss: torch.Tensor = model(images).loss
    address: str = VQGAN.from_pretrained(folder).push_to_hub("someone/tokenizer")
    print(loss.item(), address, mage_fast.generate(model, 4, config=SamplerConfig(steps=8)).shape)
    export_encoder(model, "ids").module()
    branch, normed = mage_fast.ops.add_norm(images, images, images, images)
    return model.features(images) + normed
"""
WRONG = """
model = MAGE(MAGEConfig.vit_b(), "vqgan")
steps: str = SamplerConfig().steps
"""


@pytest.mark.slow
def test_a_program_that_uses_the_package_is_type_checked(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(TYPED + WRONG)
    options = ["--strict", "--follow-imports=silent", "--disable-error-code=no-untyped-call"]
    options += ["--config-file=", f"--cache-dir={tmp_path / 'cache'}"]

    def mypy(name: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", *options, name],
            **{"cwd": tmp_path, "env": os.environ | {"MYPYPATH": str(ROOT)}},
            **{"capture_output": True, "text": True},
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    assert mypy("typed.py") == ["Success: no issues found in 1 source file"]
    assert [line.split("[")[-1] for line in mypy("wrong.py")[:-1]] == ["arg-type]", "assignment]"]
