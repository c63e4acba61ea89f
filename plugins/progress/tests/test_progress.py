"""What appears on a terminal and in a log file, from real runs in processes of their own and in this one."""

import contextlib
import io
import itertools
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

import hookline_progress
from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl, sharded
from hookline.testing import check_plugin
from hookline_progress import Progress
from hookline_progress.validation import direction


class Repeated:
    """A loader that gives one batch again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        return itertools.repeat(torch.zeros(2), self.batches)


class Line(ModuleInterface):
    """Its losses are the steps themselves: known numbers to look for."""

    def __init__(self, samples=8, losses=(3.0, 2.0, 2.5, 1.0)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.samples = samples
        self.losses = iter(losses)

    def train_step(self, global_step, batch, device):
        self.log(shown=10.0 + global_step, prog=True)
        self.log(hidden=20.0)
        return self.weight * 0 + global_step

    def val_step(self, global_step, batch, device):
        return torch.tensor(self.loss)

    def test_step(self, global_step, batch, device):
        return torch.tensor(0.125)

    def predict_step(self, global_step, batch, device):
        return batch

    @hookimpl
    def on_begin_evaluation(self):
        self.loss = next(self.losses)

    @hookimpl
    def on_end_predict_step(self):
        pass

    def get_train_dataloader(self, sampler, batch_size):
        return sharded(Repeated(self.samples // batch_size))

    def get_val_dataloaders(self, sampler, batch_size):
        return sharded([torch.zeros(batch_size)] * 3)

    get_test_dataloaders = get_predict_dataloaders = get_val_dataloaders

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1)], []


class Endless(Line):
    def get_train_dataloader(self, sampler, batch_size):
        return (torch.zeros(1) for _ in range(4))


class Do(CallbackInterface):
    """Call a function after each step."""

    def __init__(self, function):
        self.function = function

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        self.function(trainer, global_step)


def print_and_log(trainer, global_step):
    if global_step == 3:
        print("printed", flush=True)
        logging.getLogger("mine").warning("logged")
        sys.stderr.write("written\n")
    if global_step == 5:
        os.write(2, b"from outside\n")  # as another process does, or a library in C


def fail(trainer, global_step):
    if global_step == 3:
        raise RuntimeError("the loss went\nthrough the roof")


def run_as(what):
    """Do a run in this process, which a test has started for it."""
    logging.basicConfig(format="%(message)s")  # a handler that holds the stream of before
    function = {"trains": print_and_log, "fails": fail}[what]
    Trainer(Line(), [Progress(refresh=1e-6), Do(function)], epochs=2, train_batch_size=2, log_every="1 step").train()


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows after what was written to it."""
    lines, row, column = [""], 0, 0
    for control, move, erase, end, text in re.findall(
        r"(\x1b\[[?0-9;]*[hlm])|\x1b\[(\d+)A|(\x1b\[2K|\x1b\[J)|(\r|\n)|([^\x1b\r\n]+|\x1b)", written
    ):
        if move:
            row -= int(move)
            assert row >= 0, "the cursor left the screen"
        elif erase == "\x1b[2K":
            lines[row] = ""
        elif erase:
            assert column == 0
            lines[row:] = [""]
        elif end == "\r":
            column = 0
        elif end == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            assert text != "\x1b", "an unknown control sequence"
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        assert control or move or erase or end or text
    return [line.rstrip() for line in lines if line.strip()]


def in_a_terminal(*words: str, cwd=None, **variables: str) -> str:
    """Return what a process of Python wrote to its terminal."""
    master, slave = pty.openpty()
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux ends a terminal so
            while chunk := os.read(master, 65536):
                written.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", **variables}
    command = [sys.executable, *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=cwd)
    os.close(slave)
    process.wait(timeout=60)
    reader.join()
    os.close(master)
    return written.decode()


