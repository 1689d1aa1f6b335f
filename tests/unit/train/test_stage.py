"""One training stage: it learns, stops, resumes exactly, keeps the best, and fails with words."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from dlfer.config.schema import ExperimentSection, StageConfig
from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.errors import ModelError, NonFiniteError, TrainingStopped
from dlfer.model.stage_network import build_transfer_network
from dlfer.runs.files import read_rows
from dlfer.runs.listeners import Listener, Listeners
from dlfer.train.cluster import choose_device, set_determinism
from dlfer.train.loop import FitLoop
from dlfer.train.progress import StopControl, TrainingListener
from dlfer.train.stage import BEST, CHECKPOINT, HISTORY, MILESTONES, NEXT_BEST, _Stage, train_stage
from dlfer.train.state import COLUMNS, StageJob, read_state, restore_checkpoint

EVERYTHING = {
    "epochs": 3,
    "batch_size": 16,
    "image_size": 32,
    "freeze": {"head_epochs": 1},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "augment": {"rotation": 20.0, "zoom": 0.2, "shift": 0.1, "mirror": 0.5, "mixup": 0.2, "erasing": 0.3},
    "loss": {"label_smoothing": 0.1},
    "balance": "sampler",
    "ema": 0.9,
    "clip": 1.0,
}


def make_config(**given) -> StageConfig:
    return StageConfig.model_validate({"data": {"source": "synthetic_faces"}, **given})


def make_bundle(num_train: int = 64) -> DataBundle:
    """Three classes of grey squares: dark, middle, bright."""
    rng = np.random.default_rng(0)

    def split(name: str, count: int) -> Split:
        targets = np.arange(count) % 3
        noise = rng.integers(0, 40, (count, 24, 24, 1))
        images = (noise + 90 * targets[:, None, None, None]).astype(np.uint8)
        return Split(name, images, targets, np.array([f"{name}/{i}" for i in range(count)]))

    return DataBundle("arrays", ("dark", "middle", "bright"), split("train", num_train), split("validation", 30), None)


class StopAfter(TrainingListener):
    """Asks for a stop after so many steps."""

    def __init__(self, control: StopControl, steps: int) -> None:
        super().__init__()
        self.control, self.left = control, steps

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        self.left -= 1
        if self.left == 0:
            self.control.request("SIGTERM")


def make_job(config: StageConfig, folder, *, stop_after: int | None = None, deterministic: bool = True) -> StageJob:
    section = ExperimentSection(name="x", deterministic=deterministic)
    set_determinism(section)
    control = StopControl()
    listener = StopAfter(control, stop_after) if stop_after else TrainingListener()
    return StageJob("finetune", config, folder, 3, choose_device(section), 60.0, control, listener)


def build(seed: int = 0, dropout: float = 0.3):
    keras.utils.set_random_seed(seed)
    config = ModelConfig(backbone="resnet_nano", dropout=dropout)
    return build_transfer_network(config, num_labels=3, image_size=32, channels=1)


def weights_of(network) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in network.model.weights]


class Recorder(Listener):
    def __init__(self) -> None:
        self.steps, self.epochs = [], []

    def step(self, stage, epoch, step, steps, values):
        self.steps.append((stage, epoch, step, steps, dict(values)))

    def epoch(self, stage, epoch, values):
        self.epochs.append((stage, epoch, dict(values)))


@pytest.mark.slow
def test_listeners_hear_each_step_and_each_epoch_of_history(tmp_path):
    recorder, config = Recorder(), make_config(epochs=2, batch_size=16, image_size=32)
    job = dataclasses.replace(make_job(config, tmp_path), run_listeners=Listeners([recorder]))
    result = train_stage(job, build(), make_bundle(64))
    assert [given[:4] for given in recorder.steps] == [("finetune", e, s, 4) for e in (1, 2) for s in (1, 2, 3, 4)]
    assert all(values.keys() == {"loss", "accuracy"} for *_, values in recorder.steps)
    assert [given[:2] for given in recorder.epochs] == [("finetune", 1), ("finetune", 2)]
    for (_, _, values), row in zip(recorder.epochs, result.history, strict=True):
        assert values == {name: row[name] for name in COLUMNS if name not in ("epoch", "phase")}
        assert all(type(value) is float for value in values.values())


@pytest.mark.slow
def test_a_listener_that_raises_changes_no_weight(tmp_path):
    class Broken(Listener):
        def step(self, *arguments):
            raise RuntimeError("step")

    warnings, config = [], make_config(**EVERYTHING)
    whole, watched = build(), build()
    train_stage(make_job(config, tmp_path / "a"), whole, make_bundle())
    job = make_job(config, tmp_path / "b")
    train_stage(dataclasses.replace(job, run_listeners=Listeners([Broken()], warnings.append)), watched, make_bundle())
    assert len(warnings) == 1
    assert all(np.array_equal(*pair) for pair in zip(weights_of(whole), weights_of(watched), strict=True))


def test_it_learns_what_is_easy(tmp_path):
    config = make_config(epochs=6, batch_size=16, image_size=32, optimizer={"name": "adam", "learning_rate": 5e-3})
    result = train_stage(make_job(config, tmp_path), build(dropout=0.0), make_bundle(192))
    assert result.best > 0.9
    assert result.images == 6 * 192
    rows = read_rows(tmp_path / HISTORY)
    assert list(rows[0]) == list(COLUMNS)
    assert [row["epoch"] for row in rows] == list("123456")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training with everything that is random switched on, from start to end."""
    network = build()
    folder = tmp_path_factory.mktemp("whole")
    result = train_stage(make_job(make_config(**EVERYTHING), folder), network, make_bundle())
    return result, weights_of(network)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 6, 11))])
