"""Wrong command lines: one message with what was meant, exit code 2, and nothing done; and the help at 80 columns."""

from __future__ import annotations

import re

import pytest

from dlfer.cli import VERBS, app
from dlfer.config import aliases

NAMES = [module.__name__.rpartition(".")[2] for modules in VERBS.values() for module in modules]


@pytest.fixture
def call(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    (tmp_path / "x.yaml").write_text("experiment: {name: x}\nfinetune: {data: {source: synthetic_faces}}\n")
    return call


def options_of(verb):
    from typer.main import get_command

    command = get_command(app).commands[verb]
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts, param.display_name_raw)}


def test_what_the_table_names_exists():
    everything = set().union(*(options_of(verb) for verb in NAMES), {"--help", "--version", "--debug"})
    for meant in aliases.VERBS.values():
        assert meant.split()[0] in (*NAMES, "--version", "--help"), meant
    for meant in aliases.OPTIONS.values():
        assert set(meant) <= everything, meant


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("x.jpg", "--per-class", "3"), "--per-class goes with --split."),
        (
            ("--split", "test", "--model", "r", "--faces", "crop"),
            "--faces does not go with --split: faces of a split are found as in the run's data",
        ),
        (("x.jpg", "--method", "gradcam", "--size", "8"), "--size goes with --method occlusion or both."),
        (
            ("x.jpg", "--method", "occlusion", "--feature-level", "2"),
            "--feature-level goes with --method gradcam or both.",
        ),
    ],
)
def test_an_option_of_explain_that_would_change_nothing_is_refused(call, args, message):
    code, out, err = call("explain", *args)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_a_folder_named_like_the_home_folder_is_not_the_home_folder(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", "home"):
        (tmp_path / name).mkdir()
    for word, name in (("./~", "~"), ("~", "home")):
        code, _, err = call("check", word)
        assert code == 2
        assert f"{tmp_path / name}: " in err
    code, out, err = call("show", "runs", "--runs=./~")
    assert code == 0
    assert str(tmp_path / "~") in " ".join((out + err).split())


def test_a_key_or_a_folder_given_twice_is_refused(call, tmp_path):
    (tmp_path / "faces").mkdir()
    for args, message in (
        (
            ("check", "x.yaml", "--set", "finetune.epochs=3", "--set", "finetune.epochs=5"),
            "--set finetune.epochs: given twice (3 and 5); leave one of them out.",
        ),
        (
            ("init", "faces", "--folder", "a=test", "--folder", "a=train"),
            "--folder a: found two roles; leave one of them out.",
        ),
    ):
        code, out, err = call(*args)
        assert (code, out) == (2, "")
        assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("train", "x.yaml", "--set", "finetune.epochs=3"), "dlfer run x.yaml --set finetune.epochs=3"),
        (("fit", "x.yaml"), "dlfer run x.yaml"),
        (("finetune", "x.yaml"), "dlfer run x.yaml"),
        (("fine-tune", "x.yaml"), "dlfer run x.yaml"),
        (("Train",), "dlfer run"),
        (("test", "lite2"), "dlfer evaluate lite2"),
        (("eval", "lite2"), "dlfer evaluate lite2"),
        (("infer", "a b.jpg"), "dlfer predict 'a b.jpg'"),
        (("ls",), "dlfer show runs"),
        (("evalute",), "dlfer evaluate"),
        (("version",), "dlfer --version"),
        (("help",), "dlfer --help"),
        (("help", "run"), "dlfer run --help"),
        (("help", "nothing"), "dlfer --help"),
    ],
)
def test_an_unknown_verb_names_the_one_that_was_meant(call, args, meant):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert err == f"dlfer: No such command '{args[0]}'.\n  Did you mean: {meant}\n"


