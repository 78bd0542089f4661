"""The documentation keeps up: its Python runs, its commands parse, its tables are current, it builds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Literal
from xml.etree import ElementTree

import pytest
import torch

import mage_fast
from benchmarks import gallery, tile_svg
from benchmarks.tilings import TILINGS
from mage_fast import cli
from mage_fast.kernels.dispatch import OPS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, file that is quoted and text of each block of code."""
    yield from _BLOCK.findall(page.read_text(encoding="utf-8"))


def python_of(page: Path) -> str:
    return "\n".join(text for language, title, text in blocks(page) if language == "python" and not title)


def commands(page: Path) -> Iterator[str]:
    """What stands after ``mage-fast``, of the lines in blocks of commands."""
    for language, _, text in blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                found = re.match(
                    r"(?:\S*/)?mage-fast (.*)|.*-m mage_fast\.cli (.*)", line.split("  #")[0].strip()
                )
                if found:
                    yield found[1] or found[2]


# Python and commands


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=lambda p: p.stem)
def test_python_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        exec(compile(python_of(page), page.name, "exec"), {"__name__": "page"})


def test_pages_with_python_are_found() -> None:
    assert {p.stem for p in PAGES if python_of(p)} >= {"README", "index", "accelerate", "adding_an_op"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_parse(page: Path) -> None:
    for command in commands(page):
        try:
            cli.parse(shlex.split(command))
        except SystemExit:
            pytest.fail(f"{page.name}: mage-fast {command}")


def test_commands_are_found_behind_torchrun_and_over_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\nmage-fast env   # why\ntorchrun -m mage_fast.cli pretrain \\\n  --epochs 3\nmake demo\n```\n"
    )
    assert [shlex.split(c) for c in commands(page)] == [["env"], ["pretrain", "--epochs", "3"]]


def test_quoted_code_is_the_file_s() -> None:
    for page in PAGES:
        for _, title, text in blocks(page):
            for line in text.splitlines() if title else ():
                assert line in (ROOT / title).read_text(encoding="utf-8").splitlines(), f"{page.name}: {line}"


