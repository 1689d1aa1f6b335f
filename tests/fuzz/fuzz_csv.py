"""Csv files that others wrote: FER2013, votes of annotators, attributes of images."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from dlfer.config.sections import DataConfig
from dlfer.data.fer2013 import load_fer2013, load_fer2013_splits
from dlfer.data.fer2013_csv import USAGES
from dlfer.data.votes import read_votes
from dlfer.metrics.scores import read_attributes

JUNK = (
    *("", " ", "256", "-1", "1e3", "0x1f", "1_0", "+5", "٣", "²", "NaN", "9" * 5000, "x" * 200_000, "\0", '"', "''"),
    *(
        "\ufeff",
        "\u2028",
        "\x85",
        "\r",
        "\n",
        "\r\n",
        ",",
        ";",
        "\t",
        "=1+1",
        "Training",
        "😀",
        "\udce9",
        "id",
        "emotion",
    ),
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")


def encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding, errors="surrogateescape" if encoding.startswith("utf-8") else "replace")


def change_cells(rows: list[list[str]], random: Random) -> None:
    """Change one cell, row or column of a table."""
    row = random.choice(rows)
    place = random.randrange(len(row)) if row else 0
    match random.randrange(10):
        case 0 if row:
            row[place] = random.choice(JUNK)
        case 1 if row:
            words = row[place].split(" ")
            words[random.randrange(len(words))] = random.choice(JUNK)
            row[place] = " ".join(words)
        case 2 if row:
            words = row[place].split(" ")
            cut = random.randrange(len(words) + 1)
            row[place] = " ".join(
                words[:cut] + words[cut + random.choice((0, 1, 1, 5)) :] + words[: random.choice((0, 1))]
            )
        case 3:
            row.insert(place, random.choice(JUNK))
        case 4 if row:
            del row[place]
        case 5:
            rows.insert(random.randrange(len(rows) + 1), list(row))
        case 6:
            rows.remove(row)
            rows.append(row)
        case 7:
            for other in rows:
                other.reverse()
        case 8:
            del rows[random.randrange(len(rows)) :]
            rows.append(row)
        case _:
            rows.insert(random.randrange(len(rows) + 1), [])


def change_bytes(contents: bytes, random: Random) -> bytes:
    """Change, cut, repeat or put in some bytes."""
    place = random.randrange(len(contents) + 1)
    far = random.choice((place + 1, place + random.randrange(1, 200), len(contents)))
    match random.randrange(5):
        case 0:
            return contents[:place] + bytes([random.randrange(256)]) + contents[place + 1 :]
        case 1:
            return contents[:place] + contents[far:]
        case 2:
            return contents[:far] + contents[place:]
        case 3:
            return contents[:place] + encode(random.choice(JUNK), "utf-8") + contents[place:]
        case _:
            return contents[:place] + random.randbytes(random.randrange(1, 20)) + contents[place:]


def damage(rows: list[list[str]], changes: list[Random]) -> bytes:
    """Return the bytes of a csv after some changes to its cells, its dialect, its encoding and its bytes."""
    comma, quote, end, encoding = ",", "", "\n", "utf-8"
    late = []
    for random in changes:
        match random.randrange(8):
            case 0:
                late.append(random)
            case 1:
                comma = random.choice((",", ";", "\t", ", ", ",,"))
            case 2:
                quote = random.choice(('"', "'", '""'))
            case 3:
                end = random.choice(("\r\n", "\r", "\n\n", "\x85", "\u2028"))
            case 4:
                encoding = random.choice(ENCODINGS)
            case _:
                change_cells(rows, random)
    text = "".join(comma.join(f"{quote}{cell}{quote}" for cell in row) + end for row in rows)
    contents = encode(text, encoding)
    for random in late:
        contents = change_bytes(contents, random)
    return contents


def make_fer2013() -> list[list[str]]:
    rng = np.random.default_rng(0)
    rows = [["emotion", "pixels", "Usage"]]
    for number in (0, 3, 4, 5):
        pixels = " ".join(map(str, rng.integers(0, 256, 48 * 48).tolist()))
        rows.append([str(number), pixels, USAGES[max(0, number - 3)]])
    return rows


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_fer2013(try_many, tmp_path, skip_unreadable):
    rows = make_fer2013()

    def read(changes: list[Random]) -> bool:
        path = tmp_path / "fer2013.csv"
        path.write_bytes(damage([list(row) for row in rows], changes))
        config = DataConfig(source="fer2013", path=str(path), skip_unreadable=skip_unreadable)
        bundle = load_fer2013(config)
        for split in (bundle.train, bundle.validation, bundle.test):
            if split is not None:
                assert split.images.dtype == np.uint8
                assert split.images.shape == (len(split.targets), 48, 48, 1)
                assert set(split.targets.tolist()) <= set(range(7))
                assert len(set(split.ids.tolist())) == len(split.ids) > 0
        splits, reading = load_fer2013_splits(path)
        assert sum(map(len, splits)) + len(reading.unreadable) == reading.num_rows
        if not skip_unreadable:
            assert reading.unreadable == ()
        return True

    assert try_many(read)["accepted"] > 0


def test_votes(try_many, tmp_path):
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    rows = [header.split(","), *(f"Training,fer{n:07}.png,{n},1,0,0,0,{10 - n},0,0,0,0".split(",") for n in range(8))]

    def read(changes: list[Random]) -> bool:
        path = Path(tmp_path / "votes.csv")
        path.write_bytes(damage([list(row) for row in rows], changes))
        votes = read_votes(path)
        assert votes.counts.shape[1] == len(votes.columns) >= 2
        assert (votes.counts >= 0).all()
        for beside in (votes.usages, votes.ids):
            assert beside is None or len(beside) == len(votes.counts)
        return True

    assert try_many(read)["accepted"] > 0


def test_attributes(try_many, tmp_path):
    rows = [["id", "age", "gender"], *([f"PrivateTest/{n}", "young" if n % 2 else "old", "f"] for n in range(8))]

    def read(changes: list[Random]) -> bool:
        path = tmp_path / "attributes.csv"
        path.write_bytes(damage([list(row) for row in rows], changes))
        attributes = read_attributes(path)
        assert attributes
        assert all(value for values in attributes.values() for value in values.values())
        return True

    assert try_many(read)["accepted"] > 0
