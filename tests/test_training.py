"""Fine-tuning: it learns, it goes on where it was killed, and it comes to the same model."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, replace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from merger import training
from merger.checkpoint import open_checkpoint
from merger.errors import SourceError, WorkerDied
from merger.fine_tuning import Order, train_apart
from merger.reach import OWN
from merger.stages import FINISHED, Stage
from tests import tiny
from tests.packages import HELD_AFTER, held, margins, path_with
from tests.service.processes import until

STAGE = Stage(
    name="run",
    bodies=(("base", 1.0),),
    head=None,
    task="classification",
    data="rows.jsonl",
    labels=("low", "high"),
    steps=40,
    head_steps=0,
    learning_rate=3e-3,
    weight_decay=0.0,
    dropout=0.0,
    batch_size=16,
    context=32,
    seed=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that train: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base model, and rows whose label is whether their first token is a large one."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "base", "llama", vocab_size=260)
    tiny.byte_tokenizer(tmp_path / "base")
    random = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(200):
        ids = torch.randint(3, 256, (8,), generator=random).tolist()
        rows.append({"input_ids": ids[: 4 + ids[1] % 5], "label": "high" if ids[0] > 128 else "low"})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pairs = [{"chosen": row["input_ids"], "rejected": row["input_ids"][1:]} for row in rows[:12]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 20)
    return tmp_path


def train(stage, folder, head=None, say=lambda _done, _total, _loss: None, **more):
    training.train(stage, [(open_checkpoint(folder.parent / "base"), 1.0)], head, folder, "key", say, **more)
    return {name: value.clone() for name, value in load(folder).named_parameters()}


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def losses_of(stage, folder):
    found = []
    train(stage, folder, say=lambda _done, _total, loss: found.append(loss))
    return found


def test_a_classifier_learns_and_is_whole(place):
    losses = losses_of(STAGE, place / "run")
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert load(place / "run").config.id2label == {0: "low", 1: "high"}
    assert (place / "run" / "tokenizer.json").exists()
    assert json.loads((place / "run" / FINISHED).read_text()) == {"key": "key"}
    assert {path.name for path in place.iterdir()} == {"base", "rows.jsonl", "pairs.jsonl", "a.txt", "run"}


def test_a_language_model_learns(place):
    stage = replace(STAGE, task="text", data="a.txt", labels=(), learning_rate=1e-3)
    losses = losses_of(stage, place / "run")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert AutoModelForCausalLM.from_pretrained(place / "run").config.model_type == "llama"


PREFERENCES = replace(STAGE, task="preferences", data="pairs.jsonl", labels=("LABEL_0",), steps=3, batch_size=12)


def test_a_reward_model_learns_as_by_hand(place):
    """Three steps on all pairs, against the same written down: each sequence alone, so that nothing is padded."""
    wanted = train(replace(PREFERENCES, steps=1, learning_rate=0.0), place / "start")
    model = deepcopy(load(place / "start"))
    assert model.config.num_labels == 1
    pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PREFERENCES.learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(3):
        margins = [
            model(input_ids=torch.tensor([pair["chosen"]])).logits[0, 0]
            - model(input_ids=torch.tensor([pair["rejected"]])).logits[0, 0]
            for pair in pairs
        ]
        loss = sum(torch.log1p(torch.exp(-margin)) for margin in margins) / len(margins)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    said = []
    found = train(PREFERENCES, place / "run", say=lambda _done, _total, loss: said.append(loss))
    assert said == pytest.approx(losses, rel=1e-4)
    for name, value in model.named_parameters():
        assert torch.allclose(found[name], value, atol=1e-4), name
        assert not torch.equal(found[name], wanted[name]), name


def test_a_head_is_trained_alone_and_taken_over(place):
    probe = train(replace(STAGE, steps=10, head_steps=10), place / "probe")
    base = dict(AutoModelForCausalLM.from_pretrained(place / "base").named_parameters())
    assert all(torch.equal(value, base[name]) for name, value in probe.items() if name in base)
    fresh = train(replace(STAGE, steps=10, head_steps=10, learning_rate=0.0), place / "fresh")
    assert not torch.equal(probe["score.weight"], fresh["score.weight"])
    taken = train(replace(STAGE, steps=1, learning_rate=0.0), place / "run", open_checkpoint(place / "probe"))
    assert torch.equal(taken["score.weight"], probe["score.weight"])


def test_fresh_heads_of_one_seed_are_the_same(place):
    first, same = (train(replace(STAGE, steps=1, learning_rate=0.0), place / name) for name in ("x", "y"))
    other = train(replace(STAGE, steps=1, learning_rate=0.0, seed=2), place / "z")
    assert torch.equal(first["score.weight"], same["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])


@pytest.mark.parametrize("stop", [3, 12, 27])
def test_a_stage_that_was_stopped_comes_to_the_same_model(place, stop):
    """At step 3 the head alone is trained, at 12 all, and 27 is later than the last state."""
    stage = replace(STAGE, steps=30, head_steps=8, dropout=0.1)
    wanted = train(stage, place / "whole")

    def until(done, _total, _loss):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stage, place / "run", say=until, keep_seconds=0.0)
    assert not (place / "run").exists()
    told = []
    found = train(stage, place / "run", say=lambda done, _total, _loss: told.append(done))
    assert told[0] == stop  # its state is that of the step before
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_state_of_another_stage_is_not_taken_up(place):

    def until(done, _total, _loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(STAGE, place / "run", say=until, keep_seconds=0.0)
    told = []
    training.train(
        STAGE,
        [(open_checkpoint(place / "base"), 1.0)],
        None,
        place / "run",
        "other",
        lambda done, *_: told.append(done),
    )
    assert told[0] == 1


def test_bodies_are_summed_and_heads_are_not(place):
    torch.manual_seed(0)
    tiny.save(place / "other", "llama", seed=3, vocab_size=260)
    bodies = [(open_checkpoint(place / name), weight) for name, weight in (("base", 0.25), ("other", 0.75))]
    still = replace(STAGE, steps=1, learning_rate=0.0)
    training.train(still, bodies, None, place / "run", "key", lambda *_: None)
    a, b = (dict(AutoModelForCausalLM.from_pretrained(place / n).named_parameters()) for n in ("base", "other"))
    made = dict(load(place / "run").named_parameters())
    for name in a.keys() & made.keys():
        wanted = 0.25 * a[name].double() + 0.75 * b[name].double()
        assert torch.allclose(made[name].double(), wanted, atol=1e-6)
    alone = train(still, place / "alone")
    assert torch.equal(made["score.weight"], alone["score.weight"])


def test_nothing_to_train_on_is_told(place):
    (place / "rows.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="holds nothing to train on"):
        train(STAGE, place / "run")


# ---- as a process -------------------------------------------------------------------------------------


def order(place, stage=STAGE, **more):
    return Order(stage, (("base", 1.0),), None, place / "run", "key", **more)


def apart(order, tell=lambda _text: None):
    return train_apart(order, OWN, tell, threading.Event())


def kill(_text):
    for process in psutil.Process().children():
        os.kill(process.pid, signal.SIGKILL)


def test_a_process_trains_and_tells(place):
    said = []
    assert apart(order(place), said.append) == 0
    assert order(place).is_finished()
    assert said[-1].startswith("run: step 40 of 40, loss ")


def test_what_is_wrong_and_a_death_are_told(place, monkeypatch):
    (place / "rows.jsonl").write_text('{"text": "x"}')
    with pytest.raises(SourceError, match="line 1: has no field 'label'"):
        apart(order(place))
    (place / "rows.jsonl").write_text('{"text": "x", "label": "low"}\n' * 100)
    with pytest.raises(WorkerDied, match="the process that trains run has died"):
        apart(order(place), kill)


@pytest.fixture
def site(place, monkeypatch):
    """A folder of installed packages, for processes that start from now on."""
    monkeypatch.setenv("PYTHONPATH", path_with(place / "site"))
    return place / "site"


def test_a_process_that_was_killed_in_the_middle_goes_on_and_tells_where(place, site):
    held(site)
    stage = replace(STAGE, task="held", package="held 1.0", steps=12, head_steps=2, dropout=0.1)
    (place / "hold").touch()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(apart, order(place, stage, keep_seconds=0.0))
        until((place / "held").exists)
        os.kill(int((place / "held").read_text()), signal.SIGKILL)
        with pytest.raises(WorkerDied):
            ended.result()
    (place / "hold").unlink()
    said = []
    assert apart(order(place, stage), said.append) == 2 + HELD_AFTER
    assert said[0] == f"run: goes on after step {2 + HELD_AFTER} of 12"
    train(replace(stage, task="classification", package=None), place / "whole")
    made = [(place / name / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert made[0] == made[1]


@pytest.mark.slow
def test_two_processes_that_train_one_stage_do_not_disturb_each_other(place):
    orders = [order(place, keep_seconds=0.0)] * 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(apart, orders))
    made = (place / "run" / "model.safetensors").read_bytes()
    assert not [path.name for path in place.iterdir() if path.name.startswith((".run", "run."))]
    apart(replace(orders[0], folder=place / "alone"))
    assert (place / "alone" / "model.safetensors").read_bytes() == made


def test_a_process_ends_when_nobody_waits_for_it_any_more(place):
    """A stage that would take a day, whose runner goes away: as its standard input ends, so does it."""
    stage = replace(STAGE, steps=10_000_000)
    request = {"stage": asdict(stage), "bodies": [("base", 1.0)], "head": None, "folder": str(place / "run")}
    request |= {"key": "key", "keep_seconds": 20.0, "threads": 1, "reach": OWN.as_data()}
    command = [sys.executable, "-m", "merger.training"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        print(json.dumps(request), file=process.stdin, flush=True)
        assert json.loads(process.stdout.readline())["done"] == 1
        process.stdin.close()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        assert process.wait(60) == 0
    assert not (place / "run").exists()


def test_a_task_of_an_installed_package_trains_in_a_process(place, site):
    """With all margins at zero it is `preferences`, bit for bit; with others it is not."""
    margins(site)
    own = replace(PREFERENCES, task="margins", package="merger-margins 1.0")
    apart(order(place, own))
    train(PREFERENCES, place / "ready")
    made = [(place / name / "model.safetensors").read_bytes() for name in ("run", "ready")]
    assert made[0] == made[1]
    pairs = [{**json.loads(line), "margin": 1.0} for line in (place / "pairs.jsonl").read_text().splitlines()]
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    apart(replace(order(place, own), folder=place / "wider"))
    assert (place / "wider" / "model.safetensors").read_bytes() != made[0]
