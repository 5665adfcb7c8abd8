"""What products are made of, which activations gate them, and what a softmax reads."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import chain

from torch import fx

from lrpfx.call import Op
from lrpfx.graph import SHAPED


def find_scores(graph: fx.Graph, known: Mapping[fx.Node, Op | str]) -> set[fx.Node]:
    """What a softmax reads, and what that is computed from one by one."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        op = known.get(node)
        if not isinstance(op, Op):
            continue
        passes = op.family in ("move", "product", "activation")
        passes = passes or op.kind in ("shift", "scale", "sum", "reduction")
        if op.kind == "softmax" or (node in found and passes):
            found.update(n for n in node.all_input_nodes if n in known)
    return found


def _nested(factor: fx.Node, known: Mapping[fx.Node, Op | str]) -> fx.Node | None:
    """The product that a factor of another is, moved or scaled maybe, if nothing else uses it."""
    inner: fx.Node | None = factor
    while inner is not None and _is_read_once(inner, known):
        if _is_kind(known[inner], "product"):
            return inner if len(set(inner.args)) == 2 else None
        inner = _before(inner, known, ("scale",))
    return None


def _before(
    node: fx.Node, known: Mapping[fx.Node, Op | str], kinds: Sequence[str]
) -> fx.Node | None:
    """What a node moves, or does one of ``kinds`` to, if that is a single one; else None."""
    op = known[node]
    if not isinstance(op, Op) or (op.family != "move" and op.kind not in kinds):
        return None
    inputs = [n for n in node.all_input_nodes if n in known]
    return inputs[0] if len(inputs) == 1 or node.target in SHAPED else None


def _is_read_once(node: fx.Node, known: Container[fx.Node]) -> bool:
    """Whether relevance comes to a node from one other, and not for its shape."""
    users = [user for user in node.users if user in known]
    return sum(user.target not in SHAPED or user.args[0] is node for user in users) == 1


def factors_of(product: fx.Node, known: Mapping[fx.Node, Op | str]) -> list[list[fx.Node]]:
    """By operand of a product, the factors that it stands for, see ``rules.Uniform``."""
    found = []
    for operand in (n for n in product.args if isinstance(n, fx.Node) and n in known):
        inner = _nested(operand, known)
        found.append([operand] if inner is None else list(chain(*factors_of(inner, known))))
    return found


def _is_kind(op: Op | str, kind: str) -> bool:
    return isinstance(op, Op) and op.kind == kind


def find_gates(known: Mapping[fx.Node, Op | str]) -> set[fx.Node]:
    """The activations that stand as the only one among a product's factors.

    Moves, and constant factors and summands, as in ``2 * sigmoid(x)`` or ``1 - sigmoid(x)``, aside.
    Of several it is the only sigmoid, as in an LSTM's ``sigmoid(i) * tanh(g)``, and none that just
    clamps. Beside a softmax nothing is a gate.
    """
    products = [node for node, op in known.items() if _is_kind(op, "product")]
    inner = {_nested(n, known) for node in products for n in node.all_input_nodes}
    found: set[fx.Node] = set()
    for node in products:
        if node in inner:
            continue
        ends = dict(_end(factor, known) for factor in chain(*factors_of(node, known)))
        if "softmax" in ends.values():
            continue
        bent = [end for end, kind in ends.items() if kind not in ("", "clamp")]
        sigmoids = [end for end in bent if "sigmoid" in ends[end]]
        clamps = [end for end, kind in ends.items() if kind == "clamp"]
        found.update(next((few for few in (bent, sigmoids, clamps) if len(few) == 1), ()))
    return found


def _end(factor: fx.Node, known: Mapping[fx.Node, Op | str]) -> tuple[fx.Node, str]:
    """The activation or softmax that a factor is but for moves and the like, and its kind."""
    clamp = None
    while (before := _before(factor, known, ("scale", "shift", "clamp"))) is not None:
        clamp = factor if clamp is None and _is_kind(known[factor], "clamp") else clamp
        factor = before
    op = known[factor]
    if isinstance(op, Op) and (op.family == "activation" or op.kind == "softmax"):
        return factor, op.kind
    return (factor, "") if clamp is None else (clamp, "clamp")
