"""Any model of transformers as a module, and what its `from_pretrained` reads at the end."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from hookline import CallbackInterface, ModuleInterface, Stage, hookimpl, nearest

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.hf")

Step = tuple[torch.Tensor, ...]


# The model ----------------------------------------------------------------------------


def make_model(model: Any, auto: str) -> torch.nn.Module:
    """Return a model of transformers: built from a configuration, loaded from a folder, or the one that was given.

    Args:
        model: a mapping with `model_type` and the arguments of that type's configuration, or with `config`, a folder
            that has one, and what is to be another, for weights drawn anew; a folder of `save_pretrained`, or a name
            on the hub; or a `PreTrainedModel`.
        auto: the class that chooses the model's head by its configuration, such as "AutoModelForCausalLM".

    Raises:
        ValueError: there is no such class, type of model or folder.
    """
    if isinstance(model, torch.nn.Module):
        return model
    transformers = importlib.import_module("transformers")
    heads = sorted(name for name in dir(transformers) if name.startswith("AutoModel"))
    if auto not in heads:
        raise ValueError(f"auto={auto!r} is no class of transformers{nearest(auto, heads)}; it has {', '.join(heads)}")
    head: Any = getattr(transformers, auto)
    if isinstance(model, Mapping):
        options = dict(model)
        folder = options.pop("config", None)
        if folder is not None:
            from_folder: torch.nn.Module = head.from_config(transformers.AutoConfig.from_pretrained(folder, **options))
            return from_folder
        kind = options.pop("model_type", None)
        kinds = list(transformers.CONFIG_MAPPING)
        if kind not in kinds:
            raise ValueError(
                f"model.model_type={kind!r} is no type of model of transformers{nearest(str(kind), kinds)}; give one, "
                "such as gpt2 or bert, with the arguments of its configuration, or the folder of a model"
            )
        built: torch.nn.Module = head.from_config(transformers.AutoConfig.for_model(kind, **options))
        return built
    given = os.fspath(model)
    if (given.startswith((".", "~")) or os.path.isabs(given)) and not Path(given).expanduser().is_dir():
        raise ValueError(f"model={given!r} is no folder; `save_pretrained` writes one that can be loaded")
    if torch.empty(0).is_meta:
        raise ValueError(
            f"model={given!r} is loaded whole, and this module is made without memory for its weights: give "
            f"model={{config: {given}}}, and plugins.checkpoint.initial={given}, of which each rank reads its share"
        )
    loaded: torch.nn.Module = head.from_pretrained(Path(given).expanduser() if Path(given).exists() else given)
    return loaded


def give_resets(model: Any) -> None:
    """Give each module of a model that has no values yet the method by which it is given first ones."""
    for module in model.modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.reset_parameters = functools.partial(model._init_weights, module)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: all that decays, and biases and the parameters of norms, which do not."""
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# The module ---------------------------------------------------------------------------


