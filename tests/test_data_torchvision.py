"""CIFAR-10 and MNIST through torchvision's own readers, from small files in the original formats."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
from urllib.error import URLError

import numpy as np
import pytest
import sets
from torchvision.datasets import CIFAR10, MNIST, cifar, mnist


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise URLError("no network here")

    for module in (cifar, mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of 2 images and one of 3; pixel value = batch + 10 image + 50 channel + row + column."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    files = []
    for batch, size in enumerate([2, 2, 2, 2, 2, 3]):
        path = folder / ("test_batch" if batch == 5 else f"data_batch_{batch + 1}")
        image, channel, row, column = np.ogrid[:size, :3, :32, :32]
        pixels = (batch + 10 * image + 50 * channel + row + column).astype(np.uint8)
        path.write_bytes(pickle.dumps({"data": pixels.reshape(size, 3072), "labels": [0] * size}))
        files.append([path.name, md5(path)])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    monkeypatch.setattr(CIFAR10, "train_list", files[:5])
    monkeypatch.setattr(CIFAR10, "test_list", files[5:])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


@pytest.fixture
def raw(tmp_path):
    """IDX files with 4 and 2 digits; pixel value = number + 5 row + column."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 4), ("t10k", 2)):
        number, row, column = np.ogrid[:count, :28, :28]
        pixels = (number + 5 * row + column).astype(np.uint8).tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(count))
    return folder


def test_cifar10(cifar10):
    dataset = sets.opened("cifar10", cifar10)
    assert (len(dataset.train), dataset.train[7, 2, 30, 4]) == (10, 3 + 10 + 100 + 34)  # second of the fourth batch
    assert (len(dataset.test), dataset.test[2, 1, 0, 31]) == (3, 5 + 20 + 50 + 31)
    assert dataset.warnings == ["cifar10: 10 training and 3 test images here, 50,000 and 10,000 in the whole set"]
    (dataset.path / "train.npy").unlink()
    os.truncate(cifar10 / "cifar-10-batches-py" / "data_batch_3", 1000)
    sets.refused("cifar10", cifar10, f"cifar10: not whole in {cifar10}", "no network here", lines=3)


def test_mnist32(raw, tmp_path, monkeypatch):
    dataset = sets.opened("mnist32", tmp_path, 1)
    assert (len(dataset.train), len(dataset.test), dataset.test[1, 0, 2 + 10, 2 + 20]) == (4, 2, 1 + 50 + 20)
    number, row, column = np.ogrid[:4, :28, :28]
    assert (dataset.train[:, 0] == np.pad(number + 5 * row + column, ((0, 0), (2, 2), (2, 2)))).all()
    shutil.rmtree(raw)
    monkeypatch.setattr(MNIST, "__init__", None)  # prepared arrays need neither files nor torchvision
    assert sets.opened("mnist32", tmp_path, 1).fingerprint == dataset.fingerprint


def test_packed_mnist_is_unpacked(raw, tmp_path, monkeypatch):
    """The files as one fetches them by hand."""
    monkeypatch.undo()
    for path in raw.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))
        path.rename(raw / f"{path.name}.gz")
    monkeypatch.setattr(MNIST, "resources", [(path.name, md5(path)) for path in raw.iterdir()])
    assert sets.opened("mnist32", tmp_path, 1).test[1, 0, 12, 22] == 71


CIFAR = "cifar-10-python.tar.gz https://www.cs.toronto.edu/~kriz/ c58f30108f718f92721af3b95e74349a"
DIGITS = "https://ossci-datasets.s3.amazonaws.com/mnist/ MNIST/raw/train-images-idx3-ubyte.gz"
DIGITS += " MNIST/raw/t10k-labels-idx1-ubyte.gz 9fb629c4189551a2d022fa330f9573f3"


@pytest.mark.parametrize("name, nchannels, lines, pieces", [("cifar10", 3, 3, CIFAR), ("mnist32", 1, 6, DIGITS)])
def test_missing_files_without_network(name, nchannels, lines, pieces, tmp_path):
    pieces = f"{name}: ", "no network here", str(tmp_path), *pieces.split()
    sets.refused(name, tmp_path, *pieces, nchannels=nchannels, lines=lines)


@pytest.mark.parametrize("content", [b"", b"<html>", struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(100), bytes(3000)])
def test_damaged_mnist(content, raw, tmp_path):
    (raw / "train-images-idx3-ubyte").write_bytes(content)
    sets.refused("mnist32", tmp_path, f"mnist32: not whole in {tmp_path}", nchannels=1, lines=6)
