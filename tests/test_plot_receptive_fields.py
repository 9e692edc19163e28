"""Receptive fields, which are strongest, and what figures show of them, against autograd's Jacobian; the scripts."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from checks import jacobian, randomise
from matplotlib import colormaps

import bench
import plot_receptive_fields as script
from args import build_parser, get_args
from flow import RealNVP
from flow.load import build, load
from plot_receptive_fields import Fields, choose_latents, draw_fields, draw_histogram, get_fields, pictures
from utils.cli import UserError
from utils.random import generator


def level(flow, i, j):
    """Of a latent position, by the definitions: zeros at the end of the binary i | j, or i xor j for Real NVP."""
    bits = i ^ j if isinstance(flow, RealNVP) else i | j
    return next((h for h in range(flow.num_levels - 1) if bits >> h & 1), flow.num_levels - 1)


@pytest.fixture
def compute(weights, tmp_path):
    """The receptive fields that a script with flags works with, and the flow."""

    def compute(name, flags=""):
        argv = ["--weights", weights[name], "--fig_dir", str(tmp_path), *flags.split()]
        args = get_args(argv, script.fields_parser())
        flow, config = load(weights[name])
        return get_fields(args, flow, config), flow

    return compute


def autograd_fields(flow, n, seed):
    """By latent (c, i, j): the mean over the script's draws of |dG / dz_l|, summed over colours, (C, L, L, L, L)."""
    C, L = flow.nchannels, flow.L
    z = flow.requires_grad_(False).sample_prior(n, 1.0, generator(seed, "receptive fields"))
    matrices = torch.stack([jacobian(lambda each: flow.inverse(each)[0], each[None]) for each in z])
    fields = matrices.abs().mean(0).reshape(C, L * L, C * L * L).sum(0)  # pixels, latents
    return fields.T.reshape(C, L, L, L, L)


@pytest.mark.parametrize("name", ["rgflow", "realnvp", "grey"])
def test_fields_and_the_strongest_of_each_level(compute, name):
    everything = "--per_level 1000 --draws 2" if name == "realnvp" else "--draws 2"
    fields, flow = compute(name, everything)
    expected = autograd_fields(flow, 2, 0)
    assert len(fields.fields) == flow.nchannels * 64
    torch.testing.assert_close(fields.fields, expected[fields.latents.unbind(1)], rtol=1e-7, atol=1e-9)
    strengths = {}
    for c in range(flow.nchannels):
        for i in range(8):
            for j in range(8):
                h = level(flow, i, j)
                strengths.setdefault(h, {})[f"{h}:{i}:{j}:{c}"] = expected[c, i, j].sum().item() / 64
    for h, by_name in strengths.items():
        falling = sorted(by_name, key=by_name.get, reverse=True)
        assert [fields.name(k) for k in fields.strongest(h, 5)] == falling[:5]
        assert fields.totals[h] == len(fields.of_level(h)) == len(by_name)
        drawn = fields.random(h, 5, seed=0)
        assert {fields.name(k) for k in drawn} <= set(by_name)
        assert len(set(drawn.tolist())) == 5
        assert not torch.equal(drawn, fields.random(h, 5, seed=1))


def test_chosen_latents_and_random_subsets(compute):
    fields, flow = compute("realnvp", "--latents 1:1:3:2,0:0:5:0 --draws 1")
    assert [fields.name(k) for k in range(2)] == ["1:1:3:2", "0:0:5:0"]
    expected = autograd_fields(flow, 1, 0)
    torch.testing.assert_close(fields.fields, expected[[2, 0], [1, 0], [3, 5]], rtol=1e-7, atol=1e-9)
    subset, _ = compute("realnvp", "--draws 1")
    assert [len(subset.of_level(h)) for h in range(2)] == [script.SUBSET] * 2
    torch.testing.assert_close(subset.fields, expected[subset.latents.unbind(1)], rtol=1e-7, atol=1e-9)
    few = [choose_latents(flow, 7, seed) for seed in (0, 0, 1)]
    assert [level(flow, i, j) for _, i, j in few[0].tolist()] == [0] * 7 + [1] * 7
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    assert len({tuple(latent) for latent in few[0].tolist()}) == 14


