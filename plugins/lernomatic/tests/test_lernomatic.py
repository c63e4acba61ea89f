"""Models and trainers of LERNOMATIC run on the core's loop: what they override, their history, files and schedules."""

import dataclasses
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hookline
from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.testing import check_plugin, digest, hand_written_loop, run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_lernomatic import Inferrer, Lernomatic, LernomaticModel, allow_import
from hookline_lernomatic.model import common
from hookline_lernomatic.train import schedule, trainer
from hookline_runs import read_run

PRELOADED += ["hookline_lernomatic"]
pytestmark = pytest.mark.plugins  # its trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# Programs -----------------------------------------------------------------------------

NEW_NETWORK = """
import torch
import torch.nn as nn
import torch.nn.functional as F

from hookline_lernomatic.model import common


class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)

    def num_flat_features(self, x):
        return x[0].numel()


class LernomaticModelNet(common.LernomaticModel):
    def __init__(self) -> None:
        self.net = Net()
        self.import_path = 'new_network.py'
        self.module_import_path = 'new_network.py'
        self.model_name = 'LernomaticModelNet'
        self.module_name = 'Net'

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.net.forward(X)
"""


@pytest.fixture
def new_network(tmp_path, monkeypatch):
    """Bring the model of the seed's guide in a file of its own, with the `num_flat_features` that it leaves out."""
    (tmp_path / "new_network.py").write_text(NEW_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(common, "_allowed", set(common._allowed))
    import new_network

    yield new_network
    sys.modules.pop("new_network", None)


def pictures(number=12):
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(number, 1, 32, 32, generator=generator), torch.arange(number) % 10)


def test_the_model_of_the_guide_trains_and_is_rebuilt_without_its_class_at_hand(new_network):
    torch.manual_seed(0)
    model = new_network.LernomaticModelNet()
    ours = trainer.Trainer(model, train_dataset=pictures(), val_dataset=pictures(6), batch_size=4, num_epochs=2)
    ours.train()
    assert (ours.loss_iter, ours.val_loss_iter, ours.acc_iter) == (6, 4, 2)
    kept = "checkpoint/ck_epoch_2_iter_6.pkl"
    weights = digest(model.get_net_state_dict())
    del model, ours
    sys.modules.pop("new_network")

    words = "a checkpoint names new_network.LernomaticModelNet, and importing it would run its code"
    with pytest.raises(ValueError, match=words):
        Inferrer().load_model(kept)
    assert "new_network" not in sys.modules
    allow_import("new_network")
    inferrer = Inferrer()
    inferrer.load_model(kept)
    assert digest(inferrer.model.get_net_state_dict()) == weights
    answer = inferrer.forward(torch.zeros(2, 1, 32, 32))
    assert answer.shape == (2, 10)
    assert not answer.requires_grad
    assert not inferrer.model.net.training
    rebuilt = trainer.Trainer(None, train_dataset=pictures(), batch_size=4)
    rebuilt.load_checkpoint(kept)
    assert digest(rebuilt.model.get_net_state_dict()) == weights
    assert rebuilt.start_epoch == 2


