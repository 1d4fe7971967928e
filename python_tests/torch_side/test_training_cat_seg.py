"""CAT-Seg from settings to a bundle, on the synthetic world."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")


from support.errors import refused  # noqa: E402
from support.small_runs import TABLES  # noqa: E402
from zsseg_rt import Engine, EngineConfig  # noqa: E402
from zsseg_rt.errors import ArgumentError  # noqa: E402
from zsseg_rt.models.cat_seg.aggregator import AggregatorConfig, ClassAttention  # noqa: E402
from zsseg_rt.training.assembly import assemble, train  # noqa: E402
from zsseg_rt.training.class_embeddings import embed_phrases  # noqa: E402
from zsseg_rt.training.config import TrainConfig  # noqa: E402
from zsseg_rt.training.loop.checkpointing import read_checkpoint  # noqa: E402
from zsseg_rt.training.tasks.cat_seg import ClassPrompts  # noqa: E402
from zsseg_rt.training.trained.card import (  # noqa: E402
    export_trained,
    load_classes,
    load_trained,
)

HEAD = {"hidden": 32, "num_heads": 2, "window": 2, "text_guidance": 8, "guidance": 8}
SMALL = {"decoder": [32, 16], "up": [8, 8], "decoder_guidance": [8, 8], "padding": 32}


def configure(folder, **tables):
    options = {"pretrained": "demo", "view": 64, "aggregator": HEAD | SMALL}
    task = {"options": {"learning_rate": 1e-2, "backbone_learning_rate": 1e-2}}
    return TrainConfig.from_dict(
        TABLES
        | {
            "model": {"architecture": "cat_seg", "options": options},
            "task": task,
            "evaluation": {"limit": 2},
            "output": {"folder": str(folder)},
        }
        | tables
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("runs") / "run")
    return config, train(config)


def test_run_moves_the_head_and_q_and_v_of_both_towers(run):
    config, result = run
    assert result.finished
    before = assemble(config).task.model.state_dict()
    after = read_checkpoint(result.last_checkpoint).model
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    clip = {key for key in moved if "_encoder." in key}
    assert all(key.endswith(("q_proj_weight", "v_proj_weight")) for key in clip)
    assert {key.split(".")[0] for key in clip} == {"image_encoder", "text_encoder"}
    assert {"aggregator.conv1.weight", "upsample1.weight"} <= moved


def test_checkpoints_hold_the_embeddings_of_the_tuned_tower(run):
    config, result = run
    classes, embeds = load_classes(result.run_folder)
    model = load_trained(result.run_folder)
    own = embed_phrases(model.text_encoder, classes.phrases, classes.templates)
    torch.testing.assert_close(embeds, own)
    untrained = assemble(config)
    assert (embeds - untrained.embeddings.phrase_embeds).abs().max() > 1e-2
    assert "own text tower" in classes.space


@torch.no_grad()
def test_run_exports_to_a_bundle_that_labels_alike(run, tmp_path):
    _, result = run
    classes, embeds = load_classes(result.run_folder)
    bundle = export_trained(result.run_folder, tmp_path / "run.zsseg", precisions=("float32",))
    model = load_trained(result.run_folder)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.image_mean, model.image_std))
    scores = model.predict((planes - mean) / std, embeds)[0]
    best = scores.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-5).numpy()
    with Engine(bundle, EngineConfig(precision="float32")) as engine:
        vocabulary = engine.set_classes(list(classes.phrases))
        np.testing.assert_allclose(vocabulary.embeds, embeds, atol=1e-5)
        assert vocabulary.space == classes.space
        labels = engine.segment(picture).labels
    assert clear.any()
    assert (labels == scores.argmax(dim=0).numpy())[clear].all()


def test_names_go_through_the_text_tower_at_every_step(tmp_path):
    parts = assemble(configure(tmp_path))
    task, model = parts.task, parts.task.model
    rows = parts.embeddings.class_embeds[task.label_protocol.query_rows]
    torch.testing.assert_close(task.queries().detach(), rows, atol=1e-5, rtol=1e-4)
    task.queries()[0, 0].backward()
    grads = {name for name, p in model.text_encoder.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in model.text_encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("trained", "towers"), [("image", {"image_encoder"}), ("head", set())])
def test_towers_can_be_left_alone(tmp_path, trained, towers):
    task = assemble(configure(tmp_path, task={"options": {"trained": trained}})).task
    found = {name.split(".")[0] for name, p in task.model.named_parameters() if p.requires_grad}
    assert {name for name in found if name.endswith("_encoder")} == towers
    assert torch.equal(task.queries(), task.query_embeds)
    groups = task.parameter_groups()
    assert len(groups) == 1 + len(towers)
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-6][: len(groups)])


def test_every_trained_tensor_gets_a_gradient(tmp_path):
    parts = assemble(configure(tmp_path))
    batch = next(parts.batches(start_position=0, process_index=0, num_processes=1, batch_size=2))
    sum(parts.task.train()(batch).values()).backward()
    for name, parameter in parts.task.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_cannot_be_trained_is_refused(tmp_path):
    bank = tmp_path / "rows.npy"
    np.save(bank, np.eye(28, 128, dtype=np.float32))
    with refused(ArgumentError, "trained"):
        assemble(configure(tmp_path, text={"bank": str(bank)}))
    for options, argument in (
        ({"trained": "all"}, "trained"),
        ({"backbone_learning_rate": -1.0}, "backbone_learning_rate"),
        ({"pooling": 3}, "pooling"),
        ({"pooling": 0}, "pooling"),
        ({"loss": "hinge"}, "loss"),
    ):
        with refused(ArgumentError, f"task.options.{argument}"):
            assemble(configure(tmp_path, task={"options": options}))


@torch.no_grad()
def test_pooling_averages_cells_in_training_alone():
    torch.manual_seed(0)
    sizes = {"hidden": 16, "num_heads": 2, "text_guidance": 8, "decoder_guidance": (8, 8)}
    attention = ClassAttention(AggregatorConfig(**sizes))
    alike = torch.randn(2, 3, 1, 16).expand(-1, -1, 16, -1)
    x, text = torch.randn(2, 3, 16, 16), torch.rand(3, 8)
    plain = attention(alike, text), attention(x, text)
    attention.pooling = 2
    torch.testing.assert_close(attention(alike, text), plain[0])  # means of equals
    assert (attention(x, text) - plain[1]).abs().max() > 1e-2
    assert torch.equal(attention.eval()(x, text), plain[1])
    cells = x.clone().unflatten(2, (4, 4))
    cells[:, :, :2, :2] = cells[:, :, :2, :2].flip(2, 3)  # order within a cell is not seen
    changed = attention.train()(cells.flatten(2, 3), text) - cells.flatten(2, 3)
    torch.testing.assert_close(changed, attention(x, text) - x)


def test_classes_keep_their_synonyms():
    prompts = ClassPrompts(torch.arange(4 * 2 * 3).view(4, 2, 3), (2, 1, 1))
    chosen = prompts.of([2, 0])
    assert chosen.counts == (1, 2)
    assert torch.equal(chosen.tokens, prompts.tokens[[3, 0, 1]])
