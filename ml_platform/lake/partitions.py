"""Dynamic partitions ``raw_files``: one per raw file, keyed by the file name without ``.txt`` and what follows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import dagster as dg

PARTITION_TAG = "dagster/partition"
RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
#: The partitions of a run, as they were at its start: their order may change later. Many need more than one tag, which
#: are numbered, because PostgreSQL indexes values of tags up to 2.7 kB.
PARTITIONS_TAG = "ml_platform/partitions"
MAX_TAG_LENGTH = 2000

RAW_SUFFIX = ".txt"
#: Spark decompresses the last two.
RAW_SUFFIXES = (RAW_SUFFIX, f"{RAW_SUFFIX}.gz", f"{RAW_SUFFIX}.bz2")
MAX_KEY_LENGTH = 100

raw_files = dg.DynamicPartitionsDefinition(name="raw_files")

_SAFE = re.compile(r"[A-Za-z0-9._-]+")


def partition_key(object_name: str) -> str:
    """Partition key of a raw file.

    Raises:
        ValueError: the name is not a safe key; the message says why.
    """
    suffix = next((suffix for suffix in RAW_SUFFIXES if object_name.endswith(suffix)), None)
    if suffix is None:
        if object_name.endswith("/"):
            raise ValueError("directories are not searched")
        raise ValueError(f"it does not end with {', '.join(RAW_SUFFIXES)}")
    key = object_name.removesuffix(suffix)
    if not _SAFE.fullmatch(key):
        raise ValueError("only letters, digits, '.', '_' and '-' are allowed")
    if key.startswith((".", "_")):
        raise ValueError("it starts with a dot or underscore, which Spark treats as a hidden file")
    if len(key) > MAX_KEY_LENGTH:
        raise ValueError(f"it is longer than {MAX_KEY_LENGTH} characters")
    if "..." in key:
        raise ValueError("'...' is reserved for Dagster's partition ranges")
    return key


def is_partition_key(text: str) -> bool:
    """Return True if `text` is a valid partition key."""
    try:
        return partition_key(text + RAW_SUFFIX) == text
    except ValueError:
        return False


def range_tags(start: str, end: str) -> dict[str, str]:
    """Tags of a run over the partitions from `start` to `end` inclusive, in registration order."""
    return {RANGE_START_TAG: start, RANGE_END_TAG: end}


def partitions_tags(keys: Sequence[str]) -> dict[str, str]:
    """Run tags that record the partitions of a run."""
    per_tag = MAX_TAG_LENGTH // (MAX_KEY_LENGTH + 1)
    chunks = [",".join(keys[first : first + per_tag]) for first in range(0, len(keys), per_tag)]
    return {f"{PARTITIONS_TAG}.{number}" if number else PARTITIONS_TAG: text for number, text in enumerate(chunks)}


def keys_of_run(tags: Mapping[str, str], registered: Sequence[str]) -> list[str]:
    """Partitions covered by a run with these tags, given all registered partitions in order."""
    if PARTITION_TAG in tags:
        return [tags[PARTITION_TAG]]
    if PARTITIONS_TAG in tags:
        more = itertools.takewhile(tags.__contains__, (f"{PARTITIONS_TAG}.{number}" for number in itertools.count(1)))
        return ",".join([tags[PARTITIONS_TAG], *(tags[name] for name in more)]).split(",")
    start, end = tags.get(RANGE_START_TAG), tags.get(RANGE_END_TAG)
    if start not in registered or end not in registered:
        return []
    return list(registered[registered.index(start) : registered.index(end) + 1])


def contiguous_ranges(keys: Iterable[str], registered: Sequence[str]) -> list[tuple[str, str]]:
    """Group `keys` into maximal (first, last) ranges of adjacent registered partitions."""
    wanted = set(keys)
    ranges: list[tuple[str, str]] = []
    previous_wanted = False
    for key in registered:
        if key in wanted:
            ranges = [*ranges[:-1], (ranges[-1][0], key)] if previous_wanted else [*ranges, (key, key)]
        previous_wanted = key in wanted
    return ranges
