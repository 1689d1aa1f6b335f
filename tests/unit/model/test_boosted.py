"""Multi-level features, their normalisation, and an artifact that is data and nothing else."""

import json
import pickle
import sys

import numpy as np
import pytest

from dlfer.config.sections import BoostingConfig, HeadConfig, ModelConfig, NormalizeConfig
from dlfer.errors import EnvironmentProblem, ModelError, NonFiniteError
from dlfer.model.families import BoostedClassifier, build_level_features, load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.trees import (
    SCALE_FILE,
    TREES_FILE,
    FeatureScale,
    Level,
    find_level,
    import_xgboost,
    make_parameters,
    read_booster,
)
from dlfer.runs.files import hash_file
from dlfer.runs.find import ARTIFACT_FILE

LEVELS = (Level("a", 3), Level("b", 5))


def draw_images(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1)).astype(np.uint8)


def make_network(pooling: str = "avg"):
    import keras

    keras.utils.set_random_seed(0)
    config = ModelConfig(family="boosted", backbone="efficientnet_nano", head=HeadConfig(pooling=pooling))
    return build_transfer_network(config, num_labels=3, image_size=32, channels=1), config


def make_classifier(boosting: BoostingConfig | None = None) -> BoostedClassifier:
    network, config = make_network()
    boosting = boosting or BoostingConfig(max_depth=3, colsample=1.0)
    features = build_level_features(network, config, boosting)
    values = features.compute(draw_images(60), batch_size=20)
    scale = FeatureScale.fit(boosting.normalize.features, features.levels, values)
    xgb = import_xgboost()
    matrix = xgb.DMatrix(scale.apply(values), label=np.arange(60) % 3)
    booster = xgb.train(make_parameters(boosting, num_labels=3, seed=0), matrix, 5)
    return BoostedClassifier(
        network, ("a", "b", "c"), config=config, channels=1, boosting=boosting, trees=(features, scale, booster)
    )


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["avg", pytest.param("max", marks=pytest.mark.slow)])
def test_features_are_the_pooled_outputs_of_the_stages(pooling):
    import keras

    network, config = make_network(pooling)
    features = build_level_features(network, config, BoostingConfig())
    images = draw_images(4)
    found = features.compute(images, batch_size=3)
    pool = {"avg": np.mean, "max": np.max}[pooling]
    start = 0
    for level in features.levels:
        tap = keras.Model(network.backbone.inputs, network.backbone.get_layer(level.name).output)
        maps = np.asarray(tap(network.face_input(images), training=False))
        expected = pool(maps, axis=(1, 2))
        assert np.allclose(found[:, start : start + level.size], expected, rtol=2e-3, atol=1e-5), level
        start += level.size
    assert found.shape == (4, start) == (4, features.num_features)
    assert len(features.levels) == 5
    last = build_level_features(network, config, BoostingConfig(levels="last"))
    assert np.array_equal(last.compute(images, batch_size=3), found[:, -features.levels[-1].size :])


def test_a_broken_backbone_is_told_with_its_level():
    network, config = make_network()
    features = build_level_features(network, config, BoostingConfig())
    # The head of the backbone: everything before it stays sound.
    kernel = [variable for variable in network.backbone.trainable_variables if len(variable.shape) == 4][-1]
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(NonFiniteError, match="top_activation"):
        features.compute(draw_images(2), batch_size=2)


def test_a_column_belongs_to_its_level():
    assert [find_level(LEVELS, column).name for column in range(8)] == ["a"] * 3 + ["b"] * 5


def test_standardised_features_are_scikit_learns():
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    values = (rng.normal(size=(50, 8)) * 10.0 ** rng.integers(-3, 3, 8) + 7).astype(np.float16)
    values[:, 2] = 3.14
    other = rng.normal(size=(9, 8)).astype(np.float16)
    scale = FeatureScale.fit("standard", LEVELS, values)
    expected = StandardScaler().fit(values.astype(np.float64))
    assert np.allclose(scale.apply(values), expected.transform(values.astype(np.float64)), atol=1e-4)
    assert np.allclose(scale.apply(other), expected.transform(other.astype(np.float64)), rtol=1e-4, atol=1e-4)
    assert scale.apply(values).dtype == np.float32
    assert (scale.apply(values)[:, 2] == scale.apply(values)[0, 2]).all()


def test_l2_makes_each_level_of_each_image_one_long():
    from sklearn.preprocessing import normalize

    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float16)
    values[4, :3] = 0
    found = FeatureScale.fit("l2", LEVELS, values).apply(values)
    for part in (slice(0, 3), slice(3, 8)):
        assert np.allclose(found[:, part], normalize(values[:, part].astype(np.float64)), atol=1e-6)


def test_unnormalised_features_stay():
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float16)
    assert np.array_equal(FeatureScale.fit("none", LEVELS, values).apply(values), values.astype(np.float32))


def test_predictions_do_not_depend_on_the_size_of_a_batch():
    classifier, images = make_classifier(), draw_images(60)
    whole = classifier.predict(images, batch_size=60)
    # Images that the trees were grown on: each threshold is the value of one of them.
    for batch_size in (1, 7, 32):
        assert np.allclose(classifier.predict(images, batch_size=batch_size), whole, atol=1e-6)
    assert whole.std() > 0.01, "trees that say the same of every image prove nothing"


