"""The oracle itself: against arithmetic done by hand, explicit loops, and torch."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from tests.oracle import reference
from tests.oracle.reference import Array, Node, Params, Rule
from tests.oracle.strategies import (
    BLOCKS,
    RULES,
    SPELLINGS,
    Network,
    networks,
    rules_for,
    to_torch,
    well_posed,
)

# No deadline: the machines that run the tests are shared.
drawn = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def relevance_through(
    op: str,
    xs: Sequence[Any],
    R: Any,
    rule: str = "Gradient",
    rule_params: Params | None = None,
    **params: Any,
) -> list[Array]:
    """Return the relevance of each input of a single node."""
    inputs = [np.array(x, dtype=float) for x in xs]
    node = Node(op, tuple(range(len(xs))), params, (rule, rule_params or {}))
    nodes = [*(Node("input") for _ in xs), node]
    return reference.relevance(nodes, inputs, np.array(R, dtype=float))[:-1]


# Rules, by hand -----------------------------------------------------------------------------------

# Each case: rule, its parameters, W, b, x, R, the relevance of x, and the tolerance that the
# default stabilizer of 1e-6 asks for.
HAND_WORKED: list[tuple[str, Params, Any, Any, Any, Any, Any, float]] = [
    # z = (1 + 2, 3 - 1) = (3, 2), so R / z = (1, 1); R_1 = 1 + 3, R_2 = 2 - 1.
    ("Epsilon", {"epsilon": 0.0}, [[1, 2], [3, -1]], [0, 0], [1, 1], [3, 2], [4, 1], 0),
    # z = 1 - 1 - 1 = -1, R / z = 1: the parts are (1, -1), and the bias takes -1.
    ("Epsilon", {"epsilon": 0.0}, [[1, -1]], [-1], [1, 1], [-1], [1, -1], 0),
    # z = -1 becomes -1 - 1 = -2.
    ("Epsilon", {"epsilon": 1.0}, [[1, -1]], [-1], [1, 1], [-1], [0.5, -0.5], 0),
    # Without the bias the sum is 1 - 1 = 0, which counts as positive: 0 + 0.5, R / 0.5 = -2.
    (
        "Epsilon",
        {"epsilon": 0.5, "zero_params": "bias"},
        [[1, -1]],
        [-1],
        [1, 1],
        [-1],
        [-2, 2],
        0,
    ),
    # z = 0 and epsilon = 0: all is absorbed.
    ("Epsilon", {"epsilon": 0.0}, [[1, -1]], [0], [1, 1], [-1], [0, 0], 0),
    # z = 2 - 4 = -2 is lifted to 4: R / 4 = 2.
    ("Epsilon", {"epsilon": lambda z: z + 6}, [[2, -4]], [0], [1, 1], [8], [4, -8], 0),
    # Norm is Epsilon: z = 3, R / z = 2.
    ("Norm", {"stabilizer": 0.0}, [[1, 2]], [0], [1, 1], [6], [2, 4], 0),
    # Of the parts (1, -1) and the bias -1 only 1 is positive.
    ("ZPlus", {}, [[1, -1]], [-1], [1, 1], [-1], [-1, 0], 1e-5),
    # (-3)(-1) = 3 and 1 * 2 = 2 are positive, the bias too: d = 6, R / d = 1.
    ("ZPlus", {"stabilizer": 0.0}, [[-3, 1]], [1], [-1, 2], [6], [3, 2], 0),
    # d = 5 without the bias.
    (
        "ZPlus",
        {"stabilizer": 0.0, "zero_params": "bias"},
        [[-3, 1]],
        [1],
        [-1, 2],
        [5],
        [3, 2],
        0,
    ),
    # Nothing excites: d = 0 and no share to hand down, whatever the stabilizer.
    ("ZPlus", {}, [[-1, -1]], [-1], [1, 1], [1], [0, 0], 0),
    # alpha = 1 is ZPlus.
    ("AlphaBeta", {"alpha": 1.0, "beta": 0.0}, [[1, -1]], [-1], [1, 1], [-1], [-1, 0], 1e-5),
    # Positive: 1 of d = 1 gets 2 * (-1). Negative: -1 of d = -1 - 1 gets -1 * (-1 / -2 * -1) = 0.5.
    ("AlphaBeta", {}, [[1, -1]], [-1], [1, 1], [-1], [-2, 0.5], 1e-5),
    # Without the bias the negative part has d = -1: -1 * (-1 / -1 * -1) = 1.
    ("AlphaBeta", {"zero_params": "bias"}, [[1, -1]], [-1], [1, 1], [-1], [-2, 1], 1e-5),
    # Parts (3, 2, -4), bias 5. Positive: d = 10, R / d = 2, (6, 4, 0). Negative: d = -4,
    # R / d = -5, (0, 0, 20). 1.5 * positive - 0.5 * negative.
    (
        "AlphaBeta",
        {"alpha": 1.5, "beta": 0.5, "stabilizer": 0.0},
        [[-3, 1, 4]],
        [5],
        [-1, 2, -1],
        [20],
        [9, 6, -10],
        0,
    ),
    # z = 2 - 1 + 1 = 2 > 0. Parts (2 + 2, -1), bias 1 + 1: d = 5, R / d = 2.
    ("Gamma", {"gamma": 1.0, "stabilizer": 0.0}, [[2, -1]], [1], [1, 1], [10], [8, -2], 0),
    # The same by negative inputs and weights.
    ("Gamma", {"gamma": 1.0, "stabilizer": 0.0}, [[-2, 1]], [1], [-1, -1], [10], [8, -2], 0),
    # The default gamma of 0.25: parts (1.25, -0.25 * 1), d = 1, R / d = 1.
    ("Gamma", {}, [[1, -0.25]], [0], [1, 1], [1], [1.25, -0.25], 1e-5),
    # z = -1 < 0. Parts (1, -1 - 1), bias -1 - 1: d = -3, R / d = 1 / 3.
    ("Gamma", {"gamma": 1.0}, [[1, -1]], [-1], [1, 1], [-1], [1 / 3, -2 / 3], 1e-5),
    # Without its bias the output would be 2 - 1 = 1; the gate sees the true one, -2. Parts
    # (2, -1 - 2), d = -1, R / d = -1. (The other gate would give (6, -1) / 5.)
    (
        "Gamma",
        {"gamma": 2.0, "stabilizer": 0.0, "zero_params": "bias"},
        [[2, -1]],
        [-3],
        [1, 1],
        [1],
        [-2, 3],
        0,
    ),
    # z = 0: both gates are shut.
    ("Gamma", {}, [[1, -1]], [0], [1, 1], [1], [0, 0], 0),
    # Contributions 0.5 - 1 * (-1) = 1.5 and -0.5 - (-1) * 1 = 0.5; d = 2 whatever the bias.
    ("ZBox", {"low": -1, "high": 1}, [[1, -1]], [7], [0.5, 0.5], [1], [0.75, 0.25], 1e-5),
    # A box per input: 1 - 1 * 0 = 1 and -1 - (-1) * 4 = 3; d = 4, R / d = 2.
    (
        "ZBox",
        {"low": np.array([0, -9]), "high": np.array([9, 4]), "stabilizer": 0.0},
        [[1, -1]],
        [7],
        [1, 1],
        [8],
        [2, 6],
        0,
    ),
    # Squares (1, 4), d = 1 + 4 + 2 * 2 = 9; the input does not matter.
    ("WSquare", {}, [[1, -2]], [2], [0, 5], [9], [1, 4], 1e-5),
    ("WSquare", {"zero_params": "bias"}, [[1, -2]], [2], [0, 5], [5], [1, 4], 1e-5),
    # All alike, also where the weight is zero.
    ("Flat", {}, [[1, 0]], [3], [0, 5], [4], [2, 2], 1e-5),
    # d = 2 becomes 3.
    ("Flat", {"stabilizer": 1.0}, [[1, 0]], [3], [0, 5], [6], [2, 2], 0),
    # z = 2 - 9 + 9 = 2, R / z = 2; W's = (4, 6), taken by the signs of 1 and -3 ...
    ("Sign", {"epsilon": 0.0}, [[2, 3]], [9], [1, -3], [4], [4, -6], 0),
    # ... or by which side of mu they are on; z = 8, W's = (2, 3). Equal counts as above.
    ("Sign", {"epsilon": 0.0, "mu": 2.0}, [[2, 3]], [0], [1, 2], [8], [-2, 3], 0),
    ("Sign", {"epsilon": 0.0}, [[2, 3]], [2], [0, 0], [2], [2, 3], 0),
    ("Pass", {}, [[1, 2], [3, 4]], [0, 0], [1, 1], [5, 6], [5, 6], 0),
    # W' R = (1 * 5 + 3 * 6, 2 * 5 + 4 * 6).
    ("Gradient", {}, [[1, 2], [3, 4]], [9, 9], [1, 1], [5, 6], [23, 34], 0),
]


@pytest.mark.parametrize(("rule", "params", "W", "b", "x", "R", "expected", "atol"), HAND_WORKED)
def test_rule_by_hand(
    rule: str, params: Params, W: Any, b: Any, x: Any, R: Any, expected: Any, atol: float
) -> None:
    weight, bias = np.array(W, dtype=float), np.array(b, dtype=float)
    (r,) = relevance_through("linear", [x], R, rule, params, weight=weight, bias=bias)
    np.testing.assert_allclose(r, expected, rtol=1e-14, atol=atol)


def test_stabilizer_is_added_by_default() -> None:
    # The other cases only bound it. d = 1 + 1e-6.
    (r,) = relevance_through("linear", [[1.0]], [1.0], "ZPlus", weight=np.ones((1, 1)))
    assert r[0] == 1.0 / (1.0 + 1e-6)


@pytest.mark.parametrize(
    ("rule", "params", "x", "R", "expected"),
    [
        ("Pass", {}, [-1, 2, 3], [5, -1, 4], [5, -1, 4]),
        ("Gradient", {}, [-1, 2, 3], [5, -1, 4], [0, -1, 4]),
        # No derivative at zero.
        ("Gradient", {}, [0], [1], [0]),
        ("ReLUDeconvNet", {}, [-1, 2, 3], [5, -1, 4], [5, 0, 4]),
        ("ReLUGuidedBackprop", {}, [-1, 2, 3], [5, -1, 4], [0, 0, 4]),
        # sigmoid(ln 3) = 1 / (1 + 1 / 3) = 3 / 4.
        ("ReLUBetaSmooth", {"beta_smooth": math.log(3)}, [1, -1, 0], [4, 4, 4], [3, 1, 2]),
        # sigmoid(10 * 0.1) = 1 / (1 + 1 / e).
        ("ReLUBetaSmooth", {}, [0.1], [1], [1 / (1 + math.exp(-1))]),
    ],
)
def test_relu_rule_by_hand(rule: str, params: Params, x: Any, R: Any, expected: Any) -> None:
    (r,) = relevance_through("relu", [x], R, rule, params)
    np.testing.assert_allclose(r, expected, rtol=1e-14)


# Ops, by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "rule", "R", "expected"),
    [
        # 3 + 1 = 4 and 3 - 1 = 2.
        ("add", "Norm", 4, [3, 1]),
        ("sub", "Norm", 2, [3, -1]),
        # One coefficient each, whatever the sign and the value.
        ("add", "Flat", 2, [1, 1]),
        ("sub", "Flat", 2, [1, 1]),
        ("sub", "Gradient", 2, [2, -2]),
    ],
)
def test_sum_by_hand(op: str, rule: str, R: float, expected: list[float]) -> None:
    exactly = {"stabilizer": 0.0} if rule != "Gradient" else {}
    left, right = relevance_through(op, [[3], [1]], [R], rule, exactly)
    assert [left[0], right[0]] == expected


def test_sum_that_cancels_absorbs() -> None:
    left, right = relevance_through("sub", [[1], [1]], [2], "Norm", {"stabilizer": 0.0})
    assert [left[0], right[0]] == [0, 0]


def test_broadcast_sum_collects_relevance() -> None:
    # (1, 3) + 1 = (2, 4); R / z = (1, 1): the single entry gets its share of both.
    left, right = relevance_through("add", [[1, 3], [1]], [2, 4], "Norm", {"stabilizer": 0.0})
    np.testing.assert_array_equal(left, [1, 3])
    np.testing.assert_array_equal(right, [2])


def test_mean_shares_by_value() -> None:
    exactly = {"stabilizer": 0.0}
    # (1 + 3) / 2 = 2, R / z = 4, and each coefficient is a half.
    (r,) = relevance_through("mean", [[1, 3]], 8.0, "Norm", exactly, axes=(0,))
    np.testing.assert_array_equal(r, [2, 6])
    (r,) = relevance_through("mean", [[1, 3]], [8], "Flat", exactly, axes=(0,), keepdims=True)
    np.testing.assert_array_equal(r, [4, 4])


def test_avg_pool_counts_padding_or_not() -> None:
    x = np.array([[1.0, 3.0]])
    pool: Params = {"kernel": (2,), "padding": (1,)}
    nodes = [Node("input"), Node("avg_pool", (0,), pool)]
    # Windows (0, 1) and (3, 0), stride 2.
    np.testing.assert_array_equal(reference.forward(nodes, [x])[-1], [[0.5, 1.5]])
    nodes = [Node("input"), Node("avg_pool", (0,), {**pool, "count_include_pad": False})]
    np.testing.assert_array_equal(reference.forward(nodes, [x])[-1], [[1, 3]])


def test_batch_norm_absorbs_its_offset() -> None:
    # (x - 1) / 2 * 2 + 3 = x + 2. At x = 2 it is 4, of which x brings 2.
    params = {
        "mean": np.array([1.0]),
        "var": np.array([4.0]),
        "weight": np.array([2.0]),
        "bias": np.array([3.0]),
        "eps": 0.0,
    }
    nodes = [Node("input"), Node("batch_norm", (0,), params, ("Epsilon", {"epsilon": 0.0}))]
    inputs, seed = [np.array([2.0])], np.array([4.0])
    values = reference.forward(nodes, inputs)
    np.testing.assert_allclose(values[-1], [4])
    np.testing.assert_allclose(reference.relevance(nodes, inputs, seed)[0], [2])
    np.testing.assert_allclose(reference.absorbed(nodes, inputs, seed), [0, 2])


def test_scale_and_shift_broadcast() -> None:
    # 2 * (1, 10) = (2, 20): the gradient is 1 * 3 + 10 * 4.
    (r,) = relevance_through("scale", [[2]], [3, 4], c=np.array([1.0, 10.0]))
    np.testing.assert_array_equal(r, [43])
    # 2 + (1, 2) = (3, 4): the shares are 2 / 3 * 3 and 2 / 4 * 4.
    (r,) = relevance_through(
        "shift", [[2]], [3, 4], "Epsilon", {"epsilon": 0.0}, c=np.array([1.0, 2.0])
    )
    np.testing.assert_allclose(r, [4])


def test_first_of_equal_maxima_wins() -> None:
    x = np.array([[2.0, 2.0, 1.0]])
    nodes = [Node("input"), Node("max_pool", (0,), {"kernel": (3,)})]
    np.testing.assert_array_equal(
        reference.relevance(nodes, [x], np.array([[5.0]]))[0], [[5, 0, 0]]
    )


@pytest.mark.parametrize(
    ("rule", "params", "expected"),
    [
        # Windows (1, 2), (2, 5): 1 / 3 and 2 / 3 of 6; 2 / 7 and 5 / 7 of 14.
        ("SmoothPool", {"stabilizer": 0.0}, [2, 4 + 4, 10]),
        ("SmoothPool", {"stabilizer": 1.0}, [6 / 4, 12 / 4 + 28 / 8, 70 / 8]),
        # Odds of 4 to 1, and 4 ** 3 to 1.
        ("TakeMost", {"beta": math.log(4)}, [6 / 5, 24 / 5 + 14 / 65, 14 * 64 / 65]),
    ],
)
def test_pool_rule_by_hand(rule: str, params: Params, expected: Any) -> None:
    (r,) = relevance_through(
        "max_pool", [[[1, 2, 5]]], [[6, 14]], rule, params, kernel=(2,), stride=(1,)
    )
    np.testing.assert_allclose(r, [expected])


def test_padding_takes_no_part_in_a_pool() -> None:
    params: Params = {"kernel": (2,), "padding": (1,), "stride": (2,)}
    for rule in ("SmoothPool", "TakeMost"):
        (r,) = relevance_through("max_pool", [[[-3.0, -1.0]]], [[6, 4]], rule, **params)
        np.testing.assert_allclose(r, [[6, 4]], rtol=1e-5)


def test_padding_never_wins() -> None:
    x = np.array([[-3.0, -1.0]])
    nodes = [Node("input"), Node("max_pool", (0,), {"kernel": (2,), "padding": (1,)})]
    np.testing.assert_array_equal(reference.forward(nodes, [x])[-1], x)
    np.testing.assert_array_equal(
        reference.relevance(nodes, [x], np.array([[5.0, 7.0]]))[0], [[5, 7]]
    )


@pytest.mark.parametrize(
    ("op", "params", "value", "back"),
    [
        # Of x = (1, 2, 3, 4), with relevance (1, 10, ...) on the outputs in order.
        ("slice", {"index": (slice(1, None, 2),)}, [2, 4], [0, 1, 0, 10]),
        ("slice", {"index": (2,)}, 3, [0, 0, 1, 0]),
        ("reshape", {"shape": (2, 2)}, [[1, 2], [3, 4]], [1, 10, 100, 1000]),
        ("flip", {"axes": (0,)}, [4, 3, 2, 1], [1000, 100, 10, 1]),
        ("roll", {"shifts": (1,), "axes": (0,)}, [4, 1, 2, 3], [10, 100, 1000, 1]),
        ("pad", {"widths": ((1, 0),)}, [0, 1, 2, 3, 4], [10, 100, 1000, 10000]),
        ("expand", {"shape": (2, 4)}, [[1, 2, 3, 4]] * 2, [10001, 100010, 1000100, 10001000]),
        ("repeat", {"reps": (2,)}, [1, 2, 3, 4] * 2, [10001, 100010, 1000100, 10001000]),
    ],
)
def test_move_carries_relevance(op: str, params: Params, value: Any, back: Any) -> None:
    nodes = [Node("input"), Node(op, (0,), params)]
    x = np.array([1.0, 2.0, 3.0, 4.0])
    out = reference.forward(nodes, [x])[-1]
    np.testing.assert_array_equal(out, value)
    seed = np.array([10.0**k for k in range(out.size)]).reshape(out.shape)
    np.testing.assert_array_equal(reference.relevance(nodes, [x], seed)[0], back)


def test_permute_and_cat_carry_relevance() -> None:
    x, y = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])
    nodes = [
        Node("input"),
        Node("input"),
        Node("permute", (0,), {"axes": (1, 0)}),
        Node("cat", (1, 2), {"axis": 1}),
    ]
    np.testing.assert_array_equal(reference.forward(nodes, [x, y])[-1], [[3, 1], [4, 2]])
    r = reference.relevance(nodes, [x, y], np.array([[5.0, 6.0], [7.0, 8.0]]))
    np.testing.assert_array_equal(r[0], [[6, 8]])
    np.testing.assert_array_equal(r[1], [[5], [7]])


def test_relevance_of_all_readers_adds_up() -> None:
    # relu(x) + x at x = 3: the sum shares 6 as 3 and 3, and both arrive at x.
    nodes = [
        Node("input"),
        Node("relu", (0,), rule=("Pass", {})),
        Node("add", (1, 0), rule=("Norm", {"stabilizer": 0.0})),
    ]
    r = reference.relevance(nodes, [np.array([3.0])], np.array([6.0]))
    assert [float(part[0]) for part in r] == [6, 3, 6]


def test_flat_counts_no_padding() -> None:
    # Kernel 3, padding 1, two entries: each output sees both, so 1 and 3 are halved.
    weight = np.zeros((1, 1, 3))
    (r,) = relevance_through(
        "conv", [[[7.0, 0.0]]], [[1, 3]], "Flat", {"stabilizer": 0.0}, weight=weight, padding=1
    )
    np.testing.assert_array_equal(r, [[2, 2]])


def test_z_box_counts_no_padding() -> None:
    # The same windows with all weights one, box (-1, 1): contributions x + 1 = (1, 2), d = 3. A
    # padding that were given the bounds of the box would enlarge d.
    params = {"low": -1.0, "high": 1.0, "stabilizer": 0.0}
    (r,) = relevance_through(
        "conv", [[[0.0, 1.0]]], [[3, 6]], "ZBox", params, weight=np.ones((1, 1, 3)), padding=1
    )
    np.testing.assert_allclose(r, [[3, 6]])


@pytest.mark.parametrize(
    ("op", "rule", "params"),
    [
        ("relu", "Epsilon", {}),
        ("tanh", "ReLUDeconvNet", {}),
        ("flip", "Pass", {"axes": (0,)}),
        ("linear", "Pass", {"weight": np.ones((1, 2))}),
        ("linear", "Softmax", {"weight": np.ones((1, 2))}),
    ],
)
def test_illegal_rules_are_refused(op: str, rule: str, params: Params) -> None:
    size = 1 if op == "linear" else 2
    with pytest.raises((ValueError, KeyError)):
        relevance_through(op, [[1.0, 2.0]], [1.0] * size, rule, **params)


# Laws ---------------------------------------------------------------------------------------------


def transposed_form(
    rule: str, params: Params, W: Array, b: Array, x: Array, z: Array, R: Array
) -> Array:
    """Return the same relevance in the form x * W' (R / d), which shares no sum with the oracle."""

    eps: float = {"stabilizer": 1e-6, **params}["epsilon" if "epsilon" in params else "stabilizer"]

    def stabilize(d: Array) -> Array:
        d = np.where(d >= 0, d + eps, d - eps)
        # The one convention that the form does not settle: nothing is shared over a zero.
        return np.where(d == 0, np.inf, d)

    r: Array
    xp, Wp, bp = (np.where(t > 0, t, 0.0) for t in (x, W, b))
    xn, Wn, bn = (np.where(t < 0, t, 0.0) for t in (x, W, b))
    if rule in ("Epsilon", "Norm"):
        r = x * (W.T @ (R / stabilize(W @ x + b)))
    elif rule == "ZPlus":
        s = R / stabilize(Wp @ xp + Wn @ xn + bp)
        r = xp * (Wp.T @ s) + xn * (Wn.T @ s)
    elif rule == "AlphaBeta":
        alpha, beta = params.get("alpha", 2.0), params.get("beta", 1.0)
        s1, s2 = R / stabilize(Wp @ xp + Wn @ xn + bp), R / stabilize(Wn @ xp + Wp @ xn + bn)
        r = alpha * (xp * (Wp.T @ s1) + xn * (Wn.T @ s1))
        r -= beta * (xp * (Wn.T @ s2) + xn * (Wp.T @ s2))
    elif rule == "Gamma":
        g = params.get("gamma", 0.25)
        Wu, Wd, bu, bd = W + g * Wp, W + g * Wn, b + g * bp, b + g * bn
        s1 = (z > 0) * R / stabilize(Wu @ xp + Wd @ xn + bu)
        s2 = (z < 0) * R / stabilize(Wd @ xp + Wu @ xn + bd)
        r = xp * (Wu.T @ s1) + xn * (Wd.T @ s1) + xp * (Wd.T @ s2) + xn * (Wu.T @ s2)
    elif rule == "ZBox":
        low, high = (np.broadcast_to(params[bound], x.shape) for bound in ("low", "high"))
        s = R / stabilize(W @ x + b - (Wp @ low + bp) - (Wn @ high + bn))
        r = x * (W.T @ s) - low * (Wp.T @ s) - high * (Wn.T @ s)
    elif rule == "WSquare":
        r = (W**2).T @ (R / stabilize((W**2).sum(axis=1) + b**2))
    elif rule == "Sign":
        r = np.where(x < params.get("mu", 0.0), -1, 1) * (W.T @ (R / stabilize(W @ x + b)))
    else:
        assert rule == "Flat"
        r = np.ones_like(W).T @ (R / stabilize(np.full(len(W), float(len(x)))))
    return r


