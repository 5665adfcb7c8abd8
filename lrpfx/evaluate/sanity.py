"""Explainer, inputs -> how far maps change while the model's layers become random."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lrpfx.capture import TRACING, Inputs, preserved, split_inputs
from lrpfx.errors import InputError
from lrpfx.evaluate.maps import rows_of
from lrpfx.evaluate.ranks import spearman
from lrpfx.explain import Explainer
from lrpfx.explanation import Explanation
from lrpfx.progress import shown
from lrpfx.report import Column, Table, Tabular
from lrpfx.run import Target, is_several

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: What explains: (model, inputs, target) -> Explanation.
Method = Callable[[nn.Module, Any, Any], Explanation]


@dataclass(frozen=True, repr=False)
class Randomization(Tabular):
    """Rank correlation of maps with those of the trained model, layer by layer.

    Args:
        layers: Module paths, in the order in which they became random: from the output down.
        similarity: Of absolute relevance, (L, N). A method that explains the model comes to zero.
        signed: Of relevance as it is, (L, N).
        order: "cascading": the layers above stay random, too; "independent": each by itself.
    """

    layers: tuple[str, ...]
    similarity: Tensor
    signed: Tensor
    order: Literal["cascading", "independent"]

    def table(self) -> Table:
        """A line per layer, means over samples."""
        said = f"rank correlation with the maps of the trained model, {self.order}, mean of "
        columns = (
            Column("layer", 40),
            Column("absolute", 9, right=True),
            Column("signed", 9, right=True),
        )
        cells = [
            [path, f"{float(a.nanmean()):.3f}", f"{float(s.nanmean()):.3f}"]
            for path, a, s in zip(self.layers, self.similarity, self.signed, strict=True)
        ]
        return Table([f"{said}{self.similarity.shape[1]} samples"], columns, cells)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the correlations, means over samples, with bands of twice the standard error."""
        import numpy as np

        from lrpfx.draw import draw_curves

        curves = {"absolute": self.similarity, "signed": self.signed}
        return draw_curves(
            np.arange(len(self.layers), dtype=float),
            {name: values.T.nan_to_num().numpy() for name, values in curves.items()},
            xlabel="random from the output down to",
            ylabel="rank correlation",
            title=title,
            path=path,
            ax=ax,
            ticks=self.layers,
        )


def randomization(
    explainer: Explainer | nn.Module,
    x: Inputs,
    target: Target = None,
    *,
    method: Method | None = None,
    order: Literal["cascading", "independent"] = "cascading",
    seed: int = 0,
    progress: bool = True,
) -> Randomization:
    """How far maps change while layers get random parameters, from the output down.

    A map that stays the same does not depend on what the model has learned. A copy of the model is
    made random: by ``reset_parameters`` where a layer has it, else by normal numbers of the mean
    and deviation that its parameters had. Running statistics stay.

    Args:
        explainer: Of the model; a module, if a ``method`` is given.
        x: What is explained, as ``lrpfx.explain`` takes it.
        target: As ``lrpfx.explain`` takes it; None is the class of the trained model.
        method: Another way to explain, ``(model, x, target) -> Explanation``, such as
            ``lrpfx.attributors.gradient``; None for the rules of the Explainer.
        order: "cascading", or "independent" for one random layer at a time.
        seed: Of the random parameters.
        progress: Whether a bar is shown (by tqdm, if installed) if it takes long.

    Raises:
        InputError: There is neither Explainer nor method, or the model has no parameters.
        ImportError: scipy is not installed.
        LrpError: As ``lrpfx.explain``.

    Source: Adebayo et al. 2018, https://arxiv.org/abs/1810.03292, sect. 4.
    """
    if order not in ("cascading", "independent"):
        raise InputError(f"order={order!r} is not known.", fix='give "cascading" or "independent".')
    if is_several(target):
        raise InputError("target asks for several classes.", fix="evaluate one of them at a time.")
    model = explainer.model if isinstance(explainer, Explainer) else explainer
    if not isinstance(model, nn.Module) or (method is None and model is explainer):
        raise InputError(
            f"randomization() takes an Explainer, not {type(explainer).__name__}.",
            fix="give lrpfx.Explainer(model, x, rules), or a module and method=.",
        )
    with TRACING, preserved(model):
        clone = copy.deepcopy(model)
    explains = _explaining(explainer, clone, x, method)
    first = explains(target)
    target = first.target if target is None and first.target is not None else target
    trained = rows_of(first)
    layers = _layers(clone, x)
    state = {name: t.clone() for name, t in clone.state_dict(keep_vars=False).items()}
    absolute, signed = [], []
    for number, (_, owners) in enumerate(shown(layers, "randomization", progress)):
        if order == "independent":
            clone.load_state_dict(state)
        with torch.random.fork_rng(_devices(clone)), torch.no_grad():
            torch.manual_seed(seed + number)
            for owner in owners:
                _randomize(owner)
        rows = rows_of(explains(target))
        absolute.append(spearman(rows.abs(), trained.abs()))
        signed.append(spearman(rows, trained))
    paths = tuple(path for path, _ in layers)
    return Randomization(paths, torch.stack(absolute), torch.stack(signed), order)


def _explaining(
    explainer: Explainer | nn.Module, clone: nn.Module, x: Inputs, method: Method | None
) -> Callable[[Target], Explanation]:
    if method is not None:
        return lambda target: method(clone, x, target)
    assert isinstance(explainer, Explainer)
    made = Explainer(clone, x, explainer.rules, wrt=explainer.wrt)
    return lambda target: made(x, target, ledger=False)


def _layers(model: nn.Module, x: Inputs) -> list[tuple[str, list[nn.Module]]]:
    """Modules with parameters by the last to be called first; with what they hold uncalled."""
    called: dict[str, None] = {}
    args, kwargs = split_inputs(x)
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.setdefault(path))
        for path, module in model.named_modules()
    ]
    try:
        with TRACING, preserved(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    owners: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            owners.setdefault(_caller(path, called), []).append(module)
    order = list(called)
    found = [(path, owners[path]) for path in reversed(order) if path in owners]
    if not found:
        raise InputError(
            "the model has no parameters that could be made random.",
            fix="the test is one of what a model has learned.",
        )
    return found


def _caller(path: str, called: dict[str, None]) -> str:
    """The module itself, if it is called, else the closest one around it that is."""
    while path and path not in called:
        path = path.rpartition(".")[0]
    return path


def _randomize(module: nn.Module) -> None:
    """Draw the module's own parameters anew; buffers stay."""
    buffers = {name: b.clone() for name, b in module.named_buffers(recurse=False)}
    inner = {
        id(p): (p, p.detach().clone()) for child in module.children() for p in child.parameters()
    }
    reset: Any = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for parameter in module.parameters(recurse=False):
            drawn = torch.randn(parameter.shape).to(parameter)
            spread = parameter.std() if parameter.numel() > 1 else 1.0
            parameter.copy_(drawn * spread + parameter.mean())
    for name, before in buffers.items():
        getattr(module, name).copy_(before)
    for parameter, value in inner.values():
        parameter.copy_(value)


def _devices(model: nn.Module) -> Sequence[torch.device]:
    return sorted(
        {p.device for p in model.parameters() if p.device.type == "cuda"}, key=lambda d: str(d)
    )
