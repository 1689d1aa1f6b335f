"""Conversion of a run's model into a shipped model: small, named, with its card, and found by `dlfer predict`.

The artifact of every trained model has an ONNX file, if it can be converted, for prediction without TensorFlow.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import keras
import numpy as np

from dlfer.config.names import FER2013_LABELS
from dlfer.data.bundle import Split
from dlfer.data.duplicates import shorten_digests
from dlfer.data.images import compute_side, resize_square
from dlfer.data.synthetic.faces import draw_face
from dlfer.errors import ConfigError, DlferError, ExportError, ModelError, UserError
from dlfer.export.contract import INT8_BEGINNING, Limits, Sample, check_agreement, compare_export
from dlfer.export.exporters import EXACT, QUANTISED, write_onnx, write_onnx_int8
from dlfer.export.graph import FEATURES, OUTPUT, check_backend, check_exportable
from dlfer.export.images import gather_sample
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.model.classifier import WEIGHTS_FILE, Classifier, NetworkClassifier
from dlfer.model.families import BoostedClassifier, EnsembleClassifier, load_artifact
from dlfer.model.predict import exact_float32
from dlfer.predict.engines import load_engine, measure_speed
from dlfer.predict.runtimes import combine_trees, import_extra, open_onnx
from dlfer.report.card import CARD_FILE, find_terms, write_card
from dlfer.report.page import read_experiment
from dlfer.runs.artifact import MEND
from dlfer.runs.changes import IMAGES_FILE
from dlfer.runs.files import (
    check_manifest,
    check_outputs,
    copy_folder,
    hash_file,
    read_npz,
    write_atomically,
    write_npz,
)
from dlfer.runs.find import is_default, open_run_of_model, read_about
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.records import (
    INT8_FILES,
    ArtifactRecord,
    DataRecord,
    OnnxRecord,
    QuantisedAccuracy,
    ShippedRecord,
    SpeedRecord,
)
from dlfer.runs.run import CONFIG_FILE, DATA_FILE, RUN_FILE, Run
from dlfer.runs.run_records import read_metrics
from dlfer.runs.text import count_noun, round_up

ONNX_FILE = "network.onnx"

MIN_KERNEL = 20_000
"""Minimum number of values of a kernel that is shipped in float16. Smaller ones take a twentieth of the bytes, and
rounding them matters most: without this limit EfficientNet-Lite2's probabilities change by up to 0.010, not 0.0007."""

NUM_COMPARED = 256
"""Maximum number of images on which the ONNX file is compared with Keras."""

TREES = Limits(difference=None, agreement=0.99)
"""Limits for a boosted model. The threshold of a tree's split is a value of some training image: if two runtimes round
a feature differently, about one image in a hundred takes another branch, and its probabilities change slightly."""

_HALF, _INT8 = "large kernels in float16", "int8, a scale for each output channel; the last dense layer in float32"


def write_embedded_onnx(
    classifier: Classifier, folder: Path, *, images: np.ndarray, source: str, halve: bool = False
) -> OnnxRecord | str:
    """Write `ONNX_FILE` into an artifact's folder, and keep it only if its predictions agree with those of Keras.

    Args:
        classifier: the artifact's classifier.
        folder: the artifact's folder.
        images: uint8 [N, H, W, channels] to compare on; the first `NUM_COMPARED` are used. If empty, faces are drawn.
        source: description of their origin.
        halve: store large kernels in float16. The classifier's own must already have float16 values, so that the file
            gives the same predictions up to rounding in float32.

    Returns:
        The record of the file for artifact.json; or a sentence on why there is none: a backend other than TensorFlow,
        trees in an ensemble, a missing package, or probabilities that differ by more than 1e-4 (for a boosted model:
        labels that differ for more than one image in a hundred).
    """
    path, is_boosted = folder / ONNX_FILE, isinstance(classifier, BoostedClassifier)
    halve = halve and not is_boosted
    try:
        check_backend()
        if not is_boosted:
            check_exportable(classifier)
        if not len(images):
            drawn = gather_sample(classifier, None, run=None, data=None, say=lambda text: None)
            images, source = drawn.images, drawn.source
        images = images[:NUM_COMPARED]
        about = write_onnx(classifier, path, size=None, sample=None)
        if halve:
            halve_kernels(path, list_kernels(classifier))
        sample = Sample(images, source, images[:1], source)
        answer = open_onnx(path)
        if is_boosted:
            answer = combine_trees(answer, classifier.scale, classifier.booster)
        with exact_float32():
            agreement = compare_export(classifier.predict, answer, sample, labels=classifier.labels, any_size=True)
        check_agreement("onnx", agreement, TREES if is_boosted else EXACT)
    except DlferError as error:
        path.unlink(missing_ok=True)
        return f"{keras.backend.backend()}: {error}" if isinstance(error, ExportError) else str(error)
    return OnnxRecord(
        file=ONNX_FILE,
        opset=about["opset"],
        output=FEATURES if is_boosted else OUTPUT,
        weights=_HALF if halve else "float32",
        images=source,
        n=agreement.n,
        largest_difference=max(agreement.largest_difference, agreement.other_sizes.largest_difference),
    )


