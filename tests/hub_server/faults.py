"""Which requests go wrong, and how. Knows rules and chance; the wire does to a request what is said here."""

import hashlib
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

KINDS = ("500", "503", "429", "cut", "drop", "slow")


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Several things may happen together (slow, then cut)."""

    status: int | None = None  # answer this
    message: str = "a fault that a test asked for"
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False  # do what was asked first, then answer `status` (or drop)
    delay: float = 0.0  # seconds before anything is done
    rate: float | None = None  # bytes of the body in a second
    cut: int | None = None  # close the connection after so many bytes of the body
    drop: bool = False  # close the connection without an answer
    ignore_range: bool = False  # answer 200 with the whole body
    flip: int | None = None  # one bit of the body's byte at this place

    def __str__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("message", "headers")}
        return " ".join(f"{name}={value}" for name, value in told.items() if value not in (None, False, 0.0)) or "none"


@dataclass(frozen=True)
class Rule:
    """Requests of an origin and a method whose path (with its query) the expression is found in: those with the
    numbers `nth` (the first is 1), or the first `times`, or all; of these a part, by chance from `seed`."""

    fault: Fault
    origin: str | None = None
    method: str | None = None
    path: str = ""
    nth: tuple[int, ...] = ()
    times: int | None = None
    probability: float = 1.0
    seed: int = 0
    kinds: tuple[str, ...] = ()  # one of these by chance, instead of `fault`

    def concerns(self, origin: str, method: str, target: str) -> bool:
        return (
            origin == (self.origin or origin)
            and method == (self.method or method)
            and bool(re.search(self.path, target))
        )


def _of_kind(kind: str, chance: random.Random) -> Fault:
    if kind == "429":
        return Fault(status=429, headers={"RateLimit": '"api";r=0;t=0', "Retry-After": "0"})
    if kind.isdigit():
        return Fault(status=int(kind))
    if kind == "after":
        return Fault(status=500, after=True)
    if kind == "cut":
        return Fault(cut=chance.randrange(1, 5000))
    if kind == "slow":
        return Fault(delay=0.05 + 0.1 * chance.random())
    return Fault(drop=True)


class Faults:
    """The rules that hold now. The first rule that fits a request is the one that strikes it."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._matches: Counter[int] = Counter()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(
        self,
        origin: str | None = None,
        method: str | None = None,
        path: str = "",
        nth: int | Sequence[int] = (),
        times: int | None = None,
        probability: float = 1.0,
        seed: int = 0,
        **fault: Any,
    ) -> None:
        """Add a rule; `fault` are the fields of `Fault`. `status=429` alone says to try again at once."""
        numbers = (nth,) if isinstance(nth, int) else tuple(nth)
        what = Fault(**fault)
        if what.status == 429 and not what.headers:
            what = replace(what, headers=_of_kind("429", random.Random(0)).headers)
        self._append(Rule(what, origin, method, path, numbers, times, probability, seed))

    def random(
        self,
        rate: float = 0.1,
        seed: int = 0,
        origin: str | None = None,
        method: str | None = None,
        path: str = "",
        kinds: Sequence[str] = KINDS,
    ) -> None:
        """Strike a part of all requests with one of `kinds` ("after": do it, then answer 500; "403": as of an expired
        URL). Which requests depends on what is asked and how often it was, not on the order of threads."""
        self._append(Rule(Fault(), origin, method, path, (), None, rate, seed, tuple(kinds)))

    def clear(self) -> None:
        with self._lock:
            self._rules.clear()
            self._matches.clear()
            self._seen.clear()

    def strike(self, origin: str, method: str, target: str, range_: str | None) -> Fault | None:
        """The fault for a request, if any. Counts the request for every rule that it fits."""
        with self._lock:
            fitting = [number for number, rule in enumerate(self._rules) if rule.concerns(origin, method, target)]
            self._matches.update(fitting)
            # Signatures and times differ from run to run: chance shall not depend on them.
            key = f"{origin} {method} {target.partition('?')[0]} {range_}"
            self._seen[key] += 1
            return next((f for n in fitting if (f := self._drawn(n, f"{key} {self._seen[key]}"))), None)

    def _drawn(self, number: int, key: str) -> Fault | None:
        rule, count = self._rules[number], self._matches[number]
        if rule.nth and count not in rule.nth:
            return None
        if rule.times is not None and count > rule.times:
            return None
        digest = hashlib.blake2b(f"{rule.seed} {key}".encode(), digest_size=8).digest()
        chance = random.Random(int.from_bytes(digest, "little"))
        if chance.random() >= rule.probability:
            return None
        return _of_kind(chance.choice(rule.kinds), chance) if rule.kinds else rule.fault

    def _append(self, rule: Rule) -> None:
        with self._lock:
            self._rules.append(rule)
