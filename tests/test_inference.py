"""A run opened again: what its encoder, its solve and its head say there, for any number of frames, on any mesh."""

import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import niso
from configs import pose_pred
from niso import config, inference, tree
from niso.checkpoint import Checkpoints
from niso.errors import UserError
from niso.geometry import camera
from niso.inference import Model
from niso.step import Program, TrainState
from tests import runs, tiny
from tests.conftest import mesh_of

CHUNK = 4
SMALL = {"data.size": 16, "task.widths": (4, 8), "task.latent_channels": 8, "task.rank": 6, "task.head_width": 8, "task.layers": 2}


@functools.cache
def pose_program(data: int = 1, space: int = 1) -> Program:
    """A run of pose_pred, as small as it gets; compiled once per session."""
    small = pose_pred.get_config("quick")
    small.update_from_flattened_dict(SMALL | {"task.warm_start": (), "batch": 4, "optimizer.warmup": 1})
    experiment = config.Experiment.from_config(small)
    return Program(experiment, mesh_of(data, space), tiny.shapes(experiment))


def stirred(state: TrainState) -> TrainState:
    """Parameters moved at random, so that the head, which begins at the identity, says something."""
    random = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype(leaf.dtype), (state.params, state.frozen))
    return TrainState(state.step, *moved, state.opt_state, state.window)


def save(workdir: pathlib.Path, program: Program, *states: TrainState) -> None:
    checkpoints = Checkpoints(str(workdir), keep=9)
    for step, state in enumerate(states):
        checkpoints.save(step, state, program.experiment.resolved)
    checkpoints.close()


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[pathlib.Path, Program, TrainState]:
    """A folder with checkpoints of step 0, as initialised, and 1; and what was saved last."""
    workdir, program = tmp_path_factory.mktemp("run"), pose_program()
    state = program.init({})
    save(workdir, program, state, stirred(state))
    return workdir, program, stirred(state)


@pytest.fixture(scope="module")
def model(saved) -> Model:
    program, state = saved[1:]
    return Model(program.task, program.graphdef, state.params | state.frozen, chunk=CHUNK)


def test_a_run_is_opened_with_its_parameters_and_nothing_else(saved) -> None:
    workdir, program, state = saved
    for step, wanted in ((None, state), (1, state), (0, program.init({}))):
        opened = niso.load(workdir, step)
        assert opened.task == program.task and (opened.size, opened.channels) == (16, 3)
        params = opened._params
        assert sorted(params) == sorted(wanted.params | wanted.frozen)
        assert all(np.array_equal(params[name], leaf) for name, leaf in (wanted.params | wanted.frozen).items())
        assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in params.values())


@pytest.fixture(scope="module")
def on_eight() -> tuple[Program, TrainState]:
    program = pose_program(4, 2)
    return program, program.init({})


def test_a_run_on_eight_devices_is_opened_on_one(on_eight, tmp_path) -> None:
    program, state = on_eight
    save(tmp_path, program, state)
    opened = niso.load(str(tmp_path))
    for name, leaf in (state.params | state.frozen).items():
        assert len(opened._params[name].devices()) == 1
        np.testing.assert_array_equal(opened._params[name], leaf, err_msg=name)


@pytest.fixture(scope="module")
def answers(saved) -> list[np.ndarray]:
    """What the task itself says of five frames: coefficients, isometries to the frames in reverse order, relative poses."""
    _, program, state = saved
    task = program.task

    @jax.jit
    def answer(params: tree.Params, image_BxHxWxC: jax.Array) -> tuple[jax.Array, ...]:
        network = tree.merge(program.graphdef, params)
        maps = network.operator.maps()
        coefficient_BxKxC = task.encode(network, maps, image_BxHxWxC)
        tau_BxKxK = task.isometry(maps, coefficient_BxKxC, coefficient_BxKxC[::-1])
        return coefficient_BxKxC, tau_BxKxK, task.relative_pose(network, tau_BxKxK)

    return [np.asarray(array) for array in answer(state.params | state.frozen, frames(5))]


