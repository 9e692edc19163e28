"""Effects on MSDS measured on a flow that draws real ovals from its latents: what must come out is known."""

import json

import numpy as np
import pytest
import torch
from runs import SMALL

import effects
import main
import plot_factors
from args import get_args
from data import msds
from flow.base import Flow
from flow.fields import Fields
from flow.hierarchy import level_map
from flow.preprocess import to_model, to_uint8
from utils.cli import UserError

# Places of latents (row, column). Ovals are numbered columns first, as msds draws them.
IMAGE = [(0, 0), (0, 8)]  # level 3: for all ovals of an image colour (3 channels) and angle (first channel)
QUADRANT = [(4 + 16 * row, 4 + 16 * column) for column in range(2) for row in range(2)]  # level 2, of 4 ovals each
OVAL = [(1 + 8 * row, 1 + 8 * column) for column in range(4) for row in range(4)]  # level 0
SILENT = (0, 16)  # level 3
BREAKS = (2, 2)  # level 1: above 2, the first oval is black


class Drawing(Flow):
    """Draws the ovals that its latents describe; encodes only what it has drawn.

    variant 1: the image's latents are the colour of all ovals, an oval's its angle; variant 2: the other way round.
    A quadrant's latents add to the image's factor for 4 ovals.
    """

    def __init__(self, variant):
        super().__init__(3, 32, 4, level_map(32, 4), "laplace")
        self.variant, self.drawn = variant, {}
        self.anything = torch.nn.Parameter(torch.zeros(()))

    def ovals(self, z):
        """Latents (3, 32, 32) -> (16, 6) as `msds.draw_ovals` takes them."""
        z = z.numpy()
        quadrant = np.array([at(z, QUADRANT[2 * (n // 8) + n % 4 // 2]) for n in range(16)])
        own = np.array([at(z, place) for place in OVAL])
        if self.variant == 1:
            colours, angles = at(z, IMAGE[0]) + quadrant, own[:, :1]
        else:
            colours, angles = own, at(z, IMAGE[1])[:1] + quadrant[:, :1]
        colours = 130 + 25 * colours.clip(-4.5, 4.5)
        colours[0] *= at(z, BREAKS)[0] <= 2
        return np.hstack((msds.CORNERS, 90 + 20 * angles, colours))

    def draw(self, z):
        images = np.stack([msds.draw_ovals(self.ovals(each)) for each in z])
        self.drawn |= {image.tobytes(): each for image, each in zip(images, z, strict=True)}
        return torch.from_numpy(images)

    def forward(self, x):
        return torch.stack([self.drawn[image.numpy().tobytes()] for image in to_uint8(x)]), x.new_zeros(len(x))

    def inverse(self, z):
        return to_model(self.draw(z), noise=0.5)[0], z.new_zeros(len(z))


def at(z, place):
    """z (..., 3, 32, 32) -> its channels at a row and column, (..., 3), a view."""
    return z[(..., *place)]


def draws(number):
    return torch.randn(number, 3, 32, 32).clamp(-1.5, 1.5)


VALUES = torch.linspace(-3, 3, 5)
UNCHANGED = {"ovals": 0.0, "size": None, "common": None}


@pytest.mark.parametrize("variant", [1, 2])
def test_a_latent_of_all_ovals_changes_16_and_one_of_an_oval_changes_1(variant):
    flow = Drawing(variant)
    named = {"image": IMAGE[variant - 1], "quadrant": QUADRANT[1], "oval": OVAL[6], "silent": SILENT}
    latents = torch.tensor([(0, *place) for place in named.values()])
    fields = torch.arange(4.0, 0, -1)[:, None, None].expand(4, 32, 32)  # strengths 4, 3, 2, 1
    levels = flow.level_map[latents.unbind(1)]
    rows = effects.of_latents(flow, Fields(latents, levels, fields, [0] * 4), [3, 2, 1, 0], 2, draws(4), VALUES)
    assert [row["latent"] for row in rows] == [f"3:0:{8 * variant - 8}:0", "3:0:16:0", "2:20:4:0", "0:17:9:0"]
    assert [(row["strength"], row["found"]) for row in rows] == [(4, 1), (1, 1), (3, 1), (2, 1)]
    image, silent, quadrant, oval = rows
    shared, own = effects.FACTORS[variant]["global"], effects.FACTORS[variant]["local"]
    sizes = {"colour": 25 * 6, "orientation": 20 * 6}
    for row, number, factor, other in ((image, 16, shared, own), (quadrant, 4, shared, own), (oval, 1, own, shared)):
        assert row[factor]["ovals"] == number and row[other] == UNCHANGED
        assert row[factor]["size"] == pytest.approx(sizes[factor], rel=0.05)
        assert row[factor]["common"] == pytest.approx((number - 1) / 15, abs=0.03)
    assert silent[shared] == silent[own] == UNCHANGED

    means = effects.of_levels(rows)
    assert [(row["level"], row["latents"]) for row in means] == [(3, 2), (2, 1), (0, 1)]
    assert means[0]["strength"] == 2.5 and means[0][own]["size"] is None
    # sizes are of the latent that has one
    expected = {**image[shared], "ovals": 8, "most": 16, "most_latent": image["latent"]}
    assert means[0][shared] == expected


def test_changes_against_closed_forms():
    """Unrelated changes have nothing in common, opposite ones of two ovals -1; what is not found does not count."""
    vectors = 30 * np.random.default_rng(0).normal(size=(4, 50, 16, 3))
    assert effects.change(vectors, np.ones((50, 16), bool), 20)["common"] == pytest.approx(0, abs=0.02)
    two, found = np.zeros((1, 1, 16, 1)), np.arange(16)[None] < 2
    two[0, 0, :2, 0] = 30, -50
    common = -2 * 30 * 50 / (30**2 + 50**2)
    assert effects.change(two, found, 20) == pytest.approx({"ovals": 2, "size": 40, "common": common})
    assert effects.change(two, found, 40)["ovals"] == 1
    found[0, 1] = False  # then the first has none beside it to have something in common with
    assert effects.change(two, found, 20) == {"ovals": 1, "size": 30, "common": None}
    pair, both = np.concatenate((two, two), 1), np.concatenate((found, found))
    pair[0, 1, :2, 0], both[1, 1] = 30, True
    assert effects.change(pair, both, 20)["common"] == pytest.approx(1)
    assert effects.change(two, found, 31) == UNCHANGED


def test_ovals_turned_by_more_than_90_degrees_turn_alike():
    """Read from images whose ovals end a little short of, at and beyond a quarter, and a half, of a turn."""
    ovals = np.zeros((5, 1, 16, 6))
    ovals[..., :2], ovals[..., 3:] = msds.CORNERS, 200
    ovals[..., 2] = 6 * np.arange(16) + np.linspace(0, 1, 5)[:, None, None] * (165 + 2 * np.arange(16))
    images = torch.from_numpy(np.stack([msds.draw_ovals(each) for each in ovals[:, 0]]))[:, None]
    row = effects.moved((images + 0.5) / 256)["orientation"]
    assert row["ovals"] == 16 and row["size"] == pytest.approx(180, abs=2) and row["common"] > 0.98


def test_an_oval_that_vanishes_is_not_counted_as_changed():
    flow = Drawing(1)
    row = effects.moved(effects.vary(flow, torch.zeros(2, 3, 32, 32), (0, *BREAKS), VALUES))
    assert row["found"] == 15 / 16 and row["colour"]["ovals"] == 0


@pytest.mark.parametrize("variant", [1, 2])
def test_mixing_exchanges_each_factor_at_its_level(variant):
    flow = Drawing(variant)
    z = draws(80)
    for place in (*QUADRANT, BREAKS):
        at(z, place).zero_()
    rows = effects.of_mixing(flow, *flow.draw(z).chunk(2), variant)
    assert [row["theta"] for row in rows] == [0, 1, 2, 3, 4]
    for row, shared, own in zip(rows, (1, 1, 1, 1, 0), (1, 0, 0, 0, 0), strict=True):
        assert row["found"] > 0.99 and row["failure"] is None
        for kind, high in (("global", shared), ("local", own)):
            assert (row[kind]["high"], row[kind]["low"]) == pytest.approx((high, 1 - high), abs=0.03)
            assert row[kind]["r2"] > 0.97
        assert row["global"]["number"] == 40 and row["local"]["number"] > 600
    assert rows[0]["score"] == pytest.approx(1)


def test_weights_of_a_known_mixture():
    high, low, noise = (torch.randn(4000, 3).numpy() for _ in range(3))
    result = effects.weights(0.7 * high - 0.2 * low + 0.5 * noise + np.array([1, 2, 3]), high, low)
    expected = {"high": 0.7, "low": -0.2, "r2": (0.49 + 0.04) / (0.49 + 0.04 + 0.25), "number": 4000, "failure": None}
    assert result == pytest.approx(expected, abs=0.02)


def test_mixtures_without_ovals_have_a_reason_instead_of_weights(monkeypatch):
    flow = Drawing(1)
    images = flow.draw(draws(60))
    monkeypatch.setattr(flow, "inverse", lambda z: (torch.full_like(z, -2.9), z.new_zeros(len(z))))
    for row in effects.of_mixing(flow, *images.chunk(2), 1):
        assert row["found"] == 0 and row["score"] is None
        for part in (row["global"], row["local"]):
            assert part["high"] is part["low"] is part["r2"] is None and "0 rows only" in part["failure"]
        json.dumps(row, allow_nan=False)
    same = np.ones((30, 3))
    assert effects.weights(same, same, same)["failure"] == "the factor does not vary"
    monkeypatch.setattr(flow, "inverse", lambda z: (z * torch.nan, z.new_zeros(len(z))))
    with pytest.raises(FloatingPointError, match="not finite"):
        effects.of_mixing(flow, *images.chunk(2), 1)


def train(folder, flags):
    """A flow trained a little on MSDS, with data in `folder`; the file of its weights."""
    run = main.Run(get_args(f"{SMALL} --L 32 --data_path {folder / 'datasets'} -o {folder} {flags}".split()))
    run.train()
    return str(run.folder / "last.state")


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(msds, "SIZES", (40, 60))
    files = [train(tmp_path, f"{flags} --max_steps 1") for flags in ("--data msds1", "--data msds2 --model realnvp")]
    argv = f"--data_path {tmp_path / 'datasets'} --fig_dir {tmp_path / 'figures'} --json {tmp_path / 'e.json'}"
    argv += " --images 2 --pairs 20 --strongest 2 --steps 2 --draws 1 --per_level 4 --weights"
    effects.main([*argv.split(), *files])
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["kind"] == "effects" and record["pairs"] == 20 and record["range"] == [-3, 3]
    assert [result["data"] for result in record["results"]] == ["msds1", "msds2"]
    for result in record["results"]:
        assert [row["level"] for row in result["levels"]] == [3, 2, 1, 0]
        assert len(result["latents"]) == 8
        assert all(row["latent"].startswith(f"{row['level']}:") for row in result["latents"])
        for row, weight in ((result["mixing"][0], 1), (result["mixing"][-1], 0)):  # the two images themselves
            found = row["global"]["high"], row["local"]["low"]
            assert found == pytest.approx((weight, 1 - weight), abs=0.02)
        assert result["calibration"]["share"] > 0.98
    # After one step the flow is nearly the identity, and the latents of level 3 are single pixels, one of a cell each.
    assert all(row["colour"]["ovals"] <= 4 for row in record["results"][0]["latents"])
    expected = [(table, k) for k in (0, 1) for table in ["moved"] * 2 + ["mixing"] * 4]
    assert [(row["table"], row["result"]) for row in record["rows"]] == expected
    output = capsys.readouterr().out
    assert "msds1, laplace nl1_nr1_nm1_nh8, 1 step, seed 0" in output and "msds2, laplace realnvp_nl1" in output
    effects.main(f"{argv} {files[0]} --levels 0,2".split())
    again = json.loads((tmp_path / "e.json").read_text())["results"][0]
    assert again["levels"] == [row for row in record["results"][0]["levels"] if row["level"] in (0, 2)]
    for flags, words in (
        ("--pairs 31", "--pairs: 31: must be at most 30 for msds1"),
        (files[0], "a second flow of laplace nl1_nr1_nm1_nh8, 1 step with seed 0 on msds1"),
        ("--levels 4", r"--levels: 4: must be in 0\.\.3"),
    ):
        with pytest.raises(UserError, match=words):
            effects.main(f"{argv} {files[0]} {flags}".split())


@pytest.mark.parametrize("script", [effects, plot_factors])
def test_flows_of_other_data_are_refused(script, weights):
    with pytest.raises(UserError, match="trained on folder, must be one of msds1, msds2"):
        script.main(["--weights", weights["rgflow"]])
