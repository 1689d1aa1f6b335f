"""The sections `data`, `model`, `boosting` and `ensemble` of an experiment, and the base class of all sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from dlfer.config import names


class Section(BaseModel):
    """The base class of all sections: unknown keys are errors, values are frozen, and types are not converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
        defer_build=True,
    )


def get_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their keys in a file; an alias replaces a key that is a Python keyword."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class NormalizeConfig(Section):
    """The possible meanings of the paper's "weight-normalised", each as a key of its own."""

    rows: bool = True
    """Weights the training images by class, so that all classes count equally; the mean weight is 1."""
    features: Literal["none", "standard", "l2"] = "standard"
    """standard: each feature minus its mean, divided by its standard deviation on train (trees use only the order of
    values, so this changes almost nothing). l2: each level of each image is scaled to length 1 (ParseNet)."""
    leaves: bool = False
    """Limits leaves, before the learning rate, to -1..1 (XGBoost's max_delta_step: 1)."""


class BoostingConfig(Section):
    """How the trees are trained (family boosted).

    An epoch of `finetune` is `rounds_per_epoch` rounds. Of that section, epochs, monitor, keep, early_stopping,
    batch_size, image_size, crop and balance apply; the keys for gradients and augmentation do not.
    """

    rounds_per_epoch: Count = 10
    """Rounds per epoch; a round is one tree per class. Each epoch ends with a validation and a checkpoint."""
    levels: Literal["all", "last"] = "all"
    """all: features of every feature level of the backbone; last: of its output only."""
    normalize: NormalizeConfig = NormalizeConfig()
    learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.1
    """Factor of each new tree. XGBoost's leaf is half of -S/V (reg_lambda 0), because it uses 2 p (1-p) as the second
    derivative: 1 adds half of the Newton step -S/V of each class, and 2 adds all of it."""
    max_depth: Count = 6
    min_child_weight: Annotated[float, Field(ge=0)] = 1.0
    """Minimum sum of second derivatives on each side of a split."""
    reg_lambda: Annotated[float, Field(ge=0)] = 1.0
    """L2 regularisation: added to the sum of second derivatives in split gain and leaf weight."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Minimum gain of a split, as computed by XGBoost, without the factor 1/2."""
    subsample: Annotated[Fraction, Field(gt=0)] = 1.0
    """Fraction of the images used in a round."""
    colsample: Annotated[Fraction, Field(gt=0)] = 0.3
    """Fraction of the features used by a tree."""
    max_bin: Annotated[int, Field(ge=2, le=65535)] = 256
    """Number of histogram bins of a feature; splits are searched at their boundaries."""


class MemberConfig(Section):
    """A member of an ensemble: the experiment with some keys set, or a model that is already trained."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    set: dict[str, Any] | None = None
    """Dotted key -> value; the member is this experiment with these values, in its own run."""
    model: str | None = None
    """Instead of set: a run, an artifact folder or the name of a model."""

    @model_validator(mode="after")
    def _check(self) -> MemberConfig:
        if (self.set is None) == (self.model is None):
            raise ValueError(f"member {self.name}: expected one of set (keys of this experiment) and model (trained).")
        return self


class EnsembleConfig(Section):
    """Several classifiers combined into one (family ensemble)."""

    members: Annotated[tuple[MemberConfig, ...], Field(min_length=2)]
    combine: Literal[names.COMBINATIONS] = "average"
    """average: the mean of the probabilities. vote: majority vote, whose ties the mean decides. trained: a multinomial
    logistic regression on the members' log-probabilities, fitted on validation."""

    @model_validator(mode="after")
    def _check(self) -> EnsembleConfig:
        found = [member.name for member in self.members]
        if len(set(found)) < len(found):
            raise ValueError(f"members: found the names {', '.join(found)}; expected each once.")
        return self


class HeadConfig(Section):
    """The layers after the backbone."""

    pooling: Literal["avg", "max"] = "avg"
    hidden: tuple[Count, ...] = ()
    """Units of dense layers (ReLU, each with the dropout) before the last one; [4096, 4096] is VGG's own head."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid is for loss binary_crossentropy; in prediction its outputs are normalised to sum to 1."""


