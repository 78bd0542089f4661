"""Pages for a browser that need no other file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from mage_fast.files import atomic_path

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: {width}rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }}
h1 {{ font-size: 1.6rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
img {{ max-width: 100%; image-rendering: pixelated }} img.plot {{ image-rendering: auto }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
tr.ours td {{ font-weight: 600 }} tr.wrong td {{ color: #b00020 }}
p.note {{ color: #666 }}
</style></head><body>
<h1>{title}</h1>
{body}</body></html>
"""


def write_page(title: str, body: str, path: Path, *, width: int = 52) -> None:
    """Write a page of a title and HTML; ``width`` in rem."""
    with atomic_path(path) as temporary:
        temporary.write_text(_PAGE.format(title=escape(title), body=body, width=width), encoding="utf-8")


def embedded(picture: Path, description: str, kind: str = "grid") -> str:
    """A PNG as an ``img`` that holds it; kind "plot" is smoothed where it is scaled, "grid" is not."""
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<img class="{kind}" alt="{escape(description)}" src="data:image/png;base64,{data}">'
