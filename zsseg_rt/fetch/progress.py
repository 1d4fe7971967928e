"""What a fetch tells while it runs."""

from __future__ import annotations


class Progress:
    """Hears what happens; this one ignores it, a subclass may show it."""

    def say(self, text: str) -> None:
        """Something worth a line happened.

        Args:
            text: One sentence or more, without a line break.
        """

    def downloaded(self, done: int, total: int | None) -> None:
        """More of the file is on the disk; called at least once, from the thread that fetches.

        Args:
            done: Bytes on the disk, those of an earlier try included.
            total: Bytes of the whole file; None if the hub does not say.
        """

    def computed(self, done: int, total: int) -> None:
        """More of the network's forward pass in NumPy is done.

        Args:
            done: Parts of the network.
            total: All of them.
        """
