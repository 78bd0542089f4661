"""README.md's benchmark table, from the record files in benchmarks/results.

python -m benchmarks.report          # writes the table between the markers of README.md
python -m benchmarks.report --check  # exit status 1 if it is another
"""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from mage_fast.benchmark import records, tables
from mage_fast.files import atomic_path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- benchmarks: python -m benchmarks.report -->", "<!-- end of benchmarks -->"


def table(results: Path = RESULTS) -> str:
    """One table a device, of what was timed beside a baseline."""
    parts = []
    for path in sorted(results.glob("*.json")):
        of_device = itemgetter("device")
        for device, found in groupby(sorted(records.read(path), key=of_device), of_device):
            kept = list(found)
            versions = {f"torch {r['versions']['torch']}, {r['date']}" for r in kept}
            text = tables.markdown(kept)
            parts.append(f"{device} ({'; '.join(sorted(versions))}):\n\n{text}")
    return "\n\n".join(parts)


def rendered(readme: str, results: Path = RESULTS) -> str:
    """The README with the table between its markers.

    Raises:
        ValueError: it has no markers.
    """
    if START not in readme or END not in readme:
        raise ValueError(f"README.md has no markers {START} and {END}")
    before, rest = readme.split(START, 1)
    return f"{before}{START}\n\n{table(results)}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    now = README.read_text(encoding="utf-8")
    wanted = rendered(now)
    if now == wanted:
        return 0
    if options.check:
        print("README.md is behind benchmarks/results: run python -m benchmarks.report", file=sys.stderr)
        return 1
    with atomic_path(README) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
