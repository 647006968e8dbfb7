"""Signals that ask a run to stop, and the moments in which it cannot."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
AGAIN_S = 0.05  # until a finalizer that was interrupted is over


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: children are ended, and what was measured is kept."""
    with _handling(_stop), _heard_in_finalizers():
        yield


@contextmanager
def shielded() -> Iterator[None]:
    """Let a signal wait until the block has ended: a record is written and crossed off, or neither.

    Raises:
        KeyboardInterrupt: At the end, where there was a signal.
    """
    heard: list[int] = []
    with _handling(lambda number, frame: heard.append(number)):
        yield
    if heard:
        raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _heard_in_finalizers() -> Iterator[None]:
    """Send a signal again that came in a finalizer or a callback of the garbage collector: what they raise is lost."""
    before, main, timers = sys.unraisablehook, threading.get_ident(), list[threading.Timer]()

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt and hasattr(signal, "pthread_kill"):
            again = [main, signal.SIGTERM]  # a Ctrl-C may be ignored, as with `nohup`
            timers.append(threading.Timer(AGAIN_S, signal.pthread_kill, again))
            timers[-1].start()
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


@contextmanager
def held_back() -> Iterator[None]:
    """Keep Ctrl-C from a process that is started in the block; here it is heard when the block has ended.

    Raises:
        KeyboardInterrupt: At the end, where there was one.
    """
    _start_tracker()  # when multiprocessing starts it, it lets signals through
    with shielded():  # other signals, and a Ctrl-C that another thread is given, come here in the middle of a start
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start what removes the semaphores of children that were killed, and let it do so without a warning at the end."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def let_through() -> None:
    """In the process that was started so: forget a Ctrl-C that came meanwhile, and let others through."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals never come to another
        yield
        return
    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # `nohup` ignores SIGHUP
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
