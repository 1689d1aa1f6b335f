"""Whether trained models differ: predictions of finished runs, or of files, matched image by image.

Unlike an ablation nothing is trained here; the files of the runs are read and that is all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.config.load import compute_digest, with_overrides
from dlfer.errors import ModelError, UserError
from dlfer.metrics.learned import describe_no_conclusion, find_run_failure
from dlfer.metrics.paired import compare_seeds
from dlfer.metrics.predictions import Predictions, read_predictions
from dlfer.metrics.several import compare_several, match_predictions
from dlfer.runs.comparison_record import ArmPair, ModelComparison, System
from dlfer.runs.find import open_run
from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.metrics_record import Metrics, ModelPair
from dlfer.runs.run import Run
from dlfer.runs.run_records import require_metrics
from dlfer.study.summary import conclude_pair, correct_pairs

SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Entry:
    """One thing to compare.

    Attributes:
        name: what it is called in the result.
        path: of its run directory, or of its predictions file.
        run: the run; None for a predictions file.
    """

    name: str
    path: Path
    run: Run | None


def compare_runs(names: Sequence[str], *, part: str | None = None, folder: Path | None = None) -> ModelComparison:
    """Compare the accuracies of two or more finished runs on the images that all of them judged.

    Args:
        names: runs (paths, or beginnings of their names) and predictions files (.npz).
        part: "test" or "validation"; None: test if all have it, else validation.
        folder: of runs; None: saved_models/runs.

    Returns:
        What `compare_several` gives, with the split, the paths of the runs, the systems (runs that differ in the seed
        alone) with their differences over seeds, and notes. A pair with a training that did not learn has the reasons in
        `not_learned`, a sentence that says so, and no verdict.

    Raises:
        UserError: fewer than two; a run without these predictions; labels, targets or images do not match.
    """
    if len(names) < 2:
        raise UserError(f"compare: found {len(names)} run, expected two or more.")
    if part is not None and part not in SPLITS:
        raise UserError(f"compare: found the split {part!r}, expected one of {', '.join(SPLITS)}.")
    entries = _name_entries([_find_entry(name, folder) for name in names])
    split = part or _choose_split(entries)
    several = [read_predictions(_get_file(entry, split)) for entry in entries]
    titles = [entry.name for entry in entries]
    result = compare_several(several, titles)
    matched = dict(zip(titles, match_predictions(several, titles), strict=True))
    systems = _group_seeds(entries)
    failures = _find_failures(entries)
    runs = [run.model_copy(update={"path": str(entry.path)}) for run, entry in zip(result.runs, entries, strict=True)]
    changes = {
        "part": split,
        "runs": runs,
        "pairs": [_withdraw_verdict(pair, failures) for pair in result.pairs],
        "systems": [_describe_system(name, members, matched) for name, members in systems.items()],
        "system_pairs": _compare_systems(systems, matched, failures),
        "notes": [*_describe_matching(result, split), *_describe_runs(entries, split)],
    }
    return result.model_copy(update=changes)


def _find_entry(name: str, folder: Path | None) -> Entry:
    path = Path(name)
    if path.suffix == ".npz":
        return Entry(path.stem, path, None)
    run = open_run(name, folder)
    if run.kind == "run":
        return Entry(f"{run.path.resolve().parent.name}/{run.path.resolve().name}", run.path, run)
    members = _read_member_paths(run)
    raise UserError(
        f"{run.path}: a comparison ({run.kind}) has no predictions of its own; compare its members: "
        f"{' '.join(members) or 'it has none yet'}."
    )


def _read_member_paths(run: Run) -> list[str]:
    """Return where the members are: as recorded, or beside the comparison if the folder of runs was moved."""
    return [str(row.find_folder(run.path) or row.path) for row in read_member_rows(run.path) if row.path]


def _name_entries(entries: list[Entry]) -> list[Entry]:
    """Return the entries with names of which no two are alike: longer ones, or numbered if given twice."""
    counts = Counter(name for name, _ in {(entry.name, entry.path.resolve()) for entry in entries})
    longer = [entry.name if counts[entry.name] == 1 else str(entry.path) for entry in entries]
    unique = []
    for position, (entry, name) in enumerate(zip(entries, longer, strict=True)):
        before = longer[:position].count(name)
        unique.append(Entry(f"{name} ({before + 1})" if before else name, entry.path, entry.run))
    return unique


def _get_file(entry: Entry, split: str) -> Path:
    """Return the predictions file of a split.

    Raises:
        ModelError: the run has none.
    """
    if entry.run is None:
        return entry.path
    path = entry.path / "predictions" / f"{split}.npz"
    if path.is_file():
        return path
    present = [other.stem for other in sorted(path.parent.glob("*.npz"))]
    found = f"found those of {', '.join(present)}" if present else f"found none; its status is {entry.run.status}"
    raise ModelError(f"{entry.path}: expected predictions of {split}, {found}. Choose another split by --part.")


def _choose_split(entries: list[Entry]) -> str:
    """Return the first split of which every run has predictions; test, where there is none."""
    runs = [entry for entry in entries if entry.run is not None]
    for split in SPLITS:
        if all((entry.path / "predictions" / f"{split}.npz").is_file() for entry in runs):
            return split
    return SPLITS[0]


def _describe_matching(result: ModelComparison, split: str) -> list[str]:
    left_out = [f"{run.left_out:,} of {run.n:,} of {run.name}" for run in result.runs if run.left_out]
    notes = []
    if left_out:
        notes.append(
            f"Compared on the {result.n_common:,} {split} images that all have; left out: {', '.join(left_out)}."
        )
    same = [pair for pair in result.pairs if pair.mcnemar.b + pair.mcnemar.c == 0]
    notes += [f"{pair.a} and {pair.b} are right and wrong on the very same images." for pair in same]
    return notes


def _describe_runs(entries: list[Entry], split: str) -> list[str]:
    """Return the warnings that the runs' own records call for."""
    metrics: dict[str, Metrics] = {
        entry.name: require_metrics(entry.path) for entry in entries if entry.run is not None
    }
    notes = []
    facts = {
        "protocol": {name: found.protocol for name, found in metrics.items()},
        "selected on": {name: found.selected_on for name, found in metrics.items()},
    }
    for fact, found in facts.items():
        if len(set(found.values())) > 1:
            listed = "; ".join(f"{name}: {value}" for name, value in found.items())
            notes.append(f"Warning: the runs differ in {fact} ({listed}).")
    banners = {name: found.banner for name, found in metrics.items() if found.banner}
    if banners and len(banners) < len(metrics):
        notes.append("Warning: only some of the runs have a banner; their metrics do not mean the same.")
    notes += [f"{name}: {banner}" for name, banner in banners.items()]
    selected = sorted({str(found.selected_on) for found in metrics.values()})
    if split == "validation" and selected:
        if len(metrics) == len(entries):
            whom = "these models: it flatters all of them"
        else:
            whom = f"{', '.join(metrics)}: it flatters them. What selected the others is not known"
        notes.append(f"Validation ({', '.join(selected)}) selected {whom}.")
    return notes


