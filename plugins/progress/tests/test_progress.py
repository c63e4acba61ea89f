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
from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.testing import check_plugin
from hookline_progress import Progress


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
        return Repeated(self.samples // batch_size)

    def get_val_dataloaders(self, sampler, batch_size):
        return [torch.zeros(batch_size)] * 3

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
        r"(\x1b\[[?0-9;]*[hlm])|\x1b\[(\d+)A|(\x1b\[2K)|(\r|\n)|([^\x1b\r\n]+|\x1b)", written
    ):
        if move:
            row -= int(move)
            assert row >= 0, "the cursor left the screen"
        elif erase:
            lines[row] = ""
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


def in_a_terminal(what: str) -> str:
    """Return what a process wrote to its terminal."""
    master, slave = pty.openpty()
    written = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux ends a terminal so
            while chunk := os.read(master, 65536):
                written.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, __file__, what]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
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


def drawn(*plugins, module=None, door="train", **options) -> tuple[list[str], str]:
    """Return what a terminal shows after a run in this process, and all that was written to it but colours."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        progress = Progress(refresh=1e-6, force_terminal=True)
        getattr(Trainer(module or Line(), [progress, *plugins], **options), door)()
    return without_times(screen(stderr.getvalue())), uncoloured(stderr.getvalue())


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
        stderr, end = sys.stderr.rich_proxied_file, time.monotonic() + 20
        while not re.search(self.pattern, uncoloured(stderr.getvalue())):
            assert time.monotonic() < end, f"{self.pattern} was never written"
            yield torch.zeros(1)


def without_times(lines: list[str]) -> list[str]:
    kept = [re.sub(r", [\d.e+]+/s(?=,|$)|, \d+:\d\d:\d\d left", "", line) for line in lines]
    return [re.sub(r"\d+:\d\d:\d\d", "<time>", line) for line in kept]


def test_the_contract_is_kept():
    check_plugin(Progress)


def test_a_terminal_shows_bars_and_keeps_the_lines_that_matter():
    written = in_a_terminal("trains")
    lines = without_times(screen(written))
    assert lines == [
        "training: 2 epochs, 8 steps",
        "printed",
        "logged",
        "written",
        "validated at step 4/8, epoch 1/2: val_loss 3 (best)",
        "validated at step 8/8, epoch 2/2: val_loss 2 (best)",
        "finished at step 8/8, 2/2 epochs, after <time>",
    ]
    plain = uncoloured(written)
    assert re.search(r"epoch 1/2 +━+╺?━+ +1/4", plain)
    assert re.search(r"step +━+╺?━+ +1/8", plain)
    assert re.search(r"\nshown 18  train_loss 8  train_loss_epoch 6.5\r\n", plain)
    assert "hidden" not in plain
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor is back


def test_a_failure_leaves_a_clean_terminal_and_its_reason():
    lines = screen(in_a_terminal("fails"))
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
    assert re.fullmatch(r"finished at step \d+, 1/1 epochs, after <time>", shown[2])
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
            kept["state"]["trainer"]["best"]["valid_loss"] = 2.0
            trainer.stop("enough")

    options = {"epochs": 3, "train_batch_size": 2, "log_every": "1 step"}
    lines = without_times(lines_of(Do(keep), **options))
    assert lines[-1] == "stopped at step 7/12, 1/3 epochs, after <time>: enough"

    shown, plain = drawn(Resume(), module=Line(losses=(2.5, 1.5)), **options)
    assert re.search(r"epoch 2/3 +━+╺?━+ +3/4", plain)
    assert re.search(r"step +━+╺?━+ +7/12", plain)
    assert "epoch 1/3" not in plain
    assert not re.search(r" [0-6]/12", plain)
    assert shown == [
        "training: 3 epochs, 12 steps, going on after step 7",
        "validated at step 8/12, epoch 2/3: val_loss 2.5",
        "validated at step 12/12, epoch 3/3: val_loss 1.5 (best)",
        "finished at step 12/12, 3/3 epochs, after <time>",
    ]


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
    assert shown[1] == "validated at step 2/2, epoch 1/1: val_loss 2 (best), val_loss/near 2, val_loss/far 2"


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": 0}, r"progress\.refresh=0 must be above 0 seconds"),
        ({"every": "50 steps"}, r"progress\.every='50 steps' must be a time, such as"),
        ({"every": "soon"}, r"progress\.every: 'soon' is not a cadence; write one like"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Progress(**options)


if __name__ == "__main__":
    run_as(sys.argv[1])
