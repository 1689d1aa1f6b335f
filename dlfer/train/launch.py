"""What the environment says about the hosts of a training, read without TensorFlow."""

from __future__ import annotations

import json
import os

from dlfer.errors import EnvironmentProblem

CLUSTER_VARIABLE = "DLFER_CLUSTER"


def describes_cluster() -> bool:
    """Tell from the environment, without TensorFlow, whether this process is one of several."""
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return len(_read_tf_config().get("cluster", {}).get("worker", ())) > 1


def is_follower() -> bool:
    """Tell whether this process is one of several and not the first, which leads them."""
    if not describes_cluster():
        return False
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        return os.environ.get("SLURM_PROCID", "0") != "0"
    return int(_read_tf_config().get("task", {}).get("index", 0)) != 0


def check_alone(verb: str) -> None:
    """Raise unless this process works alone.

    Raises:
        EnvironmentProblem: it is one of several, and `verb` is not done over hosts.
    """
    if describes_cluster():
        raise EnvironmentProblem(
            f"dlfer {verb}: the environment describes several hosts (TF_CONFIG or {CLUSTER_VARIABLE}), and only "
            "dlfer run works over several. Unset the two, or run each member by dlfer run."
        )


def _read_tf_config() -> dict:
    text = os.environ.get("TF_CONFIG", "{}")
    try:
        config = json.loads(text)
        if isinstance(config, dict) and isinstance(config.get("cluster", {}), dict):
            return config
    except json.JSONDecodeError:
        config = None
    raise EnvironmentProblem(
        f"TF_CONFIG: found {text[:200]!r}, expected JSON such as "
        '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}.'
    )