class ModelConfig(Section):
    """The network, which is the same in both stages except for the number of labels."""

    family: Literal[names.FAMILIES] = "transfer"
    """transfer: one backbone. hybrid: several fused backbones. boosted: trees on a backbone's features. ensemble:
    several runs."""
    backbone: Literal[names.BACKBONES] = "efficientnet_b3"
    branches: tuple[Literal[names.BACKBONES], ...] = ()
    """hybrid: the backbones that are fused, instead of `backbone`."""
    fusion: Literal[names.FUSIONS] = "concat"
    """hybrid: how the pooled features are fused. concat: concatenation; add: sum; attention: sum weighted per image."""
    stem: Literal[names.STEMS] = "imagenet"
    """resnet18, resnet34: imagenet is 7x7 with stride 2 and max pooling; small is 3x3 with stride 1, for small images."""
    feature_level: Count | None = None
    """Ends the backbone after this feature level, counted from the input (timm: the last of out_indices, plus 1), for a
    smaller network: 4 of mobilenet keeps everything up to stride 16, half of its weights. null: the whole backbone.
    `dlfer show backbones` gives the number of levels. EF-FER1 is loaded strictly into what remains; the run lists the rest."""
    pixel_scaling: Literal[names.PIXEL_SCALINGS] = "backbone"
    """Scaling of a pixel x in 0..255 before the first layer. backbone: the scaling that the published weights of the
    backbone were trained with, e.g. (x / 255 - mean) / deviation (`dlfer show backbones`); divide_by_255: x / 255 in
    RGB order; caffe: BGR in 0..255 minus (103.939, 116.779, 123.68), as in networks from Caffe and pretrain.weights:
    vggface2. It is saved with the model; both stages, and all branches of a hybrid, use the same scaling."""
    auxiliary_heads: bool = False
    """googlenet: also train its two auxiliary classifiers, with weight 0.3 each; predictions do not use them."""
    norm_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Momentum of BatchNorm's moving statistics; null: the backbone's own. They settle after about 5 / (1 - momentum)
    steps: MobileNetV2's own 0.999 needs 5,000; until then validation stays at chance without pretraining."""
    drop_connect: Annotated[float, Field(ge=0, lt=1)] | None = None
    """EfficientNets: rate at which the last residual block is skipped in training (stochastic depth, drop path); null:
    the published 0.2, meant for hundreds of epochs. Set 0 for short trainings, especially from random weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Dropout between pooling and the last dense layer."""
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.family == "hybrid") != bool(self.branches):
            raise ValueError(
                f"branches: found {list(self.branches)} with family {self.family}; a hybrid names two or more, "
                "e.g. branches: [resnet50, resnet34], and other families none."
            )
        if self.branches and len(self.branches) < 2:
            raise ValueError("branches: found one, expected two or more; one backbone is family transfer.")
        if self.fusion != "concat" and self.family != "hybrid":
            raise ValueError(f"fusion: found {self.fusion} with family {self.family}; it belongs to family hybrid.")
        if self.feature_level is not None and self.family == "hybrid":
            raise ValueError(
                f"feature_level: found {self.feature_level} with family hybrid, whose branches are whole. Set it to null."
            )
        if self.feature_level is not None and self.auxiliary_heads:
            raise ValueError(
                f"feature_level: found {self.feature_level} with auxiliary_heads: true, which branch off the whole backbone. Set "
                "one of the two to its default."
            )
        used = self.branches or (self.backbone,)
        if self.drop_connect is not None and not any(name.startswith("efficientnet_") for name in used):
            raise ValueError(
                f"drop_connect: found {self.drop_connect:g} with {', '.join(used)}; only EfficientNets have it. Leave it out."
            )
        if self.auxiliary_heads and (self.family, self.backbone) != ("transfer", "googlenet"):
            raise ValueError("auxiliary_heads: only backbone googlenet of family transfer has them.")
        return self

    def name_branches(self) -> dict[str, str]:
        """Return the backbone of each branch of a hybrid by the branch's name, e.g. "branch1_resnet50".

        The names are numbered so that a backbone may occur twice, and weights of [a, b] are not accepted for [b, a].
        """
        return {f"branch{number}_{name}": name for number, name in enumerate(self.branches, 1)}


