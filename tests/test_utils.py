"""Logs, files, locks, signals, grids and seeds."""

import os
import re
import signal
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ENVIRONMENT, ROOT, command, process

from utils import cli
from utils.cli import UserError
from utils.files import lock, replacing
from utils.logging import RunLog, read_records
from utils.plotting import grid_figure, image_grid, save_animation, save_figure
from utils.random import derived_seed, generator
from utils.signals import StopSignals


def test_seeds_differ_by_seed_purpose_and_index():
    seeds = {derived_seed(seed, purpose, k) for seed in range(5) for purpose in ("a", "b") for k in range(100)}
    assert len(seeds) == 1000
    same, again = (torch.rand(3, generator=generator(1, "a", 2)) for _ in range(2))
    assert torch.equal(same, again)


def test_image_grid():
    images = np.array([0, 0.25, 0.5])[:, None, None, None] * np.ones((1, 16, 16))
    expected = np.ones((33, 33, 3))  # white lines, and white in place of a fourth image
    expected[:16, :16], expected[:16, 17:], expected[17:, :16] = 0, 0.25, 0.5
    assert (image_grid(images, 2) == expected).all()


@pytest.mark.parametrize("L, n, labels", [(8, 3, False), (64, 8, True), (256, 8, False), (32, 33, True)])
def test_pixels_of_a_picture_are_equal_squares_whatever_the_users_settings(L, n, labels, tmp_path):
    """Images of random pixels come back exactly, below labels too; the pictures carry a mark."""
    images = np.random.default_rng(0).integers(0, 2, (n * n, 1, L, L)) / 1.0
    rows, columns = [["a"] * n] * 2 if labels else [()] * 2
    with matplotlib.rc_context({"image.origin": "lower", "savefig.bbox": "tight", "text.usetex": True}):
        figure = grid_figure(images, n, rows=rows, columns=columns)
        picture, pdf = save_figure(figure, tmp_path / "a", quiet=True)
        animation = save_animation([figure, figure], tmp_path / "b", 0.1)
    grid = image_grid(images, n)[..., 0] * 255
    for path in (picture, animation):
        with Image.open(path) as opened:
            assert opened.info["Software" if path is picture else "comment"] in ("RG-Flow", b"RG-Flow")
            pixels = np.asarray(opened.convert("L"))
        times = pixels.shape[1] // grid.shape[1]
        squares = grid.repeat(times, 0).repeat(times, 1)
        assert times >= 1 and np.array_equal(pixels[-squares.shape[0] :, -squares.shape[1] :], squares)
    assert b"/Creator (RG-Flow)" in pdf.read_bytes()


def test_what_is_not_finite_or_too_large_is_not_drawn():
    images = np.zeros((3, 1, 4, 4))
    images[1, 0, 2, 2] = np.nan
    with pytest.raises(FloatingPointError, match=r"1 of 3 .* not finite, first number 1"):
        image_grid(images, 2)
    with pytest.raises(UserError, match="1020 x 2549745 pixels is too large"):
        save_figure(grid_figure(np.zeros((2000, 1, 4, 4)), 1), "picture")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "junk", "qtagg"])
def test_a_notebooks_backend_does_not_matter(backend):
    code = "import utils.plotting as p; p.save_figure(p.Figure(), 'x', endings=[])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, "MPLBACKEND": backend})
    assert done.returncode == 0


def test_a_log_is_cut_to_the_step_and_whole_lines(tmp_path, capsys):
    """Records that are beyond the step or no records go, the rest stays as it is, an unfinished line of prose ends."""
    log, path = RunLog(tmp_path / "out", stdout=True), tmp_path / "out.jsonl"
    log.text("hello")
    log.record(kind="train", step=1)
    log.record(kind="train", step=2)
    good = path.read_bytes()
    junk = [b"5\n", b"[1]\n", b'{"step": "x"}\n', b"\xff\xfe\n", bytes(100), b'{"step": 3}\n', b'\n{"step": 2']
    path.write_bytes(good + b"".join(junk))
    (tmp_path / "out.log").write_text("hello\nhal")
    RunLog(tmp_path / "out", stdout=False, step=2)
    assert path.read_bytes() == good
    assert [record["step"] for record in read_records(path)] == [1, 2]
    inode = path.stat().st_ino
    log = RunLog(tmp_path / "out", stdout=False, step=2)
    assert path.stat().st_ino == inode  # nothing to cut, nothing written
    log.text("next")
    log.sync()
    assert (tmp_path / "out.log").read_text() == "hello\nhal\nnext\n"
    assert capsys.readouterr().out == "hello\n"


