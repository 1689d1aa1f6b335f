"""The registered data sources, and `load_data`, which loads the splits of an experiment from its data section."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.config.load import resolve_path
from dlfer.config.names import FER2013_LABELS, expand_home
from dlfer.config.sections import CropConfig, DataConfig, LabelsConfig
from dlfer.data.bundle import DataBundle, Reading, Split
from dlfer.data.faces import prepare_faces
from dlfer.data.files import normalise_name
from dlfer.data.folder import NOT_DRAWN, SPLITS, list_classes, load_folder
from dlfer.data.images import MIN_SIDE, resize_square
from dlfer.data.labels import CANONICAL, SPELLINGS, match_labels, relabel_bundle
from dlfer.data.split import apply_protocol, draw_fraction, draw_subset, drop_duplicates
from dlfer.data.synthetic.faces import load_synthetic_faces
from dlfer.data.synthetic.scenes import load_synthetic_scenes
from dlfer.data.tfds_stream import IMAGE_FOLDER, find_data_dir
from dlfer.data.votes import add_soft_targets, merge_columns, read_votes
from dlfer.errors import ConfigError, DataError, DlferError, MissingDataError, ProtocolError, shorten
from dlfer.runs.files import read_npz
from dlfer.runs.text import count_noun

MAX_LABELS, MAX_NAMED = 10_000, 10

Loader = Callable[[DataConfig, int], DataBundle]


@dataclass(frozen=True)
class SourceSpec:
    """A registered data source.

    Attributes:
        summary: one line for `dlfer show sources`.
        needs: a description of the files it needs.
        load: (config, image_size) -> DataBundle in the source's own splits.
        own_labels: whether the source applies config.labels itself, before decoding or streaming.
    """

    summary: str
    needs: str
    load: Loader
    own_labels: bool = False


SOURCES: dict[str, SourceSpec] = {
    "fer2013": SourceSpec(
        "FER2013 in any of its layouts, with its official splits",
        "path: fer2013.csv, icml_face_data.csv, train.csv with test.csv, or folders train/angry/...",
        lambda config, image_size: importlib.import_module("dlfer.data.fer2013").load_fer2013(config),
    ),
    "folder": SourceSpec(
        "Class folders, in train/validation/test or to be split",
        "path: a folder with <class>/<image> or train/<class>/<image>",
        lambda config, image_size: load_folder(config, image_size=image_size),
        own_labels=True,
    ),
    "tfds": SourceSpec(
        "Any data set of tensorflow_datasets by name, streamed",
        "name: e.g. imagenet2012, whose two archives are fetched by hand",
        lambda config, image_size: importlib.import_module("dlfer.data.tfds_stream").load_tfds(config, image_size),
        own_labels=True,
    ),
    "arrays": SourceSpec(
        "Arrays of an .npz without pickle",
        "path: an .npz with images and targets",
        lambda config, image_size: load_arrays(config),
    ),
    "synthetic_faces": SourceSpec(
        "Faces with seven expressions, drawn by seed",
        "nothing",
        lambda config, image_size: load_synthetic_faces(config),
    ),
    "synthetic_scenes": SourceSpec(
        "Textured objects in colour, drawn by seed", "nothing", lambda config, image_size: load_synthetic_scenes(config)
    ),
}


def load_data(
    config: DataConfig, *, image_size: int, balance: str = "none", say: Callable[[str], None] | None = None
) -> DataBundle:
    """Load the data of a data section and divide it by the protocol into train, validation and test.

    The steps are, in this order: `config.num_images` limits the source's own splits, `config.faces` replaces images by
    faces, `config.size` resizes them, `config.fraction` draws from all of them, the protocol divides them, and
    `config.drop_duplicates` and `config.soft_targets` change train. Streamed images keep the source's splits.

    Args:
        image_size: side in pixels of the network's input.
        balance: that of the stage; the protocol may forbid or require it.
        say: receives messages on the progress of the face detection.

    Raises:
        EnvironmentProblem: the package of the face detector is not installed.
        MissingDataError: the data does not exist; the message says where to obtain it.
        DataError: rows, files or labels are invalid, or a class of train is empty.
        ProtocolError: the protocol forbids the split or the balance, or the source does not support it.
    """
    bundle = load_source_splits(config, image_size=image_size)
    if bundle.train is None:
        found = ", ".join(f"{name} ({count_noun(len(split), 'image')})" for name, split in bundle.splits.items())
        raise DataError(
            f"data: {config.path} has {found} and no train split, which training needs. Put a folder train beside them, set "
            "data.path to the folder of classes to be split, or say by data.folders which folder is train."
        )
    if not isinstance(bundle.train, Split):
        _check_streamed(bundle, config, balance=balance)
        return bundle
    drawn = {
        key: draw_subset(split, getattr(config.num_images, key), config.seed) for key, split in bundle.splits.items()
    }
    bundle = _count_left_out(dataclasses.replace(bundle, **drawn), bundle, NOT_DRAWN)
    if config.faces is not None:
        bundle = prepare_faces(bundle, config.faces, aspect=config.aspect, say=say)
    if config.size is not None:
        resized = {key: resize_split(split, config.size, config.aspect) for key, split in bundle.splits.items()}
        bundle = dataclasses.replace(bundle, **resized)
    check_shapes(bundle, config.path or "data")
    if config.fraction is not None:
        bundle = _count_left_out(draw_fraction(bundle, config.fraction, seed=config.seed), bundle, "data.fraction")
    bundle = _count_left_out(apply_protocol(bundle, config, balance=balance), bundle, "not used by the protocol")
    if config.drop_duplicates:
        bundle = _count_left_out(drop_duplicates(bundle), bundle, "duplicates in train (data.drop_duplicates)")
    if config.soft_targets is not None:
        votes = merge_columns(read_votes(resolve_path(config.votes)), config.labels.aliases)
        bundle = add_soft_targets(bundle, votes, kind=config.soft_targets, share=config.soft_share)
    notes = check_classes(bundle, limited=config.num_images.train is not None)
    return dataclasses.replace(bundle, notes=(*bundle.notes, *notes, *_describe_aspect(bundle, config.aspect)))


def _count_left_out(bundle: DataBundle, before: DataBundle, reason: str) -> DataBundle:
    """Count the images that are in `before` but no longer in `bundle` as left out, for `reason`."""
    left = Counter(name for split in bundle.splits.values() for name in split.ids.tolist())
    lost = []
    for split in before.splits.values():
        for name in split.ids.tolist():
            # If an id occurs in several splits, pooling them prefixes all ids with the names of their splits.
            found = name if left[name] else f"{split.name}/{name}"
            if left[found]:
                left[found] -= 1
            else:
                lost.append(name)
    return dataclasses.replace(bundle, reading=before.reading.leave_out(reason, lost))


def resize_split(split: Split, size: int, aspect: str = "crop") -> Split:
    """Return `split` with its images resized to squares of `size` pixels, see `resize_square`."""
    images = np.zeros((len(split), size, size, split.images.shape[-1]), np.uint8)
    for row, pixels in enumerate(split.images):
        images[row] = resize_square(pixels, size, aspect)
    return dataclasses.replace(split, images=images)


def _describe_aspect(bundle: DataBundle, aspect: str) -> tuple[str, ...]:
    """Return a note on how the network's input is made from images that are not square; empty if they are square."""
    height, width = bundle.train.images.shape[1:3]
    if height == width:
        return ()
    if aspect == "pad":
        seen = f"is shown the whole image, padded to {max(height, width)} x {max(height, width)} by repeating its edge"
    else:
        side = min(height, width)
        lost = 1 - side / max(height, width)
        seen = f"is shown the central {side} x {side} of each; {lost:.0%} of its pixels are cropped"
    return (f"The images are {width} x {height} pixels, not square: the network {seen} (data.aspect: {aspect}).",)


