"""Calls of every operation, drawn: sizes, types and settings, and how near results are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from support.bfloat16 import Bfloat16Array, bfloat16_bits, widened
from support.label_agreement import assert_labels_agree, top_two_margin
from zsseg_rt import ops
from zsseg_rt.ops import reference
from zsseg_rt.ops.reference import score_maps

# 512-term float32 dots of unit rows; for raw rows scaled by their norms' product, about 512. Worst
# seen: 6.1e-5 for raw rows, by the CUDA kernel's arithmetic (emulated), which adds term after term.
COSINE, RAW = 1e-6, 1e-4
SUM = 1e-5  # 1024-term float32 sums of a variance of about 2: worst seen 3e-6
PIXEL = 4e-6  # two float32 lerps of values up to 255, divided by 255 * 0.26: worst seen 1.5e-6
CROP = 5e-6  # means of up to 9 float32 samples of values up to 4: worst seen 1.5e-6
SCORE = 2e-6  # exp and division in float32 against float64; a softmax drops e^-25 terms
REGION_SCORE = 2e-5  # sums of up to 100 products of at most 1: worst seen 4e-6
# On CUDA, cls * text is rounded to 11 or 8 bits: half of the last bit of each of the terms, whose
# signs are random and whose squares sum to 1 here, moves a result by 3 to 4 of these in the worst
# of thousands. A result of that dtype is rounded once more, and is below 8.
LAST_BIT = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MATRICES = ("bt601", "bt709", "bt601-full", "bt709-full")
CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


class Draw:
    """Draws for makers: by a seed, or by what hypothesis picks."""

    def __init__(self, pick):
        self.pick = pick
        self.rng = np.random.default_rng(pick(range(1000)))

    @classmethod
    def seeded(cls, *seed):
        rng = np.random.default_rng(seed)
        return cls(lambda options: options[rng.integers(len(options))])

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def bytes(self, *shape):
        return self.rng.integers(0, 256, shape, np.uint8)

    def size(self, *usual):
        """One that tests kernels' edges, or any small one."""
        return self.pick([*usual, *range(1, 10)])


@dataclass
class Case:
    """One call; ``dtypes`` name half precision by argument, and for ``"out"``."""

    arrays: dict
    settings: dict
    check: Callable
    dtypes: dict = field(default_factory=dict)
    on_host: tuple = ()

    def placed(self, device):
        """The arrays on a device."""
        placed = {}
        for name, array in self.arrays.items():
            if name in self.on_host:
                placed[name] = array
            elif self.dtypes.get(name) == "bfloat16":
                placed[name] = Bfloat16Array(device.place(bfloat16_bits(array)))
            elif isinstance(array, tuple):
                placed[name] = tuple(map(device.place, array))
            else:
                placed[name] = device.place(array.astype(self.dtypes.get(name, array.dtype)))
        return placed

    def narrowed(self):
        """The same numbers, in types that NumPy has."""
        wide = {}
        for name, array in self.arrays.items():
            if self.dtypes.get(name) == "bfloat16":
                wide[name] = widened(bfloat16_bits(array))
            else:
                wide[name] = array.astype(self.dtypes[name]) if name in self.dtypes else array
        return wide


def exact(_device, results, expected):
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        np.testing.assert_array_equal(result, wanted)


def near(atol, *, on_gpu=0.0):
    def check(device, results, expected):
        tolerance = atol if device == "cpu" else atol + on_gpu
        np.testing.assert_allclose(results[0], expected[0], rtol=0, atol=tolerance)

    return check


