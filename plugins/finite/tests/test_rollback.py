"""Going back to the last good state, and passing over the data of the bad step."""

import functools
import logging
import re
import signal
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, Stage, copy_state, hookimpl
from hookline.testing import Memory, TinyModule, calls_per_step, check_plugin, digest, tiny_trainer
from hookline.testing.faults import Child, at_hook, kill, run
from hookline_finite import Finite

BATCHES = 7  # micro-batches of an epoch of `tiny_trainer`


class Spoilt(TinyModule):
    """Has NaN in the inputs of some batches, which are known by their samples: batch norm keeps it for ever."""

    def __init__(self, spoilt=(), value=float("nan"), samples=50):
        super().__init__(samples)
        order = order_of_batches() if spoilt else []
        self.spoilt, self.value = [order[number] for number in spoilt], value

    def train_step(self, global_step, batch, device):
        inputs, targets, ids = batch
        if ids.tolist() in self.spoilt:
            inputs = inputs * self.value
        return super().train_step(global_step, (inputs, targets, ids), device)

    def val_step(self, global_step, batch, device):
        torch.rand(1)  # an evaluation may draw
        return super().val_step(global_step, batch, device)


@functools.cache
def order_of_batches():
    """Return the samples of each batch of two epochs."""
    module = TinyModule()
    tiny_trainer(module=module).train()
    return module.seen


class Without(CallbackInterface):
    """Takes batches, by their number in the run, out of the data: what a run is that never had them."""

    def __init__(self, numbers):
        self.numbers = numbers

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer, loader, stage):
        loader = yield
        if stage is not Stage.TRAIN:
            return loader
        return Rest(loader, {n - BATCHES * trainer.epoch for n in self.numbers})


class Rest:
    def __init__(self, loader, numbers):
        self.loader, self.numbers = loader, numbers

    def __iter__(self):
        return (batch for number, batch in enumerate(self.loader) if number not in self.numbers)

    def __len__(self):
        return len(self.loader)


def windows_of(size):
    @hookimpl
    def get_window_size(self):
        return size

    return type("Windows", (CallbackInterface,), {"get_window_size": get_window_size})()


def bits(state, without=("plugins",)):
    """Return a digest of a run's state but for its clock."""
    trainer = {**state["trainer"], "counters": {**state["trainer"]["counters"], "seconds": 0}}
    return digest({name: part for name, part in {**state, "trainer": trainer}.items() if name not in without})


def end_of(plugins, module, window=1, **options):
    """Train; return the trainer, and the memory of its states."""
    memory = Memory(every=options.pop("save", None))
    plugins = {"memory": memory, "windows": windows_of(window), **plugins}
    trainer = tiny_trainer(plugins, module, train_batch_size=8 * window, **options)
    trainer.train()
    return trainer, memory


def rollback(every="4 steps", **options):
    return {"finite": Finite("rollback", every, **options)}


@functools.cache
def reference(spoilt, window=1, **options):
    """Return the end of a run that never had these batches."""
    return bits(end_of({"without": Without(spoilt)}, Spoilt(), window, **options)[1].state)


@pytest.fixture
def warned(caplog):
    own = logging.Filter("hookline.finite")  # the core says, too, that a loss is not finite
    caplog.set_level(logging.WARNING, "hookline")
    caplog.handler.addFilter(own)
    yield caplog
    caplog.handler.removeFilter(own)


def test_contract_and_a_healthy_run_keeps_its_bits(warned):
    check_plugin(Finite, policy="rollback")
    warned.clear()
    assert bits(end_of(rollback(), Spoilt(), save="3 steps")[1].state) == reference(())
    assert warned.messages == []


@pytest.mark.parametrize(("every", "steps"), [("1 steps", 1), ("4 steps", 4), ("epoch", 7), ("50 steps", 50)])
@pytest.mark.parametrize("spoilt", [(3,), (0,), (6,), (7,), (13,)], ids=str)
def test_f4_after_a_rollback_the_run_is_one_whose_data_never_had_that_window(spoilt, every, steps, warned):
    module = Spoilt(spoilt)
    trainer, memory = end_of(rollback(every), module)
    assert bits(memory.state) == reference(spoilt)
    assert (trainer.status, trainer.global_step, trainer.counters.skipped_steps) == ("finished", 13, 0)
    assert sum(ids in module.spoilt for ids in module.seen) == 1
    epoch, batch = divmod(spoilt[0], BATCHES)
    back = spoilt[0] // steps * steps
    assert warned.messages == [
        f"the loss or the gradients of optimizer step {spoilt[0] + 1} are not finite: gone back to the state of step "
        f"{back}, to pass over the batches {batch} to {batch} of epoch {epoch} (window 1 of at most 10 in this run)"
    ]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_f4_inf_is_as_bad_as_nan(value):
    assert bits(end_of(rollback(), Spoilt((3,), value))[1].state) == reference((3,))


