"""Every row of the op table, and models of torchvision and transformers, against oracles.

A sample of what ``benchmarks.coverage`` measures, small enough for every change. The oracles and
their tolerances are that script's.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import lrpfx
from benchmarks.coverage import measure
from benchmarks.zoos import ZOOS, Case, images
from lrpfx.ops import table as ops
from lrpfx.ops.call import always
from lrpfx.ops.graph import live_names, record
from tests.oracle.models import NIGHTLY

aten, fmax, fmin = torch.ops.aten, torch.fmax, torch.fmin

#: One of each make, and some that differ from those of tests/oracle/families.py.
TRANSFORMERS = "deberta-v2 convnextv2 llama mixtral vit regnet poolformer wavlm".split()
TORCHVISION = ["squeezenet1_1"]

# -- every row of the op table -------------------------------------------------------------

Weight = Callable[..., Tensor]
Parts = Callable[[Tensor, Weight], Sequence[Tensor]]


class Mixed(nn.Module):
    """A linear head on all that ``parts`` makes of the input (N, 4, 6, 6).

    Args:
        parts: Takes the input and what gives it constants of any shape.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.gain = nn.Parameter(torch.rand(4, 6, 6) + 0.5)
        self.weights = nn.Parameter(torch.randn(200))
        with torch.no_grad():
            size = self.flat(torch.randn(2, 4, 6, 6)).shape[1]
        self.head = nn.Linear(size, 3)

    def weight(self, *shape: int) -> Tensor:
        return self.weights[: prod(shape)].reshape(shape)

    def flat(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.parts(x * self.gain, self.weight)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(x))


def convolutions(x: Tensor, w: Weight) -> Sequence[Tensor]:
    sequence, volume = x.flatten(2), x.unflatten(1, (2, 2))
    row, steps = x.flatten(1), torch.arange(4, dtype=x.dtype)
    return [
        F.conv1d(sequence, w(3, 4, 3), w(3)),
        F.conv1d(sequence, w(3, 4, 3), w(3), padding="same"),
        F.conv2d(x, w(3, 4, 3, 3), w(3), stride=2, padding=1),
        F.conv2d(x, w(3, 4, 1, 3), padding="same"),
        F.conv3d(volume, w(3, 2, 2, 2, 3), w(3)),
        F.conv3d(volume, w(3, 2, 1, 3, 3), padding="same"),
        F.conv_transpose1d(sequence, w(4, 3, 3), w(3), stride=2),
        F.conv_transpose2d(x, w(4, 3, 3, 3), w(3), stride=2, padding=1),
        F.conv_transpose3d(volume, w(2, 3, 2, 2, 2), w(3)),
        F.batch_norm(x.abs(), steps, steps + 1, w(4), w(4)),
        x @ w(6, 6),
        w(6, 6) @ x,
        torch.einsum("nchw,oc->wnho", x, w(3, 4)).movedim(0, 1),
        torch.mm(row, w(1, 144).t()),
        torch.mm(w(1, 144), row.t()).t(),
        torch.addmm(w(1, 1), row, w(1, 144).t()),
        torch.addmm(w(1, 1), w(1, 144), row.t()).t(),
        torch.bmm(x[:, 0], w(1, 6, 6).expand(x.shape[0], 6, 6)),
        torch.bmm(w(1, 6, 6).expand(x.shape[0], 6, 6), x[:, 0]),
    ]


def kernels(x: Tensor, w: Weight) -> Sequence[Tensor]:
    """Constants under weights that depend on the input: each sample is an output channel."""
    sequence, volume = x.flatten(2)[..., :4], x.unflatten(1, (2, 2))[..., :2, :2]
    image = x[..., :3, :3]
    laid = [
        F.conv1d(w(1, 4, 9), sequence),
        F.conv1d(w(1, 4, 9), sequence, padding="same"),
        F.conv2d(w(1, 4, 7, 7), image, stride=2),
        F.conv2d(w(1, 4, 7, 7), image, padding="same"),
        F.conv3d(w(1, 2, 3, 4, 4), volume),
        F.conv3d(w(1, 2, 3, 4, 4), volume, padding="same"),
        F.conv_transpose1d(w(1, 4, 5), sequence.transpose(0, 1)),
        F.conv_transpose2d(w(1, 4, 5, 5), image.transpose(0, 1), stride=2),
        F.conv_transpose3d(w(1, 2, 2, 3, 3), volume.transpose(0, 1)),
        F.linear(w(1, 144), x.flatten(1)),
    ]
    return [z.transpose(0, 1) for z in laid]


