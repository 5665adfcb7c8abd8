"""The same network, spelled as users spell it and plainly: the relevance is the same.

Each case is what users of tools that hook modules complain about: functional and in-place ops,
modules used twice, registered in another order, hidden in lists, gates, norms and convolutions
written by hand. What has no relevance is refused, with the reason.
"""

import dataclasses
import functools
import operator
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import lrpfx
from lrpfx import composites, errors
from tests.conftest import Apply, traced_once

Forward = Callable[[Any, Tensor], Tensor]

#: So small that a division more in one of the spellings cannot be seen.
EPSILON = 1e-18
TOLERANCE = 1e-10


class _Gamma(composites.Composite):
    """Gamma on every conv and linear, for models that may lack one of the two."""

    strict = False

    def __init__(self) -> None:
        rule = lrpfx.Gamma(0.25, EPSILON)
        base = composites.AttnLRP(EPSILON).entries
        super().__init__([("conv", rule), ("linear", rule), *base])


RULES = {
    "epsilon_all": composites.EpsilonAll(EPSILON),
    "epsilon_plus": composites.EpsilonPlus(EPSILON, EPSILON),
    "alpha_beta_flat": composites.EpsilonAlpha2Beta1Flat(EPSILON, EPSILON),
    "attnlrp": composites.AttnLRP(EPSILON),
    "gamma": _Gamma(),
    "cplrp": composites.CPLRP(EPSILON),
    "deconvnet": composites.DeconvNet(),
    "beta_smooth": composites.BetaSmooth(),
    "no_bias": composites.EpsilonAlpha2Beta1Flat(EPSILON, EPSILON, zero_params="bias"),
    "w_square": [("conv", lrpfx.WSquare(EPSILON))],
    "flat": [("conv", lrpfx.Flat(EPSILON))],
    "box": [("conv", lrpfx.ZBox(-50.0, 40.0, EPSILON))],
}
#: That see what of an input is zero padding.
FOR_PADDING = ("epsilon_plus", "w_square", "flat", "box")
#: That of ReLUs, and that of activations in general.
FOR_RELUS = ("epsilon_plus", "deconvnet", "beta_smooth")
FOR_IMAGES = ("epsilon_all", "epsilon_plus", "alpha_beta_flat")
#: Where one of the twins is a conv or linear and the other is none, all rules but Epsilon differ.
LAYERS_DIFFER = ("epsilon_all",)
FOR_ROWS = ("epsilon_all", "gamma")
FOR_TOKENS = ("attnlrp", "gamma")


@pytest.fixture(autouse=True)
def one_trace() -> Iterator[None]:
    with traced_once():
        yield


def normal(*shape: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


@torch.no_grad()
def drawn(module: nn.Module, seed: int = 2) -> Any:
    """The module in float64 and evaluation mode, with nothing left at its initial value."""
    g = torch.Generator().manual_seed(seed)
    for tensor in module.double().eval().parameters():
        tensor.normal_(0.0, 0.6, generator=g)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(generator=g)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=g)
    return module


def first_leaf(output: Any) -> Tensor:
    return torch.utils._pytree.tree_leaves(output)[0]


def relevance(model: nn.Module, inputs: Any, rules: str) -> tuple[Tensor, list[Tensor]]:
    """Output and relevance of every input, from a seed of normal noise."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        shape = first_leaf(model(*(a.clone() for a in args))).shape
    e = lrpfx.explain(model, inputs, normal(*shape, seed=3), rules=RULES[rules])
    of = e.relevance if isinstance(e.relevance, tuple) else (e.relevance,)
    return first_leaf(e.output), [r for r in of if r is not None]


def assert_same(
    spelled: nn.Module, plain: nn.Module, inputs: Any, rules: tuple[str, ...] = FOR_IMAGES
) -> None:
    """Fail unless both compute the same output, and the same relevance under every rule set."""
    for name in rules:
        (out, ours), (expected_out, expected) = (
            relevance(model, inputs, name) for model in (spelled, plain)
        )
        assert close(out, expected_out), f"{name}: the twins compute different outputs"
        assert len(ours) == len(expected)
        for r, e in zip(ours, expected, strict=True):
            assert e.abs().max() > 1e-3, "a relevance of zero shows nothing"
            assert close(r, e), f"{name}: relative error {(r - e).norm() / e.norm():.1e}"


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


class Spy:
    """Gives members to a function and remembers which it has asked for."""

    def __init__(self, members: dict[str, Any]) -> None:
        self._members, self.used = {"training": False, **members}, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return self._members[name]


def between(fn: Forward, stem: nn.Module, shape: tuple[int, ...], **members: Any) -> nn.Module:
    """fn between a layer and a linear head, so that dead activations get no relevance.

    Only the members that fn uses are in the model: the others would be traced, too.
    """
    spy = Spy(members)
    with torch.no_grad():
        size = fn(spy, stem(normal(2, *shape))).flatten(1).shape[1]
    used = {name: members[name] for name in members if name in spy.used}
    return Apply(
        lambda m, x: m.head(fn(m, m.stem(x)).flatten(1)),
        stem=stem,
        head=drawn(nn.Linear(size, 3), seed=4),
        **used,
    )


# -- images: between a convolution and a linear head ----------------------------------------------


@torch.no_grad()
def _fused_ahead(bn: nn.BatchNorm2d, one: nn.Conv2d) -> nn.Module:
    """The 1 by 1 convolution of a batch norm's output as one convolution, worked out by hand."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift = bn.bias - bn.running_mean * scale
    fused = nn.Conv2d(4, 4, 1).double()
    fused.weight.copy_(one.weight * scale[:, None, None])
    fused.bias.copy_(one.bias + one.weight[:, :, 0, 0] @ shift)
    return fused


def image_model(fn: Forward) -> nn.Module:
    conv = drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6)
    one = drawn(nn.Conv2d(4, 4, 1), seed=8)
    two = drawn(nn.Conv2d(4, 4, 3, padding=1, bias=False), seed=7)
    bn = drawn(nn.BatchNorm2d(4), seed=12)
    return between(
        fn,
        drawn(nn.Conv2d(2, 4, 3, padding=1), seed=5),
        (2, 6, 6),
        conv=conv,
        two=two,
        bn=bn,
        fused=fuse_conv_bn_eval(conv, bn),
        one=one,
        fused_ahead=_fused_ahead(bn, one),
        fused_two=fuse_conv_bn_eval(two, bn),
        grouped=drawn(nn.Conv2d(4, 4, 3, groups=2), seed=9),
        depthwise=drawn(nn.Conv2d(4, 8, 3, groups=4, bias=False), seed=10),
        up=drawn(nn.ConvTranspose2d(4, 4, 2, stride=2), seed=11),
        bn2=drawn(nn.BatchNorm2d(4), seed=13),
        down=drawn(nn.Linear(4, 2), seed=14),
        grow=drawn(nn.Linear(2, 4), seed=15),
        mask=(normal(4, 4, 3, 3, seed=16) > 0).double(),
        prelu=drawn(nn.PReLU(4), seed=17),
        gn=drawn(nn.GroupNorm(2, 4), seed=18),
    )


def block(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + x)


def _slice_added_to(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2] += x[:, 2:]
    return y


def _scaled_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[..., 0].mul_(2.0)
    return y


def _last_axis_scaled(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * torch.tensor([2.0, 1, 1, 1, 1, 1], dtype=x.dtype)


def _half_rectified_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :2].relu_()
    return y


def _half_rectified(m: Any, x: Tensor) -> Tensor:
    first, second = m.conv(x).chunk(2, dim=1)
    return torch.cat([F.relu(first), second], 1)


def _kept_then_written_over(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    kept = y + 0 * x[:, :1].detach()
    y.relu_()
    return kept * 0.5 + y


def _dense(m: Any, x: Tensor) -> Tensor:
    features = [x]
    for layer in (m.conv, m.two):
        features.append(F.relu(layer(torch.cat(features, 1)[:, :4] + sum(features))))
    return torch.cat(features, 1)


def _dense_plain(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.conv(x + x))
    b = F.relu(m.two(x + x + a))
    return torch.cat([x, a, b], 1)


def _unet(m: Any, x: Tensor) -> Tensor:
    skip = F.relu(m.conv(x))
    low = nn.Sequential(nn.MaxPool2d(2), m.two, nn.ReLU(inplace=True))(skip)
    return torch.cat((skip, m.up(low)), dim=-3)


def _unet_plain(m: Any, x: Tensor) -> Tensor:
    skip = torch.relu(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1))
    low = torch.relu(F.conv2d(F.max_pool2d(skip, 2), m.two.weight, padding=1))
    up = F.conv_transpose2d(low, m.up.weight, m.up.bias, stride=2)
    return torch.cat([skip, up], 1)


def _excited(m: Any, x: Tensor) -> Tensor:
    gate = F.adaptive_avg_pool2d(x, 1).flatten(1)
    gate = torch.sigmoid(m.grow(F.relu(m.down(gate))))
    return x * gate[:, :, None, None]


def _excited_plain(m: Any, x: Tensor) -> Tensor:
    gate = F.linear(F.relu(F.linear(x.mean((2, 3)), *m.down.parameters())), *m.grow.parameters())
    return gate.sigmoid().view(-1, 4, 1, 1).mul(x)


def _unfolded(m: Any, x: Tensor) -> Tensor:
    """A convolution as patches times a matrix; the patches are what a convolution reads."""
    patches = F.unfold(x, 3, padding=1)
    return (m.conv.weight.flatten(1) @ patches + m.conv.bias[:, None]).view(-1, 4, 6, 6)


def _pooled_by_unfold(m: Any, x: Tensor) -> Tensor:
    return x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).max(-1).values


def _grouped_by_hand(m: Any, x: Tensor) -> Tensor:
    w, b = m.grouped.weight.chunk(2), m.grouped.bias.chunk(2)
    return torch.cat([F.conv2d(x[:, 2 * i : 2 * i + 2], w[i], b[i]) for i in range(2)], 1)


