"""FID, KID, precision and recall, all by torch-fidelity, which is optional and imported only where it is needed."""

import hashlib
import re
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils.data import Subset

from .cli import UserError

MIN_IMAGES = 2048  # with fewer the covariance of Inception's 2,048 features is singular
INCEPTION = "inception-v3-compat"  # torch-fidelity's name of the network of the FID literature
HASH = "6726825d"  # start of the SHA-256 of its weights
RESIZE = "bilinear to 299 x 299 as in TensorFlow 1, inside the feature extractor"


def inception_weights(path=None):
    """(path, SHA-256) of Inception's weights: the file `path`, or torch-fidelity's own in torch.hub's folder, which is
    downloaded unless it is there. Raises UserError if that fails, for another file and without the library."""
    try:
        found = version("torch-fidelity")
    except PackageNotFoundError:
        found = "none"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < (0, 4):
        needed = "needs torch-fidelity 0.4 or newer: pip install -r requirements-metrics.txt"
        raise UserError(f"--fid: {needed} (installed: {found})")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as EXTRACTORS

    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name))
    advice = "" if path else f"; fetch {URL} elsewhere and put it there, or name it with --feature_weights"
    extractor = EXTRACTORS[INCEPTION]
    layer = extractor.get_default_feature_layer_for_metric("fid")
    try:
        if not (path or file.exists()):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), HASH, progress=sys.stderr.isatty())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        torch.load(file, map_location="cpu", weights_only=True)  # torch-fidelity would run code from the file
        extractor(INCEPTION, [layer], feature_extractor_weights_path=str(file))
    except Exception as error:  # whatever reading a damaged file raises
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        damaged = f"damaged, or not the weights of {INCEPTION} ({cause})"
        cause = error.strerror or cause if isinstance(error, OSError) else damaged
        raise UserError(f"--fid: feature weights {file}: {cause}{advice}") from error
    return file, digest


def image_distances(samples, images, weights, device, verbose=False):
    """FID, KID, precision and recall of samples against images, in Inception's last pooling layer.

    samples, images: uint8 (N, C, L, L), at least MIN_IMAGES each, C = 1 or 3; weights: of `inception_weights`
    Returns fid; kid_mean and kid_std over subsets; precision, the fraction of samples within the manifold of the
    images, and recall, the reverse; fid_settings.
    """
    import torch_fidelity
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as EXTRACTORS

    settings = {"kid_subsets": 100, "kid_subset_size": 1000, "prc_neighborhood": 3}
    options = {"prc_batch_size": 2000, "save_cpu_ram": True}  # no worker processes, distances block by block
    options |= {"feature_extractor": INCEPTION, "feature_extractor_weights_path": str(weights[0]), "cache": False}
    options |= {"fid": True, "kid": True, "prc": True, "cuda": torch.device(device).type == "cuda", "verbose": verbose}
    for name, each in (("input1", samples), ("input2", images)):  # grey ones three times
        options[name] = Subset(torch.as_tensor(each).expand(-1, 3, -1, -1), range(len(each)))
    with torch.cuda.device(device) if options["cuda"] else nullcontext():
        values = torch_fidelity.calculate_metrics(**options, **settings)
    names = "fid", "kid_mean", "kid_std", "precision", "recall"
    results = {name: values[getattr(torch_fidelity, f"KEY_METRIC_{name.upper()}")] for name in names}
    layer = EXTRACTORS[INCEPTION].get_default_feature_layer_for_metric("fid")
    used = {"samples": len(samples), "images": len(images)}
    used |= {"library": "torch-fidelity", "version": version("torch-fidelity"), "feature_extractor": INCEPTION}
    used |= {"feature_layer": layer, "feature_weights": weights[0].name, "feature_weights_sha256": weights[1]}
    used |= {"resize": RESIZE, **settings}
    return {**results, "fid_settings": used}
