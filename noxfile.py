"""Sessions beyond the default test run: `nox -l` lists them, `nox -s NAME` runs one."""

from pathlib import Path

import nox

PLUGINS = sorted(path.parent.name for path in Path("plugins").glob("*/pyproject.toml"))
TORCH = "torch==2.13.0"  # stands in every pip command that needs it, so that no range brings another build

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests, as CI does: those of the README's command, then those that take longer."""
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", "-n", "auto", *session.posargs)
    session.run("pytest", "-n", "auto", "--thorough", *session.posargs)


CORE = [f"tests/test_{name}.py" for name in ("parts", "interfaces", "plugins", "trainer", "parity", "budgets")]
PROGRAMS = {("docs", "how-to"): "tests/test_howto.py", ("examples", "recipes"): "tests/test_recipes.py"}
ALWAYS = ["tests/test_architecture.py", "tests/test_private_parts.py"]


def tests_of(changed: list[str]) -> tuple[list[str], list[str]]:
    """Return the tests that belong to changed files, and which of the files are pages of documentation."""
    tests, pages = set(ALWAYS), set()
    for name in changed:
        path = Path(name)
        if path.parts[0] == "plugins" and len(path.parts) > 2:
            tests.add(f"plugins/{path.parts[1]}/tests")
        elif path.parts[0] == "tests" and path.name.startswith("test_"):
            tests.add(name)
        elif path.parts[0] == "src":
            tests.update(CORE)
        elif path.parts[:2] in PROGRAMS:
            tests.add(PROGRAMS[path.parts[:2]])
        if path.suffix == ".md":
            pages.add(name)
    return sorted(test for test in tests if Path(test).exists()), sorted(pages)


@nox.session(venv_backend="none")
def quick(session: nox.Session) -> None:
    """Run what CI runs on what you have changed, in the environment that is active: `nox -s quick [-- since]`."""
    since = session.posargs[0] if session.posargs else "HEAD"
    changed = [
        *session.run("git", "diff", "--name-only", since, silent=True, external=True, log=False).split(),
        *session.run(
            "git", "ls-files", "--others", "--exclude-standard", silent=True, external=True, log=False
        ).split(),
    ]
    session.run("ruff", "check", ".", external=True)
    session.run("ruff", "format", "--check", ".", external=True)
    if any(name.startswith("src/") for name in changed):
        session.run("mypy", "--no-error-summary", "src/hookline", external=True)
    tests, pages = tests_of(changed)
    session.run("pytest", "-q", "-n", "auto", *tests, external=True)
    if pages:
        chosen = " or ".join(pages)
        session.run(
            "pytest", "-q", "-n", "auto", "tests/test_docs.py", "-k", chosen, external=True, success_codes=[0, 5]
        )  # 5: no test speaks of these pages


@nox.session
def faults(session: nox.Session) -> None:
    """Run every row of docs/reliability.md, the slow ones too."""
    session.install("-r", "requirements-dev.txt")
    rows = ["tests/faults", "plugins/checkpoint/tests/test_foreign.py", "plugins/finite/tests"]
    session.run("pytest", "-n", "auto", *rows, "-m", "slow or not slow", "--durations=20", *session.posargs)


@nox.session
def kit(session: nox.Session) -> None:
    """Do every check of the conformance kit on every plugin, the long ones too, and on all broken ones."""
    session.install("-r", "requirements-dev.txt")
    tests = [f"tests/test_{name}.py" for name in ("house", "checks", "works_with", "other_device")]
    session.run("pytest", "-n", "auto", *tests, "-m", "slow or not slow", "--durations=20", *session.posargs)


