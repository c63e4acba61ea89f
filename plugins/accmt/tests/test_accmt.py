"""Programs for ACCMT run here, with the bits of the same run said in hookline's own words."""

import copy
import json
import math
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import hookline
from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.cli import main
from hookline.testing import TinyModule, check_plugin, digest, run_ranks
from hookline.testing.faults import PRELOADED, at_file, at_hook, failing, kill, run
from hookline_accmt import (
    AcceleratorModule,
    Accmt,
    Aim,
    ClearML,
    CometML,
    DVCLive,
    Handler,
    HyperParameters,
    Metric,
    MLFlow,
    Monitor,
    Optimizer,
    Scheduler,
    TensorBoard,
    Trainer,
    WandB,
    accelerator,
    set_seed,
)
from hookline_runs import read_run

PRELOADED += ["hookline_accmt"]
pytestmark = pytest.mark.plugins  # its trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    set_seed(0)


# Programs -----------------------------------------------------------------------------


def points(number=40, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


def network(seed=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))


class ExampleModule(AcceleratorModule):
    """The example of the seed's document, with what its dots leave out."""

    def __init__(self):
        self.model = network()
        self.seen = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, status_dict):
        x, y = batch
        self.seen.append({"train": True, **status_dict})
        train_loss = torch.nn.functional.cross_entropy(self(x), y)
        return train_loss

    def validation_step(self, batch, status_dict):
        x, y = batch
        self.seen.append({"train": False, **status_dict})
        predictions = self(x)
        references = y
        val_loss = torch.nn.functional.cross_entropy(predictions, references)
        return {
            "loss": val_loss,
            "accuracy": (predictions, references),
            "sure": predictions.softmax(dim=1).amax(),
        }


class Measured(ExampleModule):
    """Brings the metric of its pairs."""

    def get_metrics(self):
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(2)}


class Regressor(AcceleratorModule):
    """One step for both, an own optimizer, schedule, collation and loaders."""

    def __init__(self, size=4):
        self.model = network()
        self.size = size
        self.collated = 0
        self.asked = []

    def step(self, batch):
        x, y = batch
        return (self.model(x)[:, 0] - y).square().mean()

    def collate_fn(self, batch):
        self.collated += 1
        x, y = zip(*batch, strict=True)
        return torch.stack(x), torch.stack(y).float()

    def get_optimizer(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def get_scheduler(self, optimizer, steps_per_epoch, epochs):
        self.asked.append((steps_per_epoch, epochs))
        return torch.optim.lr_scheduler.StepLR(optimizer, steps_per_epoch)


class Loading(Regressor):
    def get_train_dataloader(self):
        self.asked.append("train")
        return DataLoader(points(), batch_size=self.size, shuffle=True, collate_fn=self.collate_fn)

    def get_validation_dataloader(self):
        self.asked.append("val")
        return DataLoader(points(12, 2), batch_size=5, collate_fn=self.collate_fn)


class Student(AcceleratorModule):
    """Learns from a teacher."""

    def __init__(self):
        self.model = network()
        self.teacher = torch.nn.Sequential(network(7))

    def training_step(self, batch):
        x, _ = batch
        assert not self.teacher.training
        with_grad = self.teacher(x)
        assert not with_grad.requires_grad
        return torch.nn.functional.mse_loss(self.model(x), with_grad)

    validation_step = training_step


HPS = {
    "epochs": 2,
    "batch_size": 4,
    "optim": {"type": "AdamW", "lr": "1e-2", "betas": [0.9, "0.99"]},
    "scheduler": {"type": "LinearWithWarmup", "warmup_ratio": 0.1},
}


def made(hps=HPS, **given):
    return Trainer(hps, "out/model", **{"verbose": False, **given})


def trained(module=None, faults=(), train=None, val="points", **given):
    """Train; return the trainer's core."""
    module = ExampleModule() if module is None else module
    trainer = made(**given)
    dataset = points() if train is None and not hasattr(module, "get_train_dataloader") else train
    validation = points(12, 2) if isinstance(val, str) and not hasattr(module, "get_validation_dataloader") else None
    if val is None:
        validation = None
    core = trainer._build(module, {"train_dataset": dataset, "val_dataset": validation}, trainer._resume())
    for fault in faults:
        core.plugins.register(fault)
    core.train()
    return core


def rows(core, name):
    return [row[name] for row in read_run(core.run_dir).rows if name in row]


def plan(**given):
    listed = made(**given).plan()
    return {name for row in listed for name in (*row["done_by"], *row["wrapped_by"])} - {"core", "module", "accmt"}


def test_contract():
    check_plugin(Accmt)


def test_the_example_of_the_seed_trains(caplog):
    module = ExampleModule()
    assert len(module) == 6 * 8 + 8 + 8 * 2 + 2
    trainer = made()
    trainer.fit(module, points(), points(12, 2))
    assert trainer.core.global_step == 20
    assert trainer.status_dict["evaluations_done"] == 2
    inputs, references = points(12, 2).tensors
    module.model.eval()
    right = (module(inputs).argmax(dim=1) == references).double().mean().item()
    assert set(trainer.status_dict["additional_metrics"]) == {"accuracy", "sure"}
    assert trainer.status_dict["additional_metrics"]["accuracy"] == right
    assert "no metric has this name" not in caplog.text
    assert module(torch.zeros(1, 6)).shape == (1, 2)
    assert "<" in repr(module)
    assert Path("out/model/best_valid_loss/pytorch_model.pt").is_file()
    other = network(9)
    other.load_state_dict(torch.load("out/model/best_valid_loss/pytorch_model.pt"))


def test_pairs_are_computed_by_the_metric_of_their_name():
    core = trained(Measured())
    assert set(core.module.user.status_dict["additional_metrics"]) == {"accuracy", "sure"}
    assert rows(core, "val_accuracy")


def test_a_module_with_one_step_and_all_its_own_methods():
    module = Regressor()
    core = trained(module, hps=HyperParameters(epochs=2, batch_size=(4, 6)), grad_accumulation_steps=2)
    assert module.collated == 2 * (10 + 2)
    assert module.asked == [(5, 2)]
    assert type(core.optimizers[0]).__name__ == "SGD"
    assert core.global_step == 10
    own = Loading()
    core = trained(own, train=points(4), val=points(4))  # its own go before
    assert own.asked == ["train", (10, 2), "val"]
    assert core.counters.evaluations == 2


class Ported(ModuleInterface):
    """The example ported by hand."""

    def __init__(self):
        super().__init__()
        self.model = network()

    def train_step(self, global_step, batch, device):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.model(x), y)

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(points(), batch_size, sampler=sampler(points()))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(points(12, 2), batch_size, sampler=sampler(points(12, 2)))

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        total, warm = estimated_global_steps_per_epoch * epochs, 2
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: step / warm if step < warm else 1 - (step - warm) / (total - warm)
        )
        return [optimizer], [ramp]


def test_the_bits_are_those_of_the_module_ported_by_hand():
    core = trained()
    ported = Ported()
    plain = hookline.Trainer(
        ported, {"jsonl": {}}, epochs=2, train_batch_size=4, val_batch_size=4, log_every="1 steps", runs_folder="plain"
    )
    plain.train()
    assert digest(core.module.state_dict()) == digest(ported.state_dict())
    for name in ("train_loss", "val_loss"):
        assert rows(core, name) == rows(plain, name)
        assert len(rows(core, name)) == {"train_loss": 20, "val_loss": 2}[name]


# The same bits ------------------------------------------------------------------------


def ended(core):
    user = core.module.user
    return digest(core.module.state_dict()), dict(user.status_dict), digest(core.optimizers[0].state_dict())


class Branching(ExampleModule):
    """A part of the model gets no gradient in most of the batches."""

    def __init__(self):
        super().__init__()
        self.model.append(torch.nn.Linear(2, 2))

    def training_step(self, batch, status_dict):
        x, y = batch
        logits = self.model[:3](x)
        if status_dict["global_step"] in (1, 2, 6):
            logits = self.model[3](logits)
        return torch.nn.functional.cross_entropy(logits, y)


CUTS = {
    "example": {"checkpoint_every": "3 steps", "grad_accumulation_steps": 2, "evaluate_every_n_steps": 4},
    "own loaders": {"checkpoint_every": "7 steps", "clip_grad": 0.5},
    "teacher": {"checkpoint_every": "2 evals", "evaluate_every_n_steps": 3},
    "sampled": {"checkpoint_every": "3 steps", "set_to_none": False},
}


def cut(kind, *faults, **given):
    module = {"own loaders": Loading, "teacher": Student, "sampled": Branching}.get(kind, ExampleModule)()
    if kind == "sampled":
        given["sampler"] = lambda dataset: WeightedRandomSampler([1.0] * 20 + [3.0] * 20, 36)
    return ended(trained(module, faults, **CUTS[kind], **given))


def cut_until_killed(kind):
    cut(kind, at_hook("on_end_backward", kill, nth=14), checkpoint="cut")


@pytest.mark.parametrize("kind", CUTS)
def test_a_run_that_is_killed_goes_on_with_the_same_bits(kind):
    assert run(cut_until_killed, kind).code == -signal.SIGKILL
    assert cut(kind, checkpoint="cut", resume=True) == cut(kind)


