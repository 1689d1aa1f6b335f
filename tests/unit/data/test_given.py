"""Data as it is named on a command line: recognised by what it holds, whatever its name."""

from __future__ import annotations

import gzip
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import DataConfig
from dlfer.data.given import open_data, parse_split, recognise
from dlfer.data.sources import load_source_splits
from dlfer.errors import DataError, MissingDataError, UserError
from dlfer.experiment.audit import load_inspected
from dlfer.export.images import load_in_memory_splits

CSV = "emotion,pixels,Usage\n" + "".join(f"{n},{' '.join([str(n)] * 2304)},Training\n" for n in (0, 3))
YAML = "# mine\nexperiment: {name: x}\nfinetune: {data: {source: synthetic_faces}, image_size: 32}\n"


@pytest.fixture
def make(tmp_path):
    """Write a file of one kind under a name of another."""

    def make(kind, name):
        path = tmp_path / name
        if kind == "folder":
            for label in ("happy", "sad"):
                (path / label).mkdir(parents=True)
                Image.fromarray(np.full((16, 16), len(label), np.uint8)).save(path / label / "1.png")
        elif kind == "csv":
            path.write_text(CSV)
        elif kind == "semicolons":
            path.write_text(CSV.replace(",", ";"), encoding="utf-16")
        elif kind == "gzip":
            path.write_bytes(gzip.compress(CSV.encode()))
        elif kind == "arrays":
            with path.open("wb") as stream:
                np.savez(stream, images=np.zeros((4, 16, 16), np.uint8), targets=[0, 1, 0, 1])
        elif kind == "experiment":
            path.write_text(YAML)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                if kind == "zipped csv":
                    archive.writestr("data/fer2013.csv", CSV)
                else:
                    make("folder", "inside")
                    for file in sorted((tmp_path / "inside").rglob("*.png")):
                        archive.write(file, f"faces/{file.relative_to(tmp_path / 'inside')}")
                    archive.writestr("__MACOSX/faces/._1.png", "x")
        return path

    return make


@pytest.mark.parametrize(
    ("made", "name", "kind"),
    [
        ("folder", "faces", "folder"),
        ("csv", "fer2013.csv", "csv"),
        ("csv", "data.txt", "csv"),
        ("csv", "data", "csv"),
        ("semicolons", "data.csv", "csv"),
        ("gzip", "fer2013.csv.gz", "csv"),
        ("gzip", "data.bin", "csv"),
        ("zipped csv", "fer2013.csv.zip", "csv"),
        ("zipped csv", "archive.zip", "csv"),
        ("zipped pictures", "faces.zip", "pictures"),
        ("zipped pictures", "faces.dat", "pictures"),
        ("arrays", "faces.npz", "arrays"),
        ("arrays", "faces.zip", "arrays"),
        ("experiment", "x.yaml", "experiment"),
        ("experiment", "x.txt", "experiment"),
        ("experiment", "x", "experiment"),
    ],
)
def test_what_a_file_holds_decides(make, made, name, kind):
    assert recognise(make(made, name)) == kind


@pytest.mark.parametrize(
    "made",
    ["folder", "csv", "zipped csv", "zipped pictures", "arrays", pytest.param("experiment", marks=pytest.mark.slow)],
)
def test_every_kind_loads(make, made):
    path = make(made, "given")
    with open_data(str(path)) as given:
        bundle = load_source_splits(given.config, image_size=16)
        assert given.path == path
        assert path in given.list_read()
    assert len(bundle.labels) >= 2
    assert len(bundle.train)


def test_a_folder_with_a_csv_of_fer2013_is_that_csv(make, tmp_path):
    (tmp_path / "fer").mkdir()
    path = make("csv", "fer/fer2013.csv")
    assert recognise(tmp_path / "fer") == "csv"
    with open_data(tmp_path / "fer") as given:
        assert given.csv == path


