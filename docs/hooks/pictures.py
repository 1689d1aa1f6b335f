"""Screenshots for the documentation, taken with Chromium: of a report, of explanations, and of the server's page.

    python docs/hooks/pictures.py saved_models/runs/quickstart/RUN/report.html

writes docs/ablation_report.png from the report of `dlfer ablate experiments/quickstart.yaml`, and docs/run_report.png
from that of its first member, or from the given report if it is that of a run. In any case it writes
docs/explain_page.png from `dlfer explain docs/astronaut.jpg` and docs/serve_page.jpg from `dlfer serve`, both with the
default model. docs/astronaut_marked.jpg is written by `dlfer predict docs/astronaut.jpg --draw docs/marked/`. The only
faces shown are synthetic drawings and docs/astronaut.jpg, which is in the public domain.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parents[1]
PORT = 8765


def take_reports(page: Page, report: Path) -> None:
    """Write screenshots of an ablation's report up to its first figure (if it is one) and of a run's architecture."""
    members = report.parent / "members.csv"
    run = report
    if members.exists():
        page.goto(report.resolve().as_uri())
        end = page.evaluate("document.querySelector('figure').getBoundingClientRect().bottom + scrollY")
        clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": end + 16}
        page.screenshot(path=DOCS / "ablation_report.png", clip=clip, full_page=True)
        with open(members, newline="", encoding="utf-8") as file:
            first = Path(next(csv.DictReader(file))["path"])
        run = (first if first.is_absolute() else report.parent.parent / first.name) / "report.html"
    page.goto(run.resolve().as_uri())
    _take_section(page, "architecture", DOCS / "run_report.png")


def take_explanation(page: Page) -> None:
    """Write a screenshot of the page of `dlfer explain` for a photograph."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dlfer", "explain", "docs/astronaut.jpg", "--out", f"{folder}/explained"]
        subprocess.run(command, cwd=DOCS.parent, check=True)
        page.goto((Path(folder) / "explained" / "index.html").as_uri())
        page.locator("main").screenshot(path=DOCS / "explain_page.png")


def take_server(page: Page) -> None:
    """Write a screenshot of the server's page with the faces of a photograph."""
    command = [sys.executable, "-m", "dlfer", "serve", "--port", str(PORT), "--max-seconds", "600"]
    server = subprocess.Popen(command, cwd=DOCS.parent)
    try:
        _wait_until_ready(server)
        page.goto(f"http://127.0.0.1:{PORT}/")
        page.set_input_files("#file", DOCS / "astronaut.jpg")
        page.wait_for_selector(".face")
        page.locator(".explain").first.click()
        page.wait_for_selector(".map")
        page.screenshot(path=DOCS / "serve_page.jpg", type="jpeg", quality=85, full_page=True)
    finally:
        server.terminate()
        server.wait(60)


def _take_section(page: Page, section: str, path: Path) -> None:
    """Write a screenshot of a section of a report, from its heading to the next one."""
    top, bottom = page.evaluate(
        """id => {
            const heading = document.getElementById(id);
            let next = heading.nextElementSibling;
            while (next && next.tagName !== "H2") next = next.nextElementSibling;
            return [heading, next].map((element) => element.getBoundingClientRect().top + scrollY);
        }""",
        section,
    )
    clip = {"x": 0, "y": top - 8, "width": page.viewport_size["width"], "height": bottom - top - 8}
    page.screenshot(path=path, clip=clip, full_page=True)


def _wait_until_ready(server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/readyz", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit("dlfer serve has ended")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path, help="of an ablation or of a run, on drawn faces")
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 960, "height": 1040})
        window.set_default_timeout(600_000)  # milliseconds; the machine may be busy
        if given.report is not None:
            take_reports(window, given.report)
        take_explanation(window)
        take_server(window)
        browser.close()