@pytest.mark.parametrize("every", ["1 steps", "4 steps", "50 steps"])
@pytest.mark.parametrize("spoilt", [(3, 4), (0, 1), (5, 6), (6, 7), (12, 13), (2, 9), (1, 2, 3, 4, 5, 6)], ids=str)
def test_f4_several_windows_one_after_the_other(spoilt, every, warned):
    trainer, memory = end_of(rollback(every), Spoilt(spoilt))
    assert bits(memory.state) == reference(spoilt)
    assert trainer.global_step == 14 - len(spoilt) == 14 - len(warned.messages)


@pytest.mark.parametrize("bad", [0, 1, 2, 3, 4, 5])
def test_f4_the_whole_window_is_passed_over(bad, warned):
    first = [0, 3, 6, 7, 10, 13][bad]
    spoilt = [first] if first % BATCHES == 6 else [first, first + 1, first + 2]
    for batch in spoilt:  # whichever of its micro-batches it is
        trainer, memory = end_of(rollback("2 steps"), Spoilt([batch]), window=3)
        assert bits(memory.state) == reference(tuple(spoilt), window=3)
        assert trainer.global_step == 5
    epoch, batch = divmod(first, BATCHES)
    assert f"over the batches {batch} to {batch + len(spoilt) - 1} of epoch {epoch} " in warned.messages[-1]


def test_f4_a_run_that_was_rolled_back_and_is_resumed_has_the_same_bits(warned):
    options = {"log_every": "2 steps", "evaluate_every": "3 steps"}
    whole, kept = end_of(rollback("4 steps"), Spoilt((2, 8)), save="1 steps", **options)
    assert bits(kept.state) == reference((2, 8), **options)
    assert whole.global_step == 12
    for step, state in kept.states.items():
        assert all(value.isfinite().all() for value in state["module"].values()), step
        if step == whole.global_step:
            continue
        torch.manual_seed(step)  # a new process knows nothing of the old one's randomness
        memory = Memory(state)
        module = Spoilt((2, 8))
        plugins = {"memory": memory, "windows": windows_of(1), **rollback("4 steps")}
        tiny_trainer(plugins, module, **options).train()
        assert bits(memory.state, without=()) == bits(kept.state, without=()), step
        passed = state["plugins"].get("finite", {}).get("passed", [])
        assert sum(ids in module.spoilt for ids in module.seen) == 2 - len(passed), step
    assert kept.states[2]["plugins"]["finite"] == {"passed": [[0, 2]]}  # what was saved at the bad step's boundary
    assert kept.states[11]["plugins"]["finite"] == {"passed": [[0, 2], [1, 1]]}


def train_with_checkpoints(folder, kill_at=None, resume=False):
    """Train in a run folder, as far as the update at which the process is killed; return a digest of the end."""
    plugins = {"checkpoint": {"every": "3 steps"}, **rollback("4 steps")}
    if kill_at:
        plugins["killer"] = at_hook("update", kill, kill_at)
    trainer = tiny_trainer(plugins, Spoilt((2, 8)), runs_folder=str(folder), resume=resume)
    trainer.train()
    return bits(trainer.hook.get_run_state(trainer=trainer), without=())


@pytest.mark.plugins
@pytest.mark.parametrize("kill_at", [5, 11])  # updates, those that were gone back behind counted too
def test_f4_a_process_that_is_killed_after_a_rollback_and_resumed_has_the_same_bits(kill_at, tmp_path):
    assert run(train_with_checkpoints, tmp_path, kill_at).code == -signal.SIGKILL
    resumed = run(train_with_checkpoints, tmp_path, None, True)
    assert resumed.code == 0, resumed.output
    assert resumed.value == train_with_checkpoints(tmp_path / "whole")


def test_f4_a_resumed_run_can_go_back_before_its_first_reading(warned):
    _, kept = end_of({}, Spoilt(), save="1 steps")
    for step in (3, 7, 9):
        memory = Memory(kept.states[step])
        tiny_trainer({"memory": memory, "windows": windows_of(1), **rollback("50 steps")}, Spoilt((10,))).train()
        assert bits(memory.state) == reference((10,)), step
        assert f"gone back to the state of step {step}," in warned.messages[-1]


def test_f4_an_evaluation_before_training_is_not_lost():
    options = {"eval_when_start": True, "evaluate_every": "3 steps", "sanity_val_steps": 2}
    for every in ("1 steps", "50 steps"):
        assert bits(end_of(rollback(every), Spoilt((0, 2)), **options)[1].state) == reference((0, 2), **options)