class HfModule(ModuleInterface):
    """A model of transformers with its data: the loss is the model's own.

    Args:
        model: what `make_model` takes.
        auto: the class that chooses the model's head.
        train_data: of mappings of features, such as `input_ids` and `labels`, by index; so are the others.
        val_data: data of the validation.
        test_data: data of the test.
        predict_data: data of predictions.
        tokenizer: a tokenizer, or the folder or the name to load one from; pads, and is kept with the model.
        collate: makes a batch of a list of samples, as the data collators of transformers do. Unless given, it pads by
            the tokenizer; without one all samples are of one length.
        lr: the highest learning rate.
        weight_decay: of AdamW, for all but biases and the parameters of norms.
        scheduler: a name that `transformers.get_scheduler` knows, such as "linear", "cosine" or "constant".
        warmup_ratio: the part of all steps in which the learning rate rises from 0.
        generate: arguments of the model's `generate`, by which it predicts; unless given, it predicts the logits.
        num_workers: processes that load.

    Raises:
        ValueError: what cannot be built.
    """

    def __init__(
        self,
        model: Any,
        auto: str = "AutoModelForCausalLM",
        train_data: Any = None,
        val_data: Any = None,
        test_data: Any = None,
        predict_data: Any = None,
        tokenizer: Any = None,
        collate: Callable[[list[Any]], Any] | None = None,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        scheduler: str = "linear",
        warmup_ratio: float = 0.0,
        generate: Mapping[str, Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={warmup_ratio} is a part of all steps, from 0 to 1")
        schedulers = [kind.value for kind in transformers.SchedulerType]
        if scheduler not in schedulers:
            raise ValueError(
                f"scheduler={scheduler!r} is none of transformers{nearest(scheduler, schedulers)}; "
                f"it has {', '.join(schedulers)}"
            )
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
        if collate is None and tokenizer is not None:
            collate = transformers.DataCollatorWithPadding(tokenizer)
        self.model = make_model(model, auto)
        self._names = list(self.model.state_dict())  # before plugins change it
        if any(parameter.is_meta for parameter in self.model.parameters()):
            give_resets(self.model)
        self.data = {"train": train_data, "val": val_data, "test": test_data, "predict": predict_data}
        self.tokenizer = tokenizer
        self.collate = collate or transformers.default_data_collator
        self.lr, self.weight_decay = lr, weight_decay
        self.scheduler, self.warmup_ratio = scheduler, warmup_ratio
        self.generate = None if generate is None else dict(generate)
        self.num_workers = num_workers

    # Modes ----------------------------------------------------------------------------

    @hookimpl
    def on_begin_run(self, stage: Stage) -> None:
        if stage is Stage.TRAIN:
            self.train()

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self) -> Generator[None, bool, bool]:
        self.train()  # `from_pretrained` gives a model in eval mode, and the Trainer of transformers does so, too
        return (yield)

    # Steps ----------------------------------------------------------------------------

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return the model's loss."""
        return self._answer(batch).loss  # type: ignore[no-any-return]

    def val_step(self, global_step: int, batch: Any, device: Any) -> Step:
        """Return the model's loss, its logits and the labels."""
        answer = self._answer(batch)
        return answer.loss, answer.logits, batch["labels"]

    test_step = val_step

    def predict_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return what the model generates from a batch, or its logits."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.generate is None:
            return self.model(**inputs).logits  # type: ignore[no-any-return]
        model: Any = self.model
        return model.generate(**inputs, **self.generate)  # type: ignore[no-any-return]

    def _answer(self, batch: Any) -> Any:
        answer = self.model(**batch)
        if getattr(answer, "loss", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} gave no loss for a batch of {', '.join(batch)}: it needs `labels`; "
                "have the data hold them, or a collator make them (transformers.DataCollatorForLanguageModeling)"
            )
        return answer

    # Data -----------------------------------------------------------------------------

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        """Return the training loader."""
        if self.data["train"] is None:
            raise ValueError("train_data is not given, so there is nothing to train on")
        return self._loader("train", sampler, batch_size)

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the validation loader, or None."""
        return self._loader("val", sampler, batch_size)

    def get_test_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the test loader, or None."""
        return self._loader("test", sampler, batch_size)

    def get_predict_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the loader of what shall be predicted, or None."""
        return self._loader("predict", sampler, batch_size)

    def _loader(self, stage: str, sampler: type, batch_size: int) -> Any:
        data = self.data[stage]
        if data is None:
            return None
        return DataLoader(
            data, batch_size, sampler=sampler(data), collate_fn=self.collate, num_workers=self.num_workers
        )

    # Weights --------------------------------------------------------------------------

    def get_hf_format(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, to be exported for `from_pretrained`: configuration, names, other files."""
        model: Any = self.model
        config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
        files: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="hookline-") as folder:
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    files[path.name] = path.read_bytes()
        return {"config": config, "names": {f"model.{name}": name for name in self._names}, "files": files}

    # Optimizers -----------------------------------------------------------------------

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int | None, epochs: int
    ) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Return AdamW, without decay of biases and norms, and the schedule over all steps of the run."""
        transformers = importlib.import_module("transformers")
        optimizer = torch.optim.AdamW(decay_groups(self.model, self.weight_decay), self.lr)
        steps = self.trainer.totals.steps
        if steps is None and (self.warmup_ratio or self.scheduler != "constant"):
            raise ValueError(
                f"scheduler={self.scheduler!r} needs to know how many steps there will be, and nobody knows: the "
                "loader has no length, or the time alone ends the run. Set trainer.max_steps, or "
                'scheduler="constant" without warmup_ratio'
            )
        warmup = round(self.warmup_ratio * (steps or 0))
        scheduler = transformers.get_scheduler(self.scheduler, optimizer, warmup, steps)
        return [optimizer], [scheduler]

    def get_blocks(self) -> list[torch.nn.Module]:
        """Return the blocks that transformers says are not to be split."""
        names = getattr(self.model, "_no_split_modules", None) or ()  # transformers says it there alone
        return [module for module in self.model.modules() if type(module).__name__ in names]


# The plugin ---------------------------------------------------------------------------


@dataclass(eq=False)
class Hf(CallbackInterface):
    """Keep at the end of training what `from_pretrained` reads: exported weights, configuration, tokenizer."""

    folder: str = "pretrained"
    """In the run's folder."""

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        module: Any = trainer.module
        self._names = set(module.model.state_dict()) if keeps(module) else set()  # before plugins change it
        if not keeps(module):
            log.warning(
                "hf has nothing to keep: a %s has no `model` of transformers, as a hookline_hf.HfModule has",
                type(trainer.module).__name__,
            )

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        module: Any = trainer.module
        if not keeps(module):
            return
        weights = trainer.export_model()  # all ranks may have to give their share
        kept = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
        if lacking := sorted(self._names - kept.keys()):
            log.warning(
                "hf keeps nothing: what is exported lacks %s (%d in all), and from_pretrained would draw them at "
                "random; with lora set lora.export=merged", lacking[0], len(lacking),
            )  # fmt: skip
        elif trainer.rank == 0:
            module.model.save_pretrained(trainer.run_dir / self.folder, state_dict=kept)
            if (tokenizer := getattr(module, "tokenizer", None)) is not None:
                tokenizer.save_pretrained(trainer.run_dir / self.folder)


def keeps(module: Any) -> bool:
    """Tell whether a module has a model of transformers."""
    return hasattr(getattr(module, "model", None), "save_pretrained")
