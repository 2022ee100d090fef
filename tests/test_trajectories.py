"""Sequences scored at several strides: which count, how they are averaged, what baselines get, the file, the command line."""

import dataclasses
import json

import numpy as np
import pytest

from niso import poses, trajectories, trajectory_figure
from niso.errors import UserError
from niso.geometry import camera, trajectory
from niso.poses import Sequence, Stride
from tests.test_trajectory import drifting, moved, turntable


def sequences(count=3, length=40, seed=0):
    made = []
    for k in range(seed, seed + count):
        truth_Tx4x4 = moved(turntable(k, length), seed=k, scale=10.0 ** (k % 3 - 1))  # worlds differ in scale, as in CO3D
        made.append(Sequence(f"apple/{k}_{k + 1}", truth_Tx4x4, drifting(truth_Tx4x4, seed=k)))
    return made


def mean_motion(of):
    return trajectory.mean_motion([camera.relative_pose(x.truth_Tx4x4[:-1], x.truth_Tx4x4[1:]) for x in of])


def broken(sequence, where=(3, 0, 3), value=np.nan):
    estimate_Tx4x4 = np.array(sequence.estimate_Tx4x4)
    estimate_Tx4x4[where] = value
    return dataclasses.replace(sequence, estimate_Tx4x4=estimate_Tx4x4)


def resting(sequence):
    still_Tx4x4 = trajectory.baselines(sequence.truth_Tx4x4)["true_rotations"]
    return dataclasses.replace(sequence, estimate_Tx4x4=still_Tx4x4)


def test_the_frames_are_those_of_the_published_evaluation():
    np.testing.assert_array_equal(poses.frames_of(202, 10), np.arange(0, 200, 10))
    np.testing.assert_array_equal(poses.frames_of(9, 4), [0, 4, 8])
    np.testing.assert_array_equal(poses.frames_of(202, 8, limit=60), np.arange(0, 60, 8))
    assert [len(poses.frames_of(500, stride)) for stride in (1, 2, 4, 6, 8, 10)] == [200, 100, 50, 34, 25, 20]


def test_scores_are_means_of_the_per_sequence_errors():
    chosen = sequences() + sequences(1, length=30, seed=7)
    scores = trajectories.score(chosen, mean_motion(chosen))
    pairs = [(x.truth_Tx4x4, x.estimate_Tx4x4) for x in chosen]
    square_S = [trajectory.procrustes_error(a[1:, :3, 3], b[1:, :3, 3]) for a, b in pairs]  # the first pose is given: not scored
    assert scores["ate_ref"] == pytest.approx(np.sqrt(np.mean(square_S)), rel=1e-12)
    bound = np.sqrt(np.mean([1 / (3 * 39)] * 3 + [1 / (3 * 29)]))
    assert scores["ate_ref_ratio"] == pytest.approx(scores["ate_ref"] / bound, rel=1e-12)
    ape, rpe = np.mean([trajectory.ape(*p) for p in pairs], axis=0), np.mean([trajectory.rpe(*p) for p in pairs], axis=0)
    names = ["ape_translation", "ape_relative", "ape_rotation"]
    np.testing.assert_allclose([scores[name] for name in names], ape, rtol=1e-12)
    names = ["rpe_translation", "rpe_relative", "rpe_rotation", "rpe_direction"]
    np.testing.assert_allclose([scores[name] for name in names], rpe, rtol=1e-12)
    # Accuracies are pooled: a long sequence has more pairs, and more weight.
    rotation_P, direction_P = (np.concatenate(x) for x in zip(*(trajectory.pair_errors(*p) for p in pairs), strict=True))
    assert scores["rra_15"] == np.mean(rotation_P < 15) and scores["rta_15"] == np.mean(direction_P < 15)
    worst_P = np.maximum(rotation_P, direction_P)
    assert scores["maa_30"] == pytest.approx(np.mean([np.mean(worst_P < threshold) for threshold in range(1, 31)]), rel=1e-12)
    for name in trajectory.BASELINES:
        alone = trajectories.score(
            [dataclasses.replace(x, estimate_Tx4x4=trajectory.baselines(x.truth_Tx4x4, mean_motion(chosen))[name]) for x in chosen]
        )
        for metric in ("ate_ref", "ape_rotation", "rpe_direction", "maa_30"):
            assert scores[f"baseline_{name}/{metric}"] == alone[metric]
    assert not any(name.startswith("baseline_mean_motion") for name in trajectories.score(chosen))
    still = {name.removeprefix("baseline_true_rotations/"): value for name, value in scores.items() if "true_rotations" in name}
    want = {"ate_ref_ratio": 1, "ape_relative": 1, "ape_rotation": 0, "rpe_relative": 1, "rpe_rotation": 0, "rpe_direction": 90}
    for name, value in (want | {"rra_15": 1, "rta_15": 0, "maa_30": 0}).items():
        assert still[name] == pytest.approx(value, abs=1e-6), name


