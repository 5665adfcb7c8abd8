"""captum's ``LRP`` and ``LayerLRP``, computed by lrpfx: ``pip install 'lrpfx[captum]'``.

Signatures and shapes are captum's, so that what captum puts around its methods (``NoiseTunnel``,
metrics) goes around these.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrpfx.adapters.around import around, inner
from lrpfx.adapters.kept import Kept
from lrpfx.errors import InputError
from lrpfx.explanation import Explanation
from lrpfx.plan import RulesLike

try:
    from captum._utils.common import _select_targets
    from captum.attr import LRP as CaptumLRP
    from captum.log import log_usage
except ImportError as error:
    raise ImportError("lrpfx.adapters.captum needs captum: pip install 'lrpfx[captum]'.") from error

#: A layer has at most so many inputs.
_INPUTS = 8


class LRP(CaptumLRP):  # type: ignore[misc]
    """``captum.attr.LRP`` with lrpfx's rules: any module, functional ops and skip connections, too.

    The model's live parameters are read at each call; the model is not modified.

    Args:
        model: The model, in evaluation mode.
        rules: See ``lrpfx.explain``; rules that captum finds on modules are not read.
    """

    def __init__(self, model: nn.Module, rules: RulesLike = None) -> None:
        super().__init__(model)
        self._kept = Kept(model, rules)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Relevance of the inputs.

        Args:
            inputs: A tensor or a tuple of tensors (N, ...).
            target: As in captum: an index, a tuple of indices, or one of these per sample; None
                where the output has one number per sample.
            additional_forward_args: Further arguments of forward(), which are constants.
            return_convergence_delta: Whether the output less the sum of relevance, (N,), is
                returned, too.
            verbose: Is not read.

        Returns:
            Relevance structured like ``inputs``; with the delta if that is asked for.
        """
        explanation = _explained(self._kept, inputs, target, additional_forward_args)
        single = isinstance(inputs, Tensor)
        number = 1 if single else len(inputs)
        found = explanation.relevance[:number]
        attributions = found[0] if single else tuple(found)
        if not return_convergence_delta:
            return attributions
        return attributions, _delta(self, attributions, explanation, target)


class LayerLRP(LRP):
    """``captum.attr.LayerLRP`` with lrpfx's rules.

    Args:
        model: The model, in evaluation mode.
        layer: A module of it, or a list of modules.
        rules: See ``lrpfx.explain``.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module | Sequence[nn.Module], rules: RulesLike = None
    ) -> None:
        super().__init__(model, rules)
        self.layer = layer
        layers = [layer] if isinstance(layer, nn.Module) else list(layer)
        self._paths = [_path(model, one) for one in layers]
        self._entered = Kept(_entered(model, self._paths), rules)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Relevance at the layer.

        Args:
            inputs: See ``LRP``; so are ``target``, ``additional_forward_args`` and ``verbose``.
            target: See there.
            additional_forward_args: See there.
            return_convergence_delta: Whether the output less the sum of relevance, (N,), is
                returned, too.
            attribute_to_layer_input: Whether relevance is that of the layer's input, as it enters
                this layer, or of its output.
            verbose: Is not read.

        Returns:
            A tensor shaped like the layer's output or input (a tuple for several inputs), for a
            list of layers a list; with the delta if that is asked for.
        """
        kept, paths = self._kept, self._paths
        if attribute_to_layer_input:
            kept = self._entered
            for own, theirs in zip(kept.model.modules(), self.model.modules(), strict=False):
                own.training = theirs.training
            paths = [f"lrpfx_entries.{i}.*" for i in range(len(paths))]
        explanation = _explained(kept, inputs, target, additional_forward_args, layers=paths)
        found = [
            _at(explanation, pattern, path)
            for pattern, path in zip(paths, self._paths, strict=True)
        ]
        result = found[0] if isinstance(self.layer, nn.Module) else found
        if not return_convergence_delta:
            return result
        deltas = [_delta(self, one, explanation, target) for one in found]
        return result, deltas[0] if isinstance(self.layer, nn.Module) else deltas


def _path(model: nn.Module, layer: nn.Module) -> str:
    """Where a layer is in the model."""
    modules = model.named_modules(remove_duplicate=False)
    paths = [path for path, module in modules if module is layer]
    if not paths:
        raise InputError(
            f"{type(layer).__name__} is no module of the model.", fix="give model.<layer>."
        )
    if len(paths) > 1:
        raise _several(" and ".join(paths))
    (path,) = paths
    return str(path)


def _several(layer: str) -> InputError:
    return InputError(
        f"layer {layer} is called several times, and captum has one attribution for it.",
        fix="lrpfx.explain(model, inputs, target, layers=[...]) has one for each call.",
    )


def _explained(
    kept: Kept, inputs: Any, target: Any, additional: Any, layers: Sequence[str] = ()
) -> Explanation:
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    more = additional if isinstance(additional, tuple) else (additional,)
    if additional is None:
        more = ()
    leaves = tuple(t.detach() if isinstance(t, Tensor) else t for t in (*given, *more))
    return kept.explain(
        leaves, _target(target), tuple(range(len(given))), ledger=False, layers=layers
    )


def _target(target: Any) -> Any:
    """What captum's target is in lrpfx."""
    if isinstance(target, Tensor):
        return int(target) if target.numel() == 1 else target.flatten()
    if isinstance(target, (int, tuple)):
        return target
    if isinstance(target, list) and all(isinstance(one, int) for one in target):
        return target

    def chosen(output: Tensor) -> Tensor:
        picked: Tensor = _select_targets(output, target)
        if picked[0].numel() != 1:
            raise AssertionError(f"a target is needed to pick a number of {tuple(output.shape)}")
        return picked.reshape(len(picked))

    return chosen


def _delta(method: LRP, attributions: Any, explanation: Explanation, target: Any) -> Tensor:
    chosen = _select_targets(explanation.output, target)
    delta: Tensor = method.compute_convergence_delta(attributions, chosen)
    return delta


def _at(explanation: Explanation, pattern: str, layer: str) -> Any:
    """Relevance at a layer, or of each of its inputs."""
    calls = [c for name, c in explanation.layers.items() if fnmatch.fnmatchcase(name, pattern)]
    if any(len(each) != 1 for each in calls):
        raise _several(layer)
    found = tuple(each.relevance for each in calls)
    return found[0] if len(found) == 1 else found


class _Entry(nn.Module):
    """What an input of a layer comes through: relevance here is of this layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, as a node of their own."""
        return torch.reshape(x, x.shape)


def _entered(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """The model with entries before some of its layers.

    The user's modules stay as they are: those on the way to the layers are copies, and the layers'
    copies have a hook that calls the entries.
    """
    entries = [nn.ModuleList(_Entry() for _ in range(_INPUTS)) for _ in paths]
    own = inner(model)
    for entry, path in zip(entries, paths, strict=True):
        owner = own
        for name in path.split(".") if path else ():
            owner._modules[name] = owner = inner(getattr(owner, name))
        owner._forward_pre_hooks = OrderedDict(owner._forward_pre_hooks)
        owner.register_forward_pre_hook(functools.partial(_enter, entry))
    return around(own, own.forward, lrpfx_entries=nn.ModuleList(entries))


def _enter(entries: nn.ModuleList, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    own = iter(entries)
    return tuple(next(own)(a) if isinstance(a, Tensor) else a for a in args)
