"""How the project's docstrings become the site's: an extension of griffe, which reads them for mkdocstrings.

Docstrings are written for a terminal and an editor: Sphinx's roles, ``::`` before code, ``>>>`` before
examples, ``#:`` comments above fields. Markdown has other signs for these.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")
_EXAMPLE = re.compile(r"(?m)(?:^(?:>>>|\.\.\.)(?: .*)?\n?)+")


def markdown(text: str) -> str:
    """A docstring in Markdown.

    >>> markdown("See :class:`MAGE`::")
    'See `MAGE`:'
    """
    text = _EXAMPLE.sub(lambda found: f"\n```python\n{_without_prompts(found[0])}\n```\n", text)
    text = re.sub(r"::$", ":", _ROLE.sub(r"`\1`", text), flags=re.MULTILINE)
    return re.sub(r"(?m)^Source:", "**Source:**", text)


def _without_prompts(example: str) -> str:
    return "\n".join(line[4:] for line in example.splitlines())


def comment_above(lines: list[str], number: int) -> str:
    """The ``#:`` comment that ends in the line before, ``number`` counting from 1; "" if there is none."""
    found: list[str] = []
    while number > 1 and lines[number - 2].strip().startswith("#:"):
        found.insert(0, lines[number - 2].strip().removeprefix("#:").strip())
        number -= 1
    return " ".join(found)


class Docstrings(griffe.Extension):
    """Applies both to whatever is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None and obj.is_attribute and obj.lineno is not None:
            assert not isinstance(obj.filepath, list)
            text = comment_above(obj.lines_collection[obj.filepath], obj.lineno)
            if text:
                obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
