"""Figures against those worked out by hand, in one process and on two ranks."""

import csv
import logging
import os
import sys
import time

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, calls_per_step, check_plugin, digest, run_ranks, tiny_trainer
from hookline_monitor import Monitor, norm_of_gradients
from hookline_monitor.flops import counting, peak_of
from hookline_monitor.sampling import Sampler, Stacks

ALL = {
    "learning_rate": True,
    "grad_norm": True,
    "cpu_utilization": True,
    "throughput": True,
    "mfu": True,
    "peak_flops": 1e12,
    "plugin_time": True,
}


class Logs(CallbackInterface):
    """Keeps what is logged."""

    observer = True

    def __init__(self):
        self.logged = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.logged.append((global_step, dict(metrics)))

    def of(self, name):
        return {step: metrics[name] for step, metrics in self.logged if name in metrics}

    @property
    def names(self):
        return set().union(*(metrics for _, metrics in self.logged))


def train(monitor, module=None, plugins=(), **options):
    logs = Logs()
    trainer = tiny_trainer([monitor, *plugins, logs], module, **{"log_every": "2 steps", **options})
    trainer.train()
    return trainer, logs


class Counts(TinyModule):
    """Counts ten tokens a sample."""

    def count_tokens(self, batch):
        return 10 * len(batch[0])


@pytest.mark.parametrize("options", [{}, ALL])
def test_contract(options):
    check_plugin(Monitor, **options)


def test_by_default_it_logs_what_is_logged_anyway():
    plain = Logs()
    tiny_trainer([plain], log_every="2 steps").train()
    _, logs = train(Monitor())
    assert logs.logged == plain.logged


@pytest.mark.parametrize("module", [TinyModule, Counts])
def test_training_is_the_same_with_it(module):
    alone = tiny_trainer(module=module())
    alone.train()
    watched, _ = train(Monitor(**ALL), module())
    assert digest(watched.module.state_dict()) == digest(alone.module.state_dict())


# What is let through ------------------------------------------------------------------


class Several(TinyModule):
    """Has two validation loaders, and logs more."""

    def get_val_dataloaders(self, sampler, batch_size):
        return {key: super(Several, self).get_val_dataloaders(sampler, batch_size) for key in ("a", "b")}

    def val_step(self, global_step, batch, device):
        self.log(error=1.0)
        return super().val_step(global_step, batch, device)

    def on_end_train_step(self, global_step, *outputs):
        self.log(extra=1.0)


TRAIN = {"train_loss", "train_loss_epoch"}
VALIDATION = {"val_loss", "val_loss/a", "val_loss/b", "val_loss_batch/a", "val_loss_batch/b"}
OTHERS = {"error/a", "error/b", "extra"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, TRAIN | VALIDATION | OTHERS),
        ({"train_loss": False}, VALIDATION | OTHERS),
        ({"validation_loss": False}, TRAIN | OTHERS),
        ({"additional_metrics": False}, TRAIN | VALIDATION),
        ({"additional_metrics": False, "grad_norm": True}, TRAIN | VALIDATION | {"grad_norm"}),
        ({"train_loss": False, "validation_loss": False, "additional_metrics": False}, set()),
    ],
)
def test_what_nobody_wants_to_see_is_dropped(options, names):
    trainer, logs = train(Monitor(**options), Several(), report_loss_after_eval=False)
    assert logs.names == names
    assert {"val_loss", "error/a"} <= trainer.metrics.keys()  # nobody else goes without them
    assert trainer.best.valid_loss <= trainer.metrics["val_loss"]


def test_losses_by_other_names():
    names = {"train_loss_metric_name": "nll", "val_loss_metric_name": "nll/val"}
    _, logs = train(Monitor(train_loss=False), **names)
    assert logs.names == {"nll/val"}
    _, logs = train(Monitor(validation_loss=False), **names)
    assert logs.names == {"nll", "nll_epoch"}
    logs = Logs()
    trainer = tiny_trainer([Monitor(validation_loss=False), logs], **names)
    trainer.test()
    assert logs.logged == []


# Learning rates -----------------------------------------------------------------------


