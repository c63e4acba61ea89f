"""Row I of the fault catalogue: names, configurations, secrets, rights and files that somebody has made on purpose."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.installed import installed, load
from hookline.testing import TinyModule, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, run
from hookline.tracking import Tracker
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences
from hookline_checkpoint.headers import tensors_of
from hookline_checkpoint.layout import unpack
from hookline_checkpoint.storage import CheckpointError
from hookline_model_saving import ModelSaving
from hookline_runs import read_run

pytestmark = pytest.mark.plugins
PRELOADED += [__name__, "hookline.config", "hookline_guard", "hookline_runs.jsonl", "hookline_progress"]


def prepared(folder, **nodes):
    """Write a configuration; return its folder."""
    options = {"max_steps": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"}
    plugins = {"checkpoint": {"every": "1 steps"}, "jsonl": {}}
    config = {
        "module": {"_target_": "hookline.testing.TinyModule"},
        **nodes,
        "trainer": options | nodes.get("trainer", {}),
        "plugins": plugins | nodes.get("plugins", {}),
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def everything(folder):
    """Return each path below a folder with what it is, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        found[path.relative_to(folder).as_posix()] = kind
    return found


def outside_of(run_folder, found):
    return {path: kind for path, kind in found.items() if path != run_folder and not path.startswith(f"{run_folder}/")}


def fit(folder, words=(), limit=None, environment=None):
    """Run `hookline fit` with at most so many seconds of CPU time, and 2 GiB more memory than it has."""
    os.environ.update(environment or {})
    os.chdir(folder)
    if limit is not None:
        limited(limit)
    sys.exit(main(["fit", "run.yaml", *words]))


def limited(seconds, memory=2 << 30):
    has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (has + memory,) * 2)
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# I4 -----------------------------------------------------------------------------------

NAMES = [
    "..",
    "../x",
    "a/b",
    "a\0b",
    "/absolute",
    "~",
    "~/x",
    "C:\\x",
    "C:x",
    ".hidden",
    "",
    "x" * 300,
    "a\nb",
    "..\\x",
]
LIKE_A_METRIC = [name for name in NAMES if name] + ["%2e%2e/x", "\u202eb"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_i4_a_run_name_that_is_no_plain_name_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(prepared(tmp_path / "here", trainer={"run_name": name}))
    before = everything(tmp_path)
    assert main(["fit", "run.yaml"]) == 2
    assert "run_name=" in capsys.readouterr().err
    assert everything(tmp_path) == before


class Logging(TinyModule):
    def train_step(self, global_step, batch, device):
        self._trainer().log(**dict.fromkeys(LIKE_A_METRIC, 1.5))
        for name in LIKE_A_METRIC:
            self._trainer().log_object(name, name)
        return super().train_step(global_step, batch, device)

    def val_step(self, global_step, batch, device):
        self._trainer().log(**dict.fromkeys(LIKE_A_METRIC, 2.5))
        return super().val_step(global_step, batch, device)


def test_i4_names_of_metrics_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(folder := prepared(tmp_path / "here"))
    odd = ["..", "../x", "a\0b", "/absolute", "~", "~/x", "C:\\x", ".hidden", "\u202eb"]
    policies = [f"best_{name}" for name in odd]
    plugins = {"jsonl": {}, "checkpoint": {}, "model_saving": {"policy": policies, "mode": "max"}}
    trainer = tiny_trainer(plugins, Logging(), max_steps=2, evaluate_every="1 steps", log_every="1 steps")
    trainer.train()
    found = everything(tmp_path)
    assert list(outside_of("here/runs/run-1", found)) == ["here", "here/run.yaml", "here/runs"]
    folders = sorted(path.name for path in (trainer.run_dir / "models").iterdir())
    assert len(folders) == len(policies)
    assert not [name for name in folders if set(name) & set("/\\\0:~\n")]
    kept = read_run(folder / "runs" / "run-1")
    assert set(LIKE_A_METRIC) <= set(kept.rows[-1])
    assert {entry["name"] for entry in kept.objects} == set(LIKE_A_METRIC)
    assert kept.unreadable == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (["best_../x", "best_..\\x"], "would be saved in one folder"),
        ("../x", "is no policy"),
        ("best_", "is no policy"),
        ("best_" + "x" * 300, "is no policy"),
    ],
    ids=["two alike", "a path", "nothing", "300"],
)
def test_i4_a_policy_that_could_not_be_a_folder_is_refused_at_once(policy, message):
    with pytest.raises(ValueError, match=message):
        ModelSaving(policy)


