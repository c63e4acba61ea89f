"""The command `hookline from-lightning`: a configuration of LightningCLI as one of hookline."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from hookline import config, instantiate, nearest
from hookline.commands import mendable, new_parser
from hookline_lightning.cli.written import class_of, is_node, resolved, target
from hookline_lightning.logs.run_logger import RunLogger
from hookline_lightning.run import intervals, portions
from hookline_lightning.run.bridge import overridden
from hookline_lightning.trainer import Trainer

EXAMPLES = """\
examples:
  hookline from-lightning config.yaml > run.yaml; hookline fit run.yaml
  hookline from-lightning config.yaml --model my_package.Classifier --data my_package.Data > run.yaml
"""
SUBCOMMANDS = ("fit", "validate", "test", "predict")
KEYS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path")
PARTS = ("model", "data", "optimizer", "lr_scheduler")
SHORT = {  # where short names of classes may be
    "callbacks": ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks"),
    "logger": ("lightning.pytorch.loggers", "pytorch_lightning.loggers"),
    "optimizer": ("torch.optim",),
    "lr_scheduler": ("torch.optim.lr_scheduler",),
}
PLATEAUS = ("lightning.pytorch.cli.ReduceLROnPlateau", "pytorch_lightning.cli.ReduceLROnPlateau", "ReduceLROnPlateau")


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return 0.

    Raises:
        ValueError: a file, a key or a value that cannot be translated.
    """
    parser = new_parser("hookline from-lightning", "Translate a configuration of LightningCLI.", EXAMPLES)
    parser.add_argument("config", help="a YAML file that LightningCLI takes or has saved")
    for name in PARTS:
        help = f"the class of {name}, where the file has only its arguments"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="CLASS", help=help)
    options = parser.parse_args(words)
    with mendable(ValueError, TypeError):
        tree = translated(read(options.config), {name: one for name, one in vars(options).items() if name != "config"})
    print(f"# {options.config}, translated by `hookline from-lightning`\n{config.to_yaml(tree)}", end="")
    return 0


def read(file: str) -> dict[str, Any]:
    """Return what a file says of a run.

    Raises:
        ValueError: it is no file of LightningCLI's.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # of YAML, of interpolations, of the disk
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is no configuration of LightningCLI: it must be a mapping with {', '.join(KEYS)}")
    named = [name for name in SUBCOMMANDS if tree.get(name) is not None]
    if named:
        inner = tree[named[0]]
        if len(named) > 1:
            print(f"hookline: the file has {', '.join(named)}; {named[0]} is translated", file=sys.stderr)
        tree = {**{key: value for key, value in tree.items() if key not in (*SUBCOMMANDS, "subcommand")}, **inner}
    return {str(key): value for key, value in tree.items()}


def translated(tree: Mapping[str, Any], classes: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a configuration of hookline.

    Args:
        tree: what LightningCLI's file says.
        classes: paths of classes of which the file has only the arguments.

    Raises:
        ValueError: a key or a value that cannot be translated.
    """
    for key, value in tree.items():
        if key not in KEYS and value is not None:
            raise ValueError(
                f"{key}: this key is none of LightningCLI's own{nearest(key, KEYS)}; it has {', '.join(KEYS)}. "
                "Callbacks with a key of their own go into trainer.callbacks, and linked arguments into init_args"
            )
    nodes = {key: _node(key, tree.get(key), classes.get(key)) for key in PARTS}
    if nodes["model"] is None:
        raise ValueError("model: there is none; say its class, --model package.module.Name")
    trainer, callbacks = _trainer(tree)
    plugins: dict[str, Any] = {"lightning": {}, **trainer.plugins}
    if "limits" in plugins and "limits" not in ((tree.get("trainer") or {}).get("plugins") or {}):
        plugins |= _limits(plugins.pop("limits"))
    for name, value in (
        ("datamodule", target(nodes["data"])), ("callbacks", callbacks),
    ):  # fmt: skip
        if value:
            plugins["lightning"][name] = value
    interval, epochs = trainer.intervals
    if not isinstance(interval, str) and not intervals.is_whole(interval):  # else `evaluate_every` says it
        plugins["lightning"] |= {"val_check_interval": interval, "check_val_every_n_epoch": epochs}
    if clip := _clip(trainer, nodes["model"]["class_path"]):
        plugins["clip"] = clip
    options = {name: one for name, one in trainer.options.items() if one is not None or name == "evaluate_every"}
    if tree.get("ckpt_path") is not None:
        options["resume"] = _resume(str(tree["ckpt_path"]))
        plugins.setdefault("checkpoint", {"every": None})
    return {"module": _module(nodes), "trainer": options, "plugins": plugins}


