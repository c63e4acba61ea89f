"""Writers, which keep what stats are given: those of the user's own, and the one that prints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hookline_pymarlin.loggers import getlogger


@dataclass
class WriterInitArguments:
    """Where and how the writers that have a name write."""

    tb_log_dir: str = "logs"
    """Of TensorBoard, in the folder of the run."""
    tb_logpath_parent_env: str | None = None
    """An environment variable with a folder for `tb_log_dir`; refused if it is set."""
    tb_log_multi: bool = False
    """One chart for all values of `update_multi`; refused: each has a chart of its own."""
    tb_log_hist_steps: int = 20000
    """Histograms go to TensorBoard and the run's record at multiples of this number of steps alone."""
    model_log_level: str = "INFO"
    """Without effect, as in PyMarlin, whose stdout logs a model at a level that it does not show."""

    def __post_init__(self) -> None:
        if self.tb_log_multi:
            raise ValueError(
                "tb_log_multi=True is not done here: each value of update_multi(k, {name: value}) is a curve k/name; "
                "leave tb_log_multi away, and choose them in TensorBoard by the prefix k/"
            )


class Writer:
    """A writer of your own: override what it can keep. It is called on rank 0 alone, within the step."""

    logger: logging.Logger | None = None

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self.logger = logger

    def log_scalar(self, k: str, v: Any, step: int) -> None:
        """Keep a value."""

    def log_multi(self, k: str, v: Mapping[str, Any], step: int) -> None:
        """Keep several values of one name."""

    def log_model(self, flat_weights: Mapping[str, Any], flat_grads: Mapping[str, Any], step: int) -> None:
        """Keep the weights and the gradients of a model, each as a vector."""

    def log_args(self, args: Mapping[str, Any]) -> None:
        """Keep arguments."""

    def log_graph(self, model: Any, device: Any = None) -> None:
        """Keep the form of a model."""

    def log_image(self, k: str, v: Any, step: int, dataformats: str = "HW") -> None:
        """Keep an image."""

    def log_pr_curve(self, k: str, preds: Any, labels: Any, step: int) -> None:
        """Keep predictions beside their labels."""

    def log_histogram(self, param_name: str, vals: Any, step: int) -> None:
        """Keep numbers."""

    def log_embedding(self, tag: str, mat: Any, labels: Any, step: int) -> None:
        """Keep vectors beside their labels."""

    def log_multi_line(self, string: str) -> None:
        """Log a text by its lines."""
        for line in string.split("\n"):
            (self.logger or getlogger(__name__)).info(line)

    def flush(self) -> None:
        """Write what has been kept back; only you call it."""

    def finish(self) -> None:
        """End; `global_stats.finish()` calls it."""


class Stdout(Writer):
    """Prints values, one a line."""

    def __init__(self, args: WriterInitArguments | None = None) -> None:
        super().__init__(getlogger(__name__))

    def log_scalar(self, k: str, v: Any, step: int) -> None:
        """Print a value."""
        getlogger(__name__).info("step = %d, %s : %s", step, k, v)

    log_multi = log_scalar

    def log_graph(self, model: Any, device: Any = None) -> None:
        """Print a model."""
        self.log_multi_line(str(model))
