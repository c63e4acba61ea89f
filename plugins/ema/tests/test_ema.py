"""The average has the bits of a loop by hand, is what is evaluated and exported, and survives kills."""

import copy
import math
import re
import signal

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hookline import CallbackInterface, Stage, copy_state, hookimpl
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    check_plugin,
    count_syncs,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
)
from hookline.testing.faults import at_hook, kill, run
from hookline_ema import Ema

DECAY = 0.9
LAST = 14  # steps of `tiny_trainer`


def floating(state):
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def end_of(memory, without=()):
    """Return a digest of the last state that was saved, but for the clock."""
    state = {name: part for name, part in memory.state.items() if name not in without}
    state["trainer"]["counters"]["seconds"] = 0
    return digest(state)


class History(CallbackInterface):
    """Keeps the weights after each step that moved them, and averages them by hand."""

    def __init__(self):
        self.weights = []

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer, stepped):
        if stepped:
            self.weights.append({name: w.detach().clone() for name, w in trainer.module.named_parameters()})

    def averaged(self, name, decay=DECAY):
        weights = [weights[name] for weights in self.weights]
        average = weights[0]
        for weight in weights[1:]:
            average = average.lerp(weight, 1 - decay)
        return average


def test_contract():
    check_plugin(Ema)
    check_plugin(Ema, decay=0.5, begin=3, every=2, buffers="average", evaluate=False, epochs=1)


# The average --------------------------------------------------------------------------


SCHEDULES = [
    {}, {"begin": 5}, {"every": 3}, {"begin": 4, "every": 2}, {"decay": 0.0}, {"every": 3, "offset": 1},
    {"warmup": True}, {"warmup": True, "decay": 0.3, "begin": 3, "every": 2, "offset": 1},
]  # fmt: skip


def moving(options):
    """Return a function that moves averages as torch does, with the decay of the options."""

    def move(averages, weights, n):
        n = int(n)
        decay = min(options["decay"], (1 + n) / (10 + n)) if options.get("warmup") else options["decay"]
        get_ema_multi_avg_fn(decay)(averages, weights, n)

    return move


def counts(step, options):
    return step > options["begin"] and step % options["every"] == options.get("offset", 0)


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_has_the_bits_of_a_loop_by_hand(options, buffers):
    options = {"decay": DECAY, "begin": 0, "every": 1, **options}
    by_hand, steps = TinyModule(), []
    averaged = AveragedModel(by_hand, multi_avg_fn=moving(options), use_buffers=buffers == "average")

    def step(optimizer):
        optimizer.step()
        steps.append(len(steps) + 1)
        if counts(steps[-1], options):
            averaged.update_parameters(by_hand)

    hand_written_loop(by_hand, step=step)
    trainer = train(Ema(**options, buffers=buffers))
    exported, expected = trainer.export_model(), averaged.module.state_dict()
    if not counts(LAST, options) and buffers == "copy":  # there the copies are as old as the last update
        expected |= dict(by_hand.named_buffers())
    assert digest(floating(exported)) == digest(floating(expected))
    assert exported["net.1.num_batches_tracked"] == LAST  # integers are the current ones
    assert digest(trainer.module.state_dict()) == digest(by_hand.state_dict())


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_changes_no_bit_of_the_training(buffers):
    ends = []
    for plugins in ([], [Ema(buffers=buffers)]):
        memory = Memory()
        train(memory, *plugins, evaluate_every="1 steps")
        for averaged in ("metrics", "best"):  # those of evaluations
            del memory.state["trainer"][averaged]
        ends.append(end_of(memory, without=["plugins"]))
    assert ends[0] == ends[1]