def lines_of(*plugins, module=None, progress=None, door="train", **options) -> list[str]:
    """Return what a run in this process writes where there is no terminal."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        trainer = Trainer(module or Line(), [progress or Progress(), *plugins], **options)
        getattr(trainer, door)()
    return stderr.getvalue().splitlines()


def drawn(*plugins, module=None, progress=None, door="train", **options) -> tuple[list[str], str]:
    """Return what a terminal shows after a run in this process, and all that was written to it but colours."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        progress = progress or Progress(refresh=1e-6, force_terminal=True)
        getattr(Trainer(module or Line(), [progress, *plugins], **options), door)()
    return without_times(screen(stderr.getvalue().replace("\n", "\r\n"))), uncoloured(stderr.getvalue())


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class Until:
    """A loader that gives batches until something has been written to standard error."""

    def __init__(self, pattern, length=None):
        self.pattern = pattern
        self.length = length

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length

    def __iter__(self):
        stderr, end = sys.stderr.rich_proxied_file, time.monotonic() + 60
        while not re.search(self.pattern, uncoloured(stderr.getvalue())):
            assert time.monotonic() < end, f"{self.pattern} was never written"
            yield torch.zeros(1)


def without_times(lines: list[str]) -> list[str]:
    kept = [re.sub(r", [\d.e+]+/s(?=,|$)|, \d+:\d\d:\d\d left", "", line) for line in lines]
    return [re.sub(r"\d+:\d\d:\d\d", "<time>", line) for line in kept]


def test_the_contract_is_kept():
    check_plugin(Progress)


def test_a_terminal_shows_bars_and_keeps_the_lines_that_matter():
    written = in_a_terminal(__file__, "trains")
    lines = without_times(screen(written))
    assert lines == [
        "training: 2 epochs, 8 steps",
        "printed",
        "logged",
        "written",
        "validated at step 4/8, epoch 1/2: val_loss 3 (best)",
        "from outside",
        "validated at step 8/8, epoch 2/2: val_loss 2 (best)",
        "validation at step 8/8, epoch 2/2",
        "╭──────────┬───────┬────────┬──────┬─────────╮",
        "│ metric   │ value │ change │ best │ at step │",
        "├──────────┼───────┼────────┼──────┼─────────┤",
        "│ val_loss │   2 ★ │     -1 │    2 │       8 │",
        "╰──────────┴───────┴────────┴──────┴─────────╯",
        "finished at step 8/8, 2/2 epochs, after <time>",
    ]
    plain = uncoloured(written)
    assert re.search(r"epoch 1/2 +━+╺?━+ +1/4", plain)
    assert re.search(r"step +━+╺?━+ +1/8", plain)
    assert re.search(r"\nshown 18  train_loss 8  train_loss_epoch 6.5\r\n", plain)
    assert "hidden" not in plain
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is back


def test_a_failure_leaves_a_clean_terminal_and_its_reason():
    lines = screen(in_a_terminal(__file__, "fails"))
    said = without_times(lines)
    assert said[0] == "training: 2 epochs, 8 steps"
    assert said[1] == "failed at step 3/8, 0/2 epochs, after <time>: RuntimeError: the loss went"
    assert lines[2] == "Traceback (most recent call last):"
    assert not any("━" in line for line in lines)


def test_a_log_file_gets_plain_lines():
    command = [sys.executable, __file__, "trains"]
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}  # as build servers set them
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "printed\n"
    assert without_times(done.stderr.splitlines()) == [
        "training: 2 epochs, 8 steps",
        "logged",
        "written",
        "validated at step 4/8, epoch 1/2: val_loss 3 (best)",
        "epoch 1/2, step 4/8, shown 14, train_loss 4, train_loss_epoch 2.5, epoch done",
        "from outside",
        "validated at step 8/8, epoch 2/2: val_loss 2 (best)",
        "epoch 2/2, step 8/8, shown 18, train_loss 8, train_loss_epoch 6.5, epoch done",
        "finished at step 8/8, 2/2 epochs, after <time>",
    ]


