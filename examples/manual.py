"""Truncated backpropagation through time: several optimizer steps for one batch, the memory carried on.

python -m examples.manual
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from hookline import ModuleInterface, Trainer, hookimpl, set_seed


class Echo(ModuleInterface):
    """Say each bit of a long sequence again, some bits later."""

    def __init__(
        self,
        sequences: int = 256,
        length: int = 200,
        delay: int = 4,
        reach: int = 20,
        width: int = 32,
        learning_rate: float = 5e-3,
    ):
        super().__init__()
        self.reach, self.learning_rate = reach, learning_rate
        bits = torch.randint(0, 2, (sequences, length))
        self.data = torch.stack([bits, bits.roll(delay, dims=1)], dim=2)  # (sequence, time, heard and to be said)
        self.net = nn.GRU(1, width, batch_first=True)
        self.say = nn.Linear(width, 1)

    @hookimpl
    def update(self, trainer, window):
        """Step after each `reach` bits of the window's sequences; gradients reach back no farther, the memory does."""
        memories, losses = [None] * len(window), [[] for _ in window]
        for parts in zip(*(batch.split(self.reach, dim=1) for batch in window), strict=True):
            for index, part in enumerate(parts):
                loss, memory = trainer.hook.forward_backward(
                    trainer=trainer, batch=(part, memories[index]), index=index, size=len(parts)
                )
                losses[index].append(loss.detach())
                memories[index] = memory.detach()
            trainer.step()
        return [(torch.stack(of_batch).mean(),) for of_batch in losses]

    def train_step(self, global_step, batch, device):
        bits, memory = batch
        heard, to_say = bits.float().unbind(dim=2)
        thoughts, memory = self.net(heard.unsqueeze(2), memory)
        return F.binary_cross_entropy_with_logits(self.say(thoughts).squeeze(2), to_say), memory

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), self.learning_rate)], []

    def on_end_train(self, global_step):
        print(f"best loss: {self.trainer.best.train_loss:.3f} (guessing: 0.693)")


if __name__ == "__main__":
    set_seed(0)
    Trainer(Echo(), epochs=10, train_batch_size=32).train()
