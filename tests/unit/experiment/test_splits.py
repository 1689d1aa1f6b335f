"""Openings of the test split, duplicates and banners, without training anything."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dlfer.config.load import load_experiment
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import shorten_digests
from dlfer.experiment.evaluate import _score, describe_seen, get_previous_use
from dlfer.experiment.fit_ensemble import is_selected
from dlfer.experiment.lineage import PRETRAINED, History, LearnedImages, index_images
from dlfer.experiment.splits import (
    compute_banner,
    compute_run_metrics,
    describe_data,
    find_judged_duplicates,
    find_run_duplicates,
)
from dlfer.metrics.predictions import Predictions
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.files import write_npz
from dlfer.runs.metrics_record import Abstention, Metrics
from dlfer.runs.records import About, ArtifactRecord, InputRecord, Temperature
from dlfer.runs.run import Run, create_run
from dlfer.runs.run_records import count_openings, log_opening, read_metrics

EXPERIMENT = """
experiment: {name: judged}
finetune: {data: {source: synthetic_faces, num_images: {train: 14, validation: 7, test: 7}}}
evaluate: {bootstrap: 100, target_accuracy: 0.6}
"""
LABELS = ("a", "b", "c")


def make_split(name: str, n: int, seed: int) -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (n, 48, 48, 1)).astype(np.uint8)
    return Split(name, images, np.arange(n) % 3, np.array([f"{name}/{i}" for i in range(n)]))


def make_bundle(protocol: str = "official") -> DataBundle:
    train, test = make_split("Training", 30, 0), make_split("PrivateTest", 20, 2)
    test.images[3], test.images[4] = train.images[5], train.images[6][:, ::-1]
    validation = make_split("PublicTest", 20, 1)
    test.images[7] = validation.images[0]
    return DataBundle("fer2013", LABELS, train, validation, test, protocol=protocol, selected_on="PublicTest")


def predict(split: Split, seed: int = 0) -> Predictions:
    logits = np.random.default_rng(seed).normal(size=(len(split), 3))
    logits[np.arange(len(split)), split.targets] += 1
    return Predictions(split.ids, LABELS, split.targets, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))


RECORD = ArtifactRecord(
    format=1,
    family="transfer",
    labels=list(LABELS),
    model={},
    input=InputRecord(channels=1, image_size=32),
    sha256={"network.weights.h5": "f" * 64},
)


@pytest.fixture
def config(tmp_path) -> ExperimentConfig:
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    return load_experiment(tmp_path / "e.yaml")


@pytest.fixture
def run(config, tmp_path) -> Run:
    run = create_run(tmp_path / "runs", config, argv=[])
    describe_data(make_bundle(), None).write(run.path)
    RECORD.write(run.path / "model")
    return run


def test_openings_of_test_are_counted_and_those_of_validation_are_not(run):
    bundle = make_bundle()
    assert count_openings(run.path) == 0
    assert log_opening(run, bundle.test.name, len(bundle.test)) == 1
    assert log_opening(run, bundle.validation.name, len(bundle.validation)) == 1
    Metrics(test_opened=1).write(run.path)
    assert log_opening(run, bundle.test.name, len(bundle.test)) == 2
    assert Metrics.read(run.path).test_opened == 1
    assert read_metrics(run.path).test_opened == 2
    with open(run.path / "log.jsonl", "a") as file:
        file.write('{"event": "test_op')
    assert count_openings(run.path) == 2


def test_metrics_of_a_run_fit_on_validation_and_leave_out_duplicates(config):
    bundle = make_bundle()
    predictions = {"validation": predict(bundle.validation), "test": predict(bundle.test, 1)}
    duplicates = find_run_duplicates(bundle)
    metrics = compute_run_metrics(config, bundle, predictions, duplicates=duplicates, test_opened=1)
    assert metrics.test_opened == 1
    assert metrics.duplicates.as_json() == {
        "split": "test",
        "n": 20,
        "in_train": {"exact": 1, "augmented": 0, "any": 2},
        "in_selection": {"exact": 1, "augmented": 0, "any": 1},
        "in_pretrain": None,
        "in_either": {"exact": 2, "augmented": 0, "any": 3},
    }
    assert (metrics.test.n, metrics.test_without_duplicates.n) == (20, 17)
    assert metrics.temperature.fitted_on == metrics.abstain.chosen_on == "PublicTest"
    assert metrics.temperature.n == metrics.abstain.n == 20
    assert metrics.abstain.target_accuracy == 0.6
    assert metrics.validation.selective.at_threshold.accuracy.value >= 0.6
    changed = {**predictions, "test": predict(bundle.test, 7)}
    other = compute_run_metrics(config, bundle, changed, duplicates=duplicates, test_opened=1)
    assert (other.temperature, other.abstain) == (metrics.temperature, metrics.abstain)
    for name in ("test", "test_without_duplicates", "validation"):
        assert metrics.get(name).calibration.scaled is not None
        assert metrics.get(name).selective.at_threshold.threshold == metrics.abstain.threshold


def test_evaluating_uses_what_the_run_found_on_validation_and_repeats_its_banner():
    temperature = Temperature(value=1.7, fitted_on="PublicTest", n=20)
    abstain = Abstention(threshold=0.55, target_accuracy=0.8, chosen_on="PublicTest", n=20)
    of_run = Metrics(banner="Published protocol", abstain=abstain)
    split = make_bundle().test
    about = About(protocol="paper", selected_on="PublicTest")
    record = RECORD.model_copy(update={"about": about, "temperature": temperature})
    given = (of_run, record, predict(split))
    metrics = _score(*given, duplicates=None, is_own=False, test_opened=3)
    assert metrics.banner == "Of the run itself: Published protocol"
    own = _score(*given, duplicates=None, is_own=True, test_opened=3)
    assert own.banner == "Published protocol"
    assert (metrics.temperature, metrics.abstain) == (temperature, abstain)
    assert metrics.test.selective.at_threshold.threshold == 0.55
    assert metrics.test.calibration.scaled is not None
    assert metrics.test_opened == 3


def test_validation_of_which_the_last_epoch_was_kept_only_calibrated(run):
    validation, test = make_bundle().validation, make_bundle().test
    Metrics(selected_on="PublicTest", is_selected=False).write(run.path)
    assert (
        get_previous_use(run.path, validation, is_own=True)
        == get_previous_use(run.path, validation, is_own=False)
        == "calibration"
    )
    assert get_previous_use(run.path, test, is_own=True) is None


def test_parts_that_selected_or_trained_the_model_are_told_by_name_or_by_their_images(run):
    bundle = make_bundle()
    for part, use in ((bundle.train, "training"), (bundle.validation, "selection"), (bundle.test, None)):
        assert get_previous_use(run.path, part, is_own=True) == get_previous_use(run.path, part, is_own=False) == use
    other = make_split(bundle.validation.name, 20, 9)
    assert get_previous_use(run.path, other, is_own=False) is None


def test_images_that_trained_or_selected_a_model_are_counted_whatever_they_are_called(tmp_path):
    bundle = make_bundle()
    trained, selected, new = bundle.train.images[:5], bundle.validation.images[:2], make_split("x", 3, 99).images
    images = np.concatenate([trained, selected, new])
    split = Split("other", images, np.zeros(10, np.int64), np.array([f"{number}.png" for number in range(10)]))
    assert describe_seen(tmp_path, "m", split) is None
    for digests in (
        index_images(bundle),
        {k: shorten_digests(v) for k, v in index_images(bundle).items() if "dig" in k},
    ):
        write_npz(tmp_path / IMAGES_FILE, digests)
        found = describe_seen(tmp_path, "m", split)
        assert found.startswith("5 of the 10 images trained m and 2 of the 10 images selected m (identical pixels;")
        assert describe_seen(tmp_path, "m", split.take(np.arange(7, 10))) is None
    (tmp_path / IMAGES_FILE).write_bytes(b"no npz")
    assert describe_seen(tmp_path, "m", split) is None


def test_what_a_model_has_seen_comes_before_the_banner_of_its_run():
    given = (Metrics(banner="Published protocol"), RECORD, predict(make_bundle().test))
    metrics = _score(*given, duplicates=None, seen="5 of 20 trained it.", is_own=True, test_opened=3)
    assert metrics.banner == "5 of 20 trained it. Published protocol"


def test_a_model_without_its_run_says_what_its_protocol_means():
    split = make_bundle().test
    for protocol, has_banner in (("paper", True), ("official", False)):
        record = RECORD.model_copy(update={"about": About(protocol=protocol)})
        metrics = _score(None, record, predict(split), duplicates=None, is_own=False, test_opened=None)
        assert (metrics.banner is not None) == has_banner
        assert metrics.duplicates is metrics.test_without_duplicates is metrics.temperature is None
        assert metrics.test.calibration.scaled is None
        json.dumps(metrics.as_json(), allow_nan=False)


def test_copies_of_one_source_are_duplicates_where_ids_mean_the_same():
    train, test = make_split("Training", 10, 0), make_split("PrivateTest", 4, 2)
    train = Split("Training", train.images, train.targets, np.array([*train.ids[:9], "PrivateTest/2#1"]))
    found = find_judged_duplicates("test", test, train=train)
    assert found.in_train.count() == {"exact": 0, "augmented": 1, "any": 1}
    assert found.list_ids_without_duplicates() == ["PrivateTest/0", "PrivateTest/1", "PrivateTest/3"]
    found = find_judged_duplicates("test", test, train=train, same_ids=False)
    assert found.in_train.count() == {"exact": 0, "augmented": 0, "any": 0}


def test_validation_that_judges_is_compared_with_training_alone():
    bundle = replace(make_bundle(), test=None)
    bundle.validation.images[3] = bundle.train.images[5]
    found = find_run_duplicates(bundle)
    assert found.as_record().as_json() == {
        "split": "validation",
        "n": 20,
        "in_train": {"exact": 1, "augmented": 0, "any": 1},
        "in_selection": None,
        "in_pretrain": None,
        "in_either": {"exact": 1, "augmented": 0, "any": 1},
    }


def test_streamed_images_are_not_compared():
    class Stream:
        name = "train"

    bundle = make_bundle()
    assert find_run_duplicates(replace(bundle, train=Stream())) is None
    assert find_run_duplicates(replace(bundle, test=None, validation=Stream())) is None
    found = find_run_duplicates(replace(bundle, validation=Stream()))
    assert (found.in_selection, found.in_train.count()["any"]) == (None, 2)


def test_the_banner_of_the_paper_protocol_counts_the_duplicates_in_training():
    bundle = make_bundle("paper")
    duplicates = find_run_duplicates(bundle)
    assert "2 of 20 test images have a duplicate in training (1 an exact copy" in compute_banner(bundle, duplicates)
    assert compute_banner(make_bundle("official"), duplicates) is None
    found = [compute_banner(make_bundle(name), duplicates, has_subjects=True) for name in ("resplit", "paper")]
    assert all("intervals treat the images as independent" in text for text in found)
    assert "Smoke run" in compute_banner(make_bundle("official"), duplicates, smoke=True)


def make_history(bundle: DataBundle, *, is_here: bool = True, data: DataConfig | None = None) -> History:
    """Return that EF-FER1 has learned from a bundle; its pixels are here, or its list alone."""
    load = (lambda: bundle) if is_here else (lambda: None)
    return History((LearnedImages.from_lists(PRETRAINED, data, index_images(bundle), load),))


def test_images_that_ef_fer1_has_seen_are_counted_and_left_out():
    """Its data may be of another size and depth, and its ids those of other images."""
    bundle = make_bundle()
    scenes = make_split("PrivateTest", 40, 7)  # the ids of the test split, for other images
    coloured = np.repeat(np.repeat(np.repeat(scenes.images, 2, axis=1), 2, axis=2), 3, axis=3)
    coloured[0] = np.repeat(np.repeat(np.repeat(bundle.test.images[9], 2, axis=0), 2, axis=1), 3, axis=2)
    chosen = make_split("validation", 10, 8)
    chosen.images[1] = bundle.test.images[11]
    pretraining = replace(bundle, train=replace(scenes, images=coloured), validation=chosen, test=None)
    before, found = find_run_duplicates(bundle), find_run_duplicates(bundle, make_history(pretraining))
    assert before.in_pretrain is None
    assert before.count_leaks() == 0
    assert np.flatnonzero(found.in_pretrain.any).tolist() == [9, 11]
    assert found.count_leaks() == 2
    assert set(before.list_ids_without_duplicates()) - set(found.list_ids_without_duplicates()) == {
        bundle.test.ids[9],
        bundle.test.ids[11],
    }
    assert found.as_record().in_pretrain.any == 2
    # What trained EF-FER2 as well is no leak of EF-FER1.
    same = replace(pretraining, train=bundle.train, validation=bundle.train)
    assert find_run_duplicates(bundle, make_history(same)).count_leaks() == 0
    # Without a test split, what selected EF-FER1 may be what selects EF-FER2.
    alone = replace(bundle, test=None)
    assert (
        find_run_duplicates(
            alone, make_history(replace(pretraining, validation=bundle.validation))
        ).in_pretrain.count()["any"]
        == 0
    )


def test_a_list_of_images_tells_of_exact_copies_and_of_ids_and_says_where_it_cannot():
    bundle, data = make_bundle(), DataConfig.model_validate({"source": "fer2013", "path": "a.csv"})
    train = make_split("PrivateTest", 5, 7)
    train.images[3] = bundle.test.images[9]
    seen = replace(bundle, train=train, validation=make_split("other", 3, 9), test=None)
    found = find_run_duplicates(bundle, make_history(seen, is_here=False), data).in_pretrain
    assert np.flatnonzero(found.any).tolist() == [9]
    # Of the same file an id is enough, whatever became of the pixels.
    larger = replace(seen, train=replace(train, images=np.repeat(train.images, 2, axis=1)))
    found = find_run_duplicates(bundle, make_history(larger, is_here=False, data=data), data).in_pretrain
    assert np.flatnonzero(found.any).tolist() == [0, 1, 2, 3, 4]
    assert not found.exact.any()
    history = make_history(larger, is_here=False)
    assert find_run_duplicates(bundle, history, data).in_pretrain is None
    assert not history.is_counted(bundle.test, data)
    assert make_history(larger).is_counted(bundle.test, data)


ENSEMBLE = """
experiment: {name: several}
model: {family: ensemble}
ensemble:
  combine: COMBINE
  members:
    - {name: a, set: {model.backbone: resnet_nano}}
    - {name: b, set: {model.backbone: efficientnet_nano, MORE}}
finetune: {data: {source: synthetic_faces}, keep: last}
"""


@pytest.mark.parametrize(
    ("combine", "more", "expected"),
    [
        ("average", "finetune.epochs: 3", False),
        ("trained", "finetune.epochs: 3", True),
        ("average", "finetune.keep: best", True),
        ("vote", "finetune.early_stopping: {patience: 2}", True),
        ("vote", "finetune.schedule: {name: plateau, warmup_epochs: 0}", True),
    ],
)
def test_an_ensemble_is_selected_where_its_combination_or_a_member_is(tmp_path, combine, more, expected):
    (tmp_path / "several.yaml").write_text(ENSEMBLE.replace("COMBINE", combine).replace("MORE", more))
    assert is_selected(load_experiment(tmp_path / "several.yaml")) is expected
