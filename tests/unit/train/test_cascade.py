"""The digest by which a trained EF-FER1 is found again: it tells whatever determines it."""

import dataclasses

import numpy as np

from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.train.cascade import compute_pretrain_digest


def make_config(**head) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "experiment": {"name": "x"},
            "model": {"backbone": "resnet_nano", "head": head},
            "pretrain": {"data": {"source": "synthetic_scenes"}, "monitor": "loss"},
            "finetune": {"data": {"source": "synthetic_faces"}},
        }
    )


def make_bundle(soft: np.ndarray | None = None) -> DataBundle:
    images, ids = np.zeros((4, 8, 8, 1), np.uint8), np.array([f"a/{row}" for row in range(4)])
    split = Split("train", images, np.arange(4) % 2, ids)
    return DataBundle("arrays", ("a", "b"), dataclasses.replace(split, soft_targets=soft), split, None)


def test_votes_are_part_of_it_in_whatever_order_the_images_are():
    votes = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]], np.float32)
    config, bundle = make_config(), make_bundle(votes)
    digest = compute_pretrain_digest(config, bundle)
    turned = dataclasses.replace(bundle, train=bundle.train.take(np.arange(4)[::-1]))
    assert compute_pretrain_digest(config, turned) == digest
    assert len({digest, *(compute_pretrain_digest(config, make_bundle(soft)) for soft in (None, votes[::-1]))}) == 3


def test_the_activation_whose_loss_selects_the_epoch_is_part_of_it():
    softmax, sigmoid = (
        compute_pretrain_digest(make_config(activation=name), make_bundle()) for name in ("softmax", "sigmoid")
    )
    assert softmax != sigmoid
