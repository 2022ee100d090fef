"""Damaged checkpoints, full disks: nothing wrong is ever restored, and the run ends as if nothing had happened."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from niso import checkpoint, checkpoint_files, checksums
from niso.checkpoint import UNREADABLE, Checkpoints
from niso.checkpoint_files import DamagedError
from niso.errors import UserError
from niso.step import TrainState
from tests import runs
from tests.conftest import mesh_of
from tests.test_distributed import free_port
from tests.test_resume import assert_as_unbroken, one_line


def checksum64(array: np.ndarray) -> int:
    """The twin in NumPy: words scrambled with their position, one after the other."""
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[array.dtype.itemsize]
    total = 0
    for position, bits in enumerate(np.ascontiguousarray(array).reshape(-1).view(word).tolist()):
        mixed = bits ^ (position * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            mixed = (mixed ^ (mixed >> shift)) * factor % 2**32
        total += mixed
    return total % 2**32


KINDS = (np.float32, np.int32, np.uint8, np.bool_, jnp.bfloat16, np.float16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: np.dtype(kind).name)
def test_checksum_is_what_it_says_on_any_mesh(kind: type) -> None:
    array = (np.random.default_rng(0).normal(size=(8, 3, 4)) * 9).astype(kind)
    expected = {"a": [[8, 3, 4], checksum64(array)]}
    assert checksums.of({"a": jnp.asarray(array)}) == expected
    divided = NamedSharding(mesh_of(4, 2), PartitionSpec(("data", "space")))
    assert checksums.of({"a": jax.device_put(array, divided)}) == expected


def test_checksum_sees_every_bit_and_every_exchange() -> None:
    array = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    array[0] = 0
    seen = {checksum64(array)}
    words = array.view(np.uint32)
    for bit in range(0, 32 * array.size, 3):
        words.flat[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(checksums.of({"": array})[""][1])
        words.flat[bit // 32] ^= np.uint32(1 << bit % 32)
    assert len(seen) == 1 + -(-32 * array.size // 3)
    exchanged = [checksums.of({"": array[order]})[""][1] for order in ([0, 2, 1, 3], [3, 1, 2, 0], [1, 0, 2, 3])]
    assert len(seen | set(exchanged)) == len(seen) + 3
    assert checksums.of({"a": {"b": jnp.zeros(())}, "c": jnp.zeros((0, 2))}).keys() == {"a.b", "c"}


# What happens to files.
def halve(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy_of_unbroken(workdir: pathlib.Path, *without: int) -> pathlib.Path:
    shutil.copytree(runs.unbroken(), workdir)
    for step in without:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir / "checkpoints"


@pytest.fixture(scope="module")
def wanted() -> TrainState:
    program = runs.program(1)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        program.state_shapes, program.state_sharding,
    )  # fmt: skip


def numbers(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def damages(checkpoint: pathlib.Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every file of it emptied, halved, deleted, and with one bit changed."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size):
        name = path.relative_to(checkpoint)
        yield f"{name} emptied", lambda path=path: path.write_bytes(b"")
        yield f"{name} halved", lambda path=path: halve(path)
        yield f"{name} deleted", lambda path=path: path.unlink()
        yield f"{name} changed", lambda path=path: runs.flip(path)


@pytest.mark.slow
def test_whatever_happens_to_a_file_nothing_wrong_is_restored(wanted, tmp_path) -> None:
    """Either all numbers and the config are as they were, or it is an error that names the checkpoint."""
    whole = runs.unbroken() / "checkpoints" / str(runs.STEPS)
    expected, config = numbers(checkpoint_files.state(whole, wanted)), checkpoint_files.saved_config(whole)
    noticed, harmless = [], []
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for what, damage in damages(copy):
        damage()
        try:
            assert checkpoint_files.saved_config(copy) == config, what
            assert numbers(checkpoint_files.state(copy, wanted)) == expected, what
            harmless.append(what)
        except DamagedError as error:
            assert str(error).startswith(f"the checkpoint {copy} cannot be used (") and "\n" not in str(error), what
            noticed.append(what)
        shutil.rmtree(copy)
        shutil.copytree(whole, copy)
    assert f"{runs.largest(whole).relative_to(whole)} emptied" in noticed, (noticed, harmless)


def test_the_newest_sound_checkpoint_is_gone_on_from(tmp_path) -> None:
    """The config of the newest cannot be read, the numbers of the one before are not what was saved: both are kept aside."""
    checkpoints = copy_of_unbroken(tmp_path / "run", 16)
    (checkpoints / "15/meta/metadata").write_bytes(b"")
    runs.spoil(checkpoints / "10")
    ended = runs.run(tmp_path / "run")
    assert ended.code == 0, ended.err
    first, second = ended.err.splitlines()
    aside = tmp_path / "run" / UNREADABLE
    assert first.startswith("niso: checkpoint 15 cannot be used (") and f"going on from 10, and it goes to {aside}" in first
    assert second.startswith("niso: checkpoint 10 cannot be used (") and "going on from 5" in second
    assert "resuming at step 5" in ended.out
    assert runs.steps(tmp_path / "run") == [5, 10, 15, 16] and sorted(path.name for path in aside.iterdir()) == ["10", "15"]
    assert_as_unbroken(tmp_path / "run", runs.unbroken())


def test_without_a_sound_checkpoint_nothing_is_begun(tmp_path) -> None:
    checkpoints = copy_of_unbroken(tmp_path / "run", 5, 15, 16)
    runs.spoil(checkpoints / "10")
    before = runs.snapshot(checkpoints)
    line = one_line(runs.run(tmp_path / "run"))
    assert f"no checkpoint in {checkpoints} can be used (10: " in line
    assert runs.snapshot(checkpoints) == before and not (tmp_path / "run" / UNREADABLE).exists()


def test_a_damaged_checkpoint_of_a_finished_run_is_named(wanted, tmp_path) -> None:
    """Where parameters are taken from it; an older one can be asked for."""
    checkpoints = copy_of_unbroken(tmp_path / "run")
    runs.spoil(checkpoints / "16")
    place = {name: wanted.step.sharding for name in wanted.params}
    with pytest.raises(UserError, match=rf"the checkpoint {checkpoints}/16 cannot be used \(.*\): move it away, then run the"):
        checkpoint_files.parameters(checkpoint_files.find(tmp_path / "run"), wanted.params, place)
    older = checkpoint_files.parameters(checkpoint_files.find(tmp_path / "run", 15), wanted.params, place)
    saved = runs.arrays(tmp_path / "run", 15)
    assert all(np.asarray(value).tobytes() == saved[f"params.{name}"].tobytes() for name, value in older.items())


def test_checkpoints_of_an_older_niso_have_no_checksums(wanted, tmp_path) -> None:
    """They are read as they are; those that have lost theirs are not."""
    step = copy_of_unbroken(tmp_path / "run") / "16"
    expected = numbers(checkpoint_files.state(step, wanted))
    meta = json.loads((step / "meta/metadata").read_text())
    (step / "meta/metadata").write_text(json.dumps({key: meta[key] for key in ("config", "niso")}))
    assert numbers(checkpoint_files.state(step, wanted)) == expected
    for lost in ("arrays", "checksum"):
        (step / "meta/metadata").write_text(json.dumps({key: meta[key] for key in meta if key != lost}))
        with pytest.raises(DamagedError):
            checkpoint_files.state(step, wanted)


def test_a_run_that_is_refused_leaves_no_empty_folders(tmp_path) -> None:
    made, given = tmp_path / "made", tmp_path / "given"
    given.mkdir()
    for workdir, failed in ((made, True), (given, True), (tmp_path / "kept", False)):
        Checkpoints(str(workdir), 1).close(failed)
    kept = Checkpoints(str(made), 1)
    (made / "config.json").write_text("{}")
    kept.close(failed=True)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "given", "kept", "kept/checkpoints", "made", "made/config.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path) -> None:
    """First for the files of a checkpoint, which are written beside the training, then for metrics and events; with room again
    the same command ends the run."""
    small: dict[str, Any] = {"log__figures_every": 0}  # an event file without figures is smaller than a checkpoint's files
    line = one_line(runs.run(tmp_path, hooks=["full=9:16000"], **small))
    assert f"cannot write a checkpoint in {tmp_path}/checkpoints: " in line
    assert "the newest checkpoint is step 5: free disk space and run the same command again to go on from there" in line
    line = one_line(runs.run(tmp_path, hooks=["full=7:900"], **small))
    assert "File too large. Free space or choose another workdir, then resume." in line and f"{tmp_path}/" in line
    assert runs.steps(tmp_path) == [5]
    ended = runs.run(tmp_path, **small)
    assert (ended.code, ended.err) == (0, "") and "resuming at step 5" in ended.out
    assert_as_unbroken(tmp_path, runs.unbroken())


# Two processes with two devices each, which hold two arrays together: one saves, damages and restores with the other.
TOGETHER = """
import pathlib, sys
from niso import distributed
workdir, address, me = sys.argv[1:]
from absl import logging
logging.set_verbosity(logging.FATAL)  # as niso.main does
with distributed.join(address, 2, int(me), True):
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from niso import checkpoint_files
    from niso.checkpoint import Checkpoints
    from niso.step import TrainState
    from tests import runs

    mesh = Mesh(np.array(jax.devices()), ("data",))
    def array(values, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(values.shape, place, lambda index: values[index])
    def state(step):
        params = {"divided": array(np.arange(4000.0, dtype=np.float32) + step, "data"), "whole": array(np.ones(5, np.float32))}
        return TrainState(array(np.int32(step)), params, {}, {}, {})
    checkpoints = Checkpoints(workdir, 9)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"a": (1, 2)})
    checkpoints.close()
    if me == "0":
        runs.spoil(pathlib.Path(workdir) / "checkpoints/3")
    multihost_utils.sync_global_devices("damaged")
    checkpoints = Checkpoints(workdir, 9)
    assert checkpoints.latest() == 3
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
    here = jax.process_index()
    def read(path):  # another one that only the second process cannot read
        checkpoint_files._together(path, lambda: 1 // (path.name != "2" or here == 0))
        return checkpoint_files.state(path, wanted)
    found = checkpoints._first_sound(read)
    assert checkpoints.latest() == 1 == int(found.step)
    ours, expected = (one.params["divided"].addressable_shards for one in (found, state(1)))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, expected))
    checkpoints.save(2, state(2), {"a": (1, 2)})
    checkpoints.close()