def test_an_unknown_verb_with_unknown_options_is_told_as_a_whole(call):
    code, _, err = call("train", "x.yaml", "--epochs", "3", "--lr=0.1", "--smoke")
    assert code == 2
    assert err.splitlines() == [
        "dlfer: No such command 'train'.",
        "  Did you mean: dlfer run x.yaml --smoke",
        "  A key of the experiment is set by: --set finetune.epochs=3",
        "  A key of the experiment is set by: --set finetune.optimizer.learning_rate=0.1",
    ]


def test_a_word_that_is_like_nothing_lists_the_verbs(call):
    code, _, err = call("xyzzy")
    assert code == 2
    assert all(verb in err for verb in NAMES)


@pytest.mark.parametrize("verb", ["run", "ablate", "sweep", "search"])
@pytest.mark.parametrize(
    ("words", "assignment"),
    [
        (("--epochs", "3"), "finetune.epochs=3"),
        (("--epochs=3",), "finetune.epochs=3"),
        (("--finetune.epochs", "3"), "finetune.epochs=3"),
        (("--pretrain.epochs", "3"), "pretrain.epochs=3"),
        (("--lr", "1e-3"), "finetune.optimizer.learning_rate=1e-3"),
        (("-lr", "1e-3"), "finetune.optimizer.learning_rate=1e-3"),
        (("--learning-rate", "1e-3"), "finetune.optimizer.learning_rate=1e-3"),
        (("--finetune.lr", "1e-3"), "finetune.optimizer.learning_rate=1e-3"),
        (("--batch-size", "8"), "finetune.batch_size=8"),
        (("--bs", "8"), "finetune.batch_size=8"),
        (("--size", "96"), "finetune.image_size=96"),
        (("--imgsz", "96"), "finetune.image_size=96"),
        (("--device", "cpu"), "experiment.device=cpu"),
        (("--gpu",), "experiment.device=gpu"),
        (("--gpu", "0"), "experiment.device=gpu"),
        (("--seed", "3"), "experiment.seed=3"),
        (("--backbone", "resnet50"), "model.backbone=resnet50"),
        (("--dropout",), "model.dropout=VALUE"),
        (("finetune.epochs=3",), "finetune.epochs=3"),
        (("lr=1e-3",), "finetune.optimizer.learning_rate=1e-3"),
    ],
)
def test_a_key_given_as_an_option_is_named_with_set(call, verb, words, assignment):
    code, out, err = call(verb, "x.yaml", *words)
    assert (code, out) == (2, "")
    assert f"A key of the experiment is set by: --set {assignment}\n" in err
    assert err.startswith(f"dlfer {verb}: ")
    assert "Traceback" not in err


def test_all_wrong_options_are_told_at_once(call):
    _, _, err = call("run", "x.yaml", "--epochs", "3", "--lr", "0.1", "--smok")
    assert err.splitlines() == [
        "dlfer run: No such option: --epochs, --lr, --smok.",
        "  A key of the experiment is set by: --set finetune.epochs=3",
        "  A key of the experiment is set by: --set finetune.optimizer.learning_rate=0.1",
        "  Did you mean --smoke: Run every phase on two small batches; needs no data.",
    ]


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("audit", "--csv", "a.csv"), "DATA is given without an option: dlfer audit DATA"),
        (("audit", "--folder", "faces"), "DATA is given without an option: dlfer audit DATA"),
        (("audit", "--data", "faces"), "DATA is given without an option: dlfer audit DATA"),
        (("evaluate", "m", "--csv", "a.csv"), "Did you mean --data: "),
        (("evaluate", "m", "--usage", "PublicTest"), "Did you mean --split: "),
        (("evaluate", "m", "faces"), "Data is given by: --data faces"),
        (("compare", "a", "b", "--part", "test"), "Did you mean --split: "),
        (("compare", "a", "b", "--out", "r"), "Did you mean --runs: "),
        (("show", "runs", "--out", "r"), "Did you mean --runs: "),
        (("predict", "a.jpg", "--gpu"), "Did you mean --engine: "),
        (("predict", "a.jpg", "-o", "b.csv"), "Did you mean --out: "),
        (("predict", "a.jpg", "--weights", "m"), "Did you mean --model: "),
        (("run", "x.yaml", "--gpu"), "Did you mean --require-gpu: "),
        (("run", "--config", "x.yaml"), "FILE is given without an option: dlfer run FILE"),
        (("export", "m", "--format", "onnx"), "Did you mean --to: "),
        (("-h",), "Did you mean --help: "),
        (("show", "--json", "runs"), "put --json last"),
        (
            ("evaluate",),
            "Missing argument 'MODEL'.\n  Usage: dlfer evaluate [OPTIONS] MODEL; more: dlfer evaluate --help",
        ),
        (("serve", "--port", "99999"), "Invalid value for '--port'"),
    ],
)
def test_another_option_names_that_of_dlfer(call, args, meant):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert meant in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", [None, *NAMES])
def test_help_fits_80_columns_and_names_no_type_of_python(call, verb):
    code, out, _ = call(*([verb] if verb else []), "--help")
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"<(bool|str|path|list|int)", text)
    if verb is None:
        assert "--install-completion" in text


