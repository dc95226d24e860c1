"""The lake, over a directory and over S3: the same tests for both."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import LocalStore, S3Store, Store, StoredFile, open_store
from ml_platform_tests.fakes import cleaned_report, features_report
from spark_jobs.schema import SCHEMA_VERSION

REPORT = cleaned_report("a")
PARSED = CleanedReport.model_validate(REPORT)
ODD_NAME = "a b#c%20d[e]{f,g}*?&+ü"


class Site(Protocol):
    """Where a store is, and what others do there without the platform."""

    uri: str

    def put(self, name: str, content: bytes = b"") -> None: ...

    def names(self) -> list[str]: ...

    def delete(self, name: str) -> None: ...


class Directory:
    def __init__(self, root: Path) -> None:
        self.uri, self._root = str(root), root

    def put(self, name: str, content: bytes = b"") -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def delete(self, name: str) -> None:
        (self._root / name).unlink()

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self._root)) for path in self._root.rglob("*") if not path.is_dir())


class Bucket:
    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._name = client, f"bucket-{secrets.token_hex(6)}"
        self._prefix = f"{prefix}/" if prefix else ""
        client.create_bucket(Bucket=self._name)
        self.uri = f"s3://{self._name}/{prefix}".rstrip("/")

    def put(self, name: str, content: bytes = b"") -> None:
        self._client.put_object(Bucket=self._name, Key=self._prefix + name, Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self._name, Key=self._prefix + name)

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(key.removeprefix(self._prefix) for key in keys)


@pytest.fixture(scope="module")
def own_client(s3_server: LocalS3) -> Any:
    """The test's own way to the server; making a client takes long."""
    return s3_server.client()


@pytest.fixture
def s3_client(own_client: Any, s3: LocalS3) -> Any:
    return own_client