def _node(key: str, given: Any, path: str | None) -> dict[str, Any] | None:
    """Return `class_path` and `init_args` of a part."""
    if given is None and path is None:
        return None
    if isinstance(given, str):  # a class alone
        given = {"class_path": given}
    if not is_node(given):
        if path is None:
            raise ValueError(
                f"{key}: the file has only arguments ({', '.join(given or ())}): say its class, "
                f"--{key.replace('_', '-')} package.module.Name"
            )
        given = {"class_path": path, "init_args": given or {}}
    home = () if given["class_path"] in PLATEAUS else SHORT.get(key, ())
    return {**given, "class_path": given["class_path"] if not home else resolved(given["class_path"], home)}


def _module(nodes: Mapping[str, Any]) -> Any:
    """Return the node of the module, with its optimizer where the file says one."""
    module, optimizer, scheduler = target(nodes["model"]), nodes["optimizer"], nodes["lr_scheduler"]
    if optimizer is None:
        if scheduler is not None:
            raise ValueError("lr_scheduler: there is one and no optimizer; say both, or neither")
        return module
    made = {"_target_": "hookline_lightning.cli.written.configured", "module": module, "optimizer": target(optimizer)}
    if scheduler is None:
        return made
    if scheduler["class_path"] in PLATEAUS:
        arguments = dict(scheduler.get("init_args") or {})
        if "monitor" not in arguments:
            raise ValueError("lr_scheduler: ReduceLROnPlateau looks at a value: say which, init_args: {monitor: …}")
        made["monitor"] = arguments.pop("monitor")
        scheduler = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": arguments}
    return {**made, "lr_scheduler": target(scheduler)}


def _trainer(tree: Mapping[str, Any]) -> tuple[Trainer, list[Any]]:
    """Return the trainer of the arguments, and the nodes of the callbacks that run."""
    given = dict(tree.get("trainer") or {})
    _refuse_unsaid(given)
    callbacks = given.pop("callbacks", None) or []
    nodes = [_named("callbacks", node) for node in (callbacks if isinstance(callbacks, list) else [callbacks])]
    objects = [instantiate(target(node), f"trainer.callbacks.{at}") for at, node in enumerate(nodes)]
    known = inspect.signature(Trainer).parameters
    arguments = {
        name: _made(name, value)
        for name, value in given.items()
        if value is not None or (name in known and known[name].default is not None)
    }
    seed = tree.get("seed_everything")
    seeded = {} if seed is None or isinstance(seed, bool) else {"seed": seed}
    trainer = Trainer(callbacks=objects, **seeded, **arguments)
    for logger in trainer.loggers:
        if not isinstance(logger, RunLogger):
            raise ValueError(
                f"trainer.logger: a {type(logger).__name__} cannot be said in a configuration: write a tracker as a "
                "plugin, or train by hookline_lightning.Trainer"
            )
    running = [id(one) for one in trainer.callbacks]
    return trainer, [target(node) for node, one in zip(nodes, objects, strict=True) if id(one) in running]


def _refuse_unsaid(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that no option and no plugin of a configuration says."""
    for name, value in given.items():
        nothing = name in ("limit_train_batches", "limit_test_batches", "limit_predict_batches") and value == 0
        if nothing or (name in ("min_epochs", "min_steps") and value is not None):
            raise ValueError(
                f"trainer.{name}: {value} cannot be said in a configuration; leave it out, or train by "
                "hookline_lightning.Trainer"
            )


def _named(key: str, node: Any) -> Any:
    node = {"class_path": node} if isinstance(node, str) else node
    return {**node, "class_path": resolved(node["class_path"], SHORT[key])} if is_node(node) else node


def _made(name: str, value: Any) -> Any:
    """Return an argument of the trainer, with objects in the place of the classes that it names."""
    if isinstance(value, list):
        return [_made(name, one) for one in value]
    if not is_node(value):
        return value
    return instantiate(target(_named(name, value) if name in SHORT else value), f"trainer.{name}")


def _limits(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plugins that limit batches; fractions are rounded as Lightning rounds them."""
    same, fractions = portions.split(limits)
    portion = {"_plugin_": "hookline_lightning.run.portions.Portions", **fractions}
    return {**({"limits": same} if same else {}), **({"lightning.portions": portion} if fractions else {})}


def _clip(trainer: Trainer, path: str) -> dict[str, Any] | None:
    """Return the options of the plugin clip, or None."""
    value, algorithm = trainer.clipping
    if not value:
        return None
    kind = class_of(path)
    if isinstance(kind, type) and overridden(object.__new__(kind), "configure_gradient_clipping"):
        raise ValueError(
            f"trainer.gradient_clip_val: {path} has a configure_gradient_clipping of its own; write the value there"
        )
    return {"max_norm": None, "max_value": value} if algorithm == "value" else {"max_norm": value}


def _resume(path: str) -> str | bool:
    if path in ("best", "hpc") or path.endswith(".ckpt"):
        raise ValueError(
            f"ckpt_path: {path}: say last, or the folder of a run or of a checkpoint of it. The weights of a .ckpt are "
            "read by hookline_checkpoint.load_foreign"
        )
    return True if path == "last" else path
