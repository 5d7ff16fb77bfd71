"""Promises of world_model.py."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

sys.path.insert(0, str(Path(__file__).parents[1]))
import runs
from episodes import Normalizer, StartContext, finger_history
from geometry import Camera, Cameras
from reflector import StopRule
from runs import UserError
from world_model import (VirtualEnv, VirtualEnvConfig, WorldModel, WorldModelConfig, draw_sigmas, euler,
                         grasp_loss, noise_levels, normal, preconditioning, world_model_loss)

torch.set_num_threads(1)
AGENTVIEW = Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]])
WRIST = Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
CAMERAS = Cameras(AGENTVIEW, WRIST, plane_z=0.0)
NORMALIZER = Normalizer([-1.0] * 7, [1.0] * 7, [-0.3, -0.3, 0.0, -3.5, -3.5, -3.5, 0.0, -0.04],
                        [0.3, 0.3, 0.5, 3.5, 3.5, 3.5, 0.04, 0.0])
TINY = WorldModelConfig(image_size=16, channels=(16, 32), chunk_size=4, state_width=32, grasp_channels=8)
START = torch.tensor([0.0, 0, 0.3, math.pi, 0, 0, 0.03, -0.03])


def make_model(config=TINY, seed=0, cameras=CAMERAS):
    """Random weights everywhere, so that pictures depend on every input."""
    torch.manual_seed(seed)
    model = WorldModel(config, cameras, NORMALIZER).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    torch.nn.init.normal_(model.pose_predictor.correction[-1].weight, std=0.1)
    return model


def make_contexts(B, seed=0, seen=1):
    random = np.random.default_rng(seed)
    return [StartContext(random.integers(0, 256, (seen, 2, 3, 16, 16), dtype=np.uint8), START.expand(seen, 8).numpy(),
                         f"task {b}", np.zeros((4, 7), np.float32), 0) for b in range(B)]


def make_actions(B, T, seed=1):
    return torch.rand(T, B, 4, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class NeverDone:
    def score(self, first, previous, current, instruction, fingers):
        return torch.full((len(instruction),), 0.25)


def play(env, contexts, actions, seed=None):
    """-> images (T + 1, B, V, 3, H, W)."""
    if seed is not None:
        env.reset_noise(seed)
    frames = [env.reset(contexts)[0]["images"]]
    return torch.stack(frames + [env.step(chunk)[0]["images"] for chunk in actions])


# ---- diffusion

@pytest.mark.parametrize("sigma", [0.01, 0.2, 1.0, 5.0, 80.0])
def test_input_and_target_have_unit_variance_at_every_noise_level(sigma):
    generator, sigma = torch.Generator().manual_seed(0), torch.tensor(sigma)
    clean, noise = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(2))
    c_in, c_skip, c_out, c_noise = preconditioning(sigma)
    noisy = clean + sigma * noise
    assert abs((c_in * noisy).var() - 1) < 0.02
    assert abs(((clean - c_skip * noisy) / c_out).var() - 1) < 0.02
    assert c_noise == sigma.log() / 4


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_oracle_denoiser_is_sampled_exactly(steps):
    clean, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sample = euler(lambda x, sigma: clean, noise, noise_levels(TINY, steps))
    assert torch.allclose(sample, clean, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_sampler_equals_diffusers(steps):
    config = replace(TINY, sigma_min=0.05, sigma_max=20.0)
    scheduler = EDMEulerScheduler(config.sigma_min, config.sigma_max, sigma_data=1.0, rho=config.rho)
    scheduler.set_timesteps(steps)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 3
    network = lambda x, c_noise: torch.tanh(x @ weight + c_noise)
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x, sigma):
        c_in, c_skip, c_out, c_noise = preconditioning(sigma)
        return c_skip * x + c_out * network(c_in * x, c_noise)

    expected = noise * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(expected, t), t)
        expected = scheduler.step(output, t, expected).prev_sample
    assert torch.allclose(euler(denoise, noise, noise_levels(config, steps)), expected, atol=1e-4)


def test_training_noise_levels_are_the_log_normal():
    draws = draw_sigmas(TINY, 4096, torch.Generator().manual_seed(0), torch.device("cpu")).log()
    assert abs(draws.mean() - TINY.sigma_mean) < 0.01 and abs(draws.std() - TINY.sigma_std) < 0.01


# ---- learning

def toy_batch(B, seed=0, size=16):
    """A white square in both views that the first action dimension moves by up to 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(5, size - 6, (B,), generator=generator)
    shift = torch.randint(-4, 5, (B,), generator=generator)

    def draw(column):
        distance = (torch.arange(size)[None] - column[:, None]).abs()  # (B, W)
        image = (distance < 2).float()[:, None, None, None] * 255
        return image.expand(B, 2, 3, size, size).to(torch.uint8)

    actions = torch.zeros(B, 4, 7)
    actions[:, :, 0] = shift[:, None] / 4
    state, moved = START.repeat(B, 1), torch.zeros(B, 8)
    moved[:, 0] = 0.05 * shift / 4
    frame = draw(place)
    none = torch.zeros_like(actions)
    return {"memory": frame[:, None].expand(-1, 4, *frame.shape[1:]), "target": draw(place + shift), "actions": actions,
            "memory_states": state[:, None].expand(B, 4, 8), "next_state": state + moved, "previous_actions": none,
            "task": torch.zeros(B, dtype=torch.long), "transitions": [value[:, None] for value in (state, none, actions, state + moved)]}


