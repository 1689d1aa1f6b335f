"""Generator of a first experiment file for the user's own data, with settings chosen by the data's counts and sizes."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlfer.config.load import VARIABLE, parse_recorded_experiment
from dlfer.config.names import expand_home
from dlfer.config.sections import LabelsConfig
from dlfer.config.strict_yaml import format_yaml
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.fer2013_csv import USAGES
from dlfer.data.files import Tally
from dlfer.data.folder import SPLITS, UNREADABLE, scan_folder, try_each
from dlfer.data.given import Kind, open_data, recognise
from dlfer.data.images import read_header, read_image
from dlfer.data.labels import describe_merged, describe_unknown, match_labels, order_labels
from dlfer.data.sources import check_shapes, find_refusal, load_source_splits
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.files import check_outputs, write_atomically
from dlfer.runs.text import count_noun, escape_text

_MAX_DECODED, _MAX_PIXELS = 2000, 400_000_000
"""Limits of the images and pixels of a folder that are decoded, which takes seconds (ten on two busy cores)."""
_LARGEST = 224
"""Largest image_size, in pixels, that is written."""
_EVERY_FER2013_FILE = re.compile(rf"(?:{'|'.join(USAGES)})_\d+\.\w+$")


@dataclass(frozen=True)
class FolderSummary:
    """The contents of the user's data: counts, labels and sizes of the images.

    Attributes:
        folder: path of the data: a folder, or a csv or .npz file.
        counts: split -> class -> number of images, without those known to be unreadable.
        labels: the labels to which dlfer maps the classes, in order.
        side: median shorter side, in pixels, of a sample of the images.
        is_uniform: whether all images of the sample have the same size.
        source: data.source of the experiment; fer2013 if a csv or the file names contain FER2013's official split.
        remarks: sentences on what was left out and how names were interpreted.
        folders: the roles of folders given by the user.
        label_of: the label of each class; empty: the classes are the labels.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    labels: tuple[str, ...]
    side: int
    is_uniform: bool
    source: str = "folder"
    remarks: tuple[str, ...] = ()
    folders: Mapping[str, str] = field(default_factory=dict)
    label_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_train(self) -> int:
        """Number of images in the split `train`."""
        return sum(self.counts["train"].values())

    @property
    def imbalance(self) -> float:
        """Ratio of the numbers of images of the largest and the smallest label of `train`."""
        sizes = Counter()
        for name, count in self.counts["train"].items():
            sizes[self.label_of.get(name, name)] += count
        return max(sizes.values()) / max(1, min(sizes.values()))