def _group_seeds(entries: list[Entry]) -> dict[str, dict[int, Entry]]:
    """Return system -> seed -> run for the experiments of which several seeds are here."""
    groups: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        if entry.run is not None:
            config = entry.run.config()
            digest = compute_digest(with_overrides(config, {"experiment.seed": 0}))
            groups.setdefault(f"{config.experiment.name} {digest[:8]}", {})[config.experiment.seed] = entry
    return {name: members for name, members in groups.items() if len(members) > 1}


def _describe_system(name: str, members: dict[int, Entry], matched: dict[str, Predictions]) -> System:
    accuracies = [float(matched[entry.name].correct.mean()) for entry in members.values()]
    return System(
        name=name,
        runs=[entry.name for entry in members.values()],
        seeds=list(members),
        mean=float(np.mean(accuracies)),
        sd=float(np.std(accuracies, ddof=1)),
    )


def _find_failures(entries: list[Entry]) -> dict[str, str]:
    """Return name -> "name: why" for the runs whose training did not learn."""
    found = {entry.name: find_run_failure(entry.path) for entry in entries if entry.run is not None}
    return {name: f"{name}: {why}" for name, why in found.items() if why is not None}


def _withdraw_verdict(pair: ModelPair, failures: dict[str, str]) -> ModelPair:
    """Return a pair that says which of its two trainings did not learn, instead of a verdict, where one did not."""
    reasons = [failures[name] for name in (pair.a, pair.b) if name in failures]
    if not reasons:
        return pair.model_copy(update={"not_learned": []})
    sentence = describe_no_conclusion((pair.a, pair.b), reasons)
    return pair.model_copy(update={"not_learned": reasons, "sentence": sentence, "is_significant": False})


def _compare_systems(
    systems: dict[str, dict[int, Entry]], matched: dict[str, Predictions], failures: dict[str, str]
) -> list[ArmPair]:
    """Return the differences of systems over the seeds that both have, where these are two or more.

    Their p values are corrected by Holm over all these pairs.
    """
    names, compared = list(systems), []
    for position, a in enumerate(names):
        for b in names[position + 1 :]:
            seeds = sorted(systems[a].keys() & systems[b].keys())
            if len(seeds) > 1:
                pairs = [(matched[systems[a][seed].name], matched[systems[b][seed].name]) for seed in seeds]
                compared.append(ArmPair.of(compare_seeds(pairs, names=(a, b))))
    concluded = []
    for pair in correct_pairs(compared):
        members = [entry.name for name in (pair.a, pair.b) for entry in systems[name].values()]
        concluded.append(conclude_pair(pair, [failures[name] for name in members if name in failures]))
    return concluded
