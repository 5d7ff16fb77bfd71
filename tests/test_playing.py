"""Promises of playing.py, on a made-up simulator."""
import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from config import TrainConfig
from episodes import Episode
from playing import control_steps, play, play_groups
from policy import ActionDistribution
from ppo import generators, rollout
from runs import Run, read_lines
from starts import LiberoContext

CONTEXTS = [LiberoContext(task, seed) for task in (0, 1, 2) for seed in range(3)]


class Slot:
    """Episodes of three chunks, or as long as their context says; the state is the sum of all actions."""
    num_envs, chunk_size, stride, max_steps, rule, stop = 1, 2, 2, 6, None, "oracle"

    def __init__(self, broken, log):
        self.broken, self.log = broken, log

    def observe(self):
        return {"images": torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8), "state": self.state, "instruction": ["do it"]}

    def reset(self, contexts, mask=None):
        (context,), self.steps = contexts, 0
        self.last = context.max_steps or 6
        if (context.task_id, context.seed) == self.broken:
            raise RuntimeError("the simulator died")
        self.log.append(context.task_id)
        self.state = torch.full((1, 8), float(context.task_id + context.seed))
        self.record = [self.state]
        return self.observe(), {}

    def step(self, actions):
        self.steps += 2
        self.state = self.state + actions.sum()
        self.record.append(self.state)
        over = torch.tensor([self.steps == self.last])
        return self.observe(), over.float(), over & False, over, {"score": torch.tensor([float("nan")]), "success": over}

    def lengths(self, i):
        return self.steps, self.steps

    def recorded(self, i, chunks):
        states = torch.cat(self.record[:chunks + 1]).numpy()
        return np.zeros((chunks + 1, 1, 3, 2, 2), np.uint8), states, np.arange(1, chunks + 1) * 2 == self.last


class Env(Slot):
    def __init__(self, num_envs, broken=None):
        super().__init__(broken, None)
        self.num_envs, self.logs = num_envs, [[] for _ in range(num_envs)]

    def single_slots(self):
        return [Slot(self.broken, log) for log in self.logs]


class Noisy(torch.nn.Module):
    def forward(self, obs):
        return ActionDistribution(obs["state"][:, None, :7].expand(-1, 2, 7), torch.zeros(len(obs["state"]), 2, 7))

    def env_actions(self, actions):
        return actions


def played(folder, env, contexts=CONTEXTS, seed=0, **noise):
    lines = play(Noisy(), env, contexts, folder, "test", seed, [1.0] * len(contexts), **noise)
    return [(line["file"], torch.from_numpy(read(folder / line["file"]))) for line in lines]


def read(path):
    return Episode.load(path).actions


def same(a, b):
    return [name for name, _ in a] == [name for name, _ in b] and all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b))


def test_an_episode_is_the_same_whatever_the_number_of_processes(tmp_path):
    one, three, other = (played(tmp_path / str(n), Env(n), seed=seed) for n, seed in ((1, 0), (3, 0), (2, 1)))
    assert same(one, three) and not same(one, other)
    assert len({tuple(actions.flatten().tolist()) for _, actions in one}) == 9, "two episodes shared their noise"


def test_noise_by_chunk_moves_all_steps_of_a_chunk_alike(tmp_path):
    for name, noise, alike in (("step", {}, False), ("chunk", {"chunk_noise": True, "persistence": 0.8}, True)):
        (_, actions), = played(tmp_path / name, Env(1), CONTEXTS[:1], **noise)  # (6, 7), chunks of 2
        assert torch.equal(actions[::2], actions[1::2]) == alike


