"""After training the module has the weights of the best evaluation, and a resumed run those of the last step."""

import math
import re

import pytest

from hookline import CallbackInterface, hookimpl
from hookline.testing import Memory, PlainModule, TinyModule, check_plugin, digest, on_ranks, tiny_trainer
from hookline_best import Best

nan = math.nan
SCORES = [3.0, 1.0, 2.0, 0.5, 0.75, nan, 4.0]


class Scores:
    """Logs a score of each step, besides its losses."""

    scores = SCORES

    def val_step(self, global_step, batch, device):
        self.log(val_error=self.scores[(global_step - 1) % len(self.scores)])
        return super().val_step(global_step, batch, device)


class Scored(Scores, TinyModule): ...


class History(CallbackInterface):
    """Keeps the digests of the weights and of what is exported at each boundary."""

    def __init__(self):
        self.weights, self.exported = {}, {}

    @hookimpl
    def on_boundary(self, trainer, global_step):
        self.exported[global_step] = digest(trainer.export_model())
        if not any(hasattr(weight, "device_mesh") for weight in trainer.module.parameters()):
            self.weights[global_step] = digest(trainer.module.state_dict())


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module or Scored(), **{"epochs": 1, "evaluate_every": "1 steps", **options})
    trainer.train()
    return trainer


def weights_of(trainer):
    return digest(trainer.module.state_dict())


def test_contract():
    check_plugin(Best)
    check_plugin(Best, metric="train_loss_epoch")


@pytest.mark.parametrize(
    ("options", "scores", "step"),
    [
        ({}, SCORES, 4),
        ({"mode": "max"}, SCORES, 7),
        ({"min_delta": 1.0}, SCORES, 2),
        ({"min_delta": "50%"}, SCORES, 2),
        ({"min_delta": "49%"}, SCORES, 4),
        ({}, [nan, 2.0, 2.0, math.inf, -math.inf, 3.0, 4.0], 2),
    ],
    ids=str,
)
def test_the_weights_are_those_of_the_best_evaluation(options, scores, step):
    module, history = Scored(), History()
    module.scores = scores
    trainer = train(Best("val_error", **options), history, module=module)
    assert weights_of(trainer) == history.weights[step]
    assert digest(trainer.export_model()) == history.weights[step]
    assert len({*history.weights.values()}) == 7


def test_an_evaluation_afterwards_has_the_value_of_the_best():
    class Values(CallbackInterface):
        def __init__(self):
            self.values = []

        @hookimpl
        def on_end_validation(self, metrics):
            self.values.append(metrics["val_loss"])

    values = Values()
    trainer = train(Best(mode="max"), values, module=TinyModule(lr=1.0))
    assert values.values[-1] < max(values.values)
    assert trainer.validate()["val_loss"] == trainer.test()["test_loss"] == max(values.values)


def test_others_have_the_best_weights_when_training_ends():
    class Ends(CallbackInterface):
        @hookimpl
        def on_end_train(self, trainer):
            self.weights = digest(trainer.export_model())

    ends, history = Ends(), History()
    train(ends, history, Best("val_error"))
    assert ends.weights == history.weights[4]


def test_changes_no_bit_of_the_training():
    states = []
    for plugins in ([], [Best("val_error")]):
        memory = Memory()
        train(memory, *plugins)
        states.append({name: memory.state[name] for name in ("module", "optimizers", "schedulers", "rng")})
    assert digest(states[0]) == digest(states[1])


@pytest.mark.parametrize("metric", ["train_loss", "train_loss_epoch"])
def test_a_value_of_training(metric):
    class Hears(CallbackInterface):
        def __init__(self):
            self.by_value = {}

        @hookimpl
        def on_log(self, metrics, global_step):
            if metric in metrics:
                self.by_value[metrics[metric]] = global_step

    history, hears = History(), Hears()
    options = {"epochs": 3, "log_every": "2 steps", "evaluate_every": None}
    trainer = train(Best(metric, mode="max"), history, hears, module=TinyModule(lr=1.0), **options)
    best = hears.by_value[max(hears.by_value)]
    assert len(hears.by_value) >= 3
    assert weights_of(trainer) == history.weights[best] != history.weights[21]


def test_without_a_value_the_weights_stay_and_it_is_said(caplog):
    module, history = Scored(), History()
    module.scores = [nan]
    trainer = train(Best("val_error"), history, module=module)
    assert weights_of(trainer) == history.weights[7]
    said = "best has kept no weights: no finite value of 'val_error' came after a step"
    assert [record.getMessage() for record in caplog.records if record.name == "hookline.best"] == [said]


@pytest.mark.plugins
@pytest.mark.parametrize("order", [1, -1])
def test_the_best_average(order):
    """The average that comes back is the one that was evaluated, with the weights that were trained beside it."""
    history = History()
    plugins = {"history": history, **dict([("best", {"metric": "val_error"}), ("ema", {"decay": 0.9})][::order])}
    trainer = tiny_trainer(plugins, Scored(), epochs=1, evaluate_every="1 steps")
    trainer.train()
    assert weights_of(trainer) == history.weights[4]
    assert digest(trainer.export_model()) == history.exported[4] != history.weights[4]


