"""The documents: their code runs, their links lead somewhere, their commands are understood."""

import importlib
import inspect
import re
import shlex
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from checks import check_bijector, randomise
from runs import SMALL
from test_args import OURS, RELEASE

import args as flags
import main
from data import DATASETS
from flow import RGFlow
from layers import PATCH_BIJECTORS
from utils import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "extending.md").read_text("utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path.stem for path in ROOT.glob("*.py") if path.stem != "args"]
EQUATIONS = [*map(str, range(1, 16)), "A.1", "D.1", "D.2", "D.3", "D.4"]


@pytest.fixture
def guide(monkeypatch):
    """The code of docs/extending.md as if it stood where its first lines say; {file: its names}."""
    modules = {}
    with patch.dict(PATCH_BIJECTORS), patch.dict(DATASETS):
        for code in re.findall(r"```python\n(# .*?)```", GUIDE, re.DOTALL):
            file = code[2:].splitlines()[0]
            name = file.removesuffix(".py").replace("/", ".")
            package = name.rpartition(".")[0]
            modules[file] = {"__name__": name, "__package__": package}
            if name.endswith(".__init__"):
                modules[file].update(vars(importlib.import_module(package)))
            exec(compile(code, file, "exec"), modules[file])
            if not (ROOT / file).exists():
                module = ModuleType(name)
                vars(module).update(modules[file])
                monkeypatch.setitem(sys.modules, name, module)
        yield modules


def test_the_guides_coupling_is_a_bijection(guide):
    flow = RGFlow(1, 8, nlayers=2, nresblocks=1, nmlp=1, nhidden=16, subnet="sigmoid")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(flow(x)[0], x)
    check_bijector(randomise(flow, 0.3), x)


def test_the_guides_data_set_trains(guide, tmp_path):
    guide["tests/test_data_galaxies.py"]["test_galaxies"](tmp_path)  # leaves galaxies.npy
    small = SMALL.replace("--L 8", "--data galaxies --subnet sigmoid --max_steps 2")
    run = main.Run(flags.get_args([*small.split(), "--data_path", str(tmp_path), "-o", str(tmp_path / "out")]))
    before = run.flow.log_prob(torch.zeros(1, 3, 32, 32)).item()
    run.train()
    assert run.step == 2
    assert run.flow.log_prob(torch.zeros(1, 3, 32, 32)).item() != before
    assert "laplace_sigmoid_nl1" in str(run.folder)


def test_the_guides_figure(weights, tmp_path, monkeypatch):
    """The last block, which names no file."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n([^#].*?)```", GUIDE, re.DOTALL)
    names = {}
    exec(code.replace("last.state", weights["rgflow"]), names)
    assert (tmp_path / "figures" / "levels_2_3.pdf").exists()
    assert names["z"].shape == (16, 3, 8, 8)


def test_python_of_the_readme(weights):
    section = README.split("\n## In Python\n")[1].split("\n## ")[0]
    code = "\n".join(re.findall("^    (.*)", section, re.MULTILINE))
    (path,) = re.findall(r'load\("(.*)"\)', code)
    names = {}
    exec(code.replace(path, weights["rgflow"]).replace("32, 32", "8, 8"), names)
    assert names["images"].shape == (16, 3, 8, 8)
    torch.testing.assert_close(names["x_again"], names["x"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_exist(document):
    text = document.read_text("utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    if document.name == "README.md":
        targets += re.findall(r"`(\w+/[\w/]*(?:\.\w+)?)`", text)
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_the_code_names_every_equation():
    """In words such as "equations 4 and 5"; a range names its two ends alone."""
    table = README.split("\n## Equation → code\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([A-D\d.]+) \|.*\| `([\w/]+)\.py` `([\w.]+)` \|$", table, re.MULTILINE)
    assert [number for number, *_ in rows] == EQUATIONS
    missing = []
    for number, file, name in rows:
        module = importlib.import_module(file.replace("/", "."))
        text = module.__doc__ + inspect.getsource(reduce(getattr, name.split("."), module))
        named = re.findall(r"[Ee]quations?((?:[-–,]?\s*(?:and )?(?:[A-D]\.)?\d+)+)", text)
        missing += [(number, file, name)] * (number not in re.findall(r"(?:[A-D]\.)?\d+", " ".join(named)))
    assert missing == []


def parser_of(script):
    """The parser of a script, whose main runs up to where the flags are parsed."""

    def stop(parser, *_):
        raise StopIteration(parser)

    with patch.object(cli.Parser, "parse_known_args", stop), pytest.raises(StopIteration) as end:
        importlib.import_module(script).main([])
    return end.value.value


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document, guide, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for script, arguments in re.findall(r"\bpython (\w+)\.py\b([^`\n…]*)", document.read_text("utf-8")):
        values, rest = parser_of(script).parse_known_args(shlex.split(arguments, comments=True))
        if not getattr(values, "weights", "no such flag"):  # the flags of main.py name a run
            _, rest = flags.build_parser().parse_known_args(rest)
        assert rest == [], script


def test_scripts_print_one_sentence_for_an_error():
    assert all((ROOT / f"{name}.py").read_text("utf-8").endswith("script(main)\n") for name in SCRIPTS)


@pytest.mark.parametrize("name", ["README", "docs/differences", "docs/extending", "docs/figures", "docs/running"])
def test_flags_in_text_exist(name):
    known = {flag for script in SCRIPTS for flag in parser_of(script)._option_string_actions}
    named = set(re.findall(r"`(--?[a-zA-Z]\w*)", (ROOT / f"{name}.md").read_text("utf-8")))
    assert named - known == set()
    if name == "docs/differences":
        assert {f"--{flag}" for flag in [*RELEASE, *OURS]} <= named
