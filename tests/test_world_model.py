"""Promises of world_model.py."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler

sys.path.insert(0, str(Path(__file__).parents[1]))
import runs
from episodes import GRIP, MEMORY, Normalizer
from geometry import Camera, Cameras
from kinematics import state_features
from runs import UserError
from world_model import (Library, WorldModel, WorldModelConfig, draw_sigmas, euler, grasp_loss, noise_levels, normal,
                         preconditioning, world_model_loss)

torch.set_num_threads(1)
AGENTVIEW = Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]])
WRIST = Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
CAMERAS = Cameras(AGENTVIEW, WRIST, plane_z=0.0)
NORMALIZER = Normalizer([-1.0] * 7, [1.0] * 7, [-0.3, -0.3, 0.0, -3.5, -3.5, -3.5, 0.0, -0.04],
                        [0.3, 0.3, 0.5, 3.5, 3.5, 3.5, 0.04, 0.0])
TINY = WorldModelConfig(image_size=16, channels=(16, 32), chunk_size=4, state_width=32, grasp_channels=8, neighbours=0)
START = torch.tensor([0.0, 0, 0.3, math.pi, 0, 0, 0.03, -0.03])


def make_model(config=TINY, seed=0, cameras=CAMERAS):
    """Random weights everywhere, so that pictures depend on every input."""
    torch.manual_seed(seed)
    model = WorldModel(config, cameras, NORMALIZER).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    torch.nn.init.normal_(model.pose_predictor.correction[-1].weight, std=0.1)
    return model


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
    return {"memory": frame[:, None].expand(-1, MEMORY, *frame.shape[1:]), "target": draw(place + shift), "actions": actions,
            "memory_states": state[:, None].expand(B, MEMORY, 8), "next_state": state + moved, "previous_actions": none,
            "task": torch.zeros(B, dtype=torch.long), "scene": torch.arange(B), "transitions": [value[:, None] for value in (state, none, actions, state + moved)]}


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
                              batch["task"], batch["scene"])
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
             lambda *_: None)
    assert types == {"unet": torch.bfloat16, "embedding": torch.float32, "product": torch.float32}


def test_the_opening_is_seen_and_learned_apart_from_the_pictures():
    model, batch = make_model(), toy_batch(4)
    batch |= {"images": batch["memory"][:, -2:], "states": batch["memory_states"][:, -2:]}
    loss, metrics = grasp_loss(model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    learned = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None
               and parameter.grad.abs().sum() > 0}
    assert "grasp_predictor" in learned and "unet" not in learned and 0 <= metrics["accuracy"] <= 1
    state, actions = START.expand(2, 8), torch.zeros(2, 4, 7)
    images = torch.rand(2, 2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    states = state[:, None].expand(2, 2, 8)
    pose, logits, _ = model.grasp_logits(images, states, actions, actions, torch.zeros(2, dtype=torch.long))
    assert not (logits[0] - logits[1]).abs().amax(dim=1).min() < 1e-4, "what the fingers close on, and what lifts, is seen"
    assert torch.equal(pose, model.predict_pose(state, actions, actions))


def test_where_no_wrist_picture_has_looked_the_base_shows_the_first_agent_view():
    memory, there = -torch.ones(1, MEMORY, 2, 3, 16, 16), START + 0.15 * torch.eye(8)[1]
    memory[:, 0, 0] = 1  # it alone is bright
    states, task = START.expand(1, MEMORY, 8), torch.zeros(1, dtype=torch.long)

    def base(state, config=TINY):
        model = make_model(config)
        return model.base(model.condition(memory, states, state[None], task, task)[0])

    beside, same = (base(state)[0, 3:, :12] for state in (there, START))
    assert 0.1 < (beside > 0.9).float().mean() < 0.9 and (same < -0.9).all(), "what the wrist has seen, it has seen better"
    assert (base(there, replace(TINY, plane_view=False)) < -0.9).all()


def test_a_picture_may_be_copied_from_any_source_and_the_grip_is_one_as_it_was():
    memory, task = torch.randint(256, (1, MEMORY, 2, 3, 16, 16), dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    states, there = START.repeat(1, MEMORY, 1), (START + 0.02)[None]
    model, actions = make_model(replace(TINY, still=0.0, sigma_max=1e3)), torch.zeros(1, 4, 7)
    first, grip = 1, sum(model.sources[:1]) + 1 + len(TINY.heights)  # of the agent view's sources, of the wrist's
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()
        model.unet.conv_out.bias.zero_()
        model.unet.conv_out.bias.view(-1, TINY.patch**2)[[6 + first, 6 + grip]] = 10
    images = model.sample(memory, states, there, actions, torch.randn(1, 6, 16, 16), task, task)[0].int()
    assert (images[0] - memory[0, 0, 0].int()).abs().max() <= 1 and (images[1] - memory[0, GRIP, 1].int()).abs().max() <= 1


def make_library():
    """Frame n is filled with n, the hand at x = n cm: of tasks 0 and 1 in turn, every four of a scene."""
    numbers = torch.arange(16)
    states = START.repeat(16, 1)
    states[:, 0] = 0.01 * numbers
    frames = numbers.to(torch.uint8).view(16, 1, 1, 1, 1).expand(16, 2, 3, 16, 16).contiguous()
    return Library(frames, state_features(states, NORMALIZER), numbers % 2, numbers // 4)


def test_the_library_gives_frames_of_the_task_but_not_of_the_scene_where_the_hand_was_nearest():
    library, states = make_library(), START.repeat(3, 1)
    states[:, 0] = torch.tensor([0.064, 0.064, 0.15])
    found = library(state_features(states, NORMALIZER), torch.tensor([0, 1, 0]), torch.tensor([9, 1, -1]), 2)
    assert found.shape == (3, 2, 2, 3, 16, 16) and found.dtype == torch.uint8
    assert found[:, :, 0, 0, 0, 0].tolist() == [[6, 8], [9, 3], [14, 12]]  # 5 and 7 are of scene 1


def test_a_picture_may_be_copied_from_the_library_which_travels_with_the_model(tmp_path):
    model, task = make_model(replace(TINY, still=0.0, sigma_max=1e3, neighbours=2)), torch.zeros(1, dtype=torch.long)
    model.library, memory = make_library(), torch.full((1, MEMORY, 2, 3, 16, 16), 200, dtype=torch.uint8)
    with torch.no_grad():
        model.unet.conv_out.weight.zero_()
        model.unet.conv_out.bias.zero_()  # the agent view from the nearest frame, the wrist's from the second
        model.unet.conv_out.bias.view(-1, TINY.patch**2)[[6 + 6, 6 + sum(model.sources) - 1]] = 10
    there = START[None] + 0.064 * torch.eye(8)[:1]
    told = memory, START.repeat(1, MEMORY, 1), there, torch.zeros(1, 4, 7), torch.randn(1, 6, 16, 16), task

    def copied(model, scene):
        return model.sample(*told, torch.tensor([scene]))[0].float().mean((1, 2, 3)).round().tolist()
    assert copied(model, 9) == [6, 8] and copied(model, 1) == [8, 10], "of scene 1 itself nothing is shown"
    model.save_pretrained(tmp_path)
    assert copied(WorldModel.from_pretrained(tmp_path), 9) == [6, 8]
    for broken in (b"PK", b""):
        (tmp_path / "library.npz").write_bytes(broken)
        with pytest.raises(UserError, match="library.npz is not a whole library"):
            WorldModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, expected", [(3, 0), (-3, 0), (50, 46), (-50, -46)])
def test_what_hardly_changes_stays_as_it_was(change, expected):
    model, memory = make_model(), torch.full((1, MEMORY, 2, 3, 16, 16), 128, dtype=torch.uint8)
    model.denoise = lambda x, *_: change / 127.5 / model.residual_std.expand_as(x)
    states = START.expand(1, MEMORY, 8)
    actions, noise, task = torch.zeros(1, 4, 7), torch.zeros(1, 6, 16, 16), torch.zeros(1, dtype=torch.long)
    images = model.sample(memory, states, START[None], actions, noise, task, task)
    assert (images[:, 0].int() - 128 == expected).all(), "the agent view's base is its last frame"
