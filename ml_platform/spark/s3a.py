"""S3A, Hadoop's connector for S3, with the Spark that pip installs: its jars, and its settings.

PySpark from PyPI cannot read ``s3a://``: the connector and the AWS SDK are not in it. `connector_jars` downloads the
ones that match the installed Spark, once. Credentials are never among the settings: the JVM looks for them where boto3
does, in the environment, the profiles of ``~/.aws``, or the machine's own role.
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

#: The AWS SDK that each Hadoop release is built and tested with (aws-java-sdk-v2.version of its hadoop-project).
SDK_OF_HADOOP = {"3.4.1": "2.24.6", "3.4.2": "2.29.52", "3.4.3": "2.35.4", "3.5.0": "2.35.4"}

#: What S3A uses of the SDK. hadoop-aws asks for all of it in one bundle of 600 MB.
SDK_MODULES = ("s3", "s3-transfer-manager", "sts", "apache-client", "netty-nio-client")

#: The bundle, and what Spark brings itself in versions that go together.
EXCLUDED = ("software.amazon.awssdk:bundle", "io.netty:*", "org.slf4j:*")

DOWNLOAD_TIMEOUT_S = 900

#: Spark properties that say where packages come from, and so apply to the download.
REPOSITORY_PROPERTIES = ("spark.jars.ivySettings", "spark.jars.repositories")


class S3AError(RuntimeError):
    """Spark cannot be given S3 here; the message says why and what to do."""


@dataclass(frozen=True)
class S3Connection:
    """Which S3 boto3 speaks to: an endpoint, None for that of AWS, and a region."""

    endpoint_url: str | None
    region: str

    @classmethod
    def of_boto3(cls) -> S3Connection:
        """The one that AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION, a profile or boto3's defaults lead to."""
        import boto3

        found = boto3.Session().client("s3").meta
        host = urlsplit(found.endpoint_url).hostname or ""
        is_aws = host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        region = "us-east-1" if found.region_name in (None, "aws-global") else found.region_name
        return cls(None if is_aws else found.endpoint_url, region)


def s3a_properties(connection: S3Connection, *, path_style: bool | None = None) -> dict[str, str]:
    """Spark properties that lead ``s3a://`` to `connection`. No credentials are in them.

    `path_style` puts the bucket into the path, not the host name; the default is to do so at every endpoint but that
    of AWS.
    """
    options = {
        "endpoint.region": connection.region,
        # Looks in all the places that boto3 looks in; S3A's own list has no profiles before Hadoop 3.4.2.
        "aws.credentials.provider": "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider",
        # An S3 that is away is an error in about a minute; the defaults try for many. See docs/s3.md.
        "connection.establish.timeout": "5s",
        "connection.request.timeout": "20s",
        "connection.timeout": "20s",
        "attempts.maximum": "1",
        "retry.limit": "3",
        "retry.interval": "1s",
    }
    if connection.endpoint_url is not None:
        options["endpoint"] = connection.endpoint_url
        options["connection.ssl.enabled"] = str(connection.endpoint_url.startswith("https:")).lower()
    if path_style is None:
        path_style = connection.endpoint_url is not None
    options["path.style.access"] = str(path_style).lower()
    properties = {f"spark.hadoop.fs.s3a.{name}": value for name, value in options.items()}
    # A rename is a copy there: tasks put their files in place themselves. Nobody sees them before the report is there.
    return properties | {"spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2"}


def connector_properties(config: Mapping[str, str] | None = None, *, cache: Path = DEFAULT_CACHE) -> dict[str, str]:
    """The property ``spark.jars`` with the jars of `connector_jars` and those that the user's `config` has there.

    Nothing where `config` brings hadoop-aws itself. Raises S3AError.
    """
    config = config or {}
    own = config.get("spark.jars", "")
    if "hadoop-aws" in own + config.get("spark.jars.packages", ""):
        return {}
    jars = [jar for jar in own.split(",") if jar] + [str(jar) for jar in connector_jars(config, cache=cache)]
    return {"spark.jars": ",".join(jars)} if jars else {}


def hadoop_version(spark_home: Path) -> str:
    """Version of Hadoop in a Spark distribution. Raises S3AError if there is none."""
    for jar in (spark_home / "jars").glob("hadoop-client-api-*.jar"):
        return jar.stem.removeprefix("hadoop-client-api-")
    raise S3AError(f"the Spark in {spark_home} has no Hadoop (jars/hadoop-client-api-*.jar), which S3 needs")


def connector_jars(config: Mapping[str, str] | None = None, *, cache: Path = DEFAULT_CACHE) -> list[Path]:
    """The jars of S3A for the installed Spark, downloaded if the directory `cache` does not hold them yet.

    Empty if they are among Spark's own. Safe to call from several processes at once. In `config` count
    `REPOSITORY_PROPERTIES`, which may also be in spark-defaults.conf; without them Spark asks ~/.m2 and then Maven
    Central, or the mirror that DEFAULT_ARTIFACT_REPOSITORY names.

    Raises:
        S3AError: the version of Hadoop is unknown, or the download failed.
    """
    from pyspark.find_spark_home import _find_spark_home

    spark_home = Path(_find_spark_home())
    if any((spark_home / "jars").glob("hadoop-aws-*.jar")):
        return []
    hadoop = hadoop_version(spark_home)
    sdk = SDK_OF_HADOOP.get(hadoop)
    if sdk is None:
        raise S3AError(
            f"no AWS SDK is known to go with Hadoop {hadoop} of the installed Spark: use a PySpark with one of Hadoop "
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
    """Let Spark's own resolver fetch `packages`, and move the jars to `target` once all are there."""
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
                done = subprocess.run(
                    [*command, str(empty_program)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=DOWNLOAD_TIMEOUT_S,
                    check=False,
                )
                failed = done.returncode != 0
            except subprocess.TimeoutExpired:
                failed = True
        if failed:
            reason = _reason(log.read_text(errors="replace"))
            raise S3AError(
                f"the jars for S3 cannot be downloaded ({reason}): let this machine reach Maven Central, name a mirror "
                f"in DEFAULT_ARTIFACT_REPOSITORY, or copy {target} from a machine that has it (log: {log})"
            )
        (Path(directory) / "ivy" / "jars").rename(target)
    log.unlink()


def _reason(said: str) -> str:
    """The line of Spark's or Ivy's output that says most about a failure, without a password in an address."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = (
        r"JAVA_HOME|bin/java",
        r"Server access error",
        r"Host (?!repos\.spark-packages).* not found",
        r"Exception",
    )
    found = next((line for words in telling for line in lines if re.search(words, line)), lines[-1] if lines else "")
    return re.sub(r"//[^/@\s]*@", "//", found)[:200]
