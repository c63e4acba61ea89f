"""Loaders of other libraries: what resumes exactly, what ranks share, and what one warning speaks of."""

import gc
import itertools
import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, default_collate

import hookline
from hookline.testing import Memory, TinyModule, digest, on_ranks, tiny_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # of WebDataset, which leaves them to Python
]
N = 48


def columns():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(N, 8, generator=generator)
    return {"x": inputs.tolist(), "y": inputs.sum(1, keepdim=True).tolist(), "i": list(range(N))}


def data_set(kind="map"):
    """Return a data set of Hugging Face: with samples by index, a stream, or a shuffled stream."""
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_dict(columns()).with_format("torch")
    if kind != "map":
        found = found.to_iterable_dataset(num_shards=4)
    return found.shuffle(seed=3, buffer_size=16) if kind == "shuffled" else found


def shards(folder):
    """Write the samples as four files of WebDataset; return their names."""
    wds = pytest.importorskip("webdataset")
    rows = columns()
    for shard in range(4):
        with wds.TarWriter(f"{folder}/{shard}.tar") as writer:
            for i in rows["i"][shard::4]:
                writer.write({"__key__": f"{i:03}", "x.pyd": rows["x"][i], "y.pyd": rows["y"][i], "i.pyd": i})
    return [f"{folder}/{shard}.tar" for shard in range(4)]