"""


def test_two_processes_agree_on_what_is_damaged(tmp_path) -> None:
    """Also where only one of them cannot read it; both go on from the same step, and can save again what is moved aside."""
    address = f"127.0.0.1:{free_port()}"
    two = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path), address, str(i)], cwd=runs.REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        )
        for i in range(2)
    ]  # fmt: skip
    first, second = [runs.end(process) for process in two]
    assert (first.code, second.code, second.err) == (0, 0, ""), (first, second)
    third, other = first.err.splitlines()
    assert third.startswith("niso: checkpoint 3 cannot be used (") and "going on from 1" in third
    assert other.startswith("niso: checkpoint 2 cannot be used (ZeroDivisionError: ") and "going on from 1" in other
    assert runs.steps(tmp_path) == [1, 2] and sorted(path.name for path in (tmp_path / UNREADABLE).iterdir()) == ["2", "3"]


@pytest.mark.parametrize("failed", [False, True])
def test_only_a_run_that_fails_does_not_wait_for_a_checkpoint_that_waits_for_others(failed, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checkpoint, "LONGEST", 0.1)
    monkeypatch.setattr(checkpoint, "jax", SimpleNamespace(process_count=lambda: 2))
    checkpoints, others = Checkpoints(str(tmp_path), keep=1), threading.Event()
    close = checkpoints.manager.close
    monkeypatch.setattr(checkpoints.manager, "close", lambda: (others.wait(20), close()))
    closing = threading.Thread(target=checkpoints.close, args=(failed,))
    closing.start()
    closing.join(2)
    assert closing.is_alive() is not failed
    others.set()
    closing.join(20)
    assert not closing.is_alive()