class Small(LernomaticModel):
    """Two layers and dropout."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 2))
        self.import_path = self.module_import_path = "small"
        self.model_name, self.module_name = "Small", "Sequential"


def points(number=40, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


OPTIONS = {"num_epochs": 3, "batch_size": 8, "learning_rate": 0.02, "print_every": 2}


def make(kind=trainer.Trainer, model=None, **given):
    options = {"train_dataset": points(), "val_dataset": points(20, 2), **OPTIONS} | given
    return kind(model or Small(), **options)


class NewTrainer(trainer.Trainer):
    """The trainer of the seed's guide: an epoch of its own, in LERNOMATIC's words."""

    def __init__(self, model, **kwargs) -> None:
        self.seen = []
        super().__init__(model, **kwargs)

    def train_epoch(self):
        self.model.set_train()
        for n, (data, target) in enumerate(self.train_loader):
            data, target = data.to(self.device), target.to(self.device)
            output = self.model.forward(data)
            loss = self.criterion(output, target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss_history[self.loss_iter] = loss.item()
            self.loss_iter += 1
            self.seen.append((self.cur_epoch, n, len(self.train_loader)))


class Hears(CallbackInterface):
    def __init__(self):
        self.heard = []

    def on_begin_train_epoch(self, global_step, epoch):
        self.heard.append(("begin", global_step))

    @hookimpl
    def on_boundary(self, global_step):
        self.heard.append(("boundary", global_step))

    def on_end_train_step(self, global_step):
        self.heard.append(("step", global_step))

    def on_end_train_epoch(self, global_step):
        self.heard.append(("end", global_step))

    @hookimpl
    def on_end_validation(self, metrics):
        self.heard.append(("validated", sorted(metrics)))


def test_an_epoch_of_the_users_own_keeps_events_tracker_and_checkpoints():
    hears = Hears()
    ours = make(NewTrainer, num_epochs=2, plugins={"hears": hears, "csv": {}})
    ours.train()
    assert ours.seen == [(epoch, n, 5) for epoch in (0, 1) for n in range(5)]
    epoch = lambda last: [("boundary", last - 4 + n) for n in range(5)]  # noqa: E731
    assert hears.heard == [
        ("begin", 0), *epoch(5), ("validated", ["val_acc", "val_loss"]), ("end", 5), ("boundary", 5),
        ("begin", 5), *epoch(10), ("validated", ["val_acc", "val_loss"]), ("end", 10), ("boundary", 10),
    ]  # fmt: skip
    run = read_run("checkpoint/ck-1")
    assert run.rows[-1]["train_loss_epoch"] == pytest.approx(ours.loss_history[5:10].mean().item())
    assert [one["step"] for one in run.checkpoints] == [5, 10]
    assert list(Path("checkpoint/ck-1").rglob("*.csv"))
    assert ours.core.counters.samples == 80


class More(trainer.Trainer):
    """Does more around the epochs of the base."""

    def train_epoch(self):
        super().train_epoch()

    def val_epoch(self):
        super().val_epoch()


def test_an_epoch_that_calls_that_of_the_base_tells_and_counts_what_the_base_does():
    runs = []
    for kind in (trainer.Trainer, More):
        hears = Hears()
        ours = make(kind, num_epochs=2, plugins={"hears": hears}, checkpoint_name=kind.__name__, save_best=True)
        ours.train()
        counters = dataclasses.asdict(ours.core.counters) | {"seconds": 0}
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_run(ours.core.run_dir).rows]
        files = sorted(
            path.name.replace(kind.__name__, "") for path in Path("checkpoint").glob(f"*{kind.__name__}*.pkl")
        )
        runs.append((hears.heard, counters, [sorted(row) for row in rows], rows[-1], ours.best_acc, files))
    assert runs[1] == runs[0]
    assert runs[0][1]["samples"] == 80


def test_a_stop_within_an_epoch_of_the_base_lets_the_users_own_end():
    class Stops(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            if trainer.global_step == 3:
                trainer.stop("enough")

    class New(trainer.Trainer):
        ended = 0

        def train_epoch(self):
            super().train_epoch()
            self.ended += 1

    ours = make(New, plugins={"stops": Stops()})
    ours.train()
    assert (ours.loss_iter, ours.ended, ours.core.global_step, ours.core.status) == (3, 1, 3, "stopped")


def test_an_epoch_of_the_users_own_ends_where_a_stop_is_asked_for():
    class Stops(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            if trainer.global_step == 3:
                trainer.stop("enough")

    ours = make(NewTrainer, plugins={"stops": Stops()})
    ours.train()
    assert (ours.loss_iter, ours.core.global_step, ours.core.status) == (2, 3, "stopped")
    assert ours.core.stop_reason == "enough"


class Autoencoder(trainer.Trainer):
    """Two models and two optimizers, as LERNOMATIC's own denoising autoencoder has them."""

    def __init__(self, encoder, decoder, **kwargs):
        self.encoder, self.decoder = encoder, decoder
        self.order = []
        super().__init__(None, **kwargs)

    def _init_device(self):
        self.order.append("device")
        super()._init_device()

    def _init_optimizer(self):
        self.order.append("optimizer")
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.SGD(self.encoder.get_model_parameters(), lr=0.1)
        self.decoder_optimizer = torch.optim.SGD(self.decoder.get_model_parameters(), lr=0.1)

    def _init_dataloaders(self):
        self.order.append("dataloaders")
        super()._init_dataloaders()

    def _init_history(self):
        self.order.append("history")
        super()._init_history()

    def _send_to_device(self):
        self.order.append("send")
        super()._send_to_device()

    def train_epoch(self):
        for data, _ in self.train_loader:
            for optimizer in self.optimizers().values():
                optimizer.zero_grad()
            loss = self.criterion(self.decoder.forward(self.encoder.forward(data)), data)
            loss.backward()
            self.decoder_optimizer.step()
            self.optimizer.step()
            self.loss_history[self.loss_iter] = loss.item()
            self.loss_iter += 1

    def val_epoch(self):
        assert not torch.is_grad_enabled()
        for data, _ in self.val_loader:
            loss = self.criterion(self.decoder.forward(self.encoder.forward(data)), data)
            self.val_loss_history[self.val_loss_iter] = loss.item()
            self.val_loss_iter += 1


