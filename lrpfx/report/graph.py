"""The graph of a report as text for Graphviz and Mermaid, coloured by rule."""

from __future__ import annotations

import colorsys
import re
import zlib

from lrpfx.report.rows import Row, Rows
from lrpfx.report.tables import number

#: What has no rule yet, and what is no row: the places relevance is wanted for.
_MISSING, _INPUT = "#ff6b6b", "#ffffff"


def colour(rule: str) -> str:
    """A light colour for a rule, by its name without parameters: the same in every report."""
    if not rule:
        return _MISSING
    mixed = zlib.crc32(rule.partition("(")[0].encode())
    parts = colorsys.hls_to_rgb(mixed % 360 / 360, (0.74, 0.86)[mixed // 360 % 2], 0.7)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def to_dot(report: Rows) -> str:
    """The graph for Graphviz."""
    nodes, edges = _drawn(report)
    lines = ["digraph lrpfx {", '  node [shape=box, style="rounded,filled"];']
    for key, texts, fill in nodes:
        label = "\\n".join(map(_dot, texts))
        lines.append(f'  {key} [label="{label}", fillcolor="{fill}"];')
    lines += [f"  {a} -> {b};" for a, b in edges]
    return "\n".join([*lines, "}", ""])


def to_mermaid(report: Rows) -> str:
    """The graph for Mermaid, which draws up to 500 edges unless it is told otherwise."""
    nodes, edges = _drawn(report)
    lines = ["flowchart TD"]
    for key, texts, fill in nodes:
        lines.append(f'  {key}["{"<br/>".join(map(_mermaid, texts))}"]')
        lines.append(f"  style {key} fill:{fill},stroke:#555,color:#000")
    lines += [f"  {a} --> {b}" for a, b in edges]
    return "\n".join([*lines, ""])


def _drawn(report: Rows) -> tuple[list[tuple[str, list[str], str]], list[tuple[str, str]]]:
    """Nodes as (id, lines, colour), and edges; no name can break an id.

    First comes what is read but is no row: where relevance is wanted.
    """
    rows = {row.node: row for row in report.rows}
    read = dict.fromkeys(name for row in report.rows for name in row.inputs if name not in rows)
    ids = {name: f"n{i}" for i, name in enumerate([*read, *rows])}
    nodes = [(ids[name], [name], _INPUT) for name in read]
    nodes += [(ids[name], _label(row), colour(row.rule)) for name, row in rows.items()]
    return nodes, [(ids[name], ids[row.node]) for row in report.rows for name in row.inputs]


def _label(row: Row) -> list[str]:
    lines = [row.label, f"{row.op}: {row.rule or 'no rule'}"]
    if row.relevance_in is not None:
        stayed = sum(row.absorbed.values())
        lines.append(f"R {number(row.relevance_in)}, absorbed {number(stayed)}")
    return lines


def _dot(text: str) -> str:
    """As it stands in a quoted string, where a backslash begins an escape."""
    return re.sub(r'([\\"])', r"\\\1", " ".join(text.split()))


def _mermaid(text: str) -> str:
    """All that Mermaid, Markdown or HTML may take for its own, as a character's number."""
    plain = " ".join(text.split())
    return re.sub(r"[^\w .,:=+()…-]", lambda found: f"#{ord(found[0])};", plain)