@pytest.mark.parametrize("rule", sorted({*RULES["linear"], *RULES["add"]}))
@settings(drawn, max_examples=20)
@given(data=st.data())
def test_rule_equals_its_transposed_form(rule: str, data: st.DataObject) -> None:
    network = data.draw(networks(ndims=(1,), max_blocks=0))
    network = network.with_rules(data.draw(rules_for(network, {"linear": (rule,)})))
    node = network.nodes[-1]
    assert node.rule is not None
    params = node.rule[1]
    x, z, R = network.inputs[0][0], network.forward()[-1][0], np.array([1.0, -2.0, 0.5])
    b = np.zeros(len(z)) if node.params["bias"] is None else node.params["bias"]
    b_rule = np.zeros_like(b) if "zero_params" in params else b
    r = reference.relevance(network.nodes, network.sample(0), R)[0]
    expected = transposed_form(rule, params, node.params["weight"], b_rule, x, z, R)
    # A denominator of zero leaves R / stabilizer, parts of a million that may cancel.
    np.testing.assert_allclose(r, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 1), ((1, 2), (0, 1), (2, 1), 2)],
)
def test_conv_matrix_is_the_loop(
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(4, 5, 6)), rng.normal(size=2)
    weight = rng.normal(size=(2, 4 // groups, 2, 3))
    params = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    nodes = [Node("input"), Node("conv", (0,), {"weight": weight, "bias": bias, **params})]
    z = reference.forward(nodes, [x])[-1]
    padded = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2))
    for out, i, j in np.ndindex(z.shape):
        # With two groups and two outputs, output k reads half k of the channels.
        half = slice(2 * out, 2 * out + 2) if groups == 2 else slice(None)
        rows = i * stride[0] + dilation[0] * np.arange(2)
        columns = j * stride[1] + dilation[1] * np.arange(3)
        window = padded[half][:, rows][:, :, columns]
        assert z[out, i, j] == pytest.approx(np.sum(window * weight[out]) + bias[out], rel=1e-12)


