"""Telemetry: TensorBoard's own readers find what was written, a resumed run's files are an unbroken run's, errors are heard."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.util.tensor_util import make_ndarray

from niso import cost, telemetry
from niso.errors import UserError
from niso.event_writer import METRICS_FILE, AppendFile, EventWriter, JsonlWriter, drop_after
from niso.telemetry import Telemetry
from tests.conftest import mesh_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def read(workdir: Path) -> EventAccumulator:
    return EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()


def read_as_tensorboard(workdir: Path | str) -> PluginEventAccumulator:
    """The reader of the TensorBoard server; unlike the one above it forgets tensors that a restart has made void."""
    return PluginEventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()


def scalars(events: EventAccumulator | PluginEventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]


def metric_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture_HxWx3 = rng.integers(0, 255, (5, 7, 3), np.uint8)
    value_N = rng.normal(size=1000)
    with Telemetry(tmp_path, steps=10, batch=2) as run:
        run.config("seed: 1\nname: x", {"seed": 1, "rate": 0.5, "name": "x", "flag": True})
        run.scalars(3, {"loss": 0.25})
        run.scalars(4, {"loss": float("nan")})
        run.images(4, {"figures/one": picture_HxWx3})
        run.histograms(4, {"eigenvalues": np.append(value_N, [np.nan, np.inf])})
    events = read(tmp_path)
    assert scalars(events, "loss")[0] == (3, 0.25) and np.isnan(scalars(events, "loss")[1][1])
    width, height, png = make_ndarray(events.Tensors("figures/one")[0].tensor_proto)
    assert (width, height) == (b"7", b"5")
    assert np.array_equal(np.array(Image.open(io.BytesIO(png))), picture_HxWx3)
    bucket_Bx3 = make_ndarray(events.Tensors("eigenvalues")[0].tensor_proto)
    assert bucket_Bx3[:, 2].sum() == 1000, "only finite values are counted"
    assert bucket_Bx3[0, 0] == value_N.min() and bucket_Bx3[-1, 1] == value_N.max()
    assert b"    seed: 1\n    name: x" in make_ndarray(events.Tensors("config")[0].tensor_proto).item()
    plugins = {"loss": "scalars", "figures/one": "images", "eigenvalues": "histograms", "config": "text"}
    for tag, plugin in plugins.items():
        assert events.SummaryMetadata(tag).plugin_data.plugin_name == plugin
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hparams = parse_session_start_info_plugin_data(content).hparams
    assert (hparams["seed"].number_value, hparams["rate"].number_value) == (1.0, 0.5)
    assert (hparams["name"].string_value, hparams["flag"].bool_value) == ("x", True)


def test_a_batch_of_grey_images_becomes_pages(tmp_path: Path) -> None:
    image_BxHxWx1 = np.random.default_rng(0).integers(0, 255, (2, 4, 3, 1), np.uint8)
    writer = EventWriter(tmp_path)
    writer.write_images(1, {"pair": image_BxHxWx1})
    writer.close()
    _, _, *pages = make_ndarray(read(tmp_path).Tensors("pair")[0].tensor_proto)
    assert np.array_equal(np.stack([np.array(Image.open(io.BytesIO(page))) for page in pages]), image_BxHxWx1[..., 0])
    with pytest.raises(TypeError, match="uint8"):
        EventWriter(tmp_path).write_images(1, {"float": np.zeros((2, 2, 3))})


def train(workdir: Path, first: int, last: int, resume_step: int) -> None:
    with Telemetry(workdir, steps=9, batch=1, resume_step=resume_step) as run:
        for step in range(first, last + 1):
            run.tick(step)
            run.scalars(step, {"loss": step / 3, "bad": np.inf if step == 5 else step})
            run.progress(step, {"loss": step / 3})


def test_a_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, 0, 9, resume_step=0)
    train(broken, 0, 3, resume_step=0)  # an attempt that died before its first checkpoint
    train(broken, 0, 7, resume_step=0)
    with open(broken / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "lo')  # killed in mid-write: an early step, so only the damage can drop it
    train(broken, 5, 9, resume_step=4)
    assert (broken / METRICS_FILE).read_bytes() == (whole / METRICS_FILE).read_bytes()
    assert [line["step"] for line in metric_lines(broken)] == list(range(10))
    assert scalars(read_as_tensorboard(broken), "loss") == scalars(read_as_tensorboard(whole), "loss")


def test_readers_forget_the_steps_after_the_resumed_one(tmp_path: Path) -> None:
    train(tmp_path, 1, 9, resume_step=0)
    train(tmp_path, 1, 0, resume_step=6)
    assert [step for step, _ in scalars(read_as_tensorboard(tmp_path), "loss")] == [1, 2, 3, 4, 5, 6]
    train(tmp_path, 1, 0, resume_step=0)
    assert scalars(read_as_tensorboard(tmp_path), "loss") == []


def test_jsonl_is_valid_json(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path)
    writer.write_scalars(1, {"a": np.float32(0.5), "b": np.nan, "c": np.inf, "d": -np.inf})
    assert (tmp_path / METRICS_FILE).read_bytes() == b'{"step": 1, "a": 0.5, "b": "nan", "c": "inf", "d": "-inf"}\n'
    with pytest.raises(ValueError, match="step"):
        writer.write_scalars(1, {"step": 2.0})
    writer.close()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 3}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 2}', '{"step": 1}\n'),  # whole but for the newline: the next line would join it
        ('{"step": 1}\n{"st', '{"step": 1}\n'),
        ('{"step": 1}\n\0\0\0\0', '{"step": 1}\n'),
        ("", ""),
    ],
)
def test_drop_after(tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(text)
    drop_after(path, 2)
    assert path.read_text() == kept
    drop_after(tmp_path / "missing", 2)
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_FILE], "no temporary file is left"


def test_drop_after_replaces_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 9}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'


def test_progress_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Telemetry(tmp_path, steps=400, batch=16, resume_step=100, clock=clock) as run:
        clock.now += 50  # building the model is not compilation
        for step in range(101, 121):
            with run.waiting():
                clock.now += 2.0 if step == 101 else 0.1
            clock.now += 12.3 if step == 101 else 0.4
            run.tick(step)
        run.progress(120, {"loss": 0.4123, "equivariance": 0.09106, "accuracy": 97.38, "rate": 5e-4})
        run.progress(120, {"loss": float("nan")})
        for step in range(121, 401):
            clock.now += 1.0
            run.tick(step)
        run.progress(400, {"loss": 0.0})
    line, again, last = capsys.readouterr().out.splitlines()
    assert line == (
        "step 120/400 (30 %)  loss 0.4123  equivariance 0.0911  accuracy 97.380  rate 5.000e-04"
        " | 2.00 steps/s  32.0 examples/s  waiting for data 20 %  2 min 20 s left"
    )
    assert again == "step 120/400 (30 %)  loss nan", "no step, no speed"
    assert last == "step 400/400 (100 %) loss 0.0000 | 1.00 steps/s  16.0 examples/s  waiting for data 0 %"
    events = read(tmp_path)
    assert scalars(events, "time/steps_per_second") == [(120, pytest.approx(2.0)), (400, pytest.approx(1.0))]
    assert scalars(events, "time/examples_per_second")[0] == (120, pytest.approx(32.0))
    assert scalars(events, "time/data_wait_share")[0] == (120, pytest.approx(0.2))
    assert (tmp_path / METRICS_FILE).read_text() == "", "speeds are no results"


def program(dtype: str = "bfloat16", kind: str | None = None) -> Any:
    """What Telemetry.compile asks of a Program: a step of 2 x 8 x 8 x 8 operations on two devices, of another kind at will."""
    mesh = mesh_of(2)
    place = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(
        lambda state, batch: (state @ batch, jnp.sum(batch)),
        in_shardings=(place, place), out_shardings=(place, None), donate_argnums=0,
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    if kind:
        mesh = SimpleNamespace(size=2, devices=np.array([SimpleNamespace(device_kind=kind)]))  # type: ignore[assignment]
    return SimpleNamespace(
        train=step, state_shapes=shape, batch_shapes=shape, mesh=mesh, task=SimpleNamespace(dtype=dtype),
        model_operations=lambda traced: cost.operations(traced).total,
    )  # fmt: skip


def test_the_step_is_compiled_once_and_keeps_donation_and_shardings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = program()
    place = NamedSharding(p.mesh, PartitionSpec("data"))
    state, batch = jax.device_put((jnp.ones((8, 8)), jnp.ones((8, 8))), place)
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compilations.append(event))
    with Telemetry(tmp_path, steps=9, batch=1) as run:
        step = run.compile(p)
        first = state
        for _ in range(3):
            state, _ = step(state, batch)
    jax.monitoring.clear_event_listeners()
    assert compilations.count("/jax/core/compile/backend_compile_duration") == 1
    assert first.is_deleted() and state.sharding == place
    assert re.fullmatch(r"compiled in \d+\.\d s\n", capsys.readouterr().out)
    ((at, seconds),) = scalars(read(tmp_path), "time/compile_seconds")
    assert at == 0 and 0 < seconds < 60


@pytest.mark.parametrize(
    "kind,dtype,tag,expected",
    [
        (None, "bfloat16", "time/flops_per_second", 2.0 * 1024),
        ("TPU v5 lite", "float32", "time/mfu", 2.0 * 1024 / (2 * 197e12)),
        ("NVIDIA H200", "bfloat16", "time/mfu", 2.0 * 1024 / (2 * 989e12)),
        ("NVIDIA H200", "float32", "time/mfu", 2.0 * 1024 / (2 * 494e12)),
    ],
)
def test_how_hard_the_devices_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, dtype: str, tag: str, expected: float
) -> None:
    held = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 2_500_000_000})
    monkeypatch.setattr(jax, "local_devices", lambda: [held, SimpleNamespace(memory_stats=lambda: None)])
    clock = Clock()
    with Telemetry(tmp_path, steps=9, batch=1, clock=clock) as run:
        run.compile(program(dtype, kind))
        for step in (1, 2, 3):
            clock.now += 0.5
            run.tick(step)
        run.progress(3, {})
    events = read(tmp_path)
    assert scalars(events, tag) == [(3, pytest.approx(expected))]
    assert {"time/mfu", "time/flops_per_second"} - {tag} - set(events.Tags()["tensors"]), "one or the other"
    assert scalars(events, "time/device_memory_peak_gb") == [(3, 2.5)]
    assert (tmp_path / METRICS_FILE).read_text() == "", "speeds are no results"


def test_restarts_are_counted_over_all_starts(tmp_path: Path) -> None:
    for resume_step, last in ((0, 0), (0, 3), (2, 5), (4, 4), (2, 5)):  # the first two without a checkpoint; one ends at once
        with Telemetry(tmp_path, steps=9, batch=1, resume_step=resume_step) as run:
            for step in range(resume_step + 1, last + 1):
                run.tick(step)
                run.progress(step, {})
    found = scalars(read(tmp_path), "time/restarts")
    assert found[-3:] == [(3, 4), (4, 4), (5, 4)]
    assert dict(found)[1] == 1


def test_time_spent_aside_is_not_training_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Telemetry(tmp_path, steps=9, batch=1, clock=clock) as run:
        for step in (1, 2, 3):
            clock.now += 0.5
            run.tick(step)
            with run.aside():
                clock.now += 100.0
        run.progress(3, {})
    assert "| 2.00 steps/s" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.9, "1 min 00 s"), (119, "1 min 59 s"), (3599.9, "1 h 00 min"), (2.5 * 86400, "2 d 12 h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert telemetry.format_seconds(seconds) == text


def test_other_hosts_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path / "new", steps=2, batch=1, primary=False, profile_steps=(1, 2)) as run:
        run.config("text", {"a": 1})
        for step in (1, 2):
            with run.waiting():
                pass
            run.tick(step)
            run.scalars(step, {"loss": 1.0})
            run.images(step, {"image": np.zeros((2, 2, 3), np.uint8)})
            run.histograms(step, {"array": np.zeros(3)})
            run.progress(step, {"loss": 1.0})
        run.say("hello")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_failed_write_is_a_user_error(tmp_path: Path) -> None:
    run = Telemetry(tmp_path, steps=2, batch=1)
    run._writers[1].file._file = open("/dev/full", "wb")  # noqa: SIM115  every write fails: no space left
    with pytest.raises(UserError, match=rf"cannot write {re.escape(str(tmp_path))}.*metrics\.jsonl: No space left") as caught:
        for step in range(1000):
            run.scalars(step, {"loss": 1.0})
        run.close()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No space left"):
        run.close()
    assert len(scalars(read(tmp_path), "loss")) >= 1, "the other file is whole"


def test_an_error_on_its_way_is_not_hidden_by_closing(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), Telemetry(tmp_path, steps=2, batch=1) as run:
        run._writers[0].file.error = OSError("gone")
        raise FloatingPointError


def test_append_file_reports_the_first_failure() -> None:
    file = AppendFile("/dev/full")
    file.write(b"x")
    file.write(b"x")
    for _ in range(2):
        with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
            file.check()
    file.close()


def test_append_file_reports_a_failure_to_close(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "file")
    file._file.close()
    file._file = open("/dev/full", "wb")  # noqa: SIM115
    file._file.write(b"x")  # as on a network file system, which may refuse what it has taken
    file.close()
    with pytest.raises(UserError, match="No space left"):
        file.check()


def test_unusable_workdir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir") as caught:
        Telemetry(tmp_path / "file/below", steps=1, batch=1)
    assert "\n" not in str(caught.value)


def test_close_waits_for_every_line_and_can_be_repeated(tmp_path: Path) -> None:
    run = Telemetry(tmp_path, steps=2, batch=1)
    for step in range(500):
        run.scalars(step, {"loss": float(step)})
    run.close()
    run.close()
    assert [line["loss"] for line in metric_lines(tmp_path)] == list(range(500))
    assert scalars(read(tmp_path), "loss") == [(step, step) for step in range(500)]


@pytest.mark.parametrize(("last", "stopped"), [(9, 5), (4, 4)])
def test_profiler_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: int, stopped: int
) -> None:
    calls: list[tuple[str, int]] = []
    step = 0
    monkeypatch.setattr("jax.profiler.start_trace", lambda logdir: calls.append(("start", step)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop", step)))
    with Telemetry(tmp_path, steps=9, batch=1, profile_steps=(3, 5)) as run:
        for step in range(1, last + 1):  # the lambdas see it
            run.tick(step)
    assert calls == [("start", 3), ("stop", stopped)], "the trace holds steps 4 and 5, and a run that ends early closes it"
    assert f"profile of steps 4 to {stopped} in {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("primary", [True, False])
def test_a_profile_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str], primary: bool) -> None:
    """Of any process of a run; of the window that the config names, of the first one alone."""
    before = signal.getsignal(signal.SIGUSR1)
    with Telemetry(tmp_path, steps=99, batch=1, primary=primary, profile_steps=(0, 2)) as run:
        run.compile(program())  # a window may begin with the first step
        for step in range(1, 21):
            jnp.ones(3).block_until_ready()
            if step in (4, 6):
                os.kill(os.getpid(), signal.SIGUSR1)  # the second during the trace that the first began
            run.tick(step)
    assert signal.getsignal(signal.SIGUSR1) is before
    found = re.findall(r"profile of steps (\d+ to \d+) in (\S+): tensorboard --logdir", capsys.readouterr().out)
    assert [steps for steps, _ in found] == ["1 to 2"] * primary + ["5 to 9", "10 to 14"]
    assert all(list(Path(folder).glob("*.xplane.pb")) for _, folder in found)


def test_tensorflow_is_never_imported(tmp_path: Path) -> None:
    program = f"""
import sys
from niso.telemetry import Telemetry
with Telemetry({str(tmp_path)!r}, steps=1, batch=1) as run:
    run.config("a", {{"a": 1}}); run.scalars(1, {{"a": 1.0}})
from clu.metric_writers import create_default_writer
writer = create_default_writer({str(tmp_path)!r}, asynchronous=False)
writer.write_scalars(2, {{"a": 2.0}}); writer.close()
assert "tensorflow" not in sys.modules and "clu.metric_writers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert scalars(read(tmp_path), "a") == [(1, 1.0), (2, 2.0)]
