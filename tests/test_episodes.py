"""Promises of recorded data: chunks line up, batches pair what belongs together, files are whole or refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from episodes import ChunkData, CloneData, Episode, Normalizer, finger_history, joined, memory_index
from runs import UserError
from starts import start_pools


def make_episode(steps=40, stride=1, chunk=8, seed=0):
    """Frame i is filled with the control step it was drawn at; action i holds i in every motion dimension."""
    frames = steps // stride + 1
    images = np.broadcast_to((np.arange(frames) * stride).astype(np.uint8)[:, None, None, None, None],
                             (frames, 2, 3, 4, 4)).copy()
    states = np.repeat(np.arange(frames, dtype=np.float32)[:, None] * stride, 8, axis=1)
    actions = np.repeat(np.arange(steps, dtype=np.float32)[:, None], 7, axis=1)
    return Episode(images, states, actions, np.arange(frames) * stride >= steps - 8, stride, 3, "pick it up", "demo", seed)


@pytest.mark.parametrize("stride, offset", [(1, 0), (1, 5), (8, 0)])
def test_chunks_pair_frames_with_the_actions_between_them(stride, offset):
    track = make_episode(stride=stride).chunks(8, offset)
    assert len(track.images) == len(track.states) == len(track.success) == len(track.actions) + 1
    for t, chunk in enumerate(track.actions):
        assert track.images[t, 0, 0, 0, 0] == offset + 8 * t == chunk[0, 0]
        assert chunk[-1, 0] == offset + 8 * t + 7
    assert track.before[:, 0].tolist() == [0] * (8 - offset) + [*range(offset)]
    previous = ChunkData([make_episode(stride=stride)], 8, "cpu").transitions([(offset, 0), (offset, 1)])[1]  # track = offset
    assert previous[:, :, 0].tolist() == [track.before[:, 0].tolist(), [*range(offset, offset + 8)]]


def test_the_world_learns_what_was_executed_and_the_policy_what_was_wanted():
    episode = make_episode(stride=8)
    episode.executed = episode.actions + 100
    assert ChunkData([episode], 8, "cpu").pictures([(0, 0)])["actions"][0, :, 0].tolist() == list(range(100, 108))
    batch = CloneData([episode], Normalizer([-1.0] * 7, [1.0] * 7, [-1.0] * 8, [1.0] * 8), 8, "cpu").batch(
        4, torch.Generator().manual_seed(0))
    assert batch["actions"].max() < 100


def test_a_world_batch_pairs_memory_and_next_frame_with_the_chunks_around_them():
    data = ChunkData([make_episode(stride=8)], 8, "cpu")
    batch = data.pictures([(0, 4), (0, 0)])
    assert batch["memory"][:, :, 0, 0, 0, 0].tolist() == [[0, 8, 16, 8, 32], [0] * 5]  # frames 0, 1, 2, 1, 4
    assert batch["memory_states"][:, :, 0].tolist() == [[0, 8, 16, 8, 32], [0] * 5]
    assert batch["target"][:, 0, 0, 0, 0].tolist() == batch["next_state"][:, 0].tolist() == [40, 8]
    assert batch["actions"][:, 0, 0].tolist() == [32, 0]
    assert data.transitions([(0, 4), (0, 0)])[1][:, 7, 0].tolist() == [31, 0], "the chunks before"
    many = data.world_batch(3, torch.Generator().manual_seed(0), transitions=50)
    assert len(many["target"]) == 3
    assert {value.shape[:2] for value in many["transitions"]} == {(3, 16)}
    state, previous, actions, after = (value.flatten(0, 1) for value in many["transitions"])
    assert torch.equal(after[:, 0] - state[:, 0], torch.full((48,), 8.0))
    assert torch.equal(actions[:, 0, 0], state[:, 0]) and torch.equal(previous[:, 0, 0], (state[:, 0] - 8).clamp(min=0))


def test_from_an_imagined_copy_the_simulator_learns_the_true_next_picture():
    empty, true = make_episode(steps=4, stride=4), make_episode(stride=1)
    copies = [replace(true, images=true.images[::8] + 100, states=true.states[::8], success=true.success[::8], stride=8)]
    batch = ChunkData([empty, *copies], 8, "cpu", truth=[empty, true]).pictures([(0, 4)])  # the empty one is left out
    assert batch["memory"][0, :, 0, 0, 0, 0].tolist() == [100, 108, 116, 108, 132]
    assert batch["target"][0, 0, 0, 0, 0] == 40 == batch["next_state"][0, 0]


def test_a_batch_tells_whose_scene_a_row_is_of():
    data = ChunkData([replace(make_episode(stride=8), task_id=task, states=np.full((6, 8), task, np.float32))
                      for task in (2, 5)], 8, "cpu")
    for batch, states in ((data.world_batch(9, torch.Generator().manual_seed(0)), "next_state"),
                          (data.grasp_batch(9, torch.Generator().manual_seed(0)), "next_state")):
        assert batch["task"].tolist() == batch[states][:, 0].tolist() and len(batch["task"].unique()) == 2
    picks = [(0, 1), (1, 0)]
    assert data.pictures(picks)["scene"].tolist() == [context.scene for context in data.starts(picks)] == [2_000_000_000, 5_000_000_000]
    taken_up, other = replace(data.episodes[0], past=1), replace(data.episodes[0], seed=4)
    assert taken_up.scene == data.episodes[0].scene != other.scene


def test_two_batches_are_joined_row_by_row():
    data, generator = ChunkData([make_episode(stride=8)], 8, "cpu"), torch.Generator().manual_seed(0)
    one, two = data.world_batch(2, generator, transitions=6), data.world_batch(3, generator, transitions=9)
    both = joined(one, two)
    assert torch.equal(both["memory"], torch.cat([one["memory"], two["memory"]]))
    assert [value.shape[:2] for value in both["transitions"]] == [(5, 3)] * 4
    assert joined({"words": ["a"]}, {"words": ["b", "c"]}) == {"words": ["a", "b", "c"]}


def test_an_episode_is_cut_at_every_offset_that_it_has_frames_of():
    for stride in (1, 4, 8):
        data = ChunkData([make_episode(stride=stride)], 8, "cpu")
        assert [track.images[0, 0, 0, 0, 0] for track in data.tracks] == list(range(0, 8, stride))
        assert all((np.diff(track.images[:, 0, 0, 0, 0]) == 8).all() for track in data.tracks)
    assert len(ChunkData([make_episode(stride=4)], 8, "cpu", every_offset=False).tracks) == 1


def test_an_episode_taken_up_again_remembers_its_past_and_teaches_what_came_after(tmp_path):
    whole, later = make_episode(stride=8), make_episode(stride=8)
    for name in ("images", "states", "actions"):
        getattr(later, name)[:] += 100
    assert make_episode(stride=4).until(16).images[:, 0, 0, 0, 0].tolist() == [0, 4, 8, 12, 16]
    again = whole.until(16).followed_by(later)
    assert again.images[:, 0, 0, 0, 0].tolist() == again.states[:, 0].tolist() == [0, 8, *range(100, 141, 8)]
    assert again.actions[:, 0].tolist() == [*range(16), *range(100, 140)] and again.success.tolist() == [False] * 6 + [True] * 2
    assert again.achieved and whole.achieved and not whole.until(24).achieved
    assert not replace(again, past=6).achieved, "it was, before the episode was taken up again"
    again.save(tmp_path / "again.npz")
    data = ChunkData([Episode.load(tmp_path / "again.npz")], 8, "cpu")
    assert data.frames == [(0, t) for t in range(2, 8)] and data.index == [(0, t) for t in range(2, 7)]
    assert CloneData([again], None, 8, "cpu").index == data.index
    assert all(t >= 2 for pool in start_pools(data).values() for _, t in pool)
    assert data.starts([(0, 3)])[0].images[:, 0, 0, 0, 0].tolist() == [0, 8, 100, 108]
    assert data.pictures([(0, 6)])["memory"][0, [0, 1, 2, -1], 0, 0, 0, 0].tolist() == [0, 100, 116, 132]


def test_memory_holds_the_first_and_the_last_frame_and_the_one_after_the_fingers_closed():
    states = torch.zeros(4, 12, 8)
    states[:, :, 6] = 0.08
    states[1:, 4:, 6] = 0.02  # closed from frame 4 on
    states[3, 7:9, 6] = 0.08  # the last one opens them again in between
    indices = memory_index(torch.tensor([9, 9, 4, 9]), states).tolist()
    assert indices == [[0, 3, 6, 9, 9], [0, 3, 6, 5, 9], [0, 1, 2, 4, 4], [0, 3, 6, 9, 9]]
    assert memory_index(torch.tensor([0, 1]), states[:2]).tolist() == [[0] * 5, [0, 0, 0, 1, 1]]
    assert memory_index(torch.tensor([6]), states[3:]).tolist() == [[0, 2, 4, 5, 6]], "what comes later does not count"


def test_the_fingers_history_is_newest_first_and_begins_with_the_first_frame():
    states = torch.zeros(2, 12, 8)
    states[:, :, 6] = torch.arange(12.0)
    states[:, :, 7] = -torch.arange(12.0)
    history = finger_history(states)
    assert history.shape == (2, 12, 8)
    assert history[1, 2].tolist() == [4, 2, 0, 0, 0, 0, 0, 0] and history[1, 11].tolist() == [22, 20, 18, 16, 14, 12, 10, 8]


def test_a_reflector_batch_draws_all_frames_evenly_and_labels_the_last_of_three():
    batch = ChunkData([make_episode(stride=8)], 8, "cpu").frame_batch(600, torch.Generator().manual_seed(0))
    first, previous, current = batch["frames"][:, :, 0, 0, 0, 0].T
    assert torch.equal(batch["labels"] > 0.5, current >= 32)
    assert (first == 0).all() and torch.equal(previous.int(), (current.int() - 8).clamp(min=0))
    assert all(60 < (current == 8 * t).sum() < 140 for t in range(6)), "the last frame counts as the others do"
    assert batch["fingers"].shape == (600, 8) and not batch["fingers"].any()  # as in these states


def test_half_of_a_reflector_batch_is_from_where_the_fingers_have_just_opened():
    episode = make_episode(steps=160, stride=8)
    episode.states[:] = np.where((np.arange(21) < 5) | (np.arange(21) > 9), 0.08, 0.0)[:, None] * np.eye(8)[6]
    batch = ChunkData([episode], 8, "cpu").frame_batch(2000, torch.Generator().manual_seed(0))
    frame = batch["frames"][:, 2, 0, 0, 0, 0] // 8
    assert 1080 < ((frame >= 10) & (frame <= 13)).sum() < 1300  # half, and 4 of 21 of the other half
    assert (torch.bincount(frame, minlength=21)[[0, 4, 9, 14, 20]] > 20).all()


def test_a_quarter_of_the_pictures_to_learn_is_of_what_the_fingers_have_just_let_go():
    episode = make_episode(steps=160, stride=8)
    episode.states[:] = np.where((np.arange(21) < 5) | (np.arange(21) > 9), 0.08, 0.0)[:, None] * np.eye(8)[6]
    batch = ChunkData([episode], 8, "cpu").world_batch(2000, torch.Generator().manual_seed(0))
    frame = batch["target"][:, 0, 0, 0, 0] // 8
    assert 720 < ((frame >= 10) & (frame <= 13)).sum() < 880  # a quarter, and 4 of 20 of the other three
    assert (torch.bincount(frame, minlength=21)[[1, 4, 9, 14, 20]] > 40).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_chunk_that_runs_over_the_end_is_marked_invalid(stride):
    episode = make_episode(steps=10, stride=stride)
    normalizer = Normalizer.fit([episode])
    data = CloneData([episode], normalizer, 8, "cpu")
    batch = data.batch(64, torch.Generator().manual_seed(0))
    start = batch["state"][:, 0]
    assert torch.equal(batch["valid"].sum(1).float(), (10 - start).clamp(max=8))
    actions = normalizer.unnormalize_action(batch["actions"])[:, 0, 0]
    assert torch.allclose(actions, start, atol=1e-4)


def test_normalising_is_undone_and_leaves_the_gripper_alone():
    actions = np.random.default_rng(0).normal(size=(1, 500, 7)).astype(np.float32)
    actions[..., 6] = np.sign(actions[..., 6])
    episode = make_episode(steps=500)
    episode.actions = actions[0]
    normalizer = Normalizer.fit([episode])
    normal = normalizer.normalize_action(torch.from_numpy(actions))
    assert torch.equal(normal[..., 6], torch.from_numpy(actions[..., 6]))
    assert 0.95 < (normal[..., :6].abs() <= 1).float().mean() < 0.995
    assert np.allclose(normalizer.unnormalize_action(normal).numpy(), actions, atol=1e-5)
    assert Normalizer.from_dict(normalizer.to_dict()) == normalizer


def test_an_episode_comes_back_as_it_was_saved_and_a_truncated_one_is_refused(tmp_path):
    episode, path = make_episode(), tmp_path / "e.npz"
    episode.save(path)
    loaded = Episode.load(path)
    assert all(np.array_equal(getattr(episode, name), getattr(loaded, name)) for name in episode.__dataclass_fields__)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="not a whole episode"):
        Episode.load(path)


def test_half_of_a_grasp_batch_is_of_fingers_that_close_and_have_not_come_to_rest():
    episode = make_episode(steps=64, stride=8)
    apart = np.array([0.08, 0.08, 0.05, 0.03, 0.03, 0.03, 0.03, 0.08, 0.08], np.float32)
    episode.states[:] = apart[:, None] * np.eye(8)[6]
    episode.executed[:, 6] = np.repeat([-1, 1, 1, 1, 1, 1, -1, -1], 8)
    demonstrated, episode.temperature = replace(episode), 2.0
    data = ChunkData([demonstrated, episode], 8, "cpu")
    assert data.grasping == [(1, 1), (1, 2), (1, 3)], "of exploration alone"
    before = data.grasp_batch(400, torch.Generator().manual_seed(0))["states"][:, 1, 6]
    count = torch.isclose(before, torch.tensor(0.05)).sum()  # frame 2 alone
    assert 72 < count < 115, "a third of one half, an eighth of the other"
    episode.executed[:, 6] = -1
    assert len(ChunkData([episode], 8, "cpu").grasp_batch(4, torch.Generator())["states"]) == 4, "fingers that never close"
