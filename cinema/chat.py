"""Asking a language or vision model, behind any OpenAI-compatible server, for an answer that a program can use."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import openai

from cinema.errors import UserError

SETTINGS = ("CINEMA_LLM_BASE_URL", "CINEMA_LLM_API_KEY", "CINEMA_LLM_MODEL")
PATIENCE_S = 120  # openai's client waits as long as a server asks it to, up to this; then it does not ask again
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

    def __init__(self, host: str, what: str, passes: bool = True):
        cure = "correct CINEMA_LLM_* or wait, and run the same command again"
        super().__init__(f"{host}: the model cannot be asked, for its server {what}; {cure}")
        self.passes = passes


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint: its base address, key and model name."""

    base_url: str
    api_key: str
    model: str


def endpoint_from_environment(needed: tuple[str, ...] = SETTINGS) -> Endpoint:
    """The endpoint that SETTINGS name; UserError tells which of those `needed` is missing, or which is none."""
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(f"a server's model is asked by address, key and name; set {missing[0]}")
    told = Endpoint(*(os.environ.get(name) or "none" for name in SETTINGS))
    if not told.api_key.isascii():
        raise UserError(f"{SETTINGS[1]} holds letters that no key has; correct it")
    try:
        openai.OpenAI(base_url=told.base_url, api_key="none").close()
    except Exception:  # its name depends on what openai is built on; its text may hold part of a password
        raise UserError(f"{SETTINGS[0]} is no address; correct it, to such as http://localhost:8000/v1") from None
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
            answer: Any = client.chat.completions.create(messages=messages, **asked)
        except openai.APIError as error:
            return _refusal(error, client.base_url.host)
        except json.JSONDecodeError:
            answer = ""
        if isinstance(answer, str):
            raise ServerError(client.base_url.host, "answers something that is no JSON")
        try:
            choice, tokens = answer.choices[0], answer.usage.total_tokens if answer.usage else 0
            finish = "content_filter" if choice.message.refusal else choice.finish_reason or "stop"
            return Reply(choice.message.content or "", finish, tokens)
        except (AttributeError, LookupError, TypeError):  # other JSON than it should be: nothing was said
            return Reply("")

    hooks: Any = {"request": [lambda request: pay()]}
    where: Any = {"base_url": server.base_url, "api_key": server.api_key, "max_retries": retries, "timeout": timeout}
    with openai.OpenAI(**where, http_client=openai.DefaultHttpxClient(event_hooks=hooks)) as client:
        yield say


def _seconds(wait: str) -> float:
    """Of a Retry-After, which is a number or a date; none if it is neither."""
    with contextlib.suppress(ValueError, TypeError):
        return float(wait) if wait[:1].isdigit() else parsedate_to_datetime(wait).timestamp() - time.time()
    return 0.0


def _refusal(error: openai.APIError, host: str) -> Reply:
    """What a model says by refusing a request; else raises ServerError."""
    if error.code in ("content_filter", "content_policy_violation"):
        return Reply("", "content_filter")
    if isinstance(error, openai.APIStatusError):
        status, wait = error.status_code, _seconds(error.response.headers.get("retry-after", ""))
        passes = status not in (401, 402, 403, 404) and error.code != "insufficient_quota" and wait <= PATIENCE_S
        asks = f", and asks to wait for {wait:.0f} s" * (wait > 0)
        raise ServerError(host, f"answers {status} {error.response.reason_phrase}{asks}", passes) from None
    late = isinstance(error, openai.APITimeoutError)
    raise ServerError(host, "does not answer" + " in time" * late, passes=late) from None
