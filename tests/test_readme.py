"""The README's commands, as they stand there: every line is run, or says here why not."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import bucket, runs

REPOSITORY = Path(__file__).parents[1]
# Enough of a run to see that a command works: the twin's tiny records, two steps.
SMALL = (
    "--config.data.twin= --config.data.records=records/co3d --config.data.size=16 --config.data.test_every=50 --config.batch=4 "
    "--config.task.widths=(4,8) --config.task.blocks=1 --config.task.rank=8 --config.task.latent_channels=8 --config.steps=2 "
    "--config.optimizer.warmup=1"
)
QUICK = "pip install -q -e . && .venv/bin/python -m niso.main --config=configs/pose_encode.py:quick"
# The same for digits, of the twin.
DIGITS = (
    "--config.data.twin=tiny --config.data.records= --config.data.test_examples=4 --config.data.test_copies=1 --config.batch=2 "
    "--config.task.widths=(4,8) --config.task.rank=8 --config.task.latent_channels=8 --config.steps=2 --config.optimizer.warmup=1"
)
CO3D = {"CO3D_ROOT": "twin", "--workers 8": "--workers 1 --top_quantile 0 --test_fraction 0.34 --size 16"}
# A fragment of each line -> what is appended to it here, or the reason why it is not run.
RUN = {
    "--out gs://BUCKET": {"BUCKET": bucket.NAME, **CO3D},
    "--workdir=gs://BUCKET": {"BUCKET": bucket.NAME},
    "data_prep.synthetic_co3d": {"--size small": "--size tiny"},
    "data_prep.images": {"IMAGES": "twin", "--workers 8": "--workers 1 --test_fraction 0.3"},
    "hmnist_encode.py:small": {"seeds=3": "seeds=1"},  # tests/test_replicas.py has several
    "hmnist_pred.py:small": {"seeds=3": "seeds=1"},
    "niso.report": {},
    "data_prep.co3d": CO3D,
    "--print": {},
    "--coordinator": {"--config.batch=2048": "", "--processes=4": "--processes=1"},
    "--config=configs/pose_encode.py ": {},
    "--config=configs/pose_encode.py:small ": {},
    "--config=configs/pose_pred.py:small": {":small": ":small --config.task.limit=16"},
    "niso.trajectories": {"step_00003000": "step_00000002"},
    "niso.predict": {"FRAMES": "$(ls -d twin/*/*/images | head -1)"},
}
NOT_RUN = {
    "--out gs://BUCKET": {"BUCKET": bucket.NAME, **CO3D},
    "--workdir=gs://BUCKET": {"BUCKET": bucket.NAME},
    "data_prep.mnist": "needs MNIST's files, whose checksums it verifies; tests/test_mnist_prep.py runs it where they are at hand",
    "tensorboard --logdir runs": "a server; the next test reads the run with TensorBoard's own reader",
    'pip install -q -e ".[samples]"': "the tests' own environment has it; tests/test_images_prep.py goes without",
    'pip install -e ".[cuda]"': "downloads gigabytes for a GPU",
    'pip install -e ".[gcs]"': "the tests' own environment has it; tests/test_folders.py goes without",
    "-m pytest": "this is it; .ci/run runs the line as it stands",
    "_laplacian.py": "minutes; tests/test_config.py makes two steps of its quick variant",
    "hmnist_encode.py:quick": "minutes; tests/test_config.py makes two steps of it",
    "hmnist_pred.py:quick": "minutes; tests/test_config.py makes two steps of it",
    "launch/local.sh": "tests/test_launch.py trains one run with it",
    "launch/restart.sh": "tests/test_launch.py starts commands with it, again and again",
    "--config.seed=1": "the line before it with another key, whose effect tests/test_step.py knows",
    "--config.task.operator=False": "the same; tests/test_autoencode.py trains so",
    "--config.task.dtype=bfloat16": "the same; tests/test_autoencode.py trains so",
    "cshrec11_encode.py:small": "minutes; tests/test_config.py makes two steps of its quick variant",
    "cshrec11_pred.py:small": "minutes; tests/test_config.py makes two steps of its quick variant",
    "niso.report runs/cshrec11": "of the runs before it; tests/test_report.py reads some that it makes",
    "data_prep.shapes": "needs meshes; tests/test_shapes_prep.py runs it on some that it makes",
    "--dry_run": "minutes at the published sizes; tests/test_dry_run.py runs it with small ones",
    "sbatch": "needs Slurm; tests/test_launch.py and test_prep_launch.py run the scripts with stand-ins",
    "export TPU": "needs a TPU pod; tests/test_launch.py reads what the lines would do",
    "launch/tpu_pod.sh": "needs a TPU pod; tests/test_launch.py reads what the lines would do",
    "docker build": "needs a registry; tests/test_manifests.py reads the manifest",
    "kubectl": "needs a cluster; tests/test_manifests.py reads the manifest",
    "--root=runs": "twenty runs; tests/test_sweep.py runs short ones",
    "tests.campaign": "half an hour; tests/test_survival_campaign.py runs a short one",
    "tests.equality": "hours; tests/test_equality.py runs it as a slow test",
    "tests.benchmarks": "minutes at these sizes; tests/test_benchmarks.py runs them with small ones",
}


def lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"NISO_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    environment["PYTHON"] = sys.executable
    if "--config.steps=2" in line:  # run twice: compiled carelessly, and once for the lines that need the same program
        environment |= runs.careless()
    line = re.sub(r"python (-[mc])", rf"{shlex.quote(sys.executable)} \1", line)
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, text=True, capture_output=True)


def last_number(text: str, before: str) -> float:
    return float(re.findall(rf"{before} ([0-9.]+)", text)[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to the commands; runs and records stay in it."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("configs", "niso", "data_prep", "launch"):
        (path / name).symlink_to(REPOSITORY / name)
    return path


def test_every_line_is_known() -> None:
    known = [*RUN, *NOT_RUN, QUICK]
    for line in lines():
        assert any(part in line + " " for part in known), f"say in {Path(__file__).name} how this line is tested: {line}"
    for part in known:
        assert any(part in line + " " for line in lines()), f"the README has no such line any more: {part}"


@pytest.mark.timeout(400)
def test_first_command(folder: Path) -> None:
    """Trains as a newcomer would; the installation before it is what this very environment is made of."""
    line = next(line for line in lines() if QUICK in line)
    begun = time.monotonic()
    done = shell(line.split(" && ")[-1].replace(".venv/bin/python", "python"), folder)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 300
    # It learns. Training loss: 1.13 -> 0.23; on held-out videos what 4 videos of 16 frames can teach: 0.6 of the first.
    assert last_number(done.stdout, "step 150/150 .*reconstruction") < 0.25, done.stdout
    for name, share in (("reconstruction", 0.7), ("equivariance error", 0.5)):
        first, last = (last_number(done.stdout, f"evaluation at step {step}: .*{name}") for step in (0, 150))
        assert last < share * first, done.stdout
    assert "equivariance error" in done.stdout and "tensorboard --logdir runs/pose_encode-quick" in done.stdout
    drawn = {path.stem for path in (folder / "runs/pose_encode-quick/figures/step_00000150").glob("*.png")}
    operator = {"eigenfunctions", "masses", "operator", "spectrum"}
    assert drawn == operator | {"reconstructions", "isometries", "train_reconstructions", "train_isometries"}
    again = shell(line.split(" && ")[-1].replace(".venv/bin/python", "python"), folder)
    assert again.returncode == 0 and len(again.stdout.splitlines()) == 1 and "finished" in again.stdout


def test_tensorboard_reads_the_run(folder: Path) -> None:
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    run = folder / "runs/pose_encode-quick"
    assert run.is_dir(), "made by the test before this one"
    reader = EventMultiplexer()
    reader.AddRun(str(run), "run").Reload()
    content = {plugin: set(reader.PluginRunToTagToContent(plugin).get("run", {})) for plugin in
               ("scalars", "images", "histograms", "text", "hparams")}  # fmt: skip
    assert {"train/loss", "eval/equivariance_error", "time/steps_per_second"} <= content["scalars"]
    assert {"reconstructions", "eigenfunctions", "isometries"} <= content["images"]
    assert content["histograms"] == {"eigenvalue_K", "mass_N"} and content["text"] and content["hparams"]
    image = np.asarray(Image.open(next(run.glob("figures/*150/eigenfunctions.png"))))
    assert image.ndim == 3 and image.std() > 10  # something is drawn


@pytest.mark.timeout(400)
@pytest.mark.parametrize("digits", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["video", "digits"])
def test_the_other_commands(folder: Path, digits: bool, bucket_url: str) -> None:
    """In the README's order, but data first, and first of all the twin: it stands for CO3Dv2 and for a folder of images here."""
    known = sorted(lines(), key=lambda line: ("synthetic_co3d" not in line, "data_prep" not in line))
    for original in known:
        line = original
        if QUICK in line or any(part in line for part in NOT_RUN) or ("hmnist" in line) != digits:
            continue
        changes = next(changes for part, changes in RUN.items() if part in line + " ")
        for old, new in changes.items():
            assert old in line
            line = line.replace(old, new)
        if "niso.main" in line or "local.sh" in line:
            overrides = DIGITS if "hmnist" in line else SMALL
            line += "".join(f" '{word}'" for word in overrides.split() if not ("gs://" in line and "data.records" in word))
            if "--workdir" not in line and not re.search(r":small |hmnist", original + " "):  # runs that others follow on
                line += f" --workdir=runs/line-{known.index(original)}"
        done = shell(line, folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_program(folder: Path) -> None:
    """The lines of Python, in a program of their own, on the run that the test before this one has made."""
    program = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    assert len(program) == 1
    done = shell(f"python -c {shlex.quote(program[0] + 'print(tau_PxKxK.shape, relative_Px4x4.shape)')}", folder)
    assert (done.returncode, done.stdout) == (0, "(4, 8, 8) (4, 4, 4)\n"), done.stderr
