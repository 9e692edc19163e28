"""Inpainting: the causal cone against the whole flow, its cost, its independence of what was corrupted; the script."""

import json
import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import small
from PIL import Image
from runs import SMALL, flags_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inpaint
import main
from args import get_args
from flow import RGFlow
from flow.hierarchy import inference_cone
from flow.inpaint import CausalCone, Stop, WholeFlow, maximise, psnr, random_latents
from utils.checkpoint import read, save
from utils.cli import UserError


def rectangle(L, row, column, height, width):
    region = torch.zeros(L, L, dtype=torch.bool)
    region[row : row + height, column : column + width] = True
    return region


@pytest.mark.parametrize("share, growth", [(0, 324), (0.5, 576)])  # at the origin, in the centre
def test_latents_per_doubling_of_the_image(share, growth):
    regions = [rectangle(L, *[int(share * (L - 10))] * 2, 10, 10) for L in (64, 128, 256, 512, 1024)]
    assert np.diff([3 * int(inference_cone(region, 4).sum()) for region in regions]).tolist() == [growth] * 4


@pytest.mark.parametrize("L, start, n", [(32, 0, 48), (32, 11, 60), (256, 0, 87), (256, 123, 135)])
def test_an_evaluation_takes_the_blocks_of_the_cone_once_in_each_direction(L, start, n):
    flow = small(L=L)
    problem = CausalCone(flow, torch.randn(2, 3, L, L), rectangle(L, start, start, 10, 10).expand(2, L, L))
    patches = {"forward": 0, "inverse": 0}

    def counted(function, direction, blocks):
        patches[direction] += len(blocks)
        return function(blocks)

    for bijector, direction in product([*flow.disentanglers, *flow.decimators], patches):
        setattr(bijector, direction, partial(counted, getattr(bijector, direction), direction))
    problem.log_prob(torch.randn(len(problem.free)))
    assert patches == dict.fromkeys(patches, problem.num_blocks) and problem.num_blocks == 2 * n


