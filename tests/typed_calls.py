"""Documented calls, which a type checker must accept: mypy reads this file, nothing runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.composites import CompositeName


def inputs(model: nn.Module, x: Tensor, ids: Tensor, mask: Tensor) -> None:
    assert_type(lrpfx.explain(model, x).relevance, Tensor)
    e = lrpfx.explain(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    assert_type(e.relevance, Mapping[str, Any])
    e.relevance["input_ids"].sum()
    pair = lrpfx.explain(model, (x, x), rules="epsilon_plus")
    pair.relevance[0].sum()
    lrpfx.explain(model, x, 3, "epsilon_plus").plot(clip=99)
    again = lrpfx.Explanation.load("explanation.npz")
    again.plot("picture.png").savefig("picture.pdf")


def targets(model: nn.Module, x: Tensor) -> None:
    for target in (None, 3, (1, 30, 40), torch.tensor([1, 2]), np.array([1, 2])):
        lrpfx.explain(model, x, target)
    lrpfx.explain(model, x, "all")
    lrpfx.explain(model, x, [3, 5])
    lrpfx.explain(model, x, [[0, 1], [1, 0]])
    lrpfx.explain(model, x, (1, slice(20, 40), slice(20, 40)))
    lrpfx.explain(model, x, lambda out: out[:, 1].mean((1, 2)))


def rules(model: nn.Module, x: Tensor, name: str, known: CompositeName) -> None:
    lrpfx.explain(model, x, rules=name)
    lrpfx.explain(model, x, rules=known)
    lrpfx.explain(model, x, rules=lrpfx.composites.EpsilonGammaBox(low=-3, high=3))
    lrpfx.explain(model, x, rules=[("conv", lrpfx.ZPlus()), (nn.Linear, lrpfx.Epsilon())])
    lrpfx.explain(model, x, rules={"conv": lrpfx.Gamma(0.1)})
    lrpfx.explain(model, x, rules=lrpfx.Epsilon())
    for each in ["epsilon_plus", "epsilon_all"]:
        lrpfx.Explainer(model, x, each)


def explainers(model: nn.Module, x: Tensor) -> None:
    explainer = lrpfx.Explainer(model, inputs=x, rules="epsilon_plus", dynamic=(2, 3), freeze=True)
    e = explainer(x[:2], target=[3, 5], layers=["block1", "block2.*"], ledger=False)
    assert_type(e.relevance, Tensor)
    assert_type(e.layers["block1"].relevance, Tensor)
    assert_type(e.layers["block1"][0].activation, Tensor)
    loss = explainer(x, 3, create_graph=True).relevance[..., :4].abs().sum()
    loss.backward()
    explainer.compile(mode="max-autotune")(x).report.leaks(3)
    lrpfx.coverage(model, inputs=x, rules="epsilon_plus").to_html("report.html")


def pictures(e: lrpfx.Explanation, x: Tensor, tokenizer: Any) -> None:
    e.plot("picture.png", titles="cat", clip=99, cmap="seismic", overlay=True, scale="shared")
    e.plot(feature_names=["age", "income"], top=10, sort=False, columns=2, limit=8)
    lrpfx.heatmap.heatmap(e.relevance, inputs=x, kind="sequence")
    lrpfx.heatmap.grid(None, e)
    lrpfx.heatmap.grid(x, {"one": e, "two": e.relevance})
    lrpfx.heatmap.grid(None, [e, e], titles=["cat"], wrap=4)
    e.show_tokens(tokenizer, skip_special=True, scale="shared").to_html("tokens.html")
    e.show_tokens(["a", "b"], labels=["first"])


def evaluation(model: nn.Module, x: Tensor, ids: Tensor, masks: Tensor) -> None:
    explainer = lrpfx.Explainer(model, x)
    explanation = lrpfx.attributors.smoothgrad(explainer, x, 3, rules="epsilon_plus")
    lrpfx.attributors.integrated_gradients(model, (x, ids), lambda out: out[:, 1], baseline=0.5)
    lrpfx.attributors.occlusion(model, x, 3, window=(1, 4, 4), stride=2, fill="mean")
    curves = lrpfx.evaluate.perturbation(model, x, explanation, 3, order="least", fill=0.0)
    assert_type(curves.abpc, Tensor)
    low, high = curves.interval("aopc")[1:]
    lrpfx.evaluate.perturbation(model, ids, explanation, fill="drop").plot("curves.png")
    lrpfx.evaluate.randomization(explainer, x, 3).plot()
    lrpfx.evaluate.randomization(model, x, 3, method=lrpfx.attributors.gradient)
    lrpfx.evaluate.localization(explanation, masks).mass.mean()
    composite, trials = lrpfx.tune(model, x, 3, rules=["auto", "epsilon_plus"], budget=2)
    lrpfx.explain(model, x, rules=composite)
