"""The Terraform configuration beside its own tests (deploy/terraform/tests), as far as no provider is needed.

What it prints is an environment that the platform takes; nothing is open to the world; no role is wider than its use.
CI's job `terraform` has the provider: `terraform validate` and `terraform test`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest
from hcl2 import SerializationOptions

from ml_platform.settings import ClusterSettings, Settings, load_cluster_settings, load_settings

DIRECTORY = Path(__file__).parent.parent / "deploy" / "terraform"
OPTIONS = SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)

#: Roles that are wider than anything here needs.
TOO_WIDE = re.compile(r"(^|\.)(admin|owner)$|^(editor|viewer|compute\..*|resource-manager\..*)$")


def blocks(kind: str) -> dict[str, Any]:
    """All blocks of one kind by label, resources by ``type.name``; expressions are texts that begin with ``${``."""
    found: dict[str, Any] = {}
    for file in sorted(DIRECTORY.glob("*.tf")):
        for block in hcl2.loads(file.read_text(), serialization_options=OPTIONS).get(kind, []):
            for label, body in block.items():
                found |= (
                    {f"{label}.{name}": inner for name, inner in body.items()} if kind == "resource" else {label: body}
                )
    return found


VARIABLES, RESOURCES, LOCALS = blocks("variable"), blocks("resource"), blocks("locals")


def ingress(name: str) -> list[dict[str, Any]]:
    """Rules of a security group, those of ``dynamic`` blocks included."""
    body = RESOURCES[f"yandex_vpc_security_group.{name}"]
    dynamic = [block["ingress"]["content"] for block in body.get("dynamic", []) if "ingress" in block]
    return body.get("ingress", []) + [rule for content in dynamic for rule in content]


def test_the_environment_is_one_that_the_platform_takes(monkeypatch: pytest.MonkeyPatch):
    given = {"ML_PLATFORM_DEPLOYMENT_NAME": VARIABLES["name"]["default"], "YC_ZONE": VARIABLES["zone"]["default"]}
    for name, text in LOCALS["environment"].items():
        text_of_local = re.sub(r"^\$\{local\.(\w+)}$", lambda found: LOCALS[found[1]], text)
        monkeypatch.setenv(name, given.get(name) or re.sub(r"\$\{[^}]+}", "abc123", text_of_local))
    settings, cluster = load_settings(), load_cluster_settings()
    assert (settings.deployment, settings.deployment_name) == ("yandex", "ml-platform")
    assert settings.raw_uri == "s3://abc123/transactions"
    assert settings.lake_uri == "s3://abc123/lake"
    assert LOCALS["environment"]["AWS_ENDPOINT_URL_S3"] == "https://storage.yandexcloud.net"
    assert cluster.zone == "ru-central1-a"
    assert cluster.security_group_ids == ["abc123"]


def test_every_printed_variable_is_read_and_every_needed_one_is_printed():
    read = {field.alias for kind in (Settings, ClusterSettings) for field in kind.model_fields.values()}
    by_boto3 = {"AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    compose = (DIRECTORY.parent / "compose.yaml").read_text()
    by_compose, needed_by_compose = (set(re.findall(rf"\$\{{(\w+){kind}", compose)) for kind in ("", r":\?"))
    printed = LOCALS["environment"].keys() | LOCALS["secrets"].keys()
    needed = {field.alias for field in ClusterSettings.model_fields.values() if field.is_required()}
    assert printed <= read | by_boto3 | by_compose
    assert needed | by_boto3 | needed_by_compose | {"YC_ZONE", "YC_SECURITY_GROUP_IDS"} <= printed


def test_state_and_variables_stay_out_of_the_repository():
    ignored = (DIRECTORY / ".gitignore").read_text().split()
    assert {"*.tfstate", "*.tfstate.*", "*.tfvars", ".terraform/"} <= set(ignored)


def test_nothing_is_open_to_the_world():
    (rule,) = ingress("cluster")
    assert rule["predefined_target"] == "self_security_group"
    assert "v4_cidr_blocks" not in rule
    # The service makes no cluster without these.
    egress = RESOURCES["yandex_vpc_security_group.cluster"]["egress"]
    assert [(rule["protocol"], rule.get("port")) for rule in egress] == [("ANY", None), ("TCP", 443), ("UDP", 123)]
    (ssh,) = ingress("vm")
    assert ssh["port"] == 22
    assert not re.search(r"0\.0\.0\.0/0|::/0", str(ssh))
    assert len([name for name in RESOURCES if name.startswith("yandex_vpc_security_group.")]) == 2
    defaults = {name: VARIABLES[name]["default"] for name in ("create_vm", "vm_public_ip", "vm_ssh_cidr_blocks")}
    assert defaults == {"create_vm": False, "vm_public_ip": False, "vm_ssh_cidr_blocks": []}


def test_buckets_are_private_encrypted_and_versioned():
    (bucket,) = [body for name, body in RESOURCES.items() if name.startswith("yandex_storage_bucket.")]
    assert bucket["anonymous_access_flags"] == [{"read": False, "list": False, "config_read": False}]
    assert bucket["versioning"] == [{"enabled": True}]
    assert bucket["force_destroy"] is False
    (rule,) = bucket["server_side_encryption_configuration"][0]["rule"]
    assert rule["apply_server_side_encryption_by_default"][0]["sse_algorithm"] == "aws:kms"
    assert not {"acl", "grant", "website", "policy"} & bucket.keys()


def granted_roles() -> set[tuple[str, str, str]]:
    """(role, where, to whom) of every resource that gives one."""
    places = {"folder_id": "folder", "service_account_id": "account", "bucket": "bucket", "symmetric_key_id": "key"}
    found = set()
    for name, body in RESOURCES.items():
        if "role" not in body:
            continue
        roles = re.findall(r'"([\w.]+)"', body["for_each"]) if body["role"] == "${each.value}" else [body["role"]]
        ((attribute, place),) = [(key, place) for key, place in places.items() if key in body]
        if place in ("account", "bucket"):
            place += " " + re.findall(r'service_account\.(\w+)|this\["(\w+)"]', body[attribute])[0][place == "bucket"]
        members = re.findall(r"(?:local|var)\.(\w+)", str(body.get("members", body.get("member"))))
        assert roles, name
        assert members, name
        found |= {(role, place, member) for role in roles for member in members}
    return found


def test_no_role_is_wider_than_its_use():
    granted = granted_roles()
    assert not [role for role, _, _ in granted if TOO_WIDE.search(role)]
    assert {where for role, where, _ in granted if role.startswith(("storage.", "kms.", "iam."))} == {
        *("bucket raw", "bucket lake", "bucket artifacts", "key", "account cluster", "account autoscaling"),
    }
    assert ("storage.viewer", "bucket raw", "cluster") in granted
    assert not [where for _, where, who in granted if who == "cluster" and where == "bucket artifacts"]


@pytest.mark.skipif(not shutil.which("terraform"), reason="no terraform here")
def test_terraform_fmt():
    command = ["terraform", f"-chdir={DIRECTORY}", "fmt", "-check", "-diff", "-recursive"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
