"""Replicas that are lost and come back: real processes, a real lighthouse, real kills."""

import contextlib
import importlib.util
import os
import signal
import time

import pytest
import torch

from hookline import hookimpl
from hookline.interfaces import CallbackInterface
from hookline.testing import TinyModule, check_plugin, digest, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, Child, at_hook, kill
from hookline_ft import LIGHTHOUSE, REPLICA, REPLICAS, Ft

PRELOADED += [__name__]
HERE = importlib.util.find_spec("torchft") is not None
real = [
    pytest.mark.skipif(not HERE, reason="torchft is not installed here: see nox -s ft"),
    pytest.mark.xdist_group("ranks"),
]


def said(replica, replicas, lighthouse):
    return {REPLICA: str(replica), REPLICAS: str(replicas), LIGHTHOUSE: lighthouse}


# Alone --------------------------------------------------------------------------------


def test_contract():
    check_plugin(Ft)


def test_alone_it_changes_nothing_and_says_so(caplog):
    plain, trainer = tiny_trainer(), tiny_trainer([Ft()])
    plain.train()
    trainer.train()
    assert digest(trainer.hook.get_run_state(trainer=trainer)["module"]) == digest(plain.module.get_state())
    assert "neither REPLICA_GROUP_ID nor NUM_REPLICA_GROUPS is set, so there is no other replica" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout": "10 steps"}, "ft.timeout='10 steps' is not a duration"),
        ({"quorum_timeout": "soon"}, "ft.quorum_timeout='soon' is not a cadence"),
        ({"max_skips": -1}, "ft.max_skips=-1 must be at least 0"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        Ft(**options)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({REPLICA: "0"}, "ft: NUM_REPLICA_GROUPS, TORCHFT_LIGHTHOUSE is not in the environment"),
        (said(0, 2, ""), "ft: TORCHFT_LIGHTHOUSE is not in the environment: each replica wants"),
        (said("one", 2, "http://x:1"), "REPLICA_GROUP_ID=one and NUM_REPLICA_GROUPS=2 must be whole numbers"),
        (said(2, 2, "http://x:1"), "the first the smaller"),
    ],
)
def test_wrong_environment(environment, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        tiny_trainer([Ft()])


class TwoRanks(CallbackInterface):
    @hookimpl
    def get_ranks(self):
        return 0, 0, 2


def test_a_replica_is_one_process(monkeypatch):
    for name, value in said(0, 2, "http://x:1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ft: this is one of 2 ranks, and a replica is one process here"):
        tiny_trainer([TwoRanks(), Ft()])


@pytest.mark.skipif(HERE, reason="torchft is installed here")
def test_without_torchft_it_says_what_to_install(monkeypatch):
    for name, value in said(0, 1, "http://x:1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError,
        match=r"ft needs torchft, which cannot be imported \(No module named 'torchft'\): `pip install torchft-ni",
    ):
        tiny_trainer([Ft()]).train()


def test_replicas_share_the_training_data_equally_and_evaluate_on_all(monkeypatch):
    seen = []
    for replica in (0, 1):
        for name, value in said(replica, 2, "http://x:1").items():
            monkeypatch.setenv(name, value)
        trainer = tiny_trainer([Ft()], TinyModule(samples=21))
        loaders = [
            trainer.loaders.get(stage)["default"] for stage in (type(trainer.stage).TRAIN, type(trainer.stage).VAL)
        ]
        seen.append([[ids for _, _, ids in loader] for loader in loaders])
        assert trainer.micro_batch_size == 4
        assert [len(loader) for loader in loaders] == [3, 3]
        trainer.position = 2
        rest = [ids.tolist() for _, _, ids in trainer.loaders.get(trainer.stage)["default"]]
        assert rest == [ids.tolist() for ids in seen[-1][0][2:]]
    trained = [torch.cat(train).tolist() for train, _ in seen]
    assert [len(ids) for ids in trained] == [10, 10]
    assert len({*trained[0], *trained[1]}) == 20
    assert [torch.cat(val).tolist() for _, val in seen] == [list(range(21))] * 2


# Several ------------------------------------------------------------------------------


class Diary(CallbackInterface):
    """Writes how many steps are done and by how many replicas; ends at the step that the file `end` says."""

    def __init__(self, folder, replica, ft):
        self.file, self.end, self.ft = folder / f"diary-{replica}", folder / "end", ft
        self.lines = []

    @hookimpl
    def on_end_train_step(self, trainer, global_step, stepped):
        with self.file.open("a") as file:
            file.write(f"{global_step} {self.ft._present} {stepped}\n")
        if self.end.exists() and global_step == int(self.end.read_text()):
            trainer.stop("the end")


def replica_of(environment, folder, plugins=(), options=None, **ft):
    """Be a replica; return the digest of its weights, its steps, and how many of them were refused."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    plugin = Ft(**{"timeout": "10 s", "quorum_timeout": "20 s", **ft})
    diary = Diary(folder, environment[REPLICA], plugin)
    given = {"epochs": 10**6, "evaluate_every": None, "eval_when_finish": False, **(options or {})}
    module = TinyModule(samples=48, dropout=given.pop("dropout", 0.2))
    trainer = tiny_trainer([*plugins, plugin, diary], module, runs_folder=str(folder), **given)
    trainer.train()
    weights = {name: weight.detach() for name, weight in trainer.module.named_parameters()}
    return digest(weights), trainer.global_step, trainer.counters.skipped_steps, plugin.get_state()


def replica_that_is_killed(environment, folder, hook, nth):
    return replica_of(environment, folder, [at_hook(hook, kill, nth)])


@pytest.fixture
def lighthouse():
    with lighthouse_for(1) as address:
        yield address


@contextlib.contextmanager
def lighthouse_for(replicas):
    coordination = pytest.importorskip("torchft.coordination")
    server = coordination.LighthouseServer(
        bind="[::]:0", min_replicas=replicas, join_timeout_ms=5000, quorum_tick_ms=20, heartbeat_timeout_ms=1500
    )
    try:
        yield server.address()
    finally:
        server.shutdown()


def diary(folder, replica):
    path = folder / f"diary-{replica}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [line.split() for line in lines if line.endswith("\n")]
    return [(int(step), int(present), stepped == "True") for step, present, stepped in rows]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.mark.parametrize("hook", ["run_backward", "on_boundary"])
class TestLost:
    pytestmark = real

    def test_a_replica_that_is_killed_costs_a_step_and_comes_back(self, hook, lighthouse, tmp_path):
        places = [said(replica, 2, lighthouse) for replica in (0, 1)]
        stays = Child(replica_of, places[0], tmp_path)
        lost = Child(replica_that_is_killed, places[1], tmp_path, hook, 20)
        assert lost.wait().code == -signal.SIGKILL
        died = diary(tmp_path, 1)[-1][0]
        until(lambda: any(step > died + 5 and present == 1 for step, present, _ in diary(tmp_path, 0)))
        back = Child(replica_of, places[1], tmp_path)
        until(lambda: diary(tmp_path, 0)[-1][1] == 2 and len(diary(tmp_path, 1)) > died + 5)
        (tmp_path / "end.new").write_text(str(diary(tmp_path, 0)[-1][0] + 200))
        (tmp_path / "end.new").rename(tmp_path / "end")
        one, other = stays.wait(), back.wait()
        assert (one.code, other.code) == (0, 0), one.output + other.output
        assert one.value == other.value
        refused = [step for step, _, stepped in diary(tmp_path, 0) if not stepped]
        assert len(refused) == one.value[2] <= 1
        if hook == "run_backward":
            assert refused == [died + 1]
        assert "ft: replica 0 trains with 1 of 2 replicas" in one.output
        assert "ft: replica 1 has the state of another, at step" in other.output


class TestTogether:
    pytestmark = real

    @pytest.mark.plugins
    def test_two_replicas_are_two_ranks_of_ddp_bit_for_bit(self, tmp_path):
        options = {"max_steps": 12, "dropout": 0.0}
        with lighthouse_for(2) as lighthouse:
            children = [Child(replica_of, said(replica, 2, lighthouse), tmp_path, [], options) for replica in (0, 1)]
            one, other = (child.wait() for child in children)
        assert one.value == other.value, one.output + other.output
        assert one.value[1:] == (12, 0, {"step": 12, "batches_committed": 24})
        ranks = run_ranks(ddp, 2, tmp_path)
        assert one.value[0] == ranks[0].value, ranks[0].output

    def test_its_state_goes_on(self, lighthouse, tmp_path):
        outcome = Child(replica_with_a_past, said(0, 1, lighthouse), tmp_path).wait()
        assert outcome.value == {"step": 10, "batches_committed": 17}, outcome.output

    def test_a_module_that_steps_twice_in_a_window_is_refused(self, lighthouse, tmp_path):
        outcome = Child(replica_that_steps_twice, said(0, 1, lighthouse), tmp_path).wait()
        assert outcome.code == 1
        assert (
            "ft averages gradients once for each window, and this module steps several times in one" in outcome.output
        )


class TestBounded:
    pytestmark = real

    def test_no_lighthouse(self, tmp_path):
        with lighthouse_for(1) as lighthouse:
            pass
        began = time.monotonic()
        outcome = Child(replica_of, said(0, 2, lighthouse), tmp_path).wait()
        assert time.monotonic() - began < 40
        assert outcome.code == 1
        assert f"ft: no lighthouse answers at TORCHFT_LIGHTHOUSE={lighthouse}" in outcome.output

    def test_a_lighthouse_that_is_lost_ends_the_run(self, tmp_path):
        with lighthouse_for(1) as lighthouse:
            child = Child(replica_of, said(0, 1, lighthouse), tmp_path)
            until(lambda: len(diary(tmp_path, 0)) > 5)
        began = time.monotonic()
        outcome = child.wait()
        assert time.monotonic() - began < 40
        assert outcome.code == 1, outcome.output
        assert f"ft: the lighthouse at {lighthouse} has not let replica 0 take part in the next step" in outcome.output

    def test_one_of_two_that_must_be_there(self, tmp_path):
        began = time.monotonic()
        with lighthouse_for(2) as lighthouse:
            outcome = Child(replica_waiting_briefly, said(0, 2, lighthouse), tmp_path).wait()
        assert time.monotonic() - began < 40
        assert outcome.code == 1
        assert "take part in the next step within 2 s (ft.quorum_timeout): too few replicas are there" in outcome.output


def replica_waiting_briefly(environment, folder):
    return replica_of(environment, folder, quorum_timeout="2 s")


def replica_with_a_past(environment, folder):
    os.environ.update(environment)
    plugin = Ft()
    plugin.update_state({"step": 7, "batches_committed": 14})
    tiny_trainer([plugin], max_steps=3, runs_folder=str(folder)).train()
    return plugin.get_state()


class Twice(TinyModule):
    @hookimpl
    def update(self, trainer, window):
        for _ in range(2):
            outputs = trainer.hook.run_window(trainer=trainer, window=window)
            trainer.step()
        return outputs


def replica_that_steps_twice(environment, folder):
    os.environ.update(environment)
    tiny_trainer([Ft()], Twice(), runs_folder=str(folder)).train()


def ddp(folder):
    torch.set_num_threads(1)
    options = {"max_steps": 12, "evaluate_every": None, "eval_when_finish": False}
    trainer = tiny_trainer({"ddp": {}}, TinyModule(samples=48, dropout=0.0), epochs=10**6, **options)
    trainer.train()
    return digest({name: weight.detach() for name, weight in trainer.module.named_parameters()})
