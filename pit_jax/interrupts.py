"""SIGTERM, which a machine gets before it is taken away, and Ctrl-C: a step that runs is finished and saved.

Where none runs, as in stages that sample, ask critics or evaluate, a run ends at once, with what is on disk.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from pit_jax import processes

RESTART = 75
"""Exit status after SIGTERM (EX_TEMPFAIL of sysexits.h): the same command goes on, so a launcher may start it again."""


_asked = itertools.count()
"""Of this process; all ask equally often, and JAX has them agree on a number."""


class Interrupted(Exception):
    """Raised after the checkpoint was written.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class Terminated(SystemExit):
    """SIGTERM outside of `deferred`. Like Ctrl-C it is no Exception, which somebody might take for a fault."""


def _terminate(number, frame):
    del number, frame
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Terminated):
            return  # it is on its way out
        error = error.__context__
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    raise Terminated(RESTART)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it SIGTERM raises Terminated, unless it is ignored. Outside of the main thread nothing changes.

    What is raised while Python collects garbage is dropped, and there JAX has callbacks in which a signal is often
    noticed: so it is raised again until it is on its way out.
    """
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    alarm = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL
    signal.signal(signal.SIGALRM, _terminate)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGALRM, alarm)


def at_once(last: Callable[[str], str]) -> None:
    """From now on SIGTERM and Ctrl-C end this process without delay, with 128 + their number.

    Handlers of Python wait until the main thread is back from a compiler, which may take minutes, and libtpu's writes a
    stack trace: call this when it is loaded. A signal that is ignored stays so.

    Args:
      last: name of the signal -> a line for stderr. Called in another thread, while anything else may be going on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end():
        (number,) = os.read(reader, 1)
        line = "\n" if number == signal.SIGINT else ""  # that of a terminal's ^C is ended
        print(line + last(signal.Signals(number).name), file=sys.stderr, flush=True)
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)  # its number goes through the pipe
    signal.set_wakeup_fd(writer)
    threading.Thread(target=end, name="signals", daemon=True).start()


def take_back() -> None:
    """Where `raised` is in force, and a library has taken SIGTERM since, as libtpu does when it finds a TPU.

    With many processes JAX has to have it, which tells the others.
    """
    if not processes.are_several() and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, _terminate)


def check() -> None:
    """With many processes, ends all of them where one has got SIGTERM: called by all, where no step of a loop runs.

    Raises:
      Interrupted: then.
    """
    if processes.are_several() and multihost_utils.reached_preemption_sync_point(next(_asked)):
        raise Interrupted(signal.SIGTERM, "SIGTERM: what is done so far is on disk")


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Within it the first SIGTERM or Ctrl-C is only noticed; a second one acts as it would outside.

    A signal that is ignored stays so, as Ctrl-C is in what a shell has started with `&`. Outside of the main thread,
    where Python takes no signals, nothing changes.

    With many processes SIGTERM to one of them stops all after the same step, on which they agree; Ctrl-C acts as
    it would outside.

    Yields:
      asked() -> number of the signal that came, or 0.
    """
    if processes.are_several():
        yield lambda: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(_asked)) else 0
        return
    came = 0
    before = {}

    def notice(number, frame):
        nonlocal came
        del frame
        came = number
        print(f"\n{signal.Signals(number).name}: stopping after this step", flush=True)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number) or signal.SIG_DFL  # None: a handler that is not Python's
            if handler is not signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, notice)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
