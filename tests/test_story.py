from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinema.errors import UserError
from cinema.story import Character, Place, Shot, Story, load_cast, load_story, parse_story, save_story

GOOD = """title: A walk
cast:
  - {tag: <ada>, description: "red round, crown"}
sets:
  - {name: forest}
shots:
  - set: forest
    caption: "wide shot, forest. <ada> left, jumping: red round, crown. pan left."
  - caption: "close shot, forest. <ada> center, waving. static."
"""

words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@given(
    title=words,
    captions=st.lists(words.map(lambda w: w.replace("<", "")).filter(str.strip), min_size=1, max_size=5),
    durations=st.lists(st.floats(0.1, 600), min_size=5, max_size=5),
)
def test_saving_and_loading_changes_nothing(tmp_path_factory, title, captions, durations):
    shots = [Shot(caption=c, set="here", duration=d) for c, d in zip(captions, durations, strict=False)]
    story = Story(title=title, cast=[Character(tag="<ada>")], sets=[Place(name="here")], shots=shots)
    path = tmp_path_factory.mktemp("story") / "story.yaml"
    save_story(story, path)
    assert load_story(path) == story


def test_tags_and_first_appearances_are_read_from_captions():
    story = parse_story(GOOD)
    assert [shot.tags for shot in story.shots] == [["<ada>"], ["<ada>"]]
    assert story.first_appearances() == {"<ada>": 0}


def test_json_is_a_story_too():
    assert parse_story(parse_story(GOOD).model_dump_json(exclude_none=True)) == parse_story(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("<ada> center", "<bob> center", 9, "<bob> is not in the cast"),
        ("set: forest", "set: moon", 7, "'moon' is not listed under sets"),
        ('"close', '"x"\n    duration: -3\n    keyframe: "close', 10, "greater than 0"),
        ("title: A walk\n", "", 1, "title: field required"),
        ("title: A walk", "titel: A walk\ntitle: A walk", 1, "titel: extra inputs are not permitted"),
        ("- {name: forest}", "- {name: forest", None, "not valid YAML"),
        ("{tag: <ada>", "{tag: Ada", 3, "tag"),
        ("- {tag", "- {tag: <ada>}\n  - {tag", None, "'<ada>' twice"),
        ("    caption: \"wide", "    keyframe: ../../secret.png\n    caption: \"wide", 8, "leaves the story's folder"),
        ("title: A walk", "title: 2020-13-45", None, "month must be in 1..12"),
        ("- {name: forest}", "- {name: forest}\n  - {name: forest}", None, "list 'forest' twice"),
        ("sets:", "  - {tag: <cy>, description: friend of <zed>}\nsets:", 4, "<zed> is not in the cast"),
        ('"close', '"x"\n    duration: true\n    keyframe: "close', 10, "valid number (True is given)"),
        ('"close', '" "\n    keyframe: "close', 9, "the caption is blank or holds control characters"),
        ("title: A walk", "schema_version: 99\ntitle: A walk", 1, "schema_version"),
        ("    caption: \"wide", "    clip: /etc/passwd\n    caption: \"wide", 8, "leaves the story's folder"),
    ],
)  # fmt: skip
def test_a_bad_story_gets_one_sentence_with_its_line(old, new, line, says):
    assert old in GOOD
    with pytest.raises(UserError) as error:
        parse_story(GOOD.replace(old, new, 1), "walk.yaml")
    message = str(error.value)
    assert says in message and message.startswith("walk.yaml") and "\n" not in message
    assert line is None or f"line {line}:" in message


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words", "42"])
def test_text_that_is_no_story_is_refused(text):
    with pytest.raises(UserError, match="not a story"):
        parse_story(text)


def test_the_number_of_shots_is_bounded_on_both_sides():
    with pytest.raises(UserError, match=r"shots: list should have at most 5000 items .*, not 10000"):
        parse_story("title: long\nshots:\n" + "  - {caption: x}\n" * 10_000)
    with pytest.raises(UserError, match="shots: list should have at least 1 item"):
        parse_story("title: short\nshots: []\n")


def test_long_input_is_cut_and_a_story_that_holds_itself_is_refused():
    with pytest.raises(UserError) as error:
        parse_story(f"title: t\nshots: [{{caption: x, duration: {'y' * 9_999}}}]\n")
    assert len(str(error.value)) < 200
    with pytest.raises(UserError):
        parse_story("title: t\nshots: &a [*a]\n")
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(40))
    with pytest.raises(UserError, match="a0: extra inputs are not permitted"):
        parse_story(f"{bomb}title: t\nshots: [{{caption: x}}]\n")


def test_yaml_cannot_make_objects():
    with pytest.raises(UserError, match="not valid YAML"):
        parse_story("!!python/object/apply:os.getcwd []")


def test_missing_and_unreadable_files(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load_story(tmp_path / "none.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="not a readable text file"):
        load_story(tmp_path / "picture.yaml")


def test_a_cast_may_stand_alone_or_in_a_story(tmp_path: Path) -> None:
    bank = tmp_path / "bank.yaml"
    bank.write_text("cast:\n  - {tag: <ada>, description: red coat}\n  - {tag: <bo>}\n")
    assert [c.tag for c in load_cast(bank)] == ["<ada>", "<bo>"]
    bank.write_text("title: A walk\ncast: [{tag: <ada>}]\nshots: [{caption: <ada> runs.}]\n")
    assert load_cast(bank) == load_story(bank).cast
    bank.write_text("cast: [{tag: ada}]\n")
    with pytest.raises(UserError, match=r"line 1: cast.0.tag"):
        load_cast(bank)
