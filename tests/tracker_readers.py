"""What each service's own reader finds of a run: a name, a place and a value for each point."""

import csv
import fcntl
import importlib
import json
import shutil
import tempfile
import types
import zipfile
from pathlib import Path


def of_aim(folder):
    with tempfile.TemporaryDirectory() as copy:  # to read it locks it
        shutil.copytree(folder / "aim", copy, dirs_exist_ok=True)
        repo = importlib.import_module("aim").Repo(copy)
        repo._recreate_index()  # as `aim storage reindex` does
        for run in [repo.get_run(name) for name in repo.list_all_runs()]:
            for metric in run.metrics():
                metric.preload()
                steps, (values, *_) = metric.data.items_list()
                yield from ((metric.name, step, value) for step, value in zip(steps, values, strict=True))


def of_clearml(folder):
    with (folder / "clearml" / "lock").open() as lock:  # the SDK's process may be still at work
        fcntl.flock(lock, fcntl.LOCK_EX)
    for path in (folder / "clearml" / "offline").glob("*/metrics.jsonl"):
        for event in (event for line in path.read_text().splitlines() for event in json.loads(line)):
            if event["type"] == "training_stats_scalar" and event["metric"] in (event["variant"], "validation batches"):
                yield event["variant"], event["iter"], event["value"]


def of_comet(folder):
    """Give the points in archives, and in what is no archive yet: of a process that was killed, or is at work."""
    texts = [path.read_text() for path in (folder / "comet").glob("*/messages.json")]
    for path in filter(zipfile.is_zipfile, (folder / "comet").glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            texts += [archive.read(name).decode() for name in archive.namelist() if name == "messages.json"]
    lines = [line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]
    for message in map(json.loads, lines):
        if message["type"] == "metric_msg" and message["payload"]["metric"]["metricName"] != "process duration":
            metric = message["payload"]["metric"]  # that one is the SDK's own
            yield metric["metricName"], metric["step"], float(metric["metricValue"])


def of_csv(folder):
    for path in folder.glob("metrics*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                (_, place), *texts = row.items()
                yield from ((name, float(place), float(text)) for name, text in texts if text)


def of_dvclive(folder):
    for home in folder.glob("dvclive*"):
        files = types.SimpleNamespace(plots_dir=str(home / "plots"), metrics_file=str(home / "metrics.json"))
        history, _ = importlib.import_module("dvclive.utils").parse_metrics(files)
        for path, rows in history.items():
            name = Path(path).relative_to(home / "plots" / "metrics").with_suffix("").as_posix()
            name = name.removeprefix("validation_batches/")
            yield from ((name, float(row["step"]), float(row[name])) for row in rows)


def of_mlflow(folder):
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    for run in client.search_runs([client.get_experiment_by_name("hookline").experiment_id]):
        for name in run.data.metrics:
            for kept in client.get_metric_history(run.info.run_id, name):
                yield name, kept.step, kept.value


def of_tensorboard(folder):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    home = folder / "tensorboard"
    for path in [home, *(path for path in home.iterdir() if path.is_dir())]:
        events = reader.EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            yield from ((name, event.step, event.value) for event in events.Scalars(name))


def of_wandb(folder):
    """Give the points by the SDK's own messages and the plugin's reader of the file: the SDK has none."""
    run_log, axes = importlib.import_module("hookline_wandb").RunLog, ("validation_batch", "steps")
    for path in sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.parent.name):
        for row in run_log(path).rows():
            place = row[next(axis for axis in axes if axis in row)]
            yield from ((name, place, row[name]) for name in row if name not in axes and name[0] != "_")


READERS = {name.removeprefix("of_"): reader for name, reader in globals().items() if name.startswith("of_")}


def points_of(tracker, folder):
    """Return what a tracker has kept of a run: places and values by name, in the order of the places."""
    found = {}
    for name, place, value in READERS[tracker](folder):
        found.setdefault(name, []).append((place, value))
    return {name: sorted(points) for name, points in found.items()}
