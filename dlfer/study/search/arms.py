"""The arms of a search: one, or with --ablation the experiment with EF-FER1 and without, tuned alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlfer.config.load import with_overrides
from dlfer.config.schema import ExperimentConfig
from dlfer.config.space import list_ancestors
from dlfer.errors import ConfigError
from dlfer.experiment.smoke import make_smoke_config
from dlfer.report.trials import ALONE
from dlfer.study.ablation import WITH, WITHOUT
from dlfer.study.search.engine import Engine, EngineSettings

SMOKE_TRIALS = 2


@dataclass(frozen=True)
class Arm:
    """One search of an engine.

    Attributes:
        name: for a person.
        base: keys that all of its trials set.
        config: the experiment with those set and the space that is left.
    """

    name: str
    base: Mapping[str, Any]
    config: ExperimentConfig

    @property
    def slug(self) -> str:
        """Name of its folder and of its best experiment."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())

    @property
    def best_file(self) -> str:
        """The file name of its best experiment: best.yaml, or best-<arm>.yaml where there are two."""
        return "best.yaml" if self.name == ALONE else f"best-{self.slug}.yaml"

    def open_engine(self, folder: Path, *, trials: int | None, smoke: bool, storage: str | None = None) -> Engine:
        """Return the arm's engine with what it left before, whose files are in `folder`/engine/<arm> or in the storage.

        Raises:
            ConfigError: the engine cannot search this space, or not in a shared storage.
        """
        search = self.config.search
        if search.engine == "hyperband" and any(key.endswith(".epochs") for key in search.space):
            raise ConfigError(
                "search.space: hyperband chooses the epochs of EF-FER2 itself; take the key that ends in .epochs out."
            )
        if storage is not None and search.engine != "optuna":
            raise ConfigError(
                f"search.engine: found {search.engine} with --storage, expected optuna, the one engine that several machines "
                "can share. Add --set search.engine=optuna, or leave --storage out and search on one machine."
            )
        epochs = (make_smoke_config(self.config)[0] if smoke else self.config).finetune.epochs
        wanted = trials if trials is not None else search.trials
        if smoke and trials is None:
            wanted = min(wanted or SMOKE_TRIALS, SMOKE_TRIALS)
        name = (
            self.config.experiment.name + (f"-{self.slug}" if self.name != ALONE else "") + ("-smoke" if smoke else "")
        )
        study = "search" if storage is None else name
        settings = EngineSettings(self.name, self.config, epochs, wanted, folder / "engine" / self.slug, storage, study)
        if search.engine == "optuna":
            from dlfer.study.search.optuna import OptunaEngine

            return OptunaEngine(settings)
        from dlfer.study.search.keras_tuner import KerasTunerEngine

        return KerasTunerEngine(settings)


def list_arms(config: ExperimentConfig, *, ablation: bool) -> list[Arm]:
    """Return the arms of a search.

    Raises:
        ConfigError: there is nothing to search, or no EF-FER1 to leave out.
    """
    search = config.search
    if search is None:
        raise ConfigError(
            f"experiment {config.experiment.name}: has no section search. Add one with the keys to tune, e.g.\n"
            "search:\n  space:\n    finetune.optimizer.learning_rate: {log: [1e-5, 1e-2]}"
        )
    if not ablation:
        check_absent_stage(config)
        return [Arm(ALONE, {}, config)]
    if config.pretrain is None:
        raise ConfigError("--ablation: pretrain is null, so there is no EF-FER1 to leave out; leave --ablation out.")
    space = {key: spec for key, spec in search.space.items() if not _is_of_pretrain(search.space, key)}
    if not space:
        raise ConfigError(
            "--ablation: every key of search.space is of EF-FER1, so the arm without it has nothing to tune; "
            "add keys of finetune or model."
        )
    of_with, of_without = config.ablation.with_keys, {"pretrain": None, **config.ablation.without}
    without = with_overrides(config, {**of_without, "search.space": space})
    return [Arm(WITH, of_with, with_overrides(config, of_with)), Arm(WITHOUT, of_without, without)]


def check_absent_stage(config: ExperimentConfig) -> None:
    """Refuse keys of EF-FER1 in the space of an experiment that has none.

    Raises:
        ConfigError: with the keys.
    """
    wrong = [key for key in config.search.space if key.startswith("pretrain.")]
    if config.pretrain is None and wrong:
        raise ConfigError(f"search.space: pretrain is null, so {', '.join(wrong)} cannot be tuned; take them out.")


def _is_of_pretrain(space: Mapping[str, Any], key: str) -> bool:
    return any(name.startswith("pretrain") for name in (key, *list_ancestors(space, key)))
