import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import openai
import pytest
from servers import endpoints

import cinema.chat
from cinema.chat import (
    TOKENS,
    AnswerError,
    Endpoint,
    Reply,
    ServerError,
    connect,
    converse,
    endpoint_from_environment,
)
from cinema.errors import UserError

ODD = ['{"choices": ["a"]}', '{"choices": {"a": 1}}', '{"choices": [null], "usage": {"total_tokens": "9"}}']
ODD += ["[]", '{"choices": []}', '{"choices": [{"message": {}}]}', '{"choices": [{"message": {"content": ["a"]}}]}']


@pytest.fixture
def serve() -> Iterator[Callable[[str], tuple[Endpoint, list[Any]]]]:
    """serve(body) starts a server that answers this, and tells its endpoint and the list of what it was asked."""
    with endpoints() as start:
        yield lambda body: start(lambda _: body)


def number(reply: Reply) -> int:
    return int(reply.text)


@pytest.mark.parametrize(
    ("body", "error"), [*((b, AnswerError) for b in ODD), *((b, ServerError) for b in ('{"ch', "a"))]
)
def test_a_server_that_sends_something_else_is_asked_twice_and_no_json_is_no_answer(serve, body, error):
    endpoint, asked = serve(body)
    with connect(endpoint, {"type": "object"}, retries=0) as say, pytest.raises(error):
        converse(say, "system", "question", number)
    assert len(asked) == (2 if error is AnswerError else 1)


@pytest.mark.parametrize(("told", "tokens"), [("77", 77), ("-9", TOKENS), ("null", TOKENS)])
def test_tokens_are_guessed_where_the_server_does_not_say(serve, told, tokens):
    usage = f'"usage": {{"total_tokens": {told}}}'
    endpoint, _ = serve(f'{{"choices": [{{"message": {{"content": "1"}}}}], {usage}}}')
    with connect(endpoint, {}) as say:
        assert say([{"role": "user", "content": "x"}]) == Reply("1", "stop", tokens)


@pytest.mark.parametrize("wait", ["9", "9.5", "400", "400.5", format_datetime(datetime.now(UTC) + timedelta(hours=1))])
def test_a_wait_of_minutes_stops_the_run_and_a_short_one_passes(wait: str) -> None:
    asked = httpx.Request("POST", "http://host/v1")
    answer = httpx.Response(429, headers={"retry-after": wait}, request=asked)
    with pytest.raises(ServerError, match=f"429 .* wait for {re.escape(wait)} s") as told:
        cinema.chat._refusal(openai.APIStatusError("busy", response=answer, body=None))
    assert told.value.passes == wait.startswith("9")


def test_an_address_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(cinema.chat.SETTINGS, ("http://[::1/v1", "key", "model"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="CINEMA_LLM_BASE_URL is no address"):
        endpoint_from_environment()


def test_a_key_of_odd_letters_is_one_sentence():
    endpoint = Endpoint("http://127.0.0.1:1/v1", "schlüssel", "m")
    with connect(endpoint, {}, retries=0) as say, pytest.raises(UserError, match="letters that no key has"):
        say([])
