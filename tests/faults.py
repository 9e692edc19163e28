#!/usr/bin/env python3
"""Do to runs what happens to them on shared machines, and count how they take it.

    OMP_NUM_THREADS=1 python tests/faults.py                 everything, as in docs/reliability.md
    OMP_NUM_THREADS=1 python tests/faults.py kill garble -n 5

Each case is a process of its own. Allowed are a run that is as it should be and an error of one sentence; a traceback,
a hang, a damaged result or a file outside the output and data folders ends the script with status 1.
"""

import _pyio
import argparse
import builtins
import errno
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - imported by runs: once here, not in each child
import torch
import torch._dynamo
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import SMALL, make_images
from sets import opened
from test_checkpoint import same

import args as flags
import main
from utils import checkpoint, cli
from utils.cli import UserError
from utils.logging import read_records

HANG = 180  # seconds
SIZES = ["--nlayers", "--nresblocks", "--nmlp", "--nhidden", "--L", "--kernel_size"]
RUN = "--epoch 8 --print_step 3 --keep_epoch 3 --save_minutes 1e-9 --plot_epoch 4"  # 40 steps, a save after each
VALUES = ["", "0", "-1", "1", "4", "8,6", "1e309", "nan", "folder", "rnvp", "ar", "float64", "é\0", "../..", "@"]
JUNK = [None, -1, 10**30, "x", [], {}, {"a": 1}, 0.5, torch.zeros(3), b"x", [torch.zeros(2)], True]


class Attempt:
    """A function run in a child process: `status`, negative for a signal, and the `text` it wrote."""

    def __init__(self, work, kill=None, number=signal.SIGKILL, when=lambda: True):
        """kill: seconds after which, and once `when()` is true, the child gets the signal `number`."""

        def run():
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            cli.script(work)

        with tempfile.TemporaryFile("w+") as output:
            child = get_context("fork").Process(target=run)
            deadline = time.monotonic() + HANG
            child.start()
            if kill is not None:
                time.sleep(kill)
                while not when() and time.monotonic() < deadline:
                    pass
                os.kill(child.pid, number)
            child.join(max(0, deadline - time.monotonic()))
            self.hung = child.exitcode is None
            child.kill()
            child.join()
            output.seek(0)
            self.text, self.status = output.read(), child.exitcode

    @property
    def outcome(self):
        """In words; those that start with BAD are not allowed."""
        if self.hung:
            return "BAD: hang"
        if "Traceback" in self.text:
            return f"BAD: traceback {self.text.splitlines()[-1]}"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        if self.status == 0:
            return "done"
        if self.status > 128:
            return f"saved and ended after {signal.Signals(self.status - 128).name}"
        errors = [line for line in self.text.splitlines() if "error: " in line]
        return f"one sentence, status {self.status}" if len(errors) == 1 else f"BAD: status {self.status}"


