"""Files of triangle meshes, in folders that are their classes: PLY, OBJ and OFF (by trimesh), and NPZ."""

import io
import pathlib
import zipfile

import numpy as np

from data_prep import sources
from niso import folders
from niso.errors import UserError

SUFFIXES = (".npz", ".obj", ".off", ".ply")


def find(root: pathlib.Path) -> dict[str, dict[str, str]]:
    """Class -> name of a mesh -> its file as a path within root, both sorted: root/<class>/<name>.<suffix>.

    Names that begin with a dot do not count, nor do folders without a mesh.

    Raises:
        UserError: there is no such folder or no mesh in it, or two files are the same mesh in two formats.
    """
    if folders.kind(root) != "folder":
        raise UserError(f"no folder {root}: set --root to a folder of classes, each a folder of meshes ({', '.join(SUFFIXES)})")
    found: dict[str, dict[str, str]] = {}
    for path in sorted(root.glob("[!.]*/[!.]*")):
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        of_class = found.setdefault(path.parent.name, {})
        if path.stem in of_class:
            raise UserError(f"{of_class[path.stem]} and {path.relative_to(root)} in {root} have one name: keep one of them")
        of_class[path.stem] = path.relative_to(root).as_posix()
    if not found:
        raise UserError(f"no mesh in {root}/CLASS/ ({', '.join(SUFFIXES)}): set --root to a folder of classes")
    return found


def numbered(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
    """The meshes 0.ply, 1.ply, ... of one folder in the order of their numbers, as paths within root; others do not count.

    Raises:
        UserError: a number is missing, or there twice.
    """
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.stem.isdecimal()]
    paths.sort(key=lambda path: (int(path.stem), path.name))
    if [int(path.stem) for path in paths] != list(range(len(paths))):
        raise UserError(f"the meshes in {folder} are not numbered 0 to {len(paths) - 1}, each once: restore what is missing")
    return [path.relative_to(root).as_posix() for path in paths]


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(vertex_Vx3 float64, face_Fx3) of a file, vertices in its order; larger polygons are split into triangles.

    An NPZ file holds two arrays of these names.

    Raises:
        UserError: it is no mesh or damaged, or trimesh is missing (`require`).
        OSError: the operating system cannot read it; has a number.
        LostError: the bucket cannot be read.
    """
    if path.suffix.lower() != ".npz":
        require([path.name])
    source, suffix = sources.opened(path), path.suffix.lower()
    if isinstance(source, pathlib.Path):
        with open(source, "rb") as file:
            file.read(1)  # what trimesh says of files that cannot be read names no reason
    try:
        return _read_npz(source) if suffix == ".npz" else _read_mesh(source, suffix)
    except Exception as error:  # parsers of broken files raise whatever they stumble over
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"no mesh can be read from it: {reason}") from error


def require(files: list[str]) -> None:
    """Raises a UserError if one of these files needs trimesh and it is not installed."""
    wanting = [file for file in files if not file.lower().endswith(".npz")]
    if wanting:
        try:
            import trimesh  # noqa: F401
        except ImportError:
            raise UserError(f"meshes such as {wanting[0]} need trimesh: pip install -e '.[prep]'") from None


def _read_npz(source: pathlib.Path | io.BytesIO) -> tuple[np.ndarray, np.ndarray]:
    if not zipfile.is_zipfile(source):
        raise ValueError("it is no NPZ file of vertex_Vx3 and face_Fx3")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    with np.load(source) as arrays:
        return np.asarray(arrays["vertex_Vx3"], np.float64), arrays["face_Fx3"]


def _read_mesh(source: pathlib.Path | io.BytesIO, suffix: str) -> tuple[np.ndarray, np.ndarray]:
    import trimesh

    # As it is: merged or reordered vertices would not be those of its map to the sphere, which may be in another file.
    as_it_is = {"process": False, "maintain_order": True, "skip_materials": True, "group_material": False}
    mesh = trimesh.load_mesh(source, file_type=suffix.removeprefix("."), **as_it_is)
    return np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
