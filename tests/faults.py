#!/usr/bin/env python3
"""Do to runs what happens to them on shared machines, and count how they take it.

    OMP_NUM_THREADS=1 python tests/faults.py                 everything, as in docs/reliability.md
    OMP_NUM_THREADS=1 python tests/faults.py kill flips -n 5

Each case is a process of its own. Allowed are a run that is as it should be and an error of one sentence; a traceback,
a hang, a damaged result or a file outside the output and data folders ends the script with status 1.
"""

import argparse
import builtins
import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - what a run imports on its way: once here, not in each child
import torch
import torch._dynamo
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import SMALL, make_images

import args as flags
import main
from data import open_dataset
from utils import checkpoint, cli
from utils.cli import UserError
from utils.logging import read_records

HANG = 60  # seconds
SIZES = ["--nlayers", "--nresblocks", "--nmlp", "--nhidden", "--L", "--kernel_size"]
RUN = "--epoch 8 --print_step 3 --keep_epoch 3 --save_minutes 1e-9 --plot_epoch 4"  # 40 steps, a save after each


class Attempt:
    """A function run in a child process: `status`, negative for a signal, `text` it wrote, `peak` bytes of memory."""

    def __init__(self, work, kill=None, number=signal.SIGKILL, when=None):
        """kill: seconds after which, and once `when()` is true, the child gets the signal `number`."""
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                self._run(work, output)
            deadline, self.hung = time.monotonic() + HANG, False
            if kill is not None:
                time.sleep(kill)
                while when and not when() and time.monotonic() < deadline:
                    pass
                os.kill(child, number)
            while True:
                done, status, usage = os.wait4(child, os.WNOHANG)
                if done:
                    break
                if time.monotonic() > deadline:
                    self.hung = True
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.001)
            output.seek(0)
            self.text = output.read()
        self.status, self.peak = os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss

    @staticmethod
    def _run(work, output):
        code = 0
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            cli.script(work)
        except SystemExit as stop:
            code = stop.code or 0
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def outcome(self):
        """In words; those that start with BAD are not allowed."""
        if self.hung:
            return "BAD: hang"
        if "Traceback" in self.text or self.status == 70:
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
        self.images = folder / "images"
        make_images(self.images)
        self.whole = self.train(folder / "whole")
        self.seconds, self.end = self.timed(folder / "timed"), self.state(folder / "whole")

    def argv(self, out, extra=""):
        return f"--data folder --data_path {self.images} -o {out} {SMALL} {RUN} {extra}".split()

    def train(self, out, extra="", prepare=None, **how):
        def work():
            if prepare:
                prepare()
            main.main(self.argv(out, extra))

        return Attempt(work, **how)

    def timed(self, out):
        start = time.monotonic()
        self.train(out)
        return time.monotonic() - start

    @staticmethod
    def saves(out):
        return out / "folder" / "laplace_nl1_nr1_nm1_nh8" / "out_save"

    def state(self, out):
        """The final state and records without times, to compare."""
        _, state, _ = checkpoint.newest(self.saves(out), full=True)
        records = read_records(self.saves(out).parent / "out.jsonl")
        kept = [{k: v for k, v in each.items() if k not in ("time", "images_per_s", "seconds")} for each in records]
        files = sorted((path.name, checkpoint.holds_optimizer(path)) for path in self.saves(out).iterdir())
        return {**state, "config": None, "seconds": None, "records": kept, "files": files}

    def finish(self, out, how, extra="", end=None):
        """How a run ends that is started again after a fault."""
        again = self.train(out, extra)
        if again.status:
            return f"BAD: {how}, then {again.outcome}"
        equal = same(self.state(out), end or self.end)
        return f"{how}; started again: ends bit for bit as an undisturbed run" if equal else f"BAD: {how}, then differs"

    def kill(self):
        """SIGKILL, many in one run"""
        out, during, long = self.folder / "kill", 0, f"--epoch {12 * (self.number or 20)}"
        self.train(self.folder / "unkilled", long)
        for k in range(self.number or 20):
            when = (lambda: (self.saves(out) / ".last.state.tmp").exists()) if k % 3 == 0 else None
            attempt = self.train(out, long, kill=self.random.uniform(0.1, 0.7) * self.seconds, when=when)
            during += any(self.saves(out).glob(".*.tmp"))
            if attempt.status >= 0:
                yield f"BAD: {attempt.outcome} before the signal"
        how = f"killed {self.number or 20} times, {during} of them during a save"
        yield self.finish(out, how, long, self.state(self.folder / "unkilled"))

    def signals(self):
        """SIGTERM, SIGINT, SIGUSR1 at random moments"""
        for k in range(self.number or 30):
            out = self.folder / f"signal{k}"
            number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            attempt = self.train(out, kill=self.random.uniform(0, 1) * self.seconds, number=number)
            how = attempt.outcome
            if attempt.status > 128 and not any(self.saves(out).glob("*.state")):
                how = how.replace("saved and ended", "ended before training")
            yield self.finish(out, how)

    def space(self):
        """No space left (ENOSPC) after a random number of bytes written by checkpoints, logs, figures, arrays"""
        total = 2_000_000
        for k in range(self.number or 40):
            out, images = self.folder / f"space{k}", self.folder / f"images{k}"
            shutil.copytree(self.images, images, ignore=shutil.ignore_patterns("prepared_arrays"))
            budget = int(total ** self.random.uniform(0.3, 1))
            attempt = self.train(out, f"--data_path {images}", prepare=lambda budget=budget: fill_disk(budget))
            yield self.finish(out, attempt.outcome)
            shutil.rmtree(images)

    def limit(self):
        """File-size limit (RLIMIT_FSIZE, SIGXFSZ) of a random size"""
        for k in range(self.number or 20):
            out, size = self.folder / f"limit{k}", self.random.randrange(100, 60_000)
            limits = (size, resource.RLIM_INFINITY)
            attempt = self.train(out, prepare=lambda limits=limits: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
            yield self.finish(out, attempt.outcome)

    def nan(self):
        """A weight that becomes NaN at a random step"""
        for k in range(self.number or 20):
            out, step = self.folder / f"nan{k}", self.random.randrange(40)
            attempt = self.train(out, prepare=lambda step=step: poison(step))
            if f"step {step + 1}: " not in attempt.text:
                yield f"BAD: step {step + 1} not named: {attempt.text}"
            yield self.finish(out, attempt.outcome)

    def two(self):
        """A second run on the folder of one that is running, a third when that has been killed"""
        for k in range(self.number or 10):
            out = self.folder / f"two{k}"
            first = os.fork()
            if first == 0:
                with open(os.devnull, "w") as nowhere:
                    # Kept files would be promised disk that a machine may lack: one is enough.
                    argv = self.argv(out, "--epoch 100000 --keep_epoch 100000")
                    Attempt._run(lambda argv=argv: main.main(argv), nowhere)
            deadline = time.monotonic() + HANG
            while not any(self.saves(out).glob("*.state")) and time.monotonic() < deadline:
                time.sleep(0.01)
            second = self.train(out)
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
            third = self.train(out)
            refused = "another process" in second.text and third.status == 0
            yield f"second {second.outcome}, third {third.outcome}" if refused else f"BAD: {second.text} {third.text}"

    def removed(self):
        """The output folder removed during the run"""
        for k in range(self.number or 10):
            out = self.folder / f"removed{k}"
            delay = self.random.uniform(0, 0.5) * self.seconds

            def remove(out=out, delay=delay):
                if os.fork() == 0:
                    deadline = time.monotonic() + HANG
                    while not any(self.saves(out).glob("*.state")) and time.monotonic() < deadline:
                        time.sleep(0.001)
                    time.sleep(delay)
                    while out.exists():  # files may appear while it is emptied
                        shutil.rmtree(out, ignore_errors=True)
                    os._exit(0)

            yield self.train(out, "--epoch 1000", prepare=remove).outcome

    def flips(self):
        """Single-bit flips in the checkpoint of a run"""
        path, copy = self.saves(self.folder / "whole") / "8.state", self.folder / "flipped.state"
        good, original = path.read_bytes(), checkpoint.read(path)
        for _ in range(self.number or 1000):
            bit = self.random.randrange(8 * len(good))
            content = bytearray(good)
            content[bit // 8] ^= 1 << bit % 8
            copy.write_bytes(content)
            yield read_damaged(copy, original)

    def garble(self):
        """1 to 64 random bytes in a row, anywhere in the checkpoint of a run or in its directory"""
        path, copy = self.saves(self.folder / "whole") / "8.state", self.folder / "garbled.state"
        good, original = path.read_bytes(), checkpoint.read(path)
        directory = good.index(b"PK\1\2")
        for k in range(self.number or 1000):
            start = self.random.randrange(directory if k % 2 else 0, len(good))
            piece = self.random.randbytes(self.random.randrange(1, 65))
            copy.write_bytes((good[:start] + piece + good[start + len(piece) :])[: len(good)])
            yield read_damaged(copy, original)

    def cuts(self):
        """Truncation of the checkpoint of a run"""
        path, copy = self.saves(self.folder / "whole") / "8.state", self.folder / "cut.state"
        good, original = path.read_bytes(), checkpoint.read(path)
        for _ in range(self.number or 300):
            copy.write_bytes(good[: self.random.randrange(len(good))])
            yield read_damaged(copy, original)

    def contents(self):
        """Well-formed checkpoints whose content is exchanged in one place, as newest file of a run"""
        path = self.saves(self.folder / "whole") / "8.state"
        junk = [None, -1, 10**30, "x", [], {}, {"a": 1}, 0.5, torch.zeros(3), b"x", [torch.zeros(2)], True]
        for k in range(self.number or 100):
            out = self.folder / "contents"
            shutil.rmtree(out, ignore_errors=True)
            self.saves(out).mkdir(parents=True)
            state = checkpoint.read(path)
            where = state
            while True:
                name = self.random.choice(list(where))
                if not isinstance(where[name], dict) or not where[name] or self.random.random() < 0.3:
                    break
                where = where[name]
            where[name] = self.random.choice(junk)
            state["epoch"], state["step"] = (
                (7, 35) if name not in ("epoch", "step") else (state["epoch"], state["step"])
            )
            torch.save(state, self.saves(out) / "7.state")
            yield self.train(out, f"--max_steps {36 + k % 3}").outcome

    def commands(self):
        """Random command lines"""
        names = [option for action in flags.build_parser("")._actions for option in action.option_strings]
        values = [
            "",
            "0",
            "-1",
            "1",
            "4",
            "8,6",
            "1e309",
            "nan",
            "folder",
            "rnvp",
            "ar",
            "float64",
            "é\0",
            "../..",
            "@",
        ]
        for k in range(self.number or 300):
            out = self.folder / "commands"
            argv = self.argv(out, "--max_steps 1 --no_stdout")
            for _ in range(self.random.randrange(1, 4)):
                argv.append(self.random.choice([*names, "--nothing", "extra"]))
                length = k % 3 if argv[-1] in SIZES else k % 7  # a large network is no fault
                text = "".join(self.random.choices("0123456789,.-+e@#'\"\\ \tinfaäß\U0001f600", k=length))
                argv += [self.random.choice([*values, text])] * self.random.randrange(2)
            yield self.somewhere(lambda argv=argv: main.main(argv))

    def argument_files(self):
        """Random argument files"""
        path = self.folder / "random.args"
        lines = [b"--lr 1e-3", b"--L 8", b"# x", b"--out_infix 'a", b"@" + os.fsencode(path), b"\xff\xfe", b"--epoch"]
        for _ in range(self.number or 200):
            content = self.random.choices([*lines, self.random.randbytes(20)], k=self.random.randrange(1, 5))
            path.write_bytes(b"\n".join(content))
            argv = [*self.argv(self.folder / "files"), f"@{path}", "--max_steps", "1", "--no_stdout"]
            yield self.somewhere(lambda argv=argv: main.main(argv))

    def pictures(self):
        """Damaged, cut and odd files in a folder of images"""
        kinds = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA"]
        for k in range(self.number or 60):
            folder = self.folder / f"pictures{k}"
            make_images(folder)
            for n in range(20):
                kind, mode = self.random.choice(kinds), self.random.choice(["RGB", "L"])
                buffer = io.BytesIO()
                Image.effect_noise((16, 16), 80).convert(mode).save(buffer, kind)
                content = bytearray(buffer.getvalue())
                for _ in range(self.random.randrange(6)):
                    content[self.random.randrange(len(content))] = self.random.randrange(256)
                if self.random.random() < 0.3:
                    del content[self.random.randrange(len(content)) :]
                (folder / "train" / f"odd{n}.{kind.lower()}").write_bytes(content)
            (folder / "train" / "bomb.png").write_bytes(png_bomb())
            yield self.somewhere(lambda folder=folder: open_dataset("folder", folder, 3, 8, progress=False))
            shutil.rmtree(folder)

    def archives(self):
        """CelebA archives with members that lead outside, bombs, cut, damaged or not archives at all"""
        for k in range(self.number or 100):
            root = self.folder / f"archives{k}"
            root.mkdir()
            (root / "list_eval_partition.txt").write_text("".join(f"{n:06}.jpg {n % 3}\n" for n in range(1, 7)))
            with zipfile.ZipFile(root / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                prefix = self.random.choice(["img_align_celeba/", "", "a/b/", "../", "/", "x/../../", "//etc/"])
                for n in range(1, 7):
                    buffer = io.BytesIO()
                    Image.effect_noise((178, 218), 80).convert("RGB").save(buffer, "JPEG")
                    with archive.open(f"{prefix}{n:06}.jpg", "w") as member:
                        member.write(buffer.getvalue())
                        for _ in range(300 if self.random.random() < 0.1 else 0):
                            member.write(bytes(10**6))
            content = bytearray((root / "img_align_celeba.zip").read_bytes())
            harm = self.random.choice(["none", "cut", "bytes", "page"])
            if harm == "cut":
                del content[self.random.randrange(len(content)) :]
            for _ in range(self.random.randrange(1, 30) if harm == "bytes" else 0):
                content[self.random.randrange(len(content))] = self.random.randrange(256)
                content[-self.random.randrange(1, 400)] = self.random.randrange(256)  # in its directory
            if harm == "page":
                content = b"<html><title>Google Drive - Quota exceeded</title></html>"
            (root / "img_align_celeba.zip").write_bytes(content)
            yield self.somewhere(lambda root=root: open_dataset("celeba32", root, 3, 32, progress=False))
            shutil.rmtree(root)

    def somewhere(self, work):
        """The outcome of `work`, which may write in `folder` only and take at most 1 GB more than this process has."""
        before = listing(self.folder)
        attempt = Attempt(lambda: (os.chdir(self.folder / "here"), work()))
        if listing(self.folder) != before:
            return "BAD: a file outside the output and data folders"
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return attempt.outcome if attempt.peak < own + 10**9 else f"BAD: {attempt.peak / 1e9:.1f} GB of memory"


def same(one, other):
    """Whether two states are equal bit for bit."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def read_damaged(path, original):
    try:
        state = checkpoint.read(path)
    except UserError:
        return "refused"
    except BaseException as error:
        return f"BAD: {type(error).__name__}"
    return "loads with identical content" if same(state, original) else "BAD: loads with other content"


def fill_disk(budget):
    """Let writes to files fail with ENOSPC once `budget` bytes have been written. In this process."""
    opened = builtins.open

    class File:
        left = budget

        def __init__(self, file):
            self.file = file

        def write(self, data):
            size = memoryview(data).nbytes if not isinstance(data, str) else len(data)
            File.left -= size
            if File.left < 0:
                raise OSError(28, os.strerror(28))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def limited(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return File(file) if set(mode) & set("wax+") else file

    builtins.open = io.open = limited


def poison(at):
    """Let a weight be NaN from step `at` on. In this process."""
    step = main.Run.train_step

    def train_step(run):
        if run.step == at:
            next(run.flow.parameters()).data.view(-1)[0] = float("nan")
        return step(run)

    main.Run.train_step = train_step


def png_bomb():
    """A PNG of 60,000 x 60,000 black pixels in 500 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def listing(folder):
    """Names beside a folder, beside the script and where the script runs."""
    return [sorted(os.listdir(each)) for each in (folder.parent, Path(__file__).parent, ".", "/")]


KINDS = "kill signals space limit nan two removed flips garble cuts contents commands argument_files pictures archives"


def run(kinds, number, seed):
    """Run the kinds of faults, print a table of outcomes; returns whether all were allowed."""
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "faults"
        (own / "here").mkdir(parents=True)
        faults = Faults(own, number, seed)
        print("| fault | cases | outcomes |\n|---|---|---|")
        for kind in kinds:
            method = getattr(faults, kind)
            counts = Counter(method())
            good &= not any(outcome.startswith("BAD") for outcome in counts)
            listed = "; ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            print(f"| {method.__doc__} | {sum(counts.values())} | {listed} |", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS.split(), help=f"some of {KINDS} (default: all)")
    parser.add_argument("-n", dest="number", type=int, default=0, help="cases of each kind (default: its own number)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(0 if run(given.kinds, given.number, given.seed) else 1)
