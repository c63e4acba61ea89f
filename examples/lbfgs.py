"""LBFGS, which wants a closure: one step looks at the whole data as often as its line search needs.

python -m examples.lbfgs
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface, Trainer, hookimpl, set_seed


class Curve(ModuleInterface):
    """Fit a curve."""

    def __init__(self, points: int = 200, width: int = 20):
        super().__init__()
        x = torch.linspace(-2, 2, points).unsqueeze(1)
        self.data = TensorDataset(x, torch.sin(3 * x) * torch.exp(-x * x / 2))
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    @hookimpl
    def update(self, trainer, window):
        """Step with a closure; answer the outputs of its first call, of before the step as with any optimizer."""
        first = []

        def closure():
            trainer.zero_grad()
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            first.extend(() if first else outputs)
            return sum(loss for loss, *_ in outputs) / len(outputs)

        trainer.step(closure=closure)
        return first

    def train_step(self, global_step, batch, device):
        x, y = batch
        return (self.net(x) - y).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), max_iter=20, line_search_fn="strong_wolfe")], []


if __name__ == "__main__":
    set_seed(0)
    trainer = Trainer(Curve(), epochs=30, train_batch_size=200)
    trainer.train()
    print(f"mean squared error: {trainer.best.train_loss:.1e}")
