"""What is set within a run, and that all of it is as before afterwards."""

import copy
import gc
import os
import warnings

import pytest
import torch
from torch.backends import cudnn
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, TinyModule, check_plugin, digest, hand_written_loop, on_ranks, tiny_trainer
from hookline_backend import Backend

ALL = {
    "deterministic": "error",
    "cudnn_benchmark": False,
    "matmul_precision": "medium",
    "tf32": False,
    "channels_last": True,
    "gc_every": 2,
}


def switches():
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32),
        "matmul": torch.get_float32_matmul_precision(),
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "gc": gc.isenabled(),
        "show": warnings.showwarning,
    }


@pytest.fixture(autouse=True)
def as_before():
    """Have the switches as before when a test ends, and the test fail where they are not."""
    before = switches()
    yield
    assert switches() == before


class Looks(TinyModule):
    """Looks at the switches in its steps; fails in step `fails`."""

    def __init__(self, fails=0):
        super().__init__()
        self.fails, self.looked = fails, []

    def train_step(self, global_step, batch, device):
        self.looked.append(switches())
        if global_step == self.fails:
            raise RuntimeError("no")
        return super().train_step(global_step, batch, device)

    def val_step(self, global_step, batch, device):
        self.looked.append(switches())
        return super().val_step(global_step, batch, device)


@pytest.mark.parametrize("options", [{**ALL, "gc_every": 9}, {"deterministic": "warn"}])
def test_contract(options):
    check_plugin(Backend, **options)


def test_switches_are_set_within_the_run_alone():
    module, before = Looks(), switches()
    trainer = tiny_trainer([Backend(**ALL)], module, epochs=1)
    assert switches() == before
    trainer.train()
    for looked in module.looked:
        assert (looked["deterministic"], looked["warn"]) == (True, False)
        assert looked["cudnn"] == (True, False, False)
        assert (looked["matmul"], looked["cublas"], looked["gc"]) == ("medium", ":4096:8", False)
    assert switches() == before
    module.looked.clear()
    trainer.validate()
    assert all(looked["matmul"] == "medium" and looked["gc"] for looked in module.looked)  # no step collects there


def test_what_is_not_named_is_left_alone():
    module, before = Looks(), switches()
    tiny_trainer([Backend(tf32=False)], module, epochs=1).train()
    before["cudnn"] = (*before["cudnn"][:2], False)
    assert all(looked == before for looked in module.looked)


@pytest.mark.parametrize("way", ["error", "warn"])
def test_they_are_put_back_after_an_error_too(way, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=way == "error")
    gc.disable()
    try:
        before, module = switches(), Looks(fails=2)
        with pytest.raises(RuntimeError, match="no"):
            tiny_trainer([Backend(**{**ALL, "deterministic": way})], module).train()
        assert switches() == before
        assert module.looked[-1]["cublas"] == ":16:8"
        assert module.looked[-1]["warn"] == (way == "warn")
        assert module.looked[-1]["cudnn"][1] is False
    finally:
        torch.use_deterministic_algorithms(False)
        gc.enable()


# What is not deterministic ------------------------------------------------------------


class Puts(TinyModule):
    """Does an operation that is not deterministic in each training step, and warns of something else."""

    def train_step(self, global_step, batch, device):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
        if global_step == 2:
            warnings.warn("something else", stacklevel=1)
        return super().train_step(global_step, batch, device)


class Objects(CallbackInterface):
    """Keeps the texts that are logged."""

    observer = True

    def __init__(self):
        self.texts = {}

    @hookimpl
    def on_log_object(self, name, value):
        self.texts[name] = value


def test_what_is_not_deterministic_is_an_error():
    with pytest.raises(RuntimeError, match="put_.*does not have a deterministic implementation"):
        tiny_trainer([Backend(deterministic="error")], Puts()).train()


def test_what_is_not_deterministic_is_reported_once(caplog):
    objects = Objects()
    tiny_trainer(epochs=1).train()  # imports, which may add filters
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        tiny_trainer([Backend(deterministic="warn"), objects], Puts()).train()
        assert warnings.filters == before
    assert [str(warning.message) for warning in warned] == ["something else"]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "hookline.backend"]
    first, line = said.splitlines()
    assert first == "operations that are not deterministic were done:"
    assert line.startswith("14 times: put_")
    assert objects.texts == {"not deterministic": said}


def test_where_all_is_deterministic_nothing_is_reported(caplog):
    tiny_trainer([Backend(deterministic="warn")]).train()
    assert [record for record in caplog.records if record.name == "hookline.backend"] == []


@pytest.mark.parametrize("options", [{"deterministic": "error"}, {"matmul_precision": "highest", "gc_every": 9}])
def test_a_loop_by_hand_gives_the_same_bits(options):
    trainer, module = tiny_trainer([Backend(**options)]), TinyModule()
    trainer.train()
    hand_written_loop(module)
    assert digest(dict(trainer.module.state_dict())) == digest(dict(module.state_dict()))


# Channels last ------------------------------------------------------------------------


