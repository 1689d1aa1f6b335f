"""Targets that are shares of votes: computed by hand, mixed with the label, and what the batches of an epoch get of them."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.config.schema import StageConfig
from dlfer.config.sections import DataConfig, LabelsConfig
from dlfer.data.audit import audit_bundle
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.pipeline import iterate_epoch
from dlfer.data.sources import load_data
from dlfer.data.votes import add_soft_targets, estimate_posterior, read_votes
from dlfer.errors import DataError

LABELS = ("Angry", "Happy")
TEXT = (
    "id,neutral,happiness,anger,NF\n"
    "a,0,3,1,6\n"  # 1 of 4 votes for a label: anger
    "b,0,0,0,10\n"  # none for a label
    "c,8,2,0,0\n"
)


@pytest.fixture
def votes(tmp_path):
    (tmp_path / "votes.csv").write_text(TEXT)
    return read_votes(tmp_path / "votes.csv")


def make_bundle(ids: list[str], targets: list[int], labels=LABELS) -> DataBundle:
    images = np.random.default_rng(0).integers(0, 256, (len(ids), 16, 16, 1), dtype=np.uint8)
    train = Split("train", images, np.array(targets), np.array(ids))
    rest = Split("validation", images[:1] // 2, np.array([0]), np.array(["elsewhere"]))
    return DataBundle("folder", labels, train, rest, None)


def test_targets_are_the_shares_of_the_votes_among_the_labels(votes):
    bundle = add_soft_targets(make_bundle(["a", "b", "c", "d"], [0, 0, 0, 1]), votes, kind="ferplus", share=1.0)
    assert bundle.train.soft_targets.dtype == np.float32
    # b has no vote for a label and d no row: they keep theirs.
    assert bundle.train.soft_targets.tolist() == [[0.25, 0.75], [1, 0], [0, 1], [0, 1]]
    assert "2 of 4 targets are the shares of the votes in votes.csv; these are labels beyond" in bundle.notes[-1]
    assert bundle.validation.soft_targets is None


def test_a_share_is_mixed_with_the_label(votes):
    bundle = add_soft_targets(make_bundle(["a", "b"], [0, 1]), votes, kind="ferplus", share=0.4)
    assert np.allclose(bundle.train.soft_targets, [[0.6 + 0.4 * 0.25, 0.4 * 0.75], [0, 1]])
    assert "0.4 of them, the label for the rest" in bundle.notes[-1]


def test_a_copy_has_the_votes_of_its_source(votes):
    bundle = add_soft_targets(make_bundle(["a#1", "c#1", "a"], [0, 0, 0]), votes, kind="ferplus", share=1.0)
    # The source of c#1 is not in train.
    assert bundle.train.soft_targets.tolist() == [[0.25, 0.75], [1, 0], [0.25, 0.75]]


@pytest.mark.parametrize("kind", ["ferplus", "ferplus_posterior"])
def test_a_label_without_a_column_of_votes_is_refused(votes, kind):
    with pytest.raises(DataError, match="no column of votes for the label 'Bored'"):
        add_soft_targets(make_bundle(["a"], [0], labels=("Angry", "Bored")), votes, kind=kind, share=1.0)


def test_the_posterior_is_the_frequency_of_the_labels_among_images_with_the_same_votes():
    # Three patterns of votes, each with its own distribution of labels, which counting gives as well.
    patterns = np.array([[10, 0, 0], [0, 10, 0], [2, 0, 8]])
    frequencies = np.array([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
    counts = np.repeat(patterns, 2000, axis=0)
    targets = np.concatenate([np.repeat([0, 1, 3], np.round(row * 2000).astype(int)) for row in frequencies])
    posterior = estimate_posterior(counts, targets, 4)
    assert np.allclose(posterior.sum(axis=1), 1)
    assert (posterior[:, 2] == 0).all()  # no image has label 2
    assert np.allclose(posterior[::2000][:, [0, 1, 3]], frequencies, atol=0.01)


def test_the_posterior_of_one_label_is_certain():
    assert estimate_posterior(np.array([[1, 2], [3, 0]]), np.array([1, 1]), 3).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert estimate_posterior(np.zeros((0, 2), int), np.zeros(0, int), 2).shape == (0, 2)


def test_the_posterior_is_the_optimum_whatever_scale_the_solver_starts_from():
    """The gradient of the penalised log-likelihood, written down here, is zero at the solution."""
    rng = np.random.default_rng(0)
    counts, targets = rng.multinomial(10, [0.5, 0.3, 0.1, 0.1], 400), rng.integers(0, 3, 400)
    total = counts.sum(axis=1, keepdims=True)
    features = np.hstack([counts / total, np.log((counts + 0.3) / total)])
    posterior = estimate_posterior(counts, targets, 3)
    residual = posterior - np.eye(3)[targets]
    assert np.allclose(residual.sum(axis=0), 0, atol=0.01)  # the intercepts have no penalty
    weights = -features.T @ residual  # at the optimum they are the negative gradient of the log-likelihood, as C = 1
    logits = features @ weights
    explained = np.log(posterior) - logits
    explained -= explained.mean(axis=1, keepdims=True)
    assert np.allclose(explained, explained[0], atol=0.03)  # what remains is the intercept, the same for every image


def test_the_posterior_uses_votes_for_other_options_too(votes):
    # a: label 0 by its votes, b: only "no face", d has no row.
    bundle = add_soft_targets(
        make_bundle(["a", "b", "c", "d"], [0, 1, 1, 1]), votes, kind="ferplus_posterior", share=0.5
    )
    soft = bundle.train.soft_targets
    assert soft[3].tolist() == [0, 1]
    assert 0.75 < soft[0, 0] < 1  # half of it is the label
    assert 0.5 < soft[1, 1] < 1
    expected = "3 of 4 targets are P(label | votes) for the votes in votes.csv (0.5 of them, the label for the rest)"
    assert expected in bundle.notes[-1]


@pytest.mark.parametrize("kind", ["ferplus", "ferplus_posterior"])
def test_a_file_without_votes_for_the_training_images_is_refused(tmp_path, kind):
    (tmp_path / "votes.csv").write_text("id,happiness,anger\na,0,0\nother,3,7\n")
    votes = read_votes(tmp_path / "votes.csv")
    with pytest.raises(DataError, match=r"no vote for any of the 2 training images.*data.votes"):
        add_soft_targets(make_bundle(["a", "b"], [0, 1]), votes, kind=kind, share=1.0)


def test_batches_have_the_soft_target_of_each_image(votes):
    train = add_soft_targets(make_bundle(["a", "b", "c", "d"], [0, 0, 0, 1]), votes, kind="ferplus", share=1.0).train
    config = StageConfig(data=DataConfig(source="synthetic_faces"), batch_size=2)
    seen = {}
    for inputs, targets in iterate_epoch(train, config, num_labels=2, seed=0, epoch=0):
        for image, target in zip(inputs["image"], targets, strict=True):
            seen[image.tobytes()] = target.tolist()
    assert [seen[image.tobytes()] for image in train.images] == train.soft_targets.tolist()
    taken = train.take(np.array([2, 0]))
    assert taken.soft_targets.tolist() == [[0, 1], [0.25, 0.75]]


def write_csv(path, rows: list[tuple[int, int, str]]) -> None:
    """Write a csv like FER2013's: (label, seed of the pixels, Usage)."""
    lines = ["emotion,pixels,Usage"]
    for label, seed, usage in rows:
        pixels = np.random.default_rng(seed).integers(0, 256, 48 * 48)
        lines.append(f"{label},{' '.join(map(str, pixels))},{usage}")
    path.write_text("\n".join(lines) + "\n")