def test_fields_are_computed_once_per_weights_draws_seed_and_latents(weights, tmp_path, monkeypatch):
    calls = []

    def count(flow, n, latents, *_, **__):
        calls.append(n)
        return torch.ones(len(latents), flow.L, flow.L)

    monkeypatch.setattr(script, "receptive_fields", count)
    flow, config = load(weights["rgflow"])

    def call(flags="", flow=flow, config=config, temperatures=(1.0, 1.0)):
        argv = ["--weights", weights["rgflow"], "--fig_dir", str(tmp_path), *flags.split()]
        get_fields(get_args(argv, script.fields_parser()), flow, config, temperatures)
        return len(calls)

    assert [call(), call(), call("--levels 1 --number 3 --strongest")] == [1, 1, 1]
    assert [call("--draws 3"), call("--draw_seed 1"), call("--latents 1:0:0:0"), call("--per_level 2")] == [2, 3, 4, 5]
    assert call(temperatures=(1.0, 0.5)) == 6
    gaussian = {**config, "prior": "gaussian"}
    assert call(flow=build(gaussian), config=gaussian) == 7
    assert call(flow=randomise(build(config), 0.1)) == 8
    assert [call(), call("--draws 3"), call("--latents 1:0:0:0")] == [8, 8, 8]
    for path in tmp_path.glob("*.cache"):
        path.write_bytes(path.read_bytes()[:-1])
    assert call() == 9


def known_fields():
    """Five fields of 2 x 2 pixels, of strengths 0.5, 4, 1, 2 and 3, at levels 0, 0, 0, 1 and 1."""
    latents = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [2, 0, 0]])
    fields = torch.tensor([0.5, 4, 1, 2, 3])[:, None, None] * torch.tensor([[0.0, 1], [1, 2]])
    return Fields(latents, torch.tensor([0, 0, 0, 1, 1]), fields, [9, 3])


def test_strengths_visible_latents_and_their_report(capsys):
    fields = known_fields()
    assert fields.strengths.tolist() == [0.5, 4, 1, 2, 3]
    assert [[fields.name(k) for k in fields.visible(h)] for h in (0, 1)] == [["0:1:0:0"], ["1:0:0:2", "1:0:0:1"]]
    top, low = script.report(fields)
    assert (top["visible"], top["paper_visible_celeba"]) == ({"1:0:0:2": 3, "1:0:0:1": 2}, 30)
    assert (low["computed"], low["latents"], low["paper_visible_celeba"]) == (3, 9, None)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("h = 1: 2 of 2 latents with strength above 1 (the paper's RG-Flow on CelebA: 30)")
    assert second.endswith("strengths 0.5 to 4, 0:1:0:0 4")


@pytest.mark.parametrize("logarithmic", [False, True])
def test_histogram(compute, logarithmic):
    fields, _ = compute("rgflow", "--draws 1")
    edges, counts = fields.histogram(logarithmic)
    steps = np.diff(np.log(edges) if logarithmic else edges)
    np.testing.assert_allclose(steps, steps[0])
    for h in range(2):
        strengths = [field.sum() / 64 for field, own in zip(fields.fields, fields.levels, strict=True) if own == h]
        expected = [sum(low <= s < high for s in strengths) for low, high in pairwise(edges)]
        expected[-1] += sum(s == edges[-1] for s in strengths)
        assert counts[h].tolist() == expected
        assert counts[h].sum() == len(strengths)
    figure = draw_histogram(fields, [1, 0], logarithmic)
    for axes, h in zip(figure.axes, (1, 0), strict=True):
        values, drawn_edges, _ = axes.patches[0].get_data()
        assert values.tolist() == counts[h].tolist()
        assert drawn_edges.tolist() == edges.tolist()
        assert (axes.get_yscale(), axes.get_xscale()) == ("log", "log" if logarithmic else "linear")


def test_untrained_flows_have_a_histogram(weights, tmp_path):
    """Of an identity all strengths are the same."""
    _, config = load(weights["rgflow"])
    args = get_args(["--fig_dir", str(tmp_path)], script.fields_parser())
    fields = get_fields(args, build(config).eval(), config)
    assert set(fields.strengths.tolist()) == {1 / 64}
    for logarithmic in (False, True):
        assert fields.histogram(logarithmic)[1].sum(1).tolist() == [144, 48]
        draw_histogram(fields, [1, 0], logarithmic)


