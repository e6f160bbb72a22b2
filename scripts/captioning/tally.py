"""What became of the pictures."""

import sys
from dataclasses import dataclass

from tqdm import tqdm

from errors import SomeItemsFailed

STAGE = "caption_images"


@dataclass
class Tally:
    """Counts; each failure is reported when it happens."""

    captioned: int = 0
    kept: int = 0
    """Captions that were as they should be."""
    given: int = 0
    """Captions of the user's that now have the trigger."""
    failed: int = 0

    def fail(self, place: object, reason: object) -> None:
        """Report one failure: a line on standard error."""
        self.failed += 1
        tqdm.write(f"{STAGE}: {place}: {reason}", file=sys.stderr)

    def report(self, trigger: str) -> None:
        """Print the counts. Raises SomeItemsFailed if there were failures."""
        if not (self.captioned or self.given or self.failed):
            print(f"nothing to do: all {self.kept} captions are there, with the trigger {trigger}")
            return
        counts = f"{self.captioned} captioned, {self.given} given the trigger {trigger}, {self.kept} kept as they were"
        if self.failed:
            raise SomeItemsFailed(f"{counts}, {self.failed} failed as said above; mend them and run again")
        print(counts)
