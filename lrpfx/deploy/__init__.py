"""An Explainer -> a program in a file, that computes output and relevance without the library."""

from lrpfx.deploy.export import export

__all__ = ["export"]
