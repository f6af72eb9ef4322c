import httpx
import pytest
from openai import OpenAI, OpenAIError

from cinema.chat import PICTURE, AnswerError, ask, request
from cinema.errors import UserError

ODD = ['{"choices": ["a"]}', '{"choices": {"a": 1}}', '{"choices": [null], "usage": {"total_tokens": "9"}}']
ODD += ["[]", '{"choices": []}', '{"choices": [{"message": {}}]}', '{"choices": [{"message": {"content": ["a"]}}]}']


@pytest.mark.parametrize(
    ("body", "error"), [*((b, AnswerError) for b in ODD), *((b, OpenAIError) for b in ('{"ch', "a"))]
)
def test_a_server_that_sends_something_else_is_asked_twice_and_no_json_is_no_answer(body, error):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, text=body, headers={"Content-Type": "application/json"})

    with (
        OpenAI(
            base_url="http://none/v1", api_key="k", http_client=httpx.Client(transport=httpx.MockTransport(answer))
        ) as client,
        pytest.raises(error),
    ):
        ask(client, "m", "system", "question", {"type": "object"}, int)
    assert len(asked) == (2 if error is AnswerError else 1)


def test_tokens_are_guessed_where_the_server_does_not_say():
    picture = {"type": "image_url", "image_url": {"url": "data:..."}}
    messages = [
        {"role": "system", "content": "x" * 300},
        {"role": "user", "content": [{"type": "text", "text": "y" * 30}, picture]},
    ]

    def tokens(usage: dict | None) -> int:
        body = {"choices": [{"message": {"content": "z" * 30}}]} | ({"usage": usage} if usage else {})
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
        with OpenAI(base_url="http://none/v1", api_key="k", http_client=httpx.Client(transport=transport)) as client:
            return request(client, "m", messages, {}).tokens

    assert tokens({"total_tokens": 77}) == 77
    assert tokens(None) == tokens({"total_tokens": -9}) == PICTURE + 120


def test_a_key_of_odd_letters_is_one_sentence():
    client = OpenAI(base_url="http://127.0.0.1:1/v1", api_key="schlüssel", max_retries=0)
    with client, pytest.raises(UserError, match="letters that no key has"):
        ask(client, "m", "system", "question", {"type": "object"}, int)