def pools(x: Tensor, w: Weight) -> Sequence[Tensor]:
    sequence, volume = x.flatten(2), x.unflatten(1, (2, 2))
    twice = dict(scale_factor=2.0)
    return [
        F.avg_pool1d(sequence, 3, 2, 1),
        F.avg_pool2d(x, 2),
        F.avg_pool3d(volume, 2),
        x.mean((2, 3)),
        x.sum(1),
        F.adaptive_avg_pool1d(sequence, 5),
        F.adaptive_avg_pool2d(x, (4, 3)),
        F.adaptive_avg_pool3d(volume, 2),
        F.fold(x.reshape(-1, 4, 36)[:, :, :9], (4, 4), (2, 2)),
        F.interpolate(sequence, 5, mode="linear"),
        F.interpolate(volume, mode="trilinear", **twice),
        F.interpolate(x, mode="bilinear", **twice),
        F.interpolate(x, (3, 3), mode="bilinear", antialias=True),
        F.interpolate(x, (3, 4), mode="bicubic", antialias=True),
        F.interpolate(x, (9, 5), mode="bicubic"),
        F.interpolate(sequence, **twice),
        F.interpolate(x, **twice),
        F.interpolate(volume, **twice),
        F.interpolate(sequence, 5, mode="nearest-exact"),
        F.interpolate(x, (4, 9), mode="nearest-exact"),
        F.interpolate(volume, (3, 4, 5), mode="nearest-exact"),
        F.grid_sample(x, w(1, 3, 5, 2).expand(x.shape[0], 3, 5, 2).tanh(), align_corners=False),
        F.grid_sample(
            x, w(1, 9, 9, 2).expand(x.shape[0], 9, 9, 2).tanh(), "bicubic", align_corners=False
        ),
        x.cumsum(1),
        x.nansum(1),
        F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        F.max_unpool3d(*F.max_pool3d(volume, 2, return_indices=True), 2),
    ]


def spectra(x: Tensor, w: Weight) -> Sequence[Tensor]:
    fft, sizes = torch.fft, dict(dim=(2, 3))

    def pairs(z: Tensor) -> Tensor:
        return torch.view_as_real(z.resolve_conj())

    c, window = torch.complex(w(6), w(6).flip(0)), w(8).abs() + 1
    whole, half, row = fft.fft(x), fft.rfft(x), x.flatten(1)
    found = [pairs(fft.fft2(x) * c), pairs(fft.fftn(x, **sizes)), pairs(fft.ihfft(x))]
    found += [
        fft.ifft(whole * c).real,
        fft.ifft2(whole / c).imag,
        pairs(fft.ifftn(c + whole, **sizes)),
    ]
    found += [
        fft.irfft(half * c[:4], 6),
        fft.irfft2(fft.rfft2(x)),
        fft.hfft(fft.rfftn(x, **sizes), 6),
        fft.hfft2(fft.rfftn(x, **sizes), (6, 6)),
        fft.hfftn(fft.rfftn(x, **sizes), (6, 6)),
        pairs(fft.ihfft2(x)),
        pairs(fft.ihfftn(x, **sizes)),
    ]
    found += [fft.irfftn(fft.rfft2(x) * x[..., :4].detach(), **sizes)]
    found += [pairs(half.conj()), pairs(half.conj_physical() - half)]
    frames = torch.stft(row, 8, 4, window=window, return_complex=True)
    found.append(pairs(frames))
    found.append(pairs(aten.stft.default(row, 8, 4, None, window, return_complex=True)))
    found.append(pairs(aten.stft.center(row, 8, 4, None, window, return_complex=True)))
    found.append(torch.istft(frames * c[:5, None], 8, 4, window=window))
    return found


