"""A procedural film studio: paper-cut movies at any resolution, with exact ground truth."""
