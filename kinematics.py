"""Where the robot will be after a chunk of actions, what its fingers will close on, and what will stop its hand.

World-Env (section 3.2) takes the next robot state from kinematics. That is enough in free air: a gain for every command,
and a learned correction for a controller that lags behind, are right to a millimetre or two for the hand, and so is the
gripper's own rule for empty fingers (`free_opening`). It is not enough in contact. Whether the fingers close on an object
or on air depends on what the pictures show, and all that is imagined later hangs on it. So their opening is read off the
surroundings of the hand, as a categorical distribution, because the mean of two outcomes is neither. And a hand that comes
down on an object stays above it: how much higher than in free air is read off the same way (the lift). What is usual, the
fingers as they were or as in free air, and no lift, need not be learned bin by bin (`usual`):

    wrist picture a chunk ago, now, warped to the next pose ──┐                   ┌─► P(lift), 4 mm a bin
    agent view around the hand, a chunk ago, now, next ───────┼─► small conv net ─┼─► P(opening), 20 bins
    both action chunks, height, turn, fingers ────────────────┴─► usual ──────────┘

The frame of a chunk ago shows what the fingers close on while they are still open.

Given the true opening alone, the simulator's false successes fell from 11 of 14 to 4 (ABLATIONS.md): pictures that
follow the fingers are easy, it is the mean of "holds it" and "holds nothing" that imagines every grasp a good one.

Shape letters: B trajectories, V camera views, L action-chunk length, C, H, W image, D width.

Try it: python -m pytest tests/test_kinematics.py
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from episodes import Normalizer
from geometry import (MAX_OPENING, Cameras, camera_pose, opening, openness, pixel_grid, project, rotation_matrix, turn_state,
                      warp_wrist)

STATE_FEATURES = 10  # width of `state_features`
BINS = 20  # of the fingers' `openness` and of the lift
SEND, FOLLOW, LATE = 0.25, 0.35, 0.5  # of the gripper, in control steps: see `free_opening`
LOWEST, LIFTS = -0.018, 0.08  # m: the lowest lift, and how far all of them span; one bin's middle is 0, no lift


def state_features(state: Tensor, normalizer: Normalizer) -> Tensor:
    """(B, 8) -> (B, 10): position normalised, two columns of the rotation matrix, openness of the fingers from -1 to 1."""
    rotation = rotation_matrix(state[:, 3:6])[:, :, :2].flatten(1)
    return torch.cat([normalizer.normalize_state(state)[:, :3], rotation, 2 * openness(opening(state))[:, None] - 1], dim=1)


class PosePredictor(nn.Module):
    """Kinematics + correction: how far a chunk moves the gripper and turns it (world axes).

    The controller covers about a fifth of a command and goes on after it has ended. So the kinematics are one
    gain for every action of both chunks, a linear layer that starts at the mean gain; an MLP adds the rest.
    """
    GAINS = (0.0105,) * 3 + (0.1,) * 3  # m and rad that a unit of a command yields in a control step
    SCALE = (0.05,) * 3 + (0.1,) * 3  # typical change in a chunk: m, rad

    def __init__(self, chunk_size: int, width: int):
        super().__init__()
        inputs = STATE_FEATURES + 2 * 7 * chunk_size
        self.kinematics = nn.Linear(inputs, 6)
        self.correction = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(),
                                        nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 6))
        self.register_buffer("scale", torch.tensor(self.SCALE), persistent=False)
        with torch.no_grad():
            for layer in (self.kinematics, self.correction[-1]):
                layer.weight.zero_()
                layer.bias.zero_()
            by_action = self.kinematics.weight[:, -7 * chunk_size:].view(6, chunk_size, 7)
            for i, gain in enumerate(self.GAINS):
                by_action[i, :, i] = gain / self.SCALE[i]

    def forward(self, features: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
        """-> (B, 6) in m, rad."""
        x = torch.cat([features, previous_actions.flatten(1), actions.flatten(1)], dim=1)
        return (self.kinematics(x) + self.correction(x)) * self.scale


def free_air_loss(wrong: Tensor, usual=0.02) -> Tensor:
    """Cauchy's negative log-likelihood of errors (N, 6) in units of SCALE, position and rotation each by their length.

    Errors far above `usual` (1 mm, 0.1 degrees) hardly count: there the hand touched something, which kinematics cannot
    know. By absolute error, contacts spoil what is learned of free air (ABLATIONS.md, "Kinematics of free air").
    """
    squared = torch.stack([wrong[:, :3].square().sum(1), wrong[:, 3:].square().sum(1)])  # (2, N)
    return usual * (squared / usual**2).log1p().mean()


def moved(state: Tensor, change: Tensor) -> Tensor:
    """State (B, 8) whose hand moves by `change` (B, 6), the fingers as they are."""
    return torch.cat([state[:, :3] + change[:, :3], turn_state(state, change[:, 3:]), state[:, 6:]], dim=1)


def free_opening(metres: Tensor, previous_actions: Tensor, actions: Tensor) -> Tensor:
    """How far apart (B,) fingers with nothing between them are after a chunk; metres (B,): now.

    robosuite's gripper: in every control step the place that the fingers are sent to goes a quarter of the way from closed
    to open, or back; they follow half a step later, by 35 % of what is left. Fingers that close at step 1 of a chunk are
    32 mm apart at its end, at step 2 42 mm: without this, those are easily taken for a packet's 40 mm.
    """
    L, commands = actions.shape[1], torch.cat([previous_actions, actions], dim=1)[:, :, 6].sign()  # -1 open, 1 close
    sent = torch.where(commands[:, 0] == 0, 1 - 2 * metres / MAX_OPENING, commands[:, 0])  # 0: an episode begins
    places = []
    for command in commands.unbind(1):
        sent = (sent + SEND * command).clamp(-1, 1)
        places.append(MAX_OPENING * (1 - sent) / 2)
    for before, place in zip(places[L - 1:], places[L:]):
        metres = metres + FOLLOW * (LATE * before + (1 - LATE) * place - metres)
    return metres


def with_fingers(state: Tensor, apart: Tensor) -> Tensor:
    """State (B, 8) with its fingers `apart` (B,) metres, evenly."""
    return torch.cat([state[:, :6], torch.stack([apart, -apart], dim=1) / 2], dim=1)


class GraspPredictor(nn.Module):
    """How far open the fingers are after a chunk, and how much higher the hand is than in free air.

    Logits of BINS bins each, and the place in every bin, so that what is sure is exact: a policy that sees fingers 4 mm less
    open than they would be goes elsewhere.
    """

    def __init__(self, chunk_size: int, image_size: int, channels: int, dropout: float):
        super().__init__()
        C, D = channels, 4 * channels
        self.embed = nn.Sequential(nn.Linear(14 * chunk_size + 3 * STATE_FEATURES, D), nn.SiLU(), nn.Linear(D, D))
        self.stem = nn.Conv2d(6 * 3 + 1, C, 6, stride=4, padding=1)
        self.block1 = ResnetBlock2D(in_channels=C, temb_channels=D, groups=8, dropout=dropout)
        self.down = nn.Conv2d(C, 2 * C, 3, stride=2, padding=1)
        self.block2 = ResnetBlock2D(in_channels=2 * C, temb_channels=D, groups=8, dropout=dropout)
        self.squeeze = nn.Conv2d(2 * C, 16, 1)  # few channels, every place: WHERE the object lies matters
        self.out = nn.Sequential(nn.Linear(16 * (image_size // 8) ** 2 + D, D), nn.SiLU(), nn.Dropout(dropout),
                                 nn.Linear(D, 4 * BINS))
        self.usual = nn.Linear(D, 3)  # how sure it is, without the pictures: fingers as now, as in free air, no lift
        with torch.no_grad():  # the places start at the nearest ones
            self.out[-1].weight[2 * BINS:] = 0
            self.out[-1].bias[2 * BINS:] = 0
            self.usual.bias.copy_(torch.tensor([1.0, 3.0, 3.0]))

    def forward(self, pictures: Tensor, features: Tensor, now: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 19, H, W) and features (B, 14 L + 30) of `surroundings`, openings (B,) now and in free air -> logits
        and places (B, 2, BINS); a place is 0 at its bin's lower edge, 1 at the upper one."""
        embedding = self.embed(features)
        x = self.block1(self.stem(pictures), embedding)  # (B, C, H/4, W/4)
        x = self.block2(self.down(x), embedding)  # (B, 2C, H/8, W/8)
        x, told = F.silu(self.squeeze(x)).flatten(1), F.silu(embedding)
        fingers, lift, *places = self.out(torch.cat([x, told], dim=1)).float().chunk(4, dim=1)
        usual = torch.stack([openness(now), openness(free), torch.full_like(now, -LOWEST / LIFTS)], dim=1) * BINS  # (B, 3)
        beyond = usual[:, :, None] - torch.arange(BINS, device=now.device)  # (B, 3, BINS) each bin's lower edge
        sure = self.usual(told).float()[:, :, None] * torch.exp(-(beyond - 0.5).square())
        logits = torch.stack([fingers + sure[:, 0] + sure[:, 1], lift + sure[:, 2]], dim=1)
        nearest, has_free = beyond.clamp(0, 1), (0 <= beyond[:, 1]) & (beyond[:, 1] < 1)
        nearest = torch.stack([torch.where(has_free, nearest[:, 1], nearest[:, 0]), nearest[:, 2]], dim=1)
        return logits, nearest + torch.stack(places, dim=1)