def test_which_sequences_count():
    short, rests, lost, fine = sequences(1, 31)[0], resting(sequences()[0]), broken(sequences()[1]), sequences()[2]
    still_Tx4x4 = np.repeat(np.eye(4)[None], 40, axis=0)
    still = Sequence("still", still_Tx4x4, fine.estimate_Tx4x4)
    scores = trajectories.score([short, rests, lost, fine, still], full_length=40)  # int(0.8 * 40) = 32
    counts = [scores[f"sequences_{count}"] for count in ("used", "too_short", "still", "degenerate", "not_finite")]
    assert counts == [3, 1, 1, 2, 1]
    assert trajectories.score([sequences(1, 32)[0]], full_length=40)["sequences_used"] == 1
    # None is dropped: what is degenerate is scored at the bound.
    alone = trajectories.score([fine])
    assert scores["ate_ref"] == pytest.approx(np.sqrt((2 / (3 * 39) + alone["ate_ref"] ** 2) / 3), rel=1e-12)
    assert scores["ape_relative"] == pytest.approx((2 + alone["ape_relative"]) / 3, rel=1e-12)
    at_worst = trajectories.score([lost])
    assert [at_worst[name] for name in ("ape_rotation", "rpe_rotation", "rpe_direction")] == [180, 180, 180]
    assert [at_worst[name] for name in ("ate_ref_ratio", "rra_15", "rta_15", "maa_30")] == [1, 0, 0, 0]
    for where, value in (((0, 1, 1), np.inf), ((-1, 3, 3), np.nan), ((2, 0, 3), 1e200)):
        assert trajectories.score([broken(fine, where, value)])["sequences_not_finite"] == 1
    assert set(trajectories.score([short], full_length=40)) == {name for name in scores if name.startswith("sequences")}
    two = sequences(1, 2)
    assert trajectories.score(two)["sequences_too_short"] == 1  # one position is left: nothing can be aligned


def test_the_file_keeps_everything_and_the_limit_sets_the_full_count(tmp_path):
    strides = {
        10: Stride(tuple(sequences(2, 20)), mean_motion(sequences(2, 20))),
        2: Stride((broken(sequences(1)[0]), *sequences(2, 6, seed=1))),
    }
    poses.save(tmp_path / "poses", strides)
    again, limit = poses.load(tmp_path / "poses")
    assert limit == 200
    assert list(again) == [2, 10] and again[2].mean_motion_4x4 is None
    np.testing.assert_array_equal(again[10].mean_motion_4x4, strides[10].mean_motion_4x4)
    for stride, part in strides.items():
        assert [x.name for x in again[stride].sequences] == [x.name for x in part.sequences]
        for mine, theirs in zip(again[stride].sequences, part.sequences, strict=True):
            np.testing.assert_array_equal(mine.truth_Tx4x4, theirs.truth_Tx4x4)
            np.testing.assert_array_equal(mine.estimate_Tx4x4, theirs.estimate_Tx4x4)
    scores = trajectories.score_all(again, limit=50)
    assert scores["stride_2/sequences_too_short"] == 2 and scores["stride_10/sequences_too_short"] == 0
    assert (
        scores["stride_10/baseline_forward/rpe_rotation"]
        == trajectories.score(strides[10].sequences)["baseline_forward/rpe_rotation"]
    )
    assert trajectories.score_all(again)["stride_2/sequences_too_short"] == 3


