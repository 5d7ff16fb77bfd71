"""Demonstrations: a scripted expert for LIBERO, and LIBERO's own HDF5 files, written and read.

The paper clones from five human demonstrations a task. Those files are read where the user has them; if not,
the expert below makes files of the same layout (a departure: scripted, not human). It knows the true poses of
all objects and is otherwise a memoryless policy: no clock, no phase, the simulator's state alone decides, so
that a memoryless clone can imitate it. The arm is pushed now and then; `actions` in the files hold what the expert
wanted (the policy learns that), `executed_actions` what the arm was told (the world simulator learns that).

Two things to know about LIBERO's files:
1. Row t holds action t and the observation AFTER it (create_dataset.py; LIBERO issue 54), but `states` holds
   the simulator BEFORE it. The reader pairs each frame with the action that follows it. Our files open with
   one more settling step, so that the first frame is in them too.
2. Pictures are stored as OpenGL leaves them, upside down.

Shapes: T rows of a file, V camera views, H, W image; P points, Y candidate yaws.
Try it:  python demonstrations.py --suite libero_object --tries 5
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from episodes import Episode
from libero_env import NO_OP, RENDER_SIZE, LiberoTask, load_suite, shrink, step_limit
from runs import UserError, clear_errors

POINTING_DOWN = Rotation.from_rotvec([np.pi, 0, 0])  # the hand's; its fingers then open along y
FINGER_DEPTH = 0.03  # m from the grip point up to the palm: an object's top must not reach further
PALM = np.array([0.11, 0.04])  # m: half its length, in the direction that the fingers open in, and depth
WIDEST_GRIP = 0.068  # m: what fits between the fingers, which open 0.08
PUSH_RATE = 0.06  # probability, at a control step, that a burst of pushes starts
DONE_STEPS = 9  # a demonstration ends when its goal has held this long: it shows what "done" looks like


# -----------------------------------------------------------------------------------------------------------
# The expert: three skills (grasp, carry, retreat); the state of the simulator says which
# -----------------------------------------------------------------------------------------------------------
class Expert:
    """`action()` is what to do now. It sets `may_push`: False where a push ruins a grasp or a release."""

    def __init__(self, task, rng):
        self.task, self.world = task, task.env.env  # robosuite's environment, inside LIBERO's wrapper
        self.hover = rng.uniform(0.19, 0.25)  # m above the support: height of the approach
        self.clearance = rng.uniform(0.02, 0.05)  # m between the carried object and the rim that it passes
        self.speed = rng.uniform(0.8, 1.0)  # largest motion command
        self.goals = self.world.parsed_problem["goal_state"]
        for predicate, *_ in self.goals:
            if predicate != "in":
                raise UserError(f"the scripted expert cannot do '{predicate}' goals yet: use --task "
                                "libero_object, or give recorded demonstrations with --demos")
        self.boxes = {name: self.collision_boxes(name) for name in self.world.objects_dict}
        self.support = min(self.corners(name)[:, 2].min() for _, name, _ in self.goals)

    def action(self) -> np.ndarray:
        """(7,) in [-1, 1]: a proportional step towards the target of the skill that the state calls for."""
        state = self.task.state().astype(np.float64)
        self.position, self.opening = state[:3], state[6] - state[7]
        self.rotation = Rotation.from_rotvec(state[3:6])
        open_goals = [goal for goal in self.goals if not self.world._eval_predicate(goal)]
        _, name, region = (open_goals or self.goals)[0]
        self.holding = self.holds(name)
        if self.holding:
            target, yaw, gripper = self.carry(name, region)
        elif np.linalg.norm(self.middle(name)[:2] - self.site(region)[:2]) < 0.05:
            target, yaw, gripper = self.retreat()
        else:
            target, yaw, gripper = self.grasp(name)
        motion = np.concatenate([(target - self.position) / 0.05, self.turn_to(yaw) / 0.5])
        motion *= min(1.0, self.speed / np.abs(motion).max())  # as a whole: the path stays straight
        return np.append(motion, gripper)

    def grasp(self, name):
        """Above the object, down, close. The height is a funnel: centred and turned, the hand sinks."""
        corners, middle = self.corners(name), self.middle(name)
        target = np.array([*middle[:2], max(middle[2], corners[:, 2].max() - FINGER_DEPTH)])
        yaw = self.grip_yaw(name, target)
        aside = np.linalg.norm(target[:2] - self.position[:2]) + 0.05 * np.linalg.norm(self.turn_to(yaw))
        above = self.position[2] - target[2]
        closing = self.opening < 0.072  # once the fingers move, a small slip no longer opens them
        reached = aside < (0.02 if closing else 0.008) and abs(above) < (0.02 if closing else 0.01)
        self.may_push = above > 0.08
        if not reached:
            target[2] += np.clip(6 * (aside - 0.005), 0, self.support + self.hover - target[2])
        return target, yaw, 1.0 if reached else -1.0

    def carry(self, name, region):
        """Up, over the rim, down to it, let go. The higher the object, the faster it may go sideways."""
        bottom = self.corners(name)[:, 2].min()
        rim = self.corners(self.world.object_sites_dict[region].parent_name)[:, 2].max()
        offset = self.site(region)[:2] - self.middle(name)[:2]
        aside = np.linalg.norm(offset)
        below = self.position[2] - bottom  # how far the object hangs under the grip point
        travel, release = rim + self.clearance + below, max(rim, self.support + 0.03 + below)
        height = np.clip((bottom - self.support) / (rim - self.support), 0, 1)
        target = np.array([*(self.position[:2] + height ** 2 * offset), release])
        target[2] += np.clip(6 * (aside - 0.01), 0, travel - release)
        let_go = aside < 0.02 and self.position[2] < release + 0.012
        self.may_push = aside > 0.06 and height > 0.3
        return target, 0.0, -1.0 if let_go else 1.0

    def retreat(self):
        """Fingers open, straight up."""
        self.may_push = False
        return np.array([*self.position[:2], self.support + self.hover + 0.1]), 0.0, -1.0

    # What the expert measures -------------------------------------------------------------------------------
    def collision_boxes(self, name):
        """Ids (G,) of an object's collision shapes and the corners (G, 8, 3) of the boxes around them."""
        model = self.world.sim.model._model
        ids = np.array([model.geom(geom).id for geom in self.world.objects_dict[name].contact_geoms])
        centre, half = model.geom_aabb[ids, None, :3], model.geom_aabb[ids, None, 3:]  # (G, 1, 3)
        return ids, centre + half * np.stack(np.meshgrid(*[[-1, 1]] * 3), axis=-1).reshape(8, 3)

    def corners(self, name) -> np.ndarray:
        """(P, 3) corners of the boxes around an object's collision shapes, in the world."""
        (ids, corners), data = self.boxes[name], self.world.sim.data
        rotation = data.geom_xmat[ids].reshape(-1, 3, 3)
        return (data.geom_xpos[ids, None] + corners @ rotation.transpose(0, 2, 1)).reshape(-1, 3)

    def middle(self, name) -> np.ndarray:
        corners = self.corners(name)
        return (corners.min(axis=0) + corners.max(axis=0)) / 2

    def site(self, region) -> np.ndarray:
        return self.world.sim.data.get_site_xpos(region)

    def holds(self, name) -> bool:
        fingers = self.world.robots[0].gripper.important_geoms
        sides = [fingers["left_finger"], fingers["right_finger"]]
        return self.opening < 0.075 and self.world._check_grasp(sides, self.world.objects_dict[name])

    def grip_yaw(self, name, target) -> float:
        """The smallest turn (rad) at which the fingers span the object and the palm meets no neighbour."""
        yaws = np.radians(np.arange(-90, 91, 5))  # (Y,)
        across = np.stack([-np.sin(yaws), np.cos(yaws)])  # (2, Y) the direction that the fingers open in
        along = np.stack([np.cos(yaws), np.sin(yaws)])
        excess = np.ptp(self.corners(name)[:, :2] @ across, axis=0) - WIDEST_GRIP
        others = np.concatenate([self.corners(other) for other in self.boxes if other != name])
        others = others[others[:, 2] > target[2] + FINGER_DEPTH - 0.01, :2] - target[:2]
        met = (np.abs(others @ across) < PALM[0]) & (np.abs(others @ along) < PALM[1])  # (P, Y)
        return yaws[np.argmin(np.abs(yaws) + 1000 * excess.clip(0) + 100 * met.any(axis=0))]

    def turn_to(self, yaw) -> np.ndarray:
        """(3,) axis-angle, in the world, from the hand's rotation to pointing down with this yaw."""
        return (Rotation.from_euler("z", yaw) * POINTING_DOWN * self.rotation.inv()).as_rotvec()


