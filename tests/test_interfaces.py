"""The seed's contract: signatures by position and renamed, outputs spread, steps by keyword."""

import copy
import functools
import pickle

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import TinyModule, digest, tiny_trainer


def test_the_six_events_are_called_by_position_with_outputs_spread():
    calls = []

    class Mine(CallbackInterface):
        def on_begin_train_epoch(self, gs, ep):
            calls.append(("begin", gs, ep))

        def on_end_backward(self, completed, l):
            calls.append(("backward", completed, l.shape, l.requires_grad))

        def on_end_train_step(self, gs, loss, *rest):
            calls.append(("step", gs, tuple(loss.shape), [tuple(r.shape) for r in rest]))

        def on_end_val_epoch(self, gs, *outs, key="default"):
            calls.append(("val", gs, [tuple(o.shape) for o in outs], key))

        def on_end_train_epoch(self, gs, *outs):
            calls.append(("epoch", gs, [tuple(o.shape) for o in outs]))

        def on_end_train(self, gs):
            calls.append(("end", gs))

    tiny_trainer([Mine()], module=TinyModule(samples=20), epochs=1).train()
    assert calls == [
        ("begin", 0, 0),
        ("backward", 0, (), True),
        ("step", 1, (), [(8, 1)]),
        ("backward", 1, (), True),
        ("step", 2, (), [(8, 1)]),
        ("backward", 2, (), True),
        ("step", 3, (), [(4, 1)]),
        ("val", 3, [(3,), (20, 1), (20, 1)], "default"),
        ("epoch", 3, [(3,), (20, 1)]),
        ("end", 3),
    ]


def test_an_override_gets_as_many_outputs_as_it_has_room_for_and_others_are_not_collected():
    class None_(CallbackInterface):
        def on_end_train_step(self, gs): ...

        def on_end_train_epoch(self, gs): ...

    class One(CallbackInterface):
        def on_end_train_step(self, gs, loss):
            assert loss.shape == ()

    assert tiny_trainer([None_()]).plugins.rooms == dict.fromkeys(
        ["on_end_train_step", "on_end_val_epoch", "on_end_train_epoch", "on_end_test_epoch"], 0
    )
    trainer = tiny_trainer([None_(), One()])
    assert trainer.plugins.rooms["on_end_train_step"] == 1
    trainer.train()


WINDOWS = {
    1: [("()", "(1,)", "(8, 1)", "[None]", "[{'a': 1}]")] * 3,
    2: [
        ("(2,)", "(2,)", "(16, 1)", "[None, None]", "[{'a': 1}, {'a': 1}]"),
        ("(1,)", "(1,)", "(8, 1)", "[None]", "[{'a': 1}]"),
    ],
}


@pytest.mark.parametrize(("window", "expected"), WINDOWS.items())
def test_the_loss_of_a_step_is_a_number_if_a_step_has_one_micro_batch(window, expected):
    seen = []

    class Outputs(TinyModule):
        def train_step(self, global_step, batch, device):
            loss, predictions = super().train_step(global_step, batch, device)
            return loss, loss.reshape(1), predictions, None, {"a": 1}

        @hookimpl
        def get_window_size(self):
            return window

        def on_end_train_step(self, global_step, *outputs):
            seen.append(tuple(str(tuple(one.shape) if isinstance(one, torch.Tensor) else one) for one in outputs))

        def on_end_train_epoch(self, global_step, loss, *rest):
            seen.append(loss.shape)

    tiny_trainer(module=Outputs(samples=24), epochs=1, train_batch_size=8 * window, evaluate_every=None).train()
    assert seen == [*expected, (3,)]  # the last window of two is one short, and its loss a vector all the same


def test_a_plugin_may_change_the_outputs_of_an_epoch_for_the_others():
    heard = []

    class Doubles(CallbackInterface):
        @hookimpl(tryfirst=True)
        def on_end_train_epoch(self, trainer, train_step_collated_outputs):
            gathered = trainer.hook.gather_outputs(
                trainer=trainer, outputs=list(train_step_collated_outputs), stage=Stage.TRAIN, key="default"
            )
            train_step_collated_outputs[:] = [2 * len(column) for column in gathered]

    class Hears(TinyModule):
        def on_end_train_epoch(self, global_step, losses):
            heard.append(losses)

    tiny_trainer([Doubles()], module=Hears(samples=24), epochs=1).train()
    assert heard == [6]


def test_a_module_may_keep_a_function_under_the_name_of_a_hook():
    class Keeps(TinyModule):
        def __init__(self):
            super().__init__()
            self.save, self.evaluate = print, lambda predictions, references: 1.0

    tiny_trainer(module=Keeps(), epochs=1).train()


