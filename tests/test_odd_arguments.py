"""Whatever can be given, in combination, ends in a result or in an error of lrpfx.

Errors of single wrong arguments are in test_errors.py and run/test_targets.py.
"""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lrpfx
from lrpfx import Epsilon, Gamma, composites, errors
from tests.oracle.models import MODELS, end, first_of, fuzzing, leaves_of, row

FLOATS = [0.0, -1.0, 1e30, 3e38, 1e-40, float("nan"), float("inf")]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
DTYPES += [torch.uint8, torch.complex64]


SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (2, 3), (1, 3), (0, 3), (2, 0), (3, 2)]
SHAPES += [(2, 2), (2, 5), (2, 4), (2, 1, 4, 4), (1, 1, 1, 1), (2, 3, 4)]


tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.sampled_from([0.5, 1.0, *FLOATS]),
)


odd_tensors = st.sampled_from(
    [
        torch.zeros(2, 3, device="meta"),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, requires_grad=True),
        torch.ones(2, 3, requires_grad=True) * 2,
        nn.Parameter(torch.ones(2, 3)),
        torch.ones(3, 2).T,
        torch.ones(1, 3).expand(2, 3),
    ]
)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**63, -(2**70), 1.5, float("nan"), 1j, "", "conv", "épsilon", b"x"]),
    st.sampled_from([object(), object, len, ..., slice(None), slice(0, 99), np.int64(1)]),
    st.sampled_from([np.zeros(2), np.ones((2, 3), np.float32), np.array("a"), range(2), {1, 2}]),
)


junk = st.recursive(
    scalars | tensors | odd_tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["a", "b", "x", "0", 1, None]), inner, max_size=2)
    ),
    max_leaves=4,
)


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("planted")


right_targets = st.one_of(
    st.none(),
    st.integers(0, 1),
    st.just(lambda out: first_of(out)[:, 0]),
    st.just((0,)),
    st.just("all"),
)


odd_targets = st.one_of(
    st.lists(st.integers(-1, 3), max_size=3),
    st.lists(st.lists(st.integers(-1, 2), max_size=2), max_size=3),
    st.tuples(st.integers(-1, 3) | scalars, scalars),
    tensors,
    junk,
    st.sampled_from(
        [
            lambda out: first_of(out).sum(),
            lambda out: first_of(out),
            lambda out: first_of(out)[:, 0].detach(),
            lambda out: first_of(out)[:, 0] / 0,
            lambda out: first_of(out).argmax(1),
            lambda out: first_of(out).square_()[:, 0],
            lambda out: None,
            lambda out: 3,
            lambda: None,
            raises,
            torch.linalg.vector_norm,
        ]
    ),
)


SELECTORS: list[Any] = ["conv", "linear", "relu", "activation", "*", "0", "head", "mix.*", "[", ""]
SELECTORS += [nn.Linear, nn.Module, nn.ReLU, int, lambda r: True, lambda r: None, raises]
SELECTORS += [lambda r: torch.ones(2), lambda: True]


RULES: list[Any] = [Epsilon(), Epsilon(0), Gamma(), lrpfx.ZPlus(), lrpfx.AlphaBeta(2, 1)]
RULES += [lrpfx.Flat(), lrpfx.WSquare(), lrpfx.ZBox(-1.0, 1.0), lrpfx.ZBox(torch.zeros(3), 1.0)]
RULES += [lrpfx.Pass(), lrpfx.Norm(), lrpfx.Gradient(), lrpfx.Stop(), lrpfx.Uniform()]
RULES += [lrpfx.Bilinear(), lrpfx.Taylor(), lrpfx.ReLUGuidedBackprop(), Epsilon(raises)]
RULES += [Epsilon(lambda z: None), Epsilon(lambda z: z[:1]), Epsilon(lambda z: z * float("nan"))]
RULES += [lrpfx.ZPlus(zero_params="bias"), Epsilon, None, "epsilon"]


entries = st.lists(st.tuples(st.sampled_from(SELECTORS), st.sampled_from(RULES)), max_size=3)


right_rules = st.sampled_from([None, "epsilon_all", "attnlrp", composites.EpsilonPlus(1e-3), []])


