"""Curation: a film file becomes shots, one keyframe and one caption per shot, and a Parquet file that is a `Story`."""

from cinema.curation.annotate import Annotator, Desk, GroundTruthAnnotator, LocalAnnotator, NoAnnotator, VisionAnnotator
from cinema.curation.report import write_report
from cinema.curation.run import CurationReport, FilmReport, curate, curate_film, shown
from cinema.curation.search import find_films
from cinema.curation.store import CuratedFilm, CuratedShot, StoppedError, read_film, story_of

# fmt: off
__all__ = [
    "Annotator", "CuratedFilm", "CuratedShot", "CurationReport", "Desk", "FilmReport", "GroundTruthAnnotator",
    "LocalAnnotator", "NoAnnotator", "StoppedError", "VisionAnnotator", "curate", "curate_film", "find_films",
    "read_film", "shown", "story_of", "write_report",
]
