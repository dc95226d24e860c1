"""PySpark jobs of the stand-in for Data Proc: spark-submit of the installed PySpark on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ml_platform.dev.cloud.processes import TetheredProcess
from ml_platform.settings import SECRET_PROPERTY
from ml_platform.spark.session import default_spark_config

#: Seconds between SIGTERM and SIGKILL.
GRACE_SECONDS = 10.0
#: Job properties that do not apply, because the stand-in has one machine and no YARN.
IGNORED_PROPERTIES = ("spark.master", "spark.submit.deployMode")
FAILED_TO_START = 127


@dataclass
class SparkSubmit:
    """Launcher of PySpark jobs.

    `spark_properties` are the cluster's own (S3A endpoint, jars); they must not hold credentials, since they become
    command-line arguments. `environment` is added to PATH, HOME and the like in the processes' environment: the
    cluster's S3 credentials and endpoint (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL_S3,
    AWS_DEFAULT_REGION), JAVA_HOME if java is not in PATH. A job's files are fetched with the same credentials before it
    starts, or by `fetch`, which takes a URI and the path to write.
    """

    spark_properties: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    fetch: Callable[[str, Path], None] | None = None
    master: str = "local[2]"
    driver_memory: str = "1g"

    def __post_init__(self) -> None:
        if secret := [name for name in self.spark_properties if SECRET_PROPERTY.search(name)]:
            raise ValueError(
                f"{', '.join(secret)}: Spark properties are visible to all users of this machine;"
                " pass credentials in `environment`"
            )

    def start(self, spec: Any, directory: Path) -> SparkJob:
        """Start the job of a ``PysparkJob`` message; `directory` is for its files and its driver's log."""
        return SparkJob(self, spec, directory)

    def fetch_file(self, uri: str, target: Path) -> None:
        """Copy the file at `uri` to the path `target`, as the cluster's service account would."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.fetch is not None:
            self.fetch(uri, target)
            return
        parts = urlsplit(uri)
        if parts.scheme == "file":
            shutil.copyfile(parts.path, target)
        elif parts.scheme in ("s3a", "s3"):
            # Without urlsplit, which would cut the key at a question mark.
            bucket, _, key = uri.partition("://")[2].partition("/")
            self._s3().download_file(bucket, key, str(target))
        else:
            raise ValueError(f"cannot fetch {uri}: only s3a://, s3:// and file:// are supported")

    def _s3(self) -> Any:
        import boto3

        return boto3.session.Session().client(
            "s3",
            aws_access_key_id=self.environment.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=self.environment.get("AWS_SECRET_ACCESS_KEY"),
            endpoint_url=self.environment.get("AWS_ENDPOINT_URL_S3"),
            region_name=self.environment.get("AWS_DEFAULT_REGION", "us-east-1"),
        )

    def process_environment(self, directory: Path) -> dict[str, str]:
        """Complete environment of a job's processes; nothing is inherited from the stand-in."""
        home = self.environment.get("JAVA_HOME")
        java = f"{home}/bin/java" if home else shutil.which("java")
        if not java or not Path(java).exists():
            raise RuntimeError("java was not found; install Java 17 or 21, or set JAVA_HOME")
        return {
            "PATH": os.pathsep.join([str(Path(java).parent), os.defpath]),
            "HOME": str(directory),
            "TMPDIR": str(directory / "tmp"),
            "LANG": "C.UTF-8",
            "SPARK_HOME": spark_home(),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": sys.executable,
            "PYSPARK_DRIVER_PYTHON": sys.executable,
            **self.environment,
        }

    def command(self, spec: Any, paths: Mapping[str, Path]) -> list[str]:
        """Command line of a job; `paths` are its local files by URI."""

        def local(uris: Any) -> str:
            # An archive's URI may name the directory to unpack to: venv.tar.gz#venv
            return ",".join(f"{paths[_without_fragment(uri)]}{''.join(uri.partition('#')[1:])}" for uri in uris)

        properties = {
            **default_spark_config(self.master, self.driver_memory),
            **self.spark_properties,
            **{name: value for name, value in spec.properties.items() if name not in IGNORED_PROPERTIES},
        }
        # The options of spark-submit would replace the cluster's own jars and packages.
        for name, values in (
            ("spark.jars", [local([uri]) for uri in spec.jar_file_uris]),
            ("spark.jars.packages", spec.packages),
            ("spark.jars.repositories", spec.repositories),
            ("spark.jars.excludes", spec.exclude_packages),
        ):
            joined = ",".join(filter(None, [properties.get(name), *values]))
            if joined:
                properties[name] = joined
        command = [f"{spark_home()}/bin/spark-submit"]
        for name, value in properties.items():
            command += ["--conf", f"{name}={value}"]
        for option, uris in (
            ("--py-files", spec.python_file_uris),
            ("--files", spec.file_uris),
            ("--archives", spec.archive_uris),
        ):
            if uris:
                command += [option, local(uris)]
        return [*command, str(paths[spec.main_python_file_uri]), *spec.args]


