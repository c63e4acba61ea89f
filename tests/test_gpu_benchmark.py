"""The script for a machine with a GPU, rehearsed without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import gpu

pytestmark = pytest.mark.plugins
ROOT = Path(__file__).parent.parent


def test_all_parts_together_take_less_than_ten_minutes():
    assert sum(gpu.PARTS.values()) < 600


def test_every_test_that_needs_a_gpu_is_run():
    homes = {name.partition("::")[0] for name in gpu.TESTS}
    files = [*ROOT.glob("tests/test_*.py"), *ROOT.glob("plugins/*/tests/test_*.py")]
    reasons = [f'reason="{words}"' for words in ("needs CUDA", "needs a GPU", "needs two CUDA devices")]
    needing = {str(path.relative_to(ROOT)) for path in files if any(one in path.read_text() for one in reasons)}
    assert needing - {str(Path(__file__).relative_to(ROOT))} == homes


@pytest.mark.parametrize("part", [gpu.steps, gpu.gpt])
def test_figures_are_taken_beside_the_loop_by_hand(part):
    figures = {name: row for name, row in part("cpu", True).items() if name != "parameters"}
    assert {"by hand", "hookline"} <= figures.keys()
    assert figures["by hand"]["ratio"] == 1
    assert all(row["us"] > 0 for row in figures.values())


def test_a_row_that_fails_costs_only_itself():
    def fail(clock):
        raise ValueError("no kernel")

    batch = gpu.torch.ones(1), gpu.torch.ones(1)
    found = gpu.in_turns({"fails": fail, "runs": list}, lambda: gpu.Clock(batch, 1, 1), 2)
    assert found["fails"] == "failed: ValueError: no kernel"
    assert found["runs"]["us"] > 0


def test_the_model_has_124_million_parameters():
    with gpu.torch.device("meta"):
        assert sum(one.numel() for one in gpu.Gpt().parameters()) == 124_373_760


def test_a_part_that_hangs_or_fails_costs_only_itself():
    hung = gpu.run_part("gpt", 0.2, ["--device", "cpu", "--small"])
    assert hung["failed"] == "it has not ended after 0.2 s"
    assert hung["seconds"] < 10
    results = {
        "device": "none",
        "torch": "2",
        "date": "today",
        "parts": {"gpt": hung, "syncs": {"figures": {"amp": 0}}},
    }
    assert gpu.table(results).splitlines()[-2:] == [
        "| gpt | failed | it has not ended after 0.2 s |",
        "| syncs | amp | 0 |",
    ]


@pytest.mark.parametrize("parts", [["syncs"], pytest.param(["tests", "ranks"], marks=pytest.mark.slow)])
def test_the_command_is_rehearsed(parts, tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu.py",
        "--device",
        "cpu",
        "--small",
        "--out",
        tmp_path / "gpu.json",
    ]
    done = subprocess.run([*command, "--part", *parts], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results["parts"]) == parts
    assert all(done["figures"] for done in results["parts"].values())
    assert f"| {parts[0]} |" in done.stdout
