"""What a rank and whoever launched it tell each other while it trains.

Stage: beside the loop; free of Ray. In: nothing. Out: a `Link` that says nothing and asks for nothing: a notebook's,
a test's. `board.py` has the one of a Ray Train worker.
"""

from __future__ import annotations


class Link:
    """The loop calls every method between two steps or more often; none may wait."""

    def say(self, text: str) -> None:
        """Tell the person who follows the run."""

    def beat(self) -> None:
        """Say that this rank is still at work."""

    def reach(self, step: int) -> None:
        """Say how many optimizer steps are done."""

    def is_stop_wanted(self) -> bool:
        """Say whether the run is to be saved and ended."""
        return False

    def take_notice(self) -> bool:
        """Say, once for each notice, whether the state is to be saved now because a machine will go away."""
        return False
