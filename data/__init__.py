"""Where images come from (section 4.1, Appendix B): one registry, name -> channels, edge, how to prepare.

A new data set is one more entry of `DATASETS`. Its `prepare(data_path, nchannels, L)` returns a
`data.arrays.Preparation`: what determines the arrays, and a function that builds them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils.cli import UserError

from . import celeba, chairs, folder, msds, torchvision_sets
from .arrays import Dataset, Preparation, open_arrays

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "UserError", "open_dataset"]


@dataclass(frozen=True)
class DatasetSpec:
    """prepare: (data_path, nchannels, L) -> Preparation
    nchannels, L: shape (C, L, L) of an image, a mere default unless `fixed_shape`
    flips: random horizontal flips in training
    sizes: (train, test) images of the whole set, None where there is no such number to compare with
    """

    prepare: Callable[[Path, int, int], Preparation]
    nchannels: int = 3
    L: int = 32
    fixed_shape: bool = True
    flips: bool = False
    sizes: tuple[int, int] | None = None


DATASETS = {
    "celeba32": DatasetSpec(celeba.prepare, flips=True, sizes=(162_770, 19_962)),
    "mnist32": DatasetSpec(partial(torchvision_sets.prepare, "mnist32"), nchannels=1, sizes=(60_000, 10_000)),
    "cifar10": DatasetSpec(partial(torchvision_sets.prepare, "cifar10"), sizes=(50_000, 10_000)),
    "chair600": DatasetSpec(chairs.prepare, flips=True, sizes=(77_730, 8_636)),
    "msds1": DatasetSpec(partial(msds.prepare, 1)),
    "msds2": DatasetSpec(partial(msds.prepare, 2)),
    "folder": DatasetSpec(folder.prepare, fixed_shape=False),
}


def open_dataset(name, data_path, nchannels, L, progress=True):
    """The set `name` below the folder `data_path`, prepared first where that is not done yet.

    `train` and `test` of the result are copy-on-write uint8 memmaps (N, C, L, L), `fingerprint` identifies preparation
    and content, `warnings` holds sentences to print. Raises UserError for a name, a shape or source files that will not
    do, OSError where the disk is full or the folder cannot be written.
    """
    if name not in DATASETS:
        raise UserError(f"--data {name}: must be one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    for flag, given, own in (("--nchannels", nchannels, spec.nchannels), ("--L", L, spec.L)):
        if spec.fixed_shape and given != own:
            raise UserError(f"{flag} {given}: must be {own} for {name}")
    data_path = Path(data_path).expanduser()
    dataset = open_arrays(data_path, spec.prepare(data_path, nchannels, L), progress)
    sizes = len(dataset.train), len(dataset.test)
    if spec.sizes not in (None, sizes):
        note = "{}: {:,} training and {:,} test images here, {:,} and {:,} in the whole set"
        dataset = replace(dataset, warnings=[*dataset.warnings, note.format(name, *sizes, *spec.sizes)])
    return dataset
