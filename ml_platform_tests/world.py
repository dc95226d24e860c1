"""A user's directory and the real commands run in it, for tests of whole systems."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from ml_platform.dev.simulator import FileTruth, Simulation

PROJECT = Path(__file__).resolve().parents[1]
COMMAND_TIMEOUT_S = 600

#: A JVM that has ended after a minute works off less without the second compiler, whose work would pay later. With the
#: first alone Java keeps 48 MB of code by default, of all tests' queries too little, and is at work to make room.
SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m"
SHORT_LIVED_JAVA = {"JAVA_TOOL_OPTIONS": SHORT_LIVED}

#: By name within the lake, in nanoseconds.
ModificationTimes = dict[str, int]

#: Raw files of five days, with some of every fault: the least that small_search.yaml can train on.
SIMULATION = Simulation(days_per_file=5, customers=200, terminals=300, radius=10, fault_rate=500, seed=5)


@dataclass(frozen=True)
class RawFile:
    """A simulated raw file: its partition, its bytes, and the counts that a report of it must have."""

    key: str
    content: bytes
    truth: FileTruth

    @property
    def name(self) -> str:
        return f"{self.key}.txt"


@cache
def simulated(index: int, simulation: Simulation = SIMULATION) -> RawFile:
    """The raw file with number `index`."""
    content = io.BytesIO()
    truth = simulation.write_file(index, content)
    return RawFile(simulation.file_name(index).removesuffix(".txt"), content.getvalue(), truth)


#: Run config of the training, where ML_PLATFORM_RUN_CONFIG does not name another file.
SMALL_SEARCH_FILE = Path(__file__).with_name("small_search.yaml")
SMALL_SEARCH = yaml.safe_load(SMALL_SEARCH_FILE.read_text())["ops"]["fraud_model"]["config"]

#: What every engine processes, in one run.
FILES = [simulated(index) for index in range(2)]
KEYS = [file.key for file in FILES]


def assert_counts(report: dict[str, Any], truth: FileTruth) -> None:
    """The counts of a report are those of the simulator."""
    assert {name: report["counts"][name] for name in truth.counts} == truth.counts


#: A candidate that XGBoost refuses when it sees that there are fewer inputs, in a task of the job; and its words.
TOO_MANY_CONSTRAINTS = {
    "learner": "xgboost",
    "grid": {"rounds": [10], "monotone_constraints": ["({})".format(",".join("0" * 100))]},
}
REFUSAL = "size of monotone constraint should be less or equal to the number of features"


def wait_until(condition: Callable[[], Any], what: str, timeout: float = COMMAND_TIMEOUT_S, pause: float = 0.1) -> Any:
    """The first true value of `condition()`, asked every `pause` seconds; fails the test if there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout} s in vain until {what}")
        time.sleep(pause)
    return value


def command(name: str, module: str) -> list[str]:
    """A command of this Python's environment, installed or not."""
    installed = Path(sys.executable).parent / name
    return [str(installed)] if installed.exists() else [sys.executable, "-m", module]


DAGSTER = command("dagster", "dagster")
DG = command("dg", "dagster_dg_cli.cli")
DAGSTER_DAEMON = command("dagster-daemon", "dagster._daemon")
ML_PLATFORM = command("ml-platform", "ml_platform.cli.main")


