"""Distillation: targets by hand, who may teach, what the run says of it, and that a teacher is asked once."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dlfer.config.load import load_experiment, with_overrides
from dlfer.config.schema import DistillConfig, ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import shorten_digests
from dlfer.errors import ModelError, ProtocolError
from dlfer.experiment import distill as module
from dlfer.experiment.distill import distill, mix_targets
from dlfer.experiment.fit_ensemble import Member, obtain_members, trace_members
from dlfer.experiment.limits import find_obstacles
from dlfer.experiment.lineage import index_images, trace_pretraining
from dlfer.experiment.session import Session, make_smoke_config
from dlfer.experiment.splits import describe_data, find_run_duplicates
from dlfer.runs.changes import IMAGES_FILE, PRETRAIN_IMAGES_FILE
from dlfer.runs.files import write_npz
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MemberRow, write_member_rows
from dlfer.runs.records import ArtifactRecord, InputRecord, RunRecord, TeacherRecord
from dlfer.runs.run import Run, create_run

EXPERIMENT = """
experiment: {name: NAME, device: cpu}
model: {backbone: resnet_nano, dropout: 0.0}
pretrain: null
finetune:
  data: {source: synthetic_faces, num_images: {train: 32, validation: 16, test: 16}}
  epochs: 1
  batch_size: 16
  image_size: 32