def sums(x: Tensor, w: Weight) -> Sequence[Tensor]:
    return [
        w(6) + x,
        w(6) - x,
        x - w(6),
        x + x.flip(1),
        x - x.flip(1),
        w(6) * x,
        x / w(6),
        torch.rsub(x, x.flip(1), alpha=2),
        torch.rsub(x, w(6)),
        aten.add.Scalar(x, 0.5),
        aten.sub.Scalar(x, 0.5),
        2 - x,
        aten.mul.Scalar(x, 3),
        aten.div.Scalar(x, 3),
        x.deg2rad(),
        x.rad2deg() / 99,
        torch.linalg.cross(x[:, :3], w(1, 3, 6, 6), dim=1),
        torch.linalg.cross(w(1, 3, 6, 6), x[:, 1:], dim=1),
        torch.linalg.solve(w(6, 6) + 9 * torch.eye(6, dtype=x.dtype), x[:, 0]),
        torch.linalg.solve_triangular(
            w(6, 6) + 9 * torch.eye(6, dtype=x.dtype), x[:, 0], upper=True
        ),
        torch.cholesky_solve(x[:, 0], (w(6, 6) + 9 * torch.eye(6, dtype=x.dtype)).tril()),
    ]


def writes(x: Tensor, w: Weight) -> Sequence[Tensor]:
    """Into what is live, of what is live, and both."""
    row = x.flatten(1)
    fixed = w(144).expand(x.shape[0], 144)
    places, once, twice = fixed[:, :70].argsort(1), torch.tensor([3, 0]), torch.tensor([1, 1])
    found = []
    for into, values in ((row, row.flip(1)), (row, fixed), (fixed, row)):
        found += [
            into.index_add(1, twice, values[:, :2]),
            into.scatter_add(1, places // 2, values[:, :70]),
            aten.index_put(into, [None, twice], values[:, :2], True),
            into.index_copy(1, once, values[:, :2]),
            into.scatter(1, places, values[:, :70]),
            aten.index_put(into, [None, once], values[:, :2]),
            into.slice_scatter(values[:, :2], 1, 2, 4),
            into.select_scatter(values[:, 0], 1, 2),
            into.unflatten(1, (12, 12)).diagonal_scatter(values[:, :12], 0, 1, 2),
            into.scatter_reduce(1, places // 2, values[:, :70], "amax"),
            into.index_reduce(1, twice, values[:, :2], "amin"),
            torch.where(w(144) > 0, into, values),
        ]
    return found


def views(x: Tensor, w: Weight) -> Sequence[Tensor]:
    row, fixed = x.flatten(1), w(4, 6, 6).expand(x.shape[0], 4, 6, 6)
    return [
        x.mT,
        x.transpose(1, 2),
        x.permute(0, 3, 1, 2),
        x.swapaxes(1, 2),
        x.swapdims(1, 3),
        x.movedim(1, -1),
        x.movedim((1, 2), (3, 1)),
        x.moveaxis(1, -1),
        x.moveaxis((1, 2), (3, 1)),
        row.T.T,
        x[:, :1].squeeze(1),
        x[:, :1, :1].squeeze((1, 2)),
        torch.broadcast_to(x[:, None], (-1, 2, 4, 6, 6)),
        x.narrow(2, 1, 3),
        x.chunk(2, 1)[1],
        x.split(3, 1)[0],
        x.split([1, 3], 1)[1],
        aten.split.sizes(x, [1, 3], 1)[1],
        x.unsafe_split(3, 2)[0],
        x.unsafe_chunk(2, 1)[1],
        x.tensor_split(3, 1)[1],
        x.tensor_split((1, 2), 1)[2],
        x.diagonal(dim1=2, dim2=3),
        x.unfold(2, 3, 2),
        x.tril(),
        x.triu(),
        row.view_as(x),
        row.view_as(fixed),
        x.reshape_as(row),
        row.reshape_as(fixed),
        x[:, :1].expand(-1, 3, -1, -1),
        x[:, :1].expand_as(x),
        x[:, :1].expand_as(fixed),
        x.repeat(1, 2, 1, 1),
        x.tile((1, 2)),
        x.flip((1, 3)),
        x.rot90(1, (2, 3)),
        F.pixel_shuffle(x, 2),
        F.pixel_unshuffle(x, 2),
        F.channel_shuffle(x, 2),
        x.roll(1, 2),
        F.unfold(x, (3, 2)),
        x.repeat_interleave(2, 1),
        x.gather(1, torch.zeros_like(x[:, :2], dtype=torch.long)),
        x[:, torch.tensor([2, 0])],
        x.index_select(1, torch.tensor([2, 0])),
        aten.unsafe_split_with_sizes(x, [1, 3], 1)[1],
        row[:, :3].diag_embed(),
    ]


def moves(x: Tensor, w: Weight) -> Sequence[Tensor]:
    row, volume, mask = x.flatten(1), x.unflatten(1, (2, 2)), w(6, 6) > 0
    return [
        torch.concat([x, x.flip(1)], 1),
        torch.hstack([row, -row]),
        torch.vstack([row.T, row.T]).T,
        torch.dstack([x, x]),
        F.pad(x, (1, 2)),
        aten.constant_pad_nd(x, (1, 2)),
        aten.reflection_pad1d(row[:, None], (2, 1)),
        aten.reflection_pad2d(x, (2, 1, 1, 0)),
        aten.reflection_pad3d(volume, (2, 1, 1, 0, 1, 1)),
        aten.replication_pad1d(row[:, None], (2, 1)),
        aten.replication_pad2d(x, (2, 1, 1, 0)),
        aten.replication_pad3d(volume, (2, 1, 1, 0, 1, 1)),
        torch.where(mask, 0.5, x),
        torch.where(mask, x, 0.5),
        x.masked_fill(mask, 0.5),
        x.masked_fill(mask, w(1)[0]),
        x.scatter(1, torch.zeros_like(x[:, :1], dtype=torch.long), 0.5),
        x.index_fill(1, torch.tensor([2]), 0.5),
        x.index_fill(1, torch.tensor([2]), w(1)[0]),
        x.nan_to_num(0.5),
    ]


def constants(x: Tensor, w: Weight) -> Sequence[Tensor]:
    n, wide = x.shape[0], x.to(torch.float64)
    rows = w(1, 144).expand(n, 144).clone()
    steps = [x.sign(), x.floor(), x.ceil(), x.round(), x.trunc(), x.detach().sign()]
    steps += [x.round(decimals=1)]
    steps += [torch.div(x, y, rounding_mode="floor").detach() for y in (2, w(6))]
    steps += [torch.heaviside(x, w(6)).detach()]
    steps += [aten.div.Scalar_mode(x, 2, rounding_mode="trunc").detach()]
    steps += [(x // 2).detach()]  # which autograd has no derivative of
    filled = [torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0)]
    filled += [x.new_zeros(n, 4, 6, 6), x.new_ones(4, 6, 6), x.new_full((4, 6, 6), 2.0)]
    filled += [torch.fill(x, 2.0), torch.fill(x, w(1)[0]), aten.zero(x)]
    filled += [torch.fill(torch.empty_like(x), 2.0), torch.fill(x.new_empty(4, 6, 6), 2.0)]
    filled += [rows.view_as(x), rows.reshape_as(x), w(4, 6, 6).expand_as(x)]
    return [
        *[x * step for step in steps],
        *[x * filling + filling for filling in filled],
        wide.type_as(x),
        wide.type_as(w(1)),
        aten.to.other(wide, x),
        aten.to.other(wide, w(1)),
        (wide * w(6).type_as(wide)).type_as(x),
        (wide * aten.to.other(w(6), wide)).type_as(x),
        x.to("cpu", torch.float64).type_as(x),
        aten._to_copy(x, dtype=torch.float64).type_as(x),
        aten.to.dtype_layout(x, dtype=torch.float64).type_as(x),
    ]


def selections(x: Tensor, w: Weight) -> Sequence[Tensor]:
    sequence, volume = x.flatten(2), x.unflatten(1, (2, 2))
    found = [
        F.max_pool1d(sequence, 3, 2, 1),
        F.max_pool2d(x, 3, 2, 1),
        F.max_pool3d(volume, 2),
        F.max_pool1d(sequence, 2, return_indices=True)[0],
        F.max_pool2d(x, 2, return_indices=True)[0],
        F.max_pool3d(volume, 2, return_indices=True)[0],
        F.adaptive_max_pool1d(sequence, 3),
        F.adaptive_max_pool2d(x, 2),
        F.adaptive_max_pool3d(volume, 2),
        x.amax((2, 3)),
        x.amin(1),
        x.max(1).values,
        x.min(2).values,
        F.relu(x),
        F.relu6(x),
        F.leaky_relu(x, 0.2),
        F.prelu(x, w(4)),
        x.abs(),
    ]
    for pick in (torch.maximum, torch.minimum, aten.max.other, aten.min.other, fmax, fmin):
        found += [pick(x, x.flip(1)), pick(x, w(6)), pick(w(6), x)]
    fixed = w(4, 6, 6).expand(len(x), 4, 6, 6)
    found += [x.clamp_min(x.flip(1)), x.clamp_max(x.flip(1))]
    found += [fixed.clamp_min(x), fixed.clamp_max(x)]
    found += [*torch.aminmax(x, dim=1), x.cummax(1).values, x.cummin(2).values]
    return found


def sorts(x: Tensor, w: Weight) -> Sequence[Tensor]:
    orders = [x.sort(1).values, x.sort(dim=2, stable=True).values, x.topk(2, 3).values]
    orders += [x.median(1).values, x.nanmedian(2).values, x.kthvalue(2, 1).values]
    return [*orders, x.mode(1).values, x.quantile(0.3, 1)]


def sparsemax(x: Tensor) -> Tensor:
    """The nearest point of the simplex, along the channels."""
    ordered = x.sort(1, descending=True).values
    steps = (ordered.cumsum(1) - 1) / torch.arange(1, 5, dtype=x.dtype)[:, None, None]
    last = (ordered > steps).sum(1, keepdim=True) - 1
    return F.relu(x - steps.gather(1, last))


def sums_of_exponentials(x: Tensor, w: Weight) -> Sequence[Tensor]:
    fixed = w(6)
    found = [
        sparsemax(x),
        x.exp().sum(1).log(),
        x.logsumexp((2, 3)),
        x.logcumsumexp(1),
        x.log_softmax(1),
        torch._log_softmax(x, 2, False),
    ]
    for add in (torch.logaddexp, torch.logaddexp2):
        found += [add(x, x.flip(1)), add(x, fixed), add(fixed.expand_as(x), x)]
    return found


def activations(x: Tensor, w: Weight) -> Sequence[Tensor]:
    size = x.abs() + 0.5
    functions = [F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus]
    functions += [F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh]
    functions += [F.logsigmoid, F.hardshrink, F.softshrink]
    functions += [torch.exp, torch.sin, torch.cos, torch.erf, torch.square, F.rrelu]
    return [
        *[function(x) for function in functions],
        *[function(size) for function in (torch.log, torch.log1p, torch.sqrt)],
        *[function(size) for function in (torch.reciprocal, torch.rsqrt)],
        x**3,
        size ** (w(6) + 2),
        x.clamp(-1, 1),
        x.clamp_min(-0.5),
        x.clamp_max(0.5),
        x.clamp(w(6) - 1, w(6) + 1),
        F.threshold(x, 0.1, 0.0),
        2.0**x,
        (w(6).abs() + 0.5) ** x,
        x.clamp_min(w(6) - 1),
        x.clamp_max(w(6) + 1),
    ]


def curves(x: Tensor, w: Weight) -> Sequence[Tensor]:
    """Functions that fewer networks use."""
    part, size = torch.sigmoid(x), x.abs() + 0.5
    functions = [torch.exp2, torch.expm1, torch.sinc, torch.atan, torch.asinh, torch.sinh]
    functions += [torch.cosh, torch.erfc, torch.special.log_ndtr, torch.special.erfcx, torch.frac]
    of_parts = [torch.logit, torch.tan, torch.asin, torch.acos, torch.atanh, torch.erfinv]
    of_parts += [torch.special.ndtri]
    of_sizes = [torch.log2, torch.log10, torch.lgamma, torch.digamma, torch.special.entr]
    of_sizes += [torch.i0, torch.special.i0e, torch.special.i1, torch.special.i1e]
    return [
        *[function(x) for function in functions],
        *[function(part) for function in of_parts],
        *[function(size) for function in of_sizes],
        torch.acosh(size + 1),
        torch.special.ndtr(x),
        torch.mvlgamma(size + 1, 2),
        torch.polygamma(1, size),
        x.fmod(0.7),
        x.fmod(w(6)),
        x.remainder(0.7),
        x.remainder(w(6)),
        torch.copysign(x, -1.0),
        torch.copysign(x, w(6)),
    ]


def norms_and_products(x: Tensor, w: Weight) -> Sequence[Tensor]:
    row, mask = x.flatten(1), w(6, 6) > 0
    return [
        F.layer_norm(x, (6,), w(6), w(6)),
        F.group_norm(x, 2, w(4), w(4)),
        F.instance_norm(x, weight=w(4), bias=w(4)),
        F.rms_norm(x, (6,), w(6)),
        x * x.flip(1) * x.flip(2),
        x * x.flip(1),
        x.softmax(-1),
        torch._softmax(x, -1, False),
        F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
        torch.matmul(x, x.mT),
        torch.bmm(x[:, 0], x[:, 1]),
        torch.einsum("nchw,ncwk->nchk", x, x),
        torch.mm(row, row.T).diagonal()[:, None],
        x.prod(1),
        x.cumprod(2),
        torch.linalg.cross(x[:, :3], x[:, 1:], dim=1),
    ]


def products_of(one: Tensor) -> Sequence[Tensor]:
    """Layers whose weights depend on the input, as what they are laid on does."""
    image, sequence, volume = one[None], one.flatten(1)[None], one.unflatten(0, (2, 2))[None]
    corner = (..., slice(2), slice(2))
    return [
        F.conv1d(sequence, sequence[..., :3], one[0, 0, :1]),
        F.conv1d(sequence, sequence[..., :3], padding="same"),
        F.conv2d(image, image[corner]),
        F.conv2d(image, image[corner][..., :1], padding="same"),
        F.conv3d(volume, volume[corner]),
        F.conv3d(volume, volume[..., :1, :1], padding="same"),
        F.conv_transpose1d(sequence, sequence[..., :3].transpose(0, 1)),
        F.conv_transpose2d(image, image[corner].transpose(0, 1)),
        F.conv_transpose3d(volume, volume[corner].transpose(0, 1)),
        F.linear(one, one[0], one[1, 0]),
    ]


def of_one_sample(x: Tensor, w: Weight) -> Sequence[Tensor]:
    """What would mix the samples, were it of the whole batch."""
    found = []
    for one in x:
        sizes = [one.mean(), one.sum(), one.max(), one.min()]
        parts = [torch.stack(sizes), one[:1].squeeze(), torch.fill(one, one[0, 0, 0])]
        parts += [torch.fill(w(6), one[0, 0, 1])]
        parts.append(one.take_along_dim(torch.zeros(4, 1, 6, dtype=torch.long), 1))
        parts += [one.take(torch.tensor([2, 5])), torch.block_diag(one[0], one[1])]
        parts += [one[0].trace(), one.median(), one.nanmedian(), one[0, 0].prod()]
        parts.append(one.masked_select(torch.ones(4, 6, 6, dtype=torch.bool)))
        mask, fixed = w(4, 6, 6) > 0, w(4, 6, 6)
        parts.append(one[0] * one.histc(6).detach())
        parts.append(one.as_strided((4, 3), (36, 7)))
        lines = one.flatten().sinh(), w(12), fixed.flatten()
        for into, source in ((0, 0), (0, 1), (2, 0)):
            parts.append(torch.as_strided_scatter(lines[into], lines[source][:12], (12,), (7,), 3))
        pairs = ((one, one.flip(0)), (one, fixed), (fixed, one))
        parts += [a.masked_scatter(mask, b) for a, b in pairs]
        parts += products_of(one)
        found.append(torch.cat([part.flatten() for part in parts]))
    return [torch.stack(found)]


#: Whose relevance is gradient times input, if no rule has a stabilizer.
LINEAR = [convolutions, kernels, pools, sums, writes, views, moves, constants, selections, sorts]
MIXED = [*LINEAR, sums_of_exponentials, activations, curves, norms_and_products, of_one_sample]
#: Whose backward passes in PyTorch write into parts of tensors, which ``compile`` refuses.
UNCOMPILED = [spectra]
#: Measured in every run. Of the others `make test` sees the records, against the model's gradient.
MEASURED = [parts.__name__ for parts in MIXED if parts not in LINEAR or parts in (kernels, writes)]


def cases() -> dict[str, Case]:
    """The sample of the zoo, images of 32 x 32, and the models above."""
    found = {}
    for zoo, names in (("transformers", TRANSFORMERS), ("torchvision", TORCHVISION)):
        found |= {case.name: case for case in ZOOS[zoo]() if case.name in names}
        assert found.keys() >= set(names)
    for name in TORCHVISION:
        found[name] = replace(found[name], inputs=images(3, 32, 32))
    for parts in [*MIXED, *UNCOMPILED]:
        name = parts.__name__
        found[name] = Case(name, functools.partial(Mixed, parts), images(4, 6, 6))
    return found


CASES = cases()


def reached(case: Case) -> set[tuple[object, frozenset[str]]]:
    """What of the op table a model makes use of: overloads, each with its live arguments."""
    # A copy: other tests measure the same model in float64.
    model = copy.deepcopy(case.make()).float().eval()
    explainer = lrpfx.Explainer(model, case.inputs(2), capture="record")
    found = set()
    for node in explainer._engine.module.graph.nodes:
        live = frozenset(live_names(node, explainer._engine.live))
        op = ops.find(node.target, live)
        if op is not None and (record(node) or op.family == "constant"):
            found.add((getattr(node.target, "target", node.target), live))
    return found


@pytest.mark.filterwarnings("error::lrpfx.errors.ExplosionWarning")  # is a miss, with its reason
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in MEASURED else [pytest.mark.nightly])
        for n in CASES
        if n not in {parts.__name__ for parts in UNCOMPILED}
    ],
)
def test_a_model_agrees_with_every_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explicit graphs run as they are, but for ``make nightly``, where a compiler reads them."""
    if not NIGHTLY:
        monkeypatch.setattr("torch.compile", lambda graph, **options: graph)
    row = measure(CASES[name])
    assert row.agreed == "yes", row.reason


@pytest.mark.parametrize("parts", UNCOMPILED, ids=lambda parts: parts.__name__)
def test_what_is_not_compiled_is_gradient_times_input(parts: Parts) -> None:
    model, x = Mixed(parts).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, rules=lrpfx.composites.EpsilonAll(0.0))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    for options in ({}, {"ledger": False}):
        torch.testing.assert_close(explainer(x, 1, **options).relevance, x * slope)


@pytest.mark.parametrize("parts", LINEAR, ids=lambda parts: parts.__name__)
def test_a_recorded_model_is_explained_by_gradient_times_input(parts: Parts) -> None:
    model, x = Mixed(parts).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    rules = lrpfx.composites.EpsilonAll(0.0)
    explainer = lrpfx.Explainer(model, x, rules, capture="record")
    for ledger in (True, False):
        torch.testing.assert_close(explainer(x, 1, ledger=ledger).relevance, x * slope)
    alone = lrpfx.explain(model, x[1:], 1, rules=rules, ledger=False)
    torch.testing.assert_close(alone.relevance, (x * slope)[1:])


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_a_record_explains_as_an_export_does(name: str) -> None:
    model = copy.deepcopy(CASES[name].make()).double().eval()
    inputs = pytree.tree_map_only(Tensor, _double, CASES[name].inputs(2))
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    first = next(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))
    seed = torch.randn(first.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    maps = [
        pytree.tree_leaves(lrpfx.explain(model, inputs, seed, capture=by).relevance)
        for by in ("record", "export")
    ]
    for recorded, exported in zip(*maps, strict=True):
        torch.testing.assert_close(recorded, exported, rtol=1e-10, atol=1e-12)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def test_every_row_of_the_op_table_is_reached() -> None:
    """With every choice of live arguments that it has, by a mixed module of the test above."""
    missing = {(target, live) for target, op in ops.rows() for live in op.live}
    for parts in [*MIXED, *UNCOMPILED]:
        missing -= reached(CASES[parts.__name__])
    # In halves only: others become exponentials, of which a softmax may be.
    missing -= {
        (aten.exp2.default, frozenset({"self"})),
        (aten.pow.Scalar, frozenset({"exponent"})),
    }
    assert not missing, sorted(f"{target} with live {sorted(live)}" for target, live in missing)


class Values(fx.Interpreter):
    """Runs a graph, and keeps what each node came to."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def least_where_proven(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Of each op whose output is said to be >= 0, the least that it comes to."""
    explainer = lrpfx.Explainer(model.eval(), x, capture="record")
    values, least = Values(explainer._engine.module), {}
    with torch.no_grad():
        values.run(x)
    for node, value in values.found.items():
        known = record(node)
        if known is not None and known.nonneg:
            tensors = [t for t in pytree.tree_leaves(value) if t.is_floating_point()]
            least[f"{known.kind} {node.name}"] = min(t.min().item() for t in tensors)
    return least


