"""A small program in Lightning's words, for tests of its trainer, callbacks, loggers and files."""

import torch
from torch.utils.data import DataLoader, TensorDataset

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


def loader(batch_size=4, shuffle=False):
    """Return four batches."""
    return DataLoader(TensorDataset(INPUTS), batch_size, shuffle=shuffle)


def program(base):
    """Return a module class on a base of Lightning's, or of ours."""

    class Program(base):
        def __init__(self, lr=0.1, width=1):
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, width)

        def loss(self, batch):
            return self.net(batch[0]).square().mean()

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    return Program


def by_hand(epochs=2, lr=0.1):
    """Return the weights and the validation losses of each epoch, by a plain loop."""
    torch.manual_seed(0)
    net, losses, weights = torch.nn.Linear(4, 1), [], []
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(epochs):
        for (batch,) in loader():
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(torch.stack([net(batch).square().mean() for (batch,) in loader()]).mean().item())
        weights.append(net.weight.detach().clone())
    return weights, losses
