"""Steps in backward give the bits of the plain loop, keep few gradients alive, and never hide one from who needs it."""

import re

import pytest
import torch

from hookline import CallbackInterface, hookimpl, hookspecs
from hookline.testing import Memory, PlainModule, TinyModule, digest, on_ranks, run_ranks, tiny_trainer, train_tiny
from hookline_optimizer_in_backward import OptimizerInBackward

WAYS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.05),
    "momentum": lambda weights: torch.optim.SGD(weights, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda weights: torch.optim.Adam(weights, amsgrad=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, torch.tensor(1e-2)),
    "foreach": lambda weights: torch.optim.AdamW(weights, 1e-2, foreach=True),
    "fused": lambda weights: torch.optim.AdamW(weights, 1e-2, fused=True),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "rprop": torch.optim.Rprop,
}


class Module(TinyModule):
    """Two groups of parameters with rates of their own, which a scheduler moves."""

    def __init__(self, way="adamw"):
        super().__init__()
        self.way = way

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        groups = [{"params": [*self.net[0].parameters()], "name": "low"}, {"params": [*self.net[1:].parameters()]}]
        optimizer = WAYS[self.way](groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 0.8**n])


def trained(plugins=(), module=None, **options):
    trainer = tiny_trainer(plugins, module or Module(), **options)
    trainer.train()
    return trainer


def kept(trainer):
    """Return the bits of all that a training ends with."""
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return digest([trainer.module.state_dict(), states]), trainer.metrics


@pytest.mark.parametrize("way", WAYS)
def test_the_bits_are_those_of_the_plain_loop(way):
    assert kept(trained([OptimizerInBackward()], Module(way))) == kept(trained([], Module(way)))


def test_a_state_is_read_with_and_without_it():
    memory, plain = Memory(every="1 steps"), Memory(every="1 steps")
    whole = trained([memory, OptimizerInBackward()])
    trained([plain])
    for step in (3, 9):
        states = [{**one.states[step], "plugins": {}} for one in (memory, plain)]
        for state in states:
            state["trainer"]["counters"]["seconds"] = 0
        assert digest(states[0]) == digest(states[1])
        assert kept(trained([Memory(states[0])])) == kept(whole)
        assert kept(trained([Memory(states[1]), OptimizerInBackward()])) == kept(whole)


class Alive(CallbackInterface):
    """Measures the most bytes of gradients that are alive at once."""

    def __init__(self):
        self.most = 0

    @hookimpl
    def on_begin_train(self, trainer):
        weights = [*trainer.module.parameters()]

        def look(_):
            alive = sum(w.grad.nbytes for w in weights if w.grad is not None)
            self.most = max(self.most, alive)

        for weight in weights:
            weight.register_post_accumulate_grad_hook(look)


def most(trainer):
    return trainer.plugins.get_plugin("alive").most


def test_the_gradient_of_one_parameter_is_alive_at_once():
    plain, ours = Alive(), Alive()
    module = trained([plain]).module
    trained([OptimizerInBackward(), ours])  # listed first, and still behind who looks at each gradient
    sizes = [weight.nbytes for weight in module.parameters()]
    assert (plain.most, ours.most) == (sum(sizes), max(sizes))


def test_a_parameter_that_is_unfrozen_or_joins_later_is_trained_as_ever():
    class Later(CallbackInterface):
        @hookimpl
        def on_begin_train_epoch(self, trainer, epoch):
            trainer.module.net[0].requires_grad_(epoch > 0)

        @hookimpl
        def on_end_train_epoch(self, trainer):
            if trainer.epoch == 0:
                trainer.module.late = torch.nn.Parameter(torch.ones(1))
                trainer.optimizers[0].add_param_group({"params": [trainer.module.late], "lr": 1e-3})

    class Two(TinyModule):
        def get_optimizers_schedulers(self, steps_per_epoch, epochs):
            return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)

        def train_step(self, global_step, batch, device):
            return super().train_step(global_step, batch, device)[0] * getattr(self, "late", 1.0)

    found = [kept(trained([Later(), *plugins], Two())) for plugins in ([], [OptimizerInBackward()])]
    assert found[0] == found[1]


# Refusals -----------------------------------------------------------------------------


