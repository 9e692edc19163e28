"""On a GPU, plain steps and CUDA graphs give what the CPU gives. Skipped where there is none."""

import copy
import json
from unittest.mock import Mock

import pytest
import torch
from checks import randomise
from runs import command, equal, flags_of, weights
from test_accelerate import TINY
from test_main import Twins, descend

import bench
from data.batches import Batches
from flow import RGFlow
from flow.evaluation import bits_per_dim_of_all
from flow.inpaint import CausalCone, maximise
from flow.latents import decode
from flow.preprocess import Loss
from utils.checkpoint import read
from utils.cli import UserError
from utils.distributed import Peers
from utils.graphs import CapturedFunction, side_stream
from utils.optim import Descent
from utils.random import generator

LAST = max(0, torch.cuda.device_count() - 1)  # of several GPUs: the first one is what PyTorch takes unasked
DEVICE, CUDA = f"cuda:{LAST}", f"--cuda {LAST}"
RUN = f"{CUDA} --save_epoch 0 --plot_epoch 0 --print_step 100 --max_steps"
STEPS = pytest.mark.parametrize("way", ["--no-compile", "--compile"], ids=["plain", "graph"])
# Ten times what docs/performance.md has after 30 steps: largest differences of losses and of weights.
LIMITS = {"tf32": (2e-3, 8e-2), "bf16": (6e-3, 1e-1), "float32": (2e-6, 3e-5), "float64": (6e-15, 4e-14)}
# Reads the loss from the device, which no recording allows. In a process of its own: what fails leaves traces there.
READING = """
import sys, args, main
args.why_not_compiled = lambda device: "switched off"
class Reading(main.Loss):
    def forward(self, *inputs):
        loss = super().forward(*inputs)
        loss.item()
        return loss
main.Loss = Reading
main.main(sys.argv[1:])
"""
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch):
    """Graphs are of plain kernels: compiled ones, in the first test, take half a minute."""
    monkeypatch.setattr("args.why_not_compiled", lambda device: "switched off")


