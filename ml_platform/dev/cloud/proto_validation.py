"""Validation of requests against the constraints in Yandex's published .proto files.

Constraints are field options (``yandex.cloud.validation_pb2``). Those used by Data Proc requests are checked: required,
length, size, pattern, value and map_key. They are read from the descriptors, so a new version of the protos needs no
change here.
"""
# ruff: noqa: TID253 - only the stand-in imports this, and it needs the SDK anyway

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from yandex.cloud import validation_pb2 as rules

DURATION_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
BOUND = re.compile(r"(\d+)([smh]?)")


def violations(message: Any) -> list[str]:
    """List the constraints that a protobuf `message` violates, each as ``field: reason``.

    Raises ValueError for a range of unknown notation.
    """
    return list(_violations(message, ""))


def _violations(message: Any, path: str) -> Iterator[str]:
    for field in message.DESCRIPTOR.fields:
        name, value, options = path + field.name, getattr(message, field.name), field.GetOptions().Extensions
        present = message.HasField(field.name) if field.has_presence else bool(value)
        if options[rules.required] and not present:
            yield f"{name}: Field is required"
        elif field.is_repeated:
            yield from _check_repeated(field, options, value, name)
        elif present or not field.has_presence:
            yield from _check_value(field, options, value, name)


def _check_repeated(field: Any, options: Any, values: Any, name: str) -> Iterator[str]:
    if (size := options[rules.size]) and not within(size)(len(values)):
        yield f"{name}: The number of elements must be {size}, is {len(values)}"
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key_rules = options[rules.map_key]
        for key, value in values.items():
            yield from _check_text(key, key_rules.length, key_rules.pattern, f"{name}[{key}] (key)")
            yield from _check_value(field.message_type.fields_by_name["value"], options, value, f"{name}[{key}]")
    else:
        for index, value in enumerate(values):
            yield from _check_value(field, options, value, f"{name}[{index}]")


def _check_value(field: Any, options: Any, value: Any, name: str) -> Iterator[str]:
    if field.type == FieldDescriptor.TYPE_STRING:
        yield from _check_text(value, options[rules.length], options[rules.pattern], name)
    elif field.type == FieldDescriptor.TYPE_ENUM:
        if value not in field.enum_type.values_by_number:
            yield f"{name}: {value} is not a value of {field.enum_type.full_name}"
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.full_name != Duration.DESCRIPTOR.full_name:
        yield from _violations(value, f"{name}.")
    elif allowed := options[rules.value]:
        number = value.seconds + value.nanos / 1e9 if isinstance(value, Duration) else value
        if not within(allowed)(number):
            yield f"{name}: Value must be {allowed}, is {number:g}"


def _check_text(text: str, length: str, pattern: str, name: str) -> Iterator[str]:
    if length and not within(length)(len(text)):
        yield f"{name}: Length must be {length}, is {len(text)}"
    if pattern and not re.fullmatch(pattern, text):
        yield f"{name}: Value must match {pattern}"


@functools.cache
def within(allowed: str) -> Callable[[float], bool]:
    """Predicate for the range `allowed`, such as ``<=50``, ``<256``, ``>=1``, ``1-63`` or ``1m-10m``.

    Durations are compared in seconds. Raises ValueError for any other notation.
    """
    if match := re.fullmatch(rf"(<=|<|>=)({BOUND.pattern})", allowed):
        sign, bound = match[1], _number(match[2])
        comparisons: dict[str, Callable[[float], bool]] = {
            "<=": lambda number: number <= bound,
            "<": lambda number: number < bound,
            ">=": lambda number: number >= bound,
        }
        return comparisons[sign]
    if match := re.fullmatch(rf"({BOUND.pattern})-({BOUND.pattern})", allowed):
        low, high = _number(match[1]), _number(match[4])
        return lambda number: low <= number <= high
    raise ValueError(f"cannot read the range {allowed!r} of a proto annotation")


def _number(text: str) -> float:
    match = BOUND.fullmatch(text)
    assert match is not None
    return int(match[1]) * DURATION_UNITS[match[2]]
