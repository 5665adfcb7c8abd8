"""The report as data: a row per node, and what is known of all of them together."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lrpfx.errors import InputError, LrpError
from lrpfx.plan import repair


@dataclass(frozen=True)
class Row:
    """One node of the graph.

    Args:
        node: Name in the graph.
        module: Dotted path of the module it belongs to, with "@k" for the k-th further call.
        op: ATen op without namespace.
        kind: What selectors call it.
        rule: The rule with the parameters that differ from their defaults, "" if there is none.
        why: The entry of the composite it comes from.
        shape: Shape of the output, "N" for the batch.
        folded: Modules folded into it.
        source: Line of the user's code.
        relevance_in: Relevance that arrived at its output, summed over the batch; None before an
            explanation.
        relevance_out: Relevance handed on to its inputs.
        absorbed: What stayed, by cause.
        inputs: Names of the nodes its relevance goes to: further rows, or where it is wanted for.
        edge: What arrives at its output where no ledger is kept: relevance "R", or "R / a", the
            multiplier of the activation a.
    """

    node: str
    module: str
    op: str
    kind: str
    rule: str
    why: str
    shape: tuple[int | str, ...]
    folded: tuple[str, ...] = ()
    source: str = ""
    relevance_in: float | None = None
    relevance_out: float | None = None
    absorbed: dict[str, float] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    edge: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """The parts of the module path, whichever call it is."""
        path = re.sub(r"@\d+$", "", self.module)
        return tuple(path.split(".")) if path else ()

    @property
    def label(self) -> str:
        """The module path with what was folded into it."""
        folded = "".join(f"+{path.rsplit('.', 1)[-1]}" for path in self.folded)
        return (self.module or "(the model)") + folded

    @property
    def place(self) -> str:
        """The source line without the file's folders."""
        file, colon, code = self.source.partition(":")
        return os.path.basename(file) + colon + code


_Some = TypeVar("_Some", bound="Rows")


class Unbooked:
    """Rows whose sums are computed when they are first asked for.

    Args:
        planned: The rows without sums.
        book: Computes those with sums; it is dropped, with all that it holds, once it has.
    """

    def __init__(self, planned: tuple[Row, ...], book: Callable[[], tuple[Row, ...]]) -> None:
        self.planned = self._rows = planned
        self._book: Callable[[], tuple[Row, ...]] | None = book
        self._lock = threading.Lock()

    def rows(self) -> tuple[Row, ...]:
        """The rows with sums."""
        with self._lock:
            if self._book is not None:
                self._rows = self._book()
                self._book = None
            return self._rows


