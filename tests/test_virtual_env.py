"""Promises of virtual_env.py."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from episodes import StartContext, finger_history
from geometry import Cameras
from reflector import StopRule
from runs import UserError
from test_world_model import AGENTVIEW, CAMERAS, NORMALIZER, START, TINY, make_model
from virtual_env import VirtualEnv, VirtualEnvConfig
from world_model import WorldModel

torch.set_num_threads(1)


def make_contexts(B, seed=0, seen=1):
    random = np.random.default_rng(seed)
    return [StartContext(random.integers(0, 256, (seen, 2, 3, 16, 16), dtype=np.uint8), START.expand(seen, 8).numpy(),
                         f"task {b}", np.zeros((4, 7), np.float32), 0) for b in range(B)]


def make_actions(B, T, seed=1):
    return torch.rand(T, B, 4, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class NeverDone:
    def score(self, first, previous, current, instruction, fingers):
        return torch.full((len(instruction),), 0.25)


def play(env, contexts, actions, seed=None):
    """-> images (T + 1, B, V, 3, H, W)."""
    if seed is not None:
        env.reset_noise(seed)
    frames = [env.reset(contexts)[0]["images"]]
    return torch.stack(frames + [env.step(chunk)[0]["images"] for chunk in actions])


def test_an_action_changes_the_next_frame_and_none_before():
    actions, model = make_actions(2, 5), make_model()
    changed = actions.clone()
    changed[3] = -changed[3]
    one, two = (VirtualEnv(model, NeverDone(), VirtualEnvConfig(horizon=8), 2) for _ in range(2))
    play(one, make_contexts(2), actions)
    play(two, make_contexts(2), changed)
    for history, other in ((one.frames, two.frames), (one.states, two.states)):
        assert torch.equal(history[:, :4], other[:, :4]) and not torch.equal(history[:, 4], other[:, 4])


def test_same_seed_same_rollout_and_another_at_the_next_reset():
    contexts, actions, model = make_contexts(2), make_actions(2, 3), make_model()
    env, twin, other = (VirtualEnv(model, NeverDone(), VirtualEnvConfig(), 2, seed=seed) for seed in (7, 7, 8))
    first = play(env, contexts, actions)
    assert torch.equal(first, play(twin, contexts, actions))
    assert not torch.equal(first, play(other, contexts, actions))
    assert not torch.equal(first, play(env, contexts, actions))
    assert torch.equal(first, play(env, contexts, actions, seed=0))  # reset_noise(0) is how an env begins


def test_groups_share_their_noise():
    contexts, actions = [make_contexts(1)[0]] * 4, make_actions(1, 3).expand(3, 4, 4, 7)
    config = VirtualEnvConfig()
    frames = play(VirtualEnv(make_model(), NeverDone(), config, 4, group_size=2), contexts, actions)[-1]
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[2], frames[3])
    assert not torch.equal(frames[0], frames[2])
    config = replace(config, shared_noise=False)
    frames = play(VirtualEnv(make_model(), NeverDone(), config, 4, group_size=2), contexts, actions)[-1]
    assert not torch.equal(frames[0], frames[1])


def test_a_start_tells_which_quantile_the_fingers_take_in_all_of_its_rollout():
    model, seen, contexts = make_model(), [], make_contexts(3)
    inner = model.predict_state
    model.predict_state = lambda *given: (seen.append(given[4].tolist()), inner(*given))[1]
    play(VirtualEnv(model, None, VirtualEnvConfig(), 3), [contexts[0], replace(contexts[1], quantile=0.25), contexts[2]], make_actions(3, 2))
    assert seen == [[0.5, 0.25, 0.5]] * 2


def test_where_the_hand_will_be_is_told_from_the_frames_of_a_chunk_ago_and_of_now():
    model, seen = make_model(), []
    inner = model.predict_state
    model.predict_state = lambda images, states, *given: (seen.append((images, states)), inner(images, states, *given))[1]
    env = VirtualEnv(model, None, VirtualEnvConfig(), 2)
    play(env, make_contexts(2), make_actions(2, 3))
    for step, frames in enumerate([[0, 0], [0, 1], [1, 2]]):  # nothing was seen before the first frame
        assert torch.equal(seen[step][0], env.frames[:, frames]) and torch.equal(seen[step][1], env.states[:, frames])


def test_resetting_one_slot_leaves_the_others_bit_equal():
    env = VirtualEnv(make_model(), NeverDone(), VirtualEnvConfig(), 3)
    play(env, make_contexts(3), make_actions(3, 2))
    before, frames, states = env.observe(), env.frames.clone(), env.states.clone()
    mask, fresh = torch.tensor([False, True, False]), make_contexts(3, seed=9)
    after, _ = env.reset([None, fresh[1], None], mask)
    for b in (0, 2):
        assert torch.equal(after["images"][b], before["images"][b])
        assert torch.equal(after["state"][b], before["state"][b])
        assert torch.equal(env.frames[b], frames[b]) and torch.equal(env.states[b], states[b])
        assert env.time[b] == 2 and after["instruction"][b] == before["instruction"][b]
    assert torch.equal(after["images"][1], torch.from_numpy(fresh[1].images[-1])) and env.time[1] == 0


def test_the_reflector_ends_episodes_and_pays_only_at_the_end():
    class Script:
        """Scores rise with time: 0.2 more each chunk; task 1 is never done."""
        calls = 0

        def score(self, first, previous, current, instruction, fingers):
            self.calls += 1
            self.batch, self.fingers = len(instruction), fingers
            return torch.tensor([0.2 * self.calls if name == "task 0" else 0.1 for name in instruction])

    script = Script()
    env = VirtualEnv(make_model(), script, VirtualEnvConfig(horizon=4, stop=StopRule(confirm=1)), 2)
    env.reset(make_contexts(2))
    history = [env.step(chunk) for chunk in make_actions(2, 6)]
    rewards, terminated, truncated = (torch.stack([h[i] for h in history]) for i in (1, 2, 3))
    scores = torch.stack([h[4]["score"] for h in history])
    assert torch.allclose(rewards, torch.tensor([[0, 0], [0, 0], [0.6, 0], [0, 0.1], [0, 0], [0, 0]]))
    assert terminated.nonzero().tolist() == [[2, 0]] and truncated.nonzero().tolist() == [[3, 1]]
    assert script.calls == 4 and script.batch == 1  # what has ended is not computed any more
    assert torch.equal(script.fingers, finger_history(env.states)[1:, 4])
    assert torch.equal(scores.isnan(), torch.tensor([[0, 0]] * 3 + [[1, 0]] + [[1, 1]] * 2).bool())
    assert torch.equal(history[2][0]["images"][0], history[5][0]["images"][0])


def test_a_stop_is_confirmed_by_the_next_frame_and_a_reset_forgets_the_last():
    class Script:
        scores = iter([0.9, 0.2, 0.8, 0.7, 0.6, 0.6])

        def score(self, first, previous, current, instruction, fingers):
            return torch.tensor([next(self.scores)])

    env = VirtualEnv(make_model(), Script(), VirtualEnvConfig(horizon=9, stop=StopRule(confirm=2)), 1)
    env.reset(make_contexts(1))
    ends = [env.step(chunk)[1:3] for chunk in make_actions(1, 4)]
    assert [bool(terminated) for _, terminated in ends] == [False, False, False, True]
    assert [float(reward) for reward, _ in ends] == pytest.approx([0, 0, 0, 0.7])
    env.reset(make_contexts(1))
    assert [bool(env.step(chunk)[2]) for chunk in make_actions(1, 2)] == [False, True]


def test_memory_is_first_third_two_thirds_the_grip_and_last():
    class Spy(WorldModel):
        def predict_state(self, images, states, *_):
            return states[:, 1]

        def sample(self, memory, memory_states, next_state, actions, noise, task, scene):
            self.seen, self.scene = memory[:, :, 0, 0, 0, 0].tolist(), scene.tolist()
            return memory[:, -1] + 1  # frame t is filled with t

    model = Spy(TINY, CAMERAS, NORMALIZER)
    env = VirtualEnv(model, None, VirtualEnvConfig(horizon=12), 2)
    contexts = make_contexts(2)
    for scene, context in enumerate(contexts):
        context.images[:], context.scene = 0, 7 + scene
    env.reset(contexts)
    for chunk in make_actions(2, 10):
        obs, reward, terminated, truncated, info = env.step(chunk)
    assert model.scene == [7, 8] and model.seen == [[0, 3, 6, 1, 9]] * 2  # the fingers were closed from the first frame on
    assert info["score"].isnan().all() and not (terminated | truncated).any()


def test_a_rollout_remembers_what_was_seen_before_its_start_and_is_as_long_as_any_other():
    class Listener(NeverDone):
        def score(self, first, previous, current, instruction, fingers):
            self.first, self.fingers = first, fingers
            return super().score(first, previous, current, instruction, fingers)

    model, contexts, listener = make_model(), [*make_contexts(1), *make_contexts(1, seed=2, seen=6)], Listener()
    contexts[1].states = contexts[1].states + 0.001 * np.arange(6, dtype=np.float32)[:, None]
    env = VirtualEnv(model, listener, VirtualEnvConfig(horizon=3), 2)
    first, _ = env.reset(contexts)
    assert torch.equal(first["images"][1], torch.from_numpy(contexts[1].images[-1])) and env.time.tolist() == [0, 5]
    ends = [env.step(chunk)[3].tolist() for chunk in make_actions(2, 3)]
    assert ends == [[False, False], [False, False], [True, True]]
    assert torch.equal(listener.first[1], torch.from_numpy(contexts[1].images[0]))
    assert torch.equal(listener.fingers[1, 3:], finger_history(torch.from_numpy(contexts[1].states))[-1, :5])
    assert torch.equal(env.frames[1, :6], torch.from_numpy(contexts[1].images))
    short = replace(contexts[1], images=contexts[1].images[-1:], states=contexts[1].states[-1:])
    with_past, without = (play(VirtualEnv(model, None, VirtualEnvConfig(), 1), [start], make_actions(1, 1))[1]
                          for start in (contexts[1], short))
    assert not torch.equal(with_past, without)


def test_each_slot_is_imagined_in_its_tasks_scene():
    raised = Cameras(AGENTVIEW, CAMERAS.wrist, plane_z=0.1)
    actions, contexts = make_actions(2, 2), [replace(make_contexts(2)[0], task_id=task) for task in (1, 0)]
    mixed, low, high = (play(VirtualEnv(make_model(cameras=cameras), None, VirtualEnvConfig(), 2, group_size=2), contexts, actions)
                        for cameras in (Cameras.of_tasks([CAMERAS, raised]), CAMERAS, raised))
    assert torch.equal(mixed[:, 0], high[:, 0]) and torch.equal(mixed[:, 1], low[:, 1])
    assert not torch.equal(mixed[:, 0], low[:, 0])


def test_save_and_load_give_bit_equal_pictures(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path).eval()
    assert again.cameras == CAMERAS
    contexts, actions = make_contexts(2), make_actions(2, 2)
    one, two = (play(VirtualEnv(m, None, VirtualEnvConfig(), 2), contexts, actions) for m in (model, again))
    assert torch.equal(one, two)
    (tmp_path / "config.json").write_text('{"world_model": {"colour": 1}}')
    with pytest.raises(UserError):
        WorldModel.from_pretrained(tmp_path)
