"""network.json: the network of a run, block by block."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dlfer.runs.records import FileRecord, Record


class Block(Record):
    """A part of a network: the layers of one feature level, what fuses branches, or the head.

    Attributes:
        name: "feature level 3", "fusion" or "head".
        branch: of a hybrid; "" elsewhere.
        layer: its last one.
        shape: of what that layer gives for one image, e.g. [12, 12, 48].
        layers: number of layers.
        parameters: number of values in its weights.
        statistics: number of those that are the moving statistics of BatchNorm.
        trained: number of those that the gradients of fine-tuning change; all but the statistics, where nothing is frozen.
    """

    name: str
    branch: str = ""
    layer: str
    shape: list[int]
    layers: int
    parameters: int
    statistics: int = 0
    trained: int


class NetworkRecord(FileRecord):
    """network.json: what a run's network is made of, from the image on.

    Attributes:
        image_size: side in pixels of the square that it sees.
        channels: of the images that come in, 1 or 3.
        blocks: from the image on; those of a hybrid branch after branch.
    """

    FILE: ClassVar[str] = "network.json"

    image_size: int
    channels: int
    blocks: list[Block] = Field(default_factory=list)

    @property
    def parameters(self) -> int:
        """The number of values in all weights."""
        return sum(block.parameters for block in self.blocks)

    @property
    def trained(self) -> int:
        """The number of values that gradients change."""
        return sum(block.trained for block in self.blocks)
