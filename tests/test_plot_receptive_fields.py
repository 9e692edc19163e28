"""Receptive fields, which are strongest, and what figures show of them, compared with autograd's Jacobian."""

import json
from itertools import pairwise, product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from checks import jacobian, levels, randomise
from matplotlib import colormaps

import bench
import plot_receptive_fields as script
import tables
from flow.fields import SUBSET, Fields, choose_latents, get_fields
from flow.load import build, load
from plot_receptive_fields import draw_fields, draw_histogram
from utils import checkpoint
from utils.cli import UserError
from utils.plotting import COLOUR_MAP, field_pictures
from utils.random import generator


@pytest.fixture
def compute(weights, tmp_path):
    """The receptive fields of a flow, and the flow."""

    def compute(name, n, **settings):
        flow, config = load(weights[name])
        return get_fields(flow, config, tmp_path / "fields", n, 0, **settings), flow

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
    fields, flow = compute(name, 2, subset=1000)
    expected = autograd_fields(flow, 2, 0)
    assert len(fields.fields) == flow.nchannels * 64
    torch.testing.assert_close(fields.fields, expected[fields.latents.unbind(1)], rtol=1e-7, atol=1e-9)
    for h in range(2):
        at_level = product((levels(flow) == h).nonzero().tolist(), range(flow.nchannels))
        by_name = {f"{h}:{i}:{j}:{c}": expected[c, i, j].sum().item() / 64 for (i, j), c in at_level}
        falling = sorted(by_name, key=by_name.get, reverse=True)
        assert [fields.name(k) for k in fields.strongest(h, 5)] == falling[:5]
        assert fields.totals[h] == len(fields.of_level(h)) == len(by_name)
        drawn = [dict(script.choose_rows(fields, [h], "random", 5, seed))[h] for seed in (0, 1)]
        assert {fields.name(k) for k in drawn[0]} <= set(by_name)
        assert len(set(drawn[0].tolist())) == 5 and not torch.equal(*drawn)


def test_chosen_latents_and_random_subsets(compute):
    fields, flow = compute("realnvp", 1, latents=[(2, 1, 3), (0, 0, 5)])
    assert [fields.name(k) for k in range(2)] == ["1:1:3:2", "0:0:5:0"]
    rows = script.choose_rows(fields, [1, 0], "chosen", 5, 0)
    assert [(h, numbers.tolist()) for h, numbers in rows] == [(1, [0]), (0, [1])]
    expected = autograd_fields(flow, 1, 0)
    torch.testing.assert_close(fields.fields, expected[[2, 0], [1, 0], [3, 5]], rtol=1e-7, atol=1e-9)
    subset, _ = compute("realnvp", 1)
    assert [len(subset.of_level(h)) for h in range(2)] == [SUBSET] * 2
    torch.testing.assert_close(subset.fields, expected[subset.latents.unbind(1)], rtol=1e-7, atol=1e-9)
    few = [choose_latents(flow, 7, seed) for seed in (0, 0, 1)]
    assert levels(flow)[few[0][:, 1], few[0][:, 2]].tolist() == [0] * 7 + [1] * 7
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])
    assert len(few[0].unique(dim=0)) == 14


def test_fields_are_computed_once_per_weights_draws_seed_and_latents(weights, tmp_path, monkeypatch):
    compute = Mock(side_effect=lambda flow, n, latents, *_, **__: torch.ones(len(latents), flow.L, flow.L))
    monkeypatch.setattr("flow.fields.receptive_fields", compute)
    flow, config = load(weights["rgflow"])

    def call(flow=flow, config=config, n=16, seed=0, **settings):
        get_fields(flow, config, tmp_path / "fields", n, seed, **settings)
        return compute.call_count

    assert [call(), call(), call(temperatures=(1.0, 1.0))] == [1, 1, 1]
    assert [call(n=3), call(seed=1), call(latents=[(0, 0, 0)]), call(subset=2)] == [2, 3, 4, 5]
    gaussian = {**config, "prior": "gaussian"}
    assert [call(temperatures=(1.0, 0.5)), call(build(gaussian), gaussian)] == [6, 7]
    assert call(randomise(build(config), 0.1)) == 8
    assert [call(), call(n=3), call(latents=[(0, 0, 0)])] == [8, 8, 8]
    for path in (tmp_path / "fields").glob("*.cache"):
        path.write_bytes(path.read_bytes()[:-1])
    assert call() == 9


