"""Statistics of a model on text, as they lie in a folder: Fisher information, or Gram matrices of what linear layers
are given. Opens and checks them; knows nothing of how they are made or used.

A folder holds safetensors files, whose tensors have the names of the model's, and `statistics.json`, which says of
which model and of which text they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merger.architecture import embedding_of, head_of, ties_embeddings
from merger.checkpoint import Checkpoint, Observed
from merger.dtypes import DTYPES
from merger.errors import FormatError, IncompatibleSources, SourceError
from merger.expression import Expression
from merger.storage.folder import read_json

MANIFEST = "statistics.json"
Kind = Literal["fisher", "gram"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OfModel(_Part):
    """The model: what it was called, where on the Hub it lies, and the digest by which it is known."""

    reference: str
    repository: str = ""
    revision: str = ""
    digest: str


class OfText(_Part):
    """A file of text."""

    name: str
    sha256: str


class OfData(_Part):
    """The text: its files, how it was cut, and how much of it there was."""

    files: list[OfText]
    context: int
    limit: int | None = None
    windows: int
    tokens: int = Field(gt=0)  # by which the statistics were divided


class OfFile(_Part):
    """A file of the statistics."""

    size: int
    header_sha256: str
    sha256: str


class Manifest(_Part):
    """What `statistics.json` says."""

    format: Literal[1] = 1
    kind: Kind
    model: OfModel
    data: OfData
    labels: Literal["model", "data", ""] = ""  # whose labels the likelihood was of (fisher)
    seed: int = 0  # of labels that the model gave
    mean: float = Field(default=0.0, ge=0)  # of all numbers (fisher)
    same: dict[str, str] = {}  # tensors whose statistics stand under another's name: layers with one input
    without: list[str] = []  # floating tensors that have none
    files: dict[str, OfFile]
    versions: dict[str, str]


@dataclass(frozen=True)
class Statistics:
    """Statistics that fit a model."""

    label: str
    manifest: Manifest
    tensors: Mapping[str, Expression]
    tied: Mapping[str, str]  # a head that is tied, and the embedding that it is tied to

    def find(self, name: str) -> Expression | None:
        """Those of a tensor of the model; of a tied head the embedding's. None where there are none."""
        name = name if name in self.tensors or name in self.manifest.same else self.tied.get(name, name)
        return self.tensors.get(self.manifest.same.get(name, name))


def open_statistics(stored: Checkpoint, kind: Kind, model: Checkpoint) -> Statistics:
    """The statistics that lie where `stored` was read, of this model.

    Raises SourceError and FormatError where they are no statistics, IncompatibleSources where they are of another kind
    or of another model, as far as names and shapes tell that.
    """
    manifest = read_manifest(stored)
    if manifest.kind != kind:
        raise IncompatibleSources(
            f"holds statistics of the kind {manifest.kind}, {kind} is what is needed",
            where=stored.label,
            remedy=f"`merger statistics MODEL --kind {kind}` makes them.",
        )
    found = Statistics(stored.label, manifest, stored.tensors, _tied(model))
    _check_tensors(found, model)
    return found


def read_manifest(stored: Checkpoint) -> Manifest:
    """What a folder of statistics says of itself, once its files are seen to be those that it names.

    Raises SourceError and FormatError.
    """
    path = stored.side_files.get(MANIFEST)
    where = f"{stored.label}/{MANIFEST}"
    if path is None:
        remedy = "`merger statistics MODEL --kind fisher --data TEXT -o FOLDER` makes statistics of a model."
        raise SourceError(f"has no {MANIFEST}: it holds no statistics", where=stored.label, remedy=remedy)
    manifest = manifest_in(path, where)
    files = {file.path.name: (file.size, file.header_sha256) for part in stored.parts for file in part.source.files}
    told = {name: (file.size, file.header_sha256) for name, file in manifest.files.items()}
    if files != told:
        odd = min(name for name in files.keys() | told.keys() if files.get(name) != told.get(name))
        raise FormatError(f"is not the file that {MANIFEST} tells of", where=f"{stored.label}/{odd}", remedy=_AGAIN)
    return manifest


def manifest_in(path: Path, where: str = "") -> Manifest:
    """What a file `statistics.json` says. Raises FormatError."""
    where = where or str(path)
    try:
        return Manifest.model_validate(read_json(path, where))
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"]))
        raise FormatError(f"{field}: {detail['msg']}", where=where, remedy=_AGAIN) from error


_AGAIN = "Make the statistics again, or fetch the folder again."


def _tied(model: Checkpoint) -> dict[str, str]:
    """What a head, stored or not, is tied to."""
    embedding = embedding_of(model.tensors)
    head = head_of(model.tensors) or "lm_head.weight"
    return {head: embedding} if embedding and ties_embeddings(model.config) else {}


def _check_tensors(statistics: Statistics, model: Checkpoint) -> None:
    """See that there is what there must be for every tensor, in its shape. Raises IncompatibleSources."""
    manifest = statistics.manifest
    odd = next((name for name in [*statistics.tensors, *manifest.same] if name not in model.tensors), None)
    if odd is not None:
        _refuse(statistics, model, odd, "is not a tensor of the model")
    for name, tensor in model.tensors.items():
        own = statistics.find(name)
        if own is None:
            if DTYPES[tensor.dtype].is_float and manifest.kind == "fisher" and name not in manifest.without:
                _refuse(statistics, model, name, "has no statistics")
            continue
        wanted = tensor.shape if manifest.kind == "fisher" else (tensor.shape[-1],) * 2
        if own.shape != wanted or not DTYPES[own.dtype].is_float:
            _refuse(statistics, model, name, f"has {own.dtype} {list(own.shape)}, needed is {list(wanted)}")


def _refuse(statistics: Statistics, model: Checkpoint, name: str, problem: str) -> None:
    raise IncompatibleSources(
        f"{problem}: they are statistics of another model than {model.label}",
        where=f"{statistics.label}: tensor {name!r}",
        remedy=f"They were made of {statistics.manifest.model.reference}.",
    )


def observed(model: Checkpoint, stored: Checkpoint, given: Checkpoint, digest: str) -> Checkpoint:
    """The model, and the statistics that lie where `given` was read among what it is made of, so that they count in a
    plan, and are seen to be of the model as it is `stored` before data move: by the digest.
    """
    first, *others = model.parts
    files = tuple(file for part in given.parts for file in part.source.files)
    own = Observed(given.label, files, stored, digest)
    source = replace(first.source, observed=(*first.source.observed, own))
    return replace(model, parts=(replace(first, source=source), *others))
