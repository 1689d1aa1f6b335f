"""What the workers share: failures, and what is taken for a bug in the experiment."""

from __future__ import annotations

import pytest

from dlfer.study.search.board import Board, find_best
from dlfer.study.search.engine import EngineSettings, TrialRecord, open_engine


@pytest.fixture
def board(tmp_path, make_config):
    return Board(open_engine(tmp_path, EngineSettings(make_config(), 9, 6)), "macro_f1", lambda records: None)


def tell(board, number, error=None, *, kind="NonFiniteError", is_users=False):
    proposal = board.ask(f"w.{number}").proposal
    status = "finished" if error is None else "failed"
    board.tell(
        TrialRecord(
            proposal.trial,
            proposal.overrides,
            status,
            score=0.5 if error is None else None,
            error=error,
            kind=None if error is None else kind,
            is_users=is_users,
        )
    )


def test_a_failing_trial_does_not_stop_the_search(board):
    tell(board, 0, "the loss became nan")
    tell(board, 1)
    for number in range(2, 6):
        tell(board, number, "the loss became nan")
    assert board.ask("w.6").exhausted
    assert board.bug is None
    assert [r.status for r in board.list_records()] == ["failed", "finished", *["failed"] * 4]


def test_first_trials_that_fail_alike_are_a_bug_and_cost_nothing(board, tmp_path, make_config):
    for number in range(3):
        tell(board, number, f"shapes (32, {number}) and 7 at 0x7f{number}a do not match", kind="ValueError")
    assert board.bug.kind == "ValueError"
    assert board.ask("w.3").exhausted
    board.close()
    # On resume they are tried again.
    again = open_engine(tmp_path, EngineSettings(make_config(), 9, 6))
    assert [r.status for r in again.list_records()] == ["waiting"] * 3


def test_first_trials_that_fail_each_in_its_own_way_are_no_bug(board):
    tell(board, 0, "a is missing")
    tell(board, 1, "the loss became nan")
    tell(board, 2, "the loss became nan")
    tell(board, 3, "the loss became nan")
    assert board.bug is None


def test_what_the_user_must_mend_stops_at_once(board):
    tell(board, 0, "fer2013.csv is not there", kind="MissingDataError", is_users=True)
    assert board.bug is not None


def test_but_not_once_a_trial_has_worked(board):
    tell(board, 0)
    tell(board, 1, "fraction leaves no image of Disgust", kind="DataError", is_users=True)
    assert board.bug is None


def test_keys_that_do_not_go_together_are_the_trials_own(board):
    tell(board, 0, "momentum: adam has none", kind="ConfigError", is_users=True)
    assert board.bug is None


def test_what_is_held_back_is_given_when_an_oracle_waits_for_it(tmp_path, make_config):
    """A grid goes on from a trial only when that has ended."""
    config = make_config("grid", space={"model.dropout": {"choice": [0.1, 0.2, 0.3, 0.4]}})
    board = Board(open_engine(tmp_path, EngineSettings(config, 9)), "macro_f1", lambda records: None)
    tell(board, 0, "the loss became nan")
    tell(board, 1, "out of memory")
    tell(board, 2)
    tell(board, 3)
    assert board.ask("w.4").exhausted


def record(status, score):
    return TrialRecord("0", {}, status, score=score)


def test_the_best_is_one_that_was_run_to_the_end():
    records = [record("rung", 0.9), record("finished", 0.5), record("failed", None), record("finished", 0.7)]
    assert find_best(records, "accuracy") is records[3]
    assert find_best(records, "loss") is records[1]
    assert find_best(records[:1], "accuracy") is records[0]
    assert find_best(records[2:3], "accuracy") is None
