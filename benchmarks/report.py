"""Tables of README.md (short) and docs/benchmarks.md (all), and pictures, from benchmarks/results.

python -m benchmarks.report          # writes the tables between the markers of the two files, and pictures
python -m benchmarks.report --check  # exit status 1 if a table is another, or a picture is missing

Whether a picture is another is not checked: its bytes depend on fonts and on matplotlib's version.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from mage_fast.benchmark import plots, records, tables
from mage_fast.files import atomic_path

ROOT = Path(__file__).parent.parent
README, FULL = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
#: Of each record file; the ratios of every shape are too many for a page.
KINDS = ("end-to-end", "roofline")
START, END = "<!-- benchmarks: python -m benchmarks.report -->", "<!-- end of benchmarks -->"


def table(results: Path = RESULTS, *, short: bool = False) -> str:
    """One table a device, of what was timed beside a baseline."""
    parts = []
    for path in sorted(results.glob("*.json")):
        of_device = itemgetter("device")
        for device, found in groupby(sorted(records.read(path), key=of_device), of_device):
            kept = list(found)
            versions = {f"torch {r['versions']['torch']}, {r['date']}" for r in kept}
            text = tables.markdown(tables.summary(kept) if short else kept)
            parts.append(f"{device} ({'; '.join(sorted(versions))}):\n\n{text}")
    return "\n\n".join(parts)


def rendered(text: str, results: Path = RESULTS, *, short: bool = True) -> str:
    """The text with the table between its markers.

    Raises:
        ValueError: it has no markers.
    """
    if START not in text or END not in text:
        raise ValueError(f"the file has no markers {START} and {END}")
    before, rest = text.split(START, 1)
    return f"{before}{START}\n\n{table(results, short=short)}\n\n{END}{rest.split(END, 1)[1]}"


def draw(results: Path, folder: Path) -> list[Path]:
    """Draw ``bench_<record file>-<kind>.png`` into the folder."""
    drawn = []
    for path in sorted(results.glob("*.json")):
        drawn += plots.draw(records.read(path), folder / f"bench_{path.stem}.png", KINDS)
    return drawn


def missing(results: Path = RESULTS, folder: Path = PICTURES) -> list[str]:
    """Names of the pictures that the folder lacks."""
    with tempfile.TemporaryDirectory() as scratch:
        return [path.name for path in draw(results, Path(scratch)) if not (folder / path.name).exists()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    behind = False
    for path in (README, FULL):
        now = path.read_text(encoding="utf-8")
        wanted = rendered(now, short=path == README)
        if now == wanted:
            continue
        behind = True
        if options.check:
            print(
                f"{path.name} is behind benchmarks/results: run python -m benchmarks.report", file=sys.stderr
            )
            continue
        with atomic_path(path) as temporary:
            temporary.write_text(wanted, encoding="utf-8")
    if not options.check:
        draw(RESULTS, PICTURES)
    elif lacking := missing():
        behind = True
        print(f"docs/pictures lacks {', '.join(lacking)}: run python -m benchmarks.report", file=sys.stderr)
    return int(behind and options.check)


if __name__ == "__main__":
    sys.exit(main())
