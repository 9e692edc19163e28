"""The command line: names, defaults, grammar, and one sentence for each kind of bad input."""

import argparse
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import SMALL, flags_of

from args import build_parser, get_args, load_flow, load_flows, network_name, parse, run_path, weights_parser
from data import DATASETS
from flow import RealNVP, RGFlow
from flow.load import build
from utils.checkpoint import save
from utils.cli import Parser, UserError, check_latents, latent_name

ROOT = Path(__file__).parents[1]

# The flags of the authors' release with the defaults of the paper's CelebA run.
RELEASE = {"data": "celeba32", "data_path": "./datasets", "nchannels": 3, "L": 32, "prior": "laplace", "subnet": "rnvp"}
RELEASE |= {"kernel_size": 4, "nlayers": (8, 6, 4, 2), "nresblocks": 4, "nmlp": 2, "nhidden": 512, "dtype": "float32"}
RELEASE |= {"batch_size": 64, "lr": 1e-3, "weight_decay": 5e-2, "epoch": 500, "clip_grad": 1.0, "no_stdout": False}
RELEASE |= {"print_step": 1, "save_epoch": 1, "keep_epoch": 10, "plot_epoch": 1, "cuda": "cpu", "out_infix": ""}
RELEASE |= {"out_dir": "./saved_model"}
OURS = {"seed": 0, "model": "rgflow", "share_levels": False, "max_steps": 0, "warmup_steps": 0, "amp": "none"}
OURS |= {"compile": False, "grad_checkpoint": False, "lr_schedule": "constant", "save_minutes": 0.0, "test_steps": ()}


def refused(capsys, function, *words):
    """Whether a call exits with status 2 and one sentence that has all words."""
    with pytest.raises(SystemExit, match=r"^2$"):
        function()
    message = capsys.readouterr().err
    return message.count("\n") == 1 and all(word in message for word in words)


def test_defaults():
    args, expected = vars(get_args([])), RELEASE | OURS
    assert {name: args[name] for name in expected} == expected
    named = vars(get_args([f"@{ROOT / 'configs' / 'celeba32.args'}"]))
    assert named.pop("given") and not args.pop("given") and named == args


def test_help_shows_every_default():
    text = " ".join(build_parser().format_help().split())
    for name, value in {**RELEASE, **OURS}.items():
        assert f"--{name}" in text
        own = value in (False, "", ()) or name in ("nchannels", "L", "nlayers", "cuda", "compile")  # said in words
        assert own or re.search(rf"--{name} .*?\(default: {re.escape(str(value))}[;)]", text), name
    assert "None" not in text and "(default: )" not in text


@pytest.mark.parametrize(
    "flags, nlayers, name",
    [
        ("", (8, 6, 4, 2), "laplace_nl8,6,4,2_nr4_nm2_nh512"),
        ("--prior gaussian --nlayers 4,3,2,1", (4, 3, 2, 1), "nl4,3,2,1_nr4_nm2_nh512"),
        ("--subnet ar --nlayers 4", (4, 4, 4, 4), "laplace_ar_nl4_nr4_nm2_nh512"),
        ("--subnet spline --share_levels --nlayers 3", (3,), "laplace_spline_share_nl3_nr4_nm2_nh512"),
        ("--share_levels --kernel_size 8", (4,), "laplace_share_ks8_nl4_nr4_nm2_nh512"),
        ("--data folder --L 8", (8, 6), "laplace_nl8,6_nr4_nm2_nh512"),
        ("--data folder --L 128", (8, 6, 4, 2, 2, 2), "laplace_nl8,6,4,2,2,2_nr4_nm2_nh512"),
        ("--model realnvp", (3, 3, 3, 4), "realnvp_laplace_nl3,3,3,4_nr4_nm2_nh64"),
        ("--model realnvp --data folder --L 64", (3, 3, 3, 3, 4), "realnvp_laplace_nl3,3,3,3,4_nr4_nm2_nh64"),
        ("--model realnvp --prior gaussian --nlayers 3", (3, 3, 3, 3), "realnvp_nl3_nr4_nm2_nh64"),
    ],
)
def test_layers_and_name_of_the_network(flags, nlayers, name):
    args = get_args(flags.split())
    assert (args.nlayers, network_name(args)) == (nlayers, name)


