"""Two ranks train one model, with the plugin on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hookline.testing.checks.probes import Mean, Meeting
from hookline.testing.checks.subject import Subject, check
from hookline.testing.digest import digest
from hookline.testing.ranks import run_ranks
from hookline.testing.tiny import PlainModule, tiny_trainer

SECONDS = 60


@check("two ranks train the same weights, end with the same state, and none waits for another in vain", quick=False)
def check_ranks(subject: Subject) -> None:
    """Train on two ranks; ask one rank alone for the plugin's state."""
    try:
        outcomes = run_ranks(_train, 2, subject.make, dict(subject.options), timeout=SECONDS)
    except TimeoutError as error:
        text = f"two ranks have not ended after {SECONDS} s: one waits for what the other does not call. {error}"
        raise AssertionError(text) from error
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} ended with {outcome.code}:\n{outcome.output[-1500:]}"
    weights, states, metrics = zip(*(outcome.value for outcome in outcomes), strict=True)
    assert len(set(weights)) == 1, "ranks train different weights: something is drawn or decided on each rank by itself"
    assert len(set(metrics)) == 1, "ranks have different metrics"
    assert len(set(states) - {None}) < 2, (
        "ranks end with different states of the plugin, and that of rank 0 is saved for all: make it the same, or say "
        "state_of_rank = True"
    )


def _train(make: Callable[[], Any], options: Mapping[str, Any]) -> tuple[str, str | None, str]:
    torch.set_num_threads(1)
    plugin = make()
    options = {**options, "train_batch_size": 12, "epochs": 1}
    trainer = tiny_trainer([*_beside(make), plugin], PlainModule(), **options)
    trainer.train()
    if trainer.rank == 0:
        plugin.get_state()  # a tracker, a picture of the run: one rank may ask alone
    equal = [kept for _, one, kept in trainer.plugins.states() if one is plugin and not one.state_of_rank]
    state = digest(equal[0]) if equal else None  # an observer may have left all ranks but the first
    return digest(trainer.export_model()), state, digest(dict(trainer.metrics))


def _beside(make: Callable[[], Any]) -> list[Any]:
    """Return what makes one training of two ranks, but for what the plugin or what it requires does itself."""
    performed = tiny_trainer([make()]).plugins.performers
    return [*([] if performed("get_ranks") else [Meeting()]), *([] if performed("shard_model") else [Mean()])]
