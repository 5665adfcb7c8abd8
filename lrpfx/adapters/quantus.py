"""Relevance as Quantus asks for it: ``explain_func=lrpfx.adapters.quantus.explain``.

Needs Quantus only where that calls it: ``pip install 'lrpfx[quantus]'``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrpfx.adapters.kept import Kept
from lrpfx.plan import RulesLike

#: The models that were explained last, and their copies that metrics randomise.
_KEPT: dict[tuple[int, int, str], Kept] = {}
_MODELS = 4


def explain(
    model: nn.Module,
    inputs: np.ndarray[Any, Any] | Tensor,
    targets: Any,
    rules: RulesLike = None,
    **kwargs: Any,
) -> np.ndarray[Any, Any]:
    """Relevance of the inputs, for metrics of Quantus.

    The model is captured once and its parameters are read at each call, so that metrics that
    randomise them see other maps.

    Args:
        model: The model, in evaluation mode.
        inputs: Samples (N, ...).
        targets: A class for each sample.
        rules: See ``lrpfx.explain``; by ``explain_func_kwargs={"rules": "epsilon_plus"}``. Of a
            list or a composite give the same object at each call: another is captured anew.
        **kwargs: What Quantus also passes; only ``device`` is read.

    Returns:
        Relevance, shaped like the inputs.
    """
    kept = _kept_of(model, rules)
    like = next(iter(model.parameters()), torch.zeros(0))
    device = kwargs.get("device") or like.device
    x = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, Tensor) else inputs)
    x = x.to(device, like.dtype if x.is_floating_point() else x.dtype)
    classes = torch.as_tensor(np.asarray(targets)).reshape(-1).long()
    relevance: Tensor = kept.explain(x, classes, ledger=False).relevance
    return relevance.detach().cpu().numpy()


def _kept_of(model: nn.Module, rules: RulesLike) -> Kept:
    # Large tensors among rules look alike when they are printed: what is no name counts as itself.
    key = id(model), 0 if isinstance(rules, str) else id(rules), repr(rules)
    kept = _KEPT.pop(key, None) or Kept(model, rules)  # which holds both: ids stay their own
    _KEPT[key] = kept
    for old in list(_KEPT)[:-_MODELS]:
        del _KEPT[old]
    return kept
