"""Softmaxes by hand, whatever is subtracted and wherever they are divided, are softmaxes.

The twins have ``softmax`` in the place of the formula, over each group by itself; logarithms of
sums of exponentials are held against those from which nothing is subtracted.
"""

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from tests.conftest import Apply, traced_once

pytestmark = pytest.mark.usefixtures("each_way")

Scores = Callable[[Tensor, Tensor], Tensor]

RULES = {
    "attnlrp": composites.AttnLRP(1e-18),
    "cplrp": composites.CPLRP(1e-18),
    "epsilon_plus": composites.EpsilonPlus(1e-18, 1e-18),
}


@pytest.fixture(autouse=True, scope="module")
def one_trace() -> Iterator[None]:
    with traced_once():
        yield


def normal(*shape: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def top(a: Tensor) -> Tensor:
    return a.amax(-1, keepdim=True)


def e(a: Tensor) -> Tensor:
    return (a - top(a)).exp()


def total(a: Tensor) -> Tensor:
    return a.sum(-1, keepdim=True)


MASK = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)
ONES = torch.ones(5, 1, dtype=torch.float64)


def softmax(a: Tensor, v: Tensor) -> Tensor:
    return a.softmax(-1) @ v


def masked(a: Tensor, v: Tensor) -> Tensor:
    return a.masked_fill(MASK == 0, -torch.inf).softmax(-1) @ v


def beside_one(a: Tensor, v: Tensor) -> Tensor:
    return torch.cat([a, torch.zeros_like(a[..., :1])], -1).softmax(-1)[..., :-1] @ v


#: Each with its plain twin.
ATTENTION: dict[str, tuple[Scores, Scores]] = {
    "nothing subtracted": (lambda a, v: a.exp() / total(a.exp()) @ v, softmax),
    "a guard": (lambda a, v: e(a) / (total(e(a)) + 1e-16) @ v, softmax),
    "a guard by clamp, the largest of all": (
        lambda a, v: (b := (a - a.max()).exp()) / total(b).clamp(min=1e-9) @ v,
        softmax,
    ),
    "the maximum detached": (
        lambda a, v: (b := (a - top(a).detach()).exp()) / (total(b) + 1e-16) @ v,
        softmax,
    ),
    "F.normalize": (lambda a, v: F.normalize(e(a), p=1, dim=-1) @ v, softmax),
    "by an inverse": (
        lambda a, v: e(a) * (e(a).sum(-1) + 1e-16).reciprocal()[..., None] @ v,
        softmax,
    ),
    "a sum by a matrix of ones": (lambda a, v: (b := e(a)) / (b @ ONES) @ v, softmax),
    "scaled behind the maximum": (
        lambda a, v: (b := ((2 * a - top(2 * a)) * 0.5).exp()) / total(b) @ v,
        softmax,
    ),
    "in single precision": (
        lambda a, v: (b := e(a.float())).div(total(b)).double() @ v,
        lambda a, v: a.float().softmax(-1).double() @ v,
    ),
    "a sum by einsum": (
        lambda a, v: (b := e(a)) / torch.einsum("nts->nt", b)[..., None] @ v,
        softmax,
    ),
    "sharpened": (
        lambda a, v: (b := a.softmax(-1) ** 2) / total(b) @ v,
        lambda a, v: (2 * a).softmax(-1) @ v,
    ),
    "to the power of an inverse temperature": (
        lambda a, v: (b := (2 * a).exp().sqrt()) / total(b) @ v,
        softmax,
    ),
    "divided behind the product": (lambda a, v: (b := e(a)) @ v / total(b), softmax),
    "behind an einsum": (
        lambda a, v: torch.einsum("nts,nsd->ntd", b := e(a), v) / b.sum(-1)[..., None],
        softmax,
    ),
    "behind a sum of products": (
        lambda a, v: (e(a)[..., None] * v[:, None]).sum(2) / (e(a).sum(-1)[..., None] + 1e-16),
        softmax,
    ),
    "behind a product from the left": (
        lambda a, v: (b := (a.mT - a.mT.amax(1, keepdim=True)).exp()).mT @ v / b.sum(1)[..., None],
        softmax,
    ),
    "less the logarithm of the sum": (
        lambda a, v: ((b := a - top(a)) - total(b.exp()).log()).exp() @ v,
        softmax,
    ),
    "less logsumexp": (lambda a, v: (a - a.logsumexp(-1, keepdim=True)).exp() @ v, softmax),
    "less the logarithm of a mean": (
        lambda a, v: (a - a.exp().mean(-1, keepdim=True).log() - math.log(5)).exp() @ v,
        softmax,
    ),
    "less a logarithm of one more": (
        lambda a, v: (a - torch.log1p(total(a.exp()))).exp() @ v,
        beside_one,
    ),
    "exp of log_softmax": (lambda a, v: a.log_softmax(-1).exp() @ v, softmax),
    "masked by a product": (
        lambda a, v: (b := e(a) * MASK) / (total(b) + 1e-13) @ v,
        masked,
    ),
    "masked by a product, divided later": (
        lambda a, v: (b := e(a) * MASK) @ v / (total(b) + 1e-13),
        masked,
    ),
    "masked by where": (
        lambda a, v: (b := torch.where(MASK > 0, e(a), 0.0)) / total(b) @ v,
        masked,
    ),
    "filled behind the maximum": (
        lambda a, v: (b := (a - top(a)).masked_fill(MASK == 0, -torch.inf).exp()) / total(b) @ v,
        masked,
    ),
    "a softmax masked and divided again": (
        lambda a, v: (b := (a * MASK).softmax(-1) * MASK) / (total(b) + 1e-13) @ v,
        masked,
    ),
    "one more than the sum": (lambda a, v: a.exp() / (1 + total(a.exp())) @ v, beside_one),
    "one more, less the maximum, divided later": (
        lambda a, v: e(a) @ v / ((-top(a)).exp() + total(e(a))),
        beside_one,
    ),
}


