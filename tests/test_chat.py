import httpx
import pytest
from openai import OpenAI

from cinema.chat import AnswerError, ask


@pytest.mark.parametrize("body", ['{"choices": [', "[]", '{"choices": []}', '{"choices": [{"message": {}}]}', "prose"])
def test_a_server_that_sends_half_a_reply_is_asked_twice_and_then_named(body):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, text=body, headers={"Content-Type": "application/json"})

    with (
        OpenAI(
            base_url="http://none/v1", api_key="k", http_client=httpx.Client(transport=httpx.MockTransport(answer))
        ) as client,
        pytest.raises(AnswerError),
    ):
        ask(client, "m", "system", "question", {"type": "object"}, int)
    assert len(asked) == 2