def spark_home() -> str:
    """Directory of the installed PySpark. Raises RuntimeError if it is not installed."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("pyspark is not installed in this Python; install it to run jobs")
    return next(iter(spec.submodule_search_locations))


def _without_fragment(uri: str) -> str:
    return uri.partition("#")[0]


class SparkJob:
    """A job, running or finished, in its own process group."""

    def __init__(self, spark: SparkSubmit, spec: Any, directory: Path) -> None:
        self._spark, self._spec, self._directory = spark, spec, directory
        self._lock = threading.Lock()
        self._process: TetheredProcess | None = None
        self._ended = False
        self._exit_code: int | None = None
        (directory / "tmp").mkdir(parents=True)
        self.log_file = directory / "driver.log"
        self.log_file.touch()
        self._thread = threading.Thread(target=self._run, name=f"job {directory.name}", daemon=True)
        self._thread.start()

    @property
    def started(self) -> bool:
        """True once spark-submit was started; the job's files are fetched before that."""
        return self._process is not None

    @property
    def exit_code(self) -> int | None:
        """Exit code of spark-submit, 127 if it could not be started, None while the job runs."""
        return self._exit_code

    def _run(self) -> None:
        try:
            command, environment = self._prepare()
            with self._lock:
                if self._ended:
                    raise RuntimeError("the job was ended before it started")
                in_directory = ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(self._directory)]
                self._process = TetheredProcess([*in_directory, *command], log=self.log_file, env=environment)
            self._exit_code = self._process.wait()
        except Exception as error:
            with self.log_file.open("a", encoding="utf-8") as log:
                log.write(f"{type(error).__name__}: {error}\n")
            self._exit_code = FAILED_TO_START

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        spec = self._spec
        uris = [spec.main_python_file_uri, *spec.python_file_uris, *spec.file_uris, *spec.jar_file_uris]
        paths: dict[str, Path] = {}
        for uri in map(_without_fragment, [*uris, *spec.archive_uris]):
            if uri not in paths:
                # One directory per file, because two files may have the same name.
                folder = Path(tempfile.mkdtemp(prefix="file-", dir=self._directory))
                paths[uri] = folder / uri.rsplit("/", 1)[-1]
                self._spark.fetch_file(uri, paths[uri])
        return self._spark.command(spec, paths), self._spark.process_environment(self._directory)

    def terminate(self) -> None:
        """Send SIGTERM to the job's process group, and SIGKILL after GRACE_SECONDS."""
        process = self._end()
        if process is not None:
            process.terminate()
            timer = threading.Timer(GRACE_SECONDS, self.kill)
            timer.daemon = True
            timer.start()

    def kill(self) -> None:
        """Kill the job and wait for its end."""
        process = self._end()
        if process is not None:
            process.kill()
        self._thread.join(timeout=GRACE_SECONDS)

    def _end(self) -> TetheredProcess | None:
        """Prevent the job from starting; return its process if it is running."""
        with self._lock:
            self._ended = True
            return self._process if self._exit_code is None else None
