"""Asking a language or vision model, behind any OpenAI-compatible server, for an answer that a program can use."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cinema.errors import UserError

Answer = TypeVar("Answer")


class AnswerError(ValueError):
    """The model gave no usable answer, asked twice; the message says what is wrong with the last."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint: its base address, key and model name."""

    base_url: str
    api_key: str
    model: str


def endpoint_from_environment() -> Endpoint | None:
    """The endpoint of CINEMA_LLM_BASE_URL, CINEMA_LLM_MODEL and CINEMA_LLM_API_KEY; None where no address is set.

    Raises:
        UserError: an address is set but no model.
    """
    if not (base_url := os.environ.get("CINEMA_LLM_BASE_URL")):
        return None
    if not (model := os.environ.get("CINEMA_LLM_MODEL")):
        raise UserError("CINEMA_LLM_BASE_URL is set but CINEMA_LLM_MODEL is not; set it to the model's name")
    return Endpoint(base_url, os.environ.get("CINEMA_LLM_API_KEY") or "none", model)


def ask(
    client: Any, model: str, system: str, question: Any, schema: dict[str, Any], read: Callable[[str], Answer]
) -> Answer:
    """Ask for JSON of a schema; an answer that `read` refuses by ValueError goes back, once, with what is wrong.

    Args:
        client: an `openai.OpenAI`; its import takes a second, so only those who ask pay for it.
        question: the user's message, text or a list of parts.

    Raises:
        AnswerError: the second answer is refused as well.
        openai.OpenAIError: the server gives none.
    """
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for _ in range(2):
        text = ""
        try:
            reply = client.chat.completions.create(model=model, messages=messages, temperature=0, response_format=form)
            choices = getattr(reply, "choices", None)  # some servers answer 200 with something else
            text = (choices[0].message.content or "") if choices else ""
            return read(text)
        except ValueError as error:
            fault = str(error)[:500]
        messages += repair(text, fault)
    raise AnswerError(fault)


def repair(text: str, fault: str) -> list[Any]:
    """The messages that ask once more: what the model said, and what is wrong with it."""
    request = f"Not usable: {fault}. Answer again with the mended JSON object alone."
    return [{"role": "assistant", "content": text}, {"role": "user", "content": request}]
