"""Every task on any number of processes and devices is the run on one, to rounding (tests/equality.py)."""

import pathlib

import pytest

from tests import equality
from tests.test_config import NAMES


def assert_equal(task: str, layouts: list[str], folder: pathlib.Path, draws: int) -> None:
    found = dict(zip(layouts, equality.compare(task, layouts, folder, draws), strict=True))
    assert {layout: str(one) for layout, one in found.items() if not one.largest <= 1} == {}
    # The bounds say something: a thousandth of a gradient is beyond that of gradients, and, but for autoencoders, where differences
    # grow too fast by themselves, a single update more of twenty is beyond that of parameters.
    assert all(one.allowed < 1e-3 for one in found.values()), found
    assert "encode" in task or all(one.one_update_more > 1 for one in found.values()), found


def test_every_experiment_is_compared() -> None:
    assert {task.partition(" ")[0] for task in equality.TASKS} == set(NAMES)
    assert {layout.partition("x")[0] for layout in equality.LAYOUTS} == {"1", "2", "4"}
    assert {layout.partition("/")[2] for layout in equality.LAYOUTS} == {"1", "2", "4"}


@pytest.mark.slow
def test_an_example_divided_between_two_devices(tmp_path) -> None:
    assert_equal("toric_laplacian", ["1x2/2"], tmp_path, draws=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", equality.TASKS)
def test_every_layout(task: str, tmp_path) -> None:
    assert_equal(task, list(equality.LAYOUTS), tmp_path, draws=2)