def a_checkpoint(folder):
    """Return a checkpoint of a run of two steps."""
    options = {"max_steps": 2, "runs_folder": str(folder), "evaluate_every": None, "eval_when_finish": False}
    tiny_trainer({"checkpoint": {"every": "1 steps"}, "jsonl": {}}, **options).train()
    return folder / "run-1" / "checkpoints" / "step-000000000002"


def signed(path, change):
    """Change what a manifest says, and give it the hash that belongs to it."""
    about = json.loads(json.loads((path / "manifest.json").read_text())["body"])
    body = json.dumps(change(about) or about)
    write_signed(path, body)


def write_signed(path, body):
    manifest = {"sha256": hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest(), "body": body}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*NAMES, "sub/x", "\u2215x"], ids=ascii)
def test_i4_a_manifest_names_plain_files_alone(name, tmp_path):
    path = a_checkpoint(tmp_path / "runs")
    secret = b"not for you"
    (tmp_path / "x").write_bytes(secret)
    entry = {"size": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    signed(path, lambda about: about["files"].update({name: entry}))
    before = everything(tmp_path)
    for use in (storage.verify, lambda path: unpack(path, 0)):
        with pytest.raises(CheckpointError, match="no plain file name|cannot be read"):
            use(path)
    newest, _ = storage.newest_good(path.parent, storage.verify)
    assert newest.name == "step-000000000001"
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json", "rank-0000.json"])
def test_i4_a_file_of_a_checkpoint_is_no_link(name, tmp_path):
    path = a_checkpoint(tmp_path / "runs")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    for use in (storage.verify, lambda path: unpack(path, 0)):
        with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
            use(path)


def test_i4_a_checkpoint_is_no_link(tmp_path):
    path = a_checkpoint(tmp_path / "runs")
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(CheckpointError, match="it is a link"):
        storage.verify(path)
    trainer = tiny_trainer({"checkpoint": {}}, max_steps=2, runs_folder=str(tmp_path / "runs"), resume=True)
    trainer.train()  # from the checkpoint before, and what is saved now replaces the link, not what it names
    assert storage.verify(path)["step"] == 2
    assert not path.is_symlink()
    assert (tmp_path / path.name).is_dir()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_i4_what_is_written_follows_no_link_of_a_run_that_is_gone_on_with(name, there, tmp_path, caplog):
    folder = prepared(tmp_path / "here")
    a_checkpoint(folder / "runs")
    (folder / "runs" / "run-1" / name).unlink(missing_ok=True)
    (folder / "runs" / "run-1" / name).symlink_to(tmp_path / "elsewhere")
    if there:
        (tmp_path / "elsewhere").write_text("as it was")
    before = outside_of("here/runs/run-1", everything(tmp_path))
    outcome = run(fit, folder, ["--resume", "trainer.max_steps=4"])
    assert outcome.code == 0, outcome.output
    assert outside_of("here/runs/run-1", everything(tmp_path)) == before


def test_i4_a_model_that_is_a_link_is_replaced(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    models = tmp_path / "runs" / "run-1" / "models"
    models.mkdir(parents=True)
    (models / "always").symlink_to(elsewhere)
    options = {"max_steps": 2, "runs_folder": str(tmp_path / "runs"), "resume": str(models.parent)}
    tiny_trainer({"model_saving": {"policy": "always"}, "checkpoint": {}}, **options).train()
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]
    assert (models / "always" / "model.safetensors").is_file()
    assert not (models / "always").is_symlink()


@pytest.mark.parametrize(
    "name", [*NAMES, "a.b/c.d", "a\0.b", ".x", "x.", "..x.y", "../../x.Y", "/absolute.Name"], ids=ascii
)
@pytest.mark.parametrize("key", ["module._target_", "plugins", "plugins.x._plugin_"])
def test_i4_names_in_a_configuration_lead_nowhere_else(key, name, tmp_path, monkeypatch, capsys):
    given = {
        "module._target_": {"module": {"_target_": name}},
        "plugins": {"plugins": {name: {}}},
        "plugins.x._plugin_": {"plugins": {"x": {"_plugin_": name}}},
    }
    monkeypatch.chdir(prepared(tmp_path / "here", **given[key]))
    before = everything(tmp_path)
    assert main(["fit", "run.yaml"]) == 2
    assert capsys.readouterr().err.startswith("hookline: ")
    assert everything(tmp_path) == before


# I6 -----------------------------------------------------------------------------------

LAUGHS = "\n".join(f"  {b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
MERGED = LAUGHS.replace("[", "{<<: [").replace("]", "]}")
CHAIN = "\n".join(f"  a{n + 1}: &a{n + 1} [*a{n}]" for n in range(99))
NO_TAG = "could not determine a constructor"
HOSTILE = {
    "python/object/apply": ('vars: {x: !!python/object/apply:os.system ["touch hacked"]}', NO_TAG),
    "python/object/new": ('vars: {x: !!python/object/new:os.system ["touch hacked"]}', NO_TAG),
    "python/name": ("vars: {x: !!python/name:os.system }", NO_TAG),
    "python/module": ("vars: {x: !!python/module:os }", NO_TAG),
    "laughs": (f"vars:\n  a: &a [{'lol, ' * 10}]\n{LAUGHS}", "values nested 12 deep when its aliases are written out"),
    "a chain": (f"vars:\n  a0: &a0 [x]\n{CHAIN}", "values nested 102 deep when its aliases are written out"),
    "merged laughs": (f"vars:\n  a: &a {{x: 1}}\n{MERGED}", ""),
    "itself": ("vars:\n  a: &a [*a]", "found unconstructable recursive node"),
    "itself in a mapping": ("vars:\n  a: &a {b: *a}", "found unconstructable recursive node"),
    "itself merged": ("vars:\n  a: &a {<<: *a}", ""),
    "deep": (f"vars: {'[' * 100_000}", "is no configuration: it is nested too deeply"),
    "twice": ("trainer: {epochs: 1, epochs: 2}", "the key 'epochs' is written twice, the second time in line 1"),
    "twice at the top": ("vars: {}\nvars: {}", "the key 'vars' is written twice, the second time in line 2"),
    "a list as a key": ("vars: {? [a, b] : c}", "the key in line 2 is neither a text nor a number"),
    "binary": ("vars: {x: !!binary not base64!}", "is no configuration: "),
    "bytes": ("vars: {x: \x00}", "is no configuration: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_i6_a_hostile_configuration_is_refused(kind, tmp_path):
    text, message = HOSTILE[kind]
    (tmp_path / "run.yaml").write_text("module: {_target_: hookline.testing.TinyModule}\n" + text)
    if "twice" in kind:
        (tmp_path / "run.yaml").write_text(text)
    outcome = run(fit, tmp_path, ["trainer.max_steps=1", "trainer.train_batch_size=8"], 20)
    assert outcome.code == (2 if message else 0), outcome.output[-2000:]
    assert message in outcome.output
    assert "Traceback" not in outcome.output
    assert len(outcome.output) < 2000
    assert not (tmp_path / "hacked").exists()


def test_i6_an_override_is_as_safe(tmp_path):
    outcome = run(fit, prepared(tmp_path), ['vars.x=!!python/object/apply:os.system ["touch hacked"]'], 20)
    assert outcome.code == 2
    assert "could not determine a constructor" in outcome.output
    assert not (tmp_path / "hacked").exists()


# I7, I8 -------------------------------------------------------------------------------

SECRETS = {
    "api_key": "Kq7-api-key-value",
    "token": "Kq7-token-value",
    "password": "Kq7-password-value",
    "url": "https://someone:Kq7-url-password@example.org/x",
    "hub": "hf_Kq7AbCdEfGhIjKlMn",
    "model_access": "sk-Kq7AbCdEfGhIjKlMnOpQr",
    "project_access": "sk-proj-Kq7AbCdEfGhIjKlMnOpQr_St-uv",
    "package": "git+https://someone:Kq7-git-password@example.org/x.git",
    "listed": ["plain", "hf_Kq7InAListAbCdEf"],
}
MARK = b"Kq7"  # in each of them


class Secretive(TinyModule):
    """Is given secrets, and fails where it is told to."""

    def __init__(self, secrets, api_key, fails=0):
        super().__init__()
        self.secrets, self.api_key, self.fails = secrets, api_key, fails
        if fails < 0:
            raise ValueError("it cannot be built")

    def train_step(self, global_step, batch, device):
        if global_step == self.fails:
            raise RuntimeError("it cannot be trained")
        return super().train_step(global_step, batch, device)


EVERYTHING = {
    "guard": {"every": "1 steps"},
    "model_saving": {"policy": "always"},
    "progress": {},
    "signals": {},
}


def leaks(folder, output, mark):
    """Return where a mark is found: in files, in their names, in what was said."""
    places = [path for path in folder.rglob("*") if mark in os.fsencode(path.name)]
    places += [path for path in folder.rglob("*") if path.is_file() and mark in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in places] + (["output"] if mark in output.encode() else [])


def secretive(folder, **nodes):
    module = {"_target_": f"{__name__}.Secretive", "secrets": SECRETS, "api_key": "${vars.api_key}"}
    return prepared(folder, vars=SECRETS, module=module, plugins=EVERYTHING, **nodes)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 0),
        (("module.fails=2", "vars.token=Kq7-on-the-command-line"), 1),
        (("module.fails=-1",), 2),
        (("trainer.epoch=3",), 2),
        (("trainer.epochs=many",), 2),
        (("plugins.clip.max_nrm=1",), 2),
        (("--print-config",), 0),
    ],
    ids=[
        "finished",
        "failed in training",
        "failed in the module",
        "unknown key",
        "wrong type",
        "plugin's key",
        "printed",
    ],
)
def test_i7_secrets_are_nowhere(words, code, tmp_path):
    folder = secretive(tmp_path)
    outcome = run(fit, folder, words)
    assert outcome.code == code, outcome.output
    (folder / "run.yaml").unlink()
    assert leaks(folder, outcome.output, MARK) == []
    if not code and not words:
        assert storage.listed(folder / "runs" / "run-1" / "checkpoints")
        assert read_run(folder / "runs" / "run-1").config["vars"]["token"] == "***"
    if code == 1:
        assert "it cannot be trained" in outcome.output
        assert storage.listed(folder / "runs" / "run-1" / "checkpoints")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vars: {api_key: Kq7-value\nx", "is no configuration"),
        ("vars:\n  api_key: Kq7-value: x", "is no configuration"),
        ("vars: {api_key: Kq7-value, api_key: Kq7-value}", "is written twice"),
    ],
    ids=["torn", "a colon", "twice"],
)
def test_i7_a_configuration_that_cannot_be_read_is_not_quoted(text, said, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    outcome = run(fit, tmp_path)
    assert outcome.code == 2
    assert said in outcome.output
    assert MARK.decode() not in outcome.output


@dataclasses.dataclass(eq=False)
class Service(CallbackInterface):
    """Takes a secret, whose key and form do not tell that it is one, and other options; quotes them when it fails."""

    door: Any = dataclasses.field(default="", metadata={"secret": True})
    place: str = ""
    fails: str = ""
    observer: ClassVar[bool] = False

    def __post_init__(self):
        if self.fails == "built":
            raise ValueError(f"service.door={self.door!r} is of no use at {self.place!r}")

    @hookimpl
    def on_begin_run(self, trainer):
        logging.getLogger("hookline.service").info("goes to %s by %s", self.place, self.door)
        if self.fails == "stops":
            trainer.stop(f"nobody is at {self.place}")

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        if self.fails == "error" and global_step == 2:
            raise ConnectionError(f"{self.door} is closed") from OSError(f"nobody is at {self.place}")
        if self.fails == "file" and global_step == 2:
            Path(self.place).read_text()
        if self.fails == "valued" and global_step == 2:
            raise ValueError(f"{self.door} is closed at {self.place}")


PLANTED = "Kq7-planted"


def with_a_service(folder, plugins=(), **options):
    node = {"_plugin_": f"{__name__}.Service", "door": "${oc.env:PLANTED_DOOR}", "place": "at ${vars.where}", **options}
    others = {name: {} for name in plugins}
    return prepared(
        folder, vars={"where": "${oc.env:PLANTED_WHERE}"}, plugins={"service": node, **EVERYTHING, **others}
    )


def planted(folder, words=(), **given):
    """Run the command with the two variables; return the outcome and where their values are found."""
    values = {"PLANTED_DOOR": f"{PLANTED}-door", "PLANTED_WHERE": f"{PLANTED}-where", **given}
    outcome = run(fit, folder, words, None, values)
    return outcome, leaks(folder, outcome.output, MARK)


WRITERS = ["csv", "export", "memory", "monitor", "profile", "summary", "tensorboard", "watchdog"]


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        ("", 0, "goes to at ${oc.env:PLANTED_WHERE} by ${oc.env:PLANTED_DOOR}"),
        ("built", 1, "service.door='${oc.env:PLANTED_DOOR}' is of no use at 'at ${oc.env:PLANTED_WHERE}'"),
        ("stops", 0, "nobody is at at ${oc.env:PLANTED_WHERE}"),
        ("error", 1, "OSError: nobody is at at ${oc.env:PLANTED_WHERE}"),
        ("error", 1, "ConnectionError: ${oc.env:PLANTED_DOOR} is closed"),
        ("file", 1, "No such file or directory: 'at ${oc.env:PLANTED_WHERE}'"),
        ("valued", 1, "${oc.env:PLANTED_DOOR} is closed at at ${oc.env:PLANTED_WHERE}"),
    ],
)
def test_i7_a_value_of_the_environment_is_nowhere(fails, code, said, tmp_path):
    outcome, found = planted(with_a_service(tmp_path, WRITERS if fails == "error" else (), fails=fails))
    assert (outcome.code, found) == (code, []), outcome.output
    assert said in outcome.output
    if fails != "built":
        kept = read_run(tmp_path / "runs" / "run-1").config
        again = yaml.safe_load((tmp_path / "runs" / "run-1" / "config.yaml").read_text())
        assert kept["plugins"]["service"] == again["plugins"]["service"]
        assert again["plugins"]["service"]["door"] == "${oc.env:PLANTED_DOOR}"
        assert again["plugins"]["service"]["place"] == "at ${oc.env:PLANTED_WHERE}"
        assert again["vars"]["where"] == "${oc.env:PLANTED_WHERE}"


