"""The world simulator and the virtual environment made of it (World-Env section 3.2; EnerVerse-AC; EDM as in DIAMOND).

One action chunk in, one pair of pictures out. The robot's next state comes from kinematics and a learned correction;
the picture comes from a diffusion model that is given the geometry and paints only what geometry cannot know:

    base      agent view: the last frame;  wrist: the last frame warped to the hand's next pose over the table
    residual  (next frame - base) / residual_std, the thing that is diffused, so sigma_data = 1

    noisy residual -- c_in --+
    base, last wrist picture |  pixel       U-Net            c_out
    memory frames of agent --+-> unshuffle -> (diffusers) ---------> + ----> clean residual -> + base -> next frame
    view, and warped wrist   |                 ^             c_skip /
    action maps old and new -+                 |                   noisy residual
                             noise level, action chunk, old and new state

Departures from the paper:
1. Diffusion in pixels over a residual with 1 to 3 Euler steps; the paper denoises latents in 27 DDIM steps.
2. Both views are imagined together; known camera poses replace its VGGT features and ray maps, and there is no CLIP.
3. The memory (frames at 0, 1/3, 2/3 of the history and the last) is noised in training, save the first: it is real.
4. The action map's pose is the true one in training and the predicted one in imagination.

Shape letters: B trajectories, F memory frames, V camera views (0 agent view, 1 wrist), L action-chunk length,
A action dimensions, C, H, W image, D width of the embedding.

Try it: python -m pytest tests/test_world_model.py
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from episodes import MEMORY, Normalizer, StartContext, memory_index
from geometry import Cameras, action_map, quaternion, rotate_by, rotation_matrix, turn_between, warp_wrist
from runs import UserError, load_weights, read_json, save_model

SIGMA_DATA = 1.0  # standard deviation of the residual, after division by residual_std


@dataclass
class WorldModelConfig:
    """The world simulator."""

    image_size: int = 64
    """height and width of a picture"""
    chunk_size: int = 8
    """actions in a chunk (L)"""
    patch: int = 2
    """pixel-unshuffle: the U-Net works on a grid of image_size / patch"""
    channels: tuple[int, ...] = (48, 96, 144)
    """width of each U-Net level; each level halves the grid"""
    layers: int = 1
    """residual blocks a level"""
    attention: bool = True
    """self-attention at the coarsest level"""
    residual_std: tuple[float, float] = (0.12, 0.18)
    """standard deviation of (next frame - base) in agent view and wrist, pictures in [-1, 1]"""
    sigma_mean: float = 0.3
    """mean of log sigma in training"""
    sigma_std: float = 1.2
    """standard deviation of log sigma in training"""
    sigma_min: float = 0.2
    """lowest noise level of the sampler before 0"""
    sigma_max: float = 10.0
    """noise level that sampling starts at"""
    rho: float = 7.0
    """bend of the noise schedule (EDM equation 5)"""
    sampling_steps: int = 2
    """Euler steps a picture"""
    memory_noise: float = 0.1
    """training adds noise of a standard deviation up to this to the memory (pictures in [-1, 1])"""
    state_width: int = 256
    """width of the MLP that corrects the kinematics"""


# ---- diffusion: EDM (arXiv 2206.00364, table 1), written out

def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D(x; sigma) = c_skip x + c_out U-Net(c_in x, c_noise): input and target of the U-Net have unit variance."""
    c_in = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA * c_in
    return c_in, c_skip, c_out, sigma.log() / 4


def noise_levels(config: WorldModelConfig, steps: int) -> Tensor:
    """(steps + 1,) falling from sigma_max to sigma_min, then 0 (EDM equation 5)."""
    ramp = torch.linspace(0, 1, steps)
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return torch.cat([(high + ramp * (low - high)) ** config.rho, torch.zeros(1)])