class Groups(TinyModule):
    """Has an optimizer with two groups, and another; keeps the rates that its steps had."""

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        two = torch.optim.SGD(
            [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[1].parameters(), "lr": 0.01}]
        )
        one = torch.optim.SGD(self.net[4].parameters(), torch.tensor(0.5))
        schedule = torch.optim.lr_scheduler.ExponentialLR
        self.used = {}
        return [two, one], [schedule(two, 0.5), schedule(one, 0.5)]

    @hookimpl
    def should_step(self, trainer):
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.used[trainer.global_step + 1] = [float(group["lr"]) for group in groups]
        return True


def test_the_learning_rates_are_those_that_the_step_had():
    module = Groups()
    _, logs = train(Monitor(learning_rate=True), module, epochs=1)
    names = ["learning_rate/optimizer_0/group_0", "learning_rate/optimizer_0/group_1", "learning_rate/optimizer_1"]
    for number, name in enumerate(names):
        assert logs.of(name) == {step: module.used[step][number] for step in (2, 4, 6, 7)}
    assert module.used[2] == pytest.approx([0.05, 0.005, 0.25])


def rates(*optimizers):
    """Return the learning rates that are logged, of optimizers given as lists of groups: (name or None, rate)."""

    class Named(TinyModule):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            layers, made = iter((self.net[0], self.net[1], self.net[4])), []
            for groups in optimizers:
                named = [{"name": name} if name else {} for name, _ in groups]
                groups = [{"params": next(layers).parameters(), "lr": rate} for _, rate in groups]
                made.append(torch.optim.SGD([group | own for group, own in zip(groups, named, strict=True)]))
            return made, []

    _, logs = train(Monitor(learning_rate=True), Named(), epochs=1)
    names = [name for name in logs.names if name.startswith("learning_rate")]
    return {name.removeprefix("learning_rate"): logs.of(name)[7] for name in names}


def test_learning_rates_have_the_names_of_their_groups():
    assert rates([(None, 0.1)]) == {"": 0.1}
    assert rates([("all", 0.1)]) == {"/all": 0.1}
    assert rates([("body", 0.1), (None, 0.2), ("head", 0.3)]) == {"/body": 0.1, "/group_1": 0.2, "/head": 0.3}
    assert rates([("body", 0.1)], [("head", 0.2)]) == {"/body": 0.1, "/head": 0.2}
    assert rates([("a", 0.1)], [("a", 0.2), ("b", 0.3)]) == {
        "/optimizer_0": 0.1,
        "/optimizer_1/group_0": 0.2,
        "/b": 0.3,
    }


class Turns(Groups):
    """Steps its optimizers one after the other, the first in every second update alone."""

    @hookimpl
    def update(self, trainer, window):
        outputs = trainer.hook.run_window(trainer=trainer, window=window)
        for optimizer in trainer.optimizers[trainer.global_step % 2 :]:
            trainer.step([optimizer])
        return outputs


def test_optimizers_that_step_in_turn_keep_their_numbers():
    _, logs = train(Monitor(learning_rate=True), Turns(), epochs=1, log_every="1 steps")
    assert list(logs.of("learning_rate/optimizer_0/group_0").values()) == pytest.approx(
        [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]
    )
    assert list(logs.of("learning_rate/optimizer_1").values()) == pytest.approx([0.5 / 2**n for n in range(7)])


# Gradients ----------------------------------------------------------------------------


class Norms(TinyModule):
    """Works out each step's norm by hand."""

    def __init__(self):
        super().__init__()
        self.norms = {}

    @hookimpl
    def should_step(self, trainer):
        gradients = [parameter.grad.flatten() for parameter in self.parameters()]
        self.norms[trainer.global_step + 1] = torch.cat(gradients).norm().item()
        return True


@pytest.mark.parametrize(
    ("log_every", "steps"), [("2 steps", {2: 2, 4: 4, 6: 6}), ("16 samples", {2: 1, 4: 3, 6: 5, 7: 7})]
)
def test_the_norm_is_that_of_the_step_that_is_logged(log_every, steps):
    module = Norms()
    _, logs = train(Monitor(grad_norm=True), module, epochs=1, log_every=log_every)
    assert logs.of("grad_norm") == pytest.approx({place: module.norms[step] for place, step in steps.items()})


@pytest.mark.plugins
def test_the_norm_is_that_after_clipping():
    from hookline_clip import Clip

    for order in ([Monitor(grad_norm=True), Clip(0.1)], [Clip(0.1), Monitor(grad_norm=True)]):
        _, logs = train(order[0], plugins=order[1:])
        assert all(norm == pytest.approx(0.1, rel=1e-4) for norm in logs.of("grad_norm").values())


