"""Gradient-boosted trees without Keras: XGBoost's parameters and JSON files, and the normalisation of features.

The trees follow Chen and Guestrin (2016). With S and V the sums of the first and second derivatives of the loss over
the images of a node, the gain of a split is 1/2 [S_L^2/(V_L+l) + S_R^2/(V_R+l) - S^2/(V+l)], the weight of a leaf is
-S/(V+l), and f_k = f_(k-1) + rate * tree, where l is `boosting.reg_lambda`. XGBoost omits the factor 1/2, and for
several classes it uses 2 p (1-p) as the second derivative, an upper bound of the Hessian, whose diagonal is p (1-p).

The features are multi-level: the feature maps of each level of a backbone, pooled and concatenated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.config.sections import BoostingConfig
from dlfer.errors import EnvironmentProblem, ModelError, NonFiniteError, shorten
from dlfer.runs.files import Header, parse_json, read_json, read_npz, write_npz
from dlfer.runs.records import ArtifactRecord

if TYPE_CHECKING:
    import xgboost


@dataclass(frozen=True)
class Level:
    """One feature level of a backbone.

    Attributes:
        name: name of its last layer.
        size: number of its features, one per channel.
    """

    name: str
    size: int


def find_level(levels: tuple[Level, ...], column: int) -> Level:
    """Return the level to which a column of the features belongs."""
    ends = np.cumsum([level.size for level in levels])
    return levels[int(np.searchsorted(ends, column, side="right"))]


def round_features(features: np.ndarray, levels: tuple[Level, ...]) -> np.ndarray:
    """Round features, float32 [B, F], to float16, clipped to its finite range.

    Raises:
        ModelError: F is not the number of features of the levels.
        NonFiniteError: a feature is NaN; the backbone's weights are broken.
    """
    num_features = sum(level.size for level in levels)
    if features.shape[1:] != (num_features,):
        raise ModelError(
            f"the network gives features of the shape {features.shape}, expected {num_features:,} a face, as the trees have "
            "them; its record describes another model."
        )
    if np.isnan(features).any():
        column = int(np.flatnonzero(np.isnan(features).any(axis=0))[0])
        raise NonFiniteError(
            f"feature {column} (level {find_level(levels, column).name}) is NaN; expected numbers. "
            "The backbone's weights are broken: train EF-FER1 again, or take other pretrain.weights."
        )
    return np.clip(features, -_LARGEST, _LARGEST).astype(np.float16)


_LARGEST = float(np.finfo(np.float16).max)


def predict_trees(booster: xgboost.Booster, scaled: np.ndarray) -> np.ndarray:
    """Return the probabilities, float32 [N, C], rows sum to one, for normalised features, float32 [N, F]."""
    threads = count_threads(scaled.size)
    booster.set_param({"nthread": threads})
    return booster.predict(import_xgboost().DMatrix(scaled, nthread=threads)).astype(np.float32)


TREES_FILE, SCALE_FILE = "trees.json", "features.npz"
PACKAGE = "xgboost-cpu==3.2.0"
FEW_VALUES = 200_000
MAX_BYTES = 2**30
"""Largest accepted file of trees, in bytes; 100 rounds of 7 trees of depth 6 take 4 MB."""

_INTEGER_KEYS = ("left_children", "right_children", "parents", "split_indices", "split_type", "default_left")
_FLOAT_KEYS = ("split_conditions", "base_weights", "loss_changes", "sum_hessian")
_CATEGORY_KEYS = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


def import_xgboost() -> ModuleType:
    """Import and return the package xgboost.

    Raises:
        EnvironmentProblem: it cannot be imported.
    """
    try:
        import xgboost
    except ImportError as error:
        raise EnvironmentProblem(
            f"model.family: boosted needs the package xgboost, which cannot be imported ({shorten(error)}). Install it: "
            f"python -m pip install {PACKAGE}   (on macOS: xgboost instead of xgboost-cpu)"
        ) from error
    return xgboost


def count_threads(num_values: int) -> int:
    """Return the number of threads for `num_values` feature values (rows times columns): 1 for few, else all cores."""
    return 1 if num_values < FEW_VALUES else os.cpu_count() or 1


def make_parameters(config: BoostingConfig, *, num_labels: int, seed: int, threads: int = 1) -> dict:
    """Return the parameters of XGBoost for the section `boosting`.

    The initial score of every class is 0, and random choices are a function of the seed and the round.
    """
    return {
        "objective": "multi:softprob",
        "num_class": num_labels,
        "tree_method": "hist",
        "device": "cpu",
        "base_score": 0.0,
        "learning_rate": config.learning_rate,
        "max_depth": config.max_depth,
        "min_child_weight": config.min_child_weight,
        "reg_lambda": config.reg_lambda,
        "gamma": config.gamma,
        "subsample": config.subsample,
        "colsample_bytree": config.colsample,
        "max_bin": config.max_bin,
        "max_delta_step": 1.0 if config.normalize.leaves else 0.0,
        "nthread": threads,
        "seed": seed,
        "seed_per_iteration": True,
        "disable_default_eval_metric": True,
        "verbosity": 0,
    }


def read_booster(path: Path, *, num_features: int, num_labels: int) -> xgboost.Booster:
    """Read trees from XGBoost's JSON format, which holds only numbers and names and no code.

    XGBoost does not parse the file itself but a new serialisation of the checked values, since its parser and Python's
    may interpret malformed JSON, such as duplicate keys, differently.

    Raises:
        ModelError: the file has another format, or its trees are for other features or labels.
    """
    xgb = import_xgboost()
    try:
        model = read_json(path, max_bytes=MAX_BYTES)
        check_trees(model, num_features=num_features, num_labels=num_labels)
        return xgb.Booster(model_file=bytearray(json.dumps(model, allow_nan=False), "ascii"))
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[-1]
        raise ModelError(f"{path}: expected the trees of a trained model in XGBoost's JSON: {reason}") from error


def check_trees(model: Any, *, num_features: int, num_labels: int) -> None:
    """Raise an error unless a parsed file holds trees as this family grows them, with every index in range.

    XGBoost does not check the indices in a file; one that is out of range makes it read out of bounds.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: the contents are not such trees, or are
            trees for other features or labels.
    """
    learner = model["learner"]
    sizes, booster = learner["learner_model_param"], learner["gradient_booster"]
    found = int(sizes["num_feature"]), int(sizes["num_class"])
    if found != (num_features, num_labels):
        raise ValueError(
            f"found trees of {found[0]} features and {found[1]} labels, expected {num_features} and {num_labels}; the "
            "file belongs to another model"
        )
    objective, model = learner["objective"], booster["model"]
    trees, counts = model["trees"], model["gbtree_model_param"]
    rounds, scores = len(trees) // num_labels, parse_json(sizes["base_score"])
    expected = {
        "objective": (objective["name"], "multi:softprob"),
        "classes of the objective": (int(objective["softmax_multiclass_param"]["num_class"]), num_labels),
        # XGBoost writes a single score for all labels when it saves trees that it has loaded.
        "first scores": (scores, [0] * (1 if len(scores) == 1 else num_labels)),
        "booster": (booster["name"], "gbtree"),
        "targets": (sizes["num_target"], "1"),
        "parallel trees": (counts["num_parallel_tree"], "1"),
        "number of trees": (int(counts["num_trees"]), len(trees)),
        "classes of the trees": (model["tree_info"], list(range(num_labels)) * rounds),
        "ends of the rounds": (model["iteration_indptr"], list(range(0, len(trees) + 1, num_labels))),
        "names of features": (len(learner["feature_names"]) + len(learner["feature_types"]), 0),
        "categories": (sum(map(len, model["cats"].values())), 0),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{what}: found {str(found)[:80]}, expected {str(wanted)[:80]}")
    for number, tree in enumerate(trees):
        # XGBoost stores trees by their id, so a duplicate id would leave a null pointer in another place.
        if tree["id"] != number:
            raise ValueError(f"tree {number}: its id is {str(tree['id'])[:80]}")
        _check_tree(tree, number, num_features)


def _check_tree(tree: dict, number: int, num_features: int) -> None:
    """Raise an error unless each node but the root has one parent, with a lower number, and splits are on features."""
    param = tree["tree_param"]
    size = int(param["num_nodes"])
    whole, real = ({key: np.asarray(tree[key]) for key in keys} for keys in (_INTEGER_KEYS, _FLOAT_KEYS))
    if size < 1 or any(array.shape != (size,) for array in (*whole.values(), *real.values())):
        raise ValueError(f"tree {number}: its lists are not of {size} nodes")
    if any(array.dtype.kind != "i" or (array != array.astype(np.int32)).any() for array in whole.values()):
        raise ValueError(f"tree {number}: its nodes and features are not numbered by integers")
    largest = np.finfo(np.float32).max
    if any(array.dtype.kind not in "if" or not (np.abs(array) <= largest).all() for array in real.values()):
        raise ValueError(f"tree {number}: a leaf or a threshold is not finite")
    left, right, parents = whole["left_children"], whole["right_children"], whole["parents"]
    nodes, splits = np.arange(size), left != -1
    children = np.concatenate([left[splits], right[splits]])
    is_tree = np.array_equal(np.sort(children), nodes[1:]) and np.array_equal(right != -1, splits)
    if not is_tree or (children <= np.tile(nodes[splits], 2)).any():
        raise ValueError(f"tree {number}: its nodes are not those of a tree")
    if not np.array_equal(parents[children], np.tile(nodes[splits], 2)):
        raise ValueError(f"tree {number}: its nodes have other parents than they are children of")
    if ((whole["split_indices"] < 0) | (whole["split_indices"] >= num_features)).any():
        raise ValueError(f"tree {number}: it splits on a feature beyond {num_features}")
    if whole["split_type"].any() or any(len(tree[key]) for key in _CATEGORY_KEYS):
        raise ValueError(f"tree {number}: it splits on categories")
    if (param["num_deleted"], param["size_leaf_vector"], int(param["num_feature"])) != ("0", "1", num_features):
        raise ValueError(f"tree {number}: it is of other features or leaves")


class FeatureScale:
    """The normalisation of features before they enter the trees.

    Args:
        how: "none", "standard" (each feature by its mean and deviation) or "l2" (each level of an image to norm 1).
        levels: the levels of the features.
        mean, deviation: statistics of the features for "standard", float32 [F].
    """

    def __init__(
        self,
        how: str,
        levels: tuple[Level, ...],
        *,
        mean: np.ndarray | None = None,
        deviation: np.ndarray | None = None,
    ) -> None:
        self.how, self.levels = how, levels
        size = sum(level.size for level in levels)
        self.mean = np.zeros(size, np.float32) if mean is None else mean
        self.deviation = np.ones(size, np.float32) if deviation is None else deviation

    @classmethod
    def fit(cls, how: str, levels: tuple[Level, ...], features: np.ndarray) -> FeatureScale:
        """Return the normalisation fitted on training features [N, F]; constant features get the deviation 1."""
        if how != "standard":
            return cls(how, levels)
        mean = features.mean(axis=0, dtype=np.float64)
        # Computed in blocks of columns: float64 copies of all features would take four times their memory.
        deviation = np.empty_like(mean)
        for start in range(0, len(mean), 256):
            block = slice(start, start + 256)
            deviation[block] = features[:, block].astype(np.float64).std(axis=0)
        deviation[deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)] = 1.0
        return cls(how, levels, mean=mean.astype(np.float32), deviation=deviation.astype(np.float32))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Return the normalised features, float32 [N, F]."""
        scaled = features.astype(np.float32)
        if self.how == "standard":
            scaled -= self.mean
            scaled /= self.deviation
        elif self.how == "l2":
            start = 0
            for level in self.levels:
                part = scaled[:, start : start + level.size]
                part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
                start += level.size
        return scaled

    def write(self, path: Path) -> None:
        """Write the statistics as .npz, without pickle."""
        write_npz(path, {"mean": self.mean, "deviation": self.deviation})

    @classmethod
    def read(cls, path: Path, how: str, levels: tuple[Level, ...]) -> FeatureScale:
        """Read the statistics from a file of `write`.

        Raises:
            ModelError: the file has another format or number of features, or values that are not finite.
        """
        size = sum(level.size for level in levels)

        def check(headers: Mapping[str, Header]) -> None:
            for name in ("mean", "deviation"):
                if headers[name].shape != (size,) or headers[name].dtype.kind != "f":
                    raise ModelError(f"{path}: found statistics of {headers[name].shape} features, expected {size}.")

        try:
            arrays = read_npz(path, names=("mean", "deviation"), check=check)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: expected mean and deviation of the features: {error}.") from error
        mean, deviation = arrays["mean"], arrays["deviation"]
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
            raise ModelError(f"{path}: found statistics of features that are NaN or infinite, expected finite numbers.")
        return cls(how, levels, mean=mean, deviation=deviation)


def read_boosting(folder: Path, record: ArtifactRecord) -> BoostingConfig:
    """Return the section `boosting` with which the trees of an artifact were grown.

    Raises:
        ModelError: artifact.json has no valid section `boosting`.
    """
    try:
        return BoostingConfig.model_validate_json(json.dumps(record.boosting))
    except ValueError as error:
        raise ModelError(
            f"{folder}: boosting: {shorten(error)}; copy the artifact again, or train it again."
        ) from error


def read_trees(
    folder: Path, record: ArtifactRecord, levels: tuple[Level, ...] | None = None
) -> tuple[FeatureScale, xgboost.Booster]:
    """Return the feature normalisation and the trees of an artifact.

    `levels` are the feature levels of its network; None takes them from artifact.json.

    Raises:
        ModelError: a file is damaged, or is for other features or labels.
        EnvironmentProblem: XGBoost is not installed.
    """
    if levels is None:
        levels = tuple(Level(level.name, level.features) for level in record.levels or ())
    how = read_boosting(folder, record).normalize.features
    scale = FeatureScale.read(folder / SCALE_FILE, how, levels)
    num_features = sum(level.size for level in levels)
    return scale, read_booster(folder / TREES_FILE, num_features=num_features, num_labels=len(record.labels))