@pytest.mark.slow
def test_i7_a_value_of_the_environment_is_in_no_tracker(tmp_path):
    trackers = sorted(name for name in installed() if issubclass(load(name), Tracker))
    outcome, found = planted(with_a_service(tmp_path, trackers))
    assert (outcome.code, found) == (0, []), outcome.output


@pytest.mark.parametrize("words", [("plugins.clip.max_norm=${oc.env:PLANTED_DOOR}",), ("--print-config",)])
def test_i7_a_value_of_the_environment_is_not_printed(words, tmp_path):
    outcome, found = planted(with_a_service(tmp_path), words)
    assert found == [], outcome.output
    assert "${oc.env:PLANTED_DOOR}" in outcome.output
    assert outcome.code == (0 if words[0] == "--print-config" else 2)


def test_i7_a_marked_option_is_nowhere_when_it_is_given_literally(tmp_path):
    for word in ("plugins.service.door=Kq7-literal", "plugins.service={door: {inner: [Kq7-literal]}, fails: error}"):
        folder = with_a_service(tmp_path / word[-9:-1])
        outcome, found = planted(folder, (word,))
        assert found == [], outcome.output
        kept = yaml.safe_load((folder / "runs" / "run-1" / "config.yaml").read_text())
        assert kept["plugins"]["service"]["door"] in ("***", {"inner": ["***"]})
    trainer = tiny_trainer([Service(door="Kq7-literal", fails="error")])
    assert trainer.config["plugins"]["service"] == {"door": "***", "place": "", "fails": "error"}
    with pytest.raises(ConnectionError, match=r"\*\*\* is closed"):
        trainer.train()


