"""Data: the place in the epoch, the run's private loaders, the randomness of loading, batches."""

from hookline.data.asked import Loaders
from hookline.data.batches import count_samples, counted, to_device
from hookline.data.cursor import ResumableSampler, mix, sampler_class
from hookline.data.loaders import RunLoader
from hookline.data.sampling import length, shard, sharded

__all__ = [
    "Loaders",
    "ResumableSampler",
    "RunLoader",
    "count_samples",
    "counted",
    "length",
    "mix",
    "sampler_class",
    "shard",
    "sharded",
    "to_device",
]
