"""Every hook, in the order in which the loop reaches it.

A hook is an event or a verb. Events (`on_*`) are told to everyone and their answers dropped.
Verbs are done once and answer; a verb's body below is how the core does it when nobody
*performs* it, and may be called by a performer that wants the core's way in the middle of
its own. Anyone may *wrap* a verb: `@hookimpl(wrapper=True)`, `return (yield)`.

An implementation names any subset of the arguments, in any order. Every hook offers
`trainer`. The order within a hook: `tryfirst`, plain, `trylast`; within a band the order
of `plugins:`, the first listed first and outermost, the module's own hooks last.

This module is the public hook API: it is given to pluggy as specifications and as the
plugin `core` at once.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.counters import Cursor, lesser
from hookline.interfaces import Loader, Stage
from hookline.marks import event, verb
from hookline.monitored import mode_of
from hookline.outputs import Outputs, WindowCut, detached, with_loss
from hookline.schedulers import go_on
from hookline.state import (
    get_gradients,
    get_named,
    get_optimizer_state,
    join_late_groups,
    lost_with_ranks,
    set_gradients,
    set_optimizer_state,
    take_shares,
)

if TYPE_CHECKING:
    from hookline.trainer import Trainer

TRAIN = Stage.TRAIN  # a member of an enum is ten times as slow to find as a name

# Before a run -------------------------------------------------------------------------


@verb
def get_ranks(trainer: Trainer) -> tuple[int, int, int]:
    """Answer (rank, local rank, world size). Asked before anything else."""
    return 0, 0, 1


@verb
def get_share(trainer: Trainer) -> tuple[int, int]:
    """Answer (share, shares): which share of the data this rank takes, and of how many.

    Asked when ranks are known. Ranks that split single layers between them take the same.
    """
    return trainer.rank, trainer.world_size


@verb
def get_device(trainer: Trainer) -> torch.device:
    """Answer the device of this rank: `trainer.device` of the options, else CUDA where there is one."""
    name = trainer.options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@verb
def adapt_module(trainer: Trainer, module: Any) -> Any:
    """Answer a `ModuleInterface` for what the user gave; what is a function (or a `functools.partial`) is called.

    An adapter wraps this and bridges only what is its own, so that several may be active:
    `module = yield; return Bridge(module) if is_mine(module) else module`. So may who decides on which
    device a function makes the module.
    """
    return module() if inspect.isroutine(module) or isinstance(module, functools.partial) else module


@event(historic=True)
def on_setup(trainer: Trainer) -> None:
    """Hear that the trainer exists and its module is registered.

    A plugin that is registered later hears it at that moment, then receives its state.
    """


@event
def on_begin_run(trainer: Trainer, stage: Stage, config: Mapping[str, Any]) -> None:
    """Hear that a run begins: training, or an evaluation on its own.

    `config` is the resolved configuration with its secrets masked.
    """


@verb
def run(trainer: Trainer, stage: Stage) -> bool:
    """Do the whole run; answer True.

    Wrapped by holders of resources that must not leak: process groups, signal handlers,
    profilers.
    """
    if stage is Stage.TRAIN:
        trainer.training.train()
    else:
        trainer.evaluation.evaluate(stage)
    return True


# Setting up ---------------------------------------------------------------------------


@verb
def find_state(trainer: Trainer, stage: Stage) -> Mapping[str, Any]:
    """Answer the section `trainer` of the state that `restore` will bring back; empty where there is none.

    Asked by `trainer.resuming`, on all ranks: a module can so know before it is built what it will be.
    """
    return {}


@verb
def get_window_size(trainer: Trainer) -> int:
    """Answer how many micro-batches make one optimizer step."""
    return 1


@verb
def convert_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Answer the model with parts of it replaced.

    trylast is innermost (low-rank adapters), plain in the middle (other number formats),
    tryfirst outermost (activation checkpointing).
    """
    return model


@verb
def split_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Answer the model with single layers split over ranks."""
    return model


@verb
def compile_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Answer the model compiled; submodules in place keep the names of parameters."""
    return model


