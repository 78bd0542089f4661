"""A function of tensors as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CUDAGraph:
    """Captures what ``function(*inputs)`` launches, once; a replay runs it on other inputs of these shapes.

    Parameters are read from where they lie: updated in place they count, moved elsewhere they do not.

    Args:
        function: neither waits for the device nor copies from the host.
        inputs: tensors on one GPU; the graph works on copies of its own.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        with torch.cuda.device(self._inputs[0].device):
            # a first run elsewhere: kernels get compiled, libraries take their workspaces
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # autocast's copies of the weights must be made inside, so that a replay makes them anew
            torch.clear_autocast_cache()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = function(*self._inputs)
            torch.clear_autocast_cache()

    @staticmethod
    def runs_on(device: torch.device) -> bool:
        """Whether the device has such graphs."""
        return device.type == "cuda"

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """What the function gives for these inputs, in memory of its own."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()
