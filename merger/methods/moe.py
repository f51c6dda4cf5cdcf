"""A mixture of experts out of several dense models: what mergekit-moe makes, from the same files.

Knows its fields and what they may be; how the tensors are put together is in `merger.methods.mixture`, how rows of
routers come about in `merger.methods.gates`, which families there are in `merger.methods.outputs`. Names and defaults
are those of mergekit 0.1.5 (mergekit/moe/config.py).
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from merger.checkpoint import Checkpoint
from merger.configs import resolved
from merger.errors import RecipeError
from merger.evaluation import Measured, Prompts
from merger.layers import split
from merger.methods.gates import MEASURED, Mode
from merger.methods.method import Choice, Means, Method, Source, Sources, open_source
from merger.methods.mixture import Assembly, donors_of
from merger.methods.outputs import output_for
from merger.tokenizer import VOCABULARY_FILES


def _reference(value: Any) -> Any:
    """A model as mergekit writes it: a text, or `{model: {path, revision}}`. Raises ValueError."""
    if isinstance(value, dict) and "model" in value and "method" not in value:
        model, lora, others = value["model"], value.get("lora"), value.keys() - {"model", "lora"}
        if others or (isinstance(model, dict) and model.keys() - {"path", "revision"}):
            raise ValueError("takes `model` with `path` and `revision`, and nothing else")
        if isinstance(model, dict):
            model = f"{model.get('path')}@{model['revision']}" if model.get("revision") else model.get("path")
        value = f"{model}+{lora}" if lora else model
    if isinstance(value, str) and "+" in value and not Path(value).expanduser().exists():
        raise ValueError(
            f"{value!r} is a model with an adapter, which experts cannot be yet: "
            "write {method: lora, base: ..., adapters: [...]} instead"
        )
    return value


_Model = Annotated[Source, BeforeValidator(_reference)]


class Expert(BaseModel):
    """A model whose MLPs become one expert of every layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source_model: _Model = Field(description="The model: a folder, a name on the Hub, or a recipe.")
    positive_prompts: list[str] | None = Field(default=None, description="Texts that should come to this expert.")
    negative_prompts: list[str] | None = Field(default=None, description="Texts that should not.")
    noise_scale: float | None = Field(default=None, ge=0, description="Standard deviation of noise on its matrices.")
    residual_scale: float | None = Field(default=None, description="What its output matrix is multiplied by.")

    @property
    def prompts(self) -> tuple[list[str], list[str]]:
        """What is added to its row of the router, and what is subtracted."""
        return self.positive_prompts or [], self.negative_prompts or []


def _plain(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


class Moe(Method):
    """A mixture of experts out of dense models, a file of mergekit-moe as it is: routers follow from prompts."""

    method: Literal["moe"] = "moe"
    base_model: _Model = Field(description="Where everything but the experts comes from, and the tokenizer.")
    experts: list[Expert] = Field(min_length=1, description="One expert of every layer each.")
    gate_mode: Mode = Field(
        default="hidden",
        description="Where rows of the routers come from: hidden states of the base at the last token of the prompts "
        "(hidden, hidden_last), or on average over their tokens (hidden_avg); the tokens' embeddings (cheap_embed); "
        "random numbers, normal (random) or as torch begins with (uniform_random).",
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32", "float64"] | None, BeforeValidator(_plain)] = Field(
        default=None, description="The dtype of the result; that in the base's config without."
    )
    experts_per_token: int = Field(default=2, ge=1, description="How many experts a token takes.")
    shared_experts: list[Expert] | None = Field(default=None, description="One more, which every token takes.")
    architecture: str | None = Field(
        default=None,
        description="How the result's family begins: mixtral, deepseek, qwen, qwen3; or a family of `upcycle`.",
    )
    gate_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="In which dtype the base runs on the prompts."
    )
    seed: int = Field(default=0, ge=0, description="Of noise and of random routers.")
    gates: str | None = Field(default=None, description="Rows of the routers, once a run has measured them.")

    paper: ClassVar[str] = "mergekit-moe of mergekit 0.1.5, arXiv 2403.13257"
    example: ClassVar[str] = (
        "method: moe\nbase_model: models/base\ngate_mode: hidden\nexperts:\n"
        "  - {source_model: models/code, positive_prompts: [a function that sorts]}\n"
        "  - {source_model: models/chat, positive_prompts: [how are you today]}\n"
        "output: {path: out/moe}"
    )

    @property
    def shared(self) -> list[Expert]:
        return self.shared_experts or []

    @property
    def gated(self) -> list[Expert]:
        """Those that have a row: the experts, and a shared one that is given prompts."""
        return [*self.experts, *(expert for expert in self.shared if expert.positive_prompts)]

    def evaluations(self) -> tuple[Measured, ...]:
        if self.gate_mode not in MEASURED or self.gates is not None:
            return ()
        prompts = [expert.prompts for expert in self.gated]
        asked = {"mode": self.gate_mode, "prompts": prompts, "dtype": self.gate_dtype}
        return (Prompts.model_validate(asked),)

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        found = [means.judge.score(self.base_model, evaluation) for evaluation in self.evaluations()]
        return (self.model_copy(update={"gates": found[0].rows}) if found else self), ()

    def build(self, sources: Sources) -> Checkpoint:
        _check(self)
        base = open_source(sources, self.base_model)
        if self.gate_mode in MEASURED and not set(VOCABULARY_FILES) & set(base.side_files):
            raise RecipeError(f"{base.label} has no tokenizer, which prompts need", where="base_model")
        config = resolved(base.config, base.label)
        layers, others = split(base.tensors, config, base.label)
        donors = list(donors_of(self, sources, config, layers))
        family = output_for(self, config, base.label)
        return Assembly(self, base, donors, config, layers, others, family).result()


def _check(recipe: Moe) -> None:
    """Refuse what mergekit-moe refuses. Raises RecipeError with the field's path."""
    count = len(recipe.experts)
    if recipe.experts_per_token > count:
        raise RecipeError(f"is {recipe.experts_per_token}, of {count} experts", where="experts_per_token")
    if recipe.gate_mode not in MEASURED:
        return
    for i, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            remedy = f"gate_mode {recipe.gate_mode} makes its row of the router from them; `random` needs none."
            raise RecipeError("is missing", where=f"experts[{i}].positive_prompts", remedy=remedy)
    if count > 1 and all(expert.prompts == recipe.experts[0].prompts for expert in recipe.experts):
        raise RecipeError(
            "are the same for all experts, so the same ones would get every token",
            where="experts[0].positive_prompts",
            remedy="Give each expert prompts that should come to it.",
        )
