"""Whether torch.compile works here, and a training step as one CUDA graph: recorded once, then started with a single
call instead of thousands."""

import warnings

import torch

WARMUP = 3  # plain calls before the recording, in which libraries set themselves up and kernels are compiled


def why_not_compiled(device):
    """Why torch.compile makes no kernels for a device here (no C++ compiler, an old GPU, …), None where it does."""
    try:
        torch.compile(lambda x: x.sigmoid() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers raise, it means that they are not to be had
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


class CapturedFunction:
    """Calls `function(*tensors)` as a CUDA graph, after a few plain calls, which count as calls like any other.

    The shapes must be the same in every call; `function` must read nothing from the device. What it returns is
    overwritten by the next call. Where recording fails, one warning is given and plain calls go on.
    """

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.graph = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        if self.calls == WARMUP:
            self.record(inputs)
        self.calls += 1
        if self.graph is None:
            return self.plain(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output

    def plain(self, inputs):
        """A call on a stream of its own, as recordings ask for."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return output

    def record(self, inputs):
        graph = torch.cuda.CUDAGraph()
        self.inputs = [given.clone() for given in inputs]
        try:
            with torch.cuda.graph(graph):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of the training step ({str(error).splitlines()[0]})", stacklevel=2)
        else:
            self.graph = graph
