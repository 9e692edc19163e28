"""The switches --compile, --amp and --grad_checkpoint change how a flow is computed, not what."""

import json
import weakref
from functools import cache, partial
from unittest.mock import MagicMock

import pytest
import torch
from checks import randomise
from runs import equal, records

import bench
from flow import RealNVP, RGFlow
from layers import PATCH_BIJECTORS
from layers.fold import ONE
from utils import optim
from utils.graphs import CapturedFunction
from utils.optim import why_not_compiled

TINY = "--data folder --L 8 --nchannels 1 --nlayers 1 --nresblocks 1 --nmlp 1 --nhidden 8"
NETWORKS = [*PATCH_BIJECTORS, "realnvp"]


def small(networks="rnvp", L=8):
    sizes = {"nchannels": 1, "L": L, "nlayers": 2, "nresblocks": 2, "nmlp": 1, "nhidden": 17}
    flow = RealNVP(**sizes) if networks == "realnvp" else RGFlow(**sizes, subnet=networks)
    return randomise(flow, 0.3).train().requires_grad_(True)


def gradients(flow, x):
    flow.zero_grad()
    loss = flow.log_prob(x).mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in flow.parameters())]


@pytest.mark.parametrize("networks", NETWORKS)
def test_recomputation_gives_the_same_gradients_with_less_memory(networks):
    flow, x = small(networks), torch.randn(5, 1, 8, 8)
    found = []
    for recompute in (False, True):
        flow.accelerate(recompute=recompute)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            flow.log_prob(x)
        found.append((gradients(flow, x), sum(saved)))
    (expected, before), (recomputed, after) = found
    assert equal(recomputed, expected) and after < 0.7 * before


