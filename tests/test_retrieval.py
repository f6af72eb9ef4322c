from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cinema.config import WEIGHTS
from cinema.errors import UserError
from cinema.retrieval import (
    ClipRetriever,
    Index,
    Moment,
    Oracle,
    Random,
    Recency,
    Retriever,
    T5Retriever,
    coverage,
    describe,
    relevant,
)
from cinema.story import Character, Place, Shot, Story
from cinema.toyworld.draw import render
from cinema.toyworld.world import sample_flashback

TOWERS = str(WEIGHTS / "retrieval")
STORY = Story(
    title="t",
    cast=[Character(tag="<ada>", description="red round, crown"), Character(tag="<bo>")],
    sets=[Place(name="forest"), Place(name="city")],
    shots=[
        Shot(caption="<ada> left.", set="forest"),
        Shot(caption="<bo> left.", set="city"),
        Shot(caption="<bo> and <ada>.", set="city"),
        Shot(caption="nobody.", set="forest"),
        Shot(caption="nobody."),
    ],
)


@given(n=st.integers(1, 300), k=st.integers(1, 40), copies=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_search_is_exact_over_what_is_kept(n: int, k: int, copies: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, 16, generator=g)
    near = vectors[:1] + 1e-3 * torch.randn(copies, 16, generator=g)  # nearly the same, many times
    vectors, index = torch.cat([vectors, near]), Index(16)
    for part in vectors.split(7):
        index.add(part)
    query = vectors[0] + 0.1 * torch.randn(16, generator=g)
    found, scores = index.search(query, k)
    kept = normalize(vectors, dim=1).half().float()
    exact = kept @ normalize(query, dim=0)
    assert len(index.vectors) == len(vectors) and len(found) == min(k, len(vectors)) == len(set(found.tolist()))
    assert torch.allclose(scores, exact.topk(len(found)).values, atol=1e-6)  # the order of sums
    assert torch.allclose(exact[found], scores, atol=1e-6)


def test_an_index_comes_back_from_disk(tmp_path: Path) -> None:
    index = Index(8)
    index.add(torch.randn(100, 8))
    index.save(tmp_path / "index.safetensors")
    again = Index.load(tmp_path / "index.safetensors")
    assert torch.equal(again.vectors, index.vectors)
    query = torch.randn(8)
    assert torch.equal(again.search(query, 5)[0], index.search(query, 5)[0])
    with pytest.raises(ValueError, match="the index is empty"):
        Index(4).search(torch.ones(4), 1)


def test_what_matters_shares_a_character_or_the_set() -> None:
    shots = STORY.shots
    assert relevant(shots[2], shots[:2]) == {0, 1}
    assert relevant(shots[3], shots[:3]) == {0}
    assert relevant(shots[4], shots[:4]) == set()
    assert coverage([3, 0, 2], {0, 1}, 1) == 0.0
    assert coverage([3, 0, 2], {0, 1}, 2) == coverage([3, 0, 2], {0, 1}, 16) == 0.5
    assert describe(STORY, "<ada> and <bo> in <cy>") == "red round, crown and bo in cy"


def test_recency_chance_and_oracle() -> None:
    moments = [Moment(shot, "") for shot in STORY.shots]
    recency, chance, oracle = Recency(), Random(1), Oracle()
    for retriever in (recency, chance, oracle):
        assert isinstance(retriever, Retriever) and retriever.rank(moments[0], 4) == []
        for moment in moments[:4]:
            retriever.add(moment)
    assert recency.rank(moments[4], 3) == [3, 2, 1]
    assert sorted(chance.rank(moments[4], 99)) == [0, 1, 2, 3]
    assert oracle.rank(Moment(STORY.shots[2], ""), 4) == [2, 1, 0, 3]  # two and a set, one and a set, one, none


@pytest.fixture(scope="module")
def clip() -> ClipRetriever:
    return ClipRetriever(TOWERS)


def test_the_towers_load_by_open_clip_alone_and_give_the_same_vectors(clip: ClipRetriever) -> None:
    model, _, see = open_clip.create_model_and_transforms(f"local-dir:{TOWERS}")
    read = open_clip.get_tokenizer(f"local-dir:{TOWERS}")
    picture = render(movie := sample_flashback("towers"), movie.shots[0])
    with torch.no_grad():
        seen, said = model.eval().encode_image(see(picture)[None]), model.encode_text(read(["wide shot, forest."]))
    assert torch.allclose(clip.pictures([picture]), seen) and torch.allclose(clip.words("wide shot, forest."), said[0])


def test_retrieval_finds_a_scene_that_comes_back(clip: ClipRetriever) -> None:
    found: dict[str, list[float]] = {"clip": [], "recency": [], "oracle": []}
    for seed in range(6):
        movie = sample_flashback(f"test/{seed}")
        story, back = movie.story(), 18
        clip.index = Index(clip.index.vectors.shape[1])
        retrievers: dict[str, Retriever] = {"clip": clip, "recency": Recency(), "oracle": Oracle()}
        for i, setup in enumerate(movie.shots[:back]):
            moment = Moment(story.shots[i], describe(story, story.shots[i].caption), render(movie, setup))
            for retriever in retrievers.values():
                retriever.add(moment)
        query = Moment(story.shots[back], describe(story, story.shots[back].caption))
        wanted = relevant(query.shot, story.shots[:back])
        for name, retriever in retrievers.items():
            found[name].append(coverage(retriever.rank(query, 8), wanted, 8))
    means = {name: float(np.mean(shares)) for name, shares in found.items()}
    assert means["oracle"] == 1.0 and means["clip"] > 0.8 and means["recency"] < 0.3


def test_a_query_that_is_too_long_is_cut_with_a_warning(clip: ClipRetriever) -> None:
    words = "wide shot, forest. " + "red round, crown left, jumping. " * 9
    with pytest.warns(UserWarning, match=r"a query has 50 tokens and the tower reads 40, shorten it: 'wide shot"):
        long = clip.words(words)
    assert torch.isfinite(long).all()


def test_towers_that_cannot_be_loaded_are_one_sentence(tmp_path: Path) -> None:
    for towers in (str(tmp_path), "no-such-tower:none"):
        with pytest.raises(UserError, match="open_clip cannot load these towers"):
            ClipRetriever(towers)


def test_words_of_t5_are_compared_by_their_mean() -> None:
    states = {"a": [[1.0, 0.0]], "<ada> left.": [[0.0, 1.0], [0.0, 3.0]], "<bo> left.": [[1.0, 1.0]]}
    retriever = T5Retriever(lambda caption: torch.tensor(states[caption]))
    for shot in STORY.shots[:2]:
        retriever.add(Moment(shot, ""))
    assert retriever.rank(Moment(STORY.shots[0], ""), 2) == [0, 1]


def test_flashbacks_return_to_an_early_scene() -> None:
    for seed in range(20):
        movie = sample_flashback(seed)
        places = [shot.place for shot in movie.shots]
        casts = [{a.tag for shot in movie.shots[6 * i : 6 * i + 6] for a in shot.actors} for i in range(4)]
        assert len(places) == 24 and len(set(places)) == 3 and places[18] in (places[0], places[6])
        returned = 0 if places[18] == places[0] else 1
        assert not casts[0] & casts[1] and not casts[3] & casts[2]
        assert casts[3] | casts[returned] == casts[returned] or len(casts[3] | casts[returned]) <= 2
        assert movie.story().shots[0].caption == sample_flashback(seed).story().shots[0].caption
