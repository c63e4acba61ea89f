import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import PlainModule, on_ranks, tiny_trainer
from hookline_clip import Clip

BATCHES = 6


class Regression(ModuleInterface):
    """A small network on a list of batches, so that a loop by hand sees the very same ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.batches = [(x, 30 * x.sum(1, keepdim=True)) for x in torch.randn(BATCHES, 5, 4)]

    def train_step(self, global_step, batch, device):
        inputs, references = batch
        return torch.nn.functional.mse_loss(self.net(inputs), references)

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)], []


def train_by_hand(clip):
    module = Regression()
    optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    for batch in module.batches:
        module.train_step(0, batch, "cpu").backward()
        clip(list(module.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return module


def train(plugins):
    module = Regression()
    Trainer(module, plugins=plugins, device="cpu").train()
    return module


def assert_same_weights(one, other):
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name


def clip_by_norm(max_norm, norm_type=2.0):
    return lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def clip_by_both(parameters):
    torch.nn.utils.clip_grad_value_(parameters, 0.1)
    torch.nn.utils.clip_grad_norm_(parameters, 0.3)


def clip_by_ratio(parameters):
    """Clip by the formula of adaptive gradient clipping, unit by unit."""
    for parameter in parameters:
        units = [...] if parameter.ndim < 2 else range(len(parameter))
        for unit in units:
            limit = 0.05 * max(parameter.detach()[unit].norm(), torch.tensor(1e-3))
            norm = parameter.grad[unit].norm()
            if norm > limit:
                parameter.grad[unit] *= limit / norm


def clip_by_ratio_and_norm(parameters):
    clip_by_ratio(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 0.01)


def clip_each(parameters):
    for parameter in parameters:
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)


@pytest.mark.parametrize(
    ("plugin", "by_hand"),
    [
        (Clip(), clip_by_norm(1.0)),
        (Clip(0.5), clip_by_norm(0.5)),
        (Clip(0.5, norm_type=1.0), clip_by_norm(0.5, 1.0)),
        (Clip(0.5, norm_type=math.inf), clip_by_norm(0.5, math.inf)),
        (Clip(None, max_value=0.1), lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.1)),
        (Clip(0.3, max_value=0.1), clip_by_both),
        (Clip(0.3, max_value=0.1, log_norm=True), clip_by_both),
        (Clip(0.5, log_norm=True), clip_by_norm(0.5)),
        (Clip(0.5, per_parameter=True), clip_each),
    ],
    ids=["default", "norm", "norm 1", "norm inf", "value", "value then norm", "told, both", "told", "each"],
)
def test_gives_the_bits_of_a_loop_by_hand(plugin, by_hand):
    expected = train_by_hand(by_hand)
    assert_same_weights(train([plugin]), expected)
    plain = train([])
    assert not torch.equal(plain.net[0].weight, expected.net[0].weight)  # there was something to clip


@pytest.mark.parametrize(
    ("options", "by_hand"), [({"max_norm": None}, clip_by_ratio), ({"max_norm": 0.01}, clip_by_ratio_and_norm)]
)
def test_clips_units_by_their_ratio_to_the_weights(options, by_hand):
    """But for rounding: torch takes all rows at once."""
    expected, plain = train_by_hand(by_hand), train([])
    torch.testing.assert_close(train([Clip(**options, max_ratio=0.05)]).state_dict(), expected.state_dict())
    assert (plain.net[0].weight - expected.net[0].weight).abs().max() > 0.05


def test_a_unit_of_zeros_moves_and_one_of_small_gradients_is_left_alone():
    module = Regression()
    with torch.no_grad():
        module.net[2].bias.zero_()
    Trainer(module, plugins=[Clip(None, max_ratio=0.5)], device="cpu").train()
    assert 0 < module.net[2].bias.abs() < 0.1
    assert_same_weights(train([Clip(None, max_ratio=1e6)]), train([]))


class Told(CallbackInterface):
    """Keeps the logged norms, and measures them by hand where the gradients are complete."""

    def __init__(self):
        self.logged, self.measured = [], []

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer):
        gradients = [parameter.grad for parameter in trainer.module.parameters()]
        self.measured.append(torch.nn.utils.get_total_norm(gradients).item())

    @hookimpl
    def on_log(self, metrics):
        self.logged += [value for name, value in metrics.items() if name == "grad_norm_before_clip"]


CLIPS = [{"max_norm": 0.5}, {"max_norm": 0.1, "max_value": 0.1}, {"max_norm": None, "max_ratio": 0.1}]


@pytest.mark.parametrize("options", [*CLIPS, {"max_norm": 0.1, "per_parameter": True}], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_tells_the_norm_before_clipping(options, first):
    told, clip = Told(), Clip(**options, log_norm=True)
    plugins = [told, clip] if first else [clip, told]
    Trainer(Regression(), plugins, device="cpu", log_every="1 steps").train()
    assert told.logged == pytest.approx(told.measured, rel=1e-6)
    assert len(told.logged) == BATCHES
    assert min(told.logged) > 0.5
    mean = Told()
    Trainer(Regression(), [mean, Clip(**options, log_norm=True)], device="cpu", log_every="6 steps").train()
    assert mean.logged == pytest.approx([sum(told.measured) / BATCHES])


def test_a_norm_that_nobody_asks_for_is_not_told():
    told = Told()
    Trainer(Regression(), [told, Clip()], device="cpu", log_every="1 steps").train()
    assert told.logged == []


def count_norms(clip):
    class Norms(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "norm" in function.name()
            return function(*args, **kwargs or {})

    with Norms() as norms:
        train([clip])
    return norms.count


def test_the_norm_that_is_told_is_taken_once():
    assert count_norms(Clip(log_norm=True)) == count_norms(Clip()) > 0


def test_norm_is_that_of_all_gradients_together():
    class Watching(Regression):
        norms = ()

        @hookimpl(trylast=True)
        def on_begin_optimizer_step(self, optimizers):
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters()])
            self.norms = (*self.norms, norm)

    module = Watching()
    Trainer(module, plugins=[Clip(0.5)], device="cpu").train()
    torch.testing.assert_close(torch.stack(module.norms), torch.full((BATCHES,), 0.5))


def test_touches_only_the_optimizers_that_step():
    class TwoOptimizers(Regression):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            return [torch.optim.SGD(self.net[index].parameters(), 0.01) for index in (0, 2)], []

        @hookimpl
        def update(self, trainer, window):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step(trainer.optimizers[:1])
            return outputs

        @hookimpl(trylast=True)
        def on_begin_optimizer_step(self, optimizers):
            self.first = torch.nn.utils.get_total_norm([p.grad for p in self.net[0].parameters()])
            self.second = torch.nn.utils.get_total_norm([p.grad for p in self.net[2].parameters()])

    module = TwoOptimizers()
    Trainer(module, plugins=[Clip(0.5)], device="cpu").train()
    torch.testing.assert_close(module.first, torch.tensor(0.5))  # their norm alone, without the others' share
    assert module.second > 0.5


class Looked(ModuleInterface):
    """Two numbers a row of a table, of which a batch looks some up, one of them twice; and a layer."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.net = torch.nn.Embedding(10, 2, sparse=sparse), torch.nn.Linear(2, 1)

    def train_step(self, global_step, batch, device):
        return (30 * self.net(self.table(batch))).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return [torch.tensor(rows) for rows in ([1, 1, 2], [3, 4, 3], [5, 1, 9])]

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1)], []


