"""A transformer that writes the documentation of Python, by a loop of one's own.

python -m examples.recipes.characters.plain
"""

import torch
from examples.chars import ALPHABET, TEXT, Block, encode
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR


def shuffled(epoch, samples):
    return torch.randperm(samples)


class Writer(nn.Module):
    """Predict the next character of a text."""

    def __init__(self, context, width, heads, blocks):
        super().__init__()
        self.embed, self.place = nn.Embedding(len(ALPHABET), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))
        self.read = nn.Linear(width, len(ALPHABET))

    def forward(self, codes):
        return self.read(self.blocks(self.embed(codes) + self.place.weight[: codes.shape[1]]))


def loss_of(net, batch):
    return cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validate(net, val_set, batch_size, batches):
    """Return the mean loss over samples."""
    net.eval()
    total = samples = 0
    for batch in val_set.split(batch_size)[:batches]:
        total += loss_of(net, batch).item() * len(batch)
        samples += len(batch)
    net.train()
    return total / samples


def train(net, context=64, epochs=5, steps=200, batch_size=32, val_batches=None, learning_rate=2e-3, order=shuffled):
    """Train the network for so many steps an epoch; return the loss of each step and of each validation."""
    text, held_out = encode(TEXT).tensor_split([len(TEXT) * 9 // 10])
    train_set, val_set = text.unfold(0, context + 1, 1), held_out.unfold(0, context + 1, context)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate)
    schedule = CosineAnnealingLR(optimizer, steps * epochs)
    losses, val_losses = [], []
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_set)).split(batch_size)[:steps]:
            loss = loss_of(net, train_set[chosen])
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        val_losses.append(validate(net, val_set, 64, val_batches))
        print(f"epoch {epoch + 1}: val_loss {val_losses[-1]:.4f}")
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
    return losses, val_losses


if __name__ == "__main__":
    torch.manual_seed(0)
    train(Writer(64, 128, 4, 3))