@dataclass(frozen=True, repr=False)
class Rows:
    """A report without its views, for these to read; ``Report`` says what the fields are."""

    rows: tuple[Row, ...]
    rules: str
    constant_nodes: int | None
    notes: tuple[str, ...] = ()
    target: str = ""
    started: float | None = None
    reached: float | None = None

    @property
    def unsupported(self) -> tuple[Row, ...]:
        """The nodes without a rule, which only ``lrpfx.coverage`` lets into a report."""
        return tuple(row for row in self.rows if not row.rule)

    @property
    def ruled(self) -> float:
        """The fraction of the rows that have a rule."""
        return 1 - len(self.unsupported) / len(self.rows) if self.rows else 1.0

    @property
    def pending(self) -> bool:
        """Whether the sums are still to be computed, when something first asks for them."""
        return "rows" not in self.__dict__

    def on_demand(self: _Some, book: Callable[[], tuple[Row, ...]]) -> _Some:
        """The report whose rows are those that ``book`` returns when they are first asked for."""
        later = replace(self)
        later.__dict__["_unbooked"] = Unbooked(later.__dict__.pop("rows"), book)
        return later

    if not TYPE_CHECKING:  # else every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            """The rows that are not there yet."""
            unbooked = self.__dict__.get("_unbooked")
            if name != "rows" or unbooked is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self.__dict__["rows"] = unbooked.rows()
            return self.__dict__["rows"]

    def planned(self: _Some) -> _Some:
        """The report as it was before the explanation, without any sums, with its notes."""
        rows = self.__dict__["_unbooked"].planned if self.pending else self.rows
        return replace(self, rows=rows, started=None, reached=None)

    def settled(self: _Some) -> _Some:
        """The report with its sums; without, and a note of why, if they cannot be had any more."""
        if not self.pending:
            return self
        try:
            return replace(self, rows=self.rows)
        except LrpError as error:
            planned, note = self.__dict__["_unbooked"].planned, f"without a ledger: {error.what}"
            return replace(self, rows=planned, notes=(*self.notes, note))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which do not take along the model."""
        state = self.settled().__dict__
        return {name: value for name, value in state.items() if name != "_unbooked"}

    @property
    def has_ledger(self) -> bool:
        """Whether relevance was booked node by node, or will be once it is asked for."""
        if self.pending:
            return True
        if self.constant_nodes is None:
            return False
        booked = any(row.relevance_in is not None for row in self.rows) or not self.rows
        return self.started is not None and booked

    def needs_ledger(self) -> float:
        """The seed relevance, of a report that knows what became of it.

        Raises:
            InputError: Nothing was explained yet, or it was explained without a ledger.
        """
        if self.started is None:
            raise InputError(
                "this report is of a plan, without relevance.",
                fix="take the report of an explanation: lrpfx.explain(...).report.",
            )
        if self.constant_nodes is None:
            raise InputError(
                f"{self.rules} follows no rules node by node: there is no ledger.",
                fix="take the report of an explanation by rules: lrpfx.explain(...).report.",
            )
        if not self.has_ledger:
            raise InputError(
                "this explanation kept no ledger: what each node absorbed is not known.",
                fix="explain with ledger=True, and one target: several keep no ledger.",
            )
        return self.started

    @property
    def absorbed(self) -> dict[str, float]:
        """What was absorbed on the way, by cause, summed over all nodes.

        Raises:
            InputError: See ``needs_ledger``.
        """
        self.needs_ledger()
        total: dict[str, float] = {}
        for row in self.rows:
            for cause, value in row.absorbed.items():
                total[cause] = total.get(cause, 0.0) + value
        return total

    @property
    def unaccounted(self) -> float | None:
        """Seed relevance that neither reached the inputs nor was absorbed: round-off.

        None without a ledger.
        """
        if self.started is None or self.reached is None or not self.has_ledger:
            return None
        return self.started - self.reached - sum(self.absorbed.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return {
            "rules": self.rules,
            "target": self.target,
            "notes": list(self.notes),
            "coverage": {
                "live_nodes": len(self.rows),
                "ruled_nodes": len(self.rows) - len(self.unsupported),
                "constant_nodes": self.constant_nodes,
            },
            "ledger": None
            if self.started is None
            else {
                "started": self.started,
                "reached": self.reached,
                "absorbed": self.absorbed if self.has_ledger else None,
                "unaccounted": self.unaccounted,
            },
            "rows": [
                {
                    "node": row.node,
                    "module": row.module,
                    "op": row.op,
                    "kind": row.kind,
                    "rule": row.rule,
                    "why": row.why,
                    "shape": list(row.shape),
                    "folded": list(row.folded),
                    "source": row.source,
                    "relevance_in": row.relevance_in,
                    "relevance_out": row.relevance_out,
                    "absorbed": dict(row.absorbed),
                    "inputs": list(row.inputs),
                    "edge": row.edge,
                }
                for row in self.rows
            ],
        }

    def summary(self) -> list[str]:
        """The lines above the table."""
        rules = {row.rule for row in self.rows if row.rule}
        missing = self.unsupported
        if self.constant_nodes is None:
            lines = [f"method   {self.rules}, which follows no rules node by node"]
        else:
            lines = [
                f"rules    {self.rules}",
                f"coverage {len(self.rows) - len(missing)} of {len(self.rows)} live nodes have a "
                f"rule ({len(rules)} different); {self.constant_nodes} nodes are constant",
            ]
        if missing:
            lines.append(f"missing  {_counts(row.op for row in missing)}")
            lines += [f"missing  {row.why} at {row.label}   {row.place}" for row in missing]
            lines.append(f"fix      {repair([row.why for row in missing])}")
        if self.started is None and self.rows:
            lines.append(f"kinds    {_counts(row.kind for row in self.rows if row.rule)}")
        if self.target:
            lines.append(f"target   {self.target}")
        if self.constant_nodes is None and self.reached is not None:
            lines.append(f"sums to  {self.reached:.6g}, where the target is {self.started:.6g}")
        elif self.started is not None and self.reached is not None:
            lines.append(f"ledger   started {self.started:.6g}" + self._became(self.reached))
        lines += [f"note     {note}" for note in self.notes]
        return lines

    def _became(self, reached: float) -> str:
        if self.started is None or not self.has_ledger:
            return f", reached the inputs {reached:.6g}; not kept by node, explain with ledger=True"
        worth = 1e-9 * max(abs(self.started), abs(reached))  # the rest is round-off
        causes = ", ".join(
            f"{cause} {value:.4g}" for cause, value in self.absorbed.items() if abs(value) > worth
        )
        return (
            f" = reached the inputs {reached:.6g} + absorbed {sum(self.absorbed.values()):.6g}"
            + (f" ({causes})" if causes else "")
            + f"; unaccounted {self.unaccounted:.1e}"
        )


def _counts(words: Iterable[str]) -> str:
    return ", ".join(f"{word} {n}" for word, n in Counter(words).most_common())
