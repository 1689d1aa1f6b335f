"""How many of the images that judge a model have a duplicate among those that trained or selected it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import Duplicates, find_duplicates
from dlfer.runs.records import DuplicatesRecord


@dataclass(frozen=True)
class JudgedDuplicates:
    """Which of the N images that judge a model have a duplicate; every output of a run takes its numbers from here.

    Attributes:
        split: "test", or "validation" where the run has no test split and validation, which selected it, also judges.
        ids: str [N].
        in_train: duplicates in the split that trained the model.
        in_selection: duplicates in the split that selected it; None if that is the judged split itself, or is not there.
    """

    split: str
    ids: np.ndarray
    in_train: Duplicates
    in_selection: Duplicates | None = None

    @property
    def in_either(self) -> Duplicates:
        """Duplicates in training or in the split that selected the model: what "without duplicates" leaves out."""
        return self.in_train if self.in_selection is None else self.in_train | self.in_selection

    def list_ids_without(self) -> list[str]:
        """Return the ids of the images without any duplicate in either split."""
        return self.ids[~self.in_either.any].tolist()

    def as_record(self) -> DuplicatesRecord:
        """Return the counts as data.json and metrics.json hold them.

        `in_train.any` is the number of images that "have a duplicate in training".
        """
        return DuplicatesRecord.build(
            {
                "split": self.split,
                "n": len(self.ids),
                "in_train": self.in_train.count(),
                "in_selection": None if self.in_selection is None else self.in_selection.count(),
                "in_either": self.in_either.count(),
            }
        )


def find_run_duplicates(bundle: DataBundle) -> JudgedDuplicates | None:
    """Return the duplicates of the split that judges a run; None where its images or those of train are streamed."""
    if bundle.test is not None:
        name, judged, selection = "test", bundle.test, bundle.validation
    else:
        name, judged, selection = "validation", bundle.validation, None
    if not isinstance(judged, Split) or not isinstance(bundle.train, Split):
        return None
    return find_judged_duplicates(name, judged, train=bundle.train, selection=selection)


def find_judged_duplicates(
    name: str, judged: Split, *, train: Split, selection: object = None, same_ids: bool = True
) -> JudgedDuplicates:
    """Return which images of a split have a duplicate among those that trained or selected a model.

    Args:
        name: "test" or "validation", what the split is in metrics.json.
        judged: the images that judge.
        train: those that trained the model.
        selection: those that selected it; None if they are the judged ones or are not there. Streamed ones are not
            looked into.
        same_ids: an id means the same image in all splits, so that augmented copies are found by it.
    """

    def find(reference: Split) -> Duplicates:
        ids = {"ids": judged.ids, "reference_ids": reference.ids} if same_ids else {}
        return find_duplicates(judged.images, reference.images, **ids)

    in_selection = find(selection) if isinstance(selection, Split) else None
    return JudgedDuplicates(name, judged.ids, find(train), in_selection)
