"""What a report notes of a graph beside its rows: what it holds for, what counts as constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from lrpfx.canonize import DIVISOR
from lrpfx.capture import Captured
from lrpfx.ops import HELD, final_softmax, module_calls, output_leaves, reachable, used_nodes
from lrpfx.plan.starts import unplaced

#: Of the function that the model ends in.
LEFT_OUT = "at the output is left out"


def notes_of(
    graph: fx.Graph, captured: Captured, starts: Mapping[fx.Node, fx.Node]
) -> Iterator[str]:
    """What a user may not expect of the graph.

    Args:
        graph: Canonized.
        captured: The model.
        starts: See ``starts.find_starts``.
    """
    if captured.why_static:
        yield f"captured for a batch of {captured.signature.batch} only: {captured.why_static}"
    if any(final_softmax(leaf) for leaf in output_leaves(graph)):
        yield f"the softmax {LEFT_OUT}: explained are its logits"
    used = used_nodes(graph)
    if placeless := [n for n in unplaced(graph, starts) if n in used]:
        calls = [module_calls(n, captured.prefix) for n in placeless]
        paths = {str(c[-1]) if c else "(the model)" for c in calls}
        yield (
            "embeddings of ids that are not computed one by one from those of one input count "
            f"as constants: {', '.join(sorted(paths))}"
        )
    held = [n for n in graph.nodes if n.meta.get(HELD) == DIVISOR]
    if divisors := [n for n in held if not reachable([n]).isdisjoint(starts)]:
        yield f"{len(divisors)} divisors of live tensors count as constants"
