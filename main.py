#!/usr/bin/env python3
"""Train RG-Flow: build, resume, loop, log, save.

    python main.py @configs/msds1_cpu.args      a small flow on generated images, minutes on a CPU
    python main.py --data celeba32 --cuda 0     the paper's CelebA run

The random state of a run is its step number: weights, order, flips, noise and sample grids are functions of the seed,
the epoch and the step.
"""

import math
import signal
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from shutil import disk_usage

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being imported: no traceback

import torch
from tqdm import tqdm

import args as flags
from data import DATASETS, open_dataset
from data.batches import Batches
from flow.evaluation import bits_per_dim_of_all, first_nonfinite, mean_and_stderr, noisy_batch
from flow.load import build
from flow.preprocess import nats_per_dim, nats_to_bits, to_image, to_model
from layers.fold import folded_together
from utils import checkpoint, cli
from utils.cli import UserError
from utils.compilation import why_not_compiled
from utils.descent import Descent
from utils.distributed import Peers, is_torchelastic_launched, launch, together
from utils.files import lock
from utils.logging import RunLog
from utils.memory import keep_freed_memory
from utils.plotting import grid_figure, save_figure
from utils.random import derived_seed, generator
from utils.results import machine
from utils.signals import StopSignals

# A run goes on only with the same values of these; anything else may change between starts.
NETWORK = ("model", "L", "nchannels", "subnet", "prior", "kernel_size", "nlayers", "nresblocks", "nmlp", "nhidden")
NETWORK += ("share_levels", "dtype")
FIXED = (*NETWORK, "data", "fingerprint", "seed", "batch_size")
PLACES = ("data_path", "out_dir")  # on the machine of the training, no business of who gets the weights
GRID = 8


