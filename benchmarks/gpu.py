"""All that needs a GPU, in less than ten minutes: tests of CUDA, nccl, host syncs, and figures beside loops by hand.

    python benchmarks/gpu.py [--out gpu.json] [--device cuda] [--small] [--part steps …]

Each part is a process of its own with a time limit of its own, so one that fails or hangs costs only itself. The
results are written as JSON after each part, and printed as a table. `--device cpu --small` rehearses it all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.installed import installed
from hookline.testing import assert_one_model, on_ranks, tiny_trainer, train_tiny
from hookline.testing.checks.devices import Quiet

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_cuda.py",
    "plugins/amp/tests/test_amp.py",
    "plugins/cudagraph/tests/test_cudagraph.py::test_on_a_device_replayed_steps_train_what_python_does",
    "plugins/ema/tests/test_ema.py::test_an_average_that_comes_back_goes_where_the_weights_are",
    "plugins/memory/tests/test_memory.py::test_the_peak_of_a_phase_on_a_gpu",
    "plugins/monitor/tests/test_monitor.py::test_figures_of_gpus",
)
PEAKS = {  # FLOP/s in bfloat16 of dense matrices, of the makers' data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12, "V100": 125e12,
}  # fmt: skip


class Clock:
    """A loader that gives one batch again and again, and takes the time of all steps behind the warm-up."""

    def __init__(self, batch: Any, warm: int, timed: int) -> None:
        self.batch, self.warm, self.timed = batch, warm, timed
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.warm + self.timed

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            if number == self.warm:
                begun = self._now()
            yield self.batch
        self.seconds = (self._now() - begun) / self.timed

    def _now(self) -> float:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Module(ModuleInterface):
    """A network that returns its loss, on the batches of a clock."""

    def __init__(self, make: Callable[[], nn.Module], clock: Clock, capturable: bool) -> None:
        super().__init__()
        self.net, self.clock, self.capturable = make(), clock, capturable

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.net(*batch)

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        return self.clock

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        return [torch.optim.AdamW(self.parameters(), 1e-4, capturable=self.capturable)], []


def by_hand(make: Callable[[], nn.Module], clock: Clock, device: str, options: Any = None, half: bool = False) -> None:
    """Train as a script would; `options` are those of `torch.compile`, None for none."""
    net: Any = make().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    step = net if options is None else torch.compile(net, **options)
    for batch in clock:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = step(*batch)
        loss.backward()
        if half:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_hookline(
    make: Callable[[], nn.Module], clock: Clock, device: str, plugins: Any, capturable: bool = False
) -> None:
    Trainer(Module(make, clock, capturable), plugins, train_batch_size=len(clock.batch[0]), device=device).train()


# Parts --------------------------------------------------------------------------------


def tests(device: str, small: bool) -> dict[str, Any]:
    """Run all tests that need CUDA; `small` only collects them."""
    words = ["--collect-only"] if small else ["-rs"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *words, *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join([*failed, lines[-1]]))
    return {"pytest": lines[-1].strip("= ")}


def ranks(device: str, small: bool) -> dict[str, Any]:
    """Train by ddp on one rank, and on two where there are two devices; over nccl with CUDA, else over gloo."""
    alone = train_tiny({}, device=device, epochs=1)
    found: dict[str, Any] = {}
    for size in range(1, 1 + min(2, torch.cuda.device_count() if device == "cuda" else 2)):
        assert_one_model(on_ranks(train_tiny, size, {"ddp": {}}, device=device, epochs=1), alone, rtol=1e-3)
        found[f"{size} rank(s)"] = on_ranks(all_reduce, size, device, 2**10 if small else 2**26)[0]
    return found


def all_reduce(device: str, size: int) -> dict[str, Any]:
    """Return the backend and how many bytes a second are summed, on this rank."""
    backend, rank = ("nccl" if device == "cuda" else "gloo"), int(os.environ["RANK"])
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    world = int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(backend, rank=rank, world_size=world)
    try:
        numbers = torch.ones(size // 4, device=where)
        for turn in range(6):
            if turn == 1:
                numbers[0].item()
                begun = time.perf_counter()
            torch.distributed.all_reduce(numbers)
        assert numbers[0].item() == world**6
        return {"backend": backend, "GB/s": 5 * size / (time.perf_counter() - begun) / 1e9}
    finally:
        torch.distributed.destroy_process_group()


class Watching(CallbackInterface):
    """Lets CUDA warn of what waits for it, in steps that log and save nothing."""

    @hookimpl
    def on_end_train_step(self, trainer: Trainer, global_step: int) -> None:
        if trainer.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if 3 <= global_step < 12 else "default")


def syncs(device: str, small: bool) -> dict[str, Any]:
    """Count how often nine ordinary steps wait for the device, by plugin; `hookline.testing.fake_cuda` says 0."""
    sets: dict[str, Any] = {name: {name: {}} for name in ("amp", "ema", "finite", "metrics", "progress", "watchdog")}
    sets |= {"none": {}, "clip": {"clip": {"max_norm": 1.0}}, "fp16": {"amp": {"precision": "fp16"}}}
    found = {}
    for name, plugins in list(sets.items())[-3 if small else 0 :]:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            options = {"device": device, "runs_folder": folder, "log_every": "1 epoch", "epochs": 1}
            tiny_trainer({**plugins, "watching": Watching()}, Quiet(samples=120), **options).train()
        found[name] = sum("synchronizing" in str(one.message) for one in said)
    return found


class Mlp(nn.Module):
    """The 32-64-10 perceptron with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.layers(inputs), targets)


