"""Each pass keeps what the graph computes, and does what its first line says."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lrpfx
from lrpfx.canonize import passes
from lrpfx.canonize.writes import functionalize, memory, unlifted
from lrpfx.capture.front import capture
from lrpfx.ops.graph import used_nodes, verify
from tests.conftest import Apply
from tests.oracle.models import NIGHTLY

pytestmark = pytest.mark.usefixtures("each_way")

aten = torch.ops.aten


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module.double().eval()


class Plain(nn.Module):
    """A function of the input as a module."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def targets(module: fx.GraphModule) -> list[object]:
    """Ops that the output depends on, in order of execution."""
    used = used_nodes(module.graph)
    return [n.target for n in module.graph.nodes if n.op == "call_function" and n in used]


def canonical(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return passes.canonize(capture(model, x, by="export" if NIGHTLY else "record").program)


# Every pass keeps the value -----------------------------------------------------------------------


class Everything(nn.Module):
    """Has work for every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.mean() + 2
        y = self.drop(self.norm(self.conv(x)).relu_()) * scale
        y[:, :2] = y[:, 2:] + 1
        return y.contiguous().view(y.shape[0], -1)


def test_every_pass_keeps_what_the_graph_computes() -> None:
    model, x = randomized(Everything()), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    expected = model(x)
    program = capture(model, x).program
    module = functionalize(program, unlifted(program))
    for step in (None, *passes.PASSES):
        module = module if step is None else step(module)
        verify(module.graph)
        module.recompile()
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert aten.batch_norm.default not in targets(module)
    writes = [n for n in module.graph.nodes if memory.writes(n)]
    assert writes == []


# In-place ops ------------------------------------------------------------------------------------


def _overlap(x: Tensor) -> Tensor:
    y = x * 2
    z = y[:, 0]
    z += 1  # seen through y
    return y.sum(-1)


def _after(x: Tensor) -> Tensor:
    y = x * 2
    z = F.relu(y)
    y.add_(1)  # z keeps its own value
    return z + y


def _masked(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 1:3] = 0
    y[..., ::2] *= 3
    return y


def _copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2].copy_(x[:, 2:])
    return y + x


def _own_input(x: Tensor) -> Tensor:
    return x.mul_(2).add_(1)


INPLACE = {
    "relu_": lambda x: (x * 2).relu_() + x,
    "add_ chain": lambda x: (x * 2).add_(x).mul_(3).sub_(1),
    "seen through a view": _overlap,
    "read before and after": _after,
    "slices": _masked,
    "copy_ into zeros": _copied,
    "the input itself": _own_input,
    "functional after in-place": lambda x: F.relu((x + 0).clamp_(max=1), inplace=True) + x,
}


@pytest.mark.parametrize("fn", INPLACE.values(), ids=INPLACE)
def test_in_place_ops_become_functional(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    given = x.clone()
    module = canonical(Plain(fn), x)
    assert not any(memory.writes(n) for n in module.graph.nodes)
    torch.testing.assert_close(module(x), fn(given.clone()))
    assert torch.equal(x, given), "the user's input was written to"


def test_in_place_type_promotion_is_kept() -> None:
    """``int_.add_(float)`` has the dtype of its left side, unlike ``int_ + float``."""
    x = torch.randn(3, 4)
    module = canonical(Plain(lambda x: x.half().add_(x) * 2.0), x)
    assert module(x).dtype == torch.float16


# Names and parts ---------------------------------------------------------------------------------

CONSTANT = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MUL, ADD, MATMUL = aten.mul.Tensor, aten.add.Tensor, aten.matmul.default
PICK = operator.getitem
OPENED: dict[str, tuple[Callable[[Tensor], Tensor], list[object]]] = {
    "multiply": (lambda x: torch.multiply(x, 2.0), [MUL]),
    "true_divide": (lambda x: torch.true_divide(x, 2.0), [aten.div.Tensor]),
    "clip": (lambda x: x.clip(0, 2), [aten.clamp.default]),
    "positive": (lambda x: +x * 2, [MUL]),
    "glu": (F.glu, [aten.chunk.default, PICK, PICK, aten.sigmoid.default, MUL]),
    "lerp": (lambda x: torch.lerp(x, x.relu(), 0.3), [aten.relu.default, MUL, MUL, ADD]),
    "addcmul": (lambda x: torch.addcmul(x, x, CONSTANT[0]), [MUL, ADD]),
    "addcdiv": (
        lambda x: torch.addcdiv(x, x, CONSTANT[0], value=2.0),
        [aten.div.Tensor, MUL, ADD],
    ),
    "addmm": (lambda x: torch.addmm(x, x, CONSTANT, beta=2), [MATMUL, MUL, ADD]),
    "addmm with a constant summand": (
        lambda x: torch.addmm(CONSTANT[0], x, CONSTANT),
        [aten.addmm.default],
    ),
    "outer": (lambda x: torch.outer(x[0], x[1]), [aten.unsqueeze.default, MUL]),
    "index_put": (
        lambda x: x.index_put((torch.tensor([0, 0]),), x[:2]),
        [aten.slice.Tensor, aten.index_put.default],
    ),
    "index_put with accumulate": (
        lambda x: x.index_put((torch.tensor([0, 0]),), x[:2], accumulate=True),
        [aten.slice.Tensor, aten._unsafe_index_put.default],
    ),
    "einsum of live tensors": (
        lambda x: torch.einsum("ni,ni->n", x, x.relu()),
        [aten.relu.default, aten.einsum.default],
    ),
    "einsum of three": (
        lambda x: torch.einsum("ni,ij,nj->n", x, CONSTANT, x),
        [aten.einsum.default],
    ),
}


@pytest.mark.parametrize(("fn", "parts"), OPENED.values(), ids=OPENED)
def test_every_op_has_one_name_and_fused_arithmetic_is_opened(
    fn: Callable[[Tensor], Tensor], parts: list[object]
) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    module = canonical(Plain(fn), x)
    of_literals = (aten.lift_fresh_copy.default, aten.detach.default, aten.select.int)
    assert [t for t in targets(module) if t not in of_literals] == parts
    torch.testing.assert_close(module(x), fn(x), rtol=1e-12, atol=1e-12)


EINSUMS = ["ni,io->no", "oi,ni->no", "ni,i->n", "i,ni->n", "ni,iop->pno", "ni,ni->n"]


@pytest.mark.parametrize("equation", [*EINSUMS, "nab,abo->on", "nab,bao->no", "nab,aob->nao"])
def test_an_einsum_with_a_constant_is_a_linear_layer(equation: str) -> None:
    sizes = dict(n=3, i=4, o=5, p=2, a=2, b=3)
    a, b = (
        torch.randn([sizes[c] for c in term], dtype=torch.float64)
        for term in equation.split("->")[0].split(",")
    )
    left = "n" in equation.split(",")[0]
    x, w = (a, b) if left else (b, a)
    model = Plain(lambda x: torch.einsum(equation, *((x, w) if left else (w, x))))
    module = canonical(model, x)
    assert aten.einsum.default not in targets(module)
    torch.testing.assert_close(module(x), model(x), rtol=1e-12, atol=1e-12)
    assert "linear" in {row.kind for row in lrpfx.Explainer(model, x, "epsilon_all").report.rows}


@pytest.mark.parametrize("ledger", [True, False])
def test_a_stabilizer_sees_the_output_of_an_einsum_as_it_is(ledger: bool) -> None:
    x, w = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    scaled = lrpfx.Epsilon(lrpfx.Stabilizer(0.1, norm_scale=True))
    seed = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    got, expected = (
        lrpfx.explain(Plain(fn), x, seed, rules=[("*", scaled)], ledger=ledger)
        for fn in (
            lambda x: torch.einsum("oc,nchw->nohw", w, x),
            lambda x: F.conv2d(x, w[:, :, None, None]),
        )
    )
    torch.testing.assert_close(got.relevance, expected.relevance, rtol=1e-12, atol=1e-12)


# No-ops, detach, regions -------------------------------------------------------------------------


def test_noops_are_dropped() -> None:
    model = Plain(lambda x: F.dropout(x, training=False).contiguous().clone().double() * 2)
    assert targets(canonical(model, torch.randn(2, 3).double())) == [aten.mul.Tensor]


def test_slices_of_everything_are_dropped() -> None:
    model = Plain(lambda x: x[:, 0:][:, :3][:, :7] * 2)
    assert targets(canonical(model, torch.randn(2, 3))) == [aten.mul.Tensor]


def test_a_slice_that_is_all_of_small_batches_is_kept() -> None:
    small, large = torch.randn(2, 3), torch.randn(5, 3)
    model = Plain(lambda x: x[-4:] * 2)
    assert aten.slice.Tensor in targets(canonical(model, small))
    explainer = lrpfx.Explainer(model, small, "epsilon_all")
    for ledger in (True, False):
        got = explainer(large, torch.ones(4, 3), ledger=ledger)
        torch.testing.assert_close(got.output, model(large))
        assert got.relevance.count_nonzero(1).tolist() == [0, 3, 3, 3, 3]


@pytest.mark.parametrize("fn", [lambda x: x[:4] * 2, lambda x: x[: x.shape[1]] * 2])
def test_what_torch_export_leaves_out_for_small_batches_is_right_or_refused(fn: Callable) -> None:
    model, large = Plain(fn), torch.randn(5, 3)
    explainer = lrpfx.Explainer(model, torch.randn(2, 3))
    try:
        output = explainer(large, lambda out: out.sum()).output
    except lrpfx.errors.InputError:  # of another batch size, or captured for this one only
        return
    torch.testing.assert_close(output, model(large))


def test_relevance_ends_at_detach_and_no_grad() -> None:
    """What is detached is a constant: x * detach(g(x)) is a scale, not a product."""

    def detached(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x).detach()

    def no_grad(x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return x * gate

    x, seed = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    rules = lrpfx.composites.EpsilonAll(epsilon=1e-12)

    def beside_a_write(x: Tensor) -> Tensor:
        y = x * 1
        y[:, :2] += 0 * y[:, 2:]  # PyTorch's functionalisation forgets where no_grad began
        with torch.no_grad():
            gate = torch.sigmoid(x.flip(0))
        return y * gate

    e = lrpfx.explain(Plain(beside_a_write), torch.randn(3, 4).double(), 0)
    assert "product" not in {row.kind for row in e.report.rows}
    for fn in (detached, no_grad):
        e = lrpfx.explain(Plain(fn), x, seed, rules=rules)
        assert [row.kind for row in e.report.rows] == ["scale"]
        torch.testing.assert_close(e.relevance, seed, rtol=1e-9, atol=1e-9)


def test_autocast_inside_forward_is_captured() -> None:
    linear = nn.Linear(4, 3)

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
        return y.float()

    x = torch.randn(2, 4)
    e = lrpfx.explain(Plain(cast), x, 1)
    assert e.relevance.dtype == torch.float32
    assert "linear" in {row.kind for row in e.report.rows}


# Batch norm ---------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two modules in a row; ``again`` also returns what lies between them."""

    def __init__(self, first: nn.Module, second: nn.Module, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = first, second, again

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        y = self.second(a)
        return torch.cat([y.flatten(1), a.flatten(1)], 1) if self.again else y.flatten(1)


FOLDED = {
    "conv1d": (nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), (2, 6)),
    "conv2d": (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), (2, 5, 5)),
    "conv2d same": (nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), (2, 5, 5)),
    "conv2d without bias": (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 5, 5)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 5, 5)),
    "conv2d circular": (
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4),
        (2, 5, 5),
    ),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 3, 3, 3)),
    "conv_transpose1d": (nn.ConvTranspose1d(2, 4, 3), nn.BatchNorm1d(4), (2, 6)),
    "conv_transpose2d grouped": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6),
        (4, 4, 4),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4), (2, 3, 3, 3)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (5,)),
    "without affine": (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 5, 5)),
    "through dropout": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout()),
        nn.BatchNorm2d(4),
        (2, 5, 5),
    ),
    "before conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "before conv1d": (nn.BatchNorm1d(4), nn.Conv1d(4, 3, 3, bias=False), (4, 6)),
    "before linear": (nn.BatchNorm1d(5), nn.Linear(5, 4), (5,)),
    "weight norm": (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
        nn.BatchNorm2d(4),
        (2, 5, 5),
    ),
}