def test_overfits_one_batch_and_then_a_shuffled_action_makes_it_worse():
    torch.manual_seed(0)
    config = replace(TINY, attention=False, residual_std=(0.7, 0.7), sigma_mean=1.5, memory_noise=0.0)
    model, batch = WorldModel(config, CAMERAS, NORMALIZER), toy_batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        loss, metrics = world_model_loss(model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def mse(order):
        noise = normal((8, 6, 16, 16), torch.Generator().manual_seed(0), torch.device("cpu"))
        images = model.sample(batch["memory"], batch["memory_states"], batch["next_state"][order], batch["actions"][order], noise,
                              batch["task"])
        return ((images.float() - target) / 255).square().mean()

    target = batch["target"].float()
    unchanged = ((batch["memory"][:, 0] - target) / 255).square().mean()
    straight, shuffled = mse(torch.arange(8)), mse(torch.arange(8).roll(1))
    assert straight < 0.2 * unchanged and shuffled > 3 * straight
    assert metrics["state_mm"] < 5 and all(math.isfinite(value) for value in metrics.values())


def test_the_loss_depends_on_its_generator_alone():
    model, batch = make_model(), toy_batch(4)
    first, _ = world_model_loss(model, batch, torch.Generator().manual_seed(3))
    torch.rand(1)
    again, _ = world_model_loss(model, batch, torch.Generator().manual_seed(3))
    other, _ = world_model_loss(model, batch, torch.Generator().manual_seed(4))
    assert first == again and first != other


def test_bfloat16_is_for_the_unet_alone(monkeypatch, tmp_path):
    """In bfloat16 a camera's rays end a pixel beside their place: training would not see what imagination sees."""
    model, batch, types = make_model(), toy_batch(2), {}
    monkeypatch.setattr(runs, "AUTOCAST", {"cpu"})
    model.unet.conv_in.register_forward_hook(lambda *call: types.update(unet=call[-1].dtype))
    model.embed.register_forward_hook(lambda *call: types.update(embedding=call[-1].dtype))

    def loss(*arguments):
        types["product"] = (batch["next_state"] @ torch.eye(8)).dtype
        return world_model_loss(*arguments)
    runs.fit("toy", model, lambda step, generator: batch, loss, runs.FitConfig(steps=1), tmp_path, 0, torch.device("cpu"),
             lambda step, metrics: None)
    assert types == {"unet": torch.bfloat16, "embedding": torch.float32, "product": torch.float32}


def test_the_opening_is_seen_and_learned_apart_from_the_pictures():
    model, batch = make_model(), toy_batch(4)
    batch |= {"images": batch["memory"][:, -1], "state": batch["memory_states"][:, -1]}
    loss, metrics = grasp_loss(model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    learned = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None
               and parameter.grad.abs().sum() > 0}
    assert "grasp_predictor" in learned and "unet" not in learned and 0 <= metrics["accuracy"] <= 1
    state, actions = START.expand(2, 8), torch.zeros(2, 4, 7)
    images = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pose, logits = model.grasp_logits(images, state, actions, actions, torch.zeros(2, dtype=torch.long))
    assert not (logits[0] - logits[1]).abs().amax(dim=1).min() < 1e-4, "what the fingers close on, and what lifts, is seen"
    assert torch.equal(pose, model.predict_pose(state, actions, actions))


def test_where_no_wrist_picture_has_looked_the_base_shows_the_first_agent_view():
    memory, there = -torch.ones(1, 4, 2, 3, 16, 16), START + 0.15 * torch.eye(8)[1]
    memory[:, 0, 0] = 1  # it alone is bright
    states, task = START.expand(1, 4, 8), torch.zeros(1, dtype=torch.long)
    beside, same = (make_model().condition(memory, states, state[None], task)[0][0, 3:, :12] for state in (there, START))
    assert 0.1 < (beside > 0.9).float().mean() < 0.9 and (same < -0.9).all(), "what the wrist has seen, it has seen better"
    without = make_model(replace(TINY, plane_view=False)).condition(memory, states, there[None], task)[0]
    assert (without < -0.9).all()


@pytest.mark.parametrize("change, expected", [(3, 0), (-3, 0), (50, 46), (-50, -46)])
def test_what_hardly_changes_stays_as_it_was(change, expected):
    model, memory = make_model(), torch.full((1, 4, 2, 3, 16, 16), 128, dtype=torch.uint8)
    model.denoise = lambda x, *_: change / 127.5 / model.residual_std.expand_as(x)
    states = START.expand(1, 4, 8)
    actions, noise, task = torch.zeros(1, 4, 7), torch.zeros(1, 6, 16, 16), torch.zeros(1, dtype=torch.long)
    images = model.sample(memory, states, START[None], actions, noise, task)
    assert (images[:, 0].int() - 128 == expected).all(), "the agent view's base is its last frame"


# ---- the environment

def test_an_action_changes_the_next_frame_and_none_before():
    actions, model = make_actions(2, 5), make_model()
    changed = actions.clone()
    changed[3] = -changed[3]
    one, two = (VirtualEnv(model, NeverDone(), VirtualEnvConfig(horizon=8), 2) for _ in range(2))
    play(one, make_contexts(2), actions)
    play(two, make_contexts(2), changed)
    for history, other in ((one.frames, two.frames), (one.states, two.states)):
        assert torch.equal(history[:, :4], other[:, :4]) and not torch.equal(history[:, 4], other[:, 4])


def test_same_seed_same_rollout_and_another_at_the_next_reset():
    contexts, actions, model = make_contexts(2), make_actions(2, 3), make_model()
    env, twin, other = (VirtualEnv(model, NeverDone(), VirtualEnvConfig(seed=seed), 2) for seed in (7, 7, 8))
    first = play(env, contexts, actions)
    assert torch.equal(first, play(twin, contexts, actions))
    assert not torch.equal(first, play(other, contexts, actions))
    assert not torch.equal(first, play(env, contexts, actions))
    assert torch.equal(first, play(env, contexts, actions, seed=0))  # reset_noise(0) is how an env begins


def test_groups_share_their_noise():
    contexts, actions = [make_contexts(1)[0]] * 4, make_actions(1, 3).expand(3, 4, 4, 7)
    config = VirtualEnvConfig()
    frames = play(VirtualEnv(make_model(), NeverDone(), config, 4, group_size=2), contexts, actions)[-1]
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[2], frames[3])
    assert not torch.equal(frames[0], frames[2])
    config = replace(config, shared_noise=False)
    frames = play(VirtualEnv(make_model(), NeverDone(), config, 4, group_size=2), contexts, actions)[-1]
    assert not torch.equal(frames[0], frames[1])


