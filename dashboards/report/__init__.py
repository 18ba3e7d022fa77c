"""The HTML report: runs in one file that needs no server and no network."""

from dashboards.report.page import Written, write_report

__all__ = ["Written", "write_report"]
