"""Evaluation: what generated stories show, measured against what they should show."""

from cinema.evaluation.toy import ClipScores, Scores, evaluate_stories, score_clip, score_keyframes

__all__ = ["ClipScores", "Scores", "evaluate_stories", "score_clip", "score_keyframes"]
