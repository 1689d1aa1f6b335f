"""Trees against their formulas, the same trees after a stop, and features that are computed once."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlfer.config.schema import EarlyStopping, StageConfig
from dlfer.config.sections import BoostingConfig, DataConfig, ModelConfig, NormalizeConfig
from dlfer.data.bundle import Split
from dlfer.data.pipeline import compute_class_weights
from dlfer.errors import ModelError, TrainingStopped
from dlfer.metrics.classification import compute_item_losses
from dlfer.model.families import build_level_features
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.trees import import_xgboost, make_parameters
from dlfer.runs.files import read_rows
from dlfer.runs.listeners import Listener, Listeners
from dlfer.train.boosting import (
    HISTORY,
    STATE,
    TREES,
    Extraction,
    TreeData,
    compute_features_digest,
    compute_importance,
    extract_features,
    grow_trees,
)
from dlfer.train.cluster import Device
from dlfer.train.progress import StopControl, TrainingListener
from dlfer.train.state import StageJob

NUM_LABELS = 3
PLAIN = BoostingConfig(max_depth=1, learning_rate=1.0, reg_lambda=0.0, gamma=0.0, min_child_weight=0.0, colsample=1.0)


def draw_rows(count: int = 200, features: int = 12, *, seed: int = 0) -> TreeData:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, features)).astype(np.float32)
    targets = (values[:, :NUM_LABELS] + rng.normal(size=(count, NUM_LABELS))).argmax(axis=1)
    return TreeData(values, targets, compute_class_weights(np.bincount(targets))[targets])


def make_job(folder: Path, *, listener: TrainingListener | None = None, **stage) -> StageJob:
    config = StageConfig(data=DataConfig(source="synthetic_faces"), **{"epochs": 4, "monitor": "loss", **stage})
    device = Device("cpu", "CPU", False, "tensorflow")
    return StageJob("finetune", config, folder, 3, device, 0.0, StopControl(), listener or TrainingListener())


def grow(folder: Path, config: BoostingConfig, *, job: StageJob | None = None):
    job = job or make_job(folder)
    return grow_trees(job, config, draw_rows(), draw_rows(60, seed=1), num_labels=NUM_LABELS)


def test_listeners_hear_each_round_and_each_epoch(tmp_path):
    heard = []

    class Recorder(Listener):
        def step(self, stage, epoch, step, steps, values):
            heard.append((stage, epoch, step, steps))

        def epoch(self, stage, epoch, values):
            heard.append((stage, epoch, values["validation_loss"]))

    job = replace(make_job(tmp_path, epochs=2), run_listeners=Listeners([Recorder()]))
    _, result = grow(tmp_path, BoostingConfig(rounds_per_epoch=2, max_depth=1), job=job)
    losses = [row["validation_loss"] for row in result.history]
    first = [("finetune", 1, 1, 2), ("finetune", 1, 2, 2), ("finetune", 1, losses[0])]
    assert heard == [*first, ("finetune", 2, 1, 2), ("finetune", 2, 2, 2), ("finetune", 2, losses[1])]


def grow_one_split(config: BoostingConfig, rows: TreeData) -> list[dict]:
    """Return the first tree of each class, as XGBoost dumps it, with its gain."""
    xgb = import_xgboost()
    matrix = xgb.DMatrix(rows.features, label=rows.targets, weight=rows.weights)
    booster = xgb.train(make_parameters(config, num_labels=NUM_LABELS, seed=0), matrix, 1)
    return [json.loads(tree) for tree in booster.get_dump(with_stats=True, dump_format="json")]


@pytest.mark.parametrize(
    ("reg_lambda", "learning_rate", "leaves"), [(0.0, 1.0, False), (2.0, 0.3, False), (0.0, 1.0, True)]
)
def test_split_gain_and_leaf_weights_are_those_of_the_formulas(reg_lambda, learning_rate, leaves):
    """S and V by hand at the uniform start p = 1/C; V has XGBoost's factor 2, an upper bound of the Hessian."""
    # Class 2 stands above 0.5 in the one feature, but for one row; classes 0 and 1 below.
    values = np.array([[0.1], [0.2], [0.3], [0.4], [0.6], [0.7], [0.8]], np.float32)
    targets = np.array([0, 1, 0, 1, 2, 2, 2])
    weights = np.array([1, 2, 1, 1, 3, 1, 0.5], np.float32)
    normalize = NormalizeConfig(leaves=leaves)
    config = PLAIN.model_copy(update={"reg_lambda": reg_lambda, "learning_rate": learning_rate, "normalize": normalize})
    tree = grow_one_split(config, TreeData(values, targets, weights))[2]
    p = 1 / NUM_LABELS
    first = weights * (p - (targets == 2))
    second = weights * 2 * p * (1 - p)
    is_left = values[:, 0] < tree["split_condition"]
    assert is_left.tolist() == [True] * 4 + [False] * 3
    sums = {
        side: (first[rows].sum(), second[rows].sum() + reg_lambda)
        for side, rows in (("left", is_left), ("right", ~is_left), ("all", np.full(7, True)))
    }
    if not leaves:
        gain = sum(sign * sums[side][0] ** 2 / sums[side][1] for side, sign in (("left", 1), ("right", 1), ("all", -1)))
        assert tree["gain"] / 2 == pytest.approx(gain / 2, rel=1e-5)
    for child, side in zip(tree["children"], ("left", "right"), strict=True):
        s, v = sums[side]
        weight = np.clip(-s / v, -1, 1) if leaves else -s / v
        assert child["leaf"] == pytest.approx(learning_rate * weight, rel=1e-5)
    if leaves:
        assert abs(-sums["right"][0] / sums["right"][1]) > 1, "nothing was to be bounded"


