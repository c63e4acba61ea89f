"""Log figures of a run: learning rates, norms of gradients, speed, the machine, the time of plugins."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, every, hookimpl
from hookline_monitor import flops, machine
from hookline_monitor.sampling import Sampler, Stacks

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

COUNTING = "monitor.flops"
"""The name of what counts FLOPs, while it does."""

log = logging.getLogger("hookline.monitor")


@dataclass(eq=False)
class Monitor(CallbackInterface):
    """Log figures of a run with each interval, and drop the values that nobody wants to see.

    Where the module has `count_tokens(batch)`, the tokens trained on so far are logged as `tokens`.
    """

    learning_rate: bool = False
    """Log the learning rate of the last step, of each group of parameters."""
    train_loss: bool = True
    """Let the losses of training be logged."""
    validation_loss: bool = True
    """Let the losses of validations and tests be logged."""
    additional_metrics: bool = True
    """Let all else be logged that others log."""
    grad_norm: bool = False
    """Log the norm of the gradients that the optimizer gets: unscaled and clipped."""
    gpu_utilization: bool = False
    """Log how busy the GPUs are, in percent, and their memory in use, in GiB."""
    cpu_utilization: bool = False
    """Log how busy the processors are, by all and by this process, in percent, and the memory in use, in GiB."""
    throughput: bool = False
    """Log steps and samples per second, and tokens where the module counts them."""
    mfu: bool = False
    """Log FLOP per second of a device, and which share they are of the most that it can do."""
    flops_per_sample: float | None = None
    """The FLOPs of forward and backward for one sample on one rank; null counts those of the first step."""
    peak_flops: float | None = None
    """The most FLOP per second that a device can do; null takes the maker's figure where it is known."""
    plugin_time: bool = False
    """Log which share of the time is spent in each plugin, in the module and in the loop."""

    def __post_init__(self) -> None:
        self._check_flops()
        self._tokens = 0.0
        self._flops: tuple[str, float, float | None] | None = None  # of a token or sample, and seconds at the peak
        self._counting = flops.Counting(self._take_flops)
        self._rates: dict[int, list[Any]] = {}
        self._norm_wanted = True
        self._since: list[float] = []  # clocks at the last interval's end; evaluations do not count
        self._counted = 0, 0
        self._samplers: list[Sampler] = []
        self._stacks: Stacks | None = None
        self._gpus: machine.Gpus | None = None
        self._processors: machine.Processors | None = None
        self._evaluating = False
        wanted = {
            "on_end_optimizer_step": self.learning_rate,
            "on_begin_optimizer_step": self.grad_norm,
            "evaluate": self.throughput or self.mfu or self.cpu_utilization or self.gpu_utilization,
        }
        for hook in [hook for hook, asked in wanted.items() if not asked]:
            setattr(self, hook, None)  # a hook that is not there costs nothing

    def _check_flops(self) -> None:
        for name in ("flops_per_sample", "peak_flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"monitor.{name}={value} must be above 0, or null")
            if value is not None and not self.mfu:
                raise ValueError(f"monitor.{name}={value:g} is for monitor.mfu, which is false; set it to true")
        if self.flops_per_sample is not None and self.peak_flops is None:
            raise ValueError(
                f"monitor.flops_per_sample={self.flops_per_sample:g} needs monitor.peak_flops too: nothing is counted "
                "then, so it is not known of which kind of numbers the device's peak is to be"
            )

    @hookimpl(wrapper=True, tryfirst=True)
    def adapt_module(self) -> Generator[None, Any, Any]:
        module = yield
        self.__dict__.pop("update", None)
        if not hasattr(module, "count_tokens"):  # hooks are looked for once more when the module is known
            self.update = None  # type: ignore[assignment,method-assign]
        return module

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if self.cpu_utilization:
            machine.need("psutil", "cpu_utilization", "psutil>=5.9")
        if self.gpu_utilization:
            machine.need("pynvml", "gpu_utilization", "nvidia-ml-py>=12.535")

    # A training ---------------------------------------------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        if trainer.rank == 0:
            if self.cpu_utilization:
                self._processors = machine.Processors()
            if self.gpu_utilization:
                self._gpus = machine.find_gpus()
            if self._gpus is not None:
                self._samplers.append(Sampler(self._look_at_gpus, machine.PERIOD))
            if self.plugin_time:
                plugins = {**dict(trainer.plugins.listed()), "module": trainer.module}
                self._stacks = Stacks(plugins, threading.get_ident())
                self._samplers.append(Sampler(self._stacks.look, Stacks.PERIOD))
            if self.mfu:
                self._begin_flops(trainer)
        self._begin_interval(trainer)

    def _begin_interval(self, trainer: Trainer) -> None:
        self._norm_wanted = True
        self._counted = trainer.counters.global_step, trainer.counters.samples
        self._since = self._clocks()

    def _begin_flops(self, trainer: Trainer) -> None:
        self._flops = None
        if self.flops_per_sample is not None and self.peak_flops is not None:
            self._flops = "sample", self.flops_per_sample, self.flops_per_sample / self.peak_flops
        elif flops.is_compiled(trainer):
            log.warning(
                "monitor.mfu counts no FLOPs of a compiled model, since it would run uncompiled meanwhile; give "
                "monitor.flops_per_sample and monitor.peak_flops. A run without compiling says what it has counted"
            )
        else:
            trainer.plugins.register(self._counting, COUNTING)

    def _take_flops(self, trainer: Trainer, counted: flops.Counted, window: Sequence[Any]) -> None:
        """Keep what the first step has counted, by token where the module counts tokens."""
        if self.update is not None:
            unit, number = "token", sum(trainer.module.count_tokens(batch) for batch in window)  # type: ignore[operator]
        else:
            count = trainer.hook.count_samples
            unit, number = "sample", sum(count(trainer=trainer, batch=batch, stage=Stage.TRAIN) for batch in window)
        if number:
            trainer.plugins.unregister(name=COUNTING)
            seconds = flops.seconds_at_peak(trainer, counted, self.peak_flops)
            each = sum(counted.values()) / number
            self._flops = unit, each, None if seconds is None else seconds / number
            log.info("monitor: forward and backward of one %s take %.6g FLOPs on this rank", unit, each)

    @hookimpl
    def on_end_run(self, trainer: Trainer) -> None:
        if trainer.plugins.has_plugin(COUNTING):
            trainer.plugins.unregister(name=COUNTING)
        for sampler in self._samplers:
            sampler.stop()
        if self._gpus is not None:
            self._gpus.close()
        self._samplers, self._stacks, self._gpus, self._processors = [], None, None, None

    def _clocks(self) -> list[float]:
        """Return seconds: on the wall, and those of the processors where they are asked for."""
        return [time.perf_counter(), *(self._processors.clocks() if self._processors else ())]

    def _look_at_gpus(self) -> None:
        if self._gpus is not None and not self._evaluating:
            self._gpus.look()

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, Any, Any]:
        began, self._evaluating = self._clocks(), True
        try:
            return (yield)
        finally:
            self._evaluating = False
            self._since = [s + now - then for s, then, now in zip(self._since, began, self._clocks(), strict=False)]

    # A step -------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def update(self, trainer: Trainer, window: Sequence[Any]) -> Generator[None, Any, Any]:
        real = window[: len(window) - trainer.padding]
        tokens = sum(trainer.module.count_tokens(batch) for batch in real)  # type: ignore[operator]
        outputs = yield
        trainer.log(reduce="sum", sync=True, tokens=tokens)
        return outputs

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        number, unit = every(trainer.options.log_every)
        wanted = (trainer.counters.global_step + 1) % number == 0 if unit == "steps" else self._norm_wanted
        if not wanted or trainer.idle:  # a step that is only tried is no step of the interval
            return
        self._norm_wanted = False
        norm = norm_of_gradients(optimizers)
        if trainer.world_size > 1:  # ranks may have other parameters, and this one none
            norm = torch.zeros((), device=trainer.device) if norm is None else norm
            norm = trainer.hook.get_total_norm(trainer=trainer, norm=norm, norm_type=2.0)
        if norm is not None:
            trainer.log(grad_norm=norm)

    @hookimpl
    def on_end_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self._rates[id(optimizer)] = [kept(group["lr"]) for group in optimizer.param_groups]

    # A flush ------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> Generator[None, Any, Any]:
        given = dict(metrics)
        logged = yield
        filtered = {name: value for name, value in logged.items() if self._lets_through(trainer, name)}
        if "tokens" in given and self.update is not None:
            self._tokens += given["tokens"]
            filtered["tokens"] = self._tokens
        if trainer.options.train_loss_metric_name in given:  # an interval of training is over
            if trainer.rank == 0:
                filtered |= self._figures(trainer, given)
            self._begin_interval(trainer)
        return filtered

    def _lets_through(self, trainer: Trainer, name: str) -> bool:
        options = trainer.options
        if name in (options.train_loss_metric_name, f"{options.train_loss_metric_name}_epoch"):
            return self.train_loss
        for loss in (options.val_loss_metric_name, f"{options.val_loss_metric_name}_batch", "test_loss"):
            if name == loss or name.startswith(f"{loss}/"):
                return self.validation_loss
        return self.additional_metrics or (name == "grad_norm" and self.grad_norm)

    def _figures(self, trainer: Trainer, given: Mapping[str, float]) -> dict[str, float]:
        """Return what is known of the interval that is over."""
        figures: dict[str, float] = {}
        if self.learning_rate:
            for optimizer, names in zip(trainer.optimizers, names_of_rates(trainer.optimizers), strict=True):
                rates = zip(names, self._rates_of(optimizer), strict=False)  # a group may have joined since the step
                figures |= {name: float(rate) for name, rate in rates}
        seconds, *processors = (now - since for since, now in zip(self._since, self._clocks(), strict=True))
        steps, samples = self._counted
        steps, samples = trainer.counters.global_step - steps, trainer.counters.samples - samples
        if self.throughput and steps > 0:  # less where a state of before was put back
            figures |= {"steps_per_second": steps / seconds, "samples_per_second": samples / seconds}
            if "tokens" in given and self.update is not None:
                figures["tokens_per_second"] = given["tokens"] / seconds
        if self._flops is not None and steps > 0:
            unit, each, at_peak = self._flops
            done = (samples if unit == "sample" else given.get("tokens", 0)) / trainer.shares
            figures["tflops_per_second"] = done * each / seconds / 1e12
            if at_peak is not None:
                figures["mfu"] = done * at_peak / seconds
        if self._processors is not None:
            figures |= self._processors.figures(seconds, *processors)
        if self._gpus is not None:
            figures |= self._gpus.figures()
        if self._stacks is not None:
            figures |= {f"time/{name}": share for name, share in self._stacks.shares().items()}
        return figures

    def _rates_of(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Return the learning rates of an optimizer's last step; where it has not stepped, those of its next."""
        return self._rates.get(id(optimizer)) or [group["lr"] for group in optimizer.param_groups]

    # State --------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the tokens so far."""
        return {"tokens": self._tokens} if self._tokens else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._tokens = state["tokens"]


def names_of_rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[str]]:
    """Return the names of the learning rates: a group's own name if no other has it, else its place."""
    given = [group.get("name") for optimizer in optimizers for group in optimizer.param_groups]
    names: list[list[str]] = []
    for place, optimizer in enumerate(optimizers):
        names.append([])
        for number, group in enumerate(optimizer.param_groups):
            parts = [f"optimizer_{place}"] * (len(optimizers) > 1)
            parts += [f"group_{number}"] * (len(optimizer.param_groups) > 1)
            if group.get("name") and given.count(group["name"]) == 1:
                parts = [str(group["name"])]
            names[-1].append("/".join(["learning_rate", *parts]))
    return names


def kept(rate: Any) -> Any:
    """Return a learning rate that its scheduler does not change any more: it may be a tensor."""
    return rate.clone() if isinstance(rate, torch.Tensor) else rate


def norm_of_gradients(optimizers: Sequence[torch.optim.Optimizer]) -> torch.Tensor | None:
    """Return the Euclidean norm of all gradients of some optimizers together; None where there are none.

    It stays on its device. Of gradients that ranks share it is that of all shares, for which ranks exchange one number.
    """
    ways: dict[Any, list[torch.Tensor]] = {}  # in which ranks share them; torch takes one way at a time
    for optimizer in optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                ways.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms: list[Any] = [torch.nn.utils.get_total_norm(gradients) for gradients in ways.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole) if len(whole) > 1 else next(iter(whole), None)
