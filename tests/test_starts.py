"""Promises of starts.py: rollouts start where an episode is decided, in either world; exploration plays more of that."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import worlds
from config import ExploreConfig, TrainConfig, parse
from episodes import ChunkData, Episode
from runs import UserError
from starts import StartConfig, short_tries, start_frames, start_pools


def explored_episode(**fields):
    """Nine frames, a chunk of 8 steps apart: the fingers are closed from frame 5 on, the task is done from frame 7 on."""
    states = np.zeros((9, 8), np.float32)
    states[:5, 6] = 0.08
    values = dict(images=np.zeros((9, 2, 3, 8, 8), np.uint8), states=states, actions=np.ones((64, 7), np.float32),
                  success=np.arange(9) >= 7, stride=8, task_id=3, instruction="pick", source="explore", seed=100_009)
    return Episode(**values | fields)


def twice_as_many_frames(episode):
    """The same with frames in the middle of every chunk, as exploration stores them."""
    return replace(episode, stride=4, **{name: np.repeat(getattr(episode, name), 2, axis=0)[1:]
                                         for name in ("images", "states", "success")})


def test_rollouts_start_before_contact_and_release_inside_episodes_and_at_their_openings():
    episode = explored_episode()
    pools = start_pools(ChunkData([episode], 8, "cpu"))
    assert pools == {("opening", 3): [(0, 0)], ("midway", 3): [(0, t) for t in range(1, 7)],
                     ("contact", 3): [(0, 1), (0, 2), (0, 3)]}
    episode.states[6:, 6] = 0.08  # and open again from frame 6 on
    assert start_pools(ChunkData([episode], 8, "cpu")) == pools | {("release", 3): [(0, 2), (0, 3), (0, 4)]}
    episode.states[8, 6] = 0.0  # a second grasp, as in a task of two steps
    again = start_pools(ChunkData([episode], 8, "cpu"))
    assert again["contact", 3] == [(0, t) for t in range(1, 7)] and len(again["release", 3]) == 3


def drawn(config, episodes, task_ids=(3, 4), count=4000):
    data = ChunkData(episodes, 8, "cpu")
    frames = start_frames(data, episodes, config, task_ids)(count, torch.Generator().manual_seed(0))
    return [data.episodes[k].task_id for k, _ in frames], [t for _, t in frames]


def test_tasks_and_kinds_of_start_come_in_the_shares_that_are_asked_for():
    failing = [explored_episode(task_id=4, success=np.zeros(9, bool)) for _ in range(6)]  # 7 of 8, smoothed
    episodes = failing + [explored_episode() for _ in range(6)]  # 1 of 8
    tasks, times = drawn(StartConfig(contact=0.5, midway=0.0, focus=1.0), episodes)
    assert abs(np.mean(np.array(tasks) == 4) - 7 / 8) < 0.03
    assert abs(np.mean(np.array(times) == 0) - 0.5) < 0.03 and set(times) == {0, 1, 2, 3}
    assert abs(np.mean(np.array(drawn(StartConfig(focus=0.0), episodes)[0]) == 4) - 1 / 2) < 0.03
    _, times = drawn(StartConfig(contact=0.0, midway=0.0, release=1.0), episodes)
    assert set(times) == {0}, "no episode lets go: first frames instead"


def test_a_task_that_rl_cannot_start_in_is_one_clear_line():
    with pytest.raises(UserError, match="task 4.*--start.hottest"):
        drawn(StartConfig(), [explored_episode()])


@pytest.mark.parametrize("flags", [("--start.contact", "1"), ("--start.release", "0.2"), ("--start.midway", "-0.1")])
def test_fractions_of_starts_that_do_not_add_up_are_one_clear_line(flags):
    with pytest.raises(UserError, match="--start.midway.*sum not above 1"):
        parse([*flags])


@pytest.mark.parametrize("luck", [("0.6", "0.4"), ("-0.1", "0.5"), ("0", "1.1")])
def test_luck_that_is_no_range_of_quantiles_is_one_clear_line(luck):
    with pytest.raises(UserError, match="--start.luck.*from 0 to 1"):
        parse(["--start.luck", *luck])


@pytest.mark.parametrize("settings, temperature, where", [
    (StartConfig(), 1.0, {0.0, 1.0}), (StartConfig(demonstrations=False), 1.0, {1.0}),
    (StartConfig(demonstrations=False), 4.0, {0.0})])
def test_rl_starts_in_demonstrations_unless_told_not_to_and_something_mild_was_explored(
        monkeypatch, settings, temperature, where):
    recorded(monkeypatch, temperature)
    monkeypatch.setattr(worlds, "load_world", lambda *_: (None, None))
    monkeypatch.setattr(worlds, "VirtualEnv", lambda *_: None)
    _, draw = worlds.virtual_world(TrainConfig(task_ids=(3,), start=settings), None, "cpu")
    assert {float(start.states[-1, 0]) for start in draw(40, torch.Generator().manual_seed(0))} == where
    quantiles = [start.quantile for start in draw(40, torch.Generator().manual_seed(0))]
    assert len(set(quantiles)) == 40 and 0 < min(quantiles) < 0.1 and 0.4 < max(quantiles) < 0.5, "worse luck than the median"
    _, draw = worlds.virtual_world(TrainConfig(task_ids=(3,), start=replace(settings, luck=(0.5, 0.5))), None, "cpu")
    assert {start.quantile for start in draw(9, torch.Generator())} == {0.5}


def recorded(monkeypatch, temperature):
    """A demonstration in state 0 and an explored episode whose state says how hot it was."""
    played = twice_as_many_frames(explored_episode(temperature=temperature))
    played.states[:, 0] = temperature
    monkeypatch.setattr(worlds, "demonstrations", lambda run: [explored_episode(source="demo")])
    monkeypatch.setattr(worlds, "explored", lambda config, run: ([played], []))


def test_rl_in_the_true_simulator_takes_explored_episodes_up_again_where_imagination_starts(monkeypatch):
    recorded(monkeypatch, 1.0)
    monkeypatch.setattr(worlds, "true_env", lambda *_: None)
    _, draw = worlds.true_world(TrainConfig(task_ids=(3,), rl_env="libero"), None, "cpu")
    starts = draw(200, torch.Generator().manual_seed(0))
    assert {(start.task_id, start.seed, start.max_steps, start.history.source) for start in starts} == {
        (3, 100_009, 160, "explore")}, "not from demonstrations, and as long as in imagination"
    assert all(start.before == 4 * (len(start.history.images) - 1) for start in starts)
    assert {start.before // 8 for start in starts} == set(range(1, 7)), "nine in ten before the fingers close, the rest midway"
    assert np.mean([start.before <= 24 for start in starts]) > 0.85
    recorded(monkeypatch, 4.0)
    with pytest.raises(UserError, match="task 3.*--start.hottest"):
        worlds.true_world(TrainConfig(task_ids=(3,), rl_env="libero"), None, "cpu")


@pytest.mark.parametrize("stored, stride", [(lambda episode: episode, 8), (twice_as_many_frames, 4)])
def test_more_grasps_end_after_the_fingers_closed_and_training_episodes_are_taken_up_again_before_they_let_go(stored, stride):
    never, held_out, let_go = np.zeros((9, 8), np.float32), 100_002, explored_episode(seed=100_010)
    never[:, 6] = 0.08
    let_go.states[7:, 6] = 0.08
    episodes = [explored_episode(), explored_episode(states=never), explored_episode(seed=held_out), let_go]
    contexts = short_tries([stored(episode) for episode in episodes], TrainConfig(task_ids=(3, 4), explore=ExploreConfig(grasps=2)))  # no episode of task 4
    grasps, releases = contexts[:2], contexts[2:]
    assert [(context.seed, context.task_id, context.max_steps) for context in grasps] == [(100_011, 3, 64), (100_012, 3, 64)]
    assert not any(context.history for context in grasps)
    assert [(context.seed, context.take) for context in releases] == [(100_010, 1), (100_010, 2)]
    starts = [len(context.history.actions) // 8 for context in releases]
    assert [len(context.history.images) for context in releases] == [start * 8 // stride + 1 for start in starts]
    assert all(4 <= start <= 6 and start * 8 + context.max_steps == 80 for start, context in zip(starts, releases))
    assert starts[0] != starts[1]
