"""Every op of the table, in the spellings that users write, against its plain twin or a law."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.ops import table as ops

# What each case checks. Every op, whatever its kind, stands between two linear maps with weights
# of both signs, so that its relevance is neither trivial nor symmetric.
Fn = Callable[[Tensor], Tensor]
#: Single in tests of files, as onnxruntime has few kernels for doubles.
DTYPE = torch.float64


class Between(nn.Module):
    """fn between an elementwise affine map and a linear head."""

    def __init__(self, fn: Fn, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fn = fn
        self.gain = nn.Parameter(torch.rand(shape, dtype=DTYPE) + 0.5)
        with torch.no_grad():
            size = fn(torch.zeros(2, *shape, dtype=DTYPE)).flatten(1).shape[1]
        self.head = nn.Linear(size, 3, bias=False, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fn(x * self.gain).flatten(1))


def gradient_times_input(model: nn.Module, x: Tensor, target: int) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[:, target].sum(), x)
    return (g * x).detach()


def samples(shape: tuple[int, ...], n: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, *shape, dtype=DTYPE)


IMAGE, SEQUENCE, VOLUME, ROW = (4, 6, 6), (4, 8), (2, 4, 4, 4), (8,)


@functools.cache  # a constant of the graph; drawn inside forward it would be random
def kernel(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(2))


def batched(x: Tensor) -> Tensor:
    return kernel(1, 6, 2).expand(len(x), 6, 2)


def grid(n: int) -> Tensor:
    return kernel(1, 3, 5, 2).expand(n, -1, -1, -1).tanh()


def groups(x: Tensor) -> Tensor:
    """Which of three groups each of 8 entries belongs to; nothing is in the second."""
    return torch.tensor([0, 0, 2, 0, 2, 2, 0, 2]).expand(len(x), 8)


def together(*parts: Tensor) -> Tensor:
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1)


# Linear ops without bias: LRP-0 is gradient times input exactly, whichever way it is spelled.
LINEAR: dict[str, tuple[tuple[int, ...], Fn]] = {
    "conv1d": (SEQUENCE, lambda x: F.conv1d(x, kernel(3, 4, 3), stride=2, padding=1)),
    "conv2d": (IMAGE, lambda x: F.conv2d(x, kernel(6, 2, 3, 3), padding=1, groups=2)),
    "conv2d strided": (IMAGE, lambda x: F.conv2d(x, kernel(3, 4, 2, 3), stride=(3, 2))),
    "conv2d dilated": (IMAGE, lambda x: F.conv2d(x, kernel(3, 4, 3, 3), padding=2, dilation=2)),
    "conv2d same": (IMAGE, lambda x: F.conv2d(x, kernel(3, 4, 3, 3), padding="same")),
    "conv2d same even": (IMAGE, lambda x: F.conv2d(x, kernel(3, 4, 2, 4), padding="same")),
    "conv2d valid": (IMAGE, lambda x: F.conv2d(x, kernel(3, 4, 3, 3), padding="valid")),
    "conv1d same": (SEQUENCE, lambda x: F.conv1d(x, kernel(3, 4, 4), padding="same", dilation=3)),
    "conv3d": (VOLUME, lambda x: F.conv3d(x, kernel(3, 2, 2, 2, 3), padding=(0, 1, 1))),
    "conv3d same": (VOLUME, lambda x: F.conv3d(x, kernel(3, 2, 2, 3, 1), padding="same")),
    "conv_transpose1d": (SEQUENCE, lambda x: F.conv_transpose1d(x, kernel(4, 3, 3), stride=2)),
    "conv_transpose2d": (
        IMAGE,
        lambda x: F.conv_transpose2d(
            x, kernel(4, 3, 3, 3), stride=2, padding=1, output_padding=1, groups=2
        ),
    ),
    "conv_transpose2d dilated": (
        IMAGE,
        lambda x: F.conv_transpose2d(x, kernel(4, 2, 3, 2), dilation=2, output_padding=1),
    ),
    "conv_transpose3d": (VOLUME, lambda x: F.conv_transpose3d(x, kernel(2, 3, 2, 2, 2), stride=2)),
    "linear": (ROW, lambda x: F.linear(x, kernel(5, 8))),
    "linear on images": (IMAGE, lambda x: F.linear(x, kernel(5, 6))),
    "x @ W": (ROW, lambda x: x @ kernel(8, 5)),
    "W @ x": (IMAGE, lambda x: kernel(5, 6) @ x),
    "mm": (ROW, lambda x: torch.mm(x, kernel(8, 5))),
    "bmm": ((4, 6), lambda x: torch.bmm(x, kernel(1, 6, 2).expand(x.shape[0], 6, 2))),
    "avg_pool1d": (SEQUENCE, lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "avg_pool2d": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "avg_pool2d without pads": (
        IMAGE,
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    ),
    "avg_pool3d": (VOLUME, lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool1d": (SEQUENCE, lambda x: F.adaptive_avg_pool1d(x, 3)),
    "adaptive_avg_pool2d": (IMAGE, lambda x: F.adaptive_avg_pool2d(x, (4, 1))),
    "adaptive_avg_pool3d": (VOLUME, lambda x: F.adaptive_avg_pool3d(x, 2)),
    "mean": (IMAGE, lambda x: x.mean((2, 3))),
    "mean keepdim": (IMAGE, lambda x: x.mean(1, keepdim=True)),
    "sum": (IMAGE, lambda x: x.sum(-1)),
    "add": (IMAGE, lambda x: x + x.flip(-1)),
    "add alpha": (IMAGE, lambda x: torch.add(x, x.roll(1, -1), alpha=0.5)),
    "add broadcast": (IMAGE, lambda x: x + x[:, :1]),
    "sub": (IMAGE, lambda x: x - 2 * x.flip(1)),
    "rsub": (IMAGE, lambda x: torch.rsub(x, x.flip(1))),
    "mul number": (IMAGE, lambda x: 3.0 * x * -0.5),
    "mul tensor": (IMAGE, lambda x: kernel(4, 1, 6) * x),
    "mul broadcast up": ((1, 6), lambda x: x * kernel(4, 1)),
    "div": (IMAGE, lambda x: x / kernel(6) / 3),
    "neg": (IMAGE, lambda x: -x),
    "upsample bilinear": (IMAGE, lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    "upsample bicubic": (IMAGE, lambda x: F.interpolate(x, size=(9, 5), mode="bicubic")),
    "upsample linear": (SEQUENCE, lambda x: F.interpolate(x, size=5, mode="linear")),
    "upsample trilinear": (
        VOLUME,
        lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=True),
    ),
    "upsample antialias": (
        IMAGE,
        lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
    ),
    "upsample bicubic antialias": (
        IMAGE,
        lambda x: F.interpolate(x, size=(3, 3), mode="bicubic", antialias=True),
    ),
    "upsample nearest": (IMAGE, lambda x: F.interpolate(x, scale_factor=2.0)),
    "upsample nearest 1d": (SEQUENCE, lambda x: F.interpolate(x, scale_factor=2.0)),
    "upsample nearest 3d": (VOLUME, lambda x: F.interpolate(x, scale_factor=2.0)),
    "upsample nearest-exact": (IMAGE, lambda x: F.interpolate(x, (4, 9), mode="nearest-exact")),
    "upsample nearest-exact 1d": (SEQUENCE, lambda x: F.interpolate(x, 5, mode="nearest-exact")),
    "upsample nearest-exact 3d": (
        VOLUME,
        lambda x: F.interpolate(x, (3, 4, 5), mode="nearest-exact"),
    ),
    "baddbmm": ((4, 6), lambda x: torch.baddbmm(x @ kernel(6, 2), x, batched(x), alpha=2)),
    "addcmul": (IMAGE, lambda x: torch.addcmul(x, x.flip(1), kernel(6, 6), value=0.5)),
    "fold": ((8, 9), lambda x: F.fold(x, (4, 4), (2, 2))),
    "unfold": (IMAGE, lambda x: F.unfold(x, (3, 2), padding=1, stride=2)),
    "tensor unfold": (SEQUENCE, lambda x: x.unfold(2, 3, 2)),
    "cat": (IMAGE, lambda x: torch.cat([x, 2 * x, x.flip(1)], 1)),
    "cat with a constant": (
        IMAGE,
        lambda x: torch.cat([x, x.new_ones(1, 1, 6, 6).expand(x.shape[0], -1, -1, -1)], 1),
    ),
    "stack": (ROW, lambda x: torch.stack([x, x * 2, x.roll(1, 1)], -1)),
    "hstack": (ROW, lambda x: torch.hstack([x, -x])),
    "slices": (IMAGE, lambda x: x[:, 1:, ::2, [0, 3, 3]]),
    "index": (IMAGE, lambda x: x[:, torch.tensor([2, 0, 2])]),
    "index_select": (IMAGE, lambda x: x.index_select(1, torch.tensor([3, 1]))),
    "gather": (ROW, lambda x: x.gather(1, torch.tensor([[1, 1, 4]]).expand(x.shape[0], 3))),
    "narrow": (IMAGE, lambda x: x.narrow(2, 1, 3)),
    "select": (IMAGE, lambda x: x.select(1, 2)),
    "split": (IMAGE, lambda x: torch.cat([p * i for i, p in enumerate(x.split(3, -1), 1)], -1)),
    "split sizes": (IMAGE, lambda x: x.split([1, 3], 1)[1] - x.split([1, 3], 1)[0]),
    "chunk": (IMAGE, lambda x: x.chunk(2, 1)[0] + 2 * x.chunk(2, 1)[1]),
    "unbind": (IMAGE, lambda x: x.unbind(1)[0] + 2 * x.unbind(1)[3]),
    "tensor_split": (ROW, lambda x: x.tensor_split(3, 1)[0] * 2),
    "permute": (IMAGE, lambda x: x.permute(0, 2, 3, 1)),
    "transpose": (IMAGE, lambda x: x.transpose(1, 3)),
    "mT": (IMAGE, lambda x: x.mT),
    "movedim": (IMAGE, lambda x: x.movedim(1, -1)),
    "reshape": (IMAGE, lambda x: x.reshape(x.shape[0], 2, -1)),
    "view": (IMAGE, lambda x: x.view(-1, 4, 36)),
    "unflatten": (IMAGE, lambda x: x.unflatten(1, (2, 2))),
    "squeeze": ((1, 6), lambda x: x.squeeze(1)),
    "unsqueeze": (ROW, lambda x: x[:, None, :, None]),
    "expand": ((1, 6), lambda x: x.expand(-1, 4, -1)),
    "expand_as": ((1, 6), lambda x: x.expand_as(kernel(1, 4, 6).expand(x.shape[0], 4, 6))),
    "repeat": (IMAGE, lambda x: x.repeat(1, 2, 1, 2)),
    "repeat_interleave": (IMAGE, lambda x: x.repeat_interleave(2, 1)),
    "tile": (ROW, lambda x: x.tile((1, 3))),
    "flip": (IMAGE, lambda x: x.flip((1, 3)) * 2),
    "roll": (IMAGE, lambda x: x.roll((1, 2), (2, 3))),
    "rot90": (IMAGE, lambda x: x.rot90(1, (2, 3))),
    "pad": (IMAGE, lambda x: F.pad(x, (1, 2, 0, 1))),
    "pad with ones": (IMAGE, lambda x: F.pad(x, (1, 2), value=1.0)),
    "crop by pad": (IMAGE, lambda x: F.pad(x, (-1, 2, 0, -2))),
    "pad reflect": (IMAGE, lambda x: F.pad(x, (2, 1, 1, 0), mode="reflect")),
    "pad replicate": (IMAGE, lambda x: F.pad(x, (2, 1, 1, 0), mode="replicate")),
    "pad circular": (IMAGE, lambda x: F.pad(x, (2, 1, 1, 0), mode="circular")),
    "pixel_shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (IMAGE, lambda x: F.pixel_unshuffle(x, 2)),
    "channel_shuffle": (IMAGE, lambda x: F.channel_shuffle(x, 2)),
    "where": (IMAGE, lambda x: torch.where(kernel(6, 6) > 0, x, 2 * x)),
    "where number": (IMAGE, lambda x: torch.where(kernel(6, 6) > 0, x, 0.0)),
    "masked_fill": (IMAGE, lambda x: x.masked_fill(kernel(4, 6, 6) > 0, 0.0)),
    "tril": (IMAGE, lambda x: x.tril()),
    "diagonal": (IMAGE, lambda x: x.diagonal(dim1=2, dim2=3)),
    "dropout in eval": (IMAGE, lambda x: F.dropout2d(F.dropout(x, training=False), training=False)),
    "write into a slice": (IMAGE, lambda x: _written(x)),
    "contiguous, clone": (IMAGE, lambda x: x.transpose(1, 2).contiguous().clone()),
    "max_pool1d": (SEQUENCE, lambda x: F.max_pool1d(x, 3, 2, 1)),
    "max_pool2d": (IMAGE, lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    "max_pool2d with indices": (IMAGE, lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "max_pool3d": (VOLUME, lambda x: F.max_pool3d(x, 2)),
    "adaptive_max_pool1d": (SEQUENCE, lambda x: F.adaptive_max_pool1d(x, 3)),
    "adaptive_max_pool2d": (IMAGE, lambda x: F.adaptive_max_pool2d(x, 2)),
    "adaptive_max_pool3d": (VOLUME, lambda x: F.adaptive_max_pool3d(x, 2)),
    "amax": (IMAGE, lambda x: x.amax((2, 3))),
    "max": (IMAGE, lambda x: x.max(1).values),
    "topk": (IMAGE, lambda x: x.topk(2, 1).values),
    "maximum": (IMAGE, lambda x: torch.maximum(x, x.flip(-1))),
    "relu": (IMAGE, lambda x: F.relu(x)),
    "scatter": (ROW, lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x)),
    "index_copy": (IMAGE, lambda x: x.index_copy(1, torch.tensor([2]), x[:, :1] * 2)),
    "index_add": (IMAGE, lambda x: x.index_add(1, torch.tensor([0, 0]), x[:, 2:], alpha=2)),
    "scatter_add": (ROW, lambda x: x.scatter_add(1, torch.zeros_like(x).long(), x)),
    "index_put with accumulate": (
        ROW,
        lambda x: x.index_put((torch.arange(2)[:, None], torch.tensor([0, 0])), x[:2, 1:3], True),
    ),
    "cumulative": (
        ROW,
        lambda x: together(
            x.cumsum(1),
            x.diff(dim=1),
            x.diff(2, prepend=x[:, :1]),
            torch.trapezoid(x, dx=0.5),
            torch.cumulative_trapezoid(x),
            torch.gradient(x, dim=1)[0],
            x.cummax(1).values,
            x.cummin(1).values,
        ),
    ),
    "ordered": (
        IMAGE,
        lambda x: together(
            x.median(1).values,
            x.kthvalue(2, 2).values,
            x.mode(1).values,
            x.quantile(0.3, 1),
            x.quantile(0.7, dim=2, keepdim=True, interpolation="lower"),
            x.movedim(0, 3).msort().movedim(3, 0),
            *x.aminmax(dim=3),
            torch.fmax(x, x.flip(1)),
        ),
    ),
    "in groups": (
        ROW,
        lambda x: together(
            *(
                x.new_full((len(x), 3), 2.0).scatter_reduce(1, groups(x), x, how, include_self=own)
                for how in ("sum", "mean", "amax")
                for own in (False,)
            ),
            x[:, :3].scatter_reduce(1, groups(x), x, "mean"),
            x[:, :3].index_reduce(1, groups(x)[0], x, "mean"),
            *(
                torch.segment_reduce(x.T, how, lengths=torch.tensor([3, 5])).T
                for how in ("sum", "mean", "max")
            ),
            torch.segment_reduce(x.T, "min", offsets=torch.tensor([0, 2, 8])).T,
        ),
    ),
    "put together": (
        ROW,
        lambda x: together(
            torch.column_stack([x, x[:, :2]]),
            nn.utils.rnn.pad_sequence([x.T[:3], x.T], batch_first=True).movedim(2, 0),
            torch.kron(x, kernel(1, 2)),
            torch.meshgrid(x[0], x[1], indexing="ij")[1].expand(len(x), 8, 8),
            torch.broadcast_tensors(x[:, None], kernel(2, 1))[0],
            torch.block_diag(x[:, :1], x)[: len(x), :3],
            x.diag_embed(1),
            torch.atleast_3d(x),
            torch.hsplit(x, 2)[1],
            torch.fliplr(x),
            F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2),
            x.masked_scatter(kernel(8) > 0, 2 * x),
            x.put(torch.tensor([3, 1]), x[0, :2]),
        ),
    ),
    "filled": (
        ROW,
        lambda x: together(
            x.nan_to_num(),
            x.index_fill(1, torch.tensor([2]), 1.0),
            x.scatter(1, torch.zeros_like(x, dtype=torch.long), 1.0),
            x.clone().index_fill_(1, torch.tensor([0]), 0.0),
        ),
    ),
    "solved": (
        (6, 3),
        lambda x: together(
            torch.linalg.solve(kernel(6, 6), x),
            torch.linalg.cross(x, kernel(1, 6, 3)),
            torch.linalg.vecdot(x, kernel(6, 3)),
            torch.linalg.multi_dot([kernel(4, 6), x[0], kernel(3, 2)]).expand(len(x), 4, 2),
        ),
    ),
    "kernels": (
        (4, 5, 3),
        lambda x: together(
            F.conv2d(kernel(1, 4, 7, 7), x, stride=2).transpose(0, 1),
            F.conv_transpose2d(kernel(1, 4, 3, 3), x.transpose(0, 1)).transpose(0, 1),
            F.linear(kernel(2, 60), x.flatten(1)).T,
        ),
    ),
    "grid_sample": (
        IMAGE,
        lambda x: F.grid_sample(
            x, kernel(1, 3, 2, 2).expand(x.shape[0], 3, 2, 2), align_corners=False
        ),
    ),
}


def _written(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, :2] = y[:, 2:] * 2
    y[:, 3] *= 3
    return y


@pytest.mark.parametrize(("shape", "fn"), LINEAR.values(), ids=LINEAR)
def test_lrp_0_of_piecewise_linear_ops_is_gradient_times_input(
    shape: tuple[int, ...], fn: Fn
) -> None:
    model, x = Between(fn, shape), samples(shape)
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    # Without a ledger these ops are their own rule, and a wrong map would go unseen.
    relevance = lrpfx.explain(model, x, 1, rules=rules, ledger=True).relevance
    torch.testing.assert_close(relevance, gradient_times_input(model, x, 1), rtol=1e-9, atol=1e-10)


# Activations pass relevance on unchanged, in every spelling.
ACTIVATIONS: dict[str, Fn] = {
    "relu": F.relu,
    "relu method": lambda x: x.relu(),
    "relu_": lambda x: (x * 1.0).relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp both": lambda x: x.clamp(-1, 1),
    "clamp by tensors": lambda x: x.clamp(kernel(8) - 3, kernel(8) + 3),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": lambda x: F.prelu(x, kernel(8).abs()),
    "rrelu in eval": lambda x: F.rrelu(x, training=False),
    "elu": F.elu,
    "elu_": lambda x: F.elu(x * 1.0, inplace=True),
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "abs": torch.abs,
    "exp": torch.exp,
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: x.abs().sqrt(),
    "square": torch.square,
    "pow": lambda x: x**3,
    "sin": torch.sin,
    "erf": torch.erf,
    "exponentials": lambda x: torch.expm1(x) + torch.exp2(x) + 2.0**x + torch.cosh(x) + x.sinh(),
    "logarithms": lambda x: x.abs().log2() + x.abs().log10() + torch.logit(x.sigmoid()),
    "arcs": lambda x: torch.atan(x) + torch.asinh(x) + torch.acos(x.tanh()) + torch.asin(x.tanh()),
    "special": lambda x: torch.erfc(x) + torch.i0(x) + torch.special.log_ndtr(x) + x.sinc(),
    "remainders": lambda x: x.fmod(0.7) + x.remainder(0.7) + x.frac() + x.copysign(-1.0),
}


@pytest.mark.parametrize("fn", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_pass_relevance_on(fn: Fn) -> None:
    """Relevance below the activation is what the head hands to the activation's output."""
    model, x = Between(fn, ROW), samples(ROW)
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    relevance = lrpfx.explain(model, x, 2, rules=rules, ledger=True).relevance
    a = fn(x * model.gain).detach()
    torch.testing.assert_close(relevance, a * model.head.weight[2].detach(), rtol=1e-9, atol=1e-12)


