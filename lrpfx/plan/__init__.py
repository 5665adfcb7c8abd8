"""A canonical graph and rules -> the rule of each node that carries relevance, and why."""

from lrpfx.plan.annotate import Unknown, annotate, annotate_known, repair
from lrpfx.plan.assign import Assignment, Plan, assign
from lrpfx.plan.carriers import find_carriers
from lrpfx.plan.notes import LEFT_OUT, notes_of
from lrpfx.plan.resolve import RulesLike, read_rules, register_composite
from lrpfx.plan.starts import find_starts, index_places

__all__ = [
    "Assignment",
    "LEFT_OUT",
    "Plan",
    "RulesLike",
    "Unknown",
    "annotate",
    "annotate_known",
    "assign",
    "find_carriers",
    "find_starts",
    "index_places",
    "notes_of",
    "read_rules",
    "register_composite",
    "repair",
]
