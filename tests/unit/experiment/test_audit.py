"""`dlfer audit` on files: csv with and without Usage, class folders, experiments, and what it writes."""

from __future__ import annotations

import csv
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dlfer import cli
from dlfer.errors import DataError, MissingDataError, UserError
from dlfer.experiment.audit import AuditFiles, inspect_data
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.records import DuplicateCounts


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "cache"))


def _draw(seed: int, side: int = 48) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), side / 16)
    return np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)


def _rows() -> list[tuple[int, np.ndarray, str]]:
    """Return 14 rows, of which 3 in PublicTest have a duplicate in Training."""
    train = [(label, _draw(label), "Training") for label in range(7)]
    public = [(label, _draw(10 + label), "PublicTest") for label in range(7)]
    public[0] = (3, train[0][1], "PublicTest")
    public[1] = (1, train[1][1][:, ::-1], "PublicTest")
    public[2] = (2, np.clip(train[2][1] * 0.8 + 20, 0, 255).astype(np.uint8), "PublicTest")
    public[3] = (3, np.full((48, 48), 0, np.uint8), "PublicTest")
    return train + public


def _write_csv(path, rows, *, usage: bool = True):
    lines = ["emotion,pixels,Usage" if usage else "emotion,pixels"]
    for label, image, part in rows:
        lines.append(f"{label},{' '.join(map(str, image.ravel()))}" + (f",{part}" if usage else ""))
    path.write_text("\n".join(lines) + "\n")
    return path


def _read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_csv_is_audited_with_all_its_usages(tmp_path):
    found = inspect_data(_write_csv(tmp_path / "a.csv", _rows()))
    assert (found.num_images, found.distinct_images) == (14, 13)
    assert (found.duplicate_groups, found.conflicting_groups, found.constant_images) == (1, 1, 1)
    assert found.leaks == {"Training->PublicTest": DuplicateCounts(exact=1, augmented=0, any=3)}
    assert found.splits["PublicTest"].classes["Happy"] == 2


def test_a_csv_of_one_usage_or_of_none_is_one_split(tmp_path):
    rows = _rows()
    for usage, name in ((True, "PublicTest"), (False, "all")):
        found = inspect_data(_write_csv(tmp_path / f"{name}.csv", rows[7:] if usage else rows, usage=usage))
        assert list(found.splits) == [name]
        assert found.leaks == {}
        assert found.near_groups == (0 if usage else 3)


def test_one_row_is_enough(tmp_path):
    found = inspect_data(_write_csv(tmp_path / "a.csv", _rows()[:1]), files=AuditFiles(split=tmp_path / "s.csv"))
    assert (found.num_images, found.duplicate_groups) == (1, 0)
    assert _read(tmp_path / "s.csv") == [{"id": "Training/0", "split": "train"}]


