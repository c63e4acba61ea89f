"""Small programs, run here and by PyMarlin 0.3.6: events in order, counters, losses, weights, stats, files, arguments.

PyMarlin asks for torch before 1.10, so it cannot be installed beside this package. `like_pymarlin.json` has what its
0.3.6 did under torch 2.13 (mutable defaults of its dataclasses made factories, azureml stubbed): where it can be
imported, `python test_like_pymarlin.py > like_pymarlin.json` records that anew. Losses and weights of the first program
are computed by a plain loop as well.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

RECORDED = Path(__file__).with_name("like_pymarlin.json")


def ours():
    import hookline_pymarlin

    return hookline_pymarlin


def theirs():
    """Return PyMarlin's names in one namespace, as this package has them."""
    import pymarlin
    from pymarlin.core import trainer, trainer_backend
    from pymarlin.utils import distributed, stats
    from pymarlin.utils.checkpointer import checkpoint_utils
    from pymarlin.utils.writer import base

    names = {}
    for module in (distributed, stats, checkpoint_utils, base, trainer_backend, trainer, pymarlin):
        names.update(vars(module))
    return SimpleNamespace(**names)


# What programs are made of ------------------------------------------------------------


def plain(value):
    """Return a value as JSON has it: numbers rounded, tensors as shape and values."""
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "values": plain(value.reshape(-1).tolist())}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def curve(samples=16):
    inputs = torch.arange(samples * 3, dtype=torch.float32).view(samples, 3) / (samples * 3)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))


def line_of(P):
    """Return the class of a small module; its batches come in the order of the data."""

    class Line(P.ModuleInterface):
        def __init__(self, samples=16):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)
            with torch.no_grad():
                self.net.weight.fill_(0.5)
                self.net.bias.fill_(-0.25)
            self.data, self.asked, self.heard = curve(samples), [], []

        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            self.asked.append(epochs)
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]

        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(self.data, batch_size=batch_size)

        def get_val_dataloaders(self, sampler, batch_size):
            return DataLoader(self.data, batch_size=batch_size, sampler=sampler(self.data))

        def train_step(self, global_step, batch, device):
            inputs, targets = batch
            return (self.net(inputs) - targets).square().mean()

        def val_step(self, global_step, batch, device):
            return self.train_step(global_step, batch, device)

    return Line


def events_of(P, base):
    """Return a class that keeps the six events, under parameters of other names."""

    class Events(base):
        def on_begin_train_epoch(self, step, number):
            self.heard.append(["begin", step, number])

        def on_end_backward(self, completed, scaled):
            self.heard.append(["backward", completed, plain(scaled.detach())])

        def on_end_train_step(self, step, *outputs):
            self.heard.append(["step", step, *map(plain, outputs)])

        def on_end_val_epoch(self, step, *outputs, key="default"):
            self.heard.append(["val", step, key, *map(plain, outputs)])

        def on_end_train_epoch(self, step, *outputs):
            self.heard.append(["epoch", step, *map(plain, outputs)])

        def on_end_train(self, step):
            self.heard.append(["end", step])

    return Events


def arguments(P, **given):
    given.setdefault("checkpointer_args", P.DefaultCheckpointerArguments(checkpoint=False))
    return P.TrainerArguments(
        **{"train_batch_size": 4, "val_batch_size": 4, "writers": [], "disable_tqdm": True, "use_gpu": False} | given
    )


def end(trainer, module):
    """Return what there is when a program has ended."""
    return {
        "heard": module.heard,
        "weights": plain(torch.cat([weight.reshape(-1) for weight in module.state_dict().values()])),
        "counters": [trainer.global_steps_finished, trainer.total_steps_finished, trainer.last_epoch],
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
    }


def files(folder):
    return sorted(str(path) for path in Path(folder).rglob("*.pt"))


# Programs -----------------------------------------------------------------------------


def plain_training(P, module=None, **given):
    module = module or events_of(P, line_of(P))()
    trainer = P.Trainer(module=module, args=arguments(P, epochs=2, **given))
    trainer.train()
    return end(trainer, module)


def accumulation(P):
    return plain_training(P, train_batch_size=8, gpu_batch_size_limit=2)


def limits_without_clipping(P):
    return plain_training(
        P, events_of(P, line_of(P))(24), max_train_steps_per_epoch=3, max_val_steps_per_epoch=2, clip_grads=False
    )


def clipping(P):
    class Steep(line_of(P)):
        def train_step(self, global_step, batch, device):
            return 100 * super().train_step(global_step, batch, device)

    return plain_training(P, events_of(P, Steep)(), max_grad_norm=0.5)