@verb
def shard_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Answer the model where it shall live: whole on this rank's device, or replicated, or sharded."""
    return model.to(trainer.device)


@verb
def get_sampler(trainer: Trainer, stage: Stage) -> type[torch.utils.data.Sampler[Any]]:
    """Answer the sampler class that the module's `get_*_dataloader` of this stage receives."""
    cursor = trainer.cursor if stage is Stage.TRAIN else Cursor(seed=trainer.options.seed)
    return data.sampler_class(cursor, stage is Stage.TRAIN, trainer.share, trainer.shares)


@verb
def setup_loader(trainer: Trainer, loader: Loader, stage: Stage, key: str) -> Loader:
    """Answer the loader to iterate, a private one: the user's own object stays as it was.

    A training loader begins at `trainer.position`.
    """
    return trainer.loaders.prepare(loader, stage, key)


@verb
def setup_optimizers(trainer: Trainer) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Answer (optimizers, schedulers); the model stands, and `trainer.totals` is known."""
    module, totals = trainer.module, trainer.totals
    epochs = totals.epochs if totals.epochs is not None else 1
    optimizers, schedulers = module.get_optimizers_schedulers(totals.steps_per_epoch, epochs)
    return list(optimizers), list(schedulers)


@verb
def restore(trainer: Trainer, stage: Stage) -> bool:
    """Bring back the state that `trainer.options.resume` asks for; answer whether there was one.

    Asked once, after all of the above. For stages other than training only module and
    plugins are wanted. A performer reads its storage and calls `trainer.hook.set_run_state`.
    """
    if trainer.options.resume:
        raise ValueError(
            "resume is asked for, but no plugin can restore a run: name one that performs `restore`, "
            "e.g. `plugins: {checkpoint: {}}` from the distribution hookline-checkpoint"
        )
    return False


@verb
def get_run_state(trainer: Trainer) -> dict[str, Any]:
    """Answer the state of the run in named sections; `own_plugins`, `logs`, `rng`, `loader`, `window` are of this rank.

    The others are of all ranks. `own_plugins` has the plugins that say `state_of_rank`, `plugins` the rest.
    Whole only in `on_begin_train`, `on_begin_train_epoch`, `on_boundary` and `save`. The section
    `window` is there where `save` comes within a window: the gradients so far by parameter,
    and the outputs of the micro-batches that gave them.
    """
    names = {id(parameter): name for name, parameter in trainer.module.named_parameters()}
    plugins: dict[bool, dict[str, Any]] = {False: {}, True: {}}  # by whether their state is of this rank
    for name, plugin, kept in trainer.plugins.states():
        plugins[getattr(plugin, "state_of_rank", False)][name] = kept
    state = {
        "trainer": trainer.training.get_state(),
        "module": trainer.module.get_state(),
        "optimizers": [get_optimizer_state(optimizer, names) for optimizer in trainer.optimizers],
        "schedulers": [scheduled.scheduler.state_dict() for scheduled in trainer.schedulers],
        "plugins": plugins[False],
        "own_plugins": plugins[True],
        "logs": trainer.logs.get_state(),
        "rng": trainer.randomness.get_state(),
    }
    if trainer.window.begun:
        state["window"] = {"outputs": trainer.window.begun, "gradients": get_gradients(trainer.module)}
    if (said := trainer.loaders.state()) is not None:
        state["loader"] = said
    return state


@verb
def set_run_state(trainer: Trainer, state: Mapping[str, Any], stage: Stage) -> bool:
    """Put a state back; answer True. Stages other than training take module and plugins alone.

    Called in `restore`; or in `on_boundary`, and then training goes on, data too, where that state stood.
    """
    state = take_shares(trainer.module, state)
    trainer.module.update_state(state["module"])
    trainer.plugins.receive({**state["plugins"], **state.get("own_plugins", {})})
    if stage is not Stage.TRAIN:
        return True
    trainer.training.update_state(state["trainer"])
    if not trainer.options.reset_optimizers_schedulers:
        as_built = trainer.options.schedulers == "as_built"
        moved = list(go_on(trainer.schedulers, state["schedulers"], as_built))
        for optimizer, kept in zip(trainer.optimizers, state["optimizers"], strict=True):
            join_late_groups(optimizer, trainer.module, kept)
            names = {id(parameter): name for name, parameter in trainer.module.named_parameters()}
            set_optimizer_state(optimizer, names, kept)
        for replayed in moved:
            replayed.tell()
    window = state.get("window", {"outputs": [], "gradients": {}})
    trainer.window.cut(data.to_device(window["outputs"], trainer.device))
    set_gradients(trainer.module, window["gradients"])
    trainer.cursor.keep_loader_state(state.get("loader"))
    if trainer.rank == 0:
        trainer.say_once(lost_with_ranks(state, trainer.world_size))
    trainer.logs.update_state(state.get("logs", {}))  # a rank that was not there before has neither these
    trainer.randomness.update_state(state.get("rng"))  # nor this
    return True


@verb
def allocate(trainer: Trainer, path: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Answer what a tensor that ranks had stored in shares is read into; what it holds means nothing.

    `path` is where in a run's state it stands, such as `("optimizers", 0, "state", "net.weight", "exp_avg")`. Made
    like the parameter or buffer that it names last, where the shape is the same: of a model that ranks share this is
    the share of this rank alone. All else is whole, on the CPU.
    """
    for name in reversed(path):
        like = get_named(trainer.module, name)
        if like is not None and like.shape == torch.Size(shape):
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(tuple(shape), dtype=dtype)