@pytest.mark.parametrize("flags, shape", [("mnist32", (1, 32)), ("folder --L 64 --nchannels 1", (1, 64))])
def test_shape_comes_from_the_data_set(flags, shape):
    args = get_args(["--data", *flags.split()])
    assert (args.nchannels, args.L) == shape


@pytest.mark.parametrize("data, own", [(name, name in ("celeba32", "chair600")) for name in DATASETS])
def test_mirrored_images_are_those_of_the_data_set_unless_told(data, own):
    flags = [], ["--flip"], ["--no-flip"]
    assert [get_args(["--data", data, *flag]).flip for flag in flags] == [own, True, False]


def test_argument_file(tmp_path):
    file = tmp_path / "a.args"
    comments = "# a comment, don't mind\n--lr 2e-3   # and another\n\n"
    file.write_text(f"{comments}--out_infix 'two words'\n--no_stdout\n-o a#b\\c\n")
    args = get_args([f"@{file}", "--lr", "3e-3"])
    assert (args.lr, args.out_infix, args.no_stdout, args.out_dir) == (3e-3, "two words", True, "a#b\\c")


@pytest.mark.parametrize("content", [b"@%s", b"\xff\xfe--lr 1", b"--out_infix 'a", b"-o a\0b"])
def test_bad_argument_files(content, tmp_path, capsys):
    file = tmp_path / "a.args"
    file.write_bytes(content.replace(b"%s", str(file).encode()))
    assert refused(capsys, lambda: get_args([f"@{file}"]), "argument file")


@pytest.mark.parametrize(
    "argv, words",
    [
        *((["--lr", value], ["--lr", f"'{value}'", "above 0"]) for value in ("0", "nan", "-1e-3")),
        (["--batch_size", "0"], ["--batch_size", "'0'", "at least 1"]),
        (["--batch_size", "1.5"], ["--batch_size", "'1.5'", "whole number"]),
        (["--clip_grad", "-1"], ["--clip_grad", "'-1'", "at least 0"]),
        (["--nlayers", "8,6,4"], ["--nlayers", "8,6,4", "4, one per level"]),
        (["--nlayers", "8,,4,2"], ["--nlayers", "''"]),
        (["--no-flips"], ["--no-flips"]),
        (["--share_levels", "--nlayers", "8,6,4,2"], ["--nlayers", "8,6,4,2", "one number"]),
        (["--kernel_size", "3"], ["--kernel_size", "3", "even"]),
        (["--data", "folder", "--L", "24"], ["--L", "24", "power of two"]),
        (["--data", "cifar10", "--L", "64"], ["--L", "64", "must be 32 for --data cifar10"]),
        (["--data", "mnist32", "--nchannels", "3"], ["--nchannels", "3", "must be 1"]),
        (["--data", "imagenet"], ["--data", "imagenet", "celeba32"]),
        (["--prior", "cauchy"], ["--prior", "cauchy", "laplace"]),
        (["--model", "realnvp", "--share_levels"], ["--share_levels", "--model rgflow"]),
        (["--model", "realnvp", "--subnet", "ar"], ["--subnet", "ar", "must be rnvp"]),
        (["--cuda", "x,0"], ["--cuda", "'x,0'", "numbers of GPUs"]),
        (["--cuda", "mps"], ["--cuda", "'mps'", "have no float64"]),
        (["--cuda", str(torch.cuda.device_count())], ["--cuda", f"no GPU {torch.cuda.device_count()}"]),
        (["--amp", "bf16", "--dtype", "float64"], ["--amp", "bf16", "float32"]),
        (["--amp", "tf32"], ["--amp", "tf32", "GPU"]),
        (["--out_infix", "a/b"], ["--out_infix", "'a/b'", "path separator"]),
        (["--epo", "3"], ["--epo"]),
        (["--epoch", "9" * 400], ["--epoch", "at most"]),
        (["--nlayers", "-1,2,2,2"], ["--nlayers", "'-1'", "at least 1"]),
        (["--data", "folder", "--nchannels", "2"], ["--nchannels", "2", "1 (grey) or 3"]),
        (["@no_such_file.args"], ["error: argument file no_such_file.args: No such file"]),
    ],
)
def test_bad_flags(argv, words, capsys):
    assert refused(capsys, lambda: get_args(argv), *words)


def test_run_path():
    args = get_args(["--data", "msds1", "--nlayers", "4", "--out_infix", "_b", "-o", "runs"])
    assert run_path(args, ".log") == Path("runs/msds1/laplace_nl4_nr4_nm2_nh512/out_b.log")
    assert run_path(get_args(["-o", ""]), ".log") is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.args")), ids=lambda path: path.stem)