# A constant summand absorbs its share: R_x = c x R / (c x + b).
SHIFTS: dict[str, tuple[Fn, float, float]] = {
    "x + number": (lambda x: x + 1.5, 1.0, 1.5),
    "number + x": (lambda x: 1.5 + x, 1.0, 1.5),
    "x - number": (lambda x: x - 0.5, 1.0, -0.5),
    "number - x": (lambda x: 0.5 - x, -1.0, 0.5),
    "add with alpha": (lambda x: torch.add(torch.ones(8, dtype=DTYPE), x, alpha=3), 3.0, 1.0),
    "add to tensor": (lambda x: torch.add(x, torch.ones(8, dtype=DTYPE), alpha=3), 1.0, 3.0),
    "sub with alpha": (lambda x: torch.sub(x, 2.0, alpha=3), 1.0, -6.0),
    "tensor - x": (lambda x: torch.ones(8, dtype=DTYPE) - x, -1.0, 1.0),
    "rsub": (lambda x: torch.rsub(x, 2.0, alpha=3), -3.0, 2.0),
    "added to ones by index": (
        lambda x: torch.ones_like(x).index_add(1, torch.arange(8), x),
        1.0,
        1.0,
    ),
    "x += number": (lambda x: (x * 1.0).add_(2.0), 1.0, 2.0),
}


