"""Five hundred jobs from twenty clients: all taken, run by priority, and how fast the API answers meanwhile.

Starts a real `merger serve` with a Ray of its own, submits, asks, and prints and writes a table to bench/jobs.md and
bench/jobs.json. `python bench/jobs.py [--jobs N]` runs it; N = 500 takes half an hour on two processors.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tests.service.processes import ENDED, KEY, Service, recipe, write_run  # noqa: E402

CLIENTS = 20


class Clients:
    """Twenty clients that submit at once, then go on asking; every answer's seconds are kept."""

    def __init__(self, url: str, jobs: int, run: Path) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.statuses: Counter[int] = Counter()
        self.submitted: list[str] = []
        self._url, self._jobs, self._run = url, jobs, run
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        choice = random.Random(number)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx2.Client(base_url=self._url, headers=headers, timeout=60) as http:
            for i in range(number, self._jobs, CLIENTS):
                body = {"recipe": recipe(self._run, f"out/{i}", 1), "priority": choice.randrange(5)}
                self.submitted.append(self._timed(http, "submit", "POST", "/v1/jobs", json=body)["id"])
            while not self._stopped.wait(choice.uniform(0.2, 0.6)):
                self._timed(http, "one job", "GET", f"/v1/jobs/{choice.choice(self.submitted)}")
                self._timed(http, "list", "GET", "/v1/jobs", params={"limit": 20})

    def _timed(self, http: httpx2.Client, what: str, method: str, path: str, **request: Any) -> dict[str, Any]:
        began = time.perf_counter()
        answer = http.request(method, path, **request)
        self.seconds[what].append(time.perf_counter() - began)
        self.statuses[answer.status_code] += 1
        found: dict[str, Any] = answer.raise_for_status().json()
        return found


def measure(jobs: int) -> dict[str, Any]:
    """Run it all; returns what the table shows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder / "run", shards=1, megabytes=1)
        service = Service(folder, MERGER_HEARTBEAT_SECONDS="1", MERGER_LEASE_SECONDS="30")
        try:
            began = time.monotonic()
            service.start()
            ready = time.monotonic() - began
            time.sleep(20)  # for Ray to end the workers that it started ahead
            idle = _memory(service)
            clients = Clients(service.url, jobs, folder / "run")
            began = time.monotonic()
            clients.start()
            found = _wait(service, jobs)
            clients.stop()
            seconds = time.monotonic() - began
        finally:
            service.stop()
    return {
        "jobs": jobs,
        "clients": CLIENTS,
        "processors": os.cpu_count(),
        "ready_seconds": round(ready, 1),
        "idle_pss_mb": idle,
        "seconds": round(seconds),
        "states": Counter(job["state"] for job in found),
        "statuses": clients.statuses,
        "attempts": Counter(len(job["attempts"]) for job in found),
        "lost": Counter(a["error"]["message"] for job in found for a in job["attempts"] if a["error"]),
        "out_of_order": _out_of_order(found),
        "milliseconds": {what: _quantiles(values) for what, values in clients.seconds.items()},
    }


def _memory(service: Service) -> int:
    """Proportional memory of the server and its Ray, in MB."""
    assert service.process
    keeper = json.loads((service.folder / "data" / "ray.json").read_text())["pid"]
    roots = [psutil.Process(service.process.pid), psutil.Process(keeper)]
    processes = {process for root in roots for process in (root, *root.children(recursive=True))}
    return round(sum(process.memory_full_info().pss for process in processes) / 1e6)


def _wait(service: Service, jobs: int) -> list[dict[str, Any]]:
    while True:
        time.sleep(2)
        counts = Counter[str]()
        for line in service.http.get("/metrics").text.splitlines():
            if line.startswith("merger_jobs{"):
                counts[line.split('"')[1]] = int(float(line.split()[-1]))
        if sum(counts[state] for state in ENDED) == jobs:
            break
    found: list[dict[str, Any]] = []
    cursor = {}
    while True:
        page = service.http.get("/v1/jobs", params={"limit": 200, **cursor}).json()
        found += page["jobs"]
        if not page["next"]:
            return found
        cursor = {"cursor": page["next"]}


def _out_of_order(jobs: list[dict[str, Any]]) -> int:
    """Jobs that were started although one of higher priority had been queued for over a second."""
    rows = [(job["priority"], _seconds(job["created_at"]), _seconds(job["started_at"])) for job in jobs]
    return sum(
        any(other > priority and created < started - 1 and began > started for other, created, began in rows)
        for priority, _, started in rows
    )


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _quantiles(values: list[float]) -> dict[str, float]:
    ranked = statistics.quantiles(values, n=100)
    return {
        "calls": len(values),
        "p50": round(1000 * ranked[49], 1),
        "p95": round(1000 * ranked[94], 1),
        "p99": round(1000 * ranked[98], 1),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = [
        f"| {what} | {row['calls']} | {row['p50']} | {row['p95']} | {row['p99']} |"
        for what, row in result["milliseconds"].items()
    ]
    return "\n".join(
        [
            f"# {result['jobs']} jobs from {result['clients']} clients at once",
            "",
            f"`merger serve` with SQLite and its own Ray on {result['processors']} processors, clients on the same "
            f"machine. Ready after {result['ready_seconds']} s; idle memory {result['idle_pss_mb']} MB (PSS, Ray "
            f"included). All jobs took {result['seconds']} s: {dict(result['states'])}; attempts per job "
            f"{dict(result['attempts'])}; started out of the order of priority: {result['out_of_order']}.",
            "",
            "| milliseconds | calls | p50 | p95 | p99 |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    result = measure(parser.parse_args().jobs)
    (HERE / "jobs.json").write_text(json.dumps(result, indent=2) + "\n")
    (HERE / "jobs.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
