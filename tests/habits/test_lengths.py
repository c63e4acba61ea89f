"""How long a run is, whatever its loaders say; schedules that are as long; and going on with a run that is another."""

import warnings

import pytest
import torch
from tests.habits.common import Regression, train, two
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, Subset

from hookline.testing import Memory, TinyModule, digest, tiny_trainer


class Line(Regression):
    """A regression on 40 samples of three numbers, of which each rate of learning is kept."""

    def __init__(self):
        super().__init__()
        self.rates = []

    def train_step(self, global_step, batch, device):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return (self.net(batch[0]) - batch[1]).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.1)], []


def said_of(caplog, what):
    """Return what was said of something."""
    return [record.getMessage() for record in caplog.records if what in record.getMessage()]


# Lengths ------------------------------------------------------------------------------


class Lying(IterableDataset):
    """Says how many records it has, and gives those that a filter leaves."""

    def __init__(self, said, given):
        self.said, self.given = said, given

    def __len__(self):
        return self.said

    def __iter__(self):
        return ((torch.full((3,), float(i)) / 100, torch.ones(1)) for i in range(self.given))


class Stream(Line):
    """Trains on a stream that says a length, and another epoch's that it is of."""

    def __init__(self, said, *given):
        super().__init__()
        self.said, self.given = said, given

    def get_train_dataloader(self, sampler, batch_size):
        given = self.given[min(self.trainer.epoch, len(self.given) - 1)]
        return DataLoader(Lying(self.said, given), batch_size)


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(("said", "given", "steps"), [(100, [60], 250), (10, [60], 250), (60, [60, 10, 40], 100)])
def test_max_steps_is_reached_whatever_a_stream_says(said, given, steps, caplog):
    trainer = train(Stream(said, *given), train_batch_size=1, max_steps=steps)
    assert (trainer.global_step, trainer.status) == (steps, "finished")
    first = next(n for n in given if n != said)
    assert said_of(caplog, "training loader says that it has")[0] == (
        f"the training loader says that it has {said} batches, and gave {first}; what was given counts"
    )


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_epochs_are_as_many_as_were_asked_for_whatever_a_stream_says(caplog):
    trainer = train(Stream(100, 60), train_batch_size=1, epochs=3)
    assert (trainer.global_step, trainer.epoch, trainer.totals.steps) == (180, 3, 300)
    assert len(said_of(caplog, "and gave 60; what was given counts")) == 1


class Curriculum(Line):
    """Has as many samples as an epoch shall have."""

    def __init__(self, *lengths):
        super().__init__()
        self.lengths = lengths

    def get_train_dataloader(self, sampler, batch_size):
        length = self.lengths[min(self.trainer.epoch, len(self.lengths) - 1)]
        part = Subset(self.data, range(length))
        return DataLoader(part, batch_size, sampler=sampler(part))


def test_a_curriculum_is_trained_to_its_end():
    trainer = train(Curriculum(40, 10), train_batch_size=1, max_steps=100)
    assert (trainer.global_step, trainer.epoch, trainer.status) == (100, 7, "finished")
    trainer = train(Curriculum(10, 40), train_batch_size=1, epochs=3)
    assert (trainer.global_step, trainer.epoch) == (90, 3)


def curricula():
    torch.set_num_threads(1)
    found = []
    for options in ({"max_steps": 50}, {"epochs": 3}):
        trainer = train(Curriculum(40, 10), {"ddp": {}}, train_batch_size=2, **options)
        found.append((trainer.global_step, trainer.epoch, trainer.status))
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_curriculum_of_two_ranks():
    assert two(curricula) == [[(50, 7, "finished"), (30, 3, "finished")]] * 2


# Schedules ----------------------------------------------------------------------------


class Cosine(Line):
    """A cosine over as many steps as the run has, or as many as somebody has counted."""

    def __init__(self, counted=None, kind=lr_scheduler.CosineAnnealingLR):
        super().__init__()
        self.counted, self.kind = counted, kind

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = self.counted(steps_per_epoch, epochs) if self.counted else self.trainer.totals.steps
        return [optimizer], [self.kind(optimizer, steps)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 2}, 80),
        ({"max_steps": 10}, 10),
        ({"max_steps": 50}, 50),
        ({"max_steps": 50, "epochs": 5}, 50),
        ({"max_steps": 300, "epochs": 2}, 80),
        ({"epochs": 2, "max_train_steps_per_epoch": 7}, 14),
    ],
    ids=str,
)
def test_a_schedule_over_the_total_comes_to_its_end(options, steps, caplog):
    trainer = train(Cosine(), train_batch_size=1, **options)
    assert trainer.global_step == trainer.totals.steps == steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert not said_of(caplog, "CosineAnnealingLR")


@pytest.mark.parametrize(
    ("counted", "steps", "said"),
    [
        (lambda steps, epochs: steps * epochs, 10, "is at move 10 where training ends: it was made for 40 moves"),
        (lambda steps, epochs: 6, 10, "has been moved past its end: it was made for 6 moves"),
    ],
)
def test_a_schedule_of_another_length_is_told_once(counted, steps, said, caplog):
    train(Cosine(counted), train_batch_size=1, max_steps=steps)
    (told,) = said_of(caplog, "CosineAnnealingLR")
    assert said in told
    assert "`self.trainer.totals.steps` says in get_optimizers_schedulers how many optimizer steps" in told