# Each further size compiles anew. Inductor, the default, takes minutes for a spline; aot_eager traces it only.
@pytest.mark.parametrize(
    "networks, L, backend, wide",
    [
        ("rnvp", 8, "inductor", False),
        ("rnvp", 8, "inductor", True),
        ("ar", 4, "aot_eager", True),
        ("spline", 4, "aot_eager", True),
        ("realnvp", 4, "inductor", False),
    ],
)
def test_compiled_kernels_give_the_same_values_and_gradients(networks, L, backend, wide, monkeypatch):
    monkeypatch.setattr("layers.fold.wide_on", lambda device: wide)  # on GPUs only
    if reason := why_not_compiled("cpu"):
        pytest.skip(reason)
    compiled = cache(partial(torch.compile, dynamic=True, backend=backend))
    for module in ("networks", "fold"):
        monkeypatch.setattr(f"layers.{module}.compiled", compiled)
    # x asks for a gradient, as it does between couplings; otherwise the first one is compiled a second time.
    flow, x = small(networks, L), torch.randn(5, 1, L, L, requires_grad=True)
    expected, sample = gradients(flow, x), flow.inverse(x)[0].detach()
    for recompute in (False, True):
        flow.accelerate(compile=True, recompute=recompute)
        torch.testing.assert_close(gradients(flow, x), expected, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(flow.inverse(x)[0], sample, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_activation_of_what_carries_biases_is_1(dtype):
    one = torch.tensor(ONE, dtype=dtype).double()  # rounded, as a matrix has it
    assert abs(one / (1 + torch.exp(-one)) - 1) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("networks", NETWORKS)
def test_bfloat16_is_close_and_stays_inside_the_networks(networks):
    """Errors are medians over networks: some random ones multiply every rounding, those of rnvp too."""
    losses, errors = [], []
    for _ in range(9):
        flow, x = small(networks).float(), torch.randn(5, 1, 8, 8, dtype=torch.float32)
        expected, (z, _) = gradients(flow, x), flow(x)
        flow.accelerate(dtype=torch.bfloat16)
        loss, *grads = gradients(flow, x)
        assert loss != expected[0]  # it does compute otherwise
        losses.append(abs(loss / expected[0] - 1))
        ours, theirs = (torch.cat([gradient.flatten() for gradient in each]) for each in (grads, expected[1:]))
        errors.append((ours - theirs).norm() / theirs.norm())
    assert sorted(losses)[4] < 0.02 and sorted(errors)[4] < 0.1
    z_low, log_det = flow(x)
    assert z_low.dtype == log_det.dtype == torch.float32
    assert (flow.inverse(z_low)[0] - x).abs().median() < 1e-2 and (z_low - z).abs().median() < 2e-2
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in flow.parameters())
    assert list(flow.state_dict()) == list(small(networks).state_dict())


def test_training_in_bfloat16_follows_the_curve_of_float32_and_resumes_without(start):
    flags = "--dtype float32 --max_steps 60 --lr 5e-3 --nhidden 32 --nlayers 2 --save_epoch 0 --plot_epoch 0"
    curves = []
    for out, extra in (("a", ""), ("b", "--amp bf16"), ("c", "--grad_checkpoint")):
        curves.append([record["bpd"] for record in records(start(f"{flags} {extra}", out), "train")])
    assert curves[0][0] - curves[0][-1] > 1
    assert max(abs(one - other) for one, other in zip(*curves[:2], strict=True)) < 0.2  # rounding of single steps
    assert abs(sum(curves[0][-20:]) - sum(curves[1][-20:])) / 20 < 0.05
    assert curves[2] == curves[0]
    run = start(f"{flags} --max_steps 61", "b")
    assert run.step == 61 and "amp bf16 -> none" in run.log.text_path.read_text()
    assert start(f"{flags} --max_steps 61", "c").step == 61


def test_where_nothing_compiles_the_log_says_so_and_training_goes_on(monkeypatch, start):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(optim.torch, "compile", broken)
    text = start("--max_steps 2 --compile").log.text_path.read_text()
    assert "--compile is off: torch.compile does not work here (no compiler)" in text and "step 2" in text


def test_where_nothing_can_be_recorded_plain_calls_go_on(monkeypatch):
    """A stand-in for CUDA's streams and graphs, whose recording fails after the function has run."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    torch.cuda.graph().__exit__.side_effect = RuntimeError("not permitted when stream is capturing")
    captured = CapturedFunction(lambda x: 2 * x, torch.cuda.Stream())
    with pytest.warns(UserWarning, match="no CUDA graph"):
        results = [captured(torch.tensor(float(k))).item() for k in range(6)]
    assert results == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "flags, operations",
    [  # multiply-adds: networks, roles, two matrices, patches; Real NVP's by scale, weights and positions
        ("--batch_sizes 4,8 --profile", 4 * 2 * (8 * 8 + 8 * 8) * (4 + 1)),
        ("--model realnvp --nhidden 4 --batch_sizes 4", 9 * ((4 + 16 + 8) * 64 + 2 * (2 * 8 + 64 + 8 * 4) * 16)),
    ],
)
def test_bench(flags, operations, tmp_path, capsys):
    """The benchmark runs through, over the batch sizes; what it reports fits together."""
    bench.main([*TINY.split(), "--repeats", "2", *flags.split(), "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["batch_size"] for result in results] == [4, 8][: len(results)]
    for result in results:
        assert result["gflop_per_image"] == pytest.approx(2 * operations / 1e9)
        assert result["train_images_per_s"] == pytest.approx(1e3 * result["batch_size"] / result["ms_per_step"])
        rate = 3 * result["train_images_per_s"] * result["gflop_per_image"]
        assert result["train_mfu"] == pytest.approx(rate / result["matrix_gflop_per_s"])
        assert min(result["data_percent"], result["log_percent"], result["optimizer_percent"]) > 0
        profiled = {each["name"]: each["count"] for each in result.get("largest_kernels", ())}
        assert ("--profile" in flags) == (sum(profiled.values()) > 10) and result.get("kernels_per_step", 1e9) > 500
    assert "--profile" not in flags or "aten::bmm" in capsys.readouterr().out


def test_each_row_is_kept_and_leaves_no_memory_and_draws_from_no_global_generator(tmp_path, capsys, monkeypatch):
    flows, states = [], [torch.get_rng_state()]

    class Steps(bench.Steps):
        def __init__(self, args):
            assert all(flow() is None for flow in flows) and torch.equal(torch.get_rng_state(), states[-1])
            super().__init__(args)
            flows.append(weakref.ref(self.flow))
            states.append(torch.get_rng_state())

        def __call__(self):
            if self.args.batch_size == 8 and self.step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            if self.args.batch_size == 2:
                raise ValueError("a bug")
            return super().__call__()

    monkeypatch.setattr(bench, "Steps", Steps)
    with pytest.raises(ValueError, match="a bug"):
        bench.main([*f"{TINY} --batch_sizes 4,8,2 --repeats 1 --json".split(), str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result.get("error") for result in results] == [None, "out of memory"] and len(flows) == 3
    assert "    8  8  out of memory\n" in capsys.readouterr().out


def test_training_in_each_way_is_compared_with_the_cpu(tmp_path, monkeypatch):
    """A way that fails has an error, and the next ones go on."""
    train = bench.train

    def failing(*how):
        if how[3:5] == ("float64", "grad_checkpoint"):
            raise ValueError("broken\nat all")
        return train(*how)

    monkeypatch.setattr(bench, "train", failing)
    bench.main([*f"{TINY} --batch_size 4 --lr 1e-2 --exact 40 --json".split(), str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    double, broken, single, recomputed, low = record["results"]
    assert broken["error"] == "ValueError: broken at all" and {"python", "cuda", "cores"} <= set(record["versions"])
    ways = [f"{each['dtype']} {each['way']}" for each in (double, single, recomputed, low)]
    assert ways == ["float64 CPU", "float32 CPU", "float32 grad_checkpoint", "float32 bf16"]
    assert all(each["steps"] == [1, 10, 30, 40] and each["loss"][3] < each["loss"][0] - 0.1 for each in (double, low))
    assert double["loss"][0] == pytest.approx(single["loss"][0], abs=1e-3)
    for name in ("loss_difference", "weight_difference"):
        assert double[name] == single[name] == recomputed[name] == [0] * 4
        assert sorted(low["loss_difference"]) == low["loss_difference"] and 0 < low[name][3] < 0.1
    bench.main([*f"{TINY} --batch_size 4 --lr 1e-2 --exact 10 --json".split(), str(tmp_path / "out.json")])
    again = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert again["loss"] == double["loss"][:2]  # the same seed
