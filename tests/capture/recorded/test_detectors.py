"""Detectors of torchvision up to the boxes that a target picks, against twins that pick by index.

Suppression selects boxes, as max pooling does values: what was selected is a constant of the twin.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

import lrpfx
from lrpfx.errors import TargetError
from tests.conftest import Apply


def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    kept, order = [], scores.argsort(descending=True, stable=True)
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        overlaps = torchvision.ops.box_iou(boxes[best][None], boxes[order])[0]
        order = order[overlaps <= threshold]
    return torch.stack(kept) if kept else order


def _plain_alignment() -> Any:
    """The one that torchvision has in Python, there behind a compiler."""
    cells = torchvision.ops.roi_align.__globals__["_roi_align"].__closure__
    (function,) = [c.cell_contents for c in cells if callable(c.cell_contents)]
    return function


@pytest.fixture(
    scope="module",
    params=["as one op", pytest.param("in Python", marks=pytest.mark.nightly)],
)
def aligning(request: pytest.FixtureRequest) -> Iterator[None]:
    """torchvision's own ops, where its library could be loaded; else such as do the same."""
    if torchvision.extension._has_ops():
        if request.param == "in Python":
            pytest.skip("torchvision has its own op")
        yield
        return
    patch = pytest.MonkeyPatch()
    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        library.impl("nms", _suppress, "CPU")
        patch.setattr(torchvision.ops.boxes, "_assert_has_ops", lambda: None)
        names, plain = torchvision.ops.roi_align.__globals__, _plain_alignment()
        if request.param == "as one op":
            library.define(
                "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
                "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
            )
            library.impl("roi_align", plain, "CompositeImplicitAutograd")
            for name in ("_has_ops", "_assert_has_ops"):
                patch.setitem(names, name, lambda: True)
        else:
            patch.setitem(names, "_roi_align", plain)
        yield
        patch.undo()


class _Backbone(nn.Module):
    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride, 1), nn.ReLU())
        self.out_channels = 4

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.body(x)}


_MEANS: dict[str, Any] = dict(image_mean=[0.0] * 3, image_std=[1.0] * 3)
_SIZES: dict[str, Any] = dict(_MEANS, min_size=16, max_size=16, size_divisible=1)


def _spread(model: nn.Module) -> Any:
    """Weights of which no layer lets values die."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.double().eval()


def _image() -> Tensor:
    return torch.rand(3, 16, 16, dtype=torch.float64)


def _two_stages() -> Any:
    anchors = AnchorGenerator(((4, 8),), ((1.0,),))
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 2, 2)
    return _spread(
        detection.FasterRCNN(
            _Backbone(),
            rpn_anchor_generator=anchors,
            box_roi_pool=pool,
            rpn_post_nms_top_n_test=6,
            box_head=detection.faster_rcnn.TwoMLPHead(16, 5),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(5, 3),
            **_SIZES,
        )
    )


def _twin_of_two_stages(model: Any, image: Tensor, found: dict[str, Tensor]) -> nn.Module:
    """The same with its proposals as constants, and the box by its number."""
    kept: list[Any] = []
    with model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, args: kept.append(args)):
        model([image])
    _, proposals, shapes = kept[0]

    def forward(self: Any, x: Tensor) -> Tensor:
        pooled = self.heads.box_roi_pool(self.backbone(x), proposals, shapes)
        scores, _ = self.heads.box_predictor(self.heads.box_head(pooled))
        return scores

    twin = Apply(forward, backbone=model.backbone, heads=model.roi_heads)
    # Indices lead from the softmax to the score, so that it is left out as one at an output.
    return _at(twin, image, found, lambda scores: scores.softmax(-1))


def _one_stage() -> Any:
    anchors = AnchorGenerator(((4, 8),), ((1.0,),))
    return _spread(detection.RetinaNet(_Backbone(), 2, anchor_generator=anchors, **_SIZES))


def _twin_of_one_stage(model: Any, image: Tensor, found: dict[str, Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(list(self.backbone(x).values()))["cls_logits"].sigmoid()[0]

    return _at(Apply(forward, backbone=model.backbone, head=model.head), image, found)


def _single_shot() -> Any:
    boxes = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
    head = detection.ssd.SSDHead([4], boxes.num_anchors_per_location(), 3)
    return _spread(detection.ssd.SSD(_Backbone(8), boxes, (16, 16), 3, head=head, **_MEANS))


def _twin_of_single_shot(model: Any, image: Tensor, found: dict[str, Tensor]) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(list(self.backbone(x).values()))["cls_logits"].softmax(-1)[0]

    return _at(Apply(forward, backbone=model.backbone, head=model.head), image, found)


def _at(
    scores: nn.Module,
    image: Tensor,
    found: dict[str, Tensor],
    of: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> nn.Module:
    """Twice the one entry of a table of scores that is the best box's.

    Twice, by a sum, as lrpfx would leave out a softmax that is the output, also before a scale.
    """
    with torch.no_grad():
        table = of(scores(image[None]))
    row, column = ((table - found["scores"][0]).abs() == 0).nonzero()[0].tolist()

    def forward(self: Any, x: Tensor) -> Tensor:
        score = self.scores(x[None])[row : row + 1, column]
        return score + score

    return Apply(forward, scores=scores)


DETECTORS = {
    "Faster R-CNN": (_two_stages, _twin_of_two_stages),
    "RetinaNet": (_one_stage, _twin_of_one_stage),
    "SSD": (_single_shot, _twin_of_single_shot),
}


def _best(output: Any) -> Any:
    return output[0]["scores"][:1]


@pytest.mark.parametrize("name", DETECTORS)
def test_the_score_of_a_box_is_explained_as_by_its_place(name: str, aligning: None) -> None:
    make, twin_of = DETECTORS[name]
    model, image = make(), _image()
    with torch.no_grad():
        (found,) = model([image])
    explanation = lrpfx.explain(model, ([image],), _best, capture="record")
    torch.testing.assert_close(explanation.output[0]["boxes"], found["boxes"])
    twin = twin_of(model, image, found)
    expected = lrpfx.explain(twin, image, lambda out: out.sum(), capture="export").relevance
    (relevance,) = explanation.relevance[0]
    assert expected.abs().sum() > 1e-3
    torch.testing.assert_close(2 * relevance, expected, rtol=1e-3, atol=1e-6)  # stabilizers
    assert any("nms at" in note for note in explanation.report.notes)
    assert not any("roi_align" in note for note in explanation.report.notes)


def test_a_box_that_is_not_there_is_no_target(aligning: None) -> None:
    model = _one_stage()
    with pytest.raises(TargetError, match="picks nothing"):
        lrpfx.explain(
            model, ([_image()],), lambda output: output[0]["scores"][10_000:], capture="record"
        )
