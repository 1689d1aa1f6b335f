"""A search over several machines: one chief that proposes, workers that run trials, KerasTuner's gRPC between.

The service and its messages are KerasTuner's; what goes through them differs in four points, since its own
server waits for a worker that was killed without end, drops why a trial failed, and rounds numbers to
float32: a proposal and a record travel as JSON text, a worker is heard from every few seconds, and one that
is silent for `search.lost_after_seconds` loses its trial to another.

There is no password and no encryption: who reaches the port may read the experiment and send scores.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
import time
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlfer.config.load import dump_experiment
from dlfer.errors import ConfigError, TrainingStopped
from dlfer.report.keys import format_overrides
from dlfer.study.search.arms import Arm, list_arms
from dlfer.study.search.board import Board
from dlfer.study.search.engine import Answer, Proposal, TrialRecord
from dlfer.study.search.wire import BEATS, carry, make_trial, uncarry, write_answer

if TYPE_CHECKING:
    from dlfer.study.search.run import Search


def serve(search: Search, arm: Arm, board: Board) -> None:
    """Hand out the trials of an arm until all have ended, or the search is to stop.

    Raises:
        TrainingStopped: the search was asked to stop; the workers' trials stop at their checkpoints.
        ConfigError: the address cannot be listened at.
    """
    import grpc
    from keras_tuner.src import protos

    if search.config.search.engine == "optuna":
        raise ConfigError("search.engine: optuna keeps its trials in a file; --role chief needs one of KerasTuner's.")
    address = search.search_options.chief
    if not is_loopback(address):
        search.view.say(
            f"Warning: {address} can be reached from other machines, and gRPC has no password here. Whoever reaches "
            "it can read the experiment and send scores; let a firewall or a private network keep strangers away."
        )
    desk = Desk(search, arm, board)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    protos.get_service_grpc().add_OracleServicer_to_server(desk.make_servicer(), server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(f"--chief {address}: cannot listen there; is the port taken, or the address another's?")
    server.start()
    search.view.say(
        f"{arm.name}: listening at {address}. "
        f"On each machine: dlfer search --role worker --chief {name_for_workers(address)}"
    )
    try:
        desk.wait()
    finally:
        server.stop(grace=1.0).wait()


def is_loopback(address: str) -> bool:
    """Return whether HOST:PORT is reached from this machine alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_for_workers(address: str) -> str:
    """Return HOST:PORT as a worker must write it: who listens at 0.0.0.0 or [::] is reached by the machine's name."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]") else address


@dataclass
class _Lease:
    """A trial that a worker has, and when it was heard from last (time.monotonic())."""

    worker: str
    heard: float


class Desk:
    """What the chief knows of its workers.

    Args:
        search: under way.
        arm: that is served.
        board: hands out the trials.
    """

    def __init__(self, search: Search, arm: Arm, board: Board) -> None:
        self.search, self.arm, self.board = search, arm, board
        self.lost_after = search.config.search.lost_after_seconds
        self.lock = threading.RLock()
        self.leases: dict[str, _Lease] = {}
        self.open_asks: dict[str, Proposal] = {}
        self.exhausted = False
        self.waiting_workers: dict[str, float] = {}

    def describe(self) -> str:
        """Return, as JSON, all that a worker needs to know of the search."""
        options = self.search.options
        arms = list_arms(self.search.config, ablation=self.search.search_options.ablation)
        return json.dumps(
            {
                "is_last": self.arm.name == arms[-1].name,
                "name": self.search.run.path.name,
                "experiment": dump_experiment(self.search.config),
                "base": dict(self.arm.base),
                "smoke": options.smoke,
                "use_cache": options.use_cache,
                "argv": list(options.argv),
            }
        )

    def ask(self, worker: str) -> Answer:
        """Answer a worker; one that asks again, since the answer was lost, gets the same trial."""
        with self.lock:
            base = worker.rpartition(".")[0]
            self.waiting_workers[base] = time.monotonic()
            if self.search.control.get_reason() is not None:
                self.waiting_workers.pop(base, None)
                return Answer(exhausted=True)
            if worker in self.open_asks:
                return Answer(self.open_asks[worker])
            answer = self.board.ask(worker)
            if answer.proposal is not None:
                self.open_asks[worker] = answer.proposal
                self.leases[answer.proposal.trial] = _Lease(worker, time.monotonic())
                # The time left is reckoned from it.
                self.search.view.num_workers = len(self.leases)
            elif answer.exhausted and self.leases:
                # A worker that has one of the last trials may be lost: the others stay to take it over.
                return Answer()
            elif answer.exhausted:
                self.exhausted = True
                self.waiting_workers.pop(base, None)
            return answer

    def hear(self, trial: str, worker: str) -> bool:
        """Note that a worker is alive; return whether the trial still is its own."""
        with self.lock:
            lease = self.leases.get(trial)
            if lease is None and self.board.adopt(trial, worker):
                # This chief was started again, and the worker went on meanwhile.
                lease = self.leases[trial] = _Lease(worker, 0.0)
            if lease is None or lease.worker != worker:
                return False
            lease.heard = time.monotonic()
            self.waiting_workers[worker.rpartition(".")[0]] = lease.heard
            return True

    def tell(self, record: TrialRecord) -> None:
        """Take in how a trial ended; that of a worker which had been given up is left aside."""
        with self.lock:
            if not self.hear(record.trial, record.worker or ""):
                return
            del self.leases[record.trial]
            self.open_asks.pop(record.worker, None)
            self.board.tell(record)

    def drop(self, trial: str, worker: str) -> None:
        """A worker was stopped and gives its trial back."""
        with self.lock:
            if self.hear(trial, worker):
                self._release(trial)
            self.waiting_workers.pop(worker.rpartition(".")[0], None)

    def wait(self) -> None:
        """Return when all trials have ended and the workers know it; give up workers that are silent."""
        while True:
            time.sleep(min(0.5, self.lost_after / BEATS))
            with self.lock:
                self._release_silent()
                known = [at for at in self.waiting_workers.values() if time.monotonic() - at < self.lost_after]
                is_over = (self.exhausted and not self.leases) or self.board.bug is not None
                reason = self.search.control.get_reason()
                if is_over and not known:
                    return
                if reason is not None and not (known and self.leases):
                    raise TrainingStopped(f"The chief was stopped by {reason}.", reason=reason)

    def make_servicer(self) -> Any:
        """Return KerasTuner's servicer with this desk behind it."""
        from keras_tuner.src import protos
        from keras_tuner.src.distribute.oracle_chief import OracleServicer

        desk, messages = self, protos.get_service()

        class Servicer(OracleServicer):
            """Translates KerasTuner's messages into calls of the desk."""

            def GetSpace(self, request: Any, context: Any) -> Any:
                return messages.GetSpaceResponse(hyperparameters=carry(desk.describe()).to_proto())

            def CreateTrial(self, request: Any, context: Any) -> Any:
                answer = desk.ask(request.tuner_id)
                return messages.CreateTrialResponse(trial=write_answer(answer))

            def GetTrial(self, request: Any, context: Any) -> Any:
                trial, _, worker = request.trial_id.partition("@")
                is_own = desk.hear(trial, worker) and desk.search.control.get_reason() is None
                return messages.GetTrialResponse(trial=make_trial(trial, "RUNNING" if is_own else "STOPPED"))

            def EndTrial(self, request: Any, context: Any) -> Any:
                fields = json.loads(uncarry(request.trial.hyperparameters))
                if fields.pop("dropped", False):
                    desk.drop(fields["trial"], fields["worker"])
                else:
                    desk.tell(TrialRecord(**fields))
                return messages.EndTrialResponse()

        return Servicer(None)

    def _release(self, trial: str) -> None:
        lease = self.leases.pop(trial)
        self.open_asks.pop(lease.worker, None)
        self.board.release(trial)

    def _release_silent(self) -> None:
        for trial, lease in list(self.leases.items()):
            if time.monotonic() - lease.heard > self.lost_after:
                record = next(record for record in self.board.list_records() if record.trial == trial)
                keys = format_overrides(record.overrides)
                self.search.view.say(f"{keys}: the worker {lease.worker} is silent; the trial goes to another.")
                self._release(trial)
