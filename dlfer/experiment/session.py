"""Sessions, the state that several runs of one process share; reduced experiments for smoke runs; multi-host training.

On several hosts the first process, the chief, executes the runs, and the others only take part in its trainings.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dlfer.config.load import resolve_path, with_overrides
from dlfer.config.schema import ExperimentConfig, StageConfig
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.sources import is_prepared, is_present, load_data, replace_by_synthetic
from dlfer.data.tfds_stream import read_split
from dlfer.errors import DlferError, shorten
from dlfer.runs.changes import find_sibling
from dlfer.runs.find import default_runs_folder, find_model
from dlfer.runs.listeners import Listener, Listeners, RunOptions
from dlfer.runs.run import Run, create_run, format_duration
from dlfer.train.progress import ConsoleListener, StopControl, TrainingListener, WarningListener

IMAGES_A_BATCH, NUM_BATCHES = 8, 2


def make_smoke_config(config: ExperimentConfig) -> tuple[ExperimentConfig, list[str]]:
    """Return the experiment reduced to two batches of at most eight images per stage, and warnings on replacements."""
    warnings = ["--smoke: two batches of at most eight images per stage; the values are meaningless."]
    overrides: dict[str, object] = {}
    for stage in ("pretrain", "finetune"):
        section = getattr(config, stage)
        if section is None:
            continue
        batch_size = min(section.batch_size, IMAGES_A_BATCH)
        head_epochs = min(1, section.num_head_epochs)
        overrides |= {
            f"{stage}.batch_size": batch_size,
            f"{stage}.epochs": 1 + head_epochs,
            f"{stage}.milestones": [1 + head_epochs] if section.milestones else [],
            f"{stage}.freeze.head_epochs": head_epochs,
            f"{stage}.schedule.warmup_epochs": min(0.5, section.schedule.warmup_epochs),
        }
        if section.data is not None:
            data, warning = _shrink_data(section, batch_size)
            if stage == "pretrain" and warning:  # the synthetic images must differ from those for finetune
                data = data.model_copy(update={"seed": (config.finetune.data.seed + 1) % 2**31})
            overrides[f"{stage}.data"] = data.model_dump(mode="json")
            warnings += [f"--smoke: {stage}: {warning}"] if warning else []
            if section.distill is not None and (warning or not _models_exist(section.distill.names)):
                overrides[f"{stage}.distill"] = None
                warnings.append(
                    f"--smoke: {stage}.distill left out: {', '.join(section.distill.names)} or the data is not here."
                )
    if config.ensemble is not None:
        # Values that members set for these keys could be invalid for so few epochs; each member is reduced separately.
        small = [key for key in overrides if not key.endswith((".data", ".distill"))]
        overrides["ensemble.members"] = [
            {
                **member.model_dump(mode="json"),
                "set": member.set and {k: v for k, v in member.set.items() if k not in small},
            }
            for member in config.ensemble.members
        ]
    if config.pretrain is not None and config.pretrain.weights is not None:
        warnings.append(f"--smoke: pretrain.weights {config.pretrain.describe_weights()} replaced by random weights.")
    return with_overrides(config, overrides), warnings


def _shrink_data(section: StageConfig, batch_size: int) -> tuple[DataConfig, str | None]:
    # Two batches must remain after a fifth is split off twice, for test and for validation.
    num_images = 2 * NUM_BATCHES * batch_size
    counts = type(section.data.num_images)(**dict.fromkeys(("train", "validation", "test"), num_images))
    data = section.data.model_copy(update={"num_images": counts})
    if data.source.startswith("synthetic"):
        return data, None
    if not is_present(data):
        return replace_by_synthetic(data)
    problem = _find_data_problem(data.model_dump_json(), section.native_size, section.balance)
    if problem is not None:
        drawn, warning = replace_by_synthetic(data)
        return drawn, f"{warning} It cannot be used: {problem}"
    return data, None


def _models_exist(names: Iterable[str]) -> bool:
    """Return whether all models of these names exist."""
    try:
        return all(find_model(path if (path := resolve_path(name)).exists() else name) for name in names)
    except DlferError:
        return False


@cache  # the members of a study share their data
def _find_data_problem(data: str, image_size: int, balance: str) -> str | None:
    """Return in one line why the reduced data of a smoke run cannot be read, or None if it can."""
    try:
        config = DataConfig.model_validate_json(data)
        if not is_prepared(config):  # loading would start to download and convert the data set
            return f"{config.name} is not prepared."
        bundle = load_data(config, image_size=image_size, balance=balance)
        for split in bundle.splits.values():
            if not isinstance(split, Split):
                read_split(split)
    except Exception as error:  # on incomplete data sets loaders raise almost any exception
        return " ".join(str(error).split()) if isinstance(error, DlferError) else shorten(error)
    return None


RunMembers = Callable[[Mapping[str, Run], "Session", Callable[[], None]], None]
"""Executes the members' runs, by name; it calls its last argument whenever one has ended."""


