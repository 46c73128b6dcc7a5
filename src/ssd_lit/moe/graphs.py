"""Work on a GPU that is repeated with the same shapes, as one CUDA graph: a single launch instead of a thousand."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

MOST_ELEMENTS = 2**26
"""A graph keeps a copy of its inputs, and what it computes in between; larger inputs run long without one."""

Work = Callable[..., Tensor]

_captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}


def replayed(work: Work, setting: Hashable, inputs: Sequence[Tensor]) -> Tensor:
    """`work(setting, *inputs)` on a GPU, from a CUDA graph if the inputs are small enough.

    The work must not read from the GPU or copy to it. The first call with such inputs runs it once, and captures it.
    """
    if sum(x.numel() for x in inputs) > MOST_ELEMENTS:
        return work(setting, *inputs)
    key = (work, setting, *((x.shape, x.dtype, x.device) for x in inputs))
    # A validation may be under way, whose tensors could not be changed later.
    with torch.cuda.device(inputs[0].device), torch.inference_mode(False), torch.no_grad():
        if key not in _captured:
            _captured[key] = _capture(work, setting, inputs)
        graph, copies, result = _captured[key]
        for copy, x in zip(copies, inputs, strict=True):
            copy.copy_(x)
        graph.replay()
        return result.clone()


def _capture(
    work: Work, setting: Hashable, inputs: Sequence[Tensor]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    """The graph, the inputs that it reads, and the result that it writes."""
    copies = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
    # Kernels are compiled and libraries loaded outside the graph, on a stream of their own as torch asks.
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        work(setting, *copies)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that load data, go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work(setting, *copies)
    return graph, copies, result