def test_the_best_is_marked_only_when_it_is_better():
    module = Line(losses=(3.0, 3.0, float("nan"), 2.0))
    lines = lines_of(module=module, epochs=4, train_batch_size=8)
    validated = [line.split(": ")[1] for line in lines if line.startswith("validated")]
    assert validated == ["val_loss 3 (best)", "val_loss 3", "val_loss nan", "val_loss 2 (best)"]


def test_lines_come_at_their_cadence():
    """A run of a bit more than two seconds: steps until then, and a line each second."""
    ends = []  # of the steps, by the clock

    def stop(trainer, global_step):
        ends.append(time.monotonic())
        if ends[-1] > ends[0] + 2.3:
            trainer.stop("the time is over")

    progress = Progress(every="1 s")
    lines = lines_of(
        Do(stop), module=Line(samples=10**9), progress=progress, evaluate_every=None, eval_when_finish=False
    )
    steps = [line for line in lines if line.startswith("epoch 1/1, step")]
    assert 1 <= len(steps) <= ends[-1] - ends[0] + 1
    rest = r"shown .*, train_loss .*, [\d.]+/s, [\d:, days]+ left"
    assert re.fullmatch(rf"epoch 1/1, step \d+/1000000000, {rest}", steps[-1])


def test_unknown_totals_are_left_out():
    lines = without_times(lines_of(module=Endless(), max_steps=6, evaluate_every=None, eval_when_finish=False))
    assert lines == [
        "training: 6 steps",
        "epoch 1, step 4/6, train_loss_epoch 2.5, epoch done",
        "finished at step 6/6, 1 epochs, after <time>",
    ]
    stop = Do(lambda trainer, global_step: trainer.stop("enough"))
    lines = without_times(lines_of(stop, module=Endless(), max_time="1h"))
    assert lines[0] == "training: until it is stopped"
    assert lines[-1] == "stopped at step 1, 0 epochs, after <time>: enough"


def test_a_bar_of_unknown_length_moves():
    class Open(Line):
        def get_train_dataloader(self, sampler, batch_size):
            return Until(r"step +━+ +([2-9]|\d\d+) +[\d.e+]+/s")

    shown, plain = drawn(module=Open(), epochs=1)
    assert shown[0] == "training: 1 epochs"
    assert re.fullmatch(r"validated at step \d+, epoch 1/1: val_loss 3 \(best\)", shown[1])
    assert re.fullmatch(r"finished at step \d+, 1/1 epochs, after <time>", shown[-1])
    assert re.search(r"epoch 1/1 +━+ +([2-9]|\d\d+) ", plain)


def test_a_resumed_run_goes_on_where_it_was():
    class Resume(CallbackInterface):
        @hookimpl
        def restore(self, trainer, stage):
            return trainer.hook.set_run_state(trainer=trainer, state=kept["state"], stage=stage)

    kept = {}

    def keep(trainer, global_step):
        if global_step == 7:
            kept["state"] = trainer.hook.get_run_state(trainer=trainer)
            trainer.stop("enough")

    options = {"epochs": 3, "train_batch_size": 2, "log_every": "1 step"}
    lines = without_times(lines_of(Do(keep), module=Line(losses=(2.5, 9.0)), **options))
    assert lines[-1] == "stopped at step 7/12, 1/3 epochs, after <time>: enough"

    shown, plain = drawn(Resume(), module=Line(losses=(2.5, 2.25)), **options)
    assert re.search(r"epoch 2/3 +━+╺?━+ +3/4", plain)
    assert re.search(r"step +━+╺?━+ +7/12", plain)
    assert "epoch 1/3" not in plain
    assert not re.search(r" [0-6]/12", plain)
    assert shown == [
        "training: 3 epochs, 12 steps, going on after step 7",
        "validated at step 8/12, epoch 2/3: val_loss 2.5",
        "validated at step 12/12, epoch 3/3: val_loss 2.25 (best)",
        *shown[-7:-1],
        "finished at step 12/12, 3/3 epochs, after <time>",
    ]
    assert shown[-3].split() == ["│", "val_loss", "│", "2.25", "★", "│", "-0.25", "│", "2.25", "│", "12", "│"]
    kept["state"]["plugins"].clear()  # a run that did without this plugin knows the best value, and not its step
    shown, _ = drawn(Resume(), module=Line(losses=(2.75, 2.5)), **options)
    assert shown[-3].split() == ["│", "val_loss", "│", "2.5", "│", "-0.25", "│", "2.5", "│", "│"]


