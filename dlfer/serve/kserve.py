"""The tensors of the KServe protocol, version 2 (the Open Inference Protocol), in JSON.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

from math import prod

import numpy as np

from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.models import ServedModel
from dlfer.serve.schemas import (
    InferRequest,
    InferResponse,
    ModelDescription,
    OutputTensor,
    Tensor,
    TensorDescription,
)

OUTPUTS = ("probabilities", "labels")


def describe_model(model: ServedModel) -> ModelDescription:
    """Return what requests to a model look like."""
    return ModelDescription(
        name=model.name,
        versions=["1"],
        platform="keras_dlfer",
        inputs=[TensorDescription(name="images", datatype="UINT8", shape=[-1, -1, -1, model.channels])],
        outputs=[
            TensorDescription(name="probabilities", datatype="FP32", shape=[-1, len(model.labels)]),
            TensorDescription(name="labels", datatype="BYTES", shape=[-1]),
        ],
        parameters=model.card,
    )


def read_crops(tensor: Tensor, model: ServedModel, limits: Limits) -> list[np.ndarray]:
    """Return the images of a tensor as crops of the model's own size; another size is cropped or padded, and resized.

    Raises:
        Refusal: 400 for another form, 413 for too many images or pixels.
    """
    shape = tensor.shape if len(tensor.shape) == 4 else [*tensor.shape, 1]
    if shape[-1] not in (1, 3):
        raise Refusal(400, f"images: found the shape {tensor.shape}, expected [N, H, W], [N, H, W, 1] or [N, H, W, 3].")
    if shape[0] > limits.images_in_tensor or prod(shape[:3]) > limits.pixels:
        raise Refusal(
            413,
            f"images: found the shape {tensor.shape}, expected at most {limits.images_in_tensor} images "
            f"and {limits.pixels:,} pixels.",
        )
    try:
        values = np.array(tensor.data)
    except (ValueError, OverflowError) as error:
        raise Refusal(400, "images: data is neither flat nor nested evenly.") from error
    is_whole = values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 255
    if not is_whole or values.size != prod(shape) or (values.ndim > 1 and list(values.shape) != tensor.shape):
        raise Refusal(
            400, f"images: expected {prod(shape):,} whole numbers 0..255 for the shape {tensor.shape}, flat or nested."
        )
    return [model.fit(image) for image in values.reshape(shape).astype(np.uint8)]


def write_answer(asked: InferRequest, model: ServedModel, probabilities: np.ndarray) -> InferResponse:
    """Return the outputs that were asked for, all if none were named."""
    names = OUTPUTS if asked.outputs is None else [output.name for output in asked.outputs]
    made = {
        "probabilities": OutputTensor(
            name="probabilities",
            shape=list(probabilities.shape),
            datatype="FP32",
            data=[float(value) for value in probabilities.ravel()],
        ),
        "labels": OutputTensor(
            name="labels",
            shape=[len(probabilities)],
            datatype="BYTES",
            data=[model.labels[best] for best in probabilities.argmax(axis=1)],
        ),
    }
    return InferResponse(model_name=model.name, id=asked.id, outputs=[made[name] for name in dict.fromkeys(names)])
