"""Promises of geometry.py."""

import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import geometry
from geometry import Camera, Cameras, action_map, camera_pose, pixel_grid, project, ray_map, seen_on_plane, warp_wrist

torch.set_num_threads(1)
AGENTVIEW = Camera(45.0, [0.9, 0.0, 0.65], [[0.0, -0.6, 0.8], [1.0, 0.0, 0.0], [0.0, 0.8, 0.6]])
WRIST = Camera(75.0, [0.05, 0.0, -0.097], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


def states(B, seed=0, tilt=0.1):
    """Hands above the table that point down, slightly tilted, half open."""
    g = torch.Generator().manual_seed(seed)
    position = torch.tensor([0.0, 0.0, 0.3]) + 0.05 * torch.randn(B, 3, generator=g)
    turn = tilt * torch.randn(B, 3, generator=g)
    down = torch.tensor([[0.0, 0, 0, math.pi, 0, 0, 0, 0]]).expand(B, 8)
    fingers = torch.tensor([[0.02, -0.02]]).expand(B, 2)
    return torch.cat([position, geometry.turn_state(down, turn), fingers], dim=1)


def photograph(state, camera=WRIST, H=96, wavelength=0.25):
    """What a camera sees of a smooth pattern painted on the table z = 0: (B, 3, H, H)."""
    position, rotation = camera_pose(camera, state, on_hand=camera is WRIST)
    scale = math.tan(math.radians(camera.fovy) / 2)
    image = torch.empty(len(state), 3, H, H)
    for b in range(len(state)):
        for row, line in enumerate(pixel_grid(H, state.device)):
            ray = torch.stack([line[:, 0] * scale, -line[:, 1] * scale, -torch.ones(H)], -1) @ rotation[b].T
            x, y, _ = (2 * math.pi / wavelength * (position[b] - ray * position[b, 2] / ray[:, 2:])).T
            image[b, :, row] = torch.stack([x.sin(), y.sin(), (x + y).cos()])
    return image


def test_rotations_agree_with_matrix_exponential():
    vector = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * 2
    skew = torch.zeros(64, 3, 3)
    skew[:, 0, 1], skew[:, 0, 2], skew[:, 1, 2] = -vector[:, 2], vector[:, 1], -vector[:, 0]
    expected = torch.linalg.matrix_exp(skew - skew.transpose(1, 2))
    assert torch.allclose(geometry.rotation_matrix(vector), expected, atol=1e-5)
    tiny = torch.full((1, 3), 1e-9)
    assert torch.allclose(geometry.rotation_matrix(tiny), torch.eye(3)) and torch.allclose(
        geometry.axis_angle(geometry.quaternion(tiny)), tiny)


def test_turns_compose_and_come_back():
    state, other = states(32, 0, tilt=0.5), states(32, 1, tilt=0.5)
    turn = geometry.turn_between(state, other)
    expected = geometry.rotation_matrix(turn) @ geometry.rotation_matrix(state[:, 3:6])
    assert torch.allclose(geometry.rotation_matrix(other[:, 3:6]), expected, atol=1e-5)
    after = geometry.rotation_matrix(geometry.turn_state(state, turn))
    assert torch.allclose(after, expected, atol=1e-5)


def test_axis_angle_is_continuous_through_norm_pi():
    state = torch.tensor([[0.0, 0, 0.3, math.pi - 0.05, 0, 0, 0.02, -0.02]])
    path = [state[:, 3:6].clone()]
    for _ in range(20):  # turns the hand on through pi, 0.1 rad in all
        state[:, 3:6] = geometry.turn_state(state, torch.tensor([[0.005, 0.001, 0.0]]))
        path.append(state[:, 3:6].clone())
    path = torch.cat(path)
    assert (path[1:] - path[:-1]).norm(dim=1).max() < 0.01 and path[-1].norm() > math.pi + 0.03


def test_projection_matches_pinhole_by_hand():
    camera = Camera(90.0, [0, 0, 2], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])  # above the origin, looking down
    points = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 3.0]]])
    where, depth = project(points, camera, camera_pose(camera, torch.zeros(1, 8), on_hand=False))
    assert torch.allclose(where[0, :3], torch.tensor([[0.0, 0], [0.5, 0], [0, -0.5]]))  # y up = a smaller row
    assert torch.allclose(depth[0], torch.tensor([2.0, 2, 2, -1]))


