"""Targets that could mean another thing, or explain another number: refused, or noted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx import errors
from lrpfx.composites import EpsilonAll
from tests.conftest import Apply
from tests.test_errors import check_form

EXACT = EpsilonAll(0.0)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def linear(*sizes: int) -> nn.Sequential:
    """Without biases, so that under LRP-0 relevance sums to what is explained."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


# -- an output of three dimensions ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sequence() -> lrpfx.Explainer:
    """(N, T, 4) -> (N, T, 5)"""
    return lrpfx.Explainer(linear(4, 6, 5), draw(2, 3, 4), EXACT)


@pytest.mark.parametrize("target", [2, -1, torch.tensor(2), [1, 2], torch.tensor([1, 2])])
def test_a_class_of_three_dimensions_is_refused_with_both_forms(
    sequence: lrpfx.Explainer, target: Any
) -> None:
    with pytest.raises(errors.TargetError, match="dimension 1 or 2") as caught:
        sequence(draw(2, 3, 4), target)
    check_form(caught.value)
    if target == 2 if isinstance(target, int) else False:
        assert "(-1, 2)" in caught.value.fix and "(2,)" in caught.value.fix


@pytest.mark.parametrize(
    ("target", "explained"),
    [
        ((-1, 2), lambda out: out[:, -1, 2]),
        ((2, -1), lambda out: out[:, 2, -1]),
        ((slice(None), 2), lambda out: out[:, :, 2].sum(1)),
        ((2,), lambda out: out[:, 2].sum(1)),
    ],
)
def test_the_forms_that_the_error_names_explain_what_they_say(
    sequence: lrpfx.Explainer, target: Any, explained: Callable
) -> None:
    e = sequence(draw(2, 3, 4), target)
    torch.testing.assert_close(e.relevance.sum((1, 2)), explained(e.output))


def test_a_class_of_a_map_is_all_of_its_pixels() -> None:
    model = nn.Conv2d(2, 3, 1, bias=False).double().eval()
    e = lrpfx.explain(model, draw(2, 2, 4, 4), -1, rules=EXACT)
    torch.testing.assert_close(e.relevance.sum((1, 2, 3)), e.output[:, 2].sum((1, 2)))
    assert not e.report.notes


@pytest.mark.parametrize(
    ("model", "shape"), [(nn.Conv2d(2, 3, 1), (2, 2, 4, 4)), (nn.Conv1d(2, 3, 1), (1, 2, 5))]
)
def test_none_on_a_map_names_the_entry_that_it_explains(model: nn.Module, shape: Any) -> None:
    e = lrpfx.explain(model.double().eval(), draw(*shape))
    (note,) = e.report.notes
    best = e.output[0].argmax()
    place = [0, *map(int, torch.unravel_index(best, e.output[0].shape))]
    assert "one entry" in note and f"output{place}" in note
    assert e.seed[tuple(place)] == e.output[tuple(place)] and (e.seed[0] != 0).sum() == 1


# -- callables ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        lambda out: out[:, 0] - 150,
        lambda out: out.softmax(1)[:, 1],
        lambda out: out[:, 1] ** 2,
        lambda out: torch.nn.functional.cross_entropy(out, torch.tensor([0, 2])),
        lambda out: (out[:, 0] + 3).sum(),
    ],
    ids=["constant", "softmax", "square", "loss", "sum"],
)
def test_a_callable_that_is_not_its_gradient_times_output_is_noted(target: Callable) -> None:
    e = lrpfx.explain(linear(4, 6, 3), draw(2, 4), target, rules=EXACT)
    out = e.output.clone().requires_grad_()
    value = target(out)
    (gradient,) = torch.autograd.grad(value.sum(), out)
    seed = (gradient * out).detach()
    torch.testing.assert_close(e.seed, seed)
    (note,) = e.report.notes
    of = (value - seed.sum(1)).abs().argmax() if value.ndim else ...
    assert f"{value[of].item():.4g}" in note
    assert f"{(seed.sum(1)[of] if value.ndim else seed.sum()).item():.4g}" in note