def test_at_a_rate_of_2_a_leaf_is_newtons_step_of_its_class():
    """-S/V with V the sum of p (1-p), the diagonal of the Hessian: what f_k = f_(k-1) + b adds. Second round, too."""
    xgb = import_xgboost()
    rng = np.random.default_rng(3)
    values = np.arange(40, dtype=np.float32)[:, None]
    targets = (rng.random(40) < np.where(values[:, 0] < 15, 0.8, 0.2)) * (1 + rng.integers(0, 2, 40))
    config = BoostingConfig.model_validate({**PLAIN.model_dump(mode="json"), "learning_rate": 2.0})
    matrix = xgb.DMatrix(values, label=targets)
    booster = xgb.Booster(make_parameters(config, num_labels=NUM_LABELS, seed=0), [matrix])
    probabilities = np.full((40, NUM_LABELS), 1 / NUM_LABELS)
    for number in range(2):
        booster.update(matrix, number)
        dumped = booster.get_dump(dump_format="json")[number * NUM_LABELS : (number + 1) * NUM_LABELS]
        for label, tree in enumerate(json.loads(text) for text in dumped):
            s = probabilities[:, label] - (targets == label)
            v = probabilities[:, label] * (1 - probabilities[:, label])
            is_left = values[:, 0] < tree["split_condition"]
            for child, rows in zip(tree["children"], (is_left, ~is_left), strict=True):
                assert child["leaf"] == pytest.approx(-s[rows].sum() / v[rows].sum(), rel=1e-4)
        probabilities = booster.predict(matrix).astype(np.float64)


def test_a_rate_beyond_newtons_step_is_refused():
    with pytest.raises(ValueError, match="less than or equal to 2"):
        BoostingConfig(learning_rate=2.1)