def test_i7_a_run_is_done_again_from_what_was_written_where_its_variables_are_set(tmp_path):
    folder = with_a_service(tmp_path)
    assert planted(folder)[0].code == 0
    (folder / "run.yaml").write_text((folder / "runs" / "run-1" / "config.yaml").read_text())
    for words in ((), ("--resume",)):
        outcome, found = planted(folder, words)
        assert (outcome.code, found) == (0, []), outcome.output
    outcome = run(fit, folder, (), None, {"PLANTED_DOOR": "x"})
    assert outcome.code == 2
    assert outcome.output.strip() == (
        "hookline: vars.where: the environment variable 'PLANTED_WHERE' is not set; set it, or give vars.where=…"
    )


def test_i8_the_environment_is_kept_nowhere(tmp_path):
    marker = "Zv9-of-the-environment"
    folder = secretive(tmp_path)
    outcome = run(fit, folder, ("module.fails=2",), None, {"HOOKLINE_MARKER": marker, "WANDB_API_KEY": marker})
    assert outcome.code == 1
    assert storage.listed(folder / "runs" / "run-1" / "checkpoints")
    assert leaks(folder, outcome.output, marker.encode()) == []
    assert leaks(folder, outcome.output, b"HOOKLINE_MARKER") == []


# I9 -----------------------------------------------------------------------------------


