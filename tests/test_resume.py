"""The run as data: whatever a resume needs is in `get_run_state`, at every step, bit for bit.

`Memory` keeps the states in this process, as a performer of `save` and `restore` does on disk.
"""

import itertools

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hookline import CallbackInterface, copy_state, hookimpl
from hookline.testing import Memory, TinyModule, digest, tiny_trainer


class Logs(CallbackInterface):
    def __init__(self):
        self.logged = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        for name, value in metrics.items():
            self.logged[global_step, name] = value


def without_clock(state):
    trainer = {**state["trainer"], "counters": {**state["trainer"]["counters"], "seconds": 0}}
    return digest({**state, "trainer": trainer})


def windows_of(size):
    @hookimpl
    def get_window_size(self):
        return size

    return type("Windows", (CallbackInterface,), {"get_window_size": get_window_size})()


def run(module, state=None, window=1, **options):
    memory, logs = Memory(state, every="1 steps"), Logs()
    plugins = {"memory": memory, "logs": logs, "windows": windows_of(window)}
    defaults = {"epochs": 3, "train_batch_size": 8 * window, "log_every": "2 steps", "evaluate_every": "3 steps"}
    trainer = tiny_trainer(plugins, module, **(defaults | options))
    trainer.train()
    return trainer, memory, logs


@pytest.mark.parametrize("window", [1, 3])
def test_resuming_at_any_step_gives_the_same_bits(window):
    whole, kept, logged = run(TinyModule(), window=window)
    final = without_clock(kept.states[whole.global_step])
    for step, state in list(kept.states.items())[:-1]:
        torch.manual_seed(step)  # a new process knows nothing of the old one's randomness
        numpy.random.seed(step)
        resumed, memory, logs = run(TinyModule(), state, window=window)
        assert without_clock(memory.states[whole.global_step]) == final, step
        assert resumed.module.seen == whole.module.seen[state["trainer"]["counters"]["batches"] :], step
        later = {key: value for key, value in logged.logged.items() if key[0] > step}
        assert later.items() <= logs.logged.items(), step


class Cut(CallbackInterface):
    """Ends training behind the micro-batch of this number, in the middle of a window."""

    def __init__(self, after):
        self.after, self.batches = after, 0

    @hookimpl
    def on_end_backward(self, trainer):
        self.batches += 1
        if self.batches == self.after:
            trainer.stop("cut", "preempted", within_window=True)


