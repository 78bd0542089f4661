"""A trace of one of our steps: where its time goes, operator by operator."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from mage_fast.benchmark.end_to_end import OURS, Item
from mage_fast.files import atomic_path

#: Operators that the table shows.
_ROWS = 25


def write(item: Item, out: Path, console: Console) -> Path:
    """Profile one run of ours in bfloat16, print its longest operators, write a trace beside the records.

    The file is Chrome's trace format: open it with https://ui.perfetto.dev or chrome://tracing.
    """
    ours = [c for c in item.candidates(compiled=False) if c.implementation == OURS]
    candidate = next(c for c in ours if c.dtype is torch.bfloat16)
    candidate.warm_up()
    on_cuda = item.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiled:
        candidate.run()
        if on_cuda:
            torch.cuda.synchronize()
    own = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    console.print(f"{item.name}, {candidate.label}:", markup=False, highlight=False)
    table = profiled.key_averages().table(sort_by=own, row_limit=_ROWS, max_name_column_width=50)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    path = out.with_name(f"{out.stem}-{item.suite}-{item.name.replace('/', '-')}.trace.json")
    with atomic_path(path) as temporary:
        profiled.export_chrome_trace(str(temporary))
    return path
