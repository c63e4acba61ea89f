"""CUDA paths without CUDA: the loop and every plugin train on a device that is as strict as a real one."""

import random
import re

import pytest
import torch
from tests.test_budgets import OPTIONS as COUNTED
from tests.test_house import EACH, NEEDED
from tests.test_pairs import OPTIONS

from hookline import hookimpl
from hookline.installed import load
from hookline.testing import TinyModule, check_plugin, digest, fake_cuda, tiny_trainer
from hookline.testing.fake_autocast import listed

pytestmark = pytest.mark.plugins
ACTIVE = {**NEEDED, **OPTIONS, "metrics": COUNTED["metrics"], "amp": {"precision": "fp16"}, "checkpoint": {}}
ACTIVE |= {"finite": {}, "limits": {}, "sample": NEEDED["sample"], "freeze": {"patterns": "net.0"}}
UNLISTED = {"binary_cross_entropy", "cudnn_convolution", "cudnn_convolution_transpose"}  # raises; of cuDNN's own
WAITS = {  # plugins that wait for the device in ordinary steps, with the reason
    "amp": "with fp16 torch's GradScaler asks the device after each backward pass whether to step",
    "cudagraph": "the step that captures waits, and those that compare do; its own tests watch the others",
}


@pytest.mark.parametrize("name", EACH)
def test_a_plugin_runs_on_the_device_and_waits_for_nothing_in_ordinary_steps(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {"device": WAITS[name]} if name in WAITS else {}
    check_plugin(load(name), checks=["device"], expect=expected, **ACTIVE.get(name, {}))


class Quiet(TinyModule):
    """Gives metrics what they need, and does not look at what it trains on."""

    train_step = TinyModule.val_step


def train(plugins=(), module=None, **options):
    trainer = tiny_trainer(plugins, module or Quiet(dropout=0.0), **options)
    trainer.train()
    return trainer


def test_a_package_may_be_imported_on_it_that_names_a_stream_as_a_type():
    with fake_cuda():
        assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream | None)


def test_it_has_the_numbers_of_the_cpu():
    plugins = {name: ACTIVE[name] for name in ("accumulate", "backend", "clip", "ema", "metrics", "monitor")}
    here = train(plugins)
    metrics, predicted = here.metrics, digest(here.predict(collect=True))
    with fake_cuda() as device:
        there = train(plugins, device="cuda")
        assert {tensor.device for tensor in there.module.state_dict().values()} == {torch.device("cuda:0")}
        assert not device.waits  # which are noted on demand
        assert (digest(there.export_model()), there.metrics) == (digest(here.export_model()), metrics)
        assert digest(there.predict(collect=True)) == predicted


def test_a_run_resumed_on_it_ends_with_the_same_bits(tmp_path):
    plugins = {"checkpoint": {"every": "3 steps"}, "ema": {"decay": 0.5}}
    with fake_cuda():  # whose dropout draws the random numbers of the device
        options = {"device": "cuda", "runs_folder": str(tmp_path)}
        whole, cut = train(plugins, Quiet(), **options), train(plugins, Quiet(), max_steps=9, **options)
        torch.cuda.manual_seed(random.getrandbits(30))
        resumed = train(plugins, Quiet(), resume=str(cut.run_dir), **options)
        assert digest(resumed.export_model()) == digest(whole.export_model()) != digest(cut.export_model())


class Precise(Quiet):
    """Sees in which precision it computes."""

    def train_step(self, global_step, batch, device):
        loss, predictions, targets = super().train_step(global_step, batch, device)
        self.saw = predictions.dtype, loss.dtype
        return loss, predictions, targets


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_amp_computes_on_it_in_its_precision(precision, dtype):
    module = Precise(dropout=0.0)
    with fake_cuda():
        trainer = train({"amp": {"precision": precision}}, module, device="cuda")
        assert {weight.grad is None and weight.dtype for weight in trainer.module.parameters()} == {torch.float32}
    assert module.saw == (dtype, torch.float32)
    assert trainer.metrics["val_loss"] < 9


