"""Local SGD and DiLoCo: real replicas beside a loop in plain torch."""

import contextlib
import importlib
import os
import signal
from typing import NamedTuple

import pytest
import torch
from plugins.ft.tests.test_ft import diary, lighthouse_for, real, replica_of, said, until

from hookline import hookimpl
from hookline.interfaces import CallbackInterface
from hookline.testing import TinyModule, digest, tiny_trainer
from hookline.testing.faults import PRELOADED, Child, at_hook, kill
from hookline_ft import REPLICA, Ft

PRELOADED += [__name__]
OUTER = {"_target_": "torch.optim.SGD", "lr": 0.7, "momentum": 0.9, "nesterov": True}
PLAIN = {"_target_": "torch.optim.SGD", "lr": 1.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sync_every": 0}, "ft.sync_every=0 must be at least 1 step"),
        ({"outer": OUTER}, "ft.outer needs ft.sync_every, and a _target_"),
        ({"sync_every": 4, "outer": {"lr": 0.7}}, "ft.outer needs ft.sync_every, and a _target_"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Ft(**options)


# A loop in plain torch ------------------------------------------------------------------


class Adams(TinyModule):
    """Without batch norm, before which the gradient of a bias is but rounding, of which Adam makes steps."""

    def __init__(self, dropout=0.0):
        super().__init__(samples=48, dropout=dropout)
        self.net[1] = torch.nn.Identity()

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), lr=1e-2)], []


