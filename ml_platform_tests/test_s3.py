"""S3 for real: the server that the tests start, what the platform says when S3 fails, and Spark on ``s3a://``."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.cli.context import CommandError, console, errors
from ml_platform.cli.doctor import probe_artifacts
from ml_platform.cli.main import main
from ml_platform.dev.cloud import s3_server as s3_server_module
from ml_platform.dev.cloud.credentials import issue_certificates
from ml_platform.dev.cloud.processes import TetheredProcess, listens
from ml_platform.dev.cloud.s3_server import (
    BuildError,
    LocalS3,
    MotoServer,
    S3Server,
    build_versitygw,
    start_s3_server,
)
from ml_platform.lake import storage
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import StorageError, open_store
from ml_platform.model.mlflow import MlflowResource
from ml_platform.sensors import new_raw_files
from ml_platform.spark import s3a
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.world import (
    SHORT_LIVED,
    World,
    assert_counts,
    materialize_command,
    no_process_left,
    simulated,
    wait_until,
)

PROJECT = Path(__file__).resolve().parent.parent
CONNECTION = s3a.S3Connection("https://s3.example.org", "ru-central1")


@pytest.fixture
def bucket(s3: LocalS3) -> str:
    """A new bucket on the server that the environment leads to."""
    name = f"bucket-{secrets.token_hex(6)}"
    s3.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def real_s3(tmp_path: Path, s3_server: LocalS3) -> Iterator[S3Server]:
    """A server of the test's own, to be broken; skipped where there is only the mock."""
    if s3_server.kind != S3Server.kind:
        pytest.skip("versitygw cannot be built here")
    with S3Server(tmp_path / "own s3", ["own-bucket"]) as server:
        yield server  # type: ignore[misc]


