"""deploy/ and .ci/run without a Docker engine, a database or systemd; test_stack.py runs the services."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()

#: ${NAME}, ${NAME:-default}, ${NAME:?message}
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")
SECRET = re.compile(r"PASSWORD|SECRET(?!S_DIRECTORY)|TOKEN|CREDENTIALS|ACCESS_KEY|WEBHOOK")
MLFLOW = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://mlflow@db.example:5432/mlflow",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://example-artifacts/mlflow",
}


def texts(node: Any) -> Iterator[str]:
    """All values of a parsed file that are texts."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with the environment of the tests and `environment`."""
    return subprocess.run(
        [str(word) for word in command],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


# compose.yaml


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_checked_limited_and_unprivileged(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+[\w.-]*$", VARIABLE.sub(r"\3", service["image"]))
    assert service["restart"] == "unless-stopped"
    # An init that runs as root without CAP_KILL cannot signal another user's process: the container would be killed.
    assert service["init"] is ("SETUID" not in service.get("cap_add", []))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "network_mode", "pid", "user", "cap_add"} & service.keys() or name == "postgres"
    limits = service["deploy"]["resources"]["limits"]
    assert float(VARIABLE.sub(r"\3", limits["cpus"])) > 0
    assert re.fullmatch(r"\d+[mg]", VARIABLE.sub(r"\3", limits["memory"]))
    assert limits["pids"] > 0
    assert "pids_limit" not in service, "Compose 2 refuses it beside limits"
    check = service["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    assert service["logging"]["options"]["max-size"]


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"metrics", "mlflow", "scorer", "webserver"}
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert SERVICES["postgres"]["networks"] == ["database"]


def test_the_code_of_a_model_reaches_mlflow_alone() -> None:
    """The scorer runs it, and whoever reaches Dagster's code server or UI can run code with its keys."""
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    assert [name for name in SERVICES if networks[name] & networks["scorer"]] == ["mlflow", "scorer"]


def test_no_secret_has_a_value_or_a_default() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name):
                assert name.endswith("_FILE"), name
                assert value.removeprefix("/run/secrets/") in service["secrets"], name
    for text in texts(COMPOSE):
        assert not re.search(r"//[^/@\s]*:[^/@\s]*@", text), text  # no password in an address
        assert not any(SECRET.search(name) for name, _, _ in VARIABLE.findall(text)), text
    assert all(secret.keys() == {"file"} for secret in COMPOSE["secrets"].values())
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == COMPOSE["secrets"].keys()


def test_a_service_gets_only_the_passwords_that_it_needs() -> None:
    secrets = {name: set(service.get("secrets", [])) for name, service in SERVICES.items()}
    assert "mlflow_password" not in secrets["code"] | secrets["daemon"] | secrets["webserver"]
    assert "dagster_password" not in secrets["mlflow"]
    assert secrets["scorer"] == set()  # it runs code that comes with a model
    assert all("postgres_password" not in names for name, names in secrets.items() if name != "postgres")
    assert "env_file" not in {
        key for name, service in SERVICES.items() if name not in ("code", "metrics") for key in service
    }


