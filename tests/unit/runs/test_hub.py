"""Names of models on the hub, and which links of a downloaded model are followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dlfer.errors import EnvironmentProblem, ModelError
from dlfer.runs import hub
from dlfer.runs.files import check_inside
from dlfer.runs.find import find_model


@pytest.fixture(autouse=True)
def _forget():
    hub._download.cache_clear()


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
