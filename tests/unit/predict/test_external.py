"""External models: what is said of their input is read strictly, held against the file, and done to the pixels."""

import h5py
import keras
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlfer.errors import ModelError, UserError
from dlfer.model.weights_file import check_keras_file
from dlfer.predict import external
from dlfer.predict.external import open_external, parse_input, to_probabilities

RNG = np.random.default_rng(3)


def draw_images(number: int, channels: int = 1, side: int = 6) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (number, side, side, channels), np.uint8)


def softmax(values: np.ndarray) -> np.ndarray:
    values = np.exp(values - values.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


def write_onnx(path, shape, *, num_labels=3, kind=TensorProto.FLOAT, more_outputs=0, more_inputs=0):
    """Write images -> flatten -> one matrix product; return the matrix, float32 [pixels, num_labels]."""
    kernel = RNG.normal(0, 0.1, (int(np.prod([side for side in shape[1:]])), num_labels)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "kernel"], ["logits"]),
        *(helper.make_node("Identity", ["logits"], [f"more{n}"]) for n in range(more_outputs)),
    ]
    names = ["logits", *(f"more{n}" for n in range(more_outputs))]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("images", kind, shape),
            *(helper.make_tensor_value_info(f"other{n}", kind, shape) for n in range(more_inputs)),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], num_labels]) for name in names],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return kernel


@pytest.mark.parametrize(
    ("text", "size", "colours", "scaled", "layout"),
    [
        ("48x48 gray /255", (48, 48), "gray", (0, 1), None),
        ("/255 GREY 48X40", (48, 40), "gray", (0, 1), None),
        ("224x224 rgb -1..1 nchw", (224, 224), "rgb", (-1, 1), "nchw"),
        ("64x64 bgr 0..255 nhwc", (64, 64), "bgr", (0, 255), "nhwc"),
        ("64x64 gray -0.5..0.5", (64, 64), "gray", (-0.5, 0.5), None),
        ("64x64 gray /128 mean=1", (64, 64), "gray", (-1, 255 / 128 - 1), None),
        ("64x64 rgb 0..255 mean=1,2,3 std=2", (64, 64), "rgb", ((-0.5, -1, -1.5), (127, 126.5, 126)), None),
        ("64x64 rgb /255 mean=0.5 std=0.1,0.2,0.5", (64, 64), "rgb", ((-5, -2.5, -1), (5, 2.5, 1)), None),
    ],
)
def test_words_are_read_in_any_order(text, size, colours, scaled, layout):
    given = parse_input(text)
    assert (given.height, given.width, given.colours, given.layout) == (*size, colours, layout)
    black, white = (given.prepare(np.full((1, 5, 5, 1), value, np.uint8)) for value in (0, 255))
    assert black.shape == (1, *size, given.channels)
    assert np.allclose(black[0, 0, 0], scaled[0], atol=1e-5)
    assert np.allclose(white[0, -1, -1], scaled[1], atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not say the size and the colours and the scaling"),
        ("48x48 gray", "does not say the scaling"),
        ("gray /255", "does not say the size"),
        ("48x48 /255", "does not say the colours"),
        ("48 gray /255", "'48' is not understood"),
        ("0x48 gray /255", "sides of 1 to 4096"),
        ("99999x48 gray /255", "sides of 1 to 4096"),
        ("48x48 gray rgb /255", "a second value for the colours, 'rgb'"),
        ("48x48 gray /255 -1..1", "a second value for the scaling"),
        ("48x48 gray /0", "'/0' is not understood"),
        ("48x48 gray 1..0", "is not understood"),
        ("48x48 grau /255", "'grau' is not understood"),
        ("48x48 gray /255 std=0", "'std=0' is not understood"),
        ("48x48 rgb /255 mean=1,2", "mean has 2 numbers, expected one or 3"),
        ("48x48 gray /255 std=1,2,3", "std has 3 numbers, expected one or 1"),
        ("48x48 gray -1..1 mean=0.5", "already subtracts a mean"),
        ("48x48 gray /255 chw", "'chw' is not understood"),
    ],
)
def test_what_is_not_understood_is_named_with_the_form(text, message):
    with pytest.raises(UserError, match=message):
        parse_input(text)


def test_colours_are_brought_to_what_the_model_takes():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[..., 0] = 200
    assert parse_input("4x4 rgb 0..255").prepare(image)[0, 0, 0].tolist() == [200, 0, 0]
    assert parse_input("4x4 bgr 0..255").prepare(image)[0, 0, 0].tolist() == [0, 0, 200]
    assert parse_input("4x4 gray 0..255").prepare(image)[0, 0, 0].tolist() == [60]
    # The mean is in the order of the colours that are named.
    assert parse_input("4x4 bgr 0..255 mean=1,2,3").prepare(image)[0, 0, 0].tolist() == [-1, -2, 197]