def survey_folder(folder: Path, folders: Mapping[str, str] | None = None) -> FolderSummary:
    """Survey a folder of class folders; all images are decoded, or a sample if they are many or large.

    Args:
        folder: the folder of the data.
        folders: the roles of folders with ambiguous names, as in `data.folders`.

    Raises:
        MissingDataError: the folder does not exist.
        DataError: it holds no class folders, only one class, or no readable image.
    """
    folder = expand_home(folder)
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: there is no such folder; expected one with <class>/<image> in it.")
    tally = Tally(folder)
    splits = scan_folder(folder, folders, tally)
    files = [file for own in splits.values() for file in own]
    mapping = match_labels((file.class_name for file in files), LabelsConfig())
    labels = order_labels(label for label in mapping.values() if label is not None)
    if len(labels) < 2:
        raise DataError(f"{folder}: found only the class {', '.join(labels)}, expected at least two class folders.")
    names = [file.id for file in files]
    sizes, unreadable, remarks = _look_at_images(folder, names)
    lost = set(unreadable)
    for name in unreadable:
        tally.leave_out(UNREADABLE, name, was_seen=True)
    if not splits.get("train"):
        raise DataError(_describe_no_train(folder, splits))
    counts = {split: dict.fromkeys((file.class_name for file in own), 0) for split, own in splits.items()}
    for split, own in splits.items():
        counts[split] |= Counter(file.class_name for file in own if file.id not in lost)
    targets = {
        split: np.array([labels.index(mapping[file.class_name]) for file in own if file.id not in lost], np.int64)
        for split, own in splits.items()
    }
    sides = sorted(min(size) for size in sizes)
    return FolderSummary(
        folder,
        counts,
        labels,
        side=sides[len(sides) // 2],
        is_uniform=len(set(sizes)) == 1,
        source="fer2013" if all(_EVERY_FER2013_FILE.search(name) for name in names) else "folder",
        remarks=(
            *tally.describe(),
            *remarks,
            *tally.notes,
            *describe_merged(mapping, LabelsConfig()),
            *describe_unknown(mapping, Counter(file.class_name for file in files)),
            *_describe_refusal(_make_bundle(labels, targets)),
        ),
        folders=folders or {},
        label_of=mapping,
    )


def survey_data(path: Path, folders: Mapping[str, str] | None = None) -> FolderSummary:
    """Survey data of any kind that an experiment can read: a folder by `survey_folder`, a csv or .npz by loading it.

    Raises:
        DataError: it is none of these, e.g. a zip of images, or has no train split.
    """
    path = expand_home(path)
    if check_kind(path) == "folder":
        return survey_folder(path, folders)
    with open_data(path) as given:
        bundle = load_source_splits(given.config, image_size=_LARGEST)
    if bundle.train is None:
        raise DataError(_describe_no_train(path, bundle.splits))
    check_shapes(bundle, path)
    counts = {
        key: {bundle.labels[target]: count for target, count in Counter(split.targets.tolist()).items()}
        for key, split in bundle.splits.items()
    }
    reading = bundle.reading.as_record()
    return FolderSummary(
        given.csv or path,
        counts,
        bundle.labels,
        side=min(bundle.train.images.shape[1:3]),
        is_uniform=True,
        source=given.config.source,
        remarks=(*(reading.describe() if reading else ()), *bundle.notes, *given.notes, *_describe_refusal(bundle)),
    )


def _make_bundle(labels: tuple[str, ...], targets: Mapping[str, np.ndarray]) -> DataBundle:
    """Return splits with these targets (split -> int64 [N]) and images of one pixel."""
    splits = dict.fromkeys(SPLITS) | {
        split: Split(split, np.zeros((len(own), 1, 1, 1), np.uint8), own, np.arange(len(own)).astype(str))
        for split, own in targets.items()
        if len(own) or split == "train"
    }
    return DataBundle("folder", labels, **splits)


def _describe_refusal(bundle: DataBundle) -> tuple[str, ...]:
    problem = find_refusal(bundle)
    return () if problem is None else (f"dlfer run will refuse these images: {problem}",)


def _describe_no_train(path: Path, splits: Iterable[str]) -> str:
    return f"{path}: found {', '.join(splits)} and no train split, which training needs."


def check_kind(path: Path) -> Kind:
    """Return the kind of data that an experiment can read; a path that does not exist counts as a folder.

    Raises:
        DataError: the data is of another kind.
    """
    kind = recognise(path) if path.exists() else "folder"
    if kind == "experiment":
        raise DataError(f"{path}: this is already an experiment file. Check it: dlfer check {shlex.quote(str(path))}")
    if kind == "pictures":
        unzip, init = name_unzip(path)
        raise DataError(
            f"{path}: found a zip of pictures, expected a folder: a training reads them many times. Unpack it ({unzip}), then: {init}"
        )
    return kind


def name_unzip(path: Path) -> tuple[str, str]:
    """Return the commands that unpack a zip of images, and that write an experiment for them."""
    stem = shlex.quote(path.stem)
    return f"unzip {shlex.quote(str(path))} -d {stem}", f"dlfer init {stem}"


def format_starter(survey: FolderSummary, *, name: str, file: Path) -> str:
    """Return the text of a commented experiment for the surveyed data; `file` is the path it will be written to."""
    image_size = min(_LARGEST, max(48, 16 * round(survey.side / 16)))
    batch_size = 64 if survey.num_train >= 2000 else 32 if survey.num_train >= 200 else 8
    epochs = 15 if survey.num_train >= 20_000 else 25 if survey.num_train >= 2000 else 40
    balance = "sampler" if survey.imbalance >= 3 else "none"
    monitor = "macro_f1" if survey.imbalance >= 3 else "accuracy"
    found = "\n".join(f"#   {line}" for line in _format_counts(survey))
    file = escape_text(shlex.quote(str(file)))
    return f"""\
# Purpose   A first experiment on the images in {escape_text(" ".join(str(survey.folder).split()))}, written by dlfer init.
# Command   dlfer check {file}          first: reports what would stop the training; decodes no image
#           dlfer run {file} --smoke    a minute: runs every phase on a few images
#           dlfer run {file}            train and report
#           dlfer ablate {file}         the same with and without EF-FER1
# Change    finetune.epochs      more epochs train longer; the best epoch on validation is kept in any case
#           finetune.image_size  a larger size shows more detail; the time grows with its square
#           finetune.batch_size  a smaller batch takes less memory; lower finetune.optimizer.learning_rate in proportion
#           Edit them here, or set them for one run: dlfer run {file} --set finetune.epochs=3
# All keys  dlfer show schema
#
# Found
{found}
experiment:
  {format_yaml({"name": name}).rstrip()}
  seed: 0

model:
  backbone: efficientnet_lite2   # its ImageNet weights come with dlfer; others: dlfer show backbones
  dropout: 0.3

# EF-FER1: weights of ImageNet. To start from random weights: pretrain: null
pretrain:
  weights: imagenet

# EF-FER2: training on your images
finetune:
  data:
{_format_data(survey)}
  epochs: {epochs}
  batch_size: {batch_size}
  image_size: {image_size}   # pixels; half of your images have a shorter side of at most {survey.side}
  freeze: {{head_epochs: auto}}   # train only the new head first, for 2 epochs (or all but one if there are fewer than 3)
  optimizer: {{name: adamw, learning_rate: 3e-4}}
  schedule: {{name: cosine, warmup_epochs: 1}}
  loss: {{name: categorical_crossentropy, label_smoothing: 0.1}}
  augment: {{rotation: 10, zoom: 0.1, shift: 0.1, mirror: 0.5}}
  # The largest class has {survey.imbalance:.1f} times the images of the smallest.
  balance: {balance}
  monitor: {monitor}
"""


def make_name(folder: Path) -> str:
    """Return a valid experiment name derived from a folder's name."""
    name = re.sub(r"[^a-z0-9_-]+", "_", Path(folder).resolve().name.lower()).strip("_-")
    return name or "my_images"


def write_starter(
    folder: Path,
    out: Path | None = None,
    folders: Mapping[str, str] | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a starter experiment for data and return its path, `out` or else <name>.yaml.

    Args:
        folder: the data: a folder, a csv or an .npz.
        out: path of the experiment file.
        folders: as for `survey_folder`.
        force: replace an existing file.
        say: receives messages on what was found and left out.

    Raises:
        ConfigError: the file cannot be written, or exists and `force` is false.
        DataError: the data cannot be read by an experiment, see `survey_data`.
    """
    folder = expand_home(folder)
    name = make_name(folder if folder.is_dir() else folder.with_suffix(""))
    path = Path(out) if out is not None else Path(f"{name}.yaml")
    check_kind(folder)
    if VARIABLE.search(str(folder)):
        raise DataError(
            f"{folder}: $ in an experiment's path names an environment variable; rename the folder or file."
        )
    check_outputs({"--out": path}, [folder], force=force)
    survey = survey_data(folder, folders)
    for line in _format_counts(survey) if say is not None else ():
        say(line)
    text = format_starter(survey, name=name, file=path)
    parse_recorded_experiment(text, str(path))  # raises instead of writing an experiment that dlfer would refuse
    write_atomically(path, text)
    return path


def _look_at_images(folder: Path, names: list[str]) -> tuple[list[tuple[int, int]], list[str], list[str]]:
    """Decode all images, or a sample spread evenly over them.

    Returns:
        (width, height) of readable images, the names of unreadable ones, and remarks on both.

    Raises:
        DataError: no image can be read.
    """
    sample = names[:: math.ceil(len(names) / _MAX_DECODED)]
    paths = [folder / name for name in sample]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers, problems = try_each(pool, read_header, paths, skip=True)
        num_pixels = sum(header[0] * header[1] for header in headers if header is not None)
        step = max(1, math.ceil(num_pixels / _MAX_PIXELS))
        chosen = [path for path, header in zip(paths, headers, strict=True) if header is not None][::step]
        decoded, more = try_each(pool, lambda path: read_image(path).shape, chosen, skip=True)
    broken = {path for path, shape in zip(chosen, decoded, strict=True) if shape is None}
    unreadable, sizes = [], []
    for name, path, header in zip(sample, paths, headers, strict=True):
        if header is None or path in broken:
            unreadable.append(name)
        else:
            sizes.append(header[:2])
    if not sizes:
        raise DataError(f"{folder}: found no image that can be read. {[*problems, *more][0]}")
    remarks = (
        [f"Training stops at an image that cannot be read. The first: {[*problems, *more][0]}"] if unreadable else []
    )
    looked_at = len(chosen) + len(problems)
    if looked_at < len(names):
        remarks.append(
            f"Only {looked_at:,} of the {len(names):,} images were decoded, a sample; dlfer check {shlex.quote(str(folder))} decodes all."
        )
    return sizes, unreadable, remarks


def _format_counts(survey: FolderSummary) -> list[str]:
    lines = []
    for split, classes in survey.counts.items():
        listed = ", ".join(f"{name} {count:,}" for name, count in sorted(classes.items()))
        lines.append(f"{split}: {count_noun(sum(classes.values()), 'image')} ({listed})")
    lines += [f"labels: {', '.join(survey.labels)}", *survey.remarks]
    return [escape_text(" ".join(line.splitlines())) for line in lines]


def _format_data(survey: FolderSummary) -> str:
    lines = [f"source: {survey.source}", *format_yaml({"path": str(survey.folder)}).splitlines()]
    if survey.folders:
        lines += format_yaml({"folders": dict(survey.folders)}).splitlines()
    if survey.source == "fer2013":
        lines.append("protocol: official   # FER2013's own split")
    elif "validation" in survey.counts:
        lines.append("protocol: official   # your own splits")
    elif "test" in survey.counts:
        lines += ["protocol: official", "select_on: 0.1   # no validation folder: a tenth of train selects the epoch"]
    else:
        lines.append("protocol: resplit   # no folders for splits: 80/20, and again 80/20, duplicates kept on one side")
    if not survey.is_uniform:
        lines.append(f"size: {min(256, max(16, survey.side))}   # sizes differ: images become squares of this side")
    lines += [
        "labels:",
        "  aliases: {}   # e.g. {joy: Happy}; common spellings need no alias",
        "  drop: []      # classes to leave out, e.g. [contempt]",
    ]
    return "\n".join(f"    {line}" for line in lines)
