"""A user's own frames: read as the records' were, their camera path in files that other programs read, mistakes in one line."""

import functools
import io
import itertools
import pathlib
import sys
import types

import numpy as np
import pytest
from PIL import Image

from data_prep import co3d_shard
from data_prep.co3d_source import Frame as SourceFrame
from niso import inference, predict, trajectory_figure, trajectory_files
from niso.data.frames import Frames
from niso.errors import UserError
from niso.geometry import trajectory
from tests import tiny
from tests.test_inference import pose_program, save, stirred
from tests.test_trajectory import turntable

COUNT = 12
SUFFIXES = (".jpg", ".png", ".webp")
load = functools.cache(inference.load)


@pytest.fixture(autouse=True)
def runs_are_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their functions compiled once."""
    monkeypatch.setattr(inference, "load", load)


def picture(k: int, height: int = 30, width: int = 41) -> Image.Image:
    """Smooth and different for every k."""
    y, x = np.mgrid[:height, :width] / 10
    waves = [np.sin(x + k), np.cos(y - 0.7 * k), np.sin(x * y / 3 + 0.3 * k)]
    return Image.fromarray(np.round(127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """COUNT pictures whose names sort differently as words, and things that are none."""
    path = tmp_path / "my frames"
    path.mkdir()
    for k in range(COUNT):
        picture(k).save(path / f"view {k}{SUFFIXES[k % 3]}", quality=95)
    (path / "notes.txt").write_text("a text")
    (path / ".hidden.png").write_text("what a file browser leaves")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir, program = tmp_path_factory.mktemp("run"), pose_program()
    save(workdir, program, stirred(program.init({})))
    return workdir


def names(count: int = COUNT, stride: int = 1) -> list[str]:
    return [f"view {k}{SUFFIXES[k % 3]}" for k in range(0, count, stride)]


def expected(run: pathlib.Path, folder: pathlib.Path, chosen: list[str]) -> np.ndarray:
    """The poses of these pictures, one pair at a time."""
    squares = []
    for name in chosen:
        with Image.open(folder / name) as image:
            square = image.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS, box=(5, 0, 35, 30))
        squares.append(np.asarray(square))
    model = load(run, None)
    coefficients = [model.encode(square[None]) for square in squares]
    pose = np.eye(4)
    poses = [pose]
    for a, b in itertools.pairwise(coefficients):
        pose = pose @ model.relative_pose(a, b)[0]
        poses.append(pose)
    return np.stack(poses)


def rotation(x: float, y: float, z: float, w: float) -> np.ndarray:
    """Of a unit quaternion."""
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def call(*arguments: object) -> int:
    return predict.main([str(argument) for argument in arguments])


def test_a_folder_becomes_a_path_that_others_read(run, folder, tmp_path, capfd) -> None:
    out = tmp_path / "new" / "out"
    assert call("--run", run, "--frames", folder, "--out", out) == 0
    told = capfd.readouterr()
    assert told.err == f"niso: 0 of {COUNT} frames, compiling\nniso: {COUNT} frames encoded\n"
    assert told.out.startswith(f"{COUNT} poses in {out}: maps.npz, ")
    assert sorted(path.name for path in out.iterdir()) == sorted(predict.FILES)
    want_Tx4x4 = expected(run, folder, names())
    assert trajectory.spread(want_Tx4x4[:, :3, 3]) > 0.1  # there is something to compare
    kitti_Tx3x4 = np.loadtxt(out / "trajectory_kitti.txt").reshape(-1, 3, 4)
    np.testing.assert_allclose(kitti_Tx3x4, want_Tx4x4[:, :3], rtol=1e-3, atol=1e-3)  # float32 in batches of other sizes
    with np.load(out / "maps.npz") as maps:
        assert maps["name_T"].tolist() == names() and int(maps["stride"]) == 1
        assert maps["tau_TxKxK"].shape == (COUNT - 1, 6, 6)
        pose_Tx4x4 = trajectory.compose(np.eye(4), maps["relative_Tx4x4"])
        np.testing.assert_array_equal(maps["pose_Tx4x4"], pose_Tx4x4)
    assert trajectory.off_rigid(pose_Tx4x4).max() < 1e-12
    np.testing.assert_allclose(kitti_Tx3x4, pose_Tx4x4[:, :3], rtol=1e-11, atol=1e-11)
    tum_Tx8 = np.loadtxt(out / "trajectory_tum.txt")
    np.testing.assert_array_equal(tum_Tx8[:, 0], np.arange(COUNT))
    np.testing.assert_allclose(tum_Tx8[:, 1:4], pose_Tx4x4[:, :3, 3], rtol=1e-11, atol=1e-11)
    turned_Tx3x3 = np.stack([rotation(*row[4:]) for row in tum_Tx8])
    np.testing.assert_allclose(turned_Tx3x3, pose_Tx4x4[:, :3, :3], atol=1e-10)
    with Image.open(out / "trajectory.png") as image:
        assert image.format == "PNG" and min(image.size) > 200


def test_evo_reads_both_files(tmp_path) -> None:
    file_interface = pytest.importorskip("evo.tools.file_interface", reason="evo is not installed: pip install -e .[test]")
    pose_Tx4x4 = turntable(0, 20)
    (tmp_path / "tum").write_text(trajectory_files.tum(np.arange(20) / 30, pose_Tx4x4))
    (tmp_path / "kitti").write_text(trajectory_files.kitti(pose_Tx4x4))
    tum = file_interface.read_tum_trajectory_file(tmp_path / "tum")
    kitti = file_interface.read_kitti_poses_file(tmp_path / "kitti")
    np.testing.assert_allclose(tum.timestamps, np.arange(20) / 30)
    for path in (tum, kitti):
        assert path.check()[0], path.check()[1]
        np.testing.assert_allclose(np.stack(path.poses_se3), pose_Tx4x4, rtol=1e-9, atol=1e-9)


def test_quaternions_of_any_rotation() -> None:
    quaternion_Nx4 = np.random.default_rng(0).normal(size=(200, 4))
    quaternion_Nx4[:3] = np.eye(4)[:3]  # half turns: the real part is 0
    quaternion_Nx4[3:6] = np.eye(4)[:3] + np.array([0, 0, 0, 1e-9])
    quaternion_Nx4[6:9] = [[0, 0, 0, 1], [1e-9, 0, 0, 1], [1, 1, 1, 0]]
    quaternion_Nx4 /= np.linalg.norm(quaternion_Nx4, axis=1, keepdims=True)
    found_Nx4 = trajectory_files.quaternions(np.stack([rotation(*row) for row in quaternion_Nx4]))
    assert (found_Nx4[:, 3] >= 0).all()
    np.testing.assert_allclose(np.abs(np.sum(found_Nx4 * quaternion_Nx4, axis=1)), 1, atol=1e-14)
    np.testing.assert_allclose(found_Nx4[3:6], quaternion_Nx4[3:6], atol=1e-15)


def test_frames_are_cut_and_resized_as_the_records_were(tmp_path) -> None:
    """Bit for bit: an odd rest, a file decoded at a quarter, one that lies on its side."""
    sizes = {"odd.png": (31, 50), "large.jpg": (150, 211), "lying.jpg": (150, 211)}
    for name, (height, width) in sizes.items():
        image = picture(1, height, width)
        exif = image.getexif()
        if name == "lying.jpg":
            exif[0x0112] = 6
        image.save(tmp_path / name, quality=95, exif=exif)
    read = {frame.name: frame.image_HxWxC for frame in Frames(tmp_path).read(16)}
    assert list(read) == ["large.jpg", "lying.jpg", "odd.png"]
    for name, (height, width) in sizes.items():
        upright = (width, height) if name == "lying.jpg" else (height, width)
        want = co3d_shard._load_square(tmp_path / name, SourceFrame(name, *upright, 0, None), 16)
        np.testing.assert_array_equal(read[name], want, err_msg=name)


def test_intrinsics_move_the_square(tmp_path) -> None:
    picture(3, 40, 60).save(tmp_path / "a.png")
    (frame,) = Frames(tmp_path, principal_2=(25.0, 18.5)).read(37)
    cut = picture(3, 40, 60).resize((37, 37), Image.Resampling.LANCZOS, box=(6.5, 0, 43.5, 37))
    np.testing.assert_array_equal(frame.image_HxWxC, cut)


def test_a_frame_that_cannot_be_read_is_named_and_the_path_goes_on(run, folder, tmp_path, capfd) -> None:
    whole = (folder / names()[4]).read_bytes()
    (folder / names()[4]).write_bytes(whole[: len(whole) // 2])
    (folder / names()[8]).write_text("no picture")
    Image.fromarray(np.zeros((30, 30), np.uint16)).save(folder / "view 10.png")
    out = tmp_path / "out"
    assert call("--run", run, "--frames", folder, "--out", out, "--stride", 2) == 0
    started, *lines = capfd.readouterr().err.splitlines()
    assert started == "niso: 0 of 6 frames, compiling"
    assert [line.split(" is left out: ")[0] for line in lines[:3]] == [
        f"niso: {name}" for name in (names()[4], names()[8], "view 10.png")
    ]
    assert lines[3:] == [
        "niso: 3 frames encoded", "niso: 3 frame(s) could not be read: the path goes on over each gap as if it were one step",
    ]  # fmt: skip
    tum_Tx8 = np.loadtxt(out / "trajectory_tum.txt")
    np.testing.assert_array_equal(tum_Tx8[:, 0], [0, 2, 6])


def one_line(capfd: pytest.CaptureFixture, *arguments: object) -> str:
    """What a user's mistake prints."""
    assert call(*arguments) == 2
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("niso: ") and told.err.count("\n") == 1, told
    return told.err[len("niso: ") : -1]


