"""The scripts of deploy/, with a stand-in for the command that they end with."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DLFER = """#!/bin/sh
if [ "$1" = show ]; then printf 'experiment:\\n  name: small\\n'; exit; fi
echo "$TF_CONFIG|$DLFER_CLUSTER|$*"
"""
SRUN = """#!/bin/sh
shift
exec "$@"
"""


@pytest.fixture
def bin_folder(tmp_path):
    for name, text in (("dlfer", DLFER), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path / "bin"


def call(args: list[str], bin_folder: Path, **given: str) -> list[str]:
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(bin_folder), **given}
    done = subprocess.run(args, env=environment, capture_output=True, text=True, check=True, cwd=bin_folder)
    return done.stdout.strip().split("|")


def read_container() -> dict:
    spec = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    return {**spec["template"]["spec"]["containers"][0], "parallelism": spec["parallelism"], "n": spec["completions"]}


def test_a_pod_describes_its_cluster_and_starts_or_goes_on(bin_folder, tmp_path):
    container = read_container()
    given = {item["name"]: item["value"] for item in container["env"]} | {"OUT": str(tmp_path / "runs")}
    assert int(given["HOSTS"]) == container["parallelism"] == container["n"]
    text, _, arguments = call(container["command"], bin_folder, **given, JOB_COMPLETION_INDEX="3")
    config = json.loads(text)
    assert config["task"] == {"type": "worker", "index": 3}
    assert len(config["cluster"]["worker"]) == 8
    assert config["cluster"]["worker"][3] == "dlfer-host-0-3.dlfer:2222"
    assert arguments == f"run experiments/dlfer.yaml --out {tmp_path}/runs --continue --require-gpu"


def test_slurm_starts_one_training_or_goes_on(bin_folder, tmp_path):
    given = {"EXPERIMENT": "small.yaml", "OUT": str(tmp_path / "runs")}
    found = call(["bash", str(DEPLOY / "slurm.sh")], bin_folder, **given)[1:]
    assert found == ["slurm", f"run small.yaml --out {tmp_path}/runs --continue --require-gpu"]


def test_a_task_of_a_slurm_array_runs_its_member(bin_folder):
    given = {"VERB": "ablate", "EXPERIMENT": "small.yaml", "OUT": "/shared", "ARGUMENTS": "--seeds 0,1"}
    found = call(["bash", str(DEPLOY / "slurm_array.sh")], bin_folder, **given)[2]
    assert found == "ablate small.yaml --out /shared --member auto --require-gpu --seeds 0,1"
    assert call(["bash", str(DEPLOY / "slurm_array.sh")], bin_folder, OUT="/shared")[2] == (
        "sweep experiments/backbones.yaml --out /shared --member auto --require-gpu"
    )


def test_an_indexed_job_has_a_pod_for_each_member():
    from dlfer.config.load import load_experiment
    from dlfer.config.variations import list_cells

    job = yaml.safe_load((DEPLOY / "indexed_job.yaml").read_text())["spec"]
    config = load_experiment(DEPLOY.parent / "experiments" / "backbones.yaml")
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == len(list_cells(config)) * len(config.sweep.seeds or [0])
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert arguments[:2] == ["sweep", "experiments/backbones.yaml"]
    assert arguments[arguments.index("--member") + 1] == "auto"