def use(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def without_go(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A PATH with the system's tools, and no `go` but the one that `path` may hold."""
    tools = path / "tools"
    tools.mkdir(parents=True)
    for tool in ("env", "sh", "cat", "touch", "sleep", "mkdir"):
        (tools / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    monkeypatch.setenv("PATH", f"{path}:{tools}")


class TestServer:
    def test_its_secret_is_in_no_repr_argument_or_log(self, real_s3: S3Server):
        assert real_s3._process is not None
        arguments = Path(f"/proc/{real_s3._process.pid}/cmdline").read_text()
        for secret in (real_s3.secret_key, real_s3.access_key):
            assert secret not in repr(real_s3)
            assert secret not in arguments
            assert secret not in (real_s3.directory / "log").read_text()
        assert "versitygw" in arguments

    def test_it_ends_with_its_owner_even_if_that_is_killed(self, tmp_path: Path, s3_server: LocalS3):
        program = (
            "import sys, pathlib, time; from ml_platform.dev.cloud import s3_server as s\n"
            f"server = s.{type(s3_server).__name__}(pathlib.Path(sys.argv[1]))\n"
            "server.start(); print(server.port, flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            port = int(owner.stdout.readline())
            assert listens(port)
            owner.send_signal(signal.SIGKILL)
        wait_until(lambda: not listens(port), "the server is gone")

    def test_the_mock_has_the_same_interface(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with MotoServer(tmp_path, ["some-bucket"]) as server:
            use(server, monkeypatch)
            store = open_store("s3://some-bucket/x")
            store.write("a.json", b"1")
            assert store.read("a.json") == b"1"
            port = server.port
        assert not listens(port)

    def test_metadata_without_extended_attributes(
        self, tmp_path: Path, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
    ):
        if s3_server.kind != S3Server.kind:
            pytest.skip("versitygw cannot be built here")
        monkeypatch.setattr(s3_server_module, "_has_extended_attributes", lambda directory: False)
        with S3Server(tmp_path, ["some-bucket"]) as server:
            client = server.client()
            etag = client.put_object(Bucket="some-bucket", Key="a/b", Body=b"x")["ETag"]
            assert client.head_object(Bucket="some-bucket", Key="a/b")["ETag"] == etag
        assert any((tmp_path / "metadata").iterdir())

    def test_a_process_that_cannot_start_says_why(self, tmp_path: Path):
        process = TetheredProcess(["/bin/sh", "-c", "echo the port is taken; exit 3"], log=tmp_path / "log")
        with pytest.raises(RuntimeError, match="it ended while starting: the port is taken"):
            process.wait_until(lambda: False, what="it")
        process.stop()


class TestBuild:
    def test_without_go_the_mock_starts_and_the_reason_is_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        without_go(monkeypatch, tmp_path / "bin")
        server, reason = start_s3_server(tmp_path / "s3", cache=tmp_path / "cache")
        assert server.kind == "moto"
        assert "Go is missing" in reason

    def test_a_failed_build_falls_back_to_the_mock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        without_go(monkeypatch, tmp_path / "bin")
        executable(tmp_path / "bin" / "go", "echo one >&2; echo no such module >&2; exit 1")
        with pytest.raises(BuildError, match=r"versitygw@v[0-9.]+ failed: no such module"):
            build_versitygw(tmp_path / "cache")
        assert start_s3_server(tmp_path / "s3", cache=tmp_path / "cache")[0].kind == "moto"

    def test_two_at_once_build_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        without_go(monkeypatch, tmp_path / "bin")
        builds = tmp_path / "builds"
        executable(tmp_path / "bin" / "go", f'echo build >> "{builds}"; sleep 0.3; echo program > "$GOBIN/versitygw"')
        with ThreadPoolExecutor(4) as pool:
            programs = set(pool.map(lambda _: build_versitygw(tmp_path / "cache"), range(4)))
        assert [program.read_text() for program in programs] == ["program\n"]
        assert builds.read_text() == "build\n"
        build_versitygw(tmp_path / "cache")
        assert builds.read_text() == "build\n"


class TestStore:
    def test_several_pages_are_listed_while_objects_come_and_go(self, s3: LocalS3, bucket: str):
        client = s3.client()
        lake = LakeResource(raw_uri=f"s3://{bucket}/raw", lake_uri=f"s3://{bucket}/lake", epoch="2020-01-01")
        names = [f"file-{number:04}.txt" for number in range(1_010)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: client.put_object(Bucket=bucket, Key=f"raw/{name}", Body=b"x"), names))
        assert list(lake.list_raw_files()[0]) == [name.removesuffix(".txt") for name in names]

        listing = lake.raw.list_directory()
        seen = [next(listing).name]  # the first page, of 1,000, is here now
        for name in (names[1], names[1_005]):
            client.delete_object(Bucket=bucket, Key=f"raw/{name}")
        client.put_object(Bucket=bucket, Key="raw/new.txt", Body=b"xy")
        seen += [file.name for file in listing]
        assert set(seen) >= set(names) - {names[1], names[1_005]}
        assert len(seen) == len(set(seen))
        with pytest.raises(FileNotFoundError, match=names[1]):
            lake.raw.read(names[1])
        files, _ = lake.list_raw_files()
        assert len(files) == 1_009
        assert files["new"].size == 2

    @pytest.mark.parametrize(
        "name",
        [
            "two words.txt",
            " leading and trailing .txt",
            "100%.txt",
            "a%2Fb%20c.txt",
            "a+b&c=d;e.txt",
            "what?.txt",
            "number#1.txt",
            'it\'s "quoted".txt',
            "back\\slash.txt",
            "new\nline.txt",
            "<tag>&amp;.txt",
            "[a-z]{x,y}*.txt",
            "$(rm -rf).txt",
            "..txt",
            "…ünï—😀.txt",
            "n" * 200 + ".txt",
        ],
    )
    def test_hostile_names(self, s3: LocalS3, bucket: str, name: str):
        lake = LakeResource(raw_uri=f"s3://{bucket}/r a%w", lake_uri=f"s3://{bucket}/lake", epoch="2020-01-01")
        s3.client().put_object(Bucket=bucket, Key=f"r a%w/{name}", Body=b"content")
        assert [file.name for file in lake.raw.list_directory()] == [name]
        assert lake.raw.read(name) == b"content"
        files, ignored = lake.list_raw_files()
        assert files == {}
        assert list(ignored) == [name]
        lake.raw.write(name, b"new")
        assert [(file.name, file.size) for file in lake.raw.list_directory()] == [(name, 3)]


def tls_endpoint(directory: Path) -> Iterator[str]:
    """An HTTPS endpoint with a certificate of ca.pem, which no system trusts; yields its URL."""
    import http.server
    import ssl
    import threading

    _, certificate, key = issue_certificates(directory)

    class NoBucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>"
            self.send_response(404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoBucket)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


#: What is wrong, as changes of the environment (None: unset), and what the error must say.
WRONG: dict[str, tuple[dict[str, str | None], str]] = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "x" * 40}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "wrong key": ({"AWS_ACCESS_KEY_ID": "nobody"}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"},
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "half of the credentials": ({"AWS_SECRET_ACCESS_KEY": None}, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "no such profile": ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE"),
    "connection refused": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "AWS_ENDPOINT_URL_S3"),
    "no such host": ({"AWS_ENDPOINT_URL_S3": "http://s3.invalid"}, "AWS_ENDPOINT_URL_S3"),
    "not a URL": ({"AWS_ENDPOINT_URL_S3": "127.0.0.1:9"}, "AWS_ENDPOINT_URL_S3"),
    "no such bucket": (
        {"ML_PLATFORM_LAKE_URI": "s3://no-such-bucket", "ML_PLATFORM_RAW_URI": "s3://no-such-bucket"},
        "bucket no-such-bucket does not exist",
    ),
}
#: moto takes any credentials.
NOT_CHECKED_BY_MOTO = {"wrong secret", "wrong key"}
#: The same error passes through ticks and commands.
NOT_FOUND_OR_REFUSED = ("no such bucket", "wrong secret")


class TestErrors:
    @pytest.fixture(params=WRONG)
    def wrong(
        self, request: pytest.FixtureRequest, s3: LocalS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> str:
        """Break the environment; what the error must say."""
        if s3.kind != S3Server.kind and request.param in NOT_CHECKED_BY_MOTO:
            pytest.skip("moto does not check that")
        changes, words = WRONG[request.param]
        monkeypatch.setenv("HOME", str(tmp_path))  # no profiles of the developer's
        monkeypatch.setenv("ML_PLATFORM_RAW_URI", f"s3://{bucket}/raw")
        monkeypatch.setenv("ML_PLATFORM_LAKE_URI", f"s3://{bucket}/lake")
        for name, value in changes.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)
        return words

    def test_every_operation_names_the_fault(self, wrong: str, tmp_path: Path):
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "a").touch()
        store = open_store(os.environ["ML_PLATFORM_RAW_URI"])

        def open_new() -> None:
            with store.open_new("a") as file:
                file.write(b"x")

        operations: list[Callable[[], object]] = [
            lambda: list(store.list_directory()),
            lambda: list(store.list_reports("t")),
            lambda: store.read("a"),
            lambda: store.write("a", b"x"),
            open_new,
        ]
        for operation in operations:
            with pytest.raises(StorageError) as error:
                operation()
            assert wrong in str(error.value)
            assert "\n" not in str(error.value)
            assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret") not in str(error.value)

    @pytest.mark.parametrize("wrong", NOT_FOUND_OR_REFUSED, indirect=True)
    def test_a_tick_names_the_fault(self, wrong: str):
        lake = LakeResource(
            raw_uri=os.environ["ML_PLATFORM_RAW_URI"], lake_uri=os.environ["ML_PLATFORM_LAKE_URI"], epoch="2020-01-01"
        )
        with dg.DagsterInstance.ephemeral() as instance:
            context = dg.build_sensor_context(instance=instance, resources={"lake": lake})
            with pytest.raises(StorageError) as error:
                new_raw_files(context)
        assert wrong in str(error.value)

    @pytest.mark.parametrize(
        ("wrong", "command"),
        [*[(wrong, "sync") for wrong in NOT_FOUND_OR_REFUSED], ("no such bucket", "doctor")],
        indirect=["wrong"],
    )
    def test_a_command_names_the_fault(
        self, wrong: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(MlflowResource, "champion", lambda self: None)
        monkeypatch.setattr(MlflowResource, "artifact_location", lambda self: None)
        monkeypatch.setattr(sys, "argv", ["ml-platform", command])
        for output in (console, errors):
            monkeypatch.setattr(output, "width", 400)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        output = capfd.readouterr()
        lines = [line for line in (output.out + output.err).splitlines() if wrong in line]
        assert lines
        assert "Traceback" not in output.err

    def test_a_server_that_hangs_is_given_up(self, s3: LocalS3, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
            started = time.monotonic()
            with pytest.raises(StorageError, match="AWS_ENDPOINT_URL_S3"):
                open_store("s3://some-bucket").read("a")
        # Unchanged, the timeouts of the attempts add up to 54 s.
        assert time.monotonic() - started < 50

    def test_the_longest_wait_fits_a_tick(self):
        waits = storage.S3_ATTEMPTS * storage.READ_TIMEOUT_S
        assert waits <= 55

    def test_a_private_certificate_authority(self, s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for url in tls_endpoint(tmp_path):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
            with pytest.raises(StorageError, match="AWS_CA_BUNDLE"):
                open_store("s3://some-bucket").read("a")
            monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
            with pytest.raises(StorageError, match="bucket some-bucket does not exist"):
                open_store("s3://some-bucket").read("a")


def test_mlflow_keeps_artifacts_in_a_bucket(s3: LocalS3, bucket: str, tmp_path: Path, empty_mlflow_store: Path):
    """MLflow's client needs no settings beyond those of boto3."""
    resource = MlflowResource(tracking_uri=f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}")
    client = resource.client()
    run = client.create_run(client.create_experiment("x", artifact_location=f"s3://{bucket}/artifacts"))
    client.log_text(run.info.run_id, "content", "model/MLmodel")
    key = f"artifacts/{run.info.run_id}/artifacts/model/MLmodel"
    assert s3.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"content"
    assert client.list_artifacts(run.info.run_id, "model")[0].path == "model/MLmodel"


def test_a_bucket_for_artifacts_is_probed(s3: LocalS3, bucket: str):
    probe_artifacts(f"s3://{bucket}/artifacts", "sqlite://")
    assert "Contents" not in s3.client().list_objects_v2(Bucket=bucket)
    with pytest.raises(CommandError, match=r"in s3://no-such-bucket/x: .*NoSuchBucket.*AWS_ENDPOINT_URL_S3") as failure:
        probe_artifacts("s3://no-such-bucket/x", "sqlite://")
    assert s3.secret_key not in str(failure.value)


class TestConnection:
    @pytest.fixture(autouse=True)
    def no_profiles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))

    @pytest.mark.parametrize("region", ["", "eu-north-1"])
    def test_the_default_is_aws(self, monkeypatch: pytest.MonkeyPatch, region: str):
        if region:
            monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        assert s3a.S3Connection.from_boto3() == s3a.S3Connection(None, region or "us-east-1")

    @pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    def test_it_is_read_from_the_environment(self, name: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(name, "https://s3.example.org")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "ru-central1")
        assert s3a.S3Connection.from_boto3() == CONNECTION

    def test_it_is_read_from_a_profile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / ".aws").mkdir()
        text = "[profile fraud]\nregion = ru-central1\nendpoint_url = https://s3.example.org\n"
        (tmp_path / ".aws" / "config").write_text(text)
        monkeypatch.setenv("AWS_PROFILE", "fraud")
        assert s3a.S3Connection.from_boto3() == CONNECTION


class TestProperties:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("https://s3.example.org", ("https://s3.example.org", "true", "true")),
            ("http://127.0.0.1:1", ("http://127.0.0.1:1", "false", "true")),
            (None, (None, None, "false")),
        ],
    )
    def test_endpoint(self, url: str | None, expected: tuple[str | None, ...]):
        found = s3a.s3a_properties(s3a.S3Connection(url, "r"))
        names = ("endpoint", "connection.ssl.enabled", "path.style.access")
        assert tuple(found.get(f"spark.hadoop.fs.s3a.{name}") for name in names) == expected
        assert found["spark.hadoop.fs.s3a.endpoint.region"] == "r"

    def test_properties_hold_no_secret(self, s3: LocalS3):
        found = json.dumps(s3a.s3a_properties(s3a.S3Connection.from_boto3()))
        assert s3.endpoint_url in found
        assert s3.secret_key not in found
        assert s3.access_key not in found


