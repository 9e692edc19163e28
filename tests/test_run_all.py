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


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_next(images, tmp_path):
    """In a folder that has only the script, main.py and weights/."""
    folder, copy = tmp_path / "weights", tmp_path / "configs" / "run_all.sh"
    folder.mkdir()
    copy.parent.mkdir()
    shutil.copy(ROOT / "configs" / "run_all.sh", copy)
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")

    def run_all(*names, flags=""):
        more = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JOBS": "1", "FLAGS": flags}
        return subprocess.run(["sh", copy, *names], env={**os.environ, **more}, timeout=300).returncode

    good = f"--data folder --data_path {images} {SMALL} --print_step 1 --max_steps 2"
    (folder / "bad.args").write_text(good.replace(str(images), str(tmp_path / "none")))
    (folder / "good.args").write_text(good)
    assert run_all() != 0
    assert sorted(path.name for path in folder.iterdir()) == ["bad.args", "good.args", "good.jsonl", "good.state"]
    (folder / "good.args").rename(copy.parent / "good.args")
    assert run_all("good", flags="--max_steps 3") == 0
    state = checkpoint.read(folder / "good.state")
    assert state["step"] == 3 and not checkpoint.is_full(state)
    assert [record["step"] for record in read_records(folder / "good.jsonl") if record["kind"] == "train"] == [1, 2, 3]
    digest = hashlib.sha256((folder / "good.state").read_bytes()).hexdigest()
    assert (folder / "SHA256SUMS").read_text() == f"{digest}  good.state\n"
