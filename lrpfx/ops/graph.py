"""What is known of a node, and what is read off a graph.

One typed record under one meta key (``annotate`` writes it); module path and source line, as
torch.export notes them; arguments, outputs, and what depends on what.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.ops.call import Op, Paired, Site, argument_names, is_op

aten = torch.ops.aten

KEY = "lrpfx"
#: Marks nodes that count as constants for relevance, though not for gradients; says why.
HELD = "lrpfx_held"
#: How the constants that forward() makes are named: as torch.export names them.
LIFTED = "lifted_tensor"
#: On the statistics of a batch, see ``canonize.batch_norm``.
BATCH = "lrpfx_batch"
#: Why a batch norm or a constant could not be folded; a note on that, and the op it is about.
KEPT, KEPT_NOTE = "lrpfx_kept", "lrpfx_kept_note"
#: On outputs that are a softmax or a sigmoid: the ``Final``.
FINAL = "lrpfx_final"
#: Ops that read only the values of their first argument, and of the second the shape or type.
SHAPED = {aten.expand_as.default, aten.view_as.default, aten.reshape_as.default}
SHAPED |= {aten.type_as.default, aten.to.other}
#: With the slash: torchvision lies beside torch.
_TORCH_CODE = (str(Path(torch.__file__).parent) + os.sep, "torch/")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its dotted path ("" is the model) and which call of it this is."""

    path: str
    call: int = 0

    def __str__(self) -> str:
        """The path, with "@k" for the k-th further call."""
        return self.path + (f"@{self.call}" if self.call else "")


@dataclass(frozen=True)
class Record:
    """A node that depends on the explained input, as selectors, reports and rules see it.

    Args:
        name: The node's name in the graph, unique.
        target: The ATen overload.
        op: Its row in the op table.
        modules: The calls it was made in, outermost first.
        folded: Module calls that were folded into this node (batch norm).
        kept: Why the node could not itself be folded into a layer, "" if nothing is said of that.
        source: "file:line   code" of the innermost line outside torch, "" if unknown.
        inputs: Names of the nodes that its relevance goes to.
        shape: Shape of the output, "N" for the batch; the first output's for several.
        dtype: Of the output.
        first: Whether the input reaches this node through no other conv or linear.
        nonneg: Whether the output is proven non-negative.
        gate: Whether this is the one activation among the factors of a product.
        recurrent: Whether it is such a gate of a recurrent layer.
        attending: Whether some attention stands before or behind this node.
        tokenwise: Whether this is a convolution that is a linear layer of tokens.
        preparing: Whether this shifts or scales an input's channels before its first layers.
        site: How to run the op again.
    """

    name: str
    target: Any
    op: Op
    modules: tuple[ModuleCall, ...]
    folded: tuple[ModuleCall, ...]
    kept: str
    source: str
    inputs: tuple[str, ...]
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    first: bool
    nonneg: bool
    gate: bool
    recurrent: bool
    attending: bool
    tokenwise: bool
    preparing: bool
    site: Site

    @property
    def kind(self) -> str:
        """The op's kind, such as "conv"."""
        return self.op.kind

    @property
    def family(self) -> str:
        """The op's family, such as "affine"."""
        return self.op.family

    @property
    def op_name(self) -> str:
        """Such as "conv2d"."""
        return op_name(self.target)

    @property
    def module(self) -> str:
        """Dotted path of the innermost module the node belongs to, "" for the model itself."""
        return self.modules[-1].path if self.modules else ""

    def __str__(self) -> str:
        """Path, op and shape, as error messages name a node."""
        dtype = str(self.dtype).removeprefix("torch.")
        dims = ", ".join(str(size) for size in self.shape)
        return f"{self.module or '(the model)'}: {self.op_name}, {dtype}[{dims}]"


def op_name(target: Any) -> str:
    """Name of an op without namespace and overload."""
    if isinstance(target, Paired):
        return op_name(target.target)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def record(node: fx.Node) -> Record | None:
    """The node's record, None for nodes that are constant with respect to the input."""
    return node.meta.get(KEY)