@pytest.mark.parametrize(("fn", "gain", "bias"), SHIFTS.values(), ids=SHIFTS)
def test_constant_summands_absorb_their_share(fn: Fn, gain: float, bias: float) -> None:
    model, x = Between(fn, ROW), samples(ROW)
    # Named, as directly at the input it is the input's own.
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0) + [("affine", lrpfx.Norm(0.0))]
    e = lrpfx.explain(model, x, 0, rules=rules, ledger=True)
    y = x * model.gain.detach()
    z = fn(y)
    R = z * model.head.weight[0].detach()
    torch.testing.assert_close(e.relevance, gain * y * R / z, rtol=1e-9, atol=1e-10)
    assert e.report.absorbed["bias"] == pytest.approx((bias * R / z).sum().item())


# The table itself --------------------------------------------------------------------------------

ELSEWHERE = {
    "matmul",  # test_attention.py
    "softmax",
    "log_softmax",  # test_families.py
    "logsumexp",
    "prod",
    "entmax",  # test_simplex.py
    "fourier",
    "composed",
    "layer_norm",  # test_norms_and_products.py
    "group_norm",
    "instance_norm",
    "rms_norm",
    "product",
    "topk",  # test_recurrent.py
    "sort",
    "reciprocal",
    "batch_norm",  # test_passes.py
    "scatter",  # below: reached by functionalised writes
    "constant",  # test_passes.py: relevance ends
}


