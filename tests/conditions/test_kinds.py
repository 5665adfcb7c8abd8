"""Kinds of concepts: what they encode sums to the layer's relevance, and masks are projections."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.concepts import Channel, Concept, Direction, Head, Neuron, Subspace, Token
from tests.conditions.test_conditions import EXACT, cnn, draw, fill
from tests.conftest import Apply

pytestmark = pytest.mark.usefixtures("each_front")

IMAGE, ROWS = draw(3, 6, 2, 4), draw(3, 5, 6)


def rotation(size: int) -> Tensor:
    q, _ = torch.linalg.qr(draw(size, size, seed=9))
    return q


KINDS: dict[str, tuple[Concept, Tensor, int | None]] = {
    "channels": (Channel(), IMAGE, 1),
    "features": (Channel(), ROWS, 2),
    "tokens": (Token(), ROWS, 2),
    "neurons": (Neuron(), IMAGE, 1),
    "heads": (Head(3), ROWS, 2),
    "heads apart": (Head(6), IMAGE, 1),
    "directions": (Direction(rotation(6)[:4]), ROWS, 2),
    "directions of pixels": (Direction(draw(3, 6)), IMAGE, 1),
    "an encoder": (Direction(draw(9, 6), encoder=draw(9, 6, seed=4)), ROWS, 2),
    "subspaces": (Subspace([draw(2, 6), draw(3, 6, seed=4)]), IMAGE, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_scores_sum_to_the_relevance_and_are_what_masks_keep(name: str) -> None:
    kind, activation, channels = KINDS[name]
    relevance = draw(*activation.shape, seed=2)
    kind = kind.at(("N", *activation.shape[1:]), channels)
    scores = kind.encode(relevance, activation)
    torch.testing.assert_close(scores.sum(1), relevance.flatten(1).sum(1))
    every = kind.mask(relevance, activation, torch.ones_like(scores))
    torch.testing.assert_close(every, relevance)
    for c in range(scores.shape[1]):
        one = torch.zeros_like(scores)
        one[:, c] = 1
        kept = kind.mask(relevance, activation, one)
        torch.testing.assert_close(kept.flatten(1).sum(1), scores[:, c])


def test_directions_along_the_axes_are_channels() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    axes = Direction(torch.eye(5, dtype=torch.float64))
    for ledger in (True, False):
        for c in range(5):
            a = explainer(x, 1, conditions=[{"2": (axes, [c])}], ledger=ledger).relevance
            b = explainer(x, 1, conditions=[{"2": [c]}], ledger=ledger).relevance
            torch.testing.assert_close(a, b)


def test_turned_directions_sum_to_the_whole() -> None:
    model, x = cnn(), draw(2, 1, 7, 7)
    explainer = lrpfx.Explainer(model, x, "epsilon_plus")
    whole = explainer(x, 1, layers=["2"])
    turned = Direction(rotation(5)[:3])
    each = explainer(x, 1, conditions=[{"2": (turned, [c])} for c in range(4)])
    torch.testing.assert_close(each.relevance.sum(0), whole.relevance)
    scores = whole.concepts("2", turned)
    assert scores.shape == (2, 4)
    torch.testing.assert_close(scores.sum(1), whole.concepts("2").sum(1))
    # By the formula: R_k = (a . u) (v . R / a), with u = v for an orthonormal basis.
    relevance, a = whole.layers["2"][0]
    for k, v in enumerate(rotation(5)[:3]):
        c = torch.where(a == 0, 0.0, relevance / torch.where(a == 0, 1.0, a))
        by_hand = (torch.einsum("nchw,c->nhw", a, v) * torch.einsum("nchw,c->nhw", c, v)).sum(
            (1, 2)
        )
        torch.testing.assert_close(scores[:, k], by_hand)


class SelfAttention(nn.Module):
    """Attention of two heads, fused or written out; keys and values may share a group."""

    def __init__(self, fused: bool, groups: int = 2) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.k, self.v = (nn.Linear(4, 4 * groups, bias=False) for _ in "kv")
        self.fused, self.groups = fused, groups

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups == 1)
        else:
            k, v = (t.repeat_interleave(2 // self.groups, 1) for t in (k, v))
            y = (q @ k.mT * 0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).sum(1)


@pytest.mark.parametrize(("groups", "ledger"), [(2, True), (2, False), (1, False)])
def test_heads_are_those_of_attention_written_out(groups: int, ledger: bool) -> None:
    fused, plain = fill(SelfAttention(True, groups)), fill(SelfAttention(False, groups))
    x = draw(2, 3, 4)
    relevance = []
    for model in (fused, plain):
        explainer = lrpfx.Explainer(model, x, "attnlrp")
        (attended,) = [r.node for r in explainer.report.rows if r.op == "flatten"]
        conditions: list[Any] = [{attended: (Head(2), [h])} for h in range(2)]
        e = explainer(x, 1, conditions=conditions, ledger=ledger)
        whole = explainer(x, 1, ledger=ledger)
        torch.testing.assert_close(e.relevance.sum(0), whole.relevance)
        relevance.append(e.relevance)
    torch.testing.assert_close(*relevance)
    # The head alone: its columns of the output layer, the others zero.
    exact = lrpfx.Explainer(plain, x, lrpfx.composites.AttnLRP(epsilon=1e-12))
    (attended,) = [r.node for r in exact.report.rows if r.op == "flatten"]
    for head in range(2):
        alone = fill(SelfAttention(False, groups))
        alone.out.weight.data[:, 4 * (1 - head) : 4 * (2 - head)] = 0
        seed = torch.zeros_like(alone(x))
        seed[:, 1] = alone(x)[:, 1]
        expected = lrpfx.explain(alone, x, seed, rules=lrpfx.composites.AttnLRP(epsilon=1e-12))
        got = exact(x, 1, conditions=[{attended: (Head(2), [head])}]).relevance[0]
        torch.testing.assert_close(got, expected.relevance)


def test_a_kind_of_ones_own_is_two_methods() -> None:
    class Halves(Concept):
        """The left and the right half of an image."""

        def encode(self, relevance: Tensor, activation: Tensor) -> Tensor:
            return torch.stack([h.flatten(1).sum(1) for h in relevance.chunk(2, -1)], 1)

        def mask(self, relevance: Tensor, activation: Tensor, weights: Tensor) -> Tensor:
            each = weights[:, :, None, None, None].unbind(1)
            return torch.cat([h * w for h, w in zip(relevance.chunk(2, -1), each, strict=True)], -1)

    model = fill(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    x = draw(2, 1, 2, 4)
    explainer = lrpfx.Explainer(model, x, EXACT)
    whole = explainer(x, 1, layers=["1"])
    halves = Halves()
    e = explainer(x, 1, conditions=[{"1": (halves, [h])} for h in range(2)])
    left = whole.relevance * (torch.arange(4) < 2)
    torch.testing.assert_close(e.relevance[0], left)
    torch.testing.assert_close(e.relevance[1], whole.relevance - left)
    assert whole.concepts("1", halves).shape == (2, 2)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Direction(torch.ones(2, 3)), "2 vectors span 1 dimensions"),
        (lambda: Direction(torch.ones(3)), "rows of floating tensors"),
        (lambda: Subspace([torch.eye(2), torch.eye(3)]), "different lengths"),
        (lambda: Direction(torch.eye(2), names=["one"]), "1 names for 2 concepts"),
        (lambda: Direction(torch.eye(2), encoder=torch.eye(3)), r"the encoder is \(3, 3\)"),
    ],
)
def test_directions_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(lrpfx.errors.InputError, match=said):
        make()


def test_tokens_and_neurons_are_places_in_the_input() -> None:
    """Of a model that mixes no positions, a token's relevance stays at the token."""
    layers = {"up": nn.Linear(3, 4), "fc": nn.Linear(4, 2)}
    model = fill(Apply(lambda m, x: m.fc(m.up(x).relu()).sum(1), **layers))
    x = draw(2, 5, 3)
    explainer = lrpfx.Explainer(model, x, EXACT)
    whole = explainer(x, 1, layers=["up"])
    got = explainer(x, 1, conditions=[{"up": (Token(), [3])}]).relevance[0]
    torch.testing.assert_close(got, whole.relevance * (torch.arange(5) == 3)[:, None])
    feature = int(whole.layers["up"].relevance[0, 3].abs().argmax())
    one, flat = (
        explainer(x, 1, conditions=[{"up": (Neuron(), [n])}]).relevance[0, 0]
        for n in ((3, feature), 12 + feature)
    )
    torch.testing.assert_close(one, flat)
    assert one[3].abs().sum() > 0 and one[:3].abs().sum() == 0