def write_embedded_int8(classifier: Classifier, folder: Path, sample: Sample) -> OnnxRecord:
    """Write `ONNX_FILE` into an artifact's folder with 8-bit weights and activations.

    Args:
        classifier: the artifact's classifier.
        folder: the artifact's folder.
        sample: images for comparison and for calibration.

    Returns:
        The record of the file for artifact.json, with its agreement with Keras and its loss of accuracy.

    Raises:
        EnvironmentProblem: the backend is not TensorFlow, or a package is missing.
        ModelError: the model has trees.
        ExportError: fewer than 90 % of the labels agree.
    """
    check_exportable(classifier)
    path = folder / ONNX_FILE
    try:
        about = write_onnx_int8(classifier, path, size=None, sample=sample)
        found = compare_export(classifier.predict, open_onnx(path), sample, labels=classifier.labels, any_size=True)
        check_agreement("int8", found, QUANTISED, advice="Leave --weights int8 out.")
    except DlferError:
        path.unlink(missing_ok=True)
        raise
    pair = found.accuracy
    accuracy = None
    if pair is not None:
        lost = pair.difference
        accuracy = QuantisedAccuracy(
            n=pair.n,
            original=pair.accuracy_a,
            quantised=pair.accuracy_b,
            lost=lost.value,
            low=lost.low,
            high=lost.high,
        )
    quantised = about["quantised"]
    return OnnxRecord(
        file=ONNX_FILE,
        opset=about["opset"],
        output=OUTPUT,
        weights=_INT8,
        images=sample.source,
        n=found.n,
        largest_difference=max(found.largest_difference, found.other_sizes.largest_difference),
        labels_agree=found.labels_agree.value,
        calibration=f"{quantised['num_images']:,} images ({quantised['images']})",
        accuracy=accuracy,
    )


def list_kernels(classifier: Classifier) -> list[np.ndarray]:
    """Return the float32 kernels of at least `MIN_KERNEL` values, including those of an ensemble's members."""
    if isinstance(classifier, EnsembleClassifier):
        return [kernel for member in classifier.members.values() for kernel in list_kernels(member)]
    if not isinstance(classifier, NetworkClassifier):
        return []
    weights = (np.asarray(keras.ops.convert_to_numpy(weight.value)) for weight in classifier.network.weights)
    return [weight for weight in weights if weight.ndim >= 2 and weight.size >= MIN_KERNEL]


def halve_kernels(path: Path, kernels: Sequence[np.ndarray]) -> int:
    """Rewrite an ONNX file so that its large kernels are in float16; return their number.

    The converter multiplies kernels by the scale of the following BatchNorm, so that rounding the values in the file
    would change predictions. Each kernel is therefore stored as kernel (float16) times scale (float32, one for each
    output channel), which runtimes multiply once, when they load the file.

    Args:
        kernels: the network's kernels in Keras' layout, with float16 values.
    """
    onnx = import_extra("onnx")
    model = onnx.load(path)
    graph, left, nodes = model.graph, list(kernels), []
    for tensor in [tensor for tensor in graph.initializer if np.prod(tensor.dims) >= MIN_KERNEL]:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32:
            continue
        for place, kernel in enumerate(left):
            found = factor_kernel(values, kernel)
            if found is not None:
                del left[place]
                break
        else:
            continue
        half, scale = found
        graph.initializer.remove(tensor)
        names = [f"{tensor.name}_{part}" for part in ("half", "scale", "whole")]
        graph.initializer.extend(
            [onnx.numpy_helper.from_array(half, names[0]), onnx.numpy_helper.from_array(scale, names[1])]
        )
        cast = onnx.helper.make_node("Cast", [names[0]], [names[2]], to=onnx.TensorProto.FLOAT)
        nodes += [cast, onnx.helper.make_node("Mul", [names[2], names[1]], [tensor.name])]
    for number, node in enumerate(nodes):
        graph.node.insert(number, node)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return len(nodes) // 2


