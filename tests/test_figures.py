"""The arrays behind the figures, compared with images and formulas; the scripts, from flags to files."""

import json
import re

import numpy as np
import pytest
import torch
from checks import bytes_of, random_images, small
from PIL import Image
from runs import SMALL, call

import effects
import pinwheel
import plot_cones
import plot_factors
import plot_generation
import plot_latents
import plot_mix_temperature
import plot_mixing
import plot_receptive_fields as fields
import plot_reconstruct
import plot_samples
import plot_walk
from data import open_dataset
from flow import RealNVP, RGFlow, load
from flow.latents import decode, encode
from utils.cli import UserError
from utils.plotting import grid_figure
from utils.random import generator


@pytest.fixture(params=[RGFlow, RealNVP])
def flow(request):
    return small(request.param)


def test_mixtures_of_two_images_begin_and_end_with_them(flow):
    """Theta = 0 and lambda = 1 give the image of the high levels, the last ones that of the low levels."""
    images = random_images(2)
    rows = plot_mixing.pair_images(flow, images / 255, encode(flow, images), linear=True)
    assert rows.shape == (3, 2 + 4, 3, 16, 16)
    for row, (first, last) in zip(rows, ((0, 1), (1, 0), (0, 1)), strict=True):
        torch.testing.assert_close(row[:2] * 255, images[[first, last]].to(row))
        assert torch.equal(bytes_of(row[[2, -1]]), images[[first, last]])
        assert all((row[k] - row[k + 1]).abs().max() > 0.1 for k in range(2, 5))
    assert not torch.equal(rows[0, 3], rows[1, 4])
    assert [len(labels) for labels in plot_mixing.pair_labels(flow, linear=True)] == [3, 6]


def test_grid_of_mixtures():
    flow, images = small(), random_images(5)
    high, low, z = images[:3], images[3:], encode(flow, images)
    for theta, expected in ((0, high.expand(2, -1, -1, -1, -1)), (3, low[:, None].expand(-1, 3, -1, -1, -1))):
        panels = plot_mixing.grid_images(flow, images / 255, z, 3, theta)
        assert panels.shape == (3, 4, 3, 16, 16)
        assert (panels[0, 0] == 1).all()
        torch.testing.assert_close(panels[0, 1:] * 255, high.to(panels))
        torch.testing.assert_close(panels[1:, 0] * 255, low.to(panels))
        assert torch.equal(bytes_of(panels[1:, 1:]), expected)
    mixed = plot_mixing.grid_images(flow, images / 255, z, 3, 1)[2, 2]
    z[1, :, 1::2], z[1, :, :, 1::2] = z[4, :, 1::2], z[4, :, :, 1::2]  # odd row or column: level 0
    torch.testing.assert_close(mixed, decode(flow, z[1:2])[0])


@pytest.mark.parametrize("flags, number, first", [("--linear", 15, 0), ("--grid 1,1 --theta 1", 4, 1)])
def test_mixtures_of_samples_need_no_data(weights, tmp_path, monkeypatch, flags, number, first):
    """The samples are those of plot_samples.py."""
    grids = []
    for script in (plot_samples, plot_mixing):
        monkeypatch.setattr(script, "grid_figure", lambda images, *_: grids.append(images) or grid_figure(images, 1))
    monkeypatch.setattr(plot_mixing.flags, "open_dataset", lambda *_: pytest.fail("data are read"))
    common = "--weights", weights["rgflow"], "--fig_dir", str(tmp_path), "--draw_seed", "3", "--temperature", "0.5,0.8"
    plot_samples.main([*common, "--grid", "3"])
    plot_mixing.main([*common, "--samples", "7,2", *flags.split()])
    samples, mixtures = grids
    flow, _ = load(weights["rgflow"])
    z = flow.sample_prior(9, (0.5, 0.8), generator(3, "samples", 0))[[7, 2]]
    mixed = z[1].clone()
    mixed[:, ::2, ::2] = z[0, :, ::2, ::2]  # level 1
    expected = torch.stack([samples[7], samples[2], decode(flow, mixed[None])[0]])
    torch.testing.assert_close(mixtures[[first, first + 1, 3]], expected)
    assert len(mixtures) == number


