import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_curation import files, make_film

from cinema.cli import main
from cinema.curation import (
    Annotator,
    Desk,
    GroundTruthAnnotator,
    LocalAnnotator,
    NoAnnotator,
    StoppedError,
    VisionAnnotator,
    curate,
    curate_film,
    read_film,
)
from cinema.curation.annotate import Caption
from cinema.curation.frames import to_jpeg
from cinema.curation.store import CuratedShot
from cinema.errors import UserError
from cinema.story import Character

CAST = [Character(tag="<ada>", description="red round"), Character(tag="<bo>", description="blue square")]
GOOD = json.dumps({"caption": "Wide shot,\n <ada> waves.", "tags": ["<ada>"]})
# What the model says; or the status that the server answers instead; or details, see Handler.
Answer = str | int | dict[str, Any]


class Server(ThreadingHTTPServer):
    """A chat server that keeps what it was asked and answers from a list, its last answer for ever."""

    daemon_threads = True

    def __init__(self, answers: list[Answer]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.closing = list(answers), list[dict[str, Any]](), threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        said = answer if isinstance(answer, dict) else {}
        if isinstance(answer, str):
            said = {"message": {"content": answer}}
        status = answer if isinstance(answer, int) else said.get("status", 200)
        if said.get("hangs"):
            self.server.closing.wait()
        if "kill" in said:
            os.kill(said["kill"](), signal.SIGKILL)
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": {"total_tokens": 100}}
        message = {"role": "assistant", **said.get("message", {})}
        reply["choices"] = [{"index": 0, "finish_reason": said.get("finish", "stop"), "message": message}]
        error = {"error": {"message": "no", "code": said.get("code")}}
        body = said.get("body") or json.dumps(reply if status == 200 else error).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **said.get("headers", {})}.items():
            self.send_header(name, value)
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
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def shot(number: int = 0) -> CuratedShot:
    image = to_jpeg(np.full((8, 16, 3), 9 + 20 * number, np.uint8))
    times = {"start_s": float(number), "end_s": number + 1.0, "keyframe_s": number + 0.5, "time_base": "1/8"}
    crop = {"crop_left": 0, "crop_top": 0, "crop_right": 16, "crop_bottom": 8}
    return CuratedShot(shot=number, start_frame=8 * number, end_frame=8 * number + 8, image=image, **times, **crop)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the annotator would have slept."""
    pauses = list[float]()
    clock = SimpleNamespace(sleep=pauses.append, time=time.time)
    monkeypatch.setattr("openai._base_client.time", clock)
    return pauses


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
    assert complaint in caption.reason and caption.reason.startswith("INVALID: ")


def test_a_server_in_trouble_costs_a_caption_that_the_next_run_fetches(serve, tmp_path):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    server = serve([GOOD, 500, GOOD])
    (one,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert (one.status, one.shots, one.kept) == ("partial", 2, 1) and "because of the server" in one.reason
    assert read_film(tmp_path / "out" / "a.parquet").shots[1].reason.startswith("ERROR: 127.0.0.1: ")
    (two,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert (two.status, two.kept, two.skipped) == ("ok", 2, False)
    asked = len(server.asked)
    assert asked == 3  # the first caption was not asked for again
    (three,) = curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST, retries=0), height=64).films
    assert three.skipped and len(server.asked) == asked


@pytest.mark.parametrize("status", [500, 429, 400])
def test_a_refused_request_is_named_and_kept_for_the_next_run(serve, status):
    serve([status])
    (caption,) = VisionAnnotator(CAST, retries=0).caption(Path("a.mp4"), [shot()])
    assert (caption.kept, caption.retry) == (False, True)
    assert caption.reason.startswith("ERROR: 127.0.0.1: ") and f"its server answers {status} " in caption.reason


def test_a_server_that_does_not_answer_is_an_error_too(serve):
    serve([{"hangs": True}])
    (caption,) = VisionAnnotator(CAST, retries=0, timeout=0.2).caption(Path("a.mp4"), [shot()])
    assert caption.retry and re.match("ERROR: .*does not answer in time", caption.reason)


def test_back_off_is_as_long_as_the_server_says_and_random_beyond(serve, slept):
    date = formatdate(time.time() + 30, usegmt=True)
    server = serve([{"status": 429, "headers": {"Retry-After": "7"}}, 500, 503, GOOD])
    (caption,) = VisionAnnotator(CAST).caption(Path("a.mp4"), [shot()])
    assert caption.kept and len(server.asked) == 4
    for pause, low, high in zip(slept, [7, 0, 0], [7.5, 1, 2], strict=True):
        assert low <= pause <= high
    slept.clear()
    serve([{"status": 503, "headers": {"Retry-After": date}}, GOOD])
    VisionAnnotator(CAST).caption(Path("a.mp4"), [shot()])
    assert 1 < slept[0] <= 31


CUT = {"finish": "length", "message": {"content": '{"caption": "A very'}}


@pytest.mark.parametrize(
    ("answer", "word", "asked"),
    [
        ({"finish": "content_filter", "message": {"content": None}}, "BLOCKED", 1),
        ({"message": {"content": None, "refusal": "I will not."}}, "BLOCKED", 1),
        ({"status": 400, "code": "content_filter"}, "BLOCKED", 1),
        (CUT, "TRUNCATED", 2),
        ({"message": {"content": '{"caption": "  ", "tags": []}'}}, "INVALID", 2),
        ({"message": {"content": '{"caption": "A \\u0007 rings.", "tags": []}'}}, "INVALID", 2),
        ({"message": {"content": '{"caption": "<Ada> waits.", "tags": []}'}}, "INVALID", 2),
        ({"body": b'{"choices": null}'}, "INVALID", 2),
    ],
)
def test_what_was_answered_is_kept_apart_and_never_asked_again(serve, tmp_path, answer, word, asked):
    server, desk = serve([answer]), Desk(tmp_path / "a.jsonl")
    for _ in range(2):
        (caption,) = VisionAnnotator(CAST).caption(Path("a.mp4"), [shot()], desk)
        assert (caption.kept, caption.retry, caption.reason.partition(":")[0]) == (False, False, word)
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    "answer",
    [{"body": b"<html>busy</html>", "headers": {"Content-Type": "text/html"}}, {"body": b'{"choices": ['}],
)
def test_what_is_no_json_is_no_answer_and_is_asked_for_again(serve, tmp_path, answer):
    serve([answer, {"message": {"content": GOOD}}])
    desk, annotator = Desk(tmp_path / "a.jsonl"), VisionAnnotator(CAST)
    (none,), (caption,) = (annotator.caption(Path("a.mp4"), [shot()], desk) for _ in range(2))
    assert none.retry and "something that is no JSON" in none.reason and caption.kept


def test_a_misbehaving_server_costs_nothing_twice_whatever_the_limit_stops(serve, slept, tmp_path):
    prose, half, eve = "Sure! A man.", '{"caption": "A', '{"caption": "<eve> sits.", "tags": ["<eve>"]}'
    answers = [prose, GOOD, 500, half, {"status": 429, "headers": {"Retry-After": "1"}}, "", eve, GOOD, CUT, GOOD, GOOD]
    shots = [shot(i) for i in range(5)]
    server = serve(answers)
    whole = VisionAnnotator(CAST).caption(Path("a.mp4"), shots, Desk(tmp_path / "whole.jsonl"))
    assert [c.kept for c in whole] == [True, False, True, True, True] and len(server.asked) == len(answers)
    for limit in (1, 2, 3):
        server, captions, runs = serve(answers), [], 0
        while not captions:
            left = iter(range(limit))

            def pay(left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise StoppedError

            before, runs = len(server.asked), runs + 1
            with contextlib.suppress(StoppedError):
                captions = VisionAnnotator(CAST).caption(
                    Path("a.mp4"), shots, Desk(tmp_path / f"{limit}.jsonl", pay=pay)
                )
            assert len(server.asked) - before <= limit
        assert captions == whole and len(server.asked) == len(answers) and runs == -(-len(answers) // limit)
        assert (tmp_path / f"{limit}.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_kill_between_answers_loses_none_and_the_result_is_the_same(serve, tmp_path):
    film, names = make_film(tmp_path / "a.mp4", [9, 9, 9]), ["A door.", "A wall.", "A lamp."]
    answers: list[Answer] = [json.dumps({"caption": name, "tags": []}) for name in names]
    serve(answers)
    curate_film(film, tmp_path / "whole", annotator=VisionAnnotator(CAST), height=32)
    child = 0
    server = serve([*answers[:2], {"kill": lambda: child}, *answers[2:]])
    annotator = VisionAnnotator(CAST)
    child = os.fork()
    if not child:
        try:
            curate_film(film, tmp_path / "out", annotator=annotator, height=32)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with open(tmp_path / "out" / "a.captions.jsonl", "ab") as journal:
        journal.write(b'{"key": ["half a li')  # what a power cut leaves
    curate_film(film, tmp_path / "out", annotator=annotator, height=32)
    assert len(server.asked) == 4  # three, and the one whose answer nobody was there to hear
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_spending_limit_ends_a_run_and_the_next_one_goes_on(serve, tmp_path, monkeypatch, capsys):
    films = [make_film(tmp_path / f"{name}.mp4", [9, 9]) for name in "ab"]
    server = serve([json.dumps({"caption": "A door.", "tags": []})])
    with pytest.raises(StoppedError, match="the spending limit is reached; the same command goes on from here"):
        curate(films, tmp_path / "out", annotator=VisionAnnotator(CAST), height=32, max_requests=1)
    assert len(server.asked) == 1 and not (tmp_path / "out" / "a.parquet").exists()

    def never(*_: Any) -> None:
        raise AssertionError("looked at a film again")

    with monkeypatch.context() as patch:
        patch.setattr("cinema.curation.run.scan_film", never)
        assert curate_film(films[0], tmp_path / "out", annotator=VisionAnnotator(CAST), height=32).kept == 2
    monkeypatch.setenv("CINEMA_PRESET", "toy")
    command = ["curate", *map(str, films), "-o", str(tmp_path / "cli"), "--annotator", "vision", "--workers", "1"]
    assert main([*command, "--max-requests", "3"]) == 1
    assert "the spending limit is reached" in capsys.readouterr().err
    assert main(command) == 0 and len(server.asked) == 2 + 4
    curate(films, tmp_path / "out", annotator=VisionAnnotator(CAST), height=32)
    curate(films, tmp_path / "whole", annotator=VisionAnnotator(CAST), height=32)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_was_done_before_the_limit_is_described_shown_and_sent(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CINEMA_PRESET", "toy")
    films = [make_film(tmp_path / f"{name}.mp4", [9]) for name in "ab"]
    serve([json.dumps({"caption": "A door.", "tags": []})])
    command = ["curate", *map(str, films), "-o", f"local://{tmp_path}/there", "--annotator", "vision", "--workers", "1"]
    command += ["--report", "--json", str(tmp_path / "j.json"), "--max-requests"]
    for limit, statuses in (("0", ["waiting", "waiting"]), ("1", ["ok", "waiting"])):
        assert main([*command, limit]) == 1
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].startswith("the spending limit is reached") and "waiting" in said.out
        assert [f["status"] for f in json.loads((tmp_path / "j.json").read_text())["films"]] == statuses
    there = tmp_path / "there"
    sent = {"README.md", "a.parquet", "a.done.json", "report/index.html", "report/films/a.html"}
    assert all((there / name).is_file() for name in sent) and not (there / "b.done.json").exists()
    assert "1 film" in (there / "README.md").read_text()


def test_every_film_may_have_a_character_bank_of_its_own(serve, tmp_path):
    server = serve([GOOD])
    (tmp_path / "a.yaml").write_text("cast: [{tag: <ada>, description: green}]\n")
    annotator = VisionAnnotator(CAST[1:])
    (known,), (unknown,) = (annotator.caption(tmp_path / name, [shot()]) for name in ("a.mp4", "b.mp4"))
    assert known.kept and "<ada> is not a tag of the cast" in unknown.reason
    assert json.loads(server.asked[0]["messages"][1]["content"][0]["text"])["cast"][0]["description"] == "green"


def test_a_changed_bank_has_its_film_captioned_again_and_no_other(serve, tmp_path):
    serve([json.dumps({"caption": "A door.", "tags": []})])
    films = [make_film(tmp_path / f"{name}.mp4", [9]) for name in "ab"]
    for look, skipped in (("red", [False, False]), ("blue", [False, True])):
        (tmp_path / "a.yaml").write_text(f"cast: [{{tag: <ada>, description: {look}}}]\n")
        for expected in (skipped, [True, True]):
            report = curate(films, tmp_path / "out", annotator=VisionAnnotator(), height=32)
            assert [f.skipped for f in report.films] == expected
        assert read_film(tmp_path / "out" / "a.parquet").cast[0].description == look


def test_a_wrong_key_or_no_server_stops_the_run_and_leaves_no_film(serve, slept, tmp_path, monkeypatch):
    film = make_film(tmp_path / "a.mp4", [12])
    serve([401])
    with pytest.raises(StoppedError, match="its server answers 401 Unauthorized; correct CINEMA_LLM_"):
        curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST), height=64)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        monkeypatch.setenv("CINEMA_LLM_BASE_URL", f"http://me:secret@127.0.0.1:{closed.server_port}/v1")
    with pytest.raises(StoppedError, match=r"^127\.0\.0\.1: .* its server does not answer;"):
        curate_film(film, tmp_path / "out", annotator=VisionAnnotator(CAST), height=64)
    assert len(slept) == 4 and not list((tmp_path / "out").glob("[!.]*.parquet"))


@pytest.mark.parametrize("wait", ["3600", "date"])
def test_a_server_that_asks_for_a_long_pause_stops_the_run_and_says_how_long(serve, slept, tmp_path, wait):
    film = make_film(tmp_path / "a.mp4", [12, 12])
    date = formatdate(time.time() + 3600, usegmt=True)
    server = serve([{"status": 429, "headers": {"Retry-After": date if wait == "date" else wait}}])
    with pytest.raises(StoppedError, match=r"answers 429 .*, and asks to wait for (3600|359\d) s; .* or wait"):
        curate([film], tmp_path / "out", annotator=VisionAnnotator(CAST), height=64)
    assert len(server.asked) == 1 and not list((tmp_path / "out").glob("*.done.json"))
    serve([{"status": 429, "headers": {"Retry-After": "soon"}}])
    (caption,) = VisionAnnotator(CAST, retries=0).caption(Path("a.mp4"), [shot()])
    assert caption.retry and "wait for" not in caption.reason


@pytest.mark.parametrize(
    ("setting", "value"),
    [("BASE_URL", "http://[::1"), ("BASE_URL", "http://me:se/cret@host"), ("API_KEY", "kéy"), ("API_KEY", "k\udcff")],
)
def test_an_address_or_key_that_is_none_stops_the_run_and_leaves_films_undone(
    serve, tmp_path, monkeypatch, capsys, setting, value
):
    serve([GOOD])
    monkeypatch.setenv(f"CINEMA_LLM_{setting}", value)
    film = make_film(tmp_path / "a.mp4", [9])
    assert main(["curate", str(film), "-o", str(tmp_path / "out"), "--annotator", "vision"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"CINEMA_LLM_{setting} ") and "correct it" in said and "se" not in said.split()
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


def tiny_model(folder: Path) -> str:
    """Write a vision-language model of random weights, with a processor that reads bytes."""
    import torch
    import transformers as t
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, **special, additional_special_tokens=["<image>"])
    part = "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}" + part + "{% endfor %} {% endfor %}"
    )
    pixels = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    look = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    t.LlavaProcessor(pixels, tokenizer, chat_template=template, **look).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    eye = t.CLIPVisionConfig(**small, image_size=16, patch_size=8, projection_dim=16)
    mouth = t.LlamaConfig(**small, vocab_size=len(tokenizer), max_position_embeddings=8192)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    whole = t.LlavaConfig(vision_config=eye, text_config=mouth, image_token_index=image)
    t.LlavaForConditionalGeneration(whole).save_pretrained(folder)
    return str(folder)


def test_a_local_model_is_shown_the_frame_and_its_answers_are_kept(tmp_path):
    annotator, desk = LocalAnnotator(tiny_model(tmp_path / "model"), CAST, longest=5), Desk(tmp_path / "a.jsonl")
    first = annotator.caption(Path("a.mp4"), [shot(), shot(1)], desk)
    assert [c.reason.partition(":")[0] for c in first] == ["TRUNCATED"] * 2  # random weights babble
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["finish"] == "length" and line["tokens"] >= 5 for line in lines)
    wise, asked = LocalAnnotator(annotator.model, CAST), list[Any]()
    pipe = wise._pipe

    def generate(**inputs: Any) -> Any:
        asked.append(inputs)
        said = pipe.tokenizer(GOOD, return_tensors="pt")["input_ids"]
        return torch.cat([inputs["input_ids"], said], dim=1)

    import torch

    pipe.model.generate = generate
    (caption,) = wise.caption(Path("a.mp4"), [shot(2)], desk)
    assert caption == Caption("Wide shot, <ada> waves.", ["<ada>"])
    text = pipe.tokenizer.decode(asked[0]["input_ids"][0])
    assert "red round" in text and asked[0]["do_sample"] is False
    assert asked[0]["pixel_values"].shape == (1, 3, 16, 16)
    (tmp_path / "model" / "config.json").unlink()
    assert LocalAnnotator(annotator.model, CAST, longest=5).caption(Path("a.mp4"), [shot(), shot(1)], desk) == first
    with pytest.raises(StoppedError, match="no image-text-to-text model can be loaded"):
        LocalAnnotator(annotator.model).caption(Path("a.mp4"), [shot()])
    with pytest.raises(UserError, match="--model"):
        LocalAnnotator(None)
