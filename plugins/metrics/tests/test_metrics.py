import io
import logging
import subprocess
import sys

import matplotlib
import numpy
import pytest
import torch
import torchmetrics
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_curve, roc_curve
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import (
    BinaryPrecisionAtFixedRecall,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecisionRecallCurve,
    MulticlassROC,
    MultilabelConfusionMatrix,
)
from torchmetrics.wrappers import ClasswiseWrapper

from hookline import ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import Memory
from hookline.tracking import Table
from hookline_metrics import Metrics
from hookline_metrics.figures import draw

CLASSES = 3
MICRO = {"num_classes": CLASSES, "average": "micro"}
ACCURACY = {"_target_": "torchmetrics.classification.MulticlassAccuracy", **MICRO}


def test_which_way_is_better_is_what_a_metric_says_itself():
    several = torchmetrics.MetricCollection(
        {"a_b": torchmetrics.MeanAbsoluteError(), "by_class": MulticlassAccuracy(3, average=None)}, prefix="all_"
    )
    metrics = {
        "score": MulticlassAccuracy(3),
        "accuracy": torchmetrics.MeanSquaredError(),  # named as something else
        "accuracy/few": MulticlassAccuracy(3),
        "of": MulticlassAccuracy(3, average=None),
        "named": ClasswiseWrapper(MulticlassF1Score(3, average=None), labels=["cat", "dog", "owl"]),
        "many": several,
        "gap": 1 - MulticlassAccuracy(3),  # says nothing itself
        "mean_error": torchmetrics.MeanMetric(),
    }
    trainer = Trainer(Classifier(), [Metrics(val=metrics)], device="cpu")
    found = {}
    for name in [
        *("score", "accuracy", "accuracy/few", "of_2", "named_multiclassf1score_cat", "many_all_a_b"),
        *("many_all_by_class_1", "mean_error", "loss", "score_error"),
    ]:
        found[name] = trainer.hook.get_mode(trainer=trainer, metric=f"val_{name}")
    assert found == {
        "score": "max",
        "accuracy": "min",
        "accuracy/few": "max",
        "of_2": "max",
        "named_multiclassf1score_cat": "max",
        "many_all_a_b": "min",
        "many_all_by_class_1": "max",
        "mean_error": "min",
        "loss": "min",
        "score_error": "min",
    }
    for name in ("val_gap", "score"):
        with pytest.raises(ValueError, match="nobody knows whether the smallest or the largest"):
            trainer.hook.get_mode(trainer=trainer, metric=name)


