"""Every command of the documentation is run as it stands there, or is an exception with its reason.

In a ``console`` block, a command is a line that begins with ``$``, and the lines that it goes on in. What follows it is
its output, in which ``…`` stands for anything. An ``sh`` block is one command without output. A page's commands are
typed into one shell, in a clone of this project whose lake is that after the demo. The fake engine makes that lake;
Spark itself runs only where a page processes new files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest
import typer

from ml_platform.cli.main import app
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MlflowResource
from ml_platform.settings import Settings
from ml_platform.spark.session import CLASS_ARCHIVE, java_options
from ml_platform_tests.fakes import TIME_FORMAT, definitions, put_raw, put_scores, raw_spec, run_assets
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.test_terraform import LOCALS, granted_roles
from ml_platform_tests.world import PROJECT, SHORT_LIVED

PAGES = [
    str(page.relative_to(PROJECT))
    for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "deploy/terraform/*.md")
    for page in sorted(PROJECT.glob(pattern))
    if page.name not in ("CHANGELOG.md", "README.ru.md")  # the one describes the past, the other has README.md's
]

#: What is not run, by a pattern of "page: command", and why.
EXCEPTIONS = {
    r": make (demo|dev)\b": "takes minutes, or runs until Ctrl-C: ml_platform_tests/ui",
    r": git pull && make setup": "would change this clone and its packages",
    r"^README\.md: ml-platform (simulate|alerts)\b": "a month more takes minutes: the tutorial adds a smaller file so",
    r"^README\.md: (dagster|dg) .*'\*'": "trains with Spark, which finds no rows in a fake lake: test_engines.py",
    r": ml-platform metrics\b": "runs until Ctrl-C: test_stack.py",
    r": python -m ml_platform\.model\.serve\b": "runs until Ctrl-C: test_scores.py",
    r": curl -s localhost:8080/invocations\b": "asks the server above",
    r"^docs/s3\.md: ml-platform doctor": "the buckets are an example: test_s3.py",
    r"^docs/tutorials/add_a_feature\.md: (python -m pytest|make|dagster|dg)\b": "needs the feature that the page adds",
    r": keytool\b": "writes to /etc/ssl",
    r"[\s(]yc [a-z-]+ ": "needs Yandex Cloud",
    r": (for .* do\s+)?grant\b": "needs Yandex Cloud",
    r"\bterraform(\.tfvars| -chdir=\S+| init)": "needs Yandex Cloud",
    r": \(umask 077; set -o noclobber; (cat|terraform output)": "writes the .env of steps that are not run",
    r'\.md: echo "?(YC_SERVICE|ML_PLATFORM_EPOCH)': "adds to that .env",
    r"\bdocker (compose|build)\b": "needs a Docker engine: deploy/test_image.sh, test_stack.py",
    r": sudo\b": "changes the machine: test_mlflow_server.py",
    r": ssh -L\b": "needs another machine",
    r": read -rp\b": "asks for a secret",
    r"create_databases\.sh": "needs PostgreSQL on another machine: test_stack.py",
}

#: Pages that process files from their first day on, which takes a minute each: `make test-tutorials`.
TUTORIALS = ("docs/tutorials/your_own_data.md", "docs/quickstart-yandex.md")

#: Commands that run until Ctrl-C, and the file that is there when they are ready.
SERVERS = {"ml-platform dev-cloud": "data/dev-cloud/environment"}

#: What is typed in place of a command: without its part that takes minutes and changes this project's packages.
STAND_INS = {"make setup": "make .dagster_home/dagster.yaml"}

KEYS = ("2019-08-22", "2019-09-21", "2019-10-21", "2019-11-20")

#: Stands in for DuckDB's command, which its Python package lacks.
DUCKDB = f"#!{sys.executable}\nimport sys, duckdb\nduckdb.connect(sys.argv[1]).execute(sys.stdin.read())\n"


@dataclass(frozen=True)
class Command:
    """A command of a page, and the lines that the page shows as its output."""

    page: str
    line: int
    text: str
    output: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def exceptions(self) -> list[str]:
        return [pattern for pattern in EXCEPTIONS if re.search(pattern, str(self))]

    @property
    def without_comment(self) -> str:
        return re.sub(r"\s+# .*", "", self.text)

    @property
    def typed(self) -> str:
        return STAND_INS.get(self.without_comment, self.text)


@cache
def is_complete(command: str) -> bool:
    """True if a shell would run the command rather than wait for its next line."""
    checked = subprocess.run(["bash", "-nc", command], capture_output=True, text=True, check=False)
    return not checked.stderr and not command.endswith("\\")


def commands_of(page: str) -> list[Command]:
    """The commands of a page, in order."""
    found: list[Command] = []
    kind, text, start, output = "", "", 0, list[str]()

    def end() -> None:
        if text:
            found.append(Command(page, start, text, tuple(output)))

    for number, line in enumerate((PROJECT / page).read_text().splitlines(), start=1):
        if fence := re.match(r"\s*```(\w*)$", line):
            end()
            kind, text, start, output = "" if kind else fence[1] or "text", "", number + 1, []
        elif kind == "sh" or (kind == "console" and text and not output and not is_complete(text)):
            text += line + "\n" if kind == "sh" else "\n" + line
        elif kind == "console" and line.lstrip().startswith("$ "):
            end()
            text, start, output = line.lstrip().removeprefix("$ "), number, []
        elif kind == "console":
            output.append(line)
    return found


COMMANDS = {page: commands_of(page) for page in PAGES}


# The convention


def test_every_exception_is_needed():
    used = {pattern for commands in COMMANDS.values() for command in commands for pattern in command.exceptions}
    assert EXCEPTIONS.keys() == used, "these patterns match no command any more"


def test_commands_are_in_blocks_that_are_read():
    for page in PAGES:
        text = (PROJECT / page).read_text()
        assert not re.findall(r"^\s*```(?:bash|shell|zsh)\b.*", text, re.MULTILINE), f"{page}: use ```console or ```sh"
        outside = re.sub(r"^\s*```console\n.*?^\s*```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^\s*\$ .*", outside, re.MULTILINE), f"{page}: a command outside of a console block"
    assert sum(map(len, COMMANDS.values())) > 50


def test_the_russian_readme_has_the_same_commands():
    commands = [command.without_comment for command in commands_of("README.ru.md")]
    assert commands == [command.without_comment for command in COMMANDS["README.md"]]


# docs/quickstart-yandex.md and Terraform


def test_the_quick_start_gives_the_roles_that_terraform_gives():
    text = (PROJECT / "docs/quickstart-yandex.md").read_text()
    role = r"\b(?:dataproc|vpc|iam|storage|kms)(?:\.(?!tf|yandexcloud|api)[a-zA-Z]+)+"
    named = set(re.findall(role, text))
    assert named == {role for role, _, _ in granted_roles()}


def test_the_quick_start_sets_the_variables_that_terraform_prints():
    (block,) = [
        command.text for command in COMMANDS["docs/quickstart-yandex.md"] if "ML_PLATFORM_LAKE_URI=" in command.text
    ]
    printed = {
        name for name, value in LOCALS["environment"].items() if "one(" not in value and "create_vm" not in value
    }
    assert set(re.findall(r"^([A-Z_0-9]+)=", block, re.MULTILINE)) == printed - {"MLFLOW_ARTIFACTS_DESTINATION"}


# Commands within sentences and tables


def code_spans(page: str) -> list[str]:
    text = re.sub(r"^\s*```.*?^\s*```$", "", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def problem_of(command: str) -> str:
    """What is wrong with a command of this project as it is written; empty if nothing is, or it is none of ours."""
    program, *words = shlex.split(command.replace("…", ""), comments=True)
    if program.endswith("python") and words[:1] == ["-m"] and words[1].startswith(("benchmarks", "ml_platform")):
        return "" if find_spec(words[1]) else "no such module"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words if re.fullmatch(r"[a-z-]+", word) and word not in targets]
        return f"no target {', '.join(unknown)}" if unknown else ""
    if program != "ml-platform":
        return ""
    known: Any = typer.main.get_command(app)
    while hasattr(known, "commands") and words and not words[0].startswith("-") and not words[0].isupper():
        if (inner := known.commands.get(words.pop(0))) is None:
            return "no such command"
        known = inner
    options = {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("-") and word.partition("=")[0] not in options | {"--help"}]
    return f"no option {', '.join(unknown)}" if unknown else ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_the_text_exist(page: str):
    spans = [span for span in code_spans(page) if re.match(r"(ml-platform|make|\S*python) ", span)]
    assert {span: problem for span in spans if (problem := problem_of(span))} == {}


def test_what_does_not_exist_is_found():
    for command in (
        "ml-platform forget",
        "ml-platform champion show --verbosely",
        "make tea",
        "python -m benchmarks.x",
    ):
        assert problem_of(command)


# The commands


def after_demo(clone: Path, mlflow_store: Path) -> None:
    """Four months of raw files. The models are trained on three of them; the champion scored the fourth."""
    data = clone / "data"
    data.mkdir()
    shutil.copy(mlflow_store, data / "mlflow.db")
    settings = Settings(ML_PLATFORM_RAW_URI=f"{data}/raw", ML_PLATFORM_LAKE_URI=f"{data}/lake")
    lake = LakeResource(raw_uri=settings.raw_uri, lake_uri=settings.lake_uri, epoch=str(settings.epoch))
    mlflow = MlflowResource(tracking_uri=settings.tracking_uri, artifact_root=settings.artifact_root)
    platform = definitions(lake, None, mlflow)
    for number, key in enumerate(KEYS):
        first = datetime.fromisoformat(key)
        days = {(first + timedelta(days=day)).strftime(TIME_FORMAT): 1 for day in range(30)}
        put_raw(lake, key, raw_spec(number, start=first.strftime(TIME_FORMAT), report={"rows_per_day": days}))
    assets = ("cleaned_transactions", "transaction_features", "scored_transactions", "fraud_model")
    with (
        mock.patch.dict(os.environ),  # MLflow's client keeps the address of its server there
        mock.patch("ml_platform.model.training.draw_figures", return_value={"overview": b"a picture"}),
        dg.DagsterInstance.from_config(str(clone / ".dagster_home")) as instance,
    ):
        instance.add_dynamic_partitions("raw_files", KEYS)
        three_versions = {"fraud_model": {"train_each": True}}
        assert run_assets(platform, instance, *assets, keys=(KEYS[0], KEYS[2]), config=three_versions).success
        assert run_assets(platform, instance, *assets, keys=(KEYS[3], KEYS[3])).success
    put_scores(lake, KEYS[3], [scored_row(number) for number in range(12)])


def scored_row(number: int) -> dict[str, Any]:
    """An alert of the fourth file."""
    return {
        **{"transaction_id": number, "customer_id": number, "terminal_id": 7, "tx_amount": 10.0 * number},
        **{"tx_datetime": datetime.fromisoformat(KEYS[3]) + timedelta(days=number), "score": 0.9 - number / 100},
        **{"rank_of_day": 1, "alert": True, "model_version": 1, "reason_1": f"amount {10 * number:,.2f}"},
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_store: Path) -> tuple[Path, Path]:
    """A clone of this project after the demo, and a copy of it."""
    directory = tmp_path_factory.mktemp("documentation")
    clone = directory / "clone"
    clone.mkdir()
    own = {"data", "deploy", ".dagster_home", ".env", ".git", ".venv"}
    for entry in PROJECT.iterdir():
        if entry.name not in own:
            (clone / entry.name).symlink_to(entry)
    (clone / ".venv").symlink_to(sys.prefix)
    shutil.copytree(
        PROJECT / "deploy", clone / "deploy", ignore=shutil.ignore_patterns(".env", "secrets", ".terraform")
    )
    (clone / ".dagster_home").mkdir()
    shutil.copy(PROJECT / "dagster.yaml", clone / ".dagster_home")
    after_demo(clone, empty_mlflow_store)
    return clone, shutil.copytree(clone, directory / "copy", symlinks=True)


@pytest.fixture
def clone(prepared: tuple[Path, Path]) -> Path:
    """The clone as it was prepared, in the same place, for its lake and MLflow name paths within it."""
    path, copy = prepared
    shutil.rmtree(path)
    return shutil.copytree(copy, path, symlinks=True)


@pytest.fixture
def shell_environment(tmp_path: Path) -> dict[str, str]:
    """What a user's shell has, the variables of the README included, and settings that make Spark's work short."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "duckdb").write_text(DUCKDB)
    (programs / "duckdb").chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "JAVA_HOME", "LANG", "TMPDIR") if name in os.environ}
    return kept | {
        "JAVA_TOOL_OPTIONS": f"{SHORT_LIVED} {java_options(CLASS_ARCHIVE)}",
        **dict.fromkeys(("SPARK_PROPERTIES", "DATAPROC_JOB_PROPERTIES"), json.dumps(NO_CODEGEN)),
        "PATH": f"{Path(sys.executable).parent}:{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "COLUMNS": "200",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def script_of(commands: list[Command], outputs: Path) -> str:
    """A script that types in the commands until one fails; the output of each, and its exit code, get files."""
    steps = []
    for number, command in enumerate(commands):
        out = shlex.quote(str(outputs / str(number)))
        if ready := SERVERS.get(command.without_comment):
            steps.append(f"{{\n{command.text}\n}} >{out} 2>&1 & server=$!")
            steps.append(f"until [ -e {ready} ]; do kill -0 $server || exit 1; sleep 0.1; done; echo 0 >{out}.code")
        else:
            steps.append(
                f"{{\n{command.typed}\n}} >{out} 2>&1; code=$?; echo $code >{out}.code; [ $code = 0 ] || exit 1"
            )
    return "\n".join(steps)


def missing_line(shown: tuple[str, ...], output: str) -> str | None:
    """The first line of a page's output that the command did not print, in this order."""
    rest = " ".join(output.split())
    for line in shown:
        parts = [re.escape(" ".join(part.split())) for part in line.split("…")]
        if any(parts):
            found = re.search(".*?".join(parts), rest)
            if found is None:
                return line
            rest = rest[found.end() :]
    return None


def type_in(commands: list[Command], clone: Path, environment: dict[str, str], outputs: Path) -> Iterator[str]:
    """Run commands in one shell; what went wrong."""
    script = script_of(commands, outputs)
    with subprocess.Popen(
        ["bash", "-c", script], cwd=clone, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    ) as shell:
        try:
            shell.wait(900)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # the servers
    for number, command in enumerate(commands):
        code, out = outputs / f"{number}.code", outputs / str(number)
        output = out.read_text(errors="replace") if out.exists() else ""
        if not code.exists() or code.read_text().strip() != "0":
            yield f"{command.page}:{command.line} failed: $ {command.text}\n{output[-5000:]}"
            return
        if (line := missing_line(command.output, output)) is not None:
            yield f"{command.page}:{command.line}: $ {command.text}\nprinted no {line!r}, but\n{output[-5000:]}"


@pytest.mark.e2e
@pytest.mark.spark
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.tutorial if page in TUTORIALS else ())
        for page, commands in COMMANDS.items()
        if not all(command.exceptions for command in commands)
    ],
)
def test_commands_work(page: str, clone: Path, shell_environment: dict[str, str], tmp_path: Path):
    environment = shell_environment | {"DAGSTER_HOME": str(clone / ".dagster_home")}
    commands = [command for command in COMMANDS[page] if not command.exceptions]
    assert not list(type_in(commands, clone, environment, tmp_path))