def two_ranks(faults=(), **given):
    torch.set_num_threads(1)
    ends = []
    for name, module in (("example", ExampleModule()), ("own", Loading(3)), ("teacher", Student())):
        given["checkpoint"] = f"ranks/{name}"
        hps = {**HPS, "batch_size": 3}
        core = trained(module, faults if name == "teacher" else (), checkpoint_every="2 steps", hps=hps, **given)
        weights, status, state = ended(core)
        ends.append((weights, status["best_valid_loss"], state, core.global_step))
    return ends


def two_ranks_until_killed():
    two_ranks([at_hook("on_end_backward", kill, nth=5)])


def two_ranks_go_on():
    return two_ranks(resume=True)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_share_the_data_and_go_on_after_a_kill():
    whole = run_ranks(two_ranks, 2)
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    assert whole[0].value == whole[1].value
    assert [end[-1] for end in whole[0].value] == [2 * math.ceil(40 / 6)] * 3  # batches of 3 on each of two ranks
    shutil.rmtree("ranks")
    assert all(outcome.code != 0 for outcome in run_ranks(two_ranks_until_killed, 2))
    gone_on = run_ranks(two_ranks_go_on, 2)
    assert [outcome.value for outcome in gone_on] == [outcome.value for outcome in whole], gone_on[0].output


PROGRAM = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from hookline_accmt import AcceleratorModule

def points(number, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.sum(dim=1))

def stacked(samples):
    return torch.utils.data.default_collate(samples)

class Line(AcceleratorModule):
    def __init__(self, width=4):
        self.model = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1))

    def step(self, batch):
        x, y = batch
        return (self.model(x)[:, 0] - y).square().mean()
"""


def test_the_yaml_it_writes_trains_to_the_same_bits(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    import program

    hps = HyperParameters(2, 4, Optimizer.AdamW, {"lr": 1e-2}, Scheduler.LinearWithWarmup, {"warmup_ratio": 0.1})
    arguments = {
        "hps": hps,
        "log_with": TensorBoard,
        "clip_grad": 1,
        "grad_accumulation_steps": 2,
        "collate_fn": [program.stacked],
        "monitor": {},
    }
    set_seed(5)
    trainer = made(**arguments)
    data = {"train_dataset": {"_target_": "program.points", "number": 40}}
    data["val_dataset"] = {"_target_": "program.points", "number": 12, "seed": 2}
    Path("run.yaml").write_text(trainer.to_yaml({"_target_": "program.Line", "width": 3}, **data))
    trainer.fit(program.Line(width=3), program.points(40), program.points(12, 2))
    assert main(["fit", "run.yaml"]) == 0
    ours, theirs = (Path(f"out/checkpoint-model-{n}/checkpoints/step-000000000010/model.safetensors") for n in (1, 2))
    assert ours.read_bytes() == theirs.read_bytes()
    assert yaml.safe_load(Path("run.yaml").read_text())["trainer"]["seed"] == 5
    sys.modules.pop("program")


# Status -------------------------------------------------------------------------------


def test_the_status_is_live_and_changes_when_the_seed_says():
    module = ExampleModule()
    core = trained(module, hps={**HPS, "batch_size": [4, 5]})
    steps = [row for row in module.seen if row["train"]]
    assert [row["epoch"] for row in steps] == [0] * 10 + [1] * 10
    assert [row["epoch_step"] for row in steps] == [*range(10)] * 2
    assert [row["global_step"] for row in steps] == [*range(20)]
    assert steps[0]["best_train_loss"] == steps[0]["best_valid_loss"] == math.inf
    assert steps[10]["best_valid_loss"] == rows(core, "val_loss")[0]
    assert steps[10]["best_train_loss"] == rows(core, "train_loss_epoch")[0]
    assert [row["evaluations_done"] for row in steps] == [0] * 10 + [1] * 10
    assert steps[9]["additional_metrics"] == {}
    assert set(steps[10]["additional_metrics"]) == {"accuracy", "sure"}
    validations = [row for row in module.seen if not row["train"]]
    assert [row["eval_global_step"] for row in validations] == [*range(6)]
    assert {(row["epoch_step"], row["global_step"]) for row in validations} == {(9, 10), (9, 20)}
    status = module.status_dict
    assert isinstance(status, Mapping)
    assert (status["epoch"], status["global_step"], status["eval_global_step"]) == (1, 20, 6)
    assert "skip_batches" not in status
    with pytest.raises(KeyError, match="'skip_batches'; there are best_train_loss"):
        status["skip_batches"]


class Counting(ExampleModule):
    """Keeps a number of its own in the status."""

    def training_step(self, batch, status_dict):
        status_dict["mine"] = status_dict.get("mine", 0) + 1
        return super().training_step(batch, status_dict)


def test_the_status_is_a_dictionary_with_room_for_keys_of_ones_own():
    module = Counting()
    trainer = made(hps={**HPS, "epochs": 1}, checkpoint_every="3 steps")
    with pytest.raises(AttributeError, match="Counting has no status_dict before fit"):
        module.status_dict  # noqa: B018
    trainer.fit(module, points(), points(12, 2))
    status = trainer.status_dict
    assert isinstance(status, dict)
    assert status is module.status_dict
    plain = dict(status)
    assert json.loads(json.dumps(status)) == plain
    assert copy.copy(status) == copy.deepcopy(status) == pickle.loads(pickle.dumps(status)) == status.copy() == plain
    assert (status | {"a": 1})["a"] == 1
    assert {**status, **{}} == plain
    assert (plain["mine"], plain["global_step"], "skip_batches" in plain) == (10, 10, True)
    resumed = Counting()
    made(resume=True, checkpoint_every="3 steps").fit(resumed, points(), points(12, 2))
    assert resumed.status_dict["mine"] == 20


def test_a_module_that_was_trained_is_pickled_and_copied():
    module = ExampleModule()
    before = copy.deepcopy(module)
    made(hps={**HPS, "epochs": 1}).fit(module, points(), points(12, 2))
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert digest(other.model.state_dict()) == digest(module.model.state_dict())
        assert other.status_dict == module.status_dict
        made(checkpoint="again").fit(other, points())
    assert digest(before.model.state_dict()) != digest(module.model.state_dict())


def test_the_batches_that_a_checkpoint_has_are_in_the_status():
    module = ExampleModule()
    trained(module, checkpoint_every="3 steps")
    steps = [row["skip_batches"] for row in module.seen if row["train"]]
    assert steps == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 0, 0, 2, 2, 2, 5, 5, 5, 8, 8]


def test_accumulated_batches_are_counted_one_by_one():
    module = ExampleModule()
    trained(module, grad_accumulation_steps=3)
    steps = [(row["epoch_step"], row["global_step"]) for row in module.seen if row["train"]]
    assert steps == [(n % 10, n) for n in range(20)]


# The teacher --------------------------------------------------------------------------


def test_a_teacher_is_no_part_of_what_is_trained_and_saved():
    module = Student()
    before = digest(module.teacher.state_dict())
    core = trained(module)
    assert digest(module.teacher.state_dict()) == before
    held = {id(p) for group in core.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.model.parameters()}
    assert not any("teacher" in name for name in core.module.state_dict())
    saved = torch.load("out/model/best_valid_loss/pytorch_model.pt")
    assert sorted(saved) == sorted(module.model.state_dict())
    shared = Student()
    shared.teacher = torch.nn.Sequential(shared.model)
    with pytest.raises(ValueError, match=r"Student.teacher has parameters of self.model \(0.0.weight\)"):
        trained(shared)


def test_model_and_teacher_are_compiled():
    torch._dynamo.reset()
    module = Student()
    core = made(compile=True)._build(module, {"train_dataset": points(8), "val_dataset": None})
    core.plugins.get_plugin("compile").backend = "eager"  # inductor takes long
    core.train()
    for model in (module.model, module.teacher):
        assert type(model.forward).__name__ == "Compiled"


class Replacing(CallbackInterface):
    @hookimpl(wrapper=True)
    def convert_model(self, trainer, model):
        model = yield
        model.model = torch.nn.Sequential(model.model, torch.nn.Identity())
        return model


def test_the_module_sees_what_plugins_have_made_of_its_model():
    module = ExampleModule()
    core = trained(module, [Replacing()])
    assert module.model is core.module.model
    assert isinstance(module.model[1], torch.nn.Identity)
    module.model = network()
    assert core.module.model is module.model


# Arguments ----------------------------------------------------------------------------


def test_defaults_are_those_of_the_seed():
    trainer = made()
    core = trainer._build(Regressor(), {"train_dataset": points(), "val_dataset": points()})
    options, plugins = core.options, dict(core.plugins.listed())
    assert (options.epochs, options.train_batch_size, options.val_batch_size) == (2, 4, 4)
    assert (options.evaluate_every, options.log_every, options.resume) == ("epoch", "1 steps", False)
    assert (options.eval_when_start, options.eval_when_finish, options.report_loss_after_eval) == (False, False, True)
    assert (options.train_loss_metric_name, options.val_loss_metric_name) == ("train_loss", "val_loss")
    assert (options.runs_folder, options.run_name) == ("out", "checkpoint-model")
    assert set(plugins) - {"module", "core"} == {"accmt", "checkpoint", "jsonl", "model_saving"}
    saving = plugins["model_saving"]
    assert (saving.policy, saving.safe_serialization, saving.max_shard_size) == ("best_valid_loss", False, "10GB")
    assert plugins["checkpoint"].every == "epoch"
    accmt = plugins["accmt"]
    assert (accmt.shuffle_train, accmt.shuffle_validation, accmt.set_to_none) == (True, False, True)
    assert (accmt.dataloader_pin_memory, accmt.dataloader_num_workers) == (True, 0)


def test_arguments_become_plugins():
    assert plan() == {"checkpoint", "jsonl", "model_saving"}
    assert plan(verbose=True) == plan() | {"progress"}
    assert "accumulate" not in plan(grad_accumulation_steps=1)
    assert plan(checkpoint_every="eval") == plan()
    every = {"grad_accumulation_steps": 2, "clip_grad": 0.5, "compile": True, "handlers": Handler.ALL, "monitor": {}}
    assert plan(**every) == plan() | {"accumulate", "clip", "compile", "guard", "monitor"}
    assert {row["hook"] for row in made().plan()} >= {"adapt_module", "save", "update"}


def test_gradients_are_clipped_by_an_int_too():
    norms = []

    class Norms(CallbackInterface):
        @hookimpl(trylast=True)
        def on_begin_optimizer_step(self, optimizers):
            params = [p.grad for p in optimizers[0].param_groups[0]["params"]]
            norms.append(torch.nn.utils.get_total_norm(params).item())

    class Steep(ExampleModule):
        def training_step(self, batch):
            return super().training_step(batch, self.status_dict) * 100

    trained(Steep(), [Norms()], clip_grad=1)
    assert max(norms) <= 1.001
    assert min(norms) > 0.99


def test_the_last_batches_of_an_epoch_are_stepped():
    core = trained(grad_accumulation_steps=4)  # 10 batches: 4, 4 and 2
    assert core.global_step == 6


@pytest.mark.parametrize(
    ("given", "cadence"),
    [
        ("2 epochs", "2 epochs"),
        ("eval", "eval"),
        ("1eval", "1eval"),
        ("3 evaluations", "3 evaluations"),
        ("50 steps", "50 batches"),
        ("30ep", "30ep"),
        (" Step ", "1 batches"),
        (None, None),
    ],
)
def test_the_grammar_of_checkpoint_every(given, cadence):
    assert made(checkpoint_every=given)._plugins["checkpoint"] == {"every": cadence}


@pytest.mark.parametrize("given", ["3 fortnights", "1000", "2.5 steps", "0 steps", 50])
def test_a_cadence_that_is_none_is_an_error(given):
    with pytest.raises(ValueError, match=f"checkpoint_every={re.escape(repr(given))}: .* is not a cadence"):
        made(checkpoint_every=given)
    with pytest.raises(ValueError, match=r"checkpoint_every='2.5 epochs': ACCMT has whole epochs alone"):
        made(checkpoint_every="2.5 epochs")


class NoValidation(Regressor):
    def get_validation_dataloader(self):
        return None


@pytest.mark.parametrize("module", [Regressor(), NoValidation()])
def test_checkpoints_of_evaluations_need_validation_data(module):
    with pytest.raises(ValueError, match="checkpoint_every='2 evals' saves after evaluations, and there are no valid"):
        trained(module, train=points(), val=None, checkpoint_every="2 evals")
    assert module.collated == 0


def saves(core):
    return [int(path.name[5:]) for path in sorted((core.run_dir / "checkpoints").glob("step-*"))]


def test_checkpoints_come_when_they_should():
    def steps(**given):
        return saves(trained(**given))

    assert steps() == [10, 20]
    assert steps(checkpoint_every="2 epochs") == [20]
    assert steps(checkpoint_every="8 steps", hps={**HPS, "epochs": 1}) == [8, 10]
    assert steps(checkpoint_every="2 evals", evaluate_every_n_steps=3, hps={**HPS, "epochs": 1}) == [6, 10]
    assert steps(checkpoint_every=None) == []


def test_evaluations_come_when_they_should():
    def evaluations(**given):
        heard = []

        class Hears(CallbackInterface):
            @hookimpl
            def on_end_validation(self, trainer):
                heard.append(trainer.counters.batches)

        trained(faults=[Hears()], hps={**HPS, "epochs": 1}, **given)
        return heard

    assert evaluations() == [10]
    assert evaluations(evaluate_every_n_steps=4) == [4, 8, 10]
    assert evaluations(evaluate_every_n_steps=5) == [5, 10]  # the last is not done twice
    assert evaluations(evaluate_every_n_steps=4, eval_when_finish=False) == [4, 8]
    assert evaluations(evaluate_every_n_steps=4, grad_accumulation_steps=3) == [6, 9, 10]
    assert evaluations(eval_when_start=True, model_saving="best_train_loss") == [0, 10]


def test_what_is_logged_and_when():
    core = trained(log_every=4, train_loss_metric_name="tl", val_loss_metric_name="vl", hps={**HPS, "epochs": 1})
    assert len(rows(core, "tl")) == 3
    assert len(rows(core, "vl")) == 1
    batches = []

    class Hears(CallbackInterface):
        @hookimpl
        def on_log(self, metrics, global_step):
            batches.extend(global_step for name in metrics if name == "val_loss_batch")

    trained(faults=[Hears()], report_loss_after_eval=False, log_every=2, hps={**HPS, "batch_size": (4, 3)})
    assert batches == [2, 4, 6, 8]


def test_the_monitor_says_what_is_logged():
    core = trained(monitor=Monitor(learning_rate=True, grad_norm=True, train_loss=False), log_every=5)
    logged = {name for row in read_run(core.run_dir).rows for name in row}
    assert {"learning_rate", "grad_norm", "val_loss", "val_sure"} <= logged
    assert "train_loss" not in logged
    core = trained(monitor={"validation_loss": False, "additional_metrics": False})
    logged = {name for row in read_run(core.run_dir).rows for name in row}
    assert "train_loss" in logged
    assert not {"val_loss", "val_sure"} & logged
    assert made(monitor={"cpu_utilization": True, "gpu_utilization": True})._plugins["monitor"]["gpu_utilization"]
    assert made(monitor=Monitor(throughput=True))._plugins["monitor"] == {"throughput": True}
    assert made(monitor=Monitor(val_equal_train=True))._plugins["monitor"] == {}
    with pytest.raises(ValueError, match="val_equal_train=False: values of validation lie at the steps of training"):
        Monitor(val_equal_train=False)
    with pytest.raises(TypeError, match="monitor has no 'grad_nrom', did you mean 'grad_norm'"):
        Monitor(grad_nrom=True)


class Hit(Metric):
    """ACCMT's kind of metric: of all predictions and references at once."""

    def compute(self, predictions, references):
        right = (predictions == references).float()
        return {"hit": right.mean(), "batches": torch.tensor(float(len(predictions)))}


