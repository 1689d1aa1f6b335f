"""The history of a stage: one row an epoch, as csv and for TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path

from dlfer.runs.files import write_atomically

COLUMNS = (
    "epoch",
    "phase",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "validation_macro_f1",
    "learning_rate",
    "seconds",
    "images_per_second",
)


def write_history(path: Path, rows: list[dict]) -> None:
    """Write the rows as csv; the file is replaced whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


class ScalarLog:
    """TensorBoard's log of a stage, written without TensorFlow; silent where tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = None

    def write(self, row: dict) -> None:
        """Log every number of one row of history under its epoch."""
        if importlib.util.find_spec("tensorboard") is None:
            return
        if self.writer is None:
            from tensorboard.summary import Writer

            self.writer = Writer(str(self.folder))
        for key, value in row.items():
            if isinstance(value, float):
                self.writer.add_scalar(key.replace("_", "/", 1), value, int(row["epoch"]))
        self.writer.flush()
