"""Programs for PyMarlin's trainer run here, with the bits of the same run said in hookline's own words."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import hookline
from hookline.testing import TinyModule, check_plugin, digest, hand_written_loop, run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_pymarlin import (
    AbstractCheckpointer,
    CallbackInterface,
    Checkpoint,
    DataInterface,
    DataProcessor,
    DefaultCheckpointerArguments,
    ModuleInterface,
    Pymarlin,
    Stage,
    StatInitArguments,
    Trainer,
    TrainerArguments,
    WriterInitArguments,
    global_stats,
    rank_zero_only,
)
from hookline_runs import read_run

PRELOADED += ["hookline_pymarlin"]
pytestmark = pytest.mark.plugins  # its trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# Programs -----------------------------------------------------------------------------


class Points(DataProcessor):
    """Draws points; they are of class 1 where their sum is positive."""

    def __init__(self, number, seed):
        self.number, self.seed = number, seed
        self.positive = None

    def process(self):
        inputs = torch.randn(self.number, 6, generator=torch.Generator().manual_seed(self.seed))
        return inputs, (inputs.sum(dim=1) > 0).long()

    def analyze(self):
        self.positive = True


class Data(DataInterface):
    def __init__(self, number=48):
        self.train, self.val = Points(number, 1).process_data(), Points(20, 2).process_data()

    def get_train_dataset(self):
        return TensorDataset(*self.train)

    def get_val_dataset(self):
        return TensorDataset(*self.val)


class Classifier(ModuleInterface):
    """The module of the seed's document, with its own example of a loader."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        )
        self.heard = []

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, estimated_global_steps_per_epoch)
        return [optimizer], [scheduler]

    def get_train_dataloader(self, sampler, batch_size):
        train_ds = self.data.get_train_dataset()
        dl = DataLoader(train_ds, batch_size=batch_size, sampler=sampler(train_ds))
        return dl

    def get_val_dataloaders(self, sampler, batch_size):
        dataset = self.data.get_val_dataset()
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))
        return {"first": loader, "second": loader}

    def train_step(self, global_step, batch, device):
        inputs, labels = (part.to(device) for part in batch)
        logits = self.net(inputs)
        return torch.nn.functional.cross_entropy(logits, labels), logits

    def val_step(self, global_step, batch, device):
        inputs, labels = (part.to(device) for part in batch)
        logits = self.net(inputs)
        return torch.nn.functional.cross_entropy(logits, labels), logits, labels

    def on_end_train_step(self, global_step_completed, train_loss, logits):
        global_stats.update("logit", logits.mean(), frequent=True)

    def on_end_val_epoch(self, global_step, *collated, key="default"):
        _, logits, labels = collated
        self.heard.append((key, len(labels)))
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        global_stats.update(f"accuracy_{key}", accuracy.item())


def arguments(**given):
    return TrainerArguments(**({"epochs": 3, "train_batch_size": 12, "val_batch_size": 8, "use_gpu": False} | given))


def test_contract():
    check_plugin(Pymarlin)


def test_a_program_for_pymarlin_trains_and_writes():
    module = Classifier(Data())
    trainer = Trainer(module, arguments(stats_args=StatInitArguments(log_steps=1)))
    assert (trainer.global_steps_finished, trainer.last_epoch, trainer.device.type) == (0, -1, "cpu")
    trainer.train()
    assert (trainer.global_steps_finished, trainer.last_epoch) == (12, 2)
    assert module.heard == [("first", 20), ("second", 20)] * 3
    run = read_run("checkpoints/model-1")
    assert run.status == "finished"
    assert [row["step"] for row in run.rows] == list(range(1, 13))
    assert all({"loss", "epoch", "logit"} <= set(row) for row in run.rows)
    assert {"accuracy_first", "accuracy_second", "val_loss/first"} <= set(run.rows[-1])
    assert list(Path("checkpoints/model-1/logs").glob("events*"))
    losses, logits, labels = trainer.validate()
    assert (len(losses), logits.shape, labels.shape) == (3, (20, 2), (20,))
    assert [path.name for path in Path("checkpoints").glob("*.pt")] == ["model_model_2.pt"]


