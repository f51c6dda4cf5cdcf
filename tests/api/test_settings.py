"""Settings from the environment."""

from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import ValidationError

from api.settings import NodeShape, Settings, read_settings, unknown_in
from merger.errors import RequestError


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


def test_node_shapes_are_numbers_or_quantities(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().node_shapes == ()
    text = '[{"cpus": "3500m", "memory": "64Gi", "count": 3}, {"cpus": 8, "gpus": "1", "memory": 1000000}]'
    monkeypatch.setenv("MERGER_NODE_SHAPES", text)
    small, large = Settings().node_shapes
    assert small == NodeShape(cpus=3.5, gpus=0.0, memory=64 * 1024**3, count=3)
    assert large == NodeShape(cpus=8.0, gpus=1.0, memory=1_000_000, count=None)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("1.5G", 1_500_000_000), ("2Ti", 2 * 1024**4), ("512Ki", 524_288), ("7", 7)]
)
def test_quantities_are_those_of_kubernetes(text: str, bytes_: int) -> None:
    assert NodeShape.model_validate({"cpus": 1, "memory": text}).memory == bytes_


@pytest.mark.parametrize(
    "wrong",
    [
        "many",
        '[{"cpus": 1}]',
        '[{"cpus": 1, "memory": "64GiB"}]',
        '[{"cpus": -1, "memory": 1}]',
        '[{"cpus": 1, "memory": 1, "gpu": 1}]',
        '[{"cpus": 1, "memory": 1, "count": -1}]',
    ],
)
def test_node_shapes_that_are_none_are_refused_by_their_name(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv("MERGER_NODE_SHAPES", wrong)
    with pytest.raises(RequestError) as raised:
        read_settings()
    assert raised.value.where.startswith("MERGER_NODE_SHAPES")


def test_misspelt_settings_are_told_of_with_the_closest() -> None:
    environment = [
        "MERGER_LEASE_SECS",
        "MERGER_LEASE_SECONDS",
        "merger_max_running",
        "MERGER_QQQ",
        "PATH",
        "MERGER_SERVER",
    ]
    assert unknown_in(environment) == [
        "MERGER_LEASE_SECS is no setting; is MERGER_LEASE_SECONDS meant?",
        "MERGER_QQQ is no setting",
    ]


def test_what_kubernetes_tells_of_services_is_not_taken_for_settings() -> None:
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    assert unknown_in([f"MERGER_API_{link}" for link in links]) == []
