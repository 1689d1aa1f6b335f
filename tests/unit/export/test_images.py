"""Which images an export is judged and calibrated on: those given, those of the run, else drawn ones; and the verb."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dlfer.cli.export import _parse_size
from dlfer.config.names import FER2013_LABELS
from dlfer.config.schema import ExperimentConfig
from dlfer.data.sources import load_data
from dlfer.errors import ExportError, MissingDataError, UserError
from dlfer.experiment.lineage import index_images
from dlfer.experiment.splits import describe_data
from dlfer.export import exporters as whole
from dlfer.export.images import find_native_size, gather_sample
from dlfer.predict.runtimes import compute_checksums
from dlfer.runs.artifact import ExportAbout
from dlfer.runs.files import write_npz
from dlfer.runs.records import About, ArtifactRecord, DataRecord, InputRecord, SplitRecord

RECORD = ArtifactRecord(
    format=1, family="transfer", labels=["a"], model={}, input=InputRecord(channels=1, image_size=32), sha256={}
)


def make_classifier(labels=("happy", "sad"), channels: int = 1):
    return SimpleNamespace(labels=labels, channels=channels, image_size=32, aspect="crop")


def gather(classifier, *, data=None, run=None, record=RECORD):
    said = []
    return gather_sample(classifier, record, run=run, data=data, say=said.append), said


def write_folder(root, numbers: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for label, number in numbers.items():
        (root / label).mkdir(parents=True)
        for index in range(number):
            Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(root / label / f"{index}.png")


def make_run(tmp_path, data: dict):
    config = ExperimentConfig.model_validate({"experiment": {"name": "small"}, "finetune": {"data": data}})
    DataRecord(splits={"train": SplitRecord(shape=[40, 30, 1])}).write(tmp_path)
    return SimpleNamespace(path=tmp_path, config=lambda: config)


def test_a_class_folder_is_divided_so_that_no_image_is_both_compared_and_calibrated_on(tmp_path):
    write_folder(tmp_path / "faces", {"sad": 8, "happy": 4})
    sample, _ = gather(make_classifier(), data=tmp_path / "faces")
    assert sample.images.shape == (6, 40, 40, 1)
    assert sample.calibration.shape == (6, 40, 40, 1)
    both = {image.tobytes() for image in sample.images} & {image.tobytes() for image in sample.calibration}
    assert both == set()
    # The labels are the model's, in its order: happy is 0.
    assert sorted(sample.targets.tolist()) == [0, 0, 1, 1, 1, 1]
    assert "divided at random" in sample.source


def test_validation_and_train_of_a_folder_with_parts_are_taken_and_test_is_left_closed(tmp_path):
    for part, number in (("train", 5), ("validation", 3), ("test", 2)):
        write_folder(tmp_path / "faces" / part, {"sad": number, "happy": number})
    sample, _ = gather(make_classifier(channels=3), data=tmp_path / "faces")
    assert sample.images.shape == (6, 40, 40, 3)
    assert len(sample.calibration) == 10
    assert "divided" not in sample.source


def test_public_test_of_a_csv_is_compared_and_training_calibrates(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["emotion,pixels,Usage"]
    for usage, number in (("Training", 5), ("PublicTest", 3), ("PrivateTest", 4)):
        for index in range(number):
            pixels = " ".join(map(str, rng.integers(0, 256, 48 * 48)))
            lines.append(f"{index % 7},{pixels},{usage}")
    path = tmp_path / "fer2013.csv"
    path.write_text("\n".join(lines) + "\n")
    sample, _ = gather(make_classifier(FER2013_LABELS), data=path)
    assert (len(sample.images), len(sample.calibration)) == (3, 5)
    assert sample.source == f"PublicTest of {path}"
    assert sample.targets.tolist() == [0, 1, 2]


def test_the_run_s_own_validation_is_compared_on(tmp_path):
    run = make_run(tmp_path, {"source": "synthetic_faces", "num_images": {"train": 30, "validation": 9, "test": 4}})
    sample, _ = gather(make_classifier(FER2013_LABELS), run=run)
    assert sample.images.shape == (9, 48, 48, 1)
    assert sample.targets is not None
    assert sample.source == "validation of its run: validation of synthetic_faces"
    assert sample.calibration_source == "training images of its run: train of synthetic_faces"
    assert find_native_size(run) == (40, 30)
    assert find_native_size(None) is None
    assert sample.validation is None, "data.json has no fingerprint of it"
    bundle = load_data(run.config().finetune.data, image_size=48)
    describe_data(bundle, None).write(tmp_path)
    sample, _ = gather(make_classifier(FER2013_LABELS), run=run)
    assert sample.validation.ids.tolist() == bundle.validation.ids.tolist()
    relabelled = dataclasses.replace(bundle.validation, targets=bundle.validation.targets[::-1])
    describe_data(dataclasses.replace(bundle, validation=relabelled), None).write(tmp_path)
    assert gather(make_classifier(FER2013_LABELS), run=run)[0].validation is None


@pytest.mark.slow
@pytest.mark.parametrize("has_run", [True, False])
def test_without_data_faces_are_drawn_which_is_said_and_no_accuracy_is_claimed(has_run, tmp_path):
    run = make_run(tmp_path, {"source": "folder", "path": str(tmp_path / "gone")}) if has_run else None
    sample, said = gather(make_classifier(("one", "two")), run=run)
    assert sample.targets is None
    assert len(sample.images) == 256
    assert "drawn" in sample.source
    assert sample.is_drawn
    assert any("comparing on faces drawn by dlfer" in text for text in said)


def test_data_that_is_not_there_is_an_error_and_not_replaced_by_drawn_faces(tmp_path):
    with pytest.raises(MissingDataError):
        gather(make_classifier(FER2013_LABELS), data=tmp_path / "fer2013.csv")


def test_labels_of_other_images_are_refused(tmp_path):
    write_folder(tmp_path / "faces", {"cat": 3, "dog": 3})
    with pytest.raises(UserError, match="cat"):
        gather(make_classifier(), data=tmp_path / "faces")


def test_faces_are_evened_out_as_the_model_s_training_images_were(tmp_path):
    write_folder(tmp_path / "faces", {"sad": 4, "happy": 4})
    plain, _ = gather(make_classifier(), data=tmp_path / "faces")
    about = About(faces={"detect": "none", "equalize": "histogram"})
    faces = RECORD.model_copy(update={"about": about})
    evened, _ = gather(make_classifier(), data=tmp_path / "faces", record=faces)
    assert plain.images.shape == evened.images.shape
    assert not np.array_equal(plain.images, evened.images)


@pytest.mark.slow
def test_a_refused_format_does_not_keep_the_others_from_being_made(tmp_path, monkeypatch):
    made = []

    def export(classifier, name, *, out, sample, origin):
        if name == "litert":
            raise ExportError("export to litert: refused")
        made.append((name, out, origin.size))
        return out / name, {}

    record = RECORD.model_copy(update={"about": About(experiment="e", run="r")})
    classifier = make_classifier(FER2013_LABELS)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, value in {
        "find_model": lambda name: folder,
        "read_artifact_record": lambda folder: record,
        "load_artifact": lambda name: classifier,
        "check_needs": lambda classifier, formats: None,
        "export_classifier": export,
    }.items():
        monkeypatch.setattr(whole, name, value)
    with contextlib.chdir(tmp_path), pytest.raises(ExportError, match=r"litert: refused\n?.*Kept: exports/e-r/onnx"):
        whole.export_model("any", ("litert", "onnx"))
    assert [(name, str(out), size) for name, out, size in made] == [("onnx", "exports/e-r", (48, 48))]
    with pytest.raises(UserError, match="onnx takes images of any size; leave it out"):
        whole.export_model("any", ("onnx",), out=tmp_path, size=(8, 9))
    with pytest.raises(ExportError, match="litert: refused"):
        whole.export_model("any", ("litert", "onnx"), out=tmp_path, size=(8, 9))
    assert made[-1] == ("onnx", tmp_path, (8, 9))


def test_the_card_beside_the_artifact_is_taken_else_one_that_warns(tmp_path):
    assert "the model has no card" in whole._read_card(tmp_path, None, research_only=False).lower()
    (tmp_path / "MODEL_CARD.md").write_text("# Mine\n")
    assert whole._read_card(tmp_path, None, research_only=False) == "# Mine\n"


@pytest.mark.parametrize(("text", "size"), [("48", (48, 48)), ("48x64", (48, 64)), ("48X64", (48, 64)), (None, None)])
def test_sizes_are_read(text, size):
    assert _parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "48x", "48x64x3", "-48", "5000", "big"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(UserError, match="expected pixels from 8 to 4096"):
        _parse_size(text)


@pytest.fixture
def earlier(tmp_path):
    """Return the folder of an export in `tmp_path`, with two files."""
    target = tmp_path / "onnx"
    (target / "variables").mkdir(parents=True)
    for name in ("model.onnx", "variables/v"):
        (target / name).write_text(name)
    record = {"version": 1, "format": "onnx", "file": "model.onnx", "sha256": compute_checksums(target)}
    (target / "export.json").write_text(json.dumps(record))
    return target


def test_an_earlier_export_may_be_replaced_and_what_somebody_put_there_is_not(earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(
        whole.ExportRecord,
        "require",
        lambda folder: SimpleNamespace(sha256=sums, about=ExportAbout(artifact_sha256=RECORD.sha256)),
    )
    sums = compute_checksums(earlier)
    whole._check_target(earlier, [], RECORD, force=False)
    whole._check_target(tmp_path / "new", [], RECORD, force=False)
    (earlier / "me.jpg").write_text("me")
    with pytest.raises(UserError, match=r"other files are in it \(1\): me\.jpg.*--force"):
        whole._check_target(earlier, [], RECORD, force=False)
    whole._check_target(earlier, [], RECORD, force=True)
    with pytest.raises(UserError, match=r"is the input .*me\.jpg"):
        whole._check_target(earlier, [earlier / "me.jpg"], RECORD, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_export_is_never_replaced(earlier, tmp_path, force):
    (tmp_path / "photos").mkdir()
    (tmp_path / "linked").symlink_to(earlier)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    for name in ("photos", "linked", "dangling", "file"):
        with pytest.raises(UserError, match="the folder is not an export"):
            whole._check_target(tmp_path / name, [], RECORD, force=force)


def test_an_export_of_another_model_or_changed_by_hand_is_not_replaced(earlier, monkeypatch):
    about = ExportAbout(model="mine", artifact_sha256={"a": "1"})
    sums = compute_checksums(earlier)
    monkeypatch.setattr(whole.ExportRecord, "require", lambda folder: SimpleNamespace(sha256=sums, about=about))
    same = RECORD.model_copy(update={"sha256": {"a": "1"}})
    whole._check_target(earlier, [], same, force=False)
    with pytest.raises(UserError, match="holds the export of another model, mine"):
        whole._check_target(earlier, [], RECORD.model_copy(update={"sha256": {"a": "2"}}), force=False)
    (earlier / "model.onnx").write_text("mine")
    with pytest.raises(UserError, match=r"was changed by hand: model\.onnx"):
        whole._check_target(earlier, [], same, force=False)
    whole._check_target(earlier, [], same, force=True)


@pytest.mark.parametrize(
    ("about", "folder"),
    [
        (About(experiment="../../evil", run="x"), "_.._evil-x"),
        (About(experiment="/evil"), "_evil"),
        (About(name="lite2_96", experiment="lite2", run="x"), "lite2_96"),
        (About(experiment=".."), "model"),
    ],
)
def test_what_an_artifact_calls_itself_does_not_lead_out_of_the_folder(tmp_path, monkeypatch, about, folder):
    monkeypatch.chdir(tmp_path)
    seen = []
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(whole, "find_model", lambda name: tmp_path / "model")
    monkeypatch.setattr(whole, "read_artifact_record", lambda folder: RECORD.model_copy(update={"about": about}))
    monkeypatch.setattr(whole, "check_writable", lambda path, option: seen.append(path))
    monkeypatch.setattr(whole, "load_artifact", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole.export_model("any", ("onnx",))
    assert seen == [Path("exports") / folder]
    with pytest.raises(UserError, match="--size: onnx takes images of any size"):
        whole.export_model("any", ("onnx",), size=(64, 64))


def test_the_card_of_a_hub_model_is_its_readme_and_without_one_the_terms_are_told(tmp_path):
    assert "for research only" in whole._read_card(tmp_path, None, research_only=True)
    assert "for research only" not in whole._read_card(tmp_path, None, research_only=False)
    (tmp_path / "README.md").write_text("# Mine\n")
    assert whole._read_card(tmp_path, None, research_only=True) == "# Mine\n"


@pytest.mark.parametrize("change", ["pixels", "class", "damage", None])
def test_the_data_of_a_run_that_has_changed_is_not_compared_on(tmp_path, change):
    write_folder(tmp_path / "faces" / "train", {"happy": 8, "sad": 8})
    write_folder(tmp_path / "faces" / "val", {"happy": 4, "sad": 4})
    run = make_run(tmp_path, {"source": "folder", "path": str(tmp_path / "faces")})
    write_npz(tmp_path / "images.npz", index_images(load_data(run.config().finetune.data, image_size=32)))
    path = tmp_path / "faces" / "val" / "sad" / "0.png"
    if change == "pixels":
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    elif change == "class":
        for part in ("train", "val"):
            write_folder(tmp_path / "faces" / part / "more", {"fear": 2})
            (tmp_path / "faces" / part / "more" / "fear").rename(tmp_path / "faces" / part / "fear")
            (tmp_path / "faces" / part / "more").rmdir()
    elif change == "damage":
        path.write_bytes(b"no picture")
    sample, said = gather(make_classifier(), run=run)
    assert ("drawn" in sample.source) == (change is not None)
    assert any("has changed since" in line or "cannot be read any more" in line for line in said) == (
        change is not None
    )


def test_a_full_disk_ends_one_format_and_not_the_others(tmp_path, monkeypatch):
    def export(classifier, name, *, out, sample, origin):
        if name == "litert":
            raise OSError(28, "No space left on device")
        return out / name, {}

    classifier = make_classifier(FER2013_LABELS)
    folder = tmp_path / "model"
    folder.mkdir()
    for name, value in {
        "find_model": lambda name: folder,
        "read_artifact_record": lambda folder: RECORD,
        "load_artifact": lambda name: classifier,
        "check_needs": lambda classifier, formats: None,
        "export_classifier": export,
    }.items():
        monkeypatch.setattr(whole, name, value)
    with pytest.raises(ExportError, match=r"disk is full: .* bytes are free.*\n?.*Kept: .*/onnx") as raised:
        whole.export_model("any", ("litert", "onnx"), out=tmp_path / "out")
    assert raised.value.exit_code == 1
    monkeypatch.setattr(whole, "load_artifact", lambda name: 1 / 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        whole.export_model("any", ("onnx",), out=tmp_path / "file" / "x")