KEPT = {
    "before zero padding": (nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1), (4, 5, 5)),
    "before transposed": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 3), (4, 5, 5)),
    "channels are not the features": (nn.Linear(6, 5), nn.BatchNorm1d(4), (4, 6)),
    "a nonlinearity between": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()),
        nn.BatchNorm2d(4),
        (2, 5, 5),
    ),
}


@pytest.mark.parametrize(("first", "second", "shape"), FOLDED.values(), ids=FOLDED)
def test_batch_norm_is_folded_exactly(
    first: nn.Module, second: nn.Module, shape: tuple[int, ...]
) -> None:
    model = randomized(Pair(first, second))
    x = torch.randn(3, *shape, dtype=torch.float64)
    module = canonical(model, x)
    assert aten.batch_norm.default not in targets(module)
    torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "second", "shape"), KEPT.values(), ids=KEPT)
def test_batch_norm_that_cannot_be_folded_is_kept_as_an_affine_op(
    first: nn.Module, second: nn.Module, shape: tuple[int, ...]
) -> None:
    model = randomized(Pair(first, second))
    x = torch.randn(3, *shape, dtype=torch.float64)
    module = canonical(model, x)
    assert aten.batch_norm.default in targets(module)
    torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)
    report = lrpfx.explain(model, x, 0).report
    rule = "Pass" if isinstance(first, nn.BatchNorm2d) else "Norm"  # of the input itself
    assert {row.rule for row in report.rows if row.kind == "batch_norm"} == {rule}


