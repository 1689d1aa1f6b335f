"""How the runtimes of exports are opened: threads, batches, and several callers."""

import os
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.predict import runtimes as export_runtime
from dlfer.predict.runtimes import (
    FACES_AT_A_TIME,
    MAX_PROGRAMS,
    open_litert,
    open_onnx,
    open_openvino,
)
from dlfer.runs import machine


class FakeInterpreter:
    """As LiteRT's: it answers for the shape that it was made ready for alone."""

    opened: "FakeInterpreter"

    def __init__(self, *, model_path, num_threads):
        FakeInterpreter.opened = self
        self.num_threads, self.shapes, self.is_ready = num_threads, [], False

    def get_input_details(self):
        return [{"index": 3}]

    def get_output_details(self):
        return [{"index": 7}]

    def get_tensor_details(self):
        return []

    def resize_tensor_input(self, index, shape, *, strict):
        assert (index, strict) == (3, True)
        self.shapes.append(shape)
        self.is_ready = False

    def allocate_tensors(self):
        self.is_ready = True

    def set_tensor(self, index, images):
        assert self.is_ready
        assert images.shape == self.shapes[-1]
        self.images = images

    def invoke(self):
        self.answer = self.images.mean(axis=(1, 2))

    def get_tensor(self, index):
        assert index == 7
        return self.answer


@pytest.fixture
def litert(monkeypatch):
    monkeypatch.setattr(export_runtime, "import_extra", lambda module: SimpleNamespace(Interpreter=FakeInterpreter))
    monkeypatch.setattr(export_runtime, "count_cores", lambda: 5)
    return open_litert("a.tflite")


def test_litert_takes_every_core_and_a_few_faces_at_a_time(litert):
    images = np.random.default_rng(0).integers(0, 256, (2 * FACES_AT_A_TIME + 3, 4, 6, 1)).astype(np.uint8)
    assert litert(images) == pytest.approx(images.mean(axis=(1, 2)))
    assert litert(images[:3]) == pytest.approx(images[:3].mean(axis=(1, 2)))
    assert FakeInterpreter.opened.num_threads == 5
    assert FakeInterpreter.opened.shapes == [(FACES_AT_A_TIME, 4, 6, 1), (3, 4, 6, 1)]


def tensor(values: np.ndarray, kind: int, field: int = 9) -> onnx.TensorProto:
    """Return a tensor of an ONNX file, its values raw (9) or in a list of floats (4) or doubles (10)."""
    if field == 9:
        return onnx.numpy_helper.from_array(values, "kernel")
    return onnx.helper.make_tensor("kernel", kind, values.shape, values.ravel().tolist())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65_504.0])
@pytest.mark.parametrize(
    ("dtype", "kind", "field"), [("f4", 1, 9), ("f2", 10, 9), ("f8", 11, 9), ("f4", 1, 4), ("f8", 11, 10)]
)
@pytest.mark.parametrize("place", ["initializer", "node"])
def test_an_onnx_file_with_weights_that_are_not_finite_is_refused(tmp_path, value, dtype, kind, field, place):
    values = np.array([[-1.0, value], [2.0, 3.0]], dtype)
    weights = tensor(values, kind, field)
    # Behind the ReLU nothing shows of them.
    nodes = [
        onnx.helper.make_node("Cast", ["kernel"], ["w"], to=1),
        onnx.helper.make_node("MatMul", ["images", "w"], ["product"]),
        onnx.helper.make_node("Clip", ["product", "low", "high"], ["probabilities"]),
    ]
    given = [weights] if place == "initializer" else []
    if place == "node":
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["kernel"], value=weights))
    given += [onnx.numpy_helper.from_array(np.float32(bound), name) for name, bound in (("low", 0), ("high", 1))]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, "g", [info("images", 1, [None, 2])], [info("probabilities", 1, None)], given)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "a.onnx")
    if np.isfinite(value):
        assert open_onnx(tmp_path / "a.onnx")(np.ones((1, 2), np.float32)).shape == (1, 2)
        return
    with pytest.raises(ModelError, match="found 1 weights that are NaN or infinite in kernel"):
        open_onnx(tmp_path / "a.onnx")


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 9}, raising=False)
    monkeypatch.setattr(machine, "read_cgroup_limits", lambda: machine.CgroupLimits(2, None, None))
    assert machine.count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.count_cores() == 64
    monkeypatch.setattr(machine, "read_cgroup_limits", lambda: machine.CgroupLimits(2, None, 1.5))
    assert machine.count_cores() == 2