def check_classes(bundle: DataBundle, *, limited: bool = False) -> tuple[str, ...]:
    """Return a note for each split that lacks classes.

    Args:
        limited: whether train was limited on purpose, so that it may lack classes.

    Raises:
        DataError: there are fewer than two classes, a split is empty, a target has no label, or train lacks a class.
    """
    labels = bundle.labels
    if len(labels) < 2:
        raise DataError(
            f"data: found one class only ({', '.join(labels)}), expected at least two. "
            "Check data.path and data.labels (aliases, drop)."
        )
    notes = []
    for key, split in bundle.splits.items():
        counts = np.bincount(split.targets, minlength=len(labels))
        if len(counts) > len(labels):
            raise DataError(
                f"data: {key} has the target {len(counts) - 1}, expected 0..{len(labels) - 1} ({', '.join(labels)})."
            )
        if not len(split):
            raise DataError(
                f"data: {key} has no images, expected at least one. Splits that dlfer draws take whole groups of duplicates of each "
                "class: have five different images or more of each, or raise data.num_images or data.fraction if one of them is set."
            )
        empty = [label for label, count in zip(labels, counts, strict=True) if not count]
        if empty and key == "train" and not limited:
            raise DataError(
                f"data: train has no image of {', '.join(empty)}; a class needs images to be learned. "
                f"{_advise_missing(bundle, empty)}"
            )
        if empty:
            what = "learned from it" if key == "train" else "evaluated on it"
            shown = ", ".join(empty[:MAX_NAMED]) + (
                f" and {len(empty) - MAX_NAMED:,} more" if len(empty) > MAX_NAMED else ""
            )
            notes.append(
                f"{key} has no image of {shown}, so {'this class' if len(empty) == 1 else 'these classes'} cannot be {what}."
            )
    return tuple(notes)