def output_leaves(graph: fx.Graph) -> list[Any]:
    """What the graph returns, flat: nodes and constants."""
    (leaves,) = next(iter(reversed(graph.nodes))).args
    assert isinstance(leaves, (tuple, list))
    return list(leaves)


@dataclass(frozen=True)
class Final:
    """A softmax or sigmoid at an output, which is left out.

    Args:
        name: What it is.
        logits: What it reads, moved as its own output is.
        again: Makes the output of the logits; None where it would need others than these.
    """

    name: str
    logits: fx.Node
    again: Callable[[Tensor], Tensor] | None


def final(leaf: Any) -> Final | None:
    """What is left out at an output, if anything is."""
    return leaf.meta.get(FINAL) if isinstance(leaf, fx.Node) else None


def explained_leaves(graph: fx.Graph) -> list[Any]:
    """The leaves that relevance starts from: what the graph returns, or the logits of that."""
    return [left.logits if (left := final(leaf)) else leaf for leaf in output_leaves(graph)]


def reachable(
    ends: Iterable[fx.Node],
    inputs_of: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> set[fx.Node]:
    """The nodes that some of ``ends`` depends on, themselves and placeholders included.

    Args:
        ends: Where to begin.
        inputs_of: What a node is computed from.
    """
    reached: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(inputs_of(node))
    return reached


def comes_from(end: fx.Node, start: fx.Node) -> bool:
    """Whether a node is computed from another, or is it; looks at what is between them only."""
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node is end:
            return True
        for user in node.users:
            if user not in seen and not end < user:
                seen.add(user)
                stack.append(user)
    return False


def downstream(graph: fx.Graph, begins: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes that depend on such as begin, themselves included."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if begins(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def is_reached(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a node is computed from inputs, if by more than the statistics of their batch.

    Args:
        node: The node.
        known: What has been found of others, for the next question.
    """
    stack = [node]
    while stack:
        current = stack[-1]
        inputs = from_inputs(current)
        if left := [] if current in known else [n for n in inputs if n not in known]:
            stack += left
            continue
        known.setdefault(current, current.op == "placeholder" or any(known[n] for n in inputs))
        stack.pop()
    return known[node]


def from_inputs(node: fx.Node) -> Iterable[fx.Node]:
    """What a node is computed from; statistics of the batch count as parameters."""
    return [] if BATCH in node.meta else node.all_input_nodes


def used_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that some output depends on, or the logits of one."""
    return reachable(nodes_in([*output_leaves(graph), *explained_leaves(graph)]))


#: Ops that take shape and type from their input, and no values.
SHAPE_ONLY = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
SHAPE_ONLY |= {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}


def varying(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose tensors depend on the graph's inputs, unlike parameters and held ones."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        depends = node.op == "placeholder" or found.intersection(node.all_input_nodes)
        depends = depends and node.target not in SHAPE_ONLY
        held = HELD in node.meta and node.op != "placeholder"  # constants of wrt= vary all the same
        if depends and isinstance(value, (Tensor, tuple, list)) and not held:
            found.add(node)
    return found


def is_floating(value: Any) -> bool:
    """Whether a node's value carries relevance: floating tensors and tuples that hold some."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (tuple, list)) and any(is_floating(v) for v in value)


def precision(node: Any) -> int:
    """Bytes of a floating number in a node's value; 0 for integers, and for what is no node."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.itemsize if isinstance(value, Tensor) and value.is_floating_point() else 0


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, defaults included."""
    target = node.target
    if isinstance(target, Paired):
        target = target.target
    if isinstance(target, torch._ops.OpOverload):
        names, defaults = _schema(target)
    else:
        names, defaults = argument_names(target), {}
    given = dict(zip(names, node.args, strict=False))
    given.update(node.kwargs)
    return {name: given[name] if name in given else defaults[name] for name in names}


@functools.cache
def _schema(op: torch._ops.OpOverload) -> tuple[list[str], dict[str, Any]]:
    """The names of an op's arguments, and the defaults."""
    schema = op._schema.arguments
    return argument_names(op), {a.name: a.default_value for a in schema if a.has_default_value()}


def nodes_in(argument: Any) -> list[fx.Node]:
    """All nodes in an argument, in order and with repetitions."""
    if isinstance(argument, fx.Node):
        return [argument]
    if not isinstance(argument, (tuple, list, dict, slice)):
        return []
    found: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(argument, collect)
    return found


def live_names(node: fx.Node, live: Container[fx.Node]) -> tuple[str, ...]:
    """Names of the arguments that hold live nodes, in schema order."""
    if not any(n in live for n in node.all_input_nodes) or not is_op(node.target):
        return ()
    arguments = bound_arguments(node).items()
    return tuple(name for name, value in arguments if any(n in live for n in nodes_in(value)))


def slot_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes that fill the slots of the node's Site, in order."""
    return nodes_in((bound_arguments(node), zero_padding(node)))


_PADS = {aten.pad.default, aten.constant_pad_nd.default}
#: What leaves zeros where they are.
_KEEPS_ZEROS = {aten.to.dtype, aten._to_copy.default, aten.relu.default}
CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
CONVS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
#: Ops that pad by themselves, too.
_OF_IMAGES = CONVS | {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}


def zero_padding(node: fx.Node) -> tuple[Any, ...]:
    """How many zeros the image that a node reads was padded with, as ``F.pad`` has it, else ()."""
    if node.target not in _OF_IMAGES:
        return ()
    pads: list[list[Any]] = []
    padded: Any = node.args[0]
    while isinstance(padded, fx.Node) and padded.target in _PADS | _KEEPS_ZEROS:
        if padded.target in _PADS:
            given = bound_arguments(padded)
            if given.get("mode", "constant") != "constant" or given["value"] not in (None, 0):
                break
            pads.append(list(given["pad"]))
        padded = padded.args[0]
    if any(isinstance(n, fx.Node) for amounts in pads for n in amounts):
        return tuple(pads[0])  # sizes that vary: what is before that is left out
    total = [0] * max(map(len, pads), default=0)
    for amounts in reversed(pads):  # below zero it cuts off, of zeros first
        for side, n in enumerate(amounts):
            total[side] = max(total[side], 0) + n
    return tuple(max(n, 0) for n in total)


def module_calls(node: fx.Node, prefix: str = "") -> tuple[ModuleCall, ...]:
    """The module calls a node was made in, outermost first, without the model itself."""
    calls = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        times = re.search(r"@(\d+)$", str(key))
        path = (str(path) + ".").removeprefix(prefix).removesuffix(".")
        if path:
            calls.append(ModuleCall(path, int(times.group(1)) if times else 0))
    return tuple(calls)


def source_line(node: fx.Node) -> str:
    """The innermost line outside torch that made the node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH_CODE)]
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{file}:{line}   {code.strip()}"


def letters_of(graph: fx.Graph) -> dict[str, str]:
    """Names for the sizes that may vary: "N" for the batch, then "T", "U" ... as inputs have them.

    Args:
        graph: With its symbolic sizes as the trace named them.
    """
    values = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    batch = [str(shape[0]) for shape in shapes if shape and not isinstance(shape[0], int)]
    others = [str(size) for shape in shapes for size in shape[1:] if not isinstance(size, int)]
    letters = dict.fromkeys(batch, "N")
    names = iter("TUVWXYZ")
    for symbol in dict.fromkeys(others):
        letters.setdefault(symbol, next(names, symbol))
    return letters


def verify(graph: fx.Graph) -> None:
    """Check what every pass must keep: a sound graph whose call nodes all know their value.

    Raises:
        RuntimeError: From ``graph.lint``, or for a node without a value.
    """
    graph.lint()
    for node in graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise RuntimeError(f"node {node.name} ({node.target}) has lost its value")


def verified(graph: fx.Graph, before: list[Any]) -> list[Any]:
    """What ``verify`` reads of a graph, which is verified if that is not as it was before.

    Args:
        graph: The graph.
        before: What was returned for it when it was last verified; empty if it has not been.
    """
    now = [(n, n.op, n.target, n.args, n.kwargs, n.name, "val" in n.meta) for n in graph.nodes]
    if now != before:
        verify(graph)
    return now
