"""Every hook, in the order in which the loop reaches it.

A hook is an event or a verb. The trainer calls an event (`on_*`) for every plugin that implements it, and
ignores what they return. A verb happens once and returns a result. Its body below is the core's way: it runs if
no plugin *performs* the verb, and a performer may call it within its own implementation. Any plugin may *wrap* a
verb: `@hookimpl(wrapper=True)`, `return (yield)`.

An implementation names any subset of the arguments, in any order. Every hook offers `trainer`. The order within a
hook is `tryfirst`, plain, `trylast`; within a band it is the order of `plugins:`, the first listed first and
outermost, the module's own hooks last.

This module is the public hook API. pluggy gets it as the specifications and as the plugin `core`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.counters import Cursor, lesser
from hookline.interfaces import Loader, Stage
from hookline.loop.first import look_at_gradients
from hookline.marks import event, verb
from hookline.monitored import mode_of
from hookline.optimizers import as_lists
from hookline.outputs import Kept, Outputs, WindowCut, detached, with_loss
from hookline.schedulers import go_on
from hookline.state import (
    get_gradients,
    get_named,
    get_optimizer_state,
    join_late_groups,
    lost_with_ranks,
    other_options,
    refuse_others,
    set_gradients,
    set_optimizer_state,
    take_shares,
)

if TYPE_CHECKING:
    from hookline.trainer import Trainer

TRAIN = Stage.TRAIN  # looking up an enum member is ten times slower than a name

# Before a run -------------------------------------------------------------------------


@verb
def get_ranks(trainer: Trainer) -> tuple[int, int, int]:
    """Return (rank, local rank, world size). Called before anything else."""
    return 0, 0, 1


@verb
def get_share(trainer: Trainer) -> tuple[int, int]:
    """Return (share, shares): which share of the data this rank takes, and of how many.

    Called when the ranks are known. Tensor-parallel ranks, which split single layers, take the same share.
    """
    return trainer.rank, trainer.world_size


@verb
def get_device(trainer: Trainer) -> torch.device:
    """Return the device of this rank: the option `device`, or CUDA if available, else the CPU."""
    name = trainer.options.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device={name!r} cannot be used: write auto, cpu, cuda, cuda:1 or mps ({why:.100})") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        said = f"torch finds {torch.cuda.device_count()} CUDA device(s) here (torch {torch.__version__})"
        raise ValueError(f"device={name!r}, and {said}: write device=auto, which takes what there is, or cpu")
    return device


@verb
def adapt_module(trainer: Trainer, module: Any) -> Any:
    """Return a `ModuleInterface` for what the user gave; the core calls a function or a `functools.partial`.

    An adapter wraps this verb and converts only objects of its own framework, so several adapters may be active:
    `module = yield; return Bridge(module) if is_mine(module) else module`. A plugin that chooses the device on which
    the function makes the module wraps it too.
    """
    return module() if inspect.isroutine(module) or isinstance(module, functools.partial) else module


@event(historic=True)
def on_setup(trainer: Trainer) -> None:
    """Run when the trainer exists and its module is registered.

    A plugin that is registered later gets this call then, and its state after it.
    """


@event
def on_begin_run(trainer: Trainer, stage: Stage, config: Mapping[str, Any]) -> None:
    """Run when training, or a separate evaluation, begins.

    `config` is the resolved configuration with its secrets masked.
    """


@verb
def run(trainer: Trainer, stage: Stage) -> bool:
    """Do the whole run; return True.

    Plugins with resources that must not leak wrap it: process groups, signal handlers, profilers.
    """
    if stage is Stage.TRAIN:
        trainer.training.train()
    else:
        trainer.evaluation.evaluate(stage)
    return True


# Setting up ---------------------------------------------------------------------------


@verb
def find_state(trainer: Trainer, stage: Stage) -> Mapping[str, Any]:
    """Return the section `trainer` of the state that `restore` will load; empty if there is none.

    `trainer.resuming` calls it, on all ranks: a module can thus read the counters before it is built.
    """
    return {}


@verb
def get_window_size(trainer: Trainer) -> int:
    """Return how many micro-batches make one optimizer step (gradient accumulation)."""
    return 1


@verb
def convert_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with some of its parts replaced.

    trylast is innermost (low-rank adapters), plain in the middle (other number formats),
    tryfirst outermost (activation checkpointing).
    """
    return model


@verb
def split_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with single layers split over ranks (tensor parallelism)."""
    return model


@verb
def compile_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Return the compiled model; compile submodules in place to keep the names of parameters."""
    return model