class Miss(Metric):
    def compute(self, predictions, references, weights):
        return {"rate": float((predictions != references).sum() / weights.sum())}


class Told(ExampleModule):
    """Returns tuples of classes for metrics, and a list of words."""

    def validation_step(self, batch):
        x, y = batch
        scores = self(x)
        classes = scores.argmax(dim=1)
        return {
            "loss": torch.nn.functional.cross_entropy(scores, y),
            "hit": (classes, y),
            "miss": (classes, y, torch.ones_like(y)),
            "words": (["a"] * len(y), ["b"] * len(y)),
            "unused": (scores, y.float()),
        }


class Words(Metric):
    def compute(self, predictions, references):
        return {"words": sum(a == b for a, b in zip(predictions, references, strict=True))}


def test_metrics_are_computed_over_the_whole_evaluation(caplog):
    module = Told()
    metrics = [Hit("hit"), Miss("miss", comparator="<", main_metric="rate"), Words("words", greater_is_better=False)]
    core = trained(module, metrics=metrics, hps={"batch_size": (4, 5)}, model_saving=["hit", "best_rate"])
    inputs, references = points(12, 2).tensors
    module.model.eval()
    hit = (module(inputs).argmax(dim=1) == references).float().mean().item()
    values = module.status_dict["additional_metrics"]
    assert values == {"hit": hit, "batches": 12.0, "rate": pytest.approx(1 - hit), "words": 0.0}
    assert caplog.text.count("for 'unused', and no metric has this name, so they are dropped") == 1
    assert caplog.text.count("so they are dropped") == 1
    saved = {name: json.loads(Path(f"out/model/best_{name}/model.json").read_text()) for name in ("hit", "rate")}
    assert saved["hit"]["metric"] == "val_hit"
    assert [core.plugins.get_plugin("model_saving")._modes[f"best_{name}"] for name in saved] == ["max", "min"]


class Score(Metric):
    def compute(self, predictions, references):
        return {"accuracy": 0.85, "other": 0.5}


