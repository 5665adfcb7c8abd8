"""Relevance without a ledger is computed by shortcuts; its values are those of the plain form."""

import functools
from collections.abc import Callable, Container
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lrpfx
from lrpfx import composites
from lrpfx.ops import maps
from lrpfx.rewrite import fused, shortcuts
from lrpfx.rules.base import Carry
from lrpfx.rules.terms import AffineRule
from lrpfx.run import backward
from tests.conftest import Apply, Traces, traced_once
from tests.oracle import laws, zoo
from tests.rules.test_laws import cases

TOLERANCE = 1e-10


def error(explainer: lrpfx.Explainer, inputs: Any, target: Any, *, explicit: bool = True) -> float:
    """Largest difference of fast and explicit form from the plain one, relative to its largest.

    The explicit form is the fast one written down, which takes longer than all else: it is for one
    case of each kind.
    """

    def relevance(ledger: bool) -> list[Tensor]:
        leaves = pytree.tree_leaves(explainer(inputs, target, ledger=ledger).relevance)
        return [r.detach() for r in leaves if isinstance(r, Tensor)]

    plain, fast = relevance(ledger=True), relevance(ledger=False)
    if not explicit:
        return laws.relative(fast, plain)
    with mock.patch("torch.compile", lambda graph, **options: graph):
        explainer.compile()
        relevance(ledger=False)  # from now on by the explicit graphs
    return max(laws.relative(form, plain) for form in (fast, relevance(ledger=False)))


@given(case=cases())
def test_random_networks_under_random_rules(case: laws.Case) -> None:
    explainer = laws.explainer(case.network)
    assert error(explainer, laws.tensors(case.network), torch.from_numpy(case.seed)) < TOLERANCE


COMPOSITES = [
    "epsilon_all",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    composites.EpsilonGammaBox(-3, 3),
    "excitation_backprop",
    "guided_backprop",
    composites.EpsilonAll(0.0),
    composites.EpsilonAll(lrpfx.Stabilizer(1e-3, norm_scale=True)),
    composites.EpsilonPlus(zero_params="bias"),
]
#: With these every rule of all of them is in an explicit graph.
WRITTEN_DOWN = ["epsilon_plus_flat", "epsilon_alpha2_beta1", "guided_backprop", COMPOSITES[4]]


CONVOLUTIONAL = {
    "residual": zoo.residual,
    "mobilenet_v3_small": lambda: zoo.torchvision_model("mobilenet_v3_small"),
    "bottlenecks": zoo.bottlenecks,
}
TRACES: Traces = {}


def each_way(name: str, rules: Any, fast: Container[Any]) -> Any:
    """A case that runs in ``make nightly`` unless its rules are among the fast ones."""
    marks = [] if rules in fast else [pytest.mark.nightly]
    return pytest.param(name, rules, marks=marks, id=f"{name}-{str(rules)[:24]}")


@functools.cache
def convolutional(name: str) -> nn.Module:
    return CONVOLUTIONAL[name]()


def explainer_of(model: nn.Module, x: Tensor, rules: Any, **options: Any) -> lrpfx.Explainer:
    """An explainer; a model is traced once for all its rules."""
    with traced_once(TRACES):
        return lrpfx.Explainer(model, x, rules, **options)


@pytest.mark.parametrize(
    ("name", "rules"),
    [each_way("residual", rules, COMPOSITES) for rules in COMPOSITES]
    + [each_way("mobilenet_v3_small", rules, ()) for rules in COMPOSITES],
)
def test_convolutional_networks(name: str, rules: Any) -> None:
    x = zoo.images(2, 3, 32, 32)
    explicit = name == "residual" and rules in WRITTEN_DOWN
    explainer = explainer_of(convolutional(name), x, rules)
    assert error(explainer, x, [3, 4], explicit=explicit) < TOLERANCE