class LargestResult(TorchDispatchMode):
    """Records the size of the largest tensor, no view, that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(each.alias_info for each in function._schema.returns):
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.largest = max(self.largest, *map(torch.numel, tensors), 0)
        return result


def test_no_step_touches_an_array_of_the_images_size():
    flow, L, largest = small(L=64, nchannels=1, nhidden=4), 64, []
    x, region = torch.randn(1, 1, L, L), rectangle(L, 2, 30, 4, 4)[None]
    cone = CausalCone(flow, x, region)
    for problem in (cone, WholeFlow(flow, x, region, cone.free)):
        values = torch.randn(len(cone.free)).requires_grad_()
        with LargestResult() as mode:
            problem.log_prob(values).sum().backward()
        largest.append(mode.largest)
    assert largest[0] < L * L / 4 and largest[1] >= L * L, largest


def corners(L):
    return rectangle(L, 0, 0, L, L) & ~rectangle(L, 1, 0, L - 2, L) & ~rectangle(L, 0, 1, L, L - 2)


def all_kinds(L):
    """Regions at the origin, inside, at the last column, of everything, at the corners and of scattered pixels."""
    sizes = (0, 0, 3, 4), (L // 2 - 1, L // 4, 3, 2), (0, L - 1, L, 1), (0, 0, L, L)
    scattered = rectangle(L, L // 2, 1, 1, 1) | (torch.rand(L, L) < 3 / L**2)
    return torch.stack([*(rectangle(L, *each) for each in sizes), corners(L), scattered])


KINDS = [{}, {"L": 32, "nlayers": 2}, {"prior": "gaussian", "nchannels": 1}, {"share_levels": True}, {"L": 4}]
KINDS += [{"kernel_size": 2}, {"L": 12, "kernel_size": 6}, {"L": 8, "subnet": "ar", "nchannels": 1}]
KINDS += [{"subnet": "spline"}, {"subnet": "spline_lu"}]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_causal_cone_equals_whole_flow(settings):
    """Value, gradient and pasted image, with another region in each image; and both equal decoding, pasting and
    encoding written out."""
    flow = small(**settings)
    L, C, regions = flow.L, flow.nchannels, all_kinds(flow.L)
    x = torch.randn(len(regions), C, L, L)
    cone = CausalCone(flow, x, regions)
    expected = torch.stack([inference_cone(region, flow.kernel_size).expand(C, L, L) for region in regions])
    assert torch.equal(cone.free.sort().values, expected.flatten().nonzero()[:, 0])
    values = torch.randn(len(cone.free)).requires_grad_()
    results = []
    for problem in (cone, WholeFlow(flow, x, regions, cone.free)):
        log_prob = problem.log_prob(values)
        weighted = log_prob @ torch.arange(1.0, 1 + len(x))
        results.append((log_prob, problem.paste(values), torch.autograd.grad(weighted, values)[0]))
    z = flow(x)[0]
    z.view(-1)[cone.free] = values.detach()
    pasted = torch.where(regions[:, None], flow.inverse(z)[0], x)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[0][:2], (flow.log_prob(pasted), pasted), rtol=1e-10, atol=1e-10)
    known = ~regions[:, None].expand_as(x)
    assert torch.equal(cone.paste(values)[known], x[known])


def test_the_result_depends_on_the_fill_only_if_some_latents_of_the_cone_are_fixed():
    flow = small()
    x, region = torch.randn(2, 3, 16, 16), rectangle(16, 5, 13, 4, 3).expand(2, 16, 16)
    free = CausalCone(flow, x, region).free
    chosen = random_latents([len(free) // 2] * 2, x[0].numel(), [torch.Generator().manual_seed(k) for k in (1, 2)])
    fills = [torch.where(region[:, None], fill, x) for fill in (torch.zeros_like(x), torch.randn_like(x))]
    for name, kind, *latents in (("cone", CausalCone), ("all", WholeFlow, free), ("random", WholeFlow, chosen)):
        found = []
        for filled in fills:
            problem = kind(flow, filled, region, *latents)
            values, log_prob, _ = maximise(problem, 0.05, 5, 3, torch.Generator().manual_seed(1))
            found.append((problem.paste(values), log_prob))
        moved = max((ours - theirs).abs().max().item() for ours, theirs in zip(*found, strict=True))
        assert moved > 1e-3 if name == "random" else moved < 1e-9, name


@pytest.mark.parametrize("kind", [CausalCone, lambda *parts: WholeFlow(*parts, CausalCone(*parts).free)])
def test_maximise_finds_the_mode_of_the_identity(kind):
    """For the untrained flow, the identity, it is 0 in the region."""
    flow = RGFlow(1, 8, nlayers=1, nresblocks=1, nmlp=1, nhidden=4, prior="gaussian").eval().requires_grad_(False)
    x, regions = torch.randn(2, 1, 8, 8), torch.stack((rectangle(8, 6, 0, 2, 3), corners(8)))
    problem = kind(flow, x, regions)
    values, log_prob, start = maximise(problem, 0.05, 400, 20, torch.Generator().manual_seed(0))
    known = x.masked_fill(regions[:, None], 0)
    best = torch.distributions.Normal(0.0, 1.0).log_prob(known).sum((1, 2, 3))
    torch.testing.assert_close(log_prob, best, rtol=0, atol=1e-6)
    torch.testing.assert_close(problem.paste(values), known, rtol=0, atol=1e-3)
    assert (start < log_prob - 0.1).all()


def test_maximise_starts_at_the_best_draw_of_each_image_and_keeps_the_best_values():
    flow, regions = small(), torch.stack((rectangle(16, 0, 0, 3, 3), rectangle(16, 8, 8, 2, 5)))
    problem = CausalCone(flow, torch.randn(2, 3, 16, 16), regions)
    generator = torch.Generator().manual_seed(3)
    drawn = [flow.prior.sample(torch.empty(len(problem.free)), 1.0, generator) for _ in range(6)]
    each = torch.stack([problem.log_prob(values) for values in drawn])
    calls, generator = [], torch.Generator().manual_seed(3)
    # A rate at which Adam leaves for good.
    values, log_prob, start = maximise(problem, 1e3, 2, 6, generator, lambda: calls.append(None))
    torch.testing.assert_close(start, each.amax(0))
    torch.testing.assert_close(log_prob, start)
    torch.testing.assert_close(problem.log_prob(values), log_prob)
    assert len(calls) == 6 + 2 + 1


@pytest.mark.parametrize("number", [1, 4, 9])  # in the draws, at their end, in the steps
def test_maximise_can_be_stopped(number):
    """It returns the best values so far."""
    calls = []

    def stop():
        calls.append(None)
        if len(calls) == number:
            raise Stop

    problem = CausalCone(small(), torch.randn(2, 3, 16, 16), rectangle(16, 0, 0, 3, 3).expand(2, 16, 16))
    stopped = maximise(problem, 0.05, 20, 4, torch.Generator().manual_seed(3), stop)
    steps = max(0, number - 4)
    whole = maximise(problem, 0.05, steps, min(number, 4), torch.Generator().manual_seed(3))
    assert len(calls) == number
    torch.testing.assert_close(stopped[2], whole[2])
    assert (stopped[1] >= stopped[2]).all() and (stopped[1] <= whole[1]).all()
    torch.testing.assert_close(problem.log_prob(stopped[0]), stopped[1])


def test_random_latents_are_different_ones_of_each_image_and_seed():
    free = random_latents([5, 48, 0], 48, [torch.Generator().manual_seed(seed) for seed in range(3)])
    assert len(free.unique()) == len(free)
    assert (free // 48).bincount(minlength=3).tolist() == [5, 48, 0]

    def drawn(seed, *names):
        x, regions = torch.zeros(len(names), 3, 8, 8), rectangle(8, 0, 0, 2, 2).expand(len(names), 8, 8)
        return inpaint.make_problem("realnvp_constrained", small(L=8), 4, seed, names, x, regions).free % x[0].numel()

    one, other = drawn(0, 5, 7).chunk(2)  # of images 5 and 7
    assert torch.equal(drawn(0, 7), other) and not torch.equal(one, other) and not torch.equal(drawn(1, 7), other)


def test_psnr():
    truth = torch.full((2, 3, 4, 4), 0.5)
    images, region = truth.clone(), rectangle(4, 0, 0, 1, 2).expand(2, 4, 4)
    images[0, :, 0, 0] += 0.1
    images[1, 0, 0, 0] += 0.3
    for regions, pixels in ((None, 16), (region, 2)):
        expected = [-10 * math.log10(square / pixels) for square in (0.01, 0.03)]
        assert psnr(images, truth, regions).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory):
    """Checkpoints of a tiny RG-Flow and a tiny Real NVP on 16 x 16 images."""
    torch.set_default_dtype(torch.float64)
    folder, files = tmp_path_factory.mktemp("weights"), []
    for model in ("--model rgflow", "--model realnvp --nmlp 2"):
        run = main.Run(get_args(flags_of(images, folder, f"--L 16 {model} --max_steps 3")))
        run.train()
        files.append(str(run.folder / "last.state"))
    return files


@pytest.fixture
def run_script(weights, images, tmp_path, monkeypatch):
    """Run the script with flags on the weights; returns the record."""
    monkeypatch.chdir(tmp_path)

    def run_script(*flags, source=("--weights", weights[0])):
        inputs = [] if "--files" in flags else ["--images", 4, "--data_path", images]
        inputs += [] if "--mask" in flags else ["--region", "3,4"]
        own = [] if "--bench" in source else [*inputs, "--draws", 2, "--steps", 2]
        inpaint.main([str(each) for each in (*own, "--json", "out.json", *source, *flags)])
        return json.loads(Path("out.json").read_text())

    return run_script


def test_script_on_test_images(run_script, weights):
    """Real NVP gets as many random latents as RG-Flow, and all."""
    record = run_script("--batch_size", 3, "--realnvp", weights[1])
    results = record["results"]
    assert (record["kind"], record["step"]) == ("inpainting", 3)
    assert [each["method"] for each in results] == ["rgflow", "realnvp_constrained", "realnvp"]
    assert [each["weights"] for each in results] == [weights[0], weights[1], weights[1]]
    assert [each["config"]["model"] for each in results[::2]] == ["rgflow", "realnvp"]
    for each in results:
        assert (each["images"], each["steps"], each["region"]) == (4, 2, results[0]["region"])
    regions = [rectangle(16, *corners) for corners in results[0]["region"]]
    assert all(region.sum() == 12 for region in regions) and len(torch.stack(regions).unique(dim=0)) > 1
    rgflow, constrained, free = (each["per_image"] for each in results)
    assert rgflow["free_latents"] == [3 * int(inference_cone(region, 4).sum()) for region in regions]
    assert constrained["free_latents"] == rgflow["free_latents"] and max(rgflow["free_latents"]) < 768
    assert free["free_latents"] == [768] * 4 and constrained["psnr_region"] != free["psnr_region"]
    assert rgflow["psnr_image"] == pytest.approx(np.array(rgflow["psnr_region"]) + 10 * math.log10(256 / 12))
    assert results[0]["psnr_image"] == pytest.approx(np.mean(rgflow["psnr_image"]))
    assert {path.suffix for path in Path("figures").iterdir()} == {".png", ".pdf"}
    alone = run_script("--batch_size", 3, "--weights", weights[1])["results"]
    assert [each["per_image"] for each in alone] == [constrained, free]
    flags_of_training = f"--data folder -o {Path(weights[0]).parents[3]} {SMALL} --L 16".split()
    again = run_script("--batch_size", 3, source=flags_of_training)
    assert again["results"][0]["per_image"] == rgflow and again["weights"] == weights[0]
    for flag, names in (("2", [0, 1]), ("5,2", [5, 2]), ("3,", [3])):
        assert run_script("--images", flag)["results"][0]["names"] == names
    state = read(weights[1])
    save("other.state", {**state, "config": {**state["config"], "data": "msds2"}})
    with pytest.raises(UserError, match=r"--realnvp other\.state: trained on msds2, must be folder as for --weights"):
        run_script("--realnvp", "other.state")
    results = run_script("--realnvp", "other.state", "--data", "folder")["results"]
    assert ["trained_data" in each["config"] for each in results] == [False, True, True]
    save("other.state", {**state, "config": {**state["config"], "fingerprint": "another"}})
    record = run_script("--realnvp", "other.state")
    names = [each["row"].partition(", ")[0] for each in record["rows"]]
    assert names == ["RG-Flow", *(f"{each} (trained on other images)" for each in ("Constrained Real NVP", "Real NVP"))]
    assert len(record["warnings"]) == 1
    for one, other, words in ((0, 0, "must be a Real NVP, is an RG-Flow"), (1, 1, "is a Real NVP itself")):
        with pytest.raises(UserError, match=f"--realnvp .*: .*{words}"):
            run_script("--weights", weights[one], "--realnvp", weights[other])


def test_known_pixels_of_files_come_back_unchanged(run_script, weights):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16, 3), dtype=np.uint8)
    mask[2:4, 5, 2] = 255
    for name, array in (("0", pixels[0]), ("1", pixels[1]), ("mask", mask)):
        Image.fromarray(array).save(f"{name}.png")
    flags = ["--files", "0.png", "1.png", "--mask", "mask.png", "--fig_dir", "out", "--realnvp", weights[1]]
    for result in run_script(*flags)["results"]:
        assert (result["names"], result["region"]) == (["0.png", "1.png"], "mask.png")
    for k in (0, 1):
        back = [np.asarray(Image.open(path)) for path in Path("out").glob(f"*_{k}_{k}.png")]
        assert len(back) == 3
        assert all(np.array_equal((image != pixels[k]).any(-1), mask.any(-1)) for image in back)


def test_files_of_another_size_are_resized(run_script):
    Image.new("RGB", (20, 10), (9, 9, 9)).save("wide.png")
    thin = np.zeros((800, 800), dtype=np.uint8)
    thin[275, 199:201] = 255  # a 2,500th of each of two output pixels
    Image.fromarray(thin).save("thin.png")
    (result,) = run_script("--files", "wide.png", "--mask", "thin.png", "--resize")["results"]
    assert result["free_latents"] == 3 * int(inference_cone(rectangle(16, 5, 3, 1, 2), 4).sum())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--region 0,4", "--region: 0,4: no pixel is corrupted"),
        ("--region 1,2,3", "--region: 1,2,3: must be height,width or row"),
        *((f"--region {each}", f"{each}: must lie inside the image of 16x16 pixels") for each in ("14,0,3,3", "3,17")),
        *((f"--images {each}", "--images: 6: the test split has 6 images") for each in ("7", "6,")),
        ("--images 0", "--images: '0': must be a whole number of at least 1"),
        ("--bench", "--weights: has no effect with --bench"),
        ("--nhidden 4", "unrecognized arguments: --nhidden 4"),
        *((f"{flag} wide.png", "wide.png: 20x10 pixels, must be 16x16; --resize") for flag in ("--files", "--mask")),
        *((f"{flag} missing.png", "missing.png: no readable image") for flag in ("--files", "--mask")),
        ("--mask black.png", "black.png: no pixel is corrupted"),
        (f"--mask {__file__}", "no readable image"),
    ],
)
def test_flags_that_do_not_fit(run_script, flags, words, capsys):
    Image.new("RGB", (20, 10)).save("wide.png")
    Image.new("L", (16, 16)).save("black.png")
    with pytest.raises((SystemExit, UserError)) as error:
        run_script(*flags.split())
    assert words in str(error.value) + capsys.readouterr().err


def test_benchmark(run_script):
    network = ["--bench", "--nlayers", "1", "--nresblocks", "1", "--nmlp", "1", "--nhidden", "4"]
    record = run_script("--repeats", 1, "--edges", "16,32", source=network)
    assert (record["kind"], record["network"]) == ("inpainting_speed", "laplace_nl1_nr1_nm1_nh4")
    found = {(row["L"], row["place"]): row for row in record["results"]}
    assert (found[32, "centre"]["cone_blocks"], found[32, "centre"]["whole_blocks"]) == (60, 170)
    assert found[32, "origin"]["free_latents"] == 1092
    assert all(row["cone_seconds"] > 0 and row["whole_seconds"] > 0 for row in found.values())
    assert [row["L"] for row in record["latents"]][::2] == [16, 32, 64, 128, 256, 512]
    assert len(list(Path("figures").glob("inpaint_speed_*.pdf"))) == 1
    with pytest.raises(UserError, match="--edges: 8: must be at least 10"):
        run_script("--edges", 8, source=network)