def by_hand(batches, every, outer=None):
    """Train replicas of one model, each on its own batches of ids; return the weights of each."""
    replicas = [Adams() for _ in batches]
    inner = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in replicas]
    world = Adams()  # what was synchronized last
    settings = {name: value for name, value in (outer or {}).items() if name != "_target_"}
    far = torch.optim.SGD(world.parameters(), **settings) if outer else None
    for step in range(1, len(batches[0]) + 1):
        for module, optimizer, own in zip(replicas, inner, batches, strict=True):
            ids = torch.tensor(own[step - 1])
            loss = module.train_step(step, (module.inputs[ids], module.targets[ids], ids), "cpu")[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % every == 0:
            with torch.no_grad():
                for place, *ones in zip(world.parameters(), *(m.parameters() for m in replicas), strict=True):
                    average = sum(ones) / len(ones)
                    if far:
                        place.grad = place - average
                    else:
                        place.copy_(average)
                if far:
                    far.step()
                for module in replicas:
                    for one, place in zip(module.parameters(), world.parameters(), strict=True):
                        one.copy_(place)
    return [weights_of(module) for module in replicas]


def weights_of(module):
    return {name: one.detach().clone() for name, one in module.named_parameters()}


class Sent(CallbackInterface):
    """Keeps after which steps something is sent; the answer to the `lost`-th of them is lost on its way."""

    def __init__(self, lost=None):
        self.steps, self.lost = [], lost

    @hookimpl
    def on_begin_train(self, trainer):
        self.group = importlib.import_module("torchft").ProcessGroupGloo
        self.real = self.group.allreduce

        def allreduce(group, tensors, options):
            self.steps.append(trainer.global_step)
            work = self.real(group, tensors, options)
            if len(self.steps) == self.lost:
                work.wait()
                raise ConnectionError("the answer is lost")
            return work

        self.group.allreduce = allreduce

    @hookimpl
    def on_end_run(self):
        self.group.allreduce = self.real


class Finished(NamedTuple):
    weights: dict
    seen: list
    sent: list
    state: dict
    epochs: int


def replica(environment, folder, steps, ft, dropout=0.0, lost=None, plugins=(), **more):
    """Train one replica; return how it finished."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sent, plugin = Sent(lost), Ft(**{"timeout": "20 s", "quorum_timeout": "60 s", **ft})
    module = Adams(dropout)
    options = {"epochs": 10**6, "evaluate_every": None, "eval_when_finish": False, "max_steps": steps, **more}
    named = {"sent": sent, "ft": plugin, "checkpoint": {}, **{f"more-{n}": one for n, one in enumerate(plugins)}}
    trainer = tiny_trainer(named, module, runs_folder=str(folder / environment[REPLICA]), **options)
    trainer.train()
    return Finished(weights_of(module), module.seen, sent.steps, plugin.get_state(), trainer.epoch)


def together(function, tmp_path, *arguments):
    """Return what two replicas return and write; each call of `replica` in them has a lighthouse of its own."""
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(lighthouse_for(2)) for _ in range(4)]
        children = [Child(function, one, addresses, tmp_path, *arguments) for one in (0, 1)]
        outcomes = [child.wait(120) for child in children]
    for outcome in outcomes:
        assert outcome.code == 0, outcome.output
    return [(outcome.value, outcome.output) for outcome in outcomes]


def assert_close(one, other):
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-6)


CASES = [(1, None), (1, PLAIN), (4, None), (4, OUTER)]


def replica_of_each_case(one, addresses, folder):
    cases = zip(CASES, addresses, strict=True)
    return [replica(said(one, 2, to), folder, 12, {"sync_every": n, "outer": outer}) for (n, outer), to in cases]


def replica_of_a_run_in_two_parts(one, addresses, folder):
    whole, first, second, _ = (said(one, 2, address) for address in addresses)
    ft = {"sync_every": 4, "outer": OUTER}
    return [
        replica(whole, folder, 12, ft, 0.2, run_name="whole"),
        replica(first, folder, 6, ft, 0.2, run_name="parts"),
        replica(second, folder, 12, ft, 0.2, run_name="parts", resume=True),
    ]


def replica_that_misses_a_synchronization(one, addresses, folder):
    """Be the second of two that does not hear of the second synchronization, the last of 1 + 2 * 4 sendings."""
    ft = {"sync_every": 4, "outer": OUTER}
    return replica(said(one, 2, addresses[0]), folder, 24, ft, lost=9 if one else None)


class Evaluated(CallbackInterface):
    """Keeps the weights at each evaluation, and freezes one after the second."""

    def __init__(self):
        self.weights = []

    @hookimpl
    def on_end_validation(self, trainer):
        self.weights.append(weights_of(trainer.module))
        if len(self.weights) == 2:
            next(trainer.module.parameters()).requires_grad_(False)


def replica_that_freezes(one, addresses, folder):
    looks = Evaluated()
    with pytest.raises(ValueError, match=r"ft\.sync_every: other parameters are trained now than when training began"):
        replica(said(one, 2, addresses[0]), folder, 12, {"sync_every": 4}, plugins=[looks], evaluate_every="4 steps")
    return looks.weights


def assert_same(one, other):
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


class TestRounds:
    pytestmark = real

    def test_replicas_are_a_loop_in_plain_torch(self, tmp_path):
        replicas = [value for value, _ in together(replica_of_each_case, tmp_path)]
        for (every, outer), *ones in zip(CASES, *replicas, strict=True):
            hand = by_hand([one.seen for one in ones], every, outer)
            assert_same(ones[0].weights, ones[1].weights)
            for one, weights in zip(ones, hand, strict=True):
                assert_close(one.weights, weights)
                assert one.sent == [0] + [step for step in range(every, 13, every) for _ in one.weights]
                assert one.state["step"] == 12 // every

    def test_a_run_resumed_within_a_round_has_the_same_bits(self, tmp_path):
        words = "ft: training ends 2 steps after the weights were synchronized, so each replica has its own"
        replicas, outputs = zip(*together(replica_of_a_run_in_two_parts, tmp_path), strict=True)
        assert all(words in output for output in outputs)
        for whole, first, second in replicas:
            assert first.state["step"] == 1
            assert second.sent == [6] + [step for step in (8, 12) for _ in whole.weights]
            assert_same(whole.weights, second.weights)
            assert digest(whole.state) == digest(second.state)
        apart = replicas[0][1].weights, replicas[1][1].weights
        assert not torch.equal(apart[0]["net.0.weight"], apart[1]["net.0.weight"])

    def test_one_that_misses_a_synchronization_takes_the_state_at_the_next(self, tmp_path):
        (stays, _), (misses, output) = together(replica_that_misses_a_synchronization, tmp_path)
        assert "ft: the synchronization after step 8 is refused: a replica was lost in it" in output
        assert "ft: replica 1 has the state of another, at step 12" in output
        assert_same(stays.weights, misses.weights)
        assert digest(stays.state) == digest(misses.state)
        assert (stays.epochs, stays.state["step"]) == (misses.epochs, misses.state["step"]) == (4, 6)

    def test_evaluations_see_synchronized_weights_and_freezing_within_a_run_is_refused(self, tmp_path):
        (one, _), (other, _) = together(replica_that_freezes, tmp_path)
        assert len(one) == len(other) == 2
        for weights, others in zip(one, other, strict=True):
            assert_same(weights, others)

    def test_an_outer_optimizer_that_is_none_is_refused(self, tmp_path):
        with lighthouse_for(1) as lighthouse:
            ft = {"sync_every": 4, "outer": {"_target_": "builtins.dict"}}
            outcome = Child(replica, said(0, 1, lighthouse), tmp_path, 4, ft).wait()
        assert outcome.code == 1
        assert "ft.outer._target_=builtins.dict is no torch.optim.Optimizer" in outcome.output

    @pytest.mark.slow
    def test_replicas_that_synchronize_in_different_ways_are_refused(self, tmp_path):
        ways = [{"sync_every": 4, "outer": OUTER}, {"sync_every": 4}]
        with lighthouse_for(2) as lighthouse:
            children = [
                Child(replica, said(one, 2, lighthouse), tmp_path, 4, {"quorum_timeout": "8 s", **way})
                for one, way in enumerate(ways)
            ]
            outcomes = [child.wait() for child in children]
        assert [one.code for one in outcomes] == [1, 1]
        assert "set the same for all" in outcomes[0].output + outcomes[1].output

    @pytest.mark.slow
    def test_one_that_is_killed_comes_back_at_a_synchronization(self, tmp_path):
        with lighthouse_for(1) as lighthouse:
            places = [said(one, 2, lighthouse) for one in (0, 1)]
            stays = Child(replica_in_rounds, places[0], tmp_path)
            lost = Child(replica_in_rounds, places[1], tmp_path, "kill")
            assert lost.wait().code == -signal.SIGKILL
            until(lambda: any(step > 30 and present == 1 for step, present, _ in diary(tmp_path, 0)))
            died = len(diary(tmp_path, 1))
            back = Child(replica_in_rounds, places[1], tmp_path)
            until(lambda: len(diary(tmp_path, 1)) > died + 5)
            assert_end_alike(stays, back, tmp_path)
        assert diary(tmp_path, 1)[died][0] % 5 == 1

    @pytest.mark.slow
    def test_one_that_is_stopped_goes_on_at_a_synchronization_at_the_end_of_its_epoch(self, tmp_path):
        with lighthouse_for(1) as lighthouse:
            stays = Child(replica_in_rounds, said(0, 2, lighthouse), tmp_path)
            stops = Child(replica_in_rounds, said(1, 2, lighthouse), tmp_path, "stop")
            until(lambda: any(step % 30 == 29 for step, _, _ in diary(tmp_path, 1)))
            steps = [step for step, _, _ in diary(tmp_path, 1)]
            until(lambda: any(step > steps[-1] + 12 and present == 1 for step, present, _ in diary(tmp_path, 0)))
            stops.signal(signal.SIGCONT)
            until(lambda: len(diary(tmp_path, 1)) > len(steps) + 5)
            assert_end_alike(stays, stops, tmp_path)
        own, given, *_ = [step for step, _, _ in diary(tmp_path, 1)][len(steps) :]
        assert own == steps[-1] + 1
        assert given > own + 11
        assert given % 5 == 1


def assert_end_alike(stays, other, folder):
    """Let both end at a synchronization to come; the second was given the state of the first."""
    (folder / "end.new").write_text(str((diary(folder, 0)[-1][0] // 5 + 40) * 5))
    (folder / "end.new").rename(folder / "end")
    one, two = stays.wait(), other.wait()
    assert (one.code, two.code) == (0, 0), one.output + two.output
    assert digest(one.value) == digest(two.value)
    assert "ft: replica 0 trains with 1 of 2 replicas" in one.output
    assert "ft: replica 1 has the state of another, at step" in two.output


class Epochs(CallbackInterface):
    @hookimpl
    def on_end_train(self, trainer):
        self.done = trainer.epoch


class Stops(CallbackInterface):
    """Stops the process, once, before the step that ends an epoch of 6 steps and a round of 5."""

    @hookimpl
    def on_boundary(self, trainer):
        if trainer.global_step % 30 == 29 and not vars(self):
            self.done = True
            os.kill(os.getpid(), signal.SIGSTOP)


def replica_in_rounds(environment, folder, end=None):
    """Return the weights, the steps, the state of the plugin and the epochs; an epoch has 6 steps, a round 5."""
    epochs = Epochs()
    ends = {None: [], "kill": [at_hook("run_backward", kill, 22)], "stop": [Stops()]}[end]
    weights, steps, _, state = replica_of(environment, folder, [epochs, *ends], sync_every=5, outer=OUTER)
    return weights, steps, state, epochs.done