def go_on(folder, strict=False):
    trainer = tiny_trainer({"checkpoint": {"strict": strict}}, max_steps=3, runs_folder=str(folder), resume=True)
    trainer.train()


@pytest.mark.parametrize("mode", [0o002, 0o020, 0o022])
@pytest.mark.parametrize("which", ["checkpoints", "step-000000000002", "model.safetensors", "manifest.json"])
def test_i9_what_others_may_write_is_warned_of_or_refused(which, mode, tmp_path, caplog):
    path = a_checkpoint(tmp_path)
    changed = {"checkpoints": path.parent, path.name: path}.get(which, path / which)
    changed.chmod(changed.stat().st_mode | mode)
    said = f"others may have changed {path}: {which} may be written by {'everybody' if mode & 2 else 'its group'}"
    with pytest.raises(ValueError, match=said):
        go_on(tmp_path, strict=True)
    caplog.clear()
    go_on(tmp_path)
    assert [said in entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING].count(True) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("which", ["checkpoints", "step-000000000002", "state.json"])
def test_i9_what_belongs_to_another_is_warned_of_or_refused(which, tmp_path, caplog):
    path = a_checkpoint(tmp_path)
    os.chown({"checkpoints": path.parent, path.name: path}.get(which, path / which), 12345, -1)
    said = f"others may have changed {path}: {which} belongs to user 12345"
    with pytest.raises(ValueError, match=said):
        go_on(tmp_path, strict=True)
    go_on(tmp_path)
    assert said in caplog.text


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_i9_what_is_written_nobody_else_may_change(umask, tmp_path, caplog):
    before = os.umask(umask)
    try:
        path = a_checkpoint(tmp_path)
    finally:
        os.umask(before)
    assert storage.changeable_by_others(path) == []
    for each in (path.parent, path, *path.iterdir()):
        assert each.stat().st_mode & 0o022 == 0, each
    go_on(tmp_path, strict=True)
    assert "others may have changed" not in caplog.text


