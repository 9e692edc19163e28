"""CIFAR-10 and MNIST through torchvision's own readers, from small files in the original formats."""

import gzip
import hashlib
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, MNIST, cifar, mnist

from data import open_dataset
from utils.cli import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise URLError("no network here")

    monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)
    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of 2 images and one of 3; pixel value = batch + 10 image + 50 channel + row + column."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    row, column = np.mgrid[:32, :32]
    lists = {"train_list": [], "test_list": []}
    for batch in range(6):
        name = "test_batch" if batch == 5 else f"data_batch_{batch + 1}"
        numbers = np.arange(3 if batch == 5 else 2)[:, None, None, None]
        channels = np.arange(3)[:, None, None]
        pixels = (batch + 10 * numbers + 50 * channels + row + column).astype(np.uint8)
        content = {"data": pixels.reshape(len(pixels), 3072), "labels": [0] * len(pixels)}
        (folder / name).write_bytes(pickle.dumps(content))
        lists["test_list" if batch == 5 else "train_list"].append([name, md5(folder / name)])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name, value in lists.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path


@pytest.fixture
def mnist32(tmp_path):
    """IDX files with 4 and 2 digits; pixel value = number + 5 row + column."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    row, column = np.mgrid[:28, :28]
    for split, count in (("train", 4), ("t10k", 2)):
        pixels = (np.arange(count)[:, None, None] + 5 * row + column).astype(np.uint8)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(count))
    return tmp_path


def test_cifar10(cifar10):
    dataset = open_dataset("cifar10", cifar10, 3, 32, progress=False)
    assert dataset.train.shape == (10, 3, 32, 32) and dataset.test.shape == (3, 3, 32, 32)
    assert dataset.train[7, 2, 30, 4] == 3 + 10 + 100 + 34  # second image of the fourth batch
    assert dataset.test[2, 1, 0, 31] == 5 + 20 + 50 + 31
    assert dataset.warnings == ["cifar10: 10 training and 3 test images here, 50,000 and 10,000 in the whole set"]


def test_mnist32(mnist32):
    dataset = open_dataset("mnist32", mnist32, 1, 32, progress=False)
    assert dataset.train.shape == (4, 1, 32, 32) and dataset.test.shape == (2, 1, 32, 32)
    assert dataset.train[3, 0, 2, 2] == 3 and dataset.train[3, 0, 29, 29] == 3 + 5 * 27 + 27
    assert dataset.test[1, 0, 2 + 10, 2 + 20] == 1 + 50 + 20
    frame = np.array(dataset.train)
    frame[..., 2:30, 2:30] = 0
    assert not frame.any() and dataset.train[..., 2:30, 2:30].any()


def test_prepared_arrays_need_neither_files_nor_torchvision(mnist32, monkeypatch):
    first = open_dataset("mnist32", mnist32, 1, 32, progress=False)
    for path in (mnist32 / "MNIST" / "raw").iterdir():
        path.unlink()
    monkeypatch.setattr(MNIST, "__init__", None)
    assert open_dataset("mnist32", mnist32, 1, 32, progress=False).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "name, nchannels, pieces",
    [
        (
            "cifar10",
            3,
            ["cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/", "c58f30108f718f92721af3b95e74349a"],
        ),
        (
            "mnist32",
            1,
            [
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "MNIST/raw/train-images-idx3-ubyte.gz",
                "MNIST/raw/t10k-labels-idx1-ubyte.gz",
                "9fb629c4189551a2d022fa330f9573f3",
            ],
        ),
    ],
)
def test_missing_files_without_network(name, nchannels, pieces, tmp_path):
    with pytest.raises(UserError, match=f"{name}: .*no network here") as caught:
        open_dataset(name, tmp_path, nchannels, 32, progress=False)
    for piece in [*pieces, str(tmp_path)]:
        assert piece in str(caught.value)


def test_damaged_cifar10(cifar10):
    path = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cifar10: not whole in .* no network here"):
        open_dataset("cifar10", cifar10, 3, 32, progress=False)


@pytest.mark.parametrize("content", [b"", b"<html>", struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(100), bytes(3000)])
def test_damaged_mnist(content, mnist32):
    (mnist32 / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match="mnist32: not whole in "):
        open_dataset("mnist32", mnist32, 1, 32, progress=False)


def test_packed_mnist_is_unpacked(mnist32, monkeypatch):
    """The files as one fetches them by hand."""
    monkeypatch.undo()
    raw, resources = mnist32 / "MNIST" / "raw", []
    for path in sorted(raw.iterdir()):
        packed = raw / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(MNIST, "resources", resources)
    assert open_dataset("mnist32", mnist32, 1, 32, progress=False).test[1, 0, 12, 22] == 71
