"""What a recipe says of the vocabulary of a merge: the fields of mergekit's `tokenizer:` (tokenizer/config.py).

Knows fields; knows nothing of files or models.
"""

from typing import Annotated, Any, Literal, Self, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Reference = Union[str, dict[str, Any]]  # as mergekit's: a path or a name, or {model: ..., lora: ...}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Zero(_Settings):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelToken(_Settings):
    """The row of another token."""

    kind: Literal["model_token"]
    model: Reference = Field(description="Whose row.")
    token: str | None = Field(default=None, description="Of which token.")
    token_id: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Of which row.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either `token` or `token_id`")
        return self


def _kind_of_row(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind) if kind in ("zero", "model_token") else "model"


Row = Annotated[
    Union[Annotated[Zero, Tag("zero")], Annotated[ModelToken, Tag("model_token")], Annotated[Reference, Tag("model")]],
    Discriminator(_kind_of_row),
]


class TokenSettings(_Settings):
    """Where the row of a token comes from."""

    source: Row | None = Field(
        default=None, description="A model, `{kind: model_token, ...}` or `{kind: zero}`; without, as for other tokens."
    )
    force: bool = Field(default=False, description="Also in models that have the token.")


class TokenizerSettings(_Settings):
    """The vocabulary of a merge, as mergekit's `tokenizer:` has it; `tokenizer_source: X` is `{source: X}`."""

    source: Reference = Field(default="union", description="union, base, or a model.")
    tokens: dict[str, TokenSettings] | None = Field(default=None, description="Tokens with rows of their own choice.")
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Rows are added, each the mean of all others, up to a multiple of this."
    )
