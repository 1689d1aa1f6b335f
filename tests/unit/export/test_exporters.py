"""Exports that are refused, families and options of networks, and packages that are missing."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.data.images import resize_to
from dlfer.errors import EnvironmentProblem, ExportError, ModelError, UserError
from dlfer.export import exporters as module
from dlfer.export import graph as export_graph
from dlfer.export.contract import (
    Limits,
    Sample,
    check_agreement,
    compare_export,
    describe_export,
    render_card,
    render_example,
)
from dlfer.export.exporters import EXPORTERS, Origin, check_needs, export_classifier, write_onnx
from dlfer.export.graph import build_function, check_exportable
from dlfer.metrics.predictions import fit_combination
from dlfer.model.face_input import compute_taps
from dlfer.model.families import FAMILIES, BoostedClassifier
from dlfer.model.stage_network import build_transfer_network
from dlfer.predict.runtimes import EXPORT_FILE, RUNTIMES, parse_formats, read_export
from dlfer.runs.artifact import Agreement, ExportAbout, ExportRecord

LABELS = ("angry", "happy", "sad")


def make(labels=LABELS, *, channels=1, activation="softmax", crop=None, aspect="crop", **model):
    config = ModelConfig(backbone="efficientnet_nano", head=HeadConfig(activation=activation, pooling="max"), **model)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=channels, crop=crop, aspect=aspect)
    network.head.kernel.assign(network.head.kernel * 20.0)
    return FAMILIES[config.family](network, labels, config=config, channels=channels)


def make_hybrid(fusion: str):
    return make(family="hybrid", branches=("efficientnet_nano", "resnet_nano"), fusion=fusion)


@functools.cache
def make_members() -> dict:
    keras.utils.set_random_seed(1)  # whichever test comes first
    return {"a": make(), "b": make(("sad", "angry", "happy"), channels=3), "c": make(crop=0.8)}


def make_ensemble(combine: str):
    answers = np.random.default_rng(0).dirichlet(np.ones(3), (3, 60))
    trained = {"single": fit_combination(answers, np.arange(60) % 3)} if combine == "trained" else None
    config = ModelConfig(family="ensemble")
    return FAMILIES["ensemble"](make_members(), LABELS, config=config, combine=combine, trained=trained)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def make_sample(number: int = 8, *, targets=None) -> Sample:
    return Sample(draw(number, 32, 32, 1), "noise", draw(4, 32, 32, 1), "noise", targets)


ORIGIN = Origin(card="# A card\n", about=ExportAbout(), size=(32, 32))

MAKERS = {
    "sigmoid": lambda: make(activation="sigmoid"),
    "colour": lambda: make(channels=3),
    "crop": lambda: make(crop=0.7),
    "pad": lambda: make(aspect="pad", channels=3),
    "pad, crop": lambda: make(aspect="pad", crop=0.7),
    "hybrid, attention": lambda: make_hybrid("attention"),
    "ensemble": lambda: make_ensemble("average"),
}
QUICK = ("pad, crop",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MAKERS]
)
def test_the_function_answers_as_the_classifier(kind):
    classifier = MAKERS[kind]()
    check_exportable(classifier)
    sizes = [(90, 61), (31, 48), (20, 160), (160, 20), (48, 48)]
    for size, fixed in [*((size, None) for size in sizes), ((49, 40), (49, 40)), ((40, 49), (40, 49))]:
        images = draw(4, *size, classifier.channels)
        found = build_function(classifier, size=fixed)[1](images=keras.ops.convert_to_tensor(images))["probabilities"]
        assert np.allclose(np.asarray(found), classifier.predict(images), atol=1e-5)


@pytest.mark.parametrize("combine", ["average", "vote", "trained"])
def test_answers_are_combined_as_the_ensemble_does(combine):
    answers = np.random.default_rng(1).dirichlet(np.ones(3), (3, 50)).astype(np.float32)
    ensemble = make_ensemble(combine)
    found = export_graph._combine(ensemble, [keras.ops.convert_to_tensor(answer) for answer in answers])
    assert np.allclose(np.asarray(found), ensemble.combine(answers, "single"), atol=1e-5)


@pytest.mark.slow
def test_a_sigmoid_head_that_answers_no_to_everything_gives_even_probabilities():
    classifier = make(activation="sigmoid")
    classifier.parts.head.bias.assign(np.full(3, -200.0))
    images = draw(2, 32, 32, 1)
    found = build_function(classifier)[1](images=keras.ops.convert_to_tensor(images))["probabilities"]
    assert np.allclose(np.asarray(found), 1 / 3)
    assert np.allclose(classifier.predict(images), 1 / 3)


@pytest.mark.parametrize("size", [20, 32, 48, 77, 300])
def test_the_weights_of_a_free_size_are_those_of_training(size):
    places, taps = compute_taps(size, 32)
    wanted = np.zeros((32, size))
    for row in range(32):
        for place, tap in zip(places[row], taps[row], strict=True):
            wanted[row, place] += tap
    assert np.allclose(export_graph._compute_weights(size, 32), wanted, atol=1e-6)
    assert np.allclose(export_graph._compute_weights(keras.ops.convert_to_tensor(size), 32), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTERS)
def test_a_hybrid_goes_to_every_format(name, tmp_path):
    keras.utils.set_random_seed(1)
    folder, record = export_classifier(
        make_hybrid("attention"), name, out=tmp_path, sample=make_sample(40), origin=ORIGIN
    )
    assert read_export(folder).agreement == record.agreement


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["average", "trained"])
@pytest.mark.parametrize("name", EXPORTERS)
def test_an_ensemble_goes_to_every_format(name, combine, tmp_path):
    keras.utils.set_random_seed(1)
    sample = Sample(draw(200, 32, 32, 3), "noise", draw(64, 32, 32, 3), "noise")
    folder, _ = export_classifier(make_ensemble(combine), name, out=tmp_path, sample=sample, origin=ORIGIN)
    assert (folder / EXPORT_FILE).is_file()


GROWTH = """
import resource, sys
from dlfer.config.sections import ModelConfig
from dlfer.export.exporters import write_onnx
from dlfer.model.families import FAMILIES
from dlfer.model.stage_network import build_transfer_network
from pathlib import Path
config = ModelConfig(family="hybrid", branches=("resnet50", "resnet34"), fusion="concat")
network = build_transfer_network(config, num_labels=7, image_size=48, channels=1)
classifier = FAMILIES["hybrid"](network, tuple("abcdefg"), config=config, channels=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_onnx(classifier, Path(sys.argv[1]), size=None, sample=None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_large_network_becomes_onnx_without_a_copy_for_each_pass(tmp_path):
    """16 times the file's size with tf2onnx's copies and rewritten constants left out; 62 times with them."""
    path = tmp_path / "network.onnx"
    done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True)
    assert 1024 * int(done.stdout.split()[-1]) < 25 * path.stat().st_size


@pytest.mark.slow
def test_a_pass_of_tf2onnx_that_fails_is_left_out(monkeypatch, tmp_path):
    import tf2onnx.graph
    import tf2onnx.optimizer

    class Failing(tf2onnx.optimizer._optimizers["fold_constants"]):
        def _optimize(self, graph):
            raise ValueError("a pass that fails")

    before = tf2onnx.graph.Node.update_proto, tf2onnx.optimizer.optimize_graph
    monkeypatch.setitem(tf2onnx.optimizer._optimizers, "fold_constants", Failing)
    classifier, path = make(), tmp_path / "network.onnx"
    write_onnx(classifier, path, size=None, sample=None)
    images = draw(3, 32, 32, 1)
    assert RUNTIMES["onnx"](path)(images) == pytest.approx(classifier.predict(images), abs=1e-5)
    assert (tf2onnx.graph.Node.update_proto, tf2onnx.optimizer.optimize_graph) == before


@pytest.fixture
def pretend(monkeypatch):
    """Make the format savedmodel write a text, which then answers as the classifier does."""

    def start(classifier):
        def write(classifier, path, *, size, sample):
            path.write_text("a model")
            return {}

        monkeypatch.setitem(EXPORTERS, "savedmodel", dataclasses.replace(EXPORTERS["savedmodel"], write=write))
        monkeypatch.setitem(RUNTIMES, "savedmodel", lambda path: classifier.predict)
        return monkeypatch

    return start


@pytest.mark.slow
def test_an_export_that_disagrees_is_refused_and_the_one_before_stands(tmp_path, pretend):
    classifier = make()
    monkeypatch = pretend(classifier)
    folder, before = export_classifier(classifier, "savedmodel", out=tmp_path, sample=make_sample(), origin=ORIGIN)
    assert before.agreement.accuracy is None
    monkeypatch.undo()
    whole = export_graph._answer_of_network
    monkeypatch.setattr(export_graph, "_answer_of_network", lambda parts, images: whole(parts, images + 9.0))
    with pytest.raises(ExportError, match=r"savedmodel: refused.*expected a difference of at most 0\.0001") as refused:
        export_classifier(classifier, "savedmodel", out=tmp_path, sample=make_sample(), origin=ORIGIN)
    assert refused.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["savedmodel"]
    assert read_export(folder) == before


@pytest.mark.slow
def test_an_export_is_replaced_and_another_folder_is_not(tmp_path, pretend):
    classifier = make()
    pretend(classifier)
    (tmp_path / "savedmodel").mkdir()
    (tmp_path / "savedmodel" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an export, so it is not replaced"):
        module._check_target(tmp_path / "savedmodel", [], None, force=True)
    (tmp_path / "savedmodel" / EXPORT_FILE).write_text("{}")
    folder, _ = export_classifier(classifier, "savedmodel", out=tmp_path, sample=make_sample(), origin=ORIGIN)
    assert not (folder / "thesis.txt").exists()
    read_export(folder)


def compare(wanted, found, *, targets=None, any_size=False) -> Agreement:
    sample = Sample(draw(len(wanted), 8, 8, 1), "noise", draw(1, 8, 8, 1), "noise", targets)

    def answers(table):
        return lambda images: np.asarray(table, np.float32)[: len(images)]

    return compare_export(answers(wanted), answers(found), sample, labels=LABELS, any_size=any_size)


def test_the_loss_of_accuracy_is_paired_with_n_and_an_interval():
    right, wrong = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    wanted = [right] * 18 + [wrong] * 2
    found = [right] * 15 + [wrong] * 5
    agreement = compare(wanted, found, targets=np.zeros(20, int))
    lost = agreement.accuracy
    assert (lost.n, lost.a_only, lost.b_only) == (20, 3, 0)
    assert lost.difference.value == pytest.approx(15.0)
    assert lost.difference.low < 15 < lost.difference.high
    assert agreement.labels_agree.value == pytest.approx(0.85)
    assert agreement.largest_difference == pytest.approx(0.7)
    record = RECORD.model_copy(update={"agreement": agreement})
    assert any("lost: 15.00 percentage points (95 % " in line and "n = 20" in line for line in describe_export(record))


RECORD = ExportRecord.build(
    {
        "version": 1,
        "file": "model.tflite",
        "labels": LABELS,
        "format": "litert-int8",
        "input": {
            "shape": [None, 48, 64, 3],
            "channels": "RGB",
            "network_size": 32,
            "aspect": "crop",
            "note": "faces",
        },
        "quantised": {"num_images": 200, "images": "Training", "float_operations": {"DIV": 2}},
        "temperature": {"value": 1.5, "applied": False, "note": "divide"},
    }
)


def change_input(**changed) -> ExportRecord:
    return RECORD.model_copy(update={"input": RECORD.input.model_copy(update=changed)})


def test_the_card_says_what_stayed_in_float_and_that_the_temperature_is_not_applied():
    even = [[0.4, 0.3, 0.3]] * 4
    record = RECORD.model_copy(update={"agreement": compare(even, even)})
    card = render_card("# Card\n\n```python\nimport dlfer\n```\n", record, hub_name="litert")
    assert "import dlfer" not in card
    assert "Computed in float32: 2 DIV." in card
    assert "temperature (1.5) is not applied" in card


def test_the_card_of_an_int8_models_export_says_that_the_export_is_of_the_float_network():
    even = [[0.4, 0.3, 0.3]] * 4
    record = RECORD.model_copy(update={"agreement": compare(even, even)})
    shipped = (Path(__file__).parents[3] / "saved_models" / "faces_small" / "MODEL_CARD.md").read_text()
    card = render_card(shipped, record, hub_name="onnx")
    assert "computes with eight bits (" in shipped
    assert "computes with eight bits (" not in card
    assert "Of an int8 model the ONNX file answers" not in card
    assert "This export was made from the model's Keras weights, which are in float." in card
    assert "the threshold for abstaining and the time per face of that file." in card


@pytest.mark.parametrize(("is_drawn", "advice"), [(True, r"drawn faces.* --data DATA"), (False, "Use another format")])
def test_an_int8_export_refused_on_drawn_faces_asks_for_real_ones(tmp_path, pretend, is_drawn, advice):
    classifier = make()
    monkeypatch = pretend(classifier)
    monkeypatch.setitem(EXPORTERS, "savedmodel", dataclasses.replace(EXPORTERS["savedmodel"], limits=module.QUANTISED))
    monkeypatch.setitem(
        RUNTIMES, "savedmodel", lambda path: lambda images: np.roll(classifier.predict(images), 1, axis=1)
    )
    sample = dataclasses.replace(make_sample(), is_drawn=is_drawn)
    with pytest.raises(ExportError, match=advice):
        export_classifier(classifier, "savedmodel", out=tmp_path, sample=sample, origin=ORIGIN)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(48, 64), (100, 30), (31, 200), (9, 9), (480, 640)])
