"""Programs for Lightning's first year run here: those of its document, with its loaders, outputs, hooks and state."""

import copy
import pickle
import random
import signal
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hookline
from hookline import CallbackInterface, ModuleInterface
from hookline.testing import digest, hand_written_loop, run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_lightning import HyperOptArgumentParser, early
from hookline_runs import read_run

PRELOADED += ["hookline_lightning"]
pytestmark = pytest.mark.plugins


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


# Programs -----------------------------------------------------------------------------


class Pictures(Dataset):
    """Stands for MNIST: random pictures of its shape."""

    def __init__(self, train):
        generator = torch.Generator().manual_seed(int(train))
        number = 48 if train else 20
        self.x = torch.randn(number, 28 * 28, generator=generator)
        self.y = (self.x[:, :4].sum(dim=1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index], index


class Template(early.LightningModule):
    """The examples of the document put together; `Adam` has parameters, and `loss_val` is the loss."""

    def __init__(self, hparams):
        super().__init__(hparams)
        torch.manual_seed(3)
        self.c_d1 = nn.Linear(hparams.in_features, hparams.hidden_dim)
        self.c_d1_drop = nn.Dropout(hparams.drop_prob)
        self.c_d2 = nn.Linear(hparams.hidden_dim, hparams.out_features)
        self.seen, self.places, self.asked = [], [], 0

    def forward(self, x):
        return self.c_d2(self.c_d1_drop(torch.tanh(self.c_d1(x))))

    def loss(self, out, y):
        return functional.cross_entropy(out, y)

    def training_step(self, data_batch, batch_nb):
        x, y, _z = data_batch
        self.places.append((self.current_epoch, batch_nb, self.global_step))
        out = self.forward(x)
        loss = self.loss(out, y)
        output = {
            'loss': loss,  # required
            'prog': {'tng_loss': loss, 'batch_nb': batch_nb}  # optional
        }  # fmt: skip
        return output

    def validation_step(self, data_batch, batch_nb):
        x, y, z = data_batch
        out = self.forward(x)
        loss_val = self.loss(out, y)
        labels_hat = torch.argmax(out, dim=1)
        val_acc = torch.sum(y == labels_hat).item() / (len(y) * 1.0)
        return OrderedDict({"val_loss": loss_val, "val_acc": torch.tensor(val_acc), "first": z[0]})

    def validation_end(self, outputs):
        self.seen.append([output["first"].item() for output in outputs])
        val_loss_mean = 0
        val_acc_mean = 0
        for output in outputs:
            val_loss_mean += output["val_loss"]
            val_acc_mean += output["val_acc"]
        val_loss_mean /= len(outputs)
        val_acc_mean /= len(outputs)
        return {"val_loss": val_loss_mean.item(), "val_acc": val_acc_mean.item()}

    def configure_optimizers(self):
        return [torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)]

    def get_save_dict(self):
        return {"state_dict": self.state_dict(), "epoch": "mine", "places": len(self.places)}

    def load_model_specific(self, checkpoint):
        self.load_state_dict(checkpoint["state_dict"])
        self.given = {name: checkpoint[name] for name in ("epoch", "global_step", "places")}
        checkpoint.clear()

    @property
    def tng_dataloader(self):
        if self._tng_dataloader is None:
            try:
                self.asked += 1
                dataset = Pictures(train=True)
                loader = torch.utils.data.DataLoader(dataset=dataset, batch_size=self.hparams.batch_size, shuffle=True)
                self._tng_dataloader = loader
            except Exception as e:
                raise e
        return self._tng_dataloader

    @property
    def val_dataloader(self):  # not kept: made anew each time that it is asked for
        self.asked += 1
        return DataLoader(dataset=Pictures(train=False), batch_size=self.hparams.batch_size)

    @property
    def test_dataloader(self):
        return DataLoader(dataset=Pictures(train=False), batch_size=5)

    def update_tng_log_metrics(self, logs):
        logs["twice"] = 2 * logs.get("tng_loss", 0.0)
        return logs

    @staticmethod
    def add_model_specific_args(parent_parser, root_dir):
        parser = HyperOptArgumentParser(strategy=parent_parser.strategy, parents=[parent_parser])
        parser.opt_list("--drop_prob", default=0.2, options=[0.2, 0.5], type=float, tunable=False)
        parser.add_argument("--in_features", default=28 * 28)
        parser.add_argument("--out_features", default=10)
        parser.add_argument("--hidden_dim", default=16)
        parser.opt_list(
            "--learning_rate", default=0.01, type=float, options=[0.0001, 0.0005, 0.001, 0.005], tunable=False
        )
        parser.opt_list("--batch_size", default=256, type=int, options=[32, 64, 128, 256], tunable=False)
        parser.opt_list("--optimizer_name", default="adam", type=str, options=["adam"], tunable=False)
        return parser  # fmt: skip


