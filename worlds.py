"""What the stages of a run share: its records, and the two worlds in which its policy plays.

The true simulator and the virtual environment have one interface, gymnasium's vector API on chunks of actions; here both are
made, and with them the moments in which RL starts.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from distributed import shard
from episodes import ChunkData, StartContext, joined, load_episodes
from evaluate import load_model
from libero_env import LiberoVectorEnv, step_limit
from reflector import Reflector
from starts import LiberoContext, start_frames, true_starts
from virtual_env import VirtualEnv
from world_model import WorldModel


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------
def demonstrations(run):
    return load_episodes(run.path("demonstrate") / "episodes")


def explored(config, run):
    """(training episodes, held-out episodes): the first `held_out` of every task are never trained on."""
    episodes, held_out = load_episodes(run.path("explore")), config.explore.held_out
    return ([episode for episode in episodes if not episode.held_out(held_out)],
            [episode for episode in episodes if episode.held_out(held_out)])


def half_imagined(true_batch, imagined_batch, size):  # -> a `make_batch` of `fit`
    return lambda _, generator: joined(true_batch(size - size // 2, generator), imagined_batch(size // 2, generator))


def recorded_starts(config, run, device):
    """(`ChunkData`, draw): draw(count, generator) gives frames of it to start RL in (`StartConfig`)."""
    training, _ = explored(config, run)
    mild = [episode for episode in training if episode.temperature <= config.start.hottest]
    # What the true simulator takes up again must be its own: a demonstration may be somebody's file.
    shown = config.rl_env == "virtual" and (config.start.demonstrations or not mild)
    data = ChunkData((demonstrations(run) if shown else []) + mild, config.policy.chunk_size, device,
                     every_offset=config.rl_env == "virtual")
    return data, start_frames(data, training, config.start, config.task_ids)


# ---------------------------------------------------------------------------------------------------------------------
# The true simulator
# ---------------------------------------------------------------------------------------------------------------------
def true_env(config, device, linger=0, stride=None) -> LiberoVectorEnv:
    """The true simulator as exploration and RL use it: quicker meshes, whole chunks."""
    L, limit = config.policy.chunk_size, step_limit(config.task, config.max_steps, config.policy.chunk_size)
    return LiberoVectorEnv(config.task, config.num_procs, config.policy.image_size, L, limit, linger=linger,
                           mesh_cell=config.explore.mesh_cell, device=device, stride=stride)


def true_world(config, run, device):
    """RL as RIPT-VLA does it: the same loop and starts in the true simulator, for its sparse rewards."""
    data, frames = recorded_starts(config, run, device)
    limit = config.virtual.horizon * config.policy.chunk_size

    def draw(count, generator) -> list[LiberoContext]:  # task by task: a simulator takes seconds to build
        return sorted(true_starts(data, frames(count, generator), limit), key=lambda start: start.task_id)
    return true_env(config, device), draw


# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment
# ---------------------------------------------------------------------------------------------------------------------
def compiled(model, config):
    """--compile: torch.compile the model's parts in place; weights and their names stay as they are."""
    for part in model.children() if config.compile else ():
        part.compile()
    return model


def frozen(model_class, folder, config, device):
    return compiled(load_model(model_class, folder, device).requires_grad_(False), config)


def load_world(config, run, device):
    """The virtual environment's two halves, frozen."""
    return (frozen(WorldModel, run.path("simulate"), config, device),
            frozen(Reflector, run.path("reflect"), config, device))


def virtual_world(config, run, device):
    """The virtual environment, and start contexts drawn from recorded frames in which the task is not done."""
    data, frames = recorded_starts(config, run, device)

    def draw(count, generator) -> list[StartContext]:
        starts, (least, most) = data.starts(frames(count, generator)), config.start.luck
        drawn = least + (most - least) * torch.rand(count, generator=generator)
        return [replace(context, quantile=value) for context, value in zip(starts, drawn.tolist())]

    mine, K = shard(range(config.ppo.groups)), config.ppo.group_size
    return VirtualEnv(*load_world(config, run, device), config.virtual, len(mine) * K, K, mine[0] * K,
                      config.ppo.groups * K, config.seed), draw
