"""The two files of a run's numbers: event files for TensorBoard, without TensorFlow, and metrics.jsonl.

`clu.metric_writers` imports TensorFlow (1.3 GB) for one class, its `SummaryWriter`. Importing this module *before*
clu puts a stand-in where clu looks for that class, made of tensorboard's own protocol buffers and record writer, so
that all of clu works without TensorFlow. Import clu only after this module.
"""

import io
import json
import math
import os
import socket
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from niso.errors import UserError
from niso.run_files import COPIED, METRICS_FILE


def _summary_writer(logdir: str) -> "EventWriter":
    """What clu's `create_default_writer` calls; late, since EventWriter itself needs clu's interface."""
    return EventWriter(logdir)


_stand_in = types.ModuleType("clu.metric_writers.summary_writer", "niso's event writer in the place of TensorFlow's.")
_stand_in.SummaryWriter = _summary_writer  # type: ignore[attr-defined]
sys.modules.setdefault(_stand_in.__name__, _stand_in)

# isort: split
from clu.metric_writers.interface import MetricWriter  # noqa: E402

HISTOGRAM_BUCKETS = 30
ROLL_BYTES = 8_000_000  # of an event file that is copied whole whenever it has grown


class AppendFile:
    """A file that only grows, flushed at every write.

    Writers run in a thread whose exceptions would be printed, not handled. So the first failure (disk full, stale
    mount) is kept, later writes do nothing, and `check()` raises it as a UserError in whichever thread asks.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.size = Path(path), 0  # what this has written
        self.error: OSError | None = None
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115 (open as long as the writer)
        except OSError as error:
            self.error = error
            self.check()

    def write(self, data: bytes) -> None:
        if self.error is None:
            try:
                self._file.write(data)
                self._file.flush()
                self.size += len(data)
            except OSError as error:
                self.error = error

    def flush(self) -> None:
        """Nothing is ever held back."""

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error

    def check(self) -> None:
        """Raises the first failure, if there was one, as a UserError that names the file."""
        if self.error is not None:
            reason = self.error.strerror or str(self.error)
            remedy = "set TMPDIR to another folder" if (self.path.parent / COPIED).exists() else "choose another workdir"
            raise UserError(f"cannot write {self.path}: {reason}. Free space or {remedy}, then resume.")


class EventWriter(MetricWriter):
    """Writes a new event file into `logdir`, for TensorBoard and its readers, or, with a `limit`, more that follow it.

    tensorboard's `EventFileWriter` would add a second thread behind clu's, whose failures end in a traceback on stderr,
    and file names that sort wrongly when two runs start within a second; so its record writer is used directly.

    Args:
        logdir: the directory, created if missing.
        purge_step: readers forget what older files in `logdir` say about this step and later ones.
        limit: bytes after which the next file is begun.

    Raises:
        UserError: the file cannot be created.
    """

    def __init__(self, logdir: str | os.PathLike[str], purge_step: int = 0, limit: int | None = None):
        self._logdir, self._limit = Path(logdir), limit
        try:
            os.makedirs(logdir, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {os.fspath(logdir)}: {error.strerror}. Choose another workdir.") from error
        self._begin()
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _begin(self) -> None:
        # Readers take the files of a directory in the order of their names: microseconds, then host and process.
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self.file = AppendFile(self._logdir / name)
        self._records = RecordWriter(self.file)
        self._write(Event(file_version="brain.Event:2", source_metadata=SourceMetadata(writer="niso")))

    def _write(self, event: Event) -> None:
        if self._limit is not None and self.file.error is None and self.file.size >= self._limit:
            self._records.close()
            self._begin()
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None:
        summary = Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, tensor=make_tensor_proto(np.asarray(value)), metadata=metadata)
        self._write(Event(step=step, summary=summary))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        summary = Summary()
        for tag, value in scalars.items():
            summary.MergeFrom(scalar_pb(tag, float(value)))
        self._write(Event(step=step, summary=summary))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images are uint8, HxWxC or BxHxWxC, C = 1 or 3."""
        summary = Summary()
        metadata = image_metadata.create_summary_metadata(None, None, converted_to_tensor=True)
        for tag, image in images.items():
            image_BxHxWxC = np.asarray(image)
            if image_BxHxWxC.dtype != np.uint8:
                raise TypeError(f"image {tag!r} must be uint8, not {image_BxHxWxC.dtype}")
            image_BxHxWxC = image_BxHxWxC[None] if image_BxHxWxC.ndim == 3 else image_BxHxWxC
            _, height, width, _ = image_BxHxWxC.shape
            pages = [_png(image_HxWxC) for image_HxWxC in image_BxHxWxC]
            tensor = make_tensor_proto([str(width).encode(), str(height).encode(), *pages])
            summary.value.add(tag=tag, tensor=tensor, metadata=metadata)
        self._write(Event(step=step, summary=summary))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        summary = Summary()
        for tag, text in texts.items():
            summary.MergeFrom(text_pb(tag, text))
        self._write(Event(step=step, summary=summary))

    def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None) -> None:
        """Histograms of the finite values: the others have no bucket, and would spoil the edges of the rest."""
        summary = Summary()
        metadata = histogram_metadata.create_summary_metadata(None, None)
        for tag, array in arrays.items():
            value_N = np.asarray(array, np.float64).ravel()
            buckets = (num_buckets or {}).get(tag, HISTOGRAM_BUCKETS)
            count_B, edge_E = np.histogram(value_N[np.isfinite(value_N)], buckets)
            bucket_Bx3 = np.stack([edge_E[:-1], edge_E[1:], count_B], axis=1)
            summary.value.add(tag=tag, tensor=make_tensor_proto(bucket_Bx3, np.float64), metadata=metadata)
        self._write(Event(step=step, summary=summary))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._write(Event(summary=hparams_pb(dict(hparams))))

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        raise NotImplementedError("niso writes no videos")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        raise NotImplementedError("niso writes no sound")

    def flush(self) -> None:
        self.file.check()

    def close(self) -> None:
        self._records.close()
        self.file.check()


