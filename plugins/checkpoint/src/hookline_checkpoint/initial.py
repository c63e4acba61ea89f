"""Weights that a run begins with: those of a folder in Hugging Face's format, of which each rank reads its share."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from hookline_checkpoint import hf
from hookline_checkpoint.sharded import Region, regions_of, take_rows
from hookline_checkpoint.stored import Stored, of_folder
from hookline_checkpoint.tensors import is_shared

if TYPE_CHECKING:
    from hookline import Trainer

SHOWN = 3  # names in a message

log = logging.getLogger("hookline.checkpoint")


class Plan(NamedTuple):
    """What is read into a module, and what is wrong with it."""

    made_of: Mapping[str, hf.Origin]
    """By the names of the module's tensors."""
    refused: list[str]
    """What cannot be loaded."""
    objections: list[str]
    """What is refused unless told otherwise."""
    notes: list[str]


def begin_with(trainer: Trainer, source: str, strict: bool) -> None:
    """Give the module the weights of a folder, on all ranks.

    Args:
        trainer: its model stands, and its optimizers do not.
        source: a folder, or a safetensors file.
        strict: refuse a folder that lacks tensors or has others, instead of warning of it.

    Raises:
        ValueError: they cannot be read, or are not those of the module.
    """
    said, own = "", own_tensors(trainer.module)
    try:
        plan, stored = _checked(trainer, own, source, strict)
        if type(torch.empty(0)) is torch.Tensor:  # else a step is simulated, and nothing has values
            _load(own, plan, stored)
    except (OSError, ValueError) as error:
        said = str(error)
    told = dict.fromkeys(trainer.hook.all_gather(trainer=trainer, value=said))
    if errors := [one for one in told if one]:
        raise ValueError(f"checkpoint.initial={source!r}: {'; '.join(errors)}")
    log.info("begins with the weights of %s", source)


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's state themselves, by name."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _checked(trainer: Trainer, own: Mapping[str, torch.Tensor], source: str, strict: bool) -> tuple[Plan, Stored]:
    stored = of_folder(Path(source).expanduser())
    said = hf.described(trainer.module)
    rules = hf.rules_of(said) if said is not None else [hf.SAME]
    plan = _plan(own, stored, rules)
    refused = [*plan.refused, *(plan.objections if strict else ())]
    if refused:
        cure = "; checkpoint.initial_strict=false warns of that and goes on" if not plan.refused else ""
        raise ValueError("; ".join(refused) + cure)
    if trainer.rank == 0:
        for note in (*plan.objections, *plan.notes):
            log.warning("checkpoint.initial=%r: %s", source, note)
    return plan, stored


def _plan(own: Mapping[str, torch.Tensor], stored: Stored, rules: list[hf.Rule]) -> Plan:
    origins = hf.names_here(rules, own)
    loaded = {
        name: origin
        for name, origin in origins.items()
        if origin.names and all(there in stored.forms for there in origin.names)
    }
    given = {id(own[name]) for name in loaded}
    missing = [
        there
        for name, origin in origins.items()
        for there in origin.names
        if there not in stored.forms and id(own[name]) not in given  # one that is tied to another needs no own
    ]
    used = {there for origin in origins.values() for there in origin.names}
    others = [name for name in stored.forms if name not in used]
    objections = []
    if missing:
        near = "".join(f" (near {missing[0]}: {one})" for one in difflib.get_close_matches(missing[0], others, n=1))
        objections.append(f"it lacks {_some(missing)} of the module{near}")
    if others:
        objections.append(f"it has {_some(others)}, which the module does not have")
    refused, notes = [], []
    rounded = []
    for name, origin in loaded.items():
        form, tensor = _form(name, origin, own, stored), own[name]
        if form.shape != tensor.shape:
            refused.append(f"{origin.names[0]} is {list(form.shape)} and {name} of the module {list(tensor.shape)}")
        elif form.dtype.is_floating_point != tensor.dtype.is_floating_point:
            refused.append(f"{origin.names[0]} is {form.dtype} and {name} of the module {tensor.dtype}")
        elif torch.promote_types(form.dtype, tensor.dtype) != tensor.dtype:
            rounded.append(f"{name} ({form.dtype} to {tensor.dtype})".replace("torch.", ""))
    if rounded:
        notes.append(f"rounded: {_some(rounded)}")
    return Plan(loaded, refused, objections, notes)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _form(name: str, origin: hf.Origin, own: Mapping[str, torch.Tensor], stored: Stored) -> torch.Tensor:
    """Return a tensor without values of the form that a tensor of the module is given."""

    def formed(there: str) -> torch.Tensor:
        return torch.empty(stored.forms[there].shape, dtype=stored.forms[there].dtype, device="meta")

    return _made(name, origin, own, formed)


def _made(name: str, origin: hf.Origin, own: Mapping[str, torch.Tensor], get: hf.Get) -> torch.Tensor:
    rule = origin.rule
    try:
        sizes = [own[other].shape[rule.dim] for other in hf.own_names(origin, name)] if len(rule.own) > 1 else []
        return rule.here(origin.names, origin.place, get, sizes)
    except (RuntimeError, IndexError, KeyError) as error:
        raise ValueError(f"{hf.METHOD}() does not fit {', '.join(origin.names)}, of which {name} is to be made: {error}"
                         ) from error  # fmt: skip


@torch.no_grad()
def _load(own: Mapping[str, torch.Tensor], plan: Plan, stored: Stored) -> None:
    """Read each tensor, one at a time; of what ranks share and that is stored as it is, this rank's part alone."""
    shared = {name: own[name].detach() for name in plan.made_of if is_shared(own[name])}
    regions = regions_of(shared)
    for name, origin in plan.made_of.items():
        whole = [Region([0] * own[name].dim(), own[name].detach())]
        places = regions[name] if name in shared else whole
        if origin.rule.is_plain:
            for begins, target in places:
                stored.fill(origin.names[0], begins, target)
        else:
            take_rows(_made(name, origin, own, stored.read), 0, places)
