"""FER2013 as a data set of tensorflow_datasets, prepared end to end from a tiny csv."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig
from dlfer.errors import DataError, MissingDataError

USAGES = {"Training": 14, "PublicTest": 7, "PrivateTest": 5}


def write_csv(data_dir, usages, cut=False):
    """Write random faces; return their pixels and codes by id."""
    rng = np.random.default_rng(7)
    rows, lines = {}, ["emotion,pixels,Usage"]
    for usage, count in usages.items():
        for index in range(count):
            pixels = rng.integers(0, 256, 48 * 48, dtype=np.uint8)
            rows[f"{usage}/{len(lines) - 1}"] = (pixels.reshape(48, 48, 1), index % 7)
            values = pixels[:-1] if cut and len(lines) == 3 else pixels
            lines.append(f"{index % 7},{' '.join(map(str, values))},{usage}")
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "fer2013.csv").write_text("\n".join(lines) + "\n")
    return rows


def config(path, **keys):
    return DataConfig(source="tfds", name="fer2013", path=str(path), **keys)


def prepare(data_dir):
    import tensorflow_datasets as tfds

    import dlfer.data.tfds_fer2013  # noqa: F401 - registers the builder

    builder = tfds.builder("fer2013", data_dir=str(data_dir))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return builder


def test_every_row_comes_back_with_its_pixels_label_and_id(tmp_path):
    rows = write_csv(tmp_path, USAGES)
    builder = prepare(tmp_path)
    assert builder.info.features["label"].names == list(FER2013_LABELS)
    found = {}
    for part, usage in zip(("train", "validation", "test"), USAGES, strict=True):
        assert builder.info.splits[part].num_examples == USAGES[usage]
        for example in builder.as_dataset(split=part).as_numpy_iterator():
            name = example["id"].decode()
            assert name.startswith(usage + "/")
            found[name] = example
    assert found.keys() == rows.keys()
    for name, (pixels, code) in rows.items():
        np.testing.assert_array_equal(found[name]["image"], pixels)
        assert found[name]["image"].dtype == np.uint8
        assert found[name]["label"] == code


def test_without_private_test_there_is_no_test_split(tmp_path):
    write_csv(tmp_path, {"Training": 7, "PublicTest": 7})
    assert sorted(prepare(tmp_path).info.splits) == ["train", "validation"]


def test_the_source_tfds_prepares_and_streams_it_by_name(tmp_path):
    from dlfer.data.tfds_stream import load_tfds

    write_csv(tmp_path, USAGES)
    bundle = load_tfds(config(tmp_path), 32)
    assert bundle.labels == FER2013_LABELS
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (14, 7, 5)
    assert bundle.test.images.shape == (5, 32, 32, 3)
    assert bundle.selected_on == "validation"
    assert any("show faces" in note for note in bundle.notes)
    # Grey stays grey in three channels.
    np.testing.assert_array_equal(bundle.test.images[..., 0], bundle.test.images[..., 2])


def test_without_the_csv_the_message_says_what_to_put_where(tmp_path):
    from dlfer.data.tfds_stream import load_tfds

    with pytest.raises(MissingDataError, match=r"fer2013\.csv.*manual"):
        load_tfds(config(tmp_path), 32)
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "other.tar").touch()
    with pytest.raises(MissingDataError, match="Kaggle"):
        load_tfds(config(tmp_path), 32)


def test_a_row_cut_short_is_named_by_its_line(tmp_path):
    from dlfer.data.tfds_stream import load_tfds

    write_csv(tmp_path, USAGES, cut=True)
    with pytest.raises(DataError, match=r"fer2013\.csv line 4: expected 2304 pixel values, found 2303"):
        load_tfds(config(tmp_path), 32)


@pytest.mark.slow
def test_whole_faces_follow_every_protocol_and_can_be_audited(tmp_path):
    from dlfer.data.sources import load_data
    from dlfer.experiment.audit import inspect_data

    rows = write_csv(tmp_path, {"Training": 70, "PublicTest": 14, "PrivateTest": 14})
    bundle = load_data(config(tmp_path), image_size=48)
    by_pixels = {pixels.tobytes() for pixels, _ in rows.values()}
    # At their own size they are the very pixels of the csv: mouth and eyes are not cut off.
    assert {np.ascontiguousarray(image[..., :1]).tobytes() for image in bundle.train.images} < by_pixels
    halved = load_data(config(tmp_path, protocol="resplit", fraction=0.5), image_size=48)
    assert halved.protocol == "resplit"
    assert sum(len(split) for split in halved.splits.values()) < 60
    selected = load_data(config(tmp_path, select_on=0.2), image_size=48)
    assert len(selected.train) < 70
    file = tmp_path / "a.yaml"
    file.write_text(
        "experiment: {name: a}\n"
        f"finetune: {{data: {{source: tfds, name: fer2013, path: {tmp_path}}}, image_size: 48}}\n"
    )
    audit = inspect_data(file)
    assert sum(split.num_images for split in audit.splits.values()) == 98
    assert audit.distinct_images == 98


def write_experiment(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "experiment: {name: a}\n"
        f"finetune: {{data: {{source: tfds, name: fer2013, path: {tmp_path / 'data'}}}, image_size: 32}}\n"
    )
    return file


def test_prepare_makes_the_records_once_and_training_only_reads_them(tmp_path, capfd):
    from dlfer.cli.prepare import prepare as run_verb
    from dlfer.data.sources import load_data

    write_csv(tmp_path / "data", USAGES)
    file = write_experiment(tmp_path)
    run_verb(file)
    said = capfd.readouterr()
    assert f"prepared in {tmp_path / 'data' / 'fer2013'}" in said.out
    assert {"train 14", "validation 7", "test 5"} == set(said.out.partition("(")[2].rstrip(")\n").split(", "))
    # What tensorflow_datasets prints is no result.
    assert said.out.count("\n") == 1
    assert "preparing fer2013" in said.err
    assert "pretrain: it has no data of its own" in said.err
    # The csv is not needed any more, and nothing is written.
    (tmp_path / "data" / "downloads" / "manual" / "fer2013.csv").unlink()
    state = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    run_verb(file)
    assert "preparing" not in capfd.readouterr().err
    assert len(load_data(config(tmp_path / "data"), image_size=32).train) == 14
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == state


def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(tmp_path, monkeypatch):
    from dlfer.cli.prepare import prepare as run_verb

    write_csv(tmp_path / "data", USAGES)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(MissingDataError, match=r"cannot be written.*dlfer prepare FILE.*read-only mount"):
        run_verb(write_experiment(tmp_path))


def test_sources_without_records_have_nothing_to_prepare(tmp_path, capsys):
    from dlfer.cli.prepare import prepare as run_verb

    file = tmp_path / "a.yaml"
    file.write_text(
        "experiment: {name: a}\npretrain: {data: {source: tfds, name: image_folder, path: x}}\n"
        "finetune: {data: {source: synthetic_faces}}\n"
    )
    run_verb(file)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("nothing to prepare") == 2