def test_resume_is_exact(tmp_path, uninterrupted, stop_after):
    """Stopped in the head's epoch, at its end, in the middle of the next and of the last: the same weights."""
    expected, weights = uninterrupted
    config = make_config(**EVERYTHING)
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM"):
        train_stage(make_job(config, tmp_path, stop_after=stop_after), build(), make_bundle())
    # Another process would start with other initial weights and other seeds: nothing of them may matter.
    resumed = build(seed=99)
    result = train_stage(make_job(config, tmp_path), resumed, make_bundle())
    assert all(np.array_equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True))
    for row, other in zip(expected.history, result.history, strict=True):
        assert row["validation_loss"] == other["validation_loss"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_finished_stage_is_not_trained_again(tmp_path):
    config = make_config(epochs=1, batch_size=16, image_size=32)
    first, second = build(), build(seed=5)
    done = train_stage(make_job(config, tmp_path), first, make_bundle())
    again = train_stage(make_job(config, tmp_path), second, make_bundle())
    assert again.images == done.images
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(first), weights_of(second), strict=True))


@pytest.mark.slow
def test_a_row_that_a_killed_process_did_not_write_is_in_the_history(tmp_path):
    config = make_config(epochs=2, batch_size=16, image_size=32)
    train_stage(make_job(config, tmp_path), build(), make_bundle())
    whole = (tmp_path / "history.csv").read_text()
    (tmp_path / "history.csv").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train_stage(make_job(config, tmp_path), build(), make_bundle())
    assert (tmp_path / "history.csv").read_text() == whole
    assert len(whole.splitlines()) == 3


@pytest.mark.slow
def test_a_stop_that_another_host_was_asked_for_between_two_epochs_stops_this_one(tmp_path, monkeypatch):
    wishes = []

    def agree(loop, *own: bool) -> tuple[bool, ...]:
        wishes.append(own)
        # Those of steps are two, those between epochs one.
        return own if len(own) == 2 else (True,)

    monkeypatch.setattr(FitLoop, "agree", agree)
    config = make_config(epochs=2, batch_size=16, image_size=32)
    with pytest.raises(TrainingStopped, match="stopped by another host after epoch 1"):
        train_stage(make_job(config, tmp_path), build(), make_bundle())
    assert wishes[-1] == (False,)


