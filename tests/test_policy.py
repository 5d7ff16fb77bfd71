"""Promises of policy.py. Each was seen to fail once, with the line it guards broken."""
import math
import re
from dataclasses import replace

import pytest
import torch

import policy as policy_module
from episodes import Normalizer
from policy import ActionDistribution, Policy, PolicyConfig, augment, clone_loss, tokenize
from runs import UserError

NORMALIZER = Normalizer([-0.8] * 6 + [-1.0], [0.4] * 6 + [1.0], [-0.5] * 8, [0.5] * 8)
SHORT, LONG = "close the drawer", "put the black bowl in the bottom drawer of the cabinet and close it"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_policy(**changes):
    torch.manual_seed(0)
    return Policy(replace(PolicyConfig.tiny(), **changes), NORMALIZER).eval()


def make_obs(B=3, image_size=64, instruction=SHORT):
    images = torch.randint(256, (B, 2, 3, image_size, image_size), dtype=torch.uint8, generator=generator())
    state = torch.rand(B, 8, generator=generator()) - 0.5
    return {"images": images, "state": state, "instruction": [instruction] * B}


def make_batch(B=3):
    actions = 2 * torch.rand(B, 8, 7, generator=generator(1)) - 1
    return make_obs(B) | {"actions": actions, "valid": torch.ones(B, 8, dtype=torch.bool)}


def laplace(*shape, dtype=torch.float64):
    loc = torch.randn(*shape, generator=generator(2), dtype=dtype)
    return ActionDistribution(loc, 2 * torch.rand(*shape, generator=generator(3), dtype=dtype) - 3)


# ------------------------------------------------------------------------------------------ distribution
def test_log_prob_has_the_right_gradient():
    given, actions = laplace(2, 3, 4), torch.randn(2, 3, 4, generator=generator(4), dtype=torch.float64)
    inputs = [given.loc.requires_grad_(), given.log_scale.requires_grad_(), actions.requires_grad_()]
    assert torch.autograd.gradcheck(lambda loc, log_b, a: ActionDistribution(loc, log_b).log_prob(a), inputs)


@pytest.mark.parametrize("temperature, by_chunk", [(1.0, False), (0.3, False), (0.3, True)])
def test_sampler_and_scorer_are_one_distribution(temperature, by_chunk):
    """Neither half is enough: each misses a fault that the other sees."""
    L = 3 if by_chunk else 1
    given = laplace(1, L, 5)
    loc = given.loc.expand(200_000, L, 5).clone().requires_grad_()
    log_scale = given.log_scale.expand(200_000, L, 5).clone().requires_grad_()
    distribution = ActionDistribution(loc, log_scale, by_chunk).tempered(temperature)
    log_prob = distribution.log_prob(distribution.sample(generator(5)))
    log_b = given.log_scale.mean(1)[..., :-1] + math.log(temperature)  # the gripper is not drawn
    closed_form = (1 + math.log(2) + log_b).sum()
    assert torch.allclose(distribution.entropy(), closed_form)
    assert log_prob.shape == (200_000, L) and abs(-log_prob.mean() - closed_form) < 0.02
    log_prob[:, 0].sum().backward()
    assert (loc.grad.mean(0)[..., :-1] * log_b.exp()).abs().max() < 0.01
    assert log_scale.grad.mean(0).abs().max() < 0.01


def test_by_chunk_all_steps_move_alike():
    given = ActionDistribution(*torch.randn(2, 2, 3, 4, generator=generator(1)), by_chunk=True)
    error = given.sample(generator(2)) - given.loc
    assert torch.allclose(error, error[:, :1].expand_as(error), atol=1e-6) and error[..., :-1].abs().min() > 0
    assert torch.allclose(given.tempered(2.0).sample(generator(2)) - given.loc, 2 * error, atol=1e-5)


def test_log_prob_is_torchs_laplace_and_sums_over_the_motions_dimensions():
    given, actions = laplace(2, 3, 7), torch.randn(2, 3, 7, generator=generator(4), dtype=torch.float64)
    expected = torch.distributions.Laplace(given.loc, given.log_scale.exp()).log_prob(actions)[..., :6].sum(-1)
    assert torch.allclose(given.log_prob(actions), expected) and given.log_prob(actions).shape == (2, 3)


def test_the_gripper_follows_its_mean_and_is_not_scored():
    given = laplace(2, 3, 7)
    moved = given.sample(generator()) != given.loc
    assert moved[..., :6].all() and not moved[..., 6].any()
    loc = given.loc.clone().requires_grad_()
    ActionDistribution(loc, given.log_scale).log_prob(given.loc + 1).sum().backward()
    assert loc.grad[..., :6].all() and not loc.grad[..., 6].any()


