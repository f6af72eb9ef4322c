import json
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import endpoints

from cinema.errors import UserError
from cinema.story import Shot, Story, load_story
from cinema.toyworld.world import ACTIONS, CAMERAS, COLOURS, HATS, PLACES, POSITIONS, SHAPES, SIZES, parse_caption
from cinema.writer import Endpoint, caption_faults, endpoint_from_environment, write_story

STORIES = Path(str(files("cinema") / "stories"))
WALK = "Ada, red and round with a crown, hops through the woods. Bo greets her."


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch):
    for name in ("BASE_URL", "API_KEY", "MODEL"):
        monkeypatch.delenv(f"CINEMA_LLM_{name}", raising=False)


def read(text: str) -> list[str]:
    """Captions of the story that a text becomes, checked against the grammar."""
    story = write_story(text).story
    assert caption_faults(story) == []
    return [shot.caption for shot in story.shots]


def shots(text: str) -> list[tuple[str, str, dict[str, tuple[str, str]]]]:
    """(set, size, tag -> (position, action)) of every shot."""
    setups = [parse_caption(line)[0] for line in read(text)]
    return [(s.place, s.size, {a.tag: (a.position, a.action) for a in s.actors}) for s in setups]


def who(text: str) -> list[dict[str, str]]:
    """Tag -> action, shot by shot."""
    return [{tag: action for tag, (_, action) in actors.items()} for _, _, actors in shots(text)]


# --- the shipped stories ---


