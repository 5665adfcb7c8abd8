"""Batch norm that trains: an evaluated twin with the statistics of the batch has the same map."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx import composites, errors
from tests.conftest import Apply, assert_untouched

pytestmark = pytest.mark.usefixtures("each_front")

SMOOTH = {
    "epsilon": composites.EpsilonAll(epsilon=0.1),
    "z-plus": composites.EpsilonPlus(epsilon=0.1, stabilizer=0.1),
    "gamma": [("conv", lrpfx.Gamma(0.25, 0.1)), composites.EpsilonAll(epsilon=0.1)],
}


class Net(nn.Module):
    """Batch norm behind a convolution, before one, behind a move, alone, and one used twice."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.stem, self.behind = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum)
        self.before, self.mix = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)
        self.moved = nn.BatchNorm2d(4, affine=False)
        self.twice = nn.BatchNorm1d(4, momentum=momentum)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.behind(self.stem(x)))
        x = F.softplus(self.mix(self.before(x)))
        x = F.softplus(self.moved(F.avg_pool2d(self.mix(x), 2))).mean((2, 3))
        return self.head(self.twice(torch.tanh(self.twice(x))))


def net(momentum: float | None = 0.1) -> Net:
    torch.manual_seed(3)
    model = Net(momentum).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def images(n: int = 4) -> Tensor:
    torch.manual_seed(n)
    return torch.randn(n, 2, 6, 6, dtype=torch.float64)


def evaluated(model: nn.Module, x: Tensor) -> nn.Module:
    """The model in evaluation mode whose running statistics are those that the batch has."""
    twin = copy.deepcopy(model)

    def measure(module: Any, args: tuple[Tensor]) -> None:
        (x,) = args
        dims = [d for d in range(x.ndim) if d != 1]
        module.running_mean, module.running_var = x.mean(dims), x.var(dims, correction=0)
        module.training = False

    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(measure)
    with torch.no_grad():
        twin(x)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    return twin.eval()


def once(model: Net) -> Net:
    """The same with a module for each call, as a module has one set of running statistics."""
    other = copy.deepcopy(model)
    other.again = copy.deepcopy(other.twice)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.softplus(self.behind(self.stem(x)))
        x = F.softplus(self.mix(self.before(x)))
        x = F.softplus(self.moved(F.avg_pool2d(self.mix(x), 2))).mean((2, 3))
        return self.head(self.again(torch.tanh(self.twice(x))))

    other.forward = functools.partial(forward, other)
    return other


def rules_of(report: lrpfx.Report) -> list[tuple[str, ...]]:
    return [(row.op, row.kind, row.rule, row.why) for row in report.rows]


#: What is moved by a step is moved back; running statistics are no part of a trace.
shared = functools.cache(net)


@functools.cache
def shared_twin(n: int) -> nn.Module:
    return evaluated(once(shared()), images(n))


@pytest.mark.usefixtures("one_trace")
@pytest.mark.filterwarnings("ignore:lrpfx")
@pytest.mark.parametrize("rules", [*SMOOTH, None])
def test_the_map_is_that_of_an_evaluated_twin_with_the_statistics_of_the_batch(rules: Any) -> None:
    model, x = shared(), images()
    explainer = lrpfx.Explainer(model, x, SMOOTH.get(rules), bn="batch")
    plain = lrpfx.explain(shared_twin(4), x, 1, rules=SMOOTH.get(rules), ledger=True)
    model_output = copy.deepcopy(model)(x)
    for options in ({"ledger": True}, {"ledger": False}, {"create_graph": True}):
        found = explainer(x, 1, **options)
        torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.output, model_output)
    assert rules_of(explainer.report) == rules_of(plain.report)
    fewer = images(3)  # another batch size
    other = lrpfx.explain(shared_twin(3), fewer, 1, rules=SMOOTH.get(rules))
    torch.testing.assert_close(explainer(fewer, 1).relevance, other.relevance)


# -- derivatives ---------------------------------------------------------------------------------


def loss_of(explainer: lrpfx.Explainer, x: Tensor, create_graph: bool) -> Tensor:
    """Some function of relevance and output that is smooth and not symmetric."""
    e = explainer(x, 1, create_graph=create_graph)
    weight = torch.linspace(-1, 1, e.relevance.numel(), dtype=x.dtype).reshape(e.relevance.shape)
    return (e.relevance * weight).sum() + e.relevance.square().sum() + e.output.sin().sum()


def assert_derivatives(model: nn.Module, x: Tensor, explainer: lrpfx.Explainer) -> None:
    """Those by input, weights, biases, gamma and beta agree with central differences."""
    x = x.clone().requires_grad_()
    variables = [x, *model.parameters()]
    loss = loss_of(explainer, x, True)
    gradients = torch.autograd.grad(loss, variables)
    step, noise = 1e-6, 1e-7 * (1 + loss.abs().item())
    for variable, gradient in zip(variables, gradients, strict=True):
        direction = torch.randn_like(variable)
        with torch.no_grad():
            variable.add_(direction, alpha=step)
            above = loss_of(explainer, x, False)
            variable.sub_(direction, alpha=2 * step)
            below = loss_of(explainer, x, False)
            variable.add_(direction, alpha=step)
        numeric = ((above - below) / (2 * step)).item()
        exact = (gradient * direction).sum().item()
        assert exact == pytest.approx(numeric, rel=1e-5, abs=noise)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.filterwarnings("ignore:lrpfx")
