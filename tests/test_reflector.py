"""Promises of reflector.py."""
import json

import numpy as np
import pytest
import torch

from reflector import Reflector, ReflectorConfig, StopRule, augment, calibrate, reflector_loss, reflector_metrics
from runs import UserError
from vlm_tiny import tiny_vlm

MILK, SOUP = "pick up the milk and place it in the basket", "pick up the soup and place it in the basket"


def tiny(**changes):
    torch.manual_seed(0)
    return Reflector(ReflectorConfig(**{"channels": 16, "width": 32, "dropout": 0.0, **changes}))


def clips(count=8, seed=0, T=5, size=32):
    """Noise videos: the instruction means one of two places; done once a white square lies there."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 120, (count, T, 2, 3, size, size), dtype=np.uint8)
    texts, labels = [MILK if i % 2 else SOUP for i in range(count)], np.zeros((count, T), np.float32)
    for i in range(count):
        done, left = rng.integers(1, T), rng.random() < 0.5
        frames[i, done:, :, :, 12:20, slice(4, 12) if left else slice(20, 28)] = 255
        labels[i, done:] = float(left == (texts[i] == MILK))
    fingers = torch.from_numpy(rng.random((count, T, 8), dtype=np.float32) * 0.08)
    return {"frames": torch.from_numpy(frames), "instruction": texts, "labels": torch.from_numpy(labels), "fingers": fingers}


def rows(batch):
    """Every frame of the clips as `ChunkData.frame_batch` has it: first, previous and current."""
    frames, T = batch["frames"], batch["frames"].shape[1]
    seen = [torch.stack([clip[0], clip[max(t - 1, 0)], clip[t]]) for clip in frames for t in range(T)]
    return {"frames": torch.stack(seen), "instruction": [text for text in batch["instruction"] for _ in range(T)],
            "labels": batch["labels"].flatten(), "fingers": batch["fingers"].flatten(0, 1)}


def test_overfits_eight_clips_whose_success_depends_on_the_instruction():
    model, batch = tiny(shift=1), clips()
    assert 0 < batch["labels"].mean() < 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(130):
        loss, metrics = reflector_loss(model, rows(batch), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["loss"] < 0.05 and metrics["accuracy"] == 1
    scores = torch.sigmoid(model(batch["frames"], batch["instruction"], batch["fingers"])).detach().numpy()
    assert reflector_metrics(scores, batch["labels"].numpy(), np.ones((8, 5)), StopRule())["auroc"] == 1
    swapped = [MILK if text == SOUP else SOUP for text in batch["instruction"]]
    assert (model(batch["frames"], swapped, batch["fingers"]) - model(batch["frames"], batch["instruction"], batch["fingers"])).abs().max() > 1


def test_does_not_depend_on_the_order_of_the_batch():
    model, batch, order = tiny(), clips(), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    expected = model(batch["frames"], batch["instruction"], batch["fingers"])[order]
    got = model(batch["frames"][order], [batch["instruction"][i] for i in order], batch["fingers"][order])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_score_sees_the_first_previous_and_current_frame_and_no_other():
    model, batch = tiny(), clips(count=2)
    before = model(batch["frames"], batch["instruction"], batch["fingers"])
    for changed, seen in [(0, {0, 1, 2, 3, 4}), (2, {2, 3}), (4, {4})]:
        frames = batch["frames"].clone()
        frames[:, changed] = 255 - frames[:, changed]
        difference = (model(frames, batch["instruction"], batch["fingers"]) - before).abs().amin(dim=0)
        unseen = (model(frames, batch["instruction"], batch["fingers"]) - before).abs().amax(dim=0)
        for t in range(5):
            assert difference[t] > 0 if t in seen else unseen[t] < 1e-6, (changed, t)


def test_it_is_told_the_fingers_of_its_own_frame_alone_unless_it_shall_not_know():
    batch = clips(count=2)
    moved = batch["fingers"].clone()
    moved[:, 2] = 0.08 - moved[:, 2]
    for told in (True, False):
        model = tiny(fingers=told)
        before, after = (model(batch["frames"], batch["instruction"], fingers) for fingers in (batch["fingers"], moved))
        assert (before != after).any(0).tolist() == [False, False, told, False, False]


def test_score_is_the_sigmoid_of_forward():
    model, batch = tiny(), clips(count=3)
    frames = batch["frames"]
    logits = model(frames, batch["instruction"], batch["fingers"])
    for t, previous in [(0, 0), (1, 0), (4, 3)]:
        score = model.score(frames[:, 0], frames[:, previous], frames[:, t], batch["instruction"], batch["fingers"][:, t])
        torch.testing.assert_close(score, torch.sigmoid(logits[:, t]))
        assert score.shape == (3,) and not score.requires_grad


def test_loss_is_binary_cross_entropy_of_the_frames_that_forward_judges():
    batch = clips()
    logits = tiny()(batch["frames"], batch["instruction"], batch["fingers"]).detach()
    labels = batch["labels"]
    by_hand = -(labels * torch.sigmoid(logits).log() + (1 - labels) * torch.sigmoid(-logits).log()).mean()
    loss, _ = reflector_loss(tiny(shift=0, brightness=0.0), rows(batch), torch.Generator())
    torch.testing.assert_close(loss, by_hand)


def test_augmentation_is_the_same_at_all_times_differs_between_samples_and_repeats_with_the_seed():
    frame = torch.randint(0, 200, (6, 1, 2, 3, 32, 32), dtype=torch.uint8)
    frames, config = frame.expand(6, 4, 2, 3, 32, 32), ReflectorConfig()
    out = augment(frames, config, torch.Generator().manual_seed(0))
    assert out.dtype == torch.uint8 and out.shape == frames.shape and not torch.equal(out, frames)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert torch.equal(out, augment(frames, config, torch.Generator().manual_seed(0)))
    assert not torch.equal(out, augment(frames, config, torch.Generator().manual_seed(1)))
    shifted = augment(frames, ReflectorConfig(shift=2, brightness=0.0), torch.Generator().manual_seed(0))
    moves = [[next((dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(
        shifted[b, 0, v, :, 4:28, 4:28], frame[b, 0, v, :, 4 + dy:28 + dy, 4 + dx:28 + dx]))
        for v in range(2)] for b in range(6)]
    for axis in range(2):
        assert len({move[axis] for pair in moves for move in pair}) > 2  # up and down, left and right
        assert len({tuple(move[axis] for move in pair) for pair in moves}) > 2  # by the sample
        assert any(pair[0][axis] != pair[1][axis] for pair in moves)  # and by the view


def test_metrics_of_hand_made_episodes():
    labels = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    scores = np.array([[0.1, 0.1, 0.2, 0.9],   # right, one chunk late
                       [0.1, 0.8, 0.9, 0.9],   # stops one chunk too early: false
                       [0.1, 0.6, 0.1, 0.1],   # a failure taken for a success: false
                       [0.1, 0.1, 0.1, 0.9],   # its last frame isn't valid: never stops
                       [0.1, 0.2, 0.3, 0.4]])  # a success that is missed
    valid = np.ones((5, 4), bool)
    valid[3, 3] = False
    metrics = reflector_metrics(scores, labels, valid, StopRule(confirm=1))
    assert metrics["false_stop_rate"] == 2 / 5
    assert metrics["missed_rate"] == 1 / 3
    assert metrics["stop_delay"] == 1
    assert metrics["precision"] == 3 / 5 and metrics["recall"] == 3 / 7
    assert (metrics["frames"], metrics["episodes"]) == (19, 5)
    never = reflector_metrics(scores * 0, labels * 0, valid, StopRule(confirm=1))
    assert [never[key] for key in ("auroc", "precision", "recall", "missed_rate", "stop_delay")] == [None] * 5
    assert never["false_stop_rate"] == 0
    json.dumps(metrics), json.dumps(never)
    confirmed = reflector_metrics(scores, labels, valid, StopRule(confirm=2))
    assert confirmed["false_stop_rate"] == 0 and confirmed["missed_rate"] == 2 / 3 and confirmed["stop_delay"] == 0


def test_an_episode_ends_at_the_first_of_enough_frames_in_a_row():
    scores = np.array([[0.9, 0.1, 0.6, 0.7, 0.2], [0.9, 0.8, 0.7, np.nan, 0.9]])
    assert StopRule(0.5, 1).stops(scores).tolist() == [[True, False, True, True, False], [True, True, True, False, True]]
    assert StopRule(0.5, 2).stops(scores).tolist() == [[False] * 3 + [True, False], [False, True, True, False, False]]
    assert StopRule(0.5, 3).stops(scores).tolist() == [[False] * 5, [False, False, True, False, False]]
    assert StopRule(0.5, 3).stops(scores[:, :2]).tolist() == [[False, False]] * 2
    assert StopRule(0.5, 2).confirmed(scores[0]).tolist() == [0.0, 0.1, 0.1, 0.6, 0.2]


def test_auroc_counts_ties_half_and_brier_and_ece_are_by_hand():
    valid = np.ones((1, 4), bool)
    metrics = reflector_metrics(np.array([[0.15, 0.45, 0.45, 0.85]]), np.array([[0, 0, 1, 1]]), valid, StopRule())
    assert metrics["auroc"] == (1 + 1 + 0.5 + 1) / 4
    assert metrics["brier"] == pytest.approx((0.15**2 + 0.45**2 + 0.55**2 + 0.15**2) / 4)
    assert metrics["ece"] == pytest.approx((0.15 + abs(0.9 - 1) + 0.15) / 4)
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, (4, 9)) / 5, rng.integers(0, 2, (4, 9))
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert reflector_metrics(scores, labels, np.ones((4, 9)), StopRule())["auroc"] == pytest.approx(np.mean(pairs))


def test_calibration_finds_the_slope_and_shift_that_the_labels_have():
    generator, model = torch.Generator().manual_seed(0), tiny()
    logits = 8 * torch.rand(20_000, generator=generator) - 4
    labels = (torch.rand(20_000, generator=generator) < torch.sigmoid(0.5 * logits + 1)).float()
    calibrate(model, logits, labels)
    assert torch.allclose(model.platt, torch.tensor([0.5, 1.0]), atol=0.05)
    batch = clips(count=2)
    frames, texts, fingers = batch["frames"], batch["instruction"], batch["fingers"]
    score = model.score(frames[:, 0], frames[:, 0], frames[:, 1], texts, fingers[:, 1])
    logits = model(frames[:, :2], texts, fingers[:, :2])[:, 1]
    torch.testing.assert_close(score, torch.sigmoid(model.platt[0] * logits + model.platt[1]))
    calibrate(model, torch.tensor([-3.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert model.platt[0] < 30, "labels that are told apart perfectly must not make it blindly sure"
    before = model.platt.clone()
    calibrate(model, torch.tensor([-3.0, 3.0]), torch.zeros(2))
    assert torch.equal(model.platt, before), "failures alone must not make every score 0, which is RL's reward"


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_any_image_text_model_is_read_frozen_and_only_what_was_trained_is_saved(kind, tmp_path):
    model, batch = tiny(backbone=tiny_vlm(tmp_path / "vlm", kind), dtype="float32"), clips(count=4, T=3)
    frames, texts, fingers = batch["frames"], batch["instruction"], batch["fingers"]
    before = {name: value.clone() for name, value in model.encoder.vlm.model.state_dict().items()}
    loss, _ = reflector_loss(model, rows(batch), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.encoder.vlm.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.vlm.model.state_dict().items())
    scores = model(frames, texts, fingers)
    assert (model(255 - frames, texts, fingers) - scores).abs().max() > 1e-6, "it does not look"
    longer = [text + " pick up the milk" if i else text for i, text in enumerate(texts)]  # padding beside a short text
    torch.testing.assert_close(model(frames, longer, fingers)[0], scores[0], atol=1e-4, rtol=1e-4)
    assert (model(frames, longer, fingers)[1:] - scores[1:]).abs().max() > 1e-6, "it does not read"
    model.save_pretrained(tmp_path / "reflector")
    assert not any("vlm" in name or "vision" in name for name in model.state_dict())
    assert torch.equal(Reflector.from_pretrained(tmp_path / "reflector")(frames, texts, fingers), scores)


def test_in_training_the_backbone_reads_every_frame_once(tmp_path):
    model, batch, read = tiny(backbone=tiny_vlm(tmp_path, "llava"), dtype="float32"), clips(count=4, T=3), []
    hidden = model.encoder.vlm.hidden
    model.encoder.vlm.hidden = lambda frames, questions: read.append(len(frames)) or hidden(frames, questions)
    losses = [reflector_loss(model.train(), rows(batch), torch.Generator().manual_seed(step))[0] for step in range(3)]
    assert read == [12] and losses[0] == losses[1] == losses[2]
    others = clips(count=4, seed=1, T=3)
    both = {key: torch.cat([value, others[key]]) if torch.is_tensor(value) else value + others[key] for key, value in batch.items()}
    reflector_loss(model, rows(both), torch.Generator())
    assert read[1:] == [12], "of the 24 those that are new"
    model.eval()(batch["frames"], batch["instruction"], batch["fingers"])
    assert read[2:] == [12], "in imagination no frame comes twice, so none is kept"


def test_a_backbone_that_is_none_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="--reflector.backbone"):
        tiny(backbone=str(tmp_path))


def test_save_and_load_are_bit_equal_and_a_foreign_folder_is_refused(tmp_path):
    model, batch = tiny(brightness=0.5), clips(count=2)
    model.save_pretrained(tmp_path)
    loaded = Reflector.from_pretrained(tmp_path)
    assert loaded.config == model.config
    frames, texts, fingers = batch["frames"], batch["instruction"], batch["fingers"]
    assert torch.equal(loaded(frames, texts, fingers), model(frames, texts, fingers))
    (tmp_path / "config.json").write_text('{"depth": 3}')
    with pytest.raises(UserError, match="train it again"):
        Reflector.from_pretrained(tmp_path)
