"""What only a record of the run can follow, each against a plain twin without the branch."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfx
from lrpfx.capture import front
from lrpfx.capture.captured import Trace
from lrpfx.capture.recorded.record import record
from lrpfx.errors import CaptureError, InputError
from tests.conftest import Apply, assert_untouched

X = torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.5, 0.5, -0.25, 1.0]], dtype=torch.float64)

Forward = Callable[[Any, Tensor], Tensor]


def _model(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    layers = {name: nn.Linear(4, 4).double() for name in "abcd"}
    return Apply(forward, **layers, head=nn.Linear(4, 3).double(), table=[0])


def _branch(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.head(self.b(y).relu() if y.sum() > x.sum() else self.c(y).tanh())


def _branch_plain(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    taken = bool(self.a(X).sum() > X.sum())  # a constant of the twin
    return self.head(self.b(y).relu() if taken else self.c(y).tanh())


def _loop(self: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max().round())):
        x = self.a(x).relu()
    return self.head(x)


def _loop_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(self.a(x).relu()).relu())


def _exit(self: Any, x: Tensor) -> Tensor:
    for layer in (self.a, self.b, self.c, self.d):
        x = layer(x).relu()
        if float(x.max()) < 1:
            break
    return self.head(x)


def _exit_plain(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, depth = X, 0
        for layer in (self.a, self.b, self.c, self.d):
            y, depth = layer(y).relu(), depth + 1
            if float(y.max()) < 1:
                break
    for layer in (self.a, self.b, self.c, self.d)[:depth]:
        x = layer(x).relu()
    return self.head(x)


def _experts(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    chosen = x.argmax(-1)
    for i in chosen.unique().tolist():
        rows = (chosen == i).nonzero()[:, 0]
        out = out.index_add(0, rows, (self.a, self.b, self.c, self.d)[i](x[rows]).relu())
    return self.head(out)


def _experts_plain(self: Any, x: Tensor) -> Tensor:  # the largest is entry 2, then entry 0
    return self.head(torch.cat([self.c(x[:1]).relu(), self.a(x[1:]).relu()]))


def _pooled(self: Any, x: Tensor) -> Tensor:
    graph = torch.tensor([0, 1])
    sums = x.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, self.a(x))
    return self.head(sums / graph.bincount()[:, None])


def _pooled_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x))


def _masked(self: Any, x: Tensor) -> Tensor:
    kept = x[x[:, 0] > 0]
    return self.head(self.a(kept))


def _masked_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x))


def _ragged(self: Any, x: Tensor) -> Tensor:
    lengths = (x > 0).sum(1).tolist()
    rows = [self.a(row[:n, None].expand(n, 4)).mean(0) for row, n in zip(x, lengths, strict=True)]
    return self.head(torch.stack(rows))


def _ragged_plain(self: Any, x: Tensor) -> Tensor:
    rows = [
        self.a(x[0, :3, None].expand(3, 4)).mean(0),
        self.a(x[1, :3, None].expand(3, 4)).mean(0),
    ]
    return self.head(torch.stack(rows))


def _state(self: Any, x: Tensor) -> Tensor:
    self.table[0] += 1
    return self.head((self.a if self.table[0] == 1 else self.b)(x))


def _state_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x))


def _one_hot(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) * F.one_hot(x.argmax(1), int(x.argmax(1).max()) + 2).double())


def _one_hot_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x) * F.one_hot(x.argmax(1), 4).double())


def _solved(self: Any, x: Tensor) -> Tensor:
    y = x
    while (step := (self.a(y).tanh() - y) / 2).norm() > 0.5:  # an equilibrium, roughly
        y = y + step
    return self.head(y)


def _solved_plain(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y, steps = X, 0
        while (step := (self.a(y).tanh() - y) / 2).norm() > 0.5:
            y, steps = y + step, steps + 1
    for _ in range(steps):
        x = x + (self.a(x).tanh() - x) / 2
    return self.head(x)


def _counted(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x)) / int((x > 0).sum())


def _counted_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x)) / 6


def _split(self: Any, x: Tensor) -> Tensor:
    first, rest = x.split([int(x[0].argmax()), 4 - int(x[0].argmax())], 1)
    return self.head(self.a(torch.cat([rest, first], 1)))


def _split_plain(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(torch.cat([x[:, 2:], x[:, :2]], 1)))


TWINS: dict[str, tuple[Forward, Forward]] = {
    "branch": (_branch, _branch_plain),
    "loop": (_loop, _loop_plain),
    "early exit": (_exit, _exit_plain),
    "experts": (_experts, _experts_plain),
    "pooled over graphs": (_pooled, _pooled_plain),
    "masked": (_masked, _masked_plain),
    "ragged": (_ragged, _ragged_plain),
    "Python state": (_state, _state_plain),
    "classes from data": (_one_hot, _one_hot_plain),
    "equilibrium": (_solved, _solved_plain),
    "a count": (_counted, _counted_plain),
    "cut where the data says": (_split, _split_plain),
}


@pytest.mark.parametrize("forwards", TWINS.values(), ids=TWINS)
def test_a_model_that_branches_is_explained_as_its_twin(forwards: tuple[Forward, Forward]) -> None:
    branching, plain = (_model(forward) for forward in forwards)
    with assert_untouched(branching, X):
        explanation = lrpfx.explain(branching, X, [0, 2], capture="record")
    expected = lrpfx.explain(plain, X, [0, 2], capture="record")
    assert not plain.table[0]
    torch.testing.assert_close(explanation.output, expected.output)
    summed = forwards[0] in (_experts, _pooled)  # with zeros: a stabilizer more
    rtol, atol = (1e-3, 1e-5) if summed else (1e-10, 1e-12)
    torch.testing.assert_close(explanation.relevance, expected.relevance, rtol=rtol, atol=atol)


def test_what_export_refuses_is_recorded_by_default() -> None:
    recorded = lrpfx.explain(_model(_branch), X, 1)
    exported = lrpfx.explain(_model(_branch_plain), X, 1, capture="export")
    torch.testing.assert_close(recorded.relevance, exported.relevance, rtol=1e-10, atol=1e-12)
    with pytest.raises(CaptureError, match="branches on values"):
        lrpfx.explain(_model(_branch), X, 1, capture="export")
    with pytest.raises(InputError, match="no way to capture"):
        lrpfx.explain(_model(_branch), X, 1, capture="trace")  # type: ignore[arg-type]


def _flipping(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x).relu() if x.sum() > 0 else self.b(x) * 2)


def _of(x: Tensor) -> Tensor:
    """What is right for the flipping branch, by models that have none."""
    model = _model(_up if x.sum() > 0 else _down)
    return lrpfx.explain(model, x, 1, capture="export").relevance


def _up(self: Any, x: Tensor) -> Tensor:
    return self.head(self.a(x).relu())


def _down(self: Any, x: Tensor) -> Tensor:
    return self.head(self.b(x) * 2)


@pytest.fixture(scope="module")
def right() -> dict[float, Tensor]:
    return {sign: _of(sign * X) for sign in (1.0, -1.0)}


@pytest.mark.parametrize("capture", ["auto", "record"])
def test_each_call_follows_its_own_branch(capture: Any, right: dict[float, Tensor]) -> None:
    explainer = lrpfx.Explainer(_model(_flipping), X, capture=capture)
    for sign in (1.0, -1.0, -1.0, 1.0):
        explanation = explainer(sign * X, 1)
        torch.testing.assert_close(explanation.relevance, right[sign], rtol=1e-10, atol=1e-12)
        assert any("a condition at" in note for note in explanation.report.notes)


def test_threads_follow_their_own_branches(right: dict[float, Tensor]) -> None:
    explainer, found = lrpfx.Explainer(_model(_flipping), X, capture="record"), {}

    def work(sign: float) -> None:
        found[sign] = [explainer(sign * X, 1).relevance for _ in range(5)]

    threads = [threading.Thread(target=work, args=(sign,)) for sign in right]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sign, maps in found.items():
        for relevance in maps:
            torch.testing.assert_close(relevance, right[sign], rtol=1e-10, atol=1e-12)


def test_samples_of_a_batch_follow_their_own_branches() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat([_flipping(self, row[None]) for row in x])

    batch = torch.stack([X[0], -X[0], X[1]])
    relevance = lrpfx.explain(_model(forward), batch, 1, capture="record").relevance
    alone = torch.cat([_of(row[None]) for row in batch])
    torch.testing.assert_close(relevance, alone, rtol=1e-10, atol=1e-12)


def test_a_branch_on_a_parameter_is_taken_anew() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu() if self.b.bias.data[0] > 0 else self.b(x) * 2)

    model = _model(forward)
    explainer = lrpfx.Explainer(model, X, capture="record")
    for value, plain in ((1.0, _up), (-1.0, _down), (1.0, _up)):
        with torch.no_grad():
            model.b.bias[0] = value
        twin = _model(plain)
        twin.load_state_dict(model.state_dict())
        expected = lrpfx.explain(twin, X, 1, capture="record").relevance
        torch.testing.assert_close(explainer(X, 1).relevance, expected, rtol=1e-10, atol=1e-12)


def test_a_record_without_decisions_serves_inputs_of_its_form_only() -> None:
    def forward(self: Any, x: Tensor, double: bool = False) -> Tensor:
        return self.head(self.a(x) * 2 if double else self.a(x))

    model = _model(forward)
    explainer = lrpfx.Explainer(model, X, capture="record")
    with_runs_counted = []
    model.a.register_forward_hook(lambda *_: with_runs_counted.append(1))
    runs = []
    for inputs in (X, X + 1, X[:1], (X, True), (X, 1), X + 2):
        with_runs_counted.clear()
        explanation = explainer(inputs, 1)
        runs.append(len(with_runs_counted))
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        torch.testing.assert_close(explanation.output, model(*given))
        double = len(given) > 1
        exported = lrpfx.explain(_model(lambda s, x, d=double: forward(s, x, d)), given[0], 1)
        found = explanation.relevance[0] if double else explanation.relevance
        torch.testing.assert_close(found, exported.relevance, rtol=1e-10, atol=1e-12)
    # One run of the model to compare with, where a graph serves; two where a run is recorded.
    assert runs[1] == runs[5] == 1 and min(runs[2:5]) > 1


def test_other_state_is_seen_though_nothing_is_read() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head((self.a if self.table[0] else self.b)(x))

    model = _model(forward)
    explainer = lrpfx.Explainer(model, X, capture="record")
    for state in (0, 1, 1, 0):
        model.table[0] = state
        expected = lrpfx.explain(model, X, 1, capture="record").relevance
        torch.testing.assert_close(explainer(X, 1).relevance, expected)


def test_what_passes_through_numpy_is_noted_with_its_line() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.from_numpy(x.detach().numpy() * 2)
        return self.head(self.a(x) + self.b(scale))

    explanation = lrpfx.explain(_model(forward), X, 1)
    twin = _model(lambda self, x: self.head(self.a(x) + self.b(X * 2)))
    expected = lrpfx.explain(twin, X, 1, capture="export")
    torch.testing.assert_close(explanation.relevance, expected.relevance)
    (note,) = (n for n in explanation.report.notes if "leaves PyTorch" in n)
    assert "numpy at" in note and "test_runs.py" in note


def _in_a_thread(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x * 2).result()


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda x: torch.tensor([x[0, 0] * 2, x[0, 1] * 2] * 2, dtype=x.dtype), "tensor at"),
        (lambda x: torch.DoubleTensor([x[0, 0], 1, 2, 3]), "another library or thread at"),
        (_in_a_thread, "another library or thread at"),
        (lambda x: torch.full((4,), len(f"{x}"), dtype=x.dtype), "its printed form at"),
    ],
    ids=["a list of tensors", "an old constructor", "another thread", "printed"],
)
def test_what_depends_on_the_input_unseen_is_noted_with_its_line(
    compute: Callable[[Tensor], Tensor], said: str
) -> None:
    model = _model(lambda self, x: self.head(self.a(x) + self.b(compute(x))))
    explainer = lrpfx.Explainer(model, X, capture="record")
    for x in (X, 2 * X):
        explanation, seen = explainer(x, 1), compute(x)
        twin = _model(lambda self, y, seen=seen: self.head(self.a(y) + self.b(seen)))
        torch.testing.assert_close(explanation.relevance, lrpfx.explain(twin, x, 1).relevance)
        (note,) = (n for n in explanation.report.notes if "leaves PyTorch" in n)
        assert said in note and "test_runs.py" in note


def test_constants_from_outside_of_the_model_are_no_reads() -> None:
    scale = torch.linspace(1, 2, 4, dtype=torch.float64)

    def forward(self: Any, x: Tensor) -> Tensor:
        ramp = torch.from_numpy(np.arange(4.0))
        return self.head(self.a(x) * scale + torch.tensor(data=[0.5]) + ramp)

    explanation = lrpfx.explain(_model(forward), X, 1, capture="record")
    assert not [n for n in explanation.report.notes if "recorded for" in n]


def test_what_is_mapped_over_samples_is_exported() -> None:
    model = _model(lambda self, x: self.head(x + torch.vmap(lambda row: self.a(row).relu())(x)))
    twin = _model(lambda self, x: self.head(x + self.a(x).relu()))
    expected = lrpfx.explain(twin, X, 1).relevance
    torch.testing.assert_close(lrpfx.explain(model, X, 1).relevance, expected)


def test_where_nothing_is_left_the_error_says_what_left_pytorch() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.from_numpy(x.detach().numpy()))

    with pytest.raises(CaptureError, match=r"leaves PyTorch: numpy at .*test_runs.py"):
        lrpfx.explain(_model(forward), X, 1)
    with pytest.raises(CaptureError, match="random"):
        lrpfx.explain(_model(lambda self, x: self.head(x) + torch.rand(())), X, 1, capture="record")


def test_recorded_relevance_has_derivatives() -> None:
    model = _model(_branch)
    x = X.clone().requires_grad_()
    explanation = lrpfx.explain(model, x, 1, capture="record", create_graph=True)
    explanation.relevance.square().sum().backward()
    twin, y = _model(_branch_plain), X.clone().requires_grad_()
    explanation = lrpfx.explain(twin, y, 1, capture="export", create_graph=True)
    explanation.relevance.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(model.a.weight.grad, twin.a.weight.grad)


def test_a_step_with_rows_of_before_explains_them() -> None:
    def step(self: Any, x: Tensor, past: Tensor) -> Tensor:
        rows = [*past.unbind(0), self.a(x)]
        return self.head(torch.stack(rows).mean(0)[: int(x.shape[0])])

    cached = torch.stack([X * 2, X.flip(1)])
    recorded = lrpfx.explain(_model(step), (X, cached), 1, capture="record").relevance
    exported = lrpfx.explain(_model(step), (X, cached), 1, capture="export").relevance
    torch.testing.assert_close(recorded, exported, rtol=1e-10, atol=1e-12)


def test_a_record_that_computes_something_else_is_no_graph_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """explain() compares the two by the run that explains, and exports what differs."""
    model, x = _model(lambda self, x: self.head(self.a(x).relu())), X.clone()
    right = lrpfx.explain(model, x, 0, capture="export").relevance

    def wrong(model: nn.Module, inputs: Any) -> Trace:
        trace = record(model, inputs)
        return trace._replace(expected=[t + 1 for t in trace.expected])

    monkeypatch.setattr(front, "record", wrong)
    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        lrpfx.explain(model, x, 0, capture="record")
    torch.testing.assert_close(lrpfx.explain(model, x, 0).relevance, right)


def test_numbers_of_a_generator_of_its_own_are_no_constants() -> None:
    drawn = np.random.default_rng(0)
    model = _model(lambda self, x: self.head(self.a(x) * float(drawn.normal())))
    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        lrpfx.explain(model, X, 0)
