"""S3A, Hadoop's S3 connector, for PySpark from PyPI: its jars and its settings.

PySpark from PyPI cannot read ``s3a://``, because it lacks the connector and the AWS SDK. `connector_jars` downloads the
versions that match the installed Spark, once. The settings contain no credentials: the JVM looks for them where boto3
does, in the environment, the profiles of ``~/.aws``, or the machine's role.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_CACHE = Path.home() / ".cache" / "ml_platform"

#: AWS SDK version that each Hadoop release is built and tested with (aws-java-sdk-v2.version of its hadoop-project).
SDK_OF_HADOOP = {"3.4.1": "2.24.6", "3.4.2": "2.29.52", "3.4.3": "2.35.4", "3.5.0": "2.35.4"}

#: SDK modules that S3A uses; hadoop-aws depends on the complete bundle of 600 MB.
SDK_MODULES = ("s3", "s3-transfer-manager", "sts", "apache-client", "netty-nio-client")

#: The bundle, and libraries that Spark already provides in matching versions.
EXCLUDED = ("software.amazon.awssdk:bundle", "io.netty:*", "org.slf4j:*")

DOWNLOAD_TIMEOUT_S = 900

#: Spark properties that select package repositories; the download uses them, too.
REPOSITORY_PROPERTIES = ("spark.jars.ivySettings", "spark.jars.repositories")


class S3AError(RuntimeError):
    """S3A cannot be set up; the message says why and what to do."""


@dataclass(frozen=True)
class S3Connection:
    """S3 endpoint (None for AWS) and region."""

    endpoint_url: str | None
    region: str

    @classmethod
    def from_boto3(cls) -> S3Connection:
        """Connection that boto3 uses, from AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION, a profile or its defaults."""
        import boto3

        client_meta = boto3.Session().client("s3").meta
        host = urlsplit(client_meta.endpoint_url).hostname or ""
        is_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        region = "us-east-1" if client_meta.region_name in (None, "aws-global") else client_meta.region_name
        return cls(None if is_aws else client_meta.endpoint_url, region)


def s3a_properties(connection: S3Connection) -> dict[str, str]:
    """Spark properties for ``s3a://`` on `connection`, without credentials."""
    options = {
        "endpoint.region": connection.region,
        # Searches the same places as boto3; S3A's default chain lacks profiles before Hadoop 3.4.2.
        "aws.credentials.provider": "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider",
        # Fail in about a minute if S3 is unreachable; the defaults retry for many. See docs/s3.md.
        "connection.establish.timeout": "5s",
        "connection.request.timeout": "20s",
        "connection.timeout": "20s",
        "attempts.maximum": "1",
        "retry.limit": "3",
        "retry.interval": "1s",
        # Whether the bucket is in the path rather than in the host name, which only AWS resolves everywhere.
        "path.style.access": str(connection.endpoint_url is not None).lower(),
    }
    if connection.endpoint_url is not None:
        options["endpoint"] = connection.endpoint_url
        options["connection.ssl.enabled"] = str(connection.endpoint_url.startswith("https:")).lower()
    properties = {f"spark.hadoop.fs.s3a.{name}": value for name, value in options.items()}
    # S3 renames by copying, so tasks write files in place; readers ignore them until the report exists.
    return properties | {"spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2"}


def connector_properties(config: Mapping[str, str] | None = None, *, cache: Path = DEFAULT_CACHE) -> dict[str, str]:
    """Property ``spark.jars`` with the jars of `connector_jars` and those in the user's `config`.

    Empty if `config` already provides hadoop-aws. Raises S3AError.
    """
    config = config or {}
    user_jars = config.get("spark.jars", "")
    if "hadoop-aws" in user_jars + config.get("spark.jars.packages", ""):
        return {}
    jars = [jar for jar in user_jars.split(",") if jar] + [str(jar) for jar in connector_jars(config, cache=cache)]
    return {"spark.jars": ",".join(jars)} if jars else {}


