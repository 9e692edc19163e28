"""The arrays behind the figures, against images and formulas of their own; the scripts from flags to files."""

import json
import math

import numpy as np
import pytest
import torch
from checks import randomise
from PIL import Image
from runs import command

import plot_generation
import plot_log
import plot_mixing
import plot_reconstruct
import plot_samples
import plot_walk
from data import open_dataset
from flow import RealNVP, RGFlow
from flow.latents import decode, encode, interpolate, mix, random_walk, sweep
from utils.cli import UserError
from utils.logging import run_name
from utils.plotting import grid_figure


def small(model=RGFlow, **settings):
    """16 x 16 images: three levels."""
    sizes = {"nchannels": 3, "L": 16, "nlayers": 1, "nresblocks": 1, "nmlp": 1, "nhidden": 6, **settings}
    return randomise(model(**sizes), 0.2)


def level(flow, i, j):
    """Of a latent position, by the definitions: zeros at the end of the binary i | j, or i xor j for Real NVP."""
    bits = i | j if isinstance(flow, RGFlow) else i ^ j
    return next((h for h in range(flow.num_levels - 1) if bits >> h & 1), flow.num_levels - 1)


def bytes_of(images):
    """Images in [0, 1] -> uint8 with 256 equal bins."""
    return (images * 256).floor().clamp(0, 255).to(torch.uint8)


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


MODELS = pytest.mark.parametrize("model", [RGFlow, RealNVP])


@MODELS
def test_mixing_takes_each_level_from_the_right_image(model):
    flow = small(model)
    a, b = torch.randn(2, 3, 16, 16)
    for theta in range(5):
        mixed = mix(flow, a, b, theta)
        for i in range(16):
            for j in range(16):
                assert torch.equal(mixed[:, i, j], (a if level(flow, i, j) >= theta else b)[:, i, j])


@MODELS
def test_mixtures_of_two_images_begin_and_end_with_them(model):
    """Theta = 0 and lambda = 1 give the image of the high levels, the last ones that of the low levels."""
    flow, images = small(model), random_images(2, 3, 16, 16)
    rows = plot_mixing.pair_images(flow, images, linear=True)
    assert rows.shape == (3, 2 + 4, 3, 16, 16)
    for row, (first, last) in zip(rows, ((0, 1), (1, 0), (0, 1)), strict=True):
        for k, source in ((0, first), (1, last)):
            torch.testing.assert_close(row[k] * 255, images[source].to(row))
        assert torch.equal(bytes_of(row[2]), images[first])
        assert torch.equal(bytes_of(row[-1]), images[last])
        assert all((row[k] - row[k + 1]).abs().max() > 0.1 for k in range(2, 5))
    assert not torch.equal(rows[0, 3], rows[1, 4])
    labels, columns = plot_mixing.pair_labels(flow, linear=True)
    assert (len(labels), len(columns)) == rows.shape[:2]


def test_grid_of_mixtures():
    flow, images = small(), random_images(5, 3, 16, 16)
    high, low = images[:3], images[3:]
    for theta, expected in ((0, lambda m, n: high[n]), (3, lambda m, n: low[m])):
        panels = plot_mixing.grid_images(flow, high, low, theta)
        assert panels.shape == (3, 4, 3, 16, 16)
        assert (panels[0, 0] == 1).all()
        for n in range(3):
            torch.testing.assert_close(panels[0, n + 1] * 255, high[n].to(panels))
            for m in range(2):
                torch.testing.assert_close(panels[m + 1, 0] * 255, low[m].to(panels))
                assert torch.equal(bytes_of(panels[m + 1, n + 1]), expected(m, n))
    between = plot_mixing.grid_images(flow, high, low, 1)
    z = encode(flow, images)
    z[1, :, 1::2], z[1, :, :, 1::2] = z[4, :, 1::2], z[4, :, :, 1::2]  # odd row or column: level 0
    torch.testing.assert_close(between[2, 2], decode(flow, z[1:2])[0])


