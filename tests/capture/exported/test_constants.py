"""What forward() may ask of tensors: values of constants, ``.data``; and what it cuts off."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply, assert_untouched

pytestmark = pytest.mark.usefixtures("each_way")


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def relevance(forward: Any, inputs: Any, members: dict[str, Any], **options: Any) -> Tensor:
    model = Apply(forward, **members).double()
    with assert_untouched(model, inputs):
        found: Tensor = lrpfx.explain(model, inputs, 1, **options).relevance
    return found


# -- branches on constants ------------------------------------------------------------------------


def causal(size: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size, dtype=torch.float64)


def written(h: Tensor) -> Tensor:
    """Made in forward, in place and through a view."""
    mask = torch.zeros(4, 4, dtype=h.dtype)
    mask.masked_fill_(torch.ones(4, 4).triu(1) > 0, float("-inf"))
    mask[0] = mask[0] * 1
    return mask


MASKS = {
    "a buffer": lambda m, h: m.mask,
    "cast to the input": lambda m, h: m.mask.to(h),
    "made in forward": lambda m, h: causal(h.shape[1]),
    "written in forward": lambda m, h: written(h),
    "like a part of the input": lambda m, h: torch.full_like(h[0, :, :4], float("-inf")).triu(1),
}


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 1).double().eval()


@pytest.fixture(scope="module")
def hinted(encoder: nn.Module) -> Tensor:
    members = {"t": encoder, "mask": causal(4)}
    forward = lambda m, h: m.t(h, mask=m.mask, is_causal=True)[:, -1]  # noqa: E731
    return relevance(forward, x(2, 4, 4), members)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_transformer_with_a_mask_is_that_with_the_hint(
    mask: Any, encoder: nn.Module, hinted: Tensor
) -> None:
    members = {"t": encoder, "mask": causal(4)}
    got = relevance(lambda m, h: m.t(h, mask=mask(m, h))[:, -1], x(2, 4, 4), members)
    assert torch.equal(got, hinted)


def test_a_decoder_with_masks_is_that_with_the_hints() -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 1)
    members, inputs = {"t": decoder, "mask": causal(3)}, (x(2, 3, 4), x(2, 5, 4))
    got, want = (
        relevance(
            lambda m, a, b, hint=hint: m.t(a, b, tgt_mask=m.mask, **hint)[:, -1], inputs, members
        )
        for hint in ({}, {"tgt_is_causal": True})
    )
    assert all(map(torch.equal, got, want))


def picked(m: Any, x: Tensor) -> Tensor:
    return sum(m.fc(x)[:, [i] * 3] for i, flag in enumerate(m.flags) if flag)


BRANCHES = {
    "an attribute that is iterated over": (picked, lambda m, x: m.fc(x)[:, [0] * 3]),
    "a buffer's sum": (
        lambda m, x: m.fc(x) if m.signs.sum() > 0 else -m.fc(x),
        lambda m, x: -m.fc(x),
    ),
    "a parameter's norm": (
        lambda m, x: m.fc(x) / (m.fc.weight.norm().item() if (m.fc.weight != 0).all() else 1),
        lambda m, x: m.fc(x) / float(m.fc.weight.detach().norm()),
    ),
    "a list of numbers": (
        lambda m, x: m.fc(x) * m.signs.tolist()[1],
        lambda m, x: -2 * m.fc(x),
    ),
    "two tensors": (
        lambda m, x: m.fc(x) if torch.equal(m.signs, m.signs.clone()) else x,
        lambda m, x: m.fc(x),
    ),
    "steps by a tensor": (
        lambda m, x: sum(m.fc(x) * k for k in range(int(m.signs.abs().max()) + 1)),
        lambda m, x: m.fc(x) * 0 + m.fc(x) * 1 + m.fc(x) * 2,
    ),
}


@pytest.mark.parametrize(("branch", "plain"), BRANCHES.values(), ids=BRANCHES)
def test_branches_on_constants_are_taken_as_in_the_model(branch: Any, plain: Any) -> None:
    torch.manual_seed(0)
    members = {"fc": nn.Linear(3, 3), "signs": torch.tensor([1.0, -2.0])}
    found = []
    for forward in (branch, plain):
        model = Apply(forward, **members).double()
        model.flags = torch.tensor([True, False])  # no buffer
        found.append(lrpfx.explain(model, x(2, 3), 1).relevance)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(x) if m.fc(x).sum() > 0 else x,
        lambda m, x: m.fc(x) if m.fc.weight.add(x.mean()).sum() > 0 else x,
        lambda m, x: m.fc(x) if torch.zeros(2).add_(x[0, :2]).sum() > 0 else x,
    ],
)
def test_branches_on_what_depends_on_the_input_are_refused(forward: Any) -> None:
    with pytest.raises(errors.CaptureError, match="branches"):
        relevance(forward, x(2, 3), {"fc": nn.Linear(3, 3)}, capture="export")


def test_random_numbers_are_no_constants() -> None:
    with pytest.raises(errors.CaptureError):
        relevance(lambda m, x: m.fc(x) * torch.rand(()).item(), x(2, 3), {"fc": nn.Linear(3, 3)})


def test_what_a_branch_was_taken_by_may_not_change() -> None:
    fc, inputs = nn.Linear(3, 3), x(2, 3)
    model = Apply(lambda m, x: m.fc(x) * (1 if m.sign > 0 else -1), fc=fc, sign=torch.ones(()))
    explainer = lrpfx.Explainer(model.double(), inputs)
    before = explainer(inputs, 1).relevance
    with torch.no_grad():
        fc.weight.mul_(2)
        fc.bias.mul_(2)
    torch.testing.assert_close(explainer(inputs, 1).relevance, 2 * before, rtol=1e-4, atol=1e-4)
    model.sign.neg_()
    with pytest.raises(errors.CaptureError, match="branches on values(.|\n)*where: sign"):
        explainer(inputs, 1)


# -- .data ----------------------------------------------------------------------------------------


def capped(weight: Tensor) -> Tensor:
    return torch.renorm(weight, p=2, dim=0, maxnorm=0.5)


class Capped(nn.Linear):
    """The max-norm constraint of EEGNet."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = capped(self.weight.data)
        return super().forward(x)


class CappedInPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.copy_(capped(self.weight.data))
        return super().forward(x)


class Through(nn.Linear):
    """What autograd makes of it: values are set, and gradients pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + (capped(self.weight) - self.weight).detach()
        return F.linear(x, weight, self.bias)


def explained(kind: type[nn.Linear], scale: float, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    layer = kind(4, 3).double().eval()
    layer.weight.data.mul_(scale)
    if scale < 1:
        layer.weight.data = capped(layer.weight.data)
    with assert_untouched(layer):
        return layer, lrpfx.explain(layer, x(2, 4), 1, rules=EpsilonAll(0.01), **options)


@pytest.mark.parametrize("scale", [0.9, 3.0], ids=["holds already", "does not hold yet"])
@pytest.mark.parametrize("kind", [Capped, CappedInPlace])
def test_constraints_on_weights_are_followed(kind: type[nn.Linear], scale: float) -> None:
    got, want = explained(kind, scale)[1], explained(Through, scale)[1]
    torch.testing.assert_close(got.output, want.output)
    torch.testing.assert_close(got.relevance, want.relevance)


def test_gradients_pass_a_constraint_as_in_autograd() -> None:
    found = []
    for kind in (Capped, Through):
        layer, explanation = explained(kind, 3.0, create_graph=True)
        explanation.relevance.square().sum().backward()
        found.append(layer.weight.grad)
    torch.testing.assert_close(*found)


DATA = {
    "a mask": (lambda m, x: m.fc(x * x.data.gt(0)), lambda m, x: m.fc(x * x.detach().gt(0))),
    "a statistic": (
        lambda m, x: m.fc(x / x.data.abs().amax(1, keepdim=True)),
        lambda m, x: m.fc(x / x.detach().abs().amax(1, keepdim=True)),
    ),
    "a weight": (
        lambda m, x: F.linear(x, m.fc.weight.data, m.fc.bias),
        lambda m, x: m.fc(x),
    ),
    "a residual": (
        lambda m, x: m.fc(x) + m.fc(x).data,
        lambda m, x: m.fc(x) + m.fc(x).detach(),
    ),
}


@pytest.mark.parametrize(("data", "detached"), DATA.values(), ids=DATA)
def test_data_is_detach(data: Any, detached: Any) -> None:
    torch.manual_seed(0)
    fc = nn.Linear(3, 3)
    assert torch.equal(*(relevance(f, x(2, 3), {"fc": fc}) for f in (data, detached)))


# -- regions without gradients --------------------------------------------------------------------


def region(*contexts: Any) -> Any:
    """A gate that is computed inside of contexts."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        outer, *inner = contexts
        with outer():
            if inner:
                with inner[0]():
                    gate = m.fc(h).sigmoid()
            else:
                gate = m.fc(h).sigmoid()
        return h * gate.clone()

    return forward


def autocast(enabled: bool = True) -> Any:
    return lambda: torch.autocast("cpu", torch.bfloat16, enabled=enabled)


REGIONS = {
    "no_grad": (torch.no_grad,),
    "inference_mode": (torch.inference_mode,),
    "no_grad under autocast": (autocast(), torch.no_grad),
    "no_grad under autocast that is off": (autocast(False), torch.no_grad),
    "autocast under no_grad": (torch.no_grad, autocast(False)),
    "inference_mode under autocast": (autocast(False), torch.inference_mode),
}


AROUND = [(contexts, torch.enable_grad) for contexts in REGIONS.values()]
AROUND += [(REGIONS["no_grad under autocast"], torch.no_grad)]
AROUND += [(REGIONS["no_grad under autocast"], torch.inference_mode)]


@pytest.mark.parametrize(("contexts", "around"), AROUND)
def test_what_is_computed_without_gradients_is_a_constant(contexts: Any, around: Any) -> None:
    torch.manual_seed(0)
    fc, inputs = nn.Linear(3, 3).double(), x(2, 3)
    with around():
        got = relevance(region(*contexts), inputs, {"fc": fc})
    want = relevance(lambda m, x: m.fc(x) * m.fc(m.fc(x)).sigmoid().detach(), inputs, {"fc": fc})
    torch.testing.assert_close(got, want)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parameters", "modules", "train", "state_dict"])
def test_submodules_may_be_named_like_methods(name: str) -> None:
    torch.manual_seed(0)
    fc, inputs = nn.Linear(3, 3), x(2, 3)
    want = relevance(lambda m, x: m.fc(x), inputs, {"fc": fc})
    members = {"fc": fc, name: nn.ParameterList(fc.parameters())}
    model = Apply(lambda m, x: m.fc(x)).double()
    for member, value in members.items():
        setattr(model, member, value)
    order = list(model._modules)
    assert torch.equal(lrpfx.explain(model, inputs, 1).relevance, want)
    assert list(model._modules) == order and model._modules[name] is members[name]


def test_a_nested_one_may_be_too() -> None:
    torch.manual_seed(0)
    block = nn.Linear(3, 3).double()
    want = relevance(lambda m, x: m.block(x), x(2, 3), {"block": block})
    block.half = nn.ParameterList(block.parameters())
    got = relevance(lambda m, x: m.block(x), x(2, 3), {"block": block})
    assert torch.equal(got, want)
