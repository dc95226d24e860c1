"""The stack of deploy/ as processes of this machine, for tests: Compose's part is played here, the rest is deploy/'s.

Its runs work on clusters of the stand-in for the cloud, which end neither with the stack nor with one of its processes.

Commands, environment, dependencies, health checks and restart policy are read from compose.yaml, the image's
environment from Dockerfile. What containers change is changed back: names of services become 127.0.0.1, ports free
ones, directories those of the test, `init` a process group. Limits, capabilities and read-only file systems are left
out, and MLflow has one worker. A service is started when those that it needs listen; its health check, which starts a
Python, is left to the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import yaml
from dotenv import dotenv_values

from ml_platform.dev.cloud import DevCloud
from ml_platform.dev.cloud.processes import TetheredProcess, free_port, listens
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.postgres import PostgresServer
from ml_platform_tests.world import PROJECT, SHORT_LIVED_JAVA, SMALL_SEARCH_FILE, wait_until

DEPLOY = PROJECT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())

ARTIFACTS_BUCKET = "artifacts"
#: In place of compose.yaml's: a machine that is busy with other tests takes its time.
START_TIMEOUT_S = 240


#: ${NAME}, ${NAME:-default}, ${NAME:?message}
_VARIABLE = re.compile(r"\$\{(\w+)(?::[-?]([^}]*))?\}")
_DURATION = re.compile(r"(?:(\d+)m)?(?:(\d+)s)?")

# How Docker starts again what has ended: at once, then after longer and longer pauses, until it has run for a while.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _RUNS_WELL_AFTER_S = 0.1, 60.0, 10.0


def seconds(duration: str) -> float:
    """A duration of Compose: 1m30s."""
    found = _DURATION.fullmatch(duration)
    assert found, duration
    return 60 * int(found[1] or 0) + int(found[2] or 0)


@dataclass
class Service:
    """A service: what Compose would start, and what runs of it."""

    name: str
    command: list[str]
    environment: dict[str, str]
    needs: list[str]
    check: list[str]
    port: int | None
    to_group: bool
    grace_s: float
    log: Path
    process: TetheredProcess | None = None
    started_at: float = 0.0
    starts: int = 0
    pause_s: float = field(default=_FIRST_PAUSE_S)


class Stack:
    """A context manager: all services of compose.yaml, listening when it is entered; the scorer when it has a champion.

    Attributes:
        postgres: the server. cloud: where files and clusters are.
        home, secrets: Dagster's directory, and that of passwords and keys.
        mlflow_url, dagster_url, metrics_url: the published addresses.
    """

    def __init__(self, directory: Path, postgres: PostgresServer, cloud: DevCloud) -> None:
        self.directory, self.postgres, self.cloud = directory, postgres, cloud
        self.home, self.secrets, self._scratch = (directory / name for name in ("dagster", "secrets", "spark"))
        self._ports = {"5432": postgres.port} | {port: free_port() for port in ("3000", "4000", "5000", "8080", "9464")}
        self.dagster_url, self.mlflow_url, self.metrics_url = (
            f"http://127.0.0.1:{self._ports[port]}" for port in ("3000", "5000", "9464")
        )
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._write_files()
        self.services = {name: self._service(name, COMPOSE["services"][name]) for name in COMPOSE["services"]}

    def _write_files(self) -> None:
        for directory in (self.home, self.secrets, self._scratch):
            directory.mkdir(parents=True)
        for name in ("dagster.yaml", "workspace.yaml", "mlflow_logging.yaml"):
            shutil.copy(DEPLOY / name, self.home)
        settings = self.cloud.environment()
        keys = {name.lower(): settings.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        credentials = "[default]\n" + "".join(f"{name} = {key}\n" for name, key in keys.items())
        for name, content in {
            "postgres_password": self.postgres.password,
            "dagster_password": os.urandom(20).hex(),
            "mlflow_password": os.urandom(20).hex(),
            "aws_credentials": credentials,
        }.items():
            (self.secrets / name).write_text(content)
        settings |= {
            "DATAPROC_POLL_S": "1",
            "DATAPROC_JOB_PROPERTIES": json.dumps(NO_CODEGEN),
            "DATAPROC_PRICES": json.dumps({"s3-c2-m8": 1, "s3-c4-m16": 2, "network-ssd": 0.1, "network-hdd": 0.01}),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{ARTIFACTS_BUCKET}/mlflow",
            "MLFLOW_PORT": str(self._ports["5000"]),
            "DAGSTER_PORT": str(self._ports["3000"]),
            "ML_PLATFORM_RUN_CONFIG": str(SMALL_SEARCH_FILE),
        }
        (self.directory / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        self._settings = {name: value or "" for name, value in dotenv_values(self.directory / ".env").items()}

    def _image_environment(self) -> dict[str, str]:
        """ENV of the image, with this machine's directories; and what a container is not told but has."""
        final = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2]
        (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", final, re.MULTILINE)
        places = {
            "/opt/venv/bin": f"{Path(sys.executable).parent}:{DEPLOY}",
            "/opt/java": os.environ.get("JAVA_HOME", ""),
            "/opt/dagster": str(self.home),
            "/var/lib/spark": str(self._scratch),
            "$PATH": os.environ["PATH"],
        }
        environment = {}
        for setting in block.replace("\\\n", " ").split():
            name, _, value = setting.partition("=")
            for here, there in places.items():
                value = value.replace(here, there)
            environment[name] = value
        return {"HOME": str(self.directory), "PYTHONPATH": str(PROJECT), **SHORT_LIVED_JAVA} | environment

    def _here(self, text: str) -> str:
        """A text of compose.yaml: variables filled in, names and addresses of containers turned into this machine's."""
        text = _VARIABLE.sub(lambda found: self._settings.get(found[1]) or found[2] or "", text)
        text = re.sub(r"(?<=[/@])(postgres|mlflow|code)(?=:\d)", "127.0.0.1", text)
        text = re.sub(
            r"(?<![\w.])(3000|4000|5000|5432|8080|9464)(?!\w)", lambda found: str(self._ports[found[1]]), text
        )
        return text.replace("0.0.0.0", "127.0.0.1").replace("/run/secrets", str(self.secrets))

    def _service(self, name: str, described: dict[str, Any]) -> Service:
        assert described["restart"] == "unless-stopped"
        environment = self._image_environment()
        if described.get("env_file") == [".env"]:
            environment |= self._settings
        for key, value in described.get("environment", {}).items():
            # Without a value, Compose hands on its own.
            environment[key] = self._settings.get(key, "") if value is None else self._here(value)
        if environment.get("DAGSTER_CODE_HOST") == "code":
            environment["DAGSTER_CODE_HOST"] = "127.0.0.1"
        if name == "postgres":
            command, port = self.postgres.command, self.postgres.port
            environment |= self.postgres.environment(environment["PATH"])
        else:
            command = ["entrypoint.sh", *map(self._here, described["command"])]
            if "--workers" in command:
                command[command.index("--workers") + 1] = "1"
            port = int(command[command.index("--port") + 1]) if "--port" in command else None
        kind, *check = described["healthcheck"]["test"]
        assert kind == "CMD"
        return Service(
            name=name,
            command=command,
            environment=environment,
            needs=list(described.get("depends_on", {})),
            check=[self._here(word) for word in check],
            port=port,
            to_group=environment.get("TINI_KILL_PROCESS_GROUP") == "1",
            grace_s=seconds(described.get("stop_grace_period", "10s")),
            log=self.directory / f"{name}.log",
        )

    # starting and ending

    def __enter__(self) -> Stack:
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        try:
            self.start("postgres")
            self.create_databases(self.postgres)
            self.start()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.stop("scorer")  # in a session of its own, MLflow's server would outlive a killed one
        for service in self.services.values():
            if error[0] is not None:
                print(f"--- {service.name}", self.said(service.name), sep="\n")  # pytest shows it with the failure
            if service.process is not None and service.name != "postgres":
                service.process.kill()
        self.stop("postgres")

    def create_databases(self, server: PostgresServer) -> None:
        """What PostgreSQL's image does when it makes a new data directory."""
        environment = {**os.environ, **server.environment(), "SECRETS_DIRECTORY": str(self.secrets)}
        subprocess.run([DEPLOY / "create_databases.sh"], check=True, env=environment)

    def start(self, *names: str) -> None:
        """`docker compose up`: start services (default: all), each as soon as those that it needs listen."""
        services = [self.services[name] for name in names or self.services]
        for service in services:
            for needed in service.needs:
                self._wait_until_it_listens(self.services[needed])
            if service.process is None:
                self._launch(service)
        for service in services:
            if service.name != "scorer":  # it listens as soon as there is a champion
                self._wait_until_it_listens(service)

    def _wait_until_it_listens(self, service: Service) -> None:
        if service.name == "postgres":  # it listens before it answers, and its health check costs little
            wait_until(lambda: self.is_healthy("postgres"), "postgres is healthy", START_TIMEOUT_S)
        elif service.port is not None:
            port = service.port
            wait_until(lambda: listens(port), f"{service.name} listens", START_TIMEOUT_S)

    def stop(self, *names: str) -> None:
        """`docker compose stop`: SIGTERM as compose.yaml says, SIGKILL after the grace period; not started again."""
        for name in names:
            service = self.services[name]
            with self._lock:
                process, service.process = service.process, None
            if process is not None:
                process.stop(grace_s=service.grace_s, to_group=service.to_group)

    def kill(self, name: str) -> None:
        """`kill -9` of a service's main process; it is started again."""
        service = self.services[name]
        before = service.starts
        assert service.process is not None
        assert service.process.is_running()
        os.kill(service.process.pid, signal.SIGKILL)
        wait_until(lambda: service.starts > before, f"{name} is started again", 30)

    def run(self, name: str, *command: str) -> str:
        """`docker compose exec SERVICE entrypoint.sh COMMAND`; returns what it printed."""
        service = self.services[name]
        done = subprocess.run(
            ["entrypoint.sh", *command],
            env=service.environment,
            cwd=self.home,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def _launch(self, service: Service) -> None:
        # As in a container, no signal is ignored; what a script has started in the background ignores SIGINT.
        fresh = ("env", "--default-signal", f"--chdir={self.home}")
        service.process = TetheredProcess([*fresh, *service.command], log=service.log, env=service.environment)
        service.started_at = time.monotonic()
        service.starts += 1

    def _watch(self) -> None:
        """Start again what has ended."""
        while not self._ended.wait(0.05):
            for service in self.services.values():
                with self._lock:
                    process = service.process
                    if process is None or process.is_running():
                        continue
                    process.kill()  # a container ends with its main process
                    if time.monotonic() - service.started_at > _RUNS_WELL_AFTER_S:
                        service.pause_s = _FIRST_PAUSE_S
                    time.sleep(service.pause_s)
                    service.pause_s = min(2 * service.pause_s, _LONGEST_PAUSE_S)
                    self._launch(service)

    # looking

    def is_healthy(self, name: str) -> bool:
        """Whether the service's health check succeeds. As in Docker, it does not pass through the entry point."""
        service = self.services[name]
        if service.port is not None and not listens(service.port):
            return False  # spares the start of a program
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                service.check,
                env=service.environment,
                cwd=self.home,
                check=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=START_TIMEOUT_S,
            )
            return done.returncode == 0
        return False

    def said(self, name: str) -> str:
        """The end of a service's output."""
        log = self.services[name].log
        return log.read_text(errors="replace")[-10_000:] if log.exists() else ""

    @contextlib.contextmanager
    def instance(self, server: PostgresServer | None = None) -> Generator[dg.DagsterInstance]:
        """What Dagster has stored, in the stack's own database or in that of another server."""
        environment = self.services["daemon"].environment
        settings = {name: value for name, value in environment.items() if name.startswith("DAGSTER_")}
        settings["DAGSTER_POSTGRES_URL"], settings["PGPASSWORD"] = self._database("dagster", server or self.postgres)
        with mock.patch.dict(os.environ, settings), dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield instance

    def mlflow_database(self, server: PostgresServer) -> tuple[str, str]:
        """Address and password of MLflow's database on a server."""
        return self._database("mlflow", server)

    def _database(self, name: str, server: PostgresServer) -> tuple[str, str]:
        password = (self.secrets / f"{name}_password").read_text()
        return f"postgresql+psycopg2://{name}@127.0.0.1:{server.port}/{name}", password