def test_a_start_tells_how_lucky_the_fingers_are_in_all_of_its_rollout():
    model, seen, contexts = make_model(), [], make_contexts(3)
    inner = model.predict_state
    model.predict_state = lambda *given: (seen.append(given[4].tolist()), inner(*given))[1]
    play(VirtualEnv(model, None, VirtualEnvConfig(), 3), [contexts[0], replace(contexts[1], luck=0.25), contexts[2]], make_actions(3, 2))
    assert seen == [[0.5, 0.25, 0.5]] * 2


def test_resetting_one_slot_leaves_the_others_bit_equal():
    env = VirtualEnv(make_model(), NeverDone(), VirtualEnvConfig(), 3)
    play(env, make_contexts(3), make_actions(3, 2))
    before, frames, states = env.observe(), env.frames.clone(), env.states.clone()
    mask, fresh = torch.tensor([False, True, False]), make_contexts(3, seed=9)
    after, _ = env.reset([None, fresh[1], None], mask)
    for b in (0, 2):
        assert torch.equal(after["images"][b], before["images"][b])
        assert torch.equal(after["state"][b], before["state"][b])
        assert torch.equal(env.frames[b], frames[b]) and torch.equal(env.states[b], states[b])
        assert env.time[b] == 2 and after["instruction"][b] == before["instruction"][b]
    assert torch.equal(after["images"][1], torch.from_numpy(fresh[1].images[-1])) and env.time[1] == 0


