"""What is said before a stage trains."""

from pathlib import Path

import numpy as np
import pytest

from dlfer.config.schema import ExperimentSection, ModelConfig, StageConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.model.transfer import build_transfer_network
from dlfer.train.control import StopControl
from dlfer.train.device import choose_device
from dlfer.train.plan import describe_plan
from dlfer.train.state import StageJob
from dlfer.train.watch import TrainingListener


def describe(*, momentum: float | None, epochs: int, max_steps: int | None = None, **freeze) -> str:
    """The plan of ten steps an epoch."""
    config = StageConfig.model_validate(
        {"data": {"source": "synthetic_faces"}, "epochs": epochs, "batch_size": 4, "image_size": 32, "freeze": freeze}
    )
    images, targets = np.zeros((40, 32, 32, 1), np.uint8), np.arange(40) % 2
    split = Split("train", images, targets, np.array([f"Training/{row}" for row in range(40)]))
    network = build_transfer_network(
        ModelConfig(backbone="resnet_nano", norm_momentum=momentum), num_labels=2, image_size=32, channels=1
    )
    section = ExperimentSection(name="x")
    job = StageJob(
        "finetune", config, Path(), 0, choose_device(section), 1.0, StopControl(), TrainingListener(), max_steps
    )
    bundle = DataBundle("arrays", ("a", "b"), split, split, None)
    return "\n".join(describe_plan("EF-FER2", job, network, bundle, precision="float32"))


def test_the_numbers_that_follow_from_the_file():
    text = describe(momentum=None, epochs=5)
    assert "40 images of 32x32, batch 4, 10 steps an epoch, 5 epochs, 50 steps" in text
    assert "GiB" in text


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        ({"momentum": 0.99, "epochs": 49}, True),
        ({"momentum": 0.99, "epochs": 50}, False),
        ({"momentum": None, "epochs": 5}, False),  # ResNet's own is 0.9: 50 steps
        ({"momentum": 0.99, "epochs": 1, "batch_norm": "frozen"}, False),
        ({"momentum": 0.99, "epochs": 1, "max_steps": 2}, False),
    ],
)
def test_statistics_that_cannot_settle_are_told(given, warns):
    text = describe(**given)
    assert ("settle after about 500 steps, and 490 are planned" in text) == warns
    assert ("model.norm_momentum" in text) == warns
