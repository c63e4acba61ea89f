"""One table of programs, run by the plain loop that LERNOMATIC's documents describe and by ours, with equal results.

The original is not in the package registry. `Plain` is its trainer as its guide, its pages on trainer and model, and
its repository of 2019 say it; where ours differs on purpose (README, "What is otherwise"), the programs do not look.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hookline.testing import digest
from hookline_lernomatic import LernomaticModel, Trainer
from hookline_lernomatic.train import schedule

pytestmark = pytest.mark.plugins  # the trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def points(number=40, seed=1):
    inputs = torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())


class Net(LernomaticModel):
    """A line of layers."""

    def __init__(self, *sizes, last=None):
        torch.manual_seed(sum(sizes))
        layers = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.net = nn.Sequential(*layers[:-1], *([] if last is None else [last]))
        self.import_path = self.module_import_path = "nets.py"
        self.model_name, self.module_name = "Net", "Sequential"


class Plain:
    """The trainer of LERNOMATIC."""

    def __init__(self, model=None, **given):
        self.model = model
        options = {
            "num_epochs": 10, "learning_rate": 1e-4, "weight_decay": 1e-5, "batch_size": 64, "train_dataset": None,
            "val_dataset": None, "lr_scheduler": None, "save_every": -1, "save_hist": True, "tb_writer": None,
            "optim_function": "Adam", "loss_function": "CrossEntropyLoss", "print_every": 10,
        }  # fmt: skip
        vars(self).update(options | given)
        self.start_epoch = self.cur_epoch = 0
        for make in ("device", "optimizer", "dataloaders", "history"):
            getattr(self, f"_init_{make}")()
        self._send_to_device()

    def _init_device(self):
        self.device = torch.device("cpu")

    def _init_optimizer(self):
        kind = getattr(torch.optim, self.optim_function)
        self.optimizer = kind(self.model.get_model_parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        self.criterion = getattr(nn, self.loss_function)()

    def _init_dataloaders(self):
        self.train_loader = DataLoader(self.train_dataset, self.batch_size, drop_last=True)
        self.val_loader = self.val_dataset and DataLoader(self.val_dataset, self.batch_size)

    def _init_history(self):
        self.loss_iter = self.val_loss_iter = self.acc_iter = 0
        self.loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)
        self.val_loss_history = torch.zeros(len(self.val_loader or []) * self.num_epochs)
        self.acc_history = torch.zeros(len(self.val_loader or []) * self.num_epochs, dtype=torch.float64)

    def _send_to_device(self):
        pass

    def apply_lr_schedule(self):
        by_epoch = isinstance(self.lr_scheduler, (schedule.EpochSetScheduler, schedule.DecayToEpoch))
        self.set_learning_rate(self.lr_scheduler.get_lr(self.cur_epoch if by_epoch else self.loss_iter))

    def set_learning_rate(self, lr, param_zero=True):
        self.optimizer.param_groups[0]["lr"] = lr

    def train_epoch(self):
        self.model.set_train()
        for data, target in self.train_loader:
            if self.lr_scheduler is not None:  # the original does so behind the step, see the README
                self.apply_lr_schedule()
            loss = self.criterion(self.model.forward(data), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss_history[self.loss_iter] = loss.item()
            self.loss_iter += 1

    @torch.no_grad()
    def val_epoch(self):
        self.model.set_eval()
        right = 0
        for data, target in self.val_loader:
            output = self.model.forward(data)
            right += (output.argmax(dim=1) == target).sum().item()
            self.val_loss_history[self.val_loss_iter] = self.criterion(output, target).item()
            self.val_loss_iter += 1
        self.acc_history[self.acc_iter] = right / len(self.val_loader.dataset)
        self.acc_iter += 1

    def train(self):
        for _ in range(max(self.start_epoch, self.cur_epoch), self.num_epochs):
            self.train_epoch()
            if self.val_loader is not None:
                self.val_epoch()
            if self.save_hist:
                self.save_history("history")
            self.cur_epoch += 1

    def save_history(self, fname):
        pass

    def save_checkpoint(self, fname):
        pass

    def get_acc_history(self):
        return self.acc_history[: self.acc_iter]


# The programs: each is a function of the base class, as a program whose import line is changed

DATA = {"train_dataset": points(), "val_dataset": points(20, 2), "num_epochs": 3, "batch_size": 8}
PROGRAMS = {}


def program(function):
    PROGRAMS[function.__name__] = function
    return function


def asked(base, **more):
    return {"shuffle": False} | more if issubclass(base, Trainer) else more


@program
def as_it_is(base):
    return base(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def without_validation(base):
    return base(Net(6, 8, 2), **DATA | {"val_dataset": None}, learning_rate=0.02, **asked(base))


@program
def train_epoch_that_calls_that_of_the_base(base):
    class New(base):
        told = ()

        def train_epoch(self):
            self.told += (("before", self.cur_epoch, self.loss_iter),)
            super().train_epoch()
            self.told += (("after", self.cur_epoch, self.loss_iter, round(float(self.loss_history[4]), 5)),)

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def val_epoch_that_calls_that_of_the_base(base):
    class New(base):
        told = ()

        def val_epoch(self):
            self.told += (("before", self.cur_epoch, self.acc_iter, self.val_loss_iter),)
            super().val_epoch()
            self.told += (("after", self.acc_iter, self.val_loss_iter, float(self.acc_history[self.acc_iter - 1])),)

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def all_three_call_those_of_the_base(base):
    class New(base):
        told = ()

        def train(self):
            self.told += ("train",)
            super().train()
            self.told += ("trained", self.cur_epoch)

        def train_epoch(self):
            self.told += (("epoch", self.cur_epoch),)
            super().train_epoch()

        def val_epoch(self):
            super().val_epoch()
            self.told += (("validated", len(self.get_acc_history())),)

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def a_look_at_a_batch_before_and_after(base):
    class New(base):
        told = ()

        def train_epoch(self):
            self.told += (tuple(next(iter(self.train_loader))[0].shape),)
            self.model.set_train()
            for data, target in self.train_loader:
                self.optimizer.zero_grad()
                loss = self.criterion(self.model.forward(data), target)
                loss.backward()
                self.optimizer.step()
                self.loss_history[self.loss_iter] = loss.item()
                self.loss_iter += 1
            data, target = next(iter(self.train_loader))
            self.told += (round(self.criterion(self.model.forward(data), target).item(), 5),)

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def a_look_at_a_batch_and_then_that_of_the_base(base):
    class New(base):
        def train_epoch(self):
            next(iter(self.train_loader))
            super().train_epoch()

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def two_steps_on_each_batch(base):
    class New(base):
        def train_epoch(self):
            for data, target in self.train_loader:
                for _ in range(2):
                    self.optimizer.zero_grad()
                    loss = self.criterion(self.model.forward(data), target)
                    loss.backward()
                    self.optimizer.step()
                self.loss_history[self.loss_iter] = loss.item()
                self.loss_iter += 1

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def start_epoch_and_epochs_of_the_users_own(base):
    trainer = base(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))
    trainer.start_epoch = trainer.cur_epoch = 1
    return trainer


class OwnTrain:
    """The loop over epochs that the trainers of LERNOMATIC's own repository write out."""

    told = ()

    def train(self):
        for epoch in range(self.cur_epoch, self.num_epochs):
            self.train_epoch()
            self.told += ((epoch, self.cur_epoch, self.loss_iter),)
            if self.val_loader is not None:
                self.val_epoch()
            self.cur_epoch += 1


