"""Semantic retrieval."""

import re

from cinema.story import TAG, Story


def describe(story: Story, caption: str) -> str:
    """A caption with looks in the place of names, for towers that have never met the cast."""
    looks = {character.tag: character.description for character in story.cast}
    return re.sub(TAG, lambda found: looks.get(found[0]) or found[0].strip("<>"), caption)
