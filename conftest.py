"""What all tests share: one thread each.

`pytest -n auto` has a worker per core already, so more threads would only fight; and bits are compared
between processes, which sum in the same order only with the same number of threads.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in processes that tests start
