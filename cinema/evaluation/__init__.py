"""Measuring what was made: exactly where the toy world knows the truth, and by learned measures where nobody does."""

from cinema.evaluation.film import Film, diversity, read_film
from cinema.evaluation.judge import ASPECTS, judge_film, true_judge
from cinema.evaluation.measures import MEASURES, evaluate_films, load_embedder, read_vbench, same_characters
from cinema.evaluation.stories import (
    STRESSED,
    Rows,
    bootstrap,
    evaluate_stories,
    fallen,
    other_context,
    read_figures,
    share,
    stress,
)
from cinema.evaluation.toy import ATTRIBUTES, Scores, psnr, score_clip, score_keyframes

__all__ = [
    "ASPECTS", "ATTRIBUTES", "MEASURES", "STRESSED", "Film", "Rows", "Scores", "bootstrap", "diversity",
    "evaluate_films", "evaluate_stories", "fallen", "judge_film", "load_embedder", "other_context", "psnr",
    "read_figures", "read_film", "read_vbench", "same_characters", "score_clip", "score_keyframes", "share",
    "stress", "true_judge",
]  # fmt: skip