def test_batch_norm_is_kept_where_the_layers_own_output_is_used_too() -> None:
    model = randomized(Pair(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), again=True))
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    module = canonical(model, x)
    assert aten.batch_norm.default in targets(module)
    torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)


def test_batch_norm_is_not_folded_into_a_convolution_of_a_lone_sample() -> None:
    """Its second dimension, whose batch norm it is, is the length and not the channels."""
    conv, norm = nn.Conv1d(3, 4, 2).double(), nn.BatchNorm1d(4).double().eval()
    model = Apply(lambda m, x: norm(conv(x)))
    x = torch.randn(3, 5, dtype=torch.float64)
    explanation = lrpfx.explain(model, x, torch.randn(4, 4, dtype=torch.float64))
    torch.testing.assert_close(explanation.output, model(x))
    assert [row.kind for row in explanation.report.rows] == ["conv", "batch_norm"]


def test_halves_of_a_size_that_varies() -> None:
    model = Apply(lambda m, x: F.glu(x, 1).mean(1))
    explainer = lrpfx.Explainer(model, torch.randn(2, 6, 3), dynamic=(1,))
    x = torch.randn(3, 8, 3)
    torch.testing.assert_close(explainer(x, 0).output, model(x))


def test_the_folded_weight_is_computed_from_live_parameters() -> None:
    """Gradients reach the real parameters, and a change of statistics is seen."""
    model = randomized(Pair(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    module = canonical(model, x)
    module(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for mine, plain in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, plain.grad, rtol=1e-9, atol=1e-9)
    model.second.running_mean.add_(1.0)
    torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.BatchNorm2d(2), "statistics of the batch"),
        (nn.Dropout2d(), "random"),
        (nn.RReLU(), "random"),
        (nn.BatchNorm2d(2, track_running_stats=False).eval(), "no running statistics"),
    ],
    ids=["batch norm", "dropout", "rrelu", "no running statistics"],
)
def test_batch_dependent_layers_are_refused(layer: nn.Module, why: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), layer, nn.Flatten())
    with pytest.raises(lrpfx.errors.TrainingModeError, match=why):
        lrpfx.explain(model, torch.randn(2, 2, 5, 5))


