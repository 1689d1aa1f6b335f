"""Growth of the time and memory of an audit with the size of the data, and whether it finds all duplicates.

    python benchmarks/audit_growth.py                                     # 35,887, 100,000 and 300,000 rows
    python benchmarks/audit_growth.py 2000 4000 --rounds 1
    OMP_NUM_THREADS=1 python benchmarks/audit_growth.py 100000 300000 1000000 --search --rounds 1

The rows are synthetic: mixtures of drawn faces under soft random light, which resemble each other as faces do, without
near duplicates. One percent of the rows are images of PublicTest with a duplicate in Training: one third each is exact,
brighter or darker with a little noise, or flipped. With --search, only the search for near and flipped duplicates is
timed, on signatures without the images: 1,000,000 rows need 2.4 GB. Each measurement is a process of its own, since it
includes peak memory, and the sizes take turns. It needs Linux. The exponent is the slope of a line fitted to the
logarithms: 1 is linear growth, 2 quadratic.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from timing import add_options, run_process, tell_row, write_figures

SIZES = (35_887, 100_000, 300_000)
KINDS = ("exact", "near", "flipped")
SIDE, COARSE, BLOCK = 48, 6, 1024
NUM_FACES = 256


def draw_rows(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Return random face-like images, uint8 [N, 48, 48, 1], without duplicates."""
    from dlfer.config.names import FER2013_LABELS
    from dlfer.data.synthetic.faces import draw_face

    drawn = [draw_face(FER2013_LABELS[number % 7], rng=rng).reshape(-1) for number in range(NUM_FACES)]
    faces = np.array(drawn, np.float32)
    # Soft light: bilinear interpolation of a coarse grid of random values.
    places = (np.arange(SIDE) + 0.5) * COARSE / SIDE - 0.5
    taps = np.maximum(0, 1 - np.abs(places.clip(0, COARSE - 1)[:, None] - np.arange(COARSE))).astype(np.float32)
    rows = np.empty((num_rows, SIDE, SIDE, 1), np.uint8)
    for start in range(0, num_rows, BLOCK):
        count = min(BLOCK, num_rows - start)
        left, right = rng.integers(0, NUM_FACES, (2, count))
        share = rng.random((count, 1), np.float32)
        mixed = (share * faces[left] + (1 - share) * faces[right]).reshape(count, SIDE, SIDE)
        light = taps @ rng.normal(0, 60, (count, COARSE, COARSE)).astype(np.float32) @ taps.T
        rows[start : start + count, :, :, 0] = np.clip(0.7 * (mixed - 128) + 128 + light, 0, 255)
    return rows