@MODELS
def test_encoded_images_come_back_whatever_their_number(model):
    flow, images = small(model, nhidden=4), random_images(35, 3, 16, 16)
    z = encode(flow, images)
    assert torch.equal(bytes_of(decode(flow, z)), images)
    torch.testing.assert_close(z[34:], encode(flow, images[34:]))


def test_samples_at_temperature_0_are_the_image_of_z_0():
    flow = small()
    cold = plot_samples.samples(flow, 3, (0.0,) * 3, seed=1)
    torch.testing.assert_close(cold, decode(flow, torch.zeros(1, 3, 16, 16)).expand(3, -1, -1, -1))
    nearly = plot_samples.samples(flow, 3, (1e-9,) * 3, seed=1)
    torch.testing.assert_close(nearly, cold, rtol=0, atol=1e-6)
    warm = plot_samples.samples(flow, 3, (1.0, 0.0, 0.0), seed=1)
    assert (warm[0] - warm[1]).abs().max() > 0.01
    assert torch.equal(warm, plot_samples.samples(flow, 3, (1.0, 0.0, 0.0), seed=1))
    assert not torch.equal(warm, plot_samples.samples(flow, 3, (1.0, 0.0, 0.0), seed=2))


def test_choice_of_real_images():
    numbers = plot_samples.choose(40, 25, seed=3)
    assert len(set(numbers.tolist())) == 25
    assert numbers.min() >= 0 and numbers.max() < 40
    assert not torch.equal(numbers, plot_samples.choose(40, 25, seed=4))


def test_generation_is_that_of_flows_without_the_lower_levels():
    """x^(h) is what a smaller flow, of the levels from h up, makes of their latents."""
    flow = small()
    z = flow.sample_prior(2)
    steps = plot_generation.generation(flow, z)
    assert [tuple(step.shape) for step in steps] == [(2, 3, 16, 16)] * 3
    torch.testing.assert_close(steps[-1], decode(flow, z))
    for h in (1, 2):
        upper = small(L=16 >> h)
        upper.disentanglers, upper.decimators = flow.disentanglers[h:], flow.decimators[h:]
        expected = decode(upper, z[:, :, :: 2**h, :: 2**h])
        assert expected.std() > 0.01
        torch.testing.assert_close(steps[2 - h], torch.kron(expected, torch.ones(2**h, 2**h)))


@MODELS
def test_random_walk(model):
    """Closed, of equal steps, in the chosen levels alone; every frame has the prior's variance at its temperature."""
    flow = small(model)
    z = torch.randn(20, 3, 16, 16)
    walk = random_walk(flow, z, (0, 2), 3, 8, (0.5, 1.0, 2.0), torch.Generator().manual_seed(0))
    assert walk.shape == (24, 20, 3, 16, 16)
    levels = torch.tensor([[level(flow, i, j) for j in range(16)] for i in range(16)])
    assert (walk[..., levels == 1] == z[..., levels == 1]).all()
    for h, temperature in ((0, 0.5), (2, 2.0)):
        moving = walk[..., levels == h]
        variances = moving.square().flatten(1).mean(1)
        assert (variances / temperature**2 - 1).abs().max() < 0.2
        steps = (moving.roll(-1, 0) - moving).square().flatten(1).mean(1).sqrt()
        assert steps.max() < 1.2 * steps.min()
        assert steps.max() < 0.3 * temperature


def test_interpolation_ends_at_its_anchors():
    flow, images = small(), random_images(2, 3, 16, 16)
    frames = plot_walk.interpolation_images(flow, images, 5)
    assert frames.shape == (5, 1, 3, 16, 16)
    assert torch.equal(bytes_of(frames[0, 0]), images[0])
    assert torch.equal(bytes_of(frames[-1, 0]), images[1])
    a, b = torch.randn(2, 3, 4, 4)
    path = interpolate(a, b, 5)
    assert torch.equal(path[0], a) and torch.equal(path[4], b)
    torch.testing.assert_close(path[1], b + 0.75 * (a - b))


