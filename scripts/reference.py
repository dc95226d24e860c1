"""Write the pages of docs/reference from the code: ``make reference``. A test fails if a page is not current."""

from __future__ import annotations

import ast
import inspect
import json
import re
import types
from collections.abc import Collection, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ml_platform.escaping import markdown_table

PAGES = Path(__file__).parent.parent / "docs" / "reference"

NOTE = "<!-- Written by `make reference` from {}: change it there. -->"

#: Variables of libraries that a deployment often needs.
LIBRARY_VARIABLES = (
    ("MLFLOW_TRACKING_USERNAME", "User of MLflow's server."),
    ("MLFLOW_TRACKING_PASSWORD", "Password of that user."),
    ("AWS_ENDPOINT_URL_S3", "Endpoint of an S3 other than that of AWS."),
    ("AWS_DEFAULT_REGION", "Region of the buckets."),
    ("AWS_ACCESS_KEY_ID", "Access key of S3, unless a profile or the machine's role has one."),
    ("AWS_SECRET_ACCESS_KEY", "Secret of that key."),
    ("AWS_CA_BUNDLE", "Certificates of a [private authority](../s3.md#private-certificate-authority) of S3."),
)

TYPE_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number", Path: "path", date: "date"}


def type_name(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Type of a setting as users write it, with its limits."""
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        return type_name(
            annotation, [item for part in (*inner, *metadata) for item in getattr(part, "metadata", [part])]
        )
    if get_origin(annotation) in (Union, types.UnionType):
        return type_name(next(kind for kind in get_args(annotation) if kind is not type(None)), metadata)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation) if value)
    if get_origin(annotation) in (list, dict):
        return "list" if get_origin(annotation) is list else "mapping"
    limits = []
    for item in metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            limit = getattr(item, name, None)
            limits += (
                [f"{sign} {limit:g}" if isinstance(limit, float) else f"{sign} {limit}"] if limit is not None else []
            )
    return ", ".join([TYPE_NAMES.get(annotation, "text"), *limits])


def default_of(field: FieldInfo) -> str:
    """Default of a setting as users write it."""
    value = field.default
    if field.is_required():
        return "required"
    if value is PydanticUndefined or value is None or value in ("", [], {}):
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"`{','.join(value)}`"
    if isinstance(value, (bool, list, dict)):
        return f"`{json.dumps(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def settings_table(kind: type[BaseModel], first: str, only: Collection[str] = ()) -> str:
    """The fields of a model of settings. A field that is a model itself has a table of its own."""
    rows = [
        (
            f"`{field.alias or name}`",
            type_name(field.annotation, field.metadata),
            default_of(field),
            field.description or "",
        )
        for name, field in kind.model_fields.items()
        if (not only or name in only)
        and not (inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel))
    ]
    return markdown_table((first, "type", "default", "meaning"), rows)


def settings_page() -> Iterator[str]:
    """Environment variables and run configuration."""
    from ml_platform.assets.cleaned import CleaningConfig
    from ml_platform.assets.features import FeaturesConfig
    from ml_platform.assets.scores import ScoresConfig
    from ml_platform.lake.quality import QualityLimits
    from ml_platform.model.config import FraudModelConfig, PromotionConfig
    from ml_platform.settings import AlertSettings, ClusterOptions, ClusterSettings, ClusterSpec, Settings

    yield NOTE.format("`ml_platform/settings.py` and the configuration of the assets")
    yield "# Settings"
    yield (
        "An unset or empty variable has its default. Where settings belong: [operations.md](../operations.md#settings)."
    )
    yield "## Environment variables"
    yield settings_table(Settings, "variable")
    yield "### Alerts"
    yield "Without a destination there are no alerts: [operations.md](../operations.md#alerts)."
    yield settings_table(AlertSettings, "variable")
    yield "### Clusters"
    yield (
        "These apply with `ML_PLATFORM_DEPLOYMENT=yandex`: [cluster.md](../cluster.md). Lists are comma-separated, "
        "mappings are JSON. The defaults of the hosts are those of the Airflow pipeline that this project replaced."
    )
    for title, part in (("The cluster of a run", ClusterSpec), ("Access, timeouts, size, prices", ClusterOptions)):
        yield f"#### {title}"
        yield settings_table(ClusterSettings, "variable", part.model_fields)
    yield "### Variables of libraries"
    yield "boto3, Spark's S3 connector and MLflow read these themselves."
    yield markdown_table(("variable", "meaning"), [(f"`{name}`", text) for name, text in LIBRARY_VARIABLES])
    yield "## Run configuration"
    yield (
        "YAML, in the launchpad of the UI for one run, or in the file of `ML_PLATFORM_RUN_CONFIG` for all runs that "
        "are started for new files: [operations.md](../operations.md#settings)."
    )
    for title, place, kind in (
        ("cleaned_transactions", "ops: {cleaned_transactions: {config: …}}", CleaningConfig),
        ("transaction_features", "ops: {transaction_features: {config: …}}", FeaturesConfig),
        ("scored_transactions", "ops: {scored_transactions: {config: …}}", ScoresConfig),
        ("fraud_model", "ops: {fraud_model: {config: …}}", FraudModelConfig),
        ("Promotion", "ops: {fraud_model: {config: {promotion: …}}}", PromotionConfig),
        ("Limits of the checks", "resources: {limits: {config: …}}", QualityLimits),
    ):
        yield f"### {title}\n\nIn `{place}`:\n\n{settings_table(kind, 'option')}"


def commands_page() -> Iterator[str]:
    """The commands, as typer documents them."""
    import typer.main
    from typer.cli import get_docs_for_click

    from ml_platform.cli.main import app

    command = typer.main.get_command(app)

    def keep_whole_help(group: Any) -> None:
        """Lists of commands would cut it after 45 characters."""
        for part in group.commands.values():
            part.short_help = part.short_help or inspect.cleandoc(part.help or "").partition("\n\n")[0].replace(
                "\n", " "
            )
            if hasattr(part, "commands"):
                keep_whole_help(part)

    keep_whole_help(command)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="ml-platform"), name="ml-platform")
    # A block of the console is for commands that can be typed in; every command has --help.
    text = re.sub(r"\*\*Usage\*\*:\n\n```console\n\$ (.*?)\n```", r"Usage: `\1`", text)
    text = text.replace("* `--help`: Show this message and exit.\n", "").replace("**Options**:\n\n\n", "")
    yield NOTE.format("`ml_platform/cli/`")
    yield "# Commands"
    yield "Exit codes, and what `--json` prints: [operations.md](../operations.md#commands)."
    yield text.replace("# `ml-platform`", "", 1)


def tables_page() -> Iterator[str]:
    """Tables of the lake."""
    from spark_jobs.features.registry import LABEL_DELAY_DAYS, REGISTRY
    from spark_jobs.schema import ALERT_COLUMNS, CLEANED_COLUMNS, REJECTED_COLUMNS, SCHEMA_VERSION, SCORED_COLUMNS

    def columns(rows: Iterable[tuple[str, str, str]]) -> str:
        return markdown_table(("column", "type", "meaning"), [(f"`{name}`", kind, text) for name, kind, text in rows])

    yield NOTE.format("`spark_jobs/schema.py` and `spark_jobs/features/registry.py`")
    yield "# Tables"
    yield (
        "Parquet files, one directory `raw_file=KEY` per raw file: see "
        f"[the lake](../architecture.md#the-lake). Schema version {SCHEMA_VERSION}. Types are those of Spark."
    )
    yield "## cleaned_transactions"
    yield columns(CLEANED_COLUMNS)
    yield "## rejected_transactions"
    yield f"The rules: [cleaning.md](../cleaning.md#rules).\n\n{columns(REJECTED_COLUMNS)}"
    yield "## transaction_features"
    yield (
        "The columns of `cleaned_transactions`, and the features below: each a double that is never NULL, NaN or "
        "infinite. Features of a terminal use labels, which are known after "
        f"{LABEL_DELAY_DAYS} days. *History*: the oldest rows that a feature depends on. *Source*: the [Fraud "
        "Detection Handbook](https://fraud-detection-handbook.github.io), chapter 3, or this project (own). The "
        "inputs of a model are `tx_amount` and these features, in this order."
    )
    yield markdown_table(
        ("feature", "of", "history", "unit", "source", "meaning"),
        [
            (
                f"`{item.name}`",
                item.entity,
                f"{item.days} day{'s' if item.days > 1 else ''}" if item.days else "",
                item.unit,
                item.source,
                item.description,
            )
            for item in REGISTRY
        ],
    )
    yield "## scored_transactions"
    yield columns(SCORED_COLUMNS)
    yield "## alerts"
    yield f"Also as `alerts.csv`. How to read them: [scores.md](../scores.md).\n\n{columns(ALERT_COLUMNS)}"


def reports_page() -> Iterator[str]:
    """Reports in the lake, from the source of their types: comments ``#:`` say what a field means."""
    from ml_platform.lake import reports

    source = inspect.getsource(reports)
    lines = source.splitlines()

    def meaning(line: int) -> str:
        """The comment above a line (from 1)."""
        found: list[str] = []
        while lines[line - 2].strip().startswith("#:"):
            line -= 1
            found.insert(0, lines[line - 1].strip()[2:].strip())
        return " ".join(found).replace("`", "")

    def type_text(node: ast.expr) -> str:
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated":
            node = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
        return f"`{ast.unparse(node)}`"

    def section(node: ast.ClassDef) -> str:
        base = ast.unparse(node.bases[0])
        also = f"Also the fields of [{base}](#{base.lower()})." if base == "PartitionReport" else ""
        text = inspect.cleandoc(ast.get_docstring(node) or "").replace("``", "`").replace("\n", " ")
        fields = markdown_table(
            ("field", "type", "meaning"),
            [
                (f"`{ast.unparse(item.target)}`", type_text(item.annotation), meaning(item.lineno))
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and not ast.unparse(item.target).startswith("_")
                and "ClassVar" not in ast.unparse(item.annotation)
            ],
        )
        return "\n\n".join(filter(None, (f"### {node.name}", f"{text} {also}".strip(), fields)))

    kinds = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    whole = [node for node in kinds if node.name.endswith(("Report", "File"))]
    yield NOTE.format("`ml_platform/lake/reports.py`")
    yield "# Reports"
    yield (
        "A report is a JSON file that a run writes last: a partition exists if and only if its `_report.json` does "
        "([why](../design.md#why-are-reports-the-commit-markers)). Types are those of Python; an `Instant` is a text "
        "like `2019-08-22T06:51:03Z`. Fields that a reader does not know are kept."
    )
    yield "## Files"
    yield from map(section, whole)
    yield "## Parts of reports"
    yield from map(section, (node for node in kinds if node not in whole))


#: File name → its parts.
CONTENTS = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "tables.md": tables_page,
    "reports.md": reports_page,
}


def page(name: str) -> str:
    """The text that a page should have."""
    return "\n\n".join(part.strip() for part in CONTENTS[name]()) + "\n"


if __name__ == "__main__":
    for file in CONTENTS:
        (PAGES / file).write_text(page(file), encoding="utf-8")
        print(f"docs/reference/{file}")