def hparams(*arguments):
    parent = HyperOptArgumentParser(strategy="grid_search", description="a program")
    parent.add_argument("--gpus", default=None)
    return Template.add_model_specific_args(parent, "root").parse_args(["--batch_size", "8", *arguments])


class Pair(early.LightningModule):
    """Two optimizers, means of `validation_step` by sample, no hooks at all; it answers its loss alone."""

    def __init__(self, hparams=None):
        super().__init__(hparams)
        torch.manual_seed(3)
        self.generator, self.discriminator = nn.Linear(6, 6), nn.Linear(6, 2)
        self.data = points()

    def training_step(self, data_batch, batch_nb):
        inputs, labels = data_batch
        return functional.cross_entropy(self.discriminator(torch.relu(self.generator(inputs))), labels)

    def validation_step(self, data_batch, batch_nb):
        if batch_nb == 1:
            return None
        loss = self.training_step(data_batch, batch_nb)
        return {"val_loss": loss, "samples": float(len(data_batch[0]))}

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.2),
        ]

    @property
    def tng_dataloader(self):
        return DataLoader(self.data, 8, shuffle=True)

    @property
    def val_dataloader(self):
        return DataLoader(self.data, 14)


def points(number=40):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


class Regression(Pair):
    """One optimizer that is in no list; `tqdm_metrics`; metrics of `validation_end` may be none."""

    def training_step(self, data_batch, batch_nb):
        loss = super().training_step(data_batch, batch_nb)
        return {"loss": loss, "tqdm_metrics": {"root": loss.detach().sqrt(), "train_loss": loss}}

    def validation_step(self, data_batch, batch_nb):
        return {"val_loss": super().training_step(data_batch, batch_nb)}

    def validation_end(self, outputs):
        self.ended = len(outputs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(module, plugins=None, **options):
    options = {"epochs": 2, "log_every": "1 steps"} | options
    trainer = hookline.Trainer(module, {"lightning": {}, "jsonl": {}, **(plugins or {})}, **options)
    trainer.train()
    return trainer


def test_the_examples_of_the_document_train():
    module = Template(hparams())
    trainer = hookline.Trainer(module, {"lightning": {}, "jsonl": {}}, epochs=2, log_every="1 steps")
    assert module.asked == 0  # nothing is read of it before there is a run
    trainer.train()
    assert module.asked == 2
    assert trainer.options.train_batch_size == 8
    assert module.places == [(epoch, number, 6 * epoch + number + 1) for epoch in (0, 1) for number in range(6)]
    assert module.seen == [[0, 8, 16]] * 2
    rows = read_run("runs/run-1").rows
    assert [row["batch_nb"] for row in rows] == [*range(6)] * 2
    assert [row["twice"] == 2 * row["tng_loss"] for row in rows][:5] == [True] * 5
    assert rows[0]["tng_loss"] == rows[0]["train_loss"]
    assert set(trainer.metrics) == {"val_loss", "val_acc"}
    assert set(trainer.test()) == {"val_loss", "val_acc"}
    assert module.seen[-1] == [0, 5, 10, 15]


def test_batches_are_counted_within_a_window_too():
    module = Template(hparams())
    trainer = train(module, {"accumulate": {"steps": 4}}, epochs=1)
    assert trainer.global_step == 2
    assert module.places == [(0, number, number + 1) for number in range(6)]


def test_two_optimizers_step_after_one_backward_and_validation_is_a_mean_by_sample():
    module = Pair()
    before = digest(module.state_dict())
    trainer = train(module)
    assert digest(module.state_dict()) != before
    assert trainer.metrics["samples"] == pytest.approx((14 * 14 + 12 * 12) / 26)  # 14, none, 12
    with torch.no_grad():
        of_batches = [module.training_step(batch, 0).item() for batch in DataLoader(points(), 14)]
    assert trainer.metrics["val_loss"] == pytest.approx((14 * of_batches[0] + 12 * of_batches[2]) / 26)


def test_older_words_and_no_metrics_are_taken():
    module = Regression()
    trainer = train(module)
    assert module.ended == 3
    assert trainer.metrics == {}
    rows = read_run("runs/run-1").rows
    assert rows[0]["root"] == pytest.approx(rows[0]["train_loss"] ** 0.5)


# The same bits ------------------------------------------------------------------------


class ByHand(ModuleInterface):
    """The modules above, ported to the core's contract."""

    def __init__(self, module, data):
        super().__init__()
        self.module, self.data = module, data

    def train_step(self, global_step, batch, device):
        if isinstance(self.module, Template):
            return self.module.loss(self.module(batch[0]), batch[1])
        return Pair.training_step(self.module, batch, 0)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        made = self.module.configure_optimizers()
        return made if isinstance(made, list) else [made], []


class Losses(CallbackInterface):
    def __init__(self):
        self.losses = []

    def on_end_train_step(self, global_step, loss):
        self.losses += loss.reshape(-1).tolist()


PROGRAMS = {
    "template": (lambda: Template(hparams()), lambda: Pictures(train=True)),
    "pair": (Pair, points),
    "regression": (Regression, points),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_the_losses_are_those_of_the_module_ported_by_hand(name):
    make, data = PROGRAMS[name]
    losses, ours, theirs = Losses(), make(), ByHand(make(), data())
    train(ours, {"losses": losses})
    assert losses.losses == hand_written_loop(theirs, epochs=2)
    assert digest(ours.state_dict()) == digest(theirs.module.state_dict())


def fit(name, run_name, *faults, resume=False, ranks=False):
    module = PROGRAMS[name][0]()
    plugins = {f"fault{number}": fault for number, fault in enumerate(faults)}
    plugins |= {"checkpoint": {"every": "2 steps"}, **({"ddp": {}} if ranks else {})}
    trainer = train(module, plugins, run_name=run_name, resume=resume)
    return digest(module.state_dict()), trainer.metrics, getattr(module, "given", None)


def cut_short(name):
    fit(name, "cut", at_hook("on_end_backward", kill, nth=8))


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_run_that_is_killed_goes_on_with_the_same_bits(name):
    assert run(cut_short, name).code == -signal.SIGKILL
    whole, cut = fit(name, "whole"), fit(name, "cut", resume=True)
    assert cut[:2] == whole[:2]
    if name == "template":  # its own section came back, with the place in the run in the place of its own word
        assert cut[2] == {"epoch": 1, "global_step": 6, "places": 6}


def test_what_comes_back_is_a_copy():
    module = Template(hparams())
    trainer = hookline.Trainer(module, {"lightning": {}})
    state = {"lightning": {"saved": {**module.get_save_dict(), "places": 1}, "place": {"epoch": 2, "global_step": 3}}}
    before = digest(state)
    module.load_model_specific = lambda checkpoint: checkpoint["state_dict"]["c_d1.weight"].zero_()
    trainer.plugins.receive(state)
    assert digest(state) == before


def two_ranks(name, run_name, resume=False):
    torch.set_num_threads(1)
    module = PROGRAMS[name][0]()
    trainer = train(module, {"checkpoint": {"every": "2 steps"}, "ddp": {}}, run_name=run_name, resume=resume)
    return digest(module.state_dict()), trainer.metrics, getattr(module, "seen", None)


def two_ranks_until_killed(name):
    torch.set_num_threads(1)
    fit(name, "cut", at_hook("on_end_backward", kill, nth=5), ranks=True)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "name", ["template", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pair", "regression"))]
)
def test_two_ranks_see_all_outputs_and_go_on_after_a_kill(name):
    whole = run_ranks(two_ranks, 2, name, "whole")
    assert [outcome.code for outcome in whole] == [0, 0], whole[0].output
    assert whole[0].value == whole[1].value
    if name == "template":  # two batches of 8 and 2 of each rank, of which the first have every other sample
        assert whole[0].value[2][-1] == [0, 1, 16, 17]
    assert all(outcome.code != 0 for outcome in run_ranks(two_ranks_until_killed, 2, name))
    cut = run_ranks(two_ranks, 2, name, "cut", True)
    assert [outcome.value[:2] for outcome in cut] == [outcome.value[:2] for outcome in whole], cut[0].output


# Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "answer", "error", "words"),
    [
        (
            "training_step",
            {"los": 1},
            ValueError,
            "training_step must return a mapping with 'loss', .* mapping with los",
        ),
        ("training_step", 1.0, ValueError, "Template.training_step must return .*; it returned float"),
        ("validation_step", 1.0, TypeError, "validation_step must return a mapping or None; it returned a float"),
        ("validation_end", 1.0, TypeError, "validation_end must return a mapping or None; it returned a float"),
        ("get_save_dict", None, TypeError, "get_save_dict must return a mapping; it returned a NoneType"),
        (
            "update_tng_log_metrics",
            None,
            TypeError,
            "update_tng_log_metrics must return a dict; it returned a NoneType",
        ),
    ],
)
def test_answers_that_cannot_be(method, answer, error, words, monkeypatch):
    monkeypatch.setattr(Template, method, lambda *_: answer)
    with pytest.raises(error, match=words):
        train(Template(hparams()), {"checkpoint": {}})


def test_an_error_in_validation_is_raised_and_leaves_gradients_on(monkeypatch):
    def fail(self, outputs):
        raise RuntimeError("of the user's")

    monkeypatch.setattr(Template, "validation_end", fail)
    with pytest.raises(RuntimeError, match="of the user's"):
        train(Template(hparams()))
    assert torch.is_grad_enabled()


def test_a_module_with_no_base_of_lightnings_is_known_by_its_loader():
    class Free(nn.Module):
        training_step, configure_optimizers = Pair.training_step, Regression.configure_optimizers
        tng_dataloader = Pair.tng_dataloader

        def __init__(self):
            super().__init__()
            self.generator, self.discriminator, self.data = nn.Linear(6, 6), nn.Linear(6, 2), points()

    module = Free()
    train(module, epochs=1)
    assert (module.current_epoch, module.global_step) == (0, 5)


def test_a_hook_that_nobody_calls_is_refused(monkeypatch):
    monkeypatch.setattr(Pair, "on_batch_end", lambda self: None, raising=False)
    with pytest.raises(ValueError, match=r"Pair.on_batch_end\(\) is not called here: hooks of the first year"):
        train(Pair())


def test_methods_of_later_versions_are_refused_unless_they_are_helpers(monkeypatch):
    monkeypatch.setattr(Pair, "optimizer_step", lambda self, *_: None, raising=False)
    with pytest.raises(ValueError, match=r"Pair.optimizer_step\(\) is not called here"):
        train(Pair())
    monkeypatch.undo()

    class Helped(Pair):
        ended = 0

        def validation_end(self, outputs):
            self.on_epoch_end()

        def on_epoch_end(self):
            self.ended += 1

    module = Helped()
    train(module, epochs=1)
    assert module.ended == 1
    with pytest.raises(NotImplementedError, match="Pair.load_from_metrics is not here, .*load_foreign"):
        Pair.load_from_metrics("weights.ckpt", "tags.csv")


def test_a_module_without_a_training_loader():
    class Bare(early.LightningModule):
        def training_step(self, data_batch, batch_nb):
            return None

    with pytest.raises(NotImplementedError, match="Bare has no property tng_dataloader"):
        train(Bare(SimpleNamespace()))


# Properties and the trainer -------------------------------------------------------------


@pytest.mark.parametrize("name", ["tng_dataloader", "val_dataloader", "test_dataloader"])
def test_a_mistake_in_a_property_comes_out_as_it_is(name, monkeypatch):
    monkeypatch.setattr(Template, name, property(lambda self: DataLoader(points(), self.hparams.batch_sise)))
    trainer = hookline.Trainer(Template(hparams()), {"lightning": {}})
    with pytest.raises(AttributeError, match="has no attribute 'batch_sise'"):
        trainer.test() if name == "test_dataloader" else trainer.train()


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (lambda self: DataLoader(points(), 8), TypeError, "Template.tng_dataloader is a method, .* @property above"),
        (property(lambda self: None), ValueError, "Template.tng_dataloader is None: it must be a loader"),
        (property(lambda self: [DataLoader(points())]), ValueError, "is a list of loaders, and one is wanted"),
    ],
)
def test_training_loaders_that_cannot_be(loader, error, words, monkeypatch):
    monkeypatch.setattr(Template, "tng_dataloader", loader)
    with pytest.raises(error, match=words):
        train(Template(hparams()))