@pytest.mark.parametrize(
    "options",
    [
        (1.0,),
        (0.5, 1.0),
        (0.5, math.inf),
        (None, 2.0, 0.1),
        (0.3, 2.0, 0.1),
        (None, 2.0, None, 0.05),
        (0.5, 2.0, None, None, True),
    ],
    ids=["norm", "norm 1", "norm inf", "value", "value then norm", "ratio", "each"],
)
def test_sparse_gradients_are_clipped_as_dense_ones(options):
    """But for the order in which squares are added, since zeros are not."""
    weights = []
    for sparse, plugins in ((False, [Clip(*options)]), (True, [Clip(*options)]), (False, [])):
        module = Looked(sparse)
        Trainer(module, plugins=plugins, device="cpu").train()
        assert module.table.weight.grad is None
        weights.append(dict(module.state_dict()))
    torch.testing.assert_close(weights[1], weights[0])
    assert (weights[2]["table.weight"] - weights[0]["table.weight"]).abs().max() > 0.1  # there was something to clip


class NothingLooked(Looked):
    """Has a gradient of no row, and one of no number."""

    def __init__(self):
        super().__init__(sparse=True)
        self.other, self.none = torch.nn.Embedding(4, 2, sparse=True), torch.nn.Parameter(torch.zeros(0))

    def train_step(self, global_step, batch, device):
        return super().train_step(global_step, batch, device) + self.other(batch[:0]).sum() + self.none.sum()