def test_distribution_is_float32_under_autocast():
    policy, obs = make_policy(), make_obs()
    actions = torch.zeros(3, 8, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = policy.features(policy_module.to_float(obs["images"]), obs["state"], obs["instruction"])
        distribution = policy.heads(rough, rough)
        log_prob = distribution.log_prob(actions)
    exact = policy.heads(rough.float(), rough.float())
    assert distribution.loc.dtype == distribution.log_scale.dtype == log_prob.dtype == torch.float32
    assert torch.equal(distribution.loc, exact.loc) and torch.equal(log_prob, exact.log_prob(actions))


# ------------------------------------------------------------------------------------------ instruction
def test_libero_words_do_not_collide():
    benchmark = pytest.importorskip("libero.libero.benchmark").get_benchmark_dict()
    suites = [benchmark[name]() for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10")]
    instructions = {suite.get_task(i).language for suite in suites for i in range(suite.n_tasks)}
    words = sorted({word for instruction in instructions for word in instruction.lower().split()})
    ids, _ = tokenize(words, PolicyConfig.vocab_size)
    assert len(words) > 50 and len(set(ids[:, 0].tolist())) == len(words)


def test_tokens_ignore_case_and_keep_order():
    ids, is_word = tokenize(["Close the Drawer", "drawer the close", LONG], 4096)
    assert torch.equal(ids[:1, :3], tokenize([SHORT], 4096)[0])
    assert torch.equal(ids[0, :3], ids[1, :3].flip(0))
    assert is_word.sum(1).tolist() == [3, 3, len(LONG.split())] and (ids[:2, 3:] == 0).all()


@torch.no_grad()
def test_longer_batch_mate_changes_nothing():
    policy, obs = make_policy(), make_obs(2)
    alone = policy(obs).loc
    together = policy(obs | {"instruction": [SHORT, LONG]}).loc
    assert torch.allclose(alone[0], together[0], atol=1e-5)
    assert (alone[1] - together[1]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------ network
@torch.no_grad()
def test_attention_is_bidirectional():
    """The last action token reaches the first action; a causal mask would block it."""
    policy, obs = make_policy(), make_obs()
    before = policy(obs).loc
    policy.action_tokens[-1] += torch.randn(policy.config.width, generator=generator())
    assert (policy(obs).loc[:, 0] - before[:, 0]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("key", ["agentview", "wrist", "state", "instruction"])
def test_every_input_reaches_every_action(key):
    policy, obs = make_policy(), make_obs()
    changed = obs | {"images": obs["images"].clone(), "state": obs["state"].clone()}
    if key == "instruction":
        changed["instruction"] = ["open the cabinet"] * 3  # as many words: it is the words that must be read
    elif key == "state":
        changed["state"][:, 2] += 0.1
    else:
        changed["images"][:, ["agentview", "wrist"].index(key), :, 40:50, 40:50] = 0
    assert ((policy(changed).loc - policy(obs).loc).abs().amax((0, 2)) > 1e-5).all()


def test_stem_learns_to_look_for_what_is_named():
    """At first a sentence changes nothing that the stem sees; after one step of cloning it does."""
    policy, batch, images = make_policy(), make_batch(2), torch.rand(1, 3, 64, 64)
    batch["instruction"] = ["pick up the milk", "open the cabinet"]

    def difference():
        words = policy.backbone.embed_tokens(tokenize(batch["instruction"], policy.config.vocab_size)[0]).sum(1)
        milk, cabinet = (policy.stem(images, sentence[None]) for sentence in words)
        return (milk - cabinet).abs().max().item()

    assert difference() == 0 and torch.equal(policy.stem(images), policy.stem(images, torch.zeros(1, policy.config.width)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    clone_loss(policy, batch, generator())[0].backward()
    optimizer.step()
    assert difference() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("image_size", [64, 128])
def test_shapes_and_range(image_size):
    policy = make_policy(image_size=image_size, log_scale_init=-9.0)
    distribution = policy(make_obs(2, image_size))
    sample = distribution.sample(generator())
    assert distribution.loc.shape == distribution.log_scale.shape == sample.shape == (2, 8, 7)
    assert distribution.entropy().shape == distribution.log_prob(sample).shape == (2, 8)
    assert (distribution.log_scale == policy.config.log_scale_min).all()
    assert torch.equal(sample, distribution.sample(generator()))
    assert not torch.equal(sample, distribution.sample(generator(1)))


def test_wrong_image_size_is_a_clear_error():
    with pytest.raises(UserError, match="power of two"):
        make_policy(image_size=96)


def test_normalised_chunk_comes_back_in_environment_units():
    policy = make_policy()
    actions = 0.8 * torch.rand(2, 8, 7, generator=generator()) - 0.6
    actions[..., -1] = torch.where(actions[..., -1] > -0.2, 1.0, -1.0)
    assert torch.allclose(policy.env_actions(NORMALIZER.normalize_action(actions)), actions, atol=1e-6)
    assert (policy.env_actions(torch.full((1, 8, 7), -9.0)) == -1).all()
    gripper = policy.env_actions(torch.randn(4, 8, 7, generator=generator()))[..., -1]
    assert set(gripper.unique().tolist()) == {-1, 1}


# ------------------------------------------------------------------------------------------ files, optimiser
@torch.no_grad()
def test_saved_policy_acts_bit_for_bit(tmp_path):
    policy, obs = make_policy(log_scale_min=-4.0), make_obs()
    policy.save_pretrained(tmp_path / "policy")
    loaded = Policy.from_pretrained(tmp_path / "policy")
    before, after = policy(obs), loaded(obs)
    assert torch.equal(before.loc, after.loc) and torch.equal(before.log_scale, after.log_scale)
    assert loaded.config == policy.config and loaded.normalizer == policy.normalizer


def test_folder_of_another_model_is_a_clear_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "reflector"}')
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds a reflector")):
        Policy.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------ cloning
def gradients(policy, batch):
    policy.zero_grad()
    loss, _ = clone_loss(policy, batch, generator())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in policy.parameters()]


def test_padded_step_changes_nothing():
    policy, batch = make_policy(augment=False), make_batch()
    batch["valid"][0, 5:] = False
    loss, grads = gradients(policy, batch)
    with torch.no_grad():
        error = (policy(batch).loc - batch["actions"]).abs()[batch["valid"]].mean()
    assert torch.allclose(clone_loss(policy, batch, None)[1]["l1"], error)
    garbage = batch["actions"].clone()
    garbage[0, 5:] = math.nan
    other_loss, other_grads = gradients(policy, batch | {"actions": garbage})
    assert torch.equal(loss, other_loss) and all(map(torch.equal, grads, other_grads))
    last_valid = batch["actions"].clone()
    last_valid[0, 4] += 1
    assert not torch.equal(loss, gradients(policy, batch | {"actions": last_valid})[0])


def test_scale_head_cannot_hurt_the_mean(monkeypatch):
    """Without the scale's term, everything but the scale head gets the very same gradient."""
    policy, batch = make_policy(), make_batch()
    names = [name for name, _ in policy.named_parameters()]
    with_scale = dict(zip(names, gradients(policy, batch)[1]))
    monkeypatch.setattr(ActionDistribution, "log_prob", lambda self, actions: 0 * self.log_scale.sum(-1))
    without = dict(zip(names, gradients(policy, batch)[1]))
    assert all(torch.equal(with_scale[name], without[name]) for name in names if "scale_head" not in name)
    assert with_scale["scale_head.linear_out.weight"].abs().max() > 0


def test_augmentation_shifts_views_apart_and_follows_the_generator():
    config, images = PolicyConfig(jitter=0.0), make_obs(8)["images"]
    shifted = augment(images, config, generator())
    assert torch.equal(shifted, augment(images, config, generator()))
    assert not torch.equal(shifted, augment(images, config, generator(1)))
    whole = policy_module.to_float(images)

    def move(b, v):
        inside = shifted[b, v, :, 10:50, 10:50]
        return next((y, x) for y in range(-3, 4) for x in range(-3, 4)
                    if torch.allclose(inside, whole[b, v, :, 10 + y:50 + y, 10 + x:50 + x], atol=1e-5))

    moves = [(move(b, 0), move(b, 1)) for b in range(8)]
    assert len(set(sum(moves, ()))) > 5 and any(agentview != wrist for agentview, wrist in moves)
    jittered = augment(images, replace(config, max_shift=0.0, jitter=0.2), generator())
    assert jittered.abs().max() <= 1 and 0.01 < (jittered - whole).abs().mean() < 0.3


def test_overfits_one_batch_and_obeys_the_instruction():
    """Two samples that differ in the instruction alone."""
    policy, batch = make_policy(augment=False, chunk_size=2), make_batch(2)
    batch["images"][1], batch["state"][1] = batch["images"][0], batch["state"][0]
    batch["instruction"] = ["pick up the milk", "pick up the bbq sauce"]
    batch["actions"], batch["valid"] = batch["actions"][:, :2], batch["valid"][:, :2]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    for _ in range(120):
        loss, metrics = clone_loss(policy, batch, generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["l1"] < 0.1 and metrics["nll"] < -0.5
    with torch.no_grad():
        actions = policy(batch).mode
    assert (actions[0] - actions[1]).abs().mean() > 0.3
