"""Take the pictures of the documentation with chromium, from a report that is there and from a server that is started.

    python docs/hooks/pictures.py saved_models/runs/quickstart/RUN/report.html

writes docs/ablation_report.png from the report of `dlfer ablate experiments/quickstart.yaml`, if one is given, and docs/serve_page.jpg
from `dlfer serve` with the default model and docs/astronaut.jpg. docs/astronaut_marked.jpg is written by
`dlfer predict docs/astronaut.jpg --draw docs/marked/`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).resolve().parents[1]
PORT = 8765


def take_report(page: Page, report: Path) -> None:
    """Write the head of an ablation's report."""
    page.goto(report.resolve().as_uri())
    page.screenshot(path=DOCS / "ablation_report.png")


def take_server(page: Page) -> None:
    """Write the page of the server with the faces of a photograph."""
    server = subprocess.Popen([sys.executable, "-m", "dlfer", "serve", "--port", str(PORT)], cwd=DOCS.parent)
    try:
        _wait_until_ready(server)
        page.goto(f"http://127.0.0.1:{PORT}/")
        page.set_input_files("#file", DOCS / "astronaut.jpg")
        page.wait_for_selector(".face", timeout=120_000)
        page.screenshot(path=DOCS / "serve_page.jpg", type="jpeg", quality=85)
    finally:
        server.terminate()
        server.wait(60)


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
    parser.add_argument("report", nargs="?", type=Path)
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 960, "height": 1040})
        if given.report is not None:
            take_report(window, given.report)
        take_server(window)
        browser.close()
