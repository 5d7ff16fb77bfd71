"""The geometry that the world model is given instead of having to learn it.

Where the gripper is in a picture (World-Env section 3.2, the "action map" of EnerVerse-AC), and what the
wrist camera sees after the hand has moved.

Departures from the paper:
1. The action map is drawn by the distance to its circle and lines: soft edges, a whole batch at once.
2. The paper feeds camera ray maps and VGGT features. Here the wrist picture is warped to the hand's next
   pose as if all of it lay in the plane z = plane_z: exact for the table, wrong for what stands on it.

Conventions: a state (8,) is gripper position (m), axis-angle (rad, norm in [0, 2 pi)), two finger joints (m).
Cameras follow MuJoCo: x right, y up, looking along -z. Pictures are square and upright (row 0 on top); places
in them are grid_sample's, x to the right and y DOWN, from -1 to 1 between the outer edges.
Shape letters: B trajectories, P points, C, H, W image.

Try it: python -m pytest tests/test_geometry.py
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_OPENING = 0.08  # m between the two finger joints of an open Panda hand
AXIS_LENGTH = 0.1  # m, the paper's axis lines
CIRCLE_RADIUS = 0.06  # the circle and the lines of an action map, in picture heights
LINE_WIDTH = 0.025


@dataclass
class Camera:
    """A pinhole camera. The wrist camera's pose is in the gripper's frame, any other's in the world's.

    Pose: lists, of one camera for a whole batch; or tensors, one for each of its rows (`Cameras.of`).
    """
    fovy: float  # vertical field of view, degrees
    position: list | Tensor  # (3,) or (B, 3) m
    rotation: list | Tensor  # (3, 3) or (B, 3, 3), columns = the camera's axes


@dataclass
class Cameras:
    """All that the world model knows about the scene beforehand.

    Tasks may have scenes of their own (`libero_10` has three): then agentview's pose and plane_z are lists by task.
    """
    agentview: Camera
    wrist: Camera
    plane_z: float | list | Tensor  # m, height of the support plane (table or floor); as a tensor (B,)

    @classmethod
    def of_tasks(cls, scenes: list[Cameras]) -> Cameras:
        """One for all tasks, where their scenes are alike but for the agent view's pose and the plane."""
        first = scenes[0]
        if all(scene == first for scene in scenes):
            return first
        agentview = Camera(first.agentview.fovy, *([getattr(scene.agentview, name) for scene in scenes]
                                                   for name in ("position", "rotation")))
        return cls(agentview, first.wrist, [scene.plane_z for scene in scenes])

    def of(self, task: Tensor) -> Cameras:
        """The cameras of every row's task (B,); these themselves where all tasks share them."""
        if not isinstance(self.plane_z, list):
            return self
        rows = lambda values: torch.tensor(values, device=task.device)[task]
        agentview = Camera(self.agentview.fovy, rows(self.agentview.position), rows(self.agentview.rotation))
        return Cameras(agentview, self.wrist, rows(self.plane_z))

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, value) -> Cameras:
        return cls(Camera(**value["agentview"]), Camera(**value["wrist"]), value["plane_z"])


# ----------------------------------------------------------------------------------------------------------
# Rotations. Quaternions (w, x, y, z) of either sign and axis-angles with norm in [0, 2 pi) are one to one, so
# turning on through norm pi, near which the downward hand spends its life, asks for no choice of a branch.
# ----------------------------------------------------------------------------------------------------------
def quaternion(axis_angle: Tensor) -> Tensor:
    """(..., 3) axis-angle -> (..., 4) unit quaternion."""
    half = axis_angle.norm(dim=-1, keepdim=True) / 2
    return torch.cat([half.cos(), axis_angle / 2 * torch.sinc(half / math.pi)], dim=-1)


def axis_angle(quaternion: Tensor) -> Tensor:
    """(..., 4) unit quaternion -> (..., 3) axis-angle with norm in [0, 2 pi]; the inverse of `quaternion`."""
    real, vector = quaternion.split([1, 3], dim=-1)
    sine = vector.norm(dim=-1, keepdim=True)
    return vector * torch.where(sine > 1e-7, 2 * torch.atan2(sine, real) / sine.clamp(min=1e-7), 2.0)


def compose(left: Tensor, right: Tensor) -> Tensor:
    """Quaternion product: first `right`, then `left`."""
    (w1, v1), (w2, v2) = left.split([1, 3], dim=-1), right.split([1, 3], dim=-1)
    real = w1 * w2 - (v1 * v2).sum(-1, keepdim=True)
    return torch.cat([real, w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)], dim=-1)


def turn_state(state: Tensor, turn: Tensor) -> Tensor:
    """The axis-angle (B, 3) of `state` (B, 8) after a turn (B, 3), an axis-angle in the WORLD's axes."""
    return axis_angle(compose(quaternion(turn), quaternion(state[:, 3:6])))


def turn_between(state: Tensor, next_state: Tensor) -> Tensor:
    """The shortest turn (B, 3) in the world's axes that takes `state`'s rotation to `next_state`'s."""
    back = quaternion(-state[:, 3:6])
    relative = compose(quaternion(next_state[:, 3:6]), back)
    return axis_angle(torch.where(relative[:, :1] < 0, -relative, relative))  # q and -q turn alike