def test_replacing(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        command("-c", f"import utils.files as f\nwith f.replacing({str(path)!r}) as file: file.write(b'other')")
        assert path.read_bytes() == b"other"
    with pytest.raises(ValueError), replacing(path) as file:
        file.write(b"half")
        raise ValueError
    for bad in (tmp_path / "none" / "a", path / "a", tmp_path):
        with pytest.raises(OSError) as caught, replacing(bad) as file:
            file.write(b"x")
        assert caught.value.filename == str(bad) and caught.value.strerror
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_lock(tmp_path):
    """Refused to other openings; released on closing and when the process that holds it is killed."""
    path = tmp_path / "a.lock"
    code = "import signal, sys; from utils.files import lock; held = lock(sys.argv[1]); print(1); signal.pause()"
    with lock(path), pytest.raises(BlockingIOError):
        lock(path)
    with process("-u", "-c", code, path) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(BlockingIOError):
            lock(path)
        holder.kill()
    lock(path).close()


def test_leave_on_signals():
    """Ends the process with 128 + the number; where that is swallowed, the next context knows."""
    head = "import os, signal; from utils.signals import StopSignals, leave_on_signals; leave_on_signals()\n"
    head += "try: os.kill(os.getpid(), signal.SIGTERM)\n"
    swallowed = "except: pass\nwith StopSignals() as stop: print(stop.number)"
    for code, status, text in (("finally: print('cleared up')", 143, "cleared up\n"), (swallowed, 0, "15\n")):
        done = command("-c", head + code)
        assert (done.returncode, done.stdout, done.stderr) == (status, text, "")


def test_stop_signals():
    numbers = signal.SIGUSR1, signal.SIGINT, signal.SIGTERM
    before = [*map(signal.getsignal, numbers)]
    with StopSignals() as stop:
        assert stop.number is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGUSR1
    assert [*map(signal.getsignal, numbers)] == before


def test_names_of_pictures():
    """Different for whatever determines a picture, equal in whatever order the flags come; a part of a file's name."""

    def name(*flags, **more):
        parser = cli.Parser("")
        for flag in ("--grid", "--range", "--mask"):
            parser.add_argument(flag)
        parser.add_argument("--fig_dir")
        path = cli.picture_path(parser.parse_args([*flags, "--fig_dir", "a b"]), "walk", "w,1.state", **more)
        assert str(path.parent) == "a b" and re.fullmatch(r"[A-Za-z0-9._+-]{1,120}", path.name)
        return path.name

    assert re.fullmatch(r"walk_w_1\.state_grid_2_3_mask_b\.png_[0-9a-f]{6}", name("--grid", "2,3", "--mask", "a/b.png"))
    assert name("--grid", "2", "--range=-1,2") == name("--range", "-1,2", "--grid", "2")
    flags = [(), ("--grid", "2"), ("--grid", "3"), ("--range", "2"), ("--mask", "b/m.png"), ("--mask", "c/m.png")]
    flags += [("--grid", "," * 300), ("--grid", "7" * 300), ("--grid", "7" * 301)]
    assert len({name(*each) for each in flags} | {name(key=1), name(key=2)}) == len(flags) + 2


@pytest.mark.parametrize("flag", ["--json", "--out"])
def test_outputs_that_cannot_be_written(tmp_path, flag, capsys):
    """Noticed at the start, also a name that is too long only for the file, and nothing is left behind."""
    parser = cli.Parser("")
    parser.add_argument(flag)
    for name, words in (("x" * 300, "too long"), ("x" * 250, "too long"), ("/", "Is a directory")):
        with pytest.raises(SystemExit):
            cli.check_output(parser, parser.parse_args([flag, f"{tmp_path}/{name}"]))
        assert words in capsys.readouterr().err
    cli.check_output(parser, parser.parse_args([flag, f"{tmp_path}/{'x' * 200}"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_terminals_that_lack_characters(encoding):
    done = command("plot_cones.py", "--help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "") and "--regions" in done.stdout


def test_a_reader_that_has_gone():
    """As `python tables.py results | head -1` has it."""
    reading, writing = os.pipe()
    os.close(reading)
    done = process("tables.py", "results", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.communicate()[1], done.returncode) == ("", 141)
    for closed in (">&-", "2>&-"):  # neither is needed
        assert subprocess.run(f"{sys.executable} tables.py results {closed}", shell=True, cwd=ROOT).returncode == 0