def test_an_example_fits_images_to_a_fixed_size_as_the_engine_does(shape, aspect):
    text = render_example("litert", change_input(aspect=aspect))
    namespace = {"np": np, "Image": Image}
    exec(text[text.index("def fit") : text.index("for name")], namespace)
    for pixels in (draw(*shape), draw(*shape, 3)):
        wanted = resize_to(pixels.reshape(*shape, -1), (48, 64), aspect)
        assert np.array_equal(namespace["fit"](Image.fromarray(pixels)).reshape(48, 64, -1), wanted)


def test_an_example_converts_to_the_colours():
    assert '.convert("RGB"))' in render_example("litert", RECORD)
    grey = change_input(shape=[None, None, None, 1])
    assert '.convert("L"))' in render_example("onnx", grey)
    assert "rgb_to_grayscale" in render_example("savedmodel", grey)
    assert "rgb_to_grayscale" not in render_example("savedmodel", RECORD)
    for template in ("litert", "onnx", "savedmodel"):
        compile(render_example(template, grey), template, "exec")


@pytest.mark.parametrize("limits", [Limits(1e-4, 0.99), Limits(None, 0.9)])
def test_answers_that_are_no_numbers_are_refused(limits):
    agreement = compare([[0.4, 0.3, 0.3]] * 4, [[np.nan] * 3] * 4)
    with pytest.raises(ExportError, match="refused"):
        check_agreement("onnx", agreement, limits)