def _png(image_HxWxC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HxWxC[..., 0] if image_HxWxC.shape[-1] == 1 else image_HxWxC).save(buffer, "PNG")
    return buffer.getvalue()


class JsonlWriter(MetricWriter):
    """Appends {"step": n, name: value, ...} to `workdir`/metrics.jsonl, one line per `write_scalars`.

    Numbers that JSON does not know are the strings "nan", "inf" and "-inf". All but scalars is ignored.

    Args:
        resume_step: where the run continues. Lines of later steps are dropped, as is the half line of a killed run; at
            0 nothing has happened yet, and the file starts empty. So the file of a resumed run is that of an unbroken
            one.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int = 0):
        path = Path(workdir) / METRICS_FILE
        drop_after(path, resume_step if resume_step > 0 else -1)
        self.file = AppendFile(path)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        if "step" in scalars:
            raise ValueError('a metric cannot be named "step": metrics.jsonl keeps the step under that name')
        values = {name: _json_number(float(value)) for name, value in scalars.items()}
        self.file.write(json.dumps({"step": int(step), **values}, allow_nan=False).encode() + b"\n")

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Any = None) -> None: ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None: ...

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None: ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None) -> None: ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

    def flush(self) -> None:
        self.file.check()

    def close(self) -> None:
        self.file.close()
        self.file.check()


def drop_after(path: str | os.PathLike[str], step: int) -> None:
    """Removes, atomically, every line of a metrics.jsonl that is of a later step than `step` or damaged.

    A file that needs no change is not touched, and a missing one stays missing.

    Raises:
        UserError: the file cannot be read or replaced.
    """
    path = Path(path)
    try:
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
        if len(kept) < len(lines):
            temporary = path.with_name(path.name + ".tmp")
            with open(temporary, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot rewrite {path}: {error.strerror}. Choose another workdir.") from error


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is damaged or has no newline (its writer was killed)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record["step"] if whole else None


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