@functools.cache
def attention(form: Scores) -> nn.Module:
    torch.manual_seed(0)
    qkv = nn.Linear(6, 18).double()

    def forward(m: Apply, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return form(q @ k.mT, v)

    return Apply(forward, qkv=qkv)


def relevance(model: nn.Module, x: Tensor, rules: str, ledger: bool = True) -> Tensor:
    with torch.no_grad():
        seed = normal(*model(x).shape, seed=3)
    return lrpfx.explain(model, x, seed, rules=RULES[rules], ledger=ledger).relevance


@pytest.mark.parametrize(("spelled", "plain"), ATTENTION.values(), ids=ATTENTION)
def test_a_softmax_by_hand_is_a_softmax(spelled: Scores, plain: Scores) -> None:
    x = normal(2, 5, 6)
    tolerance = 1e-5 if "float" in spelled.__code__.co_names else 1e-9
    for rules, ledger in (("attnlrp", True), ("attnlrp", False)):
        ours, expected = (relevance(attention(f), x, rules, ledger) for f in (spelled, plain))
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_a_softmax_by_hand_has_the_kind_of_one_and_its_sum_is_no_divisor_to_note() -> None:
    for form in (ATTENTION["a guard"][0], ATTENTION["divided behind the product"][0]):
        report = lrpfx.explain(attention(form), normal(2, 5, 6), lambda out: out[:, 0, 1]).report
        assert [row.kind for row in report.rows].count("softmax") == 1
        assert report.notes == ()
        assert "attention" in report.rules


def test_derivatives_of_relevance_run_through_a_softmax_by_hand() -> None:
    x, seed = normal(2, 5, 6), normal(2, 5, 6, seed=5)
    found = []
    for form in (*ATTENTION["divided behind the product"], ATTENTION["a guard"][0]):
        model, given = attention(form), x.clone().requires_grad_()
        r = lrpfx.explain(model, given, seed, rules=RULES["attnlrp"], create_graph=True).relevance
        found.append(torch.autograd.grad(r.square().sum(), given)[0])
    for derivative in found:
        torch.testing.assert_close(derivative, found[1])


def test_what_differs_within_a_sum_is_no_shift() -> None:
    """A bias that is live or not stays a summand of the scores, with a share of its own."""
    bias = normal(5, 5, seed=7)
    for spelled, plain in (
        (
            lambda a, v: (b := (a - bias).exp()) / total(b) @ v,
            lambda a, v: (a - bias).softmax(-1) @ v,
        ),
        (
            lambda a, v: (b := (a - v[..., :5]).exp()) / (total(b) + 1e-16) @ v,
            lambda a, v: (a - v[..., :5]).softmax(-1) @ v,
        ),
    ):
        ours, expected = (
            relevance(attention(f), normal(2, 5, 6), "attnlrp") for f in (spelled, plain)
        )
        torch.testing.assert_close(ours, expected)


# -- over groups ----------------------------------------------------------------------------------

SOURCE, TARGET = torch.tensor([[0, 1, 2, 2, 3, 0, 1], [1, 0, 1, 3, 2, 2, 3]])


def by_group(score: Tensor) -> Tensor:
    """A softmax over the edges into each node, one by one."""
    parts = [score[TARGET == node].softmax(0) for node in range(4)]
    order = torch.cat([(TARGET == node).nonzero()[:, 0] for node in range(4)])
    return torch.cat(parts)[order.argsort()]


def places(score: Tensor) -> Tensor:
    return TARGET[:, None].expand_as(score)


def largest(score: Tensor) -> Tensor:
    zeros = score.new_zeros(4, score.shape[1])
    found = zeros.scatter_reduce(0, places(score), score.detach(), "amax", include_self=False)
    return found.index_select(0, TARGET)


def zeros(score: Tensor) -> Tensor:
    return score.new_zeros(4, score.shape[1])


def edge_by_edge(s: Tensor) -> Tensor:
    e = s.exp()
    return torch.stack([e[i] / e[TARGET == to].sum(0) for i, to in enumerate(TARGET)])


def written_by_group(s: Tensor) -> Tensor:
    e, found = s.exp(), torch.zeros_like(s)
    for node in range(4):
        found[TARGET == node] = e[TARGET == node] / (e[TARGET == node].sum(0) + 1e-16)
    return found


def number_by_number(s: Tensor) -> Tensor:
    e, sums = s.exp(), dict.fromkeys(range(4), 0.0)
    for i, to in enumerate(TARGET.tolist()):
        sums[to] = sums[to] + e[i]
    return torch.stack([e[i] / sums[to] for i, to in enumerate(TARGET.tolist())])


def logarithm(s: Tensor, e: Tensor) -> Tensor:
    """Of the sums over the edges into each node."""
    return zeros(s).scatter_add(0, places(s), e).log()


def group_by_group(s: Tensor) -> Tensor:
    return torch.stack([s[TARGET == node].logsumexp(0) for node in range(4)])[TARGET]


def written_logarithms(s: Tensor) -> Tensor:
    found = torch.zeros_like(s)
    for node in range(4):
        found[TARGET == node] = s[TARGET == node].exp().sum(0).log()
    return found


GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "less logsumexp, group by group": lambda s: (s - group_by_group(s)).exp(),
    "less logarithms, written": lambda s: (s - written_logarithms(s)).exp(),
    "less a logarithm": lambda s: (s - logarithm(s, s.exp())[TARGET]).exp(),
    "less a logarithm, in range": lambda s: (
        (t := s - largest(s)) - logarithm(s, t.exp()).gather(0, places(s))
    ).exp(),
    "less logsumexp, the largest found twice": lambda s: (
        s - logarithm(s, (s - largest(s.detach())).exp())[TARGET] - largest(s)
    ).exp(),
    "less a logarithm by a matrix": lambda s: (
        s - F.one_hot(TARGET, 4).to(s) @ logarithm(s, s.exp())
    ).exp(),
    "times an exponential of a logarithm": lambda s: (
        s.exp() * (-logarithm(s, s.exp())).exp()[TARGET]
    ),
    "a power of two, less its logarithm": lambda s: torch.exp2(
        s / math.log(2) - (logarithm(s, s.exp()) / math.log(2))[TARGET]
    ),
    "scatter_add": lambda s: (
        (b := (s - largest(s)).exp()) / (zeros(s).scatter_add(0, places(s), b) + 1e-16)[TARGET]
    ),
    "index_add": lambda s: (
        (b := (s - s.max()).exp()) / zeros(s).index_add(0, TARGET, b).index_select(0, TARGET)
    ),
    "index_put": lambda s: (
        (b := s.exp()) / zeros(s).index_put((TARGET,), b, accumulate=True)[TARGET].clamp(min=1e-12)
    ),
    "scatter_reduce": lambda s: (
        (b := (s - largest(s)).exp())
        / zeros(s).scatter_reduce(0, places(s), b, "sum").gather(0, places(s))
    ),
    "edge by edge": edge_by_edge,
    "by group, written": written_by_group,
    "number by number": number_by_number,
    "a matrix of edges": lambda s: (
        (b := s.exp()) / ((hot := F.one_hot(TARGET, 4).to(s)) @ (hot.T @ b))
    ),
}


