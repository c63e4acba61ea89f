"""Data: the place in the epoch, loaders as a run iterates them, the randomness of loading, batches."""

from hookline.data.batches import count_samples, counted, to_device
from hookline.data.cursor import Cursor, ResumableSampler, mix, sampler_class
from hookline.data.loaders import RunLoader, is_stateful, warn_of_order
from hookline.data.sampling import Epochs, length, shard, sharded, with_sampler

__all__ = [
    "Cursor",
    "Epochs",
    "ResumableSampler",
    "RunLoader",
    "count_samples",
    "counted",
    "is_stateful",
    "length",
    "mix",
    "sampler_class",
    "shard",
    "sharded",
    "to_device",
    "warn_of_order",
    "with_sampler",
]
