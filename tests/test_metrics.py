"""KID, precision and recall through torch-fidelity, with a random projection in Inception's place.

FID is compared with the closed form of two Gaussians in test_evaluate.py.
"""

import hashlib
import shutil
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from utils import metrics
from utils.cli import UserError

N, NAME = 3000, "random-projection"


class RandomProjection(FeatureExtractorBase):
    """Linear features of the grey levels: (B, 3, H, W) uint8 -> (B, 4) float64."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.register_buffer("matrix", torch.load(feature_extractor_weights_path, weights_only=True)["matrix"])

    get_provided_features_list = staticmethod(lambda: ("projection",))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "projection")

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return (images.flatten(1).to(self.matrix.dtype) @ self.matrix,)


def install(monkeypatch, folder, inputs):
    """Put this in Inception's place; returns the file of its weights, random with `inputs` rows, and the matrix."""
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, NAME, RandomProjection)
    monkeypatch.setattr(metrics, "INCEPTION", NAME)
    matrix = torch.randn(inputs, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save({"matrix": matrix}, folder / "projection.pth")
    return folder / "projection.pth", matrix.numpy()


@pytest.fixture
def projection(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path, 12)


def grey_levels(n, mean, deviations, seed):
    """n images (n, 3, 2, 2) of grey levels that are independent and normal, rounded."""
    values = np.random.default_rng(seed).normal(mean, 1, (n, 3, 2, 2)) - mean
    return (mean + values * np.reshape(deviations, (3, 2, 2))).round().clip(0, 255).astype(np.uint8)


def distances(samples, images, weights):
    return metrics.image_distances(samples, images, metrics.inception_weights(weights), "cpu")


def test_kid_against_its_definition(projection):
    """The unbiased cubic-kernel estimate over all images, in numpy; and 0 where both sets are of one distribution."""
    weights, matrix = projection[0], projection[1] / 100
    torch.save({"matrix": torch.from_numpy(matrix)}, weights)
    samples, images = (grey_levels(N, mean, np.full(12, 10), mean) for mean in (100, 120))
    results = distances(samples, images, weights)
    x, y = (each.reshape(N, -1) @ matrix for each in (samples, images))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    within = [(kernel(each, each).sum() - np.trace(kernel(each, each))) / (N * (N - 1)) for each in (x, y)]
    expected = sum(within) - 2 * kernel(x, y).mean()
    assert abs(results["kid_mean"] - expected) < 4 * results["kid_std"] / 100**0.5  # a mean over 100 subsets
    assert expected > 4 * results["kid_std"]
    same = distances(samples, grey_levels(N, 100, np.full(12, 10), 7), weights)
    assert abs(same["kid_mean"]) < 2 * same["kid_std"]


def test_precision_and_recall_are_not_swapped(projection):
    """Samples that cover one of two equal clusters of the data: all are like data, half of the data is not reached."""
    samples = grey_levels(N, 60, np.full(12, 8), 1)
    images = np.concatenate([grey_levels(N // 2, mean, np.full(12, 8), mean) for mean in (60, 180)])
    results = distances(samples, images, projection[0])
    assert results["precision"] > 0.9 and results["recall"] == pytest.approx(0.5, abs=0.05)


def test_grey_images_are_repeated_and_results_say_what_they_are(projection):
    rng = np.random.default_rng(0)
    grey, other = (rng.integers(0, 256, (n, 1, 2, 2), dtype=np.uint8) for n in (metrics.MIN_IMAGES, 2100))
    results = distances(torch.from_numpy(grey), other, projection[0])
    assert results["fid"] == distances(np.repeat(grey, 3, 1), np.repeat(other, 3, 1), projection[0])["fid"] > 1
    settings, digest = results["fid_settings"], hashlib.sha256(projection[0].read_bytes()).hexdigest()
    expected = {"samples": 2048, "images": 2100, "library": "torch-fidelity", "feature_weights": "projection.pth"}
    assert {**expected, "feature_weights_sha256": digest}.items() <= settings.items()
    assert settings["version"].startswith("0.") and "299" in settings["resize"]


def test_inceptions_weights_are_downloaded_checked_and_used(monkeypatch, tmp_path, projection):
    """They go where torch-fidelity itself would look; without a network the error says which file to put there."""
    path = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    fetch = Mock(side_effect=URLError("no network"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        metrics.inception_weights()
    for words in ("https://github.com/toshas/torch-fidelity/", str(path), "--feature_weights"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    fetch.side_effect = lambda url, path, *_, **__: shutil.copy(projection[0], path)
    for _ in range(2):
        assert metrics.inception_weights()[0] == path
    assert [called.args[2] for called in fetch.call_args_list] == ["6726825d"] * 2  # the second file was there


class Code:
    """A pickle that would write a file."""

    def __reduce__(self):
        return open, ("was_here", "w")


CONTENTS = [(None, "No such file"), (b"text", "damaged"), ({"matrix": 3}, "damaged"), ({}, "not the weights")]


@pytest.mark.parametrize("content, words", [*CONTENTS, (Code(), "damaged")])
def test_feature_weights_that_are_none(content, words, projection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "given.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"given\.pth.*{words}"):
        metrics.inception_weights(path)
    assert not Path("was_here").exists()


def test_inception_itself_refuses_foreign_weights(tmp_path):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*not the weights of inception-v3-compat"):
        metrics.inception_weights(tmp_path / "other.pth")


@pytest.mark.parametrize("found", [None, "0.3.0"])
def test_torch_fidelity_must_be_there_and_new_enough(found, monkeypatch):
    result = {"return_value": found} if found else {"side_effect": metrics.PackageNotFoundError}
    monkeypatch.setattr(metrics, "version", Mock(**result))
    with pytest.raises(UserError, match=r"torch-fidelity 0\.4.*requirements-metrics\.txt"):
        metrics.inception_weights()
