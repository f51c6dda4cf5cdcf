"""From what a client sends to a job that can run: the recipe, its paths, its plan. Reads headers, no weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from api.jobs import Needs
from api.settings import Settings
from merger.errors import RecipeError
from merger.evaluation import Harness
from merger.methods.method import all_of, is_open
from merger.preflight import check_disk
from merger.publish import check_free, is_complete
from merger.push import check_license, destination_of
from merger.recipe import Document, evaluations_of, make_document, parse_document
from merger.run import Options, output_of, plan_of
from merger.secret import Token
from merger.sources import LocalSources, Roots
from merger.storage.hub import access_for
from merger.storage.stores import in_store
from merger.stored_objects import admit_location
from workers.resources import TaskSize, measuring_request, request_for, training_request

Recipe = str | Mapping[str, Any]


@dataclass(frozen=True)
class Validated:
    """A recipe that can run: its content, what it makes where, and what that takes."""

    content: Mapping[str, Any]
    document: Document
    output: Path
    needs: Needs
    plan: Mapping[str, Any]


def document_of(recipe: Recipe) -> Document:
    """The document in a YAML text or in plain data. Raises RecipeError with the field's path."""
    return parse_document(recipe) if isinstance(recipe, str) else make_document(recipe)


def validate(
    recipe: Recipe,
    settings: Settings,
    hub_token: Token | None = None,
) -> Validated:
    """See that a recipe can run here. Raises RequestError; everything known from headers is refused here."""
    document = document_of(recipe)
    output = _output_of(document, settings)
    _admit_output(output, settings)
    if document.output.push and in_store(document.output.push):
        admit_location(document.output.push, settings.object_roots, "output.push")
    sources = LocalSources(roots_of(settings), partial(access_for, hub_token), settings.object_roots)
    destination = destination_of(document.output, sources.hub)
    plan, _ = plan_of(document, Options(settings.task_memory), sources)
    if not settings.shared_folders and document.output.path is not None:
        raise RecipeError(
            "is a folder, and the machines of this service share none", where="output.path", remedy="Name output.push."
        )
    if destination:
        check_license(document, plan, destination)
        destination.check(plan)
    size = TaskSize(settings.task_cpus, settings.task_memory, settings.task_device)
    requests = [request_for(plan, size)[0]]
    evaluations = evaluations_of(document)
    if any(isinstance(evaluation, Harness) and evaluation.include_path for evaluation in evaluations):
        raise RecipeError(
            "is not taken by a service: such tasks may run code", where="include_path", remedy="Name built-in tasks."
        )
    for folder in (folder for part in all_of(document.recipe) for folder in part.folders()):
        _admit_output(place_of(folder, settings.working_folder), settings)
    if evaluations or is_open(document.recipe):
        requests.append(measuring_request(plan, size))
    if any(part.trains for part in all_of(document.recipe)):
        requests.append(training_request(plan, size))
    request = max(requests, key=lambda request: request.memory)
    needs = Needs(request.cpus, request.gpus, request.memory)
    if settings.shared_folders and not is_complete(output, plan):  # the same result again is no work
        check_free(output, plan)
        check_disk(plan, output, 0, at_once=len(plan.shards))
    summary = {
        "fingerprint": plan.fingerprint,
        "shards": len(plan.shards),
        "tensors": len(plan.checkpoint.tensors),
        "parameters": plan.parameters,
        "bytes_read": plan.read_size,
        "bytes_written": plan.size,
        "output": str(output) if document.output.path else document.output.push,
        "needs": asdict(needs),
        "notes": list(plan.checkpoint.notes),
        "warnings": list(plan.checkpoint.warnings),
    }
    return Validated(json.loads(json.dumps(document.dump())), document, output, needs, summary)


def _output_of(document: Document, settings: Settings) -> Path:
    """The folder of the result; of one that is only pushed, a name in the first folder that may be written to."""
    if document.output.path is None and document.output.push:
        root = settings.output_roots[0] if settings.output_roots else settings.working_folder
        return root.absolute() / f".pushed-{re.sub('[^A-Za-z0-9]+', '-', document.output.push)}"
    return place_of(output_of(document), settings.working_folder)


def roots_of(settings: Settings) -> Roots:
    """Where models may be read."""
    return Roots(settings.readable_roots)


def place_of(path: Path, working_folder: Path) -> Path:
    """An output path as one that does not depend on where a process runs."""
    return working_folder.absolute() / path


def _admit_output(output: Path, settings: Settings) -> None:
    Roots(settings.output_roots).admit(output, "output.path")
    if output.name in ("", "..") or ".." in output.parts:
        raise RecipeError("must be a plain path without ..", where="output.path")
