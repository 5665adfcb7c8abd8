"""A model and calls as other libraries make them -> explanations; Explainers are kept by form."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrpfx.errors import InputError
from lrpfx.explain import Explainer
from lrpfx.explanation import Explanation
from lrpfx.plan import RulesLike

#: So many are kept of a model.
_KEPT = 8


class Kept:
    """Explains one model for inputs of any form, by Explainers that are made when they are needed.

    Args:
        model: The model.
        rules: See ``lrpfx.explain``.
        **options: Of ``lrpfx.Explainer``.
    """

    def __init__(self, model: nn.Module, rules: RulesLike = None, **options: Any) -> None:
        self.model, self._rules, self._options = model, rules, options
        self._varying = {0, *options.get("dynamic", ())}
        self._explainers: dict[Any, Explainer] = {}

    def explain(self, inputs: Any, target: Any, wrt: Any = None, **options: Any) -> Explanation:
        """As an ``Explainer`` of inputs of this form does.

        Args:
            inputs: See ``lrpfx.explain``.
            target: Likewise.
            wrt: Likewise.
            **options: Of the call.
        """
        mode = tuple(module.training for module in self.model.modules())
        loose, exact = ((*_form(inputs, open_), wrt, mode) for open_ in (self._varying, ()))
        for key in (loose, exact):
            if key in self._explainers:
                try:
                    return self._explainers[key](inputs, target, **options)
                except InputError:  # its graph may be for another batch size only
                    continue
        explainer = Explainer(self.model, inputs, self._rules, wrt=wrt, **self._options)
        kept = list(self._explainers.items())[1 - _KEPT :]
        key = exact if loose in self._explainers else loose
        self._explainers = dict(kept) | {key: explainer}
        return explainer(inputs, target, **options)


def _form(inputs: Any, varying: Collection[int]) -> tuple[Any, ...]:
    """What tells inputs of one form from others, but for sizes that may vary."""
    leaves, spec = pytree.tree_flatten(inputs)
    forms = [
        (leaf.dtype, leaf.device, *(-1 if d in varying else n for d, n in enumerate(leaf.shape)))
        if isinstance(leaf, Tensor)
        else repr(leaf)
        for leaf in leaves
    ]
    return str(spec), *forms
