from __future__ import annotations

import json

import numpy as np
import pytest

from dlfer.data.augment import CORRUPTIONS, corrupt_images
from dlfer.data.bundle import Split
from dlfer.errors import DataError, UserError
from dlfer.experiment.extras import Extras, check_extras, compute_extra_metrics, evaluate_corruptions, keep_extras
from dlfer.metrics.paired import compute_tango_interval
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.report.terminal import format_corruptions, format_metrics
from dlfer.runs.metrics_record import Corruptions, Metrics
from dlfer.runs.run import Run
from dlfer.runs.run_records import read_metrics

LABELS = ("dark", "bright")


class FakeClassifier:
    """Calls an image bright whose left half is brighter than 100 on average."""

    labels = LABELS

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        del batch_size
        bright = images[:, :, : images.shape[2] // 2].reshape(len(images), -1).mean(axis=1) > 100
        return np.where(bright[:, None], [0.2, 0.8], [0.9, 0.1]).astype(np.float32)


def draw_split(n: int = 60) -> Split:
    generator = np.random.default_rng(0)
    targets = np.arange(n) % 2
    images = (60 + 80 * targets[:, None, None, None] + generator.normal(0, 20, (n, 16, 16, 1))).astype(np.uint8)
    return Split("test", images, targets, np.array([f"t/{number}" for number in range(n)]))


def predict(split: Split) -> Predictions:
    return Predictions(split.ids, LABELS, split.targets, FakeClassifier().predict(split.images))


@pytest.fixture(scope="module")
def found() -> dict:
    return evaluate_corruptions(FakeClassifier(), draw_split(), seed=3).as_json()


def test_every_corruption_is_judged_at_five_strengths(found):
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    assert found["n"] == 60
    for name, levels in found["corruptions"].items():
        assert [level["strength"] for level in levels] == [1, 2, 3, 4, 5]
        assert tuple(level["parameter"] for level in levels) == CORRUPTIONS[name].parameters
    json.dumps(found, allow_nan=False)


def test_figures_are_those_of_the_corrupted_images(found):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    split, level = draw_split(), found["corruptions"]["brightness"][1]
    worse = corrupt_images(split.images, split.ids, corruption="brightness", strength=2, seed=3)
    correct = FakeClassifier().predict(worse).argmax(axis=1) == split.targets
    clean = predict(split).correct
    assert level["accuracy"]["value"] == pytest.approx(correct.mean())
    assert correct.mean() < clean.mean()
    bounds = proportion.proportion_confint(int(correct.sum()), 60, method="wilson")
    assert (level["accuracy"]["low"], level["accuracy"]["high"]) == pytest.approx(bounds)
    assert level["difference"]["value"] == pytest.approx(correct.mean() - clean.mean())
    counts = int((correct & ~clean).sum()), int((clean & ~correct).sum())
    assert (level["difference"]["low"], level["difference"]["high"]) == pytest.approx(
        compute_tango_interval(*counts, 60)
    )


class PixelClassifier:
    """Calls an image bright whose middle pixel is, so that noise and squares matter."""

    labels = LABELS

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        del batch_size
        return np.where(images[:, 8, 8] > 100, [0.2, 0.8], [0.9, 0.1]).astype(np.float32)


def test_the_seed_decides_what_is_random_and_nothing_else():
    first, second = (
        evaluate_corruptions(PixelClassifier(), draw_split(), seed=seed).as_json()["corruptions"] for seed in (3, 4)
    )
    for name in CORRUPTIONS:
        assert (first[name] == second[name]) == (name not in ("noise", "occlusion"))


def test_the_result_does_not_depend_on_how_many_images_are_corrupted_at_a_time(found, monkeypatch):
    monkeypatch.setattr("dlfer.experiment.extras._AT_ONCE", 7)
    assert evaluate_corruptions(FakeClassifier(), draw_split(), seed=3).as_json() == found


def test_the_table_has_a_row_for_each_and_the_clean_figure(found):
    text = format_corruptions(Corruptions.build(found))
    assert "clean: 100.00 % [93.98, 100.00]" in text
    for name in CORRUPTIONS:
        assert f"\n{name.replace('_', ' ')} " in text
    assert "brightness at strength 5: -50.0 percentage points against the clean images, 95 % -62" in text


@pytest.fixture
def attributes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,age\n" + "".join(f"t/{number},{'old' if number < 25 else 'young'}\n" for number in range(60)))
    return path


def test_only_the_metrics_asked_for_are_computed(attributes, tmp_path):
    split = draw_split()
    splits, predictions = {"test": split, "validation": None}, {"test": predict(split)}
    plain = compute_extra_metrics(Extras(), FakeClassifier(), splits, predictions)
    assert (plain.views, plain.groups, plain.corruptions) == ({}, None, None)
    asked = Extras(views=("mirror", "ten_crop"), headline="mirror", attributes=attributes, corrupt=True)
    told = []
    found = compute_extra_metrics(
        asked, FakeClassifier(), splits, predictions, folder=tmp_path / "views", say=told.append
    )
    assert list(found.views) == ["mirror", "ten_crop"]
    assert found.views["mirror"]["test"].n == 60
    assert found.views["mirror"]["test"].paired.b == "single view"
    assert (found.groups.part, found.corruptions.part) == ("test", "test")
    assert found.groups.attributes["age"].groups["old"].n == 25
    assert len(told) == len(CORRUPTIONS)
    stored = read_predictions(tmp_path / "views" / "mirror" / "test.npz")
    assert stored.correct.mean() == found.views["mirror"]["test"].accuracy.value
    metrics = Metrics(headline="mirror", views=found.views, groups=found.groups, corruptions=found.corruptions)
    text = format_metrics(metrics)
    assert "test by mirror, the headline (n = 60): accuracy " in text
    assert "test by ten crop (n = 60)" in text
    assert "groups by age (0 images without)" in text
    assert "largest gap in accuracy: 0.00 %" in text
    assert "corrupted images (n = 60)" in text


def test_without_a_test_split_validation_is_judged(attributes):
    split = draw_split()
    asked = Extras(views=("mirror",), attributes=attributes)
    splits = {"validation": split, "test": None}
    found = compute_extra_metrics(asked, FakeClassifier(), splits, {"validation": predict(split)})
    assert list(found.views["mirror"]) == ["validation"]
    assert found.groups.part == "validation"


def test_a_run_keeps_metrics_that_were_added_and_its_own_file_stays(attributes, tmp_path):
    split, classifier = draw_split(), FakeClassifier()
    given = {"test": split}, {"test": predict(split)}
    run = Run(tmp_path)
    own = compute_metrics_file(
        {"validation": predict(split)}, Metrics(protocol="official", banner=None, selected_on="x", test_opened=None)
    )
    own.write(tmp_path)
    written = (tmp_path / "metrics.json").read_bytes()
    for views in (("ten_crop",), ("mirror",)):
        asked = Extras(views=views, attributes=attributes if views == ("mirror",) else None)
        assert keep_extras(run, own, compute_extra_metrics(asked, classifier, *given))
    metrics = read_metrics(tmp_path)
    assert list(metrics.views) == ["ten_crop", "mirror"]
    assert list(metrics.views["mirror"]) == ["validation"]
    assert metrics.groups.part == "validation"
    assert metrics.validation == own.validation
    assert metrics.corruptions is None
    assert not keep_extras(run, own, compute_extra_metrics(Extras(), classifier, *given))
    assert read_metrics(tmp_path) == metrics
    assert (tmp_path / "metrics.json").read_bytes() == written


def test_what_cannot_be_done_is_told_before(attributes):
    check_extras(Extras(views=("mirror",), headline="mirror", attributes=attributes), draw_split().ids)
    with pytest.raises(UserError, match="views: found rotate, expected some of mirror, ten_crop"):
        check_extras(Extras(views=("rotate",)))
    with pytest.raises(UserError, match="headline: found 'mirror', expected single or one of the views"):
        check_extras(Extras(headline="mirror"))
    with pytest.raises(DataError, match=r"a\.csv: names none of the 2 images"):
        check_extras(Extras(attributes=attributes), np.array(["x", "y"]))
    with pytest.raises(DataError, match="no such file"):
        check_extras(Extras(attributes=attributes.with_name("none.csv")))
