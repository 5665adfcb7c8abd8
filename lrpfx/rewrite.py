"""plan -> GraphModule: beside each live node its twin, through the one autograd.Function.

The clean activations flow through the original nodes. A twin's forward returns a phantom, a tensor
of the activation's shape without memory of its own that is never read; its backward applies the
node's rule to the relevance that arrives, using the clean activations saved as inputs. So
relevance is the ordinary gradient of the phantom stream, and its own derivatives are exact: they
run through the clean stream, which carries the true gradient.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.assign import Assignment
from lrpfx.attention import Fused, find_fused, output_of, record_attention
from lrpfx.carriers import find_carriers
from lrpfx.freeze import freeze
from lrpfx.graph import (
    explained_leaves,
    is_floating,
    nodes_in,
    op_name,
    output_leaves,
    record,
    slot_nodes,
)
from lrpfx.ledger import Ledger
from lrpfx.ops import Call, Op, Site
from lrpfx.rules import Gradient, Rule
from lrpfx.rules.base import Carry
from lrpfx.rules.bilinear import Attended


class _Relevance(torch.autograd.Function):
    """Forward: phantoms shaped like the clean output. Backward: the rule.

    Everything that backward reads is an input of the Function. Saving its own output, or a value
    computed inside forward, would cut off the relevance's own derivatives without a word.
    """

    @staticmethod
    def forward(ctx: Any, twin: Twin, ledger: Ledger | None, clean: Any, *rest: Any) -> Any:
        phantoms, values = rest[: twin.arity], rest[twin.arity :]
        ctx.twin, ctx.ledger = twin, ledger
        ctx.forms = [(p.shape, p.dtype, p.device) for p in phantoms]
        ctx.is_tensor = [isinstance(v, Tensor) for v in values]
        ctx.statics = [None if isinstance(v, Tensor) else v for v in values]
        tensors = [v for v in values if isinstance(v, Tensor)]
        ctx.save_for_backward(clean if twin.reads_output else None, *tensors)
        if isinstance(clean, Tensor):
            return clean.clone() if twin.rule is None else phantom(clean)
        return tuple(phantom(t) if is_floating(t) else None for t in clean)

    @staticmethod
    def backward(ctx: Any, *relevance: Any) -> Any:
        z, *tensors = ctx.saved_tensors
        saved = iter(tensors)
        values = tuple(
            next(saved) if is_tensor else static
            for is_tensor, static in zip(ctx.is_tensor, ctx.statics, strict=True)
        )
        R = tuple(r for r in relevance if r is not None)
        passed = ctx.twin.propagate(R, z, values, ctx.forms, ctx.ledger)
        return None, None, None, *passed, *(None for _ in values)


def phantom(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype and device that take no memory."""
    return like.new_zeros(()).expand(like.shape)


def begin(clean: Tensor) -> Tensor:
    """A phantom that is a leaf: what becomes its gradient is the relevance of ``clean``."""
    return phantom(clean.detach()).requires_grad_()