def surroundings(images: Tensor, states: Tensor, next_pose: Tensor, previous_actions: Tensor, actions: Tensor,
                 cameras: Cameras, normalizer: Normalizer) -> tuple[Tensor, Tensor]:
    """What a grasp depends on, as seen from the hand: pictures (B, 19, H, W), features (B, 14 L + 30).

    images (B, 2, V, 3, H, W) in [-1, 1] and states (B, 2, 8): a chunk ago and now; next_pose (B, 8): after the next one in
    free air. Where the hand is over the table is left out: a grasp here is a grasp there, which makes examples of all.
    """
    (before, state), (agent, wrist) = states.unbind(1), images[:, 1].unbind(1)
    warped, seen = warp_wrist(wrist, state, next_pose, cameras.wrist, cameras.plane_z)
    views = ((images[:, 0, 0], before), (agent, state), (agent, next_pose))
    pictures = [around_hand(view, pose, cameras) for view, pose in views] + [images[:, 0, 1], wrist, warped * seen, seen]
    past, now, then = (state_features(pose, normalizer) for pose in (before, state, next_pose))
    at_home = torch.cat([torch.zeros_like(now[:, :2]), now[:, 2:]], dim=1)
    numbers = [previous_actions.flatten(1), actions.flatten(1), 4 * (now - past), at_home, 4 * (then - now)]
    return torch.cat(pictures, dim=1), torch.cat(numbers, dim=1)


