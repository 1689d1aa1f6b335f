"""The contract of `import dlfer`: names, docstrings, types, arguments; records as notebooks show them; arrays that are audited."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import dlfer
from dlfer.api import RunKeywords
from dlfer.config.schema import AugmentConfig
from dlfer.errors import ConfigError, DataError, ModelError, TrainingStopped, UserError
from dlfer.model.classifier import Classifier
from dlfer.runs.comparison_record import ArmPair, ArmRow, ComparedRun, ComparisonRecord, ModelComparison, SeedEstimate
from dlfer.runs.listeners import RunOptions
from dlfer.runs.metrics_record import ClassMetrics, Estimate, McNemar, Metrics, ModelPair, SplitMetrics
from dlfer.runs.records import About
from dlfer.runs.run import create_run
from dlfer.runs.text import format_html, format_interval

ROOT = Path(dlfer.__file__).parents[1]
QUICKSTART = ROOT / "experiments" / "quickstart.yaml"
NAMES = [name for name in dlfer.__all__ if not name.startswith("__")]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(dlfer, name))]
TRAINING = ["run", "ablate", "sweep", "search"]


def test_the_listed_names_are_those_that_dir_shows():
    assert dir(dlfer) == sorted(dlfer.__all__)
    assert {
        "load_experiment",
        "run",
        "open_run",
        "ablate",
        "search",
        "sweep",
        "evaluate",
        "compare",
        "audit",
        "load",
    } <= set(dlfer.__all__)
    assert not {"run_experiment", "evaluate_model"} & set(dlfer.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(dlfer, name))
    assert text.splitlines()[0].endswith((".", "records.", "result."))
    assert "Example:" in text
    assert ">>> " in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_types_and_describes_its_arguments(name):
    function = getattr(dlfer, name)
    signature, text = inspect.signature(function), inspect.getdoc(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        assert re.search(rf"^    .*\*?{parameter.name}\b.*:", text, flags=re.MULTILINE), parameter.name
    assert "Raises:" in text
    positional = [p for p in signature.parameters.values() if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 2 or name == "read_image"


def test_the_stub_for_type_checkers_has_the_same_names():
    tree = ast.parse((ROOT / "dlfer" / "__init__.pyi").read_text())
    imported = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.asname: (node.module, alias.name) for alias in node.names}
    assert imported.pop("__version__") == ("dlfer._version", "__version__")
    assert imported == dlfer._PLACES


def test_types_are_part_of_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dlfer"]
    assert {"py.typed", "*.pyi"} <= set(data)
    assert (ROOT / "dlfer" / "py.typed").is_file()


def test_importing_loads_nothing_heavy():
    text = (
        "import sys, dlfer; dir(dlfer)\n"
        "assert not {'numpy', 'pydantic', 'keras', 'tensorflow'} & set(sys.modules)\n"
        "dlfer.run, dlfer.Run, dlfer.open_run, dlfer.Listener, dlfer.audit\n"
        "assert not {'keras', 'tensorflow', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("value", [3, np.int64(3), np.int32(3), np.array(3)])
def test_overrides_take_numbers_of_numpy(value):
    config = dlfer.load_experiment(QUICKSTART, {"finetune.epochs": value})
    assert config.finetune.epochs == 3
    assert type(config.finetune.epochs) is int


def test_overrides_take_paths_tuples_sections_and_none():
    augment = AugmentConfig(rotation=5.0)
    given = {
        "ablation.seeds": (1, 2),
        "finetune.augment": augment,
        "pretrain": None,
    }
    config = dlfer.load_experiment(str(QUICKSTART), given)
    assert config.ablation.seeds == (1, 2)
    assert config.finetune.augment == augment
    assert config.pretrain is None
    data = {"finetune.data": {"source": "folder", "path": Path("faces"), "protocol": "resplit"}}
    assert dlfer.load_experiment(QUICKSTART, data).finetune.data.path == "faces"


def test_a_loaded_experiment_is_an_experiment_and_stays_as_it_is():
    config = dlfer.load_experiment(QUICKSTART)
    assert dlfer.load_experiment(config) is config
    changed = dlfer.load_experiment(config, overrides={"finetune.epochs": config.finetune.epochs + 1})
    assert changed.finetune.epochs == config.finetune.epochs + 1
    assert dlfer.load_experiment(config) == dlfer.load_experiment(QUICKSTART)


@pytest.mark.parametrize("overrides", [["finetune.epochs=3"], "finetune.epochs=3", {3: 4}, 3])
def test_overrides_of_another_form_are_refused(overrides):
    with pytest.raises(ConfigError, match="expected a mapping of dotted keys"):
        dlfer.load_experiment(QUICKSTART, overrides)
    with pytest.raises(ConfigError, match="expected a mapping of dotted keys"):
        dlfer.sweep(QUICKSTART, overrides)


def test_an_override_that_contains_itself_is_a_problem_of_the_experiment():
    endless: dict = {}
    endless["deeper"] = endless
    with pytest.raises(ConfigError, match="contains itself"):
        dlfer.load_experiment(QUICKSTART, {"finetune.augment": endless})


@pytest.mark.parametrize("wrong", [None, 3, {"experiment": {"name": "x"}}])
@pytest.mark.parametrize("verb", ["load_experiment", *TRAINING])
def test_what_is_no_experiment_is_refused(verb, wrong):
    with pytest.raises(ConfigError, match="expected the path of an experiment file"):
        getattr(dlfer, verb)(wrong)


@pytest.mark.parametrize("verb", TRAINING)
def test_training_functions_refuse_wrong_arguments_before_anything_is_written(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = getattr(dlfer, verb)
    with pytest.raises(
        TypeError, match=rf"dlfer.{verb}\(\) got unexpected keyword arguments: finetune__epochs; expected out"
    ):
        train(QUICKSTART, finetune__epochs=3)
    with pytest.raises(UserError, match="max_hours: found -1"):
        train(QUICKSTART, max_hours=-1)
    with pytest.raises(ConfigError, match="epochz"):
        train(QUICKSTART, {"finetune.epochz": 1})
    for name in ("workers",) if verb != "run" else ():
        for count in (0, -1, 1.5, True, "2"):
            with pytest.raises(UserError, match=f"{name}: found"):
                train(QUICKSTART, **{name: count})
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}')
    with pytest.raises(UserError, match="describes several hosts"):
        train(QUICKSTART)
    assert list(tmp_path.iterdir()) == []


def test_keywords_are_options_of_a_run():
    assert set(RunKeywords.__annotations__) <= set(RunOptions.__dataclass_fields__)
    for verb in TRAINING:
        assert all(word in inspect.getdoc(dlfer.run) for word in RunKeywords.__annotations__), verb


@pytest.mark.parametrize("callback", [print, dlfer.Listener, object(), lambda *given: None])
def test_callbacks_are_listeners(callback):
    with pytest.raises(UserError, match=r"expected objects of classes derived from dlfer.Listener"):
        dlfer.run(QUICKSTART, callbacks=[callback])


HOSTILE = '<script>alert("x")</script>\u202e'
SPLIT = SplitMetrics(
    n=40,
    accuracy=Estimate(value=0.64321, low=0.5, high=0.75),
    macro_f1=Estimate(value=0.6),
    labels=[HOSTILE, "sad"],
    per_class={HOSTILE: ClassMetrics(n=30, precision=0.5), "sad": ClassMetrics(n=10)},
)
PAIR = {"n": 40, "difference": Estimate(value=2.0), "sentence": f"{HOSTILE} is no verdict."}
SEEDS = SeedEstimate(value=0.5, low=0.4, high=0.6, n=40)


def make_records(folder: Path) -> dict[str, object]:
    """Return one of each of what a notebook shows, with a name that is HTML in it."""

    class Small(Classifier):
        predict_raw = write_files = name_files = read_files = None

        def __init__(self):
            self.labels, self.image_size, self.channels, self.temperature_fit = (HOSTILE, "sad"), 48, 1, None
            self.about = About(name=HOSTILE, smoke=True)

    config = dlfer.load_experiment(QUICKSTART, {"pretrain": {"weights": HOSTILE}})
    run = create_run(folder, config, argv=[])
    metrics = Metrics(protocol="official", banner=HOSTILE, selected_on="PublicTest", test=SPLIT, validation=SPLIT)
    metrics.write(run.path)
    pair = ArmPair(a="with", b="without", **PAIR)
    mcnemar = ModelPair(
        a="x",
        b="y",
        difference=Estimate(value=0.1),
        mcnemar=McNemar.build({"b": 1, "c": 2, "p": 1.0}),
        sentence=HOSTILE,
    )
    image = np.zeros((3, 16, 16), np.uint8)
    return {
        "config": config,
        "run": dlfer.open_run(run.path),
        "metrics": metrics,
        "split": SPLIT,
        "comparison": ComparisonRecord(
            table=[ArmRow(arm=HOSTILE, seeds=[0], test=SEEDS)], paired=[pair], notes=["note"]
        ),
        "models": ModelComparison(
            runs=[ComparedRun(name=HOSTILE, n=40, accuracy=Estimate(value=0.5))],
            n_common=40,
            pairs=[mcnemar],
            part="test",
        ),
        "audit": dlfer.audit(image, [HOSTILE, "sad", "sad"]),
        "classifier": Small(),
    }


KINDS = ["config", "run", "metrics", "split", "comparison", "models", "audit", "classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_notebooks_get_escaped_tables_that_suit_every_theme(kind, tmp_path):
    value = make_records(tmp_path)[kind]
    shown = value._repr_html_()
    assert "<script" not in shown
    assert "\u202e" not in shown
    assert "&lt;script&gt;" in shown
    assert not re.search(r"(?<!-)color:|background", shown)
    assert shown.count("<table") == shown.count("</table>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_repr_is_short_and_on_one_line(kind, tmp_path):
    text = repr(make_records(tmp_path)[kind])
    assert "\n" not in text
    assert len(text) < 700
    assert text[0].isupper()


def test_a_repr_says_the_figures():
    assert repr(SPLIT) == "SplitMetrics(n=40, accuracy=(0.6432, 0.5, 0.75), macro_f1=(0.6,))"
    assert str(dlfer.load_experiment(QUICKSTART)) == "experiment quickstart"
    assert format_interval(SPLIT.accuracy) == "64.3 % (50.0 to 75.0)"
    assert format_interval(None) == format_interval(Estimate()) == "–"


def test_long_tables_say_how_long_they_are():
    shown = format_html("t", [(str(row),) for row in range(1234)])
    assert shown.count("<tr>") == 20
    assert "1,234 rows" in shown


@pytest.mark.parametrize("seeds", [[], [0.5], [0, 0], [-1], ["1"], [True, 1], 3])
def test_seeds_are_different_whole_numbers(seeds):
    with pytest.raises(UserError, match=r"^seeds: found .*, expected different whole numbers from 0"):
        dlfer.ablate(QUICKSTART, seeds=seeds)


@pytest.mark.parametrize(
    ("verb", "given", "overrides", "found"),
    [
        ("ablate", {"seeds": [0, 1]}, {"ablation.seeds": [5, 6]}, "seeds: found with ablation.seeds in overrides"),
        ("sweep", {"seeds": [0]}, {"sweep": {"seeds": [5]}}, "seeds: found with sweep in overrides"),
        ("search", {"trials": 3}, {"search.trials": 5}, "trials: found with search.trials in overrides"),
    ],
)
def test_an_argument_and_an_override_of_the_same_key_are_refused(verb, given, overrides, found):
    with pytest.raises(UserError, match=found):
        getattr(dlfer, verb)(QUICKSTART, overrides, **given)


def test_open_run_finds_runs_and_studies(tmp_path):
    config = dlfer.load_experiment(QUICKSTART)
    run = create_run(tmp_path / "runs", config, argv=[])
    found = dlfer.open_run(run.path)
    assert isinstance(found, dlfer.Run)
    assert (found.folder, found.status, found.kind) == (run.path, "running", "run")
    assert found.config == config
    assert found.report == run.path / "report.html"
    assert found.history == {}
    assert repr(found) == f"Run({str(run.path)!r}, status='running')"
    assert isinstance(dlfer.open_run(run.path.name, tmp_path / "runs"), dlfer.Run)
    for kind in ("ablation", "sweep", "search"):
        study = dlfer.open_run(create_run(tmp_path / "runs", config, argv=[], kind=kind).path)
        assert isinstance(study, dlfer.Study)
        assert (study.kind, study.comparison, study.members, study.runs, study.best) == (kind, None, [], [], {})
        assert kind.capitalize() in study._repr_html_()
    with pytest.raises(ModelError, match="nothing"):
        dlfer.open_run("nothing", tmp_path / "runs")


@pytest.mark.parametrize(
    ("kind", "rules"),
    [("ablation", "ablation.ABLATION"), ("sweep", "sweep.SWEEP"), ("cross_validation", "crossval.CROSSVAL")],
)
def test_each_kind_of_study_is_resumed_as_what_it_is(tmp_path, monkeypatch, kind, rules):
    module, _, name = rules.partition(".")
    expected, resumed = getattr(importlib.import_module(f"dlfer.study.{module}"), name), []
    monkeypatch.setattr("dlfer.study.comparison.Rules.resume", lambda self, *args, **named: resumed.append(self))
    study = dlfer.open_run(create_run(tmp_path, dlfer.load_experiment(QUICKSTART), argv=[], kind=kind).path)
    assert study.resume().kind == kind
    assert resumed == [expected]


def test_a_run_that_was_not_finished_says_so(tmp_path):
    run = dlfer.open_run(create_run(tmp_path, dlfer.load_experiment(QUICKSTART), argv=[]).path)
    with pytest.raises(ModelError, match="did not reach this step"):
        run.metrics  # noqa: B018
    with pytest.raises(ModelError, match="this run has no model"):
        run.classifier  # noqa: B018
    assert "running" in run._repr_html_()


def test_history_has_a_column_of_each_stage(tmp_path):
    run = dlfer.open_run(create_run(tmp_path, dlfer.load_experiment(QUICKSTART), argv=[]).path)
    for stage in ("pretrain", "finetune"):
        (run.folder / stage).mkdir()
        text = "epoch,phase,train_loss,validation_accuracy\n1,head,1.5,0.25\n2,all,nan,0.5\n"
        (run.folder / stage / "history.csv").write_text(text)
    assert list(run.history) == ["pretrain", "finetune"]
    found = run.history["finetune"]
    assert (found["epoch"], found["phase"], found["train_loss"]) == ([1, 2], ["head", "all"], [1.5, None])
    assert found["validation_accuracy"] == [0.25, 0.5]


def test_a_stop_by_max_hours_is_no_error_and_every_other_is(tmp_path, monkeypatch):
    run = create_run(tmp_path, dlfer.load_experiment(QUICKSTART), argv=[])
    stop = TrainingStopped("stopped", reason="--max-hours")
    stop.folder = run.path

    def stop_now(*given, **options):
        raise stop

    monkeypatch.setattr("dlfer.study.comparison.Rules.start", stop_now)
    assert dlfer.sweep(QUICKSTART, max_hours=1).folder == run.path
    for reason in ("SIGTERM", "Ctrl-C"):
        stop.reason = reason
        with pytest.raises(TrainingStopped) as caught:
            dlfer.sweep(QUICKSTART, max_hours=1)
        assert caught.value.folder == run.path


def draw(count: int = 12, *, shape: tuple[int, ...] = (24, 24), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(24, 24), (24, 24, 1), (24, 24, 3)])
@pytest.mark.parametrize("labels", [["happy", "sad"] * 6, [0, 5] * 6, np.array([3, -1] * 6, np.int8), ("a", "b") * 6])
def test_audit_finds_what_was_planted(shape, labels):
    images = draw(shape=shape)
    images[4] = images[2]  # the same label
    images[7] = images[6]  # another label
    images[9] = 77
    found = dlfer.audit(images, labels)
    assert (found.num_images, found.distinct_images) == (12, 10)
    assert (found.duplicate_groups, found.conflicting_groups) == (2, 1)
    assert (found.constant_images, found.near_constant_images) == (1, 1)
    assert [place.id for place in found.flat] == ["9"]
    assert found.labels == sorted(
        {str(label) for label in labels}, key=lambda name: (int(name), 0) if name[-1:].isdigit() else name
    )


def test_audit_finds_leaks_across_splits_and_names_images():
    images = draw()
    images[11] = images[0]
    splits = ["train"] * 8 + ["test"] * 4
    found = dlfer.audit(images, ["a", "b"] * 6, splits=splits, ids=[f"im{i}.png" for i in range(12)])
    assert {name: split.num_images for name, split in found.splits.items()} == {"train": 8, "test": 4}
    assert found.leaks["train->test"].exact == 1
    assert {place.id for place in found.samples.exact[0]} == {"im0.png", "im11.png"}


@pytest.mark.parametrize(
    ("images", "labels", "more", "message"),
    [
        (draw() / 255, ["a"] * 12, {}, "found float64 .* expected uint8 .* Multiply"),
        (draw().astype(int), ["a"] * 12, {}, "found int64"),
        (draw()[0], ["a"], {}, r"\[24, 24\], expected uint8"),
        (draw(shape=(24, 24, 4)), ["a"] * 12, {}, "expected uint8"),
        ([draw()[0], draw(shape=(9, 9))[0]], ["a", "b"], {}, "different sizes"),
        (draw(), ["a"] * 11, {}, "12 images and 11 labels"),
        (draw(0), [], {}, "0 images and 0 labels"),
        (draw(), [0.5] * 12, {}, "labels: found float64"),
        (draw(), ["a", None] * 6, {}, "labels: found object"),
        (draw(), [True] * 12, {}, "labels: found bool"),
        (draw(), [["a"]] * 12, {}, "expected .N. names or whole numbers"),
        (draw(), ["a"] * 12, {"ids": ["same"] * 12}, "occurs more than once"),
        (draw()[:, :7], ["a"] * 12, {}, "expected at least 8 pixels on each side"),
        (draw(), ["a"] * 12, {"ids": ["x"]}, "12 images, 12 targets and 1 ids"),
        (draw(), ["a"] * 12, {"splits": ["train"]}, "expected one name for each of 12 images"),
    ],
)
def test_audit_refuses_arrays_of_another_form(images, labels, more, message):
    with pytest.raises(DataError, match=message):
        dlfer.audit(images, labels, **more)
