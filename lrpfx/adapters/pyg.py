"""An explanation algorithm for PyTorch Geometric: ``pip install 'lrpfx[pyg]'``.

``torch_geometric.explain.Explainer(model, algorithm=LRPExplainer(), ...)``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lrpfx.adapters.around import around
from lrpfx.adapters.kept import Kept
from lrpfx.plan import RulesLike

try:
    from torch_geometric.explain import Explanation, HeteroExplanation
    from torch_geometric.explain.algorithm import ExplainerAlgorithm
    from torch_geometric.explain.config import MaskType, ModelMode
except ImportError as error:
    raise ImportError("lrpfx.adapters.pyg needs PyG: pip install 'lrpfx[pyg]'.") from error


class LRPExplainer(ExplainerAlgorithm):  # type: ignore[misc]
    """Relevance of node features, for tasks on nodes, edges and graphs.

    Of a classification the score of each target class is explained (a softmax at the output is left
    out), of a binary one and of a regression the output; of several outputs their sum.

    Args:
        rules: See ``lrpfx.explain``.
    """

    def __init__(self, rules: RulesLike = None) -> None:
        super().__init__()
        self._rules = rules
        self._kept: Kept | None = None
        self._of: tuple[nn.Module, ...] = ()  # in a tuple: the model is no part of this module

    def forward(
        self,
        model: nn.Module,
        x: Tensor | dict[str, Tensor],
        edge_index: Tensor | dict[Any, Tensor],
        *,
        target: Tensor,
        index: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Explanation | HeteroExplanation:
        """Explain the outputs at ``index``; called by ``torch_geometric.explain.Explainer``."""
        if self._kept is None or self._of != (model,):
            self._of = (model,)
            self._kept = Kept(_picking(model), self._rules)
        self._kept.model.training = model.training
        at = None if index is None else torch.as_tensor(index, device=target.device).reshape(-1)
        classes = self.model_config.mode == ModelMode.multiclass_classification
        asked: Any = (target if at is None else target[at]) if classes else _total
        inputs = (x, edge_index, at, kwargs)
        found = self._kept.explain(inputs, asked, wrt=(0,), ledger=False).relevance[0]
        if isinstance(found, Tensor):
            return Explanation(node_mask=self._masked(found))
        explanation = HeteroExplanation()
        masks = {kind: self._masked(relevance) for kind, relevance in found.items()}
        explanation.set_value_dict("node_mask", masks)
        return explanation

    def _masked(self, relevance: Tensor) -> Tensor:
        """As the mask type has it: of each feature of each node, of each node, or of each."""
        mask_type = self.explainer_config.node_mask_type
        if mask_type == MaskType.object:
            return relevance.sum(1, keepdim=True)
        if mask_type == MaskType.common_attributes:
            return relevance.sum(0, keepdim=True)
        return relevance

    def supports(self) -> bool:
        """Whether masks are of nodes only: relevance of an edge is no number of the model's."""
        edges = self.explainer_config.edge_mask_type
        if edges is not None:
            logging.error(
                "'%s' has no relevance of edges: 'edge_mask_type' must be 'None' (got '%s')",
                type(self).__name__,
                edges.value,
            )
        return edges is None


def _picking(model: nn.Module) -> nn.Module:
    """The model with its outputs at an index."""

    def forward(x: Any, edge_index: Any, index: Tensor | None, more: dict[str, Any]) -> Any:
        output = type(model).forward(model, x, edge_index, **more)
        return output if index is None else output[index]

    return around(model, forward)


def _total(output: Tensor) -> Tensor:
    return output.sum()
