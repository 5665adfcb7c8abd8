"""float16, bfloat16 and autocast: relevance is finite, and that of float32 within a tolerance.

Relevance is compared as whole maps, in the Euclidean norm, because single entries cancel to almost
nothing. Explained is the largest output: relevance sums to it, and one near zero is all rounding.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites
from lrpfx.rules.base import divide, share
from tests.conftest import Apply, Traces, assert_untouched, traced_once
from tests.oracle import families, zoo
from tests.oracle.families import tf

BF16, FP16 = torch.bfloat16, torch.float16
HALVES = [BF16, FP16]
#: In docs/supported.md: least cosine and largest relative error of any sample. Measured, on
#: the residual network: 0.995 and 0.10 in bfloat16, 0.9993 and 0.037 in float16. Its roundings let
#: other entries win in max pooling; transformers and the perceptron are within 0.02 and 0.014.
TOLERANCE = {BF16: (0.99, 0.15), FP16: (0.999, 0.05)}
EITHER = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


def test_relevance_of_small_outputs_and_seeds_does_not_vanish_in_float16() -> None:
    """Spread over 432 pixels, 1e-6 is far below the least number of float16."""
    model, x = residual_network(), torch.randn(1, 3, 12, 12)
    half = copy.deepcopy(model).half()
    seed = torch.tensor([[0.0, 1e-6, 0.0, -2e-6, 0.0]])
    for options in (dict(ledger=True), dict(ledger=False), dict(create_graph=True)):
        expected = lrpfx.explain(model, x, seed, rules="epsilon_plus", **options)
        got = lrpfx.explain(half, x.half(), seed.half(), rules="epsilon_plus", **options)
        assert got.relevance.dtype == torch.float32
        # In float16 the seed itself is 1.01e-6 and 2.03e-6.
        cosine = F.cosine_similarity(got.relevance.flatten(), expected.relevance.flatten(), 0)
        assert cosine > 0.998
        assert 0.95 < got.relevance.norm() / expected.relevance.norm() < 1.05
        if options.get("ledger"):
            assert got.report.unaccounted == pytest.approx(0, abs=1e-7)
            assert got.report.started == pytest.approx(expected.report.started, rel=0.05)
            got_in, expected_in = (
                [row.relevance_in for row in e.report.rows] for e in (got, expected)
            )
            assert got_in == pytest.approx(expected_in, rel=0.1)


@pytest.mark.parametrize("ledger", [True, False])
def test_quotients_of_small_outputs_are_not_cut_off_in_float16(ledger: bool) -> None:
    """One-hot times output, brought to 32, is 3e5 times an output of 1e-4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.rand(2, 6).half()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
        model[2].bias.zero_()
    model.half()
    got = lrpfx.explain(model, x, 1, rules="epsilon_plus", ledger=ledger)
    expected = lrpfx.explain(model.double(), x.double(), 1, rules="epsilon_plus")
    assert expected.output.abs().max() < 1e-3
    assert families.error(got.relevance.double(), expected.relevance) < 1e-2


def test_relevance_that_overflows_scaled_is_computed_of_smaller_seeds() -> None:
    """3750 times the seed is handed on: beyond float16 of 32, and not of a thousandth of that."""
    model, x = nn.Linear(2, 1, bias=False).eval(), torch.tensor([[60000.0, 59968.0]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
    e = lrpfx.explain(
        model.half(), x.half(), torch.ones(1, 1).half(), rules=[("*", lrpfx.Epsilon(1e-9))]
    )
    torch.testing.assert_close(e.relevance, torch.tensor([[1875.0, -1874.0]]))


# Models ------------------------------------------------------------------------------------------


def _residual(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(m.stem(x).relu(), 2)
    for block in m.blocks:
        x = (x + block(x)).relu()
    return m.head(x.mean((2, 3)))


def residual_network() -> nn.Module:
    """Convolutions with batch norm; some outputs see zeros only, and have nothing to share by."""

    def convolution(channels: int) -> nn.Module:
        bias = channels == 3
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8))

    blocks = (nn.Sequential(convolution(8), nn.ReLU(), convolution(8)) for _ in range(2))
    parts = dict(stem=convolution(3), blocks=nn.ModuleList(blocks), head=nn.Linear(8, 5))
    return zoo.randomize(Apply(_residual, **parts))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5)
    return nn.Sequential(*layers).eval()


def vision_transformer() -> nn.Module:
    return drawn(families.FAMILIES["vit"](), lambda m, x: m.model(pixel_values=x).logits)


def language_model() -> nn.Module:
    """A Llama of one layer; time is spent on capture."""
    config = tf.LlamaConfig(**families.GROUPED | families.ONE)
    model = tf.LlamaForCausalLM(config)
    return drawn(model, lambda m, x: m.model(input_ids=x, use_cache=False).logits[:, -1])