@pytest.mark.parametrize("num_procs", [1, 3])
def test_groups_that_each_process_plays_at_its_own_pace_are_one_rollout_of_all(num_procs):
    contexts = sum([[LiberoContext(task, max_steps=steps)] * 2 for task, steps in enumerate((2, 6, 4, 2))], [])
    noises = [generators(8, torch.Generator().manual_seed(0), mirrored=True) for _ in range(2)]
    env = Env(num_procs)
    together = play_groups(Noisy(), env, contexts, noises[0], chunk_noise=True, explore_chunks=2)
    want = rollout(Noisy(), Slot(None, []), contexts, generator=noises[1], chunk_noise=True, explore_chunks=2)
    for field in fields(want):
        one, other = getattr(together, field.name), getattr(want, field.name)
        assert one == other if field.name == "instruction" else torch.equal(one.nan_to_num(7), other.nan_to_num(7)), field.name
    assert together.valid.sum(1).tolist() == [1, 1, 3, 3, 2, 2, 1, 1] and together.images.shape[1] == 4
    assert sorted(task for log in env.logs for task in log[::2]) == [0, 1, 2, 3] and all(
        log[::2] == log[1::2] for log in env.logs), "a group was divided"


def test_a_process_stays_with_a_task_as_long_as_it_can(tmp_path):
    env = Env(1)
    played(tmp_path, env)
    assert env.logs == [[0] * 3 + [1] * 3 + [2] * 3]


def test_every_episode_is_kept_as_it_ends_and_a_second_start_goes_on_behind_it(tmp_path):
    with pytest.raises(RuntimeError, match="died"):
        played(tmp_path / "a", Env(1, broken=(1, 1)))
    before = (tmp_path / "a" / "episodes.jsonl").read_text()
    assert [json.loads(line)["file"] for line in before.splitlines()] == [
        "task00_seed000000.npz", "task00_seed000001.npz", "task00_seed000002.npz", "task01_seed000000.npz"]
    env = Env(1)
    resumed = played(tmp_path / "a", env)
    assert env.logs == [[1, 1, 2, 2, 2]] and (tmp_path / "a" / "episodes.jsonl").read_text().startswith(before)
    assert same(resumed, played(tmp_path / "b", Env(1)))


def test_a_line_that_a_kill_cut_short_is_played_again(tmp_path):
    played(tmp_path, Env(1))
    path = tmp_path / "episodes.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(read_lines(path)) == 8 and path.read_text() == "".join(whole.splitlines(keepends=True)[:8])
    env = Env(1)
    played(tmp_path, env)
    assert env.logs == [[2]] and len(path.read_text().splitlines()) == 9


def test_an_episode_taken_up_again_is_kept_with_what_led_to_it(tmp_path):
    played(tmp_path, Env(1), CONTEXTS[:1])
    first = Episode.load(tmp_path / "task00_seed000000.npz")
    again = LiberoContext(0, 0, history=first.until(4), take=1)
    (line,) = play(Noisy(), Env(1), [again], tmp_path, "test", 0, [1.0])
    kept = Episode.load(tmp_path / line["file"])
    assert line["before"] == 4 and kept.past == 2 and len(kept.images) == 6 and len(kept.actions) == 4 + 6
    assert (kept.states[:2] == first.states[:2]).all() and (kept.actions[:4] == first.actions[:4]).all()
    assert kept.success.tolist() == [False] * 5 + [True]
    again.history.success[-1] = True
    (line,) = play(Noisy(), Env(1), [again], tmp_path / "done", "test", 0, [1.0])
    kept = Episode.load(tmp_path / "done" / line["file"])
    assert kept.success.tolist() == [False, False, True, False, False, True], "where it begins, the task was done"


def test_a_refresh_counts_its_own_control_steps_alone(tmp_path):
    run = Run(tmp_path)
    for stage in ("explore", "demonstrate/episodes"):
        (tmp_path / stage).mkdir(parents=True)
    np.savez(tmp_path / "demonstrate" / "episodes" / "0000.npz", actions=np.zeros((7, 7)))
    lines = [{"seed": 100_003, "steps": 40, "before": 0}, {"seed": 100_900, "steps": 8, "before": 24}]
    path = tmp_path / "explore" / "episodes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = control_steps(run, TrainConfig())
    assert (steps["demonstrate"]["true"], steps["explore"]["true"]) == (7, 72)
    with open(path, "a") as file:
        file.write(json.dumps({"seed": 101_000, "steps": 16, "before": 8}) + "\n")
    steps = control_steps(run, TrainConfig(refresh="runs/before"))
    assert (steps["demonstrate"]["true"], steps["explore"]["true"]) == (0, 24)
