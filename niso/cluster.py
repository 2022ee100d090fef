"""What the environment says about the processes of this run: how many there are, which this is, and where they meet.

The variables are those that jax.distributed reads, and a test compares the answers. They are read here because the decision is
niso's: one process inside an allocation, or on one TPU host, is alone; and one process to a node sees all of the node's GPUs,
where jax.distributed would give it one.
"""

import dataclasses
import importlib.util
import math
import os
import re
import urllib.request
from collections.abc import Mapping

from niso.errors import UserError

METADATA = "computeMetadata/v1/instance/attributes"
# A job's own port, so that two jobs on one node do not meet each other: the last 4,096, as jax.distributed does.
FIRST_PORT, PORTS = 65536 - 4096, 4096


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run that something else started.

    `devices`: which of the GPUs that it sees are this process's own; None: all.
    """

    name: str
    processes: int
    process_id: int
    coordinator: str  # host:port of process 0
    devices: tuple[int, ...] | None = None


def where(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that the variables tell of; None where this process is alone.

    Raises:
      UserError: there are several processes, and something of them is not told.
    """
    for find in (_told, _open_mpi, _slurm, _tpu):
        found = find(environment)
        if found is not None:
            address = environment.get("JAX_COORDINATOR_ADDRESS", found.coordinator)
            return dataclasses.replace(found, coordinator=address) if found.processes > 1 else None
    if {"JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX"} <= environment.keys():
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set and JAX_NUM_PROCESSES is not: say how many pods the job has (launch/jobset_gpu.yaml), "
            "or run alone with --distributed=off"
        )
    return None


def tpu_metadata(timeout: float = 2) -> dict[str, str]:
    """What a TPU VM's metadata server knows, under the names that Kubernetes gives the same in its pods' environment."""
    # jax sets TPU_SKIP_MDS_QUERY where it finds no TPU chip; elsewhere there is nothing to ask for.
    if importlib.util.find_spec("libtpu") is None or {"TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"} & os.environ.keys():
        return {}
    try:
        # name:id:address or plain names, after the age of the machine.
        workers = [one.split(":")[-1] for one in _attribute("worker-network-endpoints", timeout).split(",")]
        told = {"TPU_WORKER_HOSTNAMES": ",".join(workers), "TPU_WORKER_ID": _attribute("agent-worker-number", timeout)}
        return told | dict(re.findall(r"^(MEGASCALE_\w+): *'(.*)'$", _attribute("tpu-env", timeout), re.M))
    except OSError:
        return {}  # not on Google's machines


def _attribute(name: str, timeout: float) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/{METADATA}/{name}", headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this address
    with direct.open(request, timeout=timeout) as answer:
        return answer.read().decode().strip()


def _told(environment: Mapping[str, str]) -> Cluster | None:
    """By name, as launch/jobset_gpu.yaml does; the index is given by Kubernetes to each pod of an indexed job."""
    if not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"} <= environment.keys():
        return None
    process = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
    count = _number(environment, "JAX_NUM_PROCESSES")
    return Cluster("JAX_NUM_PROCESSES", count, _number(environment, process), environment["JAX_COORDINATOR_ADDRESS"])


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment or (count := _number(environment, "OMPI_COMM_WORLD_SIZE")) < 2:
        return None
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    uri, address = re.match(r"(\d+)\..*?tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", "")), ""
    if uri is not None:
        address = f"{uri[2]}:{_port(environment, int(uri[1]) // PORTS)}"  # the number is a multiple of 2^12
    elif "JAX_COORDINATOR_ADDRESS" not in environment:
        raise UserError(
            f"Open MPI started {count} processes and does not say where the first is: give all of them "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT (mpirun -x), or run alone with --distributed=off"
        )
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK")
    own = _devices(environment, local, _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"))
    return Cluster("Open MPI", count, _number(environment, "OMPI_COMM_WORLD_RANK"), address, own)


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """A step of several tasks: the allocation may have more tasks than the step that this process is in."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    if (count := _number(environment, "SLURM_STEP_NUM_TASKS")) < 2:
        return None
    # The first of node001 · node001,host2 · node[001-015,020],host2
    first = re.sub(r"^([^,\[]*)(?:\[([^,\-\]]*).*|,.*|)$", r"\1\2", environment["SLURM_STEP_NODELIST"])
    address = f"{first}:{_port(environment, _number(environment, 'SLURM_JOB_ID'))}"
    tasks: list[int] = []  # of every node, from 2(x3),1
    for each, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        tasks += [int(each)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    own = _devices(environment, _number(environment, "SLURM_LOCALID"), tasks[node] if node < len(tasks) else 1)
    return Cluster("Slurm", count, _number(environment, "SLURM_PROCID"), address, own)


def _tpu(environment: Mapping[str, str]) -> Cluster | None:
    """A slice of several hosts, or several slices: Kubernetes' variables, or a TPU VM's metadata."""
    hosts = (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or "localhost").split(",")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if len(hosts) * slices == 1:
        return None
    process = _number(environment, "TPU_WORKER_ID") if len(hosts) > 1 else int(environment.get("TPU_WORKER_ID") or 0)
    process += int(environment.get("MEGASCALE_SLICE_ID") or 0) * len(hosts)
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Cluster("TPU", len(hosts) * slices, process, f"{first}:{environment.get('JAX_COORDINATOR_PORT', '8482')}")


def _devices(environment: Mapping[str, str], local: int, beside: int) -> tuple[int, ...] | None:
    """The GPUs of the process `local` of the `beside` on this machine."""
    if beside < 2 or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if seen != [""] and len(seen) < beside:
        return None  # whoever started it has given each its own already
    share = max(1, math.floor(len(seen) / beside))
    return tuple(range(local * share, (local + 1) * share))


def _port(environment: Mapping[str, str], job: int) -> str:
    return environment.get("JAX_COORDINATOR_PORT") or str(FIRST_PORT + job % PORTS)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        missing = f"{name}={value!r} is not a number" if value else f"{name} is missing"
        raise UserError(f"{missing} in the environment of one of several processes; --distributed=off runs alone")
    return int(value)
