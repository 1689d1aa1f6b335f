"""The array path on JAX, in an environment without TensorFlow; what it trains, TensorFlow predicts with."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import ROOT, environment

PYTHON = ROOT / ".venv-jax" / "bin" / "python"

# XLA takes minutes on a CPU to make fast what is a second of arithmetic here.
QUICK_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

TINY = """
experiment: {name: tiny, checkpoint_minutes: 0, jit: true}
model: {backbone: efficientnet_nano}
finetune:
  data: {source: synthetic_faces, num_images: {train: 48, validation: 24, test: 24}}
  epochs: 1
  batch_size: 24
  image_size: 32
  augment: {rotation: 15, mirror: 0.5}
evaluate: {bootstrap: 100, num_train: 0}
"""

SCRIPT = """
import importlib.util, sys
import numpy as np
from dlfer.cli import main
assert importlib.util.find_spec("tensorflow") is None, "this environment must not have TensorFlow"
try:
    main(["run", sys.argv[1], "--out", sys.argv[2]])
except SystemExit as end:
    assert not end.code, end.code
import dlfer, keras
from pathlib import Path
run = next(Path(sys.argv[2]).glob("tiny/*/run.json")).parent
images = np.random.default_rng(0).integers(0, 256, (4, 48, 48)).astype(np.uint8)
np.save(sys.argv[3], dlfer.load(run).predict(images))
print("backend", keras.backend.backend(), run)
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="make jax makes the environment for this test")
def test_trains_on_jax_and_predicts_on_tensorflow(tmp_path):
    import dlfer

    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [PYTHON, tmp_path / "script.py", tmp_path / "tiny.yaml", tmp_path / "runs", tmp_path / "jax.npy"],
        env=environment(KERAS_BACKEND="jax", XLA_FLAGS=QUICK_COMPILING),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained on jax, and TensorFlow writes ONNX" in done.stderr
    assert "backend jax" in done.stdout
    run = Path(done.stdout.split()[-1])
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 48)).astype(np.uint8)
    assert np.abs(dlfer.load(run).predict(images) - np.load(tmp_path / "jax.npy")).max() < 1e-4
