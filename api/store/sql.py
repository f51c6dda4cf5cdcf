"""Jobs in a SQL database: SQLite in a file, PostgreSQL in production. Knows transactions; decides nothing."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Select, delete, exc, func, select
from sqlalchemy.orm import Session

from api.jobs import ACTIVE, Attempt, Event, Job, LogLine, State
from api.machine import Happening
from api.store.connections import WRITING, open_engine
from api.store.store import ClientKey, KeyReused, NotFound, Query, Request, Secret, Store, Unavailable, apply, created
from api.store.tables import AttemptRow, EventRow, JobRow, KeyRow, LeaseRow, LogRow, RequestRow, SecretRow
from api.store.versions import works_on

_JOB, _ATTEMPT = TypeAdapter(Job), TypeAdapter(Attempt)
_COLUMNS = frozenset({"project", "state", "method", "priority", "labels", "created_at", "queued_at", "not_before"})
_OTHER_TABLES = frozenset({"42P01", "42703"})  # PostgreSQL has no such table, no such column
_ANOTHER_VERSION = "the database has the tables of another version"


class SqlStore(Store):
    """A database whose tables `api.store.migrate` has made."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        # SQLite has one writer at a time and lets the others sleep and try; in here they queue up instead.
        self._writing = threading.Lock() if self.engine.dialect.name == "sqlite" else nullcontext()

    @contextmanager
    def _session(self, *, writing: bool = False) -> Iterator[Session]:
        """One transaction."""
        try:
            options = self.engine.execution_options(**{WRITING: writing})
            with self._writing if writing else nullcontext(), Session(options) as session, session.begin():
                yield session
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        except exc.ProgrammingError as error:
            if getattr(error.orig, "sqlstate", "") in _OTHER_TABLES:
                raise Unavailable(_ANOTHER_VERSION) from error
            raise

    # ---- jobs -----------------------------------------------------------------------------------------

    def add(self, job: Job, request: Request | None = None) -> tuple[Job, bool]:
        try:
            return self._add(job, request)
        except exc.IntegrityError:  # the same key at the same moment: the other one is there now
            return self._add(job, request)

    def _add(self, job: Job, request: Request | None) -> tuple[Job, bool]:
        with self._session(writing=True) as session:
            if request and (known := _find(session, job.project, request)):
                return known, False
            job, event_ = created(job)
            session.add(JobRow(id=job.id, log_lines=0, **_columns(job)))
            session.flush()
            session.add(_event_row(event_))
            if request:
                row = RequestRow(
                    project=job.project, key=request.key, digest=request.digest, job=job.id, at=job.created_at
                )
                session.add(row)
            return job, True

    def find(self, project: str, request: Request) -> Job | None:
        with self._session() as session:
            return _find(session, project, request)

    def get(self, job: str) -> Job:
        with self._session() as session:
            return _load(session, job)

    def page(self, query: Query) -> list[Job]:
        rows = select(JobRow).where(JobRow.project == query.project).order_by(JobRow.id.desc()).limit(query.limit)
        if query.states:
            rows = rows.where(JobRow.state.in_(query.states))
        if query.method is not None:
            rows = rows.where(JobRow.method == query.method)
        if query.created_after is not None:
            rows = rows.where(JobRow.created_at > query.created_after)
        if query.created_before is not None:
            rows = rows.where(JobRow.created_at < query.created_before)
        if query.before is not None:
            rows = rows.where(JobRow.id < query.before)
        for name, value in query.labels.items():
            rows = rows.where(JobRow.labels[name].as_string() == value)
        return self._jobs(rows)

    def change(self, job: str, happening: Happening, lines: Sequence[str] = ()) -> Job:
        with self._session(writing=True) as session:
            row = session.get(JobRow, job, with_for_update=True)
            if row is None:
                raise NotFound(job)
            before = _job(row, _attempts(session, [job]))
            after, events = apply(before, happening)
            for name, value in _columns(after).items():
                setattr(row, name, value)
            for attempt in after.attempts:
                if attempt not in before.attempts:
                    session.merge(_attempt_row(job, attempt))
            session.add_all(map(_event_row, events))
            if lines and after.attempt.reports > before.attempt.reports:
                _add_lines(session, row, after.attempt.number, lines, happening.at)
            return after

    def queued(self, now: float, limit: int) -> list[Job]:
        rows = select(JobRow).where(JobRow.state == State.QUEUED, JobRow.not_before <= now)
        return self._jobs(rows.order_by(JobRow.priority.desc(), JobRow.id).limit(limit))

    def expired(self, now: float) -> list[Job]:
        return self._jobs(select(JobRow).where(JobRow.state == State.QUEUED, JobRow.expires_at < now))

    def active(self) -> list[Job]:
        return self._jobs(select(JobRow).where(JobRow.state.in_(ACTIVE)).order_by(JobRow.id))

    def _jobs(self, rows: Select[JobRow]) -> list[Job]:
        with self._session() as session:
            found = list(session.scalars(rows))
            attempts = _attempts(session, [row.id for row in found])
            return [_job(row, attempts) for row in found]

    def counts(self) -> Mapping[State, int]:
        with self._session() as session:
            return {State(s): n for s, n in session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))}

    def oldest_queued(self) -> float | None:
        with self._session() as session:
            return session.scalar(select(func.min(JobRow.queued_at)).where(JobRow.state == State.QUEUED))

    # ---- events and logs ------------------------------------------------------------------------------

    def log(self, job: str, attempt: int, lines: Sequence[str], at: float) -> None:
        with self._session(writing=True) as session:
            row = session.get(JobRow, job, with_for_update=True)
            if row is None:
                raise NotFound(job)
            _add_lines(session, row, attempt, lines, at)

    def events(self, job: str, after: int = 0, limit: int = 500) -> list[Event]:
        rows = select(EventRow).where(EventRow.job == job, EventRow.id > after).order_by(EventRow.id).limit(limit)
        with self._session() as session:
            _see(session, job)
            return [Event(r.job, r.id, r.at, r.kind, r.attempt, r.data) for r in session.scalars(rows)]

    def logs(self, job: str, after: int = 0, limit: int = 1000) -> list[LogLine]:
        rows = select(LogRow).where(LogRow.job == job, LogRow.id > after).order_by(LogRow.id).limit(limit)
        with self._session() as session:
            _see(session, job)
            return [LogLine(r.id, r.at, r.attempt, r.text) for r in session.scalars(rows)]

    # ---- leases and keys ------------------------------------------------------------------------------

    def hold(self, lease: str, holder: str, now: float, seconds: float) -> bool:
        try:
            with self._session(writing=True) as session:
                row = session.get(LeaseRow, lease, with_for_update=True)
                if row is None:
                    session.add(LeaseRow(name=lease, holder=holder, until=now + seconds))
                    return True
                if row.holder != holder and row.until > now:
                    return False
                row.holder, row.until = holder, now + seconds
                return True
        except exc.IntegrityError:  # somebody else took it first
            return False

    def release(self, lease: str, holder: str) -> None:
        with self._session(writing=True) as session:
            session.execute(delete(LeaseRow).where(LeaseRow.name == lease, LeaseRow.holder == holder))

    def add_key(self, digest: str, project: str, at: float, name: str = "") -> None:
        with self._session(writing=True) as session:
            session.merge(KeyRow(digest=digest, project=project, created_at=at, name=name or None))

    def client_keys(self) -> list[ClientKey]:
        with self._session() as session:
            rows = session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.digest))
            return [ClientKey(row.digest, row.project, row.created_at, row.name or "") for row in rows]

    def remove_key(self, digest: str) -> bool:
        with self._session(writing=True) as session:
            row = session.get(KeyRow, digest, with_for_update=True)
            if row is not None:
                session.delete(row)
            return row is not None

    def project_of(self, digest: str) -> str | None:
        with self._session() as session:
            return session.scalar(select(KeyRow.project).where(KeyRow.digest == digest))

    def has_keys(self) -> bool:
        with self._session() as session:
            return session.scalar(select(KeyRow.digest).limit(1)) is not None

    # ---- secrets --------------------------------------------------------------------------------------

    def put_secret(self, project: str, name: str, ciphertext: str, at: float) -> bool:
        try:
            return self._put_secret(project, name, ciphertext, at)
        except exc.IntegrityError:  # the same name at the same moment: the other one is there now
            return self._put_secret(project, name, ciphertext, at)

    def _put_secret(self, project: str, name: str, ciphertext: str, at: float) -> bool:
        with self._session(writing=True) as session:
            row = session.get(SecretRow, (project, name), with_for_update=True)
            if row is None:
                session.add(SecretRow(project=project, name=name, ciphertext=ciphertext, created_at=at, updated_at=at))
                return True
            row.ciphertext, row.updated_at = ciphertext, at
            return False

    def secret(self, project: str, name: str) -> Secret | None:
        with self._session() as session:
            row = session.get(SecretRow, (project, name))
            return _secret(row) if row else None

    def secrets(self, project: str) -> list[Secret]:
        rows = select(SecretRow).where(SecretRow.project == project)
        with self._session() as session:
            # sorted here, because a database may put letters and dashes in an order of its own
            return sorted(map(_secret, session.scalars(rows)), key=lambda secret: secret.name)

    def all_secrets(self) -> list[tuple[str, Secret]]:
        with self._session() as session:
            return sorted(
                ((row.project, _secret(row)) for row in session.scalars(select(SecretRow))),
                key=lambda one: (one[0], one[1].name),
            )

    def replace_secret(self, project: str, name: str, before: str, after: str) -> bool:
        with self._session(writing=True) as session:
            row = session.get(SecretRow, (project, name), with_for_update=True)
            if row is None or row.ciphertext != before:
                return False
            row.ciphertext = after
            return True

    def remove_secret(self, project: str, name: str) -> bool:
        with self._session(writing=True) as session:
            row = session.get(SecretRow, (project, name), with_for_update=True)
            if row is not None:
                session.delete(row)
            return row is not None

    # ---- the database itself --------------------------------------------------------------------------

    def check(self) -> None:
        with self._session() as session:
            if not works_on(session.connection()):
                raise Unavailable(_ANOTHER_VERSION)

    def close(self) -> None:
        self.engine.dispose()