def test_every_variable_is_in_the_example_with_its_default() -> None:
    example = dict(re.findall(r"^#?([A-Z_0-9]+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    variables = [found for text in texts(COMPOSE) for found in VARIABLE.findall(text)]
    expected = {name: "" if kind == ":?" else default for name, kind, default in variables}
    assert expected.items() <= example.items()
    assert not any(SECRET.search(name) for name in example)


def test_secrets_stay_out_of_the_repository() -> None:
    assert {".env", "secrets/"} <= set((DEPLOY / ".gitignore").read_text().split())


def test_browsers_find_mlflow_and_a_restarted_container_finds_its_runs() -> None:
    """What test_stack.py changes or leaves out."""
    code, mlflow = SERVICES["code"], SERVICES["mlflow"]
    # MLflow refuses host names that it was not given.
    address = code["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    allowed = VARIABLE.sub(r"\3", mlflow["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"])
    assert address in allowed.split(",")
    assert code["environment"]["MLFLOW_UI_URL"] == f"http://{mlflow['ports'][0].removesuffix(':5000')}"
    for service in (code, mlflow, SERVICES["webserver"]):
        assert service["command"][service["command"].index("--host") + 1] == "0.0.0.0"
    # Runs of a container that died are recognised by its host name.
    assert code["hostname"]
    # Stopping reaches the runs, which are not the process that init started, and leaves them time.
    assert code["environment"]["TINI_KILL_PROCESS_GROUP"] == "1"
    assert code["stop_grace_period"] == "2m"


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    found = subprocess.run(["sh", ROOT / "scripts/docker_compose.sh"], check=False, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr)
    compose = found.stdout.strip()
    for name in ("compose.yaml", "create_databases.sh"):
        shutil.copy(DEPLOY / name, tmp_path)
    example = (DEPLOY / ".env.example").read_text()
    (tmp_path / ".env").write_text(example)
    command = (compose, "-f", tmp_path / "compose.yaml", "config", "--quiet")
    refused = run(*command)
    assert refused.returncode != 0
    assert re.search(r"set it to s3://bucket/prefix in deploy/\.env", refused.stderr)
    filled = re.sub(r"^([A-Z_]+)=$", r"\1=s3://example/prefix", example, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(filled)
    accepted = run(*command)
    assert accepted.returncode == 0, accepted.stderr


def test_one_variable_turns_json_logs_off() -> None:
    format_of_all = "${ML_PLATFORM_LOG_FORMAT:-json}"
    for name in ("code", "daemon", "webserver"):
        assert f"--log-format={format_of_all}" in SERVICES[name]["command"]
    for name in ("code", "mlflow"):
        assert SERVICES[name]["environment"]["ML_PLATFORM_LOG_FORMAT"] == format_of_all


# Dockerfile, which hadolint checks in `make lint`


def test_the_image_is_of_pinned_packages_and_holds_no_secret() -> None:
    assert "-c constraints.txt" in DOCKERFILE
    assert not re.search(r"^(ENV|ARG) .*(PASSWORD|SECRET|TOKEN|KEY)", DOCKERFILE, re.MULTILINE)


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().split("*\n", 1)
    allowed = set(re.findall(r"^!(\S+)$", rules[1], re.MULTILINE))
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    # Of a directory that the build sees, some steps take only the files that they need.
    assert {next((path for path in allowed if source.startswith(f"{path}/")), source) for source in copied} == allowed
    assert all((ROOT / path).exists() for path in copied)


def test_the_base_image_is_pinned_to_one_release() -> None:
    bases = [base for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if ":" in base]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases[0])


def test_an_upgrade_leaves_the_image_of_the_old_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {service["image"] for name, service in SERVICES.items() if name != "postgres"}
    assert images == {f"ml-platform:${{ML_PLATFORM_IMAGE_TAG:-{version}}}"}


def copied_by_stage() -> dict[str, set[str]]:
    """What the stages of the build copy from the clone, by the name of the stage; the last one has none."""
    return {
        name: {word for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]}
        for name, text in re.findall(
            r"^FROM \S+(?: AS (\w+))?\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL
        )
    }


def test_a_change_of_the_code_installs_no_packages_again() -> None:
    assert [name for name, sources in copied_by_stage().items() if "ml_platform" in sources] == ["code"]


def test_the_class_archive_is_made_of_files_that_the_build_has_copied() -> None:
    sources = copied_by_stage()["spark"]
    # In a process of its own, because this one has imported everything.
    statement = "import sys, ml_platform.spark.class_archive, ml_platform.spark.s3a; print(*sys.modules)"
    modules = [name for name in run(sys.executable, "-c", statement).stdout.split() if name.startswith("ml_platform.")]
    assert len(modules) > 4
    for module in modules:
        path = Path(module.replace(".", "/"))
        file = path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")
        assert {str(file), str(file.parent)} & sources, file


# Dagster


def test_queue_monitoring_and_retention_are_those_of_the_clone() -> None:
    deployed, local = (yaml.safe_load((directory / "dagster.yaml").read_text()) for directory in (DEPLOY, ROOT))
    for key in ("telemetry", "nux", "concurrency", "python_logs", "run_monitoring", "run_retries", "retention"):
        assert deployed[key] == local[key], key


def test_the_code_location_has_the_name_and_module_of_the_clone() -> None:
    """Sensors are known by the name of their location: one turned off there is turned off here."""
    deployed, local = (
        yaml.safe_load((directory / "workspace.yaml").read_text())["load_from"][0] for directory in (DEPLOY, ROOT)
    )
    assert deployed["grpc_server"]["location_name"] == local["python_module"]["location_name"]
    assert SERVICES["code"]["command"][-1] == local["python_module"]["module_name"]


# Scripts, which shellcheck checks in `make lint`


@pytest.mark.parametrize(
    ("lacks", "images_status", "last"),
    [
        ("", 0, "== all checks passed"),
        ("compose", 0, "== all other checks passed; DOCKER COMPOSE DID NOT CHECK deploy/compose.yaml"),
        ("prometheus", 0, "== all other checks passed; PROMETHEUS DID NOT CHECK deploy/prometheus"),
        ("", 3, "== all other checks passed; THE CLUSTER'S IMAGES WERE NOT TESTED"),
        ("compose", 3, "deploy/compose.yaml: it is not available here; THE CLUSTER'S IMAGES WERE NOT TESTED"),
        ("compose", 1, "== scripts/test_images.sh"),
    ],
)
def test_ci_names_last_what_it_did_not_check(tmp_path: Path, lacks: str, images_status: int, last: str) -> None:
    programs = tmp_path / "bin"
    for directory in (".ci", "bin", "scripts"):
        (tmp_path / directory).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    for name in ("bash", "cat", "dirname", "mktemp", "nice", "rm", "sh"):
        (programs / name).symlink_to(str(shutil.which(name)))
    # With no way to install it, the machine has Prometheus or has not.
    for name, status in {"make": 0, "apt-get": 1, "prometheus": 0}.items():
        if name != lacks:
            (programs / name).write_text(f"#!/bin/sh\nexit {status}\n")
            (programs / name).chmod(0o755)
    (tmp_path / "scripts/java.sh").touch()
    (tmp_path / "scripts/docker_compose.sh").write_text(f"exit {int(lacks == 'compose')}\n")
    (tmp_path / "scripts/test_images.sh").write_text(f"exit {images_status}\n")
    done = run(tmp_path / ".ci/run", PATH=str(programs))
    assert done.returncode == (1 if images_status == 1 else 0), done.stderr
    assert last in done.stdout.splitlines()[-1]


def test_entrypoint_passes_on_the_password_of_a_file(tmp_path: Path) -> None:
    password = "a'b \"c$d\\"
    file = tmp_path / "password"
    file.write_text(password + "\n")
    show = ("sh", "-c", 'printf %s "$PGPASSWORD:${PGPASSWORD_FILE-unset}"')
    assert run(DEPLOY / "entrypoint.sh", *show, PGPASSWORD_FILE=str(file)).stdout == f"{password}:unset"
    assert run(DEPLOY / "entrypoint.sh", *show, PGPASSWORD="own").stdout == "own:unset"


@pytest.mark.parametrize(
    ("environment", "words", "says"),
    [
        ({"PGPASSWORD_FILE": "/nowhere"}, ["true"], "make that file readable"),
        ({"PGPASSWORD_FILE": "/dev/null"}, ["true"], "is empty"),
        ({"PGPASSWORD_FILE": "/dev/null", "PGPASSWORD": "secret"}, ["true"], "not both"),
        ({}, [], "which command"),
    ],
)
def test_entrypoint_refuses(environment: dict[str, str], words: list[str], says: str) -> None:
    done = run(DEPLOY / "entrypoint.sh", *words, **environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert "secret" not in done.stderr


def test_entrypoint_translates_the_log_format_text() -> None:
    words = ("a b", "--log-format=text", "--log-format=json", "text", "")
    done = run(DEPLOY / "entrypoint.sh", "printf", "<%s>", *words)
    assert done.stdout == "<a b><--log-format=colored><--log-format=json><text><>"


def test_databases_need_their_passwords(tmp_path: Path) -> None:
    (tmp_path / "dagster_password").touch()
    done = run(DEPLOY / "create_databases.sh", SECRETS_DIRECTORY=str(tmp_path))
    assert done.returncode == 1
    assert "dagster_password is empty" in done.stderr


def mlflow_server(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Let the script write its files below `directory`."""
    return run(DEPLOY / "mlflow_server.sh", DESTDIR=str(directory), **environment)


def shell_reads(file: Path, name: str) -> str:
    """A variable of a file, as a shell reads it."""
    return run("sh", "-c", f'. "$0"; printf %s "${name}"', file).stdout


def test_mlflow_server_quotes_the_password_and_changes_only_what_is_given(tmp_path: Path) -> None:
    password = "a'b \"c$d`e\\ %f"
    done = mlflow_server(tmp_path, PGPASSWORD=password, **MLFLOW)
    assert done.returncode == 0, done.stderr
    settings, unit = tmp_path / "etc/mlflow/server.env", (tmp_path / "etc/systemd/system/mlflow.service").read_text()
    assert shell_reads(settings, "PGPASSWORD") == password
    assert password not in unit + done.stderr
    for line in ("EnvironmentFile=/etc/mlflow/server.env", "--host 127.0.0.1", "DynamicUser=yes"):
        assert line in unit
    settings.chmod(0o644)
    assert mlflow_server(tmp_path, MLFLOW_PORT="5001").returncode == 0
    assert settings.stat().st_mode & 0o777 == 0o600
    assert shell_reads(settings, "MLFLOW_PORT") == "5001"
    assert shell_reads(settings, "PGPASSWORD") == password


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow:secret@db/mlflow"}, "takes postgresql+psycopg2://"),
        ({"MLFLOW_BACKEND_STORE_URI": "sqlite:///mlflow.db"}, "takes postgresql+psycopg2://"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "/tmp/artifacts"}, "set MLFLOW_ARTIFACTS_DESTINATION"),
        ({"MLFLOW_PORT": "0"}, "MLFLOW_PORT takes a port"),
        ({"MLFLOW_PORT": "5000; reboot"}, "MLFLOW_PORT takes a port"),
        ({"MLFLOW_PORT": "65536"}, "MLFLOW_PORT takes a port"),
        ({"PGPASSWORD": "secret\nUser=root"}, "PGPASSWORD takes one line"),
        ({"PGPASSWORD": "secret", "PGPASSWORD_FILE": "/dev/null"}, "not both"),
    ],
)
def test_mlflow_server_refuses(tmp_path: Path, change: dict[str, str], says: str) -> None:
    done = mlflow_server(tmp_path, **MLFLOW | change)
    assert done.returncode == 1
    assert says in done.stderr
    assert "secret" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_mlflow_database_needs_an_address() -> None:
    done = run(sys.executable, DEPLOY / "mlflow_database.py")
    assert done.returncode == 1
    assert "set MLFLOW_BACKEND_STORE_URI" in done.stderr


def test_an_upgrade_starts_nothing_before_the_migration() -> None:
    """`run` would start the services that the command's own depends on, with the new code."""
    section = (DEPLOY / "README.md").read_text().partition("\n## Upgrade\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^\$ (docker compose run.*)$", section, re.MULTILINE)
    assert len(commands) == 4
    assert all(" --no-deps " in command for command in commands)


def test_the_commands_of_the_installation_replace_no_file(tmp_path: Path) -> None:
    section = (DEPLOY / "README.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    (block,) = (block for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL) if "secrets/" in block)
    commands = re.sub(r"^\$ ", "", block, flags=re.MULTILINE)
    deploy, programs = tmp_path / "deploy", tmp_path / "bin"
    for directory in (deploy, programs):
        directory.mkdir()
    shutil.copy(DEPLOY / ".env.example", deploy)
    (programs / "docker").symlink_to(str(shutil.which("true")))

    def type_in(*answers: str) -> dict[str, tuple[bytes, int]]:
        done = subprocess.run(
            ["bash", "-c", commands],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            input="".join(f"{answer}\n" for answer in answers),
            check=True,
            capture_output=True,
            text=True,
        )
        assert "very-secret" not in done.stdout + done.stderr
        paths = [deploy / ".env", *(deploy / "secrets").iterdir()]
        return {path.name: (path.read_bytes(), path.stat().st_mode & 0o777) for path in paths}

    first = type_in("key", "very-secret")
    assert first.keys() == {".env", *COMPOSE["secrets"]}
    assert first["aws_credentials"][0].decode().splitlines()[1:] == [
        "aws_access_key_id = key",
        "aws_secret_access_key = very-secret",
    ]
    passwords = [content for name, (content, _) in first.items() if name.endswith("_password")]
    assert len({*passwords}) == 3
    assert all(len(password.strip()) == 48 for password in passwords)
    assert {mode for name, (_, mode) in first.items() if name != ".env"} == {0o444}
    assert (deploy / "secrets").stat().st_mode & 0o777 == 0o700
    (deploy / ".env").write_text("edited")
    assert type_in("other key", "other secret") == first | {".env": (b"edited", first[".env"][1])}
