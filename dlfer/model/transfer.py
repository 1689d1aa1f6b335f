"""Strict transfer of EF-FER1's backbone weights to EF-FER2.

Keras' own `load_weights` matches layers by class and order: renamed, swapped or surplus layers load without an error,
and a mismatch raises only after most weights have been overwritten. Here each variable is matched by its path and
verified by its recorded sha256 afterwards, and missing or unexpected variables raise before any weight is changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dlfer.errors import ModelError, TransferError
from dlfer.model.predict import exact_float32
from dlfer.model.stage_network import BranchInput, TransferNetwork, set_branch_weights
from dlfer.model.weights_file import load_weights, save_weights
from dlfer.runs.files import read_json, write_atomically
from dlfer.runs.records import WeightsOrigin
from dlfer.runs.run_records import TransferLists, TransferRecord

WEIGHTS_FILE = "backbone.weights.h5"
RECORD_FILE = "backbone.json"
FEATURE_TOLERANCE = 1e-5
LARGEST_IMAGE = 4096


def draw_probe_images(image_size: int, channels: int) -> np.ndarray:
    """Return the probe images on which features are compared: a fixed pattern, uint8 [4, S, S, channels]."""
    rng = np.random.default_rng(20130701)
    coarse = rng.integers(0, 256, (4, 8, 8, channels))
    times = -(-image_size // 8)
    smooth = coarse.repeat(times, axis=1).repeat(times, axis=2)[:, :image_size, :image_size]
    return (0.8 * smooth + 0.2 * rng.integers(0, 256, smooth.shape)).astype(np.uint8)


def write_backbone(
    network: TransferNetwork,
    folder: Path,
    *,
    source: str,
    branches: Mapping[str, TransferLists] | None = None,
    origins: Sequence[WeightsOrigin] = (),
    left_out: Sequence[str] = (),
) -> None:
    """Write the backbone's weights, and a record with the sha256 of each and the features of the probe images.

    Args:
        network: the network whose backbone is written.
        folder: the target folder; created if it does not exist.
        source: where the weights came from, in words.
        branches: what was loaded into each branch of a hybrid, for the record of the transfer.
        origins: the origins of published weights that the backbone was trained from.
        left_out: paths of the source's variables beyond `model.feature_level`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(network.backbone, folder / WEIGHTS_FILE)
    size = network.face_input.image_size
    features = _compute_probe_features(network, size)
    record = {
        "source": source,
        "image_size": size,
        "preprocessing": describe_preprocessing(network),
        "variables": {v.path: _describe_variable(v) for v in network.backbone.variables if _is_weight(v)},
        "features": features[:, :64].astype(float).tolist(),
        "largest_feature": float(np.abs(features).max()),
        "compute_dtype": network.pooling.compute_dtype,
        "branches": {name: lists.as_json() for name, lists in (branches or {}).items()},
        "origins": [origin.as_json() for origin in origins],
        "left_out": list(left_out),
    }
    write_atomically(folder / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def transfer_backbone(folder: Path, network: TransferNetwork) -> TransferRecord:
    """Load the weights that `write_backbone` wrote into the backbone of `network`; return a record of the transfer.

    Raises:
        ModelError: the files are missing or damaged, or the sha256 of a weight is not the recorded one.
        TransferError: a variable is missing, unexpected or of another shape, or the preprocessing differs, in which
            cases `network` is unchanged; or the features differ from the recorded ones.
    """
    record = read_backbone_record(folder)
    wanted = {v.path: v for v in network.backbone.variables if _is_weight(v)}
    found = record["variables"]
    missing = tuple(path for path in wanted if path not in found)
    unexpected = tuple(path for path in found if path not in wanted)
    reshaped = [
        f"{path} {found[path]['shape']} -> {list(v.shape)}"
        for path, v in wanted.items()
        if path in found and found[path]["shape"] != list(v.shape)
    ]
    pixels, expected = record.get("preprocessing"), describe_preprocessing(network)
    if not (missing or unexpected or reshaped) and pixels is not None and pixels != expected:
        raise TransferError(
            f"{folder}: the backbone was trained on pixels prepared as {str(pixels)[:300]}, and would be given {expected}. Set "
            "model.pixel_scaling to what it was trained with."
        )
    if missing or unexpected or reshaped:
        raise TransferError(
            f"{folder}: the backbone does not carry over. Missing: {_some(missing)}. Unexpected: {_some(unexpected)}. "
            f"Of another shape: {_some(reshaped)}. Both stages need the same model.backbone and model.feature_level."
        )
    load_weights(network.backbone, folder / WEIGHTS_FILE)
    wrong = [path for path, v in wanted.items() if _describe_variable(v) != found[path]]
    if wrong:
        raise ModelError(
            f"{folder / WEIGHTS_FILE}: {len(wrong)} of {len(wanted)} weights are not those that were written "
            f"({_some(wrong)}). The file is damaged; delete the folder and train EF-FER1 again."
        )
    difference = _compare_features(record, network, folder)
    branches = {name: TransferLists.build(lists) for name, lists in record.get("branches", {}).items()}
    # Layers that fuse separately loaded branches come from no source and count as newly initialised.
    loaded = {path for lists in branches.values() for path in lists.loaded} or set(wanted)
    return TransferRecord(
        loaded=[path for path in wanted if path in loaded],
        newly_initialised=[v.path for v in network.model.weights if v.path not in loaded and _is_weight(v)],
        feature_difference=difference,
        source=record["source"],
        # Always empty, as missing or unexpected variables raise above; the record states it explicitly.
        missing=[],
        unexpected=[],
        branches=branches,
        origins=read_origins(record),
        left_out=[str(path) for path in record.get("left_out", [])],
    )


def read_origins(record: dict) -> list[WeightsOrigin]:
    """Return the origins of the published weights that a backbone was trained from, given its backbone.json."""
    return [WeightsOrigin.build(origin) for origin in record.get("origins", [])]


def list_paths(backbone: keras.Model) -> list[str]:
    """Return the paths of a backbone's weights, without the seed states of dropout layers."""
    return [variable.path for variable in backbone.variables if _is_weight(variable)]


def copy_levels(source: keras.Model, target: keras.Model) -> list[str]:
    """Copy the weights of a backbone into the same backbone cut off at an earlier feature level.

    Args:
        source: the longer backbone, with the weights.
        target: the same network up to the feature level.

    Returns:
        The paths of the variables of `source` that `target` leaves out.

    Raises:
        TransferError: a variable of `target` is missing in `source` or has another shape; `target` is unchanged.
    """
    given = {v.path: v for v in source.variables if _is_weight(v)}
    wanted = {v.path: v for v in target.variables if _is_weight(v)}
    missing = [path for path in wanted if path not in given]
    reshaped = [path for path, v in wanted.items() if path in given and given[path].shape != v.shape]
    if missing or reshaped:
        raise TransferError(
            f"model.feature_level: the backbone's weights do not carry over. Missing: {_some(missing)}. Of another shape: "
            f"{_some(reshaped)}. The source needs the same model.backbone, and at least as many feature levels."
        )
    for path, variable in wanted.items():
        variable.assign(given[path].value)
    return [path for path in given if path not in wanted]


def transfer_branch(
    branch: str, source: TransferNetwork, network: TransferNetwork, *, record: TransferRecord
) -> TransferLists:
    """Copy the backbone of `source` into a branch of a hybrid, and compare the features of both on the probe images.

    Args:
        branch: a name from `ModelConfig.name_branches`.
        source: a network with only the branch's backbone, which has the weights.
        record: the record of loading `source`; its source and origins are adopted.

    Returns:
        The loaded variables of the branch, with the difference of its features, their source and origins.

    Raises:
        TransferError: a variable is missing, unexpected or of another shape, or float32 features differ by over 1e-5.
    """
    loaded = set_branch_weights(network.backbone, branch, source.backbone)
    images = keras.ops.cast(draw_probe_images(source.face_input.image_size, 3), "float32")
    prepared = network.backbone.get_layer(f"{branch}_input")(network.face_input.preprocess(images))
    with exact_float32():
        expected = keras.ops.convert_to_numpy(source.backbone(source.face_input.preprocess(images), training=False))
        found = keras.ops.convert_to_numpy(network.backbone.get_layer(branch)(prepared, training=False))
    difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    if not difference <= FEATURE_TOLERANCE and network.pooling.compute_dtype == "float32":
        raise TransferError(
            f"branch {branch}: its features differ from those of {record.source} by {difference:.2e} on the same images, "
            f"expected at most {FEATURE_TOLERANCE:.0e}. The branch and its source are not the same function."
        )
    return TransferLists(
        loaded=loaded,
        newly_initialised=[],
        missing=[],
        unexpected=[],
        feature_difference=difference,
        source=record.source,
        origins=record.origins,
    )


def describe_preprocessing(network: TransferNetwork) -> list[dict]:
    """Return the preprocessing of the network's input layer, followed by that of each branch of a hybrid."""
    branches = [layer for layer in network.backbone.layers if isinstance(layer, BranchInput)]
    return [layer.preprocessing.as_dict() for layer in (network.face_input, *branches)]


def read_backbone_record(folder: Path) -> dict:
    """Return the record that `write_backbone` wrote beside the weights; raise ModelError if missing or damaged."""
    try:
        record = read_json(folder / RECORD_FILE)
        _check_record(record)
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder}: expected a backbone written by dlfer ({WEIGHTS_FILE}, {RECORD_FILE}): {error}."
        ) from error


