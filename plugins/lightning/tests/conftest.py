"""The seed of `seed_everything` lies in the environment: each test begins without one and leaves none."""

import os

import pytest


def forget():
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _no_seed():
    forget()
    yield
    forget()