@pytest.mark.parametrize("count", [0, 1, CHUNK, CHUNK + 1])
def test_the_answers_are_the_tasks_for_any_number_of_frames(answers, model, count: int) -> None:
    want_BxKxC, want_BxKxK, want_Bx4x4 = answers
    coefficient_BxKxC = model.encode(frames(5)[:count])
    tau_BxKxK = model.isometry(want_BxKxC[:count], want_BxKxC[::-1][:count])
    pose_Bx4x4 = model.relative_pose(want_BxKxC[:count], want_BxKxC[::-1][:count])
    shapes = (count, 6, 8), (count, 6, 6), (count, 4, 4)
    assert tuple(array.shape for array in (coefficient_BxKxC, tau_BxKxK, pose_Bx4x4)) == shapes
    assert {array.dtype for array in (coefficient_BxKxC, tau_BxKxK, pose_Bx4x4)} == {np.dtype(np.float32)}
    # float32, in batches of another size
    np.testing.assert_allclose(coefficient_BxKxC, want_BxKxC[:count], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tau_BxKxK, want_BxKxK[:count], atol=1e-4)
    np.testing.assert_allclose(pose_Bx4x4, want_Bx4x4[:count], atol=1e-4)
    np.testing.assert_allclose(model.pose_of(tau_BxKxK), pose_Bx4x4, atol=1e-5)
    assert np.ptp(want_Bx4x4[:, :3], axis=0).max() > 1e-2


def test_few_rows_go_to_the_devices_in_few_sizes(on_eight, model) -> None:
    def sizes(model: Model, count: int) -> list[int]:
        return [len(part["image_BxHxWxC"]) for part in model._chunks({"image_BxHxWxC": frames(count)})]

    program, state = on_eight
    meshed = Model(program.task, program.graphdef, state.params | state.frozen, program.mesh, chunk=12)
    assert [sizes(model, count) for count in (0, 1, 2, 3, 5, 11)] == [[], [1], [2], [4], [4, 1], [4, 4, 4]]
    assert [sizes(meshed, count) for count in (1, 5, 9, 13)] == [[4], [8], [12], [12, 4]]


def test_uint8_and_floats_are_the_same_frames(model) -> None:
    images = frames(3)
    want_BxKxC = model.encode(images)
    for kind in (np.float32, np.float64):
        np.testing.assert_allclose(model.encode(images.astype(kind) / 127.5 - 1), want_BxKxC, rtol=1e-4, atol=1e-4)


def test_relative_poses_are_those_of_the_pairs_at_each_stride(model) -> None:
    coefficient_TxKxC = model.encode(frames(9))
    found = model.relative_poses(coefficient_TxKxC, [1, 4, 8, 10])
    assert {stride: len(relative) for stride, relative in found.items()} == {1: 8, 4: 2, 8: 1, 10: 0}
    for stride, relative in found.items():
        chosen = coefficient_TxKxC[::stride]
        np.testing.assert_allclose(relative, model.relative_pose(chosen[:-1], chosen[1:]), atol=1e-5)
    assert model.relative_poses(coefficient_TxKxC, []) == {}
    with pytest.raises(UserError, match="a stride is 0"):
        model.relative_poses(coefficient_TxKxC, [1, 0])


def test_relative_poses_are_rigid(model) -> None:
    coefficient_TxKxC = model.encode(frames(5))
    pose_Px4x4 = model.relative_pose(coefficient_TxKxC[:-1], coefficient_TxKxC[1:])
    unit_Px4x4 = np.broadcast_to(np.eye(4), pose_Px4x4.shape)
    np.testing.assert_allclose(camera.inverse_pose(pose_Px4x4) @ pose_Px4x4, unit_Px4x4, atol=1e-5)


def test_a_mesh_changes_nothing_and_other_parameters_compile_nothing(on_eight, model) -> None:
    program, state = on_eight
    other = stirred(state)
    meshed = Model(program.task, program.graphdef, state.params | state.frozen, program.mesh, chunk=CHUNK)
    first = meshed.encode(frames(5))
    sizes = [function._cache_size() for function in meshed._functions[:2]]
    meshed = meshed.with_params(other.params | other.frozen)
    coefficient_TxKxC = meshed.encode(frames(5))
    assert [function._cache_size() for function in meshed._functions[:2]] == sizes == [1, 1]
    assert not np.allclose(first, coefficient_TxKxC)
    np.testing.assert_allclose(coefficient_TxKxC, model.encode(frames(5)), rtol=1e-3, atol=1e-3)
    want = model.relative_poses(coefficient_TxKxC, [1])[1]
    np.testing.assert_allclose(meshed.relative_poses(coefficient_TxKxC, [1])[1], want, atol=1e-3)
    with pytest.raises(UserError, match="chunk=6: choose a positive multiple of 4"):
        Model(program.task, program.graphdef, {}, program.mesh, chunk=6)


