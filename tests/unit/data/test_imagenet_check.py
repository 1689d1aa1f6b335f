"""The check of ImageNet's archives, on sparse files of the right sizes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from dlfer.data.tfds_stream import ARCHIVES, check_imagenet2012, find_data_dir
from dlfer.errors import MissingDataError

TRAIN, VALIDATION = ARCHIVES
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Set the free bytes of every disk."""

    def set_free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 10**13 - size, size))

    set_free(10**12)
    return set_free


def put(root, sizes):
    manual = root / "downloads" / "manual"
    manual.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        with (manual / name).open("wb") as stream:
            stream.truncate(size)


def test_complete_archives_and_room_pass(tmp_path, free):
    put(tmp_path, ARCHIVES)
    check_imagenet2012(tmp_path)


def test_nothing_there_says_where_to_get_it_and_where_to_put_it(tmp_path, free):
    with pytest.raises(MissingDataError) as caught:
        check_imagenet2012(tmp_path / "not" / "yet")
    message = str(caught.value)
    assert "image-net.org" in message
    assert "non-commercial research" in message
    assert "--set pretrain.weights=imagenet" in message
    assert "147,897,477,120" in message
    assert "6,744,924,160" in message
    for name in ARCHIVES:
        assert f"{tmp_path / 'not' / 'yet' / 'downloads' / 'manual' / name}: the file is missing" in message


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("by", [-1, 1])
def test_an_archive_of_another_size_is_named_and_the_other_is_not(tmp_path, free, name, by):
    put(tmp_path, {**ARCHIVES, name: ARCHIVES[name] + by})
    with pytest.raises(MissingDataError) as caught:
        check_imagenet2012(tmp_path)
    problems = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(problems) == 1
    assert f"{name}: found {ARCHIVES[name] + by:,} bytes, expected {ARCHIVES[name]:,}" in problems[0]


def test_a_full_disk_is_reported_with_what_is_missing(tmp_path, free):
    put(tmp_path, {TRAIN: ARCHIVES[TRAIN]})
    free(299_000_000_000)
    with pytest.raises(MissingDataError) as caught:
        check_imagenet2012(tmp_path)
    message = str(caught.value)
    assert "found 299 GB free" in message
    assert f"{VALIDATION}: the file is missing" in message
    assert f"{TRAIN}: the file is missing" not in message


def test_a_prepared_data_set_needs_neither_archives_nor_room(tmp_path, free):
    free(0)
    prepared = tmp_path / "imagenet2012" / "5.1.0"
    prepared.mkdir(parents=True)
    with pytest.raises(MissingDataError):
        check_imagenet2012(tmp_path)
    (prepared / "dataset_info.json").write_text("{}")
    check_imagenet2012(tmp_path)


def test_an_unfinished_preparation_does_not_count(tmp_path, free):
    unfinished = tmp_path / "imagenet2012" / "incomplete.A1B2C3_5.1.0"
    unfinished.mkdir(parents=True)
    (unfinished / "dataset_info.json").write_text("{}")
    with pytest.raises(MissingDataError):
        check_imagenet2012(tmp_path)


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert find_data_dir(None) == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert find_data_dir(None).name == "tensorflow_datasets"
    assert find_data_dir("~/sets").is_absolute()


def test_the_check_loads_no_tensorflow():
    code = "import sys, dlfer.data.tfds_stream; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
