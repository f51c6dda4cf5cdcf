"""LoRA adapters out of fine-tunes: the nearest change of a low rank to what training has changed.

Knows which tensors are matrices of linear modules and what PEFT calls their factors; the decomposition is
`merger.spectra`'s.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field

from merger import spectra
from merger.adapters import names_of
from merger.architecture import embedding_of, head_of
from merger.checkpoint import Checkpoint, Kin, Part
from merger.dtypes import DTYPES
from merger.errors import IncompatibleSources, NotInstalled, UnsupportedModel
from merger.expression import Expression, Identical, combine
from merger.methods.fine_tunes import check_function
from merger.methods.method import Method, Source, Sources, open_source
from merger.whole import Function, Tensors, Whole, loading
from merger.whole import Part as PartOf

# Fused experts, and routers, which are no linear modules in memory whatever their names in files.
_NOT_LINEAR = re.compile(r"\.experts\.|(^|\.)(gate|router)\.weight$|router\.")
_INPUT_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@final
@dataclass(frozen=True, slots=True)
class LowRank(Function):
    """The factors of the best approximation of a rank, B [m, rank] and then A [rank, n], filled up with zeros where the
    matrix has no such rank.
    """

    rank: int
    seed: int

    def memory(self, inputs: Sequence[Expression]) -> int:
        m, n = inputs[0].shape
        k = min(m, n)
        exact = k <= 512 or 3 * self.rank >= k - 32
        words = m * n + k * (m + n) + 6 * k * k if exact else 2 * m * n + 8 * (self.rank + 16) * (m + n)
        return loading(inputs[0]) + 8 * (words + 2 * self.rank * (m + n))

    def __call__(self, tensors: Tensors) -> Any:

        matrix = tensors.load(0)
        b, a = spectra.low_rank(matrix, self.rank, self.seed)
        both = matrix.new_zeros(self.rank * sum(matrix.shape))
        both[: matrix.shape[0] * self.rank].view(matrix.shape[0], self.rank)[:, : b.shape[1]] = b
        both[matrix.shape[0] * self.rank :].view(self.rank, matrix.shape[1])[: a.shape[0]] = a
        return both


class ExtractLora(Method):
    """A LoRA adapter out of a fine-tune: of each matrix's change the best approximation of a rank."""

    method: Literal["extract_lora"] = "extract_lora"
    model: Source = Field(description="The fine-tune.")
    base: Source = Field(description="The model that it started from, which the adapter will be put on.")
    rank: Annotated[int, Field(ge=1)] = Field(default=32, description="The adapter's rank.")
    modules: str = Field(
        default="", description="A regular expression: only matrices whose name it is found in; all without."
    )
    seed: int = Field(default=0, description="Of the randomized decomposition of large matrices.")

    paper: ClassVar[str] = "LoRA, arXiv 2106.09685; randomized decompositions, arXiv 0909.4061"
    example: ClassVar[str] = (
        "method: extract_lora\nmodel: models/tuned\nbase: models/base\nrank: 32\noutput: {path: out/adapter}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        if find_spec("torch") is None:
            raise NotInstalled("decompositions of matrices need torch", where="torch")
        model, base = open_source(sources, self.model), open_source(sources, self.base)
        self._check(model, base)
        linear = [name for name in base.tensors if self._is_linear(name, base)]
        if not linear:
            raise UnsupportedModel("has no matrices of linear modules to change", where=base.label)
        modules = [name for name in linear if model.tensors[name] != base.tensors[name]]
        if not modules:
            raise IncompatibleSources(f"equals its base {base.label}: there is nothing to extract", where=model.label)
        tensors: dict[str, Expression] = {}
        for name in modules:
            tensors |= self._factors(name, model, base)
        rest = [n for n in base.tensors if n not in modules and not isinstance(base.tensors[n], Identical)]
        lost = (
            [f"{len(rest)} tensors are no matrices of linear modules, {rest[0]} first: what changed there is lost"]
            if rest
            else []
        )
        return Checkpoint(
            tensors,
            self._config(base, [name.removesuffix(".weight") for name in modules]),
            model.side_files,
            (*model.parts, *(Part(part.source, -part.weight) for part in base.parts)),
            notes=(*model.notes, *lost),
            warnings=model.warnings,
            label=model.label,
            kin=(*model.kin, *base.kin, Kin((model,), base)),
        )

    def _check(self, model: Checkpoint, base: Checkpoint) -> None:
        for found in (model, base):
            if found.is_adapter or "quantization_config" in (found.config or {}):
                what = "an adapter already" if found.is_adapter else "quantized: its stored numbers are not its weights"
                raise UnsupportedModel(f"is {what}", where=found.label, remedy="Name a whole model in full precision.")
            if (found.config or {}).get("model_type") in _INPUT_FIRST:
                raise UnsupportedModel(
                    "keeps its matrices with inputs first, which adapters are not extracted from", where=found.label
                )
        check_function(base, model)
        for name, tensor in base.tensors.items():
            if not self._is_linear(name, base):
                continue
            if name not in model.tensors or model.tensors[name].shape != tensor.shape:
                found_shape = model.tensors[name].shape if name in model.tensors else "missing"
                raise IncompatibleSources(
                    f"is {found_shape} in {model.label} and {tensor.shape} in {base.label}",
                    where=f"tensor {name!r}",
                    remedy="An adapter can only be extracted from a fine-tune of this very base.",
                )

    def _is_linear(self, name: str, base: Checkpoint) -> bool:
        tensor = base.tensors[name]
        if len(tensor.shape) != 2 or not name.endswith(".weight") or not DTYPES[tensor.dtype].is_float:
            return False
        if name in (embedding_of(base.tensors), head_of(base.tensors)) or "embed" in name or _NOT_LINEAR.search(name):
            return False
        return re.search(self.modules, name) is not None

    def _factors(self, name: str, model: Checkpoint, base: Checkpoint) -> Mapping[str, Expression]:
        m, n = base.tensors[name].shape
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        function = LowRank(self.rank, int.from_bytes(digest[:7], "little"))
        change = combine([(1.0, model.tensors[name]), (-1.0, base.tensors[name])], "F64")
        both = Whole("F32", (self.rank * (m + n),), (change,), function, name)
        a = PartOf("F32", (self.rank, n), both, m * self.rank)
        b = PartOf("F32", (m, self.rank), both, 0)
        return dict(zip(names_of(name.removesuffix(".weight"), False), (a, b), strict=True))

    def _config(self, base: Checkpoint, modules: Sequence[str]) -> dict[str, Any]:
        [kind, *_] = (base.config or {}).get("architectures") or [""]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None,
            "base_model_name_or_path": base.label,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "target_modules": list(modules),
            "rank_pattern": {},
            "alpha_pattern": {},
            "inference_mode": True,
        }