def test_generation_is_that_of_flows_without_the_lower_levels():
    """x^(h) is what a smaller flow, of the levels from h up, makes of their latents."""
    flow = small()
    z = flow.sample_prior(2)
    for h, step in zip((2, 1, 0), plot_generation.generation(flow, z), strict=True):
        upper = small(L=16 >> h)
        upper.disentanglers, upper.decimators = flow.disentanglers[h:], flow.decimators[h:]
        expected = decode(upper, z[:, :, :: 2**h, :: 2**h])
        assert expected.std() > 0.01
        torch.testing.assert_close(step, torch.kron(expected, torch.ones(2**h, 2**h)))


@pytest.fixture
def draw(draw, images):
    def draw_from_images(script, name, flags=""):
        mixing = script is plot_mixing and "--samples" not in flags
        reading = mixing or any(flag in flags for flag in ("--real", "--images", "test:"))
        return draw(script, name, f"{flags} --data_path {images}" if reading else flags)

    return draw_from_images


@pytest.mark.parametrize(
    "script, flags, name, words",
    [
        (plot_mix_temperature, "--grid 2", "mix_temperature_{}_grid_2", ["4 samples", "T = 0.2,0.6"]),
        (plot_samples, "--temperature 0.9 --grid 2", "samples_{}_temperature_0.9_grid_2", ["4 samples", "T = 0.9"]),
        (
            plot_samples,
            "--temperature 0.2,1 --grid 2 --draw_seed 3",
            "samples_{}_draw_seed_3_temperature_0.2_1.0_grid_2",
            ["T = 0.2,1", "seed 3"],
        ),
        (plot_samples, "--real --grid 2", "real_folder_real_grid_2", ["4 test images of folder"]),
        (plot_mixing, "--images 2,5", "mixing_{}_images_2_5", ["A = 2, B = 5"]),
        (plot_mixing, "--linear", "mixing_{}_linear", ["A = 0, B = 1"]),
        (plot_mixing, "--samples 4,0", "mixing_{}_samples_4_0", ["A = 4, B = 0", "samples at T = 1, seed 0"]),
        (
            plot_mixing,
            "--grid 2,3 --images 5,4,3,2,1",
            "mixing_{}_images_5_4_3_2_1_grid_2_3",
            ["h >= 1 of 5,4", "of 3,2,1"],
        ),
        (plot_mixing, "--grid 2,3 --theta 2", "mixing_{}_grid_2_3_theta_2", ["h >= 2 of 0,1", "h < 2 of 2,3,4"]),
        (plot_generation, "--samples 2", "generation_{}_samples_2", ["2 samples", "4x4 at h = 1"]),
        (fields, "--draws 1", "receptive_fields_{}_draws_1", ["10 random", "mean of 1 draws at T = 1, seed 0"]),
        (
            fields,
            "--draws 1 --strongest --number 12 --levels 1",
            "receptive_fields_{}_strongest_number_12_levels_1_draws_1",
            ["12 strongest"],
        ),
        (
            fields,
            "--draws 1 --latents 1:0:0:0",
            "receptive_fields_{}_latents_1_0_0_0_draws_1",
            ["1 chosen latents", "1 of "],
        ),
        (
            fields,
            "--draws 1 --per_level 3 --temperature 0.5",
            "receptive_fields_{}_draws_1_per_level_3_temperature_0.5",
            [", 6 of ", "T = 0.5"],
        ),
        (fields, "--draws 1 --histogram", "strengths_{}_histogram_draws_1", ["histograms", "h = 0: "]),
        (
            fields,
            "--draws 1 --histogram --log_strength --levels 0",
            "strengths_{}_histogram_log_strength_levels_0_draws_1",
            ["histograms"],
        ),
    ],
)
@pytest.mark.parametrize("model", ["realnvp", "grey"])
def test_scripts(draw, tmp_path, model, script, flags, name, words):
    if script is plot_generation and model == "realnvp":
        with pytest.raises(UserError, match="realnvp"):
            draw(script, model, flags)
        return
    paths, caption = draw(script, model, flags)
    stem = f"{re.escape(str(tmp_path))}/f/{name.format(model)}_[0-9a-f]{{6}}"
    assert [bool(re.fullmatch(rf"{stem}\.{end}", path)) for end, path in zip(("png", "pdf"), paths, strict=True)] == [
        True
    ] * 2
    assert all(word in caption for word in words)
    pixels = np.asarray(Image.open(paths[0]).convert("RGB")).astype(int)
    assert (pixels.std(axis=(0, 1)) > 5).all()
    assert (pixels.max(-1) == pixels.min(-1)).all() == (model == "grey" and script is not fields)