def hadoop_version(spark_home: Path) -> str:
    """Hadoop version of a Spark distribution. Raises S3AError if it has no Hadoop."""
    for jar in (spark_home / "jars").glob("hadoop-client-api-*.jar"):
        return jar.stem.removeprefix("hadoop-client-api-")
    raise S3AError(f"the Spark in {spark_home} has no Hadoop (jars/hadoop-client-api-*.jar), which S3 needs")


def connector_jars(config: Mapping[str, str] | None = None, *, cache: Path = DEFAULT_CACHE) -> list[Path]:
    """S3A jars for the installed Spark, downloaded if the directory `cache` does not contain them yet.

    Empty if Spark already includes them. Safe to call from several processes at once. Of `config`, only
    `REPOSITORY_PROPERTIES` are used, which may also be in spark-defaults.conf; by default Spark tries ~/.m2 and then
    Maven Central, or the mirror in DEFAULT_ARTIFACT_REPOSITORY.

    Raises:
        S3AError: the Hadoop version is unknown, or the download failed.
    """
    from pyspark.find_spark_home import _find_spark_home

    spark_home = Path(_find_spark_home())
    if any((spark_home / "jars").glob("hadoop-aws-*.jar")):
        return []
    hadoop = hadoop_version(spark_home)
    sdk = SDK_OF_HADOOP.get(hadoop)
    if sdk is None:
        raise S3AError(
            f"no known AWS SDK version for Hadoop {hadoop} of the installed Spark: use a PySpark with one of Hadoop "
            f"{', '.join(SDK_OF_HADOOP)}, or set spark.jars.packages to org.apache.hadoop:hadoop-aws:{hadoop}"
        )
    packages = [f"org.apache.hadoop:hadoop-aws:{hadoop}"]
    packages += [f"software.amazon.awssdk:{module}:{sdk}" for module in SDK_MODULES]
    target = cache / f"s3a-hadoop-{hadoop}-sdk-{sdk}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _download(packages, target, spark_home, config or {})
    return sorted(target.glob("*.jar"))


def _download(packages: list[str], target: Path, spark_home: Path, config: Mapping[str, str]) -> None:
    """Download `packages` with Spark's resolver, and move the jars to `target` once all are complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        empty_program = Path(directory) / "nothing.py"
        empty_program.touch()
        properties = {name: config[name] for name in REPOSITORY_PROPERTIES if name in config}
        properties |= {"spark.jars.ivy": f"{directory}/ivy", "spark.pyspark.python": sys.executable}
        command = [str(spark_home / "bin" / "spark-submit"), "--master", "local[1]"]
        command += ["--packages", ",".join(packages), "--exclude-packages", ",".join(EXCLUDED)]
        command += [word for name, value in properties.items() for word in ("--conf", f"{name}={value}")]
        log = target.with_name(f"{target.name}.log")
        with log.open("w") as output:
            try:
                process = subprocess.run(
                    [*command, str(empty_program)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=DOWNLOAD_TIMEOUT_S,
                    check=False,
                )
                failed = process.returncode != 0
            except subprocess.TimeoutExpired:
                failed = True
        if failed:
            reason = _failure_reason(log.read_text(errors="replace"))
            raise S3AError(
                f"cannot download the S3A jars ({reason}): give this machine access to Maven Central, set a mirror in "
                f"DEFAULT_ARTIFACT_REPOSITORY, or copy {target} from another machine (log: {log})"
            )
        (Path(directory) / "ivy" / "jars").rename(target)
    log.unlink()


def _failure_reason(output: str) -> str:
    """Most informative line of Spark's or Ivy's output after a failure, with credentials in URLs removed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    patterns = (
        r"JAVA_HOME|bin/java",
        r"Server access error",
        r"Host (?!repos\.spark-packages).* not found",
        r"Exception",
    )
    matches = (line for pattern in patterns for line in lines if re.search(pattern, line))
    reason = next(matches, lines[-1] if lines else "")
    return re.sub(r"//[^/@\s]*@", "//", reason)[:200]