def test_without_gradients_there_is_no_norm():
    weight = torch.nn.Parameter(torch.ones(2))
    assert norm_of_gradients([torch.optim.SGD([weight], 0.1)]) is None
    weight.grad = torch.tensor([3.0, 4.0])
    assert norm_of_gradients([torch.optim.SGD([weight], 0.1)]).item() == 5.0


def test_nothing_waits_for_the_device():
    def run(plugins):
        def steps(number):
            options = {"evaluate_every": None, "eval_when_finish": False, "log_every": "10 steps"}
            tiny_trainer(plugins(), Counts(samples=8 * number), epochs=1, **options).train()

        return steps

    watched = {**ALL, "cpu_utilization": False, "plugin_time": False}  # those cost nothing in a step
    few, many = 20, 60
    plain = calls_per_step(run(lambda: [Logs()]), few, many)
    ours = calls_per_step(run(lambda: [Monitor(**watched), Logs()]), few, many)
    assert ours.syncs == plain.syncs
    plain, ours = calls_per_step(run(list), few, many), calls_per_step(run(lambda: [Monitor()]), few, many)
    assert ours.calls - plain.calls < 40


# Speed --------------------------------------------------------------------------------


class Slow(Counts):
    """Takes its time in validations."""

    def val_step(self, global_step, batch, device):
        time.sleep(0.05)
        return super().val_step(global_step, batch, device)


def test_throughput_does_not_count_validations():
    began = time.perf_counter()
    _, logs = train(Monitor(throughput=True), Slow(), epochs=1, evaluate_every="1 steps")
    took = time.perf_counter() - began
    rates = logs.of("steps_per_second")
    assert list(rates) == [2, 4, 6, 7]
    assert took > 7 * 7 * 0.05
    assert min(rates.values()) > 7 / took * 2  # a busy machine is slow, but not by validating
    for step, rate in rates.items():
        samples = {7: 2}.get(step, 16)  # the last batch of 50 samples is one of 2
        assert logs.of("samples_per_second")[step] / rate == pytest.approx(samples / (1 if step == 7 else 2))
        assert logs.of("tokens_per_second")[step] / rate == pytest.approx(10 * samples / (1 if step == 7 else 2))


def test_tokens_are_a_running_total():
    _, logs = train(Monitor(), Counts(), epochs=2)
    assert logs.of("tokens") == {2: 160, 4: 320, 6: 480, 8: 580, 10: 740, 12: 900, 14: 1000}
    assert Logs().of("tokens") == {}
    assert "tokens" not in train(Monitor(), epochs=1)[1].names


@pytest.mark.parametrize("step", range(1, 13))
def test_tokens_go_on_after_a_resume(step):
    memory = Memory(every="1 steps")
    _, whole = train(Monitor(), Counts(), [memory], epochs=2)
    _, rest = train(Monitor(), Counts(), [Memory(memory.states[step])], epochs=2)
    assert rest.of("tokens") == {place: total for place, total in whole.of("tokens").items() if place > step}


def test_a_state_that_is_put_back_takes_the_tokens_back():
    class Back(Memory):
        """Goes back to step 3 once, behind step 6."""

        @hookimpl
        def on_boundary(self, trainer):
            if trainer.global_step == 6 and 3 in self.states:
                trainer.hook.set_run_state(trainer=trainer, state=self.states.pop(3), stage=trainer.stage)
            elif trainer.global_step == 3:
                trainer.save("here")

    _, logs = train(Monitor(throughput=True), Counts(), [Back()], epochs=1)
    steps = [(step, metrics["tokens"]) for step, metrics in logs.logged if "tokens" in metrics]
    assert steps == [(2, 160), (4, 320), (6, 480), (4, 320), (6, 480), (7, 500)]
    assert min(logs.of("steps_per_second").values()) > 0


@pytest.mark.plugins
def test_a_tracker_may_place_values_by_tokens(tmp_path):
    def table(path):
        with open(path, newline="") as file:
            return [row["tokens"] for row in csv.DictReader(file)]

    def run(memory, **options):
        plugins = {"monitor": {}, "csv": {"axis": "tokens"}, "memory": memory}
        trainer = tiny_trainer(plugins, Counts(), runs_folder=str(tmp_path), log_every="2 steps", **options)
        trainer.train()
        return trainer.run_dir / "metrics.csv"

    memory = Memory(every="1 steps")
    path = run(memory)
    whole = path.read_text()
    assert table(path) == ["160.0", "320.0", "480.0", "580.0", "740.0", "900.0", "1000.0"]
    run(Memory(memory.states[5]), resume=str(path.parent))
    assert path.read_text() == whole


