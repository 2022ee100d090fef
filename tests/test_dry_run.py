"""What a program costs, read off it: against programs whose cost is known, and the report of a run that is not made."""

import importlib.util
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from niso import cost, dry_run, hardware, main, scaling
from niso.cost import Collective
from niso.errors import UserError
from niso.scaling import Work
from tests import tiny
from tests.conftest import mesh_of
from tests.test_bad_input import REPOSITORY, forget_flags

A, B = jnp.zeros((3, 5)), jnp.zeros((5, 7))
PRODUCT = 2 * 3 * 5 * 7
IMAGE, KERNEL = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
CONVOLUTION = 2 * (2 * 8 * 8 * 4) * (3 * 3 * 3)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def repeated(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.scan(lambda carry, _: (carry + a @ b, None), jnp.zeros((3, 7)), length=10)[0]


def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) + jnp.ones((3, 2)) @ jnp.ones((2, 7)))


@jax.custom_vjp
def ruled(a: jax.Array, b: jax.Array) -> jax.Array:
    return a @ b


ruled.defvjp(lambda a, b: (a @ b, (a, b)), lambda factors, g: (g @ factors[1].T, factors[0].T @ g))


@pytest.mark.parametrize(
    "function,arguments,expected",
    [
        (jnp.matmul, (A, B), PRODUCT),
        (jnp.matmul, (jnp.zeros((4, 3, 5)), jnp.zeros((4, 5, 7))), 4 * PRODUCT),
        (convolve, (IMAGE, KERNEL), CONVOLUTION),
        (repeated, (A, B), 10 * PRODUCT),
        (chosen, (A, B), PRODUCT + 2 * 3 * 2 * 7),
        (ruled, (A, B), PRODUCT),
        (jax.grad(lambda a, b: jnp.sum(ruled(a, b) ** 2), argnums=(0, 1)), (A, B), 3 * PRODUCT),
        (jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=1), (IMAGE, KERNEL), 2 * CONVOLUTION),
    ],
)
def test_operations(function: Callable, arguments: tuple, expected: int) -> None:
    assert cost.operations(jax.jit(function).trace(*arguments)) == cost.Operations(expected, 0)


