"""FER2013 in each of its layouts, and each kind of damage to a csv."""

from __future__ import annotations

import gzip
import zipfile

import numpy as np
import pytest
from PIL import Image

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig, LabelsConfig
from dlfer.data import fer2013
from dlfer.data.fer2013 import load_fer2013, load_fer2013_splits, load_fer2013_usage
from dlfer.errors import DataError, MissingDataError, ModelError

USAGES = ("Training", "PublicTest", "PrivateTest")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "cache"))


def _pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, 2304)


def _text(row: int) -> str:
    return " ".join(map(str, _pixels(row)))


def _write_csv(path, num_rows: int = 21, header: str = "emotion,pixels,Usage", replace: dict[int, str] | None = None):
    """Write rows with label row % 7 and Usage row // 7; `replace` gives the text of single rows."""
    rows = [f"{row % 7},{_text(row)},{USAGES[row // 7 % 3]}" for row in range(num_rows)]
    for row, text in (replace or {}).items():
        rows[row] = text
    path.write_text("\n".join([header, *rows, ""]))
    return path


def _config(path, **keys) -> DataConfig:
    return DataConfig(source="fer2013", path=str(path), **keys)


@pytest.mark.parametrize("header", ["emotion,pixels,Usage", "emotion, Usage, pixels"])
def test_official_parts_come_with_their_pixels_targets_and_ids(tmp_path, header):
    path = _write_csv(tmp_path / "icml_face_data.csv")
    if header.endswith("pixels"):  # icml_face_data.csv: spaces in the header, another order
        lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
        path.write_text("\n".join([header, *(f"{code}, {usage},{text}" for code, text, usage in lines)]))
    bundle = load_fer2013(_config(path))
    assert bundle.labels == FER2013_LABELS
    for place, split in enumerate((bundle.train, bundle.validation, bundle.test)):
        assert split.name == USAGES[place]
        assert split.targets.tolist() == list(range(7))
        assert split.ids[3] == f"{USAGES[place]}/{7 * place + 3}"
        assert np.array_equal(split.images[3, ..., 0].ravel(), _pixels(7 * place + 3))


def test_a_csv_without_private_rows_has_no_test(tmp_path):
    bundle = load_fer2013(_config(_write_csv(tmp_path / "fer2013.csv", 14)))
    assert bundle.test is None
    assert len(bundle.validation) == 7


def test_a_folder_with_the_csv_will_do(tmp_path):
    _write_csv(tmp_path / "fer2013.csv", 14)
    assert len(load_fer2013(_config(tmp_path)).train) == 7


def test_quoted_fields_windows_lines_and_a_mark_of_order_are_read(tmp_path):
    path = tmp_path / "fer2013.csv"
    rows = [f'"{row % 7}","{_text(row)}","Training"' for row in range(7)]
    path.write_bytes("\r\n".join(["\ufeffemotion,pixels,Usage", *rows]).encode("utf-8"))
    assert np.array_equal(load_fer2013(_config(path)).train.images[6, ..., 0].ravel(), _pixels(6))


