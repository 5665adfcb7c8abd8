"""``conditions=`` as users write it -> what it changes in the graph, and what each one keeps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrpfx.conditions.cuts import check_on_path, cuts_of_all, find_cuts
from lrpfx.conditions.kinds import Channel, Concept
from lrpfx.conditions.places import Place, Places
from lrpfx.errors import LrpError, SelectorError
from lrpfx.ops import explained_leaves, record
from lrpfx.rewrite import Edge, Edits

#: What is kept at a place: numbers of channels, or a kind of concept and numbers of these.
Kept = Sequence[Any] | tuple[Concept, Sequence[Any]]
#: Places, and what is kept there.
Condition = Mapping[str, Kept]

_FORM = (
    'give dicts such as {"features.2": [3, 5]}, or {"attn": (lrpfx.concepts.Head(4), [0])} for '
    "another kind of concept."
)


@dataclass(frozen=True)
class Conditions:
    """Conditions as they are laid on one graph.

    Args:
        start: Name of the place that relevance starts from, None for the output.
        places: All that some condition names, and that one.
        masks: Of each mask, in the order of the edits: its place, and by condition the concepts
            that are kept, None where the condition does not name the place.
        edits: What they change in the graph.
        cuts: By condition, the gates that are closed.
        zipped: Whether the k-th condition is for the k-th sample.
        count: How many conditions there are.
    """

    start: str | None
    places: Mapping[str, Place]
    masks: Sequence[tuple[Place, Concept, Sequence[Sequence[Any] | None]]]
    edits: Edits
    cuts: Sequence[Collection[Edge]]
    zipped: bool
    count: int

    @property
    def several(self) -> bool:
        """Whether explanations have a leading dimension of conditions."""
        return bool(self.masks) and not self.zipped

    @property
    def passes(self) -> int:
        """How many backward passes there are."""
        return self.count if self.several else 1

    def kept(
        self, forms: Sequence[Tensor], shapes: Mapping[str, Sequence[int]], gates: Sequence[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """The weights of masks and gates, for each condition; for "zip" all of them at once.

        Args:
            forms: Of the weights of each mask, (N, C).
            shapes: Of a sample's activation, by place.
            gates: Forms of the weights of each gate.

        Raises:
            SelectorError: There are no such concepts; or as many conditions as samples are wanted.
        """
        if self.zipped:
            samples = {len(form) for form in forms}
            if samples - {self.count}:
                raise SelectorError(
                    f'pairing="zip" takes one condition for each sample: there are {self.count} '
                    f"conditions, and {', '.join(map(str, sorted(samples)))} samples.",
                    fix="give as many, or leave pairing out for every condition of every sample.",
                )
        problems: list[str] = []
        masks = []
        for (place, kind, by_condition), form in zip(self.masks, forms, strict=True):
            row = torch.ones_like(form[0])
            masks.append(torch.stack([row] * self.count))
            for k, concepts in enumerate(by_condition):
                if concepts is not None:
                    numbers = _numbers(place, kind, concepts, shapes[place.name], row, problems)
                    masks[-1][k] = 0.0
                    masks[-1][k, numbers] = 1.0
        if problems:
            raise SelectorError(
                f"conditions name {len(problems)} concept(s) that are not there.",
                where=list(dict.fromkeys(problems)),
                fix="give numbers in the range.",
            )
        opened = [
            form.new_tensor([float(edge not in cut) for cut in self.cuts])
            for edge, form in zip(self.edits.gates, gates, strict=True)
        ]
        if self.zipped:
            return [(*masks, *(o if self.edits.by_sample else o[:1] for o in opened))]
        sizes = [len(form) for form in forms]
        return [
            (
                *(m[k].expand(n, -1) for m, n in zip(masks, sizes, strict=True)),
                *(o[k : k + 1] for o in opened),
            )
            for k in range(self.count)
        ]

    def notes(self) -> list[str]:
        """What the report says of them."""
        cut = [
            f"{node.name} for {'the output' if reader is None else reader.name}"
            for reader, node in self.edits.gates
        ]
        if not cut:
            return []
        return [
            f'conditions, through="only": no relevance enters {len(cut)} edge(s) beside the '
            f"conditioned places: {', '.join(cut[:8])}{' ...' if len(cut) > 8 else ''}"
        ]


def read_conditions(
    conditions: Any,
    *,
    pairing: str,
    through: str,
    start: str | None,
    places: Places,
    starts: Collection[fx.Node],
) -> Conditions:
    """Find the places, and what has to change in the graph.

    Args:
        conditions: A sequence of conditions, or none.
        pairing: "each": every condition for every sample; "zip": the k-th for the k-th.
        through: "only": relevance goes through the conditioned places only; "all": also beside.
        start: The place that relevance starts from, None for the output.
        places: Those of a graph.
        starts: Where relevance is wanted.

    Raises:
        SelectorError: Conditions of a wrong form, places that are not there, or on no path; all
            that are wrong at once.
    """
    for name, value, known in (
        ("pairing", pairing, ("each", "zip")),
        ("through", through, ("only", "all")),
    ):
        if value not in known:
            raise SelectorError(
                f"{name}={value!r} is not known.", fix=f"give {' or '.join(map(repr, known))}."
            )
    given = _forms(conditions)
    graph, live, problems = places.graph, places.live, list[str]()
    fixes: list[str] = []
    found: dict[str, Place] = {}
    named = [name for condition in given for name in condition]
    for name in dict.fromkeys([*([] if start is None else [start]), *named]):
        try:
            found[name] = places.find(name)
        except SelectorError as error:
            problems.append(error.what)
            fixes.append(f"{name!r}: {error.fix}")
    masks: dict[tuple[fx.Node, Concept], tuple[Place, list[Any]]] = {}
    for k, condition in enumerate(given):
        for name, (kind, kept) in condition.items():
            if name not in found:
                continue
            try:
                key = found[name].tap.relevance, _placed(kind, found[name])
            except (ValueError, LrpError) as error:
                problems.append(f"{name}: {error}")
                continue
            _, by_condition = masks.setdefault(key, (found[name], [None] * len(given)))
            if by_condition[k] is not None:
                problems.append(f"condition {k} names a place twice: {name}")
            by_condition[k] = kept
    if problems:
        several = len(problems) > 1
        raise SelectorError(
            f"conditions name {len(problems)} places that cannot be conditioned so."
            if several
            else problems[0],
            where=list(dict.fromkeys(problems)) if several else (),
            fix="; ".join(fixes) or "give a place once, and a kind of concept that it has.",
        )
    begin = None if start is None else found[start].tap.relevance
    ends = [n for n in explained_leaves(graph) if isinstance(n, fx.Node) and n in live]
    ends = ends if begin is None else [begin]
    cuts: list[set[Edge]] = []
    for condition in given or [{}]:
        at = {found[name].tap.relevance for name in condition}
        # Where relevance does not come to there is nothing to block.
        needed = {found[name].tap.relevance for name, (_, some) in condition.items() if some}
        check_on_path(live, starts, ends, at if through == "only" else needed)
        cuts.append(find_cuts(graph, live, starts, ends, at) if at and through == "only" else set())
    by_node: dict[fx.Node, tuple[Concept, ...]] = {}
    for node, kind in masks:
        by_node[node] = (*by_node.get(node, ()), kind)
    zipped = pairing == "zip"
    by_sample = zipped and any(cut != cuts[0] for cut in cuts)
    return Conditions(
        start=start,
        places=found,
        masks=[
            (masks[node, kind][0], kind, masks[node, kind][1])
            for node, kinds in by_node.items()
            for kind in kinds
        ],
        edits=Edits(by_node, cuts_of_all(cuts), begin, by_sample),
        cuts=cuts,
        zipped=zipped,
        count=max(len(given), 1),
    )


def _numbers(
    place: Place,
    kind: Concept,
    concepts: Sequence[Any],
    shape: Sequence[int],
    row: Tensor,
    problems: list[str],
) -> list[int]:
    """The numbers of concepts at a place that has as many as ``row`` has entries."""
    numbers = []
    for concept in concepts:
        try:
            numbers.append(kind.number(concept, shape, len(row)))
        except ValueError as error:
            problems.append(f"{place.name}: {error}")
    return numbers


def _placed(kind: Concept, place: Place) -> Concept:
    node = place.tap.relevance
    known = record(node)
    shape = tuple(node.meta["val"].shape) if known is None else known.shape
    return kind.at(shape, place.channels)


def _forms(conditions: Any) -> list[dict[str, tuple[Concept, Sequence[Any]]]]:
    """Conditions as dicts from place to kind and concepts."""
    if conditions is None:
        return []
    if isinstance(conditions, Mapping) or not isinstance(conditions, (list, tuple)):
        raise SelectorError(
            f"conditions are a list of dicts, not {type(conditions).__name__}.", fix=_FORM
        )
    if not conditions:
        raise SelectorError("conditions=[] has no condition in it.", fix=_FORM)
    problems: list[str] = []
    found = []
    for k, condition in enumerate(conditions):
        if not isinstance(condition, Mapping) or not all(isinstance(n, str) for n in condition):
            problems.append(f"condition {k} is {condition!r}")
            continue
        if not condition:
            problems.append(f"condition {k} names no place")
        read: dict[str, tuple[Concept, Sequence[Any]]] = {}
        for name, kept in condition.items():
            kind: Any = Channel()
            concepts = kept
            if isinstance(kept, tuple) and len(kept) == 2 and isinstance(kept[0], Concept):
                kind, concepts = kept
            if isinstance(concepts, (Tensor,)) or hasattr(concepts, "tolist"):
                concepts = concepts.tolist()
            if not isinstance(concepts, (list, tuple, range)):
                problems.append(f"condition {k}, {name!r}: {kept!r} is no list of concepts")
            else:
                read[name] = kind, list(concepts)
        found.append(read)
    if problems:
        raise SelectorError(
            f"conditions are of a wrong form: {problems[0]}"
            if len(problems) == 1
            else f"{len(problems)} conditions are of a wrong form.",
            where=problems if len(problems) > 1 else (),
            fix=_FORM,
        )
    return found