# -----------------------------------------------------------------------------------------------------------
# One demonstration
# -----------------------------------------------------------------------------------------------------------
def expert_episode(task, seed, disturb=True, render=True) -> dict | None:
    """The rows of one demonstration by dataset name, or None where the expert missed the suite's step limit.

    disturb: now and then 2 to 5 executed actions are pushed in one random direction. The recorded actions are
    still what the expert wants in the state that it finds, so a clone sees how to come back.
    """
    rng = np.random.default_rng([seed, task.task_id])
    task.reset(seed=seed)
    expert = Expert(task, rng)
    rows = [step_row(task, NO_OP, NO_OP, render)]
    pushes = held = 0
    for _ in range(step_limit(task.suite)):
        action = expert.action()
        executed = action.copy()
        if not expert.may_push:
            pushes = 0
        elif disturb and pushes == 0 and rng.random() < PUSH_RATE:
            pushes, push = rng.integers(2, 6), rng.normal(size=6)
            push[:3] *= rng.uniform(0.5, 1.5) / np.linalg.norm(push[:3])
            push[3:] *= 0.2
        if pushes:
            executed[:6] += push
            pushes -= 1
        rows.append(step_row(task, action, executed, render))
        held = held + 1 if rows[-1]["rewards"] else 0
        if held >= DONE_STEPS and not expert.holding:  # "in" can hold while it still hangs in the hand
            rows[-1]["dones"] = np.uint8(1)
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return None


