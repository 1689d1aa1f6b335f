"""dlfer init: what it finds in folders, and that the file it writes is an experiment that loads its data."""

from __future__ import annotations

import shlex
import zipfile

import numpy as np
import pytest
from PIL import Image

from dlfer.cli import main
from dlfer.cli.check import check_data
from dlfer.cli.init import init
from dlfer.config.load import load_experiment
from dlfer.config.sections import DataConfig
from dlfer.data.sources import load_data, load_source_splits
from dlfer.data.starter import make_name, survey_folder, write_starter
from dlfer.errors import ConfigError, DataError, MissingDataError, UserError


@pytest.fixture
def draw(tmp_path):
    """Write images of random noise: draw({"train/happy": 3}) makes three files there."""
    rng = np.random.default_rng(0)

    def draw(folders, *, root="My Faces", size=(48, 48), name="im{}.png"):
        for folder, count in folders.items():
            target = tmp_path / root / folder
            target.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, size[::-1], dtype=np.uint8)
                Image.fromarray(pixels).save(target / name.format(number))
        return tmp_path / root

    return draw


def write(folder, tmp_path):
    path = write_starter(folder, tmp_path / "starter.yaml")
    config = load_experiment(path)
    stage = config.finetune
    return path.read_text(), config, load_data(stage.data, image_size=stage.image_size, balance=stage.balance)


def test_plain_class_folders_are_split(draw, tmp_path):
    folder = draw({"happiness": 30, "anger": 10})
    text, config, bundle = write(folder, tmp_path)
    assert "#   train: 40 images (anger 10, happiness 30)" in text
    assert "#   labels: Angry, Happy" in text
    assert config.experiment.name == "my_faces"
    assert (config.finetune.data.protocol, config.finetune.data.path) == ("resplit", str(folder))
    assert (config.finetune.balance, config.finetune.monitor) == ("sampler", "macro_f1")
    assert config.finetune.image_size == 48
    assert bundle.labels == ("Angry", "Happy")
    assert len(bundle.test) == 8


def test_the_imbalance_is_that_of_the_labels_and_not_of_the_folders(draw, tmp_path):
    text, config, _ = write(draw({"happy": 12, "Happy": 1, "sad": 12}), tmp_path)
    assert (config.finetune.balance, config.finetune.monitor) == ("none", "accuracy")
    assert "has 1.1 times the images" in text


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        (
            {"train/happy": 4, "train/sad": 4, "val/happy": 2, "val/fear": 2},
            "train has no image of Fear; a class needs",
        ),
        ({"happy": 1, "sad": 1}, "validation has no images, expected at least one"),
        ({"happy": 2, "sad": 2}, "validation has no images, expected at least one"),
        ({"train/happy": 1, "train/sad": 1, "test/sad": 2}, "validation has no images, expected at least one"),
        ({"happy": 3, "sad": 1}, None),
        ({"train/happy": 1, "train/sad": 2, "test/sad": 2}, None),
        ({"train/happy": 1, "train/sad": 1, "val/sad": 2}, None),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "arrays"])
def test_what_a_run_refuses_is_said_by_init_and_by_check(draw, tmp_path, folders, problem, kind):
    data = draw(folders)
    if kind == "arrays":
        bundle = load_source_splits(DataConfig(source="folder", path=str(data)), image_size=48)
        arrays = {
            f"{key}_{name}": getattr(split, name)
            for key, split in bundle.splits.items()
            for name in ("images", "targets")
        }
        data = tmp_path / "faces.npz"
        np.savez(data, labels=np.array(bundle.labels), **arrays)
    said = []
    path = write_starter(data, tmp_path / "starter.yaml", say=said.append)
    stage = load_experiment(path).finetune
    if problem is None:
        load_data(stage.data, image_size=48, balance=stage.balance)
        check_data(data)
        assert not any("refuse" in line for line in said)
        return
    with pytest.raises(DataError, match=f"data: {problem}"):
        load_data(stage.data, image_size=48, balance=stage.balance)
    assert f"will refuse these images: {problem}" in said[-1]
    with pytest.raises(DataError, match=f"will refuse this data: {problem}"):
        check_data(data)


def test_a_train_split_of_which_no_image_can_be_read_is_said(draw, tmp_path):
    folder = draw({"train/happy": 1, "train/sad": 1, "test/happy": 1, "test/sad": 1})
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    assert survey_folder(folder).remarks[-1].startswith("dlfer run will refuse these images: train has no images")