@pytest.mark.parametrize("number", [1, 5, 70])
@pytest.mark.parametrize(("batch", "layout"), [("N", "nchw"), (1, "nchw"), (4, "nhwc")])
def test_an_onnx_file_answers_for_any_number_of_images(tmp_path, number, batch, layout):
    shape = [batch, 1, 6, 6] if layout == "nchw" else [batch, 6, 6, 1]
    kernel = write_onnx(tmp_path / "m.onnx", shape)
    images = draw_images(number)
    model = open_external(tmp_path / "m.onnx", parse_input("6x6 gray /255"), 3)
    assert (model.runtime, model.batch) == ("ONNX Runtime", None if batch == "N" else batch)
    expected = images.reshape(number, -1) / np.float32(255) @ kernel
    assert np.allclose(model.compute_outputs(images), expected, atol=1e-5)
    assert model.time_one(images) > 0


def test_colours_and_layout_reach_an_onnx_file(tmp_path):
    kernel = write_onnx(tmp_path / "m.onnx", ["N", 3, 6, 6])
    images = draw_images(4, channels=3)
    found = open_external(tmp_path / "m.onnx", parse_input("6x6 bgr -1..1"), 3).compute_outputs(images)
    expected = (images[..., ::-1].transpose(0, 3, 1, 2) / 127.5 - 1).reshape(4, -1) @ kernel
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.UINT8, np.uint8), (TensorProto.FLOAT16, np.float16)])
def test_an_onnx_file_of_another_dtype(tmp_path, kind, dtype):
    kernel = write_onnx(tmp_path / "m.onnx", ["N", 6, 6, 1], kind=kind)
    images = draw_images(3)
    found = open_external(tmp_path / "m.onnx", parse_input("6x6 gray 0..255"), 3).compute_outputs(images)
    assert np.allclose(found, images.astype(dtype).astype(np.float32).reshape(3, -1) @ kernel, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "text", "num_labels", "message"),
    [
        ({"shape": ["N", 1, 6, 6]}, "7x6 gray /255", 3, r"shape \['any', 1, 6, 6\], which is not --input"),
        ({"shape": ["N", 1, 6, 6]}, "6x6 rgb /255", 3, "which is not --input"),
        ({"shape": ["N", 1, 6, 6]}, "6x6 gray /255 nhwc", 3, "which is not --input"),
        ({"shape": ["N", 3, 3, 3]}, "3x3 rgb /255", 3, "add nhwc or nchw to --input"),
        ({"shape": ["N", 36]}, "6x6 gray /255", 3, "which is not --input"),
        ({"shape": ["N", 1, 6, 6]}, "6x6 gray /255", 7, r"\['N', 3\], expected one of \[N, 7\]"),
        ({"shape": ["N", 1, 6, 6], "more_outputs": 1}, "6x6 gray /255", 3, "one number for each of the 3 --labels"),
        ({"shape": ["N", 1, 6, 6], "more_inputs": 1}, "6x6 gray /255", 3, "takes 2 inputs"),
        ({"shape": ["N", 1, 6, 6], "kind": TensorProto.INT32}, "6x6 gray 0..255", 3, "takes tensor.int32."),
        (
            {"shape": ["N", 1, 6, 6], "kind": TensorProto.UINT8},
            "6x6 gray /255",
            3,
            "takes uint8, expected float32; for",
        ),
    ],
)
def test_a_file_that_takes_something_else_is_refused(tmp_path, given, text, num_labels, message):
    write_onnx(tmp_path / "m.onnx", **given)
    with pytest.raises(ModelError, match=message):
        open_external(tmp_path / "m.onnx", parse_input(text), num_labels)


@pytest.mark.parametrize("suffix", [".onnx", ".tflite", ".h5", ".hdf5", ".keras"])
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "there is no such file"),
        (b"", "The file is empty: get it again"),
        (b"not a model", "The file is damaged, cut short or not of the format .*: get it again"),
        (b"<!DOCTYPE html>", "The file is a web page, perhaps of a login, expected the format .*: get the model again"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\3\4zzzz", r"The file is a zip archive: unpack it|The file is damaged.* of the format \.keras"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path, suffix, contents, message):
    path = tmp_path / f"m{suffix}"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ModelError, match=f"m{suffix}: .*{message}") as caught:
        open_external(path, parse_input("6x6 gray /255"), 3)
    assert "KeyError" not in str(caught.value)


