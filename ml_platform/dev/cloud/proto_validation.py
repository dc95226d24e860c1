"""Checks a request against the constraints that Yandex publishes in its .proto files.

The constraints are options of the fields (``yandex.cloud.validation_pb2``): required, length, size, pattern, value,
map_key, bytes, unique, and exactly_one of a oneof. They are read from the descriptors, so that a new version of the
protos brings its own.
"""
# ruff: noqa: TID253 - imported with the stand-in for the API, which its users import where they start it

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from yandex.cloud import validation_pb2 as rules

NUMBER = r"-?\d+(?:\.\d+)?"
DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
BOUND = rf"(?:{NUMBER})(?:{'|'.join(DURATION_UNITS)})?"
WRAPPERS = {f"google.protobuf.{name}Value" for name in ("Int64", "UInt64", "Int32", "UInt32", "Double", "Float")}


def violations(message: Any, path: str = "") -> list[str]:
    """What is wrong with a protobuf `message`, each as ``field: reason``; an empty list if nothing is.

    Raises ValueError for an annotation whose notation is not known.
    """
    return list(_violations(message, path))


def _violations(message: Any, path: str) -> Iterator[str]:
    for oneof in message.DESCRIPTOR.oneofs:
        if oneof.GetOptions().Extensions[rules.exactly_one] and message.WhichOneof(oneof.name) is None:
            yield f"{path}{oneof.name}: exactly one of {', '.join(f.name for f in oneof.fields)} must be set"
    for field in message.DESCRIPTOR.fields:
        name, value = path + field.name, getattr(message, field.name)
        options = field.GetOptions().Extensions
        if field.has_presence and not message.HasField(field.name):
            if options[rules.required]:
                yield f"{name}: Field is required"
            # What is absent breaks no other rule.
            continue
        if field.is_repeated:
            yield from _check_repeated(field, options, value, name)
        else:
            if options[rules.required] and field.type != FieldDescriptor.TYPE_MESSAGE and not value:
                yield f"{name}: Field is required"
                continue
            yield from _check_value(field, options, value, name)


def _check_repeated(field: Any, options: Any, values: Any, name: str) -> Iterator[str]:
    if options[rules.required] and not values:
        yield f"{name}: Field is required"
    if (size := options[rules.size]) and not within(size)(len(values)):
        yield f"{name}: The number of elements must be {size}, and is {len(values)}"
    if _is_map(field):
        key_rules = options[rules.map_key]
        for key, value in values.items():
            yield from _check_text(key, key_rules.length, key_rules.pattern, f"{name}[{key}] (key)")
            if key_rules.value and not within(key_rules.value)(key):
                yield f"{name}[{key}] (key): Value must be {key_rules.value}"
            yield from _check_value(field.message_type.fields_by_name["value"], options, value, f"{name}[{key}]")
        return
    if options[rules.unique]:
        seen = [value if isinstance(value, (str, int, bytes)) else value.SerializeToString() for value in values]
        if len(set(seen)) < len(seen):
            yield f"{name}: Elements must be unique"
    for index, value in enumerate(values):
        yield from _check_value(field, options, value, f"{name}[{index}]")


def _check_value(field: Any, options: Any, value: Any, name: str) -> Iterator[str]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        kind = field.message_type.full_name
        number: float | None = None
        if kind == Duration.DESCRIPTOR.full_name:
            number = value.seconds + value.nanos / 1e9
        elif kind in WRAPPERS:
            number = value.value
        if (allowed := options[rules.value]) and number is not None and not within(allowed)(number):
            yield f"{name}: Value must be {allowed}, and is {number:g}"
        if (limit := options[rules.bytes]) and not within(limit)(value.ByteSize()):
            yield f"{name}: Size in bytes must be {limit}"
        if number is None:
            yield from _violations(value, f"{name}.")
    elif field.type == FieldDescriptor.TYPE_STRING:
        yield from _check_text(value, options[rules.length], options[rules.pattern], name)
        if (limit := options[rules.bytes]) and not within(limit)(len(value.encode())):
            yield f"{name}: Size in bytes must be {limit}"
    elif field.type == FieldDescriptor.TYPE_ENUM:
        if value not in field.enum_type.values_by_number:
            yield f"{name}: {value} is no value of {field.enum_type.full_name}"
    elif (allowed := options[rules.value]) and not within(allowed)(value):
        yield f"{name}: Value must be {allowed}, and is {value}"


def _check_text(text: str, length: str, pattern: str, name: str) -> Iterator[str]:
    if length and not within(length)(len(text)):
        yield f"{name}: Length must be {length}, and is {len(text)}"
    if pattern and not re.fullmatch(pattern, text):
        yield f"{name}: Value must match {pattern}"


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@functools.cache
def within(allowed: str) -> Callable[[float], bool]:
    """Whether a number is in the range `allowed`: ``<=50``, ``<256``, ``>0``, ``1-63``, ``20``, ``1m-10m``.

    Durations are compared in seconds. Raises ValueError for another notation.
    """
    if match := re.fullmatch(rf"(<=|<|>=|>)({BOUND})", allowed):
        bound = _number(match[2])
        return {
            "<=": lambda number: number <= bound,
            "<": lambda number: number < bound,
            ">=": lambda number: number >= bound,
            ">": lambda number: number > bound,
        }[match[1]]
    if match := re.fullmatch(rf"({BOUND})(?:-({BOUND}))?", allowed):
        low, high = _number(match[1]), _number(match[2] or match[1])
        return lambda number: low <= number <= high
    raise ValueError(f"cannot read the range {allowed!r} of a proto annotation")


def _number(text: str) -> float:
    match = re.fullmatch(rf"({NUMBER})([a-z]*)", text)
    assert match is not None
    return float(match[1]) * DURATION_UNITS.get(match[2], 1.0)
