import subprocess
import sys

import pytest
import torch
import torchmetrics
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from hookline import ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import Memory
from hookline_metrics import Metrics

CLASSES = 3
MICRO = {"num_classes": CLASSES, "average": "micro"}
ACCURACY = {"_target_": "torchmetrics.classification.MulticlassAccuracy", **MICRO}


class Classifier(ModuleInterface):
    """Learns classes, and remembers what every stage gave and what was logged."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, CLASSES))
        self.inputs = torch.randn(50, 4)
        self.references = self.inputs[:, :CLASSES].argmax(1)
        self.steps = []
        self.logged = []
        self.objects = {}

    def train_step(self, global_step, batch, device):
        inputs, references = batch
        predictions = self.net(inputs)
        loss = torch.nn.functional.cross_entropy(predictions, references)
        self.steps.append((self.trainer.stage, predictions.detach(), references))
        return loss, predictions, references

    val_step = test_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        data = TensorDataset(self.inputs, self.references)
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler, batch_size):
        return self.get_train_dataloader(sampler, batch_size)

    get_test_dataloaders = get_val_dataloaders

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.Adam(self.parameters(), 0.05)], []

    @hookimpl
    def on_log(self, metrics):
        self.logged.append(dict(metrics))

    @hookimpl
    def on_log_object(self, name, value):
        self.objects.setdefault(name, []).append(value)

    def given(self, stage):
        """Return classes predicted and references of all steps of a stage."""
        steps = [step for step in self.steps if step[0] is stage]
        return torch.cat([predictions for _, predictions, _ in steps]).argmax(1), torch.cat([step[2] for step in steps])

    def values(self, name):
        return [metrics[name] for metrics in self.logged if name in metrics]


class TwoLoaders(Classifier):
    def get_val_dataloaders(self, sampler, batch_size):
        data = TensorDataset(self.inputs, self.references)
        return {"first": DataLoader(data, batch_size), "few": DataLoader(torch.utils.data.Subset(data, range(7)), 3)}


class Accumulating:
    @hookimpl
    def get_window_size(self):
        return 2


def make(module, plugins, **options):
    return Trainer(module, plugins=plugins, device="cpu", **{"train_batch_size": 8, "val_batch_size": 8} | options)


def train(module, plugins, **options):
    trainer = make(module, plugins, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_gives_the_values_of_sklearn(stage):
    module = Classifier()
    metrics = {"accuracy": ACCURACY, "f1": MulticlassF1Score(CLASSES, average="macro")}
    trainer = make(module, [Metrics(**{stage: metrics})])
    measured = trainer.validate() if stage == "val" else trainer.test()
    predicted, references = module.given(Stage(stage))
    assert len(references) == 50
    assert measured[f"{stage}_accuracy"] == pytest.approx(accuracy_score(references, predicted), abs=1e-7)
    assert measured[f"{stage}_f1"] == pytest.approx(f1_score(references, predicted, average="macro"), abs=1e-6)


def test_each_evaluation_begins_anew():
    module = Classifier()
    trainer = make(module, [Metrics(val={"accuracy": ACCURACY})])
    first = trainer.validate()["val_accuracy"]
    assert trainer.validate()["val_accuracy"] == first
    torch.nn.init.zeros_(module.net[2].weight)
    changed = trainer.validate()["val_accuracy"]
    predicted = module.net.eval()(module.inputs).argmax(1)
    assert changed == pytest.approx(accuracy_score(module.references, predicted), abs=1e-7)
    assert changed != first


def test_each_loader_has_a_value_of_its_own():
    module = TwoLoaders()
    metrics = make(module, [Metrics(val={"accuracy": ACCURACY})]).validate()
    predicted = module.net.eval()(module.inputs).argmax(1)
    assert metrics["val_accuracy/first"] == pytest.approx(accuracy_score(module.references, predicted), abs=1e-7)
    assert metrics["val_accuracy/few"] == pytest.approx(accuracy_score(module.references[:7], predicted[:7]), abs=1e-7)
    assert "val_accuracy" not in metrics


@pytest.mark.parametrize("plugins", [[], [Accumulating()]], ids=["plain", "accumulated"])
def test_training_logs_one_value_an_epoch_over_all_its_batches(plugins):
    module = Classifier()
    train(module, [Metrics(train={"accuracy": ACCURACY}), *plugins], epochs=2)
    predicted, references = module.given(Stage.TRAIN)
    expected = [accuracy_score(references[part], predicted[part]) for part in (slice(50), slice(50, 100))]
    assert module.values("train_accuracy") == pytest.approx(expected, abs=1e-7)
    assert all("train_loss_epoch" in metrics for metrics in module.logged if "train_accuracy" in metrics)


class PredictedClasses(torchmetrics.CatMetric):
    """Keeps a list of tensors as its state."""

    def update(self, predictions, references):
        super().update(predictions.argmax(1).float())


def test_training_metrics_survive_a_resume_in_mid_epoch():
    def plugin():
        members = {
            "micro": MulticlassAccuracy(**MICRO),
            "macro": MulticlassAccuracy(CLASSES),
            "f1": MulticlassF1Score(CLASSES),
        }
        collection = torchmetrics.MetricCollection(members)
        return Metrics(train={"accuracy": ACCURACY, "all": collection, "classes": PredictedClasses()})

    whole, memory, resumed = Classifier(), Memory(), Classifier()
    train(whole, [plugin()], epochs=3, evaluate_every=None)
    train(Classifier(), [plugin(), memory], epochs=3, max_steps=10, evaluate_every=None, eval_when_finish=False)
    train(resumed, [plugin(), Memory(memory.state)], epochs=3, evaluate_every=None)
    for name in ("train_accuracy", "train_all_micro", "train_all_macro", "train_all_f1"):
        assert len(whole.values(name)) == 3
        assert resumed.values(name) == whole.values(name)[1:], name
    for one, other in zip(whole.objects["train_classes"][1:], resumed.objects["train_classes"], strict=True):
        assert one.shape == (50,)
        assert torch.equal(one, other)


def test_an_epoch_cut_short_goes_on_where_it_was():
    module = Classifier()
    trainer = make(module, [Metrics(train={"accuracy": ACCURACY})], evaluate_every=None)

    class Stopping:
        @hookimpl
        def on_boundary(self, global_step):
            if global_step == 3:
                trainer.stop("enough for now")

    trainer.plugins.register(Stopping(), "stopping")
    trainer.train()
    assert module.values("train_accuracy") == []
    trainer.train()
    predicted, references = module.given(Stage.TRAIN)
    assert module.values("train_accuracy") == pytest.approx([accuracy_score(references[:50], predicted[:50])], abs=1e-7)


def test_a_module_brings_its_own():
    class Bringing(Classifier):
        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(**MICRO)

        def get_metrics(self, stage):
            return {"own": self.accuracy} if stage is Stage.VAL else None

    module = Bringing()
    metrics = make(module, [Metrics(val={"accuracy": ACCURACY})]).validate()
    assert metrics["val_own"] == metrics["val_accuracy"] > 0
    assert not any("accuracy" in name for name in module.state_dict())  # what a metric has gathered is no weight


def test_what_is_not_one_number():
    module = TwoLoaders()
    metrics = {
        "scores": {
            "_target_": "torchmetrics.MetricCollection",
            "metrics": {
                "accuracy": ACCURACY,
                "f1": {"_target_": "torchmetrics.F1Score", "task": "multiclass", "num_classes": 3},
            },
        },
        "confusion": MulticlassConfusionMatrix(CLASSES),
    }
    measured = make(module, [Metrics(val=metrics)]).validate()
    assert {"val_scores_accuracy/first", "val_scores_f1/few"} < set(measured)
    predicted = module.net.eval()(module.inputs).argmax(1)
    assert module.objects["val_confusion/first"][0].tolist() == confusion_matrix(module.references, predicted).tolist()
    assert module.objects["val_confusion/few"][0].sum() == 7


def test_a_sanity_check_leaves_no_trace():
    module = Classifier()
    metrics = Metrics(val={"accuracy": ACCURACY, "confusion": MulticlassConfusionMatrix(CLASSES)})
    train(module, [metrics], sanity_val_steps=2)
    assert len(module.values("val_accuracy")) == len(module.objects["val_confusion"]) == 1
    assert module.objects["val_confusion"][0].sum() == 50


def test_inputs_say_which_outputs_are_given():
    module = Classifier()
    metrics = make(module, [Metrics(val={"own_loss": torchmetrics.MeanMetric()}, inputs=[0])]).validate()
    losses = [torch.nn.functional.cross_entropy(predictions, references) for _, predictions, references in module.steps]
    assert metrics["val_own_loss"] == pytest.approx(torch.stack(losses).mean().item())


def test_two_under_two_names():
    module = Classifier()
    plugins = {
        "metrics": Metrics(val={"accuracy": ACCURACY}),
        "losses": Metrics(val={"own_loss": torchmetrics.MeanMetric()}, inputs=[0]),
    }
    assert {"val_accuracy", "val_own_loss"} < set(make(module, plugins).validate())


def test_a_stage_without_metrics_is_not_listened_to():
    trainer = make(Classifier(), [Metrics(val={"accuracy": ACCURACY})])
    heard = {row["hook"]: row["done_by"] for row in trainer.plugins.plan() if "metrics.val" in row["done_by"]}
    assert set(heard) == {"on_begin_val_epoch", "on_end_val_step", "on_end_val_epoch"}
    assert not any("metrics.train" in name for name, _ in trainer.plugins.listed())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"_target_": "torchmetrics.classification.MulticlasAccuracy"},
            r"metrics\.val\.accuracy\._target_: .* has no 'MulticlasAccuracy', did you mean 'MulticlassAccuracy'\?",
        ),
        (
            {"_target_": "torchmetrix.Accuracy"},
            r"metrics\.val\.accuracy\._target_: .* ModuleNotFoundError: No module named 'torchmetrix'",
        ),
        (
            {"_target_": "Accuracy"},
            r"metrics\.val\.accuracy\._target_: 'Accuracy' is no dotted path, such as package\.module\.Name",
        ),
        (
            {"_target_": "torchmetrics.classification.MulticlassAccuracy", "classes": 3},
            r"metrics\.val\.accuracy: Unexpected keyword arguments: `classes`",
        ),
        (
            {
                "_target_": "torchmetrics.MetricCollection",
                "metrics": {"f1": {"_target_": "torchmetrics.F1Score", "task": "none"}},
            },
            r"metrics\.val\.accuracy\.metrics\.f1: Invalid Classification",
        ),
        (
            {"num_classes": 3},
            r"metrics\.val\.accuracy is \{'num_classes': 3\}, which is no metric; give a torchmetrics",
        ),
        ("accuracy", r"metrics\.val\.accuracy is 'accuracy', which is no metric"),
        ({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, r"metrics\.val\.accuracy is Linear\("),
    ],
)
def test_refuses_what_is_no_metric(given, message):
    with pytest.raises(ValueError, match=message):
        Metrics(val={"accuracy": given})


@pytest.mark.parametrize("inputs", [[], [-1, 2]])
def test_refuses_inputs_that_are_none(inputs):
    with pytest.raises(ValueError, match=r"metrics\.inputs=\[.*\] must name outputs of the step, counted from 0"):
        Metrics(inputs=inputs)


def test_says_which_outputs_are_missing():
    with pytest.raises(
        ValueError, match=r"metrics\.inputs=\[1, 5\] asks for output 5 of val_step, which returned 3 \("
    ):
        make(Classifier(), [Metrics(val={"accuracy": ACCURACY}, inputs=[1, 5])]).validate()


def test_says_which_metric_could_not_be_updated():
    with pytest.raises(ValueError, match="`preds` and `target`") as caught:
        make(Classifier(), [Metrics(val={"accuracy": ACCURACY}, inputs=[2, 1])]).validate()
    assert "metrics.val.accuracy was updated with the outputs [2, 1] of val_step" in caught.value.__notes__


def test_refuses_one_object_under_two_names():
    accuracy = MulticlassAccuracy(**MICRO)
    message = r"metrics\.val\.top is the very object that is metrics\.train\.accuracy, .* use \.clone\(\)"
    with pytest.raises(ValueError, match=message):
        make(Classifier(), [Metrics(train={"accuracy": accuracy}, val={"top": accuracy})])


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_refuses_the_names_of_the_trainer(stage):
    message = rf"metrics\.{stage}\.loss would be logged as {stage}_loss, which the trainer logs itself; rename it"
    with pytest.raises(ValueError, match=message):
        make(Classifier(), [Metrics(**{stage: {"loss": ACCURACY}})])


@pytest.mark.parametrize(
    ("brought", "message"),
    [
        (
            {"accuracy": MulticlassAccuracy(**MICRO)},
            r"metrics\.val\.accuracy is also a metric of Bringing\.get_metrics\(Stage",
        ),
        ({"own": 0.5}, r"Bringing\.get_metrics\(Stage\.VAL\)\['own'\] is 0\.5, which is no metric"),
    ],
)
def test_refuses_what_a_module_cannot_bring(brought, message):
    class Bringing(Classifier):
        def get_metrics(self, stage):
            return brought if stage is Stage.VAL else {}

    with pytest.raises(ValueError, match=message):
        make(Bringing(), [Metrics(val={"accuracy": ACCURACY})])


class CountingSyncs(TorchDispatchMode):
    """Counts how often a value is fetched from a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_a_step_waits_for_nothing():
    def syncs(plugins, steps):
        with CountingSyncs() as counting:
            train(Classifier(), plugins, max_train_steps_per_epoch=steps, max_val_steps_per_epoch=steps)
        return counting.count

    def metrics():
        metric = {**ACCURACY, "validate_args": False}
        return [Metrics(train={"accuracy": metric}, val={"accuracy": metric})]

    plain = syncs([], 6) - syncs([], 2)
    assert syncs(metrics(), 6) - syncs(metrics(), 2) == plain


def test_torchmetrics_is_imported_only_where_the_plugin_is_named():
    code = "import sys; from hookline import Trainer; assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