def test_wrist_camera_rides_on_the_hand():
    state = torch.tensor([[0.1, 0.2, 0.5, math.pi, 0, 0, 0, 0]])  # pointing down: hand's z = world's -z
    position, rotation = camera_pose(WRIST, state, on_hand=True)
    assert torch.allclose(position, torch.tensor([[0.15, 0.2, 0.597]]), atol=1e-5)
    assert torch.allclose(rotation[0, :, 2], torch.tensor([0.0, 0, 1]), atol=1e-5)  # looks along -z: down


def test_a_point_on_the_plane_keeps_its_colour_under_the_warp():
    before, after = states(4, 0), states(4, 1)
    old, new = photograph(before), photograph(after)
    warped, visible = warp_wrist(old, before, after, WRIST, 0.0)
    inside = visible.bool().expand_as(new)
    assert 0.3 < visible.mean() < 1
    assert (warped - new)[inside].abs().max() < 0.1 and (old - new).abs().mean() > 0.3


def test_the_wrist_camera_would_see_the_same_plane_in_the_agent_view():
    state = states(4, 2)
    from_above, seen_by_hand = photograph(state, AGENTVIEW), photograph(state)
    warped, visible = seen_on_plane(from_above, AGENTVIEW, camera_pose(AGENTVIEW, state, on_hand=False), state, WRIST, 0.0)
    inside = visible.bool().expand_as(warped)
    assert visible.mean() > 0.9 and (warped - seen_by_hand)[inside].abs().max() < 0.1
    assert (from_above - seen_by_hand).abs().mean() > 0.1


def test_warp_to_the_same_pose_changes_nothing():
    image = torch.rand(3, 3, 32, 32)
    warped, visible = warp_wrist(image, states(3), states(3), WRIST, 0.0)
    assert torch.allclose(warped, image, atol=1e-3) and visible[:, :, 1:-1, 1:-1].all()


def test_pixels_that_look_above_the_horizon_are_not_visible():
    image, state = torch.rand(1, 3, 32, 32), states(1)
    level = state.clone()
    level[:, 3:6] = geometry.turn_state(state, torch.tensor([[0.0, math.pi / 2, 0]]))
    for before in (state, level):
        warped, visible = warp_wrist(image, before, level, WRIST, 0.0)
        assert torch.isfinite(warped).all() and visible.mean() < 0.7


def test_action_map_is_at_the_gripper_and_shows_opening_and_axes():
    H, state = 64, states(3, tilt=0.5)
    closed = state.clone()
    closed[:, 6:] = 0
    tips = state[:, None, :3] + 0.1 * geometry.rotation_matrix(state[:, 3:6]).transpose(1, 2)  # (B, axis, 3)
    pose = camera_pose(AGENTVIEW, state, on_hand=False)
    where, _ = project(torch.cat([state[:, None, :3], tips], 1), AGENTVIEW, pose)  # (B, origin + 3 tips, 2)
    where = (where + 1) / 2 * H
    drawn, drawn_closed = action_map(AGENTVIEW, state, H), action_map(AGENTVIEW, closed, H)
    for b in range(3):
        for axis in range(3):  # halfway along its line, each axis has its colour
            column, row = ((where[b, 0] + where[b, axis + 1]) / 2).floor().long()
            assert drawn[b, axis, row, column] > 0.5
        grey = drawn[b].amin(0) > 0.3  # the disc is in all three colours
        assert (grey.nonzero().float().mean(0).flip(0) + 0.5 - where[b, 0]).abs().max() < 1.5
    assert drawn.sum() > drawn_closed.sum() * 1.1
    assert (drawn == 0).all(1).float().mean() > 0.8 and drawn.min() == 0 and drawn.max() <= 1