def rotation_matrix(axis_angle: Tensor) -> Tensor:
    """(B, 3) -> (B, 3, 3): each column is an axis of the turned frame."""
    w, v = quaternion(axis_angle).split([1, 3], dim=-1)
    eye = torch.eye(3, device=v.device).expand(len(v), 3, 3)
    cross = torch.linalg.cross(v[:, None], eye).transpose(1, 2)  # (B, 3, 3): cross @ u = v x u
    return eye + 2 * w[..., None] * cross + 2 * cross @ cross


def opening(state):
    """(..., 8) -> (...,): m between the fingers; tensor or array."""
    return state[..., 6] - state[..., 7]


def openness(metres: Tensor) -> Tensor:
    """m between the fingers -> 0 to 1, by its root: fingers that met on air (1 mm) or hold a bowl's rim (4 mm) are as far
    apart in it as 29 mm and 40 mm."""
    return (metres / MAX_OPENING).clamp(0, 1).sqrt()


# ----------------------------------------------------------------------------------------------------------
# Cameras
# ----------------------------------------------------------------------------------------------------------
def camera_pose(camera: Camera, state: Tensor, on_hand: bool) -> tuple[Tensor, Tensor]:
    """Position (B, 3), rotation (B, 3, 3) in the world; a camera on the hand moves with the states (B, 8)."""
    position = torch.as_tensor(camera.position, dtype=state.dtype, device=state.device).expand(len(state), 3)
    rotation = torch.as_tensor(camera.rotation, dtype=state.dtype, device=state.device).expand(len(state), 3, 3)
    if not on_hand:
        return position, rotation
    hand = rotation_matrix(state[:, 3:6])  # (B, 3, 3)
    return state[:, :3] + (hand @ position[..., None])[..., 0], hand @ rotation


def corner(camera: Camera, device: torch.device) -> Tensor:
    """(2,): camera-frame x, y of the picture's lower right corner (place 1, 1) at a depth of 1 m."""
    return math.tan(math.radians(camera.fovy) / 2) * torch.tensor([1.0, -1.0], device=device)


def project(points: Tensor, camera: Camera, pose: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """World points (B, P, 3) -> places (B, P, 2) in the picture; depths (B, P) in m, < 0 behind it."""
    position, rotation = pose
    local = (points - position[:, None]) @ rotation  # (B, P, 3) in the camera's axes
    depth = -local[..., 2]
    return local[..., :2] / depth.clamp(min=1e-4)[..., None] / corner(camera, points.device), depth


def pixel_grid(size: int, device: torch.device) -> Tensor:
    """(H, W, 2): the places of all pixel centres of a picture with H = W = size."""
    middle = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), dim=-1)


def seen_on_plane(image: Tensor, camera: Camera, pose: tuple[Tensor, Tensor], state: Tensor, wrist: Camera,
                  plane_z: float | Tensor) -> tuple[Tensor, Tensor]:
    """What a picture (B, C, H, W), taken by `camera` in `pose`, shows of the plane, as the wrist camera sees it in `state`.

    -> picture (B, C, H, W) and visibility (B, 1, H, W): 1 where the picture has that point of the plane.
    """
    B, C, H, W = image.shape
    position, rotation = camera_pose(wrist, state, on_hand=True)
    pixels = pixel_grid(H, image.device).view(1, H * W, 2) * corner(wrist, image.device)
    rays = F.pad(pixels, (0, 1), value=-1.0) @ rotation.transpose(1, 2)  # (B, H*W, 3) in the world
    plane_z = torch.as_tensor(plane_z, dtype=state.dtype, device=state.device).view(-1, 1, 1)  # one, or one a row
    distance = (plane_z - position[:, None, 2:]) / rays[..., 2:].clamp(max=-1e-4)  # only falling rays meet it
    where, depth = project(position[:, None] + distance * rays, camera, pose)  # (B, H*W, 2), (B, H*W)
    seen = (where.abs().amax(-1) <= 1) & (depth > 0) & (distance[..., 0] > 0) & (rays[..., 2] < -1e-4)
    grid = where.clamp(-2, 2).view(B, H, W, 2)
    # Bicubic: in imagination each picture is warped from the last; five times bilinear leave a seventh of its edges.
    warped = F.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return warped, seen.view(B, 1, H, W).to(image.dtype)


def warp_wrist(image: Tensor, state_from: Tensor, state_to: Tensor, camera: Camera,
               plane_z: float | Tensor) -> tuple[Tensor, Tensor]:
    """The wrist picture (B, C, H, W) of `state_from` (B, 8) as it would be in `state_to`, as `seen_on_plane`."""
    return seen_on_plane(image, camera, camera_pose(camera, state_from, on_hand=True), state_to, camera, plane_z)


def outside_hand(size: int, hand_height: float, device: torch.device) -> Tensor:
    """(1, 1, H, W): 0 in the lowest part of the wrist picture, which shows the hand itself, 1 elsewhere."""
    mask = torch.ones(1, 1, size, size, device=device)
    mask[:, :, round(size * (1 - hand_height)):] = 0
    return mask


