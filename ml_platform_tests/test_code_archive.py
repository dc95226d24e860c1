"""The code that a cluster gets: complete, the same bytes for the same code, and usable as it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import spark_jobs
from ml_platform.spark import code_archive
from ml_platform.spark.code_archive import (
    ARCHIVE_NAME,
    CodeArchiveError,
    build_archive,
    content_hash,
    library_archive,
    main_file,
)

JOBS = ("clean_transactions", "build_features", "train_model")
PACKAGE = Path(spark_jobs.__file__).parent


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another copy of the package, which the archive is then made of."""
    directory = tmp_path / "spark_jobs"
    shutil.copytree(PACKAGE, directory)
    monkeypatch.setattr(spark_jobs, "__file__", str(directory / "__init__.py"))
    return directory


def test_the_archive_holds_every_module_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(build_archive())) as archive:
        assert archive.testzip() is None
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert contents == {
        path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes() for path in PACKAGE.rglob("*.py")
    }
    assert "spark_jobs/__init__.py" in contents


def test_the_same_code_gives_the_same_bytes(copy: Path):
    original = build_archive()
    # Other times, permissions and order in the directory, and files of an interpreter and an editor.
    for path in sorted(copy.rglob("*.py"), reverse=True):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (2e9, 2e9))
        path.chmod(0o600)
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__" / "x.pyc").write_bytes(b"x")
    (copy / "runtime.py~").write_text("old")
    assert build_archive() == original
    assert content_hash(build_archive()) == content_hash(original)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_another_process_gives_the_same_bytes(hash_seed: str):
    code = "from ml_platform.spark.code_archive import *; print(content_hash(build_archive()))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == content_hash(build_archive())


def test_changed_code_gets_another_name(copy: Path):
    before = content_hash(build_archive())
    with (copy / "runtime.py").open("a") as file:
        file.write("# changed\n")
    assert content_hash(build_archive()) != before
    # The name is part of URIs and of object keys.
    assert content_hash(build_archive()).isalnum()


@pytest.mark.parametrize("job", JOBS)
def test_a_main_file_finds_the_rest_in_the_archive(tmp_path: Path, job: str):
    (tmp_path / ARCHIVE_NAME).write_bytes(build_archive())
    (tmp_path / f"{job}.py").write_bytes(main_file(job))
    # As spark-submit does: the file is the program, the archive is on the path, and nothing else of this project.
    done = subprocess.run(
        [sys.executable, f"{job}.py", "--help"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / ARCHIVE_NAME), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--request" in done.stdout
    assert "--report" in done.stdout


# --- The learners' library


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another kind of machine than clusters have, with the library installed in the same version."""
    monkeypatch.setattr(code_archive, "this_platform", lambda: ("Darwin", "arm64"))
    monkeypatch.setattr(code_archive, "version", lambda name: importlib.metadata.version("xgboost-cpu"))
    library_archive.cache_clear()
    yield
    library_archive.cache_clear()


def test_the_library_is_whole_and_named_after_its_content():
    name, content = library_archive()
    assert name == f"xgboost-{importlib.metadata.version('xgboost-cpu')}-{hashlib.sha256(content).hexdigest()}.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert {"xgboost/__init__.py", "xgboost/VERSION", "xgboost/lib/libxgboost.so"} <= set(names)
    assert any(part.startswith("xgboost_cpu.libs/libgomp") for part in names)
    assert not [part for part in names if part.endswith(".pyc")]


def test_a_process_that_has_only_the_archive_loads_the_library_from_it(tmp_path: Path):
    """As a task does, in a Python without XGBoost in its path."""
    name, content = library_archive()
    (tmp_path / name).write_bytes(content)
    code = (
        "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "from spark_jobs.training import library; from pathlib import Path\n"
        f"directory = library.unpacked(Path({name!r}))\n"
        "import importlib.util as util; assert util.find_spec('xgboost') is None\n"
        f"sys.path = [directory, {str(Path(np.__file__).parents[1])!r}, *sys.path]\n"
        "import xgboost; print(xgboost.__file__)"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"{tmp_path}/ml-platform-"), done.stderr


def test_other_machines_fetch_the_same_library(other_machine: None):
    fetched = library_archive()
    library_archive.cache_clear()
    with mock.patch.object(code_archive, "this_platform", return_value=code_archive.CLUSTER_PLATFORM):
        assert library_archive() == fetched


def test_a_library_that_cannot_be_fetched_is_named(other_machine: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_archive, "version", lambda name: "0.0.1")
    with pytest.raises(
        CodeArchiveError, match=r"need xgboost-cpu==0\.0\.1 for Linux .*\(Darwin arm64\).* cannot download: "
    ):
        library_archive()