def test_configs_parse(path):
    args = get_args([f"@{path}"])
    assert (args.out_infix.removeprefix("_") or args.data) in path.stem


def test_gpus(monkeypatch, capsys):
    """One GPU, several for several processes of which this is the second, and what is refused."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (get_args(["--cuda", "3"]).cuda, get_args(["--cuda", "3"]).compile) == ("cuda:3", True)
    assert (get_args(["--cuda", "0,2"]).cuda, get_args(["--cuda", "0,2"]).gpus) == ("cuda:0", 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert get_args(["--cuda", "0,2"]).cuda == "cuda:2"
    assert refused(capsys, lambda: get_args(["--cuda", "0"]), "--cuda", "a GPU for each process")
    assert refused(capsys, lambda: get_args(["--cuda", "0,0"]), "--cuda", "names a GPU twice")
    assert refused(capsys, lambda: parse(weights_parser(""), ["--cuda", "0,2"]), "--cuda", "one GPU")


def test_flags_of_a_script(tmp_path, capsys):
    """A script's own flags, and behind them those of main.py, which name a run where no --weights is given."""
    (tmp_path / "a.args").write_text("--data msds1 --draw_seed 3\n--nlayers 2\n")
    args = parse(weights_parser("", images=True), f"@{tmp_path}/a.args --data_path x --lr 1e-2 -o y".split())
    assert (args.weights, args.data, args.data_path, args.draw_seed) == (None, "msds1", "x", 3)
    assert (args.run.data, args.run.data_path, args.run.lr, args.run.nlayers) == ("msds1", "x", 1e-2, (2, 2, 2, 2))
    assert run_path(args.run, "_save") == Path("y/msds1/laplace_nl2_nr4_nm2_nh512/out_save")
    assert parse(weights_parser(""), []).run.data == "celeba32"
    assert parse(weights_parser(""), ["--weights", "a"]).run is None
    script = weights_parser("")
    assert refused(capsys, lambda: parse(script, ["--weights", "a", "--lr", "1"]), "unrecognized arguments: --lr 1")
    assert refused(capsys, lambda: parse(script, ["--no_such_flag"]), "unrecognized arguments: --no_such_flag")
    assert refused(capsys, lambda: parse(script, ["--lr", "0"]), "argument --lr: '0'")
    assert refused(capsys, lambda: parse(script, ["--export", "a"]), "argument --export: only for main.py")
    with pytest.raises(SystemExit):
        parse(weights_parser(""), ["--help"])
    assert "--lr" not in capsys.readouterr().out


@pytest.mark.parametrize("rule, good, bad", [("needs", ["--grid", "2"], []), ("excludes", [], ["--grid", "2"])])
def test_flags_without_effect(tmp_path, capsys, rule, good, bad):
    """Refused where typed; a file may hold the flags of several scripts."""
    (tmp_path / "a.args").write_text("--theta 1")
    script = Parser("")
    for name in ("--theta", "--grid"):
        script.add_argument(name)
    script.restrict("theta", **{rule: "grid"})
    for allowed in (["--theta", "1", *good], [f"@{tmp_path}/a.args", *bad]):
        assert script.parse_args(allowed).theta == "1"
    words = f"argument --theta: has no effect {'without' if rule == 'needs' else 'with'} --grid"
    assert refused(capsys, lambda: script.parse_args([*bad, "--theta", "1"]), words)
    assert refused(capsys, lambda: script.parse_args(["--theta=1", *bad]), words)


def test_a_file_that_can_be_read_only_once(tmp_path):
    """As `@<(…)` gives it."""
    os.mkfifo(tmp_path / "pipe")
    script = Parser("")
    script.add_argument("--file", required=True)
    with ThreadPoolExecutor() as threads:
        threads.submit((tmp_path / "pipe").write_text, "--file a.png")
        args = script.parse_args([f"@{tmp_path}/pipe"])
    assert (args.file, args.given, args.typed) == ("a.png", ["file"], [])


def test_flags_that_name_a_run_have_an_effect_without_weights(capsys):
    script = weights_parser("", images=True)
    script.add_argument("--real", action="store_true")
    script.restrict("data_path cuda", needs="real")
    assert script.parse_args(["--data_path", "x"]).data_path == "x"
    words = "argument --data_path: has no effect without --real"
    assert refused(capsys, lambda: script.parse_args(["--data_path", "x", "--weights", "y"]), words)


