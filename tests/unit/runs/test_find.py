"""What a model's name leads to."""

from __future__ import annotations

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import ModelError
from dlfer.runs.find import default_runs_folder, find_model, list_models
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
    monkeypatch.setattr("dlfer.config.places.PACKAGE", package)
    monkeypatch.setattr("dlfer.config.places.find_checkout", lambda: checkout)
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


def test_the_model_of_a_run_is_found_by_path_and_name(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DLFER_HOME", raising=False)
    monkeypatch.setattr("dlfer.config.places.find_checkout", lambda: None)
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