@verb
def shard_model(trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model in its place: whole on this rank's device, or replicated (DDP), or sharded (FSDP)."""
    return model.to(trainer.device)


@verb
def get_sampler(trainer: Trainer, stage: Stage) -> type[torch.utils.data.Sampler[Any]]:
    """Return the sampler class that the module's `get_*_dataloader` of this stage receives."""
    cursor = trainer.cursor if stage is Stage.TRAIN else Cursor(seed=trainer.options.seed)
    return data.sampler_class(cursor, stage is Stage.TRAIN, trainer.share, trainer.shares)


@verb
def join_loaders(trainer: Trainer, loaders: Mapping[str, Any], sampler: type[torch.utils.data.Sampler[Any]]) -> Loader:
    """Return one training loader for those that `get_train_dataloader` returned by key; of one it is that one.

    `sampler` is the class that the method received. The result goes through `setup_loader` like any training loader.
    """
    if len(loaders) != 1:
        said = f"{type(trainer.module).__name__}.get_train_dataloader() must return one loader; it returned"
        raise ValueError(f"{said} loaders by key {list(loaders)}: `plugins: {{mixture: {{}}}}` would join them")
    return next(iter(loaders.values()))


@verb
def setup_loader(trainer: Trainer, loader: Loader, stage: Stage, key: str) -> Loader:
    """Return the loader to iterate, a private one: the user's own object does not change.

    A training loader begins at `trainer.position`.
    """
    return trainer.loaders.prepare(loader, stage, key)


@verb
def fetch_batches(
    trainer: Trainer, fetched: Iterator[tuple[Any, Any]], stage: Stage, key: str
) -> Iterator[tuple[Any, Any]]:
    """Return the iterator from which a private loader takes its batches: pairs of a note of the loader, and a batch.

    Called each time that a loader of torch or a stream is iterated. A plugin that looks at batches as they are loaded,
    or loads them ahead, wraps it: it gives the same pairs, in the same order. A batch counts when it comes out of the
    returned iterator: the state of a stateful loader is that behind it, whatever has been loaded ahead.
    """
    return fetched


@verb
def setup_optimizers(trainer: Trainer) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Return (optimizers, schedulers); the model is complete, and `trainer.totals` is known."""
    module, totals = trainer.module, trainer.totals
    epochs = totals.epochs if totals.epochs is not None else 1
    return as_lists(module.get_optimizers_schedulers(totals.steps_per_epoch, epochs), module)


@verb
def restore(trainer: Trainer, stage: Stage) -> bool:
    """Load the state that `trainer.options.resume` names; return whether there was one.

    Called once, after all hooks above. Stages other than training need only the module, the plugins and the counters. A
    performer reads its storage and calls `trainer.hook.set_run_state`.
    """
    if trainer.options.resume:
        raise ValueError(
            "resume is asked for, but no plugin can restore a run: name one that performs `restore`, "
            "e.g. `plugins: {checkpoint: {}}` from the distribution hookline-checkpoint"
        )
    return False


@verb
def get_run_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the run in named sections.

    `own_plugins`, `logs`, `rng`, `loader` and `window` belong to this rank, the other sections to all ranks.
    `own_plugins` has the plugins with `state_of_rank`, `plugins` the others. The state is consistent only in
    `on_begin_train`, `on_begin_train_epoch`, `on_boundary` and `save`. If `save` comes within a window, the section
    `window` has the gradients so far by parameter, and the outputs of the micro-batches that gave them.
    """
    names = {id(parameter): name for name, parameter in trainer.module.named_parameters()}
    plugins: dict[bool, dict[str, Any]] = {False: {}, True: {}}  # by whether the state belongs to this rank
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
    """Load a state; return True. Stages other than training load only the module, the plugins and the counters.

    Call it in `restore`; or in `on_boundary`, and training continues where that state was saved, data included.
    """
    state = take_shares(trainer.module, state)
    trainer.module.update_state(state["module"])
    trainer.plugins.receive({**state["plugins"], **state.get("own_plugins", {})})
    if stage is not Stage.TRAIN:
        if "trainer" in state:  # not in what a plugin keeps of a run, such as its best weights
            trainer.counters.update_state(state["trainer"]["counters"])  # so that values are logged at their step
        return True
    trainer.training.update_state(state["trainer"])
    if not trainer.options.reset_optimizers_schedulers:
        as_built = trainer.options.schedulers == "as_built"
        moved = list(go_on(trainer.schedulers, state["schedulers"], as_built, trainer.counters))
        refuse_others(trainer.optimizers, state["optimizers"])
        for optimizer, kept in zip(trainer.optimizers, state["optimizers"], strict=True):
            if not trainer.schedulers and not state["schedulers"]:  # they set options too
                trainer.say_once(other_options(optimizer, kept))
            join_late_groups(optimizer, trainer.module, kept)
            names = {id(parameter): name for name, parameter in trainer.module.named_parameters()}
            set_optimizer_state(optimizer, names, kept)
        for replayed in moved:
            trainer.say_once(replayed.set())
    window = state.get("window", {"outputs": [], "gradients": {}})
    trainer.window.cut(data.to_device(window["outputs"], trainer.device))
    set_gradients(trainer.module, window["gradients"])
    trainer.cursor.keep_loader_state(state.get("loader"))
    if trainer.rank == 0:
        trainer.say_once(lost_with_ranks(state, trainer.world_size))
    trainer.logs.update_state(state.get("logs", {}))  # a new rank has neither these
    trainer.randomness.update_state(state.get("rng"))  # nor this
    return True


@verb
def allocate(trainer: Trainer, path: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor to read a stored tensor into; of one stored whole, a shard alone is used.

    `path` is its place in the run's state, such as `("optimizers", 0, "state", "net.weight", "exp_avg")`. The core
    makes it like the last parameter or buffer that the path names, if the shape is the same: of a sharded model this
    is only the shard of this rank. Any other tensor is whole and on the CPU.
    """
    for name in reversed(path):
        like = get_named(trainer.module, name)
        if like is not None and like.shape == torch.Size(shape):
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(tuple(shape), dtype=dtype)


# Training -----------------------------------------------------------------------------


@event
def on_begin_train(trainer: Trainer, global_step: int) -> None:
    """Run when everything is built and restored, and training begins.

    `update_state` may have been called already: create only what is missing.
    """


@verb
def compile_function(trainer: Trainer, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what to call in place of a function on tensors that a plugin calls at each step: itself, or it compiled.

    A plugin that computes at each step, such as a clip, asks in `on_begin_train` and calls the answer from then on. The
    function may change tensors in place. It calls no hook and logs nothing.
    """
    return function


@event
def on_begin_train_epoch(trainer: Trainer, global_step: int, epoch: int) -> None:
    """Run when an epoch begins, or when a resumed run continues in the middle of one."""


@verb
def train_epoch(trainer: Trainer, batches: Iterator[Any]) -> bool:
    """Train on the remaining batches of this epoch; return False if a stop cut it short.

    A performer that does not take each batch once must set `trainer.position` itself.
    """
    hook = trainer.hook
    while window := hook.take_window(trainer=trainer, batches=batches):
        if not (trainer.training.settle() and trainer.training.take_step(window)):  # `trainer.advance`
            return False
    if trainer.position == 0:
        raise ValueError(
            f"the training loader gave no batch: {type(trainer.module).__name__}.get_train_dataloader() was asked for "
            f"batches of {trainer.micro_batch_size}; is the data set empty, smaller than one batch with drop_last, or "
            "an iterator that has ended (return a new one in each call)?"
        )
    return True


@verb
def take_window(trainer: Trainer, batches: Iterator[Any]) -> list[Any]:
    """Return the micro-batches of one optimizer step, none at the end, without moving them to the device.

    The last window of an epoch may be shorter; its size is known before its first backward pass. A performer that adds
    micro-batches so that all ranks have equally many calls `trainer.window.pad`.
    """
    return list(itertools.islice(batches, trainer.window.size))


@verb
def count_samples(trainer: Trainer, batch: Any, stage: Stage) -> int:
    """Return how many samples a batch holds, as it came from the loader.

    A loader of torch knows. For other batches the core guesses, and warns once if the guess is doubtful.
    `counters.samples` counts the samples, and means over batches are weighted by them.
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
    """Return the weight of a mean that a step returns for a batch, as it came from the loader: its samples.

    Perform it if the loss is a mean over something else, such as tokens or valid pixels. Training then weights the
    micro-batches of a window, over all ranks, too: the gradient is that of the mean over all of them. Without a
    performer each micro-batch of a window has the same weight.
    """
    return trainer.hook.count_samples(trainer=trainer, batch=batch, stage=stage)  # type: ignore[no-any-return]


@verb
def update(trainer: Trainer, window: Sequence[Any]) -> list[Outputs]:
    """Do one whole optimizer step; return the outputs of each micro-batch, the loss first.

    A module with a procedure of its own performs it (two optimizers in turn, a closure, manual optimization). It calls
    `trainer.step` with the optimizers that step.
    """
    outputs = trainer.hook.run_window(trainer=trainer, window=window)
    # The rest is `trainer.step`, without its call.
    training, optimizers = trainer.training, trainer.built.optimizers
    if training.first_step == "under way":
        look_at_gradients(trainer, trainer.built, optimizers)
    if not trainer.hook.step_optimizers(trainer=trainer, optimizers=optimizers, closure=None):
        training.skip()
    return outputs  # type: ignore[no-any-return]


@verb
def run_window(trainer: Trainer, window: Sequence[Any]) -> list[Outputs]:
    """Run forward and backward for the micro-batches of a window; return their outputs."""
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
    """Run forward and backward for one micro-batch, the `index`-th of `size`; return its outputs."""
    hook = trainer.hook
    batch = hook.prepare_batch(trainer=trainer, batch=batch, stage=TRAIN)
    outputs = with_loss(hook.call_model(trainer=trainer, batch=batch, stage=TRAIN))
    if trainer.plugins.collecting:
        outputs = Kept((outputs[0], *detached(outputs[1:])))  # before the step changes memory that they are views of
    loss = hook.scale_loss(trainer=trainer, loss=outputs[0], batch=batch, size=size, index=index)
    hook.run_backward(trainer=trainer, loss=loss)
    hook.on_end_backward(trainer=trainer, global_step=trainer.counters.global_step, loss_tensor=loss)
    return outputs


@verb
def prepare_batch(trainer: Trainer, batch: Any, stage: Stage) -> Any:
    """Return the batch on the device; on the CPU nothing moves."""
    return batch if trainer.on_cpu else data.to_device(batch, trainer.device)


@verb
def call_model(trainer: Trainer, batch: Any, stage: Stage) -> Any:
    """Return what the module's step for this stage returns for a batch; `()` for None."""
    step = trainer.counters.global_step + (stage is TRAIN)
    outputs = trainer.built.model(stage=stage, global_step=step, batch=batch, device=trainer.device)
    return () if outputs is None else outputs


@verb
def scale_loss(trainer: Trainer, loss: torch.Tensor, batch: Any, size: int, index: int) -> torch.Tensor:
    """Return the loss for the backward pass: divided by the size of the window, which gives the window's mean.

    If a plugin or the module performs `get_weight`, the mean is weighted, over the window and over all ranks.
    """
    if trainer.window.parts is None:
        return loss if size == 1 else loss / size
    part = trainer.window.parts[index]
    return loss * part if part else loss.nan_to_num() * 0  # the mean of nothing is NaN


@verb
def run_backward(trainer: Trainer, loss: torch.Tensor) -> bool:
    """Compute the gradients; return True."""
    loss.backward()  # type: ignore[no-untyped-call]
    return True


@event
def on_end_backward(trainer: Trainer, global_step: int, loss_tensor: torch.Tensor) -> None:
    """Run after the backward pass of a micro-batch; see `CallbackInterface`."""


@verb
def step_optimizers(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer], closure: Any) -> bool:
    """Step optimizers through every gate, then clear all gradients; return whether all of them stepped.

    `trainer.step` calls it.
    """
    hook = trainer.hook
    if closure is None:
        hook.on_begin_optimizer_step(trainer=trainer, optimizers=optimizers)
    stepped = bool(hook.should_step(trainer=trainer, optimizers=optimizers))
    if stepped:
        for optimizer in optimizers:
            if not hook.step_optimizer(trainer=trainer, optimizer=optimizer, closure=closure):
                stepped = False
    hook.on_end_optimizer_step(trainer=trainer, optimizers=optimizers, stepped=stepped)
    if stepped:
        metrics = trainer.evaluation.metrics
        hook.step_schedulers(trainer=trainer, when="step", optimizers=optimizers, metrics=metrics)
    for optimizer in trainer.built.optimizers:  # `zero_grad` inlined, to save a call in each step
        optimizer.zero_grad()
    return stepped


@event
def on_begin_optimizer_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Run when the gradients are complete.

    tryfirst makes them true (unscaling), plain changes them (clipping), trylast reads them (norms).
    """


@verb
def get_total_norm(trainer: Trainer, norm: torch.Tensor, norm_type: float) -> torch.Tensor:
    """Return the norm of all gradients of the model, of that of the gradients that this rank has.

    Called on all ranks, if there are several, by who takes a norm over all gradients. Performed by who leaves ranks
    some of the parameters alone, as the stages of a pipeline.
    """
    return norm


@verb
def should_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Return whether to step. To skip steps, wrap it: `return (yield) and fine`; always yield, so that ranks agree."""
    return True


@verb
def step_optimizer(trainer: Trainer, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
    """Step one optimizer; return whether the weights changed."""
    optimizer.step() if closure is None else optimizer.step(closure)
    return True


@event
def on_end_optimizer_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer], stepped: bool) -> None:
    """Run after the optimizers have stepped, or the step was skipped; the gradients still exist."""