def find_refusal(bundle: DataBundle) -> str | None:
    """Return why a run on these splits would be refused by `check_classes`, None if it would not; duplicates are not looked for.

    Args:
        bundle: a source's own splits in memory, with train; from their images only the number is used. Splits that are not
            there are drawn as by the experiment that dlfer init writes.
    """
    # A class gives an image to each split that is drawn if it has one more for train.
    needed = 1 if bundle.validation is not None else 2 if bundle.test is not None else 3
    if np.bincount(bundle.train.targets, minlength=1).max() < needed:
        bundle = dataclasses.replace(bundle, validation=bundle.train.take(np.arange(0)))
    try:
        check_classes(bundle)
    except DataError as error:
        return str(error).removeprefix("data: ")
    return None


def check_shapes(bundle: DataBundle, path: Path | str) -> None:
    """Raise DataError if splits differ in their images' size or channels; the message names the data by `path`."""
    held = {key: split.images.shape[1:] for key, split in bundle.splits.items() if isinstance(split, Split)}
    first = next(iter(held), None)
    for key, shape in held.items():
        if shape == held[first]:
            continue
        if shape[-1] == held[first][-1]:
            advice = "Save all splits in one size, or set data.size in an experiment file, which resizes them."
        else:
            advice = "Save all splits with one channel (grey) or all with three (RGB)."
        raise DataError(
            f"{path}: {key} has images of shape {shape}, {first} of {held[first]}; expected the same. {advice}"
        )


def _advise_missing(bundle: DataBundle, empty: list[str]) -> str:
    """Return advice on classes without images; numeric labels may be in another code, which dropping would not fix."""
    drop = f"set data.labels.drop: [{', '.join(empty)}]."
    if bundle.reading.what == "files" or bundle.source == "tfds":
        return f"Add some, or {drop}"
    code = ", ".join(f"{number} {label}" for number, label in enumerate(bundle.labels))
    return (
        f"The labels are numbers, read as {code}. If they are another code, counted from 1 for example, all labels are "
        f"wrong, and dropping a class would not fix them: write the numbers again. Only if they are this code, {drop}"
    )


def _check_streamed(bundle: DataBundle, config: DataConfig, *, balance: str) -> None:
    """Raise ProtocolError if a setting needs images in memory, but they are streamed."""
    asked = f"balance: {balance}" if balance == "undersample" else config.needs_memory
    if asked is not None:
        num_images = sum(map(len, bundle.splits.values()))
        raise ProtocolError(
            f"data: found {asked}, which needs the images in memory, but source {config.source} streams these {num_images:,} images: "
            "it holds images in memory only if they are not cropped at random (data.crop) and take less than 2 GB. "
            "Leave the setting out (balance: sampler and class_weight work), or set crop: {train: none} and a smaller num_images or size."
        )


