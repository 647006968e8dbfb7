"""Reports made from records alone: the table, its notes, the same as HTML."""

from testbed.report.table import Report

__all__ = ["Report"]
