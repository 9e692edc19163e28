"""The registry of data sets (sections 4.1 and 4.2, Appendices B and G): name -> channels, edge, how to prepare.

A new data set is an entry of `DATASETS`; its `prepare` says what determines the arrays and how to build them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from utils.cli import UserError

from . import celeba, chairs, folder, msds, torchvision_sets
from .arrays import FOLDER, Dataset, Preparation, open_arrays

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "open_dataset"]


@dataclass(frozen=True)
class DatasetSpec:
    prepare: Callable[[Path, int, int], Preparation]  # of data_path, nchannels, L
    nchannels: int = 3
    L: int = 32  # edge of an image (C, L, L); both are mere defaults unless fixed_shape
    fixed_shape: bool = True
    flips: bool = False  # random horizontal flips in training
    sizes: tuple[int, int] | None = None  # (train, test) images of the whole set, None where there is no such number


DATASETS = {
    "celeba32": DatasetSpec(celeba.prepare, flips=True, sizes=(162_770, 19_962)),
    "mnist32": DatasetSpec(partial(torchvision_sets.prepare, "mnist32"), nchannels=1, sizes=(60_000, 10_000)),
    "cifar10": DatasetSpec(partial(torchvision_sets.prepare, "cifar10"), sizes=(50_000, 10_000)),
    "chair600": DatasetSpec(chairs.prepare, flips=True, sizes=(77_730, 8_636)),
    "msds1": DatasetSpec(partial(msds.prepare, 1)),
    "msds2": DatasetSpec(partial(msds.prepare, 2)),
    "folder": DatasetSpec(folder.prepare, fixed_shape=False),
}
PREPARED = Path("datasets", FOLDER)  # not in a folder of the user's


def open_dataset(name, data_path, nchannels, L, prepared_path=None):
    """The set `name` below the folder `data_path`, prepared if that is not done yet: an `arrays.Dataset`. The arrays
    lie in `prepared_path`, by default `data_path`/prepared_arrays, of a user's images PREPARED. Raises UserError for an
    unusable name, shape or source file, OSError if the disk is full or the folder read-only."""
    if name not in DATASETS:
        raise UserError(f"--data {name}: must be one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    for flag, given, own in (("--nchannels", nchannels, spec.nchannels), ("--L", L, spec.L)):
        if spec.fixed_shape and given != own:
            raise UserError(f"{flag} {given}: must be {own} for {name}")
    data_path = Path(data_path).expanduser()
    preparation = spec.prepare(data_path, nchannels, L)
    place = prepared_path or (PREPARED if preparation.own_name else data_path / FOLDER)
    dataset = open_arrays(Path(place).expanduser(), preparation)
    sizes = len(dataset.train), len(dataset.test)
    if spec.sizes in (None, sizes):
        return dataset
    note = "{}: {:,} training and {:,} test images here, {:,} and {:,} in the whole set"
    return replace(dataset, warnings=[*dataset.warnings, note.format(name, *sizes, *spec.sizes)])