def test_mistakes_are_one_line(run, folder, tmp_path, capfd) -> None:
    def mistake(run: object = run, frames: object = folder, out: object = tmp_path / "out", *more: object) -> str:
        return one_line(capfd, "--run", run, "--frames", frames, "--out", out, *more)

    def flag(*more: object) -> str:
        return mistake(run, folder, tmp_path / "out", *more)

    empty, single, broken = (tmp_path / name for name in ("empty", "single", "broken"))
    for path in (empty, single, broken):
        path.mkdir()
    picture(0).save(single / "a.png")
    picture(0).save(broken / "a.png")
    (broken / "b.png").write_text("no picture")

    assert "the following arguments are required: --frames, --out; see" in one_line(capfd, "--run", run)
    assert "argument --stride: invalid int value: 'x'" in flag("--stride", "x")
    assert "--stride is 0, it must be at least 1" in flag("--stride", 0)
    for text in ("1,2,3", "a,b,c,d", "0,1,2,3", "1,1,nan,2"):
        assert "it must be fx,fy,cx,cy: four numbers in pixels" in flag("--intrinsics", text)
    assert "point 50,2 of --intrinsics lies outside of frames of 41 x 30 pixels" in flag("--intrinsics", "9,9,50,2")
    assert f"no run in {tmp_path}/none: there is no such folder" in mistake(run=tmp_path / "none")
    assert "train that run first" in mistake(run=empty)
    assert f"no folder or video {tmp_path}/none" in mistake(frames=tmp_path / "none")
    assert f"{empty} holds no pictures (.avif" in mistake(frames=empty)
    assert "a.png is one picture: give the folder" in mistake(frames=single / "a.png")
    assert f"{single} has 1 frame(s), a path needs at least 2" in mistake(frames=single)
    assert f"has 1 frame(s) at --stride {COUNT}, a path needs at least 2: take a smaller --stride" in flag("--stride", COUNT)
    assert call("--run", run, "--frames", broken, "--out", tmp_path / "out") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"niso: {broken} has 2 frame(s), 1 of them readable, a path needs at least 2"

    assert list((tmp_path / "out").iterdir()) == []  # nothing was left behind
    assert f"{single} holds files already: choose another --out, or --overwrite the 4" in mistake(out=single)
    assert "cannot write in" in mistake(out=single / "a.png")
    assert call("--run", run, "--frames", folder, "--out", single, "--stride", 4, "--overwrite") == 0
    assert sorted(path.name for path in single.iterdir()) == ["a.png", *predict.FILES]


