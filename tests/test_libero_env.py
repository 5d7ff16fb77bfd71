"""Promises of the true simulator. One simulator is built for the whole file."""
import contextlib
import multiprocessing

import numpy as np
import pytest
import torch

from episodes import Episode, finger_history
from geometry import camera_pose, opening, project
from kinematics import free_opening
from libero_env import LiberoTask, LiberoVectorEnv, initial_states, load_suite, merge_vertices, shrink, step_limit
from reflector import StopRule
from runs import UserError
from starts import LiberoContext


@pytest.fixture(scope="module")
def task():
    task = LiberoTask("libero_object", 0)
    yield task
    task.close()


def play(task, actions):
    return [(task.step(action), task.state())[1] for action in actions]


def test_an_initial_state_gives_the_same_trajectory_whatever_was_played_before(task):
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 7))
    state = initial_states("libero_object", 0)[3]
    task.reset(seed=0, init_state=state)
    first = play(task, actions)
    play(task, np.tile([1, -1, -1, 1, 1, 1, 1.0], (30, 1)))  # leaves the controller with a turned goal, the hand closed
    task.reset(seed=1, init_state=state)
    assert np.array_equal(play(task, actions), first)


def test_the_benchmarks_fixtures_stand_where_no_placement_has_them():
    """Episode i of the benchmark and placement i would else share where the cabinet stands."""
    task = LiberoTask("libero_goal", 0)

    def stands():
        return [task.env.sim.model._model.body(fixture.root_body).pos.copy() for fixture in task.env.env.fixtures_dict.values()]
    try:
        task.reset(seed=0)
        placed = stands()
        task.reset(seed=0, init_state=initial_states("libero_goal", 0)[0])
        moved = [np.abs(a - b).max() for a, b in zip(placed, stands())]
        assert max(moved) > 1e-4, moved
        task.reset(seed=0)
        assert all(np.array_equal(a, b) for a, b in zip(placed, stands()))
    finally:
        task.close()


def test_a_control_step_is_robosuites_to_the_bit(task):
    actions = np.random.default_rng(1).uniform(-1, 1, (12, 7))
    data = task.env.sim.data
    task.reset(seed=3)
    ours = [(task.step(action), data.qpos.copy(), data.qvel.copy(), task.state())[1:] for action in actions]
    task.reset(seed=3)
    for action, mine in zip(actions, ours):
        task.env.step(action)
        assert all(np.array_equal(a, b) for a, b in zip(mine, (data.qpos, data.qvel, task.state())))


def test_leaving_out_what_is_not_in_view_changes_no_pixel(task, monkeypatch):
    rng, left_out = np.random.default_rng(2), 0
    task.reset(seed=4)
    task.render()
    model, update = task.env.sim.model._model, task._renderer.update_scene

    def counted(*arguments):
        nonlocal left_out
        left_out += int((model.geom_group == 3).sum())
        update(*arguments)
    for _ in range(4):
        play(task, rng.uniform(-1, 1, (6, 7)) * [1, 1, 1, 0.5, 0.5, 0.5, 1])
        monkeypatch.setattr(task._renderer, "update_scene", counted)
        fewer = task.render()
        with monkeypatch.context() as patch:
            patch.setattr(task, "_unseen_hidden", lambda camera: contextlib.nullcontext())
            assert np.array_equal(fewer, task.render())
    assert left_out > 50 and not (model.geom_group == 3).any()


def test_a_state_of_another_scene_is_refused(task):
    with pytest.raises(UserError, match="do not fit"):
        task.reset(init_state=np.zeros(58))


def test_seeds_place_objects_and_the_same_seed_places_them_the_same(task):
    def positions(seed):
        task.reset(seed=seed)
        return task.env.sim.data.qpos.copy()
    assert np.array_equal(positions(1), positions(1))
    assert not np.allclose(positions(1), positions(2), atol=1e-4)


def test_the_step_counter_does_not_run_over(task):
    for _ in range(3):
        task.reset(seed=0)
        task.env.env.timestep = 900  # robosuite raises at 1,000 unless a reset came before
        play(task, np.zeros((5, 7)))


def test_actions_move_the_hand_and_the_gripper(task):
    task.reset(seed=0)
    before = task.state()
    after = play(task, np.tile([1, 0, 0, 0, 0, 0, 1.0], (16, 1)))[-1]
    assert after[0] - before[0] > 0.08 and abs(after[1] - before[1]) < 0.02
    assert before[6] - before[7] > 0.07 and after[6] - after[7] < 0.01