def reached() -> set[str]:
    kinds = set()
    rows = [*ACTIVATIONS.values(), *(fn for fn, _, _ in SHIFTS.values())]
    for shape, fn in itertools.chain(LINEAR.values(), ((ROW, fn) for fn in rows)):
        report = lrpfx.Explainer(Between(fn, shape), samples(shape), capture="record").report
        kinds |= {row.kind for row in report.rows}
    return kinds


def test_every_kind_of_the_table_is_reached_by_a_case_above() -> None:
    assert ops.kinds() - reached() - ELSEWHERE == set()


def test_lp_pooling_shares_by_the_powers() -> None:
    """LP pooling is a power, a mean and a root: shares go by |x|^p, as its sum does."""
    x = samples(IMAGE).abs()
    model = Between(lambda x: F.lp_pool2d(x, 3.0, 2), IMAGE)
    rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
    e = lrpfx.explain(model, x, 0, rules=rules, ledger=True)
    y = x * model.gain.detach()
    pooled = F.lp_pool2d(y, 3.0, 2)
    R = (pooled.flatten(1) * model.head.weight[0].detach()).reshape(pooled.shape)
    share = y**3 / F.interpolate(pooled**3, scale_factor=2.0)
    torch.testing.assert_close(
        e.relevance, share * F.interpolate(R, scale_factor=2.0), rtol=1e-8, atol=1e-10
    )


