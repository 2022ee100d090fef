"""launch/: what every script does is watched with programs that stand in for niso, and one real run of two processes."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from niso.train import PREEMPTED
from tests import runs
from tests.launching import LAUNCH, ROOT, executable, shell, until

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: pathlib.Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines and len(lines) < 300
    linter = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("shellcheck is not installed: pip install -e .[test]")
    linted = subprocess.run([linter, str(script)], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


# restart.sh, around a program that ends with the codes that it is told one after the other, and counts its starts.
CODES = (
    'echo started >> "$0.starts"; set -- $(sed -n "$(wc -l < "$0.starts")p" "$0.codes"); [ -z "$2" ] || mkdir -p "$2"; exit $1\n'
)


def restart(
    tmp_path: pathlib.Path, codes: list[str], *arguments: str, cwd: pathlib.Path = ROOT, **environment: str
) -> tuple[runs.Ended, int]:
    """Each code may be followed by a folder that the program makes before it ends."""
    program = tmp_path / "program"
    (tmp_path / "program.codes").write_text("\n".join(codes) + "\n")
    program.write_text(CODES)
    ended = runs.end(shell(str(LAUNCH / "restart.sh"), "bash", str(program), *arguments, cwd=cwd, **environment))
    return ended, len((tmp_path / "program.starts").read_text().splitlines())


def test_restart_goes_on_after_preemption(tmp_path) -> None:
    ended, starts = restart(tmp_path, ["42", "42", "0"], RETRIES="0")
    assert (ended.code, starts) == (0, 3)
    assert ended.err.count("asked to leave and is saved") == 2


def test_restart_needs_no_home() -> None:
    assert runs.end(shell("env", "-u", "HOME", "launch/restart.sh", "true", "--workdir=~/run")).code == 0


def test_restart_stops_at_a_mistake(tmp_path) -> None:
    ended, starts = restart(tmp_path, ["2", "0"])
    assert (ended.code, ended.err, starts) == (2, "", 1)
    nothing = runs.end(shell("launch/restart.sh"))
    assert nothing.code == 2 and nothing.err.startswith("restart.sh: no command; usage")


def test_restart_gives_up_on_crashes_in_a_row(tmp_path) -> None:
    ended, starts = restart(tmp_path, ["1", "134", "7", "0"], RETRIES="2")
    assert (ended.code, starts) == (7, 3)
    assert ended.err.splitlines()[-1] == "restart.sh: exit code 7; 2 retries in a row brought no new checkpoint: giving up"


@pytest.mark.parametrize("form", ["--workdir=~/run", "--workdir {}/run"])
def test_restart_counts_anew_after_a_checkpoint(form: str, tmp_path) -> None:
    steps = [tmp_path / "run/checkpoints" / name for name in ("5", "10", "10.orbax-checkpoint-tmp", "10")]
    codes = [f"1 {path}" for path in steps]
    ended, starts = restart(tmp_path, [*codes, "0"], *form.format(tmp_path).split(), RETRIES="1", HOME=str(tmp_path))
    # Retries after 5 and after 10 each are the first; then step 10 is no news, whether half or whole.
    assert (ended.code, starts) == (1, 3)


def test_restart_sees_checkpoints_of_a_run_that_is_not_named(tmp_path) -> None:
    """It is below runs/, and the newest of its checkpoints was made when the last was."""
    paths = [tmp_path / "runs/pose_encode-quick/checkpoints" / name for name in ("5", "10", "10")]
    ended, starts = restart(tmp_path, [*(f"1 {path}" for path in paths), "0"], RETRIES="1", cwd=tmp_path)
    assert (ended.code, starts) == (1, 3)


def test_restart_passes_the_signal_on_and_ends(tmp_path) -> None:
    """With the program's code, and only after it has saved; what is to be done then is done."""
    program = executable(
        tmp_path / "program",
        f"#!/usr/bin/env bash\ntrap 'sleep 0.2; touch {tmp_path}/saved; exit 42' TERM\necho started >> {tmp_path}/starts\n"
        "while true; do sleep 0.05; done\n",
    )
    loop = shell("launch/restart.sh", program, ON_LEAVE=f"touch {tmp_path}/requeued")
    until(tmp_path / "starts")
    loop.send_signal(signal.SIGTERM)
    ended = runs.end(loop, 20)
    assert (ended.code, ended.err) == (42, "")
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").exists()
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_restart_ends_between_two_tries(tmp_path) -> None:
    program = executable(tmp_path / "program", f"#!/usr/bin/env bash\necho started >> {tmp_path}/starts\nexit 5\n")
    loop = shell("launch/restart.sh", program, BACKOFF="30")
    until(tmp_path / "starts")
    time.sleep(0.3)
    loop.send_signal(signal.SIGTERM)
    assert runs.end(loop, 20).code == 5
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