@functools.cache
def graph_attention(weights: Callable[[Tensor], Tensor], later: bool = False) -> nn.Module:
    torch.manual_seed(0)
    members = {"values": nn.Linear(4, 6).double(), "scores": nn.Linear(4, 2).double()}

    def forward(m: Apply, x: Tensor) -> Tensor:
        score = F.leaky_relu(m.scores(x)[SOURCE] + 2 * m.scores(x)[TARGET], 0.2)
        values = m.values(x).view(4, 2, 3)[SOURCE]
        nodes = x.new_zeros(4, 2, 3)
        if not later:
            return nodes.index_add(0, TARGET, weights(score)[..., None] * values).flatten(1)
        b = (score - score.detach().max()).exp()
        sums = zeros(score).index_add(0, TARGET, b) + 1e-16
        return (nodes.index_add(0, TARGET, b[..., None] * values) / sums[..., None]).flatten(1)

    return Apply(forward, **members)


@pytest.mark.parametrize("weights", [*GROUPS.values(), None], ids=[*GROUPS, "divided later"])
def test_a_softmax_over_groups_is_one_over_each(weights: Callable | None) -> None:
    x = normal(4, 4)
    model = graph_attention(weights or by_group, later=weights is None)
    for rules, ledger in (("attnlrp", False), ("cplrp", True), ("epsilon_plus", True)):
        expected = relevance(graph_attention(by_group), x, rules)
        torch.testing.assert_close(relevance(model, x, rules, ledger), expected)


