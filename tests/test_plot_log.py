"""Curves of logs and the comparison of two, with numbers known beforehand."""

import pytest

import plot_log
from utils.cli import UserError

LOG = """{"kind": "train", "step": 1, "bpd": 8.0, "seconds": 1800}
{"kind": "train", "step": 3, "bpd": 6.0, "seconds": 3600}
{"kind": "other", "step": 3, "bpd": 0.0}
no record
{"kind": "train", "step": 5, "bpd": 4.0, "seconds": 7200}
{"kind": "test", "step": 5, "bpd": 4.5, "bpd_stderr": 0.25, "seconds": 7200}
{"kind": "train", "step": 7"""


def log_file(path, text=LOG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_curves(tmp_path, monkeypatch):
    path = log_file(tmp_path / "out.jsonl")
    train, test = plot_log.curves(path)
    assert (train.tolist(), test.tolist()) == ([[1, 3, 5], [8, 6, 4]], [[5], [4.5], [0.25]])
    train, test = plot_log.curves(path, time=True)
    assert (train[0].tolist(), test[0].tolist()) == ([0.5, 1, 2], [2])
    axes = plot_log.log_figure([(train, test)], ["$a"], time=True, bpd=(3, 5)).axes[0]
    assert axes.lines[0].get_xydata().T.tolist() == train.tolist()
    assert axes.get_ylim() == (3, 5)
    monkeypatch.setattr(plot_log, "POINTS", 2)
    assert plot_log.curves(path)[0].tolist() == [[2, 5], [7, 4]]


def test_tests_figure(tmp_path):
    """A panel per data set, points at the tests alone, 1 to 2 hours apart on a logarithmic axis."""
    more = LOG.replace("no record", '{"kind": "test", "step": 3, "bpd": 6.5, "seconds": 3600}')
    runs = [plot_log.curves(log_file(tmp_path / "out.jsonl", more), time=True)] * 3
    figure = plot_log.tests_figure(runs, ["$a", "b", "c"], ["x", "y", "x"], time=True, bpd=(3, 7))
    left, right = figure.axes
    assert [len(axes.containers) for axes in (left, right)] == [2, 1]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["$a", "c"]
    assert left.get_xscale() == "log" and left.get_title() == "x"
    points, _, (errors,) = right.containers[0]
    assert points.get_xydata().tolist() == [[1, 6.5], [2, 4.5]]
    assert errors.get_segments()[1].tolist() == [[2, 4.25], [2, 4.75]]
    files = [str(log_file(tmp_path / path)) for path in ("msds1_laplace.jsonl", "msds2/net/out.jsonl")]
    plot_log.main([*files, "--tests", "--fig_dir", str(tmp_path / "f")])
    assert len(list((tmp_path / "f").glob("log_*_tests_*.png"))) == 1
    for old, new in (
        ('"test"', '"other"'),
        ('"bpd_stderr": 0.25, "seconds": 7200', '"bpd_stderr": 0.25, "seconds": 0'),
    ):
        log_file(tmp_path / "msds2/net/out.jsonl", LOG.replace(old, new))
        with pytest.raises(UserError, match=r"msds2/net/out\.jsonl: has no test"):
            plot_log.main([*files, "--tests", "--time", "--fig_dir", str(tmp_path / "f")])


def test_log_script(tmp_path, capsys):
    files = [str(log_file(tmp_path / "msds1" / run / "out_2.jsonl")) for run in ("a", "b_x")]
    plot_log.main([*files, "--fig_dir", str(tmp_path / "f"), "--time"])
    pdf, png = sorted((tmp_path / "f").iterdir(), key=lambda path: path.suffix)
    assert png.name.startswith("log_files_out_2.jsonl_out_2.jsonl_time_") and png.stem == pdf.stem
    assert b"/Type3" not in pdf.read_bytes()  # fonts that journals refuse
    assert "msds1/b_x_2: " in capsys.readouterr().out
    for content, words in (("", "no record"), (LOG.replace("seconds", "s"), "no seconds")):
        with pytest.raises(UserError, match=words):
            plot_log.main([str(log_file(tmp_path / "bad.jsonl", content)), "--time", "--fig_dir", str(tmp_path)])
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
    with pytest.raises(UserError, match=r"out\.jsonl: no record with bits per dimension"):
        plot_log.main([str(log_file(tmp_path / "out.jsonl", content)), "--fig_dir", str(tmp_path)])


def test_verdict():
    """Two of 2.83 standard deviations of one run: those of the difference of two."""
    for own, word in ((3.08, "on track"), (2.92, "on track"), (3.09, "behind"), (2.91, "ahead")):
        sentence = plot_log.verdict(2000, own, 3.0, 0.031)
        assert sentence.startswith(f"{word}: {own:.4f} against 3.0000 after 2,000 steps ({own - 3:+.4f};")
    assert plot_log.verdict(2000, 3.03, 3.0, 0.01).startswith("behind")


def test_a_log_against_another(tmp_path, capsys):
    """At the steps at which both have a test, in their order."""
    more = LOG.replace("no record", '{"kind": "test", "step": %d, "bpd": %g}\n{"kind": "test", "step": 2, "bpd": 7.0}')
    own = log_file(tmp_path / "msds1" / "net" / "out.jsonl", more.replace("4.0", '4.0, "lr": 0.001') % (3, 5))
    other = log_file(tmp_path / "msds1_laplace.jsonl", more.replace("4.0", '4.0, "lr": 0.002') % (4, 5))
    other.write_text(other.read_text().replace("4.5", "4.0"))
    argv = [str(own), "--against", str(other), "--fig_dir", str(tmp_path / "f")]
    plot_log.main(argv)
    *_, head, columns, first, last, sentence, note = capsys.readouterr().out.splitlines()
    assert head.startswith("msds1/net (yours) against msds1_laplace (theirs), bits per dimension of the test images")
    assert columns.split() == ["step", "yours", "theirs", "difference"]
    assert (first.split(), last.split()) == (["2", *["7.0000"] * 2, "+0.0000"], ["5", "4.5000", "4.0000", "+0.5000"])
    assert sentence.startswith("behind: 4.5000 against 4.0000 after 5 steps (+0.5000")
    assert "0.001 and 0.002" in note
    assert len(list((tmp_path / "f").glob("log_*.png"))) == 1
    other.write_text('{"kind": "test", "step": 9, "bpd": 8.0, "seconds": 1}\n')
    with pytest.raises(UserError, match=r"out\.jsonl and .*msds1_laplace\.jsonl: both need a test after the same step"):
        plot_log.main(argv)
