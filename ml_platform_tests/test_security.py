"""What docs/security.md promises: names that lead elsewhere, text that is more than text, data as code, secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest
import yaml

from ml_platform import escaping
from ml_platform.assets.outcomes import check_partitions
from ml_platform.lake.partitions import is_partition_key
from ml_platform.lake.reports import CLEANED_TABLE, CleanedReport
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import LocalStore, S3Store, Store
from ml_platform.model.mlflow import MlflowResource
from ml_platform.operations import webserver
from ml_platform.operations.webserver import guard
from ml_platform.planning import plan_runs
from ml_platform_tests.fakes import cleaned_report, definitions, put_cleaned, put_raw, put_report, raw_spec, run_assets

ROOT = Path(__file__).resolve().parent.parent

#: Names that would lead out of the lake.
OUTWARD = ["../x", "..", "a/../../b", "/etc/passwd", "models/../../x", "a/..", "a\0b"]

#: Keys that no raw file has; Dagster takes them from a program.
HOSTILE_KEYS = [
    "../../outside",
    "..",
    "a/../../../outside",
    "/etc/passwd",
    "%2e%2e%2foutside",
    "raw_file=good",
    "*",
    "good/../good",
    "good\nINFO forged",
    "\x1b[2Jgood",
    "good\0",
    "<b>good</b>",
    "x" * 1000,
]

#: What a file, a note or an error may say.
HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![pixel](https://evil.example/p.png)",
    "[click](https://evil.example)",
    "[a]: https://evil.example\n\n[a]",
    "https://evil.example www.evil.example me@evil.example <https://evil.example>",
    "`code` **bold** _emphasis_ ~~gone~~ | cell | \\` &lt;b&gt;",
    "# heading\n---\n    code\n```\nfence\n```",
    "a\n\n<b>next</b>",
]


# Names


@pytest.mark.parametrize("name", OUTWARD)
@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_no_name_leads_out_of_a_store(tmp_path: Path, name: str, kind: str):
    store: Store = LocalStore(str(tmp_path / "lake")) if kind == "directory" else S3Store("s3://bucket/lake")
    client = mock.Mock()
    store.__dict__["_client"] = client
    calls = [
        lambda: store.spark_uri(name),
        lambda: list(store.list_directory(name)),
        lambda: list(store.list_reports(name)),
        lambda: store.read(name),
        lambda: store.read_start(name),
        lambda: store.write(name, b""),
        lambda: store.open_new(name).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="points outside the lake"):
            call()
    assert list(tmp_path.iterdir()) == []
    assert not {"get_object", "put_object", "upload_file", "download_file"} & {call[0] for call in client.method_calls}


def test_directories_of_hostile_keys_are_no_partitions(lake: LakeResource, tmp_path: Path):
    report = cleaned_report("good")
    put_report(lake, CLEANED_TABLE, "good", report)
    for key in ("..", "a b", "\x1b[2Jgone", "new\nline", "[red]", "<b>", ".hidden", "x" * 101, "a...b"):
        assert not is_partition_key(key)
        directory = tmp_path / "lake" / CLEANED_TABLE / f"raw_file={key}"
        directory.mkdir()
        (directory / "_report.json").write_text(json.dumps(report))
    assert list(lake.reports(CleanedReport)) == ["good"]


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e%2fx",
        "..\\x",
        "raw_file=x",
        "a...b",
        "x\nINFO forged",
        "x\x1b[2J",
        "\u202etxt",
        "$(id)",
        "=1+1",
        "n" * 200,
    ],
)
def test_raw_files_with_hostile_names_are_ignored(lake: LakeResource, instance: dg.DagsterInstance, name: str):
    lake.raw.write(f"{name}.txt", b"")
    files, ignored = lake.list_raw_files()
    assert (files, list(ignored)) == ({}, [f"{name}.txt"])
    plan = plan_runs(instance, lake)
    assert (plan.new_partitions, plan.ranges) == ([], [])
    assert plan.reason.isprintable()


def files_beside(lake: LakeResource, root: Path) -> dict[str, bytes]:
    """All files below `root` that are not in the lake's ``_runs``."""
    runs = root / "lake" / "_runs"
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and runs not in path.parents}


