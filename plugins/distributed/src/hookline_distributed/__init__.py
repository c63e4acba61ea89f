"""Join the processes of a run: their ranks, the process group, what they gather and what they agree on.

Each file imports those above it alone:

| file | what it is for |
|---|---|
| `environment` | who this process is, as launchers say it |
| `stores` | where ranks meet, and how they part |
| `outputs` | what ranks have collected, in the order of the data set |
| `alike` | what ranks have in common: compared, and given to all by rank 0 |
| `mesh` | the hooks that other plugins implement or call |
| `together` | evaluations in which ranks need each other in every forward |
| `stepping` | optimizers of weights that ranks share in several ways |
| `uneven` | ranks with different numbers of batches |

The plugin, here, puts them together.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from hookline import CallbackInterface, Stage, hookimpl, hookspecs, seconds
from hookline_distributed import mesh
from hookline_distributed.alike import Alike, compare, describe, describe_loader
from hookline_distributed.environment import ALONE, Place, find
from hookline_distributed.mesh import sizes_of
from hookline_distributed.outputs import interleaved, to_host
from hookline_distributed.stepping import Stepping
from hookline_distributed.stores import leave, meeting
from hookline_distributed.together import Together
from hookline_distributed.uneven import Agreed, Shortened, Uneven, lengths_of, listed

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

UNEVEN = ("drop", "error", "pad", "join")

log = logging.getLogger("hookline.distributed")


@dataclass(eq=False)
class Distributed(CallbackInterface):
    """Make one run of several processes, as a launcher started them; alone it changes nothing.

    What makes the model one of all ranks is another plugin's: ddp, or a stranger's, that requires this one.
    """

    backend: str = "auto"
    """Of torch.distributed; auto is gloo, and with CUDA gloo for the CPU and nccl for it."""
    init_method: str = "env://"
    """Where ranks meet: at MASTER_ADDR and MASTER_PORT, or `file:///path` on a file system that all of them see."""
    start_timeout: str = "5 min"
    """How long ranks wait for each other at the start."""
    timeout: str = "2 min"
    """How long a rank waits for the others later; then the run ends."""
    vote_every: int = 4
    """Steps between the votes on what one rank has asked for alone: a stop, a save; served within twice as many."""
    uneven: str = "drop"
    """What to do where ranks have different numbers of batches: "drop" what not all have, raise an "error", or keep the
    shorter ranks in step: "pad" with a batch at zero weight, or "join" in what the others do without computing."""
    verify_model: bool = True
    """Compare the weights of ranks that hold one model at each evaluation and save, and its buffers at evaluations."""

    hookspecs = mesh

    def __post_init__(self) -> None:
        if self.vote_every < 1:
            raise ValueError(f"distributed.vote_every={self.vote_every} must be at least 1 step")
        if self.uneven not in UNEVEN:
            raise ValueError(f"distributed.uneven={self.uneven!r} must be one of {', '.join(UNEVEN)}")
        if not self.init_method.startswith(("env://", "file:///")):
            raise ValueError(f"distributed.init_method={self.init_method!r} must be env:// or file:///path")
        self._start = datetime.timedelta(seconds=seconds(self.start_timeout, "distributed.start_timeout"))
        self._wait = datetime.timedelta(seconds=seconds(self.timeout, "distributed.timeout"))
        self._place: Place = ALONE
        self._control: Any = None  # a gloo group of its own, so that votes do not stand between the model's collectives
        self._door: Any = None  # a group that waits for ever
        self._speaks = True  # whether this is the first of the ranks with its share of the data
        self._mesh: Any = None
        self._alone = False  # whether it has been said that this is one process
        self._begin_voting(0.0)
        if self.uneven in ("pad", "join"):  # another plugin of ours does it
            self.even_out = None  # type: ignore[assignment,method-assign]

    # Ranks and devices ----------------------------------------------------------------

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        name = trainer.plugins.get_name(self)
        if self.uneven in ("pad", "join"):
            trainer.plugins.register(Uneven(self.uneven == "join"), f"{name}.uneven")
        if self.verify_model and trainer.world_size > 1:
            trainer.plugins.register(Alike(), f"{name}.alike")
        if trainer.world_size > 1:
            trainer.plugins.register(Together(), f"{name}.together")
            trainer.plugins.register(Stepping(), f"{name}.stepping")

    @hookimpl
    def get_ranks(self) -> tuple[int, int, int]:
        self._place = find()
        return self._place[:3]

    @hookimpl
    def get_device(self, trainer: Trainer) -> torch.device:
        device = hookspecs.get_device(trainer=trainer)
        if device.type in ("cpu", "mps") or device.index is not None:  # torch knows one device of mps
            return device
        devices: Any = torch.get_device_module(device)
        if self._place.local_rank >= devices.device_count():
            raise ValueError(
                f"rank {self._place.rank} is process {self._place.local_rank} of its machine, which has "
                f"{devices.device_count()} {device.type.upper()} device(s); start one process a device"
            )
        devices.set_device(self._place.local_rank)
        return torch.device(device.type, self._place.local_rank)

    # The process group ----------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def run(self, trainer: Trainer) -> Generator[None, bool, bool]:
        if trainer.world_size == 1:
            self._say_alone(trainer)
            return (yield)
        try:
            self._join(trainer)
            compare(trainer, "configuration", describe(trainer))
            shares = trainer.hook.all_gather(trainer=trainer, value=trainer.share)
            self._speaks = shares.index(trainer.share) == trainer.rank
            answer = yield
            self._end_voting()
            return answer
        except BaseException as error:  # the others notice at once; nothing here waits for them
            if "/gloo/" in str(error):
                error.add_note(
                    f"rank {trainer.rank} of {trainer.world_size} has lost another rank, or waited for it longer than "
                    f"{self.timeout} (distributed.timeout); what that one says, or the network, tells why. What one "
                    "rank does for longer goes into `with trainer.rank_zero_first():`, where the others wait for it"
                )
            self._control = self._door = None
            leave()
            raise

    def _say_alone(self, trainer: Trainer) -> None:
        """Say once who would share the model with other processes, and how there are some."""
        sharers = trainer.plugins.performers("split_model") + trainer.plugins.performers("shard_model")
        if sharers and not self._alone:
            self._alone = True
            log.warning(
                "distributed: this is one process, so there is nobody to share the model with (%s). "
                "`hookline fit run.yaml --nproc 2` starts two on this machine, "
                "`torchrun --nproc-per-node 2 -m hookline fit run.yaml` does as well",
                ", ".join(sharers),
            )

    def _meet(self, trainer: Trainer) -> None:
        """Have a process group, which lasts as long as this process: a model of all ranks is of no use without it."""
        rank, world_size = trainer.rank, trainer.world_size
        backend = self.backend
        if backend == "auto":
            kind = trainer.device.type
            backend = "gloo" if trainer.on_cpu else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
        if not dist.is_initialized():
            store = meeting(self._place, self.init_method, self._start, self.start_timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=self._wait)
            atexit.register(leave)
        if self._control is None:
            self._control = dist.new_group(backend="gloo", timeout=self._wait)

    def _join(self, trainer: Trainer) -> None:
        """Meet, and have the folder of rank 0."""
        self._meet(trainer)
        rank = trainer.rank
        told: list[Any] = [str(trainer.run_dir), trainer.options.resume] if rank == 0 else [None, None]
        dist.broadcast_object_list(told, src=0, group=self._control)
        if rank != 0:
            folder, resume = Path(told[0]), trainer.options.resume
            if told[1] and (not isinstance(resume, str) or folder == trainer.run_dir):
                trainer.options.resume = told[1]  # it may know better: launchers tell those that were there before
            trainer.use_run_dir(folder)  # ranks that look for the next free one would find others

    @hookimpl
    def get_mesh(self, trainer: Trainer) -> Any:
        if self._mesh is None:
            shape = sizes_of(trainer.hook.get_mesh_shape(trainer=trainer), trainer.world_size)
            self._mesh = init_device_mesh(trainer.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
            trainer.hook.on_make_groups(trainer=trainer, groups=self._mesh.get_all_groups())
        return self._mesh

    @hookimpl
    def on_make_groups(self, groups: Sequence[Any]) -> None:
        for group in groups:
            if dist.get_backend(group) != "fake":
                _set_pg_timeout(self._wait, group)

    # What ranks tell each other -------------------------------------------------------

    @hookimpl
    def all_reduce(self, trainer: Trainer, value: torch.Tensor, op: str) -> torch.Tensor:
        if self._control is None:
            return value
        reduced = value.to("cpu", copy=True)  # where a rank has no value of its own, it knows no device of it either
        if op == "sum" and not self._speaks:
            reduced.zero_()  # what ranks with the same share of the data have in common counts once
        dist.all_reduce(reduced, getattr(dist.ReduceOp, op.upper()), group=self._control)
        return reduced.to(value.device)

    @hookimpl
    def all_gather(self, trainer: Trainer, value: Any) -> list[Any]:
        if self._control is None:
            return [value]
        gathered = [None] * trainer.world_size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    @hookimpl
    @contextlib.contextmanager
    def rank_zero_first(self, trainer: Trainer, each_machine: bool) -> Iterator[None]:
        """Wait in a group of its own, which knows no timeout, and ends with a rank that has gone."""
        if trainer.world_size == 1:
            yield
            return
        self._meet(trainer)
        if self._door is None:
            self._door = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
        first = (trainer.local_rank if each_machine else trainer.rank) == 0
        failed = None
        try:
            if first:
                yield
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
            raise
        finally:
            said: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(said, failed, group=self._door)
        for rank, failure in enumerate(said):
            if failure is not None:
                raise RuntimeError(f"rank {rank}, which went first in trainer.rank_zero_first(), has failed: {failure}")
        if not first:
            yield

    @hookimpl
    def gather_outputs(self, trainer: Trainer, outputs: list[Any]) -> list[Any]:
        """Put the outputs of all ranks into the order of the data set, of which each share has every n-th sample."""
        said = [to_host(column) for column in outputs] if self._speaks else []
        ranks = trainer.hook.all_gather(trainer=trainer, value=said)
        return [interleaved(columns, trainer.device) for columns in zip(*filter(None, ranks), strict=True)]

    # What ranks agree on --------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        self._begin_voting(trainer.counters.seconds)
        if trainer.world_size == 1:
            return
        compare(trainer, "place to begin at", {"counters": asdict(trainer.counters)})
        if trainer.shares > 1 and not trainer.plugins.performers("shard_model") and trainer.rank == 0:
            log.warning("distributed: no plugin makes one model of those of the ranks, so each trains its own; add ddp")

    def _begin_voting(self, seconds: float) -> None:
        self._counted, self._seconds_of_all = 0, seconds
        self._under_way: tuple[Any, torch.Tensor] | None = None

    @hookimpl
    def vote(self, trainer: Trainer, asked: bool, seconds: float) -> tuple[bool, float]:
        """Read the vote that began some steps ago, and begin another: no step waits for it."""
        self._counted += 1
        if self._counted % self.vote_every:
            return False, self._seconds_of_all
        some = self._end_voting()
        ballot = torch.tensor([float(asked), seconds if trainer.rank == 0 else 0.0], dtype=torch.float64)
        self._under_way = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._control, async_op=True), ballot
        return some, self._seconds_of_all

    def _end_voting(self) -> bool:
        """Return what the vote under way has come to."""
        if self._under_way is None:
            return False
        work, ballot = self._under_way
        work.wait()
        self._under_way = None
        asked, self._seconds_of_all = ballot.tolist()
        return bool(asked)

    # Evaluation -----------------------------------------------------------------------

    @hookimpl(wrapper=True, trylast=True)  # innermost: who swaps other buffers in has done it
    def evaluate(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        """Give all ranks the buffers of rank 0, where they hold one model: since the last forward each has its own."""
        if self._control is not None:
            alike = trainer.hook.get_replicated(trainer=trainer, buffers=True).values()
            buffers = [tensor for tensor in alike if not isinstance(tensor, torch.nn.Parameter)]
            trainer.hook.broadcast(trainer=trainer, tensors=buffers)
        return (yield)

    # Batches --------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer: Trainer, loader: Any, stage: Stage, key: str) -> Generator[None, Any, Any]:
        if stage is not Stage.TRAIN and self._control is not None:
            compare(trainer, f"{stage.value} loader", describe_loader(loader, key))
        return (yield)

    @hookimpl(wrapper=True, specname="setup_loader")
    def even_out(self, trainer: Trainer, loader: Any, stage: Stage, key: str) -> Generator[None, Any, Any]:
        given, loader = loader, (yield)
        if stage is not Stage.TRAIN or self._control is None:
            return loader
        lengths = lengths_of(trainer, loader, given, key)
        cursor = trainer.cursor
        # Resumed between two batches, as they are now, ranks may have one more or less than their lengths say.
        unknown = lengths[0] is None or bool(cursor.draw and cursor.consumed % cursor.draw)
        name = f"{trainer.plugins.get_name(self)}.agreed"
        if trainer.plugins.has_plugin(name):
            trainer.plugins.unregister(name=name)
        if unknown:
            trainer.plugins.register(Agreed(self.uneven == "error"), name)
        if len(set(lengths)) == 1:
            return loader
        if self.uneven == "error":
            raise ValueError(
                f"the ranks have {listed(lengths)} batches, and distributed.uneven=error: make the data set a multiple "
                "of the ranks, or let distributed.uneven=drop leave out what not all have"
            )
        return Shortened(loader, min(lengths), trainer)