@pytest.mark.slow
@pytest.mark.parametrize(("balance", "images"), [("undersample", 12), ("augment", 30), ("none", 30)])
def test_images_of_a_step_are_those_that_balance_leaves(tmp_path, balance, images):
    """A batch of 40 holds the whole of a small split: 4 images of each class, 10 of each, or all of them."""
    bundle = make_bundle(30)
    rows = np.flatnonzero((bundle.train.targets != 2) | (np.arange(30) < 12))
    if balance != "none":
        bundle = dataclasses.replace(bundle, train=bundle.train.take(rows))
    config = make_config(epochs=1, batch_size=40, image_size=32, balance=balance, augment={"mirror": 0.5})
    result = train_stage(make_job(config, tmp_path), build(), bundle)
    assert result.images == images


@pytest.mark.slow
def test_seeds_differ_and_repeat(tmp_path):
    config = make_config(epochs=1, batch_size=16, image_size=32, augment={"rotation": 10.0})
    found = []
    for number, seed in enumerate((3, 3, 4)):
        network = build()
        job = dataclasses.replace(make_job(config, tmp_path / str(number)), seed=seed)
        train_stage(job, network, make_bundle())
        found.append(np.concatenate([w.ravel() for w in weights_of(network)]))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_frozen_backbone_does_not_move_and_the_head_does(tmp_path):
    config = make_config(epochs=2, batch_size=16, image_size=32, freeze={"layers": 1.0}, keep="last")
    network = build()
    before = [np.asarray(w) for w in network.backbone.trainable_weights]
    kernel = np.asarray(network.head.kernel)
    trained = network.backbone.trainable_weights
    train_stage(make_job(config, tmp_path), network, make_bundle())
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, trained, strict=True))
    assert not np.array_equal(kernel, np.asarray(network.head.kernel))


@pytest.mark.slow
def test_frozen_batch_norm_keeps_its_statistics_while_kernels_move(tmp_path):
    config = make_config(epochs=1, batch_size=16, image_size=32, freeze={"batch_norm": "frozen"}, keep="last")
    network = build()
    norm, conv = network.backbone.get_layer("conv1_bn"), network.backbone.get_layer("conv1_conv")
    statistics, kernel = [np.asarray(w) for w in norm.weights], np.asarray(conv.kernel)
    train_stage(make_job(config, tmp_path), network, make_bundle())
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(statistics, norm.weights, strict=True))
    assert not np.array_equal(kernel, np.asarray(conv.kernel))


