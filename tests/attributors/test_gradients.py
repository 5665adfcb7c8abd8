"""Gradients and their averages against loops by hand, captum, and what is known of them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrpfx
from lrpfx.attributors import gradient, gradient_x_input, integrated_gradients, smoothgrad
from tests.conftest import Apply, assert_untouched, lived_in

double = torch.float64


def _net() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 5)).to(double).eval()


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    return _net()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 2, 6, 6, dtype=double)


CLASSES = [1, 0, 4]


def _slope(model: nn.Module, x: Tensor, classes: Any = CLASSES) -> Tensor:
    x = x.clone().requires_grad_()
    picked = model(x)[torch.arange(len(x)), torch.as_tensor(classes)]
    return torch.autograd.grad(picked.sum(), x)[0]


def _by_hand(model: nn.Module, x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """The sum of equation 3 of the paper, at the nodes of Gauss and Legendre."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for point, weight in zip(points, weights, strict=True):
        here = baseline + (point + 1) / 2 * (x - baseline)
        total += weight / 2 * _slope(model, here)
    return (x - baseline) * total


def test_each_is_what_a_loop_by_hand_gives(net: nn.Module, x: Tensor) -> None:
    slope = _slope(net, x)
    assert torch.equal(gradient(net, x, CLASSES).relevance, slope)
    assert torch.equal(gradient_x_input(net, x, CLASSES).relevance, x * slope)
    for memory in (1, 2**28):
        found = integrated_gradients(net, x, CLASSES, steps=7, baseline=0.25, memory=memory)
        expected = _by_hand(net, x, torch.full_like(x, 0.25), 7)
        torch.testing.assert_close(found.relevance, expected, rtol=1e-12, atol=1e-13)
        generator = torch.Generator().manual_seed(5)
        spread = 0.2 * (x.flatten(1).amax(1) - x.flatten(1).amin(1))[:, None, None, None]
        noisy = [
            x + spread * torch.randn(x.shape, dtype=double, generator=generator) for _ in range(4)
        ]
        mean = torch.stack([_slope(net, one) for one in noisy]).mean(0)
        got = smoothgrad(net, x, CLASSES, samples=4, noise=0.2, seed=5, memory=memory)
        torch.testing.assert_close(got.relevance, mean, rtol=1e-12, atol=1e-14)


def test_they_agree_with_captum(net: nn.Module, x: Tensor) -> None:
    captum = pytest.importorskip("captum.attr", reason="captum: pip install 'lrpfx[faithfulness]'")
    classes = torch.tensor(CLASSES)
    saliency = captum.Saliency(net).attribute(x, classes, abs=False)
    assert torch.equal(gradient(net, x, CLASSES).relevance, saliency)
    product = captum.InputXGradient(net).attribute(x, classes)
    assert torch.equal(gradient_x_input(net, x, CLASSES).relevance, product)
    theirs = captum.IntegratedGradients(net).attribute(x, target=classes, n_steps=16)
    ours = integrated_gradients(net, x, CLASSES, steps=16).relevance
    # captum rounds its weights to float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_integrated_gradients_sum_to_what_the_target_gains() -> None:
    smooth = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(double).eval()
    x = torch.randn(5, 4, dtype=double)
    baseline = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=double)
    found = integrated_gradients(smooth, x, 2, baseline=baseline)
    gained = smooth(x)[:, 2] - smooth(baseline[None])[:, 2]
    torch.testing.assert_close(found.relevance.sum(1), gained, rtol=1e-10, atol=1e-12)
    assert any("the sum is off by" in note for note in found.report.notes)