evaluate: {num_train: 0}
"""
LABELS = ("a", "b", "c")


def make_split(name: str, number: int, *, seed: int, source: str | None = None, side: int = 16) -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (number, side, side, 1), dtype=np.uint8)
    ids = np.array([f"{source or name}/{row}" for row in range(number)])
    return Split(name, images, np.arange(number) % 3, ids)


def make_bundle(*, source: str = "arrays", seed: int = 0, **parts) -> DataBundle:
    given = {"train": make_split("train", 30, seed=seed), "validation": make_split("validation", 9, seed=seed + 1)}
    given |= {"test": make_split("test", 9, seed=seed + 2), **parts}
    return DataBundle(source, LABELS, **given)


# Targets.


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 2.0), (0.25, 0.5), (0.9, 20.0)])
@pytest.mark.parametrize("has_votes", [False, True])
def test_targets_are_those_of_the_formula(weight, temperature, has_votes):
    bundle = make_bundle()
    rng = np.random.default_rng(0)
    own = np.eye(3)[bundle.train.targets]
    if has_votes:
        own = rng.dirichlet(np.ones(3), 30).astype(np.float32)
        object.__setattr__(bundle.train, "soft_targets", own)
    answers = rng.dirichlet(np.ones(3), 30)
    section = DistillConfig(teacher="t", weight=weight, temperature=temperature)
    teachers = [TeacherRecord(name="t", sha256={"network.weights.h5": "0a", "network.onnx": "0b"})]
    found = mix_targets(bundle, answers, section, teachers)
    powers = answers ** (1 / temperature)
    expected = (1 - weight) * own + weight * powers / powers.sum(axis=1, keepdims=True)
    assert found.train.soft_targets.dtype == np.float32
    assert np.allclose(found.train.soft_targets, expected, atol=1e-6)
    assert np.allclose(found.train.soft_targets.sum(axis=1), 1, atol=1e-6)
    note = found.notes[-1]
    assert "the teacher t (network.onnx, sha256 0b) answers" in note
    assert ("the label and the votes make the rest" if has_votes else "the label makes the rest") in note
    assert bundle.notes == ()


# Keys.


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"finetune.distill": {"teacher": []}}, "expected the name of a model, or a list"),
        ({"finetune.distill": {"teacher": ["a", "a"]}}, "or a list of different ones"),
        ({"finetune.distill": {"teacher": "a", "weight": 0.0}}, "greater than 0|above 0"),
        ({"finetune.distill": {"teacher": "a", "weight": 1.5}}, "less than or equal to 1|at most 1|up to 1"),
        ({"finetune.distill": {"teacher": "a", "temperature": 0}}, "greater than 0|above 0"),
        ({"finetune.distill": {"weight": 0.5}}, "teacher"),
        (
            {"pretrain": {"weights": "x.h5", "distill": {"teacher": "a"}}},
            "distill: belongs to finetune; EF-FER1 has no teacher",
        ),
        (
            {"finetune.distill": {"teacher": "a"}, "model.family": "boosted", "boosting": {}},
            "whose trees take labels alone",
        ),
        (
            {
                "finetune.distill": {"teacher": "a"},
                "finetune.data": {"source": "tfds", "name": "imagenet2012", "crop": {"train": "random_resized"}},
            },
            "teachers need them in memory",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(changes, text, tmp_path):
    (tmp_path / "x.yaml").write_text(EXPERIMENT.replace("NAME", "x"))
    with pytest.raises(Exception, match=text):
        load_experiment(tmp_path / "x.yaml", changes)


# Who may teach.


def make_config(bundle_path: str = "data.npz", **data) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "experiment": {"name": "student"},
            "pretrain": None,
            "finetune": {
                "data": {"source": "arrays", "path": bundle_path, **data},
                "image_size": 32,
                "distill": {"teacher": "teacher"},
            },
        }
    )


def write_teacher(folder, bundle: DataBundle, *, config: ExperimentConfig | None, labels=LABELS, listed=True):
    """Write what a trained run leaves behind, but for its weights."""
    folder.mkdir(parents=True)
    (folder / "model").mkdir()
    RunRecord(status="finished", experiment="teacher").write(folder)
    record = ArtifactRecord(
        format=1,
        family="transfer",
        labels=list(labels),
        model={},
        input=InputRecord(channels=1, image_size=32),
        sha256={"network.weights.h5": "ab" * 32},
    )
    record.write(folder / "model")
    describe_data(bundle, None).write(folder)
    if listed:
        write_npz(folder / IMAGES_FILE, index_images(bundle))
    if config is not None:
        create_run(folder / "tmp", config, argv=[])
        (copy,) = (folder / "tmp").glob("*/*/config.yaml")
        shutil.copy(copy, folder / "config.yaml")
    return folder


class Engine:
    """Answers with b for every image; counts how often it is asked."""

    labels = ("b", "c", "a")
    asked = 0

    def predict(self, images, **options):
        type(self).asked += len(images)
        return np.tile(np.array([[0.8, 0.1, 0.1]], np.float32), (len(images), 1))


@pytest.fixture
def asked(monkeypatch):
    Engine.asked = 0
    monkeypatch.setattr(module, "load_engine", lambda folder: Engine())
    return Engine


def start(tmp_path, teacher, config=None, **values):
    """Return a run and a session of a student with that teacher."""
    config = config or make_config()
    section = config.finetune.distill.model_copy(update={"teacher": str(teacher)})
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"distill": section})})
    session = Session.start(RunOptions(out=tmp_path / "runs"), progress=False)
    run = create_run(tmp_path / "runs", config, argv=[])
    run.update(**values)
    return run, config, session


TEST, OTHER = make_split("test", 9, seed=2), make_split("test", 9, seed=77, source="elsewhere")


@pytest.mark.parametrize("same_path", [True, False])
def test_one_that_was_trained_on_the_test_split_is_refused(same_path, tmp_path, asked):
    student = make_bundle()
    own = make_bundle(train=Split("train", student.test.images, student.test.targets, student.test.ids), test=None)
    teacher = write_teacher(tmp_path / "t", own, config=make_config("data.npz" if same_path else "other.npz"))
    run, config, session = start(tmp_path, teacher)
    with pytest.raises(ProtocolError, match="was trained on 9 of the 9 images of this test split"):
        distill(run, config, session, student)
    assert not asked.asked


@pytest.mark.parametrize(
    ("kind", "leak"),
    [
        ("same images", None),
        ("other images", None),
        ("trained on validation", "was trained on 9 of the 9 validation images"),
        ("selected on test", "was selected on 9 of the 9 test images"),
        ("copies of test in train", "was trained on exact copies of 9 of the 9 test images"),
        ("copies that the student has, too", None),
    ],
)
def test_what_a_teacher_has_seen_is_said(kind, leak, tmp_path, asked):
    student, own = make_bundle(), make_bundle()
    if kind == "other images":
        own = make_bundle(seed=50)
        # Rows of another file have the same ids.
    elif kind == "trained on validation":
        own = make_bundle(train=student.validation, validation=OTHER, test=None)
    elif kind == "selected on test":
        own = make_bundle(validation=student.test, test=None)
    elif "copies" in kind:
        ids = np.array([f"copy/{row}" for row in range(9)])
        own = make_bundle(train=Split("train", student.test.images, student.test.targets, ids), test=None)
        if "too" in kind:
            images = np.concatenate([student.train.images[:9] * 0 + student.test.images, student.train.images[9:]])
            student = make_bundle(train=Split("train", images, student.train.targets, student.train.ids))
    path = "elsewhere.npz" if kind == "other images" else "data.npz"
    teacher = write_teacher(tmp_path / "t", own, config=make_config(path))
    run, config, session = start(tmp_path, teacher)
    found = distill(run, config, session, student)
    (record,) = run.record.teachers
    assert record.note is None
    assert (record.leak is None) if leak is None else (leak in record.leak)
    assert [text for text in run.record.warnings if "Leak" in text] == ([record.leak] if leak else [])
    # b is the second label, the first of the teacher's.
    expected = np.sqrt([0.1, 0.8, 0.1]) / np.sqrt([0.1, 0.8, 0.1]).sum()
    assert np.allclose(found.train.soft_targets, 0.5 * np.eye(3)[student.train.targets] + 0.5 * expected, atol=1e-6)


def make_learner(tmp_path, how: str, leaky, *, path: str = "neutral.npz"):
    """Return the folder of a run on data of its own that has learned from another run, `leaky`, in some way."""
    neutral = make_bundle(source="neutral", seed=90)
    values = {"finetune.distill": None}
    if "weights" in how:
        weights = {"weights of its EF-FER1": leaky / "pretrain", "weights in a file": leaky / "model" / "x.weights.h5"}
        values["pretrain"] = {"weights": str(weights.get(how, leaky))}
    elif how == "an ensemble":
        members = [{"name": name, "model": str(leaky)} for name in ("p", "q")]
        values |= {"model.family": "ensemble", "ensemble": {"members": members}}
    folder = tmp_path / f"learner-{len(list(tmp_path.glob('learner-*')))}"
    learner = write_teacher(folder, neutral, config=with_overrides(make_config(path), values))
    if how == "an ensemble":
        record = ArtifactRecord.require(learner / "model")
        record = record.model_copy(update={"family": "ensemble", "ensemble": {"members": ["p", "q"]}})
        record.write(learner / "model")
        write_member_rows(learner, [MemberRow(arm=name, path=str(leaky), status="given") for name in ("p", "q")])
    elif how == "a student":
        record = TeacherRecord(name=str(leaky), sha256=ArtifactRecord.require(leaky / "model").sha256)
        Run(learner).update(teachers=[record])
    return learner


WAYS = ["an ensemble", "weights of a run", "weights in a file", "a student"]


def write_leaky(tmp_path, student: DataBundle, *, listed: bool = True):
    """Return the folder of a run that was trained on the test images of another."""
    train = Split("train", student.test.images, student.test.targets, student.test.ids)
    config = with_overrides(make_config("leaky.npz"), {"finetune.distill": None})
    leaky = write_teacher(tmp_path / "leaky", make_bundle(train=train, test=None), config=config, listed=listed)
    (leaky / "model" / "x.weights.h5").touch()
    return leaky


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", WAYS)
def test_one_that_learned_from_a_model_of_the_test_split_is_refused(how, depth, tmp_path, asked):
    student = make_bundle()
    teacher = write_leaky(tmp_path, student)
    for _ in range(depth):
        teacher = make_learner(tmp_path, how, teacher)
        (teacher / "model" / "x.weights.h5").touch()
    run, config, session = start(tmp_path, teacher)
    with pytest.raises(ProtocolError, match="was trained on 9 of the 9 images of this test split"):
        distill(run, config, session, student)
    assert not asked.asked


@pytest.mark.parametrize("how", ["trained on data", "weights of its EF-FER1"])
def test_one_whose_ef_fer1_was_trained_on_the_test_split_is_refused(how, tmp_path, asked):
    """Even where its own data is the student's."""
    student = make_bundle()
    train = Split("train", student.test.images, student.test.targets, student.test.ids)
    values = {"finetune.distill": None, "pretrain": {"data": {"source": "arrays", "path": "leaky.npz"}}}
    teacher = write_teacher(tmp_path / "t", student, config=with_overrides(make_config(), values))
    write_npz(teacher / PRETRAIN_IMAGES_FILE, index_images(make_bundle(train=train, test=None)))
    (teacher / "pretrain").mkdir()
    (teacher / "pretrain" / "backbone.json").write_text("{}")
    if how != "trained on data":
        teacher = make_learner(tmp_path, how, teacher)
    run, config, session = start(tmp_path, teacher)
    with pytest.raises(ProtocolError, match="was trained on 9 of the 9 images of this test split"):
        distill(run, config, session, student)


