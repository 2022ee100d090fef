"""Errors of trajectories: equal to evo's and scipy's, unmoved by a similarity, at their bounds where an estimate rests."""

import json
import pathlib

import numpy as np
import pytest

from niso.geometry import camera, trajectory

_FOX = pathlib.Path(__file__).parents[2] / "shared" / "data" / "fox_co3d"


def rotation(vector_3):
    """exp of a rotation vector (Rodrigues)."""
    angle = np.linalg.norm(vector_3)
    x, y, z = np.asarray(vector_3) / angle
    cross_3x3 = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross_3x3 + (1 - np.cos(angle)) * cross_3x3 @ cross_3x3


def pose(vector_3, centre_3):
    pose_4x4 = np.eye(4)
    pose_4x4[:3, :3], pose_4x4[:3, 3] = rotation(vector_3), centre_3
    return pose_4x4


def wandering(seed=0, length=40):
    rng = np.random.default_rng(seed)
    return np.stack([pose(rng.normal(size=3), rng.normal(size=3)) for _ in range(length)])


def turntable(seed=0, length=60):
    """Cameras around the origin that look at it, on a wavy circle."""
    poses = []
    for angle in np.linspace(0, 5.5, length):
        bump = 1 + 0.1 * np.sin(2 * angle + seed)
        centre_3 = bump * np.array([3 * np.cos(angle), -1.2 + 0.2 * np.sin(3 * angle), 3 * np.sin(angle)])
        z_3 = -centre_3 / np.linalg.norm(centre_3)
        x_3 = np.cross([0, 1, 0], z_3) / np.linalg.norm(np.cross([0, 1, 0], z_3))
        poses.append(np.eye(4))
        poses[-1][:3] = np.stack([x_3, np.cross(z_3, x_3), z_3, centre_3], axis=1)
    return np.stack(poses)


def drifting(truth_Tx4x4, seed=0, angle=0.02, step=0.2):
    """An estimate from the true first pose: every relative pose turned by noise, its translation off by a share of the step."""
    rng = np.random.default_rng(seed)
    relative_Nx4x4 = camera.relative_pose(truth_Tx4x4[:-1], truth_Tx4x4[1:])
    size = np.linalg.norm(relative_Nx4x4[:, :3, 3], axis=1).mean()
    for relative_4x4 in relative_Nx4x4:
        relative_4x4[:3, :3] = relative_4x4[:3, :3] @ rotation(angle * rng.normal(size=3))
        relative_4x4[:3, 3] = relative_4x4[:3, 3] / size + step * rng.normal(size=3)
    return trajectory.compose(truth_Tx4x4[0], relative_Nx4x4)


def moved(pose_Tx4x4, seed=5, scale=0.3):
    """The same poses in another world: rotated, scaled, shifted."""
    rng = np.random.default_rng(seed)
    moved_Tx4x4 = pose(rng.normal(size=3), 4 * rng.normal(size=3)) @ pose_Tx4x4
    moved_Tx4x4[:, :3, 3] *= scale
    return moved_Tx4x4


def fox():
    path = _FOX / "original_poses.json"
    if not path.is_file():
        pytest.skip(f"no real poses at {path}")
    return np.array(json.loads(path.read_text())["original_c2w_opengl"]) @ np.diag([1.0, -1, -1, 1])


def pairs():
    """Name -> (truth, estimate), made when asked for."""
    return {
        "random": lambda: (wandering(0), wandering(1)),
        "turntable": lambda: (turntable(), moved(drifting(turntable()))),
        "turntable, far off": lambda: (turntable(), moved(drifting(turntable(), angle=0.5, step=2), scale=20)),
        "real": lambda: (fox(), moved(drifting(fox()))),
    }


@pytest.fixture(params=pairs())
def pair(request):
    return pairs()[request.param]()


