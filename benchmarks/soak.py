"""Resource growth while the platform runs for months: the daemon, its code server, and the files they leave.

Dagster's daemon and code server, two long-running processes, look for new files once a day; a raw file arrives every
few days. Storage is SQLite. Days are accelerated: between two ticks of the sensor, all of Dagster's tick records are
made a day older, so that the next tick is due at once and retention deletes expired ones. Each file is processed on the
day it arrives, with a small search; the other ticks find nothing to do. Everything is counted after a file's run and
again before the next file arrives, which gives the growth per file and per tick.

Exits with an error if something grows that should not.
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

from benchmarks.common import ROWS_PER_CUSTOMER, log_progress, markdown
from ml_platform.dev.simulator import Simulation
from ml_platform.operations.dead_runs import PROCESS_TAG

PROJECT = Path(__file__).resolve().parents[1]
SENSOR = "new_raw_files"
#: A condition on Dagster's table job_ticks; other sensors tick, too.
TICKS_OF_SENSOR = f"""tick_body LIKE '%"{SENSOR}"%'"""
DAY_S = 24 * 60 * 60
TICK_TIMEOUT_S, RUN_TIMEOUT_S = 1800, 3600

#: Consecutive attempts at a file: the tick after a failed run starts another one.
ATTEMPTS = 3

#: Seconds for the helpers of a run's process to notice that it has ended.
SETTLE_S = 10

#: Files that an interrupted job, or one without cleanup, would leave in the lake.
LEFTOVERS = ("_temporary", ".spark-staging*", ".*.tmp", ".*.????????????????????????????????")

#: Maximum growth of resident memory in the second half, in per cent.
MEMORY_TOLERANCE = 5

#: Growth per tick that counts as noise.
TICK_TOLERANCE = 0.1

#: Figures that must not grow with ticks or files. Memory is checked separately, by its growth in the second half.
CONSTANT = (
    *("daemon: open files", "code server: open files"),
    *("processes", "TMPDIR: entries", "working directory: entries", "lake: leftovers", "lake/_code: entries"),
)

#: Thread pools may start another thread under load. POOL_THREADS more in the second half are not a leak, which would
#: add one per file or tick.
THREADS = ("daemon: threads", "code server: threads")
POOL_THREADS = 2

MEMORY = ("daemon: memory, MB", "code server: memory, MB")
SKIPPED = f"dagster: job_ticks, skipped ones of {SENSOR}"

Sample = dict[str, float]


def main() -> None:
    """Print the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=200, help="days, with one tick each (default: 200)")
    parser.add_argument("--files", type=int, default=30, help="raw files that arrive (default: 30)")
    parser.add_argument("--rows", type=int, default=10_000, help="approximate rows per file (default: 10000)")
    parser.add_argument("--work", type=Path, help="empty directory to keep everything in (default: none)")
    parser.add_argument("--json", type=Path, help="also write the samples to this file")
    arguments = parser.parse_args()
    if not 2 <= arguments.files <= arguments.ticks // 2:
        parser.error("--files must be 2 or more, and --ticks at least twice as many: some must find nothing new")
    with tempfile.TemporaryDirectory(prefix="ml-platform-soak-") as temporary:
        world = World((arguments.work or Path(temporary)).absolute())
        samples = []
        for current in soak(world, arguments.ticks, arguments.files, arguments.rows):
            samples.append(current)
            if arguments.json:  # after every sample, because the run takes hours
                arguments.json.write_text(json.dumps(samples, indent=1))
    leaks = find_leaks(samples)
    print(table(samples) + "\n\n" + "\n".join(leaks or ["no leaks"]))
    if leaks:
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
        """Environment of the processes."""
        kept = {name: os.environ[name] for name in ("PATH", "JAVA_HOME", "LANG") if name in os.environ}
        return kept | {
            "HOME": str(self.root),
            "TMPDIR": str(self.temporary),
            # Short runs do not benefit from the optimizing compiler.
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
        """Run daemon and code server until the block ends; their logs are in the root."""
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
    """Stop a process like a process manager: SIGTERM, then SIGKILL after 60 s."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Services:
    """The long-running processes."""

    daemon: psutil.Process
    code: psutil.Process

    def by_name(self) -> dict[str, psutil.Process]:
        """The measured processes by their name in the table."""
        return {"daemon": self.daemon, "code server": self.code}

    def count(self) -> int:
        """Number of processes, including those of runs."""
        return 2 + len(self.daemon.children(recursive=True)) + len(self.code.children(recursive=True))


def soak(world: World, ticks: int, files: int, rows: int) -> Iterator[Sample]:
    """Let `ticks` days pass in which `files` raw files arrive; yields two samples per file, in order."""
    simulation = Simulation(days_per_file=20, customers=round(rows / ROWS_PER_CUSTOMER * 1.5), terminals=400, radius=10)
    # Opened first, because processes that create Dagster's SQLite files simultaneously find them locked.
    with dg.DagsterInstance.from_config(str(world.home)) as instance, world.services() as services:
        clock = Clock(world, instance)
        clock.wait_for_tick()  # the first one, for an empty directory
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
            yield (current := sample(world, services, clock.ticks, index + 1))
            figures = ", ".join(f"{name} {current[name]:.0f}" for name in ("ticks", *MEMORY))
            log_progress(f"file {index + 1} of {files}: {figures}")


def wait_until(condition: Callable[[], Any], what: str, timeout: float) -> Any:
    """Wait for `condition()` to be true and return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"timed out after {timeout} s waiting until {what}: see the logs in --work")
        time.sleep(0.2)
    return value