# Training -----------------------------------------------------------------------------


@event
def on_begin_train(trainer: Trainer, global_step: int) -> None:
    """Hear that all is built and restored, and training begins.

    `update_state` may already have come: create only what is missing.
    """


@event
def on_begin_train_epoch(trainer: Trainer, global_step: int, epoch: int) -> None:
    """Hear that an epoch begins; also that a resumed run goes on in the middle of one."""


@verb
def train_epoch(trainer: Trainer, batches: Iterator[Any]) -> bool:
    """Train on the batches that are left of this epoch; answer False if a stop cut it short.

    A performer that does not take each batch once keeps `trainer.position` himself.
    """
    hook = trainer.hook
    while window := hook.take_window(trainer=trainer, batches=batches):
        if not trainer.training.advance(window):
            return False
    if trainer.position == 0:
        raise ValueError(
            f"the training loader gave no batch: {type(trainer.module).__name__}.get_train_dataloader() was asked for "
            f"batches of {trainer.micro_batch_size}; is the data set empty, or smaller than one batch with drop_last?"
        )
    return True


@verb
def take_window(trainer: Trainer, batches: Iterator[Any]) -> list[Any]:
    """Answer the micro-batches of one optimizer step, none at the end; they stay where they are.

    The last window of an epoch may be short, and is known to be before its first backward. Who fills a window
    up so that all ranks have as many says so by `trainer.window.pad`.
    """
    return list(itertools.islice(batches, trainer.window.size))


@verb
def count_samples(trainer: Trainer, batch: Any, stage: Stage) -> int:
    """Answer how many samples a batch holds, as the loader gave it.

    A loader of torch's knows; of a batch from elsewhere it is guessed, and one warning says where that is
    doubtful. `counters.samples` counts it, and means over batches are weighted by it.
    """
    samples, doubt = data.counted(batch, trainer.loaders.given)
    if doubt:
        trainer.say_once(
            f"it is not plain how many samples a batch ({type(batch).__name__}) holds: {doubt}. {samples} is taken, "
            "and means are weighted by it. Say it by a method count_samples(self, batch) of the module, marked "
            "@hookimpl, or let a DataLoader of torch make the batches",
            about=f"samples of {type(batch).__name__}",
        )
    return samples


@verb
def get_weight(trainer: Trainer, batch: Any, stage: Stage) -> float:
    """Answer how much the mean weighs that a step returns for a batch, as the loader gave it: its samples.

    Performed where a loss is a mean over something else, such as tokens or valid pixels. A window of several
    micro-batches, and all ranks, are then weighted by it in training too: the gradient is that of the mean over
    all of them. Without a performer each micro-batch of a window weighs the same.
    """
    return trainer.hook.count_samples(trainer=trainer, batch=batch, stage=stage)  # type: ignore[no-any-return]


