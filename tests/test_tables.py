"""tables.py on results written here by hand: which number stands in which cell, and what is skipped."""

import json
from unittest.mock import Mock

import pytest
from runs import call
from test_plot_log import log_file

import effects
import evaluate
import pinwheel
import plot_factors
import tables
from args import get_args
from utils.cli import UserError
from utils.results import inpainting_rows, row

FLOW = {"weights": "a|b.state", "parameters": 185516800, "step": 3000, "network": "n"}
FLOW["config"] = vars(get_args(["--data", "msds1", "--nlayers", "4"]))
BITS = {"bpd": 3.14159, "bpd_stderr": 0.0018, "bpd_draws": [3.1, 3.2], "images": 10_000}
FID = {"fid": 31.27, "kid_mean": 0.0123, "kid_std": 0.0004, "precision": 0.61, "recall": 0.42}
FID["fid_settings"] = {"samples": 50_000, "images": 9, "temperature": 0.9, "split": "train", "version": "0.4.0"}
FID["fid_settings"] |= {"library": "torch-fidelity", "feature_weights": "inception.pth"}
ABOUT = {"command": "python evaluate.py --weights a|b.state", "machine": "a fast one", "commit": "abc1234"}
STRUCTURE, LAPLACE = "Structure of MSDS samples", "RG-Flow, Laplacian prior"


def with_rows(rows, **record):
    record = {**ABOUT, **record}
    return {**record, "rows": list(rows(record))}


def record(results=BITS, kind="evaluation", rows=evaluate.rows, seconds=3661.2, step=3000, **config):
    trained = {**FLOW, "config": {**FLOW["config"], **config}, "step": step, "train_seconds": seconds}
    results = {"warnings": [], **results} if isinstance(results, dict) else results
    return with_rows(rows, kind=kind, **trained, trained_on="a slow one", results=results)


@pytest.fixture
def make(tmp_path, capsys):
    """Write records to files of these names and run tables.py; returns {(title, row, column): cell}, the lists of
    sources {title: rows of cells} and the warnings, which must be `number`. Titles are cut at their colon."""

    def make(number=0, **records):
        folder, cells, sources = tmp_path / "results", {}, {}
        folder.mkdir(exist_ok=True)
        for name, content in records.items():
            content = json.dumps(content) if isinstance(content, (dict, list)) else content
            (folder / f"{name}.json").write_bytes(content.encode() if isinstance(content, str) else content)
        tables.main([str(folder)])
        captured = capsys.readouterr()
        for part in captured.out.split("## ")[1:]:
            title, table, *rest = part.strip().split("\n\n")
            title = title.split(":")[0]
            header, rows = ([], []) if table == "Not measured yet." else parse(table)
            names = [header[k - 1].removesuffix(", paper") if name == "ours" else name for k, name in enumerate(header)]
            for first, *line in rows:
                cells |= {(title, first, name): cell for name, cell in zip(names[1:], line, strict=True)}
            sources[title] = parse(rest[0])[1] if rest else []
        warnings = captured.err.splitlines()
        assert len(warnings) == number, warnings
        return cells, sources, warnings

    return make


