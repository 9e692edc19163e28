"""Factors of MSDS in toy latents: levels, positions, the labels of a prepared set, the script."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from test_effects import train
from test_probes import PAIR, parts

import plot_factors
from data import msds, open_dataset
from flow.base import Flow
from flow.hierarchy import level_map
from utils.cli import UserError


def test_levels_and_positions_of_a_factor():
    flow, n = Flow(3, 8, 4, level_map(8, 4), "laplace"), 4000
    z, local, hidden = torch.randn(n, 3, 8, 8), torch.randn(n, 16, 2), torch.randn(n, 4)
    z[:, 0, 2, 4], z[:, 2, 2, 4] = local[:, 5, 0], local[:, 5, 1]  # row and column are even: level 1
    z[:, 0, 1, :4] = hidden @ torch.kron(PAIR, PAIR)  # row 1 is of level 0
    factors = {"global": parts(hidden), "local": parts(local)}
    latents = parts(z.flatten(1))
    rows = {(row["factor"], row["level"]): row for row in plot_factors.probe_levels(flow, latents, factors)}
    assert len(rows) == 4
    assert [rows["global", h]["latents"] for h in (0, 1)] == [144, 48]
    assert rows["global", 0]["probe"] > 0.999
    assert (rows["global", 0]["single"], rows["global", 0]["ratio"]) == pytest.approx((1 / 4, 1 / 4), abs=0.04)
    assert max(abs(rows[each]["probe"]) for each in (("global", 1), ("local", 0))) < 0.03
    assert rows["global", 1]["ratio"] is None and rows["local", 1]["ratio"] == pytest.approx(1, abs=0.1)
    assert rows["local", 1]["probe"] == pytest.approx(1 / 16, abs=0.01)  # one oval of 16

    expected = {"global": np.zeros((8, 8)), "local": np.zeros((8, 8))}
    expected["global"][1, :4], expected["local"][2, 4] = 1 / 4, 1
    for name, found in plot_factors.probe_positions(flow, latents, factors).items():
        np.testing.assert_allclose(found, expected[name], atol=0.05)


def test_factors_rebuild_the_labels():
    def doubled(degrees):
        return np.exp(2j * np.radians(degrees))

    for variant in (1, 2):
        _, ovals, base = msds.generate(variant, 0, 0, 1500, processes=1)
        factors = msds.factors(variant, ovals, base)
        colours, angles = ovals[:, :, 3:], ovals[:, :, 2].astype(float)
        if variant == 1:
            np.testing.assert_array_equal(factors["global"][:, None] + factors["deviation"], colours)
            np.testing.assert_allclose(factors["local"] @ np.array([1, 1j]), doubled(angles), atol=1e-5)
        else:
            np.testing.assert_array_equal(factors["local"], colours)
            np.testing.assert_allclose(doubled(base + factors["deviation"][..., 0]), doubled(angles), atol=1e-4)
            mean = factors["global"] @ np.array([1, 1j])  # within 3 degrees of the mean angle of the ovals of an image
            assert np.abs(np.angle(mean / doubled(angles).mean(1))).mean() < 2 * np.radians(3)


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(msds, "SIZES", (240, 120))
    files = [train(tmp_path, f"--data msds1 --max_steps 2 --seed {seed} --out_infix _{seed}") for seed in (0, 1)]
    prepared = tmp_path / "datasets"
    argv = f"--data_path {prepared} --images 200 --held_out 120 --fig_dir {tmp_path} --json {tmp_path}/f.json".split()
    plot_factors.main([*argv, "--weights", *files])
    record = json.loads((tmp_path / "f.json").read_text())
    factors = "global", "local", "deviation"
    assert record["kind"] == "factors" and record["data"] == "msds1"
    assert [row["row"].split(",")[0] for row in record["rows"]] == [f"MSDS1 {factor}" for factor in factors]
    assert [result["seed"] for result in record["results"]] == [0, 1]
    for result in record["results"]:
        assert {(row["factor"], row["level"]) for row in result["levels"]} == set(product(factors, range(4)))
        assert np.array(result["positions"]["local"]).shape == (32, 32)
    # After two steps the flow is nearly the identity: the colour is in pixels of level 0, with noise of 200 images
    assert record["results"][0]["levels"][0]["probe"] > 0.5
    output = capsys.readouterr().out
    assert " ± " in output and ".pdf" in output
    assert next(tmp_path.glob("factors_msds1_*.png")).stat().st_size > 20_000

    plot_factors.main([*argv, "--json", f"{tmp_path}/g.json", "--weights", files[0]])
    again = json.loads((tmp_path / "g.json").read_text())
    assert again["results"][0]["levels"] == record["results"][0]["levels"]
    with pytest.raises(UserError, match="--images: 300: must be at most 240"):
        plot_factors.main([*argv, "--weights", files[0], "--images", "300"])

    dataset = open_dataset("msds1", prepared, 3, 32)  # the labels are those of the images
    for split in ("train", "test"):
        ovals, base = msds.read_labels(dataset.path, split, 5)
        assert ovals.shape == (5, 16, 6) and base.shape == (5, 3)
        assert np.array_equal([msds.draw_ovals(each) for each in ovals], getattr(dataset, split)[:5])