def test_a_program_of_its_repository(caplog):
    """Its test of the time of the document, with TensorBoard for a server, without workers and inductor."""
    assert accelerator.num_processes == 1
    trainer = Trainer(
        hps_config=HyperParameters(
            epochs=2,
            batch_size=(2, 1, 1),
            optim=Optimizer.AdamW,
            optim_kwargs={"lr": 0.001, "weight_decay": 0.01},
            scheduler=Scheduler.LinearWithWarmup,
            scheduler_kwargs={"warmup_ratio": 0.03},
        ),
        model_path="dummy_model",
        track_name="Dummy training",
        run_name="dummy_run",
        model_saving=["accuracy"],
        evaluate_every_n_steps=1,
        checkpoint_every="eval",
        log_with=TensorBoard,
        log_every=2,
        monitor=Monitor(grad_norm=True),
        dataloader_num_workers=accelerator.num_processes - 1,
        eval_when_start=True,
        metrics=[Score("accuracy")],
    )

    class Two(ExampleModule):
        def validation_step(self, batch):
            x, y = batch
            scores = self(x)
            loss = torch.nn.functional.cross_entropy(scores, y)
            return {"loss": loss, "accuracy": (scores.argmax(dim=1), y), "my_own_metric": (scores.argmax(dim=1), y)}

    trainer.fit(Two(), points(4), points(4))
    assert trainer.status_dict["evaluations_done"] == 5
    assert trainer.status_dict["additional_metrics"] == {"accuracy": 0.85, "other": 0.5}
    assert json.loads(Path("dummy_model/best_accuracy/model.json").read_text())["step"] == 1
    assert caplog.text.count("'my_own_metric', and no metric has this name") == 1
    assert "the third is of a test set" in caplog.text


def test_a_loss_of_validation_may_be_a_whole_number():
    core = trained(
        with_steps(training_step=loss_of, validation_step=lambda self, batch: torch.tensor(3)), train=points()
    )
    assert rows(core, "val_loss") == [3.0, 3.0]


class Broken(Metric):
    def compute(self, predictions, references):
        return {"other": 1.0} if self.comparator == ">" else {"hit": "high"}


@pytest.mark.parametrize(
    ("metrics", "error", "said"),
    [
        ([3], TypeError, "metrics: 3 is no Metric; give objects of subclasses of hookline_accmt.Metric"),
        ({"a": Hit("hit")}, TypeError, "metrics: .* is no Metric"),
        ([Hit("hit"), Hit("hit")], ValueError, "metrics: hit, hit: two have one name"),
        (Metric("hit"), NotImplementedError, r"Metric needs a method compute\(self, predictions, references\)"),
        (Broken("hit"), TypeError, "Broken.compute must return a dictionary with 'hit' in it; it returned .*other"),
        (Broken("hit", "<"), TypeError, "Broken.compute returned a str for 'hit', and no number"),
    ],
)
def test_metrics_that_cannot_be(metrics, error, said):
    with pytest.raises(error, match=said):
        trained(Told(), metrics=metrics, hps={"batch_size": 40})
    with pytest.raises(ValueError, match=r"Metric\('hit'\): comparator='==' must be \">\" or \"<\""):
        Metric("hit", "==")


@pytest.mark.parametrize(
    ("name", "best", "warned"), [("accuracy", "max", False), ("val_wer", "min", False), ("sure", "max", True)]
)
def test_a_model_is_saved_by_the_name_that_the_module_gives_a_value(name, best, warned, caplog):
    values = iter([0.2, 0.9, 0.4])

    class Scripted(ExampleModule):
        def validation_step(self, batch):
            return {"loss": self(batch[0]).mean(), name: next(values)}

    trained(Scripted(), model_saving=f"best_{name}", hps={"batch_size": 12, "epochs": 3})
    about = json.loads(Path(f"out/model/best_{name}/model.json").read_text())
    assert (about["metric"], about["step"]) == (f"val_{name}", {"max": 8, "min": 4}[best])
    said = f"nobody knows whether the largest or the smallest '{name}' is the best: the largest is taken, as ACCMT does"
    assert caplog.text.count(said) == warned


def models():
    found = sorted(Path("out/model").glob("*/model.json"))
    return {path.parent.name: json.loads(path.read_text())["step"] for path in found}


def test_models_are_saved_by_policy():
    trained(model_saving="always", evaluate_every_n_steps=6)
    trained(model_saving=["best_train_loss", "best_val_sure"])
    trained(model_saving=None)
    assert models()["always"] == 20
    assert set(models()) == {"always", "best_train_loss", "best_val_sure"}
    trained(val=None)  # without validation data
    assert "best_valid_loss" not in models()


def test_models_are_saved_below_and_above_a_value():
    trained(model_saving_below=1e-9)
    trained(model_saving_above=1e9)
    trained(model_saving_aboce=1e9)
    assert models() == {}
    trained(model_saving_below=1e9, model_saving_aboce=1e-9, safe_serialization=True, max_shard_size="200B")
    assert models()
    assert len(list(Path("out/model/best_valid_loss").glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="model_saving_above and model_saving_aboce are two names of one argument"):
        made(model_saving_above=1, model_saving_aboce=1)


def killed_while_the_model_is_replaced():
    with at_file(Path("out/model"), "fsync .new-always-*", kill, nth=2):
        trained(model_saving="always")


def test_a_model_whose_replacement_was_cut_is_there_after_the_resume():
    assert run(killed_while_the_model_is_replaced).code == -signal.SIGKILL
    assert (Path("out/checkpoint-model-1/models/always") / "pytorch_model.pt").is_file()  # whole at all times
    core = trained(model_saving="always", resume=True)
    saved = torch.load("out/model/always/pytorch_model.pt")
    assert digest(saved) == digest(core.module.user.model.state_dict())
    assert [path.name for path in Path("out/model").iterdir()] == ["always"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("out/model/best_valid_loss", "holds something else than a model that was saved here, such as one of ACCMT"),
        ("out", "cannot hold a model: .*/out stands there, and it is no folder"),
    ],
)
def test_where_no_model_can_be_saved_is_known_before_the_first_step(path, said):
    if path == "out":
        Path(path).touch()
    else:
        Path(path).mkdir(parents=True)
    module = Regressor()
    with pytest.raises(ValueError, match=said):
        trained(module, train=points())
    assert module.collated == 0


def orders(**given):
    """Return the first inputs of each sample in the order of an epoch."""
    seen = []

    class Looks(Regressor):
        def step(self, batch):
            if torch.is_grad_enabled():
                seen.extend(batch[0][:, 0].tolist())
            return super().step(batch)

    trained(Looks(), **{"hps": {"batch_size": 4}, "val": None, **given})
    inputs = points().tensors[0][:, 0].tolist()
    return [inputs.index(value) for value in seen]


def test_the_order_of_samples():
    shuffled = orders()
    assert sorted(shuffled) == [*range(40)]
    assert shuffled != [*range(40)]
    assert orders(shuffle_train=False) == [*range(40)]
    assert orders(sampler=[[3, 1], [7, 5]]) == [3, 1, 7, 5]
    assert orders(sampler=torch.utils.data.SequentialSampler) == [*range(40)]
    own = WeightedRandomSampler([1.0] * 20 + [0.0] * 20, 8, generator=torch.Generator().manual_seed(1))
    epochs = orders(sampler=own, hps={"batch_size": 4, "epochs": 2})
    assert max(epochs) < 20
    assert epochs[:8] != epochs[8:]
    assert epochs == orders(sampler=own, hps={"batch_size": 4, "epochs": 2})
    set_seed(1)
    assert orders() != shuffled  # the user's seed counts


def test_validation_may_be_shuffled():
    def order(**given):
        seen = []

        class Looks(Regressor):
            def validation_step(self, batch):
                seen.extend(batch[1].tolist())
                return self.step(batch)

        trained(Looks(), **given)
        return seen

    plain, shuffled = order(), order(shuffle_validation=True)
    assert plain == points(12, 2).tensors[1].tolist() * 2
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert shuffled[:12] == shuffled[12:]


def test_collate_functions_work_one_after_the_other():
    def first(samples):
        return torch.stack([x for x, _ in samples]), [y for _, y in samples]

    def second(batch):
        return batch[0] * 0, torch.stack(batch[1])

    module = ExampleModule()
    module.training_step = lambda batch: (module.model(batch[0]) - batch[0].abs().sum()).square().mean()
    core = trained(module, collate_fn=[first, second], dataloader_num_workers=0)
    assert core.global_step == 20
    own = Regressor()  # whose own goes before
    trained(own, collate_fn=first)
    assert own.collated

    class Mistaken(Regressor):
        @property
        def collate_fn(self):
            return self.collator.misspelt

    with pytest.raises(AttributeError, match="no attribute 'collator'"):
        trained(Mistaken(), collate_fn=first)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_load():
    assert digest(trained(dataloader_num_workers=1, hps={**HPS, "epochs": 1}, val=None).module.state_dict()) == digest(
        trained(hps={**HPS, "epochs": 1}, val=None).module.state_dict()
    )


def test_gradients_may_be_cleared_to_zero():
    seen = {}

    class Sees(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            seen[trainer.options.run_name] = next(trainer.module.parameters()).grad

    trained(faults=[Sees()], set_to_none=False, checkpoint="zeros")
    trained(faults=[Sees()], checkpoint="none")
    assert seen["none"] is None
    assert not seen["zeros"].any()


# Handlers and resume ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "error", "saved"),
    [
        (Handler.KEYBOARD, KeyboardInterrupt(), True),
        (Handler.KEYBOARD, RuntimeError("CUDA out of memory"), False),
        (Handler.CUDA_OUT_OF_MEMORY, RuntimeError("CUDA out of memory"), True),
        (Handler.CUDA_OUT_OF_MEMORY, ValueError("other"), False),
        ([Handler.ANY], ValueError("other"), True),
        (Handler.ANY, KeyboardInterrupt(), False),
        (Handler.ALL, KeyboardInterrupt(), True),
        (None, ValueError("other"), False),
    ],
)
def test_errors_lead_to_a_checkpoint_and_are_raised(handler, error, saved):
    fault = at_hook("on_end_backward", failing(error), nth=8)
    with pytest.raises(type(error)):
        trained(faults=[fault], handlers=handler)
    steps = [path.name for path in Path("out/checkpoint-model-1").glob("checkpoints/step-*")]
    assert steps == (["step-000000000007"] if saved else [])


