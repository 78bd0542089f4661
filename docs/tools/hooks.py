"""What MkDocs does beside its own: pages that come from the code, and the code's files as pages.

* ``<!-- filled: NAME -->`` in a page becomes what a function of :data:`FILLED` writes, so tables of options
  and lists of public names cannot be behind the code.
* A link to a file of the repository outside docs/ becomes a link to a page with its text.
* A picture of a tiling stands in the page itself, where it takes the colours of the reader's scheme.
* docs/adr is the last part of the navigation.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from docstrings import comment_above, markdown  # noqa: E402

import mage_fast  # noqa: E402
from mage_fast.cli import VERBS  # noqa: E402

_LINK = re.compile(r"\]\(((?:\.\./)+)([\w./-]+\.(?:py|cpp|h|md|toml|json))(#[\w-]*)?\)")
_PICTURE = re.compile(r'<p><img alt="[^"]*" src="(pictures/kernels/\w+\.svg)"\s*/></p>')
_LANGUAGES = {
    ".py": "python",
    ".cpp": "cpp",
    ".h": "cpp",
    ".toml": "toml",
    ".json": "json",
    ".md": "markdown",
}


# Tables and lists out of the code


def options() -> str:
    """Every verb's options, from the dataclass of its recipe."""
    parts = []
    for verb, (kind, _) in VERBS.items():
        lines = [f"## {verb}", "", markdown(inspect.getdoc(kind) or ""), ""]
        rows = list(option_rows(kind))
        if rows:
            lines += ["| option | default | |", "|---|---|---|"]
            lines += [f"| `--{name}` | {default} | {text} |" for name, default, text in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def option_rows(kind: type, prefix: str = "", given: Any = None) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each field, nested dataclasses with their field's name before theirs."""
    source, _ = inspect.getsourcelines(kind)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        number = next(i for i, line in enumerate(source, 1) if re.match(rf"\s+{field.name}\s*:", line))
        text, default = markdown(comment_above(source, number)), _default(field, given)
        if isinstance(default, type(None)) or not dataclasses.is_dataclass(type(default)):
            choices = _choices(types[field.name])
            yield name, _shown(default), " ".join(filter(None, (text, choices))).replace("|", "\\|")
        else:
            yield from option_rows(type(default), f"{name}.", default)


def _default(field: dataclasses.Field, given: Any) -> Any:
    if given is not None:
        return getattr(given, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "*wanted*"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(f"`{item}`" for item in default)
    return f"`{default}`"


def _choices(kind: Any) -> str:
    """The values of a Literal, also within a tuple or beside None."""
    if typing.get_origin(kind) is typing.Literal:
        return "One of " + ", ".join(f"`{value}`" for value in typing.get_args(kind)) + "."
    return next(filter(None, map(_choices, typing.get_args(kind))), "")


def public_names() -> str:
    """The package's public names under the first sentence of the module that each lives in."""
    homes: dict[str, list[str]] = {}
    for name, home in mage_fast._HOME.items():
        homes.setdefault(home, []).append(name)
    parts = []
    for home in sorted(homes, key=list(mage_fast._HOME.values()).index):
        sentence = (inspect.getdoc(importlib.import_module(f"mage_fast.{home}")) or home).split("\n\n")[0]
        title = home.rsplit(".", 1)[-1].replace("_", " ").capitalize()
        names = "\n\n".join(f"::: mage_fast.{name}" for name in homes[home])
        parts.append(f"## {title}\n\n{markdown(sentence)}\n\n{names}")
    return "\n\n".join(parts)


def ops() -> str:
    """The ops, in alphabetical order."""
    return "\n\n".join(f"::: mage_fast.ops.{name}" for name in mage_fast.ops.__all__)


FILLED = {"options": options, "public names": public_names, "ops": ops}


# What MkDocs calls


def on_config(config: Any) -> Any:
    decisions = sorted(Path(config.docs_dir).glob("adr/*.md"))
    next(part for part in config.nav if "Decisions" in part)["Decisions"] = [
        f"adr/{p.name}" for p in decisions
    ]
    config.watch += [str(ROOT / name) for name in ("mage_fast", "kernels")]
    return config


def on_files(files: Any, config: Any) -> Any:
    linked: dict[str, None] = {}
    for page in files.documentation_pages():
        for file in linked_files(Path(page.abs_src_path)):
            linked[file] = None
    for name in linked:
        text = (ROOT / name).read_text(encoding="utf-8")
        language = _LANGUAGES[Path(name).suffix]
        head = f"---\ntitle: {name}\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n"
        content = f"{head}`````{language}\n{text}`````\n"
        files.append(File.generated(config, f"source/{name}.md", content=content))
    return files


def linked_files(page: Path) -> Iterator[str]:
    """Files outside docs/ that a page links to, relative to the root."""
    for found in _LINK.finditer(page.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(page.parent / found[1] / found[2]))
        if ROOT / "docs" not in path.parents:
            yield str(path.relative_to(ROOT))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    for name, write in FILLED.items():
        mark = f"<!-- filled: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    folder = ROOT / "docs" / Path(page.file.src_uri).parent

    def to_page(found: re.Match) -> str:
        path = Path(os.path.normpath(folder / found[1] / found[2]))
        if ROOT / "docs" in path.parents or page.file.src_uri.startswith("source/"):
            return found[0]
        target = ROOT / "docs" / "source" / f"{path.relative_to(ROOT)}.md"
        return f"]({os.path.relpath(target, folder)})"

    return _LINK.sub(to_page, markdown)


def on_page_content(html: str, **_: Any) -> str:
    def inline(found: re.Match) -> str:
        return f'<div class="tiling-frame">{(ROOT / "docs" / found[1]).read_text(encoding="utf-8")}</div>'

    return _PICTURE.sub(inline, html)
