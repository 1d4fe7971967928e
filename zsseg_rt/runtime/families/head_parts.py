"""CAT-Seg's head for more classes than one run takes, with sums over all of them between the parts.

Classes attend to each other twice, by sums over all of them, so a part of the vocabulary cannot be
finished before the others have come as far: every part runs the first graph, then every part the
second, then every part the third. That bounds what is in memory at once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.quantization import NARROW
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.runtime.families.class_rows import repeated_rows
from zsseg_rt.runtime.workspace import Workspace

STAGES = ("head_1", "head_2", "head_3")
MOST_AT_ONCE = 32
"""Classes of a part: about 0.15 GB for CAT-Seg B."""
_NO_KEY = np.float32(-1e4)
"""Added to what becomes a key by elu(x) + 1: zero in every precision."""

HostRows = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Rows = tuple[Array, Array]
"""Of some classes: text embeddings [C, D] and halves of queries and keys [C, 4 h]."""


def filled(rows: HostRows, count: int) -> HostRows:
    """The rows, and as many without keys, which no class sees, as make up a count."""
    num_rows = len(rows[0])
    if count <= num_rows:
        return rows
    embeds, halves = (repeated_rows(values, count).copy() for values in rows)
    keys = halves[num_rows:].reshape(count - num_rows, 4, halves.shape[1] // 4)
    keys[:, 1::2] = _NO_KEY
    return embeds, halves


def in_parts(graphs: Mapping[str, Collection[str]]) -> bool:
    """Whether a bundle holds the graphs in all precisions of its head but those of 8 bits.

    Older bundles do not; they run all classes at once.
    """
    wanted = set(graphs["head"]).difference(NARROW)
    return all(stage in graphs and wanted <= set(graphs[stage]) for stage in STAGES)


def parts_of(sessions: Mapping[str, Session], workspace: Workspace) -> HeadParts | None:
    """What runs the graphs in a lane; None where they were not loaded."""
    return HeadParts(sessions, workspace) if STAGES[0] in sessions else None


class HeadParts:
    """Runs the three graphs; of one lane."""

    def __init__(self, sessions: Mapping[str, Session], workspace: Workspace) -> None:
        self._stages = [sessions[name] for name in STAGES]
        self._workspace = workspace
        shapes = {spec.name: spec.shape for spec in self._stages[0].inputs}
        self._nothing = tuple(
            workspace.place(np.zeros([int(size) for size in shapes[name]], np.float32))
            for name in ("products", "totals")
        )

    def split(self, rows: HostRows, most: int | None = None) -> list[Rows]:
        """Rows in parts of nearly one size, at most so many, in the lane's buffers.

        On a GPU they have one size, which a recording needs: rows without keys fill the last.
        """
        upload, num_rows = self._workspace.upload, len(rows[0])
        count = -(-num_rows // (most or MOST_AT_ONCE))
        missing = 0 if self._workspace.device == "cpu" else -num_rows % count
        embeds, halves = filled(rows, num_rows + missing)
        return [
            (upload(f"embeds of part {index}", e), upload(f"halves of part {index}", h))
            for index, (e, h) in enumerate(
                zip(np.array_split(embeds, count), np.array_split(halves, count), strict=True)
            )
        ]

    def run(
        self, encoded: Mapping[str, Array], parts: Sequence[Rows], padding: Array, num_rows: int
    ) -> Array:
        """Logits float32 [1, C, 4 g, 4 g] of all parts' C rows, in a buffer of the lane."""
        shared = {**encoded, "padding": padding}
        tokens: list[Array] = []
        sums = self._nothing
        for index, (embeds, halves) in enumerate(parts):
            given = {**shared, **_named(sums), "text_embeds": embeds, "class_halves": halves}
            found = self._one(0, given)
            tokens.append(self._keep(f"tokens {index}", found["tokens"]))
            sums = self._keep_sums("first", found)
        first, sums = sums, self._nothing
        for index, (_, halves) in enumerate(parts):
            given = {**shared, **_named(sums), **_named(first, "first_"), "class_halves": halves}
            found = self._one(1, {**given, "tokens": tokens[index]})
            tokens[index] = self._keep(f"tokens {index}", found["tokens_out"])
            sums = self._keep_sums("second", found)
        return self._logits(parts, tokens, {**shared, **_named(sums)}, num_rows)

    def _logits(
        self,
        parts: Sequence[Rows],
        tokens: Sequence[Array],
        shared: Mapping[str, Array],
        num_rows: int,
    ) -> Array:
        """Gathered in pinned memory on the way: device arrays have no parts to write to."""
        workspace, begin = self._workspace, 0
        all_logits: npt.NDArray[np.float32] | None = None
        for (_, halves), one in zip(parts, tokens, strict=True):
            found = self._one(2, {**shared, "class_halves": halves, "tokens": one})["mask_logits"]
            if all_logits is None:
                shape = (1, num_rows, *(int(size) for size in found.shape[2:]))
                all_logits = workspace.on_host("logits of parts", shape, np.float32)
            end = min(begin + int(found.shape[1]), num_rows)
            out, one_part = all_logits[:, begin:end], workspace.own("logits of a part", found)
            is_filled = tuple(one_part.shape) != out.shape
            workspace.copy_out(reshaped(one_part, out.shape) if is_filled else one_part, out)
            begin = end
        assert all_logits is not None, "a vocabulary has classes"
        return workspace.upload("mask_logits of parts", all_logits)

    def _one(self, stage: int, given: Mapping[str, Array]) -> Mapping[str, Array]:
        session = self._stages[stage]
        feeds = {spec.name: given[spec.name] for spec in session.inputs}
        return session.run(feeds, stream=self._workspace.stream)

    def _keep_sums(self, name: str, found: Mapping[str, Array]) -> tuple[Array, ...]:
        return tuple(
            self._keep(f"{name} {one}", found[f"{one}_out"]) for one in ("products", "totals")
        )

    def _keep(self, name: str, array: Array) -> Array:
        """A copy: a session's results last until its next run."""
        workspace = self._workspace
        held: Any = workspace.array(name, tuple(array.shape), np.float32)
        if workspace.device == "cpu":
            np.copyto(held, np.asarray(array))
        else:
            held.copy_from(array, stream=workspace.stream)
        return held


def _named(sums: Sequence[Array], prefix: str = "") -> dict[str, Array]:
    return {f"{prefix}products": sums[0], f"{prefix}totals": sums[1]}