@pytest.mark.parametrize("how", WAYS)
def test_what_is_not_known_of_those_before_a_teacher_is_said(how, tmp_path, asked):
    student = make_bundle()
    teacher = make_learner(tmp_path, how, write_leaky(tmp_path, student, listed=False))
    run, config, session = start(tmp_path, teacher)
    distill(run, config, session, student)
    (record,) = run.record.teachers
    assert "was trained on is not known here in full. Its training images must not contain" in record.note


@pytest.mark.parametrize("how", [*WAYS, "gone"])
def test_weights_of_a_run_are_an_ef_fer1_that_has_seen_its_images(how, tmp_path):
    student, leaky = make_bundle(), write_leaky(tmp_path, make_bundle())
    weights = tmp_path / "nowhere" if how == "gone" else make_learner(tmp_path, how, leaky)
    config = with_overrides(make_config(), {"finetune.distill": None, "pretrain": {"weights": str(weights)}})
    session = Session.start(RunOptions(out=tmp_path / "runs"), progress=False)
    history = trace_pretraining(config, session.load_bundle)
    found = find_run_duplicates(student, history, config.finetune.data)
    if how == "gone":
        assert (found.in_pretrain, history.is_counted(student.test, None)) == (None, False)
    else:
        assert (found.in_pretrain.count()["any"], found.count_leaks(), history.unknown) == (9, 9, frozenset())


