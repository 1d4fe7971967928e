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
from zsseg_rt.common.arrays import Array
from zsseg_rt.runtime.workspace import Workspace

STAGES = ("head_1", "head_2", "head_3")
MOST_AT_ONCE = 32
"""Classes of a part: about 0.15 GB for CAT-Seg B."""

HostRows = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Rows = tuple[Array, Array]
"""Of some classes: text embeddings [C, D] and halves of queries and keys [C, 4 h]."""


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
        """Rows in parts of nearly one size, at most so many, in the lane's buffers."""
        (embeds, halves), upload = rows, self._workspace.upload
        count = -(-len(embeds) // (most or MOST_AT_ONCE))
        return [
            (upload(f"embeds of part {index}", e), upload(f"halves of part {index}", h))
            for index, (e, h) in enumerate(
                zip(np.array_split(embeds, count), np.array_split(halves, count), strict=True)
            )
        ]

    def run(self, encoded: Mapping[str, Array], parts: Sequence[Rows], padding: Array) -> Array:
        """Logits float32 [1, C, 4 g, 4 g] of all parts, in a buffer of the lane."""
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
        return self._logits(parts, tokens, {**shared, **_named(sums)})

    def _logits(
        self, parts: Sequence[Rows], tokens: Sequence[Array], shared: Mapping[str, Array]
    ) -> Array:
        """Gathered in pinned memory on the way: device arrays have no parts to write to."""
        workspace, begin = self._workspace, 0
        all_logits: npt.NDArray[np.float32] | None = None
        count = sum(int(halves.shape[0]) for _, halves in parts)
        for (_, halves), one in zip(parts, tokens, strict=True):
            found = self._one(2, {**shared, "class_halves": halves, "tokens": one})["mask_logits"]
            if all_logits is None:
                shape = (1, count, *(int(size) for size in found.shape[2:]))
                all_logits = workspace.on_host("logits of parts", shape, np.float32)
            end = begin + int(found.shape[1])
            workspace.copy_out(workspace.own("logits of a part", found), all_logits[:, begin:end])
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
