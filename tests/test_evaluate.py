"""evaluate.py as a user runs it: what it writes, and one sentence for each kind of bad input."""

import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import call, make_images, records
from test_effects import train
from test_metrics import install

import args
import evaluate
from data import msds
from flow import evaluation, load
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
def measure(tmp_path):
    """Run evaluate.py in this process; returns what it records."""

    def measure(flags, more=""):
        evaluate.main([*flags, *more.split(), "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())

    return measure


NAMES = [("", "RG-Flow", "RG-Flow, Laplacian"), ("--model realnvp --prior gaussian", "Real NVP", "Real NVP, Gaussian")]


@pytest.mark.parametrize("flags, model, flow", NAMES)
def test_bits_and_round_trip_by_default(start, tmp_path, flags, model, flow):
    run = start(f"{flags} --max_steps 3")
    argv = "--weights", run.folder / "last.state", "--data_path", run.args.data_path, "--json", tmp_path / "out.json"
    done = call(evaluate, *argv)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["kind"], record["step"], record["config"]["data"]) == ("evaluation", 3, "folder")
    assert record["command"].startswith("python evaluate.py --weights")
    results, reported = record["results"], records(run, "test")[-1]
    assert results["bpd_draws"][0] == reported["bpd"] and len(set(results["bpd_draws"])) == 3
    assert results["bpd"] == pytest.approx(statistics.fmean(results["bpd_draws"]))
    assert results["bpd_stderr_draws"] == pytest.approx(statistics.stdev(results["bpd_draws"]) / 3**0.5)
    assert results["bpd_stderr"] == pytest.approx(reported["bpd_stderr"], rel=0.1)
    assert results["images"] == results["round_trip_images"] == 6
    single, double = (results["round_trip"][dtype] for dtype in ("float32", "float64"))
    assert double["data"]["image"] < 1e-10 < single["data"]["image"] and double["samples"]["image"] < 1e-10
    assert [len(each["levels"]) for each in single.values()] == [2, 2]
    assert "fid" not in results and f"{results['bpd']:.5g}" in done.stdout
    assert (results["warnings"], results["compile"], results["amp"]) == ([], False, "none")
    folder = f"folder {run.args.data_path.rpartition('/')[2]}"
    names = [("G1", model), ("round trip", f"{folder}: {flow} prior")]
    assert [(row["table"], row["row"]) for row in record["rows"]] == names
    assert record["rows"][0]["cells"] == {f"{folder} BPD": f"{results['bpd']:.3f}"}


def test_the_round_trip_is_without_tf32(monkeypatch):
    allowed, matmul = [], torch.backends.cuda.matmul
    monkeypatch.setattr(evaluation, "round_trip_errors", lambda *_: allowed.append(matmul.allow_tf32))
    chosen = SimpleNamespace(draws=0, round_trip=1, structure=0, fid=False, temperature=1.0, draw_seed=0, amp="tf32")
    args.allow_tf32(True)
    list(evaluate.measure(chosen, None, SimpleNamespace(test=[0]), None, None))
    assert allowed == [False, False] and matmul.allow_tf32
    args.allow_tf32(False)


def test_each_measurement_can_be_chosen(trained, measure):
    _, flags = trained
    bits = measure(flags, "--draws 1 --round_trip 0")["results"]
    assert bits["bpd_stderr_draws"] is None and "round_trip" not in bits
    record = measure(flags, "--draws 0 --round_trip 4")
    assert "bpd" not in record["results"] and record["results"]["round_trip_images"] == 4
    assert [row["table"] for row in record["rows"]] == ["round trip"]
    assert measure(flags, "--draws 1 --round_trip 0 --draw_seed 1")["results"]["bpd"] != bits["bpd"]


def test_structure_of_samples(tmp_path, monkeypatch, measure):
    """Drawn images in place of samples score 1; those of the flow, noise after three steps, have no ovals."""
    monkeypatch.setattr(msds, "SIZES", (60, 120))
    weights = train(tmp_path, "--data msds1 --max_steps 3")
    flags = f"--weights {weights} --data_path {tmp_path / 'datasets'} --draws 0 --round_trip 0 --structure 100".split()
    flags += ["--temperature", "0.9"]
    noise = measure(flags)["results"]["structure"]
    assert (noise["samples"], noise["temperature"], noise["score"]) == (100, 0.9, None) and "cells" in noise["failure"]
    drawn, _, _ = msds.generate(1, 5, 0, 100, processes=1)
    monkeypatch.setattr(evaluation, "sample_uint8", lambda *arguments: torch.from_numpy(drawn))
    real = measure(flags)["results"]["structure"]
    assert real["score"] == pytest.approx(1, abs=0.1) and real["calibration"]["degrees"] < 5
    with pytest.raises(UserError, match="--structure: 99: must be 0 or at least 100"):
        evaluate.main([*flags, "--structure", "99"])


def test_fid_is_that_of_the_samples(trained, tmp_path, monkeypatch, measure):
    """Compared with numpy's moments of projections of images that are drawn here, batch by batch."""
    run, flags = trained
    images = np.random.default_rng(0).integers(0, 256, (metrics.MIN_IMAGES, 3, 8, 8), dtype=np.uint8)
    fake = SimpleNamespace(train=images, test=images[:20], fingerprint="fake", warnings=[])
    monkeypatch.setattr(args, "open_dataset", lambda *arguments: fake)
    weights, matrix = install(monkeypatch, tmp_path, 192)
    flags += ["--fid", "--samples", "2100", "--temperature", "0.2,0.6", "--feature_weights", str(weights)]
    results = measure(flags, "--draws 0 --round_trip 0")["results"]
    flow, _ = load(run.folder / "last.state")
    samples = [flow.sample(min(250, 2100 - k), (0.2, 0.6), generator(0, "samples", k)) for k in range(0, 2100, 250)]
    samples = [to_uint8(each) for each in samples]
    features = [np.reshape(each, (len(each), -1)) @ matrix for each in (torch.cat(samples).numpy(), images)]
    means, covariances = [each.mean(0) for each in features], [np.cov(each.T) for each in features]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]))
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum().real
    assert results["fid"] == pytest.approx(expected, rel=1e-6)
    expected = {"samples": 2100, "images": 2048, "split": "train", "temperature": [0.2, 0.6], "seed": 0}
    assert {**expected, "feature_weights": weights.name}.items() <= results["fid_settings"].items()
    assert any("not those of the FID literature" in warning for warning in results["warnings"])
    with pytest.raises(UserError, match="--samples: 2047: must be at least 2048"):
        evaluate.main([*flags, "--samples", "2047"])
    with pytest.raises(UserError, match="test split has 20 images, 2048 are needed"):
        evaluate.main([*flags, "--split", "test"])


