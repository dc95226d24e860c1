"""Partition keys, and contiguous ranges of them."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ml_platform.lake.partitions import (
    PARTITION_TAG,
    contiguous_ranges,
    keys_of_run,
    partition_key,
    partitions_tags,
    range_tags,
)

names = st.text(st.characters() | st.sampled_from("ab09._-/ \n*"), max_size=130)
registered_keys = st.lists(st.text("abc01", min_size=1, max_size=4), unique=True, max_size=30)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("2019-08-22.txt", "2019-08-22"),
        ("2019-08-22.txt.gz", "2019-08-22"),
        ("2019-08-22.txt.bz2", "2019-08-22"),
        ("A.b_c-9.txt", "A.b_c-9"),
        ("a.txt.txt", "a.txt"),
        ("-.txt", "-"),
        ("a..b.txt", "a..b"),
        ("a...txt", "a.."),
        ("x" * 100 + ".txt", "x" * 100),
    ],
)
def test_safe_names(name: str, key: str):
    assert partition_key(name) == key


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "does not end with .txt"),
        ("a.csv", "does not end with .txt"),
        ("a.TXT", "does not end with .txt"),
        ("a.gz", "does not end with .txt"),
        ("a.txt/", "directories"),
        (".txt", "only letters"),
        ("two words.txt", "only letters"),
        ("a/b.txt", "only letters"),
        ("ä.txt", "only letters"),
        ("٣.txt", "only letters"),
        ("a\n.txt", "only letters"),
        ("a\n", "does not end with .txt"),
        ("a,b.txt", "only letters"),
        ("a=b.txt", "only letters"),
        (".hidden.txt", "starts with a dot"),
        ("_hidden.txt", "underscore"),
        ("...txt", "starts with a dot"),
        ("a...b.txt", "range"),
        ("x" * 101 + ".txt", "longer than 100"),
    ],
)
def test_unsafe_names(name: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        partition_key(name)


@given(names, st.sampled_from(["", ".txt", ".txt.gz", ".txt.bz2"]))
@example("a...b", "")
@example("a\x00", ".txt")
def test_any_text_is_a_safe_key_or_an_error_with_a_reason(stem: str, suffix: str):
    name = stem + suffix
    try:
        key = partition_key(name)
    except ValueError as error:
        reason = str(error)
    else:
        reason = None
    if reason is not None:
        assert reason.strip()
        assert "\n" not in reason
    else:
        assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,99}", key, re.ASCII)
        assert "..." not in key
        assert name == key + suffix


@given(st.data(), registered_keys)
def test_contiguous_ranges_are_the_wanted_keys_maximal_and_in_order(data: st.DataObject, registered: list[str]):
    wanted = set(data.draw(st.lists(st.sampled_from(registered)))) if registered else set()
    ranges = contiguous_ranges(wanted, registered)
    covered = [keys_of_run(range_tags(*ends), registered) for ends in ranges]
    assert [key for keys in covered for key in keys] == [key for key in registered if key in wanted]
    for keys, following in itertools.pairwise(covered):
        assert registered.index(following[0]) > registered.index(keys[-1]) + 1


@given(registered_keys)
def test_keys_that_are_not_registered_have_no_range(registered: list[str]):
    assert contiguous_ranges(["never"], registered) == []
    assert contiguous_ranges(registered, []) == []


def test_keys_of_run():
    registered = ["c", "a", "b"]
    assert keys_of_run({PARTITION_TAG: "a"}, registered) == ["a"]
    assert keys_of_run(range_tags("c", "a"), registered) == ["c", "a"]
    assert keys_of_run(range_tags("a", "a"), registered) == ["a"]
    assert keys_of_run(range_tags("b", "c"), registered) == []
    assert keys_of_run(range_tags("a", "gone"), registered) == []
    assert keys_of_run({"dagster/asset_partition_range_start": "a"}, registered) == []
    assert keys_of_run({}, registered) == []


def test_range_tags_are_dagsters_own():
    from dagster._core.storage.tags import (
        ASSET_PARTITION_RANGE_END_TAG,
        ASSET_PARTITION_RANGE_START_TAG,
        PARTITION_NAME_TAG,
    )

    assert range_tags("a", "b") == {ASSET_PARTITION_RANGE_START_TAG: "a", ASSET_PARTITION_RANGE_END_TAG: "b"}
    assert PARTITION_TAG == PARTITION_NAME_TAG


@given(st.lists(st.text("abc-", min_size=1, max_size=100), min_size=1, max_size=60))
def test_the_partitions_of_a_run_are_read_from_its_tags(keys: list[str]):
    """PostgreSQL refuses values of tags beyond 2.7 kB."""
    tags = partitions_tags(keys)
    assert max(map(len, tags.values())) <= 2000
    assert keys_of_run({**tags, **range_tags("a", "b")}, ["a", "b"]) == keys
