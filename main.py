#!/usr/bin/env python3
"""Train RG-Flow: build, resume, loop, log, save.

    python main.py @configs/msds1_cpu.args      a small flow on generated images, minutes on a CPU
    python main.py --data celeba32 --cuda 0     the paper's CelebA run

The random state of a run is its step number: weights, order, flips, noise and sample grids are functions of the seed,
the epoch and the step.
"""

import math
import time

import torch
from tqdm import tqdm

import args as flags
from data import DATASETS, open_dataset
from data.batches import Batches
from flow.load import build
from flow.preprocess import nats_per_dim, nats_to_bits, to_image, to_model
from utils import checkpoint
from utils.logging import RunLog
from utils.memory import keep_freed_memory
from utils.plotting import grid_figure, save_figure
from utils.random import derived_seed, generator

# A run goes on only with the same values of these; anything else may change between starts.
FIXED = ("data", "fingerprint", "L", "nchannels", "subnet", "prior", "kernel_size", "nlayers", "nresblocks", "nmlp")
FIXED += ("nhidden", "share_levels", "dtype", "seed", "batch_size")
TEST_BATCH = 250
GRID = 8


class Run:
    """One training run: a flow, its optimiser, its data and the step it has reached."""

    def __init__(self, args):
        self.args = args
        self.device = torch.device(args.device)
        self.dataset = open_dataset(args.data, args.data_path, args.nchannels, args.L)
        self.config = {name: value for name, value in vars(args).items() if name != "weights"}
        self.config.update(nlayers=list(args.nlayers), fingerprint=self.dataset.fingerprint)
        torch.manual_seed(derived_seed(args.seed, "weights"))
        self.flow = build(self.config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.flow.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        try:
            self.batches = Batches(
                self.dataset.train, args.batch_size, self.device, args.seed, DATASETS[args.data].flips
            )
        except ValueError as error:
            raise flags.RunError(f"--{error}") from error
        self.total_steps = args.epoch * self.batches.steps_per_epoch
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)
        self.step = 0
        self.folder = flags.run_path(args, "_save")
        notes = self.resume()
        self.log = RunLog(flags.run_path(args, ""), not args.no_stdout, self.step)
        # The first step whose loss or gradient was not finite, -1 for none: from there on the weights stay as they are.
        self.failed_step = torch.full((), -1, device=self.device)
        for line in [*self.describe(), *self.dataset.warnings, *notes]:
            self.log.text(line)

    def describe(self):
        """The lines that start a log."""
        counts = [sum(p.numel() for p in self.flow.level_parameters(h)) for h in range(self.flow.num_levels)]
        yield " ".join(f"{name}={value}" for name, value in sorted(self.config.items()))
        yield f"data: {self.args.data}, {len(self.dataset.train):,} training and {len(self.dataset.test):,} test images"
        yield f"parameters: {sum(counts):,} ({', '.join(f'h = {h}: {n:,}' for h, n in enumerate(counts))})"

    def resume(self):
        """Go on from the newest checkpoint of this run, if there is one; returns what the log should say of it."""
        found = checkpoint.newest(self.folder) if self.folder else None
        if not found:
            return []
        path, state = found
        old = state["config"]
        changed = {
            name: f"{name} {old.get(name)} -> {value}" for name, value in self.config.items() if old.get(name) != value
        }
        fixed = [changed[name] for name in FIXED if name in changed]
        if fixed:
            raise flags.RunError(
                f"{path} was trained with other settings ({'; '.join(fixed)}): set --out_infix to start a new run"
            )
        self.flow.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.args.weight_decay  # the flag counts, not the old value
        self.step = state["step"]
        return [f"continuing from {path}, step {self.step}"] + (
            [f"changed: {'; '.join(changed.values())}"] if changed else []
        )

    @property
    def epoch(self):
        """Finished epochs."""
        return self.step // self.batches.steps_per_epoch

    def learning_rate(self, step):
        """Warm-up, then constant or a cosine that ends with the run."""
        warmup = self.args.warmup_steps
        if step < warmup:
            return self.args.lr * (step + 1) / warmup
        if self.args.lr_schedule == "constant":
            return self.args.lr
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def batch(self, step):
        """The images of a step and the generator of its dequantisation noise."""
        noise = generator(self.args.seed, "step", step, self.device)
        return self.batches.train(step, noise), noise

    def train_step(self):
        """One update; returns loss (nats per dimension) and gradient norm, on the device. Nothing is read from it.

        A loss or gradient norm that is not finite blocks this update and all after it.
        """
        images, noise = self.batch(self.step)
        loss = nats_per_dim(self.flow, images, noise).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), self.args.clip_grad or math.inf)
        finite = loss.isfinite() & norm.isfinite()
        self.failed_step = torch.where((self.failed_step < 0) & ~finite, self.step, self.failed_step)
        self.optimizer.found_inf = (self.failed_step >= 0).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach(), norm

    def stop_if_failed(self):
        """Raises RunError with epoch, step and level if a loss or gradient was not finite."""
        failed = self.failed_step.item()
        if failed < 0:
            return
        images, noise = self.batch(failed)
        loss = nats_per_dim(self.flow, images, noise).mean()
        loss.backward()
        noise = self.batch(failed)[1]
        level = self.flow.first_nonfinite_level(to_model(images, noise, dtype=loss.dtype)[0])
        epoch = failed // self.batches.steps_per_epoch + 1
        raise flags.RunError(
            f"epoch {epoch}, step {failed + 1}: {'loss' if not loss.isfinite() else 'gradient'} is not finite, first at"
            f" level h = {level}; the weights are still those of step {failed}, the last checkpoint is untouched"
        )

    def train(self):
        """All steps that are left, with tests, checkpoints and sample grids at the end of each epoch and of the run."""
        args = self.args
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        losses, start = [], time.perf_counter()
        while self.step < self.total_steps:
            loss, norm = self.train_step()
            losses.append(loss)
            bar.update()
            finished = self.step == self.total_steps
            epoch_end = self.step % self.batches.steps_per_epoch == 0
            printing = args.print_step and self.step % args.print_step == 0
            if printing or finished or epoch_end or self.device.type == "cpu":
                self.stop_if_failed()
            if printing:
                seconds = time.perf_counter() - start
                self.report_training(bar, torch.stack(losses).mean().item(), norm.item(), seconds / len(losses))
                losses, start = [], time.perf_counter()
            if epoch_end or finished:
                pause = time.perf_counter()
                self.test()
                if finished or (args.save_epoch and self.epoch % args.save_epoch == 0):
                    self.save()
                if finished or (args.plot_epoch and self.epoch % args.plot_epoch == 0):
                    self.plot()
                start += time.perf_counter() - pause
        bar.close()

    def report_training(self, bar, loss, norm, seconds):
        """One line and one record: mean loss since the last one, gradient norm, seconds per step."""
        epoch = (self.step - 1) // self.batches.steps_per_epoch + 1
        bpd, rate, lr = nats_to_bits(loss), self.args.batch_size / seconds, self.learning_rate(self.step - 1)
        bar.set_postfix_str(f"{bpd:.3f} bits/dim, {rate:.1f} images/s")
        self.log.text(
            f"epoch {epoch} step {self.step} bpd {bpd:.4f} grad_norm {norm:.4g} lr {lr:.3g} images/s {rate:.1f}"
        )
        self.log.record(
            kind="train",
            epoch=epoch,
            step=self.step,
            bpd=bpd,
            grad_norm=norm,
            lr=lr,
            images_per_s=rate,
            time=time.time(),
        )

    @torch.no_grad()
    def test(self):
        """Bits per dimension of the whole test split, with the same dequantisation noise at every test."""
        images, values = self.dataset.test, []
        for k in tqdm(range(0, len(images), TEST_BATCH), desc="test", leave=False, disable=None):
            batch = torch.from_numpy(images[k : k + TEST_BATCH]).to(self.device)
            values.append(nats_to_bits(nats_per_dim(self.flow, batch, generator(0, "test", k, self.device))))
        values = torch.cat(values).double()
        bpd, stderr = values.mean().item(), (values.std(correction=0) / max(1, len(values) - 1) ** 0.5).item()
        self.log.text(
            f"test: epoch {self.epoch} step {self.step} bpd {bpd:.4f} +- {stderr:.4f} on {len(values):,} images"
        )
        self.log.record(
            kind="test",
            epoch=self.epoch,
            step=self.step,
            bpd=bpd,
            bpd_stderr=stderr,
            images=len(values),
            time=time.time(),
        )

    def save(self):
        if not self.folder:
            return
        state = {
            "config": self.config,
            "epoch": self.epoch,
            "step": self.step,
            "mid_epoch": self.step % self.batches.steps_per_epoch != 0,
            "model": self.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path = checkpoint.save_run(self.folder, state, self.args.keep_epoch)
        self.log.text(f"weights: {path}")

    @torch.no_grad()
    def plot(self):
        """Samples at T = 1 from the same latents every time."""
        base = flags.run_path(self.args, "_samples")
        if not base:
            return
        z = self.flow.sample_prior(GRID**2, 1.0, generator(self.args.seed, "plot", 0, self.device))
        images = to_image(self.flow.inverse(z)[0]).cpu()
        name = f"epoch{self.epoch}" if self.step % self.batches.steps_per_epoch == 0 else f"step{self.step}"
        (path,) = save_figure(grid_figure(images, GRID), base / name, [".png"])
        self.log.text(f"samples: {path}")


def main(argv=None):
    args = flags.get_args(argv)
    keep_freed_memory()
    run = Run(args)
    if run.step >= run.total_steps:
        run.log.text(f"nothing to do: step {run.step} of {run.total_steps} is reached")
    run.train()
    if run.log.text_path:
        run.log.text(f"log: {run.log.text_path} and {run.log.records_path}")


if __name__ == "__main__":
    flags.script(main)
