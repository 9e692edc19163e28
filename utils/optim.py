"""One step of training: learning rate, gradient, clipping, AdamW. On a GPU the step can be one CUDA graph.

A step reads nothing from the device, as a graph requires. It never applies an update that is not finite.
"""

import math
import warnings

import torch

WARMUP = 3  # plain calls before a graph is recorded: libraries start, kernels are compiled


def learning_rate(step, peak, warmup, schedule, total_steps):
    """The rate of a step (from 0): a linear rise over `warmup` steps, then "constant", or "cosine" down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Descent:
    """AdamW (betas and eps of PyTorch, decay on all parameters) on the mean of `loss` over all processes.

    loss: a module, called with the tensors of a step; its value is the mean over this process's part of the batch
    clip: largest norm of the gradient, 0 for no limit
    graph: run a step as one CUDA graph; needs a GPU, one process and equal shapes in every step
    """

    def __init__(self, loss, weight_decay, clip, peers, graph=False):
        self.loss, self.clip, self.peers, device = loss, clip, peers, peers.device
        self.parameters = list(loss.parameters())
        self.learning_rate = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.long, device=device)
        # The first step whose loss or gradient was not finite, -1 for none. From there on the weights do not change.
        self.failed_step = torch.full((), -1, device=device)
        self.window = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of losses since a print
        ways = {"fused": True, "capturable": device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.parameters, self.learning_rate, weight_decay=weight_decay, **ways)
        self.run = CapturedFunction(self.update) if graph else self.update

    def __call__(self, step, learning_rate, *inputs):
        """Step number `step`; returns the gradient norm before clipping, on the device."""
        self.step.fill_(step)
        self.learning_rate.fill_(learning_rate)
        return self.run(*inputs)

    def update(self, *inputs):
        self.optimizer.zero_grad()  # empty already, unless recording a graph has failed
        loss = self.loss(*inputs)
        loss.backward()
        return self.move(self.peers.sum_(loss.detach()) / self.peers.size)

    def move(self, loss):
        """Clip the gradients and move the weights, unless something is not finite; returns the gradient norm."""
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in self.parameters)
        failed = ~(loss.isfinite() & norm.isfinite())
        self.failed_step.copy_(torch.where(failed & (self.failed_step < 0), self.step, self.failed_step))
        self.optimizer.found_inf = (self.failed_step >= 0).float()
        if self.clip:  # AdamW divides the gradients by this
            self.optimizer.grad_scale = (norm / self.clip).clamp_min(1).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.window[0] += loss
        self.window[1] += 1
        return norm

    def state(self):
        """Its part of a checkpoint."""
        return {"optimizer": self.optimizer.state_dict(), "window": self.window}

    def load(self, state):
        """Resume from `state()` of a checkpoint. Raises LookupError, TypeError, ValueError, … if it does not fit."""
        own = self.optimizer.state_dict()["param_groups"]  # of the flags, which may have changed
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate  # loading made a copy
        for parameter, values in self.optimizer.state.items():
            if any(value.shape not in (parameter.shape, ()) for value in values.values()):
                raise ValueError("optimiser state of another shape")
        if state["window"].shape != self.window.shape:
            raise ValueError("window of another shape")
        self.window.copy_(state["window"])

    def join(self):
        """Copy weights and state from the first process to all. From now on gradients are means over all processes."""
        if self.peers.size == 1:
            return
        self.loss = self.peers.parallel(self.loss)
        if self.peers.broadcast(bool(self.optimizer.state)):
            for parameter in self.parameters:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                empty = {"step": torch.zeros((), device=parameter.device), **moments}
                values = self.optimizer.state.setdefault(parameter, empty)
                self.peers.broadcast_(values[name] for name in empty)
        self.peers.broadcast_([self.window])


def why_not_compiled(device):
    """Why torch.compile does not work here for a device (no C++ compiler, an old GPU, …), None if it works."""
    try:
        torch.compile(lambda x: x.sigmoid() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of any of the compilers
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


class CapturedFunction:
    """Calls `function(*tensors)` as a CUDA graph. The first WARMUP calls are plain ones. The shapes must be the same in
    every call, and `function` must read nothing from the device. The next call overwrites the returned tensors. If
    recording fails, it warns once and makes plain calls."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None
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
        """A call on its own stream, as recording requires."""
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
            cause = str(error.__context__ or error).splitlines()[0]
            warnings.warn(f"no CUDA graph of the training step ({cause})", stacklevel=2)
        else:
            self.graph = graph
