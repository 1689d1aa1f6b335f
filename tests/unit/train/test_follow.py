"""A process that follows builds what the chief describes, though it has built no backbone itself."""

import subprocess
import sys

import pytest

from dlfer.config.sections import ModelConfig
from dlfer.model.stage_network import build_transfer_network

READ = "import sys; from dlfer.train.follow import read_network; print(len(read_network(sys.stdin.read()).weights))"


@pytest.mark.parametrize("model", [{"backbone": "efficientnet_nano"}, {"backbone": "googlenet"}])
def test_a_fresh_process_knows_every_layer_of_ours(model):
    network = build_transfer_network(ModelConfig(**model), num_labels=7, image_size=48, channels=1).model
    done = subprocess.run([sys.executable, "-c", READ], input=network.to_json(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(network.weights)
