"""`python -m api.smoke`: does the service work? Submits a tiny average to MERGER_URL and checks the result exactly.

Knows HTTP and what the average of its two samples is, which it computes by itself in float64; knows nothing of how the
service makes it. The samples lie in the package, where the API and the runners find them too: they run one image.
"""

import json
import shutil
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx2
import numpy as np

from api.process import refusals
from api.settings import SAMPLES, Settings, read_settings
from merger.checksum import checksum, leaves
from merger.storage.safetensors import build_header
from merger.storage.stores import in_store

_FILE = "model.safetensors"
_PLANNED = "this storage takes no result by itself: only the plan was checked, nothing was computed"
_PAUSE = 0.5  # seconds between two questions
_ENDED = frozenset({"succeeded", "failed", "canceled", "timed_out"})
Tensors = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


class Wrong(Exception):
    """The service does not do what it should; the message says what it did."""


@dataclass(frozen=True)
class Service:
    """The API, asked again and again until `until` while it does not answer."""

    http: httpx2.Client
    until: float

    def ask(self, method: str, path: str, content: object = None) -> dict[str, Any]:
        """The answer. Raises Wrong where the service refuses, or says nothing in time."""
        answer = self.response(method, path, content)
        if not answer.is_success:
            raise Wrong(f"{method} {path}: {answer.status_code} {answer.text[:2000]}")
        found: dict[str, Any] = answer.json()
        return found

    def response(self, method: str, path: str, content: object = None) -> httpx2.Response:
        """What comes back, once it is no sign of a service that is not up."""
        headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
        while True:
            trouble = ""
            try:
                answer = self.http.request(method, path, json=content, headers=headers)
                if answer.status_code not in {429, 502, 503, 504}:
                    return answer
                trouble = f"{answer.status_code} {answer.text[:500]}"
            except httpx2.HTTPError as error:
                trouble = str(error)
            if time.monotonic() > self.until:
                raise Wrong(f"{method} {path}: no answer; at last: {trouble}")
            time.sleep(_PAUSE)


def recipe(output: Mapping[str, Any]) -> dict[str, Any]:
    """The average of the samples."""
    return {"method": "average", "checkpoints": [str(path) for path in samples()], "output": dict(output)}


def samples() -> list[Path]:
    """The two checkpoints."""
    return sorted(path for path in SAMPLES.iterdir() if path.is_dir())


def average() -> Tensors:
    """The average of the samples, in float64, rounded once."""
    models = [tensors_in((path / _FILE).read_bytes()) for path in samples()]
    sums = {name: sum(model[name].astype(np.float64) for model in models) for name in models[0]}
    return {name: np.asarray(value / len(models), np.float32) for name, value in sums.items()}


def tensors_in(content: bytes) -> Tensors:
    """The tensors of a safetensors file, in the order of their bytes. Raises Wrong."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        data = content[8 + length :]
        return {
            name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            if entry["dtype"] == "F32" or _refuse(name, entry["dtype"])
        }
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise Wrong(f"the result is no file of float32 tensors: {error}") from error


def _refuse(name: str, dtype: str) -> bool:
    raise ValueError(f"{name} is {dtype}")


def check_checksum(files: list[dict[str, Any]]) -> str:
    """See that the job made the one file that it should, by its checksum. Raises Wrong."""
    expected = average()
    header = build_header([(name, "F32", value.shape) for name, value in expected.items()], {"format": "pt"})
    data = np.frombuffer(b"".join(value.tobytes() for value in expected.values()), np.uint8)
    xxh3 = checksum(header, leaves(data))
    told = [(file["name"], file["size"], file["xxh3"]) for file in files]
    if told != [(_FILE, len(header) + data.size, xxh3)]:
        raise Wrong(f"the result is {told}, not {_FILE} with the checksum {xxh3}")
    return xxh3


def check_bytes(content: bytes) -> None:
    """See that a file holds the average, to the bit. Raises Wrong with the first tensor that is another."""
    found, expected = tensors_in(content), average()
    if list(found) != list(expected):
        raise Wrong(f"the result has the tensors {list(found)}, not {list(expected)}")
    for name, value in expected.items():
        if found[name].shape != value.shape or found[name].tobytes() != value.tobytes():
            raise Wrong(f"{name} is {found[name].ravel()[:4]}..., not {value.ravel()[:4]}...")


def place_below(root: str) -> dict[str, Any]:
    """Where a result goes, under a name that nobody else has. The samples are random numbers: anybody's."""
    name = f"merger-smoke-{uuid.uuid4()}"
    place = f"{root.rstrip('/')}/{name}" if root else name
    return {"push": place, "accept_license": True} if in_store(place) else {"path": place}