class Faults:
    """The cases, each a method that yields outcomes. folder: where they may write."""

    def __init__(self, folder, number, seed):
        self.folder, self.number, self.random = folder, number, random.Random(seed)
        self.images, self.cases = folder / "images", count()
        make_images(self.images)
        self.train(folder / "whole")
        self.good = self.saves(folder / "whole") / "8.state"
        start = time.monotonic()
        self.train(folder / "timed")
        self.seconds = time.monotonic() - start

    def argv(self, out, extra=""):
        paths = f"--data_path {self.images} --prepared_path {self.folder / 'prepared'} -o {out}"
        return f"--data folder {paths} {SMALL} {RUN} {extra}".split()

    def train(self, out, extra="", prepare=lambda: None, **how):
        return Attempt(lambda: (prepare(), main.main(self.argv(out, extra))), **how)

    @staticmethod
    def saves(out):
        return out / "folder" / "laplace_nl1_nr1_nm1_nh8" / "out_save"

    def state(self, out):
        """The final state, and the records without times."""
        _, state, _ = checkpoint.newest(self.saves(out), full=True)
        records = read_records(self.saves(out).parent / "out.jsonl")
        kept = [{k: v for k, v in each.items() if k not in ("time", "images_per_s", "seconds")} for each in records]
        return {**state, "config": None, "seconds": None, "records": kept}

    def finish(self, out, how, extra="", like="whole"):
        """How a run ends that is started again after a fault, compared with the undisturbed one in the folder `like`.

        A file that the undisturbed run deletes may remain, where a process was killed just before.
        """
        again = self.train(out, extra)
        if again.status:
            return f"BAD: {how}, then {again.outcome}"
        like = self.folder / like
        here, there = ({path.name for path in self.saves(each).iterdir()} for each in (out, like))
        equal = same(self.state(out), self.state(like)) and there <= here
        return f"{how}; started again: ends bit for bit as an undisturbed run" if equal else f"BAD: {how}, then differs"

    def saved(self, out):
        return any(self.saves(out).glob("*.state"))

    def kill(self):
        """SIGKILL, many in one run"""
        out, during, times = self.folder / "kill", 0, self.number or 20
        long = f"--epoch {12 * times}"
        self.train(self.folder / "unkilled", long)
        for k in range(times):
            when = (lambda: any(self.saves(out).glob(".last.state*.tmp"))) if k % 3 == 0 else lambda: True
            attempt = self.train(out, long, kill=self.random.uniform(0.1, 0.7) * self.seconds, when=when)
            during += any(self.saves(out).glob(".*.tmp"))
            if attempt.status >= 0:
                yield f"BAD: {attempt.outcome} before the signal"
        how = f"killed {times} times, {during} of them during a save"
        yield self.finish(out, how, long, "unkilled")

    def signals(self):
        """SIGTERM, SIGINT, SIGUSR1 at random moments"""
        for out in self.folders(30):
            number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            attempt = self.train(out, kill=self.random.uniform(0, 1) * self.seconds, number=number)
            early = attempt.status > 128 and not self.saved(out)
            words = "ended before training" if early else "saved and ended"
            yield self.finish(out, attempt.outcome.replace("saved and ended", words))

    def disturbed(self, number, draw):
        """Runs with images of their own. draw() gives what to do in the process before, and what the run must say."""
        for out in self.folders(number):
            (prepare, words), images = draw(), out.with_name(f"{out.name}images")
            shutil.copytree(self.images, images, ignore=shutil.ignore_patterns("prepared_arrays"))
            attempt = self.train(out, f"--data_path {images}", prepare)
            yield self.finish(out, attempt.outcome if words in attempt.text else f"BAD: {words} not in {attempt.text}")
            shutil.rmtree(images)

    def space(self):
        """No space left (ENOSPC) after a random number of bytes written by checkpoints, logs, figures, arrays"""
        return self.disturbed(40, lambda: (partial(fill_disk, int(2_000_000 ** self.random.uniform(0.3, 1))), ""))

    def limit(self):
        """File-size limit (RLIMIT_FSIZE, SIGXFSZ) of a random size"""
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        return self.disturbed(20, lambda: (partial(limit, (self.random.randrange(100, 60_000), -1)), ""))

    def nan(self):
        """A weight that becomes NaN at a random step"""
        return self.disturbed(20, lambda: (partial(poison, step := self.random.randrange(40)), f"step {step + 1}: "))

    def removed(self):
        """The output folder removed during the run"""
        for out in self.folders(10):

            def remove(out=out):
                if not self.saved(out):
                    return False
                time.sleep(self.random.uniform(0, 0.5) * self.seconds)
                while out.exists():  # files may appear while it is emptied
                    shutil.rmtree(out, ignore_errors=True)
                return True

            yield self.train(out, "--epoch 1000", kill=0, number=0, when=remove).outcome  # 0: no signal

    def garble(self):
        """1 to 64 random bytes in a row, anywhere in the checkpoint of a run or in its directory"""
        content, original, path = self.good.read_bytes(), checkpoint.read(self.good), self.folder / "damaged.state"
        for k in range(self.number or 1000):
            start = self.random.randrange(content.index(b"PK\1\2") if k % 2 else 0, len(content))
            piece = self.random.randbytes(self.random.randrange(1, 65))[: len(content) - start]
            path.write_bytes(content[:start] + piece + content[start + len(piece) :])
            try:
                equal = same(checkpoint.read(path), original)
            except UserError:
                yield "refused"
            except Exception as error:
                yield f"BAD: {type(error).__name__}"
            else:
                yield "loads with identical content" if equal else "BAD: loads with other content"

    def contents(self):
        """Well-formed checkpoints whose content is exchanged in one place, as newest file of a run"""
        for k, out in enumerate(self.folders(100)):
            self.saves(out).mkdir(parents=True)
            where = state = checkpoint.read(self.good)
            name = self.random.choice(list(where))
            while isinstance(where[name], dict) and where[name] and self.random.random() >= 0.3:
                where = where[name]
                name = self.random.choice(list(where))
            where[name] = self.random.choice(JUNK)
            if name not in ("epoch", "step"):
                state.update(epoch=7, step=35)
            torch.save(state, self.saves(out) / "7.state")
            yield self.train(out, f"--max_steps {36 + k % 3}").outcome

    def commands(self):
        """Random command lines and argument files"""
        file = self.folder / "random.args"
        lines = [b"--lr 1e-3", b"--L 8", b"# x", b"--out_infix 'a", b"@" + os.fsencode(file), b"\xff\xfe", b"--epoch"]
        names = [option for action in flags.build_parser()._actions for option in action.option_strings]
        for k in range(self.number or 500):
            argv = self.argv(self.folder / "commands", "--max_steps 1 --no_stdout")
            content = self.random.choices([*lines, self.random.randbytes(20)], k=self.random.randrange(1, 5))
            file.write_bytes(b"\n".join(content))
            argv += [f"@{file}"] * (k % 2)
            for _ in range(0 if k % 2 else self.random.randrange(1, 4)):
                argv.append(self.random.choice([*names, "--nothing", "extra"]))
                length = k % 3 if argv[-1] in SIZES else k % 7  # a large network is no fault
                text = "".join(self.random.choices("0123456789,.-+e@#'\"\\ \tinfaäß\U0001f600", k=length))
                argv += [self.random.choice([*VALUES, text])] * self.random.randrange(2)
            yield self.somewhere(partial(main.main, argv))

    def pictures(self):
        """Damaged, cut and odd files in a folder of images"""
        kinds = ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "ico", "tga"]
        for folder in self.folders(60):
            make_images(folder)
            for n in range(20):
                path = folder / "train" / f"odd{n}.{self.random.choice(kinds)}"
                Image.effect_noise((16, 16), 80).convert(self.random.choice(["RGB", "L"])).save(path)
                content = bytearray(path.read_bytes())
                for _ in range(self.random.randrange(6)):
                    content[self.random.randrange(len(content))] = self.random.randrange(256)
                if self.random.random() < 0.3:
                    del content[self.random.randrange(len(content)) :]
                path.write_bytes(content)
            yield self.somewhere(partial(opened, "folder", folder, L=8))
            shutil.rmtree(folder)

    def folders(self, number):
        """A new folder for each of `number` cases, or of those that -n asks for."""
        return (self.folder / f"case{next(self.cases)}" for _ in range(self.number or number))

    def somewhere(self, work):
        """The outcome of `work`, which may write in `folder` only and take at most 1 GB more than this process has."""

        def peak_memory():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB

        def listing():
            """Names beside the folder, beside the script and where the script runs."""
            return [sorted(os.listdir(each)) for each in (self.folder.parent, Path(__file__).parent, ".", "/")]

        def within_limits():
            os.chdir(self.folder / "here")
            try:
                work()
            finally:
                if (peak := peak_memory()) > most:
                    print(f"Traceback: {peak:.1f} GB of memory")

        before, most = listing(), peak_memory() + 1
        outcome = Attempt(within_limits).outcome
        return outcome if listing() == before else "BAD: a file outside the output and data folders"


