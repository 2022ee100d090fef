"""The table of shardings: a snapshot of every config's, its errors, and what the compiler makes of it."""

import importlib
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import configs
from niso import cost, sharding
from niso.config import Experiment
from niso.errors import UserError
from niso.geometry.polar import polar_factor
from niso.sharding import MeshShape
from niso.step import Program
from tests import tiny
from tests.conftest import mesh_of
from tests.test_polar import matrices

CONFIGS = sorted(path.stem for path in Path(configs.__path__[0]).glob("*.py") if path.stem != "__init__")
COLLECTIVES = r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\("


def table(p: Program) -> str:
    """One line per array of state and batch: path, shape, axes."""
    shapes = {"state": p.state_shapes, "batch": p.batch_shapes}
    places = {"state": p.state_sharding, "batch": p.batch_sharding}
    leaves = zip(jax.tree_util.tree_flatten_with_path(shapes)[0], jax.tree.leaves(places), strict=True)
    rows = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf, place) for (path, leaf), place in leaves]
    return "".join(f"{name}  {tuple(leaf.shape)}  {tuple(place.spec)}\n" for name, leaf, place in rows)


def snapshot(name: str) -> str:
    """A config's `paper` on data 4 x space 2 with ZeRO: what lives where, as text."""
    config = importlib.import_module(f"configs.{name}").get_config("paper")
    config.mesh.zero = True
    config.batch += -config.batch % 4  # published batches of one cannot be split
    e = Experiment.from_config(config)
    return table(Program(e, mesh_of(4, 2), tiny.shapes(e)))


@pytest.mark.parametrize("name", CONFIGS)
def test_snapshot(name: str) -> None:
    file = Path(__file__).with_name(f"shardings_{name}.txt")
    made_by = f"python -m tests.test_sharding {name} > tests/{file.name}"
    assert file.is_file(), f"write it: {made_by}"
    assert snapshot(name) == file.read_text(), f"shardings moved; if that was meant, write them anew: {made_by}"


def test_every_parameter_has_a_rule_and_every_rule_a_parameter() -> None:
    mesh, params = mesh_of(4, 2), {"a/w": jnp.zeros((8, 3)), "b/w": jnp.zeros(4)}
    placed = sharding.parameter_sharding(mesh, (("a/.*", ("space", None)), (".*", ())), params)
    assert placed["a/w"].spec == PartitionSpec("space", None) and placed["b/w"].spec == PartitionSpec()
    with pytest.raises(UserError, match="no rule for b/w"):
        sharding.parameter_sharding(mesh, (("a/.*", ()),), params)
    with pytest.raises(UserError, match="no parameter for c"):
        sharding.parameter_sharding(mesh, ((".*", ()), ("c", ())), params)
    with pytest.raises(UserError, match=r"a/w is 8 x 3, and mesh.data=3 does not divide its 8"):
        sharding.parameter_sharding(mesh_of(3), ((".*", ("data",)),), params)


def test_axes_are_read_off_names() -> None:
    placed = sharding.batch_sharding(mesh_of(4, 2), ["frames_BxTxHxWxC", "weight_B"])  # type: ignore[arg-type]
    assert placed["frames_BxTxHxWxC"].spec == PartitionSpec("data", None, "space", None, None)
    assert placed["weight_B"].spec == PartitionSpec("data")


def test_mesh_and_batch_must_fit() -> None:
    assert dict(sharding.make_mesh(MeshShape(-1, 2, False)).shape) == {"data": 4, "space": 2}
    for data, space in ((3, 2), (-1, 3), (16, 1)):
        with pytest.raises(UserError, match="does not cover the 8 device"):
            sharding.make_mesh(MeshShape(data, space, False))
    with pytest.raises(UserError, match="multiple of 8"):
        sharding.check_batch(mesh_of(4), 12, 2)


