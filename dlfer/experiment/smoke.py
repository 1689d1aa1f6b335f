"""The small form of an experiment for --smoke: every phase, two batches, no download, no data needed."""

from __future__ import annotations

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.sections import DataConfig
from dlfer.data.sources import is_present, replace_by_synthetic

IMAGES_A_BATCH, NUM_BATCHES = 8, 2


def make_smoke_config(config: ExperimentConfig) -> tuple[ExperimentConfig, list[str]]:
    """Return the experiment cut down to two batches of at most eight images a stage, and what was replaced."""
    warnings = ["--smoke: two batches of at most eight images a stage; the figures mean nothing."]
    overrides: dict[str, object] = {}
    for stage in ("pretrain", "finetune"):
        section = getattr(config, stage)
        if section is None:
            continue
        batch_size = min(section.batch_size, IMAGES_A_BATCH)
        head_epochs = min(1, section.freeze.head_epochs)
        overrides |= {
            f"{stage}.batch_size": batch_size,
            f"{stage}.epochs": 1 + head_epochs,
            f"{stage}.milestones": [1 + head_epochs] if section.milestones else [],
            f"{stage}.freeze.head_epochs": head_epochs,
            f"{stage}.schedule.warmup_epochs": min(0.5, section.schedule.warmup_epochs),
        }
        if section.data is not None:
            data, warning = _cut_down(section.data, batch_size)
            overrides[f"{stage}.data"] = data.model_dump(mode="json")
            warnings += [f"--smoke: {stage}: {warning}"] if warning else []
    if config.pretrain is not None and config.pretrain.weights is not None:
        warnings.append(f"--smoke: pretrain.weights {config.pretrain.weights} replaced by random weights.")
    return with_overrides(config, overrides), warnings


def _cut_down(data: DataConfig, batch_size: int) -> tuple[DataConfig, str | None]:
    warning = None
    if not is_present(data):
        data, warning = replace_by_synthetic(data)
    # A split may take a fifth away, and a fifth again, before two batches are left.
    num_images = 2 * NUM_BATCHES * batch_size
    counts = dict.fromkeys(("train", "validation", "test"), num_images)
    return data.model_copy(update={"num_images": type(data.num_images)(**counts)}), warning