def test_a_circle_of_runs_ends(tmp_path, asked):
    student = make_bundle()
    first = make_learner(tmp_path, "weights of a run", tmp_path / "learner-1")
    second = make_learner(tmp_path, "an ensemble", first)
    run, config, session = start(tmp_path, second)
    distill(run, config, session, student)
    assert (run.record.teachers[0].leak, run.record.teachers[0].note) == (None, None)


def ship(run, target, lists: dict[str, np.ndarray]):
    """Return a folder with what `dlfer ship` keeps of a run, but for its weights."""
    shutil.copytree(run / "model", target)
    for file in ("config.yaml", "data.json"):
        shutil.copy(run / file, target)
    write_npz(target / IMAGES_FILE, {"train_digests": shorten_digests(lists["train_digests"])})
    return target


def test_a_shipped_teacher_is_known_by_its_shortened_digests(tmp_path, asked):
    student = make_bundle()
    lists = index_images(make_bundle(train=replace(student.test, name="train"), test=None))
    shipped = ship(write_leaky(tmp_path, student), tmp_path / "shipped", lists)
    run, config, session = start(tmp_path, shipped)
    with pytest.raises(ProtocolError, match="was trained on 9 of the 9 images of this test split"):
        distill(run, config, session, student)


def test_a_shipped_teacher_of_the_same_file_is_known_by_its_ids(tmp_path, asked):
    """Where that file is here: an image of its training is then told from a copy of one."""
    given, path = make_bundle(), tmp_path / "data.npz"
    given.test.images[0] = given.train.images[0]
    arrays = {f"{name}_images": split.images[..., 0] for name, split in given.splits.items()}
    arrays |= {f"{name}_targets": split.targets for name, split in given.splits.items()}
    np.savez(path, labels=np.array(LABELS), **arrays)
    config = with_overrides(make_config(str(path)), {"finetune.distill": None})
    whole = Session.start(RunOptions(), progress=False).load_bundle(config.finetune)
    teacher = ship(write_teacher(tmp_path / "t", whole, config=config), tmp_path / "shipped", index_images(whole))
    train = whole.train
    part = Split(train.name, train.images[1:], train.targets[1:], train.ids[1:])
    run, config, session = start(tmp_path, teacher, make_config(str(path)))
    distill(run, config, session, replace(whole, train=part))
    assert "was trained on exact copies of 1 of the 9 test images" in run.record.teachers[0].leak


