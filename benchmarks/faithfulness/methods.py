"""A task -> the methods that explain it, lrpfx's and those of others, as their documentation says.

Every method is a call that returns relevance shaped like the input, of the logit of the class that
the network predicts. What can be set up once is set up before the call, which is timed.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lrpfx
from benchmarks.faithfulness.tasks import Task
from lrpfx import attributors
from lrpfx.composites import CPLRP, Composite, EpsilonGammaBox

Call = Callable[[], Tensor]
#: What relevance of which should sum to the logit is measured of.
CONSERVING = ("lrpfx", "zennit", "LXT", "captum LRP", "captum DeepLift")


def methods(task: Task) -> Iterator[tuple[str, str, Call]]:
    """Library, name and call of each method; those that refuse the network are left out later."""
    yield from (("lrpfx", name, call) for name, call in _lrpfx(task))
    yield from (("gradients", name, call) for name, call in _gradients(task))
    if task.kind == "tokens":
        yield from (("captum", name, call) for name, call in _captum_tokens(task))
    else:
        yield from (("captum", name, call) for name, call in _captum(task))
        yield from (("zennit", name, call) for name, call in _zennit(task))
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(task.x.shape, generator=generator)
    yield "none", "random", lambda: noise


def _lrpfx(task: Task) -> Iterator[tuple[str, Call]]:
    low, high = task.bounds
    rules: dict[str, Any] = {"default (rules=None)": None, "epsilon_all": "epsilon_all"}
    if task.kind in ("vit", "tokens"):
        rules |= {"attnlrp": "attnlrp", "cplrp": "cplrp"}
        rules["cplrp (gates shared)"] = CPLRP(gate="uniform")
    if task.kind == "vit":  # as LXT's examples have it
        gammas = [("conv", lrpfx.Gamma(0.25)), ("linear", lrpfx.Gamma(0.05))]
        rules["cplrp, Gamma(0.25) and Gamma(0.05)"] = CPLRP(gate="uniform") + gammas
    if task.kind != "tokens":
        rules |= {
            name: name
            for name in (
                "epsilon_gamma",
                "epsilon_plus",
                "epsilon_plus_flat",
                "epsilon_alpha2_beta1",
                "excitation_backprop",
            )
        }
        rules["epsilon_gamma_box"] = EpsilonGammaBox(low, high)
        rules["Gamma(0.25) on all"] = Composite([(("conv", "linear"), lrpfx.Gamma(0.25))])
    else:
        rules["Gamma(0.25) on linear"] = Composite([("linear", lrpfx.Gamma(0.25))])
    for name, rule in rules.items():

        def made(rule: Any = rule) -> Call:
            explainer = lrpfx.Explainer(task.model, task.x, rule)
            return lambda: explainer(task.x, task.classes, ledger=False).relevance

        yield name, _later(made)
    smooth = "SmoothGrad of the default"
    yield (
        smooth,
        lambda: (
            attributors.smoothgrad(
                task.model, task.x, task.classes, rules="auto", progress=False
            ).relevance
        ),
    )


def _gradients(task: Task) -> Iterator[tuple[str, Call]]:
    """lrpfx's own; that captum has the same is shown by its tests."""
    given = task.model, task.x, task.classes
    yield "gradient", lambda: attributors.gradient(*given).relevance
    yield "gradient x input", lambda: attributors.gradient_x_input(*given).relevance
    yield (
        "integrated gradients",
        lambda: attributors.integrated_gradients(*given, steps=50, progress=False).relevance,
    )
    yield "SmoothGrad", lambda: attributors.smoothgrad(*given, progress=False).relevance
    window, fill = (1, 0.0) if task.kind == "tokens" else (task.patch, 0.0)
    yield (
        "occlusion",
        lambda: attributors.occlusion(*given, window, window, fill, progress=False).relevance,
    )


def _captum(task: Task) -> Iterator[tuple[str, Call]]:
    import captum.attr as c

    model, x, target = task.model, task.x, task.classes
    yield "Saliency", lambda: c.Saliency(model).attribute(x, target)
    yield "DeepLift", lambda: c.DeepLift(model).attribute(x, target=target)
    yield "GuidedBackprop", lambda: c.GuidedBackprop(model).attribute(x, target)
    yield "LRP", lambda: c.LRP(_with_rules(model)).attribute(x, target=target)

    def shap() -> Tensor:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            found: Tensor = c.GradientShap(model).attribute(
                x, torch.zeros_like(x[:1]), n_samples=20, target=target
            )
        return found

    yield "GradientShap", shap


def _with_rules(model: nn.Module) -> nn.Module:
    """A copy in which layers that captum has no rule for get its epsilon rule, as it asks for."""
    from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
    from captum.attr._utils.lrp_rules import EpsilonRule

    model = copy.deepcopy(model)
    known = (*SUPPORTED_LAYERS_WITH_RULES, *SUPPORTED_NON_LINEAR_LAYERS)
    for module in model.modules():
        if not any(True for _ in module.children()) and type(module) not in known:
            module.rule = EpsilonRule()
    return model


def _captum_tokens(task: Task) -> Iterator[tuple[str, Call]]:
    import captum.attr as c

    embedding = task.model.llama.get_input_embeddings()  # type: ignore[operator, union-attr]
    zeros = torch.zeros_like(task.x)

    def ig() -> Tensor:
        made = c.LayerIntegratedGradients(task.model, embedding)
        found: Tensor = made.attribute(task.x, zeros, target=task.classes, n_steps=50)
        return found.sum(-1)

    yield "LayerIntegratedGradients", ig


def _zennit(task: Task) -> Iterator[tuple[str, Call]]:
    import zennit.canonizers
    import zennit.composites as z
    import zennit.torchvision

    canonizers = [zennit.canonizers.SequentialMergeBatchNorm()]
    if task.kind == "residual":
        canonizers = [zennit.torchvision.ResNetCanonizer()]
    low, high = (torch.full_like(task.x[:1], v) for v in task.bounds)
    made = {
        "EpsilonPlus": lambda: z.EpsilonPlus(canonizers=canonizers),
        "EpsilonPlusFlat": lambda: z.EpsilonPlusFlat(canonizers=canonizers),
        "EpsilonAlpha2Beta1": lambda: z.EpsilonAlpha2Beta1(canonizers=canonizers),
        "EpsilonGammaBox": lambda: z.EpsilonGammaBox(low=low, high=high, canonizers=canonizers),
        "ExcitationBackprop": lambda: z.ExcitationBackprop(canonizers=canonizers),
        "GuidedBackprop": lambda: z.GuidedBackprop(canonizers=canonizers),
    }
    for name, composite in made.items():

        def call(composite: Any = composite) -> Tensor:
            # Registering hooks is part of the call, as in zennit's own attributors.
            with composite().context(task.model) as hooked:
                x = task.x.detach().requires_grad_()
                output = hooked(x)
                rows = torch.arange(len(x))
                seed = torch.zeros_like(output)
                seed[rows, task.classes] = output.detach()[rows, task.classes]
                return torch.autograd.grad(output, x, seed)[0]

        yield name, call


def _later(make: Callable[[], Call]) -> Call:
    """A call that is set up when it is first called."""
    made: list[Call] = []

    def call() -> Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of hooks, and with parameters that hooks may differentiate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parameters_of(model: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for p in model.parameters())
