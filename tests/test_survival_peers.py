"""When one process of a run is gone the others end at once, and say who it was."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from niso import peers
from tests import runs
from tests.test_distributed import free_port

HOST = socket.gethostname()
WITHIN = 5.0  # seconds
GONE = "niso: process {} of {} ({}) is gone; ending, so that the launcher can start all again: what was saved is intact\n"
FAILED = "niso: process {} of {} ({}) has ended with an error, which it tells itself; ending too\n"

# A process that has met the others by the sockets that it inherits, and then does what it is told.
MEMBER = """
import atexit, json, socket, sys, time
from niso.errors import UserError
from niso.peers import Peers
me, links, act = sys.argv[1:]
links = {name: socket.socket(fileno=number) for name, number in json.loads(links).items()}
try:
    with Peers(me, links) as watch:
        atexit.register(watch.leave)
        print("ready", flush=True)
        exec(act)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


@contextlib.contextmanager
def members(*acts: str) -> Iterator[list[subprocess.Popen]]:
    """Processes linked as niso.distributed links them; they are ready."""
    count = len(acts)
    ends = [pair() for _ in acts[1:]]
    links = [{f"process {i + 1} of {count}": end[0] for i, end in enumerate(ends)}]
    links += [{f"process 0 of {count}": end[1]} for end in ends]
    started = []
    for number, (act, its) in enumerate(zip(acts, links, strict=True)):
        numbers = json.dumps({name: link.fileno() for name, link in its.items()})
        command = [sys.executable, "-c", MEMBER, f"process {number} of {count}", numbers, act]
        started.append(subprocess.Popen(
            command, cwd=runs.REPOSITORY, pass_fds=[link.fileno() for link in its.values()], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    for end in ends:
        for link in end:
            link.close()
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def ends(processes: list[subprocess.Popen], within: float = WITHIN) -> list[tuple[int, str]]:
    """Exit code and last words of each; they have so many seconds together."""
    begun = time.monotonic()
    ended = [runs.end(process, within) for process in processes]
    assert time.monotonic() - begun < within
    return [(one.code, one.err) for one in ended]


SLEEP = "time.sleep(60)"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim: int) -> None:
    with members(SLEEP, SLEEP, SLEEP) as all_three:
        time.sleep(0.3)  # until all have heard each other's names
        all_three[victim].kill()
        assert ends([one for one in all_three if one is not all_three[victim]]) == [(1, GONE.format(victim, 3, HOST))] * 2


ABORT = "import ctypes; from niso.peers import delay_aborts; delay_aborts(); ctypes.CDLL(None).abort()"  # as jax does, or gloo


def test_an_abort_waits_for_the_watch() -> None:
    with members(ABORT, SLEEP) as both:
        time.sleep(0.5)
        both[1].kill()
        assert ends(both[:1]) == [(1, GONE.format(1, 2, HOST))]


def test_so_do_several() -> None:
    abort = ABORT.replace("ctypes.CDLL(None).abort()", "import threading; abort = ctypes.CDLL(None).abort")
    with members(f"{abort}; threading.Thread(target=abort).start(); time.sleep(0.3); abort()", SLEEP) as both:
        time.sleep(1)
        both[1].kill()
        assert ends(both[:1]) == [(1, GONE.format(1, 2, HOST))]


def test_an_abort_for_another_reason_ends_the_program_later() -> None:
    with members(ABORT, SLEEP) as both:
        time.sleep(0.5)
        assert both[0].poll() is None
        assert ends(both, WITHIN + signal.SIGABRT) == [(-signal.SIGABRT, ""), (1, GONE.format(0, 2, HOST))]


def test_a_mistake_in_one_ends_the_others_as_one() -> None:
    mistake = "time.sleep(0.3); raise UserError('no such file')"
    for victim in (0, 1):
        acts = [SLEEP, SLEEP, SLEEP]
        acts[victim] = mistake
        with members(*acts) as all_three:
            expected = [(2, FAILED.format(victim, 3, HOST))] * 3
            expected[victim] = (2, "no such file\n")
            assert ends(all_three, WITHIN + peers.GRACE) == expected


def test_the_same_mistake_in_all_accuses_nobody() -> None:
    mistake = "time.sleep(0.3); raise UserError('no such file')"
    with members(mistake, mistake, f"time.sleep(0.5); {mistake}") as all_three:
        assert ends(all_three) == [(2, "no such file\n")] * 3


def test_what_looks_like_a_full_disk_may_be_a_process_that_is_gone() -> None:
    failed = "time.sleep(0.3); raise UserError('cannot write') from ValueError('connection reset by peer')"
    with members("time.sleep(0.6); import os; os.kill(os.getpid(), 9)", failed) as both:
        assert ends(both)[1] == (1, GONE.format(0, 2, HOST))
    with members(SLEEP, failed) as both:
        assert ends(both, WITHIN + peers.GRACE) == [(2, FAILED.format(1, 2, HOST)), (2, "cannot write\n")]


def test_a_defect_in_one_is_told_by_it_alone() -> None:
    with members(SLEEP, "time.sleep(0.3); 1 / 0", SLEEP) as all_three:
        first, second, third = ends(all_three, WITHIN + peers.GRACE)
    assert first == third == (1, FAILED.format(1, 3, HOST))
    assert second[0] == 1 and second[1].endswith("ZeroDivisionError: division by zero\n")


def test_a_mistake_ends_also_what_hangs_in_a_thread() -> None:
    stuck = "import threading, niso.peers; niso.peers.LATE = 1; threading.Thread(target=time.sleep, args=(60,)).start()"
    with members(SLEEP, f"{stuck}; time.sleep(0.3); raise UserError('no such file')") as both:
        assert ends(both, WITHIN + peers.GRACE) == [(2, FAILED.format(1, 2, HOST)), (2, "no such file\n")]


def test_a_mistake_ends_also_a_process_that_is_alone() -> None:
    """With a thread that waits, as orbax's do for a bucket that says nothing."""
    program = "import sys, threading, time; from niso import main, peers; peers.LATE = 1; "
    program += "threading.Thread(target=time.sleep, args=(60,)).start(); main.program()"
    ended = subprocess.run([sys.executable, "-c", program], cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 2 and ended.stderr.startswith("niso: usage"), ended


def test_an_orderly_end_accuses_nobody() -> None:
    with members("time.sleep(1)", "pass", "time.sleep(0.5)") as all_three:
        assert ends(all_three) == [(0, "")] * 3


def test_an_orderly_end_keeps_its_exit_code() -> None:
    leaving = "time.sleep(0.3); watch.exit_code = 42"
    with members(leaving, leaving) as both:
        assert ends(both) == [(42, "")] * 2


def test_a_machine_that_vanishes_is_given_up_before_jax_does() -> None:
    one, other = pair()
    with one, other:
        peers._keep_alive(one)
        options = [one.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL", "CNT")]
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert options[0] + options[1] * options[2] < 10


# Two processes of jax, the first to be killed or to wait for ever in a sum over all devices.
SUM = """
import sys, time
from niso import distributed
with distributed.join(sys.argv[1], 2, int(sys.argv[2]), True):
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("all are there")
    print("ready", flush=True)
    if sys.argv[2] == sys.argv[3]:
        time.sleep(60)
    multihost_utils.sync_global_devices("one is not")
"""


# Three, the last of which comes to its end later than jax would wait for it.
LATE = """
import sys, time
from niso import distributed
with distributed.join(sys.argv[1], 3, int(sys.argv[2]), True) as peers:
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("all are there")
    print("ready", flush=True)
    time.sleep(15 * (sys.argv[2] == sys.argv[3]))
    peers.exit_code = 42
"""


def of_jax(program: str, count: int, argument: int) -> list[subprocess.Popen]:
    """That many processes of a program, with the address to meet at, each one's number, and the argument; they are ready."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(i), str(argument)], cwd=runs.REPOSITORY, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        )
        for i in range(count)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return started


@pytest.mark.slow
def test_all_wait_for_the_last_to_end() -> None:
    assert ends(of_jax(LATE, 3, 2), 40) == [(42, "")] * 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_sum_over_all_devices_ends_when_a_process_is_killed(victim: int) -> None:
    two = of_jax(SUM, 2, victim)
    time.sleep(1)
    two[victim].send_signal(signal.SIGKILL)
    ((code, said),) = ends([two[1 - victim]])
    assert code == 1
    if victim:
        assert said == GONE.format(victim, 2, HOST)
    else:  # its end is that of jax's own service too, of which jax's threads may tell in their way, before niso or instead
        assert said.endswith(GONE.format(victim, 2, HOST)) or "another task died" in said
    two[victim].wait()
