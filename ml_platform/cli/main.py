"""Entry point of ``ml-platform``: subcommands and error reporting."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from ml_platform.cli import champion, clusters, data, demo, doctor, metrics, scores
from ml_platform.cli.context import CommandError, first_line, warn
from ml_platform.settings import SettingsError, load_dotenv

app = typer.Typer(
    help="Keep a fraud model fresh as raw transaction files arrive.",
    epilog="Exit codes: 0 success; 1 an error, described on standard error; 2 wrong usage; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# In the order shown by --help.
app.command()(demo.demo)
app.command()(data.simulate)
app.command()(data.sync)
app.command()(data.process_new_files)
app.command()(data.summary)
app.command()(data.rejects)
app.command()(scores.alerts)
app.command()(scores.scores)
app.command()(data.withdraw)
app.command()(data.migrate)
app.command()(clusters.dev_cloud)
app.command()(doctor.doctor)
app.command()(metrics.metrics)
app.add_typer(champion.app, name="champion")
app.add_typer(clusters.app, name="clusters")


def _print_version(wanted: bool) -> None:
    if wanted:
        from ml_platform.version import PLATFORM_VERSION

        typer.echo(PLATFORM_VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
) -> None:
    load_dotenv()


#: Exit code of an interrupted command, as shells set it for Ctrl-C.
INTERRUPTED = 130


def main() -> None:
    """Run a command. Errors are printed as one line; ``--traceback`` shows the traceback."""
    # As Ctrl-C, so that commands clean up; Dagster does the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BaseException as error:
        if isinstance(error, SystemExit) or "--traceback" in sys.argv:
            raise
        if type(error).__name__ == "DagsterExecutionInterruptedError":  # importing Dagster takes a second
            sys.exit(INTERRUPTED)
        # Imported here to keep successful commands fast.
        from ml_platform.dataproc.api import DataprocError
        from ml_platform.lake.resource import SchemaVersionError
        from ml_platform.lake.storage import StorageError
        from ml_platform.spark.code_archive import CodeArchiveError
        from ml_platform.spark.s3a import S3AError

        known = (
            *(CommandError, SettingsError, CodeArchiveError, DataprocError),
            *(SchemaVersionError, StorageError, S3AError),
        )
        if isinstance(error, known):
            warn(f"error: {first_line(error)}", "red")
        else:
            warn(f"error: {type(error).__name__}: {first_line(error)}", "red")
            warn("(use ml-platform --traceback … to see where it happened)", "dim")
        sys.exit(1)


if __name__ == "__main__":
    main()
