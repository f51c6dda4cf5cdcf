"""The test's own requests to a server in another process: `/__log`, `/__faults`, `/__call`.

They are neither logged nor struck by faults. `HubProcess` in `process.py` is the other end.
"""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.hub_server.errors import HubError
from tests.hub_server.site import answer_json
from tests.hub_server.wire import Answer, Request

if TYPE_CHECKING:
    from tests.hub_server.server import HubServer

# The methods of `HubServer` that may be called from outside.
CALLS = frozenset(
    {
        *("add_token", "add_model", "write", "add_link", "protect", "allow", "rename", "delete"),
        *(
            "redirect_elsewhere",
            "lie_about_size",
            "expire_urls",
            "url_lifetime",
            "xet_lifetime",
            "part_size",
            "page_size",
        ),
        *("forget_uncommitted", "violations", "repos", "refs", "commits", "files", "content"),
    }
)


def packed(content: Any) -> bytes:
    return json.dumps(content, default=_pack).encode()


def unpacked(data: bytes) -> Any:
    return json.loads(data, object_hook=_unpack)


def _pack(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    return str(value.absolute()) if isinstance(value, Path) else str(value)


def _unpack(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["__bytes__"]) if set(value) == {"__bytes__"} else value


def answer(hub: "HubServer", request: Request) -> Answer:
    asked = (request.method, request.path)
    if asked == ("GET", "/__log"):
        return answer_json([entry.as_json() for entry in hub.log()])
    if asked == ("DELETE", "/__log"):
        hub.clear_log()
    elif asked == ("POST", "/__faults"):
        _add_rules(hub, unpacked(request.read()))
    elif asked == ("DELETE", "/__faults"):
        hub.faults.clear()
    elif asked == ("POST", "/__call"):
        return _call(hub, unpacked(request.read()))
    else:
        raise HubError(404, f"nothing at {request.path}")
    return answer_json({})


def _add_rules(hub: "HubServer", rules: Any) -> None:
    """One rule or several: the arguments of `Faults.add`, or `{"random": {...}}` with those of `Faults.random`."""
    for rule in rules if isinstance(rules, list) else [rules]:
        if "random" in rule:
            hub.faults.random(**rule["random"])
        else:
            hub.faults.add(**rule)


def _call(hub: "HubServer", call: dict[str, Any]) -> Answer:
    if call["method"] not in CALLS:
        raise HubError(404, f"no method {call['method']}")
    result = getattr(hub, call["method"])(*call.get("positional", ()), **call.get("named", {}))
    return Answer(200, {"Content-Type": "application/json"}, (packed(result),))
