import numpy as np
import pytest

torch = pytest.importorskip("torch")

from support.errors import refused  # noqa: E402
from zsseg_rt.errors import ShapeError  # noqa: E402
from zsseg_rt.training.tasks.losses import (  # noqa: E402
    binary_cross_entropy,
    cross_entropy,
    mask_losses,
    recovery_loss,
)

IGNORED = 255


def naive_mask_losses(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The definitions, pixel by pixel in float64."""
    present = focal = dice = 0.0
    for picture, annotation in zip(logits.astype(np.float64), labels, strict=True):
        for index, z in enumerate(picture):
            p = 1 / (1 + np.exp(-z))
            y = annotation == index
            p_t, a_t = np.where(y, p, 1 - p), np.where(y, 0.25, 0.75)
            focal += np.mean(-a_t * (1 - p_t) ** 2 * np.log(p_t))
            if y.any():
                present += 1
                dice += 1 - (2 * np.sum(p * y) + 1) / (np.sum(p) + np.sum(y) + 1)
    return focal / max(1, present), dice / max(1, present)


def naive_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    terms = []
    for picture, annotation in zip(logits.astype(np.float64), labels, strict=True):
        log_p = picture - np.log(np.exp(picture).sum(axis=0))
        rows, columns = np.nonzero((annotation >= 0) & (annotation < len(picture)))
        terms += list(-log_p[annotation[rows, columns], rows, columns])
    return float(np.mean(terms)) if terms else 0.0


def some(num_pictures: int, num_classes: int, size: tuple[int, int], seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(num_pictures, num_classes, *size)).astype(np.float32)
    labels = rng.integers(-1, num_classes + 2, (num_pictures, *size))
    labels[labels >= num_classes] = IGNORED
    return torch.from_numpy(logits), torch.from_numpy(labels)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16)])
@pytest.mark.parametrize("num_classes", [1, 2, 13])
@pytest.mark.parametrize("num_pictures", [1, 3])
def test_losses_are_their_definitions(num_pictures, num_classes, size):
    logits, labels = some(num_pictures, num_classes, size)
    expected = naive_mask_losses(logits.numpy(), labels.numpy())
    # float32 sums of up to 256 terms against float64
    assert [v.item() for v in mask_losses(logits, labels)] == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(logits, labels).item() == pytest.approx(
        naive_cross_entropy(logits.numpy(), labels.numpy()), rel=1e-5
    )


@pytest.mark.parametrize("unannotated", ["negative", "ignore"])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_binary_cross_entropy_is_torchs_on_one_hot_labels(num_classes, unannotated):
    logits, labels = some(2, num_classes, (6, 5))
    targets = (labels.unsqueeze(1) == torch.arange(num_classes).view(1, -1, 1, 1)).float()
    known = (labels >= 0) & (labels < num_classes)
    terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if unannotated == "ignore":
        terms = terms.transpose(0, 1)[:, known]
    found = binary_cross_entropy(logits, labels, unannotated=unannotated)
    torch.testing.assert_close(found, terms.mean())
    nothing = torch.full_like(labels, IGNORED)
    assert binary_cross_entropy(logits, nothing, unannotated="ignore") == 0


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_ignored_pixels_count_as_if_cut_out(num_pictures):
    """Columns without labels change nothing: the losses are those of the other columns alone."""
    logits, labels = some(num_pictures, 4, (6, 8))
    labels[:, :, :5] = labels[:, :, :5].clamp(0, 3)
    labels[:, :, 5:] = IGNORED
    cut = mask_losses(logits[..., :5], labels[..., :5])
    found = mask_losses(logits, labels, unannotated="ignore")
    assert [v.item() for v in found] == pytest.approx([v.item() for v in cut], rel=1e-5)
    assert mask_losses(logits, labels).focal.item() != pytest.approx(cut.focal.item(), rel=1e-2)


def test_a_batch_of_ignored_pixels_costs_nothing():
    logits, labels = some(1, 3, (4, 4))
    found = mask_losses(logits, torch.full_like(labels, IGNORED), unannotated="ignore")
    assert found == (0, 0)


def test_a_picture_without_any_class_adds_focal_loss_only():
    logits, labels = some(1, 4, (6, 6))
    empty = torch.cat([labels, torch.full_like(labels, IGNORED)])
    alone, both = mask_losses(logits, labels), mask_losses(logits.repeat(2, 1, 1, 1), empty)
    assert both.dice == alone.dice
    assert both.focal > alone.focal


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_a_batch_without_any_class(num_pictures):
    logits, _ = some(num_pictures, 3, (5, 4))
    logits.requires_grad_(True)
    labels = torch.full((num_pictures, 5, 4), IGNORED)
    focal, dice = mask_losses(logits, labels)
    expected, _ = naive_mask_losses(logits.detach().numpy(), labels.numpy())
    assert dice.item() == 0
    assert focal.item() == pytest.approx(expected, rel=1e-5)
    entropy = cross_entropy(logits, labels)
    assert entropy.item() == 0
    (focal + dice + entropy).backward()
    assert logits.grad.isfinite().all()


def test_losses_of_certain_logits_stay_finite():
    logits = torch.full((1, 2, 3, 3), 1e4)
    logits[:, 1] = -1e4
    logits.requires_grad_(True)
    for label in (0, 1, IGNORED):
        focal, dice = mask_losses(logits, torch.full((1, 3, 3), label))
        total = focal + dice + cross_entropy(logits, torch.full((1, 3, 3), label))
        (gradient,) = torch.autograd.grad(total, logits)
        assert total.isfinite()
        assert gradient.isfinite().all()


def test_gradients_are_those_of_finite_differences():
    logits, labels = some(2, 3, (3, 2))
    logits = logits.requires_grad_(True)
    total = sum(mask_losses(logits, labels)) + cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(total, logits)
    values, labels = logits.detach().numpy().astype(np.float64), labels.numpy()

    def loss(z: np.ndarray) -> float:
        return sum(naive_mask_losses(z, labels)) + naive_cross_entropy(z, labels)

    for at in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[at] = 1e-4
        slope = (loss(values + step) - loss(values - step)) / 2e-4
        assert gradient[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_half_precision_logits_are_compared_in_float32():
    logits, labels = some(2, 5, (8, 8))
    half = logits.half()
    for loss in (lambda z, y: mask_losses(z, y).focal, cross_entropy):
        assert loss(half, labels).dtype == torch.float32
        assert loss(half, labels) == loss(half.float(), labels)


def test_recovery_losses_are_mean_absolute_errors_without_gradient_into_targets():
    made = [torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 5, 2, requires_grad=True)]
    targets = [torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 5, 2, requires_grad=True)]
    losses = [recovery_loss(*pair) for pair in zip(made, targets, strict=True)]
    for loss, x, target in zip(losses, made, targets, strict=True):
        expected = np.mean(np.abs(x.detach().numpy() - target.detach().numpy()))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    sum(losses).backward()
    assert all(target.grad is None for target in targets)


def test_sizes_that_differ_are_refused():
    logits, labels = some(2, 3, (4, 4))
    for loss in (mask_losses, cross_entropy):
        with refused(ShapeError, "labels"):
            loss(logits, labels[:, :3])
        with refused(ShapeError, "labels"):
            loss(logits, labels.to(torch.uint8))