def euler(denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Follow the probability flow from `noise` (unit variance) to a clean sample. `denoise(x, sigma)` -> clean x."""
    x = noise * sigmas[0]
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
        direction = (x - denoise(x, sigma)) / sigma
        x = x + direction * (next_sigma - sigma)
    return x


# ---- the robot's next state

class StatePredictor(nn.Module):
    """Kinematics + correction. A command moves the hand by about a fifth of itself, and later than asked (the controller
    is an impedance one), so the gains are a linear layer over both chunks that starts at the measured ones; an MLP adds
    the rest. Predicts (B, 8): shift of the gripper, its turn in world axes, change of the finger joints."""

    def __init__(self, chunk_size: int, width: int):
        super().__init__()
        inputs = 11 + 2 * 7 * chunk_size
        self.register_buffer("scale", torch.tensor([0.05] * 3 + [0.1] * 3 + [0.02] * 2), persistent=False)
        self.linear = nn.Linear(inputs, 8)
        self.correction = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                        nn.Linear(width, 8))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():                                                # metres and radians a unit and control step
            gains = self.linear.weight[:, -7 * chunk_size:].view(8, chunk_size, 7)
            for i, gain in enumerate([0.0105] * 3 + [0.1] * 3):
                gains[i, :, i] = gain / self.scale[i]

    def forward(self, features: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([features, previous_actions.flatten(1), actions.flatten(1)], dim=1)
        return self.linear(x) + self.correction(x)                           # (B, 8), in units of `scale`


# ---- the world model

class WorldModel(nn.Module):
    """What the next chunk of actions does to the robot and to the pictures."""

    def __init__(self, config: WorldModelConfig, cameras: Cameras, normalizer: Normalizer):
        super().__init__()
        self.config, self.cameras, self.normalizer = config, cameras, normalizer
        levels, D = len(config.channels), 4 * config.channels[0]
        views = 3 * 2                                                        # colours of both views together
        context = 3 * MEMORY + 4 * MEMORY + 3 + 3 + 3 + 3                    # see `context`
        blocks = ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D" if config.attention else "DownBlock2D"]
        self.unet = UNet2DModel(
            in_channels=(views + context) * config.patch**2, out_channels=views * config.patch**2,
            block_out_channels=config.channels, layers_per_block=config.layers, norm_num_groups=8,
            attention_head_dim=32, add_attention=config.attention, class_embed_type="identity",
            down_block_types=tuple(blocks), up_block_types=tuple(b.replace("Down", "Up") for b in reversed(blocks)))
        nn.init.zeros_(self.unet.conv_out.weight)                            # starts at the base
        nn.init.zeros_(self.unet.conv_out.bias)
        self.embed_actions = nn.Sequential(nn.Linear(7 * config.chunk_size + 2 * 11, D), nn.SiLU(), nn.Linear(D, D))
        self.state_predictor = StatePredictor(config.chunk_size, config.state_width)
        std = torch.tensor(config.residual_std).repeat_interleave(3)[None, :, None, None]
        self.register_buffer("residual_std", std, persistent=False)          # (1, V*3, 1, 1)

    def state_features(self, state: Tensor) -> Tensor:
        """(B, 8) -> (B, 11) for a network: position and fingers normalised, two columns of the rotation matrix."""
        scaled = self.normalizer.normalize_state(state)
        rotation = rotation_matrix(state[:, 3:6])[:, :, :2].flatten(1)       # no jump where an axis-angle has one
        return torch.cat([scaled[:, :3], rotation, scaled[:, 6:]], dim=1)

    def predict_state(self, state: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
        """State (B, 8), the chunk that led to it and the chunk to play (B, L, 7) -> the state (B, 8) after that chunk."""
        with torch.autocast(state.device.type, enabled=False):
            change = self.state_predictor(self.state_features(state), previous_actions, actions)
            change = change * self.state_predictor.scale
        position = state[:, :3] + change[:, :3]
        return torch.cat([position, rotate_by(state, change[:, 3:6]), state[:, 6:] + change[:, 6:]], dim=1)

    def context(self, memory: Tensor, memory_states: Tensor, next_state: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, F, V, 3, H, W) in [-1, 1] and its states (B, F, 8) -> base (B, V*3, H, W) and all that the U-Net
        gets to see beside the noisy residual (B, 40, H, W)."""
        B, M, V, C, H, W = memory.shape
        pose = next_state.repeat_interleave(M, dim=0)                                    # (B*F, 8)
        warped, seen = warp_wrist(memory[:, :, 1].flatten(0, 1), memory_states.flatten(0, 1), pose,
                                  self.cameras.wrist, self.cameras.plane_z)
        warped, seen = warped.view(B, M, C, H, W) * seen.view(B, M, 1, H, W), seen.view(B, M, 1, H, W)
        agent, wrist = memory[:, -1, 0], memory[:, -1, 1]                                # (B, 3, H, W)
        base = torch.cat([agent, warped[:, -1] + (1 - seen[:, -1]) * wrist], dim=1)      # (B, V*3, H, W)
        maps = [action_map(self.cameras.agentview, s, H, W) * 2 - 1 for s in (memory_states[:, -1], next_state)]
        context = [memory[:, :, 0].flatten(1, 2), warped.flatten(1, 2), seen.flatten(1, 2), wrist, base[:, 3:], *maps]
        return base, torch.cat(context, dim=1)

    def embedding(self, state: Tensor, next_state: Tensor, actions: Tensor) -> Tensor:
        old, new = self.state_features(state), self.state_features(next_state)
        return self.embed_actions(torch.cat([actions.flatten(1), new, 4 * (new - old)], dim=1))   # (B, D)

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, embedding: Tensor) -> Tensor:
        """Noisy residual (B, V*3, H, W) at noise levels sigma (B,) -> clean residual."""
        c_in, c_skip, c_out, c_noise = preconditioning(sigma.view(-1, 1, 1, 1))
        grid = F.pixel_unshuffle(torch.cat([c_in * x, context], dim=1), self.config.patch)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            # The time embedding is a sinusoid made for steps 0 ... 1000: spread c_noise over hundreds.
            output = self.unet(grid, 250 * c_noise.flatten(), class_labels=embedding).sample
        return c_skip * x + c_out * F.pixel_shuffle(output.float(), self.config.patch)

    @torch.no_grad()
    def sample(self, memory, memory_states, state, next_state, previous_actions, actions, generator=None, noise=None):
        """Memory uint8 (B, F, V, 3, H, W) with its states (B, F, 8), states (B, 8), chunks (B, L, 7) -> the next pictures
        uint8 (B, V, 3, H, W). Randomness: `noise` (B, V*3, H, W) of unit variance, or drawn from `generator`."""
        B, M, V, C, H, W = memory.shape
        base, context = self.context(to_float(memory), memory_states, next_state)
        embedding = self.embedding(state, next_state, actions)
        if noise is None:
            noise = randn(base.shape, generator, base.device)
        sigmas = noise_levels(self.config, self.config.sampling_steps).to(base.device)
        residual = euler(lambda x, sigma: self.denoise(x, sigma.expand(B), context, embedding), noise, sigmas)
        return to_uint8(base + residual * self.residual_std).view(B, V, C, H, W)

    def save_pretrained(self, folder: str | Path) -> None:
        save_model(folder, self, {"world_model": asdict(self.config), "cameras": self.cameras.to_dict(),
                                  "normalizer": self.normalizer.to_dict()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "WorldModel":
        values = read_json(Path(folder) / "config.json")
        try:
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in values["world_model"].items()}
            model = cls(WorldModelConfig(**config), Cameras.from_dict(values["cameras"]),
                        Normalizer.from_dict(values["normalizer"]))
        except (TypeError, KeyError) as error:
            raise UserError(f"{folder} holds no world model of this version ({error}); delete it and train again") from None
        return load_weights(folder, model)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def randn(shape, generator: torch.Generator | None, device) -> Tensor:
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


# ---- the loss

def draw_sigmas(config: WorldModelConfig, B: int, generator, device) -> Tensor:
    """(B,) noise levels: one from each of B equal slices of the log-normal (less variance than B free draws), shuffled."""
    source = device if generator is None else generator.device
    order = torch.randperm(B, generator=generator, device=source)
    slices = (order + torch.rand(B, generator=generator, device=source)) / B
    normal = torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4))
    return (config.sigma_mean + config.sigma_std * normal).exp().to(device)