def test_the_best_epoch_is_kept(tmp_path):
    """A rate that destroys the network in the end: the kept weights give the best figure again."""
    config = make_config(epochs=4, batch_size=16, image_size=32, optimizer={"name": "adam", "learning_rate": 5e-2})
    network = build(dropout=0.0)
    bundle = make_bundle()
    result = train_stage(make_job(config, tmp_path), network, bundle)
    predicted = network.model.predict(bundle.validation.images, verbose=0).argmax(axis=1)
    assert (predicted == bundle.validation.targets).mean() == pytest.approx(result.best)
    assert result.best == max(row["validation_accuracy"] for row in result.history)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is done, and nothing is cleaned up that is not cleaned up by itself."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_before", "redone", "best_epoch"),
    [
        # The weights of epoch 1 are written, and no checkpoint knows of them; done again, the epoch turns out worse.
        ("the checkpoint", 0.2, 0),
        ("the checkpoint", 0.95, 1),
        # The checkpoint records epoch 1, whose weights have not their name yet.
        ("the name", 0.2, 1),
    ],
)
def test_a_kill_around_the_best_weights_never_keeps_those_of_an_unrecorded_epoch(
    tmp_path, monkeypatch, killed_before, redone, best_epoch
):
    monitored, weights = [0.5, 0.9], {}

    def validate(stage):
        weights[stage.state.epoch, len(monitored)] = weights_of(stage.network)
        value = monitored[stage.state.epoch] if stage.state.epoch < len(monitored) else 0.1
        return {"loss": 1.0, "accuracy": value, "macro_f1": value}

    def die(*_):
        raise Killed

    monkeypatch.setattr(_Stage, "_validate", validate)
    config = make_config(epochs=3, batch_size=16, image_size=32, monitor="accuracy", balance="none")
    network = build(dropout=0.0)
    with monkeypatch.context() as killing:
        if killed_before == "the checkpoint":
            keep = _Stage.save
            killing.setattr(_Stage, "save", lambda stage: die() if stage.state.epoch == 2 else keep(stage))
        else:
            keep = _Stage._keep_next_best
            killing.setattr(_Stage, "_keep_next_best", lambda stage: die() if stage.state.epoch == 2 else keep(stage))
        with pytest.raises(Killed):
            train_stage(make_job(config, tmp_path), network, make_bundle())
    assert (tmp_path / NEXT_BEST).exists()
    assert read_state(tmp_path / BEST)["epoch"] == 0
    # Not every machine computes an epoch a second time to the same bits.
    monitored[1] = redone
    network = build(seed=1, dropout=0.0)
    result = train_stage(make_job(config, tmp_path), network, make_bundle())
    assert result.kept_epoch == best_epoch
    assert read_state(tmp_path / BEST)["epoch"] == best_epoch
    assert not (tmp_path / NEXT_BEST).exists()
    expected = weights[best_epoch, 2]
    assert all(np.array_equal(one, other) for one, other in zip(weights_of(network), expected, strict=True))