@nox.session
def distributed(session: nox.Session) -> None:
    """Run all tests of several processes, the slow ones too: launching, elastic runs, two machines."""
    session.install("-r", "requirements-dev.txt")
    names = ("activation_checkpoint", "compile", "context_parallel", "corpus", "ddp", "distributed", "expert_parallel")
    names += ("float8", "fsdp", "lora", "metrics", "optimizer", "optimizer_in_backward", "pipeline", "prefetch")
    names += ("progress", "simulate", "sync_batchnorm")
    faults = ("elastic", "g_context", "g_consol", "g_datascale", "g_experts", "g_pipeline", "g_ranks", "launch")
    rows = [f"tests/faults/test_{name}.py" for name in (*faults, "ranks", "two_machines")]
    tests = [
        *(f"plugins/{name}/tests" for name in (*names, "tp", "watchdog")),
        *rows,
        *(f"tests/test_{name}.py" for name in ("growth", "howto", "launch", "llm", "pairs")),
    ]
    session.run("pytest", "-n", "auto", *tests, "-m", "slow or not slow", "--durations=20", *session.posargs)


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Train by DeepSpeed's engine; its operator for the CPU is compiled first, by g++."""
    session.install("deepspeed==0.19.8", "-r", "requirements-dev.txt")
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    session.run("python", "-c", build, env={"DS_ACCELERATOR": "cpu"})
    session.run("pytest", "-n", "0", "plugins/deepspeed/tests", "-m", "slow or not slow", *session.posargs)


@nox.session
def ray(session: nox.Session) -> None:
    """Train on workers of Ray Train, in a cluster of this machine alone."""
    session.install("ray[train]==2.60.0", "-r", "requirements-dev.txt")
    session.run("pytest", "-n", "0", "plugins/ray/tests", "-m", "slow or not slow", *session.posargs)


@nox.session
def ft(session: nox.Session) -> None:
    """Lose replicas and take them in again, by torchft."""
    session.install("torchft-nightly==2026.10.26", "-r", "requirements-dev.txt")
    session.run("pytest", "-n", "0", "plugins/ft/tests", "-m", "slow or not slow", *session.posargs)


@nox.session
def mosaic(session: nox.Session) -> None:
    """Read shards by MosaicML Streaming, which wants older versions of what other tests have."""
    session.install(
        "mosaicml-streaming==0.13.0",
        "-r",
        "requirements.txt",
        "pytest==9.2.0",
        "pytest-timeout==2.4.0",
        "pytest-xdist==3.8.0",
    )
    tests = ("plugins/corpus/tests", "tests/habits/test_streams.py")
    session.run("pytest", "-n", "0", *tests, "-k", "mosaic", *session.posargs)


@nox.session
def trackers(session: nox.Session) -> None:
    """Hand runs to the real services, on servers and in a browser too, and read back what they have kept.

    The browser is the machine's: chromium and chromedriver. Without them, what needs them is left out.
    """
    session.install("mlflow==3.17.2", "-r", "requirements-dev.txt")  # the whole one can serve
    names = ("accmt", "aim", "clearml", "comet", "csv", "dvclive", "mlflow", "tensorboard", "wandb")
    tests = [
        "tests/test_tracking.py",
        "tests/test_trackers_together.py",
        *(f"plugins/{name}/tests" for name in names),
        "plugins/runs/tests/test_report.py",
        "plugins/runs/tests/test_report_browser.py",
    ]
    session.run("pytest", "-n", "auto", *tests, "-m", "slow or not slow", "--durations=20", *session.posargs)


@nox.session
def lightning(session: nox.Session) -> None:
    """Train the demo modules of the real Lightning, here and by its own trainer, to the same losses."""
    session.install("lightning==2.6.6", "-r", "requirements-dev.txt")
    names = ("bases", "differential", "package", "package_loaders", "package_trainer")
    tests = [f"plugins/lightning/tests/test_{name}.py" for name in names]
    session.run("pytest", "-n", "0", *tests, "-m", "slow", *session.posargs)


@nox.session
def notebook(session: nox.Session) -> None:
    """Train in a real Jupyter kernel, and look at the outputs of the cell."""
    session.install("ipykernel", "nbclient", "nbformat", "-r", "requirements-dev.txt")
    session.run("pytest", "-n", "0", "plugins/progress/tests/test_notebook.py", "-m", "slow", *session.posargs)


