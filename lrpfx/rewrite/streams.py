"""The two streams of a rewritten graph: the clean nodes, and beside every live one its twin."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence

import torch
from torch import fx

from lrpfx.ops import reachable, record, slot_nodes
from lrpfx.plan import Assignment
from lrpfx.rewrite.masks import UNCHANGED, Conditions, Edits
from lrpfx.rewrite.twins import Step, Twin, begin

#: The key in ``node.meta``, of a phantom: the name of the node that it stands for, and whether
#: the multiplier arrives at it in the place of relevance.
ARRIVES = "arrives"


class Streams:
    """Copies the clean nodes into a graph and puts every live node's twin beside it.

    Args:
        graph: What to build, with nothing but placeholders in it.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        clean: The placeholders' copies.
        own: Placeholders that are their own phantoms, so that relevance becomes their gradient;
            elsewhere the phantom stream begins at new leaves.
        ledger: The node that books are passed by, if any.
        edits: What conditions change.
    """

    #: Whether phantoms are the activations themselves.
    fast = False

    def __init__(
        self,
        graph: fx.Graph,
        plan: Mapping[str, Assignment],
        live: Container[fx.Node],
        clean: Mapping[fx.Node, fx.Node],
        own: Container[fx.Node] = (),
        ledger: fx.Node | None = None,
        edits: Edits = UNCHANGED,
    ) -> None:
        self.graph, self.plan, self.live, self.own = graph, plan, live, own
        self.edits = edits
        #: The phantoms that relevance starts from, where they are behind a gate.
        self.seeded: dict[fx.Node, fx.Node] = {}
        self.clean, self.phantoms = dict(clean), dict[fx.Node, fx.Node]()
        self._keywords = {} if ledger is None else {"ledger": ledger}
        self.conditions = Conditions(graph, edits, fast=self.fast, keywords=self._keywords)

    def run(self, source: fx.Graph, ends: Sequence[fx.Node]) -> None:
        """Add every node that ``ends`` depend on."""
        used = reachable(ends, self.inputs_of)
        for node in source.nodes:
            # Left to itself, fx keeps dead nodes that draw random numbers.
            if node in used or node.op == "placeholder":
                self.add(node)
        gated = [n for reader, n in self.edits.gates if reader is None]
        self.seeded = {n: self.entering(n, None) for n in gated}
        for node, phantom in self.phantoms.items():
            phantom.meta[ARRIVES] = node.name, self.takes(node)

    def takes(self, node: fx.Node) -> bool:
        """Whether the edge at a node's output carries multipliers."""
        return False

    def inputs_of(self, node: fx.Node) -> Sequence[fx.Node]:
        """The nodes that a node is computed from."""
        return node.all_input_nodes

    def add(self, node: fx.Node) -> None:
        """Add one node of the clean stream, and what stands for it in the phantom stream."""
        if node not in self.clean:
            self.clean[node] = self.copy(node)
        if node not in self.live:
            return
        if node in self.own:
            # A tensor of its own, as dynamo takes none twice for the arguments of a Function.
            self.phantoms[node] = self.clean[node]
            own = self.graph.call_function(torch.ops.aten.alias.default, (self.clean[node],))
            self.clean[node] = own
        elif record(node) is not None:
            self.phantoms[node] = self.twin(node)
        elif node.target is operator.getitem:
            parent, index = node.args
            assert isinstance(parent, fx.Node)
            args = (self.phantoms[parent], index)
            self.phantoms[node] = self.graph.call_function(operator.getitem, args)
        else:
            self.phantoms[node] = self.begin(node)
        self.phantoms[node] = self.conditions.mask(node, self.clean[node], self.phantoms[node])

    def entering(self, node: fx.Node, reader: fx.Node | None) -> fx.Node:
        """The phantom of a node as ``reader`` has it, None for where relevance starts."""
        return self.conditions.gate(reader, node, self.clean[node], self.phantoms[node])

    def own_phantom(self, node: fx.Node) -> fx.Node | None:
        """The phantom of a node whose gradient is what its masks let through."""
        return self.conditions.passed.get(node, self.phantoms.get(node))

    def copy(self, node: fx.Node) -> fx.Node:
        """The node in the clean stream."""
        return self.graph.node_copy(node, self.clean.__getitem__)

    def begin(self, node: fx.Node) -> fx.Node:
        """Where relevance is wanted: a leaf."""
        return self.graph.call_function(begin, (self.clean[node],))

    def result(self, node: fx.Node) -> fx.Node:
        """The clean value of a node, to be returned."""
        return self.clean[node]

    def twin(self, node: fx.Node) -> fx.Node:
        """The twin of a node with a rule."""
        assignment = self.plan[node.name]
        rule, site = assignment.rule, assignment.record.site
        reads_input = rule.reads(site)
        place = str(assignment.record)
        step = Twin(node.name, len(site.live), rule.reads_output, rule, site, reads_input, place)
        return self.beside(step, self.clean[node], *self.read(node, reads_input))

    def read(self, node: fx.Node, reads_input: bool) -> tuple[list[fx.Node], list[fx.Node | None]]:
        """Phantoms of a node's live inputs, and values of its slots."""
        site, slots = self.plan[node.name].record.site, slot_nodes(node)
        live = set(site.live)
        values = [
            self.clean[n] if i not in live or reads_input else None for i, n in enumerate(slots)
        ]
        return [self.entering(slots[i], node) for i in site.live], values

    def beside(
        self,
        step: Step,
        clean: fx.Node,
        phantoms: Sequence[fx.Node],
        values: Sequence[fx.Node | None] = (),
    ) -> fx.Node:
        """A node of the phantom stream."""
        keywords = self._keywords if isinstance(step, Twin) else {}
        args = (clean, *phantoms, *values)
        name = f"{step.name}_lrp"
        return self.graph.create_node("call_function", step, args, dict(keywords), name=name)
