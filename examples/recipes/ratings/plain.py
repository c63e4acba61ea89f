"""Recommend, by a loop of one's own.

python -m examples.recipes.ratings.plain
"""

import copy

import torch
from examples.recipes.ratings.model import Tastes, load
from torch.nn.functional import mse_loss


def shuffled(epoch, samples):
    return torch.randperm(samples)


@torch.no_grad()
def validate(net, val_set):
    users, items, stars = val_set.tensors
    net.eval()
    loss = mse_loss(net(users, items), stars).item()
    net.train()
    return loss


def train(net, epochs=60, batch_size=256, learning_rate=1e-2, patience=3, order=shuffled):
    """Train the network to its best weights; return the loss of each step and of each validation."""
    train_set, val_set = load()
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, weight_decay=0.1)
    losses, val_losses, best, waited = [], [], None, 0
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_set)).split(batch_size):
            users, items, stars = train_set[chosen]
            loss = mse_loss(net(users, items), stars)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        val_losses.append(validate(net, val_set))
        print(f"epoch {epoch + 1}: val_loss {val_losses[-1]:.4f}, rmse {val_losses[-1] ** 0.5:.4f}")
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
        waited += 1
        if val_losses[-1] == min(val_losses):
            best, waited = copy.deepcopy(net.state_dict()), 0
        if waited == patience:
            break
    net.load_state_dict(best)
    return losses, val_losses


if __name__ == "__main__":
    torch.manual_seed(0)
    train(Tastes(8))