class OwnTemplate(Template):
    """Reads of its trainer what Lightning's own template and the module of its tests read."""

    def __init__(self, hparams):
        super().__init__(hparams)
        self.read = []

    def training_step(self, data_batch, batch_nb):
        output = super().training_step(data_batch, batch_nb)
        if self.trainer.use_dp:
            output["loss"] = output["loss"].unsqueeze(0)
        assert self.trainer.batch_nb == batch_nb
        assert (self.trainer.global_step, self.trainer.current_epoch) == (self.global_step, self.current_epoch)
        return output

    def validation_step(self, data_batch, batch_nb):
        output = super().validation_step(data_batch, batch_nb)
        self.read.append((self.on_gpu, self.trainer.use_dp, self.trainer.use_ddp, self.trainer.batch_nb))
        return output

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5)]

    @early.data_loader
    def tng_dataloader(self):
        self.asked += 1
        assert (self.trainer.proc_rank, self.trainer.world_size, self.trainer.max_nb_epochs) == (0, 1, 2)
        return DataLoader(Pictures(train=True), batch_size=self.hparams.batch_size, shuffle=True)


def test_a_module_reads_of_its_trainer_what_the_template_of_the_first_year_does():
    module = OwnTemplate(hparams())
    assert module.trainer is None
    trainer = train(module)
    assert module.read == [(False, False, False, 5)] * 6
    assert module.asked == 2
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01 * 0.25]
    assert module.trainer is None  # a module that is kept keeps no run alive
    module.read.clear()
    trainer.validate()
    assert module.read == [(False, False, False, 5)] * 3