def test_f4_the_number_of_windows_is_bounded(warned):
    memory = Memory(every="1 steps")
    trainer = tiny_trainer({"memory": memory, **rollback(max_skips=2)}, Spoilt((3, 5, 9)))
    words = r"of optimizer step 8, after 2 window\(s\) that were passed over, are not finite \(rank 0, now at step 8\)"
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()
    assert len(warned.messages) == 2
    assert max(memory.states) == 7
    resumed = tiny_trainer({"memory": Memory(memory.states[7]), **rollback(max_skips=2)}, Spoilt((9,)))
    with pytest.raises(FloatingPointError, match="of optimizer step 8, after 2 window"):
        resumed.train()
    with pytest.raises(FloatingPointError, match="of optimizer step 4 are"):
        tiny_trainer(rollback(max_skips=0), Spoilt((3,))).train()


def test_f4_a_run_whose_steps_are_bad_whatever_the_data_ends(warned):
    class Diverged(TinyModule):
        def train_step(self, global_step, batch, device):
            loss, predictions = super().train_step(global_step, batch, device)
            return loss * float("nan" if global_step >= 4 else 1), predictions

    with pytest.raises(FloatingPointError, match="of optimizer step 4, after 3 window"):
        tiny_trainer(rollback(max_skips=3), Diverged()).train()
    assert [
        "0 to 0 of epoch 0" in warned.messages[0],
        "3 to 3 of epoch 0" in warned.messages[0],
        "5 to 5" in warned.messages[2],
    ] == [0, 1, 1]


def test_f4_no_bad_state_is_saved_and_a_save_that_was_asked_for_has_the_state_gone_back_to(warned):
    _, kept = end_of(rollback("50 steps"), Spoilt((4,)), save="3 steps")
    assert list(kept.states) == [3, 6, 9, 12, 13]
    assert "of step 3," in warned.messages[0]  # the save of step 3 was a reading, too, and that of step 6 found it
    assert bits(kept.state) == reference((4,))


def test_f4_a_save_that_is_asked_for_behind_the_reading_ends_the_run():
    class Late(CallbackInterface):
        @hookimpl(trylast=True)
        def on_boundary(self, trainer):
            if trainer.global_step == 5:
                trainer.save("late")

    memory = Memory()
    with pytest.raises(FloatingPointError, match="of optimizer step 4 are not finite .*now at step 5"):
        tiny_trainer({"late": Late(), "memory": memory, **rollback("50 steps")}, Spoilt((3,))).train()
    assert memory.states == {}


def test_f4_what_does_not_take_windows_cannot_pass_over_them():
    class Own(Spoilt):
        @hookimpl
        def train_epoch(self, trainer, batches):
            return all(trainer.advance([batch]) for batch in batches)

    with pytest.raises(FloatingPointError, match="of optimizer step 4 are not finite"):
        tiny_trainer(rollback(), Own((3,))).train()


class Cut(CallbackInterface):
    """Ends training behind the micro-batch of this number, in the middle of a window."""

    def __init__(self, after):
        self.after, self.batches = after, 0

    @hookimpl
    def on_end_backward(self, trainer):
        self.batches += 1
        if self.batches == self.after:
            trainer.stop("cut", "preempted", within_window=True)


def test_f4_a_run_that_is_cut_within_a_window_saves_the_state_gone_back_to():
    trainer, first = end_of({"cut": Cut(8), **rollback("50 steps")}, Spoilt([4]), window=3)
    assert (trainer.status, trainer.global_step, list(first.states)) == ("preempted", 0, [0])
    second = Memory(first.state)
    plugins = {"memory": second, "windows": windows_of(3), **rollback("50 steps")}
    module = Spoilt([4])
    tiny_trainer(plugins, module, train_batch_size=24).train()
    assert bits(second.state) == reference((3, 4, 5), window=3)
    assert not any(ids in module.spoilt for ids in module.seen)


def test_f4_the_losses_of_a_window_that_was_cut_are_kept():
    class Infinite(Spoilt):
        """Has an infinite loss, and finite gradients."""

        def train_step(self, global_step, batch, device):
            loss, predictions = TinyModule.train_step(self, global_step, batch, device)
            return loss + float("inf" if batch[2].tolist() in self.spoilt else 0), predictions

    for policy in ("stop", "skip", "rollback"):
        _, memory = end_of({"cut": Cut(4), "finite": Finite(policy)}, Infinite([3]), window=3)
        assert len(memory.state["plugins"]["finite"]["losses"]) == 1
        plugins = {"memory": memory, "windows": windows_of(3), "finite": Finite(policy, max_skips=0)}
        with pytest.raises(FloatingPointError, match="of optimizer step 2"):
            tiny_trainer(plugins, Infinite(), train_batch_size=24).train()


