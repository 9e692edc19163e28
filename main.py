#!/usr/bin/env python3
"""Train a flow: set-up, loop, test, save.

    python main.py @configs/msds1_demo.args     a small flow on generated images, minutes on a CPU
    python main.py --data celeba32 --cuda 0     the paper's CelebA run

The random state of a run is its step number: weights, order, flips, noise and sample grids are functions of the seed,
the epoch and the step.
"""

import signal
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being imported: no traceback

import torch
from tqdm import tqdm

from args import accelerate, get_args, need_path, newest, run_path
from data import DATASETS, open_dataset
from data.batches import Batches
from flow.evaluation import bits_per_dim_of_all, first_nonfinite, level_that_fails, mean_and_stderr, noisy_batch
from flow.load import build
from flow.preprocess import Loss, nats_per_dim, nats_to_bits, to_image
from utils import checkpoint
from utils.cli import UserError, script
from utils.distributed import Peers, is_torchelastic_launched, launch, together
from utils.logging import RunLog
from utils.optim import Descent, learning_rate
from utils.plotting import grid_figure, save_figure
from utils.random import derived_seed, generator
from utils.results import machine
from utils.run import check_disk, find, loading, open_folder, read_initial
from utils.signals import StopSignals

UNSAVED = ("no_stdout", "export", "gpus", "given", "typed", "prepared_path")  # say nothing about a trained flow
PLACES = ("data_path", "out_dir")  # on the machine of the training; exports have only the name of a folder of images
GRID = 8