def wait_for_run(instance: dg.DagsterInstance, count: int) -> bool:
    """Wait until run number `count` and its process have ended; True if it succeeded."""

    def ended() -> dg.DagsterRun | None:
        runs = instance.get_runs()
        return runs[0] if len(runs) == count and runs[0].is_finished else None

    run = wait_until(ended, f"run {count} has ended", RUN_TIMEOUT_S)
    if process := run.tags.get(PROCESS_TAG):
        pid = int(process.split(":")[-2])
        wait_until(lambda: not psutil.pid_exists(pid), "the run's process has ended", TICK_TIMEOUT_S)
    time.sleep(SETTLE_S)
    if run.status != dg.DagsterRunStatus.SUCCESS:
        log_progress(f"run {run.run_id} ended with {run.status.value}")
    return run.status == dg.DagsterRunStatus.SUCCESS


class Clock:
    """Accelerated clock of a world: counts the sensor's ticks and makes Dagster's records of them older."""

    def __init__(self, world: World, instance: dg.DagsterInstance) -> None:
        self._database = world.home / "schedules" / "schedules.db"
        self._instance = instance
        self._last_id = 0
        self.ticks = 0

    def next_day(self) -> None:
        """Let a day pass and wait for its tick."""
        with closing(sqlite3.connect(self._database, timeout=60)) as connection, connection:
            connection.execute("UPDATE job_ticks SET timestamp = strftime('%Y-%m-%d %H:%M:%f', timestamp, '-1 day')")
        self._make_due()
        self.wait_for_tick()

    def wait_for_tick(self) -> None:
        """Wait until the next tick has ended."""
        deadline = time.monotonic() + TICK_TIMEOUT_S
        last_due = time.monotonic()
        while not (tick := self._newest_tick()) or tick[0] == self._last_id or tick[1] == "STARTED":
            if time.monotonic() > deadline:
                raise SystemExit(f"timed out after {TICK_TIMEOUT_S} s waiting for a tick: see the logs in --work")
            if tick and tick[0] == self._last_id and time.monotonic() > last_due + 20:
                self._make_due()  # again: the daemon may have overwritten the sensor's state
                last_due = time.monotonic()
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
            except sqlite3.OperationalError:  # the daemon has not created the table yet
                return None

    def _make_due(self) -> None:
        """Set the sensor's last tick to a day ago."""
        yesterday = time.time() - DAY_S
        for state in self._instance.all_instigator_state():
            if state.instigator_name == SENSOR:
                data: Any = state.instigator_data
                data = data._replace(last_tick_timestamp=yesterday, last_tick_start_timestamp=yesterday)
                self._instance.update_instigator_state(state.with_data(data))