def test_growing_that_an_earlier_version_began_goes_on_with_the_same_patience(tmp_path):
    """Its state has no value at the last improvement, which follows from the history."""
    stage = {"early_stopping": EarlyStopping(patience=3, min_delta=0.01), "epochs": 12}
    whole, result = grow(tmp_path / "whole", RANDOM, job=make_job(tmp_path / "whole", **stage))
    listener = StopAfter(6)
    job = make_job(tmp_path / "cut", listener=listener, **stage)
    with pytest.raises(TrainingStopped):
        grow(tmp_path / "cut", RANDOM, job=replace(job, control=listener.control))
    path = tmp_path / "cut" / STATE
    state = json.loads(path.read_text())
    assert state.pop("reference") is not None
    path.write_text(json.dumps(state))
    resumed, again = grow(tmp_path / "cut", RANDOM, job=make_job(tmp_path / "cut", **stage))
    assert (len(again.history), resumed.save_raw("ubj")) == (len(result.history), whole.save_raw("ubj"))


def test_a_split_needs_the_gain_gamma():
    rows = draw_rows()
    gain = grow_one_split(PLAIN, rows)[0]["gain"]
    assert "leaf" not in grow_one_split(PLAIN.model_copy(update={"gamma": 0.99 * gain}), rows)[0]
    assert "leaf" in grow_one_split(PLAIN.model_copy(update={"gamma": 1.01 * gain}), rows)[0]


def test_a_row_of_weight_two_is_that_row_twice():
    rows = draw_rows(60)
    twice = np.r_[np.arange(60), np.flatnonzero(rows.targets == 0)]
    weights = np.where(rows.targets == 0, 2.0, 1.0).astype(np.float32)
    weighted = grow_one_split(PLAIN, TreeData(rows.features, rows.targets, weights))
    repeated = grow_one_split(PLAIN, TreeData(rows.features[twice], rows.targets[twice]))
    for one, other in zip(weighted, repeated, strict=True):
        assert one["split"] == other["split"]
        assert [c["leaf"] for c in one["children"]] == pytest.approx([c["leaf"] for c in other["children"]], rel=1e-5)


class StopAfter(TrainingListener):
    """Asks for a stop after so many rounds."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.left, self.control = rounds, StopControl()

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.control.request("SIGTERM")


RANDOM = BoostingConfig(rounds_per_epoch=3, max_depth=3, subsample=0.7, colsample=0.4)


@pytest.mark.parametrize("rounds", [1, 3, 8, 9])
def test_stopped_and_resumed_the_trees_are_the_very_same(tmp_path, rounds):
    """In an epoch, between two, in the last but one: subsampling and drawn features included."""
    whole, result = grow(tmp_path / "whole", RANDOM)
    listener = StopAfter(rounds)
    job = replace(make_job(tmp_path / "cut", listener=listener), control=listener.control)
    with pytest.raises(TrainingStopped) as stop:
        grow(tmp_path / "cut", RANDOM, job=job)
    assert stop.value.reason == "SIGTERM"
    done = json.loads((tmp_path / "cut" / STATE).read_text())["epoch"] if rounds >= 3 else 0
    assert done == rounds // 3
    resumed, again = grow(tmp_path / "cut", RANDOM)
    assert resumed.save_raw("ubj") == whole.save_raw("ubj")
    assert [row["validation_loss"] for row in again.history] == [row["validation_loss"] for row in result.history]
    assert (tmp_path / "cut" / TREES).read_bytes() == (tmp_path / "whole" / TREES).read_bytes()


def test_trees_whose_state_is_lost_are_not_grown_again(tmp_path):
    listener = StopAfter(6)
    with pytest.raises(TrainingStopped):
        grow(tmp_path, RANDOM, job=replace(make_job(tmp_path, listener=listener), control=listener.control))
    (tmp_path / STATE).unlink()
    with pytest.raises(ModelError, match=r"state\.json: this file is missing, .* delete history\.csv"):
        grow(tmp_path, RANDOM)


def test_trees_written_without_their_state_are_taken_away(tmp_path):
    """A kill between the two files: the next epoch's trees stand beside the state of the one before."""
    whole, _ = grow(tmp_path / "whole", RANDOM)
    listener = StopAfter(6)
    with pytest.raises(TrainingStopped):
        grow(
            tmp_path / "cut",
            RANDOM,
            job=replace(make_job(tmp_path / "cut", listener=listener), control=listener.control),
        )
    (tmp_path / "cut" / TREES).write_bytes((tmp_path / "whole" / TREES).read_bytes())
    assert grow(tmp_path / "cut", RANDOM)[0].save_raw("ubj") == whole.save_raw("ubj")
    assert (tmp_path / "cut" / TREES).read_bytes() == (tmp_path / "whole" / TREES).read_bytes()


