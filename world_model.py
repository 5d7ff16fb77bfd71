"""The world simulator and the virtual environment (World-Env section 3.2; EnerVerse-AC; EDM as in DIAMOND).

One chunk of actions in, one pair of pictures out. `kinematics.py` says where the robot will be and what its fingers
will hold; the pictures come from a diffusion model that is given the geometry and paints what is unknown:

    base      agent view: the last frame;  wrist: the last frame warped over the table to the hand's next pose,
              and where that one shows nothing, the first agent view warped there
    residual  (next frame - base) / residual_std: this is what is diffused, so sigma_data = 1

    noisy residual --- c_in ---+
    base, last wrist frame ----|   pixel      U-Net
    memory: agent view, wrist -+-> unshuffle -> (diffusers) -- c_out --> + --> residual --> + --> next frame
        warped, agent warped   |                 ^                       |                  |
    action maps of both views -+                 |              noisy residual * c_skip   base
                                  noise level, action chunk, old and new state

Departures from the paper:
1. Diffusion of pixels (or of a VAE's latents, by flag), of a residual, in 1 Euler step; the paper's takes 27 DDIM steps.
2. It imagines both views at once, and knows the camera poses: by default no VGGT, no CLIP, no ray maps; each is a flag.
3. Memory (frames at 0, 1/3, 2/3 of the history and the last) is noised in training, save the first one. A rollout that
   starts inside a recorded episode has that one's frames before its start for history.
4. The action maps show the true next pose in training and the predicted one in imagination.
5. The last part of its training shows it its own pictures of recorded episodes as memory, and the true next one as
   target (`train.simulate`): else they dissolve within five chunks, and no policy finds its way in them.

Shape letters: B trajectories (b alive), F memory frames, V camera views (0 agent view, 1 wrist), L length of an action
chunk, C, H, W image, c, h, w what is diffused of one (by default the same), D width of the embedding.

Try it: python -m pytest tests/test_world_model.py
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from encoders import Injection, Latents
from episodes import MEMORY, Normalizer, StartContext, finger_history, memory_index, to_float, to_uint8
from geometry import Cameras, action_map, agent_memory, opening, ray_map, turn_between, wrist_memory
from kinematics import (STATE_FEATURES, GraspPredictor, PosePredictor, contact_bins, free_air_loss, in_contact, moved,
                        state_features, surroundings)
from reflector import StopRule
from runs import UserError, autocast, find_model, load_weights, read_json, save_model

SIGMA_DATA = 1.0  # standard deviation of what is diffused: residual_std sees to it


@dataclass
class WorldModelConfig:
    """The world simulator. The defaults train in ten minutes on two cores."""
    image_size: int = 64  # height and width of a picture
    chunk_size: int = 8  # actions in a chunk (L)
    patch: int = 2  # pixel-unshuffle: the U-Net's grid is image_size / patch wide
    channels: tuple[int, ...] = (48, 96, 144)  # width of every U-Net level; each level halves the grid
    layers: int = 1  # residual blocks a level
    attention: bool = True  # self-attention at the coarsest level
    encoders: tuple[str, ...] = ()  # picture encoders to attend to: `ours`, or vision models of Hugging Face
    vae: str = ""  # AutoencoderKL of diffusers, a folder or a hub id: diffuse its latents; empty: pixels
    plane_view: bool = True  # show the U-Net what the agent view has of the table, as the wrist camera would see it
    ray_maps: bool = False  # show the U-Net the ray of every pixel of both cameras (the paper does)
    hand_height: float = 0.22  # lowest part of the wrist picture, which shows the hand: not warped
    residual_std: tuple[float, float] = (0.15, 0.25)  # of next frame - base, in each view, in [-1, 1]
    sigma_mean: float = 2.3  # mean of log sigma in training: the one sampling step's, which begins at sigma_max
    sigma_std: float = 0.8  # standard deviation of log sigma in training
    sigma_max: float = 10.0  # noise level that sampling starts at
    sigma_min: float = 0.2  # noise level of the sampler's last step
    rho: float = 7.0  # bend of the sampler's schedule (EDM equation 5)
    still: float = 4.0  # grey levels taken off every sampled change, so that what stands still stays as it was
    sampling_steps: int = 1  # Euler steps a frame; on held-out frames 1 beat 2 by 0.2 dB and 3 by more
    memory_noise: float = 0.1  # training adds noise of up to this standard deviation to the memory
    state_width: int = 256  # width of the MLP that corrects the kinematics
    grasp_channels: int = 48  # width of the network that foresees what the fingers close on
    grasp_dropout: float = 0.3  # in that network, in training


# ----------------------------------------------------------------------------------------------------------
# Diffusion: EDM (arXiv 2206.00364, table 1), written out
# ----------------------------------------------------------------------------------------------------------
def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D(x; sigma) = c_skip x + c_out U-Net(c_in x, c_noise): the U-Net's input and target have variance 1."""
    c_in = 1 / (sigma**2 + SIGMA_DATA**2).sqrt()
    c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    c_out = sigma * SIGMA_DATA * c_in
    return c_in, c_skip, c_out, sigma.log() / 4


