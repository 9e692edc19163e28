"""A small random network in Inception's place, as torch-fidelity takes feature extractors, and weights for it."""

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

NAME, FEATURES = "random-projection", 4


class RandomProjection(FeatureExtractorBase):
    """Linear features of the grey levels: (B, 3, H, W) uint8 -> (B, FEATURES) float64."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.register_buffer("matrix", torch.load(feature_extractor_weights_path, weights_only=True)["matrix"])

    get_provided_features_list = staticmethod(lambda: ("projection",))
    get_default_feature_layer_for_metric = staticmethod(lambda metric: "projection")

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return (images.flatten(1).to(self.matrix.dtype) @ self.matrix,)


def install(monkeypatch, folder, inputs):
    """Put it in Inception's place; returns the file of its weights, random with `inputs` rows, and the matrix."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, RandomProjection)
    monkeypatch.setattr("utils.metrics.INCEPTION", NAME)
    matrix = torch.randn(inputs, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save({"matrix": matrix}, folder / "projection.pth")
    return folder / "projection.pth", matrix.numpy()
