"""Draw digits, by a loop of one's own.

python -m examples.recipes.gan.plain
"""

import torch
from examples.recipes.gan.model import discriminator, generator, load
from torch.nn.functional import softplus


def shuffled(epoch, samples):
    return torch.randperm(samples)


def train(generator, discriminator, epochs=20, batch_size=64, noise=16, learning_rate=1e-3, order=shuffled):
    """Train both networks; return the losses of each step, of the discriminator and of the generator."""
    data = load()
    of_discriminator = torch.optim.Adam(discriminator.parameters(), learning_rate, betas=(0.5, 0.99))
    of_generator = torch.optim.Adam(generator.parameters(), learning_rate, betas=(0.5, 0.99))
    losses = []
    for epoch in range(epochs):
        for chosen in order(epoch, len(data)).split(batch_size):
            reals = data[chosen]
            fakes = generator(torch.randn(len(reals), noise, 1, 1))
            first = softplus(-discriminator(reals)).mean() + softplus(discriminator(fakes.detach())).mean()
            of_discriminator.zero_grad()
            first.backward()
            of_discriminator.step()
            fakes = generator(torch.randn(len(reals), noise, 1, 1))
            second = softplus(-discriminator(fakes)).mean()
            of_generator.zero_grad()
            second.backward()
            of_generator.step()
            losses.append((first.item(), second.item()))
        print(f"epoch {epoch + 1}: discriminator {losses[-1][0]:.4f}, generator {losses[-1][1]:.4f}")
        if epoch % 5 == 4:
            with torch.no_grad():
                generator.eval()
                torch.save(generator(torch.randn(16, noise, 1, 1)), f"samples-{epoch + 1}.pt")
                generator.train()
        networks = {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}
        optimizers = {"of_generator": of_generator.state_dict(), "of_discriminator": of_discriminator.state_dict()}
        torch.save({**networks, **optimizers, "epoch": epoch}, "last.pt")
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    train(generator(16, 32), discriminator(32))
