"""The archive of the learners' library: unpacked once, whole, and only where no other user may write."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spark_jobs.training import library

pytestmark = pytest.mark.images


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where archives are unpacked."""
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def archive(directory, content="VERSION = 1\n"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as members:
        members.writestr("a_library/__init__.py", content)
        members.writestr("a_library.libs/x.so", "binary")
    path = directory / f"a_library-1-{hashlib.sha256(buffer.getvalue()).hexdigest()}.zip"
    path.write_bytes(buffer.getvalue())
    return path


def test_an_archive_is_unpacked_once_for_all_processes(tmp_path):
    path = archive(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        directories = set(pool.map(library.unpacked, [path] * 16))
    (directory,) = map(Path, directories)
    assert (directory / "a_library" / "__init__.py").read_text() == "VERSION = 1\n"
    # Nothing half done is left beside it.
    assert list(directory.parent.iterdir()) == [directory]
    before = (directory / "a_library.libs" / "x.so").stat()
    assert library.unpacked(path) == str(directory)
    assert (directory / "a_library.libs" / "x.so").stat().st_mtime_ns == before.st_mtime_ns
    assert library.unpacked(archive(tmp_path, "VERSION = 2\n")) != str(directory)


def test_an_archive_that_does_not_match_its_name_is_refused(tmp_path):
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(library.LibraryError, match="is damaged"):
        library.unpacked(path)
    path.unlink()
    with pytest.raises(library.LibraryError, match="did not bring"):
        library.unpacked(path)
    with pytest.raises(library.LibraryError, match="does not end in the SHA-256"):
        library.unpacked(tmp_path / "a_library.zip")


def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    """A user who made the directory first could plant code in it."""
    own = tmp_path / f"ml-platform-{os.getuid()}"
    own.mkdir(mode=0o700)
    own.chmod(0o777)
    with pytest.raises(library.LibraryError, match="not a directory of this user alone"):
        library.unpacked(archive(tmp_path))
    own.rmdir()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(library.LibraryError, match="not a directory of this user alone"):
        library.unpacked(archive(tmp_path))
