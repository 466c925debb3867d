"""TFRecord files without TensorFlow: the framing with its checksums, and the features of one record.

A record is: uint64 length, uint32 checksum of the length, the data, uint32 checksum of the data, all little-endian.
The checksum is CRC-32C, rotated and offset so that a checksum of checksums stays meaningful
(https://www.tensorflow.org/tutorials/load_data/tfrecord). The data of the files read here is a ``tf.train.Example``,
or a ``SequenceExample`` of which only the context is used: both begin with the same field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import google_crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from clipmill.pipeline.sources.record import DamagedVideo

__all__ = ["index_records", "masked_crc32c", "read_features", "read_record"]

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _LENGTH.size + _CHECKSUM.size
_FRAME_BYTES = _HEADER_BYTES + _CHECKSUM.size


def masked_crc32c(data: bytes) -> int:
    """The checksum that TFRecord files store."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def index_records(file: BinaryIO, file_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, bytes) of each record of a file, framing included; reads the headers only.

    If the file is cut or a length is damaged, the rest of the file is one last item; `read_record` reports the reason.
    """
    offset = 0
    while offset < file_bytes:
        file.seek(offset)
        num_bytes = _record_bytes(file.read(_HEADER_BYTES))
        if num_bytes is None or offset + num_bytes > file_bytes:
            yield offset, file_bytes - offset
            return
        yield offset, num_bytes
        offset += num_bytes


def _record_bytes(header: bytes) -> int | None:
    """Bytes of a record with its framing; None if the header is cut or damaged."""
    if len(header) < _HEADER_BYTES or masked_crc32c(header[: _LENGTH.size]) != _checksum(header[_LENGTH.size :]):
        return None
    return _LENGTH.unpack_from(header)[0] + _FRAME_BYTES


def _checksum(data: bytes) -> int:
    return _CHECKSUM.unpack(data)[0]


def read_record(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    """Reads the data of one record from `index_records`.

    Raises:
        DamagedVideo: a checksum differs, or the file ends within the record.
    """
    file.seek(offset)
    framed = file.read(num_bytes)
    expected_bytes = _record_bytes(framed[:_HEADER_BYTES])
    if expected_bytes is None:
        problem = "ends within" if len(framed) < _HEADER_BYTES else "is damaged in the length of"
        raise DamagedVideo(f"the file {problem} the record at byte {offset}; what follows cannot be read")
    if len(framed) < expected_bytes:
        raise DamagedVideo(
            f"the file ends within the record at byte {offset}: {len(framed)} of {expected_bytes} bytes are there"
        )
    data = framed[_HEADER_BYTES : expected_bytes - _CHECKSUM.size]
    if masked_crc32c(data) != _checksum(framed[expected_bytes - _CHECKSUM.size : expected_bytes]):
        raise DamagedVideo(f"the checksum of the record at byte {offset} differs")
    return data


def read_features(data: bytes) -> Mapping[str, Any]:
    """Features by name; each has ``bytes_list.value``, ``float_list.value`` and ``int64_list.value``.

    Raises:
        DamagedVideo: the data is not a serialised Example.
    """
    try:
        return _EXAMPLE.FromString(data).features.feature
    except DecodeError as error:
        raise DamagedVideo("the record is not a tf.train.Example") from error


def _example_type() -> Any:
    """The message types of tensorflow/core/example/feature.proto, declared here because every package with them is
    large.
    """
    file = descriptor_pb2.FileDescriptorProto(name="clipmill_example.proto", package="clipmill", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, Any, str | None, bool]) -> descriptor_pb2.DescriptorProto:
        described = file.message_type.add(name=name)
        for number, (field_name, kind, type_name, is_repeated) in enumerate(fields, start=1):
            label = field.LABEL_REPEATED if is_repeated else field.LABEL_OPTIONAL
            described.field.add(
                name=field_name, number=number, type=kind, label=label, type_name=type_name and f".clipmill.{type_name}"
            )
        return described

    message("BytesList", ("value", field.TYPE_BYTES, None, True))
    message("FloatList", ("value", field.TYPE_FLOAT, None, True))
    message("Int64List", ("value", field.TYPE_INT64, None, True))
    message(
        "Feature",
        ("bytes_list", field.TYPE_MESSAGE, "BytesList", False),
        ("float_list", field.TYPE_MESSAGE, "FloatList", False),
        ("int64_list", field.TYPE_MESSAGE, "Int64List", False),
    )
    features = message("Features", ("feature", field.TYPE_MESSAGE, "Features.FeatureEntry", True))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value",
        number=2,
        type=field.TYPE_MESSAGE,
        type_name=".clipmill.Feature",
        label=field.LABEL_OPTIONAL,
    )
    message("Example", ("features", field.TYPE_MESSAGE, "Features", False))
    pool = descriptor_pool.DescriptorPool()  # separate from the default pool, which may hold TensorFlow's types
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clipmill.Example"))


_EXAMPLE = _example_type()
