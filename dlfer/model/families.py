"""The families boosted and ensemble, and the function that loads a trained classifier of any family by its name.

The family boosted is weight-normalised XGBoost on multi-level features of a backbone; the family ensemble combines the
predictions of several trained classifiers of any family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import keras
import numpy as np
from keras import ops

from dlfer.config.sections import BoostingConfig, ModelConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import TrainedCombination, combine_average, combine_vote
from dlfer.model.backbones import list_levels
from dlfer.model.classifier import (
    BackboneClassifier,
    Classifier,
    build_recorded_network,
    list_families,
    load_classifier,
    read_model_config,
)
from dlfer.model.predict import predict_views
from dlfer.model.stage_network import TransferNetwork
from dlfer.model.trees import (
    SCALE_FILE,
    TREES_FILE,
    FeatureScale,
    Level,
    import_xgboost,
    predict_trees,
    read_boosting,
    read_trees,
    round_features,
)
from dlfer.model.weights_file import load_weights, save_weights
from dlfer.runs.artifact import read_artifact_record
from dlfer.runs.files import link_file, write_atomically
from dlfer.runs.find import ARTIFACT_FILE, find_model
from dlfer.runs.records import ArtifactRecord, Temperature

if TYPE_CHECKING:
    import xgboost

WEIGHTS_FILE = "backbone.weights.h5"


class LevelFeatures:
    """A feature extractor: pooled feature maps of a backbone at several levels, in inference mode.

    Features are float16, which halves the cache and, more importantly, makes trees reproducible. Thresholds of tree
    splits lie at values of training images, and float32 features of the same image in a batch of another size differ
    in the last bits, which may put them on the other side. Rounded, all but one value in a thousand are equal.

    Args:
        network: the network whose input layer and backbone are used.
        layers: names of the backbone's layers whose outputs are the feature maps.
        pooling: global pooling of each feature map, "avg" or "max".
    """

    def __init__(self, network: TransferNetwork, *, layers: Sequence[str], pooling: str) -> None:
        taps = [network.backbone.get_layer(name).output for name in layers]
        pool = {"avg": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}[pooling]
        self.levels = tuple(Level(name, int(tap.shape[-1])) for name, tap in zip(layers, taps, strict=True))
        self.pooling = [pool(name=f"pooled_{number}", dtype="float32") for number in range(len(taps))]
        pooled = [layer(tap) for layer, tap in zip(self.pooling, taps, strict=True)]
        self.tapped = keras.Model(network.backbone.inputs, pooled, name="stages")
        images = keras.Input(network.model.input_shape[1:], dtype="uint8", name="images")
        found = self.tapped(network.face_input(images), training=False)
        found = found if isinstance(found, list | tuple) else [found]
        self.model = keras.Model(images, ops.concatenate(list(found), axis=-1), name="level_features")

    @property
    def num_features(self) -> int:
        """Number of features of all levels together, F."""
        return sum(level.size for level in self.levels)

    def compute(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return the features, float16 [N, F], of uint8 images [N, H, W, channels], concatenated level by level."""
        return np.concatenate(list(self.iterate(images, batch_size=batch_size)))

    def iterate(self, images: np.ndarray, *, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the features of each batch, float16 [B, F], starting with the image `start`.

        Raises:
            NonFiniteError: a feature is NaN; the backbone's weights are broken.
        """
        for first in range(start, len(images), batch_size):
            yield round_features(
                np.asarray(self.model.predict_on_batch(images[first : first + batch_size])), self.levels
            )


class BoostedClassifier(BackboneClassifier):
    """A classifier of gradient-boosted trees on the pooled features of a backbone's levels.

    The source of this family (ResNet50 with "weight-normalised XGBoost", see experiments/boosted.yaml) does not say
    which weights are normalised. By default we normalise the sample weights, so that each class has the same sum of
    weights and the mean weight is 1, and standardise each feature. The other interpretations are available as keys of
    `boosting.normalize`: `features` (none, standard, l2) and `leaves`.

    Args:
        network: the network whose backbone computes the features; its head is not used.
        labels, config, channels, temperature_fit: see `Classifier`.
        boosting: the settings that the trees were grown with.
        trees: the network's feature extractor, the normalisation of its features, and the trees.
    """

    family = "boosted"

    def __init__(
        self,
        network: TransferNetwork,
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        channels: int,
        boosting: BoostingConfig,
        trees: tuple[LevelFeatures, FeatureScale, xgboost.Booster],
        temperature_fit: Temperature | None = None,
    ) -> None:
        super().__init__(network, labels, config=config, channels=channels, temperature_fit=temperature_fit)
        self.boosting = boosting
        self.features, self.scale, self.booster = trees

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return the probabilities, float32 [N, C], whose rows sum to one."""
        scaled = self.scale.apply(self.features.compute(images, batch_size=batch_size))
        return predict_trees(self.booster, scaled)

    def describe(self) -> dict:
        """Return the section `boosting` and the names and sizes of the feature levels."""
        return {
            "boosting": self.boosting.model_dump(mode="json"),
            "levels": [{"name": level.name, "features": level.size} for level in self.features.levels],
        }

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the trees, the feature statistics and the backbone's weights; return the names of the files."""
        write_atomically(folder / TREES_FILE, bytes(self.booster.save_raw("json")))
        self.scale.write(folder / SCALE_FILE)
        save_weights(self.parts.backbone, folder / WEIGHTS_FILE)
        return (TREES_FILE, SCALE_FILE, WEIGHTS_FILE)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the files of the trees, the feature statistics and the weights.

        Raises:
            ModelError: the trees are in the binary format of dlfer 0.1.
        """
        if "trees.ubj" in record.sha256:
            raise ModelError(
                f"{ARTIFACT_FILE}: found trees in the format of dlfer 0.1 (trees.ubj), expected {TREES_FILE}; train the "
                "model again with this version, or use it with dlfer 0.1."
            )
        return (TREES_FILE, SCALE_FILE, WEIGHTS_FILE)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Build the backbone, load its weights, and read the trees."""
        import_xgboost()
        config = read_model_config(record)
        boosting = read_boosting(folder, record)
        network = build_recorded_network(config, record)
        load_weights(network.backbone, folder / WEIGHTS_FILE)
        features = build_level_features(network, config, boosting)
        scale, booster = read_trees(folder, record, features.levels)
        return cls(
            network,
            tuple(record.labels),
            config=config,
            channels=record.input.channels,
            boosting=boosting,
            trees=(features, scale, booster),
            temperature_fit=record.temperature,
        )


def build_level_features(network: TransferNetwork, config: ModelConfig, boosting: BoostingConfig) -> LevelFeatures:
    """Build the feature extractor that `boosting.levels` and `model.head.pooling` ask for."""
    layers = list_levels(config.backbone, config.feature_level)
    return LevelFeatures(
        network, layers=layers if boosting.levels == "all" else layers[-1:], pooling=config.head.pooling
    )


MEMBERS = "members"
MAX_MEMBERS = 1000


class EnsembleClassifier(Classifier):
    """A classifier that combines the predictions of several classifiers.

    Args:
        members: the classifiers by name; all have the same set of labels, in any order.
        labels, config, temperature_fit: see `Classifier`.
        combine: "average", "vote" or "trained".
        trained: the combinations fitted on the validation split, by "single" or the name of a test-time augmentation
            view; required with "single" if `combine` is "trained", otherwise unused.

    Raises:
        ModelError: a member has other labels, the members differ in `aspect`, or the trained combination is missing.
    """

    family = "ensemble"

    def __init__(
        self,
        members: Mapping[str, Classifier],
        labels: tuple[str, ...],
        *,
        config: ModelConfig,
        combine: str = "average",
        trained: Mapping[str, TrainedCombination] | None = None,
        temperature_fit: Temperature | None = None,
    ) -> None:
        super().__init__(
            labels,
            config=config,
            channels=max(member.channels for member in members.values()),
            image_size=max(member.image_size for member in members.values()),
            temperature_fit=temperature_fit,
        )
        self.members = dict(members)
        self.aspect = match_aspects({name: member.aspect for name, member in members.items()})
        self.combine_by = combine
        self.trained = dict(trained or {})
        if combine == "trained" and "single" not in self.trained:
            raise ModelError("ensemble: the combination is trained, but none was fitted; fit it on validation.")
        self._columns = {name: match_labels(member.labels, self.labels, name) for name, member in members.items()}
        self._folders: dict[str, Path] = {}

    def predict_raw(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return the probabilities, float32 [N, C], whose rows sum to one."""
        answers = [
            member.predict(images, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), "single")

    def predict_view(self, images: np.ndarray, view: str, *, batch_size: int) -> np.ndarray:
        """Return the combination, float32 [N, C], of each member's mean prediction over the views of its own crop."""
        answers = [
            predict_views(member, images, view, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), view)

    def combine(self, probabilities: np.ndarray, view: str) -> np.ndarray:
        """Combine the members' float [M, N, C], in the order of `labels`, into float32 [N, C].

        Trained combinations use that of `view`, or that of "single" if none was fitted for the view.
        """
        if self.combine_by == "trained":
            return self.trained.get(view, self.trained["single"]).predict(probabilities).astype(np.float32)
        combined = combine_vote if self.combine_by == "vote" else combine_average
        return combined(probabilities).astype(np.float32)

    def describe(self) -> dict:
        """Return the names of the members, how they are combined, and the fitted combinations."""
        trained = {view: fitted.as_dict() for view, fitted in self.trained.items()}
        return {"ensemble": {"combine": self.combine_by, "members": list(self.members), "trained": trained}}

    def set_member_folder(self, name: str, folder: Path) -> None:
        """Record the artifact folder of a member, so that its files are linked when saving instead of written again."""
        self._folders[name] = Path(folder)

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the artifact of each member to `members/<name>/`, by links where possible; return the file names."""
        files: list[str] = []
        for name, member in self.members.items():
            target = folder / MEMBERS / name
            if name in self._folders:
                _share_artifact(self._folders[name], target)
            else:
                member.save(target)
            self._folders[name] = target
            listed = (*read_artifact_record(target).sha256, ARTIFACT_FILE)
            files += [f"{MEMBERS}/{name}/{file}" for file in listed]
        return tuple(files)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the members' artifact.json files, which list the members' other files.

        Raises:
            ModelError: the record lists no valid members or combination, or names that are not distinct folder names.
        """
        given = record.ensemble
        members = given.get("members") if isinstance(given, dict) else None
        known = ("average", "vote", "trained")
        is_whole = isinstance(members, list) and members and isinstance(given.get("trained"), dict)
        if not is_whole or given.get("combine") not in known:
            raise ModelError(
                f"{ARTIFACT_FILE}: ensemble: expected members, how they are combined ({', '.join(known)}) and what was "
                "fitted; copy the artifact again, or train it again."
            )
        wrong = [name for name in members if not isinstance(name, str) or "/" in name]
        if wrong or len(set(members)) < len(members) or len(members) > MAX_MEMBERS:
            raise ModelError(
                f"{ARTIFACT_FILE}: ensemble.members: found {str(wrong or members)[:200]}, expected at most {MAX_MEMBERS} "
                f"different names of folders in {MEMBERS}/."
            )
        return tuple(f"{MEMBERS}/{name}/{ARTIFACT_FILE}" for name in members)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Load the members and the fitted combinations."""
        given = record.ensemble
        ensemble = cls(
            {name: load_classifier(folder / MEMBERS / name) for name in given["members"]},
            tuple(record.labels),
            config=read_model_config(record),
            combine=given["combine"],
            trained={view: _read_combination(values, folder) for view, values in given["trained"].items()},
            temperature_fit=record.temperature,
        )
        for name in ensemble.members:
            ensemble.set_member_folder(name, folder / MEMBERS / name)
        return ensemble


def _read_combination(values: dict, folder: Path) -> TrainedCombination:
    try:
        return TrainedCombination.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: ensemble.trained: {error}; copy the artifact again, or fit it again.") from error


def match_labels(found: tuple[str, ...], labels: tuple[str, ...], name: str) -> list[int]:
    """Return the index of each of `labels` among the labels of a member, `found`.

    Raises:
        ModelError: the two sets of labels differ.
    """
    if set(found) != set(labels):
        raise ModelError(
            f"ensemble: the member {name} has the labels {', '.join(found)}; expected {', '.join(labels)}, in any "
            "order. Members tell the same labels apart."
        )
    return [found.index(label) for label in labels]


def match_aspects(aspects: Mapping[str, str]) -> str:
    """Return the common `aspect` of an ensemble's members, given the aspect of each by name.

    Raises:
        ModelError: the aspects differ, so that an image cannot be made square once for all members.
    """
    found = sorted(set(aspects.values()))
    if len(found) > 1:
        listed = ", ".join(f"{name}: {aspect}" for name, aspect in aspects.items())
        raise ModelError(
            f"ensemble: the members treat images that are not square differently ({listed}); expected one data.aspect. "
            "Train them with the same, or leave some out."
        )
    return found[0]


def _share_artifact(source: Path, target: Path) -> None:
    """Link (or copy) artifact.json and the files that it lists into another folder."""
    if source.resolve() == target.resolve():
        return
    for file in (*read_artifact_record(source).sha256, ARTIFACT_FILE):
        link_file(source / file, target / file)


FAMILIES: dict[str, type[Classifier]] = list_families()


def load_artifact(name: str | Path) -> Classifier:
    """Load a classifier, given the name of a shipped model or a run, or an artifact folder.

    Raises:
        ModelError: there is no such model, or its artifact is damaged.
    """
    return load_classifier(find_model(name))
