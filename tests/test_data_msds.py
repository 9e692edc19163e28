"""MSDS1 and MSDS2 (Appendix B): geometry, colours, labels, seeds and processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from runs import ROOT
from sets import opened

from data import msds


def literal(ovals):
    """Appendix B to the letter, on RGBA tiles."""
    image = Image.new("RGB", (32, 32), "black")
    for x, y, angle, *colour in ovals.tolist():
        tile = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
        ImageDraw.Draw(tile).ellipse((1, 3, 7, 5), fill=tuple(int(c) for c in colour))
        tile = tile.rotate(angle, Image.BICUBIC)
        image.paste(tile, (int(x), int(y)), mask=tile)
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("variant", [1, 2])
def test_images_are_those_of_the_labels(variant):
    images, ovals, _ = msds.generate(variant, 0, 0, 40, processes=1)
    for image, labels in zip(images, ovals, strict=True):
        assert (image == literal(labels)).all()


def test_upright_ovals():
    oval = np.zeros((8, 8), bool)
    oval[4, 1:8] = oval[3, 2:7] = oval[5, 2:7] = True  # Pillow's ellipse in the box (1, 3, 7, 5), both ends included
    image = msds.draw_ovals(np.array([(8 * k, 16, 0, 200, 100, 50) for k in range(4)]))
    assert (image[:, 16:24] == np.tile(oval, 4) * np.array([200, 100, 50])[:, None, None]).all()


@pytest.mark.parametrize("angle", [20, 45, 70, 110, 160])
def test_angles_are_anticlockwise(angle):
    image = msds.draw_ovals(np.array([[8, 8, angle, 200, 0, 0]]))
    rows, columns = np.mgrid[:32, :32].reshape(2, -1)
    (xx, xy), (_, yy) = np.cov(columns, -rows, aweights=image[0].flatten())
    measured = np.degrees(np.arctan2(2 * xy, xx - yy) / 2)
    assert abs((measured - angle + 90) % 180 - 90) < 4


def labels(variant):
    """Shift (N, 16, 2), angle and colour of the ovals, base, of 1,500 images."""
    _, ovals, base = msds.generate(variant, 0, 0, 1500, processes=1)
    k = np.arange(16)
    return ovals[..., :2] - 8 * np.stack((k // 4, k % 4), -1), ovals[..., 2], ovals[..., 3:], base


def test_label_statistics_of_msds1():
    shift, angle, colour, base = labels(1)
    for axis in shift.transpose(2, 0, 1):
        assert set(np.unique(axis)) == {-1, 0, 1} and abs(axis.mean()) < 0.02
    assert 0 <= angle.min() < 0.1 and 179.9 < angle.max() <= 180 and abs(angle.mean() - 90) < 2
    assert base.shape == (1500, 3) and base.min() == 32 and base.max() == 223 and abs(base.mean() - 127.5) < 3
    own = colour - base[:, None]
    assert own.min() == -32 and own.max() == 32 and abs(own.mean()) < 0.5
    assert abs(own.std() - np.sqrt((65**2 - 1) / 12)) < 0.2 and (colour == colour.round()).all()
    assert abs(np.corrcoef(angle[:, 0], angle[:, 1])[0, 1]) < 0.1  # ovals turn freely


def test_label_statistics_of_msds2():
    _, angle, colour, base = labels(2)
    turn = angle - base
    assert base.shape == (1500, 1) and 0 <= base.min() < 1 and 179 < base.max() <= 180 and abs(base.mean() - 90) < 5
    assert -1e-4 < turn.min() < 0.1 and 44.9 < turn.max() < 45.001 and abs(turn.mean() - 22.5) < 0.5
    assert colour.min() == 0 and colour.max() == 255 and abs(colour.mean() - 127.5) < 1
    assert abs(np.corrcoef(colour[:, 0, 0], colour[:, 1, 0])[0, 1]) < 0.1


def test_same_bytes_with_any_number_of_processes(monkeypatch):
    monkeypatch.setattr(msds, "CHUNK", 20)
    one = msds.generate(2, 7, 3, 90, processes=1)
    two = msds.generate(2, 7, 3, 90, processes=2)
    later = msds.generate(2, 7, 50, 90, processes=1)
    assert [array.shape for array in one] == [(87, 3, 32, 32), (87, 16, 6), (87, 1)]
    for a, b, c in zip(one, two, later, strict=True):
        assert a.dtype == b.dtype and (a == b).all() and (a[47:] == c).all()
    assert not (one[0] == msds.generate(2, 8, 3, 90, processes=1)[0]).all()
    assert len(np.unique(one[1][:, :, 2])) == 87 * 16  # no image twice


CODE = """
import os, sys
print("main runs")
sys.path.insert(0, os.environ["CODE"])
from data import msds
msds.CHUNK = 10
print(msds.generate(1, 0, 0, 20, processes=2)[0].sum())
print({"torch", "torchvision"} & set(sys.modules))
"""


@pytest.mark.parametrize("how", [["-c", CODE], ["-"], ["unguarded.py"]])
def test_spawned_workers_leave_the_main_module_alone(how, tmp_path):
    (tmp_path / "unguarded.py").write_text(CODE)
    options = {"input": CODE, "cwd": tmp_path, "env": {**os.environ, "CODE": str(ROOT)}, "timeout": 60}
    run = subprocess.run([sys.executable, *how], text=True, capture_output=True, **options)
    expected = msds.generate(1, 0, 0, 20, processes=1)[0].sum()
    assert (run.returncode, run.stdout) == (0, f"main runs\n{expected}\nset()\n"), run.stderr


def test_prepared_with_labels(monkeypatch, tmp_path):
    monkeypatch.setattr(msds, "SIZES", (50, 14))
    dataset = opened("msds1", tmp_path)
    images, ovals, base = msds.generate(1, 0, 0, 64, processes=1)
    assert (dataset.train == images[:50]).all() and (dataset.test == images[50:]).all()
    assert dataset.path == tmp_path / "prepared_arrays" / "msds1_3x32x32" and dataset.warnings == []
    for k, array in enumerate((ovals, base)):
        parts = [msds.read_labels(dataset.path, split, 50)[k] for split in ("train", "test")]
        assert parts[0].dtype == np.float32 and (np.concatenate(parts) == array).all()
    elsewhere, other = opened("msds1", tmp_path / "a").fingerprint, opened("msds2", tmp_path).fingerprint
    assert dataset.fingerprint == elsewhere != other and len(other) == 16


def die(*task):
    os.abort()


def test_bad_ends_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="variant 3: must be 1 or 2"):
        msds.draw_image(3, np.random.default_rng(0))
    monkeypatch.setattr(msds, "CHUNK", 10)
    monkeypatch.setattr(msds, "_draw_range", die)
    with pytest.raises(msds.UserError, match="msds1: a worker process died"):
        msds.generate(1, 0, 0, 20, processes=2)
