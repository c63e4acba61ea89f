"""Train low-rank adapters of a model instead of its weights, with peft."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

EXPORTS = ("adapters", "merged")
BITS = {"int8": 1, "nf4": 64 * 256}  # with what the numbers of a weight must be a multiple of: its blocks, and theirs
SAMPLE = 4096  # elements of each weight of the base that tell it from others

Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class Lora(CallbackInterface):
    """Train low-rank adapters of some layers; all other weights are frozen and not in checkpoints.

    The adapted layer answers: layer(x) + alpha / rank * B(A(dropout(x))), where B begins with zeros.
    """

    targets: Any = None
    """Which layers: a list of the ends of their names, a pattern of their whole names, or null for all linear ones."""
    rank: int = 8
    """The rank of the adapters: A maps to so many numbers, and B back from them."""
    alpha: float | None = None
    """The adapters' outputs are multiplied by alpha / rank; null for twice the rank."""
    dropout: float = 0.0
    """The probability with which an input of an adapter is dropped in training."""
    export: str = "adapters"
    """What `export_model` returns: "adapters" alone, or the weights with the adapters "merged" into them."""

    quantize: str | None = None
    """Keep the frozen weights of linear layers in fewer bits, with torchao: "int8" or "nf4" (QLoRA); null leaves
    them as they are."""

    def __post_init__(self) -> None:
        if self.quantize is not None and self.quantize not in BITS:
            raise ValueError(f"lora.quantize={self.quantize!r} must be one of {', '.join(BITS)}, or null")
        if self.quantize is None:
            self.shard_model = None  # type: ignore[assignment,method-assign]  # hides it: any model may be shared
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0, or null for twice the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be from 0 to below 1")
        if self.export not in EXPORTS:
            raise ValueError(f"lora.export={self.export!r} must be one of {', '.join(EXPORTS)}")
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets is empty: name layers, or write null for all linear ones")
        self._base = ""
        """Tells the weights of the base from others; "" before the model is converted."""

    @hookimpl(wrapper=True, trylast=True)
    def convert_model(self, trainer: Trainer, model: torch.nn.Module) -> Generator[None, Any, Any]:
        model = yield
        peft = import_peft()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("lora: the model has no values yet (meta device), and adapters are of a model that has")
        self._base = fingerprint(model) + (f" {self.quantize}" if self.quantize else "")
        targets = linear_layers(model) if self.targets is None else self.targets
        config = peft.LoraConfig(
            target_modules=targets if isinstance(targets, str) else list(targets),
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
        )
        with kept_rng():  # the same adapters on all ranks, and the same random numbers of training as without
            torch.manual_seed(trainer.options.seed)
            try:
                peft.inject_adapter_in_model(config, model)
            except ValueError as error:
                raise ValueError(f"lora.targets={self.targets!r}: {error}") from error
        if self.quantize is not None:
            self._quantize(trainer, model)
        model.register_load_state_dict_pre_hook(keep_base)  # type: ignore[no-untyped-call]
        return model

    def _quantize(self, trainer: Trainer, model: torch.nn.Module) -> None:
        """Put fewer bits in the place of the frozen weights of linear layers, and say which are left."""
        frozen_layers = {
            name.replace(".base_layer", ""): layer
            for name, layer in model.named_modules()
            if type(layer) is torch.nn.Linear and not layer.weight.requires_grad
        }
        left = [name for name, layer in frozen_layers.items() if layer.weight.numel() % BITS[self.quantize or ""]]
        if left and trainer.rank == 0:
            trainer.say_once(
                f"lora.quantize={self.quantize} leaves {', '.join(left)} as they are: they have no multiple of "
                f"{BITS[self.quantize or '']} numbers"
            )
        quantized = import_quantization(str(self.quantize))
        for layer in (layer for name, layer in frozen_layers.items() if name not in left):
            layer.weight = torch.nn.Parameter(quantized(layer.weight.detach()), requires_grad=False)

    @hookimpl(wrapper=True)
    def shard_model(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Refuse to share out weights of few bits.

        Raises:
            ValueError: ranks are to share them.
        """
        said = f"lora.quantize={self.quantize}: ranks cannot share weights of few bits; take ddp"
        try:
            model = yield
        except (AssertionError, NotImplementedError) as error:  # of torchao's, for what it cannot take apart
            raise ValueError(said) from error
        if any(hasattr(weight, "device_mesh") for weight in model.parameters()):
            raise ValueError(said)
        return model

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Refuse what could not be exported at the end.

        Raises:
            ValueError: the weights are in shards and are to be merged.
        """
        if self.export == "merged" and any(hasattr(p, "device_mesh") for p in trainer.module.parameters()):
            raise ValueError(
                "lora.export=merged needs whole weights, and ranks share those of this model; set lora.export=adapters"
            )

    @hookimpl(wrapper=True)
    def get_run_state(self, trainer: Trainer) -> Generator[None, dict[str, Any], dict[str, Any]]:
        """Leave the weights of the base out of the state: they are where the module has them from."""
        state = yield
        base = frozen(trainer.module)
        return {**state, "module": {name: kept for name, kept in state["module"].items() if name not in base}}

    @hookimpl(wrapper=True, trylast=True)
    def export_model(self, trainer: Trainer) -> Generator[None, Tensors, Tensors]:
        """Return the adapters as peft names them, with the buffers of the model; or the merged model."""
        state = yield
        if self.export == "merged":
            return merged(trainer.module, state)
        buffers = {name: state[name] for name, _ in trainer.module.named_buffers() if name in state}
        adapters: Tensors = import_peft().get_peft_model_state_dict(trainer.module, state_dict=state)
        return adapters | {name.replace(".base_layer.", "."): buffer for name, buffer in buffers.items()}

    def get_state(self) -> dict[str, Any]:
        """Return what tells the weights of the base from others."""
        return {"base": self._base}

    def update_state(self, state: dict[str, Any]) -> None:
        """Compare the base with that of the checkpoint.

        Raises:
            ValueError: it is another one.
        """
        if self._base and state["base"] != self._base:
            raise ValueError(
                "lora: the adapters of this checkpoint were trained on other weights than the module has now; build "
                "the module with the weights that it had (the same seed, or the same pretrained files)"
            )


def import_peft() -> Any:
    """Import peft, which takes seconds."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"lora: peft cannot be imported ({error}): pip install 'peft>=0.21,<0.22'") from error
    return peft


def import_quantization(bits: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes a weight of few bits; without what torchao logs of kernels of other devices."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ValueError(
            f"lora.quantize={bits}: torchao cannot be imported ({error}): pip install 'torchao>=0.18,<0.19'"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if bits == "nf4":
        return lambda weight: torchao.NF4Tensor.from_tensor(weight, 64, 256)
    return lambda weight: torchao.Int8Tensor.from_hp(weight, granularity=torchao.PerRow())


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Return the names of all linear layers."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    if not names:
        raise ValueError("lora.targets=null means all linear layers, and the model has none: name others in targets")
    return names


def frozen(module: torch.nn.Module) -> set[str]:
    """Return the names of parameters that are not trained."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def keep_base(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Have a state that is loaded into a module lack no frozen weight."""
    own = dict(module.named_parameters())
    for name in frozen(module):
        state_dict.setdefault(prefix + name, own[name].detach())


@torch.no_grad()
def merged(module: torch.nn.Module, state: Tensors) -> Tensors:
    """Return a state with the names of the model that was given, and its adapters in its weights."""
    plain = {n.replace(".base_layer.", "."): tensor for n, tensor in state.items() if ".lora_" not in n}
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            weight = state[f"{name}.base_layer.weight"]
            if type(weight) is not torch.Tensor:  # in fewer bits
                given = layer.get_base_layer().weight
                weight = given.dequantize() if hasattr(given, "qdata") else given.get_original_weight()
            plain[f"{name}.weight"] = weight + layer.get_delta_weight("default").to(weight)
    return plain


def fingerprint(model: torch.nn.Module) -> str:
    """Return a number that tells the weights of a model from others by some elements of each."""
    told = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:SAMPLE].cpu().contiguous()
        told.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        told.update(some.view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
