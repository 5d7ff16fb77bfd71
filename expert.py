"""A scripted expert for LIBERO: a few skills, chosen by the task's own goal and the simulator's true state.

    On, In       grasp -> carry (under a roof: insert) -> (let go) retreat     the object into its region, or onto another
    On           push                                       what cannot be gripped: a plate
    Open, Close  slide                                      a drawer or a door, at its handle
    Turnon       turn                                       a stove's knob

It knows the true poses of all objects and is otherwise a memoryless policy: no clock, no phase, the state of the
simulator alone decides, so that a memoryless clone can imitate it. Where it grips is read off the simulator's
collision shapes: any part that fits between the fingers (a whole can, the rim of a bowl, a handle).

Shapes: P points on collision shapes, C candidate grips. Metres, radians. Try it: python demonstrations.py --task libero_goal
"""
from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from episodes import CLOSING
from geometry import opening

DOWN = Rotation.from_rotvec([np.pi, 0, 0])  # the hand's rotation when it points down; its fingers open along y
HALF_TURNS = Rotation.identity(), Rotation.from_rotvec([0, 0, np.pi])
UP = np.array([0.0, 0.0, 1.0])
YAWS = np.radians(np.arange(-75, 91, 15))
GRIP = 0.034  # half of what fits between the fingers, which open 0.08
FINGER = np.array([0.06, 0.013])  # an open finger: how far it reaches across, half its width
FINGER_DEPTH = 0.03  # from the grip point up to the palm
FINGERTIP = 0.016  # from the grip point down to the tips
PALM = np.array([0.105, 0.036])  # half its length, in the direction that the fingers open in, and depth
REACH = 0.75  # of the hand from the robot's base; further out the arm is straight, and a straight arm does not bend again
GENTLE = 0.35  # of a push, close to a grasp or a release: what is learned there is where exactly to go
NEAR = 0.03  # of its target the hand slows down: a clone's small errors in a command are small errors in place
SPACING = 0.02  # between the points that stand for a collision shape