def test_sweep_sets_one_latent():
    z, values = torch.randn(2, 3, 4, 4), torch.tensor([-1.0, 0.0, 5.0])
    swept = sweep(z, (2, 1, 3), values)
    assert swept.shape == (3, 2, 3, 4, 4)
    assert torch.equal(swept[:, :, 2, 1, 3], values[:, None].expand(3, 2))
    swept[:, :, 2, 1, 3] = z[:, 2, 1, 3]
    assert torch.equal(swept, z.expand_as(swept))


@MODELS
def test_edits(model):
    flow = small(model)
    z, other = torch.randn(2, 1, 3, 16, 16)
    kept = z.clone()
    values = [((2, 4, 3), 7.0), ((0, 0, 0), -1.0)]
    edited = plot_reconstruct.edited(flow, z, other, (1,), ((0, 0.5), (1, 0.0), (1, 2.0)), values)
    assert torch.equal(z, kept)
    swapped = plot_reconstruct.edited(flow, z, other, (1, 2))
    for i in range(16):
        for j in range(16):
            h = level(flow, i, j)
            expected = (0.5 * z, 0 * other, z)[h][0, :, i, j].clone()
            for (c, *position), value in values:
                if position == [i, j]:
                    expected[c] = value
            assert torch.equal(edited[0, :, i, j], expected)
            assert torch.equal(swapped[0, :, i, j], (other if h else z)[0, :, i, j])


def test_energies():
    flow = small()
    z = torch.where(flow.level_map == 1, 2.0, -0.5).expand(1, 3, 16, 16)
    results = plot_reconstruct.energies(flow, z)
    assert [result["latents"] for result in results] == [576, 144, 48]
    assert [result["mean_square"] for result in results] == pytest.approx([0.25, 4, 0.25])
    nats = [math.log(math.sqrt(2)) + math.sqrt(2) * size for size in (0.5, 2, 0.5)]
    assert [result["nats_per_latent"] for result in results] == pytest.approx(nats)


def test_a_grey_image_is_drawn_grey():
    image = torch.rand(2, 1, 16, 16)
    (panel,) = grid_figure(image, 2).axes[0].images
    drawn = np.asarray(panel.get_array())
    assert (drawn == drawn[..., :1]).all()
    assert (drawn[:, :16, 0] == image[0, 0].numpy()).all()


LOG = """{"kind": "train", "step": 1, "bpd": 8.0, "seconds": 1800}
{"kind": "train", "step": 3, "bpd": 6.0, "seconds": 3600}
{"kind": "other", "step": 3, "bpd": 0.0}
no record
{"kind": "train", "step": 5, "bpd": 4.0, "seconds": 7200}
{"kind": "test", "step": 5, "bpd": 4.5, "bpd_stderr": 0.25, "seconds": 7200}
{"kind": "train", "step": 7"""


