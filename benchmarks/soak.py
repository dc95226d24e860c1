"""What grows while the platform runs for months: the daemon, its code server, and all that they leave behind.

Dagster's daemon and code server, two processes that last, look for new files once a day; a raw file arrives every few
days. Storage is SQLite. The days are accelerated: between two ticks of the sensor everything that Dagster remembers of
them is made a day older, so that the next tick is due at once and retention deletes what is past it. Each file is
processed on the day on which it comes, with a small search; the other ticks find nothing to do. After a file's run
and again before the next file comes, all that there is, is counted: hence what a file adds, and what a tick adds.

Ends with an error if something grows that should not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import yaml

from benchmarks.common import ROWS_PER_CUSTOMER, markdown, say
from ml_platform.dev.simulator import Simulation
from ml_platform.operations.dead_runs import PROCESS_TAG

PROJECT = Path(__file__).resolve().parents[1]
SENSOR = "new_raw_files"
#: A condition on Dagster's table job_ticks; other sensors tick, too.
TICKS_OF_SENSOR = f"""tick_body LIKE '%"{SENSOR}"%'"""
DAY_S = 24 * 60 * 60
TICK_TIMEOUT_S, RUN_TIMEOUT_S = 1800, 3600

#: A failed run is made up for by the next tick's; so often in a row.
ATTEMPTS = 3

#: What the helpers of a run's process take to see that it has ended.
SETTLE_S = 10

#: What an interrupted or careless job would leave in the lake.
LEFTOVERS = ("_temporary", ".spark-staging*", ".*.tmp", ".*.????????????????????????????????")

#: Per cent that resident memory may grow in the second half.
MEMORY_TOLERANCE = 5

#: What a tick may seem to add to a figure, by chance.
TICK_TOLERANCE = 0.1

#: What no tick and no file may add to. Memory is apart: it is judged by its growth in the second half.
CONSTANT = (
    *("daemon: open files", "code server: open files"),
    *("processes", "TMPDIR: entries", "working directory: entries", "lake: leftovers", "lake/_code: entries"),
)

#: Threads of pools, which start one more in a busy moment: so many in the second half are no leak, which would add one
#: for each file or tick.
THREADS = ("daemon: threads", "code server: threads")
POOL_THREADS = 2

MEMORY = ("daemon: memory, MB", "code server: memory, MB")
SKIPPED = f"dagster: job_ticks, skipped ones of {SENSOR}"

Sample = dict[str, float]


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=200, help="days, with a tick each (default: 200)")
    parser.add_argument("--files", type=int, default=30, help="raw files that arrive (default: 30)")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of a file, about (default: 10000)")
    parser.add_argument("--work", type=Path, help="empty directory to keep everything in (default: none)")
    parser.add_argument("--json", type=Path, help="also write the samples to this file")
    arguments = parser.parse_args()
    if not 2 <= arguments.files <= arguments.ticks // 2:
        parser.error("--files takes 2 or more, and --ticks at least twice as many: some must find nothing new")
    with tempfile.TemporaryDirectory(prefix="ml-platform-soak-") as temporary:
        world = World((arguments.work or Path(temporary)).absolute())
        samples = []
        for found in soak(world, arguments.ticks, arguments.files, arguments.rows):
            samples.append(found)
            if arguments.json:  # what there is so far: it takes hours
                arguments.json.write_text(json.dumps(samples, indent=1))
    faults = verdict(samples)
    print(table(samples) + "\n\n" + "\n".join(faults or ["nothing leaks"]))
    if faults:
        raise SystemExit(1)


@dataclass(frozen=True)
class World:
    """A user's directory, and the daemon that works in it."""

    root: Path

    def __post_init__(self) -> None:
        for directory in (self.raw, self.home, self.temporary):
            directory.mkdir(parents=True)
        shutil.copy(PROJECT / "dagster.yaml", self.home)

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def lake(self) -> Path:
        return self.root / "lake"

    @property
    def home(self) -> Path:
        return self.root / "dagster_home"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        """What the processes get to see of the environment."""
        kept = {name: os.environ[name] for name in ("PATH", "JAVA_HOME", "LANG") if name in os.environ}
        return kept | {
            "HOME": str(self.root),
            "TMPDIR": str(self.temporary),
            # Short runs gain nothing from the optimizing compiler.
            "JAVA_TOOL_OPTIONS": f"-Djava.io.tmpdir={self.temporary} -XX:TieredStopAtLevel=1",
            "PYTHONPATH": str(PROJECT),
            "DAGSTER_HOME": str(self.home),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "ML_PLATFORM_RAW_URI": str(self.raw),
            "ML_PLATFORM_LAKE_URI": str(self.lake),
            "ML_PLATFORM_RUN_CONFIG": str(PROJECT / "ml_platform_tests" / "small_search.yaml"),
        }

    @contextmanager
    def services(self) -> Generator[Services]:
        """Daemon and code server, in processes that last, until the block ends; their logs are in the root."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = ["--host", "127.0.0.1", "--port", port]
        workspace = str(PROJECT / "deploy" / "workspace.yaml")
        with ExitStack() as stack:
            code = self.start("dagster", "api", "grpc", *address, "-m", "ml_platform.definitions")
            stack.callback(stop, code)
            address_of_code = {"DAGSTER_CODE_HOST": "127.0.0.1", "DAGSTER_CODE_PORT": port}
            daemon = self.start("dagster._daemon", "run", "--workspace", workspace, **address_of_code)
            stack.callback(stop, daemon)
            yield Services(psutil.Process(daemon.pid), psutil.Process(code.pid))

    def start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{module}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=self.root,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process as a process manager does."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Services:
    """The processes that last."""

    daemon: psutil.Process
    code: psutil.Process

    def by_name(self) -> dict[str, psutil.Process]:
        """Those whose memory and files are counted, by what they are called in the table."""
        return {"daemon": self.daemon, "code server": self.code}

    def count(self) -> int:
        """Processes, runs among them."""
        return 2 + len(self.daemon.children(recursive=True)) + len(self.code.children(recursive=True))


def soak(world: World, ticks: int, files: int, rows: int) -> Iterator[Sample]:
    """Let `ticks` days pass in which `files` raw files come; two samples for each file, in order."""
    simulation = Simulation(days_per_file=20, customers=round(rows / ROWS_PER_CUSTOMER * 1.5), terminals=400, radius=10)
    # Opened first: processes that make Dagster's SQLite files at the same instant find them locked.
    with dg.DagsterInstance.from_config(str(world.home)) as instance, world.services() as services:
        clock = Clock(world, instance)
        clock.wait_for_tick()  # the first, of an empty directory
        for index in range(files):
            draft = world.root / "draft"
            with draft.open("wb") as out:
                simulation.write_file(index, out)
            draft.rename(world.raw / simulation.file_name(index))
            for _ in range(ATTEMPTS):
                known = instance.get_runs_count()
                clock.next_day()
                if wait_for_run(instance, known + 1):
                    break
            else:
                raise SystemExit(f"{ATTEMPTS} runs failed: see the logs in --work")
            yield sample(world, services, clock.ticks, index + 1)
            while clock.ticks < 1 + ticks * (index + 1) // files:
                clock.next_day()
            yield (found := sample(world, services, clock.ticks, index + 1))
            figures = ", ".join(f"{name} {found[name]:.0f}" for name in ("ticks", *MEMORY))
            say(f"file {index + 1} of {files}: {figures}")


def wait_until(condition: Callable[[], Any], what: str, timeout: float) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {timeout} s in vain until {what}: see the logs in --work")
        time.sleep(0.2)
    return value


def wait_for_run(instance: dg.DagsterInstance, count: int) -> bool:
    """Wait until the run that makes it `count` runs, and its process, have ended; whether it succeeded."""

    def ended() -> dg.DagsterRun | None:
        runs = instance.get_runs()
        return runs[0] if len(runs) == count and runs[0].is_finished else None

    run = wait_until(ended, f"run {count} has ended", RUN_TIMEOUT_S)
    if process := run.tags.get(PROCESS_TAG):
        pid = int(process.split(":")[-2])
        wait_until(lambda: not psutil.pid_exists(pid), "the run's process has ended", TICK_TIMEOUT_S)
    time.sleep(SETTLE_S)
    if run.status != dg.DagsterRunStatus.SUCCESS:
        say(f"run {run.run_id} ended with {run.status.value}")
    return run.status == dg.DagsterRunStatus.SUCCESS


class Clock:
    """The days of a world: counts the sensor's ticks, and makes what Dagster remembers of them older."""

    def __init__(self, world: World, instance: dg.DagsterInstance) -> None:
        self._database = world.home / "schedules" / "schedules.db"
        self._instance = instance
        self._last_id = 0
        self.ticks = 0

    def next_day(self) -> None:
        """Let a day pass, and wait for its tick."""
        with closing(sqlite3.connect(self._database, timeout=60)) as connection, connection:
            connection.execute("UPDATE job_ticks SET timestamp = strftime('%Y-%m-%d %H:%M:%f', timestamp, '-1 day')")
        self._make_due()
        self.wait_for_tick()

    def wait_for_tick(self) -> None:
        """Wait until the next tick has ended."""
        deadline = time.monotonic() + TICK_TIMEOUT_S
        asked = time.monotonic()
        while not (tick := self._newest_tick()) or tick[0] == self._last_id or tick[1] == "STARTED":
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {TICK_TIMEOUT_S} s in vain for a tick: see the logs in --work")
            if tick and tick[0] == self._last_id and time.monotonic() > asked + 20:
                self._make_due()  # the daemon was about to write the sensor's state when this was done before
                asked = time.monotonic()
            time.sleep(0.2)
        if tick[1] == "FAILURE":
            raise SystemExit("the tick failed: see the logs in --work")
        self._last_id = tick[0]
        self.ticks += 1

    def _newest_tick(self) -> tuple[int, str] | None:
        if not self._database.exists():
            return None
        with closing(sqlite3.connect(self._database, timeout=60)) as connection:
            try:
                query = f"SELECT id, status FROM job_ticks WHERE {TICKS_OF_SENSOR} ORDER BY id DESC LIMIT 1"
                return connection.execute(query).fetchone()
            except sqlite3.OperationalError:  # the daemon has not made the table yet
                return None

    def _make_due(self) -> None:
        """The sensor last ticked a day ago."""
        yesterday = time.time() - DAY_S
        for state in self._instance.all_instigator_state():
            if state.instigator_name == SENSOR:
                data: Any = state.instigator_data
                data = data._replace(last_tick_timestamp=yesterday, last_tick_start_timestamp=yesterday)
                self._instance.update_instigator_state(state.with_data(data))