class Run:
    """A training run: a flow, its optimiser, its data, and the step it has reached. Only the first process writes.

    args: of `args.get_args`
    peers: the processes of the run, None for those that torchrun has started
    """

    def __init__(self, args, peers=None):
        self.args, self.device = args, torch.device(args.cuda)
        self.peers = peers or Peers(self.device)
        self.rows = self.peers.rows(args.batch_size)
        self.quiet = None if self.peers.first else True  # tqdm's `disable`: bars of the first process, on terminals
        base = run_path(args, "") if self.peers.first else None
        self.folder, self.lock = open_folder(base, args.out_dir) if base else (None, None)

        self.dataset = self.peers.one_per_machine_first(
            lambda: open_dataset(args.data, args.data_path, args.nchannels, args.L, args.prepared_path)
        )
        self.config = {name: value for name, value in vars(args).items() if name not in UNSAVED}
        self.config.update(nlayers=list(args.nlayers), fingerprint=self.dataset.fingerprint)
        torch.manual_seed(derived_seed(args.seed, "weights"))
        self.flow = build(self.config).to(self.device)
        dtype = next(self.flow.parameters()).dtype
        self.batches = Batches(self.dataset.train, args.batch_size, self.device, args.seed, args.flip, dtype)
        self.total_steps = args.epoch * self.batches.steps_per_epoch
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)

        _, obstacles = accelerate(self.flow, args)
        graph = args.compile and self.device.type == "cuda"
        self.descent = Descent(Loss(self.flow), args.weight_decay, args.clip_grad, self.peers, graph)

        self.step = 0
        self.saved_step = None  # the latest step whose state is on disk
        self.seconds = 0.0  # of steps, wall time, without tests, plots and saves
        notes = self.resume() + obstacles
        if base:
            weights = sum(parameter.numel() * parameter.element_size() for parameter in self.flow.parameters())
            epochs, finished = self.total_steps // self.batches.steps_per_epoch, self.step >= self.total_steps
            notes.append(check_disk(self.folder, args, weights, epochs, finished))
        alike = [name for name in self.config if name not in (*PLACES, "cuda")]
        self.peers.check_equal({name: self.config[name] for name in alike} | {"steps": self.total_steps})
        self.step = self.peers.broadcast(self.step)
        self.descent.join()
        self.log = RunLog(base, self.peers.first and not args.no_stdout, self.step)
        for line in [*self.describe(), *self.dataset.warnings, *notes]:
            self.log.text(line)

    def resume(self):
        """Load the newest checkpoint of the run, or the weights of --init; returns lines for the log."""
        found = find(self.folder, self.config, {"flip": DATASETS[self.args.data].flips})
        if found:
            path, state, notes = found
            with loading(path):
                self.flow.load_state_dict(state["model"])
                self.descent.load(state)
                self.seconds = float(state.get("seconds", 0))
            self.step = self.saved_step = state["step"]
            return notes
        if not self.args.init or not self.peers.first:
            return []
        state = read_initial(self.args.init, self.config)
        with loading(self.args.init):
            self.flow.load_state_dict(state["model"])
        return [f"starting from the weights of {self.args.init}, step {state['step']} of its run"]

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

    @property
    def epoch(self):
        """The epoch of the latest step, from 1."""
        return max(0, self.step - 1) // self.batches.steps_per_epoch + 1

    @property
    def mid_epoch(self):
        """Whether the latest step was not the last of its epoch."""
        return self.step % self.batches.steps_per_epoch != 0

    def rate(self, step):
        args = self.args
        return learning_rate(step, args.lr, args.warmup_steps, args.lr_schedule, self.total_steps)

    def train(self):
        """All remaining steps, with tests, checkpoints and sample grids at the end of each epoch and of the run. A
        signal ends it after the step and its saves. Returns the signal's number, or None."""
        args, stopped = self.args, None
        unreported, reported_step = 0.0, self.step  # seconds since the last report, its step
        saved = resumed = time.perf_counter()
        with (
            StopSignals() as stop,
            closing(self.lock) if self.lock else nullcontext(),
            tqdm(total=self.total_steps, initial=self.step, unit="step", disable=self.quiet, dynamic_ncols=True) as bar,
        ):
            while self.step < self.total_steps and not stopped:
                images, noise = self.batches(self.step, self.rows)
                norm = self.descent(self.step, self.rate(self.step), images, noise)
                self.step += 1
                bar.update()

                finished, epoch_end = self.step == self.total_steps, not self.mid_epoch
                printing = args.print_step and self.step % args.print_step == 0
                testing = finished or epoch_end or self.step in args.test_steps
                if printing or testing or self.device.type == "cpu":
                    self.stop_if_failed()
                taken = time.perf_counter() - resumed
                self.seconds, unreported = self.seconds + taken, unreported + taken
                if printing:
                    bar.set_postfix_str(self.report(norm.item(), unreported / (self.step - reported_step)))
                    unreported, reported_step = 0.0, self.step
                if testing:
                    self.test()
                if finished or (epoch_end and args.plot_epoch and self.epoch % args.plot_epoch == 0):
                    self.plot()
                if finished or (epoch_end and args.save_epoch and self.epoch % args.save_epoch == 0):
                    self.save()
                    saved = time.perf_counter()
                # Read once: a signal that comes later waits for the next step.
                stopped = self.peers.agree(stop.number)
                due = args.save_minutes and time.perf_counter() - saved >= 60 * args.save_minutes
                if (stopped or due) and self.saved_step != self.step:
                    self.save(last=True)
                    saved = time.perf_counter()
                resumed = time.perf_counter()
            if stopped:
                self.log.text(f"{signal.Signals(stopped).name}: stopped at step {self.step}")
        return stopped

    def report(self, norm, seconds):
        """Log the mean loss since the last report and the images per second; returns them in short."""
        total, number = self.descent.window.tolist()
        self.descent.window.zero_()
        bpd, rate, lr = nats_to_bits(total / number), self.args.batch_size / seconds, self.rate(self.step - 1)
        text = f"epoch {self.epoch} step {self.step} bpd {bpd:.4f} grad_norm {norm:.4g} lr {lr:.3g} images/s {rate:.1f}"
        self.log.text(text)
        self.record("train", bpd=bpd, grad_norm=norm, lr=lr, images_per_s=rate)
        return f"{bpd:.3f} bits/dim, {rate:.1f} images/s"

    def record(self, kind, **numbers):
        where, when = {"epoch": self.epoch, "step": self.step}, {"seconds": self.seconds, "time": time.time()}
        self.log.record(kind=kind, **where, **numbers, **when)

    def test(self):
        """Bits per dimension of the whole test split, with the same dequantisation noise at every test. Raises
        UserError if it is not finite."""
        images, peers = self.dataset.test, self.peers
        self.flow.eval()
        values = bits_per_dim_of_all(self.flow, images, part=peers.rank, parts=peers.size, quiet=self.quiet)
        bad = first_nonfinite(peers.sum_(values))
        if bad is not None:
            self.fail("BPD of test images is", noisy_batch(self.flow, images, bad))
        self.flow.train()
        bpd, stderr = mean_and_stderr(values)
        result = f"bpd {bpd:.4f} +- {stderr:.4f} on {len(values):,} images"
        self.log.text(f"test: epoch {self.epoch} step {self.step} {result}")
        self.record("test", bpd=bpd, bpd_stderr=stderr, images=len(values))

    def plot(self):
        """Samples at T = 1, from the same latents every time."""
        if not self.folder:
            return
        self.flow.eval()
        images = self.flow.sample(GRID**2, 1.0, generator(self.args.seed, "plot", 0, self.device))
        self.flow.train()
        name = f"step{self.step}" if self.mid_epoch else f"epoch{self.epoch}"
        # Without parents: a run folder that was removed meanwhile is not made again.
        path = run_path(self.args, "_samples") / name
        try:
            figure = grid_figure(to_image(images).cpu(), GRID)
            self.log.text(f"samples: {save_figure(figure, path, ['.png'], parents=False, quiet=True)[0]}")
        except (FloatingPointError, UserError) as error:
            self.log.text(f"samples: none, {error}")

    def save(self, last=False):
        """Save the run's state; as `last.state` inside an epoch, or if `last`."""
        if not self.folder:
            return
        if last:  # no test has gone before
            self.stop_if_failed()
            if not torch.stack([parameter.isfinite().all() for parameter in self.flow.parameters()]).all():
                self.fail("weights are")
        self.log.sync()
        state = {
            "config": self.config,
            "epoch": self.step // self.batches.steps_per_epoch,  # finished ones
            "step": self.step,
            "mid_epoch": last or self.mid_epoch,
            "seconds": self.seconds,
            "machine": machine(self.device, self.peers.size),
            "model": self.flow.state_dict(),
            **self.descent.state(),
        }
        path = checkpoint.save_run(self.folder, state, self.args.keep_epoch)
        self.saved_step = self.step
        self.log.text(f"weights: {path}")

    def stop_if_failed(self):
        """Raises UserError with epoch, step and level if a loss or gradient was not finite."""
        failed = self.descent.failed_step.item()
        if failed < 0:
            return
        for rank in range(self.peers.size):
            batch = self.batches(failed, self.peers.rows(self.args.batch_size, rank))
            loss = nats_per_dim(self.flow, batch[0], noise=batch[1]).mean()
            loss.backward()
            if not loss.isfinite():
                break
        self.step = failed + 1
        self.fail("gradient is" if loss.isfinite() else "loss is", batch)

    def fail(self, what, batch=None):
        """Raises UserError with epoch, step and, for a batch of images and noise, the level that fails first."""
        where = f", {level_that_fails(self.flow, *batch)}" if batch else ""
        lr, norm = self.args.lr, self.args.clip_grad
        after = "nothing is saved, the last checkpoint is untouched. The same command stops here again: repeat it"
        after += f" with a smaller --lr ({lr:g} here) or --clip_grad ({norm:g}, 0 for no limit), or start a new run"
        after += " with another --out_infix, from weights of an earlier step with --init"
        raise UserError(f"epoch {self.epoch}, step {self.step}: {what} not finite{where}; {after}")


def export(args):
    """Write the weights and configuration of the run's newest checkpoint to --export."""
    path, state = newest(args, advice="")
    if Path(args.export).resolve().parent == path.resolve().parent:
        raise UserError(f"--export {args.export}: is in the folder of the run's own checkpoints, name another")
    if state["config"]["data"] == "folder" and "data_path" in state["config"]:  # exports have none
        state["config"]["folder"] = Path(state["config"]["data_path"]).absolute().name
    state["config"] = {name: value for name, value in state["config"].items() if name not in PLACES}
    Path(args.export).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(args.export, checkpoint.slim(state))
    print(f"{path} without the optimiser's state, step {state['step']}: {args.export}")


def main(argv=None):
    args = get_args(argv)
    if args.export:
        return export(args)
    need_path(args.data, args)
    if args.gpus and not is_torchelastic_launched():
        return launch(args.gpus, sys.argv[1:] if argv is None else argv)
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
    script(main)