def test_hostile_keys_fail_and_touch_no_file(lake: LakeResource, instance: dg.DagsterInstance, tmp_path: Path):
    """Such keys can be registered by hand."""
    put_raw(lake, "good", raw_spec(0))
    put_cleaned(lake, "good")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "_report.json").write_text("{")
    before = files_beside(lake, tmp_path)
    instance.add_dynamic_partitions("raw_files", HOSTILE_KEYS)
    for asset in ("cleaned_transactions", "transaction_features", "fraud_model"):
        result = run_assets(definitions(lake), instance, asset, keys=(HOSTILE_KEYS[0], HOSTILE_KEYS[-1]), config=None)
        assert not result.success
        assert [event.step_key for event in result.get_step_failure_events()][:1] == [asset]
        error = result.get_step_failure_events()[0].step_failure_data.error
        assert error is not None
        assert (error.cause or error).message.strip().isprintable()
        assert not list((tmp_path / "lake").rglob("*.request.json"))
    assert files_beside(lake, tmp_path) == before


# Text


def rendered(text: str) -> list[Any]:
    """What a reader of Markdown like that of Dagster's UI makes of `text`, flat."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [part for token in reader.parse(text) for part in (token, *(token.children or []))]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_hostile_text_in_markdown_stays_plain_text(text: str):
    shown = escaping.markdown(f"model: {text}")
    assert {token.type for token in rendered(shown)} <= {"paragraph_open", "paragraph_close", "inline", "text"}
    plain = "".join(token.content for token in rendered(shown) if token.type == "text")
    assert plain.replace("\u200b", "") == " ".join(f"model: {text}".split())
    # As GitHub's readers find addresses in plain text.
    assert not re.search(r"(?i)https?://[-.\w]|\bwww\.|[-.\w+]@[-\w]", plain)


def test_a_bar_in_a_cell_does_not_end_it():
    found = escaping.markdown_table(("name", "n"), [("a|b", "1"), (escaping.markdown("a|b"), "2")])
    assert found.splitlines() == ["| name | n |", "| --- | --- |", r"| a\|b | 1 |", r"| a\|b | 2 |"]


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;title\x07", "a\rb", "\u202eright", "\x9b31m", "\u200f", "a\x00"])
def test_control_characters_are_escaped(text: str):
    assert escaping.printable(text).isprintable()
    assert escaping.markdown(text).replace("\u200b", "").isprintable()
    assert escaping.printable("a\n\tb" + text, keep="\n\t").startswith("a\n\tb")


def test_nothing_in_a_chat_is_a_link_or_a_mention():
    text = escaping.chat("<!channel> <https://evil.example|click> @all ![x](https://evil.example/p.png) a -> b")
    assert not re.search(r"[<>@]|\]\(", text)
    assert escaping.chat("run: 1\nstep a: it broke (b/c.txt)") == "run: 1\nstep a: it broke (b/c.txt)"


def test_the_description_of_a_check_is_plain_text():
    """Dagster's UI reads the description of a check as Markdown."""
    context = mock.Mock(partition_keys=["a"])
    result = check_partitions(
        context, dg.AssetCheckKey(dg.AssetKey("fraud_model"), "promotion"), lambda key: HOSTILE_TEXTS[2]
    )
    evaluation = context.op_execution_context.log_event.call_args.args[0]
    assert not result.passed
    for description in (result.description, evaluation.description):
        assert "image" not in {token.type for token in rendered(description)}
        assert "pixel" in description
    assert not [value for value in evaluation.metadata.values() if isinstance(value, dg.MarkdownMetadataValue)]


