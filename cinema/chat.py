"""Asking a language or vision model, behind any OpenAI-compatible server, for an answer that a program can use."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
import openai

from cinema.errors import UserError

SETTINGS = ("CINEMA_LLM_BASE_URL", "CINEMA_LLM_API_KEY", "CINEMA_LLM_MODEL")
PATIENCE_S = 120  # openai's client waits no longer, whatever Retry-After says
TOKENS = 2_000  # what a request is taken to cost where the server does not say
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Reply:
    """A model's answer: its text, why it ended ("stop", "length", "content_filter"), and tokens paid for it."""

    text: str
    finish: str = "stop"
    tokens: int = 0


Say = Callable[[list[Any]], Reply]  # a conversation so far -> the model's reply to it


class AnswerError(ValueError):
    """The model gave no usable answer, asked twice; the message says what is wrong with the last."""


class ServerError(UserError):
    """The model cannot be asked, for now or, if not `passes`, until somebody mends something."""

    passes = True


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint: its base address, key and model name."""

    base_url: str
    api_key: str
    model: str


def endpoint_from_environment(needed: tuple[str, ...] = SETTINGS) -> Endpoint:
    """The endpoint that SETTINGS name; UserError tells which of those `needed` is missing."""
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(f"a server's model is asked by address, key and name; set {missing[0]}")
    told = Endpoint(*(os.environ.get(name) or "none" for name in SETTINGS))
    try:
        httpx.URL(told.base_url)
    except httpx.InvalidURL as error:
        raise UserError(f"{SETTINGS[0]} is no address ({error}); correct it") from None
    return told


def converse(say: Say, system: str, question: Any, read: Callable[[Reply], Answer]) -> Answer:
    """Ask a model, text or a list of parts; an answer that `read` refuses by ValueError goes back, once, with what is
    wrong. Raises AnswerError where the second answer is refused as well."""
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    for _ in range(2):
        reply = say(messages)
        try:
            return read(reply)
        except ValueError as error:
            fault = str(error)[:500]
        repair = f"Not usable: {fault}. Answer again with the mended JSON object alone."
        messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": repair}]
    raise AnswerError(fault)


@contextlib.contextmanager
def connect(
    server: Endpoint, schema: Any, pay: Callable[[], None] = lambda: None, retries: int = 2, timeout: float = 300.0
) -> Iterator[Say]:
    """A server to `converse` with about JSON of a schema. Raises ServerError when it gives no answer.

    What it refuses for now is repeated `retries` times, with back-off; `timeout` is in seconds. `pay` is called before
    every request, and may raise.
    """
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    asked: Any = {"model": server.model, "temperature": 0, "response_format": form}

    def say(messages: list[Any]) -> Reply:
        try:
            answer = client.chat.completions.create(messages=messages, **asked)
        except openai.APIError as error:
            return _refusal(error)
        except UnicodeEncodeError:
            raise UserError("the server's key holds letters that no key has; correct CINEMA_LLM_API_KEY") from None
        tokens = getattr(getattr(answer, "usage", None), "total_tokens", None)
        tokens = tokens if isinstance(tokens, int) and tokens > 0 else TOKENS
        try:  # some answer 200 with something else: what is not as it should be counts as nothing said
            choice = answer.choices[0]
            text, refused, finish = choice.message.content, choice.message.refusal, choice.finish_reason
        except (AttributeError, LookupError, TypeError):
            return Reply("", tokens=tokens)
        finish = "content_filter" if refused else str(finish or "stop")
        return Reply(text if isinstance(text, str) else "", finish, tokens)

    hooks: Any = {"request": [lambda request: pay()], "response": [_check_json]}
    where: Any = {"base_url": server.base_url, "api_key": server.api_key, "max_retries": retries, "timeout": timeout}
    with openai.OpenAI(**where, http_client=openai.DefaultHttpxClient(event_hooks=hooks)) as client:
        yield say


def _check_json(response: Any) -> None:
    """Have the client repeat a request that is answered by something else."""
    response.read()
    try:
        _ = response.is_success and response.json()
    except ValueError:
        raise httpx.DecodingError("what answers is no JSON") from None


def _seconds(wait: str) -> float:
    """Of a Retry-After, which is a number or a date; none if it is neither."""
    with contextlib.suppress(ValueError):
        return float(wait)
    with contextlib.suppress(ValueError, TypeError):
        return parsedate_to_datetime(wait).timestamp() - time.time()
    return 0.0


def _refusal(error: openai.APIError) -> Reply:
    """What a model says by refusing a request; else raises ServerError."""
    if error.code in ("content_filter", "content_policy_violation"):
        return Reply("", "content_filter")
    what, wait, passes = "does not answer", "", False
    if isinstance(error, openai.APITimeoutError):
        what, passes = "does not answer in time", True
    elif isinstance(error, openai.APIStatusError):
        wait, status = error.response.headers.get("retry-after", ""), error.status_code
        what = f"answers {status} {error.response.reason_phrase}" + f", and asks to wait for {wait} s" * bool(wait)
        passes = status not in (401, 402, 403, 404) and error.code != "insufficient_quota"
    told = ServerError(
        f"{error.request.url.host}: the model cannot be asked, for its server {what}; correct CINEMA_LLM_* or wait, "
        "and run the same command again"
    )
    told.passes = passes and _seconds(wait) <= PATIENCE_S
    raise told from None
