"""Recipes as people write them: text in, a checkpoint of expressions out.

Knows YAML, fields and local paths; reads headers only.

A document is a recipe with `output`. Paths are relative to the folder in which the command runs.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, TypeAdapter, ValidationError, field_validator

from merger import mergekit_config
from merger.baklava import Baklava
from merger.checkpoint import Checkpoint, in_dtype, with_license_files, without_code
from merger.dtypes import FROM_TORCH
from merger.errors import IncompatibleSources, RecipeError, SourceError, UnsupportedModel
from merger.evaluation import TASKS, Evaluation, Measured
from merger.mergekit_files import combined, result_of
from merger.methods import METHODS
from merger.methods.averaging import Track
from merger.methods.fine_tunes import Weighted
from merger.methods.informed import Informed
from merger.methods.method import BESIDE, Choice, Means, Member, Method, Sources, all_evaluations, path_of, settled
from merger.methods.moe import Expert
from merger.plan import ELSEWHERE
from merger.quantized import dequantized
from merger.recycling import Recycling
from merger.sources import LocalSources
from merger.tokenizer import difference


class Output(BaseModel):
    """Where the result goes and in what form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, description="The folder to make; -o on the command line says it too.")
    dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = Field(
        default=None, description="The dtype of floating tensors; that of the sources without."
    )
    shard_size: str | int = Field(default="5GB", description="The most bytes of tensors in one file.")
    side_files_from: str | None = Field(
        default=None,
        description="The model whose config, tokenizer and other side files to take; the first source's without.",
    )
    push: str | None = Field(
        default=None,
        description="Where to publish the result, in one step: hf://me/name on the Hub, which is made, or s3://bucket/folder.",
    )
    branch: str | None = Field(default=None, description="The branch to push to, which is made; main without.")
    create_pr: bool = Field(default=False, description="Whether to open a pull request instead of committing.")
    private: bool = Field(default=True, description="Whether a repository that is made is private.")
    drop_code: bool = Field(
        default=False,
        description="Whether models on the Hub may be used that bring code of their own, which is never run or kept.",
    )
    accept_license: bool = Field(
        default=False,
        description="Whether you have read what the licences of the sources ask for, and may pass the result on.",
    )

    @field_validator("shard_size")
    @classmethod
    def _a_size(cls, value: str | int) -> str | int:
        size_in_bytes(value)
        return value


class Document(BaseModel):
    """A recipe, its output, and what the result must measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: SerializeAsAny[Method]
    output: Output
    evaluate: SerializeAsAny[Measured] | None = None

    def dump(self) -> dict[str, Any]:
        """The document as plain data, every default written out."""
        recipe = self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        evaluate = {"evaluate": self.evaluate.model_dump(mode="json", exclude_none=True)} if self.evaluate else {}
        silent = {name for name in ELSEWHERE if getattr(self.output, name) == Output.model_fields[name].default}
        output = {"output": self.output.model_dump(exclude_none=True, exclude=silent)}
        return {"method": self.recipe.method, **recipe, **evaluate, **output}


_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def size_in_bytes(text: str | int) -> int:
    """`5GB`, `512 MiB`, `1000` as bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size such as 5GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


# ---- text to document ---------------------------------------------------------------------------------


def read_document(path: Path, changes: Sequence[str] = ()) -> Document:
    """The document in a YAML (or JSON) file, with `changes` such as `k=8` or `output.dtype=float16` made to it.

    Raises RecipeError with the field's path, SourceError where the file cannot be read.
    """
    return make_document(read_content(path, changes))