def drawn(model: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    torch.manual_seed(0)
    families.draw(model)
    return Apply(forward, model=model)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "residual": (residual_network, ("epsilon_plus", "alpha_beta", "gamma_box")),
    "perceptron": (perceptron, ("epsilon_all",)),
    "vit": (
        vision_transformer,
        ("epsilon_plus", "attnlrp"),
    ),
    "llama": (
        language_model,
        ("attnlrp", "cplrp"),
    ),
}
RULES: dict[str, Callable[[float], composites.Composite]] = {
    "epsilon_all": composites.EpsilonAll,
    "epsilon_plus": lambda e: composites.EpsilonPlus(epsilon=e, stabilizer=e),
    "alpha_beta": lambda e: composites.EpsilonAlpha2Beta1(epsilon=e, stabilizer=e),
    "gamma_box": lambda e: composites.EpsilonGammaBox(-3, 3, epsilon=e, stabilizer=e),
    "attnlrp": lambda e: composites.AttnLRP(),
    "cplrp": lambda e: composites.CPLRP(),
}
EVERY = [(model, rules) for model, (_, all_rules) in MODELS.items() for rules in all_rules]
every = pytest.mark.parametrize(("name", "rules"), EVERY)


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return MODELS[name][0]().to(dtype)


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if name == "llama":
        return families.inputs_of("llama")["input_ids"]
    shape = {"residual": (3, 3, 16, 16), "perceptron": (3, 12), "vit": (3, 3, 32, 32)}[name]
    x = zoo.images(*shape).to(dtype)
    if name == "residual":
        x[..., :6] = 0.0  # a black border
    return x


TRACES: Traces = {}


@functools.cache
def exact(name: str, rules: str) -> lrpfx.Explainer:
    with traced_once(TRACES):
        return lrpfx.Explainer(model_of(name), inputs_of(name), RULES[rules](1e-6))


@functools.cache
def target_of(name: str) -> Tensor:
    with torch.no_grad():
        return model_of(name)(inputs_of(name)).abs().argmax(1)


