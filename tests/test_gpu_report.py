"""gpu_report.py on a CPU with a tiny network: parts that work, fail and hang, and the table of its results."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from runs import call, wait_for
from test_accelerate import TINY
from test_docs import parser_of

import gpu_report
import tables

SPEED = {"network": "n", "L": 8, "amp": "bf16", "compile": True, "grad_checkpoint": False, "warnings": []}
NUMBERS = {"ms_per_step": 49.94, "train_images_per_s": 1281.6, "train_mfu": 0.0634, "samples_per_s": 1187.2}
NUMBERS |= {"peak_memory_mib": None, "kernels_per_step": 11221}


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run gpu_report.py with parts of these flags and limits; how it ended, and what its file holds."""

    def report(**parts):
        monkeypatch.setattr(gpu_report, "PARTS", parts)
        done = call(gpu_report, *f"{TINY} --batch_size 4 --json".split(), tmp_path / "report.json")
        return done, json.loads((tmp_path / "report.json").read_text())

    return report


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(report):
    parts = {"fails": ("--repeats none", 60), "hangs": ("--exact 100000", 1), "speed": ("--profile --repeats 1", 60)}
    done, record = report(**parts)
    fails, hangs, speed = record["parts"].values()
    assert fails["error"].startswith("exit status 2\n") and "argument --repeats: 'none': must be" in fails["error"]
    assert hangs["error"].startswith("stopped after 1 s") and hangs["seconds"] < 60
    assert "error" not in speed and speed["results"][0]["kernels_per_step"] > 500
    assert speed["command"] == f"python bench.py --profile --repeats 1 --data folder {TINY} --batch_size 4"
    assert done.returncode == 0 and "thread" in record["machine"] and "cores" in record["versions"]


def test_every_part_has_flags_of_the_benchmark():
    for flags, _ in gpu_report.PARTS.values():
        parser_of("bench").parse_args(flags.split())


def test_a_part_that_is_stopped_takes_its_children_along():
    error = gpu_report.run(["sh", "-c", "echo first; sleep 999 & echo $!; wait"], 1)
    head, first, child = error.splitlines()
    assert (head, first) == ("stopped after 1 s", "first")
    wait_for(lambda: not Path(f"/proc/{child}/stat").exists() or ") Z" in Path(f"/proc/{child}/stat").read_text())
    assert gpu_report.run(["true"], 60) is None


def test_what_is_measured_stays_and_makes_a_table(report, tmp_path, capsys, monkeypatch):
    """The user stops the third part."""
    origin = {"machine": "a GPU", "versions": {"driver": "580"}, "seconds": 1.0}
    full = {**SPEED, "batch_size": 1024, "error": "out of memory", "warnings": ["no CUDA graph"]}
    results = [{**SPEED, **NUMBERS, "batch_size": 64}, full]
    way = {"dtype": "float32", "way": "graph", "steps": [1, 30]}
    ways = [
        {**way, "loss_difference": [0, 2e-7], "weight_difference": [0, 3e-6]},
        {**way, "way": "plain", "error": "no"},
    ]
    stopped = {"error": "stopped", "stopped": SystemExit(130), "results": ways}
    parts = [{**origin, "results": results}, {"error": "exit status 1"}, stopped]
    monkeypatch.setattr(gpu_report, "measure", Mock(side_effect=parts))
    done, record = report(one=("", 1), two=("", 1), three=("", 1))
    assert done.returncode == 130 and [*record["parts"]] == ["one", "two", "three"]
    tables.main([str(tmp_path / "report.json")])
    table = capsys.readouterr().out.split("## Speed, ")[1]
    assert f"| a GPU: float32 graph | 2.0e-07 [1] | 3.0e-06 [1] | 30 [1] | {record['torch']} [1] |" in table
    assert "| a GPU: float32 plain | no [1] |" in table
    cells = " [1] | ".join(["49.9", "1,282", "0.063", "1,187", "11,221", record["torch"]])
    assert f"| a GPU: n, L = 8, bf16, compiled, batch 64 | {cells} [1] |" in table
    assert "| a GPU: n, L = 8, bf16, compiled, batch 1024 | out of memory [1] |" in table
    assert "driver 580" in table and "warning: no CUDA graph" in table and f"`{record['command']}`" in table


def test_a_part_that_the_user_stops_keeps_its_results(monkeypatch):
    def run(command, seconds):
        Path(command[-1]).write_text('{"results": [1]}')
        raise SystemExit(130)

    monkeypatch.setattr(gpu_report, "run", run)
    found = gpu_report.measure([], 1)
    assert (found["results"], found["error"], found["stopped"].code) == ([1], "stopped", 130)


def test_a_report_without_results_is_skipped_with_one_sentence(report, tmp_path, capsys):
    done, _ = report(fails=("", -1))
    assert done.returncode == 1 and "report.json: no part has a result" in done.stderr
    tables.main([str(tmp_path / "report.json")])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "report.json: skipped, nothing in it belongs in a table" in captured.err
    assert "## Speed, measured by `gpu_report.py`\n\nNot measured yet." in captured.out