class Looking(CallbackInterface):
    @hookimpl
    def on_begin_optimizer_step(self, optimizers): ...


class Hearing(CallbackInterface):
    @hookimpl
    def on_begin_optimizer_step(self): ...


class Gate(CallbackInterface):
    @hookimpl(wrapper=True)
    def should_step(self):
        return (yield)


class Twice(CallbackInterface):
    @hookimpl(wrapper=True)
    def forward_backward(self, trainer, batch, index, size):
        outputs = yield
        hookspecs.forward_backward(trainer=trainer, batch=batch, index=index, size=size)
        return outputs


class Own(Module):
    @hookimpl
    def update(self, trainer, window):
        return hookspecs.update(trainer=trainer, window=window)


class Shared(torch.optim.SGD):
    """Counts its steps in its groups, as schedule-free optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


class Sharing(TinyModule):
    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return Shared(self.parameters(), 0.1)


class Counted(torch.optim.SGD):
    """Counts its steps in its state, beside those of parameters."""

    def step(self, closure=None):
        super().step(closure)
        self.state["steps"] = self.state.get("steps", 0) + 1


class Counting(TinyModule):
    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return Counted(self.parameters(), 0.1)


class Hooked(TinyModule):
    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: None)
        return optimizer


@pytest.mark.parametrize(
    ("other", "module", "said"),
    [
        ({"accumulate": {"steps": 2}}, Module, "has one backward pass, and 'accumulate' asks for 2; turn it off"),
        ({"clip": {"max_norm": 1.0}}, Module, "'clip', which needs all gradients at once, would find none"),
        ({"monitor": {"grad_norm": True}}, Module, "'monitor', which needs all gradients at once"),
        ({"looking": Looking()}, Module, "(`plugins.looking: null`), or optimizer_in_backward"),
        ({"finite": {"policy": "skip"}}, Module, "'finite', which needs all gradients at once"),
        ({"gate": Gate()}, Module, "'gate', which may refuse a step, would come too late"),
        ({"sam": {}}, Module, "'sam', which performs run_window, cannot run backward or step by itself"),
        ({"amp": {"precision": "fp16"}}, Module, "both perform 'run_backward'"),
        ({"twice": Twice()}, Module, "a second backward pass in one optimizer step"),
        ({}, Own, "'module', which performs update, cannot run backward or step by itself; turn optimizer_in_backward"),
        ({}, Sharing, "Shared keeps what its parameters share (k), so they cannot be stepped one by one"),
        ({}, Counting, "Counted keeps what its parameters share (steps)"),
        ({}, Hooked, "hooks before the step of SGD would find no gradients"),
    ],
)
def test_who_needs_all_gradients_is_refused_by_name(other, module, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        trained({"optimizer_in_backward": OptimizerInBackward(), **other}, module())


def test_who_may_look_at_gradients_is_named(caplog):
    trained({"optimizer_in_backward": OptimizerInBackward(), "hearing": Hearing()})
    assert "'hearing' hears on_begin_optimizer_step, and finds no gradient with optimizer_in_backward" in caplog.text


def test_backward_passes_of_the_user_and_later_runs_are_left_alone():
    trainer = trained([OptimizerInBackward()])
    loss = trainer.module.net(torch.ones(4, 8)).sum()
    before = digest(trainer.module.state_dict())
    loss.backward()
    assert digest(trainer.module.state_dict()) == before
    assert all(weight.grad is not None for weight in trainer.module.parameters())


# Ranks --------------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
def test_ranks_that_share_weights_train_the_same_and_others_are_refused():
    plugins = {"fsdp": {"wrap": ["Linear"]}, "alive": Alive()}
    plain = on_ranks(train_tiny, 2, plugins, PlainModule, look=most)
    ours = on_ranks(train_tiny, 2, {**plugins, "optimizer_in_backward": {}}, PlainModule, look=most)
    assert all(own.looked < rank.looked for own, rank in zip(ours, plain, strict=True))
    assert [digest(rank.weights) for rank in ours] == [digest(rank.weights) for rank in plain]
    refused = run_ranks(train_tiny, 2, {"ddp": {}, "optimizer_in_backward": {}}, PlainModule)
    for rank in refused:
        assert "share the weights by fsdp, or turn optimizer_in_backward off" in rank.output
