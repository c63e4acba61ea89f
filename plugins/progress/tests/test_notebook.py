"""A real kernel runs a cell that trains."""

import re

import pytest

REASON = "a kernel of Jupyter is needed; see nox -s notebook"
nbformat = pytest.importorskip("nbformat", reason=REASON)
nbclient = pytest.importorskip("nbclient", reason=REASON)
pytest.importorskip("ipykernel", reason=REASON)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the client itself, and of what it stands on
]
TRAIN = """
from hookline.testing import TinyModule, tiny_trainer
from hookline_progress import Progress

trainer = tiny_trainer([Progress(refresh=1e-6)], TinyModule(32), epochs=20, log_every="1 step")
trainer.train()
print("printed")
"""


def outputs_of(code, allow_errors=False):
    """Run one cell; return its outputs, and the messages about outputs that the kernel sent."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client = nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", allow_errors=allow_errors)
    sent = []
    take = client.process_message
    client.process_message = lambda message, *rest: (sent.append(message["msg_type"]), take(message, *rest))[1]
    client.execute()
    return notebook.cells[0].outputs, sent


def test_a_training_is_one_output_that_is_replaced_in_place():
    outputs, sent = outputs_of(TRAIN)
    (shown,) = [output for output in outputs if output.output_type == "display_data"]
    assert [(output.name, output.text) for output in outputs if output is not shown] == [("stdout", "printed\n")]
    assert sent.count("display_data") == 1
    assert sent.count("update_display_data") > 20  # each validation at least
    for text in (shown.data["text/plain"], re.sub("<.*?>", "", shown.data["text/html"])):
        assert "\x1b" not in text
        lines = [line.rstrip() for line in text.splitlines()]
        assert re.fullmatch(r"validated at step 80/80, epoch 20/20: val_loss [\d.]+( \(best\))?", lines[8])
        assert re.fullmatch(r"finished at step 80/80, 20/20 epochs, after [\d:]+", lines[9])
        assert lines[10] == "validation at step 80/80, epoch 20/20"
        assert re.fullmatch(r"│ val_loss │ +[\d.]+( ★)? +│ +[-+][\d.e-]+ │ +[\d.]+ │ +\d+ │", lines[14])
        assert not any(line.startswith(("epoch ", "step ")) for line in lines)  # the bars are gone


def test_a_failure_leaves_its_reason_and_no_bars():
    outputs, _ = outputs_of(TRAIN.replace("trainer.train()", "trainer.module.train_step = None\ntrainer.train()"), True)
    (shown,) = [output for output in outputs if output.output_type == "display_data"]
    lines = shown.data["text/plain"].split("\n")
    assert lines[0] == "training: 20 epochs, 80 steps"
    assert re.fullmatch(r"failed at step 0/80, 0/20 epochs, after [\d:]+: TypeError: .*", lines[1])
    assert not "".join(lines[2:]).strip()


def test_lines_and_nothing_where_they_are_asked_for():
    lines = TRAIN.replace("refresh=1e-6", "force_terminal=False")
    outputs, _ = outputs_of(lines)
    assert {output.output_type for output in outputs} == {"stream"}
    quiet = "import logging\nlogging.getLogger('hookline').setLevel('WARNING')\n" + TRAIN
    outputs, _ = outputs_of(quiet)
    assert [(output.name, output.text) for output in outputs] == [("stdout", "printed\n")]
