"""Results on disk, in words, and the error before anything is computed."""

import json

import pytest

from args import parse, weights_parser
from utils import results


def test_a_result_says_how_to_measure_it_again(tmp_path, monkeypatch):
    about = results.about("/somewhere/bench.py", ["--L", "8"], "cpu")
    assert about["command"] == "python bench.py --L 8" and "thread" in about["machine"]
    monkeypatch.setattr("sys.argv", ["x", "a b"])
    assert results.about("bench.py", None, "cpu")["command"] == "python bench.py 'a b'"
    path, values = tmp_path / "new" / "out.json", [1.5, float("nan"), {"a": (float("inf"), "x", 2)}]
    results.save(path, {**about, "results": values}, lambda record: iter([{"text": str(record["results"][0])}]))
    record = json.loads(path.read_text())  # what is not finite is null
    assert (record["results"], record["rows"]) == ([1.5, None, {"a": [None, "x", 2]}], [{"text": "1.5"}])


FLAGS = [("json", ""), ("json", "file/out.json"), ("json", "file/folder/out.json"), ("fig_dir", "file/figures")]


@pytest.mark.parametrize("flag, name", [*FLAGS, ("fig_dir", "file")])
def test_what_cannot_be_written_is_refused_at_the_start(flag, name, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        parse(weights_parser("", pictures=True, numbers=True), [f"--{flag}", str(tmp_path / name)])
    assert stop.value.code == 2
    assert f"--{flag}: {tmp_path / name}: cannot be written" in capsys.readouterr().err
    parse(weights_parser("", pictures=True, numbers=True), [f"--{flag}", str(tmp_path / "new" / "name")])
    assert not (tmp_path / "new").exists()


def test_results_in_words():
    """Tables have a line for each entry."""
    first, second = {"level": 0, "a": {"b": 1.23456789, "c": None}}, {"level": 12, "a": {"b": [1, 2.0], "c": "x"}}
    assert results.table([first, second]) == ["level       0    12", "a b    1.2346  1, 2", "a c         –     x"]
    assert results.in_words([1.0]) == "1.000" and results.in_words([1.0, None]) == "–"
    assert results.in_words([1.0, 3.0], 1) == "2.0 ± 1.4"