def sample(world: World, services: Services, ticks: int, files: int) -> Sample:
    """All figures by name."""
    figures: Sample = {"ticks": ticks, "files": files}
    for name, process in services.by_name().items():
        figures[f"{name}: memory, MB"] = process.memory_info().rss / 1e6
        figures[f"{name}: threads"] = process.num_threads()
        # The minimum of several counts, because databases are open briefly.
        figures[f"{name}: open files"] = min(process.num_fds() for _ in range(20) if not time.sleep(0.1))
    figures["processes"] = services.count()
    figures["TMPDIR: entries"] = len(entries(world.temporary))
    figures["working directory: entries"] = len(list(world.root.iterdir()))
    figures["lake: leftovers"] = sum(len(list(world.lake.rglob(pattern))) for pattern in LEFTOVERS)
    figures["lake/_code: entries"] = len(entries(world.lake / "_code"))
    runs = sum(1 for entry in (world.home / "storage").iterdir() if len(entry.name) == 36)
    figures["DAGSTER_HOME/storage: logs of runs"] = runs
    logs = [entry for entry in (world.home / "storage").iterdir() if len(entry.name) != 36]
    figures["DAGSTER_HOME/storage: logs of ticks"] = sum(path.is_file() for log in logs for path in entries(log))
    for directory in [*world.home.iterdir(), *world.lake.iterdir(), world.root / "mlflow-artifacts"]:
        if directory.is_dir():
            content = entries(directory)
            path_name = directory.relative_to(world.root)
            figures[f"{path_name}: entries"] = len(content)
            figures[f"{path_name}: kB"] = sum(path.stat().st_size for path in content if path.is_file()) / 1e3
    databases = {
        "dagster": [*world.home.glob("*/*.db"), *world.home.glob("history/runs/*.db")],
        "mlflow": [world.root / "mlflow.db"],
    }
    for name, paths in databases.items():
        for path in paths:
            for table_name, rows in rows_by_table(path).items():
                figures[f"{name}: {table_name}"] = figures.get(f"{name}: {table_name}", 0) + rows
        if name == "mlflow":
            figures["mlflow.db: kB"] = paths[0].stat().st_size / 1e3
    with closing(sqlite3.connect(world.home / "schedules" / "schedules.db", timeout=60)) as connection:
        query = f"SELECT count(*) FROM job_ticks WHERE status = 'SKIPPED' AND {TICKS_OF_SENSOR}"
        figures[SKIPPED] = connection.execute(query).fetchone()[0]
    return figures


def entries(directory: Path) -> list[Path]:
    """All files and directories below a directory, if it exists, without SQLite's transient files."""
    return [path for path in directory.rglob("*") if not path.name.endswith(("-journal", "-wal", "-shm"))]


def rows_by_table(database: Path) -> dict[str, int]:
    """Rows of each non-empty table of an SQLite database."""
    with closing(sqlite3.connect(database, timeout=60)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names}
    return {name: count for name, count in rows.items() if count and not name.startswith("sqlite_")}


def growth(samples: list[Sample], name: str) -> tuple[float, float]:
    """(growth per file, growth per idle tick), averages over the second half."""
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


def find_leaks(samples: list[Sample]) -> list[str]:
    """One sentence for each figure that grows but should not."""
    middle, last = samples[middle_of(samples)], samples[-1]
    early, late = samples[: middle_of(samples) + 1], samples[-len(samples) // 4 :]
    leaks = []
    for name in (*CONSTANT, *THREADS):
        before, after = max(one.get(name, 0) for one in early), min(one[name] for one in late)
        if after > before + (POOL_THREADS if name in THREADS else 0):
            leaks.append(f"LEAK: {name}: at most {before:.0f} in the first half, at least {after:.0f} at the end")
    for name in MEMORY:
        if (per_cent := 100 * (last[name] / middle[name] - 1)) > MEMORY_TOLERANCE:
            leaks.append(f"LEAK: {name} grew by {per_cent:.1f}% in the second half")
    expected = {"ticks", "files", "dagster: job_ticks", SKIPPED, *CONSTANT, *THREADS, *MEMORY}
    for name in last:
        if name not in expected and not name.endswith(" kB"):
            _, by_tick = growth(samples, name)
            if by_tick > TICK_TOLERANCE:
                leaks.append(f"LEAK: a tick that finds nothing adds {by_tick:.2f} to {name}")
    kept_days = dagster_settings()["retention"]["sensor"]["purge_after_days"]["skipped"]
    if last[SKIPPED] > kept_days + 1:  # one tick a day
        leaks.append(f"LEAK: {last[SKIPPED]:.0f} skipped ticks are kept; retention says {kept_days} days")
    return leaks


def dagster_settings() -> dict[str, Any]:
    """The project's dagster.yaml, which the daemon uses."""
    return yaml.safe_load((PROJECT / "dagster.yaml").read_text())


def middle_of(samples: list[Sample]) -> int:
    """Index of the middle one of the samples taken before a next file."""
    return len(samples) // 4 * 2 - 1


def table(samples: list[Sample]) -> str:
    """One row per figure: the first, middle and last sample, and the growth per file and per tick."""
    first, middle, last = samples[1], samples[middle_of(samples)], samples[-1]
    lines = []
    for name in last:
        file, tick = growth(samples, name) if name not in ("ticks", "files") else (0.0, 0.0)
        figures = [f"{one.get(name, 0):,.0f}" for one in (first, middle, last)]
        lines.append([name, *figures, *(f"{value:+.2f}" if abs(value) >= 0.005 else "" for value in (file, tick))])
    return markdown(["", "first file", "middle", "last", "a file adds", "an idle tick adds"], lines)


if __name__ == "__main__":
    main()