@nox.session
def third_party(session: nox.Session) -> None:
    """Build the wheel of the plugin in examples/third_party, install it, and run all its tests there."""
    session.install("flit_core", "-r", "requirements-dev.txt")
    session.run("pytest", "-n", "0", "tests/test_third_party.py", "-m", "slow or not slow", *session.posargs)


@nox.session
def recipes(session: nox.Session) -> None:
    """Train the recipes to what their pages say, and cut each of them once."""
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", "-n", "auto", "tests/test_recipes.py", "-m", "slow or not slow", *session.posargs)


@nox.session
@nox.parametrize("name", PLUGINS)
def plugin(session: nox.Session, name: str) -> None:
    """Build one plugin's wheel and the core's, install those alone, and run the plugin's tests that need no other."""
    wheels = session.create_tmp()
    session.install("build", "flit_core", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis")
    session.install("matplotlib", "psutil", "scikit-learn", "schedulefree")
    for folder in (".", f"plugins/{name}"):
        session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, folder)
    session.install(TORCH, *map(str, Path(wheels).glob("*.whl")))
    session.run(
        "pytest", "-c", "pyproject.toml", f"plugins/{name}/tests", "-m", "not plugins and not slow", *session.posargs
    )


@nox.session
def bare(session: nox.Session) -> None:
    """Run the core's tests with the core alone: no plugin is installed."""
    session.install(TORCH, ".", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "numpy")
    session.run(
        "pytest",
        "-n",
        "auto",
        "tests",
        "--ignore",
        "tests/faults",
        "--ignore",
        "tests/test_launch.py",
        "-m",
        "not plugins and not slow",
        *session.posargs,
    )


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the core and of every plugin."""
    session.install("-r", "requirements-dev.txt")
    session.run("mypy", "src/hookline")
    for name in PLUGINS:
        session.run("mypy", f"plugins/{name}/src", env={"MYPYPATH": f"src:plugins/{name}/src"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff==0.17.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def docs(session: nox.Session) -> None:
    """Write the reference of hooks from their source, and build the site."""
    session.install("-r", "requirements-dev.txt")
    with open("docs/hooks.md", "w") as reference:
        session.run("python", "-m", "hookline.cli.hooks", stdout=reference)
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def site(session: nox.Session) -> None:
    """Look at the site: links, navigation, search and copying, in a headless browser at three widths.

    The browser is the machine's: chromium and chromedriver. Without them, what needs them is left out.
    """
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", "-n", "0", "tests/test_site.py", "-m", "slow or not slow", "--durations=10", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a step costs, what a checkpoint costs, and what it costs to pack a corpus."""
    session.install("-r", "requirements-dev.txt")
    session.run("python", "benchmarks/step_overhead.py", "--json")
    session.run("python", "benchmarks/checkpoint.py", "--json")
    session.run("python", "benchmarks/corpus.py", "--json")
    session.run("python", "benchmarks/growth.py", "--json")


@nox.session
def peers(session: nox.Session) -> None:
    """Measure a step through each framework that people would use instead: counts, and times where it is quiet."""
    session.install(
        *("lightning==2.6.6", "accelerate==1.15.0", "transformers==5.23.0", "pytorch-ignite==0.5.5", "skorch==1.4.0"),
        *("pytorch-accelerated==0.1.61", "keras==3.15.1", "torchtnt==0.2.4", "setuptools==80.9.0"),
        *("matplotlib==3.11.2", "torchdata==0.11.0", "optree==0.20.0", "-r", "requirements.txt"),
    )
    session.run("python", "-m", "benchmarks.peers", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheels of the core and of every plugin into dist/."""
    session.install("build", "flit_core")
    for folder in (".", *(f"plugins/{name}" for name in PLUGINS)):
        session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", folder)


@nox.session
def new(session: nox.Session) -> None:
    """Write the skeleton of a first-party plugin: `nox -s new -- NAME`."""
    session.install("-r", "requirements.txt")
    session.run("hookline", "new", "plugin", *session.posargs, "--folder", "plugins")