@dataclass
class Session:
    """The state that several runs of one process share: options, stop requests, listeners, and loaded data.

    Attributes:
        options: of the command line.
        control: queried after each step for a request to stop.
        listener: receives the progress.
        bundles: the data loaded so far, by its config, so that arms and seeds share it.
        resume_hint: the command to continue after a stop, if it is not that of the run itself.
        run_members: trains the members of an ensemble; None: they are trained sequentially in this process.
        callbacks: the listeners of every run of the session.
        run_listeners: the listeners of the current run, set by `execute_run`.
    """

    options: RunOptions
    control: StopControl
    listener: TrainingListener
    bundles: dict[str, DataBundle] = field(default_factory=dict)
    resume_hint: str | None = None
    run_members: RunMembers | None = None
    callbacks: tuple[Listener, ...] = ()
    run_listeners: Listeners = field(default_factory=Listeners)

    @classmethod
    def start(
        cls,
        options: RunOptions,
        *,
        run_members: RunMembers | None = None,
        callbacks: Iterable[Listener] = (),
        progress: bool = True,
    ) -> Session:
        """Return a session that reports progress on stderr, or only warnings without `progress`."""
        listener = ConsoleListener() if progress else WarningListener()
        control = StopControl(options.max_hours)
        return cls(options, control, listener, run_members=run_members, callbacks=tuple(callbacks))

    @property
    def runs_folder(self) -> Path:
        """The folder that runs of this session are created in."""
        return self.options.out or default_runs_folder()

    def describe_resume(self, run: Path) -> str:
        """Return the command that resumes the run in this folder after a stop."""
        return self.resume_hint or f"dlfer run --resume {shlex.quote(str(run))}"

    def load_bundle(self, stage: StageConfig) -> DataBundle:
        """Return the stage's data, loaded once per session."""
        key = json.dumps([stage.data.model_dump(mode="json"), stage.native_size, stage.balance], sort_keys=True)
        if key not in self.bundles:
            start = time.monotonic()
            say = self.listener.say
            self.bundles[key] = load_data(stage.data, image_size=stage.native_size, balance=stage.balance, say=say)
            self.listener.say(describe_bundle(self.bundles[key], time.monotonic() - start))
        return self.bundles[key]


def create_member_run(
    config: ExperimentConfig,
    options: RunOptions,
    folder: Path,
    *,
    siblings: Iterable[Path] = (),
    study: Path | None = None,
) -> Run:
    """Create the run directory of an experiment in a folder of runs; for a smoke run the experiment is reduced first.

    `siblings` are the folders of the other runs of the same study; the data must equal that of the first one with the
    same data section. `study` is the folder of the ablation, sweep, search or ensemble that the run is a member of.
    """
    config, warnings = make_smoke_config(config) if options.smoke else (config, [])
    run = create_run(folder, config, argv=list(options.argv))
    sibling = find_sibling(config.model_dump(mode="json"), siblings)
    run.update(
        smoke=options.smoke,
        use_cache=options.use_cache,
        judge_test=options.judge_test,
        warnings=warnings,
        data_like=sibling,
        study=None if study is None else f"{study.parent.name}/{study.name}",
    )
    return run


def describe_bundle(bundle: DataBundle, seconds: float) -> str:
    """Return a description of the loaded data, with every note, for the terminal."""
    splits = [("train", bundle.train), ("validation", bundle.validation), ("test", bundle.test)]
    counts = ", ".join(f"{name} {len(split):,} ({split.name})" for name, split in splits if split is not None)
    reading = bundle.reading.as_record()
    lines = [*(reading.describe() if reading else []), *bundle.notes]
    notes = "".join(f"\n  note: {note}" for note in lines)
    return (
        f"data: {bundle.source}, {len(bundle.labels)} labels, protocol {bundle.protocol}: {counts}; "
        f"validation split: {bundle.selected_on}; loaded in {format_duration(seconds)}{notes}"
    )


def run_as_chief_or_worker(
    work: Callable[[], Path | None], config: Callable[[], ExperimentConfig], options: RunOptions
) -> Path | None:
    """Execute `work` if this process is alone or the chief; else take part in the chief's stages and return None."""
    # Imported here, since the sessions of studies train nothing themselves and need no framework.
    from dlfer.train.cluster import dismiss_followers
    from dlfer.train.progress import is_follower

    if is_follower():
        _run_worker(config(), Session.start(options))
        return None
    try:
        done = work()
    except BaseException as error:
        dismiss_followers(str(error) or type(error).__name__)
        raise
    dismiss_followers(None)
    return done


def _run_worker(config: ExperimentConfig, session: Session) -> None:
    from dlfer.train.cluster import choose_device, join_cluster, set_determinism
    from dlfer.train.stage import follow_chief

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