def test_a_command_that_fails_or_prints_something_else_is_found(tmp_path: Path):
    texts = {
        "true": (),
        "export WORD=words": (),
        "echo some $WORD here": ("some … here",),
        "echo a": ("b",),
        "false": (),
    }
    commands = [Command("page", 1, text, output) for text, output in texts.items()]
    problems = list(type_in(commands, tmp_path, dict(os.environ), tmp_path))
    assert [re.sub(r"\s*\n.*", "", problem) for problem in problems] == ["page:1: $ echo a", "page:1 failed: $ false"]


@pytest.mark.e2e
def test_the_demo_says_what_there_is_after_it(clone: Path, shell_environment: dict[str, str]):
    """All of its files are there, so that it has nothing to do but to say so."""
    environment = shell_environment | {"DAGSTER_HOME": str(clone / ".dagster_home"), "COLUMNS": "120"}
    done = subprocess.run(
        ["ml-platform", "demo"], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    results = lines[lines.index("Results") + 1 :]
    assert re.match(r"Rows: 80,000 raw = 80,000 clean \+ 0 duplicate \+ 0 rejected", results[0])
    assert re.match(r"Champion: version \d, trained up to \d{4}-", results[1])
    assert re.match(r"  of 100 alerts a day in the held-out week \d+ are frauds", results[2])
    assert f"rows of {KEYS[3]} by version" in results[3]
    assert any(line.startswith(f"Next: ml-platform alerts {KEYS[3]} ") for line in results)
    assert max(map(len, lines)) <= 120

    refused = subprocess.run(
        ["ml-platform", "demo"],
        cwd=clone,
        env=environment | {"ML_PLATFORM_LAKE_URI": "s3://my-lake/prefix"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "the demo uses ./data only; other places are set by ML_PLATFORM_LAKE_URI" in refused.stderr
