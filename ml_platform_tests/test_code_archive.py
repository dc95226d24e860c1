"""The code that a cluster gets: complete, the same bytes for the same code, and usable as it is."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spark_jobs
from ml_platform.code_archive import ARCHIVE_NAME, build_archive, content_hash, main_file

JOBS = ("clean_transactions", "build_features", "train_model", "verify_model")
PACKAGE = Path(spark_jobs.__file__).parent


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another copy of the package, which the archive is then made of."""
    directory = tmp_path / "spark_jobs"
    shutil.copytree(PACKAGE, directory)
    monkeypatch.setattr(spark_jobs, "__file__", str(directory / "__init__.py"))
    return directory


def test_holds_every_module_and_nothing_else():
    with zipfile.ZipFile(io.BytesIO(build_archive())) as archive:
        assert archive.testzip() is None
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert contents == {f"spark_jobs/{path.name}": path.read_bytes() for path in PACKAGE.glob("*.py")}
    assert "spark_jobs/__init__.py" in contents


def test_the_same_code_gives_the_same_bytes(copy: Path):
    original = build_archive()
    # Another time, other permissions, another order in the directory, leavings of an interpreter and an editor.
    for path in sorted(copy.glob("*.py"), reverse=True):
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
    code = "from ml_platform.code_archive import *; print(content_hash(build_archive()))"
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
