"""Several processes of one command: what starts them, what they are told, and what comes back."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

import hookline_distributed
from hookline.cli import _parse, launch, main
from hookline.testing.faults import PRELOADED
from hookline.testing.ranks import run_ranks
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences

pytestmark = pytest.mark.plugins
PRELOADED += [__name__, "hookline.config", "hookline_distributed", "hookline_ddp", "hookline_signals"]

ranks = pytest.mark.xdist_group("ranks")

MODULE = '''
import json, os, sys, time
from pathlib import Path
from hookline.testing import TinyModule

RANK = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")


class Mine(TinyModule):
    """Says its command, and waits in a step, or fails in it, on the rank that it is told."""

    def __init__(self, wait_at: int = 0, fail_at: int = 0, rank: int = 1):
        super().__init__(samples=48)
        self.wait_at, self.fail_at, self.rank = wait_at, fail_at, rank
        me = {"rank": RANK, "pid": os.getpid(), "words": sys.argv[1:]}
        Path(f"process-{me['rank']}.json").write_text(json.dumps(me | {"threads": os.environ.get("OMP_NUM_THREADS")}))

    def train_step(self, global_step, batch, device):
        if RANK == str(self.rank) and global_step == self.fail_at:
            raise ZeroDivisionError("in the step")
        if global_step == self.wait_at:
            Path(f"waits-{RANK}").touch()
            deadline = time.monotonic() + 60
            while not Path("go").exists() and time.monotonic() < deadline:
                time.sleep(0.001)
        if self.wait_at:
            time.sleep(0.01)
        return super().train_step(global_step, batch, device)
'''


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path)


def prepared(folder, **plugins):
    (folder / "mine.py").write_text(MODULE)
    config = {
        "module": {"_target_": "mine.Mine"},
        "trainer": {"epochs": 15, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {"ddp": {}, "signals": {}, "checkpoint": {"every": "1000 steps"}, **plugins},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder, *words, **environment):
    """Be a process of the command `hookline`."""
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(words))


def start(folder, *words, program=("-m", "hookline")):
    """Start a command as a user does; what it writes goes into files."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen([sys.executable, *program, *words], cwd=folder, stdout=out, stderr=err)


def ended(process, folder, code):
    found = process.wait(100)
    err = (folder / "err").read_text()
    assert found == code, err
    return err


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def said(folder, rank):
    return json.loads((folder / f"process-{rank}.json").read_text())


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def last(folder, run="run-1"):
    return storage.listed(folder / "runs" / run / "checkpoints")[0]