@pytest.mark.parametrize("rules", SMOOTH)
def test_derivatives_agree_with_central_differences(rules: Any) -> None:
    model, x = shared(), images()
    assert_derivatives(model, x, lrpfx.Explainer(model, x, SMOOTH[rules], bn="batch"))


@pytest.mark.usefixtures("one_trace")
@pytest.mark.filterwarnings("ignore:lrpfx")
@pytest.mark.parametrize("rules", SMOOTH)
def test_derivatives_by_running_statistics_agree_with_central_differences(rules: Any) -> None:
    model, x = shared_twin(4), images()
    assert_derivatives(model, x, lrpfx.Explainer(model, x, SMOOTH[rules]))


@pytest.mark.usefixtures("one_trace")
def test_statistics_are_no_constants_for_derivatives() -> None:
    """The check can fail: with the statistics frozen the derivatives are others."""
    model, x = shared(), images()
    explainer = lrpfx.Explainer(shared_twin(4), x, SMOOTH["epsilon"])
    by_batch = lrpfx.Explainer(model, x, SMOOTH["epsilon"], bn="batch")
    found = []
    for each in (explainer, by_batch):
        leaf = x.clone().requires_grad_()
        found += torch.autograd.grad(loss_of(each, leaf, True), leaf)
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()


# -- what a call does to the model ---------------------------------------------------------------


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_call_updates_running_statistics_once_as_forward_does(momentum: Any) -> None:
    model, x = net(momentum), images()
    twin = copy.deepcopy(model)
    with assert_untouched(model):
        explainer = lrpfx.Explainer(model, x, bn="batch")
    options: list[dict[str, Any]] = [
        {},
        {"create_graph": True},
        {"ledger": True},
        {"layers": "mix"},
    ]
    for n, option in zip((4, 3, 4, 2), options, strict=True):
        explanation = explainer(images(n), 1, **option)
        str(explanation.report)  # the ledger on demand is no call
        twin(images(n))
        torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-12, atol=1e-12)


def test_the_graph_module_updates_once_per_forward() -> None:
    model = net(None)
    twin = copy.deepcopy(model)
    module = lrpfx.Explainer(model, images(), SMOOTH["epsilon"], bn="batch").graph_module
    other = copy.deepcopy(module)
    x = images().requires_grad_()
    torch.testing.assert_close(module(x), twin(images()))
    torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-12, atol=1e-12)
    (relevance,) = torch.autograd.grad(module(x), x, torch.ones(4, 3, dtype=x.dtype))
    before = buffers(model)
    other(x)
    assert all(map(torch.equal, before.values(), buffers(model).values()))
    plain = lrpfx.explain(evaluated(once(model), x), x, torch.ones(4, 3), rules=SMOOTH["epsilon"])
    torch.testing.assert_close(relevance, plain.relevance)


class Writes(nn.Module):
    """A write into a view that is read later, for which the whole graph is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.again, self.head = nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x[:, :2].mul_(2)
        return self.head(self.again(F.relu(self.again(x), inplace=True)).mean((2, 3)))


@pytest.mark.parametrize("capture", ["export", "record"])
def test_every_way_of_capture_follows_the_batch(capture: Any) -> None:
    torch.manual_seed(0)
    model = Writes().double().train()
    twin = copy.deepcopy(model)
    explainer = lrpfx.Explainer(model, images(), SMOOTH["epsilon"], bn="batch", capture=capture)
    for _ in range(2):
        torch.testing.assert_close(explainer(images(), 1).output, twin(images()))
        torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-12, atol=1e-12)


def test_a_change_of_momentum_is_seen() -> None:
    model = net()
    explainer = lrpfx.Explainer(model, images(), bn="batch")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5
    twin = copy.deepcopy(model)
    explainer(images(), 1)
    twin(images())
    torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-12, atol=1e-12)


def test_an_old_explanation_keeps_its_ledger_while_statistics_move_on() -> None:
    model = net()
    explainer = lrpfx.Explainer(model, images(), bn="batch")
    first, at_once = explainer(images(), 1), explainer(images(), 1, ledger=True)
    explainer(images(3), 1)
    for then, now in zip(first.report.rows, at_once.report.rows, strict=True):
        assert then.relevance_out == pytest.approx(now.relevance_out)


def test_the_mode_of_the_moment_is_explained() -> None:
    model, x = net(), images()
    explainer = lrpfx.Explainer(model, x, bn="batch")
    training = explainer(x, 1).relevance
    with assert_untouched(model.eval()):
        found = explainer(x, 1)
    torch.testing.assert_close(found.relevance, lrpfx.explain(model, x, 1).relevance)
    torch.testing.assert_close(explainer(x, 1).output, model(x))
    model.behind.train()  # some layers are frozen, others are not
    torch.testing.assert_close(explainer(x, 1).output, copy.deepcopy(model)(x))
    torch.testing.assert_close(explainer_of(model.train(), explainer)(x, 1).relevance, training)


def explainer_of(model: nn.Module, explainer: lrpfx.Explainer) -> lrpfx.Explainer:
    return explainer


# -- notes and refusals --------------------------------------------------------------------------


class Drops(nn.Module):
    """Dropout as a module, as a function, in attention, and of whole paths."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.drop, self.path, self.block = nn.Dropout(0.5), Path(), Block()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        x = x + self.path(self.attend(x, x, x, need_weights=False)[0])
        return self.head(self.norm(self.block(x).mean(1)))


