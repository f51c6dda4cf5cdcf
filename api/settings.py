"""Everything that can be set about the service, from the environment. Knows names and defaults only."""

from pathlib import Path
from typing import Annotated, Literal

from cryptography.fernet import Fernet
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from merger.errors import SourceError
from merger.storage.stores import location_of

Folders = Annotated[tuple[Path, ...], NoDecode]
Addresses = Annotated[tuple[str, ...], NoDecode]
Keys = Annotated[tuple[SecretStr, ...], NoDecode]

# How a person makes a key for `secret_keys`.
MAKE_KEY = 'python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'


class Settings(BaseSettings):
    """The service's settings; the variable of `database_url` is MERGER_DATABASE_URL."""

    model_config = SettingsConfigDict(
        env_prefix="MERGER_",
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
    max_body: int = Field(default=4 << 20, gt=0, description="Bytes of the largest request.")

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

    @field_validator("secret_keys")
    @classmethod
    def _see_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for i, key in enumerate(keys, 1):
            try:
                Fernet(key.get_secret_value())
            except ValueError:
                raise ValueError(f"key {i} of {len(keys)} is no Fernet key; this makes one: {MAKE_KEY}") from None
        return keys
