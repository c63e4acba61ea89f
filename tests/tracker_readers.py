"""What each service's own reader finds of a run, as points by name: for tests of several trackers at once."""

import csv
import importlib
import json
import types
import zipfile
from pathlib import Path


def of_aim(folder):
    repo = importlib.import_module("aim").Repo(str(folder / "aim"))
    repo._recreate_index()  # as `aim storage reindex` does
    (run,) = (repo.get_run(name) for name in repo.list_all_runs())
    for metric in run.metrics():
        metric.preload()
        steps, (values, *_) = metric.data.items_list()
        for step, value in zip(steps, values, strict=True):
            yield metric.name, step, value


def of_clearml(folder):
    for path in (folder / "clearml" / "offline").glob("*/metrics.jsonl"):
        for event in (event for line in path.read_text().splitlines() for event in json.loads(line)):
            if event["type"] == "training_stats_scalar" and event["metric"] == event["variant"]:
                yield event["metric"], event["iter"], event["value"]


def of_comet(folder):
    for path in sorted((folder / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime_ns):
        with zipfile.ZipFile(path) as archive:
            messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        for metric in (message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"):
            if metric["metricName"] != "process duration":  # the SDK's own
                yield metric["metricName"], metric["step"], float(metric["metricValue"])


def of_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            place = float(row.pop("steps"))
            yield from ((name, place, float(text)) for name, text in row.items() if text)


def of_dvclive(folder):
    plots = folder / "dvclive" / "plots"
    files = types.SimpleNamespace(plots_dir=str(plots), metrics_file=str(folder / "dvclive" / "metrics.json"))
    history, _ = importlib.import_module("dvclive.utils").parse_metrics(files)
    for path, rows in history.items():
        name = Path(path).relative_to(plots / "metrics").with_suffix("").as_posix()
        yield from ((name, float(row["step"]), float(row[name])) for row in rows)


def of_mlflow(folder):
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("hookline").experiment_id])
    for name in run.data.metrics:
        for kept in client.get_metric_history(run.info.run_id, name):
            yield name, kept.step, kept.value


def of_tensorboard(folder):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in events.Tags()["scalars"]:
        yield from ((name, event.step, event.value) for event in events.Scalars(name))


def of_wandb(folder):
    """Give the points by the SDK's own messages and the plugin's reader of the file: the SDK has none."""
    run_log = importlib.import_module("hookline_wandb").RunLog
    for path in sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.parent.name):
        for row in run_log(path).rows():
            yield from ((name, row["steps"], row[name]) for name in row if name != "steps" and name[0] != "_")


READERS = {name.removeprefix("of_"): reader for name, reader in globals().items() if name.startswith("of_")}


def points_of(tracker, folder):
    """Return what a tracker has kept of a run: places and values by name, in the order of the places."""
    found = {}
    for name, place, value in READERS[tracker](folder):
        found.setdefault(name, []).append((place, value))
    return {name: sorted(points) for name, points in found.items()}
