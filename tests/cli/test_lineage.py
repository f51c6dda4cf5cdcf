"""Lineage from end to end: models on a Hub, the command, the card that the Hub's client reads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard

from tests.checkpoints import write_model
from tests.hub_server.fixtures import environment, hub


def model(folder: Path, license: str, **more: str) -> Path:
    texts = {"README.md": f"---\nlicense: {license}\nlanguage: en\n---\n# x\n", "LICENSE": f"The terms of {license}."}
    tensors = {"model.norm.weight": np.ones(4, np.float32)}
    return write_model(folder, tensors, {"model_type": "llama"}, side_files={**texts, **more})


def test_models_on_the_hub_stand_in_the_card_with_commit_and_licence(tmp_path):
    with hub(tmp_path, process=True) as server:
        commit = server.add_model("org/llama", model(tmp_path / "a", "llama3.1"), gated=True)
        own = model(tmp_path / "b" / "step-2", "mit")
        for name in ("README.md", "LICENSE"):  # of the repository, not of the folder in it
            (own / name).rename(tmp_path / "b" / name)
        server.add_model("org/run", tmp_path / "b")
        (tmp_path / "recipe.yaml").write_text("method: average\ncheckpoints: [org/llama, hf://org/run/step-2]\n")

        def merger(*arguments: str) -> str:
            command = [sys.executable, "-m", "merger", *arguments]
            variables = environment(server, tmp_path)
            done = subprocess.run(
                command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        verdict = json.loads(merger("plan", "recipe.yaml", "--json"))["license"]
        merger("run", "recipe.yaml", "-o", "out")
    assert (verdict["verdict"], verdict["fields"]) == ("ask", {"license": "llama3.1"})
    assert "org/llama is gated" in verdict["reasons"][0]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/llama", "org/run"]
    assert (card.data.license, card.data.language) == ("llama3.1", ["en"])
    assert f"| `org/llama` | {commit[:12]} |" in card.text
    assert (tmp_path / "out" / "LICENSE-2-org-run").read_text() == "The terms of mit."
    assert "Llama 3.1 Community License" in (tmp_path / "out" / "NOTICE").read_text()
    first, second = json.loads((tmp_path / "out" / "merger.json").read_text())["sources"]
    assert (first["revision"], first["repository"], first["license"]) == (commit, "org/llama", "llama3.1")
    assert (second["repository"], second["license"], second["step"]) == ("org/run", "mit", 2)
