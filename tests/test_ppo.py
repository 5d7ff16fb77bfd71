"""Promises of ppo.py, and the whole method on a toy reaching task whose world model is exact."""
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from policy import ActionDistribution  # noqa: E402
from ppo import PPOConfig, improve, make_optimizer, minibatches, ppo_loss, rloo_advantage, rollout, update  # noqa: E402
from runs import UserError, step_generator  # noqa: E402

torch.set_num_threads(1)
L, A = 4, 2
STEP, REACH, HORIZON = 0.05, 0.07, 5  # metres a unit of action commands, metres that count as there, chunks


# ---------------------------------------------------------------------------------------------------------------------
# The toy: a hand in the plane, one goal, shown as the colour of a one-pixel picture
# ---------------------------------------------------------------------------------------------------------------------
class Reach(gymnasium.vector.VectorEnv):
    """A context is a tensor (4,): hand and goal. The "reflector" is exact: P(done) > 0.5 where the hand is at the goal."""

    def __init__(self, num_envs=None):
        self.num_envs, self.played = num_envs, []

    def reset(self, contexts, mask=None):
        contexts = torch.stack(contexts)
        if mask is None or not hasattr(self, "hand"):
            self.hand, self.goal = torch.zeros(2, len(contexts), 2)
            self.time, self.over = torch.zeros(len(contexts), dtype=torch.long), torch.ones(len(contexts), dtype=torch.bool)
        mask = torch.ones(len(contexts), dtype=torch.bool) if mask is None else mask
        self.hand[mask], self.goal[mask] = contexts[mask].split(2, -1)
        self.time[mask], self.over[mask] = 0, False
        self.played += contexts[mask].tolist()
        return self.observe(), {}

    def observe(self):
        pixel = ((self.goal + 1) * 127.5).round().to(torch.uint8)                                  # (B, 2)
        images = nn.functional.pad(pixel, (0, 1))[:, None, :, None, None]                          # (B, 1, 3, 1, 1)
        return {"images": images, "state": nn.functional.pad(self.hand, (0, 6)), "instruction": ["reach"] * len(pixel)}

    def step(self, actions):
        moved = self.hand + STEP * actions.clamp(-1, 1).sum(1)
        self.hand = torch.where(self.over[:, None], self.hand, moved)
        self.time += ~self.over
        score = torch.sigmoid((REACH - (self.hand - self.goal).norm(dim=-1)) / 0.02)
        terminated = (score > 0.5) & ~self.over
        truncated = (self.time >= HORIZON) & ~terminated & ~self.over
        self.over = self.over | terminated | truncated
        reward = torch.where(terminated | truncated, score, 0.0)
        return self.observe(), reward, terminated, truncated, {"success": score > 0.5, "score": score}


def draw_contexts(count, generator):
    return list(torch.rand(count, 4, generator=generator) * 1.2 - 0.6)


class ToyPolicy(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.action_head, self.scale_head = nn.Linear(width, L * A), nn.Linear(width, L * A)
        nn.init.zeros_(self.scale_head.weight)
        nn.init.constant_(self.scale_head.bias, -1.5)

    def forward(self, obs):
        goal = obs["images"].flatten(1)[:, :2] / 127.5 - 1
        hidden = self.backbone(torch.cat([goal - obs["state"][:, :2], goal], -1))
        loc, log_scale = (head(hidden).unflatten(-1, (L, A)) for head in (self.action_head, self.scale_head))
        return ActionDistribution(loc, log_scale)

    def env_actions(self, actions):
        return actions.clamp(-1, 1)


def miscalibrated(steps=400):
    """A policy cloned from demonstrations whose directions are turned by 30 degrees and shifted: it misses by a little."""
    torch.manual_seed(0)
    policy, generator = ToyPolicy(), step_generator(0, 0)
    optimizer = torch.optim.Adam([*policy.backbone.parameters(), *policy.action_head.parameters()], 3e-3)
    turn = torch.tensor([[0.866, -0.5], [0.5, 0.866]])
    env = Reach()
    for _ in range(steps):
        obs, _ = env.reset(draw_contexts(128, generator))
        way = (env.goal - env.hand) @ turn / (L * STEP) + torch.tensor([0.55, -0.35])
        target = way.clamp(-1, 1)[:, None].expand(-1, L, -1)
        loss = (policy(obs).loc - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def greedy_success(policy):
    return float(rollout(policy, Reach(), draw_contexts(500, step_generator(99, 0)), greedy=True).terminated.float().mean())
