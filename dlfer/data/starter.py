"""A first experiment for somebody's own class folders: what is there is counted, and written into the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dlfer.config.load import load_experiment
from dlfer.config.sections import LabelsConfig
from dlfer.config.strict_yaml import format_yaml
from dlfer.data.fer2013_csv import USAGES
from dlfer.data.files import Tally
from dlfer.data.images import read_header
from dlfer.data.labels import describe_merged, describe_unknown, match_labels, order_labels
from dlfer.data.layout import Parts, scan_folder
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.files import write_atomically
from dlfer.runs.outputs import check_outputs

_MAX_HEADERS = 300
_EVERY_FER2013_FILE = re.compile(rf"(?:{'|'.join(USAGES)})_\d+\.\w+$")


@dataclass(frozen=True)
class Survey:
    """What stands in a folder of images.

    Attributes:
        folder: its path.
        counts: part -> class -> number of images.
        labels: the names that dlfer gives the classes, in its order.
        side: the median shorter side, in pixels, of a sample.
        is_uniform: whether all images of the sample have one size.
        is_fer2013: whether the file names carry FER2013's official split.
        remarks: what was left out and how names were understood, in sentences.
        folders: what the user said folders are.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    labels: tuple[str, ...]
    side: int
    is_uniform: bool
    is_fer2013: bool
    remarks: tuple[str, ...] = ()
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_train(self) -> int:
        """Images of the part `train`."""
        return sum(self.counts["train"].values())

    @property
    def imbalance(self) -> float:
        """How many times the largest class of `train` is the smallest."""
        return max(self.counts["train"].values()) / max(1, min(self.counts["train"].values()))


def survey_folder(folder: Path, folders: Mapping[str, str] | None = None) -> Survey:
    """Look at a folder of class folders without decoding an image.

    Args:
        folder: its path.
        folders: as `data.folders`: what a folder in it is whose name does not tell.

    Raises:
        MissingDataError: there is no such folder.
        DataError: it holds no class folders, one class only, or no image that can be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: there is no such folder; expected one with <class>/<image> in it.")
    tally = Tally(folder)
    parts = scan_folder(folder, folders, tally)
    counts = {part: dict(Counter(file.class_name for file in files)) for part, files in parts.items()}
    mapping = match_labels((name for classes in counts.values() for name in classes), LabelsConfig())
    labels = order_labels(label for label in mapping.values() if label is not None)
    if len(labels) < 2:
        raise DataError(f"{folder}: found the one class {', '.join(labels)}, expected at least two class folders.")
    shapes = _sample_shapes(folder, parts)
    sides = sorted(min(shape) for shape in shapes)
    names = [file.id for files in parts.values() for file in files]
    return Survey(
        folder,
        counts,
        labels,
        side=sides[len(sides) // 2],
        is_uniform=len(set(shapes)) == 1,
        is_fer2013=all(_EVERY_FER2013_FILE.search(name) for name in names),
        remarks=(
            *tally.describe(),
            *tally.notes,
            *describe_merged(mapping, LabelsConfig()),
            *describe_unknown(mapping, Counter(file.class_name for files in parts.values() for file in files)),
        ),
        folders=folders or {},
    )


def format_starter(survey: Survey, *, name: str, file: Path) -> str:
    """Return the text of a commented experiment for what was found; `file` is where it will stand."""
    image_size = min(224, max(48, 16 * round(survey.side / 16)))
    batch_size = 64 if survey.num_train >= 2000 else 32 if survey.num_train >= 200 else 8
    epochs = 15 if survey.num_train >= 20_000 else 25 if survey.num_train >= 2000 else 40
    balance = "sampler" if survey.imbalance >= 3 else "none"
    monitor = "macro_f1" if survey.imbalance >= 3 else "accuracy"
    found = "\n".join(f"#   {line}" for line in _format_counts(survey))
    return f"""\
# Purpose   A first experiment on the images in {" ".join(str(survey.folder).split())}, written by dlfer init.
# Command   dlfer run {file} --smoke    first, a minute: walks every step on a few images
#           dlfer run {file}            train and report
#           dlfer ablate {file}         the same with and without EF-FER1
# All keys  dlfer show schema
#
# Found
{found}
experiment:
  name: {name}
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
  freeze: {{head_epochs: 2}}   # the new head alone first
  optimizer: {{name: adamw, learning_rate: 3e-4}}
  schedule: {{name: cosine, warmup_epochs: 1}}
  loss: {{name: categorical_crossentropy, label_smoothing: 0.1}}
  augment: {{rotation: 10, zoom: 0.1, shift: 0.1, mirror: 0.5}}
  # The largest class has {survey.imbalance:.1f} times the images of the smallest.
  balance: {balance}
  monitor: {monitor}
"""


def make_name(folder: Path) -> str:
    """Return an experiment's name made from the name of a folder."""
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
    """Write a starter experiment for `folder` and return its path, <name>.yaml unless `out` says otherwise.

    `folders` is as of `survey_folder`; `say` is told what was found and what was left out.

    Raises:
        ConfigError: the file cannot be written, or is there already and not to be replaced by `force`.
        DataError: the folder does not hold class folders.
    """
    name = make_name(folder)
    path = Path(out) if out is not None else Path(f"{name}.yaml")
    check_outputs({"--out": path}, [folder], force=force)
    survey = survey_folder(folder, folders)
    for line in _format_counts(survey) if say is not None else ():
        say(line)
    write_atomically(path, format_starter(survey, name=name, file=path))
    load_experiment(path)
    return path


def _sample_shapes(folder: Path, parts: Parts) -> list[tuple[int, int]]:
    """Return (width, height) of at most 300 images, evenly over all; those that cannot be read are passed over."""
    files = [file for part in parts.values() for file in part]
    shapes = []
    error: DataError | None = None
    for file in files[:: max(1, len(files) // _MAX_HEADERS)]:
        try:
            shapes.append(read_header(folder / file.id)[:2])
        except DataError as problem:
            error = problem
    if not shapes:
        raise DataError(f"{folder}: found no image that can be read. {error or ''}".rstrip())
    return shapes


def _format_counts(survey: Survey) -> list[str]:
    lines = []
    for part, classes in survey.counts.items():
        listed = ", ".join(f"{name} {count:,}" for name, count in sorted(classes.items()))
        lines.append(f"{part}: {sum(classes.values()):,} images ({listed})")
    lines += [f"labels: {', '.join(survey.labels)}", *survey.remarks]
    return [" ".join(line.splitlines()) for line in lines]


def _format_data(survey: Survey) -> str:
    path = format_yaml({"path": str(survey.folder)}).rstrip("\n")
    lines = [f"source: {'fer2013' if survey.is_fer2013 else 'folder'}", path]
    if survey.folders:
        lines += format_yaml({"folders": dict(survey.folders)}).splitlines()
    if survey.is_fer2013:
        lines.append("protocol: official   # the file names carry FER2013's own split")
    elif "validation" in survey.counts:
        lines.append("protocol: official   # your own parts")
    elif "test" in survey.counts:
        lines += ["protocol: official", "select_on: 0.1   # no validation folder: a tenth of train selects the epoch"]
    else:
        lines.append("protocol: resplit   # no parts: 80/20, and again 80/20, duplicates kept on one side")
    if not survey.is_uniform:
        lines.append(f"size: {min(256, max(16, survey.side))}   # sizes differ: images become squares of this side")
    lines += [
        "labels:",
        "  aliases: {}   # e.g. {joy: Happy}; common spellings are known without",
        "  drop: []      # classes to leave out, e.g. [contempt]",
    ]
    return "\n".join(f"    {line}" for line in lines)