def fill_disk(budget):
    """Let writes to files fail with ENOSPC once `budget` bytes have been written. In this process."""

    class File(_pyio.FileIO):
        def write(self, data):
            nonlocal budget
            budget -= memoryview(data).nbytes
            if budget < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    _pyio.FileIO = File
    builtins.open = io.open = _pyio.open


def poison(at):
    """Let a weight be NaN from step `at` on. In this process."""
    rate = main.Run.rate  # called before each step

    def poisoned(run, step):
        if run.step == step == at:
            next(run.flow.parameters()).data.view(-1)[0] = float("nan")
        return rate(run, step)

    main.Run.rate = poisoned


KINDS = "kill signals space limit nan removed garble contents commands pictures"


def run():
    """Run kinds of faults and print a table of outcomes. Exits with status 1 if one was not allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS.split(), help=f"some of {KINDS} (default: all)")
    parser.add_argument("-n", dest="number", type=int, default=0, help="cases of each kind (default: its own number)")
    parser.add_argument("--seed", type=int, default=0)
    given, good = parser.parse_args(), True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "faults"
        (own / "here").mkdir(parents=True)
        faults = Faults(own, given.number, given.seed)
        print("| fault | cases | outcomes |\n|---|---|---|")
        for kind in given.kinds:
            method = getattr(faults, kind)
            counts = Counter(method())
            good &= not any(outcome.startswith("BAD") for outcome in counts)
            listed = "; ".join(f"{number} {outcome}" for outcome, number in counts.most_common())
            print(f"| {method.__doc__} | {sum(counts.values())} | {listed} |", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    run()