def noise_levels(config: WorldModelConfig, steps: int) -> Tensor:
    """(steps + 1,) falling from sigma_max to sigma_min, then 0 (EDM equation 5)."""
    high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    return torch.cat([(high + torch.linspace(0, 1, steps) * (low - high)) ** config.rho, torch.zeros(1)])


def euler(denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """From `noise` (variance 1) along the probability flow to a clean sample. denoise(x, sigma) -> clean x"""
    x = noise * sigmas[0]
    for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:]):
        direction = (x - denoise(x, sigma)) / sigma
        x = x + direction * (next_sigma - sigma)
    return x


def normal(shape, generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal draws from a generator of any device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


# ----------------------------------------------------------------------------------------------------------
# The world model
# ----------------------------------------------------------------------------------------------------------
class WorldModel(nn.Module):
    """What the next chunk of actions does to the robot and to the pictures."""

    def __init__(self, config: WorldModelConfig, cameras: Cameras, normalizer: Normalizer):
        super().__init__()
        self.config, self.cameras, self.normalizer = config, cameras, normalizer
        D, blocks = 4 * config.channels[0], ["DownBlock2D"] * len(config.channels)
        blocks[-1] = "AttnDownBlock2D" if config.attention else "DownBlock2D"
        self.latents = Latents(config.vae) if config.vae else None
        c, factor = (self.latents.channels, self.latents.factor) if config.vae else (3, 1)  # channels of what is diffused
        if config.image_size % (factor * config.patch * 2 ** (len(config.channels) - 1)):
            raise UserError(f"--world_model.image_size {config.image_size} cannot be halved as often as patch, levels and "
                            "VAE ask for: choose a multiple of a larger power of 2")
        self.diffused = (2 * c, config.image_size // factor, config.image_size // factor)
        both_views, context = 2 * c, (2 * c + 1) * (MEMORY + config.plane_view) + 2 * c + 4 * 3 + 12 * config.ray_maps
        shape = dict(in_channels=(both_views + context) * config.patch**2, out_channels=both_views * config.patch**2,
                     block_out_channels=config.channels, layers_per_block=config.layers, norm_num_groups=8,
                     class_embed_type="identity")
        self.injection = Injection(config.encoders, D) if config.encoders else None
        if self.injection:  # attends to their tokens at every resolution but the finest
            blocks = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(config.channels) - 1)
        shape |= dict(down_block_types=blocks, up_block_types=[name.replace("Down", "Up") for name in reversed(blocks)])
        self.unet = (UNet2DConditionModel(**shape, cross_attention_dim=D, attention_head_dim=4) if self.injection else
                     UNet2DModel(**shape, attention_head_dim=32, add_attention=config.attention))
        inputs = 7 * config.chunk_size + 2 * STATE_FEATURES
        self.embed = nn.Sequential(nn.Linear(inputs, D), nn.SiLU(), nn.Linear(D, D))
        self.pose_predictor = PosePredictor(config.chunk_size, config.state_width)
        self.grasp_predictor = GraspPredictor(config.chunk_size, config.image_size, config.grasp_channels,
                                              config.grasp_dropout)
        std = torch.tensor(config.residual_std).repeat_interleave(c).view(1, 2 * c, 1, 1)
        self.register_buffer("residual_std", std, persistent=False)  # (1, V*c, 1, 1)

    def predict_pose(self, state: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
        """The state (B, 8) after a chunk in free air, save for the fingers."""
        return moved(state, self.pose_predictor(state_features(state, self.normalizer), previous_actions, actions))

    def grasp_logits(self, images: Tensor, state: Tensor, previous_actions: Tensor, actions: Tensor,
                     task: Tensor) -> tuple[Tensor, Tensor]:
        """`predict_pose`, and (B, 2, BINS) of the fingers' opening and of the lift; images (B, V, 3, H, W) in [-1, 1]."""
        next_pose = self.predict_pose(state, previous_actions, actions)
        cameras = self.cameras.of(task)
        seen = surroundings(images, state, next_pose, previous_actions, actions, cameras, self.normalizer)
        return next_pose, self.grasp_predictor(*seen, opening(state))

    @torch.no_grad()
    def predict_state(self, images: Tensor, state: Tensor, previous_actions: Tensor, actions: Tensor,
                      uniform: Tensor, task: Tensor) -> Tensor:
        """The state (B, 8) after a chunk.

        images uint8 (B, V, 3, H, W) and state (B, 8) are now; previous_actions and actions (B, L, 7) are the chunk that
        led here and the one to play; uniform (B,) in [0, 1] draws the fingers' opening, 0.5 for the median; task (B,)
        tells the scene.
        """
        return in_contact(*self.grasp_logits(to_float(images), state, previous_actions, actions, task), uniform)

    def condition(self, memory: Tensor, memory_states: Tensor, next_state: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, F, V, 3, H, W) in [-1, 1], its states (B, F, 8) -> base (B, *diffused) and the context
        (B, C, h, w), all pictures that the U-Net sees beside the noisy residual. task (B,) tells the scene."""
        agent, wrist, cameras = memory[:, -1, 0], memory[:, -1, 1], self.cameras.of(task)  # (B, 3, H, W) each
        warped, seen = wrist_memory(memory[:, :, 1], memory_states, next_state, cameras, self.config.hand_height)
        views, masks, unseen = [memory[:, :, 0], warped], [seen], wrist
        if self.config.plane_view:  # of the first frame, which never drifts, and of the last one
            plane, there = agent_memory(memory[:, [0, -1], 0], next_state, cameras, self.config.hand_height)
            views, masks, unseen = [*views, plane], [*masks, there[:, :1]], plane[:, 0] + (1 - there[:, 0]) * wrist
        base = self.encode(torch.cat([agent, warped[:, -1] + (1 - seen[:, -1]) * unseen], dim=1))  # (B, V*c, h, w)
        poses, size = (memory_states[:, -1], next_state), base.shape[-1]
        maps = [action_map(cameras.agentview, state, size) for state in poses]
        maps += [action_map(cameras.wrist, state, size, hand=next_state) for state in poses]
        if self.config.ray_maps:
            maps += [ray_map(cameras.agentview, next_state, size), ray_map(cameras.wrist, next_state, size, on_hand=True)]
        pictures = [self.encode(view.flatten(1, 2)) for view in views]
        masks = F.adaptive_avg_pool2d(torch.cat(masks, dim=1).flatten(1, 2), size)
        return base, torch.cat([*pictures, masks, self.encode(wrist), base.chunk(2, dim=1)[1], *maps], dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, n*3, H, W) in [-1, 1] -> what is diffused: their latents (B, n*c, h, w), or themselves."""
        return self.latents.encode(images) if self.latents else images

    def embedding(self, state: Tensor, next_state: Tensor, actions: Tensor) -> Tensor:
        """(B, D), added to the time embedding."""
        old, new = (state_features(value, self.normalizer) for value in (state, next_state))
        return self.embed(torch.cat([actions.flatten(1), new, 4 * (new - old)], dim=1))

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        """Noisy residual (B, *diffused) with noise levels (B,) -> clean residual. tokens: see `tokens`."""
        c_in, c_skip, c_out, c_noise = preconditioning(sigma.view(-1, 1, 1, 1))
        grid = F.pixel_unshuffle(torch.cat([c_in * x, context], dim=1), self.config.patch)
        with autocast(x.device):
            # The U-Net's time embedding is a sinusoid for steps 0 to 1000: spread c_noise over hundreds.
            attended = {} if tokens is None else {"encoder_hidden_states": tokens}
            output = self.unet(grid, 250 * c_noise.flatten(), class_labels=embedding, **attended).sample
        return c_skip * x + c_out * F.pixel_shuffle(output.float(), self.config.patch)

    def tokens(self, memory: Tensor) -> Tensor | None:
        """What the encoders see in the last frame of the memory (B, F, V, 3, H, W), (B, N, D)."""
        return self.injection(memory[:, -1]) if self.injection else None

    @torch.no_grad()
    def sample(self, memory: Tensor, memory_states: Tensor, next_state: Tensor, actions: Tensor,
               noise: Tensor, task: Tensor) -> Tensor:
        """The next pictures, uint8 (B, V, 3, H, W).

        memory uint8 (B, F, V, 3, H, W) and memory_states (B, F, 8), the last of F is now; next_state (B, 8);
        actions (B, L, 7); noise (B, *diffused) of variance 1, all the randomness there is; task (B,) tells the scene.
        """
        memory = to_float(memory)
        (base, context), tokens = self.condition(memory, memory_states, next_state, task), self.tokens(memory)
        embedding = self.embedding(memory_states[:, -1], next_state, actions)
        sigmas = noise_levels(self.config, self.config.sampling_steps).to(base.device)
        residual = euler(lambda x, sigma: self.denoise(x, sigma.expand(len(x)), context, embedding, tokens),
                         noise, sigmas) * self.residual_std  # (B, V*c, h, w)
        if self.latents:
            return to_uint8(self.latents.decode(base + residual)).unflatten(1, (2, 3))
        return to_uint8(base + F.softshrink(residual, self.config.still / 127.5)).unflatten(1, (2, 3))

    def save_pretrained(self, folder: str | Path):
        save_model(folder, self, {"world_model": asdict(self.config), "cameras": self.cameras.to_dict(),
                                  "normalizer": self.normalizer.to_dict()})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WorldModel:
        folder = find_model(folder)
        value = read_json(folder / "config.json")
        try:
            model = cls(WorldModelConfig(**value["world_model"]), Cameras.from_dict(value["cameras"]),
                        Normalizer.from_dict(value["normalizer"]))
        except (TypeError, KeyError) as error:
            raise UserError(f"{folder} holds no world model of this version ({error}): delete it and run the "
                            "same command") from None
        return load_weights(folder, model)


# ----------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------
def draw_sigmas(config: WorldModelConfig, B: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(B,) noise levels, one from each of B equal slices of the log-normal (less variance than free ones)."""
    order = torch.randperm(B, generator=generator, device=generator.device)
    place = (order + torch.rand(B, generator=generator, device=generator.device)) / B
    log_sigma = config.sigma_mean + config.sigma_std * torch.special.ndtri(place.clamp(1e-4, 1 - 1e-4))
    return log_sigma.exp().to(device)


def noised(images: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Images (B, ..., 3, H, W) with noise; each sample has its own level."""
    level = torch.rand(len(images), *[1] * (images.dim() - 1), generator=generator, device=generator.device) * most
    return images + normal(images.shape, generator, images.device) * level.to(images.device)


def world_model_loss(model: WorldModel, batch: dict, generator: torch.Generator, rows=slice(None)) -> tuple[Tensor, dict]:
    """EDM's loss on the residual + `kinematics.free_air_loss` of the hand, for `rows` of the batch.

    batch: `ChunkData.world_batch`. The noise is drawn for all of it: a row's does not depend on how it is cut.
    """
    memory = to_float(batch["memory"])  # the first frame stays clean: it anchors the scene
    memory = torch.cat([memory[:, :1], noised(memory[:, 1:], model.config.memory_noise, generator)], dim=1)[rows]
    target = model.encode(to_float(batch["target"]).flatten(1, 2))  # (B, V*c, h, w)
    sigma = draw_sigmas(model.config, len(target), generator, target.device)[rows]
    noise = normal(target.shape, generator, target.device)[rows]
    memory_states, next_state, actions = (batch[name][rows] for name in ("memory_states", "next_state", "actions"))
    state = memory_states[:, -1]
    base, context = model.condition(memory, memory_states, next_state, batch["task"][rows])
    clean = (target[rows] - base) / model.residual_std
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    denoised = model.denoise(noisy, sigma, context, model.embedding(state, next_state, actions), model.tokens(memory))
    error = (denoised - clean).square()  # (B, V*c, h, w)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2  # 1 / c_out^2: all levels count alike
    denoising = weight * error.mean(dim=(1, 2, 3))  # (B,)

    before, previous_actions, played, after = (value[rows].flatten(0, 1) for value in batch["transitions"])  # N rows
    change = torch.cat([after[:, :3] - before[:, :3], turn_between(before, after)], dim=1)  # (N, 6)
    wrong = model.pose_predictor(state_features(before, model.normalizer), previous_actions, played) - change
    pose_loss = free_air_loss(wrong / model.pose_predictor.scale)
    loss = denoising.mean() + pose_loss

    with torch.no_grad():
        levels = zip(("low", "middle", "high"), denoising[sigma.argsort()].tensor_split(3))
        agentview, wrist = ((error * model.residual_std**2).mean(dim=(0, 2, 3)) / 4).chunk(2)  # pictures in [0, 1]
        metrics = {"loss": loss, "pose_loss": pose_loss, "state_mm": wrong[:, :3].norm(dim=1).mean() * 1000,
                   "pixel_mse_agentview": agentview.mean(), "pixel_mse_wrist": wrist.mean()}
        metrics |= {f"loss_{name}_noise": part.mean() for name, part in levels if len(part)}
    return loss, {name: value.item() for name, value in metrics.items()}


def grasp_loss(model: WorldModel, batch: dict, generator: torch.Generator, rows=slice(None)) -> tuple[Tensor, dict]:
    """Cross-entropy of the fingers' opening and of the lift. batch: `ChunkData.grasp_batch`, true and imagined pictures."""
    images = noised(to_float(batch["images"]), model.config.memory_noise, generator)[rows]
    told = (batch[name][rows] for name in ("state", "previous_actions", "actions", "task"))
    pose, logits = model.grasp_logits(images, *told)
    target = contact_bins(pose, batch["next_state"][rows])  # (B, 2)
    fingers, lift = (F.cross_entropy(logits[:, i], target[:, i]) for i in range(2))
    right = (logits[:, 0].argmax(dim=1) == target[:, 0]).float().mean()
    return fingers + lift, {"loss": fingers.item(), "loss_lift": lift.item(), "accuracy": right.item()}


# ----------------------------------------------------------------------------------------------------------
# The virtual environment
# ----------------------------------------------------------------------------------------------------------
@dataclass
class VirtualEnvConfig:
    """The virtual environment."""
    horizon: int = 20  # chunks after which an imagined episode is cut off (T_max)
    stop: StopRule = field(default_factory=StopRule)
    shared_noise: bool = True  # the rollouts of a group get the same noise: it cancels in their advantage
    seed: int = 0  # of the diffusion noise


class VirtualEnv(gym.vector.VectorEnv):
    """The true environment's interface on imagined pictures, one chunk a step, on the model's device.

    A slot that has ended stays as it is until it is reset. The reward comes at the end alone: the reflector's score
    at the stop or at the horizon, confirmed (`StopRule`). Slots nK ... nK + K - 1 are a group: they share their
    noise, step for step, so reset them together. `reflector.score(first, previous, current, instruction, fingers)`
    -> (b,) gets frames uint8 (b, V, 3, H, W); without a reflector nothing ends early, scores are NaN and rewards 0.
    first, total: these are the slots from `first` on of `total`, the rest being other processes' (the same noise).
    """
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, world_model: WorldModel, reflector, config: VirtualEnvConfig, num_envs: int,
                 group_size: int = 1, first: int = 0, total: int | None = None):
        self.model, self.reflector, self.config, self.num_envs = world_model, reflector, config, num_envs
        self.group_size, self.first = group_size if config.shared_noise else 1, first
        self.groups = -(-(total or num_envs) // self.group_size)  # of all slots, here or not
        size, L = world_model.config.image_size, world_model.config.chunk_size
        self.single_observation_space = gym.spaces.Dict({
            "images": gym.spaces.Box(0, 255, (2, 3, size, size), np.uint8),
            "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32), "instruction": gym.spaces.Text(1000)})
        self.single_action_space = gym.spaces.Box(-1, 1, (L, 7), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        self.device, history = next(world_model.parameters()).device, (num_envs, config.horizon + 1)
        self.frames = torch.zeros(*history, 2, 3, size, size, dtype=torch.uint8, device=self.device)
        self.states = torch.zeros(*history, 8, device=self.device)
        self.scores = np.zeros((num_envs, config.stop.confirm), np.float32)  # the reflector's last ones
        self.previous_actions = torch.zeros(num_envs, L, 7, device=self.device)
        self.begin, self.time = torch.zeros(2, num_envs, dtype=torch.long, device=self.device)  # first imagined, last frame
        self.alive = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.luck = torch.zeros(num_envs, device=self.device)  # which quantile of their opening the fingers take
        self.task, self.instruction = torch.zeros(num_envs, dtype=torch.long, device=self.device), [""] * num_envs
        self.generator = torch.Generator()  # on the CPU: the same noise on every device
        self.reset_noise(0)

    def reset_noise(self, iteration: int):
        """Make the noise from here on a function of (seed, iteration): training can resume anywhere."""
        self.generator.manual_seed(self.config.seed * 1_000_003 + iteration)

    def reset(self, contexts: list[StartContext], mask: Tensor | None = None):
        """Start the slots where mask (B,) is True (None: all) from their entry of `contexts`. -> obs, info"""
        chosen = range(self.num_envs) if mask is None else torch.as_tensor(mask).nonzero().flatten().tolist()
        missing = max((len(contexts[i].images) for i in chosen), default=0) + self.config.horizon - self.frames.shape[1]
        if missing > 0:  # room for a longer past than any before
            self.frames, self.states = (F.pad(history, (0, 0) * (history.dim() - 2) + (0, missing))
                                        for history in (self.frames, self.states))
        for i in chosen:
            start, seen = contexts[i], len(contexts[i].images)
            self.frames[i, :seen], self.states[i, :seen] = torch.from_numpy(start.images), torch.from_numpy(start.states)
            self.previous_actions[i], self.task[i] = torch.from_numpy(start.previous_actions), start.task_id
            self.begin[i], self.time[i], self.luck[i] = seen - 1, seen - 1, start.luck
            self.alive[i], self.scores[i], self.instruction[i] = True, 0.0, start.instruction
        return self.observe(), {}

    def observe(self) -> dict:
        slots = torch.arange(self.num_envs, device=self.device)
        return {"images": self.frames[slots, self.time], "state": self.states[slots, self.time],
                "instruction": list(self.instruction)}

    @torch.no_grad()
    def step(self, actions: Tensor, next_state: Tensor | None = None):
        """Chunks (B, L, 7) in environment units -> obs, reward, terminated, truncated, {"score": (B,)}.

        next_state (B, 8): where the robot truly went; without it, it is predicted.
        """
        score = torch.full((self.num_envs,), torch.nan, device=self.device)
        noise = normal((self.groups, *self.model.diffused), self.generator, self.device)  # for slots that have ended, too
        slots = self.alive.nonzero().flatten()  # (b,)
        if len(slots):
            group = (self.first + slots) // self.group_size
            given = None if next_state is None else next_state.to(self.device)[slots]
            self.imagine(slots, actions.to(self.device).float()[slots], noise[group], given)
        if len(slots) and self.reflector is not None:
            now, instruction = self.time[slots], [self.instruction[i] for i in slots.tolist()]
            first, before, current = (self.frames[slots, t] for t in (torch.zeros_like(now), now - 1, now))
            fingers = finger_history(self.states[slots])[torch.arange(len(slots)), now.cpu()]  # (b, K)
            score[slots] = self.reflector.score(first, before, current, instruction, fingers).float()
        b = slots.cpu().numpy()
        self.scores[b] = np.concatenate([self.scores[b, 1:], score[slots].cpu().numpy()[:, None]], axis=1)
        confirmed = torch.from_numpy(self.config.stop.confirmed(self.scores)[:, -1]).to(self.device)
        terminated = self.alive & (confirmed > self.config.stop.eta)  # never where it is NaN
        truncated = self.alive & ~terminated & (self.time - self.begin >= self.config.horizon)
        reward = torch.where(terminated | truncated, confirmed.nan_to_num(0.0), 0.0)
        self.alive &= ~(terminated | truncated)
        return self.observe(), reward, terminated, truncated, {"score": score}

    def imagine(self, slots: Tensor, actions: Tensor, noise: Tensor, next_state: Tensor | None):
        """Append the next state and frames to the history of `slots` (b,)."""
        time, task = self.time[slots], self.task[slots]
        memory = slots[:, None], memory_index(time.cpu()).to(self.device)  # (b, 1), (b, F)
        if next_state is None:
            next_state = self.model.predict_state(self.frames[slots, time], self.states[slots, time],
                                                  self.previous_actions[slots], actions, self.luck[slots], task)
        images = self.model.sample(self.frames[memory], self.states[memory], next_state, actions, noise, task)
        self.frames[slots, time + 1], self.states[slots, time + 1] = images, next_state
        self.previous_actions[slots], self.time[slots] = actions, time + 1