@verb
def step_schedulers(
    trainer: Trainer,
    when: str,
    optimizers: Sequence[torch.optim.Optimizer],
    metrics: Mapping[str, float],
) -> bool:
    """Step the schedulers of these optimizers that move after a "step", "epoch" or "validation"; return True."""
    for scheduler, moves, metric in trainer.built.schedulers:
        if moves == when and getattr(scheduler, "optimizer", trainer.optimizers[0]) in optimizers:
            if metric is None:
                scheduler.step()
            elif metric in metrics:  # a missing metric is an error at the boundary
                scheduler.step(metrics[metric])
    return True


@event
def on_end_train_step(
    trainer: Trainer, global_step: int, train_step_collated_outputs: list[Any], stepped: bool
) -> None:
    """Run when one optimizer step is complete; `stepped` is False if it was skipped.

    For the outputs see `CallbackInterface`: if a step has one micro-batch, the loss is a tensor of shape ().
    """


# Evaluation ---------------------------------------------------------------------------


@verb
def evaluate(trainer: Trainer, stage: Stage, loaders: Mapping[str, Loader], limit: int | None) -> dict[str, float]:
    """Evaluate all loaders of a stage, `limit` batches of each; return the metrics.

    Plugins that evaluate other weights than the trained ones wrap it.
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
    """Run when an evaluation begins; `totals` has the number of batches by loader, None if unknown."""


@event
def on_begin_val_epoch(trainer: Trainer, key: str) -> None:
    """Run when the evaluation of one validation loader begins."""


@event
def on_end_val_step(trainer: Trainer, outputs: Outputs, batch: Any, key: str, index: int) -> None:
    """Run after one validation batch, with what `val_step` returned, on the device."""


@verb
def gather_outputs(trainer: Trainer, outputs: list[Any], stage: Stage, key: str) -> list[Any]:
    """Return the collated outputs of all ranks, in the order of the data set, without padding."""
    return outputs


@event
def on_end_val_epoch(trainer: Trainer, global_step: int, val_step_collated_outputs: list[Any], key: str) -> None:
    """Run when the evaluation of one validation loader is complete; see `CallbackInterface`."""


@event
def on_begin_test_epoch(trainer: Trainer, key: str) -> None:
    """Run when the evaluation of one test loader begins."""


@event
def on_end_test_step(trainer: Trainer, outputs: Outputs, batch: Any, key: str, index: int) -> None:
    """Run after one test batch, with what `test_step` returned, on the device."""


@event
def on_end_test_epoch(trainer: Trainer, global_step: int, test_step_collated_outputs: list[Any], key: str) -> None:
    """Run when the evaluation of one test loader is complete, with its collated outputs."""


@event
def on_begin_predict_epoch(trainer: Trainer, key: str) -> None:
    """Run when the prediction of one loader begins."""


@event
def on_end_predict_step(
    trainer: Trainer, outputs: Any, batch: Any, key: str, index: int, places: Sequence[int]
) -> None:
    """Run after one prediction, with exactly what `predict_step` returned; the trainer does not keep it.

    `places` has the place of each sample of the batch in the order of the data: sorted by it, the samples of all ranks
    are in that order. Samples of a batch that was dealt to the rank as a whole have one place.
    """


@event
def on_end_predict_epoch(trainer: Trainer, key: str) -> None:
    """Run when the prediction of one loader is complete."""


@event
def on_end_validation(trainer: Trainer, global_step: int, metrics: Mapping[str, float]) -> None:
    """Run with the metrics of all validation loaders, over all ranks; not after a sanity check.

    Values logged in it join the metrics. To decide by a metric, read `trainer.metrics` in `on_boundary`.
    """


@verb
def get_mode(trainer: Trainer, metric: str) -> str:
    """Return whether the smallest ("min") or the largest ("max") value of a metric is the best.

    The core knows losses and the words of names. If the words do not decide, or contradict each other, it raises a
    ValueError that asks for an option. Plugins that look for the best value call it before the first step. A plugin or
    module that knows better wraps it.
    """
    losses = trainer.options.val_loss_metric_name, trainer.options.train_loss_metric_name
    return "min" if metric.partition("/")[0] in losses else mode_of(metric)


# The end of things --------------------------------------------------------------------


@event
def on_end_train_epoch(trainer: Trainer, global_step: int, train_step_collated_outputs: list[Any]) -> None:
    """Run when an epoch and its validation are complete; see `CallbackInterface`.

    A plugin that is called first (tryfirst) may change the items of the list for the others, for example to those of
    all ranks, by `gather_outputs`.
    """


@event
def on_boundary(trainer: Trainer, global_step: int) -> None:
    """Run when a step, its evaluation and, if due, its epoch's end are complete: the state is consistent.

    The only place to save, vote, roll back or stop. It comes before the next update, or after the epoch's end, so no
    plugin needs to know which step is the last.
    """


@verb
def get_watched_metrics(trainer: Trainer) -> dict[str, str]:
    """Return the metrics that every validation must have, each with the option that reads it.

    The core knows those that schedulers follow. A plugin that reads one adds it:
    `return (yield) | {"val_acc": "mine.metric"}`. A validation without one of them ends the run with an error: before
    the first step where that is known, else at its boundary, when the state is saved.
    """
    return dict(trainer.built.followed)


@verb
def save(trainer: Trainer, reason: str, state: Mapping[str, Any] | None) -> bool:
    """Store the run's state; return whether it was stored.

    Called at a boundary if `trainer.save(reason)` was called, or if training ends. `state` is what `get_run_state`
    returned at another boundary, or None for the current state.
    """
    return False


@event
def on_end_train(trainer: Trainer, global_step: int) -> None:
    """Run when training is over; not if it was interrupted or raised."""


@verb
def export_model(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return only the portable weights of the model."""
    return trainer.module.state_dict()


