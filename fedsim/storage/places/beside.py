"""One task at a time beside the main thread: the disk that it waits for holds nobody up, and the main thread raises its error."""

from __future__ import annotations

import signal
from collections.abc import Callable
from threading import Thread

Task = Callable[[], None]


class Beside:
    """A thread for one task at a time, so that what a task holds in memory is there twice at most."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._then: Task | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the task has ended with an error, which `wait` raises."""
        return self._error is not None

    def begin(self, task: Task, then: Task | None = None) -> None:
        """Begins a task, after the one before, whose error it raises. `then` is done by `wait`, where the task has ended well."""
        self.wait()
        self._then = then
        self._thread = Thread(target=self._carry_out, args=(task,), name="beside", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # this user may have no more threads (ulimit -u)
            self._thread = None
            self._carry_out(task)

    def wait(self) -> None:
        """Waits until the task has ended, and raises its error."""
        thread, then, self._then = self._thread, self._then, None
        if thread is not None:
            thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if then is not None:
            then()

    def _carry_out(self, task: Task) -> None:
        if self._thread is not None:  # signals go to the main thread
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            task()
        except BaseException as error:
            self._error = error
