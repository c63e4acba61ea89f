"""How the cost of a step grows, in counts: flat where it should be flat, by a constant for each where it should not."""

from collections import Counter

import pytest
import torch
from tests import budgets
from torch.utils.data import DataLoader

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.loop.training import Training
from hookline.testing import on_ranks


class Numbers(torch.utils.data.Dataset):
    """As many samples as one likes, none of which is kept."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return torch.full((8,), float(index % 7))


class Layers(ModuleInterface):
    """Parameters in tensors of a size, of a data set of a size, with values to log and loaders to validate on."""

    def __init__(self, tensors=4, size=8, samples=8 * 64, values=0, loaders=0):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.full((size,), 0.5) for _ in range(tensors))
        self.samples, self.loaders = samples, loaders
        self.logged = {f"value_{number}": 1.0 for number in range(values)}

    def train_step(self, global_step, batch, device):
        if self.logged:
            self.log(**self.logged)
        return sum((weight[:8] * batch).mean() for weight in self.weights)

    def val_step(self, global_step, batch, device):
        return batch.mean()

    def get_train_dataloader(self, sampler, batch_size):
        data = Numbers(self.samples)
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler, batch_size):
        data = Numbers(40)
        return {str(number): DataLoader(data, 8, sampler=sampler(data)) for number in range(self.loaders)} or None

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.0, foreach=False)], []


class Deaf(CallbackInterface):
    """Hears nothing in a step."""

    @hookimpl
    def on_begin_train(self): ...


class Hears(CallbackInterface):
    """Hears the end of each step."""

    @hookimpl
    def on_end_train_step(self, global_step): ...


class Records(CallbackInterface):
    """Takes the values of the log."""

    @hookimpl
    def on_log(self, metrics): ...


def trainer_of(module, plugins=(), **options):
    options = {"max_steps": budgets.STEPS, "train_batch_size": 8, "device": "cpu", **options}
    return Trainer(module, plugins, eval_when_finish=False, **options)


def counted(plugins=(), evaluate_every=None, **of_the_module):
    """Return how often a step calls each function."""
    trainer = trainer_of(Layers(**of_the_module), plugins, evaluate_every=evaluate_every)
    return budgets.functions_per_step(trainer.train)


def own(functions):
    """Return the calls of hookline's functions."""
    return sum(times for name, times in functions.items() if name.startswith("hookline."))


def test_plugins_are_paid_for_by_the_hooks_that_they_have_in_a_step():
    def many(kind, number):
        return counted({f"plugin_{index}": kind() for index in range(number)})

    plain = counted()
    assert many(Deaf, 100) == plain
    one, ten, hundred = (sum(many(Hears, number).values()) for number in (1, 10, 100))
    assert (ten - one, hundred - one) == (9, 99)  # a call each, and no more for who is one of many


def test_the_loop_costs_the_same_for_any_number_and_size_of_parameters():
    few, many, large = counted(), counted(tensors=400), counted(tensors=4, size=2_500_000)
    assert large == few
    assert own(many) == own(few)


def test_the_loop_costs_the_same_for_any_number_of_samples():
    few, many = (counted(samples=8 * 10**exponent) for exponent in (3, 6))
    assert many == few


def test_an_epoch_of_a_million_samples_begins_with_as_many_calls_as_one_of_a_thousand():
    def until_the_first_step(samples):
        steps = [Counter()]
        trainer = trainer_of(Layers(samples=samples), max_steps=1, evaluate_every=None)
        budgets.in_steps(trainer.train, steps, Training.take_step, functions=True)
        return sum(steps[0].values())

    until_the_first_step(8)
    assert until_the_first_step(10**6) == until_the_first_step(10**3)


def test_a_value_of_the_log_costs_the_same_for_each_and_a_step_does_not_wait_for_it():
    once, ten, hundred = (counted([Records()], values=number) for number in (1, 10, 100))
    each = (sum(ten.values()) - sum(once.values())) / 9
    assert sum(hundred.values()) - sum(ten.values()) == 90 * each
    assert each <= 8


def test_a_step_costs_the_same_for_any_number_of_loaders_and_each_loader_the_same():
    assert counted(loaders=8) == counted()
    two, four, eight = (sum(counted(loaders=number, evaluate_every="1 steps").values()) for number in (2, 4, 8))
    assert eight - four == 2 * (four - two)  # one alone has no name in its values, and costs a little less


def collectives(plugins):
    """Return how many collectives an ordinary step of this rank has."""
    steps = [Counter()]
    with budgets.Waits(steps):
        trainer = trainer_of(Layers(samples=24 * 64), plugins, train_batch_size=24, evaluate_every=None)
        budgets.in_steps(trainer.train, steps, Training.take_step, functions=False)
    return dict(budgets.ordinary(steps))


def of_ranks():
    """Return the collectives of a step by each way to train on several ranks."""
    return {name: collectives({name: {}}) for name in ("distributed", "ddp", "fsdp")}


@pytest.mark.slow
@pytest.mark.plugins
def test_a_step_has_as_many_collectives_on_any_number_of_ranks():
    two, three, four = (on_ranks(of_ranks, world) for world in (2, 3, 4))
    assert [*two, *three, *four] == [two[0]] * 9
    assert {name: one["syncs"] for name, one in two[0].items()} == {"distributed": 0, "ddp": 0, "fsdp": 0}