@pytest.mark.parametrize("after", range(1, 15))
def test_a_run_cut_within_a_window_goes_on_with_its_gradients(after):
    whole, kept, logged = run(TinyModule(), window=3, epochs=2)
    final = without_clock(kept.states[whole.global_step])
    first, logs = Memory(), Logs()
    options = {"epochs": 2, "train_batch_size": 24, "log_every": "2 steps", "evaluate_every": "3 steps"}
    cut = tiny_trainer([first, logs, Cut(after), windows_of(3)], **options)
    cut.train()
    steps, phase = [(after + 2) // 3, after % 3] if after < 7 else [3 + (after - 5) // 3, (after - 7) % 3]
    inside = phase != 0 and after not in (7, 14)  # the last window of an epoch has one micro-batch
    assert (cut.status, cut.global_step) == ("finished" if after == 14 else "preempted", steps - inside)
    assert ("window" in first.state) == inside
    torch.manual_seed(after)
    resumed, memory, later = run(TinyModule(), first.state, window=3, epochs=2)
    if after < 14:
        assert without_clock(memory.states[whole.global_step]) == final
        assert cut.module.seen + resumed.module.seen == whole.module.seen
        assert logs.logged | later.logged == logged.logged


def test_a_module_that_does_the_update_its_own_way_is_cut_at_the_boundary():
    class Manual(TinyModule):
        @hookimpl
        def update(self, trainer, window):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step()
            return outputs

    memory = Memory()
    trainer = tiny_trainer([memory, Cut(4), windows_of(3)], Manual(), train_batch_size=24)
    trainer.train()
    assert (trainer.status, trainer.global_step, "window" in memory.state) == ("preempted", 2, False)


def test_a_state_put_back_at_a_boundary_is_gone_on_with():
    class Back(CallbackInterface):
        """Goes back to an earlier state, once."""

        def __init__(self, at, to, memory):
            self.at, self.to, self.memory = at, to, memory

        @hookimpl
        def on_boundary(self, trainer):
            if trainer.global_step == self.at:
                self.at = None
                trainer.hook.set_run_state(trainer=trainer, state=self.memory.states[self.to], stage=trainer.stage)

    whole, kept, _ = run(TinyModule())
    for at, to in ((5, 4), (7, 4), (12, 4), (14, 4), (21, 4), (9, 7), (21, 14)):
        memory = Memory(every="1 steps")
        module = TinyModule()
        options = {"epochs": 3, "log_every": "2 steps", "evaluate_every": "3 steps"}
        trainer = tiny_trainer(
            {"memory": memory, "logs": Logs(), "windows": windows_of(1), "back": Back(at, to, memory)},
            module,
            **options,
        )
        trainer.train()
        assert without_clock(memory.states[21]) == without_clock(kept.states[21]), (at, to)
        assert module.seen == whole.module.seen[:at] + whole.module.seen[to:], (at, to)


def test_a_copy_of_a_state_is_nobody_elses_and_keeps_ties():
    weight = torch.arange(6.0).reshape(2, 3)
    module = torch.nn.Linear(2, 2)
    state = {"a": weight, "b": [weight.view(2, 3), weight.t()], "c": (1, {"d": {2, 3}}), "e": module.state_dict()}
    copied = copy_state(state)
    assert copied["a"] is copied["b"][0]
    assert copied["a"] is not copied["b"][1]
    assert copied["e"]._metadata == state["e"]._metadata
    assert type(copied["e"]) is type(state["e"])
    weight.zero_()
    assert copied["a"].sum() == copied["b"][1].sum() == 15
    assert copied["c"] == state["c"]


class Augmented(Dataset):
    """Draws while it loads, from torch and from numpy."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return len(self.module.inputs)

    def __getitem__(self, index):
        noise = torch.rand(8) * 0.1 + float(numpy.random.rand())
        return self.module.inputs[index] + noise, self.module.targets[index], torch.tensor(index)


class AugmentedModule(TinyModule):
    workers = 0

    def get_train_dataloader(self, sampler, batch_size):
        dataset = Augmented(self)
        return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset), num_workers=self.workers)

    def get_val_dataloaders(self, sampler, batch_size):
        return TinyModule.get_train_dataloader(self, sampler, batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_randomness_of_loading_survives_a_resume(workers, monkeypatch):
    monkeypatch.setattr(AugmentedModule, "workers", workers)
    _whole, kept, _ = run(AugmentedModule(), epochs=2)
    for step in (3, 7, 10):  # in the middle of an epoch, at its end, in the middle of the next
        _, memory, _ = run(AugmentedModule(), kept.states[step], epochs=2)
        assert without_clock(memory.states[14]) == without_clock(kept.states[14])


def test_a_resume_loads_nothing_that_it_skips():
    loaded = []

    class Counting(Augmented):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    class Module(AugmentedModule):
        def get_train_dataloader(self, sampler, batch_size):
            dataset = Counting(self)
            return DataLoader(dataset, batch_size=batch_size, sampler=sampler(dataset))

    _, kept, _ = run(Module(), epochs=1)
    loaded.clear()
    run(Module(), kept.states[6], epochs=1)
    assert len(loaded) == 2


def test_drawing_in_events_that_are_told_again_does_no_harm():
    class Draws(TinyModule):
        @hookimpl
        def on_begin_train(self):
            torch.rand(1)

        def on_begin_train_epoch(self, gs, epoch):
            torch.rand(1)

    _whole, kept, _ = run(Draws())
    for step in (5, 7):
        _, memory, _ = run(Draws(), kept.states[step])
        assert without_clock(memory.states[21]) == without_clock(kept.states[21])


def test_a_run_may_be_resumed_with_another_batch_size():
    _, kept, _ = run(TinyModule(samples=48), epochs=1)
    resumed, _, _ = run(TinyModule(samples=48), kept.states[3], epochs=1, train_batch_size=4)
    seen = [index for batch in resumed.module.seen for index in batch]
    assert len(seen) == 24
    assert not set(seen) & {
        index for batch in run(TinyModule(samples=48), epochs=1)[0].module.seen[:3] for index in batch
    }


def test_a_finished_run_trains_nothing(caplog):
    whole, kept, _ = run(TinyModule())
    again, memory, _ = run(TinyModule(), kept.states[21])
    assert again.module.seen == []
    assert memory.states == {}
    assert digest(again.module.state_dict()) == digest(whole.module.state_dict())


def test_a_longer_run_goes_on_from_a_finished_one():
    class Module(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.Adam(self.parameters())], []

    long, _, _ = run(Module(), epochs=4)
    _, kept, _ = run(Module(), epochs=2)
    longer, _, _ = run(Module(), kept.states[14], epochs=4)
    assert digest(longer.module.state_dict()) == digest(long.module.state_dict())


def test_resuming_with_fresh_optimizers():
    _, kept, _ = run(TinyModule())
    resumed, _, _ = run(TinyModule(), kept.states[7], reset_optimizers_schedulers=True)
    assert resumed.global_step == 21
    assert resumed.schedulers[0].scheduler.last_epoch == 14


def test_validation_alone_restores_the_weights():
    trained, kept, _ = run(TinyModule())
    memory = Memory(kept.states[21])
    alone = tiny_trainer({"memory": memory})
    metrics = alone.validate()
    assert metrics["val_loss"] == trained.metrics["val_loss"]
    assert alone.global_step == 21  # where the values are logged


@pytest.mark.parametrize("shuffled", ["shuffle", "weighted", "batches", "drawn while it goes"])
def test_a_loader_that_shuffles_itself_resumes_exactly(shuffled):
    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            dataset = Augmented(self)
            if shuffled == "shuffle":
                return DataLoader(dataset, batch_size=batch_size, shuffle=True)
            if shuffled == "weighted":
                sampler = torch.utils.data.WeightedRandomSampler(torch.arange(1.0, 51.0), 50)
                return DataLoader(dataset, batch_size=batch_size, sampler=sampler)
            drawn = Drawing(50) if shuffled == "drawn while it goes" else torch.randperm(50).tolist()
            batches = torch.utils.data.BatchSampler(drawn, batch_size, drop_last=False)
            return DataLoader(dataset, batch_sampler=batches)

        def get_val_dataloaders(self, sampler, batch_size):
            return TinyModule.get_train_dataloader(self, sampler, batch_size)

    whole, kept, _ = run(Module())
    for step in (10, 14):
        resumed, memory, _ = run(Module(), kept.states[step])
        assert resumed.module.seen == whole.module.seen[step:]
        assert without_clock(memory.states[21]) == without_clock(kept.states[21])
    orders = [[*itertools.chain(*whole.module.seen[7 * epoch : 7 * epoch + 7])] for epoch in range(3)]
    assert (orders[0] == orders[1]) == (shuffled == "batches")  # drawn where loaders are made, it is one draw
    assert all(len(order) == 50 for order in orders)
    if shuffled in ("shuffle", "batches"):
        assert [sorted(order) for order in orders] == [[*range(50)]] * 3


class Drawing(torch.utils.data.Sampler):
    """Draws each sample when it is asked for, and has a set_epoch, by which it says that it draws the same again."""

    def __init__(self, length):
        self.length = length

    def set_epoch(self, epoch): ...

    def __iter__(self):
        for _ in range(self.length):
            yield int(torch.randint(self.length, ()))

    def __len__(self):
        return self.length


def test_a_sampler_of_which_nobody_knows_whether_it_repeats_itself_is_warned_of():
    class Own(torch.utils.data.SequentialSampler): ...

    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            dataset = Augmented(self)
            return DataLoader(dataset, batch_size=batch_size, sampler=Own(dataset))

        get_val_dataloaders = TinyModule.get_train_dataloader

    said = "the training loader draws its order from a sampler of its own \\(Own\\): .*Pass `sampler=sampler"
    with pytest.warns(UserWarning, match=said) as warned:
        run(Module())
    assert len(warned) == 1


def test_a_stream_that_repeats_itself_resumes_exactly():
    class Stream(IterableDataset):
        def __init__(self, module):
            self.module = module

        def __iter__(self):
            yield from zip(self.module.inputs, self.module.targets, torch.arange(50), strict=True)

    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(Stream(self), batch_size=batch_size)

        def get_val_dataloaders(self, sampler, batch_size):
            return None

        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.Adam(self.parameters())], []

    _whole, kept, _ = run(Module())
    for step in (4, 7):
        _resumed, memory, _ = run(Module(), kept.states[step])
        assert without_clock(memory.states[21]) == without_clock(kept.states[21])


def test_the_state_of_a_plugin_that_is_not_there_waits_for_it():
    class Counts(CallbackInterface):
        steps = 0

        @hookimpl
        def on_boundary(self):
            self.steps += 1

        def get_state(self):
            return {"steps": self.steps}

        def update_state(self, state):
            self.steps = state["steps"]

    memory = Memory(every="1 steps")
    tiny_trainer({"memory": memory, "counts": Counts()}, epochs=1).train()
    late = Counts()
    trainer = tiny_trainer({"memory": Memory(memory.states[6])}, epochs=1)

    @hookimpl
    def on_begin_train(self, trainer):
        trainer.plugins.register(late, "counts")

    trainer.plugins.register(type("Brings", (CallbackInterface,), {"on_begin_train": on_begin_train})(), "brings")
    trainer.train()
    assert late.steps == 7