@pytest.mark.parametrize("platform,expected", [("cpu", 0), ("tpu", PRODUCT), ("gpu", PRODUCT), ("", PRODUCT)])
def test_operations_are_those_of_the_platform(platform: str, expected: int) -> None:
    def elsewhere(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.platform_dependent(a, b, cpu=lambda a, b: jnp.zeros((3, 7)), default=jnp.matmul)

    assert cost.operations(jax.jit(elsewhere).trace(A, B), platform).total == expected


def test_operations_in_full_float32_are_known_and_those_of_every_device_count() -> None:
    full = jax.jit(partial(jnp.matmul, precision="highest")).trace(A, B)
    assert cost.operations(full) == cost.Operations(PRODUCT, PRODUCT)
    spec = PartitionSpec("data")
    each = jax.shard_map(lambda x: jnp.matmul(x, x), mesh=mesh_of(4), in_specs=spec, out_specs=spec)
    assert cost.operations(jax.jit(each).trace(jnp.zeros((4, 5, 5)))).total == 4 * 2 * 5**3


def exchanging(x: jax.Array) -> jax.Array:
    """x is 8 x 6 float32 on one device."""
    rows = lax.all_gather(x, "space", axis=0, tiled=True)
    x = x + lax.psum(rows, "data")[:8]

    def move(_: int, x: jax.Array) -> jax.Array:
        return lax.ppermute(x, "space", [(0, 1), (1, 0)]) * 1.5

    return lax.psum(lax.fori_loop(0, 3, move, x), ("data", "space"))


def test_collectives_of_a_program() -> None:
    mesh = mesh_of(4, 2)
    program = jax.shard_map(exchanging, mesh=mesh, in_specs=PartitionSpec("data", "space"), out_specs=PartitionSpec())
    found = cost.collectives(jax.jit(program).lower(jnp.zeros((32, 12))).compile().as_text(), mesh)
    assert {(c.kind, c.axes): (c.count, c.bytes) for c in found} == {
        ("all-gather", "space"): (1, 4 * 16 * 6),
        ("all-reduce", "data"): (1, 4 * 16 * 6),
        ("all-reduce", "data+space"): (1, 4 * 8 * 6),
        ("collective-permute", "space"): (3, 3 * 4 * 8 * 6),
    }


TPU = """HloModule jit__train, is_scheduled=true

%add.clone (x: f32[], y: f32[]) -> f32[] {
  ROOT %add = f32[] add(%x, %y)
}

%fused (p: bf16[4,8]) -> bf16[8,8] {
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, replica_groups=[4,2]<=[8], dimensions={0}
}

%fused.2 (p: bf16[2,8]) -> bf16[4,8] {
  ROOT %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], CARRIED
}

%fused.3 (p: bf16[2,8]) -> bf16[4,8] {
  ROOT %all-gather.3 = bf16[4,8]{1,0:S(1)} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], CARRIED
}

%fused.4 (p: bf16[2,8]) -> bf16[4,8] {
  ROOT %all-gather.4 = bf16[4,8]{1,0} all-gather(%p), channel_id=8, replica_groups=[4,2]<=[8], CARRIED
}

ENTRY %main.9_spmd (p0: f32[3,5], p1: bf16[4,8]) -> f32[3,5] {
  %both = (f32[3,5]{1,0:T(4,128)S(1)}, f32[]{:T(128)}) all-reduce(%p0, %c), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add.clone
  %f = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%p1), kind=kCustom, calls=%fused
  %begun = bf16[4,8]{1,0} fusion(%p2), kind=kCustom, calls=%fused.2
  %carried_on = bf16[4,8]{1,0:S(1)} fusion(%begun), kind=kCustom, calls=%fused.3
  %another = bf16[4,8]{1,0} fusion(%p2), kind=kCustom, calls=%fused.4
  %go = (f32[1,5]{1,0}, f32[1,5]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{2,3}}
  %done = f32[1,5]{1,0} collective-permute-done(%go)
  %named = f32[7]{0} all-reduce(%y), replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}, to_apply=%add.clone
  %turned = f32[11]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}
  %listed = f32[12]{0} all-reduce(%y), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([8]) {'axis_0'}
  %part = f32[9]{0} all-gather(%y), replica_groups=mesh['a'=8,'b'=1] {'a':(4)2}, dimensions={0}
  %odd = f32[2]{0} all-reduce(%y), channel_id=5, replica_groups={{0,3},{1,2,4}}, to_apply=%add.clone
  ROOT %all = f32[3,5]{1,0} all-reduce(%p0), channel_id=3, replica_groups={}, to_apply=%add.clone
}
""".replace("CARRIED", 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}')


def test_collectives_as_tpu_compilers_write_them() -> None:
    assert cost.collectives(TPU, mesh_of(4, 2)) == [
        Collective("all-gather", "space", 4, 128 + 36 + 2 * 64, 128, "bf16[8,8]"),
        Collective("all-reduce", "?", 1, 8, 8, "f32[2]"),
        Collective("all-reduce", "data", 3, 64 + 28 + 48, 64, "f32[3,5]"),
        Collective("all-reduce", "data+space", 1, 60, 60, "f32[3,5]"),
        Collective("all-reduce", "space", 1, 44, 44, "f32[11]"),
        Collective("collective-permute", "space", 1, 20, 20, "f32[1,5]"),
    ]


def test_memory() -> None:
    mesh = mesh_of(8)
    place = NamedSharding(mesh, PartitionSpec("data"))
    add = jax.jit(lambda x, y: (x + y, x[:8]), in_shardings=(place, place), out_shardings=place, donate_argnums=0)
    found = cost.memory(add.lower(jnp.zeros((8, 1024)), jnp.zeros((8, 1024))).compile())
    assert found.arguments == 2 * 4096 and 4096 <= found.results < 4096 + 64  # and a table of addresses
    assert found.peak == found.arguments + found.results + found.temporaries


def test_a_dry_run_needs_no_data_and_says_what_there_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    e = tiny.experiment(data__twin="", data__records="nowhere", mesh__space=2, task__widths=(8,), mesh__zero=True)
    texts: list[str] = []
    compiled = cost.compiled

    def keep(traced: jax.stages.Traced) -> jax.stages.Compiled:
        found = compiled(traced)
        texts.append(found.as_text() or "")
        return found

    monkeypatch.setattr(cost, "compiled", keep)
    assert dry_run.run(e, None) == 0
    out = capsys.readouterr().out
    assert "on 8 device(s) (cpu), mesh data 4 x space 2" in out.splitlines()[0]
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert " ".join(rows["operator/basis"][1:]) == "float32[256, 8] space, - 4.10 kB 2 x space, data 2.05 kB"
    assert " ".join(rows["encoder/head/bias"][1:]) == "float32[8] whole 32 B 2 x data 16 B"
    assert rows["frames_BxTxHxWxC"][-2:] == ["1.54", "kB"] and "data, -, space, -, -" in out
    assert re.search(r"memory of each device: arguments .* peak ", out) and "per example" in out
    crossing = cost.collectives(texts[0], mesh_of(4, 2))
    # Rows of images stay where they are: neighbours exchange halos, and only solved maps and the eigenfunctions (for LAPACK, which
    # solves on a CPU) are gathered. A batch of activations would be 8 frames x 16 x 16 x 48 channels.
    assert {c.kind for c in crossing} == {"all-gather", "all-reduce", "collective-permute"}
    assert max(c.largest for c in crossing if c.kind != "all-reduce") <= 4 * 2 * 16 * 48 * 4
    for c in crossing:
        assert [c.kind, c.axes, f"{c.count:,}"] in [line.split()[:3] for line in out.splitlines()], c
    assert "weak scaling" not in out


@pytest.mark.parametrize(
    "text,expected",
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.49G of 15.75G hbm. "
         "Exceeded hbm capacity by 4.74G.\n\nTotal", "20.49GiB where each device has 15.75GiB; raise mesh.space, set task.remat"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore", "to allocate 9 bytes.; raise mesh.space"),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_line(text: str, expected: str) -> None:
    told = str(cost.overflow(text))
    assert expected in told and "\n" not in told
    assert cost.overflow("INTERNAL: something else") is None


def test_without_libtpu_a_topology_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--topology v5e:4x4: .*pip install -e "\.\[tpu\]"'):
        dry_run.run(tiny.experiment(), "v5e:4x4")


CHIP = hardware.Chip("test", 100.0, 50.0, 10.0, 1e3, 20.0, 4.0, 8, 2.0)


def test_the_model_of_weak_scaling() -> None:
    work = Work(operations=200.0, full=50.0, moved=400.0, summed=16.0, exchanged=12.0)
    one = scaling.predict(work, CHIP, "bfloat16", 1)
    assert (one.computing, one.moving, one.summing, one.exchanging) == ((1.5 + 5.0) / 0.5, 20.0, 0.0, 3.0)
    assert one.step == 20.0 + 3.0
    assert scaling.predict(work, CHIP, "float32", 1).computing == (3.0 + 5.0) / 0.5
    eight, far = scaling.predict(work, CHIP, "bfloat16", 8), scaling.predict(work, CHIP, "bfloat16", 32)
    assert eight.summing == 16.0 * 2 * 7 / 8 / 4.0
    assert far.summing == eight.summing + 16.0 / 8 * 2 * 3 / 4 / 2.0
    head, *rows = scaling.table(work, CHIP, "bfloat16", 1024, 4096)
    assert [row[0] for row in rows] == ["1,024", "2,048", "4,096"] and rows[-1][1] == "16,384" and len(head) == len(rows[0])


def test_what_crosses_is_summed_or_exchanged() -> None:
    crossing = [
        Collective("all-reduce", "data", 3, 100, 90, ""),
        Collective("all-reduce", "data+space", 1, 10, 10, ""),
        Collective("collective-permute", "space", 2, 7, 4, ""),
    ]
    assert Work.of((5.0, 6.0), 1.0, crossing) == Work(5.0, 1.0, 6.0, 110, 7)


def test_the_chips_are_those_that_jax_names() -> None:
    chip = hardware.find("TPU v5 lite")
    assert chip is not None and (chip.peak("bfloat16"), chip.peak("float32"), chip.memory) == (197e12, 197e12, 16e9)
    assert hardware.find("cpu") is None
    for one in hardware.CHIPS.values():
        assert one.full < one.float32 <= one.bfloat16 and one.link < one.bandwidth and one.domain > 1


def test_a_topology_without_a_dry_run_is_a_mistake(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    forget_flags()
    assert main.main(["niso", "--config=configs/pose_encode.py:quick", "--topology=v5e:4x4"]) == 2
    assert capsys.readouterr().err == "niso: --topology=v5e:4x4 is for --dry_run: leave it out to train on what is here\n"