def test_the_data_section_asks_for_it_and_drops_duplicates_first(tmp_path):
    rows = [(label, label, "Training") for label in range(7)] + [(3, 100, "Training"), (3, 100, "PublicTest")]
    write_csv(tmp_path / "fer2013.csv", rows)
    header = "Usage,neutral,happiness,surprise,sadness,anger,disgust,fear"
    lines = [f"{usage},0,1,0,0,{label},0,0" for label, _, usage in rows]
    (tmp_path / "votes.csv").write_text("\n".join([header, *lines]) + "\n")
    config = DataConfig(
        source="fer2013",
        path=str(tmp_path / "fer2013.csv"),
        votes=str(tmp_path / "votes.csv"),
        soft_targets="ferplus",
        drop_duplicates=True,
    )
    bundle = load_data(config, image_size=48)
    assert len(bundle.train) == 7
    assert len(bundle.validation) == 1
    assert np.allclose(bundle.train.soft_targets[:, 0], [label / (label + 1) for label in range(7)])
    assert any("1 of 8 images were left out, because they have a duplicate" in note for note in bundle.notes)


@pytest.mark.parametrize(
    ("aliases", "label"), [({"Disgust": "Angry"}, "Angry"), ({"disgust": "Negative", "Angry": "Negative"}, "Negative")]
)
def test_votes_for_classes_that_are_one_label_count_together(tmp_path, aliases, label):
    rows = [(target, target, usage) for usage in ("Training", "PublicTest") for target in (0, 1, 3)]
    write_csv(tmp_path / "fer2013.csv", rows)
    (tmp_path / "votes.csv").write_text("disgust,anger,happiness\n" + "8,0,2\n" * len(rows))
    config = DataConfig(
        source="fer2013",
        path=str(tmp_path / "fer2013.csv"),
        votes=str(tmp_path / "votes.csv"),
        soft_targets="ferplus",
        labels=LabelsConfig(aliases=aliases, drop=("Fear", "Sad", "Surprise", "Neutral")),
    )
    bundle = load_data(config, image_size=48)
    assert bundle.labels == (label, "Happy")
    assert np.allclose(bundle.train.soft_targets, [0.8, 0.2])
    found = audit_bundle(bundle, votes=config.votes, aliases=aliases).votes
    assert (found.labels[label].value, found.labels["Happy"].value) == (1, 0)
