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
    path = tmp_path / "new" / "out.json"
    results.save(path, {**about, "results": [1]}, lambda record: iter([{"text": str(record["results"])}]))
    record = json.loads(path.read_text())
    assert (record["results"], record["rows"]) == ([1], [{"text": "[1]"}])


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


def test_tables_of_results_have_a_line_for_each_entry():
    first, second = {"level": 0, "a": {"b": 1.23456789, "c": None}}, {"level": 12, "a": {"b": [1, 2.0], "c": "x"}}
    assert results.table([first, second]) == ["level       0    12", "a b    1.2346  1, 2", "a c         –     x"]


def test_numbers_in_words():
    assert results.in_words([1.0]) == "1.000" and results.in_words([1.0, None]) == "–"
    assert results.in_words([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_what_is_not_finite_is_null(tmp_path):
    results.save(tmp_path / "out.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), "x", 2)}})
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": [1.5, None], "b": {"c": [None, "x", 2]}}
