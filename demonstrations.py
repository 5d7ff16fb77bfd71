"""Demonstrations: a scripted expert for LIBERO, and LIBERO's own HDF5 files, written and read.

The paper clones from five human demonstrations a task. Those files are read where the user has them; where not, the
expert below makes files of the same layout. It sees true object poses and looks at nothing but the current state of
the simulator (no clock, no phase): the same state always gets the same action, so a memoryless policy can clone it.

Two things a reader should know about the files:
1. Row t holds action t and the observation AFTER it (LIBERO's create_dataset.py; LIBERO issue 54), though `states`
   holds the simulator BEFORE action t. The reader pairs a frame with the action that follows it. Our files open with
   one settling step, so that the first frame is there too.
2. Pictures are stored as OpenGL leaves them, upside down.

Shapes: S control steps, T = S + 1 rows of a file, V camera views, H, W image.
Try it:  python demonstrations.py --suite libero_object --tries 5
"""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from robosuite.utils import transform_utils

from episodes import Episode
from libero_env import LiberoTask
from runs import UserError

NO_OP = np.array([0, 0, 0, 0, 0, 0, -1.0])
POINTING_DOWN = np.diag([1.0, -1.0, -1.0])  # rotation of the hand; its fingers then open along the world's y axis
FINGER_DEPTH = 0.04  # m: the palm meets an object whose top is further above the grip point than this
WIDEST_GRIP = 0.068  # m: the fingers open 0.08