@pytest.mark.slow
def test_the_last_bits_of_a_feature_decide_nothing(monkeypatch):
    """As another batch size, device or library has them; in float32 they change one answer in nine here."""
    classifier, images = make_classifier(), draw_images(60)
    before = classifier.predict(images)
    rng = np.random.default_rng(0)
    compute = classifier.features.model.predict_on_batch

    def compute_otherwise(batch):
        values = np.asarray(compute(batch))
        return values * (1 + 3e-7 * rng.choice([-1, 1], values.shape)).astype(np.float32)

    monkeypatch.setattr(classifier.features.model, "predict_on_batch", compute_otherwise)
    changed = (classifier.predict(images) != before).any(axis=1).mean()
    assert changed < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["standard", pytest.param("none", marks=pytest.mark.slow), pytest.param("l2", marks=pytest.mark.slow)]
)
def test_saved_and_loaded_it_answers_the_same(tmp_path, how):
    classifier = make_classifier(BoostingConfig(max_depth=3, normalize=NormalizeConfig(features=how), levels="all"))
    classifier.save(tmp_path)
    again = load_artifact(tmp_path)
    images = draw_images(9, side=20)
    assert np.array_equal(again.predict(images), classifier.predict(images))
    assert again.boosting == classifier.boosting
    assert again.network is None
    assert not any(path.suffix in (".pkl", ".pickle", ".joblib") for path in tmp_path.iterdir())


class Trap:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return eval, ("__import__('sys').modules.setdefault('dlfer_trap', True)",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "contents",
    [
        pickle.dumps(Trap()),
        b"",
        b"not trees",
        b'{"learner": {"objective": "__import__(\'sys\').modules.setdefault(\'dlfer_trap\', True)"}}',
    ],
    ids=["pickle", "empty", "text", "json"],
)
def test_a_file_of_something_else_is_refused_and_not_executed(tmp_path, contents):
    make_classifier().save(tmp_path)
    (tmp_path / TREES_FILE).write_bytes(contents)
    seal(tmp_path, TREES_FILE)
    with pytest.raises(ModelError, match="expected the trees"):
        load_artifact(tmp_path)
    assert "dlfer_trap" not in sys.modules


def seal(folder, name: str) -> None:
    """Give a changed file its right sha256, as who means harm would."""
    record = json.loads((folder / ARTIFACT_FILE).read_text())
    record["sha256"][name] = hash_file(folder / name)
    (folder / ARTIFACT_FILE).write_text(json.dumps(record))


def test_pickled_statistics_are_refused(tmp_path):
    make_classifier().save(tmp_path)
    np.savez(tmp_path / SCALE_FILE, mean=np.array([Trap()], object), deviation=np.ones(1))
    seal(tmp_path, SCALE_FILE)
    with pytest.raises(ModelError, match="expected mean and deviation"):
        load_artifact(tmp_path)
    assert "dlfer_trap" not in sys.modules


@pytest.mark.parametrize("name", ["mean", "deviation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(tmp_path, name, value):
    FeatureScale.fit("standard", LEVELS, np.random.default_rng(0).normal(size=(9, 8))).write(tmp_path / SCALE_FILE)
    arrays = dict(np.load(tmp_path / SCALE_FILE))
    assert FeatureScale.read(tmp_path / SCALE_FILE, "standard", LEVELS).mean.shape == (8,)
    arrays[name][3] = value
    np.savez(tmp_path / SCALE_FILE, **arrays)
    with pytest.raises(ModelError, match="NaN or infinite"):
        FeatureScale.read(tmp_path / SCALE_FILE, "standard", LEVELS)


def test_trees_of_other_features_or_labels_are_refused(tmp_path):
    classifier = make_classifier()
    classifier.save(tmp_path)
    count = classifier.features.num_features
    assert read_booster(tmp_path / TREES_FILE, num_features=count, num_labels=3).num_boosted_rounds() == 5
    for given in ({"num_features": count + 1, "num_labels": 3}, {"num_features": count, "num_labels": 7}):
        with pytest.raises(ModelError, match="belongs to another model"):
            read_booster(tmp_path / TREES_FILE, **given)


def test_no_damage_to_the_trees_ends_the_process(tmp_path):
    """XGBoost's own reader ends with a segmentation fault at many of these."""
    classifier = make_classifier()
    classifier.save(tmp_path)
    whole = (tmp_path / TREES_FILE).read_bytes()
    count = classifier.features.num_features
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] = rng.integers(256)
        (tmp_path / TREES_FILE).write_bytes(damaged if place % 3 else damaged[:place])
        try:
            booster = read_booster(tmp_path / TREES_FILE, num_features=count, num_labels=3)
        except ModelError:
            refused += 1
        else:
            assert booster.inplace_predict(np.zeros((1, count), np.float32)).shape == (1, 3)
    assert refused > 150


def test_trees_come_back_bit_by_bit(tmp_path):
    classifier = make_classifier()
    classifier.save(tmp_path)
    booster = read_booster(tmp_path / TREES_FILE, num_features=classifier.features.num_features, num_labels=3)
    assert booster.save_raw("ubj") == classifier.booster.save_raw("ubj")


def test_trees_in_the_format_of_the_first_version_are_refused(tmp_path):
    classifier = make_classifier()
    classifier.save(tmp_path)
    (tmp_path / TREES_FILE).unlink()
    (tmp_path / "trees.ubj").write_bytes(classifier.booster.save_raw("ubj"))
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text())
    record["sha256"]["trees.ubj"] = hash_file(tmp_path / "trees.ubj")
    del record["sha256"][TREES_FILE]
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"trees.ubj.*expected trees.json; train the model again"):
        load_artifact(tmp_path)


def test_without_xgboost_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(EnvironmentProblem, match="pip install xgboost-cpu=="):
        import_xgboost()


def test_the_command_installs_what_the_requirements_pin():
    from pathlib import Path

    from dlfer.model.trees import PACKAGE

    requirements = Path(__file__).parents[3] / "requirements.txt"
    assert any(line.startswith(f"{PACKAGE};") for line in requirements.read_text().splitlines())