def factor_kernel(values: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Factor a tensor of an ONNX file into (float16 kernel, float32 scale); return None if `kernel` does not match it.

    Args:
        values: float32, [out, in, h, w] of a convolution, [channels, 1, h, w] if depthwise, or [in, out] of a product.
        kernel: float32 in Keras' layout: [h, w, in, out], [h, w, channels, 1] or [in, out].
    """
    if values.ndim == 4 and kernel.ndim == 4:
        candidates = [(np.transpose(kernel, (3, 2, 0, 1)), (1, 2, 3)), (np.transpose(kernel, (2, 3, 0, 1)), (1, 2, 3))]
    else:
        candidates = [(kernel, (0,))]
    for candidate, axes in candidates:
        if candidate.shape != values.shape:
            continue
        half = np.ascontiguousarray(candidate).astype(np.float16)
        wide = half.astype(np.float64)
        norms = (wide**2).sum(axis=axes, keepdims=True)
        scale = np.divide(
            (wide * values).sum(axis=axes, keepdims=True), norms, where=norms > 0, out=np.ones_like(norms)
        )
        scale = scale.astype(np.float32)
        product = half.astype(np.float32) * scale
        if np.abs(product - values).max() <= 1e-6 * max(np.abs(values).max(), 1e-12):
            return half, scale
    return None


MAX_BYTES = 48 * 2**20
"""Maximum size of a shipped model, since it is committed to the repository. EfficientNet-B3 takes 45 MiB: its weights
are stored both for Keras and for ONNX Runtime."""

MAX_DIFFERENCE = 1e-2
"""Maximum difference of any probability from the run's own model, on drawn faces."""

WEIGHTS = ("float16", "int8")
"""Precisions of a shipped model's ONNX file: large kernels stored in float16, or 8-bit integers."""

_NUM_FACES = 70
_NAME = re.compile(r"\w[\w.-]*")
_SHIPPED_RECORDS = (CONFIG_FILE, Metrics.FILE, DATA_FILE)


def ship_model(
    run: str | Path,
    folder: Path,
    *,
    name: str,
    default: bool = False,
    weights: str = "float16",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a run's model to `folder`/`name` for shipping, and return that path.

    A network's large kernels are stored in float16, all others in float32, and computation is in float32. With int8,
    the ONNX file computes with 8-bit integers, and the Keras weights are the same; temperature and threshold for
    abstaining are fitted on its own predictions, if the run's validation data is here. The folder also has the model's
    card, config.yaml, metrics.json, data.json and images.npz (64 bits of each image's digest), by which `dlfer
    evaluate` and `compare` recognise images that trained or selected the model. Files in the run's folder of the model
    that artifact.json does not list are not copied.

    Args:
        run: a finished run, by its path or name.
        folder: the folder of shipped models; saved_models in a checkout.
        name: the name of the shipped model.
        default: whether it becomes the default model; the folder's other models then are not.
        weights: one of WEIGHTS.
        say: called with a line about files that were not copied.

    Raises:
        UserError: `weights` is not one of WEIGHTS.
        ModelError: there is no such run, it is a smoke run for the default, the name is invalid or taken, the model is
            above 48 MiB, a probability on drawn faces changes by more than 0.01, or int8 for more than one network.
        ExportError: with int8, fewer than 90 % of the labels agree with those of float32.
    """
    if weights not in WEIGHTS:
        raise UserError(f"--weights {weights}: expected {' or '.join(WEIGHTS)}.")
    opened, source = open_run_of_model(run)
    target = Path(folder) / name
    if not _NAME.fullmatch(name) or name == "runs":
        raise ModelError(
            f"{name}: not a model's name; expected a word such as lite2_96, of letters, digits, and . - _ within it."
        )
    if os.path.lexists(target):
        raise ModelError(f"{target}: exists already; delete it, or choose another name.")
    check_outputs({"NAME": target})
    if default and opened.is_smoke:
        raise ModelError(
            f"{opened.path}: is a smoke run, whose model cannot become the default, because its predictions are "
            "meaningless. Leave --default out, or ship a run of the whole experiment."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".ship-") as temporary:
        # A copy with the layout and the name of the run, from which the card is written.
        copy = Path(temporary) / opened.path.name
        left_out = _copy_model(source, copy / "model")
        if left_out and say is not None:
            say(left_out)
        for file in (RUN_FILE, *_SHIPPED_RECORDS):
            if (opened.path / file).is_file():
                shutil.copyfile(opened.path / file, copy / file)
        _keep_digests(opened.path, copy / "model")
        shipped = _shrink(copy / "model", source, opened, weights=weights)
        _describe(copy, source, name=name, default=default, shipped=shipped)
        for file in _SHIPPED_RECORDS:
            if (copy / file).is_file():
                shutil.move(copy / file, copy / "model" / file)
        size = sum(path.stat().st_size for path in (copy / "model").rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise ModelError(
                f"{source}: is {size / 2**20:.1f} MiB when shipped, expected at most {MAX_BYTES >> 20} MiB."
            )
        (copy / "model").rename(target)
    if default:
        _unset_other_defaults(target)
    return target


def _copy_model(source: Path, target: Path) -> str | None:
    """Copy artifact.json and the files that it lists; return a sentence on other files, or None if there are none."""
    file = source / ArtifactRecord.FILE
    names = ArtifactRecord.require(source).sha256
    check_manifest(source, names, file=file, needed=(), mend=MEND)
    for name in (file.name, *names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    known = {file.name, CARD_FILE, *names}
    others = [path.relative_to(source).as_posix() for path in source.rglob("*") if not path.is_dir()]
    others = sorted(name for name in others if name not in known)
    if not others:
        return None
    listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    return f"{source}: {count_noun(len(others), 'file')} not listed in {file.name} left out: {listed}"


def _keep_digests(run: Path, model: Path) -> None:
    """Write 64 bits of the digest of each image that trained or selected a run's model, to recognise these images."""
    if not (run / IMAGES_FILE).is_file():
        return
    lists = read_npz(run / IMAGES_FILE)
    kept = {name: shorten_digests(lists[name]) for name in ("train_digests", "validation_digests") if name in lists}
    if kept:
        write_npz(model / IMAGES_FILE, kept)


GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.h5", "*.onnx"))


def write_hub_folder(model: Path, folder: Path, repository: str | None = None) -> Path:
    """Write a shipped model as a repository of the Hugging Face hub: its files, with the card as README.md.

    Args:
        model: the folder of a shipped model.
        folder: the folder to write, completely or not at all.
        repository: ORG/NAME for the loading example in the card; None if it is not known yet.

    Raises:
        ConfigError: the folder exists already, or cannot be created.
    """
    check_hub_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".hub-") as temporary:
        copy = Path(temporary) / "repository"
        copy_folder(model, copy, without=CARD_FILE)
        card = (model / CARD_FILE).read_text(encoding="utf-8")
        if repository is not None:
            card = card.replace('dlfer.load("this folder")', f'dlfer.load("hf://{repository}")')
        write_atomically(copy / "README.md", card)
        write_atomically(copy / ".gitattributes", GIT_ATTRIBUTES)
        copy.rename(folder)
    return folder


def check_hub_folder(folder: Path) -> None:
    """Raise ConfigError unless the folder of a repository can be created."""
    if os.path.lexists(folder):
        raise ConfigError(
            f"--hub-folder {folder}: exists already; delete it, or choose another folder with --hub-folder."
        )
    check_outputs({"--hub-folder": folder})


def shrink_weights(path: Path) -> None:
    """Rewrite a .weights.h5 file with kernels of at least `MIN_KERNEL` values in float16.

    Raises:
        ModelError: a weight is too large for float16.
    """
    small = path.with_name(f"small.{path.name}")
    with h5py.File(path, "r") as old, h5py.File(small, "w") as new:
        _copy_group(old, new, path)
    small.replace(path)


def compute_difference(first: Classifier, second: Classifier) -> float:
    """Return the largest difference between two classifiers' probabilities on drawn faces of each expression."""
    rng = np.random.default_rng(0)
    faces = [draw_face(FER2013_LABELS[row % len(FER2013_LABELS)], rng=rng) for row in range(_NUM_FACES)]
    images = np.stack([resize_square(face.reshape(*face.shape[:2], 1), 48) for face in faces])
    return float(np.abs(first.predict(images) - second.predict(images)).max())


def _copy_group(old: h5py.Group, new: h5py.Group, path: Path) -> None:
    for key, value in old.attrs.items():
        new.attrs[key] = value
    for name, item in old.items():
        if isinstance(item, h5py.Group):
            _copy_group(item, new.create_group(name), path)
            continue
        values = item[()]
        if values.ndim >= 2 and values.size >= MIN_KERNEL and values.dtype == np.float32:
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            if not np.isfinite(values).all():
                raise ModelError(f"{path}: {item.name} holds a weight above 65,504, which float16 cannot hold.")
        new.create_dataset(name, data=values, dtype=values.dtype)


def embed_onnx(folder: Path, run: Run | None, *, weights: str = "float16") -> Sample:
    """Add an ONNX file, in float16 or int8, to an artifact whose large kernels are in float16.

    It is compared with Keras on the run's validation images if its data is available, else on drawn faces; these images
    are returned.
    """
    classifier, record = load_artifact(folder), ArtifactRecord.require(folder)
    sample = gather_sample(classifier, record, run=run, data=None, say=lambda text: None)
    found: OnnxRecord | str
    if weights == "int8":
        found = write_embedded_int8(classifier, folder, sample)
    else:
        found = write_embedded_onnx(classifier, folder, images=sample.images, source=sample.source, halve=True)
    sha256 = record.sha256
    if isinstance(found, OnnxRecord):
        sha256 = {**sha256, found.file: hash_file(folder / found.file)}
        update = {"onnx": found, "onnx_absent": None}
    else:
        update = {"onnx": None, "onnx_absent": found}
    record.model_copy(update={"sha256": sha256, **update}).write(folder)
    return sample


def _shrink(folder: Path, source: Path, run: Run, *, weights: str) -> ShippedRecord:
    """Reduce the size of an artifact's copy, and return how, and how far its predictions differ from the source's."""
    record = ArtifactRecord.require(folder)
    if WEIGHTS_FILE not in record.sha256:
        if weights == "int8":
            raise ModelError(
                f"{source}: is of family {record.family}, whose parts are not one network of eight bits; leave --weights int8 out."
            )
        return ShippedRecord(weights="as trained", speed=measure_speed(folder))
    shrink_weights(folder / WEIGHTS_FILE)
    sha256 = {name: digest for name, digest in record.sha256.items() if name != ONNX_FILE}
    sha256[WEIGHTS_FILE] = hash_file(folder / WEIGHTS_FILE)
    record.model_copy(update={"sha256": sha256, "onnx": None}).write(folder)
    sample = embed_onnx(folder, run, weights=weights)
    if weights == "int8" and sample.validation is not None:
        _refit_confidence(folder, run, sample.validation)
    difference = compute_difference(load_artifact(source), load_artifact(folder))
    if difference > MAX_DIFFERENCE:
        raise ModelError(
            f"{source}: with large kernels in float16 a probability changes by {difference:.3f}, expected at most "
            f"{MAX_DIFFERENCE}; the model cannot be shipped."
        )
    text = "large kernels in float16" + ("; the ONNX file in int8" if weights == "int8" else "")
    return ShippedRecord(weights=text, largest_difference=difference, num_faces=_NUM_FACES, speed=measure_speed(folder))


def _refit_confidence(folder: Path, run: Run, validation: Split) -> None:
    """Fit the temperature and the threshold for abstaining again, on the ONNX file's own predictions for validation.

    The artifact keeps the trained model's temperature for its Keras weights and gets that of the ONNX file under onnx.
    The copy of metrics.json beside it gets both values, and what the ONNX file reaches at the threshold on validation.
    """
    metrics = read_metrics(folder.parent)
    if metrics is None or metrics.validation is None:
        return
    engine, record = load_engine(folder), ArtifactRecord.require(folder)
    predictions = Predictions(validation.ids, engine.labels, validation.targets, engine.predict(validation.images))
    fitted = compute_metrics_file(
        {"validation": predictions},
        Metrics(selected_on=metrics.selected_on),
        target_accuracy=run.config().evaluate.target_accuracy,
    )
    onnx = record.onnx.model_copy(update={"temperature": fitted.temperature})
    record.model_copy(update={"onnx": onnx}).write(folder)
    split = metrics.validation.model_copy(update={"selective": fitted.validation.selective})
    changes = {"temperature": fitted.temperature, "abstain": fitted.abstain, "validation": split}
    metrics.model_copy(update=changes).write(folder.parent)


def _describe(copy: Path, source: Path, *, name: str, default: bool, shipped: ShippedRecord) -> None:
    """Write the name and the shipping record into artifact.json, and write the card."""
    shape = DataRecord.require(copy).splits["train"].shape
    record = ArtifactRecord.require(copy / "model")
    about = {
        "name": name,
        "default": default,
        "smoke": read_about(source, record).smoke,
        "research_only": any(t.research_only for t in find_terms(read_experiment(copy), record.about.origins)),
        "face_size": compute_side(*shape[:2], record.input.aspect) if shape else None,
        "shipped": shipped,
    }
    record.model_copy(update={"about": record.about.model_copy(update=about)}).write(copy / "model")
    write_card(copy)
    if shipped.largest_difference is not None:
        card = copy / "model" / CARD_FILE
        onnx = record.onnx
        is_refitted = onnx is not None and onnx.temperature is not None
        except_for = ", except for temperature and abstaining, which are the ONNX file's" if is_refitted else ""
        text = (
            f"\n## This copy\n\nLarge kernels are stored in float16 and converted to float32 for computation. On "
            f"{shipped.num_faces} drawn faces no probability differs from the trained model's by more than "
            f"{round_up(shipped.largest_difference)}. The metrics above are the trained model's{except_for}.\n"
        )
        if onnx is not None and onnx.labels_agree is not None:
            text += f"\n{describe_int8(onnx)}\n\n{INT8_FILES}\n"
        text += f"\n{describe_speed(shipped.speed)}\n"
        write_atomically(card, card.read_text(encoding="utf-8") + text)


def describe_int8(record: OnnxRecord) -> str:
    """Return sentences about an int8 ONNX file's agreement with Keras, its loss of accuracy and its temperature."""
    text = (
        f"{INT8_BEGINNING} ({record.weights}), calibrated on {record.calibration}. "
        f"Compared with Keras on {record.n:,} images ({record.images}): {100 * record.labels_agree:.2f} % of the labels agree, and "
        f"probabilities differ by at most {round_up(record.largest_difference)}."
    )
    accuracy, fit = record.accuracy, record.temperature
    if accuracy is None:
        text += " The labels of these images are not known, and neither is the loss of accuracy."
    else:
        text += (
            f" Accuracy there: {100 * accuracy.original:.2f} % with Keras, {100 * accuracy.quantised:.2f} % with eight bits; "
            f"lost: {accuracy.lost + 0.0:.2f} percentage points (95 % {accuracy.low:.2f} to {accuracy.high:.2f}, paired, "
            f"n = {accuracy.n:,})."
        )
    if fit is None:
        return f"{text} The temperature and the threshold for abstaining are those of the trained model."
    return (
        f"{text} Its temperature ({fit.value:.3f}) and the threshold for abstaining were fitted on its own predictions for "
        f"validation ({fit.fitted_on}, n = {fit.n:,})."
    )


def describe_speed(speed: SpeedRecord) -> str:
    """Return a sentence about a model's prediction time per face and the machine."""
    return (
        f"When it was shipped it took {speed.milliseconds:.3g} ms for a face, in batches of {speed.batch_size}, by {speed.engine} on "
        f"{speed.machine}."
    )


def _unset_other_defaults(target: Path) -> None:
    for path in target.parent.iterdir():
        if path != target and is_default(path):
            record = ArtifactRecord.require(path)
            record.model_copy(update={"about": record.about.model_copy(update={"default": False})}).write(path)
