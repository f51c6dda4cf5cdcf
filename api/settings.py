"""Everything that can be set about the service, from the environment. Knows names and defaults only."""

import difflib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.fernet import Fernet
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from merger.errors import RequestError, SourceError
from merger.storage.stores import location_of

_PREFIX = "MERGER_"
SAMPLES = Path(__file__).parent / "samples"  # two tiny checkpoints, which everybody may read: see api/smoke.py
_CLIENTS = frozenset({"MERGER_SERVER"})  # what the `merger` command looks for
# What Kubernetes puts into every container for a Service named merger-...
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT\w*)$|_PORT(_\d+_(TCP|UDP|SCTP)\w*)?$")

_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", 1)}


def _amount(value: object) -> object:
    """A number from a quantity as Kubernetes writes it: 3500m, 64Gi. Whatever is none is left to the field."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", value) if isinstance(value, str) else None
    if not found or found[2] not in {"", *_SUFFIXES}:
        return value
    return float(found[1]) * _SUFFIXES.get(found[2], 1.0)


def _bytes(value: object) -> object:
    amount = _amount(value)
    return int(amount) if isinstance(amount, float) else amount


class NodeShape(BaseModel):
    """A kind of node that an autoscaler may add; numbers, or quantities as in Kubernetes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: Annotated[float, BeforeValidator(_amount)] = Field(ge=0)
    gpus: Annotated[float, BeforeValidator(_amount)] = Field(default=0.0, ge=0)
    memory: Annotated[int, BeforeValidator(_bytes)] = Field(ge=0)
    count: int | None = Field(default=None, ge=0, description="The most of them; without it, as many as are needed.")


Folders = Annotated[tuple[Path, ...], NoDecode]
Addresses = Annotated[tuple[str, ...], NoDecode]
Keys = Annotated[tuple[SecretStr, ...], NoDecode]
Shapes = Annotated[tuple[NodeShape, ...], NoDecode]

# How a person makes a key for `secret_keys`.
MAKE_KEY = 'python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'


class Settings(BaseSettings):
    """The service's settings; the variable of `database_url` is MERGER_DATABASE_URL."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # keys are input too
    )

    database_url: str = Field(default="sqlite:///merger.db", description="SQLite, or PostgreSQL in production.")
    api_key: SecretStr | None = Field(default=None, description="A bearer key that is always admitted.")
    url: str = Field(default="http://127.0.0.1:8080", description="Where runners reach this API.")
    ray_url: str = Field(default="http://127.0.0.1:8265", description="The dashboard of the Ray cluster.")
    ray_token: SecretStr | None = Field(default=None, description="The token of the Ray cluster.")
    secret_keys: Keys = Field(
        default=(),
        description="Fernet keys of the named secrets, comma-separated: the first encrypts, all decrypt.",
    )
    python: str = Field(default="python", description="The interpreter of the runners on the cluster.")
    working_folder: Path = Field(default=Path(), description="What relative paths in recipes are relative to.")
    source_roots: Folders = Field(default=(), description="Folders below which models may be read, colon-separated.")
    output_roots: Folders = Field(default=(), description="Folders below which results go, colon-separated.")
    shared_folders: bool = Field(
        default=True,
        description="Whether the API and all nodes see the same files. Where not, results are only pushed, and tasks "
        "of a job run on its runner's node.",
    )
    object_roots: Addresses = Field(
        default=(),
        description="Addresses below which object stores may be used, comma-separated: s3://team/. None without.",
    )

    max_running: int = Field(default=2, ge=1, description="Jobs that run at once.")
    max_attempts: int = Field(default=5, ge=1, description="Attempts before a job fails.")
    queue_seconds: float = Field(default=7 * 86400.0, gt=0, description="How long a job may wait.")
    run_seconds: float = Field(default=86400.0, gt=0, description="How long a job may run, all attempts together.")
    lease_seconds: float = Field(default=15.0, gt=0, description="Silence after which a runner is lost.")
    heartbeat_seconds: float = Field(default=1.0, gt=0, description="How often a runner reports.")
    start_seconds: float = Field(default=120.0, gt=0, description="How long an attempt may take to start.")
    stall_seconds: float = Field(default=900.0, gt=0, description="How long a runner may get no further.")
    cancel_seconds: float = Field(default=3.0, gt=0, description="How long a runner may take to stop by itself.")
    task_cpus: float = Field(default=1.0, gt=0, description="Processors of a shard's task.")
    task_memory: int = Field(default=1 << 30, gt=0, description="Bytes of buffers that a shard's task may use.")
    task_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where a task decomposes matrices; with cuda it asks Ray for a GPU."
    )
    runner_cpus: float = Field(default=0.25, gt=0, description="Processors that a runner reserves.")
    node_shapes: Shapes = Field(
        default=(),
        description="The nodes that an autoscaler may add to the cluster, as JSON: "
        '[{"cpus": 16, "gpus": 0, "memory": "64Gi", "count": 10}].',
    )
    max_body: int = Field(default=4 << 20, gt=0, description="Bytes of the largest request.")
    grace_seconds: float = Field(
        default=20.0, gt=0, description="How long a process that is told to end finishes what it has begun."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What is told on stderr: this and what weighs more."
    )

    @property
    def readable_roots(self) -> tuple[Path, ...]:
        """The folders below which models may be read; none: everywhere."""
        return (*self.source_roots, SAMPLES) if self.source_roots else ()

    @field_validator("source_roots", "output_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("object_roots")
    @classmethod
    def _see_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            try:
                location_of(address)
            except SourceError as error:
                raise ValueError(str(error)) from None
        return addresses

    @field_validator("secret_keys", "object_roots", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("node_shapes", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        try:
            return json.loads(value or "[]") if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"is no JSON: {error}") from None

    @field_validator("secret_keys")
    @classmethod
    def _see_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for i, key in enumerate(keys, 1):
            try:
                Fernet(key.get_secret_value())
            except ValueError:
                raise ValueError(f"key {i} of {len(keys)} is no Fernet key; this makes one: {MAKE_KEY}") from None
        return keys


def read_settings(**own: Any) -> Settings:
    """What the environment says, but for what `own` says. Raises RequestError with the variable's name."""
    try:
        return Settings(**own)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"][1:]))
        where = f"{_PREFIX}{str(first['loc'][0]).upper()}{f', {path}' if path else ''}"
        raise RequestError(first["msg"], where=where) from error


def unknown_in(environment: Collection[str]) -> list[str]:
    """What to tell of variables that look like settings and are none: misspelt ones would be silent otherwise."""
    told = []
    for name in sorted(environment):
        short = name.lower().removeprefix(_PREFIX.lower())
        if short == name.lower() or short in Settings.model_fields or name in _CLIENTS or _SERVICE_LINK.search(name):
            continue
        closest = difflib.get_close_matches(short, Settings.model_fields, 1)
        told.append(f"{name} is no setting" + (f"; is {_PREFIX}{closest[0].upper()} meant?" if closest else ""))
    return told
