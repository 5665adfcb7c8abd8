"""The attribution graph of concepts: what one hands to another, also around a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.concepts import AttributionGraph, attribution_graph
from tests.conditions.test_conditions import EXACT, cnn, draw, fill

pytestmark = pytest.mark.usefixtures("each_front")


class Skip(nn.Module):
    """b is beside an identity, and stands between a and c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in "abc")
        self.fc = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.fc(self.c(a + self.b(a)))


def everything(explainer: lrpfx.Explainer, x: Tensor, **options: Any) -> AttributionGraph:
    return attribution_graph(
        explainer, x, 1, layers=["a", "b", "c"], width=[3, 3], begin=3, **options
    )


def test_edges_are_the_products_of_weights_and_activations() -> None:
    """In a linear network each edge is known: what enters c at i goes to b at j or to a at j."""
    model, x = fill(Skip()), draw(1, 3)
    graph = everything(lrpfx.Explainer(model, x, EXACT), x)
    a, wb, wc = model.a(x)[0], model.b.weight, model.c.weight
    b, c = model.b(a), model.c(a + model.b(a))
    of_c = model.fc.weight[1] * c
    edges = {(e.source, e.target): e.relevance for e in graph.edges}
    assert len(edges) == 3 * 3 * 3  # c to b, c to a by the identity, b to a
    for i in range(3):
        for j in range(3):
            to_b, to_a = of_c[i] * wc[i, j] * b[j] / c[i], of_c[i] * wc[i, j] * a[j] / c[i]
            torch.testing.assert_close(edges[("c", i), ("b", j)], to_b.item())
            torch.testing.assert_close(edges[("c", i), ("a", j)], to_a.item())
    of_b = {n.concept: n.relevance for n in graph.at("b")}
    for i in range(3):
        torch.testing.assert_close(of_b[i], sum(edges[("c", k), ("b", i)] for k in range(3)))
        for j in range(3):
            to_a = of_b[i] * (wb[i, j] * a[j] / b[i]).item()
            torch.testing.assert_close(edges[("b", i), ("a", j)], to_a)


def test_shares_sum_to_what_a_concept_hands_on() -> None:
    model, x = fill(Skip()), draw(2, 3)
    graph = everything(lrpfx.Explainer(model, x, EXACT), x)
    for node in graph.nodes:
        if node.layer != "a":
            shares = [e.share for e in graph.edges if e.source == node.key]
            assert abs(sum(s for s in shares if s is not None) - 1) < 1e-6
    of_a = sum(node.relevance for node in graph.at("a"))
    torch.testing.assert_close(of_a, model(x)[:, 1].sum().item())


def test_it_begins_where_it_is_told_and_is_as_wide() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    layers = ["0", "2", "5"]
    graph = attribution_graph(explainer, x, 1, layers=layers, begin={"5": [2]}, width=[3, 2])
    assert [n.key for n in graph.at("5")] == [("5", 2)]
    for node in graph.nodes:
        below = [e for e in graph.edges if e.source == node.key]
        assert len(below) <= {"5": 3, "2": 2, "0": 0}[node.layer]
    cond = explainer(x, 1, conditions=[{"5": [2]}], layers=["2"])
    scores = cond.concepts("2")[0].sum(0)
    wanted = [("2", int(c)) for c in scores.abs().argsort(descending=True)[:3] if scores[c] != 0]
    assert [e.target for e in graph.edges if e.source == ("5", 2)] == wanted
    best = explainer(x, 1, layers=["5"]).concepts("5").sum(0)
    by_sign = attribution_graph(explainer, x, 1, layers=layers, width=[1, 1], by="signed")
    assert [n.concept for n in by_sign.at("5")] == [int(best.argmax())]


def test_it_shows_itself_and_can_be_stored(tmp_path: Path) -> None:
    model, x = fill(Skip()), draw(1, 3)
    graph = everything(lrpfx.Explainer(model, x, EXACT), x)
    assert "9 concepts, 27 edges" in repr(graph)
    graph.save(tmp_path / "graph.json")
    assert AttributionGraph.load(tmp_path / "graph.json") == graph
    graph.plot(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes()[:4] == b"\x89PNG"
    assert graph.to_dot().count("->") == 27
    drawn = graph.to_networkx()
    assert drawn.number_of_edges() == 27 and ("c", 0) in drawn
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(lrpfx.errors.InputError, match="holds no graph"):
        AttributionGraph.load(tmp_path / "no.json")


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(layers=["a", "a"], width=[1]), "no places"),
        (dict(layers=["a", "c"], width=[1, 1]), "does not fit 2 layers"),
        (dict(layers=["a", "c"], width=[1], begin={"a": [0]}), "names no concepts of the last"),
        (dict(layers=["a", "c"], width=[1], begin={"c": [5]}), "0 to 2"),
        (dict(layers=["a", "z"], width=[1]), "'z' matches no module"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], said: str) -> None:
    model, x = fill(Skip()), draw(1, 3)
    explainer = lrpfx.Explainer(model, x, EXACT)
    with pytest.raises(lrpfx.errors.SelectorError, match=said):
        attribution_graph(explainer, x, 1, **options)