def test_packed_train_csv_without_usage_is_joined_by_packed_test_csv(tmp_path):
    text = "\n".join(["emotion,pixels", *[f"{i % 7},{_text(i)}" for i in range(14)]])
    for name in ("train.csv.gz", "test.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    bundle = load_fer2013(_config(tmp_path))
    assert (len(bundle.train), bundle.validation, len(bundle.test)) == (14, None, 14)
    assert bundle.notes == (
        "test.csv.gz does not distinguish PublicTest and PrivateTest; all of it is the test split.",
    )


def test_a_csv_of_validation_beside_train_csv_is_not_passed_over_in_silence(tmp_path):
    text = "\n".join(["emotion,pixels", *[f"{i % 7},{_text(i)}" for i in range(14)]])
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text(text)
    (note,) = load_fer2013(_config(tmp_path)).notes
    assert note.startswith("val.csv beside train.csv was not read: write the rows of all splits into one csv")


def test_another_csv_of_the_whole_in_the_same_folder_is_not_passed_over_in_silence(tmp_path):
    for name in ("fer2013.csv", "train.csv"):
        _write_csv(tmp_path / name)
    (note,) = load_fer2013(_config(tmp_path)).notes
    assert note == "train.csv beside fer2013.csv was not read; to read another file, name it in data.path."
    assert load_fer2013(_config(tmp_path / "fer2013.csv")).notes == ()


def test_train_csv_is_joined_by_test_csv(tmp_path):
    train = [f"{row % 7},{_text(row)}" for row in range(7)]
    (tmp_path / "train.csv").write_text("\n".join(["emotion,pixels", *train]))
    bundle = load_fer2013(_config(tmp_path / "train.csv"))
    assert (bundle.train.name, bundle.validation, bundle.test) == ("Training", None, None)
    (tmp_path / "test.csv").write_text("\n".join(["pixels", _text(1)]))
    bundle = load_fer2013(_config(tmp_path))
    assert bundle.test is None
    assert "no column emotion" in bundle.notes[0]
    (tmp_path / "test.csv").write_text("\n".join(["emotion,pixels", *train[:3]]))
    bundle = load_fer2013(_config(tmp_path))
    assert bundle.test.ids.tolist() == ["test/0", "test/1", "test/2"]
    assert "does not distinguish PublicTest and PrivateTest" in bundle.notes[0]


def _write_folders(root, names: dict[str, str]):
    """Write one image per class into each split of `names` (split -> file name)."""
    for split, name in names.items():
        for place, label in enumerate(("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            pixels = np.full((48, 48), 10 * place, np.uint8)
            Image.fromarray(pixels).save(root / split / label / name)


def test_folders_give_the_official_parts_of_their_file_names(tmp_path):
    _write_folders(tmp_path, {"train": "Training_1.jpg", "test": "PublicTest_2.jpg"})
    _write_folders(tmp_path, {"test": "PrivateTest_3.jpg"})
    bundle = load_fer2013(_config(tmp_path))
    assert [split.name for split in (bundle.train, bundle.validation, bundle.test)] == list(USAGES)
    assert bundle.labels == FER2013_LABELS
    assert bundle.test.images.shape == (7, 48, 48, 1)
    by_id = dict(zip(bundle.test.ids.tolist(), bundle.test.targets.tolist(), strict=True))
    assert by_id["test/neutral/PrivateTest_3.jpg"] == FER2013_LABELS.index("Neutral")
    assert by_id["test/sad/PrivateTest_3.jpg"] == FER2013_LABELS.index("Sad")


def test_folders_whose_names_tell_nothing_keep_their_parts(tmp_path):
    _write_folders(tmp_path, {"train": "im0.png", "test": "im0.png"})
    bundle = load_fer2013(_config(tmp_path, labels=LabelsConfig(drop=("disgust",))))
    assert bundle.validation is None
    assert len(bundle.test) == 6
    assert bundle.labels == tuple(label for label in FER2013_LABELS if label != "Disgust")
    assert "do not distinguish" in bundle.notes[-1]


BAD_ROWS = {
    "short": (
        f"3,{' '.join(_text(2).split()[:-3])},Training",
        "expected 2304 pixel values, found 2301. The row is cut",
    ),
    "long": (f"3,{_text(2)} 7,Training", "found 2305. The row is too long"),
    "not a number": (f"3,x{_text(2)[1:]},Training", r"whole numbers 0\.\.255, found 'x.*' as value 1;"),
    "pixel 256": (f"3,256 {' '.join(_text(2).split()[1:])},Training", "found '256' as value 1;"),
    "negative": (f"3,{' '.join(_text(2).split()[1:])} -1,Training", "found '-1' as value 2304;"),
    "label 9": (f"9,{_text(2)},Training", r"expected a label 0\.\.6, found '9'"),
    "label happy": (f"happy,{_text(2)},Training", r"expected a label 0\.\.6, found 'happy'"),
    "usage": (f"3,{_text(2)},Holdout", "expected a Usage of Training, PublicTest, PrivateTest, found 'Holdout'"),
    "fields": (f"3,{_text(2)}", "expected 3 fields, found 2"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_or_skipped_and_counted(tmp_path, kind):
    text, message = BAD_ROWS[kind]
    path = _write_csv(tmp_path / "fer2013.csv", replace={2: text})
    with pytest.raises(DataError, match=rf"fer2013\.csv line 4: .*{message}") as caught:
        load_fer2013(_config(path))
    assert "skip_unreadable" in str(caught.value)
    bundle = load_fer2013(_config(path, skip_unreadable=True))
    assert bundle.train.ids.tolist() == [f"Training/{row}" for row in (0, 1, 3, 4, 5, 6)]
    assert "1 of 21 rows were left out; the first: line 4" in bundle.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("emotion,pixels,Usage\n", "no readable rows"),
        (
            "emotion,pixels,Usage, USAGE\n",
            r"line 1: found the column USAGE more than once .columns 3 and 4.*expected.*once",
        ),
        ("emotion,Emotion,pixels,Usage\n", r"line 1: found the column Emotion more than once"),
        ('emotion,pixels,"pixels",Usage\n', r"line 1: found the column pixels more than once .columns 2 and 3"),
        ("\n \nlabel,pixels,Usage\n", r"line 3: found the columns label"),
        ("\n\n", "the file is empty"),
        ("", r"the file is empty, expected a header with emotion, pixels and Usage; download it again\.$"),
        ("path,label\na.png,1\n", "A list of files is not read: move each image into a folder of its label"),
        ("filename,emotion\na.png,1\n", "A list of files is not read"),
        ("label,pixel_values,split\n1,2,Training\n", "Rename the columns, if they hold the same"),
        ("emotion,pixels\n1,2 3\n", r"Without Usage, name the files train\.csv and test\.csv"),
        ("emotion,Usage\n1,Training\n", r"line 1: found the columns emotion, Usage; .*missing: pixels"),
        ("emotion,pixels\n", "missing: usage"),
        ('emotion,pixels,Usage\n0,"' + "1 " * 200_000, "not a csv"),
    ],
)
def test_a_file_that_is_no_fer2013_csv_is_refused(tmp_path, text, message):
    (tmp_path / "fer2013.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_fer2013(_config(tmp_path / "fer2013.csv"))


def test_blank_lines_before_the_header_are_passed_over_and_lines_are_counted_with_them(tmp_path):
    path = _write_csv(tmp_path / "fer2013.csv", replace={2: "1,2 3,Training"})
    path.write_text("\n   \n" + path.read_text().replace(",", ";"))
    with pytest.raises(DataError, match="line 6: expected 2304 pixel values, found 2"):
        load_fer2013(_config(path))
    assert len(load_fer2013(_config(path, skip_unreadable=True)).train) == 6


def test_a_csv_whose_rows_are_all_wrong_names_the_first_problem_and_their_number(tmp_path):
    (tmp_path / "some.csv").write_text("emotion,pixels,Usage\n" + "1,2 3,Training\n" * 3)
    with pytest.raises(
        DataError, match=r"none of the 3 rows can be read; the first: line 2: expected 2304.*found 2"
    ) as caught:
        load_fer2013_splits(tmp_path / "some.csv")
    assert "skip_unreadable" not in str(caught.value)


def test_a_csv_without_training_rows_is_refused(tmp_path):
    rows = "\n".join(f"0,{_text(row)},PublicTest" for row in range(2))
    (tmp_path / "fer2013.csv").write_text(f"emotion,pixels,Usage\n{rows}\n")
    with pytest.raises(DataError, match="no rows of Usage Training"):
        load_fer2013(_config(tmp_path))


@pytest.mark.parametrize("name", ["fer2013.csv", "empty"])
def test_missing_data_tells_where_to_get_it_and_what_to_expect(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match=r"Kaggle.*300 MB.*f8428a1edbd21e88f42c73edd2a14f95"):
        load_fer2013(_config(tmp_path / name))


def test_one_usage_is_read_in_the_labels_of_a_model(tmp_path):
    path = _write_csv(tmp_path / "fer2013.csv")
    labels = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
    split = load_fer2013_usage(path, "PrivateTest", labels=labels)
    assert [labels[target] for target in split.targets] == [label.lower() for label in FER2013_LABELS]
    assert split.ids[0] == "PrivateTest/14"
    assert len(load_fer2013_usage(path, None)) == 21
    with pytest.raises(ModelError, match="labels differ"):
        load_fer2013_usage(path, "PrivateTest", labels=("cat", "dog"))


def test_a_usage_without_rows_is_refused_with_what_is_there(tmp_path):
    path = _write_csv(tmp_path / "fer2013.csv", 14)
    with pytest.raises(DataError, match=r"no rows of Usage 'PrivateTest'.*PublicTest \(7\), Training \(7\)"):
        load_fer2013_usage(path, "PrivateTest")


def test_the_cache_gives_the_same_and_is_keyed_by_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(fer2013, "_CACHE_FROM_BYTES", 0)
    path = _write_csv(tmp_path / "fer2013.csv", replace={2: "9,,Training"})
    first = load_fer2013(_config(path, skip_unreadable=True))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(fer2013, "read_csv", None)  # a second parsing would fail
        second = load_fer2013(_config(path, skip_unreadable=True))
    assert np.array_equal(first.train.images, second.train.images)
    assert first.train.ids.tolist() == second.train.ids.tolist()
    assert first.notes == second.notes
    with pytest.raises(DataError, match="line 4"):  # strict reading does not take the lenient one's result
        load_fer2013(_config(path))
    _write_csv(path, 14)
    assert load_fer2013(_config(path)).test is None


def test_a_damaged_cache_is_read_anew_and_an_unwritable_one_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(fer2013, "_CACHE_FROM_BYTES", 0)
    path = _write_csv(tmp_path / "fer2013.csv")
    load_fer2013(_config(path))
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:5000])
    assert len(load_fer2013(_config(path)).train) == 7
    monkeypatch.setenv("DLFER_CACHE", str(path))  # a file where a folder is wanted
    assert "could not be kept" in load_fer2013(_config(path)).notes[0]


def test_unreadable_files_of_folders_are_skipped_and_counted(tmp_path):
    _write_folders(tmp_path, {"train": "a.png", "test": "a.png"})
    for label in ("angry", "sad"):
        (tmp_path / "train" / label / "b.png").write_text("no image")
    bundle = load_fer2013(_config(tmp_path, skip_unreadable=True))
    assert len(bundle.train) == 7
    assert any("2 of 16 images could not be read" in note for note in bundle.notes)


def test_all_usages_are_parts_to_be_looked_at_and_bad_rows_are_told(tmp_path):
    path = _write_csv(tmp_path / "some.csv", 21, replace={2: "9,1 2,Training", 20: f"3,{_text(20)},PublicTest"})
    splits, reading = load_fer2013_splits(path)
    assert [(split.name, len(split)) for split in splits] == [("Training", 6), ("PublicTest", 8), ("PrivateTest", 6)]
    assert splits[1].ids[-1] == "PublicTest/20"
    assert reading.num_rows == 21
    assert len(reading.unreadable) == 1
    assert reading.unreadable[0].startswith("some.csv line 4: expected a label 0..6, found '9'")
    assert load_fer2013(_config(path, skip_unreadable=True)).reading == reading


def test_rows_without_usage_are_one_part_to_be_looked_at(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("\n".join(["emotion,pixels", *(f"{row},{_text(row)}" for row in range(3))]))
    (split,), reading = load_fer2013_splits(path)
    assert (split.name, split.ids.tolist(), reading.num_rows) == ("all", ["all/0", "all/1", "all/2"], 3)
    with pytest.raises(MissingDataError, match="Kaggle"):
        load_fer2013_splits(tmp_path / "none.csv")


def test_a_csv_without_label_0_says_that_it_may_be_shifted(tmp_path):
    path = _write_csv(
        tmp_path / "fer2013.csv", replace={row: f"1,{_text(row)},{USAGES[row // 7]}" for row in (0, 7, 14)}
    )
    assert any("no row has the label 0 (Angry)" in note for note in load_fer2013(_config(path)).notes)
    assert load_fer2013(_config(_write_csv(tmp_path / "whole.csv"))).notes == ()


@pytest.mark.parametrize("packed", ["gz", "zip"])
def test_packed_csvs_are_read_and_rows_are_counted(tmp_path, packed):
    path = _write_csv(tmp_path / "fer2013.csv", replace={3: "3,1 2 3,Training"})
    name = tmp_path / f"fer2013.csv.{packed}"
    if packed == "gz":
        name.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with zipfile.ZipFile(name, "w") as archive:
            archive.write(path, "fer2013.csv")
    path.unlink()
    reading = load_fer2013(_config(tmp_path, skip_unreadable=True)).reading.as_record()
    assert (reading.what, reading.seen, reading.used) == ("rows", 21, 20)
    assert [(reason.n, reason.first) for reason in reading.left_out] == [(1, [f"fer2013.csv.{packed} line 5"])]