def test_a_note_does_not_command_the_terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    from ml_platform.cli.champion import show_champion

    note = "\x1b]0;owned\x07[red]fine[/red]\x1b[2J"
    champion = mock.Mock(version=1, run_id="r", tags={"champion_why": note})
    client = mock.Mock()
    client.get_run.return_value.data.metrics = {}
    client.get_run.return_value.info.lifecycle_stage = "deleted"
    monkeypatch.setattr(MlflowResource, "champion", lambda self: champion)
    monkeypatch.setattr(MlflowResource, "client", lambda self: client)
    show_champion()
    shown = capfd.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]fine[/red]" in shown


def test_an_error_does_not_command_the_terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    from ml_platform.cli import main
    from ml_platform.cli.context import CommandError

    monkeypatch.setattr(main, "app", mock.Mock(side_effect=CommandError("no \x1b[2J[red]file")))
    with pytest.raises(SystemExit):
        main.main()
    assert capfd.readouterr().err == "error: no \\x1b[2J[red]file\n"


# Data that are code


def modules() -> list[Path]:
    found = [path for package in ("ml_platform", "spark_jobs", "deploy") for path in (ROOT / package).rglob("*.py")]
    assert len(found) > 40
    return found


#: Methods and builtins that run code, or load classes, that the data name; ruff cannot ban them. With a schema of ours,
#: Spark's readers take no class from the files.
UNSAFE_CALLS = re.compile(
    r"\.read(Stream)?\b(?!.*\.schema\().*\.(parquet|orc|load|table)\("
    r"|\.(pickleFile|sequenceFile|objectFile)\("
    r"|\b(?!booster\.)\w+(\(\))?\.load_model\("
    r"|allow_pickle(?!=False)"
    r"|(?<![\w.])(__import__|compile)\("
)