def step_row(task, action, executed, render) -> dict:
    """Execute an action; one row of a LIBERO file: the simulator before it, and what is seen after it."""
    executed = executed.clip(-1, 1)  # as the controller does
    row = {"states": task.env.get_sim_state(), "actions": action.astype(np.float64), "executed_actions": executed}
    row |= {"rewards": np.uint8(task.step(executed)), "dones": np.uint8(0)}
    state, joints = task.state(), np.array(task.env.robots[0]._joint_positions)
    row |= {"obs/ee_states": state[:6], "obs/ee_pos": state[:3], "obs/ee_ori": state[3:6],
            "obs/gripper_states": state[6:], "obs/joint_states": joints}
    if render:
        row["obs/agentview_rgb"], row["obs/eye_in_hand_rgb"] = task.render()[:, ::-1]
    return row


# -----------------------------------------------------------------------------------------------------------
# LIBERO's files
# -----------------------------------------------------------------------------------------------------------
def collect_demonstrations(suite, task_id, count, seed, folder, mesh_cell=0.0, image_size=RENDER_SIZE) -> Path:
    """Write `folder`/<task name>_demo.hdf5: `count` demonstrations, from fresh placements, no test states."""
    task = LiberoTask(suite, task_id, mesh_cell, image_size)
    path = Path(folder) / f"{task.name}_demo.hdf5"
    temporary = path.with_name(path.name + ".writing")
    lengths = []
    with h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for attempt in range(1000 * seed, 1000 * seed + 3 * count):
            rows = expert_episode(task, attempt) if len(lengths) < count else None
            if rows is None:
                continue
            demo = data.create_group(f"demo_{len(lengths)}")
            for name, values in rows.items():
                demo.create_dataset(name, data=values, compression="gzip", compression_opts=1)
            lengths.append(len(rows["actions"]))
            demo.attrs.update(num_samples=lengths[-1], seed=attempt, init_state=rows["states"][0])
        data.attrs.update(num_demos=len(lengths), total=sum(lengths), macros_image_convention="opengl",
                          problem_info=json.dumps({"language_instruction": task.instruction}))
    task.close()
    if len(lengths) < count:
        temporary.unlink()
        raise UserError(f"the scripted expert solved {suite} task {task_id} only {len(lengths)} times in "
                        f"{3 * count} tries: use another --seed, or recorded demonstrations (--demos)")
    temporary.replace(path)
    return path


