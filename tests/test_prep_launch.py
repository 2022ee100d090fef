"""launch/prepare.sbatch and launch/jobset_prepare.yaml: data prepared by the jobs of an array, and merged."""

import os
import pathlib
import signal
from typing import Any

import pytest
import yaml

from data_prep import images
from tests import runs
from tests.launching import LAUNCH, executable, shell, until
from tests.prep_runs import contents, noisy_pictures

GIVEN = ["images", "--root", "two words", "--out", "records"]
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}


def submit(tmp_path: pathlib.Path, program: str, *more: str, cwd: pathlib.Path = LAUNCH.parent, given=GIVEN, **environment: str):
    """The job, with stand-ins for python and Slurm's programs, which note in tmp_path how they were called."""
    (tmp_path / "bin").mkdir()
    executable(
        tmp_path / "bin/python", f'#!/bin/bash\nprintf "%s|" "$@" > {tmp_path}/python\necho >> {tmp_path}/python\n{program}\n'
    )
    executable(tmp_path / "bin/scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    slurm = {"PATH": path, "ENVIRONMENT": str(tmp_path), "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8"}
    return shell("bash", str(LAUNCH / "prepare.sbatch"), *given, *more, cwd=cwd, **slurm | environment)


@pytest.mark.parametrize(
    ("environment", "more", "task"),
    [
        (ARRAY, [], ["--task", "3/8"]),
        (ARRAY | {"TASKS": "100", "SLURM_ARRAY_TASK_COUNT": "1"}, [], ["--task", "3/100"]),
        ({}, ["--merge"], ["--merge"]),
    ],
)
def test_a_slurm_job_is_a_task_or_the_merge(tmp_path, environment, more, task) -> None:
    ended = runs.end(submit(tmp_path, "exit 5", *more, **environment))
    assert (ended.code, ended.err) == (5, "") and not (tmp_path / "scontrol").exists()
    expected = ["-m", "data_prep.images", "--workers", "8", *GIVEN[1:], *task]
    assert (tmp_path / "python").read_text().rstrip("|\n").split("|") == expected


def test_one_process_of_many_threads_is_not_told_how_many(tmp_path) -> None:
    given = ["homnist", "--mnist", "records/mnist", "--out", "records/homnist"]
    assert runs.end(submit(tmp_path, "exit 0", given=given, **ARRAY)).code == 0
    expected = ["-m", "data_prep.homnist", *given[1:], "--task", "3/8"]
    assert (tmp_path / "python").read_text().rstrip("|\n").split("|") == expected


@pytest.mark.parametrize(("environment", "job"), [(ARRAY, "70_3"), ({}, "77")])
def test_a_slurm_job_whose_time_is_over_is_queued_again(tmp_path, environment, job) -> None:
    program = f'trap "touch {tmp_path}/ended; exit 143" TERM\necho >> {tmp_path}/python\nwhile true; do sleep 0.05; done'
    running = submit(tmp_path, program, **environment)
    until(tmp_path / "python", 2)
    running.send_signal(signal.SIGTERM)
    assert runs.end(running, 20).code == 143
    assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n"
    assert (tmp_path / "ended").exists()


def test_a_signal_at_once_is_not_lost(tmp_path) -> None:
    """Where the program runs already, but the script does not yet know its number."""
    program = f'trap "touch {tmp_path}/ended; exit 143" TERM\nkill -TERM $PPID\nwhile true; do sleep 0.05; done'
    assert runs.end(submit(tmp_path, program, **ARRAY), 20).code == 143
    assert (tmp_path / "ended").exists() and (tmp_path / "scontrol").read_text() == "requeue 70_3\n"


def test_slurm_is_told_how_to_end_it(tmp_path) -> None:
    lines = (LAUNCH / "prepare.sbatch").read_text().splitlines()
    given = dict(line.split()[1].removeprefix("--").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert given["signal"].startswith("B:TERM@") and "requeue" in given and given["open-mode"] == "append"
    assert given["job-name"] == "niso-prepare"  # the same for tasks and merge, as --dependency=singleton needs
    assert (given["nodes"], given["ntasks"]) == ("1", "1")
    elsewhere = runs.end(submit(tmp_path, "exit 0", cwd=tmp_path))
    assert elsewhere.code == 2 and "is not niso's folder; submit from there" in elsewhere.err


def test_kubernetes_prepares_what_one_run_would(tmp_path) -> None:
    """The fields that it requires, and the commands themselves, run here."""
    manifest = yaml.safe_load((LAUNCH / "jobset_prepare.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    shared, merge = manifest["spec"]["replicatedJobs"]
    assert "dependsOn" not in shared and merge["dependsOn"] == [{"name": shared["name"], "status": "Complete"}]
    jobs: list[dict[str, Any]] = [one["template"]["spec"] for one in (shared, merge)]
    assert jobs[0]["completionMode"] == "Indexed" and jobs[0]["parallelism"] == jobs[0]["completions"]
    root, out = noisy_pictures(tmp_path / "images"), tmp_path / "records"
    for job, count in zip(jobs, (jobs[0]["completions"], 1), strict=True):
        actions = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
        assert actions["FailJob"]["onExitCodes"] == {"containerName": "niso", "operator": "In", "values": [2]}
        assert actions["Ignore"]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["restartPolicy"] == "Never" and container["image"] == "IMAGE" and container["name"] == "niso"
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
        assert container["command"] == ["python", "-m", "data_prep.images"]
        for number in range(count):
            here = {
                "/share/records/images": out,
                "/share/images": root,
                "$(JOB_COMPLETION_INDEX)": number,
                "workers=8": "workers=1",
            }
            line = "\n".join(container["args"])
            for there, value in here.items():
                line = line.replace(there, str(value))
            assert "/share" not in line and images.main(line.split("\n")) == 0
    images.prepare(root, tmp_path / "one", progress=False)
    assert contents(out) == contents(tmp_path / "one")
