"""The loop and the plugins on a device that is neither CPU nor CUDA, which torch's C++ knows as an accelerator."""

import random

import pytest
import torch
from tests.test_fake_cuda import ACTIVE, Makes, Quiet, Stays
from tests.test_house import NEEDED

from hookline.installed import load
from hookline.testing import Memory, check_plugin, digest, other_device, tiny_trainer
from hookline.testing.faults import run
from hookline.testing.other_device import library, why_not

pytestmark = [
    pytest.mark.plugins,
    pytest.mark.slow,  # it is compiled
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture(autouse=True, scope="module")
def compiled():
    library()


def there(function, *args):
    """Return what a function returns in a process that has the device."""
    outcome = run(function, *args)
    assert outcome.code == 0, outcome.output
    return outcome.value


def train(plugins=(), module=None, **options):
    torch.set_num_threads(1)
    trainer = tiny_trainer(plugins, module or Quiet(dropout=0.0), **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", sorted(ACTIVE.keys() - NEEDED.keys()))
def test_a_plugin_with_something_to_do_trains_there_what_it_trains_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_plugin(load(name), checks=["other_device"], **ACTIVE[name])


class Looks(Quiet):
    """Sees where its batches are."""

    def train_step(self, global_step, batch, device):
        self.where = {device, *(tensor.device for tensor in batch)}
        return super().train_step(global_step, batch, device)


def the_loop():
    device, module = other_device(), Looks(dropout=0.0)
    plugins = {name: ACTIVE[name] for name in ("accumulate", "clip", "ema", "metrics", "monitor")}
    trainer = train(plugins, module, device="other:0")
    state = trainer.hook.get_run_state(trainer=trainer)
    kept = {tensor.device for group in state["optimizers"] for tensor in tensors_of(group) if tensor.ndim}
    where = {*module.where, *kept, *(tensor.device for tensor in module.state_dict().values())}
    assert where == {device}, where
    here = train(plugins)
    assert digest(trainer.export_model()) == digest(here.export_model())
    assert trainer.metrics == here.metrics
    assert digest(trainer.predict(collect=True)) == digest(here.predict(collect=True))


def tensors_of(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def test_all_of_the_loop_is_there_with_the_numbers_of_the_cpu():
    there(the_loop)


def left_behind(module):
    other_device()
    try:
        train(module=module(), device="other")
    except RuntimeError as error:
        return str(error), error.__notes__
    return None


@pytest.mark.parametrize("module", [Stays, Makes])
def test_what_is_left_on_the_cpu_is_an_error_that_says_what_to_do(module):
    said, notes = there(left_behind, module)
    assert (
        "Expected all tensors to be on the same device, but found at least two devices, other:0 and cpu! (in at" in said
    )
    assert (
        f"{module.__name__} is on other, and a tensor that meets its weights is not. The loop moves a batch" in notes[0]
    )


def resumed_there():
    other_device()
    memory = Memory(every="3 steps")
    whole = train([memory], Quiet(), device="other")
    torch.other.manual_seed(random.getrandbits(30))
    again = train([Memory(memory.states[3])], Quiet(), device="other")
    return digest(whole.export_model()), digest(again.export_model())


def test_a_run_resumed_there_ends_with_the_same_bits_though_it_draws_on_the_device():
    whole, again = there(resumed_there)
    assert whole == again


def crossing(folder):
    other_device()
    plugins = {"checkpoint": {"every": "3 steps"}, "ema": {"decay": 0.5}}
    found = []
    for begin, end in (("cpu", "other"), ("other", "cpu")):
        options = {"runs_folder": f"{folder}/{begin}"}
        whole = train(plugins, device=begin, **options)
        cut = train(plugins, device=begin, max_steps=9, **options)
        resumed = train(plugins, device=end, resume=str(cut.run_dir), **options)
        found += [digest(trainer.export_model()) for trainer in (whole, resumed)]
    return found


def test_a_checkpoint_goes_from_one_device_to_the_other(tmp_path):
    assert len(set(there(crossing, str(tmp_path)))) == 1


class Precise(Quiet):
    """Sees in which precision it computes."""

    def train_step(self, global_step, batch, device):
        loss, predictions, targets = super().train_step(global_step, batch, device)
        self.saw = str(predictions.dtype), str(loss.dtype)
        return loss, predictions, targets


def mixed(precision):
    other_device()
    module = Precise(dropout=0.0)
    trainer = train({"amp": {"precision": precision}}, module, device="other")
    return module.saw, trainer.metrics["val_loss"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "torch.bfloat16"), ("fp16", "torch.float16")])
def test_amp_computes_there_in_its_precision(precision, dtype):
    saw, loss = there(mixed, precision)
    assert saw == (dtype, "torch.float32")
    assert loss < 9


def refused():
    other_device()
    said = []
    for supported in ({"get_amp_supported_dtype": lambda: [torch.bfloat16]}, {}):
        vars(torch.other).pop("get_amp_supported_dtype")
        vars(torch.other).update(supported)
        with pytest.raises(ValueError, match="^amp.precision='fp16' cannot be had on other: take another pre") as error:
            tiny_trainer({"amp": {"precision": "fp16"}}, device="other")
        said.append(str(error.value))
    return said


def test_amp_refuses_a_precision_that_the_device_does_not_have():
    dtype, autocast = there(refused)
    assert "torch says: In other autocast, but the target dtype is not supported. Disabling autocast. other" in dtype
    assert "torch says: Tried to use AMP with the `other` backend, but the backend has not registered a mod" in autocast
    assert "\n" not in dtype + autocast


def asked_for(name):
    other_device()
    with pytest.raises(ValueError, match=f"^device='{name}' cannot be used: write ") as error:
        tiny_trainer(device=name)
    return str(error.value)


def test_a_second_one_is_an_error():
    assert "mps (there is one device of this type, other:0, and no other:1)" in there(asked_for, "other:1")