def test_a_class_without_rows_is_said_by_init_and_by_check_of_a_csv(tmp_path):
    rows = [f"{n % 6},{' '.join([str(n)] * 2304)},{'Training' if n < 12 else 'PublicTest'}" for n in range(18)]
    (tmp_path / "faces.csv").write_text("\n".join(["emotion,pixels,Usage", *rows]))
    said = []
    write_starter(tmp_path / "faces.csv", tmp_path / "starter.yaml", say=said.append)
    assert "dlfer run will refuse these images: train has no image of Neutral" in said[-1]
    with pytest.raises(DataError, match=r"faces\.csv: dlfer run will refuse this data: train has no image of Neutral"):
        check_data(tmp_path / "faces.csv")


def test_train_and_test_without_validation_select_on_a_tenth(draw, tmp_path):
    folder = draw({"train/a": 20, "train/b": 20, "test/a": 5, "test/b": 5})
    _, config, bundle = write(folder, tmp_path)
    assert (config.finetune.data.protocol, config.finetune.data.select_on) == ("official", 0.1)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (36, 4, 10)
    assert config.finetune.balance == "none"


def test_validation_is_taken_as_it_is_and_sizes_may_differ(draw, tmp_path):
    draw({"train/a": 6, "train/b": 6, "val/a": 3, "val/b": 3})
    folder = draw({"train/c": 6, "val/c": 3}, size=(120, 100))
    _, config, bundle = write(folder, tmp_path)
    assert (config.finetune.data.select_on, config.finetune.data.size) == (None, 48)
    assert bundle.train.images.shape == (18, 48, 48, 1)
    assert bundle.test is None


def test_names_of_fer2013_files_carry_the_official_split(draw, tmp_path):
    draw({"train/angry": 4, "train/happy": 4}, name="Training_{}.jpg")
    draw({"test/angry": 2}, name="PublicTest_{}.jpg")
    folder = draw({"test/happy": 2}, name="PrivateTest_{}.jpg")
    assert survey_folder(folder).source == "fer2013"
    assert "source: fer2013" in write_starter(folder, tmp_path / "a.yaml").read_text()


def test_odd_names_of_folders_make_a_file_that_loads(draw, tmp_path):
    folder = draw({"no": 12, "1e-3": 12, "a: [b": 12}, root="x: #y 'z'")
    text, config, bundle = write(folder, tmp_path)
    assert config.finetune.data.path == str(folder)
    assert set(bundle.labels) == {"no", "1e-3", "a: [b"}
    assert "no 12" in text


def test_a_name_from_any_folder(tmp_path):
    assert make_name(tmp_path / "RAF-DB (basic)") == "raf-db_basic"
    assert make_name(tmp_path / "表情") == "my_images"


def test_a_name_that_reads_as_a_variable_is_refused(draw, tmp_path):
    folder = draw({"happy": 3, "sad": 3}, root="my$faces")
    with pytest.raises(DataError, match=r"my\$faces: \$ in an experiment's path names an environment variable"):
        write_starter(folder, tmp_path / "x.yaml")
    assert not (tmp_path / "x.yaml").exists()