def errors(truth_Tx4x4, estimate_Tx4x4):
    """Everything that is printed of one sequence, as one vector."""
    accuracy_3x2 = trajectory.pair_accuracy(*trajectory.pair_errors(truth_Tx4x4, estimate_Tx4x4))
    ate = trajectory.procrustes_error(truth_Tx4x4[1:, :3, 3], estimate_Tx4x4[1:, :3, 3])
    return np.array(
        [ate, *trajectory.ape(truth_Tx4x4, estimate_Tx4x4), *trajectory.rpe(truth_Tx4x4, estimate_Tx4x4), *accuracy_3x2.ravel()]
    )


# ---- other people's numbers ------------------------------------------------------------------------------------------


def test_ape_and_rpe_equal_evo(pair):
    why = "evo is not installed: pip install -e .[test]"
    metrics = pytest.importorskip("evo.core.metrics", reason=why)
    path = pytest.importorskip("evo.core.trajectory", reason=why).PosePath3D
    truth_Tx4x4, estimate_Tx4x4 = pair
    truth, estimate = path(poses_se3=list(truth_Tx4x4)), path(poses_se3=list(estimate_Tx4x4))
    r_3x3, t_3, scale = estimate.align(truth, correct_scale=True)
    got = trajectory.umeyama(estimate_Tx4x4[:, :3, 3], truth_Tx4x4[:, :3, 3])
    for mine, theirs in zip(got, (scale, r_3x3, t_3), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)

    def rmse(metric):
        metric.process_data((truth, estimate))
        return metric.get_statistic(metrics.StatisticsType.rmse)

    relation = metrics.PoseRelation
    consecutive = {"delta": 1, "delta_unit": metrics.Unit.frames, "all_pairs": False}
    ape, rpe = trajectory.ape(truth_Tx4x4, estimate_Tx4x4), trajectory.rpe(truth_Tx4x4, estimate_Tx4x4)
    want = [
        rmse(metrics.APE(relation.translation_part)), rmse(metrics.APE(relation.rotation_angle_deg)),
        rmse(metrics.RPE(relation.translation_part, **consecutive)), rmse(metrics.RPE(relation.rotation_angle_deg, **consecutive)),
    ]  # fmt: skip
    mine = [ape.translation, ape.rotation, rpe.translation, rpe.rotation]
    print(f"largest relative deviation from evo {np.max(np.abs(np.divide(mine, want) - 1)):.1e}")
    np.testing.assert_allclose(mine, want, rtol=1e-9)  # rounding of a few hundred operations; measured below 1e-12
    true_steps = np.linalg.norm(np.diff(truth_Tx4x4[:, :3, 3], axis=0), axis=1)
    assert rpe.translation_relative == pytest.approx(rpe.translation / np.sqrt(np.mean(true_steps**2)), rel=1e-12)
    # All pairs of evo: the distribution that RRA@15 is read off.
    every = metrics.RPE(relation.rotation_angle_deg, delta=7, delta_unit=metrics.Unit.frames, all_pairs=True)
    every.process_data((truth, estimate))
    first_P = np.arange(len(truth_Tx4x4) - 7)
    rotation_P, _ = trajectory.pair_errors(truth_Tx4x4, estimate_Tx4x4, first_P, first_P + 7)
    np.testing.assert_allclose(rotation_P, every.error, atol=1e-9)


def test_the_published_error_equals_scipy(pair):
    procrustes = pytest.importorskip("scipy.spatial", reason="scipy is not installed").procrustes
    truth_Nx3, estimate_Nx3 = (pose_Tx4x4[1:, :3, 3] for pose_Tx4x4 in pair)
    for estimate in (estimate_Nx3, -estimate_Nx3):  # a reflection changes nothing
        standard_Nx3, fitted_Nx3, disparity = procrustes(truth_Nx3, estimate)
        want = np.mean((standard_Nx3 - fitted_Nx3) ** 2)
        assert want == pytest.approx(disparity / truth_Nx3.size, rel=1e-12)
        assert trajectory.procrustes_error(truth_Nx3, estimate) == pytest.approx(want, rel=1e-9)
    with pytest.raises(ValueError):  # which the reference takes for a reason to leave the sequence out
        procrustes(truth_Nx3, np.ones_like(truth_Nx3))


