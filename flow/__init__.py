"""Flows on images: RG-Flow and the baseline Real NVP, with preprocessing (`preprocess`) and geometry (`hierarchy`)."""

from .load import load
from .real_nvp import RealNVP
from .rg_flow import RGFlow

__all__ = ["RGFlow", "RealNVP", "load"]
