"""The processes of one run find each other: by flags, or by what the environment says; before anything asks jax for devices.

They meet twice at the same address: first by themselves, where every mistake can be told in one line, then in jax.distributed,
which ends a process with a stack trace when one is missing. By the links of the first meeting they go on to watch each other.
"""

import atexit
import contextlib
import errno
import os
import re
import selectors
import socket
import sys
import time

import jax

from niso import cluster
from niso.cluster import Cluster
from niso.errors import UserError
from niso.peers import Peers, delay_aborts

PATIENCE = 60  # seconds until all have come, where someone starts them by hand
PATIENCE_CLUSTER = 300  # ... where a cluster does, which may have to load an image first
ANNOUNCE = 20  # seconds until it is said who is waited for
GO = "go"


def join(
    coordinator: str | None, processes: int | None, process_id: int | None, detect: bool
) -> contextlib.AbstractContextManager[Peers | None]:
    """Meets the other processes of the run, if there are any: those that flags name, else those that the environment tells of.

    Returns what watches them, until its `with` block ends; None inside that where there are none. A process that is missing, or is
    gone later, ends the program with exit code 1, not 2: starting again may help. After an orderly end of the block the program
    ends with the `exit_code` of what watches, whatever it does then.

    Raises:
      UserError: flags or variables that do not fit together.
    """
    found = _flags(coordinator, processes, process_id)
    patience = PATIENCE
    if processes is None and detect:
        found = cluster.where({**cluster.tpu_metadata(), **os.environ})
        patience = PATIENCE_CLUSTER
    if found is None:
        return contextlib.nullcontext()
    host, _, port = found.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator {found.coordinator!r}: expected HOST:PORT of process 0")
    try:
        links = meet(host.strip("[]"), int(port), found.processes, found.process_id, patience)
    except OSError as error:
        sys.exit(f"niso: process {found.process_id} of {found.processes}, as {found.name} says: {error}")
    # gloo announces every connection on file descriptor 1: what this program prints goes on to the real one.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    delay_aborts()
    peers = Peers(_name(found.process_id, found.processes), links)
    jax.distributed.initialize(
        found.coordinator, found.processes, found.process_id, found.devices, "deactivate",
        initialization_timeout=PATIENCE, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10,
    )  # fmt: skip
    atexit.register(peers.leave)  # before jax's own, which came first
    return peers


def _flags(coordinator: str | None, processes: int | None, process_id: int | None) -> Cluster | None:
    """What the flags say; None: alone, or nothing."""
    if processes is None:
        given = {"coordinator": coordinator, "process_id": process_id}
        if found := [f"--{name}={value}" for name, value in given.items() if value is not None]:
            raise UserError(f"{' '.join(found)} needs --processes=N, the number of processes of this run")
        return None
    if (process_id or 0) >= processes or (processes > 1 and (not coordinator or process_id is None)):
        raise UserError(f"--processes={processes} needs --coordinator=HOST:PORT and a --process_id from 0 to {processes - 1}")
    return Cluster("--processes", processes, process_id or 0, coordinator or "") if processes > 1 else None