def test_what_the_trainer_of_a_module_has_not_is_hooklines_and_a_copy_has_nothing(monkeypatch):
    seen = []

    def update(self, logs):
        seen.append((self.trainer.core is self.trainer.core, self.trainer.options.epochs, self.trainer.nb_tng_batches))
        seen.append(copy.deepcopy(self.trainer))
        return logs

    monkeypatch.setattr(Template, "update_tng_log_metrics", update)
    train(Template(hparams()), epochs=1)
    assert seen[0] == (True, 1, 6)
    with pytest.raises(RuntimeError, match="one of a copy of a module"):
        _ = seen[1].options


# The parser -----------------------------------------------------------------------------


def parser(strategy="grid_search"):
    made = HyperOptArgumentParser(strategy)
    made.opt_list("--nb_layers", default=2, type=int, tunable=True, options=[2, 4, 8])
    made.opt_list("--drop", default=0.2, type=float, tunable=False, options=[0.2, 0.5])
    made.opt_range("--neurons", "--n", default=50, type=int, tunable=True, low=100, high=800, nb_samples=8)
    made.opt_range("--rate", default=0.1, type=float, tunable=False, low=0.1, high=1.0)
    return made


def test_arguments_hold_and_trials_are_another_matter():
    given = parser().parse_args(["--drop", "0.5"])
    assert vars(given) == {"hpc_exp_number": None, "nb_layers": 2, "drop": 0.5, "neurons": 50, "rate": 0.1}
    trials = list(given.trials(9))
    places = [(trial.nb_layers, trial.neurons) for trial in trials]
    assert places == [*((2, number) for number in range(100, 900, 100)), (4, 100)]
    assert {(trial.drop, trial.rate) for trial in trials} == {(0.5, 0.1)}
    assert given.nb_layers == 2
    assert len(list(given.trials())) == len(given.generate_trials(99)) == 24
    child = HyperOptArgumentParser(parents=[parser()])
    assert len(list(child.parse_args([]).trials())) == 24


