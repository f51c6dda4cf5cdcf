"""Settings from the environment."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from api.settings import Settings


def test_folders_are_separated_by_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_SOURCE_ROOTS", "/a:/b c:")
    monkeypatch.setenv("MERGER_LEASE_SECONDS", "3.5")
    settings = Settings()
    assert settings.source_roots == (Path("/a"), Path("/b c"))
    assert settings.lease_seconds == 3.5


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_API_KEY", "mk_secret")
    monkeypatch.setenv("MERGER_RAY_TOKEN", "ray_secret")
    assert "secret" not in repr(Settings())


@pytest.mark.parametrize(("name", "value"), [("MAX_RUNNING", "0"), ("LEASE_SECONDS", "-1"), ("TASK_CPUS", "many")])
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"MERGER_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()
