import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.errors import refused  # noqa: E402
from zsseg_rt.errors import ArgumentError, ShapeError  # noqa: E402
from zsseg_rt.training.tasks.labelled import UNSEEN, LabelProtocol  # noqa: E402

SEEN = (0, 2, 5)
NUM_CLASSES = 6


def protocol(name: str, **changes) -> LabelProtocol:
    settings = {"num_classes": NUM_CLASSES, "seen": SEEN, "ignore_label": 255}
    return LabelProtocol(name, **settings | changes)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("inductive", [0, 2, 5], [0, 255, 1, 255, 255, 2, 255]),
        ("transductive", [0, 1, 2, 3, 4, 5], [0, UNSEEN, 2, UNSEEN, UNSEEN, 5, 255]),
        ("supervised", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 255]),
    ],
)
def test_labels_and_queries(name, rows, expected):
    rule = protocol(name)
    labels = rule.prepare(torch.tensor([0, 1, 2, 3, 4, 5, 255]))
    assert labels.tolist() == expected
    embeds = torch.randn(NUM_CLASSES, 4)
    assert torch.equal(rule.select(embeds), embeds[rows])


def test_many_classes_have_another_ignore_label():
    rule = protocol("inductive", num_classes=300, seen=range(290), ignore_label=65535)
    labels = rule.prepare(torch.tensor([255, 289, 290, 65535]))
    assert labels.tolist() == [255, 289, 65535, 65535]


def test_pseudo_labels_are_the_best_unseen_class_where_unseen_classes_are():
    rng = np.random.default_rng(0)
    annotation = torch.from_numpy(rng.choice([0, 1, 2, 3, 4, 5, 255], (2, 9, 7)))
    scores = torch.from_numpy(rng.random((2, NUM_CLASSES, 9, 7))).requires_grad_(True)
    rule = protocol("transductive")
    labels = rule.complete(rule.prepare(annotation), scores).numpy()
    values, unseen = scores.detach().numpy(), [1, 3, 4]
    for at in np.ndindex(annotation.shape):
        given = annotation[at].item()
        picture, row, column = at
        best = unseen[int(np.argmax(values[picture, unseen, row, column]))]
        assert labels[at] == (best if given in unseen else given)


@pytest.mark.parametrize("name", ["inductive", "supervised"])
def test_other_protocols_make_no_pseudo_labels(name):
    labels = torch.tensor([[[0, 255]]])
    assert torch.equal(protocol(name).complete(labels, torch.zeros(1, 3, 1, 2)), labels)


@pytest.mark.parametrize(
    ("name", "changes", "argument"),
    [
        ("zero-shot", {}, "protocol"),
        ("inductive", {"seen": (0, 0)}, "seen"),
        ("inductive", {"seen": (0, 6)}, "seen"),
        ("inductive", {"seen": ()}, "seen"),
        ("transductive", {"seen": range(6)}, "seen"),
    ],
)
def test_refuses_what_cannot_be_trained(name, changes, argument):
    with refused(ArgumentError, argument):
        protocol(name, **changes)


def test_refuses_embeddings_of_another_vocabulary():
    with refused(ShapeError, "text_embeds"):
        protocol("inductive").select(torch.zeros(3, 4))