@pytest.mark.slow
def test_checkpoints_and_best_weights_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, order = set(), []
    sync, name = os.fsync, os.replace

    def note(number: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    def note_name(source, target, **named) -> None:
        order.append((str(source) in flushed, Path(target).name))
        name(source, target, **named)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", note_name)
    config = make_config(epochs=1, batch_size=16, image_size=32)
    train_stage(make_job(config, tmp_path), build(), make_bundle())
    assert {(True, CHECKPOINT), (True, NEXT_BEST), (True, HISTORY)} <= set(order)
    assert str(tmp_path) in flushed  # the names, too
    monkeypatch.undo()


def test_early_stopping_ends_and_plateau_lowers_the_rate(tmp_path):
    """Nothing moves: the first epoch is the only improvement, and patience ends with the second epoch after it."""
    config = make_config(
        epochs=9,
        batch_size=16,
        image_size=32,
        optimizer={"name": "sgd", "learning_rate": 1e-9},
        schedule={"name": "plateau", "patience": 1, "factor": 0.5},
        early_stopping={"patience": 2},
        freeze={"batch_norm": "frozen"},
    )
    result = train_stage(make_job(config, tmp_path), build(), make_bundle())
    assert result.stopped_early
    assert len(result.history) == 3
    assert [row["learning_rate"] for row in result.history] == pytest.approx([1e-9, 1e-9, 5e-10])


@pytest.mark.slow
def test_a_head_that_no_longer_improves_does_not_end_the_stage_before_the_backbone_is_trained(tmp_path):
    config = make_config(
        epochs=5,
        batch_size=16,
        image_size=32,
        optimizer={"name": "sgd", "learning_rate": 1e-9},
        early_stopping={"patience": 1},
        freeze={"head_epochs": 3, "batch_norm": "frozen"},
    )
    result = train_stage(make_job(config, tmp_path), build(), make_bundle())
    assert result.stopped_early
    assert [row["phase"] for row in result.history] == ["head", "head", "head", "all"]


STEP = {"optimizer": {"name": "sgd", "learning_rate": 4e-3}, "schedule": {"name": "step", "factor": 0.1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "head_epochs", "expected"),
    [
        ({"every_epochs": 5}, 0, [4e-3] * 5 + [4e-4] * 5 + [4e-5]),
        ({"every_epochs": 2, "start_epoch": 3}, 0, [4e-3] * 5 + [4e-4] * 2 + [4e-5]),
        # The epochs of the head have their own rate and do not count.
        ({"every_epochs": 2}, 3, [1e-2] * 3 + [4e-3] * 2 + [4e-4]),
        # What history has of an epoch is the rate of its last step, which the warm-up has left by then.
        ({"every_epochs": 2, "warmup_epochs": 1.0}, 0, [4e-3] * 2 + [4e-4] * 2),
    ],
)
def test_history_has_the_rates_that_a_step_schedule_trained_with(tmp_path, schedule, head_epochs, expected):
    config = make_config(
        **{**STEP, "schedule": {**STEP["schedule"], **schedule}},
        epochs=len(expected),
        batch_size=16,
        image_size=32,
        freeze={"head_epochs": head_epochs, "head_learning_rate": 1e-2},
    )
    train_stage(make_job(config, tmp_path), build(), make_bundle(32))
    found = [float(row["learning_rate"]) for row in read_rows(tmp_path / HISTORY)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_steps_are_as_long_as_the_step_schedule_says(tmp_path, monkeypatch):
    """With a gradient of 1 everywhere, plain SGD moves each weight by the rate; two steps an epoch."""
    moved = []

    class Watch(TrainingListener):
        def finish_step(self, step: int, loss: float, accuracy: float) -> None:
            moved.append(float(np.asarray(network.head.bias)[0]))

    monkeypatch.setattr("dlfer.train.stage.build_loss", lambda *_, **__: SumOfLogits())
    config = make_config(
        **{**STEP, "schedule": {"name": "step", "factor": 0.1, "every_epochs": 5}},
        epochs=11, batch_size=16, image_size=32, clip=None,
    )  # fmt: skip
    network = build(dropout=0.0)
    job = dataclasses.replace(make_job(config, tmp_path), listener=Watch())
    train_stage(job, network, make_bundle(32))
    expected = np.repeat([4e-3] * 5 + [4e-4] * 5 + [4e-5], 2)
    assert -np.diff([0.0, *moved]) == pytest.approx(expected, rel=1e-3)


class SumOfLogits(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.sum(y_pred, axis=-1)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_same_patience(tmp_path, monkeypatch):
    """Its state has no value at the last improvement, which follows from the history."""
    values = iter([0.5, 0.507, 0.512, 0.513, 0.514])
    monkeypatch.setattr(
        "dlfer.train.stage._Stage._validate",
        lambda self: {"loss": 1.0, "macro_f1": 0.5, "accuracy": next(values)},
    )
    config = make_config(
        epochs=5, batch_size=16, image_size=32, early_stopping={"patience": 2, "min_delta": 0.01}, keep="last"
    )
    # Two steps an epoch: stopped in the third.
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path, stop_after=5), build(), make_bundle(32))
    monkeypatch.setattr("dlfer.train.stage.read_state", lambda path: without_reference(read_state(path)))
    result = train_stage(make_job(config, tmp_path), build(), make_bundle(32))
    # 0.512 is an improvement on 0.5, 0.513 and 0.514 are none on 0.512.
    assert result.stopped_early
    assert len(result.history) == 5


def without_reference(state: dict) -> dict:
    assert state["reference"] == 0.5
    return {name: value for name, value in state.items() if name != "reference"}


def test_a_loss_that_is_not_finite_stops_with_step_and_values(tmp_path):
    config = make_config(epochs=2, batch_size=16, image_size=32, optimizer={"name": "sgd", "learning_rate": 1e30})
    with pytest.raises(NonFiniteError, match=r"epoch 1, step \d+ of 4 \(learning rate 1e\+30; running losses before: "):
        train_stage(make_job(config, tmp_path), build(), make_bundle())


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"clip": None}, "Lower optimizer.learning_rate, set clip: 1.0 or set schedule.warmup_epochs: 1."),
        (
            {"clip": 0.5, "schedule": {"name": "cosine", "warmup_epochs": 0.5}},
            "Lower optimizer.learning_rate, lower clip (now 0.5) or raise schedule.warmup_epochs.",
        ),
        ({"schedule": {"name": "plateau"}}, "Lower optimizer.learning_rate or lower clip (now 1)."),
    ],
)
def test_the_advice_against_a_loss_that_is_not_finite_is_none_that_is_followed_already(tmp_path, given, advice):
    config = make_config(epochs=1, batch_size=16, image_size=32, **given)
    stage = _Stage(make_job(config, tmp_path), build(), make_bundle())
    assert stage._advise() == advice