def test_a_count_is_no_loss_and_a_step_may_return_nothing():
    class Wraps(CallbackInterface):
        @hookimpl(wrapper=True)
        def call_model(self):
            return (yield)

    class Counts(TinyModule):
        def val_step(self, global_step, batch, device):
            return (batch[0] > 0).sum(), batch[0]

    class Silent(TinyModule):
        def val_step(self, global_step, batch, device): ...

    for module in (Counts(), Silent()):
        assert tiny_trainer([Wraps()], module=module).validate() == {}


def test_too_few_outputs_are_an_error_that_names_the_plugin():
    class Greedy(CallbackInterface):
        def on_end_train_step(self, gs, loss, predictions, attention): ...

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'attention'") as caught:
        tiny_trainer([Greedy()]).train()
    assert "on_end_train_step by plugin 'greedy'" in caught.value.__notes__[0]


def test_a_marked_seed_event_is_called_by_name_and_not_bridged_as_well():
    calls = []

    class Mine(CallbackInterface):
        @hookimpl(trylast=True)
        def on_end_val_epoch(self, key, val_step_collated_outputs, trainer):
            calls.append((key, len(val_step_collated_outputs), type(trainer)))

    tiny_trainer([Mine()], epochs=1).train()
    assert calls == [("default", 3, Trainer)]


def test_the_key_comes_by_name_in_any_form_of_the_override():
    keys = []

    class Positional(CallbackInterface):
        def on_end_val_epoch(self, gs, loss, key):
            keys.append(key)

    class Keyword(CallbackInterface):
        def on_end_val_epoch(self, gs, *, key="default"):
            keys.append(key)

    class Without(CallbackInterface):
        def on_end_val_epoch(self, gs):
            keys.append(None)

    class Module(TinyModule):
        def get_val_dataloaders(self, sampler, batch_size):
            return {"near": super().get_val_dataloaders(sampler, batch_size), "far": [self[:8], self[8:]]}

        def __getitem__(self, which):
            ids = torch.arange(len(self.inputs))
            return self.inputs[which], self.targets[which], ids[which]

    tiny_trainer([Positional(), Keyword(), Without()], module=Module(), epochs=1).train()
    assert keys == ["near", "near", None, "far", "far", None]


def test_steps_are_called_by_keyword_in_any_order():
    class Module(TinyModule):
        def train_step(self, device, batch, global_step):
            self.told = global_step, device
            return super().train_step(global_step, batch, device)

    trainer = tiny_trainer(module=Module(), epochs=1)
    trainer.train()
    assert trainer.module.told == (7, torch.device("cpu"))


def test_calling_a_module_directly_is_an_ordinary_call():
    module = TinyModule()
    assert module.on_end_val_epoch(5, torch.ones(()), key="a") is None
    with pytest.raises(AttributeError, match=r"stage must be a hookline.Stage, not 'train'"):
        module(stage="train", global_step=0, batch=None, device="cpu")


def test_what_is_not_written_says_so():
    class Module(TinyModule):
        val_step = ModuleInterface.val_step

    with pytest.raises(
        NotImplementedError, match=r"Module.get_val_dataloaders\(\) gave data, but Module has no val_step"
    ):
        tiny_trainer(module=Module(), epochs=1).train()


def test_a_module_without_abstract_methods_cannot_be_made():
    class Module(ModuleInterface): ...

    with pytest.raises(TypeError, match="get_train_dataloader"):
        Module()


def test_a_module_without_an_optimizer_says_so_when_it_trains():
    class Module(TinyModule):
        get_optimizers_schedulers = ModuleInterface.get_optimizers_schedulers

    trainer = tiny_trainer(module=Module())
    trainer.validate()
    with pytest.raises(ValueError, match="Module has no get_optimizers_schedulers: write it, or name plugin optimizer"):
        trainer.train()


def test_a_module_without_a_trainer_says_so():
    with pytest.raises(RuntimeError, match="TinyModule is with no trainer yet"):
        TinyModule().log(loss=1.0)


def test_a_copy_or_a_pickle_of_a_module_is_with_no_trainer():
    trainer = tiny_trainer(epochs=1)
    trainer.train()
    for copied in (copy.deepcopy(trainer.module), pickle.loads(pickle.dumps(trainer.module))):
        assert digest(copied.state_dict()) == digest(trainer.module.state_dict())
        with pytest.raises(RuntimeError):
            _ = copied.trainer


def test_neither_a_module_nor_adapted():
    with pytest.raises(TypeError, match="Trainer got a Linear, which is no object of a ModuleInterface, and no plugin"):
        Trainer(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="Trainer got the class TinyModule"):
        Trainer(TinyModule)