@pytest.mark.parametrize(
    ("door", "metrics"), [("validate", "val: val_loss 3"), ("test", "test: test_loss 0.125"), ("predict", None)]
)
def test_evaluations_on_their_own(door, metrics):
    stage = {"validate": "val"}.get(door, door)
    lines = [*([metrics] if metrics else []), f"finished {stage} after <time>"]
    assert without_times(lines_of(door=door)) == lines

    class Long(Line):
        def get_val_dataloaders(self, sampler, batch_size):
            return Until(rf"{stage} +━+ +([2-9]|\d\d+)/9999999 +[\d.e+]+/s +[\d:]+ left", length=9999999)

        get_test_dataloaders = get_predict_dataloaders = get_val_dataloaders

    shown, _ = drawn(module=Long(), door=door)
    assert shown == lines


def test_loaders_are_told_apart_and_a_sanity_check_is_called_so():
    class Two(Line):
        def get_val_dataloaders(self, sampler, batch_size):
            kind = "sanity check" if self.trainer.sanity_checking else "val"
            return {key: Until(rf"{kind} {key} +━+╺?━+ +[1-9]\d*/9999999", length=9999999) for key in ("near", "far")}

    shown, plain = drawn(module=Two(), train_batch_size=4, sanity_val_steps=9999999)
    seen = re.findall(r"(sanity check|val) (near|far)", plain)
    assert list(dict.fromkeys(seen)) == list(itertools.product(("sanity check", "val"), ("near", "far")))
    assert (
        shown[1] == "validated at step 2/2, epoch 1/1: val_loss 2 (best), val_loss/near 2 (best), val_loss/far 2 (best)"
    )


def test_the_loss_so_far_of_a_validation_is_shown_while_it_lasts():
    class Told(Line):
        def get_val_dataloaders(self, sampler, batch_size):
            return Until(r"train_loss_epoch 4.5  val_loss_batch 3")

    options = {"report_loss_after_eval": False, "log_every": "1 step", "eval_when_finish": False}
    drawn(module=Told(), epochs=2, evaluate_every="12 steps", **options)
    lines = lines_of(**options)
    assert not [line for line in lines if "val_loss_batch" in line]


def test_another_rank_says_nothing():
    class Second(CallbackInterface):
        @hookimpl
        def get_ranks(self, trainer):
            return 1, 1, 2

    assert lines_of(Second(), train_batch_size=2, door="train") == []


def test_streams_and_handlers_are_given_back():
    handler = logging.StreamHandler()
    logging.root.addHandler(handler)
    before = sys.stdout, sys.stderr, handler.stream
    try:
        with pytest.raises(RuntimeError, match="roof"):
            Trainer(Line(), [Progress(force_terminal=True), Do(fail)]).train()
        assert (sys.stdout, sys.stderr, handler.stream) == before
    finally:
        logging.root.removeHandler(handler)


def test_many_short_epochs_are_drawn_no_more_often_than_asked():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        progress = Progress(refresh=3600.0, force_terminal=True)
        Trainer(Line(), [progress], epochs=50, evaluate_every=None, eval_when_finish=False).train()
    assert (
        len(re.findall(r"epoch \d+/50", stderr.getvalue())) <= 4
    )  # at the start, below a line, at the first step, at the end