def around_hand(agent: Tensor, state: Tensor, cameras: Cameras) -> Tensor:
    """The half of the agent view (B, 3, H, W) that has the gripper in its middle, drawn twice as large."""
    pose = camera_pose(cameras.agentview, state, on_hand=False)
    where, _ = project(state[:, None, :3], cameras.agentview, pose)  # (B, 1, 2)
    grid = pixel_grid(agent.shape[-1], agent.device) / 2 + where[:, :, None]
    return F.grid_sample(agent, grid, padding_mode="border", align_corners=False)


def contact_bins(pose: Tensor, next_state: Tensor) -> tuple[Tensor, Tensor]:
    """What is learned of the fingers' openness and of the lift above the free hand's pose (B, 8): (B, 2) in 0 .. BINS - 1,
    and the place in that bin."""
    lift = (next_state[:, 2] - pose[:, 2] - LOWEST) / LIFTS
    value = (torch.stack([openness(opening(next_state)), lift], dim=1) * BINS).clamp(0, BINS)
    bin = value.long().clamp(max=BINS - 1)
    return bin, value - bin


def quantile(logits: Tensor, places: Tensor, uniform: Tensor) -> Tensor:
    """(B,) from 0 to 1: the place in the bin at which the cumulative probability reaches uniform (B,), 0.5 the median."""
    cumulative = logits.softmax(dim=1).cumsum(dim=1)
    bin = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).clamp(max=BINS - 1)
    return (bin + places.gather(1, bin).clamp(0, 1)).squeeze(1) / BINS


def in_contact(pose: Tensor, logits: Tensor, places: Tensor, uniform: Tensor) -> Tensor:
    """The free hand's pose (B, 8), logits and places (B, 2, BINS) -> the state (B, 8): its fingers, evenly apart, and its
    lift, both drawn by uniform (B,). The lower, the less they hold and the higher on the object the hand is stopped."""
    apart = MAX_OPENING * quantile(logits[:, 0], places[:, 0], uniform).square()
    lift = LOWEST + LIFTS * quantile(logits[:, 1], places[:, 1], 1 - uniform)
    lift = torch.where(lift.abs() > LIFTS / BINS / 2, lift, 0.0)  # within the middle bin: none
    return with_fingers(torch.cat([pose[:, :2], (pose[:, 2] + lift)[:, None], pose[:, 3:]], dim=1), apart)
