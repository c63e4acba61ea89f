"""Predict words, by a loop of one's own.

python -m examples.recipes.words.plain
"""

import math

import torch
from examples.recipes.words.model import Reader, load
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR


def read(net, batch, state):
    logits, after = net(batch[:, :-1], state)
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), tuple(part.detach() for part in after)


def at_rest(rows, width):
    return torch.zeros(1, rows, width), torch.zeros(1, rows, width)


@torch.no_grad()
def validate(net, val_set, rows, width):
    net.eval()
    state, losses = at_rest(rows, width), []
    for batch in val_set:
        loss, state = read(net, batch, state)
        losses.append(loss.item())
    net.train()
    return sum(losses) / len(losses)


def train(net, words=2000, width=64, rows=20, reach=20, epochs=6, steps=None, learning_rate=5e-3):
    """Train the network; return the loss of each step and of each validation."""
    train_set, val_set = load(words, rows, reach)
    train_set = train_set[:steps]
    optimizer = torch.optim.Adam(net.parameters(), learning_rate)
    schedule = CosineAnnealingLR(optimizer, len(train_set) * epochs)
    losses, val_losses = [], []
    for epoch in range(epochs):
        state = at_rest(rows, width)
        for batch in train_set:
            loss, state = read(net, batch, state)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        val_losses.append(validate(net, val_set, rows, width))
        print(f"epoch {epoch + 1}: val_loss {val_losses[-1]:.4f}, perplexity {math.exp(val_losses[-1]):.1f}")
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
    return losses, val_losses


if __name__ == "__main__":
    torch.manual_seed(0)
    train(Reader(2000, 64))