class Layer(LernomaticModel):
    def __init__(self, size, out):
        torch.manual_seed(size)
        self.net = nn.Linear(size, out)
        self.import_path = self.module_import_path = "layers.py"
        self.model_name, self.module_name = "Layer", "Linear"


def test_several_models_and_optimizers_with_epochs_of_the_users_own():
    ours = make(Autoencoder, Layer(6, 3), decoder=Layer(3, 6), num_epochs=2)
    assert ours.order == ["device", "optimizer", "dataloaders", "history", "send"]
    ours.train()
    assert ours.core.global_step == 10
    assert ours.get_loss_history()[-5:].mean() < ours.get_loss_history()[:5].mean()
    assert len(ours.get_val_loss_history()) == 6
    losses, sizes = ours.val_loss_history[3:], torch.tensor([8.0, 8.0, 4.0])
    assert ours.core.metrics["val_loss"] == pytest.approx((losses * sizes).sum().item() / 20)
    assert set(dict(ours.core.module.named_parameters())) == {
        f"nets.{name}.{part}" for name in ("encoder", "decoder") for part in ("weight", "bias")
    }
    again = make(Autoencoder, Layer(6, 3), decoder=Layer(3, 6))
    again.load_model_checkpoint("checkpoint/ck_epoch_2_iter_10.pkl")
    assert digest(again.decoder.get_net_state_dict()) == digest(ours.decoder.get_net_state_dict())


class Short(Autoencoder):
    """Trains on a short last batch, too."""

    def __init__(self, encoder, **kwargs):
        super().__init__(encoder, train_dataset=points(20), drop_last=False, **kwargs)


def test_a_loss_of_an_epoch_of_the_users_own_is_a_mean_over_samples():
    ours = Short(Layer(6, 3), decoder=Layer(3, 6), num_epochs=1, batch_size=8)
    ours.train()
    losses, sizes = ours.loss_history, torch.tensor([8.0, 8.0, 4.0])
    (row,) = [row for row in read_run(ours.core.run_dir).rows if "train_loss_epoch" in row]
    assert row["train_loss_epoch"] == pytest.approx((losses * sizes).sum().item() / 20)
    assert ours.core.counters.samples == 20


class Modes(trainer.Trainer):
    """Says in which mode a batch finds the model."""

    def __init__(self, model, **kwargs):
        self.modes = []
        super().__init__(model, **kwargs)

    def batch_loss(self, batch):
        self.modes.append(self.model.net.training)
        return super().batch_loss(batch)


class OwnModes(Modes):
    def train_epoch(self):
        for batch in self.train_loader:
            self.optimizer.zero_grad()
            self.batch_loss(batch)[0].backward()
            self.optimizer.step()


@pytest.mark.parametrize(("kind", "trains"), [(Modes, True), (OwnModes, False)])
def test_train_epoch_of_the_base_is_in_train_mode_and_one_of_the_users_own_as_its_user_says(kind, trains, caplog):
    model = Small()
    model.net.eval()
    ours = make(kind, model, num_epochs=2, val_dataset=None)
    ours.train()
    assert ours.modes == [trains] * 10
    assert ("stay in it in training" in caplog.text) is not trains


class OwnLoop(trainer.Trainer):
    """A `train` of its own, with what the base has for one epoch."""

    def train(self):
        for _ in range(self.cur_epoch, self.num_epochs):
            self.train_epoch()
            self.val_epoch()
            self.cur_epoch += 1


def test_a_train_of_the_users_own_has_the_same_bits():
    own, usual = make(OwnLoop, checkpoint_dir="own"), make()
    own.train()
    usual.train()
    assert digest(own.model.get_net_state_dict()) == digest(usual.model.get_net_state_dict())
    assert own.get_acc_history().tolist() == usual.get_acc_history().tolist()
    assert own.cur_epoch == 3


# The same bits ------------------------------------------------------------------------


class ByHand(ModuleInterface):
    """The same, ported to the core's contract."""

    def __init__(self):
        super().__init__()
        self.net = Small().net

    def train_step(self, global_step, batch, device):
        data, target = batch
        return nn.functional.cross_entropy(self.net(data), target)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(points(), batch_size, sampler=sampler(points()), drop_last=True)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.net.parameters(), lr=0.02, weight_decay=1e-5)], []


