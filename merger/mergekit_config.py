"""mergekit's configurations as data: their fields, and what a reference says. Knows no rules, no models and no files.

The fields are those of mergekit 0.1.5 (`mergekit/config.py`). Unknown keys, which it ignores, are errors here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, Union

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from merger.dtypes import FROM_TORCH
from merger.mergekit_settings import Conditional, Parameters, Part
from merger.vocabulary_settings import ModelToken, TokenizerSettings, TokenSettings

# ---- references ---------------------------------------------------------------------------------------


class Path(Part):
    """A model's folder or its name on the Hub, and a revision there."""

    path: str = Field(min_length=1, description="A folder, or org/name on the Hub.")
    revision: str | None = Field(default=None, description="A branch, a tag or a commit.")


class Model(Part):
    """A model, with an adapter or without."""

    model: str | Path = Field(description="The model.")
    lora: str | Path | None = Field(default=None, description="An adapter to add to it.")


Ref = Annotated[
    Union[Annotated[str, Field(min_length=1), Tag("text")], Annotated[Model, Tag("mapping")]],
    Discriminator(lambda value: "text" if isinstance(value, str) else "mapping"),
]


@dataclass(frozen=True)
class Reference:
    """A model as a configuration names it: its folder or name, a revision of it, an adapter and its revision."""

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        revision, lora = (f"@{text}" if text else "" for text in (self.revision, self.lora_revision))
        return f"{self.path}{revision}" + (f"+{self.lora}{lora}" if self.lora else "")


def reference_of(ref: str | Model) -> Reference:
    """The reference in a text (`path`, `path@revision`, `path+adapter`) or a mapping. Raises ValueError."""
    if isinstance(ref, str):
        model, plus, lora = ref.partition("+")
        if plus and (not lora or "+" in lora):
            raise ValueError(f"{ref!r} must look like model+adapter")
        return Reference(*_split(model), *(_split(lora) if lora else ()))
    return Reference(*_split(ref.model), *(_split(ref.lora) if ref.lora else ()))


def _split(text: str | Path) -> tuple[str, str | None]:
    if isinstance(text, Path):
        return text.path, text.revision
    path, at, revision = text.partition("@")
    if "@" in revision or (at and not (path and revision)):
        raise ValueError(f"{text!r} must look like model@revision")
    return path, revision or None


# ---- the configuration --------------------------------------------------------------------------------


class InputModel(Part):
    """A model that takes part with all of its layers."""

    model: Ref = Field(description="A folder, org/name[@revision], model+adapter, or a mapping.")
    parameters: Parameters | None = Field(default=None, description="Settings for this model.")


class InputSlice(Part):
    """Layers of a model that take part in a slice."""

    model: Ref = Field(description="A folder, org/name[@revision], model+adapter, or a mapping.")
    layer_range: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        description="The first layer, from 0, and the one after the last."
    )
    parameters: Parameters | None = Field(default=None, description="Settings for this model in this slice.")

    @model_validator(mode="after")
    def _some_layers(self) -> Self:
        if self.layer_range[0] >= self.layer_range[1]:
            raise ValueError(f"layer_range {list(self.layer_range)} names no layer")
        return self


class OutputSlice(Part):
    """Layers of the result, each made of one layer of every source."""

    sources: list[InputSlice] = Field(min_length=1, description="Which layers of which models.")
    base_model: Ref | None = Field(default=None, description="Another base for this slice.")
    parameters: Parameters | None = Field(default=None, description="Settings for this slice.")


class Made(Part):
    """Something that is made of models or of slices."""

    models: list[InputModel] | None = Field(default=None, min_length=1, description="Models to merge whole.")
    slices: list[OutputSlice] | None = Field(
        default=None, min_length=1, description="What comes one above the other, from layers of models."
    )
    parameters: Parameters | None = Field(default=None, description="Settings: a value, a gradient, or filters.")