def read_content(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data in a recipe's file, with changes made to it. Raises RecipeError and SourceError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"cannot be read: {cause}", where=str(path), remedy="Give the path of a recipe.") from error
    return _parse(text, changes, str(path))


def parse_document(text: str, changes: Sequence[str] = (), *, where: str = "recipe") -> Document:
    """The document in a text. Raises RecipeError with the field's path."""
    return make_document(_parse(text, changes, where))


def _parse(text: str, changes: Sequence[str], where: str) -> dict[str, Any]:
    try:
        documents = list(yaml.load_all(text, Loader=_UniqueKeys))  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(
            f"is not YAML: {error}", where=where, remedy="Mind indentation, colons and quotes."
        ) from error
    documents = [document for document in documents if document is not None]
    content = documents[0] if len(documents) == 1 else result_of(documents) if documents else None
    if not isinstance(content, dict):
        raise RecipeError("is not a mapping of fields", where=where)
    for change in changes:
        _apply(content, change)
    return combined(documents, content) if len(documents) > 1 else content


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the silent loss of a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _apply(content: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    if not equals:
        raise RecipeError("must look like field=value", where=f"--set {change}")
    *parents, last = _steps(path)
    place: Any = content
    for step in parents:
        place = _inside(place, step)
    if not _leads_on(place, last):
        raise RecipeError("does not lead to a field", where=f"--set {change}")
    place[last] = yaml.safe_load(value)


def _steps(path: str) -> list[str | int]:
    """`models[1].weight` as models, 1, weight."""
    return [
        int(step[1:-1]) if re.fullmatch(r"\[\d+\]", step) else step
        for key in path.split(".")
        for step in (re.findall(r"^[^\[\]]+|\[\d+\]", key) if re.fullmatch(r"[^\[\]]+(\[\d+\])+", key) else [key])
    ]


def _inside(place: Any, step: str | int) -> Any:
    """What a step leads to, None where it leads nowhere. Mappings are made, lists are not."""
    if isinstance(step, str):
        return place.setdefault(step, {}) if isinstance(place, dict) else None
    return place[step] if _leads_on(place, step) else None


def _leads_on(place: Any, step: str | int) -> bool:
    return isinstance(place, dict) if isinstance(step, str) else isinstance(place, list) and step < len(place)


def make_document(content: Mapping[str, Any]) -> Document:
    """The document of plain data. Raises RecipeError with the field's path."""
    if "method" not in content and isinstance(content.get("experts"), list):
        content = {"method": "moe", **content}  # a file of mergekit-moe
    if not {"method", "merge_method"} & content.keys():
        keys = [str(key) for key in content]
        close = difflib.get_close_matches("method", keys, 1) or difflib.get_close_matches("merge_method", keys, 1)
        hint = f"; {close[0]!r} is not a field, did you mean {_meant(close[0])!r}?" if close else ""
        raise RecipeError(f"is missing{hint}", where="method", remedy=_METHODS_REMEDY)
    parts = {"": {key: value for key, value in content.items() if key not in ("output", "evaluate")}}
    parts |= {key: content.get(key, {}) for key in ("output", "evaluate")}
    root = ""
    try:
        recipe = Method.model_validate(parts[root])
        root = "output"
        output = Output.model_validate(parts[root])
        root = "evaluate"
        evaluate = _EVALUATION.validate_python(parts[root]) if root in content else None
    except ValidationError as error:
        raise _explain(error, parts[root], root) from error
    return Document(recipe=recipe, output=output, evaluate=evaluate)


def _meant(key: str) -> str:
    return difflib.get_close_matches(key, ["method", "merge_method"], 1)[0]


_EVALUATION: TypeAdapter[Measured] = TypeAdapter(Evaluation)
_METHODS_REMEDY = "`merger methods` lists them, with an example of each."


def _explain(error: ValidationError, content: Any, root: str) -> RecipeError:
    """The first mistake, an unknown key before all others, as one sentence with the field's path."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] not in ("extra_forbidden", "unknown_method"))
    detail = details[0]
    path, holder, recipe = _path_of(detail["loc"], content)
    where = ".".join(part for part in (root, path) if part)
    remedy = f"`output` has the fields {', '.join(Output.model_fields)}." if root == "output" else ""
    if detail["type"] == "unknown_method":
        name = detail["ctx"]["name"]
        return RecipeError(
            f"{name!r} is no method{_suggest(name, METHODS)}", where=_join(where, "method"), remedy=_METHODS_REMEDY
        )
    if detail["type"] == "extra_forbidden":
        known = _fields_of(holder, recipe, root, path)
        return RecipeError(f"is not a field{_suggest(path.rpartition('.')[2], known)}", where=where, remedy=remedy)
    if detail["type"] == "recipe":
        said = detail["ctx"]
        return RecipeError(said["message"], where=".".join(filter(None, (where, said["where"]))), remedy=said["remedy"])
    message = detail["msg"].removeprefix("Value error, ")
    return RecipeError(f"{message[0].lower()}{message[1:]}", where=where or "recipe", remedy=remedy)


def _path_of(location: Sequence[str | int], content: Any) -> tuple[str, Any, Any]:
    """The path as it stands in the document, without pydantic's tags, what holds its last field, and the recipe or
    configuration in which that is.
    """
    path, holder, recipe = "", content, content
    for i, key in enumerate(location):
        last = i == len(location) - 1
        if isinstance(content, Mapping) and (key in content or last):
            recipe = content if {"method", "merge_method"} & content.keys() else recipe
            path, holder, content = _join(path, str(key)), content, content.get(key)
        elif isinstance(content, list) and isinstance(key, int) and key < len(content):
            path, content = f"{path}[{key}]", content[key]
    return path, holder, recipe


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _fields_of(holder: Any, recipe: Any, root: str, path: str) -> list[str]:
    """The fields that the mapping at fault may have."""
    if root == "output" or not isinstance(holder, Mapping):
        return list(Output.model_fields)
    if re.search(r"(^|\.)training\.[^.]*$", path):
        return list((Baklava if {"checkpoints", "data"} & holder.keys() else Recycling).model_fields)
    if "task" in holder:
        return list(TASKS[holder["task"]].model_fields)
    if "merge_method" in recipe:
        return [*mergekit_config.fields_of(path.rpartition(".")[0]), *([*BESIDE] if "merge_method" in holder else [])]
    if "source_model" in holder:
        return list(Expert.model_fields)
    entry = Informed if recipe.get("method") in ("fisher", "regmean") else Weighted
    kind = METHODS[holder["method"]] if "method" in holder else entry if "source" in holder else Track
    return [field.alias or name for name, field in kind.model_fields.items()]


def _suggest(name: object, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


# ---- document to checkpoint ---------------------------------------------------------------------------


def resolve(document: Document, sources: Sources | None = None) -> Checkpoint:
    """The checkpoint that a document describes, in the dtype and with the side files that it asks for.

    Raises RequestError: everything that can be known from configs and headers is refused here.
    """
    sources = sources or LocalSources()
    try:
        checkpoint = document.recipe.build(sources)
    except RecipeError as error:
        path = path_of(document.recipe, error.within) if error.within else ""
        if path and re.fullmatch(r"[\w.\[\]-]*", error.where):
            error.where = f"{path}.{error.where}".rstrip(".")
        raise
    if document.output.side_files_from:
        giver = sources.open(Member(document.output.side_files_from, None))
        checkpoint = _with_side_files(checkpoint, giver)
    _check_code(document, checkpoint)
    if document.output.drop_code:
        checkpoint = without_code(checkpoint)
    if document.output.dtype:
        checkpoint = in_dtype(dequantized(checkpoint), FROM_TORCH[document.output.dtype])
    return with_license_files(checkpoint)


def _check_code(document: Document, checkpoint: Checkpoint) -> None:
    """See that nobody takes a stranger's model for one that works without the stranger's code.

    Raises UnsupportedModel.
    """
    for part in checkpoint.parts:
        if part.source.has_code and part.source.repository and not document.output.drop_code:
            raise UnsupportedModel(
                "brings code of its own (auto_map), which merger neither runs nor passes on",
                where=part.source.reference,
                remedy="Where transformers knows the architecture without it, say `output.drop_code: true`.",
            )


def evaluations_of(document: Document) -> list[Measured]:
    """By what the recipes choose, and what the result is measured by."""
    return [*all_evaluations(document.recipe), *([document.evaluate] if document.evaluate else [])]


def check_evaluations(document: Document, sources: Sources) -> None:
    """See that everything that will be measured can be: data that may be read and are there, models to compare with.

    Raises RequestError.
    """
    for evaluation in evaluations_of(document):
        for path in evaluation.files:
            sources.admit(path)
            if not path.is_file():
                raise SourceError("is not there", where=str(path), remedy="Give the path of the data to measure with.")
        for name in evaluation.better_than:
            if name not in ("source", "sources"):
                sources.open(Member(name, None))


def settle(document: Document, means: Means) -> tuple[Document, tuple[Choice, ...]]:
    """The document with its models trained and all choices made. Raises RequestError and JobError."""
    recipe, choices = settled(document.recipe, means)
    return document.model_copy(update={"recipe": recipe}), choices


def _with_side_files(checkpoint: Checkpoint, giver: Checkpoint) -> Checkpoint:
    problem = difference(checkpoint.side_files, giver.side_files)
    if problem:
        raise IncompatibleSources(f"{giver.label} has another vocabulary: {problem}", where="output.side_files_from")
    for name in giver.tensors.keys() & checkpoint.tensors.keys():
        if giver.tensors[name].shape != checkpoint.tensors[name].shape:
            raise IncompatibleSources(f"{giver.label} has another shape of {name}", where="output.side_files_from")
    return checkpoint.with_side_files_of(giver)
