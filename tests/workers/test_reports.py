"""What a runner tells the API, against a scripted one: nothing is lost, nothing is told twice, and orders are heard."""

import json
import queue
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from merger.secret import Token
from workers.reports import Api, Progress, Reporter, Superseded, Word, order_of

Answer = httpx2.Response | Exception


class ScriptedApi:
    """Answers requests in order, from a script; the last answer is repeated."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.tokens: list[str] = []
        self.arrived: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def api(self) -> Api:
        return Api("http://api.test", "job", 3, httpx2.MockTransport(self._answer))

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        assert request.url.path.startswith("/v1/internal/jobs/job/attempts/3/")
        content = json.loads(request.content)
        self.asked.append((request.url.path.rsplit("/", 1)[1], content))
        self.tokens.append(request.headers.get("Authorization", ""))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.arrived.put(content)
        if isinstance(answer, Exception):
            raise answer
        return answer


def go_on() -> httpx2.Response:
    return httpx2.Response(200, json={"word": "go on"})


ORDER = {
    "recipe": {},
    "output": "/out",
    "working_folder": "/",
    "source_roots": ["/a"],
    "object_roots": ["s3://team/"],
    "task_cpus": 1.0,
    "task_memory": 1,
    "heartbeat_seconds": 0.01,
}


@pytest.fixture
def words() -> queue.SimpleQueue[Word]:
    return queue.SimpleQueue()


@pytest.fixture
def reporter(words: queue.SimpleQueue[Word]) -> Callable[[ScriptedApi], Reporter]:
    return lambda scripted: Reporter(scripted.api(), 0.001, words.put)


def test_a_claim_gives_the_order_and_the_token_that_is_used_from_then_on() -> None:
    scripted = ScriptedApi(httpx2.Response(200, json={"token": "secret", "order": ORDER}), go_on())
    api = scripted.api()
    order = api.claim("code")
    assert (order.source_roots, order.object_roots) == (("/a",), ("s3://team/",))
    assert api.ask_to_publish() is Word.GO_ON
    assert scripted.tokens == ["", "Bearer secret"]
    assert scripted.asked[0][1]["claim"] == "code"


def test_a_claim_that_the_api_did_not_answer_is_made_again_under_the_same_name() -> None:
    scripted = ScriptedApi(
        httpx2.ConnectError("refused"),
        httpx2.Response(503),
        httpx2.Response(200, json={"token": "t", "order": ORDER}),
    )
    scripted.api().claim("code")
    assert len({content["nonce"] for _, content in scripted.asked}) == 1


def test_a_refused_claim_supersedes() -> None:
    with pytest.raises(Superseded, match="409"):
        ScriptedApi(httpx2.Response(409, text="too late")).api().claim("code")


def test_events_and_lines_arrive_once_and_in_order(reporter: Callable[[ScriptedApi], Reporter]) -> None:
    scripted = ScriptedApi(go_on())
    mine = reporter(scripted)
    mine.start()
    for i in range(50):
        mine.event("shard", file=str(i))
        mine.line(f"line {i}")
    mine.progress(Progress("writing", 5, 10))
    mine.finish("succeeded", {"result": {}})
    reports = [content for what, content in scripted.asked if what == "report"]
    assert [report["report"] for report in reports] == list(range(1, len(reports) + 1))
    assert [e["data"]["file"] for report in reports for e in report["events"]] == [str(i) for i in range(50)]
    assert [line for report in reports for line in report["lines"]] == [f"line {i}" for i in range(50)]
    assert scripted.asked[-1] == ("succeeded", {"result": {}})


@pytest.mark.parametrize("trouble", [httpx2.ReadTimeout("slow"), httpx2.Response(503), httpx2.Response(500)])
def test_a_report_without_an_answer_is_sent_again_as_it_was(
    reporter: Callable[[ScriptedApi], Reporter], trouble: Answer
) -> None:
    scripted = ScriptedApi(trouble, trouble, go_on())
    mine = reporter(scripted)
    mine.event("planned", shards=1)
    mine.start()
    first, second, third = (scripted.arrived.get(timeout=10) for _ in range(3))
    assert first == second == third
    mine.finish("succeeded", {"result": {}})


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (httpx2.Response(200, json={"word": "cancel"}), Word.CANCEL),
        (httpx2.Response(409), Word.LEAVE),
        (httpx2.Response(401), Word.LEAVE),
    ],
)
def test_orders_are_heard(
    reporter: Callable[[ScriptedApi], Reporter], words: queue.SimpleQueue[Word], answer: Answer, word: Word
) -> None:
    mine = reporter(ScriptedApi(answer))
    mine.start()
    assert words.get(timeout=10) is word
    if word is Word.CANCEL:
        mine.finish("canceled", {})
    else:
        with pytest.raises(Superseded):
            mine.finish("canceled", {})


# ---- the token ----------------------------------------------------------------------------------------

TOKEN = "hf_AbC0123456789xyz"


def test_an_order_goes_over_the_wire_and_back() -> None:
    content = {**ORDER, "hub_token": TOKEN}
    order = order_of(content)
    assert order.hub_token == Token(TOKEN)
    assert order_of(json.loads(json.dumps(order.content()))) == order
    assert TOKEN not in repr(order)
    assert order_of(ORDER).hub_token is None
    assert order_of(order_of(ORDER).content()).hub_token is None


def test_nothing_that_is_told_holds_the_token(words: queue.SimpleQueue[Word]) -> None:
    scripted = ScriptedApi(go_on())
    mine = Reporter(scripted.api(), 0.001, words.put, Token(TOKEN))
    mine.start()
    mine.event("chosen", title=TOKEN, taken=[f"a {TOKEN}", 3, None], nested={"where": (TOKEN,)})
    mine.line(f"before {TOKEN} after")
    mine.line("x" * 4995 + TOKEN)  # cut off in the middle of it
    error = {"kind": "JobError", "message": TOKEN, "where": f"/{TOKEN}", "remedy": TOKEN}
    mine.finish("failed", {"error": error, "again": True})
    sent = json.dumps(scripted.asked)
    assert TOKEN[:5] not in sent
    assert {"error": {"kind": "JobError", "message": "***", "where": "/***", "remedy": "***"}, "again": True} in [
        content for _, content in scripted.asked
    ]
    [event] = [e for what, content in scripted.asked if what == "report" for e in content["events"]]
    assert event["data"] == {"title": "***", "taken": ["a ***", 3, None], "nested": {"where": ["***"]}}


def test_an_order_of_a_later_api_is_understood() -> None:
    assert order_of({**ORDER, "of_a_later_version": [1]}) == order_of(ORDER)