def test_the_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "poses.npz"
    chosen = [resting(sequences()[0]), broken(sequences()[1]), *sequences(3, seed=2)]
    strides = {10: Stride((resting(sequences(1, 4)[0]),)), 1: Stride(tuple(chosen), mean_motion(chosen)), 2: Stride(tuple(chosen))}
    poses.save(file, strides, limit=44)
    assert trajectories.main([str(file)]) == 0
    by_default = capsys.readouterr().out
    assert trajectories.main([str(file), "--json", str(tmp_path / "scores.json"), "--limit", "44"]) == 0
    out, error = capsys.readouterr()
    assert out == by_default
    print(out)
    assert error == "" and max(map(len, out.splitlines())) <= 132
    assert out.isascii() and "nan" not in out
    assert out.index("stride 1:") < out.index("stride 2:") < out.index("stride 10:")
    assert "5 sequences used, 0 too short, 0 whose truth rests; 2 estimates degenerate (1 not finite)" in out
    assert "mean motion     left out: the file has no stride_2/mean_motion_4x4" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == trajectories.score_all(strides, 44)
    assert trajectories.table(scores) == out[:-1]
    first, *rows = out.split("stride 2:")[0].splitlines()[1:6]
    assert [row[2:16].strip() for row in rows] == ["estimate", "forward", "mean motion", "true rotations"]
    assert all(len(row.split()) == 12 + row.count(" motion") + row.count(" rotations") + 1 for row in rows)
    assert f"{scores['stride_1/ate_ref']:.4f}" == rows[0].split()[1]
    assert len(first.split("  ")) > 5


def plain(**changes):
    good = sequences(1)[0]
    arrays = {"stride_1/a/truth_Tx4x4": good.truth_Tx4x4, "stride_1/a/estimate_Tx4x4": good.estimate_Tx4x4}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def bent(factor, rows=slice(0, 3)):
    pose_Tx4x4 = np.array(sequences(1)[0].truth_Tx4x4)
    pose_Tx4x4[4, rows, 0] *= factor
    return pose_Tx4x4


def with_row(row):
    pose_Tx4x4 = np.array(sequences(1)[0].truth_Tx4x4)
    pose_Tx4x4[:, 3] = row
    return pose_Tx4x4


WRONG = {
    "no partner": (plain(**{"stride_1/a/estimate_Tx4x4": None}), "stride_1/a/estimate_Tx4x4 is missing"),
    "no truth": (plain(**{"stride_1/b/estimate_Tx4x4": np.eye(4)[None]}), "stride_1/b/truth_Tx4x4 is missing"),
    "lengths": (plain(**{"stride_1/a/estimate_Tx4x4": bent(1)[:-1]}), "(39, 4, 4)"),
    "shape": (plain(**{"stride_1/b/truth_Tx4x4": np.eye(4), "stride_1/b/estimate_Tx4x4": np.eye(4)}), "must be (T, 4, 4)"),
    "truth not rigid": (plain(**{"stride_1/a/truth_Tx4x4": bent(1.01)}), "truth_Tx4x4: pose 4 is not rigid, off by 0.02"),
    "estimate not rigid": (plain(**{"stride_1/a/estimate_Tx4x4": bent(0)}), "estimate_Tx4x4: pose 4 is not rigid"),
    "mirrored": (plain(**{"stride_1/a/estimate_Tx4x4": bent(-1)}), "pose 4 is not rigid, it mirrors"),
    "last row": (plain(**{"stride_1/a/truth_Tx4x4": with_row([0, 0, 0, 2])}), "pose 0 is not rigid"),
    "truth not finite": (plain(**{"stride_1/a/truth_Tx4x4": with_row(np.nan)}), "truth_Tx4x4 is not finite"),
    "unknown key": (plain(poses=np.eye(4)), "unknown key 'poses'"),
    "unknown stride": (plain(**{"stride_x/mean_motion_4x4": np.eye(4)}), "unknown key 'stride_x/mean_motion_4x4'"),
    "mean motion": (plain(**{"stride_1/mean_motion_4x4": np.eye(3)}), "stride_1/mean_motion_4x4 must be one finite pose"),
    "mean motion not rigid": (plain(**{"stride_1/mean_motion_4x4": 2 * np.eye(4)}), "stride_1/mean_motion_4x4: pose 0 is not"),
    "limit": (plain(limit=np.inf), "limit must be one whole number, at least 1"),
    "limits": (plain(limit=np.array([60, 60])), "limit must be one whole number"),
    "words": (plain(**{"stride_1/a/truth_Tx4x4": np.array(["a"])}), "it must hold real numbers"),
    "objects": (plain(**{"stride_1/a/truth_Tx4x4": np.array([None])}), "is not an npz file of plain arrays"),
    "all too short": (plain(), "no sequence can be scored with --limit 200"),
    "nothing": ({}, "holds no arrays"),
}


