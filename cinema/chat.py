"""Asking a language or vision model, behind any OpenAI-compatible server, for an answer that a program can use."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cinema.errors import UserError

PICTURE = 1_500  # tokens that a picture is taken to cost where the server does not say
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
    """One request to an `openai.OpenAI`, whose import takes a second, so only those who ask pay for it.

    Tokens are guessed where the server does not say. OpenAIError as its client raises it, and for what is no JSON.
    """
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    try:
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, response_format=form)
    except UnicodeEncodeError:
        raise UserError("the server's key holds letters that no key has; correct CINEMA_LLM_API_KEY") from None
    except ValueError:
        answer = ""
    if isinstance(answer, str):  # no JSON: no model said it
        from openai import OpenAIError

        raise OpenAIError("what answers is no JSON")
    # Some servers answer 200 with something else: what is not as it should be counts as nothing said.
    choice = next(iter(choices), None) if isinstance(choices := getattr(answer, "choices", None), list) else None
    message, told = getattr(choice, "message", None), getattr(answer, "usage", None)
    content, refused = getattr(message, "content", None), getattr(message, "refusal", None)
    text, tokens = content if isinstance(content, str) else "", getattr(told, "total_tokens", None)
    finish = "content_filter" if refused else str(getattr(choice, "finish_reason", None) or "stop")
    return Reply(text, finish, tokens if isinstance(tokens, int) and tokens > 0 else _guess(messages, text))


def _guess(messages: list[Any], answer: str) -> int:
    """Tokens of a request whose server does not say: one for three letters, PICTURE for each picture."""
    parts = [part for m in messages for part in (m["content"] if isinstance(m["content"], list) else [m["content"]])]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
    pictures = sum(isinstance(part, dict) and "text" not in part for part in parts)
    return PICTURE * pictures + (len(answer) + sum(map(len, texts))) // 3
