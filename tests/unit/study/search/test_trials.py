"""Trials as processes, with a stand-in that does not train."""

from __future__ import annotations

import threading
import time

import pytest

from dlfer.config.load import with_overrides
from dlfer.errors import TrainingStopped
from dlfer.runs.run import create_run
from dlfer.study.search.objective import TrialFailed
from dlfer.study.search.trials import TrialRunner, TrialSettings
from dlfer.train.control import StopControl


@pytest.fixture
def make_runner(tmp_path, make_config, fake_child):
    config = with_overrides(make_config(), {"finetune.epochs": 4})
    search = create_run(tmp_path / "runs", config, argv=["dlfer"], kind="search")

    def make(control=None):
        return TrialRunner(TrialSettings(search.path, config, "accuracy"), control or StopControl())

    return make


def go_on(epochs, score):
    return True


def read_log(runner, overrides):
    return (runner.find_run(overrides).path / "log.txt").read_text().splitlines()


def test_a_trial_is_an_ordinary_run_with_its_keys_set(make_runner):
    runner, heard = make_runner(), []
    keys = {"model.dropout": 0.3}
    assert runner(keys, lambda *told: heard.append(told) or True) == pytest.approx(0.975)
    run = runner.find_run(keys)
    assert run.status == "finished"
    assert run.config().model.dropout == 0.3
    assert run.path.parent == runner.settings.folder.parent
    assert [epochs for epochs, _ in heard] == [1, 2, 3, 4]
    facts = runner.describe(keys)
    assert (facts["epochs"], facts["low"]) == (4, pytest.approx(0.925))


def test_a_trial_that_is_done_answers_without_a_process(make_runner):
    runner = make_runner()
    first = runner({"model.dropout": 0.2}, go_on)
    runner.settings.folder.joinpath("trials").chmod(0o755)
    assert runner({"model.dropout": 0.2}, go_on) == first
    assert read_log(runner, {"model.dropout": 0.2}) == ["begins after 0"]


def test_a_longer_rung_goes_on_from_the_shorter_one(make_runner):
    runner, keys = make_runner(), {"model.dropout": 0.3}
    assert runner(keys, lambda epochs, score: epochs < 2) == pytest.approx(0.95)
    assert runner.find_run(keys).status == "stopped"
    assert runner.describe(keys)["epochs"] == 2
    # Asked again for the same rung there is nothing to do; for more it goes on after the second epoch.
    assert runner(keys, lambda epochs, score: epochs < 2) == pytest.approx(0.95)
    assert runner(keys, go_on) == pytest.approx(0.975)
    assert read_log(runner, keys) == ["begins after 0", "begins after 2"]


def test_a_wish_to_stop_at_the_last_epoch_finishes_the_run(make_runner):
    runner, keys = make_runner(), {"model.dropout": 0.3}
    runner(keys, lambda epochs, score: epochs < 4)
    assert runner.find_run(keys).status == "finished"


def test_a_process_that_is_killed_is_gone_on_with(make_runner):
    runner, keys = make_runner(), {"experiment.seed": 13, "model.dropout": 0.3}
    assert runner(keys, go_on) == pytest.approx(0.975)
    assert read_log(runner, keys) == ["begins after 0", "begins after 1"]


def test_a_process_that_is_killed_again_and_again_is_a_failure(make_runner):
    with pytest.raises(
        TrialFailed, match=r"ended with -9 and without a word \(see .*\.log\), 2 times\. Was memory short"
    ) as caught:
        make_runner()({"experiment.seed": 14}, go_on)
    assert caught.value.kind == "Killed"


def test_a_failure_says_what_it_was(make_runner):
    with pytest.raises(TrialFailed, match=r"nan at dropout 0\.95") as caught:
        make_runner()({"model.dropout": 0.95}, go_on)
    assert (caught.value.kind, caught.value.is_users) == ("NonFiniteError", False)


def test_keys_that_do_not_go_together_fail_without_a_process(make_runner):
    runner = make_runner()
    with pytest.raises(TrialFailed, match="momentum: adamw has none"):
        runner({"finetune.optimizer.momentum": 0.9}, go_on)
    assert not (runner.settings.folder / "trials").exists()


def test_a_stop_leaves_the_trial_at_a_checkpoint(make_runner):
    control = StopControl()
    runner, keys = make_runner(control), {"experiment.seed": 15, "model.dropout": 0.3}

    def stop_soon(epochs, score):
        control.request("Ctrl-C")
        return True

    with pytest.raises(TrainingStopped):
        runner(keys, stop_soon)
    assert runner.find_run(keys).status == "stopped"
    assert make_runner()(keys, go_on) == pytest.approx(0.975)


def test_two_workers_do_not_run_the_same_trial_at_the_same_time(make_runner):
    runners, scores = [make_runner(), make_runner()], []
    keys = {"experiment.seed": 15, "model.dropout": 0.3}
    threads = [threading.Thread(target=lambda r=r: scores.append(r(keys, go_on))) for r in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [pytest.approx(0.975)] * 2
    assert read_log(runners[0], keys) == ["begins after 0"]


def test_a_run_that_a_lost_process_still_holds_is_waited_for(make_runner):
    """A search was killed; its trial needs a moment to come to a checkpoint."""
    runner, keys = make_runner(), {"model.dropout": 0.3}
    runner(keys, lambda epochs, score: epochs < 1)
    run, ended = runner.find_run(keys), []

    def hold():
        with run.hold():
            held.set()
            time.sleep(1)
            ended.append(time.monotonic())

    held = threading.Event()
    threading.Thread(target=hold).start()
    held.wait()
    runner(keys, go_on)
    assert time.monotonic() > ended[0]
