"""The six events that need no mark, and what else a class of a plugin may say, as of hookline 0.1.

Kept as it is for ever: a plugin that was written so goes on working. Do not mend, shorten or reformat it for a newer
hookline; `docs/hook-api.md` says what may change instead.
"""

from dataclasses import dataclass

from hookline import CallbackInterface, event, hookimpl, verb


class Spread(CallbackInterface):
    """Overrides the six events, with the outputs spread."""

    def __init__(self):
        self.heard = {}

    def on_begin_train_epoch(self, global_step, epoch):
        self.heard["on_begin_train_epoch"] = (global_step, epoch)

    def on_end_backward(self, global_step, loss_tensor):
        self.heard["on_end_backward"] = (global_step, loss_tensor)

    def on_end_train_step(self, global_step, *train_step_collated_outputs):
        self.heard["on_end_train_step"] = (global_step, *train_step_collated_outputs)

    def on_end_val_epoch(self, global_step, *val_step_collated_outputs, key="default"):
        self.heard["on_end_val_epoch"] = (global_step, *val_step_collated_outputs, key)

    def on_end_train_epoch(self, global_step, *train_step_collated_outputs):
        self.heard["on_end_train_epoch"] = (global_step, *train_step_collated_outputs)

    def on_end_train(self, global_step):
        self.heard["on_end_train"] = (global_step,)


class Plain(CallbackInterface):
    """Overrides those that take outputs, without them, under names of its own."""

    def __init__(self):
        self.heard = []

    def on_end_train_step(self, gs):
        self.heard.append(("step", gs))

    def on_end_train_epoch(self, gs, loss):
        self.heard.append(("epoch", gs, loss))

    def on_end_val_epoch(self, gs):
        self.heard.append(("val", gs))


class Unbased:
    """A plugin without a base class."""

    def __init__(self):
        self.heard = []

    @hookimpl(tryfirst=True, specname="on_boundary")
    def first(self, trainer):
        self.heard.append("first")

    @hookimpl(trylast=True)
    def on_boundary(self):
        self.heard.append("last")

    @hookimpl(optionalhook=True)
    def on_a_hook_that_may_not_be_there(self, nothing):
        raise AssertionError


@dataclass(eq=False)
class Watches(CallbackInterface):
    """An observer, whose failures end no run."""

    observer = True

    @hookimpl
    def on_boundary(self):
        raise OSError


class Sounds:
    """Hooks of a plugin's own."""

    @staticmethod
    @event
    def on_sound(trainer, level):
        """Hear a sound."""

    @staticmethod
    @verb
    def get_level(trainer):
        """Return how loud it is."""
        return 0.5


@dataclass(eq=False)
class Loud(CallbackInterface):
    """Brings hooks, has options, requires another, and keeps a state for each rank."""

    factor: float = 2.0
    """How much louder."""

    hookspecs = Sounds
    requires = ()
    state_of_rank = True

    def __post_init__(self):
        self.levels = []

    @hookimpl(wrapper=True)
    def get_level(self):
        return (yield) * self.factor

    @hookimpl
    def on_sound(self, level):
        self.levels.append(level)

    def on_begin_train_epoch(self, global_step, epoch):
        level = self.trainer_hook.get_level(trainer=self.the_trainer)
        self.trainer_hook.on_sound(trainer=self.the_trainer, level=level)

    @hookimpl
    def on_setup(self, trainer):
        self.the_trainer, self.trainer_hook = trainer, trainer.hook

    def get_state(self):
        return {"levels": self.levels}

    def update_state(self, state):
        self.levels = state["levels"]