@pytest.mark.parametrize("kind", ["no records", "data that is gone", "images of another size"])
def test_what_is_not_known_of_a_teacher_is_said(kind, tmp_path, asked):
    side = 20 if kind == "images of another size" else 16
    own = make_bundle(train=make_split("train", 30, seed=5, side=side))
    config = None if kind != "data that is gone" else make_config(str(tmp_path / "gone.npz"))
    teacher = write_teacher(tmp_path / "t", own, config=config, listed=kind == "images of another size")
    run, config, session = start(tmp_path, teacher)
    distill(run, config, session, make_bundle())
    (record,) = run.record.teachers
    assert "must not contain images of the student's test split" in record.note
    assert record.note in run.record.warnings


def test_a_teacher_is_asked_once_and_compared_when_the_run_goes_on(tmp_path, asked):
    student = make_bundle()
    teacher = write_teacher(tmp_path / "t", student, config=make_config())
    run, config, session = start(tmp_path, teacher)
    first = distill(run, config, session, student)
    assert asked.asked == 30
    again = distill(run, config, session, student)
    (session.runs_folder / ".cache" / "teachers").rename(tmp_path / "away")
    alone = distill(run, config, session, student)
    assert asked.asked == 30
    for found in (again, alone):
        assert np.array_equal(found.train.soft_targets, first.train.soft_targets)
    record = ArtifactRecord.require(teacher / "model")
    record.model_copy(update={"sha256": {"network.weights.h5": "cd" * 32}}).write(teacher / "model")
    with pytest.raises(Exception, match=r"teacher: .* was network.weights.h5, sha256 abab.*and is .*cdcd"):
        distill(run, config, session, student)
    session.options = RunOptions(out=tmp_path / "runs", accept_changes=True)
    distill(run, config, session, student)
    assert asked.asked == 60
    assert "cdcd" in run.record.changes[0].differences[0]


def test_several_hosts_and_other_labels_are_refused(tmp_path, asked):
    teacher = write_teacher(tmp_path / "t", make_bundle(), config=None, labels=("a", "b", "d"))
    run, config, session = start(tmp_path, teacher)
    with pytest.raises(Exception, match="has the labels a, b, d; expected a, b, c"):
        distill(run, config, session, make_bundle())
    run.update(device={"workers": 2})
    with pytest.raises(Exception, match="found several hosts"):
        distill(run, config, session, make_bundle())


def load_student(tmp_path, teacher, **data) -> ExperimentConfig:
    (tmp_path / "x.yaml").write_text(EXPERIMENT.replace("NAME", "x"))
    changes = {f"finetune.data.{key}": value for key, value in data.items()}
    return load_experiment(tmp_path / "x.yaml", {"finetune.distill": {"teacher": str(teacher)}, **changes})


