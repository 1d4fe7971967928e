"""CAT-Seg: every class's correlations with the patches, refined in space and between classes.

Of more phrases than the head takes, it is shown those that correlate most with some patch of the
frame; all others get the logit -100, as officially. Classes attend to each other, so rows that only
fill a capture's size count for none: their keys are zero. Many classes go through it in parts.

Source: Cho et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation",
CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import NARROW, AggregationSpec, HeadSpec
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    ClassLogits,
    Family,
    FrameState,
    GoldenRule,
    Pipeline,
    adopt_rows,
    bucket_of,
    class_axis,
    read_weights,
    repeated_rows,
)
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import Vocabulary

_DROPPED = np.float32(-100)
"""The logit of phrases that the head was not shown."""
_TENSORS = ("text_guidance.weight", "text_guidance.bias", "class_halves.weight",
            "class_halves.bias")  # fmt: skip

STAGES = ("head_1", "head_2", "head_3")
MOST_AT_ONCE = 32
"""Classes of a part: about 0.15 GB for CAT-Seg B."""
_NO_KEY = np.float32(-1e4)
"""Added to what becomes a key by elu(x) + 1: zero in every precision."""

HostRows = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Rows = tuple[Array, Array]
"""Of some classes: text embeddings [C, D] and halves of queries and keys [C, 4 h]."""

_Weights = Mapping[str, npt.NDArray[np.float32]]


class AggregationPipeline(Pipeline):
    """Runs encoder and head, or the head's three graphs for more classes than one run takes."""

    def __init__(
        self, family: AggregationFamily, sessions: Mapping[str, Session], workspace: Workspace
    ) -> None:
        super().__init__(family, sessions, workspace)
        self._most_padding, self._most = family.padding, family.most
        self._refine = sessions["head"]
        self._stages = [sessions[name] for name in STAGES if name in sessions]
        if self._stages:
            shapes = {spec.name: spec.shape for spec in self._stages[0].inputs}
            self._nothing = tuple(
                workspace.place(np.zeros([int(size) for size in shapes[name]], np.float32))
                for name in ("products", "totals")
            )
        # Of the classes that were adopted:
        self._padding: Any = None
        self._parts: list[Rows] = []  # of a vocabulary that the host does not choose from
        self._on_host: Any = None  # HostRows

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        workspace, phrases = self._workspace, len(classes.vocabulary.phrases)
        self._pad(phrases)
        self._on_host = np.asarray(classes.text_embeds), np.asarray(classes.text_queries)
        adopted = adopt_rows(classes, num_rows, workspace)
        rows = phrases if num_rows is None or workspace.device == "cpu" else num_rows
        embeds, halves = filled(self._on_host, rows)
        placed = workspace.upload("class_halves", halves)
        adopted = replace(adopted, text_queries=placed)
        self._parts = [(adopted.text_embeds, placed)]
        many = rows > MOST_AT_ONCE and phrases <= self._most
        if self._stages and many:
            self._parts = self._split((embeds, halves))
        return adopted

    def _pad(self, num_shown: int) -> None:
        missing = max(0, self._most_padding - min(num_shown, self._most))
        self._padding = self._workspace.upload("padding", np.array([missing], np.float32))

    def masks(self, state: FrameState) -> ClassLogits:
        classes, trace = state.classes, state.trace
        phrases, gate = len(classes.vocabulary.phrases), classes.gate
        if phrases > self._most or (gate is not None and gate.leaves_out(classes.vocabulary)):
            return self._masks_of_best(state)
        num_rows = int(classes.text_embeds.shape[0])

        def enqueue() -> tuple[Mapping[str, Array], Array]:
            encoded = self._encode(state.image)
            return encoded, self._aggregate(encoded, self._parts, num_rows)

        encoded, mask_logits = state.run(("aggregate", num_rows), enqueue)
        if trace is not None:
            names = {"class_halves": classes.text_queries, "padding": self._padding}
            trace.update(encoded, **names, mask_logits=mask_logits)
            if self._stages:
                parts = self._split(self._on_host, most=2)
                trace["logits_in_parts"] = self._run_parts(encoded, parts, phrases)
        return ClassLogits(mask_logits=mask_logits)

    def _aggregate(self, encoded: Mapping[str, Array], parts: list[Rows], num_rows: int) -> Array:
        if len(parts) > 1:
            logits = self._run_parts(encoded, parts, num_rows)
            self._clock.mark("decoder")
            return logits
        (rows,) = parts
        vocabulary = {"text_embeds": rows[0], "class_halves": rows[1], "padding": self._padding}
        outputs = self._refine.run({**encoded, **vocabulary}, stream=self._workspace.stream)
        self._clock.mark("decoder")
        return self._workspace.own("mask_logits", outputs["mask_logits"])

    def _masks_of_best(self, state: FrameState) -> ClassLogits:
        """Show the head the phrases with the largest correlation; nothing is captured."""
        workspace, classes = self._workspace, state.classes
        phrases, encoded = len(classes.vocabulary.phrases), self._encode(state.image)
        patches = workspace.own("patch_embeds", encoded["patch_embeds"])
        correlation = ops.patch_text_similarity(
            patches,
            classes.text_embeds,
            logit_scale=1.0,
            normalize=False,
            out=workspace.array("correlation", (1, phrases, int(patches.shape[1])), np.float32),
            stream=workspace.stream,
        )
        best = workspace.fetch(correlation)[0].max(axis=1)
        self._clock.mark("similarity")
        rows = np.arange(phrases)
        if classes.gate is not None:
            rows = classes.gate.choose(best, classes.vocabulary)
            self._pad(len(rows))
        shown = np.sort(rows[np.argsort(-best[rows], kind="stable")[: self._most]])
        embeds, halves = (values[shown] for values in self._on_host)
        if self._stages:
            parts = self._split((embeds, halves))
        else:
            upload = workspace.upload
            parts = [(upload("kept embeds", embeds), upload("kept halves", halves))]
        shown_logits = workspace.fetch(self._aggregate(encoded, parts, len(shown)))
        logits = np.full((1, phrases, *shown_logits.shape[2:]), _DROPPED, np.float32)
        logits[:, shown] = shown_logits
        mask_logits = workspace.upload("all logits", logits)
        if state.trace is not None:
            state.trace.update(encoded, mask_logits=mask_logits)
        return ClassLogits(mask_logits=mask_logits)

    def _split(self, rows: HostRows, most: int = 0) -> list[Rows]:
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

    def _run_parts(
        self, encoded: Mapping[str, Array], parts: Sequence[Rows], num_rows: int
    ) -> Array:
        """Logits float32 [1, C, 4 g, 4 g] of all parts' C rows, in a buffer of the lane.

        Classes attend to each other twice, by sums over all of them: every part of the vocabulary
        runs the first graph, then every part the second, then every part the third.
        """
        shared = {**encoded, "padding": self._padding}
        tokens: list[Array] = []
        sums = self._nothing
        for index, (embeds, halves) in enumerate(parts):
            inputs = {**shared, **_named(sums), "text_embeds": embeds, "class_halves": halves}
            outputs = self.run_stage(0, inputs)
            tokens.append(self._workspace.keep(f"tokens {index}", outputs["tokens"]))
            sums = self._keep_sums("first", outputs)
        first, sums = sums, self._nothing
        for index, (_, halves) in enumerate(parts):
            inputs = {**shared, **_named(sums), **_named(first, "first_"), "class_halves": halves}
            outputs = self.run_stage(1, {**inputs, "tokens": tokens[index]})
            tokens[index] = self._workspace.keep(f"tokens {index}", outputs["tokens_out"])
            sums = self._keep_sums("second", outputs)
        shared |= _named(sums)
        logits: Any = None
        begin = 0
        for (_, halves), one in zip(parts, tokens, strict=True):
            outputs = self.run_stage(2, {**shared, "class_halves": halves, "tokens": one})
            part = outputs["mask_logits"]
            count, grid = min(int(part.shape[1]), num_rows - begin), tuple(part.shape[2:])
            if logits is None:
                shape = (1, num_rows, *grid)
                logits = self._workspace.array("mask_logits of parts", shape, np.float32)
            part = reshaped(self._workspace.own("logits of a part", part), (1, count, *grid))
            self._workspace.copy_rows(part, logits, begin)
            begin += count
        return logits

    def run_stage(self, stage: int, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run one of the graphs on those of the inputs that it takes."""
        session = self._stages[stage]
        feeds = {spec.name: inputs[spec.name] for spec in session.inputs}
        return session.run(feeds, stream=self._workspace.stream)

    def _keep_sums(self, name: str, outputs: Mapping[str, Array]) -> tuple[Array, ...]:
        return tuple(
            self._workspace.keep(f"{name} {one}", outputs[f"{one}_out"])
            for one in ("products", "totals")
        )


class AggregationFamily(Family):
    """Bundles of family ``aggregation``."""

    name, pipeline = "aggregation", AggregationPipeline
    golden = GoldenRule(
        stages=("image", "patch_embeds", "spatial", "near_map", "far_map", "class_halves",
                "mask_logits", "logits_in_parts"),
        raw_logits=True,
    )  # fmt: skip

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        assert bundle.aggregation is not None, "the family's bundles have them"
        super().__init__(bundle, config)
        self.padding = bundle.aggregation.padding
        self.most = _most_shown(bundle.aggregation, bundle.head, config.head_classes)
        self._all_up_to = min(self.most, config.max_candidates or self.most)
        at_once = self.most
        self.graphs = ("image_encoder", "head")
        # Older bundles have no graphs of parts, and run all classes at once.
        precisions = set(bundle.graphs["head"]).difference(NARROW)
        if all(precisions <= set(bundle.graphs.get(stage, ())) for stage in STAGES):
            at_once = min(self.most, MOST_AT_ONCE)
            self.graphs += STAGES
        self.axes = class_axis(at_once)
        self._weights = _read_weights(bundle)

    in_one_part = False  # of many phrases, the host chooses those that the head is shown

    def rows_for(self, num_phrases: int) -> int:
        """Further rows have no keys, so that no class sees them."""
        if num_phrases > self._all_up_to:
            return num_phrases  # the host chooses
        return bucket_of(num_phrases, self.most)

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        norms = np.linalg.norm(vocabulary.embeds, axis=1, keepdims=True)
        embeds = np.asarray(vocabulary.embeds / norms, np.float32)
        guidance, guidance_bias, halves, bias = (self._weights[name] for name in _TENSORS)
        named = np.maximum(embeds @ guidance.T + guidance_bias, np.float32(0))
        return replace(
            super().bind(vocabulary, device=device),
            text_embeds=embeds,
            text_queries=np.ascontiguousarray(named @ halves.T + bias, np.float32),
        )


def _most_shown(spec: AggregationSpec, head: HeadSpec, wanted: str | None) -> int:
    """How many phrases the head is shown; it was trained with its number of padding tokens."""
    own = spec.most or (spec.padding if wanted == "best" else None)
    return min((own if wanted != "all" else None) or head.max_classes, head.max_classes)


def _read_weights(bundle: Bundle) -> _Weights:
    weights = dict(zip(_TENSORS, read_weights(bundle, _TENSORS), strict=True))
    guidance, guidance_bias, halves, bias = (weights[name].shape for name in _TENSORS)
    fits = len(guidance) == len(halves) == 2 and len(guidance_bias) == len(bias) == 1
    fits = fits and guidance == (guidance_bias[0], bundle.text.embed_dim)
    if not (fits and halves == (bias[0], guidance[0]) and bias[0] % 4 == 0):
        raise BundleError(
            f"{bundle.path}: weights: expected shapes that fit {bundle.text.embed_dim} values per "
            f"name, got {guidance}, {guidance_bias}, {halves} and {bias}. Export the bundle again."
        )
    return weights


def filled(rows: HostRows, count: int) -> HostRows:
    """The rows, and as many without keys, which no class sees, as make up a count."""
    num_rows = len(rows[0])
    if count <= num_rows:
        return rows
    embeds, halves = (repeated_rows(values, count).copy() for values in rows)
    keys = halves[num_rows:].reshape(count - num_rows, 4, halves.shape[1] // 4)
    keys[:, 1::2] = _NO_KEY
    return embeds, halves


def _named(sums: Sequence[Array], prefix: str = "") -> dict[str, Array]:
    return {f"{prefix}products": sums[0], f"{prefix}totals": sums[1]}
