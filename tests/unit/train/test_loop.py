"""The loops of a stage: averaged weights have statistics of their own, and a batch is divided over devices and hosts."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from dlfer.config.schema import ExperimentSection, StageConfig
from dlfer.data.bundle import Share, Split
from dlfer.data.pipeline import count_steps, divide_rows, iterate_epoch, take_share
from dlfer.errors import ConfigError, EnvironmentProblem
from dlfer.model.stage_network import TrainingNetwork
from dlfer.model.training_kernels import list_batch_norms
from dlfer.train.cluster import Device, choose_device
from dlfer.train.loop import FitLoop, WeightAverage, _check_divides, choose_replicas, describe_replicas
from dlfer.train.objective import build_loss, build_optimizer
from dlfer.train.plan import set_trainable
from dlfer.train.progress import StopControl, TrainingListener, check_alone, describes_cluster, is_follower
from dlfer.train.stage import train_stage
from dlfer.train.state import StageJob, StageState
from tests.unit.train.test_stage import build, make_bundle, make_config, make_job, weights_of

GIVEN = {"batch_size": 16, "image_size": 32, "augment": {"mirror": 0.5, "shift": 0.1}, "ema": 0.9}


def start_loop(config):
    """Return a loop after one epoch, its optimiser and its network."""
    network, bundle = build(), make_bundle()
    loop = FitLoop(network, fill=config.augment.fill, jit=False)
    set_trainable(network.backbone, config.freeze, head_only=False)
    optimizer = loop.compile(
        lambda: build_optimizer(config.optimizer, 0.01, clip=None, ema=config.ema),
        build_loss(config.loss, auxiliary=0, class_weights=None),
    )
    loop.train(iterate(config, bundle), 4, StageState(), lambda loss, accuracy: None)
    loop.fetch()
    return loop, optimizer, network


def test_fit_reads_every_batch_without_autotuning_which_would_delay_its_end(monkeypatch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow reads batches with tf.data")
    config, bundle = make_config(**GIVEN), make_bundle()
    loop, given = FitLoop(build(), fill=config.augment.fill, jit=False), []
    monkeypatch.setattr(loop.training, "fit", lambda batches, **options: given.append(batches))
    loop.train(iterate(config, bundle), 4, StageState(), lambda loss, accuracy: None)
    assert given[0].options().autotune.enabled is False
    seen, expected = list(given[0].as_numpy_iterator()), list(iterate(config, bundle))
    assert len(seen) == len(expected) >= 2
    for (inputs, targets), (others, wanted) in zip(seen, expected, strict=True):
        assert inputs.keys() == others.keys()
        assert all(np.array_equal(inputs[name], others[name]) for name in others)
        assert np.array_equal(targets, wanted)


def iterate(config, bundle, epoch=0):
    return iterate_epoch(bundle.train, config, num_labels=3, seed=5, epoch=epoch)


@pytest.mark.slow
def test_statistics_are_the_mean_over_batches_of_what_the_averaged_weights_produce():
    config = make_config(**GIVEN)
    loop, optimizer, network = start_loop(config)
    bundle, raw = make_bundle(), weights_of(network)
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(iterate(config, bundle), num_images=40)  # three batches of 16
    assert all(np.array_equal(a, b) for a, b in zip(raw, weights_of(network), strict=True))
    with average.applied():
        # The oracle: what enters each BatchNorm in training, from a network that ends there.
        norms = list_batch_norms(network.backbone)
        found = [(np.array(norm.moving_mean), np.array(norm.moving_variance)) for norm in norms]
        training = TrainingNetwork(network, fill=config.augment.fill)
        probe = keras.Model(network.backbone.input, [norm.input for norm in norms])
        sums = [[0.0, 0.0] for _ in norms]
        for (inputs, _), _ in zip(iterate(config, bundle), range(3), strict=False):
            images = training.face_input.prepare(inputs["image"], inputs, fill=config.augment.fill)
            for total, values in zip(sums, probe(images, training=True), strict=True):
                mean, variance = keras.ops.moments(values, axes=[0, 1, 2])
                total[0] += np.asarray(mean) / 3
                total[1] += np.asarray(variance) / 3
        for (mean, variance), (expected_mean, expected_variance) in zip(found, sums, strict=True):
            np.testing.assert_allclose(mean, expected_mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(variance, expected_variance, rtol=1e-3, atol=1e-4)
        assert any(not np.allclose(a, b) for a, b in zip(raw, weights_of(network), strict=True))


@pytest.mark.slow
def test_without_batches_the_statistics_are_those_of_the_raw_weights():
    config = make_config(**GIVEN)
    loop, optimizer, network = start_loop(config)
    norm = list_batch_norms(network.backbone)[0]
    raw_mean, raw_gamma = np.array(norm.moving_mean), np.array(norm.gamma)
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(None, num_images=0)
    with average.applied():
        assert np.array_equal(raw_mean, np.array(norm.moving_mean))
        assert not np.array_equal(raw_gamma, np.array(norm.gamma))


@pytest.mark.slow
def test_frozen_statistics_stay():
    config = make_config(**GIVEN, freeze={"batch_norm": "frozen"})
    loop, optimizer, network = start_loop(config)
    norms = list_batch_norms(network.backbone)
    raw = [np.array(norm.moving_mean) for norm in norms]
    average = WeightAverage(loop, optimizer, fill=config.augment.fill)
    average.update(iterate(config, make_bundle()), num_images=16)
    with average.applied():
        assert all(np.array_equal(a, np.array(norm.moving_mean)) for a, norm in zip(raw, norms, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_raw_weights_of_a_training_do_not_depend_on_it(tmp_path, keep):
    """The same dropout, order and statistics in the next epoch: the checkpoints of both trainings are equal."""
    checkpoints = []
    for number, images in enumerate((None, 20)):
        config = make_config(epochs=2, keep=keep, ema_norm_images=images, **GIVEN)
        network = build()
        train_stage(make_job(config, tmp_path / str(number)), network, make_bundle())
        with np.load(tmp_path / str(number) / "checkpoint.npz") as stored:
            checkpoints.append({name: stored[name] for name in stored.files if name != "record"})
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(np.array_equal(values, checkpoints[1][name]) for name, values in checkpoints[0].items())


@pytest.mark.parametrize(("num_rows", "num_parts"), [(16, 2), (6, 2), (7, 2), (12, 5), (64, 3), (9, 1)])
def test_parts_hold_each_row_once_and_partners_together(num_rows, num_parts):
    parts = divide_rows(num_rows, num_parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))
    for rows in parts:
        # Read backwards, a part's rows stand beside their partners of the whole batch.
        assert (rows + rows[::-1] == num_rows - 1).all()
    sizes = [len(rows) for rows in parts]
    assert max(sizes) - min(sizes) <= 2
    assert min(sizes) > 0


def make_stage(**given) -> StageConfig:
    return StageConfig.model_validate({"data": {"source": "synthetic_faces"}, "image_size": 32, **given})


def make_split(count: int) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    return Split("train", images, np.arange(count) % 3, np.array([f"train/{i}" for i in range(count)]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_of_hosts_are_together_the_batch_of_one(count):
    config = make_stage(batch_size=12, augment={"mixup": 0.4, "cutmix": 0.4, "rotation": 9.0}, balance="class_weight")
    split = make_split(40)

    def read(share: Share) -> list:
        return list(iterate_epoch(split, config, num_labels=3, seed=4, epoch=1, share=share))

    shares = [read(Share(index, count)) for index in range(count)]
    for whole, *parts in zip(read(Share()), *shares, strict=True):
        rows = np.argsort(np.concatenate(divide_rows(12, count)))
        for name, values in whole[0].items():
            np.testing.assert_array_equal(np.concatenate([inputs[name] for inputs, _ in parts])[rows], values)
        np.testing.assert_array_equal(np.concatenate([targets for _, targets in parts])[rows], whole[1])


def test_validation_is_divided_without_overlap_also_when_it_does_not_divide():
    split = make_split(11)
    ids = [take_share(split, Share(index, 3)).ids.tolist() for index in range(3)]
    assert [len(part) for part in ids] == [4, 4, 3]
    assert sorted(np.concatenate(ids).tolist()) == sorted(split.ids.tolist())
    assert take_share(split, Share()) is split


class Stream:
    """A streamed split of which only the length is asked."""

    name, image_size = "train", 32

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def balance(self, how: str) -> "Stream":
        return self


def test_every_host_does_the_same_number_of_steps():
    config = make_stage(batch_size=8)
    assert count_steps(Stream(49), config) == 6
    # Shares of 25 and 24 images in batches of four.
    assert count_steps(Stream(49), config, Share(0, 2)) == 6
    # Shares of 9, 9, 9 and 8 images in batches of two: the fourth host sets the number.
    assert count_steps(Stream(35), config, Share(2, 4)) == 4


@pytest.mark.parametrize(
    ("available", "images", "expected"),
    [(1, 64, 1), (2, 64, 2), (3, 64, 2), (8, 64, 8), (8, 8, 4), (2, 3, 1), (3, 9, 3)],
)
def test_a_batch_that_does_not_divide_takes_fewer_devices(available, images, expected):
    assert choose_replicas(available, images) == expected


def make_shared_job(replicas: int, workers: int = 1) -> StageJob:
    device = Device("gpu", "GPU", False, "tensorflow", replicas, workers)
    config = make_stage()
    return StageJob("finetune", config, Path(), 0, device, 5.0, StopControl(), TrainingListener())


def test_the_plan_says_how_many_images_each_device_gets_and_which_stay_idle():
    assert describe_replicas(make_shared_job(1), 64) is None
    assert "2 devices, 32 images each of a batch of 64" in describe_replicas(make_shared_job(2), 64)
    text = describe_replicas(make_shared_job(3), 64)
    assert "2 devices" in text
    assert "1 of 3 devices stay idle" in text
    assert "16 devices on 2 hosts, 4 images each" in describe_replicas(make_shared_job(16, 2), 64)


def test_over_hosts_a_batch_must_divide():
    _check_divides(make_shared_job(16, 2), 64)
    with pytest.raises(ConfigError, match="expected a multiple of 6, from 12 on"):
        _check_divides(make_shared_job(6, 2), 64)


@pytest.fixture
def bare(monkeypatch):
    for name in ("TF_CONFIG", "DLFER_CLUSTER", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_tf_config(monkeypatch, workers: list[str], index: int) -> None:
    config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))


def test_without_variables_a_process_is_alone(bare):
    assert not describes_cluster()
    assert not is_follower()
    check_alone("search")


def test_tf_config_names_hosts_and_the_first_leads(bare):
    set_tf_config(bare, ["a:1"], 0)
    assert not describes_cluster()
    set_tf_config(bare, ["a:1", "b:1"], 0)
    assert describes_cluster()
    assert not is_follower()
    set_tf_config(bare, ["a:1", "b:1"], 1)
    assert is_follower()
    with pytest.raises(EnvironmentProblem, match="dlfer sweep"):
        check_alone("sweep")


def test_tasks_of_slurm_are_one_training_only_if_that_is_said(bare):
    bare.setenv("SLURM_STEP_NUM_TASKS", "4")
    bare.setenv("SLURM_PROCID", "2")
    assert not describes_cluster()
    bare.setenv("DLFER_CLUSTER", "slurm")
    assert describes_cluster()
    assert is_follower()


@pytest.mark.parametrize("tasks", [None, "four"])
def test_slurm_without_a_step_is_refused_and_not_one_process(bare, tasks):
    bare.setenv("DLFER_CLUSTER", "slurm")
    if tasks:
        bare.setenv("SLURM_STEP_NUM_TASKS", tasks)
    with pytest.raises(EnvironmentProblem, match="Start the processes with srun, or unset DLFER_CLUSTER"):
        describes_cluster()


@pytest.mark.parametrize("text", ["{", "[]", '{"cluster": 3}'])
def test_a_broken_tf_config_is_explained(bare, text):
    bare.setenv("TF_CONFIG", text)
    with pytest.raises(EnvironmentProblem, match="expected JSON such as"):
        describes_cluster()


def test_the_cpu_is_refused_where_the_process_has_used_a_gpu(monkeypatch):
    def refuse(*given):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr("tensorflow.config.set_visible_devices", refuse)
    with pytest.raises(EnvironmentProblem, match="has used a GPU already"):
        choose_device(ExperimentSection(name="x", device="cpu"))