def test_rules_are_laid_in_the_path(net: nn.Module, x: Tensor, one_trace: None) -> None:
    for rules in ("epsilon_plus", "guided_backprop"):
        still = smoothgrad(net, x, CLASSES, samples=2, noise=0.0, rules=rules)
        expected = lrpfx.explain(net, x, CLASSES, rules=rules).relevance
        torch.testing.assert_close(still.relevance, expected, rtol=1e-12, atol=1e-14)
    noisy = smoothgrad(net, x, CLASSES, samples=2, noise=0.1, seed=3, rules="epsilon_plus")
    generator, total = torch.Generator().manual_seed(3), torch.zeros_like(x)
    explainer = lrpfx.Explainer(net, x, "epsilon_plus")
    spread = 0.1 * (x.flatten(1).amax(1) - x.flatten(1).amin(1))[:, None, None, None]
    for _ in range(2):
        one = x + spread * torch.randn(x.shape, dtype=double, generator=generator)
        total += explainer(one, CLASSES).relevance / 2
    torch.testing.assert_close(noisy.relevance, total, rtol=1e-12, atol=1e-14)
    assert "SmoothGrad of epsilon_plus" in noisy.report.rules


def test_integrated_gradients_of_a_smoothed_relu(x: Tensor, one_trace: None) -> None:
    net = _net()
    found = integrated_gradients(net, x, CLASSES, steps=5, rules=lrpfx.composites.BetaSmooth(3.0))
    smooth = Apply(_softplus_slope, inner=net)
    expected = _by_hand(smooth, x, torch.zeros_like(x), 5)
    torch.testing.assert_close(found.relevance, expected, rtol=1e-10, atol=1e-12)
    plain = integrated_gradients(net, x, CLASSES, steps=5, rules=[("*", lrpfx.Gradient())])
    expected = integrated_gradients(net, x, CLASSES, steps=5).relevance
    torch.testing.assert_close(plain.relevance, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(lrpfx.errors.RuleError, match="multiplied by the input already"):
        integrated_gradients(net, x, CLASSES, rules="epsilon_plus")


def _softplus_slope(self: Any, x: Tensor) -> Tensor:
    """The network with the slope of a softplus, and the values of ReLU."""
    conv, _, *rest = self.inner
    z = conv(x)
    soft = nn.functional.softplus(z, beta=3.0)
    return nn.Sequential(*rest)(soft + (z.relu() - soft).detach())


class _Tokens(nn.Module):
    """Tokens and positions, looked up, and a running sum that a mask may leave some out of."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Parameter(torch.randn(7, 4))
        self.head = nn.Linear(4, 9)
        self.to(double).eval()

    def vectors(self, ids: Tensor) -> Tensor:
        return self.tokens(ids)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.of(self.vectors(ids), mask)

    def of(self, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        h = vectors + self.positions[torch.arange(vectors.shape[1])]
        h = h if mask is None else h * mask[..., None]
        return self.head(torch.tanh(h).cumsum(1))


IDS = torch.tensor([[1, 2, 3, 1], [0, 8, 5, 5]])


def test_tokens_are_explained_at_their_embeddings(one_trace: None) -> None:
    model = _Tokens()
    vectors = model.vectors(IDS).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.of(vectors)[:, -1, 3].sum(), vectors)
    found = gradient_x_input(model, {"ids": IDS, "mask": None}, (-1, 3))
    torch.testing.assert_close(found.embeddings["ids"], vectors.detach() * slope)
    torch.testing.assert_close(found.relevance["ids"], (vectors.detach() * slope).sum(-1))
    path = integrated_gradients(model, IDS, (-1, 3), baseline=torch.full_like(IDS, 7))
    begin = model(torch.full_like(IDS, 7))[:, -1, 3]
    gained = model(IDS)[:, -1, 3] - begin
    torch.testing.assert_close(path.relevance.sum(1), gained, rtol=1e-9, atol=1e-11)
    expected = lrpfx.explain(model, IDS, (-1, 3), rules="attnlrp")
    still = smoothgrad(model, IDS, (-1, 3), samples=1, noise=0.0, rules="attnlrp")
    torch.testing.assert_close(still.embeddings, expected.embeddings)
    torch.testing.assert_close(still.relevance, expected.relevance)
    moved = smoothgrad(model, IDS, (-1, 3), samples=3, noise=0.5)
    assert not torch.allclose(moved.relevance, gradient(model, IDS, (-1, 3)).relevance)


def _reversed(self: Any, ids: Tensor) -> Tensor:
    return self.table(ids.flip(1) + 1).flatten(1) @ self.weight


def _functional(self: Any, ids: Tensor) -> Tensor:
    flat = nn.functional.embedding(ids.reshape(-1) + 1, self.table.weight)
    return flat.reshape(len(ids), -1, 4).flip(1).flatten(1) @ self.weight


def _indexed(self: Any, ids: Tensor) -> Tensor:
    return self.table.weight[torch.flip(ids, [1]).add(1)].flatten(1) @ self.weight


def _begun(self: Any, ids: Tensor) -> Tensor:
    whole = torch.cat([torch.full_like(ids[:, :1], 3), ids.flip(1) + 1], 1)
    return self.table(whole)[:, 1:].flatten(1) @ self.weight


@pytest.mark.parametrize("forward", [_reversed, _functional, _indexed, _begun])
def test_relevance_comes_back_to_the_token_it_belongs_to(forward: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 3, generator=generator)
    table = nn.Embedding(11, 4, _weight=torch.randn(11, 4, generator=generator))
    found = gradient_x_input(Apply(forward, table=table, weight=weight), IDS, 1).relevance
    vectors = table(IDS + 1).flip(1).detach()
    expected = (vectors * weight[:, 1].reshape(4, 4)).sum(-1).flip(1)
    torch.testing.assert_close(found, expected)


def _sorted(self: Any, ids: Tensor) -> Tensor:
    return self.table(ids.sort(1).values).flatten(1) @ self.weight


def test_tokens_that_are_not_kept_apart_are_refused() -> None:
    model = Apply(_sorted, table=nn.Embedding(11, 4), weight=torch.randn(16, 3))
    with pytest.raises(lrpfx.errors.InputError, match="does not keep them apart"):
        gradient(model, IDS, 1)


def test_targets_are_taken_as_explain_takes_them(net: nn.Module, x: Tensor) -> None:
    best = net(x).argmax(1)
    expected = _slope(net, x, best)
    assert torch.equal(gradient(net, x).relevance, expected)
    assert torch.equal(gradient(net, x).target, best)
    weights = nn.functional.one_hot(best, 5).to(double)
    called = gradient(net, x, lambda out: out.amax(1))
    for found in (gradient(net, x, weights), called, gradient(net, x, best.numpy())):
        assert torch.equal(found.relevance, expected)
    every = gradient(net, x, "all")
    assert every.relevance.shape == (5, *x.shape)
    torch.testing.assert_close(every.relevance[3], _slope(net, x, [3] * 3))
    with pytest.raises(lrpfx.errors.TargetError, match="out of range"):
        gradient(net, x, 5)


def test_the_strongest_output_is_that_at_the_input_all_along(net: nn.Module, x: Tensor) -> None:
    far = integrated_gradients(net, x, None, steps=9, baseline=3.0).relevance
    fixed = integrated_gradients(net, x, net(x).argmax(1), steps=9, baseline=3.0).relevance
    assert torch.equal(far, fixed)


def test_several_inputs_are_structured_as_they_were_given() -> None:
    a, b, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 2)

    def model(a: Tensor, b: dict[str, Tensor]) -> Tensor:
        return (a * b["k"].cos()) @ weight

    found = gradient(model, (a, {"k": b}), 1).relevance
    torch.testing.assert_close(found[0], b.cos() * weight[:, 1])
    torch.testing.assert_close(found[1]["k"], -a * b.sin() * weight[:, 1])
    one = gradient(model, (a, {"k": b}), 1, wrt="b").relevance
    assert one[0] is None and torch.equal(one[1]["k"], found[1]["k"])
    path = integrated_gradients(model, (a, {"k": b}), 1, baseline=(0.0, {"k": 1.0}))
    total = path.relevance[0].sum(1) + path.relevance[1]["k"].sum(1)
    torch.testing.assert_close(total, model(a, {"k": b})[:, 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(lrpfx.errors.InputError, match="structured otherwise"):
        integrated_gradients(model, (a, {"k": b}), 1, baseline=(0.0,))


def test_an_explainer_stands_for_its_model(net: nn.Module, x: Tensor, one_trace: None) -> None:
    explainer = lrpfx.Explainer(net, x, "epsilon_plus_flat")
    expected = gradient(net, x, CLASSES).relevance
    assert torch.equal(gradient(explainer, x, CLASSES).relevance, expected)
    still = smoothgrad(explainer, x, CLASSES, samples=1, noise=0.0).relevance
    assert torch.equal(still, expected)


def _branches(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if float(x.sum()) > 0 else self.b(x)


def test_models_that_cannot_be_exported_have_gradients() -> None:
    model = Apply(_branches, a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    x = torch.ones(1, 3)
    torch.testing.assert_close(gradient(model, x, 1).relevance[0], model.a.weight[1])
    torch.testing.assert_close(gradient(lambda z: model(z), -x, 1).relevance[0], model.b.weight[1])


def _mixes(self: Any, x: Tensor) -> Tensor:
    return (x - x.mean(0)) ** 2


def test_copies_go_through_a_model_that_mixes_the_batch_one_by_one() -> None:
    model, x = Apply(_mixes), torch.randn(4, 3, dtype=double)
    found = integrated_gradients(model, x, 1, steps=6).relevance
    expected = integrated_gradients(model, x, 1, steps=6, memory=1).relevance
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_model_and_random_states_stay_as_they_were() -> None:
    net, x = _net(), torch.randn(2, 2, 6, 6, dtype=double, requires_grad=True)
    lived_in(net)
    with assert_untouched(net, x):
        found = smoothgrad(net, x, 1, samples=3, rules="epsilon_plus")
        integrated_gradients(net, x, 1, steps=3)
        with torch.inference_mode():
            again = smoothgrad(net, x, 1, samples=3, rules="epsilon_plus")
    assert torch.equal(found.relevance, again.relevance) and not found.relevance.requires_grad
    other = smoothgrad(net, x, 1, samples=3, seed=1, rules="epsilon_plus")
    assert not torch.equal(found.relevance, other.relevance)


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    with pytest.raises(lrpfx.errors.TrainingModeError, match="eval"):
        gradient(model, torch.randn(4, 3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda net, x: smoothgrad(net, x, samples=0), "samples=0"),
        (lambda net, x: smoothgrad(net, x, noise=-1.0), "noise=-1.0"),
        (lambda net, x: integrated_gradients(net, x, steps=0), "steps=0"),
        (lambda net, x: integrated_gradients(net, x, baseline=torch.ones(7)), "broadcast"),
        (lambda net, x: gradient(net, x * float("nan")), "NaN"),
        (lambda net, x: gradient(net, x.long()), "model itself fails"),
        (lambda net, x: gradient(3, x), "the model is int"),
        (lambda net, x: gradient(net, x, lambda out: out.detach().sum(1)), "does not depend"),
        (lambda net, x: gradient(lambda z: z.detach(), x, (0, 0, 0)), "does not depend"),
    ],
)
def test_what_has_no_answer_is_an_error(net: nn.Module, x: Tensor, call: Any, said: str) -> None:
    with pytest.raises(lrpfx.errors.LrpError, match=said):
        call(net, x)


def test_the_report_says_what_was_done(net: nn.Module, x: Tensor, tmp_path: Any) -> None:
    found = integrated_gradients(net, x, CLASSES, steps=3)
    text = str(found.report)
    assert "integrated gradients" in text and "class per sample" in text
    assert "coverage" not in text and "absorbed" not in text.splitlines()[2]
    with pytest.raises(lrpfx.errors.InputError, match="no ledger"):
        found.report.leaks()
    found.save(tmp_path / "found.npz")
    assert str(lrpfx.Explanation.load(tmp_path / "found.npz").report) == text
    found.plot(tmp_path / "found.png", titles=["a", "b", "c"])
