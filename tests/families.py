"""What merges of two tiny models of any family do to their files.

`python -m tests.families [--peer] [KIND ...]` examines some, or all, each in a process of its own, and prints a row of
JSON for each; with `--peer` it has mergekit merge the same files too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.family_files import kinds, problems_of, save
from tests.methods.making import make
from tests.tiny import stored

WEIGHTS = (0.25, 0.75)  # exact in binary: their sums in float64 are exact too
DENSITY, T = 0.5, 0.75
# Those that mergekit 0.1.5 loses weights of, renames, or fails on.
MUST_BE_RIGHT = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "llava",
    "llava_onevision",
    "paligemma",
    "aya_vision",
    "mixtral",
    "qwen3_moe",
    "cohere",
    "gpt_neox",
    "falcon",
    "qwen2_vl",
    "whisper",
    "t5",
    "bert",
    "clip",
    "vit",
)


# ---- a row of the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of a family: None where it did not come to that, and the reason why."""

    kind: str
    tensors: int | None = None
    keys_kept: bool | None = None
    values_right: bool | None = None
    slerp: bool | None = None
    ties: bool | None = None
    reloads: bool | None = None
    reason: str = ""
    peer: str = ""  # what mergekit does with the same files

    @property
    def is_right(self) -> bool:
        return bool(self.keys_kept and self.values_right and self.slerp and self.ties and self.reloads)


def examine(kind: str, folder: Path) -> Row:
    """Make two models, sum them, merge them by SLERP and TIES, and look at the files."""
    try:
        a, b = (save(folder / name, kind, seed) for seed, name in enumerate("ab"))
    except Exception as error:
        return Row(kind, reason=f"not built: {_line(error)}")
    sources = stored(a), stored(b)
    kept, wrong = True, {}
    for title, recipe in _recipes(str(a), str(b)).items():
        try:
            merged = stored(make(recipe, folder / title).output)
        except Exception as error:
            return Row(kind, len(sources[0]), reason=f"no {title}: {_line(error)}")
        kept = kept and merged.keys() == sources[0].keys()
        check = CHECKS[title]
        wrong[title] = [name for name in merged if not _is_right(check, merged[name], *(s.get(name) for s in sources))]
    reasons = [f"{title} is wrong: {', '.join(names[:3])}" for title, names in wrong.items() if names]
    reloads, said = _reloads(a, folder / "merged", kind)
    right = [not wrong[title] for title in CHECKS]
    return Row(kind, len(sources[0]), kept, *right, reloads, "; ".join(filter(None, [*reasons, said])))


def _recipes(a: str, b: str) -> dict[str, dict[str, Any]]:
    models: dict[str, Any] = {"models": [{"model": a}, {"model": b}], "base_model": a}
    ties = {"weight": 1, "density": DENSITY}
    return {
        "merged": {"method": "average", "checkpoints": [a, b], "weights": list(WEIGHTS)},
        "slerp": {"merge_method": "slerp", **models, "parameters": {"t": T}},
        "ties": {"merge_method": "ties", **models, "parameters": ties},
    }


Values = np.ndarray[Any, np.dtype[Any]]


def _is_sum(found: Values, a: Values, b: Values) -> bool:
    """The sum in float64, rounded once."""
    wanted = WEIGHTS[0] * a.astype("f8") + WEIGHTS[1] * b.astype("f8")
    return np.array_equal(found, wanted.astype(found.dtype))


def _is_on_the_arc(found: Values, a: Values, b: Values) -> bool:
    """Between the whole tensors as vectors, on a line where they are nearly parallel (Shoemake 1985)."""
    x, y = a.astype("f8").reshape(-1), b.astype("f8").reshape(-1)
    cosine = float(x @ y) / (float(np.linalg.norm(x) * np.linalg.norm(y)) or 1.0)
    angle = np.arccos(np.clip(cosine, -1, 1))
    first, second = (
        (np.sin((1 - T) * angle), np.sin(T * angle)) / np.sin(angle) if abs(cosine) <= 0.9995 else (1 - T, T)
    )
    wanted = first * x + second * y
    return np.allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-5 * float(np.abs(wanted).max(initial=1e-30)))


def _is_trimmed(found: Values, a: Values, b: Values) -> bool:
    """Of one fine-tune TIES leaves the largest changes, so many of each tensor, and no sign outvotes them."""
    change = np.abs(b - a).reshape(-1)
    taken = ~np.isclose(found, a, rtol=0, atol=1e-7).reshape(-1) & (change > 1e-6)
    least = np.sort(change)[::-1][: max(1, int(DENSITY * change.size))][-1]
    if not (taken == (change >= least))[np.abs(change - least) > 1e-6].all():
        return False
    return np.allclose(found.reshape(-1)[taken], b.reshape(-1)[taken], rtol=1e-6, atol=1e-6)


