"""What a service lets recipes read and write, beyond folders."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from api.settings import Settings
from api.validation import validate
from merger.errors import NotEnoughDisk, RecipeError, SourceError
from tests.checkpoints import write_model
from tests.object_server.fixtures import Bucket


def test_object_stores_are_used_below_their_roots_alone(bucket: Bucket, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"x": np.ones(8, np.float32)}, {"model_type": "llama"})
    for key in ("models/a", "secret/a"):
        bucket.put(model, key)
    settings = Settings(output_roots=(tmp_path,), working_folder=tmp_path, object_roots=(bucket.url("models/"),))
    recipe = {"method": "average", "output": {"path": "out"}}
    found = validate({**recipe, "checkpoints": [bucket.url("models/a")]}, settings)
    assert found.plan["tensors"] == 1
    for wrong in ([bucket.url("secret/a")], bucket.url("*")):
        with pytest.raises(SourceError, match="may use") as caught:
            validate({**recipe, "checkpoints": wrong}, settings)
        assert caught.value.remedy == f"It may use what is below {bucket.url('models/')}."


def test_a_file_of_several_mergekit_configurations(tmp_path: Path) -> None:
    """It travels as text or as plain data, and what is kept of it plans the same again."""
    for name in "ab":
        write_model(tmp_path / name, {"x": np.ones(8, np.float32)}, {"model_type": "llama"})
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in "ab"]
    first = {"name": "half", "merge_method": "linear", "models": models}
    last = {"merge_method": "passthrough", "models": [{"model": "half"}], "output": {"path": "out"}}
    settings = Settings(output_roots=(tmp_path,), working_folder=tmp_path, source_roots=(tmp_path,))
    found = validate(yaml.safe_dump_all([first, last]), settings)
    assert found.plan["tensors"] == 1
    assert validate(found.content, settings).plan["fingerprint"] == found.plan["fingerprint"]
    outside = yaml.safe_dump({**first, "base_model": "/somewhere/else", "output": {"path": "out"}})
    with pytest.raises(SourceError, match="outside"):
        validate(outside, settings)


def test_without_shared_folders_results_are_only_pushed(bucket: Bucket, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"x": np.ones(8, np.float32)}, {"model_type": "llama"})
    bucket.put(model, "models/a")
    # A disk that the API has no room on is not the disk on which the job works.
    settings = Settings(
        output_roots=(Path("/proc/none"),),
        working_folder=tmp_path,
        object_roots=(bucket.url(""),),
        shared_folders=False,
    )
    recipe = {"method": "average", "checkpoints": [bucket.url("models/a")]}
    pushed = {**recipe, "output": {"push": bucket.url("out"), "accept_license": True}}
    assert validate(pushed, settings).plan["output"] == bucket.url("out")
    kept = {**recipe, "output": {"push": bucket.url("out"), "path": "/proc/none/out"}}
    with pytest.raises(RecipeError, match=r"output\.path"):
        validate(kept, settings)
    with pytest.raises(RecipeError, match=r"output\.path"):
        validate({**recipe, "output": {"path": "/proc/none/out"}}, settings)
    with pytest.raises(NotEnoughDisk):  # nothing can be made there, which the API would see if the folders were shared
        validate(pushed, settings.model_copy(update={"shared_folders": True}))
