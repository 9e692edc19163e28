"""configs/run_all.sh: what it leaves in weights/, and what it does when a run fails."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, SMALL

from utils import checkpoint
from utils.logging import read_records


@pytest.fixture
def run_all(tmp_path):
    """Run the script in a folder that has only it, main.py and weights/; returns the exit status."""
    for name in ("configs", "weights"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "configs" / "run_all.sh", tmp_path / "configs")
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JOBS": "1"}

    def run_all(*names, flags=""):
        command = ["sh", str(tmp_path / "configs" / "run_all.sh"), *names]
        return subprocess.run(command, env={**environment, "FLAGS": flags}, timeout=300).returncode

    return run_all


def test_a_run_that_fails_does_not_stop_the_next(run_all, images, tmp_path):
    folder = tmp_path / "weights"
    good = f"--data folder --data_path {images} {SMALL} --print_step 1 --max_steps 2"
    (folder / "bad.args").write_text(good.replace(str(images), str(tmp_path / "none")))
    (folder / "good.args").write_text(good)
    assert run_all() != 0
    assert sorted(path.name for path in folder.iterdir()) == ["bad.args", "good.args", "good.jsonl", "good.state"]
    assert run_all("good", flags="--max_steps 3") == 0
    state = checkpoint.read(folder / "good.state")
    assert state["step"] == 3 and not checkpoint.is_full(state)
    assert [record["step"] for record in read_records(folder / "good.jsonl") if record["kind"] == "train"] == [1, 2, 3]
    digest = hashlib.sha256((folder / "good.state").read_bytes()).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  good.state\n"