def test_another_fingerprint_is_a_warning_in_the_result(trained, tmp_path, capsys, measure):
    run, flags = trained
    make_images(tmp_path / "others")
    (tmp_path / "others" / "test" / "0.png").unlink()
    results = measure([*flags[:2], "--data_path", str(tmp_path / "others")])["results"]
    (warning,) = results["warnings"]
    assert run.dataset.fingerprint in warning and results["data_fingerprint"] in warning
    assert results["data_fingerprint"] != run.dataset.fingerprint and results["images"] == 5
    assert f"warning: {warning}\n" in capsys.readouterr().err


def test_images_of_another_data_set_than_that_of_the_training(start, tmp_path, monkeypatch, capsys, measure):
    """They are measured, and the row says so; so it does for another folder."""
    monkeypatch.setattr(msds, "SIZES", (2, 5))
    run, path = start("--L 32 --max_steps 1"), ["--data_path", str(tmp_path)]
    flags, name = ["--weights", str(run.folder / "last.state")], run.args.data_path.rpartition("/")[2]
    record = measure([*flags, *path], "--data msds1 --round_trip 0 --structure 0")
    images = torch.from_numpy(np.load(tmp_path / "prepared_arrays" / "msds1_3x32x32" / "test.npy"))
    assert record["results"]["images"] == len(images) == 5
    assert record["results"]["bpd_draws"][0] == evaluation.bits_per_dim_of_all(run.flow.eval(), images.numpy()).mean()
    warning = f"--data msds1: the images are of MSDS1, the flow was trained on folder {name}"
    assert record["results"]["warnings"] == [warning]
    assert capsys.readouterr().err.count("warning: ") == 1
    (row,) = record["rows"]
    assert (row["table"], row["row"]) == ("B1", f"RG-Flow (trained on folder {name}), Laplacian prior")
    assert list(row["cells"]) == ["MSDS1 BPD"] and row["details"].endswith(f"warning: {warning}")
    make_images(tmp_path / "others")
    (tmp_path / "others" / "test" / "0.png").unlink()
    record = measure([*flags, "--data_path", str(tmp_path / "others")], "--draws 1 --round_trip 0")
    assert record["rows"][0]["row"] == "RG-Flow (trained on other images)"


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
    "flags, status, words",
    [
        ("--amp bf16", 2, ["--amp: bf16", "must be float32"]),
        ("--data_path {tmp}/nothing", 1, ["--data_path", "nothing"]),
        ("--data_path {tmp}/empty", 1, ["empty", "holds no files"]),
        ("--data mnist32", 2, ["--data: mnist32", "1 x 32 x 32, must be of 3 x 8 x 8 for", "rgflow.state"]),
        ("--json {tmp}/text.state/out.json", 2, ["--json", "text.state/out.json"]),
        ("--temperature 1,1,1 --fid", 2, ["--temperature", "2, one per level"]),
        ("--structure 9", 2, ["--structure: 9", "msds1 and msds2", "folder"]),
        ("--draws 0 --round_trip 0", 2, ["nothing to measure"]),
        ("--fid --feature_weights {tmp}/none.pth", 1, ["--fid", "none.pth", "No such"]),
        ("--fid --feature_weights {tmp}/text.state", 1, ["--fid", "text.state"]),
    ],
)
def test_bad_input(flags, status, words, weights, tmp_path):
    (tmp_path / "text.state").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    done = call(evaluate, "--weights", weights["rgflow"], *flags.format(tmp=tmp_path).split())
    assert done.returncode == status and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
