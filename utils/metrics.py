"""Distances between two sets of images: FID, KID, precision and recall, all computed by torch-fidelity.

torch-fidelity (0.4 or newer, `requirements-metrics.txt`) is optional and imported only where it is needed.
"""

import hashlib
import re
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .cli import UserError

MIN_IMAGES = 2048  # with fewer the covariance of Inception's 2,048 features is singular
INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network of the FID literature
HASH = "6726825d"  # start of the SHA-256 of its weights
RESIZE = "bilinear to 299 x 299 as in TensorFlow 1, inside the feature extractor"


class RGBImages(Dataset):
    """uint8 images (N, C, L, L), a numpy array or a tensor, as torch-fidelity takes them; grey ones three times."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = torch.as_tensor(self.images[index])
        return image.expand(3, *image.shape[1:])


def check_library():
    """The version of torch-fidelity. Raises UserError if it is missing or too old."""
    try:
        found = version("torch-fidelity")
        here = f"version {found} is installed"
    except PackageNotFoundError:
        found, here = "0.0", "it is not installed"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < (0, 4):
        raise UserError(f"--fid: needs torch-fidelity 0.4 or newer, {here}: pip install -r requirements-metrics.txt")
    return found


def inception_weights(path=None):
    """(path, SHA-256) of Inception's weights: the file `path`, or torch-fidelity's own in torch.hub's folder, which is
    downloaded unless it is there. Raises UserError if there is no such file or it does not hold them."""
    check_library()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as EXTRACTORS

    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
        if not path.exists():
            download(URL, path)
    extractor = EXTRACTORS[INCEPTION]
    layer = extractor.get_default_feature_layer_for_metric("fid")
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity would run code from the file
        extractor(INCEPTION, [layer], feature_extractor_weights_path=str(path))
    except OSError as error:
        raise UserError(f"--fid: feature weights {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever reading a damaged file raises
        cause = f"damaged, or not the weights of {INCEPTION} ({first_line(error)})"
        raise UserError(f"--fid: feature weights {path}: {cause}") from error
    return Path(path), digest


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def download(url, path):
    """Fetch Inception's weights. Raises UserError, which says what to put where, if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), HASH, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        advice = f"fetch {url} elsewhere and put it at {path}, or name it with --feature_weights"
        cause = f"needs Inception's weights, which cannot be downloaded ({first_line(error)})"
        raise UserError(f"--fid: {cause}: {advice}") from error


def image_distances(samples, images, weights, device, verbose=False):
    """FID, KID, precision and recall of samples against images, in Inception's last pooling layer.

    samples, images: uint8 (N, C, L, L), at least MIN_IMAGES each, C = 1 or 3; weights: of `inception_weights`
    Returns a flat dict: fid; kid_mean and kid_std over subsets; precision, the fraction of samples within the manifold
    of the images, and recall, the reverse; fid_settings.
    """
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as EXTRACTORS

    settings = {"kid_subsets": 100, "kid_subset_size": 1000, "prc_neighborhood": 3}
    options = {"prc_batch_size": 2000, "save_cpu_ram": True}  # no worker processes, distances block by block
    options |= {"feature_extractor": INCEPTION, "feature_extractor_weights_path": str(weights[0]), "cache": False}
    options |= {"fid": True, "kid": True, "prc": True, "cuda": torch.device(device).type == "cuda", "verbose": verbose}
    with torch.cuda.device(device) if options["cuda"] else nullcontext():
        values = torch_fidelity.calculate_metrics(
            input1=RGBImages(samples), input2=RGBImages(images), **options, **settings
        )
    names = "fid", "kid_mean", "kid_std", "precision", "recall"
    results = {name: values[getattr(torch_fidelity, f"KEY_METRIC_{name.upper()}")] for name in names}
    layer = EXTRACTORS[INCEPTION].get_default_feature_layer_for_metric("fid")
    used = {"samples": len(samples), "images": len(images), "library": "torch-fidelity", "version": check_library()}
    used |= {"feature_extractor": INCEPTION, "feature_layer": layer, "feature_weights": weights[0].name}
    used |= {"feature_weights_sha256": weights[1], "resize": RESIZE}
    return {**results, "fid_settings": {**used, **settings}}
