"""3D Chairs from a small tree in the archive's layout."""

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from utils.cli import UserError


def weights(size, L):
    """Antialiased bicubic (a = -1/2) from `size` to L pixels, as a matrix (L, size)."""
    scale = size / L
    distance = abs((np.arange(size) + 0.5)[None] - (np.arange(L)[:, None] + 0.5) * scale) / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return kernel / kernel.sum(1, keepdims=True)


def render(root, chair, name, pixels):
    path = root / "rendered_chairs" / chair / "renders" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """30 renderings; rendering k, in the order of the paths, is grey 8 k."""
    for k in range(30):
        pixels = np.full((600, 600, 3), 8 * k, np.uint8)
        render(tmp_path, f"chair{k // 10}", f"image_{k % 10:03}_p020.png", pixels)
    (tmp_path / "rendered_chairs" / "all_chair_names.mat").write_bytes(b"MATLAB")
    return tmp_path


def test_split(root):
    dataset = open_dataset("chair600", root, 3, 32, progress=False)
    assert dataset.train.shape == (27, 3, 32, 32) and dataset.test.shape == (
        3,
        3,
        32,
        32,
    )  # 30 · 77730 / 86366 = 27.0002
    values = [array[:, 0, 5, 5] // 8 for array in (dataset.train, dataset.test)]
    assert sorted(np.concatenate(values).tolist()) == list(range(30))
    assert sorted(values[1].tolist()) == sorted(np.random.default_rng(0).permutation(30)[27:].tolist())
    assert "27 training and 3 test images here, 77,730 and 8,636" in dataset.warnings[0]


def test_crop_and_antialiased_bicubic(root):
    rng = np.random.default_rng(5)
    for k in range(30):
        pixels = np.full((600, 600, 3), 255, np.uint8)  # what lies outside the central 300 x 300 must not be seen
        pixels[150:450, 150:450] = rng.integers(0, 256, (300, 300, 3))
        render(root, f"chair{k // 10}", f"image_{k % 10:03}_p020.png", pixels)
    image = open_dataset("chair600", root, 3, 32, progress=False).train[-1]
    last = next(k for k in range(29, -1, -1) if k not in np.random.default_rng(0).permutation(30)[27:])
    rng = np.random.default_rng(5)
    crop = [rng.integers(0, 256, (300, 300, 3)) for _ in range(last + 1)][-1].astype(float)
    expected = np.einsum("ih,hwc,jw->cij", weights(300, 32), crop, weights(300, 32))
    assert abs(image - expected).max() < 1.5  # two roundings to 8 bits


def test_a_completed_tree_is_prepared_anew(root):
    open_dataset("chair600", root, 3, 32, progress=False)
    for name in ("image_010.png", "image_011.png", "image_012.png"):
        render(root, "chair2", name, np.zeros((600, 600, 3), np.uint8))
    dataset = open_dataset("chair600", root, 3, 32, progress=False)
    assert len(dataset.train) == 29 and "source files have changed" in dataset.warnings[0]


def test_missing(tmp_path):
    with pytest.raises(UserError) as caught:
        open_dataset("chair600", tmp_path, 3, 32, progress=False)
    for piece in (
        "willow/research/seeing3Dchairs/data/rendered_chairs.tar",
        f"{tmp_path}/rendered_chairs/<chair>/renders",
    ):
        assert piece in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "cut", "small"])
def test_bad_rendering_is_named(kind, root):
    path = root / "rendered_chairs" / "chair1" / "renders" / "image_004_p020.png"
    if kind == "small":
        Image.new("RGB", (299, 600)).save(path)
    else:
        path.write_bytes(b"text" if kind == "text" else path.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"{path}: not a readable rendering") as caught:
        open_dataset("chair600", root, 3, 32, progress=False)
    assert "\n" not in str(caught.value)
