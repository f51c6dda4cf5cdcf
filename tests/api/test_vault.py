"""The vault: what is kept cannot be read without a key, keys can be rotated, rows cannot change places."""

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from api.store.memory import MemoryStore
from api.vault import NoKeys, NoSecret, Vault
from merger.secret import Token

VALUE = Token("hf_AbC0123456789xyz")


def key() -> SecretStr:
    return SecretStr(Fernet.generate_key().decode())


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_a_value_comes_back_and_is_not_kept_as_it_is(store: MemoryStore) -> None:
    vault = Vault(store, [key()])
    assert vault.put("p", "hub", VALUE, 1.0)
    assert vault.reveal("p", "hub") == VALUE
    [kept] = vault.secrets("p")
    assert VALUE.reveal() not in repr(kept)
    assert not vault.put("p", "hub", Token("new"), 2.0)
    assert vault.reveal("p", "hub") == Token("new")


def test_the_first_key_encrypts_and_all_decrypt(store: MemoryStore) -> None:
    old, new = key(), key()
    Vault(store, [old]).put("p", "before", VALUE, 1.0)
    rotated = Vault(store, [new, old])
    rotated.put("p", "after", VALUE, 2.0)
    assert rotated.reveal("p", "before") == rotated.reveal("p", "after") == VALUE
    assert Vault(store, [new]).reveal("p", "after") == VALUE
    with pytest.raises(NoSecret, match="'before' is not readable"):
        Vault(store, [new]).reveal("p", "before")
    with pytest.raises(NoSecret, match="'after' is not readable"):
        Vault(store, [old]).reveal("p", "after")


def test_a_row_in_another_place_opens_nothing(store: MemoryStore) -> None:
    vault = Vault(store, [key()])
    vault.put("p", "hub", VALUE, 1.0)
    [kept] = vault.secrets("p")
    for project, name in (("other", "hub"), ("p", "mine")):
        store.put_secret(project, name, kept.ciphertext, 2.0)
        with pytest.raises(NoSecret, match="is not readable"):
            vault.reveal(project, name)


def test_a_damaged_row_opens_nothing(store: MemoryStore) -> None:
    vault = Vault(store, [key()])
    store.put_secret("p", "hub", "ü no token of Fernet", 1.0)
    with pytest.raises(NoSecret, match="is not readable"):
        vault.reveal("p", "hub")


def test_projects_do_not_see_each_other(store: MemoryStore) -> None:
    vault = Vault(store, [key()])
    vault.put("p", "hub", VALUE, 1.0)
    assert vault.secrets("other") == []
    assert not vault.remove("other", "hub")
    with pytest.raises(NoSecret, match="'hub' is not there"):
        vault.reveal("other", "hub")
    assert vault.remove("p", "hub")
    with pytest.raises(NoSecret, match="'hub' is not there"):
        vault.reveal("p", "hub")


def test_without_a_key_nothing_is_done_and_the_error_says_what_to_set(store: MemoryStore) -> None:
    Vault(store, [key()]).put("p", "hub", VALUE, 1.0)
    vault = Vault(store, [])
    calls = (
        lambda: vault.put("p", "hub", VALUE, 1.0),
        lambda: vault.reveal("p", "hub"),
        lambda: vault.secrets("p"),
        lambda: vault.remove("p", "hub"),
    )
    for call in calls:
        with pytest.raises(NoKeys) as raised:
            call()
    assert "MERGER_SECRET_KEYS" in raised.value.remedy
    assert "Fernet.generate_key()" in raised.value.remedy