# ---- what must hold --------------------------------------------------------------------------------------------------


def test_compose_inverts_relative_pose(pair):
    truth_Tx4x4, _ = pair
    relative_Nx4x4 = camera.relative_pose(truth_Tx4x4[:-1], truth_Tx4x4[1:])
    np.testing.assert_allclose(trajectory.compose(truth_Tx4x4[0], relative_Nx4x4), truth_Tx4x4, atol=1e-12)
    assert trajectory.compose(truth_Tx4x4[0], np.zeros((0, 4, 4))).shape == (1, 4, 4)


def test_umeyama_is_the_best_similarity_and_never_a_mirror():
    rng = np.random.default_rng(0)
    source_Nx3 = rng.normal(size=(30, 3)) * [1, 2, 3]
    turn_3x3, shift_3 = rotation(rng.normal(size=3)), rng.normal(size=3)
    scale, rotation_3x3, translation_3 = trajectory.umeyama(source_Nx3, 2.5 * source_Nx3 @ turn_3x3.T + shift_3)
    assert scale == pytest.approx(2.5, rel=1e-12)
    np.testing.assert_allclose(rotation_3x3, turn_3x3, atol=1e-12)
    np.testing.assert_allclose(translation_3, shift_3, atol=1e-12)
    target_Nx3 = source_Nx3 * [1, 1, -1] + 0.1 * rng.normal(size=(30, 3))
    scale, rotation_3x3, translation_3 = best = trajectory.umeyama(source_Nx3, target_Nx3)
    assert np.linalg.det(rotation_3x3) == pytest.approx(1)

    def residual(scale, rotation_3x3, translation_3):
        return np.sum((target_Nx3 - scale * source_Nx3 @ rotation_3x3.T - translation_3) ** 2)

    for _ in range(200):
        other = (
            scale + 1e-3 * rng.normal(),
            rotation(1e-3 * rng.normal(size=3)) @ rotation_3x3,
            translation_3 + 1e-3 * rng.normal(size=3),
        )
        assert residual(*other) > residual(*best)
    with pytest.raises(ValueError, match="no extent"):
        trajectory.umeyama(np.full((30, 3), 0.1), target_Nx3)


def test_errors_do_not_depend_on_the_estimates_world(pair):
    truth_Tx4x4, estimate_Tx4x4 = pair
    # 1e-8: pair accuracies count, everything else is rounding; a world 50 times larger or smaller costs two digits.
    for scale in (0.02, 1.0, 50.0):
        np.testing.assert_allclose(errors(truth_Tx4x4, moved(estimate_Tx4x4, scale=scale)), errors(*pair), rtol=1e-8)
    perfect = errors(truth_Tx4x4, moved(truth_Tx4x4))
    np.testing.assert_allclose(perfect[:8], 0, atol=1e-6)
    count = len(truth_Tx4x4) * (len(truth_Tx4x4) - 1) / 2
    np.testing.assert_allclose(perfect[8:], count)


