"""tables.py on results written here by hand: which number stands in which cell, and what is skipped."""

import json

import pytest

import tables

CONFIG = {
    "data": "msds1",
    "prior": "laplace",
    "subnet": "rnvp",
    "kernel_size": 4,
    "nlayers": [4, 4, 4, 4],
    "nresblocks": 4,
    "nmlp": 2,
    "nhidden": 512,
    "share_levels": False,
    "batch_size": 64,
    "lr": 1e-3,
    "seed": 0,
}
BITS = {"bpd": 3.14159, "bpd_stderr": 0.0018, "bpd_draws": [3.1, 3.2], "images": 10_000}
FID = {
    "fid": 31.27,
    "kid_mean": 0.0123,
    "kid_std": 0.0004,
    "precision": 0.61,
    "recall": 0.42,
    "fid_settings": {
        "samples": 50_000,
        "temperature": 0.9,
        "split": "train",
        "library": "torch-fidelity",
        "version": "0.4.0",
        "feature_weights": "inception.pth",
    },
}


def record(results=BITS, kind="evaluation", seconds=3661.2, step=3000, **config):
    return {
        "kind": kind,
        "command": "python evaluate.py --weights a|b.state",
        "machine": "a fast one",
        "commit": "abc1234",
        "weights": "a|b.state",
        "parameters": 185516800,
        "epoch": 1,
        "step": step,
        "train_seconds": seconds,
        "trained_on": "a slow one",
        "config": {**CONFIG, **config},
        "results": results,
    }


@pytest.fixture
def make(tmp_path, capsys):
    """Write records to files of these names and run tables.py; returns {title: {row: {column: cell}}}, the lists of
    sources {title: rows of cells} and the warnings."""

    def make(**records):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for name, content in records.items():
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        tables.main([str(folder)])
        captured = capsys.readouterr()
        cells, sources = {}, {}
        for part in captured.out.split("## ")[1:]:
            title, first, *rest = part.strip().split("\n\n")
            header, rows = parse(first)
            named = {}
            for row in rows:
                pairs = zip(header[1::2], row[1::2], row[2::2], strict=True)
                named[row[0]] = {name.removesuffix(", paper"): pair for name, *pair in pairs}
            cells[title.split(":")[0]] = named
            sources[title.split(":")[0]] = parse(rest[0])[1] if rest else []
        return cells, sources, captured.err.splitlines()

    return make


def parse(text):
    """(cells of the first line, those of the lines after the second) of a Markdown table, which must be rectangular."""
    lines = [line.strip("|").replace("\\|", "¦").split("|") for line in text.splitlines()]
    assert len({len(line) for line in lines}) == 1
    header, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return header, rows


def test_the_papers_numbers_beside_empty_cells(make):
    cells, sources, warnings = make()
    assert cells["Table B1"]["RG-Flow, Gaussian prior"]["MSDS2 BPD"] == ["1.53", ""]
    assert cells["Table B1"]["Real NVP"]["MSDS2 FID"] == ["78.0", ""]
    assert cells["Table G1"]["RG-Flow"]["3D Chairs FID"] == ["36.2", ""]
    assert cells["Table G1"]["Real NVP"]["CIFAR-10 BPD"] == ["3.61", ""]
    assert cells["Table F1"]["Constrained Real NVP"]["Inception-PSNR"] == ["15.7", ""]
    assert not any(sources.values())
    assert len(warnings) == 1 and "no .json file" in warnings[0]


@pytest.mark.parametrize(
    "config, table, row, column",
    [
        ({}, "Table B1", "RG-Flow, Laplacian prior", "MSDS1"),
        ({"data": "msds2", "prior": "gaussian", "model": "rgflow"}, "Table B1", "RG-Flow, Gaussian prior", "MSDS2"),
        ({"model": "realnvp"}, "Table B1", "Real NVP", "MSDS1"),
        ({"model": "realnvp", "prior": "gaussian", "data": "cifar10"}, "Table G1", "Real NVP", "CIFAR-10"),
        ({"data": "celeba32"}, "Table G1", "RG-Flow", "CelebA"),
        ({"data": "chair600"}, "Table G1", "RG-Flow", "3D Chairs"),
    ],
)
def test_the_cell_of_an_evaluation(make, config, table, row, column):
    cells, sources, warnings = make(one=record({**BITS, **FID}, **config))
    assert cells[table][row][f"{column} BPD"][1] == "3.142 [1]"
    assert cells[table][row][f"{column} FID"][1] == "31.3 [1]"
    filled = [pair[1] for each in cells.values() for line in each.values() for pair in line.values() if pair[1]]
    assert len(filled) == 2
    assert sum(map(len, sources.values())) == 1
    assert warnings == []


def test_what_the_paper_has_not_comes_last_without_a_number_of_its(make):
    cells, _, _ = make(a=record(data="mnist32"), b=record(data="celeba32", prior="gaussian"))
    assert list(cells["Table G1"]) == ["RG-Flow", "Real NVP", "RG-Flow, Gaussian prior"]
    assert cells["Table G1"]["RG-Flow"]["MNIST BPD"] == ["", "3.142 [1]"]
    assert cells["Table G1"]["RG-Flow, Gaussian prior"]["CelebA BPD"] == ["", "3.142 [2]"]