def sample(world: World, services: Services, ticks: int, files: int) -> Sample:
    """All that is counted, by name."""
    found: Sample = {"ticks": ticks, "files": files}
    for name, process in services.by_name().items():
        found[f"{name}: memory, MB"] = process.memory_info().rss / 1e6
        found[f"{name}: threads"] = process.num_threads()
        # Databases are open for moments only.
        found[f"{name}: open files"] = min(process.num_fds() for _ in range(20) if not time.sleep(0.1))
    found["processes"] = services.count()
    found["TMPDIR: entries"] = len(entries(world.temporary))
    found["working directory: entries"] = len(list(world.root.iterdir()))
    found["lake: leftovers"] = sum(len(list(world.lake.rglob(pattern))) for pattern in LEFTOVERS)
    found["lake/_code: entries"] = len(entries(world.lake / "_code"))
    runs = sum(1 for entry in (world.home / "storage").iterdir() if len(entry.name) == 36)
    found["DAGSTER_HOME/storage: logs of runs"] = runs
    logs = [entry for entry in (world.home / "storage").iterdir() if len(entry.name) != 36]
    found["DAGSTER_HOME/storage: logs of ticks"] = sum(path.is_file() for log in logs for path in entries(log))
    for directory in [*world.home.iterdir(), *world.lake.iterdir(), world.root / "mlflow-artifacts"]:
        if directory.is_dir():
            content = entries(directory)
            place = directory.relative_to(world.root)
            found[f"{place}: entries"] = len(content)
            found[f"{place}: kB"] = sum(path.stat().st_size for path in content if path.is_file()) / 1e3
    databases = {
        "dagster": [*world.home.glob("*/*.db"), *world.home.glob("history/runs/*.db")],
        "mlflow": [world.root / "mlflow.db"],
    }
    for name, paths in databases.items():
        for path in paths:
            for table_name, rows in rows_by_table(path).items():
                found[f"{name}: {table_name}"] = found.get(f"{name}: {table_name}", 0) + rows
        if name == "mlflow":
            found["mlflow.db: kB"] = paths[0].stat().st_size / 1e3
    with closing(sqlite3.connect(world.home / "schedules" / "schedules.db", timeout=60)) as connection:
        query = f"SELECT count(*) FROM job_ticks WHERE status = 'SKIPPED' AND {TICKS_OF_SENSOR}"
        found[SKIPPED] = connection.execute(query).fetchone()[0]
    return found