FAKE_SPARK_SUBMIT = """
echo resolving >> "$0.calls"
for word; do case "$word" in spark.jars.ivy=*) ivy="${word#spark.jars.ivy=}" ;; esac; done
sleep 0.3
mkdir -p "$ivy/jars"
touch "$ivy/jars/org.apache.hadoop_hadoop-aws-3.5.0.jar" "$ivy/jars/another.jar"
printf '%s\\n' "$@" > "$0.arguments"
"""


class TestJars:
    @pytest.fixture
    def spark_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A Spark without S3 whose spark-submit takes the place of Ivy."""
        home = tmp_path / "spark home"
        (home / "jars").mkdir(parents=True)
        (home / "jars" / "hadoop-client-api-3.5.0.jar").touch()
        executable(home / "bin" / "spark-submit", FAKE_SPARK_SUBMIT)
        monkeypatch.setenv("SPARK_HOME", str(home))
        return home

    def calls(self, spark_home: Path) -> int:
        log = spark_home / "bin" / "spark-submit.calls"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def test_jars_are_resolved_once_for_all_callers(self, spark_home: Path, tmp_path: Path):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: s3a.connector_jars(cache=tmp_path / "cache"), range(3)))
        assert [jar.name for jar in found[0]] == ["another.jar", "org.apache.hadoop_hadoop-aws-3.5.0.jar"]
        assert found[1:] == found[:1] * 2
        assert self.calls(spark_home) == 1
        arguments = (spark_home / "bin" / "spark-submit.arguments").read_text().splitlines()
        packages = arguments[arguments.index("--packages") + 1].split(",")
        assert packages[0] == "org.apache.hadoop:hadoop-aws:3.5.0"
        assert "software.amazon.awssdk:s3:2.35.4" in packages
        assert "software.amazon.awssdk:bundle" in arguments[arguments.index("--exclude-packages") + 1]

    def test_ivy_settings_are_handed_on(self, spark_home: Path, tmp_path: Path):
        config = {"spark.jars.ivySettings": "/etc/ivy.xml", "spark.jars.ivy": "/x", "spark.executor.memory": "1g"}
        s3a.connector_jars(config, cache=tmp_path / "cache")
        arguments = (spark_home / "bin" / "spark-submit.arguments").read_text()
        assert "spark.jars.ivySettings=/etc/ivy.xml" in arguments
        assert "spark.jars.ivy=/x" not in arguments
        assert "memory" not in arguments

    def test_jars_of_the_user_are_kept(self, spark_home: Path, tmp_path: Path):
        found = s3a.connector_properties({"spark.jars": "/own.jar"}, cache=tmp_path / "cache")
        assert found["spark.jars"].split(",")[0] == "/own.jar"
        assert "hadoop-aws" in found["spark.jars"]

    @pytest.mark.parametrize("name", ["spark.jars", "spark.jars.packages"])
    def test_no_jars_where_the_user_brings_the_connector(self, spark_home: Path, tmp_path: Path, name: str):
        assert s3a.connector_properties({name: "org.apache.hadoop:hadoop-aws:3.5.0"}, cache=tmp_path) == {}
        assert self.calls(spark_home) == 0

    def test_no_jars_where_spark_has_the_connector(self, spark_home: Path, tmp_path: Path):
        (spark_home / "jars" / "hadoop-aws-3.5.0.jar").touch()
        assert s3a.connector_properties(cache=tmp_path) == {}
        assert self.calls(spark_home) == 0

    def test_an_unknown_hadoop_is_named(self, spark_home: Path, tmp_path: Path):
        (spark_home / "jars" / "hadoop-client-api-3.5.0.jar").rename(
            spark_home / "jars" / "hadoop-client-api-9.9.9.jar"
        )
        with pytest.raises(s3a.S3AError, match=r"Hadoop 9\.9\.9.*hadoop-aws:9\.9\.9"):
            s3a.connector_jars(cache=tmp_path)

    def test_a_spark_without_hadoop(self, spark_home: Path, tmp_path: Path):
        (spark_home / "jars" / "hadoop-client-api-3.5.0.jar").unlink()
        with pytest.raises(s3a.S3AError, match="has no Hadoop"):
            s3a.connector_jars(cache=tmp_path)

    def test_a_download_that_fails_leaves_nothing(self, spark_home: Path, tmp_path: Path):
        executable(spark_home / "bin" / "spark-submit", "echo one; echo 'Host maven.invalid not found. url=x'; exit 1")
        with pytest.raises(s3a.S3AError, match=r"\(Host maven.invalid not found.*DEFAULT_ARTIFACT_REPOSITORY") as error:
            s3a.connector_jars(cache=tmp_path / "cache")
        assert "\n" not in str(error.value)
        executable(spark_home / "bin" / "spark-submit", FAKE_SPARK_SUBMIT)
        assert len(s3a.connector_jars(cache=tmp_path / "cache")) == 2

    @pytest.mark.spark
    def test_an_error_of_ivy_is_one_line_without_the_password(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("JAVA_TOOL_OPTIONS", SHORT_LIVED)
        settings = tmp_path / "ivy.xml"
        settings.write_text(
            '<ivysettings><settings defaultResolver="mirror"/><resolvers><ibiblio name="mirror" m2compatible="true" '
            'root="http://user:hunter2@127.0.0.1:9/maven/"/></resolvers></ivysettings>'
        )
        with pytest.raises(s3a.S3AError, match=r"127\.0\.0\.1:9.*Connection refused") as error:
            s3a.connector_jars({"spark.jars.ivySettings": str(settings)}, cache=tmp_path / "cache")
        assert "\n" not in str(error.value)
        assert "hunter2" not in str(error.value)
        assert len(str(error.value)) < 700


# --- Spark -----------------------------------------------------------------------------------------------------------


@pytest.mark.spark
def test_an_endpoint_that_dies_leaves_no_partition(
    real_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python and Java find credentials, region and endpoint in the files of the AWS profile."""
    use(real_s3, monkeypatch)
    file = simulated(0)
    real_s3.client().put_object(Bucket="own-bucket", Key=f"raw/{file.name}", Body=file.content)
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text(
        f"[fraud]\naws_access_key_id = {real_s3.access_key}\naws_secret_access_key = {real_s3.secret_key}\n"
    )
    credentials.chmod(stat.S_IRUSR | stat.S_IWUSR)
    config.write_text(f"[profile fraud]\nregion = {real_s3.region}\nendpoint_url = {real_s3.endpoint_url}\n")
    settings = {
        "AWS_PROFILE": "fraud",
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_CONFIG_FILE": str(config),
        "ML_PLATFORM_RAW_URI": "s3://own-bucket/raw",
        "ML_PLATFORM_LAKE_URI": "s3://own-bucket/lake",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "SPARK_DRIVER_MEMORY": "1g",
        "SPARK_PROPERTIES": json.dumps(NO_CODEGEN),
        "HOME": os.environ["HOME"],  # where Spark's connector may have been downloaded before
    }
    user = World(tmp_path / "user", overrides=settings)
    user.register(file.key)
    partition = real_s3.directory / f"buckets/own-bucket/lake/{CLEANED}/raw_file={file.key}"
    with no_process_left(user):
        process = user.start(*materialize_command(CLEANED, file.key, file.key), log=tmp_path / "log")
        wait_until(lambda: partition.exists() or process.poll() is not None, "the job writes", pause=0.02)
        real_s3.kill()
        assert process.wait(120) != 0
    printed = (tmp_path / "log").read_text()
    assert "AWS_ENDPOINT_URL_S3" in printed
    real_s3.start()
    report = f"{CLEANED}/raw_file={file.key}/_report.json"
    store = open_store(user.settings["ML_PLATFORM_LAKE_URI"])
    with pytest.raises(FileNotFoundError):
        store.read(report)
    # What the interrupted job left is not in the way.
    printed += user.launch(CLEANED, file.key, file.key)
    assert_counts(json.loads(store.read(report)), file.truth)
    assert real_s3.secret_key not in printed