@program
def a_train_of_the_users_own_with_the_epochs_of_the_base(base):
    return type("New", (OwnTrain, base), {})(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def a_train_and_epochs_of_the_users_own_that_call_those_of_the_base(base):
    class New(OwnTrain, base):
        def train_epoch(self):
            self.told += ("begin",)
            super().train_epoch()

        def val_epoch(self):
            super().val_epoch()
            self.told += (float(self.acc_history[self.acc_iter - 1]),)

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


class Two(LernomaticModel):
    """Two networks, with the getters and setters overridden, as the guide tells."""

    def __init__(self):
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.import_path = self.module_import_path = "two.py"
        self.model_name, self.module_name = "Two", "Linear"

    def get_model_parameters(self):
        return [*self.body.parameters(), *self.head.parameters()]

    def get_net_state_dict(self):
        return {"body": self.body.state_dict(), "head": self.head.state_dict()}

    def set_net_state_dict(self, sd):
        self.body.load_state_dict(sd["body"])
        self.head.load_state_dict(sd["head"])

    def set_train(self):
        self.body.train()
        self.head.train()

    def set_eval(self):
        self.body.eval()
        self.head.eval()

    def send_to(self, device):
        self.body.to(device)
        self.head.to(device)

    def forward(self, X):
        return self.head(self.body(X).relu())


@program
def two_networks_in_one_model(base):
    return base(Two(), **DATA, learning_rate=0.02, **asked(base))


class InAList(Two):
    """Two networks in a list, a part of one under a name of its own."""

    def __init__(self):
        super().__init__()
        self.nets = [nn.Sequential(self.body, nn.ReLU()), self.head]
        del self.head
        self.body = self.nets[0][0]

    def get_model_parameters(self):
        return [parameter for net in self.nets for parameter in net.parameters()]

    def get_net_state_dict(self):
        return {str(place): net.state_dict() for place, net in enumerate(self.nets)}

    def set_train(self):
        for net in self.nets:
            net.train()

    set_eval = set_train

    def send_to(self, device):
        for net in self.nets:
            net.to(device)

    def forward(self, X):
        return self.nets[1](self.nets[0](X))


@program
def networks_in_a_list(base):
    return base(InAList(), **DATA, learning_rate=0.02, **asked(base))


class Noisy(Net):
    """A model that infers as its `set_eval` says."""

    def set_train(self):
        self.scale = 1

    def set_eval(self):
        self.scale = 3

    def forward(self, X):
        return self.net(X) * self.scale


@program
def modes_of_the_models_own(base):
    return base(Noisy(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def a_schedule_by_iteration(base):
    given = {"lr_scheduler": schedule.TriangularScheduler(lr_min=0.001, lr_max=0.05, stepsize=3)}
    return base(Net(6, 8, 2), **DATA, **given, **asked(base))


@program
def a_schedule_by_epoch(base):
    given = {"lr_scheduler": schedule.EpochSetScheduler({0: 0.05, 1: 0.1, 2: 0.5}, lr_value=False)}
    return base(Net(6, 8, 2), **DATA, **given, **asked(base))


@program
def a_schedule_that_an_own_epoch_applies_once_an_epoch(base):
    class New(base):
        def train_epoch(self):
            for data, target in self.train_loader:
                self.optimizer.zero_grad()
                loss = self.criterion(self.model.forward(data), target)
                loss.backward()
                self.optimizer.step()
                self.loss_iter += 1
            self.apply_lr_schedule()

    scheduler = schedule.DecayToEpoch(non_decay_time=1, decay_length=2, initial_lr=0.05)
    return New(Net(6, 8, 2), **DATA, lr_scheduler=scheduler, learning_rate=0.05, **asked(base))


@program
def groups_of_parameters_of_which_the_first_is_scheduled(base):
    class New(base):
        def _init_optimizer(self):
            first, *_, last = self.model.net
            groups = [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.3}]
            self.optimizer = torch.optim.SGD(groups, lr=0.1)
            self.criterion = nn.CrossEntropyLoss()

    scheduler = schedule.StepScheduler(lr_decay=0.5, lr_decay_every=4, lr_max=0.2)
    return New(Net(6, 8, 2), **DATA, lr_scheduler=scheduler, **asked(base))


@program
def another_optimizer_beside_the_one_of_the_base(base):
    class New(base):
        def _init_optimizer(self):
            super()._init_optimizer()
            self.head_optim = torch.optim.SGD(self.model.net[-1].parameters(), lr=0.5)

        def train_epoch(self):
            super().train_epoch()
            data, target = self.train_loader.dataset.tensors
            self.head_optim.zero_grad()
            self.criterion(self.model.forward(data), target).backward()
            self.head_optim.step()

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


@program
def a_step_on_every_second_batch(base):
    class New(base):
        def train_epoch(self):
            for number, (data, target) in enumerate(self.train_loader):
                self.criterion(self.model.forward(data), target).backward()
                if number % 2:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.loss_iter += 1

    return New(Net(6, 8, 2), **DATA, learning_rate=0.02, **asked(base))


# In the forms of the repository's own trainers ----------------------------------------


@program
def like_mnist(base):
    """Have an optimizer, loaders and a loss of its own."""

    class New(base):
        def __init__(self, model=None, **kwargs):
            self.data_dir = kwargs.pop("data_dir", "data/")
            super().__init__(model, **kwargs)
            self.criterion = nn.NLLLoss()

        def _init_optimizer(self):
            self.optimizer = torch.optim.SGD(self.model.get_model_parameters(), lr=self.learning_rate, momentum=0.5)

        def _init_dataloaders(self):
            self.train_loader = DataLoader(points(36), self.batch_size)  # the last batch is short
            self.val_loader = DataLoader(points(20, 2), self.batch_size)

    model = Net(6, 8, 2, last=nn.LogSoftmax(dim=1))
    return New(model, data_dir="here", num_epochs=3, batch_size=8, learning_rate=0.1)


@program
def like_a_denoising_autoencoder(base):
    """Have two models, one optimizer, and a loop of its own that saves and schedules."""

    class New(base):
        told = ()

        def __init__(self, encoder, decoder, **kwargs):
            self.encoder, self.decoder = encoder, decoder
            self.noise = torch.Generator().manual_seed(5)
            super().__init__(None, **kwargs)

        def _init_optimizer(self):
            both = [*self.encoder.get_model_parameters(), *self.decoder.get_model_parameters()]
            kind = getattr(torch.optim, self.optim_function)
            self.optimizer = kind(both, lr=self.learning_rate, weight_decay=self.weight_decay)
            self.criterion = nn.MSELoss()

        def _send_to_device(self):
            self.encoder.send_to(self.device)
            self.decoder.send_to(self.device)

        def train_epoch(self):
            self.encoder.set_train()
            self.decoder.set_train()
            for data, _ in self.train_loader:
                noisy = data + 0.1 * torch.rand(*data.shape, generator=self.noise)
                self.optimizer.zero_grad()
                loss = self.criterion(self.decoder.forward(self.encoder.forward(noisy)), data)
                loss.backward()
                self.optimizer.step()
                self.loss_history[self.loss_iter] = loss.item()
                self.loss_iter += 1
                if self.save_every > 0 and self.loss_iter % self.save_every == 0:
                    self.told += ((self.cur_epoch, self.loss_iter),)
                if self.lr_scheduler is not None:
                    self.apply_lr_schedule()

        def val_epoch(self):
            pass

        def save_checkpoint(self, fname):
            torch.save({"encoder": self.encoder.get_params(), "decoder": self.decoder.get_params()}, fname)

        def save_history(self, filename):
            torch.save({"loss_iter": self.loss_iter, "cur_epoch": self.cur_epoch}, filename)

    scheduler = schedule.TriangularScheduler(lr_min=0.001, lr_max=0.05, stepsize=3)
    given = {"lr_scheduler": scheduler, "save_every": 4, "learning_rate": 0.02, **asked(base)}
    return New(Net(6, 3), Net(3, 6), **DATA, **given)


@program
def like_an_adversarial_autoencoder(base):
    """Have three models, four optimizers, histories and a train of its own, and no `optimizer` or `loss_history`."""

    class New(OwnTrain, base):
        def __init__(self, q_net, p_net, d_net, **kwargs):
            self.q_net, self.p_net, self.d_net = q_net, p_net, d_net
            self.gen_lr, self.reg_lr = kwargs.pop("gen_lr", 1e-2), kwargs.pop("reg_lr", 5e-3)
            self.noise = torch.Generator().manual_seed(6)
            super().__init__(None, **kwargs)

        def _init_optimizer(self):
            made = lambda net, lr: torch.optim.Adam(net.get_model_parameters(), lr=lr)  # noqa: E731
            self.p_decoder_optim = made(self.p_net, self.gen_lr)
            self.q_encoder_optim = made(self.q_net, self.gen_lr)
            self.q_generator_optim = made(self.q_net, self.reg_lr)
            self.d_generator_optim = made(self.d_net, self.reg_lr)

        def _init_history(self):
            self.loss_iter = self.val_loss_iter = self.acc_iter = 0
            self.iter_per_epoch = len(self.train_loader)
            self.g_loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)
            self.recon_loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)

        def _send_to_device(self):
            for net in (self.q_net, self.p_net, self.d_net):
                net.send_to(self.device)

        def train_epoch(self):
            for data, _ in self.train_loader:
                for one in (self.p_decoder_optim, self.q_encoder_optim, self.q_generator_optim, self.d_generator_optim):
                    one.zero_grad()
                recon = functional.mse_loss(self.p_net.forward(self.q_net.forward(data)), data)
                recon.backward()
                self.p_decoder_optim.step()
                self.q_encoder_optim.step()
                self.d_generator_optim.zero_grad()
                real = self.d_net.forward(torch.randn(len(data), 3, generator=self.noise))
                fake = self.d_net.forward(self.q_net.forward(data))
                (functional.softplus(-real) + functional.softplus(fake)).mean().backward()
                self.d_generator_optim.step()
                self.q_net.zero_grad()
                loss = functional.softplus(-self.d_net.forward(self.q_net.forward(data))).mean()
                loss.backward()
                self.q_generator_optim.step()
                self.g_loss_history[self.loss_iter] = loss.item()
                self.recon_loss_history[self.loss_iter] = recon.item()
                self.loss_iter += 1

        def val_epoch(self):
            pass

    return New(Net(6, 3), Net(3, 6), Net(3, 4, 1), **DATA, **asked(base))


