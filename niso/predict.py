"""Camera trajectory of your own frames: python -m niso.predict --run RUN --frames FOLDER_OR_VIDEO --out OUT [--stride N]

RUN is a run of pose_pred. Frames are a folder of pictures, taken in the natural order of their names, or a video file (with
`pip install imageio-ffmpeg`). Each is cut to the largest square in its middle and resized as the training frames were;
--intrinsics fx,fy,cx,cy (pixels of the original frames) moves that square's centre to the principal point cx,cy, and does no
more: focal lengths are not corrected for, frames whose field of view is far from that of the training videos are misjudged.

OUT gets camera-to-world poses in OpenCV axes, the first at the origin, translations in a unit of the network's own:

    trajectory_tum.txt     timestamp tx ty tz qx qy qz qw; seconds of a video, a frame's place in its folder from 0
    trajectory_kitti.txt   the first three rows of each pose, 12 numbers a line
    trajectory.png         the path
    maps.npz               name_T, time_T, pose_Tx4x4 of T frames; tau_TxKxK (the isometries), relative_Tx4x4 of their T - 1 steps;
                           stride

A frame that cannot be read is named and left out; the poses go on from the frame before it to the frame after it, one step of
the network over a larger motion.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np

from niso import figures, folders, inference, trajectory_figure, trajectory_files
from niso.data.frames import Frame, Frames
from niso.errors import UserError
from niso.geometry import trajectory
from niso.inference import Model

FILES = ("maps.npz", "trajectory.png", "trajectory_kitti.txt", "trajectory_tum.txt")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The camera path of T frames: their names and times, T − 1 isometries and relative poses, T poses."""

    name_T: list[str]
    time_T: np.ndarray
    tau_TxKxK: np.ndarray
    relative_Tx4x4: np.ndarray
    pose_Tx4x4: np.ndarray
    stride: int


class Terminal:
    """What stands on the terminal: lines that stay, and below them a bar that is drawn anew; where there is no terminal, the
    bar's text as a line every other second."""

    def __init__(self, file: TextIO):
        self.file, self.drawn, self.told = file, False, -math.inf

    def say(self, line: str) -> None:
        """A line that stays."""
        self.file.write(("\r\033[K" if self.drawn else "") + f"niso: {line}\n")
        self.file.flush()
        self.drawn = False

    def show(self, done: int, total: int | None, seconds: float) -> None:
        """The bar: frames done, of how many if that is known, and how fast."""
        speed = f", {done / seconds:.0f} frames/s" if done and seconds > 0 else ", compiling"
        text = f"{done} of {total} frames{speed}" if total else f"{done} frames{speed}"
        if self.file.isatty():
            filled = 30 * min(done, total) // total if total else 0
            bar = f"[{'#' * filled}{'.' * (30 - filled)}] {100 * min(done, total) // total:3} %  " if total else ""
            self.file.write(f"\r\033[K{bar}{text}")
            self.file.flush()
            self.drawn = True
        elif time.monotonic() - self.told > 2:
            self.say(text)
            self.told = time.monotonic()


def predict(model: Model, frames: Frames, terminal: Terminal) -> Prediction:
    """Reads the frames, encodes each once and chains the relative poses of consecutive ones.

    Args:
      terminal: Is told what there is to know on the way.

    Raises:
      UserError: fewer than two frames can be read, or a pose is not finite.
    """
    used, coefficient_TxKxC = _encode(model, frames, terminal)
    tau_TxKxK = model.isometry(coefficient_TxKxC[:-1], coefficient_TxKxC[1:])
    relative_Tx4x4 = model.pose_of(tau_TxKxK).astype(np.float64)
    for frame, relative_4x4 in zip(used[1:], relative_Tx4x4, strict=True):
        if not np.isfinite(relative_4x4).all():
            raise UserError(f"the pose of {frame.name} is not finite: choose another checkpoint of the run")
        relative_4x4[:3, :3] = trajectory.nearest_rotation(relative_4x4[:3, :3])  # float32's rounding would add up in a chain
    return Prediction(
        name_T=[frame.name for frame in used],
        time_T=np.array([frame.time for frame in used]),
        tau_TxKxK=tau_TxKxK,
        relative_Tx4x4=relative_Tx4x4,
        pose_Tx4x4=trajectory.compose(np.eye(4), relative_Tx4x4),
        stride=frames.stride,
    )


