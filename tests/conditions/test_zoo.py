"""Networks as people use them, conditioned at many places: fast, plain, and started from there."""

from typing import Any

import pytest
import torch

import lrpfx
from lrpfx.concepts import Neuron
from tests.oracle import families, zoo


def check(explainer: lrpfx.Explainer, inputs: Any, target: Any, places: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for place in places:
        layer = explainer(inputs, target, layers=[place], ledger=False).layers[place]
        size = layer.activation[0].numel()
        kept = torch.randperm(size, generator=generator)[: size // 2].tolist()
        conditions: Any = [{place: (Neuron(), kept)}]
        plain, fast = (
            explainer(inputs, target, conditions=conditions, ledger=ledger)
            for ledger in (True, False)
        )
        report = plain.report
        moved = max(abs(row.relevance_in or 0.0) for row in report.rows)
        assert abs(report.unaccounted or 0.0) < 1e-6 * moved
        mask = torch.zeros(size, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1.0)
        begin = layer.relevance * mask.view_as(layer.activation[0])
        begun = explainer(inputs, start=place, init=begin)
        leaves = (torch.utils._pytree.tree_leaves(e.relevance) for e in (plain, fast, begun))
        for a, b, c in zip(*leaves, strict=True):
            if a is not None:
                scale = a.abs().max()
                assert (a - b).abs().max() <= 1e-6 * scale, place
                assert (a[0] - c).abs().max() <= 1e-6 * scale, place


@pytest.mark.parametrize("rules", ["epsilon_plus", "epsilon_alpha2_beta1"])
def test_a_residual_network(rules: str) -> None:
    model, x = zoo.residual(), zoo.images(2, 3, 32, 32)
    explainer = lrpfx.Explainer(model, x, rules)
    rows = explainer.report.rows
    places = [row.node for row in rows if row.kind in ("conv", "relu", "sum")]
    check(explainer, x, 1, places[1:-1:3])


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_attention(family: str) -> None:
    explainer = families.explainer_of(family, families.best(family), "attnlrp")
    kinds = ("matmul", "softmax", "sum", "silu", "gelu", "layer_norm", "product")
    places = [row.node for row in explainer.report.rows if row.kind in kinds]
    check(explainer, families.inputs_of(family), families.target_of(family), places[:-1:6])