@program
def like_a_dcgan(base):
    """Have two models and optimizers, no validation, and a history without `loss_history`."""

    class New(base):
        def __init__(self, D, G, **kwargs):
            self.discriminator, self.generator = D, G
            self.noise = torch.Generator().manual_seed(7)
            super().__init__(None, **kwargs)
            self.criterion = nn.BCEWithLogitsLoss()

        def _init_dataloaders(self):
            self.train_loader = DataLoader(self.train_dataset, self.batch_size, drop_last=True)
            self.test_loader = self.val_loader = None

        def _init_history(self):
            self.loss_iter = self.test_loss_iter = self.acc_iter = 0
            self.d_loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)
            self.g_loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)

        def _init_optimizer(self):
            made = lambda net: torch.optim.Adam(net.get_model_parameters(), self.learning_rate, (0.5, 0.999))  # noqa: E731
            self.optim_g, self.optim_d = made(self.generator), made(self.discriminator)

        def set_learning_rate(self, lr, param_zero=True):
            self.optim_d.param_groups[0]["lr"] = self.optim_g.param_groups[0]["lr"] = lr

        def train_epoch(self):
            self.discriminator.set_train()
            self.generator.set_train()
            for data, _ in self.train_loader:
                ones, zeros = torch.ones(len(data), 1), torch.zeros(len(data), 1)
                self.discriminator.zero_grad()
                fake = self.generator.forward(torch.randn(len(data), 3, generator=self.noise))
                real = self.criterion(self.discriminator.forward(data), ones)
                err_d = real + self.criterion(self.discriminator.forward(fake.detach()), zeros)
                err_d.backward()
                self.optim_d.step()
                self.generator.zero_grad()
                err_g = self.criterion(self.discriminator.forward(fake), ones)
                err_g.backward()
                self.optim_g.step()
                self.d_loss_history[self.loss_iter] = err_d.item()
                self.g_loss_history[self.loss_iter] = err_g.item()
                self.loss_iter += 1
            if self.lr_scheduler is not None:
                self.apply_lr_schedule()

        def val_epoch(self):
            pass

    scheduler = schedule.DecayToEpoch(non_decay_time=1, decay_length=2, initial_lr=0.01)
    given = {"lr_scheduler": scheduler, "learning_rate": 0.01, **asked(base)}
    return New(Net(6, 4, 1), Net(3, 6), **DATA, **given)


