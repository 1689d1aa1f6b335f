"""Duplicates across training, validation and test: every output of a run gives the same number, with its interval."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dlfer.cli.show import describe_run
from dlfer.config.load import load_experiment
from dlfer.config.sections import DataConfig
from dlfer.data.sources import load_data
from dlfer.data.synthetic.faces import load_synthetic_faces
from dlfer.errors import ModelError, ProtocolError
from dlfer.experiment.evaluate import evaluate_model
from dlfer.experiment.run import describe_outcome, run_experiment
from dlfer.report.terminal import format_estimate, format_metrics
from dlfer.runs.listeners import RunOptions
from dlfer.runs.metrics_record import Metrics

pytestmark = pytest.mark.slow

EXPERIMENT = """
experiment: {{name: planted}}
model: {{backbone: efficientnet_nano}}
finetune:
  data: {{source: fer2013, path: {csv}, protocol: paper, split: official_80_20}}
  epochs: 1
  batch_size: 16
  image_size: 32
evaluate: {{bootstrap: 100, num_train: 0}}
"""
NUM_TRAIN, NUM_TEST = 120, 30


def make_images() -> np.ndarray:
    """Return 120 + 30 + 30 faces; some of the last 60 are copies of the first 120, and two end a chain."""
    config = DataConfig.model_validate({"source": "synthetic_faces", "num_images": {"train": NUM_TRAIN + 2 * NUM_TEST}})
    images = load_synthetic_faces(config).train.images[..., 0].copy()
    public, private = NUM_TRAIN, NUM_TRAIN + NUM_TEST
    for row in range(8):
        images[public + row] = images[row]
        images[private + row] = images[20 + row][:, ::-1]
        images[public + 10 + row] = np.clip(images[40 + row] * 0.8 + 20, 0, 255)
    for place, other in ((public + 20, 60), (private + 20, 70)):
        start, end = images[other].astype(float), images[other + 1].astype(float)
        images[other + 1] = chain(start, end, 1)
        images[place] = chain(start, end, 2)
    return images


def chain(start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """Return an image on the way from one to another: a duplicate of the one a step before, not of the one two before."""
    for share in np.linspace(0.02, 0.6, 200):
        one, two = ((1 - k * share) * start + k * share * end for k in (1, 2))
        if correlate(start, two) < 0.975:
            return np.rint(one if steps == 1 else two).astype(np.uint8)
    raise AssertionError("no chain")


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    small = [image.astype(float).reshape(16, 3, 16, 3).mean(axis=(1, 3)).ravel() for image in (first, second)]
    return np.corrcoef(*small)[0, 1]


def has_duplicate(image: np.ndarray, others: np.ndarray) -> bool:
    """Say it as the definition does, one pair at a time."""
    for other in others:
        if (image == other).all():
            return True
        if (
            min(image.std(), other.std()) >= 8
            and max(correlate(image, other), correlate(image, other[:, ::-1])) >= 0.98
        ):
            return True
    return False


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    images = make_images()
    usages = ["Training"] * NUM_TRAIN + ["PublicTest"] * NUM_TEST + ["PrivateTest"] * NUM_TEST
    rows = zip(np.arange(len(images)) % 7, images, usages, strict=True)
    lines = [f"{target},{' '.join(map(str, image.ravel()))},{usage}" for target, image, usage in rows]
    (folder / "fer.csv").write_text("\n".join(["emotion,pixels,Usage", *lines]) + "\n")
    (folder / "planted.yaml").write_text(EXPERIMENT.format(csv=folder / "fer.csv"))
    run_experiment(folder / "planted.yaml", RunOptions(out=folder / "runs"))
    return next(folder.glob("runs/planted/*"))


@pytest.fixture(scope="module")
def expected(run) -> dict[str, int]:
    """Count by brute force: test images with a duplicate in train, in validation, in either."""
    stage = load_experiment(run / "config.yaml").finetune
    bundle = load_data(stage.data, image_size=32, balance=stage.balance)
    test, train, validation = (split.images[..., 0] for split in (bundle.test, bundle.train, bundle.validation))
    in_train, in_selection = (np.array([has_duplicate(image, some) for image in test]) for some in (train, validation))
    counts = {"train": in_train, "selection": in_selection, "either": in_train | in_selection}
    found = {name: int(rows.sum()) for name, rows in counts.items()}
    # The plants are on both sides of the draw, and neither set holds the other.
    assert 0 < found["selection"] < found["train"] < found["either"] < len(test)
    return found


def read(run: Path, name: str) -> dict:
    return json.loads((run / name).read_text())


def read_text(path: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", path.read_text()))


def test_data_metrics_banner_and_audit_give_the_same_number(run, expected):
    data, metrics, audit = (read(run, f"{name}.json") for name in ("data", "metrics", "audit"))
    found = data["duplicates"]
    assert (found["split"], found["n"]) == ("test", 2 * NUM_TEST)
    assert {
        "train": found["in_train"]["any"],
        "selection": found["in_selection"]["any"],
        "either": found["in_either"]["any"],
    } == expected
    assert metrics["duplicates"] == found
    assert f"{expected['train']} of 60 test images have a duplicate in training" in metrics["banner"]
    names = {part: split["name"] for part, split in data["splits"].items()}
    for part, key in (("train", "in_train"), ("validation", "in_selection")):
        assert audit["leaks"][f"{names[part]}->{names['test']}"] == found[key]


def test_report_and_card_give_the_same_number(run, expected):
    sentence = (
        f"{expected['train']} of 60 test images ({100 * expected['train'] / 60:.1f} %) have a duplicate in training"
    )
    report, card = read_text(run / "report.html"), read_text(run / "model" / "MODEL_CARD.md")
    for text in (report, card):
        assert sentence in text
        assert f"; {expected['selection']} have one in validation, which selected the model" in text
        assert f"{expected['train']} of 60 test images have a duplicate in training" in text  # the banner
    assert f"{expected['train']} of 60 images of PublicTest+PrivateTest" in report  # the audit


def test_the_value_without_duplicates_has_interval_and_n_wherever_it_is(run, expected):
    metrics, n = Metrics.require(run), 60 - expected["either"]
    accuracy = metrics.test_without_duplicates.accuracy
    assert metrics.test_without_duplicates.n == n
    value, low, high = (f"{100 * end:.1f}" for end in (accuracy.value, accuracy.low, accuracy.high))
    sentence = f"{value} % (95 % {low} to {high}, n = {n})"
    assert f"without duplicates {sentence}" in read_text(run / "report.html")
    assert f"without duplicates: accuracy {sentence}" in describe_outcome(metrics)
    card = read_text(run / "model" / "MODEL_CARD.md")
    assert f"test without duplicates, n = {n}" in card
    assert f"{value} % ({low} to {high})" in card
    value, low, high = (f"{100 * end:.2f}" for end in (accuracy.value, accuracy.low, accuracy.high))
    shown = describe_run(run.name, run.parents[1])
    assert format_estimate(shown["test_without_duplicates_accuracy"]) == f"{value} % [{low}, {high}]"
    assert f"test without duplicates (n = {n}): accuracy {value} % [{low}, {high}]" in format_metrics(metrics)


def test_evaluate_counts_and_leaves_out_the_same_images(run, expected):
    of_run, metrics = read(run, "metrics.json"), evaluate_model(str(run))
    found = metrics.as_json()
    assert found["duplicates"] == of_run["duplicates"]
    assert found["banner"] == of_run["banner"]
    assert found["test_without_duplicates"]["confusion"] == of_run["test_without_duplicates"]["confusion"]
    assert f"{expected['train']} of 60 PublicTest+PrivateTest images" in format_metrics(metrics)


def test_no_duplicates_are_left_after_drop_duplicates(run, tmp_path):
    """Chains through train are dropped, too: of what is left nothing is a duplicate of what a dropped image is one of."""
    stage = load_experiment(run / "config.yaml", {"finetune.data.drop_duplicates": True}).finetune
    kept = load_data(stage.data, image_size=32, balance=stage.balance)
    whole = load_data(stage.data.model_copy(update={"drop_duplicates": False}), image_size=32, balance=stage.balance)
    judged = np.concatenate([kept.validation.images, kept.test.images])[..., 0]
    left = set(kept.train.ids.tolist())
    rows = np.array([name in left for name in whole.train.ids.tolist()])
    assert not any(has_duplicate(image, judged) for image in whole.train.images[rows, ..., 0])
    dropped = whole.train.images[~rows, ..., 0]
    assert not any(has_duplicate(image, dropped) for image in whole.train.images[rows, ..., 0])
    direct = sum(has_duplicate(image, judged) for image in whole.train.images[..., 0])
    assert len(dropped) > direct  # the chains
    assert any(f"{len(dropped)} of {len(whole.train)} images were left out" in note for note in kept.notes)


# What EF-FER1 has seen, whichever way its weights came.

SMALL = "epochs: 1, batch_size: 16, image_size: 32"
PLAIN = "model: {backbone: resnet_nano}\nevaluate: {num_train: 0}\n"


def start_small(folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.yaml").write_text(f"experiment: {{name: {name}, device: cpu}}\n{text}")
    return run_experiment(folder / f"{name}.yaml", RunOptions(out=folder / "runs"), progress=False)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> Path:
    """Return a folder with own.npz, and leaky.npz, which trains on the test images of the other."""
    folder, rng = tmp_path_factory.mktemp("leaky"), np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, 255, (n, 32, 32)).astype(np.uint8)

    own = {"train": draw(32), "validation": draw(16), "test": draw(16)}
    other = {"train": np.concatenate([own["test"], draw(16)]), "validation": draw(16)}
    for name, splits in (("own", own), ("leaky", other)):
        arrays = {f"{split}_images": images for split, images in splits.items()}
        arrays |= {f"{split}_targets": np.arange(len(images)) % 2 for split, images in splits.items()}
        np.savez(folder / f"{name}.npz", labels=np.array(["a", "b"]), **arrays)
    return folder


def finetune(folder: Path, name: str = "own") -> str:
    return f"finetune: {{data: {{source: arrays, path: {folder / name}.npz}}, {SMALL}}}\n"


def pretrain(folder: Path) -> str:
    return f"pretrain: {{data: {{source: arrays, path: {folder}/leaky.npz}}, {SMALL}}}\n"


@pytest.fixture(scope="module")
def trained(leaky) -> Path:
    """Return a run whose EF-FER1 was trained on its test images."""
    return start_small(leaky, "single", PLAIN + pretrain(leaky) + finetune(leaky))


def check_leak(run: Path) -> None:
    metrics = Metrics.require(run)
    assert (metrics.duplicates.in_pretrain.any, metrics.duplicates.in_either.any) == (16, 16)
    for file in ("report.html", "model/MODEL_CARD.md", "run.json"):
        assert "Leak: 16 of 16 test images have a duplicate in the data of EF-FER1" in (run / file).read_text(), file


def test_evaluate_counts_what_ef_fer1_has_seen_as_the_run_does(trained, leaky):
    check_leak(trained)
    found, own = evaluate_model(str(trained)), Metrics.require(trained)
    assert found.duplicates == own.duplicates
    assert "Leak: 16 of 16 test images have a duplicate in the data of EF-FER1" in found.banner
    away = leaky / "away.npz"
    (leaky / "leaky.npz").rename(away)  # then by the list of the run
    try:
        assert evaluate_model(str(trained)).duplicates == own.duplicates
    finally:
        away.rename(leaky / "leaky.npz")


@pytest.mark.parametrize("is_backbone", [False, True])
def test_the_data_behind_weights_of_a_run_is_counted(is_backbone, trained, leaky):
    weights = trained / "pretrain" if is_backbone else start_small(leaky, "before", PLAIN + finetune(leaky, "leaky"))
    text = f"pretrain: {{weights: {weights}, image_size: 32}}\n"
    check_leak(start_small(leaky, f"after{int(is_backbone)}", PLAIN + text + finetune(leaky)))


def ensemble(folder: Path, name: str, members: str) -> Path:
    text = f"model: {{family: ensemble}}\nevaluate: {{num_train: 0}}\nensemble: {{members: [{members}]}}\n"
    return start_small(folder, name, text + finetune(folder))


def test_an_ensemble_carries_what_ef_fer1_of_a_member_has_seen(trained, leaky):
    run = ensemble(leaky, "both", f"{{name: p, model: {trained}}}, {{name: q, model: {trained}}}")
    check_leak(run)
    notes = [member.note for member in Metrics.require(run).members]
    assert all("its EF-FER1 was trained on 16 of the 16 test images" in note for note in notes)
    assert evaluate_model(str(run)).duplicates == Metrics.require(run).duplicates


def test_no_member_is_trained_where_a_given_one_does_not_fit(trained, leaky):
    new = "{name: new, set: {model.backbone: resnet_nano}}"
    with np.load(leaky / "own.npz") as found:
        np.savez(leaky / "others.npz", **{**found, "labels": np.array(["x", "y"])})
    other = start_small(leaky, "others", PLAIN + finetune(leaky, "others"))
    with pytest.raises(ModelError, match="the member old has the labels x, y; expected a, b"):
        ensemble(leaky, "unfit", f"{new}, {{name: old, model: {other}}}")
    tested = start_small(leaky, "tested", PLAIN + finetune(leaky, "leaky"))
    with pytest.raises(ProtocolError, match="was trained on 16 of the 16 images of this test split"):
        ensemble(leaky, "unfit", f"{new}, {{name: old, model: {tested}}}")
    assert not (leaky / "runs" / "unfit-new").exists()