def test_the_losses_are_those_of_a_loop_by_hand():
    ours, by_hand = make(val_dataset=None), ByHand()
    ours.train()
    assert ours.get_loss_history().tolist() == hand_written_loop(by_hand, epochs=3)
    assert digest(ours.model.get_net_state_dict()) == digest(by_hand.net.state_dict())


def fit(name, *faults, resume=False, kind=trainer.Trainer, **options):
    given = {f"fault{number}": fault for number, fault in enumerate(faults)}
    cycle = schedule.TriangularDecayWhenAcc(lr_decay=0.5, acc_thresh=0.01, lr_min=0.001, lr_max=0.02, stepsize=4)
    options = {"lr_scheduler": cycle, "save_every": 4} | options
    ours = make(kind, checkpoint_name=name, plugins={**options.pop("plugins", {}), **given}, resume=resume, **options)
    ours.train()
    history = ours.get_history()
    return digest(ours.model.get_net_state_dict()), {k: digest(v) for k, v in history.items()}


def fit_until_killed(kind=trainer.Trainer):
    fit("cut", at_hook("on_end_backward", kill, nth=8), kind=kind)


def more_until_killed():
    fit_until_killed(More)


@pytest.mark.parametrize(("kind", "until_killed"), [(trainer.Trainer, fit_until_killed), (More, more_until_killed)])
def test_a_run_that_is_killed_goes_on_with_the_same_bits_and_history(kind, until_killed):
    assert run(until_killed).code == -signal.SIGKILL
    assert fit("cut", resume=True, kind=kind) == fit("whole")


def two_ranks(resume=False):
    torch.set_num_threads(1)
    return fit("ranks", resume=resume, plugins={"ddp": {}}, batch_size=4)


def two_ranks_until_killed():
    torch.set_num_threads(1)
    fit("cut", at_hook("on_end_backward", kill, nth=8), plugins={"ddp": {}}, batch_size=4)


def two_ranks_go_on():
    torch.set_num_threads(1)
    return fit("cut", resume=True, plugins={"ddp": {}}, batch_size=4)


@pytest.mark.xdist_group("ranks")
def test_two_ranks_train_one_model_and_go_on_after_a_kill():
    whole = run_ranks(two_ranks, 2)
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    assert whole[0].value[0] == whole[1].value[0]
    assert all(outcome.code != 0 for outcome in run_ranks(two_ranks_until_killed, 2))
    cut = run_ranks(two_ranks_go_on, 2)
    assert cut[0].value == whole[0].value, cut[0].output
    assert cut[1].value[0] == whole[1].value[0], cut[1].output


# History, files and stops -----------------------------------------------------------------


def test_accuracy_is_of_the_samples_that_were_seen_and_the_last_values_are_the_last():
    ours = make(val_batch_size=16)
    assert (ours.get_cur_loss(), ours.get_cur_acc()) == (None, None)
    ours.train()
    ours.model.set_eval()
    with torch.no_grad():
        inputs, targets = points(20, 2).tensors
        accuracy = (ours.model.forward(inputs).argmax(dim=1) == targets).float().mean().item()
    assert ours.get_cur_acc() == pytest.approx(accuracy)
    assert ours.get_cur_loss() == ours.loss_history[14].item()
    assert len(ours.get_loss_history()) == 15
    assert len(ours.get_val_loss_history()) == 6
    assert ours.best_acc == max(ours.get_acc_history().tolist())


def test_training_goes_on_when_there_shall_be_more_epochs():
    ours = make(num_epochs=2)
    ours.train()
    ours.train()  # nothing is left
    assert ours.loss_iter == 10
    ours.set_num_epochs(3)
    ours.train()
    assert (ours.loss_iter, len(ours.loss_history), ours.acc_iter) == (15, 15, 3)
    whole = make(checkpoint_name="whole")
    whole.train()
    assert digest(ours.model.get_net_state_dict()) == digest(whole.model.get_net_state_dict())


def test_files_of_checkpoints_best_and_history():
    ours = make(save_every=4, save_best=True)
    ours.train()
    names = {path.name for path in Path("checkpoint").glob("*.pkl")}
    every = {"ck_epoch_0_iter_4.pkl", "ck_epoch_1_iter_8.pkl", "ck_epoch_2_iter_12.pkl"}
    assert names == every | {"best_ck.pkl", "ck_history.pkl"}
    again = make()
    again.load_history("checkpoint/ck_history.pkl")
    assert again.get_loss_history().tolist() == ours.get_loss_history().tolist()
    none = make(save_every=0, save_hist=False, checkpoint_dir="none")
    none.train()
    assert not list(Path("none").glob("*.pkl"))
    assert not (none.core.run_dir / "checkpoints").exists()