def test_the_largest_value_where_some_have_none():
    module = NothingLooked()
    Trainer(module, plugins=[Clip(0.5, math.inf)], device="cpu").train()
    plain = Looked(sparse=False)
    Trainer(plain, plugins=[Clip(0.5, math.inf)], device="cpu").train()
    torch.testing.assert_close(module.table.weight, plain.table.weight)


def of_a_rank():
    torch.set_num_threads(1)
    ends = {}
    for options in RANKED:
        told = Told()
        told.on_begin_optimizer_step = None
        plugins = {"fsdp": {}, "clip": {**options, "log_norm": True}, "told": told}
        trainer = tiny_trainer(plugins, PlainModule(), epochs=1, log_every="1 steps")
        trainer.train()
        ends[str(options)] = trainer.export_model(), told.logged
    return ends


RANKED = [{"max_norm": None, "max_ratio": 0.01}, {"max_norm": 0.05, "per_parameter": True}, {"max_norm": 0.05}]


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_that_share_the_weights_clip_as_one_does():
    first, second = on_ranks(of_a_rank, 2)
    for options in RANKED:
        told = Told()
        alone = tiny_trainer([Clip(**options, log_norm=True), told], PlainModule(), epochs=1, log_every="1 steps")
        alone.train()
        weights, norms = first[str(options)]
        torch.testing.assert_close(weights, alone.export_model(), rtol=1e-4, atol=1e-5)
        assert norms == second[str(options)][1] == pytest.approx(told.logged, rel=1e-4)
        assert min(told.logged) > 0.05


class CountingSyncs(TorchDispatchMode):
    """Counts how often a value is fetched from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "plugin",
    [Clip(), Clip(None, max_value=1.0), Clip(max_ratio=0.1, per_parameter=True, log_norm=True)],
    ids=["norm", "value", "others"],
)
def test_waits_for_nothing(plugin):
    counts = []
    for plugins in ([], [plugin]):
        with CountingSyncs() as counting:
            train(plugins)
        counts.append(counting.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, r"clip\.max_norm=0\.0 must be above 0, or null to clip no norm"),
        ({"max_norm": math.nan}, r"clip\.max_norm=nan must be above 0"),
        ({"max_value": -1.0}, r"clip\.max_value=-1\.0 must be above 0, or null to clip no value"),
        ({"norm_type": 0.0}, r"clip\.norm_type=0\.0 must be above 0; 2 is the Euclidean norm, inf the largest"),
        ({"max_ratio": 0.0}, r"clip\.max_ratio=0\.0 must be above 0, or null to clip no ratio"),
        ({"max_norm": None}, r"clip has nothing to do: give max_norm, max_value, max_ratio, or several of them"),
        ({"max_norm": None, "max_value": 1.0, "per_parameter": True}, r"clip\.per_parameter=true needs clip\.max_norm"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Clip(**options)
