"""Records of a run's training (log, history, transferred weights, trees, network) and of the evaluations of its model.

metrics.json is written once, at the end of a run. `dlfer evaluate` adds later metrics to extra_metrics.json, and each
opening of a split for evaluation is logged in log.jsonl; `read_metrics` merges the three.
"""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from dlfer.errors import ModelError
from dlfer.runs.files import read_rows
from dlfer.runs.metrics_record import Corruptions, Groups, Metrics, ViewMetrics
from dlfer.runs.records import ArtifactRecord, BranchWeights, DataRecord, FileRecord, Record, WeightsOrigin
from dlfer.runs.run import LOG_FILE, Run


class Event(Record):
    """One line of log.jsonl.

    Attributes:
        event: what happened, e.g. "finetune_end" or "test_opened".
        time: UTC, ISO 8601.
        text: for "plan", a line of the plan.
        epochs, kept_epoch: for the end of a stage; epochs are counted from 1.
        split: for "test_opened", the name of the split in the source.
        fingerprint: for "test_opened", that of a split that is not from the run's own data.
    """

    event: str
    time: str | None = None
    text: str | None = None
    epochs: int | None = None
    kept_epoch: int | None = None
    split: str | None = None
    fingerprint: str | None = None


def read_events(folder: Path | str) -> list[Event]:
    """Return the events of a run's log; [] if there is no log.

    Lines that cannot be parsed, such as a partial one left by a killed process, are skipped.
    """
    path = Path(folder) / LOG_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: the log cannot be read: {error}.") from error
    events = []
    for line in lines:
        try:
            events.append(Event.model_validate_json(line))
        except ValueError:
            continue
    return events


class Epoch(Record):
    """One row of history.csv; a value is None if its cell is empty or not finite.

    Attributes:
        epoch: counted from 1.
        phase: which layers were trained, e.g. "head" or "all".
        train_accuracy, validation_accuracy, validation_macro_f1: in 0..1.
        learning_rate: at the end of the epoch.
    """

    epoch: int
    phase: str | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_macro_f1: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None


def read_history(path: Path | str) -> list[Epoch]:
    """Return the epochs of a stage from its history.csv; [] if there is no such file.

    Raises:
        ModelError: a cell is not a number.
    """
    rows = read_rows(Path(path))
    try:
        return [Epoch.model_validate({name: _read_cell(name, text) for name, text in row.items()}) for row in rows]
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: expected a number in each cell: {error}.") from error


def _read_cell(name: str, text: str | None) -> str | int | float | None:
    if name == "phase" or not text:
        return text or None
    number = float(text)
    if name == "epoch":
        return int(number)
    return number if math.isfinite(number) else None


class TransferLists(Record):
    """The outcome for each variable of loading weights into a network or one of its branches.

    Attributes:
        loaded: paths of the variables with the values of the source.
        newly_initialised: paths of the newly initialised variables: the head, and the layers that fuse branches.
        missing: paths that the network has and the file lacks; always empty, since loading would have raised an error.
        unexpected: paths that the file has and the network lacks; likewise.
        feature_difference: the largest difference between the features of both stages on the same images, relative to
            the largest feature; None if the source recorded no features.
        source: description of the source of the weights.
        origins: origins of the published weights among them, where known.
        left_out: paths of the source's variables beyond the feature level at which the backbone ends
            (`model.feature_level`).
    """

    loaded: list[str] = Field(default_factory=list)
    newly_initialised: list[str] = Field(default_factory=list)
    missing: list[str] = Field(default_factory=list)
    unexpected: list[str] = Field(default_factory=list)
    feature_difference: float | None = None
    source: str | None = None
    origins: list[WeightsOrigin] = Field(default_factory=list)
    left_out: list[str] = Field(default_factory=list)


