"""deploy/mlflow_server.sh from the first run to the second, and mlflow_database.py, on a real PostgreSQL.

systemd is played: `systemctl start` runs what the unit says. The script's directories are moved below the test's own.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import site
import subprocess
import sys
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ml_platform.dev.cloud.processes import free_port, listens
from ml_platform_tests.postgres import PostgresServer
from ml_platform_tests.world import PROJECT, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's"),
]

DEPLOY = PROJECT / "deploy"
PASSWORD = "a'b \"c$d`e\\ %f"

#: Programs that the script calls, each of which notes its arguments: others of the machine can read those.
NOTED = ("cat", "chmod", "cksum", "cmp", "dirname", "find", "install", "ln", "mktemp", "mv", "rm", "sleep", "touch")
NOTES = """#!/bin/sh
printf '%s\\n' "$0 $*" >>'{machine}/arguments'
exec {program} "$@"
"""

#: It hides no mistake of the script: a second `start` starts a second server. Stopping what does not run is fine.
SYSTEMCTL = """#!/bin/bash
set -eu
cd '{machine}'
printf '%s\\n' "$*" >>systemctl
case $1 in
start)
    unit=etc/systemd/system/$2
    set -a
    . "$(sed -n 's/^EnvironmentFile=//p' "$unit")"
    set +a
    # Each worker takes seconds to start.
    start=$(sed -n 's/^ExecStart=//p' "$unit")
    eval "exec setsid timeout 600 ${{start/--workers 2/--workers 1}}" >>server.log 2>&1 </dev/null &
    echo $! >pid
    ;;
stop)
    if [ -f pid ]; then
        kill -TERM -- "-$(cat pid)" || :
        while kill -0 -- "-$(cat pid)" 2>/dev/null; do sleep 0.1; done
        rm pid
    fi
    ;;
