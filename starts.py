"""Where rollouts start: at fresh placements, or in recorded episodes, which either world can take up again.

Imagination needs what was seen until then (`episodes.StartContext`); the true simulator repeats what was done
(`LiberoContext.history`). In a recorded episode few moments decide, so most of RL's rollouts start shortly before one
(WoVR's keyframes), and exploration plays more of them than whole episodes would hold.

Frames are (k, t): chunk boundary t of trajectory k of a `ChunkData`.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from episodes import ChunkData, Episode, finger_moments
from runs import UserError


@dataclass
class StartConfig:
    """Where RL's rollouts start in recorded episodes. What the fractions leave over starts at first frames."""
    contact: float = 0.9  # fraction that starts two to four chunks before the fingers close (WoVR's keyframes)
    release: float = 0.0  # fraction that starts two to four chunks before they open again
    midway: float = 0.1  # fraction that starts at any later frame in which the task is not done
    hottest: float = 2.0  # only episodes explored at most at this temperature: in hotter ones the hand is often lost
    demonstrations: bool = True  # in imagination, start in demonstrations, too, where the policy itself seldom comes
    luck: tuple[float, float] = (0.0, 0.5)  # in imagination: a start's quantile of fingers and lift is drawn from here
    focus: float = 1.0  # a task's share of the starts grows with its failures in exploration, to this power; 0: all alike


@dataclass
class LiberoContext:
    """Where a true episode begins: fresh placements from `seed`, or one of the benchmark's initial states."""
    task_id: int
    seed: int = 0
    init_state: np.ndarray | None = None  # (D,)
    history: Episode | None = None  # what led to the first frame of an episode that is taken up again
    max_steps: int | None = None  # control steps after which it is cut off; None: the environment's
    take: int = 0  # tells episodes of one task and seed apart

    @property
    def before(self) -> int:
        """Control steps that are repeated to come to the first frame."""
        return len(self.history.executed) if self.history else 0


def placements(first, task_ids, count) -> list[LiberoContext]:
    """`count` fresh ones a task from seed `first` on, tasks a thousand apart: a seed is where the hand begins, too, and
    hands that begin alike in all tasks tell less than they seem to."""
    return [LiberoContext(task, first + 1000 * task + number) for task in task_ids for number in range(count)]


def true_starts(data: ChunkData, frames, max_steps) -> list[LiberoContext]:
    """The true simulator's start contexts at `frames` of explored episodes, which `data` cuts once; `ChunkData.starts` are
    imagination's."""
    return [LiberoContext(data.episodes[k].task_id, data.episodes[k].seed,
                          history=data.episodes[k].until(t * data.chunk_size), max_steps=max_steps) for k, t in frames]


def start_pools(data: ChunkData) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Frames to start from, by kind and task: first ones ("opening"), those two to four chunks before the fingers close
    ("contact") or open again ("release"), and all later ones ("midway"); only where the task is not done and was not."""
    pools = {}
    for k, t in data.index:
        task = data.episodes[k].task_id
        if data.tracks[k].success[:t + 1].any():
            continue
        pools.setdefault(("midway" if t else "opening", task), []).append((k, t))
        for kind, moments in data.moments[k].items():
            if any(2 <= moment - t <= 4 for moment in moments):
                pools.setdefault((kind, task), []).append((k, t))
    return pools


def start_frames(data, explored, config: StartConfig, task_ids):
    """draw(count, generator) -> frames of `data`: first a task, by its failures in `explored`, then a kind of frame; a first
    frame where the task has none of that kind."""
    pools, shares = start_pools(data), {}
    for task in task_ids:
        if ("opening", task) not in pools:
            raise UserError(f"no episode of task {task} to start RL in: raise --start.hottest or --explore.episodes")
        failed = [not episode.success.any() for episode in explored
                  if episode.task_id == task and episode.source == "explore"]
        shares[task] = ((sum(failed) + 1) / (len(failed) + 2)) ** config.focus
    kinds = {kind: getattr(config, kind) for kind in ("midway", "contact", "release")}
    kinds["opening"] = max(0.0, 1 - sum(kinds.values()))

    def chosen(weights, count, generator):
        indices = torch.multinomial(torch.tensor([*weights.values()]), count, replacement=True, generator=generator)
        return [[*weights][i] for i in indices.tolist()]

    def draw(count, generator) -> list[tuple[int, int]]:
        tasks, names = chosen(shares, count, generator), chosen(kinds, count, generator)
        places = [pools.get((name, task)) or pools["opening", task] for name, task in zip(names, tasks)]
        return [pool[int(torch.randint(len(pool), (), generator=generator))] for pool in places]
    return draw


def short_tries(episodes, config) -> list[LiberoContext]:
    """More of what decides an episode, for a fraction of its time: grasps and releases.

    Grasps: new placements, cut off three chunks after the fingers first close in the task's median episode. Releases: the
    training episodes again, from one to three chunks before their fingers first opened again to three chunks after; where
    the goal is reached before they open (in the basket, and still in the hand), they show what remains done.
    """
    contexts, L = [], config.policy.chunk_size
    moments = [finger_moments(episode.chunks(L).states) for episode in episodes]
    for task in config.task_ids:
        last = max((episode.seed for episode in episodes if episode.task_id == task), default=0)
        closed = sorted(found["contact"][0] for episode, found in zip(episodes, moments)
                        if episode.task_id == task and found["contact"])
        contexts += [LiberoContext(task, last + number, max_steps=(closed[len(closed) // 2] + 3) * L)
                     for number in range(1, 1 + config.explore.grasps) if closed]
    for number, (episode, found) in enumerate(zip(episodes, moments)):
        if episode.held_out(config.explore.held_out):
            continue
        for moment, take in product(found["release"][:1], range(1, 1 + config.explore.releases)):
            start = max(0, moment - 1 - (number + take) % 3)
            contexts.append(LiberoContext(episode.task_id, episode.seed, history=episode.until(start * L), take=take,
                                          max_steps=(moment + 3 - start) * L))
    return contexts
