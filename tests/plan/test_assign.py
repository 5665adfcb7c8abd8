"""Which rule reaches which layer, and what the report says of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import Flat, ZPlus, composites
from tests.oracle.networks import conv_net, draw, image, mlp, trained


def is_linear(record: Any) -> bool:
    return record.kind == "linear"


class Blocks(nn.Module):
    """Two containers of a conv and a ReLU, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(1))


DEFAULT = {
    "stem.0": "Gamma",
    "stem.1": "Pass",
    "body.0": "Gamma",
    "body.1": "Pass",
    "": "Gradient",
    "head": "Epsilon",
}


BLOCKS = trained(Blocks())


RULES: list[tuple[str, Any, dict[str, str]]] = [
    # name, rules=, what is other than in the default
    ("none", None, {}),
    ("no entries", [], {}),
    ("composite's name", "epsilon_all", {"stem.0": "Epsilon", "body.0": "Epsilon"}),
    ("composite", composites.EpsilonAll(), {"stem.0": "Epsilon", "body.0": "Epsilon"}),
    ("composite of one's own", composites.Composite([("conv", Flat())]), {
        "stem.0": "Flat", "body.0": "Flat",
    }),
    ("kind", [("conv", Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    ("class", [(nn.Conv2d, Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    ("predicate", [(is_linear, Flat())], {"head": "Flat"}),
    ("path", [("body.0", Flat())], {"body.0": "Flat"}),
    ("glob", [("*.0", Flat())], {"stem.0": "Flat", "body.0": "Flat"}),
    # Broad selectors reach what the rule fits, and only that.
    ("container", [("body", Flat())], {"body.0": "Flat"}),
    ("container's glob", [("body*", ZPlus())], {"body.0": "ZPlus"}),
    ("class of containers", [(nn.Sequential, ZPlus())], {"stem.0": "ZPlus", "body.0": "ZPlus"}),
    ("all", [("*", ZPlus())], {"stem.0": "ZPlus", "body.0": "ZPlus", "head": "ZPlus"}),
    ("all ReLUs", [("*", lrpfx.ReLUGuidedBackprop())], {
        "stem.1": "ReLUGuidedBackprop", "body.1": "ReLUGuidedBackprop",
    }),
    ("family", [("affine", ZPlus())], {"stem.0": "ZPlus", "body.0": "ZPlus", "head": "ZPlus"}),
    # The first entry wins.
    ("order", [("body", Flat()), ("conv", ZPlus())], {"stem.0": "ZPlus", "body.0": "Flat"}),
    ("other order", [("conv", ZPlus()), ("body", Flat())], {"stem.0": "ZPlus", "body.0": "ZPlus"}),
    ("tuple", (("conv", Flat()),), {"stem.0": "Flat", "body.0": "Flat"}),
]  # fmt: skip


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    ("rules", "changed"), [pytest.param(*row, id=name) for name, *row in RULES]
)
def test_rules_reach(rules: Any, changed: dict[str, str]) -> None:
    report = lrpfx.Explainer(BLOCKS, image(), rules).report
    assert {row.module: row.rule for row in report.rows} == DEFAULT | changed


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        pytest.param(conv_net(), image(), ["epsilon_gamma", "convolution"], id="conv"),
        pytest.param(mlp(), draw(2, 3), ["epsilon_all", "no convolution"], id="mlp"),
    ],
)
def test_report_says_what_none_picked(model: nn.Module, inputs: Tensor, said: list[str]) -> None:
    explanation = lrpfx.explain(model, inputs)
    named = lrpfx.explain(model, inputs, rules=said[0])
    assert torch.equal(explanation.relevance, named.relevance)
    for word in said:
        assert word in explanation.report.rules
        assert word in repr(explanation.report)


def test_an_entry_that_decides_nothing_is_noted() -> None:
    rules = [("conv", ZPlus()), ("linear", ZPlus()), (nn.Conv2d, lrpfx.Epsilon())]
    notes = lrpfx.Explainer(BLOCKS, image(), rules).report.notes
    assert [n for n in notes if "decides nothing" in n] == [
        "(Conv2d, Epsilon) decides nothing: entries before it match first"
    ]


def test_selecting_the_model_itself() -> None:
    """A model that is one layer is an instance of its class like any other layer."""
    report = lrpfx.Explainer(nn.Linear(3, 2), draw(2, 3), [(nn.Linear, ZPlus())]).report
    assert [row.rule for row in report.rows] == ["ZPlus"]
