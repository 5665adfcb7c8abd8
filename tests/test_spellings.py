"""The same network, spelled as users spell it and plainly: the relevance is the same.

Each case is what users of tools that hook modules complain about: functional and in-place ops,
modules used twice, registered in another order, hidden in lists, gates, norms and convolutions
written by hand. What has no relevance is refused, with the reason.
"""

import dataclasses
import functools
import importlib
import operator
import threading
from collections import namedtuple
from collections.abc import Callable
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
from lrpfx.capture import Captured, capture
from tests.conftest import Apply

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
}
FOR_IMAGES = ("epsilon_all", "epsilon_plus", "alpha_beta_flat")
#: Where one of the twins is a conv or linear and the other is none, all rules but Epsilon differ.
LAYERS_DIFFER = ("epsilon_all",)
FOR_ROWS = ("epsilon_all", "gamma")
FOR_TOKENS = ("attnlrp", "gamma")


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace of a model serves all its rule sets: tracing is nine tenths of the time."""
    traces: dict[int, Captured] = {}

    def once(model: nn.Module, inputs: Any) -> Captured:
        if id(model) not in traces:
            traces[id(model)] = capture(model, inputs)
        return traces[id(model)]

    monkeypatch.setattr(importlib.import_module("lrpfx.explain"), "capture", once)


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


def between(fn: Forward, stem: nn.Module, shape: tuple[int, ...], **members: Any) -> nn.Module:
    """fn between a layer and a linear head, so that dead activations get no relevance."""
    model = Apply(lambda m, x: m.head(fn(m, m.stem(x)).flatten(1)), stem=stem, **members)
    with torch.no_grad():
        size = fn(model, stem(normal(2, *shape))).flatten(1).shape[1]
    model.head = drawn(nn.Linear(size, 3), seed=4)
    return model


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


IMAGES: dict[str, tuple[Any, ...]] = {
    # activations, functional and not
    "nn.ReLU": (lambda m, x: nn.ReLU()(x), lambda m, x: F.relu(x)),
    "nn.ReLU in place": (lambda m, x: nn.ReLU(inplace=True)(x), lambda m, x: F.relu(x)),
    "relu_": (lambda m, x: x.relu_(), lambda m, x: F.relu(x)),
    "F.relu in place": (lambda m, x: F.relu(x, inplace=True), lambda m, x: F.relu(x)),
    "clamp": (lambda m, x: x.clamp(min=0), lambda m, x: F.relu(x)),
    "clamp_": (lambda m, x: x.clamp_(min=0.0), lambda m, x: F.relu(x)),
    "clamp_min": (lambda m, x: torch.clamp_min(x, 0), lambda m, x: F.relu(x)),
    "clip": (lambda m, x: x.clip(0, None), lambda m, x: F.relu(x)),
    "maximum": (lambda m, x: torch.maximum(x, torch.zeros_like(x)), lambda m, x: F.relu(x)),
    "max(x, 0)": (lambda m, x: torch.max(x, x.new_zeros(())), lambda m, x: F.relu(x)),
    "where": (lambda m, x: torch.where(x > 0, x, 0.0), lambda m, x: F.relu(x)),
    "where with zeros": (
        lambda m, x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda m, x: F.relu(x),
    ),
    "times a mask": (lambda m, x: x * (x > 0), lambda m, x: F.relu(x)),
    "masked_fill": (lambda m, x: x.masked_fill(x < 0, 0.0), lambda m, x: F.relu(x)),
    "masked_fill_": (lambda m, x: x.masked_fill_(x < 0, 0.0), lambda m, x: F.relu(x)),
    "indexed by a mask": (lambda m, x: x.index_put((x < 0,), x.new_zeros(())), lambda m, x: F.relu(x)),
    "threshold": (lambda m, x: F.threshold(x, 0.0, 0.0), lambda m, x: F.relu(x)),
    "leaky with slope 0": (lambda m, x: F.leaky_relu(x, 0.0), lambda m, x: F.relu(x)),
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
            (slice(None), torch.tensor([0, 0])) and (torch.arange(2)[:, None], torch.tensor([0, 0])),
            x[:, :2],
            accumulate=True,
        ),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x[:, :1] + x[:, 1:2], m.conv(x)[:, 1:]], 1),
    ),
    "scatter_add": (
        lambda m, x: m.conv(x).scatter_add(1, torch.zeros_like(x, dtype=torch.long), x),
        lambda m, x: torch.cat([m.conv(x)[:, :1] + x.sum(1, keepdim=True), m.conv(x)[:, 1:]], 1),
    ),
    "scatter into zeros": (
        lambda m, x: torch.zeros_like(x).scatter(3, x.argsort(3), x),
        lambda m, x: torch.zeros_like(x).add(x.gather(3, x.argsort(3).argsort(3))),
    ),
    "index_add_": (
        lambda m, x: m.conv(x).index_add_(1, torch.tensor([0, 2]), x[:, 1:3]),
        lambda m, x: (
            m.conv(x)
            + torch.stack([x[:, 1], 0 * x[:, 0], x[:, 2], 0 * x[:, 0]], 1)
        ),
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
        lambda m, x: (
            m.fused(x)
            + m.fused_two(x)
        ),
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
    "(W @ x')'": (lambda m, x: (m.two.weight @ x.T).T, lambda m, x: m.two(x)),
    "matmul with a column": (
        lambda m, x: torch.matmul(m.two.weight, x[..., None]).squeeze(-1),
        lambda m, x: m.two(x),
    ),
    "einsum": (lambda m, x: torch.einsum("ni,oi->no", x, m.two.weight), lambda m, x: m.two(x)),
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
    "batch norm by hand": (
        lambda m, x: m.bn(m.fc(x)),
        lambda m, x: F.linear(
            x,
            m.fc.weight * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())[:, None],
            (m.fc.bias - m.bn.running_mean)
            * (m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt())
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
