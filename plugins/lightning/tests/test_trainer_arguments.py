"""Each argument of the trainer of today's Lightning is accepted by its default, and others do what they say or not."""

import datetime
import inspect
import logging

import pytest
import torch
from plugins.lightning.tests.programs import loader, program
from torch.utils.data import DataLoader, TensorDataset

from hookline_lightning import Callback, LightningModule, Trainer, seed_everything

pytestmark = pytest.mark.plugins

DEFAULTS = {  # of Lightning 2.6.6; tests/test_package_trainer.py compares them with its signature
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None, "logger": None,
    "callbacks": None, "fast_dev_run": False, "max_epochs": None, "min_epochs": None, "max_steps": -1,
    "min_steps": None, "max_time": None, "limit_train_batches": None, "limit_val_batches": None,
    "limit_test_batches": None, "limit_predict_batches": None, "overfit_batches": 0.0, "val_check_interval": None,
    "check_val_every_n_epoch": 1, "num_sanity_val_steps": None, "log_every_n_steps": None,
    "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None,
    "accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None, "deterministic": None,
    "benchmark": None, "inference_mode": True, "use_distributed_sampler": True, "profiler": None,
    "detect_anomaly": False, "barebones": False, "plugins": None, "sync_batchnorm": False,
    "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None, "enable_autolog_hparams": True,
    "model_registry": None,
}  # fmt: skip
QUIET = {
    "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip
Program = program(LightningModule)


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def test_every_argument_is_here_with_the_same_default():
    here = inspect.signature(Trainer.__init__).parameters
    assert {name: here[name].default for name in DEFAULTS} == DEFAULTS
    assert set(here) - set(DEFAULTS) == {"self", "seed", "others"}
    assert all(one.kind is one.KEYWORD_ONLY for name, one in here.items() if name in DEFAULTS)
    plain, said = Trainer(), Trainer(**DEFAULTS)
    assert (said.options, said.plugins) == (plain.options, plain.plugins)


@pytest.mark.parametrize(
    ("given", "options", "plugins"),
    [
        ({"max_epochs": -1}, {"epochs": None, "max_steps": None, "max_time": "36500 days"}, {}),
        ({"max_epochs": -1, "max_steps": 5}, {"epochs": None, "max_steps": 5, "max_time": None}, {}),
        ({"max_time": {"minutes": 3}}, {"epochs": None, "max_time": "180.000000 s"}, {}),
        ({"max_time": datetime.timedelta(hours=1)}, {"max_time": "3600.000000 s"}, {}),
        ({"num_sanity_val_steps": 0}, {"sanity_val_steps": 0}, {}),
        ({"log_every_n_steps": 0}, {"log_every": f"{10**12} steps"}, {}),
        ({"val_check_interval": "00:00:10:00"}, {"evaluate_every": "600 s"}, {}),
        ({"val_check_interval": 7, "check_val_every_n_epoch": None}, {"evaluate_every": "7 batches"}, {}),
        ({"fast_dev_run": 3}, {"max_steps": 3, "sanity_val_steps": 0}, {"limits": {"fast_dev_run": 3}}),
        ({"deterministic": True}, {}, {"backend": {"deterministic": "error"}}),
        ({"deterministic": "warn"}, {}, {"backend": {"deterministic": "warn"}}),
        ({"benchmark": True}, {}, {"backend": {"cudnn_benchmark": True}}),
        ({"benchmark": False}, {}, {"backend": {"cudnn_benchmark": False}}),
        ({"profiler": "simple"}, {}, {"profile": {}}),
        ({"enable_model_summary": True}, {}, {"summary": {"depth": 1}}),
        ({"precision": "bf16"}, {}, {"amp": {"precision": "bf16"}}),
        ({"strategy": "ddp_spawn"}, {}, {"ddp": {}}),
        ({"strategy": "ddp_notebook_find_unused_parameters_true"}, {}, {"ddp": {"find_unused_parameters": True}}),
        ({"accelerator": "gpu", "devices": [1]}, {"device": "cuda:1"}, {}),
        ({"accelerator": "gpu", "devices": "0,"}, {"device": "cuda:0"}, {}),
        ({"devices": "1", "num_nodes": 1, "sync_batchnorm": True, "use_distributed_sampler": False}, {}, {}),
        ({"inference_mode": False, "min_epochs": 2, "min_steps": 3}, {}, {}),
        ({"gradient_clip_val": 0, "limit_test_batches": 0}, {}, {}),
        ({"limit_predict_batches": 0.5}, {}, {"limits": {"predict_batches": 0.5}}),
        ({"plugins": []}, {}, {}),
    ],
)  # fmt: skip
def test_what_arguments_stand_for(given, options, plugins):
    trainer = Trainer(**given)
    assert trainer.options | options == trainer.options
    assert trainer.plugins | plugins == trainer.plugins


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs=2 is not honoured here: loa"),
        ({"model_registry": "mine"}, "model_registry='mine' is not honoured here: models are files"),
        ({"profiler": "xla"}, "profiler=xla: must be simple, advanced or pytorch"),
        ({"profiler": Callback()}, r"profiler=Callback\(…\): must be simple"),
        ({"precision": "transformer-engine"}, "precision='transformer-engine' must be one of 32-true"),
        ({"strategy": object()}, r"strategy=object\(…\) must be auto or one of .*plugins=\{\"ddp\""),
        ({"strategy": "deepspeed_stage_2"}, r"strategy='deepspeed_stage_2' must be .*\{\"deepspeed\""),
        ({"accelerator": object()}, r"accelerator=object\(…\) must be one of auto, cpu"),
        ({"devices": "0,1"}, r"devices='0,1': this is one process; .* `torchrun --nproc-per-node 2 script.py`"),
        ({"num_nodes": 2, "devices": 4}, "num_nodes=2: this is one .* `torchrun --nnodes 2 --nproc-per-node 4 script"),
        ({"plugins": [object()]}, r"plugins=\[object\]: these are Lightning's own; .*plugins=\{\"finite\""),
        ({"deterministic": "sometimes"}, "deterministic='sometimes' must be True, False or 'warn'"),
        ({"deterministic": True, "benchmark": True}, "benchmark=True and deterministic exclude each other"),
        ({"barebones": True, "logger": True}, "barebones=True turns logger off; leave it out, or leave barebones out"),
        ({"max_time": {"seconds": 0}}, "max_time=0:00:00 must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_at_the_start(given, words):
    with pytest.raises(ValueError, match=words):
        Trainer(**given)


def test_ranks_that_are_not_those_of_the_launcher_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="devices=2 and num_nodes=1 are 2 processes, and the launcher has started 4"):
        Trainer(devices=2)
    with pytest.raises(ValueError, match=r"use_distributed_sampler=False: .*hookline.sharded\(loader\)"):
        Trainer(use_distributed_sampler=False)
    assert {"fsdp", "sync_batchnorm"} <= Trainer(
        strategy="fsdp", devices=2, num_nodes=2, sync_batchnorm=True
    ).plugins.keys()


def test_barebones_turns_everything_off():
    trainer = Trainer(barebones=True)
    assert set(trainer.plugins) == {"jsonl"}
    assert (trainer.logger, trainer.callbacks, trainer.options["sanity_val_steps"]) == (None, [], 0)


class Counts(Callback):
    def __init__(self):
        self.train, self.val, self.seen = 0, 0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train += 1
        self.seen.append(batch[0].sum().item())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.val += 1


@pytest.mark.parametrize(
    ("given", "counts"),
    [  # optimizer steps, batches trained, batches validated: recorded from Lightning 2.6.6
        ({"max_steps": 3, "max_epochs": None}, (3, 3, 0)),
        ({"max_epochs": 0}, (0, 0, 0)),
        ({"max_steps": 0}, (0, 0, 0)),
        ({"limit_train_batches": 0}, (0, 0, 0)),
        ({"limit_val_batches": 0}, (8, 8, 0)),
        ({"num_sanity_val_steps": -1}, (8, 8, 12)),
        ({"fast_dev_run": True, "num_sanity_val_steps": None}, (1, 1, 1)),
        ({"fast_dev_run": 3, "num_sanity_val_steps": None}, (3, 3, 3)),
        ({"overfit_batches": 2}, (4, 4, 4)),
        ({"overfit_batches": 0.5}, (4, 4, 4)),
        ({"accumulate_grad_batches": 2}, (4, 8, 8)),
    ],
)  # fmt: skip
def test_how_long_a_fit_is(given, counts):
    heard = Counts()
    trainer = Trainer(callbacks=[heard], **QUIET | {"max_epochs": 2} | given)
    trainer.fit(Program(), loader(), loader())
    assert (trainer.global_step, heard.train, heard.val) == counts


def test_a_second_fit_trains_nothing_as_in_lightning(caplog):
    trainer, module, other = Trainer(max_epochs=1, **QUIET), Program(), Program()
    trainer.fit(module, loader())
    before = module.net.weight.clone(), other.net.weight.clone()
    trainer.fit(module, loader())
    trainer.fit(other, loader())
    assert torch.equal(module.net.weight, before[0])
    assert torch.equal(other.net.weight, before[1])
    assert "fit was called before, and has trained to max_epochs=1, max_steps=-1: nothing is left" in caplog.text

    class Stops(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = True

    trainer = Trainer(callbacks=[Stops()], **QUIET)
    trainer.fit(module, loader())
    with pytest.raises(ValueError, match="fit was called before, and was stopped at step 1: to go on say"):
        trainer.fit(module, loader())


def test_nothing_is_evaluated_where_limits_are_0():
    trainer, module = Trainer(limit_val_batches=0, limit_test_batches=0, limit_predict_batches=0, **QUIET), Program()
    assert trainer.validate(module, loader()) == trainer.test(module, loader()) == []
    assert trainer.predict(module, loader()) is None


def test_overfitting_sees_the_same_batches_in_each_epoch_and_validates_on_the_data_of_validation():
    class Sums(Program):
        def validation_step(self, batch, batch_idx):
            seen.append(batch[0].sum().item())

    heard, seen = Counts(), []
    other = TensorDataset(torch.arange(8.0).reshape(2, 4))
    trainer = Trainer(overfit_batches=1, max_epochs=2, callbacks=[heard], **QUIET)
    trainer.fit(Sums(), loader(shuffle=True), DataLoader(other, 1))
    first = next(iter(loader()))[0].sum().item()
    assert heard.seen == [first, first]
    assert seen == [6.0, 6.0]


@pytest.mark.parametrize(
    ("given", "steps"),
    [({"min_epochs": 3}, 12), ({"min_steps": 6}, 6), ({}, 1), ({"min_epochs": 1, "min_steps": 6}, 6)],
)
def test_should_stop_waits_for_the_least(given, steps):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = True
            assert trainer.max_epochs == 5

    trainer = Trainer(max_epochs=5, callbacks=[Stops()], **QUIET, **given)
    trainer.fit(Program(), loader())
    assert trainer.global_step == steps


@pytest.mark.parametrize("word", ["64-true", "bf16-true", "16-true"])
def test_whole_precision_is_of_weights_batches_and_new_tensors(word):
    class Looks(Program):
        def training_step(self, batch, batch_idx):
            seen.update([batch[0].dtype, torch.zeros(1).dtype, self.net.weight.dtype])
            return super().training_step(batch, batch_idx)

    seen = set()
    trainer = Trainer(precision=word, max_epochs=1, **QUIET)
    trainer.fit(Looks(), loader())
    assert seen == {{"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}[word]}
    assert (trainer.precision, torch.zeros(1).dtype) == (word, torch.float32)


def test_anomalies_are_detected():
    class Roots(Program):
        def loss(self, batch):
            return (self.net(batch[0]) * 0).sqrt().sum()

    Trainer(max_epochs=1, **QUIET).fit(Roots(), loader())
    with (
        pytest.warns(UserWarning, match="(?i)anomaly|Error detected"),
        pytest.raises(RuntimeError, match="returned nan values"),
    ):
        Trainer(max_epochs=1, detect_anomaly=True, **QUIET).fit(Roots(), loader())


def test_a_seed_of_everything_is_that_of_the_run(caplog):
    caplog.set_level(logging.INFO, "hookline.lightning")
    assert seed_everything(7, workers=True) == 7
    first = torch.rand(1)
    assert seed_everything(verbose=False) == 7
    assert torch.equal(torch.rand(1), first)
    assert [record.message for record in caplog.records] == ["the seed is 7"]
    assert (Trainer().options["seed"], Trainer(seed=3).options["seed"]) == (7, 3)
    with pytest.raises(ValueError, match=r"seed_everything\(-1\) must be from 0"):
        seed_everything(-1)
    with pytest.raises(ValueError, match=r"seed_everything\('x'\): must be a whole number"):
        seed_everything("x")


def test_what_a_trainer_answers_before_and_after_a_run():
    trainer = Trainer(max_epochs=2, limit_train_batches=3, precision=32, **QUIET | {"num_sanity_val_steps": 2})
    said = ("max_epochs", "max_steps", "min_epochs", "current_epoch", "global_step", "is_global_zero", "world_size",
            "precision", "num_devices", "fast_dev_run", "logger", "loggers", "checkpoint_callback",
            "early_stopping_callback", "ckpt_path", "should_stop", "default_root_dir")  # fmt: skip
    before = [2, -1, None, 0, 0, True, 1, "32-true", 1, False, None, [], None, None, None, False, "runs"]
    assert [getattr(trainer, name) for name in said] == before
    with pytest.raises(AttributeError, match="trainer.log_dir is known once fit, validate, test or predict has begun"):
        _ = trainer.log_dir
    for name in ("max_epochs", "logger", "limit_val_batches", "log_dir"):
        with pytest.raises(AttributeError, match=f"trainer.{name} cannot be set: it is an argument of the Trainer"):
            setattr(trainer, name, 1)
    trainer.should_stop = True  # a fit begins without it
    assert trainer.should_stop is False
    with pytest.raises(ValueError, match="save_checkpoint: there is no run yet"):
        trainer.save_checkpoint("x.ckpt")
    seen = {}

    class Looks(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({name: getattr(trainer, name) for name in within})
            seen["loop"] = (trainer.fit_loop.max_epochs, str(trainer.strategy.root_device))
            with pytest.raises(AttributeError, match="max_epochs of a loop cannot be set: it is an argument of the Tr"):
                trainer.fit_loop.max_epochs = 9
            with pytest.raises(AttributeError, match="hookline gives to .* has no 'logger_connector'"):
                _ = trainer.logger_connector

    within = ("estimated_stepping_batches", "num_training_batches", "num_val_batches", "num_sanity_val_batches",
              "enable_validation", "device_ids", "interrupted", "received_sigterm", "evaluating")  # fmt: skip
    trainer.callbacks.append(Looks())
    trainer.fit(Program(), loader(), [loader(), loader()][:1])
    assert seen == dict(zip(within, [6, 3, [4], [2], True, [0], False, False, False], strict=True)) | {
        "loop": (2, "cpu")
    }
    trainer.test(trainer.lightning_module, loader(), verbose=False)
    after = ("global_step", "current_epoch", "num_training_batches", "limit_train_batches", "num_test_batches")
    assert [getattr(trainer, name) for name in after] == [6, 2, 3, 3, [4]]


def test_tables_are_printed_where_they_are_asked_for(capsys):
    class Two(Program):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("test_loss", float(dataloader_idx))

        def on_test_epoch_end(self):
            self.log("whole", 5.0)

    trainer, module = Trainer(**QUIET), Two()
    found = trainer.test(module, [loader(), loader()])
    assert found == [
        {"test_loss/dataloader_idx_0": 0.0, "whole": 5.0},
        {"test_loss/dataloader_idx_1": 1.0, "whole": 5.0},
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed] == [
        ["Test", "metric", "DataLoader", "0", "DataLoader", "1"], [printed[1]], ["test_loss", "0.0", "1.0"],
        ["whole", "5.0", "5.0"],
    ]  # fmt: skip
    trainer.test(module, [loader(), loader()], verbose=False)
    assert capsys.readouterr().out == ""
    assert trainer.predict(module, loader(), return_predictions=False) is None
    assert [tuple(one.shape) for one in trainer.predict(module, loader())] == [(4, 1)] * 4
