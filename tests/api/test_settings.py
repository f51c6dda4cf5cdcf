"""Settings from the environment."""

from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import ValidationError

from api.settings import Settings


def test_folders_are_separated_by_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_SOURCE_ROOTS", "/a:/b c:")
    monkeypatch.setenv("MERGER_LEASE_SECONDS", "3.5")
    settings = Settings()
    assert settings.source_roots == (Path("/a"), Path("/b c"))
    assert settings.lease_seconds == 3.5


def test_addresses_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().object_roots == ()
    monkeypatch.setenv("MERGER_OBJECT_ROOTS", "s3://team/, gs://other/models,")
    assert Settings().object_roots == ("s3://team/", "gs://other/models")


@pytest.mark.parametrize("wrong", ["team", "s3://", "s3://*/"])
def test_addresses_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("MERGER_OBJECT_ROOTS", f"s3://team/,{wrong}")
    with pytest.raises(ValidationError, match="object_roots"):
        Settings()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_API_KEY", "mk_secret")
    monkeypatch.setenv("MERGER_RAY_TOKEN", "ray_secret")
    shown = repr(Settings())
    assert not any(text in shown for text in ("mk_secret", "ray_secret"))


@pytest.mark.parametrize(("name", "value"), [("MAX_RUNNING", "0"), ("LEASE_SECONDS", "-1"), ("TASK_CPUS", "many")])
def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"MERGER_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_keys_of_secrets_are_separated_by_commas_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [Fernet.generate_key().decode() for _ in range(2)]
    monkeypatch.setenv("MERGER_SECRET_KEYS", f"{keys[0]}, {keys[1]},")
    settings = Settings()
    assert [key.get_secret_value() for key in settings.secret_keys] == keys
    assert not any(key in repr(settings) for key in keys)
    monkeypatch.setenv("MERGER_SECRET_KEYS", "")
    assert Settings().secret_keys == ()


@pytest.mark.parametrize("bad", ["short", "ünicode", "x" * 44, "A" * 40])
def test_a_bad_key_is_refused_with_its_place_and_a_remedy_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    good = Fernet.generate_key().decode()
    monkeypatch.setenv("MERGER_SECRET_KEYS", f"{good},{bad}")
    with pytest.raises(ValidationError, match="key 2 of 2 is no Fernet key; this makes one: python -c") as raised:
        Settings()
    assert good not in str(raised.value)
    assert bad not in str(raised.value)