def test_a_script_has_only_the_flags_that_it_uses():
    usage = call(plot_mix_temperature, "--help").stdout.partition("Draw samples")[0]
    flags = ["--weights", "--data", "--cuda", "--dtype", "--draw_seed", "--fig_dir", "--temperatures", "--grid"]
    assert re.findall(r"--\w+", usage) == flags


def test_flags_of_a_run_instead_of_weights(start, images, tmp_path):
    """From the command line and from a file, beside flags of the script."""
    run = start("--max_steps 1")
    argv = f"--data folder --data_path {images} -o {tmp_path / 'run'} {SMALL}".split()
    (tmp_path / "run.args").write_text("\n".join(argv))
    for given in (argv, [f"@{tmp_path / 'run.args'}"]):
        done = call(plot_mix_temperature, *given, "--grid", 2, "--fig_dir", tmp_path / "f")
        assert f"4 samples of {run.folder}" in done.stdout
    for given in ([*argv, "--nonsense"], ["--weights", "x", "--nlayers", "2"]):
        assert "unrecognized arguments: --n" in call(plot_mix_temperature, *given).stderr


def test_real_images_need_no_flow(draw, images, monkeypatch):
    """Different images of the test split, which the seed chooses."""
    grids = []
    monkeypatch.setattr(plot_samples, "grid_figure", lambda images, n: grids.append(images) or grid_figure(images, n))
    monkeypatch.setattr(RGFlow, "__init__", lambda *_, **__: pytest.fail("a flow is built"))
    draw(plot_samples, "rgflow", "--real --grid 2")
    run = SMALL.replace("--dtype float64", "")
    draw(plot_samples, None, f"--real --grid 2 --draw_seed 1 --data folder {run}")
    test = torch.from_numpy(open_dataset("folder", images, 3, 8).test[:])
    chosen = [{int((test == image).flatten(1).all(1).nonzero()) for image in bytes_of(grid)} for grid in grids]
    assert [len(numbers) for numbers in chosen] == [4, 4] and chosen[0] != chosen[1]
    with pytest.raises(UserError, match="--data: msds1"):
        draw(plot_samples, "rgflow", "--real --data msds1")