class LabelsConfig(Section):
    """How the label names of the data are mapped to those of the model."""

    aliases: dict[str, str] = {}
    """Name in the data -> name to use, e.g. {happiness: Happy}. Common spellings need no alias."""
    drop: tuple[str, ...] = ()
    """Classes (names in the data, or after aliases) whose images are left out."""


class NumImages(Section):
    """Number of images of each split, drawn as a stratified sample; null: all. Synthetic sources generate this many."""

    train: Count | None = None
    validation: Count | None = None
    test: Count | None = None


class FacesConfig(Section):
    """Preparation of each image before all other steps: face detection, alignment by the eyes, and equalisation."""

    detect: Literal[names.DETECTORS] = "none"
    """none: the whole image is the face. centerface, mtcnn, opencv: the image is cropped to its largest face; an image
    without a face is left unchanged."""
    size: Annotated[int, Field(ge=64, le=4096)] | None = None
    """Longest side in pixels to which images are shrunk before detection; a larger value finds smaller faces.
    null: 640 for centerface, 1280 for the others."""
    align: bool = False
    """Rotate and scale the face so that the eyes are at fixed positions; needs centerface or mtcnn, which find the eyes."""
    equalize: Literal[names.EQUALIZERS] = "none"
    """histogram: histogram equalisation of the whole image. clahe: equalisation in tiles, with limited contrast."""

    @model_validator(mode="after")
    def _check(self) -> FacesConfig:
        if self.detect == "none" and self.equalize == "none":
            raise ValueError("faces: found nothing to do; set detect or equalize, or faces: null.")
        if self.align and self.detect not in ("centerface", "mtcnn"):
            raise ValueError(
                f"align: found true with detect: {self.detect}; only centerface and mtcnn find the eyes. Set detect: "
                "centerface, or align: false."
            )
        return self


class CropConfig(Section):
    """tfds: how images are cropped when they are read. null: depends on the data set; faces, small square images of one
    size, and images that are needed in memory (for a protocol, fraction, face detection or the like) are used whole,
    others are cropped like those of ImageNet. The run notes the choice and the reason."""

    train: Literal[names.TRAIN_CROPS] | None = None
    """random_resized: random crops of 25 to 100 % of the area and an aspect ratio of 3/4 to 4/3. none: the whole image,
    made square according to `aspect`. pad: like none, and sets `aspect: pad`."""
    validation: Literal[names.VALIDATION_CROPS] | None = None
    """Crop of validation and test images. center: 87.5 % of the shorter side; none: the whole image. null: center if
    train is random_resized."""


class SubjectsConfig(Section):
    """Which subject (person) each image shows, by its id: from a file or from the id itself."""

    file: str | None = None
    """A csv with the columns id and subject, one row per image."""
    pattern: str | None = None
    """A regular expression with one group that finds the subject in an id, e.g. "/(S[0-9]+)_" for CK+."""

    @model_validator(mode="after")
    def _check(self) -> SubjectsConfig:
        if (self.file is None) == (self.pattern is None):
            raise ValueError("subjects: expected one of file (a csv: id,subject) and pattern (a regular expression).")
        if self.pattern is None:
            return self
        try:
            num_groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is not a regular expression ({error}).") from None
        if num_groups != 1:
            raise ValueError(
                f"pattern: found {num_groups} groups in {self.pattern!r}, expected one pair of parentheses around the subject, "
                'e.g. "/(S[0-9]+)_".'
            )
        return self


