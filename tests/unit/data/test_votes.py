"""Votes of annotators: reading, aligning by row or id, agreement and ceiling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dlfer.data.bundle import Split
from dlfer.data.votes import (
    align_votes,
    compute_agreement,
    compute_annotator_agreement,
    find_column,
    read_votes,
    score_votes,
)
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.metrics_record import CountedEstimate

PUBLISHED = (
    "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF\n"
    "Training,fer0000000.png,4,0,0,1,3,2,0,0,0,0\n"
    "Training,,0,0,0,0,0,0,0,0,2,8\n"
    "PublicTest,fer0028638.png,0,9,1,0,0,0,0,0,0,0\n"
    "PrivateTest,fer0032220.png,0,0,5,0,0,0,5,0,0,0\n"
)
LABELS = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")


def _write(tmp_path, text, name="fer2013new.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def _split(name, ids, targets=None):
    images = np.arange(len(ids), dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 1), np.uint8)
    return Split(name, images, np.zeros(len(ids), np.int64) if targets is None else np.array(targets), np.array(ids))


def test_the_published_file_is_read_with_the_rows_that_have_no_image_name(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    assert votes.columns[0] == "neutral"
    assert votes.columns[-1] == "NF"
    assert votes.counts.shape == (4, 10)
    assert votes.counts[1].tolist() == [0] * 8 + [2, 8]
    assert votes.usages.tolist() == ["Training", "Training", "PublicTest", "PrivateTest"]
    assert votes.ids is None


@pytest.mark.parametrize("num_rows", [4, None])
def test_rows_go_with_the_rows_of_the_csv_also_where_some_were_not_readable(tmp_path, num_rows):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    splits = [_split("Training", ["Training/1"]), _split("PrivateTest", ["PrivateTest/3"])]
    aligned = align_votes(votes, splits, num_rows)
    assert [values.tolist() for values in aligned] == [[[0] * 8 + [2, 8]], [[0, 0, 5, 0, 0, 0, 5, 0, 0, 0]]]


def test_a_csv_of_some_usages_takes_the_votes_of_those(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    (values,) = align_votes(votes, [_split("PrivateTest", ["PrivateTest/0"])], 1)
    assert values.tolist() == [[0, 0, 5, 0, 0, 0, 5, 0, 0, 0]]


NUMBERED = (
    "Usage,row,neutral,happiness,anger\nTraining,0,4,0,1\nTraining,1,0,7,0\nTraining,10,0,0,3\nPublicTest,11,9,0,0\n"
)


def _reorder(text, order):
    header, *rows = text.splitlines()
    return "\n".join([header, *(rows[place] for place in order)]) + "\n"


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_numbered_rows_are_matched_by_their_numbers_in_any_order(tmp_path, order):
    votes = read_votes(_write(tmp_path, _reorder(NUMBERED, order)))
    splits = [_split("Training", ["Training/2", "Training/0"]), _split("PublicTest", ["PublicTest/3"])]
    aligned = align_votes(votes, splits, 4)
    assert [values.tolist() for values in aligned] == [[[0, 0, 3], [4, 0, 1]], [[9, 0, 0]]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Training,10,", "Training,1,", "the row 1 occurs more than once in the column row"),
        ("Training,10,", "Training,,", "line 4: found '' in the column row, expected the number of a row"),
        ("Training,10,", "Training,-1,", "line 4: found '-1' in the column row"),
    ],
)
def test_a_wrong_number_of_a_row_is_refused(tmp_path, old, new, message):
    with pytest.raises(DataError, match=f"fer2013new.csv.* *{message}"):
        read_votes(_write(tmp_path, NUMBERED.replace(old, new)))


def test_votes_of_ferplus_in_another_order_than_published_are_refused(tmp_path):
    read_votes(_write(tmp_path, PUBLISHED))
    with pytest.raises(
        DataError, match=r"line 4: found the image fer0000000\.png after fer0028638\.png; .* Sort the rows"
    ):
        read_votes(_write(tmp_path, _reorder(PUBLISHED, [2, 1, 0, 3])))


@pytest.mark.parametrize(
    ("columns", "number"), [("neutral,happiness", "no column"), ("neutral,anger,Anger", "2 columns")]
)
def test_a_label_without_a_column_of_its_own_is_refused_with_their_number(tmp_path, columns, number):
    votes = read_votes(_write(tmp_path, f"{columns}\n{','.join('1' * len(columns.split(',')))}\n"))
    with pytest.raises(DataError, match=f"found {number} of votes for the label 'Angry'"):
        find_column(votes, "Angry")


def test_augmented_copies_have_no_votes(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    (values,) = align_votes(votes, [_split("Training", ["Training/0", "Training/0#1"])], 4)
    assert values[0].sum() == 10
    assert (values[1] == -1).all()
    split = _split("Training", ["Training/0", "Training/0#1"], [6, 6])
    assert score_votes(votes, [split], LABELS, 4).n == 1


def test_ids_go_before_rows(tmp_path):
    votes = read_votes(_write(tmp_path, "id,anger,joy\nhappy/a.png,1,2\nangry/b.png,3,0\n"))
    (values,) = align_votes(votes, [_split("train", ["angry/b.png", "angry/c.png"])])
    assert values.tolist() == [[3, 0], [-1, -1]]
    with pytest.raises(DataError, match=r"none of its 2 ids.*'x'"):
        align_votes(votes, [_split("train", ["x"])])


@pytest.mark.parametrize(
    ("ids", "num_rows", "message"),
    [
        (["Training/0", "Training/1", "Training/2"], 3, r"4 rows of votes, 2 of them of Usage Training, and 3 rows"),
        (["all/0"], 9, r"found 4 rows of votes.* and 9 rows of data"),
        (["Training/0", "Training/2"], 4, r"row 2 \(from 0\) is of Usage 'PublicTest'.*'Training/2'"),
        (["all/9"], None, r"the data has a row 9"),
        (["happy/a.png"], None, r"'happy/a.png' is not from one.*column id"),
    ],
)
def test_votes_that_do_not_fit_are_refused(tmp_path, ids, num_rows, message):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    with pytest.raises(DataError, match=message):
        align_votes(votes, [_split("Training", ids)], num_rows)


def test_rows_of_two_files_are_refused(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    with pytest.raises(DataError, match="comes from several"):
        align_votes(votes, [_split("Training", ["Training/0"]), _split("test", ["test/0"])], 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("emotion,pixels\n0,1 2\n", "line 1: found the columns emotion, pixels"),
        ("", "line 1"),
        ("neutral,fear\n", "no rows"),
        ("neutral,fear\n1,2\n1,x\n", "line 3: found 'x' as a number of votes"),
        ("neutral,fear\n-1,2\n", "line 2: found '-1'"),
        ("Usage,neutral,fear\nTraining,1\n", "line 2: found 2 fields, expected 3"),
        ('id,neutral,fear\n"a,1,2\nb,1,2\n"c",1,2\n', "line 2: found a field .* goes on to line 4"),
        ("id,neutral,fear\na.png,1,2\na.png,2,1\n", "the id 'a.png' occurs more than once"),
    ],
)
def test_damaged_files_are_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_votes(_write(tmp_path, text, "votes.csv"))


def test_votes_are_read_with_semicolons_in_utf_16(tmp_path):
    (tmp_path / "votes.csv").write_bytes("neutral;fear\n1;2\n".encode("utf-16"))
    assert read_votes(tmp_path / "votes.csv").counts.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("contents", "where"),
    [(b"neutral,fear\n1,\xf4\n", ""), (b"neutral,fear\n" + b"1" * 200_000, " line 2")],
)
def test_what_is_no_csv_is_refused(tmp_path, contents, where):
    (tmp_path / "votes.csv").write_bytes(contents)
    with pytest.raises(DataError, match=rf"votes\.csv{where}: not a csv"):
        read_votes(tmp_path / "votes.csv")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"none\.csv.*FERPlus"):
        read_votes(tmp_path / "none.csv")


def test_agreement_shares_out_ties():
    counts = np.array([[5, 3, 2], [4, 4, 2], [4, 4, 4], [0, 0, 10]])
    assert compute_agreement(counts, np.array([0, 1, 2, 0])).tolist() == [1, 0.5, pytest.approx(1 / 3), 0]
    assert compute_agreement(counts, np.array([1, 2, 0, 2])).tolist() == [0, 0, pytest.approx(1 / 3), 1]


def test_the_ceiling_is_that_of_leaving_each_voter_out_in_turn():
    counts = np.random.default_rng(0).multinomial(10, [0.5, 0.2, 0.2, 0.1], size=40)
    expected = []
    for row in counts:
        voters = list(itertools.chain.from_iterable([column] * n for column, n in enumerate(row)))
        chances = []
        for place, voter in enumerate(voters):
            others = voters[:place] + voters[place + 1 :]
            tally = [others.count(column) for column in range(4)]
            first = [column for column in range(4) if tally[column] == max(tally)]
            chances.append((voter in first) / len(first))
        expected.append(np.mean(chances))
    assert compute_annotator_agreement(counts) == pytest.approx(expected, abs=1e-12)


def test_a_single_voter_has_nobody_to_agree_with():
    assert np.isnan(compute_annotator_agreement(np.array([[1, 0]]))).all()
    assert compute_annotator_agreement(np.array([[2, 0], [1, 1]])).tolist() == [1, 0]


def test_scores_are_for_all_for_splits_and_for_labels(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    splits = [
        _split("Training", ["Training/0", "Training/1"], [6, 0]),
        _split("PublicTest", ["PublicTest/2"], [3]),
        _split("PrivateTest", ["PrivateTest/3"], [2]),
    ]
    found = score_votes(votes, splits, LABELS, 4)
    assert found.n == found.agreement.n == 4
    assert found.agreement.value == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert found.agreement.low < found.agreement.value < found.agreement.high
    assert found.splits["Training"].agreement.value == 0.5
    assert found.splits["PublicTest"].ceiling.value == pytest.approx(0.9)
    assert found.labels["Neutral"].value == 1
    assert found.labels["Disgust"] == CountedEstimate(n=0)
    contested = found.contested
    assert [image.id for image in contested] == ["Training/0", "PrivateTest/3", "Training/1", "PublicTest/2"]
    assert contested[0].share.value == 0.4
    assert contested[0].votes == {"neutral": 4, "sadness": 1, "anger": 3, "disgust": 2}
    assert contested[1].plurality == ["surprise", "fear"]


def test_a_label_that_nobody_could_vote_for_is_refused(tmp_path):
    votes = read_votes(_write(tmp_path, PUBLISHED))
    with pytest.raises(DataError, match="no column of votes for the label 'Bored'"):
        score_votes(votes, [_split("Training", ["Training/0"])], ("Bored", "Sad"), 4)
