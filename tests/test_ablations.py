"""The table of the ablations: figures by hand."""

from __future__ import annotations

from benchmarks.ablations import VARIANTS, table


def test_the_table() -> None:
    records = [
        {"variant": "base", "seed": seed, "epochs": 3, "loss": loss, "probe": 0.5, "frechet": 10.0 + seed}
        for seed, loss in enumerate((1.0, 2.0, 6.0))
    ]
    other = {"variant": "unquantized", "epochs": 3, "loss": 0.5, "probe": 0.25}
    records += [other | {"seed": seed} for seed in range(3)]
    head, _, base, unquantized = table(records).splitlines()
    assert head.startswith("| 3 seeds, 3 epochs | Frechet distance")
    assert base == "| base | 11.0 (10.0 to 12.0) | 50.0% (50.0% to 50.0%) | 3.000 (1.000 to 6.000) |"
    figures = "does not generate | 25.0% (25.0% to 25.0%) | 0.500 (0.500 to 0.500)"
    assert unquantized == f"| unquantized | {figures} |"


def test_unquantized_inputs_are_compared_with_the_same_images() -> None:
    assert not VARIANTS["unquantized"].cached
    assert VARIANTS["images"] == type(VARIANTS["images"])(cached=False)
