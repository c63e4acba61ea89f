"""Private parts of other packages: each that is used is known, with the reason, and is there in what is installed."""

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import lr_scheduler

ROOT = Path(__file__).parent.parent
HOMES = [ROOT / "src", *sorted(ROOT.glob("plugins/*/src"))]
PUBLIC = {"_asdict", "_current_frames", "_exit", "_fields", "_make", "_replace"}  # documented, of Python itself
CALLING = ("_multicall", "_raise_wrapfail")
ASKING = {"getattr", "hasattr", "setattr", "delattr"}
SIMULATE = "plugins/simulate"


class Part(NamedTuple):
    """Private names of a package that are used."""

    package: str
    names: set[str]
    homes: set[str]
    """Where: the core or a plugin."""
    why: str
    look: Callable[[Any], Any]
    """Takes them from the installed package, and raises where one is gone."""


def sequence():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    steps = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, steps, milestones=[1])


def metric(torchmetrics):
    mean = torchmetrics.MeanMetric()
    mean(1.0)
    return mean


def compiled(torch):
    within = torch.nn.Linear(1, 1)
    within.compile(backend="eager")
    return within._compiled_call_impl, torch.compile(within, backend="eager")._orig_mod


def simulation(torch):
    names = (
        "torch._C._distributed_c10d:_resolve_process_group", "torch._C._distributed_c10d:_create_work_from_future",
        "torch._subclasses.fake_tensor:FakeTensorMode", "torch.testing._internal.distributed.fake_pg:FakeStore",
        "torch.utils._pytree:tree_map_only", "torch._C:_disabled_torch_dispatch_impl",
    )  # fmt: skip
    for home, _, name in (name.partition(":") for name in names):
        getattr(importlib.import_module(home), name)
    aten = torch.ops.aten
    return aten._pin_memory.default, aten._local_scalar_dense.default._schema


def ring(torch):
    found = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
    names = "_enable_context_parallel_dispatcher", "_disable_context_parallel_dispatcher", "custom_ops"
    names += "_templated_ring_attention", "_templated_ring_attention_backward"
    aten, options = torch.ops.aten, found._cp_options
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    kernels = aten._scaled_dot_product_flash_attention_for_cpu, backward
    return [getattr(found, name) for name in names], options.rotate_method, options.enable_load_balance, kernels


def given_to_lightning(lightning):
    loggers = importlib.import_module("lightning.pytorch.loggers")
    csv, averaging = loggers.CSVLogger("."), importlib.import_module("lightning.pytorch.callbacks").EMAWeightAveraging()
    texts = "".join(inspect.getsource(getattr(loggers, f"{name}Logger")) for name in ("Wandb", "MLFlow", "TensorBoard"))
    found = [texts.index(f"self.{name}") for name in ("_wandb_init", "_offline", "_log_model", "_experiment_name",
             "_run_name", "_tracking_uri", "_artifact_location", "_run_id", "_log_graph")]  # fmt: skip
    return csv._version, csv._prefix, averaging._kwargs["avg_fn"], averaging._use_buffers, found


def hooked(torch):
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters())
    hooks = [layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks]
    hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    return hooks, torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


def compiling(torch):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    lr_scheduler.ConstantLR(optimizer)
    optimizer.step()
    return optimizer._opt_called, importlib.import_module("torch._dynamo.utils").graph_break_reasons


def replaying(torch):
    module = torch.nn.Linear(1, 1)
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return hooks, importlib.import_module("torch.utils._pytree").tree_flatten, compiling(torch)


