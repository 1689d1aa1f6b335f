"""Records of audit.json, the audit of a data set by `dlfer audit` or a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from dlfer.runs.metrics_record import CountedEstimate
from dlfer.runs.records import DuplicateCounts, FileRecord, ReadingRecord, Record
from dlfer.runs.text import count_noun, format_html


class Place(NamedTuple):
    """The identification of an image: its split, its id in that split, and its label."""

    split: str
    id: str
    label: str


class ListedImage(Record):
    """An image that the audit lists; `label` is its label in the data."""

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
    """An image and its distance, in [0, 1], from the subspace that the other images span."""

    distance: float


class ContestedImage(ListedImage):
    """An image on which annotators disagree.

    Attributes:
        plurality: the choice with the most votes; several if they tie.
        share: the plurality's share of the votes.
        votes: choice -> number of votes, without zeros.
    """

    plurality: list[str]
    share: CountedEstimate
    votes: dict[str, int]


class AuditedSplit(Record):
    """One split of the audited data.

    Attributes:
        classes: label -> number of images; None for a streamed split in a file of an earlier version.
        imbalance: size of the largest class divided by that of the smallest class with images.
    """

    num_images: int
    classes: dict[str, int] | None = None
    imbalance: float | None = None


class Unreadable(Record):
    """The number of rows or files that could not be read, and the first of the error messages."""

    n: int = 0
    examples: list[str] = Field(default_factory=list)


class GroupsAcrossSplits(Record):
    """The numbers of groups that span several splits: of exact duplicates, and of duplicates of any kind."""

    exact: int
    near: int


class OutlierSummary(Record):
    """The outliers of one kind, which are below `low` or above `high`; `images` lists the most extreme."""

    n: int
    median: float
    low: float
    high: float
    images: list[OutlierImage] = Field(default_factory=list)


class OutlierSummaries(Record):
    """The outliers of each kind, and the rule that defines them; `size` is None if all images have one size."""

    rule: str
    brightness: OutlierSummary | None = None
    contrast: OutlierSummary | None = None
    size: OutlierSummary | None = None


class NoFaces(Record):
    """The images that probably show no face, by a threshold of the distance; `measured` states its precision."""

    n: int
    threshold: float
    images: list[NoFaceImage] = Field(default_factory=list)
    measured: str


class VoteShares(Record):
    """How often the label is the plurality of the votes, and (`ceiling`) how often one annotator agrees with others."""

    agreement: CountedEstimate
    ceiling: CountedEstimate


class VoteSummary(VoteShares):
    """The agreement of annotators' votes with the labels.

    Attributes:
        file: the name of the file of votes.
        definition: definition of the plurality and the ceiling, in words.
        n: number of images that have votes.
        splits: split -> its shares.
        labels: label -> agreement on its images.
        contested: the images whose plurality has the smallest share, at most 100.
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
    """The contents of audit.json.

    Streamed images are counted but not analysed: if there are no others, all fields from `distinct_images` are unset.

    Attributes:
        source: the audited file or folder; for `dlfer audit` only.
        notes: what was done to the images when they were loaded; for `dlfer audit` only.
        labels: names of the targets.
        splits: name -> its counts.
        reading: numbers of files or rows seen, used and left out; None if the source does not count them.
        distinct_images: number of images after the removal of exact duplicates.
        duplicate_groups: distinct images that occur more than once; conflicting_groups: with more than one label.
        near_groups, near_conflicting_groups: the same for groups formed by chains of duplicates of any kind.
        largest_group: number of images in the largest of these groups.
        constant_images: distinct images with all pixels equal.
        near_constant_images: distinct images with a standard deviation below 5 grey levels, including constant ones.
        flat: the near-constant images, at most 100.
        leaks: "Training->PublicTest" -> numbers of images of the second split with a duplicate in the first.
        probably_no_face: None if the labels are not expressions, or for fewer than 500 images.
        votes: None without a file of votes.
        fingerprint: sha256 over everything that the audit depends on; for a run only.
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
        """Yield the number of images, the labels, and the numbers of distinct, duplicate and near-constant images."""
        yield "num_images", self.num_images
        yield "labels", self.labels
        yield "distinct_images", self.distinct_images
        yield "duplicate_groups", self.duplicate_groups
        yield "near_groups", self.near_groups
        yield "conflicting_groups", self.conflicting_groups
        yield "near_constant_images", self.near_constant_images

    def _repr_html_(self) -> str:
        """Return a table of the findings for a notebook; findings that streamed images do not give are None ("–")."""
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
        """Whether all images were streamed, so that none was analysed."""
        return self.distinct_images is None

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file from before dlfer 0.2 with current key names.

        Exact copies then included augmented ones; if there are any, the number of truly exact copies is unknown.
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
