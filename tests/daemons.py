"""A daemon in the process of the test: for what it does once a minute or once a day, sooner than that."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from policyd import Daemon, Settings


class DaemonHere:
    """Runs in a thread, with its settings in a file; what it logs is in the fixture `logged`."""

    def __init__(self, settings_file: Path) -> None:
        self.daemon = Daemon(Settings.from_file(str(settings_file)), str(settings_file))
        self._is_listening = threading.Event()  # to signals
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._is_listening.wait()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, Daemon.SIGNALS)  # as main() does: run() asks for them
        self._is_listening.set()
        self.daemon.run()

    def signal(self, number: int) -> None:
        """Send the daemon, and nobody else in this process, a signal."""
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, number)

    def stop(self) -> None:
        """Send SIGTERM and wait for the end."""
        self.signal(signal.SIGTERM)
        self._thread.join()


@contextlib.contextmanager
def running_here(settings_file: Path) -> Iterator[DaemonHere]:
    """Run a daemon with these settings."""
    here = DaemonHere(settings_file)
    try:
        yield here
    finally:
        here.stop()