def test_where_a_run_goes_on():
    with pytest.raises(FileNotFoundError, match="resume=True, and there is no run out/checkpoint-model-1, -2"):
        trained(resume=True)
    core = trained(resume=None, hps={**HPS, "epochs": 1})
    assert core.run_dir == Path("out/checkpoint-model-1")
    assert trained(resume=None).global_step == 20
    fresh = trained(track_name="named", checkpoint="elsewhere/point")
    assert (fresh.run_dir, fresh.module.user.seen[0]["global_step"]) == (Path("elsewhere/point-1"), 0)
    again = trained(checkpoint="elsewhere/point", resume=True, hps={**HPS, "epochs": 3})
    assert again.module.user.seen[0]["global_step"] == 20


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/step-000000000010"])
def test_a_run_goes_on_from_a_path(named):
    hps = {"batch_size": 4, "optim": {"type": "AdamW", "lr": 0.01}}
    whole = trained(checkpoint="whole", hps={**hps, "epochs": 2})
    run_dir = trained(hps=hps).run_dir
    trained(hps=hps)  # a newer run, which True would take
    again = trained(resume=run_dir / named, hps={**hps, "epochs": 2})
    assert (again.run_dir, again.module.user.seen[0]["global_step"]) == (run_dir, 10)
    assert digest(again.module.state_dict()) == digest(whole.module.state_dict())
    assert yaml.safe_load(made(resume=str(run_dir)).to_yaml(Regressor))["trainer"]["resume"] == str(run_dir)


@pytest.mark.parametrize(
    ("resume", "error", "said"),
    [
        (1, TypeError, "resume=1 is a int: give True to go on with the newest run of out/checkpoint-model-1, "),
        ("yes", ValueError, "resume='yes' is no folder: give True to go on with"),
        (Path("empty"), ValueError, r"resume='empty' holds no checkpoint: give True .* None to do so where there is"),
        ("theirs", ValueError, "resume='theirs' is a checkpoint of ACCMT, whose files are pickles .* load its weights"),
    ],
)
def test_what_no_run_goes_on_from_is_refused(resume, error, said):
    Path("empty/checkpoints").mkdir(parents=True)
    Path("theirs/checkpoint").mkdir(parents=True)
    Path("theirs/status.json").touch()
    trained(hps={**HPS, "epochs": 1})
    with pytest.raises(error, match=said):
        made(resume=resume)


def test_a_run_that_died_before_its_first_checkpoint_hides_no_other():
    first = trained(hps={**HPS, "epochs": 1})
    with pytest.raises(RuntimeError, match="died"):
        trained(faults=[at_hook("on_end_backward", failing(RuntimeError("died")), nth=3)])
    Path("out/checkpoint-model-other-1/checkpoints/step-000000000001").mkdir(parents=True)  # of another name
    again = trained(resume=True)
    assert (again.run_dir, again.module.user.seen[0]["global_step"]) == (first.run_dir, 10)
    shutil.rmtree("out/checkpoint-model-1")
    with pytest.raises(FileNotFoundError, match=r"-2 … with a checkpoint to go on with"):
        trained(resume=True)
    assert trained(resume=None).module.user.seen[0]["global_step"] == 0


def test_fits_of_one_process_do_not_mix():
    trainer = made()
    one, other = ExampleModule(), Regressor()
    trainer.fit(one, points())
    first = trainer.core
    trainer.fit(other, points())
    assert (first.run_dir.name, trainer.core.run_dir.name) == ("checkpoint-model-1", "checkpoint-model-2")
    assert trainer.status_dict is other.status_dict
    trainer.fit(one, points())
    assert one.status_dict["global_step"] == 20


# Trackers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracker", "plugin", "options", "unused"),
    [
        (TensorBoard, "tensorboard", {"folder": "logs/mine", "init": {"flush_secs": 3}}, "tags='a'"),
        (WandB, "wandb", {"project": "model", "name": "mine", "tags": ["a"]}, ""),
        (CometML, "comet", {"project": "model", "name": "mine", "tags": ["a"]}, ""),
        (Aim, "aim", {"experiment": "model", "name": "mine", "tags": ["a"]}, ""),
        (MLFlow, "mlflow", {"experiment": "model", "name": "mine", "tags": {"a": "true"}}, ""),
        (ClearML, "clearml", {"project_name": "model", "task_name": "mine", "tags": ["a"]}, ""),
        (DVCLive, "dvclive", {"exp_name": "mine", "save_dvc_exp": True}, "tags='a'"),
    ],
)
def test_trackers_are_plugins_with_their_arguments(tracker, plugin, options, unused, caplog):
    given = {"run_name": "mine", "tags": "a"}
    given |= {"flush_secs": 3} if tracker is TensorBoard else {}
    given |= {"save_dvc_exp": True} if tracker is DVCLive else {}
    trainer = made(log_with=tracker, **given)
    assert trainer._plugins[plugin] == {"axis": "batches", **options}
    assert caplog.messages == (
        [f"log_with={tracker.__name__} has no place for {unused}, which is not used"] * bool(unused)
    )
    assert plugin in plan(log_with=[tracker.__name__.lower()], **given)