def _encode(model: Model, frames: Frames, terminal: Terminal) -> tuple[list[Frame], np.ndarray]:
    """The frames that can be read, without their pictures, and their coefficients; a chunk of pictures is held at a time."""
    used: list[Frame] = []
    unread: list[Frame] = []
    parts, chunk = [], []
    total, begun = frames.count(), time.monotonic()
    if total is not None and total < 2:
        raise _too_few(frames, total, total)
    for index, frame in enumerate(frames.read(model.size)):
        if index == 0:
            terminal.show(0, total, 0.0)
        if frame.image_HxWxC is None:
            terminal.say(f"{frame.name} is left out: {frame.problem}")
            unread.append(frame)
            continue
        chunk.append(frame.image_HxWxC)
        used.append(dataclasses.replace(frame, image_HxWxC=None))
        if len(chunk) == model.chunk:
            parts.append(model.encode(np.stack(chunk)))
            chunk = []
            terminal.show(len(used), total and total - len(unread), time.monotonic() - begun)
    if len(used) < 2:
        raise _too_few(frames, len(used) + len(unread), len(used))
    if chunk:
        parts.append(model.encode(np.stack(chunk)))
    terminal.say(f"{len(used)} frames encoded")
    if unread:
        terminal.say(f"{len(unread)} frame(s) could not be read: the path goes on over each gap as if it were one step")
    return used, np.concatenate(parts)


def _too_few(frames: Frames, count: int, readable: int) -> UserError:
    at = f" at --stride {frames.stride}" if frames.stride > 1 else ""
    unreadable = "" if readable == count else f", {readable} of them readable"
    remedy = ": take a smaller --stride" if frames.stride > 1 else ""
    return UserError(f"{frames.path} has {count} frame(s){at}{unreadable}, a path needs at least 2{remedy}")


def write(prediction: Prediction, out: Path, title: str) -> None:
    """Writes the FILES into the folder, each under another name until it is complete.

    Raises:
      UserError: they cannot be written.
    """
    pose_Tx4x4 = prediction.pose_Tx4x4
    writers: tuple[Callable[[Path], object], ...] = (
        lambda path: np.savez(path, **dataclasses.asdict(prediction)),
        lambda path: figures.save(path, trajectory_figure.draw_path(pose_Tx4x4, title)),
        lambda path: path.write_text(trajectory_files.kitti(pose_Tx4x4)),
        lambda path: path.write_text(trajectory_files.tum(prediction.time_T, pose_Tx4x4)),
    )
    for name, writer in zip(FILES, writers, strict=True):
        unfinished = out / f".unfinished_{name}"
        try:
            writer(unfinished)
            unfinished.replace(out / name)
        except OSError as error:
            raise UserError(f"cannot write {out / name}: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)


def _check_model(model: Model) -> None:
    """Raises UserError where it cannot tell camera poses from pictures."""
    if not model.has_pose_head:
        raise UserError("this run has no pose head: run niso.main --config=configs/pose_pred.py first")
    if model.channels != 3:
        raise UserError(f"this run looks at frames of {model.channels} channels, pictures and videos are read as 3 (RGB)")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where the results cannot go; makes the folder."""
    try:
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise UserError(f"{out} holds files already: choose another --out, or --overwrite the {len(FILES)} that are written")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}") from error


def _principal(text: str | None) -> tuple[float, float] | None:
    """cx, cy of --intrinsics."""
    if text is None:
        return None
    try:
        fx, fy, cx, cy = map(float, text.split(","))
    except ValueError:
        fx = fy = cx = cy = np.nan
    if not (np.isfinite([fx, fy, cx, cy]).all() and min(fx, fy) > 0):
        raise UserError(f"--intrinsics is {text!r}, it must be fx,fy,cx,cy: four numbers in pixels, focal lengths positive")
    return cx, cy


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m niso.predict --help")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m niso.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a pose_pred run")
    parser.add_argument("--step", type=int, help="which checkpoint of it (the newest)")
    parser.add_argument("--frames", required=True, help="folder of pictures, or a video")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--stride", type=int, default=1, help="take every N-th frame (1)")
    parser.add_argument("--intrinsics", metavar="FX,FY,CX,CY", help="centre the square at CX,CY; see above")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are in OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user."""
    terminal = Terminal(sys.stderr)
    try:
        options = _parse(argv)
        if options.stride < 1:
            raise UserError(f"--stride is {options.stride}, it must be at least 1")
        source, out = folders.here(options.frames, "--frames"), folders.here(options.out, "--out")
        frames = Frames(source, options.stride, _principal(options.intrinsics))
        model = inference.load(options.run, options.step)
        _check_model(model)
        _check_out(out, options.overwrite)
        prediction = predict(model, frames, terminal)
        write(prediction, out, f"Camera path of {source.name}")
    except UserError as error:
        terminal.say(str(error))  # not behind the bar
        return 2
    print(f"{len(prediction.name_T)} poses in {out}: {', '.join(FILES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