@dataclass
class Style:
    """What differs from one demonstration to the next."""
    hover: float = 0.22  # m above the support: height of the approach
    clearance: float = 0.03  # m between the carried object and the rim that it passes
    speed: float = 1.0  # largest motion command
    burst_rate: float = 0.0  # probability, at a control step, that the arm is pushed off its way

    @classmethod
    def draw(cls, rng, disturb) -> "Style":
        return cls(rng.uniform(0.19, 0.25), rng.uniform(0.02, 0.05), rng.uniform(0.8, 1.0), 0.06 if disturb else 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# The expert: three skills (grasp, carry, retreat); the state decides which
# ---------------------------------------------------------------------------------------------------------------------
class Expert:
    """`action()` says what to do now. `may_push` is then False where a push would ruin the grasp or the release."""

    def __init__(self, task, style):
        self.task, self.style = task, style
        self.world = task.env.env  # robosuite's environment, inside LIBERO's wrapper
        self.may_push = False
        self.goals = self.world.parsed_problem["goal_state"]
        unknown = {goal[0] for goal in self.goals} - {"in"}
        if unknown:
            raise UserError(f"the scripted expert cannot do {', '.join(sorted(unknown))} goals: use libero_object, or "
                            "give recorded demonstrations with --demos")
        self.support = min(self.corners(goal[1])[:, 2].min() for goal in self.goals)

    def action(self) -> np.ndarray:
        """(7,) in [-1, 1]: a proportional step towards the target pose of the skill that the state calls for."""
        _, name, region = next((goal for goal in self.goals if not self.world._eval_predicate(goal)), self.goals[-1])
        state = self.task.state().astype(np.float64)
        self.position, self.opening = state[:3], state[6] - state[7]
        self.rotation = transform_utils.quat2mat(transform_utils.axisangle2quat(state[3:6]))
        held = self.holds(name)
        aside = np.linalg.norm(self.middle(name)[:2] - self.site(region)[:2])
        if held:
            target, yaw, gripper = self.carry(name, region)
        elif aside < 0.05:
            target, yaw, gripper = self.retreat()
        else:
            target, yaw, gripper = self.grasp(name)
        motion = np.concatenate([(target - self.position) / 0.05, self.turn_to(yaw) / 0.5])
        motion *= min(1.0, self.style.speed / np.abs(motion).max())  # scaled as a whole: the path stays straight
        return np.append(motion, gripper)

    def grasp(self, name):
        """Above the object, down, close. The height is a funnel: the hand sinks as it gets centred."""
        corners = self.corners(name)
        top, bottom, middle = corners[:, 2].max(), corners[:, 2].min(), self.middle(name)
        target = np.array([*middle[:2], max(middle[2], top - FINGER_DEPTH)])
        yaw = self.grip_yaw(corners)
        aside = np.linalg.norm(target[:2] - self.position[:2]) + 0.05 * np.linalg.norm(self.turn_to(yaw))
        closing = self.opening < 0.072  # once the fingers move, small slips no longer open them
        reached = aside < (0.02 if closing else 0.008) and abs(target[2] - self.position[2]) < (0.02 if closing else 0.01)
        self.may_push = self.position[2] - target[2] > 0.08
        if not reached:
            target[2] += np.clip(6 * (aside - 0.005), 0, bottom + self.style.hover - target[2])
        return target, yaw, 1.0 if reached else -1.0

    def carry(self, name, region):
        """Up, over the rim, down a little, let go. Sideways motion fades in with height and height with distance."""
        bottom = self.corners(name)[:, 2].min()
        rim = self.corners(self.world.object_sites_dict[region].parent_name)[:, 2].max()
        offset = self.site(region)[:2] - self.middle(name)[:2]
        aside = np.linalg.norm(offset)
        below = self.position[2] - bottom  # how far the object reaches below the grip point
        travel = rim + self.style.clearance + below
        release = max(rim, self.support + 0.03 + below)
        height = np.clip((bottom - self.support) / (rim - self.support), 0, 1)
        target = np.array([*(self.position[:2] + height ** 2 * offset), release])
        target[2] += np.clip(6 * (aside - 0.01), 0, travel - release)
        let_go = aside < 0.02 and self.position[2] < release + 0.012
        self.may_push = aside > 0.06 and height > 0.3
        return target, 0.0, -1.0 if let_go else 1.0

    def retreat(self):
        """Fingers open, straight up."""
        self.may_push = False
        return np.array([*self.position[:2], self.support + self.style.hover + 0.1]), 0.0, -1.0

    # What the expert measures ------------------------------------------------------------------------------------
    def corners(self, name) -> np.ndarray:
        """(P, 3) corners of the boxes around an object's collision shapes, in the world."""
        model, data = self.world.sim.model._model, self.world.sim.data
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
        points = []
        for geom in map(model.geom, self.world.get_object(name).contact_geoms):
            centre, half = model.geom_aabb[geom.id].reshape(2, 3)
            points.append(data.geom_xpos[geom.id] + (centre + signs * half) @ data.geom_xmat[geom.id].reshape(3, 3).T)
        return np.concatenate(points)

    def middle(self, name) -> np.ndarray:
        corners = self.corners(name)
        return (corners.min(axis=0) + corners.max(axis=0)) / 2

    def site(self, region) -> np.ndarray:
        return self.world.sim.data.get_site_xpos(region)

    def holds(self, name) -> bool:
        return self.world._check_grasp(self.world.robots[0].gripper, self.world.get_object(name))

    def grip_yaw(self, corners) -> float:
        """Turn of the hand (rad) that lets the fingers span the object: none if it fits, else along its narrow side."""
        yaws = np.radians(np.arange(-90, 91, 5))
        width = np.ptp(corners[:, :2] @ np.stack([-np.sin(yaws), np.cos(yaws)]), axis=0)
        return 0.0 if width[len(yaws) // 2] < WIDEST_GRIP else yaws[np.argmin(width + 0.01 * np.abs(yaws))]

    def turn_to(self, yaw) -> np.ndarray:
        """(3,) axis-angle, in the world, from the hand's rotation to pointing down with this yaw."""
        target = transform_utils.euler2mat(np.array([0, 0, yaw])) @ POINTING_DOWN
        return transform_utils.quat2axisangle(transform_utils.mat2quat(target @ self.rotation.T))