def smoke(service: Service, output: Mapping[str, Any]) -> Iterator[str]:
    """Run the job and check its result; what is seen on the way. Raises Wrong."""
    job = service.ask("POST", "/v1/jobs", {"recipe": recipe(output), "labels": {"merger": "smoke"}})
    path = f"/v1/jobs/{job['id']}"
    yield f"job {job['id']} -> {job['output']}"
    said = ""
    while True:
        waiting = f": {job['waiting_for']}" if job.get("waiting_for") else ""
        if said != (said := f"{job['state']}{waiting}"):
            yield said
        if job["state"] in _ENDED:
            break
        if time.monotonic() > service.until:
            service.response("POST", f"{path}:cancel")
            raise Wrong(f"the job is still {said}; it was cancelled")
        time.sleep(_PAUSE)
        job = service.ask("GET", path)
    if job["state"] != "succeeded":
        raise Wrong(f"{job['error']}\n{service.response('GET', f'{path}/logs').text[-4000:]}")
    yield f"checksum {check_checksum(job['result']['files'])} is that of the average in float64, rounded once"
    yield _bytes_of(service, f"{path}/artifacts/{_FILE}")


def _bytes_of(service: Service, path: str) -> str:
    answer = service.response("GET", path)
    if answer.status_code == httpx2.codes.NOT_FOUND:
        return "the API does not see the result's storage: its bytes were not read again"
    if not answer.is_success:
        raise Wrong(f"GET {path}: {answer.status_code} {answer.text[:500]}")
    check_bytes(answer.content)
    return f"all {len(answer.content):,} bytes of the file are right"


def plan(service: Service, output: Mapping[str, Any]) -> Iterator[str]:
    """See that the job could run. Raises Wrong."""
    answer = service.response("POST", "/v1/jobs:validate", {"recipe": recipe(output)})
    if _no_folders(answer):
        yield "the recipe was planned; its folder is refused, as it must be where the machines share none"
        yield _PLANNED
        return
    if not answer.is_success:
        raise Wrong(f"POST /v1/jobs:validate: {answer.status_code} {answer.text[:2000]}")
    found = answer.json()
    yield f"plan {found['fingerprint']}: {found['shards']} shard, {found['bytes_written']:,} bytes"
    expected = sum(value.size for value in average().values())
    if found["parameters"] != expected:
        raise Wrong(f"the plan has {found['parameters']} parameters, not {expected}")
    yield _PLANNED


def _no_folders(answer: httpx2.Response) -> bool:
    """Whether a service takes no folder as an output, which it says when all else is right."""
    if answer.status_code != httpx2.codes.UNPROCESSABLE_CONTENT:
        return False
    pointers = [error["pointer"] for error in answer.json().get("errors", ())]
    return pointers == ["/recipe/output/path"] and "share none" in answer.json()["detail"]


def _root_of(settings: Settings) -> str:
    """Where results may go: a folder that all see, else an object store, else nowhere."""
    roots = (settings.output_roots if settings.shared_folders else ()) or settings.object_roots
    return str(roots[0]) if roots else ""


@click.command()
@click.option("--output", default="", help="A folder or an address below which results may go; else the first root.")
@click.option("--plan-only", is_flag=True, help="Compute nothing: for a service whose results go to the Hub alone.")
@click.option("--seconds", type=float, default=600.0, show_default=True, help="How long all of it may take.")
def main(output: str, plan_only: bool, seconds: float) -> None:
    """Submit a tiny average to MERGER_URL with MERGER_API_KEY, wait, and check the result exactly.

    Ends with 0 where all is right and with 1 where anything is not. The result, some kilobytes, is removed where this
    process sees its folder.
    """
    with refusals():
        settings = read_settings()
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    headers = {"Authorization": f"Bearer {key}"}
    root = output or _root_of(settings)
    plan_only = plan_only or not (root or settings.shared_folders)
    place = place_below(root)
    try:
        with httpx2.Client(base_url=settings.url, headers=headers, timeout=30.0, trust_env=False) as http:
            service = Service(http, time.monotonic() + seconds)
            for line in (plan if plan_only else smoke)(service, place):
                click.echo(line)
    except Wrong as error:
        click.echo(f"FAILED: {error}", err=True)
        sys.exit(1)
    finally:
        if Path(place.get("path", "")).is_absolute():
            shutil.rmtree(place["path"], ignore_errors=True)
    click.echo(f"{settings.url} works")


if __name__ == "__main__":
    main()
