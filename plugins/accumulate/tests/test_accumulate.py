import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface, Trainer, hookimpl
from hookline_accumulate import Accumulate


class Regression(ModuleInterface):
    """A small network on samples in their order, so that a loop by hand sees the very same batches."""

    def __init__(self, samples=44):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.inputs = torch.randn(samples, 4)
        self.references = self.inputs.sum(1, keepdim=True)
        self.losses = []

    def train_step(self, global_step, batch, device):
        inputs, references = batch
        return torch.nn.functional.mse_loss(self.net(inputs), references)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(TensorDataset(self.inputs, self.references), batch_size)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        self.estimated = estimated_global_steps_per_epoch
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def on_end_backward(self, global_step, loss_tensor):
        self.losses.append((global_step, loss_tensor.detach()))


def train_by_hand(micro_batch_size, window_size, epochs):
    module = Regression()
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(epochs):
        batches = list(module.get_train_dataloader(None, micro_batch_size))
        for begin in range(0, len(batches), window_size):
            window = batches[begin : begin + window_size]
            for batch in window:
                (module.train_step(0, batch, "cpu") / len(window)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return module, optimizer


def train(module, plugin, **options):
    trainer = Trainer(module, plugins=[plugin] if plugin else [], device="cpu", **options)
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name


@pytest.mark.parametrize("plugin", [Accumulate(steps=4), Accumulate(micro_batch_size=4)], ids=["steps", "size"])
def test_gives_the_bits_of_a_loop_by_hand_with_a_short_last_window(plugin):
    expected, optimizer = train_by_hand(micro_batch_size=4, window_size=4, epochs=2)
    module = Regression()
    trainer = train(module, plugin, epochs=2, train_batch_size=16)
    assert_same_weights(module, expected)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_divides_each_loss_by_the_size_of_its_own_window():
    module, plain = Regression(), Regression()
    trainer = Trainer(module, plugins=[Accumulate(steps=4)], device="cpu", train_batch_size=16)
    trainer.train()
    batches = list(plain.get_train_dataloader(None, 4))
    assert [step for step, _ in module.losses] == [0] * 4 + [1] * 4 + [2] * 3
    first = [plain.train_step(1, batch, "cpu").detach() / 4 for batch in batches[:4]]
    assert torch.equal(torch.stack([loss for _, loss in module.losses[:4]]), torch.stack(first))
    last = Regression()
    by_hand = train(last, Accumulate(steps=4), train_batch_size=16, max_steps=2).module
    third = [by_hand.train_step(3, batch, "cpu").detach() / 3 for batch in batches[8:]]
    assert torch.equal(torch.stack([loss for _, loss in module.losses[8:]]), torch.stack(third))


def test_counts_optimizer_steps():
    module = Regression()
    trainer = train(module, Accumulate(steps=4), epochs=3, train_batch_size=16)
    counters = trainer.counters
    assert (counters.global_step, counters.batches, counters.samples, counters.epochs) == (9, 33, 132, 3)
    assert module.estimated == trainer.totals.steps_per_epoch == 3
    assert trainer.totals.steps == 9
    assert trainer.schedulers[0].scheduler.last_epoch == 9


def test_trains_like_one_big_batch():
    accumulated, whole = Regression(48), Regression(48)
    train(accumulated, Accumulate(micro_batch_size=2), epochs=2, train_batch_size=16)
    train(whole, None, epochs=2, train_batch_size=16)
    for name, weights in whole.state_dict().items():
        torch.testing.assert_close(accumulated.state_dict()[name], weights, rtol=1e-5, atol=1e-6)


class FourRanks:
    """Says that there are four ranks; this process is the first."""

    @hookimpl
    def get_ranks(self):
        return 0, 0, 4


@pytest.mark.parametrize(
    ("ranks", "size", "window"), [([], 4, 16), ([], 64, 1), ([FourRanks()], 4, 4), ([FourRanks()], 16, 1)]
)
def test_micro_batch_size_is_of_one_rank(ranks, size, window):
    trainer = Trainer(
        Regression(), plugins=[Accumulate(micro_batch_size=size), *ranks], device="cpu", train_batch_size=64
    )
    assert trainer.hook.get_window_size(trainer=trainer) == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"accumulate\.steps=None and accumulate\.micro_batch_size=None: give exactly one of them"),
        ({"steps": 2, "micro_batch_size": 2}, r"steps=2 and accumulate\.micro_batch_size=2: give exactly one of them"),
        ({"steps": 0}, r"accumulate\.steps=0 must be at least 1"),
        ({"micro_batch_size": -1}, r"accumulate\.micro_batch_size=-1 must be at least 1"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Accumulate(**options)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (
            [Accumulate(micro_batch_size=5)],
            r"accumulate\.micro_batch_size=5: trainer\.train_batch_size=48 over 1 rank\(s\) is 48 samples a rank, "
            r"which micro-batches of 5 leave 3 of; take a divisor of 48 \(the nearest: 4 or 6\), or another",
        ),
        ([Accumulate(micro_batch_size=8), FourRanks()], r"48 over 4 rank\(s\) is 12 samples .*the nearest: 6 or 12\)"),
        ([Accumulate(micro_batch_size=64)], r"is 48 samples a rank, which .* of 64 leave 48 of; .*the nearest: 48\)"),
        ([Accumulate(steps=5)], r"train_batch_size=48 cannot be shared equally by 1 rank\(s\) . 5 micro-batch\(es\)"),
    ],
)
def test_refuses_what_does_not_divide(plugins, message):
    with pytest.raises(ValueError, match=message):
        Trainer(Regression(), plugins=plugins, device="cpu", train_batch_size=48).train()


def test_refuses_a_batch_that_the_ranks_cannot_share():
    trainer = Trainer(
        Regression(), plugins=[Accumulate(micro_batch_size=2), FourRanks()], device="cpu", train_batch_size=10
    )
    with pytest.raises(
        ValueError, match=r"train_batch_size=10 over 4 rank\(s\) leaves 2 sample\(s\) over; make the batch"
    ):
        trainer.train()