def prepare_data(config: DataConfig, *, say: Callable[[str], None] | None = None) -> str | None:
    """Prepare the records of a tensorflow_datasets data set if they are missing; return a sentence on their location.

    None is returned for sources that read their files directly.

    Raises:
        DataError: tensorflow_datasets has no such data set.
        MissingDataError: the data does not exist, or its folder cannot be written.
    """
    module = importlib.import_module("dlfer.data.tfds_stream") if config.source == "tfds" else None
    if module is None or config.name == module.IMAGE_FOLDER:
        return None
    builder = module.prepare_data_set(_resolve(config), say)
    counts = ", ".join(f"{name} {info.num_examples:,}" for name, info in builder.info.splits.items())
    return f"{config.name} is prepared in {builder.data_dir} ({counts})"


def is_prepared(config: DataConfig) -> bool:
    """Return whether the data needs no preparation; for tfds, whether the records of the requested version exist."""
    if config.source != "tfds" or config.name == IMAGE_FOLDER:
        return True
    return bool(importlib.import_module("dlfer.data.tfds_stream").find_builder(_resolve(config)).is_prepared())


def _resolve(config: DataConfig) -> DataConfig:
    """Return the section with ${DLFER_DATA} and other variables in its path expanded."""
    return config if config.path is None else config.model_copy(update={"path": str(resolve_path(config.path))})


def load_source_splits(config: DataConfig, *, image_size: int) -> DataBundle:
    """Return a source's own splits, with `config.labels` applied and no protocol.

    Raises:
        MissingDataError, DataError: as `load_data`.
    """
    spec = SOURCES[config.source]
    bundle = spec.load(_resolve(config), image_size)
    return bundle if spec.own_labels else relabel_bundle(bundle, config.labels)


def is_present(config: DataConfig) -> bool:
    """Return whether the files of a data section exist, without reading them; for tfds, whether they are prepared."""
    if config.source.startswith("synthetic"):
        return True
    try:
        path = None if config.path is None else resolve_path(config.path)
        if config.source == "tfds" and config.name != IMAGE_FOLDER:
            base = re.split("[:/]", config.name)[0]
            return any(find_data_dir(path).glob(f"{base}/**/dataset_info.json"))
        return path is not None and path.exists()
    except ConfigError:  # an environment variable that is not set
        return False


def replace_by_synthetic(config: DataConfig) -> tuple[DataConfig, str]:
    """Return a data section that generates images in place of missing files, and a warning for the outputs.

    Faces replace FER2013 and folders of expressions, scenes replace everything else, with the data's number of labels
    if that is known. Split, protocol, numbers of images, size and seed are kept; for faces also aliases and drops.
    """
    num_labels = count_labels(config)
    faces = _shows_faces(config) and num_labels in (None, len(FER2013_LABELS))
    source = "synthetic_faces" if faces else "synthetic_scenes"
    labels = _translate_labels(config.labels) if faces else LabelsConfig()
    values = {**dict(config), "source": source, "path": None, "name": None, "splits": None, "folders": None}
    values["labels"] = labels
    values |= {"num_labels": None if faces else num_labels, "crop": CropConfig()}
    # Generated images have no votes and no subjects.
    values |= {"soft_targets": None, "soft_share": 1.0, "subjects": None}
    where = config.path or config.name
    warning = (
        f"The data of source {config.source} ({where}) was replaced by {source.replace('_', ' ')}"
        f"{'' if faces else f', with {num_labels:,} labels' if num_labels else ', with the labels of those'}: the "
        "results say nothing about the real data."
    )
    return DataConfig(**values), warning


def count_labels(config: DataConfig) -> int | None:
    """Return the number of labels of a data section (at most 10,000) if it is known without the images; else None."""
    if config.source == "fer2013" or config.source.startswith("synthetic"):
        return None
    found = len(find_labels(config) or ())
    return min(found, MAX_LABELS) if found > 1 else None


def find_labels(config: DataConfig) -> set[str] | None:
    """Return the labels of a data section if they can be known without reading its images; else None."""
    if config.source == "synthetic_scenes":
        return None
    try:
        names: Sequence[str]
        if config.source in ("fer2013", "synthetic_faces"):
            names = FER2013_LABELS
        elif config.source == "arrays":
            names = load_arrays(config.model_copy(update={"path": str(resolve_path(config.path))})).labels
        elif config.source == "folder" or config.name == IMAGE_FOLDER:
            names = list_classes(resolve_path(config.path), config.folders)
        else:
            names = _name_tfds_labels(_resolve(config))
        return {label for label in match_labels(names, config.labels).values() if label is not None}
    except (DlferError, OSError):  # the data is missing or incomplete
        return None


