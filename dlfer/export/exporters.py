"""Export of a trained classifier to a folder that needs no dlfer: the model, its contract, its card and an example.

Each export is loaded by its own runtime and compared with the original before it is kept. ONNX files with 8-bit weights
and activations are made by ONNX Runtime's static quantisation.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dlfer.data.images import compute_side, resize_all
from dlfer.data.synthetic.faces import draw_face
from dlfer.errors import ExportError, UserError
from dlfer.export.contract import (
    Limits,
    Sample,
    check_agreement,
    compare_export,
    describe_input,
    describe_output,
    describe_temperature,
    list_packages,
    render_card,
    render_example,
)
from dlfer.export.graph import FEATURES, INPUT, OUTPUT, build_function, check_exportable
from dlfer.export.images import find_native_size, gather_sample
from dlfer.model.classifier import Classifier
from dlfer.model.families import load_artifact
from dlfer.predict.predictor import RESEARCH_ONLY
from dlfer.predict.runtimes import EXPORT_FILE, RUNTIMES, VERSION, compute_checksums, import_extra
from dlfer.report.card import CARD_FILE, compose_card
from dlfer.runs.artifact import ExportAbout, ExportRecord, read_artifact_record
from dlfer.runs.files import check_outputs, check_writable, explain_write_error, hash_file
from dlfer.runs.find import find_model, find_run_of
from dlfer.runs.records import ArtifactRecord
from dlfer.runs.run import Run


def write_savedmodel(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write a SavedModel with the signature `serving_default`; return additional fields for export.json.

    Args:
        classifier: a network, or an ensemble of networks.
        path: the folder to create, or the file to write.
        size: (H, W) of all images; None for images of any size, if the format allows it.
        sample: the images that calibrate activations, for int8 formats.
    """
    import tensorflow as tf

    module, function = build_function(classifier, size=size)
    tf.saved_model.save(module, str(path), signatures={"serving_default": function})
    return {}


_CONVERSIONS = ("CAST", "QUANTIZE", "DEQUANTIZE")
"""Operations that convert the int8 graph's input and output; their float32 outputs are not computed in float32."""


def write_litert(classifier: Classifier, path: Path, *, size: tuple[int, int], sample: Sample) -> dict:
    """Write a LiteRT file in float32; see `write_savedmodel`."""
    converter, _module = _make_converter(classifier, size)
    path.write_bytes(converter.convert())
    return {}


def write_litert_int8(classifier: Classifier, path: Path, *, size: tuple[int, int], sample: Sample) -> dict:
    """Write a LiteRT file whose weights and activations are 8-bit integers; see `write_savedmodel`.

    The images `sample.calibration`, of size `size`, determine the range of each activation.

    Returns:
        {"quantised": {"num_images", "images", "float_operations": kind -> number of operations left in float32}}.
    """
    import tensorflow as tf

    def iterate_images() -> Iterator[list[np.ndarray]]:
        for row in range(len(sample.calibration)):
            yield [sample.calibration[row : row + 1]]

    converter, _module = _make_converter(classifier, size)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = iterate_images
    path.write_bytes(converter.convert())
    return {
        "quantised": {
            "num_images": len(sample.calibration),
            "images": sample.calibration_source,
            "float_operations": list_float_operations(path),
        }
    }


def list_float_operations(path: Path) -> dict[str, int]:
    """Return the number of operations of each kind in a LiteRT file that compute in float32."""
    litert = import_extra("ai_edge_litert.interpreter")
    # The default delegate would hide the operations that it executes.
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_path=str(path), experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    is_float = {tensor["index"] for tensor in interpreter.get_tensor_details() if tensor["dtype"] is np.float32}
    found: dict[str, int] = {}
    for operation in interpreter._get_ops_details():
        if operation["op_name"] not in _CONVERSIONS and is_float.intersection(operation["outputs"]):
            found[operation["op_name"]] = found.get(operation["op_name"], 0) + 1
    return found


def _make_converter(classifier: Classifier, size: tuple[int, int]):
    """Return TensorFlow's converter, and the module that must stay alive as long as the converter."""
    import tensorflow as tf

    module, function = build_function(classifier, size=size)
    return tf.lite.TFLiteConverter.from_concrete_functions([function], module), module


OPSET = 17
"""ONNX opset of 2022, which runtimes since ONNX Runtime 1.12 support; nothing newer is needed."""


