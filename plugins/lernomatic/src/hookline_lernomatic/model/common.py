"""The model of LERNOMATIC: a network, and what is needed to make it once more."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_allowed = {"hookline_lernomatic"}


def allow_import(package: str) -> None:
    """Let checkpoints name classes of a package or a module: importing it runs its code.

    Args:
        package: by its dotted path; what lies below it is allowed too.
    """
    _allowed.add(package)


def find_class(path: str, name: str) -> Any:
    """Return a class that a checkpoint names.

    Args:
        path: of its module, with or without `.py`.
        name: of the class.

    Raises:
        ValueError: the module is not allowed, cannot be imported or has no such class.
    """
    module = path.removesuffix(".py")
    if not any(module == package or module.startswith(f"{package}.") for package in _allowed):
        raise ValueError(
            f"a checkpoint names {module}.{name}, and importing it would run its code: if it is yours, call "
            f"hookline_lernomatic.allow_import({module.partition('.')[0]!r}) first"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"a checkpoint names {module}.{name}, which is not there: {error}") from error
    return found


class LernomaticModel:
    """A network with its origin. A plain object: subclasses set its attributes in `__init__`, which need call no other.

    With more than one network, put them into one `torch.nn.Module`; or give the trainer several models; or keep them as
    attributes of one model and override what is about `net`: `get_model_parameters`, `get_net_state_dict`,
    `set_net_state_dict`, `set_train`, `set_eval`, `send_to`, `forward`.
    """

    net: torch.nn.Module
    import_path: str
    """Of the module that this class is in, with or without `.py`."""
    model_name: str
    """Of this class."""
    module_import_path: str
    """Of the module that the network's class is in."""
    module_name: str
    """Of the network's class."""

    def __init__(self, **kwargs: Any) -> None:
        if kwargs:
            warnings.warn(f"LernomaticModel takes no arguments; {', '.join(kwargs)} has no effect", stacklevel=3)

    def __repr__(self) -> str:
        return type(self).__name__

    def forward(self, X: Any) -> Any:
        """Return what the network makes of a batch."""
        return self.get_net()(X)

    def get_model_args(self) -> dict[str, Any] | None:
        """Return the arguments of the network's class, where it takes some."""
        return None

    # The network ----------------------------------------------------------------------

    def get_net(self) -> torch.nn.Module:
        """Return the network.

        Raises:
            ValueError: there is none at `net`.
        """
        if vars(self).get("net") is None and not hasattr(type(self), "net"):
            there = ", ".join(name for name in networks(self)) or "none"
            raise ValueError(
                f"{type(self).__name__} has no network at `net` (networks: {there}): set it in __init__; or, with "
                "several networks, override what is about the one: get_model_parameters, get_net_state_dict, "
                "set_net_state_dict, forward"
            )
        return self.net

    def get_model_parameters(self) -> Any:
        """Return the parameters of the network, for an optimizer."""
        return self.get_net().parameters()

    def get_num_layers(self) -> int:
        """Return how many parameters there are."""
        return len(self._parameters())

    def get_net_state_dict(self) -> dict[str, Any]:
        """Return the weights."""
        return self.get_net().state_dict()

    def set_net_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Load weights."""
        self.get_net().load_state_dict(sd)

    def set_train(self) -> None:
        """Have the network train."""
        for net in networks(self).values():
            net.train()

    def set_eval(self) -> None:
        """Have the network infer."""
        for net in networks(self).values():
            net.eval()

    def send_to(self, device: torch.device | str) -> None:
        """Bring the network to a device."""
        for net in networks(self).values():
            net.to(device)

    def zero_grad(self) -> None:
        """Clear gradients."""
        for net in networks(self).values():
            net.zero_grad()

    def freeze(self) -> None:
        """Train no parameter."""
        self.freeze_to(self.get_num_layers())

    def freeze_all(self) -> None:
        """Train no parameter."""
        self.freeze()

    def unfreeze(self) -> None:
        """Train every parameter."""
        self.unfreeze_to(self.get_num_layers())

    def freeze_to(self, N: int) -> None:
        """Train none of the first `N` parameters."""
        for parameter in self._parameters()[:N]:
            parameter.requires_grad_(False)

    def unfreeze_to(self, N: int) -> None:
        """Train the first `N` parameters."""
        for parameter in self._parameters()[:N]:
            parameter.requires_grad_(True)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for net in networks(self).values() for parameter in net.parameters()]

    # What a checkpoint holds ----------------------------------------------------------

    def get_model_name(self) -> str:
        """Return the name of this class."""
        return self.model_name

    def get_model_path(self) -> str:
        """Return the import path of this class."""
        return self.import_path

    def get_module_name(self) -> str:
        """Return the name of the network's class."""
        return self.module_name

    def get_module_import_path(self) -> str:
        """Return the import path of the network's class."""
        return self.module_import_path

    def get_params(self) -> dict[str, Any]:
        """Return weights, names and import paths: what a model can be made of without its class at hand."""
        params = {
            "model_state_dict": self.get_net_state_dict(),
            "model_name": self.get_model_name(),
            "model_import_path": self.get_model_path(),
            "module_name": self.get_module_name(),
            "module_import_path": self.get_module_import_path(),
        }
        if (arguments := self.get_model_args()) is not None:
            params["model_args"] = arguments
        return params

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Make the network that the parameters name, with their weights.

        Raises:
            ValueError: its class may not be imported, or is not there.
        """
        self.import_path, self.model_name = params["model_import_path"], params["model_name"]
        self.module_import_path, self.module_name = params["module_import_path"], params["module_name"]
        if networks(self).keys() <= {"net"}:
            self.net = find_class(self.module_import_path, self.module_name)(**params.get("model_args", {}))
        self.set_net_state_dict(params["model_state_dict"])

    def load_checkpoint(self, fname: str | Path, model_key: str = "model") -> None:
        """Make the network that a trainer's file holds, with its weights.

        Raises:
            ValueError: its class may not be imported, or is not there.
        """
        self.set_params(torch.load(fname, map_location="cpu", weights_only=True)[model_key])


def networks(model: LernomaticModel) -> dict[str, torch.nn.Module]:
    """Return the networks of a model by the names of their attributes; most have one, `net`.

    Those in a list or a dictionary have the number or the key behind the attribute's name. A part of another network,
    which has an attribute of its own, is not among them.
    """
    found = {
        name if key is None else f"{name}_{key}": value
        for name, held in vars(model).items()
        for key, value in _items(held)
        if isinstance(value, torch.nn.Module)
    }
    if not found and hasattr(type(model), "net"):
        return {"net": model.net}
    parts = {id(part) for net in found.values() for part in net.modules() if part is not net}
    return {name: net for name, net in found.items() if id(net) not in parts}


def put_networks(model: LernomaticModel, nets: Mapping[str, torch.nn.Module]) -> None:
    """Give a model other networks, by the names that `networks` gives them."""
    for name, held in vars(model).items():
        for key, _ in list(_items(held)):
            net = nets.get(name if key is None else f"{name}_{key}")
            if net is not None and key is None:
                setattr(model, name, net)
            elif net is not None:
                held[key] = net


def _items(held: Any) -> Iterable[tuple[Any, Any]]:
    """Return what an attribute holds, with its places in a list or a dictionary; None for the attribute itself."""
    if isinstance(held, list):
        return enumerate(held)
    return held.items() if isinstance(held, dict) else [(None, held)]


def networks_of(models: Mapping[str, LernomaticModel]) -> list[tuple[str, str, int]]:
    """Return which networks several models have, to be compared with those of another moment."""
    return [(name, part, id(net)) for name, model in models.items() for part, net in networks(model).items()]


def load_into(model: LernomaticModel, params: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint into a model that there is, by what its class overrides."""
    kind = type(model)
    if kind.set_net_state_dict is LernomaticModel.set_net_state_dict and (
        kind.set_params is not LernomaticModel.set_params
    ):
        model.set_params(params)
    else:
        model.set_net_state_dict(params["model_state_dict"])


def model_from(params: Mapping[str, Any]) -> LernomaticModel:
    """Return the model that the parameters of a checkpoint name.

    Its class is made without arguments, as LERNOMATIC does; where it needs some, without its `__init__`.

    Raises:
        ValueError: a class may not be imported, or is not there.
    """
    kind = find_class(params["model_import_path"], params["model_name"])
    if any(
        one.default is one.empty and one.kind not in VARIADIC for one in inspect.signature(kind).parameters.values()
    ):
        model: LernomaticModel = kind.__new__(kind)
    else:
        model = kind()
    model.set_params(params)
    return model
