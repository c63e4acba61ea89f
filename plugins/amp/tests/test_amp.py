import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hookline import ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import ByClosure, Memory
from hookline_amp import Amp

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
TOO_LARGE = 2.0**20  # a scale with which the gradients of the first steps overflow in fp16


class Regression(ModuleInterface):
    """A small network on a list of batches, so that a loop by hand sees the very same ones."""

    def __init__(self, batches=8):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(batches, 5, 4)]

    def train_step(self, global_step, batch, device):
        inputs, references = batch
        predictions = self.net(inputs)
        return torch.nn.functional.mse_loss(predictions.float(), references), predictions

    def val_step(self, global_step, batch, device):
        return self.train_step(global_step, batch, device)

    def test_step(self, global_step, batch, device):
        return self.train_step(global_step, batch, device)

    def predict_step(self, global_step, batch, device):
        return self.net(batch[0])

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    def get_test_dataloaders(self, sampler, batch_size):
        return self.batches

    def get_predict_dataloaders(self, sampler, batch_size):
        return self.batches

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    @staticmethod
    def make_optimizer(parameters):
        return torch.optim.Adam(parameters, 0.05)


class Validating(Regression):
    def get_val_dataloaders(self, sampler, batch_size):
        return self.batches


def train_by_hand(precision, device, epochs=2, **scaler_options):
    """Return module, optimizer, scaler and the number of skipped steps of a loop without a framework."""
    module = Regression().to(device)
    optimizer = module.make_optimizer(module.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16", **scaler_options)
    skipped = 0
    for inputs, references in module.batches * epochs:
        with torch.autocast(device, DTYPES[precision]):
            loss = module.train_step(0, (inputs.to(device), references.to(device)), device)[0]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
        else:
            scheduler.step()
        optimizer.zero_grad()
    return module, optimizer, scaler, skipped


def train(module, plugins, device="cpu", **options):
    trainer = Trainer(module, plugins=plugins, device=device, **options)
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name


def done_by(trainer, hook):
    return next(row["done_by"] for row in trainer.plugins.plan() if row["hook"] == hook)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_gives_the_bits_of_a_loop_by_hand(device):
    expected, optimizer, _, _ = train_by_hand("bf16", device)
    module = Regression()
    trainer = train(module, [Amp()], device, epochs=2)
    assert_same_weights(module, expected)
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    plain = Regression()
    train(plain, [], device, epochs=2)
    assert not torch.equal(plain.net[0].weight, module.net[0].weight)  # precision made a difference


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_gives_the_bits_of_a_loop_by_hand_through_overflows(device):
    expected, optimizer, scaler, skipped = train_by_hand("fp16", device, init_scale=TOO_LARGE, growth_interval=3)
    assert 1 < skipped < 15
    module, plugin = Regression(), Amp("fp16", init_scale=TOO_LARGE, growth_interval=3)
    trainer = train(module, [plugin], device, epochs=2)
    assert_same_weights(module, expected)
    assert plugin.get_state() == {"scale": scaler.get_scale(), "growth_tracker": scaler.state_dict()["_growth_tracker"]}
    assert (trainer.counters.global_step, trainer.counters.skipped_steps) == (16, skipped)
    assert trainer.schedulers[0].scheduler.last_epoch == 16 - skipped
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_optimizer_that_skips_by_itself_counts_as_skipped(device):
    class Fused(Regression):
        @staticmethod
        def make_optimizer(parameters):
            return torch.optim.Adam(parameters, 0.05, fused=True)

    plain, fused = Regression(), Fused()
    train(plain, [Amp("fp16", init_scale=TOO_LARGE)], device)
    trainer = train(fused, [Amp("fp16", init_scale=TOO_LARGE)], device)
    assert trainer.counters.skipped_steps > 0
    assert trainer.schedulers[0].scheduler.last_epoch == 8 - trainer.counters.skipped_steps
    for name, weights in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], weights)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_covers_every_stage_and_nothing_else(precision):
    class Watching(Validating):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, stage, global_step, batch, device):
            self.seen.append((stage, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(stage, global_step, batch, device)

        @hookimpl
        def scale_loss(self, loss):
            assert not torch.is_autocast_enabled("cpu")
            return loss

        @hookimpl
        def on_end_val_step(self, outputs):
            assert not torch.is_autocast_enabled("cpu")
            assert outputs[1].dtype is DTYPES[precision]

        @hookimpl
        def on_end_predict_step(self, outputs):
            assert outputs.dtype is DTYPES[precision]

    module = Watching()
    trainer = train(module, [Amp(precision)])
    trainer.test()
    trainer.predict()
    assert {stage for stage, _, _ in module.seen} == set(Stage)
    assert {(enabled, dtype) for _, enabled, dtype in module.seen} == {(True, DTYPES[precision])}
    assert module.net[0].weight.dtype is torch.float32


def test_evaluation_gives_the_bits_of_a_loop_by_hand():
    module = Validating()
    metrics = Trainer(module, plugins=[Amp()], device="cpu").validate()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        losses = [module.val_step(0, batch, "cpu")[0] for batch in module.batches]
    assert metrics["val_loss"] == torch.stack(losses).double().mean().item()


def test_autocast_ends_where_a_step_raises():
    class Broken(Regression):
        def train_step(self, global_step, batch, device):
            assert torch.is_autocast_enabled("cpu")
            raise RuntimeError("broken step")

    trainer = Trainer(Broken(), plugins=[Amp()], device="cpu")
    with pytest.raises(RuntimeError, match="broken step"):
        trainer.train()
    assert not torch.is_autocast_enabled("cpu")


def test_others_hear_losses_and_gradients_unscaled():
    class Watching(Regression):
        def __init__(self):
            super().__init__()
            self.losses, self.norms = [], []

        def on_end_backward(self, global_step, loss_tensor):
            self.losses.append(loss_tensor.detach())

        @hookimpl
        def on_begin_optimizer_step(self):
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    scaled, plain = Watching(), Watching()
    train(scaled, [Amp("fp16", init_scale=1024.0)])
    train(plain, [])
    torch.testing.assert_close(torch.stack(scaled.losses), torch.stack(plain.losses), rtol=0.05, atol=0.01)
    torch.testing.assert_close(torch.stack(scaled.norms), torch.stack(plain.norms), rtol=0.05, atol=0.01)


def test_a_step_refused_by_a_gate_is_no_step_of_the_scaler():
    class Gate:
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step % 2 == 0

    plugin = Amp("fp16", init_scale=8.0)
    trainer = train(Regression(), [plugin, Gate()])
    assert (trainer.counters.global_step, trainer.counters.skipped_steps) == (8, 4)
    assert trainer.schedulers[0].scheduler.last_epoch == 4


def test_resumes_with_the_scale_of_before():
    options = {"init_scale": TOO_LARGE, "growth_interval": 2}
    whole, plugin = Regression(), Amp("fp16", **options)
    trainer = train(whole, [plugin], epochs=2)
    memory, resumed = Memory(), Amp("fp16", **options)
    train(Regression(), [Amp("fp16", **options), memory], epochs=2, max_steps=11)
    assert memory.state["plugins"]["amp"]["scale"] < TOO_LARGE
    module = Regression()
    continued = train(module, [resumed, Memory(memory.state)], epochs=2)
    assert_same_weights(module, whole)
    assert resumed.get_state() == plugin.get_state()
    assert continued.counters.skipped_steps == trainer.counters.skipped_steps


def test_options_of_today_hold_after_a_resume():
    memory = Memory()
    train(Regression(), [Amp("fp16", init_scale=8.0, growth_interval=100), memory], max_steps=4)
    plugin = Amp("fp16", growth_interval=5)
    train(Regression(), [plugin, Memory(memory.state)])
    assert plugin.get_state() == {"scale": 16.0, "growth_tracker": 3}  # grown at the fifth of eight good steps


def test_a_late_comer_gets_its_state():
    trainer = Trainer(Regression(), device="cpu")
    trainer.plugins.receive({"amp": {"scale": 2.0, "growth_tracker": 1}})
    plugin = Amp("fp16")
    trainer.plugins.register(plugin, "amp")
    assert plugin.get_state() == {"scale": 2.0, "growth_tracker": 1}


def test_bf16_leaves_backward_and_step_to_others():
    class Stepping:
        @hookimpl
        def step_optimizer(self, optimizer):
            optimizer.step()
            return True

    plugin = Amp()
    trainer = train(Regression(), [plugin, Stepping()])
    assert done_by(trainer, "run_backward") == ["core"]
    assert done_by(trainer, "on_begin_optimizer_step") == done_by(trainer, "on_end_optimizer_step") == []
    assert plugin.get_state() == {}
    with pytest.raises(ValueError, match="'amp' and 'stepping' both perform 'step_optimizer', which is done once"):
        Trainer(Regression(), plugins=[Amp("fp16"), Stepping()], device="cpu")


class WithClosure(ByClosure, Regression):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), max_iter=2)], []