@pytest.mark.parametrize("name", ["train.csv", "fer2013.csv.gz", "fer2013/fer2013.csv"])
def test_class_folders_beside_a_csv_without_pixels_are_read_and_the_csv_is_counted(make, tmp_path, name):
    folder = make("folder", "faces")
    (folder / name).parent.mkdir(exist_ok=True)
    text = b"file,label\nhappy/1.png,happy\n"
    (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert recognise(folder) == "folder"
    for source in ("folder", "fer2013"):
        bundle = load_source_splits(DataConfig(source=source, path=str(folder)), image_size=16)
        assert len(bundle.train) == 2
        assert [reason.first for reason in bundle.reading.left_out] == [[name]]


def test_of_several_csvs_in_a_folder_the_first_with_pixels_is_read_and_the_others_are_named(make, tmp_path):
    (tmp_path / "fer").mkdir()
    path = make("csv", "fer/train.csv")
    (tmp_path / "fer/fer2013.csv").write_text("file,label\na.png,1\n")
    with open_data(tmp_path / "fer") as given:
        assert given.csv == path
        (note,) = given.notes
        assert note.startswith("fer2013.csv beside train.csv was not read")
        assert note in load_inspected(given).notes


def test_a_train_csv_and_a_labelled_test_csv_are_two_splits(tmp_path):
    """As Kaggle's competition has them; leaks between them are looked for, and the test split is what is evaluated."""
    lines = [f"{n % 7},{' '.join([str(n)] * 2304)}" for n in range(21)]
    (tmp_path / "train.csv").write_text("\n".join(["emotion,pixels", *lines]))
    (tmp_path / "test.csv").write_text("\n".join(["emotion,pixels", *lines[:7]]))
    with open_data(tmp_path) as given:
        found = load_inspected(given)
    assert {split.name: len(split) for split in found.splits} == {"Training": 21, "test": 7}
    held, _, _ = load_in_memory_splits(tmp_path, SimpleNamespace(aspect="crop", image_size=48))
    assert {name: len(split) for name, split in held.items()} == {"test": 7, "train": 21}
    # Of a csv that is named itself its own rows count.
    held, _, _ = load_in_memory_splits(tmp_path / "train.csv", SimpleNamespace(aspect="crop", image_size=48))
    assert {name: len(split) for name, split in held.items()} == {"all": 21}
    (tmp_path / "test.csv").write_text("\n".join(["pixels", "1 2"]))
    with open_data(tmp_path) as given:
        assert given.csv == tmp_path / "train.csv"


def test_a_folder_whose_only_csv_has_no_pixels_is_told_its_columns(tmp_path):
    (tmp_path / "fer2013.csv").write_text("file,label\na.png,1\n")
    with open_data(tmp_path) as given, pytest.raises(DataError, match="line 1: found the columns file, label"):
        load_source_splits(given.config, image_size=16)


@pytest.mark.parametrize("zipped", [None, "faces", "."])
def test_pictures_beside_a_csv_of_fer2013_are_neither_read_nor_dropped(make, tmp_path, zipped):
    path = make("folder", "faces")
    make("csv", "faces/fer2013.csv")
    if zipped:
        path = Path(
            shutil.make_archive(str(tmp_path / "both"), "zip", tmp_path / zipped, "." if zipped == "faces" else "faces")
        )
    with (
        pytest.raises(
            DataError, match=r"fer2013\.csv.*and pictures.*happy/1\.png.*expected one of them.*[Nn]ame the csv"
        ) as caught,
        open_data(path),
    ):
        pass
    assert str(caught.value).startswith(str(path))
    assert "dlfer-" not in str(caught.value)


def test_of_a_csv_of_fer2013_that_an_experiment_names_the_pictures_beside_it_are_counted(make):
    path = make("folder", "faces")
    make("csv", "faces/fer2013.csv")
    bundle = load_source_splits(DataConfig(source="fer2013", path=str(path)), image_size=16)
    assert [
        note
        for note in bundle.notes
        if note.startswith("2 pictures in folders beside fer2013.csv were not read (happy/1.png")
    ]


def test_of_an_experiment_its_finetune_data_counts(make):
    with open_data(make("experiment", "x.yaml")) as given:
        assert (given.config.source, given.image_size) == ("synthetic_faces", 32)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(30), "a single picture or video.*dlfer predict"),
        ("a.npy", b"\x93NUMPY" + bytes(80), r"one array \(.npy\)"),
        ("a.txt", b"my notes, and more", "line 1: found 'my notes, and more'"),
        ("a", b"", "line 1: found ''"),
        ("a.tar", bytes(257) + b"ustar" + bytes(300), "a tar archive"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(30), "a 7-Zip archive"),
        ("a.zip", b"PK\3\4" + bytes(30), "cut short or damaged"),
        ("a.parquet", b"PAR1" + bytes(30), "a Parquet file"),
        ("a.json", b'{"a": 1}', "JSON"),
    ],
)
def test_anything_else_is_named_with_what_was_expected(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=message) as caught:
        recognise(tmp_path / name)
    assert name in str(caught.value)


def test_what_is_not_there_or_a_model_is_told(tmp_path):
    with pytest.raises(MissingDataError, match="there is no such file or folder"):
        recognise(tmp_path / "none")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match="the folder of a run or a model"):
        recognise(tmp_path)


def test_a_zip_of_something_else_and_a_bomb_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.md", "hello")
    with pytest.raises(DataError, match=r"a zip archive with readme\.md"):
        recognise(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("happy/1.png", bytes(10_000_000))
    monkeypatch.setattr("dlfer.data.given.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(DataError, match=r"GB unpacked, found .* GB free"), open_data(tmp_path / "b.zip"):
        pass


def test_a_zip_that_leaves_its_folder_writes_nothing_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../escaped.png", "x")
        archive.writestr("/absolute.png", "x")
    with open_data(tmp_path / "a.zip") as given:
        assert {path.name for path in given.list_read()[-1].iterdir()} == {"escaped.png", "absolute.png"}
    assert not (tmp_path.parent / "escaped.png").exists()


def test_problems_in_a_zip_name_the_zip(make, tmp_path):
    path = make("zipped pictures", "faces.zip")
    with pytest.raises(DataError, match=r"faces\.zip/x: broken") as caught, open_data(path) as given:
        raise DataError(f"{given.config.path}/x: broken")
    assert "dlfer-" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "split"),
    [("test", "test"), ("PrivateTest", "test"), ("publictest", "validation"), ("Training", "train"), (None, None)],
)
def test_splits_have_two_names(word, split):
    assert parse_split(word) == split


def test_other_splits_are_refused():
    with pytest.raises(
        UserError, match=r"--split dev: expected test or validation .of FER2013 also PrivateTest, PublicTest"
    ):
        parse_split("dev", ("test", "validation"))
