"""Stands in for dlfer.study.child: speaks the same protocol and writes what a run leaves, without training.

What it does is in the file that FAKE_PLAN names, by dropout: {"0.1": {"do": ..., "right": {part: images of 60}}}. `do` is
"fail", "refuse" (the user has to correct it), "die" (each time), "die once", "wait" (until it is asked to stop) or "slow". Where
the plan says nothing, the accuracy after epoch e is 1 - |dropout - 0.3| - 1 / (10 e).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.runs.files import write_atomically, write_npz
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.run import Run

COLUMNS = "epoch,phase,train_loss,train_accuracy,validation_loss,validation_accuracy,validation_macro_f1\n"
NUM_IMAGES = 60


class Fake:
    """One process; `main` executes its runs."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.is_stopped = given, False
        self.events = os.fdopen(given.events, "w")
        self.plan = json.loads(Path(os.environ["FAKE_PLAN"]).read_text())

    def send(self, event: str, **fields: object) -> None:
        print(json.dumps({"event": event, **fields}), file=self.events, flush=True)

    def end(self, status: str, code: int, error: str = "", kind: str = "", *, is_users: bool = False) -> int:
        self.send("end", status=status, error=error, kind=kind, is_users=is_users)
        return code

    def execute(self, run: Run) -> int:
        config = run.config()
        what = self.plan.get(f"{config.model.dropout:g}", {"do": self.plan.get("do")})
        with (run.path / "begun.txt").open("a") as file:
            print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
        if what.get("do") == "held once" and len((run.path / "begun.txt").read_text().splitlines()) == 1:
            return self.end("failed", 2, "another process works on it", "HeldError", is_users=True)
        with run.hold():
            run.update(status="running")
            if what.get("do") == "fail":
                run.fail(RuntimeError("the loss became nan.\nsecond line"))
                return self.end("failed", 1, "the loss became nan.\nsecond line", "NonFiniteError")
            if what.get("do") == "refuse":
                return self.end("failed", 2, "no such file.", "DataError", is_users=True)
            value = self.train(run, config, what)
            if value is None:
                run.stop("SIGTERM")
                return self.end("stopped", 143)
            self.judge(run, config, what, value)
            run.update(cost={"finetune_seconds": 3.0, "pretrain_seconds": None})
            run.finish()
        return self.end("finished", 0)

    def train(self, run: Run, config, what: dict) -> float | None:
        """Return the accuracy in the end; None when it was stopped."""
        history = run.path / "finetune" / "history.csv"
        text = history.read_text() if history.exists() else COLUMNS
        done, value = text.count("\n") - 1, 0.0
        with (run.path / "log.txt").open("a") as log:
            print(f"begins after {done}", file=log)
        epochs = min(config.finetune.epochs, self.plan.get("epochs", 9))
        self.send("start", stage="finetune", epochs=epochs)
        for epoch in range(1, epochs + 1):
            value = 1 - abs(config.model.dropout - 0.3) - 0.1 / epoch
            if epoch <= done:
                continue
            if epoch == 2 and (what.get("do") == "die" or (what.get("do") == "die once" and done == 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            (run.path / "trains").touch()
            while what.get("do") == "wait" and not self.has_to_stop():
                time.sleep(0.02)
            time.sleep(what.get("seconds", 0.0) or self.plan.get("seconds", 0.0))
            text += f"{epoch},all,1,0.5,{1 - value},{value},{value}\n"
            write_atomically(history, text)
            row = {"epoch": epoch, "validation_accuracy": value, "validation_macro_f1": value}
            self.send("epoch", stage="finetune", epoch=epoch, epochs=epochs, row={**row, "validation_loss": 1 - value})
            if self.given.ask and sys.stdin.readline().strip() != "on":
                self.is_stopped = True
            if self.has_to_stop() and epoch < epochs:
                return None
        return value

    def has_to_stop(self) -> bool:
        return self.is_stopped or os.getppid() != self.given.parent

    def judge(self, run: Run, config, what: dict, value: float) -> None:
        """Write predictions and metrics; the first images of each part are right."""
        rng, parts = np.random.default_rng(config.experiment.seed), {}
        judge_test = run.read_json("run.json").get("judge_test", True)
        for part in self.plan.get("parts", ["train", "validation", "test"]):
            if part == "test" and not judge_test:
                continue
            right = what.get("right", {}).get(part)
            right = round(NUM_IMAGES * value) if right is None and not self.plan.get("right") else right
            right = self.plan["right"][part] if right is None else right
            targets = np.arange(NUM_IMAGES) % 2
            hit = np.arange(NUM_IMAGES) < right + rng.integers(0, 3)
            probabilities = np.full((NUM_IMAGES, 2), 0.2)
            probabilities[np.arange(NUM_IMAGES), np.where(hit, targets, 1 - targets)] = 0.8
            ids = [f"{part}/{i + what.get('shift', 0)}" for i in range(NUM_IMAGES)]
            fold = config.finetune.data.fold
            if part == "test" and fold is not None:
                numbers = np.arange(NUM_IMAGES) + (0 if self.plan.get("same_images") else fold * NUM_IMAGES)
                numbers += what.get("shift", 0)
                ids = [f"all/{number}" for number in numbers]
                write_npz(run.path / "images.npz", {"test_ids": np.array(ids), "test_groups": numbers // 2})
            parts[part] = Predictions(ids, ("a", "b"), targets, probabilities)
            write_predictions(parts[part], run.path / "predictions" / f"{part}.npz")
        metrics = compute_metrics_file(
            parts, Metrics(protocol="official", banner=None, selected_on="PublicTest", test_opened=0)
        )
        metrics.write(run.path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--hint")
    parser.add_argument("--events", type=int)
    for flag in ("--ask", "--stay", "--require-gpu"):
        parser.add_argument(flag, action="store_true")
    fake = Fake(parser.parse_args(argv))
    signal.signal(signal.SIGTERM, lambda *_: setattr(fake, "is_stopped", True))
    run = Run(fake.given.run)
    while True:
        code = fake.execute(run)
        line = sys.stdin.readline() if fake.given.stay and code == 0 else ""
        if not line:
            return code
        run = Run(Path(json.loads(line)["run"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
