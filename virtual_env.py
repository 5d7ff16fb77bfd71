"""The virtual environment: the world simulator and the instant reflector behind the true simulator's interface.

    actions (B, L, 7) ─► where the hand will be, what it will hold ─► next pictures ─► score ─► stop? reward
                         WorldModel.predict_state                     .sample           Reflector.score

It never calls the true simulator. World-Env, Algorithm 1: one chunk of actions is one step; the episode ends when the
reflector's score exceeds η (`StopRule`) or at the horizon, and the last score is its reward.

Shape letters: B trajectories (b alive), F memory frames, V camera views, L length of an action chunk, C, H, W image.

Try it: python -m pytest tests/test_virtual_env.py
"""
from __future__ import annotations

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from episodes import StartContext, finger_history, memory_index
from reflector import StopRule
from world_model import WorldModel, normal


@dataclass
class VirtualEnvConfig:
    """The virtual environment."""
    horizon: int = 20  # chunks after which an imagined episode is cut off (T_max)
    stop: StopRule = field(default_factory=StopRule)
    shared_noise: bool = True  # the rollouts of a group get the same noise: it cancels in their advantage


class VirtualEnv(gym.vector.VectorEnv):
    """The true environment's interface on imagined pictures, one chunk a step, on the model's device.

    A slot that has ended stays as it is until it is reset. The reward comes at the end alone: the reflector's score
    at the stop or at the horizon, confirmed (`StopRule`). Slots nK ... nK + K - 1 are a group: they share their
    noise, step for step, so reset them together. `reflector.score(first, previous, current, instruction, fingers)`
    -> (b,) gets frames uint8 (b, V, 3, H, W); without a reflector nothing ends early, scores are NaN and rewards 0.
    first, total: these are the slots from `first` on of `total`, the rest being other processes' (the same noise).
    seed: of the diffusion noise.
    """
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, world_model: WorldModel, reflector, config: VirtualEnvConfig, num_envs: int,
                 group_size: int = 1, first: int = 0, total: int | None = None, seed: int = 0):
        self.model, self.reflector, self.config, self.num_envs = world_model, reflector, config, num_envs
        self.seed, self.group_size, self.first = seed, group_size if config.shared_noise else 1, first
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
        self.begin, self.time = torch.zeros(2, num_envs, dtype=torch.long, device=self.device)  # start, last
        self.alive = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.quantile = torch.zeros(num_envs, device=self.device)  # of the fingers' opening; 1 - quantile: of the lift
        self.task, self.scene = torch.zeros(2, num_envs, dtype=torch.long, device=self.device)
        self.instruction = [""] * num_envs
        self.generator = torch.Generator()  # on the CPU: the same noise on every device
        self.reset_noise(0)

    def reset_noise(self, iteration: int):
        """Make the noise from here on a function of (seed, iteration): training can resume anywhere."""
        self.generator.manual_seed(self.seed * 1_000_003 + iteration)

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
            self.previous_actions[i] = torch.from_numpy(start.previous_actions)
            self.task[i], self.scene[i] = start.task_id, start.scene
            self.begin[i], self.time[i], self.quantile[i] = seen - 1, seen - 1, start.quantile
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
        memory = slots[:, None], memory_index(time, self.states[slots])  # (b, 1), (b, F)
        if next_state is None:
            last = slots[:, None], torch.stack([(time - 1).clamp(min=0), time], dim=1)
            next_state = self.model.predict_state(self.frames[last], self.states[last], self.previous_actions[slots],
                                                  actions, self.quantile[slots], task)
        images = self.model.sample(self.frames[memory], self.states[memory], next_state, actions, noise, task,
                                   self.scene[slots])
        self.frames[slots, time + 1], self.states[slots, time + 1] = images, next_state
        self.previous_actions[slots], self.time[slots] = actions, time + 1
