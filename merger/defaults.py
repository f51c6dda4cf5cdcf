"""The defaults of transformers' configs: `python -m merger.defaults` answers requests, one a line on standard input.

A process of its own hides torch, which transformers would import at once (300 MB and seconds) though no config needs
it. Where transformers is loaded already, `answer` is called directly. Knows transformers; knows nothing of recipes.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """`config`: the full config of `kind` with the fields of `config`, as it comes back from a file.

    With `fitting` fields that the family does not have are left out. `error`: why there is none.
    """
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return {"missing": True}
    kind, config = request["kind"], dict(request["config"])
    if kind not in CONFIG_MAPPING:
        return {"error": f"model_type {kind!r} is not known to transformers"}
    try:
        if request["fitting"]:
            known = CONFIG_MAPPING[kind]().to_dict().keys() | CONFIG_MAPPING[kind].attribute_map.keys()
            config = {key: value for key, value in config.items() if key in known}
        full = CONFIG_MAPPING[kind].from_dict({**config, "model_type": kind}).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        return {"error": f"config.json is not one of {kind}: {str(error).strip().splitlines()[-1].strip()}"}
    return {"config": json.loads(json.dumps(full, default=str))}


class _WithoutTorch(MetaPathFinder):
    """Lets imports of torch fail."""

    def find_spec(self, fullname: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "torch":
            raise ModuleNotFoundError(fullname, name="torch")
        return None


def _hide_torch() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (  # transformers asks in this way whether it is there
        None if name.partition(".")[0] == "torch" else find(name, package)
    )
    sys.meta_path.insert(0, _WithoutTorch())


if __name__ == "__main__":
    _hide_torch()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()