class Regression(TinyModule):
    """A module without validation, which counts what it hears in PyMarlin's order."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def on_begin_train_epoch(self, global_step, epoch):
        self.heard.append(("epoch", epoch, global_step))

    def on_end_backward(self, global_step, loss_tensor):
        assert loss_tensor.requires_grad
        self.heard.append(("backward", global_step))

    def on_end_train_epoch(self, global_step, *outputs):
        self.heard.append(("end", global_step, len(outputs)))

    def on_end_train(self, global_step):
        self.heard.append(("over", global_step))


def test_the_six_events_come_as_pymarlin_sends_them():
    module = Regression()
    Trainer(module, arguments(epochs=1, train_batch_size=20, gpu_batch_size_limit=10)).train()
    backwards = [("backward", step) for step in (0, 0, 1, 1, 2)]  # the last window has one micro-batch
    assert module.heard == [("epoch", 0, 0), *backwards, ("end", 3, 2), ("over", 3)]


class Watching(CallbackInterface):
    """A callback of PyMarlin's, beside the module."""

    def __init__(self):
        self.losses = []

    def on_end_train_step(self, gs, loss, *rest):
        self.losses += loss.reshape(-1).tolist()


def test_a_callback_is_a_plugin_and_the_stages_are_the_cores():
    module, watching = TinyModule(), Watching()
    trainer = Trainer(module, arguments(epochs=1, clip_grads=False, train_batch_size=8, seed=0))
    trainer.core.plugins.register(watching)
    trainer.train()
    assert watching.losses == hand_written_loop(TinyModule(), epochs=1)
    assert Stage is hookline.Stage


# The same bits ------------------------------------------------------------------------


def test_the_bits_are_those_of_the_plugins_that_it_means():
    facade = Classifier(Data())
    Trainer(facade, arguments(gpu_batch_size_limit=5, seed=0)).train()
    ours = Classifier(Data())
    plugins = {"pymarlin": {}, "clip": {"max_norm": 1.0}, "accumulate": {"steps": 3}}
    hookline.Trainer(ours, plugins, epochs=3, train_batch_size=12, val_batch_size=8, device="cpu").train()
    assert digest(facade.state_dict()) == digest(ours.state_dict())


