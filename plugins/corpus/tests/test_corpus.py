"""Each token once an epoch, in one order: of cut and fitted documents, mixed sources, ranks, workers and libraries.

In these corpora every token is another number and a document counts on from its first, so that each token tells where
it is from and which one is next.
"""

import collections
import gzip
import itertools
import json
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader

import hookline_corpus
from hookline import ModuleInterface
from hookline.testing import Memory, check_plugin, on_ranks, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_hook, kill
from hookline_corpus import Corpus, Files, HuggingFace, Mosaic, Tokens, WebShards, same_document
from hookline_corpus.packing import best_fit

PRELOADED += ["hookline_corpus", "hookline_ddp", "hookline_distributed"]
TOKENS = 100_000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where files may be made."""
    monkeypatch.chdir(tmp_path)


def numbers(text):
    """Return the numbers in a text, as a tokenizer does."""
    return [int(word) for word in text.split()]


def documents(tokens, seed=0, first=0):
    """Return documents of a heavy tail, some of them empty, with so many tokens together."""
    draw, made, last = random.Random(seed), [], first + tokens
    while first < last:
        size = min(int(draw.paretovariate(1.1) * 12) - 12, last - first)
        made.append(list(range(first, first + size)))
        first += size
    return made


def write(name, tokens=TOKENS, shards=5, first=0):
    """Write documents as so many files of lines of JSON; return a pattern of them."""
    made = documents(tokens, first=first)
    Path("data").mkdir(exist_ok=True)
    for shard in range(shards):
        rows = [json.dumps({"text": " ".join(map(str, one))}) for one in made[shard::shards]]
        Path(f"data/{name}-{shard}.jsonl").write_text("\n".join(rows) + "\n")
    return f"data/{name}-*.jsonl"


def three(tokens=TOKENS):
    """Write three sources, one of ten times the others."""
    parts = {"web": (0, tokens * 10 // 12, 7), "books": (tokens * 10 // 12, tokens // 12, 3)}
    rest = sum(part[1] for part in parts.values())
    parts["code"] = rest, tokens - rest, 1
    return {name: write(name, size, shards, first) for name, (first, size, shards) in parts.items()}


def rows_of(data):
    """Return the sequences of an epoch as lists of their tokens."""
    return [row[row >= 0].tolist() for row in (real(data[place]) for place in range(len(data)))]


def real(sample):
    """Return the tokens of a sequence or a batch, -1 where there is none."""
    return torch.where(sample["documents"] > 0, sample["tokens"], -1)


def flat(rows):
    return sorted(itertools.chain.from_iterable(rows))


# Sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["cut", "fit"])
def test_every_token_comes_once_and_is_a_target_once(packing):
    data = Tokens(three(), 128, numbers, packing=packing)
    orders = []
    for epoch in range(2):
        data.set_epoch(epoch)
        samples = [data[place] for place in range(len(data))]
        tokens = torch.cat([sample["tokens"][sample["documents"] > 0] for sample in samples])
        assert tokens.sort().values.tolist() == list(range(TOKENS))
        targets = torch.cat([sample["targets"] for sample in samples])
        inputs = torch.cat([sample["tokens"] for sample in samples])
        assert (targets == inputs + 1)[targets >= 0].all()
        told = targets[targets >= 0].sort().values
        assert len(told.unique()) == len(told) == TOKENS - documents_in("data")
        for sample in samples:
            known, place = sample["documents"], sample["positions"]
            same = known[1:] == known[:-1]
            assert (sample["tokens"].diff() == 1)[same & (known[1:] > 0)].all()
            assert (place.diff() == 1)[same & (known[1:] > 0)].all()
            assert place[0] == 0
            assert (place[1:][~same] == 0).all()
        orders.append(tokens.tolist())
    assert orders[0] != orders[1]
    full = -(-TOKENS // 128)
    assert full <= len(data) <= (full + 2 if packing == "cut" else full * 1.1)


def documents_in(folder):
    """Return how many documents of a corpus have a token."""
    files = Path(folder).glob("*.jsonl")
    return sum(bool(json.loads(line)["text"]) for file in files for line in file.read_text().splitlines())


def test_no_token_sees_another_document():
    data = Tokens(write("web", 2_000, 1), 96, numbers, packing="fit")
    sample = next(sample for sample in map(data.__getitem__, range(len(data))) if sample["documents"].max() > 3)
    query, key, value = torch.randn(3, 1, 2, 96, 8, generator=torch.Generator().manual_seed(0))
    together = scaled_dot_product_attention(query, key, value, attn_mask=same_document(sample["documents"][None]))
    assert together.isfinite().all()
    for document in range(1, int(sample["documents"].max()) + 1):
        mine = sample["documents"] == document
        parts = (part[:, :, mine] for part in (query, key, value))
        torch.testing.assert_close(together[:, :, mine], scaled_dot_product_attention(*parts, is_causal=True))


def test_documents_are_fitted_where_least_room_is_left():
    assert best_fit(np.array([7, 25, 3, 5, 2]), 10) == [
        [(1, 0, 10)],
        [(1, 10, 20)],
        [(0, 0, 7), (2, 0, 3)],
        [(1, 20, 25), (3, 0, 5)],
        [(4, 0, 2)],
    ]


def test_an_end_follows_each_text_and_evaluations_are_in_order():
    Path("a.txt").write_text("abcd")
    with gzip.open("b.txt.gz", "wb") as file:
        file.write("é".encode())
    np.save("c.npy", np.array([7, 256, 8, 9, 256], np.uint16))
    data = Tokens({"text": ["a.txt", "b.txt.gz"], "ids": Files("c.npy", end=256)}, 4, end=256, shuffle=False)
    assert [real(data[place]).tolist() for place in range(len(data))] == [
        [*b"abcd"],
        [256, *"é".encode(), 256],
        [7, 256, 8, 9],
        [256, -1, -1, -1],
    ]
    assert [data[place]["documents"].tolist() for place in (1, 2)] == [[1, 2, 2, 2], [1, 1, 2, 2]]
    assert [data[place]["targets"].tolist() for place in (0, 1)] == [
        [*b"bcd", 256],
        [-100, *"é".encode()[1:], 256, -100],
    ]


class Words:
    """A tokenizer as those of transformers are."""

    name_or_path = "words"

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + numbers(text)


def test_a_tokenizer_adds_no_special_tokens():
    data = Tokens(write("web", 500, 1, first=1), 50, Words())
    assert flat(rows_of(data)) == list(range(1, 501))


# Mixing -------------------------------------------------------------------------------


def test_sources_are_mixed_by_weight_and_repeated_ones_come_equally_often():
    weights = {"web": 0.5, "books": 0.3, "code": 0.2}
    data = Tokens(three(), 16, numbers, weights)
    order = data.order()
    sources = [order.locate(place).source for place in range(len(order))]
    assert sources[:50] == [int(data[place]["source"]) for place in range(50)]
    lanes = [sources[lane :: data.lanes] for lane in range(data.lanes)]
    for begin in range(0, len(lanes[0]) - 1000, 1000):
        counts = collections.Counter(lanes[0][begin : begin + 1000])
        assert [counts[source] / 1000 for source in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    counts = collections.Counter(sources)
    assert [counts[source] / len(data) for source in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=1e-4)
    often = collections.Counter(flat(rows_of(Tokens(three(), 128, numbers, weights))))
    assert {often[token] for token in range(TOKENS * 10 // 12)} == {1}
    assert len({often[token] for token in range(TOKENS * 10 // 12, TOKENS * 11 // 12)}) <= 2


def test_an_epoch_goes_on_where_the_one_before_left_a_source():
    data = Tokens(three(), 128, numbers, {"web": 1, "books": 1, "code": 1}, until="shortest")
    seen = []
    for epoch in range(9):  # each is through the books, and through a tenth of the web
        data.set_epoch(epoch)
        seen += rows_of(data)
    often = collections.Counter(itertools.chain.from_iterable(seen))
    web = [often[token] for token in range(TOKENS * 10 // 12)]
    assert max(web) == 1
    assert sum(web) / len(web) == pytest.approx(0.9, abs=0.02)
    assert {often[token] for token in range(TOKENS * 10 // 12, TOKENS * 11 // 12)} == {9}


def test_the_order_is_that_of_the_seed():
    found = [rows_of(Tokens(three(20_000), 64, numbers, seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert flat(found[0]) == flat(found[2])
    begun = Tokens(three(20_000), 64, numbers)
    assert real(begun[0]).tolist() == found[0][0]
    begun.use_seed(1)
    assert rows_of(begun) == found[2]


# Ranks and resuming -------------------------------------------------------------------


class Model(ModuleInterface):
    """Guesses the next token of its kind; notes which sequences each step has."""

    def __init__(self, data, workers=0, notes=None):
        super().__init__()
        self.data, self.workers, self.notes = data, workers, notes
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
        self.seen = {}

    def train_step(self, global_step, batch, device):
        if not self.trainer.idle:  # else it only keeps ranks in step
            self.seen.setdefault(global_step, []).extend(real(batch).tolist())
            if self.notes is not None:
                np.save(self.notes / f"{global_step}-{self.trainer.rank}.npy", real(batch).numpy())
        known = batch["targets"] >= 0
        return cross_entropy(self.net(batch["tokens"] % 32)[known], batch["targets"][known] % 32)

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        workers = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(self.data, batch_size, sampler=sampler(self.data), **workers)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), lr=0.01)], []


def train(sources, memory=None, workers=0, plugins=None, length=500, packing="cut", **options):
    """Train on a corpus; return what each step had, the weights, and the states by step."""
    memory = memory or Memory()
    module = Model(Tokens(sources, length, numbers, packing=packing, lanes=12), workers)
    options = {"epochs": 2, "train_batch_size": 12, "evaluate_every": None} | options
    tiny_trainer({"corpus": Corpus(), **(plugins or {}), "memory": memory}, module, **options).train()
    return module.seen, {name: weight.clone() for name, weight in module.state_dict().items()}, memory.states


def dealt(ranks):
    """Return what each step had over all ranks, in the order of one process."""
    seen = [rank[0] for rank in ranks]
    rows = {step: itertools.zip_longest(*(one.get(step, ()) for one in seen)) for step in seen[0]}
    return {step: [row for rank in dealt for row in rank if row is not None] for step, dealt in rows.items()}


def on_a_rank(sources, state, workers, options):
    torch.set_num_threads(1)
    return train(sources, Memory(state), workers, {"distributed": {"uneven": "pad"}, "ddp": {}}, **options)


def assert_alike(weights, others):
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=3e-6, rtol=0)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("packing", ["cut", pytest.param("fit", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_any_number_of_ranks_with_the_same_sequences(packing):
    sources = three()
    alone, weights, _ = train(sources, packing=packing)
    length = len(alone) // 2
    rows = [row for step in range(1, length + 1) for row in alone[step]]
    assert sorted(token for row in rows for token in row if token >= 0) == list(range(TOKENS))

    seen, _, states = train(sources, workers=2, max_steps=5, packing=packing)
    for number, until, workers in ((2, 10, 0), (4, length + 3, 0), (3, 2 * length, 1)):
        state = states[max(states)]
        limits = {"max_steps": until, "packing": packing}
        ranks = on_ranks(on_a_rank, number, sources, state, workers, limits)
        seen |= dealt(ranks)
        states = ranks[0][2]
        assert all(rank[2].keys() == states.keys() for rank in ranks)
    assert seen == alone
    assert_alike(weights, ranks[0][1])


def test_a_resume_at_each_step_ends_with_the_same_bits():
    sources = {"web": write("web", 20_000, 3)}
    memory = Memory(every="1 steps")
    whole, weights, _ = train(sources, memory)
    data = Tokens(sources, 500, numbers, lanes=12)
    assert whole[1] == [real(data[place]).tolist() for place in range(12)]
    for step in range(1, len(whole)):
        seen, resumed, _ = train(sources, Memory(memory.states[step]))
        assert seen == {later: rows for later, rows in whole.items() if later > step}
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_workers_that_stay_alive_go_on_with_the_order_of_each_epoch():
    sources = {"web": write("web", 20_000, 3)}
    alone, *_ = train(sources)
    assert train(sources, workers=2, keep_loaders=True)[0] == alone
    assert alone[1] != alone[len(alone) // 2 + 1]


def test_an_order_of_somebody_else_is_told_and_exact(caplog):
    class Shuffles(Model):
        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(self.data, batch_size, shuffle=True)

    module = Shuffles(Tokens(write("web", 20_000, 3), 500, numbers))
    tiny_trainer([Corpus()], module, epochs=1).train()
    assert "the loader shuffles sequences that come shuffled already" in caplog.text
    assert sorted(token for rows in module.seen.values() for row in rows for token in row) == list(range(20_000))


def test_a_mean_over_ranks_is_one_over_all_tokens():
    assert Corpus("batches").get_weight is None
    sample = {"targets": torch.tensor([[3, -100], [4, 0]])}
    assert Corpus().get_weight(trainer=None, batch=sample, stage=None) == 3
    with pytest.raises(ValueError, match=r"corpus.mean='token' must be one of tokens, batches, did you mean 'tokens'"):
        Corpus("token")


# Libraries ----------------------------------------------------------------------------


def texts(tokens=5_000):
    return [" ".join(map(str, one)) for one in documents(tokens)]


def web(shards=4):
    wds = pytest.importorskip("webdataset")
    for shard in range(shards):
        with wds.TarWriter(f"{shard}.tar") as writer:
            for number, text in enumerate(texts()[shard::shards]):
                writer.write({"__key__": f"{number:04}", "txt": text})
    return WebShards("{0..3}.tar")


def hugging_face(shards=4):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"text": texts()}).to_iterable_dataset(num_shards=shards)


def mosaic():
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(out="mds", columns={"text": "str"}, size_limit=8_000) as writer:
        for text in texts():
            writer.write({"text": text})
    streaming.base.util.clean_stale_shared_memory()
    return streaming.StreamingDataset(local="mds", shuffle=False, batch_size=1)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of WebDataset, which leaves them to Python
@pytest.mark.parametrize("make", [web, hugging_face, mosaic])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_libraries_are_read_once_also_in_workers(make, workers):
    given = make()
    data = Tokens(given, 100, numbers, lanes=4)
    source = data.sources["documents"].shards
    assert type(source) is {web: WebShards, hugging_face: HuggingFace, mosaic: Mosaic}[make]
    assert len(source.names) > 2
    seen = []
    for batch in DataLoader(data, 4, num_workers=workers):
        seen += [token for token in real(batch).flatten().tolist() if token >= 0]
    assert sorted(seen) == list(range(5_000))


# Reading ------------------------------------------------------------------------------


class Counting:
    """Shards of 100 tokens, which note who reads them; the last may be held back."""

    def __init__(self, shards=12):
        self.names = [str(number) for number in range(shards)]
        self.reads, self.gate = collections.Counter(), threading.Event()
        self.held_back, self.begun = None, threading.Event()

    def stamp(self, number):
        return None

    def read(self, number):
        if number == self.held_back and threading.current_thread() is not threading.main_thread():
            self.begun.set()
            assert self.gate.wait(30)
        self.reads[number] += 1
        yield np.arange(number * 100, number * 100 + 100)


def test_each_reader_reads_shards_of_its_own_when_lanes_are_enough():
    shards = Counting()
    data = Tokens(shards, 10, lanes=6, seed=0)
    assert len(data) == 120
    shards.reads.clear()
    for reader in range(3):  # as three ranks with batches of two
        data._ahead = type(data._ahead)()
        for step in range(20):
            for place in (reader, reader + 3):
                data[step * 6 + place]
    assert {*shards.reads.values()} == {1}  # a lane has two shards
    assert max(len(held) for held in data._ahead._held.values()) <= 2


def test_the_next_shard_is_read_in_the_background_and_its_error_comes_where_it_is_wanted():
    shards = Counting(3)
    data = Tokens(shards, 50, lanes=1, shuffle=False)
    len(data)
    shards.held_back = 1
    first = [data[0], data[1]]  # does not wait for what comes
    assert shards.begun.wait(30)
    assert shards.reads[1] == 1
    shards.gate.set()
    assert flat(real(one).tolist() for one in (*first, data[2])) == list(range(150))

    def broken(number):
        raise OSError(5, "Input/output error")
        yield

    shards.read, data._ahead = broken, type(data._ahead)()
    with pytest.raises(OSError, match=r"the shard '1' of the source 'documents' cannot be read: .*Input/output error"):
        data[3]
    del shards.read
    assert flat([real(data[3]).tolist(), real(data[4]).tolist()]) == list(range(150, 250))


# The index ----------------------------------------------------------------------------


def test_a_shard_is_counted_once_and_again_when_it_has_changed(monkeypatch):
    pattern, read = write("web", 3_000, 3), []
    reading = Files.read
    monkeypatch.setattr(Files, "read", lambda self, number: (read.append(number), reading(self, number))[1])
    assert len(Tokens(pattern, 100, numbers)) == 30
    assert len(Tokens(pattern, 50, numbers)) == 60
    assert read == [0, 1, 2]
    assert len(Tokens(pattern, 100, Words())) == 30
    assert read == [0, 1, 2] * 2
    with open("data/web-1.jsonl", "a") as file:
        file.write(json.dumps({"text": " ".join(["1"] * 100)}) + "\n")
    assert len(Tokens(pattern, 100, numbers)) == 31
    assert read == [*[0, 1, 2] * 2, 1]


def test_a_shard_that_changes_during_a_run_is_refused():
    data = Tokens(write("web", 3_000, 3), 100, numbers, shuffle=False)
    assert len(data) == 30
    Path("data/web-0.jsonl").write_text(json.dumps({"text": "1 2 3"}))
    with pytest.raises(ValueError, match=r"the shard 'data/web-0.jsonl' .* another content than when it was indexed"):
        data[0]


def test_another_corpus_is_refused_within_an_epoch_and_told_between_epochs(caplog):
    sources = {"web": write("web", 20_000, 3)}
    memory = Memory(every="1 steps")
    steps = len(train(sources, memory)[0]) // 2
    (middle, end), moved = (memory.states[step] for step in (2, steps)), {"web": "moved/*.jsonl"}
    with pytest.raises(ValueError, match="length was 500 and is 250 since the checkpoint, in the middle of an epoch"):
        train(sources, Memory(middle), length=250)
    Path("data").rename("moved")
    assert len(train(moved, Memory(middle))[0]) == 2 * steps - 2  # nothing but the folder is another one
    with open("moved/web-2.jsonl", "a") as file:
        file.write(json.dumps({"text": "1 2 3"}) + "\n")
    told = "1 shards of the source 'web' have changed, the first is moved/web-2.jsonl"
    with pytest.raises(ValueError, match=told):
        train(moved, Memory(middle))
    assert train(moved, Memory(end))[0]
    assert told in caplog.text


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sources": "none/*.txt"}, r"no file is named 'none/\*.txt', seen from"),
        ({"sources": {}}, "sources is empty"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"lanes": 0}, "lanes=0 must be at least 1"),
        ({"packing": "fits"}, "packing='fits' must be one of cut, fit, did you mean 'fit'"),
        ({"until": "end"}, "until='end' must be one of longest, shortest"),
        ({"weights": {"web": -1}}, "weights.web=-1 must be above 0"),
        ({"weights": {"web": float("nan")}}, "weights.web=nan must be above 0"),
        ({"weights": {"wob": 1}}, r"weights has \['wob'\], and sources has \['web'\]"),
        ({"tokenizer": "no.such"}, "tokenizer='no.such' must be bytes, or the dotted path of a function"),
    ],
)
def test_arguments_that_cannot_be(arguments, said):
    write("web", 100, 1)
    with pytest.raises(ValueError, match=said):
        Tokens(**{"sources": {"web": "data/web-*.jsonl"}, "length": 10} | arguments)


def test_what_a_corpus_lacks_is_named(tmp_path):
    write("web", 100, 1)
    with pytest.raises(ValueError, match=r"web-0.jsonl' of the source 'web': .* no field 'txt'; it has text, did you"):
        len(Tokens({"web": Files("data/*.jsonl", text="txt")}, 10, numbers))
    Path("cut.jsonl").write_text('{"text": "1 2"}\n{"text": "3')
    with pytest.raises(ValueError, match=r"the shard 'cut.jsonl' of the source 'cut': line 2: Unterminated string"):
        len(Tokens({"cut": "cut.jsonl"}, 10, numbers))
    with pytest.raises(ValueError, match=r"document \d+ has the token id 99, and ids go from 0 to 49"):
        len(Tokens({"web": "data/*.jsonl"}, 10, numbers, vocabulary=50))
    Path("empty.txt").touch()
    with pytest.raises(ValueError, match="the source 'none' is empty: no document of its shards has a token"):
        len(Tokens({"web": "data/*.jsonl", "none": "empty.txt"}, 10, numbers))
    Path("one.txt").write_text("1")
    with pytest.raises(ValueError, match=r"nothing of 'web' .* would be in an epoch with until=shortest"):
        len(Tokens({"web": "data/*.jsonl", "one": "one.txt"}, 1, numbers, {"web": 1e-9, "one": 1}, "shortest"))
    with pytest.raises(IndexError, match="there is no sequence 10; an epoch has 10"):
        Tokens("data/*.jsonl", 10, numbers)[10]
    with pytest.raises(ValueError, match="a dict is no stream with shards"):
        Tokens({"web": {"a": 1}}, 10)


def test_more_workers_than_shards_read_each_token_once():
    data = Tokens(write("web", 1_000, 1), 10, numbers)
    seen = [token for batch in DataLoader(data, 2, num_workers=2) for token in real(batch).flatten().tolist()]
    assert sorted(seen) == list(range(1_000))


def test_the_plugin_keeps_the_contract():
    check_plugin(Corpus, readme=(Path(hookline_corpus.__file__).parents[2] / "README.md").read_text())


# The proof ----------------------------------------------------------------------------


def large(sources, notes, killed_at, workers):
    """Train on this rank until it is killed, or to the end; note on the disk what each step has."""
    torch.set_num_threads(1)
    data = Tokens(sources, 2048, numbers, vocabulary=10**7, lanes=48)
    fault = {"fault": at_hook("on_boundary", kill, killed_at)} if killed_at else {}
    plugins = {
        "distributed": {"uneven": "pad"}, "ddp": {}, "corpus": {}, "checkpoint": {"every": "7 steps"}, **fault
    }  # fmt: skip
    options = {"epochs": 1, "train_batch_size": 48, "resume": True, "evaluate_every": None}
    trainer = tiny_trainer(plugins, Model(data, workers, notes), **options)
    trainer.train()
    return trainer.global_step


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("ranks")
def test_ten_million_tokens_come_once_over_kills_on_other_numbers_of_ranks(tmp_path):
    sources, noted = three(10**7), {}
    sessions = [(1, 20, 2), (2, 25, 1), (4, 30, 0), (3, 0, 1)]  # ranks, killed at the boundary, workers
    for number, killed_at, workers in sessions:
        notes = tmp_path / f"notes-{number}"
        notes.mkdir()
        outcomes = run_ranks(large, number, sources, notes, killed_at, workers, timeout=600)
        codes = {outcome.code for outcome in outcomes}
        assert codes == ({-signal.SIGKILL} if killed_at else {0}), outcomes[0].output
        for path in sorted(notes.iterdir(), key=lambda path: int(path.stem.partition("-")[2])):
            step, rank = map(int, path.stem.split("-"))
            noted[step] = ([] if rank == 0 else noted[step]) + [np.load(path)]  # what a later session did again counts
    steps = outcomes[0].value
    assert noted.keys() == set(range(1, steps + 1))
    data = Tokens(sources, 2048, numbers, vocabulary=10**7, lanes=48)
    assert steps == -(-len(data) // 48)
    tokens = np.concatenate([rows.ravel() for step in noted.values() for rows in step])
    tokens = np.sort(tokens[tokens >= 0])
    assert np.array_equal(tokens, np.arange(10**7))
    for step in (1, 30, 60, steps):
        drawn = {tuple(row.tolist()) for rows in noted[step] for row in rows}
        assert drawn == {
            tuple(real(data[place]).tolist()) for place in range((step - 1) * 48, min(step * 48, len(data)))
        }
