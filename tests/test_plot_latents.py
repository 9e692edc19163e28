"""Latents that are varied: over which values, in which panels."""

import json

import numpy as np
import pytest
import torch

import plot_latents as script
import plot_receptive_fields


@pytest.fixture
def drawn(monkeypatch):
    """What the script's figures are drawn of, and the figures."""
    calls, draw_figure = [], script.draw
    monkeypatch.setattr(script, "draw", lambda own: calls.append((own, draw_figure(own))) or calls[-1][1])
    return calls


@pytest.mark.parametrize("model", ["rgflow", "realnvp", "grey"])
def test_figure(draw, drawn, model):
    """The strongest latent of each level, from the top, over the ranges of figure 6; base images the same in all."""
    paths, text = draw(script, model, "--draws 1 --steps 3")
    ((groups, figure),) = drawn
    assert [name[0] for name, *_ in groups] == ["1", "0"]
    assert all(name in text and values.tolist() == [0, 3, 6] for name, _, values, _ in groups)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [title for name, *_ in groups for title in (name, "z = 0", "", "3", "", "6", "")]
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for g, (_, field, _, images) in enumerate(groups):
        own = shown[7 * g : 7 * g + 7]
        assert np.array_equal(own[0], field.transpose(1, 2, 0))
        for panel, image in zip(own[1:], images.flatten(0, 1), strict=True):
            assert np.array_equal(panel, np.broadcast_to(image.permute(1, 2, 0), (8, 8, 3)))
            assert (panel.max(-1) == panel.min(-1)).all() == (model == "grey")
    assert "T = 0.2,0.6, seed 0" in text and [path.rpartition(".")[2] for path in paths] == ["png", "pdf"]


def test_chosen_latents_ranges_and_samples(draw, drawn):
    draw(script, "rgflow", "--latents 1:4:0:2,0:1:1:0 --range -1,2 --steps 4 --samples 3 --draws 1 --temperatures 0")
    ((groups, figure),) = drawn
    assert [name for name, *_ in groups] == ["1:4:0:2", "0:1:1:0"]
    assert groups[0][2].tolist() == [-1, 0, 1, 2]
    assert groups[0][3].shape == (4, 3, 3, 8, 8)
    assert len(figure.axes) == 2 * (1 + 12)
    assert torch.equal(groups[0][3][:, 0], groups[0][3][:, 1])  # at temperature 0 all samples are one
    torch.testing.assert_close(groups[0][3][1], groups[1][3][1])  # both with all latents 0


def test_many_latents_fill_two_columns(draw, drawn):
    draw(script, "rgflow", "--levels 0 --strongest 5 --draws 1 --steps 2")
    ((groups, figure),) = drawn
    assert [name[0] for name, *_ in groups] == ["0"] * 5
    boxes = [axes.get_position().bounds for axes in figure.axes]
    assert len(boxes) == 5 * 5
    assert all(min(x, y) > -1e-9 and x + w < 1 + 1e-9 and y + h < 1 for x, y, w, h in boxes)


def test_fields_are_shared_with_their_own_figure(draw, tmp_path):
    draw(plot_receptive_fields, "rgflow", f"--draws 1 --json {tmp_path / 'r.json'}")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["kind"] == "receptive fields" and len(record["results"]) == 2
    assert all(len(each["visible"]) <= each["computed"] <= each["latents"] for each in record["results"])
    draw(script, "rgflow", "--draws 1 --steps 2")
    assert len(list((tmp_path / "f").glob("*.cache"))) == 1