def test_a_row_that_a_killed_process_did_not_write_is_in_the_history(tmp_path):
    grow(tmp_path, RANDOM)
    whole = (tmp_path / HISTORY).read_text()
    (tmp_path / HISTORY).write_text("".join(whole.splitlines(keepends=True)[:-1]))
    grow(tmp_path, RANDOM)
    assert (tmp_path / HISTORY).read_text() == whole


def test_each_epoch_draws_anew(tmp_path):
    """At a rate of next to nothing the gradients stay as they are: only what is drawn can make trees differ."""
    still = RANDOM.model_copy(update={"learning_rate": 1e-9})
    booster, _ = grow(tmp_path, still, job=make_job(tmp_path, keep="last"))
    splits = [[line.split("<")[0] for line in tree.splitlines()] for tree in booster.get_dump()]
    a_round = NUM_LABELS
    assert splits[0] != splits[3 * a_round]
    assert splits[0] != splits[a_round]


def test_damaged_trees_of_an_interrupted_run_are_refused(tmp_path):
    grow(tmp_path, RANDOM)
    (tmp_path / TREES).write_bytes(b"{")
    with pytest.raises(ModelError, match="to grow it again"):
        grow(tmp_path, RANDOM)


def test_another_seed_draws_other_trees_and_the_same_one_the_same(tmp_path):
    first, same = (grow(tmp_path / name, RANDOM)[0].save_raw("ubj") for name in "ab")
    other = grow(tmp_path / "c", RANDOM, job=replace(make_job(tmp_path / "c"), seed=4))[0].save_raw("ubj")
    assert first == same
    assert first != other


def test_history_has_what_the_kept_trees_score(tmp_path):
    booster, result = grow(tmp_path, RANDOM)
    rows = read_rows(tmp_path / HISTORY)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    validation = draw_rows(60, seed=1)
    predicted = booster.predict(import_xgboost().DMatrix(validation.features))
    assert float(rows[result.kept_epoch]["validation_loss"]) == pytest.approx(
        compute_item_losses(validation.targets, predicted).mean()
    )
    assert result.best == min(float(row["validation_loss"]) for row in rows)


def test_the_best_epoch_is_kept_and_the_growing_stops_early(tmp_path):
    greedy = RANDOM.model_copy(update={"learning_rate": 1.0, "max_depth": 6})
    booster, result = grow(
        tmp_path / "best", greedy, job=make_job(tmp_path / "best", epochs=30, early_stopping=EarlyStopping(patience=2))
    )
    losses = [row["validation_loss"] for row in result.history]
    assert result.stopped_early
    assert result.kept_epoch == int(np.argmin(losses)) == len(losses) - 3
    assert booster.num_boosted_rounds() == 3 * (result.kept_epoch + 1)
    last, _ = grow(tmp_path / "last", greedy, job=make_job(tmp_path / "last", epochs=4, keep="last"))
    assert last.num_boosted_rounds() == 12


def test_importance_belongs_to_the_level_whose_features_tell_the_classes():
    rng = np.random.default_rng(0)
    targets = np.arange(90) % NUM_LABELS
    values = rng.normal(size=(90, 7)).astype(np.float32)
    values[:, 4] += 9 * targets
    xgb = import_xgboost()
    booster = xgb.train(make_parameters(PLAIN, num_labels=3, seed=0), xgb.DMatrix(values, label=targets), 1)
    first, second, third = compute_importance(booster, [3, 3, 1])
    assert second["gain"] > 0.95
    assert first["gain"] + second["gain"] + third["gain"] == pytest.approx(1)
    assert second["used"] >= 1
    assert sum(level["splits"] for level in (first, second, third)) == 3


# Features