def compute_weights_digest(backbone: keras.Model) -> str:
    """Return a sha256 (hex) over the paths, shapes and values of all weights of a backbone."""
    digest = hashlib.sha256()
    for variable in backbone.variables:
        if _is_weight(variable):
            digest.update(f"{variable.path} {_describe_variable(variable)}".encode())
    return digest.hexdigest()


def _check_record(record: Any) -> None:
    """Raise an error unless backbone.json has the structure that `write_backbone` writes, within size limits."""
    size, features = record["image_size"], np.asarray(record["features"], np.float64)
    if not isinstance(size, int) or not 0 < size <= LARGEST_IMAGE or features.ndim != 2:
        raise ValueError(f"found image_size {str(size)[:40]} and features {features.shape}")
    float(record["largest_feature"]), str(record["source"])
    for path, described in record["variables"].items():
        if not isinstance(described["shape"], list) or not isinstance(described["sha256"], str):
            raise ValueError(f"found {str(described)[:80]} for {path[:80]}")


def _compare_features(record: dict, network: TransferNetwork, folder: Path) -> float:
    """Return the largest relative difference of the probe features, at EF-FER1's image size, to the recorded ones."""
    size = record["image_size"]
    features = _compute_probe_features(network, size)[:, :64]
    difference = float(np.abs(features - np.asarray(record["features"])).max() / max(1.0, record["largest_feature"]))
    # bfloat16 has a precision of eight bits, so features are not compared; the weights' sha256 already were.
    is_exact = network.pooling.compute_dtype == record.get("compute_dtype", "float32") == "float32"
    if not difference <= FEATURE_TOLERANCE and is_exact:
        raise TransferError(
            f"{folder}: features of both stages differ by {difference:.2e} on the same images, "
            f"expected at most {FEATURE_TOLERANCE:.0e}. The two stages are not the same function."
        )
    return difference


def _compute_probe_features(network: TransferNetwork, size: int) -> np.ndarray:
    """Return the pooled features, float32 [4, F], of the uncropped probe images with a side of `size` pixels."""
    images = network.face_input.preprocess(keras.ops.cast(draw_probe_images(size, 3), "float32"))
    with exact_float32():
        features = network.pooling(network.backbone(images, training=False))
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(features, "float32")))


def _is_weight(variable: keras.Variable) -> bool:
    """Return whether a variable is a weight, in contrast to the seed state of a dropout layer."""
    return not variable.path.endswith("seed_generator_state")


def _describe_variable(variable: keras.Variable) -> dict:
    values = np.ascontiguousarray(keras.ops.convert_to_numpy(variable.value))
    return {"shape": list(values.shape), "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def _some(names, limit: int = 4) -> str:
    names = list(names)
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