def test_no_module_calls_what_runs_code_from_data():
    """Functions and modules that do are banned in pyproject.toml."""
    found = [
        (path.name, line.strip())
        for path in modules()
        for line in path.read_text().splitlines()
        if UNSAFE_CALLS.search(line)
    ]
    # This function inspects the schema before it loads: see the test below.
    inspects = ("runtime.py", "frame = spark.read.parquet(*[literal_path(uri) for uri in uris])")
    # Bytes of files, which pyarrow reads.
    reads_bytes = (
        "rows.py",
        'files = spark.read.format("binaryFile").option("pathGlobFilter", "*.parquet").load(runtime.literal_path(uri))',
    )
    assert sorted(found) == sorted([inspects, reads_bytes])


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("spark.read.option('a', 'b').parquet(x)", True),
        ("spark.readStream.format('parquet').load(x)", True),
        ("CrossValidatorModel.read().load(x)", True),
        ("spark.sparkContext.pickleFile(x)", True),
        ("xgboost.Booster().load_model(x)", True),
        ("mlflow.pyfunc.load_model(x)", True),
        ("np.load(x, allow_pickle=True)", True),
        ("__import__(x)", True),
        ("spark.read.schema(s).format('parquet').load(x)", False),
        ("frame.write.mode('overwrite').parquet(x)", False),
        ("parquet.read_table(x)", False),
        ("spark.read.text(x)", False),
        ("re.compile(x)", False),
        ("booster.load_model(x)", False),
    ],
)
def test_unsafe_calls_are_recognised(line: str, unsafe: bool):
    assert bool(UNSAFE_CALLS.search(line)) is unsafe


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once Python has imported the module ``trap_of_the_test``."""
    (tmp_path / "code").mkdir()
    sprung = tmp_path / "sprung"
    (tmp_path / "code" / "trap_of_the_test.py").write_text(f"open({str(sprung)!r}, 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "trap_of_the_test", raising=False)
    return sprung


@pytest.mark.spark
def test_a_class_that_parquet_names_is_not_imported(spark: Any, tmp_path: Path, trap: Path):
    import pyarrow as pa
    from pyarrow import parquet

    from spark_jobs import runtime

    kind = {"type": "udt", "pyClass": "trap_of_the_test.Trap", "serializedClass": "", "sqlType": "double"}
    fields = [{"name": "score", "nullable": True, "metadata": {}, "type": kind}]
    schema = json.dumps({"type": "struct", "fields": fields})
    table = pa.table({"score": [0.5]}).replace_schema_metadata({"org.apache.spark.sql.parquet.row.metadata": schema})
    (tmp_path / "rows").mkdir()
    parquet.write_table(table, tmp_path / "rows" / "part-0.parquet")
    uri = f"file://{tmp_path}/rows"
    with pytest.raises(ValueError, match="user-defined type"):
        runtime.read_parquet(spark, uri)
    assert spark.read.schema("score double").parquet(uri).collect()[0].score == 0.5
    assert parquet.read_table(tmp_path / "rows" / "part-0.parquet").column("score").to_pylist() == [0.5]
    assert not trap.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do: PySpark itself imports the class
        _ = spark.read.parquet(uri).schema.fields[0].dataType.no_such_attribute
    assert trap.exists()


def test_code_in_mlflow_is_never_run(
    lake: LakeResource, empty_mlflow_store: Path, tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
):
    """The reload proof reads only the model file, not the code beside it."""
    import mlflow
    import pandas as pd

    from ml_platform.model.gate import verify_reload
    from ml_platform.model.packaging import save_model
    from ml_platform_tests.fakes import FakeEngine

    FakeEngine()._write_model(tmp_path, ["a", "b"])
    model = tmp_path / "model"
    sample = pd.read_parquet(tmp_path / "sample.parquet")
    save_model(model, (tmp_path / "model.json").read_bytes(), sample)
    (loader,) = model.glob("code/*/pyfunc.py")
    for module in [name for name in sys.modules if name.startswith(loader.parent.name)]:
        monkeypatch.delitem(sys.modules, module)  # another test may have loaded the same code, and Python keeps it
    loader.write_text(loader.read_text() + "\nimport trap_of_the_test\ntrap_of_the_test.Trap()\n")
    resource = MlflowResource(tracking_uri=f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}")
    resource.client().create_registered_model("fraud_model")
    version = resource.client().create_model_version("fraud_model", model.as_uri())
    verify_reload(resource, version, sample)
    assert "100 rows" in resource.client().get_model_version("fraud_model", version.version).tags["reload_proof"]
    assert not trap.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do: MLflow itself runs the code
        mlflow.pyfunc.load_model(str(model)).predict(None)
    assert trap.exists()


@pytest.mark.spark
def test_texts_of_raw_lines_reach_only_the_rejects(spark: Any, tmp_path: Path):
    from spark_jobs import clean_transactions

    lines = [*HOSTILE_TEXTS, '=HYPERLINK("https://evil.example","x")', "\x1b[2J,1,2", "' OR 1=1 --,x"]
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(lines))
    item = {
        "partition": "a",
        "raw": {"uri": f"file://{raw}", "size": raw.stat().st_size, "fingerprint": "1"},
        "output_uri": f"file://{tmp_path}/cleaned",
        "rejected_uri": f"file://{tmp_path}/rejected",
    }
    report = clean_transactions.run(spark, {"run_id": "r", "epoch": "2020-01-01", "partitions": [item]})
    said = json.dumps(report)
    assert report["partitions"]["a"]["report"]["counts"]["clean_rows"] == 0
    assert not re.search(r"evil|script|\\u001b|HYPERLINK|1=1", said)
    kept = {
        row.raw_line for row in spark.read.schema("raw_line string").parquet(f"file://{tmp_path}/rejected").collect()
    }
    assert lines[-3] in kept


# Secrets and addresses

SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s*[A-Za-z0-9+/=]{20}",
    "AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "static key of Yandex": r"\bYC[A-Z][A-Za-z0-9_-]{22,}\b",
    "token of Yandex": r"\bt1\.[A-Z0-9a-z_-]{20,}|\by[0-3]_[A-Za-z0-9_-]{30,}",
    "token of a service": r"\b(gh[pousr]_\w{30,}|github_pat_\w{30,}|xox[abp]-[\w-]{10,}|pypi-\w{30,})",
    "webhook": r"hooks\.slack\.com/services/T\w+/B\w+/\w+",
    "JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "password in an address": r"[a-z]://[^/@\s:'\"{}$<]+:[^/@\s'\"{}$<…]+@(?!localhost|127\.0\.0\.1|[\w.-]+\.(example|invalid)\b)",
    "default password": r"(?i)\b(changeme|minioadmin|admin:admin|root:root|postgres:postgres|mlflow:mlflow|passw0rd)\b",
    "password with a value": (
        # Except for that of every Java's list of certificate authorities, which are no secret.
        r"(?i)(password|passwd|secret_access_key)['\"]?\s*[=:]\s*['\"]?(?!None|null|str|Secret|changeit\b)[\w!#%+-]{6,}['\"]?\s*$"
    ),
}


def tracked_files() -> list[Path]:
    """Text files of the repository."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is not a clone of the repository")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def secrets_in(text: str, kinds: dict[str, str]) -> list[str]:
    return [kind for kind, pattern in kinds.items() if re.search(pattern, text, re.MULTILINE)]


