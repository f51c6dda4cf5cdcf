"""Named secrets: readable in here and nowhere else. Knows keys and the store; knows no HTTP, and not what they open.

What is encrypted is the value with its project and name, so that a row that was copied to another name, or into
another project, opens nothing. `python -m api.vault rotate` encrypts all of them anew, with the first key.
"""

import json
from collections.abc import Sequence

import click
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from api.process import begin
from api.settings import MAKE_KEY
from api.store.sql import SqlStore
from api.store.store import Secret, Store, Unavailable
from merger.secret import Token


class NoKeys(Exception):
    """The service has no key to encrypt secrets with."""

    remedy = f"Whoever runs the service sets MERGER_SECRET_KEYS. This makes a key: {MAKE_KEY}"

    def __init__(self) -> None:
        super().__init__("this service keeps no secrets: its setting secret_keys is empty")


class NoSecret(Exception):
    """A secret that is not there, or that no key of the settings opens. The message names it."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"the secret {name!r} {reason}")
        self.remedy = remedy


class Vault:
    """The secrets of all projects. The first key encrypts, all decrypt. Methods raise NoKeys where there is none."""

    def __init__(self, store: Store, keys: Sequence[SecretStr]) -> None:
        self._store = store
        self._ciphers = [Fernet(key.get_secret_value()) for key in keys]

    def put(self, project: str, name: str, value: Token, at: float) -> bool:
        """Keep a value under its name; False where it takes the place of another."""
        content = json.dumps([project, name, value.reveal()]).encode()
        return self._store.put_secret(project, name, self._cipher().encrypt(content).decode(), at)

    def secrets(self, project: str) -> list[Secret]:
        """The secrets of a project by name, encrypted."""
        self._cipher()
        return self._store.secrets(project)

    def remove(self, project: str, name: str) -> bool:
        """Forget a secret; False where there is none of that name."""
        self._cipher()
        return self._store.remove_secret(project, name)

    def reveal(self, project: str, name: str) -> Token:
        """The value of a secret. Raises NoSecret."""
        cipher, kept = self._cipher(), self._store.secret(project, name)
        if kept is None:
            raise NoSecret(name, "is not there", f"Store it: merger secret set {name}")
        try:
            content = json.loads(cipher.decrypt(kept.ciphertext.encode()))
        except InvalidToken:
            content = None
        if content is None or content[:2] != [project, name]:
            remedy = "Add the key that it was encrypted with to MERGER_SECRET_KEYS, or store the secret again."
            raise NoSecret(name, "is not readable with the keys of this service", remedy)
        return Token(content[2])

    def rotate(self) -> tuple[int, list[str]]:
        """Encrypt all secrets with the first key, and change nothing else; again is no harm. How many there are, and
        the `project/name` of those that no key opens.
        """
        cipher, secrets, unreadable = self._cipher(), self._store.all_secrets(), []
        for project, secret in secrets:
            try:
                fresh = cipher.rotate(secret.ciphertext.encode()).decode()
            except InvalidToken:
                unreadable.append(f"{project}/{secret.name}")
                continue
            self._store.replace_secret(
                project, secret.name, secret.ciphertext, fresh
            )  # a newer value has the first key
        return len(secrets), unreadable

    def _cipher(self) -> MultiFernet:
        if not self._ciphers:
            raise NoKeys
        return MultiFernet(self._ciphers)


@click.group()
def main() -> None:
    """The named secrets of the database in MERGER_DATABASE_URL, with the keys in MERGER_SECRET_KEYS."""


@main.command()
def rotate() -> None:
    """Encrypt all secrets with the first key, so that the others can be taken away."""
    settings = begin()
    store = SqlStore(settings.database_url)
    try:
        count, unreadable = Vault(store, settings.secret_keys).rotate()
    except (NoKeys, Unavailable) as error:
        raise click.ClickException(f"{error}. {getattr(error, 'remedy', '')}".strip()) from error
    finally:
        store.close()
    click.echo(f"{count - len(unreadable)} of {count} secrets are encrypted with the first key")
    if unreadable:
        raise click.ClickException(f"no key opens {', '.join(unreadable)}: keep the old keys, or store these again")


if __name__ == "__main__":
    main()
