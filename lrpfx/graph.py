"""What lrpfx knows of each node: one typed record under one meta key."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx import ops
from lrpfx.call import Composed, Op, Site, Slot, argument_names, product
from lrpfx.errors import UnsupportedOpError

KEY = "lrpfx"
#: Marks nodes that count as constants for relevance, though not for gradients; says why.
HELD = "lrpfx_held"
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
        source: "file:line   code" of the innermost line outside torch, "" if unknown.
        inputs: Names of the nodes that its relevance goes to, see ``_live_inputs``.
        shape: Shape of the output, "N" for the batch; the first output's for several.
        dtype: Of the output.
        first: Whether the input reaches this node through no other conv or linear.
        nonneg: Whether the output is proven non-negative.
        gate: Whether this is the one activation among the factors of a product.
        site: How to run the op again.
    """

    name: str
    target: Any
    op: Op
    modules: tuple[ModuleCall, ...]
    folded: tuple[ModuleCall, ...]
    source: str
    inputs: tuple[str, ...]
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    first: bool
    nonneg: bool
    gate: bool
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


@dataclass(frozen=True)
class Unknown:
    """A node that relevance comes to, and whose op has no row in the op table.

    Args:
        name: The node's name in the graph.
        target: The ATen overload.
        live: Names of the arguments that depend on the input.
        modules: As in ``Record``, like the fields that follow.
        source: Line of the user's code.
        inputs: Names of the nodes it reads.
        shape: Shape of the output.
    """

    name: str
    target: Any
    live: tuple[str, ...]
    modules: tuple[ModuleCall, ...]
    source: str
    inputs: tuple[str, ...]
    shape: tuple[int | str, ...]

    @property
    def call(self) -> str:
        """The overload, and its live arguments if there are several."""
        which = f" with live {' and '.join(self.live)}" if len(self.live) > 1 else ""
        return f"{self.target}{which}"

    def __str__(self) -> str:
        """Op, path, shape and source, as the error lists it."""
        path = self.modules[-1].path if self.modules else "(the model)"
        return f"{self.call} at {path}, [{', '.join(map(str, self.shape))}]" + (
            f"\n         source: {self.source}" if self.source else ""
        )


def op_name(target: Any) -> str:
    """Name of an op without namespace and overload."""
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


_FINAL = {torch.ops.aten.softmax.int, torch.ops.aten._softmax.default}
_FINAL |= {torch.ops.aten.log_softmax.int, torch.ops.aten._log_softmax.default}


def final_softmax(leaf: Any) -> bool:
    """Whether an output is a softmax or log-softmax that nothing else uses."""
    return isinstance(leaf, fx.Node) and leaf.target in _FINAL and len(leaf.users) == 1


def explained_leaves(graph: fx.Graph) -> list[Any]:
    """The leaves that relevance starts from: what the graph returns, softmaxes at the end undone.

    Classes compete in a softmax: their logits are what the network computed about each.
    """
    return [leaf.args[0] if final_softmax(leaf) else leaf for leaf in output_leaves(graph)]


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


def used_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that some output depends on."""
    return reachable(nodes_in(output_leaves(graph)))


def varying(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose tensors depend on the graph's inputs, unlike parameters and held ones."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        depends = node.op == "placeholder" or found.intersection(node.all_input_nodes)
        if depends and isinstance(value, (Tensor, tuple, list)) and HELD not in node.meta:
            found.add(node)
    return found


def is_floating(value: Any) -> bool:
    """Whether a node's value carries relevance: floating tensors and tuples that hold some."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (tuple, list)) and any(is_floating(v) for v in value)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, defaults included."""
    names = argument_names(node.target)
    values: dict[str, Any] = {}
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values.update(zip(names, node.args, strict=False))
    values.update(node.kwargs)
    return {name: values[name] for name in names}


def nodes_in(argument: Any) -> list[fx.Node]:
    """All nodes in an argument, in order and with repetitions."""
    found: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(argument, collect)
    return found


