"""audit.json: what a data set hides, as `dlfer audit` and every run find it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.records import DuplicateCounts, FileRecord, ReadingRecord, Record
from dlfer.runs.text import count_noun, format_html


class Place(NamedTuple):
    """What names an image: its split, its id there, and its label."""

    split: str
    id: str
    label: str


class ListedImage(Record):
    """An image that the audit names; `label` is the one that the data gives it."""

    split: str
    id: str
    label: str = ""


class FlatImage(ListedImage):
    """An image of nearly one colour; `std` is the standard deviation of its pixels in grey levels."""

    std: float


class OutlierImage(ListedImage):
    """An image with an unusual value, in grey levels or pixels."""

    value: float


class NoFaceImage(ListedImage):
    """An image and its distance from the space that the other images span, in [0, 1]."""

    distance: float


class ContestedImage(ListedImage):
    """An image on which annotators disagree.

    Attributes:
        plurality: what most votes say; several where they tie.
        share: of the plurality among the votes.
        votes: what was voted for -> number of votes, without zeros.
    """

    plurality: list[str]
    share: CountedEstimate
    votes: dict[str, int]


class AuditedSplit(Record):
    """One split of the audited data.

    Attributes:
        classes: label -> number of images; None for a streamed split.
        imbalance: the largest class over the smallest that has images.
    """

    num_images: int
    classes: dict[str, int] | None = None
    imbalance: float | None = None


class Unreadable(Record):
    """How many rows or files could not be read, and what was wrong with the first."""

    n: int = 0
    examples: list[str] = Field(default_factory=list)


class GroupsAcrossSplits(Record):
    """Numbers of groups with images in several splits: of exact duplicates, and of duplicates of any kind."""

    exact: int
    near: int


class OutlierSummary(Record):
    """Outliers of one kind: all beyond `low` and `high`; `images` lists the furthest."""

    n: int
    median: float
    low: float
    high: float
    images: list[OutlierImage] = Field(default_factory=list)


class OutlierSummaries(Record):
    """Outliers of each kind, and the rule that defines them; sizes are None where all images have one size."""

    rule: str
    brightness: OutlierSummary | None = None
    contrast: OutlierSummary | None = None
    size: OutlierSummary | None = None


class NoFaces(Record):
    """Images that are probably no face: those beyond a distance; `measured` says how often that is right."""

    n: int
    threshold: float
    images: list[NoFaceImage] = Field(default_factory=list)
    measured: str


class VoteShares(Record):
    """How often the label is the plurality of the votes, and how often one annotator agrees with the others."""

    agreement: CountedEstimate
    ceiling: CountedEstimate


class VoteSummary(VoteShares):
    """How far votes of annotators confirm the labels.

    Attributes:
        file: the name of the file of votes.
        definition: of the plurality and the ceiling, in words.
        n: number of images that have votes.
        splits: split -> its shares.
        labels: label -> agreement of its images.
        contested: the images whose plurality is smallest, at most 100.
    """

    file: str
    definition: str
    n: int
    splits: dict[str, VoteShares]
    labels: dict[str, CountedEstimate]
    contested: list[ContestedImage] = Field(default_factory=list)


class Samples(Record):
    """Some pairs of duplicates of each kind, and some groups of exact copies with different labels."""

    exact: list[list[ListedImage]] = Field(default_factory=list)
    near: list[list[ListedImage]] = Field(default_factory=list)
    flipped: list[list[ListedImage]] = Field(default_factory=list)
    conflicting: list[list[ListedImage]] = Field(default_factory=list)

    def iterate_groups(self) -> Iterator[list[ListedImage]]:
        """Yield all pairs and groups."""
        for groups in (self.exact, self.near, self.flipped, self.conflicting):
            yield from groups


class AuditRecord(FileRecord):
    """audit.json.

    Streamed images are counted and not looked into: then `distinct_images` and all that follows it is None or empty.

    Attributes:
        source: the audited file or folder, and
        notes: what was done to the images when they were loaded; both of `dlfer audit` only.
        labels: names of the targets.
        splits: name -> its counts.
        reading: how many files or rows were seen, used and left out; None where the source counts nothing.
        distinct_images: images that differ in at least one byte.
        duplicate_groups: images that occur more than once; conflicting_groups: those under more than one label.
        near_groups, near_conflicting_groups: the same of the groups that chains of duplicates of any kind make.
        largest_group: images in the largest of these.
        constant_images: images with all pixels equal.
        near_constant_images: images with a standard deviation below 5 grey levels, constant ones included.
        flat: which ones these are, at most 100.
        leaks: "Training->PublicTest" -> images of the right split that have a duplicate in the left one.
        probably_no_face: None where the labels are no expressions, or for fewer than 500 images.
        votes: None without a file of votes.
        fingerprint: sha256 over all that the audit depends on; of a run only.
    """

    FILE: ClassVar[str] = "audit.json"
    ADVICE: ClassVar[str] = "Audit the data again."

    source: str | None = None
    notes: list[str] = Field(default_factory=list)
    num_images: int
    labels: list[str]
    splits: dict[str, AuditedSplit]
    unreadable: Unreadable = Field(default_factory=Unreadable)
    reading: ReadingRecord | None = None
    distinct_images: int | None = None
    duplicate_groups: int = 0
    conflicting_groups: int = 0
    near_groups: int | None = None
    near_conflicting_groups: int | None = None
    largest_group: int | None = None
    groups_across_splits: GroupsAcrossSplits | None = None
    constant_images: int = 0
    near_constant_images: int | None = None
    flat: list[FlatImage] = Field(default_factory=list)
    leaks: dict[str, DuplicateCounts] = Field(default_factory=dict)
    outliers: OutlierSummaries | None = None
    probably_no_face: NoFaces | None = None
    votes: VoteSummary | None = None
    samples: Samples = Field(default_factory=Samples)
    fingerprint: str | None = None

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the numbers of images, and of the groups of duplicates."""
        yield "num_images", self.num_images
        yield "labels", self.labels
        yield "distinct_images", self.distinct_images
        yield "duplicate_groups", self.duplicate_groups
        yield "near_groups", self.near_groups
        yield "conflicting_groups", self.conflicting_groups
        yield "near_constant_images", self.near_constant_images

    def _repr_html_(self) -> str:
        """Return what was found, for a notebook; None is shown where images were streamed."""
        rows = [
            ("images", self.num_images),
            ("labels", len(self.labels)),
            ("distinct images", self.distinct_images),
            ("groups of exact duplicates", self.duplicate_groups),
            ("of these with different labels", self.conflicting_groups),
            ("groups of duplicates of any kind", self.near_groups),
            ("of these with different labels", self.near_conflicting_groups),
            ("images of one grey level", self.constant_images),
            ("images of nearly one grey level", self.near_constant_images),
            ("unreadable", self.unreadable.n),
            *((f"images of {pair} with a duplicate", leak.any) for pair, leak in self.leaks.items()),
        ]
        splits = (f"{name}: {_describe_classes(split)}" for name, split in self.splits.items())
        return format_html("Audit", rows, notes=[*splits, *self.notes])

    @property
    def is_streamed(self) -> bool:
        """Whether no image was looked into."""
        return self.distinct_images is None

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with the present names of its keys.

        The exact copies of that time included augmented ones: where there are some, the number of the others is not known.
        """
        upgraded = dict(values)
        if isinstance(values.get("leaks"), dict):
            upgraded["leaks"] = {pair: _upgrade_leak(leak) for pair, leak in values["leaks"].items()}
        samples = values.get("samples")
        if isinstance(samples, dict) and "mirrored" in samples:
            upgraded["samples"] = {"flipped" if kind == "mirrored" else kind: found for kind, found in samples.items()}
        return upgraded


def _describe_classes(split: AuditedSplit) -> str:
    counts = "" if split.classes is None else ", ".join(f"{label} {n:,}" for label, n in split.classes.items())
    return f"{count_noun(split.num_images, 'image')}{f' ({counts})' if counts else ''}"


def _upgrade_leak(leak: Any) -> Any:
    if not isinstance(leak, Mapping) or "near_or_mirrored" not in leak:
        return leak
    augmented = leak.get("from_source", 0)
    return {"exact": None if augmented else leak.get("exact"), "augmented": augmented, "any": leak["near_or_mirrored"]}
