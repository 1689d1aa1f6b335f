"""The notebook for Colab and Kaggle runs from its first cell to its last, in a folder with nothing in it."""

import json
import os
import sys

import pytest

from tests.integration.conftest import ROOT, environment

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_notebook_names_no_folder_of_a_machine():
    text = NOTEBOOK.read_text()
    assert "/home/" not in text
    assert "/root/" not in text
    assert "/tmp/" not in text


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs requirements-docs.txt")
    nbclient = pytest.importorskip("nbclient", reason="needs requirements-docs.txt")
    pytest.importorskip("ipykernel", reason="needs requirements-docs.txt")
    script = tmp_path / "bin" / "dlfer"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m dlfer "$@"\n')
    script.chmod(0o755)
    specification = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = tmp_path / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({**specification, "display_name": "Python 3", "language": "python"}))
    given = {"PATH": f"{script.parent}:{os.environ['PATH']}", "JUPYTER_PATH": str(kernel.parents[2])}
    place = tmp_path / "place"
    place.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(place)}})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(**given).items():
            patch.setenv(name, value)
        client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "test images" in printed
    assert "ablation/report.html" in printed
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    tables = "".join(data.get("text/html", "") for data in shown)
    assert all(word in tables for word in ("Run of my_faces", "macro F1", "without EF-FER1"))
