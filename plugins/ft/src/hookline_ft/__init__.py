"""Go on without a replica that is lost, and take it in again when it is back, within one run (torchft)."""

from __future__ import annotations

import datetime
import functools
import importlib
import itertools
import logging
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hookline import CallbackInterface, Stage, copy_state, hookimpl, seconds, set_seed
from hookline_ft.gradients import average
from hookline_ft.rounds import Meeting, Rounds

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

REPLICA, REPLICAS, LIGHTHOUSE = "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS", "TORCHFT_LIGHTHOUSE"  # torchft's own names
OWN = ("rng", "logs", "window")  # sections of a run's state that a replica does not take from another

log = logging.getLogger("hookline.ft")


@dataclass(eq=False)
class Ft(CallbackInterface):
    """Train replicas of one model, each a process and a run of its own, that average their gradients in each step.

    Before each step those that are there agree on who takes part. One that is lost costs the others the step it was
    lost in; one that comes back is given the state of the run by another. The environment says which replica this
    is; where it says nothing, the plugin changes nothing.
    """

    timeout: str = "1 min"
    """How long a replica waits within a step for the others; then they refuse the step and go on without those."""
    quorum_timeout: str = "5 min"
    """How long a replica waits before a step until as many as the lighthouse wants are there; then its run ends."""
    max_skips: int = 10
    """Steps, or synchronizations, refused in a row after which the run ends."""
    sync_every: int | None = None
    """Let each replica step on its own, and average the weights after so many steps; null averages all gradients."""
    outer: dict[str, Any] | None = None
    """An optimizer, by `_target_`, that steps by the averaged change of the weights instead (DiLoCo)."""

    def __post_init__(self) -> None:
        self._wait = datetime.timedelta(seconds=seconds(self.timeout, "ft.timeout"))
        self._wait_for_quorum = datetime.timedelta(seconds=seconds(self.quorum_timeout, "ft.quorum_timeout"))
        if self.max_skips < 0:
            raise ValueError(f"ft.max_skips={self.max_skips} must be at least 0")
        if self.sync_every is not None and self.sync_every < 1:
            raise ValueError(f"ft.sync_every={self.sync_every} must be at least 1 step")
        if self.outer is not None and (self.sync_every is None or "_target_" not in self.outer):
            raise ValueError(
                "ft.outer needs ft.sync_every, and a _target_: {_target_: torch.optim.SGD, lr: 0.7, momentum: 0.9, "
                "nesterov: true}"
            )
        self._rounds = None if self.sync_every is None else Rounds(self.sync_every, self.outer)
        per_round, per_step = ["on_end_train_step", "on_end_train"], ["on_begin_optimizer_step", "should_step"]
        for name in per_round if self._rounds is None else per_step:
            setattr(self, name, None)  # hides the method
        self._replica, self._replicas, self._lighthouse = 0, 1, ""
        self._manager: Any = None
        self._rest: Any = None  # of the state of another, until the next boundary
        self._state: dict[str, int] = {}
        self._present = 0  # replicas in the last step
        self._met = False  # whether it has been agreed who takes part in the step under way
        self._in_step = False

    # Who is who, and who has which data -------------------------------------------------

    @hookimpl(wrapper=True)
    def get_share(self, trainer: Trainer) -> Generator[None, tuple[int, int], tuple[int, int]]:
        share = yield
        place = find()
        if place is None:
            return share
        if trainer.world_size > 1:
            raise ValueError(
                f"ft: this is one of {trainer.world_size} ranks, and a replica is one process here: leave `ddp`, "
                "`fsdp` and `distributed` away"
            )
        self._replica, self._replicas, self._lighthouse = place
        return self._replica, self._replicas

    @hookimpl(wrapper=True)
    def get_sampler(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        """Evaluate on all data in each replica; in training, let all have equally many samples."""
        sampler = yield
        if not self._lighthouse:
            return sampler
        if stage is not Stage.TRAIN:
            return type(sampler.__name__, (sampler,), {"share": 0, "shares": 1})
        return equal(sampler, trainer)

    # Who takes part ---------------------------------------------------------------------

    @hookimpl(trylast=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        if not self._lighthouse:
            log.warning(
                "ft: neither %s nor %s is set, so there is no other replica; see the plugin's page for how to start "
                "several", REPLICA, REPLICAS,
            )  # fmt: skip
            return
        if trainer.randomness.restored is None:
            set_seed(trainer.options.seed + self._replica)  # the weights are drawn, and dropout shall differ
        self._manager = self._join(trainer)
        self._manager.load_state_dict(self._state or {"step": 0, "batches_committed": 0})
        if self._rounds is None:
            self._meet()
        else:
            self._rounds.begin(self._manager, trainer)
            self._begin_rounds(trainer, self._rounds)

    def _join(self, trainer: Trainer) -> Any:
        """Make this replica known, and return what speaks with the others.

        Raises:
            ValueError: torchft is not there, or the lighthouse.
        """
        try:
            torchft = importlib.import_module("torchft")
        except ImportError as error:
            raise ValueError(
                f"ft needs torchft, which cannot be imported ({error}): `pip install torchft-nightly`"
            ) from error
        group = torchft.ProcessGroupNCCL if trainer.device.type == "cuda" else torchft.ProcessGroupGloo
        store = dist.TCPStore(socket.gethostname(), 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        try:
            manager = type("Manager", (Meeting, torchft.Manager), {})(
                pg=group(timeout=self._wait),
                load_state_dict=functools.partial(self._take, trainer),
                state_dict=functools.partial(self._give, trainer),
                min_replica_size=1,  # that of the lighthouse counts
                use_async_quorum=False,  # else a newcomer would do its first window on weights that are not the run's
                timeout=self._wait,
                quorum_timeout=self._wait_for_quorum,
                connect_timeout=self._wait,
                rank=0,
                world_size=1,
                store_addr=socket.gethostname(),
                store_port=store.port,
                lighthouse_addr=self._lighthouse,
                replica_id=f"replica-{self._replica}",
                max_retries=self.max_skips,
            )
        except RuntimeError as error:
            raise ValueError(f"ft: no lighthouse answers at {LIGHTHOUSE}={self._lighthouse}: {error}") from error
        manager.hookline_store = store  # which is there as long as it
        return manager

    @hookimpl(trylast=True)
    def on_boundary(self, trainer: Trainer) -> None:
        if self._manager is not None and self._rounds is None:
            self._meet()
        elif self._rest is not None:
            self._take_rest(trainer)

    def _meet(self) -> None:
        """Agree on who takes part in the next step; one who is behind has the state of the run after it."""
        try:
            self._manager.meet()
        except (RuntimeError, TimeoutError) as error:
            if "status: " in str(error):
                error.add_note(
                    f"ft: the lighthouse at {self._lighthouse} has not let replica {self._replica} take part in the "
                    f"next step within {self.quorum_timeout} (ft.quorum_timeout): too few replicas are there, or it is "
                    "gone"
                )
            raise
        self._met = True
        present = self._manager.num_participants()
        if present != self._present:
            log.warning("ft: replica %d trains with %d of %d replicas", self._replica, present, self._replicas)
        self._present = present

    def _give(self, trainer: Trainer) -> dict[str, Any]:
        """Return the state of the run; in a thread of torchft's, while this one waits for it at a boundary."""
        state = trainer.hook.get_run_state(trainer=trainer)
        given = {name: section for name, section in state.items() if name not in OWN}
        return copy_state({**given, "ft": self._way()})  # type: ignore[no-any-return]

    def _way(self) -> str:
        return f"ft.sync_every={self.sync_every} and ft.outer={self.outer}"

    def _take(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        if state["ft"] != self._way():
            raise ValueError(
                f"ft: replica {self._replica} has {self._way()}, and another {state['ft']}: set the same for all"
            )
        if self._in_step:  # which is counted on: all but the weights waits for its boundary
            trainer.module.update_state(state["module"])
            self._rest = state
            return
        trainer.hook.set_run_state(trainer=trainer, state=state, stage=trainer.stage)
        log.warning("ft: replica %d has the state of another, at step %d", self._replica, trainer.global_step)

    def _take_rest(self, trainer: Trainer) -> None:
        """Take the state of another that came within a step; weights and rounds are further by now."""
        state, self._rest = self._rest, None
        own = self.get_state()
        self._take(trainer, {**state, "module": trainer.hook.get_run_state(trainer=trainer)["module"]})
        self.update_state(own)

    # A step -----------------------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if self._manager is None:
            return
        if not self._met:
            raise ValueError(
                "ft averages gradients once for each window, and this module steps several times in one, or by a "
                "closure"
            )
        average(self._manager, optimizers)

    @hookimpl(wrapper=True, tryfirst=True)
    def should_step(self, trainer: Trainer) -> Generator[None, bool, bool]:
        fine = yield
        if self._manager is None:
            return fine
        self._met = False
        trainer.log(reduce="last", replicas=self._present)
        if not self._manager.should_commit():
            log.warning("ft: step %d is refused: a replica was lost in it", trainer.global_step + 1)
            return False
        return fine

    # A round of steps -------------------------------------------------------------------

    def _begin_rounds(self, trainer: Trainer, rounds: Rounds) -> None:
        """Begin with the others, or be given the state of those that are on their way, and synchronize with them."""
        while True:
            before = self._manager.batches_committed()
            rounds.arrive(trainer.global_step)
            self._meet()
            if rounds.due(trainer.global_step):
                self._synchronize(trainer, rounds)
                return
            self._manager.allreduce(torch.zeros(1, device=trainer.device)).wait()  # until all have what they were given
            fine = self._manager.should_commit()
            self._manager.load_state_dict({"step": rounds.done, "batches_committed": before})
            if fine:
                return

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer: Trainer, global_step: int) -> None:  # type: ignore[override]
        rounds = self._rounds
        if self._manager is None or rounds is None or not rounds.due(global_step):
            return
        self._in_step = True
        rounds.arrive(global_step)
        self._meet()
        self._synchronize(trainer, rounds)
        self._in_step = False

    def _synchronize(self, trainer: Trainer, rounds: Rounds) -> None:
        trainer.log(reduce="last", replicas=self._present)
        if not rounds.synchronize(trainer):
            log.warning("ft: the synchronization after step %d is refused: a replica was lost in it", rounds.met)

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        alone = trainer.global_step - (self._rounds.met or 0) if self._manager is not None and self._rounds else 0
        if alone:
            log.warning(
                "ft: training ends %d steps after the weights were synchronized, so each replica has its own; let it "
                "end at a multiple of ft.sync_every=%d", alone, self.sync_every,
            )  # fmt: skip

    # The end, and the state -------------------------------------------------------------

    @hookimpl
    def on_end_run(self) -> None:
        if self._manager is not None:
            self._state = self.get_state()
            manager, self._manager = self._manager, None
            if self._rounds is not None:
                self._rounds.manager = None
            manager.shutdown()

    def get_state(self) -> dict[str, Any]:
        """Return how many steps or rounds all replicas together have done, and how many batches.

        With rounds also the state of what synchronizes; where this is alone, nothing.
        """
        if self._manager is None:
            return dict(self._state)
        return {**self._manager.state_dict(), **(self._rounds.get_state() if self._rounds else {})}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._state = dict(state)
        if self._rounds is not None and state:
            self._rounds.update_state(state)
        elif self._manager is not None and state:
            self._manager.load_state_dict(state)


def find() -> tuple[int, int, str] | None:
    """Return which replica this is, of how many, and where the lighthouse is; None where the environment is silent.

    Raises:
        ValueError: it says only a part, or no numbers.
    """
    said = {name: os.environ.get(name, "") for name in (REPLICA, REPLICAS, LIGHTHOUSE)}
    if not said[REPLICA] and not said[REPLICAS]:
        return None
    missing = [name for name, value in said.items() if not value]
    if missing:
        raise ValueError(
            f"ft: {', '.join(missing)} is not in the environment: each replica wants {REPLICA} (from 0), {REPLICAS} "
            f"and {LIGHTHOUSE} (http://host:port)"
        )
    replica, replicas = said[REPLICA], said[REPLICAS]
    if not (replica.isdecimal() and replicas.isdecimal() and int(replica) < int(replicas)):
        raise ValueError(
            f"ft: {REPLICA}={replica} and {REPLICAS}={replicas} must be whole numbers, the first the smaller"
        )
    return int(replica), int(replicas), said[LIGHTHOUSE]


def equal(sampler: Any, trainer: Trainer) -> Any:
    """Return the sampler class without the samples that some replicas have more than others."""

    class Equal(sampler):  # type: ignore[misc]
        def __init__(self, data_source: Any) -> None:
            super().__init__(data_source)
            self.most = len(data_source) // trainer.shares

        def __iter__(self) -> Iterator[int]:
            trained = trainer.position * trainer.micro_batch_size
            return itertools.islice(super().__iter__(), max(self.most - trained, 0))

        def __len__(self) -> int:
            return int(self.most)

    return Equal
