"""Pictures of what one program of a kernel owns: rows of grids, drawn as SVG from letters.

A grid is lines of letters, one a cell (or a block of cells): ``.`` not touched by the program, ``r`` read,
``w`` written, ``c`` read, the class token's, ``x`` masked, padding or past an end, a
space draws nothing. Colours are CSS variables of the documentation's theme where the picture stands inside a
page, and follow the reader's colour scheme where it is a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

CELL, GAP, MARGIN, LINE = 13, 22, 10, 15
#: Pixels a letter, of the labels and of the program's text.
LABEL, CODE = 6.4, 6.7
KINDS = {".": "idle", "r": "read", "w": "written", "c": "class", "x": "gone"}
MEANING = {
    "read": "read",
    "written": "written",
    "class": "class token's",
    "gone": "masked, or past an end",
    "idle": "others'",
}

STYLE = """
.tiling { --ink: var(--md-default-fg-color, #22252b); --soft: var(--md-default-fg-color--light, #6b7280);
  --line: var(--md-default-fg-color--lighter, #b9bec7); --paper: var(--md-code-bg-color, #f4f5f7); }
.tiling text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.tiling .dims { fill: var(--soft); font-size: 11px; }
.tiling .title { font-weight: 600; font-size: 13px; }
.tiling .code { font: 11px ui-monospace, monospace; white-space: pre; }
.tiling .box { fill: var(--paper); stroke: var(--line); }
.tiling .arrow { stroke: var(--soft); fill: none; stroke-width: 1.5; }
.tiling .idle { fill: var(--paper); stroke: var(--line); }
.tiling .read { fill: #4c86d8; stroke: #2f62ab; }
.tiling .written { fill: #e8963a; stroke: #b66c17; }
.tiling .class { fill: #9a6dd0; stroke: #6f45a3; }
.tiling .gone { fill: none; stroke: var(--line); stroke-dasharray: 2 2; }
"""
#: For a picture opened as a file; inside a page the theme's variables are there.
STYLE_DARK = """
@media (prefers-color-scheme: dark) { .tiling { --ink: var(--md-default-fg-color, #e4e7ec);
  --soft: var(--md-default-fg-color--light, #a3abb8); --line: var(--md-default-fg-color--lighter, #555d6b);
  --paper: var(--md-code-bg-color, #242830); } }
"""


@dataclass(frozen=True)
class Grid:
    """A tensor: its name, its sizes as text, and its cells."""

    name: str
    sizes: str
    cells: tuple[str, ...]

    @property
    def width(self) -> float:
        return max(CELL * max(map(len, self.cells)), LABEL * len(self.name), LABEL * len(self.sizes))

    @property
    def height(self) -> float:
        return CELL * len(self.cells)


@dataclass(frozen=True)
class Panel:
    """One kernel: what a program reads, what it does, what it writes."""

    title: str
    inputs: tuple[Grid, ...]
    program: tuple[str, ...]
    outputs: tuple[Grid, ...]

    def __post_init__(self) -> None:
        letters = {letter for grid in (*self.inputs, *self.outputs) for row in grid.cells for letter in row}
        if unknown := letters - {*KINDS, " "}:
            raise ValueError(f"{self.title}: cells {sorted(unknown)}, wanted {sorted(KINDS)}")


def draw(title: str, panels: tuple[Panel, ...]) -> str:
    """The SVG, panels one under another and a legend of the kinds of cells that occur."""
    parts: list[str] = []
    y, right = float(MARGIN), 0.0
    for panel in panels:
        drawn, width, height = _panel(panel, y)
        parts += drawn
        right, y = max(right, width), y + height + GAP
    used = {
        KINDS[c] for p in panels for g in (*p.inputs, *p.outputs) for row in g.cells for c in row if c != " "
    }
    x = float(MARGIN)
    for kind, meaning in MEANING.items():
        if kind in used:
            parts.append(_cell(x, y - 4, kind) + _text(x + CELL + 5, y + 7, meaning, "dims"))
            x += CELL + 5 + LABEL * len(meaning) + 18
    width, height = max(right, x) + MARGIN, y + CELL + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tiling" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}{STYLE_DARK}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, top: float) -> tuple[list[str], float, float]:
    """Drawn parts, where they end on the right, and their height."""
    body = max([g.height for g in (*panel.inputs, *panel.outputs)] + [LINE * len(panel.program) + 12])
    middle = top + 20 + LINE + body / 2
    parts = [_text(MARGIN, top + 12, panel.title, "title")]
    x = float(MARGIN)
    for grid in panel.inputs:
        parts.append(_grid(grid, x, middle))
        x += grid.width + GAP
    parts.append(_arrow(x - 8, middle))
    x += 26
    box = CODE * max(map(len, panel.program)) + 20
    height = LINE * len(panel.program) + 12
    place = f'x="{x:.0f}" y="{middle - height / 2:.0f}" width="{box:.0f}" height="{height}"'
    parts.append(f'<rect class="box" {place} rx="6"/>')
    for i, line in enumerate(panel.program):
        parts.append(_text(x + 10, middle - height / 2 + 17 + LINE * i, line, "code"))
    x += box + 12
    parts.append(_arrow(x - 4, middle))
    x += 30
    for grid in panel.outputs:
        parts.append(_grid(grid, x, middle))
        x += grid.width + GAP
    return parts, x - GAP, 20 + 2 * LINE + body


def _grid(grid: Grid, x: float, middle: float) -> str:
    top = middle - grid.height / 2
    cells = [
        _cell(x + CELL * column, top + CELL * row, KINDS[letter])
        for row, line in enumerate(grid.cells)
        for column, letter in enumerate(line)
        if letter != " "
    ]
    labels = [_text(x, top - 6, grid.name), _text(x, top + grid.height + 13, grid.sizes, "dims")]
    return "\n".join(cells + labels)


def _cell(x: float, y: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{CELL - 2}" height="{CELL - 2}" rx="1.5"/>'


def _text(x: float, y: float, text: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _arrow(x: float, y: float) -> str:
    return f'<path class="arrow" d="M{x:.1f} {y:.1f} h24 m-6 -4 l6 4 l-6 4"/>'
