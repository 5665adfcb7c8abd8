"""PyG's own Explainer calls lrpfx: tasks of nodes and graphs, types of masks and of nodes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from tests.conftest import assert_untouched

pytest.importorskip("torch_geometric", reason="pip install 'lrpfx[pyg]'")

from torch_geometric.explain import Explainer  # noqa: E402
from torch_geometric.nn import GCNConv, HeteroConv, SAGEConv, global_mean_pool  # noqa: E402

from lrpfx.adapters.pyg import LRPExplainer  # noqa: E402

EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 4, 5], [1, 0, 2, 1, 3, 2, 5, 4]])


class Nodes(nn.Module):
    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.first, self.second = GCNConv(4, 8), GCNConv(8, out)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        x = self.first(x, edge_index, edge_weight).relu()
        return F.log_softmax(self.second(x, edge_index, edge_weight), 1)


class Graphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = GCNConv(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.head(global_mean_pool(self.conv(x, edge_index).relu(), batch, size=2))


def features() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 4)


def explainer(model: nn.Module, mode: str, level: str, mask: str = "attributes") -> Any:
    returns = "log_probs" if mode == "multiclass_classification" else "raw"
    config = {"mode": mode, "task_level": level, "return_type": returns}
    return Explainer(model, LRPExplainer("epsilon_all"), "model", config, node_mask_type=mask)


@pytest.mark.parametrize("index", [None, 2, torch.tensor([0, 4])])
def test_nodes_are_explained_by_the_logits_of_their_classes(index: Any) -> None:
    torch.manual_seed(1)
    model, x = Nodes().eval(), features()
    with assert_untouched(model):
        found = explainer(model, "multiclass_classification", "node")(x, EDGES, index=index)
    at = torch.arange(6) if index is None else torch.as_tensor(index).reshape(-1)
    classes = model(x, EDGES).argmax(1)
    plain = lrpfx.explain(
        model, (x, EDGES), _seed(model, x, at, classes), rules="epsilon_all", wrt=0
    ).relevance[0]
    torch.testing.assert_close(found.node_mask, plain)
    if isinstance(index, int):  # no path leads from the other component
        assert found.node_mask[4:].abs().sum() == 0
    assert 0 < len(found.get_explanation_subgraph().x) <= 6


def _seed(model: Nodes, x: Tensor, at: Tensor, classes: Tensor) -> Tensor:
    """One-hot times the logit, at the nodes that are explained."""
    logits = model.second(model.first(x, EDGES).relu(), EDGES).detach()
    seed = torch.zeros_like(logits)
    seed[at, classes[at]] = logits[at, classes[at]]
    return seed


def test_graphs_are_explained_by_their_outputs() -> None:
    torch.manual_seed(1)
    model, x, batch = Graphs().eval(), features(), torch.tensor([0, 0, 0, 0, 1, 1])
    found = explainer(model, "regression", "graph")(x, EDGES, batch=batch)
    plain = lrpfx.explain(
        model, (x, EDGES, batch), lambda out: out.sum(), rules="epsilon_all", wrt=0
    )
    torch.testing.assert_close(found.node_mask, plain.relevance[0])
    one = explainer(model, "binary_classification", "graph")(x, EDGES, batch=batch, index=1)
    assert one.node_mask[:4].abs().sum() == 0 < one.node_mask[4:].abs().sum()


def test_masks_are_of_features_nodes_or_features_of_all() -> None:
    model, x = Nodes().eval(), features()
    weight = torch.rand(8)
    found = [
        explainer(model, "multiclass_classification", "node", mask)(x, EDGES, edge_weight=weight)
        for mask in ("attributes", "object", "common_attributes")
    ]
    full, nodes, common = (one.node_mask for one in found)
    torch.testing.assert_close(nodes, full.sum(1, keepdim=True))
    torch.testing.assert_close(common, full.sum(0, keepdim=True))


class Typed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        to, back = ("a", "to", "b"), ("b", "back", "a")
        self.conv = HeteroConv({to: SAGEConv((4, 3), 5), back: SAGEConv((3, 4), 5)})
        self.head = nn.Linear(5, 2)

    def forward(self, x: dict[str, Tensor], edge_index: dict[Any, Tensor]) -> Tensor:
        return self.head(self.conv(x, edge_index)["b"].relu())


def test_nodes_of_several_types() -> None:
    torch.manual_seed(0)
    model = Typed().eval()
    x = {"a": torch.randn(3, 4), "b": torch.randn(2, 3)}
    edges = {
        ("a", "to", "b"): torch.tensor([[0, 1, 2], [0, 1, 1]]),
        ("b", "back", "a"): torch.tensor([[0, 1], [1, 2]]),
    }
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    method = Explainer(model, LRPExplainer(), "model", config, node_mask_type="attributes")
    found = method(x, edges, index=0)
    assert found["a"].node_mask.shape == (3, 4) and found["b"].node_mask.shape == (2, 3)
    assert found["a"].node_mask[0].abs().sum() > 0 and found["a"].node_mask[1:].abs().sum() == 0


def test_edges_have_no_masks() -> None:
    config = {"mode": "regression", "task_level": "graph", "return_type": "raw"}
    with pytest.raises(ValueError, match="does not support"):
        Explainer(Graphs(), LRPExplainer(), "model", config, edge_mask_type="object")
