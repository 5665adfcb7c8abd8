"""What a report notes of a graph beside its rows: what it holds for, what counts as constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from lrpfx.canonize import DIVISOR
from lrpfx.capture import Captured, Read
from lrpfx.errors import some
from lrpfx.ops import HELD, KEPT_NOTE, downstream, final, module_calls, output_leaves, used_nodes
from lrpfx.plan.ends import end_notes
from lrpfx.plan.outputs import output_notes
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
    yield from _notes_of_reads(captured.decisions or ())
    left = {f.name: f for leaf in output_leaves(graph) if (f := final(leaf)) is not None}
    for name, function in left.items():
        if function.again is not None:
            yield f"the {name} {LEFT_OUT}: explained are its logits"
        else:
            yield (
                f"the {name}, of which a part is the output, is left out: explained are its "
                "logits, which a callable target gets, too"
            )
    yield from output_notes(graph)
    used = used_nodes(graph)
    kept = [n.meta[KEPT_NOTE] for n in graph.nodes if KEPT_NOTE in n.meta]
    yield from dict.fromkeys(note + _hooks_at(by, captured) for note, by in kept)
    if placeless := [n for n in unplaced(graph, starts) if n in used]:
        calls = [module_calls(n, captured.prefix) for n in placeless]
        paths = {str(c[-1]) if c else "(the model)" for c in calls}
        yield (
            "embeddings of ids that are not computed one by one from those of one input count "
            f"as constants: {', '.join(sorted(paths))}"
        )
    yield from end_notes(graph, starts)
    held = [n for n in graph.nodes if n.meta.get(HELD) == DIVISOR]
    live = downstream(graph, lambda n: n in starts) if held else ()
    if divisors := [n for n in held if n in live]:
        yield f"{len(divisors)} divisors of live tensors count as constants"


def _notes_of_reads(reads: Sequence[Read]) -> Iterator[str]:
    """What the values that a recorded run read mean for its graph."""
    of_inputs = [read for read in reads if read.of_inputs]
    if of_inputs:
        yield (
            "recorded for these inputs alone: their values decide what forward() does, and numbers "
            f"that are read off tensors count as constants: {_places(of_inputs)}"
        )
    elif reads:
        yield (
            "recorded for the parameters as they are: their values decide what forward() does: "
            f"{_places(reads)}"
        )
    if left := [read for read in of_inputs if read.leaves]:
        yield (
            "what depends on the input leaves PyTorch and counts as a constant where it comes "
            f"back: {_places(left)}"
        )


def _places(reads: Sequence[Read]) -> str:
    return "; ".join(some(list(dict.fromkeys(map(str, reads))), most=3))


def _hooks_at(node: fx.Node, captured: Captured) -> str:
    """The forward hooks of the module that a node belongs to, whose lines traces leave out."""
    calls = module_calls(node, captured.prefix)
    hooks = captured.model.get_submodule(calls[-1].path)._forward_hooks.values() if calls else ()
    codes = [getattr(hook, "__code__", None) for hook in hooks]
    lines = [f"{c.co_name}, {c.co_filename}:{c.co_firstlineno}" for c in codes if c is not None]
    return f"; {calls[-1].path} has a forward hook: {', '.join(lines)}" if lines else ""
