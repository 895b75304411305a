"""`report.html` of a run: what improved, what it cost, and the pictures to judge it by."""

from aot_fast.report.build import build_report

__all__ = ["build_report"]
