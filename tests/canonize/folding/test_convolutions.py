"""Convolutions, pools and moves of pixels in other words, and in the blocks of networks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn

from tests.oracle.spellings import LAYERS_DIFFER, Case, assert_images_agree

pytestmark = pytest.mark.usefixtures("each_front")


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


def _weighted_sum(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, torch.full((4, 1, 2, 2), 0.25, dtype=x.dtype), stride=2, groups=4)


def _half_grid(x: Tensor) -> Tensor:
    """Sampling points midway between four pixels: the average of 2 by 2."""
    theta = torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3)
    return F.affine_grid(theta, [x.shape[0], 4, 3, 3], align_corners=False)


IMAGES: dict[str, Case] = {
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
    "dense block": (_dense, _dense_plain),
    "u-net": (_unet, _unet_plain),
    "squeeze and excitation": (_excited, _excited_plain),
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
    "transposed convolution by pixel_shuffle": (
        lambda m, x: F.pixel_shuffle(
            F.conv2d(x, m.up.weight.permute(1, 2, 3, 0).reshape(16, 4, 1, 1)), 2
        ),
        lambda m, x: F.conv_transpose2d(x, m.up.weight, stride=2),
    ),
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
}


@pytest.mark.parametrize("case", IMAGES.values(), ids=IMAGES)
def test_images(case: Case) -> None:
    assert_images_agree(*case)
