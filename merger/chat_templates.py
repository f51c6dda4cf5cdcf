"""Chat templates of merges: well-known ones by name, one that a recipe holds, or the one that most models have.

Knows templates and where models keep them; knows nothing of tokens.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from merger.checkpoint import Checkpoint
from merger.errors import RecipeError, SourceError
from merger.tokenizer_files import SETTINGS, TEMPLATES, read

NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
_JINJA, _JSON = TEMPLATES


def template_of(checkpoint: Checkpoint) -> str | None:
    """A model's own template: that of chat_template.jinja, of tokenizer_config.json, or of chat_template.json; of
    several the one called `default`. Raises FormatError and SourceError.
    """
    if _JINJA in checkpoint.texts:
        return checkpoint.texts[_JINJA].strip() or None
    if _JINJA in checkpoint.side_files:
        path = checkpoint.side_files[_JINJA]
        try:
            return path.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"cannot be read: {error}", where=f"{checkpoint.label}: {_JINJA}") from error
    for name in (SETTINGS, _JSON):
        found = _default(read(checkpoint, name).get("chat_template"))
        if found:
            return found
    return None


def _default(value: Any) -> str | None:
    """The template itself, or the default one of several ({name: template}, or a list of {name, template})."""
    if isinstance(value, list):
        value = {it.get("name"): it.get("template") for it in value if isinstance(it, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value.strip() or None if isinstance(value, str) else None


def chosen_template(setting: str, models: Sequence[Checkpoint], base: int | None = None) -> str | None:
    """The template that `chat_template: setting` means; None where it is `auto` and no model has one.

    `auto` takes what most models have; where several templates are as common, the base's, else the first model's.
    Raises RecipeError for what is neither a name nor a template.
    """
    if setting == "auto":
        return _most_common(models, base)
    if setting in NAMES:
        return known_template(setting)
    if "{" not in setting:
        raise RecipeError(
            f"is {setting!r}, which is neither a template nor the name of one",
            where="chat_template",
            remedy=f"Known are auto, {', '.join(NAMES)}; or give the template itself, in Jinja.",
        )
    _check_syntax(setting)
    return setting


def _most_common(models: Sequence[Checkpoint], base: int | None) -> str | None:
    templates = [template_of(model) for model in models]
    counts = Counter(template for template in templates if template)
    if not counts:
        return None
    most = max(counts.values())
    own = templates[base] if base is not None else None
    return own if own and counts[own] == most else next(it for it, count in counts.items() if count == most)


@cache
def known_template(name: str) -> str:
    """A template of `NAMES`."""
    return files("merger").joinpath(f"templates/chat_{name}.jinja").read_text(encoding="utf-8").strip()


def _check_syntax(template: str) -> None:
    """See that it is Jinja, with what transformers adds to it. Raises RecipeError."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """`{% generation %}`, which marks what an assistant says."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads a set)

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    try:
        Environment(extensions=[Generation, loopcontrols], autoescape=False).parse(template)
    except TemplateSyntaxError as error:
        raise RecipeError(
            f"is no Jinja template: {error.message}, line {error.lineno}", where="chat_template", remedy="Correct it."
        ) from error


def with_chat_template(checkpoint: Checkpoint, template: str) -> Checkpoint:
    """The checkpoint with this template as chat_template.jinja, and in no other place."""
    texts = {name: text for name, text in checkpoint.texts.items() if name not in TEMPLATES}
    settings = read(checkpoint, SETTINGS)
    if "chat_template" in settings:
        kept = {key: value for key, value in settings.items() if key != "chat_template"}
        texts[SETTINGS] = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
    side_files = {name: path for name, path in checkpoint.side_files.items() if name not in TEMPLATES}
    return replace(checkpoint, texts={**texts, _JINJA: template}, side_files=side_files)