@verb
def update(trainer: Trainer, window: Sequence[Any]) -> list[Outputs]:
    """Do one optimizer step, whole; answer each micro-batch's outputs, the loss first.

    Performed by a module with a way of its own (two optimizers in turn, a closure, manual
    optimisation): it calls `trainer.step` for which optimizers and when.
    """
    outputs = trainer.hook.run_window(trainer=trainer, window=window)
    trainer.training.step()
    return outputs  # type: ignore[no-any-return]


@verb
def run_window(trainer: Trainer, window: Sequence[Any]) -> list[Outputs]:
    """Take the micro-batches of a window forward and backward; answer their outputs."""
    hook, size = trainer.hook, len(window)
    outputs = trainer.window.go_on() if trainer.window.begun else []  # of a run that was cut within this window
    for index in range(len(outputs), size):
        if index:
            trainer.window.begin_micro_batch(index)
        outputs.append(hook.forward_backward(trainer=trainer, batch=window[index], index=index, size=size))
        if index + 1 < size and trainer.ends.cutting:
            raise WindowCut(outputs)
    return outputs


@verb
def forward_backward(trainer: Trainer, batch: Any, index: int, size: int) -> Outputs:
    """Take one micro-batch, the `index`-th of `size`, forward and backward; answer its outputs."""
    hook = trainer.hook
    batch = hook.prepare_batch(trainer=trainer, batch=batch, stage=TRAIN)
    outputs = with_loss(hook.call_model(trainer=trainer, batch=batch, stage=TRAIN))
    if trainer.plugins.collecting:
        outputs = (outputs[0], *detached(outputs[1:]))  # before the step writes into what they are parts of
    loss = hook.scale_loss(trainer=trainer, loss=outputs[0], batch=batch, size=size, index=index)
    hook.run_backward(trainer=trainer, loss=loss)
    hook.on_end_backward(trainer=trainer, global_step=trainer.counters.global_step, loss_tensor=loss)
    return outputs


@verb
def prepare_batch(trainer: Trainer, batch: Any, stage: Stage) -> Any:
    """Answer the batch on the device; on the CPU there is nowhere to move it."""
    return batch if trainer.on_cpu else data.to_device(batch, trainer.device)


@verb
def call_model(trainer: Trainer, batch: Any, stage: Stage) -> Any:
    """Answer what the module's step for this stage returns for a batch."""
    step = trainer.counters.global_step + (stage is TRAIN)
    return trainer.built.model(stage=stage, global_step=step, batch=batch, device=trainer.device)


@verb
def scale_loss(trainer: Trainer, loss: torch.Tensor, batch: Any, size: int, index: int) -> torch.Tensor:
    """Answer the loss that goes backward: a window's mean, hence divided by the window's own size.

    Where somebody performs `get_weight` it is the mean by these weights, over the window and over all ranks.
    """
    if trainer.window.parts is None:
        return loss if size == 1 else loss / size
    part = trainer.window.parts[index]
    return loss * part if part else loss.nan_to_num() * 0  # the mean of nothing is no number


@verb
def run_backward(trainer: Trainer, loss: torch.Tensor) -> bool:
    """Compute the gradients; answer True."""
    loss.backward()  # type: ignore[no-untyped-call]
    return True


@event
def on_end_backward(trainer: Trainer, global_step: int, loss_tensor: torch.Tensor) -> None:
    """Hear that a micro-batch has been through backward; see `CallbackInterface`."""


@event
def on_begin_optimizer_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Hear that the gradients are complete.

    tryfirst makes them true (unscaling), plain changes them (clipping), trylast looks (norms).
    """


@verb
def should_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Answer whether to step. A gate wraps it: `return (yield) and fine`, always yielding, so ranks agree."""
    return True


@verb
def step_optimizer(trainer: Trainer, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
    """Step one optimizer; answer whether the weights moved."""
    optimizer.step() if closure is None else optimizer.step(closure)
    return True


@event
def on_end_optimizer_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer], stepped: bool) -> None:
    """Hear that the optimizers have stepped, or were refused to; the gradients are still there."""