def test_f4_a_window_in_which_the_run_was_cut_may_be_the_one_that_is_passed_over(warned):
    class Infinite(Spoilt):
        def train_step(self, global_step, batch, device):
            loss, predictions = TinyModule.train_step(self, global_step, batch, device)
            return loss + float("inf" if batch[2].tolist() in self.spoilt else 0), predictions

    _, first = end_of({"cut": Cut(5), **rollback("50 steps")}, Infinite([3]), window=3)
    ends = set()
    for every in ("1 steps", "50 steps"):
        second, module = Memory(first.state), Infinite([3])
        plugins = {"memory": second, "windows": windows_of(3), **rollback(every)}
        trainer = tiny_trainer(plugins, module, train_batch_size=24)
        trainer.train()
        ends.add(bits(second.state))
        assert trainer.global_step == 5
        assert module.seen[-8:] == order_of_batches()[6:]
    assert len(ends) == 1
    assert (
        "step 2 are not finite: gone back to the state of step 1, to pass over the batches 3 to 5" in warned.messages[0]
    )


def test_f4_a_copy_of_a_bad_state_that_somebody_has_kept_is_not_saved():
    class Keeps(CallbackInterface):
        """Keeps a state, as one does that has it saved when training raises."""

        @hookimpl
        def on_boundary(self, trainer):
            if trainer.global_step == 4 and not hasattr(self, "kept"):
                self.kept = copy_state(trainer.hook.get_run_state(trainer=trainer))

        @hookimpl
        def on_end_train(self, trainer):
            trainer.hook.save(trainer=trainer, reason="kept", state=self.kept)

    memory = Memory()
    with pytest.raises(FloatingPointError, match=r"is not finite, .*net\.0\.weight.*net\.1\.running_mean"):
        tiny_trainer({"memory": memory, "keeps": Keeps(), **rollback("6 steps")}, Spoilt((3,))).train()
    assert list(memory.states) == [13]


def test_nothing_is_kept_when_the_run_is_over():
    plugin = Finite("rollback")
    tiny_trainer([plugin]).train()
    assert not any(isinstance(kept, dict) and kept for kept in vars(plugin).values())


def test_a_second_training_goes_back_no_further_than_its_own_beginning(warned):
    trainer = tiny_trainer(rollback("50 steps"), Spoilt((10,)), max_steps=8)
    trainer.train()
    trainer.options.max_steps = 14
    trainer.train()
    said = [message for message in warned.messages if "gone back" in message]
    assert "gone back to the state of step 8," in said[0]


def test_cost_of_rollback_on_an_ordinary_step():
    def run(plugins):
        def steps(number):
            options = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False}
            tiny_trainer(plugins(), TinyModule(samples=8 * number), **options).train()

        return steps

    plain = calls_per_step(run(dict))
    ours = calls_per_step(run(lambda: rollback("99999 steps")))
    (budget,) = re.findall(r"with rollback (\d+)", (Path(__file__).parents[1] / "README.md").read_text())
    assert ours.calls - plain.calls <= int(budget) + 0.5
    assert ours.syncs <= plain.syncs


class Ranks(CallbackInterface):
    """Two processes that agree by gloo; each trains a network of its own."""

    def __init__(self, rank, folder):
        self.rank, store = rank, torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

    @hookimpl
    def get_ranks(self):
        return self.rank, 0, 2

    @hookimpl
    def all_reduce(self, value, op):
        value = value.clone()
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, op.upper()))
        return value


class BadOnOneRank(TinyModule):
    """Has a bad loss on rank 1, at its fourth batch."""

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        bad = self.trainer.rank == 1 and len(self.seen) == 4
        return loss * float("nan" if bad else 1), predictions


def train_as(rank, folder, policy):
    """Return how it ended, how often it trained, and the steps of what it saved."""
    memory, module = Memory(every="3 steps"), BadOnOneRank(samples=48)
    trainer = tiny_trainer([memory, Finite(policy, "5 steps"), Ranks(rank, folder)], module, train_batch_size=16)
    try:
        trainer.train()
        ended = trainer.status
    except FloatingPointError as error:
        ended = str(error)
    finally:
        torch.distributed.destroy_process_group()
    finite = all(value.isfinite().all() for state in memory.states.values() for value in state["module"].values())
    return ended, len(module.seen), list(memory.states), finite


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_f1_and_f4_all_ranks_do_what_one_must(policy, tmp_path):
    children = [Child(train_as, rank, tmp_path, policy) for rank in (0, 1)]
    outcomes = [child.wait() for child in children]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
    for rank, outcome in enumerate(outcomes):
        ended, trained, saved, finite = outcome.value
        assert finite
        if policy == "stop":
            assert f"of optimizer step 4 are not finite (rank {rank}, now at step 5)" in ended
            assert (trained, saved) == (5, [3])
        else:
            assert ended == "finished"
            assert (trained, saved[-1]) == {"skip": (6, 6), "rollback": (7, 5)}[policy]