CHECKS = {"merged": _is_sum, "slerp": _is_on_the_arc, "ties": _is_trimmed}


def _is_right(
    check: Callable[[Values, Values, Values], bool],
    found: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
) -> bool:
    if a is None or b is None or found.dtype != a.dtype:
        return False
    return check(found.numpy(), a.numpy(), b.numpy()) if a.dtype.is_floating_point else torch.equal(found, a)


def _reloads(source: Path, output: Path, kind: str) -> tuple[bool | None, str]:
    """Whether the result loads without a word, or with the words that its source is loaded with."""
    try:
        before = problems_of(source, kind)
    except Exception as error:
        return None, f"transformers does not load its own file: {_line(error)}"
    try:
        after = problems_of(output, kind)
    except Exception as error:
        return False, f"not loaded: {_line(error)}"
    if before and before == after:
        return True, f"as its source, transformers' own file: {before[0]}"
    return not after, ", ".join(after[:3])


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:140]}"


# ---- the same by mergekit -----------------------------------------------------------------------------


def peer(folder: Path, kind: str) -> str:
    """What mergekit makes of the two models of `examine`, in a few words."""
    models = [{"model": str(folder / name), "parameters": {"weight": w}} for name, w in zip("ab", WEIGHTS, strict=True)]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    (folder / "peer.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), "peer.yaml", "peer", "--no-copy-tokenizer"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return f"fails: {' '.join(last[-1].split()).replace(f'{folder}/', '')[:110]}" if last else "fails"
    words = _compared(stored(folder / "peer"), stored(folder / "a"), stored(folder / "b"))
    return words if words == "the same" else f"{words}; {_loaded(folder / 'peer', kind)}"


def _loaded(folder: Path, kind: str) -> str:
    """What transformers says to a result with other tensors."""
    try:
        problems = problems_of(folder, kind)
    except Exception as error:
        return f"transformers does not load it: {_line(error)}"
    missing = [problem.partition(" ")[2] for problem in problems if problem.startswith("missing")]
    if missing:
        return (
            f"transformers loads it with {len(missing)} tensors missing, `{missing[0]}` first, and new ones at random"
        )
    return f"transformers loads it with {len(problems)} left over" if problems else "transformers loads it whole"


def _compared(made: dict[str, torch.Tensor], a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    lost, new = [name for name in a if name not in made], [name for name in made if name not in a]
    right = all(
        torch.allclose(made[name].double(), WEIGHTS[0] * a[name].double() + WEIGHTS[1] * b[name].double(), atol=1e-6)
        for name in made
        if name in a
    )
    words = []
    if lost and not new:
        words.append(f"writes {len(made)} of {len(a)} tensors without a word, `{lost[0]}` is the first that is lost")
    elif lost:
        words.append(f"writes {len(made)} tensors for {len(a)}, {len(new)} of them under other names, `{new[0]}` first")
    elif new:
        words.append(f"adds {len(new)}, `{new[0]}` first")
    return "; ".join([*words, *([] if right else ["wrong values"])]) or "the same"


# ---- each in a process of its own ---------------------------------------------------------------------

SECONDS = 60  # for one family; the peer's time comes on top
_PEER_SECONDS = 120


def apart(kind: str, *, with_peer: bool = False) -> Row:
    """`examine` in a child of this process, which may not hang, and may die: some families' defaults explode."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(kind, folder, writing, with_peer=with_peer)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    if said:
        return Row(**json.loads(said))
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return Row(kind, reason=f"not done in {SECONDS} s" if late else "its process died")


def _answer(kind: str, folder: Path, writing: int, *, with_peer: bool) -> None:
    """In the child: examine, write the row, and end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.alarm(SECONDS + _PEER_SECONDS * with_peer)
    row = examine(kind, folder)
    if with_peer and row.tensors:
        row = replace(row, peer=peer(folder, kind))
    os.write(writing, json.dumps(asdict(row)).encode())
    os._exit(0)


def main(words: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads that wait would not live in the children
    with tempfile.TemporaryDirectory() as folder:
        examine("llama", Path(folder))  # what this loads and compiles, the children have
    for kind in [word for word in words if word != "--peer"] or kinds():
        print(json.dumps(asdict(apart(kind, with_peer="--peer" in words))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