class TransferRecord(TransferLists, FileRecord):
    """The contents of transfer.json: the outcome for each variable of loading EF-FER1's backbone into EF-FER2.

    Attributes:
        branches: branch -> the same lists, for a hybrid whose branches have their own weights.
    """

    FILE: ClassVar[str] = "transfer.json"

    branches: dict[str, TransferLists] = Field(default_factory=dict)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names."""
        names = {"carried": "loaded", "fresh": "newly_initialised"}
        return {names.get(key, key): value for key, value in values.items()}

    def describe(self) -> list[str]:
        """Return lines for the terminal: all weights, then those of each branch with their source."""
        lines = [f"weights: {_describe_lists(self)}"]
        return lines + [f"{name}: {lists.source}: {_describe_lists(lists)}" for name, lists in self.branches.items()]

    def summarize_branches(self) -> dict[str, BranchWeights]:
        """Return the summary of each branch's weights for run.json."""
        return {
            name: BranchWeights(
                source=lists.source,
                loaded=len(lists.loaded),
                newly_initialised=len(lists.newly_initialised),
                missing=len(lists.missing),
                unexpected=len(lists.unexpected),
                feature_difference=lists.feature_difference,
            )
            for name, lists in self.branches.items()
        }


def _describe_lists(lists: TransferLists) -> str:
    difference = "" if lists.feature_difference is None else f"; features differ by {lists.feature_difference:.1e}"
    new = f" ({', '.join(lists.newly_initialised)})" if lists.newly_initialised else ""
    cut = ""
    if lists.left_out:
        layers = dict.fromkeys(path.rpartition("/")[0] for path in lists.left_out)
        cut = f"; {len(lists.left_out)} left out by model.feature_level (layers {', '.join(layers)})"
    return (
        f"{len(lists.loaded)} loaded, {len(lists.newly_initialised)} newly initialised{new}, "
        f"{len(lists.missing)} missing, {len(lists.unexpected)} unexpected{difference}{cut}"
    )


class BoostedLevel(Record):
    """The use of one feature level of the backbone by the trees of a boosted model.

    Attributes:
        features: number of features.
        used: number of features that at least one split uses.
        splits: number of splits on these features.
        gain: their share of the total gain of all splits, in 0..1.
    """

    name: str
    features: int
    used: int
    splits: int
    gain: float | None = None


class Normalization(Record):
    """The section `boosting.normalize` of a run's experiment, which defines "weight-normalised"."""

    rows: bool
    features: str
    leaves: bool


class BoostingRecord(FileRecord):
    """The contents of boosting.json: the trees of a boosted model.

    Attributes:
        rounds: number of rounds that were kept; a round is one tree per class.
        rounds_an_epoch: number of rounds in an epoch.
        trees: number of trees that were kept.
        levels: feature levels, in the order from the input to the output.
        row_weights: label -> weight of each of its training images; None if they are unweighted.
        features_seconds, trees_seconds: wall time.
        features_were_cached: whether the features were read from the cache.
    """

    FILE: ClassVar[str] = "boosting.json"

    rounds: int
    rounds_an_epoch: int
    trees: int
    levels: list[BoostedLevel] = Field(default_factory=list)
    normalize: Normalization | None = None
    row_weights: dict[str, float] | None = None
    features_seconds: float | None = None
    features_were_cached: bool = False
    trees_seconds: float | None = None

    @property
    def num_features(self) -> int:
        """The number of features of all levels."""
        return sum(level.features for level in self.levels)


class ExtraMetrics(FileRecord):
    """The contents of extra_metrics.json: evaluations on a run's own images after the run had ended."""

    FILE: ClassVar[str] = "extra_metrics.json"

    views: dict[str, dict[str, ViewMetrics]] = Field(default_factory=dict)
    groups: Groups | None = None
    corruptions: Corruptions | None = None


def read_metrics(folder: Path | str) -> Metrics | None:
    """Return the metrics of a run or a shipped model, with those added later; None if there are none.

    `test_opened` is the current number of openings if the folder has a log, else the number when the file was written.

    Raises:
        ModelError: a file is damaged.
    """
    folder = Path(folder)
    metrics, extra = Metrics.read(folder), ExtraMetrics.read(folder)
    if metrics is None:
        return None
    changed: dict[str, object] = {}
    if extra is not None:
        changed = _merge(metrics, extra)
    if (folder / LOG_FILE).is_file() and metrics.test_opened is not None:
        changed["test_opened"] = max(metrics.test_opened, count_openings(folder))
    return metrics.model_copy(update=changed)


