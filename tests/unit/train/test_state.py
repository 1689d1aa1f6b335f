"""Improvements and patience against Keras' own callbacks on the same sequences of values."""

import json
import subprocess
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.config.schema import StageConfig
from dlfer.train.state import StageState, count_epoch, count_plateau, find_reference

# Multiples of 1/64, so that sums and differences are exact and no rounding decides.
GRID = st.integers(0, 64).map(lambda n: n / 64)
DELTAS = st.sampled_from([0.0, 1 / 64, 2 / 64, 5 / 64, 20 / 64])


def make_config(monitor: str, patience: int, min_delta: float) -> StageConfig:
    return StageConfig.model_validate(
        {
            "data": {"source": "synthetic_faces"},
            "monitor": monitor,
            "early_stopping": {"patience": patience, "min_delta": min_delta},
        }
    )


def count(values: list[float], config: StageConfig, *, plateau: int | None = None) -> tuple[StageState, list[int]]:
    """Return the state at the end, and after which epochs it stopped, or the rate fell."""
    state, epochs = StageState(), []
    for value in values:
        count_epoch(state, value, config)
        if plateau is None and state.waited >= config.early_stopping.patience:
            epochs.append(state.epoch)
            break
        if plateau is not None and count_plateau(state, plateau):
            epochs.append(state.epoch)
        state.epoch += 1
    return state, epochs


def run_keras(callback: keras.callbacks.Callback, values: list[float]) -> list[int]:
    """Return after which epochs the callback stopped, or lowered the rate."""
    model = SimpleNamespace(stop_training=False, optimizer=SimpleNamespace(learning_rate=1.0), metrics=[])
    callback.set_model(model)
    callback.on_train_begin()
    epochs = []
    for epoch, value in enumerate(values):
        rate = model.optimizer.learning_rate
        callback.on_epoch_end(epoch, {"value": value})
        if model.stop_training or model.optimizer.learning_rate != rate:
            epochs.append(epoch)
        if model.stop_training:
            break
    return epochs


@settings(max_examples=150)
@given(
    values=st.lists(GRID, min_size=1, max_size=30),
    patience=st.integers(1, 6),
    min_delta=DELTAS,
    monitor=st.sampled_from(["loss", "accuracy"]),
)
def test_early_stopping_stops_where_keras_does(values, patience, min_delta, monitor):
    mode = "min" if monitor == "loss" else "max"
    callback = keras.callbacks.EarlyStopping("value", patience=patience, min_delta=min_delta, mode=mode)
    state, epochs = count(values, make_config(monitor, patience, min_delta))
    assert epochs == run_keras(callback, values)
    assert state.reference == callback.best
    # The weights that are kept are those of the best value, however little better it was.
    seen = values[: epochs[0] + 1] if epochs else values
    assert state.best == (min(seen) if monitor == "loss" else max(seen))
    assert state.best_epoch == (np.argmin(seen) if monitor == "loss" else np.argmax(seen))


@settings(max_examples=150)
@given(
    values=st.lists(GRID, min_size=1, max_size=30),
    patience=st.integers(1, 6),
    min_delta=DELTAS,
    monitor=st.sampled_from(["loss", "macro_f1"]),
)
def test_plateau_lowers_the_rate_where_keras_does(values, patience, min_delta, monitor):
    mode = "min" if monitor == "loss" else "max"
    callback = keras.callbacks.ReduceLROnPlateau(
        "value", factor=0.5, patience=patience, min_delta=min_delta, mode=mode, min_lr=0.0
    )
    _, epochs = count(values, make_config(monitor, 99, min_delta), plateau=patience)
    assert epochs == run_keras(callback, values)


def test_small_gains_count_once_they_exceed_min_delta_together():
    """0.5, 0.507, 0.514, ...: no epoch is 0.01 above the best one, and every second is 0.01 above the last improvement."""
    state, epochs = count([0.5 + 0.007 * n for n in range(20)], make_config("accuracy", 2, 0.01))
    assert epochs == []
    assert state.best_epoch == 19


@settings(max_examples=50)
@given(values=st.lists(GRID, min_size=1, max_size=20), min_delta=DELTAS)
def test_the_reference_follows_from_the_history(values, min_delta):
    """Which is how checkpoints without it are read."""
    config = make_config("accuracy", 99, min_delta)
    assert find_reference(values, config) == count(values, config)[0].reference


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_a_number_is_an_improvement_on_nan(monitor):
    state, epochs = count([float("nan"), 0.5, float("nan"), float("nan")], make_config(monitor, 2, 0.0))
    assert (state.best, state.best_epoch, state.reference, epochs) == (0.5, 1, 0.5, [3])


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from keras import Variable, Sequential, layers
from dlfer.model.weights_file import save_weights
from dlfer.runs.run import Run
from dlfer.train.state import read_state, write_checkpoint
folder = Path(sys.argv[1])
small, large = [Variable(np.zeros(100, np.float32))], [Variable(np.ones(100_000, np.float32))]
network = Sequential([layers.Input((300,)), layers.Dense(300)])
write_checkpoint(folder / "checkpoint.npz", small, {"epoch": 1})
(folder / "network.weights.h5").write_bytes(b"before")
run = Run(folder)
run.log("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: write_checkpoint(folder / "checkpoint.npz", large, {"epoch": 2}),
    lambda: save_weights(network, folder / "network.weights.h5"),
    lambda: run.log("large", text="x" * 30_000),
):
    try:
        write()
        print("written")
    except OSError as error:
        print(error)
assert read_state(folder / "checkpoint.npz") == {"epoch": 1}
assert (folder / "network.weights.h5").read_bytes() == b"before"
run.log("after")
"""


@pytest.mark.slow
def test_after_a_full_disk_the_last_checkpoint_and_whole_lines_stand(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert len(said) == 3
    assert all(str(tmp_path) in line for line in said)
    assert "400,000 bytes are needed" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.npz", "log.jsonl", "network.weights.h5"]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["before", "after"]