def test_check_refuses_a_teacher_that_is_not_there_or_has_other_labels(tmp_path):
    assert any("teacher: nobody: there is no such model" in x for x in find_obstacles(load_student(tmp_path, "nobody")))
    teacher = write_teacher(tmp_path / "t", make_bundle(), config=None)
    found = find_obstacles(load_student(tmp_path, teacher))
    assert any("has the labels a, b, c; expected Angry, Disgust, Fear" in line for line in found)


@pytest.mark.parametrize(
    ("data", "is_refused"),
    [
        ({}, False),
        ({"protocol": "resplit", "seed": 3}, False),
        ({"protocol": "resplit", "seed": 4}, True),
        ({"protocol": "cross_validation", "folds": 5, "fold": 1}, True),
    ],
)
def test_check_refuses_a_teacher_of_another_division_of_the_same_images(data, is_refused, tmp_path):
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "data.npz", images=np.zeros((6, 8, 8), np.uint8), targets=np.arange(6) % 3, labels=LABELS)
    path = str(tmp_path / "d" / "data.npz")
    own = make_config(path, protocol="resplit", seed=3) if data else make_config(path)
    teacher = write_teacher(tmp_path / "t", make_bundle(), config=own)
    _, student, _ = start(tmp_path, teacher, make_config(path, **data))
    found = [line for line in find_obstacles(student) if "has seen images of the split" in line]
    assert bool(found) == is_refused


def test_a_smoke_run_leaves_out_a_teacher_that_is_not_there(tmp_path):
    small, warnings = make_smoke_config(load_student(tmp_path, "nobody"))
    assert small.finetune.distill is None
    assert any("finetune.distill left out: nobody" in text for text in warnings)
    teacher = write_teacher(tmp_path / "t", make_bundle(), config=None)
    assert make_smoke_config(load_student(tmp_path, teacher))[0].finetune.distill is not None


# Members of an ensemble, of which the same is known.


def obtain(tmp_path, given, student: DataBundle) -> tuple[Member, int]:
    """Return a member that is given, and how many members were to be trained when it had been checked."""
    rows = [{"name": "new", "set": {"model.backbone": "resnet_nano"}}, {"name": "old", "model": str(given)}]
    changes = {"finetune.distill": None, "model.family": "ensemble", "ensemble": {"members": rows}}
    config = with_overrides(make_config(), changes)
    run = create_run(tmp_path / "runs", config, argv=[])
    session, asked = Session.start(RunOptions(out=tmp_path / "runs"), progress=False), []
    members = obtain_members(run, config, session, student, lambda runs, *others: asked.extend(runs))
    return members[1], len(asked)


def list_new(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "runs").glob("*") if path.name != "student"]


def test_a_member_with_other_labels_is_refused_before_any_is_trained(tmp_path):
    given = write_teacher(tmp_path / "t", make_bundle(), config=make_config(), labels=("a", "b", "x"))
    with pytest.raises(ModelError, match="the member old has the labels a, b, x; expected a, b, c"):
        obtain(tmp_path, given, make_bundle())
    assert list_new(tmp_path) == []


@pytest.mark.parametrize("how", [None, "an ensemble", "other pixels"])
def test_a_member_of_the_test_split_is_refused_before_any_is_trained(how, tmp_path):
    """Also one whose members were trained on it, and one that saw the same images in another form."""
    student = make_bundle()
    given = write_leaky(tmp_path, student)
    if how == "an ensemble":
        given = make_learner(tmp_path, how, given)
    elif how == "other pixels":
        images = np.repeat(student.test.images, 2, axis=1)
        train = Split("train", images, student.test.targets, student.test.ids)
        data = make_bundle(train=train, validation=make_split("v", 9, seed=8, side=32), test=None)
        given = write_teacher(tmp_path / "t", data, config=make_config(size=32))
    with pytest.raises(ProtocolError, match="member old was trained on 9 of the 9 images of this test split"):
        obtain(tmp_path, given, student)
    assert list_new(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "note", "is_leak"),
    [
        ("weights of a run", "its EF-FER1 was trained on 9 of the 9 test images", False),
        ("a student", "its teacher was trained on 9 of the 9 test images", True),
        ("selected", "it was selected on 9 of the 9 test images", True),
        ("damaged", "what it was trained on is not known here", False),
    ],
)
def test_what_a_member_has_seen_is_noted(how, note, is_leak, tmp_path):
    student = make_bundle()
    if how == "selected":
        given = write_teacher(tmp_path / "t", make_bundle(validation=student.test, test=None), config=make_config())
    elif how == "damaged":
        (tmp_path / "own.npz").write_bytes(b"broken")
        given = write_teacher(tmp_path / "t", student, config=make_config(str(tmp_path / "own.npz")), listed=False)
    else:
        given = make_learner(tmp_path, how, write_leaky(tmp_path, student))
    member, num_trained = obtain(tmp_path, given, student)
    assert note in member.note
    assert (f"Leak: the member old: {note}" in member.leak) == is_leak
    assert num_trained == 1


