"""A trained run to ONNX by the command line, compared on its own validation images."""

import json

import pytest

from dlfer.predict.runtimes import read_export
from tests.integration.conftest import dlfer


@pytest.mark.slow
def test_a_run_is_exported_and_compared_on_its_own_validation(small, tmp_path):
    done = dlfer("run", small, "--out", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = done.stdout.splitlines()[0]
    done = dlfer("export", run, "--to", "onnx,litert", "--out", tmp_path / "exports", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "exports" / "onnx") in done.stdout.splitlines()
    record = read_export(tmp_path / "exports" / "onnx")
    assert record.agreement.images == "validation of its run: validation of synthetic_faces"
    assert record.agreement.accuracy.n == 48
    assert record.temperature.value is not None
    assert record.about.trained.experiment == "small"
    assert read_export(tmp_path / "exports" / "litert").input.shape == [None, 48, 48, 1]
    card = (tmp_path / "exports" / "onnx" / "MODEL_CARD.md").read_text()
    assert "## Intended use" in card
    assert "## This export" in card
    assert json.loads((tmp_path / "exports" / "onnx" / "labels.json").read_text())[0] == "Angry"
