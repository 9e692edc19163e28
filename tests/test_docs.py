"""The documents: their code runs, their links lead somewhere, their commands are understood."""

import importlib
import re
import shlex
import sys
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
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "args")


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
    exec(replace_once(code, "last.state", weights["rgflow"]), names)
    assert (tmp_path / "figures" / "levels_2_3.pdf").exists()
    assert names["z"].shape == (16, 3, 8, 8)


def test_python_of_the_readme(weights):
    section = README.split("\n## In Python\n")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    (path,) = re.findall(r'load\("(.*)"\)', code)
    code = replace_once(code, path, weights["rgflow"]).replace("32, 32", "8, 8")
    names = {}
    exec(code, names)
    assert names["images"].shape == (16, 3, 8, 8)
    torch.testing.assert_close(names["x_again"], names["x"])


def replace_once(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_images_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    files = [target.split("#")[0] for target in targets if not target.startswith(("https://", "http://", "#"))]
    assert [file for file in files if not (document.parent / file).exists()] == []


class Understood(Exception):
    """Raised where a script's parser has taken the flags; its argument is the parser."""


@pytest.fixture
def understand(monkeypatch):
    """Run a script up to where its flags are parsed, without `parse` to just before, and return its parser."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    original = cli.Parser.parse_args

    def understand(script, argv=(), parse=True):
        def parse_args(parser, args=None, namespace=None):
            if parse:
                original(parser, args, namespace)
            raise Understood(parser)

        monkeypatch.setattr(cli.Parser, "parse_args", parse_args)
        with pytest.raises(Understood) as end:
            importlib.import_module(script).main(list(argv))
        return end.value.args[0]

    return understand


def commands(text):
    """(script, arguments) of every `python script.py …` in a document."""
    return [(s, shlex.split(a, comments=True)) for s, a in re.findall(r"\bpython (\w+)\.py\b([^`\n]*)", text)]


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "extending"])
def test_commands_are_understood(text, understand, guide, capsys):
    assert commands(text)
    for script, argv in commands(text):
        understand(script, argv)
    with pytest.raises(SystemExit):
        understand("main", ["--no_such_flag"])
    assert "--no_such_flag" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/differences.md", "docs/extending.md"])
def test_flags_in_text_exist(name, understand):
    known = {flag for script in SCRIPTS for flag in understand(script, parse=False)._option_string_actions}
    named = set(re.findall(r"`(--?[a-zA-Z]\w*)", (ROOT / name).read_text("utf-8")))
    assert named - known == set()
    if name == "docs/differences.md":
        assert {f"--{flag}" for flag in [*RELEASE, *OURS]} <= named