@functools.cache
def expected(name: str, rules: str, ledger: bool) -> Tensor:
    return exact(name, rules)(inputs_of(name), target_of(name), ledger=ledger).relevance.detach()


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Check that relevance is that of float32 within what ``dtype`` may lose."""
    cosine, relative = TOLERANCE[dtype]
    got, wanted = got.detach().double().flatten(1), wanted.double().flatten(1)
    assert families.error(got, wanted) < relative
    assert F.cosine_similarity(got, wanted).min() > cosine


@pytest.mark.parametrize("ledger", [True, False])
def test_lrp_0_through_many_relus_is_rough(ledger: bool) -> None:
    """As gradient times input is there."""
    model, x = residual_network(), inputs_of("residual")
    rules, target = composites.EpsilonAll(epsilon=0), target_of("residual")
    wanted = lrpfx.explain(model, x, target, rules=rules).relevance.double().flatten(1)
    half = residual_network().bfloat16()
    got = lrpfx.explain(half, x.bfloat16(), target, rules=rules, ledger=ledger).relevance
    got = got.detach().double().flatten(1)
    assert F.cosine_similarity(got, wanted).min() > 0.98
    assert families.error(got, wanted) < 0.2


# Models in a half type ---------------------------------------------------------------------------


#: Of transformers the fast suite has one in each type.
HALVED = [
    pytest.param(
        *case,
        dtype,
        marks=[pytest.mark.nightly] * ((case[0], dtype) in (("llama", FP16), ("vit", BF16))),
    )
    for case in EVERY
    for dtype in HALVES
]


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(("name", "rules", "dtype"), HALVED)
def test_a_model_in_a_half_type(name: str, rules: str, dtype: torch.dtype) -> None:
    x = inputs_of(name, dtype)
    explainer = lrpfx.Explainer(model_of(name, dtype), x, RULES[rules](1e-6))
    for ledger in (True, False):
        explanation = explainer(x, target_of(name), ledger=ledger)
        assert explanation.output.dtype == dtype
        assert explanation.relevance.dtype == (torch.float32 if dtype == FP16 else dtype)
        assert_close(explanation.relevance, expected(name, rules, ledger), dtype)


@pytest.mark.parametrize(
    ("name", "rules"),
    [("residual", rules) for rules in MODELS["residual"][1]] + [("perceptron", "epsilon_all")],
)
def test_an_epsilon_that_float16_does_not_have(name: str, rules: str) -> None:
    x = inputs_of(name, FP16)
    explainer = lrpfx.Explainer(model_of(name, FP16), x, RULES[rules](1e-9))
    for ledger in (True, False):
        relevance = explainer(x, target_of(name), ledger=ledger).relevance
        assert_close(relevance, expected(name, rules, ledger), FP16)


def test_small_negative_contributions_are_computed_and_not_a_difference() -> None:
    parts = dict(first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 8, 3), head=nn.Linear(8, 5))
    zoo.randomize(model := Apply(positive_network, **parts)).bfloat16()
    for layer in (model.first, model.second):
        negative = layer.weight.data < 0
        layer.weight.data = torch.where(negative, layer.weight / 100, layer.weight).detach()
    x = zoo.images(3, 3, 16, 16).abs()
    wanted = lrpfx.explain(model.float(), x.float(), 1, rules="epsilon_alpha2_beta1").relevance
    explainer = lrpfx.Explainer(model.bfloat16(), x.bfloat16(), "epsilon_alpha2_beta1")
    for ledger in (True, False):
        got = explainer(x.bfloat16(), 1, ledger=ledger).relevance.detach()
        assert families.error(got.float(), wanted.detach()) < 0.03


def positive_network(m: Any, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).relu()).relu().mean((2, 3)))


NORMS = {
    "layer norm of small": (nn.LayerNorm(32, eps=1e-12), 1e-3),
    "layer norm of large": (nn.LayerNorm(32), 1e3),
    "rms norm of small": (nn.RMSNorm(32), 1e-3),
    "group norm of large": (nn.GroupNorm(4, 32), 1e3),
}


@pytest.mark.parametrize(("norm", "size"), NORMS.values(), ids=NORMS)
def test_norms_of_what_float16_cannot_square(norm: nn.Module, size: float) -> None:
    torch.manual_seed(0)
    parts = dict(first=nn.Linear(12, 32), norm=norm, head=nn.Linear(32, 5))
    model = Apply(lambda m, x: m.head(m.norm(m.first(x) * size)), **parts)
    x = inputs_of("perceptron")
    with torch.no_grad():
        target = model(x).abs().argmax(1)
    wanted = lrpfx.explain(model, x, target, rules="epsilon_all").relevance
    for dtype in HALVES:
        half = copy.deepcopy(model).to(dtype)
        explainer = lrpfx.Explainer(half, x.to(dtype), "epsilon_all")
        for ledger in (True, False):
            assert_close(explainer(x.to(dtype), target, ledger=ledger).relevance, wanted, dtype)


# The division ------------------------------------------------------------------------------------

SIZES = [0.0, 6e-8, 1e-6, 1e-4, 0.3, 7.0, 300.0]
STABILIZERS = {
    "1e-6": 1e-6,
    "1e-9": 1e-9,
    "1": 1,
    "clip": lrpfx.Stabilizer(1e-9, clip=True),
    "norm": lrpfx.Stabilizer(1e-3, norm_scale=True),
}


@EITHER
@pytest.mark.parametrize("stabilizer", STABILIZERS.values(), ids=STABILIZERS)
def test_the_quotient_is_that_of_float32(stabilizer: Any, dtype: torch.dtype) -> None:
    """But for zero, where there is nothing to share by, and for what the dtype cannot hold."""
    sizes = torch.tensor(SIZES, dtype=dtype)
    z = torch.cat([sizes, -sizes]).expand(4, -1).contiguous()
    R = torch.tensor([[2.0], [-0.1], [1e-5], [0.0]], dtype=dtype).expand(z.shape).contiguous()
    exact, _ = divide(R.double(), z.double(), stabilizer)
    most = torch.finfo(dtype).max
    wanted = exact.masked_fill(z == 0, 0.0).clamp(-most, most).to(dtype)
    got, _ = divide(R, z, stabilizer)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(share(R, z.clone(), stabilizer, taken=False), got)
    assert torch.equal(share(R.abs(), z.abs(), stabilizer, False, sign=1), got.abs())
    taken = share(R, z, stabilizer, taken=True)
    wanted = divide(z.double() * R.double(), z.double(), stabilizer)[0].to(dtype)
    torch.testing.assert_close(taken, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@EITHER
def test_relevance_that_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    z = torch.tensor([1.0, -2.0, 1e-7], dtype=dtype)
    for bad in (torch.inf, torch.nan):
        for found in (divide(torch.full_like(z, bad), z, 1e-6)[0], share(z * bad, z, 1e-6, False)):
            assert not found.isfinite().any()


@EITHER
def test_relevance_that_stays_is_booked(dtype: torch.dtype) -> None:
    """Every output is zero, and so has nothing to share its relevance by."""
    model = Apply(lambda m, x: m.fc(x), fc=nn.Linear(3, 2, bias=False)).to(dtype)
    nn.init.zeros_(model.fc.weight)
    x, seed = torch.ones(1, 3, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    explanation = lrpfx.explain(model, x, seed, rules="epsilon_all")
    assert not explanation.relevance.any()
    assert explanation.report.absorbed["dead"] == 2.0


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.nightly)])
def test_a_recovered_summand_costs_no_accuracy(size: int) -> None:
    """Epsilon divides by z = y - b, which has lost its last digits; so has the sum itself."""
    model, x = zoo.torchvision_model("resnet18").double(), zoo.images(2, 3, size, size).double()
    exact = lrpfx.explain(model, x, 1, rules="epsilon_all").relevance
    explainer = lrpfx.Explainer(model.float(), x.float(), "epsilon_all")
    plain, fast = (
        (explainer(x.float(), 1, ledger=kept).relevance - exact).norm() for kept in (True, False)
    )
    assert 0 < fast < 1.5 * plain < 1e-2 * exact.norm()


# autocast ----------------------------------------------------------------------------------------


@EITHER
@every
def test_autocast_around_the_call(name: str, rules: str, dtype: torch.dtype) -> None:
    """It holds for the explanation as it would for the model."""
    x, model, target = inputs_of(name), exact(name, rules), target_of(name)
    for ledger in (True, False):
        with assert_untouched(None, x), torch.autocast("cpu", dtype=dtype):
            before = autocast_state()
            explanation = model(x, target, ledger=ledger)
            assert autocast_state() == before
        assert explanation.output.dtype == dtype
        assert explanation.relevance.dtype == torch.float32
        assert_close(explanation.relevance, expected(name, rules, ledger), dtype)


def autocast_state() -> tuple[Any, ...]:
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return enabled, dtype, torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(
    ("name", "rules", "dtype"),
    [
        ("residual", "alpha_beta", BF16),
        pytest.param("residual", "epsilon_plus", FP16, marks=pytest.mark.nightly),
        ("perceptron", "epsilon_all", FP16),
        ("vit", "attnlrp", BF16),
    ],
)
def test_autocast_in_forward(name: str, rules: str, dtype: torch.dtype) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return m.model(x)

    x, model = inputs_of(name), Apply(forward, model=model_of(name))
    capture = "record" if name == "residual" and dtype == BF16 else "export"
    explainer = lrpfx.Explainer(model, x, RULES[rules](1e-6), capture=capture)
    for ledger in (True, False):
        explanation = explainer(x, target_of(name), ledger=ledger)
        assert explanation.relevance.dtype == torch.float32
        assert explanation.output.dtype == model(x).dtype == dtype
        assert_close(explanation.relevance, expected(name, rules, ledger), dtype)


@pytest.mark.parametrize("rules", ["epsilon_plus", "alpha_beta"])
def test_a_frozen_batch_norm_under_autocast(rules: str) -> None:
    """Its constants are in float32, and so is what it makes of a convolution in bfloat16."""
    torch.manual_seed(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16, enabled=m.low):
            y = m.conv(F.relu(m.stem(x) * m.scale + m.shift)) * m.scale + m.shift
            return m.head(F.relu(y).mean((2, 3)))

    scale, shift = torch.randn(4)[:, None, None], torch.randn(4)[:, None, None]
    stem, conv, head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
    parts = dict(stem=stem, conv=conv, head=head, scale=scale, shift=shift)
    x = zoo.images(3, 3, 12, 12).float()
    low, high = (
        lrpfx.explain(Apply(forward, low=low, **parts), x, 1, rules=RULES[rules](1e-6)).relevance
        for low in (True, False)
    )
    assert_close(low, high, BF16)


def test_autocast_around_the_capture_is_not_kept() -> None:
    x = inputs_of("residual")
    with torch.autocast("cpu", dtype=BF16):
        explainer = lrpfx.Explainer(
            model_of("residual"), x, RULES["epsilon_plus"](1e-6), freeze=True
        )
        explainer(x, target_of("residual"), ledger=False)
    for ledger in (True, False):
        relevance = explainer(x, target_of("residual"), ledger=ledger).relevance
        torch.testing.assert_close(relevance, expected("residual", "epsilon_plus", ledger))


def test_autocast_keeps_no_weights_without_a_gradient() -> None:
    """Under autocast PyTorch remembers the weights that it has cast, here without autograd."""
    x, explainer = inputs_of("residual"), exact("residual", "epsilon_plus")
    model = explainer._engine.captured.model
    with torch.autocast("cpu", dtype=BF16):
        explainer(x, 1)
        (gradient,) = torch.autograd.grad(model(x).sum(), model.stem[0].weight)
    assert gradient.any()