class Reads(TinyModule):
    """Trains on what a function of (trainer, sampler, batch_size) makes."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def get_train_dataloader(self, sampler, batch_size):
        return self.make(self.trainer, sampler, batch_size)

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def train_step(self, global_step, batch, device):
        self.seen.append(batch["i"].tolist())
        return torch.nn.functional.mse_loss(self.net(batch["x"]), batch["y"])


def stateful(dataset, batch_size):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    return loader(dataset, batch_size)


def nodes(trainer, sampler, batch_size):
    """Return nodes of torchdata."""
    found = pytest.importorskip("torchdata.nodes")
    batches = found.Batcher(found.IterableWrapper(data_set()), batch_size, drop_last=False)
    return found.Loader(found.Mapper(batches, default_collate))


def web(trainer, batch_size, urls):
    """Return a pipeline of WebDataset whose shuffling is seeded by the epoch."""
    wds = pytest.importorskip("webdataset")
    names = ("x.pyd", "y.pyd", "i.pyd")
    data = wds.WebDataset(urls, shardshuffle=4, seed=trainer.epoch, nodesplitter=wds.split_by_node)
    data = data.shuffle(16, rng=random.Random(trainer.epoch)).decode().to_tuple(*names)
    return DataLoader(data.map(lambda sample: named(*sample)), batch_size)


def named(x, y, i):
    return {"x": torch.tensor(x), "y": torch.tensor(y), "i": i}


LOADERS = {
    "map": lambda trainer, sampler, size: DataLoader(found := data_set(), size, sampler=sampler(found)),
    "map, stateful": lambda trainer, sampler, size: stateful(data_set(), size),
    "stream": lambda trainer, sampler, size: DataLoader(data_set("stream"), size),
    "stream, stateful": lambda trainer, sampler, size: stateful(data_set("stream"), size),
    "stream of batches": lambda trainer, sampler, size: data_set("stream").batch(size),
    "shuffled stream": lambda trainer, sampler, size: DataLoader(data_set("shuffled"), size),
    "nodes": nodes,
}
IN_ORDER = {"map, stateful", "stream", "stream, stateful", "stream of batches", "nodes"}
SKIPPED = {"stream", "shuffled stream", "webdataset"}


def train(make, *plugins):
    module = Reads(make)
    tiny_trainer(plugins, module).train()
    return module


@pytest.fixture(params=[*LOADERS, "webdataset"])
def named_loader(request, tmp_path):
    if request.param != "webdataset":
        yield request.param, LOADERS[request.param]
        return
    urls = shards(tmp_path)
    yield request.param, lambda trainer, sampler, size: web(trainer, size, urls)
    gc.collect()


def test_a_resume_at_each_step_ends_with_the_same_bits(named_loader, caplog):
    name, make = named_loader
    memory = Memory(every="1 steps")
    whole = train(make, memory)
    assert sorted(itertools.chain(*whole.seen[:6])) == list(range(N))
    assert (whole.seen[:6] == whole.seen[6:]) == (name in IN_ORDER)
    for step in range(1, 12):
        caplog.clear()
        resumed = train(make, Memory(memory.states[step]))
        assert resumed.seen == whole.seen[step:], step
        assert digest(resumed.state_dict()) == digest(whole.state_dict()), step
        if step % 6:
            own_state = not name.startswith("map") and name not in SKIPPED
            assert ("are loaded and dropped" in caplog.text) == (name in SKIPPED)
            assert ("goes on from its own state" in caplog.text) == own_state


def test_a_shuffled_stream_of_hugging_face_that_goes_on_from_its_state_is_told(caplog):
    memory = Memory(every="1 steps")

    def make(trainer, sampler, size):
        return stateful(data_set("shuffled"), size)

    whole = train(make, memory)
    resumed = train(make, Memory(memory.states[3]))
    assert "the buffers of shuffled streams of Hugging Face are not in it" in caplog.text
    assert resumed.seen != whole.seen[3:]  # when this fails, they are, and the warning may go


class Mosaic(Reads):
    """Trains on a loader of MosaicML Streaming."""

    def __init__(self, folder):
        super().__init__(self.get)
        self.folder, self.loader = folder, None

    def get(self, trainer, sampler, batch_size):
        streaming = pytest.importorskip("streaming")
        if self.loader is None:
            data = streaming.StreamingDataset(
                local=self.folder, shuffle=True, batch_size=batch_size, num_canonical_nodes=2
            )
            self.loader = streaming.StreamingDataLoader(data, batch_size=batch_size)
        self.loader.dataset.next_epoch = trainer.epoch
        return hookline.sharded(self.loader)


def mosaic_on_a_rank(folder, state):
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]  # as a launcher says it
    module = Mosaic(folder)
    tiny_trainer({"memory": Memory(state), "ddp": {}}, module).train()
    return module.seen


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.xdist_group("ranks")
def test_mosaicml_streaming_goes_on_from_its_own_state_also_on_another_number_of_ranks(tmp_path):
    streaming, folder, memory = pytest.importorskip("streaming"), str(tmp_path / "mds"), Memory(every="1 steps")
    kinds = {"x": "ndarray:float32:8", "y": "ndarray:float32:1", "i": "int"}
    with streaming.MDSWriter(out=folder, columns=kinds, size_limit=600) as writer:
        for x, y, i in zip(*columns().values(), strict=True):
            writer.write({"x": np.array(x, np.float32), "y": np.array(y, np.float32), "i": i})

    def train(memory):
        streaming.base.util.clean_stale_shared_memory()
        module = Mosaic(folder)
        tiny_trainer([memory], module).train()
        return module

    whole = train(memory)
    assert sorted(itertools.chain(*whole.seen[:6])) == list(range(N))
    assert whole.seen[:6] != whole.seen[6:]
    for step in (1, 6, 8):
        resumed = train(Memory(memory.states[step]))
        assert resumed.seen == whole.seen[step:], step
        assert digest(resumed.state_dict()) == digest(whole.state_dict()), step
    streaming.base.util.clean_stale_shared_memory()
    first, second = on_ranks(mosaic_on_a_rank, 2, folder, memory.states[4])
    steps = [sorted(one + other) for one, other in zip(first, second, strict=True)]
    assert steps == [sorted(step) for step in whole.seen[4:]]


def on_a_rank(urls):
    from datasets.distributed import split_dataset_by_node

    def stream(trainer, sampler, size):
        mine = split_dataset_by_node(data_set("shuffled"), trainer.share, trainer.shares)
        return hookline.sharded(DataLoader(mine, size))

    def pipeline(trainer, sampler, size):
        return hookline.sharded(web(trainer, size, urls))

    seen = []
    for make in (LOADERS["map"], stream, pipeline):
        module = Reads(make)
        tiny_trainer({"distributed": {}, "ddp": {}}, module, epochs=1, train_batch_size=12).train()
        seen.append(list(itertools.chain(*module.seen)))
    with pytest.raises(ValueError, match="ranks would all be given the same batches"):
        tiny_trainer({"distributed": {}, "ddp": {}}, Reads(LOADERS["stream"]), train_batch_size=12).train()
    return seen, os.environ["RANK"]


@pytest.mark.xdist_group("ranks")
def test_ranks_share_data_sets_and_streams(tmp_path):
    pytest.importorskip("datasets")
    (first, _), (second, _) = on_ranks(on_a_rank, 2, shards(tmp_path))
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) == N // 2
        assert sorted(one + other) == list(range(N))


class AllAhead(hookline.CallbackInterface):
    """Loads a whole epoch before its first step."""

    @hookline.hookimpl(wrapper=True)
    def fetch_batches(self):
        fetched = yield
        return iter([*fetched])


def test_what_is_loaded_ahead_is_not_trained_on():
    class Counting:
        """Goes on from its own state."""

        def __init__(self, batches):
            self.batches, self.place = batches, 0

        def __iter__(self):
            while self.place < len(self.batches):
                self.place += 1
                yield self.batches[self.place - 1]
            self.place = 0

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    class Module(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return Counting([*super().get_train_dataloader(SequentialSampler, batch_size)])

        def get_val_dataloaders(self, sampler, batch_size):
            return None

    def seen(*plugins):
        trainer = tiny_trainer(plugins, Module(), epochs=1)
        trainer.train()
        return trainer.module.seen

    memory = Memory(every="1 steps")
    whole = seen(memory, AllAhead())
    assert whole == seen()
    assert memory.states[4]["loader"] == {"place": 4}
    assert seen(Memory(memory.states[4]), AllAhead()) == whole[4:]
