"""The two logs of a run: prose for people (`.log`) and one JSON record per line for scripts (`.jsonl`)."""

import json
import os
from pathlib import Path

from tqdm import tqdm


class RunLog:
    """Appends to `{base}.log` and `{base}.jsonl`.

    base: path without ending, or None to write no files
    stdout: whether prose is printed too
    step: records of later steps are cut off, with a last line that is incomplete; a continued run writes them anew
    """

    def __init__(self, base, stdout, step=0):
        self.stdout = stdout
        self.text_path = self.records_path = None
        if base is not None:
            base.parent.mkdir(parents=True, exist_ok=True)
            self.text_path, self.records_path = (Path(f"{base}{ending}") for ending in (".log", ".jsonl"))
            cut_records(self.records_path, step)

    def text(self, line):
        """One line of prose."""
        if self.stdout:
            tqdm.write(line)
        append(self.text_path, line)

    def record(self, **fields):
        """One JSON record. Raises ValueError for numbers that are not finite, which JSON does not have."""
        append(self.records_path, json.dumps(fields, allow_nan=False))


def append(path, line):
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_records(path):
    """The records of a `.jsonl` file; lines that are no JSON, such as an incomplete last one, are left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def cut_records(path, step):
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_records(path) if record.get("step", 0) <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
