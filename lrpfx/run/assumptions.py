"""Inputs -> what of the rules' assumptions they do not fulfil, as notes and one warning each."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lrpfx.errors import RuleError, warn
from lrpfx.ops import Call, reachable, slot_nodes
from lrpfx.plan import Assignment
from lrpfx.rules import Rule

#: The rules that have been warned of: once is enough, also over many explanations.
_WARNED: weakref.WeakSet[Rule] = weakref.WeakSet()


class Assumptions:
    """What rules take for granted of the inputs of their nodes, see ``Rule.unmet``.

    Args:
        module: A canonized graph.
        plan: Assignments by node name.
    """

    def __init__(self, module: fx.GraphModule, plan: Mapping[str, Assignment]) -> None:
        self._asked = [a for a in plan.values() if type(a.rule).unmet is not Rule.unmet]
        names = {a.record.name for a in self._asked}
        nodes = [slot_nodes(node) for node in module.graph.nodes if node.name in names]
        used = reachable(n for slots in nodes for n in slots)
        graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in module.graph.nodes:
            if node in used or node.op == "placeholder":
                copied[node] = graph.node_copy(node, copied.__getitem__)
        graph.output([[copied[n] for n in slots] for slots in nodes])
        #: Computes what is asked about, from the flat inputs; None if nothing is.
        self.module = fx.GraphModule(module, graph) if self._asked else None

    def check(self, leaves: Sequence[Any]) -> tuple[str, ...]:
        """A note for each rule whose assumption fails.

        Args:
            leaves: Flat inputs.

        Raises:
            RuleError: Such a rule is strict.
        """
        if self.module is None:
            return ()
        with torch.no_grad():
            found = self.module(*leaves)
        notes = []
        for assignment, values in zip(self._asked, found, strict=True):
            rule, site = assignment.rule, assignment.record.site
            place = str(assignment.record)
            try:
                unmet = rule.unmet(Call(site, tuple(values)), [values[i] for i in site.live])
            except RuleError as error:  # the rule does not know where it is
                raise RuleError(error.what, where=[place], fix=error.fix) from error
            if unmet:
                notes.append(f"{unmet} ({place})")
                if rule not in _WARNED:
                    _WARNED.add(rule)
                    warn(notes[-1])
        return tuple(notes)
