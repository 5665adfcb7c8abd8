"""The laws that relevance obeys, as functions from a drawn case to an error, and nothing else.

Each law returns the largest relative error, so that the tests can ask both for a small one and,
with a rule that is wrong on purpose, for a large one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lrpfx
from lrpfx.capture import By
from tests.oracle.models import NIGHTLY
from tests.oracle.reference import Array, Node
from tests.oracle.strategies import Network, to_torch

AFFINE_LAYERS = ("conv", "conv_transpose", "linear")


@dataclass(frozen=True)
class Case:
    """A network with rules, and the seed relevance of its output, one row per sample."""

    network: Network
    seed: Array


def relative(got: Any, expected: Any) -> float:
    """Largest difference over all arrays, relative to the largest value in any of them."""
    got = [np.asarray(g) for g in got]
    expected = [np.asarray(e) for e in expected]
    scale = max([float(np.abs(e).max(initial=0.0)) for e in expected] + [1e-30])
    return max(
        float(np.abs(g - e).max(initial=0.0)) for g, e in zip(got, expected, strict=True)
    ) / (scale)


# From the oracle's vocabulary to lrpfx -----------------------------------------------------------


def rule_of(name: str, params: dict[str, Any]) -> lrpfx.Rule:
    """The lrpfx rule of a reference rule."""
    renamed = {"beta_smooth": "beta"}
    given = {renamed.get(key, key): value for key, value in params.items()}
    for key in ("low", "high"):
        if isinstance(given.get(key), np.ndarray):
            given[key] = torch.from_numpy(given[key])
    rule: lrpfx.Rule = getattr(lrpfx, name)(**given)
    return rule


Wrong = Callable[[lrpfx.Rule], lrpfx.Rule]


def entries(network: Network, wrong: Wrong = lambda rule: rule) -> list[tuple[str, lrpfx.Rule]]:
    """Rules by module path, as ``rules=`` takes them."""
    folded = folds(network)
    return [
        (f"layers.{k}", wrong(rule_of(*node.rule)))
        for k, node in enumerate(network.nodes)
        if node.rule is not None and network.owners[k] == k and k not in folded
    ]


def folds(network: Network) -> dict[int, int]:
    """Which batch norms and constants are part of which affine layer, in order of execution."""
    nodes = network.nodes
    users: dict[int, list[int]] = {k: [] for k in range(len(nodes))}
    for k, node in enumerate(nodes):
        for i in node.inputs:
            users[i].append(k)
    found: dict[int, int] = {}
    for k, node in enumerate(nodes):
        if node.op not in ("batch_norm", "scale", "shift"):
            continue
        (source,) = node.inputs
        layer = found[source] if found.get(source, len(nodes)) < source else source
        behind = nodes[layer].op in AFFINE_LAYERS and users[source] == [k]
        if node.op != "batch_norm":
            if behind and _is_per_channel(network, k, layer):
                found[k] = layer
        elif behind and _flat(network, layer):
            found[k] = layer
        elif len(users[k]) == 1 and _takes_shift(network, users[k][0]):
            found[k] = users[k][0]
    return found


def _is_per_channel(network: Network, k: int, layer: int) -> bool:
    """Whether a constant has one entry for each channel of a layer, and no more."""
    shape = network.shapes[layer]
    channel = len(shape) - 1 if network.nodes[layer].op == "linear" else 0
    each = [n if axis == channel else 1 for axis, n in enumerate(shape)]
    given = np.shape(network.nodes[k].params["c"])
    return [1] * (len(shape) - len(given)) + list(given) == each


def _flat(network: Network, k: int) -> bool:
    """A linear layer's outputs are channels for a batch norm only if a sample has one axis."""
    return network.nodes[k].op != "linear" or len(network.shapes[k]) == 1


def _takes_shift(network: Network, k: int) -> bool:
    node = network.nodes[k]
    if node.op == "conv":
        return not np.any(node.params.get("padding", 0))
    return node.op == "linear" and _flat(network, k)


def folded_network(network: Network) -> Network:
    """The network with batch norms and constants folded by hand, as an affine layer sees them."""
    nodes = list(network.nodes)
    for k, target in folds(network).items():
        layer = dict(nodes[target].params)
        scale, shift = _scale_and_shift(nodes[k])
        weight, groups = layer["weight"], layer.get("groups", 1)
        bias = 0 if layer.get("bias") is None else layer["bias"]
        by_group = weight.reshape(groups, -1, *weight.shape[1:])
        along = (groups, 1, weight.shape[1]) + (1,) * (weight.ndim - 2)
        if target > k:  # ahead: W (scale x + shift) + b
            moved = (by_group * shift.reshape(along)).reshape(weight.shape)
            layer["bias"] = moved.sum(axis=tuple(range(1, weight.ndim))) + bias
            layer["weight"] = (by_group * scale.reshape(along)).reshape(weight.shape)
        else:  # behind: scale (W x + b) + shift
            layer["bias"] = shift + bias * scale
            if nodes[target].op == "conv_transpose":
                layer["weight"] = (by_group * scale.reshape(along)).reshape(weight.shape)
            else:
                layer["weight"] = weight * scale.reshape((-1,) + (1,) * (weight.ndim - 1))
        nodes[target] = replace(nodes[target], params=layer)
        nodes[k] = Node("reshape", nodes[k].inputs, {"shape": network.shapes[k]})
    return replace(network, nodes=tuple(nodes))


