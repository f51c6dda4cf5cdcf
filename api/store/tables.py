"""The tables of the database: what is searched for stands in columns, the rest of a value in a JSON body."""

from typing import Any, ClassVar

from sqlalchemy import JSON, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The root of the tables."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON, float: Float(53), str: String(255)}


class JobRow(Base):
    """A job as `api.jobs.Job` has it, without its attempts."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_queue", "state", "priority", "id"),
        Index("jobs_by_project", "project", "id"),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    project: Mapped[str]
    state: Mapped[str] = mapped_column(String(16))
    method: Mapped[str]
    priority: Mapped[int]
    labels: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    queued_at: Mapped[float]
    not_before: Mapped[float]
    expires_at: Mapped[float]
    events: Mapped[int]
    log_lines: Mapped[int]
    body: Mapped[dict[str, Any]]


class AttemptRow(Base):
    """An attempt as `api.jobs.Attempt` has it."""

    __tablename__ = "attempts"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    lease: Mapped[float]
    body: Mapped[dict[str, Any]]


class EventRow(Base):
    """Something that happened to a job; rows are only ever added."""

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float]
    kind: Mapped[str] = mapped_column(String(32))
    attempt: Mapped[int]
    data: Mapped[dict[str, Any]]


class LogRow(Base):
    """A line that a runner wrote."""

    __tablename__ = "logs"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float]
    attempt: Mapped[int]
    text: Mapped[str] = mapped_column(Text)


class RequestRow(Base):
    """A client's own name for a request, so that sending it twice makes one job."""

    __tablename__ = "requests"

    project: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    at: Mapped[float]


class LeaseRow(Base):
    """Which process of the service does what only one may do."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    until: Mapped[float]


class SecretRow(Base):
    """A named secret of a project: what the keys of the settings make of it, never the value."""

    __tablename__ = "secrets"

    project: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    ciphertext: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float]
    updated_at: Mapped[float]


class KeyRow(Base):
    """A client's key, by its SHA-256 digest."""

    __tablename__ = "api_keys"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str]
    created_at: Mapped[float]
    name: Mapped[str | None] = mapped_column(String(63))


class CompatibilityRow(Base):
    """One row: the oldest migration whose code works on these tables. See `api.store.versions`."""

    __tablename__ = "compatibility"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    oldest: Mapped[str] = mapped_column(String(32))
