"""What is common to all who look for the best value of a metric: which way is better, and that it is there at all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookline.run import Run

MIN = {
    "loss", "losses", "error", "errors", "err", "cost", "regret", "nll", "ce", "bce", "xent", "crossentropy",
    "logloss", "hinge", "brier", "crps", "perplexity", "ppl", "bpb", "bpc", "bpd", "mse", "rmse", "msle", "rmsle",
    "mae", "mape", "smape", "wmape", "wape", "mase", "sse", "wer", "cer", "ter", "der", "eer", "fid", "kid",
    "lpips", "kl", "kld", "divergence", "distance", "ece", "mce",
}  # fmt: skip
"""Words of metrics whose smallest value is the best."""
MAX = {
    "accuracy", "acc", "f1", "f2", "fbeta", "dice", "iou", "miou", "jaccard", "auc", "auroc", "rocauc", "aucroc",
    "auprc", "prauc", "aucpr", "ap", "map", "precision", "recall", "sensitivity", "specificity", "tpr", "tnr",
    "mcc", "matthews", "kappa", "r2", "corr", "correlation", "pearson", "spearman", "kendall", "concordance",
    "psnr", "ssim", "msssim", "snr", "sdr", "sisdr", "pesq", "stoi", "bleu", "sacrebleu", "rouge", "rougel",
    "rougelsum", "meteor", "chrf", "cider", "bertscore", "reward", "rewards", "return", "returns", "success",
    "ndcg", "mrr", "hit", "hits",
}  # fmt: skip
"""Words of metrics whose largest value is the best."""
TURNING = {
    "neg", "negative", "negated", "minus", "inv", "inverse", "inverted", "complement", "non", "not", "no", "std",
    "stdev", "variance", "gap", "drop", "diff", "difference", "delta", "change", "reduction", "improvement",
}  # fmt: skip
"""Words that make another metric of one, of which nothing is known."""
STAGES = {"train", "training", "val", "valid", "validation", "eval", "evaluation", "dev", "test"}

PIECE = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")


def mode_of(metric: str) -> str:
    """Return "min" or "max": whether the smallest or the largest value of a metric is the best, by its name's words.

    What stands behind a slash is the key of a loader and says nothing, unless all before it is the name of a stage.

    Raises:
        ValueError: no word says so, or words of both kinds, or one that turns the metric round.
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
    """Return the words of a name in lower case, with and without the digits at their end."""
    words: set[str] = set()
    for part in re.split(r"[\W_]+", name):
        pieces = [piece.lower() for piece in PIECE.findall(part)]
        whole = part.lower()
        for word in (whole, *pieces):
            words |= {word, word.rstrip("0123456789")}
    pieces = re.split(r"[\W_]+", name.lower())
    words |= {one + other for one, other in itertools.pairwise(pieces)}  # cross_entropy
    return words | ({"minus"} if re.match(r"\W*1 *-", name) else set())  # 1-accuracy


def require_metrics(
    trainer: Run, metrics: Mapping[str, float], wanted: Mapping[str, str], *, boundary: bool = False
) -> None:
    """Refuse to go on where an evaluation has not what somebody looks at.

    Before the first step (`sanity_val_steps`, `eval_when_start`) only where nobody logs when an evaluation is over, as
    what comes then is not there yet.

    Args:
        trainer: whose evaluation it was.
        metrics: what it gave.
        wanted: by metric who looks at it: `{"val_acc": "checkpoint.monitor"}`.
        boundary: it was the evaluation of this boundary, so the state is saved before anything is raised.

    Raises:
        ValueError: which is missing, and what there is.
    """
    missing = [name for name in wanted if name not in metrics]
    if not missing or not (boundary or _complete(trainer)):
        return
    reason = f"there is no metric {missing[0]!r}"
    saved = boundary and trainer.hook.save(trainer=trainer, reason=reason, state=None)
    raise ValueError(
        f"{wanted[missing[0]]}: the evaluation has no metric {missing[0]!r}; it has "
        f"{', '.join(metrics) or 'none'} (what a training step logs is not among it). Correct the name, or log this "
        f"value in every evaluation{f'; step {trainer.global_step} is saved, to go on with' if saved else ''}"
    )


def _complete(trainer: Run) -> bool:
    """Tell whether all that an evaluation logs is there when it is over: nobody logs when he hears so."""
    hearers = next(row["done_by"] for row in trainer.plugins.plan() if row["hook"] == "on_end_validation")
    return all(getattr(trainer.plugins.get_plugin(name), "observer", False) is True for name in hearers)
