"""Chat templates: the text by which a tokenizer writes a conversation. Knows the files in which it stands.

Text in, text out: nothing of a template is run.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from merger.errors import RecipeError, SourceError

TEMPLATE = "chat_template.jinja"  # counts more than what tokenizer_config.json says
_FIELD = "chat_template"
_SHORTEST = 20  # characters of what may be a template, as in mergekit


def template_for(asked: str, models: Sequence[Mapping[str, Path]]) -> str:
    """The template that is asked for: `auto` for the one that most models have, of several the first, or its text.

    `models` map the names of side files to their paths. Raises RecipeError and SourceError.
    """
    if asked == "auto":
        found = [template for template in map(template_of, models) if template]
        if not found:
            raise RecipeError("no model has a template to choose", where=_FIELD, remedy="Leave it out, or write one.")
        return Counter(found).most_common(1)[0][0]
    if len(asked) < _SHORTEST or "{" not in asked:
        raise RecipeError(
            f"{asked!r} is no template",
            where=_FIELD,
            remedy="Say auto, or write the template itself; the names that mergekit has for some do not work here.",
        )
    return asked


def template_of(files: Mapping[str, Path]) -> str | None:
    """The default template of a model, without space around it; None where it has none. Raises SourceError."""
    if TEMPLATE in files:
        return files[TEMPLATE].read_text(encoding="utf-8").strip()
    if "tokenizer_config.json" not in files:
        return None
    path = files["tokenizer_config.json"]
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(_FIELD)
    except (ValueError, AttributeError) as error:
        raise SourceError(f"is not JSON with fields: {error}", where=str(path)) from error
    if isinstance(found, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found.strip() if isinstance(found, str) and found.strip() else None