def world_model_loss(model: WorldModel, batch: dict, generator: torch.Generator | None = None) -> tuple[Tensor, dict]:
    """Batch: memory uint8 (B, F, V, 3, H, W), memory_states (B, F, 8), previous_actions and actions (B, L, 7), state and
    next_state (B, 8), target uint8 (B, V, 3, H, W). EDM's loss on the residual + squared error of the state."""
    memory, state, next_state = to_float(batch["memory"]), batch["state"], batch["next_state"]
    B, M, V, C, H, W = memory.shape
    config, device = model.config, memory.device

    level = config.memory_noise * torch.rand(B, generator=generator, device=generator.device).to(device) if generator \
        else config.memory_noise * torch.rand(B, device=device)
    noise = randn(memory[:, 1:].shape, generator, device) * level.view(B, 1, 1, 1, 1, 1)
    memory = torch.cat([memory[:, :1], memory[:, 1:] + noise], dim=1)        # the first frame is always a real one
    base, context = model.context(memory, batch["memory_states"], next_state)

    clean = (to_float(batch["target"]).flatten(1, 2) - base) / model.residual_std        # (B, V*3, H, W)
    sigma = draw_sigmas(config, B, generator, device)
    noisy = clean + sigma.view(B, 1, 1, 1) * randn(clean.shape, generator, device)
    denoised = model.denoise(noisy, sigma, context, model.embedding(state, next_state, batch["actions"]))
    error = (denoised - clean).square()                                      # (B, V*3, H, W)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2          # EDM's lambda: 1 / c_out squared
    by_sample = weight * error.mean(dim=(1, 2, 3))                           # (B,) = the U-Net's own squared error

    change = model.state_predictor(model.state_features(state), batch["previous_actions"], batch["actions"])
    true_change = torch.cat([next_state[:, :3] - state[:, :3], turn_between(state, next_state),
                             next_state[:, 6:] - state[:, 6:]], dim=1)       # (B, 8)
    state_loss = (change - true_change / model.state_predictor.scale).square().mean()

    with torch.no_grad():
        mm = (change[:, :3] * model.state_predictor.scale[:3] - true_change[:, :3]).norm(dim=1).mean() * 1000
        pixel_mse = (error * model.residual_std**2).mean(dim=(0, 2, 3)) / 4  # pictures in [0, 1]
        low, middle, high = (part.mean() for part in by_sample[sigma.argsort()].tensor_split(3))
    loss = by_sample.mean() + state_loss
    return loss, {"loss": loss.item(), "loss_low_noise": low.item(), "loss_middle_noise": middle.item(),
                  "loss_high_noise": high.item(), "pixel_mse_agentview": pixel_mse[:3].mean().item(),
                  "pixel_mse_wrist": pixel_mse[3:].mean().item(), "state_loss": state_loss.item(), "state_mm": mm.item()}