def several_outputs(P):
    class Several(line_of(P)):
        def train_step(self, global_step, batch, device):
            loss, predictions = super().train_step(global_step, batch, device), self.net(batch[0])
            return loss, predictions, loss.reshape(1), "text", None, {"step": global_step}

        def val_step(self, global_step, batch, device):
            return self.net(batch[0]), torch.tensor(len(batch[0])), "text"

        def get_val_dataloaders(self, sampler, batch_size):
            whole = super().get_val_dataloaders(sampler, batch_size)
            return {"whole": whole, "small": DataLoader(self.data, batch_size=6)}

    return plain_training(P, events_of(P, Several)(), train_batch_size=8, gpu_batch_size_limit=4)


def two_optimizers(P):
    class Two(line_of(P)):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            optimizers = [torch.optim.SGD([self.net.weight], lr=0.1), torch.optim.Adam([self.net.bias], lr=0.2)]
            return optimizers, [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers]

    return plain_training(P, events_of(P, Two)())


def validation_alone(P):
    module = events_of(P, line_of(P))()
    trainer = P.Trainer(module=module, args=arguments(P))
    outputs = trainer.validate()
    return {"returned": plain(list(outputs)), "heard": module.heard}


def own_methods(P):
    heard = []

    class Own(P.Trainer):
        def train_epoch(self):
            heard.append(["train_epoch", self.last_epoch])
            (losses,) = super().train_epoch()
            heard.append(["trained", plain(losses)])
            return [losses * 2]

        def validate(self):
            heard.append(["validate", self.last_epoch])
            outputs = super().validate()
            heard.append(["validated", plain(list(outputs))])
            return outputs

    module = events_of(P, line_of(P))()
    module.heard = heard
    trainer = Own(module, arguments(P, epochs=2))
    trainer.train()
    trainer.validate()
    return end(trainer, module)


def own_checkpointer(P):
    calls = []

    class Own(P.AbstractCheckpointer):
        def save(self, checkpoint_state, index, force=False):
            trainer_state, backend = checkpoint_state.trainer_state, checkpoint_state.trainer_backend_state
            calls.append(["save", index, force, trainer_state["last_epoch"], len(trainer_state["optimizers"]), backend])

        def save_model(self, model_state, index):
            calls.append(["save_model", index, sorted(model_state)])

        def load(self):
            weights = {name: torch.full_like(weight, 2.0) for name, weight in line_of(P)().state_dict().items()}
            return P.Checkpoint(module_interface_state=weights)

    module = events_of(P, line_of(P))()
    trainer = P.Trainer(module, arguments(P, epochs=3), checkpointer=Own())
    trainer.train()
    return {"calls": calls, **end(trainer, module)}


def default_checkpointer(P):
    def checkpointer(**given):
        given = {"save_dir": "saved", "model_state_save_dir": "models", "file_prefix": "line", "period": 2} | given
        return P.DefaultCheckpointer(P.DefaultCheckpointerArguments(**given))

    P.Trainer(line_of(P)(), arguments(P, epochs=4), checkpointer=checkpointer()).train()
    before = files(".")
    module = events_of(P, line_of(P))()
    trainer = P.Trainer(module, arguments(P, epochs=6), checkpointer=checkpointer(load_dir="saved"))
    trainer.train()
    held = torch.load("saved/line_5.pt", weights_only=False)
    model = torch.load("models/line_model_5.pt", weights_only=False)
    return {
        "before": before,
        "after": files("."),
        "parts": list(held),
        "backend": held["trainer_backend_state"],
        "last_epoch": held["trainer_state"]["last_epoch"],
        "model": {name: plain(value) for name, value in model.items()},
        **end(trainer, module),
    }


def fresh_schedules(P):
    def checkpointer(**given):
        return P.DefaultCheckpointer(P.DefaultCheckpointerArguments(save_dir="saved", **given))

    P.Trainer(line_of(P)(), arguments(P), checkpointer=checkpointer()).train()
    module = line_of(P)()
    args = arguments(P, epochs=4, reset_optimizers_schedulers=True)
    trainer = P.Trainer(module, args, checkpointer=checkpointer(load_dir="saved"))
    trainer.train()
    return {"asked": module.asked[-1], **end(trainer, module)}  # PyMarlin asks for all epochs before, in vain