@pytest.mark.plugins
@pytest.mark.parametrize("order", [1, -1])
def test_with_early_stop(order):
    history = History()
    options = {"metric": "val_error"}
    both = [("best", options), ("early_stop", {**options, "patience": 1})]
    trainer = tiny_trainer({"history": history, **dict(both[::order])}, Scored(), epochs=1, evaluate_every="1 steps")
    trainer.train()
    assert (trainer.global_step, trainer.status) == (3, "stopped")
    assert weights_of(trainer) == history.weights[2]


# Resume -------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits_last_and_best():
    whole = Memory(every="1 steps")
    ended = train(whole, Best("val_error"))
    for step in range(1, 7):
        resumed = Memory(whole.states[step])
        again = train(resumed, Best("val_error"))
        for memory in (whole, resumed):
            memory.state["trainer"]["counters"]["seconds"] = 0
        assert digest(resumed.state) == digest(whole.state), step
        assert weights_of(again) == weights_of(ended), step


def test_the_state_has_the_last_weights_and_an_evaluation_of_it_the_best():
    memory, history = Memory(), History()
    ended = train(memory, Best("val_error"), history)
    assert digest(memory.state["module"]) == history.weights[7]
    evaluated = tiny_trainer([Memory(memory.state), Best("val_error")], Scored())
    assert evaluated.test() == ended.test()
    assert weights_of(evaluated) == history.weights[4]
    nothing_left = train(Memory(memory.state), Best("val_error"))
    assert weights_of(nothing_left) == history.weights[4]


def test_a_second_training_goes_on_from_the_last_step():
    class Pauses(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step == 5:
                trainer.stop("a pause")

    history = History()
    trainer = train(Best("val_error"), history, Pauses())
    assert weights_of(trainer) == history.weights[4]
    trainer.train()
    whole = History()
    ended = train(Best("val_error"), whole)
    assert history.weights == whole.weights
    assert weights_of(trainer) == weights_of(ended)


def test_a_preempted_run_keeps_its_last_weights():
    class Preempts(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step == 5:
                trainer.stop("a signal", status="preempted")

    history = History()
    trainer = train(Best("val_error"), history, Preempts())
    assert weights_of(trainer) == history.weights[5]


@pytest.mark.plugins
def test_with_checkpoints(tmp_path):
    plugins = {"checkpoint": {"every": "1 steps"}, "best": {"metric": "val_error"}, "ema": {"decay": 0.9}}
    options = {"evaluate_every": "1 steps", "runs_folder": str(tmp_path)}
    whole = tiny_trainer(plugins, Scored(), epochs=1, **options)
    whole.train()
    step = next((whole.run_dir / "checkpoints").glob("*5"))
    resumed = tiny_trainer(plugins, Scored(), epochs=1, resume=str(step), **options)
    resumed.train()
    assert weights_of(resumed) == weights_of(whole)
    assert digest(resumed.export_model()) == digest(whole.export_model())


# Several ranks ------------------------------------------------------------------------


class Ranked(Scores, PlainModule): ...


def sharing(folder):
    """Train on several ranks that share the model; return what they export, whole and gone on with."""
    told = {}
    for strategy in ("fsdp", "ddp"):
        plugins = {"ema": {"decay": 0.9}, "best": {"metric": "val_error"}}
        plugins["checkpoint"] = {"every": "1 steps", "keep_last": None}
        options = {"epochs": 1, "evaluate_every": "1 steps", "runs_folder": f"{folder}/{strategy}"}
        history = History()
        trainer = tiny_trainer({**plugins, strategy: {}, "history": history}, Ranked(), **options)
        trainer.train()
        told[strategy] = [digest(trainer.export_model()), history.exported[4], history.exported[max(history.exported)]]
        resume = str(next((trainer.run_dir / "checkpoints").glob("*2")))
        resumed = tiny_trainer({**plugins, strategy: {}}, Ranked(), resume=resume, **options)
        resumed.train()
        told[strategy].append(digest(resumed.export_model()))
        told[strategy].append((trainer.test(), resumed.test()))
    return told


@pytest.mark.plugins
def test_ranks_have_the_best_of_what_they_share(tmp_path):
    one, other = on_ranks(sharing, 2, str(tmp_path))
    assert one == other
    for exported, best, last, resumed, (tested, again) in one.values():
        assert exported == best == resumed != last
        assert tested == again


# Options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": None}, "best.metric=None must be the name of a metric"),
        ({"mode": "least"}, "best.mode='least' must be min or max, or null"),
        ({"min_delta": "-1%"}, "best.min_delta='-1%' must be a number from 0, or a share such as \"1%\""),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Best(**options)


def test_a_metric_that_does_not_come_or_that_nobody_knows():
    with pytest.raises(ValueError, match="best.metric='val_acc': the evaluation has no metric 'val_acc'; it has"):
        train(Best("val_acc"))
    with pytest.raises(ValueError, match="best.metric='val_score': nobody knows whether the smallest"):
        train(Best("val_score"))
