"""The server, asked by OpenAI's own client, against `generate` on the same model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Annotated, Literal

import httpx
import jsonschema
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mlx_llava import generate, server, stream_generate
from mlx_llava.inputs.image import data_url, png
from mlx_llava.model.llava import Llava
from tests.conftest import ROOT, SHAPES
from tests.servers import HTTP, MODEL, endless, serving, user, waits_until

EMBEDDED = ROOT / "weights/tiny-llava"
PICTURE = Image.open(SHAPES).convert("RGB")
QUESTION = "What colour is the triangle?"


def ask(client, *parts, **options):
    return client.chat.completions.create(model=MODEL, messages=[user(*parts)], **options)


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


class TestChat:
    def test_answer_is_that_of_generate(self, client, tiny):
        reply = ask(client, PICTURE, QUESTION)
        (choice,) = reply.choices
        assert choice.message.content == generate(*tiny, QUESTION, PICTURE) == "red"
        assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
        assert (reply.object, reply.model) == ("chat.completion", MODEL)
        assert abs(reply.created - time.time()) < 60
        length = tiny[1](QUESTION, PICTURE).input_ids.shape[1]
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (length, 2)
        assert reply.usage.total_tokens == length + 2

    def test_pictures_are_shown_in_as_many_tokens_as_are_asked_for(self, client, tiny):
        where = "Where is the triangle?"
        for count in (None, 4, 36):
            reply = ask(client, PICTURE, where, extra_body={"image_tokens": count})
            expected = generate(*tiny, where, PICTURE, image_tokens=count)
            assert reply.choices[0].message.content == expected
            length = tiny[1](where, PICTURE, image_tokens=count).input_ids.shape[1]
            assert reply.usage.prompt_tokens == length
        with pytest.raises(openai.BadRequestError, match="image_tokens: .* greater than or equal"):
            ask(client, PICTURE, where, extra_body={"image_tokens": 0})

    def test_stream_is_the_whole_answer_in_openais_chunks(self, client):
        whole = ask(client, PICTURE, "Describe the picture.")
        usage = {"stream_options": {"include_usage": True}}
        chunks = list(ask(client, PICTURE, "Describe the picture.", stream=True, **usage))
        *pieces, last = chunks
        assert pieces[0].choices[0].delta.role == "assistant"
        assert text_of(pieces) == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in pieces] == [None] * (len(pieces) - 1) + ["stop"]
        assert {c.usage for c in pieces} == {None}
        assert last.choices == []
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert len({(c.id, c.created, c.object) for c in chunks}) == 1
        assert chunks[0].object == "chat.completion.chunk"

    def test_stream_without_options_has_no_usage(self, client):
        assert {chunk.usage for chunk in ask(client, QUESTION, stream=True)} == {None}

    @pytest.mark.parametrize("order", ["image first", "text first", "in between"])
    def test_parts_may_stand_in_any_order(self, client, tiny, order):
        other = Image.new("RGB", (60, 40), "blue")
        parts = {
            "image first": [PICTURE, other, "What is", "in these?"],
            "text first": ["What is", "in these?", PICTURE, other],
            "in between": ["What is", PICTURE, "in these?", other],
        }[order]
        expected = generate(*tiny, "What is\nin these?", [PICTURE, other], max_tokens=40)
        assert ask(client, *parts, max_tokens=40).choices[0].message.content == expected

    def test_turns_are_the_conversation(self, client, tiny):
        messages = [
            {"role": "developer", "content": "Be brief."},
            user(PICTURE, QUESTION),
            {
                "role": "assistant",
                "content": "red",
                "refusal": None,
                "tool_calls": [],
                "name": None,
            },
            {"role": "user", "content": "And the star?"},
        ]
        reply = client.chat.completions.create(model=MODEL, messages=messages)
        same = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "And the star?"},
        ]
        assert reply.choices[0].message.content == generate(*tiny, same, PICTURE)

    def test_a_mark_in_a_text_is_text(self, client, tiny):
        reply = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "What is <image>?"}]
        )
        content = [{"type": "text", "text": "What is <image>?"}]
        expected = generate(*tiny, [{"role": "user", "content": content}])
        assert reply.choices[0].message.content == expected

    def test_max_tokens_and_stop(self, client, tiny):
        short = ask(client, PICTURE, "Describe the picture.", max_completion_tokens=3)
        expected = generate(*tiny, "Describe the picture.", PICTURE, max_tokens=3)
        assert short.choices[0].message.content == expected
        assert short.choices[0].finish_reason == "length"
        whole = generate(*tiny, "Describe the picture.", PICTURE)
        for stop in ("triangle", ["circle", "triangle"]):
            cut = ask(client, PICTURE, "Describe the picture.", stop=stop)
            assert cut.choices[0].message.content == whole[: whole.index("triangle")]
            assert cut.choices[0].finish_reason == "stop"

    def test_n_answers_of_a_seed_are_those_of_the_seeds_that_follow(self, client, tiny):
        options = {"temperature": 2, "max_tokens": 12, "extra_body": {"top_k": 400}}
        reply = ask(client, PICTURE, "Describe the picture.", n=3, seed=7, **options)
        expected = [
            generate(
                *tiny, "Describe the picture.", PICTURE, temp=2, top_k=400, max_tokens=12, seed=i
            )
            for i in (7, 8, 9)
        ]
        assert [choice.message.content for choice in reply.choices] == expected
        assert len(set(expected)) > 1
        streamed = {0: "", 1: "", 2: ""}
        for chunk in ask(
            client, PICTURE, "Describe the picture.", n=3, seed=7, stream=True, **options
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert [*streamed.values()] == expected
        alone = ask(client, PICTURE, "Describe the picture.")
        assert reply.usage.prompt_tokens == alone.usage.prompt_tokens

    def test_top_p_of_zero_is_the_likeliest_token(self, client):
        greedy = ask(client, PICTURE, "Describe the picture.", temperature=0)
        nucleus = ask(client, PICTURE, "Describe the picture.", temperature=2, top_p=0)
        assert nucleus.choices[0].message.content == greedy.choices[0].message.content

    def test_seeds_of_any_size(self, client):
        for seed in (-1, 2**70):
            assert ask(client, QUESTION, seed=seed, temperature=1, max_tokens=2).choices


class TestLogprobs:
    def expected(self, tiny):
        parts = stream_generate(*tiny, "Describe the picture.", PICTURE, max_tokens=6)
        return [(part.token, np.array(part.logprobs)) for part in parts]

    @pytest.mark.parametrize("stream", [False, True])
    def test_are_the_models(self, client, tiny, stream):
        reply = ask(
            client,
            PICTURE,
            "Describe the picture.",
            max_tokens=6,
            logprobs=True,
            top_logprobs=3,
            stream=stream,
        )
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.content]
        assert b"".join(bytes(token.bytes) for token in tokens).decode().strip() == (
            generate(*tiny, "Describe the picture.", PICTURE, max_tokens=6)
        )
        for token, (chosen, logprobs) in zip(tokens, self.expected(tiny), strict=True):
            assert token.logprob == pytest.approx(logprobs[chosen], abs=1e-4)
            best = np.sort(logprobs)[::-1][:3]
            assert [top.logprob for top in token.top_logprobs] == pytest.approx(best, abs=1e-4)
            assert token.token == token.top_logprobs[0].token

    def test_end_with_the_text(self, client):
        reply = ask(client, PICTURE, "Describe the picture.", logprobs=True, stop="triangle")
        tokens = reply.choices[0].logprobs.content
        text = "".join(token.token for token in tokens)
        assert text.strip() == reply.choices[0].message.content.strip()
        assert tokens[0].top_logprobs == []


class TestCompletions:
    def test_each_prompt_is_answered_as_it_stands(self, client, tiny):
        prompts = ["USER: Hi ASSISTANT:", "One two"]
        reply = client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=5)
        expected = [generate(*tiny, text, raw=True, max_tokens=5) for text in prompts]
        assert [choice.text for choice in reply.choices] == [
            expected[0], expected[0], expected[1], expected[1],
        ]  # fmt: skip
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        lengths = [tiny[1](text, raw=True).input_ids.shape[1] for text in prompts]
        assert reply.usage.prompt_tokens == sum(lengths)

    def test_stream_and_logprobs(self, client):
        options = {"prompt": "USER: Hi ASSISTANT:", "max_tokens": 5, "logprobs": 2}
        whole = client.completions.create(model=MODEL, **options)
        chunks = list(client.completions.create(model=MODEL, stream=True, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        logprobs = whole.choices[0].logprobs
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert whole.choices[0].text[offset:].startswith(token.strip() if not offset else token)
        streamed = [
            x for c in chunks if c.choices[0].logprobs for x in c.choices[0].logprobs.text_offset
        ]
        assert streamed == logprobs.text_offset
        assert all(len(top) == 2 for top in logprobs.top_logprobs)

    def test_default_length_is_openais(self, client):
        reply = client.completions.create(model=MODEL, prompt="One two", stop=[])
        assert reply.usage.completion_tokens <= 16


class Drawing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green", "blue"]
    count: Annotated[int, Field(ge=0, le=99)]
    words: Annotated[list[Annotated[str, Field(max_length=8)]], Field(max_length=2)]


class TestJson:
    def test_schema_is_followed_at_any_temperature(self, client):
        schema = Drawing.model_json_schema()
        format = {"type": "json_schema", "json_schema": {"name": "drawing", "schema": schema}}
        for seed in range(5):
            reply = ask(
                client,
                *(PICTURE, "Describe."),
                response_format=format,
                temperature=1.8,
                seed=seed,
            )
            assert reply.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(reply.choices[0].message.content), schema)

    def test_clients_own_parsing(self, client):
        class Colour(BaseModel):
            colour: Literal["red", "green", "blue"]

        reply = client.chat.completions.parse(
            model=MODEL, messages=[user(PICTURE, QUESTION)], response_format=Colour
        )
        assert reply.choices[0].message.parsed == Colour(colour="red")

    def test_json_object(self, client):
        reply = ask(
            client, PICTURE, "Describe.", response_format={"type": "json_object"}, max_tokens=20
        )
        assert reply.choices[0].message.content.startswith("{")

    def test_schema_that_makes_no_sense_is_refused(self, client):
        schema = {"name": "x", "schema": {"type": "objekt"}}
        with pytest.raises(openai.BadRequestError, match="schema cannot be used.*objekt"):
            ask(client, "Hi", response_format={"type": "json_schema", "json_schema": schema})


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "param", "message"),
        [
            ({"temperature": 3}, "temperature", "less than or equal to 2"),
            ({"n": 0}, "n", "greater than or equal to 1"),
            ({"n": 129}, "n", "less than or equal to 128"),
            ({"n": 100}, "n", "100 answers were asked for, of 72"),
            ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
            ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
            ({"tool_choice": "required"}, "tool_choice", "names no function"),
            ({"function_call": {"name": "f"}}, "function_call", "not supported"),
            ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
            ({"extra_body": {"mirostat": 1}}, "mirostat", "not supported"),
            ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
            ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ],
    )
    def test_parameters_are_refused_by_name(self, client, options, param, message):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(client, "Hi", **options)
        assert caught.value.param == param
        assert caught.value.type == "invalid_request_error"

    def test_values_that_change_nothing_are_taken(self, client):
        options = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "n": 1}
        more = {
            "reasoning_effort": "low",
            "verbosity": "high",
            "user": "me",
            "store": True,
            "metadata": {"a": "b"},
            "service_tier": "auto",
        }
        assert ask(client, "Hi", max_tokens=1, **options, **more).choices

    @pytest.mark.parametrize(
        ("roles", "found"),
        [("assistant", "assistant"), ("system", "none"), ("user assistant system", "assistant")],
    )
    def test_conversations_without_a_last_question(self, client, roles, found):
        messages = [{"role": role, "content": "a"} for role in roles.split()]
        with pytest.raises(openai.BadRequestError, match=f"must be the user's; found {found}"):
            client.chat.completions.create(model=MODEL, messages=messages)

    def test_unknown_model(self, client):
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' does not exist") as caught:
            client.chat.completions.create(model="gpt-4o", messages=[user("Hi")])
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    def test_prompt_longer_than_the_context(self, client, tiny):
        for text in ("a b " * tiny[1].context_length, "a" * 10_000_000):
            with pytest.raises(openai.BadRequestError, match="context") as caught:
                ask(client, text)
            assert caught.value.code == "context_length_exceeded"

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("data:image/png;base64,AAAA", "invalid_image"),
            ("data:image/png;base64,!", "invalid_image_url"),
            ("data:image/png,abc", "invalid_image_url"),
            ("", "invalid_image_url"),
        ],
    )
    def test_broken_pictures(self, client, url, code):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": [part]}]
            )
        assert (caught.value.code, caught.value.param) == (code, "messages")

    def test_api_key(self, served):
        key = "0123456789abcdef"
        with serving("--api-key", key, engine=served.engine) as guarded:
            with guarded.client() as knowing:
                assert ask(knowing, "Hi", max_tokens=1).choices
            for wrong in ("none", key[:-1], key + "x", "0123456789abcdeF"):
                refused = pytest.raises(openai.AuthenticationError)
                with guarded.client(api_key=wrong) as guessing, refused as caught:
                    ask(guessing, "Hi")
                assert caught.value.code == "invalid_api_key"
            assert httpx.get(guarded.url + "/metrics", timeout=60).status_code == 401
            assert httpx.get(guarded.url + "/health", timeout=60).status_code == 200
            assert httpx.get(guarded.url + "/", timeout=60).status_code == 200

    def test_unknown_urls(self, served):
        for path in ("/v1/nothing", "/nothing", "/v1/chat"):
            reply = httpx.get(served.url + path, timeout=60)
            assert reply.status_code == 404
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        for path in ("/nothing", "/chat/completions", "/v1/nothing", "/%00", "/" + "x" * 5000):
            reply = httpx.post(served.url + path, json={}, timeout=60)
            assert reply.status_code == 404
            is_told = "API and Anthropic's are under /v1" in reply.json()["error"]["message"]
            assert is_told == (path != "/v1/nothing")
        assert httpx.get(served.url + "/v1/chat/completions", timeout=60).status_code == 405
        for path in ("/", "/health", "/index.html"):
            assert httpx.post(served.url + path, json={}, timeout=60).status_code == 405


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "mlx_llava")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_other_names_of_the_model(served):
    """With any tag, as Ollama's models have; the model's own name has one."""
    with (
        serving("--alias", "llava", "--alias", "bakllava:7b", engine=served.engine) as named,
        named.client() as client,
    ):
        listed = [model.id for model in client.models.list().data]
        assert listed == [MODEL, "llava", "bakllava:7b"]
        for name in (*listed, f"{MODEL}:latest", "llava:7b", "llava:latest"):
            assert client.models.retrieve(name).id == name
            reply = client.chat.completions.create(model=name, messages=[user("Hi")], max_tokens=1)
            assert reply.model == name
        for name in ("llava-13b", "bakllava", "bakllava:13b", f"{MODEL}:7b", ":7b", ""):
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                client.chat.completions.create(model=name, messages=[user("Hi")])


def test_open_webui(served):
    """What Open WebUI was seen to send: models, a chat with a picture, titles, tags."""
    recorded = json.loads((ROOT / "tests" / "open_webui.json").read_text())
    url = data_url(png(PICTURE))
    for request in recorded["requests"]:
        text = json.dumps(request["body"]).replace("PICTURE", url)
        body = None if request["body"] is None else text
        reply = httpx.request(
            request["method"],
            served.url + request["path"],
            headers=request["headers"],
            content=body,
            timeout=60,
        )
        assert reply.status_code == 200, reply.text


def test_files_of_the_page_need_no_key_and_are_never_stale(served):
    with serving("--api-key", "0123456789abcdef", engine=served.engine) as guarded:
        for path in ("/", "/page.js", "/vendor/purify.min.js"):
            reply = httpx.get(guarded.url + path, headers={"Accept": "text/html"}, **HTTP)
            assert (reply.status_code, reply.headers["cache-control"]) == (200, "no-cache")
            known = {"If-None-Match": reply.headers["etag"], "Accept": "text/html"}
            assert httpx.get(guarded.url + path, headers=known, **HTTP).status_code == 304


def test_metrics_count(served, client):
    def metrics():
        text = httpx.get(served.url + "/metrics", timeout=60).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = metrics()
    reply = ask(client, PICTURE, "Count the shapes.")
    after = metrics()
    grown = {name for name in after if after[name] != before.get(name)}
    for name, size in (
        ("prompt_tokens", reply.usage.prompt_tokens),
        ("generation_tokens", reply.usage.completion_tokens),
        ("image_tokens", 36),
    ):
        name = f'mlx_llava_{name}_total{{model="{MODEL}"}}'
        assert after[name] - before[name] == size
    assert 'mlx_llava_requests_total{path="/v1/chat/completions",status="200"}' in grown
    gauges = [
        f'mlx_llava_{name}{{model="{MODEL}"}}' for name in ("running", "places_taken", "loaded")
    ]
    assert [after[name] for name in gauges] == [0, 0, 1]


class TestConversation:
    @pytest.fixture
    def encoded(self, monkeypatch):
        """How many pictures the vision tower has seen."""
        seen = []
        encode = Llava.encode_images

        def counting(self, pixels, *rest):
            seen.append(pixels.shape[0])
            return encode(self, pixels, *rest)

        monkeypatch.setattr(Llava, "encode_images", counting)
        return seen

    def test_a_picture_is_encoded_once_and_known_from_then_on(self, client, encoded):
        picture = Image.effect_noise((50, 50), 90).convert("RGB")  # of no other test
        messages = []
        known = []
        for question in ("What is it?", "Which colour?", "How large?"):
            messages.append(user(picture, question) if not messages else user(question))
            reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
            messages.append(reply.choices[0].message)
            known.append(reply.usage.prompt_tokens_details.cached_tokens)
            lengths = reply.usage.prompt_tokens
        assert encoded == [1]
        assert known[0] < 10 < known[1] < known[2] < lengths

    def test_another_picture_in_its_place_is_seen(self, client, tiny, encoded):
        pictures = [PICTURE, Image.merge("RGB", PICTURE.split()[::-1])]
        expected = [generate(*tiny, "What colour is the triangle?", p) for p in pictures]
        assert expected == ["red", "blue"]
        encoded.clear()
        for _ in range(2):
            for picture, answer in zip(pictures, expected, strict=True):
                reply = ask(client, picture, "What colour is the triangle?")
                assert reply.choices[0].message.content == answer
        assert sum(encoded) <= 2


class TestManyAtOnce:
    @pytest.mark.usefixtures("machine")
    def test_every_answer_is_that_of_its_single_run(self, tiny):
        questions = [
            (colour, question, seed)
            for seed, colour in enumerate(("red", "green", "blue", "yellow"))
            for question in ("What colour is it?", "Describe the picture.", "Is it large?")
        ]

        def run(item):
            colour, question, seed = item
            options = {"temperature": 0.7, "seed": seed} if seed % 2 else {}
            with fresh.client() as client:
                picture = Image.new("RGB", (60, 60), colour)
                reply = ask(client, picture, question, max_tokens=30, **options)
                return reply.choices[0].message.content

        with serving() as fresh, ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(run, questions))
        for (colour, question, seed), answer in zip(questions, answers, strict=True):
            options = {"temp": 0.7, "seed": seed} if seed % 2 else {}
            picture = Image.new("RGB", (60, 60), colour)
            assert answer == generate(*tiny, question, picture, max_tokens=30, **options)

    def test_overflow_is_429_with_retry_after(self):
        small = ("--batch-size", "1", "--max-waiting", "1")
        with serving(*small) as full, full.client() as client, ThreadPoolExecutor(1) as pool:
            running = ask(client, "One two", stream=True, **endless())
            waiting = pool.submit(ask, client, "Hi", max_tokens=1)
            assert waits_until(lambda: full.engine.taken == 2)
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client, "Hi")
            assert caught.value.response.headers["Retry-After"] == "1"
            assert caught.value.code == "rate_limit_exceeded"
            running.close()
            assert waiting.result(60).choices
            assert waits_until(lambda: full.engine.taken == 0)

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_goes_ends_its_answer(self, served, stream):
        body = {"model": MODEL, "messages": [user("One two")], "stream": stream, **endless()}
        timeout = httpx.Timeout(60, read=60 if stream else 0.3)
        with httpx.Client(timeout=timeout) as going, closing(going):
            if stream:
                url = served.url + "/v1/chat/completions"
                with going.stream("POST", url, json=body) as reply:
                    lines = reply.iter_lines()
                    assert next(lines).startswith("data: ")
                    assert served.engine.taken == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    going.post(served.url + "/v1/chat/completions", json=body)
        assert waits_until(lambda: served.engine.taken == served.engine.running == 0)

    def test_time_is_limited(self, served):
        with serving("--timeout", "0.3", engine=served.engine) as hasty:
            with hasty.client() as client, pytest.raises(openai.InternalServerError) as caught:
                ask(client, "One two", **endless())
            assert (caught.value.status_code, caught.value.code) == (503, "timeout")
            with hasty.client() as client, pytest.raises(openai.APIError, match="more than 0.3 s"):
                list(ask(client, "One two", stream=True, **endless()))
            assert waits_until(lambda: served.engine.taken == 0)

    def test_shutting_down_finishes_what_runs(self, served):
        texts = []
        with serving(engine=served.engine) as ending:

            def run():
                with ending.client() as client:
                    stream = ask(client, "One two", stream=True, temperature=2, max_tokens=300)
                    started.set()
                    texts.append(text_of(stream))

            started = threading.Event()
            thread = threading.Thread(target=run)
            thread.start()
            started.wait(60)
        thread.join(60)
        assert len(texts) == 1

    def test_a_failure_of_the_model_ends_what_runs_and_no_more(self, served, monkeypatch, caplog):
        embed = Llava.embed

        def broken(self, *args, **kwargs):
            raise RuntimeError("no memory")

        monkeypatch.setattr(Llava, "embed", broken)
        with served.client() as client, pytest.raises(openai.InternalServerError) as caught:
            ask(client, "Hi")
        assert caught.value.status_code == 503
        assert "no memory" in caplog.text
        monkeypatch.setattr(Llava, "embed", embed)
        with served.client() as client:
            assert ask(client, "Hi", max_tokens=1).choices


def test_load_of_many_clients():
    """A small run of the script that compares many answers with their single runs."""
    script = [sys.executable, "scripts/load_server.py", "--requests", "50", "--clients", "16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["wrong"] == []
    assert figures["sent_away"] > 0
    assert {*figures["fates"]} == {"whole", "cancelled", "broken"}


def test_an_engine_that_has_ended_answers_no_one_and_says_so():
    with serving() as ending, ThreadPoolExecutor(1) as pool, ending.client() as client:
        running = pool.submit(ask, client, "One two", **endless())
        assert waits_until(lambda: ending.engine.running == 1)
        ending.models.thread.close()
        for request in (running.result, lambda _: ask(client, "Hi")):
            with pytest.raises(openai.InternalServerError) as caught:
                request(60)
            assert caught.value.status_code == 503
        assert httpx.get(ending.url + "/health", timeout=60).status_code == 503


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--port", "99999"], "port is 99999"),
            (["--model", "/nowhere"], "/nowhere"),
            (["--image-root", "/nowhere"], "/nowhere, which is no folder"),
            (["--image-root", "~nobody-of-that-name"], "which is no folder"),
            (["--model", "~nobody-of-that-name/a"], "~nobody-of-that-name/a"),
            (
                ["--model", "/a/b", "--model", "/a/c", "--model-id", "d"],
                "--model-id is for one model",
            ),
            (["--model", "/a/b", "--model", "/a/c", "--adapter-path", "d"], "there are 2 --model"),
            (["--model", f"a={EMBEDDED}", "--model", f"a={EMBEDDED}"], "models are called a;"),
            (["--model", "a="], "a= names no checkpoint"),
            (["--model", f"a={EMBEDDED}", "--model", "b=/nowhere"], "/nowhere"),
            (["--keep-alive", "soon"], "'soon' is no time"),
            (["--timeout", "0"], "timeout is 0"),
            (["--batch-size", "0"], "batch_size is 0"),
            (["--max-waiting", "-1"], "max_waiting is -1"),
            (["--max-images", "0"], "max_images is 0; it must be at least 1"),
            (["--api-key", "k" * 16, "--api-key-file", "/nowhere"], "give one of them"),
            (["--temp", "-1"], "temp is -1"),
            (["--json-schema", '{"type": "objekt"}'], "objekt"),
            (["--api-key-file", "/nowhere"], "/nowhere"),
            (["--api-key-file", "~nobody-of-that-name"], "~nobody-of-that-name"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_mistakes_are_one_line_and_2(self, arguments, words, capsys):
        given = arguments if "--port" in arguments else ["--port", "0", *arguments]
        assert server.main(given) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert words in error

    def test_a_port_that_is_taken(self, served, capsys):
        assert server.main(["--port", str(served.port)]) == 2
        assert "Address already in use" in capsys.readouterr().err

    def test_a_failed_start_leaves_no_thread(self):
        before = threading.active_count()
        assert server.main(["--model", "/nowhere", "--port", "0"]) == 2
        assert threading.active_count() == before

    def test_addresses_of_version_6(self, served):
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
        with serving("--host", "::1", engine=served.engine) as six:
            health = httpx.get(f"http://[::1]:{six.port}/health", timeout=60).json()
            assert health == {"status": "ok", "models": {MODEL: "loaded"}}

    def test_without_its_packages(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        assert server.main([]) == 2
        assert "pip install 'mlx_llava[server]'" in capsys.readouterr().err

    def test_open_to_all_without_a_key_is_said(self, served, monkeypatch, capsys):
        monkeypatch.setattr(server, "start_models", lambda *_: served.models)
        monkeypatch.setattr(served.models.thread, "close", lambda: None)
        monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
        assert server.main(["--host", "0.0.0.0", "--port", "0"]) == 0
        assert "warning: anyone who reaches 0.0.0.0 may ask" in capsys.readouterr().err
        assert server.main(["--port", "0"]) == 0
        assert "warning" not in capsys.readouterr().err
