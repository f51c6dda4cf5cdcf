"""What a container may use of its machine: the limits of its control groups, of version 2 and 1. Knows Linux's files.

A limit may stand on any group above a process, so all of them count. What lies outside of a container is not to be seen
in it, and limits nothing that could be known; where no group can be read there is no limit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NONE = 1 << 60  # version 1 says "no limit" with the largest number of pages that there is


@dataclass(frozen=True)
class Groups:
    """The control groups of this process: where they are mounted, and the file that names them."""

    mount: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")

    def processors(self) -> float | None:
        """How many processors' time the process may take, None without a limit."""
        found = [_share(_words(group / "cpu.max")) for group in self._above("")]
        for group in self._above("cpu"):
            quota, period = _words(group / "cpu.cfs_quota_us"), _words(group / "cpu.cfs_period_us")
            found.append(_share([*quota, *period]))
        return min((share for share in found if share), default=None)

    def free_memory(self) -> int | None:
        """Bytes that the process may still take, with the page cache that can be taken back; None without a limit."""
        found = [
            *(_room(group, "memory.max", "memory.current", "") for group in self._above("")),
            *(
                _room(group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                for group in self._above("memory")
            ),
        ]
        return min((room for room in found if room is not None), default=None)

    def _above(self, controller: str) -> Iterator[Path]:
        """The group of the process and those above it, as far as they are to be seen; "" is version 2's."""
        for name, path in self._named(controller):
            mounted = self.mount / name
            for group in (mounted / path, *(mounted / path).parents):
                if group.is_relative_to(mounted):
                    yield group

    def _named(self, controller: str) -> Iterator[tuple[str, str]]:
        """Where a hierarchy is mounted, and the group in it. One that has none of its own shows as / in a container."""
        for line in _lines(self.own):
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                inside = path.strip().lstrip("/")
                inside = "" if inside.startswith("..") else inside
                for name in ("", "unified") if not controller else dict.fromkeys((controllers, controller)):
                    yield name, inside


def _share(words: list[str]) -> float | None:
    """Processors from a quota and a period in microseconds; `max` and -1 are no limit."""
    try:
        quota, period = map(int, words)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _room(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    try:
        allowed, used = (int(_words(group / name)[0]) for name in (limit, usage))
    except (ValueError, IndexError):
        return None
    if allowed >= _NONE:
        return None
    pages = dict(line.split()[:2] for line in _lines(group / "memory.stat"))
    cache = sum(int(pages.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
    return max(0, allowed - max(0, used - cache))


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path)[:1] for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
