"""The geometry that the world model is given instead of having to learn it: where the gripper is in a picture
(World-Env section 3.2, the "action map" of EnerVerse-AC) and what the wrist camera sees after the hand has moved.

Departures from the paper:
1. The action map is three axis lines and a circle, drawn by distance to the shape (soft edges, whole batch at once).
2. The paper feeds camera ray maps and VGGT features. Here the wrist picture is warped to the hand's next pose as if
   all it shows lay in the support plane z = plane_z: a homography, exact for the table, wrong for tall objects.

Conventions: the state is (B, 8) = gripper position (m), axis-angle (rad, norm in [0, 2 pi)), two finger joints (m).
Cameras follow MuJoCo: x right, y up, looking along -z. Pictures are upright (row 0 on top). Pixels are counted in
grid_sample's coordinates: x right and y DOWN, both from -1 to 1 between the picture's outer edges.
Shape letters: B trajectories, P points, H, W image.

Try it: python -m pytest tests/test_geometry.py
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_OPENING = 0.08    # m between the two finger joints of an open Panda hand
AXIS_LENGTH = 0.1     # m, the paper's axis lines
CIRCLE_RADIUS = 0.06  # the circle and the lines of an action map, in picture heights
LINE_WIDTH = 0.025


@dataclass
class Camera:
    """A pinhole camera. The wrist camera's pose is in the gripper's frame, any other's in the world's."""

    fovy: float                                  # vertical field of view, degrees
    position: tuple[float, ...]                  # (3,) m
    rotation: tuple[tuple[float, ...], ...]      # (3, 3), columns = the camera's axes

    def to_dict(self) -> dict:
        rotation = [[float(value) for value in row] for row in self.rotation]
        return {"fovy": float(self.fovy), "position": [float(value) for value in self.position], "rotation": rotation}

    @classmethod
    def from_dict(cls, values: dict) -> "Camera":
        return cls(values["fovy"], tuple(values["position"]), tuple(map(tuple, values["rotation"])))


@dataclass
class Cameras:
    """All that the world model needs to know about the scene."""

    agentview: Camera
    wrist: Camera
    plane_z: float  # m, height of the support plane (table or floor)

    def to_dict(self) -> dict:
        return {"agentview": self.agentview.to_dict(), "wrist": self.wrist.to_dict(), "plane_z": float(self.plane_z)}

    @classmethod
    def from_dict(cls, values: dict) -> "Cameras":
        return cls(Camera.from_dict(values["agentview"]), Camera.from_dict(values["wrist"]), values["plane_z"])


# ---- rotations: quaternions (w, x, y, z). An axis-angle with norm in [0, 2 pi) and a quaternion of either sign are one
# to one, so turning through norm pi (where the hand spends its life: it points down) needs no choice of a branch.

def quaternion(axis_angle: Tensor) -> Tensor:
    """(..., 3) axis-angle -> (..., 4) unit quaternion."""
    half = axis_angle.norm(dim=-1, keepdim=True) / 2
    return torch.cat([half.cos(), axis_angle / 2 * torch.sinc(half / math.pi)], dim=-1)


def axis_angle(quaternion: Tensor) -> Tensor:
    """(..., 4) unit quaternion -> (..., 3) axis-angle with norm in [0, 2 pi]; the inverse of `quaternion`."""
    real, vector = quaternion[..., :1], quaternion[..., 1:]
    sine = vector.norm(dim=-1, keepdim=True)
    return vector * torch.where(sine > 1e-7, 2 * torch.atan2(sine, real) / sine.clamp(min=1e-7), 2.0)


def compose(left: Tensor, right: Tensor) -> Tensor:
    """Quaternion product: first `right`, then `left`."""
    (w1, v1), (w2, v2) = (left[..., :1], left[..., 1:]), (right[..., :1], right[..., 1:])
    real = w1 * w2 - (v1 * v2).sum(-1, keepdim=True)
    return torch.cat([real, w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)], dim=-1)


def rotate_by(state: Tensor, turn: Tensor) -> Tensor:
    """The state's axis-angle (B, 3) after a turn (B, 3), a small axis-angle in the WORLD's axes."""
    return axis_angle(compose(quaternion(turn), quaternion(state[:, 3:6])))


def turn_between(state: Tensor, next_state: Tensor) -> Tensor:
    """The turn (B, 3), norm at most pi, that `rotate_by` would need to take `state` to `next_state`."""
    conjugate = quaternion(state[:, 3:6]) * torch.tensor([1.0, -1, -1, -1], device=state.device)
    relative = compose(quaternion(next_state[:, 3:6]), conjugate)
    return axis_angle(torch.where(relative[:, :1] < 0, -relative, relative))   # q and -q turn alike: the shorter way


def rotation_matrix(axis_angle: Tensor) -> Tensor:
    """(B, 3) -> (B, 3, 3): each column, an axis of the turned frame."""
    w, v = quaternion(axis_angle)[:, :1, None], quaternion(axis_angle)[:, 1:]
    cross = torch.linalg.cross(v[:, None], torch.eye(3, device=v.device)[None].expand(len(v), 3, 3)).transpose(1, 2)
    return torch.eye(3, device=v.device) + 2 * w * cross + 2 * cross @ cross


# ---- cameras

def camera_pose(camera: Camera, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-> position (B, 3), rotation (B, 3, 3) in the world; with a state (B, 8) the camera rides on the gripper."""
    device = None if state is None else state.device
    position = torch.tensor(camera.position, device=device, dtype=torch.float32)[None]   # (1, 3)
    rotation = torch.tensor(camera.rotation, device=device, dtype=torch.float32)[None]   # (1, 3, 3)
    if state is None:
        return position, rotation
    hand = rotation_matrix(state[:, 3:6])                                                # (B, 3, 3)
    return state[:, :3] + (hand @ position[..., None])[..., 0], hand @ rotation


