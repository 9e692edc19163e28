"""evaluate.py as a user runs it: what it writes, and one sentence for each kind of bad input."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_inception import install
from runs import SMALL, command, make_images, records

import args
import evaluate
import main
import tables
from data import msds
from flow import load
from flow.preprocess import to_uint8
from utils import checkpoint, metrics
from utils.cli import UserError
from utils.random import generator


@pytest.fixture
def trained(start):
    """A run of three steps and the flags that name its weights."""
    run = start("--max_steps 3")
    return run, ["--weights", str(run.folder / "last.state"), "--data_path", run.args.data_path]


@pytest.fixture
def many_images(monkeypatch):
    """Enough random images for FID in place of the data set's; returns them."""
    images = np.random.default_rng(0).integers(0, 256, (metrics.MIN_IMAGES, 3, 8, 8), dtype=np.uint8)
    fake = SimpleNamespace(train=images, test=images[:20], fingerprint="fake", warnings=[])
    monkeypatch.setattr(args, "open_dataset", lambda *arguments: fake)
    return images


def results_of(flags, tmp_path):
    """The record of a call in this process."""
    evaluate.main([*flags, "--json", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def test_bits_and_round_trip_by_default(trained, tmp_path):
    run, flags = trained
    done = command("evaluate.py", *flags, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["kind"], record["step"], record["config"]["data"]) == ("evaluation", 3, "folder")
    assert record["command"].startswith("python evaluate.py --weights")
    results = record["results"]
    reported = records(run, "test")[-1]
    assert results["bpd_draws"][0] == reported["bpd"]
    assert len(set(results["bpd_draws"])) == 3
    assert results["bpd"] == pytest.approx(statistics.fmean(results["bpd_draws"]))
    assert results["bpd_stderr_draws"] == pytest.approx(statistics.stdev(results["bpd_draws"]) / 3**0.5)
    assert results["bpd_stderr"] == pytest.approx(reported["bpd_stderr"], rel=0.1)
    assert results["images"] == results["round_trip_images"] == 6
    assert results["round_trip"]["float64"]["data"]["image"] < 1e-10 < results["round_trip"]["float32"]["data"]["image"]
    assert [len(each["levels"]) for each in results["round_trip"]["float32"].values()] == [2, 2]
    assert "fid" not in results
    assert results["warnings"] == []
    assert f"{results['bpd']:.4f}" in done.stdout


def test_real_nvp(start, tmp_path):
    run = start("--model realnvp --prior gaussian --max_steps 2")
    flags = ["--weights", str(run.folder / "last.state"), "--data_path", run.args.data_path]
    record = results_of(flags, tmp_path)
    results = record["results"]
    assert results["bpd_draws"][0] == records(run, "test")[-1]["bpd"]
    assert results["round_trip"]["float64"]["samples"]["image"] < 1e-10
    assert [len(each["levels"]) for each in results["round_trip"]["float32"].values()] == [2, 2]
    (entry,) = tables.TABLES[1].entries({**record, "file": "out.json"})
    assert (entry.row, entry.column) == ("Real NVP", "folder BPD")
    assert "realnvp_nl1_nr1_nm1_nh8" in entry.source.line[0]


def test_each_measurement_can_be_chosen(trained, tmp_path):
    _, flags = trained
    bits = results_of([*flags, "--draws", "1", "--round_trip", "0"], tmp_path)["results"]
    assert bits["bpd_stderr_draws"] is None
    assert "round_trip" not in bits
    trip = results_of([*flags, "--draws", "0", "--round_trip", "4"], tmp_path)["results"]
    assert "bpd" not in trip
    assert trip["round_trip_images"] == 4
    other = results_of([*flags, "--draws", "1", "--round_trip", "0", "--draw_seed", "1"], tmp_path)["results"]
    assert other["bpd"] != bits["bpd"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--draws", "0", "--round_trip", "0"])
    assert stop.value.code == 2


def test_structure_of_samples(tmp_path, monkeypatch):
    """Drawn images in place of samples score 1; those of the flow, noise after three steps, have no ovals."""
    monkeypatch.setattr(msds, "SIZES", (60, 120))
    small = SMALL.replace("--L 8", "").split()
    run = main.Run(args.get_args(["--data", "msds1", "--data_path", str(tmp_path), "-o", str(tmp_path), *small]))
    run.total_steps = 3
    run.train()
    flags = ["--weights", str(run.folder / "last.state"), "--data_path", str(tmp_path), "--draws", "0"]
    flags += ["--round_trip", "0", "--structure", "100", "--temperature", "0.9"]
    noise = results_of(flags, tmp_path)["results"]["structure"]
    assert (noise["samples"], noise["temperature"]) == (100, 0.9)
    assert noise["score"] is None and "cells" in noise["failure"]
    drawn, _, _ = msds.generate(1, 5, 0, 100, processes=1)
    monkeypatch.setattr(evaluate.evaluation, "sample_uint8", lambda *arguments: torch.from_numpy(drawn))
    real = results_of(flags, tmp_path)["results"]["structure"]
    assert real["score"] == pytest.approx(1, abs=0.1)
    assert real["calibration"]["degrees"] < 5
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--structure", "99"])


def test_fid_is_that_of_the_samples(trained, many_images, tmp_path, monkeypatch):
    """Against numpy's moments of projections of images that are drawn here, batch by batch."""
    run, flags = trained
    weights, matrix = install(monkeypatch, tmp_path, 192)
    flags += ["--fid", "--samples", "2100", "--temperature", "0.2,0.6", "--feature_weights", str(weights)]
    record = results_of([*flags, "--draws", "0", "--round_trip", "0"], tmp_path)
    flow, _ = load(run.folder / "last.state")
    samples = [
        to_uint8(flow.sample(n, (0.2, 0.6), generator(0, "samples", start)))
        for start, n in [*((250 * k, 250) for k in range(8)), (2000, 100)]
    ]
    features = [np.reshape(each, (len(each), -1)) @ matrix for each in (torch.cat(samples).numpy(), many_images)]
    means, covariances = (
        [function(each) for each in features] for function in (lambda f: f.mean(0), lambda f: np.cov(f.T))
    )
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum().real
    assert record["results"]["fid"] == pytest.approx(expected, rel=1e-6)
    settings = record["results"]["fid_settings"]
    assert (settings["samples"], settings["images"], settings["split"]) == (2100, 2048, "train")
    assert (settings["temperature"], settings["seed"]) == ([0.2, 0.6], 0)
    assert settings["feature_weights"] == weights.name
    assert any("not those of the FID literature" in warning for warning in record["results"]["warnings"])


def test_fid_of_grey_images(start, tmp_path, monkeypatch):
    run = start("--max_steps 1 --nchannels 1")
    grey = np.random.default_rng(0).integers(0, 256, (metrics.MIN_IMAGES, 1, 8, 8), dtype=np.uint8)
    fake = SimpleNamespace(train=grey, test=grey[:20], fingerprint="fake", warnings=[])
    monkeypatch.setattr(args, "open_dataset", lambda *arguments: fake)
    weights, _ = install(monkeypatch, tmp_path, 192)
    flags = ["--weights", str(run.folder / "last.state"), "--fid", "--samples", "2048", "--draws", "1"]
    results = results_of([*flags, "--feature_weights", str(weights)], tmp_path)["results"]
    assert results["fid"] > 0
    assert results["images"] == 20


def test_too_few_images_for_fid(trained, many_images, tmp_path, monkeypatch, capsys):
    _, flags = trained
    weights, _ = install(monkeypatch, tmp_path, 192)
    flags += ["--fid", "--feature_weights", str(weights)]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*flags, "--samples", "2047"])
    assert stop.value.code == 2
    assert "--samples: 2047: must be at least 2048" in capsys.readouterr().err
    with pytest.raises(UserError, match="test split has 20 images, 2048 are needed"):
        evaluate.main([*flags, "--split", "test"])


def test_another_fingerprint_is_a_warning_in_the_result(trained, tmp_path, capsys):
    run, flags = trained
    make_images(tmp_path / "others")
    (tmp_path / "others" / "test" / "0.png").unlink()
    record = results_of([*flags[:2], "--data_path", str(tmp_path / "others")], tmp_path)
    (warning,) = record["results"]["warnings"]
    assert run.dataset.fingerprint in warning
    assert record["results"]["data_fingerprint"] in warning
    assert record["results"]["data_fingerprint"] != run.dataset.fingerprint
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert record["results"]["images"] == 5


def test_weights_that_give_no_finite_bpd(trained, tmp_path):
    _, flags = trained
    state = checkpoint.read(flags[1])
    for name, tensor in state["model"].items():
        if name.startswith("decimators.1"):
            tensor.mul_(1e200)
    checkpoint.save(tmp_path / "wild.state", state)
    with pytest.raises(UserError, match=r"wild\.state: BPD of test images is not finite, first at level h = 1"):
        evaluate.main(["--weights", str(tmp_path / "wild.state"), *flags[2:]])


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--weights", "{tmp}/none.state"], 1, ["none.state", "no such file"]),
        (["--weights", "{tmp}/text.state"], 1, ["text.state", "damaged"]),
        (["--weights", "{weights}", "--data_path", "{tmp}/nothing"], 1, ["--data_path", "nothing"]),
        (["--weights", "{weights}", "--data_path", "{tmp}/empty"], 1, ["empty", "no image"]),
        (["--weights", "{weights}", "--data", "msds1"], 1, ["--data msds1", "folder"]),
        (["--weights", "{weights}", "--json", "{tmp}/text.state/out.json"], 2, ["--json", "text.state/out.json"]),
        (["--weights", "{weights}", "--temperature", "1,1,1"], 2, ["--temperature", "2, one per level"]),
        (["--weights", "{weights}", "--structure", "9"], 2, ["--structure: 9", "msds1 and msds2", "folder"]),
        (
            ["--weights", "{weights}", "--fid", "--feature_weights", "{tmp}/none.pth"],
            1,
            ["--fid", "none.pth", "No such"],
        ),
        (["--weights", "{weights}", "--fid", "--feature_weights", "{tmp}/text.state"], 1, ["--fid", "text.state"]),
        (["--weights", "{weights}", "--draws", "-1"], 2, ["--draws", "at least 0"]),
    ],
)
def test_bad_input(arguments, status, words, trained, tmp_path, monkeypatch, capsys):
    run, _ = trained
    (tmp_path / "text.state").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "weights": run.folder / "last.state"}
    argv = [argument.format(**places) for argument in arguments]
    monkeypatch.setattr(args, "leave_on_signals", lambda: None)
    with pytest.raises(SystemExit) as stop:
        args.script(lambda: evaluate.main(argv))
    message = capsys.readouterr().err
    if status == 1:
        message += f"{stop.value.code}\n"  # Python prints it and exits with 1
        assert isinstance(stop.value.code, str)
    else:
        assert stop.value.code == status
    assert message.count("\n") == 1
    for word in words:
        assert word in message