def test_a_step_that_draws_nothing_costs_one_call():
    calls = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == hookline_progress.__file__:
            calls.append(frame.f_code.co_name)

    def count(trainer, global_step):
        sys.setprofile(profile if 2 <= global_step < 7 else None)

    lines_of(Do(count), progress=Progress(refresh=3600.0), train_batch_size=1)
    # Who matters is told before observers, so the steps from 2 to 6 are profiled.
    assert calls == ["on_end_train_step"] * 5


class Measured(Line):
    """Logs metrics by name, one row of values a validation."""

    def __init__(self, rows, keys=()):
        super().__init__(samples=1, losses=range(len(rows)))
        self.rows = rows
        self.keys = keys

    def val_step(self, global_step, batch, device):
        self.log(**self.rows[self.loss])
        return batch  # no scalar, so no loss

    def get_val_dataloaders(self, sampler, batch_size):
        return {key: [torch.zeros(2)] for key in self.keys or ["default"]}


def table_of(rows, keys=(), progress=None):
    """Return what the table at the end of a run holds, without its frame."""
    shown, _ = drawn(module=Measured(rows, keys), progress=progress, epochs=len(rows))
    return [re.sub(" +", " ", line.strip("│ ")) for line in shown if line.startswith("│")]


def test_the_table_marks_what_is_best_where_its_direction_is_known():
    rows = [
        {"val_accuracy": 0.5, "val_score": 7, "huber_loss": 4, "r": 3, "s": 3},
        {"val_accuracy": 0.75, "val_score": 9, "huber_loss": 2, "r": 2, "s": 2},
        {"val_accuracy": 0.625, "val_score": 8, "huber_loss": float("nan"), "r": 1, "s": 4},
    ]
    progress = Progress(refresh=1e-6, force_terminal=True, higher=["s"], lower=["r"])
    assert table_of(rows, progress=progress) == [
        "metric │ value │ change │ best │ at step",
        "val_accuracy │ 0.625 │ -0.125 │ 0.75 │ 2",
        "val_score │ 8 │ -1",
        "huber_loss │ nan │ │ 2 │ 2",
        "r │ 1 ★ │ -1 │ 1 │ 3",
        "s │ 4 ★ │ +2 │ 4 │ 3",
    ]
    lines = lines_of(module=Measured(rows), epochs=3)
    assert [line.partition(": ")[2] for line in lines if line.startswith("validated")] == [
        "val_accuracy 0.5 (best), val_score 7, huber_loss 4 (best), r 3, s 3",
        "val_accuracy 0.75 (best), val_score 9, huber_loss 2 (best), r 2, s 2",
        "val_accuracy 0.625, val_score 8, huber_loss nan, r 1, s 4",
    ]


def test_several_loaders_are_columns_where_they_fit(monkeypatch):
    rows = [{"accuracy": 0.5}, {"accuracy": 0.75}]
    monkeypatch.setenv("COLUMNS", "100")
    assert table_of(rows, ["near", "far"]) == [
        "metric │ near │ change │ best │ at step │ far │ change │ best │ at step",
        "accuracy │ 0.75 ★ │ +0.25 │ 0.75 │ 2 │ 0.75 ★ │ +0.25 │ 0.75 │ 2",
    ]
    monkeypatch.setenv("COLUMNS", "70")
    assert table_of(rows, ["near", "far"]) == [
        "metric │ value │ change │ best │ at step",
        "accuracy/near │ 0.75 ★ │ +0.25 │ 0.75 │ 2",
        "accuracy/far │ 0.75 ★ │ +0.25 │ 0.75 │ 2",
    ]