def steps(device: str, small: bool) -> dict[str, Any]:
    """Return microseconds of a step of a small model, and their ratios to the eager loop by hand."""
    batch = torch.randn(32, 32, device=device), torch.randint(0, 10, (32,), device=device)
    compiled = {"backend": "eager"} if small else {"mode": "reduce-overhead"}
    rows: dict[str, Callable[[Clock], None]] = {
        "by hand": lambda clock: by_hand(Mlp, clock, device),
        "hookline": lambda clock: by_hookline(Mlp, clock, device, {}),
        "by hand, compiled": lambda clock: by_hand(Mlp, clock, device, compiled),
        "hookline, compiled": lambda clock: by_hookline(Mlp, clock, device, {"compile": compiled}),
    }
    if "cudagraph" in installed() and device == "cuda":
        rows["hookline, cudagraph"] = lambda clock: by_hookline(Mlp, clock, device, {"cudagraph": {}}, True)
    return in_turns(rows, partial(Clock, batch, *((5, 10) if small else (100, 1000))), 1 if small else 3)


def in_turns(rows: dict[str, Callable[[Clock], None]], clock: Callable[[], Clock], turns: int) -> dict[str, Any]:
    """Return the median microseconds of a step by row, and their ratio to the first row; a row that fails says why."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    failed: dict[str, str] = {}
    for _ in range(turns):
        for name, run in rows.items():
            if name not in failed:
                torch.compiler.reset()
                timed = clock()
                try:
                    run(timed)
                except Exception as error:
                    failed[name] = f"failed: {type(error).__name__}: {error}"[:300]
                times[name].append(timed.seconds * 1e6)
    middle = {name: statistics.median(taken) for name, taken in times.items() if name not in failed}
    first = middle.get(next(iter(rows)), math.nan)
    figures = {name: {"us": us, "ratio": us / first, "least": min(times[name])} for name, us in middle.items()}
    return {name: failed.get(name) or figures[name] for name in rows}


class Gpt(nn.Module):
    """A GPT-2 with its loss: of 124 million parameters by default."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, words: int = 50304, context: int = 1024):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.words(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """Attention over what came before, then two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


