"""Comparison of the default model with the emotion networks of other packages on the same rows of FER2013, as a table.

    python benchmarks/peer_models.py PACKAGES peers                                  # converts the other networks
    python benchmarks/leaderboard.py predict predictions --csv fer2013.csv --peers peers
    python benchmarks/leaderboard.py time --csv fer2013.csv --peers peers --json results/leaderboard/speed.json
    python benchmarks/leaderboard.py table predictions --csv fer2013.csv --votes ferplus.csv --speed results/leaderboard/speed.json \\
        --out results/leaderboard

`predict` writes the same files as `dlfer evaluate FILE --predictions`, for all models in one process: for PublicTest,
and for rows of Training that are drawn with seed 0. `table` prints the rows of results/leaderboard.md and writes the
metrics of each model as JSON; any other predictions file in PREDICTIONS/PublicTest also becomes a row. With --votes, a
further table shows two signs that a network was trained on these images: its accuracy on Training, and how often it
predicts FER2013's label for images to which most of FER+'s ten annotators gave another one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from peer_models import FER2013, PEERS, Peer
from timing import describe_ratio, time_by_turns, write_figures

from dlfer.config.names import FER2013_LABELS
from dlfer.data.bundle import Split
from dlfer.data.fer2013 import load_fer2013_usage
from dlfer.data.votes import align_votes, find_column, read_votes
from dlfer.experiment.evaluate import AlignedModel, FileModel, align_labels, choose_columns
from dlfer.experiment.splits import find_judged_duplicates
from dlfer.metrics.intervals import compute_proportion
from dlfer.metrics.predictions import Predictions, read_predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.metrics.several import compare_several
from dlfer.predict.external import open_external, parse_input
from dlfer.runs.find import find_model
from dlfer.runs.metrics_record import Estimate, Metrics

OURS = "faces_128"
OWN = (OURS, "lite2_96", "faces_small")
"""The default model, and the other shipped models of ready crops."""

NUM_TRAINING, NUM_TIMED = 2000, 16
PARTS = ("PublicTest", "Training")


def list_models(folder: Path) -> dict[str, tuple[Path, Peer]]:
    """Return name -> (file, description) of the shipped models and of the other models in a folder."""
    found = {
        name: (find_model(name) / "network.onnx", Peer(name, "dlfer", "MIT", "network.onnx", None, FER2013))
        for name in OWN
    }
    return found | {peer.name: (folder / peer.file, peer) for peer in PEERS if (folder / peer.file).is_file()}


def open_model(file: Path, peer: Peer, split: Split) -> AlignedModel:
    """Open a model like `dlfer evaluate FILE`, with its outputs aligned to the labels of FER2013."""
    given = FileModel(file, peer.input, peer.labels, peer.output)
    alignment = align_labels(split, FER2013_LABELS, peer.labels, choose_columns(peer.labels, peer.ignore))
    return AlignedModel(given, open_external(file, parse_input(peer.input), len(peer.labels)), alignment)


def load_rows(csv: Path, part: str, number: int | None = None) -> Split:
    """Return all rows of a split, or `number` rows that are drawn with seed 0."""
    split = load_fer2013_usage(csv, part)
    if number is None or number >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng(0).choice(len(split), number, replace=False)))


def predict(given: argparse.Namespace) -> None:
    """Write the predictions of every model on the chosen splits; existing files are kept."""
    for part in given.parts:
        split, folder = (
            load_rows(given.csv, part, NUM_TRAINING if part == "Training" else given.rows),
            given.predictions / part,
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name, (file, peer) in list_models(given.peers).items():
            path = folder / f"{name}.npz"
            if path.exists() or (given.only and name not in given.only):
                continue
            model = open_model(file, peer, split)
            found = Predictions(split.ids, model.labels, split.targets, model.predict(split.images))
            write_predictions(found, path)
            print(f"{part} {name}: {100 * found.correct.mean():.2f} % of {len(found):,}", flush=True)


def make_answer(file: Path, peer: Peer) -> Callable[[np.ndarray], object]:
    """Return a function that runs the model on one prepared image in one thread."""
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        dtype = np.uint8 if entry.type == "tensor(uint8)" else np.float32
        channels_first = entry.shape[1] == 1
        return lambda image: session.run(
            None, {entry.name: (image.transpose(0, 3, 1, 2) if channels_first else image).astype(dtype)}
        )
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    entry, last = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def answer(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(entry["index"], image.astype(entry["dtype"]))
        interpreter.invoke()
        return interpreter.get_tensor(last["index"])

    return answer


def time_models(given: argparse.Namespace) -> None:
    """Print the time per face of each model, one face at a time on one thread, and the ratio to the default model."""
    images = load_rows(given.csv, "PublicTest").images[:NUM_TIMED]
    ways = {}
    for name, (file, peer) in list_models(given.peers).items():
        prepared = parse_input(peer.input).prepare(images)
        answer = make_answer(file, peer)
        ways[name] = lambda answer=answer, prepared=prepared: [
            answer(prepared[i : i + 1]) for i in range(len(prepared))
        ]
    times = time_by_turns(ways, rounds=given.rounds)
    rows = []
    for name, taken in times.items():
        cpu = taken.cpu_seconds / times[OURS].cpu_seconds
        file = list_models(given.peers)[name][0]
        row = {
            "model": name,
            "size_mb": round(file.stat().st_size / 1e6, 2),
            "runtime": "ONNX Runtime" if file.suffix == ".onnx" else "LiteRT",
            "ms": round(1000 * taken.median / len(images), 3),
            "cpu_ms": round(1000 * taken.median_cpu / len(images), 3),
            "wall_to_ours": describe_ratio(times[OURS], taken),
            "cpu_to_ours": {
                "ratio": round(float(np.median(cpu)), 3),
                "quartiles": np.quantile(cpu, [0.25, 0.75]).round(3).tolist(),
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    write_figures(given.json, rows, "onnxruntime", "ai-edge-litert", "numpy")


def format_percent(found: Estimate) -> str:
    interval = "" if found.low is None else f" ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{100 * found.value:.1f}{interval}"


def format_number(found: Estimate | None, digits: int = 3) -> str:
    if found is None or found.value is None:
        return "-"
    interval = "" if found.low is None else f" ({found.low:.{digits}f} to {found.high:.{digits}f})"
    return f"{found.value:.{digits}f}{interval}"


def compute_metrics(csv: Path, several: dict[str, Predictions], out: Path) -> dict[str, Metrics]:
    """Return and write the metrics of each model on PublicTest, with and without the duplicates of Training images."""
    split = load_fer2013_usage(csv, "PublicTest")
    duplicates = find_judged_duplicates("test", split, train=load_fer2013_usage(csv, "Training"))
    without = duplicates.list_ids_without_duplicates()
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, predictions in several.items():
        about = Metrics(protocol="not known", selected_on="not known", duplicates=duplicates.as_record())
        found[name] = compute_metrics_file({"test": predictions}, about, without_duplicates_ids=without)
        (out / f"{name}.json").write_text(json.dumps(found[name].as_json(), indent=1) + "\n")
    return found


def format_rows(metrics: dict[str, Metrics], speed: dict[str, dict]) -> list[str]:
    """Return the lines of the Markdown table, in descending order of accuracy."""
    head = (
        "model",
        "accuracy",
        "without duplicates",
        "balanced accuracy",
        "macro F1",
        "ECE",
        "NLL",
        "CPU time to ours",
        "MB",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, found in sorted(metrics.items(), key=lambda item: -item[1].test.accuracy.value):
        test, raw, cost = found.test, found.test.calibration.raw, speed.get(name)
        cells = (
            name,
            format_percent(test.accuracy),
            format_percent(found.test_without_duplicates.accuracy),
            format_percent(test.balanced_accuracy),
            format_percent(test.macro_f1),
            format_number(raw.ece_equal_mass),
            format_number(raw.log_loss, 2),
            "-" if cost is None else f"{cost['cpu_to_ours']['ratio']:.2f} ({cost['runtime']})",
            "-" if cost is None else f"{cost['size_mb']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_pairs(several: dict[str, Predictions], out: Path) -> list[str]:
    """Return the default model's differences to the others, with p values Holm-corrected over all pairs of models."""
    result = compare_several(list(several.values()), list(several))
    (out / "comparison.json").write_text(json.dumps(result.as_json(), indent=1) + "\n")
    lines = [
        f"| `{OURS}` minus | percentage points | images only `{OURS}` / only the other classifies correctly | p (McNemar, Holm) |",
        "|---|---|---|---|",
    ]
    for pair in result.pairs:
        if OURS not in (pair.a, pair.b):
            continue
        sign, other = (1, pair.b) if pair.a == OURS else (-1, pair.a)
        ends = sorted(100 * sign * end for end in (pair.difference.low, pair.difference.high))
        alone = (pair.mcnemar.b, pair.mcnemar.c)[::sign]
        p = pair.p_holm if pair.p_holm is not None else pair.mcnemar.p
        shown = "< 0.0001" if p < 1e-4 else f"{p:.4f}"
        value = f"{100 * sign * pair.difference.value:.1f} ({ends[0]:.1f} to {ends[1]:.1f})"
        lines.append(f"| {other} | {value} | {alone[0]}; {alone[1]} | {shown} |")
    return lines