PARTS = [
    Part(
        "torch",
        {"_dynamo", "_opt_called"},
        {"plugins/compile"},
        "graph breaks are kept there alone, and schedulers of torch ask by the other whether an optimizer has stepped",
        compiling,
    ),
    Part(
        "torch",
        {"_opt_called", "_pytree", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"},
        {"plugins/cudagraph"},
        "schedulers of torch ask whether an optimizer has stepped, batches are walked over with the containers that "
        "others register, and which modules run hooks is said nowhere else",
        replaying,
    ),
    Part(
        "torch",
        {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_optimizer_step_pre_hooks"}
        | {"_optimizer_step_post_hooks", "_C", "_len_torch_dispatch_stack", "_len_torch_function_stack"},
        {"src"},
        "the conformance kit looks for hooks and modes that a plugin leaves behind; torch lists them nowhere else",
        hooked,
    ),
    Part(
        "torch",
        {"_C", "_disabled_torch_dispatch_impl", "_pytree", "_schema"},
        {"src"},
        "the kit's CUDA device that is not there makes its tensors as torch's fake ones are made, with CUDA's keys",
        lambda torch: (
            torch.Tensor._make_subclass,
            torch._C._disabled_torch_dispatch_impl,
            torch.cuda._is_in_bad_fork,
            torch.cuda._lazy_init,
            importlib.import_module("torch.utils._pytree").tree_leaves,
        ),
    ),
    Part(
        "torch",
        {"_destroy", "_ExcludeDispatchKeyGuard"},
        {"src"},
        "the kit's CUDA device casts in the place of torch's autocast, which takes its tensors for none of CUDA",
        lambda torch: (
            torch.library.Library._destroy,
            torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)),
        ),
    ),
    Part(
        "torch",
        {"_get_privateuse1_backend_name", "_register_device_module"},
        {"src"},
        "torch documents the second for a device of a vendor, and says nowhere else whether there is one",
        lambda torch: (torch._C._get_privateuse1_backend_name, torch._register_device_module),
    ),
    Part(
        "torch",
        {"_optimizer_step_pre_hooks"},
        {"plugins/optimizer_in_backward"},
        "hooks before a step would find no gradients, so an optimizer with some is refused; nothing else says it has",
        lambda torch: torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])._optimizer_step_pre_hooks,
    ),
    Part(
        "torch",
        {"_version"},
        {"src", "plugins/fsdp"},
        "torch counts there alone how often a tensor was written to",
        lambda torch: torch.ones(1)._version,
    ),
    Part(
        "torch",
        {"_set_params_and_buffers_to_ignore_for_model"},
        {"plugins/ddp"},
        "DDP has no argument for the weights that it leaves alone, as experts are, of which some ranks have each",
        lambda torch: torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model,
    ),
    Part(
        "torch",
        {"_is_view"},
        {"src"},
        "whether a tensor shares its memory is said nowhere else",
        lambda torch: torch.ones(1)._is_view(),
    ),
    Part(
        "torch",
        {"_buffers", "_parameters"},
        {"src", SIMULATE},
        "what a module holds is put back, or replaced, without its `__setattr__`",
        lambda torch: (torch.nn.Linear(1, 1)._buffers, torch.nn.Linear(1, 1)._parameters),
    ),
    Part(
        "torch",
        {"_get_iterator"},
        {"src"},
        "a loader that overrides it does not iterate in torch's way",
        lambda torch: torch.utils.data.DataLoader._get_iterator,
    ),
    Part(
        "torch",
        {"_schedulers", "_milestones"},
        {"src"},
        "how long a sequence of schedulers is built for is said nowhere else",
        lambda torch: (sequence()._schedulers, sequence()._milestones),
    ),
    Part(
        "torch",
        {"_python_dispatch"},
        {"src", SIMULATE, "plugins/profile"},
        "torch documents the mode that hears every operation by this name",
        lambda torch: importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode,
    ),
    Part(
        "torch",
        {
            "_C",
            "_create_work_from_future",
            "_disabled_torch_dispatch_impl",
            "_distributed_c10d",
            "_internal",
            "_local_scalar_dense",
            "_pin_memory",
            "_pytree",
            "_resolve_process_group",
            "_schema",
            "_subclasses",
        },
        {SIMULATE},
        "operations are done without values and without other ranks, by what torch has for its own compiler and tests",
        simulation,
    ),
    Part(
        "torch",
        {"_pytree"},
        {"plugins/pipeline"},
        "arguments and outputs are walked over as torch's pipelines do it, with the containers that others register",
        lambda torch: importlib.import_module("torch.utils._pytree").tree_unflatten,
    ),
    Part(
        "torch",
        {"_compiled_call_impl", "_orig_mod"},
        {"plugins/monitor", "plugins/summary"},
        "which modules are compiled is said nowhere else",
        compiled,
    ),
    Part(
        "torch",
        {"_profiler_enabled"},
        {"plugins/profile"},
        "whether a profiler records is said nowhere else, and a second one would take what it has",
        lambda torch: torch.autograd._profiler_enabled,
    ),
    Part(
        "torch",
        {
            "_get_raw",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        },
        {"plugins/monitor", "plugins/summary"},
        "torch's counter of FLOPs does not know the attention of the CPU; a formula of this mark sees more than shapes",
        lambda torch: (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
            inspect.getsource(importlib.import_module("torch.utils.flop_counter").FlopCounterMode).index("_get_raw"),
        ),
    ),
    Part(
        "torch",
        {
            "_attention",
            "_context_parallel",
            "_cp_options",
            "_disable_context_parallel_dispatcher",
            "_enable_context_parallel_dispatcher",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_templated_ring_attention",
            "_templated_ring_attention_backward",
        },
        {"plugins/context_parallel"},
        "torch's ring takes the kernel of CPUs nowhere else; `context_parallel` itself resizes tensors of the batch in "
        "place, wants one of them, and grows with each call",
        ring,
    ),
    Part(
        "torch",
        {"_check_input_dim"},
        {"plugins/sync_batchnorm"},
        "which shapes a batch norm takes is said nowhere else",
        lambda torch: torch.nn.BatchNorm1d(1)._check_input_dim,
    ),
    Part(
        "torch",
        {"_BatchNorm"},
        {"plugins/activation_checkpoint"},
        "batch norms of other packages derive from it, too",
        lambda torch: torch.nn.modules.batchnorm._BatchNorm,
    ),
    Part(
        "torch",
        {"_metadata"},
        {"plugins/checkpoint"},
        "a state dict has the versions of modules there, and `load_state_dict` looks for them",
        lambda torch: torch.nn.BatchNorm1d(1).state_dict()._metadata,
    ),
    Part(
        "torch",
        {"_reset_parameters"},
        {"plugins/fsdp"},
        "torch's attention and transformers have it with an underscore",
        lambda torch: (torch.nn.MultiheadAttention._reset_parameters, torch.nn.Transformer._reset_parameters),
    ),
    Part(
        "torch",
        {"_set_pg_timeout"},
        {"plugins/distributed"},
        "torch has ranks wait in the groups of a mesh for 30 minutes, and takes another time for each in no other way",
        lambda torch: torch.distributed.distributed_c10d._set_pg_timeout,
    ),
    Part(
        "torch",
        {"_dump_fr_trace_json"},
        {"plugins/watchdog"},
        "the flight recorder is asked, where there is one",
        lambda torch: torch._C._distributed_c10d._dump_fr_trace_json,
    ),
    Part(
        "pluggy",
        {"_callers", "_multicall", "_raise_wrapfail"},
        {"src"},
        "its function shows an error in a historic event; wrappers that do not yield once are refused in its words",
        lambda pluggy: [getattr(importlib.import_module("pluggy._callers"), name) for name in CALLING],
    ),
    Part(
        "torchmetrics",
        {"_defaults"},
        {"src"},
        "which attributes of a metric are its states is said nowhere else",
        lambda torchmetrics: metric(torchmetrics)._defaults,
    ),
    Part(
        "torchmetrics",
        {"_reductions", "_sync_dist"},
        {"plugins/metrics"},
        "all of a state is gathered at once, and reduced as `add_state` was told",
        lambda torchmetrics: (metric(torchmetrics)._reductions, metric(torchmetrics)._sync_dist),
    ),
    Part(
        "torchmetrics",
        {"_update_count", "_computed", "_forward_cache"},
        {"plugins/lightning"},
        "a metric is put back in the middle of an epoch, and the value of its last batch is logged",
        lambda torchmetrics: [vars(metric(torchmetrics))[n] for n in ("_update_count", "_computed", "_forward_cache")],
    ),
    Part(
        "lightning",
        {"_device", "_mode"},
        {"plugins/lightning"},
        "the real package answers the first as `self.device`, and says nowhere else how a CombinedLoader combines",
        lambda lightning: (
            lightning.LightningModule()._device,
            lightning.pytorch.utilities.CombinedLoader.__init__.__code__.co_names.index("_mode"),
        ),
    ),
    Part(
        "lightning",
        {
            "_version",
            "_prefix",
            "_kwargs",
            "_log_graph",
            "_wandb_init",
            "_offline",
            "_log_model",
            "_experiment_name",
            "_run_name",
            "_tracking_uri",
            "_artifact_location",
            "_run_id",
            "_use_buffers",
        },
        {"plugins/lightning"},
        "what its loggers and callbacks were made with, which becomes options of plugins",
        given_to_lightning,
    ),
    Part(
        "transformers",
        {"_no_split_modules", "_init_weights"},
        {"plugins/hf"},
        "which classes are blocks, and the first values of a single module, are said nowhere else",
        lambda transformers: (
            transformers.PreTrainedModel._no_split_modules,
            transformers.PreTrainedModel._init_weights,
        ),
    ),
    Part(
        "dvclive",
        {"_init_dvc", "_init_studio"},
        {"plugins/dvclive"},
        "it would make a repository of any of git, and tell DVC Studio, and has no argument against that",
        lambda dvclive: (dvclive.Live._init_dvc, dvclive.Live._init_studio),
    ),
    Part(
        "rich",
        {"_live_render"},
        {"plugins/progress"},
        "what is drawn, and how high it is, rich keeps there alone",
        lambda rich: importlib.import_module("rich.live").Live()._live_render,
    ),
    Part(
        "deepspeed",
        {"_hp_mapping"},
        {"plugins/deepspeed"},
        "where a rank's piece of a parameter lies is said nowhere else",
        lambda deepspeed: inspect.getsource(deepspeed.utils.mixed_precision_linkage).index("._hp_mapping"),
    ),
]


