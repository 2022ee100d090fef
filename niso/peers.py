"""The processes of a run watch each other: when one is gone the others end too, at once and with a line that names it.

Else they would hang in the next sum over all devices, until jax's own watch ends them with a stack trace. The links by which
the processes met stay open, from process 0 to each other one: the kernel closes those of a process that dies, and gives up
those to a machine that does not answer. Process 0 tells the others what it sees, and that all have ended; none leaves before that,
since jax's own service ends all that are there when it misses one. That service is process 0's, which leaves last.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from niso.errors import UserError

ORDERLY, AGAIN = 0, 1  # how a process ends: as it should, or with the exit code after which launchers start again
LATE = 10.0  # seconds that the rest of the program has after an error
GRACE = 3.0  # seconds in which a process may find by itself what went wrong in another one
# A machine that does not answer: asked after IDLE seconds of silence, then every second; jax gives up after 10 seconds.
IDLE, PROBES = 3, 4


class Peers:
    """The links of this process, watched until the `with` block ends; its end is then told to the others.

    Args:
      me: "process 1 of 2".
      links: who is at the other end -> a connected socket: all others in process 0, process 0 in the others.
    """

    def __init__(self, me: str, links: dict[str, socket.socket]):
        self.me, self.first = f"{me} ({socket.gethostname()})", me.startswith("process 0 ")
        self.links = {link: f"{name} (of unknown name)" for name, link in links.items()}  # those still open
        self.said: set[socket.socket] = set()  # ... of those who have said that they end
        self.code: int | None = None  # how this process has said that it ends
        self.exit_code = ORDERLY  # with which it ends where that is ORDERLY, whatever the program does after that
        self.over = False  # whether process 0 has said that all have ended
        self.lock, self.ending = threading.Lock(), threading.Event()
        for link in self.links:
            _keep_alive(link)
        self._tell(f"here {self.me}")
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and (not issubclass(kind, UserError) or (error and error.__cause__)):
            # Most likely it comes of a peer that has gone, of which the watch tells more clearly: also what looks like a full disk
            # (a UserError made of another error) may be a sum over all processes, on the way to a checkpoint, that never came.
            time.sleep(1)
        self._say_end(ORDERLY if kind is None else kind.code if issubclass(kind, UserError) else AGAIN)
        if kind is not None:
            end_late(self.code or AGAIN)

    def leave(self) -> None:
        """Ends the program: with `exit_code` once all others have come to an orderly end, too, or are gone; after an error at once.
        For atexit.

        Without jax's own end: that would wait for the others to come to the same one, and, where the machine was being taken away
        after the last step, for one more step to agree on.
        """
        self._say_end(AGAIN)
        orderly = self.code == ORDERLY
        if not orderly:
            self._wait(lambda: set(self.links) <= (set() if self.first else self.said), GRACE + 2)
        elif self.first:
            self._wait(lambda: set(self.links) <= self.said)
            self._tell("over")
            self._wait(lambda: not self.links, GRACE)
        else:
            self._wait(lambda: self.over or not self.links)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        _exit(self.exit_code if orderly else self.code or AGAIN)

    def _say_end(self, code: int) -> None:
        with self.lock:
            if self.code is None:
                self.code = code
                self.ending.set()
                self._tell(f"ended {code} {self.me}")

    def _wait(self, ready: Callable[[], bool], seconds: float = math.inf) -> None:
        deadline = time.monotonic() + seconds
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _watch(self) -> None:
        heard = dict.fromkeys(self.links, b"")
        with selectors.DefaultSelector() as ready:
            for link in self.links:
                ready.register(link, selectors.EVENT_READ, link)
            while self.links:
                for link in [key.data for key, _ in ready.select()]:
                    try:
                        data = link.recv(4096)
                    except OSError:
                        data = b""
                    *lines, heard[link] = (heard[link] + data).split(b"\n")
                    for line in lines:
                        self._hear(link, line.decode())
                    if not data:
                        ready.unregister(link)
                        name = self.links.pop(link)
                        link.close()
                        if link not in self.said:
                            self._hear(None, f"gone {name}")

    def _hear(self, link: socket.socket | None, line: str) -> None:
        """What a peer says ("here NAME", "ended CODE NAME"), or process 0 of another one, or of all ("over"), or what an end
        without a word means."""
        what, _, name = line.partition(" ")
        self.over |= what == "over"
        if what == "here" and link is not None:
            self.links[link] = name
        elif what == "gone":
            if self.first:
                self._tell(line)
            self._end(f"{name} is gone; ending, so that the launcher can start all again: what was saved is intact", AGAIN)
        elif what == "ended":
            code, _, name = name.partition(" ")
            if link is not None and name.partition(" (")[0] == self.links[link].partition(" (")[0]:  # not of another, by process 0
                self.said.add(link)
            if int(code) != ORDERLY and self.code is None:
                if self.first:
                    self._tell(line, besides=link)
                self.ending.wait(GRACE)
                self._end(f"{name} has ended with an error, which it tells itself; ending too", int(code))

    def _end(self, line: str, code: int) -> None:
        """Ends this process from beside its main thread, wherever that hangs, unless it is ending by itself."""
        with self.lock:
            if self.code is None:
                print(f"niso: {line}", file=sys.stderr, flush=True)
                if self.first and self.links:
                    time.sleep(0.5)  # the others first
                _exit(code)

    def _tell(self, line: str, besides: socket.socket | None = None) -> None:
        for link in list(self.links):
            if link is not besides:
                with contextlib.suppress(OSError):
                    link.sendall(f"{line}\n".encode())


def end_late(code: int) -> None:
    """Ends the program in LATE seconds where it does not by itself, as threads that wait for other processes, or for a bucket that
    says nothing, would have it."""

    def end() -> None:
        time.sleep(LATE)
        _exit(code)

    threading.Thread(target=end, name="late end", daemon=True).start()


def delay_aborts() -> None:
    """Gives the watch the time to say who is gone where jax or gloo, in threads of their own, find it first and abort.

    Their thread then sleeps for as many seconds as the signal has for a number, six, since the handler is the C library's `sleep`;
    one of Python's would run too late. An abort for any other reason ends the program after that, without Python's stack trace;
    a SIGABRT from outside has it sleep only: others end it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _exit(code: int) -> None:
    """Ends the program without what is done at the end of others, where jax would wait."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def _keep_alive(link: socket.socket) -> None:
    """Has the kernel find out whether the other machine is still there."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": IDLE, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": PROBES, "TCP_USER_TIMEOUT": 1000 * (IDLE + PROBES)}
    for name, value in options.items():
        if hasattr(socket, name):  # else as the system does it
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