def test_no_secret_is_in_the_repository():
    """In tests, passwords have values: those of servers that the test itself starts."""
    in_tests = {kind: pattern for kind, pattern in SECRETS.items() if "password" not in kind}
    found = {}
    for path in tracked_files():
        if path == Path(__file__):
            continue
        of_test = "ml_platform_tests" in path.parts
        if kinds := secrets_in(path.read_text(errors="replace"), in_tests if of_test else SECRETS):
            found[str(path.relative_to(ROOT))] = kinds
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bqAAAA",
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "YCAJE" + "abcdefghijklmnopqrstuv",
        "t1." + "9euelZqNl5WSmZ2XkJ6abcd",
        "ghp_" + "a" * 36,
        "postgresql://mlflow:" + "s3cret@db:5432/mlflow",
        "POSTGRES_PASSWORD=" + "example1",
        'password: "' + 'letmein99"',
        "admin:" + "admin",
    ],
)
def test_secrets_are_recognised(text: str):
    assert secrets_in(text, SECRETS)


def test_nothing_listens_to_the_world():
    """Containers may: compose.yaml publishes their ports on 127.0.0.1 only."""
    found = {
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if "ml_platform_tests" not in path.parts
        and re.search(r"(?<![\d.])0\.0\.0\.0(?![/.\d])", path.read_text(errors="replace"))
    }
    assert found <= {"deploy/compose.yaml", "docs/security.md"}
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert "deploy/compose.yaml" in found
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "network_mode" not in service


def test_dagster_is_not_told_the_password_of_mlflow(monkeypatch: pytest.MonkeyPatch):
    """Its UI shows the configuration of resources."""
    from ml_platform.definitions import build_resources
    from ml_platform.settings import load_settings

    address = "postgresql+psycopg2://me:hunter22@db.example/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    resource = build_resources(load_settings())["mlflow"]
    assert "hunter22" not in repr(resource) + str(resource.model_dump())
    with dg.build_resources({"mlflow": resource}) as opened:
        assert opened.mlflow.tracking_uri == address


# Dagster's webserver