@torch.library.custom_op("lrpfx_tests::running_total", mutates_args=())
def running_total(x: Tensor) -> Tensor:
    """An op of the user's own, which is linear."""
    return x.cumsum(1)


running_total.register_fake(torch.empty_like)
running_total.register_autograd(lambda ctx, g: g.flip(1).cumsum(1).flip(1))
OWN = torch.ops.lrpfx_tests.running_total.default


def test_a_registered_op_is_explained_and_an_unknown_one_refused() -> None:
    model, x = Between(running_total, ROW), samples(ROW)
    with pytest.raises(lrpfx.errors.UnsupportedOpError, match="running_total"):
        lrpfx.explain(model, x)
    lrpfx.register_op(OWN, "running_total", "affine")
    try:
        rules = lrpfx.composites.EpsilonAll(epsilon=0.0)
        relevance = lrpfx.explain(model, x, 1, rules=rules).relevance
    finally:
        ops._TABLE.pop(OWN)
    torch.testing.assert_close(relevance, gradient_times_input(model, x, 1), rtol=1e-9, atol=1e-10)


def test_an_op_without_a_rule_says_why_it_has_none() -> None:
    model = Between(lambda x: torch.linalg.pinv(x), (3, 3))
    with pytest.raises(lrpfx.errors.UnsupportedOpError, match="why: a function of whole matrices"):
        lrpfx.explain(model.eval(), samples((3, 3)))


