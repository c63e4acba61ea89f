"""The names of PyMarlin's trainer backends: which plugins each means, and why some are refused."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Callable
from typing import Any

AMP = {"amp": {"precision": "fp16", "init_scale": 4096.0}}
DDP = {"ddp": {"find_unused_parameters": True}}
BACKENDS: dict[str, dict[str, dict[str, Any]]] = {"sp": {}, "sp-amp": AMP, "ddp": DDP, "ddp-amp": DDP | AMP}
GONE = {  # and why
    "sp-dp": "differential privacy needs opacus, which nobody has made a plugin of",
    "ddp-dp": "differential privacy needs opacus, which nobody has made a plugin of",
    "sp-amp-apex": "apex is given up; take sp-amp",
    "ddp-amp-apex": "apex is given up; take ddp-amp",
}
LAUNCHERS = {  # the variables of the rank and of the number of processes
    "torchrun": ("RANK", "WORLD_SIZE"),
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE"),
}


def launched() -> tuple[str, int, int]:
    """Return the launcher of this process, its rank, and the number of processes."""
    for launcher, (rank, size) in LAUNCHERS.items():
        if os.environ.get(rank, "").isdigit() and os.environ.get(size, "").isdigit():
            return launcher, int(os.environ[rank]), int(os.environ[size])
    return "", 0, 1


def check_backend(name: str, where: str) -> None:
    """Refuse a backend that is not here.

    Raises:
        ValueError: it is one of these.
    """
    if name in GONE:
        raise ValueError(f"{where} is not here: {GONE[name]}")
    if name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(BACKENDS)}")


def refuse_alone(name: str) -> None:
    """Refuse a backend that would not join the processes of a launcher.

    Raises:
        ValueError: it would not.
    """
    launcher, rank, processes = launched()
    if processes > 1 and not name.startswith("ddp"):
        raise ValueError(
            f"backend={name!r} is for one process, and this is process {rank} of {processes} that {launcher} has "
            f"started: each would train a model of its own; take backend='{name.replace('sp', 'ddp')}'"
        )


class TrainerBackend(ABC):
    """How a trainer of PyMarlin trains; here a name for plugins of hookline.

    A backend of your own is refused by the trainer: what it does is done by a plugin, such as one that performs the
    verb `train_epoch`, `update` or `forward_backward`.
    """

    name: str
    trainer: Any = None
    """The trainer that has it."""

    def get_global_steps_completed(self) -> int:
        """Return the optimizer steps completed."""
        return int(self._trainer.global_steps_finished)

    def get_batches_completed(self) -> int:
        """Return the micro-batches completed."""
        return int(self._trainer.total_steps_finished)

    def get_state(self) -> dict[str, int]:
        """Return both."""
        return {
            "global_step_completed": self.get_global_steps_completed(),
            "batches_completed": self.get_batches_completed(),
        }

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(f"{type(self).__name__} has no trainer yet: give it to Trainer(…, trainer_backend=…)")
        return self.trainer


class SingleProcess(TrainerBackend):
    """One process."""

    name = "sp"


class SingleProcessAmp(SingleProcess):
    """One process, with fp16 on a GPU."""

    def __init__(self, enable_amp: bool = True) -> None:
        self.name = "sp-amp" if enable_amp else "sp"


class DDPTrainerBackend(TrainerBackend):
    """Several processes, each of which trains as another backend does.

    Args:
        trainer_backend: that backend.
        gather_frequency: refused unless None: outputs are gathered whole.
    """

    def __init__(self, trainer_backend: SingleProcess, gather_frequency: int | None = None) -> None:
        if gather_frequency is not None:
            raise ValueError(f"gather_frequency={gather_frequency} is not here: outputs are gathered whole; leave it")
        known_backend(trainer_backend)
        self.trainer_backend, self.name = trainer_backend, trainer_backend.name.replace("sp", "ddp")


class SingleProcessApexAmp(TrainerBackend):
    """Refused: apex is given up."""

    def __init__(self, enable_amp: bool = True) -> None:
        raise ValueError(f"SingleProcessApexAmp is not here: {GONE['sp-amp-apex']} (SingleProcessAmp)")


class SingleProcessDpSgd(TrainerBackend):
    """Refused: differential privacy is not here."""

    def __init__(self) -> None:
        raise ValueError(f"SingleProcessDpSgd is not here: {GONE['sp-dp']}")


def known_backend(backend: Any) -> TrainerBackend:
    """Return a backend from its name or itself.

    Raises:
        ValueError: a name that is none.
        TypeError: a backend of the user's own.
    """
    if isinstance(backend, str):
        check_backend(backend, f"trainer_backend={backend!r}")
        return build_trainer_backend(backend)
    if type(backend) not in (SingleProcess, SingleProcessAmp, DDPTrainerBackend):
        raise TypeError(
            f"trainer_backend: a {type(backend).__name__} is none of SingleProcess, SingleProcessAmp and "
            "DDPTrainerBackend, so nothing here would call it; write what it does as a plugin of hookline: one that "
            "performs train_epoch, update or forward_backward (docs/writing-a-plugin.md), registered by "
            "trainer.core.plugins.register(…)"
        )
    return backend  # type: ignore[no-any-return]


def build_trainer_backend(trainer_backend_name: str) -> TrainerBackend:
    """Return the backend of a name.

    Raises:
        ValueError: it is none.
    """
    makers: dict[str, Callable[[], TrainerBackend]] = {
        "sp": SingleProcess,
        "sp-amp": SingleProcessAmp,
        "ddp": lambda: DDPTrainerBackend(SingleProcess()),
        "ddp-amp": lambda: DDPTrainerBackend(SingleProcessAmp()),
    }
    if trainer_backend_name not in makers:
        check_backend(trainer_backend_name, f"trainer_backend_name={trainer_backend_name!r}")
    return makers[trainer_backend_name]()