# -- under a logarithm ----------------------------------------------------------------------------


def sums(z: Tensor) -> Tensor:
    return z.exp().sum(-1).log()


def means(z: Tensor) -> Tensor:
    return z.exp().mean(-1).log()


def weights(z: Tensor) -> Tensor:
    return z.softmax(-1).log()[..., 0]


LOGARITHMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "logsumexp": (lambda z: z.logsumexp(-1), sums),
    "live maximum": (lambda z: z.amax(-1) + (z - top(z)).exp().sum(-1).log(), sums),
    "one maximum": (lambda z: (total(e(z)).log() + top(z)).squeeze(-1), sums),
    "detached maximum of all": (
        lambda z: (z - (m := z.detach().max())).exp().sum(-1).log() + m,
        sums,
    ),
    "a number": (lambda z: (z - 5).exp().sum(-1).log() + 5, sums),
    "mean, live": (lambda z: z.amax(-1) + (z - top(z)).exp().mean(-1).log(), means),
    "mean, detached": (
        lambda z: top(z).detach()[..., 0] + (z - top(z).detach()).exp().mean(-1).log(),
        means,
    ),
    "mean, less log n": (
        lambda z: z.amax(-1) + (e(z).sum(-1).log() - math.log(4)),
        lambda z: z.exp().sum(-1).log() - math.log(4),
    ),
    "sharpened": (
        lambda z: z.amax(-1) + (3 * (z - top(z))).exp().mean(-1).log() / 3,
        lambda z: means(3 * z) / 3,
    ),
    "log_softmax": (lambda z: z.log_softmax(-1)[..., 0], weights),
    "log-softmax by hand": (lambda z: (z - total(z.exp()).log())[..., 0], weights),
    "log-softmax by hand, in range": (
        lambda z: ((t := z - top(z)) - total(t.exp()).log())[..., 0],
        weights,
    ),
    "log-softmax by logsumexp": (lambda z: (z - z.logsumexp(-1, keepdim=True))[..., 0], weights),
}