def test_a_model_that_is_cut_short_is_refused_with_what_to_do(tmp_path):
    write_onnx(tmp_path / "m.onnx", ["N", 6, 6, 1])
    build_keras().save(tmp_path / "m.keras")
    build_keras().save(tmp_path / "m.h5")
    for name in ("m.onnx", "m.keras", "m.h5"):
        whole = (tmp_path / name).read_bytes()
        for size in (2, len(whole) // 2, len(whole) - 20):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ModelError, match="The file is damaged, cut short or not of the format"):
                open_external(tmp_path / name, parse_input("6x6 gray /255"), 3)


def build_keras(**options) -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((6, 6, 1)),
        keras.layers.Conv2D(4, 3),
        keras.layers.Flatten(),
        keras.layers.Dense(3, **options),
    ]
    return keras.Sequential(layers)


@pytest.mark.parametrize("name", ["m.h5", "m.hdf5", "m.keras"])
def test_files_of_keras(tmp_path, name):
    network = build_keras(activation="softmax")
    network.save(tmp_path / name)
    images = draw_images(5)
    model = open_external(tmp_path / name, parse_input("6x6 gray -1..1"), 3)
    expected = np.asarray(network(images.astype(np.float32) / 127.5 - 1))
    assert np.allclose(model.compute_outputs(images), expected, atol=1e-5)
    with pytest.raises(ModelError, match=r"expected one of \[N, 4\]"):
        open_external(tmp_path / name, parse_input("6x6 gray -1..1"), 4)


def test_an_h5_whose_weights_are_in_another_order_than_its_layers_is_refused(tmp_path):
    given = keras.Input((6, 6, 1))
    inner = keras.layers.Conv2D(4, 1, name="first")(keras.layers.Conv2D(4, 1, name="start")(given))
    inner = keras.layers.Flatten()(keras.layers.Conv2D(4, 1, name="second")(inner))
    keras.Model(given, keras.layers.Dense(3, name="top")(inner)).save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        stored = file["model_weights"].attrs
        order = {"first": "second", "second": "first"}
        names = np.asarray(stored["layer_names"]).astype("U")
        stored["layer_names"] = np.array([order.get(name, name) for name in names], "S")
    message = r"m\.h5: does not hold the weights of this network.* found second/kernel of layer second .* expected first/kernel"
    with pytest.raises(ModelError, match=message):
        open_external(tmp_path / "m.h5", parse_input("6x6 gray /255"), 3)


@pytest.mark.parametrize("name", ["m.h5", "m.keras"])
def test_a_file_of_keras_with_code_is_refused_before_anything_is_built(tmp_path, name):
    layers = [keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Lambda(lambda x: x[:, :3])]
    keras.Sequential(layers).save(tmp_path / name)
    with pytest.raises(ModelError, match="Lambda, which is Python code"):
        open_external(tmp_path / name, parse_input("6x6 gray /255"), 3)


def test_weights_alone_are_no_model(tmp_path):
    build_keras().save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ModelError, match=r"m\.weights\.h5: holds weights without the network"):
        check_keras_file(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("is_quantised", [False, True])
def test_a_litert_file(tmp_path, is_quantised):
    import tensorflow as tf

    network = build_keras()
    converter = tf.lite.TFLiteConverter.from_keras_model(network)
    images = draw_images(9)
    if is_quantised:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None].astype(np.float32) / 255] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.uint8
    (tmp_path / "m.tflite").write_bytes(converter.convert())
    model = open_external(tmp_path / "m.tflite", parse_input("6x6 gray /255"), 3)
    expected = np.asarray(network(images / np.float32(255)))
    assert np.allclose(model.compute_outputs(images), expected, atol=0.1 if is_quantised else 1e-5)
    with pytest.raises(ModelError, match="which is not --input"):
        open_external(tmp_path / "m.tflite", parse_input("6x6 rgb /255"), 3)


def test_outputs_become_probabilities_only_as_they_are_said_to_be():
    logits = np.array([[1.0, 2.0, -3.0], [0.0, 500.0, 0.0]])
    assert np.allclose(to_probabilities(logits, "logits", "m"), softmax(logits), atol=1e-6)
    ready = softmax(logits)
    assert np.allclose(to_probabilities(ready, "softmax", "m"), ready, atol=1e-6)
    each = np.array([[0.9, 0.6, 0.0]])
    assert np.allclose(to_probabilities(each, "sigmoid", "m"), [[0.6, 0.4, 0.0]], atol=1e-6)
    with pytest.raises(ModelError, match=r"m: its outputs reach from -3 to 500, expected 0\.\.1; use --output logits"):
        to_probabilities(logits, "softmax", "m")
    with pytest.raises(ModelError, match=r"sum to 1\.5 to 1\.5, expected 1 in each row; use --output sigmoid"):
        to_probabilities(each, "softmax", "m")