def test_a_closure_goes_with_bf16():
    by_hand = Regression()
    optimizer = torch.optim.LBFGS(by_hand.parameters(), max_iter=2)
    for batch in by_hand.batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = by_hand.train_step(0, batch, "cpu")[0]
            loss.backward()
            return loss

        optimizer.step(closure)
    module = WithClosure()
    train(module, [Amp()])
    assert_same_weights(module, by_hand)


def test_a_closure_is_refused_with_fp16():
    class EarlyGradients(WithClosure):
        @hookimpl
        def update(self, trainer, window):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step(closure=lambda: outputs[0][0])
            return outputs

    with pytest.raises(
        ValueError, match=r"amp\.precision='fp16' cannot step LBFGS with a closure: .* take precision bf16"
    ):
        train(EarlyGradients(), [Amp("fp16")])


class CountingSyncs(TorchDispatchMode):
    """Counts how often a value is fetched from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("plugin", "a_step"), [(Amp(), 0), (Amp("fp16", init_scale=8.0), 1)], ids=["bf16", "fp16"])
def test_waits_no_more_than_the_scaler(plugin, a_step):
    counts = []
    for plugins in ([], [plugin]):
        with CountingSyncs() as counting:
            train(Regression(), plugins)
        counts.append(counting.count)
    assert counts[1] - counts[0] == 8 * a_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, r"amp\.precision='fp8' must be one of bf16, fp16; for full precision turn amp off"),
        ({"init_scale": 0.0}, r"amp\.init_scale=0\.0 must be above 0"),
        ({"growth_factor": 1.0}, r"amp\.growth_factor=1\.0 must be above 1: the scale grows by it"),
        ({"backoff_factor": 1.0}, r"amp\.backoff_factor=1\.0 must be between 0 and 1: the scale shrinks by it"),
        ({"growth_interval": 0}, r"amp\.growth_interval=0 must be at least 1"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Amp(**options)
