"""CUDA graphs: a function's kernels, recorded once and then started by one call of the host."""

import warnings
from functools import cache

import torch

WARMUP = 3  # plain calls before a graph is recorded: libraries start, kernels are compiled


def captured(function, device):
    """`function`, on a GPU as a `CapturedFunction`."""
    return CapturedFunction(function, side_stream(device)) if device.type == "cuda" else function


@cache
def side_stream(device):
    """The stream of graphs that are used for a while: one for all, because freed memory stays with its stream."""
    return torch.cuda.Stream(device)


class CapturedFunction:
    """Calls `function(*tensors)`, which gives one tensor of a GPU, as a CUDA graph.

    The first WARMUP calls are plain ones, and so are later ones with tensors of other shapes. `function` must read
    nothing from the device and draw nothing, and what it uses besides its arguments must stay where it is. If recording
    fails, it warns once and makes plain calls. From then on the default generator of the GPU may be unusable.

    stream: of plain calls and of recording. Where one graph of a stream is gone, no other may be used any more: torch
        2.14 frees the workspaces that products have on its stream.
    """

    def __init__(self, function, stream):
        self.function, self.stream, self.calls, self.graph = function, stream, 0, None

    def __call__(self, *inputs):
        if self.calls == WARMUP:
            self.record(inputs)
        self.calls += 1
        if self.graph is None or [given.shape for given in inputs] != [own.shape for own in self.inputs]:
            return self.plain(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def plain(self, inputs):
        """A call on its own stream, as recording requires."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.function(*inputs)
        current.wait_stream(self.stream)
        return output

    def record(self, inputs):
        graph = torch.cuda.CUDAGraph()
        self.inputs = [given.clone() for given in inputs]
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            cause = str(error.__context__ or error).splitlines()[0]
            warnings.warn(f"no CUDA graph, going on without ({cause})", stacklevel=2)
        else:
            self.graph = graph