def wrist_memory(wrist: Tensor, states: Tensor, state: Tensor, cameras: Cameras,
                 hand_height: float) -> tuple[Tensor, Tensor]:
    """Wrist pictures (B, F, 3, H, W) of `states` (B, F, 8) as they would be in `state` (B, 8), less the hand in them.

    -> pictures (B, F, 3, H, W), 0 where not visible, and visibility (B, F, 1, H, W).
    """
    B, n, _, H, W = wrist.shape
    outside = outside_hand(H, hand_height, wrist.device)
    pictures = torch.cat([wrist.flatten(0, 1), outside.expand(B * n, 1, H, W)], dim=1)
    plane_z = torch.as_tensor(cameras.plane_z, device=wrist.device).expand(B).repeat_interleave(n)
    warped, seen = warp_wrist(pictures, states.flatten(0, 1), state.repeat_interleave(n, dim=0), cameras.wrist, plane_z)
    seen = seen * outside * (warped[:, 3:] > 0.99)
    return (warped[:, :3] * seen).unflatten(0, (B, n)), seen.unflatten(0, (B, n))


def agent_memory(agent: Tensor, state: Tensor, cameras: Cameras, hand_height: float) -> tuple[Tensor, Tensor]:
    """Agent views (B, F, 3, H, W) of the table as the wrist camera would see it in `state` (B, 8); as `wrist_memory`."""
    pose = camera_pose(cameras.agentview, state, on_hand=False)
    plane, seen = seen_on_plane(agent.flatten(1, 2), cameras.agentview, pose, state, cameras.wrist, cameras.plane_z)
    seen = seen * outside_hand(agent.shape[-1], hand_height, agent.device)
    return (plane * seen).unflatten(1, agent.shape[1:3]), seen[:, None].expand(-1, agent.shape[1], 1, -1, -1)


def carried(agent: Tensor, state: Tensor, next_state: Tensor, camera: Camera) -> Tensor:
    """The agent view (B, 3, H, W) of `state` (B, 8), moved and scaled as something in the hand is until `next_state`."""
    pose = camera_pose(camera, state, on_hand=False)
    (before, far), (after, near) = (project(value[:, None, :3], camera, pose) for value in (state, next_state))
    grid = (pixel_grid(agent.shape[-1], agent.device) - after[:, :, None]) * (near / far)[..., None, None]
    return F.grid_sample(agent, grid + before[:, :, None], mode="bicubic", padding_mode="border", align_corners=False)


def ray_map(camera: Camera, state: Tensor, size: int, on_hand: bool = False) -> Tensor:
    """The Pluecker coordinates (direction, origin x direction) of every pixel's ray in the world, (B, 6, H, W)."""
    position, rotation = camera_pose(camera, state, on_hand)
    pixels = pixel_grid(size, state.device).view(1, size * size, 2) * corner(camera, state.device)
    rays = F.normalize(F.pad(pixels, (0, 1), value=-1.0) @ rotation.transpose(1, 2), dim=-1)  # (B, H*W, 3)
    moment = torch.linalg.cross(position[:, None].expand_as(rays), rays)
    return torch.cat([rays, moment], dim=-1).transpose(1, 2).unflatten(2, (size, size))


def action_map(camera: Camera, state: Tensor, size: int, hand: Tensor | None = None) -> Tensor:
    """The pose (B, 8) to the eye of a camera: (B, 3, H, W) in [0, 1], on black.

    A grey disc at the gripper, brighter the wider it is open; its x, y, z axes in red, green, blue. The camera stands
    still, or (hand (B, 8) given) is on the hand in that state.
    """
    axes = rotation_matrix(state[:, 3:6]).transpose(1, 2) * AXIS_LENGTH  # (B, 3 axes, 3)
    points = torch.cat([state[:, None, :3], state[:, None, :3] + axes], dim=1)  # (B, 4, 3)
    pose = camera_pose(camera, state if hand is None else hand, on_hand=hand is not None)
    where, _ = project(points, camera, pose)  # (B, 4, 2)
    origin, line = where[:, None, None, :1], (where[:, 1:] - where[:, :1])[:, None, None]
    offset = pixel_grid(size, state.device)[None, :, :, None] - origin  # (B, H, W, 1, 2)
    along = (offset * line).sum(-1) / line.square().sum(-1).clamp(min=1e-8)  # (B, H, W, 3)
    to_line = (offset - along.clamp(0, 1)[..., None] * line).norm(dim=-1) / 2  # (B, H, W, 3) picture heights
    to_origin = offset.norm(dim=-1) / 2  # (B, H, W, 1)
    lines = (0.5 + (LINE_WIDTH / 2 - to_line) * size).clamp(0, 1)  # edges are one pixel soft
    disc = (0.5 + (CIRCLE_RADIUS - to_origin) * size).clamp(0, 1)
    brightness = 0.2 + 0.6 * openness(opening(state)).view(-1, 1, 1, 1)
    return torch.maximum(disc * brightness, lines).permute(0, 3, 1, 2)
