"""Closed meshes to records for conformal shapes: python -m data_prep.shapes --root FOLDER --out RECORDS

Reads FOLDER/<class>/<mesh>.ply (or .obj, .off, .npz): closed surfaces of genus 0 in one piece, SHREC'11's for one. Each is mapped
to the sphere without distortion of angles and stored with its heat-kernel signature, there on a grid of latitudes and
longitudes. What is no such surface, or is mapped badly, is left out and named, with the reason; report.jsonl in RECORDS has
a line for every mesh. Classes are numbered in the order of their names. The unit of work is a shard, as in data_prep.images: a
run that was killed continues with the shards that are not finished. Many machines share the work with --task I/N, and --merge
(data_prep/tasks.py): which meshes are whose, and in which split, is a function of the names of all.

With --layout cshrec11 the folder is the published data set: base/<class>/<mesh>.ply are the meshes, base_sphere/<class>/<mesh>.ply
their maps to the sphere, vertex by vertex, and mobius_sphere/<class>/<mesh>/0.ply and so on these under random Möbius maps, which
are recognised and stored as such, 64 bytes each, to be trained and tested on instead of maps that niso draws
(--config.data.stored_maps=30); `maps_off` in the report says how well that goes, --without_maps leaves them alone. Tried on a
synthetic folder in this layout; the published files were not at hand. The folder mobius is not read.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_prep import mesh_files, parts, record_folder, shape_shard, tasks
from niso import folders
from niso.data import records
from niso.errors import UserError

DATASET = "shapes"
LAYOUTS = ("folder", "cshrec11")
LEFT_OUT = ("glasses", "lamp", "myScissor", "snake", "two_balls")  # classes of SHREC'11 that the published data set has not
TRAIN, TEST = 10, 4
_SIZE = 192
_MESHES_PER_SHARD = 5
_MOMENTS = ("mean_C", "square_C")
MOVED = "mobius_sphere"  # folder of the published data set

Splits = dict[str, list[shape_shard.Mesh]]


def prepare(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int = _SIZE,
    layout: str = "folder",
    train: int = TRAIN,
    test: int = TEST,
    split_seed: int = 0,
    exclude: Sequence[str] | None = None,
    without_maps: bool = False,
    workers: int = 1,
    shards: int | None = None,
    task: str | None = None,
    merge: bool = False,
    progress: bool = True,
) -> records.Manifest | None:
    """Makes what is missing of the records of a folder of meshes; returns their manifest (None from a task).

    Its facts are "classes", names in the order of their numbers, "maps", how many Möbius maps came with each mesh, and the "mean"
    and "std" of the signature's channels by the sphere's area, over the training meshes: those of the pixels of their randomly
    turned pictures.

    Args:
        root: the folder of classes, or that of the published data set.
        out: the folder of records; made if it does not exist.
        size: rows of the stored grid; it has twice as many columns.
        layout: "folder", or "cshrec11" for the published one.
        train: meshes of every class that are training data, chosen by hash of their names.
        test: those that are test data; what remains is not used.
        split_seed: of that choice.
        exclude: classes to leave out; by default none, or of the published data set LEFT_OUT.
        without_maps: do not look at the Möbius maps of the published data set.
        workers: processes; one means this one.
        shards: files per split, at most one per mesh; by default one per 5 meshes, at most 1024.
        task: "I/N": make one N-th of the shards, I from 0 to N - 1, in a folder that N tasks share, at once or not.
        merge: verify the shards of all tasks, and make the records of them: what one run would have left behind.
        progress: print progress (stderr) and the summary (stdout).

    Raises:
        UserError: see the message.
    """
    share = tasks.parse(task, merge)
    record_folder.check(
        size,
        workers,
        shards,
        ("layout", layout, layout in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
        ("train", train, train >= 1, "at least 1"),
        ("test", test, test >= 1, "at least 1"),
        ("split_seed", split_seed, split_seed >= 0, "at least 0"),
    )
    root, out = folders.named(root, "--root"), folders.named(out, "--out")
    meshes = find(root, layout, exclude, without_maps)
    splits = choose(meshes, train, test, split_seed)
    mesh_files.require(
        [file for of_split in splits.values() for mesh in of_split for file in (mesh.file, mesh.sphere, *mesh.moved) if file]
    )
    names = [file for of_split in splits.values() for mesh in of_split for file in (mesh.file, *mesh.moved)]
    options = {
        "size": size,
        "layout": layout,
        "train": train,
        "test": test,
        "split_seed": split_seed,
        "shards": shards,
        "source": hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16],
    }
    target = record_folder.Folder(
        out,
        DATASET,
        options,
        {split: record_folder.deal(split, of_split, shards, _MESHES_PER_SHARD) for split, of_split in splits.items()},
        units="meshes",
        changed=f"{root} has other meshes or Möbius maps than then, or others are excluded",
        empty="no usable mesh in split {split} (left out: {reasons}): are these closed surfaces of genus 0?",
        flags={"root": root, "exclude": None if exclude is None else list(exclude), "without_maps": without_maps},
        facts=lambda manifest: _facts(out, manifest, meshes),
    )

    def jobs(pending: record_folder.Plan[shape_shard.Mesh]) -> Iterator[shape_shard.Job]:
        for file, of_shard in pending.items():
            yield shape_shard.Job(str(root), str(out), file, size, of_shard)

    def summarise(kept: record_folder.Kept) -> None:
        lines = (out / record_folder.REPORT).read_text(encoding="utf-8").splitlines()
        for line in summary([json.loads(line) for line in lines], kept):
            print(line)

    return tasks.make(target, share, shape_shard.build, jobs, summarise, workers, progress)


def find(
    root: pathlib.Path, layout: str, exclude: Sequence[str] | None, without_maps: bool = False
) -> dict[str, list[shape_shard.Mesh]]:
    """Class -> its meshes, both sorted by name, without the excluded classes.

    Raises:
        UserError: no such folder, no mesh, a mesh without its map, meshes with different numbers of Möbius maps, or a class to
            exclude that is not there.
    """
    base, prefix, maps, moved = root, "", {}, {}
    if layout == "cshrec11":
        if missing := [name for name in ("base", "base_sphere") if folders.kind(root / name) != "folder"]:
            raise UserError(f"no folder {root / missing[0]}: set --root to the published data set, or leave out --layout")
        base, prefix, maps = root / "base", "base/", mesh_files.find(root / "base_sphere")
        moved = {
            path.relative_to(root / MOVED).as_posix(): tuple(f"{MOVED}/{file}" for file in mesh_files.numbered(path, root / MOVED))
            for path in sorted(root.glob(f"{MOVED}/[!.]*/[!.]*"))
            if not without_maps and folders.kind(path) == "folder"
        }
    found = mesh_files.find(base)
    if unknown := sorted(set(exclude or ()) - set(found)):
        raise UserError(f"--exclude {unknown[0]}: there is no such class in {base}, only {', '.join(found)}")
    excluded = (LEFT_OUT if layout == "cshrec11" else ()) if exclude is None else exclude
    chosen = [category for category in found if category not in excluded]
    meshes: dict[str, list[shape_shard.Mesh]] = {}
    for label, category in enumerate(chosen):
        meshes[category] = []
        for name, file in found[category].items():
            sphere = maps.get(category, {}).get(name) if maps else None
            if maps and sphere is None:
                raise UserError(f"{base / file} has no map in {root / 'base_sphere' / category}: add it, or take the mesh away")
            map_file = None if sphere is None else f"base_sphere/{sphere}"
            moved_files = moved.get(f"{category}/{name}", ())
            meshes[category].append(shape_shard.Mesh(category, label, name, prefix + file, map_file, moved_files))
    if not meshes:
        raise UserError(f"every class in {base} is excluded: name fewer with --exclude")
    counts = {len(mesh.moved): mesh.file for of_class in meshes.values() for mesh in of_class}
    if moved and max(counts) == 0:
        raise UserError(f"{root / MOVED} has no mesh of those in {base} ({MOVED}/CLASS/MESH/0.ply, ...): set --without_maps")
    if len(counts) > 1:
        (fewest, of), most = min(counts.items()), max(counts)
        raise UserError(f"{of} in {root} has {fewest} maps in {MOVED}, others {most}: give each as many, or set --without_maps")
    return meshes


def choose(meshes: dict[str, list[shape_shard.Mesh]], train: int, test: int, seed: int) -> Splits:
    """So many meshes of every class for each split: a function of the seed and the names, whatever their formats.

    Raises:
        UserError: a class has too few.
    """
    splits: Splits = {"train": [], "test": []}
    for category, of_class in meshes.items():
        if len(of_class) < train + test:
            remedy = "choose a smaller --train or --test, or --exclude it"
            raise UserError(f"class {category} has {len(of_class)} meshes, {train} + {test} are asked for: {remedy}")
        shuffled = sorted(of_class, key=lambda mesh: _place(seed, mesh))
        splits["train"] += sorted(shuffled[:train], key=lambda mesh: mesh.name)
        splits["test"] += sorted(shuffled[train : train + test], key=lambda mesh: mesh.name)
    return splits


def _place(seed: int, mesh: shape_shard.Mesh) -> bytes:
    return hashlib.blake2b(f"{seed}/{mesh.category}/{mesh.name}".encode(errors="surrogateescape"), digest_size=8).digest()


def summary(reports: parts.Reports, kept: record_folder.Kept) -> list[str]:
    """What became of the meshes, in a few lines."""
    lines = []
    for split, sequences in kept.items():
        per_class = collections.Counter(sequence.category for sequence in sequences)
        least = min(per_class.values(), default=0)
        lines.append(f"{split}: {len(sequences)} meshes of {len(per_class)} classes, {least} or more of each")
    good = [report for report in reports if report["accepted"]]
    if good:
        ratio_N, vertices_N = (np.array([report[key] for report in good]) for key in ("distortion", "vertices"))
        flipped = 100 * np.mean([report["flipped"] for report in good])
        even = 100 * np.mean(ratio_N < 1.3)
        lines.append(f"accepted: {len(good)} of {len(reports)} meshes, {vertices_N.mean():.0f} vertices on average")
        lines.append(
            f"quasi-conformal ratio: mean {ratio_N.mean():.3f}, below 1.3 for {even:.0f} %; flipped faces: {flipped:.3g} %"
        )
        if any("maps_off" in report for report in good):
            lines.append(
                f"Möbius maps of each mesh found; the worst is {max(report['maps_off'] for report in good):.2g} off on average"
            )
    return lines


def _facts(out: pathlib.Path, manifest: records.Manifest, meshes: dict[str, list[shape_shard.Mesh]]) -> dict[str, Any]:
    """Those of `prepare`."""
    schema = records.surface(manifest.size)
    reader = records.Reader(out, "train", {name: schema[name] for name in _MOMENTS}, manifest)
    found = [reader.read(one.shard, range(one.start, one.start + one.length))[0] for one in reader.sequences]
    mean_C, square_C = (np.mean([np.asarray(example[name]) for example in found], axis=0) for name in _MOMENTS)
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
    maps = len(next(iter(meshes.values()))[0].moved)
    return {"classes": sorted(meshes), "maps": maps, "mean": mean_C.tolist(), "std": std_C.tolist()}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 after a message to the user, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.shapes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--root", required=True, help="folder of classes, each a folder of meshes (.ply .obj .off .npz)")
    parser.add_argument("--out", required=True, help="folder for the records")
    parser.add_argument("--layout", default="folder", help="folder, or cshrec11 for the published data set (folder)")
    parser.add_argument("--size", type=int, default=_SIZE, help=f"rows of the stored grid, of twice as many columns ({_SIZE})")
    parser.add_argument("--train", type=int, default=TRAIN, help=f"training meshes of every class ({TRAIN})")
    parser.add_argument("--test", type=int, default=TEST, help=f"test meshes of every class ({TEST})")
    parser.add_argument("--split_seed", type=int, default=0, help="of the choice of these (0)")
    parser.add_argument("--exclude", nargs="*", help=f"classes to leave out (none; of cshrec11 {' '.join(LEFT_OUT)})")
    parser.add_argument("--without_maps", action="store_true", help="of cshrec11: do not look at mobius_sphere")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    parser.add_argument("--shards", type=int, help=f"files per split (one per {_MESHES_PER_SHARD} meshes, at most 1024)")
    tasks.add_flags(parser)
    return record_folder.command_line(prepare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