def test_pictures_of_fields():
    """Every field is divided by its largest value, and each panel has its latent's name."""
    fields = known_fields()
    image = pictures(fields.fields)
    assert image.shape == (5, 3, 2, 2)
    colours = colormaps[script.COLOUR_MAP]
    for k in range(5):
        for pixel, share in ((0, 0), (1, 0.5), (2, 0.5), (3, 1.0)):
            assert image[k].reshape(3, 4)[:, pixel].tolist() == list(colours(share)[:3])
    figure = draw_fields(fields, [(1, torch.tensor([4, 3])), (0, torch.tensor([1]))])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["1:0:0:2", "1:0:0:1", "0:1:0:0"]
    assert [text.get_text() for text in figure.texts] == ["$h = 1$", "$h = 0$"]
    assert np.array_equal(figure.axes[0].images[0].get_array(), image[4].transpose(1, 2, 0))


def test_long_rows_are_wrapped_and_all_panels_equal():
    fields = Fields(torch.zeros(23, 3, dtype=int), torch.zeros(23, dtype=int), torch.rand(23, 4, 4), [23])
    figure = draw_fields(fields, [(0, torch.arange(23))])
    *panels, _ = [axes.get_position().bounds for axes in figure.axes]
    assert len(panels) == 23
    assert len({round(y, 9) for _, y, _, _ in panels}) == 3
    width, height = figure.get_size_inches()
    sizes = {round(size, 9) for _, _, w, h in panels for size in (w * width, h * height)}
    assert len(sizes) == 1
    assert all(min(x, y) > 0 and x + w < 1 + 1e-9 and y + h < 1 for x, y, w, h in panels)


@pytest.mark.parametrize(
    "flags, name, words",
    [
        ("--draws 1", "receptive_fields", ["10 random latents", "mean of 1 draws at T = 1, seed 0"]),
        ("--draws 1 --strongest --number 12 --levels 1", "receptive_fields_strongest_h1", ["12 strongest latents"]),
        ("--draws 1 --latents 1:0:0:0", "receptive_fields_chosen", ["1 chosen latents", "1 of "]),
        ("--draws 1 --per_level 3 --temperature 0.5", "receptive_fields_T0.5", [", 6 of ", "T = 0.5"]),
        ("--draws 1 --histogram", "strengths", ["histograms", "h = 0: "]),
        ("--draws 1 --histogram --log_strength --levels 0", "strengths_h0", ["histograms"]),
    ],
)
@pytest.mark.parametrize("model", ["rgflow", "realnvp", "grey"])
def test_script(draw, tmp_path, model, flags, name, words):
    paths, text = draw(script, model, f"{flags} --json {tmp_path / 'r.json'}")
    kind = "realnvp_laplace" if model == "realnvp" else "laplace"
    endings = ("png", "pdf")
    assert [path.rpartition("/")[2] for path in paths] == [f"{name}_folder_{kind}_nl1_nr1_nm1_nh8.{e}" for e in endings]
    assert all((tmp_path / "f" / path).stat().st_size > 1000 for path in paths)
    assert all(word in text for word in words)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["kind"] == "receptive fields"
    assert all(len(each["visible"]) <= each["computed"] <= each["latents"] for each in record["results"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--levels 2", r"--levels: 2: must be in 0\.\.1"),
        ("--latents 0:0:0:0", r"--latents: 0:0:0:0: row 0, column 0 is at level 1 of 0\.\.1"),
        ("--latents 1:0:8:0", r"--latents: 1:0:8:0: row and column must be in 0\.\.7"),
        ("--latents 1:0:0:0 --levels 1", r"--levels: 1: must not be given with --latents"),
        ("--temperature 1,1,1", r"--temperature: 1,1,1: must be one number or 2"),
    ],
)
def test_what_does_not_exist_is_refused(draw, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        draw(script, "rgflow", flags)
    assert not (tmp_path / "f").exists()


def test_fields_that_are_not_finite_are_refused(draw, monkeypatch):
    monkeypatch.setattr(script, "receptive_fields", lambda flow, n, latents, *_, **__: latents[:, :1, None] * torch.nan)
    with pytest.raises(UserError, match="not finite"):
        draw(script, "rgflow")


def test_the_time_of_fields_beside_one_pass_per_latent(weights, capsys):
    args = get_args(["--weights", weights["grey"]], build_parser("", needs_weights=True))
    (result,) = bench.time_fields(args, 2)
    assert (result["draws"], result["latents"]) == (2, 64)
    assert result["extrapolated_seconds_single"] == pytest.approx(2 * 64 * result["ms_per_single_pass"] / 1000)
    assert min(result["seconds"], result["extrapolated_seconds_batched"]) > 0
    assert "extrapolated from 32" in capsys.readouterr().out
    args.weights = weights["realnvp"]
    with pytest.raises(UserError, match="only for rgflow"):
        bench.time_fields(args, 2)
