"""What a run tells about itself: the manifest, the model card, the report. Pure: text from values; writes no files."""

import base64
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jinja2
import yaml

import merger
from merger.assessment import Evidence
from merger.checkpoint import Observed, Part, parents_of, root_of
from merger.dtypes import DTYPES
from merger.expression import File, Identical, Stored, WeightedSum
from merger.licenses import verdict
from merger.lineage import front_matter
from merger.plan import Plan
from merger.receipt import Receipt
from merger.remote import Remote
from merger.verify import Check

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("merger"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def _code(text: object) -> str:
    """A name as code in markdown, whatever it holds: inert, on one line."""
    line = re.sub(r"\s", " ", str(text))
    fence = _fence(line, 1)
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _fence(text: str, least: int) -> str:
    """Backticks that nothing in the text closes, `least` of them or more."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _cell(text: str) -> str:
    """Markdown that may stand in a table."""
    return text.replace("|", "\\|")


def _plain(text: object) -> str:
    """A sentence that may hold names: no HTML, on one line."""
    return re.sub(r"\s", " ", str(text)).replace("<", "&lt;")


_TEMPLATES.filters |= {"code": _code, "cell": _cell, "plain": _plain}

NONE = Evidence()


@dataclass(frozen=True)
class Figures:
    """What the run cost: seconds of the writing pass, bytes read and written in it, and how it was done."""

    seconds: float
    read: int
    written: int
    threads: int
    memory: int


def manifest(plan: Plan, receipts: Sequence[Receipt], evidence: Evidence = NONE) -> dict[str, Any]:
    """The content of merger.json: enough to repeat the run and to check its result.

    The same run gives the same text.
    """
    checkpoint = plan.checkpoint
    return {
        "merger": merger.__version__,
        "fingerprint": plan.fingerprint,
        "recipe": dict(plan.recipe),
        "sources": [_source(part) for part in checkpoint.parts],
        "parameters": plan.parameters,
        "shards": [{"file": r.file, "size": r.size, "xxh3": r.xxh3} for r in sorted(receipts, key=lambda r: r.file)],
        "non_finite": {name: count for receipt in receipts for name, count in receipt.non_finite.items()},
        "warnings": list(checkpoint.warnings),
        "notes": list(checkpoint.notes),
        **evidence.as_data(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of everything that takes part in the arithmetic."""
    return {"python": platform.python_version(), "numpy": version("numpy"), "numba": version("numba")}


def _source(part: Part) -> dict[str, Any]:
    source = part.source
    known = {"repository": source.repository, "revision": source.revision, "license": source.card.license}
    return {
        "reference": source.reference,
        **{key: value for key, value in known.items() if value},
        "step": source.step,
        "weight": part.weight,
        "files": _files(source.files),
        **({"statistics": [_statistics(own) for own in source.observed]} if source.observed else {}),
    }


def _statistics(own: Observed) -> dict[str, Any]:
    return {"reference": own.reference, "model_digest": own.digest, "files": _files(own.files)}


def _files(files: Sequence[File]) -> list[dict[str, Any]]:
    return [
        {"name": file.path.name, "size": file.size, "header_sha256": file.header_sha256, **_pinned(file)}
        for file in files
    ]


def _pinned(file: File) -> dict[str, str]:
    """Where a file elsewhere was read, as it was then."""
    return {"address": file.path.address} if isinstance(file.path, Remote) else {}


def model_card(plan: Plan, evidence: Evidence = NONE, *, picture: str = "", extra_tags: Iterable[str] = ()) -> str:
    """The README.md of the result: what it is made of, on which terms, and how to make it again. `picture` is the name
    of a file beside it.
    """
    parents = parents_of(plan.checkpoint)
    judged = verdict(parents)
    front = front_matter(
        parents,
        library=_library(plan),
        license=judged.license,
        is_adapter=plan.checkpoint.is_adapter,
        extra_tags=extra_tags,
    )
    recipe = recipe_text(plan.recipe)
    return _TEMPLATES.get_template("card.md").render(
        front=_yaml(front),
        method=plan.recipe["method"],
        parts=plan.checkpoint.parts,
        has_revisions=any(parent.revision for parent in parents),
        verdict=judged,
        picture=picture,
        recipe=recipe,
        fence=_fence(recipe, 3),
        notes=[*plan.checkpoint.warnings, *plan.checkpoint.notes],
        paragraphs=plan.checkpoint.paragraphs,
        evidence=evidence,
        is_sum=_is_sum(plan),
        claim=origin.says if (origin := root_of(plan.checkpoint)) else "",
        version=merger.__version__,
        fingerprint=plan.fingerprint,
    )


def _is_sum(plan: Plan) -> bool:
    """Whether every tensor is stored in a source, or a weighted sum of such."""
    return all(isinstance(tensor, Stored | WeightedSum | Identical) for tensor in plan.checkpoint.tensors.values())


def notices(plan: Plan) -> dict[str, str]:
    """The file NOTICE that the licences of the sources ask for, where no source brings one."""
    lines = verdict(parents_of(plan.checkpoint)).notices
    if not lines or any(name.startswith("NOTICE") for name in plan.checkpoint.side_files):
        return {}
    return {"NOTICE": "\n".join(lines) + "\n"}


def _library(plan: Plan) -> str:
    """What loads the result, as far as that is known."""
    if plan.checkpoint.is_adapter:
        return "peft"
    return "transformers" if plan.checkpoint.config is not None else ""


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, in the order in which its fields are declared."""
    return _yaml(recipe)


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)


def page(
    plan: Plan, checks: Sequence[Check], figures: Figures, pictures: Mapping[str, bytes], evidence: Evidence = NONE
) -> str:
    """The report: one HTML page that needs nothing beside it."""
    return _TEMPLATES.get_template("report.html").render(
        plan=plan,
        method=plan.recipe["method"],
        dtypes=_dtypes(plan),
        checks=checks,
        evidence=evidence,
        figures=figures,
        pictures={title: base64.b64encode(png).decode() for title, png in pictures.items()},
        recipe=recipe_text(plan.recipe),
        versions={"merger": merger.__version__, **versions()},
    )


def _dtypes(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for tensor in plan.checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda row: -DTYPES[row[0]].bits))