def test_only_the_published_error_allows_reflections():
    truth_Tx4x4 = wandering(3)
    mirrored_Tx4x4 = np.array(truth_Tx4x4)
    mirrored_Tx4x4[:, :3, 3] *= [1, 1, -1]
    assert trajectory.procrustes_error(truth_Tx4x4[:, :3, 3], mirrored_Tx4x4[:, :3, 3]) < 1e-30
    assert trajectory.ape(truth_Tx4x4, mirrored_Tx4x4).translation_relative > 0.3
    # Without a mirror to gain from, it is the APE in other units: sqrt(e) = relative / sqrt(3 n).
    truth_Tx4x4 = turntable()
    estimate_Tx4x4 = drifting(truth_Tx4x4)
    square = trajectory.procrustes_error(truth_Tx4x4[:, :3, 3], estimate_Tx4x4[:, :3, 3])
    relative = trajectory.ape(truth_Tx4x4, estimate_Tx4x4).translation_relative
    assert np.sqrt(square) == pytest.approx(relative / np.sqrt(3 * len(truth_Tx4x4)), rel=1e-9)


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_an_estimate_that_rests_is_at_the_bound(far):
    truth_Tx4x4 = turntable()
    truth_Tx4x4[:, 0, 3] += far
    still_Tx4x4 = trajectory.baselines(truth_Tx4x4)["true_rotations"]
    chained_Nx4x4 = camera.relative_pose(truth_Tx4x4[:-1], truth_Tx4x4[1:])
    chained_Nx4x4[:, :3, 3] = 0
    for estimate_Tx4x4 in (still_Tx4x4, trajectory.compose(truth_Tx4x4[0], chained_Nx4x4), moved(still_Tx4x4)):
        position_Nx3 = estimate_Tx4x4[1:, :3, 3]
        square = trajectory.procrustes_error(truth_Tx4x4[1:, :3, 3], position_Nx3)
        assert square == 1 / (3 * 59)
        ape, rpe = trajectory.ape(truth_Tx4x4, estimate_Tx4x4), trajectory.rpe(truth_Tx4x4, estimate_Tx4x4)
        assert ape.translation_relative == pytest.approx(1) and rpe.translation_relative == pytest.approx(1)
        assert ape.translation == pytest.approx(trajectory.spread(truth_Tx4x4[:, :3, 3]))
        assert ape.rotation < 1e-6 and rpe.rotation < 1e-6  # its rotations are right, and count
        assert rpe.direction == 90
        rra, rta, maa = trajectory.pair_accuracy(*trajectory.pair_errors(truth_Tx4x4, estimate_Tx4x4)).T[0]
        assert (rra, rta, maa) == (60 * 59 / 2, 0, 0)
    with pytest.raises(ValueError, match="no extent"):
        trajectory.procrustes_error(position_Nx3, truth_Tx4x4[1:, :3, 3])


def test_no_estimate_is_beyond_the_bound():
    for seed in range(20):
        truth_Tx4x4, estimate_Tx4x4 = wandering(2 * seed, 8), wandering(2 * seed + 1, 8)
        assert trajectory.procrustes_error(truth_Tx4x4[:, :3, 3], estimate_Tx4x4[:, :3, 3]) <= 1 / 24
        assert trajectory.ape(truth_Tx4x4, estimate_Tx4x4).translation_relative <= 1 + 1e-12


def test_rotations_decide_where_positions_on_a_line_leave_the_alignment_open():
    rng = np.random.default_rng(0)
    truth_Tx4x4 = wandering(4, 10)
    truth_Tx4x4[:, :3, 3] = np.linspace(0, 1, 10)[:, None] ** 1.3 * rng.normal(size=3) + 1
    assert trajectory.ape(truth_Tx4x4, moved(truth_Tx4x4)).rotation < 1e-5
    estimate_Tx4x4 = np.array(truth_Tx4x4)
    estimate_Tx4x4[:, :3, :3] = wandering(5, 10)[:, :3, :3]
    aligned_Tx4x4, _ = trajectory.align(moved(estimate_Tx4x4), truth_Tx4x4)
    np.testing.assert_allclose(aligned_Tx4x4[:, :3, 3], truth_Tx4x4[:, :3, 3], atol=1e-9)
    axis_3 = truth_Tx4x4[-1, :3, 3] - truth_Tx4x4[0, :3, 3]
    agreement = np.sum(aligned_Tx4x4[:, :3, :3] * truth_Tx4x4[:, :3, :3])
    for angle in np.linspace(-3, 3, 30):
        turned_Tx3x3 = rotation(angle * axis_3 / np.linalg.norm(axis_3)) @ aligned_Tx4x4[:, :3, :3]
        assert np.sum(turned_Tx3x3 * truth_Tx4x4[:, :3, :3]) < agreement


