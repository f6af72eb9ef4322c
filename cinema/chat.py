"""Asking a language or vision model, behind any OpenAI-compatible server, for an answer that a program can use."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cinema.errors import UserError

Answer = TypeVar("Answer")
Say = Callable[[list[Any], int], "Reply"]  # (messages, 0, or 1 for the second try) -> the model's reply to them


@dataclass(frozen=True)
class Reply:
    """A model's answer: its text, why it ended ("stop", "length", "content_filter"), and tokens paid for it."""

    text: str
    finish: str = "stop"
    tokens: int = 0


class AnswerError(ValueError):
    """The model gave no usable answer, asked twice; the message says what is wrong with the last, `reply`."""

    def __init__(self, fault: str, reply: Reply):
        super().__init__(fault)
        self.reply = reply


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint: its base address, key and model name."""

    base_url: str
    api_key: str
    model: str


def endpoint_from_environment() -> Endpoint | None:
    """The endpoint that CINEMA_LLM_* name; None where no address is set, UserError where one is but no model."""
    if not (base_url := os.environ.get("CINEMA_LLM_BASE_URL")):
        return None
    if not (model := os.environ.get("CINEMA_LLM_MODEL")):
        raise UserError("CINEMA_LLM_BASE_URL is set but CINEMA_LLM_MODEL is not; set it to the model's name")
    return Endpoint(base_url, os.environ.get("CINEMA_LLM_API_KEY") or "none", model)


def ask(
    client: Any, model: str, system: str, question: Any, schema: dict[str, Any], read: Callable[[str], Answer]
) -> Answer:
    """Have a `converse` with a server about JSON of a schema; raises openai.OpenAIError if it gives no answer."""
    return converse(
        lambda messages, _: request(client, model, messages, schema), system, question, lambda reply: read(reply.text)
    )


def converse(say: Say, system: str, question: Any, read: Callable[[Reply], Answer]) -> Answer:
    """Ask a model, text or a list of parts; an answer that `read` refuses by ValueError goes back, once, with what is
    wrong. Raises AnswerError where the second answer is refused as well."""
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    for turn in range(2):
        reply = say(messages, turn)
        try:
            return read(reply)
        except ValueError as error:
            fault = str(error)[:500]
        repair = f"Not usable: {fault}. Answer again with the mended JSON object alone."
        messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": repair}]
    raise AnswerError(fault, reply)


def request(client: Any, model: str, messages: list[Any], schema: dict[str, Any]) -> Reply:
    """One request to an `openai.OpenAI`, whose import takes a second, so only those who ask pay for it."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    try:
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, response_format=form)
    except ValueError:  # the body is no JSON
        return Reply("")
    choices = getattr(answer, "choices", None)  # some servers answer 200 with something else
    tokens = getattr(getattr(answer, "usage", None), "total_tokens", None) or 0
    if not choices or (message := choices[0].message) is None:
        return Reply("", tokens=tokens)
    finish = "content_filter" if getattr(message, "refusal", None) else choices[0].finish_reason or "stop"
    return Reply(message.content or "", finish, tokens)