class Path(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.5) / 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x).relu(), 0.5, self.training)


def test_what_draws_random_numbers_is_off_with_a_note() -> None:
    torch.manual_seed(0)
    model, x = Drops().train(), torch.randn(5, 3, 4)
    with assert_untouched(model):
        explainer = lrpfx.Explainer(model, x, "epsilon_all", bn="batch")
    twin = copy.deepcopy(model).eval()
    twin.norm.train()
    torch.testing.assert_close(explainer(x, 1).output, twin(x), rtol=1e-4, atol=1e-5)
    assert all(module.training for module in model.modules())
    notes = explainer(x, 1).report.notes
    (off,) = [note for note in notes if "random numbers" in note]
    for name in ("attend (Multi", "drop (Dropout)", "path (Path)", "block (Block)"):
        assert name in off
    assert any("statistics of the batch, which are constants" in note for note in notes)
    assert not any("the others in its batch (dimension 0" in note for note in notes)


@pytest.mark.nightly
def test_dropout_of_recurrent_layers_is_off() -> None:
    model = Apply(lambda self, x: self.norm(self.lstm(x)[0][:, -1])).train()
    model.lstm, model.norm = nn.LSTM(4, 4, 2, batch_first=True, dropout=0.5), nn.BatchNorm1d(4)
    x = torch.randn(5, 3, 4)
    explainer = lrpfx.Explainer(model, x, bn="batch")
    twin = copy.deepcopy(model)
    twin.lstm.eval()
    torch.testing.assert_close(explainer(x, 1).output, twin(x), rtol=1e-4, atol=1e-5)
    assert any("lstm (LSTM)" in note for note in explainer.report.notes)


def test_batch_norm_without_running_statistics_is_taken_by_the_batch() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(6, 3, dtype=torch.float64)
    with pytest.raises(errors.TrainingModeError, match='bn="batch"'):
        lrpfx.Explainer(model, x)
    explainer = lrpfx.Explainer(model, x, SMOOTH["epsilon"], bn="batch")
    torch.testing.assert_close(explainer(x, 1).output, model(x))
    assert_derivatives(model, x, explainer)


def test_training_mode_is_refused_with_both_ways_out() -> None:
    with pytest.raises(errors.TrainingModeError) as caught:
        lrpfx.Explainer(net(), images())
    assert "model.eval()" in str(caught.value) and 'bn="batch"' in str(caught.value)


def always(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.norm(x))


def own_statistics(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.calls.add_(1)
    return self.norm(x) - self.seen.detach() * 0


def drops_and_follows(self: Any, x: Tensor) -> Tensor:
    if self.training:
        self.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return F.dropout(self.norm(x), 0.5, self.training)


def model_of(function: Callable[..., Any]) -> Apply:
    own = {"seen": torch.zeros(3), "calls": torch.zeros(())}
    return Apply(function, norm=nn.BatchNorm1d(3), **own).train()


@pytest.mark.parametrize(
    ("function", "says"),
    [(always, "is random"), (drops_and_follows, "draw random numbers and follow the batch")],
)
def test_what_cannot_be_turned_off_is_refused(function: Callable[..., Any], says: str) -> None:
    model, x = model_of(function), torch.randn(4, 3)
    with assert_untouched(model), pytest.raises(errors.TrainingModeError, match=says):
        lrpfx.Explainer(model, x, bn="batch")


def test_buffers_that_are_not_followed_are_noted() -> None:
    explainer = lrpfx.Explainer(model_of(own_statistics), torch.randn(4, 3), bn="batch")
    assert any("stay as they are: seen, calls" in note for note in explainer.report.notes)


def test_promises_that_a_batch_breaks_are_refused() -> None:
    with pytest.raises(errors.InputError, match="freeze=True"):
        lrpfx.Explainer(net(), images(), bn="batch", freeze=True)
    with pytest.raises(errors.InputError, match="bn='both'"):
        lrpfx.Explainer(net(), images(), bn="both")  # type: ignore[arg-type]
    with pytest.raises(errors.CompileError, match='bn="batch"'):
        lrpfx.Explainer(net(), images(), bn="batch").compile()
