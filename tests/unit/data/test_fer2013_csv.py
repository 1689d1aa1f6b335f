"""The fast way through a csv gives and refuses what csv.reader and one value at a time do."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from dlfer.config.sections import DataConfig
from dlfer.data.fer2013 import load_fer2013
from dlfer.data.fer2013_csv import (
    _iterate_records,
    _parse_pixels,
    _parse_plain_pixels,
    describe_unread_columns,
    read_csv,
)
from dlfer.errors import DataError
from dlfer.experiment.audit import inspect_data

PIXELS = np.random.default_rng(0).integers(0, 256, 2304)
PLAIN = " ".join(map(str, PIXELS))


def test_pixels_as_usual_are_those_of_one_value_at_a_time():
    assert _parse_plain_pixels(PLAIN) == _parse_pixels(PLAIN) == PIXELS.astype(np.uint8).tobytes()


def replace_first(token: str) -> str:
    return f"{token} {PLAIN.split(' ', 1)[1]}"


@pytest.mark.parametrize(
    "text",
    [
        # Numbers that int16 takes for 100, in as many digits as can be.
        *(replace_first(str(100 + turns * 65536)) for turns in (1, 2, 2**48, 2**80)),
        *map(replace_first, ("256", "32868", "007", "+7", "-0", "1e2", "1.0", "0x7", "\u0663", "1_0", "")),
        PLAIN.replace(" ", "  ", 1),
        PLAIN.replace(" ", "\t", 1),
        PLAIN.rsplit(" ", 1)[0],
        PLAIN + " 1",
        "",
    ],
)
def test_what_is_written_otherwise_is_left_to_the_careful_way(text):
    assert _parse_plain_pixels(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "a,b,c\n1,2,3\n",
        "a,b,c\r\n1,2,3\r\n\r\n4,5,6",
        "a,b\r1,2\r",
        "a,,b,\n,\n \n\n",
        'a,b\n1,2\n3,"4,5"\n6,7\n',
        'a,b\n1,2"3\n',
        "",
    ],
)
def test_records_and_their_lines_are_those_of_csv_reader(text):
    reader = csv.reader(io.StringIO(text, newline=""))
    expected = [(reader.line_num, fields) for fields in reader]
    assert list(_iterate_records(io.StringIO(text, newline=""), "some.csv")) == expected


def test_odd_spacing_is_read_and_a_bad_row_after_a_quoted_one_is_named(tmp_path):
    path = tmp_path / "some.csv"
    rows = [f"1, {PLAIN} ,Training", f'2,"{PLAIN}",Training', f"3,{replace_first('256')},Training"]
    path.write_text("\n".join(["emotion,pixels,Usage", *rows]))
    rows = read_csv(path, skip_unreadable=True, usage=None)
    assert rows.codes.tolist() == [1, 2]
    assert np.array_equal(rows.pixels.reshape(2, -1), [PIXELS, PIXELS])
    assert rows.skipped[0].startswith("line 4: expected pixel values that are whole numbers 0..255, found '256'")
    with pytest.raises(DataError, match=r"some\.csv line 4: "):
        read_csv(path, skip_unreadable=False, usage=None)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("row", [f'2,"{PLAIN},Training', f'"2,{PLAIN},Training', f'2,{PLAIN},"Training'])
def test_a_quotation_mark_that_is_not_closed_costs_its_own_row_only(tmp_path, row, end):
    path = tmp_path / "some.csv"
    good = [f"{code},{PLAIN},{usage}" for code, usage in enumerate(["Training", "PublicTest", "PrivateTest"])]
    path.write_text((end or "\n").join(["emotion,pixels,Usage", good[0], row, *good[1:], row]) + end, newline="")
    with pytest.raises(DataError, match=r"some\.csv line 3: found a quotation mark that is not closed on its line"):
        read_csv(path, skip_unreadable=False, usage=None)
    rows = read_csv(path, skip_unreadable=True, usage=None)
    assert rows.usages.tolist() == ["Training", "PublicTest", "PrivateTest"]
    assert [text.split(":")[0] for text in rows.skipped] == ["line 3", "line 6"]
    assert rows.rows.tolist() == [0, 2, 3]


def test_a_quotation_mark_that_is_not_closed_in_the_header_is_named(tmp_path):
    (tmp_path / "some.csv").write_text(f'emotion,"pixels,Usage\n1,{PLAIN},Training\n')
    with pytest.raises(DataError, match=r"some\.csv line 1: found a quotation mark that is not closed"):
        read_csv(tmp_path / "some.csv", skip_unreadable=True, usage=None)


def test_an_endless_field_is_refused_with_its_line(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text(f"emotion,pixels,Usage\n1,{PLAIN},Training\n2,{'1 ' * 100_000},Training\n")
    with pytest.raises(DataError, match=r"some\.csv line 3: not a csv \(field larger than field limit") as caught:
        read_csv(path, skip_unreadable=True, usage=None)
    assert "skip_unreadable" not in str(caught.value)


def _write_codes(path, codes, delimiter=",", encoding="utf-8"):
    rows = [delimiter.join((str(code), PLAIN, "Training")) for code in codes]
    path.write_bytes("\n".join([delimiter.join(("emotion", "pixels", "Usage")), *rows]).encode(encoding))
    return path


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "codes", [range(1, 8), [*range(8)] * 3, ["happy", "sad", "happy"], ["neutral"] * 3, [10, 20, 30], [-1, 0, 1, -1]]
)
def test_another_code_is_explained_and_never_skipped(tmp_path, codes, skip):
    with pytest.raises(DataError, match=r"not in FER2013's code.*expected 0 Angry.*6 Neutral") as caught:
        read_csv(_write_codes(tmp_path / "some.csv", codes), skip_unreadable=skip, usage=None)
    assert "skip_unreadable" not in str(caught.value)


def test_a_single_wrong_label_is_a_fault_of_its_row(tmp_path):
    path = _write_codes(tmp_path / "some.csv", [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 9, 3])
    rows = read_csv(path, skip_unreadable=True, usage=None)
    assert (len(rows.codes), len(rows.skipped)) == (11, 1)


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_other_delimiters_and_encodings_and_numbers_with_a_point(tmp_path, delimiter, encoding):
    rows = read_csv(
        _write_codes(tmp_path / "some.csv", ["0.0", "6.0", 3], delimiter, encoding), skip_unreadable=False, usage=None
    )
    assert rows.codes.tolist() == [0, 6, 3]


@pytest.mark.parametrize("code", ["3", " 3 ", "3.0", "3,0", "3,00"])
@pytest.mark.parametrize("usage", ["Training", "training", " TRAINING "])
def test_labels_and_usages_as_programs_of_any_country_write_them(tmp_path, code, usage):
    (tmp_path / "a.csv").write_text(f"emotion;pixels;Usage\n{code};{PLAIN};{usage}\n")
    rows = read_csv(tmp_path / "a.csv", skip_unreadable=False, usage=None)
    assert (rows.codes.tolist(), rows.usages.tolist()) == ([3], ["Training"])


@pytest.mark.parametrize("usage", ["train", "Test", ""])
def test_another_name_of_a_usage_is_told_with_what_to_write(tmp_path, usage):
    (tmp_path / "a.csv").write_text(f"emotion,pixels,Usage\n3,{PLAIN},{usage}\n")
    with pytest.raises(
        DataError,
        match=r"expected a Usage of Training.*all rows use another name for this split, replace it by FER2013's",
    ):
        read_csv(tmp_path / "a.csv", skip_unreadable=False, usage=None)


@pytest.mark.parametrize(
    ("header", "encoding", "expected"),
    [
        ("emotion,pixels,Usage", "utf-8", None),
        (" Emotion; PIXELS ;usage;", "utf-16", None),
        ("emotion,pixels", "utf-8", None),
        ("emotion,pixels,split", "utf-8", "1 column (split). A column of splits is read only if it is named Usage"),
        ('"","emotion","Usage","pixels","name"', "utf-8", "1 column (name)."),
        ("emotion\tpixels\ta\tb\tUsage", "utf-16", "2 columns (a, b)."),
    ],
)
def test_columns_that_are_not_read_are_named(tmp_path, header, encoding, expected):
    path = tmp_path / "fer2013.csv"
    path.write_text(f"{header}\n", encoding=encoding)
    found = describe_unread_columns(path)
    if expected is None:
        assert found == ()
    else:
        assert found[0].startswith(f"fer2013.csv: not read: {expected}")
        assert ("one split" in found[0]) == ("split" in header)


def test_the_run_and_the_audit_say_which_columns_are_not_read(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("emotion,pixels,part\n" + "".join(f"{code},{PLAIN},Training\n" for code in range(7)))
    note = describe_unread_columns(path)[0]
    assert note in load_fer2013(DataConfig(source="fer2013", path=str(path))).notes
    assert note in inspect_data(path).notes
