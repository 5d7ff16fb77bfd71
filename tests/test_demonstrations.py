"""The scripted expert solves its task, and LIBERO's files are read as they are meant."""
import json
from contextlib import closing
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

import demonstrations
from expert import FINGER_DEPTH, FINGERTIP, Expert
from geometry import Camera, Cameras
from libero_env import RENDER_SIZE, LiberoTask
from runs import UserError


def write_official(path, T=20):
    """A file as LIBERO publishes it: row t has the picture after action t, upside down; one reward."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(0.1, 1, (T, 7))
    actions[:, 6] = np.where(np.arange(T) < 10, -1, 1)
    states = rng.normal(size=(T, 8))
    pictures = rng.integers(0, 256, (2, T, 128, 128, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick the milk"})
        for number in (10, 2):  # demo_10 comes first by name, second by number
            demo = data.create_group(f"demo_{number}")
            demo["actions"], demo["states"] = actions + 0.01 * (number == 10), rng.normal(size=(T, 50))
            demo["rewards"] = demo["dones"] = np.eye(1, T, T - 1, dtype=np.uint8)[0]
            demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = pictures
            for name, values in zip(("ee_pos", "ee_ori", "gripper_states"), np.split(states, [3, 6], axis=1)):
                demo[f"obs/{name}"] = values
    return actions, states, pictures


def test_every_kind_of_scene_is_built_once(monkeypatch):
    built = []

    class Scene:
        def __init__(self, suite, task_id):
            built.append(task_id)
            self.cameras = lambda: Cameras(Camera(45.0, [task_id, 0, 0], []), Camera(75.0, [0, 0, 0], []), task_id)

        reset = close = lambda self, **_: None
    monkeypatch.setattr(demonstrations, "LiberoTask", Scene)
    assert demonstrations.suite_cameras("libero_object").plane_z == 0 and built == [0]
    built.clear()
    planes = demonstrations.suite_cameras("libero_10").plane_z
    assert len(planes) == 10 and set(planes) == set(built) and len(built) == 3  # living room, kitchen, study
    assert [planes[task] for task in (0, 2, 3, 5)] == [0, 2, 2, 5]


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file["data"])


def replace(demo, name, values):
    del demo[name]
    demo[name] = values


def test_official_file_is_read_upright_and_each_frame_meets_the_action_that_follows_it(tmp_path):
    actions, states, pictures = write_official(tmp_path / "a.hdf5")
    first, second = demonstrations.read_demonstrations(tmp_path / "a.hdf5", task_id=3, limit=2)
    assert (first.instruction, first.task_id, first.stride, first.source) == ("pick the milk", 3, 1, "demo")
    assert np.allclose(first.actions, actions[1:]) and not np.allclose(second.actions, actions[1:])
    assert np.allclose(first.states, states) and len(first.images) == len(first.actions) + 1
    upright = pictures[:, :, ::-1].astype(float)  # (V, T, H, W, 3)
    mean = sum(upright[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)) / 4
    assert np.abs(first.images - np.moveaxis(mean, (0, 4), (1, 2))).max() <= 0.5
    assert first.success.tolist() == [False] * 10 + [True] * 10


def test_steps_that_command_nothing_are_dropped_but_for_a_new_gripper_command_and_fingers_that_still_move(tmp_path):
    actions, states, _ = write_official(tmp_path / "a.hdf5")
    actions[[5, 6, 10, 11, 12], :6] = 0  # the gripper's command changes at 10
    states[:, 6:] = 0.04 - 0.01 * (np.arange(20) >= 12)[:, None]  # action 12 sees frame 11 and leads to frame 12
    edit(tmp_path / "a.hdf5", lambda data: replace(data["demo_2"], "actions", actions))
    edit(tmp_path / "a.hdf5", lambda data: replace(data["demo_2"], "obs/gripper_states", states[:, 6:]))
    episode, = demonstrations.read_demonstrations(tmp_path / "a.hdf5", task_id=0, limit=1)
    kept = [t for t in range(1, 20) if t not in (5, 6, 11)]
    assert np.allclose(episode.actions, actions[kept])
    assert np.allclose(episode.states, states[[t - 1 for t in kept] + [19]])  # action t saw frame t - 1


@pytest.mark.parametrize("change", [
    lambda data: data.attrs.pop("problem_info"),
    lambda data: data["demo_2"].pop("rewards"),
    lambda data: data["demo_2"]["obs"].pop("eye_in_hand_rgb"),
    lambda data: replace(data["demo_2"], "actions", np.zeros((20, 6))),
    lambda data: replace(data["demo_2"], "obs/ee_pos", np.zeros((19, 3))),
    lambda data: replace(data["demo_2"], "obs/ee_pos", np.zeros((20, 2))),
    lambda data: replace(data["demo_2"], "obs/agentview_rgb", np.zeros((20, 128, 128), np.uint8)),
    lambda data: replace(data["demo_2"], "obs/agentview_rgb", np.zeros((20, 128, 128, 3), np.float32)),
    lambda data: data.pop("demo_10"),
])
def test_broken_file_is_one_clear_line(tmp_path, change):
    write_official(tmp_path / "a.hdf5")
    edit(tmp_path / "a.hdf5", change)
    with pytest.raises(UserError, match="a.hdf5") as error:
        demonstrations.read_demonstrations(tmp_path / "a.hdf5", task_id=0, limit=2)
    assert "\n" not in str(error.value)


def test_a_goal_that_the_expert_has_no_skill_for_is_one_clear_line(tmp_path, monkeypatch):
    world = SimpleNamespace(parsed_problem={"goal_state": [["turnoff", "flat_stove_1"]]})
    task = SimpleNamespace(env=SimpleNamespace(env=world), instruction="turn off the stove")
    monkeypatch.setattr(demonstrations, "LiberoTask", lambda *_: task)
    with pytest.raises(UserError, match="'turnoff'.*leave 39 out of --task_ids"):
        demonstrations.collect_demonstrations("libero_90", 39, 1, 0, tmp_path)


def test_missing_and_truncated_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        demonstrations.read_demonstrations(tmp_path / "a.hdf5", task_id=0)
    write_official(tmp_path / "a.hdf5")
    whole = (tmp_path / "a.hdf5").read_bytes()
    for part in (b"", whole[:1000], whole[:-1000]):
        (tmp_path / "a.hdf5").write_bytes(part)
        with pytest.raises(UserError, match="delete it"):
            demonstrations.read_demonstrations(tmp_path / "a.hdf5", task_id=0)


def test_expert_solves_a_fresh_placement_and_its_file_is_read_back(tmp_path, monkeypatch):
    task = LiberoTask("libero_object", 2)  # salad dressing: the tall bottle
    picture = np.zeros((2, RENDER_SIZE, RENDER_SIZE, 3), np.uint8)
    picture[:, 0] = 255  # a white top row; drawing true pictures takes 20 s
    monkeypatch.setattr(task, "render", lambda: picture)
    monkeypatch.setattr(demonstrations, "LiberoTask", lambda *_, **__: task)
    monkeypatch.setattr(task, "close", lambda: None)
    path = demonstrations.collect_demonstrations("libero_object", 2, 1, seed=7, folder=tmp_path)
    assert path == tmp_path / "pick_up_the_salad_dressing_and_place_it_in_the_basket_demo.hdf5"
    assert list(tmp_path.iterdir()) == [path]  # the temporary file is gone
    episode, = demonstrations.read_demonstrations(path, 2, limit=1)
    assert 80 < len(episode.actions) < 200 and np.abs(episode.actions).max() <= 1
    pushed = (episode.executed != episode.actions).any(1)
    assert 0.02 < pushed.mean() < 0.5 and np.abs(episode.executed).max() <= 1
    moved = np.diff(episode.states[:, :3], axis=0)  # it went where it was told, not where the expert wanted
    told, wanted = (np.abs(moved[2:] - np.linalg.lstsq(a, moved[2:], rcond=None)[0].T.dot(a.T).T).mean() for a in (
        np.hstack([x[2:, :3], x[1:-1, :3], x[:-2, :3]]) for x in (episode.executed, episode.actions)))
    assert told < 0.7 * wanted
    assert not episode.success[0] and episode.success[-demonstrations.DONE_STEPS:].all()
    assert (episode.images[:, :, :, 0] == 128).all() and (episode.images[:, :, :, 1:] == 0).all()
    task.reset(seed=7000)
    assert np.allclose(episode.states[0], task.state(), atol=2e-3)  # the first frame is the start
    task.env.close()


@pytest.mark.parametrize("suite, task_id, kind, seed", [
    ("libero_spatial", 2, "on", 0), ("libero_goal", 0, "open", 0), ("libero_goal", 7, "turnon", 0), ("libero_10", 9, "close", 0),
    ("libero_spatial", 6, "on", 1001)])  # the last: a bowl so far away that at its outer rim the arm would be straight
def test_expert_does_one_task_of_each_kind(suite, task_id, kind, seed):
    task = LiberoTask(suite, task_id)
    try:
        assert kind in [goal[0] for goal in task.env.env.parsed_problem["goal_state"]]
        rows = demonstrations.expert_episode(task, seed, render=False)
        assert rows is not None and rows["rewards"][-demonstrations.DONE_STEPS:].all() and not rows["rewards"][0]
    finally:
        task.close()


def looking(task, seed):
    """An expert that has looked at a fresh placement once."""
    task.reset(seed=seed)
    expert = Expert(task, np.random.default_rng(seed))
    expert.action()
    return expert


def test_expert_grips_a_can_in_its_middle_for_at_its_edge_it_slips():
    with closing(LiberoTask("libero_object", 0)) as task:
        expert = looking(task, 0)
        (_, can, basket), = expert.goals
        grip, _, free = expert.grip(can, basket)
        points = expert.cloud[can][:, :2]
        assert free and np.abs(grip[:2] - (points.min(0) + points.max(0)) / 2).max() < 0.005


def test_expert_always_grips_the_same_side_of_a_bowl_for_a_clone_of_both_goes_in_between():
    with closing(LiberoTask("libero_goal", 4)) as task:
        sides = []
        for seed in range(10):
            expert = looking(task, seed)
            (_, bowl, cabinet), = expert.goals
            sides.append((expert.grip(bowl, cabinet)[0] - expert.origin(bowl))[1])
        assert min(sides) > 0.03, f"{np.round(sides, 3)}: its rim is 5 cm from its middle"


def test_expert_grips_a_packet_across_and_its_palm_comes_no_lower_than_the_rim_of_the_bowl_beside_it():
    with closing(LiberoTask("libero_goal", 6)) as task:
        expert = looking(task, 0)
        (_, packet, bowl), = expert.goals
        grip, yaw, _ = expert.grip(packet, bowl)
        bottom, top = expert.cloud[packet][:, 2].min(), expert.cloud[packet][:, 2].max()
        assert abs(yaw) < 0.3, "the packet is 43 mm wide across, 81 mm along: at 45 degrees its corners are gripped"
        assert grip[2] + FINGER_DEPTH > expert.cloud[bowl][:, 2].max() - 0.003 and bottom < grip[2] - FINGERTIP < top - 0.01