@dataclass(frozen=True)
class World:
    """A user's directory: raw files, lake, DAGSTER_HOME, and nothing of this project's."""

    root: Path
    home_name: str = "dagster home"
    #: Settings beside, or in place of, those of the directories.
    overrides: dict[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.raw.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        shutil.copy(PROJECT / "dagster.yaml", self.home)

    @property
    def raw(self) -> Path:
        return self.root / "raw files"

    @property
    def lake(self) -> Path:
        return self.root / "lake"

    @property
    def home(self) -> Path:
        return self.root / self.home_name

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def settings(self) -> dict[str, str]:
        """The platform's settings."""
        return {"ML_PLATFORM_RAW_URI": str(self.raw), "ML_PLATFORM_LAKE_URI": str(self.lake), **self.overrides}

    @property
    def environment(self) -> dict[str, str]:
        """All that a process of this world gets to see of the environment."""
        kept = {name: os.environ[name] for name in ("PATH", "JAVA_HOME", "LANG", "TMPDIR") if name in os.environ}
        return kept | {
            **SHORT_LIVED_JAVA,
            "HOME": str(self.root),
            "PYTHONPATH": str(PROJECT),
            "DAGSTER_HOME": str(self.home),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "ML_PLATFORM_RUN_CONFIG": str(SMALL_SEARCH_FILE),
            **self.settings,
        }

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command, its output in `log`."""
        with log.open("wb") as out:
            return subprocess.Popen(
                arguments,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def run(self, *arguments: str) -> str:
        """Run a command to its end and return what it printed; fails the test if the command fails."""
        done = subprocess.run(
            arguments,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout[-20_000:]}"
        return done.stdout

    def register(self, *keys: str) -> None:
        """Partitions, as `sync` registers them, without a process of its own."""
        with self.instance() as instance:
            instance.add_dynamic_partitions("raw_files", keys)

    def launch(self, selection: str, first: str, last: str) -> str:
        """`dg launch` of assets over a range of partitions."""
        options = ["--target-path", str(PROJECT), "--assets", selection, "--partition-range", f"{first}...{last}"]
        return self.run(*DG, "launch", *options)

    @contextmanager
    def instance(self) -> Generator[dg.DagsterInstance]:
        """What Dagster has stored."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield instance

    def partitions(self) -> list[str]:
        """The registered partitions."""
        with self.instance() as instance:
            return list(instance.get_dynamic_partitions("raw_files"))

    def runs(self) -> list[dg.DagsterRun]:
        """Dagster's runs, oldest first."""
        with self.instance() as instance:
            return list(reversed(instance.get_runs()))

    def metadata(self, asset: str, key: str) -> dict[str, Any]:
        """Metadata of a partition's latest materialization, as plain values."""
        with self.instance() as instance:
            filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key])
            records = instance.fetch_materializations(filters, limit=1).records
        assert records, f"{asset} of {key} was never materialized"
        materialization = records[0].asset_materialization
        assert materialization is not None
        return {name: value.value for name, value in materialization.metadata.items()}

    def materialized(self, run_id: str, asset: str) -> list[str]:
        """Partitions of an asset that a run materialized, sorted."""
        with self.instance() as instance:
            events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        found = [event.dagster_event for event in events]
        return sorted(
            event.partition for event in found if event and event.asset_key == dg.AssetKey(asset) and event.partition
        )

    def report_file(self, key: str, table: str = "cleaned_transactions") -> Path:
        """Where the report of a partition is."""
        return self.lake / table / f"raw_file={key}" / "_report.json"

    def report(self, key: str, table: str = "cleaned_transactions") -> dict[str, Any]:
        """The report of a partition."""
        return json.loads(self.report_file(key, table).read_text())

    def modification_times(self, key: str = "*", table: str = "cleaned_transactions") -> ModificationTimes:
        """All files of a table, or of one of its partitions."""
        files = (self.lake / table).glob(f"raw_file={key}/**/*")
        times = {str(file.relative_to(self.lake)): file.stat().st_mtime_ns for file in files if file.is_file()}
        assert times
        return times

    def processes(self) -> dict[int, str]:
        """Processes that are alive and were started here, by whomever: their DAGSTER_HOME tells them."""
        mark = f"DAGSTER_HOME={self.home}".encode()
        found = {}
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            try:
                if mark in (directory / "environ").read_bytes().split(b"\0"):
                    found[int(directory.name)] = (directory / "comm").read_text().strip()
            except OSError:  # it has ended, or is another user's
                continue
        return found


def materialize_command(selection: str, first: str, last: str) -> list[str]:
    options = ["-m", "ml_platform.definitions", "--select", selection, "--partition-range", f"{first}...{last}"]
    return [*DAGSTER, "asset", "materialize", *options]


@contextmanager
def no_process_left(world: World, timeout: float = 30) -> Generator[None]:
    """Fails the test if processes outlive the block by more than `timeout` seconds; ends them, whatever happens."""
    try:
        yield
        wait_until(lambda: not world.processes(), "all processes have ended", timeout)
    finally:
        for process in world.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextmanager
def daemon(world: World) -> Generator[Path]:
    """Dagster's daemon on the project's workspace.yaml until the block ends; gives its log."""
    log = world.root / f"{world.home_name}.log"
    # Dagster's SQLite files are made by who comes first, and a second process that comes meanwhile finds them locked.
    with world.instance():
        pass
    with no_process_left(world):
        process = world.start(*DAGSTER_DAEMON, "run", "-w", str(PROJECT / "workspace.yaml"), log=log)
        try:
            yield log
        except BaseException:
            print(log.read_text(errors="replace")[-20_000:])  # pytest shows it with the failure
            raise
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def ticks(instance: dg.DagsterInstance) -> list[Any]:
    """Finished ticks of the sensor new_raw_files."""
    states = [state for state in instance.all_instigator_state() if state.instigator_name == "new_raw_files"]
    found = [tick for state in states for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)]
    return [tick for tick in found if tick.status.value != "STARTED"]
