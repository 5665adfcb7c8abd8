"""A softmax or sigmoid at the output is left out, whatever moves stand behind it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply, traced_once

pytestmark = pytest.mark.usefixtures("each_way")

RULES = composites.EpsilonAll(0.0)
X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

#: Each makes an output (N, 3, ...), from which the second class is explained.
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda z: z.softmax(1),
    "unsqueezed and squeezed": lambda z: z.unsqueeze(1).softmax(-1).squeeze(1),
    "viewed": lambda z: z.softmax(1).view(-1, 3, 1),
    "permuted": lambda z: z[None].softmax(2).permute(1, 2, 0),
    "transposed": lambda z: z[:, None].softmax(2).transpose(1, 2),
    "cast": lambda z: z.softmax(1).float(),
    "taken apart and stacked": lambda z: torch.stack(z.softmax(1).unbind(1), 1),
    "in chunks": lambda z: torch.cat(z.softmax(1).chunk(3, 1), 1),
    "with a guard": lambda z: (e := z.exp()) / (e.sum(1, keepdim=True) + 1e-12),
}
LOGARITHMS: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda z: z.log_softmax(1).view(-1, 3),
    "indexed": lambda z: F.log_softmax(z, 1)[:, :, None],
    "by logsumexp": lambda z: z - z.logsumexp(1, keepdim=True),
}
SIGMOIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": torch.sigmoid,
    "moved": lambda z: z.view(-1, 3, 1).sigmoid().transpose(1, 2)[:, 0],
    "by hand": lambda z: 1 / (1 + torch.exp(-z)),
}


@pytest.fixture(autouse=True, scope="module")
def one_trace() -> Iterator[None]:
    with traced_once():
        yield


@functools.cache
def model(end: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Apply(lambda m, x: end(m.layer(x)), layer=nn.Linear(4, 3).double())


def itself(z: Tensor) -> Tensor:
    return z


def relevance(end: Callable, target: Any = None) -> tuple[Tensor, tuple[str, ...]]:
    found = lrpfx.explain(model(end), X, target, rules=RULES)
    torch.testing.assert_close(found.output, end(model(itself)(X)))
    return found.relevance.double(), found.report.notes


@pytest.mark.parametrize(
    ("end", "function", "name"),
    [(end, lambda z: z.softmax(1), "softmax") for end in SOFTMAXES.values()]
    + [(end, lambda z: z.log_softmax(1), "log-softmax") for end in LOGARITHMS.values()]
    + [(end, torch.sigmoid, "sigmoid") for end in SIGMOIDS.values()],
    ids=[
        *SOFTMAXES,
        *(f"log {key}" for key in LOGARITHMS),
        *(f"sigmoid {key}" for key in SIGMOIDS),
    ],
)
def test_what_is_explained_are_the_logits(end: Callable, function: Callable, name: str) -> None:
    tolerance = 1e-6 if end(torch.zeros(1, 3).double()).dtype == torch.float32 else 1e-9
    found, notes = relevance(end, 1 if end(X[:, :3]).ndim == 2 else (1, 0))
    expected, _ = relevance(itself, 1)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert len(notes) == 1 and notes[0].startswith(f"the {name} at the output is left out")
    # To a callable it is part of what the target computes.
    found, _ = relevance(end, lambda out: out.flatten(1)[:, 1])
    expected, _ = relevance(itself, lambda z: function(z)[:, 1])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


#: Larger stays larger, but for the last, which are values of their own.
BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "log of a softmax": (lambda z: z.softmax(1).log(), True),
    "guarded, moved": (lambda z: (z.softmax(1) + 1e-9).log()[:, :, None], True),
    "in percent, clamped": (lambda z: (100 * z[:, None].softmax(2)).clamp(1e-6).flatten(1), True),
    "of a tanh": (lambda z: 0.5 + 0.5 * torch.tanh(z / 2), True),
    "one less": (lambda z: 1 - torch.sigmoid(-z), True),
    "hard": (F.hardsigmoid, True),
    "a range": (lambda z: 4 * z.sigmoid() + 1, False),
    "falling": (lambda z: -z.softmax(1), False),
}


@pytest.mark.parametrize(("end", "left_out"), BEHIND.values(), ids=BEHIND)
def test_logarithms_guards_and_scales_behind_are_left_out_with_it(
    end: Callable, left_out: bool
) -> None:
    found, notes = relevance(end, 1 if end(X[:, :3]).ndim == 2 else (1, 0))
    assert any("at the output is left out" in note for note in notes) == left_out
    if left_out:
        torch.testing.assert_close(found, relevance(itself, 1)[0])
        found, _ = relevance(end, lambda out: out.flatten(1)[:, 1])
        expected, _ = relevance(itself, lambda z: end(z).flatten(1)[:, 1])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "end", [lambda z: z.softmax(1)[:, 1], lambda z: z.softmax(1).split(1, 1)[1].squeeze(1)]
)
def test_of_one_probability_the_logit_is_explained_whatever_the_target(end: Callable) -> None:
    expected, _ = relevance(itself, 1)
    for target in (None, lambda out: out):
        found, notes = relevance(end, target)
        torch.testing.assert_close(found, expected)
        assert notes[0].endswith("explained are its logits, which a callable target gets, too")


@pytest.mark.parametrize("end", [lambda z: -z.log_softmax(1), lambda z: 1 - 2 * z.softmax(1)])
def test_where_larger_becomes_smaller_the_negative_logit_is_explained(end: Callable) -> None:
    found, notes = relevance(end, 1)
    torch.testing.assert_close(found, relevance(lambda z: -z, 1)[0])
    assert "with its sign turned, of which a part is the output, is left out" in notes[0]


@pytest.mark.parametrize(
    "end",
    [
        lambda z: torch.cat([torch.zeros_like(z[:, :1]), z.softmax(1)], 1),
        lambda z: torch.cat([torch.full((2, 1), 0.5).double(), z.log_softmax(1)], 1),
        lambda z: torch.cat([z.round()[:, :1], z.sigmoid()], 1),
        lambda z: F.pad(z.sigmoid(), (1, 0)),
    ],
)
def test_classes_that_are_constants_are_none_of_the_softmax(end: Callable) -> None:
    found, notes = relevance(end, 2)
    torch.testing.assert_close(found, relevance(itself, 1)[0])
    assert any("of which a part is the output, is left out" in note for note in notes)


PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "of an ensemble": lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
    "of two classes": lambda z: z.softmax(1)[:, :2].sum(1, keepdim=True),
    "the largest": lambda z: z.softmax(1).topk(2, 1)[0],
    "of the best place": lambda z: z.sigmoid().amax(1, keepdim=True),
}


@pytest.mark.parametrize("end", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_that_are_explained_are_told_of(end: Callable) -> None:
    assert any("not their logits: " in note and __file__ in note for note in relevance(end, 0)[1])


@pytest.mark.parametrize("end", [torch.exp, F.softplus, lambda z: z.flip(1).exp()[:, None]])
def test_an_output_that_is_positive_whatever_its_logit_is_told_of(end: Callable) -> None:
    notes = relevance(end, lambda out: out.flatten(1)[:, 0])[1]
    assert any("positive where its logit is negative" in note for note in notes)


@pytest.mark.parametrize("end", [torch.relu, torch.tanh, torch.abs, F.elu, lambda z: z.exp() @ z.T])
def test_other_functions_at_the_output_are_not(end: Callable) -> None:
    assert not any("positive where" in n for n in relevance(end, lambda out: out[:, 0])[1])


def test_a_softmax_beside_its_own_argmax_is_left_out() -> None:
    both = model(lambda z: {"p": (p := z.softmax(1)), "class": p.argmax(1)})
    expected, _ = relevance(itself, 1)
    torch.testing.assert_close(lrpfx.explain(both, X, 1, rules=RULES).relevance, expected)


def test_a_sigmoid_with_a_negative_logit_keeps_the_sign_of_the_relevance() -> None:
    x = X[:1]
    logit = model(lambda z: -z.square().sum(1, keepdim=True))
    through = model(lambda z: (-z.square().sum(1, keepdim=True)).sigmoid())
    expected, found = (lrpfx.explain(m, x, rules=RULES).relevance for m in (logit, through))
    torch.testing.assert_close(found, expected)


def test_a_gate_at_the_output_is_none_to_leave_out() -> None:
    assert relevance(lambda z: z * z.sigmoid(), 1)[1] == ()


def test_of_several_softmaxes_side_by_side_each_is_left_out() -> None:
    def heads(z: Tensor) -> Tensor:
        return torch.cat([z[:, :2].softmax(1), z[:, 2:].sigmoid()], 1)

    got, notes = relevance(heads, 1)
    torch.testing.assert_close(got, relevance(itself, 1)[0])
    assert any("softmax and sigmoid" in note for note in notes)


def test_a_softmax_that_is_an_output_itself_is_not_left_out_of_another() -> None:
    net = Apply(lambda m, x: ((p := m.layer(x).softmax(1))[:, :2], p), layer=model(itself).layer)
    e = lrpfx.explain(net, X, lambda out: out[0][:, 1], rules=RULES)
    assert not any("left out" in note for note in e.report.notes)