@pytest.mark.parametrize(
    "target",
    [
        lambda out: out[:, 1],
        lambda out: out[:, 1] - 2 * out[:, 0],
        lambda out: out.amax(1),
        lambda out: out.mean(),
        lambda out: out.relu().sum(1),
    ],
)
def test_a_callable_that_is_linear_is_not_noted(target: Callable) -> None:
    notes = lrpfx.explain(linear(4, 6, 3), draw(2, 4), target).report.notes
    assert not [note for note in notes if note.startswith("target")]


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_with_a_softmax_at_the_output_the_report_says_what_each_target_explains(
    last: nn.Module,
) -> None:
    body, x = linear(4, 6, 3), draw(2, 4)
    explainer = lrpfx.Explainer(nn.Sequential(*body, last), x, EXACT)
    logits = body(x)
    for target in (1, -2, (1,), [1, 1]):
        e = explainer(x, target)
        assert "explained are its logits" in e.report.notes[0]
        torch.testing.assert_close(e.relevance.sum(1), logits[:, 1])
    e = explainer(x, lambda out: out[:, 1])
    z = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(last(z)[:, 1].sum(), z)
    torch.testing.assert_close(e.relevance.sum(1), (gradient * z).detach().sum(1))
    assert "explained are" not in " ".join(e.report.notes)
    assert "gradient of the target through it, times the logits" in e.report.notes[0]
    assert f"{e.output[:, 1].max():.4g}" in e.report.notes[1] or "sums to" in e.report.notes[1]


# -- no dimension of samples ----------------------------------------------------------------------


def flat(model: Any, x: Tensor) -> Tensor:
    return model.body(x.flatten())


ALONE: list[Any] = [
    pytest.param(linear(4, 6, 3), draw(4), id="linear"),
    pytest.param(linear(4, 6, 4), draw(4), id="as many classes as features"),
    pytest.param(nn.Conv2d(3, 3, 2).double(), draw(3, 4, 4), id="image"),
    pytest.param(
        Apply(
            lambda m, x: m.body(m.conv(x).mean((-1, -2))),
            conv=nn.Conv2d(3, 5, 2),
            body=nn.Linear(5, 3),
        ).double(),
        draw(3, 4, 4),
        id="as many classes as channels",
    ),
    pytest.param(Apply(flat, body=linear(8, 5, 3)), draw(2, 4), id="flattened"),
    pytest.param(
        Apply(lambda m, x: m.body(x).mean(0), body=linear(4, 6, 3)), draw(5, 4), id="mean"
    ),
]


@pytest.mark.parametrize(("model", "x"), ALONE)
def test_one_sample_without_a_batch_dimension_is_refused_with_the_repair(
    model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(errors.TargetError, match="no dimension of samples") as caught:
        lrpfx.explain(model.eval(), x)
    assert "x[None]" in caught.value.fix
    check_form(caught.value)


def test_one_sample_alone_is_explained_where_the_target_is_said() -> None:
    model, x = linear(4, 6, 3), draw(4)
    explainer = lrpfx.Explainer(model, x, EXACT)
    batch = lrpfx.explain(model, x[None], 1, rules=EXACT).relevance[0]
    torch.testing.assert_close(explainer(x, lambda out: out[1]).relevance, batch)
    torch.testing.assert_close(explainer(x, torch.eye(3)[1] * model(x)).relevance, batch)
    for target in (1, (1,), -2):
        e = explainer(x, target)
        torch.testing.assert_close(e.relevance, batch)
        assert any("has no dimension of samples: explained is output" in n for n in e.report.notes)
    with pytest.raises(errors.TargetError, match="out of range"):
        explainer(x, 3)


def test_one_sequence_alone_is_told_to_be_given_as_a_batch_of_one() -> None:
    """Its positions are taken for samples, as nothing tells that they are none."""
    x, model = draw(5, 4), Apply(lambda m, x: m.body(x).cumsum(-2), body=linear(4, 6, 4)).double()
    with pytest.raises(errors.TargetError, match=r"x\[None\]"):
        lrpfx.explain(model, x, (-1, 3))
    assert lrpfx.explain(model, x[None], (-1, 3)).relevance.any()


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda m, x: m.body(x).squeeze(1), (3, 4)),
        (lambda m, x: x.tanh(), (4,)),
        (lambda m, x: m.body(x.reshape(3, -1)).squeeze(1), (3, 2, 2)),  # a fixed batch
        (lambda m, x: m.body(x).sum(), (3, 4)),
    ],
    ids=["a value per sample", "of one feature", "fixed", "one number"],
)
def test_values_of_samples_are_explained_as_before(forward: Callable, shape: Any) -> None:
    model, x = Apply(forward, body=linear(4, 6, 1)).double(), draw(*shape)
    e = lrpfx.explain(model, x, rules=EXACT)
    torch.testing.assert_close(e.seed, e.output)
    assert not [note for note in e.report.notes if "dimension" in note]