def test_train_learns_by_class_weights_of_the_whole_split(tmp_path):
    """One class of 60 among 64: with class_weight, and mixup, the loss of a stage is that of the weighted targets."""
    config = make_config(epochs=1, batch_size=16, image_size=32, balance="class_weight", augment={"mixup": 0.3})
    bundle = make_bundle()
    rare = np.zeros(64, np.int64)
    rare[:4] = [1, 1, 2, 2]
    bundle = dataclasses.replace(bundle, train=dataclasses.replace(bundle.train, targets=rare))
    stage = _Stage(make_job(config, tmp_path), build(), bundle)
    stage._enter_phase("all")
    weights = stage.loop.training.loss.class_weights
    assert weights * [60, 2, 2] == pytest.approx([64 / 3] * 3)


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    config = make_config(epochs=2, batch_size=16, image_size=32)
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path, stop_after=1), build(), make_bundle())
    other = build_transfer_network(ModelConfig(backbone="efficientnet_lite0"), num_labels=3, image_size=32, channels=1)
    with pytest.raises(ModelError, match="start a new run"):
        train_stage(make_job(config, tmp_path), other, make_bundle())
    assert (tmp_path / CHECKPOINT).exists()


def test_a_stage_whose_file_is_lost_is_not_begun_again_nor_trained_to_its_end_in_vain(tmp_path):
    config = make_config(epochs=3, batch_size=16, image_size=32)
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path, stop_after=5), build(), make_bundle())
    history = (tmp_path / HISTORY).read_text()
    assert len(history.splitlines()) == 2
    for lost, to_delete in ((CHECKPOINT, "history.csv and best.npz"), (BEST, "checkpoint.npz and history.csv")):
        kept = (tmp_path / lost).read_bytes()
        (tmp_path / lost).unlink()
        with pytest.raises(ModelError, match=f"{lost}: this file is missing, .* here, delete {to_delete}."):
            train_stage(make_job(config, tmp_path), build(), make_bundle())
        assert (tmp_path / HISTORY).read_text() == history
        (tmp_path / lost).write_bytes(kept)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"ema": 0.9}])
def test_a_milestone_is_the_network_of_a_training_that_ends_there(tmp_path, given):
    """Interrupted in the epoch after it, too; the training itself goes on as without milestones."""
    given = {"batch_size": 32, "image_size": 32, "augment": {"mirror": 0.5}, "keep": "last", **given}
    shorter = build()
    train_stage(make_job(make_config(epochs=1, **given), tmp_path / "short"), shorter, make_bundle())
    config = make_config(epochs=2, milestones=(1, 2), **given)
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path / "long", stop_after=3), build(), make_bundle())
    resumed, plain = build(seed=7), build()
    train_stage(make_job(config, tmp_path / "long"), resumed, make_bundle())
    folder = tmp_path / "long" / MILESTONES
    assert sorted(path.name for path in folder.iterdir()) == ["1.npz", "2.npz"]
    end = weights_of(resumed)
    for epoch, expected in ((1, weights_of(shorter)), (2, end)):
        assert restore_checkpoint(folder / f"{epoch}.npz", resumed.model.weights) == {"epoch": epoch}
        assert all(np.array_equal(a, b) for a, b in zip(expected, weights_of(resumed), strict=True))
    train_stage(make_job(make_config(epochs=2, **given), tmp_path / "plain"), plain, make_bundle())
    assert all(np.array_equal(a, b) for a, b in zip(end, weights_of(plain), strict=True))


