"""Commands ``ml-platform champion``: show and move the alias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ml_platform.cli.context import (
    AsJson,
    CommandError,
    console,
    dagster_instance,
    first_line,
    mlflow_of,
    plain,
    print_json,
    say,
    warn,
)
from ml_platform.settings import Settings, load_settings

if TYPE_CHECKING:
    import dagster as dg
    from mlflow.entities.model_registry import ModelVersion

app = typer.Typer(help="Show and move the alias champion of the fraud model.", no_args_is_help=True)

Why = Annotated[str, typer.Option(help="Reason, recorded with the version.")]
Who = Annotated[str | None, typer.Option(help="Who made the decision; default: the current user.")]


#: Fields of a champion in JSON, each with the tag of its version and its label in the table.
FIELDS = (
    ("since", "champion_since", "champion since"),
    ("by", "champion_by", "by"),
    ("why", "champion_why", "because"),
    ("cutoff", "cutoff", "trained up to partition"),
    ("train_last_date", "train_last_date", "last day trained on"),
    ("learner", "learner", "learner"),
    ("run_id", "dagster.run_id", "Dagster run"),
    ("platform_version", "platform_version", "platform version"),
)


@app.command("show")
def show_champion(as_json: AsJson = False) -> None:
    """Show the champion: when, by whom and why it was chosen, its training data and metrics."""
    settings = load_settings()
    if as_json:
        print_json(champion_facts(settings))
    else:
        print_champion(settings)


def champion_facts(settings: Settings) -> dict[str, Any] | None:
    """The champion as values for JSON; None if there is none."""
    from ml_platform.model.gate import champion_problem, lost_parts

    resource = mlflow_of(settings)
    champion = resource.champion()
    if champion is None:
        return None
    metrics = {name: value for name, value in sorted(resource.metrics_of(champion).items()) if name.startswith("test_")}
    problems = filter(None, (lost_parts(resource, champion), champion_problem(champion)))
    return {
        "version": int(champion.version),
        **{field: champion.tags.get(tag) for field, tag, _ in FIELDS},
        "metrics": metrics,
        "problems": [f"Problem with the champion: {problem}." for problem in problems],
    }


def print_champion(settings: Settings) -> None:
    from ml_platform.model.mlflow import MODEL_NAME

    facts = champion_facts(settings)
    if facts is None:
        say(f"No model of {MODEL_NAME} is the champion yet.")
        return
    table = Table("", "value", title=f"Champion: {MODEL_NAME} version {facts['version']}")
    for field, _, label in FIELDS:
        table.add_row(label, plain(facts[field] or "not recorded"))
    table.add_section()
    for name, value in facts["metrics"].items():
        table.add_row(name, f"{value:,.4f}".rstrip("0").rstrip("."))
    console.print(table)
    for problem in facts["problems"]:
        say(problem, "yellow")


def print_champion_problem(champion: ModelVersion | None) -> None:
    """Print a warning if this version of the platform cannot score with the champion."""
    from ml_platform.model.gate import champion_problem

    if champion is not None and (problem := champion_problem(champion)):
        say(f"Problem with the champion: {problem}.", "yellow")


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
        warn(
            "The move is not recorded in Dagster, so no alert will report it. Check DAGSTER_HOME (ml-platform doctor): "
            f"{first_line(error)}"
        )