def test_a_run_without_operator_and_pose_head(tmp_path) -> None:
    """Its coefficients are the latents, channels first."""
    program = tiny.program(task__operator=False)
    save(tmp_path, program, program.init({}))
    model = niso.load(tmp_path)
    coefficient_BxKxC = model.encode(frames(2))
    assert coefficient_BxKxC.shape == (2, 8, 64)
    tau_BxKxK = model.isometry(coefficient_BxKxC, coefficient_BxKxC)
    np.testing.assert_allclose(tau_BxKxK, np.broadcast_to(np.eye(8), tau_BxKxK.shape), atol=1e-3)
    with pytest.raises(UserError, match=r"task autoencode\) has no pose head: run niso.main --config=configs/pose_pred.py first"):
        model.relative_pose(coefficient_BxKxC, coefficient_BxKxC)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_are_one_clear_line(model, saved, tmp_path) -> None:
    shape = "frames have the shape (2, 16, 8, 3), this run's are (any number, 16, 16, 3)"
    assert refusal(model.encode, np.zeros((2, 16, 8, 3), np.uint8)) == shape
    assert "shape (16, 16, 3)" in refusal(model.encode, np.zeros((16, 16, 3), np.uint8))
    assert "frames are int64, expected uint8" in refusal(model.encode, np.zeros((1, 16, 16, 3), np.int64))
    assert "floats from 0 to 255, expected [-1, 1]" in refusal(model.encode, frames(9).astype(float))
    assert "floats from nan to nan" in refusal(model.encode, np.full((1, 16, 16, 3), np.nan))
    a_BxKxC = np.zeros((2, 6, 8), np.float32)
    assert "coefficients have the shape (2, 8, 6), this run's are (any number, 6, 8)" in refusal(
        model.isometry, a_BxKxC, a_BxKxC.transpose(0, 2, 1)
    )
    assert "coefficients of 2 first and 1 second frames" in refusal(model.isometry, a_BxKxC, a_BxKxC[:1])
    assert "maps have the shape (2, 6, 8), this run's are (any number, 6, 6)" in refusal(model.pose_of, a_BxKxC)
    assert f"no run in {tmp_path}/none: there is no such folder" in refusal(inference.load, f"{tmp_path}/none")
    assert f"no checkpoint in {tmp_path}/checkpoints; train that run first" in refusal(inference.load, tmp_path)
    assert "no checkpoint of step 7 in" in refusal(inference.load, saved[0], 7)
    assert refusal(inference.load, saved[0], 7).endswith("; there are 0, 1")


def test_a_run_of_another_version_and_a_damaged_one_are_refused(saved, tmp_path) -> None:
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    (meta,) = (path for path in (tmp_path / "checkpoints" / "1" / "meta").iterdir() if path.name == "metadata")
    found = json.loads(meta.read_text())
    text = json.dumps({"config": found["config"]})  # as older ones have it: without checksums, which tell a meta that is changed
    meta.write_text(text.replace('"ridge"', '"rigde"'))
    assert "/checkpoints/1 is of another version of niso: task.rigde: nothing reads this key" in refusal(inference.load, tmp_path)
    meta.write_text(text.replace('"rank": 6', '"rank": 5'))
    assert "/checkpoints/1 does not fit this model: head/layers/0/kernel is (36, 8) there" in refusal(inference.load, tmp_path)
    for rest in ("{", "{}"):
        meta.write_text(rest)
        assert "/checkpoints/1 cannot be used (" in refusal(inference.load, tmp_path)


def test_importing_niso_is_cheap_until_a_run_is_opened() -> None:
    program = "import sys, niso; assert not {'jax', 'numpy', 'niso.inference'} & set(sys.modules); print(niso.load.__module__)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=runs.REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("niso.inference\n", "")
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        niso.lode  # noqa: B018
