"""Inputs, weights and models of odd kinds: explained, or refused for the reason that is theirs."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.utils import _pytree as pytree

import lrpfx
from lrpfx import errors
from tests.conftest import Apply, assert_untouched

pytestmark = pytest.mark.usefixtures("each_way")


def linear(*shape: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*shape)


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3), generator=torch.Generator().manual_seed(1))


# -- classes of inputs ----------------------------------------------------------------------------


class Batch:
    """Registered without key paths, and particular about what it is made of."""

    def __init__(self, x: Any, extra: Any = None) -> None:
        self.x, self.extra = x, extra
        assert x is None or isinstance(x, Tensor)


class Unnamed(Batch):
    """Registered without a name for serialization, too."""


def parts(batch: Batch) -> tuple[list[Any], None]:
    return [batch.x, batch.extra], None


pytree.register_pytree_node(
    Batch, parts, lambda c, _: Batch(*c), serialized_type_name="tests.Batch"
)
pytree.register_pytree_node(Unnamed, parts, lambda c, _: Unnamed(*c))


@pytest.mark.parametrize("kind", [Batch, Unnamed])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "in a dict"])
def test_classes_registered_without_key_paths_are_inputs(kind: Any, wrapped: bool) -> None:
    def forward(m: Any, batch: Any) -> Tensor:
        batch = batch["batch"] if wrapped else batch
        return m.fc(batch.x) + batch.extra

    def given(x: Tensor) -> Any:
        batch = kind(x, torch.ones(len(x), 2))
        return ({"batch": batch} if wrapped else batch,)

    model = Apply(forward, fc=linear(3, 2))
    plain = Apply(lambda m, x: m.fc(x) + torch.ones(len(x), 2), fc=model.fc)
    before = pytree.SUPPORTED_NODES[kind]
    explainer = lrpfx.Explainer(model, given(x()))
    for inputs in (x(), x(5, 3)):  # of any batch size
        got = explainer(given(inputs), 1).relevance[0]
        got = got["batch"] if wrapped else got
        assert isinstance(got, kind)
        assert torch.equal(got.x, lrpfx.explain(plain, inputs, 1).relevance)
    assert pytree.SUPPORTED_NODES[kind] is before
    with pytest.raises(errors.InputError, match="structured otherwise(.|\n)*captured: inputs"):
        explainer(x(), 1)


# -- weights that are no plain tensors ------------------------------------------------------------


class Int8(Tensor):
    """A weight that is stored in eight bits, in the manner of torchao."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, stored: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, stored.shape, dtype=scale.dtype)

    def __init__(self, stored: Tensor, scale: Tensor) -> None:
        self.stored, self.scale = stored, scale

    def dequantize(self) -> Tensor:
        return self.stored * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].scale)
        if func in (torch.ops.aten.t.default, torch.ops.aten.addmm.default):
            return func(*(a.dequantize() if isinstance(a, cls) else a for a in args))
        raise NotImplementedError(func)


def quantised(layer: nn.Linear) -> nn.Linear:
    scale = layer.weight.detach().abs().max() / 127
    stored = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Int8(stored, scale), requires_grad=False)
    return layer


def test_weights_that_are_tensor_subclasses_are_refused_by_name() -> None:
    model = nn.Sequential(linear(3, 4), nn.ReLU(), quantised(linear(4, 2))).eval()
    assert model(x()).shape == (2, 2)
    with pytest.raises(errors.CaptureError, match=r"2\.weight \(Int8\)(.|\n)*dequantize\(\)"):
        lrpfx.explain(model, x(), 1)
    model[2].weight = nn.Parameter(model[2].weight.dequantize())
    assert lrpfx.explain(model, x(), 1).relevance.any()


def test_subclasses_that_leave_ops_alone_are_plain_tensors() -> None:
    class Named(nn.Parameter):
        pass

    model = linear(3, 2)
    expected = lrpfx.explain(model, x(), 1).relevance
    model.weight = Named(model.weight.detach())
    assert torch.equal(lrpfx.explain(model, x(), 1).relevance, expected)


# -- quantised models -----------------------------------------------------------------------------