@dataclass(frozen=True, eq=False)  # fx hashes it, and fields of rules need not be hashable
class Twin:
    """The target of a twin node: a frozen callable that carries one node's rule.

    Called as ``twin(clean, *phantoms, *values, ledger=...)`` with the node's clean output, the
    phantoms of its live inputs, and the values of its Site's slots (None for what is not read).

    Args:
        name: Of the node it stands beside.
        rule: Its rule; None for the twin that joins the two streams at the output.
        site: How to run the op again.
        arity: Number of phantoms.
        reads_input: Whether the rule reads the live inputs' values.
        reads_output: Whether the rule reads the clean output.
        carry: What it receives and hands on where relevance is computed fast, else None.
        memory: Where it may keep parts of weights that stay as they are, else None.
    """

    name: str
    rule: Rule | None
    site: Site | None
    arity: int
    reads_input: bool
    reads_output: bool
    carry: Carry | None = None
    memory: dict[Any, Tensor] | None = None

    def __post_init__(self) -> None:
        """Name the callable for fx, which writes it into the generated code."""
        object.__setattr__(self, "__name__", f"relevance_of_{self.name}")

    def __call__(self, clean: Any, *rest: Any, ledger: Ledger | None = None) -> Any:
        """Phantoms of the node's outputs (the output itself for the joining twin)."""
        # The clean stream may run without autograd; the phantom stream never does. The output's
        # twin keeps the caller's grad mode, so that a model under no_grad gives plain tensors.
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.rule is not None):
            return _Relevance.apply(self, ledger, clean, *rest)  # type: ignore[no-untyped-call]

    def propagate(
        self,
        R: tuple[Tensor, ...],
        z: Tensor,
        values: tuple[Any, ...],
        forms: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
        ledger: Ledger | None,
    ) -> tuple[Tensor, ...]:
        """Relevance of the live inputs from the relevance of the output."""
        if self.rule is None or self.site is None:
            return R
        call = Call(self.site, values, self.memory)
        if self.reads_input:
            x = tuple(values[i] for i in self.site.live)
        else:
            x = tuple(
                torch.zeros((), dtype=dtype, device=device).expand(shape)
                for shape, dtype, device in forms
            )
        received = R[0] if len(R) == 1 and not self.site.several_outputs else R
        if self.carry is not None:
            return self._fast(self.carry, call, x, z, received)
        flow = self.rule.propagate(call, x, z, received)
        if ledger is not None:
            ledger.book(self.name, R, flow)
        return flow.relevance

    def _fast(
        self, carry: Carry, call: Call, x: tuple[Tensor, ...], z: Tensor, m: Any
    ) -> tuple[Tensor, ...]:
        """Multipliers or relevance of the live inputs, as each edge carries it."""
        assert self.rule is not None
        if not self.rule.carries(call.site, carry.takes):
            R = z * m if carry.takes else m
            return self.rule.propagate(call, x, z, R).relevance
        found = self.rule.multiply(call, x, z, m, carry)
        return tuple(
            c if gives else a * c for a, c, gives in zip(x, found, carry.gives, strict=True)
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a rewritten graph cannot be pickled: the rules would be lost on loading. "
            "Save the model, and make the Explainer again from it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        return self


@dataclass(frozen=True)
class Tap:
    """A place whose activation and relevance are returned beside the output.

    Args:
        activation: Node whose clean value is returned.
        relevance: Node whose phantom is returned.
    """

    activation: fx.Node
    relevance: fx.Node


def rewrite(
    module: fx.GraphModule, plan: Mapping[str, Assignment], live: set[fx.Node]
) -> fx.GraphModule:
    """The canonized graph with its twins: forward is the model's, backward is relevance.

    Args:
        module: A canonized, annotated graph.
        plan: Assignments by node name.
        live: Nodes that carry relevance.

    Returns:
        A GraphModule that takes what the model takes, returns what it returns (a dict for a
        dataclass), and whose ordinary backward puts relevance into the inputs' ``.grad``.
    """
    graph = fx.Graph()
    graph.set_codegen(copy.copy(module.graph._codegen))
    own = {n: n for n in live if n.op == "placeholder"}
    clean, phantoms = _two_streams(module.graph, graph, plan, live, None, own)

    def joined(node: fx.Node, explained: fx.Node) -> fx.Node:
        if explained not in phantoms:
            return clean[node]
        name = f"output_{node.name}"
        twin = Twin(name, None, None, arity=1, reads_input=False, reads_output=False)
        return _beside(graph, twin, clean[node], [phantoms[explained]], [], {})

    pairs = zip(output_leaves(module.graph), explained_leaves(module.graph), strict=True)
    graph.output(tuple(joined(n, e) if isinstance(n, fx.Node) else n for n, e in pairs))
    return _finish(module, graph)


def instrument(
    module: fx.GraphModule,
    plan: Mapping[str, Assignment],
    live: set[fx.Node],
    starts: Sequence[fx.Node],
    taps: Sequence[Tap] = (),
    *,
    fast: bool = False,
    frozen: bool = False,
) -> fx.GraphModule:
    """The graph as ``explain`` runs it, with the two streams apart.

    Args:
        module: A canonized, annotated graph.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        starts: Nodes whose relevance is wanted.
        taps: Further places whose relevance and activation are wanted.
        fast: Let edges carry multipliers where they can. Then no ledger is kept, and the relevance
            has no derivatives; its values are the same up to round-off.
        frozen: With ``fast``: the parameters stay as they are, and what depends on them only is
            computed once.

    Returns:
        A GraphModule that takes the flat inputs and a ledger (or None), and returns five lists:
        clean output leaves, the clean leaves that are explained (logits for probabilities), their
        phantoms (None where no relevance can start), the phantoms of the starts (None where no
        output depends on it), and (activation, phantom) per tap.
    """
    graph = fx.Graph()
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    copied = {n: graph.node_copy(n) for n in inputs}
    names, name = {n.name for n in inputs}, "ledger"
    while name in names:  # an argument of the model's own may be called that
        name += "_"
    ledger = graph.placeholder(name)
    shortcuts = _shortcuts(module.graph, plan, live, starts, taps, frozen) if fast else _PLAIN
    clean, phantoms = _two_streams(
        module.graph, graph, plan, live, ledger, {}, copied, taps, shortcuts
    )
    leaves, explained = output_leaves(module.graph), explained_leaves(module.graph)
    graph.output(
        (
            [clean[n] if isinstance(n, fx.Node) else n for n in leaves],
            [clean[n] if isinstance(n, fx.Node) else n for n in explained],
            [phantoms.get(n) if isinstance(n, fx.Node) else None for n in explained],
            [phantoms.get(n) for n in starts],
            [(clean[tap.activation], phantoms[tap.relevance]) for tap in taps],
        )
    )
    finished = _finish(module, graph)
    return freeze(finished) if shortcuts.frozen else finished


@dataclass(frozen=True)
class _Shortcuts:
    """What is done otherwise where relevance is computed fast: by node of the canonized graph."""

    carriers: Mapping[fx.Node, Carry]
    fused: Mapping[fx.Node, Fused]
    frozen: bool = False


_PLAIN = _Shortcuts({}, {})


def _shortcuts(
    graph: fx.Graph,
    plan: Mapping[str, Assignment],
    live: Container[fx.Node],
    starts: Sequence[fx.Node],
    taps: Sequence[Tap],
    frozen: bool,
) -> _Shortcuts:
    tapped = {node for tap in taps for node in (tap.relevance, tap.activation)}
    carriers = find_carriers(graph, plan, live, starts, tapped)
    return _Shortcuts(carriers, find_fused(graph, plan, live, carriers), frozen)


def _two_streams(
    source: fx.Graph,
    graph: fx.Graph,
    plan: Mapping[str, Assignment],
    live: set[fx.Node],
    ledger: fx.Node | None,
    own: Container[fx.Node],
    copied: Mapping[fx.Node, fx.Node] | None = None,
    taps: Sequence[Tap] = (),
    shortcuts: _Shortcuts = _PLAIN,
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """Copy the clean nodes into ``graph`` and put every live node's twin beside it.

    The phantom stream begins at new leaves, except that the inputs in ``own`` are their own
    phantoms, so that relevance becomes their gradient.
    """
    clean = dict(copied or {})
    ends = [*nodes_in(output_leaves(source)), *(tap.activation for tap in taps)]
    used = _used(ends, shortcuts)
    phantoms: dict[fx.Node, fx.Node] = {}
    keywords = {} if ledger is None else {"ledger": ledger}
    for node in source.nodes:
        if node.op == "output":
            break
        if node not in used and node.op != "placeholder":
            continue  # left to itself, fx keeps dead nodes that draw random numbers
        if node in shortcuts.fused:
            _attend(graph, node, shortcuts, clean, phantoms)
            continue
        if node not in clean:
            clean[node] = graph.node_copy(node, clean.__getitem__)
        if node not in live:
            continue
        if node in own:
            phantoms[node] = clean[node]
        elif record(node) is None and node.target is not operator.getitem:  # a start
            phantoms[node] = graph.call_function(begin, (clean[node],))
        elif record(node) is None:
            parent, index = node.args
            assert isinstance(parent, fx.Node)
            args = (phantoms[parent], index)
            phantoms[node] = graph.call_function(operator.getitem, args)
        else:
            carry = shortcuts.carriers.get(node)
            assignment = plan[node.name]
            if carry is not None and _is_seen_through(assignment, carry):
                args, kwargs = (
                    fx.node.map_arg(a, lambda n: phantoms.get(n, clean.get(n)))
                    for a in (node.args, node.kwargs)
                )
                phantoms[node] = graph.call_function(_View(node.target), args, kwargs)
            else:
                memory: dict[Any, Tensor] | None = {} if shortcuts.frozen else None
                phantoms[node] = _twin_of(
                    graph, node, assignment, clean, phantoms, keywords, carry, memory
                )
    return clean, phantoms


def _used(ends: Sequence[fx.Node], shortcuts: _Shortcuts) -> set[fx.Node]:
    """The nodes that ``ends`` depend on, with fused kernels in the place of their parts."""
    reached: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            whole = shortcuts.fused.get(node)
            stack.extend((node if whole is None else whole.call).all_input_nodes)
    return reached


_VIEWS = {torch.ops.aten.reshape.default, torch.ops.aten.flatten.using_ints}
_VIEWS |= {torch.ops.aten.unflatten.int, torch.ops.aten.chunk.default}


def _is_seen_through(assignment: Assignment, carry: Carry) -> bool:
    """Whether the phantom's own view hands on what the rule would: no Function is needed."""
    site = assignment.record.site
    view = site.target in _VIEWS or getattr(site.target, "is_view", False)
    moved = isinstance(assignment.rule, Gradient) and site.op.family == "move"
    return bool(moved and view and len(site.live) == 1 and carry.gives == (carry.takes,))


class _View:
    """A view of a phantom, which keeps its graph whatever the grad mode."""

    def __init__(self, target: Any) -> None:
        self.target, self.__name__ = target, f"phantom_{op_name(target)}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return self.target(*args, **kwargs)


def _attend(
    graph: fx.Graph,
    node: fx.Node,
    shortcuts: _Shortcuts,
    clean: dict[fx.Node, fx.Node],
    phantoms: dict[fx.Node, fx.Node],
) -> None:
    """Put a fused attention in the place of its parts, whose last is ``node``."""
    fused, carry = shortcuts.fused[node], shortcuts.carriers[node]
    qkv = list(fused.call.args[:3])
    positions = tuple(i for i, n in enumerate(qkv) if n in fused.live)
    args = fx.node.map_arg((fused.call.args, dict(fused.call.kwargs)), clean.__getitem__)
    run = graph.call_function(record_attention, (positions, *args[0]), args[1])
    clean[node] = graph.call_function(output_of, (run,))
    gives = tuple(_takes(n, shortcuts) for n in fused.live)
    rule = Attended(fused.shares)
    op = Op("attention", "matmul", ())
    site = Site(op, fused.call.target, {}, tuple(range(len(gives))), (), False, False)
    reads_input, reads_output = not all(gives), rule.needs(site, carry.takes)[1]
    twin = Twin(
        node.name,
        rule,
        site,
        len(gives),
        reads_input,
        reads_output,
        Carry(carry.takes, gives, above=False),
    )
    values = [clean[n] if reads_input else None for n in fused.live]
    begun = [phantoms[n] for n in fused.live]
    phantoms[node] = _beside(graph, twin, clean[node], begun, [*values, run], {})


def _takes(node: fx.Node, shortcuts: _Shortcuts) -> bool:
    """Whether the edge at a node's output carries multipliers; starts and what is tapped do not."""
    while record(node) is None and node not in shortcuts.carriers and node.op != "placeholder":
        node = node.all_input_nodes[0]  # getitem: as the node that it picks from
    return node in shortcuts.carriers and shortcuts.carriers[node].takes


def _twin_of(
    graph: fx.Graph,
    node: fx.Node,
    assignment: Assignment,
    clean: Mapping[fx.Node, fx.Node],
    phantoms: Mapping[fx.Node, fx.Node],
    keywords: dict[str, fx.Node],
    carry: Carry | None,
    memory: dict[Any, Tensor] | None,
) -> fx.Node:
    rule, site = assignment.rule, assignment.record.site
    slots = slot_nodes(node)
    # A linear op has the same Jacobian everywhere: its gradient needs no activation kept.
    reads_input = rule.reads_input and not (isinstance(rule, Gradient) and site.op.linear)
    reads_output = rule.reads_output
    if carry is not None and rule.carries(site, carry.takes):
        reads_input, reads_output = rule.needs(site, carry.takes)
        reads_input = reads_input or not all(carry.gives)
    elif carry is not None:
        reads_output = reads_output or carry.takes
    twin = Twin(node.name, rule, site, len(site.live), reads_input, reads_output, carry, memory)
    live = set(site.live)
    values = [clean[n] if i not in live or reads_input else None for i, n in enumerate(slots)]
    return _beside(
        graph, twin, clean[node], [phantoms[slots[i]] for i in site.live], values, keywords
    )


def _beside(
    graph: fx.Graph,
    twin: Twin,
    clean: fx.Node,
    phantoms: Sequence[fx.Node],
    values: Sequence[fx.Node | None],
    keywords: dict[str, fx.Node],
) -> fx.Node:
    return graph.create_node(
        "call_function", twin, (clean, *phantoms, *values), dict(keywords), name=f"{twin.name}_lrp"
    )


def _finish(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    rewritten = _unpicklable(fx.GraphModule(module, graph))
    rewritten.train(module.training)
    return rewritten


def _unpicklable(module: fx.GraphModule) -> fx.GraphModule:
    """The module with pickling refused, for its copies too.

    fx gives every GraphModule a class of its own, and pickles its code without what that calls.
    """

    def refuse(self: fx.GraphModule, *protocol: Any) -> Any:
        raise TypeError(
            "a rewritten graph cannot be pickled: the rules would be lost on loading. "
            "Save the model, and make the Explainer again from it."
        )

    def copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
        return _unpicklable(fx.GraphModule.__deepcopy__(self, memo))

    type(module).__reduce_ex__ = refuse  # type: ignore[method-assign,assignment]
    type(module).__deepcopy__ = copied  # type: ignore[method-assign]
    return module