def test_trials_at_random_are_all_different():
    random.seed(1)
    trials = parser("random_search").parse_args([]).generate_trials(24)
    assert len({(trial.nb_layers, trial.neurons) for trial in trials}) == 24
    assert [trial.nb_layers for trial in trials] != [2] * 8 + [4] * 8 + [8] * 8


def test_a_range_of_ratios():
    made = HyperOptArgumentParser()
    made.opt_range("--rate", default=0.1, type=float, tunable=True, low=1e-4, high=1.0, nb_samples=5, log_base=10)
    assert made.tunable["rate"] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_json_file_wins(tmp_path):
    (tmp_path / "example.json").write_text('{"nb_layers": 16, "more": "text"}')
    made = parser()
    made.json_config("--config", default="example.json")
    given = made.parse_args(["--nb_layers", "4"])
    assert (given.nb_layers, given.more) == (16, "text")


def test_arguments_are_copied_without_their_parser():
    given = parser().parse_args([])
    assert pickle.loads(pickle.dumps(given)) == copy.deepcopy(given) == given
    with pytest.raises(ValueError, match="trials.. of a copy of arguments: ask what parse_args returned"):
        list(copy.deepcopy(given).trials(1))


@pytest.mark.parametrize("name", ["", "_cpu", "_gpu"])
def test_processes_of_a_search_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"optimize_parallel{name}.. is not here: .*hookline sweep"):
        getattr(parser().parse_args([]), f"optimize_parallel{name}")(print, nb_trials=2)