# FLOPs --------------------------------------------------------------------------------

A_SAMPLE = 2 * (2 * 8 * 16 + 2 * 16) + 2 * 16  # of TinyModule: forward and weights; the inputs of the second layer


@pytest.mark.plugins
@pytest.mark.parametrize("accumulated", [False, True])
def test_flops_are_those_counted_by_hand(accumulated, caplog):
    from hookline_accumulate import Accumulate

    plugins = [Accumulate(2)] if accumulated else []
    with caplog.at_level(logging.INFO, "hookline.monitor"):
        trainer, logs = train(Monitor(mfu=True, peak_flops=1e9, throughput=True), plugins=plugins)
    assert [record.getMessage() for record in caplog.records if record.name == "hookline.monitor"] == [
        f"monitor: forward and backward of one sample take {A_SAMPLE} FLOPs on this rank"
    ]
    assert list(logs.of("mfu")) == [2, 4, 6, 8, 10, 12, 14]
    for step, rate in logs.of("samples_per_second").items():
        assert logs.of("tflops_per_second")[step] == pytest.approx(rate * A_SAMPLE / 1e12)
        assert logs.of("mfu")[step] == pytest.approx(rate * A_SAMPLE / 1e9)
    assert "monitor.flops" not in dict(trainer.plugins.listed())


@pytest.mark.plugins
def test_flops_that_are_done_twice_count_twice():
    from hookline_activation_checkpoint import ActivationCheckpoint

    plugins = [ActivationCheckpoint(["Sequential"])]
    trainer, logs = train(Monitor(mfu=True, throughput=True), Plain(), plugins)
    each = logs.of("tflops_per_second")[2] / logs.of("tokens_per_second")[2]
    assert each == pytest.approx((A_SAMPLE + 2 * 8 * 16) / 10 / 1e12)  # torch stops before the last layer
    alone = tiny_trainer(plugins, Plain())
    alone.train()
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


def test_flops_by_token_and_those_that_are_given():
    _, logs = train(Monitor(mfu=True, throughput=True), Counts())
    for step, rate in logs.of("tokens_per_second").items():
        assert logs.of("tflops_per_second")[step] == pytest.approx(rate * A_SAMPLE / 10 / 1e12)
    _, logs = train(Monitor(mfu=True, throughput=True, flops_per_sample=5e6, peak_flops=1e9), Counts())
    for step, rate in logs.of("samples_per_second").items():
        assert logs.of("tflops_per_second")[step] == pytest.approx(rate * 5e6 / 1e12)
        assert logs.of("mfu")[step] == pytest.approx(rate * 5e6 / 1e9)


def counted(network, inputs, dtype=None):
    """Return the FLOPs of forward and backward by kind of numbers."""
    flops = {}
    with counting(flops), torch.autocast("cpu", dtype, enabled=dtype is not None):
        network(inputs.requires_grad_()).float().sum().backward()
    return flops


