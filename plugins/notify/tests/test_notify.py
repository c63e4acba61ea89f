import asyncio
import email
import email.header
import http.server
import json
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from hookline.testing import TinyModule, digest, tiny_trainer
from hookline_notify import Notify

smtp = pytest.importorskip("aiosmtpd.smtp")
SECRET = "sesamoeffnedich"


class Hook(http.server.ThreadingHTTPServer):
    """A webhook that keeps what it is told."""

    def __init__(self, answer=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.told, self.answer, self.heard, self.go_on = [], answer, threading.Event(), threading.Event()
        self.go_on.set()

    def url(self):
        return f"json://user:{SECRET}@127.0.0.1:{self.server_port}/hook"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.heard.set()
        self.server.go_on.wait(20)
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *what):
        pass


@pytest.fixture
def hook():
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


class Failing(TinyModule):
    def val_step(self, global_step, batch, device):
        raise ZeroDivisionError("by nothing\nat all")


def test_the_end_of_a_run(hook):
    trainer = tiny_trainer([Notify(hook.url())], run_name="mine")
    trainer.train()
    trainer.validate()  # is no training
    (told,) = hook.told
    assert told["title"] == "mine finished"
    assert told["type"] == "info"
    loss = f"{trainer.metrics['val_loss']:.6g}"
    assert re.match(rf"step: 14, epoch: 2\nval_loss: {loss}\nduration: \d+ s\nhost: .+", told["message"])


def test_a_failure_and_a_stop_with_their_reason(hook):
    with pytest.raises(ZeroDivisionError):
        tiny_trainer([Notify([hook.url()])], Failing()).train()
    assert (hook.told[0]["title"], hook.told[0]["type"]) == ("run failed", "failure")
    assert hook.told[0]["message"].startswith("reason: ZeroDivisionError: by nothing\nstep: 7, epoch: 0\nduration")
    tiny_trainer([Notify([hook.url()], statuses=["failed"])]).train()
    assert len(hook.told) == 1


class Stalling(TinyModule):
    """Waits in its fourth step until the webhook has heard of it."""

    def train_step(self, global_step, batch, device):
        if global_step == 4:
            self.seen.append(self.hook.heard.wait(30))
        return super().train_step(global_step, batch, device)


def test_a_stall_is_told_once_and_the_thread_ends_with_the_run(hook):
    module, before = Stalling(), {*threading.enumerate()}
    module.hook = hook
    tiny_trainer([Notify(hook.url(), stalled="1 s")], module).train()
    assert [told["title"] for told in hook.told] == ["run stalled", "run finished"]
    assert hook.told[0]["message"].startswith("reason: no step was completed for 1 s\nstep: 3, epoch: 0\n")
    assert "hookline-notify" not in [thread.name for thread in {*threading.enumerate()} - before]


def test_an_email_reaches_a_server():
    class Post:
        letters = []

        async def handle_DATA(self, server, session, envelope):
            self.letters.append((envelope.rcpt_tos, email.message_from_bytes(envelope.content)))
            return "250 OK"

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: smtp.SMTP(Post(), loop=loop), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = server.sockets[0].getsockname()[1]
        url = f"mailto://127.0.0.1:{port}?to=me@my.host&from=run@my.host&mode=insecure"
        tiny_trainer([Notify(url)], run_name="mine").train()
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    ((to, letter),) = Post.letters
    assert to == ["me@my.host"]
    assert str(email.header.make_header(email.header.decode_header(letter["Subject"]))) == "mine finished"
    assert "step: 14, epoch: 2" in str(letter.get_payload(0).get_payload(decode=True).decode())


# Harmless -----------------------------------------------------------------------------


def test_services_that_fail_are_warnings_without_secrets(hook, caplog):
    hook.answer = 500
    closed = f"json://user:{SECRET}@127.0.0.1:{hook.server_port}/x?method=NONSENSE"
    trainer = tiny_trainer([Notify([hook.url(), hook.url()])])
    trainer.train()
    assert trainer.status == "finished"
    assert len(hook.told) == 2
    assert caplog.text.count("notify: the service json did not take the message 'run finished'") == 2
    assert SECRET not in caplog.text
    assert SECRET not in json.dumps(trainer.config)
    with pytest.raises(ValueError, match="notify.secret_urls.0. is no URL") as raised:
        Notify(closed)
    assert SECRET not in str(raised.value)


@pytest.mark.plugins
def test_urls_are_in_no_record(tmp_path, monkeypatch, hook):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "module: {_target_: hookline.testing.TinyModule}\n"
        "trainer: {train_batch_size: 8, device: cpu, epochs: 1}\nplugins: {jsonl: {}}\n"
    )
    url = f"json://127.0.0.1:{hook.server_port}/{SECRET}"  # whose form does not tell that it is a secret
    command = [sys.executable, "-m", "hookline", "fit", "run.yaml", f"plugins.notify.secret_urls=[{url}]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [told["title"] for told in hook.told] == ["run finished"]
    written = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert r"secret_urls=[\"***\"]" in written
    assert SECRET not in written + done.stderr + done.stdout


def test_a_service_that_is_silent_costs_no_more_than_the_timeout(hook, caplog):
    hook.go_on.clear()
    trainer = tiny_trainer([Notify(hook.url(), timeout="1 s")])
    began = time.monotonic()
    trainer.train()
    assert "notify: gave up on the services after 1 s (notify.timeout)" in caplog.text
    assert time.monotonic() - began < 20
    assert trainer.status == "finished"


def test_training_gives_the_same_bits(hook):
    told, plain = tiny_trainer([Notify(hook.url(), stalled="1 h")]), tiny_trainer()
    told.train()
    plain.train()
    assert digest(told.module.state_dict()) == digest(plain.module.state_dict())


def test_only_rank_0_tells(hook):
    trainer = tiny_trainer([Notify(hook.url()), "distributed"])
    trainer.train()
    assert torch.distributed.is_available()
    assert len(hook.told) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"secret_urls": []}, "notify.secret_urls is empty, so nobody would be told: give a URL such as mailto://"),
        (
            {"secret_urls": ["json://x", "foo://y"]},
            "notify.secret_urls[1] is no URL that apprise can use (its scheme: f",
        ),
        ({"secret_urls": "me"}, "notify.secret_urls[0] is no URL that apprise can use (its scheme: none)"),
        (
            {"secret_urls": "json://x", "statuses": ["fail"]},
            "notify.statuses has 'fail', which must be one of fin",
        ),
        ({"secret_urls": "json://x", "stalled": "long"}, "notify.stalled='long'"),
        ({"secret_urls": "json://x", "timeout": "long"}, "notify.timeout='long'"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Notify(**options)
