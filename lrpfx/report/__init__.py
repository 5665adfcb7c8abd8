"""A plan and a ledger -> what became of the relevance, as tables, a page, a graph."""

from lrpfx.report.report import Report, make_report, with_ledger
from lrpfx.report.rows import Row
from lrpfx.report.tables import Column, Table, Tabular

__all__ = [
    "Column",
    "Table",
    "Tabular",
    "Report",
    "Row",
    "make_report",
    "with_ledger",
]
