"""The names that an experiment file may use for each registry, and the folders of shipped models and experiments.

This module imports nothing of dlfer, so that checking a file loads neither TensorFlow nor Keras. The contract tests
check that the keys of each registry equal these tuples.
"""

from __future__ import annotations

import os
from pathlib import Path

FAMILIES = ("transfer", "hybrid", "boosted", "ensemble")

BACKBONES = (
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_lite0",
    "efficientnet_lite1",
    "efficientnet_lite2",
    "efficientnet_nano",
    "efficientnet_v2_b0",
    "efficientnet_v2_b1",
    "efficientnet_v2_b2",
    "efficientnet_v2_b3",
    "efficientnet_v2_s",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet_nano",
    "vgg16",
    "vgg19",
    "vgg19_bn",
    "googlenet",
    "inception_v3",
    "inception_resnet_v2",
    "xception",
    "mobilenet",
    "mobilenet_v2",
    "densenet121",
    "convnext_tiny",
)

SOURCES = ("fer2013", "folder", "tfds", "arrays", "synthetic_faces", "synthetic_scenes")

STEMS = ("imagenet", "small")
PIXEL_SCALINGS = ("backbone", "divide_by_255", "caffe")
FUSIONS = ("concat", "add", "attention")
COMBINATIONS = ("average", "vote", "trained")
ASPECTS = ("crop", "pad")
TRAIN_CROPS = ("random_resized", "none", "pad")
VALIDATION_CROPS = ("center", "none")
DETECTORS = ("none", "centerface", "mtcnn", "opencv")
EQUALIZERS = ("none", "histogram", "clahe")

PUBLISHED_WEIGHTS = ("imagenet", "vggface2")

PROTOCOLS = ("official", "resplit", "cross_validation", "paper")
PAPER_SPLITS = ("after_balance", "official_80_20")
SOFT_TARGETS = ("ferplus", "ferplus_posterior")

BALANCES = ("none", "augment", "undersample", "class_weight", "sampler")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop")
WEIGHT_DECAYS = ("decoupled", "l2")
DECAYED_WEIGHTS = ("kernels", "all")
CLIP_SCOPES = ("global", "variable")
SCHEDULES = ("constant", "step", "plateau", "cosine")
LOSSES = ("categorical_crossentropy", "binary_crossentropy", "focal")
TRACKERS = ("mlflow", "wandb")
MONITORS = ("accuracy", "macro_f1", "loss")
ENGINES = ("random", "bayesian", "hyperband", "grid", "optuna")
VIEWS = ("mirror", "ten_crop")
HEADLINES = ("single", *VIEWS)

FER2013_LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")

STAGES = {"pretrain": "EF-FER1", "finetune": "EF-FER2"}
"""The section of a stage -> its name in output."""


PACKAGE = Path(__file__).resolve().parents[1]


def find_checkout() -> Path | None:
    """Return the root of the checkout that dlfer is imported from, or None for an ordinary installation."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() else None


def list_places(name: str) -> list[Path]:
    """Return the folders of this name that dlfer searches besides the working directory, in order of precedence.

    They are in `$DLFER_HOME`, in the installed package, and in the checkout of an editable installation. They need not
    exist.

    Args:
        name: "saved_models" or "experiments".
    """
    home = os.environ.get("DLFER_HOME")
    roots = [expand_home(home) if home else None, PACKAGE, find_checkout()]
    return [root / name for root in roots if root is not None]


def expand_home(path: str | Path) -> Path:
    """Return a path with a leading ~ or ~USER replaced as a shell does: `./~` is the folder of this name.

    pathlib drops the `./`, so `Path("./~")` is `~`; the result is an absolute path there, which no later call expands.
    """
    text = os.path.expanduser(path)
    found = Path(text)
    return found.absolute() if str(found).startswith("~") and not str(text).startswith("~") else found
