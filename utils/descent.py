"""One step of training: gradient, clipping, AdamW. Nothing is read from the device, so that the step can be one CUDA
graph, and an update with anything not finite is never made."""

import torch

from .compilation import CapturedFunction


class Descent:
    """AdamW (betas and eps of PyTorch, decay on all parameters) on the mean of `loss` over all processes.

    loss: a module, called with the tensors of a step, each a part of a batch, of equal shapes in every step; its value
        is the mean over that part
    clip: largest norm of the gradient, 0 for no limit
    graph: run a step as one CUDA graph; needs a GPU and no peers
    """

    def __init__(self, loss, weight_decay, clip, peers, graph=False):
        self.loss = loss
        self.parameters = list(loss.parameters())
        self.clip = clip
        self.peers = peers
        device = peers.device
        self.learning_rate = torch.zeros((), device=device)
        self.step = torch.zeros((), dtype=torch.long, device=device)
        # The first step whose loss or gradient was not finite, -1 for none: from there on the weights stay as they are.
        self.failed_step = torch.full((), -1, device=device)
        self.window = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of losses since a print
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.learning_rate,
            weight_decay=weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.run = CapturedFunction(self.update) if graph else self.update

    def __call__(self, step, learning_rate, *inputs):
        """Step number `step`; returns the gradient norm before clipping, on the device."""
        self.step.fill_(step)
        self.learning_rate.fill_(learning_rate)
        return self.run(*inputs)

    def update(self, *inputs):
        self.optimizer.zero_grad()  # nothing is there, unless the recording of a graph has failed
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
        """What a checkpoint holds of it."""
        return {"optimizer": self.optimizer.state_dict(), "window": self.window}

    def load(self, state):
        """Go on from `state()` of a checkpoint. Raises LookupError, TypeError, ValueError, … where it does not fit."""
        own = self.optimizer.state_dict()["param_groups"]  # the flags count, not the old values
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
        """Give all processes the weights and the state of the first one; from here on gradients are means over all."""
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