def test_what_no_tracker_uses_is_said(caplog):
    assert "dvclive" in made(log_with=DVCLive, run_name="mine")._plugins
    made(log_with=WandB, logging_dir="mine")
    made(run_name="mine", tags=["a"])
    assert caplog.messages == [
        "log_with=DVCLive has no place for run_name without save_dvc_exp=True='mine', which is not used",
        "log_with=WandB: logging_dir='mine' is not used, since its files lie in the folder of the run, in 'wandb'",
        "run_name='mine' is of a tracker, and log_with names none, so it is not used",
        "tags=['a'] is of a tracker, and log_with names none, so it is not used",
    ]
    assert made(log_with=MLFlow, tags={"a": 1})._plugins["mlflow"]["tags"] == {"a": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the SDKs
@pytest.mark.parametrize(
    ("tracker", "own"),
    [
        (WandB, {"notes": "n"}),
        (CometML, {"log_code": False}),
        (Aim, {"capture_terminal_logs": False}),
        (MLFlow, {}),
        (ClearML, {"auto_resource_monitoring": False}),
        (DVCLive, {"cache_images": False}),
    ],
)
def test_trackers_keep_a_run(tracker, own, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = made(log_with=tracker, **own)
    assert trainer._plugins[tracker.plugin].get("init", {}) == own
    trainer.fit(Regressor(), points(), points(12, 2))
    assert "is switched off" not in caplog.text
    assert any((trainer.core.run_dir / tracker.plugin).iterdir())


@pytest.mark.parametrize("absolute", [False, True])
def test_values_lie_at_batches_in_tensorboard(absolute, tmp_path):
    folder = str(tmp_path / "boards") if absolute else "boards"
    core = trained(log_with=TensorBoard, logging_dir=folder, run_name="mine", grad_accumulation_steps=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = tmp_path / "boards" / "mine" / "checkpoint-model-1" if absolute else core.run_dir / "boards" / "mine"
    board = EventAccumulator(str(home)).Reload()
    assert [event.step for event in board.Scalars("train_loss")] == [*range(2, 21, 2)]


@pytest.mark.parametrize("given", ["http://localhost:5075", "localhost:5075"])
def test_trackers_are_led_to_servers(given):
    assert made(log_with=MLFlow(), logging_dir=given)._plugins["mlflow"]["tracking_uri"] == "http://localhost:5075"
    wandb = made(log_with=WandB, logging_dir=given, track_name="t")._plugins["wandb"]
    assert (wandb["mode"], wandb["project"]) == ("online", "t")
    assert wandb["init"] == {"settings": {"base_url": "http://localhost:5075"}}
    for tracker, said in [
        (DVCLive, "it has no server"),
        (TensorBoard, "it has no server"),
        (CometML, "Comet's server is said by the variable COMET_URL_OVERRIDE"),
        (ClearML, "ClearML's server is said by the variable CLEARML_API_HOST"),
    ]:
        with pytest.raises(
            ValueError, match=f"{tracker.__name__}: logging_dir='http://localhost:5075' is a URL, and {said}"
        ):
            made(log_with=tracker, logging_dir=given)
    with pytest.raises(ValueError, match="is a URL, and log_with names no tracker to lead there"):
        made(logging_dir=given)


def test_aim_is_led_to_a_server_and_a_repository(tmp_path):
    for given, repo in [("aim://a:1", "aim://a:1"), ("a:1", "aim://a:1"), (tmp_path / "aim", str(tmp_path / "aim"))]:
        assert made(log_with=Aim, logging_dir=given)._plugins["aim"]["repo"] == repo


def test_a_slip_in_an_argument_names_the_nearest():
    with pytest.raises(TypeError, match=r"Trainer has no 'clip_grads', did you mean 'clip_grad'"):
        made(clip_grads=1)
    with pytest.raises(TypeError, match=r"Trainer has no 'flush_sec', did you mean 'flush_secs'"):
        made(log_with=TensorBoard, flush_sec=1)
    with pytest.raises(TypeError, match=r"Trainer has no 'tag', did you mean 'tags'"):
        made(log_with=[TensorBoard, MLFlow], tag={})
    with pytest.raises(TypeError, match=r"Trainer has no 'grad_acumulation_steps', did you mean 'grad_accumulation"):
        made(grad_acumulation_steps=2)
    with pytest.raises(TypeError, match="log_with='wand' is no tracker; there are TensorBoard, WandB"):
        made(log_with="wand")
    with pytest.raises(TypeError, match="log_with names Aim twice"):
        made(log_with=[Aim, Aim])


def test_names_of_other_versions_say_what_to_write_instead(caplog):
    with pytest.raises(
        TypeError, match="Trainer has no 'patience', which is of another version of ACCMT: use the plugin"
    ):
        made(patience=2)
    with pytest.raises(TypeError, match=r"Own.collate_fn_val\(\) would not be called: write coll"):
        trained(with_steps(step=loss_of, collate_fn_val=list))
    with pytest.raises(
        ImportError, match="DataCollatorForSeq2Seq of ACCMT is not here: take the one of transformers, `f"
    ):
        from hookline_accmt import DataCollatorForSeq2Seq  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from hookline_accmt import Nothing  # noqa: F401
    trained(with_steps(step=loss_of, test_step=loss_of), hps={"batch_size": 20})
    assert "Own.test_step() is not called: fit trains and validates" in caplog.text


def test_a_tracker_whose_plugin_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(Aim, "plugin", "aims")
    with pytest.raises(ValueError, match=r"log_with=Aim: there is no plugin 'aims': `pip install hookline-aims`"):
        made(log_with=Aim)


# Hyperparameters ----------------------------------------------------------------------


def test_hyperparameters_are_read_from_everywhere():
    Path("hps.yaml").write_text("hps:\n  epochs: 3\n  batch_size: 8\n  optim: {type: AdamW, lr: 1e-3}\n")
    Path("hps.json").write_text(json.dumps({"epochs": 3, "batch_size": 8, "optim": {"type": "AdamW", "lr": "1e-3"}}))
    same = HyperParameters(3, 8, Optimizer.AdamW, {"lr": 0.001}).as_config()
    for given in ("hps.yaml", Path("hps.json"), yaml.safe_load(Path("hps.yaml").read_text())):
        assert HyperParameters.read(given).as_config() == same
        assert made(hps=given).hps.as_config() == same
    assert HyperParameters.read(same).as_config() == same
    kwargs = {"lr": "1e-3"}
    HyperParameters(optim_kwargs=kwargs)
    assert kwargs == {"lr": "1e-3"}  # left as it was
    theirs = {"epochs": 3, "batch_size": 8, "optimizer": {"type": "AdamW", "lr": "1e-3"}}
    assert HyperParameters.read(theirs).as_config() == same
    assert HyperParameters(3, 8, optimizer=Optimizer.AdamW, optim_kwargs={"lr": 0.001}).as_config() == same
    assert (HyperParameters(batch_size=(4, 2)).batch_size, HyperParameters(batch_size=(4, 2)).val_batch_size) == (4, 2)


def test_a_third_size_of_batches_is_not_used(caplog):
    assert HyperParameters(batch_size=(4, 2, 1)).as_config()["batch_size"] == [4, 2]
    assert "batch_size=(4, 2, 1): the third is of a test set, which fit is not given, so it is not used" in caplog.text


ARGUMENTS = {
    "StepLR": {"step_size": 2},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": "1e-2", "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "ConstantWithWarmup": {"num_warmup_steps": 3},
    "InverseSQRT": {"num_warmup_steps": 3},
    "CosineWithWarmup": {"warmup_ratio": 0.25},
    "CosineWithHardRestartsWithWarmup": {"num_warmup_steps": 0.25, "num_cycles": 2},
    "LinearWithWarmup": {"warmup_ratio": "0.25"},
    "PolynomialDecayWithWarmup": {"warmup_ratio": 0.25, "power": 2.0},
}


def rates(scheduler, optimizer, steps=12):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", [*Scheduler])
def test_schedules_by_name_move_each_step_and_are_resumed(name):
    def schedule():
        hps = HyperParameters(optim_kwargs={"lr": 0.1}, scheduler=name, scheduler_kwargs=ARGUMENTS.get(name, {}))
        optimizer = hps.make_optimizer([torch.nn.Parameter(torch.zeros(1))], torch.device("cpu"))
        return hps.make_scheduler(optimizer, 6, 2, 12), optimizer

    scheduler, optimizer = schedule()
    first = rates(scheduler, optimizer, 5)
    state = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict()))
    assert digest(state[0])  # plain data
    rest = rates(scheduler, optimizer, 6)
    scheduler, optimizer = schedule()
    optimizer.load_state_dict(state[1])
    scheduler.load_state_dict(state[0])
    assert rates(scheduler, optimizer, 6) == rest
    assert name == "Constant" or len({*first, *rest}) > 1


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("Constant", "constant"),
        ("ConstantWithWarmup", "constant_with_warmup"),
        ("LinearWithWarmup", "linear"),
        ("CosineWithWarmup", "cosine"),
        ("CosineWithHardRestartsWithWarmup", "cosine_with_restarts"),
        ("InverseSQRT", "inverse_sqrt"),
        ("PolynomialDecayWithWarmup", "polynomial"),
    ],
)
def test_schedules_are_those_of_hugging_face(name, theirs):
    transformers = pytest.importorskip("transformers", reason="the schedules are compared with its own")
    kwargs = {} if name == "Constant" else {"num_warmup_steps": 3}
    hps = HyperParameters(optim_kwargs={"lr": 0.1}, scheduler=name, scheduler_kwargs=kwargs)
    ours = hps.make_optimizer([torch.nn.Parameter(torch.zeros(1))], torch.device("cpu"))
    other = hps.make_optimizer([torch.nn.Parameter(torch.zeros(1))], torch.device("cpu"))
    scheduler = transformers.get_scheduler(theirs, other, num_warmup_steps=3, num_training_steps=12)
    assert rates(hps.make_scheduler(ours, 6, 2, 12), ours, 14) == pytest.approx(rates(scheduler, other, 14))


@pytest.mark.parametrize("scheduler", [{"type": "OneCycleLR", "max_lr": 0.1}, {"type": "LinearWithWarmup"}])
@pytest.mark.parametrize(("limits", "steps"), [({"epochs": 2}, 10), ({"max_steps": 7}, 7)])
def test_a_schedule_over_the_whole_run_ends_where_training_does(scheduler, limits, steps, caplog):
    given = {"num_warmup_steps": 2} if "max_lr" not in scheduler else {}
    hps = {"batch_size": 8, "optim": {"type": "SGD", "lr": 0.1}, "scheduler": {**scheduler, **given}}
    accmt, used = Accmt(hps=hps), []
    accmt.use(train_dataset=points())

    class Watching(CallbackInterface):
        @hookimpl
        def on_begin_optimizer_step(self, optimizers):
            used.append(optimizers[0].param_groups[0]["lr"])

    core = hookline.Trainer(ExampleModule(), {"accmt": accmt, "watching": Watching()}, **limits)
    core.train()
    assert len(used) == steps
    assert min(used[-1], core.optimizers[0].param_groups[0]["lr"]) < 1e-6  # torch's is at its end in the last step
    assert "moves" not in caplog.text


class Frozen(ExampleModule):
    """Has a norm that its user has put into eval mode, and says in which mode a step finds it."""

    def __init__(self):
        self.model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), network()).eval()
        self.modes, self.seen = [], []

    def training_step(self, batch):
        self.modes.append(self.model[0].training)
        self.model[0].eval()
        return super().training_step(batch, {})


def test_a_model_is_in_train_mode_at_each_epoch_and_after_each_evaluation(caplog):
    module = Frozen()
    trained(module, evaluate_every_n_steps=3, hps={"batch_size": 8, "epochs": 2})
    assert module.modes == [True, False, False, True, False, True, True, False, False, True]
    assert "eval mode" not in caplog.text


