"""A report as one HTML page: a tree of modules with bars, without scripts or other files."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lrpfx.report.graph import colour
from lrpfx.report.leaks import find_leaks
from lrpfx.report.rows import Row, Rows
from lrpfx.report.summary import Group, group_by_module, readers
from lrpfx.report.tables import number

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
details { margin-left: 1.2em; border-left: 2px solid #ddd; padding-left: .6em; }
summary { cursor: pointer; padding: .15em 0; }
summary small { color: #666; margin: 0 .6em; }
table { border-collapse: collapse; margin: .2em 0 .2em 1.2em; }
details table { width: calc(100% - 1.2em); font-size: 12px; }
td, th { text-align: left; padding: .1em .7em .1em 0; overflow-wrap: anywhere; min-width: 5.5em; }
th, .key { color: #666; font-weight: normal; }
code { color: #555; font-size: 12px; }
pre { white-space: pre-wrap; }
.rule { padding: 0 .4em; border-radius: .3em; color: #222; }
.flow { float: right; white-space: nowrap; } td.flow { float: none; width: 1px; padding: 0; }
.bar { display: inline-block; width: 80px; height: .7em; background: #eee; margin: 0 .4em; }
.number { display: inline-block; width: 5.5em; }
.bar i { display: block; height: 100%; }
.plus { background: #d6604d; } .minus { background: #4393c3; } .kept { background: #666; }
summary::after { content: ""; display: block; clear: both; }
@media (max-width: 50em) {
body { margin: 1em; } details, table { margin-left: 0; } details table { width: 100%; }
details td { display: inline-block; } .flow { float: none; display: block; }
}
@media (prefers-color-scheme: dark) {
:root { color-scheme: dark; } body { color: #ddd; background: #181818; } code { color: #bbb; }
th, .key, summary small { color: #aaa; } details { border-color: #444; } .bar { background: #333; }
.kept { background: #999; }
}
"""

_LEGEND = (
    '<p class="key">Bars: relevance that arrived, red for and blue against what is explained; then '
    "in grey what was absorbed. Full is the largest relevance of any node.</p>"
)


def page(report: Rows) -> str:
    """The whole page."""
    sizes = [abs(row.relevance_in or 0.0) for row in report.rows]
    tree = _Tree(readers(report.rows), max(filter(math.isfinite, sizes), default=0.0))
    leaks = legend = ""
    if report.has_ledger:
        leaks, legend = f"<h2>Leaks</h2>\n{find_leaks(report, 5).table().html()}\n", f"{_LEGEND}\n"
    lines = html.escape("\n".join(report.summary()))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(report.rules)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Relevance by module</h1>\n<pre>{lines}</pre>\n{leaks}<h2>Modules</h2>\n{legend}"
        f"{''.join(tree.below(report.rows, 1))}</body>\n</html>\n"
    )


@dataclass(frozen=True)
class _Tree:
    """Rows by module path; a bar is full at ``most``, the largest relevance of any node."""

    read_by: Mapping[str, set[str]]
    most: float

    def below(self, rows: Sequence[Row], depth: int) -> Iterator[str]:
        """A module's own nodes, and the modules in it, in execution order."""
        for group in group_by_module(rows, depth, self.read_by):
            if len(group.path) < depth:
                yield f"<table>\n{''.join(map(self._row, group.rows))}</table>\n"
            else:
                opened = " open" if depth == 1 else ""
                inner = "".join(self.below(group.rows, depth + 1))
                yield f"<details{opened}>{self._summary(group)}\n{inner}</details>\n"

    def _summary(self, group: Group) -> str:
        flow = self._flow(group.relevance_in, group.absorbed)
        return (
            f"<summary><b>{html.escape(group.path[-1])}</b>"
            f"<small>{html.escape(group.rules)}</small>"
            f'<span class="flow">{flow}</span></summary>'
        )

    def _row(self, row: Row) -> str:
        causes = ", ".join(f"{cause} {number(value)}" for cause, value in row.absorbed.items())
        booked = row.relevance_in is not None
        cells = [
            html.escape(f"{row.label}: {row.op}"),
            f'<span class="rule" style="background:{colour(row.rule)}">'
            f"{html.escape(row.rule or 'no rule')}</span>",
            html.escape(row.why),
            html.escape("x".join(map(str, row.shape))),
            *([] if booked else [html.escape(row.edge)]),
            html.escape(causes),
            f'<code title="{html.escape(row.source)}">{html.escape(row.place)}</code>',
        ]
        flow = self._flow(row.relevance_in, sum(row.absorbed.values()) if booked else None)
        shown = "".join(f"<td>{cell}</td>" for cell in cells)
        return f'<tr>{shown}<td class="flow">{flow}</td></tr>\n'

    def _flow(self, arrived: float | None, stayed: float | None) -> str:
        return self._bar(arrived, "plus") + self._bar(stayed, "kept")

    def _bar(self, value: float | None, kind: str) -> str:
        if value is None:
            return ""
        share = abs(value) / self.most if self.most else 0.0
        width = round(100 * min(share, 1.0)) if math.isfinite(share) else 0
        kind = "minus" if value < 0 and kind == "plus" else kind
        return (
            f'<span class="bar"><i class="{kind}" style="width:{width}%"></i></span>'
            f'<span class="number">{number(value)}</span>'
        )