# I11 ----------------------------------------------------------------------------------

ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, "", "x", "\ud800", "\0", "../x", "9" * 5000,
    [], [[]], {}, {"$tensor": "x"}, {"$tensor": {"name": "x", "shape": [2**40]}},
    {"$tensor": {"name": "x", "stride": [2**40]}},
    {"$ndarray": {}}, {"$ndarray": {"name": "x", "dtype": "O", "shape": [1]}}, {"$npscalar": ["<f4", "00"]},
    {"$npscalar": ["O", "0000000000000000"]}, {"$npscalar": ["S2000000000", ""]}, {"$none": 1}, {"$int": "zz"},
    {"$float": "x"}, {"$complex": ["x", "y"]}, {"$bytes": "!"}, {"$path": "\0"}, {"$device": "cuda:99999"},
    {"$dtype": "load"}, {"$dtype": "os"}, {"$size": [2**70]}, {"$date": "0"}, {"$datetime": ["2020-01-01", 7]},
    {"$timedelta": [10**12, 0, 0]}, {"$timedelta": [0, 0, 2**70]}, {"$tuple": 1}, {"$set": [[]]}, {"$set": [{}]},
    {"$frozenset": 1}, {"$deque": [[], -1]}, {"$deque": [[1], 2**70]}, {"$dict": []}, {"$dict": [[{}, 1]]},
    {"$ordereddict": [[], 7]}, {"$defaultdict": ["eval", []]}, {"$counter": [["x", "y"]]},
    functools.reduce(lambda inner, _: [inner], range(400), 0),
    functools.reduce(lambda inner, _: {"$tuple": [inner]}, range(300), 0),
]  # fmt: skip


