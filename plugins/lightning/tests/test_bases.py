"""The bases of this package do what those of Lightning's do: `super().…` of every hook, parameters, small doors."""

import argparse
import dataclasses
import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookline
from hookline import CallbackInterface, hookimpl
from hookline.testing import digest
from hookline_lightning import Callback, LightningDataModule, LightningModule, Trainer

pytestmark = pytest.mark.plugins
QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def points(number=24):
    inputs = torch.randn(number, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(4, 1)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def train_dataloader(self):
        return DataLoader(points(), 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(points(), 8)


# Hooks --------------------------------------------------------------------------------

EVENTS = [name for name in dir(Callback) if name.startswith("on_")]
OF_MODULES = [
    *(name for name in dir(LightningModule) if name.startswith("on_") and name != "on_gpu"),
    "prepare_data", "setup", "teardown", "configure_model", "configure_callbacks", "backward", "optimizer_step",
    "lr_scheduler_step", "configure_gradient_clipping", "transfer_batch_to_device",
]  # fmt: skip


def calling_super(base, names):
    """Derive a class that overrides each of these methods by a call of the base's, and keeps who was called."""

    def override(name):
        def method(self, *arguments, **options):
            self.called.append(name)
            return getattr(super(kind, self), name)(*arguments, **options)

        return method

    kind = type(f"Calling{base.__name__}", (base,), {name: override(name) for name in names})
    kind.called = []
    return kind


def fit(module, **options):
    trainer = Trainer(max_epochs=2, **{**QUIET, "gradient_clip_val": 0.5, **options})
    trainer.fit(module)
    return trainer


def test_super_of_every_hook_does_what_the_run_does():
    plain, calling = Line(), calling_super(Line, OF_MODULES)()
    fit(plain)
    listening = calling_super(Callback, [*EVENTS, "setup", "teardown", "state_dict", "load_state_dict"])()
    fit(calling, callbacks=[listening])
    assert digest(calling.state_dict()) == digest(plain.state_dict())
    heard = set(calling.called)
    assert {*OF_MODULES} - heard == {name for name in OF_MODULES if "_test_" in name or "_predict_" in name} | {
        "on_save_checkpoint", "on_load_checkpoint"
    }  # fmt: skip
    assert calling.called.count("optimizer_step") == calling.called.count("backward") == 6
    assert {*EVENTS} - set(listening.called) == {
        name for name in EVENTS if "_test_" in name or "_predict_" in name or "sanity" in name
    } | {"on_save_checkpoint", "on_load_checkpoint", "on_exception"}


def test_what_is_not_overridden_is_not_called():
    bridge = fit(Line(), callbacks=[Callback()], gradient_clip_val=None).core
    names = [name for name, _ in bridge.plugins.listed()]
    assert bridge.module.listeners == {}
    assert not {"lightning.steps", "lightning.transfer", "lightning.backward", "lightning.optimizer_step"} & {*names}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_by_the_trainers_value_unless_another_is_said(algorithm):
    class Clips(Line):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    class ClipsBare(Line):
        def configure_gradient_clipping(self, optimizer, *_):
            self.clip_gradients(optimizer)

    weights = []
    for kind in (Line, Clips, ClipsBare):
        module = kind()
        fit(module, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
        weights.append(digest(module.state_dict()))
    assert len({*weights}) == 1
    free = Line()
    fit(free, gradient_clip_val=None)
    assert digest(free.state_dict()) != weights[0]


def test_a_batch_is_moved_to_the_device_of_the_run_alone():
    class Moves(Line):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return super().transfer_batch_to_device(batch, torch.device("meta"), dataloader_idx)

    with pytest.raises(ValueError, match="moves to the run's cpu, not to meta"):
        fit(Moves())
    with pytest.raises(RuntimeError, match="Line is with no trainer yet"):
        Line().transfer_batch_to_device([], torch.device("cpu"), 0)


def test_a_helper_that_the_module_calls_itself_may_be_named_like_a_hook(caplog):
    class Calls(Line):
        def __init__(self):
            super().__init__()
            self.ended = 0

        def on_train_epoch_end(self):
            self.on_epoch_end()

        def on_epoch_end(self):
            self.ended += 1

    module = Calls()
    fit(module)
    assert module.ended == 2
    assert "no event" not in caplog.text


def test_a_method_that_looks_like_a_hook_is_refused_or_warned_of(caplog):
    class Old(Line):
        def on_epoch_end(self):
            super().on_epoch_end()

    class Helper(Line):
        def on_train_metrics(self):
            pass

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(points(), 8)

        def on_train_epoch_start(self):
            raise AssertionError("nobody calls it")

    with pytest.raises(ValueError, match=r"Old.on_epoch_end\(\) is no event that is told here"):
        fit(Old())
    with pytest.raises(ValueError, match=r"Begins.on_train_begin\(\) is no event .*, did you mean 'on_train_end'"):
        fit(type("Begins", (Line,), {"on_train_begin": print})())
    fit(Helper())
    assert "Helper.on_train_metrics() is no event that is told here, and nothing in its class calls it" in caplog.text
    Trainer(max_epochs=1, **QUIET).fit(Line(), datamodule=Data())
    assert "Data.on_train_epoch_start() is no event that is told here" in caplog.text


def test_what_training_needs_is_asked_for_by_name_and_a_prediction_needs_no_training():
    class Net(LightningModule):
        def forward(self, inputs):
            return inputs[0] * 2

    class Steps(Line):
        configure_optimizers = LightningModule.configure_optimizers

    loader = DataLoader(points(), 8)
    with pytest.raises(ValueError, match=r"Net has no training_step\(\), without which there is nothing to fit"):
        Trainer(**QUIET).fit(Net(), loader)
    predicted = Trainer(**QUIET).predict(Net(), loader)
    assert [one.tolist() for one in predicted] == [(batch[0] * 2).tolist() for batch in loader]
    steps = type("Lacks", (Line,), {"configure_optimizers": None})()
    with pytest.raises(ValueError, match=r"Lacks has no configure_optimizers\(\), without which"):
        Trainer(**QUIET).fit(steps, loader)


@pytest.mark.parametrize(
    ("stage", "given", "words"),
    [
        ("validate", {}, r"Bare has no validation_step\(\), without which there is nothing to validate"),
        ("test", {}, r"Bare has no test_step\(\), without which there is nothing to test"),
        ("predict", {}, r"Bare has no predict_dataloader\(\), and no data module or loader is given"),
        ("fit", {"train_dataloader": None}, r"Bare has no train_dataloader\(\), and no data module or loader is given"),
        ("fit", {"training_step": lambda self, dataloader_iter: 0}, r"Bare.training_step\(dataloader_iter\) is given"),
    ],
)
def test_what_a_stage_needs_is_asked_for_by_name(stage, given, words):
    lacking = {"validation_step": None, "val_dataloader": lambda self: None}
    if given == {"train_dataloader": None}:
        given = {"train_dataloader": lambda self: None}
    module = type("Bare", (Line,), {**lacking, **given})()
    with pytest.raises(ValueError, match=words):
        getattr(Trainer(max_epochs=1, **QUIET), stage)(module)


def test_a_module_of_torch_compile_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match="is one of torch.compile: give the module itself, and the plugin compile"):
        hookline.Trainer(torch.compile(Line(), backend="eager"), {"lightning": {}})


def test_a_validation_that_nothing_comes_of_is_warned_of(caplog):
    fit(type("NoStep", (Line,), {"validation_step": None})())
    assert "there are validation data, and NoStep has no validation_step(): nothing is validated" in caplog.text
    fit(type("NoData", (Line,), {"val_dataloader": lambda self: None})())
    assert "NoData has validation_step() and no validation data: nothing is validated" in caplog.text
    caplog.clear()
    fit(type("NoData", (Line,), {"val_dataloader": lambda self: None})(), limit_val_batches=0)
    assert "nothing is validated" not in caplog.text


def test_a_data_module_hears_of_an_error():
    class Data(LightningDataModule):
        heard = None

        def train_dataloader(self):
            raise OSError("no disk")

        def on_exception(self, exception):
            self.heard = exception

    data = Data()
    with pytest.raises(OSError, match="no disk") as caught:
        Trainer(max_epochs=1, **QUIET).fit(Line(), datamodule=data)
    assert data.heard is caught.value


# Parameters -----------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    lr: float
    depth: int = 2


def hparams_cases(base):
    """Return, by name, what makes a module of this base, and the parameters that it keeps."""

    class Base(base):
        def __init__(self, lr, size=3):
            super().__init__()
            self.save_hyperparameters()

    class Child(Base):
        def __init__(self, lr, width, *others, **more):
            super().__init__(lr)

    class Ignoring(Base):
        def __init__(self, lr, net):
            super().__init__(lr)
            self.save_hyperparameters(ignore=["net", "size"])

    class Helped(base):
        def __init__(self, lr):
            super().__init__()
            self.keep(1)

        def keep(self, other):
            self.save_hyperparameters()

    class Framed(base):
        def __init__(self, lr, size):
            super().__init__()
            keep_of(self, inspect.currentframe())

    class Given(base):
        def __init__(self, given):
            super().__init__()
            self.save_hyperparameters(given)

    @dataclasses.dataclass(eq=False)
    class Plain(base):
        lr: float
        size: int = 3
        kept: int = dataclasses.field(default=0, init=False)

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters()

    return {
        "all": (lambda: Base(0.1), {"lr": 0.1, "size": 3}),
        "of a child too": (lambda: Child(0.1, 2, 9, depth=4), {"lr": 0.1, "size": 3, "width": 2, "depth": 4}),
        "ignored": (lambda: Ignoring(0.1, "net"), {"lr": 0.1}),
        "from a helper": (lambda: Helped(0.1), {"lr": 0.1}),
        "of a frame": (lambda: Framed(0.1, 2), {"size": 2}),
        "a namespace": (lambda: Given(argparse.Namespace(a=1, b="x")), {"a": 1, "b": "x"}),
        "a dictionary": (lambda: Given({"a": 1}), {"a": 1}),
        "nothing": (lambda: Given({}), {}),
        "a module that is a dataclass": (lambda: Plain(0.1), {"lr": 0.1, "size": 3}),
    }


def keep_of(module, frame):
    module.save_hyperparameters("size", frame=frame, logger=False)


HPARAMS = hparams_cases(LightningModule)  # test_package_loaders.py compares them with what Lightning 2.6.6 keeps


class Given(LightningModule):
    def __init__(self, given):
        super().__init__()
        self.save_hyperparameters(given)


@pytest.mark.parametrize("name", HPARAMS)
def test_parameters_are_kept(name):
    make, expected = HPARAMS[name]
    module = make()
    assert dict(module.hparams) == dict(module.hparams_initial) == expected
    module.hparams["later"] = 1
    module.hparams_initial["never"] = 1
    assert dict(module.hparams_initial) == expected
    assert module.hparams.later == 1


def test_parameters_of_a_dataclass_and_of_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    assert Given(Config(0.1)).hparams == {"lr": 0.1, "depth": 2}
    module = Given(omegaconf.OmegaConf.create({"model": {"lr": 0.1}, "twice": "${model.lr}"}))
    assert module.hparams.model.lr == module.hparams.twice == 0.1
    assert omegaconf.OmegaConf.is_config(module.hparams)
    with pytest.raises(ValueError, match="a int is no collection of parameters; give a dict"):
        Given(3)


# Small doors ------------------------------------------------------------------------------


def test_a_module_outside_a_run():
    module = Line()
    assert (module.device.type, module.dtype, module.on_gpu) == ("cpu", torch.float32, False)
    assert (module.logger, module.loggers, module.fabric) == (None, [], None)
    assert (module.current_epoch, module.global_step, module.global_rank, module.local_rank) == (0, 0, 0, 0)
    assert module.double().dtype == torch.float64
    assert module.example_input_array is None
    assert module.freeze() is module.unfreeze() is module
    with pytest.raises(RuntimeError, match="Line is with no trainer yet"):
        _ = module.trainer
    with pytest.raises(ValueError, match="Fabric is not here"):
        module.fabric = object()
    with pytest.raises(NotImplementedError, match="to_torchscript is not here: .* torch.export.export"):
        module.to_torchscript("model.pt", method="trace")
    with pytest.raises(ValueError, match="to_onnx needs input_sample, or self.example_input_array"):
        module.to_onnx("model.onnx")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning:onnxscript")
def test_a_module_is_written_as_onnx():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module = Line().train()
    module.example_input_array = torch.zeros(1, 4)
    module.to_onnx("model.onnx", dynamo=True)
    assert onnx.load("model.onnx").graph.output
    assert module.training


def test_a_data_module_of_data_sets():
    class Sized(LightningDataModule):
        def __init__(self, word, batch_size=1):
            super().__init__()
            self.save_hyperparameters()

    made = Sized.from_datasets(points(), [points(), points(8)], {"a": points()}, batch_size=4, word="x")
    assert dict(made.hparams) == {"word": "x", "batch_size": 4}
    loader = made.train_dataloader()
    assert (loader.batch_size, type(loader.sampler).__name__) == (4, "RandomSampler")
    assert [len(one) for one in made.val_dataloader()] == [6, 2]
    assert type(made.test_dataloader()["a"].sampler).__name__ == "SequentialSampler"
    assert not hasattr(made, "predict_dataloader")
    Trainer(max_epochs=1, **QUIET).fit(Line(), datamodule=made)


class Place(CallbackInterface):
    """Says that this process is the first of the second machine."""

    @hookimpl
    def get_ranks(self):
        return 1, 0, 1


@pytest.mark.parametrize(("each", "prepared"), [(True, 1), (False, 0)])
def test_data_are_prepared_on_each_machine_or_once(each, prepared):
    class Data(LightningDataModule):
        prepare_data_per_node = each
        prepared = 0

        def prepare_data(self):
            self.prepared += 1

        def train_dataloader(self):
            return DataLoader(points(), 8)

    data = Data()
    hookline.Trainer(Line(), {"place": Place(), "lightning": {"datamodule": data}}, epochs=1).train()
    assert data.prepared == prepared


def test_the_cause_of_a_property_that_fails_is_told():
    class Gan(Line):
        automatic_optimization = property(lambda self: not self.config.gan)

    with pytest.raises(RuntimeError, match="Gan.automatic_optimization: 'Gan' object has no attribute 'config'"):
        fit(Gan())


@pytest.mark.parametrize("options", [{"enable_graph": True}, {"sync_dist_group": object()}])
def test_what_log_cannot_do_is_refused(options):
    class Logs(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss, **options)
            return loss

    with pytest.raises(ValueError, match=r"self.log\('mine'\): enable_graph=True and sync_dist_group are not here"):
        fit(Logs())
