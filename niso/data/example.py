"""Example <-> bytes in the wire format of tf.train.Example, without TensorFlow."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

Value = bytes | np.ndarray
Example = dict[str, Value]


@dataclasses.dataclass(frozen=True)
class Field:
    """Type and shape of one entry of an example; dtype "bytes" is an opaque payload such as a JPEG (shape None).

    For arrays, shape None means one axis of any length.
    """

    dtype: str
    shape: tuple[int, ...] | None


Schema = dict[str, Field]


def _example_class() -> Any:
    """The message class of tf.train.Example, from a descriptor built here in a pool of its own.

    Field numbers are those of tensorflow/core/example/{example,feature}.proto; the private pool keeps it apart from a
    TensorFlow that may live in the same process.
    """
    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="niso/example.proto", package="niso", syntax="proto3")

    def add(owner: Any, name: str, number: int, type_: int, repeated: bool = False, ref: str = "") -> Any:
        label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
        return owner.field.add(name=name, number=number, type=type_, label=label, type_name=ref or None)

    add(file.message_type.add(name="BytesList"), "value", 1, kind.TYPE_BYTES, repeated=True)
    add(file.message_type.add(name="FloatList"), "value", 1, kind.TYPE_FLOAT, repeated=True)
    add(file.message_type.add(name="Int64List"), "value", 1, kind.TYPE_INT64, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), start=1):
        ref = f".niso.{name.title().replace('_', '')}"
        add(feature, name, number, kind.TYPE_MESSAGE, ref=ref).oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, kind.TYPE_STRING)
    add(entry, "value", 2, kind.TYPE_MESSAGE, ref=".niso.Feature")
    add(features, "feature", 1, kind.TYPE_MESSAGE, repeated=True, ref=".niso.Features.FeatureEntry")
    add(file.message_type.add(name="Example"), "features", 1, kind.TYPE_MESSAGE, ref=".niso.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("niso.Example"))


_Example = _example_class()


def _little_endian(field: Field) -> np.dtype:
    return np.dtype(field.dtype).newbyteorder("<")


def encode(example: Mapping[str, Value], schema: Schema) -> bytes:
    """The example as a serialised tf.train.Example; equal examples give equal bytes.

    int64 -> Int64List, float32 -> FloatList, bytes -> BytesList, and float64 and every other type -> BytesList of one
    raw little-endian C-ordered string (FloatList is 32 bits wide and would lose half of a pose).

    Raises:
        ValueError: names, types or shapes differ from the schema.
    """
    if example.keys() != schema.keys():
        raise ValueError(f"example has {sorted(example)}, the schema has {sorted(schema)}")
    proto = _Example()
    for name, field in schema.items():
        value, feature = example[name], proto.features.feature[name]
        if field.dtype == "bytes":
            if not isinstance(value, bytes):
                raise ValueError(f"{name}: expected bytes, got {type(value).__name__}")
            feature.bytes_list.value.append(value)
            continue
        array = np.asarray(value)
        fits = array.ndim == 1 if field.shape is None else array.shape == field.shape
        if array.dtype != np.dtype(field.dtype) or not fits:
            raise ValueError(f"{name}: expected {field.dtype} {field.shape}, got {array.dtype} {array.shape}")
        if field.dtype == "int64":
            feature.int64_list.value.extend(array.ravel().tolist())
        elif field.dtype == "float32":
            feature.float_list.value.extend(array.ravel().tolist())
        else:
            feature.bytes_list.value.append(array.astype(_little_endian(field)).tobytes())
    return proto.SerializeToString(deterministic=True)


def decode(data: bytes, schema: Schema) -> Example:
    """The example that `encode` wrote; arrays are writable copies.  Features outside the schema are ignored.

    Raises:
        ValueError: not a tf.train.Example, or a feature is missing or of another type or length than the schema says.
    """
    try:
        features = _Example.FromString(data).features.feature
    except message.DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return {name: _decode_feature(features, name, field) for name, field in schema.items()}


def _decode_feature(features: Any, name: str, field: Field) -> Value:
    """One value; features is the message's map."""
    if name not in features:
        raise ValueError(f"no feature {name!r}")
    feature = features[name]
    kind = {"int64": "int64_list", "float32": "float_list"}.get(field.dtype, "bytes_list")
    if feature.WhichOneof("kind") != kind:
        raise ValueError(f"{name}: expected a {kind}, found {feature.WhichOneof('kind')}")
    values = getattr(feature, kind).value
    if kind != "bytes_list":
        array = np.array(values, dtype=field.dtype)
    else:
        if len(values) != 1:
            raise ValueError(f"{name}: expected one string, found {len(values)}")
        if field.dtype == "bytes":
            return values[0]
        if len(values[0]) % np.dtype(field.dtype).itemsize:
            raise ValueError(f"{name}: {len(values[0])} bytes are no whole number of {field.dtype}")
        array = np.frombuffer(values[0], _little_endian(field)).astype(field.dtype)
    if field.shape is None:
        return array
    if array.size != int(np.prod(field.shape)):
        raise ValueError(f"{name}: {array.size} values do not fill the shape {field.shape}")
    return array.reshape(field.shape)