class DataConfig(Section):
    """The source of the images, and how they are split."""

    source: Literal[names.SOURCES]
    path: str | None = None
    """File or folder; ${DLFER_DATA} (default ./data) and other environment variables are replaced."""
    name: str | None = None
    """tfds only: the data set, e.g. imagenet2012."""
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    """tfds only: names of the splits in the data set, e.g. {train: train, validation: validation}."""
    folders: dict[str, Literal["train", "validation", "test", "class", "ignore"]] | None = None
    """folder, fer2013, and tfds with name image_folder: the roles of folders in `path` whose names do not tell them,
    e.g. {holdout: test, old: ignore}."""
    protocol: Literal[names.PROTOCOLS] = "official"
    """official: the data's own splits. resplit: all images pooled and divided into 64 % train, 16 % validation and 20 %
    test, duplicates together. cross_validation: all pooled and divided into `folds`; `fold` is the test. paper: see
    split."""
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    """cross_validation only: number of folds, which are stratified by class and do not divide groups of duplicates or
    subjects."""
    fold: Annotated[int, Field(ge=0, le=19)] | None = None
    """cross_validation only: the test fold, counted from 0. null: `dlfer crossval` trains a model for each fold."""
    subjects: SubjectsConfig | None = None
    """The subject (person) in each image. Every split that dlfer draws keeps the images of a subject on one side."""
    split: Literal[names.PAPER_SPLITS] | None = None
    """paper only: after_balance pools all images, balances them and then splits them; official_80_20 evaluates on all
    official splits but Training."""
    select_on: OpenFraction | None = None
    """Select the model on this fraction of train (groups of duplicates kept together) instead of validation."""
    labels: LabelsConfig = LabelsConfig()
    num_images: NumImages = NumImages()
    fraction: OpenFraction | None = None
    """Use this fraction of all images, a stratified sample of whole groups of duplicates, drawn before the protocol is
    applied."""
    votes: str | None = None
    """File of FER+ votes, for the audit and for soft_targets: fer2013new.csv as published, or a csv of votes; one row
    per row of the data."""
    soft_targets: Literal[names.SOFT_TARGETS] | None = None
    """ferplus: train on the distribution of the votes in `votes` over the labels. ferplus_posterior: train on the probability
    of each label given all votes, which a logistic regression estimates on train; it corrects for annotators who use the
    labels in another way than the data does. Both are labels in addition to the data's own."""
    soft_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """soft_targets: the weight of the votes in a target; that of the label is 1 - soft_share."""
    drop_duplicates: bool = False
    """Remove training images that a chain of duplicates (exact, near, flipped) connects to validation or test images."""
    size: Annotated[int, Field(ge=8, le=1024)] | None = None
    """Side in pixels of the squares as which images are stored, see `aspect`. null: native size if all are the same."""
    aspect: Literal[names.ASPECTS] = "crop"
    """How an image is made square. crop: its largest centred square. pad: the whole image in the centre of a square
    whose other pixels repeat the image's edge. The choice is saved with the model."""
    crop: CropConfig = CropConfig()
    """tfds only: how images are cropped when they are read; by default this depends on the data set."""
    faces: FacesConfig | None = None
    """Face detection, alignment and equalisation; results are cached in $DLFER_CACHE (~/.cache/dlfer) for identical
    images."""
    max_megapixels: Annotated[float, Field(gt=0, le=2000)] = 200.0
    """Image files with more pixels are rejected before decoding; an image of 200 megapixels takes 600 MB of memory."""
    skip_unreadable: bool = False
    """Whether to leave out (and count) rows and files that cannot be read, instead of rejecting the data."""
    num_labels: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """synthetic_scenes only: number of labels, which reuse the kinds of scenes in turn; null: one per kind of scene."""
    seed: Seed = 0
    """Seed of drawn splits and synthetic images, separate from experiment.seed, so that all seeds share the data."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        synthetic = self.source.startswith("synthetic")
        needs_path = self.source in ("fer2013", "folder", "arrays")
        if needs_path and self.path is None:
            raise ValueError(f"path: source {self.source} needs one, e.g. path: ${{DLFER_DATA}}/{self.source}.")
        if synthetic and self.path is not None:
            raise ValueError(f"path: source {self.source} draws its images and takes none; set path: null.")
        if self.source != "synthetic_scenes" and self.num_labels is not None:
            raise ValueError(f"num_labels: only source synthetic_scenes takes it, found with source {self.source}.")
        if self.source == "tfds" and self.name is None:
            raise ValueError("name: source tfds needs the name of a data set, e.g. name: imagenet2012.")
        if self.source != "tfds" and (self.name is not None or self.splits is not None):
            raise ValueError(f"name, splits: only source tfds takes them, found with source {self.source}.")
        is_folder = self.source in ("folder", "fer2013") or (self.source == "tfds" and self.name == "image_folder")
        if self.folders is not None and not is_folder:
            raise ValueError(
                f"folders: found with source {self.source}; only sources folder and fer2013, and source tfds with name: image_folder, "
                "take them."
            )
        if self.soft_targets is not None and self.votes is None:
            raise ValueError(
                f"soft_targets: found {self.soft_targets} without a file of votes; set votes: PATH of fer2013new.csv."
            )
        if self.soft_share != 1.0 and self.soft_targets is None:
            raise ValueError(
                "soft_share: belongs to soft_targets, which is null; set soft_targets: ferplus or ferplus_posterior."
            )
        if self.source != "tfds" and self.crop != CropConfig():
            raise ValueError(
                f"crop: only source tfds takes it, found with source {self.source}; see data.faces, stage.crop."
            )
        if self.source == "tfds":
            self._check_tfds()
        if self.split == "after_balance" and self.drop_duplicates:
            raise ValueError(
                "drop_duplicates: found true with split: after_balance, which puts duplicates on both sides on "
                "purpose; use another split."
            )
        if self.protocol == "paper" and self.split is None:
            raise ValueError(f"split: protocol paper needs one of {', '.join(names.PAPER_SPLITS)}.")
        if self.protocol == "paper" and self.select_on is not None:
            raise ValueError("select_on: protocol paper selects on a fifth of training; set it to null.")
        if self.protocol != "paper" and self.split == "after_balance":
            raise ValueError(
                f"split: found after_balance under protocol {self.protocol}. Balancing or augmenting before the split "
                "puts copies of one image into training and into test, so the accuracy measures memorisation. Set "
                "split: null (only training images are balanced, after the split), or protocol: paper, which marks "
                "every output."
            )
        if self.protocol != "paper" and self.split is not None:
            raise ValueError(f"split: found {self.split} under protocol {self.protocol}; it belongs to protocol paper.")
        self._check_folds()
        return self

    def _check_folds(self) -> None:
        if self.split == "after_balance" and self.subjects is not None:
            raise ValueError(
                "subjects: found with split: after_balance, which ignores subjects when it divides images; use another split."
            )
        if self.protocol != "cross_validation":
            for key in ("folds", "fold"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key}: found {getattr(self, key)} under protocol {self.protocol}; it belongs to protocol "
                        "cross_validation."
                    )
            return
        if self.folds is None:
            raise ValueError("folds: protocol cross_validation needs their number, 2 to 20, e.g. folds: 5.")
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold: found {self.fold} with folds: {self.folds}; expected 0 to {self.folds - 1}.")

    @property
    def needs_memory(self) -> str | None:
        """The first key that requires all images in memory, with its value; None if there is none."""
        asked = {
            f"protocol: {self.protocol}": self.protocol != "official",
            f"select_on: {self.select_on}": self.select_on is not None,
            f"fraction: {self.fraction}": self.fraction is not None,
            "faces": self.faces is not None,
            f"size: {self.size}": self.size is not None,
            "drop_duplicates: true": self.drop_duplicates,
            "subjects": self.subjects is not None,
        }
        return next((key for key, is_asked in asked.items() if is_asked), None)

    @property
    def is_streamed(self) -> bool:
        """Whether images are read again in each epoch, as far as the experiment alone determines it."""
        is_cropped = self.crop.train == "random_resized"
        return self.source == "tfds" and (is_cropped or (self.crop.train is None and self.name.startswith("imagenet")))

    def _check_tfds(self) -> None:
        if self.crop.train == "pad" and "aspect" not in self.model_fields_set:
            # The artifact records `aspect`, so it is set here, before the frozen section is used.
            object.__setattr__(self, "aspect", "pad")
            self.model_fields_set.add("aspect")
        if self.crop.train == "pad" and self.aspect != "pad":
            raise ValueError(f"aspect: found {self.aspect} with crop.train: pad. Set it to pad, or leave it out.")
        if self.soft_targets is not None:
            raise ValueError(
                f"soft_targets: found {self.soft_targets} with source tfds, whose images have no rows to match with votes; leave "
                "it out, or use source fer2013."
            )
        if self.skip_unreadable:
            raise ValueError(
                "skip_unreadable: found true with source tfds, which reads images only when they are needed and cannot count "
                "them before. Set it to false, or use source folder."
            )
        if self.is_streamed and self.needs_memory is not None:
            key = self.needs_memory.partition(":")[0]
            raise ValueError(
                f"{key}: found {self.needs_memory} with source tfds and random crops (crop.train: random_resized), for which "
                "images are read again in each epoch; it needs them in memory. Leave it out, or set crop: {train: none}."
            )
