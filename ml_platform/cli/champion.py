"""Commands ``ml-platform champion``: show and move the alias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ml_platform.cli.context import CommandError, console, dagster_instance, first_line, mlflow_of, plain, say, warn
from ml_platform.settings import Settings, load_settings

if TYPE_CHECKING:
    import dagster as dg
    from mlflow.entities.model_registry import ModelVersion

app = typer.Typer(help="Show and move the alias champion of the fraud model.", no_args_is_help=True)

Why = Annotated[str, typer.Option(help="Reason, recorded with the version.")]
Who = Annotated[str | None, typer.Option(help="Who made the decision; default: the current user.")]


@app.command("show")
def show_champion() -> None:
    """Show the champion, since when and why it is the champion, its data and its metrics."""
    print_champion(load_settings())


def print_champion(settings: Settings) -> None:
    from ml_platform.model.gate import lost_parts
    from ml_platform.model.mlflow import MODEL_NAME

    resource = mlflow_of(settings)
    champion = resource.champion()
    if champion is None:
        say(f"No model of {MODEL_NAME} is the champion yet.")
        return
    table = Table("", "value", title=f"Champion: {MODEL_NAME} version {champion.version}")
    for label, tag in (
        ("champion since", "champion_since"),
        ("by", "champion_by"),
        ("because", "champion_why"),
        ("trained up to partition", "cutoff"),
        ("last day trained on", "train_last_date"),
        ("learner", "learner"),
        ("Dagster run", "dagster.run_id"),
    ):
        table.add_row(label, plain(champion.tags.get(tag, "not recorded")))
    table.add_section()
    for name, value in sorted(resource.metrics_of(champion).items()):
        if name.startswith("test_"):
            table.add_row(name, f"{value:,.4f}".rstrip("0").rstrip("."))
    console.print(table)
    if problem := lost_parts(resource, champion):
        say(f"The champion, {problem}.", "yellow")
    print_champion_problem(champion)


def print_champion_problem(champion: ModelVersion | None) -> None:
    """Print a warning if this version of the platform cannot score with the champion."""
    from ml_platform.model.gate import champion_problem

    if champion is not None and (problem := champion_problem(champion)):
        say(f"The champion, {problem}.", "yellow")


@app.command("set")
def set_champion(
    version: Annotated[str, typer.Argument(help="Version of the registered model.")], why: Why, who: Who = None
) -> None:
    """Make a version the champion by hand. Versions that this platform cannot score with are refused."""
    _move_alias(load_settings(), version, who, why)


@app.command("rollback")
def roll_back(why: Why, who: Who = None) -> None:
    """Move the alias back to the previous champion."""
    settings = load_settings()
    champion = mlflow_of(settings).champion()
    previous = champion.tags.get("champion_before") if champion else None
    if previous is None:
        raise CommandError("there is no earlier champion to roll back to; use ml-platform champion set VERSION")
    _move_alias(settings, previous, who, why)


def _move_alias(settings: Settings, version: str, who: str | None, why: str) -> None:
    import getpass

    from mlflow.exceptions import MlflowException

    from ml_platform.model.gate import PROOF_TAG, champion_problem, champion_tags
    from ml_platform.model.mlflow import MODEL_NAME, NOT_FOUND_CODES

    resource = mlflow_of(settings)
    try:
        candidate = resource.client().get_model_version(MODEL_NAME, version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        raise CommandError(f"{MODEL_NAME} has no version {version!r}; MLflow's UI lists the versions") from None
    if not why.strip():
        raise CommandError("--why is empty: give a reason; it is recorded with the version")
    # Versions promoted before the tag existed were verified by the gate; other versions without it were not.
    if PROOF_TAG not in candidate.tags and candidate.tags.get("champion_by") != "fraud_model":
        raise CommandError(
            f"version {version} was never verified by reloading it from MLflow (it has no tag {PROOF_TAG}): "
            "materialize fraud_model to train a verified version. The champion is unchanged"
        )
    if problem := champion_problem(candidate):
        raise CommandError(f"{problem}. The champion is unchanged")
    events: list[dg.AssetObservation] = []
    resource.set_champion(version, champion_tags(who=who or getpass.getuser(), why=why), events.append)
    say(f"version {version} is the champion of {MODEL_NAME}")
    if not events:  # it was the champion already
        return
    try:
        with dagster_instance(settings) as instance:
            for event in events:
                instance.report_runless_asset_event(event)
    except Exception as error:  # whatever Dagster's storage raises: the alias has moved
        warn(f"The move is not recorded in Dagster, so no alert tells it: {first_line(error)}")
