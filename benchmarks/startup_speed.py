"""Start-up times: of the command itself, of `dlfer check` and `dlfer report`, and of loading FER2013.

    python benchmarks/startup_speed.py --csv fer2013.csv --run saved_models/runs/lite2/RUN     # the table of results/
    python benchmarks/startup_speed.py                       # with a random csv, and a small run that is made first
    python benchmarks/startup_speed.py --rows 8000 --rounds 2

Each is a process of its own, in turns, whose total time and peak memory are measured; this needs Linux. The csv is
loaded without the cache (it is parsed, and the cache is written) and then from the cache; `load_seconds` is the time of
loading alone, without the start of Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from timing import Finished, add_options, run_process, tell_row, write_figures

ROOT = Path(__file__).resolve().parent.parent
DLFER = (sys.executable, "-m", "dlfer")
USAGES = ("Training", "PublicTest", "PrivateTest")
LOAD = """
import json, sys, time
from dlfer.config.schema import DataConfig
from dlfer.data.fer2013 import load_fer2013
start = time.perf_counter()
bundle = load_fer2013(DataConfig(source="fer2013", path=sys.argv[1]))
print(json.dumps({"load_seconds": time.perf_counter() - start, "images": len(bundle.train)}))
"""


def write_csv(path: Path, num_rows: int) -> None:
    """Write a csv of random pixels in the layout of FER2013; eight of ten rows are Training."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        stream.write("emotion,pixels,Usage\n")
        for row in range(num_rows):
            pixels = " ".join(map(str, rng.integers(0, 256, 48 * 48).tolist()))
            stream.write(f"{row % 7},{pixels},{USAGES[max(0, row % 10 - 7)]}\n")


@contextmanager
def find_run(given: str | None, folder: Path) -> Iterator[Path | str]:
    """Yield the given run, or else a smoke run that is made in `folder`."""
    if given is not None:
        yield given
        return
    out = folder / "runs"
    run_process([*DLFER, "run", ROOT / "experiments" / "quickstart.yaml", "--smoke", "--out", out, "--no-cache"])
    (found,) = {path.parent for path in out.rglob("run.json")}
    yield found


def measure(ways: dict[str, Callable[[], Finished]], rounds: int) -> dict[str, list[Finished]]:
    """Run the processes in turns, and return their results; the first round, which reads from disk, is not counted."""
    done: dict[str, list[Finished]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            finished = way()
            if number:
                done[name].append(finished)
    return done


def summarise(name: str, done: list[Finished]) -> dict:
    """Return a row: median and quartiles of the seconds, and the peak memory of all rounds."""
    low, middle, high = np.quantile([finished.seconds for finished in done], [0.25, 0.5, 0.75])
    row = {
        "what": name,
        "seconds": round(float(middle), 3),
        "quartiles": [round(float(low), 3), round(float(high), 3)],
        "peak_megabytes": round(max(finished.megabytes for finished in done)),
        "rounds": len(done),
    }
    if name.startswith("load"):
        told = [json.loads(finished.output) for finished in done]
        row["load_seconds"] = round(float(np.median([one["load_seconds"] for one in told])), 3)
        row["training_images"] = told[0]["images"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="fer2013.csv (default: a drawn one)")
    parser.add_argument("--rows", type=int, default=35_887, help="of a drawn csv (default: 35887)")
    parser.add_argument("--run", help="a finished run to report (default: a small one, made first)")
    add_options(parser, rounds=5)
    given = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name, find_run(given.run, Path(name)) as run:
        csv = given.csv or Path(name) / "fer2013.csv"
        if given.csv is None:
            write_csv(csv, given.rows)
        cache = Path(name) / "cache"

        def load() -> Finished:
            return run_process([sys.executable, "-c", LOAD, csv], environment={"DLFER_CACHE": str(cache)})

        def load_cold() -> Finished:
            for file in cache.glob("*"):
                file.unlink()
            return load()

        ways = {
            "python -c pass": lambda: run_process([sys.executable, "-c", "pass"]),
            "dlfer --help": lambda: run_process([*DLFER, "--help"]),
            "dlfer check experiments/quickstart.yaml": lambda: run_process(
                [*DLFER, "check", ROOT / "experiments" / "quickstart.yaml"]
            ),
            "dlfer report RUN": lambda: run_process([*DLFER, "report", run]),
            "load fer2013.csv": load_cold,
            "load fer2013.csv, cached": load,
        }
        for what, done in measure(ways, given.rounds).items():
            tell_row(summarise(what, done) | {"csv_megabytes": round(csv.stat().st_size / 1e6)}, rows)
    write_figures(given.json, rows, "numpy", "matplotlib", "typer", "pydantic")


if __name__ == "__main__":
    main()