def test_the_users_folder(tmp_path, monkeypatch):
    """~ is expanded in all flags that name files and folders, and in names of files with flags."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.args").write_text("--out_dir ~/out")
    args = get_args(["@~/a.args", "--data_path=~", "--init", "~/b.state", "--export", "~"])
    assert (args.out_dir, args.init) == (f"{tmp_path}/out", f"{tmp_path}/b.state")
    assert args.data_path == args.export == str(tmp_path)
    several = weights_parser("", pictures=True, numbers=True, several=True)
    args = parse(several, ["--weights", "~/a", "b", "--fig_dir", "~/~", "--json", "~no_such_user/c"])
    assert args.weights == [f"{tmp_path}/a", "b"]
    assert (args.fig_dir, args.json) == (f"{tmp_path}/~", "~no_such_user/c")


def test_flags_that_the_training_had_otherwise(start, images, tmp_path, capsys):
    """Without --weights, the flags of the flow must be those of the checkpoint; others that differ have no effect."""
    start("--max_steps 1")
    given = flags_of(images, tmp_path / "run")
    flow, config, _ = load_flow(parse(weights_parser(""), given))
    assert (flow.L, config["lr"], capsys.readouterr().err) == (8, 1e-3, "")
    load_flow(parse(weights_parser(""), [*given, "--lr", "0.5"]))
    assert re.search(
        r"^warning: flags without effect here, .*state was trained with others \(lr .*0\.5", capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"state was trained with other settings \(seed .*7"):
        load_flow(parse(weights_parser(""), [*given, "--seed", "7"]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_type_of_a_trained_flow(weights, dtype):
    """float64 as trained, or what --dtype says."""
    for flags, expected in ((["--dtype", dtype], getattr(torch, dtype)), ([], torch.float64)):
        flow, *_ = load_flow(parse(weights_parser(""), ["--weights", weights["rgflow"], *flags]))
        assert {each.dtype for each in flow.parameters()} == {expected} and flow.sample(1).dtype == expected


def test_flows_trained_on_other_images_are_flows_of_another_name(tmp_path):
    files = []
    for data in ("msds1", "msds2"):
        config = vars(get_args(["--data", data, *SMALL.split()[2:]]))
        files.append(str(tmp_path / f"{data}.state"))
        save(files[-1], {"config": config, "epoch": 1, "step": 5, "model": build(config).state_dict()})
    args = parse(weights_parser("", images=True, several=True), ["--data", "msds2", "--weights", *files])
    named = [each[0] for each in load_flows(args, ["msds2"])]
    network = "laplace nl1_nr1_nm1_nh8, 5 steps"
    assert [each["network"] for each in named] == [f"{network} (trained on MSDS1)", network]
    assert {each["data"] for each in named} == {"msds2"}


def test_latent_names():
    """Every latent by its name, in the order of the names' letters; levels are the flow's own."""
    for flow in (RGFlow(1, 8, nlayers=1, nhidden=4), RealNVP(3, 8, nlayers=1, nhidden=2)):
        for c, i, j in torch.cartesian_prod(torch.arange(flow.nchannels), torch.arange(8), torch.arange(8)).tolist():
            name = f"{flow.level_map[c, i, j]}:{i}:{j}:{c}"
            assert check_latents([latent_name(name)], flow.level_map) == [(c, i, j)]


BAD = [(name, "must be level:row:column:channel") for name in ("", "1:2:3", "1:2:3:4:5", "1:2:3:-1", "1:2:3:x", "1,2")]
BAD += [(name, r"row and column must be in 0\.\.7") for name in ("1:8:0:0", "1:0:8:0")]
BAD += [("1:0:0:2", r"channel must be in 0\.\.0"), ("0:4:2:0", r"row 4, column 2 is at level 1 of 0\.\.1")]


@pytest.mark.parametrize("name, rule", [*BAD, ("2:0:0:0", r"row 0, column 0 is at level 1 of 0\.\.1")])
def test_bad_latents(name, rule):
    with pytest.raises((argparse.ArgumentTypeError, UserError), match=f"{name}.*: .*{rule}"):
        check_latents([latent_name(name)], RGFlow(1, 8, nlayers=1, nhidden=4).level_map)
