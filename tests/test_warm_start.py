"""Parameters taken from a finished run arrive bit for bit, and frozen ones stay as they are."""

import pathlib
from typing import Any

import numpy as np
import pytest

from niso import warm_start
from niso.errors import UserError
from tests import runs

UPDATES = 6


@pytest.mark.slow
def test_frozen_parameters_stay_and_never_reach_the_optimizer(tmp_path) -> None:
    """With weight decay on, in a run of its own: encoder and operator of a finished run, a new decoder."""
    source = runs.arrays(runs.unbroken(), runs.STEPS)
    taken = f"(('(encoder|operator)/.*', '{runs.unbroken()}'),)"
    ended = runs.run(
        tmp_path, task__trainable="decoder/.*", task__warm_start=taken, steps=UPDATES, checkpoint__every=1,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    first, last = runs.arrays(tmp_path, 1), runs.arrays(tmp_path, UPDATES)
    names = [name.removeprefix("params.") for name in source if name.startswith("params.")]
    for name in names:
        if name.startswith("decoder/"):
            assert f"frozen.{name}" not in last
            assert not np.array_equal(first[f"params.{name}"], last[f"params.{name}"]), name
        else:
            assert f"params.{name}" not in last
            for state in (first, last):
                assert state[f"frozen.{name}"].tobytes() == source[f"params.{name}"].tobytes(), name
    moments = {key.partition(".nu.")[2] for key in last if ".nu." in key}
    assert moments == {name for name in names if name.startswith("decoder/")}


@pytest.mark.parametrize(
    "mesh,made_on", [((4, 2), 1), *(pytest.param(mesh, 8, marks=pytest.mark.slow) for mesh in ((1, 1), (4, 2)))]
)
def test_parameters_arrive_bit_for_bit_on_any_mesh(mesh: tuple[int, int], made_on: int) -> None:
    """Two parts of a model from two runs, one of which may have been made on eight devices."""
    spec = (("operator/.*", str(runs.unbroken())), ("encoder/stem/.*", str(runs.unbroken(made_on))))
    taken = warm_start.take(spec, runs.program(*mesh))
    sources = {"operator": runs.arrays(runs.unbroken(), runs.STEPS), "encoder": runs.arrays(runs.unbroken(made_on), runs.STEPS)}
    assert sorted(taken) == ["encoder/stem/bias", "encoder/stem/kernel", "operator/basis", "operator/eigenvalue", "operator/mass"]
    for name, value in taken.items():
        assert np.asarray(value).tobytes() == sources[name.split("/")[0]][f"params.{name}"].tobytes(), name
    assert len(taken["operator/basis"].sharding.device_set) == mesh[0] * mesh[1]


def refusal(spec: tuple, tmp_path: pathlib.Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        warm_start.take(spec, runs.program(1, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_are_one_clear_line(tmp_path) -> None:
    run = str(runs.unbroken())
    assert f"no checkpoint in {tmp_path}/none/checkpoints" in refusal(((".*", f"{tmp_path}/none"),), tmp_path)
    assert "'head/.*' matches no parameter of this model" in refusal((("head/.*", run),), tmp_path)
    other_rank = refusal((("operator/.*", run),), tmp_path, task__rank=4)
    assert "operator/basis is (64, 8) there and (64, 4) here" in other_rank
    deeper = refusal((("encoder/.*", run),), tmp_path, task__blocks=2)
    assert "encoder/levels/0/blocks/1/conv1/" in deeper and "is absent there" in deeper
    meaning = refusal((("encoder/.*", run),), tmp_path, task__group="SO")
    assert "was trained with task.group=O, here it is SO; set --config.task.group=O" in meaning