def writer_of(P):
    class Rows(P.Writer):
        def __init__(self):
            super().__init__(None)
            self.rows = []

        def log_scalar(self, k, v, step):
            self.rows.append(["scalar", k, plain(float(v)), step])

        def log_multi(self, k, v, step):
            self.rows.append(["multi", k, plain({name: float(value) for name, value in v.items()}), step])

        def log_image(self, k, v, step, dataformats="HW"):
            self.rows.append(["image", k, list(v.shape), step, dataformats])

        def log_pr_curve(self, k, preds, labels, step):
            self.rows.append(["pr", k, plain(preds), plain(labels), step])

        def log_histogram(self, param_name, vals, step):
            self.rows.append(["histogram", param_name, plain(vals), step])

        def log_embedding(self, tag, mat, labels, step):
            self.rows.append(["embedding", tag, plain(mat), plain(labels), step])

        def log_model(self, flat_weights, flat_grads, step):
            shapes = [{name: list(value.shape) for name, value in one.items()} for one in (flat_weights, flat_grads)]
            self.rows.append(["model", *shapes, step])

        def log_args(self, args):
            self.rows.append(["args", args])

        def log_graph(self, model, device=None):
            self.rows.append(["graph", type(model).__name__, str(device)])

        def finish(self):
            self.rows.append(["finish"])

    return Rows