class Block(nn.Module):
    """A small transformer whose attention is given."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.norm = attend, nn.LayerNorm(8)
        self.qkv, self.out, self.gate = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = self.attend(q, k, v).transpose(1, 2).reshape(n, t, 8)
        x = x + self.out(a)
        x = x + F.gelu(self.gate(x)) * self.out(x)
        return self.head(x.mean(1))


def sdpa(**keywords: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **keywords)


BIAS = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def below(q: Tensor, by: int = 0) -> Tensor:
    """A causal mask as transformers makes it, of positions; ``by`` keys more are seen."""
    t = torch.arange(q.shape[-2])
    return (t[None, :] <= t[:, None] + by).expand(len(q), 1, -1, -1)


def masked(mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q), scale=0.7)


def as_bias(seen: Tensor, hidden: float = float("-inf")) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, hidden)


#: Masks made of sizes alone, and whether a causal kernel may stand for them.
MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "causal": (below, True),
    "one key more": (lambda q: below(q, 1), False),
    "causal bias": (lambda q: as_bias(below(q)), True),
    "least number": (lambda q: as_bias(below(q), torch.finfo(torch.float64).min), True),
    "finite bias": (lambda q: as_bias(below(q), -3.0), False),
    "first keys": (lambda q: torch.arange(q.shape[-2])[None] < 3, False),
    "windows": (lambda q: below(q) & ~below(q, -2), False),
}
KERNELS = {
    "plain": sdpa(),
    "causal": sdpa(is_causal=True),
    "bias": sdpa(attn_mask=BIAS),
    "mask": sdpa(attn_mask=BIAS > -0.5),
    "queries far below": sdpa(attn_mask=BIAS.masked_fill(torch.arange(5)[:, None] > 3, -1e9)),
    "far below, grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], attn_mask=torch.full_like(BIAS, -1e9), enable_gqa=True
    ),
    "row masked whole": sdpa(attn_mask=torch.arange(5)[:, None] > torch.arange(5)),
    "live bias": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ BIAS[:4]),
    "scale": sdpa(scale=0.3),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], enable_gqa=True
    ),
    "repeated": lambda q, k, v: F.scaled_dot_product_attention(
        q, *(t[:, :1, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
    ),
    "constant keys": lambda q, k, v: F.scaled_dot_product_attention(q, BIAS[:, :4].expand_as(k), v),
    "by hand": lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v,
    **{f"mask of sizes: {name}": masked(make) for name, (make, _) in MASKS.items()},
}


#: It divides by scores and outputs, so that nothing is fused.
DIVIDES = composites.AttnLRP(1e-6)
#: Kernels of which each is opened in another way: these are exported, and written down.
UNLIKE = ("plain", "causal", "live bias", "grouped", "by hand")
#: Masks whose sizes are open in an export.
OF_SIZES = ("mask of sizes: causal", "mask of sizes: one key more")


@functools.cache
def block(kernel: str) -> nn.Module:
    return Block(KERNELS[kernel])


@pytest.mark.parametrize(
    ("kernel", "rules"),
    [(kernel, "attnlrp") for kernel in KERNELS]
    + [
        each_way(kernel, rules, [rules] * (kernel in UNLIKE))
        for kernel in KERNELS
        for rules in ("cplrp", DIVIDES)
    ],
)
def test_attention(kernel: str, rules: Any) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = kernel in UNLIKE or kernel in OF_SIZES
    explainer = explainer_of(block(kernel), x, rules, capture="export" if whole else "record")
    explicit = kernel in UNLIKE and rules != "cplrp"
    assert error(explainer, x, [0, 2], explicit=explicit) < TOLERANCE


def test_attention_is_fused_only_where_its_parts_cancel() -> None:
    model, x = block("plain"), torch.randn(2, 5, 8, dtype=torch.float64)
    for rules, whole in [("attnlrp", True), ("cplrp", True), ("epsilon_all", False)]:
        explainer = explainer_of(model, x, rules)
        module = explainer._engine.graphs.for_calls((), fast=True)[0]
        assert ("aten.scaled_dot_product_attention" in module.code) is whole
        assert "aten.scaled_dot_product_attention" not in explainer.graph_module.code


@pytest.mark.parametrize("enabled", [True, False])
def test_autograd_is_on_only_for_ops_that_are_their_own_rule(enabled: bool) -> None:
    model, x = Block(sdpa()), torch.randn(2, 5, 8, dtype=torch.float64)
    model.requires_grad_(True)
    module, _ = lrpfx.Explainer(model, x, "attnlrp")._engine.graphs.for_calls((), fast=True)
    with torch.set_grad_enabled(enabled):
        clean, explained, _, starts, *_ = module(x, None)
        assert torch.is_grad_enabled() is enabled
    assert not any(t.requires_grad for t in (*clean, *explained))
    assert all(t.requires_grad for t in starts)


@pytest.mark.parametrize(("make", "causal"), MASKS.values(), ids=MASKS)
def test_masks_that_are_causal_are_left_to_the_kernel(
    make: Callable[[Tensor], Tensor], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def asked(*args: Any) -> fused.Mask:
        found.append(fused.mask_for_kernel(*args))
        return found[-1]

    monkeypatch.setattr(shortcuts, "mask_for_kernel", asked)
    model, x = Block(masked(make)), torch.randn(2, 5, 8, dtype=torch.float64)
    lrpfx.explain(model, x, 0, rules="attnlrp", ledger=False)
    (mask,) = found
    assert (mask.added is None) is causal


def test_the_mask_of_a_single_token_is_for_all_queries() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert fused.mask_for_kernel(mask, torch.float64, True).added is not None


def test_no_attention_weights_are_kept() -> None:
    """What is saved for the backward pass has no two dimensions of the number of tokens."""
    model, x = Block(sdpa()), torch.randn(1, 37, 8, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, "attnlrp")
    square: dict[bool, bool] = {}
    for fast in (False, True):
        module, shapes = explainer._engine.graphs.for_calls((), fast=fast)[0], []

        def keep(t: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(t.shape)
            return t

        with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            module(x, None)
        square[fast] = any(list(shape).count(37) > 1 for shape in shapes)
    assert square == {False: True, True: False}


def test_batch_norm_of_a_slice_whose_gradient_comes_in_another_order() -> None:
    """PyTorch's own backward of it is wrong: it takes the gradient's strides for the input's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(2, 6, 1), nn.BatchNorm2d(4)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.data.uniform_(0.5, 2)
            self.head = nn.Linear(4, 3)
            self.double().eval()

        def forward(self, x: Tensor) -> Tensor:
            part = self.norm(self.conv(x).split([2, 4], 1)[1])
            return self.head(part.flatten(2).transpose(1, 2)).square().mean(1)

    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert error(lrpfx.Explainer(Model(), x, composites.EpsilonAll(0.0)), x, 1) < TOLERANCE


