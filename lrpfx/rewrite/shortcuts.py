"""The two streams where relevance is wanted fast: no ledger, and no derivatives of its own.

What the edges carry is in ``carriers``. On top of that:

- Where multipliers follow the plain gradient, ``c_x = share * J'c``, the op itself is run with
  autograd on, and its own backward is the rule. It keeps what the gradient keeps.
- An affine node whose output goes through one ReLU has its twin behind the ReLU: where that is
  zero nothing arrives, elsewhere it is the output. So only one of the two is kept.
- Of a residual sum y = relu(z + b) only y and b are kept: where y is not zero, z is y - b.
- Weights that are computed from parameters (folded batch norms) are computed again in the
  backward pass, unless the parameters are frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lrpfx.ops import AffineMap, Slot, argument_names, reachable, slot_nodes
from lrpfx.plan import Assignment, find_carriers
from lrpfx.rewrite.fast_twins import Derived, Exchange, FastTwin, Recipe, add_to, begin, scaled
from lrpfx.rewrite.fused import Fused, attend, find_fused, is_of_sizes, mask_for_kernel
from lrpfx.rewrite.masks import Edits
from lrpfx.rewrite.streams import Streams
from lrpfx.rewrite.twins import Step
from lrpfx.rules import Gradient

aten = torch.ops.aten
#: Elements from which on a weight is computed again in the place of being kept.
_LARGE = 4096


class FastStreams(Streams):
    """``Streams`` with what the module's docstring lists.

    Args:
        source: The canonized, annotated graph.
        graph: What to build, with nothing but placeholders in it.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        clean: The placeholders' copies.
        starts: Nodes whose relevance is wanted; so is that of ``tapped`` ones.
        tapped: See ``starts``.
        frozen: Whether the parameters stay as they are.
        fused: Whether attention may be run by a fused kernel.
        edits: What conditions change.
    """

    fast = True

    def __init__(
        self,
        source: fx.Graph,
        graph: fx.Graph,
        plan: Mapping[str, Assignment],
        live: Container[fx.Node],
        clean: Mapping[fx.Node, fx.Node],
        starts: Container[fx.Node],
        tapped: Container[fx.Node],
        frozen: bool,
        fused: bool,
        edits: Edits,
    ) -> None:
        super().__init__(graph, plan, live, clean, edits=edits)
        self.carriers = find_carriers(source, plan, live, starts, tapped)
        self.fused = find_fused(source, plan, live, self.carriers) if fused else {}
        self.frozen, self.starts, self.tapped = frozen, starts, tapped
        #: ReLUs, and of each the node whose twin stands behind it.
        self.before = {relu: n for n in self.carriers if (relu := self._one_relu(n)) is not None}
        #: ReLUs of a residual sum, and of each the summand that is recovered from the two others.
        self.recovered = {relu: n for relu in self.before if (n := self._summand(relu)) is not None}
        self.postponed = {*self.before.values(), *self.recovered.values()}
        #: Residual sums, and of each the summand whose memory it may take.
        self.written_over = {
            self.before[relu]: n
            for relu, n in self.recovered.items()
            if plan[n.name].record.site.op.weighted and not self._reads(self.before[relu])[0]
        }
        self.derived = set() if frozen else _derived(source)
        #: Nodes that run with autograd on, and are their own rule.
        self.recorded: set[fx.Node] = set()
        #: By mask and dtype, the mask as fused attention takes it.
        self.masks: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def run(self, source: fx.Graph, ends: Sequence[fx.Node]) -> None:
        """Add every node that ``ends`` depend on, and where autograd goes on and off."""
        super().run(source, ends)
        ops = [n for n in self.graph.nodes if n.op == "call_function" and n.target not in _EITHER]
        if not ops:
            return
        with self.graph.inserting_before(ops[0]):
            before = self.graph.call_function(torch.is_grad_enabled)
        on: bool | None = None
        for node in ops:
            wanted = node in self.recorded or isinstance(node.target, Step)
            if wanted != on:
                with self.graph.inserting_before(node):
                    self.graph.call_function(_switch, (wanted,))
                on = wanted
        self.graph.call_function(_switch, (before,))

    def inputs_of(self, node: fx.Node) -> Sequence[fx.Node]:
        """Of an attention that is fused, those of the kernel."""
        whole = self.fused.get(node)
        return (node if whole is None else whole.call).all_input_nodes

    def add(self, node: fx.Node) -> None:
        """Add one node; the ops that are their own rule are in both streams."""
        if node in self.fused:
            self._attend(node, self.fused[node])
            own = self.phantoms[node]
            self.phantoms[node] = self.conditions.mask(node, self.clean[node], own)
        elif node in self.postponed:  # its twin comes with the ReLU
            self.clean[node] = self.copy(node)
        elif node in self.carriers and node not in self.before and self._is_native(node):
            self._run(node)
            own = self.phantoms[node]
            self.phantoms[node] = self.conditions.mask(node, self.clean[node], own)
        else:
            super().add(node)
            if node in self.live and node.target is operator.getitem:
                self.clean[node] = self.phantoms[node]
            elif node.op == "get_attr" or node.target is operator.getitem:
                self.clean[node] = self.result(node)  # no gradient of it is wanted

    def copy(self, node: fx.Node) -> fx.Node:
        """The node; sums and ReLUs are written over what nothing else reads."""
        if (summand := self.written_over.get(node)) is not None:
            args = self.clean[summand], self.clean[_other(node, summand)]
            return self.graph.call_function(add_to, args)
        copied, before = super().copy(node), self.before.get(node)
        if before is None or len(before.users) > 1 or before in self.tapped:
            return copied
        fresh = before.target is aten.add.Tensor or self.plan[before.name].record.site.op.weighted
        if fresh and node.target is aten.relu.default:
            copied.target = aten.relu_.default
        return copied

    def begin(self, node: fx.Node) -> fx.Node:
        """A leaf with a value, for ops that are run on it."""
        return self.graph.call_function(begin, (self.clean[node],))

    def result(self, node: fx.Node) -> fx.Node:
        """Without the graph of what was run with autograd on."""
        return self.graph.call_function(aten.detach.default, (self.clean[node],))

    # -- ops that are their own rule

    def _is_native(self, node: fx.Node) -> bool:
        carry, assignment = self.carriers[node], self.plan[node.name]
        if assignment.rule.gradient_shares(assignment.record.site) is None:
            return False
        if not carry.takes:  # the rule Gradient moves relevance as it moves multipliers
            return isinstance(assignment.rule, Gradient) and not any(carry.gives)
        slots = slot_nodes(node)
        ends = [slots[i] in self.starts for i in assignment.record.site.live]
        return all(gives or end for gives, end in zip(carry.gives, ends, strict=True))

    def _run(self, node: fx.Node) -> None:
        assignment = self.plan[node.name]
        site = assignment.record.site
        found = assignment.rule.gradient_shares(site)
        assert found is not None
        shares = dict(zip(site.live, found, strict=True))
        exact = self.carriers[node].takes
        self.clean[node], self.phantoms[node] = self._native(node, node, shares, exact)

    def _attend(self, node: fx.Node, fused: Fused) -> None:
        """Put a fused attention in the place of its parts, whose last is ``node``."""
        self.clean[node], phantom = self._native(
            node, fused.call, fused.shares, exact=True, masks=self._masks(fused)
        )
        if not self.carriers[node].takes:
            phantom = self._exchange(node, phantom, into="multiplier")
        self.phantoms[node] = phantom

    def _masks(self, fused: Fused) -> dict[fx.Node, fx.Node]:
        """What the kernel gets for its mask, if it has one; made once for all that share it."""
        if fused.mask is None:
            return {}
        key = fused.mask, fused.call.meta["val"].dtype
        if key not in self.masks:
            args = (self.clean[fused.mask], key[1], is_of_sizes(fused.mask))
            self.masks[key] = self.graph.call_function(mask_for_kernel, args)
        return {fused.mask: self.masks[key]}

    def _native(
        self,
        node: fx.Node,
        call: fx.Node,
        shares: Mapping[int, float],
        exact: bool = False,
        masks: Mapping[fx.Node, fx.Node] | None = None,
    ) -> tuple[fx.Node, fx.Node]:
        """Run a call with autograd on: its value, and what stands for it in the phantom stream.

        Args:
            node: The node that it stands for.
            call: The call.
            shares: By live slot, the share of the gradient that the rule hands on.
            exact: Whether multipliers are handed on, also to edges that carry relevance.
            masks: Of a fused attention, what it gets for its mask.
        """
        common = min(shares.values())
        slots = iter(range(len(slot_nodes(call))))

        def given(n: fx.Node) -> fx.Node:
            slot = next(slots)
            if slot not in shares:
                value = (masks or self.clean).get(n, self.clean[n])
                if n not in self.live:
                    return value
                return self.graph.call_function(aten.detach.default, (value,))
            into = "relevance" if exact and not self.takes(n) else ""
            return self._exchange(n, self.entering(n, node), shares[slot] / common, into)

        # As the slots are counted: in the order of the schema.
        names = argument_names(call.target)
        keywords = {name: call.kwargs[name] for name in names if name in call.kwargs}
        args: Any = fx.node.map_arg(call.args, given)
        kwargs = fx.node.map_arg(keywords, given)
        target: Any = attend if masks else call.target
        value = self.graph.call_function(target, args, kwargs)
        self.recorded.add(value)
        return value, self._exchange(node, value, common)

    def _exchange(
        self, node: fx.Node, phantom: fx.Node, share: float = 1.0, into: str = ""
    ) -> fx.Node:
        if share != 1:
            phantom = self.graph.call_function(scaled, (phantom, share))
            self.recorded.add(phantom)
        if not into:
            return phantom
        step = Exchange(f"{node.name}_edge", 1, reads_output=True, into=into)
        return self.beside(step, self.clean[node], [phantom])

    def takes(self, node: fx.Node) -> bool:
        """Whether the edge at a node's output carries multipliers."""
        while node.target is operator.getitem and node not in self.starts:
            node = node.all_input_nodes[0]  # as the node that it picks from
        return node in self.carriers and self.carriers[node].takes

    # -- the others

    def twin(self, node: fx.Node) -> fx.Node:
        """The twin of a node, or that of the node before its ReLU."""
        if node in self.recovered:
            summand = self.recovered[node]
            self.phantoms[summand] = self._twin(summand, node)
        return self._twin(self.before.get(node, node), node)

    def _twin(self, before: fx.Node, node: fx.Node) -> fx.Node:
        """The twin of ``before``, with the output of ``node``."""
        assignment, carry = self.plan[before.name], self.carriers[before]
        rule, site = assignment.rule, assignment.record.site
        reads_input, reads_output = self._reads(before)
        if rule.carries(site, carry.takes):
            reads_input = reads_input or not all(carry.gives)
        phantoms, values = self.read(before, reads_input)
        derived: list[Derived] = []
        for slot, n in enumerate(slot_nodes(before)):
            if n in self.derived and values[slot] is not None:
                make, leaves = _recipe(n)
                places = tuple(range(len(values), len(values) + len(leaves)))
                values += [self.clean[leaf] for leaf in leaves]
                values[slot] = None
                derived.append((slot, make, places))
        addend: int | None = None
        if before is self.recovered.get(node):
            addend = len(values)
            values.append(self.clean[_other(self.before[node], before)])
        constants = [n for i, n in enumerate(slot_nodes(before)) if i not in site.live]
        memory: list[AffineMap] | None = None
        if self.frozen and all(n.op != "placeholder" for n in reachable(constants)):
            memory = []
        step = FastTwin(
            name=before.name,
            arity=len(phantoms),
            reads_output=reads_output,
            rule=rule,
            site=site,
            reads_input=reads_input,
            place=str(assignment.record),
            carry=replace(carry, cut=before is not node and addend is None),
            memory=memory,
            derived=derived,
            addend=addend,
        )
        return self.beside(step, self.clean[node], phantoms, values)

    def _reads(self, node: fx.Node) -> tuple[bool, bool]:
        """Whether a node's rule reads its inputs and its output, beside weighing multipliers."""
        assignment, takes = self.plan[node.name], self.carriers[node].takes
        rule, site = assignment.rule, assignment.record.site
        if rule.carries(site, takes):
            return rule.needs(site, takes)
        return rule.reads(site), rule.reads_output or takes

    def _one_relu(self, node: fx.Node) -> fx.Node | None:
        """The ReLU that all relevance of an affine node comes through, if only that of y > 0 does.

        The rule then multiplies by the output, which is that of the ReLU where anything arrives.
        """
        users = [user for user in node.users if user in self.live]
        rule, carry = self.plan[node.name].rule, self.carriers[node]
        alone = len(users) == 1 and carry.above
        return users[0] if alone and rule.multiplies_by_output else None

    def _summand(self, relu: fx.Node) -> fx.Node | None:
        """Of a residual sum the summand z that nothing else reads, and whose rule multiplies by z.

        z = y - b is as exact as y, which is about as exact as the z of a convolution is. Not in
        halves, where too little would be left of it.
        """
        total = self.before[relu]
        if total.target is not aten.add.Tensor or total.kwargs or len(set(total.args)) < 2:
            return None
        form = total.meta["val"]
        for n in total.args:
            if not isinstance(n, fx.Node) or n not in self.carriers or len(n.users) > 1:
                continue
            rule, site = self.plan[n.name].rule, self.plan[n.name].record.site
            other = _other(total, n).meta["val"]
            if (
                self.carriers[n].takes
                and rule.multiplies_by_output
                and rule.needs(site, True)[1]
                and form.dtype in (torch.float32, torch.float64)
                and n.meta["val"].shape == form.shape == other.shape
            ):
                return n
        return None


