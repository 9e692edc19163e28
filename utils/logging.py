"""The two logs of a run: prose for people (`.log`) and one JSON record per line for scripts (`.jsonl`)."""

import json
import os
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from .files import naming, replacing


class RunLog:
    """Appends to `{base}.log` and `{base}.jsonl`.

    base: path without ending, or None to write no files; stdout: whether prose is printed too
    step: records of later steps and lines that are no records are cut off; a resumed run writes them again
    """

    def __init__(self, base, stdout, step=0):
        self.stdout, self.text_path, self.records_path = stdout, None, None
        if base is not None:
            base.parent.mkdir(parents=True, exist_ok=True)
            self.text_path, self.records_path = Path(f"{base}.log"), Path(f"{base}.jsonl")
            if self.records_path.exists():
                records = (each for each in read_records(self.records_path) if each.get("step", 0) <= step)
                kept = "".join(json.dumps(record) + "\n" for record in records).encode()
                if kept != self.records_path.read_bytes():
                    with replacing(self.records_path) as file:
                        file.write(kept)
            if self.text_path.exists() and self.text_path.read_bytes()[-1:] not in (b"", b"\n"):
                append(self.text_path, "")  # a killed process, or a full disk, has left the last line incomplete

    def text(self, line):
        """One line of prose."""
        if self.stdout:
            tqdm.write(line)
        append(self.text_path, line)

    def sync(self):
        """Make the records last through a power cut."""
        if self.records_path and self.records_path.exists():
            with naming(self.records_path), open(self.records_path, "rb+") as file:
                os.fsync(file.fileno())

    def record(self, **fields):
        """One JSON record. Raises ValueError for numbers that are not finite, which JSON does not have."""
        append(self.records_path, json.dumps(fields, allow_nan=False))


def append(path, line):
    if path is not None:
        with naming(path), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_records(path):
    """The records of a `.jsonl` file; lines that are none, such as an incomplete last one, are left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with suppress(RecursionError, ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and line.endswith("\n") and isinstance(record.get("step", 0), (int, float)):
                records.append(record)
    return records


def read_bpds(path):
    """{"train": records, "test": records} of a `.jsonl` file, those with a step from 1 and bits per dimension (in
    training the mean over the steps since the record before). Raises OSError, ValueError if there is none."""
    found = {"train": [], "test": []}
    for record in read_records(path):
        kind, numbers = record.get("kind"), [record.get("step"), record.get("bpd")]
        numbers += [record[key] for key in ("seconds", "bpd_stderr", "lr") if key in record]
        numeric = all(type(number) in (int, float) and abs(number) < 1e12 for number in numbers)
        if kind in ("train", "test") and numeric and record["step"] >= 1:
            found[kind].append(record)
    if not any(found.values()):
        raise ValueError("no record with bits per dimension, so it is not the .jsonl file of a run")
    return found


def run_name(path):
    """{data}/{network}{infix} of a log {data}/{network}/out{infix}.jsonl, of others the file's name without ending."""
    path = Path(path).resolve()
    if not path.stem.startswith("out"):
        return path.stem
    return f"{path.parent.parent.name}/{path.parent.name}{path.stem.removeprefix('out')}"
