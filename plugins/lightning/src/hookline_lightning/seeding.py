"""`seed_everything`: one seed for a script and for the runs that it makes."""

from __future__ import annotations

import logging
import os

from hookline import set_seed

log = logging.getLogger("hookline.lightning")


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python, numpy and torch, and the runs of each `Trainer` that is given no seed of its own.

    Args:
        seed: a number; by default that of the variable `PL_GLOBAL_SEED`, else 0.
        workers: has no meaning here: loading workers are seeded by the run in any case.
        verbose: log the seed.

    Raises:
        ValueError: a seed that is no whole number of 32 bits.
    """
    chosen = os.environ.get("PL_GLOBAL_SEED", "0") if seed is None else seed
    try:
        number = int(chosen)
    except ValueError:
        raise ValueError(f"seed_everything({chosen!r}): must be a whole number") from None
    if not 0 <= number < 2**32:
        raise ValueError(f"seed_everything({number}) must be from 0 to {2**32 - 1}")
    os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"] = str(number), str(int(workers))
    set_seed(number)
    if verbose:
        log.info("the seed is %d", number)
    return number
