"""Self-contained HTML pages without network requests: one run's film, a comparison of runs."""

from mechcausal.pictures.pages.comparison_page import write_comparison
from mechcausal.pictures.pages.run_page import REPORT_FILE, write_page, write_report

__all__ = ["REPORT_FILE", "write_comparison", "write_page", "write_report"]
