"""3D Chairs from a small tree in the archive's layout."""

import numpy as np
import pytest
import sets

ORDER = np.random.default_rng(0).permutation(30)


def weights(size, L):
    """Antialiased bicubic (a = -1/2) from `size` to L pixels, as a matrix (L, size)."""
    scale = size / L
    distance = abs((np.arange(size) + 0.5)[None] - (np.arange(L)[:, None] + 0.5) * scale) / scale
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return kernel / kernel.sum(1, keepdims=True)


def path_of(root, k):
    return root / "rendered_chairs" / f"chair{k // 10}" / "renders" / f"image_{k % 10:03}_p020.png"


@pytest.fixture
def root(tmp_path):
    """30 renderings; rendering k, in the order of the paths, is grey 8 k."""
    for k in range(30):
        sets.save(path_of(tmp_path, k), (8 * k,) * 3, (600, 600))
    (tmp_path / "rendered_chairs" / "all_chair_names.mat").write_bytes(b"MATLAB")
    return tmp_path


def test_split(root):
    dataset = sets.opened("chair600", root)
    train, test = ((array[:, 0, 5, 5] // 8).tolist() for array in (dataset.train, dataset.test))
    assert (train, test) == (sorted(ORDER[:27]), sorted(ORDER[27:]))  # 30 · 77730 / 86366 = 27.0002
    assert "27 training and 3 test images here, 77,730 and 8,636" in dataset.warnings[0]
    for k in (30, 31, 32):
        sets.save(path_of(root, k), (0, 0, 0), (600, 600))
    dataset = sets.opened("chair600", root)
    assert len(dataset.train) == 29 and "source files have changed" in dataset.warnings[0]


def test_crop_and_antialiased_bicubic(root):
    pixels = np.full((600, 600, 3), 255, np.uint8)  # what lies outside the central 300 x 300 must not be seen
    pixels[150:450, 150:450] = np.random.default_rng(5).integers(0, 256, (300, 300, 3))
    sets.save(path_of(root, max(ORDER[:27])), pixels)
    image = sets.opened("chair600", root).train[-1]
    crop = pixels[150:450, 150:450].astype(float)
    expected = np.einsum("ih,hwc,jw->cij", weights(300, 32), crop, weights(300, 32))
    assert abs(image - expected).max() < 1.5  # two roundings to 8 bits


def test_missing(tmp_path):
    pieces = "/willow/research/seeing3Dchairs/data/rendered_chairs.tar", f"{tmp_path}/rendered_chairs/<chair>/renders"
    sets.refused("chair600", tmp_path, *pieces, lines=3)


def test_bad_rendering_is_named(root):
    path = path_of(root, 14)
    cut = path.read_bytes()[:-500]
    sets.save(path, size=(299, 600))
    small = path.read_bytes()
    for content in (b"text", cut, small):
        path.write_bytes(content)
        sets.refused("chair600", root, f"{path}: not a readable rendering")