def test_every_verb_has_a_section() -> None:
    sections = re.findall(r"^## (\S+)$", (DOCS / "recipes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(cli.VERBS)


@pytest.mark.parametrize("page", ["recipes.md", "pretraining.md"])
def test_options_in_the_text_exist(page: str, hooks: ModuleType) -> None:
    known = {name for kind, _ in cli.VERBS.values() for name, _, _ in hooks.option_rows(kind)}
    text = re.sub(_BLOCK, "", (DOCS / page).read_text(encoding="utf-8"))
    named = re.findall(r"`(?:[^`\n]* )?--([a-z][a-z.-]*)", text)
    assert set(named) - known - {"help"} == set()
    assert len(named) > 10


# What is generated


def test_gallery_is_current() -> None:
    behind = gallery.behind(gallery.wanted())
    assert not behind, f"{[p.name for p in behind]}: run python -m benchmarks.gallery"


def test_gallery_shows_an_op_s_work_and_says_what_is_not_measured(tmp_path: Path) -> None:
    text = gallery.section("bias_gelu", tmp_path)
    elements = 128 * 129 * 3072  # read and written once, in bfloat16; and the bias
    assert f"| forward | {(2 * elements + 2 * 3072) / 1e6:,.1f} | {2 * elements / 1e6:,.1f} |" in text
    assert "Not measured on a GPU." in text
    record = json.loads(next(gallery.RESULTS.glob("*.json")).read_text())[0]
    record |= {
        "suite": "kernels",
        "name": "bias_gelu/vit_b_batch/fwd",
        "implementation": "triton",
        "ratio": 2.5,
    }
    record |= {"device": "A GPU", "median_ms": 2.0, "baseline_median_ms": 5.0, "percent_of_floor": 80.0}
    (tmp_path / "gpu.json").write_text(json.dumps([record]))
    text = gallery.section("bias_gelu", tmp_path)
    assert "| forward | uint8 | triton | 2.000 | 5.000 | 2.50 | 80 |" in text
    assert "Not measured" not in text


def test_every_op_is_drawn_and_links_to_its_files() -> None:
    assert set(TILINGS) == set(OPS)
    for op in OPS:
        linked = re.findall(r"\]\(\.\./([^)]+)\)", gallery.links(op))
        assert {f"kernels/ops/{op}/api.py", f"tests/kernels/test_{op}.py"} <= set(linked)
        assert all((ROOT / name).is_file() for name in linked)


@pytest.mark.parametrize("op", OPS)
def test_pictures_are_whole(op: str) -> None:
    picture = ElementTree.fromstring(tile_svg.draw(op, TILINGS[op]))
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    assert width <= 780  # the page's column, at its widest
    for part in picture.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(part.attrib["x"]) <= width - float(part.attrib["width"])
        assert 0 <= float(part.attrib["y"]) <= height - float(part.attrib["height"])


def test_unknown_cells_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a kernel: cells \['q'\], wanted"):
        tile_svg.Panel("a kernel", (tile_svg.Grid("x", "N", ("rq",)),), ("y",), ())


# The site


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the site wants the extra docs")
    pytest.importorskip("griffe", reason="the site wants the extra docs")
    sys.path.insert(0, str(DOCS / "tools"))
    try:
        import hooks
    finally:
        sys.path.remove(str(DOCS / "tools"))
    return hooks


@dataclasses.dataclass(frozen=True)
class Inner:
    #: How much.
    much: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    """Options."""

    wanted: Path
    #: One thing
    #: or another; see :class:`Inner`.
    one_of: Literal["this", "that"] = "this"
    inner: Inner = dataclasses.field(default_factory=lambda: Inner(0.25))
    off: bool = False


def test_options_are_read_from_dataclasses(hooks: ModuleType) -> None:
    assert list(hooks.option_rows(Outer)) == [
        ("wanted", "*wanted*", ""),
        ("one-of", "`this`", "One thing or another; see `Inner`. One of `this`, `that`."),
        ("inner.much", "`0.25`", "How much."),
        ("off", "off", ""),
    ]


def test_docstrings_become_markdown(hooks: ModuleType) -> None:
    text = "See :func:`~a.b`::\n\n    code\n\n>>> f(1)\n... + 2\n3\n\nSource: section 3."
    wanted = "See `a.b`:\n\n    code\n\n\n```python\nf(1)\n+ 2\n```\n3\n\n**Source:** section 3."
    assert hooks.markdown(text) == wanted


def test_navigation_has_every_page() -> None:
    yaml = pytest.importorskip("yaml", reason="the site wants the extra docs")

    def pages(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                yield from pages(inner)

    navigation = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(navigation) == sorted(p.name for p in DOCS.glob("*.md"))


class Loaded(HTMLParser):
    """Addresses that a page loads by itself, and the names of its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        if tag in ("script", "link", "img", "iframe", "source", "object", "video"):
            self.addresses += [given.get(name) or "" for name in ("src", "href", "data", "srcset")]


@pytest.mark.slow
@pytest.mark.usefixtures("hooks")
def test_site_builds_without_a_warning_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    # not --quiet, under which mkdocs counts no warnings
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    def read(name: str) -> str:
        return (tmp_path / name).read_text(encoding="utf-8")

    # every public name, op, verb and decision
    assert {f"mage_fast.{name}" for name in mage_fast._HOME} <= Loaded(read("api.html")).anchors
    assert {f"mage_fast.ops.{op}" for op in OPS} <= Loaded(read("api_ops.html")).anchors
    assert set(cli.VERBS) <= Loaded(read("options.html")).anchors
    assert {p.stem for p in (DOCS / "adr").glob("*.md")} == {
        p.stem for p in (tmp_path / "adr").glob("*.html")
    }
    assert read("gallery.html").count('<svg xmlns="http://www.w3.org/2000/svg" class="tiling"') == len(OPS)
    assert 'href="source/kernels/ops/add_norm/triton.py.html"' in read("gallery.html")

    # the reader's browser asks nobody else
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not [a for a in Loaded(text).addresses if re.match(r"(https?:)?//", a)], page
        assert 'class="mermaid"' not in text  # drawn by a script from elsewhere
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style