def _name_tfds_labels(config: DataConfig) -> list[str]:
    """Return the labels that a tensorflow_datasets data set declares; its images need not be on the disk."""
    stream = importlib.import_module("dlfer.data.tfds_stream")
    # The records at the path may be damaged; or the data set may be known only there.
    for path in dict.fromkeys((config.path, None)):
        try:
            return list(stream.name_labels(stream.find_builder(config.model_copy(update={"path": path}))))
        except Exception as error:  # not installed, an unknown name, no label, incomplete records
            problem = error
    if re.split("[:/]", config.name)[0] == "imagenet2012":
        return [str(index) for index in range(1000)]
    raise DataError(f"data.name: the labels of {config.name} are not known ({type(problem).__name__}).") from problem


def _translate_labels(labels: LabelsConfig) -> LabelsConfig:
    """Return the aliases and drops of the seven expressions, with the class names of the synthetic faces."""
    aliases = {
        CANONICAL[normalise_name(name)]: label
        for name, label in labels.aliases.items()
        if normalise_name(name) in CANONICAL
    }
    dropped = [CANONICAL.get(normalise_name(name), name) for name in labels.drop]
    return LabelsConfig(aliases=aliases, drop=tuple(n for n in dropped if n in SPELLINGS or n in aliases.values()))


def _shows_faces(config: DataConfig) -> bool:
    """Return whether a data section probably describes faces with expressions, judged by its names."""
    if config.source == "fer2013":
        return True
    if config.source == "tfds":
        return False
    named = {*config.labels.aliases.values(), *config.labels.aliases, *config.labels.drop}
    if any(normalise_name(name) in CANONICAL for name in named):
        return True
    return bool(re.search(r"fer|jaffe|ck\+|ckplus|raf|affect|expression|emotion|face", str(config.path).casefold()))


_MEND = "Write the file by numpy.savez(path, images=..., targets=..., labels=...)."


def load_arrays(config: DataConfig) -> DataBundle:
    """Read the splits of an .npz file of plain arrays.

    The file holds either `images`, `targets` and optionally `ids`, one split, which the protocol divides; or
    `train_images`, `train_targets`, optionally `train_ids`, and the same with `validation_` and
    `test_`. Images are uint8 [N, H, W] or [N, H, W, 1 or 3], targets whole numbers [N] from 0, ids
    text [N], by default "<split>/<row>". `labels`, text [C], names the targets; without it they are
    "0", "1" and so on. Other arrays are not read, and a note names them.

    Raises:
        MissingDataError: the file does not exist.
        DataError: the file is damaged or pickled, an array is missing or not of this form, or an array is named like
            the images of an unknown split.
    """
    path = expand_home(config.path)
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file. Set data.path to an .npz file. {_MEND}")
    arrays = _read_arrays(path)
    prefixes = {key: f"{key}_" for key in SPLITS if f"{key}_images" in arrays}
    if "images" in arrays:
        if prefixes:
            raise DataError(
                f"{path}: found both images and {', '.join(arrays)}; expected either images and targets, or <split>_images and <split>_targets of each split."
            )
        prefixes = {"train": ""}
    if "train" not in prefixes:
        raise DataError(
            f"{path}: found the arrays {', '.join(arrays) or '(none)'}, expected images and targets, "
            f"or train_images and train_targets. {_MEND}"
        )
    notes = _describe_unread_arrays(path, arrays, prefixes)
    splits: dict[str, Split | None] = dict.fromkeys(SPLITS)
    for key, prefix in prefixes.items():
        splits[key] = _to_split(path, arrays, key, prefix)
    most = max(int(split.targets.max()) for split in splits.values() if split is not None)
    if "labels" not in arrays and most >= MAX_LABELS:
        raise DataError(
            f"{path}: the largest target is {most:,}, and there is no array labels; expected targets from 0 to the number of "
            f"classes minus 1, at most {MAX_LABELS - 1:,}. Number the classes from 0 (numpy.unique(targets, "
            "return_inverse=True) does), or add their names as labels."
        )
    labels = arrays["labels"] if "labels" in arrays else np.array([str(target) for target in range(most + 1)])
    _check_labels(path, labels, most)
    seen = sum(len(split) for split in splits.values() if split is not None)
    return DataBundle(
        "arrays", tuple(labels.tolist()), **splits, notes=notes, reading=Reading(what="images", seen=seen)
    )