def test_searches_that_cannot_be():
    with pytest.raises(ValueError, match="strategy='bayes' must be one of grid_search, random_search"):
        list(parser("bayes").parse_args([]).trials(1))
    with pytest.raises(ValueError, match="random_search needs a number of trials"):
        list(parser("random_search").parse_args([]).trials())
    with pytest.raises(ValueError, match="'--a'.: a tunable argument needs options"):
        HyperOptArgumentParser().opt_list("--a", tunable=True)
    with pytest.raises(ValueError, match="'--a'.: a tunable range needs low and high"):
        HyperOptArgumentParser().opt_range("--a", tunable=True, type=int)
    with pytest.raises(ValueError, match="low=0, log_base=2.: ratios need a range above 0"):
        HyperOptArgumentParser().opt_range("--a", tunable=True, type=int, low=0, high=1, log_base=2)


def test_freezing():
    module = Pair()
    module.freeze()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.unfreeze()
    assert all(parameter.requires_grad for parameter in module.parameters())


class Frozen(Pair):
    """Its user has put it into eval mode; says in which mode a step finds it, and puts it there again."""

    def __init__(self):
        super().__init__()
        self.modes = []
        self.eval()

    def training_step(self, data_batch, batch_nb):
        self.modes.append((self.training, self.generator.training))
        self.generator.eval()
        return super().training_step(data_batch, batch_nb)

    def validation_step(self, data_batch, batch_nb):
        return {"val_loss": Pair.training_step(self, data_batch, batch_nb)}


@pytest.mark.parametrize("sanity", [0, 1])
def test_all_is_in_train_mode_at_the_beginning_and_after_each_validation(sanity, caplog):
    module = Frozen()
    options = {"epochs": 1, "evaluate_every": "2 steps", "sanity_val_steps": sanity}
    hookline.Trainer(module, {"lightning": {}}, **options).train()
    assert module.modes == [(True, True), (True, False)] * 2 + [(True, True)]
    assert "eval mode" not in caplog.text
