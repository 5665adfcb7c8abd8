"""A plan and a ledger -> what became of the relevance, as tables, a page, a graph."""

from lrpfx.report.report import Report, make_report, with_ledger
from lrpfx.report.rows import Row

__all__ = [
    "Report",
    "Row",
    "make_report",
    "with_ledger",
]