def place(home):
    """Return what a folder of sources is called here."""
    return str(home.relative_to(ROOT)).removesuffix("/src")


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC and name != "_"


def own_names(trees):
    """Return what a distribution names itself: functions, classes, variables and attributes of its objects."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) in ("self", "cls"):
                found.add(node.attr)
    return found


def names_in(node, modules):
    """Give the names that a piece of code takes from somewhere: attributes, imports, and what is asked for by name."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Import):
        yield from (part for name in node.names for part in name.name.split("."))
    elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in modules:
        yield from (part for name in node.names for part in f"{node.module}.{name.name}".split("."))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ASKING:
        yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
        made = node.args[2] if len(node.args) == 3 else None  # a class whose members override others
        yield from (key.value for key in getattr(made, "keys", []) if isinstance(key, ast.Constant))


def uses(home):
    """Return the names of the private parts of other packages that a distribution uses."""
    trees = {path: ast.parse(path.read_text()) for path in home.rglob("*.py")}
    modules = {path.relative_to(home).parts[0].removesuffix(".py") for path in trees}
    names = {name for tree in trees.values() for node in ast.walk(tree) for name in names_in(node, modules)}
    return {name for name in names - own_names(trees.values()) if is_private(name)}


def test_each_private_part_of_another_package_is_known_with_the_reason_for_it():
    used = {(place(home), name) for home in HOMES for name in uses(home)}
    known = {(home, name) for part in PARTS for home in part.homes for name in part.names}
    assert used - known == set(), "private parts of other packages: take a public way, or give the reason in PARTS"
    for part in PARTS:
        assert part.names <= {name for home, name in used if home in part.homes}, f"nobody uses all of {part} any more"
        assert part.homes <= {home for home, name in used if name in part.names}, f"not all use {part} any more"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.package}-{'-'.join(sorted(part.names))}")
def test_each_private_part_is_there(part):
    package = pytest.importorskip(part.package, reason="no requirement of the tests", exc_type=ImportError)
    try:
        part.look(package)
    except (AttributeError, ImportError, KeyError, ValueError) as error:
        homes = ", ".join(sorted(part.homes))
        raise AssertionError(f"{part.package} has changed ({error}), and {homes} used it: {part.why}") from error


def test_a_private_part_is_found_however_it_is_reached(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch, other._three\n"
        "from other._one import _two\n"
        "from mine import _own\n"
        "class Mine:\n"
        "    def __init__(self, given):\n"
        "        self._kept = given._asdict()\n"
        "        given._kept, self._theirs\n"
        "        given._version, getattr(given, '_asked', None)\n"
        "        type('Name', (given,), {'_overridden': None, 'open': 1})\n"
    )
    found = uses(tmp_path)
    assert found == {"_one", "_two", "_three", "_theirs", "_version", "_asked", "_overridden"}
