"""Objects with their versions, and who waits for changes. Knows nothing of HTTP, of schemas or of what objects mean."""

import copy
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    version: int
    type: str
    object: Object


def key_of(thing: Object) -> Key:
    """Kind, namespace, name."""
    return thing["kind"], thing["metadata"].get("namespace", ""), thing["metadata"]["name"]


class Store:
    """All objects of a cluster. What goes in and comes out are copies."""

    def __init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self._changes: list[Change] = []
        self._changed = threading.Condition(threading.RLock())
        # Two numbers of loopback addresses, for Services and pods: clusters side by side do not meet.
        self.networks = tuple(random.SystemRandom().sample(range(32, 250), 2))
        self.version = 1
        self.closed = False

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        with self._changed:
            return copy.deepcopy(self._objects.get((kind, namespace, name)))

    def all(self, kind: str, namespace: str = "") -> list[Object]:
        """The objects of a kind (in a namespace), by name."""
        with self._changed:
            found = [each for key, each in sorted(self._objects.items()) if key[0] == kind]
            return copy.deepcopy([each for each in found if namespace in ("", each["metadata"].get("namespace", ""))])

    def everything(self, namespace: str) -> list[Object]:
        with self._changed:
            return copy.deepcopy([each for key, each in sorted(self._objects.items()) if key[1] == namespace])

    def add(self, thing: Object) -> Object:
        with self._changed:
            assert key_of(thing) not in self._objects, key_of(thing)
            thing = copy.deepcopy(thing)
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            thing["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 1}
            return self._put("ADDED", thing)

    def replace(self, thing: Object) -> Object:
        """Put a new state of an object that exists. A spec that changed is a new generation."""
        with self._changed:
            old, thing = self._objects[key_of(thing)], copy.deepcopy(thing)
            thing["metadata"] |= {each: old["metadata"][each] for each in ("uid", "creationTimestamp", "generation")}
            if old.get("spec") != thing.get("spec"):
                thing["metadata"]["generation"] += 1
            same = {**thing, "metadata": thing["metadata"] | {"resourceVersion": old["metadata"]["resourceVersion"]}}
            return copy.deepcopy(old) if same == old else self._put("MODIFIED", thing)

    def change(self, kind: str, namespace: str, name: str, how: Callable[[Object], None]) -> None:
        """Change an object in place, if it is still there."""
        with self._changed:
            thing = self.get(kind, namespace, name)
            if thing is not None:
                how(thing)
                self.replace(thing)

    def remove(self, kind: str, namespace: str, name: str) -> None:
        """Remove an object; what it owned goes by the collector."""
        with self._changed:
            thing = self._objects.pop((kind, namespace, name), None)
            if thing is not None:
                self._tell("DELETED", thing)

    def _put(self, type: str, thing: Object) -> Object:
        self._objects[key_of(thing)] = thing
        self._tell(type, thing)
        return copy.deepcopy(thing)

    def _tell(self, type: str, thing: Object) -> None:
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        self._changes.append(Change(self.version, type, copy.deepcopy(thing)))
        self._changed.notify_all()

    def wait(self, after: int, seconds: float) -> bool:
        """Wait until something is newer than version `after`. Whether something is."""
        with self._changed:
            self._changed.wait_for(lambda: self.version > after or self.closed, seconds)
            return self.version > after

    def until(self, look: Callable[[], Any], seconds: float = 60.0) -> Any:
        """What `look` gives once it gives something; it is asked again at each change."""
        with self._changed:
            found: list[Any] = []

            def met() -> bool:
                found[:] = [look()]
                return bool(found[0])

            assert self._changed.wait_for(met, seconds), f"nothing came in {seconds} s"
            return found[0]

    def changes(self, kind: str, after: int, seconds: float) -> Iterator[Change]:
        """Changes of a kind since a version, as they come, for so long."""
        end = datetime.now().timestamp() + seconds
        while not self.closed and (left := end - datetime.now().timestamp()) > 0:
            with self._changed:
                new = [each for each in self._changes if each.version > after]
            yield from (each for each in new if each.object["kind"] == kind)
            after = max([after, *(each.version for each in new)])
            self.wait(after, left)

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