class Classifier(ModuleInterface):
    """Learns classes, and remembers what every stage gave and what was logged."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, classes))
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


def test_a_metric_without_a_class_is_that_of_its_name():
    named = {
        "accuracy": {"task": "multiclass", "num_classes": CLASSES},
        "f1_score": {"task": "multiclass", "num_classes": CLASSES, "average": "macro"},
        "accuracy/few": {"task": "multiclass", "num_classes": CLASSES, "top_k": 2},
    }
    module = TwoLoaders()
    metrics = make(module, [Metrics(val=named)]).validate()
    by_class = {
        "a": MulticlassAccuracy(CLASSES, average="micro"),
        "f": MulticlassF1Score(CLASSES),
        "a/few": MulticlassAccuracy(CLASSES, average="micro", top_k=2),
    }
    expected = make(TwoLoaders(), [Metrics(val=by_class)]).validate()
    for key in ("first", "few"):
        assert metrics[f"val_accuracy/{key}"] == expected[f"val_a/{key}"]
        assert metrics[f"val_f1_score/{key}"] == expected[f"val_f/{key}"]
    assert metrics["val_accuracy/first"] != metrics["val_accuracy/few"]


class Tokens(Classifier):
    """Predicts the token at each of five places, in batches of unequal size."""

    def train_step(self, global_step, batch, device):
        inputs, _ = batch
        logits = self.net(inputs)[:, None] * torch.arange(1.0, 6.0)[:, None]
        tokens = inputs.argmax(1)[:, None].remainder(CLASSES).expand(-1, 5).clone()
        tokens[inputs[:, 0] > 0, 3:] = -100  # padding
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        self.steps.append((self.trainer.stage, logits.detach(), tokens))
        return loss, logits, tokens

    val_step = test_step = train_step


def test_perplexity_is_one_line():
    module = Tokens()
    metrics = make(module, [Metrics(val={"perplexity": {"ignore_index": -100}})]).validate()
    logits, tokens = (torch.cat([step[place] for step in module.steps]).flatten(0, 1) for place in (1, 2))
    by_hand = torch.nn.functional.cross_entropy(logits.double(), tokens).exp().item()
    assert metrics["val_perplexity"] == pytest.approx(by_hand, rel=1e-5)


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
    classes = [f"train_classes_{index}" for index in range(50)]
    for name in ("train_accuracy", "train_all_micro", "train_all_macro", "train_all_f1", *classes):
        assert len(whole.values(name)) == 3
        assert resumed.values(name) == whole.values(name)[1:], name


@pytest.mark.parametrize("other", [MulticlassF1Score(CLASSES), torchmetrics.classification.MulticlassAccuracy(CLASSES)])
@pytest.mark.parametrize("cut", [10, 14])
def test_a_metric_that_was_added_or_exchanged_says_what_its_first_value_covers(cut, other, caplog):
    memory, resumed = Memory(every="1 step"), Classifier()
    train(
        Classifier(), [Metrics(train={"accuracy": ACCURACY, "other": ACCURACY}), memory], epochs=3, evaluate_every=None
    )
    caplog.clear()
    begun = Memory(memory.states[cut])
    train(resumed, [Metrics(train={"accuracy": ACCURACY, "other": other, "more": other.clone()}), begun], epochs=3)
    said = "other, more: the checkpoint has no such metric, so the first value covers the rest of the epoch alone, from"
    assert [record.message for record in caplog.records if "no such metric" in record.message] == (
        [f"{said} batch 3 on"] if cut == 10 else []
    )
    assert len(resumed.values("train_more")) == len(resumed.values("train_accuracy"))


def test_an_epoch_cut_short_goes_on_where_it_was(caplog):
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
    assert "no such metric" not in caplog.text
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


def test_a_collection_is_logged_member_by_member():
    scores = {
        "_target_": "torchmetrics.MetricCollection",
        "metrics": {
            "accuracy": ACCURACY,
            "f1": {"_target_": "torchmetrics.F1Score", "task": "multiclass", "num_classes": 3},
            "confusion": {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": 3},
        },
    }
    module = TwoLoaders()
    measured = make(module, [Metrics(val={"scores": scores})]).validate()
    assert {"val_scores_accuracy/first", "val_scores_f1/few"} < set(measured)
    assert set(module.objects) == {"val_scores_confusion/first", "val_scores_confusion/few"}


def test_what_is_computed_by_class_is_logged_by_index():
    module = Classifier()
    metrics = {"f1": MulticlassF1Score(CLASSES, average=None), "by_name": torchmetrics.ClasswiseWrapper(build_f1())}
    measured = make(module, [Metrics(val=metrics)]).validate()
    predicted, references = module.given(Stage.VAL)
    expected = f1_score(references, predicted, average=None)
    assert [measured[f"val_f1_{index}"] for index in range(CLASSES)] == pytest.approx(expected, abs=1e-6)
    named = [measured[f"val_by_name_multiclassf1score_{index}"] for index in range(CLASSES)]
    assert named == pytest.approx(expected, abs=1e-6)
    assert module.objects == {}


def build_f1():
    return MulticlassF1Score(CLASSES, average=None)


def test_a_tuple_of_numbers_is_logged_by_index():
    class Binary(Classifier):
        def val_step(self, global_step, batch, device):
            loss, predictions, references = super().val_step(global_step, batch, device)
            return loss, predictions.softmax(1)[:, 0], (references == 0).int()

    measured = make(Binary(), [Metrics(val={"precision": BinaryPrecisionAtFixedRecall(0.5)})]).validate()
    assert 0 < measured["val_precision_0"] <= 1  # the precision
    assert 0 <= measured["val_precision_1"] <= 1  # and its threshold


@pytest.mark.parametrize("classes", [100, 101])
def test_of_more_than_a_hundred_classes_there_is_a_table(classes):
    module = Classifier(classes)
    measured = make(module, [Metrics(val={"f1": MulticlassF1Score(classes, average=None)})]).validate()
    predicted, references = module.given(Stage.VAL)
    first = f1_score(references, predicted, labels=range(3), average=None, zero_division=0)
    if classes == 100:
        assert module.objects == {}
        assert [measured[f"val_f1_{index}"] for index in range(3)] == pytest.approx(first, abs=1e-6)
    else:
        (table,) = module.objects["val_f1"]
        assert isinstance(table, Table)
        assert table.columns == ["index", "val_f1"]
        assert [row[0] for row in table.rows] == list(range(101))
        assert [row[1] for row in table.rows[:3]] == pytest.approx(first, abs=1e-6)
        assert not any(name.startswith("val_f1") for name in measured)


# Loaders ------------------------------------------------------------------------------


def test_a_metric_may_be_of_one_loader_alone():
    module = TwoLoaders()
    measured = make(module, [Metrics(val={"accuracy/few": ACCURACY})]).validate()
    predicted = module.net.eval()(module.inputs).argmax(1)
    assert measured["val_accuracy/few"] == pytest.approx(accuracy_score(module.references[:7], predicted[:7]), abs=1e-7)
    assert [name for name in measured if "accuracy" in name] == ["val_accuracy/few"]


def test_a_loaders_own_metric_takes_the_place_of_that_of_all():
    class Bringing(TwoLoaders):
        def get_metrics(self, stage):
            return {"accuracy/few": MulticlassAccuracy(CLASSES, top_k=3)} if stage is Stage.TEST else {}

        def get_test_dataloaders(self, sampler, batch_size):
            return self.get_val_dataloaders(sampler, batch_size)

    metrics = {"val": {"accuracy/few": MulticlassAccuracy(CLASSES, top_k=3), "accuracy": ACCURACY}}
    trainer = make(Bringing(), [Metrics(**metrics, test={"accuracy": ACCURACY})])
    for stage, measured in (("val", trainer.validate()), ("test", trainer.test())):
        assert measured[f"{stage}_accuracy/few"] == 1
        assert 0 < measured[f"{stage}_accuracy/first"] < 1


def test_a_loader_without_metrics_may_return_the_loss_alone():
    class Sparse(TwoLoaders):
        def val_step(self, global_step, batch, device):
            outputs = super().val_step(global_step, batch, device)
            return outputs if len(batch[0]) <= 3 else outputs[0]

    measured = make(Sparse(), [Metrics(val={"accuracy/few": ACCURACY})], max_val_steps_per_epoch=2).validate()
    assert set(measured) == {"val_loss", "val_loss/first", "val_loss/few", "val_accuracy/few"}


def test_a_loader_that_is_alone_has_no_key_in_the_name():
    measured = make(Classifier(), [Metrics(val={"accuracy/default": ACCURACY})]).validate()
    assert "val_accuracy" in measured


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (
            TwoLoaders,
            "accuracy/fwe",
            r"metrics\.val\.accuracy/fwe: there is no val loader 'fwe', did you mean 'few'\?; there are first, few",
        ),
        (
            Classifier,
            "accuracy/first",
            r"metrics\.val\.accuracy/first: there is no val loader 'first'; there are default",
        ),
    ],
)
def test_refuses_metrics_of_loaders_that_are_not_there(module, name, message):
    with pytest.raises(ValueError, match=message):
        train(module(), [Metrics(val={name: ACCURACY}, test={"accuracy/other": ACCURACY})], sanity_val_steps=1)


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        (
            "train",
            "accuracy/few",
            r"metrics\.train\.accuracy/few is for one loader alone, .* has but one; name it accuracy",
        ),
        (
            "val",
            "/few",
            r"metrics\.val\./few must be named as accuracy is, or as accuracy/few for the loader few alone",
        ),
        ("test", "accuracy/", r"metrics\.test\.accuracy/ must be named as accuracy is"),
        ("val", "loss/few", r"metrics\.val\.loss/few would be logged as val_loss/few, which the trainer logs itself"),
    ],
)
def test_refuses_names_that_are_of_no_loader(stage, name, message):
    with pytest.raises(ValueError, match=message):
        make(Classifier(), [Metrics(**{stage: {name: ACCURACY}})])


class Counting(MulticlassAccuracy):
    """Counts how often it is computed."""

    computed = 0

    def compute(self):
        self.computed += 1
        return super().compute()


def test_a_metric_is_computed_once_a_loader_and_evaluation():
    metric = Counting(CLASSES)
    train(TwoLoaders(), [Metrics(val={"accuracy": metric})], epochs=3)
    assert metric.computed == 2 * 3


# Pairs by name ------------------------------------------------------------------------


class Paired(TwoLoaders):
    """Gives each metric what it is to be updated with; also something for which there is none."""

    def train_step(self, global_step, batch, device):
        loss, predictions, references = super().train_step(global_step, batch, device)
        binary = predictions.softmax(1)[:, 0], references == 0
        return loss, {"accuracy": (predictions, references), "first": binary, "nobody's": (loss, loss)}

    val_step = train_step

    def pairs(self, stage):
        predicted, references = self.given(stage)
        return (references, predicted), (references == 0, self.first(stage) > 0.5)

    def first(self, stage):
        return torch.cat([step[1] for step in self.steps if step[0] is stage]).softmax(1)[:, 0]


FIRST = {"_target_": "torchmetrics.classification.BinaryF1Score"}


def test_a_step_may_give_each_metric_its_own():
    module = Paired()
    make(module, [Metrics(val={"accuracy": ACCURACY, "first/few": FIRST})]).validate()
    predicted, references = module.given(Stage.VAL)
    assert module.values("val_accuracy/first") == pytest.approx([accuracy_score(references[:50], predicted[:50])])
    assert module.values("val_accuracy/few") == pytest.approx([accuracy_score(references[50:], predicted[50:])])
    first = module.first(Stage.VAL)[50:] > 0.5
    assert module.values("val_first/few") == pytest.approx([f1_score(references[50:] == 0, first)])
    assert not module.values("val_first/first")


@pytest.mark.parametrize("plugins", [[], [Accumulating()]], ids=["plain", "accumulated"])
def test_so_may_a_step_of_training(plugins):
    module = Paired()
    train(module, [Metrics(train={"accuracy": ACCURACY, "first": FIRST}), *plugins])
    (whole, first) = module.pairs(Stage.TRAIN)
    assert module.values("train_accuracy") == pytest.approx([accuracy_score(*whole)])
    assert module.values("train_first") == pytest.approx([f1_score(*first)])


def test_what_is_given_by_name_keeps_no_graph():
    metric = torchmetrics.CatMetric()

    class Keeping(Classifier):
        def train_step(self, global_step, batch, device):
            loss, predictions, _ = super().train_step(global_step, batch, device)
            return loss, {"kept": [predictions.sum()]}

    trainer = make(Keeping(), [Metrics(train={"kept": metric})], max_steps=3, evaluate_every=None)
    trainer.train()
    assert len(metric.value) == 3
    assert not any(value.requires_grad for value in metric.value)


class TakesMappings(torchmetrics.SumMetric):
    """Is given mappings as its predictions and references, as metrics of texts are."""

    def update(self, predictions, references):
        super().update(predictions["ids"] + references["ids"])


def test_a_metric_may_be_given_mappings_themselves():
    class Texts(Classifier):
        def val_step(self, global_step, batch, device):
            loss, _, references = super().val_step(global_step, batch, device)
            return loss, {"ids": references}, {"ids": references}

    module = Texts()
    measured = make(module, [Metrics(val={"ids": TakesMappings()})]).validate()
    assert measured["val_ids"] == 2 * module.references.sum()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"acuracy": (1, 2), "f1": (1, 2)},
            r"metrics\.val\.accuracy: val_step of the loader 'default' returned nothing for 'accuracy', only for "
            r"acuracy, f1; return \{name: \(predictions, references\)\} with each metric's name",
        ),
        ({}, r"returned nothing for 'accuracy', only for none; return"),
        (
            {"accuracy": torch.zeros(2)},
            r"metrics\.val\.accuracy: .* returned a Tensor for 'accuracy'; a metric is given a tuple, \(predictions",
        ),
        (
            [{"accuracy": (1, 2)}, 3],
            r"metrics\.inputs=\[1, 2\] asks for output 2 .* or \(loss, \{name: \(predictions, ref",
        ),
    ],
)
def test_refuses_what_is_given_by_other_names(given, message):
    class Other(Classifier):
        def val_step(self, global_step, batch, device):
            return super().val_step(global_step, batch, device)[0], given

    with pytest.raises(ValueError, match=message):
        make(Other(), [Metrics(val={"accuracy": ACCURACY})]).validate()


def test_says_which_pair_could_not_be_taken():
    class Wrong(Classifier):
        def val_step(self, global_step, batch, device):
            loss, predictions, references = super().val_step(global_step, batch, device)
            return loss, {"accuracy": (predictions, references, loss)}

    with pytest.raises(TypeError, match="takes 3 positional arguments") as caught:
        make(Wrong(), [Metrics(val={"accuracy": ACCURACY})]).validate()
    note = "metrics.val.accuracy was updated with what val_step of the loader 'default' returned for it"
    assert note in caught.value.__notes__


# Figures ------------------------------------------------------------------------------


def written(axes):
    """Return what is written into the cells of a matrix, row by row."""
    return [text.get_text() for text in axes.texts]


def test_a_confusion_matrix_is_logged_as_a_figure():
    module = TwoLoaders()
    metrics = {"confusion": MulticlassConfusionMatrix(CLASSES), "shares": shares()}
    make(module, [Metrics(val=metrics)]).validate()
    predicted, references = module.given(Stage.VAL)
    for key, part in (("first", slice(50)), ("few", slice(50, 57))):
        expected = confusion_matrix(references[part], predicted[part], labels=range(CLASSES))
        (figure,) = module.objects[f"val_confusion/{key}"]
        assert isinstance(figure, Figure)
        (axes,) = figure.axes
        assert axes.images[0].get_array().tolist() == expected.tolist()
        assert written(axes) == [str(count) for count in expected.ravel()]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    (figure,) = module.objects["val_shares/first"]
    expected = confusion_matrix(references[:50], predicted[:50], normalize="all")
    assert written(figure.axes[0]) == [f"{share:.2f}" for share in expected.ravel()]


def shares():
    return MulticlassConfusionMatrix(CLASSES, normalize="all")


def test_a_figure_of_training_has_no_loader_in_its_name():
    module = TwoLoaders()
    train(module, [Metrics(train={"confusion": MulticlassConfusionMatrix(CLASSES)})], epochs=2)
    first, second = module.objects["train_confusion"]
    assert first.axes[0].images[0].get_array().sum() == second.axes[0].images[0].get_array().sum() == 50
    assert list(module.objects) == ["train_confusion"]


def test_matrices_by_label_are_in_one_figure():
    class Labels(Classifier):
        def val_step(self, global_step, batch, device):
            loss, predictions, _ = super().val_step(global_step, batch, device)
            return loss, predictions.sigmoid(), (batch[0][:, :CLASSES] > 0).int()

    module = Labels()
    make(module, [Metrics(val={"confusion": MultilabelConfusionMatrix(CLASSES)})]).validate()
    (figure,) = module.objects["val_confusion"]
    assert [axes.get_title() for axes in figure.axes] == ["Label 0", "Label 1", "Label 2"]
    predicted = torch.cat([step[1] for step in module.steps]) > 0
    for label, axes in enumerate(figure.axes):
        expected = confusion_matrix(module.inputs[:, label] > 0, predicted[:, label])
        assert axes.images[0].get_array().tolist() == expected.tolist()


def test_a_large_matrix_has_colours_alone():
    module = Classifier(300)
    make(module, [Metrics(val={"confusion": MulticlassConfusionMatrix(300)})]).validate()
    (figure,) = module.objects["val_confusion"]
    axes, scale = figure.axes
    assert axes.images[0].get_array().sum() == 50
    assert written(axes) == []
    assert len(axes.get_xticks()) < 20
    assert scale.get_label() == "<colorbar>"


def test_curves_are_logged_as_figures():
    module = Classifier()
    make(
        module, [Metrics(val={"roc": MulticlassROC(CLASSES), "pr": MulticlassPrecisionRecallCurve(CLASSES)})]
    ).validate()
    _, references = module.given(Stage.VAL)
    scores = torch.cat([step[1] for step in module.steps]).softmax(1)
    (roc,), (pr,) = module.objects["val_roc"], module.objects["val_pr"]
    for index in range(CLASSES):
        false, true, _ = roc_curve(references == index, scores[:, index], drop_intermediate=False)
        x, y = roc.axes[0].lines[index].get_data()
        assert numpy.allclose(x, false, atol=1e-6)
        assert numpy.allclose(y, true, atol=1e-6)
        precision, recall, _ = precision_recall_curve(references == index, scores[:, index])
        x, y = pr.axes[0].lines[index].get_data()
        assert numpy.allclose(x, recall, atol=1e-6)
        assert numpy.allclose(y, precision, atol=1e-6)


def test_pyplot_knows_nothing_of_a_figure():
    def known():
        settings = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if not name.startswith("backend")}
        return matplotlib.get_backend(auto_select=False), settings, pyplot.get_fignums()

    before = known()
    train(Classifier(), [Metrics(val={"confusion": MulticlassConfusionMatrix(3), "roc": MulticlassROC(3)})])
    assert known() == before


def test_of_many_curves_there_is_no_figure(caplog):
    module = Classifier(21)
    train(module, [Metrics(val={"roc": MulticlassROC(21, thresholds=5)})], epochs=2)
    assert all(isinstance(value, tuple) for value in module.objects["val_roc"])  # as it was computed
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == (
        "val_roc cannot be drawn, so trackers get no figure of it: ValueError: 21 curves in one figure are more than "
        "anybody can read; up to 20 are drawn"
    )


def test_without_matplotlib_it_says_what_to_install(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module = TwoLoaders()
    train(module, [Metrics(val={"confusion/few": MulticlassConfusionMatrix(CLASSES)})], epochs=2)
    assert [value.sum() for value in module.objects["val_confusion/few"]] == [7, 7]  # as it was computed
    (said,) = [record.getMessage() for record in caplog.records if record.name == "hookline.metrics"]
    assert said.startswith("val_confusion/few cannot be drawn, so trackers get no figure of it: ModuleNotFoundError: ")
    assert said.endswith("; `pip install 'hookline-metrics[figures]'` brings matplotlib")


class Matrix(torchmetrics.SumMetric):
    """Computes what is no number, and cannot draw it."""

    plot = torchmetrics.Metric.plot

    def update(self, predictions, references):
        super().update(len(references))

    def compute(self):
        return super().compute() * torch.ones(2, 2)


class Scribbling(Matrix):
    """Fails to draw it."""

    def plot(self, value, ax=None):
        raise RuntimeError("no ink")


def test_what_no_metric_can_draw_is_logged_as_it_is(caplog):
    module = Classifier()
    train(module, [Metrics(val={"matrix": Matrix(), "scribble": Scribbling()})])
    assert module.objects["val_matrix"][0].tolist() == module.objects["val_scribble"][0].tolist() == [[50.0, 50.0]] * 2
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == "val_scribble cannot be drawn, so trackers get no figure of it: RuntimeError: no ink"


def test_nothing_is_drawn_that_nobody_sees(caplog):
    class Blind(Classifier):
        on_log_object = None

    train(Blind(), [Metrics(val={"scribble": Scribbling()})])
    assert caplog.records == []


@pytest.mark.plugins
def test_tensorboard_shows_the_figures_of_each_evaluation(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = TwoLoaders()
    plugins = {"metrics": Metrics(val={"confusion/few": MulticlassConfusionMatrix(CLASSES)}), "tensorboard": {}}
    trainer = train(module, plugins, epochs=2, sanity_val_steps=1, runs_folder=str(tmp_path))
    reader = EventAccumulator(str(trainer.run_dir / "tensorboard")).Reload()
    assert reader.Tags()["images"] == ["val_confusion/few"]
    shown = reader.Images("val_confusion/few")
    assert [image.step for image in shown] == [7, 14]
    pixels = numpy.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
    predictions = torch.cat([predictions for _, predictions, _ in module.steps[-3:]])  # of the last evaluation
    counts = confusion_matrix(module.references[:7], predictions.argmax(1), labels=range(CLASSES))
    canvas = FigureCanvasAgg(draw(MulticlassConfusionMatrix(CLASSES), torch.tensor(counts)))
    canvas.draw()
    assert (pixels == numpy.asarray(canvas.buffer_rgba())[..., :3]).all()


def test_a_sanity_check_leaves_no_trace():
    module = Classifier()
    metrics = Metrics(val={"accuracy": ACCURACY, "confusion": MulticlassConfusionMatrix(CLASSES)})
    train(module, [metrics], sanity_val_steps=2)
    assert len(module.values("val_accuracy")) == len(module.objects["val_confusion"]) == 1
    assert module.objects["val_confusion"][0].axes[0].images[0].get_array().sum() == 50


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
    assert set(heard) == {"on_begin_evaluation", "on_begin_val_epoch", "on_end_val_step", "on_end_val_epoch"}
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
            r"metrics\.val\.accuracy\.metrics\.f1\.task: F1Score takes task: Literal",
        ),
        (
            {"num_classes": 3},
            r"metrics\.val\.accuracy: Accuracy: missing a required argument: 'task'",
        ),
        ("accuracy", r"metrics\.val\.accuracy is 'accuracy', which is no metric"),
        ({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, r"metrics\.val\.accuracy is Linear\("),
    ],
)
def test_refuses_what_is_no_metric(given, message):
    with pytest.raises(ValueError, match=message):
        Metrics(val={"accuracy": given})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "accuracyy",
            r"metrics\.val\.accuracyy names no class by _target_, .* 'accuracyy', did you mean 'accuracy'\?; write",
        ),
        (
            "top",
            r"metrics\.val\.top names no class by _target_, and torchmetrics has none of the name 'top'; write metrics",
        ),
        ("functional", r"metrics\.val\.functional names no class by _target_"),
    ],
)
def test_a_name_that_torchmetrics_does_not_have_needs_a_class(name, message):
    with pytest.raises(ValueError, match=message):
        Metrics(val={name: {"num_classes": 3}})


@pytest.mark.parametrize("inputs", [[], [-1, 2]])
def test_refuses_inputs_that_are_none(inputs):
    with pytest.raises(ValueError, match=r"metrics\.inputs=\[.*\] must name outputs of the step, counted from 0"):
        Metrics(inputs=inputs)


def test_says_which_outputs_are_missing():
    message = r"metrics\.inputs=\[1, 5\] asks for output 5 of val_step of the loader 'default', which returned 3 \("
    with pytest.raises(ValueError, match=message):
        make(Classifier(), [Metrics(val={"accuracy": ACCURACY}, inputs=[1, 5])]).validate()


def test_says_which_metric_could_not_be_updated():
    with pytest.raises(ValueError, match="`preds` and `target`") as caught:
        make(Classifier(), [Metrics(val={"accuracy": ACCURACY}, inputs=[2, 1])]).validate()
    note = "metrics.val.accuracy was updated with the outputs [2, 1] of val_step of the loader 'default'"
    assert note in caught.value.__notes__


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
