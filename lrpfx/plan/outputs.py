"""Graph -> where what is explained is no logit: sums and picks of probabilities, and rates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from lrpfx.errors import some
from lrpfx.ops import final, nodes_in, output_leaves, record, source_line

aten = torch.ops.aten

#: Kinds of ops, beside moves and picks, by which probabilities become numbers of their size.
_KINDS = {"sum", "shift", "scale", "reduction", "avg_pool", "log", "clamp", "pow", "sqrt"}


def output_notes(graph: fx.Graph) -> Iterator[str]:
    """What is noted of the output that is explained if no target says which.

    Args:
        graph: Canonized and annotated.
    """
    leaves = [n for n in output_leaves(graph) if isinstance(n, fx.Node) and _has_record(n)]
    leaf = leaves[0] if leaves else None
    if leaf is None or final(leaf) is not None:
        return
    softmaxes, rates = dict[str, None](), dict[str, None]()
    seen, pending = {leaf}, [(leaf, True)]
    while pending:
        node, moved = pending.pop()
        if _picks(node):
            pending.append((node.all_input_nodes[0], moved))
            continue
        if (known := record(node)) is None:
            continue
        line = source_line(node) or str(node)
        if known.op.family == "softmax" or node.target is aten.sigmoid.default:
            softmaxes[line] = None
        elif moved and known.op.family == "activation" and _is_positive(node):
            rates[f"{known.kind} at {line}"] = None
        elif known.op.family in ("move", "select") or known.kind in _KINDS:
            same = moved and known.op.family in ("move", "select")
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            pending += [(n, same) for n in fresh]
    if softmaxes:
        yield (
            "the output is made of probabilities, and these are explained, not their logits: "
            f"{'; '.join(some(list(softmaxes), 3))}"
        )
    if rates:
        yield (
            "the output is positive where its logit is negative, and relevance there has the sign "
            f"of the output, not that of the logit: {'; '.join(some(list(rates), 3))}"
        )


def _has_record(node: fx.Node) -> bool:
    return record(node.all_input_nodes[0] if _picks(node) else node) is not None


def _picks(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_positive(node: fx.Node) -> bool:
    """Whether a rising function of one tensor and numbers is positive below zero."""
    others = nodes_in((node.args[1:], node.kwargs))
    if others or not isinstance(node.target, torch._ops.OpOverload):
        return False
    with torch.no_grad():
        y = node.target(torch.tensor([-2.0, -1.0, -0.5]), *node.args[1:], **node.kwargs)
    return isinstance(y, Tensor) and bool((y > 0).all() and (y.diff() > 0).all())
