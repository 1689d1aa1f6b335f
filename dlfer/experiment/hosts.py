"""One command on several hosts: the first process does it, the others help it to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dlfer.config.schema import ExperimentConfig
from dlfer.runs.options import RunOptions
from dlfer.train.cluster import dismiss_followers, join_cluster
from dlfer.train.device import choose_device, set_determinism
from dlfer.train.follow import follow_chief
from dlfer.train.launch import is_follower

if TYPE_CHECKING:
    from dlfer.experiment.session import Session


def lead_or_follow(
    work: Callable[[], Path | None], config: Callable[[], ExperimentConfig], options: RunOptions
) -> Path | None:
    """Do `work` if this process is alone or the chief; else do its share of the chief's stages and return None.

    Args:
        work: trains and writes the run directory.
        config: gives the experiment, from which a follower takes its device.
        options: of the command line.
    """
    if is_follower():
        from dlfer.experiment.session import Session

        _follow(config(), Session.start(options))
        return None
    try:
        done = work()
    except BaseException as error:
        dismiss_followers(str(error) or type(error).__name__)
        raise
    dismiss_followers(None)
    return done


def _follow(config: ExperimentConfig, session: Session) -> None:
    device = choose_device(config.experiment, require_gpu=session.options.require_gpu)
    set_determinism(config.experiment)
    cluster = join_cluster()
    session.listener.say(f"host {cluster.share.index} of {cluster.share.count}: follows the chief; writes nothing.")
    with session.control.watch_signals():
        follow_chief(
            cluster,
            device,
            load_bundle=session.load_bundle,
            control=session.control,
            listener=session.listener,
        )