@event
def on_checkpoint(trainer: Trainer, path: Path, kind: str) -> None:
    """Run when the state of a run, or a model, is complete on disk; `kind` says which."""


# Logging ------------------------------------------------------------------------------


@verb
def filter_log(trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of one flush that are to be logged; wrap it to change or drop them."""
    return metrics


@event
def on_log(trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
    """Run with the values of one flush. `trainer.counters` has other axes than the step.

    Within a validation during training (`trainer.stage` is then `Stage.VAL`), the values cover the validation so far,
    and `global_step` is `trainer.counters.evaluation_batches`; see `report_loss_after_eval`.
    """


@event
def on_log_object(trainer: Trainer, name: str, value: Any, global_step: int) -> None:
    """Run with an object that is not a number: a text, a figure, an image, a table."""


# Ranks --------------------------------------------------------------------------------


@verb
def all_reduce(trainer: Trainer, value: torch.Tensor, op: str) -> torch.Tensor:
    """Return a small tensor reduced over all ranks; `op` is sum, min or max.

    Ranks with the same share of the data count once in a sum.
    """
    return value


@verb
def all_gather(trainer: Trainer, value: Any) -> list[Any]:
    """Return every rank's object, in the order of ranks."""
    return [value]


@verb
def vote(trainer: Trainer, asked: bool, seconds: float) -> tuple[bool, float]:
    """Return whether any rank requests something that all ranks must do together, and the common seconds of training.

    Called at each boundary if there are several ranks; the result is the same on all of them. `asked` tells whether
    this rank has a request, by `trainer.stop` or `trainer.save(…, alone=True)`. A rank repeats its request until the
    answer is yes. The answer may come some steps later, so steps need not wait for it.
    """
    return asked, seconds


@verb
def rank_zero_first(trainer: Trainer, each_machine: bool) -> AbstractContextManager[None]:
    """Return a context that rank 0 executes first, then the others; see `Trainer.rank_zero_first`."""
    return nullcontext()


# When it ends -------------------------------------------------------------------------


@event
def on_exception(trainer: Trainer, exception: BaseException) -> None:
    """Run when an exception was raised; it is raised again afterwards."""


@event
def on_end_run(trainer: Trainer, stage: Stage, status: str, reason: str) -> None:
    """Run for every plugin when training, or a separate evaluation, is over, with or without an error: teardown.

    `status` is "finished", "stopped", "preempted" or "failed".
    """