@pytest.fixture
def known():
    """Five fields of 2 x 2 pixels, of strengths 0.5, 4, 1, 2 and 3, at levels 0, 0, 0, 1 and 1."""
    latents = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [2, 0, 0]])
    fields = torch.tensor([0.5, 4, 1, 2, 3])[:, None, None] * torch.tensor([[0.0, 1], [1, 2]])
    return Fields(latents, torch.tensor([0, 0, 0, 1, 1]), fields, [9, 3])


def test_strengths_and_the_report_of_visible_latents(known, capsys):
    assert known.strengths.tolist() == [0.5, 4, 1, 2, 3]
    top, low = script.report(known)
    assert (list(top["visible"].items()), top["paper_visible_celeba"]) == ([("1:0:0:2", 3), ("1:0:0:1", 2)], 30)
    assert (low["computed"], low["latents"], low["paper_visible_celeba"]) == (3, 9, None)
    assert (low["visible"], low["mean_strength"], low["largest_strength"]) == ({"0:1:0:0": 4}, 5.5 / 3, 4)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("h = 1: 2 of 2 latents with strength above 1 (the paper's RG-Flow on CelebA: 30)")
    assert second.endswith("mean reach 0.6 pixels, strengths 0.5 to 4, 0:1:0:0 4")
    assert top["mean_reach"] == pytest.approx(6**0.5 / 4)  # weights 1/4 and 3/4 on both axes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reach_in_closed_form(dtype, capsys):
    """A uniform field, one pixel, two pixels at a distance of 5 and across a corner, nothing: that has no mean."""
    shown = torch.zeros(6, 8, 8, dtype=dtype)
    shown[0], shown[1, 6, 2], shown[2, 7, 1], shown[2, 3, 4] = 1e-30, 3, 1e-3, 1e-3
    shown[3, 0, 0] = shown[3, 7, 7] = 2
    fields = Fields(torch.zeros(6, 3, dtype=int), torch.tensor([0, 0, 0, 0, 0, 1]), shown, [5, 1])
    expected = torch.tensor([5.5**0.5, 0, 2.5, 0.5**0.5, torch.nan, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(fields.reaches, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    none, mean = (level["mean_reach"] for level in script.report(fields))
    assert none is None and mean == pytest.approx((5.5**0.5 + 2.5 + 0.5**0.5) / 4, rel=1e-6)
    assert "mean reach – pixels" in capsys.readouterr().out


@pytest.mark.parametrize("flags, computed", [("", 192), ("--per_level 5", 10)])
def test_the_row_of_a_flow(draw, weights, tmp_path, capsys, flags, computed):
    draw(script, "rgflow", f"--draws 2 --draw_seed 3 --levels 1 --histogram --json {tmp_path / 'r.json'} {flags}")
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    cells = [f"{each['mean_reach']:.1f} / {len(each['visible'])} of {each['computed']} [1]" for each in results[::-1]]
    tables.main([str(tmp_path / "r.json")])
    text = capsys.readouterr().out.split("## Receptive fields: ")[1].split("##")[0]
    assert f"| folder datasets: RG-Flow, Laplacian prior | {cells[0]} | {cells[1]} |" in text
    assert f"| [1] | {computed} of 192 computed, mean of 2 draws at T = 1, seed 3 |" in text


def test_chosen_latents_and_exported_weights_in_tables(draw, weights, tmp_path, capsys):
    """Chosen latents stand in no table. Exported weights keep the name of their folder."""
    draw(script, "rgflow", f"--draws 1 --latents 1:0:0:0 --json {tmp_path / 'r.json'}")
    tables.main([str(tmp_path / "r.json")])
    assert "r.json: skipped, nothing in it belongs in a table" in capsys.readouterr().err
    state = checkpoint.read(weights["grey"])
    del state["config"]["data_path"]
    state["config"]["folder"] = "cats"
    checkpoint.save(tmp_path / "exported.state", state)
    draw(script, None, f"--weights {tmp_path / 'exported.state'} --draws 1 --json {tmp_path / 'r.json'}")
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["row"] == "folder cats: RG-Flow, Laplacian prior"


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_histogram(weights, tmp_path, trained, logarithmic):
    """Of an untrained flow, the identity, all strengths are the same."""
    flow, config = load(weights["rgflow"])
    fields = get_fields(flow if trained else build(config).eval(), config, tmp_path / "fields", 1, 0)
    assert len(fields.strengths.unique()) == (192 if trained else 1)
    figure = draw_histogram(fields, [1, 0], logarithmic)
    for axes, h in zip(figure.axes, (1, 0), strict=True):
        counts, edges, _ = axes.patches[0].get_data()
        steps = np.diff(np.log(edges) if logarithmic else edges)
        np.testing.assert_allclose(steps, steps[0])
        strengths = [field.sum() / 64 for field, own in zip(fields.fields, fields.levels, strict=True) if own == h]
        expected = [sum(low <= s < high for s in strengths) for low, high in pairwise(edges)]
        expected[-1] += sum(s == edges[-1] for s in strengths)
        assert counts.tolist() == expected and counts.sum() == len(strengths)
        assert f"{sum(s > 1 for s in strengths)} of {len(strengths)}" in axes.texts[0].get_text()
        assert (axes.get_yscale(), axes.get_xscale()) == ("log", "log" if logarithmic else "linear")


def test_pictures_of_fields(known):
    """Every field is divided by its largest value, and each panel has its latent's name."""
    image = field_pictures(known.fields)
    assert image.shape == (5, 3, 2, 2)
    colours = [colormaps[COLOUR_MAP](share)[:3] for share in (0, 0.5, 0.5, 1.0)]
    assert np.array_equal(image.reshape(5, 3, 4), np.broadcast_to(np.transpose(colours), (5, 3, 4)))
    figure = draw_fields(known, [(1, torch.tensor([4, 3])), (0, torch.tensor([1]))])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["1:0:0:2", "1:0:0:1", "0:1:0:0"]
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == ["$h = 1$", "", "$h = 0$"]
    assert np.array_equal(figure.axes[0].images[0].get_array(), image[4].transpose(1, 2, 0))


def test_long_rows_are_wrapped_and_all_panels_equal():
    fields = Fields(torch.zeros(23, 3, dtype=int), torch.zeros(23, dtype=int), torch.rand(23, 4, 4), [23])
    figure = draw_fields(fields, [(0, torch.arange(23))])
    *panels, _ = [axes.get_position().bounds for axes in figure.axes]
    assert (len(panels), len({round(y, 9) for _, y, _, _ in panels})) == (23, 3)
    width, height = figure.get_size_inches()
    assert len({round(size, 9) for _, _, w, h in panels for size in (w * width, h * height)}) == 1
    assert all(min(x, y) > 0 and x + w < 1 + 1e-9 and y + h < 1 for x, y, w, h in panels)


def test_fields_that_are_not_finite_are_refused(draw, monkeypatch):
    monkeypatch.setattr("flow.fields.receptive_fields", Mock(return_value=torch.full((192, 8, 8), torch.nan)))
    with pytest.raises(UserError, match=r"\.state: its receptive fields are not finite"):
        draw(script, "rgflow")


def test_the_time_of_fields_beside_one_pass_per_latent(weights, tmp_path, capsys):
    bench.main(["--weights", weights["grey"], "--fields", "2", "--json", str(tmp_path / "r.json")])
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (result["draws"], result["latents"]) == (2, 64)
    assert result["extrapolated_seconds_single"] == pytest.approx(2 * 64 * result["ms_per_single_pass"] / 1000)
    assert min(result["seconds"], result["extrapolated_seconds_batched"]) > 0
    assert "extrapolated_seconds_single" in capsys.readouterr().out
    with pytest.raises(UserError, match="only for rgflow"):
        bench.main(["--weights", weights["realnvp"], "--fields", "2"])
