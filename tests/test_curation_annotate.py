import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_curation import make_film

from cinema.curation import Annotator, GroundTruthAnnotator, NoAnnotator, StoppedError, VisionAnnotator, curate
from cinema.curation.frames import to_jpeg
from cinema.curation.store import CuratedShot
from cinema.errors import UserError
from cinema.story import Character

CAST = [Character(tag="<ada>", description="red round"), Character(tag="<bo>", description="blue square")]
GOOD = json.dumps({"caption": "Wide shot,\n <ada> waves.", "tags": ["<ada>"]})
Answer = str | int  # what the model says, or the status that the server answers instead


class Server(HTTPServer):
    """A chat server that keeps what it was asked and answers from a list, its last answer for ever."""

    def __init__(self, answers: list[Answer]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = list(answers), list[dict[str, Any]]()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        message = {"role": "assistant", "content": answer}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        body = json.dumps(reply if isinstance(answer, str) else {"error": {"message": "no"}}).encode()
        self.send_response(200 if isinstance(answer, str) else answer)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[Answer]], Server]]:
    running: list[tuple[Server, threading.Thread]] = []

    def start(answers: list[Answer]) -> Server:
        server = Server(answers)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        monkeypatch.setenv("CINEMA_LLM_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("CINEMA_LLM_API_KEY", "word")
        monkeypatch.setenv("CINEMA_LLM_MODEL", "small-eye")
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def shot(number: int = 0) -> CuratedShot:
    image = to_jpeg(np.full((8, 16, 3), 9, np.uint8))
    times = {"start_s": float(number), "end_s": number + 1.0, "keyframe_s": number + 0.5, "time_base": "1/8"}
    crop = {"crop_left": 0, "crop_top": 0, "crop_right": 16, "crop_bottom": 8}
    return CuratedShot(shot=number, start_frame=8 * number, end_frame=8 * number + 8, image=image, **times, **crop)


def test_all_annotators_keep_the_protocol(serve):
    serve([GOOD])
    for annotator in (NoAnnotator(), GroundTruthAnnotator(), VisionAnnotator()):
        assert isinstance(annotator, Annotator)


def test_a_good_answer_is_a_caption_and_the_next_question_carries_it(serve):
    server = serve([GOOD, json.dumps({"caption": "A door.", "tags": []})])
    first, second = VisionAnnotator(CAST).caption(Path("a.mp4"), [shot(0), shot(1)])
    assert (first.text, first.tags, first.kept) == ("Wide shot, <ada> waves.", ["<ada>"], True)
    assert (second.text, second.tags, second.kept) == ("A door.", [], True)
    (system, user), before = server.asked[0]["messages"], server.asked[1]["messages"][1]["content"][0]["text"]
    assert server.asked[0]["model"] == "small-eye" and system["role"] == "system"
    assert json.loads(user["content"][0]["text"]) == {"cast": [c.model_dump() for c in CAST], "captions_before": []}
    assert user["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert json.loads(before)["captions_before"] == ["Wide shot, <ada> waves."]
    schema = server.asked[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["tags"]["items"] == {"enum": ["<ada>", "<bo>"]}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("Sure! Here is the caption you asked for.", "Invalid JSON"),
        ('{"caption": "half', "Invalid JSON"),
        ("", "Invalid JSON"),
        ('{"caption": "", "tags": []}', "caption"),
        ('{"caption": "<eve> waits.", "tags": ["<eve>"]}', "<eve> is not a tag of the cast"),
        ('{"caption": "Nobody.", "tags": ["<ada>"]}', "exactly the tags"),
        ('{"caption": "<ada> waits.", "tags": [], "mood": "sad"}', "mood"),
    ],
)
def test_a_wrong_answer_is_repaired_once_else_the_shot_is_set_aside(serve, wrong, complaint):
    server = serve([wrong, GOOD])
    (caption,) = VisionAnnotator(CAST).caption(Path("a.mp4"), [shot()])
    assert caption.kept and caption.tags == ["<ada>"]
    *_, said, repair = server.asked[1]["messages"]
    assert said == {"role": "assistant", "content": wrong} and complaint in repair["content"]
    server = serve([wrong])
    (caption,) = VisionAnnotator(CAST).caption(Path("a.mp4"), [shot()])
    assert (caption.kept, caption.text, caption.retry, len(server.asked)) == (False, "", False, 2)
    assert complaint in caption.reason


def test_a_server_in_trouble_costs_a_caption_that_the_next_run_fetches(serve, tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    server = serve([GOOD, 500, GOOD])
    (one,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert (one.status, one.shots, one.kept) == ("partial", 2, 1) and "because of the server" in one.reason
    (two,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert (two.status, two.kept, two.skipped) == ("ok", 2, False)
    asked = len(server.asked)
    (three,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert three.skipped and len(server.asked) == asked


@pytest.mark.parametrize(("status", "retry"), [(500, True), (429, True), (400, False)])
def test_a_refused_request_is_named(serve, status, retry):
    serve([status])
    (caption,) = VisionAnnotator(CAST, retries=0).caption(Path("a.mp4"), [shot()])
    assert (caption.kept, caption.retry, caption.reason) == (False, retry, f"the vision server answered {status}")


def test_a_wrong_key_or_no_server_stops_the_run_and_leaves_nothing(serve, tmp_path, monkeypatch):
    film = make_film(tmp_path / "a.mp4", [12])
    serve([401])
    with pytest.raises(StoppedError, match="key or the model is refused"):
        curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64)
    with HTTPServer(("127.0.0.1", 0), Handler) as closed:
        monkeypatch.setenv("CINEMA_LLM_BASE_URL", f"http://127.0.0.1:{closed.server_port}/v1")
    with pytest.raises(StoppedError, match="no vision server answers"):
        curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["CINEMA_LLM_BASE_URL", "CINEMA_LLM_API_KEY", "CINEMA_LLM_MODEL"])
def test_a_missing_setting_is_one_sentence(serve, monkeypatch, missing):
    serve([GOOD])
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"set {missing}"):
        VisionAnnotator(CAST)


def test_identity_tells_models_and_casts_apart_and_hides_the_key(serve, monkeypatch):
    serve([GOOD])
    one, other = VisionAnnotator(CAST).identity, VisionAnnotator(CAST[:1]).identity
    monkeypatch.setenv("CINEMA_LLM_MODEL", "big-eye")
    third = VisionAnnotator(CAST).identity
    assert one != other and one != third and one["model"] == "small-eye"
    assert "word" not in json.dumps([one, other, third])
