from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import endpoints

from cinema.chat import AnswerError, Endpoint, Reply, ServerError, connect, converse

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


@pytest.mark.parametrize(("told", "tokens"), [('{"total_tokens": 77}', 77), ("null", 0)])
def test_tokens_are_those_that_the_server_counts(serve, told, tokens):
    endpoint, _ = serve(f'{{"choices": [{{"message": {{"content": "1"}}}}], "usage": {told}}}')
    with connect(endpoint, {}) as say:
        assert say([{"role": "user", "content": "x"}]) == Reply("1", "stop", tokens)
