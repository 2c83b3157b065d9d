"""Tests with clients that are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients import executable, package


@pytest.mark.parametrize("ask", [lambda: package("no_such_client"), lambda: executable(Path("no/such/node"))])
def test_a_client_that_is_missing_skips_here_and_fails_in_ci(ask: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(ask)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make install-clients"):
        ask()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make install-clients"):
        ask()


def test_a_client_that_is_broken_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_client.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        package("broken_client")