@pytest.mark.parametrize(("usable", "threads"), [(3, 3), (64, 0)])
def test_onnx_keeps_to_the_cores_of_the_process(monkeypatch, tmp_path, usable, threads):
    found = {}

    class Options:
        intra_op_num_threads = 0

    def open_session(path, options, *, providers):
        found["threads"] = options.intra_op_num_threads
        return SimpleNamespace(run=lambda names, given: [given["images"]])

    runtime = SimpleNamespace(SessionOptions=Options, InferenceSession=open_session)
    monkeypatch.setattr(export_runtime, "import_extra", lambda module: runtime)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(export_runtime, "count_cores", lambda: usable)
    (tmp_path / "a.onnx").write_bytes(b"")
    assert open_onnx(tmp_path / "a.onnx")("images") == "images"
    assert found["threads"] == threads


class FakeCore:
    """As OpenVINO's: a program that was made for one shape answers for no other."""

    def __init__(self):
        self.compiled = []

    def read_model(self, path):
        return SimpleNamespace(clone=self.clone)

    def clone(self):
        model = SimpleNamespace(shape=None)
        model.reshape = lambda shape: setattr(model, "shape", shape)
        return model

    def compile_model(self, model, device, settings):
        assert (device, settings["INFERENCE_PRECISION_HINT"], settings["INFERENCE_NUM_THREADS"]) == ("CPU", "f32", 5)
        shape = model.shape
        self.compiled.append(shape)

        def infer(given):
            assert shape in (None, given[0].shape)
            assert given[0].flags.c_contiguous
            return [given[0].mean(axis=(1, 2))]

        return SimpleNamespace(create_infer_request=lambda: SimpleNamespace(infer=infer))


@pytest.fixture
def openvino(monkeypatch, tmp_path):
    """The function that answers, and the core behind it."""
    core = FakeCore()
    monkeypatch.setattr(export_runtime, "import_extra", lambda module: SimpleNamespace(Core=lambda: core))
    monkeypatch.setattr(export_runtime, "count_cores", lambda: 5)
    (tmp_path / "a.onnx").write_bytes(b"")
    return open_openvino(tmp_path / "a.onnx"), core


def test_openvino_has_programs_for_one_and_for_eight_and_one_for_the_rest(openvino):
    answer, core = openvino
    images = np.random.default_rng(0).integers(0, 256, (2 * FACES_AT_A_TIME + 3, 4, 6, 1)).astype(np.uint8)
    for given in (images, images[:1], images[::2], images):
        assert answer(given) == pytest.approx(given.mean(axis=(1, 2)))
    assert core.compiled == [(FACES_AT_A_TIME, 4, 6, 1), None, (1, 4, 6, 1)]


def test_openvino_keeps_few_programs_however_many_sizes_come(openvino):
    answer, core = openvino
    for side in range(2, 2 + 2 * MAX_PROGRAMS):
        images = np.full((1, side, side, 1), side, np.uint8)
        assert answer(images) == pytest.approx(np.full((1, 1), side))
    assert len(core.compiled) == MAX_PROGRAMS + 1


def test_a_runtime_of_another_extra_is_named_with_it(monkeypatch, tmp_path):
    def fail(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(export_runtime.importlib, "import_module", fail)
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match=r"openvino is an extra.*make extra-openvino"):
        open_openvino(tmp_path / "a.onnx")