def test_a_run_without_pose_head_is_told_what_to_run(folder, tmp_path, capfd) -> None:
    program = tiny.program(task__operator=False)
    save(tmp_path / "run", program, program.init({}))
    line = one_line(capfd, "--run", tmp_path / "run", "--frames", folder, "--out", tmp_path / "out")
    assert line == "this run has no pose head: run niso.main --config=configs/pose_pred.py first"
    assert not (tmp_path / "out").exists()


class Video(types.ModuleType):
    """Stands in for imageio_ffmpeg: 50 frames a second, or what it raises where ffmpeg finds no video."""

    def read_frames(self, path: str, pix_fmt: str):
        if pathlib.Path(path).read_text() != "a video":
            raise OSError("Could not load meta information\n=== stderr ===\nInvalid data")
        yield {"size": (41, 30), "fps": 50.0}
        yield from (picture(k).tobytes() for k in range(COUNT))


def test_a_video_is_read_at_its_frame_rate(run, folder, tmp_path, capfd, monkeypatch) -> None:
    (tmp_path / "a.mp4").write_text("a video")
    (tmp_path / "b.mp4").write_text("a text")
    arguments = ("--run", run, "--out", tmp_path / "out", "--stride", 5, "--frames")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert "pip install imageio-ffmpeg, or give a folder of pictures" in one_line(capfd, *arguments, tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", Video("imageio_ffmpeg"))
    assert f"{tmp_path}/b.mp4 cannot be read as a video (Invalid data)" in one_line(capfd, *arguments, tmp_path / "b.mp4")
    assert call(*arguments, tmp_path / "a.mp4") == 0
    tum_Tx8 = np.loadtxt(tmp_path / "out" / "trajectory_tum.txt")
    np.testing.assert_allclose(tum_Tx8[:, 0], [0, 0.1, 0.2])
    with np.load(tmp_path / "out" / "maps.npz") as maps:
        assert maps["name_T"].tolist() == ["000000", "000005", "000010"] and int(maps["stride"]) == 5
    for number, frame in enumerate(Frames(tmp_path / "a.mp4").read(16)):
        box = (5, 0, 35, 30)
        np.testing.assert_array_equal(frame.image_HxWxC, picture(number).resize((16, 16), Image.Resampling.LANCZOS, box=box))


def test_a_real_video(tmp_path) -> None:
    reason = "imageio-ffmpeg is not installed: pip install -e .[video]"
    video = pytest.importorskip("imageio_ffmpeg", reason=reason)
    writer = video.write_frames(str(tmp_path / "a.mp4"), (64, 48), fps=25)
    writer.send(None)
    for k in range(COUNT):
        writer.send(picture(k, 48, 64).tobytes())
    writer.close()
    frames = list(Frames(tmp_path / "a.mp4", stride=3).read(16))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(0, COUNT, 3) / 25)
    for k, frame in enumerate(frames):
        want = picture(3 * k, 48, 64).resize((16, 16), Image.Resampling.LANCZOS, box=(8, 0, 56, 48))
        assert np.abs(np.asarray(want, float) - frame.image_HxWxC).mean() < 8  # a codec of 8 bits and half the colours
    (tmp_path / "b.mp4").write_text("a text")
    with pytest.raises(UserError, match=r"b.mp4 cannot be read as a video \("):
        list(Frames(tmp_path / "b.mp4").read(16))