def assert_same_end(one, other):
    different = [line for line in differences(one, other) if not line.startswith("trainer.counters.seconds:")]
    assert different == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the last checkpoint of the run of two ranks that forked processes do."""
    folder = prepared(tmp_path_factory.mktemp("whole"))
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml"):
        assert outcome.code == 0, outcome.output
    return last(folder)


# What is refused ----------------------------------------------------------------------


@pytest.fixture
def hookline(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    sys.modules.pop("mine", None)  # of another file's tests

    def run(*words):
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_is_one(nproc, hookline):
    code, err = hookline("fit", "run.yaml", f"--nproc={nproc}")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"hookline: --nproc={nproc} is no number of processes; write one from 1, or auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_needs_a_device(hookline):
    code, err = hookline("fit", "run.yaml", "--nproc", "auto")
    assert (code, err.count("\n")) == (2, 1)
    assert "there is none here: give a number" in err


def test_a_launched_process_launches_none(hookline, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, err = hookline("fit", "run.yaml", "--nproc", "2")
    assert code == 2
    assert "--nproc=2 would start processes within process 1 of a run that a launcher has started already" in err


@pytest.mark.parametrize("words", [["--max-restarts", "2"], ["--nproc", "2", "--max-restarts", "-1"]])
def test_restarts_go_with_processes(words, hookline):
    code, err = hookline("fit", "run.yaml", *words)
    assert code == 2
    assert "is a number from 0, and goes with --nproc; torchrun has its own" in err


def test_a_wrong_configuration_is_told_once_before_anything_starts(hookline, folder):
    code, err = hookline("fit", "run.yaml", "--nproc", "2", "trainer.epoch=1")
    assert (code, err.count("\n")) == (2, 1)
    assert "trainer.epoch: unknown key, did you mean 'epochs'?" in err
    code, err = hookline("fit", "run.yaml", "--nproc", "2", "vars.a=${vars.b}")
    assert (code, err.count("\n")) == (2, 1)
    assert "vars.a: Interpolation key 'vars.b' not found" in err
    assert not (folder / "process-0.json").exists()


def test_the_configuration_is_shown_without_starting_anything(hookline, folder):
    code, err = hookline("fit", "run.yaml", "--nproc", "2", "--print-config")
    assert (code, err) == (0, "")
    assert not (folder / "process-0.json").exists()


@ranks
@pytest.mark.parametrize("door", ["fit", "validate"])
def test_processes_that_would_each_do_the_same_are_refused(door, folder):
    for outcome in run_ranks(command, 2, folder, door, "run.yaml", "-p", "no:ddp"):
        assert outcome.code == 2
        assert "torchrun has started 2 processes, and no plugin makes one run of them" in outcome.output
        assert "`-p ddp`" in outcome.output
    assert not (folder / "runs").exists()


BY_OTHERS = {  # what srun, mpirun of Open MPI, and that of MPICH and Intel MPI say
    "SLURM": {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
    "MPI": {"PMI_RANK": "1", "PMI_SIZE": "2"},
}


@pytest.mark.parametrize("launcher", BY_OTHERS)
def test_processes_of_other_launchers_are_refused_alike(launcher, hookline, folder, monkeypatch):
    for name, value in BY_OTHERS[launcher].items():
        monkeypatch.setenv(name, value)
    code, err = hookline("fit", "run.yaml", "-p", "no:ddp")
    rank, number = launch.STARTED[launcher]
    assert code == 2
    assert f"hookline: {launcher} has started 2 processes, and no plugin makes one run of them" in err
    assert f"name one that does, e.g. `-p ddp`, or unset {rank}, {number} where each shall be a run of its own" in err
    code, err = hookline("fit", "run.yaml", "--nproc", "2")
    assert code == 2
    assert (
        f"--nproc=2 would start processes within process 1 of a run that a launcher has started already ({launcher})"
        in err
    )
    assert not (folder / "runs").exists()


def test_what_is_one_process_is_not_refused(hookline, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")  # of a script of sbatch itself, whose tasks srun would start
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert hookline("fit", "run.yaml", "-p", "no:ddp", "trainer.epochs=1")[0] == 0


def test_the_names_of_launchers_are_those_that_distributed_reads():
    read = {launcher: (rank, number) for launcher, (rank, _, number) in hookline_distributed.environment.NAMES.items()}
    assert read == launch.STARTED


def command_that_may_restart(folder, *words):
    command(folder, *words, TORCHELASTIC_MAX_RESTARTS="1")


@ranks
def test_restarts_that_would_begin_from_scratch_are_refused(folder):
    for outcome in run_ranks(command_that_may_restart, 2, folder, "fit", "run.yaml", "-p", "no:checkpoint"):
        assert outcome.code == 2
        assert "goes on with its newest checkpoint, and no plugin keeps one" in outcome.output
    for outcome in run_ranks(command_that_may_restart, 2, folder, "validate", "run.yaml", "-p", "no:checkpoint"):
        assert outcome.code == 0, outcome.output


# What comes back ----------------------------------------------------------------------


def test_the_help_has_the_options(hookline, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "--nproc N" in shown
    assert "--max-restarts N" in shown


@ranks
def test_two_processes_get_the_same_words_and_train_one_model(folder, whole):
    words = ["vars.a=$$b $local_rank c", "vars.d=${vars.a}", "-p", "no:jsonl", "trainer.seed=0"]
    process = start(folder, "fit", "--nproc", "2", "run.yaml", *words[:2], "--max-restarts=1", *words[2:])
    ended(process, folder, 0)
    for rank in (0, 1):
        assert said(folder, rank)["words"] == ["fit", "run.yaml", *words]
        assert said(folder, rank)["threads"] == "1"
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert_same_end(whole, last(folder))


@ranks
@pytest.mark.slow
def test_torchrun_gives_the_same_bits(folder, whole):
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hookline")
    ended(start(folder, "fit", "run.yaml", program=program), folder, 0)
    assert_same_end(whole, last(folder))


@ranks
@pytest.mark.slow
def test_the_other_doors(folder, whole):
    ended(start(folder, "validate", "run.yaml", "--nproc", "2", f"--resume={whole}"), folder, 0)
    (metrics,) = [json.loads((folder / "out").read_text())]
    assert metrics == storage.read_manifest(whole)["metrics"]


@ranks
def test_a_mistake_in_the_set_up_is_told_once_by_all_ranks(folder):
    wrong = ["plugins.checkpoint.every=eval", "trainer.evaluate_every=null"]
    err = ended(start(folder, "fit", "run.yaml", "--nproc", "2", *wrong), folder, 2)
    assert err.count("saves after evaluations, and trainer.evaluate_every is null") == 1
    assert "ended with exit code" not in err
    assert not (folder / "runs").exists()


@ranks
@pytest.mark.slow
def test_what_one_rank_raises_is_shown_once_and_the_code_is_1(folder):
    process = start(folder, "fit", "run.yaml", "--nproc", "2", "module.fail_at=3")
    err = ended(process, folder, 1)
    assert err.count("ZeroDivisionError: in the step") == 1
    assert err.splitlines()[-1].startswith("hookline: rank 0 ")
    assert "rank 1 ended with exit code 1" in err.splitlines()[-1]
    assert not any(is_there(said(folder, rank)["pid"]) for rank in (0, 1))


def command_of_an_agent(folder, *words):
    error_file = str(folder / f"error-{os.environ['RANK']}.json")
    command(folder, *words, TORCHELASTIC_RUN_ID="x", TORCHELASTIC_ERROR_FILE=error_file)


@ranks
def test_an_agent_is_told_what_was_raised(folder):
    outcomes = run_ranks(command_of_an_agent, 2, folder, "fit", "run.yaml", "module.fail_at=3")
    assert [outcome.code for outcome in outcomes] == [1, 1]
    told = json.loads((folder / "error-1.json").read_text())["message"]
    assert told["message"] == "ZeroDivisionError: in the step"
    assert "mine.py" in told["extraInfo"]["py_callstack"]
    run_ranks(command_of_an_agent, 2, folder, "fit", "run.yaml", "module.width=3")
    told = json.loads((folder / "error-0.json").read_text())["message"]
    assert told["message"].startswith("UserError: module.width: unknown key")


# Machines that come and go ------------------------------------------------------------


def test_processes_that_are_started_anew_without_a_failure_go_on_too(hookline, folder, monkeypatch):
    told = folder / "agent" / "attempt_0" / "0" / "error.json"  # in the folder of an agent, as torchrun names it
    told.parent.mkdir(parents=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_ERROR_FILE": str(told)}.items():
        monkeypatch.setenv(name, value)
    code, err = hookline("fit", "run.yaml", "-p", "no:ddp", "trainer.epochs=1")
    assert (code, "started anew" in err) == (0, False)
    code, err = hookline("fit", "run.yaml", "-p", "no:ddp", "trainer.epochs=2")
    assert code == 0
    assert "hookline: started anew (machines have come or gone): going on with runs/run-1\n" in err
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert storage.step_of(last(folder)) == 12


def command_of_a_machine(folder, *words):
    """Be the only process of a machine."""
    told = folder / f"agent-{os.environ['RANK']}" / "attempt_0" / "0" / "error.json"
    told.parent.mkdir(parents=True)
    command(folder, *words, LOCAL_RANK="0", TORCHELASTIC_ERROR_FILE=str(told))


@ranks
def test_each_machine_remembers_the_run(folder):
    for outcome in run_ranks(command_of_a_machine, 2, folder, "fit", "run.yaml", "trainer.epochs=1"):
        assert outcome.code == 0, outcome.output
    for rank in (0, 1):
        assert (folder / f"agent-{rank}" / "hookline-run").read_text() == "runs/run-1"


# Signals ------------------------------------------------------------------------------


def assert_saved_once_and_gone_on_with(folder, whole, reason):
    (path,) = storage.listed(folder / "runs" / "run-1" / "checkpoints")
    assert storage.verify(path)["reason"] == reason
    assert not any(is_there(said(folder, rank)["pid"]) for rank in (0, 1))
    for outcome in run_ranks(command, 2, folder, "fit", "run.yaml", "--resume"):
        assert outcome.code == 0, outcome.output
    assert_same_end(whole, last(folder))


def waiting(folder, *words):
    process = start(folder, "fit", "run.yaml", "--nproc", "2", "module.wait_at=4", *words)
    until(lambda: process.poll() is not None or all((folder / f"waits-{rank}").exists() for rank in (0, 1)))
    assert process.poll() is None, (folder / "err").read_text()
    return process


@ranks
@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_launcher_saves_once(name, code, folder, whole):
    process = waiting(folder, "--max-restarts", "2")
    process.send_signal(signal.Signals[name])
    (folder / "go").touch()
    err = ended(process, folder, code)
    assert "Traceback" not in err
    (how,) = re.findall(r"^hookline: go on with: hookline (.*)$", err, re.M)
    assert [how.split()[:2], how.split()[-2:]] == [["fit", "run.yaml"], ["--resume", "runs/run-1"]]
    assert "--nproc 2 " in how
    assert_saved_once_and_gone_on_with(folder, whole, f"received {name}")


@ranks
@pytest.mark.slow
def test_a_rank_that_is_preempted_is_not_started_anew(folder, whole):
    process = waiting(folder, "--max-restarts", "2")
    os.kill(said(folder, 1)["pid"], signal.SIGTERM)
    (folder / "go").touch()
    err = ended(process, folder, 143)
    assert "started anew" not in err
    assert_saved_once_and_gone_on_with(folder, whole, "received SIGTERM")


@ranks
@pytest.mark.slow
def test_the_exit_code_of_the_plugin_comes_out(tmp_path):
    folder = prepared(tmp_path, signals={"exit_codes": {"SIGTERM": 75}})
    process = waiting(folder)
    process.send_signal(signal.SIGTERM)
    (folder / "go").touch()
    ended(process, folder, 75)


@ranks
@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_without_the_plugin_a_signal_ends_it_at_once(name, code, folder):
    process = waiting(folder, "-p", "no:signals")
    process.send_signal(signal.Signals[name])
    err = ended(process, folder, code)
    told = ["hookline: interrupted; no checkpoint was saved yet, so there is nothing to go on with"]
    assert re.findall("^hookline: .*", err, re.M) == (told if name == "SIGINT" else [])
    assert not any(is_there(said(folder, rank)["pid"]) for rank in (0, 1))
    assert storage.listed(folder / "runs" / "run-1" / "checkpoints") == []


@ranks
@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(folder):
    process = waiting(folder)
    process.send_signal(signal.SIGINT)
    until(lambda: "Received 2 death signal" in (folder / "err").read_text())  # the agent's words
    process.send_signal(signal.SIGINT)
    ended(process, folder, 130)
    assert not any(is_there(said(folder, rank)["pid"]) for rank in (0, 1))
    assert storage.listed(folder / "runs" / "run-1" / "checkpoints") == []


@ranks
@pytest.mark.slow
def test_nohup_is_respected(folder, whole):
    program = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    program += "os.execv(sys.executable, [sys.executable, '-m', 'hookline', *sys.argv[1:]])"
    words = ("fit", "run.yaml", "--nproc", "2", "module.wait_at=4")
    process = start(folder, *words, program=("-c", program))
    until(lambda: process.poll() is not None or all((folder / f"waits-{rank}").exists() for rank in (0, 1)))
    process.send_signal(signal.SIGHUP)
    (folder / "go").touch()
    ended(process, folder, 0)
    assert_same_end(whole, last(folder))


# Orphans ------------------------------------------------------------------------------


def runs(pid):
    """Tell whether a process is there, and not only what is left of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@ranks
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize(
    "program",
    [
        ("-m", "hookline", "fit", "run.yaml", "--nproc", "2"),
        pytest.param(
            ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hookline", "fit", "run.yaml"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_process_outlives_a_launcher_that_is_killed(program, folder):
    process = start(folder, "module.wait_at=4", program=program)
    until(lambda: process.poll() is not None or all((folder / f"waits-{rank}").exists() for rank in (0, 1)))
    pids = [said(folder, rank)["pid"] for rank in (0, 1)]
    assert all(map(runs, pids)), (folder / "err").read_text()
    process.kill()
    process.wait()
    until(lambda: not any(map(runs, pids)), seconds=10)


# What the page shows ------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "launch.md").read_text()


def shown(title):
    """Return the text of the block of the page that has this title."""
    (text,) = re.findall(rf'^```[^\n]*title="{title}"[^\n]*\n(.*?)^```$', PAGE, re.M | re.S)
    return text


def test_the_script_for_slurm_is_one(tmp_path):
    (tmp_path / "train.sbatch").write_text(shown("train.sbatch"))
    done = subprocess.run(["bash", "-n", "train.sbatch"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_variables_of_the_table_are_those_that_are_read():
    rows = re.findall(r"^\| (`SLURM_.*?) \|", PAGE, re.M)
    named = re.findall(r"`(SLURM_\w+)`", " ".join(rows))
    source = (Path(hookline_distributed.__file__).parent / "environment.py").read_text()
    assert named
    assert set(named) == set(re.findall(r'"(SLURM_\w+)"', source))


SRUN = """#!/bin/bash
# starts two tasks of one machine as srun does, with what it puts into their environment
shift
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; a=$?
wait $second; b=$?
exit $((a > b ? a : b))
"""


def free_job():
    """Return a number of a job from which a port follows that is free."""
    for job in range(20_000):
        with socket.socket() as tried:
            if tried.connect_ex(("localhost", 15_000 + job)) != 0:
                return str(job)
    raise AssertionError("all ports are taken")


@ranks
@pytest.mark.slow
def test_the_script_for_slurm_trains_is_preempted_and_goes_on(folder, whole):
    (folder / "train.sbatch").write_text(shown("train.sbatch"))
    launcher = f'#!/bin/bash\nexec {sys.executable} -m hookline "$@"\n'
    programs = {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" > requeued\n', "hookline": launcher}
    for name, text in programs.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    said_by_sbatch = {"SLURM_JOB_ID": free_job(), "SLURM_NTASKS": "2", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def job(module):
        (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("_target_: mine.Mine", module))
        with (folder / "err").open("w") as err:
            environment = {**os.environ, **said_by_sbatch}
            return subprocess.Popen(["bash", "train.sbatch"], cwd=folder, env=environment, stderr=err)

    process = job("_target_: mine.Mine\n  wait_at: 4")
    until(lambda: process.poll() is not None or all((folder / f"waits-{rank}").exists() for rank in (0, 1)))
    for rank in (0, 1):
        os.kill(said(folder, rank)["pid"], signal.SIGTERM)
    (folder / "go").touch()
    ended(process, folder, 143)
    assert (folder / "requeued").read_text() == f"requeue {said_by_sbatch['SLURM_JOB_ID']}\n"
    ended(job("_target_: mine.Mine"), folder, 0)
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    assert_same_end(whole, last(folder))


def test_the_job_for_kubernetes_is_one():
    service, job = yaml.safe_load_all(shown("job.yaml"))
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    (container,) = pod["containers"]
    torchrun, *words = container["command"]
    assert torchrun == "torchrun"
    options = get_args_parser().parse_args(words)
    assert options.nnodes == str(spec["completions"])
    assert options.rdzv_endpoint.partition(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert (options.module, options.training_script) == (True, "hookline")
    assert _parse(options.training_script_args).door == "train"
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    grace = {variable["name"]: int(variable["value"]) for variable in container["env"]}
    assert grace["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
