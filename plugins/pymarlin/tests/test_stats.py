"""What PyMarlin's stats give to the log bus of a run; `test_like_pymarlin.py` has what they give to writers."""

import pytest
import torch

from hookline.testing import TinyModule, tiny_trainer
from hookline_pymarlin import (
    DefaultCheckpointerArguments,
    StatInitArguments,
    Trainer,
    TrainerArguments,
    WriterInitArguments,
    getlogger,
    global_stats,
)
from hookline_runs import read_run

pytestmark = pytest.mark.plugins  # its trainer names those of the house


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    global_stats.rebuild(StatInitArguments(), [])  # as PyMarlin's, they keep what a trainer gave them
    global_stats.reset()


def arguments(**given):
    return TrainerArguments(
        **{
            "train_batch_size": 8,
            "val_batch_size": 8,
            "writers": [],
            "use_gpu": False,
            "checkpointer_args": DefaultCheckpointerArguments(checkpoint=False),
        }
        | given
    )


class Told(TinyModule):
    """Gives all there is, in an evaluation of two loaders."""

    def get_val_dataloaders(self, sampler, batch_size):
        loader = super().get_val_dataloaders(sampler, batch_size)
        return {"a": loader, "b": loader}

    def on_end_train_step(self, global_step):
        global_stats.update("often", global_step, frequent=True)
        global_stats.update_multi("losses", {"one": global_step}, frequent=True)
        global_stats.log_model(global_step, self, force=global_step == 2)

    def on_end_val_epoch(self, global_step, key):
        global_stats.update(f"{key}/accuracy", 0.5)
        global_stats.update("last", 1.0 if key == "a" else 2.0)
        global_stats.update_multi("seldom", {"c": torch.tensor(1.5)})
        global_stats.update_image("picture", torch.zeros(4, 5))
        global_stats.update_pr("curve", torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
        global_stats.update_histogram("values", torch.ones(7))
        global_stats.update_embedding("points", [[1.0, 2.0]], ["x"])


def trained(**given):
    module = Told(samples=32)
    global_stats.update("before", 3.0)
    trainer = Trainer(module, arguments(**given))
    global_stats.log_args({"lr": 0.1})
    global_stats.log_graph(module, "cpu")
    trainer.train()
    return trainer, read_run("checkpoints/model-1")


def test_stats_reach_the_trackers_under_their_own_names():
    trainer, run = trained(
        stats_args=StatInitArguments(log_steps=2), writer_args=WriterInitArguments("logs", None, False, 1)
    )
    often = [(row["step"], row["often"], row["losses/one"]) for row in run.rows if "often" in row]
    assert often == [(2, 2.0, 2.0), (4, 4.0, 4.0)]
    expected = {"a/accuracy": 0.5, "b/accuracy": 0.5, "last": 2.0, "seldom/c": 1.5, "before": 3.0}
    assert trainer.core.metrics.items() >= expected.items()
    assert "loss" in run.rows[0]
    assert any(name.startswith("weight_norm/") for row in run.rows for name in row)
    kinds = {one["name"]: one.get("type", "text").rpartition(".")[2] for one in run.objects}
    assert {kinds[name] for name in ("picture", "curve", "values", "points", "args")} == {"Image", "Table", "Histogram"}
    assert kinds["graph"] == "text"


def test_histograms_come_as_rarely_as_tb_hist_steps_says():
    _, run = trained()
    assert "values" not in {one["name"] for one in run.objects}


def test_the_same_stats_in_a_run_of_hooklines_own(tmp_path):
    trainer = tiny_trainer(["pymarlin"], module=Told(samples=32), epochs=1, log_every="1 steps")
    logged = []
    trainer.plugins.register(Kept(logged))
    trainer.train()
    assert [row["often"] for row in logged if "often" in row] == [1.0, 2.0, 3.0, 4.0]
    assert trainer.metrics["b/accuracy"] == 0.5
    assert trainer.test()["test_loss"] > 0


def Kept(rows):
    from hookline import CallbackInterface, hookimpl

    class Keeps(CallbackInterface):
        @hookimpl
        def on_log(self, metrics):
            rows.append(dict(metrics))

    return Keeps()


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (
            lambda: global_stats.update("text", "abc"),
            "global_stats: 'text' takes one number, not a str; reduce it first",
        ),
        (lambda: global_stats.update("two", torch.ones(2)), r"'two' takes one number, not a Tensor of shape \(2,\)"),
        (lambda: global_stats.update("none", None, frequent=True), "'none' takes one number, not a NoneType"),
        (lambda: global_stats.update_multi("k", {"a": "b"}), "'k/a' takes one number, not a str"),
        (lambda: global_stats.update_multi({"a": 1.0}, True), "takes a mapping of names to values, not a bool"),
        (lambda: global_stats.update_matplotlib_figure("no", "tag"), "'tag'.: a str is no figure of matplotlib"),
    ],
)
def test_what_is_no_value_is_refused_where_it_is_given(give, words):
    with pytest.raises(TypeError, match=words):
        give()


def test_a_figure_is_an_image():
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1), dpi=10)
    global_stats.update_matplotlib_figure(figure, "drawn")
    image, dataformats = global_stats.images["drawn"]
    assert (image.shape, dataformats) == ((10, 20, 3), "HWC")


def test_the_writer_of_azure_is_told_of_in_azure(caplog, monkeypatch):
    Trainer(TinyModule(), arguments(writers=["aml"]))
    assert "aml" not in caplog.text
    monkeypatch.setenv("AZUREML_RUN_ID", "run")
    Trainer(TinyModule(), arguments(writers=["aml"]))
    assert "the writer 'aml' is not here; the plugin mlflow does its work" in caplog.text


def test_a_parent_folder_of_tensorboard_is_refused(monkeypatch):
    args = arguments(writers=["tensorboard"], writer_args=WriterInitArguments(tb_logpath_parent_env="PARENT"))
    Trainer(TinyModule(), args)
    monkeypatch.setenv("PARENT", "/elsewhere")
    with pytest.raises(ValueError, match="tb_logpath_parent_env='PARENT': TensorBoard's folder lies in the folder of"):
        Trainer(TinyModule(), args)


def test_stdout_shows_all_values(capsys):
    trained(writers=["stdout"], stats_args=StatInitArguments(log_steps=4))
    lines = capsys.readouterr().err
    for shown in (
        "step = 4, often : 4",
        "step = 4, losses : {'one': 4}",
        "step = 4, loss : ",
        "step = 4, a/accuracy : 0.5",
    ):
        assert shown in lines


def test_a_logger_writes_from_its_level_on(capsys):
    logger = getlogger("mine", "WARNING")
    assert getlogger("mine", "WARNING") is logger
    logger.info("quiet")
    assert logger.level == 30
    assert len(logger.handlers) == 1
