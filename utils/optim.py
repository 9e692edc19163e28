"""One step of training: learning rate, gradient, clipping, AdamW. On a GPU the step can be one CUDA graph, or two.

A step reads nothing from the device, as a graph requires. It never applies an update that is not finite.
"""

import math

import torch

from .graphs import CapturedFunction


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
    graph: run a step as one CUDA graph, with several processes as two, with their sum between; needs a GPU and equal
        shapes in every step
    """

    def __init__(self, loss, weight_decay, clip, peers, graph=False):
        self.loss, self.clip, self.peers, device = loss, clip, peers, peers.device
        self.parameters = list(loss.parameters())
        self.learning_rate = torch.zeros((), dtype=torch.float32, device=device)  # which fused AdamW needs
        self.step = torch.zeros((), dtype=torch.long, device=device)
        # The first step whose loss or gradient was not finite, -1 for none. From there on the weights do not change.
        self.failed_step = torch.full((), -1, device=device)
        self.window = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of losses since a print
        ways = {"fused": True, "capturable": device.type == "cuda"}
        self.optimizer = torch.optim.AdamW(self.parameters, self.learning_rate, weight_decay=weight_decay, **ways)
        stream = torch.cuda.Stream(device) if graph else None  # its own, as graphs of tests come and go

        def capture(function):
            return CapturedFunction(function, stream) if graph else function

        if peers.size == 1:
            self.run = capture(self.update)
        else:
            sizes = [*(parameter.numel() for parameter in self.parameters), 1]
            self.sums = torch.zeros(sum(sizes), dtype=self.parameters[0].dtype, device=device)
            self.parts = self.sums.split(sizes)  # gradients and loss, summed over the processes in one message
            self.differentiate, self.move_together = capture(self.differentiate), capture(self.move_together)
            self.run = self.update_together

    def __call__(self, step, learning_rate, *inputs):
        """Step number `step`; returns the gradient norm before clipping, on the device."""
        self.step.fill_(step)
        self.learning_rate.fill_(learning_rate)
        return self.run(*inputs)

    def update(self, *inputs):
        return self.move(self.backward(*inputs))

    def update_together(self, *inputs):
        """`update` of several processes."""
        self.differentiate(*inputs)
        self.peers.sum_(self.sums)
        return self.move_together()

    def backward(self, *inputs):
        """This process's part of the loss; its gradient lies at the parameters."""
        self.optimizer.zero_grad()  # empty already, unless recording a graph has failed
        loss = self.loss(*inputs) / self.peers.size
        loss.backward()
        return loss.detach()

    def differentiate(self, *inputs):
        """This process's part of `sums`."""
        loss = self.backward(*inputs)
        torch.cat([*(parameter.grad.flatten() for parameter in self.parameters), loss[None]], out=self.sums)
        return loss

    def move_together(self):
        *gradients, loss = self.parts
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return self.move(loss[0])

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
        """Copy weights and state from the first process to all."""
        if self.peers.size == 1:
            return
        self.peers.broadcast_(parameter.detach() for parameter in self.parameters)
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