def test_an_accuracy_that_is_reached_ends_training_and_one_that_stays_does():
    ours = make(num_epochs=30, stop_when_acc=0.8)
    ours.train()
    assert ours.get_cur_acc() >= 0.8
    assert all(accuracy < 0.8 for accuracy in ours.get_acc_history()[:-1])
    assert "the accuracy is" in ours.core.stop_reason
    flat = make(num_epochs=9, learning_rate=1e-9, early_stop={"num_epochs": 2, "improv": 0.1}, checkpoint_name="flat")
    flat.train()
    assert flat.acc_iter == 3
    assert flat.core.stop_reason == "2 epochs without a better accuracy (early_stop)"


def test_data_for_the_test():
    ours = make(test_dataset=points(20, 2), num_epochs=1)
    ours.train()
    assert ours.test() == {"test_loss": ours.core.metrics["test_loss"], "test_acc": ours.get_cur_acc()}


def test_parameters_reach_the_optimizer_and_the_loader():
    ours = make(optim_function="SGD", momentum=0.7, weight_decay=0.3, loss_function="NLLLoss", shuffle=False)
    assert ours.optimizer.param_groups[0] | {"params": 0} == torch.optim.SGD(
        [torch.zeros(1)], lr=0.02, momentum=0.7, weight_decay=0.3
    ).param_groups[0] | {"params": 0}
    assert isinstance(ours.criterion, nn.NLLLoss)
    assert isinstance(ours.train_loader.sampler, torch.utils.data.SequentialSampler)
    assert (ours.train_loader.drop_last, ours.val_loader.drop_last) == (True, False)
    workers = make(num_workers=2)
    assert workers.train_loader.num_workers == 2
    assert make(verbose=True)._core().plugins.has_plugin("progress")


def test_getters_and_setters_of_a_model():
    model, other = Small(0), Small(1)
    model.set_net_state_dict(other.get_net_state_dict())
    assert digest(model.get_net().state_dict()) == digest(other.get_net_state_dict())
    model.freeze_to(1)
    assert [parameter.requires_grad for parameter in model.get_model_parameters()] == [False, True, True, True]
    model.unfreeze_to(1)
    model.freeze()
    assert not any(parameter.requires_grad for parameter in model.get_model_parameters())
    model.unfreeze()
    model.forward(torch.ones(3, 6)).sum().backward()
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.get_model_parameters())


def test_arguments_of_a_network_are_in_its_checkpoint():
    class Wide(Layer):
        def get_model_args(self):
            return {"in_features": 3, "out_features": 2}

    wide = Wide(3, 2)
    wide.module_import_path = "torch.nn"
    params = wide.get_params()
    assert params["model_args"] == {"in_features": 3, "out_features": 2}
    with pytest.raises(ValueError, match="a checkpoint names torch.nn.Linear"):
        Wide(3, 2).set_params(params)
    before = set(common._allowed)
    try:
        allow_import("torch")
        other = Wide(3, 2)
        other.set_params(params)
        assert digest(other.get_net_state_dict()) == digest(wide.get_net_state_dict())
        with pytest.raises(ValueError, match="a checkpoint names torch.nn.Lineal, which is not there"):
            other.set_params(params | {"module_name": "Lineal"})
    finally:
        common._allowed.clear()
        common._allowed.update(before)


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim_function": "Adan"}, r"optim_function='Adan' is no class of torch.optim, did you mean 'Adam'"),
        (
            {"loss_function": "CrossEntropy"},
            "'CrossEntropy' is no class .*did you mean 'CrossEntropyLoss'",
        ),
        ({"early_stop": {"epochs": 2}}, r"early_stop=\{'epochs': 2\} must have num_epochs and improv"),
    ],
)
def test_values_that_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        make(**given)


def test_arguments_and_models_that_cannot_be():
    with pytest.raises(TypeError, match=r"Trainer has no argument 'num_epoch', did you mean 'num_epochs'"):
        make(num_epoch=3)
    with pytest.raises(ValueError, match="Trainer has no LernomaticModel: give it one, load_checkpoint"):
        trainer.Trainer(None, train_dataset=points()).train()
    with pytest.raises(RuntimeError, match="Inferrer has no model yet: call load_model"):
        Inferrer().forward(torch.zeros(1, 6))


def test_contract_and_others_modules():
    check_plugin(Lernomatic)
    with pytest.raises(TypeError, match="Trainer got a Small, which is no object of a ModuleInterface"):
        hookline.Trainer(Small(), {"lernomatic": {}})