def fake_quantised(config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    model.qconfig = config
    with pytest.warns(DeprecationWarning):
        quantization.prepare_qat(model, inplace=True)
    for i in range(5):
        model(x(20, 3) + i / 9)
    return model.eval()


def test_fake_quantisation_counts_as_identity() -> None:
    model = fake_quantised(quantization.get_default_qat_qconfig())
    model.apply(quantization.disable_observer)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for i in (0, 2):
        plain[i].weight.data = model[i].weight_fake_quant(model[i].weight).detach()
        plain[i].bias.data = model[i].bias.detach()
    # What is left between the two is the rounding of activations, by some hundredths.
    for ledger in (True, False):
        got, want = (lrpfx.explain(m, x(), 1, ledger=ledger).relevance for m in (model, plain))
        assert (got - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize(
    "fake",
    [
        lambda y: torch.fake_quantize_per_tensor_affine(y, 0.01, 0, -128, 127),
        lambda y: torch.fake_quantize_per_channel_affine(
            y, torch.tensor([0.01, 0.02]), torch.tensor([0, 3]).int(), 1, -128, 127
        ),
    ],
)
def test_relevance_passes_what_is_rounded_to_a_grid(fake: Any) -> None:
    """By hand: the head's relevance w y of rounded y, shared by the summands of the plain sum."""
    torch.manual_seed(0)
    fc, head = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)
    model = Apply(lambda m, x: m.head(fake(m.fc(x))), fc=fc, head=head)
    got = lrpfx.explain(model, x(), 1, rules=lrpfx.composites.EpsilonAll(0.0)).relevance
    y = fc(x())
    want = (head.weight[1] * fake(y) / y) @ fc.weight * x()
    torch.testing.assert_close(got, want)


def test_observers_that_are_on_are_the_reason_for_a_refusal() -> None:
    model = fake_quantised(quantization.get_default_qat_qconfig())
    with assert_untouched(model), pytest.raises(errors.CaptureError, match="disable_observer"):
        lrpfx.explain(model, x(), 1)


# -- reasons, lines and repairs -------------------------------------------------------------------


def test_batch_norm_without_statistics_is_not_told_to_evaluate() -> None:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
    with pytest.raises(errors.TrainingModeError, match=r"1: batch_norm has no running") as caught:
        lrpfx.explain(nn.Sequential(*layers).eval(), x(), 1)
    assert "eval()" not in str(caught.value) and "track_running_stats" in caught.value.fix


class Ends(nn.Module):
    """Relevance ends on the way to the head."""

    def __init__(self, way: str, width: int) -> None:
        super().__init__()
        self.way, self.fc, self.head = way, linear(3, 3), linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "argmax":
            return self.head(self.fc(x).argmax(1, True).float())
        if self.way == "round":
            return self.head(self.fc(x).round())
        if self.way == "no_grad":
            with torch.no_grad():
                features = self.fc(x)
            return self.head(features)
        return self.head(self.fc(x).detach())


@pytest.mark.parametrize(
    ("way", "op", "line"),
    [
        ("no_grad", "detach", "features = self.fc(x)"),
        ("detach", "detach", "return self.head(self.fc(x).detach())"),
        ("argmax", "argmax", "return self.head(self.fc(x).argmax(1, True).float())"),
        ("round", "round", "return self.head(self.fc(x).round())"),
    ],
)
def test_where_relevance_ends_is_named(way: str, op: str, line: str) -> None:
    with pytest.raises(errors.CaptureError, match="relevance ends") as caught:
        lrpfx.explain(Ends(way, 1 if way == "argmax" else 3), x(), 1)
    (place,) = caught.value.where
    assert place.startswith(f"{op}   {__file__}:") and place.endswith(line)


def fixed_by_a_branch(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x)
    return y if x.shape[0] == 2 else -y


def fixed_by_a_buffer(m: Any, x: Tensor) -> Tensor:
    z = x * m.mask
    return m.fc(z)


def fixed_by_a_number(m: Any, x: Tensor) -> Tensor:
    return m.fc(x) + len(range(int(x.shape[0])))


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (fixed_by_a_branch, "return y if x.shape[0] == 2 else -y"),
        (fixed_by_a_buffer, "z = x * m.mask"),
        (fixed_by_a_number, "return m.fc(x) + len(range(int(x.shape[0])))"),
    ],
)
def test_a_fixed_batch_names_the_line_that_fixes_it(forward: Any, line: str) -> None:
    model = Apply(forward, fc=linear(3, 2), mask=torch.ones(2, 3))
    note = lrpfx.Explainer(model, x()).report.notes[0]
    assert note.startswith(f"captured for a batch of 2 only: the size is fixed at {__file__}:")
    assert line in note and "an Explainer for each size" in note and "TORCH_LOGS" not in note


@pytest.fixture
def torch_shapes() -> ModuleType:
    """A package whose name begins as PyTorch's, installed beside it."""
    folder = Path(torch.__file__).parent.with_name("torch_shapes_of_a_test")
    source = "def branch(x):\n    if x.sum() > 0:\n        return x\n    return -x\n"
    module = ModuleType("torch_shapes_of_a_test")
    exec(compile(source, str(folder / "ops.py"), "exec"), module.__dict__)
    return module


def test_lines_of_packages_beside_torch_are_the_users(torch_shapes: Any) -> None:
    model = Apply(lambda m, x: m.fc(torch_shapes.branch(x)), fc=linear(3, 2))
    with pytest.raises(errors.CaptureError, match="branches") as caught:
        lrpfx.explain(model, x(), 1, capture="export")
    assert "torch_shapes_of_a_test/ops.py:2" in caught.value.where[0]
