"""The terms of the data that a model was trained on, as far as its experiment names the data."""

from __future__ import annotations

from typing import NamedTuple

from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig


class Terms(NamedTuple):
    """What is known of the terms of one source.

    Attributes:
        data: the source, and what it was used for.
        text: the terms, in sentences.
        research_only: whether weights that were trained on it are for research only.
    """

    data: str
    text: str
    research_only: bool


_FER2013 = (
    "The licence of the images is unclear. They are for research use; do not redistribute them. Weights trained on them "
    "are marked for research only."
)
_IMAGENET = (
    "The images are for non-commercial research and education. Weights trained on them are marked for research only."
)
_SYNTHETIC = "Drawn by dlfer; no image of a person is in it, and no terms but those of dlfer (Apache-2.0) hold."
_OWN = "The user's own data: its terms are the user's to state, and are not known to dlfer."
_EARLIER = "Weights of an earlier run or file: the terms of the data that they were trained on hold here, too."


def find_terms(config: ExperimentConfig | None) -> list[Terms]:
    """Return the sources that an experiment learned from, with their terms; empty where the experiment is not known."""
    if config is None:
        return []
    found = []
    pretrain = config.pretrain
    if pretrain is not None and pretrain.weights == "imagenet":
        found.append(Terms("ImageNet (published weights, EF-FER1)", _IMAGENET, True))
    elif pretrain is not None and pretrain.weights:
        found.append(_judge_path(f"{pretrain.weights} (EF-FER1)", pretrain.weights, _EARLIER))
    elif pretrain is not None and pretrain.data is not None:
        found.append(_judge_data(pretrain.data, "EF-FER1"))
    found.append(_judge_data(config.finetune.data, "EF-FER2"))
    return found


def _judge_data(data: DataConfig, title: str) -> Terms:
    if data.source == "fer2013":
        return Terms(f"FER2013 ({title})", _FER2013, True)
    if data.source.startswith("synthetic"):
        return Terms(f"{data.source} ({title})", _SYNTHETIC, False)
    where = data.name or data.path or ""
    return _judge_path(f"{data.source} {where} ({title})".replace("  ", " "), where, _OWN)


def _judge_path(data: str, where: str, otherwise: str) -> Terms:
    """Return the terms of a file or folder; a name that contains FER2013 or ImageNet is believed."""
    plain = where.casefold().replace("-", "").replace("_", "")
    if "fer2013" in plain:
        return Terms(data, _FER2013, True)
    if "imagenet" in plain:
        return Terms(data, _IMAGENET, True)
    return Terms(data, otherwise, False)
