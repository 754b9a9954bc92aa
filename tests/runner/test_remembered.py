"""What was measured once is read the next time, whatever happens to the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from paged_backend.runner.remembered import remembered


def test_a_number_is_measured_once_for_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGED_BACKEND_CACHE", str(tmp_path / "cache"))
    measured = iter(range(100))
    assert remembered("bytes", {"rows": 1}, measured.__next__) == 0
    assert remembered("bytes", {"rows": 1}, measured.__next__) == 0
    assert remembered("bytes", {"rows": 2}, measured.__next__) == 1
    assert remembered("others", {"rows": 1}, measured.__next__) == 2
    for path in (tmp_path / "cache" / "measured").iterdir():
        path.write_text("{")
    assert remembered("bytes", {"rows": 1}, measured.__next__) == 3
    assert remembered("bytes", {"rows": 1}, measured.__next__) == 3


def test_a_directory_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAGED_BACKEND_CACHE", str(tmp_path / "file"))
    measured = iter(range(100))
    assert [remembered("bytes", {}, measured.__next__) for _ in range(2)] == [0, 1]