class Images(TinyModule):
    """Trains convolutions on images; keeps whether each batch had its channels last."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(20, 3, 8, 8, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(0.1), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()
            )
        self.last = []

    def train_step(self, global_step, batch, device):
        images = batch["more"][0]
        self.last.append(images.is_contiguous(memory_format=torch.channels_last))
        return (self.net(images).mean(1) - batch["targets"]).square().mean()

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        dataset = TensorDataset(self.images, self.images.sum((1, 2, 3)))

        def collate(samples):
            images, targets = zip(*samples, strict=True)
            return {"more": (torch.stack(images), "a text"), "targets": torch.stack(targets)}

        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset), collate_fn=collate)

    get_val_dataloaders = get_train_dataloader


class ByHand(Images):
    """The same, with what the plugin does written by hand."""

    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.channels_last)

    def train_step(self, global_step, batch, device):
        images = batch["more"][0].contiguous(memory_format=torch.channels_last)
        return super().train_step(global_step, {**batch, "more": (images, "")}, device)


def test_channels_last_give_the_bits_of_a_loop_by_hand():
    module, expected = Images(), ByHand()
    tiny_trainer([Backend(channels_last=True)], module).train()
    hand_written_loop(expected)
    assert digest(dict(module.state_dict())) == digest(dict(expected.state_dict()))
    assert all(module.last)
    plain = Images()
    tiny_trainer(module=plain).train()
    assert not any(plain.last)
    weight = module.net[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) > weight.is_contiguous()


def test_a_resume_at_every_step_gives_the_same_bits():
    options = {**ALL, "gc_every": 4}
    memory, whole = Memory(every="1 steps"), Images()
    tiny_trainer({"backend": Backend(**options), "memory": memory}, whole).train()
    assert len(memory.states) == 6
    for state in memory.states.values():
        module = Images()
        tiny_trainer({"backend": Backend(**options), "memory": Memory(copy.deepcopy(state))}, module).train()
        assert digest(dict(module.state_dict())) == digest(dict(whole.state_dict()))


@pytest.mark.plugins
def test_weights_with_channels_last_can_be_saved_and_resumed(tmp_path):
    plugins = {"backend": {"channels_last": True}, "checkpoint": {"every": "2 steps"}, "model_saving": {}}
    whole = tiny_trainer(plugins, Images(), runs_folder=str(tmp_path), run_name="whole")
    whole.train()
    cut = tiny_trainer(plugins, Images(), runs_folder=str(tmp_path), run_name="cut", max_steps=4)
    cut.train()
    resumed = tiny_trainer(plugins, Images(), runs_folder=str(tmp_path), resume=str(cut.run_dir))
    resumed.train()
    assert resumed.global_step == 6
    assert digest(dict(resumed.module.state_dict())) == digest(dict(whole.module.state_dict()))
    assert list((whole.run_dir / "models").rglob("*.safetensors"))


# Garbage ------------------------------------------------------------------------------


class Steps(CallbackInterface):
    """Notes after which steps garbage was collected within the training."""

    def __init__(self):
        self.collected, self.step = [], None

    def note(self, phase, information):
        if phase == "start" and self.step is not None and not gc.isenabled():
            self.collected.append(self.step + 1)

    @hookimpl
    def on_begin_train(self, global_step):
        self.step = global_step
        gc.callbacks.append(self.note)

    @hookimpl(trylast=True)
    def on_end_train_step(self, global_step):
        self.step = global_step

    @hookimpl
    def on_end_run(self):
        gc.callbacks.remove(self.note)


class Cycles(TinyModule):
    """Leaves many cycles in each step, so that Python would collect."""

    def train_step(self, global_step, batch, device):
        for _ in range(2000):
            cycle = []
            cycle.append(cycle)
        return super().train_step(global_step, batch, device)


def test_garbage_is_collected_at_these_steps_and_no_others():
    steps = Steps()
    tiny_trainer([steps, Backend(gc_every=3)], Cycles(), epochs=1).train()
    assert steps.collected == [3, 6]


def on_a_rank():
    torch.set_num_threads(1)
    steps, module = Steps(), Images()
    tiny_trainer({"ddp": {}, "steps": steps, "backend": Backend(**ALL)}, module).train()
    with pytest.raises(NotImplementedError, match="FSDP does not support non-contiguous parameters"):
        tiny_trainer({"fsdp": {}, "backend": Backend(channels_last=True)}, Images()).train()
    return steps.collected, all(module.last), digest(dict(module.state_dict()))


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks():
    first, second = on_ranks(on_a_rank, 2)
    assert first == second
    assert first[:2] == ([2, 4, 6], True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"backend has nothing to do: give one or some of deterministic, cudnn_benchmark, matmul_precision, tf32"),
        ({"deterministic": "yes"}, r"backend\.deterministic='yes' must be one of error, warn, or null to leave it"),
        ({"matmul_precision": "low"}, r"backend\.matmul_precision='low' must be one of highest, high, medium, or null"),
        ({"gc_every": 0}, r"backend\.gc_every=0 must be at least 1 optimizer step, or null"),
        (
            {"deterministic": "warn", "cudnn_benchmark": True},
            r"backend\.deterministic='warn' and backend\.cudnn_benchmark=true exclude each other",
        ),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Backend(**options)
