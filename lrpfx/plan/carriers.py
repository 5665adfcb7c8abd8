"""What each edge carries when relevance is computed fast: relevance R, or the multiplier c = R / a.

Where the rule above multiplies by an activation and the rule below divides by it, the two cancel;
such an edge can carry the multiplier, and neither the activation nor the division is needed. A
rule says whether it can, and its values are those of the plain form up to round-off.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import fx

from lrpfx.ops import explained_leaves, nodes_in, record, slot_nodes
from lrpfx.plan.assign import Assignment
from lrpfx.rules import Carry


def find_carriers(
    graph: fx.Graph,
    plan: Mapping[str, Assignment],
    live: Container[fx.Node],
    starts: Container[fx.Node],
    tapped: Container[fx.Node],
) -> dict[fx.Node, Carry]:
    """What every ruled node receives and hands on, decided from the outputs to the inputs.

    Args:
        graph: A canonized, annotated graph.
        plan: Assignments by node name.
        live: Nodes that carry relevance.
        starts: Nodes whose relevance is wanted; so is that of ``tapped`` ones.
        tapped: See ``starts``.
    """
    ends = set(nodes_in(explained_leaves(graph)))
    multiplier: dict[fx.Node, bool] = {}

    def carries(node: fx.Node) -> bool:
        """Whether all that use the node hand multipliers to it, and it can take them."""
        if node in ends or node in starts or node in tapped:
            return False
        users = [user for user in node.users if user in live]
        if record(node) is None:  # getitem: as the node that it picks from
            return all(gives(user) for user in users)
        rule, site = plan[node.name].rule, plan[node.name].record.site
        if site.several_outputs:
            return rule.carries(site, True) and all(multiplier[user] for user in users)
        return rule.accepts(site) and all(gives(user) for user in users)

    def gives(user: fx.Node) -> bool:
        if record(user) is None:
            return multiplier[user]
        assignment = plan[user.name]
        return assignment.rule.carries(assignment.record.site, multiplier[user])

    for node in reversed(graph.nodes):
        if node in live:
            multiplier[node] = carries(node)
    for node in graph.nodes:
        if node in live and record(node) is None and node not in starts:
            multiplier[node] = multiplier[node.all_input_nodes[0]]
    found = {}
    for node in graph.nodes:
        if node not in live or record(node) is None or node in starts:
            continue
        slots = slot_nodes(node)
        inputs = tuple(multiplier[slots[i]] for i in plan[node.name].record.site.live)
        above = multiplier[node] and all(_cuts(user, plan) for user in node.users if user in live)
        found[node] = Carry(multiplier[node], inputs, above)
    return found


def _cuts(user: fx.Node, plan: Mapping[str, Assignment]) -> bool:
    """Whether the user hands multipliers only to where its input is positive."""
    if user.name not in plan:
        return False
    rule, site = plan[user.name].rule, plan[user.name].record.site
    return site.op.kind == "relu" and rule.gradient_shares(site) is not None