@pytest.mark.parametrize(
    "f", [torch.sigmoid, F.softplus, torch.exp, torch.cos, lambda x: (1 + x) * torch.sigmoid(x)]
)
def test_zeros_of_what_does_not_vanish_keep_their_relevance(f: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(f(self.fc(x) * 0.0) + x)

    x = torch.randn(2, 3, dtype=torch.float64)
    explainer = lrpfx.Explainer(Model(), x, "epsilon_all", capture="record")
    assert error(explainer, x, 1, explicit=f is torch.exp) < TOLERANCE


@pytest.mark.parametrize(
    "f", [F.gelu, F.silu, torch.tanh, F.elu, lambda x: x * torch.sigmoid(1.7 * x)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_multipliers_pass_where_an_activation_is_exactly_zero(
    f: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    first, last = torch.tensor([[1.0, -1, 2, -2], [1, 2, 3, 4]]), torch.tensor([[1.0, -1], [2, 3]])
    model = Apply(lambda m, x: f(x @ first.T.to(x)) @ last.T.to(x))
    x = torch.tensor([[1.0, 1, 1, 1]])
    exact = lrpfx.explain(model, x.to(dtype), 0, rules="attnlrp", ledger=False).relevance
    beside = x.double() + torch.tensor([1e-9, 0, 0, 0])
    limit = lrpfx.explain(model, beside, 0, rules="attnlrp").relevance
    torch.testing.assert_close(exact.double(), limit, rtol=1e-6, atol=1e-6)


def test_a_root_hands_on_nothing_where_it_is_zero() -> None:
    first = torch.tensor([[1.0, -1], [1.0, 2]])
    x = torch.tensor([[1.0, 1]])
    maps = [
        lrpfx.explain(Apply(model), x, 0, rules="attnlrp", ledger=False).relevance
        for model in (
            lambda m, x: (x @ first.T).sqrt().sum(1, keepdim=True),
            lambda m, x: (x @ first[1:].T).sqrt().sum(1, keepdim=True),
        )
    ]
    torch.testing.assert_close(*maps)


def test_layers_are_the_same() -> None:
    x = zoo.images(2, 3, 32, 32)
    explainer = explainer_of(convolutional("residual"), x, "epsilon_plus")
    plain, fast = (explainer(x, 1, layers=["layer*"], ledger=ledger) for ledger in (True, False))
    for path, layer in plain.layers.items():
        for a, b in zip(layer, fast.layers[path], strict=True):
            assert laws.relative([b.relevance], [a.relevance]) < TOLERANCE
            torch.testing.assert_close(b.activation, a.activation)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rule", "number"),
    [(lrpfx.ZBox(-3, 3), 3), (lrpfx.ZPlus(), 3), (lrpfx.AlphaBeta(2, 1), 4), (lrpfx.Flat(), 3)],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 30])
def test_parts_of_few_channels_go_through_one_convolution(
    rule: lrpfx.Rule, number: int, channels: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 5, 3, 2, 1), nn.Flatten(), nn.Linear(80, 2)).double()
    x = zoo.images(2, channels, 8, 8)
    explainer = lrpfx.Explainer(model, x, [("conv", rule)])
    with Convolutions() as found:
        explainer(x, 1, ledger=False)
    assert (found.number == number) is (channels == 3 or isinstance(rule, lrpfx.Flat))
    assert error(explainer, x, 1, explicit=channels == 3) < TOLERANCE


@pytest.mark.parametrize("read", ["returned", "added", "of a layer"])
def test_what_is_read_before_a_relu_is_not_written_over(read: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, 2)
            self.double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.conv(x)
            y = z.relu() + z.mean() if read == "added" else z.relu()
            return self.head(y.mean((2, 3))), z if read == "returned" else y

    model, x = Model(), zoo.images(2, 2, 5, 5)
    expected = model(x)
    layers = ["conv"] * (read == "of a layer")
    explainer = lrpfx.Explainer(model, x, "epsilon_plus", capture="record")
    plain, fast = (explainer(x, 1, layers=layers, ledger=ledger) for ledger in (True, False))
    assert laws.relative([fast.relevance], [plain.relevance.detach()]) < TOLERANCE
    torch.testing.assert_close(fast.output, expected)
    if layers:
        torch.testing.assert_close(fast.layers["conv"].activation, model.conv(x))


@pytest.mark.parametrize("rule", [lrpfx.ZPlus(), lrpfx.AlphaBeta(), lrpfx.Gamma()], ids=str)
def test_weights_that_inputs_make_are_not_frozen(rule: lrpfx.Rule) -> None:
    """A graph network: the matrix comes with the inputs, and parts of it are no constants."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.head((edges.to(x.dtype) - 0.5) @ self.lift(x).relu()).mean(1)

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    graphs = [dict(x=x, edges=torch.rand(2, 5, 5) > 0.5) for _ in range(3)]
    explainer = explainer_of(model, graphs[0], [("*", rule)], freeze=True)
    assert error(explainer, graphs[0], 1) < TOLERANCE
    for inputs in graphs[1:]:  # by the explicit graphs of the first
        assert error(explainer, inputs, 1, explicit=False) < TOLERANCE
    explainer = explainer_of(model, graphs[0], [("*", rule)], freeze=True)
    for inputs in graphs:
        assert error(explainer, inputs, 1, explicit=False) < TOLERANCE


def test_a_sum_is_written_over_the_summand_that_nothing_else_reads() -> None:
    for rules in ("epsilon_all", "epsilon_plus"):
        x = zoo.images(2, 3, 32, 32)
        explainer = explainer_of(convolutional("residual"), x, rules, freeze=True)
        for layers, number in [((), 0), (("layer1.0.conv2",), 1)]:
            code = explainer._engine.graphs.for_calls(layers, fast=True)[0].code
            assert code.count("add_to(") == 4 - number
            assert code.count("aten.add.Tensor(") == number


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_of_single_pixels_is_transposed_as_a_product(dims: int, stride: int) -> None:
    make = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    weight = torch.randn(4, 3, *dims * [1], dtype=torch.float64)
    args = dict(weight=weight, stride=stride, padding=0, dilation=1, groups=1)
    f = maps.convolution(args, ["input"], make)
    for size in range(1, 9):
        x = torch.randn(2, 3, size, *(size + 1, size + 3)[: dims - 1], dtype=torch.float64)
        z, pull = torch.func.vjp(lambda t: make(t, weight, stride=stride), x)
        s = torch.randn_like(z)
        torch.testing.assert_close(f.T(s, (x,)), pull(s))


def test_a_relu_is_written_over_what_nothing_else_reads() -> None:
    x = zoo.images(2, 3, 32, 32)
    explainer = explainer_of(convolutional("residual"), x, "epsilon_plus")
    code = explainer._engine.graphs.for_calls((), fast=True)[0].code
    assert code.count("aten.relu_.default") == 9 and "aten.relu.default" not in code
    assert "aten.relu_." not in explainer.graph_module.code


def test_the_report_says_that_there_is_no_ledger() -> None:
    e = lrpfx.explain(zoo.residual(), zoo.images(1, 3, 32, 32), 1, ledger=False)
    assert not e.report.has_ledger and "ledger" in repr(e.report)
    torch.testing.assert_close(e.absorbed, e.seed.sum(1) - e.relevance.sum((1, 2, 3)))
    with pytest.raises(lrpfx.errors.InputError, match="ledger=True"):
        e.report.leaks()


def test_relevance_that_is_not_finite_is_traced_to_its_node() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sum(1, keepdim=True) - x.sum(1, keepdim=True).detach()) + 1e-300 * x

    x = torch.full((1, 2), 1e300, dtype=torch.float64)
    rules = [("*", lrpfx.Norm(lambda z: z * 1e-300))]
    for ledger in (True, False):
        with pytest.raises(lrpfx.errors.NonFiniteError, match="first at"):
            lrpfx.explain(Model(), x, 0, rules=rules, ledger=ledger)


@pytest.mark.parametrize("part", ["multiplier", "denominator", "share"])
def test_a_wrong_shortcut_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: each shortcut is broken by a thousandth."""
    if part == "multiplier":
        right = AffineRule.multiply

        def wrong(self: Any, call: Any, x: Any, z: Any, m: Any, carry: Carry) -> Any:
            return tuple(1.001 * c for c in right(self, call, x, z, m, carry))

        monkeypatch.setattr(AffineRule, "multiply", wrong)
    elif part == "share":
        monkeypatch.setattr(lrpfx.Gradient, "gradient_shares", lambda self, site: (1.001,))
    else:
        terms = lrpfx.AlphaBeta.terms

        def off(self: Any, x: Any, f: Any, z: Any) -> Any:
            found = terms(self, x, f, z)
            return [t if t.stable is None else t._replace(stable=1.001 * t.stable) for t in found]

        monkeypatch.setattr(lrpfx.AlphaBeta, "terms", off)
    x = zoo.images(2, 3, 32, 32)
    explainer = explainer_of(convolutional("residual"), x, "epsilon_alpha2_beta1")
    assert error(explainer, x, 1, explicit=False) > 1e-4


BATCHED = [
    *[("residual", rules) for rules in (*COMPOSITES[:5], "epsilon_alpha2_beta1_flat")],
    ("bottlenecks", "epsilon_plus"),  # convolutions of one pixel
    ("bottlenecks", "epsilon_alpha2_beta1"),
    *[("attention", rules) for rules in ("attnlrp", "cplrp", "epsilon_all")],
]


@pytest.mark.parametrize(("name", "rules"), BATCHED, ids=lambda value: str(value)[:24])
def test_several_targets_go_through_the_backward_pass_together(
    name: str, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no batches is pulled back one by one, with the same values and in more time."""
    if name == "attention":
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        explainer = explainer_of(block("mask of sizes: causal"), x, rules)
    else:
        x = zoo.images(2, 3, 32, 32)
        explainer = explainer_of(convolutional(name), x, rules)
    alone = [explainer(x, target).relevance.detach() for target in (0, 2)]
    monkeypatch.setattr(backward, "_pull", None)
    together = explainer(x, [[0, 2]] * 2).relevance
    assert laws.relative([*together], alone) < TOLERANCE


# Parameters promised constant --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rules"), [each_way("residual", rules, WRITTEN_DOWN) for rules in COMPOSITES]
)
def test_a_frozen_explainer_gives_the_same_again_and_again(name: str, rules: Any) -> None:
    model, x = convolutional(name), zoo.images(2, 3, 32, 32)
    frozen = explainer_of(model, x, rules, freeze=True)
    expected = explainer_of(model, x, rules)(x, 1).relevance
    for _ in range(2):
        got = frozen(x, 1, ledger=False).relevance
        assert laws.relative([got], [expected.detach()]) < TOLERANCE
    assert "batch_norm" not in frozen._engine.graphs.for_calls((), fast=True)[0].code
    assert "rsqrt" not in frozen._engine.graphs.for_calls((), fast=True)[0].code


def test_a_frozen_explainer_sees_that_parameters_have_changed() -> None:
    model, x = zoo.residual(), zoo.images(1, 3, 32, 32)
    frozen = lrpfx.Explainer(model, x, "epsilon_plus", freeze=True)
    frozen(x, 1, ledger=False)
    with torch.no_grad():
        model.fc.bias.add_(1.0)
    with pytest.raises(lrpfx.errors.CaptureError, match=r"promised to stay[\s\S]*fc\.bias"):
        frozen(x, 1, ledger=False)


# Networks that shortcuts went wrong on ------------------------------------------------------------


class Attends(nn.Module):
    """Queries, keys and values that are also each other, or read beside the attention."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 2))
        self.attend = attend
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(self.q(x), self.k(x), self.v(x)).mean(1))


def of_two_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k[:, None, None].expand(-1, 1, 2, -1, -1).reshape(-1, 2, *k.shape[1:])
    return F.scaled_dot_product_attention(q[:, None].expand(-1, 2, -1, -1), k, k * 1).sum(1)


SHARED = {
    "value is key": lambda q, k, v: F.scaled_dot_product_attention(q, k, k),
    "value is query": lambda q, k, v: F.scaled_dot_product_attention(q, k, q),
    "key read elsewhere": lambda q, k, v: F.scaled_dot_product_attention(q, k, v) + k,
    "query read elsewhere": lambda q, k, v: q + F.scaled_dot_product_attention(q, k, v),
    "heads of one": of_two_heads,
    "value an inverse": lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, (y := 1 / (2 + v * v))) + y
    ),
    "key an inverse": lambda q, k, v: F.scaled_dot_product_attention(q, 1 / (2 + k * k), v),
}


