"""Results on disk and the error before anything is computed."""

import json

import pytest

from args import build_parser, get_args
from utils import results


def test_a_result_says_how_to_measure_it_again(tmp_path):
    about = results.about("/somewhere/bench.py", ["--L", "8"], "cpu")
    assert about["command"] == "python bench.py --L 8"
    assert "thread" in about["machine"]
    path = tmp_path / "new" / "out.json"
    get_args(["--json", str(path)], build_parser("", numbers=True))
    assert not path.parent.exists()
    results.save(path, {**about, "results": [1]})
    assert json.loads(path.read_text())["results"] == [1]


@pytest.mark.parametrize("name", ["", "file/out.json", "file/folder/out.json"])
def test_unwritable_files_are_refused_at_the_start(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        get_args(["--json", str(tmp_path / name)], build_parser("", numbers=True))
    assert stop.value.code == 2
    assert f"--json: {tmp_path / name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/figures"])
def test_unwritable_folders_of_pictures_are_refused_at_the_start(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        get_args(["--fig_dir", str(tmp_path / name)], build_parser("", pictures=True))
    assert stop.value.code == 2
    assert f"--fig_dir: {tmp_path / name}: cannot be written" in capsys.readouterr().err
    get_args(["--fig_dir", str(tmp_path / "new" / "figures")], build_parser("", pictures=True))
    assert not (tmp_path / "new").exists()


def test_what_is_not_finite_is_null(tmp_path):
    results.save(tmp_path / "out.json", {"a": [1.5, float("nan")], "b": {"c": (float("inf"), "x", 2)}})
    assert json.loads((tmp_path / "out.json").read_text()) == {"a": [1.5, None], "b": {"c": [None, "x", 2]}}
