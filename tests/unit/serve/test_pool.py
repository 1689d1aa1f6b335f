"""Works that wait together are predicted together; what fails, fails alone."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.serve.models import ServedModel
from dlfer.serve.pool import BATCH_IMAGES, Batcher, PredictionTask


@pytest.fixture
def batcher():
    """Begun by the test, once everything waits."""
    batcher = Batcher(window=0.005)
    yield batcher
    batcher.stop()


@pytest.fixture
def model(engine) -> ServedModel:
    def find_bright(images):
        if any(image.max() == 13 for image in images):
            raise ValueError("unlucky")
        from dlfer.predict.crops import Crop

        return [[Crop(None, None, image[..., :1])] * int(image.max() > 100) for image in images]

    card = None
    return ServedModel("m", engine, card=card, croppers={"auto": find_bright})


def make(value: int, faces: str | None = None) -> np.ndarray:
    return np.full((16, 16, 3) if faces else (16, 16, 1), value, np.uint8)


def test_what_waits_is_predicted_in_one_call_and_each_gets_its_own(batcher, model, engine):
    works = [
        PredictionTask(model, [make(20), make(220)]),
        PredictionTask(model, [make(127)]),
        PredictionTask(model, [make(255, "auto"), make(9, "auto")], "auto"),
    ]
    futures = [batcher.submit(work) for work in works]
    batcher.start()
    first, second, third = (future.result(10) for future in futures)
    assert engine.sizes == [4]
    assert first.argmax(axis=1).tolist() == [0, 2]
    assert second.argmax(axis=1).tolist() == [1]
    assert [found.num_found for found in third] == [1, 0]
    assert third[0].probabilities.argmax() == 2
    assert third[1].probabilities.shape == (0, 3)


def test_a_batch_has_an_end(batcher, model, engine):
    futures = [batcher.submit(PredictionTask(model, [make(20)])) for _ in range(BATCH_IMAGES + 3)]
    batcher.start()
    for future in futures:
        future.result(10)
    assert engine.sizes == [BATCH_IMAGES, 3]


def test_what_fails_fails_alone(batcher, model):
    good, bad = PredictionTask(model, [make(255, "auto")], "auto"), PredictionTask(model, [make(13, "auto")], "auto")
    futures = [batcher.submit(work) for work in (good, bad)]
    batcher.start()
    assert futures[0].result(10)[0].num_found == 1
    with pytest.raises(ValueError, match="unlucky"):
        futures[1].result(10)
    assert batcher.is_alive


def test_what_nobody_waits_for_is_left_out(batcher, model, engine):
    gone, kept = batcher.submit(PredictionTask(model, [make(1)])), batcher.submit(PredictionTask(model, [make(2)]))
    gone.cancel()
    batcher.start()
    kept.result(10)
    assert engine.sizes == [1]


def test_stop_finishes_what_was_handed_over(model):
    batcher = Batcher(window=0.0)
    futures = [batcher.submit(PredictionTask(model, [make(20)])) for _ in range(5)]
    batcher.start()
    batcher.stop()
    assert all(future.done() for future in futures)
    assert not batcher.is_alive
