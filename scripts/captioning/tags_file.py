"""A tagger's list of tags, `selected_tags.csv`."""

import csv
from pathlib import Path

from captioning.captions import Tag
from errors import ModelError

FETCH_AGAIN = "delete it and run again to fetch it anew, or put a whole copy there"


def read_tags(path: Path) -> list[Tag]:
    """The rows of a `selected_tags.csv`; raises ModelError when it is none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tags = [Tag(row["name"], int(row["category"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; make it readable for this user") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ModelError(f"{path}: is not a table with the columns name and category; {FETCH_AGAIN}") from None
    if not tags:
        raise ModelError(f"{path}: lists no tags; {FETCH_AGAIN}")
    return tags