def test_training_follows_the_cpu_in_every_way(tmp_path):
    sizes = "--data folder --L 16 --nlayers 2 --nresblocks 2 --nhidden 32 --batch_size 16 --lr 3e-3"
    bench.main([*f"{sizes} {CUDA} --exact 30 --json".split(), str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {"CPU", "plain", "graph", "graph compile", "graph bf16 compile"} <= {result["way"] for result in results}
    for result in results:
        assert "error" not in result and "no CUDA graph" not in str(result["warnings"]), result
        limits = next(LIMITS[name] for name in LIMITS if name in f"{result['way']} {result['dtype']}")
        differences = result["loss_difference"][-1], result["weight_difference"][-1]
        assert all(found <= limit for found, limit in zip(differences, limits, strict=True)), result


@STEPS
def test_a_step_that_is_not_finite_keeps_the_weights_of_the_step_before(way, start, new, monkeypatch):
    good, bad, draw = start(f"{RUN} 7 {way}", "good"), new(f"{RUN} 20 {way}", "bad"), Batches.__call__

    def broken(batches, step, *rows):
        images, noise = draw(batches, step, *rows)
        return images, noise * torch.nan if step == 7 else noise

    monkeypatch.setattr(Batches, "__call__", broken)
    with pytest.raises(UserError, match="step 8: loss is not finite, first at level h = 0"):
        bad.train()
    assert equal(weights(bad), weights(good))


@STEPS
def test_a_resumed_run_ends_with_the_same_bits(way, start):
    start(f"{RUN} 8 {way}", "parts")
    parts, whole = (start(f"{RUN} 16 {way}", out) for out in ("parts", "whole"))
    assert parts.step == 16 and equal(weights(parts), weights(whole))


@pytest.mark.parametrize("subnet", ["rnvp", "spline", "spline_lu"])
def test_likelihoods_samples_and_inpainting(subnet):
    flow = randomise(RGFlow(1, 8, nlayers=2, nresblocks=2, nmlp=1, nhidden=17, subnet=subnet), 0.3)
    x, regions, results = torch.randn(3, 1, 8, 8), torch.zeros(3, 8, 8, dtype=torch.bool), []
    regions[:, 2:5, 3:6] = True
    for device in ("cpu", DEVICE):
        own, source = copy.deepcopy(flow).to(device), generator(0, "prior")  # which is the CPU's
        own.prior.sample = lambda z, *_, source=source: torch.randn(z.shape, generator=source).to(z)
        problem = CausalCone(own, x.to(device), regions.to(device))
        values, *log_prob = maximise(problem, 0.1, steps=5, draws=3)
        results.append([own.log_prob(x.to(device)), own.sample(4), values, problem.paste(values), *log_prob])
        assert all(each.device.type == torch.device(device).type for each in results[-1])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("error:no CUDA graph")
def test_graphs_of_samples_and_likelihoods(monkeypatch):
    """Five whole batches and a smaller one."""
    flow = randomise(RGFlow(1, 8, nlayers=2, nresblocks=2, nmlp=1, nhidden=17), 0.3)
    z, images = torch.randn(43, 1, 8, 8), torch.randint(256, (43, 1, 8, 8), dtype=torch.uint8).numpy()
    monkeypatch.setattr("flow.evaluation.BATCH", 8)
    noise = Mock(side_effect=lambda shape, device, *_: torch.full(shape, 0.3, device=device))
    monkeypatch.setattr("flow.evaluation.dequantisation_noise", noise)
    results = []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(flow).to(device)
        results.append([decode(own, z.to(device)), bits_per_dim_of_all(own, images, quiet=True).cpu()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_graphs_that_come_and_go_leave_training_its_memory():
    """That of the products' workspaces, which no tensor holds."""
    flow = randomise(RGFlow(1, 8, nlayers=1, nresblocks=1, nhidden=9), 0.3).requires_grad_(True).to(DEVICE)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device=DEVICE)
    descent = Descent(Loss(flow), 0, 0, Peers(torch.device(DEVICE)), graph=True)
    for step in range(5):
        descent(step, 1e-2, images, torch.full(images.shape, 0.5, device=DEVICE))
    before = torch.cuda.memory_allocated(DEVICE)
    decode(flow, torch.zeros(40, 1, 8, 8, device=DEVICE))
    assert torch.cuda.memory_allocated(DEVICE) >= before


def test_several_processes_as_two_graphs():
    descended = descend(Peers(torch.device("cpu"))), descend(Twins(torch.device(DEVICE)), graph=True)
    torch.testing.assert_close(descended[0], [each.cpu() for each in descended[1]], rtol=1e-9, atol=1e-9)


def test_a_recording_that_fails_warns_and_training_goes_on(start, images, tmp_path):
    done = command("-c", READING, *flags_of(images, tmp_path / "reading", f"{RUN} 8 --compile"))
    (path,) = (tmp_path / "reading").rglob("*.state")
    assert "no CUDA graph" in done.stderr and done.returncode == 0, done.stderr
    plain = start(f"{RUN} 8 --no-compile", "plain")
    torch.testing.assert_close(read(path, DEVICE)["model"], plain.flow.state_dict(), rtol=1e-9, atol=1e-9)


def test_the_benchmark_counts_the_kernels_of_a_graph(tmp_path):
    flags = f"{TINY} {CUDA} --compile --profile --batch_size 4 --repeats 2 --json"
    bench.main([*flags.split(), str(tmp_path / "out.json")])
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["kernels_per_step"] > 100 and "aten::" not in str(result["largest_kernels"])
    assert result["warnings"] == ["--compile is off: torch.compile does not work here (switched off)"]


def test_the_report(tmp_path):
    file = tmp_path / "report.json"
    done = command("gpu_report.py", *f"{TINY} {CUDA} --no-compile --batch_size 4 --json".split(), file)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert not any("error" in result for part in record["parts"].values() for result in [part, *part["results"]])
    tables = [row["table"] for row in record["rows"]]
    assert (tables.count("speed"), tables.count("exactness")) == (4, 8) and "capability" in record["versions"]


def test_a_captured_function_does_what_the_plain_one_does():
    total = torch.zeros(3, device=DEVICE)

    def add(x, y):
        total.add_(x * y)
        return total.sum()

    captured = CapturedFunction(add, side_stream(DEVICE))
    for k in range(6):
        x = torch.full((3,), float(k), device=DEVICE)
        assert captured(x, x + 1).item() == k * (k + 1) * (k + 2)  # 3 times the sum of k (k + 1)
    assert captured.graph is not None
