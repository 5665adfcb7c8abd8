"""Batch norm and constants per channel behind moves are folded into the layer all the same."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import lrpfx
from lrpfx import composites
from tests.conftest import Apply
from tests.oracle.spellings import drawn, normal

pytestmark = pytest.mark.usefixtures("each_way")

Form = Callable[[nn.Module, Tensor], Tensor]
#: Splits weights by sign everywhere.
RULES = composites.ExcitationBackprop(1e-18)


def conv(*args: int) -> nn.Module:
    return drawn(nn.Conv2d(3, *args), seed=5)


def compared(layer: nn.Module, norm: nn.Module, form: Form, x: Tensor) -> lrpfx.Explanation:
    """The explanation of the form, held against that of the fused layer in it."""
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    fused = fuse(copy.deepcopy(layer).eval(), norm)
    size = form(Apply(None, layer=layer, norm=norm), x).flatten(1).shape[1]
    head = drawn(nn.Linear(size, 2), seed=4)

    def model(layer: nn.Module, norm: nn.Module) -> nn.Module:
        return Apply(
            lambda m, x: m.head(F.relu(form(m, x)).flatten(1)), layer=layer, norm=norm, head=head
        )

    found, expected = (
        lrpfx.explain(m, x, torch.ones(len(x), 2).double(), rules=RULES)
        for m in (model(layer, norm), model(fused, nn.Identity()))
    )
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.relevance, expected.relevance)
    return found


MOVES: dict[str, tuple[nn.Module, int, int, Form, tuple[int, ...]]] = {
    "transposed": (nn.Linear(3, 4), 1, 4, lambda m, x: m.norm(m.layer(x).mT), (5, 3)),
    "viewed": (
        nn.Linear(3, 4),
        1,
        4,
        lambda m, x: m.norm(m.layer(x).view(-1, 4)).view(len(x), -1, 4),
        (5, 3),
    ),
    "squeezed": (
        nn.Conv2d(3, 4, (6, 1)),
        1,
        4,
        lambda m, x: m.norm(m.layer(x).squeeze(2)),
        (3, 6, 6),
    ),
    "unsqueezed": (nn.Conv1d(3, 4, 3), 2, 4, lambda m, x: m.norm(m.layer(x).unsqueeze(2)), (3, 6)),
    "permuted twice, with dropout": (
        nn.Linear(3, 4),
        2,
        4,
        lambda m, x: m.norm(F.dropout(m.layer(x), 0.5, False).permute(0, 3, 1, 2)).permute(
            0, 2, 3, 1
        ),
        (4, 4, 3),
    ),
    "cropped": (nn.Conv2d(3, 4, 3), 2, 4, lambda m, x: m.norm(m.layer(x)[..., 1:]), (3, 6, 6)),
    "flattened": (
        nn.Conv2d(3, 4, 3),
        1,
        4,
        lambda m, x: m.norm(m.layer(x).flatten(2)),
        (3, 6, 6),
    ),
}


@pytest.mark.parametrize("case", MOVES.values(), ids=MOVES)
def test_batch_norm_behind_a_move_is_that_of_the_fused_layer(case: tuple) -> None:
    layer, dims, channels, form, shape = case
    layer, norm = drawn(layer, seed=5), drawn((nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1](channels))
    report = compared(layer, norm, form, normal(2, *shape)).report
    assert not [row for row in report.rows if row.kind in ("batch_norm", "scale", "shift")]
    assert any("norm" in row.label for row in report.rows)


def same_relevance(spelled: Form, plain: Form, **members: nn.Module | Tensor) -> None:
    x = normal(2, 3, 6, 6)
    found = []
    for form in (spelled, plain):
        model = Apply(form, **members)
        found.append(lrpfx.explain(model, x, torch.ones_like(model(x)), rules=RULES).relevance)
    torch.testing.assert_close(*found)


def test_batch_norm_of_parts_is_shared_out_among_the_layers() -> None:
    norm, a, b = drawn(nn.BatchNorm2d(7)), conv(3, 3), conv(4, 3)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    shift = (norm.bias - norm.running_mean * scale).detach()

    def by_hand(m: nn.Module, x: Tensor) -> Tensor:
        parts = []
        for layer, at in ((m.a, slice(0, 3)), (m.b, slice(3, 7))):
            weight = layer.weight * scale[at, None, None, None]
            parts.append(F.conv2d(x, weight, layer.bias * scale[at] + shift[at]))
        return F.relu(torch.cat(parts, 1))

    same_relevance(
        lambda m, x: F.relu(m.norm(torch.cat([m.a(x), m.b(x)], 1))), by_hand, a=a, b=b, norm=norm
    )


def test_batch_norm_of_some_channels_leaves_the_others() -> None:
    norm, layer = drawn(nn.BatchNorm2d(2)), conv(5, 3)
    fused = nn.Conv2d(3, 2, 3).double()
    with torch.no_grad():
        fused.weight.copy_(layer.weight[[1, 2]]), fused.bias.copy_(layer.bias[[1, 2]])
    same_relevance(
        lambda m, x: F.relu(m.norm(m.layer(x)[:, 1:3])),
        lambda m, x: F.relu(m.fused(x)),
        layer=layer,
        norm=norm,
        fused=fuse_conv_bn_eval(fused.eval(), norm),
    )


def test_a_number_between_a_layer_and_its_constants_is_folded_too() -> None:
    bias = normal(4, 1, 1, seed=9)
    layer = conv(4, 3)
    for spelled, factor in (
        (lambda m, x: F.relu(0.5 * m.layer(x) + bias), 0.5),
        (lambda m, x: F.relu(-m.layer(x) + bias), -1),
        (lambda m, x: F.relu(bias - m.layer(x)), -1),
        (lambda m, x: F.relu(m.layer(x).flatten(2) / 4 + bias[..., 0]).view(2, 4, 4, 4), 0.25),
    ):

        def plain(m: nn.Module, x: Tensor, k: float = factor) -> Tensor:
            return F.relu(F.conv2d(x, k * m.layer.weight, k * m.layer.bias + bias.flatten()))

        same_relevance(spelled, plain, layer=layer)


def fused_ahead(m: nn.Module, x: Tensor) -> Tensor:
    scale, shift = constants(m.norm)
    bias = m.behind.bias + (m.behind.weight * shift[:, None, None]).sum((1, 2, 3))
    y = F.relu(m.layer(x))
    return F.relu(F.conv2d(y, m.behind.weight * scale[:, None, None], bias))


def constants(norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    return scale, (norm.bias - norm.running_mean * scale).detach()


def by_hand(m: nn.Module, y: Tensor) -> Tensor:
    scale, shift = constants(m.norm)
    return y * scale[:, None, None] + shift[:, None, None]


def test_batch_norm_before_a_convolution_is_part_of_it() -> None:
    members = {"layer": conv(4, 3), "norm": drawn(nn.BatchNorm2d(4))}
    members["behind"] = drawn(nn.Conv2d(4, 5, 3), seed=6)
    same_relevance(
        lambda m, x: F.relu(m.behind(m.norm(F.relu(m.layer(x))))), fused_ahead, **members
    )


def half_by_half(m: nn.Module, x: Tensor) -> Tensor:
    y = x.new_zeros(2, 4, 4, 4)
    y[:, :2], y[:, 2:] = (part.clone() for part in m.layer(x).chunk(2, 1))
    return y


#: Each scales and shifts in more than one step, or behind parts that are put together again.
STEPS: dict[str, Form] = {
    "in two steps behind a move": lambda m, x: (
        m.layer(x).movedim(1, 3) * constants(m.norm)[0] + constants(m.norm)[1]
    ).movedim(3, 1),
    "behind chunks": lambda m, x: m.norm(torch.cat(m.layer(x).chunk(2, 1), 1)),
    "behind writes": lambda m, x: by_hand(m, half_by_half(m, x)),
    "by einsum": lambda m, x: (
        torch.einsum("nchw,c->nchw", m.layer(x), constants(m.norm)[0])
        + constants(m.norm)[1][:, None, None]
    ),
}


@pytest.mark.parametrize("form", STEPS.values(), ids=STEPS)
def test_constants_in_steps_are_those_of_the_fused_layer(form: Form) -> None:
    layer, norm = conv(4, 3), drawn(nn.BatchNorm2d(4))
    same_relevance(
        lambda m, x: F.relu(form(m, x)),
        lambda m, x: F.relu(m.fused(x)),
        layer=layer,
        norm=norm,
        fused=fuse_conv_bn_eval(copy.deepcopy(layer).eval(), norm),
    )


def test_of_two_batch_norms_behind_moves_both_are_folded() -> None:
    layer, norm, other = conv(4, 3), drawn(nn.BatchNorm2d(4)), drawn(nn.BatchNorm2d(4), seed=8)
    fused = fuse_conv_bn_eval(fuse_conv_bn_eval(copy.deepcopy(layer).eval(), norm), other)
    same_relevance(
        lambda m, x: F.relu(m.other(m.norm(m.layer(x).mT).mT)),
        lambda m, x: F.relu(m.fused(x)),
        **{"layer": layer, "norm": norm, "other": other, "fused": fused},
    )


# -- what stays by itself says why ----------------------------------------------------------------

KEPT: dict[str, tuple[Form, str]] = {
    "read twice": (
        lambda m, x: m.norm(y := m.layer(x)) + y,
        "conv2d of layer before it is read 2 times",
    ),
    "an activation": (
        lambda m, x: m.norm(F.relu(m.layer(x))),
        "relu stands between it and a layer",
    ),
    "channels mixed": (
        lambda m, x: m.norm(m.layer(x).transpose(1, 2)),
        "its channels are not those of the layer before it",
    ),
    "padded": (lambda m, x: m.norm(F.pad(m.layer(x), (1, 1))), "its input is padded"),
    "padding behind": (
        lambda m, x: m.behind(m.norm(x[:, :1].expand(-1, 4, -1, -1))),
        "pads with zeros",
    ),
}


@pytest.mark.parametrize(("form", "why"), KEPT.values(), ids=KEPT)
def test_a_batch_norm_that_stays_by_itself_says_why(form: Form, why: str) -> None:
    members = {
        "layer": conv(4, 3),
        "norm": drawn(nn.BatchNorm2d(4)),
        "behind": drawn(nn.Conv2d(4, 2, 3, padding=1)),
    }
    report = lrpfx.explain(Apply(form, **members), normal(2, 3, 6, 6), rules=RULES).report
    (row,) = (row for row in report.rows if row.kind == "batch_norm")
    assert "not folded: " in row.why and why in row.why
    assert not any("is not folded" in note for note in report.notes)


@pytest.mark.parametrize("linear", [False, True])
def test_constants_by_hand_before_a_layer_stay_and_say_why(linear: bool) -> None:
    shape = (4,) if linear else (4, 1, 1)
    scale, shift = normal(*shape), normal(*shape)
    layer, behind = (
        (nn.Linear(3, 4), nn.Linear(4, 2)) if linear else (conv(4, 3), nn.Conv2d(4, 2, 3))
    )
    form = Apply(
        lambda m, x: m.behind(m.layer(2 * x + 1).relu() * scale + shift), layer=layer, behind=behind
    ).double()
    x = normal(2, 3) if linear else normal(2, 3, 9, 9)
    rows = lrpfx.explain(form, x, lambda out: out.flatten(1).sum(1), rules=RULES).report.rows
    kept = [row.kind for row in rows if "constants by hand before" in row.why]
    assert kept == ["scale", "shift"]  # not those of the input


def test_a_hook_that_masks_before_a_batch_norm_is_noted_with_its_line() -> None:
    keep = (normal(4, 4) > 0).double()

    def mask(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output * keep

    def blank(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output[:, 1] = 0
        return output

    for hook, op in ((mask, "mul"), (blank, "_scatter")):  # of a slice or of one
        model = nn.Sequential(conv(4, 3), drawn(nn.BatchNorm2d(4)), nn.ReLU()).eval()
        model[0].register_forward_hook(hook)
        report = lrpfx.explain(model, normal(2, 3, 6, 6), (0, 0, 0), rules=RULES).report
        line = f"{__file__}:{hook.__code__.co_firstlineno}"
        (note,) = (n for n in report.notes if "1 is not folded" in n)
        assert f"{op} stands between" in note and note.endswith(f"{hook.__name__}, {line}")


def test_a_constant_whose_size_is_read_from_values_is_no_error() -> None:
    keep, weight = torch.tensor([True, False, True, True]), normal(4, seed=3)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        at = keep.nonzero()[:, 0]
        return (m.layer(x)[:, at] * weight[at]).sum(1)

    model = Apply(forward, layer=drawn(nn.Linear(3, 4), seed=5))
    found, expected = (
        lrpfx.explain(model, normal(2, 3), rules=composites.EpsilonAll(1e-18), capture=by).relevance
        for by in ("export", "record")
    )
    torch.testing.assert_close(found, expected)