class Loss(torch.nn.Module):
    """The training loss, nats per dimension, mean over a batch, as a module."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, images, noise):
        with folded_together(self.flow):
            return nats_per_dim(self.flow, images, noise=noise).mean()


class Run:
    """One training run: a flow, its optimiser, its data and the step it has reached. The first of its processes writes.

    args: of `args.get_args`
    dataset: what `data.open_dataset` gives, instead of opening the one of the flags
    peers: the processes of the run, None for those that torchrun tells of
    """

    def __init__(self, args, dataset=None, peers=None):
        self.args = args
        self.device = torch.device(args.cuda)
        self.peers = peers or Peers(self.device)
        try:
            self.peers.rows(args.batch_size)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        base, self.folder = (flags.run_path(args, end) if self.peers.first else None for end in ("", "_save"))
        self.lock = self.open_folder(base) if base else None
        self.dataset = dataset or self.peers.one_per_machine_first(
            lambda: open_dataset(args.data, args.data_path, args.nchannels, args.L)
        )
        self.config = vars(args).copy()
        self.config.update(nlayers=list(args.nlayers), fingerprint=self.dataset.fingerprint)
        torch.manual_seed(derived_seed(args.seed, "weights"))
        self.flow = build(self.config).to(self.device)
        self.dtype = next(self.flow.parameters()).dtype
        precision = torch.bfloat16 if args.amp == "bf16" else None
        obstacle = why_not_compiled(self.device) if args.compile else None
        self.flow.accelerate(args.compile and not obstacle, precision, args.grad_checkpoint)
        graph = args.compile and self.device.type == "cuda" and self.peers.size == 1
        self.descent = Descent(Loss(self.flow), args.weight_decay, args.clip_grad, self.peers, graph)
        try:
            self.batches = Batches(
                self.dataset.train, args.batch_size, self.device, args.seed, DATASETS[args.data].flips
            )
        except ValueError as error:
            raise UserError(f"--{error}") from error
        self.total_steps = args.epoch * self.batches.steps_per_epoch
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)
        self.step = 0
        self.saved_step = None  # the latest step whose state is on disk
        self.seconds = 0.0  # spent on steps, wall time, without tests, plots and saves
        self.test_bpds = {}  # of the ends of epochs: {finished epochs: bits per dimension}
        notes = self.resume()
        notes += self.check_disk() if base else []
        notes += [f"--compile is off: torch.compile does not work here ({obstacle})"] if obstacle else []
        self.check_peers()
        self.step = self.peers.broadcast(self.step)
        self.descent.join()
        self.log = RunLog(base, self.peers.first and not args.no_stdout, self.step)
        for line in [*self.describe(), *self.dataset.warnings, *notes]:
            self.log.text(line)

    def open_folder(self, base):
        """Make the run's folders and return their lock. Raises UserError where they cannot be had."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(f"{base}.lock")
        except BlockingIOError as error:
            raise UserError(
                f"{base}.lock: another process is training this run, set --out_infix to start one beside it"
            ) from error
        except OSError as error:
            raise UserError(f"--out_dir {self.args.out_dir}: cannot be written ({error.strerror})") from error
        checkpoint.remove_leftovers(self.folder)
        return held

    def check_disk(self):
        """The line that says how much disk the checkpoints will take. Raises UserError if it is not there."""
        args, epochs = self.args, self.total_steps // self.batches.steps_per_epoch
        kept = epochs // math.lcm(args.save_epoch, args.keep_epoch or 1) if args.save_epoch else min(epochs, 1)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.flow.parameters())
        there = sum(path.stat().st_size for path in self.folder.glob("*.state"))
        needed, free = checkpoint.disk_space(weights, kept), disk_usage(self.folder).free
        line = f"disk: the checkpoints need up to {needed / 1e9:.3g} GB, {there / 1e9:.3g} GB of it are there"
        line += f", {free / 1e9:.3g} GB are free"
        if self.step < self.total_steps and needed - there > free:
            raise UserError(f"--out_dir {args.out_dir}: {line}; a larger --keep_epoch keeps fewer files")
        return [line]

    def check_peers(self):
        """Raises UserError unless all processes train the same run on the same data."""
        own = {name: self.config[name] for name in (*FIXED, "test_steps")} | {"steps": self.total_steps}
        first = self.peers.broadcast(own)
        different = [f"{name} {first[name]} -> {own[name]}" for name in own if own[name] != first[name]]
        if different:
            raise UserError(f"process {self.peers.rank}: not the run of process 0 ({'; '.join(different)})")

    def describe(self):
        """The lines that start a log."""
        counts = [sum(p.numel() for p in self.flow.level_parameters(h)) for h in range(self.flow.num_levels)]
        yield " ".join(f"{name}={value}" for name, value in sorted(self.config.items()))
        yield f"data: {self.args.data}, {len(self.dataset.train):,} training and {len(self.dataset.test):,} test images"
        if self.peers.size > 1:
            share = self.args.batch_size // self.peers.size
            yield f"{self.peers.size} processes: {self.args.batch_size} images per step in all, {share} in each"
        yield f"parameters: {sum(counts):,} ({', '.join(f'h = {h}: {n:,}' for h, n in enumerate(counts))})"
        yield f"multiply-adds of the networks, forward: {self.flow.multiply_adds() / 1e6:,.4g} million per image"

    def resume(self):
        """Go on from the newest checkpoint of this run, or from --init; returns what the log should say of it."""
        found = checkpoint.newest(self.folder, full=True) if self.folder else None
        if not found:
            return self.initialise() if self.args.init and self.peers.first else []
        path, state, notes = found
        if not checkpoint.is_full(state):
            raise UserError(
                f"{path} is slim, without the optimiser's state: a run cannot go on from it, but a new one, with"
                f" another --out_infix, can start from its weights with --init {path}"
                + "".join(f" ({note})" for note in notes)
            )
        old = state["config"]
        changed = self.differences(old, self.config)
        fixed = self.differences(old, FIXED)
        if fixed:
            raise UserError(
                f"{path} was trained with other settings ({'; '.join(fixed)}): set --out_infix to start a new run"
            )
        try:
            self.flow.load_state_dict(state["model"])
            self.descent.load(state)
            self.test_bpds = {int(epoch): float(bpd) for epoch, bpd in state.get("test_bpds", {}).items()}
            self.seconds = float(state.get("seconds", 0))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {path}: {str(error).splitlines()[0]}") from error
        self.step = self.saved_step = state["step"]
        checkpoint.remove_replaced(self.folder, state)
        notes += [f"continuing from {path}, step {self.step}" + (", --init is not used" if self.args.init else "")]
        return notes + ([f"changed: {'; '.join(changed)}"] if changed else [])

    def initialise(self):
        """Start from the weights of another run; returns what the log should say of it."""
        path = self.args.init
        state = checkpoint.read(path)
        different = self.differences(state["config"], NETWORK)
        if different:
            raise UserError(f"--init {path}: is of another network ({'; '.join(different)})")
        try:
            self.flow.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(f"checkpoint {path}: {str(error).splitlines()[0]}") from error
        return [f"starting from the weights of {path}, step {state['step']} of its run"]

    def differences(self, old, names):
        """What of an old configuration differs from the flags', in words."""
        pairs = {name: (str(old.get(name)), str(self.config[name])) for name in names}  # a file may hold anything
        return [f"{name} {before} -> {now}" for name, (before, now) in pairs.items() if before != now]

    @property
    def quiet(self):
        """tqdm's `disable`: progress is shown by the first process, on terminals."""
        return None if self.peers.first else True

    @property
    def epoch(self):
        """The epoch of the latest step, from 1."""
        return max(0, self.step - 1) // self.batches.steps_per_epoch + 1

    @property
    def mid_epoch(self):
        """Whether the latest step was not the last of its epoch."""
        return self.step % self.batches.steps_per_epoch != 0

    def learning_rate(self, step):
        """Warm-up, then constant or a cosine that ends with the run."""
        warmup = self.args.warmup_steps
        if step < warmup:
            return self.args.lr * (step + 1) / warmup
        if self.args.lr_schedule == "constant":
            return self.args.lr
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def batch(self, step, rank=None):
        """The images of a step, uint8 (B, C, L, L), and its dequantisation noise: the part of process `rank`, or of
        this one, of what a process alone would draw for the whole batch."""
        rows = self.peers.rows(self.args.batch_size, rank)
        draws = generator(self.args.seed, "step", step, self.device)
        images = self.batches.train(step, draws, rows)
        shape = self.args.batch_size, *images.shape[1:]
        return images, torch.rand(shape, generator=draws, dtype=self.dtype, device=self.device)[rows]

    def train_step(self):
        """One update; returns the gradient norm before clipping, on the device.

        A loss or gradient norm that is not finite blocks this update and all after it.
        """
        norm = self.descent(self.step, self.learning_rate(self.step), *self.batch(self.step))
        self.step += 1
        return norm

    def stop_if_failed(self):
        """Raises UserError with epoch, step and level if a loss or gradient was not finite."""
        failed = self.descent.failed_step.item()
        if failed < 0:
            return
        for rank in range(self.peers.size):
            images, noise = self.batch(failed, rank)
            loss = nats_per_dim(self.flow, images, noise=noise).mean()
            loss.backward()
            if not loss.isfinite():
                break
        self.step = failed + 1
        self.fail("gradient" if loss.isfinite() else "loss", images, noise)

    def fail(self, what, images, noise):
        """Raises UserError with epoch, step and the level at which the latents of the images first are not finite."""
        level = self.flow.first_nonfinite_level(to_model(images, noise=noise, dtype=self.dtype)[0])
        where = "in the sum over all levels" if level is None else f"first at level h = {level}"
        raise UserError(
            f"epoch {self.epoch}, step {self.step}: {what} is not finite, {where}; nothing is saved,"
            " the last checkpoint is untouched"
        )

    def train(self):
        """Train, then give up the lock. Returns the number of the signal that ended the run early, or None."""
        with StopSignals() as stop, closing(self.lock) if self.lock else nullcontext():
            stopped = self.train_until(stop)
            if stopped:
                self.log.text(f"{signal.Signals(stopped).name}: stopped at step {self.step}")
        return stopped

    def train_until(self, stop):
        """All steps that are left, with tests, checkpoints and sample grids at the end of each epoch and of the run.

        --test_steps are tested too. A signal, of which `stop` tells, ends it after a step and its saves; returns its
        number.
        """
        args, agreed = self.args, None
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=self.quiet, dynamic_ncols=True)
        reported, first = self.seconds, self.step
        saved = resumed = time.perf_counter()
        while self.step < self.total_steps:
            norm = self.train_step()
            bar.update()
            finished = self.step == self.total_steps
            epoch_end = not self.mid_epoch
            printing = args.print_step and self.step % args.print_step == 0
            testing = finished or epoch_end or self.step in args.test_steps
            if printing or testing or self.device.type == "cpu":
                self.stop_if_failed()
            self.seconds += time.perf_counter() - resumed
            if printing:
                self.report_training(bar, norm.item(), (self.seconds - reported) / (self.step - first))
                reported, first = self.seconds, self.step
            if testing:
                self.test()
            if epoch_end or finished:
                if finished or (args.plot_epoch and self.epoch % args.plot_epoch == 0):
                    self.plot()
                if finished or (args.save_epoch and self.epoch % args.save_epoch == 0):
                    self.save()
                    saved = time.perf_counter()
            agreed = self.peers.agree(stop.number)  # read once: a signal that comes later waits for the next step
            due = args.save_minutes and time.perf_counter() - saved >= 60 * args.save_minutes
            if (agreed or due) and self.saved_step != self.step:
                self.save(last=True)
                saved = time.perf_counter()
            if agreed:
                break
            resumed = time.perf_counter()
        bar.close()
        return agreed

    def report_training(self, bar, norm, seconds):
        """One line and one record: mean loss since the last one, gradient norm, images per second."""
        total, number = self.descent.window.tolist()
        self.descent.window.zero_()
        epoch, bpd = self.epoch, nats_to_bits(total / number)
        rate, lr = self.args.batch_size / seconds, self.learning_rate(self.step - 1)
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
            seconds=self.seconds,
            time=time.time(),
        )

    @contextmanager
    def evaluation(self):
        """Without gradients, with folded parameters kept from batch to batch."""
        self.flow.eval()
        with torch.no_grad():
            yield
        self.flow.train()

    def test(self):
        """Bits per dimension of the whole test split, with the same dequantisation noise at every test.

        Raises UserError if it is not finite.
        """
        images, peers = self.dataset.test, self.peers
        with self.evaluation():
            values = bits_per_dim_of_all(self.flow, images, part=peers.rank, parts=peers.size, quiet=self.quiet)
            values = peers.sum_(values)
            bad = first_nonfinite(values)
            if bad is not None:
                self.fail("BPD of test images", *noisy_batch(self.flow, images, bad))
        bpd, stderr = mean_and_stderr(values)
        if not self.mid_epoch:
            self.test_bpds[self.epoch] = bpd
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
            seconds=self.seconds,
            time=time.time(),
        )

    def save(self, last=False):
        """Save the run's state; as `last.state` inside an epoch, or if `last`."""
        if not self.folder:
            return
        if last:  # no test has gone before
            self.check_weights()
        self.log.sync()
        state = {
            "config": self.config,
            "epoch": self.step // self.batches.steps_per_epoch,  # finished ones
            "step": self.step,
            "mid_epoch": last or self.mid_epoch,
            "seconds": self.seconds,
            "machine": f"{self.peers.size} x {machine(self.device)}" if self.peers.size > 1 else machine(self.device),
            "test_bpds": self.test_bpds,
            "model": self.flow.state_dict(),
            **self.descent.state(),
        }
        path = checkpoint.save_run(self.folder, state, self.args.keep_epoch)
        self.saved_step = self.step
        self.log.text(f"weights: {path}")

    def check_weights(self):
        """Raises UserError if a step or a weight was not finite."""
        self.stop_if_failed()
        if not torch.stack([parameter.isfinite().all() for parameter in self.flow.parameters()]).all():
            raise UserError(
                f"epoch {self.epoch}, step {self.step}: weights are not finite; nothing is saved,"
                " the last checkpoint is untouched"
            )

    def plot(self):
        """Samples at T = 1 from the same latents every time."""
        if not self.folder:
            return
        base = flags.run_path(self.args, "_samples")
        with self.evaluation():
            images = self.flow.sample(GRID**2, 1.0, generator(self.args.seed, "plot", 0, self.device))
            images = to_image(images).cpu()
        name = f"step{self.step}" if self.mid_epoch else f"epoch{self.epoch}"
        # Without parents: a run folder that was removed meanwhile is not made anew.
        (path,) = save_figure(grid_figure(images, GRID), base / name, [".png"], parents=False)
        self.log.text(f"samples: {path}")


def export(args):
    """Write the weights and configuration of the run's newest checkpoint to --export."""
    state, path = flags.newest_state(args)
    if Path(args.export).resolve().parent == path.resolve().parent:
        raise UserError(f"--export {args.export}: is in the folder of the run's own checkpoints, name another")
    state["config"] = {name: value for name, value in state["config"].items() if name not in PLACES}
    checkpoint.save(args.export, checkpoint.slim(state))
    print(f"{path} without the optimiser's state, step {state['step']}: {args.export}")


def main(argv=None):
    args = flags.get_args(argv)
    if args.export:
        return export(args)
    if args.gpus and not is_torchelastic_launched():
        return launch(args.gpus, sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    with together(torch.device(args.cuda)) as peers:
        run = Run(args, peers=peers)
        if run.step >= run.total_steps:
            run.log.text(f"nothing to do: step {run.step} of {run.total_steps} is reached")
        stopped = run.train()
        if run.log.text_path:
            run.log.text(f"log: {run.log.text_path} and {run.log.records_path}")
    if stopped:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    cli.script(main)