# -- one class per sample, in other forms ---------------------------------------------------------


@pytest.fixture(scope="module")
def classifier() -> lrpfx.Explainer:
    return lrpfx.Explainer(linear(3, 5), draw(2, 3), EXACT)


@pytest.mark.parametrize("target", [torch.tensor([[1], [4]]), [[1], [4]]])
def test_labels_as_a_column_are_one_target_of_each_sample_with_a_note(
    classifier: lrpfx.Explainer, target: Any
) -> None:
    e = classifier(draw(2, 3), target)
    assert any("labels.squeeze(1)" in note for note in e.report.notes)
    assert e.relevance.shape == (1, 2, 3)
    torch.testing.assert_close(e.relevance[0], classifier(draw(2, 3), [1, 4]).relevance)
    two = classifier(draw(2, 3), [[1, 2], [4, 0]])
    assert not any("squeeze" in note for note in two.report.notes)


@pytest.mark.parametrize("target", ["epsilon_plus", EXACT, [("linear", lrpfx.Epsilon())]])
def test_rules_in_the_place_of_the_target_are_told(
    classifier: lrpfx.Explainer, target: Any
) -> None:
    with pytest.raises(errors.TargetError, match="rules=") as caught:
        classifier(draw(2, 3), target)
    check_form(caught.value)
    assert len(str(caught.value)) < 300


def test_rules_follow_the_target() -> None:
    model, x = linear(3, 5), draw(2, 3)
    e = lrpfx.explain(model, x, 2, "epsilon_all")
    assert e.report.rules == "epsilon_all"
    with pytest.raises(errors.RuleError, match="explainer.x, target."):
        lrpfx.Explainer(model, x, 2)  # type: ignore[arg-type]


def test_a_mask_is_told_by_its_shape_and_with_the_callable_that_adds_it_up(
    classifier: lrpfx.Explainer,
) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(errors.TargetError) as caught:
        classifier(draw(2, 3), mask)
    check_form(caught.value)
    target = eval(caught.value.fix.split(": ", 1)[1].rstrip("."), {"mask": mask})
    torch.testing.assert_close(classifier(draw(2, 3), target).seed, classifier.model(draw(2, 3)))


def test_modules_in_the_place_of_layers_are_told_by_their_paths(
    classifier: lrpfx.Explainer,
) -> None:
    with pytest.raises(errors.SelectorError) as caught:
        classifier(draw(2, 3), layers=[classifier.model[0]])  # type: ignore[index,list-item]
    assert "layers=['0']" in caught.value.fix and "in_features" not in str(caught.value)
    with pytest.raises(errors.SelectorError, match="explanation.seed"):
        classifier(draw(2, 3), layers=["", "0"])