def test_damaged_rows_are_counted_and_named_and_votes_still_fit(tmp_path):
    path = _write_csv(tmp_path / "a.csv", _rows())
    lines = path.read_text().splitlines()
    lines[3], lines[5] = "2,1 2 3,Training", lines[5].replace("4,", "x,", 1)
    path.write_text("\n".join(lines))
    votes = tmp_path / "votes.csv"
    columns = ("anger", "disgust", "fear", "happiness", "sadness", "surprise", "neutral")
    tallies = [[9 if label == column else 1 for column in range(7)] for label, _, _ in _rows()]
    votes.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in tallies)]))
    found = inspect_data(path, votes=votes)
    assert found.num_images == 12
    assert found.unreadable.n == 2
    assert "line 4" in found.unreadable.examples[0]
    assert "line 6" in found.unreadable.examples[1]
    assert found.leaks["Training->PublicTest"].any == 2
    assert (found.votes.agreement.value, found.votes.agreement.n) == (1.0, 12)
    votes.write_text("\n".join(votes.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="13 rows of votes, and 14 rows of data"):
        inspect_data(path, votes=votes)


def test_groups_and_a_split_without_leaks_are_written(tmp_path):
    rows = [(label, _draw(50 * label + row), "Training") for label in range(7) for row in range(10)]
    rows += [(label, image[:, ::-1], "PublicTest") for label, image, _ in rows[::3]]
    path = _write_csv(tmp_path / "a.csv", rows)
    inspect_data(path, files=AuditFiles(groups=tmp_path / "g.csv", split=tmp_path / "s.csv"))
    groups, split = _read(tmp_path / "g.csv"), _read(tmp_path / "s.csv")
    assert [row["id"] for row in groups] == [row["id"] for row in split]
    assert len(groups) == len(rows) == 94
    assert groups[0] == {"id": "Training/0", "split": "Training", "label": "Angry", "group": "0"}
    assert groups[70]["group"] == "0"
    assert len({row["group"] for row in groups}) == 70
    sides = {row["group"]: set() for row in groups}
    for group, part in zip(groups, split, strict=True):
        sides[group["group"]].add(part["split"])
    assert all(len(side) == 1 for side in sides.values())
    counts = {name: sum(row["split"] == name for row in split) for name in ("train", "validation", "test")}
    assert 14 <= counts["test"] <= 24
    assert 10 <= counts["validation"] <= 20
    assert sum(counts.values()) == 94


def _write_folder(root):
    for place, (part, label) in enumerate((p, c) for p in ("train", "test") for c in ("happy", "sad")):
        for row in range(3):
            side = 60 if row == 2 else 48
            image = Image.fromarray(_draw(10 * place + row, side)).convert("RGB" if row else "L")
            (root / part / label).mkdir(parents=True, exist_ok=True)
            image.save(root / part / label / f"im{row}.png")
    (root / "train" / "sad" / "im9.png").write_bytes(b"no image")
    Image.open(root / "train" / "happy" / "im1.png").save(root / "test" / "sad" / "im7.jpg", quality=80)


def test_class_folders_of_mixed_sizes_and_damaged_files_are_audited(tmp_path):
    _write_folder(tmp_path / "faces")
    found = inspect_data(tmp_path / "faces", files=AuditFiles(html=tmp_path / "a.html"))
    assert found.num_images == 13
    assert found.unreadable.n == 1
    assert "im9.png" in found.unreadable.examples[0]
    assert found.leaks["train->test"] == DuplicateCounts(exact=0, augmented=0, any=1)
    assert found.samples.near[0][1].id == "test/sad/im7.jpg"
    assert any("im9.png" in note for note in found.notes)
    assert "im9.png" in (tmp_path / "a.html").read_text()


def test_an_experiment_is_audited_in_the_splits_that_its_data_has(tmp_path):
    _write_csv(tmp_path / "fer2013.csv", _rows())
    file = tmp_path / "a.yaml"
    file.write_text(
        f"experiment: {{name: a}}\nfinetune: {{data: {{source: fer2013, path: {tmp_path}/fer2013.csv, protocol: resplit}}}}\n"
    )
    found = inspect_data(file)
    assert list(found.splits) == ["Training", "PublicTest"]
    assert found.leaks["Training->PublicTest"].any == 3


def test_arrays_whose_ids_recur_are_written_with_their_splits(tmp_path):
    images = np.stack([_draw(row) for row in range(8)])
    parts = {f"{name}_images": images[rows] for name, rows in (("train", slice(5)), ("test", slice(5, 8)))}
    np.savez(tmp_path / "a.npz", **parts, train_targets=[0, 1, 0, 1, 0], test_targets=[0, 1, 1],
             train_ids=list("abcde"), test_ids=list("abc"))  # fmt: skip
    files = AuditFiles(groups=tmp_path / "g.csv", split=tmp_path / "s.csv")
    assert inspect_data(tmp_path / "a.npz", files=files).leaks["train->test"].any == 0
    assert [row["id"] for row in _read(tmp_path / "s.csv")][4:6] == ["train/e", "test/a"]
    assert len({row["group"] for row in _read(tmp_path / "g.csv")}) == 8


def test_what_is_not_there_or_no_such_file_is_told(tmp_path):
    with pytest.raises(MissingDataError, match=r"none\.csv"):
        inspect_data(tmp_path / "none.csv")
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(UserError, match="found 'my notes', expected a folder"):
        inspect_data(tmp_path / "notes.txt")


def test_the_command_prints_sentences_and_writes_the_files(tmp_path, capsys):
    path = _write_csv(tmp_path / "a.csv", _rows())
    outputs = {option: tmp_path / f"{option}.out" for option in ("json", "html", "write-groups", "write-split")}
    options = [text for option, out in outputs.items() for text in (f"--{option}", str(out))]
    with pytest.raises(SystemExit) as stop:
        cli.main(["audit", str(path), *options])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert "3 of 7 images of PublicTest (42.9 %) have a duplicate in Training (1 an exact copy)." in printed.out
    assert all(str(out) in printed.err for out in outputs.values())
    assert AuditRecord.parse(json.loads(outputs["json"].read_text()), "a").leaks["Training->PublicTest"].exact == 1
    page = outputs["html"].read_text()
    assert page.count('src="data:image/png;base64,') >= 8
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert len(_read(outputs["write-groups"])) == len(_read(outputs["write-split"])) == 14
    for wrong in (["audit"], ["audit", "a.yaml", str(path)]):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2


HOSTILE = (
    *(b"caf\xe9.png", b"=1.png", b"@SUM(1).png", b"\t=2.png", b"a\x1b[2J.png", b"two\nlines.png"),
    *("a\u202eb.png".encode(), b"<script>alert(1)<.png", b"x" * 250 + b".png", b"a,b\"c'd.png"),
)
LABELS = (b"happy", b"=cmd|'x'!A1", b"caf\xe9", b"<b>bold</b>", b"a\x1b[31mred", b"-1")


def _write_hostile(root):
    for number, label in enumerate(LABELS):
        os.makedirs(os.fsencode(root) + b"/" + label)
        for row, name in enumerate(HOSTILE):
            # Some occur twice, so that pages and csv name them.
            seed = row if row < 3 and number < 2 else 100 * number + row
            picture = io.BytesIO()
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(picture, "PNG")
            with open(os.fsencode(root) + b"/" + label + b"/" + name, "wb") as file:
                file.write(picture.getvalue())


def test_hostile_names_and_labels_go_through_an_audit(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLFER_CACHE", str(tmp_path / "cache"))
    _write_hostile(tmp_path / "in")
    with open(b"in/happy/bad\xe9\x1b[31m.png", "wb") as file:
        file.write(b"no picture")
    code, out, err = call(
        *("audit", "in", "--json", "a.json", "--html", "a.html"),
        *("--write-groups", "g.csv", "--write-split", "s.csv"),
    )
    assert code == 0, err
    assert r"bad\xe9\x1b[31m.png" in out
    num_images = len(LABELS) * len(HOSTILE)
    for name in ("g.csv", "s.csv"):
        rows = list(csv.DictReader(io.StringIO((tmp_path / name).read_bytes().decode())))
        assert len(rows) == num_images
        assert not [row for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@", "\t"))]
        assert any(row["id"] == r"happy/caf\xe9.png" for row in rows)
        assert any(row["id"] == "'=cmd|'x'!A1/=1.png" for row in rows)
    page = (tmp_path / "a.html").read_bytes().decode()
    assert "<script>alert" not in page
    for text in (page, out, err, (tmp_path / "g.csv").read_bytes().decode()):
        assert not [character for character in text if character in "\x1b\u202e"]
    assert json.loads((tmp_path / "a.json").read_text())["num_images"] == num_images


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_an_audit_is_written_over_nothing_that_it_reads(call, tmp_path, monkeypatch, force):
    monkeypatch.chdir(tmp_path)
    _write_csv(tmp_path / "a.csv", _rows())
    _write_hostile(tmp_path / "in")
    (tmp_path / "votes.csv").write_text("votes")
    (tmp_path / "e.yaml").write_text(
        "experiment: {name: e}\nfinetune: {data: {source: fer2013, path: a.csv, votes: votes.csv}}\n"
    )
    (tmp_path / "hard").hardlink_to(tmp_path / "a.csv")
    (tmp_path / "soft").symlink_to(tmp_path / "in")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for given, out in (
        (("a.csv",), ("--json", "a.csv")),
        (("a.csv",), ("--html", "hard")),
        (("a.csv", "--votes", "votes.csv"), ("--write-groups", "votes.csv")),
        (("in",), ("--write-split", "in/happy/=1.png")),
        (("in",), ("--json", "soft/happy/=1.png")),
        (("e.yaml",), ("--json", "e.yaml")),
        (("e.yaml",), ("--json", "a.csv")),
        (("e.yaml",), ("--html", "votes.csv")),
    ):
        code, stdout, err = call("audit", *given, *out, *force)
        assert (code, stdout) == (2, "")
        assert " ".join(out) in err
        assert "never replaced" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_cannot_be_written_does_not_cost_the_others(call, tmp_path, monkeypatch):
    def fill(path, audit, images):
        raise OSError(28, "the disk is full", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dlfer.experiment.audit.write_audit_page", fill)
    _write_csv(tmp_path / "a.csv", _rows())
    code, out, err = call("audit", "a.csv", "--json", "a.json", "--html", "a.html", "--write-groups", "g.csv")
    assert code == 1
    assert "images" in out
    assert "not written: a.html: the disk is full" in err
    assert (tmp_path / "a.json").exists()
    assert (tmp_path / "g.csv").exists()