@program
def like_pix2pix(base):
    """Have pairs of pictures, an eval mode between two steps, and a validation that is passed over."""

    class New(base):
        def __init__(self, g_net, d_net, **kwargs):
            self.g_net, self.d_net = g_net, d_net
            super().__init__(None, **kwargs)

        def _init_optimizer(self):
            made = lambda net: torch.optim.Adam(net.get_model_parameters(), self.learning_rate, (0.5, 0.999))  # noqa: E731
            self.d_optim, self.g_optim = made(self.d_net), made(self.g_net)
            self.gan_criterion, self.l1_criterion = nn.BCEWithLogitsLoss(), nn.L1Loss()

        def _init_history(self):
            self.loss_iter = self.val_loss_iter = self.acc_iter = 0
            self.g_loss_history = torch.zeros(len(self.train_loader) * self.num_epochs)

        def train_epoch(self):
            self.d_net.set_train()
            self.g_net.set_train()
            for a_real, b_real in self.train_loader:
                b_fake = self.g_net.forward(a_real)
                self.d_optim.zero_grad()
                ab_fake = torch.cat((a_real, b_fake), dim=1)
                fake = self.d_net.forward(ab_fake.detach())
                real = self.d_net.forward(torch.cat((a_real, b_real), dim=1))
                d_loss = self.gan_criterion(fake, torch.zeros_like(fake)) + self.gan_criterion(
                    real, torch.ones_like(real)
                )
                d_loss.backward()
                self.d_optim.step()
                self.d_net.set_eval()
                self.g_optim.zero_grad()
                fake = self.d_net.forward(ab_fake)
                g_loss = self.gan_criterion(fake, torch.ones_like(fake)) + self.l1_criterion(b_fake, b_real) * 10
                g_loss.backward()
                self.g_optim.step()
                self.g_loss_history[self.loss_iter] = g_loss.item()
                self.loss_iter += 1

        def val_epoch(self):
            pass

    a, b = points(24, 8).tensors[0], points(24, 9).tensors[0]
    given = {"train_dataset": TensorDataset(a, b), "val_dataset": TensorDataset(a, b), "learning_rate": 0.01}
    return New(Net(6, 8, 6), Net(12, 4, 1), **DATA | given, **asked(base))