@pytest.mark.parametrize("name", [*Optimizer])
def test_optimizers_by_name(name):
    hps = HyperParameters(optim=name, optim_kwargs={"lr": "1e-3"})
    optimizer = hps.make_optimizer([torch.nn.Parameter(torch.zeros(1))], torch.device("cpu"))
    assert type(optimizer).__name__ == name
    assert optimizer.defaults["lr"] == 0.001
    on_cuda = hps.make_optimizer([torch.nn.Parameter(torch.zeros(1))], torch.device("cuda"))
    assert bool(on_cuda.defaults.get("fused")) is (name in ("Adam", "AdamW", "SGD"))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("gone.yaml", ValueError, "hps_config='gone.yaml' cannot be read: No such file"),
        (3, TypeError, "hps_config is a int; give a path"),
        ({"epoch": 3}, TypeError, r"hps_config has no 'epoch', did you mean 'epochs'"),
        ({"epochs": 0}, ValueError, "epochs=0 must be a whole number, at least 1"),
        ({"epochs": "two"}, ValueError, "epochs='two' must be a whole number"),
        ({"batch_size": [1, 2, 3, 4]}, ValueError, "must be one number, or two"),
        ({"optimizer": "Adamw"}, ValueError, r"optim has no 'Adamw', did you mean 'AdamW'"),
        ({"optimizer": "Adam", "optim": "SGD"}, TypeError, r"hps_config has no 'optimizer', did you mean 'optim'"),
        ({"optim": {"lr": 1}}, ValueError, "optim needs a type, as in"),
        ({"optim": "Adamw"}, ValueError, r"optim has no 'Adamw', did you mean 'AdamW'"),
        ({"optim": "LBFGS"}, ValueError, "optim has no 'LBFGS'"),
        (
            {"optim": {"type": "SGD", "momentun": 1}},
            TypeError,
            r"SGD has no 'momentun', did you mean 'momentum'",
        ),
        ({"scheduler": "Linear"}, ValueError, r"scheduler has no 'Linear', did you mean 'LinearLR'"),
        ({"scheduler": {"type": "StepLR", "size": 1}}, TypeError, "scheduler StepLR has no 'size'"),
        (
            {"scheduler": {"type": "LinearWithWarmup", "warmup_ratio": 2}},
            ValueError,
            "warmup_ratio=2 must lie between 0 and 1",
        ),
        (
            {"scheduler": {"type": "LinearWithWarmup", "warmup_ratio": 0.1, "num_warmup_steps": 1}},
            ValueError,
            "give warmup_ratio or num_warmup_steps, not both",
        ),
    ],
)
def test_hyperparameters_that_cannot_be(given, error, said):
    with pytest.raises(error, match=said):
        made(hps=given)


def test_arguments_that_an_optimizer_or_schedule_lacks_or_refuses():
    with pytest.raises(TypeError, match="scheduler CosineAnnealingLR: .* missing 1 required positional .* 'T_max'"):
        trained(hps={"scheduler": "CosineAnnealingLR"})
    with pytest.raises(ValueError, match="optim SGD: Invalid learning rate: -1"):
        trained(hps={"optim": {"type": "SGD", "lr": -1}})
    with pytest.raises(ValueError, match="scheduler_kwargs={'gamma': 1} are of no scheduler"):
        HyperParameters(scheduler_kwargs={"gamma": 1})


# What cannot be -----------------------------------------------------------------------


class Nothing(AcceleratorModule):
    def __init__(self, model=None):
        if model is not None:
            self.model = model


def with_steps(**methods):
    return type("Own", (Nothing,), methods)(torch.nn.Linear(6, 1))


def loss_of(module, batch):
    return module.model(batch[0]).mean()


@pytest.mark.parametrize(
    "step",
    [
        lambda self, batch: loss_of(self, batch),
        lambda self, batch, status_dict: loss_of(self, batch) * (1 + status_dict["epoch"]),
        lambda self, batch, status: loss_of(self, batch) * (1 + status["epoch"]),
        lambda self, batch, status_dict=None: loss_of(self, batch) * (1 + status_dict["epoch"]),
        lambda self, batch, scale=1.0: loss_of(self, batch) * scale,
        lambda self, *args: loss_of(self, *args),
        lambda self, *args, **kw: loss_of(self, *args, **kw),
        lambda self, batch, *, status_dict: loss_of(self, batch) * (1 + status_dict["epoch"]),
        lambda self, batch, scale=1.0, status_dict=None: loss_of(self, batch) * (scale + status_dict["epoch"]),
        torch.autocast("cpu", enabled=False)(lambda self, batch, status: loss_of(self, batch) * (1 + status["epoch"])),
    ],
)
def test_steps_are_given_what_they_take(step):
    assert trained(with_steps(step=step), train=points(8)).global_step == 4


def logged(function):
    def call(*args, **kwargs):  # without functools.wraps
        return function(*args, **kwargs)

    return call


class Decorated(Nothing):
    @logged
    @logged
    def training_step(self, batch, status_dict):
        return loss_of(self, batch) * (1 + status_dict["epoch"])

    @logged
    def validation_step(self, batch):
        return loss_of(self, batch)


class Overriding(Decorated):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", [Decorated, Overriding])
def test_what_a_step_wraps_says_what_it_takes(kind):
    assert trained(kind(torch.nn.Linear(6, 1)), train=points(8)).global_step == 4


@pytest.mark.parametrize(
    ("module", "error", "said"),
    [
        (Nothing(), AttributeError, "Nothing has no self.model yet: set it in __init__"),
        (Nothing(3), TypeError, "Nothing.model is a int; it must be a torch.nn.Module"),
        (with_steps(), TypeError, "Own has neither training_step"),
        (
            with_steps(training_step=loss_of),
            TypeError,
            "are validation data, and Own has neither validation_step",
        ),
        (
            with_steps(step=lambda self, key, batch: 0),
            TypeError,
            r"Own.step\(key, batch\) must take batch, or",
        ),
        (
            with_steps(step=lambda self, status_dict, batch: 0),
            TypeError,
            r"Own.step\(status_dict, batch\) must take batch, or",
        ),
        (
            with_steps(training_step=lambda self, batch: None, validation_step=loss_of),
            TypeError,
            "Own.training_step must return the loss, a tensor of one element that was computed with gradients; it .*No",
        ),
        (
            with_steps(step=lambda self, batch: self.model(batch[0])),
            TypeError,
            r"Own.step must return the loss, .* it returned a tensor of shape \(4, 1\)",
        ),
        (
            with_steps(step=lambda self, batch: loss_of(self, batch).detach()),
            TypeError,
            r"Own.step must return the loss, .* it returned a tensor of shape \(\)",
        ),
        (with_steps(step=loss_of, teacher=3), TypeError, "Own.teacher is a int"),
        (
            with_steps(training_step=loss_of, validation_step=lambda self, batch: {"los": 1}),
            TypeError,
            r"or a dictionary with it under 'loss'; it returned \{'los': 1\}",
        ),
        (
            with_steps(training_step=loss_of, validation_step=lambda self, batch: batch[0]),
            TypeError,
            r"must return the loss, a tensor of one element, .* it returned a tensor of shape \(4, 6",
        ),
        (
            with_steps(training_step=loss_of, validation_step=lambda self, b: {"loss": loss_of(self, b), "a": "x"}),
            TypeError,
            r"validation_step returned a str for 'a'; it must be a tuple \(predictions, references\), or a number",
        ),
    ],
)
def test_modules_that_cannot_be_trained(module, error, said):
    with pytest.raises(error, match=said):
        made().fit(module, points(), points())


def test_what_a_module_logs_is_logged():
    class Logs(Regressor):
        def step(self, batch):
            self.log({"size": float(len(batch[0]))})
            return super().step(batch)

    module = Logs()
    with pytest.raises(RuntimeError, match="Logs.log is for within fit"):
        module.log({"size": 1.0})
    core = trained(module, val=None, hps={"batch_size": 8})
    assert rows(core, "size") == [8.0] * 5
    with pytest.raises(ValueError, match="log: log_kwargs=.* are of one tracker"):
        module.log({"size": 1.0}, {"mlflow": {}})


