"""launch/jobset_*.yaml: what Kubernetes would refuse, and what recovery rests on."""

import pathlib
from typing import Any

import kubernetes_validate
import pytest
import yaml

from niso.train import PREEMPTED
from tests.launching import LAUNCH, read_flags


@pytest.mark.parametrize(("name", "chips"), [("jobset_tpu", "google.com/tpu"), ("jobset_gpu", "nvidia.com/gpu")])
def test_manifests(name: str, chips: str) -> None:
    """The fields that JobSet and Kubernetes require, and those that make a run go on, or stop."""
    text = (LAUNCH / f"{name}.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "niso",
    )
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 100  # of a week on spot machines: it is not counted anew after a checkpoint
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job: dict[str, Any] = replicated["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0) and job["parallelism"] == job["completions"]
    rules = [(rule["action"], rule["onExitCodes"]) for rule in job["podFailurePolicy"]["rules"]]
    codes = {"containerName": "niso", "operator": "In"}
    assert rules == [("Ignore", codes | {"values": [PREEMPTED]}), ("FailJob", codes | {"values": [2]})]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy requires
    assert pod["terminationGracePeriodSeconds"] >= 120
    (container,) = pod["containers"]
    assert (container["name"], container["image"], container["command"]) == ("niso", "IMAGE", ["python", "-m", "niso.main"])
    assert container["resources"]["limits"][chips] > 0
    mounts = container.get("volumeMounts", [])
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod.get("volumes", [])}
    shared = [a for a in container["args"] if a.startswith(("--workdir=", "--config.data.records="))]
    seen_by_all = f"{mounts[0]['mountPath']}/" if mounts else "gs://BUCKET/"
    assert len(shared) == 2 and all(a.partition("=")[2].startswith(seen_by_all) for a in shared)
    variables = {one["name"]: one["value"] for one in container.get("env", [])}
    if name == "jobset_gpu":
        first = f"niso-{replicated['name']}-0-0.niso"
        processes = {"JAX_COORDINATOR_ADDRESS": f"{first}:1234", "JAX_NUM_PROCESSES": str(job["parallelism"])}
        assert variables == processes | {"JAX_PLATFORMS": "cuda", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
        assert container["ports"] == [{"containerPort": 1234}]
    else:
        chips_in_slice = 1
        for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
            chips_in_slice *= int(side)
        assert chips_in_slice == job["parallelism"] * container["resources"]["limits"][chips]
        assert {"containerPort": 8482} in container["ports"]  # niso.cluster's
    assert read_flags(container["args"])["batch"] == 256


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_jobs_are_what_kubernetes_takes(path: pathlib.Path) -> None:
    """By its own schemas, which know all fields of jobs and of pods, but not of the JobSets around them."""
    manifest = yaml.safe_load(path.read_text())
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, **replicated["template"]}
        kubernetes_validate.validate(job, "1.33", strict=True)
        job["spec"]["template"]["spec"]["containers"][0]["comand"] = ["python"]
        with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
            kubernetes_validate.validate(job, "1.33", strict=True)