def test_a_table_of_many_metrics_leaves_room_for_the_bars(monkeypatch):
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "80")
    shown, plain = drawn(module=Measured([{f"m{index}": 1 for index in range(30)}] * 2), epochs=2)
    assert sum(line.startswith("│ m") for line in shown) == 31  # at the end all of them, and the head
    block = plain.split("\x1b[J")[-2]
    assert "and 22 more" in block
    assert re.search(r"step +━", block)
    assert block.count("\n") < 20


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("val_loss", -1), ("MeanSquaredError", -1), ("val_top5_accuracy", 1), ("val_m_MulticlassAUROC", 1),
        ("BinaryF1Score", 1), ("score", 0), ("error_recall", 0), ("glossary", 0), ("", 0),
    ],
)  # fmt: skip
def test_names_say_which_way_is_better_or_do_not(name, way):
    assert direction(name) == way


def test_a_terminal_that_knows_no_stars_gets_asterisks():
    stderr = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stderr(stderr):
        Trainer(Line(), [Progress(force_terminal=True)]).train()
    stderr.flush()
    assert "| val_loss |   3 * |        |    3 |       8 |" in uncoloured(stderr.buffer.getvalue().decode())


@pytest.mark.parametrize("name", ["hookline", "hookline.progress"])
@pytest.mark.parametrize("force_terminal", [True, False])
def test_a_level_above_info_silences_it_and_keeps_its_state(name, force_terminal):
    logger, stderr = logging.getLogger(name), io.StringIO()
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stderr(stderr):
            progress = Progress(refresh=1e-6, force_terminal=force_terminal)
            Trainer(Line(), [progress], epochs=2).train()
    finally:
        logger.setLevel(logging.NOTSET)
    assert stderr.getvalue() == ""
    assert progress.get_state() == {"best": {"val_loss": [2.0, 16]}, "last": {"val_loss": 2.0}}


class OfTwo(Line):
    """Its second rank speaks once an epoch."""

    def train_step(self, global_step, batch, device):
        if os.environ["RANK"] == "1" and global_step in (3, 11):
            print(f"rank 1 in step {global_step}", flush=True)
            logging.getLogger("hookline.mine").info("of rank 0 alone")
        return self.weight * global_step


@pytest.mark.slow
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_share_a_terminal(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "module: {_target_: test_progress.OfTwo}\n"
        "trainer: {epochs: 2, train_batch_size: 2, device: cpu, log_every: 1 step}\n"
        "plugins: {ddp: {}, progress: {refresh: 1.0e-6}}\n"
    )
    words = ["-m", "hookline", "fit", "run.yaml", "--nproc", "2"]
    written = in_a_terminal(*words, cwd=tmp_path, PYTHONPATH=os.path.dirname(__file__))
    lines = without_times(screen(written))
    of_others = [line for line in lines if line.startswith("rank 1")]
    assert of_others == ["rank 1 in step 3", "rank 1 in step 11"]
    own = [line for line in lines if line not in of_others]
    assert own == [
        own[0],
        "training: 2 epochs, 16 steps",
        "validated at step 8/16, epoch 1/2: val_loss 3 (best)",
        "validated at step 16/16, epoch 2/2: val_loss 2 (best)",
        "validation at step 16/16, epoch 2/2",
        *own[5:10],
        "finished at step 16/16, 2/2 epochs, after <time>",
        own[-1],
    ]
    assert re.fullmatch(r"[-\d]+ <time> INFO hookline.trainer: train begins in .* on cpu, rank 0 of 2", own[0])
    assert re.fullmatch(r"[-\d]+ <time> INFO hookline.trainer: train finished at step 16 after [\d.]+ s", own[-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, r"progress\.refresh=0 must be above 0 seconds"),
        ({"every": "50 steps"}, r"progress\.every='50 steps' must be a time, such as"),
        (
            {"higher": ["a", "b"], "lower": ["b"]},
            r"progress\.higher and progress\.lower both name b; leave one of them",
        ),
        ({"every": "soon"}, r"progress\.every: 'soon' is not a cadence; write one like"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Progress(**options)


if __name__ == "__main__":
    run_as(sys.argv[1])