@pytest.mark.parametrize("arrays, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_clear_line(tmp_path, capsys, arrays, message):
    file = tmp_path / "poses.npz"
    np.savez(file, **arrays)
    assert trajectories.main([str(file)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error and str(file) in error


def test_no_file_and_no_place_to_write_are_one_clear_line(tmp_path, capsys):
    def complaint(*arguments):
        assert trajectories.main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1
        return error

    file = tmp_path / "poses.npz"
    assert "No such file" in complaint(file)
    assert "cannot read" in complaint(tmp_path)
    for content in (b"", b"not an archive", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        assert "not an npz file" in complaint(file)
    np.save(tmp_path / "one.npy", np.eye(4))
    assert "not an npz file" in complaint(tmp_path / "one.npy")
    np.savez(file, **plain())
    whole = file.read_bytes()
    file.write_bytes(whole[:2000] + bytes(200) + whole[2200:])
    assert "not an npz file" in complaint(file)
    file.write_bytes(whole)
    assert "cannot write" in complaint(file, "--limit", 40, "--json", tmp_path / "none" / "scores.json")
    assert "at least 1" in complaint(file, "--limit", 0)
    with pytest.raises(UserError, match="cannot write"):
        poses.save(tmp_path / "none" / "poses.npz", {})
    with pytest.raises(ValueError, match="two sequences of one name at stride 3"):
        poses.save(tmp_path / "poses.npz", {3: Stride(2 * tuple(sequences(1)))})


def test_the_figure_shows_a_turntable_from_above():
    fine, rests, lost = sequences()[0], resting(sequences()[1]), broken(sequences()[2])
    axes_2x3 = trajectory_figure._view(fine.truth_Tx4x4)
    np.testing.assert_allclose(axes_2x3 @ axes_2x3.T, np.eye(2), atol=1e-12)
    assert np.cross(*axes_2x3) @ fine.truth_Tx4x4[:, :3, 1].mean(axis=0) < 0  # towards the viewer is up, -y
    flat_Tx2 = fine.truth_Tx4x4[:, :3, 3] @ axes_2x3.T
    extent_2 = np.ptp(flat_Tx2, axis=0)
    assert extent_2.min() > 0.8 * extent_2.max()

    def colours(page_HxWx3, colour):
        return np.argwhere((page_HxWx3 == colour).all(axis=-1))

    panel_HxWx3 = trajectory_figure._panel(fine)
    for colour in (trajectory_figure.TRUE, trajectory_figure.ESTIMATED):
        spots_Px2 = colours(panel_HxWx3, colour)
        inside = trajectory_figure.SIDE - 2 * trajectory_figure.BORDER
        assert 0.7 * inside < np.ptp(spots_Px2, axis=0).max() <= inside + 2 * trajectory_figure.BORDER
    centre_2 = colours(trajectory_figure._panel(rests), trajectory_figure.ESTIMATED).mean(axis=0)
    assert np.abs(centre_2 - panel_HxWx3.shape[0] / 2).max() < 25
    assert len(colours(trajectory_figure._panel(lost), trajectory_figure.ESTIMATED)) == 0
    assert trajectory_figure._caption(rests).endswith("APE 100.0% of spread") and "not finite" in trajectory_figure._caption(lost)
    still = Sequence("a/" + 40 * "b", np.eye(4)[None], np.eye(4)[None])
    page_HxWx3 = trajectory_figure.draw([fine, rests, lost, still])
    assert page_HxWx3.dtype == np.uint8 and page_HxWx3.ndim == 3 and page_HxWx3.shape[2] == 3
    assert trajectory_figure.draw([fine] * 9, count=2).shape[0] < page_HxWx3.shape[0]
    assert trajectory_figure.draw([]).ndim == 3
