"""The table of the ablations: figures by hand."""

from __future__ import annotations

from benchmarks.ablations import VARIANTS, table


def test_the_table() -> None:
    records = [
        {"variant": "base", "seed": seed, "epochs": 3, "loss": loss, "probe": 0.5, "frechet": 10.0 + seed}
        for seed, loss in enumerate((1.0, 2.0, 6.0))
    ]
    other = {"variant": "unquantized", "epochs": 3, "loss": 0.5, "probe": 0.25}
    records += [other | {"seed": seed} for seed in range(2)]
    head, _, base, unquantized = table(records).splitlines()
    assert head.startswith("| 3 epochs | seeds | Frechet distance")
    assert base == "| base | 3 | 11.0 (10.0 to 12.0) | 50.0% (50.0% to 50.0%) | 3.000 (1.000 to 6.000) |"
    figures = "does not generate | 25.0% (25.0% to 25.0%) | 0.500 (0.500 to 0.500)"
    assert unquantized == f"| unquantized | 2 | {figures} |"


def test_what_is_compared_has_seen_the_same_data() -> None:
    assert VARIANTS["unquantized"].views == VARIANTS["images"].views == 0
    assert VARIANTS["MAGE-C"].views == VARIANTS["16 views"].views == 16
    assert {VARIANTS[name].views for name in ("base", "fixed ratio", "mask token")} == {1}