def test_the_source_of_a_number(make):
    results = {**BITS, **FID, "warnings": ["another fingerprint"]}
    _, sources, _ = make(one=record(results))
    (line,) = sources["Table B1"]
    text = " # ".join(line)
    for word in (
        "[1]",
        "BPD 3.1416 ± 0.0018, 10,000 images, 2 draws",
        "FID 31.27, KID 0.0123 ± 0.0004, precision 0.610, recall 0.420",
        "50,000 samples at T = 0.9 against the train split, torch-fidelity 0.4.0, inception.pth",
        "another fingerprint",
        "laplace_nl4_nr4_nm2_nh512, batch 64, lr 0.001, seed 0",
        "185,516,800 # 3,000 # 1:01:01 # a slow one # a fast one # abc1234",
        "`python evaluate.py --weights a¦b.state`",
    ):
        assert word in text


def test_most_training_seconds_win_a_cell_and_the_list_has_all(make):
    cells, sources, _ = make(
        a=record({**BITS, "bpd": 4.0}, seconds=500),
        b=record({**BITS, "bpd": 2.0}, seconds=9000, step=10),
        c=record({**BITS, "bpd": 3.0, **FID}, seconds=800, step=9999),
        d=record({**BITS, "bpd": 1.0}, seconds=None, step=99999),
    )
    line = cells["Table B1"]["RG-Flow, Laplacian prior"]
    assert line["MSDS1 BPD"] == ["0.906", "2.000 [2]"]
    assert line["MSDS1 FID"] == ["1.16", "31.3 [3]"]
    assert [each[0] for each in sources["Table B1"]] == ["[1]", "[2]", "[3]", "[4]"]
    assert "BPD 4.0000" in sources["Table B1"][0][1]


def test_steps_then_file_names_break_ties(make):
    cells, _, _ = make(
        a=record({**BITS, "bpd": 4.0}, step=30),
        b=record({**BITS, "bpd": 3.0}, step=20),
        c=record({**BITS, "bpd": 2.0}, step=20),
    )
    assert cells["Table B1"]["RG-Flow, Laplacian prior"]["MSDS1 BPD"][1] == "4.000 [1]"
    cells, _, _ = make(a=record({**BITS, "bpd": 4.0}, step=10))
    assert cells["Table B1"]["RG-Flow, Laplacian prior"]["MSDS1 BPD"][1] == "2.000 [3]"


def test_inpainting(make):
    psnr = {"psnr_image": 36.66, "psnr_region": 26.56}
    others = {"weights": "nvp.state", "parameters": 5, "step": 7, "train_seconds": 60}
    results = [
        {"method": "rgflow", **psnr, "free_latents": 1200, "inception_psnr": 24.42},
        {"method": "realnvp_constrained", **psnr, "free_latents": 1200, **others},
        {"method": "realnvp", **psnr, "psnr_image": 31.0, "free_latents": 3072, "inception_psnr": None, **others},
    ]
    cells, sources, warnings = make(one=record(results, "inpainting", data="celeba32"))
    assert cells["Table F1"]["RG-Flow"] == {"PSNR": ["38.7", "36.7 [1]"], "Inception-PSNR": ["24.9", "24.4 [1]"]}
    assert cells["Table F1"]["Constrained Real NVP"]["PSNR"] == ["23.2", "36.7 [2]"]
    assert cells["Table F1"]["Real NVP"] == {"PSNR": ["37.0", "31.0 [2]"], "Inception-PSNR": ["24.8", ""]}
    assert "26.56 dB in the region, 1200 free latents" in sources["Table F1"][0][1]
    assert sources["Table F1"][1][2:6] == ["`nvp.state`", "5", "7", "0:01:00"]  # not the configuration of RG-Flow
    assert warnings == []
    cells, _, _ = make(one=record(results[:1], "inpainting"))
    assert cells["Table F1"]["RG-Flow"]["PSNR"] == ["38.7", ""]
    assert cells["Table F1"]["RG-Flow, MSDS1"]["PSNR"] == ["", "36.7 [1]"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"kind": 3}',
        "[" * 100_000,
        {"kind": "speed", "results": []},
        {"kind": "evaluation"},
        {**record(), "config": []},
        {**record(), "results": 3},
        record({**BITS, "bpd": "3.1"}),
        record({**BITS, "bpd": float("nan")}),
        record({**BITS, "bpd_draws": 3}),
        record(seconds=1e300),
        record(model="glow"),
        record([{"method": "magic"}], "inpainting"),
        record([3], "inpainting"),
    ],
)
def test_other_files_are_skipped_with_one_sentence(make, content):
    cells, _, warnings = make(bad=content, good=record())
    (warning,) = warnings
    assert warning.startswith("warning: ") and "bad.json: skipped" in warning
    filled = [pair[1] for each in cells.values() for line in each.values() for pair in line.values() if pair[1]]
    assert filled == ["3.142 [1]"]


def test_a_file_that_is_no_text(make, tmp_path):
    make(good=record())
    (tmp_path / "results" / "bad.json").write_bytes(b"\xff\xfe\x00")
    _, _, warnings = make()
    assert len(warnings) == 1 and "bad.json: skipped" in warnings[0]


def test_out_writes_what_stdout_shows(make, tmp_path, capsys):
    make(good=record())
    tables.main([str(tmp_path / "results")])
    shown = capsys.readouterr().out
    tables.main([str(tmp_path / "results"), "--out", str(tmp_path / "tables.md")])
    assert (tmp_path / "tables.md").read_text("utf-8") == shown


@pytest.mark.parametrize("argv, word", [(["{tmp}/none"], "FOLDER"), (["{tmp}", "--out", "{tmp}/none/a.md"], "--out")])
def test_bad_flags(argv, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tables.main([argument.format(tmp=tmp_path) for argument in argv])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert word in message and "none" in message and message.count("\n") == 1
