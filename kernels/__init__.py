"""The kernels of mage_fast: one folder an op under ``ops/``, one selector, one randomness contract.

Each op folder holds ``api.py`` (typed, validated, documented), ``reference.py`` (the equation as code,
forward and backward) and ``specs.py`` (the named real shapes that tests and benchmarks share).
"""

if __name__ != "mage_fast.kernels":
    raise ImportError(
        f"this folder is the package mage_fast.kernels, but it was imported as {__name__!r}: "
        "write `import mage_fast.kernels` (the folder lies at the top of the repository for reading)"
    )
