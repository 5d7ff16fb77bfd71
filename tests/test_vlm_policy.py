"""Promises of vlm_policy.py: any Hugging Face image-text model acts, on tiny random ones of the classes of real ones."""
import pytest
import torch
from safetensors.torch import load_file

import encoders
import openvla_memory
from openvla import OpenVLAPolicy, load_policy, pretrained_policy
from openvla_tiny import write_checkpoint
from policy import PolicyConfig, clone_loss
from ppo import LoRA, add_lora
from runs import UserError
from tiny_models import NORMALIZER
from vlm_policy import VLMPolicy
from vlm_tiny import tiny_vlm

CPU = torch.device("cpu")


@pytest.fixture(params=["llava", "idefics3"])
def policy(request, tmp_path):
    config = PolicyConfig(backbone=tiny_vlm(tmp_path / "vlm", request.param), width=16, dtype="float32", augment=False)
    torch.manual_seed(0)
    return VLMPolicy(config, NORMALIZER).eval()


def batch(count=4):
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randint(0, 256, (count, 2, 3, 32, 32), generator=generator, dtype=torch.uint8),
            "state": 0.02 * torch.randn(count, 8, generator=generator),
            "instruction": ["milk first", "soup first", "the current view", "task first"][:count],
            "actions": torch.rand(count, 8, 7, generator=generator) * 2 - 1, "valid": torch.ones(count, 8, dtype=torch.bool)}


@pytest.mark.parametrize("key", ["images", "state", "instruction"])
def test_every_input_reaches_every_action(policy, key):
    obs = batch(2)
    before = policy(obs).loc
    assert before.shape == (2, 8, 7) and policy.env_actions(before).abs().max() <= 1
    changed = obs | {key: obs[key].flip(0) if torch.is_tensor(obs[key]) else obs[key][::-1]}
    assert ((policy(changed).loc - before).abs() > 1e-7).all()


def test_a_batch_mate_with_a_longer_text_changes_nothing(policy):
    obs = batch(2)
    alone = policy({key: value[:1] for key, value in obs.items()}).loc
    longer = obs | {"instruction": [obs["instruction"][0], "pick up milk and the soup"]}
    torch.testing.assert_close(policy(longer).loc[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_cloning_learns_by_the_heads_alone_or_by_lora_as_well(policy, rank, tmp_path):
    if rank:
        add_lora(policy, rank)
    data, losses = batch(), []
    before = {name: value.clone() for name, value in policy.backbone.state_dict().items() if not name.endswith((".a", ".b"))}
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)
    for step in range(40):
        loss, metrics = clone_loss(policy, data, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["l1"].item())
    assert losses[-1] < 0.5 * losses[0]
    after = policy.backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "what is pretrained is frozen"
    lora = [layer for layer in policy.backbone.modules() if isinstance(layer, LoRA)]
    assert bool(lora) == bool(rank) and (not rank or max(layer.b.abs().max() for layer in lora) > 0)

    policy.save_pretrained(tmp_path / "saved")
    kept = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(name.startswith(("action_head.", "scale_head.")) or name.endswith((".a", ".b")) for name in kept)
    loaded = load_policy(tmp_path / "saved", CPU)
    assert isinstance(loaded, VLMPolicy)
    assert torch.equal(loaded(data).loc, policy(data).loc) and torch.equal(loaded(data).log_scale, policy(data).log_scale)


def test_gradient_checkpointing_learns_the_same(policy):
    add_lora(policy, 2)

    def gradients():
        policy.zero_grad()
        clone_loss(policy, batch(), torch.Generator())[0].backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    plain, calls = gradients(), []
    encoders.recompute_layers(policy.backbone)
    next(layer for layer in policy.backbone.modules() if isinstance(layer, LoRA)).register_forward_hook(
        lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(), plain)
    assert len(calls) == 2, "once forward, once again for the gradient"


def test_too_little_memory_to_read_it_or_to_train_it_is_one_clear_line(policy, monkeypatch):
    openvla_memory.check_training(policy, 4, 0, CPU, "--ppo.microbatch")
    monkeypatch.setattr(openvla_memory, "trained_size", lambda module: 8e15)
    with pytest.raises(UserError, match="8000000.0 GB .* to train with 4 samples at once, .*: take a smaller model or"):
        openvla_memory.check_training(policy, 4, 0, CPU, "--ppo.microbatch")
    monkeypatch.setattr(encoders, "size_of", lambda module: 9e15)
    with pytest.raises(UserError, match="9000000.0 GB .* to read .* smaller model, --policy.dtype bfloat16 or"):
        VLMPolicy(policy.config, NORMALIZER)


def test_in_bfloat16_the_heads_stay_exact(tmp_path):
    policy = VLMPolicy(PolicyConfig(backbone=tiny_vlm(tmp_path, "idefics3"), width=16), NORMALIZER)
    assert policy.backbone.dtype == torch.bfloat16 and policy(batch()).loc.dtype == torch.float32


def test_the_backbone_says_which_kind_of_policy_it_is(tmp_path):
    kinds = {VLMPolicy: tiny_vlm(tmp_path / "vlm", "llava"), OpenVLAPolicy: str(write_checkpoint(tmp_path / "openvla"))}
    for kind, folder in kinds.items():
        assert type(pretrained_policy(PolicyConfig(backbone=folder), "libero_object", NORMALIZER)) is kind
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="--policy.backbone .* is no Hugging Face image-text model"):
        pretrained_policy(PolicyConfig(backbone=str(tmp_path / "none")), "libero_object", NORMALIZER)


@torch.no_grad()
def test_many_questions_are_read_a_few_at_a_time_with_the_same_answers(tmp_path, monkeypatch):
    reader, pictures = encoders.ImageTextModel(tiny_vlm(tmp_path, "llava"), "--x"), torch.randint(0, 256, (11, 2, 3, 32, 32), dtype=torch.uint8)
    questions, sizes = [f"pick up the {'milk ' * (i % 3)}" for i in range(11)], []
    monkeypatch.setattr(reader, "_read", lambda some, words, read=reader._read: sizes.append(len(words)) or read(some, words))
    together, alone = reader.hidden(pictures, questions), [reader.hidden(pictures[i:i + 1], questions[i:i + 1]) for i in range(11)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert sizes[:2] == [8, 3]
