"""What `hookline fit` does before the first step, in counts: seconds are measured in benchmarks/."""

import json
import subprocess
import sys

import pytest

RUN = """
module: {_target_: hookline.testing.TinyModule}
trainer: {epochs: 1, max_steps: 1, train_batch_size: 8, device: cpu, evaluate_every: null, eval_when_finish: false}
plugins: {clip: {max_norm: 1.0}}
"""
FIT = """
import json, sys
import torch, torch._dynamo  # the second by torch's optimizers

before, read = set(sys.modules), []
sys.addaudithook(lambda event, given: read.append(str(given[0])) if event == "open" else None)
from hookline.cli import main

assert main(["fit", "run.yaml"]) == 0
modules = sorted(set(sys.modules) - before)
print(json.dumps({"modules": modules, "metadata": [path for path in read if path.endswith(("METADATA", "PKG-INFO"))]}))
"""


@pytest.mark.plugins
def test_fit_imports_what_it_needs_and_no_plugin_that_is_not_named(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    command = [sys.executable, "-W", "ignore", "-c", FIT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name in found["modules"] if name.startswith("hookline_")} == {"hookline_clip"}
    own = [name for name in found["modules"] if not name.startswith("hookline.testing")]  # where the module is from
    assert len(own) <= 200
    assert len(found["metadata"]) <= 3  # clip's, and of what clip requires: however many plugins are installed
