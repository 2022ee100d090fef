"""Records: the wire format against an independent parser, and damage of every kind."""

import concurrent.futures
import dataclasses
import json
import pickle
import struct

import numpy as np
import pytest

from niso.data import files, records
from niso.errors import UserError

_COUNT = 12


def _example(number: int) -> records.Example:
    rng = np.random.default_rng(number)
    return {
        "image_jpeg": rng.bytes(3000 + number),
        "camera_to_world_4x4": rng.normal(size=(4, 4)),
        "intrinsics_3x3": rng.normal(size=(3, 3)),
        "frame_number": np.asarray(number, np.int64),
    }


def _assert_equal(a: records.Example, b: records.Example) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, bytes):
            assert value == b[name]
        else:
            np.testing.assert_array_equal(value, b[name], strict=True)


@pytest.fixture
def root(tmp_path):
    """A folder with one split of two shards and two sequences."""
    shards, sequences = [], []
    for i in range(2):
        name = f"train-{i:05d}-of-00002.array_record"
        with records.ShardWriter(tmp_path / name) as writer:
            for number in range(_COUNT):
                writer.write(records.encode(_example(100 * i + number), records.FRAME))
        shards.append(records.describe_shard(tmp_path / name, writer.count))
        sequences.append(records.Sequence(f"{i}_0_0", "toy", name, 2, _COUNT - 2, None if i else 1.5))
    records.write_index(tmp_path, "train", sequences)
    records.Manifest(1, "toy", 8, {"a": 1}, {"train": tuple(shards)}, {"frames": 3}).write(tmp_path)
    return tmp_path


def _shard(i: int = 0) -> str:
    return f"train-{i:05d}-of-00002.array_record"


def _read(root, shard=None, numbers=(0,)):
    return records.Reader(root, "train", records.FRAME).read(shard or _shard(), numbers)


# ---- wire format -----------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_inverse():
    schema = records.FRAME | {
        "weights": records.Field("float32", (2, 3)),
        "list": records.Field("int64", None),
        "pixels": records.Field("uint8", (4,)),
    }
    example = _example(3) | {
        "weights": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        "list": np.array([-1, 2**62, -(2**63)]),
        "pixels": np.array([0, 1, 127, 255], np.uint8),
    }
    data = records.encode(example, schema)
    _assert_equal(example, records.decode(data, schema))
    assert data == records.encode(dict(reversed(example.items())), schema)  # the order of the keys does not matter


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """(field number, content) of a message that has length-delimited fields only."""
    at, found = 0, []
    while at < len(data):
        tag, at = _varint(data, at)
        assert tag & 7 == 2, "every field of an Example is length-delimited (lists are packed)"
        length, at = _varint(data, at)
        found.append((tag >> 3, data[at : at + length]))
        at += length
    assert at == len(data)
    return found


def test_the_wire_format_is_that_of_tf_train_example():
    # Read by hand from tensorflow/core/example/{example,feature}.proto: Example.features = 1, Features.feature = 1
    # (map: key = 1, value = 2), Feature.{bytes_list, float_list, int64_list} = 1, 2, 3, value = 1 in each list.
    schema = records.FRAME | {"weights": records.Field("float32", (3,))}
    example = _example(300) | {"weights": np.array([1.5, -2, 3], np.float32)}
    ((number, features),) = _fields(records.encode(example, schema))
    assert number == 1
    found = {}
    for number, entry in _fields(features):
        (key_number, key), (value_number, value) = _fields(entry)
        ((kind, values),) = _fields(value)
        ((list_number, content),) = _fields(values)
        assert (number, key_number, value_number, list_number) == (1, 1, 2, 1)
        found[key.decode()] = kind, content
    assert found.keys() == schema.keys()
    assert found["image_jpeg"] == (1, example["image_jpeg"])
    assert found["camera_to_world_4x4"] == (1, struct.pack("<16d", *example["camera_to_world_4x4"].ravel()))
    assert found["weights"] == (2, struct.pack("<3f", 1.5, -2, 3))
    kind, content = found["frame_number"]
    assert (kind, _varint(content, 0)) == (3, (300, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_number": np.asarray(1, np.int32)}, "frame_number"),
        ({"camera_to_world_4x4": np.eye(3)}, "camera_to_world_4x4"),
        ({"image_jpeg": "text"}, "image_jpeg"),
        ({"extra": b""}, "extra"),
    ],
)
def test_encode_refuses_what_the_schema_does_not_say(change, message):
    with pytest.raises(ValueError, match=message):
        records.encode(_example(0) | change, records.FRAME)


@pytest.mark.parametrize(
    "schema",
    [
        {"missing": records.Field("int64", ())},
        {"frame_number": records.Field("float32", ())},
        {"intrinsics_3x3": records.Field("float64", (4, 4))},
        {"intrinsics_3x3": records.Field("bytes", None), "image_jpeg": records.Field("float64", (9,))},
    ],
)
def test_decode_refuses_what_does_not_fit_the_schema(schema):
    data = records.encode(_example(0), records.FRAME)
    with pytest.raises(ValueError, match=next(iter(schema)) if len(schema) == 1 else "image_jpeg"):
        records.decode(data, schema)
    with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
        records.decode(data[:-7], records.FRAME)


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_reader_reads_the_records_asked_for_in_that_order(root):
    reader = records.Reader(root, "train", records.FRAME)
    assert [s.name for s in reader.sequences] == ["0_0_0", "1_0_0"] and reader.sequences[0].quality == 1.5
    assert reader.manifest == records.Manifest.read(root) and reader.manifest.left_out == {"frames": 3}
    for example, number in zip(reader.read(_shard(1), [7, 0, 7]), [107, 100, 107], strict=True):
        _assert_equal(example, _example(number))
    with pytest.raises(IndexError):
        reader.read(_shard(), [_COUNT])
    with pytest.raises(IndexError):
        reader.read(_shard(), [-1])


