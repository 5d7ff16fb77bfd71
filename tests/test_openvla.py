"""Promises of openvla.py, on a tiny random checkpoint whose numbers the original code has computed (openvla_tiny.py)."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import openvla
import runs
from encoders import check_memory, size_of
from openvla import FULL_SIZE, OpenVLAPolicy, assign_keys, is_unused, load_policy, pixel_values
from openvla_memory import memory
from openvla_tiny import DATA, FULL, GOLDEN, TINY, fill, hash01, key_shapes, write_checkpoint
from policy import Policy, PolicyConfig, clone_loss
from ppo import LoRA, PPOConfig, Rollout, add_lora, make_optimizer, update
from runs import FitConfig, UserError, fit, load_resume, save_resume

torch.set_num_threads(1)
SOUP, LONGER = "pick up the alphabet soup and place it in the basket", "put the soup in the basket and the alphabet up to it"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("openvla") / "tiny")


@pytest.fixture
def policy(checkpoint):
    return make_policy(checkpoint)


def make_policy(checkpoint, **changes):
    torch.manual_seed(0)
    return OpenVLAPolicy.from_checkpoint(PolicyConfig(**{"backbone": str(checkpoint), "dtype": "float32", **changes}),
                                         "libero_object")


def make_obs(B=2, instruction=(SOUP, LONGER)):
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randint(256, (B, 2, 3, 64, 64), dtype=torch.uint8, generator=generator),
            "state": torch.tensor([GOLDEN["state"]] * B), "instruction": list(instruction)[:B]}


def make_batch(policy, B=2):
    actions = 2 * torch.rand(B, 8, 7, generator=torch.Generator().manual_seed(1)) - 1
    actions[..., 6] = torch.sign(actions[..., 6])
    return make_obs(B) | {"actions": policy.normalizer.normalize_action(actions), "valid": torch.ones(B, 8, dtype=torch.bool)}


def copy_of(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as the original code
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def golden_pictures(monkeypatch):
    """The golden numbers start from pictures that are no pictures: two cameras, DINOv2's and SigLIP's channels."""
    pixels = torch.from_numpy(hash01(12 * 224 * 224, 77)).reshape(2, 6, 224, 224) * 2
    monkeypatch.setattr(openvla, "pixel_values", lambda images: pixels)


def assert_golden(values, name):
    assert (values.flatten() - torch.tensor(GOLDEN[name])).abs().max() < 1e-5, name


@torch.no_grad()
def test_every_stage_equals_the_original_code(policy, golden_pictures):
    images = torch.zeros(1, 2, 3, 8, 8)
    patches = policy.stem(images[0])                                        # (2, 256, 32 + 48)
    assert_golden(patches[0, [0, 7, 255], :4], "dino_patch0_7_255_first4")
    assert_golden(patches[0, [0, 7, 255], 32:36], "siglip_patch0_7_255_first4")
    assert_golden(patches[1, 3, :4], "dino_image2_patch3_first4")
    projected = policy.projector(patches)
    assert_golden(torch.stack([projected[0, 0, :4], projected[1, 255, :4]]), "projector_pos0_511_first4")
    state = torch.tensor([GOLDEN["state"]])
    assert_golden(policy.normalizer.normalize_state(state).clamp(-1, 1), "proprio_normalised")
    features = policy.features(images, state, [SOUP])
    assert_golden(features.reshape(56, 32)[[0, 55], :4], "readout_0_55_first4")
    loc = policy.heads(features, features).loc
    assert_golden(loc, "normalised_actions")
    actions, wanted = policy.normalizer.unnormalize_action(loc)[0], torch.tensor(GOLDEN["actions"]).view(8, 7)
    assert (actions[:, :6] - wanted[:, :6]).abs().max() < 1e-5
    assert torch.equal(policy.env_actions(loc)[0, :, 6], -torch.sign(2 * wanted[:, 6] - 1)), "OFT's order to the gripper"


def test_bfloat16_is_near_and_keeps_the_rotary_frequencies_exact(checkpoint, policy, golden_pictures):
    rough = make_policy(checkpoint, dtype="bfloat16")
    assert {p.dtype for p in rough.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(rough.backbone.rotary_emb.inv_freq, policy.backbone.rotary_emb.inv_freq)
    obs = torch.zeros(1, 2, 3, 8, 8), torch.tensor([GOLDEN["state"]]), [SOUP]
    with torch.no_grad():
        assert 0 < (rough.features(*obs).float() - policy.features(*obs)).abs().max() < 0.2


def test_pictures_are_prepared_as_tensorflow_does():
    data = np.load(DATA / "openvla_oft_image.npz")
    upright = torch.from_numpy(data["frame"][::-1].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1  # stored as OpenGL does
    with pytest.MonkeyPatch.context() as patched:
        assert picture_error(upright, data["crop"])[1] < 1.5
        patched.setattr(openvla, "jpeg", lambda images: images)
        largest, mean = picture_error(upright, data["crop_nojpeg"])
        assert largest <= 1 and mean < 0.005


def picture_error(upright, wanted):
    seen = ((pixel_values(upright)[0, 3:] + 1) * 127.5).round().permute(1, 2, 0).numpy()  # SigLIP's channels
    difference = np.abs(seen - wanted)
    return difference.max(), difference.mean()


def test_dino_sees_the_same_picture_with_imagenets_colours():
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    dino, siglip = pixel_values(images).split(3, dim=1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (openvla.MEAN, openvla.STD))
    assert torch.allclose(dino * std + mean, siglip / 2 + 0.5, atol=1e-6) and dino.shape == (2, 3, 224, 224)


def test_prompt_ids_are_the_originals_and_end_with_the_lone_space(policy):
    assert policy.prompt(SOUP.upper()) == [*GOLDEN["ids"], 29871]


def test_a_tower_equals_a_plain_block_of_timm(policy):
    """The blocks as timm writes them, with one matrix for query, key and value, from the checkpoint's own names."""
    weights = {key: fill(key, shape) for key, shape in key_shapes(TINY)[0].items()}

    def tower(x, prefix, layers):
        def linear(x, name):
            return F.linear(x, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"])

        for i in range(layers):
            def norm(x, n):
                name = f"{prefix}.blocks.{i}.norm{n}"
                return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

            B, N, D = x.shape
            q, k, v = linear(norm(x, 1), f"blocks.{i}.attn.qkv").view(B, N, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
            attention = ((q @ k.transpose(-1, -2)) * (D // 2) ** -0.5).softmax(-1) @ v
            x = x + linear(attention.transpose(1, 2).reshape(B, N, D), f"blocks.{i}.attn.proj") * scale(prefix, i, 1)
            hidden = F.gelu(linear(norm(x, 2), f"blocks.{i}.mlp.fc1"))
            x = x + linear(hidden, f"blocks.{i}.mlp.fc2") * scale(prefix, i, 2)
        return x

    def scale(prefix, i, n):
        return weights.get(f"{prefix}.blocks.{i}.ls{n}.scale_factor", torch.ones(()))

    def patches(pixels, prefix):
        name = f"{prefix}.patch_embed.proj"
        x = F.conv2d(pixels, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=14)
        return x.flatten(2).transpose(1, 2) + weights[f"{prefix}.pos_embed"]

    images = torch.rand(1, 3, 64, 64) * 2 - 1
    dino, siglip = pixel_values(images).split(3, dim=1)
    name = "vision_backbone.featurizer"
    x = torch.cat([weights[f"{name}.cls_token"], weights[f"{name}.reg_token"], patches(dino, name)], 1)
    wanted = [tower(x, name, 2)[:, 5:], tower(patches(siglip, "vision_backbone.fused_featurizer"),
                                              "vision_backbone.fused_featurizer", 2)]
    with torch.no_grad():
        assert (policy.stem(images) - torch.cat(wanted, -1)).abs().max() < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------
def test_the_language_model_has_the_checkpoints_options(policy):
    config = openvla.networks(FULL_SIZE)[0]
    assert (config.rms_norm_eps, config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (1e-6, 4096, 11008, 32)
    assert policy.backbone.config.rms_norm_eps == 1e-6 and not policy.backbone.config.is_causal
    assert policy.backbone.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_attention_is_bidirectional(policy):
    """The last token of all, </s>, reaches the first place that is read; a causal mask would block it."""
    obs = make_obs(1)
    before = policy(obs).loc
    policy.backbone.embed_tokens.weight[2] += 1
    assert (policy(obs).loc[:, 0] - before[:, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_longer_batch_mate_changes_nothing(policy):
    assert len(policy.prompt(SOUP)) != len(policy.prompt(LONGER))
    obs = make_obs()
    together = policy(obs).loc
    for row in (0, 1):
        alone = policy({"images": obs["images"][row:row + 1], "state": obs["state"][row:row + 1],
                        "instruction": obs["instruction"][row:row + 1]}).loc
        assert torch.allclose(together[row], alone[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("key", ["agentview", "wrist", "state", "instruction"])
def test_every_input_reaches_every_action(policy, key):
    obs = make_obs(1)
    changed = obs | {"images": obs["images"].clone(), "state": obs["state"].clone()}
    if key == "instruction":
        changed["instruction"] = [SOUP.replace("soup", "basket")]
    elif key == "state":
        changed["state"][:, 2] += 0.1
    else:
        changed["images"][:, ["agentview", "wrist"].index(key), :, 20:50, 20:50] = 0
    assert ((policy(changed).loc - policy(obs).loc).abs().amax((0, 2)) > 1e-6).all()


# ---------------------------------------------------------------------------------------------------------------------
# Reading a checkpoint
# ---------------------------------------------------------------------------------------------------------------------
def full_size():
    with torch.device("meta"):
        policy = OpenVLAPolicy(PolicyConfig(), FULL_SIZE)
    shards, head, proprio = key_shapes(FULL)
    assert len(shards) == 982 and sum(np.prod(shape) for shape in shards.values()) == 7_541_237_184
    return policy, shards, {f"action_head.{key}": shape for key, shape in head.items()} | {
        f"proprio_projector.{key}": shape for key, shape in proprio.items()}


def test_every_key_of_a_full_checkpoint_has_its_place_and_every_parameter_its_key():
    policy, shards, small = full_size()
    names = assign_keys([*shards, *small], policy)
    assert len(names) == 938 + len(small)
    assert len([key for key in shards if is_unused(key, policy)]) == 44
    found = policy.state_dict()
    for key, ours in names.items():
        shape = (shards | small)[key]
        count = sum(found[name].numel() for name in ours)
        padded = found[ours[0]].shape[-1] if key.endswith("vision_backbone.featurizer.pos_embed") else 0  # the class token's
        assert count == np.prod(shape) + padded, key
    assert len({name for ours in names.values() for name in ours}) == sum(map(len, names.values())), "none is filled twice"


def test_missing_and_unknown_keys_are_named():
    policy, shards, small = full_size()
    keys = [key for key in [*shards, *small] if key != "language_model.model.layers.7.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"backbone\.layers\.7\.mlp\.up_proj\.weight"):
        assign_keys(keys, policy)
    with pytest.raises(UserError, match="vision_backbone.film.weight"):
        assign_keys([*shards, *small, "vision_backbone.film.weight"], policy)


def test_a_checkpoint_without_one_tensor_is_refused(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    path = folder / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    removed = next(key for key in sorted(weights) if key.startswith("projector."))
    save_file({key: value for key, value in weights.items() if key != removed}, path)
    with pytest.raises(UserError, match="projector"):
        make_policy(folder)


def test_bad_checkpoints_are_refused_in_one_line(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        make_policy(tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be had from the hub"):
        make_policy("moojink/openvla-7b-oft-finetuned-libero-object")
    with pytest.raises(UserError, match="none for 'libero_goal'.*--policy.statistics"):
        OpenVLAPolicy.from_checkpoint(PolicyConfig(backbone=str(checkpoint)), "libero_goal")
    with pytest.raises(UserError, match="chunk_size"):
        make_policy(checkpoint, chunk_size=4)
    breaks = {
        "tokenizer.json": lambda path: path.write_text("{}"),
        "config.json": lambda path: path.write_text('{"model_type": "llama"}'),
        "dataset_statistics.json": lambda path: path.write_text('{"libero_object_no_noops": {"action": {"q01": []}}}'),
        "model-00002-of-00002.safetensors": lambda path: path.unlink(),
        "model-00001-of-00002.safetensors": lambda path: path.write_bytes(path.read_bytes()[:5000]),
        "proprio_projector--150000_checkpoint.pt": lambda path: path.write_bytes(b"garbage"),
        "action_head--150000_checkpoint.pt": lambda path: shutil.copy(path, path.with_name("action_head--5_checkpoint.pt")),
    }
    for name, damage in breaks.items():
        folder = copy_of(checkpoint, tmp_path)
        damage(folder / name)
        with pytest.raises(UserError, match=name.split("--")[0].split(".")[0].split("-of")[0]):
            make_policy(folder)
        shutil.rmtree(folder)


def test_a_hub_id_is_downloaded_without_the_merged_adapter(checkpoint, policy, monkeypatch):
    asked = {}
    monkeypatch.setattr(runs, "snapshot_download", lambda name, **patterns: asked.update(patterns) or str(checkpoint))
    from_hub = make_policy("moojink/some-checkpoint")
    assert from_hub.config.backbone == "moojink/some-checkpoint" and not moved(from_hub, policy.state_dict())
    assert asked["ignore_patterns"] == ["lora_adapter/*"] and "*.json" in asked["allow_patterns"]


def test_a_checkpoint_that_carries_code_runs_none(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = copy_of(checkpoint, tmp_path)
    torch.save({"module.fc1.weight": Evil()}, folder / "proprio_projector--150000_checkpoint.pt")
    edit_json(folder / "config.json", auto_map={"AutoModel": "evil.Model"})
    with pytest.raises(UserError, match="proprio_projector"):
        make_policy(folder)
    assert not (tmp_path / "ran").exists()


def test_another_suites_statistics_can_be_chosen_and_variants_have_their_suites(checkpoint, policy):
    chosen = OpenVLAPolicy.from_checkpoint(PolicyConfig(backbone=str(checkpoint), statistics="libero_object_no_noops"), "libero_10")
    assert chosen.normalizer == policy.normalizer and chosen.config.statistics == policy.config.statistics
    assert openvla.read_statistics(checkpoint, "libero_object_swap")[0] == "libero_object_no_noops"


def test_too_little_memory_says_how_much_and_which_flag(checkpoint, monkeypatch):
    with pytest.raises(UserError, match=r"9000000.0 GB of memory are needed to dream, .* are free on cpu: lower --it"):
        check_memory(9e15, torch.device("cpu"), "to dream", "lower --it")
    monkeypatch.setattr(openvla, "size_of", lambda policy: 1e15)
    with pytest.raises(UserError, match="1000000.0 GB"):
        make_policy(checkpoint)


def test_memory_of_the_full_size_is_what_its_authors_report():
    need = {use: value / 1e9 for use, value in memory(FULL_SIZE, 8, 32).items()}
    assert 15.4 < need["inference"] < 17 and need["evaluate"] > 31 and 58 < need["lora"] < 66
    assert 20 < need["checkpointed"] < 25, "weights, LoRA, 32 inputs and one layer"
    assert need["scale"] - need["inference"] == pytest.approx(3 * 4 * 0.151118, abs=1e-3), "a gradient, two moments"


# ---------------------------------------------------------------------------------------------------------------------
# Actions
# ---------------------------------------------------------------------------------------------------------------------
def test_actions_come_back_and_the_gripper_is_turned_round(policy):
    actions = 0.2 * torch.rand(2, 8, 7) - 0.1
    actions[..., 6] = torch.where(actions[..., 6] > 0, 1.0, -1.0)
    normal = policy.normalizer.normalize_action(actions)
    assert torch.equal(normal[..., 6].round(decimals=5), (1 - actions[..., 6]) / 2), "1 is open, as in OFT's data"
    assert torch.allclose(policy.env_actions(normal), actions, atol=1e-6)
    statistics = GOLDEN["stats"]["libero_object_no_noops"]["action"]
    for value, key in ((-1.0, "q01"), (1.0, "q99")):
        assert np.allclose(policy.normalizer.unnormalize_action(torch.full((7,), value))[:6], statistics[key][:6], atol=1e-6)


@torch.no_grad()
def test_the_proprio_state_is_clipped_to_one(policy):
    obs = make_obs(1)
    far = [obs | {"state": obs["state"] + torch.tensor([[x] + [0.0] * 7])} for x in (5.0, 9.0)]
    assert torch.equal(policy(far[0]).loc, policy(far[1]).loc)
    seen = []
    policy.proprio_projector.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    policy(far[0])
    assert seen[0].max() == 1


# ---------------------------------------------------------------------------------------------------------------------
# Training, files
# ---------------------------------------------------------------------------------------------------------------------
def moved(policy, before):
    return {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}


def cloned(policy, tmp_path, steps=2):
    batch = make_batch(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    fit("clone", policy, lambda step, generator: batch, clone_loss, FitConfig(steps=steps, warmup=1, lr=1e-3), tmp_path, 0,
        torch.device("cpu"), lambda *_: None)
    return moved(policy, before)


def test_cloning_trains_the_scale_head_alone(policy, tmp_path):
    names = {name for name in policy.state_dict() if name.startswith("scale_head.")}
    assert cloned(policy, tmp_path) == names and not policy.config.augment
    first = clone_loss(policy, make_batch(policy), torch.Generator())[1]["nll"]
    optimizer = torch.optim.Adam(policy.scale_head.parameters(), 1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        loss, metrics = clone_loss(policy, make_batch(policy), torch.Generator())
        loss.backward()
        optimizer.step()
    assert metrics["nll"] < first - 0.1
    wide = make_batch(policy)
    right = policy.env_actions(policy(wide).loc)[..., 6] == policy.env_actions(wide["actions"])[..., 6]
    assert metrics["gripper_accuracy"] == pytest.approx(right.float().mean().item())


def test_fine_tuning_trains_lora_and_the_heads_alone(checkpoint, tmp_path):
    policy = make_policy(checkpoint, lora_rank=2)
    changed = cloned(policy, tmp_path, steps=3)
    assert all(name.startswith(("action_head.", "scale_head.")) or name.endswith((".a", ".b")) for name in changed)
    assert sum(name.endswith(".b") for name in changed) == 7 * 2 and policy.config.augment


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_updates_lora_and_the_heads_alone(checkpoint, dtype):
    policy = make_policy(checkpoint, dtype=dtype)
    add_lora(policy, 2)
    obs = make_obs()
    with torch.no_grad():
        distribution = policy(obs)
        action = distribution.sample(torch.Generator().manual_seed(0))
    played = Rollout(obs["images"][:, None].expand(-1, 2, -1, -1, -1, -1), obs["state"][:, None].expand(-1, 2, -1),
                     obs["instruction"], action[:, None], policy.env_actions(action)[:, None],
                     distribution.log_prob(action)[:, None], *torch.ones(2, 2, 1, dtype=torch.bool), torch.tensor([0.0, 1.0]),
                     torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    config = PPOConfig(temperature=1.0, chunk_noise=False, lr_backbone=1e-3, lr_heads=1e-4, warmup=1, epochs=2)
    optimizer = make_optimizer(policy, config)
    metrics = update(policy, optimizer, played, torch.tensor([-1.0, 1.0]), config, torch.Generator().manual_seed(0))
    assert metrics["ratio_first"] == 1 and metrics["log_prob_gap"] < 1e-4
    changed = moved(policy, before)
    assert all(name.startswith(("action_head.", "scale_head.")) or name.endswith((".a", ".b")) for name in changed)
    assert sum(name.endswith(".b") for name in changed) == 7 * 2
    assert {p.requires_grad for p in policy.dino.parameters()} == {False}


def test_gradient_checkpointing_keeps_less_and_learns_the_same(checkpoint):
    def gradients(**changes):
        policy, kept = make_policy(checkpoint, lora_rank=2, augment=False, **changes).eval(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            loss, _ = clone_loss(policy, make_batch(policy), torch.Generator())
        loss.backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, sum(kept)
    (plain, much), (recomputed, little) = gradients(), gradients(gradient_checkpointing=True)
    torch.testing.assert_close(recomputed, plain)
    assert any(name.endswith(".b") and grad.any() for name, grad in plain.items()) and little < much / 2


def shaken(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return policy


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])
def test_saved_policy_acts_bit_for_bit_and_leaves_out_what_is_frozen(checkpoint, tmp_path, rank):
    policy = make_policy(checkpoint, dtype="bfloat16")
    if rank:
        add_lora(policy, rank)
    shaken(policy).save_pretrained(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", torch.device("cpu"))
    before, after = policy(make_obs()), loaded(make_obs())
    assert torch.equal(before.loc, after.loc) and torch.equal(before.log_scale, after.log_scale)
    assert loaded.normalizer == policy.normalizer and loaded.config.image_size == policy.config.image_size
    kept = set(load_file(tmp_path / "policy" / "model.safetensors"))
    assert all(name.startswith(("action_head.", "scale_head.")) or name.endswith((".a", ".b")) for name in kept)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in policy.named_parameters() if p.requires_grad}
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        load_policy(tmp_path / "policy", torch.device("cpu"))


def test_either_kind_of_policy_is_loaded_by_its_config(tmp_path, policy):
    ours = Policy(PolicyConfig.tiny(), policy.normalizer)
    ours.save_pretrained(tmp_path / "ours")
    policy.save_pretrained(tmp_path / "theirs")
    assert isinstance(load_policy(tmp_path / "ours", torch.device("cpu")), Policy)
    assert isinstance(load_policy(tmp_path / "theirs", torch.device("cpu")), OpenVLAPolicy)


def test_a_killed_run_goes_on_without_a_copy_of_the_frozen_weights(checkpoint, tmp_path):
    policy = make_policy(checkpoint)
    add_lora(policy, 2)
    optimizer = make_optimizer(shaken(policy), PPOConfig())
    save_resume(tmp_path, 3, policy, optimizer)
    assert (tmp_path / "resume.safetensors").stat().st_size < size_of(policy) / 10
    resumed = make_policy(checkpoint)
    add_lora(resumed, 2)
    assert load_resume(tmp_path, resumed, make_optimizer(resumed, PPOConfig())) == 3
    assert not moved(resumed, policy.state_dict())
    other = make_policy(checkpoint)
    with pytest.raises(UserError, match="another configuration"):
        load_resume(tmp_path, other, make_optimizer(other, PPOConfig()))


def test_lora_in_bfloat16_keeps_steps_that_rounding_would_lose():
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    lora, x = LoRA(layer, 2), torch.ones(1, 64, dtype=torch.bfloat16)
    before = layer.weight.clone()
    with torch.no_grad():
        lora.b += 1e-6
    assert torch.equal(layer.weight, before) and (lora.b @ lora.a).abs().sum() > 0
    assert lora(x).dtype == torch.bfloat16
