"""PyMarlin's stats: they go to writers of the user's own, and to the log bus of the run that is under way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import Stage, tracking
from hookline_pymarlin.writers import Writer, WriterInitArguments

if TYPE_CHECKING:
    from hookline import Trainer as Core


@dataclass
class StatInitArguments:
    """When stats are logged."""

    log_steps: int = 1
    """Steps from one flush of frequent values to the next."""
    update_system_stats: bool = False
    """Log what the machine and its devices do, by the plugin monitor."""
    log_model_steps: int = 1000
    """Steps from one `log_model` that is done to the next."""
    exclude_list: str | None = r"bias|LayerNorm|layer\.[3-9]|layer\.1(?!1)|layer\.2(?!3)"
    """The parameters that `log_model` leaves out, as a regular expression."""

    def __post_init__(self) -> None:
        for name in ("log_steps", "log_model_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 step")


class BasicStats:
    """Values by name on their way to whoever shows them.

    Frequent values are flushed after a step whose number is a multiple of `log_steps`, the others at the end of a
    validation, of an epoch and of training. Of several of one name before a flush the last counts.
    """

    def __init__(self, args: StatInitArguments, writers: Iterable[Writer] | None = None) -> None:
        self._trainers: list[Core] = []
        self.writer_args = WriterInitArguments()
        self.rebuild(args, writers or [])
        self.reset()

    def rebuild(self, args: StatInitArguments, writers: Iterable[Writer]) -> None:
        """Take other arguments and writers."""
        self.args, self.writers = args, list(writers)

    def reset(self) -> None:
        """Forget all values."""
        self.reset_short()
        self.reset_long()

    def reset_short(self) -> None:
        """Forget frequent values."""
        self.scalars_short: dict[str, Any] = {}
        self.multi_short: dict[str, Mapping[str, Any]] = {}

    def reset_long(self) -> None:
        """Forget the other values."""
        self.scalars_long: dict[str, Any] = {}
        self.multi_long: dict[str, Mapping[str, Any]] = {}
        self.images: dict[str, tuple[Any, str]] = {}
        self.pr: dict[str, tuple[Any, Any]] = {}
        self.histogram: dict[str, Any] = {}
        self.embedding: dict[str, tuple[Any, Any]] = {}
        self._objects: dict[str, Any] = {}  # for the log bus alone; writers have had them

    # What is given --------------------------------------------------------------------

    def update(self, k: str, v: Any, frequent: bool = False) -> None:
        """Keep a value until the next flush.

        Raises:
            TypeError: it is not one number.
        """
        (self.scalars_short if frequent else self.scalars_long)[k] = number(k, v)

    def update_multi(self, k: str, v: Mapping[str, Any], frequent: bool = False) -> None:
        """Keep several values of one name; the log bus gets each as `k/name`."""
        if not isinstance(v, Mapping):
            raise TypeError(f"update_multi({k!r}, …) takes a mapping of names to values, not a {type(v).__name__}")
        values = {name: number(f"{k}/{name}", value) for name, value in v.items()}
        (self.multi_short if frequent else self.multi_long)[k] = values

    def update_image(self, k: str, v: Any, dataformats: str = "HW") -> None:
        """Keep an image: an array or a tensor whose dimensions are "HW", "HWC" or "CHW"."""
        self.images[k] = (v, dataformats)

    def update_matplotlib_figure(self, fig: Any, tag: str) -> None:
        """Keep a figure of matplotlib, as the image that it is now."""
        figure: Any = tracking.prepared(fig)
        if figure is None or figure[0] != "image":
            raise TypeError(f"update_matplotlib_figure({tag!r}): a {type(fig).__name__} is no figure of matplotlib")
        self.update_image(tag, figure[1], "HWC")

    def update_pr(self, k: str, preds: Any, labels: Any) -> None:
        """Keep predictions of a binary classification beside their labels."""
        self.pr[k] = (preds, labels)

    def update_histogram(self, k: str, vals: Any, extend: bool = False) -> None:
        """Keep numbers, or with `extend` add them to those that there are."""
        self.histogram[k] = torch.cat((self.histogram[k], vals)) if extend and k in self.histogram else vals

    def update_embedding(self, k: str, embs: Any, labels: Any) -> None:
        """Keep vectors beside their labels."""
        self.embedding[k] = (embs, labels)

    def log_args(self, args: Mapping[str, Any]) -> None:
        """Log arguments."""
        for writer in self.writers:
            writer.log_args(args)
        self._objects["args"] = tracking.Table(["argument", "value"], [[k, str(v)] for k, v in args.items()])

    def log_graph(self, model: torch.nn.Module, device: Any) -> None:
        """Log the form of a model."""
        for writer in self.writers:
            writer.log_graph(model, device=device)
        self._objects["graph"] = str(model)

    def log_model(self, step: int, model: torch.nn.Module, force: bool = False, grad_scale: float = 1) -> None:
        """Log weights and gradients of a model, at multiples of `log_model_steps` or by `force`."""
        if step % self.args.log_model_steps and not force:
            return
        weights, grads = {}, {}
        for name, parameter in model.named_parameters():
            if self.args.exclude_list is None or not re.search(self.args.exclude_list, name):
                weights[name] = parameter.detach().view(-1)
                if parameter.grad is not None:
                    grads[name] = parameter.grad.detach().view(-1) / grad_scale
        for writer in self.writers:
            writer.log_model(weights, grads, step)
        for kind, norm, values in (("weights", "weight_norm", weights), ("grads", "grad_norm", grads)):
            self._log({f"{norm}/{name}": value.norm() for name, value in values.items()})
            for name, value in values.items():
                self._log_histogram(f"{kind}/{name}", value, step)

    # When it is flushed ---------------------------------------------------------------

    def log_stats(self, step: int, force: bool = False) -> None:
        """Flush frequent values, at multiples of `log_steps` or by `force`."""
        if step % self.args.log_steps and not force:
            return
        for writer in self.writers:
            self._write(writer, self.scalars_short, self.multi_short, step)
        self._log(flat(self.scalars_short, self.multi_short))
        self.reset_short()

    def log_long_stats(self, step: int) -> None:
        """Flush the values that are not frequent."""
        for writer in self.writers:
            self._write(writer, self.scalars_long, self.multi_long, step)
            for name, (image, dataformats) in self.images.items():
                writer.log_image(name, image, step, dataformats=dataformats)
            for name, (preds, labels) in self.pr.items():
                writer.log_pr_curve(name, preds=preds, labels=labels, step=step)
            for name, values in self.histogram.items():
                writer.log_histogram(name, values, step)
            for name, (vectors, labels) in self.embedding.items():
                writer.log_embedding(tag=name, mat=vectors, labels=labels, step=step)
        if (trainer := self.trainer) is not None:
            self._log(flat(self.scalars_long, self.multi_long))
            for name, value in self._held():
                trainer.log_object(name, value)
            for name, values in self.histogram.items():
                self._log_histogram(name, values, step)
        self.reset_long()

    def finish(self) -> None:
        """End all writers."""
        for writer in self.writers:
            writer.finish()

    @staticmethod
    def _write(writer: Writer, values: Mapping[str, Any], several: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            writer.log_scalar(name, value, step)
        for name, value in several.items():
            writer.log_multi(name, value, step)

    # The log bus ----------------------------------------------------------------------

    @property
    def trainer(self) -> Core | None:
        """The run under way in this process, if any."""
        under_way = [trainer for trainer in self._trainers if trainer.status == "running"]
        return under_way[-1] if under_way else None

    def _log(self, values: Mapping[str, Any]) -> None:
        trainer = self.trainer
        if trainer is not None and values:
            training = trainer.stage is Stage.TRAIN  # else ranks agree on a value that one of them has given
            with trainer.logs.suffixed(""):  # the names are the user's, whatever loader is evaluated
                trainer.log(reduce="last" if training else "mean", weighted_by=None if training else 1.0, **values)

    def _log_histogram(self, name: str, values: Any, step: int) -> None:
        if (trainer := self.trainer) is not None and step % self.writer_args.tb_log_hist_steps == 0:
            trainer.log_object(name, tracking.Histogram(values))

    def _held(self) -> Iterator[tuple[str, Any]]:
        """Give what is no number, in the forms of the log bus."""
        yield from self._objects.items()
        for name, (image, _) in self.images.items():
            yield name, tracking.Image(image)
        for name, (preds, labels) in self.pr.items():
            yield name, tracking.Table(["prediction", "label"], list(zip(plain(preds), plain(labels), strict=True)))
        for name, (vectors, labels) in self.embedding.items():
            rows = [[label, *vector] for vector, label in zip(plain(vectors), plain(labels), strict=True)]
            yield name, tracking.Table(["label", *map(str, range(len(rows[0]) - 1))], rows)


def number(name: str, value: Any) -> Any:
    """Return one number, without its graph.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach()
    if not isinstance(value, str | torch.Tensor) and getattr(value, "size", 1) == 1:
        try:
            float(value)
        except TypeError:
            pass
        else:
            return value
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(f"global_stats: {name!r} takes one number, not a {type(value).__name__}{shape}; reduce it first")


def flat(values: Mapping[str, Any], several: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return values by name; of several of one name, each by `name/its own`."""
    return {**values, **{f"{k}/{name}": value for k, parts in several.items() for name, value in parts.items()}}


def plain(values: Any) -> Any:
    """Return the items of a tensor, an array or a list."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


global_stats = BasicStats(StatInitArguments())