class Standardised(nn.Conv2d):
    """Weights standardised by a batch norm of training mode, as in normaliser-free networks."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_weights_standardised_by_batch_norm_are_no_training_mode() -> None:
    model = randomized(nn.Sequential(Standardised(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    module = canonical(model, x)
    torch.testing.assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    relevance = lrpfx.explain(model, x, 3, rules=rules).relevance
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(leaf)[:, 3].sum(), leaf)
    torch.testing.assert_close(relevance, g * x, rtol=1e-9, atol=1e-10)


# Names -------------------------------------------------------------------------------------------


def test_an_op_of_two_names_has_one() -> None:
    def aliases(x: Tensor) -> Tensor:
        y = torch.multiply(torch.subtract(x, 2), torch.negative(x))
        y = torch.concatenate([torch.divide(y, 3), torch.true_divide(y, 4)], 1)
        return torch.clip(torch.absolute(y), 0.1, 0.9)

    x = torch.randn(3, 4, dtype=torch.float64)
    module = canonical(Plain(aliases), x)
    torch.testing.assert_close(module(x), aliases(x), rtol=1e-12, atol=1e-12)
    names = {str(target).split(".")[1] for target in targets(module)}
    assert names == {"mul", "sub", "neg", "cat", "div", "abs", "clamp"}


# Multiplication and addition in one op -----------------------------------------------------------


def test_multiply_add_is_taken_apart() -> None:
    def addcmul(x: Tensor) -> Tensor:
        return torch.addcmul(x[:, :1, 0], x[:, :, 1], x[:, :, 2], value=3)

    def baddbmm(x: Tensor) -> Tensor:
        return torch.baddbmm(x[:, :, :1], x, x.mT, beta=0.5, alpha=2).flatten(1)

    def without_summand(x: Tensor) -> Tensor:
        return torch.baddbmm(x[:, :, :1], x, x.mT, beta=0).flatten(1)

    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for fn in (addcmul, baddbmm, without_summand):
        module = canonical(Plain(fn), x)
        torch.testing.assert_close(module(x), fn(x), rtol=1e-12, atol=1e-12)
        assert not {aten.addcmul.default, aten.baddbmm.default} & set(targets(module))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * torch.rand(4),
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.bernoulli(torch.full((4,), 0.5)),
    ],
    ids=["rand", "randn_like", "bernoulli"],
)
def test_random_numbers_in_forward_are_refused(fn: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(lrpfx.errors.CaptureError, match="random numbers"):
        lrpfx.explain(Plain(fn), torch.randn(3, 4))


# Writes in regions -------------------------------------------------------------------------------


def _constant_mask(x: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.zeros(6, dtype=x.dtype)
        mask[2:] = 1.0
    return x * mask


def _blanked(x: Tensor) -> Tensor:
    h = F.relu(x)
    with torch.no_grad():
        h[:, 0] = 0.0
    return h * 2


@torch.no_grad()
def _table(n: int) -> Tensor:
    steps, table = torch.arange(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    table[0::2], table[1::2] = steps[0::2].sin(), steps[1::2].cos()
    return table


def _with_grad(x: Tensor) -> Tensor:
    h = x * 1
    with torch.enable_grad():
        h[:, 0] = 1.0
    return h * 2


@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(
    ("region", "plain"),
    [
        (_constant_mask, lambda x: x * torch.tensor([0, 0, 1, 1, 1, 1], dtype=x.dtype)),
        (_blanked, lambda x: torch.cat([torch.zeros_like(x[:, :1]), F.relu(x[:, 1:])], 1) * 2),
        (lambda x: x + _table(x.shape[1]), lambda x: x + _table(6)),
        (_with_grad, lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:]], 1) * 2),
    ],
    ids=["mask", "blanked", "table", "enable_grad"],
)
def test_writes_in_regions_are_kept(region: Callable, plain: Callable, outside: Callable) -> None:
    x, seed = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    with outside():
        got, expected = (
            lrpfx.explain(Plain(fn), x, seed, rules=lrpfx.composites.EpsilonAll(1e-12))
            for fn in (region, plain)
        )
    torch.testing.assert_close(got.output, region(x))
    torch.testing.assert_close(got.relevance, expected.relevance)


@pytest.mark.parametrize(
    ("x", "w"), [((2, 1), (4, 3)), ((2, 4), (1, 3)), ((2, 1, 5), (4, 5))], ids=str
)
def test_an_einsum_that_broadcasts_is_a_linear_layer(
    x: tuple[int, ...], w: tuple[int, ...]
) -> None:
    weight = torch.randn(w, dtype=torch.float64)
    equation = "ij,jk->ik" if len(x) == 2 else "ijk,jk->ik"
    inputs = torch.randn(x, dtype=torch.float64)
    model = Plain(lambda x: torch.einsum(equation, x, weight))
    torch.testing.assert_close(canonical(model, inputs)(inputs), model(inputs))
    leaf = inputs.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    got = lrpfx.explain(
        model,
        inputs,
        torch.eye(model(inputs).shape[1])[1].double().expand(*model(inputs).shape) * model(inputs),
        rules=lrpfx.composites.EpsilonAll(1e-12),
    ).relevance
    torch.testing.assert_close(got, inputs * leaf.grad)


def test_what_cannot_be_made_functional_is_refused() -> None:
    def write(x: Tensor) -> Tensor:
        h = (x * 1).view(-1, 2, 3)
        h.unfold(1, 2, 1).masked_fill_(torch.arange(2) > 0, 0.5)
        return h.flatten(1)

    with pytest.raises(lrpfx.errors.CaptureError, match=r"in-place(.|\n)*test_passes\.py:\d+"):
        lrpfx.explain(Plain(write), torch.randn(2, 6))


def test_a_finer_constant_hides_no_softmax() -> None:
    table = torch.randn(4, dtype=torch.float64)

    def by_hand(x: Tensor) -> Tensor:
        e = (x + table.to(x.dtype)).exp()
        return 1 / (1 + torch.exp(-(e / e.sum(1, keepdim=True))))

    called = targets(canonical(Plain(by_hand), torch.randn(3, 4)))
    assert aten.softmax.int in called and aten.sigmoid.default in called


def test_a_coarse_softmax_in_a_fine_model_is_left_as_it_is() -> None:
    def by_hand(x: Tensor) -> Tensor:
        e = x.bfloat16().exp()
        return (e / e.sum(1, keepdim=True)).float()

    assert aten.softmax.int not in targets(canonical(Plain(by_hand), torch.randn(3, 4)))