# The comparison -----------------------------------------------------------------------

COUNTED = ("cur_epoch", "loss_iter", "val_loss_iter", "acc_iter", "told")
HISTORIES = (
    "loss_history",
    "val_loss_history",
    "acc_history",
    "g_loss_history",
    "d_loss_history",
    "recon_loss_history",
)


def results(trainer):
    """Return what both bases keep: counters, what the program wrote down, histories and weights."""
    kept = vars(trainer)
    models = [value for value in kept.values() if isinstance(value, LernomaticModel)]
    told = {name: getattr(trainer, name) for name in COUNTED if hasattr(trainer, name)}
    histories = {name: kept[name].tolist() for name in HISTORIES if name in kept}
    return told, histories, [digest(model.get_net_state_dict()) for model in models]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_comes_out_as_in_the_plain_loop(name):
    plain, ours = PROGRAMS[name](Plain), PROGRAMS[name](Trainer)
    plain.train()
    ours.train()
    expected, got = results(plain), results(ours)
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    for kind, values in expected[1].items():
        assert got[1][kind] == pytest.approx(values, rel=1e-6), kind
    assert got[2] == expected[2]
    if ours.core is not None and ours.core.counters.batches:
        epochs = ours.core.epoch
        assert ours.core.counters.batches == len(plain.train_loader) * epochs
        assert ours.core.counters.samples == sum(len(batch[0]) for batch in plain.train_loader) * epochs