# local.sh, in a folder whose niso.main stands in for the real one.
STAND_IN = """
import pathlib, signal, sys, time
arguments = sys.argv[1:]
me = int(arguments[-1].removeprefix("--process_id="))
print(*arguments, flush=True)
{body}
"""


def local(tmp_path: pathlib.Path, count: str, body: str = "", *arguments: str, **environment: str) -> subprocess.Popen:
    (tmp_path / "niso").mkdir(exist_ok=True)
    (tmp_path / "niso/__init__.py").touch()
    (tmp_path / "niso/main.py").write_text(STAND_IN.format(body=body))
    options = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"} | environment
    return shell(str(LAUNCH / "local.sh"), count, *arguments, cwd=tmp_path, **options)


def test_local_gives_each_process_its_number(tmp_path) -> None:
    given = ["--config=configs/a.py", "--config.task.name=two words", "--config.x='(1,)'"]
    ended = runs.end(local(tmp_path, "3", "", *given, LOGS=str(tmp_path / "logs")))
    assert (ended.code, ended.err) == (0, "")
    said = [ended.out, *((tmp_path / f"logs/process_{i}.log").read_text() for i in (1, 2))]
    port = said[0].partition("127.0.0.1:")[2].split()[0]
    for i, line in enumerate(said):
        expected = [*given, f"--coordinator=127.0.0.1:{port}", "--processes=3", f"--process_id={i}"]
        assert line == " ".join(expected) + "\n"


def test_local_ends_the_others_and_names_their_words(tmp_path) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif me == 1: sys.exit('broken')\ntime.sleep(60)"
    begun = time.monotonic()
    ended = runs.end(local(tmp_path, "2", body, GRACE="1"))
    assert time.monotonic() - begun < 20
    last = ended.err.splitlines()[-1]  # before it, bash may say whom it killed
    assert ended.code == 1 and last.startswith("local.sh: process 1 of 2 ended with code 1; what processes from 1 on said: ")
    folder = pathlib.Path(last.split()[-1]).parent
    assert (folder / "process_1.log").read_text().endswith("broken\n")
    shutil.rmtree(folder)


@pytest.mark.parametrize(("codes", "result"), [((42, 42), 42), ((42, 3), 3), ((0, 42), 42), ((2, 134), 2), ((1, 137), 137)])
def test_local_returns_what_matters(codes: tuple[int, int], result: int, tmp_path) -> None:
    body = f"time.sleep(0.3 * me); sys.exit({codes}[me])"
    assert runs.end(local(tmp_path, "2", body, LOGS=str(tmp_path))).code == result


def test_local_passes_a_signal_on_to_all(tmp_path) -> None:
    body = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open('{tmp_path}/saved', 'a').write('x\\n'), sys.exit(42)))\n"
        f"open('{tmp_path}/ready', 'a').write('x\\n')\nwhile True: time.sleep(0.05)"
    )
    pair = local(tmp_path, "2", body)
    until(tmp_path / "ready", 2)
    pair.send_signal(signal.SIGINT)
    ended = runs.end(pair, 20)
    assert (ended.code, ended.err) == (PREEMPTED, "")
    assert (tmp_path / "saved").read_text() == "x\nx\n"


@pytest.mark.parametrize("count", ["", "0", "two", "--config=a.py"])
def test_local_wants_a_number(count: str, tmp_path) -> None:
    ended = runs.end(local(tmp_path, count))
    assert ended.code == 2 and ended.err.startswith("local.sh: usage: launch/local.sh N")


@pytest.mark.slow
def test_two_real_processes_train_one_run(tmp_path) -> None:
    """As the command line says, from an empty folder to the last step; the folder then is that of one run."""
    changes = runs.TINY | {"data.records": runs.tiny_records(), "steps": 5}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    pair = shell(
        "launch/local.sh", "2", "--config=configs/pose_encode.py:quick", f"--workdir={tmp_path}/run", *overrides,
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1", LOGS=str(tmp_path), **runs.careless(),
    )  # fmt: skip
    ended = runs.end(pair, 240)
    assert (ended.code, ended.err) == (0, ""), (ended, (tmp_path / "process_1.log").read_text())
    assert "on 2 cpu device(s), mesh data 2 x space 1" in ended.out and "evaluation at step 5" in ended.out
    assert (tmp_path / "process_1.log").read_text() == ""
    assert runs.steps(tmp_path / "run") == [5]