@pytest.mark.parametrize("path", sorted(STORIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_story_keeps_the_grammar_and_its_storyline_makes_it(path):
    story = load_story(path)
    assert caption_faults(story) == []
    assert 8 <= len(story.shots) <= 12 and len(story.cast) in (2, 3)
    assert len({shot.set for shot in story.shots}) >= 2
    assert len({c.description.split()[0] for c in story.cast}) == len(story.cast)
    assert {shot.duration for shot in story.shots} == {2.125}
    written = write_story(path.with_suffix(".txt").read_text())
    assert [s.caption for s in written.story.shots] == [s.caption for s in story.shots]
    assert written.story.title == story.title and written.story.cast == story.cast
    assert written.left_out == []


def test_three_stories_ship():
    assert len(list(STORIES.glob("*.yaml"))) == len(list(STORIES.glob("*.txt"))) == 3


# --- what the reader understands ---


def test_synonyms_names_pronouns_and_looks():
    text = (
        "Ada hops through the woods. Bo, a tall teal fellow in a top hat, strolls in from the left."
        " They meet and dance. Then Ada waves. She walks to the town."
    )
    story = write_story(text).story
    assert shots(text) == [
        ("forest", "wide", {"<ada>": ("center", "jumping")}),
        ("forest", "medium", {"<bo>": ("left", "walking")}),
        ("forest", "medium", {"<ada>": ("left", "swaying"), "<bo>": ("right", "swaying")}),
        ("forest", "close", {"<ada>": ("center", "waving")}),
        ("city", "wide", {"<ada>": ("center", "walking")}),
    ]
    assert story.cast[1].description == "teal tall, tophat"


def test_a_sentence_is_a_shot_with_the_first_of_what_it_says():
    (first,) = shots("Marie jumps from the forest to the beach.")
    assert first == ("forest", "wide", {"<marie>": ("center", "jumping")})
    assert write_story("Snow falls; Ada waves in the town.").left_out == ["sentence 1: “town”"]
    assert write_story("Ada jumps and then dances in the city.").left_out == ["sentence 1: “dances”"]
    assert who("Ada jumps while Bo waves in the city.") == [{"<ada>": "jumping", "<bo>": "waving"}]
    assert shots("Ada waves in the city. Night falls. Rain.")[1:] == [
        ("night", "wide", {"<ada>": ("center", "standing")})
    ]


@pytest.mark.parametrize(
    ("text", "camera", "size"),
    [
        ("The camera pans slowly to the left as Ada waves.", "pan left", "wide"),
        ("Panning right, from afar, Ada waves.", "pan right", "wide"),
        ("Close-up: Ada smiles, and the camera moves closer.", "push in", "close"),
        ("A medium shot with a fixed camera: Ada waves.", "static", "medium"),
    ],
)
def test_directions(text, camera, size):
    (caption,) = read(f"{text} ")
    setup, _ = parse_caption(caption)
    assert (setup.camera, setup.size) == (camera, size)


def test_who_is_meant():
    assert who("Ada jumps in the forest. Bo sways. Both wave.")[-1] == {"<ada>": "waving", "<bo>": "waving"}
    assert who("Ada jumps. Bo sways. Cleo walks. Everyone waves.")[-1] == dict.fromkeys(
        ("<ada>", "<bo>", "<cleo>"), "waving"
    )
    assert who("Ada meets Bo. Ada waves at him.")[-1] == {"<ada>": "waving", "<bo>": "standing"}
    assert who("The leaves sway. Ada does not jump.")[-1] == {"<ada>": "standing"}
    assert who("In the city Zoë jumps.") == [{"<zoe>": "jumping"}]
    assert who("Under the stars waves Bo.") == [{"<bo>": "waving"}]
    assert write_story("Ada meets a fox in Paris.").left_out == ["sentence 1: “fox”; “Paris”"]


def test_one_sentence_without_a_set():
    assert [place for place, _, _ in shots("Ada jumps.")] == ["forest"]
    assert any("no set is named" in line for line in write_story("Ada jumps.").understood)


def test_crowds_are_split_into_shots_that_hold_them():
    text = "Ada, Bo, Cleo, Dax and Eva dance in the snow. Close-up of Ada and Bo."
    sizes = [(size, len(actors)) for _, size, actors in shots(text)]
    assert sizes == [("wide", 3), ("medium", 2), ("close", 1), ("close", 1)]


def test_looks_that_are_not_told_are_chosen_once_and_never_share_a_colour():
    text = "Ada, Bo and Cleo dance in the city while red Dax waves."
    first, second = write_story(text), write_story(text)
    assert first == second
    colours = [c.description.split()[0] for c in first.story.cast]
    assert len(set(colours)) == 4 and first.story.cast[3].description.startswith("red ")
    assert sum("chosen, as the text does not say" in line and "<" in line for line in first.understood) == 4


def test_what_is_not_understood_is_left_out():
    written = write_story("Ada polishes the brass lantern of Prague and waves. The red sea glitters. It rained.")
    assert written.left_out == [
        "sentence 1: “polishes”; “brass”; “lantern”; “Prague”",
        "sentence 2: “red”; “glitters”",
        "sentence 3: “rained”",
    ]


def test_every_word_of_the_toy_world_means_itself():
    for place in PLACES:
        assert shots(f"Ada waves; {place}.")[0][0] == place
    for action in ACTIONS:
        assert who(f"Ada is {action}.") == [{"<ada>": action}]
    for colour, shape, hat in [(c, s, h) for c in COLOURS for s in SHAPES for h in HATS]:
        text = f"Ada is {colour} and {shape} and {hat}."
        assert write_story(text).story.cast[0].description == f"{colour} {shape}, {hat}"
    for size in SIZES:
        assert shots(f"A {size} shot: Ada waves.")[0][1] == size
    for camera in CAMERAS:
        assert read(f"Ada waves, {camera}.")[0].endswith(f" {camera}.")
    for position in POSITIONS:
        assert shots(f"Wide shot: Ada waves on the {position}." if position != "center" else
                     "Wide shot: Ada waves in the center.")[0][2]["<ada>"][0] == position  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", " \n\t ", "blorp fizz wug.", "It rained.", "It is winter.", "Two friends dance.", "12345 !!! ???"]
)
def test_nothing_to_film_is_one_sentence(text):
    with pytest.raises(UserError) as error:
        write_story(text)
    assert "\n" not in str(error.value)


VOCABULARY = re.findall(
    r"\S+",
    "Ada Bo Marie she he they both it him everyone the a red round crown hat forest night to into with and then , : . !"
    " jumps waves is close-up wide medium camera pans left right on fox called not in middle blorp Ölga <ada> two",
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=40))
def test_any_words_in_any_order_make_a_lawful_story_or_one_sentence(words):
    try:
        written = write_story(" ".join(words))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert caption_faults(written.story) == []


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_at_all(text):
    try:
        assert caption_faults(write_story(text).story) == []
    except UserError as error:
        assert str(error)


