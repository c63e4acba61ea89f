"""What `logger.experiment` is: the calls of each service's own object, led to all trackers of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hookline.tracking import Histogram, Image, Table


def as_object(value: Any) -> Any:
    """Return what trackers take of an image, a table, a figure, a path or a text in the form of a service.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, (str, Path, Image, Histogram, Table)):
        return value
    if hasattr(value, "columns") and hasattr(value, "data"):  # a table of wandb
        return Table(list(value.columns), list(value.data))
    if hasattr(value, "image") and hasattr(value.image, "getbands"):  # an image of wandb
        return value.image
    if hasattr(value, "savefig") or hasattr(value, "getbands"):
        return value
    if hasattr(value, "shape") and len(value.shape) in (2, 3):
        return Image(_channels(value))
    raise TypeError(f"a {type(value).__name__} is nothing that trackers take: texts, images, figures, tables and paths")


def _channels(pixels: Any, form: str = "") -> Any:
    """Return pixels with one channel or three; `form` names the dimensions."""
    pixels = torch.as_tensor(pixels)
    if form and form != "HW" and "C" in form:
        pixels = pixels.permute([form.index(axis) for axis in "CHW"])
    if pixels.dim() == 3 and pixels.shape[0] in (1, 4):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels[:3]
    elif pixels.dim() == 3 and pixels.shape[2] in (1, 4):
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3]
    return pixels


class Config(dict[str, Any]):
    """Parameters of the run, as a service has them: what is put into it is logged."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self.logger = logger

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, *given: Any, allow_val_change: bool = True, **more: Any) -> None:
        """Take parameters."""
        taken = {**(dict(given[0]) if given else {}), **more}
        super().update(taken)
        self.logger.log_hyperparams(taken)


class Experiment:
    """The calls that are the same in several services."""

    service = "the trackers"

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        known = [one for one in dir(type(self)) if not one.startswith("_") and one != "service"]
        raise AttributeError(
            f"experiment.{name} of {self.service} is not here; there is {', '.join(known)}. Figures, images, tables, "
            "texts and files go to all trackers by self.trainer.core.log_object(name, value)"
        )

    def _value(self, name: str, value: Any, step: Any = None) -> None:
        self._logger.log_metrics({name: value}, step)

    def _object(self, name: str, value: Any) -> None:
        self._logger.log_object(name, as_object(value))

    def flush(self) -> None:
        """Do nothing: what is logged is written in the background."""

    def close(self) -> None:
        """Do nothing: the run closes its trackers."""


class OfCsv(Experiment):
    """As the experiment of Lightning's CSVLogger."""

    service = "CSVLogger"

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Log values."""
        self._logger.log_metrics(metrics_dict, step)

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Log parameters."""
        self._logger.log_hyperparams(params)

    def save(self) -> None:
        """Do nothing: what is logged is written in the background."""