def _depthwise_by_hand(m: Any, x: Tensor) -> Tensor:
    parts = [
        F.conv2d(channel, kernel)
        for channel, kernel in zip(x.split(1, 1), m.depthwise.weight.split(2), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _shuffled_by_hand(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def _group_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    y = F.layer_norm(x.reshape(x.shape[0], 2, -1), (2 * 36,)).reshape(x.shape)
    return y * m.gn.weight[:, None, None] + m.gn.bias[:, None, None]


def _weighted_sum(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.full((4, 1, 2, 2), 0.25, dtype=x.dtype), stride=2, groups=4)


def _looped(m: Any, x: Tensor) -> Tensor:
    return torch.stack([F.relu(m.conv(sample[None]))[0] for sample in x])


def _cut(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(m.one(x))
    return m.conv(x) * gate


def _cut_beside_a_write(m: Any, x: Tensor) -> Tensor:
    """The write makes the whole graph be functionalised, the region included."""
    y = m.conv(x)
    y[:, :2] += x[:, 2:]
    with torch.no_grad():
        gate = torch.sigmoid(m.one(x))
    return y * gate


def _cut_beside_a_sum(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.conv(x)[:, :2] + x[:, 2:], m.conv(x)[:, 2:]], 1)
    return y * torch.sigmoid(m.one(x)).detach()


def _autocast_off(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.conv(x))


def _frozen(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm as detectors have it, whose statistics are frozen."""
    weight, bias, var, mean = (
        t.reshape(1, -1, 1, 1) for t in (bn.weight, bn.bias, bn.running_var, bn.running_mean)
    )
    scale = weight * (var + bn.eps).rsqrt()
    return x * scale + (bias - mean * scale)


def _scaled_up(m: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``m.up`` with three batch norms behind it, worked out by hand."""
    weight, bias = m.up.weight, m.up.bias
    for bn in (m.bn, m.bn, m.bn2):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        weight, bias = weight * scale[:, None, None], (bias - bn.running_mean) * scale + bn.bias
    return weight, bias


IMAGES: dict[str, tuple[Any, ...]] = {
    # activations, functional and not
    "nn.ReLU": (lambda m, x: nn.ReLU()(x), lambda m, x: F.relu(x)),
    "nn.ReLU in place": (lambda m, x: nn.ReLU(inplace=True)(x), lambda m, x: F.relu(x)),
    "relu_": (lambda m, x: x.relu_(), lambda m, x: F.relu(x), FOR_RELUS),
    "F.relu in place": (lambda m, x: F.relu(x, inplace=True), lambda m, x: F.relu(x)),
    "clamp": (lambda m, x: x.clamp(min=0), lambda m, x: F.relu(x), FOR_RELUS),
    "clamp_": (lambda m, x: x.clamp_(min=0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "clamp_min": (lambda m, x: torch.clamp_min(x, 0), lambda m, x: F.relu(x), FOR_RELUS),
    "clip": (lambda m, x: x.clip(0, None), lambda m, x: F.relu(x), FOR_RELUS),
    "maximum": (
        lambda m, x: torch.maximum(x, torch.zeros_like(x)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "max(x, 0)": (lambda m, x: torch.max(x, x.new_zeros(())), lambda m, x: F.relu(x), FOR_RELUS),
    "where": (lambda m, x: torch.where(x > 0, x, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "where with zeros": (
        lambda m, x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "where the other way round": (
        lambda m, x: torch.where(x <= 0, x.new_zeros(()), x),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "maximum with a number": (
        lambda m, x: torch.maximum(x, torch.tensor(0.0, dtype=x.dtype)),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "times a mask of numbers": (
        lambda m, x: (x > 0).to(x.dtype) * x,
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "no relu: the mask of another": (
        lambda m, x: x * (m.one(x) > 0),
        lambda m, x: torch.where(m.one(x) > 0, x, 0.0),
        FOR_RELUS,
    ),
    "times a mask": (lambda m, x: x * (x > 0), lambda m, x: F.relu(x), FOR_RELUS),
    "masked_fill": (lambda m, x: x.masked_fill(x < 0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "masked_fill_": (lambda m, x: x.masked_fill_(x < 0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "indexed by a mask": (
        lambda m, x: x.index_put((x < 0,), x.new_zeros(())),
        lambda m, x: F.relu(x),
        FOR_RELUS,
    ),
    "threshold": (lambda m, x: F.threshold(x, 0.0, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "leaky with slope 0": (lambda m, x: F.leaky_relu(x, 0.0), lambda m, x: F.relu(x), FOR_RELUS),
    "(x + |x|) / 2": (lambda m, x: (x + x.abs()) / 2, lambda m, x: F.relu(x)),
    "relu6": (lambda m, x: x.clamp(0, 6), lambda m, x: F.relu6(x)),
    "PReLU": (
        lambda m, x: m.prelu(x),
        lambda m, x: torch.where(x > 0, x, x * m.prelu.weight[:, None, None]),
    ),
    "PReLU in two halves": (
        lambda m, x: F.relu(x) - m.prelu.weight[:, None, None] * F.relu(-x),
        lambda m, x: m.prelu(x),
    ),
    "hardswish": (lambda m, x: x * F.relu6(x + 3) / 6, lambda m, x: F.hardswish(x)),
    "hardswish in place": (
        lambda m, x: x.mul_(F.relu6(x.clone().add_(3))).div_(6),
        lambda m, x: nn.Hardswish()(x),
    ),
    "silu": (lambda m, x: x * x.sigmoid(), lambda m, x: nn.SiLU()(x)),
    "softmax over channels": (lambda m, x: nn.Softmax2d()(x), lambda m, x: x.softmax(1)),
    "square": (lambda m, x: x**2, lambda m, x: torch.square(x)),
    "x * x": (lambda m, x: x * x, lambda m, x: x.pow(2)),
    "glu": (
        lambda m, x: F.glu(x, dim=1),
        lambda m, x: x[:, :2] * torch.sigmoid(x[:, 2:]),
    ),
    # residual sums
    "functional residual block": (
        block,
        lambda m, x: nn.ReLU()(torch.add(nn.Sequential(m.conv, m.bn)(x), x)),
    ),
    "residual add_": (lambda m, x: m.conv(x).add_(x).relu_(), lambda m, x: F.relu(m.conv(x) + x)),
    "residual +=": (lambda m, x: operator.iadd(m.conv(x), x), lambda m, x: m.conv(x) + x),
    "residual into x": (lambda m, x: x.add_(m.conv(x)), lambda m, x: x + m.conv(x)),
    "sum of a list": (
        lambda m, x: sum([x, m.conv(x), m.two(x)]),
        lambda m, x: x + m.conv(x) + m.two(x),
    ),
    "sums associated otherwise": (
        lambda m, x: x + (m.conv(x) + m.two(x)),
        lambda m, x: (x + m.conv(x)) + m.two(x),
    ),
    "stack and sum": (
        lambda m, x: torch.stack([x, m.conv(x)]).sum(0),
        lambda m, x: x + m.conv(x),
    ),
    "stack and mean": (
        lambda m, x: torch.stack([x, m.conv(x)], -1).mean(-1),
        lambda m, x: (x + m.conv(x)) / 2,
    ),
    "concatenated and summed": (
        lambda m, x: torch.cat([x, m.conv(x)], 1).view(-1, 2, 4, 6, 6).sum(1),
        lambda m, x: x + m.conv(x),
    ),
    "add with alpha": (
        lambda m, x: torch.add(m.conv(x), x, alpha=-0.5),
        lambda m, x: m.conv(x) - 0.5 * x,
    ),
    "sub_ with alpha": (
        lambda m, x: m.conv(x).sub_(x, alpha=2),
        lambda m, x: m.conv(x) - 2 * x,
    ),
    "rsub": (lambda m, x: torch.rsub(m.conv(x), x), lambda m, x: x - m.conv(x)),
    "lerp": (lambda m, x: torch.lerp(x, m.conv(x), 0.3), lambda m, x: x * 0.7 + m.conv(x) * 0.3),
    "lerp by a tensor": (
        lambda m, x: torch.lerp(x, m.conv(x), m.mask[0, 0, 0, 0] * 0.5 + 0.2),
        lambda m, x: (
            x * (0.8 - m.mask[0, 0, 0, 0] * 0.5) + m.conv(x) * (m.mask[0, 0, 0, 0] * 0.5 + 0.2)
        ),
    ),
    "addcmul": (
        lambda m, x: torch.addcmul(x, m.conv(x), m.two(x), value=0.5),
        lambda m, x: x + 0.5 * (m.conv(x) * m.two(x)),
    ),
    "addcmul_ with constants": (
        lambda m, x: m.conv(x).addcmul_(x, m.mask[0, :, 0, :1, None]),
        lambda m, x: m.conv(x) + x * m.mask[0, :, 0, :1, None],
    ),
    "addcdiv": (
        lambda m, x: torch.addcdiv(m.conv(x), x, m.mask[0, :, 0, :1, None] + 2, value=3.0),
        lambda m, x: m.conv(x) + 3.0 * (x / (m.mask[0, :, 0, :1, None] + 2)),
    ),
    # writes into views
    "+= into a slice": (
        _slice_added_to,
        lambda m, x: torch.cat([m.conv(x)[:, :2] + x[:, 2:], m.conv(x)[:, 2:]], 1),
    ),
    "mul_ through a view": (_scaled_through_a_view, _last_axis_scaled),
    "relu_ on a slice": (_half_rectified_in_place, _half_rectified),
    "value kept before relu_": (
        _kept_then_written_over,
        lambda m, x: m.conv(x) * 0.5 + F.relu(m.conv(x)),
    ),
    "index_put with accumulate": (
        lambda m, x: m.conv(x).index_put_(
            (slice(None), torch.tensor([0, 0]))
            and (torch.arange(2)[:, None], torch.tensor([0, 0])),
            x[:, :2],
            accumulate=True,
        ),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x[:, :1] + x[:, 1:2], m.conv(x)[:, 1:]], 1),
    ),
    "scatter_add": (
        lambda m, x: m.conv(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x.sum(1, keepdim=True), m.conv(x)[:, 1:]], 1),
    ),
    "scatter of less than is given": (
        lambda m, x: torch.zeros_like(x).scatter(1, torch.tensor([2]).expand(2, 1, 6, 6), x),
        lambda m, x: F.pad(x[:, :1], (0, 0, 0, 0, 2, 1)),
    ),
    "scatter into zeros": (
        lambda m, x: torch.zeros_like(x).scatter(3, x.argsort(3), x),
        lambda m, x: torch.zeros_like(x).add(x.gather(3, x.argsort(3).argsort(3))),
    ),
    "index_add_": (
        lambda m, x: m.conv(x).index_add_(1, torch.tensor([0, 2]), x[:, 1:3]),
        lambda m, x: m.conv(x) + torch.stack([x[:, 1], 0 * x[:, 0], x[:, 2], 0 * x[:, 0]], 1),
    ),
    # order, reuse, folding
    "layer used twice": (
        lambda m, x: m.conv(F.relu(m.conv(x))),
        lambda m, x: F.conv2d(
            F.relu(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)),
            m.conv.weight.clone(),
            m.conv.bias.clone(),
            padding=1,
        ),
    ),
    "activation module used twice": (
        lambda m, x: nn.Sequential(act := nn.ReLU(), m.conv, act)(x),
        lambda m, x: F.relu(m.conv(F.relu(x))),
    ),
    "batch norm before the convolution": (
        lambda m, x: m.one(m.bn(F.relu(x))),
        lambda m, x: m.fused_ahead(F.relu(x)),
    ),
    "batch norm registered elsewhere": (
        lambda m, x: m.bn2(m.conv(F.relu(m.bn(m.two(x))))),
        lambda m, x: nn.Sequential(m.two, m.bn, nn.ReLU(), m.conv, m.bn2)(x),
    ),
    "batch norm as F.batch_norm": (
        lambda m, x: F.batch_norm(
            m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias
        ),
        lambda m, x: m.bn(m.conv(x)),
    ),
    "batch norm folded by hand": (
        lambda m, x: m.bn(m.conv(x)),
        lambda m, x: m.fused(x),
    ),
    "batch norm used twice": (
        lambda m, x: (y := m.bn(m.conv(x))) + F.relu(y),
        lambda m, x: (y := m.fused(x)) + F.relu(y),
    ),
    "one batch norm for two convolutions": (
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.two(x)),
        lambda m, x: m.fused(x) + m.fused_two(x),
    ),
    "dense block": (_dense, _dense_plain),
    "u-net": (_unet, _unet_plain),
    "squeeze and excitation": (_excited, _excited_plain),
    # convolutions by hand
    "masked weight": (
        lambda m, x: F.conv2d(x, m.conv.weight * m.mask, m.conv.bias, padding=1),
        lambda m, x: F.conv2d(x, m.conv.weight.where(m.mask > 0, 0), m.conv.bias, padding=1),
    ),
    "standardized weight": (
        lambda m, x: F.conv2d(x, (m.two.weight - m.two.weight.mean()) / m.two.weight.std()),
        lambda m, x: F.conv2d(
            x, ((m.two.weight - m.two.weight.mean()) / m.two.weight.std()).detach().clone()
        ),
    ),
    "grouped by hand": (_grouped_by_hand, lambda m, x: m.grouped(x)),
    "depthwise by hand": (_depthwise_by_hand, lambda m, x: m.depthwise(x)),
    "padding by F.pad": (
        lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.conv.weight, m.conv.bias),
        lambda m, x: m.conv(x),
    ),
    "padding by name": (
        lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding="same"),
        lambda m, x: m.conv(x),
    ),
    "transposed convolution by pixel_shuffle": (
        lambda m, x: F.pixel_shuffle(
            F.conv2d(x, m.up.weight.permute(1, 2, 3, 0).reshape(16, 4, 1, 1)), 2
        ),
        lambda m, x: F.conv_transpose2d(x, m.up.weight, stride=2),
    ),
    # pools
    "adaptive pool as mean": (
        lambda m, x: F.adaptive_avg_pool2d(x, 1),
        lambda m, x: x.mean((2, 3), keepdim=True),
    ),
    "mean of means": (lambda m, x: x.mean(-1).mean(-1), lambda m, x: torch.mean(x, dim=(2, 3))),
    "sum over count": (
        lambda m, x: x.sum((-1, -2)) / (x.shape[-1] * x.shape[-2]),
        lambda m, x: nn.AdaptiveAvgPool2d(1)(x),
    ),
    "mean of a view": (lambda m, x: x.flatten(2).mean(2), lambda m, x: F.avg_pool2d(x, 6)),
    "einops reduce": (
        lambda m, x: reduce(x, "b c (h i) (w j) -> b c h w", "mean", i=2, j=2),
        lambda m, x: F.avg_pool2d(x, 2),
    ),
    "pool by a convolution": (_weighted_sum, lambda m, x: F.avg_pool2d(x, 2), LAYERS_DIFFER),
    "max pool by unfold": (_pooled_by_unfold, lambda m, x: nn.MaxPool2d(2)(x)),
    "max pool by amax": (
        lambda m, x: x.view(-1, 4, 3, 2, 3, 2).amax((3, 5)),
        lambda m, x: F.max_pool2d(x, 2),
    ),
    "einops max": (
        lambda m, x: reduce(x, "b c (h i) (w j) -> b c h w", "max", i=2, j=2),
        lambda m, x: F.max_pool2d(x, 2),
    ),
    "max pool with indices": (
        lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda m, x: F.max_pool2d(x, 2),
    ),
    # moves
    "pixel_shuffle by hand": (_shuffled_by_hand, lambda m, x: F.pixel_shuffle(x, 2)),
    "upsample by repetition": (
        lambda m, x: repeat(x, "b c h w -> b c (h i) (w j)", i=2, j=2),
        lambda m, x: nn.Upsample(scale_factor=2)(x),
    ),
    "nn.Upsample": (
        lambda m, x: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)(x),
        lambda m, x: F.interpolate(x, size=(12, 12), mode="bilinear"),
    ),
    "roll": (lambda m, x: x.roll(2, -1), lambda m, x: torch.cat([x[..., -2:], x[..., :-2]], -1)),
    "expanded": (
        lambda m, x: x[:, None].expand(-1, 3, -1, -1, -1),
        lambda m, x: x.unsqueeze(1).repeat(1, 3, 1, 1, 1),
    ),
    "unbound and stacked": (
        lambda m, x: torch.stack(x.unbind(1)[::-1], 1),
        lambda m, x: x.flip(1),
    ),
    "split": (
        lambda m, x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1),
        lambda m, x: x[:, [1, 2, 3, 0]],
    ),
    "indexed by tensors": (
        lambda m, x: x[:, torch.tensor([[0], [3]]), torch.tensor([1, 2]), ..., 1::2],
        lambda m, x: torch.stack([x[:, 0, 1:3], x[:, 3, 1:3]], 1)[..., [1, 3, 5]],
    ),
    "view(-1)": (
        lambda m, x: x.contiguous().view(-1).view(x.shape[0], -1),
        lambda m, x: nn.Flatten()(x),
    ),
    "channels last": (
        lambda m, x: m.conv(x.contiguous(memory_format=torch.channels_last)),
        lambda m, x: m.conv(x),
    ),
    "permuted there and back": (
        lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.one.weight[:, :, 0, 0]).movedim(-1, 1),
        lambda m, x: torch.einsum("oc,nchw->nohw", m.one.weight[:, :, 0, 0], x),
    ),
    "grid_sample": (
        lambda m, x: F.grid_sample(x, _half_grid(x), mode="bilinear", align_corners=False),
        lambda m, x: F.avg_pool2d(x, 2),
    ),
    # normalisations
    "group norm by hand": (_group_norm_by_hand, lambda m, x: m.gn(x)),
    "instance norm as group norm": (
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.group_norm(x, 4),
    ),
    # regions and loops
    "loop over samples": (_looped, lambda m, x: F.relu(m.conv(x))),
    "detached gate": (_cut, lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)).detach()),
    "no_grad beside a write into a slice": (_cut_beside_a_write, _cut_beside_a_sum),
    "autocast switched off": (_autocast_off, lambda m, x: F.relu(m.conv(x))),
    "checkpoint": (
        lambda m, x: checkpoint(lambda y: block(m, y), x, use_reentrant=False),
        block,
    ),
    "checkpoint, reentrant": (
        lambda m, x: checkpoint(lambda y: block(m, y), x, use_reentrant=True),
        block,
    ),
    "frozen batch norm": (
        lambda m, x: _frozen(m.bn, m.conv(F.relu(x))),
        lambda m, x: m.bn(m.conv(F.relu(x))),
        (*FOR_IMAGES, "no_bias"),
    ),
    "batch norm step by step": (
        lambda m, x: (
            (m.two(F.relu(x)) - m.bn.running_mean[:, None, None])
            / (m.bn.running_var + m.bn.eps).sqrt()[:, None, None]
            * m.bn.weight[:, None, None]
            + m.bn.bias[:, None, None]
        ),
        lambda m, x: m.bn(m.two(F.relu(x))),
        (*FOR_IMAGES, "no_bias"),
    ),
    "frozen behind a transposed convolution, and twice": (
        lambda m, x: _frozen(m.bn2, m.bn(_frozen(m.bn, m.up(F.relu(x))))),
        lambda m, x: F.conv_transpose2d(F.relu(x), *_scaled_up(m), stride=2),
        (*FOR_IMAGES, "no_bias"),
    ),
    "a bias by itself": (
        lambda m, x: m.conv.bias[:, None, None] + F.conv2d(F.relu(x), m.conv.weight, padding=1),
        lambda m, x: m.conv(F.relu(x)),
        (*FOR_IMAGES, "no_bias"),
    ),
    "padding by itself": (
        lambda m, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), m.conv.weight, m.conv.bias),
        lambda m, x: m.conv(x),
        FOR_PADDING,
    ),
    "padding of one side": (
        lambda m, x: F.conv2d(nn.ZeroPad2d((1, 2, 1, 1))(x), m.conv.weight, m.conv.bias),
        lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias, padding=(1, 2))[..., 1:],
        FOR_PADDING,
    ),
    "padding in steps": (
        lambda m, x: F.conv2d(
            F.pad(F.relu(F.pad(F.pad(x, (-1, 1, 2, 0)), (1, 0, -1, 1))), (0, 0, 0, 0)),
            m.conv.weight,
            m.conv.bias,
        ),
        lambda m, x: F.conv2d(
            F.pad(F.relu(x[..., 1:]), (1, 0)), m.conv.weight, m.conv.bias, padding=(1, 1)
        )[..., 1:],
        FOR_PADDING,
    ),
    "no bias: one per pixel": (
        lambda m, x: m.two(F.relu(x)) + m.mask[:, 0].repeat(1, 2, 2),
        lambda m, x: torch.add(m.two(F.relu(x)), m.mask[:, 0].repeat(1, 2, 2)[None]),
    ),
    "no bias: the convolution is read twice": (
        lambda m, x: (y := m.two(F.relu(x))) + m.bn.bias[:, None, None] + 2 * y,
        lambda m, x: (y := m.two(F.relu(x))) + m.bn.bias.view(1, 4, 1, 1) + y * 2,
    ),
    "dropout": (
        lambda m, x: F.dropout2d(F.dropout(x, 0.9, m.training), 0.5, m.training),
        lambda m, x: x,
    ),
    "stochastic depth": (
        lambda m, x: x + (m.conv(x) if not m.training or torch.rand(()) > 0.5 else 0),
        lambda m, x: x + m.conv(x),
    ),
}


def _half_grid(x: Tensor) -> Tensor:
    """Sampling points midway between four pixels: the average of 2 by 2."""
    theta = torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.affine_grid(theta, [x.shape[0], 4, 3, 3], align_corners=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpoint
@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: tuple[Any, ...]) -> None:
    spelled, plain, rules = (*case, FOR_IMAGES)[:3]
    assert_same(image_model(spelled), image_model(plain), normal(2, 2, 6, 6), rules)


# -- rows: between two linear layers --------------------------------------------------------------


def row_model(fn: Forward) -> nn.Module:
    return between(
        fn,
        drawn(nn.Linear(6, 8), seed=5),
        (6,),
        fc=drawn(nn.Linear(8, 8), seed=6),
        two=drawn(nn.Linear(8, 8, bias=False), seed=7),
        slim=drawn(nn.Linear(8, 4), seed=8),
        bilinear=drawn(nn.Bilinear(8, 4, 5, bias=False), seed=9),
        norm=drawn(nn.LayerNorm(8), seed=10),
        rms=drawn(nn.RMSNorm(8, eps=1e-6), seed=11),
        bn=drawn(nn.BatchNorm1d(8), seed=12),
        constant=normal(8, seed=13),
        rnn=drawn(nn.RNNCell(8, 4), seed=14),
        gru=drawn(nn.GRUCell(8, 4), seed=15),
        lstm=drawn(nn.LSTMCell(8, 4), seed=16),
    )


def _layer_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + m.norm.eps).sqrt() * m.norm.weight + m.norm.bias


def _gru_by_hand(gru: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    above, state = F.linear(x, gru.weight_ih, gru.bias_ih), F.linear(h, gru.weight_hh, gru.bias_hh)
    (r, z, n), (r_h, z_h, n_h) = above.chunk(3, 1), state.chunk(3, 1)
    z = (z + z_h).sigmoid()
    return (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h


def _routed(m: Any, x: Tensor) -> Tensor:
    return x.gather(1, x.topk(3, dim=1).indices)


def _mixed(m: Any, x: Tensor) -> Tensor:
    """Mixture of experts: the best of three by a router whose choice counts as a constant."""
    experts = torch.stack([m.fc(x), m.two(x), x], 1)
    best = m.slim(x)[:, :3].argmax(1)
    return experts[torch.arange(x.shape[0]), best]


def _mixed_plain(m: Any, x: Tensor) -> Tensor:
    experts = torch.stack([m.fc(x), m.two(x), x], 1)
    chosen = F.one_hot(m.slim(x)[:, :3].argmax(1), 3)
    return experts.where(chosen[..., None] > 0, 0.0).sum(1)


def _lstm_cell(m: Any, x: Tensor) -> Tensor:
    """LSTMCell written out of ops, from a state of zeros, two steps."""
    h = c = x.new_zeros(x.shape[0], 4)
    for _ in range(2):
        gates = F.linear(x, m.lstm.weight_ih, m.lstm.bias_ih)
        gates = gates + F.linear(h, m.lstm.weight_hh, m.lstm.bias_hh)
        i, f, g, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


def _lstm_cell_otherwise(m: Any, x: Tensor) -> Tensor:
    """The same by four pairs of linear layers, and in-place sums."""
    h, c = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
    w, u = (t.split(4) for t in (m.lstm.weight_ih, m.lstm.weight_hh))
    b, d = (t.split(4) for t in (m.lstm.bias_ih, m.lstm.bias_hh))
    for _ in range(2):
        gates = [F.linear(x, w[k], b[k]).add_(F.linear(h, u[k], d[k])) for k in range(4)]
        i, f, o = (gates[k].sigmoid_() for k in (0, 1, 3))
        c = c.mul(f).add_(i * gates[2].tanh())
        h = o * c.tanh()
    return h


ROWS: dict[str, tuple[Any, ...]] = {
    "F.linear": (
        lambda m, x: F.linear(F.relu(x), m.fc.weight, m.fc.bias),
        lambda m, x: m.fc(F.relu(x)),
    ),
    "x @ W": (lambda m, x: x @ m.two.weight.T, lambda m, x: m.two(x)),
    "x @ W + b": (
        lambda m, x: F.relu(x) @ m.fc.weight.T + m.fc.bias,
        lambda m, x: m.fc(F.relu(x)),
        (*FOR_ROWS, "no_bias"),
    ),
    "einsum and a bias": (
        lambda m, x: torch.einsum("ni,oi->no", F.relu(x), m.fc.weight) + m.fc.bias,
        lambda m, x: m.fc(F.relu(x)),
        (*FOR_ROWS, "no_bias"),
    ),
    "a layer's outputs scaled": (
        lambda m, x: m.fc(F.relu(x)) / m.constant * m.norm.weight - m.norm.bias,
        lambda m, x: F.linear(
            F.relu(x),
            m.fc.weight * (m.norm.weight / m.constant)[:, None],
            m.fc.bias * m.norm.weight / m.constant - m.norm.bias,
        ),
        (*FOR_ROWS, "no_bias"),
    ),
    "(W @ x')'": (lambda m, x: (m.two.weight @ x.T).T, lambda m, x: m.two(x)),
    "matmul with a column": (
        lambda m, x: torch.matmul(m.two.weight, x[..., None]).squeeze(-1),
        lambda m, x: m.two(x),
    ),
    "einsum": (lambda m, x: torch.einsum("ni,oi->no", x, m.two.weight), lambda m, x: m.two(x)),
    "einsum without an arrow": (
        lambda m, x: torch.einsum("ni, oi", x, m.two.weight),
        lambda m, x: m.two(x),
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.two.weight, dims=([1], [1])),
        lambda m, x: m.two(x),
    ),
    "inner": (lambda m, x: torch.inner(x, m.two.weight), lambda m, x: m.two(x)),
    "addmm": (lambda m, x: torch.addmm(m.fc.bias, x, m.fc.weight.T), lambda m, x: m.fc(x)),
    "addmm with a live summand": (
        lambda m, x: torch.addmm(x, x, m.two.weight.T, beta=0.5, alpha=2.0),
        lambda m, x: 0.5 * x + 2.0 * m.two(x),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, None], x[:, None], m.two.weight.T.expand(x.shape[0], 8, 8)),
        lambda m, x: (x + m.two(x))[:, None],
    ),
    "baddbmm of live factors": (
        lambda m, x: torch.baddbmm(
            x[:, None], m.two(x)[:, :, None].mT, x.view(-1, 8, 1) @ x[:, None, :], beta=0.5, alpha=2
        ),
        lambda m, x: (
            0.5 * x[:, None] + 2 * (m.two(x)[:, None] @ (x.view(-1, 8, 1) @ x[:, None, :]))
        ),
    ),
    "addbmm": (
        lambda m, x: torch.addbmm(x, x[None], m.two.weight.T[None]),
        lambda m, x: x + m.two(x),
    ),
    "outer": (
        lambda m, x: torch.stack([torch.outer(row, row[:3]) for row in x]),
        lambda m, x: x[:, :, None] * x[:, None, :3],
    ),
    "dot": (
        lambda m, x: torch.stack([torch.dot(row, m.constant) for row in x])[:, None],
        lambda m, x: x @ m.constant[:, None],
    ),
    "mv": (
        lambda m, x: torch.mv(x, m.constant)[:, None],
        lambda m, x: F.linear(x, m.constant[None]),
    ),
    "bilinear": (
        lambda m, x: m.bilinear(x, x[:, 4:]),
        lambda m, x: torch.einsum("ni,oij,nj->no", x, m.bilinear.weight, x[:, 4:]),
    ),
    "1 - x": (lambda m, x: 1 - x, lambda m, x: -x + torch.ones((), dtype=x.dtype)),
    "x - c": (lambda m, x: x - m.constant, lambda m, x: torch.add(x, m.constant, alpha=-1)),
    "division": (lambda m, x: x / m.constant / 4, lambda m, x: x * (1 / m.constant) * 0.25),
    "true_divide": (lambda m, x: torch.true_divide(x, 2), lambda m, x: 0.5 * x),
    "div_": (lambda m, x: x.div_(m.constant), lambda m, x: x / m.constant),
    "x ** 3": (lambda m, x: torch.pow(x, 3), lambda m, x: x * x * x),
    "sqrt of a power": (lambda m, x: (x * x + 1) ** 0.5, lambda m, x: torch.sqrt(x.square() + 1)),
    "swiglu": (
        lambda m, x: F.silu(m.fc(x)) * m.two(x),
        lambda m, x: m.two(x) * ((gate := m.fc(x)) * torch.sigmoid(gate)),
    ),
    "glu": (
        lambda m, x: nn.GLU()(x),
        lambda m, x: operator.mul(x.chunk(2, -1)[0], torch.sigmoid(x.chunk(2, -1)[1])),
    ),
    "layer norm by hand": (_layer_norm_by_hand, lambda m, x: m.norm(x)),
    "layer norm in one op less": (
        lambda m, x: F.layer_norm(x, (8,)) * m.norm.weight + m.norm.bias,
        lambda m, x: m.norm(x),
    ),
    "rms norm by hand": (
        lambda m, x: m.rms.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.rms(x),
    ),
    **{
        f"rms norm by hand, {name}": (
            lambda m, x, inverse=inverse: m.rms.weight * (x * inverse(x)),
            lambda m, x: m.rms(x),
        )
        for name, inverse in {
            "unsqueezed": lambda x: torch.rsqrt(x.pow(2).mean(-1) + 1e-6)[:, None],
            "reshaped": lambda x: torch.rsqrt(x.pow(2).mean(-1) + 1e-6).view(-1, 1),
            "einsum": lambda x: torch.rsqrt(torch.einsum("nd,nd->n", x, x) / 8 + 1e-6)[:, None],
            "clamped": lambda x: torch.rsqrt((x * x).mean(1, True).clamp(min=0.0) + 1e-6),
            "transposed": lambda x: torch.rsqrt(x.T.pow(2).mean(0, keepdim=True) + 1e-6).T,
            "repeated": lambda x: torch.rsqrt((x * x).mean(1, True) + 1e-6).repeat(1, 8),
            "matmul": lambda x: torch.rsqrt((x[:, None] @ x[..., None])[..., 0] / 8 + 1e-6),
            "pooled": lambda x: torch.rsqrt(F.adaptive_avg_pool1d(x * x, 1) + 1e-6),
        }.items()
    },
    "layer norm by moments": (
        lambda m, x: (
            (x - x.mean(-1, keepdim=True))
            * torch.rsqrt(x.square().mean(1, True) - x.mean(1, True) ** 2 + m.norm.eps)
            * m.norm.weight
            + m.norm.bias
        ),
        lambda m, x: m.norm(x),
    ),
    "rms norm of energies by hand": (
        lambda m, x: (e := x[:, None].square().mean(1)) * (e.square().mean(1, True) + 1e-6) ** -0.5,
        lambda m, x: F.rms_norm(x[:, None].square().mean(1), (8,), eps=1e-6),
    ),
    "times an inverse": (
        lambda m, x: m.fc(x) * (1 / m.two(x).abs().amax(1, keepdim=True)),
        lambda m, x: m.fc(x) / m.two(x).abs().amax(1, keepdim=True),
    ),
    "an energy over its mean": (
        lambda m, x: (
            m.fc(x) * ((e := x.view(-1, 4, 2).square().mean(1)) / (2 * e.mean(1, True)))[:, :1]
        ),
        lambda m, x: m.fc(x) * ((e := x.view(-1, 4, 2).square().mean(1)) / e.sum(1, True))[:, :1],
    ),
    "softmax by hand": (
        lambda m, x: m.two(x) * ((e := m.fc(x).exp()) / e.sum(1, keepdim=True)),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax by hand, in range": (
        lambda m, x: (
            (e := ((s := m.fc(x)) - s.amax(-1, keepdim=True)).exp())
            * (1 / e.sum(-1)[:, None])
            * m.two(x)
        ),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "divided by the size of the batch": (
        lambda m, x: m.fc(x) / x.shape[0] + (m.two(x) - x.shape[0]).softmax(1),
        lambda m, x: m.fc(x) / 3 + m.two(x).softmax(1),
    ),
    "no relu and no softplus: of integers, and of what is not a number": (
        lambda m, x: (
            m.fc(x)
            + torch.log1p(torch.exp(torch.arange(8)))
            + torch.arange(-3, 5).clamp(min=0)
            + torch.where((y := (m.two(x) - 99).sqrt()) > 0, y, 0.0)
        ),
        lambda m, x: (
            m.fc(x)
            + torch.tensor([max(k, 0.0) for k in range(-3, 5)], dtype=x.dtype)
            + torch.log1p(torch.exp(torch.arange(8)))
        ),
    ),
    "softmax less the largest of all": (
        lambda m, x: m.two(x) * ((s := m.fc(x)) - s.detach().max()).softmax(1),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax by hand, less the mean": (
        lambda m, x: (
            (e := ((s := m.fc(x)) - s.mean(-1, keepdim=True)).exp()) / e.sum(1, True) * m.two(x)
        ),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "norm that keeps the mean": (
        lambda m, x: (
            (mean := m.fc(x).mean(1, True))
            + (c := m.fc(x) - mean) * (c.square().mean(1, True) + 1e-5).rsqrt()
        ),
        lambda m, x: (
            (mean := m.fc(x).mean(1, True))
            + (c := m.fc(x) - mean) / (c.square().mean(1, True) + 1e-5).sqrt()
        ),
    ),
    "difference over a divisor": (
        lambda m, x: x + (m.fc(x) - x) * (1 / (1 + m.two(x) ** 2)),
        lambda m, x: x + (m.fc(x) - x) / (1 + m.two(x) ** 2),
    ),
    "inverses in chunks": (
        lambda m, x: (r := (1 / (1 + m.two(x) ** 2)).chunk(2, 1))[0] * x[:, :4] + r[1] * m.slim(x),
        lambda m, x: x[:, :4] / (1 + (y := m.two(x) ** 2)[:, :4]) + m.slim(x) / (1 + y[:, 4:]),
    ),
    "piece of a product": (
        lambda m, x: (m.fc(x) * m.two(x)).chunk(2, 1)[0] * m.slim(x),
        lambda m, x: (m.fc(x) * m.two(x))[:, :4] * m.slim(x),
    ),
    "softmax by hand, exponentials twice": (
        lambda m, x: m.two(x) * ((s := m.fc(x)).exp() / s.exp().sum(1, keepdim=True)),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "softmax in range": (
        lambda m, x: m.two(x) * ((s := m.fc(x)) - s.amax(1, keepdim=True).detach()).softmax(1),
        lambda m, x: m.two(x) * m.fc(x).softmax(1),
    ),
    "no softmax: another dimension": (
        lambda m, x: (e := m.fc(x)[:, :4, None].exp() @ x[:, None, :4]) / e.sum(1)[:, :, None],
        lambda m, x: (e := m.fc(x)[:, :4, None].exp() @ x[:, None, :4]) / e.sum(1).unsqueeze(2),
    ),
    "sigmoid by hand": (
        lambda m, x: m.two(x) * (1 / (1 + torch.exp(-m.fc(x)))),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "sigmoid by hand, as a power": (
        lambda m, x: m.two(x) * (1 + torch.exp(-m.fc(x))) ** -1,
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "sigmoid by hand, as a divisor": (
        lambda m, x: m.two(x) / (1 + torch.exp(-m.fc(x))),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "hard sigmoid by hand": (
        lambda m, x: (
            m.two(x) * (F.relu6(m.fc(x) + 3) / 6) * ((m.slim(x) + 3).clamp(0, 6) * (1 / 6))[:, :1]
        ),
        lambda m, x: m.two(x) * F.hardsigmoid(m.fc(x)) * F.hardsigmoid(m.slim(x))[:, :1],
    ),
    "softplus by hand": (
        lambda m, x: torch.log(1 + m.fc(x).exp()) + torch.log1p(m.two(x).exp()),
        lambda m, x: F.softplus(m.fc(x)) + F.softplus(m.two(x)),
    ),
    "sum() of a list": (
        lambda m, x: sum([m.fc(x), 1 * m.two(x)]) / 1.0,
        lambda m, x: m.fc(x) + m.two(x),
    ),
    "variance and mean at once": (
        lambda m, x: (
            ((y := m.fc(x)) - (var_mean := torch.var_mean(y, 1, keepdim=True))[1])
            / (var_mean[0] + 1e-5).sqrt()
        ),
        lambda m, x: ((y := m.fc(x)) - y.mean(1, True)) / (y.var(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "a power that is learned": (
        lambda m, x: (m.fc(x).abs() + 1).pow(m.constant[:1]),
        lambda m, x: (m.constant[:1] * (m.fc(x).abs() + 1).log()).exp(),
    ),
    "sigmoid by hand, of the negative": (
        lambda m, x: m.two(x) * (1 / (1 + torch.exp(m.fc(x)))),
        lambda m, x: m.two(x) * (-m.fc(x)).sigmoid(),
    ),
    "sigmoid by hand, exponentials twice": (
        lambda m, x: m.two(x) * ((e := torch.exp(m.fc(x))) / (1 + e)),
        lambda m, x: m.two(x) * m.fc(x).sigmoid(),
    ),
    "three factors with views between": (
        lambda m, x: ((m.fc(x) * m.two(x)).view(-1, 2, 4) * x.view(-1, 2, 4) / 2).flatten(1),
        lambda m, x: m.fc(x) * m.two(x) * x / 2,
    ),
    "addmm with beta 0": (
        lambda m, x: torch.addmm(x * torch.nan, x, m.two.weight.T, beta=0),
        lambda m, x: m.two(x),
    ),
    "division by integers": (
        lambda m, x: x / torch.arange(1, 9),
        lambda m, x: x / torch.arange(1.0, 9.0, dtype=x.dtype),
    ),
    "lerp by hand": (
        lambda m, x: m.fc(x).sigmoid() * (m.two(x) - x) + x,
        lambda m, x: (1 - m.fc(x).sigmoid()) * x + m.fc(x).sigmoid() * m.two(x),
    ),
    "lerp from its end": (
        lambda m, x: x - m.fc(x).sigmoid() * (x - m.two(x)),
        lambda m, x: (1 - m.fc(x).sigmoid()) * x + m.fc(x).sigmoid() * m.two(x),
    ),
    "two lerps of one difference": (
        lambda m, x: (x + (d := m.two(x) - x) * m.fc(x).sigmoid()) * (x + d * m.slim(x)[:, :1]),
        lambda m, x: (
            torch.lerp(x, m.two(x), m.fc(x).sigmoid())
            * torch.lerp(x, m.two(x), m.slim(x)[:, :1].expand(-1, 8))
        ),
    ),
    "gru cell by its equation": (
        lambda m, x: m.gru(x, x[:, :4]),
        lambda m, x: _gru_by_hand(m.gru, x, x[:, :4]),
    ),
    "batch norm by hand": (
        lambda m, x: m.bn(m.fc(x)),
        lambda m, x: F.linear(
            x,
            m.fc.weight * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())[:, None],
            (m.fc.bias - m.bn.running_mean) * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())
            + m.bn.bias,
        ),
    ),
    "normalize": (
        lambda m, x: F.normalize(x, dim=-1),
        lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12),
    ),
    "cosine similarity": (
        lambda m, x: nn.CosineSimilarity(dim=1)(m.fc(x), x)[:, None],
        lambda m, x: (F.normalize(m.fc(x), dim=1) * F.normalize(x, dim=1)).sum(1, keepdim=True),
    ),
    "cosine similarity to prototypes": (
        lambda m, x: F.cosine_similarity(x[:, None], m.two.weight[None], dim=-1),
        lambda m, x: F.linear(F.normalize(x), F.normalize(m.two.weight)),
        LAYERS_DIFFER,
    ),
    "top-k by gather": (_routed, lambda m, x: x.topk(3, dim=1).values),
    "routed experts": (_mixed, _mixed_plain),
    "index_select": (
        lambda m, x: torch.index_select(x, 1, torch.tensor([5, 0, 0])),
        lambda m, x: torch.stack([x[:, 5], x[:, 0], x[:, 0]], 1),
    ),
    "lambda as a module": (
        lambda m, x: Apply(lambda _, y: F.relu(y))(m.fc(x)),
        lambda m, x: F.relu(m.fc(x)),
    ),
    "functools.partial": (
        lambda m, x: functools.partial(F.leaky_relu, negative_slope=0.2)(x),
        lambda m, x: nn.LeakyReLU(0.2)(x),
    ),
    "keyword call": (lambda m, x: m.fc(input=F.relu(input=x)), lambda m, x: m.fc(F.relu(x))),
    "forward called directly": (lambda m, x: m.fc.forward(x), lambda m, x: m.fc(x)),
    "nested Sequential": (
        lambda m, x: nn.Sequential(nn.Sequential(m.fc, nn.Sequential(nn.ReLU())), m.two)(x),
        lambda m, x: m.two(F.relu(m.fc(x))),
    ),
    "nn.Identity": (
        lambda m, x: nn.Sequential(nn.Identity(), m.fc, nn.Identity(), nn.Dropout().eval())(x),
        lambda m, x: m.fc(x),
    ),
    "weights tied across a transpose": (
        lambda m, x: F.linear(F.relu(F.linear(x, m.slim.weight)), m.slim.weight.t()),
        lambda m, x: F.relu(x @ m.slim.weight.T) @ m.slim.weight.clone(),
    ),
    "LSTM cell by hand": (_lstm_cell, _lstm_cell_otherwise),
    "running mean": (
        lambda m, x: torch.stack([x[:, : i + 1].mean(1) for i in range(8)], 1),
        lambda m, x: x @ (torch.ones(8, 8, dtype=x.dtype).triu() / torch.arange(1, 9)),
        LAYERS_DIFFER,
    ),
    "non-contiguous": (
        lambda m, x: m.fc(torch.stack([x, x], -1)[..., 0]),
        lambda m, x: m.fc(x),
    ),
}


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_rows(case: tuple[Any, ...]) -> None:
    spelled, plain, rules = (*case, FOR_ROWS)[:3]
    assert_same(row_model(spelled), row_model(plain), normal(3, 6), rules)


# -- tokens: attention ----------------------------------------------------------------------------


def token_model(fn: Forward) -> nn.Module:
    layer = drawn(nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), seed=11)
    return between(
        fn,
        drawn(nn.Linear(4, 8), seed=5),
        (5, 4),
        q=drawn(nn.Linear(8, 8), seed=6),
        k=drawn(nn.Linear(8, 8), seed=7),
        v=drawn(nn.Linear(8, 8), seed=8),
        out=drawn(nn.Linear(8, 8), seed=9),
        mha=drawn(nn.MultiheadAttention(8, 2, batch_first=True), seed=10),
        late=drawn(nn.MultiheadAttention(8, 2), seed=10),
        layer=layer,
        encoder=nn.TransformerEncoder(layer, 1).eval(),
        pre=drawn(nn.TransformerEncoderLayer(8, 2, 6, norm_first=True, batch_first=True), seed=11),
        heads=normal(2, 4, 3, seed=12),
    )


def heads(x: Tensor) -> Tensor:
    """(N, T, 8) -> (N, 2, T, 4)."""
    return x.view(*x.shape[:2], 2, 4).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of two heads, plainly: (N, T, 8) each."""
    q, k, v = heads(q), heads(k), heads(v)
    weights = torch.softmax((q @ k.transpose(-2, -1)) * 0.5, -1)
    return (weights @ v).transpose(1, 2).reshape(q.shape[0], -1, 8)


def _mha_plain(m: Any, x: Tensor) -> Tensor:
    a = m.mha
    q, k, v = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    return F.linear(attend(q, k, v), a.out_proj.weight, a.out_proj.bias)


def _rearranged(m: Any, x: Tensor) -> Tensor:
    q, k, v = (rearrange(f(x), "n t (h d) -> n h t d", h=2) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return rearrange(y, "n h t d -> n t (h d)")


def _fused_projection(m: Any, x: Tensor) -> Tensor:
    weight = torch.cat([m.q.weight, m.k.weight, m.v.weight])
    bias = torch.cat([m.q.bias, m.k.bias, m.v.bias])
    q, k, v = F.linear(x, weight, bias).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.mT).div(2).softmax(dim=-1)
    return (weights @ v).permute(0, 2, 1, 3).flatten(2)


def _one_head_at_a_time(m: Any, x: Tensor) -> Tensor:
    parts = []
    for q, k, v in zip(*(f(x).split(4, -1) for f in (m.q, m.k, m.v)), strict=True):
        parts.append(torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul_(0.5).softmax(-1), v))
    return torch.cat(parts, -1)


def _causal_by_masked_fill_(m: Any, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).mT / 8**0.5
    scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ m.v(x)


def _causal(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), is_causal=True)


def _encoder_plain(m: Any, x: Tensor) -> Tensor:
    n = m.layer
    a = n.self_attn
    q, k, v = F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    x = n.norm1(x + a.out_proj(attend(q, k, v)))
    return n.norm2(x + n.linear2(F.relu(n.linear1(x))))


def _pre_norm_plain(m: Any, x: Tensor) -> Tensor:
    n = m.pre
    a = n.self_attn
    q, k, v = F.linear(n.norm1(x), a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
    x = x + a.out_proj(attend(q, k, v))
    return x + n.linear2(F.relu(n.linear1(n.norm2(x))))


def _linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1
    return torch.einsum("ntd,nde->nte", q, torch.einsum("nsd,nse->nde", k, m.v(x)))


TOKENS: dict[str, tuple[Any, ...]] = {
    "sdpa": (_rearranged, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "fused projection": (_fused_projection, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "one head at a time": (_one_head_at_a_time, lambda m, x: attend(m.q(x), m.k(x), m.v(x))),
    "MultiheadAttention": (lambda m, x: m.mha(x, x, x)[0], _mha_plain),
    "MultiheadAttention without weights": (
        lambda m, x: m.mha(x, x, x, need_weights=False)[0],
        _mha_plain,
    ),
    "MultiheadAttention, time first": (
        lambda m, x: m.late(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
        lambda m, x: m.mha(x, x, x)[0],
    ),
    "MultiheadAttention by F": (
        lambda m, x: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            8,
            2,
            m.mha.in_proj_weight,
            m.mha.in_proj_bias,
            None,
            None,
            False,
            0.0,
            m.mha.out_proj.weight,
            m.mha.out_proj.bias,
            training=False,
        )[0].transpose(0, 1),
        _mha_plain,
    ),
    "causal by masked_fill_": (_causal_by_masked_fill_, _causal),
    "TransformerEncoderLayer": (lambda m, x: m.layer(x), _encoder_plain),
    "TransformerEncoderLayer, norm first": (lambda m, x: m.pre(x), _pre_norm_plain),
    "TransformerEncoder": (lambda m, x: m.encoder(x), _encoder_plain),
    "linear attention": (
        _linear_attention,
        lambda m, x: (1 + F.elu(m.q(x))) @ ((1 + F.elu(m.k(x))).mT @ m.v(x)),
    ),
    "normalised linear attention": (
        lambda m, x: torch.einsum(
            "ntd,nt->ntd",
            _linear_attention(m, x),
            1 / torch.einsum("ntd,nd->nt", F.elu(m.q(x)) + 1, (F.elu(m.k(x)) + 1).sum(1)),
        ),
        lambda m, x: (
            _linear_attention(m, x)
            / ((F.elu(m.q(x)) + 1) * (F.elu(m.k(x)) + 1).sum(1, keepdim=True)).sum(2, keepdim=True)
        ),
    ),
    "projection per head by einsum": (
        lambda m, x: torch.einsum("nthd,hde->nhte", x.view(-1, 5, 2, 4), m.heads),
        lambda m, x: torch.stack(
            [F.linear(x[..., 4 * h : 4 * h + 4], m.heads[h].T) for h in range(2)], 1
        ),
    ),
    "linear layer by einsum with an ellipsis": (
        lambda m, x: torch.einsum("...i,oi->...o", x, m.q.weight) + m.q.bias,
        lambda m, x: x.matmul(m.q.weight.mT).add_(m.q.bias),
    ),
    "one by one convolution": (
        lambda m, x: F.conv1d(x.transpose(1, 2), m.q.weight[..., None]).transpose(1, 2),
        lambda m, x: F.linear(x, m.q.weight),
    ),
}


@pytest.mark.parametrize("case", TOKENS.values(), ids=TOKENS)
def test_tokens(case: tuple[Any, ...]) -> None:
    spelled, plain, rules = (*case, FOR_TOKENS)[:3]
    assert_same(token_model(spelled), token_model(plain), normal(2, 5, 4), rules)


# -- whole models: registration, hooks, wrappers, inputs and outputs -------------------------------


def layers() -> dict[str, Any]:
    """Two convolutions and a head, the same at every call."""
    return dict(
        first=drawn(nn.Conv2d(2, 4, 3, padding=1), seed=5),
        second=drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6),
        head=drawn(nn.Linear(4, 3), seed=7),
    )


def net(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.first(x))
    y = F.relu(m.second(y) + y)
    return m.head(y.mean((2, 3)))


def plain_net() -> nn.Module:
    return Apply(net, **layers())


def _registered_backwards() -> nn.Module:
    return Apply(net, **dict(reversed(layers().items())))


def _in_a_shuffled_list() -> nn.Module:
    first, second, head = layers().values()

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.all[2](x))
        y = F.relu(m.all[1](y) + y)
        return m.all[0](y.mean((2, 3)))

    return Apply(forward, all=nn.ModuleList([head, second, first]))


def _in_a_dict() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        order = sorted(m.all)  # first, head, second
        y = m.all[order[0]](x).relu()
        y = F.relu(m.all[order[2]](y) + y)
        return m.all[order[1]](y.mean((2, 3)))

    return Apply(forward, all=nn.ModuleDict(reversed(layers().items())))


def _hidden_in_a_list() -> nn.Module:
    """Not registered: no hook finds these, and neither does ``parameters()``."""
    hidden = list(layers().values())

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(hidden[0](x))
        return hidden[2](F.relu(hidden[1](y) + y).mean((2, 3)))

    return Apply(forward)


def _hidden_in_an_attribute() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.table["first"](x))
        return m.table["head"](F.relu(m.table["second"](y) + y).mean((2, 3)))

    return Apply(forward, table=layers())


def _wrapped() -> nn.Module:
    return Apply(lambda m, x: m.module(x), module=plain_net())


def _with_idle_hooks() -> nn.Module:
    model = plain_net()
    for module in model.modules():
        module.register_forward_hook(lambda m, args, output: None)
        module.register_forward_pre_hook(lambda m, args: None)
        module.register_full_backward_hook(lambda m, before, after: None)
    return model


def _scaled_by_a_hook() -> nn.Module:
    model = plain_net()
    model.first.register_forward_pre_hook(lambda m, args: (args[0] * 2 - 1,))
    model.second.register_forward_hook(lambda m, args, output: output * 0.5)
    return model


def _scaled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.first(x * 2 - 1))
        return m.head(F.relu(m.second(y) * 0.5 + y).mean((2, 3)))

    return Apply(forward, **layers())


def _compiled_inside() -> nn.Module:
    parts = layers()
    parts["first"] = torch.compile(parts["first"], backend="eager")
    return Apply(net, **parts)


def _odd_names() -> nn.Module:
    model = nn.Module()
    for name, layer in zip(("a-1", "1 x", "ü"), layers().values(), strict=True):
        model.add_module(name, layer)

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second, head = m.inner.children()
        y = F.relu(first(x))
        return head(F.relu(second(y) + y).mean((2, 3)))

    return Apply(forward, inner=model)


def _tied() -> nn.Module:
    parts = layers()
    parts["second"] = drawn(nn.Conv2d(4, 4, 3, padding=1), seed=6)
    parts["other"] = nn.Conv2d(4, 4, 3, padding=1).double()
    parts["other"].weight, parts["other"].bias = parts["second"].weight, parts["second"].bias
    return Apply(lambda m, x: m.other(F.relu(m.second(F.relu(m.first(x))))), **parts)


def _untied() -> nn.Module:
    return Apply(lambda m, x: m.second(F.relu(m.second(F.relu(m.first(x))))), **layers())


def _normed(norm: Callable[..., nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A network with a parametrized convolution, and one with the weight that comes out."""
    torch.manual_seed(0)
    parts = layers()
    parts["second"] = norm(nn.Conv2d(4, 4, 3, padding=1).double()).eval()
    parts["second"](normal(1, 4, 3, 3))  # the old weight_norm computes the weight in a hook
    weight = parts["second"].weight.detach().clone()
    bias = parts["second"].bias.detach().clone()
    plain = nn.Conv2d(4, 4, 3, padding=1).double()
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return Apply(net, **parts), Apply(net, **{**layers(), "second": plain})


Two = namedtuple("Two", ["logits", "features"])


@dataclasses.dataclass
class Inner:
    logits: Tensor


@dataclasses.dataclass
class Outer:
    inner: Inner
    extra: list[Inner]


def _returning(wrap: Callable[[Tensor], Any]) -> tuple[nn.Module, nn.Module]:
    return Apply(lambda m, x: wrap(net(m, x)), **layers()), plain_net()


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "registered backwards": lambda: (_registered_backwards(), plain_net()),
    "shuffled ModuleList": lambda: (_in_a_shuffled_list(), plain_net()),
    "ModuleDict": lambda: (_in_a_dict(), plain_net()),
    "modules in a Python list": lambda: (_hidden_in_a_list(), plain_net()),
    "modules in a Python dict": lambda: (_hidden_in_an_attribute(), plain_net()),
    "wrapper": lambda: (_wrapped(), plain_net()),
    "hooks that change nothing": lambda: (_with_idle_hooks(), plain_net()),
    "hooks that change input and output": lambda: (_scaled_by_a_hook(), _scaled()),
    "compiled submodule": lambda: (_compiled_inside(), plain_net()),
    "names that are no identifiers": lambda: (_odd_names(), plain_net()),
    "tied weights": lambda: (_tied(), _untied()),
    "weight_norm": lambda: _normed(parametrizations.weight_norm),
    "weight_norm, old": lambda: _normed(torch.nn.utils.weight_norm),
    "spectral_norm": lambda: _normed(parametrizations.spectral_norm),
    "spectral_norm, old": lambda: _normed(torch.nn.utils.spectral_norm),
    "orthogonal": lambda: _normed(parametrizations.orthogonal),
    "dict output": lambda: _returning(lambda y: {"logits": y, "loss": None}),
    "tuple output": lambda: _returning(lambda y: (y, y.detach())),
    "list output": lambda: _returning(lambda y: [y]),
    "namedtuple output": lambda: _returning(lambda y: Two(y, [y.argmax(1)])),
    "nested dataclass output": lambda: _returning(lambda y: Outer(Inner(y), [Inner(y + 1)])),
    "dataclass in a dict": lambda: _returning(lambda y: {"out": Inner(y)}),
    "model in double": lambda: (plain_net().double().eval().requires_grad_(False), plain_net()),
}


@pytest.mark.filterwarnings("ignore")  # the old weight_norm, and hooks on what is traced
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    spelled, plain = make()
    x = normal(2, 2, 5, 5)

    def of(model: nn.Module, rules: str) -> tuple[Any, Tensor]:
        e = lrpfx.explain(model, x, lambda o: logits(o)[:, 1] * 2, rules=RULES[rules])
        return e.output, e.relevance

    for rules in FOR_IMAGES:
        (a, r), (b, expected) = of(spelled, rules), of(plain, rules)
        assert type(a) is type(spelled(x))
        assert close(logits(a), logits(b))
        assert expected.abs().max() > 1e-3
        assert close(r, expected), f"{rules}: {(r - expected).norm() / expected.norm():.1e}"


def logits(output: Any) -> Tensor:
    """The first tensor of an output that may be anything."""
    while not isinstance(output, Tensor):
        if isinstance(output, Outer):
            output = output.inner
        elif isinstance(output, Inner):
            output = output.logits
        else:
            output = output[next(iter(output))] if isinstance(output, dict) else output[0]
    return output.flatten(1)[:, :3]


# -- several inputs -------------------------------------------------------------------------------


def _siamese(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return m.head((m.body(a) - m.body(b)).flatten(1))


def _siamese_plain(m: Any, a: Tensor, b: Tensor) -> Tensor:
    one = F.relu(F.conv2d(a, m.body[0].weight, m.body[0].bias))
    two = F.relu(F.conv2d(b, m.body[0].weight, m.body[0].bias))
    return F.linear((one - two).flatten(1), m.head.weight, m.head.bias)


def _siamese_in_one_batch(m: Any, a: Tensor, b: Tensor) -> Tensor:
    one, two = m.body(torch.cat([a, b])).split(a.shape[0])
    return m.head((one - two).flatten(1))


INPUTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "siamese": (_siamese, _siamese_plain),
    "siamese in one batch": (_siamese_in_one_batch, _siamese_plain),
    "*args": (lambda m, *args: _siamese(m, *args), _siamese_plain),
    "two heads on one body": (
        lambda m, a, b: torch.stack([m.head(m.body(t).flatten(1)) for t in (a, b)]).sum(0),
        lambda m, a, b: m.head(m.body(a).flatten(1)) + m.head(m.body(b).flatten(1)),
    ),
}


@pytest.mark.parametrize(("spelled", "plain"), INPUTS.values(), ids=INPUTS)
def test_several_inputs(spelled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    members = dict(
        body=nn.Sequential(drawn(nn.Conv2d(2, 3, 3)), nn.ReLU(inplace=True)),
        head=drawn(nn.Linear(12, 3), seed=3),
    )
    inputs = (normal(2, 2, 4, 4), normal(2, 2, 4, 4, seed=8))
    assert_same(Apply(spelled, **members), Apply(plain, **members), inputs, FOR_IMAGES)


def test_embedding_bag_is_an_embedding_and_its_mean() -> None:
    ids = torch.tensor([[1, 2, 2], [0, 4, 3]])
    head = drawn(nn.Linear(4, 3))
    for mode, reduce_bag in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
        bag = drawn(nn.EmbeddingBag(6, 4, mode=mode))
        spelled = Apply(lambda m, ids: m.head(F.relu(m.bag(ids))), bag=bag, head=head)
        plain = Apply(
            lambda m, ids, f=reduce_bag: m.head(F.relu(f(F.embedding(ids, m.bag.weight), 1))),
            bag=bag,
            head=head,
        )
        r, expected = (lrpfx.explain(m, ids, 1, rules=RULES["gamma"]) for m in (spelled, plain))
        assert close(r.output, expected.output)
        assert close(r.relevance, expected.relevance) and expected.relevance.abs().max() > 1e-3
        assert close(r.embeddings, expected.embeddings)


# -- no twin: an independent expectation ----------------------------------------------------------


def test_a_piecewise_linear_net_without_biases_is_gradient_times_input() -> None:
    """LRP-0: of whatever spelling; here a recurrent loop with writes into a buffer of states."""
    w, u = normal(5, 3), normal(5, 5, seed=2)

    def forward(m: Any, x: Tensor) -> Tensor:
        states = x.new_zeros(x.shape[0], 5, 5)
        h = states[:, 0]
        for t in range(4):
            h = F.relu(x[:, t] @ m.w.T + h @ m.u.T)
            states[:, t + 1] = h
        return states[:, 1:].amax(1) + states.mean(1)

    x = normal(2, 4, 3)
    model = Apply(forward, w=w, u=u)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    r = lrpfx.explain(model, x, 2, rules=RULES["epsilon_all"]).relevance
    assert close(r, gradient * x)


def test_autocast_in_forward_is_right_to_its_own_precision() -> None:
    def cast(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(m, x)
        return y.float()

    parts = {name: layer.float() for name, layer in layers().items()}
    x = normal(2, 2, 5, 5).float()
    for rules in FOR_IMAGES:
        a, b = (
            lrpfx.explain(Apply(f, **parts), x, 1, rules=by_name(rules)).relevance
            for f in (cast, net)
        )
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.1 * b.norm()


def by_name(rules: str) -> str:
    """The composite with its usual stabilizer, which half precision needs."""
    return "epsilon_alpha2_beta1_flat" if rules == "alpha_beta_flat" else rules


def test_no_grad_around_a_transformer_changes_nothing() -> None:
    """There eager PyTorch takes a fused fast path that no hook sees."""
    layer = nn.TransformerEncoderLayer(8, 2, 6, batch_first=True)
    model, x = drawn(nn.TransformerEncoder(layer, 2)), normal(2, 5, 8)
    seed = normal(2, 5, 8, seed=3)
    expected = lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance
    with torch.no_grad():
        assert close(lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance, expected)
    with torch.inference_mode():
        assert close(lrpfx.explain(model, x, seed, rules=RULES["attnlrp"]).relevance, expected)


def test_two_forwards_before_one_backward() -> None:
    x, y = normal(2, 2, 5, 5), normal(3, 2, 5, 5, seed=9)
    explainer = lrpfx.Explainer(plain_net(), x, RULES["epsilon_plus"])
    expected = [explainer(t, 1).relevance for t in (x, y)]
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    outputs = [explainer.graph_module(leaf) for leaf in leaves]
    sum((o[:, 1] * o[:, 1].detach()).sum() for o in outputs).backward()
    for leaf, r in zip(leaves, expected, strict=True):
        assert close(leaf.grad, r)


def test_explanations_in_several_threads() -> None:
    inputs = [normal(2, 2, 5, 5, seed=s) for s in range(8)]
    explainer = lrpfx.Explainer(plain_net(), inputs[0], RULES["epsilon_plus"])
    expected = [explainer(x, 1).relevance for x in inputs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = explainer(inputs[i], 1).relevance

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(close(found[i], r) for i, r in enumerate(expected))


# -- refused, with the reason ---------------------------------------------------------------------


def _named(name: str) -> nn.Module:
    model = Apply(lambda m, x: next(m.children())(x))
    model.add_module(name, nn.Linear(6, 3).double())
    return model


def _loop_by_value(m: Any, x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "LSTM with dropout, in training": (
        lambda: Apply(
            lambda m, x: m.f(x[:, None])[0], f=nn.LSTM(6, 4, 2, dropout=0.5).double()
        ).train(),
        errors.TrainingModeError,
        r"training mode[\s\S]*f: lstm is random",
    ),
    "FFT": (
        lambda: Apply(lambda m, x: torch.fft.rfft(x).real),
        errors.UnsupportedOpError,
        r"no relevance rule[\s\S]*fft_rfft",
    ),
    "FFT mixing": (
        lambda: Apply(lambda m, x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=0).real),
        errors.UnsupportedOpError,
        r"no relevance rule[\s\S]*fft_fft",
    ),
    "grid_sample at places that depend on the input": (
        lambda: Apply(lambda m, x: F.grid_sample(x.view(-1, 1, 2, 3), x.view(-1, 3, 1, 2))),
        errors.UnsupportedOpError,
        "grid_sampler.default with live input and grid",
    ),
    "bags with offsets": (
        lambda: Apply(
            lambda m, x: m.bag((x[:, 0] > 0).long(), torch.tensor([0, 1])),
            bag=nn.EmbeddingBag(2, 3).double(),
        ),
        errors.UnsupportedOpError,
        "bags differ in size or have offsets",
    ),
    "a chunk written in place, which PyTorch refuses": (
        lambda: Apply(lambda m, x: m.f(x).chunk(2, 1)[0].relu_(), f=nn.Linear(6, 4).double()),
        errors.CaptureError,
        "is a view and is being modified inplace",
    ),
    "a name with quotes": (
        lambda: _named('the "first"'),
        errors.CaptureError,
        r'cannot stand in code[\s\S]*the "first"\.weight',
    ),
    "a name with a line break": (
        lambda: _named("two\nlines"),
        errors.CaptureError,
        r"cannot stand in code[\s\S]*two\\nlines\.weight",
    ),
    "a name that is a keyword": (
        lambda: _named("in"),
        errors.CaptureError,
        r"cannot stand in code[\s\S]*in\.weight",
    ),
    "a branch on values": (
        lambda: Apply(lambda m, x: x * 2 if x.sum() > 0 else x),
        errors.CaptureError,
        "branches on values",
    ),
    "a loop until a value": (
        lambda: Apply(_loop_by_value),
        errors.CaptureError,
        "branches on values",
    ),
    "everything detached": (
        lambda: Apply(lambda m, x: x.detach() * 2),
        errors.CaptureError,
        "no output of the model depends on the explained inputs",
    ),
    "numpy in between": (
        lambda: Apply(lambda m, x: torch.from_numpy(x.detach().numpy() * 2)),
        errors.CaptureError,
        "cannot trace",
    ),
    "scripted module": (
        lambda: Apply(lambda m, x: m.f(x), f=torch.jit.script(nn.Linear(6, 3).double())),
        errors.CaptureError,
        "scripted",
    ),
    "random numbers": (
        lambda: Apply(lambda m, x: x + torch.randn_like(x)),
        errors.CaptureError,
        "random numbers",
    ),
    "dropout in training": (
        lambda: Apply(lambda m, x: F.dropout(x)),
        errors.TrainingModeError,
        "dropout is random",
    ),
    "cumsum": (
        lambda: Apply(lambda m, x: x.cumsum(1)),
        errors.UnsupportedOpError,
        "aten.cumsum.default",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Callable[[], nn.Module], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lrpfx.explain(make(), normal(2, 6), rules=RULES["epsilon_all"])


# -- the table can fail ---------------------------------------------------------------------------

WRONG: dict[str, tuple[Forward, Forward]] = {
    # What tools that hook modules compute, as networks of the same output.
    "a residual counted twice": (
        lambda m, x: m.conv(x) + (2 * x - x.detach()),
        lambda m, x: m.conv(x) + x,
    ),
    "a gate held constant": (
        lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)),
        lambda m, x: m.conv(x) * torch.sigmoid(m.one(x)).detach(),
    ),
    "the first of two calls forgotten": (
        lambda m, x: m.conv(x) + m.conv(F.relu(x)),
        lambda m, x: m.conv(x).detach() + m.conv(F.relu(x)),
    ),
    "a bias in the wrong place": (
        lambda m, x: m.two(x) + x + m.conv.bias[:, None, None],
        lambda m, x: (m.two(x) + m.conv.bias[:, None, None]) + x,
    ),
    "an average that is a maximum": (
        lambda m, x: F.avg_pool2d(x, 2),
        lambda m, x: F.max_pool2d(x, 2),
    ),
}


@pytest.mark.parametrize(("wrong", "plain"), WRONG.values(), ids=WRONG)
def test_a_wrong_twin_is_caught(wrong: Forward, plain: Forward) -> None:
    with pytest.raises(AssertionError, match="relative error|different outputs"):
        assert_same(image_model(wrong), image_model(plain), normal(2, 2, 6, 6), FOR_IMAGES)


def test_relevance_off_by_a_thousandth_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lrpfx.Epsilon.propagate

    def wrong(self: Any, call: Any, x: Any, z: Any, R: Any) -> Any:
        flow = right(self, call, x, z, R)
        factor = 1.001 if "bias" in call.site.arguments else 1.0
        return dataclasses.replace(flow, relevance=tuple(r * factor for r in flow.relevance))

    spelled, plain = ROWS["x @ W"]
    assert_same(row_model(spelled), row_model(plain), normal(3, 6), FOR_ROWS)
    monkeypatch.setattr(lrpfx.Epsilon, "propagate", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(row_model(spelled), row_model(plain), normal(3, 6), LAYERS_DIFFER)


@pytest.mark.parametrize("rules", FOR_PADDING[1:])
def test_padding_by_an_amount_that_varies(rules: str) -> None:
    """As "same" padding by hand has it: so much as the size of the image asks for."""
    conv = drawn(nn.Conv2d(2, 3, 3, stride=2), seed=5)

    def forward(m: Any, x: Tensor) -> Tensor:
        missing = -x.shape[3] % 2 + 1
        return m.conv(F.pad(x, (0, missing, 1, missing))).mean((2, 3))

    model = Apply(forward, conv=conv)
    explainer = lrpfx.Explainer(model, normal(2, 2, 6, 6), RULES[rules], dynamic=(2, 3))
    for size in (6, 8):
        x = normal(2, 2, size, size)
        fixed = lrpfx.explain(Apply(forward, conv=conv), x, 1, rules=RULES[rules])
        for ledger in (True, False):
            assert close(explainer(x, 1, ledger=ledger).relevance, fixed.relevance)
