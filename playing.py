"""Episodes in the true simulator: played by all processes at once, each kept as it ends.

An episode depends on its context, the policy and `seed` alone, to the bit. What is played therefore depends neither on the
number of processes nor on where an earlier start was stopped.

Shapes: T time in chunks; images (T+1, V, 3, H, W).
"""
from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distributed import gather, rank, shard, world_size
from episodes import Episode
from libero_env import LiberoVectorEnv
from ppo import Rollout, rollout, together
from runs import read_lines, read_log, step_generator


def play(policy, env: LiberoVectorEnv, contexts, folder, source, seed, temperatures=None, **noise) -> list[dict]:
    """Play every context once in the true simulator; one `.npz` and one line of `episodes.jsonl` an episode, as it ends.

    temperatures: one for each context, multiplying the policy's scale b; None plays greedily. noise: `rollout`'s
    chunk_noise and persistence; without them, a draw of its own for every control step.

    Finished episodes are kept and not played again. Each process plays at its own pace, whole tasks where it can, because a
    simulator takes seconds to build. The policy sees every episode alone (a batch would change the last bits) and its noise
    comes from `seed` and the context. Returns all lines, in the order of `contexts`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, lock, playing = folder / "episodes.jsonl", threading.Lock(), {}  # playing: the task that a process is at
    known = gather(read_lines(path) if rank() == 0 else None)[0]  # as it is before any of torchrun's processes adds to it
    lines = {line["file"]: line for line in known}
    files = [f"task{context.task_id:02d}_seed{context.seed:06d}{f'_{context.take}' if context.take else ''}.npz"
             for context in contexts]
    todo = [episode for episode in zip(files, contexts, temperatures or [1.0] * len(contexts)) if episode[0] not in lines]
    done, todo = len(contexts) - len(todo), list(shard(sorted(todo, key=lambda episode: episode[1].task_id)))

    def serve(slot: LiberoVectorEnv):
        while True:
            with lock:
                if not todo:
                    return
                file, context, temperature = episode = next_episode(todo, playing, slot)
                todo.remove(episode)
                playing[slot] = context.task_id
            start = time.time()
            generator = step_generator(seed, 100_000_000 * (context.take + 100 * context.task_id) + context.seed)
            played = rollout(policy, slot, [context], temperatures is None, temperature, generator, **noise)
            line = save_episode(played, folder / file, context, source, slot, temperature if temperatures else 0.0)
            with lock, open(path, "a") as log:
                line["seconds"] = round((time.time() - start) / env.num_envs / world_size(), 3)  # its share of the wall time
                lines[file] = line
                log.write(json.dumps(line) + "\n")
                bar.update()

    with one_thread(), tqdm(total=done + len(todo), initial=done, desc=folder.name.removesuffix(".tmp"),
                            unit="episode") as bar, ThreadPoolExecutor(env.num_envs) as pool:
        try:
            for served in as_completed([pool.submit(serve, slot) for slot in env.single_slots()]):
                served.result()
        finally:
            with lock:
                todo.clear()  # stopped by Ctrl-C or an error: what is being played ends and is kept
    for others in gather(lines):
        lines |= others
    return [lines[file] for file in files]


def play_groups(policy, env: LiberoVectorEnv, contexts, generator, **noise) -> Rollout:
    """`rollout` in the true simulator, each process at its own pace: it plays whole groups of one context.

    generator: a list, as of `ppo.generators`.
    """
    groups = [list(group) for _, group in groupby(range(len(contexts)), key=lambda i: id(contexts[i]))]
    slots = env.single_slots()

    def serve(group):
        slot = slots.pop()
        played = rollout(policy, slot, [contexts[i] for i in group], generator=[generator[i] for i in group], **noise)
        slots.append(slot)  # its thread takes it again, and with it a simulator that may have the next group's task
        return played
    with one_thread(), ThreadPoolExecutor(len(slots)) as pool:
        return together(list(pool.map(serve, groups)))


@contextmanager
def one_thread():
    """PyTorch computes with one thread inside: the cores are busy with the simulators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def next_episode(todo, playing, slot):
    """Of the task that this process is at; else of one that none is at; else of the one with most episodes left."""
    left = Counter(context.task_id for _, context, _ in todo)
    task = playing.get(slot)
    if task not in left:
        task = next((other for other in left if other not in playing.values()), max(left, key=left.get))
    return next(episode for episode in todo if episode[1].task_id == task)


def control_steps(run, config) -> dict[str, dict[str, int]]:
    """{stage: {"true": recorded control steps of a finished run's stage, "imagined": those that RL imagined}}; training on
    records takes none, and a refresh has none of the run's that it goes on from."""
    lines = {stage: [line for path in sorted((run.folder / stage).glob(pattern)) for line in read_lines(path)]
             for stage, pattern in (("explore", "episodes.jsonl"), ("imagine", "validate_*/episodes.jsonl"),
                                    ("evaluate", "*/episodes.jsonl"))}
    newest = max((line["seed"] // 1000 for line in lines["explore"]), default=0)  # every exploration opens a thousand
    lines["explore"] = [line for line in lines["explore"] if line["seed"] // 1000 == newest]
    played = {stage: sum(line["steps"] + line.get("before", 0) for line in rows) for stage, rows in lines.items()}
    recorded = 0
    for path in (run.path("demonstrate") / "episodes").glob("*.npz") if not config.refresh else ():
        with np.load(path) as arrays:
            recorded += len(arrays["actions"])  # and not the pictures
    steps = {"demonstrate": {"true": recorded},
             **{stage: {"true": count} for stage, count in played.items()}}
    world = "true" if config.rl_env == "libero" else "imagined"
    learned = sum(int(record.get("control_steps", 0)) for record in read_log(run.folder).values())
    steps["imagine"][world] = steps["imagine"].get(world, 0) + learned
    return steps


def save_episode(played, path, context, source, env, temperature) -> dict:
    """Write a rollout of one context as an `Episode`; return its line of `episodes.jsonl`."""
    T = int(played.valid[0].sum())
    success, score = played.success[0, :T].cpu().numpy(), played.score[0, :T].cpu().numpy()
    first = context.history is not None and bool(context.history.success[-1])  # is the task done where it begins?
    whole = min(T, (context.max_steps or env.max_steps) // env.chunk_size)  # a last chunk cut short by the limit is not kept
    images, states, held = env.recorded(0, whole)
    episode = Episode(images=images, states=states, actions=played.env_actions[0, :whole].flatten(0, 1).cpu().numpy(),
                      success=np.concatenate([[first], held]), stride=env.stride, task_id=context.task_id,
                      instruction=played.instruction[0], source=source, seed=context.seed, temperature=temperature)
    (context.history.followed_by(episode) if context.history else episode).save(path)
    steps, reached = env.lengths(0)
    stops = np.flatnonzero(env.rule.stops(score)) if env.rule else []
    stop = int(stops[0]) if len(stops) else T - 1
    return {"file": path.name, "task_id": context.task_id, "seed": context.seed, "chunks": T, "steps": steps,
            "before": context.before,
            "oracle_stop": reached is not None, "steps_to_oracle_stop": reached or steps,
            "self_stop": bool(success[stop]), "steps_to_self_stop": min((stop + 1) * env.chunk_size, steps),
            "stopped_at": stop + 1 if len(stops) else None,
            **({"no_stop": bool(success[-1]), "steps_to_no_stop": steps} if env.stop == "none" else {}),
            "success": success.astype(int).tolist(),
            "score": [None if np.isnan(value) else round(float(value), 3) for value in score]}
