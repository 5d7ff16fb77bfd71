"""How fast this machine imagines and how fast it simulates: control steps a second in both worlds, same policy and views.

    python benchmark.py --checkpoint runs/libero_object
"""
from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from episodes import ChunkData, load_episodes
from evaluate import load_model, load_policies, pick_device
from libero_env import LiberoVectorEnv, step_limit
from ppo import rollout
from reflector import Reflector, StopRule
from runs import clear_errors, read_json, set_autocast, step_generator
from starts import LiberoContext
from virtual_env import VirtualEnv, VirtualEnvConfig
from world_model import WorldModel, world_model_loss


@dataclass
class Arguments:
    """Print a run's speeds on this machine; nothing is written."""
    checkpoint: str  # the run folder that train.py made
    num_procs: int = 0  # simulator processes; 0: one a core
    device: str = "auto"  # "auto", "cpu", "cuda"


def main(arguments: Arguments):
    run, device = Path(arguments.checkpoint), pick_device(arguments.device)
    trained = read_json(run / "config.json")
    set_autocast(trained["bf16"])
    policy = load_policies(run, device, "cloned")["cloned"]
    world = load_model(WorldModel, run / "simulate", device)
    reflector = load_model(Reflector, run / "reflect", device)
    data = ChunkData(load_episodes(run / "explore")[:4], world.config.chunk_size, device)

    starts = (data.first_starts() * 32)[:32]
    imagined = steps_per_second(policy, VirtualEnv(world, reflector, VirtualEnvConfig(8, StopRule(eta=2.0)), 32, 8), starts)
    num_procs = arguments.num_procs or len(os.sched_getaffinity(0))
    contexts = [LiberoContext(trained["task_ids"][0], seed) for seed in range(num_procs)]
    env = LiberoVectorEnv(trained["task"], num_procs, policy.config.image_size, world.config.chunk_size,
                          max_steps=8 * world.config.chunk_size, device=device)
    with closing(env):
        env.reset(contexts)  # builds the simulators
        true = steps_per_second(policy, env, contexts)

    optimizer = torch.optim.AdamW(world.parameters(), lr=0.0)

    def train_step():
        loss, _ = world_model_loss(world, data.world_batch(16, step_generator(0, 0)), step_generator(0, 0, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train_step()
    seconds, _ = timed(lambda: [train_step() for _ in range(4)])
    speeds = {"imagined_steps_per_s": imagined, "true_steps_per_s": true, "imagined_over_true": imagined / true,
              "world_training_samples_per_s": 64 / seconds,
              "full_length_episodes_per_minute_and_core": 60 * true / step_limit(trained["task"]) / num_procs}
    print("\n".join(f"{name:45s} {value:10.2f}" for name, value in speeds.items()))


def steps_per_second(policy, env, contexts) -> float:
    """Control steps of eight chunks in a second; the reset is not counted."""
    seconds, played = timed(lambda: rollout(policy, env, contexts))
    return int(played.valid.sum()) * played.actions.shape[2] / (seconds - timed(lambda: env.reset(contexts))[0])


def timed(work):
    start = time.perf_counter()
    value = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Arguments, use_underscores=True))