def stats(P):
    writer, stats = writer_of(P)(), P.global_stats
    stats.reset()

    class Told(line_of(P)):
        def on_begin_train_epoch(self, step, epoch):
            stats.update("begun", epoch)

        def on_end_train_step(self, step, loss):
            stats.update("often", step, frequent=True)
            stats.update("often", 10 * step, frequent=True)
            stats.update("rare", loss)
            stats.update_multi("losses", {"a": step, "b": loss}, frequent=True)
            stats.log_model(step, self, force=step == 3)

        def on_end_val_epoch(self, step, losses, key="default"):
            stats.update("accuracy", 0.5)
            stats.update("later", 1.0, frequent=True)
            stats.update_multi("seldom", {"c": 1.5})
            stats.update_image("picture", torch.zeros(4, 5))
            stats.update_pr("curve", torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
            stats.update_histogram("losses", losses)
            stats.update_histogram("losses", losses, extend=True)
            stats.update_embedding("points", torch.tensor([[1.0, 2.0]]), torch.tensor([3]))

        def on_end_train(self, step):
            stats.update("last", 7)

    stats.update("before", 1.0)
    module = Told()
    stats_args = P.StatInitArguments(log_steps=3, log_model_steps=4, exclude_list="bias")
    trainer = P.Trainer(module, arguments(P, epochs=2, writers=[writer], stats_args=stats_args))
    stats.log_args({"lr": 0.1})
    stats.log_graph(module, "cpu")
    trainer.train()
    stats.update("after", 2.0)
    stats.log_long_stats(99)
    stats.update("forced", 3.0, frequent=True)
    stats.log_stats(100, force=True)
    stats.finish()
    return {"rows": writer.rows}


def data(P):
    class Twice(P.DataProcessor):
        looked = 0

        def __init__(self, factor=2):  # without super().__init__(), as PyMarlin's examples have it
            self.factor = factor

        def process(self, *numbers):
            return [self.factor * number for number in numbers]

        def analyze(self):
            self.looked += 1

    class Data(P.DataInterface):
        def setup_datasets(self, train, val):
            self.sets = train, val

        def get_train_dataset(self):
            return self.sets[0]

        def get_val_dataset(self):
            return self.sets[1]

    processor, interface = Twice(), Data()
    done = processor.process_data(1, 2, 3)
    interface.setup_datasets(done, [0])
    return {"sets": [interface.get_train_dataset(), interface.get_val_dataset()], "looked": processor.looked}


CONFIG = """
tr:
  epochs: 1
  flag: false
  go: true
  name: null
  text: a
  lst: [1, 2]
  fl: [-1.0, -1.0]
  words: [x, y]
  lr: 0.1
  deep: {er: 2}
top: 3
"""
LINES = [
    [],
    ["--tr.epochs", "4", "--top", "5", "--tr.deep.er", "7"],
    ["--tr.flag"],
    ["--tr.flag", "--tr.epochs", "4"],
    *(["--tr.flag", word] for word in ("true", "yes", "t", "1", "y", "no", "F", "0")),
    ["--tr.go", "false"],
    ["--tr.lst", "[3,4]"],
    ["--tr.lst", "3-4"],
    ["--tr.fl", "[1,2.5]"],
    ["--tr.words", "u-v"],
    ["--tr.name", "5"],
    ["--tr.name", "abc"],
    ["--tr.text", "007"],
    ["--tr.text", "yes"],
    ["--tr.lr", "1"],
    ["--tr.lr", "1e-3"],
    ["--tr.lr", "-0.5"],
    ["--whatever", "--tr.epochs", "2"],
    ["--local_rank", "1"],
    ["--params", '{"tr.epochs": 7}'],
    ["--params", '{"--tr.epochs": 7}', "--tr.epochs", "3"],
    ["--config_path", "more", "--top", "2"],
    ["--config_path", "more/b.yaml"],
]


def parser(P):
    Path("config.yaml").write_text(CONFIG)
    Path("more").mkdir()
    Path("more/b.yaml").write_text("top: 1\n")
    read = []
    for line in LINES:
        with patch.object(sys, "argv", ["train.py", *line]):
            read.append([line, P.CustomArgParser(log_level="ERROR").parse()])
    return {"read": read}


PROGRAMS = [
    plain_training,
    accumulation,
    limits_without_clipping,
    clipping,
    several_outputs,
    two_optimizers,
    validation_alone,
    own_methods,
    own_checkpointer,
    default_checkpointer,
    fresh_schedules,
    stats,
    data,
    parser,
]


def run(program, P):
    """Run a program in the folder that this is; return what came of it, as JSON."""
    return json.loads(json.dumps(plain(program(P))))


# Tests --------------------------------------------------------------------------------


def near(expected):
    """Let numbers differ by what another processor rounds otherwise."""
    if isinstance(expected, dict):
        return {name: near(value) for name, value in expected.items()}
    if isinstance(expected, list):
        return [near(value) for value in expected]
    return pytest.approx(expected, abs=2e-5) if isinstance(expected, float) else expected


@pytest.mark.plugins
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_does_what_it_does_with_pymarlin(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = json.loads(RECORDED.read_text())[program.__name__]
    found = run(program, ours())
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert found[part] == near(value), part


def by_hand():
    """Return losses of steps, losses of validations and weights of `plain_training`, by a plain loop."""
    net, data = torch.nn.Linear(3, 1), curve()
    with torch.no_grad():
        net.weight.fill_(0.5)
        net.bias.fill_(-0.25)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    batches, steps, validations = list(DataLoader(data, batch_size=4)), [], []
    for _ in range(2):
        for inputs, targets in batches:
            loss = (net(inputs) - targets).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            steps.append(loss.item())
        with torch.no_grad():
            validations += [(net(inputs) - targets).square().mean().item() for inputs, targets in batches]
    return steps, validations, torch.cat([net.weight.detach().reshape(-1), net.bias.detach()]).tolist()


def test_the_losses_are_those_of_a_plain_loop():
    recorded = json.loads(RECORDED.read_text())["plain_training"]
    steps, validations, weights = by_hand()
    assert [event[2]["values"][0] for event in recorded["heard"] if event[0] == "step"] == near(steps)
    assert [loss for event in recorded["heard"] if event[0] == "val" for loss in event[3]["values"]] == near(
        validations
    )
    assert recorded["weights"]["values"] == near(weights)


@pytest.mark.plugins
def test_what_pymarlin_does_otherwise(tmp_path, monkeypatch):
    """Six or eight samples in steps of four micro-batches; beside each value stands what PyMarlin 0.3.6 has."""
    monkeypatch.chdir(tmp_path)
    P = ours()
    estimates = []

    class Short(events_of(P, line_of(P))):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            estimates.append(estimated_global_steps_per_epoch)
            return super().get_optimizers_schedulers(estimated_global_steps_per_epoch, epochs)

    for samples in (8, 6):
        module = Short(samples)
        P.Trainer(module, arguments(P, epochs=2, gpu_batch_size_limit=1, val_batch_size=samples)).train()
    steps = [event for event in module.heard if event[0] == "step"]
    assert [event[2]["shape"] for event in steps] == [[4], [2], [4], [2]]  # [4], then [2] of a step of four, then [4]
    assert [event[3]["shape"] for event in module.heard if event[0] == "val"] == [[1], [1]]  # [], []
    assert estimates == [2, 2]  # 3, 2


@pytest.mark.plugins
def test_clipping_takes_what_is_optimized(tmp_path, monkeypatch):
    """The bias has gradients, and no optimizer: PyMarlin 0.3.6 counts them, and nobody clears them."""
    monkeypatch.chdir(tmp_path)
    P = ours()

    class Part(line_of(P)):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            return [torch.optim.SGD([self.net.weight], lr=0.1)], []

        def train_step(self, global_step, batch, device):
            return 30 * super().train_step(global_step, batch, device)

    weights = plain_training(P, Part())["weights"]["values"]
    net, optimized = torch.nn.Linear(3, 1), torch.full((1, 3), 0.5)
    for _ in range(2):
        for inputs, targets in DataLoader(curve(), batch_size=4):
            net.weight.data, net.bias.data, net.weight.grad = optimized, torch.tensor([-0.25]), None
            (30 * (net(inputs) - targets).square().mean()).backward()
            torch.nn.utils.clip_grad_norm_([net.weight], 1.0)
            optimized = optimized - 0.1 * net.weight.grad
    assert weights[:3] == near(optimized.reshape(-1).tolist())
    assert weights[0] == pytest.approx(0.9291, abs=2e-5)  # PyMarlin: 0.75403


if __name__ == "__main__":
    results = {}
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            results[program.__name__] = run(program, theirs())
    rows = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    print("{\n" + ",\n".join(rows) + "\n}")