def attend(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_flops_of_convolutions_and_attention_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert counted(conv, torch.randn(2, 3, 16, 16)) == {torch.float32: 3 * 2 * 2 * 16 * 16 * 8 * 3 * 3 * 3}
    product = 2 * (2 * 4) * 8 * 8 * 16  # two forward; five backward, with the first once more
    assert counted(attend, torch.randn(2, 4, 8, 16)) == {torch.float32: (2 + 5) * product}


def test_flops_by_the_kind_of_numbers():
    layer = torch.nn.Linear(4, 8, bias=False)
    assert counted(layer, torch.randn(2, 4), torch.bfloat16) == {torch.bfloat16: 3 * 2 * 2 * 4 * 8}
    assert counted(layer.double(), torch.randn(2, 4).double()) == {torch.float64: 3 * 2 * 2 * 4 * 8}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 156e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.5e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA H200", torch.float32, 494.5e12),
        ("NVIDIA H200 NVL", torch.float32, 417.5e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("AMD Instinct MI300X", torch.bfloat16, 1307.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA H100", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
        ("cpu", torch.float32, None),
    ],
)
def test_the_peaks_of_devices(name, dtype, peak):
    assert peak_of(name, dtype) == peak


def test_a_device_whose_peak_is_not_known(caplog):
    _, logs = train(Monitor(mfu=True))
    (said,) = [record.getMessage() for record in caplog.records if "monitor" in record.getMessage()]
    assert said == (
        "monitor.mfu: the peak of 'cpu' for torch.float32 is not known, so no share of it is logged; give it as "
        "monitor.peak_flops, in FLOP per second without sparsity"
    )
    assert "tflops_per_second" in logs.names
    assert "mfu" not in logs.names


class Compiles(TinyModule):
    """Compiles its network, or a function that calls it, and counts how often."""

    def __init__(self, whole):
        super().__init__()
        self.compiled = 0
        net = self.net
        if whole:
            self.net = torch.compile(net, backend=self.count)
        self.call = self.net if whole else torch.compile(lambda x: net(x), backend=self.count)

    def count(self, graph, inputs):
        self.compiled += 1
        return graph.forward

    def train_step(self, global_step, batch, device):
        return torch.nn.functional.mse_loss(self.call(batch[0]), batch[1])


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_compiled_stays_compiled(whole, caplog):
    options = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False}
    states = []
    for monitor in (Monitor(), Monitor(mfu=True, peak_flops=1e9)):
        torch.compiler.reset()
        module = Compiles(whole)
        _, logs = train(monitor, module, **options)
        states.append((module.compiled, digest(dict(module.state_dict()))))
    assert states[0] == states[1]
    assert states[0][0] > 0
    assert ("mfu" in logs.names) is not whole
    assert any("monitor.mfu counts no FLOPs of a compiled model" in r.getMessage() for r in caplog.records) is whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak_flops": 1e12}, r"monitor\.peak_flops=1e\+12 is for monitor\.mfu, which is false; set it to true"),
        ({"mfu": True, "peak_flops": 0.0}, r"monitor\.peak_flops=0\.0 must be above 0, or null"),
        ({"mfu": True, "flops_per_sample": -1.0}, r"monitor\.flops_per_sample=-1\.0 must be above 0, or null"),
        ({"mfu": True, "flops_per_sample": 1e9}, r"monitor\.flops_per_sample=1e\+09 needs monitor\.peak_flops too"),
    ],
)
def test_refuses_flops_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Monitor(**options)


# The machine --------------------------------------------------------------------------


def test_figures_of_the_processors_and_only_of_training():
    trainer, logs = train(Monitor(cpu_utilization=True))
    figures = {"cpu/utilization", "cpu/memory", "process/utilization", "process/memory"}
    for _, metrics in logs.logged:
        assert figures <= set(metrics) if "train_loss" in metrics else not figures & set(metrics)
    assert all(0 <= use <= 100 for use in logs.of("cpu/utilization").values())
    assert all(0.05 < memory < 1000 for memory in logs.of("process/memory").values())
    assert all(memory > 0.05 for memory in logs.of("cpu/memory").values())
    logs.logged.clear()
    trainer.validate()
    assert set(logs.names) == {"val_loss"}