@pytest.mark.parametrize(
    "flags, name, frames, words",
    [
        ("--frames 3 --stops 2", "walk_{}_stops_2_frames_3", 6, "level 1"),
        (
            "--levels 0 --frames 1 --stops 2 --temperature 0.5",
            "walk_{}_levels_0_temperature_0.5_stops_2_frames_1",
            2,
            "level 0",
        ),
        (
            "--latents 0:1:2:0 --frames 3 --samples 2",
            "sweep_0-1-2-0_{}_latents_0_1_2_0_samples_2_frames_3",
            6,
            "0:1:2:0 from 0 to 6",
        ),
        (
            "--latents 1:2:2:0 --range -1,2 --frames 3",
            "sweep_1-2-2-0_{}_latents_1_2_2_0_range_-1.0_2.0_frames_3",
            6,
            "1:2:2:0 from -1 to 2",
        ),
        (
            "--latents 0:1:2:0,1:0:2:0 --frames 1 --samples 5",
            "sweep_0-1-2-0_{}_latents_0_1_2_0_1_0_2_0_samples_5_frames_1",
            2,
            "1:0:2:0 from 0 to 6",
        ),
        ("--images 1,4 --frames 4", "interpolation_{}_images_1_4_frames_4", 8, "1 (lambda = 1) to 4"),
    ],
)
@pytest.mark.parametrize("model", ["rgflow", "realnvp"])
def test_walks(draw, images, model, flags, name, frames, words):
    """As animations, in which images can be found again."""
    paths, caption = draw(plot_walk, model, flags)
    assert [path.rpartition(".")[2] for path in paths] == ["gif", "png", "pdf"] * (1 + flags.count("0,1:"))
    assert f"/{name.format(model)}_" in paths[0] and words in caption
    with Image.open(paths[0]) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (frames, 0)
        test = open_dataset("folder", images, 3, 8).test
        for frame, number in ((0, 1), (4, 4)) if "images" in flags else ():
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            times = pixels.shape[1] // 8
            squares = pixels[-8 * times :].reshape(8, times, 8, times, 3)
            assert np.abs(squares[:, 0, :, 0] - test[number].transpose(1, 2, 0)).max() <= 3  # the GIF's palette
            assert (squares.std(axis=(1, 3)) == 0).all()


