"""FER2013 as a tensorflow_datasets data set, for streaming; importing this module registers it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import Split
from dlfer.data.fer2013 import describe_missing, load_fer2013
from dlfer.data.fer2013_csv import SIDE
from dlfer.errors import MissingDataError

FILE_NAME = "fer2013.csv"


class Fer2013(tfds.core.GeneratorBasedBuilder):
    """FER2013: 35,887 grey faces of 48 x 48 pixels with seven expression labels.

    The splits train, validation and test are the rows of Usage Training, PublicTest and
    PrivateTest; a csv without rows of a Usage gives no such split.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 - the name and type that tensorflow_datasets reads
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put fer2013.csv (columns emotion, pixels, Usage; about 300 MB) into the manual folder, "
        "<data_dir>/downloads/manual by default. It is obtained from Kaggle, competition "
        "challenges-in-representation-learning-facial-expression-recognition-challenge."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=FER2013_LABELS),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
            citation=(
                "@inproceedings{goodfellow2013challenges, author={Goodfellow, Ian J. and others}, title={Challenges in "
                "Representation Learning: A Report on Three Machine Learning Contests}, booktitle={ICONIP}, year={2013}}"
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        path = dl_manager.manual_dir / FILE_NAME
        if not path.exists():
            raise MissingDataError(describe_missing(path))
        bundle = load_fer2013(DataConfig(source="fer2013", path=str(path)))
        return {key: self._generate_examples(split) for key, split in bundle.splits.items()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (id, example) for each image."""
        for image, target, name in zip(split.images, split.targets.tolist(), split.ids.tolist(), strict=True):
            yield name, {"image": image, "label": target, "id": name}