def places_of(tree, path=()):
    """Yield where the values of a JSON tree are."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places_of(tree[key], (*path, key))


def odd_tree(tree, chance):
    """Return a JSON tree with something odd in it: a value, a key or the lack of one, or two that were exchanged."""
    path = chance.choice(list(places_of(tree)))
    odd = chance.choice(ODD)
    if not path:
        return odd
    home = functools.reduce(lambda inner, key: inner[key], path[:-1], tree)
    key, way = path[-1], chance.randrange(5)
    if way == 0:
        del home[key]
    elif way == 1 and isinstance(home, dict):
        home[chance.choice(["$tuple", "$tensor", "", "\ud800", "x" * 1000])] = home.pop(key)
    elif way == 2:
        other = chance.choice(list(home)) if isinstance(home, dict) else chance.randrange(len(home))
        home[key], home[other] = home[other], home[key]
    else:
        if isinstance(odd, dict) and isinstance(home[key], dict) and chance.random() < 0.5:
            odd = {**home[key], **odd}
        home[key] = odd
    return tree


def odd_bytes(content, chance):
    """Return other bytes: some flipped, put in, taken out, cut off or exchanged."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        begin, way = chance.randrange(len(content) + 1), chance.randrange(6)
        end = min(len(content), begin + chance.choice([1, 2, 4, 8, 64]))
        if way == 0 and begin < len(content):
            content[begin] ^= 1 << chance.randrange(8)
        elif way == 1:
            content[begin:begin] = chance.randbytes(chance.choice([1, 2, 8, 100]))
        elif way == 2:
            del content[begin:end]
        elif way == 3 and chance.random() < 0.3:
            del content[begin:]
        elif way == 4:
            content[begin:end] = chance.choice([b"\0", b"\xff", b"9", b"[", b'"', b"{"]) * (end - begin)
        else:
            other = chance.randrange(len(content) + 1)
            content[begin:end], content[other : other + end - begin] = (
                content[other : other + end - begin],
                content[begin:end],
            )
    return bytes(content)


def odd_head(content, chance):
    """Return a safetensors file with an odd head."""
    length = int.from_bytes(content[:8], "little")
    head, data = content[8 : 8 + length], content[8 + length :]
    as_tree = chance.random() < 0.5
    head = json.dumps(odd_tree(json.loads(head), chance)).encode() if as_tree else odd_bytes(head, chance)
    if chance.random() < 0.3:
        data = odd_bytes(data, chance)
    length = chance.choice([len(head)] * 8 + [0, len(head) + 1, 2**40, 2**64 - 1])
    return length.to_bytes(8, "little") + head + data


def mutate(path, chance):
    """Change something of a checkpoint; return what."""
    names = sorted(each.name for each in path.iterdir())
    way = chance.choice(["bytes", "signed bytes", "manifest", "body", "tree", "head"])
    if way == "bytes":
        name = chance.choice(names)
        (path / name).write_bytes(odd_bytes((path / name).read_bytes(), chance))
    elif way == "manifest":
        name = "manifest.json"
        (path / name).write_text(json.dumps(odd_tree(json.loads((path / name).read_text()), chance)))
    elif way == "body":
        name = "manifest.json"
        body = json.loads((path / name).read_text())["body"]
        as_tree = chance.random() < 0.7
        changed = json.dumps(odd_tree(json.loads(body), chance)) if as_tree else odd_bytes(body.encode(), chance)
        write_signed(path, changed if as_tree else changed.decode("latin-1"))
    else:
        suffix = {"signed bytes": ".", "tree": ".json", "head": ".safetensors"}[way]
        name = chance.choice([name for name in names if suffix in name and name != "manifest.json"])
        content = (path / name).read_bytes()
        if way == "tree":
            content = json.dumps(odd_tree(json.loads(content), chance)).encode()
        else:
            content = (odd_head if way == "head" else odd_bytes)(content, chance)
        (path / name).write_bytes(content)
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        signed(path, lambda about: about["files"].update({name: entry}))
    return f"{way} of {name}"