def test_places_that_depend_on_the_input_are_refused_or_detached() -> None:
    def sampled(detach: bool) -> Fn:
        def run(x: Tensor) -> Tensor:
            places = x[:, :2].permute(0, 2, 3, 1).tanh()
            return F.grid_sample(x, places.detach() if detach else places, align_corners=False)

        return run

    x = samples(IMAGE)
    with pytest.raises(lrpfx.errors.UnsupportedOpError, match=r"places to read at.*\.detach\(\)"):
        lrpfx.explain(Between(sampled(False), IMAGE), x)
    model = Between(sampled(True), IMAGE)
    got = lrpfx.explain(model, x, 1, rules=lrpfx.composites.EpsilonAll(0.0)).relevance
    torch.testing.assert_close(got, gradient_times_input(model, x, 1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cumsum", "cumsum", "affine"), "no op overload"),
        ((torch.ops.aten.cumsum.default, "cumsum", "afine"), "'afine' is none of"),
        ((torch.ops.aten.cumsum.default, "cumsum", "softmax"), "'softmax' is none of"),
        ((torch.ops.aten.cumsum.default, 3, "affine"), "kind 3"),
    ],
)
def test_a_wrong_registration_says_what_is_wrong(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lrpfx.register_op(*arguments)


def test_a_registered_activation_keeps_its_shape() -> None:
    target = torch.ops.aten.pdist.default
    lrpfx.register_op(target, "pdist", "activation")
    try:
        with pytest.raises(lrpfx.errors.UnsupportedOpError, match=r"another shape[\s\S]*pdist"):
            lrpfx.explain(Between(lambda x: F.pdist(x.T)[None], ROW), samples(ROW))
    finally:
        ops._TABLE.pop(target)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dims", [1, 2])
def test_flat_of_a_sample_without_a_batch(channels: int, dims: int) -> None:
    make = (nn.Conv1d, nn.Conv2d)[dims - 1]
    conv = make(channels, 4, 3, padding=1).double()
    x = torch.randn(channels, *(5, 6)[-dims:], dtype=torch.float64)
    seed = torch.randn_like(conv(x)).detach()
    rules = [("conv", lrpfx.Flat())]
    got = lrpfx.explain(conv, x, seed, rules=rules).relevance
    expected = lrpfx.explain(conv, x[None], seed[None], rules=rules).relevance[0]
    torch.testing.assert_close(got, expected)


def test_features_that_a_boolean_buffer_picks() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True, False]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.mask] * 2

    x = torch.randn(3, 4)
    relevance = lrpfx.explain(Picked(), x, 1).relevance
    torch.testing.assert_close(relevance[:, 2], 2 * x[:, 2])
    assert not relevance[:, [0, 1, 3]].any()
