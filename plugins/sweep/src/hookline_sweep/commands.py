"""The command `hookline sweep`: each trial is a `hookline fit` in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml

from hookline import config
from hookline.commands import add_configuration, mendable, new_parser, read_configuration
from hookline.files import make_folder, replacing
from hookline_sweep import TRIAL, report
from hookline_sweep.space import first, overrides, split
from hookline_sweep.study import NAME, PRUNERS, SAMPLERS, Claims, Told, locked, storage_of

EXAMPLES = """\
Values of the search: KEY=uniform(LOW,HIGH), loguniform, int, logint (both ends included), or KEY=choice(A,B,…).

examples:
  hookline sweep run.yaml --trials 20 'module.lr=loguniform(1e-4,1e-1)' 'trainer.train_batch_size=choice(8,16,32)'
  hookline sweep run.yaml --trials 40 'module.lr=loguniform(1e-4,1e-1)' ...    the same sweep, 20 trials more
  hookline sweep run.yaml 'plugins.clip.max_norm=uniform(0.1,2)' --metric val_accuracy --sampler random --pruner none
"""
DIRECTIONS = {"min": optuna.study.StudyDirection.MINIMIZE, "max": optuna.study.StudyDirection.MAXIMIZE}
KEPT = "sweep.yaml"  # what the sweep was begun with


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code.

    Raises:
        ValueError: what the user can mend.
    """
    options = _parser().parse_intermixed_args(words)
    space, others = split(options.overrides)
    searched = [word.partition("=") for word in options.overrides if word not in others]
    options.overrides = others
    if options.trials < 1:
        raise ValueError(f"--trials={options.trials} must be at least 1")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    asked = _asked(options, overrides(first(space)))
    asked["search"] = {key: text for key, _, text in searched}
    options.folder = Path(options.folder or f"sweeps/{asked['config']['trainer']['run_name']}").absolute()
    options.metric = asked["metric"]
    make_folder(options.folder)
    with locked(options.folder):
        storage = storage_of(options.folder)
        _keep(options.folder / KEPT, asked)
        study = optuna.create_study(
            study_name=NAME,
            storage=storage,
            direction=DIRECTIONS[asked["mode"]],
            pruner=PRUNERS[options.pruner](),
            load_if_exists=True,
        )
    claims = Claims(study, storage, options.folder, space, options.sampler, options.seed)
    with report.Record(study, options.folder, options.metric, asked) as record:
        while claimed := claims.claim(options.trials):
            try:
                code = _run(options, Told(storage, claimed.number, options.pruner), claimed.lock)
            finally:
                os.close(claimed.lock)
            if code:
                record.status = "preempted"
                return code
            record.add(claimed.number)
    return _end(options, claims)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("hookline sweep", "Search hyper-parameters with Optuna; each trial is a run.", EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="how many in all (default: 20)")
    parser.add_argument("--metric", help="what is optimized, of an evaluation (default: the validation loss)")
    parser.add_argument("--mode", choices=["min", "max"], help="which value is the best (default: as the metric says)")
    parser.add_argument("--sampler", choices=[*SAMPLERS], default="tpe", help="what proposes values (default: tpe)")
    parser.add_argument("--pruner", choices=[*PRUNERS], default="median", help="what gives up trials (default: median)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler (default: 0)")
    parser.add_argument("--folder", help="where everything of the sweep is (default: sweeps/<run name>)")
    parser.add_argument("--nproc", metavar="N", help="run each trial in N processes, as `hookline fit --nproc` does")
    return parser


def _asked(options: argparse.Namespace, values: Sequence[str]) -> dict[str, Any]:
    """Return what makes trials comparable; what is wrong with the configuration is said here, once."""
    with mendable(ValueError, TypeError):
        loaded = read_configuration(options, *values)
        trainer = config.build_trainer(loaded)
        metric = options.metric or trainer.options.val_loss_metric_name
        mode = options.mode or trainer.hook.get_mode(trainer=trainer, metric=metric)
    return {
        "metric": metric,
        "mode": mode,
        **{name: getattr(options, name) for name in ("sampler", "pruner", "seed")},
        "config": config.masked(loaded),
    }


def _keep(file: Path, asked: Mapping[str, Any]) -> None:
    """Keep what the sweep was begun with.

    Raises:
        ValueError: it was begun with something else.
    """
    if not file.exists():
        with replacing(file) as new:
            new.write_text(config.to_yaml(asked), encoding="utf-8")
        return
    before, now = _flat(yaml.safe_load(file.read_text(encoding="utf-8"))), _flat(asked)
    searched = {key.replace("search.", "config.", 1) for key in {**before, **now} if key.startswith("search.")}
    differs = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in searched]
    if differs:
        told = ", ".join(f"{key} ({before.get(key)!r}, now {now.get(key)!r})" for key in differs)
        raise ValueError(
            f"{file.parent} has a sweep whose trials could not be compared with new ones; it was begun with another "
            f"{told}. Continue it with what it was begun with, or begin another with --folder"
        )


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, kept in tree.items() for k, v in _flat(kept, f"{path}.{key}" if path else str(key)).items()}


def _run(options: argparse.Namespace, told: Told, lock: int) -> int:
    """Run one trial to its end; return an exit code if the sweep ends with it."""
    trial = told.storage.get_trial(told.id)
    told.note("attempts", trial.user_attrs.get("attempts", 0) + (not trial.user_attrs.get("interrupted")))
    told.note("interrupted", False)
    own = {"trainer.runs_folder": str(options.folder), "trainer.run_name": f"trial-{told.trial}"}
    plugins = [word for name in (*options.plugins, "sweep") for word in ("-p", name)]
    command = [sys.executable, "-m", "hookline", "fit", options.config, *options.overrides]
    command += [*overrides(trial.params), *overrides(own), *plugins]
    if options.nproc is not None:
        command += ["--nproc", options.nproc]
    if resume := trial.user_attrs.get("resume"):
        command += ["--resume", resume]
    facts = {"folder": str(options.folder), "trial": told.trial}
    facts |= {"metric": options.metric, "pruner": options.pruner}
    log = options.folder / f"trial-{told.trial}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, TRIAL: json.dumps(facts)},
            pass_fds=[lock],  # the trial is claimed as long as the process lives, also without this one
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has heard it too, and may save
            process.wait()
            raise
    trial = told.storage.get_trial(told.id)
    if trial.state.is_finished():
        print(report.line(trial, options.metric), flush=True)
        return 0
    if trial.user_attrs["interrupted"]:
        print(f"trial {trial.number} was interrupted; the same command continues the sweep", flush=True)
        return code or 1
    told.fail(_why(code, log))
    print(report.line(told.storage.get_trial(told.id), options.metric), flush=True)
    return 0


def _why(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}: {last.strip()}"


def _end(options: argparse.Namespace, claims: Claims) -> int:
    """Show all trials, and write the best one and the pictures."""
    study, folder = claims.study, options.folder
    print(*report.table_of(claims.counted(), options.metric), sep="\n")
    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not complete:
        print(f"no trial is complete, so none is the best; {folder} has their logs", file=sys.stderr)
        return 1
    best = study.best_trial
    loaded = read_configuration(options, *overrides(best.params))
    with replacing(folder / "best.yaml") as new:
        new.write_text(config.to_yaml(config.masked(loaded)), encoding="utf-8")
    report.draw(study, folder, options.metric)
    print(f"the best is trial {best.number} with {options.metric}={best.value:.6g}: hookline fit {folder}/best.yaml")
    return 0