def project(points: Tensor, fovy: float, position: Tensor, rotation: Tensor, aspect: float = 1.0) -> tuple[Tensor, Tensor]:
    """World points (B, P, 3) -> picture coordinates (B, P, 2) and depth in m (B, P), negative behind the camera."""
    local = (points - position[:, None]) @ rotation                          # (B, P, 3) in the camera's axes
    depth = -local[..., 2]
    scale = torch.tensor([1 / aspect, -1.0], device=points.device) / math.tan(math.radians(fovy) / 2)
    return local[..., :2] * scale / depth.clamp(min=1e-4)[..., None], depth


def pixel_grid(H: int, W: int, device: torch.device) -> Tensor:
    """(H, W, 2): the picture coordinates of all pixel centres."""
    y = (torch.arange(H, device=device) + 0.5) * 2 / H - 1
    x = (torch.arange(W, device=device) + 0.5) * 2 / W - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def warp_wrist(image: Tensor, state_from: Tensor, state_to: Tensor, camera: Camera, plane_z: float) -> tuple[Tensor, Tensor]:
    """The wrist picture (B, C, H, W) taken at `state_from` (B, 8) as it would look from `state_to`, if all of it lay in
    the plane z = plane_z. -> picture (B, C, H, W) and visibility (B, 1, H, W): 1 where the old picture saw that point."""
    B, C, H, W = image.shape
    fovy, aspect = camera.fovy, W / H
    position, rotation = camera_pose(camera, state_to)
    pixels = pixel_grid(H, W, image.device).reshape(1, H * W, 2)
    scale = torch.tensor([aspect, -1.0], device=image.device) * math.tan(math.radians(fovy) / 2)
    rays = F.pad(pixels * scale, (0, 1), value=-1.0) @ rotation.transpose(1, 2)          # (B, H*W, 3) in the world
    downward = rays[..., 2:].clamp(max=-1e-4)                                             # only these meet the plane
    distance = (plane_z - position[:, None, 2:]) / downward                               # (B, H*W, 1)
    points = position[:, None] + distance * rays
    where, depth = project(points, fovy, *camera_pose(camera, state_from), aspect)        # (B, H*W, 2), (B, H*W)
    seen = (where.abs().amax(-1) <= 1) & (depth > 0) & (distance[..., 0] > 0) & (rays[..., 2] < -1e-4)
    grid = where.clamp(-2, 2).reshape(B, H, W, 2)
    warped = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped, seen.reshape(B, 1, H, W).to(image.dtype)


def action_map(camera: Camera, state: Tensor, H: int, W: int) -> Tensor:
    """-> (B, 3, H, W) in [0, 1], on black: a grey disc at the gripper, brighter the wider it is open, and over it the
    gripper's x, y, z axes as lines of 0.1 m in red, green, blue, as a camera that stands still sees them."""
    axes = rotation_matrix(state[:, 3:6]).transpose(1, 2) * AXIS_LENGTH                   # (B, 3 axes, 3)
    points = torch.cat([state[:, None, :3], state[:, None, :3] + axes], dim=1)            # (B, 4, 3)
    position, rotation = (value.to(state.device) for value in camera_pose(camera))
    places = project(points, camera.fovy, position, rotation, W / H)[0]
    square = torch.tensor([W / H, 1.0], device=state.device)                              # one unit = H / 2 pixels
    places, pixels = places * square, pixel_grid(H, W, state.device) * square
    origin, line = places[:, None, None, :1], (places[:, 1:] - places[:, :1])[:, None, None]   # (B, 1, 1, 1 or 3, 2)
    offset = pixels[None, :, :, None] - origin                                            # (B, H, W, 1, 2)
    along = ((offset * line).sum(-1) / line.square().sum(-1).clamp(min=1e-8)).clamp(0, 1)  # (B, H, W, 3)
    to_line = (offset - along[..., None] * line).norm(dim=-1)                             # (B, H, W, 3)
    lines = (0.5 + (LINE_WIDTH / 2 - to_line / 2) * H).clamp(0, 1)                        # soft over one pixel
    disc = (0.5 + (CIRCLE_RADIUS - offset.norm(dim=-1) / 2) * H).clamp(0, 1)              # (B, H, W, 1)
    opening = ((state[:, 6] - state[:, 7]) / MAX_OPENING).clamp(0, 1)[:, None, None, None]
    return torch.maximum(disc * (0.2 + 0.6 * opening), lines).permute(0, 3, 1, 2)         # (B, 3, H, W)