def write_onnx(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write an ONNX file with tf2onnx, since files of Keras' own export do not run; see `write_savedmodel`.

    Returns:
        {"opset"}.

    Raises:
        EnvironmentProblem: tf2onnx is not installed.
    """
    tf2onnx = import_extra("tf2onnx")
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    module, _ = build_function(classifier, size=size)
    model = _convert_to_onnx(tf2onnx, module.predict)
    names = {INPUT: ("N", "H", "W"), OUTPUT: ("N",), FEATURES: ("N",)}
    for tensor in (*model.graph.input, *model.graph.output):
        # tf2onnx numbers free dimensions; names show that input and output have the same N.
        for dimension, name in zip(tensor.type.tensor_type.shape.dim, names[tensor.name], strict=False):
            if not dimension.HasField("dim_value"):
                dimension.dim_param = name
    path.write_bytes(model.SerializeToString())
    return {"opset": OPSET}


def _convert_to_onnx(tf2onnx: Any, function: Any) -> Any:
    """Convert a tf.function to an ONNX ModelProto, with less memory than tf2onnx takes by default.

    For a hybrid of 46 million parameters (0.18 GB), tf2onnx takes 11 GB: it copies the graph before each of about 40
    passes, to skip failing ones, and then rewrites all weights into messages whose memory only grows. Without both it
    takes 3 GB, mostly TensorFlow's, and half the time. If a pass fails, conversion is repeated with tf2onnx's defaults.
    """
    convert = functools.partial(
        tf2onnx.convert.from_function, function, input_signature=function.input_signature, opset=OPSET
    )
    node, optimizer = tf2onnx.graph.Node, tf2onnx.optimizer
    update, optimize = node.update_proto, optimizer.optimize_graph

    def update_changed(self, external_tensor_storage=None):
        """Skip the value of a constant, which has no inputs, if its message already contains it."""
        if self.is_const() and list(self._op.attribute) == list(self._attr.values()):
            del self._op.output[:]
            self._op.output.extend(self.output)
        else:
            update(self, external_tensor_storage)

    try:
        node.update_proto = update_changed
        optimizer.optimize_graph = lambda graph, _, optimizers: optimize(
            graph, catch_errors=False, optimizers=optimizers
        )
        return convert()[0]
    except Exception:  # a failing pass may raise any type
        node.update_proto, optimizer.optimize_graph = update, optimize
        return convert()[0]
    finally:
        node.update_proto, optimizer.optimize_graph = update, optimize


def write_onnx_int8(classifier: Classifier, path: Path, *, size: tuple[int, int] | None, sample: Sample) -> dict:
    """Write an ONNX file whose weights and activations are 8-bit integers; see `write_savedmodel`.

    The images `sample.calibration` determine the range of each activation.

    Returns:
        {"opset", "quantised": {"num_images", "images", "float_operations": kind -> number of products in float32}}.
    """
    import_extra("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="dlfer-") as place:
        whole = Path(place) / "float32.onnx"
        remarks = write_onnx(classifier, whole, size=size, sample=sample)
        stayed = quantise_onnx(whole, path, sample.calibration)
    quantised = {
        "num_images": len(sample.calibration),
        "images": sample.calibration_source,
        "float_operations": stayed,
    }
    return {**remarks, "quantised": quantised}


_IMAGES_AT_A_TIME = 25
_PRODUCTS = ("Conv", "MatMul", "Gemm")


def quantise_onnx(source: Path, target: Path, images: np.ndarray) -> dict[str, int]:
    """Write an ONNX file whose backbone computes with 8-bit integers.

    Kernels have a scale for each output channel and use 7 of the 8 bits, so that processors without VNNI, whose 8-bit
    products saturate, give the same predictions. Each activation has one scale, from its minimum and maximum on the
    calibration images. Preprocessing, the last dense layer and all that follows it stay in float32: they have a
    hundredth of the weights, and rounding there changes predictions most.

    Args:
        source: a float32 ONNX file of dlfer.
        target: the file to write; it accepts images of the same sizes.
        images: uint8 [M, H, W, channels], M at least 1, which calibrate the activations.

    Returns:
        Kind -> number of products that stay in float32 after the preprocessing: the last dense layers.
    """
    onnx, quantization = import_extra("onnx"), import_extra("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="dlfer-") as place:
        prepared, quiet = Path(place) / "prepared.onnx", logging.getLogger()
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it recommends the preprocessing that is done here
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
                model = onnx.load(prepared)
                before, last = find_float_nodes(model.graph)
                quantization.quantize_static(
                    prepared,
                    target,
                    _make_reader(quantization, images),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    nodes_to_exclude=[node.name for node in (*before, *last)],
                )
        finally:
            quiet.setLevel(level)
    products = [node.op_type for node in last if node.op_type in _PRODUCTS]
    return {kind: products.count(kind) for kind in sorted(set(products))}


def find_float_nodes(graph: Any) -> tuple[list[Any], list[Any]]:
    """Return the nodes that stay in float32: those before the first convolution, and those from the last products on.

    A graph lists its nodes in the order in which they are computed.
    """
    behind: set[str] = set()
    before = []
    for node in graph.node:
        if node.op_type == "Conv" or behind.intersection(node.input):
            behind.update(node.output)
        else:
            before.append(node)
    ahead: set[str] = set()
    last = []
    for node in reversed(graph.node):
        leads_on = bool(ahead.intersection(node.output))
        if leads_on or node.op_type in _PRODUCTS:
            ahead.update(node.input)
        if not leads_on and (node.op_type != "Conv") and behind.intersection(node.output):
            last.append(node)
    return before, last


def _make_reader(quantization: Any, images: np.ndarray) -> Any:
    """Return a reader that passes the calibration images to the quantiser in batches."""

    def iterate() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(images), _IMAGES_AT_A_TIME):
            yield {INPUT: np.ascontiguousarray(images[start : start + _IMAGES_AT_A_TIME])}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iterate()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    return Reader()


EXACT = Limits(difference=1e-4, agreement=0.99)
QUANTISED = Limits(difference=None, agreement=0.9)
DRAWN_ADVICE = (
    "It was calibrated and compared on drawn faces, because images of the model's own run were not found; that says little about "
    "photographs. Give real faces with --data DATA, or use another format."
)
_LITERT = ("ai_edge_litert.interpreter",)


@dataclass(frozen=True)
class Exporter:
    """One export format.

    Attributes:
        write: function that writes the model; see `write_savedmodel`.
        file: name of the model in the folder.
        any_size: whether images may have any size; else all have the same.
        limits: limits that the export must meet.
        template: name of the template of the example script.
        hub_name: a model hub's name for its runtime.
        needs: modules needed to write and to compare it.
    """

    write: Callable[..., dict[str, Any]]
    file: str
    any_size: bool
    limits: Limits
    template: str
    hub_name: str
    needs: tuple[str, ...] = ()


EXPORTERS: dict[str, Exporter] = {
    "savedmodel": Exporter(write_savedmodel, "model", True, EXACT, "savedmodel", "tensorflow"),
    "litert": Exporter(write_litert, "model.tflite", False, EXACT, "litert", "litert", _LITERT),
    "litert-int8": Exporter(write_litert_int8, "model.tflite", False, QUANTISED, "litert", "litert", _LITERT),
    "onnx": Exporter(write_onnx, "model.onnx", True, EXACT, "onnx", "onnx", ("tf2onnx", "onnxruntime")),
    "onnx-int8": Exporter(
        write_onnx_int8, "model.onnx", True, QUANTISED, "onnx", "onnx", ("tf2onnx", "onnxruntime", "onnx")
    ),
}


@dataclass(frozen=True)
class Origin:
    """The provenance of a classifier, for its exports.

    Attributes:
        card: text of its MODEL_CARD.md.
        about: the section `about` of export.json: the model's name, its artifact's checksums, ...
        size: (H, W) in pixels for formats that accept one size: preferably that of the training images.
    """

    card: str
    about: ExportAbout
    size: tuple[int, int]


def check_needs(classifier: Classifier, formats: tuple[str, ...]) -> None:
    """Raise an error unless the classifier can be exported and all packages of the formats are installed.

    Raises:
        EnvironmentProblem: the backend is not TensorFlow, or a package is missing.
        ModelError: the classifier is not a network.
    """
    check_exportable(classifier)
    for name in formats:
        for module in EXPORTERS[name].needs:
            import_extra(module)


def export_classifier(
    classifier: Classifier, name: str, *, out: Path, sample: Sample, origin: Origin
) -> tuple[Path, ExportRecord]:
    """Write one format into `out`/`name`, replacing an earlier export; return its folder and the record of export.json.

    Args:
        classifier: one that passed `check_needs`.
        out: the folder of exports.
        sample: the images for comparison and calibration.
        origin: the provenance of the classifier.

    Raises:
        ExportError: it does not agree with the classifier, or cannot be written; nothing is left behind.
        OSError: it cannot be written; nothing is left behind.
    """
    target = Path(out) / name
    import tensorflow as tf

    exporter = EXPORTERS[name]
    size = None if exporter.any_size else origin.size
    if size is not None:
        images, calibration = (
            resize_all(part, size, classifier.aspect) for part in (sample.images, sample.calibration)
        )
        sample = replace(sample, images=images, calibration=calibration)
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as place:
        # Only its owner can read a folder made by tempfile; an export has the usual permissions.
        folder = Path(place) / name
        folder.mkdir()
        try:
            remarks = exporter.write(classifier, folder / exporter.file, size=size, sample=sample)
        except tf.errors.OpError as error:  # e.g. a full disk
            raise ExportError(f"{target}: cannot be written: {error.message}") from error
        agreement = compare_export(
            classifier.predict,
            RUNTIMES[name](folder / exporter.file),
            sample,
            labels=classifier.labels,
            any_size=exporter.any_size,
        )
        advice = DRAWN_ADVICE if sample.is_drawn and exporter.limits is QUANTISED else "Use another format."
        check_agreement(name, agreement, exporter.limits, advice=advice)
        described = _describe(classifier, name, size, origin)
        record = ExportRecord.build({**described, **remarks, "agreement": agreement})
        record = _write_companion_files(folder, record, exporter, origin.card)
        _replace_folder(folder, target, Path(place) / "former")
    return target, record


def _replace_folder(folder: Path, target: Path, former: Path) -> None:
    """Move a folder to a target that may exist, which `former` holds until then; if that fails, the target is unchanged."""
    if not target.exists():
        folder.rename(target)
        return
    target.rename(former)
    try:
        folder.rename(target)
    except BaseException:
        former.rename(target)
        raise


def _describe(classifier: Classifier, name: str, size: tuple[int, int] | None, origin: Origin) -> dict[str, Any]:
    """Return the fields of export.json that are known before the files are written and compared."""
    exporter = EXPORTERS[name]
    faces = classifier.about.faces
    return {
        "version": VERSION,
        "format": name,
        "file": exporter.file,
        "labels": list(classifier.labels),
        "input": describe_input(
            size,
            channels=classifier.channels,
            network_size=classifier.image_size,
            aspect=classifier.aspect,
            faces=faces,
        ),
        "output": describe_output(len(classifier.labels), is_quantised=name == "litert-int8"),
        "temperature": describe_temperature(classifier.temperature_fit),
        "limits": asdict(exporter.limits),
        "about": origin.about.model_copy(update={"packages": list_packages(exporter.needs)}),
    }


def _write_companion_files(folder: Path, record: ExportRecord, exporter: Exporter, card: str) -> ExportRecord:
    """Write labels, example and card, then export.json with the checksums of all other files; return its record."""
    (folder / "labels.json").write_text(json.dumps(record.labels) + "\n", encoding="utf-8")
    Image.fromarray(draw_face("Happy", rng=np.random.default_rng(0))).save(folder / "example.png")
    (folder / "example.py").write_text(render_example(exporter.template, record), encoding="utf-8")
    text = render_card(card, record, hub_name=exporter.hub_name)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    record = record.model_copy(update={"sha256": compute_checksums(folder)})
    record.write(folder)
    return record


_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


def export_model(
    name: str,
    formats: tuple[str, ...],
    *,
    out: Path | None = None,
    data: Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, tuple[Path, ExportRecord]]:
    """Export a trained model to several formats, each compared with the artifact before it is kept.

    Args:
        name: a run, an artifact folder, or a shipped model's name.
        formats: names of EXPORTERS.
        out: the folder of exports, with one folder per format; None for exports/<name>.
        data: the images to compare on: a csv in the layout of FER2013, class folders, an .npz, or an experiment file.
            The validation split is used, else train, else test, or all of data without splits. None for validation of
            the model's own run if its data is available, else for drawn faces.
        size: (H, W) for formats that accept one size; None for that of the training images, made square.
        force: whether to replace an earlier export even if it is of another model, was changed, or has other files.
        say: called with lines about the progress.

    Returns:
        Format -> its folder and the record of export.json.

    Raises:
        UserError: model or data is not found or does not match, a package is missing, or something other than an
            unchanged export of the same model would be replaced.
        ExportError: one or more formats were refused or could not be written; the others are kept.

    Example:
        >>> export_model("saved_models/runs/lite2/RUN", ("onnx",))["onnx"][0]
        PosixPath('exports/lite2-20261121T064045Z-2c96f94e/onnx')
    """
    folder = find_model(name)
    record = read_artifact_record(folder)
    about = record.about
    # The name of a shipped model, else <experiment>-<run>, else the name of the folder. An artifact may be untrusted:
    # its names must not lead outside the folder of exports.
    full_name = about.name or "-".join(filter(None, (about.experiment, about.run))) or folder.resolve().name
    out = Path("exports") / (_NOT_IN_NAMES.sub("_", full_name).lstrip(".") or "model") if out is None else Path(out)
    check_writable(out, "--out")
    if size is not None and all(EXPORTERS[format_name].any_size for format_name in formats):
        raise UserError(f"--size: {', '.join(formats)} takes images of any size; leave it out.")
    for format_name in formats:
        _check_target(out / format_name, [data, *(folder / file for file in record.sha256)], record, force=force)
    classifier = load_artifact(name)
    check_needs(classifier, formats)
    run = find_run_of(folder.resolve()) if folder.resolve().name == "model" else None
    sample = gather_sample(classifier, record, run=run, data=data, say=say)
    native = find_native_size(run) or (about.face_size and (about.face_size, about.face_size))
    side = compute_side(*(native or sample.images.shape[1:3]), classifier.aspect)
    origin = Origin(
        card=_read_card(folder, run, research_only=bool(about.research_only)),
        about=ExportAbout(
            model=full_name,
            family=record.family,
            backbone=record.model.get("backbone"),
            artifact_sha256=record.sha256,
            trained=about,
        ),
        size=size or (side, side),
    )
    say(f"comparing on {len(sample.images):,} images: {sample.source}")
    done, refused = {}, []
    for number, format_name in enumerate(formats, 1):
        say(f"{number} of {len(formats)}: {format_name}")
        try:
            done[format_name] = export_classifier(classifier, format_name, out=out, sample=sample, origin=origin)
        except ExportError as error:
            refused.append(str(error))
        except OSError as error:
            refused.append(str(explain_write_error(error, out / format_name)))
    if refused:
        kept = f" Kept: {', '.join(str(path) for path, _ in done.values())}." if done else ""
        raise ExportError("\n".join(refused) + kept)
    return done


def _check_target(target: Path, inputs: list[Path | None], artifact: ArtifactRecord, *, force: bool) -> None:
    """Raise UserError unless a folder is absent or an earlier export, unchanged and of the same model (or `force`)."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not (target / EXPORT_FILE).is_file():
        raise UserError(f"{target}: the folder is not an export, so it is not replaced; move it, or use another --out.")
    files = [path for path in target.rglob("*") if not path.is_dir()]
    check_outputs({"--out": files}, inputs, force=True)
    record = ExportRecord.require(target)
    if record.about.artifact_sha256 != artifact.sha256 and not force:
        raise UserError(
            f"{target}: holds the export of another model, {record.about.model}; use another --out, or --force."
        )
    changed = [
        name
        for name, digest in record.sha256.items()
        if (target / name).is_file() and hash_file(target / name) != digest
    ]
    if changed and not force:
        raise UserError(
            f"{target}: this export would be replaced, and was changed by hand: {', '.join(changed[:5])}; move it, use another "
            "--out, or use --force."
        )
    known = {EXPORT_FILE, *record.sha256}
    others = sorted(name for path in files if (name := path.relative_to(target).as_posix()) not in known)
    if others and not force:
        raise UserError(
            f"{target}: this export would be replaced, and other files are in it ({len(others)}): "
            f"{', '.join(others[:5])}; move them, use another --out, or use --force."
        )


def _read_card(folder: Path, run: Run | None, *, research_only: bool) -> str:
    """Return the card beside the artifact (on a hub README.md), else that of its run, else a text that it has none."""
    for name in (CARD_FILE, "README.md"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    if run is not None:
        return compose_card(run.path)
    return (
        f"# Model card: {folder.resolve().name}\n\nThe model has no card, and its run is not available to write one. "
        "Find out what it was trained on and how accurate it is before you use it or pass it on. It predicts which "
        "label "
        "annotators would give to a picture of a face; it never detects what a person feels.\n"
        + f"\n{RESEARCH_ONLY}\n"
        * research_only
    )