@pytest.mark.parametrize(("spelled", "plain"), LOGARITHMS.values(), ids=LOGARITHMS)
def test_what_is_subtracted_under_a_logarithm_and_added_again_takes_no_share(
    spelled: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    members = {"stem": nn.Linear(6, 4).double(), "head": nn.Linear(5, 2).double()}

    ours, other = (
        Apply(lambda m, x, f=f: m.head(f(m.stem(x))), **members) for f in (spelled, plain)
    )
    expected = relevance(other, normal(2, 5, 6), "attnlrp")
    assert expected.abs().max() > 1e-3
    for ledger in (True, False):
        torch.testing.assert_close(relevance(ours, normal(2, 5, 6), "attnlrp", ledger), expected)


def test_a_log_softmax_inside_is_as_exact_as_it_is() -> None:
    """The softmax itself is zero here, and its logarithm infinite."""
    z = torch.tensor([[0.0, 900.0, 2.0], [-900.0, 0.0, 1.0]], dtype=torch.float64)
    found = lrpfx.explain(Apply(lambda m, z: 2 * z.log_softmax(1)), z, 1, rules="attnlrp")
    torch.testing.assert_close(found.output, 2 * z.log_softmax(1))


def _biased(x: Tensor) -> Tensor:
    return torch.arange(x.shape[-1]) - torch.arange(x.shape[-2])[:, None]


def _windows(x: Tensor) -> Tensor:
    """As of shifted windows: what is left of the first filling is what counts for nothing."""
    part = x.new_zeros(x.shape[-1])
    part[1:] = 1
    apart = part[:, None] - part
    return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


#: Constants before a softmax that are no shifts of it: they stand in a factor, or vary in it.
NO_SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in a factor": lambda s: s * (s.square().mean() + 1),
    "in a factor of each": lambda s: s * (s.tanh() + 1),
    "subtracted in a factor": lambda s: s * (2 - s.tanh()),
    "in a masked factor": lambda s: s.masked_fill(s > 1, -30.0) * (s.square().mean() + 1),
    "one for a row, in a factor": lambda s: s * (s.tanh() - s.detach().amax(-1, keepdim=True)),
    "in a divisor": lambda s: s / (s.square() + 1),
    "a mask that is filled": lambda s: (s[None] + _windows(s)).flatten(0, 1),
    "integers that vary": lambda s: s - _biased(s),
}


@pytest.mark.parametrize("name", NO_SHIFTS)
def test_constants_that_a_softmax_depends_on_stay(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.v = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return (NO_SHIFTS[name](self.q(x) @ x.mT).softmax(-1) @ self.v(x)).sum(-1)

    model, x = Model().eval(), torch.randn(2, 3, 4, dtype=torch.float64)
    e = lrpfx.explain(model, x, torch.ones(2, 3).double(), rules=[("*", lrpfx.Gradient())])
    variable = x.clone().requires_grad_()
    model(variable).sum().backward()
    torch.testing.assert_close(e.output, model(x))
    if name != "in a divisor":  # which counts as a constant
        torch.testing.assert_close(e.relevance, variable.grad)
