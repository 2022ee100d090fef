"""One shard of surfaces: meshes to the sphere, their heat-kernel signature on its grid, and a report of every one."""

import collections
import dataclasses
import pathlib
from typing import Any

import numpy as np

from data_prep import conformal, mesh_files, record_folder, sphere_raster
from niso import folders
from niso.data import records
from niso.errors import LostError, UserError

_LEVELS = np.iinfo(np.uint16).max


@dataclasses.dataclass(frozen=True)
class Mesh:
    """One mesh: its class, the class's number, its name, its file within the root; where they are given that of its map to the
    sphere, and those of this one under Möbius maps."""

    category: str
    label: int
    name: str
    file: str
    sphere: str | None
    moved: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to make: its file name in the folder `out`, and the meshes of it, of files within `root`."""

    root: str
    out: str
    file: str
    size: int
    meshes: tuple[Mesh, ...]


def build(job: Job) -> record_folder.Part:
    """Makes the shard; depends on nothing but the job and the files, so a second run gives equal bytes.  Reports every mesh."""
    left_out: collections.Counter[str] = collections.Counter()
    named, sequences, reports, schema = [], [], [], records.surface(job.size)
    root = folders.named(job.root)
    with records.ShardWriter(folders.named(job.out) / job.file) as writer:
        for mesh in job.meshes:
            report: dict[str, Any] = {"file": mesh.file, "class": mesh.category, "split": job.file.partition("-")[0]}
            try:
                result = _mapped(root, mesh, report)
                map_KxXxY = _moebius_maps(root, mesh, result.sphere_Vx3, report)
            except _UselessError as why:
                left_out[why.kind] += 1
                named.append(f"{mesh.file} ({why})")
                report |= {"accepted": False, "reason": str(why)}
            else:
                writer.write(records.encode(_record(mesh, result, map_KxXxY, job.size), schema))
                place = (job.file, writer.count - 1, 1)
                sequences.append(records.Sequence(mesh.name, mesh.category, *place, round(result.distortion, 6)))
                report |= {"accepted": True}
            reports.append(report)
    return record_folder.note(writer, sequences, left_out, named, reports)


class _UselessError(Exception):
    """A mesh is of no use; `kind` is how such ones are counted."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


def _mapped(root: pathlib.Path, mesh: Mesh, report: dict[str, Any]) -> conformal.Conformal:
    """The mesh on the sphere, good enough to be a datum; adds what it measures to the report."""
    (vertex_Vx3, face_Fx3), given = _read(root / mesh.file), mesh.sphere and _read(root / mesh.sphere)
    report |= {"vertices": len(vertex_Vx3), "faces": len(face_Fx3)}
    try:
        result = conformal.process(vertex_Vx3, face_Fx3, given[0] if given else None)
    except UserError as error:
        raise _UselessError("meshes that cannot be mapped", str(error)) from error
    quality = {"flipped": result.flipped, "distortion": result.distortion, "lost": result.lost}
    # Whatever is no number below a million, infinity and NaN too, is a million: JSON has no others.
    report |= {name: round(value, 6) if value < 1e6 else 1e6 for name, value in quality.items()}
    report |= {"iterations": result.iterations}
    if not conformal.accepted(result):
        count = round(result.flipped * len(face_Fx3))
        measured = f"{count} of {len(face_Fx3):,} faces flipped, mean quasi-conformal ratio {result.distortion:.3g}"
        raise _UselessError("meshes whose map is not conformal", f"{measured}: give a finer or more even mesh")
    return result


def _moebius_maps(root: pathlib.Path, mesh: Mesh, sphere_Vx3: np.ndarray, report: dict[str, Any]) -> np.ndarray:
    """map_KxXxY, 4 x 4, float32: the Möbius maps (niso/geometry/moebius.py) that take the mesh on the sphere to each moved one;
    adds to the report how far off the worst is."""
    found_KxXxY, worst = np.empty((len(mesh.moved), 4, 4), np.float32), 0.0
    for k, file in enumerate(mesh.moved):
        moved_Vx3 = _read(root / file)[0]
        try:
            found_KxXxY[k], off = conformal.moebius_map(sphere_Vx3, moved_Vx3)
        except UserError as error:
            why = f"{file}: {error}; --without_maps does not look at them"
            raise _UselessError("meshes with a Möbius map that is none", why) from error
        worst = max(worst, off)
    if mesh.moved:
        report["maps_off"] = round(worst, 6)
    return found_KxXxY


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        return mesh_files.read(path)
    except OSError as error:
        record_folder.blame_the_disk(path, error)
        raise
    except LostError:
        raise
    except UserError as error:
        raise _UselessError("unreadable meshes", str(error)) from error


def _record(mesh: Mesh, result: conformal.Conformal, map_KxXxY: np.ndarray, size: int) -> records.Example:
    """What is stored of an accepted mesh."""
    point_HxWx3 = sphere_raster.grid(size)
    sampled = sphere_raster.interpolate(result.sphere_Vx3, result.face_Fx3, result.hks_VxT, point_HxWx3.reshape(-1, 3))
    signal_HxWxC = sampled.reshape(*point_HxWx3.shape[:2], -1)
    level_HxWxC, low_C, step_C = quantised(signal_HxWxC)
    weight_H = sphere_raster.areas(size)
    return {
        "signal_HxWxC": level_HxWxC,
        "low_C": low_C,
        "step_C": step_C,
        "label": np.int64(mesh.label),
        "mean_C": np.einsum("h,hwc->c", weight_H, signal_HxWxC),
        "square_C": np.einsum("h,hwc->c", weight_H, signal_HxWxC**2),
        "sphere_Vx3": result.sphere_Vx3.ravel(),
        "face_Fx3": result.face_Fx3.ravel(),
        "hks_VxC": result.hks_VxT.ravel(),
        "map_KxXxY": map_KxXxY.ravel(),
        "class": mesh.category.encode(),
        "name": mesh.name.encode(),
        **{name: np.float64(getattr(result, name)) for name in ("flipped", "distortion", "lost")},
    }


def quantised(signal_HxWxC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(level_HxWxC uint16, low_C, step_C): low + step · level is the signal, to half a 65,535th of the channel's range."""
    low_C = signal_HxWxC.min(axis=(0, 1)).astype(np.float32)
    step_C = ((signal_HxWxC.max(axis=(0, 1)) - low_C) / _LEVELS).astype(np.float32)
    level_HxWxC = np.rint((signal_HxWxC - low_C) / np.where(step_C > 0, step_C, 1))
    return np.clip(level_HxWxC, 0, _LEVELS).astype(np.uint16), low_C, step_C
