"""Tell people when a run ends, fails or stalls: by webhook, e-mail, desktop or any other service of apprise."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl, nearest, seconds

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

STATUSES = ("finished", "stopped", "preempted", "failed")

log = logging.getLogger("hookline.notify")


@dataclass(eq=False)
class Notify(CallbackInterface):
    """Send a message when a training ends, fails or stalls; it never harms the training.

    Only rank 0 sends. The message has the name of the run, its status and reason, the step, the metrics and the time.
    """

    secret_urls: Any = field(metadata={"secret": True})
    """URLs of apprise, a text or a list of them, such as `mailto://…` or `json://…`; masked wherever the configuration
    is written."""
    statuses: list[str] = field(default_factory=lambda: list(STATUSES))
    """The ends of a run that are told."""
    stalled: str | None = None
    """Tell once if no step has been completed for so long, its evaluation and save included; null: never."""
    timeout: str = "10 s"
    """How long the end of a run may wait for the services."""

    observer = True

    def __post_init__(self) -> None:
        self._urls = [self.secret_urls] if isinstance(self.secret_urls, str) else [*self.secret_urls]
        if not self._urls:
            raise ValueError("notify.secret_urls is empty, so nobody would be told: give a URL such as mailto://…")
        for place, url in enumerate(self._urls):
            with warnings.catch_warnings(), quiet() as apprise:
                warnings.simplefilter("ignore", DeprecationWarning)  # what it imports for its services warns
                if not isinstance(url, str) or apprise.Apprise.instantiate(url) is None:
                    scheme = str(url).partition("://")[0] if "://" in str(url) else "none"
                    raise ValueError(
                        f"notify.secret_urls[{place}] is no URL that apprise can use (its scheme: {scheme}); it is "
                        "written as apprise's documentation of the service says, such as json://host/path"
                    )
        for status in self.statuses:
            if status not in STATUSES:
                raise ValueError(
                    f"notify.statuses has {status!r}, which must be one of {', '.join(STATUSES)}"
                    f"{nearest(status, STATUSES)}"
                )
        self._timeout = seconds(self.timeout, "notify.timeout")
        self._limit = None if self.stalled is None else seconds(self.stalled, "notify.stalled")
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._steps, self._began = 0, 0.0
        if self._limit is None:
            self.on_boundary = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if trainer.rank != 0:
            trainer.plugins.unregister(self)

    @hookimpl
    def on_begin_run(self, trainer: Trainer, stage: Stage) -> None:
        self._began = time.monotonic()
        if self._limit is not None and stage is Stage.TRAIN:
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, args=[trainer], name="hookline-notify", daemon=True)
            self._thread.start()

    @hookimpl
    def on_boundary(self) -> None:
        self._steps += 1

    @hookimpl
    def on_end_run(self, trainer: Trainer, stage: Stage, status: str, reason: str) -> None:
        self._over.set()
        if stage is Stage.TRAIN and status in self.statuses:
            sender = threading.Thread(target=self._send, args=[trainer, status, reason], daemon=True)
            sender.start()
            sender.join(self._timeout)
            if sender.is_alive():
                log.warning("notify: gave up on the services after %s (notify.timeout)", self.timeout)
        if self._thread is not None:
            self._thread.join(self._timeout)
            self._thread = None

    def _watch(self, trainer: Trainer) -> None:
        """Tell of each silence once."""
        assert self._limit is not None
        seen, since, told = self._steps, time.monotonic(), False
        while not self._over.wait(self._limit / 10):
            if self._steps != seen:
                seen, since, told = self._steps, time.monotonic(), False
            elif not told and time.monotonic() - since >= self._limit:
                told = True
                self._send(trainer, "stalled", f"no step was completed for {self.stalled}")

    def _send(self, trainer: Trainer, status: str, reason: str) -> None:
        """Send a message; a service that fails is a warning, without its URL."""
        counters = trainer.counters
        lines = [
            f"reason: {reason.strip().splitlines()[0]}" if reason.strip() else "",
            f"step: {counters.global_step}, epoch: {counters.epochs}",
            *(f"{name}: {value:.6g}" for name, value in trainer.metrics.items()),
            f"duration: {time.monotonic() - self._began:.0f} s",
            f"host: {socket.gethostname()}",
        ]
        title = f"{trainer.options.run_name} {status}"
        for url in self._urls:
            sent, kind = False, "failure" if status in ("failed", "stalled") else "info"
            with contextlib.suppress(Exception), quiet() as apprise:
                service = apprise.Apprise.instantiate(url)
                sent = service.notify(body="\n".join(filter(None, lines)), title=title, notify_type=kind)
            if not sent:
                log.warning("notify: the service %s did not take the message %r", url.partition("://")[0], title)


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Give apprise, whose own messages would have URLs in them."""
    import apprise

    logger, here = logging.getLogger("apprise"), threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(elsewhere)
    try:
        yield apprise
    finally:
        logger.removeFilter(elsewhere)
