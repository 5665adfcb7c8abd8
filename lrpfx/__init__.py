"""Layer-wise Relevance Propagation by rewriting the model's graph.

>>> import lrpfx
>>> explanation = lrpfx.explain(model, x, target=3, rules="epsilon_plus_flat")
>>> explanation.relevance          # shaped like x
>>> print(explanation.report)      # which rule each node got, why, and what was absorbed
>>> explanation.plot("out.png")    # heatmap beside the image
"""

import importlib
from typing import Any

from lrpfx import (
    attributors,
    composites,
    concepts,
    errors,
    evaluate,
    figures,
    heatmap,
    neuralize,
    text,
)
from lrpfx.composites import First
from lrpfx.coverage import coverage
from lrpfx.deploy import export
from lrpfx.explain import Explainer, explain
from lrpfx.explanation import Explanation
from lrpfx.ops import AffineMap, Call, Op, register_op
from lrpfx.plan import register_composite
from lrpfx.report import Report
from lrpfx.rules import (
    AffineRule,
    AlphaBeta,
    Bilinear,
    Epsilon,
    Flat,
    Flow,
    Gamma,
    Gradient,
    Input,
    Norm,
    Pass,
    ReLUBetaSmooth,
    ReLUDeconvNet,
    ReLUGuidedBackprop,
    Rule,
    Sign,
    SmoothPool,
    Stabilizer,
    Stop,
    TakeMost,
    Taylor,
    Term,
    Uniform,
    WSquare,
    ZBox,
    ZPlus,
)
from lrpfx.tune import tune

__version__ = "0.2.0"

__all__ = [
    "AffineMap",
    "AffineRule",
    "AlphaBeta",
    "Bilinear",
    "Call",
    "Epsilon",
    "Explainer",
    "Explanation",
    "First",
    "Flat",
    "Flow",
    "Gamma",
    "Gradient",
    "Input",
    "Norm",
    "Op",
    "Pass",
    "ReLUBetaSmooth",
    "ReLUDeconvNet",
    "ReLUGuidedBackprop",
    "Report",
    "Rule",
    "Sign",
    "SmoothPool",
    "Stabilizer",
    "Stop",
    "TakeMost",
    "Taylor",
    "Term",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "attributors",
    "composites",
    "concepts",
    "coverage",
    "errors",
    "evaluate",
    "explain",
    "export",
    "figures",
    "heatmap",
    "neuralize",
    "register_composite",
    "register_op",
    "text",
    "tune",
]

# Errors, help and documentation show the public path, not the file that it happens to live in.
for _name in __all__:
    if getattr(globals()[_name], "__module__", "").startswith(f"{__name__}."):
        globals()[_name].__module__ = __name__
del _name


def __getattr__(name: str) -> Any:
    """Import ``lrpfx.spray`` when it is first read: it needs scikit-learn."""
    if name == "spray":
        return importlib.import_module("lrpfx.spray")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public: completion shows no file that something happens to live in."""
    return [*__all__, "spray", "__version__"]
