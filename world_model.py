"""The world simulator (World-Env section 3.2; EnerVerse-AC; EDM as in DIAMOND).

One chunk of actions in, one pair of pictures out. `kinematics.py` says where the robot will be and what its fingers
will hold; the pictures come from a diffusion model that is given the geometry and paints what is unknown:

    sources   what a next picture may be copied from, pixel by pixel. Agent view: the last frame (its base), older ones, and
              the last one and the grip moved as the hand moves. Wrist: the last frame warped over the table to the hand's
              next pose (its base; where that shows nothing, the first agent view warped there) or as if all lay 5 or
              10 cm higher, older ones warped, the first and last agent view warped there, and the last wrist frame and
              the grip as they are: what is held stands still. Both, by flag: what the camera saw in other scenes of the
              task when the hand was nearest to where it will be (`Library`)
    residual  (next frame - base) / residual_std: this is what is diffused, so sigma_data = 1

    noisy residual -- c_in --+   pixel      U-Net       +-> choice of a source -+
    sources of both views ---+-> unshuffle -> (diffusers) -> paint on top of it --> + -- c_out --> + --> residual + base
    action maps, masks ------+                  ^                                                |
                              noise level, action chunk, old and new state      noisy residual * c_skip

Departures from the paper:
1. Diffusion of pixels (or of a VAE's latents, by flag), of a residual, in 1 Euler step; the paper's takes 27 DDIM steps.
2. It imagines both views at once, and knows the camera poses: by default no VGGT, no CLIP, no ray maps; each is a flag.
3. Memory (frames at 0, 1/3, 2/3 of the history and the last; here also the grip, from just after the fingers closed) is
   noised in training, save the first one. A rollout that starts inside a recorded episode has that one's frames before
   its start for history.
4. The action maps show the true next pose in training and the predicted one in imagination.
5. The last part of its training shows it its own pictures of recorded episodes as memory, and the true next one as
   target (`train.simulate`): else they dissolve within five chunks, and no policy finds its way in them.
6. Pixels may be copied, not only painted (Finn et al. 2016, arXiv 1605.07157): a softmax over the sources. From the grip
   a thing that is carried is copied once, not from a copy of a copy; by flag, from recorded frames, the arm.

Shape letters: B trajectories (b alive), F memory frames, V camera views (0 agent view, 1 wrist), L length of an action
chunk, C, H, W image, c, h, w what is diffused of one (by default the same), D width of the embedding.

Try it: python -m pytest tests/test_world_model.py
"""
from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from distributed import rank
from encoders import Injection, Latents
from episodes import GRIP, ChunkData, Normalizer, to_float, to_uint8, whole_arrays, write_arrays
from geometry import Cameras, action_map, agent_memory, carried, opening, ray_map, turn_between, warp_wrist, wrist_memory
from kinematics import (STATE_FEATURES, GraspPredictor, PosePredictor, contact_bins, free_air_loss, free_opening, in_contact,
                        moved, state_features, surroundings, with_fingers)
from runs import UserError, autocast, find_model, load_pretrained, save_model

SIGMA_DATA = 1.0  # standard deviation of what is diffused: residual_std sees to it


@dataclass
class WorldModelConfig:
    """The world simulator."""
    image_size: int = 64  # height and width of a picture
    chunk_size: int = 8  # actions in a chunk (L)
    patch: int = 2  # pixel-unshuffle: the U-Net's grid is image_size / patch wide
    channels: tuple[int, ...] = (32, 64, 96)  # width of every U-Net level; each level halves the grid
    layers: int = 1  # residual blocks a level
    attention: bool = True  # self-attention at the coarsest level
    encoders: tuple[str, ...] = ()  # picture encoders to attend to: `ours`, or vision models of Hugging Face
    vae: str = ""  # AutoencoderKL of diffusers, a folder or a hub id: diffuse its latents; empty: pixels
    heights: tuple[float, ...] = (0.05, 0.1)  # m above the table: planes over which the last wrist view is warped, too
    neighbours: int = 0  # recorded frames to copy from, too: those of the task in which the hand was nearest (`Library`)
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
class Library(nn.Module):
    """Recorded frames of training episodes, looked up by where the hand is.

    What the arm looks like is decided by where the hand is, and within a task tables and cabinets stand where they always
    stand. A frame of the same scene is never given: it could show what came of the very actions that are to be imagined.
    """
    WEIGHTS = (1.0,) * 3 + (0.5,) * 6 + (0.15,)  # of `state_features` in a distance: place, turn, fingers

    def __init__(self, frames: Tensor, features: Tensor, task: Tensor, scene: Tensor):
        """frames (N, V, 3, H, W) uint8, features (N, 10) of the robot's states in them, task and scene (N,)."""
        super().__init__()
        for name, value in (("frames", frames), ("features", features), ("task", task), ("scene", scene)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, data: ChunkData, normalizer: Normalizer) -> Library:
        tracks = [(k, slice(past, None)) for k, past in enumerate(data.past)]
        frames = np.concatenate([data.tracks[k].images[new] for k, new in tracks])
        states = np.concatenate([data.tracks[k].states[new] for k, new in tracks])
        picks = [(k, 0) for k, new in tracks for _ in data.tracks[k].images[new]]
        features = state_features(torch.from_numpy(states), normalizer)
        return cls(torch.from_numpy(frames).to(data.device), features.to(data.device), data.tasks(picks), data.scenes(picks))

    def forward(self, features: Tensor, task: Tensor, scene: Tensor, count: int) -> Tensor:
        """For the robot's state (B, 10), its task and scene (B,): the nearest frames (B, count, V, 3, H, W) uint8."""
        weights = torch.tensor(self.WEIGHTS, device=features.device)
        far = torch.cdist(features * weights, self.features * weights, compute_mode="donot_use_mm_for_euclid_dist")
        far = far + 1e3 * (task[:, None] != self.task) + 1e6 * (scene[:, None] == self.scene)
        return self.frames[far.topk(count, largest=False).indices]

    def save(self, path: Path):
        if rank() == 0:
            write_arrays(path, {name: value.cpu().numpy() for name, value in self.named_buffers()})

    @classmethod
    def load(cls, path: Path) -> Library:
        with whole_arrays(path, "library", "train the simulator again") as arrays:
            return cls(**{name: torch.from_numpy(values) for name, values in arrays.items()})