def refusing(hook, refused):
    """Return a plugin that refuses the steps of these numbers: a gate, or a scaler after an overflow."""

    class Scaler(CallbackInterface):
        @hookimpl
        def step_optimizer(self, trainer, optimizer):
            if trainer.global_step + 1 in refused:
                return False
            optimizer.step()
            return True

    class Gate(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step + 1 not in refused

    return {"should_step": Gate, "step_optimizer": Scaler}[hook]()


@pytest.mark.parametrize("hook", ["should_step", "step_optimizer"])
@pytest.mark.parametrize("refused", [{1}, {4, 5, 9}, {LAST}], ids=str)
def test_a_step_that_was_refused_does_not_count(hook, refused):
    history = History()
    trainer = train(refusing(hook, refused), history, Ema(DECAY))
    assert len(history.weights) == LAST - len(refused)
    exported = trainer.export_model()
    for name, _ in trainer.module.named_parameters():
        assert torch.equal(exported[name], history.averaged(name)), name


def test_several_optimizers_in_one_update_average_once():
    class Adversaries(TinyModule):
        def get_optimizers_schedulers(self, steps_per_epoch, epochs):
            return [torch.optim.SGD(self.net[index].parameters(), 0.01) for index in (0, 4)], []

        @hookimpl
        def update(self, trainer, window):
            for optimizer in trainer.optimizers:
                outputs = trainer.hook.run_window(trainer=trainer, window=window)
                trainer.step([optimizer])
            return outputs

    history = History()
    exported = train(history, Ema(DECAY), module=Adversaries()).export_model()
    assert len(history.weights) == LAST
    for name in ("net.0.weight", "net.4.bias"):
        assert torch.equal(exported[name], history.averaged(name)), name


def test_what_the_module_does_to_its_weights_after_a_step_is_averaged():
    class Clamped(TinyModule):
        @hookimpl
        @torch.no_grad()
        def on_end_train_step(self):
            self.net[0].weight.clamp_(-0.1, 0.1)

    exported = train(Ema(DECAY), module=Clamped()).export_model()
    assert exported["net.0.weight"].abs().max() <= 0.1


def test_an_object_that_another_trainer_had_begins_anew():
    ema = Ema(DECAY)
    train(ema, seed=1)
    assert digest(train(ema).export_model()) == digest(train(Ema(DECAY)).export_model())


def test_waits_for_nothing():
    def syncs(*plugins):
        return count_syncs(lambda: train(*plugins, evaluate_every="7 steps"))

    syncs()
    assert syncs(Ema()) == syncs(Ema(buffers="copy", every=2)) == syncs()


# Which tensors ------------------------------------------------------------------------


class Freezing(TinyModule):
    """Freezes and unfreezes its first layer before steps of these numbers."""

    def __init__(self, frozen=False, change_at=()):
        super().__init__()
        self.change_at = change_at
        self.net[0].requires_grad_(not frozen)

    @hookimpl
    def take_window(self, trainer, batches):
        if trainer.global_step + 1 in self.change_at:
            self.net[0].requires_grad_(not self.net[0].weight.requires_grad)
        return next(([batch] for batch in batches), [])


def test_what_is_frozen_is_left_as_it_is_without_a_copy():
    ema = Ema(DECAY)
    trainer = train(ema, module=Freezing(frozen=True))
    assert "net.0.weight" not in ema.get_state()["average"]
    assert torch.equal(trainer.export_model()["net.0.weight"], TinyModule().net[0].weight)


def test_what_is_unfrozen_joins():
    history = History()
    trainer = train(history, Ema(DECAY), module=Freezing(frozen=True, change_at=[6]))
    history.weights = history.weights[5:]
    assert torch.equal(trainer.export_model()["net.0.weight"], history.averaged("net.0.weight"))


def test_what_is_frozen_later_stays_in_the_average():
    history = History()
    trainer = train(history, Ema(DECAY), module=Freezing(change_at=[6]))
    assert torch.equal(history.weights[5]["net.0.weight"], history.weights[-1]["net.0.weight"])
    assert torch.equal(trainer.export_model()["net.0.weight"], history.averaged("net.0.weight"))


class Mixed(TinyModule):
    """Has tied weights, integers, a mask, and numbers of several kinds."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.net[4] = torch.nn.Linear(16, 1)
        self.tied = torch.nn.Linear(16, 1)
        self.tied.weight = self.net[4].weight
        self.small = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.large = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.imaginary = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.whole = torch.nn.Parameter(torch.arange(3), requires_grad=False)

    def train_step(self, global_step, batch, device):
        loss, _ = super().train_step(global_step, batch, device)
        return loss + (self.small.sum() + self.large.sum() + self.imaginary.real.sum() + self.tied.bias.sum()).float()


def test_tied_weights_are_averaged_once_and_stay_tied():
    history, ema = History(), Ema(DECAY)
    trainer = train(history, ema, module=Mixed())
    exported = trainer.export_model()
    assert ema.get_state()["average"].keys() == {name for name, _ in trainer.module.named_parameters()} - {"whole"}
    assert exported["tied.weight"].data_ptr() == exported["net.4.weight"].data_ptr()
    assert torch.equal(exported["tied.weight"], history.averaged("net.4.weight"))
    assert trainer.module.tied.weight is trainer.module.net[4].weight


def test_every_kind_of_number_that_can_be_averaged_is():
    history = History()
    trainer = train(history, Ema(DECAY), module=Mixed())
    exported = trainer.export_model()
    for name in ("large", "imaginary", "net.0.weight"):
        assert torch.equal(exported[name], history.averaged(name)), name
    assert torch.equal(exported["whole"], torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_averaged_in_float32(dtype):
    history, ema = History(), Ema(0.999)
    trainer = train(history, ema, module=Mixed(dtype))
    average = ema.get_state()["average"]["small"]
    for weights in history.weights:
        weights["small"] = weights["small"].float()
    assert average.dtype == torch.float32
    assert torch.equal(average, history.averaged("small", 0.999))
    assert not torch.equal(average, history.weights[0]["small"])  # in half precision it would still be there
    assert torch.equal(trainer.export_model()["small"], average.to(dtype))


def test_buffers_that_are_replaced_are_followed():
    class Replacing(TinyModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.zeros(2))

        @hookimpl
        def on_begin_optimizer_step(self, trainer):
            self.scale = torch.full((2,), trainer.global_step + 1.0)

    assert train(Ema(0.5, buffers="copy"), module=Replacing()).export_model()["scale"].tolist() == [LAST] * 2
    averaged = train(Ema(0.5, buffers="average"), module=Replacing()).export_model()["scale"]
    torch.testing.assert_close(averaged, torch.full((2,), LAST - 1.0), atol=1e-3, rtol=0)


def test_a_mask_is_no_matter_unless_buffers_are_averaged():
    class Masked(TinyModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    assert train(Ema(DECAY), module=Masked()).export_model()["mask"].tolist() == [0.0, -math.inf]
    with pytest.raises(ValueError, match=r"ema\.buffers='average' cannot average the buffer 'mask': it has infinite"):
        train(Ema(buffers="average"), module=Masked())


# Evaluating and exporting -------------------------------------------------------------


class Seen(CallbackInterface):
    """Notes the weights that each evaluation has, and that are there before and after it."""

    def __init__(self):
        self.during, self.around = [], []

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, trainer):
        before = digest(trainer.module.state_dict())
        metrics = yield
        self.around.append((before, digest(trainer.module.state_dict())))
        return metrics

    def note(self, trainer):
        self.during.append(digest(trainer.module.state_dict()))

    @hookimpl
    def on_end_val_step(self, trainer):
        self.note(trainer)

    @hookimpl
    def on_end_test_step(self, trainer):
        self.note(trainer)

    @hookimpl
    def on_end_predict_step(self, trainer):
        self.note(trainer)


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluates_the_average_and_puts_the_weights_back(verb, buffers):
    seen = Seen()
    trainer = train(Ema(DECAY, buffers=buffers), evaluate_every=None, eval_when_finish=False)
    trained, objects = digest(trainer.module.state_dict()), [*map(id, trainer.module.parameters())]
    trainer.plugins.register(seen, "seen")
    getattr(trainer, verb)()
    assert set(seen.during) == {digest(trainer.export_model())} != {trained}
    assert seen.around == [(trained, trained)]
    assert [*map(id, trainer.module.parameters())] == objects
    assert all(p.requires_grad and p.is_leaf for p in trainer.module.parameters())


def test_metrics_are_those_of_a_module_with_the_average():
    trainer = train(Ema(DECAY))
    module = TinyModule()
    module.load_state_dict(trainer.export_model())
    assert trainer.metrics == tiny_trainer(module=module).validate() != train().metrics


def test_evaluates_the_weights_where_that_is_asked_for_and_exports_the_average():
    trainer = train(Ema(DECAY, evaluate=False))
    assert trainer.metrics == train().metrics
    assert not trainer.plugins.heard["evaluate"]
    assert digest(trainer.export_model()) == digest(train(Ema(DECAY)).export_model())


def test_before_it_begins_the_average_is_the_weights_themselves():
    ema, seen = Ema(begin=LAST), Seen()
    trainer = train(ema, seen)
    assert ema.get_state() == {"average": {}, "updates": 0}
    assert {*seen.during} >= {digest(trainer.module.state_dict())}
    exported = trainer.export_model()
    assert exported["net.0.weight"].data_ptr() == trainer.module.net[0].weight.data_ptr()  # and costs nothing


def test_the_weights_are_put_back_when_an_evaluation_raises():
    class Raising(TinyModule):
        def val_step(self, global_step, batch, device):
            self.during = digest(self.state_dict())
            raise ZeroDivisionError

    trainer = train(Ema(DECAY), module=Raising(), evaluate_every=None, eval_when_finish=False)
    trained = digest(trainer.module.state_dict())
    with pytest.raises(ZeroDivisionError):
        trainer.validate()
    assert trainer.module.during == digest(trainer.export_model()) != trained
    assert digest(trainer.module.state_dict()) == trained


def test_what_is_exported_is_a_copy_also_within_an_evaluation():
    class Exporting(CallbackInterface):
        @hookimpl
        def on_end_val_epoch(self, trainer):
            self.exported = trainer.export_model()
            self.during = digest(trainer.module.state_dict())

    exporting = Exporting()
    trainer = train(exporting, Ema(DECAY))
    averaged = trainer.export_model()
    assert digest(exporting.exported) == exporting.during == digest(averaged)
    for tensor in averaged.values():
        tensor.zero_()
    assert digest(trainer.export_model()) == exporting.during


@pytest.mark.plugins
def test_model_saving_saves_the_average(tmp_path):
    from safetensors.torch import load_file

    options = {"ema": {"decay": DECAY}, "model_saving": {"policy": "always"}}
    trainer = tiny_trainer(options, runs_folder=str(tmp_path))
    trainer.train()
    saved = load_file(trainer.run_dir / "models" / "always" / "model.safetensors")
    assert digest(saved) == digest(trainer.export_model()) != digest(trainer.module.state_dict())


# Both evaluated -----------------------------------------------------------------------


class Drawing(TinyModule):
    """Logs a metric, and a random number, in each validation; has two loaders if asked."""

    def __init__(self, keys=()):
        super().__init__()
        self.keys = keys

    def val_step(self, global_step, batch, device):
        self.log(mean=self.net[0].weight.mean(), draw=torch.rand(()))
        return super().val_step(global_step, batch, device)

    def get_val_dataloaders(self, sampler, batch_size):
        loader = super().get_val_dataloaders(sampler, batch_size)
        return dict.fromkeys(self.keys, loader) if self.keys else loader


@pytest.mark.parametrize("keys", [(), ("a", "b")])
def test_both_are_evaluated_and_told_apart_by_the_suffix(keys):
    logged = []

    class Logged(CallbackInterface):
        @hookimpl
        def on_log(self, metrics):
            logged.append(dict(metrics))

    trained, averaged = train(module=Drawing(keys)), train(Ema(DECAY), module=Drawing(keys))
    both = train(Ema(DECAY, suffix="_ema"), Logged(), module=Drawing(keys))
    draws = {value for name, value in both.metrics.items() if name.startswith("draw")}
    assert len(draws) == max(1, len(keys))  # the second evaluation draws what the first has drawn
    expected = dict(trained.metrics)
    for name, value in averaged.metrics.items():
        head, slash, key = name.partition("/")
        expected[f"{head}_ema{slash}{key}"] = value
    assert both.metrics == expected
    assert both.metrics["val_loss"] != both.metrics["val_loss_ema"]
    assert both.metrics in logged
    assert both.best.valid_loss == trained.best.valid_loss
    assert digest(both.module.state_dict()) == digest(trained.module.state_dict())
    assert digest(both.export_model()) == digest(averaged.export_model())


@pytest.mark.parametrize(("verb", "loss"), [("validate", "val_loss"), ("test", "test_loss"), ("predict", None)])
def test_both_are_evaluated_on_their_own_and_the_average_predicts(verb, loss):
    seen = Seen()
    trainer = train(Ema(DECAY, suffix="_ema"), evaluate_every=None, eval_when_finish=False)
    trained, averaged = digest(trainer.module.state_dict()), digest(trainer.export_model())
    trainer.plugins.register(seen, "seen")
    metrics = getattr(trainer, verb)()
    if loss is None:
        assert seen.during == [averaged] * 7
    else:
        assert seen.during == [trained] * 7 + [averaged] * 7
        assert metrics.keys() == {loss, f"{loss}_ema"}


@pytest.mark.plugins
def test_the_best_by_the_average_can_be_followed(tmp_path):
    plugins = {"ema": {"decay": DECAY, "suffix": "_ema"}, "model_saving": {"policy": "best_val_loss_ema"}}
    trainer = tiny_trainer(plugins, runs_folder=str(tmp_path), sanity_val_steps=1)
    trainer.train()
    assert (trainer.run_dir / "models" / "best_val_loss_ema" / "model.safetensors").exists()


def test_losses_so_far_of_both_would_have_one_name():
    with pytest.raises(ValueError, match=r"ema\.suffix: with report_loss_after_eval=false two losses so far"):
        train(Ema(suffix="_ema"), report_loss_after_eval=False)


# A teacher ----------------------------------------------------------------------------


class Taught(TinyModule):
    """Learns from its samples, and from the predictions of a teacher."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)
        with torch.no_grad():
            self.teacher[0].weight.zero_()

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return loss + torch.nn.functional.mse_loss(predictions, self.teacher(batch[0]).detach()), predictions


TEACHER = {"into": {"net": "teacher"}}


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_a_teacher_has_the_bits_of_a_loop_by_hand(options, buffers):
    options = {"decay": DECAY, "begin": 0, "every": 1, **options}
    by_hand, steps = Taught(), []
    by_hand.teacher.requires_grad_(False).load_state_dict(by_hand.net.state_dict())
    averaged = AveragedModel(by_hand.net, multi_avg_fn=moving(options), use_buffers=buffers == "average")
    averaged.module, averaged.n_averaged = by_hand.teacher, torch.tensor(1)

    def step(optimizer):
        optimizer.step()
        steps.append(len(steps) + 1)
        if steps[-1] <= options["begin"]:
            by_hand.teacher.load_state_dict(by_hand.net.state_dict())
        elif counts(steps[-1], options):
            averaged.update_parameters(by_hand.net)
            by_hand.teacher[1].num_batches_tracked.copy_(by_hand.net[1].num_batches_tracked)

    hand_written_loop(by_hand, step=step)
    trainer = train(Ema(**options, **TEACHER, buffers=buffers), module=Taught())
    assert digest(trainer.module.state_dict()) == digest(by_hand.state_dict())
    assert digest(trainer.export_model()) == digest(by_hand.state_dict())
    assert not any(parameter.requires_grad for parameter in trainer.module.teacher.parameters())


def test_a_run_with_a_teacher_resumes_with_the_same_bits():
    options = {"warmup": True, "begin": 2, "every": 2, **TEACHER}
    whole = Memory(every="1 steps")
    train(whole, Ema(DECAY, **options), module=Taught())
    for step in range(1, LAST):
        resumed = Memory(whole.states[step])
        train(resumed, Ema(DECAY, **options), module=Taught())
        assert end_of(resumed) == end_of(whole), step


def test_a_teacher_joins_a_run_that_was_begun_without_it():
    memory = Memory(every="1 steps")
    train(memory, module=Taught())
    trainer = train(Memory(memory.states[13]), Ema(DECAY, **TEACHER), module=Taught())
    start = memory.states[13]["module"]["net.0.weight"]
    expected = start.lerp(trainer.module.net[0].weight.detach(), 1 - DECAY)
    assert torch.equal(trainer.module.teacher[0].weight, expected)
    assert not trainer.module.teacher[0].weight.requires_grad


def broken(how):
    module = Taught()
    if how == "shared":
        module.teacher = module.net
    if how == "narrow":
        module.teacher[0] = torch.nn.Linear(8, 15)
    return module


@pytest.mark.parametrize(
    ("how", "into", "message"),
    [
        ("", {"net": "tutor"}, "ema.into: the module has no network 'tutor'; it has net, teacher"),
        ("", {"net.0": "net.4"}, "ema.into: net.0 and net.4 differ in bias; make it by copy.deepcopy(self.net.0)"),
        (
            "narrow",
            {"net": "teacher"},
            "ema.into: net and teacher differ in 0.bias; make it by copy.deepcopy(self.net)",
        ),
        ("shared", {"net": "teacher"}, "ema.into: net and teacher share weights; make it by copy.deepcopy(self.net)"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused(how, into, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(Ema(into=into), module=broken(how))


class TaughtPlain(PlainModule):
    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return loss + torch.nn.functional.mse_loss(predictions, self.teacher(batch[0]).detach()), predictions


def of_a_rank():
    torch.set_num_threads(1)
    told = {}
    for strategy in ("ddp", "fsdp"):
        plugins = {strategy: {}, "teacher": Ema(DECAY, **TEACHER), "ema": Ema(DECAY, suffix="_ema")}
        trainer = tiny_trainer(plugins, TaughtPlain(), epochs=1)
        trainer.train()
        told[strategy] = trainer.metrics, trainer.export_model()
    return told


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_average_and_evaluate_what_one_does():
    plugins = {"teacher": Ema(DECAY, **TEACHER), "ema": Ema(DECAY, suffix="_ema")}
    alone = tiny_trainer(plugins, TaughtPlain(), epochs=1)
    alone.train()
    assert alone.metrics["val_loss"] != alone.metrics["val_loss_ema"]
    first, second = on_ranks(of_a_rank, 2)
    for strategy in ("ddp", "fsdp"):
        assert first[strategy][0] == second[strategy][0] == pytest.approx(alone.metrics, rel=1e-4)
        torch.testing.assert_close(first[strategy][1], alone.export_model(), rtol=1e-4, atol=1e-5)


# State --------------------------------------------------------------------------------

SCENARIOS = [{"warmup": True}, {"begin": 5, "every": 2}, {"buffers": "average"}]


@pytest.mark.parametrize("options", SCENARIOS, ids=str)
def test_a_resumed_run_ends_with_the_same_bits(options):
    whole = Memory(every="1 steps")
    train(whole, Ema(DECAY, **options), evaluate_every="3 steps")
    for step in range(1, LAST):
        resumed = Memory(whole.states[step])
        train(resumed, Ema(DECAY, **options), evaluate_every="3 steps")
        assert end_of(resumed) == end_of(whole), step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_average_that_comes_back_goes_where_the_weights_are():
    memory, ema = Memory(every="1 steps"), Ema(DECAY)
    train(memory, Ema(DECAY), device="cuda")
    train(Memory(memory.states[6]), ema, device="cuda")
    assert all(average.is_cuda for average in ema.get_state()["average"].values())


def test_the_state_has_the_weights_that_are_trained_and_the_average_beside_them():
    memory = Memory()
    trainer = train(memory, Ema(DECAY))
    assert digest(memory.state["module"]) == digest(trainer.module.state_dict())
    exported = trainer.export_model()
    average = memory.state["plugins"]["ema"]["average"]
    assert average.keys() == {name for name, _ in trainer.module.named_parameters()}
    assert all(torch.equal(average[name], exported[name]) for name in average)


def test_a_run_that_was_begun_without_it_averages_from_there_on():
    memory, history = Memory(every="1 steps"), History()
    train(memory)
    trainer = train(Memory(memory.states[6]), history, Ema(DECAY))
    assert len(history.weights) == LAST - 6
    assert torch.equal(trainer.export_model()["net.0.weight"], history.averaged("net.0.weight"))


def test_buffers_that_were_averaged_are_the_current_ones_where_that_is_no_longer_asked_for():
    memory, ema = Memory(every="1 steps"), Ema(DECAY)
    train(memory, Ema(DECAY, buffers="average"))
    trainer = train(Memory(memory.states[6]), ema)
    assert torch.equal(trainer.export_model()["net.1.running_mean"], trainer.module.net[1].running_mean)
    assert ema.get_state()["average"].keys() == {name for name, _ in trainer.module.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"begin": 5}, {"buffers": "average"}], ids=str)
@pytest.mark.parametrize("back", [0, 4])
def test_a_state_that_is_put_back_has_its_own_average(options, back):
    class GoesBack(Memory):
        """Puts an earlier state back, once, when weights and average are spoilt."""

        went = False

        @hookimpl
        def on_begin_train(self, trainer):
            self.save(trainer, None)

        @hookimpl(trylast=True)
        def on_end_train_step(self, trainer, global_step):
            if global_step == 9 and not self.went:
                for parameter in trainer.module.parameters():
                    parameter.data.fill_(math.nan)

        @hookimpl(specname="on_boundary", trylast=True)
        def go_back(self, trainer):
            if trainer.global_step == 9 and not self.went:
                self.went = True
                state = copy_state(self.states[back])
                trainer.hook.set_run_state(trainer=trainer, state=state, stage=Stage.TRAIN)

    whole, back_and_on = Memory(every="1 steps"), GoesBack(every="1 steps")
    train(whole, Ema(DECAY, **options))
    train(back_and_on, Ema(DECAY, **options))
    assert back_and_on.went
    assert end_of(back_and_on) == end_of(whole)


def test_an_evaluation_on_its_own_takes_the_average_of_the_state():
    memory = Memory()
    trainer = train(memory, Ema(DECAY))
    resumed = tiny_trainer([Memory(memory.state), Ema(DECAY)])
    assert resumed.validate() == trainer.metrics
    assert digest(resumed.export_model()) == digest(trainer.export_model())
    assert digest(resumed.module.state_dict()) == digest(trainer.module.state_dict())


def fit(folder, fault, resume):
    plugins = {"checkpoint": {"every": "3 steps"}, "ema": {"decay": DECAY, "buffers": "average"}}
    if fault:
        plugins["fault"] = at_hook(fault[0], kill, fault[1])
    trainer = tiny_trainer(plugins, runs_folder=str(folder), resume=resume, evaluate_every="2 steps")
    trainer.train()
    return digest(trainer.module.state_dict()), digest(trainer.export_model()), trainer.metrics


@pytest.mark.plugins
@pytest.mark.parametrize("fault", [("on_begin_optimizer_step", 8), ("on_end_val_step", 20)], ids=str)
def test_a_killed_and_resumed_run_has_the_same_bits_in_weights_and_average(tmp_path, fault):
    outcome = run(fit, tmp_path / "cut", fault, False)
    assert outcome.code == -signal.SIGKILL, outcome.output
    resumed = run(fit, tmp_path / "cut", None, True)
    whole = fit(tmp_path / "whole", None, False)
    assert resumed.code == 0, resumed.output
    assert resumed.value == whole
    assert whole[0] != whole[1]


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "ema.decay=1.0 must be from 0 to below 1, such as 0.999"),
        ({"decay": -0.1}, "ema.decay=-0.1 must be from 0 to below 1"),
        ({"decay": math.nan}, "ema.decay=nan must be from 0 to below 1"),
        ({"begin": -1}, "ema.begin=-1 must be at least 0 optimizer steps"),
        ({"every": 0}, "ema.every=0 must be at least 1 optimizer step"),
        ({"every": 2, "offset": 2}, "ema.offset=2 must be from 0 to below ema.every=2"),
        ({"offset": -1}, "ema.offset=-1 must be from 0 to below ema.every=1"),
        (
            {"suffix": "/ema"},
            "ema.suffix='/ema' must have no slash, and goes with neither ema.evaluate=false nor ema.into",
        ),
        ({"suffix": "_ema", "evaluate": False}, "ema.suffix='_ema' must have no slash, and goes with neither"),
        ({"suffix": "_ema", "into": {"net": "teacher"}}, "ema.suffix='_ema' must have no slash, and goes with neither"),
        ({"buffers": "none"}, "ema.buffers='none' must be one of copy, average"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Ema(**options)
