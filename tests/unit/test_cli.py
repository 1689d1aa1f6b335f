"""The verbs: what they call, print and exit with. The work itself is tested elsewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import dlfer
from dlfer.config.load import load_experiment
from dlfer.errors import DlferError, TrainingStopped
from dlfer.runs.metrics_record import JudgedOn, Metrics
from dlfer.runs.records import ArtifactRecord
from dlfer.runs.run import create_run

SMALL = "experiment: {name: small}\nfinetune: {data: {source: synthetic_faces}}\n"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    (tmp_path / "a.yaml").write_text(SMALL)
    (tmp_path / "bad.yaml").write_text(SMALL + "modle: {}\n")
    return tmp_path


@pytest.fixture
def call(work, call):
    """The command, run in the folder `work`."""
    return call


@pytest.fixture
def stand_in(monkeypatch):
    """Put functions in place of a module that does the work, and record their calls."""
    calls = []

    def stand_in(module: str, **functions):
        def record(name, result):
            def function(*args, **kwargs):
                calls.append((name, args, kwargs))
                if isinstance(result, BaseException):
                    raise result
                return result

            return function

        names = {name: record(name, result) for name, result in functions.items()}
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**names))
        return calls

    return stand_in


@pytest.fixture
def stand_in_rules(stand_in):
    """Put functions in place of the `Rules` that a module of `dlfer.study` has, and record their calls."""

    def stand_in_rules(module: str, *, start: Path | None = None, resume: Path | None = None):
        calls = stand_in(module, start=start, resume=resume)
        vars(sys.modules[module])[module.rpartition(".")[2].upper()] = sys.modules[module]
        return calls

    return stand_in_rules


def test_help_lists_the_verbs_by_what_a_user_wants(call):
    code, out, _ = call("--help")
    assert code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    places = [out.index(f"─ {panel} ─") for panel in ("Start", "Train and compare", "Use what was trained", "Inspect")]
    assert places == sorted(places)
    for verb in ("doctor", "init", "check", "run", "ablate", "evaluate", "report", "show"):
        assert verb in out


def test_version(call):
    assert call("--version")[:2] == (0, f"dlfer {dlfer.__version__}\n")


def test_check_names_every_problem_of_every_file(call):
    code, out, err = call("check", "a.yaml", "bad.yaml", "none.yaml")
    assert (code, out) == (2, "")
    assert "ok  a.yaml  small" in err
    assert "bad.yaml line 3: modle: there is no such key. Did you mean model?" in err
    assert "none.yaml: there is no such file" in err
    assert "Traceback" not in err


def test_check_names_keys_without_effect(call):
    code, _, err = call("check", "a.yaml", "--set", "finetune.loss.gamma=3")
    assert code == 0
    assert "a.yaml: finetune: without effect: loss.gamma 3.0 (the loss is categorical_crossentropy)" in err


def test_check_names_a_warm_up_that_is_as_long_as_the_training(call):
    words = (
        "check",
        "a.yaml",
        "--set",
        "pretrain={data: {source: synthetic_faces}, epochs: 2, schedule: {warmup_epochs: 9}}",
    )
    for more in (["--set", "finetune.epochs=1", "--set", "finetune.schedule={warmup_epochs: 1}"], []):
        code, _, err = call(*words, *more)
        assert code == 0
        assert (
            "a.yaml: pretrain: schedule.warmup_epochs: found 9, and the rate rises until the end of the training" in err
        )
        assert ("a.yaml: finetune: schedule.warmup_epochs: found 1, " in err) == bool(more)
    _, _, err = call(
        "check", "a.yaml", "--set", "pretrain={weights: imagenet, epochs: 2, schedule: {warmup_epochs: 9}}"
    )
    assert "rate rises" not in err


def test_check_prints_the_whole_experiment(call, work):
    code, out, _ = call("check", "a.yaml", "--print", "--set", "finetune.epochs=3")
    assert code == 0
    (work / "again.yaml").write_text(out)
    assert load_experiment(work / "again.yaml") == load_experiment(work / "a.yaml", {"finetune.epochs": 3})


@pytest.mark.parametrize("more", [("--smoke",), ("--dry-run",), ("--resume", "x")])
def test_continue_goes_with_an_experiment_alone(call, more):
    code, _, err = call("run", "a.yaml", "--continue", *more)
    assert code == 2
    assert "dlfer run --continue: goes with an experiment FILE" in err


def test_check_refuses_data_that_is_not_there(call, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    code, _, err = call("check", "a.yaml", "--set", "finetune.data={source: folder, path: nowhere}")
    assert code == 2
    assert "finetune.data.path: nowhere is not there" in err
    code, _, err = call("check", "a.yaml", "--set", "finetune.data={source: folder, path: '${NOT_SET}/x'}")
    assert code == 2
    assert "NOT_SET is not set" in err


def test_check_tells_problems_and_obstacles_of_all_files_in_one_message(call):
    given = ("finetune.data={source: folder, path: nowhere}", "finetune.image_size=48", "model.backbone=inception_v3")
    code, out, err = call("check", "bad.yaml", "a.yaml", *(word for text in given for word in ("--set", text)))
    assert (code, out) == (2, "")
    assert "a.yaml: cannot run here, for 2 things" in err
    assert all(text in err for text in ("modle", "nowhere is not there", "expected at least 75"))


@pytest.mark.parametrize("verb", ["run", "ablate", "sweep", "search"])
def test_training_verbs_refuse_before_work_what_would_fail(call, verb):
    code, _, err = call(verb, "a.yaml", "--set", "finetune.data={source: folder, path: nowhere}")
    assert code == 2
    assert "nowhere is not there" in err
    assert not Path("saved_models/runs").exists()


def test_run_hands_its_options_on_and_ends_with_run_and_report(call, stand_in):
    calls = stand_in("dlfer.experiment.run", run_experiment=Path("r/small/1"), resume_run=None)
    code, out, _ = call(
        *("run", "a.yaml", "--set", "finetune.epochs=3", "--set", "pretrain=null", "--out", "r", "--smoke"),
        *("--require-gpu", "--max-hours", "0.5", "--no-cache"),
    )
    assert (code, out) == (0, "r/small/1\nr/small/1/report.html\n")
    (name, (file, options), _) = calls[0]
    assert (name, file) == ("run_experiment", Path("a.yaml"))
    assert options.overrides == {"finetune.epochs": 3, "pretrain": None}
    assert (options.out, options.smoke, options.require_gpu, options.max_hours) == (Path("r"), True, True, 0.5)
    assert (options.use_cache, options.dry_run) == (False, False)
    assert options.argv[:3] == ("dlfer", "run", "a.yaml")


def test_a_dry_run_prints_no_path(call, stand_in):
    calls = stand_in("dlfer.experiment.run", run_experiment=None, resume_run=None)
    assert call("run", "a.yaml", "--dry-run")[:2] == (0, "")
    assert calls[0][1][1].dry_run is True


def test_ablate_takes_seeds(call, stand_in_rules):
    calls = stand_in_rules("dlfer.study.ablation", start=Path("r/x"))
    assert call("ablate", "a.yaml", "--seeds", "0,1,2")[0] == 0
    assert calls[0][2] == {"seeds": [0, 1, 2], "workers": None, "array": None}
    call("ablate", "a.yaml", "--workers", "2")
    assert calls[1][2] == {"seeds": None, "workers": 2, "array": None}


@pytest.mark.parametrize("verb", ["ablate", "sweep"])
def test_a_job_array_names_a_member_or_collects(call, stand_in_rules, verb):
    calls = stand_in_rules({"ablate": "dlfer.study.ablation", "sweep": "dlfer.study.sweep"}[verb], start=Path("r/x"))
    assert call(verb, "a.yaml", "--out", "r", "--member", "3")[0] == 0
    assert calls[0][2]["array"].member == "3"
    assert call(verb, "a.yaml", "--out", "r", "--collect")[0] == 0
    assert calls[1][2]["array"].member is None


def test_a_storage_is_handed_on_and_its_password_is_not_recorded(call, stand_in):
    from dlfer.study.search.run import SearchOptions

    calls = stand_in("dlfer.study.search.run", run_search=Path("r/x"), resume_search=None)
    sys.modules["dlfer.study.search.run"].SearchOptions = SearchOptions
    url = "postgresql://me:secret@host/db"
    assert call("search", "a.yaml", "--storage", url)[0] == 0
    (_, (_, options, settings), _) = calls[0]
    assert settings.storage == url
    assert options.argv[-1] == "postgresql://me:***@host/db"


def test_resume_finds_the_run_and_its_verb(call, stand_in, stand_in_rules, work):
    config = load_experiment(work / "a.yaml")
    single = create_run(Path("saved_models/runs"), config, argv=[])
    both = create_run(Path("saved_models/runs"), config, argv=[], kind="ablation")
    calls = stand_in("dlfer.experiment.run", run_experiment=None, resume_run=single.path)
    stand_in_rules("dlfer.study.ablation", resume=both.path)
    assert call("run", "--resume", single.path.name)[0] == 0
    assert calls[-1][0] == "resume_run"
    assert calls[-1][1][0] == single.path
    assert call("ablate", "--resume", both.path.name)[0] == 0
    assert calls[-1][1][0] == both.path
    code, _, err = call("run", "--resume", str(both.path))
    assert code == 2
    assert "continue it with: dlfer ablate --resume" in err


WRONG = [
    (("run",), "give either an experiment FILE or --resume RUN"),
    (("run", "a.yaml", "--resume", "x"), "give either an experiment FILE or --resume RUN"),
    (("run", "--resume", "x", "--set", "model.dropout=0"), "leave --set out"),
    (("run", "--resume", "x", "--dry-run"), "leave --dry-run out"),
    (("run", "--resume", "x"), "neither the folder of a run nor"),
    (("run", "none.yaml"), "none.yaml: there is no such file"),
    (("run", "bd.yaml"), "there is no such file. Did you mean bad.yaml?"),
    (("run", "bad.yaml"), "Did you mean model?"),
    (("run", "a.yaml", "--set", "finetune.data.num_images=200"), "keys and values: train, validation, test."),
    (("run", "a.yaml", "--set", "finetune.epochs"), "expected KEY=VALUE"),
    (("run", "a.yaml", "--max-hours", "0"), "expected more than 0"),
    (("run", "a.yaml", "--max-hours", "nan"), "expected more than 0"),
    (("ablate", "a.yaml", "--seeds", "0,x"), "--seeds 0,x"),
    (("ablate", "a.yaml", "--seeds", "1,1"), "--seeds 1,1"),
    (("ablate", "--resume", "x", "--seeds", "1"), "leave --seeds out"),
    (("ablate", "a.yaml", "--member", "0"), "expected --out DIR"),
    (("sweep", "a.yaml", "--collect"), "expected --out DIR"),
    (("sweep", "a.yaml", "--collect", "--member", "0", "--out", "r"), "found both --member and --collect"),
    (("sweep", "--resume", "x", "--member", "0", "--out", "r"), "found --resume; leave that out"),
    (
        ("ablate", "a.yaml", "--seeds", "0,1", "--set", "ablation.seeds=[5,6,7]"),
        "found both --seeds 0,1 and --set ablation.seeds=[5, 6, 7], which give ablation.seeds; leave one",
    ),
    (
        ("sweep", "a.yaml", "--seeds", "0,1", "--set", "sweep={seeds: [5]}"),
        "found both --seeds 0,1 and --set sweep=",
    ),
    (
        ("crossval", "a.yaml", "--folds", "5", "--set", "finetune.data.folds=3"),
        "found both --folds 5 and --set finetune.data.folds=3",
    ),
    (
        ("crossval", "a.yaml", "--folds", "5", "--set", "finetune.data.protocol=official"),
        "found both --folds 5 and --set finetune.data.protocol=official",
    ),
    (
        ("search", "a.yaml", "--trials", "5", "--set", "search.trials=3"),
        "both --trials 5 and --set search.trials=3",
    ),
    (
        ("ablate", "a.yaml", "--collect", "--workers", "3", "--max-hours", "1", "--out", "r"),
        "--collect: found --workers and --max-hours, but --collect trains nothing; leave that out",
    ),
    (
        ("sweep", "a.yaml", "--member", "0", "--workers", "3", "--out", "r"),
        "--member: found --workers, but --member",
    ),
    (("crossval", "a.yaml", "--collect", "--max-hours", "1", "--out", "r"), "--collect: found --max-hours, but"),
    (("search", "--resume", "x", "--ablation"), "leave --ablation out"),
    (("search", "--resume", "x", "--storage", "j.log"), "leave --resume out"),
    (("evaluate", "m", "--csv", "x"), "Did you mean --data"),
    (("evaluate", "m", "--data", "x", "--usage", "PublicTest"), "Did you mean --split"),
    (("evaluate", "m", "--split", "tst"), "there is no such model"),
    (("evaluate", "m", "--data", "x"), "there is no such model"),
    (("report", "x"), "neither the folder of a run nor"),
    (("show", "nothing"), "neither the folder of a run nor"),
    (("show", "lite2_96"), "is a model without its run"),
    (("ship", "lite2_96", "mine"), "lite2_96: is a model without its run"),
    (("report", "lite2_96"), "is a model without its run"),
    (("export", "lite2_96", "--to", "TFLite,saved_model"), "Did you mean litert,savedmodel?"),
    (("show", "config"), "name the experiment file"),
    (("show", "run", "x/20261121"), "A run is shown by dlfer show x/20261121."),
    (("show", "runs", "a.yaml"), "only config takes a file"),
    (("show", "runs", "--set", "a=1"), "--set goes with config FILE only"),
    (("init", "nowhere"), "there is no such folder"),
    (("bogus",), "No such command"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_wrong_input_exits_2_with_one_message(call, args, message):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_wrong_input_is_refused_without_tensorflow(work):
    """In a process of its own, in which no other test has loaded it."""
    script = """if True:
        import contextlib, json, sys
        from dlfer.cli import main
        for args in json.loads(sys.argv[1]):
            with contextlib.suppress(SystemExit):
                main(args)
            assert not {"tensorflow", "keras"} & set(sys.modules), args
    """
    rows = json.dumps([args for args, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", script, rows], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DlferError("it went wrong"), 1),
        (OSError(28, "No space left on device"), 1),
        (TrainingStopped("stopped", reason="SIGTERM"), 143),
        (TrainingStopped("stopped", reason="--max-hours"), 0),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_of_what_goes_wrong_while_working(call, stand_in, error, code):
    stand_in("dlfer.experiment.run", run_experiment=error, resume_run=None)
    found, out, err = call("run", "a.yaml")
    assert (found, out) == (code, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_turns_into_its_own_error_ends_the_command_as_a_signal(call, monkeypatch, number):
    def convert(*args, **kwargs):
        try:
            signal.raise_signal(number)
        except BaseException:
            raise TypeError("a callback failed") from None

    monkeypatch.setitem(
        sys.modules, "dlfer.experiment.run", types.SimpleNamespace(run_experiment=convert, resume_run=None)
    )
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert call("run", "a.yaml") == (128 + number, "", "")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [1, 13])
def test_what_may_not_be_read_or_written_is_told_with_what_to_do(call, stand_in, number):
    stand_in("dlfer.experiment.run", run_experiment=OSError(number, "Not permitted", "runs/a/.lock"), resume_run=None)
    code, _, err = call("run", "a.yaml")
    assert code == 1
    assert err.startswith("dlfer: runs/a/.lock: Not permitted. This user may not read or write it; change")


def test_an_unexpected_error_is_one_line_that_says_where_and_debug_shows_all(call, stand_in, monkeypatch):
    monkeypatch.setenv("DLFER_DEBUG", "")
    message = "a library\n\nfailed " + "for many reasons " * 100
    stand_in("dlfer.experiment.run", run_experiment=RuntimeError(message), resume_run=None)
    code, out, err = call("run", "a.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("dlfer: RuntimeError in dlfer/")
    assert ".py line " in err
    assert ": a library failed for many reasons" in err
    assert err.endswith("--debug to see the traceback.\n")
    assert err.count("\n") == 1
    assert len(err) < 450
    code, _, err = call("run", "a.yaml", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert message in err


def test_debug_shows_the_traceback_wherever_it_stands(call):
    for args in (("--debug", "run", "none.yaml"), ("run", "none.yaml", "--debug")):
        code, _, err = call(*args)
        assert code == 2
        assert "Traceback" in err
        assert "there is no such file" in err


def test_evaluate_prints_figures_with_n_and_interval(call, stand_in, work):
    model = work / "m"
    model.mkdir()
    (model / "artifact.json").write_text("{}")
    scores = {
        "n": 1234,
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6},
        "macro_f1": {"value": None, "low": None, "high": None},
        "per_class": {"Happy": {"n": 7, "precision": 0.25, "recall": None, "f1": 1.0, "specificity": 0.5}},
    }
    metrics = Metrics.build({"banner": "Read this first.", "test": scores, "validation": None})
    (work / "x.csv").write_text("emotion,pixels,Usage\n")
    calls = stand_in("dlfer.experiment.evaluate", evaluate_with_predictions=(metrics, None))
    code, out, _ = call("evaluate", "m", "--data", "x.csv", "--split", "PublicTest", "--json", "o.json")
    assert code == 0
    assert out.startswith("Read this first.\ntest (n = 1,234): accuracy 50.00 % [40.00, 60.00], macro F1 not defined\n")
    assert "Happy  7  25.00 %    not defined  100.00 %  50.00 %" in out
    metrics.judged_on = JudgedOn(split="PublicTest", file="x.csv", used_for="selection")
    metrics.test_opened = 2
    _, out, _ = call("evaluate", "m", "--data", "x.csv")
    assert "\nvalidation (PublicTest, used for selection) (n = 1,234): accuracy 50.00 %" in out
    assert "\ntest (n" not in out
    assert out.endswith("openings of the test split with this model so far: 2\n")
    given = {name: calls[0][2][name] for name in ("data", "split")}
    assert given == {"data": Path("x.csv"), "split": "PublicTest"}
    assert json.loads(Path("o.json").read_text())["test"]["n"] == 1234


def test_report_writes_that_of_the_kind(call, stand_in, work):
    config = load_experiment(work / "a.yaml")
    single = create_run(work / "r", config, argv=[])
    both = create_run(work / "r", config, argv=[], kind="ablation")
    stand_in("dlfer.report.html", write_report="page of a run")
    stand_in("dlfer.report.comparison", write_comparison_report="page of a comparison")
    stand_in("dlfer.report.search", write_search_report="page of a search")
    calls = stand_in("dlfer.report.card", write_card=None)
    code, out, _ = call("report", str(single.path), str(both.path))
    assert (code, out) == (0, "page of a run\npage of a comparison\n")
    assert "write_card" not in [name for name, _, _ in calls]
    (single.path / "model").mkdir()
    (single.path / "model" / "artifact.json").write_text("{}")
    assert call("report", str(single.path))[0] == 0
    assert ("write_card", (single.path,), {}) in calls


def test_a_report_is_not_begun_in_a_run_that_cannot_be_written(call, stand_in, work, monkeypatch):
    run = create_run(work / "r", load_experiment(work / "a.yaml"), argv=[])
    calls = stand_in("dlfer.report.html", write_report="page of a run")
    monkeypatch.setattr("dlfer.runs.files.os.access", lambda path, mode: False)
    code, out, err = call("report", str(run.path))
    assert (code, out, calls) == (2, "", [])
    assert f"nothing can be written into {run.path}" in err


def test_show_runs_and_one_run(call, work):
    assert call("show", "runs")[1] == ""
    run = create_run(Path("saved_models/runs"), load_experiment(work / "a.yaml"), argv=["dlfer"])
    (run.path / "metrics.json").write_text(
        json.dumps({"test": {"n": 10, "accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}}})
    )
    run.finish()
    _, out, _ = call("show", "runs")
    assert out.splitlines()[1].split()[:3] == [f"small/{run.path.name}", "run", "finished"]
    assert "50.00 % [10.00, 90.00]" in out
    assert json.loads(call("show", "runs", "--json")[1])[0]["status"] == "finished"
    _, out, _ = call("show", "small")
    assert "status: finished" in out
    assert "test accuracy (n = 10): 50.00 % [10.00, 90.00]" in out
    shown = json.loads(call("show", "small", "--json")[1])
    assert shown["argv"] == ["dlfer"]
    assert shown["test_accuracy"] == {"value": 0.5, "low": 0.1, "high": 0.9, "n": 10}


def test_show_runs_sorts_filters_and_shortens(call, work):
    config = load_experiment(work / "a.yaml")
    other = load_experiment(work / "a.yaml", {"experiment.name": "another"})
    runs = {name: create_run(Path("saved_models/runs"), one, argv=[]) for name, one in (("a", config), ("b", other))}
    for (name, run), value in zip(runs.items(), (0.25, 0.75), strict=True):
        estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
        protocol = {"a": "official", "b": "paper"}[name]
        (run.path / "metrics.json").write_text(
            json.dumps({"protocol": protocol, "validation": {"n": 40, "accuracy": estimate}})
        )
        run.finish()
    broken = create_run(Path("saved_models/runs"), config, argv=[], kind="ablation")
    broken.fail(ValueError("it broke\nin the middle " + "of a long story " * 30))

    def names(*words):
        code, out, err = call("show", "runs", *words, "--json")
        assert code == 0, err
        return [row["run"].partition("/")[0] + ("!" if row["status"] == "failed" else "") for row in json.loads(out)]

    assert sorted(names()) == ["another", "small", "small!"]
    assert names("--sort", "accuracy") == ["another", "small", "small!"]
    assert names("--sort", "name")[0] == "another"
    assert names("--sort", "status")[0] == "small!"
    assert names("--filter", "failed") == ["small!"]
    assert names("--filter", "status=finished", "--filter", "name=an") == ["another"]
    assert names("--filter", "protocol=PAPER") == ["another"]
    assert sorted(names("--filter", "small")) == ["small", "small!"]
    assert names("--filter", "nothing") == []
    code, out, err = call("show", "runs", "--filter", "nothing")
    assert (code, out) == (0, "")
    assert "match the filter" in err
    [row] = json.loads(call("show", "runs", "--filter", "paper", "--json")[1])
    assert row["accuracy"] == {"value": 0.75, "low": 0.65, "high": 0.85, "n": 40}
    assert (row["split"], row["n"], row["protocol"]) == ("validation", 40, "paper")
    _, out, _ = call("show", "runs", "--filter", "failed")
    assert out.splitlines()[1].rstrip().endswith("ValueError: it broke")
    assert call("show", "runs", "--json", "runs.json")[0] == 0
    assert len(json.loads(Path("runs.json").read_text())) == 3
    for words, message in (
        (("--sort", "size"), "--sort size: expected one of started, name, status, accuracy"),
        (("--filter", "size=3"), "expected a word, or KEY=WORD with a KEY of name, status, protocol, kind"),
    ):
        code, _, err = call("show", "runs", *words)
        assert code == 2
        assert message in err
    code, _, err = call("show", "models", "--sort", "name")
    assert code == 2
    assert "go with runs only" in err


def test_check_says_what_data_is_and_what_cannot_be_read(call, work):
    for label in ("happy", "sad"):
        (work / "faces" / label).mkdir(parents=True)
        for name in "145":
            (work / "faces" / label / f"{name}.pgm").write_bytes(b"P5 8 8 255\n" + bytes(64))
    code, _, err = call("check", "a.yaml", "faces")
    assert code == 0
    assert "ok  faces: a folder of images; train 6 images; Happy 3, Sad 3. Next: dlfer init faces" in err
    shutil.copytree("faces", "da ta'; x")
    _, _, err = call("check", "da ta'; x")
    assert shlex.split(err.partition("Next: ")[2]) == ["dlfer", "init", "da ta'; x"]
    _, _, err = call("init", "faces", "--out", "o ut.yaml")
    assert "Next: dlfer check 'o ut.yaml', then: dlfer run 'o ut.yaml' --smoke" in err
    assert "#           dlfer ablate 'o ut.yaml' " in Path("o ut.yaml").read_text()
    (work / "faces" / "sad" / "2.pgm").write_bytes(b"P5 8 8 255\n")
    code, _, err = call("check", "faces")
    assert code == 2
    assert "1 of 7 files cannot be read; the first: " in err
    assert err.count("eplace or delete") == 1
    assert "7 files seen, 6 used, 1 left out." in call("init", "faces")[2]
    code, _, err = call("check", "faces.yaml")
    assert (code, "its images were not read, dlfer check faces reads them" in err) == (0, True)
    (work / "faces" / "sad" / "2.pgm").unlink()
    (work / "faces" / "sad" / "3.pgm").symlink_to("nothing")
    shutil.make_archive("z", "zip", "da ta'; x")
    _, _, err = call("check", "faces", "z.zip")
    assert "7 files seen, 6 used, 1 left out." in err
    assert "Left out, broken links: 1 (sad/3.pgm)." in err
    assert "Next: unzip z.zip -d z, then: dlfer init z" in err
    shutil.rmtree(work / "faces" / "sad")
    assert "faces: found one label only (happy), expected two or more" in call("check", "faces")[2]
    row = f"0,{' '.join(['1'] * 2304)}\n"
    (work / "all.csv").write_text(f"emotion,pixels\n{row}{row.replace('0', '1', 1)}")
    code, _, err = call("check", "all.csv")
    assert (code, "dlfer init" in err, "Next: dlfer evaluate MODEL --data all.csv" in err) == (0, False, True)
    (work / "notes.txt").write_text("notes")
    code, _, err = call("check", "notes.txt")
    assert code == 2
    assert "found 'notes', expected a folder" in err


def test_show_config_schema_backbones_sources_models(call, work):
    assert json.loads(call("show", "config", "a.yaml", "--json")[1])["finetune"]["epochs"] == 30
    assert "epochs: 3\n" in call("show", "config", "a.yaml", "--set", "finetune.epochs=3")[1]
    assert json.loads(call("show", "schema", "--json")[1])["title"] == "ExperimentConfig"
    assert "finetune.epochs: integer   = 30" in call("show", "schema")[1]
    rows = json.loads(call("show", "backbones", "--json")[1])
    assert {"backbone": "efficientnet_b3", "image_size": 300, "parameters": 10783528}.items() <= next(
        row for row in rows if row["backbone"] == "efficientnet_b3"
    ).items()
    assert "synthetic_faces" in call("show", "sources")[1]
    model = work / "saved_models" / "mine"
    model.mkdir(parents=True)
    ArtifactRecord.build(
        {
            "format": 1,
            "family": "transfer",
            "labels": ["a", "b"],
            "model": {"backbone": "efficientnet_nano"},
            "input": {"channels": 1, "image_size": 32},
            "sha256": {},
        }
    ).write(model)
    accuracy = {"value": 0.5, "low": 0.1, "high": 0.9}
    Metrics.build({"test": {"n": 10, "accuracy": accuracy}}).write(model)
    header, *lines = call("show", "models")[1].splitlines()
    assert " ".join(header.split()).startswith("name default smoke family backbone image_size weights megabytes")
    row = next(line for line in lines if line.startswith("mine "))
    assert row.split()[:6] == ["mine", "false", "false", "transfer", "efficientnet_nano", "32"]
    assert "  50.00 % [10.00, 90.00]  " in row
    rows = {row["name"]: row for row in json.loads(call("show", "models", "--json")[1])}
    assert rows["mine"]["test"] == {**accuracy, "n": 10}
    (model / "artifact.json").write_text("{}")
    code, out, err = call("show", "models")
    assert code == 0
    assert "mine" not in out
    assert "artifact.json: format: found nothing" in err


def test_the_public_names_exist_and_are_listed():
    assert dlfer.__all__ == sorted(dlfer.__all__)
    assert set(dlfer.__all__) <= set(dir(dlfer))
    assert dlfer.load_experiment is load_experiment
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dlfer.nothing  # noqa: B018


def test_several_reports_are_written_though_one_cannot(call, stand_in, work, monkeypatch):
    config = load_experiment(work / "a.yaml")
    runs = [create_run(work / "r", config, argv=[]) for _ in range(3)]
    stand_in("dlfer.report.comparison", write_comparison_report="")
    stand_in("dlfer.report.search", write_search_report="")

    def write(path):
        if path == runs[1].path:
            raise OSError(28, "the disk is full", str(path))
        return path.name

    monkeypatch.setitem(sys.modules, "dlfer.report.html", types.SimpleNamespace(write_report=write))
    code, out, err = call("report", *(str(run.path) for run in runs))
    assert code == 1
    assert out.split() == [runs[0].path.name, runs[2].path.name]
    assert "1 of the 3 reports could not be written" in err
    assert str(runs[1].path) in err


@pytest.mark.parametrize("verb", ["run", "ablate", "sweep", "search"])
def test_a_folder_that_cannot_be_written_into_is_known_before(call, work, verb):
    (work / "file").write_text("")
    code, _, err = call(verb, str(work / "a.yaml"), "--out", str(work / "file" / "runs"))
    assert code == 2
    assert f"{work / 'file'} is a file" in err


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_figures_are_written_over_nothing_that_is_read(call, work, force):
    (work / "m").mkdir()
    (work / "m" / "artifact.json").write_text("{}")
    for name in ("x.csv", "groups.csv", "there.json"):
        (work / name).write_text(name)
    (work / "hard.json").hardlink_to(work / "x.csv")
    for out in ("m/artifact.json", "x.csv", "hard.json", "groups.csv", "m/../x.csv"):
        code, _, err = call(
            *("evaluate", str(work / "m"), "--data", "x.csv", "--attributes", "groups.csv", "--json", out, *force)
        )
        assert code == 2
        assert "input" in err
        assert out in err
    if not force:
        code, _, err = call("evaluate", str(work / "m"), "--data", "x.csv", "--json", "there.json")
        assert code == 2
        assert "exists already" in err
    assert (work / "x.csv").read_text() == "x.csv"
    assert (work / "there.json").read_text() == "there.json"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_comparison_is_written_over_nothing_that_is_compared(call, work, force):
    run = create_run(work / "r", load_experiment(work / "a.yaml"), argv=[])
    (work / "p.npz").write_text("p")
    for out in (work / "p.npz", run.path / "run.json", run.path / "config.yaml"):
        before = out.read_bytes()
        code, _, err = call("compare", str(run.path), str(work / "p.npz"), "--json", str(out), *force)
        assert code == 2
        assert "never replaced" in err
        assert out.read_bytes() == before