def test_free_fingers_are_where_kinematics_says(task):
    """Within 2.5 mm after every chunk, at whatever step of it they are told to close or to open."""
    task.reset(seed=0)
    commands = np.concatenate([[-1] * 8 + [-1] * k + [1] * 16 + [-1] * (8 - k) for k in range(8)])
    chunks = np.zeros((len(commands) // 8, 8, 7), np.float32)
    chunks[:, :, 6] = commands.reshape(-1, 8)
    before, apart = np.zeros_like(chunks[0]), opening(torch.from_numpy(task.state())[None])
    for chunk in chunks:
        foreseen = free_opening(apart, *(torch.from_numpy(actions)[None] for actions in (before, chunk)))
        apart, before = opening(torch.from_numpy(play(task, chunk)[-1])[None]), chunk
        assert (foreseen - apart).abs() < 0.0025


def test_the_projected_gripper_lies_on_the_grippers_pixels_in_both_views(task):
    task.reset(seed=0)
    cameras, mujoco = task.cameras(), pytest.importorskip("mujoco")
    task.render()
    model, data = task.env.sim.model._model, task.env.sim.data._data
    hand = [geom for geom in range(model.ngeom) if model.body(model.geom_bodyid[geom]).name.endswith("finger")]
    renderer = mujoco.Renderer(model, 128, 128)
    renderer.enable_segmentation_rendering()
    for moves in ([0.0] * 3, [1.0, 1.0, 0.0], [0.5, -1.0, 0.3]):  # in free air: nothing pushes a finger aside
        play(task, np.tile([*moves, 0, 0, 0, -1.0], (12, 1)))
        state = torch.from_numpy(task.state())[None]
        for name, camera, on_hand in (("agentview", cameras.agentview, False),
                                      ("robot0_eye_in_hand", cameras.wrist, True)):
            renderer.update_scene(data, name)
            numbers, kinds = np.moveaxis(renderer.render(), -1, 0)
            rows, columns = np.nonzero(np.isin(numbers, hand) & (kinds == mujoco.mjtObj.mjOBJ_GEOM))  # drawn fingers
            where, _ = project(state[:, None, :3], camera, camera_pose(camera, state, on_hand))
            x, y = ((where[0, 0] + 1) / 2 * 128).tolist()
            # The gripper's origin lies between the finger tips, in the middle of the fingers' pixels.
            assert abs(columns.mean() + 0.5 - x) < 4 and abs(rows.mean() + 0.5 - y) < 8, (name, moves, x, y)
    renderer.close()


def test_merged_vertices_draw_nearly_the_same_picture_with_far_fewer_triangles(task):
    task.reset(seed=0)
    standard, model = task.render().astype(float), task.env.sim.model._model
    arrays = [getattr(model, name) for name in ("mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")]
    before = [array.copy() for array in arrays]
    merge_vertices(model, 0.006)
    assert model.mesh_facenum.sum() < 0.45 * before[3].sum()
    renderer, task._renderer = task._renderer, None
    merged = task.render().astype(float)
    task._renderer.close()
    for array, values in zip(arrays, before):
        array[:] = values
    task._renderer = renderer
    assert 0 < np.abs(merged - standard).mean() < 3


def test_frames_are_upright_and_averaged_down(task):
    task.reset(seed=0)
    frames = task.render()
    # The agent view looks along a brown floor at a grey wall, which is at the top of an upright picture.
    top, bottom = frames[0, :12].astype(float), frames[0, -12:].astype(float)
    assert np.ptp(top.mean((0, 1))) < np.ptp(bottom.mean((0, 1)))
    small = shrink(frames, 64)
    assert small.shape == (2, 3, 64, 64) and small.dtype == np.uint8
    assert abs(small[0, :, 0, 0].astype(float) - frames[0, :2, :2].reshape(4, 3).mean(0)).max() <= 0.5
    with pytest.raises(UserError, match="divisor"):
        shrink(frames, 50)


class Listener:
    """A reflector that keeps what it is told of the fingers."""

    def __init__(self):
        self.told = []

    def score(self, first, previous, current, instruction, fingers):
        self.told.append(fingers[0])
        return torch.zeros(1)


def test_an_episode_is_taken_up_again_where_its_history_ends_and_is_cut_off_in_time():
    listener = Listener()
    env = LiberoVectorEnv("libero_object", 1, mesh_cell=0.006, reflector=listener, stride=4)
    try:
        actions = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, 8, 7)))
        frames = [env.reset([LiberoContext(0, seed=5)])[0]] + [env.step(actions[:, t])[0] for t in range(3)]
        states = torch.stack([obs["state"][0] for obs in frames])
        assert torch.equal(torch.stack(listener.told), finger_history(states)[1:]) and listener.told[2].unique().numel() > 2
        images, recorded, held = env.recorded(0, 3)
        assert len(images) == len(recorded) == 7 and len(held) == 6 and not held.any(), "two frames a chunk"
        assert np.array_equal(recorded[::2], states.numpy()) and (images[::2] == torch.cat([obs["images"] for obs in frames]).numpy()).all()
        assert all(0.2 < np.linalg.norm(b - a) / np.linalg.norm(c - a) < 0.8
                   for a, b, c in zip(recorded[::2, :3], recorded[1::2, :3], recorded[2::2, :3])), "halfway"
        steps = actions[0].flatten(0, 1).numpy()
        history = Episode(images, recorded, steps, np.zeros(7, bool), 4, 0, "", "explore", 5).until(16)
        again, _ = env.reset([LiberoContext(0, seed=5, history=history, max_steps=8)])
        after, _, terminated, truncated, _ = env.step(actions[:, 2])
        for obs, t in ((again, 2), (after, 3)):
            assert torch.allclose(obs["state"], frames[t]["state"], atol=1e-4) and (
                obs["images"].int() - frames[t]["images"].int()).abs().float().mean() < 0.5
        assert truncated[0] and not terminated[0]
    finally:
        env.close()