@pytest.mark.parametrize("milestones", [(3,), (2, 1), (1, 1)])
def test_milestones_beyond_the_end_or_out_of_order_are_refused(milestones):
    with pytest.raises(ValueError, match="rising numbers of epochs"):
        make_config(epochs=2, milestones=milestones)


@pytest.mark.slow
def test_a_network_of_parts_with_hidden_layers_resumes_exactly(tmp_path):
    """Random parts of the images, two dense layers with dropout before the last: stopped and resumed, alike."""

    def build_head(seed: int):
        keras.utils.set_random_seed(seed)
        config = ModelConfig(backbone="efficientnet_nano", dropout=0.5, head=HeadConfig(hidden=(12, 8)))
        return build_transfer_network(config, num_labels=3, image_size=32, crop=0.75, channels=1)

    config = make_config(epochs=2, batch_size=16, image_size=32, crop=0.75, augment={"mirror": 0.5}, keep="last")
    whole, resumed = build_head(0), build_head(9)
    before = [np.asarray(weight) for weight in whole.head.weights]
    train_stage(make_job(config, tmp_path / "whole"), whole, make_bundle())
    assert [tuple(weight.shape) for weight in before][::2] == [(128, 12), (12, 8), (8, 3)]
    assert all(not np.array_equal(a, b) for a, b in zip(before, whole.head.weights, strict=True))
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path / "parts", stop_after=5), build_head(0), make_bundle())
    train_stage(make_job(config, tmp_path / "parts"), resumed, make_bundle())
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(resumed), strict=True))


@pytest.mark.slow
def test_auxiliary_heads_learn_resume_exactly_and_are_left_out_of_predictions(tmp_path):
    def build_googlenet(seed: int, auxiliary: bool = True):
        keras.utils.set_random_seed(seed)
        config = ModelConfig(backbone="googlenet", auxiliary_heads=auxiliary, dropout=0.4)
        return build_transfer_network(config, num_labels=3, image_size=48, channels=1)

    config = make_config(epochs=2, batch_size=8, image_size=48, keep="last", ema=0.9)
    bundle = make_bundle(16)
    whole, plain, resumed = build_googlenet(0), build_googlenet(0, auxiliary=False), build_googlenet(5)
    assert len(whole.auxiliary) == 2
    # The rest begins alike, and what predicts and is saved is the same network.
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(plain), strict=True))
    before = [np.asarray(v) for v in whole.variables[len(whole.model.variables) :] if "seed" not in v.path]
    train_stage(make_job(config, tmp_path / "whole"), whole, bundle)
    after = [np.asarray(v) for v in whole.variables[len(whole.model.variables) :] if "seed" not in v.path]
    assert len(before) == 12
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(TrainingStopped):
        train_stage(make_job(config, tmp_path / "parts", stop_after=3), build_googlenet(0), bundle)
    train_stage(make_job(config, tmp_path / "parts"), resumed, bundle)
    for variable, other in zip(whole.variables, resumed.variables, strict=True):
        assert np.array_equal(variable, other)
    train_stage(make_job(config, tmp_path / "plain"), plain, bundle)
    assert any(not np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(plain), strict=True))


READ = "import sys; from dlfer.train.stage import read_network; print(len(read_network(sys.stdin.read()).weights))"


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"backbone": "efficientnet_nano"}, {"backbone": "googlenet"}])
def test_a_fresh_process_knows_every_layer_of_ours(model):
    network = build_transfer_network(ModelConfig(**model), num_labels=7, image_size=48, channels=1).model
    done = subprocess.run([sys.executable, "-c", READ], input=network.to_json(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(network.weights)