# Slurm and TPU pods, with stand-ins for their programs.
def test_slurm_job(tmp_path) -> None:
    directives = [line.split(maxsplit=1)[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line[:7] == "#SBATCH"]
    given = dict(line.removeprefix("--").partition("=")[::2] for line in directives)
    assert {"nodes", "ntasks-per-node", "time", "signal", "requeue", "output", "open-mode", "job-name"} == given.keys()
    assert given["signal"] == "B:TERM@120"  # to the script alone, which passes it on and then has the job queued again

    programs = tmp_path / "bin"
    programs.mkdir()
    # As Slurm's do: srun kills its tasks on SIGTERM, and ends with their code; scancel signals the tasks.
    executable(
        programs / "srun",
        f'#!/bin/sh\necho "$@" >> {tmp_path}/srun\ntrap "exit 137" TERM\n'
        f"until rm {tmp_path}/signalled; do sleep 0.05; done\nexit 42\n",
    )
    executable(programs / "scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/scancel\ntouch {tmp_path}/signalled\n')
    executable(programs / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    path = f"{programs}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8", "ENVIRONMENT": str(tmp_path)}
    for array in ({}, {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}):
        job = shell("bash", "launch/slurm.sbatch", "--config=configs/pose_encode.py", **environment, **array)
        until(tmp_path / "srun")
        time.sleep(0.2)  # until it has its trap
        job.send_signal(signal.SIGTERM)
        assert runs.end(job, 20).code == 42
        line = "--kill-on-bad-exit=0 --wait=60 --cpus-per-task=8 python -m niso.main --config=configs/pose_encode.py\n"
        assert (tmp_path / "srun").read_text() == line
        (tmp_path / "srun").unlink()
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 77\n--signal=TERM 70_7\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 77\nrequeue 70_7\n"

    executable(programs / "srun", f'#!/bin/sh\necho "$@" > {tmp_path}/srun\n')
    job = shell("bash", "launch/slurm.sbatch", "sweep", "--config=a.py", **environment, **array)
    assert runs.end(job).code == 0
    assert (tmp_path / "srun").read_text().endswith("python -m launch.sweep --index 7 --config=a.py\n")
    elsewhere = runs.end(shell("bash", str(LAUNCH / "slurm.sbatch"), cwd=tmp_path, **environment))
    assert elsewhere.code == 2 and "is not niso's folder; submit from there" in elsewhere.err


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        (["create"], ["queued-resources create pod --node-id=pod --zone=z --accelerator-type=v5litepod-16", "--spot"]),
        (["install"], ["tpu-vm scp", "niso.tar.gz pod: --zone=z --worker=all", "python3.11 -m venv", "niso[tpu,gcs]"]),
        (["mount", "gs://bucket"], ["--worker=all", "gcsfuse --implicit-dirs bucket /mnt/niso"]),
        (["mount", "10.0.0.2:/share"], ["--worker=all", "mount -t nfs 10.0.0.2:/share /mnt/niso"]),
        (["logs"], ["--worker=0", "tail -n 100 -f niso/run.log"]),
        (["stop"], ["--worker=all", "kill -TERM $(cat niso/run.pid)"]),
        (["delete"], ["queued-resources delete pod --zone=z --force --quiet"]),
    ],
)
def test_tpu_pod_commands(command: list[str], parts: list[str]) -> None:
    ended = runs.end(shell("launch/tpu_pod.sh", *command, DRY="1", TPU="pod", ZONE="z", SPOT="1"))
    assert (ended.code, ended.err) == (0, "")
    for line in ended.out.splitlines():
        assert line.startswith("gcloud compute tpus ")
    said = " ".join(word for line in ended.out.splitlines() for word in shlex.split(line))
    assert all(part in said for part in parts), said


def test_tpu_pod_runs_what_it_is_given(tmp_path) -> None:
    """The line for the hosts is run here, with the arguments as they were; it leaves at once, and the run goes on."""
    given = ["--config=configs/pose_encode.py", "--config.task.warm_start=(('a|b', 'runs/x y'),)", "--workdir=/mnt/niso/run"]
    ended = runs.end(shell("launch/tpu_pod.sh", "run", *given, DRY="1"))
    remote = shlex.split(ended.out)[-1].removeprefix("--command=")
    (tmp_path / "niso/launch").mkdir(parents=True)
    executable(tmp_path / "niso/launch/restart.sh", f'#!/bin/bash\nprintf "%s\\n" $$ "$@" > {tmp_path}/seen; sleep 0.5\n')
    begun = time.monotonic()
    assert runs.end(shell("bash", "-c", remote, cwd=tmp_path)).code == 0
    until(tmp_path / "seen", 7)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert time.monotonic() - begun < 5
    assert seen[1:] == ["python", "-m", "niso.main", *given]
    assert (tmp_path / "niso/run.pid").read_text().strip() == seen[0]  # `stop` means restart.sh itself
    for wrong in (["run"], ["run", "--config=a.py"], ["mount"], ["fly"], []):
        refused = runs.end(shell("launch/tpu_pod.sh", *wrong, DRY="1"))
        assert refused.code == 2 and refused.err.count("\n") == 1 and "usage: launch/tpu_pod.sh" in refused.err