def test_a_function_makes_the_module_and_a_plugin_says_where():
    class More(TinyModule):
        def __init__(self):
            with torch.device("cpu"):
                super().__init__()
            self.more = torch.nn.Linear(2, 2)

    class Elsewhere(CallbackInterface):
        @hookimpl(wrapper=True)
        def adapt_module(self):
            with torch.device("meta"):
                return (yield)

    assert tiny_trainer(module=functools.partial(TinyModule, samples=24)).module.inputs.shape == (24, 8)
    assert Trainer(lambda: More()).module.more.weight.device.type == "cpu"
    module = Trainer(lambda: More(), [Elsewhere()]).module
    assert module.more.weight.is_meta
    assert not module.net[0].weight.is_meta


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), "Trainer got a function that made a Linear, which is no object of a Mod"),
        (lambda: None, "Trainer got a function that made a NoneType, which is"),
        (functools.partial(dict), "Trainer got a partial that made a dict, which is no"),
    ],
)
def test_a_function_that_makes_something_else(function, message):
    with pytest.raises(TypeError, match=message):
        Trainer(function)


def test_adapters_wrap_and_several_may_be_active():
    class Foreign:
        def __init__(self, wraps):
            self.wraps = wraps

    def adapter(kind):
        class Adapter(CallbackInterface):
            @hookimpl(wrapper=True)
            def adapt_module(self):
                module = yield
                return module.wraps if isinstance(module, kind) else module

        return Adapter()

    class Other(Foreign): ...

    plugins = {"one": adapter(Foreign), "two": adapter(Other)}
    inner = TinyModule()
    assert Trainer(Other(Foreign(inner)), plugins).module is inner


@pytest.mark.parametrize("stage", list(Stage))
def test_stages_have_words(stage):
    assert stage.value in ("train", "val", "test", "predict")


# Optimizers ---------------------------------------------------------------------------


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def trained_with(make, **methods):
    """Train two epochs with what `make(module)` returns as optimizers; return the trainer."""

    def get_optimizers_schedulers(self, steps, epochs):
        return make(self)

    methods["get_optimizers_schedulers"] = get_optimizers_schedulers
    trainer = tiny_trainer(module=type("Mine", (TinyModule,), methods)())
    trainer.train()
    return trainer


def decayed(module, wrap):
    optimizer = sgd(module.parameters())
    return wrap(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))


@pytest.mark.parametrize(
    ("wrap", "moves"),
    [
        (lambda optimizer, scheduler: optimizer, 0),
        (lambda optimizer, scheduler: [optimizer], 0),
        (lambda optimizer, scheduler: (optimizer, None), 0),
        (lambda optimizer, scheduler: (optimizer, []), 0),
        (lambda optimizer, scheduler: (optimizer, scheduler), 14),
        (lambda optimizer, scheduler: ([optimizer], scheduler), 14),
        (lambda optimizer, scheduler: [[optimizer], (scheduler,)], 14),
        (lambda optimizer, scheduler: (iter([optimizer]), iter([scheduler])), 14),
        (lambda optimizer, scheduler: (optimizer, (scheduler, "epoch")), 2),
        (lambda optimizer, scheduler: ([optimizer], [(scheduler, "epoch")]), 2),
    ],
)
def test_optimizers_and_schedulers_alone_or_in_lists(wrap, moves):
    trainer = trained_with(lambda module: decayed(module, wrap))
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**moves


def test_two_optimizers_in_a_tuple_both_step():
    def two(module):
        layers = list(module.net.parameters())
        return sgd(layers[:2]), sgd(layers[2:])

    trainer = trained_with(two)
    assert len(trainer.optimizers) == 2
    assert not trainer.schedulers
    alone = trained_with(lambda module: sgd(module.parameters()))
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda module: {"optimizer": sgd(module.parameters())}, r"Mine.* returned a dict with keys \['optimizer'\]"),
        (lambda module: [{"optimizer": sgd(module.parameters()), "lr_scheduler": 1}], r"'optimizer', 'lr_scheduler'\]"),
        (lambda module: None, r"get_optimizers_schedulers returned None where an optimizer is meant: return an optim"),
        (lambda module: torch.optim.SGD, r"returned <class .*SGD'> where an optimizer is meant"),
        (lambda module: "sgd", r"returned 'sgd' where an optimizer is meant"),
        (lambda module: (sgd(module.parameters()), {"scheduler": 1}), "returned a dict where a scheduler is meant"),
        (lambda module: (sgd(module.parameters()), torch.optim.lr_scheduler.StepLR), "the class StepLR where a sched"),
    ],
)
def test_what_is_no_optimizer_and_no_scheduler(make, message):
    with pytest.raises(TypeError, match=message):
        trained_with(make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda module: sgd(copy.deepcopy(module.net).parameters()),
            "6 of the 6 tensors of SGD are no parameters of",
        ),
        (lambda module: sgd([*module.parameters(), torch.zeros(3, requires_grad=True)]), r"1 of the 7 .* shape \(3,\)"),
        (
            lambda module: (
                sgd(module.parameters()),
                torch.optim.lr_scheduler.StepLR(sgd(module.parameters()), 1),
            ),
            "StepLR moves the rates of an optimizer that is not returned",
        ),
    ],
)
def test_an_optimizer_of_something_else_than_the_module(make, message):
    with pytest.raises(ValueError, match=message):
        trained_with(make)