def tensors(path):
    return tensors_of(path, storage.read_manifest(path))


def read_all(path):
    """Read a checkpoint in each way there is, and return how many of them refused it."""
    uses = [
        storage.verify,
        lambda path: unpack(path, 0),
        tensors,
        lambda path: storage.newest_good(path.parent, lambda path: unpack(path, 0)),
    ]
    refused = 0
    for use in uses:
        try:
            use(path)
        except CheckpointError:
            refused += 1
    return refused


def fuzz(folder, seeds):
    """Return what else than a `CheckpointError` came out by seed, and how many were refused and read in some way."""
    torch.set_num_threads(1)
    logging.disable()
    wrong, refused, read = {}, 0, 0
    whole = folder / "runs" / "run-1" / "checkpoints" / "step-000000000002"
    contents = {each.name: each.read_bytes() for each in whole.iterdir()}
    path = folder / "fuzz" / whole.name
    path.mkdir(parents=True)
    limited(400)
    for seed in seeds:
        for name, content in contents.items():
            (path / name).write_bytes(content)
        what = mutate(path, random.Random(seed))
        print(seed, what, flush=True)
        begin = time.monotonic()
        try:
            count = read_all(path)
            refused, read = refused + (count > 0), read + (count < 4)
        except BaseException as error:
            wrong[seed] = f"{what}: {type(error).__name__}: {str(error)[:200]}"
        if time.monotonic() - begin > 10:
            wrong[seed] = f"{what}: took {time.monotonic() - begin:.0f} s"
    return wrong, refused, read


def train_in_shares(folder):
    torch.set_num_threads(1)
    options = {"max_steps": 2, "runs_folder": str(folder), "evaluate_every": None, "eval_when_finish": False}
    tiny_trainer({"fsdp": {}, "checkpoint": {"every": "1 steps"}}, **options).train()


def a_checkpoint_in_shares(folder):
    """Make one of which two ranks have shares."""
    outcomes = run_ranks(train_in_shares, 2, folder)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output


def fuzzed(folder, count, make):
    make(folder / "runs")
    first = random.SystemRandom().randrange(10**9)
    print(f"seeds from {first}")
    outcome = run(fuzz, folder, range(first, first + count), timeout=115)
    assert outcome.code == 0, outcome.output[-500:]
    wrong, refused, read = outcome.value
    assert wrong == {}
    assert refused > count / 2
    assert read > 0  # a change of what says nothing of the state, for one
    assert sorted(path.name for path in folder.iterdir()) == ["fuzz", "runs"]


@pytest.mark.parametrize("make", [a_checkpoint, pytest.param(a_checkpoint_in_shares, marks=pytest.mark.slow)])
def test_i11_only_checkpoint_errors_come_of_mutated_files(make, tmp_path):
    fuzzed(tmp_path, 150, make)


@pytest.mark.slow
@pytest.mark.parametrize("make", [a_checkpoint, a_checkpoint_in_shares])
def test_i11_two_thousand_mutations(make, tmp_path):
    fuzzed(tmp_path, 2000, make)


@pytest.mark.parametrize("ranks", [10**15, -1, 0, 1.5, True, "two", [], None])
def test_i11_a_wrong_number_of_ranks_costs_no_memory_and_no_time(ranks, tmp_path):
    path = a_checkpoint(tmp_path / "runs")
    signed(path, lambda about: about.update(world_size=ranks))
    for use in (tensors, lambda path: differences(path, path)):
        with pytest.raises(CheckpointError, match="ranks have written it, and lists"):
            use(path)


@pytest.mark.parametrize(
    "entry", [{"files": {}}, {"files": []}, {"step": [2]}, {"step": 3}, {"part": 1}, {"format": 1}]
)
def test_i11_a_manifest_that_cannot_be_is_refused_by_all(entry, tmp_path):
    path = a_checkpoint(tmp_path / "runs")
    signed(path, lambda about: about.update(entry))
    for use in (lambda path: unpack(path, 0), tensors, lambda path: differences(path, path)):
        with pytest.raises(CheckpointError):
            use(path)
