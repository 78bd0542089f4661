"""Timings of the ops behind a correctness gate, for ``mage-fast bench`` and the folder ``benchmarks/``."""