# Going on with more epochs ------------------------------------------------------------


def sequence(optimizer, steps):
    """Return a warmup of three steps and a cosine, as many recipes have it."""
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, steps - 3)
    return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])


SCHEDULES = {
    "cosine": lr_scheduler.CosineAnnealingLR,
    "one cycle": lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
    "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
    "lambda": lambda optimizer, steps: lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps),
    "polynomial": lambda optimizer, steps: lr_scheduler.PolynomialLR(optimizer, steps, power=2),
    "sequence": sequence,
}


def by_hand(kind, steps, total):
    """Return the rates of a loop over some steps, by a schedule that is made for so many."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SCHEDULES[kind](optimizer, total)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return rates


def saved(kind, epochs):
    """Train some epochs of four steps; return the trainer, and the states of the run."""
    memory = Memory(every="1 steps")
    return train(Cosine(kind=SCHEDULES[kind]), [memory], train_batch_size=10, epochs=epochs), memory.states


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("at", [3, 8])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_longer_run_goes_on_by_the_schedule_as_it_is_built_now(kind, at, caplog):
    short, states = saved(kind, 2)
    assert short.module.rates == pytest.approx(by_hand(kind, 8, 8), abs=1e-12)
    longer = train(Cosine(kind=SCHEDULES[kind]), [Memory(states[at])], train_batch_size=10, epochs=4)
    assert longer.module.rates == pytest.approx(by_hand(kind, 16, 16)[at:], abs=1e-9)
    (told,) = said_of(caplog, "was another one when it was saved")
    assert f"it goes on as it is built now, at its move {at}" in told


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "sequence"])
def test_a_longer_run_goes_on_by_the_schedule_as_it_was_saved(kind, caplog):
    _, states = saved(kind, 2)
    options = {"train_batch_size": 10, "epochs": 4, "schedulers": "as_saved"}
    longer = train(Cosine(kind=SCHEDULES[kind]), [Memory(states[4])], **options)
    assert longer.module.rates == pytest.approx(by_hand(kind, 16, 8)[4:], abs=1e-9)
    (told,) = said_of(caplog, "was another one when it was saved")
    assert "as it was saved, since trainer.schedulers=as_saved" in told


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_run_of_the_same_length_goes_on_as_ever(kind, caplog):
    whole, states = saved(kind, 2)
    for at in (2, 5):
        again = train(Cosine(kind=SCHEDULES[kind]), [Memory(states[at])], train_batch_size=10, epochs=2)
        assert again.module.rates == whole.module.rates[at:]
    assert not said_of(caplog, "was another one when it was saved")


# Growing while it trains --------------------------------------------------------------


class Unfrozen(TinyModule):
    """Its first layer joins the optimizer, and the schedule, in the second epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.Adam([weight for weight in self.parameters() if weight.requires_grad], lr=1e-2)
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.totals.steps)]

    def on_begin_train_epoch(self, global_step, epoch):
        if epoch == 1 and self.trainer.position == 0:
            self.net[0].requires_grad_(True)
            late = {"params": list(self.net[0].parameters()), "lr": 1e-3, "initial_lr": 1e-3}
            self.trainer.optimizers[0].add_param_group(late)
            self.trainer.schedulers[0].scheduler.base_lrs.append(1e-3)


def test_a_run_that_unfreezes_resumes_at_every_step():
    memory = Memory(every="1 steps")
    whole = tiny_trainer([memory], Unfrozen(), epochs=3)
    whole.train()
    assert not torch.equal(whole.module.net[0].weight, Unfrozen().net[0].weight)
    for at, state in memory.states.items():
        resumed = tiny_trainer([Memory(state)], Unfrozen(), epochs=3)
        resumed.train()
        assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict()), at
        assert len(resumed.optimizers[0].param_groups) == 2, at


class Growing(TinyModule):
    """Has a layer more from its second epoch on, and asks what it is resumed from."""

    def __init__(self):
        super().__init__()
        self.net.append(torch.nn.Identity())
        self.asked = "never"

    def grow(self, optimizer):
        self.net[5] = torch.nn.Linear(1, 1)
        with torch.no_grad():
            self.net[5].weight.fill_(1.0)
            self.net[5].bias.fill_(0.0)
        optimizer.add_param_group({"params": list(self.net[5].parameters())})

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        self.asked = self.trainer.resuming
        if self.asked is not None and self.asked.global_step > steps_per_epoch:
            self.grow(optimizer)
        return [optimizer], []

    def on_begin_train_epoch(self, global_step, epoch):
        if epoch == 1 and self.trainer.position == 0:
            self.grow(self.trainer.optimizers[0])


def test_a_module_is_told_what_it_is_resumed_from():
    memory = Memory(every="1 steps")
    whole = tiny_trainer([memory], Growing(), epochs=3)
    whole.train()
    assert whole.module.asked is None
    assert len(whole.optimizers[0].param_groups) == 2
    for at, state in memory.states.items():
        resumed = tiny_trainer([Memory(state)], Growing(), epochs=3)
        resumed.train()
        assert resumed.module.asked.global_step == at
        assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict()), at