odd_rules = st.one_of(
    st.sampled_from([*composites.NAMED, "", "epsilon", "EpsilonPlus"]),
    entries,
    entries,
    st.sampled_from([composites.EpsilonGammaBox(-3, 3), composites.CPLRP(), composites.AttnLRP]),
    st.sampled_from(RULES),
    junk,
)


right_layers = st.sampled_from([(), ["*"], "*"])


odd_layers = st.one_of(
    st.lists(st.sampled_from(["", "*", "0", "head", "mix", "no such", "conv", "fc", "["])),
    st.sampled_from(["0", "head", None, 3, [3], [None], b"head", [["0"]], True, object()]),
    junk,
)


@st.composite
def odd_inputs(draw: st.DrawFn, name: str) -> Any:
    """Inputs that are right but for one thing, or anything."""
    inputs = MODELS[name][1](2)
    kind = draw(st.sampled_from(["one value", "wrapped", "one of them", "junk"]))
    if kind == "one value":
        tensor = inputs["a"] if isinstance(inputs, dict) else inputs
        values = FLOATS if tensor.is_floating_point() else [99, -1]
        tensor.view(-1)[0] = draw(st.sampled_from(values))
        return inputs
    if kind == "wrapped":
        return draw(st.sampled_from([[inputs], (inputs,), {"a": inputs}, [[inputs]], list(inputs)]))
    if kind == "one of them" and isinstance(inputs, dict):
        return inputs | {draw(st.sampled_from("abc")): draw(junk)}
    return draw(junk)


@st.composite
def arguments(draw: st.DrawFn) -> tuple[str, Any, dict[str, Any]]:
    """A model's name, inputs, and keyword arguments; some are right and some are odd."""
    name = draw(st.sampled_from(list(MODELS)))
    right_inputs = st.sampled_from([1, 2, 3]).map(MODELS[name][1])
    odd = draw(st.sets(st.sampled_from(["inputs", "target", "rules", "layers"]), max_size=3))
    inputs = draw(odd_inputs(name) if "inputs" in odd else right_inputs)
    options = {
        "target": draw(odd_targets if "target" in odd else right_targets),
        "rules": draw(odd_rules if "rules" in odd else right_rules),
        "layers": draw(odd_layers if "layers" in odd else right_layers),
        "create_graph": draw(st.booleans()),
        "ledger": draw(st.booleans()),
    }
    return name, inputs, options


def check(explanation: lrpfx.Explanation | None) -> None:
    if explanation is not None:
        assert all(
            t.isfinite().all()
            for t in torch.utils._pytree.tree_leaves(explanation.relevance)
            if isinstance(t, Tensor)
        )
        assert repr(explanation) and repr(explanation.report)


@fuzzing
@given(arguments())
def test_explain_ends_in_a_result_or_its_own_error(
    drawn: tuple[str, Any, dict[str, Any]],
) -> None:
    name, inputs, options = drawn
    check(end(lambda: lrpfx.explain(MODELS[name][0], inputs, **options)))


@functools.cache
def explainer_of(name: str) -> lrpfx.Explainer:
    return lrpfx.Explainer(MODELS[name][0], MODELS[name][1](2))


@fuzzing
@given(arguments())
def test_an_explainer_ends_in_a_result_or_its_own_error(
    drawn: tuple[str, Any, dict[str, Any]],
) -> None:
    """Much faster than the above; and afterwards it explains as before."""
    name, inputs, options = drawn
    explainer = explainer_of(name)
    options.pop("rules")
    check(end(lambda: explainer(inputs, **options)))
    got = leaves_of(explainer(MODELS[name][1](2)))
    assert all(torch.equal(a, b) for a, b in zip(got, leaves_at_first(name), strict=True))


def test_sparse_inputs_are_refused() -> None:
    with pytest.raises(errors.InputError, match="sparse"):
        explainer_of("mlp")(row().to_sparse())


@functools.cache
def leaves_at_first(name: str) -> list[Tensor]:
    return leaves_of(lrpfx.explain(MODELS[name][0], MODELS[name][1](2)))
