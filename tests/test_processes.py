"""One device or eight, one process or two, a divided grid or not: the same batches, and the same numbers within rounding."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from tests import runs

COMPARED = 5  # updates
# Learning rates of the first five updates: linear over optimizer.warmup=4, then the peak of 1e-3 (less a little of its decay).
TRAVELLED = 1e-3 * (1 / 4 + 2 / 4 + 3 / 4 + 1 + 1)


def bound(
    state: dict[str, np.ndarray], name: str, step: int = COMPARED, updates: int = COMPARED, travelled: float = TRAVELLED
) -> np.ndarray:
    """How far rounding alone can move each entry of a parameter in some updates of AdamW, the last of which is `step`.

    `travelled` is the sum of their learning rates.

    Sums taken in another order change a gradient by some multiple of 2⁻²⁴ of the largest gradient G anywhere (what is summed
    is of that size, through the network's layers; 38 were measured at most, 256 are allowed). Adam divides by the entry's own
    root mean square r: an update of size lr changes by lr · 256 · 2⁻²⁴ · G / r, and by 2 lr at most, for entries that have no
    gradient but rounding. To this comes the last bit of the parameter itself, in each update.
    """
    rms = {n: np.sqrt(a / (1 - 0.999**step)) for n, a in state.items() if ".nu." in n}
    largest = max(r.max() for r in rms.values())
    own = next(r for n, r in rms.items() if n.endswith(f".nu.{name}"))
    last_bit = updates * 2.0**-23 * np.abs(state[f"params.{name}"])
    return travelled * np.minimum(2, 256 * 2.0**-24 * largest / (own + 1e-8)) + last_bit


def excess(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """How far each entry of each parameter is from the reference's, as a share of its `bound`."""
    names = [name.removeprefix("params.") for name in reference if name.startswith("params.")]
    return {
        name: np.abs(ours[f"params.{name}"].astype(float) - reference[f"params.{name}"]) / bound(reference, name, **options)
        for name in names
    }


def assert_equal_within_rounding(workdir: pathlib.Path) -> None:
    """After five updates, with the run on one device."""
    ours, reference = runs.arrays(workdir, COMPARED), runs.arrays(runs.unbroken(), COMPARED)
    earlier, entries, tight, moved = runs.arrays(runs.unbroken(), 10), 0, 0, 0
    for name, share in excess(ours, reference).items():
        limit, value = bound(reference, name), reference[f"params.{name}"]
        assert share.max() <= 1, (name, share.max())
        entries, tight = entries + limit.size, tight + int(np.sum(limit < TRAVELLED / 1000))
        moved += int(np.sum(np.abs(earlier[f"params.{name}"] - value) > limit))
    # The bound says something: it is a thousandth of the way for most, and five updates more would break it nearly everywhere.
    assert tight > 0.8 * entries and moved > 0.95 * entries, (tight, moved, entries)


def assert_same_metrics(workdir: pathlib.Path, until: int, tolerance: float) -> None:
    ours, reference = ([line for line in runs.lines(path) if line["step"] <= until] for path in (workdir, runs.unbroken()))
    assert [line.keys() for line in ours] == [line.keys() for line in reference]
    for one, other in zip(ours, reference, strict=True):
        assert one == pytest.approx(other, rel=tolerance), one["step"]


def batches(*files: pathlib.Path) -> list[dict[str, int]]:
    """The batches that processes read, put together: no row may have been read twice."""
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len({len(part) for part in parts}) == 1
    for rows in zip(*parts, strict=True):
        assert sum(map(len, rows)) == len(set().union(*rows)) == runs.BATCH
    return [dict(sorted({k: v for part in rows for k, v in part.items()}.items())) for rows in zip(*parts, strict=True)]


def counted(file: pathlib.Path, name: str) -> set[float]:
    """How many examples the means of that name are over."""
    return {count for found, count in map(json.loads, file.read_text().splitlines()) if found == name}


@pytest.mark.slow
def test_eight_devices_accumulating_with_divided_optimizer_state() -> None:
    workdir = runs.unbroken(8)
    assert_equal_within_rounding(workdir)
    assert_same_metrics(workdir, COMPARED, 1e-5)  # 4e-7 measured
    assert_same_metrics(workdir, runs.STEPS, 1e-3)  # differences grow as they are fed back: 3e-5 measured
    assert batches(pathlib.Path(f"{workdir}-rows")) == batches(pathlib.Path(f"{runs.unbroken()}-rows"))


@pytest.mark.slow
def test_grid_divided_by_two(tmp_path) -> None:
    """Four parts of the batch, two of the rows of images and eigenfunctions."""
    ended = runs.run(tmp_path, hooks=["term=5"], devices=8, mesh__data=4, mesh__space=2)
    assert (ended.code, ended.err) == (42, "")
    assert "mesh data 4 x space 2" in ended.out
    assert_equal_within_rounding(tmp_path)
    assert_same_metrics(tmp_path, COMPARED, 1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[pathlib.Path, list[runs.Ended]]:
    """Two processes with two devices each, of which one is told to leave after its sixth update; then one goes on alone."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    hooks = [[f"rows={workdir}-rows-{i}", f"counts={workdir}-counts-{i}"] for i in range(2)]
    ended = runs.run_pair(workdir, (hooks[0], [*hooks[1], "term=6"]))
    return workdir, ended


def test_two_processes_read_what_one_reads(two) -> None:
    workdir, _ = two
    ours = batches(*(pathlib.Path(f"{workdir}-rows-{i}") for i in range(2)))
    assert len(ours) >= 2 + 6  # an evaluation of two batches, six updates
    assert ours == batches(pathlib.Path(f"{runs.unbroken()}-rows"))[: len(ours)]


def test_every_test_pair_counts_once_for_any_number_of_processes(two) -> None:
    for file in (f"{runs.unbroken()}-counts", f"{two[0]}-counts-0", f"{two[0]}-counts-1"):
        assert counted(pathlib.Path(file), "equivariance_error") == {runs.TEST_PAIRS}, file
        assert 4 * runs.BATCH in counted(pathlib.Path(file), "loss"), file


def test_two_processes_compute_what_one_computes(two) -> None:
    assert_equal_within_rounding(two[0])
    assert_same_metrics(two[0], COMPARED, 1e-5)  # 4e-7 measured


def test_two_processes_leave_together_at_one_step_and_only_the_first_writes(two) -> None:
    workdir, (first, second) = two
    assert (first.code, second.code) == (42, 42), (first, second)
    left = runs.steps(workdir)[-1]
    assert 6 <= left < runs.STEPS
    assert f"asked to leave: step {left} is saved" in first.out
    assert "Gloo" not in first.out + first.err + second.err and second.out == ""
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    ended = runs.run(workdir)
    assert (ended.code, ended.err) == (0, "")
    assert f"resuming at step {left}" in ended.out
    assert_same_metrics(workdir, runs.STEPS, 1e-3)  # 1.2e-4 measured, in the norm of the last gradients


@pytest.mark.slow
def test_two_processes_score_the_trajectories_that_one_scores(tmp_path) -> None:
    """pose_pred: whole videos go through the model on all processes, the first writes tables, figures and poses."""
    options: dict[str, Any] = {
        "config": "pose_pred", "task__warm_start": (), "data__views": 3, "task__head_width": 8, "task__strides": (1, 2),
        "task__limit": 6, "steps": 4, "optimizer__warmup": 1,
    }  # fmt: skip
    alone = runs.run(tmp_path / "one", **options)
    pair = runs.run_pair(tmp_path / "two", **options)
    assert (alone.code, [ended.code for ended in pair]) == (0, [0, 0]), (alone.err, pair)
    assert "stride 2: " in pair[0].out and pair[1].out == ""
    last = [runs.lines(tmp_path / name)[-1] for name in ("one", "two")]
    scored = [name for name in last[0] if name.startswith("trajectories/")]
    assert "trajectories/stride_2/ate_ref" in scored and last[0].keys() == last[1].keys()
    for name in scored:
        assert last[1][name] == pytest.approx(last[0][name], rel=1e-3, abs=1e-6), name  # float32 poses of another order of sums
    assert (tmp_path / "two/figures/step_00000004/trajectories.npz").is_file()


@pytest.mark.parametrize("flags", [["--processes=2"], ["--processes=2", "--coordinator=127.0.0.1:1", "--process_id=2"]])
def test_impossible_process_flags(flags: list[str], tmp_path) -> None:
    ended = runs.run(tmp_path, *flags)
    assert ended.code == 2
    assert ended.err == "niso: --processes=2 needs --coordinator=HOST:PORT and a --process_id from 0 to 1\n"


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path) -> None:
    """Bit-identical, as with one. The survivor of the first kill says so and ends at once."""
    options: dict[str, Any] = {"mesh__space": 2}
    unbroken, workdir = tmp_path / "unbroken", tmp_path / "killed"
    assert [ended.code for ended in runs.run_pair(unbroken, **options)] == [0, 0]
    killed = runs.run_pair(workdir, ([], ["kill=8"]), **options)
    assert (killed[1].code, killed[0].code) == (-9, 1)
    assert killed[0].err.startswith("niso: process 1 of 2 (") and killed[0].err.count("\n") == 1
    left = [ended.code for ended in runs.run_pair(workdir, (["term=11"], []), **options)]
    assert left == [42, 42]
    told_when_done = runs.run_pair(workdir, (["term=end"], []), **options)
    assert [(ended.code, ended.err) for ended in told_when_done] == [(0, "")] * 2
    assert runs.same(runs.arrays(workdir, runs.STEPS), runs.arrays(unbroken, runs.STEPS))
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