class Module(Made):
    """A part of a model that has several, such as a vision tower."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.models is None) == (self.slices is None):
            raise ValueError("needs exactly one of models and slices")
        return self


Dtype = Literal["bfloat16", "float16", "float32", "float64"]


class Configuration(Made):
    """What a mergekit file says."""

    merge_method: str = Field(description="The rule by which tensors are merged; they are listed below.")
    base_model: Ref | None = Field(default=None, description="The base, which gives config and tokenizer too.")
    modules: dict[str, Module] | None = Field(default=None, min_length=1, description="Parts of a model, by name.")
    dtype: Dtype | None = Field(default=None, description="The dtype of the result, unless out_dtype is given.")
    out_dtype: Dtype | None = Field(default=None, description="The dtype of the result.")
    tokenizer_source: Ref | None = Field(default=None, description="union, base, or a model.")
    tokenizer: TokenizerSettings | None = Field(default=None, description="The vocabulary of the result.")
    chat_template: str | None = Field(default=None, description="auto, a name, or a Jinja template.")
    name: str | None = Field(default=None, min_length=1, description="What other configurations of the file call it.")

    @model_validator(mode="before")
    @classmethod
    def _plain_dtypes(cls, value: Any) -> Any:
        """`torch.bfloat16` is bfloat16."""
        if not isinstance(value, Mapping):
            return value
        said = {key: value[key] for key in ("dtype", "out_dtype") if isinstance(value.get(key), str)}
        return {**value, **{key: text.removeprefix("torch.") for key, text in said.items()}}

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(part is not None for part in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("needs exactly one of models, slices and modules")
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("tokenizer and tokenizer_source exclude each other")
        return self

    @property
    def result_dtype(self) -> str | None:
        """The dtype that is asked for, by the format's name."""
        asked = self.out_dtype or self.dtype
        return FROM_TORCH[asked] if asked else None

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """What is asked for of the result's tokens; None where they stay as they are."""
        if self.tokenizer_source:
            source = self.tokenizer_source
            return TokenizerSettings(source=source if isinstance(source, str) else source.model_dump())
        return self.tokenizer

    @property
    def made(self) -> dict[str, "Made"]:
        """What is made, by the path of its field: the whole (an empty path), or every module."""
        return {f"modules.{name}": part for name, part in self.modules.items()} if self.modules else {"": self}


def references(config: Configuration) -> Iterator[tuple[str, str | Model]]:
    """Every model that a configuration names for its weights, in the order in which it does, with the field's path."""
    for path, made in config.made.items():
        start = f"{path}." if path else ""
        for i, model in enumerate(made.models or ()):
            yield f"{start}models[{i}].model", model.model
        for i, part in enumerate(made.slices or ()):
            for j, source in enumerate(part.sources):
                yield f"{start}slices[{i}].sources[{j}].model", source.model
            if part.base_model:
                yield f"{start}slices[{i}].base_model", part.base_model
    if config.base_model:
        yield "base_model", config.base_model


_FIELDS: tuple[tuple[str, type[BaseModel]], ...] = (
    (r"parameters\.[^.\[]+(\[\d+\])?$", Conditional),
    (r"model\.(model|lora)$|lora$", Path),
    (r"(model|base_model|tokenizer_source)$", Model),
    (r"sources\[\d+\]$", InputSlice),
    (r"slices\[\d+\]$", OutputSlice),
    (r"models\[\d+\]$", InputModel),
    (r"tokens\.[^.]+$", TokenSettings),
    (r"tokens\.[^.]+\.source$", ModelToken),
    (r"tokenizer$", TokenizerSettings),
    (r"modules\.[^.]+$", Module),
)


def fields_of(path: str) -> list[str]:
    """The fields of the mapping at a path of a configuration."""
    kind = next((kind for pattern, kind in _FIELDS if re.search(rf"(^|\.){pattern}", path)), Configuration)
    return list(kind.model_fields)
