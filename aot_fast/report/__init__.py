"""`report.html` of a run or of a study: what improved, what it cost, and the pictures to judge it by."""

from aot_fast.report.build import build_report
from aot_fast.report.study import build_study_report

__all__ = ["build_report", "build_study_report"]
