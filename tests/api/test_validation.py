"""What a service lets recipes read and write, beyond folders."""

from pathlib import Path

import numpy as np
import pytest

from api.settings import Settings
from api.validation import validate
from merger.errors import SourceError
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
