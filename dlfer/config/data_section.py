"""The section `data` of an experiment file: where images come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dlfer.config import names
from dlfer.config.section import Count, Fraction, OpenFraction, Section, Seed


class LabelsConfig(Section):
    """How the label names of the data become those of the model."""

    aliases: dict[str, str] = {}
    """Name in the data -> name to use, e.g. {happiness: Happy}. Common spellings are known without."""
    drop: tuple[str, ...] = ()
    """Classes (names in the data, or after aliases) whose images are left out."""


class NumImages(Section):
    """How many images of a part to use: a stratified draw; null takes all. Synthetic sources draw so many."""

    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None


class FacesConfig(Section):
    """What is done to each image before anything else: its face found, turned upright by the eyes, evened out."""

    detect: Literal[names.DETECTORS] = "none"
    """none: the image is the face. mtcnn, opencv: the largest face is cut out; without one the image stays."""
    align: bool = False
    """Turn and scale the face so that the eyes stand at fixed places; mtcnn only, which finds them."""
    equalize: Literal[names.EQUALIZERS] = "none"
    """histogram: equalised over the whole image. clahe: in tiles, with limited contrast."""

    @model_validator(mode="after")
    def _check(self) -> FacesConfig:
        if self.detect == "none" and self.equalize == "none":
            raise ValueError("faces: found nothing to do; set detect or equalize, or faces: null.")
        if self.align and self.detect != "mtcnn":
            raise ValueError(f"align: found true with detect: {self.detect}; only mtcnn finds the eyes.")
        return self


class DataConfig(Section):
    """Where images come from and how they are split."""

    source: Literal[names.SOURCES]
    path: str | None = None
    """File or folder; ${DLFER_DATA} (default ./data) and other variables are filled in."""
    name: str | None = None
    """tfds only: the data set, e.g. imagenet2012."""
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    """tfds only: the data set's own names of the splits, e.g. {train: train, validation: validation}."""
    protocol: Literal[names.PROTOCOLS] = "official"
    """official: the data's own splits. resplit: 80/20 and 80/20, duplicates on one side. paper: see split."""
    split: Literal[names.PAPER_SPLITS] | None = None
    """paper only: after_balance pools, balances, then splits; official_80_20 keeps the official test."""
    select_on: OpenFraction | None = None
    """Select the model on this fraction of train (groups of duplicates kept together) instead of validation."""
    labels: LabelsConfig = LabelsConfig()
    num_images: NumImages = NumImages()
    fraction: OpenFraction | None = None
    """Use this fraction of all images, a stratified draw of whole groups of duplicates, made before the protocol."""
    votes: str | None = None
    """File of FER+ votes, for the audit and for soft_targets: fer2013new.csv as published, or a csv of votes; a row per row of the data."""
    soft_targets: Literal[names.SOFT_TARGETS] | None = None
    """ferplus: train towards the shares of the file `votes` among the labels, which are labels beyond the data's own."""
    soft_share: Fraction = 1.0
    """soft_targets: the part of a target that the votes make; the label makes the rest."""
    drop_duplicates: bool = False
    """Leave out of train what a chain of duplicates (exact, near, flipped) connects to validation or test; those stay."""
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Pixels: images are stored as squares of this side, see `aspect`. null: native size if all are the same."""
    aspect: Literal[names.ASPECTS] = "crop"
    """Networks see squares. crop: the largest centred square of an image that is not one. pad: the whole image, in
    the centre of a square whose rest repeats the image's outermost pixels. The trained model remembers which."""
    faces: FacesConfig | None = None
    """Faces found, aligned, evened out; kept in $DLFER_CACHE (~/.cache/dlfer) for the very same images."""
    skip_unreadable: bool = False
    """Leave out and count rows and files that cannot be read, instead of refusing the data."""
    seed: Seed = 0
    """Seed of drawn splits and synthetic images; apart from experiment.seed, so that seeds share the data."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        synthetic = self.source.startswith("synthetic")
        needs_path = self.source in ("fer2013", "folder", "arrays")
        if needs_path and self.path is None:
            raise ValueError(f"path: source {self.source} needs one, e.g. path: ${{DLFER_DATA}}/{self.source}.")
        if synthetic and self.path is not None:
            raise ValueError(f"path: source {self.source} draws its images and takes none; set path: null.")
        if self.source == "tfds" and self.name is None:
            raise ValueError("name: source tfds needs the name of a data set, e.g. name: imagenet2012.")
        if self.source != "tfds" and (self.name is not None or self.splits is not None):
            raise ValueError(f"name, splits: only source tfds takes them, found with source {self.source}.")
        if self.soft_targets is not None and self.votes is None:
            raise ValueError("soft_targets: found ferplus without a file of votes; set votes: PATH of fer2013new.csv.")
        if self.soft_share != 1.0 and self.soft_targets is None:
            raise ValueError("soft_share: belongs to soft_targets, which is null; set soft_targets: ferplus.")
        if self.source == "tfds" and (self.soft_targets is not None or self.drop_duplicates):
            raise ValueError(
                "soft_targets, drop_duplicates: found with source tfds, whose images are streamed; leave them out."
            )
        if self.split == "after_balance" and self.drop_duplicates:
            raise ValueError(
                "drop_duplicates: found true with split: after_balance, which puts duplicates on both sides on purpose; "
                "take another split."
            )
        if self.protocol == "paper" and self.split is None:
            raise ValueError(f"split: protocol paper needs one of {', '.join(names.PAPER_SPLITS)}.")
        if self.protocol == "paper" and self.select_on is not None:
            raise ValueError("select_on: protocol paper selects on a fifth of training; set it to null.")
        if self.protocol != "paper" and self.split == "after_balance":
            raise ValueError(
                f"split: found after_balance under protocol {self.protocol}. Balancing or augmenting before the split "
                "puts copies of one image into training and into test, so that the figure measures memory. Set split: "
                "null (train alone is balanced, after the split), or protocol: paper, whose every output says so."
            )
        if self.protocol != "paper" and self.split is not None:
            raise ValueError(f"split: found {self.split} under protocol {self.protocol}; it belongs to protocol paper.")
        return self