def _check_labels(path: Path, labels: np.ndarray, most: int) -> None:
    """Raise DataError unless `labels` are distinct nonempty names, and enough for the largest target `most`."""
    if labels.dtype.kind != "U" or labels.ndim != 1 or len(labels) <= most or len(set(labels.tolist())) < len(labels):
        raise DataError(
            f"{path}: labels is {labels.dtype} {labels.shape}, expected distinct text names, at least {most + 1} "
            f"(the largest target is {most})."
        )
    empty = [target for target, name in enumerate(labels.tolist()) if not name.strip()]
    if empty:
        raise DataError(f"{path}: labels: the name of target {empty[0]} (counted from 0) is empty. Name every class.")


def _describe_unread_arrays(path: Path, arrays: dict[str, np.ndarray], prefixes: dict[str, str]) -> tuple[str, ...]:
    """Return one sentence about the arrays that are not read; empty if all are read.

    Raises:
        DataError: an array is named like the images of a split, which would silently be left out.
    """
    read = {"labels", *(f"{prefix}{name}" for prefix in prefixes.values() for name in ("images", "targets", "ids"))}
    unread = [name for name in arrays if name not in read]
    split = next((name for name in unread if name.endswith("_images")), None)
    if split is not None:
        raise DataError(
            f"{path}: found {split}, expected the images of a split as {', '.join(f'{name}_images' for name in SPLITS)}. Rename the "
            f"array, and {split.removesuffix('images')}targets with it, or leave it out."
        )
    if not unread:
        return ()
    shown = ", ".join(unread[:MAX_NAMED]) + (", ..." if len(unread) > MAX_NAMED else "")
    return (f"{path.name}: not read: {count_noun(len(unread), 'array')} ({shown}).",)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as an .npz of plain arrays ({shorten(error, path)}). Pickled (object) arrays are refused, "
            f"since reading one can run any code. {_MEND}"
        ) from error


def _to_split(path: Path, arrays: dict[str, np.ndarray], split: str, prefix: str) -> Split:
    if f"{prefix}targets" not in arrays:
        raise DataError(f"{path}: found {prefix}images without {prefix}targets. {_MEND}")
    images, targets = arrays[f"{prefix}images"], arrays[f"{prefix}targets"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise DataError(
            f"{path}: {prefix}images is {images.dtype} {images.shape}, expected uint8 [N, H, W] or [N, H, W, 1 or 3] "
            "with values 0..255."
        )
    if min(images.shape[1:3]) < MIN_SIDE:
        raise DataError(
            f"{path}: {prefix}images is uint8 {images.shape}, expected at least {MIN_SIDE} pixels on each side "
            "(H and W). Save larger images."
        )
    if targets.dtype.kind not in "iu" or targets.ndim != 1:
        raise DataError(f"{path}: {prefix}targets is {targets.dtype} {targets.shape}, expected whole numbers [N].")
    if not len(targets):
        raise DataError(f"{path}: {prefix}targets is empty, expected at least one image.")
    ids = arrays.get(f"{prefix}ids", np.array([f"{split}/{row}" for row in range(len(targets))]))
    if ids.dtype.kind != "U":
        raise DataError(f"{path}: {prefix}ids is {ids.dtype}, expected text.")
    _check_entries(path, {f"{prefix}images": images, f"{prefix}targets": targets, f"{prefix}ids": ids})
    try:
        return Split(split, images[..., None] if images.ndim == 3 else images, targets.astype(np.int64), ids)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _check_entries(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise DataError if images, targets and ids (in this order) differ in length, or a target is out of range."""
    (first, images), (name, targets), _ = arrays.items()
    for other, values in arrays.items():
        if len(values) != len(images):
            raise DataError(
                f"{path}: {first} has {len(images):,} entries, {other} has {len(values):,}; expected the same number."
            )
    least, most = int(targets.min()), int(targets.max())
    if least < 0:
        raise DataError(f"{path}: {name} has the negative target {least:,}, expected numbers of classes from 0.")
    if most > np.iinfo(np.int64).max:
        raise DataError(f"{path}: {name} has the target {most:,}, expected numbers of classes from 0.")