def test_an_existing_file_stays(draw, tmp_path):
    folder = draw({"a": 3, "b": 3})
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_starter(folder, tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_folders_that_are_no_data_set(draw, tmp_path):
    with pytest.raises(MissingDataError, match="there is no such folder"):
        survey_folder(tmp_path / "none")
    with pytest.raises(DataError, match="expected at least two class folders"):
        survey_folder(draw({"a": 3}, root="one"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        survey_folder(tmp_path / "empty")
    with pytest.raises(DataError, match="found test and no train split"):
        survey_folder(draw({"test/a": 3, "test/b": 3}, root="test alone"))
    folder = draw({"a": 1, "b": 1}, root="broken")
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="found no image that can be read"):
        survey_folder(folder)


@pytest.mark.parametrize("left", [20, 60, 900, 2000])
def test_pictures_that_are_cut_short_are_counted_and_named(draw, left):
    """20 bytes have no whole header; more have one, and fewer pixels than it says."""
    folder = draw({"happy": 5, "sad": 4})
    for name in ("sad/im1.png", "happy/im3.png"):
        contents = (folder / name).read_bytes()
        assert len(contents) > left
        (folder / name).write_bytes(contents[:left])
    found = survey_folder(folder)
    assert found.counts == {"train": {"happy": 4, "sad": 3}}
    assert "9 files seen, 7 used, 2 left out." in found.remarks
    assert any("2 (happy/im3.png, sad/im1.png)" in line for line in found.remarks)
    assert any(line.startswith("Training stops at an image that cannot be read. The first: ") for line in found.remarks)
    assert not any("were decoded" in line for line in found.remarks)


@pytest.mark.parametrize(("most", "pixels", "num"), [(4, 10**9, 3), (2000, 3 * 48 * 48, 3), (2000, 9 * 48 * 48, 9)])
def test_of_many_or_large_pictures_a_sample_is_decoded_and_that_is_said(draw, monkeypatch, most, pixels, num):
    monkeypatch.setattr("dlfer.data.starter._MAX_DECODED", most)
    monkeypatch.setattr("dlfer.data.starter._MAX_PIXELS", pixels)
    folder = draw({"happy": 5, "sad": 4})
    said = [line for line in survey_folder(folder).remarks if "were decoded" in line]
    sampled = [
        f"Only {num} of the 9 images were decoded, a sample; dlfer check {shlex.quote(str(folder))} decodes all."
    ]
    assert said == (sampled if num < 9 else [])


@pytest.mark.parametrize("name", ["fear", "no class"])
def test_an_empty_class_folder_is_left_out_as_the_message_says(draw, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    folder = draw({"happy": 3, "sad": 3, name: 0})
    with pytest.raises(DataError, match="holds no images") as caught:
        survey_folder(folder)
    words = shlex.split(str(caught.value).split("leave the class out: ")[1].split(" writes ")[0])
    assert words[:2] == ["dlfer", "init"]
    for command in (words[1:], ["audit", "my_faces.yaml"]):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code in (None, 0)
    assert "6 files seen, 6 used" in capsys.readouterr().out


def test_an_empty_class_folder_of_a_split_has_no_role_to_be_given(draw):
    folder = draw({"train/happy": 3, "train/sad": 3, "validation/happy": 1, "validation/sad": 0})
    with pytest.raises(DataError, match=r"Put images into it, or delete the folder\.$"):
        survey_folder(folder)


def test_own_names_of_folders_are_asked_for_and_written_down(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "holdout", "old"):
        for name in ("happy", "sad"):
            (tmp_path / "faces" / split / name).mkdir(parents=True)
            Image.new("L", (20, 20)).save(tmp_path / "faces" / split / name / "a.png")
    with pytest.raises(DataError, match=r"holdout \(2 files\), old \(2 files\).*dlfer init .*faces --folder"):
        write_starter(tmp_path / "faces")
    path = write_starter(tmp_path / "faces", None, {"holdout": "test", "old": "ignore"})
    assert load_experiment(path).finetune.data.folders == {"holdout": "test", "old": "ignore"}
    assert "6 files seen, 4 used, 2 left out." in path.read_text()


def test_the_command_takes_folders_and_says_what_was_left_out(draw, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = draw({"train/happy": 3, "train/sad": 3, "held/happy": 2, "held/sad": 2, "old/sad": 1})
    (folder / "notes.txt").write_text("x")
    for wrong in (["held"], ["held=testing"], ["=test"]):
        with pytest.raises(UserError, match="expected NAME=ROLE"):
            init(folder, None, wrong)
    init(folder, tmp_path / "a.yaml", ["held=test", "old=ignore"])
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "a.yaml")
    assert "12 files seen, 10 used, 2 left out." in err
    assert load_experiment(tmp_path / "a.yaml").finetune.data.folders == {"held": "test", "old": "ignore"}


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_any_number_of_epochs_may_be_set_afterwards(draw, tmp_path, epochs):
    """The epochs of the head follow those of the stage, and never take all of them."""
    path = write_starter(draw({"a": 12, "b": 12}), tmp_path / "starter.yaml")
    stage = load_experiment(path, {"finetune.epochs": epochs}).finetune
    assert stage.num_head_epochs == {1: 0, 2: 1}.get(epochs, 2)
    with pytest.raises(ConfigError, match=r"found 40 with epochs .*Set freeze.head_epochs: auto"):
        load_experiment(path, {"finetune.epochs": epochs, "finetune.freeze.head_epochs": 40})


def test_the_file_explains_what_people_change_and_says_check_first(draw, tmp_path):
    text = write_starter(draw({"a": 12, "b": 12}), tmp_path / "starter.yaml").read_text()
    assert f"dlfer check {tmp_path / 'starter.yaml'}" in text
    assert text.index("dlfer check") < text.index("--smoke")
    for key in ("finetune.epochs", "finetune.image_size", "finetune.batch_size"):
        assert f"{key} " in text


def test_a_csv_and_arrays_are_begun_with_too(tmp_path):
    rows = [
        f"{n % 7},{' '.join([str(n)] * 2304)},{split}" for n, split in enumerate(["Training"] * 14 + ["PublicTest"] * 7)
    ]
    (tmp_path / "faces.csv").write_text("\n".join(["emotion,pixels,Usage", *rows]))
    images = np.random.default_rng(0).integers(0, 256, (20, 40, 40), np.uint8)
    np.savez(tmp_path / "faces.npz", images=images, targets=[0, 1] * 10)
    text, config, bundle = write(tmp_path / "faces.csv", tmp_path)
    assert "#   validation: 7 images" in text
    assert (config.experiment.name, config.finetune.data.source) == ("faces", "fer2013")
    assert (len(bundle.train), len(bundle.validation)) == (14, 7)
    (tmp_path / "starter.yaml").unlink()
    _, config, bundle = write(tmp_path / "faces.npz", tmp_path)
    assert (config.finetune.data.source, config.finetune.data.protocol) == ("arrays", "resplit")
    assert config.finetune.image_size == 48
    assert bundle.test is not None


def test_what_an_experiment_cannot_read_is_refused_with_what_to_do(tmp_path, draw):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for file in draw({"a": 2, "b": 2}).rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    with pytest.raises(DataError, match=r"a zip of pictures.*unzip .*faces.zip -d faces"):
        write_starter(tmp_path / "faces.zip", tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("experiment: {name: b}\n")
    with pytest.raises(DataError, match="this is already an experiment file"):
        write_starter(tmp_path / "b.yaml", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize(
    "name",
    [
        "2024",
        "1e3",
        "null",
        "true",
        "1_000",
        "0x1F",
        "2024-01-01",
        "~",
        "yes",
        "a: b",
        "a #b",
        "- x",
        "*a",
        "&a",
        "'q'",
        '"q"',
        "{a}",
        "[a]",
        "? a",
        "!a",
        "%a",
        "@a",
        "long name " * 20 + "x",
        "a\x1b[31m",
        "a\u202eb",
        "a\nb",
    ],
)
def test_names_that_yaml_reads_as_something_else_stay_text(draw, tmp_path, monkeypatch, name):
    folder = draw({"a": 3, "b": 3}, root=name)
    monkeypatch.chdir(tmp_path)
    for given in [folder] if name == "~" else [folder, folder.relative_to(tmp_path)]:
        text = write_starter(given, tmp_path / "starter.yaml", force=True).read_text()
        config = load_experiment(tmp_path / "starter.yaml")
        assert config.experiment.name == make_name(folder)
        assert config.finetune.data.path == str(given)
        assert all(line.isprintable() for line in text.split("\n") if line.startswith("#"))


def test_labels_with_control_characters_are_escaped_in_the_comments(tmp_path):
    labels = np.array(["a\nb", "b\x1b[31m", "c\u2028d", "e\x85f\x00"])
    images = np.random.default_rng(0).integers(0, 256, (40, 48, 48), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, targets=np.arange(40) % 4, labels=labels)
    text = write_starter(tmp_path / "x.npz", tmp_path / "x.yaml").read_text()
    assert r"b\x1b[31m" in text
    assert text.replace("\n", "").isprintable()
    assert load_experiment(tmp_path / "x.yaml").experiment.name == "x"


def test_a_file_that_dlfer_would_refuse_is_never_written(draw, tmp_path, monkeypatch):
    folder = draw({"a": 3, "b": 3})
    monkeypatch.setattr("dlfer.data.starter.format_starter", lambda *given, **more: "experiment: {name: 2024}\n")
    (tmp_path / "old.yaml").write_text("old")
    for file in ("new.yaml", "old.yaml"):
        with pytest.raises(ConfigError, match="expected text"):
            write_starter(folder, tmp_path / file, force=True)
    assert not (tmp_path / "new.yaml").exists()
    assert (tmp_path / "old.yaml").read_text() == "old"