def read_demonstrations(path, task_id, limit=5, image_size=64) -> list[Episode]:
    """The first `limit` demonstrations of a LIBERO file, official or ours, one frame a control step."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} must hold LIBERO's files, <task name>_demo.hdf5")
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
            numbers = sorted(int(name[5:]) for name in data if name.startswith("demo_"))
            episodes = [read_demonstration(data[f"demo_{number}"], task_id, instruction, image_size)
                        for number in numbers[:limit]]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole LIBERO demonstration file ({error}): delete it, then "
                        "download or make it again") from None
    if len(episodes) < limit:
        raise UserError(f"{path} holds {len(episodes)} demonstrations, not {limit}: lower --num_demos or "
                        "replace the file")
    return episodes


def read_demonstration(demo, task_id, instruction, image_size) -> Episode:
    """One group of a file as an Episode: frames upright and smaller, steps that command nothing dropped."""
    obs, T = demo["obs"], len(demo["actions"])
    actions = demo["actions"][1:].astype(np.float32)  # (T-1, 7); action 0 led to the first frame
    executed = demo.get("executed_actions", demo["actions"])[1:].astype(np.float32)
    views = [obs[name][()] for name in ("agentview_rgb", "eye_in_hand_rgb")]
    views = np.stack(views, axis=1)  # (T, V, H, W, 3)
    states = [obs[name][()] for name in ("ee_pos", "ee_ori", "gripper_states")]
    states = np.concatenate(states, axis=1).astype(np.float32)  # (T, 8)
    success = demo["rewards"][()].astype(bool)  # (T,)
    if (T < 2 or actions.shape != (T - 1, 7) or executed.shape != (T - 1, 7) or states.shape != (T, 8)
            or success.shape != (T,) or views.shape != (T, 2, *views.shape[3:4] * 2, 3) or views.dtype != np.uint8):
        raise ValueError(f"{demo.name}: actions {demo['actions'].shape}, states {states.shape}, rewards "
                         f"{success.shape}, pictures {views.shape} {views.dtype}")
    if success.sum() == 1:  # official files mark the last row alone; recording went on until ten were solved
        success[-10:] = True
    kept, gripper = [], None
    for t, action in enumerate(actions):  # OpenVLA's rule: no motion and no new gripper command is no step
        if np.linalg.norm(action[:6]) >= 1e-4 or (gripper is not None and action[6] != gripper):
            kept.append(t)
            gripper = action[6]
    frames = [*kept, T - 1]
    return Episode(images=shrink(views[frames, :, ::-1], image_size), states=states[frames],
                   actions=actions[kept], success=success[frames], stride=1, task_id=task_id,
                   instruction=instruction, source="demo", seed=int(demo.attrs.get("seed", -1)),
                   executed=executed[kept])


def main():
    """Print how often the scripted expert succeeds on fresh placements. Nothing is drawn or written."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tries", type=int, default=5, help="placements a task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first placement")
    parser.add_argument("--disturb", action=argparse.BooleanOptionalAction, default=True, help="push the arm")
    args = parser.parse_args()
    print(f"{'task':58} success    steps  seconds")
    for task_id in range(load_suite(args.suite).n_tasks):
        task, start = LiberoTask(args.suite, task_id), time.time()
        seeds = range(args.seed, args.seed + args.tries)
        episodes = [expert_episode(task, seed, args.disturb, render=False) for seed in seeds]
        lengths = [len(rows["actions"]) for rows in episodes if rows is not None]
        print(f"{task.name:58} {len(lengths):2} of {args.tries:2} {np.mean(lengths or [np.nan]):8.0f} "
              f"{(time.time() - start) / args.tries:8.1f}", flush=True)
        task.close()


if __name__ == "__main__":
    with clear_errors():
        main()
