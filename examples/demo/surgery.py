"""Makes a mixture of experts and a deeper model of the last checkpoint, and trains both and the checkpoint itself on.

Knows the recipes beside it and what of each model is trained. All three see the same batches in the same order; the
upcycled one and the dense one train all weights, the expanded one its new layers only, as the papers have it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from evaluate import HeldOut, Score, load, score_model
from service import merger
from train import Settings, optimise, tokenize
from transformers import AutoTokenizer, PreTrainedModel

RECIPES = Path(__file__).resolve().parent
STEPS, EVERY = 240, 40
SEED_SHIFT = 1  # other batches than those of the training


@dataclass(frozen=True)
class Continued:
    """What became of a model: its scores by the steps since, its parameters, those trained, and the seconds it took."""

    scores: Mapping[int, Score]
    parameters: int
    trained: int
    seconds: float
    proof: str


def operate(out: Path, last: Path) -> dict[str, tuple[Path, str]]:
    """Runs both recipes; the folders by name, each with what its proof of parity said."""
    made = {"dense": (last, "")}
    for name, recipe, folder in (("upcycled", "upcycle.yaml", "upcycled"), ("expanded", "expand.yaml", "expanded")):
        made[name] = (out / folder, _run(RECIPES / recipe, out / folder))
    return made


def _run(recipe: Path, output: Path) -> str:
    if output.exists():
        shutil.rmtree(output)
    path = recipe.relative_to(Path.cwd())
    print("$", "merger run", path, flush=True)
    done = subprocess.run([merger(), "run", path, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"merger run {path} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    [parity] = [check["detail"] for check in json.loads(done.stdout)["checks"] if check["name"] == "parity"]
    print(f"  {parity}", flush=True)
    return str(parity)


def continue_all(
    models: Mapping[str, tuple[Path, str]], texts: list[str], held_out: HeldOut, settings: Settings
) -> dict[str, Continued]:
    """Trains every model on, from the same batches, and scores it every few steps."""
    settings = replace(settings, seed=settings.seed + SEED_SHIFT, steps=STEPS, every=EVERY)
    return {name: _continue(name, folder, proof, texts, held_out, settings) for name, (folder, proof) in models.items()}


def _continue(
    name: str, folder: Path, proof: str, texts: list[str], held_out: HeldOut, settings: Settings
) -> Continued:
    torch.manual_seed(settings.seed)
    model = load(folder)
    tokens = tokenize(texts, AutoTokenizer.from_pretrained(folder))
    trained = _choose_trained(model, folder)
    print(f"training the {name} model on for {settings.steps} steps, {trained / 1e6:.1f} M parameters", flush=True)
    scores = {0: score_model(model.eval(), held_out)}
    begun, paused = time.monotonic(), 0.0
    for step in optimise(model, tokens, settings):
        if step % settings.every == 0:
            since = time.monotonic()
            scores[step] = score_model(model.eval(), held_out)
            model.train()
            paused += time.monotonic() - since
    seconds = time.monotonic() - begun - paused
    return Continued(scores, sum(p.numel() for p in model.parameters()), trained, seconds, proof)


def _choose_trained(model: PreTrainedModel, folder: Path) -> int:
    """Freezes what is not to be trained, turns on the loss that balances experts; how many parameters are left."""
    manifest = folder / "trainable.json"
    pattern = json.loads(manifest.read_text())["pattern"] if manifest.is_file() else ""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = bool(re.match(pattern, name))
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.output_router_logits = True
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
