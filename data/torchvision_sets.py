"""CIFAR-10 (Appendix G) and MNIST through torchvision, which fetches, checks and reads the original files.

MNIST's 28 x 28 digits are padded by 2 zeros on each side to 32 x 32.
"""

import pickle
import tarfile
import zlib
from functools import partial

import numpy as np

from utils.cli import UserError

from .arrays import Preparation

HELP = {
    "cifar10": """Without a network, fetch https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz
  (MD5 c58f30108f718f92721af3b95e74349a) and put it at
  {root}/cifar-10-python.tar.gz""",
    "mnist32": """Without a network, fetch from https://ossci-datasets.s3.amazonaws.com/mnist/ and put at
  {root}/MNIST/raw/train-images-idx3-ubyte.gz  (MD5 f68b3c2dcbeaaa9fbdd348bbdeb94873)
  {root}/MNIST/raw/train-labels-idx1-ubyte.gz  (MD5 d53e105ee54ea40749a09fcbcd1e9432)
  {root}/MNIST/raw/t10k-images-idx3-ubyte.gz   (MD5 9fb629c4189551a2d022fa330f9573f3)
  {root}/MNIST/raw/t10k-labels-idx1-ubyte.gz   (MD5 ec29112dd5afa0611ce80d1b7f02629c)
with no unpacked files of these names beside them.""",
}
# What torchvision raises without a network, without permission, or on damaged files.
FAILURES = OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError
FAILURES += tarfile.TarError, zlib.error, pickle.UnpicklingError


def prepare(name, data_path, nchannels, L):
    """The Preparation of "cifar10" or "mnist32". Torchvision keeps its files below `data_path`."""
    recipe = {"name": name, "version": 1, "nchannels": nchannels, "L": L}
    return Preparation(recipe, None, partial(_build, name, data_path), pillow=False)


def _build(name, data_path, folder):
    from torchvision import datasets  # slow to import, and not needed once the arrays are there

    reader = {"cifar10": datasets.CIFAR10, "mnist32": datasets.MNIST}[name]
    for split in ("train", "test"):
        try:
            data = np.asarray(reader(data_path, train=split == "train", download=True).data)
        except FAILURES as error:
            reason, help = " ".join(str(error).split()), HELP[name].format(root=data_path)
            raise UserError(f"{name}: not whole in {data_path}, nor to be downloaded ({reason}). {help}") from error
        if name == "mnist32":
            data = np.pad(data, ((0, 0), (2, 2), (2, 2)))[..., None]
        np.save(folder / f"{split}.npy", np.ascontiguousarray(data.transpose(0, 3, 1, 2)))  # (N, C, 32, 32)
    return []
