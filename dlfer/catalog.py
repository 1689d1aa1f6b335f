"""The names of models: where a path, a model's name or a run's name leads to."""

from __future__ import annotations

import os
from pathlib import Path

from dlfer.errors import ModelError
from dlfer.runs import RUN_FILE, Run, find_checkout, match_runs, open_run

ARTIFACT_FILE = "artifact.json"


def find_model(name: Path | str) -> Path:
    """Return the artifact folder (it holds artifact.json) of a path, a model's name, or a run's name.

    A name is looked up in ./saved_models, then $DLFER_HOME/saved_models, then in the checkout that
    dlfer is imported from; last among the runs of each. Of a run it is the folder `model`.

    Raises:
        ModelError: nothing of that name; with the places tried and the names known.
    """
    places = list_model_places()
    for path in (Path(name).expanduser(), *(place / name for place in places)):
        found = _get_artifact(path)
        if found is not None:
            return found
    for place in places:
        if match_runs(str(name), place / "runs"):
            return _get_artifact_of_run(open_run(name, place / "runs"))
    known = list_models()
    raise ModelError(
        f"{name}: there is no such model. Looked for a folder of that path, then in "
        f"{', '.join(str(place) for place in places)} and their runs. "
        f"{'Known models: ' + ', '.join(known) if known else 'No models are there yet; train one with dlfer run'}."
    )


def list_models() -> dict[str, Path]:
    """Return the models by name (not those of runs), the first place that has a name winning."""
    models: dict[str, Path] = {}
    for place in list_model_places():
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.name != "runs" and (path / ARTIFACT_FILE).is_file():
                models.setdefault(path.name, path)
    return models


def list_model_places() -> list[Path]:
    """Return the folders in which the name of a model is looked up, in order."""
    places = [Path("saved_models")]
    if os.environ.get("DLFER_HOME"):
        places.append(Path(os.environ["DLFER_HOME"]).expanduser() / "saved_models")
    checkout = find_checkout()
    if checkout is not None:
        places.append(checkout / "saved_models")
    return [
        place for number, place in enumerate(places) if place.resolve() not in {p.resolve() for p in places[:number]}
    ]


def _get_artifact(path: Path) -> Path | None:
    """Return the artifact folder at a path: itself, or the folder `model` of a run."""
    if (path / ARTIFACT_FILE).is_file():
        return path
    return _get_artifact_of_run(Run(path)) if (path / RUN_FILE).is_file() else None


def _get_artifact_of_run(run: Run) -> Path:
    if (run.path / "model" / ARTIFACT_FILE).is_file():
        return run.path / "model"
    if run.kind != "run":
        raise ModelError(
            f"{run.path}: a comparison ({run.kind}) has no model; name one of the runs in its members.csv."
        )
    raise ModelError(f"{run.path}: this run has no model; its status is {run.status}. Go on with: dlfer run --resume.")