class WorldModel(nn.Module):
    """What the next chunk of actions does to the robot and to the pictures."""

    def __init__(self, config: WorldModelConfig, cameras: Cameras, normalizer: Normalizer):
        super().__init__()
        self.config, self.cameras, self.normalizer = config, cameras, normalizer
        D, blocks = 4 * config.channels[0], ["DownBlock2D"] * len(config.channels)
        blocks[-1] = "AttnDownBlock2D" if config.attention else "DownBlock2D"
        self.latents, self.library = Latents(config.vae) if config.vae else None, None  # a `Library`, where neighbours > 0
        c, factor = (self.latents.channels, self.latents.factor) if config.vae else (3, 1)  # channels of what is diffused
        if config.image_size % (factor * config.patch * 2 ** (len(config.channels) - 1)):
            raise UserError(f"--world_model.image_size {config.image_size} cannot be halved as often as patch, levels and "
                            "VAE ask for: choose a multiple of a larger power of 2")
        self.diffused = (2 * c, config.image_size // factor, config.image_size // factor)
        self.sources = (6 + config.neighbours,  # pictures that each view may be copied from
                        6 + config.neighbours + len(config.heights) + 2 * config.plane_view)
        context = c * sum(self.sources) + 4 + config.plane_view + 4 * 3 + 12 * config.ray_maps
        shape = dict(in_channels=(2 * c + context) * config.patch**2,
                     out_channels=(2 * c + sum(self.sources)) * config.patch**2,
                     block_out_channels=config.channels, layers_per_block=config.layers, norm_num_groups=8,
                     class_embed_type="identity")
        self.injection = Injection(config.encoders, D) if config.encoders else None
        if self.injection:  # attends to their tokens at every resolution but the finest
            blocks = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(config.channels) - 1)
        shape |= dict(down_block_types=blocks, up_block_types=[name.replace("Down", "Up") for name in reversed(blocks)])
        self.unet = (UNet2DConditionModel(**shape, cross_attention_dim=D, attention_head_dim=4) if self.injection else
                     UNet2DModel(**shape, attention_head_dim=32, add_attention=config.attention))
        with torch.no_grad():  # at first, mostly the bases are copied
            self.unet.conv_out.bias.view(-1, config.patch**2)[[2 * c, 2 * c + self.sources[0]]] += 0.5
        inputs = 7 * config.chunk_size + 2 * STATE_FEATURES
        self.embed = nn.Sequential(nn.Linear(inputs, D), nn.SiLU(), nn.Linear(D, D))
        self.pose_predictor = PosePredictor(config.chunk_size, config.state_width)
        self.grasp_predictor = GraspPredictor(config.chunk_size, config.image_size, config.grasp_channels,
                                              config.grasp_dropout)
        std = torch.tensor(config.residual_std).repeat_interleave(c).view(1, 2 * c, 1, 1)
        self.register_buffer("residual_std", std, persistent=False)  # (1, V*c, 1, 1)

    def predict_pose(self, state: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
        """The state (B, 8) after a chunk in free air."""
        change = self.pose_predictor(state_features(state, self.normalizer), previous_actions, actions)
        return with_fingers(moved(state, change), free_opening(opening(state), previous_actions, actions))

    def grasp_logits(self, images: Tensor, states: Tensor, previous_actions: Tensor, actions: Tensor,
                     task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`predict_pose`; logits and places (B, 2, BINS) of fingers and lift. images (B, 2, V, 3, H, W) in [-1, 1]"""
        state = states[:, 1]
        with torch.no_grad():  # `free_air_loss` trains it
            next_pose = self.predict_pose(state, previous_actions, actions)
        cameras = self.cameras.of(task)
        seen = surroundings(images, states, next_pose, previous_actions, actions, cameras, self.normalizer)
        return next_pose, *self.grasp_predictor(*seen, opening(state), opening(next_pose))

    @torch.no_grad()
    def predict_state(self, images: Tensor, states: Tensor, previous_actions: Tensor, actions: Tensor,
                      uniform: Tensor, task: Tensor) -> Tensor:
        """The state (B, 8) after a chunk.

        images uint8 (B, 2, V, 3, H, W) and states (B, 2, 8) are a chunk ago and now (an episode's first: twice that);
        previous_actions and actions (B, L, 7) are the chunk that led here and the one to play; uniform (B,) in [0, 1] draws
        the fingers' opening, 0.5 for the median; task (B,) tells the scene.
        """
        return in_contact(*self.grasp_logits(to_float(images), states, previous_actions, actions, task), uniform)

    def condition(self, memory: Tensor, memory_states: Tensor, next_state: Tensor, task: Tensor,
                  scene: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (B, F, V, 3, H, W) in [-1, 1], its states (B, F, 8) -> sources (B, A + W, c, h, w), the A pictures that the
        agent view may be copied from and the W of the wrist's, each one's base first; and the context (B, C, h, w), all
        that the U-Net sees beside the noisy residual. task (B,) tells the cameras, scene (B,) what not to look up."""
        agents, wrists, cameras, last = memory[:, :, 0], memory[:, :, 1], self.cameras.of(task), memory_states[:, -1]
        grip, table = memory_states[:, GRIP], [0, 1, 2, -1]
        warped, seen = wrist_memory(wrists[:, table], memory_states[:, table], next_state, cameras, self.config.hand_height)
        masks, unseen, plane = [seen], wrists[:, -1], agents[:, :0]
        if self.config.plane_view:  # of the first frame, which never drifts, and of the last one
            plane, there = agent_memory(agents[:, [0, -1]], next_state, cameras, self.config.hand_height)
            masks, unseen = [*masks, there[:, :1]], plane[:, 0] + (1 - there[:, 0]) * unseen
        carry = [carried(picture, state, next_state, cameras.agentview)
                 for picture, state in ((agents[:, -1], last), (agents[:, GRIP], grip))]
        above = [warp_wrist(wrists[:, -1], last, next_state, cameras.wrist, torch.as_tensor(cameras.plane_z) + height)[0]
                 for height in self.config.heights]
        base = warped[:, -1] + (1 - seen[:, -1]) * unseen
        near = memory[:, :0]
        if self.config.neighbours:
            near = to_float(self.library(state_features(next_state, self.normalizer), task, scene, self.config.neighbours))
        pictures = [agents[:, -1:], agents[:, :3], torch.stack(carry, dim=1), near[:, :, 0],
                    torch.stack([base, *above], dim=1), wrists[:, [GRIP, -1]], warped[:, :3], plane, near[:, :, 1]]
        sources = self.encode(torch.cat(pictures, dim=1).flatten(1, 2)).unflatten(1, (sum(self.sources), -1))
        poses, size = (last, next_state), sources.shape[-1]
        maps = [action_map(cameras.agentview, state, size) for state in poses]
        maps += [action_map(cameras.wrist, state, size, hand=next_state) for state in poses]
        if self.config.ray_maps:
            maps += [ray_map(cameras.agentview, next_state, size), ray_map(cameras.wrist, next_state, size, on_hand=True)]
        masks = F.adaptive_avg_pool2d(torch.cat(masks, dim=1).flatten(1, 2), size)
        return sources, torch.cat([sources.flatten(1, 2), masks, *maps], dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, n*3, H, W) in [-1, 1] -> what is diffused: their latents (B, n*c, h, w), or themselves."""
        return self.latents.encode(images) if self.latents else images

    def embedding(self, state: Tensor, next_state: Tensor, actions: Tensor) -> Tensor:
        """(B, D), added to the time embedding."""
        old, new = (state_features(value, self.normalizer) for value in (state, next_state))
        return self.embed(torch.cat([actions.flatten(1), new, 4 * (new - old)], dim=1))

    def base(self, sources: Tensor) -> Tensor:
        """What the residual is added to, (B, V*c, h, w)."""
        return sources[:, [0, self.sources[0]]].flatten(1, 2)

    def denoise(self, x: Tensor, sigma: Tensor, sources: Tensor, context: Tensor, embedding: Tensor,
                tokens: Tensor | None) -> Tensor:
        """Noisy residual (B, *diffused) with noise levels (B,) -> clean residual. tokens: see `tokens`.

        The U-Net says for every pixel which source it is copied from, and what is painted on top of that.
        """
        c_in, c_skip, c_out, c_noise = preconditioning(sigma.view(-1, 1, 1, 1))
        grid = F.pixel_unshuffle(torch.cat([c_in * x, context], dim=1), self.config.patch)
        with autocast(x.device):
            # The U-Net's time embedding is a sinusoid for steps 0 to 1000: spread c_noise over hundreds.
            attended = {} if tokens is None else {"encoder_hidden_states": tokens}
            output = self.unet(grid, 250 * c_noise.flatten(), class_labels=embedding, **attended).sample
        painted, choice = F.pixel_shuffle(output.float(), self.config.patch).tensor_split([x.shape[1]], dim=1)
        views = zip(choice.split(self.sources, dim=1), sources.split(self.sources, dim=1))
        copied = [((4 * logits).softmax(dim=1)[:, :, None] * pictures).sum(dim=1) for logits, pictures in views]
        return c_skip * x + c_out * (painted + (torch.cat(copied, dim=1) - self.base(sources)) / self.residual_std)

    def tokens(self, memory: Tensor) -> Tensor | None:
        """What the encoders see in the last frame of the memory (B, F, V, 3, H, W), (B, N, D)."""
        return self.injection(memory[:, -1]) if self.injection else None

    @torch.no_grad()
    def sample(self, memory: Tensor, memory_states: Tensor, next_state: Tensor, actions: Tensor,
               noise: Tensor, task: Tensor, scene: Tensor) -> Tensor:
        """The next pictures, uint8 (B, V, 3, H, W).

        memory uint8 (B, F, V, 3, H, W) and memory_states (B, F, 8), the last of F is now; next_state (B, 8);
        actions (B, L, 7); noise (B, *diffused) of variance 1, all the randomness there is; task and scene (B,)
        as of the `Episode`.
        """
        memory = to_float(memory)
        (sources, context), tokens = self.condition(memory, memory_states, next_state, task, scene), self.tokens(memory)
        base, embedding = self.base(sources), self.embedding(memory_states[:, -1], next_state, actions)
        sigmas = noise_levels(self.config, self.config.sampling_steps).to(base.device)
        residual = euler(lambda x, sigma: self.denoise(x, sigma.expand(len(x)), sources, context, embedding, tokens),
                         noise, sigmas) * self.residual_std  # (B, V*c, h, w)
        if self.latents:
            return to_uint8(self.latents.decode(base + residual)).unflatten(1, (2, 3))
        return to_uint8(base + F.softshrink(residual, self.config.still / 127.5)).unflatten(1, (2, 3))

    def save_pretrained(self, folder: str | Path):
        save_model(folder, self, {"world_model": asdict(self.config), "cameras": self.cameras.to_dict(),
                                  "normalizer": self.normalizer.to_dict()})
        if self.library:
            self.library.save(Path(folder) / "library.npz")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WorldModel:
        model = load_pretrained(folder, "world model", cls, lambda saved: (
            WorldModelConfig(**saved["world_model"]), Cameras.from_dict(saved["cameras"]),
            Normalizer.from_dict(saved["normalizer"])))
        if model.config.neighbours:
            model.library = Library.load(find_model(folder) / "library.npz")
        return model


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
    sources, context = model.condition(memory, memory_states, next_state, batch["task"][rows], batch["scene"][rows])
    clean = (target[rows] - model.base(sources)) / model.residual_std
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    told = model.embedding(state, next_state, actions), model.tokens(memory)
    denoised = model.denoise(noisy, sigma, sources, context, *told)
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
    """Cross-entropy of the bins of the fingers' opening and of the lift, L1 of the places in them.

    batch: `ChunkData.grasp_batch`, true and imagined pictures.
    """
    images = noised(to_float(batch["images"]), model.config.memory_noise, generator)[rows]
    told = (batch[name][rows] for name in ("states", "previous_actions", "actions", "task"))
    pose, logits, places = model.grasp_logits(images, *told)
    target, place = contact_bins(pose, batch["next_state"][rows])  # (B, 2)
    fingers, lift = (F.cross_entropy(logits[:, i], target[:, i]) for i in range(2))
    off = (places.gather(2, target[:, :, None])[:, :, 0] - place).abs().mean()
    right = (logits[:, 0].argmax(dim=1) == target[:, 0]).float().mean()
    loss = fingers + lift + off
    metrics = {"loss": loss, "loss_fingers": fingers, "loss_lift": lift, "place": off, "accuracy": right}
    return loss, {name: value.item() for name, value in metrics.items()}