def test_directions_have_a_sign_and_pairs_at_rest_none():
    truth_Tx4x4 = turntable(length=4)
    truth_Tx4x4[2] = truth_Tx4x4[1]
    estimate_Tx4x4 = np.array(truth_Tx4x4)
    estimate_Tx4x4[3, :3, 3] = 2 * truth_Tx4x4[2, :3, 3] - truth_Tx4x4[3, :3, 3]
    estimate_Tx4x4[0, :3, 3] = truth_Tx4x4[1, :3, 3]
    np.testing.assert_allclose(
        trajectory.pair_errors(truth_Tx4x4, estimate_Tx4x4, *np.array([[0, 1, 2], [1, 2, 3]]))[1], [90, np.nan, 180]
    )
    accuracy_3x2 = trajectory.pair_accuracy(np.array([0.0, 14.9, 29.5, 15.0]), np.array([0.0, 3.0, np.nan, 90.0]))
    np.testing.assert_allclose(accuracy_3x2, [[2, 4], [2, 3], [(30 + 16 + 1) / 30, 4]])
    thresholds = [sum(worst < t for t in range(1, 31)) / 30 for worst in (0.0, 14.9, 29.5, 90.0)]  # by its definition
    assert accuracy_3x2[2, 0] == pytest.approx(sum(thresholds))


def test_angles_are_exact_near_zero_and_half_a_turn():
    angles = [1e-9, 1e-4, 1.0, np.pi - 1e-4, np.pi - 1e-9]
    turn_Nx3x3 = np.stack([rotation(angle * np.array([0.6, 0, 0.8])) for angle in angles])
    np.testing.assert_allclose(trajectory.rotation_angle(turn_Nx3x3), np.degrees(angles), rtol=1e-6, atol=1e-14)


def test_the_mean_motion_is_one_of_a_constant_motion():
    step_4x4 = pose([0.1, -0.2, 0.3], [0.6, 0, 0.8])
    relatives = [np.repeat(step_4x4[None], count, axis=0) for count in (3, 5)]
    relatives[1][:, :3, 3] *= 17  # each sequence has a scale of its own
    np.testing.assert_allclose(trajectory.mean_motion(relatives), step_4x4, atol=1e-12)
    back_Nx4x4 = np.stack([pose(vector_3, [0, 0, 1]) for vector_3 in ([0, 0.3, 0], [0, -0.3, 0], [0.2, 0, 0], [-0.2, 0, 0])])
    np.testing.assert_allclose(trajectory.mean_motion([back_Nx4x4])[:3, :3], np.eye(3), atol=1e-12)
    still_Nx4x4 = np.repeat(np.eye(4)[None], 8, axis=0)
    np.testing.assert_allclose(trajectory.mean_motion([*relatives, still_Nx4x4])[:3, 3], [0.3, 0, 0.4], atol=1e-12)


def test_baselines():
    truth_Tx4x4 = wandering(6, 5)
    mean_4x4 = pose([0, 0.2, 0], [1, 0, 0])
    estimates = trajectory.baselines(truth_Tx4x4, mean_4x4)
    assert tuple(estimates) == trajectory.BASELINES
    assert tuple(trajectory.baselines(truth_Tx4x4)) == ("forward", "true_rotations")
    for estimate_Tx4x4 in estimates.values():
        np.testing.assert_array_equal(estimate_Tx4x4[0], truth_Tx4x4[0])
        assert trajectory.off_rigid(estimate_Tx4x4).max() < 1e-12
    ahead_3 = truth_Tx4x4[0, :3, 2]  # the third column is the camera's forward axis
    np.testing.assert_allclose(np.diff(estimates["forward"][:, :3, 3], axis=0), np.tile(ahead_3, (4, 1)), atol=1e-12)
    motion = camera.relative_pose(estimates["mean_motion"][:-1], estimates["mean_motion"][1:])
    np.testing.assert_allclose(motion, np.repeat(mean_4x4[None], 4, axis=0), atol=1e-12)
    np.testing.assert_array_equal(estimates["true_rotations"][:, :3, :3], truth_Tx4x4[:, :3, :3])