def test_caption_faults_finds_each_kind():
    story = write_story(WALK).story
    first, second = story.shots
    again = second.model_copy(update={"caption": second.caption.replace("standing", "standing: red round, crown")})
    elsewhere = first.model_copy(update={"set": "city"})
    crowd = Shot(caption="close shot, forest. <ada> left, waving. <bo> right, waving. static.")
    for shot, says in [(Shot(caption="a fine day"), "shot-list"), (crowd, "do not fit")]:
        broken = story.model_copy(update={"shots": [first, second, shot]})
        assert says in caption_faults(broken)[0]
    assert "'city'" in caption_faults(story.model_copy(update={"shots": [elsewhere, second]}))[0]
    assert "first appearance" in caption_faults(story.model_copy(update={"shots": [first, again, again]}))[0]


# --- the language model: the real client against a small server of our own on this machine ---


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., tuple[Endpoint, list[dict]]]]:
    """serve(answer, ...) starts an endpoint that gives these answers in turn, and collects what it was asked."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def body(content: str) -> str:
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    with endpoints() as start:
        yield lambda *told, status=200: start(lambda count: body(told[min(count, len(told)) - 1]), status)


def as_json(story: Story) -> str:
    return story.model_dump_json(exclude_none=True)


def test_a_language_model_writes_the_story(serve):
    story = write_story(WALK).story
    endpoint, asked = serve(f"Here it is:\n```json\n{as_json(story)}\n```")
    written = write_story("A walk.", endpoint)
    assert written.story == story and len(asked) == 1
    assert asked[0]["messages"][-1] == {"role": "user", "content": "A walk."}
    assert asked[0]["response_format"]["json_schema"]["schema"] == Story.model_json_schema()


def test_one_repair_with_the_fault_and_no_more(serve):
    story = write_story(WALK).story
    broken = as_json(story).replace("wide shot", "huge shot")
    endpoint, asked = serve(broken, as_json(story))
    assert write_story("A walk.", endpoint).story == story
    assert "huge shot" in asked[1]["messages"][-1]["content"] and len(asked) == 2

    for bad in (
        broken,
        "{}",
        "no story today",
        '{"title": "x", "shots": []}',
        as_json(story).replace("<bo>", "<kit>", 1),
    ):
        endpoint, asked = serve(bad)
        with pytest.raises(UserError, match="no valid story in two tries") as error:
            write_story("A walk.", endpoint)
        assert len(asked) == 2 and "\n" not in str(error.value)


def test_files_that_a_model_claims_are_dropped(serve):
    story = write_story(WALK).story
    claimed = story.model_copy(deep=True)
    claimed.shots[0].keyframe = "keyframes/0.png"
    endpoint, _ = serve(as_json(claimed))
    assert write_story("A walk.", endpoint).story == story


def test_an_endpoint_in_trouble_is_one_sentence_without_the_key(serve):
    endpoint, _ = serve("{}", status=401)
    for broken in (endpoint, Endpoint("http://127.0.0.1:9/v1", "secret", "m"), Endpoint("nonsense", "secret", "m")):
        with pytest.raises(UserError, match="cannot be asked") as error:
            write_story("A walk.", broken)
        assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_the_environment_names_the_endpoint(serve, monkeypatch):
    with pytest.raises(UserError, match="CINEMA_LLM_BASE_URL"):
        endpoint_from_environment()
    story = write_story(WALK).story
    endpoint, asked = serve(as_json(story))
    monkeypatch.setenv("CINEMA_LLM_BASE_URL", endpoint.base_url)
    with pytest.raises(UserError, match="CINEMA_LLM_MODEL"):
        write_story("A walk.")
    monkeypatch.setenv("CINEMA_LLM_MODEL", "m")
    assert write_story("A walk.").story == story and len(asked) == 1