@pytest.mark.parametrize("model, shape", [("rgflow", (8, 8, 3)), ("realnvp", (8, 8, 3)), ("grey", (8, 8))])
def test_reconstruction_script(draw, weights, images, tmp_path, monkeypatch, model, shape):
    monkeypatch.chdir(tmp_path)
    a, b = np.random.default_rng(1).integers(0, 256, (2, *shape)).astype(np.uint8)
    for name, values in (("a", a), ("b", b), ("wide", np.full((12, 20, 3), 99, np.uint8))):
        Image.fromarray(values).save(f"{name}.png")

    def drawn(flags):
        (_, _, pixels), caption = draw(plot_reconstruct, model, f"--file {flags}")
        return np.asarray(Image.open(pixels)), pixels + caption

    assert (drawn("a.png --json r.json")[0] == a).all()
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["largest_error"] == results["pixel_values_off"] == 0
    assert sum(each["latents"] for each in results["energies"]) == a.size
    assert (drawn("a.png --swap 0,1 --other b.png")[0] == b).all()
    pixels, words = drawn("a.png --zero 1 --scale 0=0.5 --set 1:0:0:0=-2")
    assert "edited" in words and "_file_a.png_scale_0_0.5_zero_1_set_1_0_0_0_-2.0_" in words
    assert not (pixels == a).all() and (drawn("wide.png --resize")[0] == 99).all()
    kinds = [
        drawn(f"sample:7 --temperature 0.5{flags}") for flags in ("", " --swap 0 --other sample:8 --set 1:0:0:0=2")
    ]
    flow, _ = load(weights[model])
    z, other = (flow.sample_prior(1, 0.5, generator(seed, "samples", 0)) for seed in (7, 8))
    mixed = torch.where(flow.level_map == 0, other, z)
    mixed[0, 0, 0, 0] = 2
    for (pixels, words), own in zip(kinds, (z, mixed), strict=True):
        assert (pixels == (256 * decode(flow, own)[0]).floor().numpy().transpose(1, 2, 0).reshape(shape)).all()
        assert "sample:7" in words and "largest error" not in words
    if model != "grey":
        test = open_dataset("folder", images, 3, 8).test
        assert (drawn("test:2")[0] == test[2].transpose(1, 2, 0)).all()
    with pytest.raises(UserError, match="20x12 pixels, must be 8x8"):
        drawn("wide.png")


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (plot_samples, "--temperature 1,1,1", r"--temperature: 1,1,1: must be one number or 2"),
        (plot_samples, "--real --grid 3 --data_path {images}", r"--grid: 3: 9 images, but the test split has 6"),
        (plot_mixing, "--images 0,6 --data_path {images}", r"--images: 6: must be in 0\.\.5"),
        (plot_mixing, "--images 0", r"--images: 0: must be 2 numbers, more with --grid"),
        (plot_mixing, "--samples 0 --grid 2,1", r"--samples: 0: must be 3 numbers, 2 for the high levels, then 1 for"),
        (plot_mixing, "--images 0,1", "--data: folder: needs --data_path, the folder of the images"),
        (plot_mixing, "--grid 2,2 --theta 3", r"--theta: 3: must be in 0\.\.2"),
        (plot_mixing, "--grid 2,2 --linear", "not allowed with"),
        (plot_mixing, "--samples 0,1,2", r"--samples: 0,1,2: must be 2 numbers"),
        (plot_mixing, "--samples 0,1 --images 0,1", "not allowed with"),
        (plot_mixing, "--samples 0,1 --data msds1", "--data: has no effect with --samples"),
        (plot_mixing, "--temperature 1", r"--temperature: has no effect without --samples"),
        (plot_mixing, "--theta 1", r"--theta: has no effect without --grid"),
        (plot_walk, "--levels 0,2", r"--levels: 2: must be in 0\.\.1"),
        (plot_walk, "--images 7,0 --data_path {images}", r"--images: 7: must be in 0\.\.5"),
        (plot_walk, "--stops 1", "at least 2"),
        (plot_walk, "--levels 1 --images 0,1", "not allowed with"),
        (plot_reconstruct, "--file a.png --zero 2", r"--zero: 2: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --scale 2=1", r"--scale: 2: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --swap 5 --other b.png", r"--swap: 5: must be in 0\.\.1"),
        (plot_reconstruct, "--file a.png --scale 2", "something = a number"),
        (plot_reconstruct, "--file test:6 --data_path {images}", r"--file: 6: must be in 0\.\.5"),
        (
            plot_reconstruct,
            "--file sample:1 --other test:6 --swap 0 --data_path {images}",
            r"--other: 6: must be in 0\.\.5",
        ),
        (plot_reconstruct, "--file test:x", "'x': must be a whole number"),
        (plot_reconstruct, "--file sample:1 --resize", "--resize: has no effect without a file in --file or --other"),
        (plot_reconstruct, "--file sample:1 --data folder", "--data: has no effect without a test image in --file"),
        (plot_reconstruct, "--file a.png --temperature 1", "--temperature: has no effect without a sample in --file"),
        (plot_reconstruct, "--file sample:1 --temperature 1,1,1", "--temperature: 1,1,1: must be one number or 2"),
        (plot_reconstruct, "--file a.png --swap 1", r"--swap: 1: goes together with --other"),
        (plot_reconstruct, "--file a.png --set 1:9:0:0=1", r"--set: 1:9:0:0: row and column must be in 0\.\.7"),
        (plot_cones, "--regions 23:0", r"--regions: 23:0: row and column of a 10 x 10 region must be in 0\.\.22"),
        (plot_cones, "--region_size 33", r"--region_size: 33: must be at most L, 32"),
        (plot_cones, "--latents 4:0:0:0", r"row 0, column 0 is at level 3 of 0\.\.3"),
        (plot_cones, "--L 24", "L 24"),
        (fields, "--levels 2", r"--levels: 2: must be in 0\.\.1"),
        (fields, "--latents 1:0:0:0 --levels 1", r"--levels: has no effect with --latents"),
        (effects, "--pairs 19", r"--pairs: '19': must be a whole number from 20"),
        (plot_factors, "--images 9", r"--images: '9': must be a whole number of at least 100"),
        *((pinwheel, flags, flags.split()[0]) for flags in ("--steps 0", "--seeds -1", "--json /dev/null/x.json")),
        (plot_latents, "--range 1", r"--range: '1': must be 2 numbers"),
    ],
)
def test_what_does_not_exist_is_refused(weights, images, tmp_path, script, flags, words):
    source = () if script in (plot_cones, pinwheel) else ("--weights", weights["rgflow"])
    done = call(script, *source, "--fig_dir", tmp_path / "f", *flags.format(images=images).split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and re.search(words, done.stderr)
    assert not (tmp_path / "f").exists()