def test_what_ef_fer1_of_a_member_has_seen_is_counted_by_the_ensemble(tmp_path):
    student = make_bundle()
    given = make_learner(tmp_path, "weights of a run", write_leaky(tmp_path, student))
    rows = [{"name": name, "model": str(given)} for name in ("p", "q")]
    changes = {"finetune.distill": None, "model.family": "ensemble", "ensemble": {"members": rows}}
    config = with_overrides(make_config(), changes)
    session = Session.start(RunOptions(out=tmp_path / "runs"), progress=False)
    found = find_run_duplicates(student, trace_members(config, session.load_bundle), config.finetune.data)
    assert "Leak: 9 of 9 test images" in found.describe_leak()


# From teacher to student, with real networks.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a teacher's run and of its student's."""
    from dlfer.experiment.run import run_experiment

    place, done = tmp_path_factory.mktemp("distil"), {}
    for name in ("teacher", "student"):
        changes = {}
        if done:
            changes = {"model.feature_level": 3, "finetune.distill": {"teacher": str(done["teacher"]), "weight": 0.7}}
        (place / f"{name}.yaml").write_text(EXPERIMENT.replace("NAME", name))
        options = RunOptions(out=place / "runs", overrides=changes)
        done[name] = run_experiment(place / f"{name}.yaml", options, progress=False)
    return SimpleNamespace(**done)


@pytest.mark.slow
def test_every_output_of_a_student_names_its_teacher(folders):
    digest = ArtifactRecord.require(folders.teacher / "model").sha256["network.onnx"]
    run = RunRecord.require(folders.student)
    assert run.teachers[0].sha256["network.onnx"] == digest
    assert run.teachers[0].leak is None
    assert run.teachers[0].note is None
    for file in ("data.json", "report.html", "model/MODEL_CARD.md", "model/artifact.json"):
        assert digest in (folders.student / file).read_text(), file
    (origin,) = ArtifactRecord.require(folders.student / "model").about.origins
    assert (origin.role, origin.research_only) == ("teacher", False)
    assert "distilled from" in (folders.student / "report.html").read_text()
    assert "For research only" not in (folders.student / "model" / "MODEL_CARD.md").read_text()


@pytest.mark.slow
def test_a_research_only_teacher_makes_its_student_research_only(folders, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(folders.teacher / "model", teacher)
    values = json.loads((teacher / "artifact.json").read_text())
    values["about"] |= {"research_only": True}
    (teacher / "artifact.json").write_text(json.dumps(values))
    run = create_run(tmp_path / "runs", load_student(tmp_path, teacher), argv=[])
    session = Session.start(RunOptions(out=tmp_path / "runs"), progress=False)
    config = run.config()
    distill(run, config, session, session.load_bundle(config.finetune))
    assert run.record.teachers[0].origins[-1].research_only
    shutil.copytree(folders.student / "model", run.path / "model")
    values = json.loads((run.path / "model" / "artifact.json").read_text())
    values["about"]["origins"] = [origin.as_json() for origin in run.record.teachers[0].origins]
    (run.path / "model" / "artifact.json").write_text(json.dumps(values))
    from dlfer.report.card import compose_card

    assert "For research only" in compose_card(run.path)