def meet(host: str, port: int, processes: int, process_id: int, patience: float) -> dict[str, socket.socket]:
    """Returns when all processes of the run have called it; process 0 is the one that listens, at `host`:`port`.

    Returns:
      Links that stay open, from process 0 to each other one: "process 1 of 2" -> connected socket. Others can listen there now.

    Raises:
      OSError: somebody has not come within `patience` seconds, or is not one of this run; the message says who.
    """
    waiting = _Waiting(_name(process_id, processes), f"{host}:{port}", patience)
    if process_id:
        while (link := _call(host, port, waiting)) is None:
            time.sleep(0.1)
        return {_name(0, processes): link}
    expected = [_name(i, processes) for i in range(1, processes)]
    present: dict[str, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    with contextlib.ExitStack() as open_sockets:
        try:
            family = socket.AF_INET6 if both else socket.AF_INET
            server = open_sockets.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        except OSError as error:
            raise OSError(f"cannot listen on port {port} ({error.strerror}); is another process 0 running?") from None
        answer = "process 0 was ended"
        try:
            _receive(server, expected, present, open_sockets, waiting)
            answer = GO
            return {name: caller.dup() for name, caller in present.items()}
        except OSError as error:
            answer = str(error)
            raise
        finally:
            for caller in present.values():
                with contextlib.suppress(OSError):
                    caller.sendall(f"{answer}\n".encode())
                    if answer != GO:
                        caller.recv(1)  # the others close first: then the port is free at once


def _receive(
    server: socket.socket, expected: list[str], present: dict[str, socket.socket], open_sockets: contextlib.ExitStack,
    waiting: "_Waiting",
) -> None:  # fmt: skip
    """Fills `present`, until all are there that are expected."""
    with selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while missing := [name for name in expected if name not in present]:
            waiting.tick(_listed(missing), "see what they say themselves")
            for key, _ in ready.select(0.5):
                if key.fileobj is server:
                    caller = open_sockets.enter_context(server.accept()[0])
                    caller.settimeout(2)
                    ready.register(caller, selectors.EVENT_READ, caller)
                    continue
                caller = key.data
                name = _read(caller) or ""
                if name in expected and name not in present:
                    present[name] = caller
                    continue
                ready.unregister(caller)
                for gone in [one for one, its in present.items() if its is caller]:
                    del present[gone]
                if re.fullmatch(r"process \d+ of \d+", name):
                    present[f"{name}, the wrong one"] = caller  # is to hear of it, too
                    wrong = "came twice" if name in expected else f"came to a run of {len(expected) + 1}"
                    raise OSError(f"{name} {wrong}; each needs a --process_id of its own, and all the same --processes")


def _call(host: str, port: int, waiting: "_Waiting") -> socket.socket | None:
    """Says to process 0 who this is; returns the link when all are there, None if it is not there or hangs up."""
    why = "it hung up"
    try:
        with socket.create_connection((host, port), timeout=2) as link:
            if link.getsockname() == link.getpeername():  # where nobody listens, a connection may come to itself
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            link.sendall(f"{waiting.who}\n".encode())
            link.settimeout(0.5)
            while (answer := _read(link)) is None:
                waiting.tick("the others", "see what process 0 says", patience=2)  # it gives up first, and says why
            if answer == GO:
                return link.dup()
            if answer:
                raise _GivenUpError(f"turned away by process 0: {answer}")
    except _GivenUpError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
    waiting.tick(f"process 0 ({why})", "is it started, and its port open to this machine?")
    return None


def _read(link: socket.socket) -> str | None:
    """The short line that has come, empty if the other side is gone or no process of niso, None if nothing has come yet.

    What comes after the line is left for whoever gets the link.
    """
    try:
        size = link.recv(1024, socket.MSG_PEEK).find(b"\n") + 1
        line = link.recv(size or 1024).decode(errors="replace").strip()
        return line if line.isprintable() else ""
    except TimeoutError:
        return None
    except OSError:
        return ""


class _GivenUpError(OSError):
    """Waiting on is of no use."""


class _Waiting:
    """How long one waits for the others, and a line on the way to the end of it."""

    def __init__(self, who: str, at: str, patience: float):
        self.who, self.at, self.patience = who, at, patience
        self.begun, self.said = time.monotonic(), False

    def tick(self, whom: str, advice: str, patience: float = 1) -> None:
        """Says once who is waited for; raises when that has taken too long (so many times as long as usual)."""
        waited = time.monotonic() - self.begun
        if waited > patience * self.patience:
            raise _GivenUpError(f"waited {waited:.0f} s at {self.at} for {whom}; {advice}")
        if waited > ANNOUNCE and not self.said:
            self.said = True
            print(f"niso: {self.who} is waiting at {self.at} for {whom}", file=sys.stderr)


def _name(process_id: int, processes: int) -> str:
    return f"process {process_id} of {processes}"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