def test_the_reflector_ends_episodes_and_pays_only_at_the_end():
    class Script:
        """Scores rise with time: 0.2 more each chunk; task 1 is never done."""
        calls = 0

        def score(self, first, previous, current, instruction, fingers):
            self.calls += 1
            self.batch, self.fingers = len(instruction), fingers
            return torch.tensor([0.2 * self.calls if name == "task 0" else 0.1 for name in instruction])

    script = Script()
    env = VirtualEnv(make_model(), script, VirtualEnvConfig(horizon=4, stop=StopRule(confirm=1)), 2)
    env.reset(make_contexts(2))
    history = [env.step(chunk) for chunk in make_actions(2, 6)]
    rewards, terminated, truncated = (torch.stack([h[i] for h in history]) for i in (1, 2, 3))
    scores = torch.stack([h[4]["score"] for h in history])
    assert torch.allclose(rewards, torch.tensor([[0, 0], [0, 0], [0.6, 0], [0, 0.1], [0, 0], [0, 0]]))
    assert terminated.nonzero().tolist() == [[2, 0]] and truncated.nonzero().tolist() == [[3, 1]]
    assert script.calls == 4 and script.batch == 1  # what has ended is not computed any more
    assert torch.equal(script.fingers, finger_history(env.states)[1:, 4])
    assert torch.equal(scores.isnan(), torch.tensor([[0, 0]] * 3 + [[1, 0]] + [[1, 1]] * 2).bool())
    assert torch.equal(history[2][0]["images"][0], history[5][0]["images"][0])


def test_a_stop_is_confirmed_by_the_next_frame_and_a_reset_forgets_the_last():
    class Script:
        scores = iter([0.9, 0.2, 0.8, 0.7, 0.6, 0.6])

        def score(self, first, previous, current, instruction, fingers):
            return torch.tensor([next(self.scores)])

    env = VirtualEnv(make_model(), Script(), VirtualEnvConfig(horizon=9, stop=StopRule(confirm=2)), 1)
    env.reset(make_contexts(1))
    ends = [env.step(chunk)[1:3] for chunk in make_actions(1, 4)]
    assert [bool(terminated) for _, terminated in ends] == [False, False, False, True]
    assert [float(reward) for reward, _ in ends] == pytest.approx([0, 0, 0, 0.7])
    env.reset(make_contexts(1))
    assert [bool(env.step(chunk)[2]) for chunk in make_actions(1, 2)] == [False, True]