# ---- rows and values ----------------------------------------------------------------------------------


def _columns(job: Job) -> dict[str, Any]:
    body = _JOB.dump_python(job, mode="json", exclude={"id", "events", "attempts"})
    own = {name: body.pop(name) for name in _COLUMNS}
    return {**own, "expires_at": job.expires_at, "events": job.events, "body": body}


def _job(row: JobRow, attempts: Mapping[str, Sequence[Attempt]]) -> Job:
    own = {name: getattr(row, name) for name in _COLUMNS}
    return _JOB.validate_python(
        {**row.body, **own, "id": row.id, "events": row.events, "attempts": tuple(attempts.get(row.id, ()))}
    )


def _load(session: Session, job: str) -> Job:
    row = session.get(JobRow, job)
    if row is None:
        raise NotFound(job)
    return _job(row, _attempts(session, [job]))


def _secret(row: SecretRow) -> Secret:
    return Secret(row.name, row.ciphertext, row.created_at, row.updated_at)


def _find(session: Session, project: str, request: Request) -> Job | None:
    known = session.get(RequestRow, (project, request.key))
    if known and known.digest != request.digest:
        raise KeyReused(request.key)
    return _load(session, known.job) if known else None


def _see(session: Session, job: str) -> None:
    if session.scalar(select(JobRow.id).where(JobRow.id == job)) is None:
        raise NotFound(job)


def _attempts(session: Session, jobs: Sequence[str]) -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = {}
    rows = select(AttemptRow).where(AttemptRow.job.in_(jobs)).order_by(AttemptRow.number)
    for row in session.scalars(rows) if jobs else ():
        found.setdefault(row.job, []).append(_ATTEMPT.validate_python({**row.body, "lease": row.lease}))
    return found


def _attempt_row(job: str, attempt: Attempt) -> AttemptRow:
    body = _ATTEMPT.dump_python(attempt, mode="json", exclude={"lease"})
    return AttemptRow(job=job, number=attempt.number, lease=attempt.lease, body=body)


def _event_row(event_: Event) -> EventRow:
    return EventRow(
        job=event_.job,
        id=event_.id,
        at=event_.at,
        kind=event_.kind,
        attempt=event_.attempt,
        data=dict(event_.data),
    )


def _add_lines(session: Session, row: JobRow, attempt: int, lines: Sequence[str], at: float) -> None:
    for i, line in enumerate(lines, 1):
        session.add(LogRow(job=row.id, id=row.log_lines + i, at=at, attempt=attempt, text=line.replace("\0", "")))
    row.log_lines += len(lines)
