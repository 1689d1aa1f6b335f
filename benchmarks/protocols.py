"""Effect of the protocol alone on the accuracy on FER2013: the table of docs/protocols.md.

    python benchmarks/protocols.py frozen                     all rows, frozen features, 1-NN and XGBoost: minutes
    python benchmarks/protocols.py finetuned                  a quarter of the rows, fine-tuned: about 75 minutes
    python benchmarks/protocols.py table                      the results so far, as Markdown

The first two need ${DLFER_DATA}/fer2013/fer2013.csv and (frozen) xgboost or xgboost-cpu. Rows are written to
results/protocols/<what>.json as soon as they are computed, and existing ones are kept, so that an interrupted benchmark
continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from dlfer.config.load import load_experiment, with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import find_duplicates
from dlfer.data.sources import load_data
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import read_predictions
from dlfer.runs.files import write_atomically
from dlfer.runs.find import open_run
from dlfer.runs.run import find_checkout

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "protocols.yaml"
# The paper balances by augmented copies. Under official_80_20 only train is balanced, here by drawing all classes
# equally often, so that an epoch has the same cost as under the other protocols.
PROTOCOLS = {
    "official": {},
    "paper, after_balance": {
        "finetune.data.protocol": "paper",
        "finetune.data.split": "after_balance",
        "finetune.balance": "augment",
    },
    "resplit": {"finetune.data.protocol": "resplit"},
    "paper, official_80_20": {
        "finetune.data.protocol": "paper",
        "finetune.data.split": "official_80_20",
        "finetune.balance": "sampler",
    },
    "official, select_on 0.1": {"finetune.data.select_on": 0.1},
}


def main() -> None:
    """Compute the missing rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["frozen", "finetuned", "table"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "protocols", help="folder of the tables")
    parser.add_argument("--runs", type=Path, default=Path("saved_models/runs"), help="folder of the runs (finetuned)")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print("\n".join(format_table(arguments.out)))
        return
    table = arguments.out / f"{arguments.what}.json"
    rows = read_rows(table)
    config = load_experiment(EXPERIMENT)
    frozen = FrozenFeatures(config) if arguments.what == "frozen" else None
    for name, overrides in PROTOCOLS.items():
        if any(row["protocol"] == name for row in rows):
            continue
        print(f"\n== {name}", flush=True)
        if arguments.what == "frozen":
            # `balance` of training images only matters for the fine-tuned rows; nearest neighbours need none.
            rows += judge_frozen(name, with_overrides(config, {**overrides, "finetune.data.fraction": None}), frozen)
        else:
            rows.append(judge_finetuned(name, with_overrides(config, overrides), overrides, arguments.runs))
        write_atomically(table, json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


def judge_frozen(name: str, config: ExperimentConfig, frozen: FrozenFeatures) -> list[dict]:
    """Return a row for 1-nearest-neighbour and one for XGBoost, both on frozen ImageNet features."""
    from xgboost import XGBClassifier

    bundle = load_stage(config)
    judged = get_judged_part(bundle)
    features, judged_features = frozen.compute(bundle.train), frozen.compute(judged)
    nearest = find_nearest(judged_features, features)
    boosted = XGBClassifier(n_estimators=60, max_depth=8, learning_rate=0.3, max_bin=64, colsample_bytree=0.1)
    boosted.fit(features, bundle.train.targets)
    answers = {"1-NN": bundle.train.targets[nearest], "XGBoost": boosted.predict(judged_features)}
    return [
        {"protocol": name, "classifier": classifier, **describe(bundle, predicted == judged.targets)}
        for classifier, predicted in answers.items()
    ]


def judge_finetuned(name: str, config: ExperimentConfig, overrides: dict, runs: Path) -> dict:
    """Run the experiment under one protocol, or resume its interrupted run, and return its row."""
    command = [sys.executable, "-m", "dlfer", "run"]
    begun = find_begun(config, runs)
    if begun is None:
        settings = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        command += [str(EXPERIMENT), "--out", str(runs)] + [word for text in settings for word in ("--set", text)]
    else:
        command += ["--resume", str(begun)]
    subprocess.run(command, check=True, cwd=Path.cwd())
    run = open_run(find_begun(config, runs))
    bundle = load_stage(config)
    judged = get_judged_part(bundle)
    predictions = read_predictions(
        run.path / "predictions" / f"{'test' if bundle.test is judged else 'validation'}.npz"
    )
    if predictions.ids.tolist() != judged.ids.tolist():
        raise SystemExit(f"{run.path}: its predictions are not those of this data.")
    row = describe(bundle, predictions.predicted == predictions.targets)
    return {"protocol": name, "classifier": "fine-tuned", **row, "run": run.path.name, "commit": read_commit(run)}


def find_begun(config: ExperimentConfig, runs: Path) -> Path | None:
    """Return the newest run of exactly this experiment, or None."""
    from dlfer.config.load import compute_digest

    found = sorted((runs / config.experiment.name).glob(f"*-{compute_digest(config)[:8]}"))
    return found[-1] if found else None


def load_stage(config: ExperimentConfig) -> DataBundle:
    """Return the data of finetune, split by the protocol of `config`."""
    return load_data(config.finetune.data, image_size=config.finetune.image_size, balance=config.finetune.balance)


def get_judged_part(bundle: DataBundle) -> Split:
    """Return the evaluated split: test, or validation if there is no test split."""
    return bundle.test if bundle.test is not None else bundle.validation


def describe(bundle: DataBundle, correct: np.ndarray) -> dict:
    """Return accuracy with interval on all evaluated rows, on those with a duplicate in train, and on those without."""
    judged, train = get_judged_part(bundle), bundle.train
    found = find_duplicates(judged.images, train.images, ids=judged.ids, reference_ids=train.ids)
    return {
        "judged_on": "test" if judged is bundle.test else f"validation ({bundle.selected_on}, used for selection)",
        "num_train": len(bundle.train),
        "num_exact_duplicates": int(found.exact.sum()),
        "num_duplicates": int(found.any.sum()),
        "all": compute_accuracy_figure(correct),
        "with_duplicates": compute_accuracy_figure(correct[found.any]),
        "without_duplicates": compute_accuracy_figure(correct[~found.any]),
    }


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a results file, or [] if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def compute_accuracy_figure(correct: np.ndarray) -> dict | None:
    """Return n, accuracy and Wilson's 95 % interval; None without rows."""
    if not len(correct):
        return None
    low, high = compute_wilson_interval(int(correct.sum()), len(correct))
    return {"n": len(correct), "value": float(correct.mean()), "low": low, "high": high}


class FrozenFeatures:
    """An extractor of pooled features with the published ImageNet weights, which caches the features by image id.

    Args:
        config: the experiment with the backbone and the image size.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        import keras

        from dlfer.model.backbones import load_published_weights
        from dlfer.model.stage_network import build_transfer_network

        network = build_transfer_network(config.model, num_labels=2, image_size=config.finetune.image_size, channels=1)
        load_published_weights(config.model.backbone, network.backbone)
        images = network.model.input
        self.model = keras.Model(images, network.pooling(network.backbone(network.face_input(images), training=False)))
        self.known: dict[str, np.ndarray] = {}

    def compute(self, split: Split) -> np.ndarray:
        """Return the features of a split, float32 [N, F], with unit norm."""
        new = np.flatnonzero([name not in self.known for name in split.ids.tolist()])
        if len(new):
            found = self.model.predict(split.images[new], batch_size=256, verbose=0)
            found /= np.linalg.norm(found, axis=1, keepdims=True)
            self.known.update(zip(split.ids[new].tolist(), found, strict=True))
        return np.stack([self.known[name] for name in split.ids.tolist()])


def find_nearest(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return int [N]: for each row, the index of the row of `reference` with the largest cosine similarity."""
    blocks = [features[start : start + 512] @ reference.T for start in range(0, len(features), 512)]
    return np.concatenate([block.argmax(axis=1) for block in blocks])


def format_table(folder: Path) -> list[str]:
    """Return the rows of both files as Markdown lines."""
    lines = [
        "| protocol | classifier | trained on | judged on | accuracy, all | on rows with a duplicate in training | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for what in ("frozen", "finetuned"):
        for row in read_rows(folder / f"{what}.json"):
            judged = row["judged_on"].partition(" (")[0] + ("*" if "selection" in row["judged_on"] else "")
            figures = " | ".join(format_figure(row[key]) for key in ("all", "with_duplicates", "without_duplicates"))
            lines.append(f"| {row['protocol']} | {row['classifier']} | {row['num_train']:,} | {judged} | {figures} |")
    return lines


def format_figure(figure: dict | None) -> str:
    """Return the text of a cell with accuracy, interval and n."""
    if figure is None:
        return "none"
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"**{value:.1f} %** ({low:.1f} to {high:.1f}), n = {figure['n']:,}"


def read_commit(run) -> str | None:
    """Return the commit of the code that produced a run."""
    git = run.read_json("run.json")["git"] if find_checkout() else None
    return git["commit"][:7] if git else None


if __name__ == "__main__":
    main()
