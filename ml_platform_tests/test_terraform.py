"""The Terraform configuration, as far as it can be checked without the cloud and without its provider.

It parses, its names hang together, it is formatted; what it prints is an environment that the platform takes; nothing
is open to the world; and the roles that it gives are those of its README.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
from hcl2 import SerializationOptions

from ml_platform.settings import ClusterSettings, Settings, load_cluster_settings, load_settings

DIRECTORY = Path(__file__).parent.parent / "deploy" / "terraform"
FILES = sorted(DIRECTORY.glob("*.tf"))
README = (DIRECTORY / "README.md").read_text()

#: Roles that are wider than anything here needs.
TOO_WIDE = re.compile(r"(^|\.)(admin|owner)$|^(editor|viewer|compute\..*|resource-manager\..*)$")


def load(text: str) -> dict[str, Any]:
    """A file as dictionaries; expressions are texts that begin with ``${``."""
    return hcl2.loads(
        text,
        serialization_options=SerializationOptions(
            with_comments=False, explicit_blocks=False, strip_string_quotes=True
        ),
    )


def blocks(kind: str) -> dict[str, Any]:
    """All blocks of one kind (variable, output, …) by label; of resources and data, by ``type.name``."""
    found: dict[str, Any] = {}
    for file in FILES:
        for block in load(file.read_text()).get(kind, []):
            for label, body in block.items():
                entries = {f"{label}.{name}": inner for name, inner in body.items()} if kind in TYPED else {label: body}
                assert not found.keys() & entries.keys(), f"{kind} {label} is declared twice"
                found |= entries
    return found


TYPED = ("resource", "data")
VARIABLES = blocks("variable")
RESOURCES = blocks("resource")
DATA = blocks("data")
OUTPUTS = blocks("output")
LOCALS = blocks("locals")


def texts(node: Any) -> Iterator[str]:
    """All texts in a parsed file, keys included."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


def inner_blocks(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Blocks `name` of a resource, those of ``dynamic`` included."""
    dynamic = [content for block in body.get("dynamic", []) if name in block for content in block[name]["content"]]
    return body.get(name, []) + dynamic


def referenced(pattern: str) -> set[str]:
    """What `pattern` finds in the expressions of all files; a variable's own checks are no use of it."""
    used = [body for file in FILES for kind, body in load(file.read_text()).items() if kind != "variable"]
    return {found for text in texts(used) for found in re.findall(pattern, text)}


@pytest.mark.parametrize(
    ("declared", "pattern"),
    [
        (VARIABLES.keys(), r"\bvar\.(\w+)"),
        (LOCALS.keys(), r"\blocal\.(\w+)"),
        (DATA.keys(), r"\bdata\.(yandex_\w+\.\w+)"),
    ],
    ids=["variables", "locals", "data"],
)
def test_what_is_referenced_is_declared_and_the_reverse(declared: set[str], pattern: str):
    assert declared
    assert referenced(pattern) == set(declared)


def test_referenced_resources_exist():
    names = referenced(r"(?<![\w.])(yandex_\w+\.\w+)")
    assert "yandex_vpc_subnet.cluster" in names
    assert names <= RESOURCES.keys()


def test_resources_that_count_are_indexed():
    """Without an index, or a splat, such a reference is an error as soon as the plan is made."""
    everything = RESOURCES | {f"data.{name}": body for name, body in DATA.items()}
    counted = {name for name, body in everything.items() if "count" in body or "for_each" in body}
    assert counted
    assert referenced(r"(?<![\w.])((?:data\.)?yandex_\w+\.\w+)\.") & counted == set()


def test_every_variable_says_what_it_takes():
    for name, variable in VARIABLES.items():
        assert variable["description"].endswith((".", "...")), name
        assert variable["type"], name
        for check in variable.get("validation", []):
            assert f"var.{name}" in check["condition"]
            assert check["error_message"]


def test_only_what_nobody_can_guess_is_required():
    assert {name for name, variable in VARIABLES.items() if "default" not in variable} == {"folder_id", "bucket_prefix"}


def test_versions_are_pinned():
    (terraform,) = load((DIRECTORY / "versions.tf").read_text())["terraform"]
    (providers,) = terraform["required_providers"]
    assert providers == {"yandex": {"source": "yandex-cloud/yandex", "version": "~> 0.225.0"}}
    assert terraform["required_version"]


# what it prints


def environment(**values: str) -> dict[str, str]:
    """The output `environment`, with an ID in the place of each reference, except for those in `values`."""
    printed = {}
    for name, text in LOCALS["environment"].items():
        text_of_local = re.sub(r"^\$\{local\.(\w+)}$", lambda found: LOCALS[found[1]], text)
        printed[name] = values.get(name) or re.sub(r"\$\{[^}]+}", "abc123", text_of_local)
    return printed


def test_the_environment_is_one_that_the_platform_takes(monkeypatch: pytest.MonkeyPatch):
    printed = environment(
        ML_PLATFORM_DEPLOYMENT_NAME=VARIABLES["name"]["default"], YC_ZONE=VARIABLES["zone"]["default"]
    )
    for name, value in printed.items():
        monkeypatch.setenv(name, value)
    settings, cluster = load_settings(), load_cluster_settings()
    assert (settings.deployment, settings.deployment_name) == ("yandex", "ml-platform")
    assert settings.raw_uri == "s3://abc123/transactions"
    assert settings.lake_uri == "s3://abc123/lake"
    assert printed["AWS_ENDPOINT_URL_S3"] == "https://storage.yandexcloud.net"
    assert cluster.zone == "ru-central1-a"
    assert cluster.security_group_ids == ["abc123"]


def test_every_printed_variable_is_read_and_every_needed_one_is_printed():
    read = {field.alias for kind in (Settings, ClusterSettings) for field in kind.model_fields.values()}
    by_boto3 = {"AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    by_compose = {"ML_PLATFORM_RAW_URI", "ML_PLATFORM_LAKE_URI", "MLFLOW_ARTIFACTS_DESTINATION"}
    printed = LOCALS["environment"].keys() | LOCALS["secrets"].keys()
    needed = {field.alias for field in ClusterSettings.model_fields.values() if field.is_required()}
    assert set(re.findall(r"\$\{(\w+):\?", (DIRECTORY.parent / "compose.yaml").read_text())) == by_compose
    assert printed <= read | by_boto3 | by_compose
    assert needed | by_boto3 | by_compose | {"YC_ZONE", "YC_SECURITY_GROUP_IDS"} <= printed


def test_lifecycle_rules_match_the_lake():
    """Files of runs expire; the marks that partitions exist (`_report.json`) and the code do not."""
    lake = LOCALS["lake_uri"].rsplit("/", 1)[1]
    assert LOCALS["expiring_prefixes"] == {"lake": [f"{lake}/_runs/", "dataproc/"]}


# secrets


def test_the_key_leaves_by_the_sensitive_output_alone():
    key = "yandex_iam_service_account_static_access_key"
    assert [name for name, value in LOCALS.items() if key in str(value)] == ["secrets"]
    assert [name for name, output in OUTPUTS.items() if key in str(output) or "local.secrets" in str(output)] == [
        "secrets"
    ]
    assert OUTPUTS["secrets"]["sensitive"] is True
    assert not LOCALS["secrets"].keys() & LOCALS["environment"].keys()


def test_no_secret_is_written_down():
    secret = re.compile(r"YC[A-Z][\w-]{20,}|AKIA\w{16}|t1\.\w{20,}|y[0-3]_[\w-]{30,}|PRIVATE KEY|(?i:password|passwd)")
    for file in [*FILES, *DIRECTORY.glob("tests/*"), DIRECTORY / "README.md"]:
        assert not secret.search(file.read_text()), file.name
    for name, variable in VARIABLES.items():
        if re.search("secret|token|key", name):
            assert variable["default"] == "", name


def test_state_and_variables_stay_out_of_the_repository():
    ignored = (DIRECTORY / ".gitignore").read_text().split()
    assert {"*.tfstate", "*.tfstate.*", "*.tfvars", ".terraform/"} <= set(ignored)


# who reaches what


def test_clusters_are_reached_by_nobody():
    (rule,) = inner_blocks(RESOURCES["yandex_vpc_security_group.cluster"], "ingress")
    assert rule["predefined_target"] == "self_security_group"
    assert "v4_cidr_blocks" not in rule


def test_nothing_is_open_to_the_world():
    groups = {name: body for name, body in RESOURCES.items() if name.startswith("yandex_vpc_security_group.")}
    assert len(groups) == 2
    for name, body in groups.items():
        for rule in inner_blocks(body, "ingress"):
            assert "0.0.0.0/0" not in str(rule), name
            assert "::/0" not in str(rule), name
    (ssh,) = inner_blocks(groups["yandex_vpc_security_group.vm"], "ingress")
    assert ssh["port"] == 22
    assert VARIABLES["vm_ssh_cidr_blocks"]["default"] == []
    assert ">= 8" in VARIABLES["vm_ssh_cidr_blocks"]["validation"][0]["condition"]
    assert VARIABLES["vm_public_ip"]["default"] is False
    assert VARIABLES["create_vm"]["default"] is False


def test_buckets_are_private_encrypted_and_versioned():
    buckets = [body for name, body in RESOURCES.items() if name.startswith("yandex_storage_bucket.")]
    assert len(buckets) == 1
    (bucket,) = buckets
    assert bucket["anonymous_access_flags"] == [{"read": False, "list": False, "config_read": False}]
    assert bucket["versioning"] == [{"enabled": True}]
    assert bucket["force_destroy"] is False
    (rule,) = bucket["server_side_encryption_configuration"][0]["rule"]
    assert rule["apply_server_side_encryption_by_default"][0]["sse_algorithm"] == "aws:kms"
    assert not {"acl", "grant", "website", "policy"} & bucket.keys()


# roles

#: Where a role is given, by the attribute that names it.
PLACES = {"folder_id": "folder", "service_account_id": "account", "bucket": "bucket", "symmetric_key_id": "key"}


def granted_roles() -> set[tuple[str, str, str]]:
    """(role, where, to whom) of every resource that gives one."""
    found = set()
    for name, body in RESOURCES.items():
        if "role" not in body:
            continue
        roles = re.findall(r'"([\w.]+)"', body["for_each"]) if body["role"] == "${each.value}" else [body["role"]]
        ((attribute, place),) = [(key, place) for key, place in PLACES.items() if key in body]
        if place in ("account", "bucket"):
            place += " " + re.findall(r'service_account\.(\w+)|this\["(\w+)"]', body[attribute])[0][place == "bucket"]
        members = re.findall(r"(?:local|var)\.(\w+)", str(body.get("members", body.get("member"))))
        assert roles, name
        assert members, name
        found |= {(role, place, member) for role in roles for member in members}
    return found


def test_the_roles_are_those_of_the_readme():
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", README, re.MULTILINE)
    listed = {(role, where.strip(), who) for role, where, whom in rows for who in re.findall(r"`(\w+)`", whom)}
    assert granted_roles() == listed


def test_the_calls_of_the_readme_are_those_of_the_client():
    """Whoever adds a call looks whether the roles allow it."""
    source = (DIRECTORY.parents[1] / "ml_platform" / "dataproc_api.py").read_text()
    called = set(re.findall(r'\b(Cluster|Job|Operation)ServiceStub,\s*"(\w+)"', source))
    called |= {(service, "List") for service in re.findall(r"_pages\(\s*(Cluster|Job)ServiceStub", source)}
    # Which service, and any number of its methods.
    cells = re.findall(r"(Cluster|Job|Operation)Service ((?:[A-Z]\w+(?:, )?)+)", README)
    listed = {(service, method) for service, methods in cells for method in re.findall(r"\w+", methods)}
    assert called
    assert called == listed


def test_no_role_is_wider_than_its_use():
    granted = granted_roles()
    assert not [role for role, _, _ in granted if TOO_WIDE.search(role)]
    assert {where for role, where, _ in granted if role.startswith(("storage.", "kms.", "iam."))} == {
        *("bucket raw", "bucket lake", "bucket artifacts", "key", "account cluster", "account autoscaling"),
    }
    assert ("storage.viewer", "bucket raw", "cluster") in granted
    assert not [where for _, where, who in granted if who == "cluster" and where == "bucket artifacts"]


# formatting


def format_problems(text: str) -> list[str]:
    """What `terraform fmt` would change of indentation, of the alignment of ``=``, and of ends of lines."""
    problems = []
    opened: list[int] = []  # brackets that each line has left open: one level of indentation, however many they are
    neighbours: list[tuple[int, int, int]] = []  # assignments in a row: line, end of the name, column of the "="
    for number, line in enumerate([*text.splitlines(), ""], 1):
        code = re.sub(r'"(?:[^"\\]|\\.)*"', lambda found: "_" * len(found[0]), line)
        code = "" if code.lstrip().startswith("#") else code
        balance = len(re.findall(r"[\[({]", code)) - len(re.findall(r"[])}]", code))
        to_close = max(-balance, 0)
        while to_close and opened:
            closed = min(to_close, opened[-1])
            to_close -= closed
            opened[-1] -= closed
            if not opened[-1]:
                opened.pop()
        if line.strip() and len(line) - len(line.lstrip(" ")) != 2 * len(opened):
            problems.append(f"line {number}: indentation")
        if line != line.rstrip() or "\t" in line:
            problems.append(f"line {number}: blanks at the end, or a tab")
        if balance > 0:
            opened.append(balance)
        assignment = re.match(r"\s*\S+(?=\s*= \S)", code)
        if assignment and balance == 0:
            neighbours.append((number, assignment.end(), code.index("=")))
            continue
        column = max((end for _, end, _ in neighbours), default=0) + 1
        problems += [f"line {place}: = is not aligned" for place, _, at in neighbours if at != column]
        neighbours = []
    if not text.endswith("\n") or text.endswith("\n\n"):
        problems.append("ends with one line feed")
    return problems


@pytest.mark.parametrize("file", [*FILES, *DIRECTORY.glob("tests/*.tftest.hcl")], ids=lambda file: file.name)
def test_formatting(file: Path):
    assert format_problems(file.read_text()) == []


@pytest.mark.parametrize(
    "text",
    ["a = 1\nbb = 2\n", "a {\n   b = 1\n}\n", "a = 1 \n", "a  = 1\n", "a = [\n1,\n]\n", "a = 1", "a {\n\tb = 1\n}\n"],
)
def test_formatting_is_checked(text: str):
    assert format_problems(text)


def terraform(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Terraform in the directory of the configuration."""
    command = ["terraform", f"-chdir={DIRECTORY}", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not shutil.which("terraform"), reason="no terraform here; test_formatting stands in")
def test_terraform_fmt():
    done = terraform("fmt", "-check", "-diff", "-recursive")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(
    not shutil.which("terraform") or not (DIRECTORY / ".terraform").exists(),
    reason="needs the provider: terraform -chdir=deploy/terraform init",
)
def test_terraform_itself():
    """Validates, and runs `tests/`, in which the provider is a mock: resources are planned, nothing is called."""
    for arguments in (("validate", "-no-color"), ("test", "-no-color")):
        done = terraform(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