# ---- the virtual environment

class Reflector(Protocol):
    """What the environment needs of a reward model: P(task done) from three frames, each uint8 (B, V, 3, H, W)."""

    def score(self, first: Tensor, previous: Tensor, current: Tensor, instruction: list[str]) -> Tensor: ...


@dataclass
class VirtualEnvConfig:
    """The virtual environment."""

    horizon: int = 16
    """chunks after which an imagined episode is cut off (T_max)"""
    eta: float = 0.5
    """the reflector's score above which an episode ends"""
    shared_noise: bool = True
    """the rollouts of a group get the same diffusion noise, so that it cancels in their advantage"""
    seed: int = 0
    """of the diffusion noise"""


class VirtualEnv(gym.vector.VectorEnv):
    """The true environment's interface on imagined pictures, one action chunk a step, all slots on the model's device.

    A slot that has ended stays as it is until it is reset. Rewards come at the end only: the reflector's score at the
    stop or at the horizon. With `shared_noise`, slots n*K ... n*K + K - 1 are a group and are to be reset together."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, world_model: WorldModel, reflector: Reflector | None, config: VirtualEnvConfig, num_envs: int,
                 group_size: int = 1):
        self.model, self.reflector, self.config = world_model, reflector, config
        self.num_envs, self.group_size = num_envs, group_size if config.shared_noise else 1
        self.device = next(world_model.parameters()).device
        size, L = world_model.config.image_size, world_model.config.chunk_size
        self.single_observation_space = gym.spaces.Dict({
            "images": gym.spaces.Box(0, 255, (2, 3, size, size), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32), "instruction": gym.spaces.Text(1000)})
        self.single_action_space = gym.spaces.Box(-1, 1, (L, 7), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator().manual_seed(config.seed)          # CPU: the same noise on every device
        self.frames = torch.zeros(num_envs, config.horizon + 1, 2, 3, size, size, dtype=torch.uint8, device=self.device)
        self.states = torch.zeros(num_envs, config.horizon + 1, 8, device=self.device)
        self.previous_actions = torch.zeros(num_envs, L, 7, device=self.device)
        self.time = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self.alive = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.instruction = [""] * num_envs

    def reset(self, contexts: list[StartContext], mask: Tensor | None = None, *, seed: int | None = None):
        """Start the slots where `mask` (B,) is True, or all, from `contexts` (B entries). -> obs, info. A `seed` starts
        the noise anew; without one it goes on, so that two rollouts from one context differ."""
        if seed is not None:
            self.generator.manual_seed(seed)
        mask = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu()
        slots = mask.nonzero().flatten()
        if len(slots):
            chosen = [contexts[i] for i in slots.tolist()]
            stack = lambda name: torch.as_tensor(np.stack([getattr(c, name) for c in chosen])).to(self.device)
            slots = slots.to(self.device)
            self.frames[slots, 0], self.states[slots, 0] = stack("images"), stack("state")
            self.previous_actions[slots] = stack("previous_actions")
            self.time[slots], self.alive[slots] = 0, True
            for i in slots.tolist():
                self.instruction[i] = contexts[i].instruction
        return self.observe(), {}

    def observe(self) -> dict:
        slots = torch.arange(self.num_envs, device=self.device)
        return {"images": self.frames[slots, self.time], "state": self.states[slots, self.time],
                "instruction": list(self.instruction)}

    @torch.no_grad()
    def step(self, actions: Tensor):
        """Action chunks (B, L, 7) in environment units -> obs, reward, terminated, truncated, info."""
        B, model = self.num_envs, self.model
        size = model.config.image_size
        noise = torch.randn(-(-B // self.group_size), 6, size, size, generator=self.generator)
        noise = noise.repeat_interleave(self.group_size, dim=0)[:B].to(self.device)       # drawn for all, dead or alive
        score = torch.full((B,), torch.nan, device=self.device)
        reward = torch.zeros(B, device=self.device)
        slots = self.alive.nonzero().flatten()                                            # (b,)
        if len(slots):
            self.imagine(slots, actions.to(self.device, torch.float32)[slots], noise[slots])
            if self.reflector is not None:
                now, last = self.time[slots], (self.time[slots] - 1)
                instruction = [self.instruction[i] for i in slots.tolist()]
                score[slots] = self.reflector.score(self.frames[slots, 0], self.frames[slots, last],
                                                    self.frames[slots, now], instruction).float()
        terminated = score > self.config.eta                                              # NaN is never above
        truncated = self.alive & ~terminated & (self.time >= self.config.horizon)
        ended = terminated | truncated
        reward[ended] = score[ended].nan_to_num(0.0)
        self.alive &= ~ended
        return self.observe(), reward, terminated, truncated, {"score": score}

    def imagine(self, slots: Tensor, actions: Tensor, noise: Tensor) -> None:
        """Append the next frame and state to the history of `slots` (b,)."""
        time = self.time[slots]
        where = slots[:, None], memory_index(time.cpu()).to(self.device)                  # (b, 1), (b, F)
        state, previous = self.states[slots, time], self.previous_actions[slots]
        next_state = self.model.predict_state(state, previous, actions)
        images = self.model.sample(self.frames[where], self.states[where], state, next_state, previous, actions,
                                   noise=noise)
        self.frames[slots, time + 1], self.states[slots, time + 1] = images, next_state
        self.previous_actions[slots] = actions
        self.time[slots] = time + 1