def test_curves(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text(LOG)
    train, test = plot_log.curves(path)
    assert train.tolist() == [[1, 3, 5], [8, 6, 4]]
    assert test.tolist() == [[5], [4.5], [0.25]]
    train, test = plot_log.curves(path, time=True)
    assert train[0].tolist() == [0.5, 1, 2]
    assert test[0].tolist() == [2]
    axes = plot_log.log_figure([(train, test)], ["$a"], time=True, bpd=(3, 5)).axes[0]
    assert axes.lines[0].get_xydata().T.tolist() == train.tolist()
    assert axes.get_ylim() == (3, 5)
    monkeypatch.setattr(plot_log, "POINTS", 2)
    assert plot_log.curves(path)[0].tolist() == [[2, 5], [7, 4]]


def test_log_script(tmp_path, capsys):
    for run in ("a", "b_x"):
        (tmp_path / "msds1" / run).mkdir(parents=True)
        (tmp_path / "msds1" / run / "out_2.jsonl").write_text(LOG)
    files = [str(tmp_path / "msds1" / run / "out_2.jsonl") for run in ("a", "b_x")]
    plot_log.main([*files, "--fig_dir", str(tmp_path / "f"), "--time", "--name", "c"])
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["c.pdf", "c.png"]
    assert b"/Type3" not in (tmp_path / "f" / "c.pdf").read_bytes()  # fonts that journals refuse
    assert "msds1/b_x_2: " in capsys.readouterr().out
    for content, words in (("", "no record"), (LOG.replace("seconds", "s"), "no seconds")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=words):
            plot_log.main([str(tmp_path / "bad.jsonl"), "--time", "--fig_dir", str(tmp_path)])
    for flags in (["--labels", "one"], ["--bpd", "3"], ["--bpd", "3,3"], ["--labels", "a", "b", "--against", files[0]]):
        with pytest.raises(SystemExit):
            plot_log.main([*files, *flags])
    with pytest.raises(FileNotFoundError):
        plot_log.main([str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize(
    "content",
    [
        "PK\x03\x04 no text",
        "[" * 100_000 + "\n",
        '{"kind": [], "step": 1, "bpd": 3}\n',
        '{"kind": "train", "step": 1, "bpd": "3"}\n',
        '{"kind": "train", "step": 0, "bpd": 3}\n',
        '{"kind": "train", "step": 1, "bpd": 1e999}\n',
        '{"kind": "test", "step": true, "bpd": 3}\n',
        '{"kind": "test", "step": 1, "bpd": 3, "bpd_stderr": "0"}\n',
        '{"kind": "test", "step": 1, "bpd": 3}',
    ],
)
def test_a_file_that_is_no_log(tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"out\.jsonl: no record with bits per dimension"):
        plot_log.main([str(tmp_path / "out.jsonl"), "--fig_dir", str(tmp_path)])


def test_names_of_runs(tmp_path):
    assert run_name(tmp_path / "msds1" / "nl4" / "out_b.jsonl") == "msds1/nl4_b"
    assert run_name(tmp_path / "weights" / "msds1_laplace.jsonl") == "msds1_laplace"


def log_of(kind, bpds, **more):
    """A run as `plot_log.read` gives it; bpds: {step: bits per dimension}."""
    records = [{"kind": kind, "step": step, "bpd": bpd, **more} for step, bpd in bpds.items()]
    return {"train": [], "test": [], kind: records}


def test_runs_at_the_steps_of_both():
    tests = [log_of("test", bpds) for bpds in ({1000: 4.0, 1500: 3.5, 2000: 3.0}, {2000: 3.25, 1000: 4.5, 2500: 3.0})]
    kind, steps, bpds = plot_log.compare(*tests)
    assert (kind, steps.tolist(), bpds.tolist()) == ("test", [1000, 2000], [[4.0, 3.0], [4.5, 3.25]])
    # Without a common test: one log of every step, one of means over ten steps.
    values = np.random.default_rng(0).normal(4, 1, 450)
    single = log_of("train", {n + 1: value for n, value in enumerate(values)})
    means = log_of("train", {step: values[step - 10 : step].mean() + 0.5 for step in range(10, 451, 10)})
    kind, steps, bpds = plot_log.compare({**single, "test": tests[0]["test"]}, means)
    assert kind == "train"
    assert steps.tolist() == list(range(30, 451, 30))
    expected = [values[step - 30 : step].mean() for step in steps]
    np.testing.assert_allclose(bpds, [expected, np.array(expected) + 0.5])
    assert len(plot_log.compare(tests[0], means)[1]) == 0


@pytest.mark.parametrize(
    "own, spread, word",
    [
        (3.08, 0.031, "on track"),
        (2.92, 0.031, "on track"),
        (3.09, 0.031, "behind"),
        (2.91, 0.031, "ahead"),
        (3.03, 0.01, "behind"),
    ],
)
def test_verdict(own, spread, word):
    """Two of 2.83 standard deviations of one run: those of the difference of two."""
    sentence = plot_log.verdict(2000, own, 3.0, spread)
    assert sentence.startswith(f"{word}: {own:.4f} against 3.0000 after 2,000 steps ({own - 3:+.4f};")


def test_a_log_against_another(tmp_path, capsys):
    own, other = tmp_path / "msds1" / "net" / "out.jsonl", tmp_path / "msds1_laplace.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text(LOG.replace('"bpd": 4.0', '"bpd": 4.0, "lr": 0.001'))
    other.write_text(LOG.replace('"bpd": 4.0', '"bpd": 4.0, "lr": 0.002').replace("4.5", "4.0"))
    argv = [str(own), "--against", str(other), "--fig_dir", str(tmp_path / "f")]
    plot_log.main(argv)
    *_, head, columns, row, sentence, note = capsys.readouterr().out.splitlines()
    assert head.startswith("msds1/net (yours) against msds1_laplace (theirs), bits per dimension of the test images")
    assert columns.split() == ["step", "yours", "theirs", "difference"]
    assert row.split() == ["5", "4.5000", "4.0000", "+0.5000"]
    assert sentence.startswith("behind: 4.5000 against 4.0000 after 5 steps (+0.5000")
    assert "0.001 and 0.002" in note
    assert (tmp_path / "f" / "log.png").exists()
    other.write_text(LOG.replace('"step": 5', '"step": 4'))
    plot_log.main(argv)
    *_, head, _, first, second, sentence = capsys.readouterr().out.splitlines()
    assert "of training" in head
    assert (first.split()[0], second.split()[0]) == ("1", "3")
    assert sentence.startswith("on track: 6.0000 against 6.0000 after 3 steps (+0.0000")
    other.write_text('{"kind": "train", "step": 2, "bpd": 8.0, "seconds": 1}\n')
    with pytest.raises(UserError, match=r"out\.jsonl and .*msds1_laplace\.jsonl: no step at which both"):
        plot_log.main(argv)


@pytest.fixture
def draw(weights, images, tmp_path, capsys):
    """Run a script's main with flags; returns the paths and the caption that it prints."""

    def draw(script, name, flags=""):
        own = ["--weights", weights[name], "--data_path", str(images), "--fig_dir", str(tmp_path / "f")]
        script.main([*own, *flags.split()])
        lines = capsys.readouterr().out.splitlines()
        paths = [line for line in lines if line.startswith(str(tmp_path))]
        return paths, lines[-1]

    return draw


@pytest.mark.parametrize(
    "script, flags, name, words",
    [
        (plot_samples, "--temperature 0.9 --grid 2", "samples_T0.9", ["4 samples", "T = 0.9"]),
        (plot_samples, "--temperature 0.2,1 --grid 2 --draw_seed 3", "samples_T0.2,1_seed3", ["T = 0.2,1", "seed 3"]),
        (plot_samples, "--real --grid 2", "real", ["4 test images of folder"]),
        (plot_mixing, "--images 2,5", "mixing_2,5", ["A = 2, B = 5"]),
        (plot_mixing, "--linear", "mixing_linear", ["A = 0, B = 1"]),
        (plot_mixing, "--grid 2,3 --images 5,4,3,2,1", "mixing_grid_theta1_5,4,3,2,1", ["h >= 1 of 5,4", "of 3,2,1"]),
        (plot_mixing, "--grid 2,3 --theta 2", "mixing_grid_theta2", ["h >= 2 of 0,1", "h < 2 of 2,3,4"]),
    ],
)
@pytest.mark.parametrize("model", ["realnvp", "grey"])
def test_scripts(draw, model, script, flags, name, words):
    paths, caption = draw(script, model, flags)
    kind = "realnvp_laplace" if model == "realnvp" else "laplace"
    assert [path.rpartition("/")[2] for path in paths] == [
        f"{name}_folder_{kind}_nl1_nr1_nm1_nh8.{ending}" for ending in ("png", "pdf")
    ]
    assert all(word in caption for word in words)
    pixels = np.asarray(Image.open(paths[0]).convert("RGB")).astype(int)
    assert (pixels.std(axis=(0, 1)) > 5).all()
    assert (pixels.max(-1) == pixels.min(-1)).all() == (model == "grey")


def test_generation_script(draw):
    (png, _), caption = draw(plot_generation, "rgflow", "--samples 2")
    assert png.endswith("/generation_T1_folder_laplace_nl1_nr1_nm1_nh8.png")
    assert "2 samples" in caption and "4x4 at h = 1" in caption
    with pytest.raises(UserError, match="realnvp"):
        draw(plot_generation, "realnvp")


@pytest.mark.parametrize(
    "flags, name, frames, words",
    [
        ("--frames 3 --stops 2", "walk_level1_T1", 6, "level 1"),
        ("--levels 0 --frames 3 --stops 2 --temperature 0.5", "walk_level0_T0.5", 6, "level 0"),
        ("--latents 0:1:2:0 --frames 3 --samples 2", "sweep_0-1-2-0_T1", 6, "0:1:2:0 from 0 to 6"),
        ("--latents 1:2:2:0 --range -1,2 --frames 3", "sweep_1-2-2-0_T1", 6, "1:2:2:0 from -1 to 2"),
        ("--images 1,4 --frames 4", "interpolation_1,4", 8, "1 (lambda = 1) to 4"),
    ],
)
@pytest.mark.parametrize("model", ["rgflow", "realnvp"])
def test_walks(draw, model, flags, name, frames, words):
    paths, caption = draw(plot_walk, model, flags)
    assert [path.rpartition(".")[2] for path in paths] == ["gif", "png", "pdf"]
    assert paths[0].rpartition("/")[2].startswith(f"{name}_folder_")
    assert words in caption
    with Image.open(paths[0]) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (frames, 0)


def test_the_animation_shows_its_images(draw, images):
    test = open_dataset("folder", images, 3, 8, progress=False).test
    (gif, *_), _ = draw(plot_walk, "rgflow", "--images 1,4 --frames 4")
    with Image.open(gif) as animation:
        for frame, number in ((0, 1), (4, 4)):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            times = pixels.shape[1] // 8
            shown = pixels[-8 * times :][times // 2 :: times, times // 2 :: times]
            assert np.abs(shown - test[number].transpose(1, 2, 0)).max() <= 3  # the GIF's palette
            assert (pixels[-8 * times :].reshape(8, times, 8, times, 3).std(axis=(1, 3)) == 0).all()


def test_several_sweeps(draw):
    paths, _ = draw(plot_walk, "grey", "--latents 0:1:2:0,1:0:2:0 --frames 1 --samples 5")
    assert len(paths) == 6


@pytest.mark.parametrize("model, mode", [("rgflow", "RGB"), ("realnvp", "RGB"), ("grey", "L")])
def test_reconstruction_script(draw, tmp_path, model, mode):
    shape = (8, 8) if mode == "L" else (8, 8, 3)
    rng = np.random.default_rng(1)
    pixels = {name: rng.integers(0, 256, shape).astype(np.uint8) for name in "ab"}
    for name, values in pixels.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    own = f"--file {tmp_path / 'a.png'}"
    paths, _ = draw(plot_reconstruct, model, f"{own} --json {tmp_path / 'r.json'}")
    assert len(paths) == 3 + 1  # a line of the error begins with the file
    assert (np.asarray(Image.open(paths[-1])) == pixels["a"]).all()
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["results"]["largest_error"] == record["results"]["pixel_values_off"] == 0
    assert sum(each["latents"] for each in record["results"]["energies"]) == pixels["a"].size
    paths, _ = draw(plot_reconstruct, model, f"{own} --swap 0,1 --other {tmp_path / 'b.png'}")
    assert (np.asarray(Image.open(paths[-1])) == pixels["b"]).all()
    paths, caption = draw(plot_reconstruct, model, f"{own} --zero 1 --scale 0=0.5 --set 1:0:0:0=-2")
    assert "edited" in caption
    assert "reconstruct_a_scale0=0.5_zero1_set1-0-0-0=-2_folder" in paths[-1]
    assert not (np.asarray(Image.open(paths[-1])) == pixels["a"]).all()


def test_files_of_another_size(draw, tmp_path):
    Image.new("RGB", (20, 12), (9, 99, 199)).save(tmp_path / "wide.png")
    own = f"--file {tmp_path / 'wide.png'}"
    with pytest.raises(UserError, match="20x12 pixels, must be 8x8"):
        draw(plot_reconstruct, "rgflow", own)
    paths, _ = draw(plot_reconstruct, "rgflow", f"{own} --resize")
    assert (np.asarray(Image.open(paths[-1])) == (9, 99, 199)).all()


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (plot_samples, "--temperature 1,1,1", r"--temperature: 1,1,1: must be one number or 2"),
        (plot_samples, "--real --grid 3", r"--grid: 3: 9 images, but the test split has 6"),
        (plot_generation, "--temperature 1,2,3", r"--temperature: 1,2,3"),
        (plot_mixing, "--images 0,6", r"--images: 6: must be in 0\.\.5"),
        (plot_mixing, "--images 0", r"--images: 0: must be 2 numbers"),
        (plot_mixing, "--grid", r"--images: 6: must be in 0\.\.5"),
        (plot_mixing, "--grid 2,2 --theta 3", r"--theta: 3: must be in 0\.\.2"),
        (plot_mixing, "--grid 2", r"--grid: 2: must be two numbers"),
        (plot_mixing, "--theta 1", r"--theta: 1: only with --grid"),
        (plot_walk, "--levels 0,2", r"--levels: 2: must be in 0\.\.1"),
        (plot_walk, "--latents 0:4:4:0", r"--latents: 0:4:4:0: row 4, column 4 is at level 1"),
        (plot_walk, "--latents 1:0:0:3", r"--latents: 1:0:0:3: the channel must be in 0\.\.2"),
        (plot_walk, "--latents 1:0:0:0 --range 3", r"--range: 3: must be two numbers"),
        (plot_walk, "--images 7,0", r"--images: 7: must be in 0\.\.5"),
        (plot_walk, "--images 7", r"--images: 7: must be two numbers"),
        (plot_reconstruct, "--file a.png --zero 2", r"--zero: 2: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --scale 2=1", r"--scale: 2: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --swap 5 --other b.png", r"--swap: 5: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --swap 1", r"--swap: 1: goes together with --other"),
        (plot_reconstruct, "--file a.png --set 1:9:0:0=1", r"--set: 1:9:0:0: row and column must be in 0\.\.7"),
    ],
)
def test_what_does_not_exist_is_refused(draw, tmp_path, script, flags, words):
    with pytest.raises(UserError, match=words):
        draw(script, "rgflow", flags)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (plot_mixing, "--grid 2,2 --linear", "not allowed with"),
        (plot_walk, "--stops 1", "at least 2"),
        (plot_walk, "--levels 1 --images 0,1", "not allowed with"),
        (plot_walk, "--latents 1:2:3", "level:row:column:channel"),
        (plot_reconstruct, "--file a --scale 2", "something = a number"),
        (plot_reconstruct, "--file a --scale 2=x", "'x'"),
        (plot_reconstruct, "", "--file"),
    ],
)
def test_flags_that_cannot_be_read(script, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(flags.split())
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_status_of_a_refusal(weights):
    done = command("plot_walk.py", "--weights", weights["rgflow"], "--levels", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --levels: 4: must be in 0..1\n"
