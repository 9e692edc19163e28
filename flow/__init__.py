"""Flows on images: RG-Flow, what goes before it (`preprocess`) and what its geometry says (`hierarchy`)."""

from .load import load
from .rg_flow import RGFlow

__all__ = ["RGFlow", "load"]