def test_the_figure_of_a_path() -> None:
    """Ink in both panels; a path that rests, and one of a single pose, are dots."""
    page = trajectory_figure.draw_path(turntable(0, 30), "Straße")
    assert page.dtype == np.uint8 and page.shape[2] == 3
    painted = [(page == trajectory_figure.ESTIMATED).all(axis=-1)]
    for still in (np.stack([np.eye(4)] * 5), np.eye(4)[None]):
        painted.append((trajectory_figure.draw_path(still) == trajectory_figure.ESTIMATED).all(axis=-1))
    for ink_HxW in painted:
        assert ink_HxW[:, : ink_HxW.shape[1] // 2].any() and ink_HxW[:, ink_HxW.shape[1] // 2 :].any()
    assert painted[0].sum() > 3 * painted[1].sum()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_in_place_and_lines_stay() -> None:
    screen, file = Screen(), io.StringIO()
    for terminal in (predict.Terminal(screen), predict.Terminal(file)):
        terminal.show(0, 4, 0.0)
        terminal.show(2, 4, 0.5)
        terminal.say("3.png is left out")
        terminal.show(4, 4, 1.0)
    drawn = screen.getvalue()
    assert drawn.count("\n") == 1 and "niso: 3.png is left out\n" in drawn
    assert f"[{15 * '#'}{15 * '.'}]  50 %  2 of 4 frames, 4 frames/s" in drawn and drawn.endswith(
        f"[{30 * '#'}] 100 %  4 of 4 frames, 4 frames/s"
    )
    assert file.getvalue() == "niso: 0 of 4 frames, compiling\nniso: 3.png is left out\n"  # nothing more within 2 seconds


def test_a_mistake_does_not_stand_behind_the_bar(run, folder, tmp_path, monkeypatch) -> None:
    picture(1, 10, 10).save(folder / names()[1])
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    assert call("--run", run, "--frames", folder, "--out", tmp_path / "out", "--intrinsics", "9,9,20,15") == 2
    bar, line = screen.getvalue().removeprefix("\r\033[K").split("\r\033[K")
    assert bar == f"[{30 * '.'}]   0 %  0 of {COUNT} frames, compiling"
    assert line == "niso: the principal point 20,15 of --intrinsics lies outside of frames of 10 x 10 pixels\n"
