"""Gradients, their averages, and occlusion: what relevance is compared with.

Each takes any model, also one that cannot be captured, and returns an ``lrpfx.Explanation``.
"""

from lrpfx.attributors.gradients import (
    gradient,
    gradient_x_input,
    integrated_gradients,
    smoothgrad,
)
from lrpfx.attributors.windows import occlusion

__all__ = ["gradient", "gradient_x_input", "integrated_gradients", "occlusion", "smoothgrad"]