def parse(text):
    """(cells of the first line, those of the lines after the second) of a Markdown table, which must be rectangular."""
    lines = [line.strip("|").replace("\\|", "¦").split("|") for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    header, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return header, rows


def filled(cells):
    """Our numbers, by where they stand."""
    return {where: text for where, text in cells.items() if "[" in text}


def test_the_papers_numbers_beside_empty_cells(make):
    cells, sources, (warning,) = make(1)
    for table, name, column, paper in (
        ("Table B1", "RG-Flow, Gaussian prior", "MSDS2 BPD", "1.53"),
        ("Table B1", "Real NVP", "MSDS2 FID", "78.0"),
        ("Table G1", "RG-Flow", "3D Chairs FID", "36.2"),
        ("Table G1", "Real NVP", "CIFAR-10 BPD", "3.61"),
        ("Table F1", "Constrained Real NVP", "Inception-PSNR", "15.7"),
    ):
        assert (cells[table, name, f"{column}, paper"], cells[table, name, column]) == (paper, "")
    assert not any(sources.values()) and "no .json or .jsonl file" in warning


@pytest.mark.parametrize(
    "config, table, name, column",
    [
        ({}, "Table B1", LAPLACE, "MSDS1"),
        ({"data": "msds2", "prior": "gaussian"}, "Table B1", "RG-Flow, Gaussian prior", "MSDS2"),
        ({"model": "realnvp"}, "Table B1", "Real NVP", "MSDS1"),
        ({"model": "realnvp", "prior": "gaussian", "data": "cifar10"}, "Table G1", "Real NVP", "CIFAR-10"),
        ({"data": "celeba32"}, "Table G1", "RG-Flow", "CelebA"),
        ({"data": "chair600"}, "Table G1", "RG-Flow", "3D Chairs"),
        ({"subnet": "spline"}, "Table B1", "RG-Flow with spline, Laplacian prior", "MSDS1"),
        ({"kernel_size": 8}, "Table B1", "RG-Flow, 8 x 8 patches, Laplacian prior", "MSDS1"),
        ({"share_levels": True}, "Table B1", "RG-Flow, shared levels, Laplacian prior", "MSDS1"),
        ({"kernel_size": 8, "model": "realnvp"}, "Table B1", "Real NVP", "MSDS1"),
        ({"data": "celeba32", "prior": "gaussian"}, "Table G1", "RG-Flow, Gaussian prior", "CelebA"),
        ({"data": "mnist32"}, "Table G1", "RG-Flow", "MNIST"),
        ({"data": "galaxies"}, "Table G1", "RG-Flow", "galaxies"),  # of a user
    ],
)
def test_the_cell_of_an_evaluation(make, config, table, name, column):
    cells, sources, _ = make(one=record({**BITS, **FID}, **config))
    assert filled(cells) == {(table, name, f"{column} BPD"): "3.142 [1]", (table, name, f"{column} FID"): "31.3 [1]"}
    assert sum(map(len, sources.values())) == 1


def test_the_list_says_what_a_run_started_from(make):
    _, sources, _ = make(one=record(init="/home/me/first.state"), two=record(data="msds2"))
    first, second = [line[2] for title, lines in sources.items() for line in lines]
    assert "seed 0, from first.state; `" in first and "from" not in second


def test_what_the_paper_has_not_comes_last_without_a_number_of_its(make):
    cells, _, _ = make(a=record(subnet="spline"), b=record(data="celeba32", prior="gaussian"), c=record(data="mnist32"))
    spline, last = "RG-Flow with spline, Laplacian prior", {title: (row, column) for title, row, column in cells}
    assert (last["Table B1"], last["Table G1"]) == ((spline, "MSDS2 FID"), ("RG-Flow, Gaussian prior", "MNIST BPD"))
    assert cells["Table B1", spline, "MSDS1 BPD, paper"] == ""
    assert ("Table G1", "RG-Flow", "MNIST BPD, paper") not in cells


def test_structure_and_round_trip(make):
    structure = {"score": 0.4321, "failure": None, "share": 0.95, "share_real": 0.99, "between": 0.8765}
    structure |= {"samples": 2000, "temperature": 1.0, "calibration": {"degrees": 1.3, "levels": 2.5}}
    errors = {"data": {"image": 1e-5, "levels": [2e-5, 3e-4]}, "samples": {"image": 2e-5, "levels": [1e-6, None]}}
    failed = {**structure, "score": None, "failure": "all alike", "between": None}
    cells, sources, _ = make(
        one=record({"structure": structure, "round_trip": {"float32": errors}, "round_trip_images": 1000}),
        two=record({"structure": failed}, data="msds2", model="realnvp"),
    )
    names = "score", "cells with an oval", "of real images", "spread between images / real"
    line = [cells[STRUCTURE, LAPLACE, f"MSDS1 {name}"] for name in names]
    assert line == ["0.432 [1]", "95.0% [1]", "99.0% [1]", "0.88 [1]"]
    assert cells[STRUCTURE, "Real NVP, Laplacian prior", "MSDS2 score"] == "none [2]"
    (_, first, *_), (_, second, *_) = sources[STRUCTURE]
    assert "off by 1.3° and 2.5 of 256 levels" in first and "all alike" in second
    *_, images, latents = cells.items()
    place = "Largest round-trip errors, model space", f"MSDS1: {LAPLACE}"
    assert images == ((*place, "float32, images"), "2.0e-05 [1]")
    assert latents == ((*place, "float32, latents"), "not finite [1]")


def test_factors_are_averaged_over_seeds(make):
    def result(seed, probe, ratio):
        levels = (0, probe, ratio), (1, 0.01, None)
        levels = [{"factor": "global", "level": h, "probe": p, "ratio": r} for h, p, r in levels]
        return {**FLOW, "data": "msds1", "seed": seed, "levels": levels}

    results = [result(3, 0.7, 0.2), result(5, 0.9, 0.4)]
    cells, sources, _ = make(one=with_rows(plot_factors.rows, results=results, images=4000, held_out=2000))
    line = "Factors of MSDS", f"MSDS1 global, {LAPLACE}"
    expected = {(*line, "h = 0"): "0.80 ± 0.14 / 0.30 ± 0.14 [1]", (*line, "h = 1"): "0.01 ± 0.00 / – [1]"}
    assert filled(cells) == expected
    assert sources["Factors of MSDS"][0][1] == "seeds 3, 5, 4,000 training and 2,000 test images"


def test_effects_are_averaged_over_seeds_and_kept_apart_by_data(make):
    def result(seed, ovals, weight, score, data="msds1"):
        colour = {"ovals": ovals, "common": 0.9, "most": ovals + 1}
        none = {"ovals": 0.0, "common": None, "most": 0.0}
        mixing = {"theta": 3, "found": 0.875, "score": score}
        mixing |= {"global": {"high": weight, "low": 1 - weight}, "local": {"high": None, "low": None}}
        levels = [{"level": 1, "latents": 8, "colour": colour, "orientation": none}]
        return {**FLOW, "data": data, "weights": data, "seed": seed, "mixing": [mixing], "levels": levels}

    settings = {"images": 16, "pairs": 200, "range": [-3, 3], "thresholds": {"colour": 20, "orientation": 10}}
    results = [result(3, 12.0, 0.75, 0.5), result(5, 14.0, 0.25, None), result(3, 2.0, 1.0, 0.9, "msds2")]
    cells, sources, _ = make(one=with_rows(effects.rows, results=results, **settings))
    moved = "Latents of MSDS that are moved"
    assert cells[moved, f"MSDS1 colour, {LAPLACE}", "h = 1"] == "13.0 ± 1.4 / 14.0 ± 1.4 / 0.90 ± 0.00 [1]"
    assert cells[moved, f"MSDS1 orientation, {LAPLACE}", "h = 1"] == "0.0 ± 0.0 / 0.0 ± 0.0 / – [1]"
    assert cells[moved, f"MSDS2 colour, {LAPLACE}", "h = 1"] == "2.0 / 3.0 / 0.90 [2]"
    moves = "moved from -3 to 3 in 16 test images; changed: by more than 20 of 256 levels or 10°; 8 latents a level"
    assert [line[1] for line in sources[moved]] == [f"seeds 3, 5, {moves}", f"seed 3, {moves}"]
    found = [text for (title, *_), text in cells.items() if title == "Mixing of MSDS"]
    assert found[:4] == ["0.50 ± 0.35 / 0.50 ± 0.35 [1]", "– / – [1]", "– [1]", "87.5 ± 0.0 [1]"]
    assert found[4:] == ["1.00 / 0.00 [2]", "– / – [2]", "0.90 [2]", "87.5 [2]"]
    assert "200 pairs of test images" in sources["Mixing of MSDS"][0][1]


def test_pinwheel(make):
    results = [{"prior": "laplace", "quadrants": q, "axes": 0.5, "best": 0.75} for q in (0.5, 0.7)]
    cells, sources, _ = make(one=with_rows(pinwheel.rows, commit=None, config={"steps": 3000}, results=results))
    assert [*filled(cells).values()] == ["0.600 ± 0.141 [1]", "0.500 ± 0.000 [1]", "0.750 ± 0.000 [1]"]
    assert sources["Pinwheel (figure E1)"][0][1:4] == ["2 seeds, 3,000 steps each", "", ""]


def test_inpainting(make):
    def result(method="rgflow", images=15, **changes):
        one = {"method": method, "psnr_image": 36.66, "psnr_region": 26.56, "images": images, "free_latents": 1200}
        one |= {"region": [[0, 1, 10, 10]] * images, "lr": 0.1, "steps": 300, "draws": 200, "names": [*range(images)]}
        return {**one, "config": {**FLOW["config"], "data": "celeba32"}, **changes}

    def inpainting(*results, kind="inpainting"):
        return record(results, kind, inpainting_rows)

    nvp = {"weights": "nvp.state", "parameters": 5, "step": 7, "train_seconds": 60}
    nvp["config"] = {**FLOW["config"], "data": "celeba32", "model": "realnvp"}
    free = result("realnvp", free_latents=3072, psnr_image=31.0, **nvp)
    cells, sources, _ = make(one=inpainting(result(), result("realnvp_constrained", **nvp), free))
    assert [text for (title, *_), text in cells.items() if title == "Table F1"] == [
        *("38.7", "36.7 [1]", "24.9", "", "26.6 [1]", "1,200 [1]"),
        *("23.2", "36.7 [2]", "15.7", "", "26.6 [2]", "1,200 [2]"),
        *("37.0", "31.0 [2]", "24.8", "", "26.6 [2]", "3,072 [2]"),
    ]
    words = "RG-Flow: PSNR 36.66 dB, 26.56 dB in the region, 1200 free latents; 15 images, 10 x 10, lr 0.1, 300 steps"
    assert sources["Table F1"][0][1] == f"{words}, 200 draws"
    assert "realnvp_laplace" in sources["Table F1"][1][2] and sources["Table F1"][1][3:6] == ["5", "7", "0:01:00"]
    elsewhere = {**FLOW["config"], "trained_data": "MNIST"}
    rows = inpainting(result(config=elsewhere), result("realnvp", config=elsewhere))["rows"]
    names = [f"{model} (trained on MNIST), MSDS1" for model in ("RG-Flow", "Real NVP")]
    assert [each["row"] for each in rows] == names and "Real NVP (trained on MNIST): PSNR" in rows[1]["details"]
    # More images win a cell, files of a user's own and measurements of speed belong in none.
    many, few = result(config=FLOW["config"]), result(config=FLOW["config"], images=1, psnr_image=50.0)
    own, speed = inpainting(result(names=["photo.png"])), inpainting({"L": 32}, kind="inpainting_speed")
    cells, _, warnings = make(2, one=inpainting(many), two=inpainting(few), own=own, speed=speed)
    assert filled(cells)["Table F1", "RG-Flow, MSDS1", "PSNR"] == "36.7 [1]" and len(filled(cells)) == 3
    assert "own.json" in warnings[0] and "speed.json" in warnings[1]


def test_the_source_of_a_number(make):
    _, sources, _ = make(one=record({**BITS, **FID, "warnings": ["another fingerprint"]}))
    details = "BPD 3.1416 ± 0.0018, 10,000 images, 2 draws; FID 31.27, KID 0.0123 ± 0.0004, precision 0.610, recall"
    details += " 0.420, 50,000 samples at T = 0.9 against the train split, torch-fidelity 0.4.0, inception.pth"
    network = "laplace_nl4_nr4_nm2_nh512, batch 64, lr 0.001, seed 0; `a¦b.state`"
    line = ["[1]", f"{details}; warning: another fingerprint", network, "185,516,800", "3,000", "1:01:01"]
    command = "`python evaluate.py --weights a¦b.state`"
    assert sources["Table B1"] == [[*line, "a slow one", "a fast one", "abc1234", command]]


def test_most_training_seconds_win_a_cell_then_steps_then_file_names(make):
    cells, sources, _ = make(
        a=record({**BITS, "bpd": 4.0}, seconds=500),
        b=record({**BITS, "bpd": 2.0}, seconds=9000, step=10),
        c=record({**BITS, "bpd": 3.0, **FID}, seconds=800, step=9999),
        d=record({**BITS, "bpd": 1.0}, seconds=None, step=99999),
    )
    assert [*filled(cells).values()] == ["2.000 [2]", "31.3 [3]"]
    assert [each[0] for each in sources["Table B1"]] == ["[1]", "[2]", "[3]", "[4]"]
    assert "BPD 4.0000" in sources["Table B1"][0][1]
    cells, _, _ = make(e=record({**BITS, "bpd": 5.0}, seconds=9000, step=9), f=record(seconds=9000, step=11))
    assert cells["Table B1", LAPLACE, "MSDS1 BPD"] == "3.142 [6]"
    cells, _, _ = make(g=record({**BITS, "bpd": 7.0}, seconds=9000, step=11))
    assert cells["Table B1", LAPLACE, "MSDS1 BPD"] == "7.000 [7]"


RECORD, ROW = record(), row("B1", "Real NVP", {"MSDS1 BPD": "1"}, "")
DAMAGED_ROWS = [{"table": []}, {"cells": "3.1"}, {"result": 1}, {"weight": "heavy"}]


@pytest.mark.parametrize(
    "content, words",
    [
        *((text, "") for text in ("", "{", b"\xff\xfe\x00", '{"kind": "evaluation", "rows": [{"tab')),
        ("[1, 2]", "nothing in it belongs in a table"),
        ("[" * 100_000, "nested too deeply"),
        ({"kind": "speed", "results": []}, "nothing in it belongs in a table"),
        ({"kind": "evaluation", "results": []}, "written by an older version, measure again"),
        ({"kind": "receptive fields", "results": []}, "written by an older version, measure again"),
        ({"kind": "inpainting", "rows": []}, "nothing in it belongs in a table"),
        *(({**RECORD, "rows": [{**ROW, **changes}]}, "") for changes in DAMAGED_ROWS),
        ({**RECORD, "rows": [{**ROW, "table": "Z9"}]}, "'Z9' is missing or not known"),
        ({**RECORD, "rows": [{"table": "B1", "cells": {}}]}, "'result' is missing"),
        *(({key: RECORD[key] for key in RECORD if key != name}, f"'{name}' is") for name in ("config", "machine")),
        *(({**RECORD, **changes}, "") for changes in ({"config": []}, {"parameters": "many"}, {"step": None})),
        *(({**RECORD, "rows": rows}, "") for rows in (3, ["text"])),
        (record(seconds=1e300), ""),
    ],
)
def test_other_files_are_skipped_with_one_sentence(make, content, words):
    cells, _, (warning,) = make(1, bad=content, good=RECORD)
    assert warning.startswith("warning: ") and "bad.json: skipped, " in warning and words in warning
    assert [*filled(cells).values()] == ["3.142 [1]"]


def test_out_writes_what_stdout_shows_and_keeps_the_prose_above_its_line(make, tmp_path, capsys, monkeypatch):
    make(good=RECORD)
    tables.main([str(tmp_path / "results")])
    shown = capsys.readouterr().out.encode()
    file, prose = tmp_path / "new" / "results.md", b"# Ours\n\n1 \xff 2, by tables.py writes what follows\n"
    prose += b"<!-- tables.py writes what follows -->\n"
    command = [str(tmp_path / "results"), "--out", str(file)]
    tables.main(command)
    assert file.read_bytes() == b"<!-- tables.py writes what follows -->\n\n" + shown
    file.write_bytes(prose + b"old\n<!-- tables.py writes what follows -->\nolder\n")
    for _ in range(2):
        tables.main(command)
        assert file.read_bytes() == prose + b"\n" + shown
    make(good=record({**BITS, "bpd": 1.0}))
    monkeypatch.setattr("utils.files.os.replace", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        tables.main(command)
    assert file.read_bytes() == prose + b"\n" + shown
    file.write_bytes(b"mine")
    with pytest.raises(UserError, match="has no line <!-- tables"):
        tables.main(command)
    assert file.read_bytes() == b"mine"


def test_what_runs_had_reached_and_files_are_read_once(make, tmp_path, capsys):
    make(good=RECORD)
    logs = {
        "msds1_laplace": [("train", 100, 7.0, 60.0), ("train", 1000, 3.5, 600.0), ("test", 1000, 3.2, 600.0)],
        "msds2/net/out_x": [("test", 20_000, 2.5), ("train", 20_500, 2.4, 18_000)],
        "bad": [("train",)],
    }
    logs["msds1_laplace"] += ("train", 1500, 3.3, 900.0), ("train", 2000, 3.1, 1200.4), ("test", 3000, 2.9, 1800.0)
    folder, results = tmp_path / "weights", tmp_path / "results"
    for name, rows in logs.items():
        lines = [json.dumps(dict(zip(("kind", "step", "bpd", "seconds"), row, strict=False))) for row in rows]
        log_file(folder / f"{name}.jsonl", "\n".join([*lines, '{"kind": "te']))  # the last line is cut
    (folder / "msds1_laplace.args").write_text("--data msds1\n")
    tables.main([*map(str, (results / "good.json", folder, results, folder / "msds1_laplace.jsonl"))])
    captured = capsys.readouterr()
    table, note, command, *_ = captured.out.split("## Am I on track?\n\n")[1].split("\n\n")
    marks = ["1,000 steps", "2,000 steps", "20,000 steps", "time up to there"]
    first = ["msds1_laplace", "3.200", "*3.100*", "", "0:20:00", "3,000 steps", "2.900", "0:30:00"]
    second = ["msds2/net_x", "", "", "2.500", "", "20,500 steps", "*2.400*", "5:00:00"]
    assert parse(table) == (["run", *marks, "end of the run", "BPD", "time"], [first, second])
    assert "--max_steps" in note and command.strip().endswith(f"--against {folder / 'msds1_laplace.jsonl'}")
    (warning,) = captured.err.splitlines()
    assert "bad.jsonl: skipped, no record with bits per dimension" in warning
    assert captured.out.count("3.142 [1]") == 1 and "[2]" not in captured.out


@pytest.mark.parametrize("flags, words", [("{tmp}/none", "PATH: {tmp}/none"), ("{tmp} --out {tmp}", "--out: {tmp}")])
def test_bad_flags(flags, words, tmp_path):
    done = call(tables, *flags.format(tmp=tmp_path).split())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words.format(tmp=tmp_path) in done.stderr