def test_calls_that_cannot_be():
    with pytest.raises(TypeError, match="there is nothing to train on: give fit a train_dataset, or Regressor"):
        made().fit(Regressor())
    with pytest.raises(TypeError, match="fit\\(\\) got the class Regressor; give it an object"):
        made().fit(Regressor, points())
    with pytest.raises(TypeError, match="fit\\(\\) got torch_dtype, which are arguments of from_pretrained"):
        made().fit(Regressor(), points(), torch_dtype="auto")
    with pytest.raises(TypeError, match="Regressor is called, and has no forward"):
        Regressor()(1)
    with pytest.raises(RuntimeError, match="there has been no fit yet"):
        made().status_dict  # noqa: B018
    with pytest.raises(TypeError, match="there is no optimizer: name one in hps, or give ExampleModule get_optimizer"):
        hookline.Trainer(ExampleModule(), {"accmt": {"train_dataset": {"_target_": "torch.utils.data.Dataset"}}})


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"evaluate_every_n_steps": 0}, ValueError, "evaluate_every_n_steps=0 must be a whole number, at least 1"),
        ({"log_every": 0}, ValueError, "log_every=0 must be"),
        ({"grad_accumulation_steps": 0}, ValueError, "grad_accumulation_steps=0 must be"),
        ({"handlers": "any"}, TypeError, "handlers: 'any' is none of Handler.KEYBOARD"),
        ({"handlers": Handler.ANY, "checkpoint_every": None}, ValueError, "handlers make a checkpoint, and"),
        ({"monitor": 1}, TypeError, "monitor=1 must be a Monitor or a mapping"),
        ({"monitor": {"grad_nrom": True}}, TypeError, r"monitor has no 'grad_nrom', did you mean 'grad_norm'"),
        ({"monitor": {"grad_norm": 1}}, TypeError, "monitor: grad_norm=1 must be true or false"),
        ({"collate_fn": 3}, TypeError, "collate_fn: 3 is no function"),
        ({"model_saving": "best"}, ValueError, "^model_saving='best': 'best' is no policy"),
        ({"model_saving_below": math.nan}, ValueError, "^model_saving_below=nan: nan is no finite number"),
        ({"max_shard_size": "ten"}, ValueError, "^max_shard_size='ten' is no size"),
        ({"dataloader_num_workers": -1}, ValueError, "^dataloader_num_workers=-1 must be a whole number, at"),
        ({"dataloader_num_workers": None}, ValueError, "^dataloader_num_workers=None must be a whole number, at"),
        ({"clip_grad": "1"}, TypeError, "^clip_grad='1' must be a number, or None"),
        ({"clip_grad": 0}, ValueError, "^clip_grad=0.0 must be above 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, said):
    with pytest.raises(error, match=said):
        made(**arguments)


@pytest.mark.parametrize(
    ("train", "val", "error", "said"),
    [
        (
            DataLoader(points()),
            None,
            TypeError,
            "train_dataset is a DataLoader: give the dataset itself, or .*get_train_",
        ),
        (points(), DataLoader(points()), TypeError, "val_dataset is a DataLoader: .* get_validation_dataloader"),
        (3, None, TypeError, "train_dataset is a int, and no dataset: it needs __getitem__ and __len__"),
        (points(), {"a": points()}, TypeError, "val_dataset is a dict, and no dataset"),
        (points(0), None, ValueError, "train_dataset is empty"),
        (points(), points(0), ValueError, "val_dataset is empty"),
    ],
)
def test_datasets_that_cannot_be(train, val, error, said):
    with pytest.raises(error, match=said):
        made().fit(Regressor(), train, val)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"get_optimizer": lambda self: [1]}, r"Own.get_optimizer\(\) must return one optimizer; it returned a list"),
        ({"get_scheduler": lambda self, *_: 3}, r"Own.get_scheduler\(\) must return one scheduler; it returned a int"),
    ],
)
def test_optimizers_and_schedulers_that_cannot_be(methods, said):
    with pytest.raises(TypeError, match=said):
        made().fit(with_steps(step=loss_of, **methods), points())


def test_the_accelerator_says_which_process_this_is(monkeypatch, capsys):
    assert (accelerator.num_processes, accelerator.process_index, accelerator.is_main_process) == (1, 0, True)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (4, 3, 1)
    assert (accelerator.is_main_process, accelerator.is_local_main_process, accelerator.is_last_process) == (0, 0, 1)
    accelerator.print("not seen")
    monkeypatch.setenv("LOCAL_RANK", "0")
    accelerator.print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert accelerator.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(AttributeError, match="accelerator has no 'backward' here, .*; it has device, is_last_process"):
        accelerator.backward  # noqa: B018


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from points()


def test_a_stream_trains():
    core = trained(train=Stream(), hps={"batch_size": 5, "epochs": 2})
    assert core.global_step == 16
    with pytest.raises(ValueError, match="scheduler LinearWithWarmup: warmup_ratio is a part of all steps, and nob"):
        trained(train=Stream())
    once = {"scheduler": {"type": "OneCycleLR", "max_lr": 0.1}, "optim": "SGD"}
    with pytest.raises(ValueError, match="scheduler OneCycleLR: give total_steps, since nobody knows it: the loader"):
        trained(train=Stream(), hps=once)


def test_samplers_that_cannot_be():
    with pytest.raises(TypeError, match="sampler has nothing to draw from an IterableDataset"):
        trained(train=Stream(), sampler=[1])
    for sampler in (lambda dataset: 3, [3, 1]):
        with pytest.raises(TypeError, match="sampler: 3 must give indices and have a length"):
            trained(sampler=sampler)
    with pytest.raises(TypeError, match="samplers give single indices"):
        trained(sampler=torch.utils.data.BatchSampler(range(8), 2, False))


def test_what_a_yaml_cannot_say():
    with pytest.raises(TypeError, match="to_yaml: module is a Regressor, and nobody can know how it was made"):
        made().to_yaml(Regressor())
    with pytest.raises(TypeError, match="sampler is a list|to_yaml: sampler is a"):
        made(sampler=WeightedRandomSampler([1.0], 1)).to_yaml(Regressor)
    with pytest.raises(TypeError, match="cannot be imported from a file; move it into one"):
        made(collate_fn=lambda samples: samples).to_yaml(Regressor)
    with pytest.raises(TypeError, match=r"to_yaml: metrics are objects; have get_metrics\(\) of the module answer"):
        made(metrics=Hit("hit")).to_yaml(Regressor)


def test_the_plugin_trains_without_this_trainer():
    Path("hps.yaml").write_text("{epochs: 3, batch_size: [8, 4], optim: {type: Adam, lr: 1e-2}}")
    data = {"_target_": "torch.utils.data.TensorDataset"}
    plugins = {"accmt": {"hps": "hps.yaml"}, "accumulate": {"steps": 2}, "ema": {}, "model_saving": {}}
    core = hookline.Trainer(Loading(), plugins, max_steps=7)
    assert (core.options.train_batch_size, core.options.val_batch_size) == (16, 4)
    core.train()
    assert (core.global_step, core.options.epochs) == (7, None)
    assert sorted(core.export_model()) == sorted(network().state_dict())
    with pytest.raises(ValueError, match="accmt.train_dataset.tensor: unknown key, did you mean 'tensors'"):
        hookline.Trainer(Regressor(), {"accmt": {"hps": "hps.yaml", "train_dataset": {**data, "tensor": 1}}})
    with pytest.raises(ValueError, match="accmt.collate_fn: 'json.load_all' cannot be imported: AttributeError"):
        hookline.Trainer(Regressor(), {"accmt": {"collate_fn": "json.load_all"}})


def test_a_foreign_module_is_left_alone():
    core = hookline.Trainer(TinyModule(), {"accmt": {}}, epochs=1, train_batch_size=8)
    core.train()
    assert type(core.module) is TinyModule


# Models of transformers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"safe_serialization": True}, ["model.safetensors"]),
        ({}, ["pytorch_model.bin"]),
        ({"max_shard_size": "2KB"}, ["pytorch_model-00001-of-0000", "pytorch_model.bin.index.json"]),
    ],
)
def test_a_model_of_transformers_trains_from_its_folder(options, files):
    transformers = pytest.importorskip("transformers", reason="a model of it is trained")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained("start")
    data = [{"input_ids": torch.tensor([n, 1, 2]), "labels": torch.tensor([n, 1, 2])} for n in range(8)]
    trainer = made(**options)
    trainer.fit("start", data, data, attn_implementation="eager")
    assert trainer.core.global_step == 4
    module = trainer.core.module.user
    assert len(module) == sum(p.numel() for p in module.model.parameters())
    saved = "out/model/best_valid_loss"
    there = [path.name for path in Path(saved).iterdir()]
    assert all(
        any(name.startswith(file) for name in there) for file in [*files, "config.json", "generation_config.json"]
    )
    for kind in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        assert digest(kind.from_pretrained(saved).state_dict()) == digest(module.model.state_dict())
    assert json.loads(Path(saved, "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_a_model_of_transformers_by_its_class():
    transformers = pytest.importorskip("transformers", reason="a model of it is trained")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained("start")
    data = [{"input_ids": torch.tensor([n, 1, 2]), "labels": torch.tensor([n, 1, 2])} for n in range(8)]
    made().fit(("start", transformers.GPT2LMHeadModel), data)
    with pytest.raises(ValueError, match="transformers has no class 'AutoModelFor'"):
        AcceleratorModule.from_hf("start", "AutoModelFor")


# What has no effect is said -------------------------------------------------------------


class OwnLoaders(ExampleModule):
    def get_train_dataloader(self):
        return DataLoader(points(), batch_size=8)

    def get_validation_dataloader(self):
        return DataLoader(points(), batch_size=8)


def test_datasets_beside_loaders_of_the_module_are_told_to_have_no_effect(caplog):
    sampler = WeightedRandomSampler([1.0] * 40, 40)
    Trainer({"epochs": 1, "batch_size": 8}, "model", sampler=sampler).fit(OwnLoaders(), points(), points())
    assert "OwnLoaders.get_train_dataloader() gives the loader, so train_dataset and sampler have" in caplog.text
    assert "OwnLoaders.get_validation_dataloader() gives the loader, so val_dataset has no effect" in caplog.text


def test_a_tracker_that_is_not_named_is_told_to_get_nothing(caplog):
    Trainer({"epochs": 1}, "model", logging_dir="here", track_name="mine")
    assert "track_name and logging_dir without log_with: there is no tracker" in caplog.text


@pytest.mark.parametrize("slip", ["get_val_dataloader", "get_optimizers", "get_schedulers"])
def test_a_slip_of_a_method_name_is_refused_before_training(slip):
    module = type("Slipped", (ExampleModule,), {slip: lambda self: None})()
    with pytest.raises(TypeError, match=rf"Slipped.{slip}\(\) would not be called: name it get_"):
        Trainer({"epochs": 1}, "model").fit(module, points())


def test_the_seed_of_a_fit_is_the_last_that_was_set():
    trainer = Trainer({"epochs": 1, "batch_size": 8}, "model")
    set_seed(42)
    trainer.fit(ExampleModule(), points())
    assert trainer.core.options.seed == 42