def _other(total: fx.Node, summand: fx.Node) -> fx.Node:
    """The other of two summands."""
    (other,) = (n for n in total.all_input_nodes if n is not summand)
    return other


#: As ``torch.set_grad_enabled``, in a tenth of the time.
_switch = torch._C._set_grad_enabled
#: What is the same with and without autograd.
_EITHER = {operator.getitem, begin}

#: What folding computes weights by; as cheap as reading them.
_CHEAP = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default}
_CHEAP |= {aten.rsqrt.default, aten.reshape.default}


def _derived(graph: fx.Graph) -> set[fx.Node]:
    """Large constants that are computed from parameters at little cost."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.target in _CHEAP and all(n.op == "get_attr" or n in found for n in inputs):
            found.add(node)
    return {n for n in found if n.meta["val"].numel() >= _LARGE}


def _recipe(node: fx.Node) -> tuple[Recipe, list[fx.Node]]:
    """How a constant is computed, and the parameters it is computed from."""
    needed = sorted(reachable([node]))
    leaves = [n for n in needed if n.op == "get_attr"]
    ops = [n for n in needed if n.op != "get_attr"]
    slots = {n: Slot(i) for i, n in enumerate([*leaves, *ops])}

    def slot(n: fx.Node) -> Any:
        return slots[n]

    steps: list[tuple[Any, Any, Any]] = [
        (n.target, fx.node.map_arg(n.args, slot), fx.node.map_arg(n.kwargs, slot)) for n in ops
    ]
    return Recipe(steps), leaves
