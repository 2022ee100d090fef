"""Several processes find out that they are, and find each other, or say in one line why not."""

import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import jax
import pytest

from niso import cluster, distributed
from niso.cluster import Cluster, where
from niso.errors import UserError
from tests import runs

SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[07,09-11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "host-0,host-1,host-2,host-3", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "first:8080"}
PODS = {"JAX_COORDINATOR_ADDRESS": "niso-worker-0-0.niso:1234", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, Cluster("Slurm", 8, 5, "node07:62344", (1,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1,2"}, Cluster("Slurm", 8, 5, "node07:62344")),
        (SLURM | {"SLURM_STEP_NODELIST": "a1,b2"}, Cluster("Slurm", 8, 5, "a1:62344", (1,))),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-3"}, Cluster("Slurm", 8, 5, "gpu-3:62344", (1,))),
        (SLURM | {"JAX_COORDINATOR_PORT": "7777"}, Cluster("Slurm", 8, 5, "node07:7777", (1,))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:1"}, Cluster("Slurm", 8, 5, "other:1", (1,))),
        (MPI, Cluster("Open MPI", 4, 3, "10.96.0.1:62624", (1,))),
        (GKE, Cluster("TPU", 4, 2, "host-0:8482")),
        (GKE | SLICES, Cluster("TPU", 8, 6, "first:8482")),
        (SLICES | {"TPU_WORKER_HOSTNAMES": "localhost"}, Cluster("TPU", 2, 1, "first:8482")),
        (PODS, Cluster("JAX_NUM_PROCESSES", 2, 1, "niso-worker-0-0.niso:1234")),
        (PODS | {"JAX_PROCESS_ID": "0"}, Cluster("JAX_NUM_PROCESSES", 2, 0, "niso-worker-0-0.niso:1234")),
    ],
)
def test_where(environment: dict[str, str], expected: Cluster) -> None:
    assert where(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # Inside an allocation: a shell of it, the batch script, a step of one task, an interactive step.
        {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[07-10]"},
        {k: v for k, v in SLURM.items() if "STEP" not in k},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": ""},
        GKE | {"TPU_WORKER_HOSTNAMES": "host-0", "MEGASCALE_NUM_SLICES": "1"},
        PODS | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # jobs that have nothing to do with each other
        {"JAX_COORDINATOR_ADDRESS": "host:1"},
    ],
)
def test_alone(environment: dict[str, str]) -> None:
    assert where(environment) is None


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        (PODS | {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX is missing"),
        ({k: v for k, v in PODS.items() if k != "JAX_NUM_PROCESSES"}, "JAX_NUM_PROCESSES is not: say how many pods"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is not a number"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is missing"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_half_told(environment: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as error:
        where(environment)
    assert line in str(error.value) and "--distributed=off" in str(error.value)


@pytest.mark.parametrize(
    ("visible", "beside", "expected"),
    [(None, 1, None), ("0,1,2,3", 1, None), ("0,1,2,3", 4, (2,)), ("0,1,2,3,4,5,6,7", 4, (4, 5)), ("0", 4, None), (None, 4, (2,))],
)
def test_gpus_of_a_node_are_dealt_out(visible: str | None, beside: int, expected: tuple[int, ...] | None) -> None:
    """One process to a node has all; one to a GPU has its own, be it alone in seeing it or not."""
    environment = SLURM | {"SLURM_LOCALID": "2" if beside > 2 else "0", "SLURM_STEP_TASKS_PER_NODE": f"{beside}(x4)"}
    found = where(environment | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert found is not None and found.devices == expected


@pytest.mark.parametrize(
    ("module", "name", "environment"),
    [("slurm_cluster", "SlurmCluster", SLURM), ("ompi_cluster", "OmpiCluster", MPI), ("cloud_tpu_cluster", "GkeTpuCluster", GKE)],
)
def test_as_jax_would_find_it(module: str, name: str, environment: dict[str, str], monkeypatch) -> None:
    theirs = getattr(importlib.import_module(f"jax._src.clusters.{module}"), name)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: host)
    if module == "cloud_tpu_cluster":  # it would go on to ask a metadata server
        monkeypatch.setattr(sys.modules[theirs.__module__], "get_tpu_env_value", os.environ.get)
    ours = where(os.environ)
    assert ours is not None
    assert ours.coordinator == theirs.get_coordinator_address(timeout_secs=1, override_coordinator_port=None)
    assert (ours.processes, ours.process_id) == (theirs.get_process_count(), theirs.get_process_id())


def test_tpu_vms_ask_their_metadata(monkeypatch) -> None:
    told = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'\nZONE: 'z'",
    }  # fmt: skip
    monkeypatch.setattr(cluster, "_attribute", lambda name, timeout: told[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert where(cluster.tpu_metadata()) == Cluster("TPU", 4, 1, "10.0.0.2:8482")
    told |= {"worker-network-endpoints": "10.0.0.2", "agent-worker-number": "0", "tpu-env": ""}
    assert where(cluster.tpu_metadata()) is None
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # jax's way to say: no chips here
    assert cluster.tpu_metadata() == {}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meeting(*who: tuple[int, int], patience: float = 10, strangers: bool = False) -> dict[tuple[int, int], str]:
    """What becomes of each (process id, processes) of those who come."""
    port, ended, links = free_port(), {}, {}
    where = "127.0.0.1", port

    def attend(process_id: int, processes: int, key: tuple[int, int]) -> None:
        try:
            links.update({(key, name): link for name, link in distributed.meet(*where, processes, process_id, patience).items()})
            ended[key] = ""
        except OSError as error:
            ended[key] = str(error)

    threads = [threading.Thread(target=attend, args=(i, n, (at, i))) for at, (i, n) in enumerate(who)]
    threads[0].start()
    if strangers:
        time.sleep(0.2)
        for words in (b"GET / HTTP/1.1\r\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.sendall(words)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    with socket.create_server(("", port), family=socket.AF_INET):
        pass  # the port is free for jax, whatever links stay
    for (key, name), link in links.items():
        link.sendall(f"{who[key[0]]} to {name}\n".encode())
    for (key, name), link in links.items():
        process_id, processes = who[key[0]]
        assert link.recv(99) == f"({name.split()[1]}, {processes}) to process {process_id} of {processes}\n".encode()
        link.close()
    return ended


def test_all_meet_whatever_the_order() -> None:
    assert set(meeting((0, 4), (1, 4), (2, 4), (3, 4), strangers=True).values()) == {""}
    assert set(meeting((2, 3), (1, 3), (0, 3)).values()) == {""}


def test_who_is_missing_is_told_to_all(capsys, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "ANNOUNCE", 0.2)
    ended = meeting((0, 4), (2, 4), patience=1)
    assert "for process 1 of 4, process 3 of 4; see what they say" in ended[0, 0]
    assert ended[1, 2] == f"turned away by process 0: {ended[0, 0]}"
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("niso: process 0 of 4 is waiting at ") for line in said) and len(said) == 2


def test_no_process_0() -> None:
    ended = meeting((1, 2), patience=0.5)
    assert "for process 0 (Connection refused); is it started, and its port open to this machine?" in ended[0, 1]


def test_something_else_listens_there() -> None:
    """An older run's jax, say, which may be gone in a moment: it is asked again."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            for words in (b"\x00\x00\x12\x04\x00", b""):
                caller = other.accept()[0]
                caller.sendall(words)
                caller.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=r"^waited \d s at "):
            distributed.meet("127.0.0.1", other.getsockname()[1], 2, 1, 1)
        thread.join()


def test_numbers_that_do_not_fit_together() -> None:
    twice = meeting((0, 3), (1, 3), (1, 3))
    assert "process 1 of 3 came twice; each needs a --process_id of its own" in twice[0, 0]
    assert all("turned away by process 0: process 1 of 3 came twice" in twice[at] for at in ((1, 1), (2, 1)))
    other = meeting((0, 3), (1, 2))
    assert "process 1 of 2 came to a run of 3; each needs" in other[0, 0] and "came to a run of 3" in other[1, 1]
    listening = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listening, pytest.raises(OSError, match=r"cannot listen on port .* is another process 0 running"):
        distributed.meet("127.0.0.1", listening.getsockname()[1], 2, 0, 1)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((None, None, 1), "--process_id=1 needs --processes=N"),
        (("host:1", None, None), "--coordinator=host:1 needs --processes=N"),
        (("host:1", None, 0), "--coordinator=host:1 --process_id=0 needs --processes=N"),
        (("host:1", 2, None), "--processes=2 needs --coordinator=HOST:PORT and a --process_id from 0 to 1"),
        ((None, 1, 1), "--processes=1 needs"),
        (("host", 2, 0), "coordinator 'host': expected HOST:PORT of process 0"),
        (("host:port", 2, 0), "coordinator 'host:port': expected"),
        ((":1", 2, 0), "coordinator ':1': expected"),
    ],
)
def test_flags_that_do_not_fit_together(given: tuple[str | None, int | None, int | None], line: str) -> None:
    with pytest.raises(UserError, match=line.replace("(", r"\(")):
        distributed.join(*given, detect=True)


@pytest.fixture
def joined(monkeypatch) -> Callable[..., tuple]:
    """What jax.distributed is given, if it is called."""

    def join(*flags: object, detect: bool = True, **environment: str) -> tuple:
        given: list[tuple] = []
        monkeypatch.setattr(distributed, "meet", lambda *args: given.append(args))
        monkeypatch.setattr(distributed, "Peers", lambda name, links: SimpleNamespace(leave=lambda: None))
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: given.append(args))
        monkeypatch.setattr(distributed.os, "dup2", lambda *_: None)
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        distributed.join(*(flags or (None, None, None)), detect=detect)  # type: ignore[arg-type]
        return tuple(given)

    return join


def test_join_takes_flags_before_variables(joined) -> None:
    assert joined() == ()
    assert joined("[::1]:1234", 2, 1) == (("::1", 1234, 2, 1, 60), ("[::1]:1234", 2, 1, None, "deactivate"))
    assert joined("host:1234", 1, 0) == () == joined(None, 1, None, **SLURM)
    assert joined(detect=False) == ()
    assert joined() == (("node07", 62344, 8, 5, 300), ("node07:62344", 8, 5, (1,), "deactivate"))


def test_a_process_that_is_missing_ends_the_program() -> None:
    """With a line and a code for which launchers start it again."""
    code = (
        "import sys; from niso import distributed; distributed.PATIENCE = 0.3; "
        f"distributed.join('127.0.0.1:{free_port()}', 2, int(sys.argv[1]), True)"
    )
    for process_id, missing in (("0", "process 1 of 2"), ("1", "process 0")):
        ended = subprocess.run(
            [sys.executable, "-c", code, process_id], cwd=runs.REPOSITORY, capture_output=True, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
        assert ended.stderr.startswith(f"niso: process {process_id} of 2, as --processes says: waited "), ended.stderr
        assert f" for {missing}" in ended.stderr


def test_a_step_of_two_tasks_is_one_run() -> None:
    """As Slurm would start it: the processes see each other's devices, and jax's chatter stays off the output."""
    code = (
        "from niso import distributed; import jax\n"
        "with distributed.join(None, None, None, True):\n"
        "    print(jax.process_index(), jax.process_count(), jax.device_count(), jax.local_device_count())"
    )
    step = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_NODEID": "0", "JAX_COORDINATOR_PORT": str(free_port()), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=runs.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    ended = [runs.end(process) for process in pair]
    assert [one.code for one in ended] == [0, 0], ended
    assert [one.out for one in ended] == ["0 2 4 2\n", "1 2 4 2\n"]
