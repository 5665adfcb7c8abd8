"""The graph of a run, held against that of torch.export on models that both can capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lrpfx
from lrpfx.errors import CaptureError
from tests.conftest import Apply, assert_untouched, lived_in


def _images() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.features(x)
        y = F.relu(y + self.conv(y))
        return self.head(y.mean((2, 3)))

    return Apply(forward, features=features, conv=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 3))


def _shared() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layer(self.layer(x).tanh())
        return F.linear(y.relu_(), self.layer.weight.T)  # tied across a transpose

    return Apply(forward, layer=nn.Linear(6, 6))


def _views() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layer(x)
        y[:, :2] += x[:, 2:4]  # and y is read again
        y[:, 3] = y[:, 0] * 2
        return y + self.shift

    return Apply(forward, layer=nn.Linear(6, 6), shift=torch.linspace(0, 1, 6))


def _without_gradient() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
        return self.layer(x) * gate + x.detach() * self.gate.weight[0]

    return Apply(forward, layer=nn.Linear(6, 6), gate=nn.Linear(6, 6))


def _autocast() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layer(x).softmax(-1)
            y = self.layer(y)
        return self.layer(y.float())

    return Apply(forward, layer=nn.Linear(6, 6))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2


def _odds() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = checkpoint(self.normed, x, use_reentrant=False)
        y = _Double.apply(checkpoint(self.normed, y, use_reentrant=True))
        return y + torch.tensor([1.0, 2, 3, 4, 5, 6]) + self.kept[0] + torch.tensor(x[0])

    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    return Apply(forward, normed=normed, kept=[torch.ones(6)])


def _recurrent() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.reshape(-1, 3, 2))[0][:, -1])

    return Apply(forward, lstm=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 2))


def _encoder() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 3, 2))[:, 0]

    return Apply(forward, layer=nn.TransformerEncoderLayer(2, 2, 4, batch_first=True))


def _counting() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen += len(x)
        self.running.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.layer(x) + self.running

    return Apply(forward, layer=nn.Linear(6, 6), running=torch.zeros(6), seen=torch.tensor(0))


BOTH = {
    "images": _images,
    "shared and tied": _shared,
    "writes into views": _views,
    "no_grad, detach and data": _without_gradient,
    "autocast": _autocast,
    "checkpoints, own functions, parametrisations, constants": _odds,
    "recurrent": _recurrent,
    "encoder": _encoder,
}


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_a_record_explains_as_an_export_does(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, 3, 8, 8) if make is _images else torch.randn(2, 6)
    if make is not _autocast:
        model, x = model.double(), x.double()
    layers = {_images: ["features.0", "conv"], _shared: ["layer"], _encoder: ["layer.linear*"]}
    paths = layers.get(make, [])
    a, b = (lrpfx.explain(model, x, 1, layers=paths, capture=by) for by in ("export", "record"))
    torch.testing.assert_close(b.output, a.output)
    torch.testing.assert_close(b.relevance, a.relevance, rtol=1e-10, atol=1e-12)
    assert b.layers.keys() == a.layers.keys()
    for path, calls in a.layers.items():
        for one, other in zip(calls, b.layers[path], strict=True):
            torch.testing.assert_close(one.relevance, other.relevance, rtol=1e-10, atol=1e-12)
    if paths:
        rows = [[(r.module, r.op, str(r.rule), r.source) for r in e.report.rows] for e in (a, b)]
        assert rows[0] == rows[1]


def test_a_record_holds_the_live_parameters() -> None:
    model = _shared().double()
    x = torch.randn(2, 6, dtype=torch.float64)
    explainer = lrpfx.Explainer(model, x, capture="record")
    with torch.no_grad():
        model.layer.weight.mul_(1.5)
    after = explainer(x, 1).relevance
    torch.testing.assert_close(after, lrpfx.explain(model, x, 1, capture="export").relevance)
    explanation = explainer(x, 1, create_graph=True)
    explanation.relevance.square().sum().backward()
    recorded = model.layer.weight.grad
    model.zero_grad()
    explanation = lrpfx.explain(model, x, 1, create_graph=True, capture="export")
    explanation.relevance.square().sum().backward()
    torch.testing.assert_close(recorded, model.layer.weight.grad)


@pytest.mark.parametrize("make", [_counting, _odds], ids=["counting", "odds"])
def test_recording_leaves_the_model_alone(make: Callable[[], nn.Module]) -> None:
    model, x = lived_in(make()), torch.randn(2, 6)
    with assert_untouched(model, x):
        explanation = lrpfx.explain(model, x, 1, capture="record")
    torch.testing.assert_close(explanation.output, model(x))


def test_a_failing_record_leaves_the_model_alone_and_names_the_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.vmap(self.layer)(x)

    model, x = lived_in(Apply(forward, layer=nn.Linear(6, 6))), torch.randn(2, 6)
    with assert_untouched(model, x), pytest.raises(CaptureError, match=r"vmap.*\n.*test_record.py"):
        lrpfx.explain(model, x, 1, capture="record")


def test_tensors_outside_of_the_model_may_be_parts_of_one() -> None:
    """As the two rows of a graph's edges are; what the run writes into is refused still."""
    source, target = torch.tensor([[0, 1, 2, 2], [1, 0, 5, 3]])
    rows = torch.zeros(2, 6, dtype=torch.float64)
    row = rows[0]
    x = torch.randn(2, 6, dtype=torch.float64)
    edges = Apply(lambda m, x: m.layer(x[:, source] * 2 + x[:, target].tanh()), layer=_layer(4))
    twin = Apply(
        lambda m, x: m.layer(x[:, source.clone()] * 2 + x[:, target.clone()].tanh()),
        layer=edges.layer,
    )
    got, expected = (lrpfx.explain(m, x, 1, capture="record").relevance for m in (edges, twin))
    torch.testing.assert_close(got, expected)

    def written(m: Any, x: Tensor) -> Tensor:
        row.copy_(x[0])
        return m.layer((x + rows[0])[:, :4])

    with pytest.raises(lrpfx.errors.CaptureError, match="shares memory"):
        lrpfx.explain(Apply(written, layer=edges.layer), x, 1, capture="record")


def _layer(size: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(size, 3).double()


def test_a_mask_that_is_a_constant_decides_by_no_input() -> None:
    fixed = torch.tensor([True, False, True, True, False, True])
    x = torch.randn(2, 6, dtype=torch.float64)
    model = Apply(lambda m, x: m.layer(x[:, fixed]), layer=_layer(4))
    assert lrpfx.explain(model, x, 1, capture="record").report.notes == ()
    model = Apply(lambda m, x: m.layer(x[:, x[0] > x[0].sort().values[1]]), layer=_layer(4))
    note, mixes = lrpfx.explain(model, x, 1, capture="record").report.notes
    assert note.startswith("recorded for these inputs alone") and "a mask" in note
    assert "depends on the others" in mixes  # the mask is made of the first sample