def answer(app: Any, method: str = "POST", path: str = "/graphql", kind: str = "http", **headers: str) -> int:
    """Status of a request; of an accepted WebSocket 101."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": b""}

    path, _, query = path.partition("?")
    headers = {"Host": "localhost:3000", **headers}
    scope = {
        "type": kind,
        **({"method": method} if kind == "http" else {}),
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "subprotocols": [],
    }
    asyncio.run(app(scope, receive, send))
    return 101 if sent[0]["type"] == "websocket.accept" else int(sent[0]["status"])


async def any_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def guarded(app: Any, address: str | None) -> Any:
    for middleware in reversed(guard(address)):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


EVIL = "https://evil.example"


class TestWebserver:
    @pytest.mark.parametrize(
        ("status", "request_"),
        [
            (200, {}),
            (200, {"Origin": "http://localhost:3000"}),
            (200, {"Host": "127.0.0.1:3001", "Origin": "http://127.0.0.1:3001"}),
            (200, {"Host": "[::1]:3000"}),
            (200, {"Host": "dagster.example", "Origin": "https://dagster.example"}),
            # Behind a proxy that passes on its own name for this machine.
            (200, {"Host": "127.0.0.1:3000", "Origin": "https://dagster.example"}),
            (101, {"kind": "websocket", "Origin": "http://localhost:3000"}),
            (200, {"method": "GET", "Accept": "text/html,*/*"}),
            (200, {"method": "GET", "path": "/runs/1"}),
            (200, {"method": "GET", "path": "/server_info"}),
            # Origins of others.
            (403, {"Origin": EVIL}),
            (403, {"Origin": "null"}),
            (403, {"Origin": "http://localhost:8080"}),
            (403, {"Origin": "http://["}),
            (403, {"kind": "websocket", "Origin": EVIL}),
            (403, {"path": "/report_asset_materialization/a", "Origin": EVIL}),
            # Host names of others.
            (400, {"Host": "evil.example"}),
            (400, {"Host": "evil.example", "Origin": EVIL}),
            (400, {"Host": ""}),
            (400, {"Host": "localhost.evil.example:3000"}),
            (400, {"kind": "websocket", "Host": "evil.example"}),
            (400, {"method": "GET", "path": "/logs/x", "Host": "evil.example"}),
            # GraphQL by GET.
            (403, {"method": "GET"}),
            (403, {"method": "GET", "path": "/graphql/", "Accept": "*/*"}),
            (403, {"method": "GET", "path": "/prefix/graphql"}),
        ],
    )
    def test_only_its_own_pages_and_programs(self, status: int, request_: dict[str, str]):
        assert answer(guarded(any_app, "https://dagster.example"), **request_) == status

    def test_without_an_address_of_its_own(self):
        app = guarded(any_app, None)
        assert answer(app) == 200
        assert answer(app, Origin="null") == 403
        assert answer(app, Host="dagster.example") == 400
        assert answer(guarded(any_app, "http://[fd00::1]:3000"), Host="[fd00::1]:3000") == 200

    def test_an_address_in_capitals(self):
        app = guarded(any_app, "https://Dagster.Example")
        assert answer(app, Host="127.0.0.1:3000", Origin="https://dagster.example") == 200

    def test_dagsters_own_webserver_needs_it(self, tmp_path: Path):
        """When the first of these fails, Dagster looks at the origin itself, and our webserver may go."""
        from dagster._core.workspace.context import WorkspaceProcessContext
        from dagster._core.workspace.load_target import EmptyWorkspaceTarget
        from dagster_webserver.webserver import DagsterWebserver

        with (
            dg.DagsterInstance.local_temp(str(tmp_path)) as instance,
            WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as context,
        ):
            app = DagsterWebserver(context).create_asgi_app()
            foreign: dict[str, str] = {"method": "GET", "path": "/graphql?query={version}", "Origin": EVIL}
            assert answer(app, **foreign) == 200
            assert answer(guarded(app, None), **foreign) == 403

    def test_dagster_dev_starts_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "workspace.yaml").write_text("load_from: []\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
        start = mock.Mock(side_effect=InterruptedError)
        monkeypatch.setattr("dagster._cli.dev.open_ipc_subprocess", start)
        monkeypatch.setattr(sys, "argv", ["dev", "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", "3999"])
        with pytest.raises(InterruptedError):
            webserver.dev()
        assert start.call_args.args[0][:3] == [sys.executable, "-m", "ml_platform.operations.webserver"]


# What is installed


def test_every_installed_dependency_is_pinned():
    """Of the platform, its extras and dependency groups, as far as they are installed: what is tested is pinned."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    pinned = {canonicalize_name(pin.name) for pin in pins}
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    wanted = [Requirement("ml-platform[postgres]"), *(Requirement(name) for names in groups.values() for name in names)]
    seen: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            with contextlib.suppress(metadata.PackageNotFoundError):
                needed = map(Requirement, metadata.requires(name) or [])
                wanted += [other for other in needed if not other.marker or other.marker.evaluate({"extra": extra})]
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    names = {name for name, _ in seen} & installed - {"ml-platform"}
    assert len(names) > 100
    assert names - pinned == set()
