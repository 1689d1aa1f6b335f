"""Whatever the JSON beside a model says: it is used, or refused in a sentence; nothing ends in a traceback."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlfer.errors import DlferError, ModelError
from dlfer.predict import engines, runtimes
from dlfer.predict.engines import load_engine
from dlfer.predict.predictor import FacePredictor
from dlfer.runs.find import is_default
from dlfer.serve.models import build_model, choose_names, describe_tensors

SHIPPED = Path(__file__).parents[2] / "saved_models" / "lite2_96"
RECORDS = ("artifact.json", "metrics.json", "data.json")
SOMETHING_ELSE: list[Any] = [
    None, True, -5, 0, 1, 10**9, 2**70, -0.5, 1e308, math.nan, math.inf, "", "x", "../x", "\x1b[31m\u202e<b>\ud800", "y" * 100_000,
    [], [[]], ["x", "x"], [None], [10**9] * 4, {}, {"a": {"b": None}},
]  # fmt: skip


def list_places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the way to every value in nested ones."""
    if place:
        yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from list_places(inner, (*place, key))


def change(record: dict[str, Any], place: tuple, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a place; `...` takes it out."""
    record = copy.deepcopy(record)
    inner = record
    for step in place[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return record


def refuse(folder: Path) -> None:
    raise ModelError(f"{folder}: Keras is not loaded here.")


@pytest.fixture
def runtime(monkeypatch):
    """Let the model be opened by nothing, so that records alone are tried; each file's sha256 is compared all the same."""
    keras = types.ModuleType("dlfer.model.families")
    keras.load_artifact = refuse
    monkeypatch.setitem(sys.modules, "dlfer.model.families", keras)
    answers = np.full((1, 7), 1 / 7, np.float32)
    monkeypatch.setattr(runtimes, "_open", lambda *args, **named: lambda images: answers.repeat(len(images), axis=0))


def use(folder: Path) -> None:
    """Do with a model what predict, serve, show and report do before the first picture, and then with one."""
    is_default(folder)
    engine = load_engine(str(folder))
    FacePredictor(engine, faces="whole").predict([np.zeros((20, 30, 3), np.uint8)])
    names = choose_names([(None, folder, engine.about)])
    model = build_model(names[0], engine, folder=folder, faces="auto")
    describe_tensors(model).model_dump_json()
    model.predict([np.zeros((20, 30, 3), np.uint8)])
    model.crop([np.zeros((20, 30, 3), np.uint8)], "whole")


def try_to_use(folder: Path, what: object, use: Callable[[Path], None] = use) -> None:
    """Let a model be used, or refused in a sentence."""
    told = ""
    try:
        use(folder)
    except DlferError as error:
        told = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    assert len(told) < 1500
    assert "\x1b" not in told


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "m"
    shutil.copytree(SHIPPED, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_every_value_of_a_record_may_be_anything(copied, runtime, name):
    file = copied / name
    whole = file.read_text()
    record = json.loads(whole)
    places = list(list_places(record))
    # Of long records every value is changed in turn to some of the others, in `make test-slow` and by hypothesis to all.
    step = max(1, len(places) * len(SOMETHING_ELSE) // 300)
    changes = [(place, value) for place in places for value in (..., *SOMETHING_ELSE)]
    try:
        for place, value in changes[::step]:
            file.write_text(json.dumps(change(record, place, value)))
            try_to_use(copied, (name, place, str(value)[:40]))
    finally:
        file.write_text(whole)
    use(copied)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_several_values_may_be_anything(copied, runtime, data):
    name = data.draw(st.sampled_from(RECORDS))
    file = copied / name
    whole = file.read_text()
    record = json.loads(whole)
    anything = st.sampled_from(SOMETHING_ELSE) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.sampled_from(list(list_places(record))))
            record = change(record, place, data.draw(anything))
        file.write_text(json.dumps(record))
        try_to_use(copied, record)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize(
    "contents",
    [b"", b"[", b"[]", b"null", b"\xff", b"{}", b'{"schema": 99}', b"[" * 10**6, b'{"a":' * 10**5, b"\x00" * 1000],
)
@pytest.mark.parametrize("name", [*RECORDS, "run.json", "config.yaml"])
def test_no_record_at_all(copied, runtime, name, contents):
    file = copied / name
    whole = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(contents)
        try_to_use(copied, name)
    finally:
        file.write_bytes(whole) if whole is not None else file.unlink()


@pytest.mark.parametrize("value", [-5, 0, 10**9, "x", 1.5, [48], True])
@pytest.mark.parametrize("place", [("about", "face_size"), ("input", "image_size")])
def test_sizes_have_a_range(copied, runtime, place, value):
    file = copied / "artifact.json"
    whole = file.read_text()
    try:
        file.write_text(json.dumps(change(json.loads(whole), place, value)))
        with pytest.raises(ModelError, match=place[1]):
            use(copied)
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder as `dlfer export --to onnx` writes it, around the ONNX file that comes with dlfer."""
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    folder.mkdir()
    shutil.copy(SHIPPED / "network.onnx", folder / "model.onnx")
    artifact = json.loads((SHIPPED / "artifact.json").read_text())
    record = {
        "schema": 2,
        "version": 1,
        "format": "onnx",
        "file": "model.onnx",
        "labels": artifact["labels"],
        "input": {
            "name": "images", "dtype": "uint8", "range": [0, 255], "shape": [None, None, None, 1], "channels": "grey",
            "network_size": 96, "aspect": "crop", "faces": {"detect": "centerface", "size": 640}, "note": "",
        },
        "output": {"name": "probabilities", "dtype": "float32", "shape": [None, 7], "note": ""},
        "temperature": {"value": 1.1, "applied": False, "note": ""},
        "limits": {"difference": 1e-4, "agreement": 1.0},
        "about": {
            "model": "m", "family": "transfer", "backbone": "b", "artifact_sha256": artifact["sha256"],
            "trained": artifact["about"], "packages": {"onnx": "1"},
        },
        "opset": 17,
        "sha256": {"model.onnx": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()},
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(record))
    return folder


def use_export(folder: Path) -> None:
    engine = load_engine(str(folder), "onnx")
    FacePredictor(engine, faces="whole").predict([np.zeros((20, 30, 3), np.uint8)])
    build_model("m", engine, folder=folder, faces="auto")
    engines.draw_faces(engine)


@pytest.mark.slow
def test_every_value_of_an_export_may_be_anything(exported, runtime):
    file = exported / "export.json"
    whole = file.read_text()
    record = json.loads(whole)
    use_export(exported)
    try:
        changes = [(place, value) for place in list_places(record) for value in (..., *SOMETHING_ELSE)]
        for place, value in changes[::2]:
            file.write_text(json.dumps(change(record, place, value)))
            try_to_use(exported, (place, str(value)[:40]), use_export)
    finally:
        file.write_text(whole)