@verb
def step_schedulers(
    trainer: Trainer,
    when: str,
    optimizers: Sequence[torch.optim.Optimizer],
    metrics: Mapping[str, float],
) -> bool:
    """Move the schedulers of these optimizers that move after a "step", "epoch" or "validation"; answer True."""
    for scheduler, moves, metric in trainer.built.schedulers:
        if moves == when and getattr(scheduler, "optimizer", trainer.optimizers[0]) in optimizers:
            if metric is None:
                scheduler.step()
            elif metric in metrics:  # that it is not has been said, and ends the run at the boundary
                scheduler.step(metrics[metric])
    return True


@event
def on_end_train_step(
    trainer: Trainer, global_step: int, train_step_collated_outputs: list[Any], stepped: bool
) -> None:
    """Hear that one optimizer step is complete; `stepped` is False where it was refused."""


# Evaluation ---------------------------------------------------------------------------


@verb
def evaluate(trainer: Trainer, stage: Stage, loaders: Mapping[str, Loader], limit: int | None) -> dict[str, float]:
    """Evaluate all loaders of a stage, `limit` batches of each; answer the metrics.

    Wrapped by whoever evaluates other weights than it trains.
    """
    hook, word = trainer.hook, stage.value
    totals = {key: lesser(data.length(loader), limit) for key, loader in loaders.items()}
    hook.on_begin_evaluation(trainer=trainer, stage=stage, totals=totals)
    with trainer.evaluation.under_way(stage):
        for key, loader in loaders.items():
            with trainer.logs.suffixed(f"/{key}" if len(loaders) > 1 else ""):
                getattr(hook, f"on_begin_{word}_epoch")(trainer=trainer, key=key)
                trainer.evaluation.take_batches(stage, key, itertools.islice(loader, limit))
        return trainer.logs.collect()


@event
def on_begin_evaluation(trainer: Trainer, stage: Stage, totals: Mapping[str, int | None]) -> None:
    """Hear that an evaluation begins; `totals` are the batches to come by loader, None where unknown."""


@event
def on_begin_val_epoch(trainer: Trainer, key: str) -> None:
    """Hear that one validation loader begins."""


@event
def on_end_val_step(trainer: Trainer, outputs: Outputs, batch: Any, key: str, index: int) -> None:
    """Hear of one validation batch: what `val_step` returned, on the device."""


@verb
def gather_outputs(trainer: Trainer, outputs: list[Any], stage: Stage, key: str) -> list[Any]:
    """Answer the collated outputs of all ranks, in the order of the data set, padding dropped."""
    return outputs


@event
def on_end_val_epoch(trainer: Trainer, global_step: int, val_step_collated_outputs: list[Any], key: str) -> None:
    """Hear that one validation loader is through; see `CallbackInterface`."""


@event
def on_begin_test_epoch(trainer: Trainer, key: str) -> None:
    """Hear that one test loader begins."""


@event
def on_end_test_step(trainer: Trainer, outputs: Outputs, batch: Any, key: str, index: int) -> None:
    """Hear of one test batch: what `test_step` returned, on the device."""


@event
def on_end_test_epoch(trainer: Trainer, global_step: int, test_step_collated_outputs: list[Any], key: str) -> None:
    """Hear that one test loader is through, with its collated outputs."""


@event
def on_begin_predict_epoch(trainer: Trainer, key: str) -> None:
    """Hear that one loader of what shall be predicted begins."""


@event
def on_end_predict_step(trainer: Trainer, outputs: Any, batch: Any, key: str, index: int) -> None:
    """Hear of one prediction, exactly what `predict_step` returned; nobody keeps it."""


@event
def on_end_predict_epoch(trainer: Trainer, key: str) -> None:
    """Hear that one loader of what shall be predicted is through."""


@event
def on_end_validation(trainer: Trainer, global_step: int, metrics: Mapping[str, float]) -> None:
    """Hear the metrics of all validation loaders, of all ranks. Not sent after a sanity check.

    What is logged in it becomes part of them: who decides by a metric does so in `on_boundary`, by `trainer.metrics`.
    """


