"""The model of LERNOMATIC: a network, and what is needed to make it once more."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

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
    """A network with its origin. A plain object: subclasses set its attributes in `__init__`, which calls no other.

    With more than one network, put them into one `torch.nn.Module`, or give the trainer several models.
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

    def forward(self, X: Any) -> Any:
        """Return what the network makes of a batch."""
        return self.net(X)

    def get_model_args(self) -> dict[str, Any] | None:
        """Return the arguments of the network's class, where it takes some."""
        return None

    # The network ----------------------------------------------------------------------

    def get_net(self) -> torch.nn.Module:
        """Return the network."""
        return self.net

    def get_model_parameters(self) -> Any:
        """Return the parameters of the network, for an optimizer."""
        return self.net.parameters()

    def get_net_state_dict(self) -> dict[str, Any]:
        """Return the weights."""
        return self.net.state_dict()

    def set_net_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load weights."""
        self.net.load_state_dict(state)

    def set_train(self) -> None:
        """Have the network train."""
        self.net.train()

    def set_eval(self) -> None:
        """Have the network infer."""
        self.net.eval()

    def send_to(self, device: torch.device | str) -> None:
        """Bring the network to a device."""
        self.net.to(device)

    def zero_grad(self) -> None:
        """Clear gradients."""
        self.net.zero_grad()

    def freeze(self) -> None:
        """Train no parameter."""
        self.net.requires_grad_(False)

    def unfreeze(self) -> None:
        """Train every parameter."""
        self.net.requires_grad_(True)

    def freeze_to(self, number: int) -> None:
        """Train none of the first `number` parameters."""
        for parameter in list(self.net.parameters())[:number]:
            parameter.requires_grad_(False)

    def unfreeze_to(self, number: int) -> None:
        """Train the first `number` parameters."""
        for parameter in list(self.net.parameters())[:number]:
            parameter.requires_grad_(True)

    # What a checkpoint holds ----------------------------------------------------------

    def get_params(self) -> dict[str, Any]:
        """Return weights, names and import paths: what a model can be made of without its class at hand."""
        params = {
            "model_state_dict": self.get_net_state_dict(),
            "model_name": self.model_name,
            "model_import_path": self.import_path,
            "module_name": self.module_name,
            "module_import_path": self.module_import_path,
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
        self.net = find_class(self.module_import_path, self.module_name)(**params.get("model_args", {}))
        self.set_net_state_dict(params["model_state_dict"])


def model_from(params: Mapping[str, Any]) -> LernomaticModel:
    """Return the model that the parameters of a checkpoint name.

    Its class is made without its `__init__`, which need not know what it was called with.

    Raises:
        ValueError: a class may not be imported, or is not there.
    """
    kind = find_class(params["model_import_path"], params["model_name"])
    model: LernomaticModel = kind.__new__(kind)
    model.set_params(params)
    return model