@pytest.mark.parametrize("verb", NAMES)
def test_what_an_option_takes_is_short_enough_for_its_column(verb):
    from typer.main import get_command

    for param in get_command(app).commands[verb].params:
        assert param.metavar is None or len(param.metavar) <= 12, (verb, param.opts, param.metavar)


def test_without_words_the_help_is_shown(call):
    code, out, _ = call()
    assert code == 0
    assert "First steps" in out


SHARED = {
    "--out": r"^(Folder to write the run in|Output folder|Folder of (exports|shipped models)|File to write|A \.csv)",
    "--runs": r"^Folder to look runs up in",
    "--json": r"^The result as JSON: into FILE, or on stdout",
    "--html": r"^Write the result as a self-contained HTML page",
    "--data": r"^(Images and labels|Images to compare on, instead of the run's own): a folder, a csv in the layout of FER2013, a zip",
    "--split": r"^Split",
    "--force": r"^Replace existing files, but never an input",
    "--set": r"^Set a key",
    "--model": r"^Name of a model, a run or a folder",
    "--resume": r"^Continue an interrupted run",
}
"""Option -> what it means with every verb that has it: --out is where the verb writes, --runs where it looks runs up."""


def test_an_option_means_the_same_with_every_verb():
    from typer.main import get_command

    for verb, command in get_command(app).commands.items():
        for param in command.params:
            for name in set(param.opts) & SHARED.keys():
                assert re.match(SHARED[name], param.help), (verb, name, param.help)


def test_data_is_named_alike_and_positional_where_it_is_the_subject():
    from typer.main import get_command

    commands = get_command(app).commands
    for verb in ("audit", "init"):
        assert [param.metavar for param in commands[verb].params if param.param_type_name == "argument"] == ["DATA"]
    for verb in ("evaluate", "compare", "export"):
        assert "--data" in options_of(verb)
    for verb in NAMES:
        assert not options_of(verb) & {"--csv", "--usage", "--part"}


def test_predict_says_what_is_done_with_labelled_images(call, tmp_path):
    (tmp_path / "fer.csv").write_text("emotion,pixels,Usage\n")
    for name, what in (("fer.csv", "a csv"), ("x.yaml", "an experiment file")):
        code, out, err = call("predict", name)
        assert (code, out) == (2, "")
        assert f"{name}: found {what}, expected pictures" in err
        assert f"dlfer evaluate MODEL --data {name}" in err


def test_a_folder_of_runs_that_does_not_exist_is_told(call, tmp_path):
    code, out, err = call("show", "runs", "--runs", "nothere")
    assert (code, out, "--runs nothere: there is no such folder" in err) == (2, "", True)
    (tmp_path / "empty").mkdir()
    assert call("show", "runs", "--runs", str(tmp_path / "empty"))[0] == 0