def annotate(
    graph: fx.Graph,
    starts: Container[fx.Node],
    prefix: str,
    held: Container[str] = (),
) -> set[fx.Node]:
    """Give every node that carries relevance its record; return all of them.

    Besides the recorded nodes these are the starts and the getitem nodes that pick one of several
    outputs.

    Args:
        graph: A canonized graph.
        starts: The nodes that relevance is wanted for, see ``starts.find_starts``.
        prefix: What to strip from module paths.
        held: Names of nodes that count as constants.

    Raises:
        UnsupportedOpError: Listing all such nodes that the op table does not know.
    """
    carrying, unknown = annotate_known(graph, starts, prefix, held)
    if unknown:
        raise UnsupportedOpError(
            f"{len(unknown)} operation(s) that depend on the explained input have no relevance "
            "rule.",
            where=[str(u) for u in unknown],
            fix=REGISTER,
        )
    return carrying


#: What to do about an op that the table does not know.
REGISTER = (
    "lrpfx.register_op(torch.ops.aten..., kind, family) tells lrpfx what such an op is; or explain "
    "a wrapper module that leaves it out."
)


def annotate_known(
    graph: fx.Graph,
    starts: Container[fx.Node],
    prefix: str,
    held: Container[str] = (),
) -> tuple[set[fx.Node], list[Unknown]]:
    """As ``annotate``, but return also what the op table does not know, in execution order."""
    letters = letters_of(graph)
    known = _liveness(graph, starts, held)
    carrying = _carrying(graph, known)
    unknown = [
        _unknown(node, carrying, prefix, letters)
        for node in graph.nodes
        if node in carrying and known[node] is _UNKNOWN
    ]
    gates = _gates(known, carrying)
    nonneg: set[fx.Node] = set()
    mixed: set[fx.Node] = set()  # what some conv or linear layer stands before
    for node in graph.nodes:
        node.meta.pop(KEY, None)
        if node not in carrying or node in starts:
            continue
        op = known[node]
        before = any(n in mixed for n in node.all_input_nodes)
        if isinstance(op, Op):
            node.meta[KEY] = replace(
                _record(node, op, carrying, nonneg, prefix, letters),
                first=not before,
                gate=node in gates,
            )
        elif op is _PICK and node.args[0] in nonneg:
            nonneg.add(node)
        if (r := record(node)) is not None and r.nonneg:
            nonneg.add(node)
        if before or (r is not None and r.kind in ("conv", "linear")):
            mixed.add(node)
    return carrying, unknown


_UNKNOWN = "not in the op table"
_PICK = "getitem or start"


def _liveness(
    graph: fx.Graph, starts: Container[fx.Node], held: Container[str]
) -> dict[fx.Node, Op | str]:
    """The nodes that depend on a start, each with what is known of it."""
    live: dict[fx.Node, Op | str] = {}
    for node in graph.nodes:
        if node in starts:
            live[node] = _PICK
            continue
        if node.op != "call_function" or not is_floating(node.meta.get("val")):
            continue
        if node.name in held or HELD in node.meta:
            continue
        if not any(n in live for n in node.all_input_nodes):
            continue
        if getattr(node.target, "__name__", "") == "getitem":
            live[node] = _PICK
            continue
        op = ops.find(node.target, frozenset(live_names(node, live)))
        if op is None or op.family != "constant":
            live[node] = op or _UNKNOWN
    return live


def _carrying(graph: fx.Graph, live: Container[fx.Node]) -> set[fx.Node]:
    """The live nodes from which a live output is reached through live nodes.

    What is only used detached is live, but no relevance ever comes to it.
    """
    carrying = {node for node in nodes_in(explained_leaves(graph)) if node in live}
    for node in reversed(graph.nodes):
        if node in carrying:
            carrying.update(n for n in node.all_input_nodes if n in live)
    return carrying


def _gates(known: Mapping[fx.Node, Op | str], carrying: set[fx.Node]) -> set[fx.Node]:
    """The activations that stand, moves aside, as the only one among a product's factors.

    Of several it is the only sigmoid, as in an LSTM's ``sigmoid(i) * tanh(g)``.
    """
    found = set()
    for node in carrying:
        op = known[node]
        if not isinstance(op, Op) or op.kind != "product":
            continue
        ends: dict[fx.Node, str] = {}
        for factor in node.all_input_nodes:
            while isinstance(moved := known.get(factor), Op) and moved.family == "move":
                factor = factor.all_input_nodes[0]
            if isinstance(moved, Op) and moved.family == "activation":
                ends[factor] = moved.kind
        sigmoids = [end for end, kind in ends.items() if "sigmoid" in kind]
        found |= {end for end in ends if len(ends) == 1 or sigmoids == [end]}
    return found