def test_the_wrist_map_rides_on_the_hand_and_shows_where_it_came_from():
    H, state = 64, states(3, tilt=0.5)
    moved = state.clone()
    moved[:, 1] += 0.03
    still = action_map(WRIST, state, H, hand=state)
    assert torch.allclose(still, action_map(WRIST, moved, H, hand=moved), atol=0.02) and still.amin(1).amax() > 0.3
    came_from = action_map(WRIST, state, H, hand=moved)
    where, _ = project(state[:, None, :3], WRIST, camera_pose(WRIST, moved, on_hand=True))
    grey = came_from.amin(1) > 0.3  # the disc, (B, H, W)
    for b in range(3):
        place = grey[b].nonzero().float().mean(0).flip(0) + 0.5
        assert (place - (where[b, 0] + 1) / 2 * H).abs().max() < 1.5
    assert (grey != (still.amin(1) > 0.3)).flatten(1).any(1).all()


HIGHER = Cameras(Camera(45.0, [0.7, 0.1, 1.6], AGENTVIEW.rotation), WRIST, plane_z=0.1)  # another scene


def test_what_is_carried_moves_with_the_hand_in_the_agent_view_and_grows_as_it_comes_nearer():
    state, there = states(2), states(2, seed=1)
    there[:, 0] += 0.15  # towards the camera
    pose, grid = camera_pose(AGENTVIEW, state, on_hand=False), pixel_grid(64, state.device)
    (here, far), (expected, near) = (project(value[:, None, :3], AGENTVIEW, pose) for value in (state, there))
    blob = torch.exp(-100 * (grid - here[:, :, None]).square().sum(-1))[:, None].expand(-1, 3, -1, -1)
    moved = geometry.carried(blob, state, there, AGENTVIEW)[:, 0]
    place = torch.einsum("bhw,hwc->bc", moved, grid) / moved.sum((1, 2))[:, None]
    assert (place - expected[:, 0]).abs().max() < 1 / 64, "half a pixel"
    assert torch.allclose(moved.sum((1, 2)) / blob[:, 0].sum((1, 2)), (far / near)[:, 0].square(), rtol=0.02)


def test_cameras_survive_json():
    for cameras in (Cameras(AGENTVIEW, WRIST, 0.01), Cameras.of_tasks([HIGHER, Cameras(AGENTVIEW, WRIST, 0.01)])):
        assert Cameras.from_dict(json.loads(json.dumps(cameras.to_dict()))) == cameras


def test_every_row_is_seen_by_the_cameras_of_its_task():
    scenes, H = [Cameras(AGENTVIEW, WRIST, 0.0), HIGHER], 32
    assert Cameras.of_tasks(scenes[:1] * 3) == scenes[0], "tasks that share a scene need no rows"
    task, state, next_state = torch.tensor([1, 0, 1]), states(3), states(3, seed=1)
    wrist = torch.rand(3, 4, 3, H, H, generator=torch.Generator().manual_seed(0))
    memory_states = states(12, seed=2).unflatten(0, (3, 4))

    def seen(cameras, rows):
        return [action_map(cameras.agentview, state[rows], H), ray_map(cameras.agentview, state[rows], H),
                *geometry.wrist_memory(wrist[rows], memory_states[rows], next_state[rows], cameras, 0.2),
                *geometry.agent_memory(wrist[rows], next_state[rows], cameras, 0.2)]
    together = seen(Cameras.of_tasks(scenes).of(task), slice(None))
    for row, number in enumerate(task.tolist()):
        alone, other = (seen(scenes[n], slice(row, row + 1)) for n in (number, 1 - number))
        for a, b, c in zip(together, alone, other):
            assert torch.allclose(a[row:row + 1], b, atol=1e-5) and not torch.allclose(b, c, atol=1e-3)


def test_the_ray_of_a_pixel_goes_through_the_point_that_is_seen_there():
    state = states(1)
    points = torch.tensor([[[0.15, -0.1, 0.0], [0.1, 0.02, 0.05]]])
    for camera, on_hand in ((AGENTVIEW, False), (WRIST, True)):
        rays = ray_map(camera, state, 256, on_hand)[0]  # (6, H, W)
        where, _ = project(points, camera, camera_pose(camera, state, on_hand))
        columns, rows = ((where[0] + 1) / 2 * 256).long().unbind(-1)
        direction, moment = rays[:, rows, columns].T.split(3, dim=1)
        assert torch.allclose(direction.norm(dim=1), torch.ones(2), atol=1e-5)
        distance = (torch.linalg.cross(points[0], direction) - moment).norm(dim=1)  # from the ray to the point
        assert (distance < 0.005).all()