@pytest.mark.parametrize(("batch", "limit", "parts"), [(7, 3, 7), (6, 4, 2), (12, 5, 3), (12, 12, 1), (8, 512, 1)])
def test_the_limit_never_changes_the_batch_of_a_step(batch, limit, parts):
    sizes = []

    class Sizes(Classifier):
        def train_step(self, global_step, batch, device):
            sizes.append((global_step, len(batch[0])))
            return super().train_step(global_step, batch, device)

    module = Sizes(Data(number=batch * 2))
    trainer = Trainer(module, arguments(epochs=1, train_batch_size=batch, gpu_batch_size_limit=limit))
    trainer.train()
    assert sizes == [(step, batch // parts) for step in (1, 2) for _ in range(parts)]


def fit(name, *faults, **checkpoints):
    given = DefaultCheckpointerArguments(file_prefix=name, **checkpoints)
    module = Classifier(Data())
    trainer = Trainer(module, arguments(checkpointer_args=given, gpu_batch_size_limit=6), "sp-amp")
    for fault in faults:
        trainer.core.plugins.register(fault)
    trainer.train()
    return digest(module.state_dict())


def fit_until_killed():
    fit("cut", at_hook("on_end_backward", kill, nth=20))


def test_a_run_that_is_killed_goes_on_with_the_same_bits():
    assert run(fit_until_killed).code == -signal.SIGKILL
    assert fit("cut", load_dir="checkpoints/cut-1") == fit("whole")


def two_ranks(faults=(), **checkpoints):
    torch.set_num_threads(1)
    module = Classifier(Data())
    given = DefaultCheckpointerArguments(**checkpoints)
    trainer = Trainer(module, arguments(checkpointer_args=given, gpu_batch_size_limit=3), "ddp")
    for fault in faults:
        trainer.core.plugins.register(fault)
    trainer.train()
    return digest(module.state_dict()), trainer.core.metrics


def two_ranks_until_killed():
    two_ranks([at_hook("on_end_backward", kill, nth=12)], file_prefix="cut")


@pytest.mark.xdist_group("ranks")
def test_two_ranks_share_a_batch_and_go_on_after_a_kill():
    whole = run_ranks(two_ranks, 2)
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    assert whole[0].value == whole[1].value
    assert all(outcome.code != 0 for outcome in run_ranks(two_ranks_until_killed, 2))
    cut = run_ranks(goes_on, 2)
    assert [outcome.value for outcome in cut] == [outcome.value for outcome in whole], cut[0].output


def goes_on():
    return two_ranks(file_prefix="cut", load_dir="checkpoints/cut-1")


def alone():
    seen = []
    rank_zero_only(seen.append)(1)

    @rank_zero_only
    def fails():
        raise ValueError("only on rank 0")

    class Looks(CallbackInterface):
        def on_end_train(self, global_step):
            rank_zero_only(seen.append)(2)
            try:
                fails()
            except ValueError as error:
                seen.append(str(error))

    class Hears(TinyModule):
        def on_end_train_step(self, global_step, loss, predictions):
            self.own = loss.shape, predictions.shape

        def on_end_train_epoch(self, global_step, losses, predictions):
            self.whole = losses.shape, predictions.shape

        @rank_zero_only
        def on_end_val_epoch(self, global_step, *outputs, key="default"):
            global_stats.update("only_here", 0.25)

    module = Hears(samples=16)
    trainer = Trainer(module, arguments(epochs=1, train_batch_size=16), "ddp")
    trainer.core.plugins.register(Looks())
    trainer.train()
    return seen, [tuple(map(tuple, shapes)) for shapes in (module.own, module.whole)], trainer.core.metrics["only_here"]


@pytest.mark.xdist_group("ranks")
def test_what_rank_zero_does_alone_may_raise_and_nobody_waits_for_ever():
    outcomes = run_ranks(alone, 2)
    seen = [outcome.value and outcome.value[0] for outcome in outcomes]
    assert seen == [[1, 2, "only on rank 0"], [1]], outcomes[1].output
    own, whole = outcomes[1].value[1]
    assert own == ((), (8, 1))
    assert whole == ((2,), (16, 1))  # of both ranks, as PyMarlin gathers them
    assert [outcome.value[2] for outcome in outcomes] == [0.25, 0.25]  # ranks that decide by a value agree on it


# Arguments ----------------------------------------------------------------------------


ALWAYS = {"core", "module", "pymarlin", "auto_stats", "gpu_batch_size_limit", "jsonl", "kept_seed", "on_host"}


def plan(**given):
    rows = Trainer(TinyModule(), arguments(**given)).plan()
    return {name for row in rows for name in (*row["done_by"], *row["wrapped_by"])} - ALWAYS


def test_arguments_become_options_and_plugins(caplog):
    assert plan() == {"checkpoint", "clip", "model_file", "period", "progress", "tensorboard"}
    bare = {"clip_grads": False, "writers": [], "checkpointer_args": {"checkpoint": False}}
    assert plan(**bare) == set()
    assert plan(**bare | {"writers": ["stdout"]}) == {"progress"}
    assert "progress" not in plan(disable_tqdm=True)
    assert "model_file" not in plan(checkpointer_args={"model_state_save_dir": None})
    assert "monitor" in plan(stats_args={"log_steps": 5, "update_system_stats": True})
    args = arguments(max_train_steps_per_epoch="2", max_val_steps_per_epoch=0, log_level="WARNING", seed=5)
    options = Trainer(TinyModule(), args).core.options
    assert (options.max_train_steps_per_epoch, options.max_val_steps_per_epoch, options.seed) == (2, None, 5)
    trainer = Trainer(TinyModule(), arguments(max_grad_norm="0.25", writer_args=WriterInitArguments("boards")))
    plugins = dict(trainer.core.plugins.listed())
    assert plugins["clip"].max_norm == 0.25
    assert plugins["tensorboard"].folder == "boards"


def test_fp16_is_off_on_a_cpu_and_said(caplog):
    assert "amp" not in plan(backend="sp-amp")
    assert "backend='sp-amp' trains in full precision on a CPU, as in PyMarlin" in caplog.text
    caplog.clear()
    arguments(amp_backend_native=True)
    assert "amp_backend_native=True has no effect, as in PyMarlin: backend='sp' trains in full pre" in caplog.text
    arguments(amp_level_apex="O3")
    assert "amp_level_apex='O3' has no effect: fp16 is that of torch" in caplog.text


def test_optimizers_may_begin_anew_from_a_checkpoint():
    fit("cut")
    module = Classifier(Data())
    given = DefaultCheckpointerArguments(file_prefix="cut", load_dir="checkpoints", load_filename="step-000000000012")
    trainer = Trainer(module, arguments(epochs=4, checkpointer_args=given, reset_optimizers_schedulers=True))
    trainer.train()
    assert trainer.global_steps_finished == 16
    assert trainer.core.schedulers[0].scheduler.last_epoch == 4


class Shelf(AbstractCheckpointer):
    """Keeps checkpoints in a file of torch's."""

    def __init__(self):
        self.saved, self.models = [], []

    def save(self, state, index, force=False):
        torch.save(vars(state), "shelf.part")
        os.replace("shelf.part", "shelf.pt")
        self.saved.append((index, force))

    def load(self):
        return Checkpoint(**torch.load("shelf.pt", weights_only=False)) if os.path.exists("shelf.pt") else Checkpoint()

    def save_model(self, state, index):
        self.models.append((index, sorted(state)[0]))


def shelved(*faults):
    shelf, module = Shelf(), Classifier(Data())
    trainer = Trainer(module, arguments(), checkpointer=shelf)
    for fault in faults:
        trainer.core.plugins.register(fault)
    trainer.train()
    return shelf, digest(module.state_dict())


def shelved_until_killed():
    shelved(at_hook("on_end_backward", kill, nth=7))


def test_a_checkpointer_of_the_users_own_saves_and_restores():
    shelf, whole = shelved()
    assert shelf.saved == [(0, False), (1, False), (2, False), (2, True)]
    assert shelf.models == [(2, "net.0.bias")]
    os.remove("shelf.pt")
    assert run(shelved_until_killed).code == -signal.SIGKILL
    shelf, end = shelved()
    assert shelf.saved == [(1, False), (2, False), (2, True)]
    assert end == whole


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"backend": "sq"}, "backend='sq' must be one of sp, sp-amp, ddp, ddp-amp"),
        ({"backend": "sp-amp-apex"}, "backend='sp-amp-apex' is not here: apex is given up; take sp-amp"),
        ({"backend": "ddp-dp"}, "backend='ddp-dp' is not here: differential privacy needs opacus"),
        ({"amp_backend_apex": True, "amp_backend_native": True}, "amp_backend_native and amp_backend_apex ex"),
        ({"differential_privacy_args": {}}, "differential_privacy_args is not here"),
        ({"distributed_training_args": {}}, r"distributed_training_args={} is not here: this is rank 0 of 1"),
        ({"epochs": "many"}, "epochs='many' is no number"),
        ({"stats_args": {"log_steps": 0}}, "log_steps=0 must be at least 1 step"),
        ({"checkpointer_args": {"file_prefix": "my run"}}, "file_prefix='my run' names a run: give letters, digits"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0; clip_grads=False does not clip"),
        ({"max_train_steps_per_epoch": -1}, "max_train_steps_per_epoch=-1 must be at least 1"),
        ({"writer_args": {"tb_log_multi": True}}, "tb_log_multi=True is not done here"),
        ({"writer_args": {"tb_log_dir": "/logs"}}, "tb_log_dir='/logs': TensorBoard's folder lies in"),
        ({"gpu_batch_size_limit": 0}, "gpu_batch_size_limit=0 must be at least 1"),
        ({"checkpointer_args": {"perod": 2}}, r"checkpointer_args has no 'perod', did you mean 'period'"),
        ({"checkpointer_args": {"period": 0}}, "period=0 must be at least 1 epoch"),
        ({"checkpointer_args": {"delete_existing_checkpoints": True}}, "is not done here: a run has a folder of its"),
        ({"checkpointer_args": {"load_filename": "x"}}, "load_filename='x' is looked for in load_dir, which is not"),
        (
            {"checkpointer_args": {"load_dir": "gone"}},
            "load_dir='gone' is neither the folder of a run nor one",
        ),
        ({"writers": ["stdin"]}, "writers: 'stdin' must be stdout, tensorboard, aml or a Writer of your own"),
    ],
)
def test_arguments_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        Trainer(TinyModule(), arguments(**given))


def test_a_checkpoint_that_is_not_there_and_a_writer_that_is_none():
    fit("cut")
    with pytest.raises(ValueError, match=r"load_filename='step-1' is not in .*; it has step-000000000004"):
        fit("cut", load_dir="checkpoints/cut-1", load_filename="step-1")
    with pytest.raises(TypeError, match="writers: a object is no writer: subclass hookline_pymarlin.Writer"):
        Trainer(TinyModule(), arguments(writers=[object()]))


# Modes --------------------------------------------------------------------------------


class Frozen(Classifier):
    """Its user has put it into eval mode, and does so again where an epoch begins and in each step."""

    def __init__(self):
        super().__init__(Data())
        self.modes = []
        self.eval()

    def on_begin_train_epoch(self, global_step, epoch):
        self.net.eval()

    def train_step(self, global_step, batch, device):
        self.modes.append(self.net.training)
        self.net.eval()
        return super().train_step(global_step, batch, device)


def test_a_module_is_in_train_mode_at_the_beginning_of_each_epoch(caplog):
    module = Frozen()
    Trainer(module, arguments(epochs=2)).train()
    assert module.modes == [True, False, False, False] * 2
    assert "eval mode" not in caplog.text