def test_amp_in_bf16_waits_for_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_plugin(load("amp"), checks=["device"], precision="bf16")


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [
        (lambda x: torch.nn.functional.linear(x, x), torch.bfloat16),
        (lambda x: x @ x, torch.bfloat16),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]), torch.bfloat16),
        (lambda x: (x @ x).softmax(0), torch.float32),
        (lambda x: (x @ x).sum(), torch.float32),
        (lambda x: (x @ x).softmax(0, dtype=torch.float16), torch.float16),
        (lambda x: (x @ x).norm(), torch.float32),
        (lambda x: torch.addcmul(x @ x, x @ x, x @ x), torch.bfloat16),
        (lambda x: torch.addcmul(x @ x, x, x @ x), torch.float32),
        (lambda x: (x @ x) + 1, torch.bfloat16),
        (lambda x: x.double() @ x.double(), torch.float64),
    ],
)
def test_autocast_casts_as_on_a_real_device(compute, dtype):
    with fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        there = torch.ones(4, 4, device="cuda")
        assert compute(there).dtype == dtype
        with torch.autocast("cuda", enabled=False):
            assert (there @ there).dtype == torch.float32


def test_autocast_knows_every_operator_of_torchs_own():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    names = {name.removeprefix("aten::") for name in registered if name.startswith("aten::")}
    assert listed().keys() == names - UNLISTED


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda w: w.sum().item(), "aten::_local_scalar_dense needs values on the host"),
        (lambda w: bool(w.isfinite().all()), "aten::_local_scalar_dense needs values on the host"),
        (lambda w: w.nonzero(), "aten::nonzero needs values on the host"),
        (lambda w: torch.equal(w, w), "aten::equal needs values on the host"),
        (lambda w: w[w > 0], "aten::index counts what a mask chooses"),
        (lambda w: w[torch.tensor([0, 1])], "aten::index copies an index from the host"),
        (lambda w: w.cpu(), "aten::_to_copy copies to the host"),
        (lambda w: w.tolist(), "aten::_to_copy copies to the host"),
        (lambda w: torch.empty(16, 8).copy_(w), "aten::copy_ copies to the host"),
        (lambda w: torch.tensor(1.0, device=w.device), "copies from the host, and not with non_blocking=True"),
        (lambda w: w.copy_(torch.ones(16, 8)), "copies from the host, and not with non_blocking=True"),
        (lambda w: torch.cuda.synchronize(), "torch.cuda.synchronize"),
        (lambda w: torch.cuda.Stream().synchronize(), "torch.cuda.Stream.synchronize"),
    ],
)
def test_what_waits_is_named_with_its_place(act, said):
    with fake_cuda() as device:
        weight = torch.ones(16, 8, device="cuda")
        act(weight)
        device.watching = True
        act(weight)
    (wait,) = device.waits
    assert re.fullmatch(f".*{said}, test_fake_cuda.py:{act.__code__.co_firstlineno}", str(wait))


@pytest.mark.parametrize(
    "act",
    [
        lambda w: torch.zeros(16, 8).to(w.device, non_blocking=True).add_(w),
        lambda w: w * torch.tensor(2.0) + torch.ones(8, device="cuda").sum(),  # a number of the CPU may come along
        lambda w: w[torch.arange(3, device=w.device)].clamp(min=0).where(w[:3] > 0, 0.0),
    ],
)
def test_what_a_real_device_takes_waits_for_nothing(act):
    with fake_cuda() as device:
        device.watching = True
        act(torch.ones(16, 8, device="cuda"))
    assert not device.waits


@pytest.mark.parametrize(
    "act", [lambda w: w + torch.ones(16, 8), lambda w: torch.ones(16, 8).mul_(w), lambda w: w.numpy()]
)
def test_tensors_of_two_devices_do_not_meet(act):
    said = r"found cpu, cuda:0 \(aten::\w+, test_fake_cuda.py|can't convert cuda:0 device type tensor to numpy"
    with fake_cuda(), pytest.raises((RuntimeError, TypeError), match=said):
        act(torch.ones(16, 8, device="cuda"))


class Stays(Quiet):
    @hookimpl
    def prepare_batch(self, batch):
        return batch


class Makes(Quiet):
    def train_step(self, global_step, batch, device):
        return (super().train_step(global_step, batch, device)[0] * torch.ones(2)).sum()


@pytest.mark.parametrize("module", [Stays, Makes])
def test_what_is_left_on_the_cpu_is_an_error_that_says_what_to_do(module):
    said = r"but found cpu, cuda:0 \(aten::\w+, \w+\.py:\d+\)"
    with fake_cuda(), pytest.raises(RuntimeError, match=said) as raised:
        train(module=module(), device="cuda")
    assert f"{module.__name__} is on cuda:0, and a tensor that meets" in raised.value.__notes__[0]