esac
"""

#: An interpreter whose environments see the packages of this one, so that pip finds all there and downloads nothing.
PYTHON = """#!/bin/sh
set -eu
[ "${{2:-}}" = venv ] || exec '{python}' "$@"
'{python}' "$@" --without-pip
printf '%s\\n' '{packages}' >"$(echo "$3"/lib/python3*/site-packages)/here.pth"
ln -s '{mlflow}' "$3/bin/mlflow"
mv "$3/bin/python" "$3/bin/real-python"
cp '{machine}/bin/noted-python' "$3/bin/python"
"""


@dataclass
class Machine:
    """A machine for the script."""

    root: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.programs = self.root / "bin"
        for directory in (self.programs, self.root / "run/systemd/system", self.root / "clone/deploy"):
            directory.mkdir(parents=True)
        script = (DEPLOY / "mlflow_server.sh").read_text()
        moved = re.sub(r"(?:\$root|(?<=[\s=]))/(?=(?:etc|opt|run|var)/)", f"{self.root}/", script)
        assert not re.search(r"(?<!\w)/(etc|opt|run|var)/", moved.replace(f"{self.root}/", ""))
        self.script = self.root / "clone/deploy/mlflow_server.sh"
        self.script.write_text(moved)
        self.script.chmod(0o755)
        for name in ("constraints.txt", "deploy/mlflow_database.py"):
            shutil.copy(PROJECT / name, self.root / "clone" / name)
        for name in NOTED:
            self.add_program(name, NOTES.format(machine=self.root, program=f"'{shutil.which(name)}'"))
        self.add_program("noted-python", NOTES.format(machine=self.root, program='"${0%/*}/real-python"'))
        self.add_program("systemctl", SYSTEMCTL.format(machine=self.root))
        python, packages = Path(sys.executable), site.getsitepackages()[0]
        values = {"machine": self.root, "mlflow": python.parent / "mlflow", "packages": packages}
        self.add_program("python", PYTHON.format(python=python.resolve(), **values))
        self.add_program("id", "#!/bin/sh\necho 0\n")

    def add_program(self, name: str, text: str) -> None:
        """A program that the script finds before the system's."""
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script; forgets what an earlier run asked of systemctl."""
        (self.root / "systemctl").unlink(missing_ok=True)
        return subprocess.run(
            [self.script],
            check=False,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{self.programs}:{os.environ['PATH']}",
                "PYTHON": str(self.programs / "python"),
                **environment,
            },
            timeout=300,
        )

    def lines(self, name: str) -> list[str]:
        """Lines of a file, none if there is no such file."""
        path = self.root / name
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def environments(self) -> list[Path]:
        """Complete environments of MLflow's server."""
        return [path.parent for path in self.root.glob("opt/mlflow/venv-*/complete")]

    def files(self) -> dict[str, tuple[bytes, int]]:
        """What the script wrote: content, and when."""
        found = [path for path in (self.root / "etc").rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    def api(self, method: str, **body: object) -> dict[str, object]:
        """A call of MLflow's API."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/2.0/mlflow/{method}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def remove(self) -> None:
        """End the server."""
        for group in self.lines("pid"):
            with suppress(ProcessLookupError):
                os.killpg(int(group), signal.SIGKILL)


@dataclass(frozen=True)
class Database:
    """MLflow's database on a server."""

    server: PostgresServer

    @property
    def address(self) -> str:
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.server.port}/mlflow"

    def schema(self) -> str:
        """All tables, and the version that they are of."""
        dump = [self.server.programs / "pg_dump", "--schema-only", "--restrict-key=fixed", "mlflow"]
        query = [self.server.programs / "psql", "-Atc", "SELECT version_num FROM alembic_version", "mlflow"]
        found = [
            subprocess.run(command, env=self.server.environment(), check=True, capture_output=True, text=True).stdout
            for command in (dump, query)
        ]
        return "\n".join(found)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Generator[Database]:
    secrets = tmp_path_factory.mktemp("secrets")
    for name in ("dagster", "mlflow"):
        (secrets / f"{name}_password").write_text(PASSWORD)
    with PostgresServer() as server:
        environment = {**os.environ, **server.environment(), "SECRETS_DIRECTORY": str(secrets)}
        subprocess.run([DEPLOY / "create_databases.sh"], check=True, env=environment)
        yield Database(server)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.remove()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("postgresql+psycopg2://mlflow@127.0.0.1:9/mlflow", "Connection refused"),
        ("db", "is no address of a database"),
        # A wrong password: see test_a_server_is_installed_once_and_brought_up_to_date_by_the_next_run.
    ],
)
def test_an_error_of_the_database_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str, says: str) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", address)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(DEPLOY / "mlflow_database.py"), run_name="__main__")
    (line,) = str(end.value).splitlines()
    assert line.startswith("mlflow_database: ")
    assert says in line
    assert PASSWORD not in line


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("root", "run it as root"),
        ("systemd", "systemd does not run here"),
        ("setting", "no database: set MLFLOW_BACKEND_STORE_URI"),
        ("python", "false is not a Python 3.11 to 3.14 with venv"),
    ],
)
def test_missing_conditions_are_named_before_anything_is_done(
    machine: Machine, database: Database, lacks: str, says: str
) -> None:
    if lacks == "root":
        machine.add_program("id", "#!/bin/sh\necho 1000\n")
    if lacks == "systemd":
        (machine.root / "run/systemd/system").rmdir()
    done = machine.run(
        MLFLOW_BACKEND_STORE_URI="" if lacks == "setting" else database.address,
        MLFLOW_ARTIFACTS_DESTINATION="s3://artifacts/mlflow",
        PGPASSWORD=PASSWORD,
        **({"PYTHON": "false"} if lacks == "python" else {}),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlflow_server: {says}")
    assert machine.files() == {}
    assert machine.lines("systemctl") == []


def test_a_server_is_installed_once_and_brought_up_to_date_by_the_next_run(
    machine: Machine, database: Database, tmp_path: Path
) -> None:
    settings = {
        "MLFLOW_BACKEND_STORE_URI": database.address,
        "MLFLOW_ARTIFACTS_DESTINATION": f"{tmp_path}/var/lib/mlflow/artifacts",
        "MLFLOW_PORT": str(machine.port),
    }
    steps = [f"{verb} mlflow.service" for verb in ("stop", "enable --quiet", "start")]
    steps.insert(1, "daemon-reload")
    constraints = machine.root / "clone/constraints.txt"
    versions = constraints.read_text()

    # A database that refuses: the service is not started.
    refused = machine.run(**settings, PGPASSWORD="not-that-one")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("mlflow_database: ")
    assert "password authentication failed" in refused.stderr
    assert machine.lines("systemctl") == []
    assert machine.files() == {}

    done = machine.run(**settings, PGPASSWORD=PASSWORD)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"mlflow_server: MLflow answers on http://127.0.0.1:{machine.port}"
    assert machine.lines("systemctl") == steps[1:]
    (experiment,) = machine.api("experiments/create", name="kept").values()
    files, schema = machine.files(), database.schema()
    assert sorted(files) == ["etc/mlflow/server.env", "etc/systemd/system/mlflow.service"]

    # Packages that cannot be installed: the server runs on.
    constraints.write_text(versions + "no version\n")
    unpacked = machine.run()
    assert unpacked.returncode == 1
    assert unpacked.stderr.splitlines()[-1] == "mlflow_server: the packages cannot be installed; nothing was changed"
    assert machine.lines("systemctl") == []

    # An upgrade that the database refuses: the old server runs again, with its settings.
    constraints.write_text(versions + "# newer\n")
    not_upgraded = machine.run(PGPASSWORD="not-that-one")
    assert not_upgraded.returncode == 1
    went_back = [steps[0], "daemon-reload", steps[-1]]
    assert machine.lines("systemctl") == [steps[0], *went_back]
    wait_until(lambda: listens(machine.port), "the old server runs again")
    assert len(machine.environments()) == 2
    assert machine.files() == files

    # A new server that does not answer, because its port is another's: likewise. It is asked without pauses.
    machine.add_program("sleep", "#!/bin/sh\n")
    silent = machine.run(MLFLOW_PORT=str(database.server.port))
    (machine.programs / "sleep").unlink()
    assert silent.returncode == 1
    assert "mlflow_server: MLflow does not answer: journalctl -u mlflow" in silent.stderr.splitlines()
    assert machine.lines("systemctl") == [*steps, *went_back]
    wait_until(lambda: listens(machine.port), "the old server runs again")
    assert len(machine.environments()) == 2
    assert {name: content for name, (content, _) in machine.files().items()} == {
        name: content for name, (content, _) in files.items()
    }
    files = machine.files()

    again = machine.run()
    assert again.returncode == 0, again.stderr
    assert machine.lines("systemctl") == steps
    assert len(machine.environments()) == 1
    assert machine.files() == files
    assert database.schema() == schema
    assert machine.api(f"experiments/get?experiment_id={experiment}")["experiment"]

    # The password reached the server, and nothing that others of the machine can read.
    assert (machine.root / "etc/mlflow/server.env").stat().st_mode & 0o777 == 0o600
    (session,) = machine.lines("pid")
    listed = subprocess.run(["ps", "-s", session, "-o", "args="], check=True, capture_output=True, text=True)
    places = {
        "arguments of the script's programs": "\n".join(machine.lines("arguments")),
        "arguments of the server": listed.stdout,
        "output": "".join(run.stdout + run.stderr for run in (refused, done, unpacked, not_upgraded, silent, again)),
        "unit": files["etc/systemd/system/mlflow.service"][0].decode(),
        "log": "\n".join(machine.lines("server.log")),
    }
    assert all(places.values())
    assert all(word in "".join(places.values()) for word in ("mlflow_database.py", "pip install", "uvicorn"))
    for place, text in places.items():
        assert not [password for password in (PASSWORD, "not-that-one") if password in text], place