class Expert:
    """`action()` is what to do now. It sets `bears`, how hard a push it bears: 1, GENTLE ones, or 0 where any would ruin
    a grasp or a release."""

    def __init__(self, task, rng):
        self.task, self.world = task, task.env.env  # robosuite's environment, inside LIBERO's wrapper
        self.model, self.data = self.world.sim.model._model, self.world.sim.data
        self.hover = rng.uniform(0.19, 0.25)  # above the support: height of the approach
        self.clearance = rng.uniform(0.02, 0.05)  # between what moves and what it passes over
        self.speed = rng.uniform(0.8, 1.0)  # largest motion command
        goals = self.world.parsed_problem["goal_state"]
        self.goals = sorted(goals, key=lambda goal: goal[0] == "close")  # a drawer is filled, then closed
        self.things = {**self.world.objects_dict, **self.world.fixtures_dict}
        self.things = {name: thing for name, thing in self.things.items() if hasattr(thing, "contact_geoms")}
        self.shapes = {name: lattice(self.model, thing) for name, thing in self.things.items()}
        self.geoms = np.unique(np.concatenate([geoms for geoms, _ in self.shapes.values()]))
        self.support = min(self.points(name)[:, 2].min() for name in self.world.objects_dict)

    def action(self) -> np.ndarray:
        """(7,) in [-1, 1]: a proportional step towards the target of the skill that the state calls for."""
        state = self.task.state().astype(np.float64)
        self.position, self.opening = state[:3], opening(state)
        self.rotation = Rotation.from_rotvec(state[3:6])
        self.bears = 1.0
        self.cloud = {name: self.points(name) for name in self.shapes}
        target, rotation, gripper = self.skill()
        axis = self.rotation.apply(UP)  # the way that the hand points
        near = np.concatenate(list(self.cloud.values())) - self.position
        if axis[2] > -0.85 and np.linalg.norm(self.turn_to(rotation)) > 0.5 and np.linalg.norm(near, axis=1).min() < 0.07:
            target, rotation = self.position - 0.05 * axis, self.rotation  # first out of the handle that it holds
        motion = np.concatenate([(target - self.position) / NEAR, self.turn_to(rotation) / 0.5])
        motion *= min(1.0, self.speed / np.abs(motion).max())  # as a whole: the path stays straight
        return np.append(motion, gripper)

    def skill(self):
        """-> target (3,), rotation, gripper command of the skill for the first goal that does not hold yet."""
        open_goals = [goal for goal in self.goals if not self.world._eval_predicate(goal)]
        held = [goal for goal in self.goals if goal[0] in ("on", "in") and self.holds(goal[1])]
        self.holding = bool(held)
        if held:
            return self.carry(held[0][1], held[0][2])
        if not open_goals:
            return self.retreat()
        predicate, name, *region = open_goals[0]
        if predicate in ("open", "close"):
            return self.slide(name, predicate)
        if predicate == "turnon":
            return self.turn(name)
        if self.shut(region[0]):
            return self.slide(region[0], "open")
        if self.moving(name) and np.linalg.norm(self.landing(*open_goals[0][1:])[0] - self.origin(name)[:2]) < 0.05:
            return self.retreat()  # it was let go and falls into place
        grip, yaw, free = self.grip(name, region[0])
        on_table = region[0] in self.world.object_sites_dict and not self.world.object_sites_dict[region[0]].parent_name
        return self.push(name, region[0]) if on_table and not free else self.grasp(name, grip, yaw)

    # Skills -----------------------------------------------------------------------------------------------------
    def grasp(self, name, grip, yaw):
        """Above the part to grip, down, close. The height is a funnel: centred and turned, the hand sinks."""
        rotation = pointing(-UP, yaw)
        aside = np.linalg.norm(grip[:2] - self.position[:2]) + 0.05 * np.linalg.norm(self.turn_to(rotation))
        above = self.position[2] - grip[2]
        closing = self.opening < CLOSING  # once the fingers move, a small slip no longer opens them
        reached = max(aside, abs(above)) < (0.02 if closing else 0.01)
        self.bears = 0.0 if reached else 1.0 if above > 0.08 else GENTLE
        if reached:
            return grip, rotation, 1.0
        return self.over(grip, FINGERTIP, aside - 0.008, self.support + self.hover), rotation, -1.0

    def carry(self, name, region):
        """Up, over what is in the way, down, let go."""
        if self.roofed(region):
            return self.insert(name, region)
        goal, floor = self.landing(name, region)
        yaw = self.yaw() + self.misfit(name, region)
        below = self.position[2] - self.cloud[name][:, 2].min()  # how far the object hangs under the grip point
        place = np.append(self.position[:2] + goal - self.origin(name)[:2], 0)
        palm = palm_height(*in_hand(self.neighbours(name), place[None], np.array([yaw])))[0]
        place[2] = max(floor + below + 0.01, palm + 0.01)
        aside = np.linalg.norm(place[:2] - self.position[:2])
        turned = abs(self.misfit(name, region)) < 0.1
        let_go = turned and aside < 0.02 and self.position[2] < place[2] + 0.012
        target = self.over(place, below, aside - 0.01 if turned else 1, 0, ignore=name)
        far = aside > 0.06 and self.position[2] - below > self.support + 0.05
        self.bears = 0.0 if let_go else 1.0 if far else GENTLE
        return target, pointing(-UP, yaw), -1.0 if let_go else 1.0

    def insert(self, name, region):
        """Into what has a roof (a microwave): from the front, turned so that the hand, which is behind, stays outside."""
        out, mouth, floor = self.mouth(region)
        below = self.position[2] - self.cloud[name][:, 2].min()
        inward = (self.cloud[name].min(axis=0) + self.cloud[name].max(axis=0))[:2] / 2 - self.position[:2]
        turn = np.arctan2(-out[1], -out[0]) - np.arctan2(inward[1], inward[0])
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        place = mouth + 0.018 * out + (floor + below + 0.01) * UP
        offset = self.position - place
        ahead = offset @ out
        aside = np.linalg.norm(offset - ahead * out)
        self.bears = float(ahead > 0.2 and self.position[2] - below > self.support + 0.05)
        target = place + 0.15 * np.clip(20 * (aside + 0.03 * abs(turn) - 0.01), 0, 1) * out
        if abs(turn) > 0.3 or aside > 0.06:
            target = self.over(place + 0.18 * out, below, aside, 0, ignore=name)
        let_go = abs(turn) < 0.15 and aside < 0.02 and ahead < 0.006
        return target, pointing(-UP - 0.7 * out, self.yaw() + np.clip(turn, -0.6, 0.6)), -1.0 if let_go else 1.0

    def push(self, name, region):
        """What cannot be gripped (a plate) is pushed at its rim, from inside, with closed fingers."""
        way = self.landing(name, region)[0] - self.origin(name)[:2]
        way = np.append(way / np.linalg.norm(way), 0)
        middle = self.origin(name) * [1, 1, 0] + (self.support + FINGERTIP - 0.004) * UP
        offset = (self.position - middle) @ way
        aside = self.position - middle - offset * way
        self.bears = float(aside[2] > 0.06)
        if np.abs(aside[:2]).max() < 0.02 and aside[2] < 0.012 and -0.04 < offset < 0.07:
            return self.position + 0.06 * way - aside, pointing(-UP), 1.0
        return self.over(middle, FINGERTIP, np.linalg.norm((middle - self.position)[:2]) - 0.02, 0), pointing(-UP), 1.0

    def slide(self, region, wish):
        """Open: the hand lies along the way that the drawer comes, grips its handle and backs off with it.
        Close: with closed fingers it pushes the handle, or what stands out most."""
        handle, way, _ = self.handle(region)  # way: where the handle goes when it is opened
        offset = self.position - handle
        ahead = offset @ way
        aside = np.linalg.norm(offset - ahead * way)
        if wish == "close":
            rotation = pointing(-UP - 0.3 * way, np.arctan2(way[1], way[0]))
            target = handle + (0.1 * np.clip(20 * (aside - 0.03), 0, 1) - 0.05) * way
            if aside > 0.1 or ahead < -0.02:
                target = self.over(handle + 0.1 * way, FINGERTIP, aside, 0)
            return target, rotation, 1.0
        rotation = pointing(-way)
        reached = aside < 0.015 and ahead < (0.025 if self.opening < CLOSING else 0.01)
        self.bears = float(ahead > 0.08)
        if reached:
            pulling = self.opening < 0.03
            return handle + (0.06 if pulling else 0) * way, rotation, 1.0
        turn = np.linalg.norm(self.turn_to(rotation))
        if ahead < 0.03 and aside > 0.05 or aside > 0.1:
            return self.over(handle + 0.1 * way, FINGERTIP, aside, 0), rotation, -1.0
        return handle + 0.1 * np.clip(20 * (aside + 0.03 * turn - 0.008), 0, 1) * way, rotation, -1.0

    def turn(self, name):
        """The knob between the fingers, turned together with the hand."""
        knob, _, yaw = self.handle(name)
        rotation = pointing(-UP, yaw)
        aside = np.linalg.norm(knob[:2] - self.position[:2]) + 0.05 * np.linalg.norm(self.turn_to(rotation))
        closing = self.opening < CLOSING
        reached = aside < (0.03 if closing else 0.01) and self.position[2] - knob[2] < 0.012
        self.bears = float(self.position[2] - knob[2] > 0.08)
        if reached:
            return knob, pointing(-UP, yaw + (0.5 if self.opening < 0.04 else 0)), 1.0
        return self.over(knob, FINGERTIP, aside - 0.008, self.support + self.hover), rotation, -1.0

    def retreat(self):
        """Fingers open, straight up."""
        self.bears = 0.0
        return np.array([*self.position[:2], self.support + self.hover + 0.1]), pointing(-UP, self.yaw()), -1.0

    def over(self, place, below, aside, least, ignore=None):
        """Where to move on the way to `place` (3,): up over what is in between, there, down into a funnel.

        below: how far the hand or what it carries reaches under the grip point. aside: what is left to go sideways;
        least: the lowest height of travel.
        """
        points = self.neighbours(ignore)
        way = place[:2] - self.position[:2]
        share = np.clip((points[:, :2] - self.position[:2]) @ way / max(way @ way, 1e-6), 0, 1)
        near = np.linalg.norm(points[:, :2] - self.position[:2] - share[:, None] * way, axis=1) < 0.06
        passing = points[near, 2].max(initial=self.support) + below
        height = place[2] + np.clip(6 * aside, 0, max(passing + self.clearance, least, place[2]) - place[2])
        need = min(passing + 0.01, place[2] + np.linalg.norm(way))
        free = np.clip(1 - (need - self.position[2]) / 0.04, 0, 1)  # too low, it first goes up
        return np.array([*(self.position[:2] + free * way), height])

    # What the expert measures -----------------------------------------------------------------------------------
    def points(self, name) -> np.ndarray:
        """(P, 3) points on an object's collision shapes, in the world."""
        geoms, local = self.shapes[name]
        rotation = self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        return self.data.geom_xpos[geoms] + (rotation @ local[..., None])[..., 0]

    def neighbours(self, *names) -> np.ndarray:
        """(P, 3) points on everything else."""
        return np.concatenate([points for other, points in self.cloud.items() if other not in names])

    def origin(self, name) -> np.ndarray:
        return self.data.get_body_xpos(self.things[name].root_body)

    def landing(self, name, region) -> tuple[np.ndarray, float]:
        """Where the object's origin must go (2,) and how high its bottom will stand there."""
        goal = (self.origin(region) if region in self.things else self.data.get_site_xpos(region))[:2]
        sharing = [other for predicate, other, *where in self.goals if predicate == "on" and where == [region]]
        if len(sharing) > 1:  # side by side
            aside = (sharing.index(name) - (len(sharing) - 1) / 2) * self.world.object_sites_dict[region].size[0]
            goal = goal + aside * self.data.get_site_xmat(region)[:2, 0]
        points, others = self.cloud[name], self.neighbours(name, *sharing)
        radius = np.abs(points[:, :2] - self.origin(name)[:2]).max()
        under = np.linalg.norm(others[:, :2] - goal, axis=1) < radius
        return goal, others[under, 2].max(initial=self.support)

    def roofed(self, region) -> bool:
        """Whether something of the region's own fixture is above it: one cannot come from there."""
        site = self.world.object_sites_dict.get(region)
        if site is None or site.joints or site.parent_name not in self.cloud:
            return False
        place, points = self.data.get_site_xpos(region), self.cloud[site.parent_name]
        return bool(((np.abs(points - place)[:, :2].max(axis=1) < 0.02) & (points[:, 2] > place[2] + 0.05)).any())

    def mouth(self, region):
        """Of a roofed region: the way out of it (3,), the place (3,) at height 0 where its middle line passes the edge of
        the roof, and the height of its floor."""
        site = self.world.object_sites_dict[region]
        place, axes = self.data.get_site_xpos(region), self.data.get_site_xmat(region)
        offset = self.cloud[site.parent_name] - place
        ways = axes[:, 0], -axes[:, 0], axes[:, 1], -axes[:, 1]
        ahead = [offset @ way for way in ways]
        beside = [np.linalg.norm(offset - far[:, None] * way, axis=1) < 0.05 for far, way in zip(ahead, ways)]
        free = [far[near & (far > 0)].min(initial=1.0) for far, near in zip(ahead, beside)]
        i = int(np.argmax(free))
        out, side = ways[i], ways[(i + 2) % 4]
        roof = (offset[:, 2] > 0.05) & (np.abs(offset @ side) < 0.05)
        floor = (offset[:, 2] < 0) & (np.linalg.norm(offset[:, :2], axis=1) < 0.05)
        edge = place + ahead[i][roof].max() * out + (free[(i + 2) % 4] - free[(i + 2) % 4 ^ 1]) / 2 * side
        return out, edge * [1, 1, 0], place[2] + offset[floor, 2].max()

    def handle(self, name):
        """Of a drawer, a door or a knob: the middle of its handle, the way that it moves when it is opened or turned
        on (3,) and the yaw at which the hand grips it from above."""
        joint = self.model.joint(self.world.object_sites_dict[name].joints[0] if name in self.world.object_sites_dict
                                 else self.things[name].joints[-1])
        axis, anchor = self.data.xaxis[joint.id], self.data.xanchor[joint.id]
        axis = axis if joint.range[1] > -joint.range[0] else -axis  # the larger side of its range is the open one
        geoms = self.geoms[self.model.geom_bodyid[self.geoms] == joint.bodyid[0]]
        rotation = self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        half = self.model.geom_aabb[geoms, 3:]
        centres = self.data.geom_xpos[geoms] + (rotation @ self.model.geom_aabb[geoms, :3, None])[..., 0]
        if joint.type[0] == 2:  # mjJNT_SLIDE
            part = np.argmax(centres @ axis)
            return centres[part], axis, 0.0
        top = centres[:, 2] + (np.abs(rotation[:, 2]) * half).sum(axis=1)
        part = np.argmax(top)
        long = rotation[part][:, np.argmax(half[part] * np.abs(rotation[part][:2]).max(axis=0))]
        if np.linalg.norm(self.model.geom_aabb[geoms, 3:].max(axis=0)) < 0.1:  # a knob: turned about its middle
            return np.array([*anchor[:2], top[part] - 0.02]), axis, np.arctan2(long[1], long[0])
        part = np.argmax(centres @ np.cross(axis, centres.mean(axis=0) - anchor))
        way = np.cross(axis, centres[part] - anchor)
        return centres[part], way / np.linalg.norm(way), 0.0

    def misfit(self, name, region) -> float:
        """The turn (rad) that brings a long object (a book) into line with a narrow region, or the palm into line with a
        drawer, clear of its cabinet; 0 where it does not matter."""
        if region in self.things:
            return 0.0
        if self.world.object_sites_dict[region].joints:
            way = self.handle(region)[1]
            return (np.arctan2(way[1], way[0]) - self.yaw() + np.pi / 2) % np.pi - np.pi / 2
        site = self.data.get_site_xmat(region) * self.world.object_sites_dict[region].size
        wide = np.abs(site[:2]).sum(axis=1)
        xy = self.cloud[name][:, :2]
        spread, axes = np.linalg.eigh(np.cov(xy.T))
        if wide.max() < 2 * wide.min() or spread[1] < 2 * spread[0]:
            return 0.0
        turn = np.arctan2(*(np.eye(2)[np.argmax(wide)][::-1])) - np.arctan2(axes[1, 1], axes[0, 1])
        return (turn + np.pi / 2) % np.pi - np.pi / 2

    def holds(self, name) -> bool:
        robot, thing = self.world.robots[0], self.things[name]
        fingers = robot.gripper.important_geoms
        sides = [fingers["left_finger"], fingers["right_finger"]]
        if not 0.002 < self.opening < CLOSING:
            return False
        speed = np.abs(self.data.qvel[robot._ref_gripper_joint_vel_indexes]).max()
        stopped = 0.003 < self.opening and (speed < 0.01 or self.opening < 0.015)  # on a thin rim, perhaps one alone
        return self.world._check_grasp(sides, thing) or stopped and self.world.check_contact(sum(sides, []), thing)

    def moving(self, name) -> bool:
        return np.linalg.norm(self.data.get_body_xvelp(self.things[name].root_body)) > 0.05

    def shut(self, region) -> bool:
        """Whether the region is in a drawer that has to be opened first."""
        site = self.world.object_sites_dict.get(region)
        return bool(site is not None and site.joints) and not self.world.object_states_dict[region].is_open()

    def yaw(self) -> float:
        """The hand's turn about the vertical, between -90 and 90 degrees: both ways round it grips alike."""
        x = self.rotation.apply([1, 0, 0])
        return (np.arctan2(x[1], x[0]) + np.pi / 2) % np.pi - np.pi / 2

    def turn_to(self, rotation) -> np.ndarray:
        """(3,) axis-angle, in the world, of the turn that is left: the shorter one, half a turn about itself is no turn."""
        turns = [(rotation * about * self.rotation.inv()).as_rotvec() for about in HALF_TURNS]
        return min(turns, key=np.linalg.norm)

    def grip(self, name, region):
        """(3,) grip point, yaw, whether it can be gripped there: the part of the object that is easiest to grip from above.

        Candidates are the middles of its shapes and its own. Something must be between the fingers, and nothing where the
        open fingers and the palm will be, here and where the object goes. The cheapest has little yaw and is near the
        object's middle.
        """
        own, others = self.cloud[name], self.neighbours(name)
        middle = (own.min(axis=0) + own.max(axis=0)) / 2
        geoms, first = np.unique(self.shapes[name][0], return_index=True)
        centres = np.concatenate([[middle], self.data.geom_xpos[geoms]])
        top = np.append(own[:, 2].max(), np.maximum.reduceat(own[:, 2], first))  # of what the fingers will hold
        centres, yaws, top = np.repeat(centres, len(YAWS), axis=0), np.tile(YAWS, len(centres)), np.repeat(top, len(YAWS))
        cost = 0.5 * np.abs(yaws) + 8 * np.linalg.norm(centres[:, :2] - middle[:2], axis=1)
        base = self.data.get_body_xpos("robot0_base")[:2]
        reach = np.linalg.norm(centres[:, :2] - base, axis=1)
        cost = cost + 0.5 * reach - 4 * centres[:, 1]  # of two sides the left one, always: a clone of both goes in between
        cost = cost + 40 * np.maximum(reach - REACH, 0)
        if self.opening < CLOSING:  # what the fingers are about to hold
            turn = np.abs(np.sin(yaws - self.yaw()))
            cost = cost + 100 * (np.linalg.norm(centres[:, :2] - self.position[:2], axis=1) + 0.05 * turn)
        u, v, z = in_hand(own, centres, yaws)  # (P, C), (P, C), (P, 1)
        height = np.maximum(np.minimum(centres[:, 2], top - 0.012), self.support + FINGERTIP)
        height = np.maximum(height, palm_height(u, v, z))
        held = (u < GRIP) & (v < FINGER[1]) & (z > height - FINGERTIP)
        cost[len(YAWS):] += 40 * np.where(held, u, 0)[:, len(YAWS):].max(axis=0)  # thin parts: no bowl's wall lengthwise
        cost = cost + 100 * blocked(u, v, z, height) + 100 * (height > top - 0.006)
        cost[:len(YAWS)] += 100 * (np.where(v < 0.03, u, 0)[:, :len(YAWS)].max(axis=0) > GRIP)  # the whole must fit
        if self.roofed(region):  # the hand stays outside: the object must lie well ahead of it, the palm across
            out, mouth, _ = self.mouth(region)
            site = self.data.get_site_xpos(region)
            depth = np.abs(self.data.get_site_xmat(region).T @ out) @ self.world.object_sites_dict[region].size
            need = (mouth - site) @ out + 0.03 - depth
            toward = self.origin(name)[:2] - centres[:, :2]
            ahead = np.linalg.norm(toward, axis=1)
            across = np.abs(np.cos(yaws) * toward[:, 1] - np.sin(yaws) * toward[:, 0]) / np.maximum(ahead, 0.01)
            cost = cost + 100 * ((ahead < need) | (across > 0.3))
        best = np.argsort(cost, kind="stable")[:100]
        u, v, z = in_hand(others[np.abs(others[:, :2] - middle[:2]).max(axis=1) < 0.2], centres[best], yaws[best])
        flat = height[best] > top[best] - 0.006  # of a flat thing the upper 14 mm will do
        raised = np.maximum(height[best], palm_height(u, v, z) - 0.006 * flat)  # over what is beside it
        touched = raised > top[best] + np.where(flat, 0.002, -0.006)  # rather the palm than the fingers
        under = ((u < PALM[0]) & (v < PALM[1]) & (z > height[best] + FINGER_DEPTH)).sum(axis=0)
        cost = cost[best] + 100 * blocked(u, v, z, height[best]) + 50 * touched + under * (touched | ~flat)
        goal, floor = self.landing(name, region)
        there = centres[best, :2] + goal - self.origin(name)[:2]
        palm = palm_height(*in_hand(others[np.abs(others[:, :2] - goal).max(axis=1) < 0.3], there, yaws[best]))
        cost = cost + 20 * (palm > floor + height[best] - own[:, 2].min() + 0.05)  # it would let go from high above
        c = np.argmin(cost)
        height = height[best[c]] if touched[c] else raised[c]
        return np.array([*centres[best[c], :2], height]), yaws[best[c]], cost[c] < 90