def test_transposed_conv_is_the_transpose() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 2))
    params = {"weight": weight, "stride": (2, 1), "padding": (1, 0), "groups": 2}
    W, _, shape = reference.matrix(Node("conv", params=params), [(2, 5, 4)])
    back, _, shape_back = reference.matrix(Node("conv_transpose", params=params), [shape])
    assert shape_back == (2, 5, 4)
    np.testing.assert_array_equal(back, W.T)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolutions_equal_torch(ndim: int) -> None:
    rng = np.random.default_rng(ndim)
    x = rng.normal(size=(4, 4, 3, 5)[: ndim + 1])
    axes = (2, 1, 2)[:ndim]
    params: Params = {"stride": axes, "padding": (1,) * ndim, "dilation": axes[::-1], "groups": 2}
    weight, bias = rng.normal(size=(4, 2, 2, 3, 2)[: ndim + 2]), rng.normal(size=4)
    operations: dict[str, Callable[..., torch.Tensor]] = {
        "conv": (F.conv1d, F.conv2d, F.conv3d)[ndim - 1],
        "conv_transpose": (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[ndim - 1],
    }
    extras: dict[str, Params] = {
        "conv": {},
        "conv_transpose": {"output_padding": (1, *[0] * (ndim - 1))},
    }
    for op, operation in operations.items():
        settings = {**params, **extras[op]}
        node = Node(op, (0,), {"weight": weight, "bias": bias, **settings})
        z = reference.forward([Node("input"), node], [x])[-1]
        expected = operation(*(torch.from_numpy(a) for a in (x[None], weight, bias)), **settings)
        np.testing.assert_allclose(z, expected[0].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", reference.ACTIVATIONS)
def test_slope_is_the_derivative(op: str) -> None:
    function, slope = reference.ACTIVATIONS[op]
    x, step = np.linspace(-4.03, 4.01, 41), 1e-5
    numeric = (function(x + step) - function(x - step)) / (2 * step)
    np.testing.assert_allclose(slope(x), numeric, rtol=0, atol=1e-8)


def test_lrp_0_is_gradient_times_input() -> None:
    # On a network of ReLU without biases, where every output is linear around x.
    rng = np.random.default_rng(0)
    exactly = ("Epsilon", {"epsilon": 0.0})
    nodes = [
        Node("input"),
        Node("conv", (0,), {"weight": rng.normal(size=(3, 2, 3)), "padding": 1}, exactly),
        Node("relu", (1,), rule=("Pass", {})),
        Node("conv", (2,), {"weight": rng.normal(size=(3, 3, 3)), "padding": 1}, exactly),
        Node("add", (3, 2), rule=("Norm", {"stabilizer": 0.0})),
        Node("max_pool", (4,), {"kernel": (2,)}),
        Node("relu", (5,), rule=("Pass", {})),
        Node("reshape", (6,), {"shape": (6,)}),
        Node("linear", (7,), {"weight": rng.normal(size=(2, 6))}, exactly),
    ]
    x = rng.normal(size=(2, 5))
    z = reference.forward(nodes, [x])[-1]
    (r, *_) = reference.relevance(nodes, [x], np.array([z[0], 0.0]))
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        ahead = reference.forward(nodes, [x + step])[-1][0]
        behind = reference.forward(nodes, [x - step])[-1][0]
        assert r[i] == pytest.approx(x[i] * (ahead - behind) / 2e-6, abs=1e-8)
    assert r.sum() == pytest.approx(z[0])
    np.testing.assert_allclose(reference.absorbed(nodes, [x], np.array([z[0], 0.0])), 0, atol=1e-12)


# Drawn networks -----------------------------------------------------------------------------------


def tensors(network: Network) -> list[torch.Tensor]:
    return [torch.tensor(batch, requires_grad=True) for batch in network.inputs]


@pytest.mark.parametrize("spelling", SPELLINGS)
@drawn
@given(network=networks(max_inputs=2), seed=st.integers(0, 2**32 - 1))
def test_twin_is_the_network(spelling: str, network: Network, seed: int) -> None:
    inputs = tensors(network)
    output = to_torch(network, spelling)(*inputs)
    expected = network.forward()[-1]
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    # Without rules relevance is the gradient, which a node also gets by the rule of that name.
    R = np.random.default_rng(seed).normal(size=expected.shape)
    gradients = torch.autograd.grad(
        output, inputs, torch.from_numpy(R), allow_unused=True, materialize_grads=True
    )
    rules: tuple[Rule | None, ...] = (None, ("Gradient", {}))
    for rule in rules:
        relevance = network.with_rules([rule] * len(network.nodes)).relevance(R)
        for gradient, r in zip(gradients, relevance, strict=False):
            np.testing.assert_allclose(gradient.numpy(), r, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(drawn, max_examples=4)
@given(network=networks(max_inputs=2))
def test_twin_can_be_captured(spelling: str, network: Network) -> None:
    inputs = tuple(torch.tensor(batch) for batch in network.inputs)
    twin = to_torch(network, spelling)
    dynamic = ({0: torch.export.Dim("batch")},) * len(inputs)
    program = torch.export.export(twin, inputs, dynamic_shapes=(dynamic,), strict=False)
    more = [torch.cat([x, x]) for x in inputs]
    torch.testing.assert_close(program.module()(*more), twin(*more))


def test_in_place_only_where_nothing_else_reads() -> None:
    weight = np.eye(3)
    chain = [
        Node("input"),
        Node("relu", (0,)),
        Node("linear", (1,), {"weight": weight}),
        Node("slice", (2,), {"index": (slice(0, 2),)}),
        Node("relu", (3,)),
        Node("linear", (4,), {"weight": np.eye(2)}),
        Node("relu", (5,)),
        Node("add", (6, 5)),
    ]
    x = torch.randn(2, 3, dtype=torch.float64)
    network = Network(tuple(chain), (x.numpy(),))
    program = torch.export.export(to_torch(network, "inplace"), (x,), strict=False)
    called = [str(node.target) for node in program.graph.nodes if "relu" in str(node.target)]
    # The input is the user's, the slice has no other reader, the last linear layer has one.
    assert called == ["aten.relu.default", "aten.relu_.default", "aten.relu.default"]


def recorder(calls: list[str], path: str) -> Callable[..., None]:
    def record(*_: object) -> None:
        calls.append(path)

    return record


@drawn
@given(data=st.data())
def test_paths_lead_to_the_modules(data: st.DataObject) -> None:
    network = data.draw(networks(blocks=("shared", "conv", "activation")))
    for spelling in SPELLINGS:
        twin = to_torch(network, spelling)
        calls: list[str] = []
        for path in set(twin.paths.values()):
            twin.get_submodule(path).register_forward_hook(recorder(calls, path))
        twin(*tensors(network))
        assert calls == [twin.paths[k] for k in range(1, len(network.nodes))]


@drawn
@given(data=st.data())
def test_drawn_rules_are_legal(data: st.DataObject) -> None:
    network = data.draw(networks(max_inputs=2))
    network = network.with_rules(data.draw(rules_for(network)))
    seed = network.forward()[-1]
    for r in network.relevance(seed):
        assert np.isfinite(r).all()
    for k, (node, owner) in enumerate(zip(network.nodes, network.owners, strict=True)):
        assert node.rule == network.nodes[owner].rule, k


def find_network(predicate: Callable[[Network], bool], **options: Any) -> Network:
    """Return a drawn network with this property; hypothesis raises where it finds none."""
    return find(
        networks(**options),
        predicate,
        settings=settings(drawn, max_examples=2000, phases=[Phase.generate], database=None),
        random=random.Random(0),
    )


# What shows that a block was appended, where that is not an op of the block's name.
TRACES = {
    "activation": {"relu", "leaky_relu"},
    "conv_batch_norm": {"batch_norm"},
    "residual": {"add"},
    "shared": {"relu", "leaky_relu"},
    "skip": {"add"},
    "broadcast": {"mean"},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_drawn(block: str) -> None:
    # A skip connection needs an earlier value to go back to.
    find_network(
        lambda network: bool(TRACES.get(block, {block}) & {node.op for node in network.nodes}),
        blocks=("flip", block),
    )


def cancels(network: Network) -> bool:
    """Tell whether an output of a layer is zero although not all of its terms are."""
    values = reference.forward(network.nodes, network.sample(0))
    for node, z in zip(network.nodes, values, strict=True):
        if node.op in ("conv", "linear"):
            x = values[node.inputs[0]]
            W, b, _ = reference.matrix(node, [x.shape])
            if np.any((z.ravel() == 0) & (np.abs(W) @ np.abs(x.ravel()) + np.abs(b) > 0)):
                return True
    return False


def has_dead_unit(network: Network) -> bool:
    values = zip(network.nodes, network.forward(), strict=True)
    return any(node.op == "relu" and not value.any(axis=0).all() for node, value in values)


def has_unit_without_weights(network: Network) -> bool:
    weights = [node.params["weight"] for node in network.nodes if node.op in ("conv", "linear")]
    return any(not weight.reshape(len(weight), -1).any(axis=1).all() for weight in weights)


def shares(network: Network) -> bool:
    return network.owners != tuple(range(len(network.nodes)))


@pytest.mark.parametrize("hard", [cancels, has_dead_unit, has_unit_without_weights, shares])
def test_hard_case_is_drawn(hard: Callable[[Network], bool]) -> None:
    find_network(hard)


def test_decisions_by_round_off_are_not_drawn() -> None:
    # 0.1 * 3 - 0.3 is not zero in floating point, and neither answer is right; 1 * 3 - 3 is.
    def cancelling(c: float) -> Network:
        weight = np.array([[c, -c * 3.0]])
        nodes = (Node("input"), Node("linear", (0,), {"weight": weight, "bias": None}))
        return Network(nodes, (np.array([[3.0, 1.0]]),))

    assert well_posed(cancelling(1.0))
    assert not well_posed(cancelling(0.1))
    # Two equal values of the tanh may differ elsewhere in their last bit, two equal inputs not.
    pool = Node("max_pool", (1,), {"kernel": (2,)})
    ties = (np.ones((2, 1, 2)),)
    assert well_posed(Network((Node("input"), Node("relu", (0,)), pool), ties))
    assert not well_posed(Network((Node("input"), Node("tanh", (0,)), pool), ties))
