"""An Explainer -> what a file says of itself, as data: rules, versions, names of classes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence

import torch

from lrpfx.explain import Explainer

#: The name in a file that its facts stand under.
KEY = "lrpfx"


def about(explainer: Explainer, target: str | None, class_names: Sequence[str] | None) -> str:
    """Rules by node, versions, what is explained, and names of the classes, as JSON.

    Args:
        explainer: What explains.
        target: See ``lrpfx.export``.
        class_names: Of the outputs.
    """
    plan = explainer._engine.plan
    facts = {
        "versions": {
            "lrpfx": importlib.import_module("lrpfx").__version__,
            "torch": torch.__version__,
        },
        "model": type(explainer.model).__name__,
        "explained": "the strongest output" if target else "a class per sample",
        "rules": plan.rules,
        "nodes": [{"node": str(a.record), "rule": str(a.rule)} for a in plan.assignments.values()],
        "notes": list(plan.notes),
        "class_names": None if class_names is None else list(map(str, class_names)),
    }
    return json.dumps(facts)
