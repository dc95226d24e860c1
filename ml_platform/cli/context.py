"""Helpers shared by the commands: output, errors, and resources created from the settings."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ml_platform.escaping import printable
from ml_platform.settings import Settings, SettingsError, load_dotenv, load_settings

if TYPE_CHECKING:
    import dagster as dg

    from ml_platform.lake.resource import LakeResource
    from ml_platform.model.mlflow import MlflowResource

#: Characters of a line where there is no terminal and COLUMNS is not set.
WIDTH = 120


def _console(*, stderr: bool) -> Console:
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=get_terminal_size((WIDTH, 1)).columns)


console = _console(stderr=False)
errors = _console(stderr=True)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts (docs/operations.md).")]


def complete_partition(incomplete: str) -> list[str]:
    """Partitions that a shell completes: the cleaned ones of a lake on this machine. S3 would take too long."""
    from ml_platform.lake.reports import CLEANED_TABLE
    from ml_platform.lake.storage import open_store

    load_dotenv()
    try:
        lake_uri = load_settings().lake_uri
    except SettingsError:
        return []
    if lake_uri.startswith("s3://"):
        return []
    names = [entry.name for entry in open_store(lake_uri).list_directory(CLEANED_TABLE)]
    keys = [name.removeprefix("raw_file=").rstrip("/") for name in names if name.startswith("raw_file=")]
    return sorted(key for key in keys if key.startswith(incomplete))


Partition = Annotated[
    str, typer.Argument(help="Partition: the name of the raw file without .txt.", autocompletion=complete_partition)
]


class CommandError(Exception):
    """An error that the user can fix; the message says how."""


def plain(text: str, style: str = "") -> Text:
    """Create literal text: neither rich nor the terminal interprets it."""
    return Text(printable(text), style=style)


def say(text: str, style: str = "") -> None:
    """Print one line of plain text."""
    console.print(plain(text, style), soft_wrap=True)


def warn(text: str, style: str = "yellow") -> None:
    """Print one line of plain text to standard error."""
    errors.print(plain(text, style), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON; characters outside ASCII are escaped."""
    typer.echo(json.dumps(value, indent=1))


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lake_of(settings: Settings) -> LakeResource:
    from ml_platform.lake.resource import LakeResource

    return LakeResource.from_settings(settings)


def mlflow_of(settings: Settings) -> MlflowResource:
    from ml_platform.model.mlflow import MlflowResource

    return MlflowResource(tracking_uri=settings.tracking_uri, artifact_root=settings.artifact_root)


@contextmanager
def dagster_instance(settings: Settings) -> Generator[dg.DagsterInstance]:
    """Open the Dagster instance in DAGSTER_HOME. Raises CommandError if not set: a temporary instance would be lost."""
    import dagster as dg

    if settings.dagster_home is None:
        raise CommandError(
            "DAGSTER_HOME is not set: set it to a directory for Dagster's storage, e.g. "
            "export DAGSTER_HOME=$PWD/.dagster_home (make sets it)"
        )
    if not settings.dagster_home.is_absolute():
        raise CommandError("DAGSTER_HOME must be an absolute path")
    settings.dagster_home.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.get() as instance:
        yield instance