def odd_signs(x: Tensor, w: Weight) -> Sequence[Tensor]:
    """What takes the sign of an argument, or is >= 0 but for an odd one."""
    return [
        F.softplus(x, beta=-1.0),
        x.clamp(0.5, -1.0),
        F.hardtanh(x, -2.0, -1.0),
        x.pow(3),
        (-x).pow(3),
        torch.add(x, x.flip(1), alpha=-2),
        torch.add(x, 0.5, alpha=-2),
        x + -0.5,
        x * -2,
        x / -2,
        x - 0.5,
        F.pad(x, (1, 1), value=-1.0),
        F.elu(-x),
        x.masked_fill(w(6, 6) > 0, -1.0),
        F.avg_pool2d(x, 2, divisor_override=-4),
        torch.cat([x, torch.full((len(x), 1, 6, 6), -3)], 1),
        torch.stack([x, torch.full(x.shape, -3)], 1),
    ]


@pytest.mark.parametrize("parts", [*MIXED, odd_signs], ids=lambda parts: parts.__name__)
def test_what_is_said_to_be_non_negative_is(parts: Parts) -> None:
    """Rules leave out the negative part of such inputs."""
    model = Mixed(lambda x, w: parts(x.relu(), w))
    least = least_where_proven(model, torch.randn(5, 4, 6, 6))
    assert len(least) > 3
    assert not {name: value for name, value in least.items() if value < 0}


def test_a_wrong_claim_of_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ops.find(aten.upsample_bicubic2d.vec, frozenset({"input"}))
    monkeypatch.setitem(ops._TABLE, aten.upsample_bicubic2d.vec, [replace(row, nonneg=always)])
    model = Mixed(lambda x, w: [F.interpolate(x.relu(), (9, 5), mode="bicubic")])
    least = least_where_proven(model, torch.randn(5, 4, 6, 6))
    assert min(least.values()) < 0
