"""Flows on images: RG-Flow, Real NVP to compare with, what goes before them (`preprocess`), geometry (`hierarchy`)."""

from .load import load
from .real_nvp import RealNVP
from .rg_flow import RGFlow

__all__ = ["RGFlow", "RealNVP", "load"]
