"""G: a stage of a pipeline is killed, raises or hangs: the run ends with a name, and goes on with the same bits."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from hookline import hookimpl
from hookline.testing import PlainModule, digest, on_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED
from hookline.testing.ranks import Ranks

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_pipeline", "hookline_checkpoint.sharded"]

SOON = 20  # seconds in which all are gone
AT = 3  # the step of the fault


class Module(PlainModule):
    """Does something in the last layer of a stage, in the forward of a step."""

    def __init__(self, fault=None):
        super().__init__(dropout=0.3)
        self.fault = fault

    @hookimpl
    def on_begin_train(self, trainer):
        stage_layer = {"0": 3, "1": 0}[os.environ["RANK"]]  # rank 0 has the last stage
        self.net[stage_layer].register_forward_pre_hook(lambda *_: self.meet(trainer))

    def meet(self, trainer):
        if self.fault is None or trainer.global_step != AT or os.environ["RANK"] != self.fault[0]:
            return
        if self.fault[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault[1] == "raise":
            raise RuntimeError("the stage has failed on purpose")
        time.sleep(1000)  # hangs


def train(folder, fault=None, resume=None):
    torch.set_num_threads(1)
    plugins = {
        "pipeline": {"split": ["net.3"]},
        "accumulate": {"steps": 3},
        "watchdog": {"timeout": "4 s"},
        "checkpoint": {"every": "1 steps", "keep_last": None, "timeout": "8 s"},
    }
    module = Module(fault)
    trainer = tiny_trainer(plugins, module, train_batch_size=12, runs_folder=str(folder), resume=resume)
    trainer.train()
    return digest(trainer.export_model())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return on_ranks(train, 2, tmp_path_factory.mktemp("whole"))


def failing(folder, rank, fault):
    """Train with a fault on a rank; return what each rank said, that one first, and both."""
    outcomes = Ranks(train, 2, folder, (rank, fault)).wait(SOON)
    told = "\n".join(f"--- rank {number}: {one.code}\n{one.output}" for number, one in enumerate(outcomes))
    assert all(outcome.code for outcome in outcomes), told
    return outcomes[int(rank)].output, outcomes[1 - int(rank)].output, told


def assert_goes_on(folder, whole):
    newest = sorted(Path(folder, "run-1", "checkpoints").iterdir())[-1]
    assert on_ranks(train, 2, folder, None, str(newest)) == whole


@pytest.mark.parametrize(("fault", "rank"), [("kill", "0"), ("raise", "1")])
def test_g70_a_stage_that_is_killed_or_raises_ends_all(fault, rank, whole, tmp_path):
    own, other, told = failing(tmp_path, rank, fault)
    assert f"rank {1 - int(rank)} of 2 has lost another rank" in other, told
    assert fault == "kill" or "the stage has failed on purpose" in own, told
    assert_goes_on(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_g71_a_stage_that_hangs_ends_all(rank, whole, tmp_path):
    own, other, told = failing(tmp_path, rank, "hang")
    assert "watchdog" in own + other, told
    assert_goes_on(tmp_path, whole)