def test_how_busy_this_process_is():
    class Burns(TinyModule):
        def train_step(self, global_step, batch, device):
            began = time.process_time()
            while time.process_time() < began + 0.1:
                pass
            return super().train_step(global_step, batch, device)

        def val_step(self, global_step, batch, device):
            time.sleep(0.1)
            return super().val_step(global_step, batch, device)

    options = {"epochs": 1, "evaluate_every": "1 steps", "max_val_steps_per_epoch": 1, "max_train_steps_per_epoch": 4}
    began = time.perf_counter()
    _, logs = train(Monitor(cpu_utilization=True), Burns(), **options)
    took = time.perf_counter() - began
    uses = list(logs.of("process/utilization").values())
    assert len(uses) == 2
    assert min(uses) > 100 * 0.4 / took  # what it would be if validations counted


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be seen")
def test_without_a_gpu_one_is_told_so_once(caplog):
    _, logs = train(Monitor(gpu_utilization=True))
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("monitor.gpu_utilization: there are no figures of GPUs: ")
    assert not any("gpu" in name for name in logs.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_figures_of_gpus():
    _, logs = train(Monitor(gpu_utilization=True), device="cuda")
    assert all(0 <= use <= 100 for use in logs.of("gpu_0/utilization").values())
    assert min(logs.of("gpu_0/memory").values()) > 0.01


@pytest.mark.parametrize(
    ("package", "option", "cure"),
    [
        ("psutil", "cpu_utilization", "pip install 'psutil>=5.9'"),
        ("pynvml", "gpu_utilization", "pip install 'nvidia-ml-py>=12.535'"),
    ],
)
def test_a_package_that_is_missing(package, option, cure, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    tiny_trainer([Monitor()])
    with pytest.raises(ValueError, match=rf"monitor\.{option} needs {package}, which cannot be imported.*{cure}"):
        tiny_trainer([Monitor(**{option: True})])


# The time of plugins ------------------------------------------------------------------


class Busy(CallbackInterface):
    @hookimpl
    def on_end_train_step(self):
        spin(0.12)


class Lazy(CallbackInterface):
    @hookimpl
    def on_end_train_step(self): ...


def spin(seconds):
    """Take time in code that is no class's."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Works(TinyModule):
    def train_step(self, global_step, batch, device):
        spin(0.06)
        return super().train_step(global_step, batch, device)


def test_the_time_goes_to_the_innermost_plugin():
    plugins = {"busy": Busy(), "lazy": Lazy(), "monitor": Monitor(plugin_time=True), "logs": Logs()}
    options = {"epochs": 1, "max_steps": 5, "evaluate_every": None, "eval_when_finish": False}
    tiny_trainer(plugins, Works(), log_every="5 steps", **options).train()
    (logged,) = [metrics for _, metrics in plugins["logs"].logged]
    shares = {name.removeprefix("time/"): share for name, share in logged.items() if name.startswith("time/")}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["busy"] > 1.3 * shares["module"] > 0.2
    assert shares.get("loop", 0) + shares.get("monitor", 0) + shares.get("logs", 0) < 0.4
    assert "lazy" not in shares


def test_whose_code_is_whose():
    stacks = Stacks({"clip": Monitor(), "busy": Busy(), "module": Works()}, 0)
    assert stacks._find("hookline_monitor.machine", "Gpus.look") == "clip"
    assert stacks._find(Busy.__module__, "Busy.on_end_train_step") == "busy"
    assert stacks._find(Busy.__module__, "spin") is None  # two are at home there
    assert stacks._find("hookline.testing.tiny", "TinyModule.train_step") == "module"
    assert stacks._find("hookline.trainer", "Trainer.advance") is None
    assert stacks._find("torch.nn.modules.module", "Module.__call__") is None
    assert stacks.shares() == {}


def test_a_sampler_that_fails_says_so_once_and_ends(caplog):
    sampler = Sampler(lambda: 1 / 0, 0.001)
    sampler._thread.join(60)
    assert not sampler._thread.is_alive()
    assert [record.getMessage() for record in caplog.records] == [
        "monitor no longer sees some figures: ZeroDivisionError: division by zero"
    ]
    sampler.stop()


# Ranks --------------------------------------------------------------------------------


class Plain(Counts):
    """Without batch norm and dropout, so that two ranks do what one does, but for rounding."""

    def __init__(self):
        super().__init__(samples=44)  # an odd number of batches: the ranks' last ones are short
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))


def train_on_ranks(strategy):
    torch.set_num_threads(1)
    logs = Logs()
    plugins = {**({strategy: {}} if strategy else {}), "monitor": Monitor(**ALL), "logs": logs}
    tiny_trainer(plugins, Plain(), log_every="2 steps", epochs=1).train()
    return int(os.environ.get("RANK", "0")), logs.logged


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks(strategy):
    outcomes = run_ranks(train_on_ranks, 2, strategy)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    (_, first), (_, second) = (outcome.value for outcome in outcomes)
    _, alone = train_on_ranks(None)
    for (step, metrics), (_, expected) in zip(first, alone, strict=True):
        names = [{name for name in logged if not name.startswith("time/")} for logged in (metrics, expected)]
        assert names[0] == names[1], step
        for name in {"tokens", "learning_rate"} & expected.keys():
            assert metrics[name] == expected[name]
        if "grad_norm" in expected:
            assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        if "tokens_per_second" in metrics:
            each = metrics["tflops_per_second"] / metrics["tokens_per_second"]  # of two ranks, on one
            assert each == pytest.approx(A_SAMPLE / 10 / 2 / 1e12)
    others = set().union(*(metrics for _, metrics in second))
    assert not {name for name in others if name.startswith(("cpu/", "process/", "time/", "learning_rate"))}