def make_duplicates(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return duplicates of `images`, uint8 [N, 48, 48, 1], whose kinds alternate in the order of KINDS."""
    duplicates = images.astype(np.float32)
    factor = rng.uniform(0.8, 1.0, (len(images), 1, 1, 1)).astype(np.float32)
    changed = (duplicates - 128) * factor + 128 + rng.normal(0, 2, duplicates.shape).astype(np.float32)
    duplicates[1::3] = changed[1::3]
    duplicates[2::3] = changed[2::3, :, ::-1]
    return np.clip(np.round(duplicates), 0, 255).astype(np.uint8)


def forget_peak() -> None:
    """Reset the kernel's record of this process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> float:
    """Return the peak resident memory of this process in megabytes, since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def tell_cost(start: float, cpu: float, before: float, *, num_duplicates: int) -> dict:
    """Return the wall and CPU time since `start` and `cpu`, the memory, and the number of duplicates of each kind."""
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_megabytes": read_peak(),
        "megabytes_before": before,
        "planted": {kind: len(range(number, num_duplicates, 3)) for number, kind in enumerate(KINDS)},
    }


def audit(num_rows: int, seed: int) -> dict:
    """Audit `num_rows` rows in this process, and return the time, the memory and the numbers of found duplicates."""
    from dlfer.config.names import FER2013_LABELS
    from dlfer.data.audit import audit_splits
    from dlfer.data.bundle import Split
    from dlfer.data.survey import survey_images

    rng = np.random.default_rng(seed)
    images = draw_rows(num_rows, rng)
    num_test, num_duplicates = num_rows // 10, num_rows // 100
    duplicates = slice(num_rows - num_duplicates, num_rows)
    sources = rng.choice(num_rows - num_test, num_duplicates, replace=False)
    images[duplicates] = make_duplicates(images[sources], rng)
    targets = np.arange(num_rows) % 7
    ids = np.array([f"{row}" for row in range(num_rows)])
    cut = num_rows - num_test
    splits = [
        Split("Training", images[:cut], targets[:cut], ids[:cut]),
        Split("PublicTest", images[cut:], targets[cut:], ids[cut:]),
    ]
    forget_peak()
    before, start, cpu = read_peak(), time.perf_counter(), time.process_time()
    survey = survey_images(splits)
    surveyed = time.perf_counter() - start
    audited = audit_splits(splits, FER2013_LABELS, survey=survey)
    figures = tell_cost(start, cpu, before, num_duplicates=num_duplicates)
    planted = survey.find_duplicates(0, 1)
    exact, near = planted.exact[-num_duplicates:], planted.any[-num_duplicates:]
    leak = audited.leaks["Training->PublicTest"]
    return {
        **figures,
        "survey_seconds": surveyed,
        "found": {
            kind: int((exact if kind == "exact" else near)[number::3].sum()) for number, kind in enumerate(KINDS)
        },
        "not_planted": leak.any - int(near.sum()),
    }


def search(num_rows: int, seed: int) -> dict:
    """Search the signatures of `num_rows` rows for near and flipped duplicates; return time, memory and numbers."""
    from dlfer.data.duplicates import SIGNATURE_SIDE, compute_signatures, iterate_near_pairs

    rng = np.random.default_rng(seed)
    num_duplicates = num_rows // 100
    signatures, textured = np.empty((num_rows, SIGNATURE_SIDE**2), np.float32), np.empty(num_rows, bool)
    for start in range(0, num_rows, 50 * BLOCK):
        images = draw_rows(min(50 * BLOCK, num_rows - start), rng)
        if not start:
            sources = images[:num_duplicates].copy()
        rows = slice(start, start + len(images))
        signatures[rows], textured[rows] = compute_signatures(images)
    duplicates = slice(num_rows - num_duplicates, num_rows)
    signatures[duplicates], textured[duplicates] = compute_signatures(make_duplicates(sources, rng))
    forget_peak()
    before, start, cpu = read_peak(), time.perf_counter(), time.process_time()
    found, others = dict.fromkeys(KINDS, 0), 0
    for left, right, flipped in iterate_near_pairs(signatures, textured):
        planted = right - left == num_rows - num_duplicates
        kinds = left[planted] % 3
        others += int((~planted).sum())
        for number, kind in enumerate(KINDS):
            found[kind] += int((kinds == number).sum()) if flipped == (kind == "flipped") else 0
    figures = tell_cost(start, cpu, before, num_duplicates=num_duplicates)
    return {**figures, "survey_seconds": figures["seconds"], "found": found, "not_planted": others}


def measure(sizes: list[int], rounds: int, *, kind: str = "audit") -> list[dict]:
    """Return a row for each size, with medians over the rounds."""
    found: dict[int, list[dict]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size in sizes:
            command = [sys.executable, __file__, "--child", size, number]
            command += ["--search"] if kind == "search" else []
            found[size].append(json.loads(run_process(command).output))
    rows = []
    for size, done in found.items():
        row: dict = {"what": kind, "rows": size, "rounds": rounds}
        for key in ("seconds", "survey_seconds", "cpu_seconds", "peak_megabytes", "megabytes_before"):
            row[key] = round(float(np.median([one[key] for one in done])), 2)
        row["megabytes_of_images"] = round(size * SIDE * SIDE / 2**20, 1)
        # The minimum over the rounds, so that a duplicate missed in one round counts as missed.
        row |= {"planted": done[0]["planted"], "found": {k: min(one["found"][k] for one in done) for k in KINDS}}
        row["not_planted"] = max(one["not_planted"] for one in done)
        tell_row(row, rows)
    return rows


def fit_exponents(rows: list[dict]) -> dict[str, float]:
    """Return the growth exponents of wall time, CPU time, and the memory in addition to that before the audit."""
    sizes = np.log([row["rows"] for row in rows])
    added = [max(1.0, row["peak_megabytes"] - row["megabytes_before"]) for row in rows]
    grown = {"seconds": [row["seconds"] for row in rows], "cpu_seconds": [row["cpu_seconds"] for row in rows]}
    return {
        f"exponent_of_{name}": round(float(np.polyfit(sizes, np.log(values), 1)[0]), 2)
        for name, values in (grown | {"added_megabytes": added}).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, metavar="ROWS")
    parser.add_argument("--child", nargs=2, type=int, metavar=("ROWS", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--search", action="store_true", help="time the search for near and flipped duplicates alone")
    add_options(parser, rounds=3)
    given = parser.parse_args()
    if given.child:
        print(json.dumps((search if given.search else audit)(*given.child)))
        return
    rows = measure(list(given.sizes), given.rounds, kind="search" if given.search else "audit")
    if len(rows) > 1:
        tell_row(fit_exponents(rows), rows)
    write_figures(given.json, rows, "numpy", "scipy")
    missed = [row["rows"] for row in rows if "found" in row and row["found"] != row["planted"]]
    if missed:
        sys.exit(f"Planted duplicates were missed at {', '.join(map(str, missed))} rows.")


if __name__ == "__main__":
    main()
