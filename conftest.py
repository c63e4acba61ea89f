"""What all tests share: one thread each, and how many workers `pytest -n auto` has.

The workers keep the cores busy, so more threads would only fight; and bits are compared between processes, which sum
in the same order only with the same number of threads.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in processes that tests start

import pytest
import torch


def pytest_xdist_auto_num_workers():
    """Have one worker more than cores: a third of the time tests wait for processes, servers and timeouts."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True)
def no_dispatch_mode_is_left():
    """Fail a test that leaves a mode behind, which would see and slow every operation of the tests after it."""
    yield
    assert torch._C._len_torch_dispatch_stack() == 0
