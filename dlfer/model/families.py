"""The families beside single networks, and the one call that loads a trained classifier of any family by its name.

The boosted family has multi-level features of a backbone and weight-normalised XGBoost on them; the family ensemble
combines the answers of several trained classifiers of any families.
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
    """What turns images into features, in inference mode.

    Features are float16: the cache is half as large, and, more to the point, a split of a tree asks whether a
    value is below that of some training image. In float32 the same image in a batch of another size differs in
    the last bits, and falls on the other side; rounded, it is equal but for one value in a thousand.

    Args:
        network: whose backbone and input stage are used.
        layers: of the backbone, whose outputs are the feature maps.
        pooling: over each feature map, "avg" or "max".
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
        """Of all levels together, F."""
        return sum(level.size for level in self.levels)

    def compute(self, images: np.ndarray, *, batch_size: int) -> np.ndarray:
        """Return float16 [N, F] of uint8 images [N, H, W, channels], the levels one after the other."""
        return np.concatenate(list(self.iterate(images, batch_size=batch_size)))

    def iterate(self, images: np.ndarray, *, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yield float16 [B, F] batch by batch, from the image `start` on.

        Raises:
            NonFiniteError: a feature is NaN; the backbone's weights are broken.
        """
        for first in range(start, len(images), batch_size):
            yield round_features(
                np.asarray(self.model.predict_on_batch(images[first : first + batch_size])), self.levels
            )


class BoostedClassifier(BackboneClassifier):
    """Trees on the pooled features of every stage of a backbone.

    The source of this family (ResNet50 with "weight-normalised XGBoost", see experiments/boosted.yaml) leaves
    open which weights are normalised. Our reading: those of the rows, so that each class has the same sum of
    weights and the mean weight is 1; and each feature is standardised. The other readings are the keys
    `boosting.normalize`: `features` (none, standard, l2) and `leaves`.

    Args:
        network: whose backbone gives the features; its head is not used.
        features: of that network.
        scale: how they are normalised.
        booster: the trees.
        labels, config, channels, temperature_fit: as `Classifier` has them.
        boosting: how the trees were grown.
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
        """Return float32 [N, C], rows sum to one."""
        scaled = self.scale.apply(self.features.compute(images, batch_size=batch_size))
        return predict_trees(self.booster, scaled)

    def describe(self) -> dict:
        """Return the section `boosting` and the levels of the features."""
        return {
            "boosting": self.boosting.model_dump(mode="json"),
            "levels": [{"name": level.name, "features": level.size} for level in self.features.levels],
        }

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Write the trees, the statistics of the features, and the backbone's weights."""
        write_atomically(folder / TREES_FILE, bytes(self.booster.save_raw("json")))
        self.scale.write(folder / SCALE_FILE)
        save_weights(self.parts.backbone, folder / WEIGHTS_FILE)
        return (TREES_FILE, SCALE_FILE, WEIGHTS_FILE)

    @classmethod
    def name_files(cls, record: ArtifactRecord) -> tuple[str, ...]:
        """Return the names of the trees, the statistics and the weights.

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
        """Build the backbone, set its weights, and read the trees."""
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
    """Return what turns images into the features that an experiment asks for."""
    layers = list_levels(config.backbone, config.feature_level)
    return LevelFeatures(
        network, layers=layers if boosting.levels == "all" else layers[-1:], pooling=config.head.pooling
    )


MEMBERS = "members"
MOST_MEMBERS = 1000


class EnsembleClassifier(Classifier):
    """Several classifiers as one.

    Args:
        members: name -> a classifier of the same set of labels, in any order.
        labels, config, temperature_fit: as `Classifier` has them.
        combine: "average", "vote" or "trained".
        trained: by view ("single" and the names of views), what was fitted on validation; the combination
            "trained" needs "single", the others none.

    Raises:
        ModelError: a member has other labels, or makes squares of images in another way; or the trained combination
            is missing.
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
        """Return float32 [N, C], rows sum to one."""
        answers = [
            member.predict(images, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), "single")

    def predict_view(self, images: np.ndarray, view: str, *, batch_size: int) -> np.ndarray:
        """Return the combination, float32 [N, C], of what each member answers on the average over its own views."""
        answers = [
            predict_views(member, images, view, batch_size=batch_size)[:, self._columns[name]]
            for name, member in self.members.items()
        ]
        return self.combine(np.stack(answers), view)

    def combine(self, probabilities: np.ndarray, view: str) -> np.ndarray:
        """Return float32 [N, C] of the members' float [M, N, C], with columns as `labels`, averaged over `view`."""
        if self.combine_by == "trained":
            return self.trained.get(view, self.trained["single"]).predict(probabilities).astype(np.float32)
        combined = combine_vote if self.combine_by == "vote" else combine_average
        return combined(probabilities).astype(np.float32)

    def describe(self) -> dict:
        """Return who the members are and what was fitted."""
        trained = {view: fitted.as_dict() for view, fitted in self.trained.items()}
        return {"ensemble": {"combine": self.combine_by, "members": list(self.members), "trained": trained}}

    def keep_folder(self, name: str, folder: Path) -> None:
        """Say where the artifact of a member stands, so that its files can be linked instead of written again."""
        self._folders[name] = Path(folder)

    def write_files(self, folder: Path) -> tuple[str, ...]:
        """Put the artifact of each member into `members/<name>/`; on the same disk its files are linked."""
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
        """Return the names of the members' artifact.json, which name their own files.

        Raises:
            ModelError: the record names no members, or one that is no folder of its own.
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
        if wrong or len(set(members)) < len(members) or len(members) > MOST_MEMBERS:
            raise ModelError(
                f"{ARTIFACT_FILE}: ensemble.members: found {str(wrong or members)[:200]}, expected at most {MOST_MEMBERS} "
                f"different names of folders in {MEMBERS}/."
            )
        return tuple(f"{MEMBERS}/{name}/{ARTIFACT_FILE}" for name in members)

    @classmethod
    def read_files(cls, folder: Path, record: ArtifactRecord) -> Self:
        """Load the members, and what was fitted."""
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
            ensemble.keep_folder(name, folder / MEMBERS / name)
        return ensemble


def _read_combination(values: dict, folder: Path) -> TrainedCombination:
    try:
        return TrainedCombination.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: ensemble.trained: {error}; copy the artifact again, or fit it again.") from error


def match_labels(found: tuple[str, ...], labels: tuple[str, ...], name: str) -> list[int]:
    """Return where each of `labels` stands among those of a member.

    Raises:
        ModelError: the two are not the same set.
    """
    if set(found) != set(labels):
        raise ModelError(
            f"ensemble: the member {name} has the labels {', '.join(found)}; expected {', '.join(labels)}, in any "
            "order. Members tell the same labels apart."
        )
    return [found.index(label) for label in labels]


def match_aspects(aspects: Mapping[str, str]) -> str:
    """Return how all members of an ensemble make squares of images, of the name and the aspect of each.

    Raises:
        ModelError: they differ, so that no one square could be cut out of a picture for all of them.
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
    """Link (or copy) an artifact, and only what its artifact.json names."""
    if source.resolve() == target.resolve():
        return
    for file in (*read_artifact_record(source).sha256, ARTIFACT_FILE):
        link_file(source / file, target / file)


FAMILIES: dict[str, type[Classifier]] = list_families()


def load_artifact(name: str | Path) -> Classifier:
    """Load a classifier by the name of a shipped model, a run, or an artifact folder.

    Raises:
        ModelError: nothing of that name, or a damaged artifact.
    """
    return load_classifier(find_model(name))