class OfTensorBoard(Experiment):
    """As a `SummaryWriter`."""

    service = "SummaryWriter"

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, *_: Any, **__: Any) -> None:
        """Log a value."""
        self._value(tag, scalar_value, global_step)

    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: Any = None, *_: Any, **__: Any
    ) -> None:
        """Log values below a name."""
        for name, value in tag_scalar_dict.items():
            self._value(f"{main_tag}/{name}", value, global_step)

    def add_image(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "CHW"
    ) -> None:
        """Log an image."""
        self._object(tag, Image(_channels(img_tensor, dataformats)))

    def add_images(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "NCHW"
    ) -> None:
        """Log images, side by side."""
        images = [_channels(one, dataformats.removeprefix("N")) for one in torch.as_tensor(img_tensor)]
        self._object(tag, Image(torch.cat(images, dim=-1)))

    def add_figure(self, tag: str, figure: Any, *_: Any, **__: Any) -> None:
        """Log a figure of matplotlib, or several."""
        for number, one in enumerate(figure if isinstance(figure, list) else [figure]):
            self._object(tag if number == 0 else f"{tag}/{number}", one)

    def add_text(self, tag: str, text_string: str, *_: Any, **__: Any) -> None:
        """Log a text."""
        self._object(tag, str(text_string))

    def add_histogram(self, tag: str, values: Any, *_: Any, **__: Any) -> None:
        """Log the distribution of numbers."""
        self._object(tag, Histogram(values))

    def add_hparams(self, hparam_dict: Mapping[str, Any], metric_dict: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Log parameters and values."""
        self._logger.log_hyperparams(hparam_dict, metric_dict)

    def add_graph(self, *_: Any, **__: Any) -> None:
        """Say that no tracker takes it."""
        self._logger.log_graph(None)


class OfWandb(Experiment):
    """As a run of wandb."""

    service = "a run of wandb"

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.config = Config(logger)
        self.summary = Config(logger)

    @property
    def id(self) -> str:
        """Of the run."""
        return str(self._logger.version)

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self._logger.name)

    def log(self, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        """Log numbers, images, tables and texts."""
        for name, value in data.items():
            number = isinstance(value, (int, float)) or (hasattr(value, "item") and not getattr(value, "shape", ()))
            if number:
                self._value(name, value, step)
            elif isinstance(value, (list, tuple)):
                for place, one in enumerate(value):
                    self._object(f"{name}/{place}", one)
            else:
                self._object(name, value)

    def watch(self, *_: Any, **__: Any) -> None:
        """Say that no tracker does it."""
        self._logger.watch(None)

    def finish(self, *_: Any, **__: Any) -> None:
        """Do nothing: the run closes its trackers."""


class OfMlflow(Experiment):
    """As a client of MLflow, whose calls begin with the id of the run."""

    service = "a client of MLflow"

    def log_metric(self, run_id: str, key: str, value: Any, timestamp: Any = None, step: Any = None, **_: Any) -> None:
        """Log a value."""
        self._value(key, value, step)

    def log_param(self, run_id: str, key: str, value: Any, **_: Any) -> None:
        """Log a parameter."""
        self._logger.log_hyperparams({key: value})

    def set_tag(self, run_id: str, key: str, value: Any, **_: Any) -> None:
        """Log a text."""
        self._object(key, str(value))

    def log_artifact(self, run_id: str, local_path: Any, artifact_path: str | None = None) -> None:
        """Log a file."""
        self._object(artifact_path or Path(local_path).name, Path(local_path))

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Log a text."""
        self._object(artifact_file, text)

    def log_figure(self, run_id: str, figure: Any, artifact_file: str, **_: Any) -> None:
        """Log a figure."""
        self._object(artifact_file, figure)

    def log_image(
        self, run_id: str, image: Any, artifact_file: str | None = None, key: str | None = None, **_: Any
    ) -> None:
        """Log an image."""
        self._object(key or artifact_file or "image", image)


class OfComet(Experiment):
    """As an experiment of Comet."""

    service = "an experiment of Comet"

    def log_metric(self, name: str, value: Any, step: Any = None, **_: Any) -> None:
        """Log a value."""
        self._value(name, value, step)

    def log_metrics(self, dic: Mapping[str, Any], prefix: str | None = None, step: Any = None, **_: Any) -> None:
        """Log values."""
        for name, value in dic.items():
            self._value(f"{prefix}_{name}" if prefix else name, value, step)

    def log_parameter(self, name: str, value: Any, **_: Any) -> None:
        """Log a parameter."""
        self._logger.log_hyperparams({name: value})

    def log_parameters(self, parameters: Mapping[str, Any], **_: Any) -> None:
        """Log parameters."""
        self._logger.log_hyperparams(parameters)

    def log_image(self, image_data: Any, name: str | None = None, **_: Any) -> None:
        """Log an image."""
        self._object(name or "image", image_data)

    def log_figure(self, figure_name: str | None = None, figure: Any = None, **_: Any) -> None:
        """Log a figure."""
        self._object(figure_name or "figure", figure)

    def log_text(self, text: str, **_: Any) -> None:
        """Log a text."""
        self._object("text", text)

    def log_asset(self, file_data: Any, file_name: str | None = None, **_: Any) -> None:
        """Log a file."""
        self._object(file_name or Path(file_data).name, Path(file_data))

    def log_histogram_3d(self, values: Any, name: str | None = None, **_: Any) -> None:
        """Log the distribution of numbers."""
        self._object(name or "histogram", Histogram(values))

    def end(self) -> None:
        """Do nothing: the run closes its trackers."""


class OfAny(OfTensorBoard, OfWandb, OfCsv):
    """The calls of TensorBoard, of wandb and of CSV, where no logger says which it is."""

    service = "the trackers"


class OfNone(Experiment):
    """Takes any call and does nothing, as in a `fast_dev_run`."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None