def test_probabilities_that_are_said_to_be_logits_are_refused():
    ready = softmax(RNG.normal(size=(50, 3)))
    with pytest.raises(ModelError, match=r"m: .* probabilities already, expected logits; use --output softmax"):
        to_probabilities(ready, "logits", "m")
    # One row of another sum is enough to be logits, and a single output is no distribution.
    one_off = np.concatenate([ready, [[0.2, 0.3, 0.6]]])
    for logits in (one_off, ready - 0.5, np.ones((3, 1))):
        assert np.allclose(to_probabilities(logits, "logits", "m"), softmax(logits))


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    network = build_keras()
    network.layers[-1].bias.assign([np.nan, 0, 0])
    network.save(tmp_path / "m.keras")
    model = open_external(tmp_path / "m.keras", parse_input("6x6 gray /255"), 3)
    with pytest.raises(ModelError, match="NaN or infinite for 2 of 2 images"):
        model.compute_outputs(draw_images(2))


def test_a_file_that_takes_one_image_at_a_time_whatever_it_says_is_given_one(tmp_path):
    """A fixed Reshape inside, as exporters leave it; another gives one answer for all."""
    kernel = RNG.normal(0, 0.1, (36, 3)).astype(np.float32)
    for name, nodes in (
        ("fixed", [helper.make_node("Reshape", ["images", "shape"], ["flat"])]),
        (
            "mean",
            [
                helper.make_node("ReduceMean", ["images", "axes"], ["one"], keepdims=1),
                helper.make_node("Flatten", ["one"], ["flat"]),
            ],
        ),
    ):
        graph = helper.make_graph(
            [*nodes, helper.make_node("MatMul", ["flat", "kernel"], ["logits"])],
            "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 6, 6, 1])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["m", 3])],
            [
                numpy_helper.from_array(kernel, "kernel"),
                numpy_helper.from_array(np.array([1, 36]), "shape"),
                numpy_helper.from_array(np.array([0]), "axes"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(model, tmp_path / f"{name}.onnx")
    images = draw_images(5)
    expected = (images / np.float32(255)).reshape(5, 36) @ kernel
    for name in ("fixed", "mean"):
        opened = open_external(tmp_path / f"{name}.onnx", parse_input("6x6 gray /255"), 3)
        assert opened.batch == 1
        np.testing.assert_allclose(opened.compute_outputs(images), expected, atol=1e-5)


def test_what_a_runtime_cannot_answer_names_the_file_and_the_description(tmp_path):
    """All sides are open, and the product inside needs 108 numbers."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "kernel"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", "h", "w", "c"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.zeros((108, 3), np.float32), "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(
        ModelError, match=r'a.onnx: cannot answer arrays of the shape \[1, 6, 6, 1\] that --input "6x6 gray /255 nhwc"'
    ):
        open_external(tmp_path / "a.onnx", parse_input("6x6 gray /255 nhwc"), 3)
    assert open_external(tmp_path / "a.onnx", parse_input("6x6 rgb /255 nhwc"), 3).batch is None


def test_rows_of_a_softmax_in_eight_bits_are_probabilities():
    rng = np.random.default_rng(0)
    exact = softmax(rng.normal(0, 2, (20_000, 8)))
    rounded = np.clip(np.round(exact * 256), 0, 255) / 256
    assert np.abs(rounded.sum(axis=1) - 1).max() > 1e-2
    assert np.abs(to_probabilities(rounded, "softmax", "a.tflite") - exact).max() < 0.02
    with pytest.raises(ModelError, match="sum to"):
        to_probabilities(exact * 0.97, "softmax", "a.tflite")


def test_numbers_far_beyond_what_a_litert_file_takes_are_refused():
    detail = {"dtype": np.uint8, "quantization": (1 / 255, 0)}
    given = parse_input("6x6 gray 0..255")
    with pytest.raises(ModelError, match="makes numbers from 0 to 255, and the file takes 0 to 1"):
        external._quantise("m.tflite", given, detail, np.array([0.0, 255.0]))
    # A little is cut off where a file was calibrated on other images.
    assert external._quantise("m.tflite", given, detail, np.array([0.0, 1.05])).tolist() == [0, 255]