def test_an_optimizer_that_was_made_before_a_part_was_replaced():
    class Early(TinyModule):
        def __init__(self):
            super().__init__()
            self.early = sgd(self.parameters())
            self.net[4] = torch.nn.Linear(16, 1)

        def get_optimizers_schedulers(self, steps, epochs):
            return self.early

    with pytest.raises(ValueError, match="2 of the 6 tensors of SGD are no parameters of the module"):
        tiny_trainer(module=Early()).train()


def test_parameters_that_the_first_step_does_not_train_are_said_once(caplog):
    class Heads(TinyModule):
        def __init__(self, frozen):
            super().__init__()
            self.unused, self.forgotten = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
            self.unused.requires_grad_(not frozen)
            self.forgotten.requires_grad_(not frozen)

        def get_optimizers_schedulers(self, steps, epochs):
            return sgd([*self.net.parameters(), *self.unused.parameters()])

    tiny_trainer(module=Heads(frozen=False)).train()
    assert [record.message.partition(". Freeze")[0] for record in caplog.records] == [
        "2 parameter(s) of Heads that require gradients are in no optimizer, so they are not trained: "
        "forgotten.weight, forgotten.bias",
        "2 parameter(s) of Heads that require gradients have no gradient in the first step: the loss does not depend "
        "on them: unused.weight, unused.bias",
    ]
    caplog.clear()
    tiny_trainer(module=Heads(frozen=True)).train()
    assert not caplog.records


def test_a_layer_that_is_made_in_the_first_step_is_in_no_optimizer(caplog):
    class Late(TinyModule):
        def train_step(self, global_step, batch, device):
            if not hasattr(self, "head"):
                self.head = torch.nn.Linear(1, 1)
            return self.head(super().train_step(global_step, batch, device)[1]).square().mean()

    tiny_trainer(module=Late()).train()
    assert "2 parameter(s) of Late that require gradients are in no optimizer" in caplog.text


def test_a_loss_that_depends_on_no_parameter_of_the_optimizers():
    def train_step(self, global_step, batch, device):
        return copy.deepcopy(self.net)(batch[0]).square().mean()

    with pytest.raises(ValueError, match="train_step returned depends on no parameter of the optimizers, so nothing"):
        trained_with(lambda module: sgd(module.parameters()), train_step=train_step)