def compute_signs(folder: Path, csv: Path, votes: Path, out: Path) -> list[str]:
    """Return a table of signs of training on these images: accuracy by split, and on rows disputed by FER+."""
    kept = read_votes(votes)
    columns = [find_column(kept, label) for label in FER2013_LABELS]
    rows: dict[str, dict] = {}
    for part in PARTS:
        whole = load_fer2013_usage(csv, part)
        counts = align_votes(kept, [whole])[0][:, columns]
        plural, clear = counts.argmax(axis=1), counts.max(axis=1) > counts.sum(axis=1) / 2
        other = {name for name, a, b, c in zip(whole.ids, plural, whole.targets, clear, strict=True) if a != b and c}
        for path in sorted((folder / part).glob("*.npz")):
            found = read_predictions(path)
            disputed = np.isin(found.ids, list(other))
            rows.setdefault(path.stem, {})[part] = {
                "n": len(found),
                "accuracy": compute_proportion(int(found.correct.sum()), len(found)),
                "n_disputed": int(disputed.sum()),
                "label_of_fer2013": compute_proportion(int(found.correct[disputed].sum()), int(disputed.sum())),
            }
    (out / "signs.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| model | Training | PublicTest | FER2013's label on disputed rows: Training | PublicTest |",
        "|---|---|---|---|---|",
    ]
    for name, parts in rows.items():
        cells = [
            parts.get(part, {}).get(key)
            for key in ("accuracy", "label_of_fer2013")
            for part in ("Training", "PublicTest")
        ]
        shown = ["-" if cell is None else format_percent(Estimate(**cell)) for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def tabulate(given: argparse.Namespace) -> None:
    several = {path.stem: read_predictions(path) for path in sorted((given.predictions / "PublicTest").glob("*.npz"))}
    speed = {}
    if given.speed is not None and given.speed.is_file():
        speed = {row["model"]: row for row in json.loads(given.speed.read_text())["rows"]}
    metrics = compute_metrics(given.csv, several, given.out)
    blocks = [format_rows(metrics, speed), format_pairs(several, given.out)]
    if given.votes is not None:
        blocks.append(compute_signs(given.predictions, given.csv, given.votes, given.out))
    print("\n\n".join("\n".join(block) for block in blocks))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("predict", "time", "table"):
        options = verbs.add_parser(verb)
        options.add_argument("--csv", type=Path, required=True, help="fer2013.csv")
        if verb != "time":
            options.add_argument("predictions", type=Path, help="folder of the predictions")
        if verb != "table":
            options.add_argument("--peers", type=Path, required=True, help="folder that peer_models.py wrote")
        if verb == "predict":
            options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of FER2013 (default: both)")
            options.add_argument("--rows", type=int, help="of PublicTest, drawn by seed 0 (default: all)")
            options.add_argument("--only", nargs="+", help="names of models (default: all)")
        if verb == "time":
            options.add_argument("--rounds", type=int, default=9)
            options.add_argument("--json", type=Path)
        if verb == "table":
            options.add_argument("--votes", type=Path, help="FER+'s votes")
            options.add_argument("--speed", type=Path, help="what `time` wrote")
            options.add_argument("--out", type=Path, required=True, help="folder for the metrics")
    return parser.parse_args(words)


if __name__ == "__main__":
    arguments = parse()
    {"predict": predict, "time": time_models, "table": tabulate}[arguments.verb](arguments)