@verb
def get_mode(trainer: Trainer, metric: str) -> str:
    """Answer whether the smallest ("min") or the largest ("max") value of a metric is the best.

    The core knows losses, and what the words of the name say; where they say nothing, or both, it raises a ValueError
    that asks for an option. Asked by whoever looks for the best value, before the first step; wrapped by whoever
    knows better.
    """
    losses = trainer.options.val_loss_metric_name, trainer.options.train_loss_metric_name
    return "min" if metric.partition("/")[0] in losses else mode_of(metric)


# The end of things --------------------------------------------------------------------


@event
def on_end_train_epoch(trainer: Trainer, global_step: int, train_step_collated_outputs: list[Any]) -> None:
    """Hear that an epoch is complete, its validation included; see `CallbackInterface`."""


@event
def on_boundary(trainer: Trainer, global_step: int) -> None:
    """Hear that a step, its evaluation and, where due, its epoch's end are complete: state is whole.

    The only place to save, vote, roll back or stop. Told before the next update, or after
    the epoch's end, so nobody needs to know which step is the last.
    """


@verb
def save(trainer: Trainer, reason: str, state: Mapping[str, Any] | None) -> bool:
    """Store the run's state; answer whether it was stored.

    Called at a boundary, when somebody has asked by `trainer.save(reason)` or training ends. `state` is
    what `get_run_state` answered at another boundary, or None for what it answers now.
    """
    return False


@event
def on_end_train(trainer: Trainer, global_step: int) -> None:
    """Hear that training has come to its end; not sent when it was interrupted or raised."""


@verb
def export_model(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Answer the portable weights of the model alone."""
    return trainer.module.state_dict()


@event
def on_checkpoint(trainer: Trainer, path: Path, kind: str) -> None:
    """Hear that something is complete on disk; `kind` says what: a whole run's state, or a model."""


# Logging ------------------------------------------------------------------------------


@verb
def filter_log(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Answer what shall be logged of one flush; wrapped by whoever changes it."""
    return metrics


@event
def on_log(trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
    """Hear the values of one flush. Other axes than the step stand in `trainer.counters`.

    Within a validation of a training (`trainer.stage` is then `Stage.VAL`) they are those of the validation so far, and
    `global_step` is `trainer.counters.evaluation_batches`; see `report_loss_after_eval`.
    """


@event
def on_log_object(trainer: Trainer, name: str, value: Any, global_step: int) -> None:
    """Hear of something that is no number: a text, a figure, an image, a table."""


# Ranks --------------------------------------------------------------------------------


@verb
def all_reduce(trainer: Trainer, value: torch.Tensor, op: str) -> torch.Tensor:
    """Answer a small tensor reduced over all ranks; `op` is sum, min or max.

    Ranks with the same share of the data count once in a sum.
    """
    return value


@verb
def all_gather(trainer: Trainer, value: Any) -> list[Any]:
    """Answer every rank's object, in the order of ranks."""
    return [value]


@verb
def vote(trainer: Trainer, asked: bool, seconds: float) -> tuple[bool, float]:
    """Answer whether a rank has asked for what all have to do together, and the seconds of training that all count.

    Called at each boundary where there are several ranks; the answer is the same on all of them. `asked` is
    whether this one has, by `trainer.stop` or `trainer.save(…, alone=True)`. Who asked goes on asking
    until the answer is yes, so it may come some steps later, and steps need not wait for it.
    """
    return asked, seconds


@verb
def rank_zero_first(trainer: Trainer, each_machine: bool) -> AbstractContextManager[None]:
    """Answer a context that rank 0 goes through alone, then the others; see `Trainer.rank_zero_first`."""
    return nullcontext()


# When it ends -------------------------------------------------------------------------


@event
def on_exception(trainer: Trainer, exception: BaseException) -> None:
    """Hear that something was raised; it is raised again afterwards."""


@event
def on_end_run(trainer: Trainer, stage: Stage, status: str, reason: str) -> None:
    """Hear that a run is over; this reaches every plugin, whatever happened. Teardown is here.

    `status` is "finished", "stopped", "preempted" or "failed".
    """