def entries(directory: Path) -> list[Path]:
    """All files and directories below a directory, if it exists; without those that SQLite has for moments."""
    return [path for path in directory.rglob("*") if not path.name.endswith(("-journal", "-wal", "-shm"))]


def rows_by_table(database: Path) -> dict[str, int]:
    """Rows of each table of an SQLite database that has any."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}
    return {name: count for name, count in rows.items() if count and not name.startswith("sqlite_")}


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """What a further file and what a further tick that finds nothing adds, on average over the second half."""
    half = samples[middle_of(samples) :]
    by_tick = sum(
        after.get(name, 0) - before.get(name, 0) for before, after in zip(half[1::2], half[2::2], strict=True)
    )
    by_file = sum(
        after.get(name, 0) - before.get(name, 0) for before, after in zip(half[0::2], half[1::2], strict=False)
    )
    idle = sum(after["ticks"] - before["ticks"] for before, after in zip(half[1::2], half[2::2], strict=True))
    files = half[-1]["files"] - half[0]["files"]
    return by_file / files, by_tick / idle


def verdict(samples: list[Sample]) -> list[str]:
    """What grows and should not, a sentence each."""
    middle, last = samples[middle_of(samples)], samples[-1]
    early, late = samples[: middle_of(samples) + 1], samples[-len(samples) // 4 :]
    faults = []
    for name in (*CONSTANT, *THREADS):
        before, after = max(found.get(name, 0) for found in early), min(found[name] for found in late)
        if after > before + (POOL_THREADS if name in THREADS else 0):
            faults.append(f"LEAK: {name}: at most {before:.0f} in the first half, at least {after:.0f} in the end")
    for name in MEMORY:
        if (per_cent := 100 * (last[name] / middle[name] - 1)) > MEMORY_TOLERANCE:
            faults.append(f"LEAK: {name} grew by {per_cent:.1f} % in the second half")
    expected = {"ticks", "files", "dagster: job_ticks", SKIPPED, *CONSTANT, *THREADS, *MEMORY}
    for name in last:
        if name not in expected and not name.endswith(" kB"):
            _, by_tick = growth(samples, name)
            if by_tick > TICK_TOLERANCE:
                faults.append(f"LEAK: a tick that finds nothing adds {by_tick:.2f} to {name}")
    kept_days = dagster_settings()["retention"]["sensor"]["purge_after_days"]["skipped"]
    if last[SKIPPED] > kept_days + 1:  # a tick a day
        faults.append(f"LEAK: {last[SKIPPED]:.0f} skipped ticks are kept; retention says {kept_days} days")
    return faults


def dagster_settings() -> dict[str, Any]:
    """The project's dagster.yaml, with which the daemon runs."""
    return yaml.safe_load((PROJECT / "dagster.yaml").read_text())


def middle_of(samples: list[Sample]) -> int:
    """Index of the sample in the middle that ends the days of a file."""
    return len(samples) // 4 * 2 - 1


def table(samples: list[Sample]) -> str:
    """A row for each figure: the first, the middle and the last sample, and what a file and a tick add."""
    first, middle, last = samples[1], samples[middle_of(samples)], samples[-1]
    lines = []
    for name in last:
        file, tick = growth(samples, name) if name not in ("ticks", "files") else (0.0, 0.0)
        figures = [f"{found.get(name, 0):,.0f}" for found in (first, middle, last)]
        lines.append([name, *figures, *(f"{value:+.2f}" if abs(value) >= 0.005 else "" for value in (file, tick))])
    return markdown(["", "first file", "middle", "last", "a file adds", "an idle tick adds"], lines)


if __name__ == "__main__":
    main()