def _scale_and_shift(node: Node) -> tuple[Array, Array]:
    """What a batch norm, or a constant, multiplies each channel with, and adds to it."""
    given = node.params
    if node.op != "batch_norm":
        c = np.ravel(given["c"])
        return (c, np.zeros_like(c)) if node.op == "scale" else (np.ones_like(c), c)
    scale = np.ones_like(given["var"]) if given["weight"] is None else given["weight"]
    scale = scale / np.sqrt(given["var"] + given["eps"])
    return scale, (0 if given["bias"] is None else given["bias"]) - given["mean"] * scale


# Running both sides ------------------------------------------------------------------------------


def explainer(
    network: Network,
    spelling: str = "modules",
    wrong: Wrong = lambda rule: rule,
    capture: By = "export" if NIGHTLY else "record",
) -> lrpfx.Explainer:
    """The network in torch under its own rules; exports take most of the time."""
    rules = entries(network, wrong) or None
    return lrpfx.Explainer(to_torch(network, spelling), tensors(network), rules, capture=capture)


def tensors(network: Network) -> tuple[Tensor, ...]:
    """The network's inputs, samples on axis 0."""
    return tuple(torch.from_numpy(batch) for batch in network.inputs)


def explained(case: Case, explainer: lrpfx.Explainer) -> tuple[Tensor, ...]:
    """Relevance of every input by lrpfx, in the plain form: fast ones are held against it."""
    seed = torch.from_numpy(case.seed)
    result = explainer(tensors(case.network), seed, ledger=True).relevance
    assert isinstance(result, tuple)
    return result


def expected(case: Case) -> list[Array]:
    """Relevance of every input by the oracle."""
    values = folded_network(case.network).relevance(case.seed)
    return [v for v, n in zip(values, case.network.nodes, strict=True) if n.op == "input"]


# The laws ----------------------------------------------------------------------------------------


def equals_reference(case: Case, spelling: str, wrong: Wrong = lambda rule: rule) -> float:
    """Relevance is what the dense float64 oracle says."""
    subject = explainer(case.network, spelling, wrong, capture="export")
    return relative(explained(case, subject), expected(case))


def is_linear_in_the_seed(case: Case, subject: lrpfx.Explainer) -> float:
    """R(2 s + t) = 2 R(s) + R(t)."""
    other = Case(case.network, np.roll(case.seed, 1, axis=1) - 0.5)
    both = Case(case.network, 2 * case.seed + other.seed)
    a, b = explained(case, subject), explained(other, subject)
    return relative(explained(both, subject), [2 * x + y for x, y in zip(a, b, strict=True)])


def batch_equals_singles(case: Case, subject: lrpfx.Explainer) -> float:
    """No sample sees another."""
    batch = explained(case, subject)
    singles = []
    for k in range(case.network.samples):
        one = replace(case.network, inputs=tuple(i[k : k + 1] for i in case.network.inputs))
        singles.append(explained(Case(one, case.seed[k : k + 1]), subject))
    return relative(batch, [torch.cat(parts) for parts in zip(*singles, strict=True)])


def ledger_closes(case: Case, subject: lrpfx.Explainer) -> float:
    """Node by node: what came in is what went out and what the rule's formula says was kept."""
    report = subject(tensors(case.network), torch.from_numpy(case.seed), ledger=True).report
    worst = 0.0
    for row in report.rows:
        if row.relevance_in is None or row.relevance_out is None:
            continue
        kept = sum(row.absorbed.values())
        size = max(
            abs(row.relevance_in), abs(row.relevance_out), *map(abs, row.absorbed.values()), 1.0
        )
        worst = max(worst, abs(row.relevance_in - row.relevance_out - kept) / size)
    assert report.started is not None and report.unaccounted is not None
    size = max([1.0, abs(report.started), *(abs(v) for v in report.absorbed.values())])
    return max(worst, abs(report.unaccounted) / size)


def equals_gradient_times_input(network: Network) -> float:
    """LRP-0 on a piecewise linear net without biases is gradient times input."""
    model = to_torch(network, "functional")
    inputs = tuple(t.requires_grad_() for t in tensors(network))
    output = model(*inputs)
    gradients = torch.autograd.grad(output[:, 1].sum(), inputs, materialize_grads=True)
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    result = lrpfx.explain(model, inputs, target=1, rules=rules, ledger=True).relevance
    products = [(g * x).detach() for g, x in zip(gradients, inputs, strict=True)]
    return relative([r.detach() for r in result], products)