def test_reader_survives_pickling_and_threads(root):
    reader = records.Reader(root, "train", records.FRAME)
    reader.read(_shard(), [0])
    copy = pickle.loads(pickle.dumps(reader))
    order = np.random.default_rng(0).permutation(2 * _COUNT * 20) % (2 * _COUNT)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: copy.read(_shard(n // _COUNT), [n % _COUNT])[0], order))
    for example, n in zip(found, order, strict=True):
        assert example["frame_number"] == 100 * (n // _COUNT) + n % _COUNT


def test_few_open_files_are_enough(root, monkeypatch):
    monkeypatch.setattr(records.resource, "getrlimit", lambda _: (2, 2))
    monkeypatch.setattr(records, "_FEWEST_OPEN", 1)
    reader = records.Reader(root, "train", records.FRAME)
    for n in range(2 * _COUNT):
        assert reader.read(_shard(n % 2), [n // 2])[0]["frame_number"] == 100 * (n % 2) + n // 2
        assert len(reader._open_files) == 1


def _one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_flipped_byte_is_found_and_hurts_its_record_alone(root):
    path = root / _shard()
    data = bytearray(path.read_bytes())
    at = data.index(_example(5)["image_jpeg"]) + 1000
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        _read(root, numbers=[4, 5, 6])
    message = _one_line(error)
    assert str(path) in message and "record 5" in message and "delete that file and run" in message
    for example, number in zip(_read(root, numbers=[4, 6]), [4, 6], strict=True):
        _assert_equal(example, _example(number))


@pytest.mark.parametrize("cut", [1, 3000, 60_000])
def test_a_truncated_shard_is_refused(root, cut):
    path = root / _shard()
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError) as error:
        _read(root)
    message = _one_line(error)
    assert str(path) in message and "bytes" in message and "delete that file and run" in message
    _read(root, _shard(1))  # the other shard is not affected


def test_a_shard_of_the_right_size_and_the_wrong_content_is_refused(root):
    path = root / _shard()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"train-00000.*(cannot be opened|records, the manifest says)"):
        _read(root)


def test_missing_files_are_named_with_the_remedy(root, tmp_path):
    with pytest.raises(UserError) as error:
        records.Reader(tmp_path / "nothing", "train", records.FRAME)
    assert f"python -m data_prep.DATASET --out {tmp_path / 'nothing'}" in _one_line(error)
    with pytest.raises(UserError, match=r"no split 'test', only train"):
        records.Reader(root, "test", records.FRAME)
    (root / _shard()).unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00002\.array_record is missing; run"):
        _read(root)
    (root / "index-train.json").unlink()
    with pytest.raises(UserError, match=r"index-train\.json"):
        _read(root)


_MALFORMED = ["{", "{}", "[1]", '"text"', "null", '[{"name": 1}]']


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", "[]"), *((name, c) for name in ("manifest.json", "index-train.json") for c in _MALFORMED)],
)
def test_malformed_json_is_one_line(root, name, content):
    (root / name).write_text(content)
    with pytest.raises(UserError, match=name) as error:
        _read(root)
    assert "delete that file" in _one_line(error)


def test_another_format_and_a_foreign_index_are_refused(root):
    manifest = json.loads((root / "manifest.json").read_text())
    records.write_json(root / "manifest.json", manifest | {"format": 7})
    with pytest.raises(UserError, match=r"format 7, this niso reads format 1"):
        _read(root)
    records.write_json(root / "manifest.json", manifest)
    _read(root)
    for change in ({"shard": "other"}, {"start": -1}, {"length": _COUNT}):
        sequence = records.Sequence("a", "toy", _shard(), 2, 3, None)
        records.write_index(root, "train", [dataclasses.replace(sequence, **change)])
        with pytest.raises(UserError, match=r"does not fit the manifest at sequence a"):
            _read(root)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.array_record"
    with pytest.raises(ZeroDivisionError), records.ShardWriter(path) as writer:
        writer.write(b"x" * 200_000)
        assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(UserError, match=r"cannot write .*b\.array_record.*No such file"),
        records.ShardWriter(tmp_path / "no" / "b.array_record"),
    ):
        pass
    with pytest.raises(UserError, match=r"cannot write .*c\.json: No such file"):
        records.write_json(tmp_path / "no" / "c.json", 1)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    for module in (records, files):
        monkeypatch.setattr(module, "temporary", lambda _: records.pathlib.Path("/dev/full"))
    monkeypatch.setattr(records.pathlib.Path, "unlink", lambda *_, **__: None)
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.array_record: .*No space left on device"),
        records.ShardWriter(tmp_path / "a.array_record") as writer,
    ):
        for _ in range(100):
            writer.write(bytes(100_000))
    with pytest.raises(UserError, match=r"cannot write .*b\.json: No space left on device"):
        records.write_json(tmp_path / "b.json", "x")