def test_unknown_names_are_one_clear_line_that_lists_the_known_ones():
    with pytest.raises(UserError, match="libero_goal, libero_object"):
        load_suite("libero_objects")
    with pytest.raises(UserError, match="no initial states for libero_object_temp"):
        initial_states("libero_object_temp", 0)
    with pytest.raises(UserError, match="0 to 9"):
        LiberoTask("libero_object", 10)
    assert step_limit("libero_object") == step_limit("libero_object_swap") == 280 and step_limit("libero_10") == 520
    assert step_limit("libero_spatial", 0, 8) == 216 and step_limit("libero_spatial", 30) == 30, "whole chunks; a limit of one's own"


def test_seeded_resets_put_things_on_their_fixture_again_and_again():
    task = LiberoTask("libero_spatial", 9)  # the bowl on the cabinet
    try:
        for seed in (0, 1):
            task.reset(seed=seed)
            bowl = task.env.sim.data.get_body_xpos("akita_black_bowl_1_main")
            top = task.env.sim.data.get_site_xpos("wooden_cabinet_1_top_side")
            assert np.abs(bowl - top)[:2].max() < 0.13 and abs(bowl[2] - top[2]) < 0.01
    finally:
        task.close()


class Simulators:
    """In the place of a process's pipe: the goal holds after the first of 4 chunks, and never again."""

    def __init__(self):
        self.said = iter([None, True, False, False, False])

    def send(self, message):
        pass

    def recv(self):
        frame, held = (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(8, np.float32)), next(self.said)
        return "done", (*frame, "") if held is None else (*(part[None] for part in frame), np.array([held] * 8))


class Second:
    """A reflector that is sure from the second frame on."""

    def __init__(self):
        self.scores = iter([0.0, 1.0, 1.0, 1.0])

    def score(self, *observed):
        return torch.tensor([next(self.scores)])


@pytest.mark.parametrize("stop, chunks, reward, ended", [("oracle", 1, 1, True), ("self", 3, 0, True), ("both", 3, 1, True),
                                                         ("none", 4, 0, False)])
def test_an_episode_ends_where_its_stop_says(stop, chunks, reward, ended):
    env = LiberoVectorEnv("libero_object", 0, 4, 8, 32, stop, reflector=Second(), rule=StopRule(confirm=2))
    env.num_envs, env._pipes, env._slots = 1, [Simulators()], [None]
    env.reset([LiberoContext(0, seed=0)])
    for played in range(1, 5):
        _, rewards, terminated, truncated, _ = env.step(torch.zeros(1, 8, 7))
        if terminated[0] or truncated[0]:
            break
    assert (played, rewards[0], bool(terminated[0]), bool(truncated[0])) == (chunks, reward, ended, not ended)


@pytest.mark.parametrize("command", [["recv"], ["send", "chunk"]])
def test_a_simulator_that_died_is_one_clear_line(command):
    here, there = multiprocessing.Pipe()
    there.close()
    env = object.__new__(LiberoVectorEnv)
    env._pipes = [here]
    with pytest.raises(UserError, match="simulator process 0 died.*run the same command"):
        env._pipe(0, *command)
