"""The loop equals, bit for bit, the one that would be written by hand."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, digest, hand_written_loop, tiny_trainer


class Losses(CallbackInterface):
    def __init__(self):
        self.losses = []

    def on_end_train_step(self, gs, losses):
        self.losses += losses.reshape(-1).tolist()


def windows_of(size):
    @hookimpl
    def get_window_size(self):
        return size

    return type("Windows", (CallbackInterface,), {"get_window_size": get_window_size})()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_parity_with_a_hand_written_loop(window):
    by_hand, losses = TinyModule(), Losses()
    expected = hand_written_loop(by_hand, window=window, batch_size=8)
    trainer = tiny_trainer([losses, windows_of(window)], train_batch_size=8 * window)
    trainer.train()
    assert losses.losses == expected
    assert trainer.module.seen == by_hand.seen
    assert digest(trainer.module.state_dict()) == digest(by_hand.state_dict())


def test_the_seed_decides_everything():
    def weights(seed):
        trainer = tiny_trainer(seed=seed)
        trainer.train()
        return digest(trainer.module.state_dict())

    assert weights(1) == weights(1) != weights(2)


def test_plugins_that_only_listen_change_no_bit():
    class Everything(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, train_step_collated_outputs): ...

        @hookimpl
        def on_end_val_epoch(self, val_step_collated_outputs): ...

        @hookimpl
        def on_log(self, metrics): ...

        @hookimpl
        def on_end_train_epoch(self, train_step_collated_outputs): ...

    plain, heard = tiny_trainer(), tiny_trainer([Everything()], log_every="1 steps")
    plain.train()
    heard.train()
    assert digest(plain.module.state_dict()) == digest(heard.module.state_dict())


def test_evaluations_change_no_bit_of_training():
    often, never = tiny_trainer(evaluate_every="1 steps"), tiny_trainer(evaluate_every=None, eval_when_finish=False)
    often.train()
    never.train()
    assert digest(often.module.state_dict()) == digest(never.module.state_dict())


def test_the_last_short_window_is_divided_by_its_own_size():
    sizes = []

    class Watch(CallbackInterface):
        @hookimpl
        def scale_loss(self, loss, size):
            sizes.append(size)
            return loss / size

    tiny_trainer({"watch": Watch(), "windows": windows_of(3)}, epochs=1, train_batch_size=24).train()
    assert sizes == [3, 3, 3, 3, 3, 3, 1]


def test_an_output_is_copied_once_before_its_memory_is_used_again():
    """A step gives a buffer that each micro-batch overwrites; a listener may spoil what it is given of a step."""
    steps, epochs, copies = [], [], []

    class Reuses(TinyModule):
        def __init__(self):
            super().__init__(samples=32)
            self.register_buffer("now", torch.zeros(1))

        def train_step(self, global_step, batch, device):
            self.now += 1
            return super().train_step(global_step, batch, device)[0], self.now

    class Spoils(CallbackInterface):
        def on_end_train_step(self, gs, loss, now):
            steps.append(now.tolist())
            now.zero_()

        def on_end_train_epoch(self, gs, loss, now):
            epochs.append(now.tolist())

    class Hears(CallbackInterface):
        def on_end_train_step(self, gs, loss, now): ...

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            copies.append(func.name())
            return func(*args, **(kwargs or {}))

    options = {"epochs": 1, "train_batch_size": 16, "evaluate_every": None, "eval_when_finish": False}
    tiny_trainer({"spoils": Spoils(), "windows": windows_of(2)}, Reuses(), **options).train()
    assert steps == [[1.0, 2.0], [3.0, 4.0]]
    assert epochs == [[1.0, 2.0, 3.0, 4.0]]
    trainer = tiny_trainer({"hears": Hears()}, Reuses(), **options)
    with Copies():
        trainer.train()
    assert copies.count("aten::clone") == trainer.global_step


def test_outputs_stay_on_their_device_and_without_a_graph():
    class Watch(CallbackInterface):
        def on_end_train_step(self, gs, loss, predictions):
            assert not loss.requires_grad
            assert not predictions.requires_grad
            assert predictions.device == torch.device("cpu")

    tiny_trainer([Watch()]).train()
