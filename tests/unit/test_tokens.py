"""What a model folder's files mean for prompts."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynamo_ray.errors import InvalidRequest, StartError
from dynamo_ray.models import byte_tokenizer
from dynamo_ray.request.tokens import OFF_LOOP_CHARACTERS, Tokeniser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer.build(tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


USER = [{"role": "user", "content": "hi"}]


def test_the_byte_tokenizer_has_one_token_a_byte(folder: Path) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a\u00e9\u4e2d\U0001f600 \n\t\x00"
    assert library.encode(text).ids == list(text.encode())
    assert library.decode(list(text.encode())) == text
    assert library.get_vocab_size() == 512
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == library.token_to_id("<|eos|>") == 257


def test_ids_beyond_the_special_tokens_decode_to_their_number(folder: Path) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert library.decode([300, 511]) == "<300><511>"
    assert library.encode("<300>").ids == list(b"<300>")


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256"):
        byte_tokenizer.build(tmp_path, 256)


async def test_a_chat_is_rendered_with_the_models_template(folder: Path) -> None:
    tokens = await Tokeniser(folder).encode_chat(USER)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=False) == (
        "<|bos|><|user|>hi<|end|><|assistant|>"
    )
    assert [token for token in tokens if token > 255] == [256, 259, 262, 260]


def test_templates_are_searched_in_transformers_order(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert Tokeniser(folder).render(USER) == "named"
    change(folder / "chat_template.json", chat_template="json")
    assert Tokeniser(folder).render(USER) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert Tokeniser(folder).render(USER) == "jinja"


TEMPLATE = """\
{%- for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {{- message | tojson }}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}{{ eos_token }}{{ strftime_now('%%') }}{% endif %}"""


def test_a_template_renders_as_transformers_renders_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "<\u00e9>\n\n"}] * 3
    expected, _ = transformers.render_jinja_template(
        [messages], chat_template=TEMPLATE, add_generation_prompt=True, eos_token="<|eos|>"
    )
    assert Tokeniser(folder).render(messages) == expected[0]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ none + 'a' }}", "{{ messages.append(1) }}"]
)
def test_what_a_template_refuses_is_the_clients_error(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidRequest) as caught:
        Tokeniser(folder).render(USER)
    assert caught.value.field == "messages"
    assert "alternate" in str(caught.value) or "raise" not in template


def test_a_template_cannot_reach_into_python(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidRequest):
        Tokeniser(folder).render(USER)


def test_a_model_without_a_template_says_what_to_use(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template=None)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        Tokeniser(folder).render(USER)


def test_a_developer_message_is_not_lost_on_a_template_that_knows_only_system(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    )
    assert Tokeniser(folder).render([{"role": "developer", "content": "be brief"}]) == "be brief"
    (folder / "chat_template.jinja").write_text("{% for m in messages if m.role == 'developer' %}D{% endfor %}")
    assert Tokeniser(folder).render([{"role": "developer", "content": "be brief"}]) == "D"


def test_every_end_token_of_any_file_ends_an_answer(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=[1, 2])
    change(folder / "generation_config.json", eos_token_id=2)
    assert Tokeniser(folder).eos_token_ids == (1, 2, 257)


async def test_a_bos_that_the_configuration_asks_for_is_added_once_and_only_to_plain_text(folder: Path) -> None:
    change(folder / "tokenizer_config.json", add_bos_token=True)
    tokeniser = Tokeniser(folder)
    assert await tokeniser.encode("a") == [256, 97]
    assert await tokeniser.encode("<|bos|>a") == [256, 97]
    assert (await tokeniser.encode_chat(USER)).count(256) == 1


async def test_truncation_and_padding_saved_with_a_tokenizer_do_not_touch_prompts(folder: Path) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=8)
    library.save(str(folder / "tokenizer.json"))
    assert await Tokeniser(folder).encode("abc") == [97, 98, 99]


async def test_a_long_text_leaves_the_loop_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    hop = asyncio.to_thread

    async def seen(work: Any, *args: Any) -> Any:
        return await hop(lambda: (threads.append(threading.get_ident()), work(*args))[1])

    monkeypatch.setattr(asyncio, "to_thread", seen)
    tokeniser = Tokeniser(folder)
    assert len(await tokeniser.encode("a" * OFF_LOOP_CHARACTERS)) == OFF_LOOP_CHARACTERS
    assert threads == []
    assert len(await tokeniser.encode("a" * (OFF_LOOP_CHARACTERS + 1))) == OFF_LOOP_CHARACTERS + 1
    assert threads != [threading.get_ident()]
    assert len(threads) == 1


def test_a_tokens_bytes_are_its_own_even_where_its_text_is_hidden(folder: Path) -> None:
    tokeniser = Tokeniser(folder)
    assert tokeniser.token_bytes(0xE4) == b"\xe4"
    assert tokeniser.token_bytes(257) == b"<|eos|>"
    assert tokeniser.token_bytes(9999) == b""


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 1}'])
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartError, match=r"model\.path: .*tokenizer\.json"):
        Tokeniser(tmp_path)


def test_a_broken_template_is_said_at_the_start(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(StartError, match="chat template"):
        Tokeniser(folder)