@pytest.fixture(params=["directory", "odd directory", "bucket", "bucket with prefix"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    if "directory" in request.param:
        return Directory(tmp_path / (ODD_NAME if "odd" in request.param else "store"))
    prefix = "some/odd pre%20fix#" if "prefix" in request.param else ""
    return Bucket(request.getfixturevalue("s3_client"), prefix)


@pytest.fixture
def store(site: Site) -> Store:
    return open_store(site.uri)


@pytest.fixture
def lake(site: Site) -> LakeResource:
    """Raw files and lake in one place, which is allowed."""
    return LakeResource(raw_uri=site.uri, lake_uri=site.uri, epoch="2020-01-01")


class TestStore:
    def test_an_empty_store(self, store: Store):
        assert list(store.list_directory()) == []
        assert list(store.list_directory("no/such")) == []
        assert list(store.list_reports(CLEANED_TABLE)) == []
        with pytest.raises(FileNotFoundError):
            store.read("no/such.json")

    def test_read_start_gives_the_first_byte(self, site: Site, store: Store):
        site.put("a.txt", b"0,2019-08-22")
        assert store.read_start("a.txt") == b"0"
        with pytest.raises(FileNotFoundError):
            store.read_start("b.txt")

    def test_write_and_read(self, site: Site, store: Store):
        store.write("a/b c/d.json", b"first")
        store.write("a/b c/d.json", b"\x00second")
        assert store.read("a/b c/d.json") == b"\x00second"
        assert site.names() == ["a/b c/d.json"]

    def test_list_directory_is_not_recursive(self, site: Site, store: Store):
        for name in ("top.txt", "a/one.txt", "a/two.txt", "a/b/deep.txt", "ab/other.txt"):
            site.put(name, b"x" * len(name))
        assert {(file.name, file.size) for file in store.list_directory()} == {("top.txt", 7), ("a/", 0), ("ab/", 0)}
        assert {(file.name, file.size) for file in store.list_directory("a")} == {
            ("one.txt", 9),
            ("two.txt", 9),
            ("b/", 0),
        }

    def test_fingerprint_tells_contents_apart(self, site: Site, store: Store):
        def fingerprint() -> str:
            (file,) = store.list_directory()
            return file.fingerprint

        site.put("a.txt", b"one")
        first = fingerprint()
        assert fingerprint() == first
        site.put("a.txt", b"two")
        second = fingerprint()
        assert second != first
        site.put("a.txt", b"three")
        assert fingerprint() not in (first, second)

    def test_open_new_appears_when_it_is_closed(self, site: Site, store: Store):
        with store.open_new("new/large.txt") as file:
            file.write(b"one ")
            file.flush()
            assert "new/large.txt" not in site.names()
            assert "large.txt" not in [file.name for file in store.list_directory("new")]
            file.write(b"two")
        assert site.names() == ["new/large.txt"]
        assert store.read("new/large.txt") == b"one two"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_failed_open_new_leaves_nothing(self, site: Site, store: Store, error: type[BaseException]):
        def fail() -> None:
            with store.open_new("new/large.txt") as file:
                file.write(b"one ")
                raise error

        with pytest.raises(error):
            fail()
        assert site.names() == []
        site.put("new/large.txt", b"old")
        with pytest.raises(error):
            fail()
        assert store.read("new/large.txt") == b"old"
        assert site.names() == ["new/large.txt"]

    def test_leftovers_of_killed_processes_are_deleted_and_files_being_written_are_not(self, tmp_path: Path):
        store = LocalStore(str(tmp_path))
        store.delete_leftovers()
        for name in (".a.txt.0123456789abcdef0123456789abcdef", ".a.txt", "a.txt"):
            (tmp_path / name).touch()
        with store.open_new("a.txt") as file:
            file.write(b"one")
            store.delete_leftovers()
            assert len(list(tmp_path.iterdir())) == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.txt", "a.txt"]
        assert store.read("a.txt") == b"one"

    def test_reports_are_one_directory_below(self, site: Site, store: Store):
        wanted = [f"{CLEANED_TABLE}/raw_file={key}/_report.json" for key in ("a", "b")]
        for name in (
            *wanted,
            f"{CLEANED_TABLE}/_report.json",
            f"{CLEANED_TABLE}/raw_file=c/part-0.parquet",
            f"{CLEANED_TABLE}/raw_file=d/deeper/_report.json",
            f"{CLEANED_TABLE}/raw_file=e/_report.json.bak",
            f"{CLEANED_TABLE}/raw_file=f/x_report.json",
            f"{CLEANED_TABLE}_old/raw_file=g/_report.json",
            f"{FEATURES_TABLE}/raw_file=h/_report.json",
            "_report.json",
        ):
            site.put(name)
        assert sorted(stored.name for stored in store.list_reports(CLEANED_TABLE)) == wanted


class TestSparkUri:
    def test_directory(self, tmp_path: Path):
        store = LocalStore(str(tmp_path / ODD_NAME))
        # Hadoop's Path takes a name as it stands: what is quoted would be another file.
        assert store.spark_uri("x/y") == f"file://{tmp_path}/{ODD_NAME}/x/y"
        assert store.spark_uri() == f"file://{tmp_path}/{ODD_NAME}"

    def test_bucket(self):
        assert open_store("s3://bucket").spark_uri("x/y") == "s3a://bucket/x/y"
        assert open_store("s3://bucket/pre/fix").spark_uri("x") == "s3a://bucket/pre/fix/x"
        assert open_store("s3://bucket/pre/fix").spark_uri() == "s3a://bucket/pre/fix"
        assert open_store("s3://bucket").spark_uri() == "s3a://bucket"


class TestRawFiles:
    def test_files_are_listed_in_order(self, site: Site, lake: LakeResource):
        # S3 lists a thousand at a time; test_s3 has more.
        keys = [f"file-{number:04}" for number in range(20)]
        for key in reversed(keys):
            site.put(f"{key}.txt", b"x")
        files, ignored = lake.list_raw_files()
        assert list(files) == keys
        assert ignored == {}
        file = files["file-0007"]
        assert file.uri == lake.raw.spark_uri("file-0007.txt")
        assert file.as_request() == {"uri": file.uri, "size": 1, "fingerprint": file.fingerprint}
        assert file.fingerprint.startswith("1-")

    def test_only_text_files_of_the_directory_itself_are_listed(self, site: Site, lake: LakeResource):
        for name in ("a.txt", "b.csv", "c.TXT", "d.txt.gz", "e.txt.bz2", "sub/e.txt", "f.txt/inside", "g.gz"):
            site.put(name, b"x")
        files, ignored = lake.list_raw_files()
        assert list(files) == ["a", "d", "e"]
        assert files["d"].uri.endswith("/d.txt.gz")
        assert (files["a"].text_bytes, files["d"].text_bytes, files["e"].text_bytes) == (1, 3, 4)
        suffix, directory = "it does not end with .txt, .txt.gz, .txt.bz2", "directories are not searched"
        assert ignored == dict.fromkeys(("b.csv", "c.TXT", "g.gz"), suffix) | dict.fromkeys(
            ("sub/", "f.txt/"), directory
        )

    def test_two_files_of_one_partition_are_both_left_out(self, site: Site, lake: LakeResource):
        """`gunzip -k` makes such pairs."""
        for name in ("a.txt", "a.txt.gz", "b.txt"):
            site.put(name, b"x")
        files, ignored = lake.list_raw_files()
        assert list(files) == ["b"]
        assert set(ignored) == {"a.txt", "a.txt.gz"}
        assert all("several files of partition a: a.txt, a.txt.gz" in reason for reason in ignored.values())

    def test_unusable_names_are_reported(self, site: Site, lake: LakeResource):
        for name in ("two words.txt", "_hidden.txt", "ü.txt", "good.txt", "a...b.txt", ".txt"):
            site.put(name, b"x")
        files, ignored = lake.list_raw_files()
        assert list(files) == ["good"]
        assert set(ignored) == {"two words.txt", "_hidden.txt", "ü.txt", "a...b.txt", ".txt"}
        assert all(ignored.values())

    def test_a_file_that_is_being_written_is_not_listed(self, lake: LakeResource):
        with lake.raw.open_new("a.txt") as file:
            file.write(b"x")
            assert lake.list_raw_files() == ({}, {})

    def test_objects_named_like_directories_are_left_out(self, s3_client: Any):
        for prefix in ("raw", ""):
            bucket = Bucket(s3_client, prefix)
            for name in ("", "sub/", "sub.txt/", "a.txt"):
                if prefix or name:
                    bucket.put(name)
            lake = LakeResource(raw_uri=bucket.uri, lake_uri=bucket.uri, epoch="2020-01-01")
            files, ignored = lake.list_raw_files()
            assert (list(files), list(ignored)) == (["a"], ["sub.txt/", "sub/"])

    def test_a_directory_without_a_name_is_named(self, lake: LakeResource, monkeypatch: pytest.MonkeyPatch):
        """``prefix//x.txt``, which not every server keeps."""
        store = S3Store("s3://bucket/raw")
        monkeypatch.setattr(store, "_objects", lambda *_: iter([{"Prefix": "raw//"}]))
        lake.__dict__["raw"] = store
        assert lake.list_raw_files() == ({}, {"/": "directories are not searched"})

    def test_a_lake_among_the_raw_files_is_not_one(self, site: Site, lake: LakeResource):
        site.put("lake/x/y", b"x")
        site.put("lakes/y", b"x")
        site.put("lak", b"x")
        inside = LakeResource(raw_uri=lake.raw_uri, lake_uri=f"{lake.raw_uri}/lake/x", epoch="2020-01-01")
        assert list(inside.list_raw_files()[1]) == ["lak", "lakes/"]

    def test_broken_links_are_left_out(self, tmp_path: Path):
        (tmp_path / "directory.txt").mkdir()
        (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
        (tmp_path / "target").write_text("x")
        (tmp_path / "link.txt").symlink_to(tmp_path / "target")
        lake = LakeResource(raw_uri=str(tmp_path), lake_uri=str(tmp_path), epoch="2020-01-01")
        files, ignored = lake.list_raw_files()
        assert ({key: file.size for key, file in files.items()}, set(ignored)) == (
            {"link": 1},
            {"directory.txt/", "target"},
        )

    def test_a_file_that_vanishes_during_the_listing_is_left_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("x")
        scandir = os.scandir

        class Listing(list[os.DirEntry[str]]):
            """What os.scandir gives: names, whose files may be gone when they are asked for."""

            def __enter__(self) -> Listing:
                return self

            def __exit__(self, *_: object) -> None: ...

        def listing(path: Path) -> Listing:
            entries = Listing(scandir(path))
            (tmp_path / "a.txt").unlink()
            return entries

        monkeypatch.setattr(os, "scandir", listing)
        assert [file.name for file in LocalStore(str(tmp_path)).list_directory()] == ["b.txt"]


class TestReports:
    def test_only_reports_of_partitions_are_found(self, site: Site, lake: LakeResource):
        site.put(f"{CLEANED_TABLE}/raw_file=a/_report.json", json.dumps(REPORT).encode())
        site.put(f"{CLEANED_TABLE}/raw_file=a/part-0.parquet", b"PAR1")
        site.put(f"{CLEANED_TABLE}/raw_file=a/_SUCCESS")
        site.put(f"{CLEANED_TABLE}/raw_file=incomplete/part-0.parquet", b"PAR1")
        site.put(f"{CLEANED_TABLE}/raw_file=deep/er/_report.json", json.dumps(REPORT).encode())
        site.put(f"{CLEANED_TABLE}/other=b/_report.json", json.dumps(REPORT).encode())
        site.put(f"{CLEANED_TABLE}/stray.txt", b"x")
        site.put(f"{CLEANED_TABLE}/_report.json", json.dumps(REPORT).encode())
        features = features_report(REPORT, {"cleaned": "1", "history": {}})
        site.put(f"{FEATURES_TABLE}/raw_file=c/_report.json", json.dumps(features).encode())
        assert lake.reports(CleanedReport) == {"a": PARSED}
        assert lake.reports(FeaturesReport) == {"c": FeaturesReport.model_validate(features)}

    def test_a_partition_with_an_invalid_report_is_not_complete(self, site: Site, lake: LakeResource):
        whole = json.dumps(REPORT).encode()
        versions = (None, str(SCHEMA_VERSION), True, 0, -1, SCHEMA_VERSION + 0.5, [SCHEMA_VERSION])
        times = (dict.fromkeys(["min", "max"], "2020-02-30"), {"min": "2020-01-01T00:00:00Z", "max": None})
        changes: list[dict[str, Any]] = [
            *({"schema_version": version} for version in versions),
            *({"tx_datetime": ends} for ends in (*times, {"min": "yesterday", "max": "tomorrow"})),
            *({"raw": {}}, {"raw": None}, {"counts": {}}, {"counts": []}, {"epoch": None}),
            {"transaction_id": {"min": "1", "max": 2}},
        ]
        broken = {
            "empty": b"",
            "cut-off": whole[:-3],
            "no-text": b"\xff\xfe\x00",
            "null": b"null",
            "list": b'["schema_version"]',
            "string": b'"schema_version"',
            "nothing-in-it": b"{}",
            **{f"changed-{n}": json.dumps({**REPORT, **change}).encode() for n, change in enumerate(changes)},
        }
        for key, content in {**broken, "whole": whole}.items():
            site.put(f"{CLEANED_TABLE}/raw_file={key}/_report.json", content)
        assert lake.reports(CleanedReport) == {"whole": PARSED}

    def test_a_report_nested_too_deeply_to_parse_is_invalid(self, tmp_path: Path):
        site = Directory(tmp_path)
        site.put(f"{CLEANED_TABLE}/raw_file=deep/_report.json", b"[" * 100_000)
        site.put(f"{CLEANED_TABLE}/raw_file=whole/_report.json", json.dumps(REPORT).encode())
        lake = LakeResource(raw_uri=site.uri, lake_uri=site.uri, epoch="2020-01-01")
        assert lake.reports(CleanedReport) == {"whole": PARSED}

    def test_a_report_that_vanishes_while_they_are_read_is_left_out(self, site: Site, lake: LakeResource):
        class Vanishing:
            """A store whose listing names a report that is deleted before it is read."""

            def list_reports(self, name: str) -> Iterator[StoredFile]:
                yield from store.list_reports(name)
                yield StoredFile(f"{name}/raw_file=gone/_report.json", 1, "1-1")

            def read(self, name: str) -> bytes:
                return store.read(name)

        store = lake.store
        site.put(f"{CLEANED_TABLE}/raw_file=a/_report.json", json.dumps(REPORT).encode())
        lake.__dict__["store"] = Vanishing()
        assert lake.reports(CleanedReport) == {"a": PARSED}

    def test_a_report_is_read_again_only_when_it_changed(
        self, site: Site, lake: LakeResource, monkeypatch: pytest.MonkeyPatch
    ):
        """By any copy of the resource: Dagster makes one for each step."""
        read: list[str] = []
        kind = type(lake.store)
        whole = kind.read
        monkeypatch.setattr(kind, "read", lambda store, name: read.append(name) or whole(store, name))

        def reads() -> tuple[dict[str, Any], list[str]]:
            read.clear()
            copy = LakeResource(raw_uri=lake.raw_uri, lake_uri=lake.lake_uri, epoch=lake.epoch)
            return copy.reports(CleanedReport), sorted(read)

        names = {key: f"{CLEANED_TABLE}/raw_file={key}/_report.json" for key in "ab"}
        for name in names.values():
            lake.write_json(name, REPORT)
        assert reads() == ({"a": PARSED, "b": PARSED}, list(names.values()))
        assert reads() == ({"a": PARSED, "b": PARSED}, [])
        other = {**REPORT, "raw": {**REPORT["raw"], "fingerprint": "1-2"}}
        for _ in range(3):
            # At once, and of the same size each time.
            for content in (other, REPORT):
                lake.write_json(names["b"], content)
                assert reads() == ({"a": PARSED, "b": CleanedReport.model_validate(content)}, [names["b"]])
        site.delete(names["a"])
        assert reads() == ({"b": PARSED}, [])

    def test_written_json_is_read(self, site: Site, lake: LakeResource):
        name = f"{lake.partition_path(CLEANED_TABLE, 'k')}/_report.json"
        lake.write_json(name, {**REPORT, "é": [1.5, None]})
        assert site.names() == [f"{CLEANED_TABLE}/raw_file=k/_report.json"]
        assert lake.read_json(name) == {**REPORT, "é": [1.5, None]}
        assert lake.reports(CleanedReport)["k"].model_dump()["é"] == [1.5, None]

    def test_invalid_json_is_an_error(self, site: Site, lake: LakeResource):
        site.put("x.json", b"{")
        with pytest.raises(ValueError, match="Expecting"):
            lake.read_json("x.json")
        with pytest.raises(FileNotFoundError):
            lake.read_json("y.json")


def test_a_file_that_cannot_take_its_name_leaves_no_draft(tmp_path: Path):
    site = Directory(tmp_path)
    site.put("a.json/inside")
    with pytest.raises(OSError, match="directory"):
        open_store(site.uri).write("a.json", b"new")
    assert site.names() == ["a.json/inside"]
