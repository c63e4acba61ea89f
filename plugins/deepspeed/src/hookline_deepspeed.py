"""Train one model by DeepSpeed's engine, which has backward, gradients and the step for its own (ZeRO 0 to 2)."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hookline import CallbackInterface, Stage, hookimpl, hookspecs

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

OWNED = {  # keys of DeepSpeed's configuration that are decided elsewhere, and where
    "train_batch_size": "it is trainer.train_batch_size",
    "train_micro_batch_size_per_gpu": "it follows from trainer.train_batch_size, the ranks and the window",
    "gradient_accumulation_steps": "it is the size of the window: plugins.accumulate.steps",
    "managed_gradient_accumulation": "windows are told to the engine",
    "optimizer": "it is what get_optimizers_schedulers returns",
    "scheduler": "it is what get_optimizers_schedulers returns",
    "zero_optimization.stage": "it is deepspeed.stage",
    "zero_optimization.offload_optimizer": "it is deepspeed.offload",
    "fp16": "the state of its scaler would be in no checkpoint; take bf16 or torch_autocast",
    "amp": "take bf16 or torch_autocast",
}


@dataclass(eq=False)
class Deepspeed(CallbackInterface):
    """Hand backward, gradients and the optimizer's step to DeepSpeed's engine, which shares their state over ranks.

    Checkpoints hold the whole tensors under their names, so they are as portable as those of one rank, and a run
    goes on with any number of ranks.
    """

    stage: int = 1
    """What ranks share (ZeRO): 0 nothing, 1 the states of the optimizer, 2 the gradients as well."""
    offload: bool = False
    """Keep the states of the optimizer in the memory of the host, and step there."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's own configuration, such as `gradient_clipping` or `bf16`."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.stage == 3:
            raise ValueError(
                "deepspeed.stage=3 shares the parameters themselves, which would then be empty to whoever looks at "
                "the module; take stage 2, or the plugin fsdp instead of this one"
            )
        if self.stage not in (0, 1, 2):
            raise ValueError(f"deepspeed.stage={self.stage} must be 0, 1 or 2")
        if self.offload and self.stage == 0:
            raise ValueError("deepspeed.offload=True needs stage 1 or 2: only what is shared can be kept on the host")
        if self.stage == 0 and "bf16" in self.config:
            raise ValueError("deepspeed.config.bf16 needs stage 1 or 2; with stage 0 take torch_autocast")
        for key, instead in OWNED.items():
            node: Any = self.config
            for name in key.split("."):
                node = node.get(name) if isinstance(node, Mapping) else None
            if node is not None:
                raise ValueError(f"deepspeed.config.{key} cannot be given here: {instead}")
        self._engine: Any = None
        self._groups: list[list[str]] = []  # names of the optimizer's parameters, as the module grouped them

    # Setting up -----------------------------------------------------------------------

    @hookimpl
    def shard_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        """Leave the model whole: the engine is given it together with the optimizer, which needs its parameters."""
        model = model.to(trainer.device)
        if trainer.world_size > 1:
            begins = [*model.parameters(), *model.buffers()]  # modules that were built apart may begin apart
            trainer.hook.broadcast(trainer=trainer, tensors=begins)
        return model

    @hookimpl(wrapper=True)
    def setup_optimizers(self, trainer: Trainer) -> Generator[None, Any, Any]:
        optimizers, schedulers = yield
        if trainer.world_size == 1:
            return optimizers, schedulers
        if len(optimizers) != 1:
            raise ValueError(
                f"{type(trainer.module).__name__}.get_optimizers_schedulers returned {len(optimizers)} optimizers; "
                "DeepSpeed's engine steps one"
            )
        names = {id(weight): name for name, weight in trainer.module.named_parameters()}
        self._groups = [[names[id(weight)] for weight in group["params"]] for group in optimizers[0].param_groups]
        self._groups = [group for group in self._groups if group]  # the engine takes empty ones out
        deepspeed = import_deepspeed(trainer.device)
        self._engine, own, _, _ = deepspeed.initialize(
            model=trainer.model, optimizer=optimizers[0], config=self._configuration(trainer), dist_init_required=False
        )
        if own is optimizers[0]:
            self._groups = []  # as torch has it: nothing is shared, nothing is hidden
        else:
            self._refuse_who_looks_at_gradients(trainer)
            optimizers[0].zero_grad = own.zero_grad  # its own gradients are buffers, which stay where they are
        trainer.built.use_model(self._engine)
        return optimizers, schedulers

    def _configuration(self, trainer: Trainer) -> dict[str, Any]:
        """Return DeepSpeed's configuration of this run."""
        zero = {**self.config.get("zero_optimization", {}), "stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # its own default is to clip
            **self.config,
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
            "gradient_accumulation_steps": trainer.window_size,
        }

    def _refuse_who_looks_at_gradients(self, trainer: Trainer) -> None:
        """Refuse who would see no gradient and not know it, and gates: the engine cannot drop what it has summed up.

        Raises:
            ValueError: there is one.
        """
        hooks = trainer.plugins.hook
        lookers = [impl for impl in hooks.on_begin_optimizer_step.get_hookimpls() if "optimizers" in impl.argnames]
        found = {impl.plugin_name for impl in (*lookers, *hooks.should_step.get_hookimpls())} - {"core"}
        if found:
            name = min(found)
            raise ValueError(
                f"deepspeed.stage={self.stage}: the gradients are the engine's, and {name!r}, which looks at them or "
                f"refuses steps, would find none; turn it off (`plugins.{name}: null`). The engine clips "
                "(`plugins.deepspeed.config.gradient_clipping: 1.0`), and leaves out steps whose gradients are not "
                "finite; stage 0 leaves gradients where they are"
            )

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int, size: int) -> Generator[None, Any, Any]:
        if self._engine is not None:
            self._engine.set_gradient_accumulation_boundary(index + 1 == size)
        return (yield)

    @hookimpl(wrapper=True, trylast=True)
    def call_model(self, trainer: Trainer) -> Generator[None, Any, Any]:
        if self._engine is not None and torch.is_autocast_enabled(trainer.device.type):
            raise ValueError(
                "autocast is on around DeepSpeed's engine, which would turn it off without a word: turn off what does "
                "that (`plugins.amp: null`), and let the engine do it: "
                "`plugins.deepspeed.config.torch_autocast: {enabled: true, dtype: bfloat16}`"
            )
        return (yield)

    @hookimpl
    def run_backward(self, trainer: Trainer, loss: torch.Tensor) -> bool:
        if self._engine is None:
            return hookspecs.run_backward(trainer=trainer, loss=loss)
        # The loss is divided by its window's own size already. An output of the engine's forward, as it is, would be
        # divided once more, whatever the engine is told.
        self._engine.backward(loss.view_as(loss), scale_wrt_gas=False)
        return True

    @hookimpl
    def step_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer, closure: Any) -> bool:
        if self._engine is None:
            return hookspecs.step_optimizer(trainer=trainer, optimizer=optimizer, closure=closure)
        if closure is not None:
            raise ValueError(
                f"DeepSpeed's engine cannot step {type(optimizer).__name__} with a closure; take an optimizer without "
                "one, or another plugin than deepspeed"
            )
        self._engine.step()
        return bool(self._engine.was_step_applied())

    # State ----------------------------------------------------------------------------

    @hookimpl(wrapper=True, tryfirst=True)
    def get_run_state(self, trainer: Trainer) -> Generator[None, dict[str, Any], dict[str, Any]]:
        """Put the optimizer's state together on all ranks, and the weights where the model has them in half only."""
        state = yield
        if not self._groups:
            return state
        weights = shared(trainer.module)
        full = {
            name: whole(weight, weight._hp_mapping and weight._hp_mapping.hp_fragment)
            for name, weight in weights.items()
            if weight.dtype != torch.float32 and name in state["module"]
        }
        optimizers = [self._whole(trainer.optimizers[0], weights)]
        return {**state, "module": {**state["module"], **full}, "optimizers": optimizers}

    @hookimpl(wrapper=True)
    def set_run_state(self, trainer: Trainer, state: dict[str, Any], stage: Stage) -> Generator[None, bool, bool]:
        """Give each rank its share of what was stored whole."""
        if stage is not Stage.TRAIN or not self._groups:
            return (yield)
        weights = shared(trainer.module)
        state["optimizers"] = [self._share(trainer.optimizers[0], weights, kept) for kept in state["optimizers"]]
        answer = yield
        for name, weight in weights.items():
            if (here := weight._hp_mapping) is not None:
                full = state["module"].get(name)
                is_full = isinstance(full, torch.Tensor) and full.shape == weight.shape
                here.hp_fragment.data.copy_(piece(full if is_full else weight.data, here.lp_fragment_address))
        return answer

    def _whole(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer over this rank's shares as it would be over whole parameters, by name."""
        state: dict[str, Any] = {}
        groups = []
        for group, names in zip(optimizer.param_groups, self._groups, strict=True):
            (share,) = group["params"]
            for name in names if optimizer.state[share] else ():
                if name in weights:
                    state[name] = {
                        key: whole(weights[name], own_piece(weights[name], value))
                        if isinstance(value, torch.Tensor) and value.shape == share.shape
                        else copy.deepcopy(value)
                        for key, value in optimizer.state[share].items()
                    }
            groups.append({**group, "params": names})
        return {"state": state, "param_groups": groups}

    def _share(
        self, optimizer: torch.optim.Optimizer, weights: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the opposite, by the names that a run's state has for parameters that are not the module's.

        Raises:
            ValueError: it is of other parameters, or in other groups.
        """
        saved = [set(group["params"]) for group in kept["param_groups"]]
        if saved != [set(names) for names in self._groups]:
            raise ValueError(
                f"the saved {type(optimizer).__name__} is over other parameters than this one, or groups them "
                f"otherwise: saved {saved}, here {self._groups}"
            )
        state: dict[str, Any] = {}
        groups = []
        for number, (group, names) in enumerate(zip(optimizer.param_groups, self._groups, strict=True)):
            (share,) = group["params"]
            stored = {name: kept["state"][name] for name in names if name in weights and name in kept["state"]}
            if stored:
                largest = max(
                    stored, key=lambda name: weights[name].ndim
                )  # of one without dimensions nobody could tell
                state[f"parameter {number}"] = here = dict(stored[largest])
                for key, value in here.items():
                    if isinstance(value, torch.Tensor) and value.shape == weights[largest].shape:
                        here[key] = torch.zeros_like(share.data)
                        for name, values in stored.items():
                            put_piece(weights[name], values[key], here[key])
            groups.append({**kept["param_groups"][number], "params": [f"parameter {number}"]})
        return {"state": state, "param_groups": groups}


def import_deepspeed(device: torch.device) -> Any:
    """Return the package deepspeed.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would look for the hardware instead
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"the plugin deepspeed drives the package deepspeed, which cannot be imported ({error}): "
            "`pip install 'deepspeed>=0.19'`"
        ) from error


# What ranks have pieces of -------------------------------------------------------------
# `_hp_mapping` of a parameter, where it has that, says where this rank's piece lies; None where it has none.


def shared(module: torch.nn.Module) -> dict[str, Any]:
    """Return the parameters that the engine shares over ranks, each by all its names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in named if hasattr(weight, "_hp_mapping")}


def piece(tensor: torch.Tensor, address: Any) -> torch.Tensor:
    """Return the numbers of a tensor at an address."""
    return tensor.flatten().narrow(0, address.start, address.numel)


def own_piece(weight: Any, share: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's piece of what belongs to a parameter, out of its share of all."""
    return None if weight._hp_mapping is None else piece(share, weight._hp_mapping.hp_fragment_address)


def put_piece(weight: Any, value: torch.Tensor, share: torch.Tensor) -> None:
    """Put this rank's piece of what belongs to a parameter into its share of all."""
    if weight._hp_mapping is not None:
        piece(share, weight._hp_mapping.hp_fragment_address).copy_(piece(value, weight._hp_mapping.lp_fragment_address))


def whole(weight: Any, own: torch.Tensor | None) -> torch.Tensor:
    """Return what belongs to a parameter put together of the pieces of all ranks, on all of them and on the host."""
    pieces = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
    if own is not None:
        piece(pieces, weight._hp_mapping.lp_fragment_address).copy_(own)
    dist.all_reduce(pieces)
    return pieces.view_as(weight).cpu()
