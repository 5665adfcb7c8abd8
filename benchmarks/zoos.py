"""The models that ``benchmarks.coverage`` measures, each with inputs of a size that runs soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, and inputs for it.

    Args:
        name: In the table.
        make: Builds it, with random weights.
        inputs: Draws inputs for n samples: a tensor, a tuple, or a dict.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]


def images(*shape: int) -> Callable[[int], Tensor]:
    """Normal noise of shape (n, *shape)."""
    return lambda n: torch.randn(n, *shape)


# -- torchvision ----------------------------------------------------------------------------------

#: Side of the images, by the first name that the model's begins with; 64 elsewhere.
SIDES = {"vit_h_14": 518, "vit": 224, "swin": 64, "maxvit": 224, "inception": 96, "alexnet": 96}

#: Videos: (channels, frames, height, width), 8 frames of 64 x 64 elsewhere.
VIDEOS = {"mvit": (3, 16, 224, 224), "s3d": (3, 16, 64, 64)}

DETECTORS = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"]
DETECTORS += ["fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_fpn"]
DETECTORS += ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"]
DETECTORS += ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"]
DETECTORS += ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"]


def declare_missing_ops() -> None:
    """torchvision's wheel needs two ops of its own that a CPU build of torch does not load."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def torchvision_cases() -> Iterator[Case]:
    """All models for classification, segmentation, video, flow; the backbones of detectors."""
    declare_missing_ops()
    from torchvision import models

    def build(name: str, **options: Any) -> nn.Module:
        return models.get_model(name, weights=None, **options)

    for name in models.list_models(module=models):
        side = next((s for start, s in SIDES.items() if name.startswith(start)), 64)
        yield Case(name, partial(build, name), images(3, side, side))
    for name in models.list_models(module=models.segmentation):
        yield Case(name, partial(build, name, weights_backbone=None), images(3, 64, 64))
    for name in models.list_models(module=models.video):
        shape = next((s for start, s in VIDEOS.items() if name.startswith(start)), (3, 8, 64, 64))
        yield Case(name, partial(build, name), images(*shape))
    for name in models.list_models(module=models.optical_flow):
        yield Case(name, partial(build, name), two_frames)
    for name in DETECTORS:
        yield Case(f"{name}, backbone", partial(_backbone, build, name), images(3, 64, 64))


def two_frames(n: int) -> tuple[Any, ...]:
    """Two images and the number of refinements, as optical flow takes them."""
    return torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128), 2


def _backbone(build: Callable[..., nn.Module], name: str) -> nn.Module:
    backbone = build(name, weights_backbone=None).backbone
    assert isinstance(backbone, nn.Module)
    return backbone


ZOOS: dict[str, Callable[[], Iterator[Case]]] = {
    "torchvision": torchvision_cases,
}