@pytest.mark.parametrize(
    "twice",
    [
        lambda trainer, loss: loss.backward(retain_graph=True),
        lambda trainer, loss: trainer.optimizers[0].step(),
        lambda trainer, loss: trainer.schedulers[0].scheduler.step(),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_train_step_that_does_what_the_loop_does(twice):
    def train_step(self, global_step, batch, device):
        loss = TinyModule.train_step(self, global_step, batch, device)[0]
        twice(self.trainer, loss)
        return loss

    with pytest.raises(TypeError, match=r"Mine.train_step has called backward\(\), zero_grad\(\) or step\(\), which"):
        trained_with(lambda module: decayed(module, lambda *pair: pair), train_step=train_step)


def test_a_train_step_that_clears_the_gradients_of_the_micro_batches_before():
    class Clears(TinyModule):
        def train_step(self, global_step, batch, device):
            self.trainer.zero_grad()
            return super().train_step(global_step, batch, device)

        @hookimpl
        def get_window_size(self):
            return 2

    with pytest.raises(TypeError, match=r"Clears.train_step has called backward\(\), zero_grad\(\)"):
        tiny_trainer(module=Clears()).train()


def test_an_error_of_the_first_step_is_the_one_that_is_raised():
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            raise RuntimeError("in the step")

    class Once(CallbackInterface):
        """Hears the end of the first forward, also if it fails, and goes."""

        @hookimpl
        def on_begin_train(self, trainer):
            self.handle = trainer.model.register_forward_hook(self.hear, always_call=True)

        def hear(self, *_):
            self.handle.remove()

    module = Fails()
    with pytest.raises(RuntimeError, match="in the step"):
        tiny_trainer([Once()], module).train()
    assert not module._forward_hooks


def test_who_performs_an_update_steps_where_it_likes():
    class Manual(TinyModule):
        def train_step(self, global_step, batch, device):
            loss = super().train_step(global_step, batch, device)[0]
            loss.backward()
            self.trainer.step()
            return loss.detach()

        @hookimpl
        def update(self, trainer, window):
            return [(trainer.hook.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN),) for batch in window]

    module = Manual()
    tiny_trainer(module=module).train()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    plain = TinyModule()
    tiny_trainer(module=plain).train()
    assert digest(module.state_dict()) == digest(plain.state_dict())


# A forward of the module's own --------------------------------------------------------


class Own(TinyModule):
    """Calls itself, as any `torch.nn.Module`."""

    def forward(self, x):
        return self.net(x)

    def train_step(self, global_step, batch, device):
        predictions = self(batch[0])
        return torch.nn.functional.mse_loss(predictions, batch[1]), predictions


class Doubles(Own):
    def forward(self, x):
        return 2 * super().forward(x)


class AnyArguments(TinyModule):
    def forward(self, **inputs):
        return self.net(**inputs)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 3

    def forward(self, x):
        return self.scale * x


class Mixed(TinyModule, Net): ...


class MixedFirst(Net, TinyModule): ...


@pytest.mark.parametrize(
    ("kind", "call", "expected"),
    [
        (Own, lambda module, x: module(x), lambda module, x: module.net(x)),
        (Own, lambda module, x: module.forward(x=x), lambda module, x: module.net(x)),
        (Doubles, lambda module, x: module(x), lambda module, x: 2 * module.net(x)),
        (AnyArguments, lambda module, x: module(input=x), lambda module, x: module.net(x)),
        (Mixed, lambda module, x: module(x), lambda module, x: 3 * x),
        (MixedFirst, lambda module, x: module(x), lambda module, x: 3 * x),
    ],
)
def test_a_module_has_a_forward_of_its_own(kind, call, expected):
    class Inherits(kind): ...

    for made in (kind, Inherits):
        module, plain, x = made(), TinyModule(), torch.ones(4, 8)
        for one in (module, plain):
            tiny_trainer(module=one).train()
        state = {name: tensor for name, tensor in module.state_dict().items() if name != "scale"}
        assert (digest(state) == digest(plain.state_dict())) != (kind is Doubles)
        module.eval()
        assert torch.equal(call(module, x), expected(module, x))


@pytest.mark.parametrize("own", [TinyModule, Own])
def test_a_forward_that_takes_the_stage_wraps_the_steps(own):
    seen = []

    class Named(own):
        def forward(self, stage, global_step, batch, device):
            seen.append(stage)
            return super().forward(stage, global_step, batch, device)

    class PassesOn(own):
        def forward(self, *args, **given):
            seen.append(given["stage"])
            return super().forward(*args, **given)

    for kind in (Named, PassesOn):
        tiny_trainer(module=kind(), epochs=1).train()
        assert seen == [Stage.TRAIN] * 7 + [Stage.VAL] * 7
        seen.clear()

    class OwnBelow(Named):
        def forward(self, x):
            return self.net(x)

    tiny_trainer(module=OwnBelow(), epochs=1).train()
    assert seen == [Stage.TRAIN] * 7 + [Stage.VAL] * 7


def test_a_module_without_a_forward_of_its_own_says_so():
    with pytest.raises(AttributeError, match=r"stage must be a hookline.Stage, not tensor.* define forward\(self, x\)"):
        TinyModule()(torch.ones(2, 8))


def test_a_module_with_a_forward_is_copied_and_pickled():
    module, x = Own().eval(), torch.ones(2, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (torch.zeros(2), set()),
        (torch.tensor(3), set()),
        (None, set()),
        ("a text", set()),
        (torch.tensor(3.0), {"val_loss"}),
        (torch.tensor([3.0]), {"val_loss"}),
        (3, {"val_loss"}),
        (3.0, {"val_loss"}),
    ],
)
def test_a_first_output_of_val_step_that_is_one_number_and_no_count_is_the_loss(first, expected):
    class Gives(TinyModule):
        def val_step(self, global_step, batch, device):
            return first, batch[0]

    trainer = tiny_trainer(module=Gives(samples=16), epochs=1)
    trainer.train()
    assert trainer.metrics.keys() & {"val_loss"} == expected
