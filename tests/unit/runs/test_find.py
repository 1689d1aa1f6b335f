"""What a model's name leads to, also on the hub, and which links of a downloaded model are followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dlfer.config.load import compute_digest, load_experiment, with_overrides
from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.runs import find
from dlfer.runs.files import check_inside
from dlfer.runs.find import default_runs_folder, find_model, find_unfinished_run, list_models
from dlfer.runs.run import create_run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("experiment: {name: small, seed: 7}\nfinetune: {data: {source: synthetic_faces}}\n")
    return load_experiment(path)


def make_artifact(folder):
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text("{}")
    return folder


def test_models_are_looked_up_here_then_at_home_then_in_the_package_then_in_the_checkout(tmp_path, monkeypatch):
    work, home, package, checkout = (tmp_path / name for name in ("work", "home", "package", "checkout"))
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("DLFER_HOME", str(home))
    monkeypatch.setattr("dlfer.config.names.PACKAGE", package)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: checkout)
    only = make_artifact(checkout / "saved_models" / "only")
    assert find_model("only") == only
    for place in (checkout, package, home):
        make_artifact(place / "saved_models" / "shared")
        assert find_model("shared") == place / "saved_models" / "shared"
    make_artifact(work / "saved_models" / "shared")
    assert find_model("shared").resolve() == work / "saved_models" / "shared"
    assert find_model(str(only)) == only
    assert set(list_models()) == {"only", "shared"}
    with pytest.raises(ModelError) as caught:
        find_model("none")
    message = str(caught.value)
    found = [message.index(str(place)) for place in ("saved_models", home, package, checkout)]
    assert found == sorted(found)
    assert "Known models: shared, only" in message


@pytest.mark.parametrize("name", ["some", "saved_models/some"])
def test_a_folder_that_is_no_model_says_what_it_lacks_or_that_it_is_an_export(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "onnx").mkdir(parents=True)
    with pytest.raises(ModelError, match=f"some: {name} is a folder without artifact.json"):
        find_model("some")
    (tmp_path / name / "onnx" / "export.json").write_text("{}")
    with pytest.raises(ModelError, match=rf"some: is an export \({name}/onnx\).* --engine onnx or openvino"):
        find_model("some")
    with pytest.raises(ModelError, match=rf"is an export \({name}/onnx\)"):
        find_model(f"{name}/onnx")


def test_the_newest_unfinished_run_of_this_very_experiment_is_found(tmp_path, config):
    folder, digest = tmp_path / "runs", compute_digest(config)
    assert find_unfinished_run("small", digest, folder) is None
    stopped, finished, smoke, member = (create_run(folder, config, argv=[]) for _ in range(4))
    stopped.stop("SIGTERM")
    finished.finish()
    smoke.update(smoke=True)
    member.update(study="small/20260101T000000Z-ablation")
    other = create_run(folder, with_overrides(config, {"experiment.seed": 8}), argv=[])
    (folder / "small" / "29990101T000000Z-damaged").mkdir()
    (folder / "small" / "29990101T000000Z-damaged" / "run.json").write_text("{")
    create_run(folder, config, argv=[], kind="ablation")
    assert find_unfinished_run("small", digest, folder) == stopped.path
    assert find_unfinished_run("small", compute_digest(other.config()), folder) == other.path
    stopped.finish()
    assert find_unfinished_run("small", digest, folder) is None


def test_the_model_of_a_run_is_found_by_path_and_name(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.names.find_checkout", lambda: None)
    run = create_run(default_runs_folder(), config, argv=[])
    with pytest.raises(ModelError, match="this run has no model; its status is running"):
        find_model(run.path)
    with pytest.raises(ModelError, match="this run has no model"):
        find_model("small/2")
    make_artifact(run.path / "model")
    assert find_model(run.path) == run.path / "model"
    assert find_model(run.path / "model") == run.path / "model"
    assert find_model(run.path.name) == run.path / "model"
    comparison = create_run(default_runs_folder(), config, argv=[], kind="ablation")
    with pytest.raises(ModelError, match=r"a comparison \(ablation\) has no model"):
        find_model(comparison.path)


@pytest.fixture(autouse=True)
def _forget():
    find._download.cache_clear()


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://org/model", ("org/model", None)),
        ("hf://org/model/", ("org/model", None)),
        ("hf://org/model@v1.0", ("org/model", "v1.0")),
        ("hf://org/my.model-2@refs/pr/1", ("org/my.model-2", "refs/pr/1")),
        (Path("hf://org/model@abc"), ("org/model", "abc")),
    ],
)
def test_a_name_is_a_repository_and_a_revision(tmp_path, monkeypatch, name, asked):
    found = []

    def download(repository, *, revision, allow_patterns):
        found.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "artifact.json").write_text("{}")
    assert find_model(name) == find_model(name) == tmp_path
    assert found == [asked], "it is asked for once"


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://model",
        "hf://a/b/c",
        "hf:///a/b",
        "hf://a/b@",
        "hf://../b",
        "hf://a/.b",
        "hf://a b/c",
        "hf://a/b\n",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ModelError, match="expected hf://ORG/NAME"):
        find_model(name)


def test_the_cause_of_a_failure_is_told(monkeypatch):
    def fail(*given, **options):
        raise ValueError("outer\nmore") from OSError("connection refused\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"hf://a/b@c: cannot be downloaded \(OSError: connection refused\)\. .*HF_TOKEN"
    ):
        find_model("hf://a/b@c")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dlfer\[hub\]'"):
        find_model("hf://a/b")


def test_links_lead_to_the_blobs_of_the_same_repository_alone(tmp_path):
    repository = tmp_path / "models--org--model"
    folder = repository / "snapshots" / "abc"
    for path in (folder / "members", repository / "blobs", repository / "refs", tmp_path / "other" / "blobs"):
        path.mkdir(parents=True)
    for place in (repository / "blobs", repository / "refs", tmp_path / "other" / "blobs", tmp_path):
        (place / "file").write_text("x")
    for name, target in {
        "good": "../../blobs/file",
        "members/good": "../../../blobs/file",
        "refs": "../../refs/file",
        "other": "../../../other/blobs/file",
        "outside": "../../../file",
    }.items():
        (folder / name).symlink_to(target)
    for name in ("good", "members/good"):
        check_inside(folder, name, file=folder / "artifact.json")
    check_inside(folder / "members", "good", file=folder / "artifact.json")
    for name in ("refs", "other", "outside", "../../blobs/file"):
        with pytest.raises(ModelError, match="outside of its folder"):
            check_inside(folder, name, file=folder / "artifact.json")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "link").symlink_to("../models--org--model/blobs/file")
    with pytest.raises(ModelError, match="outside of its folder"):
        check_inside(plain, "link", file=plain / "artifact.json")