def _record(
    node: fx.Node,
    op: Op,
    carrying: set[fx.Node],
    nonneg: set[fx.Node],
    prefix: str,
    letters: Mapping[str, str],
) -> Record:
    floating = [n for n in node.all_input_nodes if is_floating(n.meta.get("val"))]
    folded = node.meta.get("folded_calls", ())
    return Record(
        name=node.name,
        target=node.target,
        op=op,
        modules=module_calls(node, prefix),
        folded=tuple(ModuleCall(c.path.removeprefix(prefix), c.call) for c in folded),
        source=source_line(node),
        inputs=_live_inputs(node, carrying),
        shape=_shape(node.meta["val"], letters),
        dtype=_first_tensor(node.meta["val"]).dtype,
        first=False,
        gate=False,
        nonneg=op.nonneg(bound_arguments(node), all(n in nonneg for n in floating)),
        site=_site(op, node, carrying, nonneg),
    )


def _live_inputs(node: fx.Node, carrying: Container[fx.Node]) -> tuple[str, ...]:
    """Names of the nodes that carry the node's relevance on; what getitem picks from, for that."""
    names = []
    for n in node.all_input_nodes:
        while n in carrying and n.target is operator.getitem:
            n = n.all_input_nodes[0]
        if n in carrying:
            names.append(n.name)
    return tuple(dict.fromkeys(names))


def live_names(node: fx.Node, live: Container[fx.Node]) -> tuple[str, ...]:
    """Names of the arguments that hold live nodes, in schema order."""
    if not isinstance(node.target, (torch._ops.OpOverload, Composed)) and (
        node.target is not product
    ):
        return ()
    arguments = bound_arguments(node).items()
    return tuple(name for name, value in arguments if any(n in live for n in nodes_in(value)))


def _site(op: Op, node: fx.Node, carrying: set[fx.Node], nonneg: set[fx.Node]) -> Site:
    """The op with every node among its arguments replaced by a slot, as ``slot_nodes`` lists."""
    slots: list[fx.Node] = []

    def take(n: fx.Node) -> Any:
        slots.append(n)
        return Slot(len(slots) - 1)

    template = fx.node.map_arg(bound_arguments(node), take)
    live_slots = tuple(i for i, n in enumerate(slots) if n in carrying)
    return Site(
        op=op,
        target=node.target,
        arguments=template,
        live=live_slots,
        live_names=live_names(node, carrying),
        nonneg=all(slots[i] in nonneg for i in live_slots),
        several_outputs=not isinstance(node.meta["val"], Tensor),
    )


def slot_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes that fill the slots of the node's Site, in order."""
    return nodes_in(bound_arguments(node))


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


def _unknown(
    node: fx.Node, carrying: set[fx.Node], prefix: str, letters: Mapping[str, str]
) -> Unknown:
    return Unknown(
        name=node.name,
        target=node.target,
        live=live_names(node, carrying),
        modules=module_calls(node, prefix),
        source=source_line(node),
        inputs=_live_inputs(node, carrying),
        shape=_shape(node.meta.get("val"), letters),
    )


def _first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return next(_first_tensor(v) for v in value if is_floating(v))


def _shape(value: Any, letters: Mapping[str, str]) -> tuple[int | str, ...]:
    if not is_floating(value):
        return ()
    sizes = _first_tensor(value).shape
    return tuple(size if isinstance(size, int) else _symbol(size, letters) for size in sizes)


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


def _symbol(size: torch.SymInt, letters: Mapping[str, str]) -> str:
    """The batch as "N", and what is folded into it as "4*N"."""
    return re.sub(r"s\d+", lambda found: letters.get(found.group(), found.group()), str(size))


def verify(graph: fx.Graph) -> None:
    """Check what every pass must keep: a sound graph whose call nodes all know their value.

    Raises:
        RuntimeError: From ``graph.lint``, or for a node without a value.
    """
    graph.lint()
    for node in graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise RuntimeError(f"node {node.name} ({node.target}) has lost its value")