def make_extraction(cache: Path | None, *, listener: TrainingListener | None = None, seed: int = 0) -> Extraction:
    import keras

    keras.utils.set_random_seed(seed)
    config = ModelConfig(family="boosted", backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    features = build_level_features(network, config, BoostingConfig())
    return Extraction(features, network, 8, cache, StopControl(), listener or TrainingListener())


def draw_split(count: int = 30) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 1)).astype(np.uint8)
    return Split("train", images, np.arange(count) % 3, np.array([f"a/{n:03d}" for n in range(count)]))


@pytest.mark.slow
def test_features_are_computed_once_and_read_from_the_file(tmp_path):
    split, extraction = draw_split(), make_extraction(tmp_path)
    first = extract_features(extraction, split, split_name="train")
    again = extract_features(extraction, split, split_name="train")
    assert (first.was_cached, again.was_cached) == (False, True)
    plain = extract_features(make_extraction(None), split, split_name="train")
    assert np.array_equal(again.values, plain.values)
    assert not plain.was_cached
    (file,) = tmp_path.glob("*.npy")
    for values in (np.zeros((30, 3), np.float16), np.array([print] * 30, dtype=object)):
        np.save(file, values, allow_pickle=True)
        with pytest.raises(ModelError, match=r"\.npy: .*delete it"):
            extract_features(extraction, split, split_name="train")
    assert isinstance(again.values, np.memmap)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock", ".npy"]


def test_the_digest_tells_what_determines_features(tmp_path):
    split, extraction = draw_split(), make_extraction(None)
    digests = {
        compute_features_digest(extraction, split),
        compute_features_digest(extraction, split.take(np.arange(30)[::-1])),
        compute_features_digest(extraction, split.take(np.arange(29))),
        compute_features_digest(make_extraction(None, seed=1), split),
    }
    assert len(digests) == 4
    assert compute_features_digest(make_extraction(tmp_path), split) in digests


class StopInFeatures(TrainingListener):
    def __init__(self, control: StopControl) -> None:
        super().__init__()
        self.control, self.told = control, []

    def report_progress(self, what: str, done: int, total: int) -> None:
        self.told.append((what, done, total))
        if done == 16:
            self.control.request("SIGTERM")


@pytest.mark.slow
def test_features_that_were_stopped_go_on_where_they_stood(tmp_path):
    split, extraction = draw_split(), make_extraction(tmp_path)
    listener = StopInFeatures(extraction.control)
    with pytest.raises(TrainingStopped, match="16 of 30"):
        extract_features(replace(extraction, listener=listener), split, split_name="train")
    assert [path.name.partition(".")[2] for path in tmp_path.glob("*.npy")] == ["partial.npy"]
    later = StopInFeatures(StopControl())
    found = extract_features(replace(make_extraction(tmp_path), listener=later), split, split_name="train")
    assert [done for _, done, _ in later.told] == [24, 30]
    assert np.array_equal(found.values, extract_features(make_extraction(None), split, split_name="train").values)


class DieInFeatures(TrainingListener):
    def report_progress(self, what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 16])
def test_features_whose_file_was_deleted_are_computed_anew_although_a_process_died(tmp_path, batch_size):
    """Its record tells of the rows of the file that was deleted, or of batches of another size, not of the new one."""
    split, extraction = draw_split(), make_extraction(tmp_path)
    extract_features(extraction, split, split_name="train")
    next(tmp_path.glob("*.npy")).unlink()
    dying = replace(extraction, listener=DieInFeatures(), batch_size=batch_size)
    with pytest.raises(KeyboardInterrupt):
        extract_features(dying, split, split_name="train")
    found = extract_features(extraction, split, split_name="train")
    expected = extract_features(replace(extraction, cache=None), split, split_name="train").values
    assert np.array_equal(found.values, expected)


def test_two_at_once_compute_them_once(tmp_path):
    split, extraction = draw_split(), make_extraction(tmp_path)
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(extract_features(extraction, split, split_name="train").was_cached)
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True]