@pytest.mark.parametrize("batch,method", [(8, "auto"), (4, "auto"), (3, "auto"), (3, "matmul"), (9, "auto"), (12, "auto")])
def test_sharded_solve_is_the_solve(batch: int, method: str) -> None:
    mesh = mesh_of(4, 2)
    split = partial(sharding.sharded(polar_factor, mesh), method=method)
    x = jnp.asarray(matrices("white", 6, batch))
    cotangent = jax.random.normal(jax.random.key(0), x.shape)
    np.testing.assert_allclose(jax.jit(partial(split, special=True))(x), polar_factor(x, special=True), atol=1e-5)
    gradients = [jax.jit(jax.grad(lambda y, f=f: jnp.vdot(f(y), cotangent)))(x) for f in (split, polar_factor)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "matmul"])
def test_a_sharded_solve_and_its_gradient_gather_at_most_its_own_matrices(method: str) -> None:
    """Its matrices lie where they are solved. (CPU compilers gather nothing in any case; tests/test_pod.py asks the TPU's.)

    Over `space` its own matrices are put together again, 16 for each of four parts of `data`, and nothing else.
    """
    assert not re.findall(COLLECTIVES, solve_for(mesh_of(8), method).compile().as_text())
    divided = [line for line in solve_for(mesh_of(4, 2), method).compile().as_text().splitlines() if re.search(COLLECTIVES, line)]
    assert divided and all(re.search(r" = f32\[(1,)?4,16,16]\S* all-gather\(", line) for line in divided), divided


def test_fewer_matrices_than_devices_stay_within_their_part_of_data() -> None:
    """One matrix for each of four pairs of devices: no exchange spans more than a pair."""
    text = solve_for(mesh_of(4, 2), "matmul", count=4).compile().as_text()
    exchanges = cost.collectives(text, mesh_of(4, 2))
    assert {exchange.axes for exchange in exchanges} == {"space"}, exchanges


def test_the_basis_is_orthonormalised_on_sharded_rows() -> None:
    """Rows of the eigenfunctions over `space`: only K x K Gram matrices are summed, nothing of N rows is gathered."""
    lowered = basis_for(mesh_of(1, 8))
    found = re.findall(COLLECTIVES, lowered.compile().as_text())
    assert set(found) == {"all-reduce"}


def solve_for(mesh: Mesh, method: str, count: int | None = None, special: bool = False) -> jax.stages.Lowered:
    """The solve of 16 x 16 matrices with its gradient, lowered for a mesh: two to a device, or `count` where examples lie."""
    split = partial(sharding.sharded(polar_factor, mesh), method=method, special=special)
    place = NamedSharding(mesh, PartitionSpec(sharding.AXES if count is None else "data"))
    solve = jax.jit(jax.grad(lambda x: jnp.sum(split(x) ** 3)), in_shardings=place, out_shardings=place)
    return solve.lower(jax.ShapeDtypeStruct((count or 2 * mesh.size, 16, 16), jnp.float32))


def basis_for(mesh: Mesh) -> jax.stages.Lowered:
    """256 x 16 eigenfunctions from free ones by the Gram matrix, with the gradient, lowered for a mesh with rows over `space`."""
    place = NamedSharding(mesh, PartitionSpec("space", None))
    solve = jax.grad(lambda u: jnp.sum(polar_factor(u, method="matmul") ** 3))
    return jax.jit(solve, in_shardings=place, out_shardings=place).lower(jax.ShapeDtypeStruct((256, 16), jnp.float32))


def test_a_step_on_data_alone_gathers_nothing() -> None:
    """Only reductions (gradients, metrics) cross devices on a pure data mesh. (CPU: TPU compilers gather more readily.)"""
    p = tiny.program(8)
    lowered = p.train.lower(p.state_shapes, p.batch_shapes)
    text = lowered.compile().as_text()
    found = set(re.findall(r"= \S+ (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", text))
    assert found == {"all-reduce"}


def test_state_is_born_sharded() -> None:
    p = tiny.program(2, 4, mesh__zero=True)
    state = p.init({})
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(p.state_sharding), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    basis = state.params["operator/basis"]
    assert {s.data.shape for s in basis.addressable_shards} == {(basis.shape[0] // 4, basis.shape[1])}


if __name__ == "__main__":
    print(snapshot(sys.argv[1]), end="")