def test_a_difference_at_another_size_alone_is_refused():
    agreement = compare([[0.4, 0.3, 0.3]] * 9, [[0.4, 0.3, 0.3]] * 9, any_size=True)
    check_agreement("onnx", agreement, Limits(1e-4, 0.99))
    agreement.other_sizes.largest_difference = 0.01
    with pytest.raises(ExportError, match=r"differ by up to 0\.01"):
        check_agreement("onnx", agreement, Limits(1e-4, 0.99))


def test_trees_are_refused_with_what_to_do_instead():
    boosted = object.__new__(BoostedClassifier)
    with pytest.raises(ModelError, match=r"family boosted; its trees are not a network.*transfer or hybrid"):
        check_exportable(boosted)
    ensemble = make_ensemble("average")
    ensemble.members = {**ensemble.members, "trees": boosted}
    with pytest.raises(ModelError, match="member trees is a model of family boosted"):
        check_exportable(ensemble)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(EnvironmentProblem, match="KERAS_BACKEND=tensorflow"):
        check_exportable(make())


@pytest.mark.parametrize(("name", "package"), [("onnx", "tf2onnx is one of"), ("litert", "ai-edge-litert is an extra")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, package, monkeypatch):
    def fail(module):
        raise ImportError(f"No module named {module!r}")

    classifier = make()
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(EnvironmentProblem, match=rf"{package}.*make (install|extra-litert)"):
        check_needs(classifier, (name,))
    check_needs(classifier, ("savedmodel",))


def test_formats_are_parsed_and_unknown_ones_refused():
    assert parse_formats("onnx, litert,onnx") == ("onnx", "litert")
    for text in ("onnx,coreml", "", ","):
        with pytest.raises(UserError, match="expected some of savedmodel, litert, litert-int8, onnx"):
            parse_formats(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "another version"),
        ({"format": "pickle"}, "another version"),
        ({"sha256": {"../secret": "0" * 64, "model.onnx": "0" * 64}}, "outside of its folder"),
        ({"sha256": {"labels.json": "0" * 64}}, r"does not name model\.onnx"),
        ({"sha256": {"model.onnx": "0" * 64}}, "expected a file"),
        ({"sha256": None}, "64 hex digits"),
    ],
)
def test_a_wrong_export_json_is_refused(change, message, tmp_path):
    record = {"version": 1, "format": "onnx", "file": "model.onnx", "sha256": {"model.onnx": "0" * 64}}
    (tmp_path / EXPORT_FILE).write_text(json.dumps(record | change))
    with pytest.raises(ModelError, match=message):
        read_export(tmp_path)


def test_a_folder_without_export_json_says_how_to_make_one(tmp_path):
    with pytest.raises(ModelError, match="dlfer export MODEL --to onnx"):
        read_export(tmp_path)
