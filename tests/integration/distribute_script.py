"""Train a small network as often as is asked for, on so many devices; print histories and weights as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import keras
import numpy as np

from dlfer.config.schema import ExperimentSection, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.model.stage_network import build_transfer_network
from dlfer.train.cluster import choose_device, join_cluster
from dlfer.train.progress import StopControl, TrainingListener, is_follower
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob


def make_bundle(num_train: int) -> DataBundle:
    """Three classes of grey squares: dark, middle, bright."""
    rng = np.random.default_rng(0)

    def split(name: str, count: int) -> Split:
        targets = np.arange(count) % 3
        noise = rng.integers(0, 40, (count, 24, 24, 1))
        images = (noise + 90 * targets[:, None, None, None]).astype(np.uint8)
        return Split(name, images, targets, np.array([f"{name}/{i}" for i in range(count)]))

    return DataBundle("arrays", ("dark", "middle", "bright"), split("train", num_train), split("validation", 31), None)


def build():
    keras.utils.set_random_seed(0)
    config = ModelConfig(backbone="efficientnet_nano", dropout=0.0)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    for layer in network.backbone.layers:
        if isinstance(layer, keras.layers.Dropout):
            # Each device draws its own; here nothing shall be drawn. 0 would change the number of variables.
            layer.rate = 1e-12
    return network


def main() -> None:
    wanted, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    found = []
    # The CPU is divided once, before anything is computed.
    most = max(run["devices"] for run in wanted["runs"])
    choose_device(ExperimentSection(name="x", devices=most, jit=wanted["jit"]))
    for number, run in enumerate(wanted["runs"]):
        stage = StageConfig.model_validate({"data": {"source": "synthetic_faces"}, **run["stage"]})
        device = choose_device(ExperimentSection(name="x", devices=run["devices"], jit=wanted["jit"]))
        network = build()
        if is_follower():
            # The chief says what it begins, which is known here; its weights must come from it.
            join_cluster().tell({})
            for variable in network.model.weights:
                variable.assign(variable * 0 + 7)
        job = StageJob("finetune", stage, folder / str(number), 3, device, 60.0, StopControl(), TrainingListener())
        result = train_stage(job, network, make_bundle(wanted["num_train"]))
        weights = [np.asarray(variable) for variable in network.model.weights]
        found.append(
            {
                "replicas": device.replicas,
                "history": result.history,
                "weights": [float(np.abs(values).sum()) for values in weights],
                "digest": hashlib.sha256(b"".join(values.tobytes() for values in weights)).hexdigest(),
            }
        )
    print(json.dumps(found))


main()
