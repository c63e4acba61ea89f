"""What plugins that watch a metric share: its values, which direction is better, and whether the metric exists."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookline.run import Run

MIN = {
    "loss", "losses", "error", "errors", "err", "cost", "regret", "nll", "ce", "bce", "xent", "crossentropy",
    "logloss", "hinge", "brier", "crps", "perplexity", "ppl", "bpb", "bpc", "bpd", "mse", "rmse", "msle", "rmsle",
    "mae", "mape", "smape", "wmape", "wape", "mase", "sse", "wer", "cer", "ter", "der", "eer", "fid", "kid",
    "lpips", "kl", "kld", "divergence", "distance", "ece", "mce",
}  # fmt: skip
"""Words of metrics that are better when lower."""
MAX = {
    "accuracy", "acc", "f1", "f2", "fbeta", "dice", "iou", "miou", "jaccard", "auc", "auroc", "rocauc", "aucroc",
    "auprc", "prauc", "aucpr", "ap", "map", "precision", "recall", "sensitivity", "specificity", "tpr", "tnr",
    "mcc", "matthews", "kappa", "r2", "corr", "correlation", "pearson", "spearman", "kendall", "concordance",
    "psnr", "ssim", "msssim", "snr", "sdr", "sisdr", "pesq", "stoi", "bleu", "sacrebleu", "rouge", "rougel",
    "rougelsum", "meteor", "chrf", "cider", "bertscore", "reward", "rewards", "return", "returns", "success",
    "ndcg", "mrr", "hit", "hits",
}  # fmt: skip
"""Words of metrics that are better when higher."""
TURNING = {
    "neg", "negative", "negated", "minus", "inv", "inverse", "inverted", "complement", "non", "not", "no", "std",
    "stdev", "variance", "gap", "drop", "diff", "difference", "delta", "change", "reduction", "improvement",
}  # fmt: skip
"""Words that turn a metric into another one, whose direction is unknown."""
STAGES = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "dev", "test"}

PIECE = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")


def mode_of(metric: str) -> str:
    """Return "min" or "max": the better direction of a metric, by the words of its name.

    The part after a slash is the key of a loader and does not count, unless all before it is the name of a stage.

    Raises:
        ValueError: no word decides, or words of both kinds, or a word that inverts the metric.
    """
    name = next((part for part in metric.split("/") if part.lower() not in STAGES), "")
    words = words_of(name)
    low, high, turning = sorted(words & MIN), sorted(words & MAX), sorted(words & TURNING)
    if bool(low) != bool(high) and not turning:
        return "min" if low else "max"
    said = [f"{word!r} speaks for min" for word in low] + [f"{word!r} for max" for word in high]
    why = ", ".join([*said, *(f"{word!r} for neither" for word in turning)]) or "no word of its name says so"
    raise ValueError(
        f"nobody knows whether the smallest or the largest value of {metric!r} is the best: {why}; "
        'give the option mode: "min" or "max"'
    )


def words_of(name: str) -> set[str]:
    """Return the words of a name in lower case, with and without trailing digits."""
    words: set[str] = set()
    for part in re.split(r"[\W_]+", name):
        pieces = [piece.lower() for piece in PIECE.findall(part)]
        whole = part.lower()
        for word in (whole, *pieces):
            words |= {word, word.rstrip("0123456789")}
    pieces = re.split(r"[\W_]+", name.lower())
    words |= {one + other for one, other in itertools.pairwise(pieces)}  # cross_entropy
    return words | ({"minus"} if re.search(r"(^|_)\W*1 *-", name) else set())  # 1-accuracy


class Watched:
    """A metric by which a plugin decides: its value at a boundary, equal on all ranks, and the best one so far.

    Evaluations have it. If its name begins with "train", it is one that training logs instead.

    Args:
        plugin: the name of the plugin, for messages about its options `metric`, `mode` and `min_delta`.
        metric: the name of the metric.
        mode: "min" or "max"; None: what the verb `get_mode` returns.
        min_delta: by how much a value must be better than the best one: a number, or a share of the best ("1%").

    Raises:
        ValueError: an option that cannot be.
    """

    def __init__(self, plugin: str, metric: str, mode: str | None, min_delta: Any) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f'{plugin}.metric={metric!r} must be the name of a metric, such as "val_loss"')
        if mode not in ("min", "max", None):
            raise ValueError(f"{plugin}.mode={mode!r} must be min or max, or null for what the name of the metric says")
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", min_delta) if isinstance(min_delta, str) else None
        absolute = type(min_delta) in (int, float) and 0 <= min_delta < math.inf
        if not (share or absolute):
            raise ValueError(f'{plugin}.min_delta={min_delta!r} must be a number from 0, or a share such as "1%"')
        self.metric, self.mode, self.of_training = metric, mode, metric.startswith("train")
        self.best: float | None = None
        """The best finite value so far; settable, from a state."""
        self._said = f"{plugin}.metric={metric!r}"
        self._share, self._absolute = (float(share[1]) / 100, 0.0) if share else (0.0, float(min_delta))
        self._heard: float | None = None

    def begin(self, trainer: Any) -> None:
        """Learn which direction is better, before the first step.

        Raises:
            ValueError: nobody knows.
        """
        if self.mode is None:
            try:
                self.mode = trainer.hook.get_mode(trainer=trainer, metric=self.metric)
            except ValueError as error:
                raise ValueError(f"{self._said}: {error}") from None

    def wanted(self) -> dict[str, str]:
        """Return what a wrapper of `get_watched_metrics` adds."""
        return {} if self.of_training else {self.metric: self._said}

    def hear(self, metrics: Mapping[str, float]) -> None:
        """Take what `on_log` gives, if the metric is one of training."""
        self._heard = metrics.get(self.metric, self._heard)

    def take(self, trainer: Any) -> float | None:
        """Return the value that is new at this boundary, or None; call it in `on_boundary`, on all ranks.

        If each rank has logged its own value in training, this is their mean.
        """
        if not self.of_training:
            return trainer.metrics.get(self.metric) if trainer.due("eval") else None
        if trainer.world_size > 1:  # a rank may have logged nothing, so counters decide when all exchange
            if not any(map(trainer.due, (trainer.options.log_every, "epoch", "eval"))):
                return None
            values = trainer.hook.all_gather(trainer=trainer, value=self._heard)
            self._heard = statistics.fmean(there) if (there := [v for v in values if v is not None]) else None
        value, self._heard = self._heard, None
        return value

    def improves(self, value: float) -> bool:
        """Tell whether a value is better than the best by more than `min_delta`; it is then the best."""
        best = self.best
        if not math.isfinite(value):
            return False
        if best is not None:
            gained = best - value if self.mode == "min" else value - best
            if gained <= max(self._absolute, self._share * abs(best)):
                return False
        self.best = value
        return True


def require_metrics(trainer: Run, metrics: Mapping[str, float], *, boundary: bool = False) -> None:
    """Raise if an evaluation lacks a metric of the verb `get_watched_metrics`, which a plugin or scheduler reads.

    Before the first step (`sanity_val_steps`, `eval_when_start`) it raises only if no plugin may log at the end of an
    evaluation, because such values do not exist yet.

    Args:
        trainer: the trainer of the evaluation.
        metrics: the metrics of the evaluation.
        boundary: it was the evaluation of this boundary, so save the state before raising.

    Raises:
        ValueError: the missing metric, and the existing ones.
    """
    if not (boundary or _complete(trainer)):
        return
    wanted = trainer.hook.get_watched_metrics(trainer=trainer)
    missing = [name for name in wanted if name not in metrics]
    if not missing:
        return
    reason = f"there is no metric {missing[0]!r}"
    saved = boundary and trainer.hook.save(trainer=trainer, reason=reason, state=None)
    raise ValueError(
        f"{wanted[missing[0]]}: the evaluation has no metric {missing[0]!r}; it has "
        f"{', '.join(metrics) or 'none'} (what a training step logs is not among it). Correct the name, or log this "
        f"value in every evaluation{f'; step {trainer.global_step} is saved, to go on with' if saved else ''}"
    )


def _complete(trainer: Run) -> bool:
    """Tell whether an evaluation's metrics are complete at its end: no plugin can log in `on_end_validation`."""
    hearers = next(row["done_by"] for row in trainer.plugins.plan() if row["hook"] == "on_end_validation")
    return all(getattr(trainer.plugins.get_plugin(name), "observer", False) is True for name in hearers)
