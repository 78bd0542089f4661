"""The instruction sets that the C++ kernels are compiled for and this processor has, the best one first.

python -m tests.instruction_sets prints them, as torch's variable ATEN_CPU_CAPABILITY takes them.
"""

from __future__ import annotations

import torch

_WITHIN = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


def available() -> tuple[str, ...]:
    return _WITHIN.get(torch.backends.cpu.get_cpu_capability(), ("default",))


if __name__ == "__main__":
    print(*available())