def gpt(device: str, small: bool) -> dict[str, Any]:
    """Return tokens a second, MFU and the peak of memory of a GPT in bf16, compiled, by hand and by hookline."""
    make = partial(Gpt, 32, 2, 2, 100, 16) if small else Gpt
    size, context, words = (2, 16, 100) if small else (16, 1024, 50304)
    tokens = torch.randint(0, words, (size, context + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    options = {"backend": "eager"} if small else {}
    plugins = {"amp": {"precision": "bf16"}, "clip": {"max_norm": 1.0}, "compile": options}
    peaks: dict[str, float] = {}

    def measured(name: str, run: Callable[[Clock], None], clock: Clock) -> None:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run(clock)
        if device == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30

    rows = {
        "by hand": lambda clock: by_hand(make, clock, device, options, half=True),
        "hookline": lambda clock: by_hookline(make, clock, device, plugins),
    }
    timed = {name: partial(measured, name, run) for name, run in rows.items()}
    found = in_turns(timed, partial(Clock, batch, *((1, 2) if small else (5, 30))), 1 if small else 2)
    net = make()
    weights, width = sum(one.numel() for one in net.parameters()), net.places.embedding_dim
    flops = 6 * (weights - net.places.weight.numel()) + 12 * len(net.blocks) * width * context  # of a token
    peak = peak_of(device)
    for name in [name for name, row in found.items() if isinstance(row, dict)]:
        a_second = size * context / found[name]["us"] * 1e6
        mfu = {} if peak is None else {"MFU": flops * a_second / peak, "peak FLOP/s": peak}
        found[name] |= {"tokens/s": a_second, "peak GiB": peaks.get(name), **mfu}
    return {"parameters": weights, **found}


def peak_of(device: str) -> float | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if all(word in name for word in known.split())), None)


PARTS = {tests: 150, ranks: 90, syncs: 40, steps: 100, gpt: 190}
"""What is run, in this order, and the seconds that each may take."""


# Running them -------------------------------------------------------------------------


def run_part(name: str, limit: float, words: list[str]) -> dict[str, Any]:
    """Run a part in a process of its own; return its figures, or why there are none."""
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name, *words]
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **piped) as child:
        try:
            out, said = child.communicate(timeout=limit)
            done = {"failed": said[-2000:]} if child.returncode else {"figures": json.loads(out.splitlines()[-1])}
        except subprocess.TimeoutExpired:
            done = {"failed": f"it has not ended after {limit} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it has started too
                os.killpg(child.pid, signal.SIGKILL)
    return {"seconds": round(time.monotonic() - begun, 1), **done}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['device']}, torch {results['torch']}, {results['date']}",
        "",
        "| part | what | figures |",
        "|---|---|---|",
    ]
    for part, done in results["parts"].items():
        rows = done.get("figures") or {"failed": done["failed"].strip().splitlines()[-1]}
        for what, row in rows.items():
            told = ", ".join(f"{key} {_short(value)}" for key, value in row.items()) if isinstance(row, dict) else row
            lines.append(f"| {part} | {what} | {told} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="gpu.json", help="where the results are written")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="rehearse: few steps, tiny models, tests collected only")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--part", nargs="*", default=names, choices=names, help="run these alone")
    parser.add_argument("--only", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    words = ["--device", options.device, *(["--small"] if options.small else [])]
    if options.only:
        (part,) = (one for one in PARTS if one.__name__ == options.only)
        print(json.dumps(part(options.device, options.small)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; rehearse with --device cpu --small")
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "torch": torch.__version__,
        "parts": {},
    }
    for part, limit in PARTS.items():
        if part.__name__ in options.part:
            results["parts"][part.__name__] = run_part(part.__name__, limit, words)
            Path(options.out).write_text(json.dumps(results, indent=1))
    print(table(results))
    sys.exit("failed" in json.dumps(results["parts"]))


if __name__ == "__main__":
    main()
