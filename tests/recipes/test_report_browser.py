"""The report in a real browser: every plot is there, nothing is broken, nothing is said on the console."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.browser import browser, look
from support.run_dir import write_run

from nemo_minitron.config import ReportConfig
from nemo_minitron.stages import report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")]


def test_reports_in_a_browser(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", steps=60), write_run(tmp_path / "two", steps=80)
    report.run(ReportConfig(run=str(one), output=str(one / "report")))
    report.run(ReportConfig(run=str(one), others=[str(two)], output=str(one / "comparison")))
    expected = {"report": 8, "comparison": 2}
    for name, images in expected.items():
        page = one / name / "index.html"
        for width in (1100, 420):
            seen = look(page, width)
            assert seen["console"] == []
            assert len(seen["images"]) == images
            assert all(natural > 300 for _, natural in seen["images"]), seen["images"]
            assert all(height > 40 for _, height in seen["sections"]), seen["sections"]
            assert seen["dead"] == []
            assert not seen["sideways"], f"{name} at {width} pixels"

    # What the test looks for, it finds: a plot cut off, a script that fails.
    broken = one / "broken.html"
    text = (one / "report" / "index.html").read_text()
    start = text.index('<img src="data:image/png;base64,') + len('<img src="data:image/png;base64,')
    text = text[:start] + "AAAA" + text[start + 40 :]
    broken.write_text(text.replace("</body>", "<script>missing()</script></body>"))
    seen = look(broken)
    assert any(natural == 0 for _, natural in seen["images"])
    assert any("missing is not defined" in line for line in seen["console"])
