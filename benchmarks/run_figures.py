"""Table of finished runs for results/: n, accuracy with interval, duplicates, cost, digest and commit.

    DLFER_DATA=... python benchmarks/run_figures.py RUN... --json results/runs.json        # also prints Markdown rows

The accuracy on the evaluated split, test or else validation, is computed from the run's own predictions, on all images
and on those without a duplicate (exact, near or flipped) in training. The data must be where the run found it. The row
of a run that is already in the file is replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from protocols import describe, format_figure, get_judged_part, load_stage, read_rows

from dlfer.metrics.predictions import read_predictions
from dlfer.runs.files import write_atomically
from dlfer.runs.find import open_run
from dlfer.runs.run import RUN_FILE
from dlfer.runs.run_records import require_metrics


def main() -> None:
    """Add a row for each run to the file, and print all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="finished runs; none: print what is known")
    parser.add_argument("--json", type=Path, default=Path("results/runs.json"), help="file of the rows")
    given = parser.parse_args()
    rows = {row["run"]: row for row in read_rows(given.json)}
    for name in given.runs:
        row = describe_run(name)
        rows[row["run"]] = row
        write_atomically(given.json, json.dumps(list(rows.values()), indent=1) + "\n")
    print("\n".join(format_row(row) for row in rows.values()))


def describe_run(name: str) -> dict:
    """Return the row of a run in the file."""
    run = open_run(name)
    config, record = run.config(), run.read_json(RUN_FILE)
    bundle = load_stage(config)
    judged = get_judged_part(bundle)
    part = "test" if judged is bundle.test else "validation"
    metrics = require_metrics(run.path)
    headline = metrics.headline
    folder = run.path / "predictions"
    file = f"{part}.npz" if headline == "single" else f"views/{headline}/{part}.npz"
    predictions = read_predictions(folder / file)
    if predictions.ids.tolist() != judged.ids.tolist():
        raise SystemExit(f"{run.path}: its predictions are not those of this data.")
    return {
        "experiment": config.experiment.name,
        "run": run.path.name,
        "network": config.model.backbone if config.model.family in ("transfer", "boosted") else config.model.family,
        "image_size": config.finetune.image_size,
        "epochs": config.finetune.epochs,
        "seed": config.experiment.seed,
        "protocol": bundle.protocol,
        "view": headline,
        **describe(bundle, predictions.predicted == predictions.targets),
        "minutes": round(record["cost"]["finetune_seconds"] / 60, 1),
        "commit": record["git"]["commit"][:7],
    }


def format_row(row: dict) -> str:
    """Return a row as Markdown: experiment, protocol, split, accuracies, duplicates, minutes, run and commit."""
    what = f"{row['experiment']}, {row['network']}, {row['image_size']} px, {row['epochs']} epochs, seed {row['seed']}"
    figures = [format_figure(row["all"]), str(row["num_duplicates"]), format_figure(row["without_duplicates"])]
    cells = [what, row["protocol"], row["judged_on"], *figures, f"{row['minutes']:.0f} min", f"`{row['run']}`"]
    return f"| {' | '.join([*cells, row['commit']])} |"


if __name__ == "__main__":
    main()
