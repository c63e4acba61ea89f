"""Draw digits by diffusion, by a loop of one's own.

python -m examples.recipes.diffusion.plain
"""

import torch
from examples.recipes.diffusion.model import Denoiser, draw, load, loss_of, random
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def shuffled(epoch, samples):
    return torch.randperm(samples)


@torch.no_grad()
def validate(net, images):
    net.eval()
    loss = loss_of(net, images, *random(images, torch.Generator().manual_seed(0))).item()
    net.train()
    return loss


def train(net, epochs=30, batch_size=64, learning_rate=2e-3, every=5, order=shuffled):
    """Train the network; return the average of its weights, the loss of each step, and those of the validations."""
    train_set, val_set = load()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(net.parameters(), learning_rate)
    losses, val_losses = [], []
    for epoch in range(epochs):
        for chosen in order(epoch, len(train_set)).split(batch_size):
            images = train_set[chosen]
            loss = loss_of(net, images, *random(images))
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            averaged.update_parameters(net)
            losses.append(loss.item())
        if epoch % every == every - 1:
            val_losses.append((validate(net, val_set), validate(averaged.module, val_set)))
            print(f"epoch {epoch + 1}: val_loss {val_losses[-1][0]:.4f}, of the average {val_losses[-1][1]:.4f}")
            weights = {"net": net.state_dict(), "averaged": averaged.state_dict()}
            torch.save({**weights, "optimizer": optimizer.state_dict(), "epoch": epoch}, "last.pt")
    return averaged.module, losses, val_losses


if __name__ == "__main__":
    torch.manual_seed(0)
    averaged, _, _ = train(Denoiser(32))
    torch.save(draw(averaged, 64), "drawn.pt")