def draw_planes(d, height, width):
    """NV12: every brightness beside every colour, out of the limited range too."""
    height, width = 2 * height, 2 * width
    return d.bytes(height, width), d.bytes(height // 2, width // 2, 2)


def preprocess(d):
    height, width = d.size(61, 211), d.size(13, 307)
    nv12 = d.pick([False, False, True])
    frame = draw_planes(d, height, width) if nv12 else d.bytes(height, width, 3)
    settings = {"size_hw": (d.size(29, 97), d.size(23, 64, 260)), **CLIP}
    settings["align"] = d.pick(["half_pixel", "corners"])
    if nv12:
        settings["colour_matrix"] = d.pick(MATRICES)
    else:
        settings["channel_order"] = d.pick(["rgb", "bgr"])
    if d.pick([False, True]):
        settings |= {"whole_hw": (45, 60), "origin": (d.pick([0, 13, 40]), d.pick([0, 5, 52]))}
    dtypes = {"out": d.pick(["float32", "float16", "bfloat16"])}
    return Case({"frame": frame}, settings, near(PIXEL), dtypes)


def descriptor(d, batch=None):
    embed_dim, outputs = d.pick([1, 31, 96, 512]), d.pick([1, 37, 65])
    dtype = d.pick(list(LAST_BIT))
    arrays = {
        "cls_embed": d.normal(d.pick([0, 1, 3]) if batch is None else batch, embed_dim),
        "text_embeds": d.normal(d.pick([0, 1, 5, 67, 171]), embed_dim),
        "weight": d.normal(outputs, 2 * embed_dim) / np.float32(np.sqrt(embed_dim)),
        "bias": d.normal(outputs),
    }
    rounded = (5 if embed_dim > 1 else 20) * LAST_BIT[dtype]
    dtypes = dict.fromkeys(("cls_embed", "text_embeds", "weight"), dtype)
    dtypes["out"] = d.pick(["float32", dtype])
    return Case(arrays, {}, near(SUM, on_gpu=rounded), dtypes)


def relationship_descriptor(d):
    case = descriptor(d)
    if d.pick([False, True]):
        halves = dict(case.narrowed())
        del halves["cls_embed"]
        case.arrays["text_queries"] = reference.relationship_descriptor_text(**halves)
    return case


def relationship_descriptor_text(d):
    case = descriptor(d, batch=1)
    del case.arrays["cls_embed"], case.dtypes["cls_embed"]
    return case


def patch_text_similarity(d):
    depth, classes = d.pick([1, 8, 31, 33, 64, 512]), d.pick([0, 1, 5, 40, 67])
    patches, batch = d.pick([0, 1, 67, 131]), d.pick([1, 2, 3])
    per_image = d.pick([False, True])
    arrays = {
        "patch_embeds": d.normal(batch, patches, depth),
        "text_embeds": d.normal(*((batch, classes, depth) if per_image else (classes, depth))),
    }
    settings = {"logit_scale": 2.5, "normalize": d.pick([True, False])}
    settings["classes_last"] = d.pick([False, True])
    names = ("patch_embeds", "text_embeds")
    types = d.pick([("float16", "bfloat16")[i:][:1] * 2 for i in range(2)] + [
        ("float32", "float32"), ("float32", "float16"), ("float16", "float32"),
        ("bfloat16", "float32"), ("float32", "bfloat16"),
    ])  # fmt: skip
    tolerance = 2.5 * (COSINE if settings["normalize"] else RAW)
    return Case(arrays, settings, near(tolerance), dict(zip(names, types, strict=True)))


def draw_logits(d, shape):
    """Logits with ties, areas that one class wins, classes that are absent."""
    logits = 2 * d.normal(*shape)
    kind = d.pick(["plain", "plain", "areas", "absent", "steps"])
    if kind == "areas":
        logits[:, shape[1] // 3, :, : shape[3] // 2 + 1] += 50
        logits[:, shape[1] // 2, :, shape[3] // 2 + 1 :] += 50
    if kind == "absent":
        logits[:, ::2] = d.pick([np.nan, -np.inf])
    if kind == "steps":
        logits = np.float32(d.pick([1, 1e4, 1e-30])) * np.rint(logits)
    return logits, kind


def label_settings(d, logits, kind):
    classes = logits.shape[1]
    settings = {"align": d.pick(["half_pixel", "corners"]), "with_scores": d.pick([False, True])}
    activations = ["none", "sigmoid", "softmax"] if kind in ("plain", "absent") else ["none"]
    settings["activation"] = d.pick(activations)
    arrays = {"seen": np.arange(classes) % 3 == 0} if d.pick([False, True]) else {}
    if arrays and kind == "plain":
        arrays["seen"] = d.pick([arrays["seen"], np.arange(classes) < d.pick([0, 1, classes])])
        settings["seen_bias"] = d.pick([0.0, 0.3, -0.2])
    limits = {"none": 2.0, "sigmoid": 0.9, "softmax": 0.3}
    settings["unknown_below"] = d.pick([None, limits[settings["activation"]]])
    if d.pick([False, True]):
        table = (np.arange(classes + 3) * 7 % 200).astype(d.pick([np.uint8, np.uint16]))
        table[classes // 2] = np.iinfo(table.dtype).max
        arrays["label_table"] = table
    if d.pick([False, True]):
        arrays["num_classes"] = np.array([d.pick([1, (classes + 1) // 2, classes])], np.int32)
    return arrays, settings


def check_labels(case, out_hw):
    """Labels and scores are the reference's where no two classes are as good as equal."""
    wide, rules = case.narrowed(), dict(case.settings)
    rules.pop("out_hw", None)
    rules |= {name: wide[name] for name in ("seen", "label_table", "num_classes") if name in wide}
    rules = {"seen": None, "seen_bias": 0.0, **rules}
    rules.pop("alpha", None)

    def check(_device, results, expected):
        logits = wide["logits"]
        assert_labels_agree(logits, out_hw, results[0], rules, excluded_share=1.0)
        if case.settings["with_scores"]:
            with np.errstate(invalid="ignore"):
                clear = top_two_margin(logits, out_hw, **rules) > 1e-5
            wanted = expected[1][clear]
            np.testing.assert_allclose(results[1][clear], wanted, rtol=SCORE, atol=SCORE)

    return check


def upsample_argmax(d):
    shape = (d.pick([0, 1, 2, 3]), d.size(20, 40, 171, 300, 1000), d.size(), d.size(33))
    logits, kind = draw_logits(d, shape)
    arrays, settings = label_settings(d, logits, kind)
    out_hw = d.pick([(d.size(37, 61, 90), d.size(19, 83, 113)), (1, 1031), (700, 4), (90, 300)])
    case = Case({"logits": logits, **arrays}, {"out_hw": out_hw, **settings}, exact)
    case.dtypes["logits"] = d.pick(list(LAST_BIT))
    case.check = check_labels(case, out_hw)
    return case


def upsample_argmax_overlay(d):
    logits, kind = draw_logits(d, (1, d.size(19, 40, 300), d.size(), d.size()))
    arrays, settings = label_settings(d, logits, kind)
    frame = d.bytes(d.size(37, 64), d.size(52, 96), 3)
    arrays |= {"frame": frame, "palette": d.bytes(d.pick([0, 5, 40, 300]), 3)}
    settings["alpha"] = d.pick([0.0, 0.37, 1.0])
    case = Case({"logits": logits, **arrays}, settings, exact)
    case.dtypes["logits"] = d.pick(list(LAST_BIT))
    same_labels = check_labels(case, frame.shape[:2])

    def check(device, results, expected):
        same_labels(device, results, expected)
        drawn = reference.overlay(frame, results[0][0], arrays["palette"], alpha=settings["alpha"])
        np.testing.assert_array_equal(results[-1], drawn)

    case.check = check
    return case


def draw_labels(d, shape, num_classes):
    """Classes, two labels that are none, and unknown, in runs as in an image."""
    dtype = d.pick([np.uint8, np.uint16])
    unknown = np.iinfo(dtype).max
    values = np.append(np.arange(min(num_classes + 2, unknown)), unknown).astype(dtype)
    count = int(np.prod(shape))
    runs = d.rng.integers(1, 40, count + 1)
    return np.repeat(d.rng.choice(values, count + 1), runs)[:count].reshape(shape)


def overlay(d):
    height, width, colours = d.pick([0, 1, 13, 61]), d.size(17, 257), d.pick([0, 1, 20, 256])
    settings = {"alpha": d.pick([0.0, 0.3, 0.5, 1.0])}
    frame = d.bytes(height, width, 3)
    if d.pick([False, True]):
        frame = draw_planes(d, height or 1, width)
        settings["colour_matrix"] = d.pick(MATRICES)
        settings["channel_order"] = d.pick(["rgb", "bgr"])
    shape = frame[0].shape if isinstance(frame, tuple) else frame.shape[:2]
    arrays = {"frame": frame, "labels": draw_labels(d, shape, colours)}
    return Case(arrays | {"palette": d.bytes(colours, 3)}, settings, exact)


def ink(d):
    colours = d.pick([1, 2, 3, 4])
    weights = d.bytes(colours, d.pick([0, 11, 60]), d.pick([1, 23, 90]))
    weights[d.rng.random(weights.shape) < 0.4] = 0
    places = [(3, 4), (0, 0), (-5, -7), (28, 60), (-11, 2), (31, 2), (3, 1 << 62)]
    settings = {"place": d.pick(places), "colours": d.bytes(colours, 3).tolist()}
    return Case({"picture": d.bytes(31, 67, 3), "weights": weights}, settings, exact)


def all_finite(d):
    values = d.normal(*d.pick([(0, 3), (1,), (7, 11, 13), (1, 2, 3, 257), (300_001,)]))
    if values.size:
        place = d.pick([0, values.size // 2, values.size - 1])
        values.flat[place] = d.pick([0.0, 6e4, 6e-8, np.nan, np.inf, -np.inf])
    return Case({"values": values}, {}, exact, {"values": d.pick(list(LAST_BIT))})


def count_labels(d):
    num_classes = d.pick([0, 1, 20, 254, 255, 256, 300, 2047, 2048, 65534])
    shape = d.pick([(0, 5), (1, 1), (13, 17), (3, 1, 67, 61), (360, 641), (2_200_003,)])
    labels = draw_labels(d, shape, num_classes)
    return Case({"labels": labels}, {"num_classes": num_classes}, exact)


def merge_windows(d):
    window, grid, places = d.pick([
        ((1, 1), (1, 1), [(0, 0)]),
        ((4, 5), (7, 9), [(0, 0), (3, 4), (0, 4)]),
        ((6, 6), (5, 4), [(0, 0)]),  # a letterbox
        ((3, 17), (9, 33), [(8, 30), (9, 0)]),  # beyond the grid, partly and wholly
        ((28, 28), (40, 50), [(0, 0), (12, 22)]),
    ])  # fmt: skip
    arrays = {"logits": d.normal(len(places), d.size(70, 300), *window)}
    return Case(arrays | {"shares": np.abs(d.normal(*grid))}, {"places": places}, exact)


def warp_blend(d):
    batch, height, width = d.pick([0, 1, 2, 3]), d.size(24, 32), d.size(33, 37)
    shape, reach = (batch, d.size(17, 150), height, width), d.pick([0.4, 5.0])
    arrays = {"logits": d.normal(*shape), "past": d.normal(*shape)}
    flow = d.rng.uniform(-reach, reach, (batch, height, width, 2))
    weight = d.rng.uniform(-0.3, 1.3, (batch, height, width))
    arrays |= {"flow": flow.astype(np.float32), "past_weight": weight.astype(np.float32)}
    return Case(arrays, {}, exact)


def draw_masks(d, count, height, width):
    """Mask logits with areas of either sign; the last three are empty, full and one pixel."""
    masks = d.normal(count, height, width)
    masks[-3], masks[-2], masks[-1] = -1.0, 1.0, -1.0
    masks[-1, height // 2, width // 2] = 0.3
    return masks * np.float32(d.pick([1, 1, 1e-30, 1e-44]))


GRIDS = [((1, 1), (1, 1)), ((1, 1), (5, 7)), ((3, 1), (31, 17)), ((7, 5), (28, 20)),
         ((16, 12), (61, 97)), ((9, 13), (9, 13)), ((20, 30), (11, 7)), ((24, 40), (96, 160)),
         ((50, 16), (200, 61)), ((3, 1100), (2, 1300)), ((2, 2), (3000, 2))]  # fmt: skip


def mask_boxes(d):
    grid_hw, canvas_hw = d.pick(GRIDS)
    return Case({"mask_logits": draw_masks(d, 6, *grid_hw)}, {"canvas_hw": canvas_hw}, exact)


def crop_regions(d):
    grid_hw, canvas_hw = d.pick([*GRIDS[:8], ((10, 20), (12, 700)), ((10, 20), (130, 9))])
    masks = draw_masks(d, 6, *grid_hw)
    regions = np.array(d.pick([[], [1], [5, 0, 3, 4, 1, 1]]), np.int32)
    boxes = reference.mask_boxes(masks, canvas_hw)[:, :4][regions]
    if d.pick([False, True]):
        boxes[:] = [0, 0, d.pick([1, canvas_hw[1]]), d.pick([1, canvas_hw[0]])]
    arrays = {"image": d.normal(3, *canvas_hw), "mask_logits": masks, "regions": regions}
    settings = {"side": d.pick([1, 2, 7, 33]), "style": d.pick(["cropmask", "crop", "mask"])}
    if d.pick([False, True]):
        settings |= {"scale": (0.9, 1.1, 1.0), "offset": (0.1, -0.2, 0.0)}
    arrays["boxes"] = np.ascontiguousarray(boxes)
    return Case(arrays, settings, near(CROP), on_host=("regions", "boxes"))


def label_regions(d):
    grid_hw, canvas_hw, out_hw = d.pick([
        ((1, 1), (1, 1), (13, 9)), ((7, 5), (28, 21), (28, 21)), ((7, 5), (28, 21), (50, 67)),
        ((6, 6), (9, 17), (33, 40)), ((4, 4), (13, 12), (20, 31)), ((2, 2), (2, 2), (70, 75)),
        ((2, 3), (1, 5), (40, 5)), ((16, 20), (64, 80), (23, 31)), ((4, 5), (12, 10), (1, 1)),
    ])  # fmt: skip
    classes, count = d.pick([1, 3, 19, 70, 254, 255]), d.pick([3, 5, 17, 100, 256])
    # An emulated GPU takes seconds for ten million votes, or a hundred thousand soft pixels.
    most = min(10_000_000 // (classes * math.prod(out_hw)), 100_000 // math.prod(canvas_hw))
    count = min(count, max(3, most))
    scores = (d.rng.random((classes, count)) / count).astype(np.float32)
    arrays = {"mask_logits": draw_masks(d, count, *grid_hw), "class_scores": scores}
    bias = np.zeros(classes, np.float32)
    if d.pick([False, True]):
        bias = arrays["bias"] = np.where(np.arange(classes) % 2, 0.1, 0.0).astype(np.float32)
    settings = {"canvas_hw": canvas_hw, "out_hw": out_hw, "with_scores": d.pick([False, True])}

    def check(_device, results, expected):
        values = score_maps(arrays["mask_logits"], scores, canvas_hw, out_hw)
        ranked = np.sort(values - bias[:, None, None], axis=0)
        clear = np.ones(out_hw, bool)
        if classes > 1:
            clear = ranked[-1] - ranked[-2] > 2 * REGION_SCORE
        assert results[0].dtype == expected[0].dtype
        np.testing.assert_array_equal(results[0][clear], expected[0][clear])
        for result, wanted in zip(results[1:], expected[1:], strict=True):
            np.testing.assert_allclose(result, wanted, rtol=0, atol=REGION_SCORE)

    return Case(arrays, settings, check)


MAKERS = {
    make.__name__: make
    for make in (
        *(preprocess, relationship_descriptor, relationship_descriptor_text, patch_text_similarity),
        *(upsample_argmax, upsample_argmax_overlay, overlay, ink, all_finite, count_labels),
        *(merge_windows, warp_blend, mask_boxes, crop_regions, label_regions),
    )
}


def check_call(name, device, case):
    """A call without ``out``, and one that writes poisoned memory, to the same bits."""

    def run(module, arrays, **more):
        results = getattr(module, name)(**arrays, **case.settings, **more)
        results = results if isinstance(results, tuple) else (results,)
        return [result for result in results if result is not None]

    results = run(ops, case.placed(device), stream=device.stream)
    assert all(device.holds(result) for result in results)
    values, arrays = [device.fetch(result) for result in results], case.narrowed()
    if name == "ink":
        arrays["picture"] = arrays["picture"].copy()
    with np.errstate(invalid="ignore", over="ignore"):
        expected = run(reference, arrays)
    assert [value.shape for value in values] == [value.shape for value in expected]
    case.check("cpu" if device.name == "cpu" else "cuda", values, expected)
    if name == "ink":
        return
    dtype = case.dtypes.get("out")
    bits = np.uint16 if dtype == "bfloat16" else dtype
    outputs = [device.poisoned(value.shape, bits or value.dtype) for value in values]
    handed = [Bfloat16Array(output) for output in outputs] if dtype == "bfloat16" else outputs
    drawn = {"picture": handed[-1]} if name == "upsample_argmax_overlay" else {}
    out = handed[: len(handed) - len(drawn)]
    out = {"out": tuple(out) if len(out) > 1 else out[0]}
    written = run(ops, case.placed(device), stream=device.stream, **out, **drawn)
    assert all(a is b for a, b in zip(written, handed, strict=True))
    for output, value in zip(outputs, values, strict=True):
        numbers, rounded = device.fetch(output), value
        if dtype == "bfloat16":
            numbers, rounded = widened(numbers), widened(bfloat16_bits(value))
        elif dtype == "float16":
            numbers, rounded = numbers.astype(np.float32), value.astype(dtype).astype(np.float32)
        last = LAST_BIT[dtype or "float32"]
        if not last or (name == "preprocess" and device.name == "cpu"):
            np.testing.assert_array_equal(numbers, rounded)
        else:  # a rounding either way where the sums behind differ
            np.testing.assert_allclose(numbers, value, rtol=2 * last, atol=1e-5 + 5 * last)