@pytest.mark.parametrize("rules", ["cplrp", "attnlrp"])
@pytest.mark.parametrize("shared", SHARED)
def test_what_is_stopped_as_a_query_is_stopped_as_one_only(shared: str, rules: str) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    capture = "export" if shared == "value is key" else "record"
    explainer = lrpfx.Explainer(Attends(SHARED[shared]), x, rules, capture=capture)
    explicit = rules == "cplrp" and shared in ("value is key", "heads of one")
    assert error(explainer, x, [0, 1], explicit=explicit) < TOLERANCE


def test_a_query_may_be_broadcast_over_heads() -> None:
    class Broadcast(nn.Module):
        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            k = kv[:, :, None].expand(-1, -1, 2, -1, -1).reshape(-1, 4, *kv.shape[2:])
            return F.scaled_dot_product_attention(q, k, k).mean((1, 2))

    inputs = torch.randn(2, 1, 5, 3), torch.randn(2, 2, 5, 3)
    e = lrpfx.explain(Broadcast(), inputs, 0, rules="attnlrp", ledger=False)
    torch.testing.assert_close(e.output, Broadcast()(*inputs))


class Summed(nn.Module):
    """A sum of two linear layers between ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x).relu()
        return self.head((self.b(z) + z).relu())


SCALED = lrpfx.Stabilizer(1e-2, norm_scale=True)


@pytest.mark.parametrize(
    "entry",
    [
        ("*", lrpfx.Epsilon(1e-6, zero_params="bias")),
        ("sum", lrpfx.Norm(1e-6, zero_params="bias")),
        ("sum", lrpfx.Epsilon(SCALED)),
        ("linear", lrpfx.Gamma(0.25, zero_params="bias")),
        ("linear", lrpfx.Gamma(0.25, zero_params="weight")),
        ("linear", lrpfx.Gamma(0.25, SCALED)),
        ("linear", lrpfx.AlphaBeta(2, 1, SCALED)),
    ],
    ids=str,
)
def test_rules_with_odd_denominators(entry: Any) -> None:
    model, x = Summed(), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        model.b.bias += 0.5
    assert error(lrpfx.Explainer(model, x, [entry], capture="record"), x, 1) < TOLERANCE


def test_a_recovered_summand_is_no_denominator_where_nothing_arrives() -> None:
    """Of integers: there z is -b, and -b - d may be zero."""

    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.p, self.h = (nn.Linear(2, n, bias=False) for n in (2, 2, 1))
            with torch.no_grad():
                self.c.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
                self.p.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
                self.h.weight.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.h(F.relu(self.c(x) + self.p(x)))

    x = torch.ones(1, 2)
    rules = [("c", lrpfx.AlphaBeta(2, 1, 1.0)), ("p", lrpfx.Epsilon(1e-6))]
    explainer = lrpfx.Explainer(Integers(), x, rules)
    plain, fast = (explainer(x, ledger=ledger).relevance for ledger in (True, False))
    torch.testing.assert_close(fast, plain)


def test_it_is_told_where_fast_relevance_is_not_finite_and_the_plain_form_is() -> None:
    """Scores of -infinity times a live factor: fast, 0 times infinity."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(3, 3).triu(1).bool()
            scores = (self.q(x) @ x.mT).masked_fill(hidden, -torch.inf)
            scores = scores * (x.square().mean((1, 2), keepdim=True) + 1)
            return (scores.softmax(-1) @ self.v(x)).sum(1)

    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 3, 4, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x)
    plain, fast = (explainer(x, 1, ledger=ledger) for ledger in (True, False))
    torch.testing.assert_close(fast.relevance, plain.relevance)
    assert any("the fast one is not finite" in note for note in fast.report.notes)
    assert not any("the fast one is not finite" in note for note in plain.report.notes)