def require_metrics(folder: Path | str) -> Metrics:
    """Return the metrics of a run, with those added later.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    return read_metrics(folder) or Metrics.require(folder)


def add_metrics(run: Run, found: ExtraMetrics) -> None:
    """Add metrics to a run; they replace earlier ones of the same view and split, groups or corruptions."""
    ExtraMetrics(**_merge(ExtraMetrics.read(run.path) or ExtraMetrics(), found)).write(run.path)


def _merge(old: Metrics | ExtraMetrics, new: ExtraMetrics) -> dict[str, Any]:
    """Return the merged views, groups and corruptions; those of `new` take precedence."""
    views = {**old.views}
    for view, splits in new.views.items():
        views[view] = {**views.get(view, {}), **splits}
    return {"views": views, "groups": new.groups or old.groups, "corruptions": new.corruptions or old.corruptions}


def log_opening(
    run: Run, split: str, num_images: int, *, fingerprint: str | None = None, milestone: int | None = None
) -> int:
    """Log that a split was opened to evaluate the run's model, and return the resulting `count_openings`.

    Args:
        split: its name in the source, e.g. "PrivateTest".
        num_images: number of images in the split.
        fingerprint: fingerprint of a split that is not from the run's own data.
        milestone: the epoch whose weights are evaluated, if they are not those of the run's final model.
    """
    if milestone is None:
        sha256 = ArtifactRecord.require(run.path / "model").sha256
        other = {} if fingerprint is None else {"fingerprint": fingerprint}
        run.log("test_opened", split=split, n=num_images, model=next(iter(sha256.values())), **other)
    else:
        run.log("test_opened", split=split, n=num_images, milestone=milestone)
    return count_openings(run.path, fingerprint)


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def ignore_read_only(run: Run, consequence: str, say: Callable[[str], None] | None) -> Iterator[None]:
    """Suppress the error of writing to a read-only run inside the block, and pass the consequence to `say`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        if say is not None:
            say(f"{run.path} cannot be written ({error.strerror}): {consequence}.")


def count_openings(folder: Path | str, fingerprint: str | None = None) -> int:
    """Return how often a run's model was evaluated on its test split, or on the split of other data by its fingerprint.

    Other data with the same images count as the test split. For a run without data.json, all openings count.
    """
    events = [event for event in read_events(folder) if event.event == "test_opened"]
    splits = (DataRecord.read(folder) or DataRecord()).splits
    test = splits.get("test")
    if fingerprint is not None and (test is None or fingerprint != test.fingerprint):
        return sum(event.fingerprint == fingerprint for event in events)
    if not splits:
        return len(events)
    if test is None:  # the run did not open it, e.g. as a search's trial
        seen = {split.name for split in splits.values()}
        return sum(event.fingerprint is None and event.split not in seen for event in events)
    # Earlier versions logged no fingerprint of other data: any split with the test split's name counts as that split.
    return sum(
        event.split in (None, test.name) if event.fingerprint is None else event.fingerprint == test.fingerprint
        for event in events
    )


class Block(Record):
    """A part of a network: the layers of one feature level, the layers that fuse branches, or the head.

    Attributes:
        name: e.g. "feature level 3", "fusion" or "head".
        branch: the branch of a hybrid; "" for other families.
        layer: name of its last layer.
        shape: output shape of that layer for one image, e.g. [12, 12, 48].
        layers: number of layers.
        parameters: number of values in its weights.
        statistics: number of these that are moving statistics of BatchNorm.
        trained: number of these that fine-tuning trains; all but the statistics if nothing is frozen.
    """

    name: str
    branch: str = ""
    layer: str
    shape: list[int]
    layers: int
    parameters: int
    statistics: int = 0
    trained: int


class NetworkRecord(FileRecord):
    """The contents of network.json: the parts of a run's network, from the input to the output.

    Attributes:
        image_size: side in pixels of the square image that it receives.
        channels: number of channels of the input images, 1 or 3.
        blocks: from the input to the output; for a hybrid, branch after branch.
    """

    FILE: ClassVar[str] = "network.json"

    image_size: int
    channels: int
    blocks: list[Block] = Field(default_factory=list)

    @property
    def parameters(self) -> int:
        """The number of values in all weights."""
        return sum(block.parameters for block in self.blocks)

    @property
    def trained(self) -> int:
        """The number of values that training changes by gradients."""
        return sum(block.trained for block in self.blocks)
