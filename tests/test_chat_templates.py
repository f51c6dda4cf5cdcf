import json

import pytest
from transformers import AutoTokenizer

from merger.chat_templates import NAMES, chosen_template, known_template, template_of, with_chat_template
from merger.checkpoint import Checkpoint
from merger.errors import RecipeError
from tests.vocabularies import ENGLISH, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

A, B, C = "{{ 'a' }}", "{{ 'b' }}", "{{ 'c' }}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
]


@pytest.fixture
def model(tmp_path):
    """Makes a model of side files."""

    def make(name, **files):
        folder = tmp_path / name
        folder.mkdir()
        paths = {}
        for key, content in files.items():
            path = folder / key.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths[path.name] = path
        return Checkpoint({}, {}, paths, (), label=name)

    return make


def templated(model, name, template):
    return model(name, chat_template__jinja=template)


# ---- where models keep it -----------------------------------------------------------------------------


def test_a_template_is_found_where_models_keep_it(model):
    assert template_of(model("1", chat_template__jinja=f"{A}\n")) == A
    assert template_of(model("2", tokenizer_config__json={"chat_template": A})) == A
    assert template_of(model("3", chat_template__json={"chat_template": A})) == A
    several = [{"name": "tool_use", "template": B}, {"name": "default", "template": A}]
    assert template_of(model("4", tokenizer_config__json={"chat_template": several})) == A
    assert template_of(model("5", tokenizer_config__json={"chat_template": {"rag": B}})) is None
    assert template_of(model("6", tokenizer_config__json={})) is None
    assert template_of(model("7", chat_template__jinja=A, tokenizer_config__json={"chat_template": B})) == A


# ---- auto ---------------------------------------------------------------------------------------------


def test_auto_takes_what_most_models_have(model):
    models = [templated(model, str(i), it) for i, it in enumerate([A, B, B, C])]
    assert chosen_template("auto", models, 0) == B


def test_auto_takes_the_bases_where_several_are_as_common(model):
    models = [templated(model, str(i), it) for i, it in enumerate([A, B, C])]
    assert chosen_template("auto", models, 1) == B
    assert chosen_template("auto", models) == A
    assert chosen_template("auto", [*models, model("none")], 3) == A


def test_auto_finds_nothing_where_nothing_is(model):
    assert chosen_template("auto", [model("a"), model("b")], 0) is None


# ---- known ones and own ones --------------------------------------------------------------------------

# What the formats' authors publish: prompts for TALK with the beginning of an answer.
WANTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?"
    "<|im_end|>\n<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Why [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nWhy\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Why\n"
    "[|assistant|]",
}


@pytest.mark.parametrize("name", NAMES)
def test_known_templates_say_what_their_formats_say(name, tmp_path):
    tokens = tokenizer("BPE", ENGLISH, 300)
    tokens.save_pretrained(tmp_path)
    paths = {path.name: path for path in tmp_path.iterdir()}
    made = with_chat_template(Checkpoint({}, {}, paths, ()), chosen_template(name, []))
    for file, text in made.texts.items():
        (tmp_path / file).write_text(text)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == WANTED[name]


def test_alpaca_begins_with_its_sentence(tmp_path):
    tokens = tokenizer("BPE", ENGLISH, 300)
    tokens.chat_template = known_template("alpaca")
    said = tokens.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True)
    assert said.startswith("Below is an instruction that describes a task. Write a response that appropriately")
    assert said.endswith("\n\n### Instruction:\nHi\n\n### Response:\n")


def test_templates_of_a_recipe_are_taken_as_they_are():
    template = (
        "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert chosen_template(template, []) == template


@pytest.mark.parametrize(
    ("template", "match"), [("chatlm", "neither a template nor the name"), ("{% for x in y %}", "no Jinja template")]
)
def test_what_is_no_template_is_refused(template, match):
    with pytest.raises(RecipeError, match=match) as caught:
        chosen_template(template, [])
    assert caught.value.where == "chat_template"


def test_a_new_template_stands_in_one_place_only(model):
    old = model(
        "old", chat_template__json={"chat_template": A}, tokenizer_config__json={"chat_template": B, "bos_token": "<s>"}
    )
    made = with_chat_template(old, C)
    assert template_of(made) == C
    assert "chat_template.json" not in {*made.side_files, *made.texts}
    assert json.loads(made.texts["tokenizer_config.json"]) == {"bos_token": "<s>"}
    assert template_of(old) == B
