"""Trials as tasks of the runner, with a stand-in that does not train."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlfer.errors import DlferError, UserError
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import MemberRow
from dlfer.runs.run import Run, create_run
from dlfer.study.child import make_slots
from dlfer.study.runner import Runner, StudyConsole
from dlfer.study.search.engine import Answer, Proposal
from dlfer.study.search.trials import Arm, TrialSource, describe_left
from dlfer.train.progress import StopControl


class Engine:
    """Proposes what it is given; hears all."""

    def __init__(self, *proposals):
        self.proposals, self.told, self.rows, self.given_back = list(proposals), [], {}, []
        self.heard: list[tuple[str, int, float]] = []

    def ask(self, worker):
        return Answer(self.proposals.pop(0)) if self.proposals else Answer(exhausted=True)

    def begin(self, row):
        self.rows[row.trial] = row

    def report(self, proposal, epochs, score):
        self.heard.append((proposal.trial, epochs, score))
        return proposal.epochs is None or epochs < proposal.epochs

    def tell(self, row):
        self.rows[row.trial] = row
        self.told.append(row)

    def give_back(self, trial):
        self.given_back.append(trial)

    def tick(self):
        return set()

    def list_records(self):
        return list(self.rows.values())

    def count_trials(self):
        return None

    def count_epochs(self):
        return None


@pytest.fixture
def search(tmp_path, make_config, fake_child):
    """Return a function that lets proposals be run; it returns the engine."""
    config = make_config(objective="accuracy")
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update={"epochs": 4})})
    folder = create_run(tmp_path / "runs", config, argv=["dlfer"], kind="search").path
    kept = Engine()

    def run(*proposals, workers=1, base=None, control=None):
        kept.proposals, kept.told, kept.heard = list(proposals), [], []
        arm = Arm("search", base or {}, config)
        options, console = RunOptions(out=tmp_path / "runs"), StudyConsole()
        source = TrialSource(kept, arm, folder, options=options, console=console, on_change=lambda: None)
        Runner(make_slots(workers, []), control or StopControl(), console, "the hint").run(source)
        return kept

    run.engine = kept
    return run


def read_log(row: MemberRow) -> list[str]:
    return (Path(row.path) / "log.txt").read_text().splitlines()


def test_a_trial_is_an_ordinary_run_with_its_keys_set(search):
    engine = search(Proposal("0", {"model.dropout": 0.3}), base={"model.head.hidden": [8]})
    (row,) = engine.told
    run = Run(Path(row.path))
    assert run.status == "finished"
    assert (run.config().model.dropout, run.config().model.head.hidden) == (0.3, (8,))
    assert run.read_json("run.json")["judge_test"] is False
    assert (row.status, row.epochs, row.settings) == ("finished", 4, {"model.dropout": 0.3})
    assert row.score == pytest.approx(0.975)
    assert row.low < row.high
    assert [epochs for _, epochs, _ in engine.heard] == [1, 2, 3, 4]


def test_a_section_is_set_before_a_key_in_it(search):
    settings = {"finetune.optimizer.learning_rate": 0.005, "finetune.optimizer": {"name": "sgd"}, "model.dropout": 0.3}
    (row,) = search(Proposal("0", settings)).told
    optimizer = Run(Path(row.path)).config().finetune.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("sgd", 0.005)


def test_a_trial_that_is_done_answers_without_a_process(search):
    keys = {"model.dropout": 0.2}
    first = search(Proposal("0", keys)).told[0]
    again = search(Proposal("1", keys)).told[0]
    assert (again.score, again.path) == (first.score, first.path)
    assert read_log(first) == ["begins after 0"]


def test_a_longer_rung_goes_on_from_the_shorter_one(search):
    keys = {"model.dropout": 0.3}
    first = search(Proposal("0", keys, epochs=2)).told[0]
    assert (first.status, first.rung, first.epochs) == ("rung", 2, 2)
    assert first.score == pytest.approx(0.95)
    # Asked again for the same rung there is nothing to do; for more it goes on after the second epoch.
    assert search(Proposal("1", keys, epochs=2)).told[0].score == pytest.approx(0.95)
    last = search(Proposal("2", keys)).told[0]
    assert (last.status, last.score, last.path) == ("finished", pytest.approx(0.975), first.path)
    assert read_log(last) == ["begins after 0", "begins after 2"]


def test_a_rung_that_ends_with_the_last_epoch_is_a_whole_run(search):
    row = search(Proposal("0", {"model.dropout": 0.3}, epochs=4)).told[0]
    assert (row.status, Run(Path(row.path)).status) == ("finished", "finished")


def test_a_process_that_is_killed_is_restarted_once_from_its_checkpoint(search, fake_child, capfd):
    fake_child |= {"0.3": {"do": "die once"}}
    row = search(Proposal("0", {"model.dropout": 0.3})).told[0]
    assert (row.status, row.score) == ("finished", pytest.approx(0.975))
    assert read_log(row) == ["begins after 0", "begins after 1"]
    assert (
        "was ended by SIGKILL; it may have run out of memory; it continues from its last checkpoint"
        in capfd.readouterr().err
    )


def test_a_process_that_is_killed_again_is_a_failure(search, fake_child):
    fake_child |= {"0.3": {"do": "die"}}
    row = search(Proposal("0", {"model.dropout": 0.3})).told[0]
    assert (row.status, row.kind) == ("failed", "Killed")
    assert row.error == "its process was ended by SIGKILL; it may have run out of memory, twice"
    assert Run(Path(row.path)).status == "failed"


def test_keys_that_do_not_go_together_fail_without_a_process(search):
    engine = search(Proposal("0", {"finetune.optimizer.momentum": 0.9}))
    assert (engine.told[0].status, engine.told[0].kind, engine.told[0].path) == ("failed", "ConfigError", "")
    assert "momentum: adamw has none" in engine.told[0].error


def test_two_trials_of_the_same_keys_are_run_once(search, fake_child):
    fake_child |= {"seconds": 0.2}
    keys = {"model.dropout": 0.3}
    engine = search(Proposal("0", keys), Proposal("1", keys), workers=2)
    assert [row.score for row in engine.told] == [pytest.approx(0.975)] * 2
    assert read_log(engine.told[0]) == ["begins after 0"]


def test_first_trials_that_fail_alike_end_the_search_and_count_for_nothing(search, fake_child):
    fake_child |= {f"{dropout}": {"do": "fail"} for dropout in (0.1, 0.2, 0.3, 0.4)}
    with pytest.raises(DlferError, match="first 3 members failed for the same reason") as caught:
        search(*(Proposal(str(n), {"model.dropout": n / 10}) for n in range(1, 5)))
    assert not isinstance(caught.value, UserError)
    # The engine has not heard of them, so that they are tried again on resume.
    assert search.engine.told == []


def test_what_the_user_has_to_correct_ends_it_after_two(search, fake_child):
    fake_child |= {f"{dropout}": {"do": "refuse"} for dropout in (0.1, 0.2, 0.3)}
    with pytest.raises(UserError, match=r"no such file\. When that is corrected: the hint"):
        search(*(Proposal(str(n), {"model.dropout": n / 10}) for n in range(1, 4)))


@pytest.mark.slow
def test_failures_after_a_success_are_recorded(search, fake_child):
    fake_child |= {f"{dropout}": {"do": "refuse"} for dropout in (0.1, 0.2, 0.4)}
    engine = search(*(Proposal(str(n), {"model.dropout": n / 10}) for n in (3, 1, 2, 4)))
    assert [row.status for row in engine.told] == ["finished", "failed", "failed", "failed"]


def test_failures_that_were_held_back_are_told_when_nothing_else_comes(search, fake_child):
    fake_child |= {"0.1": {"do": "fail"}}
    assert [row.status for row in search(Proposal("0", {"model.dropout": 0.1})).told] == ["failed"]


def make_record(number, status="finished", **given):
    given = {"score": 0.1 * number, "seconds": 60.0, "epochs": 9, "path": f"r{number}", **given}
    return MemberRow(arm="search", trial=str(number), status=status, **given)


def test_the_time_left_is_that_of_the_trials_left_shared_by_the_workers():
    records = [make_record(1), make_record(2, seconds=120.0), make_record(3, "running", seconds=None)]
    assert describe_left(records, total=6, total_epochs=None) == "about 3 min 00 s left"
    assert describe_left([], total=6, total_epochs=None) == ""
    assert describe_left([make_record(n) for n in range(6)], total=6, total_epochs=None) == ""


def test_rungs_are_estimated_by_their_epochs():
    """Two trials of one epoch, one of which went on to three: four epochs in 200 s; eleven are left."""
    records = [
        make_record(1, "rung", epochs=1, seconds=30.0),
        make_record(2, "rung", epochs=1, seconds=30.0),
        make_record(3, "rung", epochs=3, path="r2", seconds=140.0),
    ]
    assert describe_left(records, total=9, total_epochs=15) == "about 9 min 10 s left"
