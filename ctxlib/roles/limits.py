"""Chat templates are foreign code: they get a few seconds and a few megabytes, and then they are refused."""

import ctypes
import functools
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jinja2

SECONDS = 5.0  # of the thread's own processor time; a template of the hub takes less than a millisecond a message
CHARACTERS = 2**22  # of one text that a template puts together: four times what a conversation may hold


class TemplateLimit(Exception):
    """A template took too long or made too much."""


def bounded(environment: jinja2.Environment) -> jinja2.Environment:
    """The same environment, in which no operator, join, filter or call makes a text longer than CHARACTERS.

    Operators are intercepted, so that the compiler does not fold constants such as `'a' * 10 ** 9` either.
    """
    limited = environment.overlay()
    operators: dict[str, Callable[[Any, Any], Any]] = {
        "+": operator.add,
        "%": operator.mod,
        "*": _times,
        "**": _power,
    }
    limited.intercepted_binops = frozenset(operators)
    limited.call_binop = lambda context, symbol, left, right: _checked(operators[symbol](left, right))
    limited.concat = _joined
    call = environment.call
    limited.call = lambda *args, **kwargs: _checked(call(*args, **kwargs))
    limited.filters = {name: _checking(function) for name, function in environment.filters.items()}
    return limited


def _checking(function: Callable) -> Callable:
    return functools.wraps(function)(lambda *args, **kwargs: _checked(function(*args, **kwargs)))


def _times(left: Any, right: Any) -> Any:
    for text, n in ((left, right), (right, left)):
        if isinstance(n, int) and hasattr(text, "__len__"):
            _check_length(len(text) * n)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > CHARACTERS:
        raise TemplateLimit("it computes a number of more than a million digits")
    return left**right


def _checked(made: Any) -> Any:
    if isinstance(made, (str, list, tuple)):
        _check_length(len(made))
    return made


def _check_length(n: int) -> None:
    if n > CHARACTERS:
        raise TemplateLimit(f"it makes a text of more than {CHARACTERS:,} characters")


def _joined(pieces: Iterable[str]) -> str:
    kept, length = [], 0
    for piece in pieces:
        kept.append(piece)
        length += len(piece)
        _check_length(length)
    return "".join(kept)


class _Watchdog:
    """Raises TemplateLimit in a thread that has used up the processor time of its `time_limit` block.

    A thread that only waits while nothing is rendered. Signals would do for the main thread alone.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.deadlines: dict[int, tuple[Callable[[], float], float]] = {}  # by thread: its clock, and its end
        self.fired: set[int] = set()
        self.running = False

    def enter(self, thread: int, seconds: float) -> None:
        with self.lock:
            clock = _clock(thread)
            self.deadlines[thread] = clock, clock() + seconds
            if not self.running:
                self.running = True
                threading.Thread(target=self._watch, daemon=True, name="template watchdog").start()

    def leave(self, thread: int) -> None:
        with self.lock:
            del self.deadlines[thread]
            if thread in self.fired:  # it may be on its way still
                self.fired.discard(thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _watch(self) -> None:
        while True:
            with self.lock:
                for thread, (clock, deadline) in self.deadlines.items():
                    if thread not in self.fired and clock() > deadline:
                        self.fired.add(thread)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TemplateLimit)
                        )
                self.lock.wait(0.25)


def _clock(thread: int) -> Callable[[], float]:
    """The processor time of a thread, so that a busy machine refuses no template; elsewhere than on Unix, any clock."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    return functools.partial(time.clock_gettime, time.pthread_getcpuclockid(thread))


_watchdog = _Watchdog()


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raises TemplateLimit in the block when it takes more processor time; not to be nested in one thread."""
    thread = threading.get_ident()
    _watchdog.enter(thread, seconds)
    try:
        yield
    except TemplateLimit as limit:
        raise TemplateLimit(str(limit) or f"it does not end within {seconds:g} s") from None
    finally:
        _watchdog.leave(thread)