def test_memory_is_first_third_two_thirds_and_last():
    class Spy(WorldModel):
        def sample(self, memory, memory_states, next_state, actions, noise, task):
            self.seen = memory[:, :, 0, 0, 0, 0].tolist()
            return memory[:, -1] + 1  # frame t is filled with t

    model = Spy(TINY, CAMERAS, NORMALIZER)
    env = VirtualEnv(model, None, VirtualEnvConfig(horizon=12), 2)
    contexts = make_contexts(2)
    for context in contexts:
        context.images[:] = 0
    env.reset(contexts)
    for chunk in make_actions(2, 10):
        obs, reward, terminated, truncated, info = env.step(chunk)
    assert model.seen == [[0, 3, 6, 9]] * 2
    assert info["score"].isnan().all() and not (terminated | truncated).any()


def test_a_rollout_remembers_what_was_seen_before_its_start_and_is_as_long_as_any_other():
    class Listener(NeverDone):
        def score(self, first, previous, current, instruction, fingers):
            self.first, self.fingers = first, fingers
            return super().score(first, previous, current, instruction, fingers)

    model, contexts, listener = make_model(), [*make_contexts(1), *make_contexts(1, seed=2, seen=6)], Listener()
    contexts[1].states = contexts[1].states + 0.001 * np.arange(6, dtype=np.float32)[:, None]
    env = VirtualEnv(model, listener, VirtualEnvConfig(horizon=3), 2)
    first, _ = env.reset(contexts)
    assert torch.equal(first["images"][1], torch.from_numpy(contexts[1].images[-1])) and env.time.tolist() == [0, 5]
    ends = [env.step(chunk)[3].tolist() for chunk in make_actions(2, 3)]
    assert ends == [[False, False], [False, False], [True, True]]
    assert torch.equal(listener.first[1], torch.from_numpy(contexts[1].images[0]))
    assert torch.equal(listener.fingers[1, 3:], finger_history(torch.from_numpy(contexts[1].states))[-1, :5])
    assert torch.equal(env.frames[1, :6], torch.from_numpy(contexts[1].images))
    short = replace(contexts[1], images=contexts[1].images[-1:], states=contexts[1].states[-1:])
    with_past, without = (play(VirtualEnv(model, None, VirtualEnvConfig(), 1), [start], make_actions(1, 1))[1]
                          for start in (contexts[1], short))
    assert not torch.equal(with_past, without)


def test_each_slot_is_imagined_in_its_tasks_scene():
    raised = Cameras(AGENTVIEW, CAMERAS.wrist, plane_z=0.1)
    actions, contexts = make_actions(2, 2), [replace(make_contexts(2)[0], task_id=task) for task in (1, 0)]
    mixed, low, high = (play(VirtualEnv(make_model(cameras=cameras), None, VirtualEnvConfig(), 2, group_size=2), contexts, actions)
                        for cameras in (Cameras.of_tasks([CAMERAS, raised]), CAMERAS, raised))
    assert torch.equal(mixed[:, 0], high[:, 0]) and torch.equal(mixed[:, 1], low[:, 1])
    assert not torch.equal(mixed[:, 0], low[:, 0])


def test_save_and_load_give_bit_equal_pictures(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path).eval()
    assert again.cameras == CAMERAS
    contexts, actions = make_contexts(2), make_actions(2, 2)
    one, two = (play(VirtualEnv(m, None, VirtualEnvConfig(), 2), contexts, actions) for m in (model, again))
    assert torch.equal(one, two)
    (tmp_path / "config.json").write_text('{"world_model": {"colour": 1}}')
    with pytest.raises(UserError):
        WorldModel.from_pretrained(tmp_path)
