"""Gradient-boosted trees: XGBoost where it is installed, its JSON files, and how features are normalised. Without Keras.

What the trees are (Chen and Guestrin 2016), with S and V the sums of first and second derivatives of the loss
over the images of a node: a split has the gain 1/2 [S_L^2/(V_L+l) + S_R^2/(V_R+l) - S^2/(V+l)], a leaf the weight
-S/(V+l), and f_k = f_(k-1) + rate * tree; l is `boosting.reg_lambda`. XGBoost leaves the factor 1/2 out, and for
several classes takes 2 p (1-p) for the second derivative, an upper bound of the Hessian, where p (1-p) is its diagonal.

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
    """One stage of a backbone.

    Attributes:
        name: of its last layer.
        size: number of its features, one a channel.
    """

    name: str
    size: int


def find_level(levels: tuple[Level, ...], column: int) -> Level:
    """Return the level that a column of the features belongs to."""
    ends = np.cumsum([level.size for level in levels])
    return levels[int(np.searchsorted(ends, column, side="right"))]


def round_features(features: np.ndarray, levels: tuple[Level, ...]) -> np.ndarray:
    """Return features, float32 [B, F], as float16.

    Raises:
        ModelError: they are not as many as the levels have.
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
    """Return float32 [N, C], rows sum to one, of normalised features, float32 [N, F]."""
    threads = count_threads(scaled.size)
    booster.set_param({"nthread": threads})
    return booster.predict(import_xgboost().DMatrix(scaled, nthread=threads)).astype(np.float32)


TREES_FILE, SCALE_FILE = "trees.json", "features.npz"
PACKAGE = "xgboost-cpu==3.2.0"
FEW_VALUES = 200_000
MAX_BYTES = 2**30
"""A larger file of trees is refused; 100 rounds of 7 trees of depth 6 are 4 MB."""

_INTEGER_KEYS = ("left_children", "right_children", "parents", "split_indices", "split_type", "default_left")
_FLOAT_KEYS = ("split_conditions", "base_weights", "loss_changes", "sum_hessian")
_CATEGORY_KEYS = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


def import_xgboost() -> ModuleType:
    """Return the package xgboost.

    Raises:
        EnvironmentProblem: it is not installed.
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
    """Return how many threads the trees take for so many values of features (rows by columns); few are done by one."""
    return 1 if num_values < FEW_VALUES else os.cpu_count() or 1


def make_parameters(config: BoostingConfig, *, num_labels: int, seed: int, threads: int = 1) -> dict:
    """Return XGBoost's own parameters.

    The scores begin at 0, alike for every class, and random choices are a function of the seed and the round.
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
    """Read trees from XGBoost's JSON, which holds numbers and names and nothing that is executed.

    XGBoost is given the checked values, written again, and never the file: its parser and Python's may differ about
    text that is odd, such as a key that occurs twice.

    Raises:
        ModelError: it is no such file, or the trees are of other features or labels.
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
    """Raise unless a parsed file holds trees as this family grows them; everything that is an index is looked at.

    XGBoost follows the numbers of a file without a look; one that is out of range is a read out of bounds.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: these are no such trees, or trees of other
            features or labels.
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
        # One for all labels where XGBoost read the trees and saved them again.
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
        # XGBoost stores trees by their id; where one occurs twice, another tree is a null pointer.
        if tree["id"] != number:
            raise ValueError(f"tree {number}: its id is {str(tree['id'])[:80]}")
        _check_tree(tree, number, num_features)


def _check_tree(tree: dict, number: int, num_features: int) -> None:
    """Raise unless one tree is a tree: every node but the root has one parent, before it, and splits on a feature."""
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
    """How features are normalised before the trees see them.

    Args:
        how: "none", "standard" or "l2".
        levels: the features' levels, for l2.
        mean, deviation: float32 [F], for standard.
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
        """Return the scale of training features [N, F]; a feature that never varies is divided by 1."""
        if how != "standard":
            return cls(how, levels)
        mean = features.mean(axis=0, dtype=np.float64)
        # Column blocks: the squares of all features at once would be four times the features themselves.
        deviation = np.empty_like(mean)
        for start in range(0, len(mean), 256):
            block = slice(start, start + 256)
            deviation[block] = features[:, block].astype(np.float64).std(axis=0)
        deviation[deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)] = 1.0
        return cls(how, levels, mean=mean.astype(np.float32), deviation=deviation.astype(np.float32))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Return float32 [N, F]."""
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
        """Read what `write` wrote.

        Raises:
            ModelError: it is no such file, or of another number of features.
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
    """Return how the trees of an artifact were grown.

    Raises:
        ModelError: artifact.json does not say so.
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
    """Return what normalises the features of an artifact, and its trees.

    `levels` are those of its network; None: as artifact.json says.

    Raises:
        ModelError: a file is damaged, or of other features or labels.
        EnvironmentProblem: XGBoost is not installed.
    """
    if levels is None:
        levels = tuple(Level(level.name, level.features) for level in record.levels or ())
    how = read_boosting(folder, record).normalize.features
    scale = FeatureScale.read(folder / SCALE_FILE, how, levels)
    num_features = sum(level.size for level in levels)
    return scale, read_booster(folder / TREES_FILE, num_features=num_features, num_labels=len(record.labels))
