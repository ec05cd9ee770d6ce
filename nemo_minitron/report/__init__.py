"""The report of a run: ``index.html`` (one self-contained file) and ``report.md``. See :func:`write_report`.

matplotlib and jinja2 are imported when a report is written.
"""

from __future__ import annotations

from nemo_minitron.report.collect import collect
from nemo_minitron.report.export_cards import export_notes, write_export_card
from nemo_minitron.report.run import Run
from nemo_minitron.report.write import write_comparison, write_report

__all__ = ["Run", "collect", "export_notes", "write_comparison", "write_export_card", "write_report"]
