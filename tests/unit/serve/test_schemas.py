"""The interface does what its OpenAPI says, tried by schemathesis."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_schemathesis_finds_nothing(start, tmp_path):
    pytest.importorskip("schemathesis", reason="pip install schemathesis==4.32.5")
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    _, port, _ = start()
    done = subprocess.run(
        [
            program,
            "run",
            f"http://127.0.0.1:{port}/openapi.json",
            "--checks=all",
            # Bytes that fit the schema are hardly ever a picture.
            "--exclude-checks=positive_data_acceptance",
            "--max-examples=15",
            "--generation-database=none",
            "--seed=1",
            "--no-color",
            "--request-timeout=20",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[:4000] + "\n...\n" + done.stdout[-2000:]