def in_hand(points, places, yaws):
    """How far points (P, 3) are from grip points (C, 3): in the direction that the fingers open in, in the other one
    (both (P, C), absolute); and their heights (P, 1)."""
    across, along = np.stack([-np.sin(yaws), np.cos(yaws)]), np.stack([np.cos(yaws), np.sin(yaws)])  # (2, C)
    u, v = (np.abs(points[:, :2] @ axes - (places[:, :2] * axes.T).sum(axis=1)) for axes in (across, along))
    return u, v, points[:, 2:]


def palm_height(u, v, z):
    """(C,) the lowest grip point at which the palm is above all that is under it."""
    return np.where((u < PALM[0]) & (v < PALM[1]), z, -1).max(axis=0, initial=-1) - FINGER_DEPTH + 0.004


def blocked(u, v, z, height):
    """(C,) whether something is where the open fingers will be."""
    return ((u > GRIP) & (u < FINGER[0]) & (v < FINGER[1]) & (z > height - FINGERTIP)).any(axis=0)


def pointing(direction, yaw=0.0) -> Rotation:
    """The hand's rotation when it is turned by `yaw` about the vertical and then tilted to point in `direction` (3,)."""
    tilt = np.cross(-UP, direction)
    angle = np.arctan2(np.linalg.norm(tilt), -direction[2])
    return Rotation.from_rotvec(angle * tilt / max(np.linalg.norm(tilt), 1e-9)) * Rotation.from_euler("z", yaw) * DOWN


def lattice(model, thing):
    """Points about SPACING apart that fill the boxes around an object's collision shapes.

    -> (P,) the shape's id and (P, 3) the point in the shape's frame.
    """
    ids, points = [], []
    for geom in thing.contact_geoms:
        geom = model.geom(geom).id
        centre, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
        axes = [np.linspace(-side, side, 2 + int(2 * side / SPACING)) for side in half]
        points.append(centre + np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3))
        ids.append(np.full(len(points[-1]), geom))
    return np.concatenate(ids), np.concatenate(points)
