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

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.spatial.transform import Rotation

from episodes import Episode
from libero_env import NO_OP, LiberoTask, load_suite, shrink, step_limit
from runs import UserError, clear_errors

POINTING_DOWN = Rotation.from_rotvec([np.pi, 0, 0])  # the hand's; its fingers then open along the world's y axis
DONE_STEPS = 9  # a demonstration ends when its goal has held this long: the frame that solved it and eight more
FINGER_DEPTH = 0.03  # m from the grip point up to the palm: an object's top must not reach further
PALM = np.array([0.11, 0.04])  # m: half its length along the direction that the fingers open in, and half its depth
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
        self.rotation = Rotation.from_rotvec(state[3:6])
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
        yaw = self.grip_yaw(name, target)
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
        fingers = self.world.robots[0].gripper.important_geoms
        return self.opening < 0.075 and self.world._check_grasp([fingers["left_finger"], fingers["right_finger"]],
                                                                self.world.get_object(name))

    def grip_yaw(self, name, target) -> float:
        """The smallest turn of the hand (rad) at which the fingers span the object and the palm meets no neighbour."""
        yaws = np.radians(np.arange(-90, 91, 5))
        across = np.stack([-np.sin(yaws), np.cos(yaws)])  # (2, Y) the direction that the fingers open in
        along = np.stack([np.cos(yaws), np.sin(yaws)])
        excess = np.ptp(self.corners(name)[:, :2] @ across, axis=0) - WIDEST_GRIP
        others = np.concatenate([self.corners(other) for other in self.world.objects_dict if other != name])
        others = others[others[:, 2] > target[2] + FINGER_DEPTH - 0.01, :2] - target[:2]
        met = (np.abs(others @ across) < PALM[0]) & (np.abs(others @ along) < PALM[1])  # (P, Y)
        return yaws[np.argmin(np.abs(yaws) + 1000 * excess.clip(0) + 100 * met.any(axis=0))]

    def turn_to(self, yaw) -> np.ndarray:
        """(3,) axis-angle, in the world, from the hand's rotation to pointing down with this yaw."""
        return (Rotation.from_euler("z", yaw) * POINTING_DOWN * self.rotation.inv()).as_rotvec()


# ---------------------------------------------------------------------------------------------------------------------
# One demonstration
# ---------------------------------------------------------------------------------------------------------------------
def expert_episode(task, seed, disturb=True, render=True) -> dict | None:
    """One demonstration as the rows of a LIBERO file, or None where the expert failed within the suite's step limit.

    disturb: now and then a burst of 2 to 5 executed actions is pushed in a random direction, while the recorded ones
    stay what the expert wants in the state that it finds: the clone sees how to come back.
    """
    rng = np.random.default_rng([seed, task.task_id])
    style = Style.draw(rng, disturb)
    task.reset(seed=seed)
    expert = Expert(task, style)
    rows = [step_row(task, NO_OP, NO_OP, render)]
    burst, held_steps = 0, 0
    for _ in range(step_limit(task.suite)):
        action = expert.action()
        executed = action.copy()
        if not expert.may_push:
            burst = 0
        elif burst == 0 and rng.random() < style.burst_rate:
            burst = rng.integers(2, 6)
            direction = rng.normal(size=3)
            push = np.append(direction / np.linalg.norm(direction) * rng.uniform(0.5, 1.5), rng.normal(0, 0.2, size=3))
        if burst:
            executed[:6] += push
            burst -= 1
        rows.append(step_row(task, action, executed, render))
        held_steps = held_steps + 1 if rows[-1]["rewards"] else 0
        if held_steps == DONE_STEPS:
            rows[-1]["dones"] = 1
            return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return None


def step_row(task, action, executed, render) -> dict:
    """Execute one action; one row of a LIBERO file: the simulator before it, and what is seen after it."""
    row = {"states": task.env.get_sim_state(), "actions": action}
    success, robot = task.step(executed), task.env.robots[0]
    state = task.state()
    row |= {"rewards": np.uint8(success), "dones": np.uint8(0), "obs/ee_states": state[:6], "obs/ee_pos": state[:3],
            "obs/ee_ori": state[3:6], "obs/gripper_states": state[6:], "obs/joint_states": robot._joint_positions}
    if render:
        row["obs/agentview_rgb"], row["obs/eye_in_hand_rgb"] = task.render()[:, ::-1]  # LIBERO stores them upside down
    return row


# ---------------------------------------------------------------------------------------------------------------------
# LIBERO's files
# ---------------------------------------------------------------------------------------------------------------------
def collect_demonstrations(suite, task_id, count, seed, folder, mesh_cell=0.0) -> Path:
    """Write `count` demonstrations of one task to `folder`/<task name>_demo.hdf5; placements are drawn, never the test's."""
    task = LiberoTask(suite, task_id, mesh_cell=mesh_cell)
    path = Path(folder) / f"{task.name}_demo.hdf5"
    temporary = path.with_name(path.name + ".writing")
    written = total = 0
    with h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        for attempt in range(3 * count):
            rows = expert_episode(task, 1000 * seed + attempt)
            if rows is None:
                continue
            demo = data.create_group(f"demo_{written}")
            for key, value in rows.items():
                packed = dict(compression="gzip", compression_opts=1, chunks=(1, *value.shape[1:])) if value.ndim == 4 else {}
                demo.create_dataset(key, data=value, **packed)
            demo.attrs.update(num_samples=len(rows["actions"]), seed=1000 * seed + attempt, init_state=rows["states"][0])
            written, total = written + 1, total + len(rows["actions"])
            if written == count:
                break
        data.attrs.update(num_demos=written, total=total, tag="scripted expert", macros_image_convention="opengl")
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.instruction})
    task.close()
    if written < count:
        temporary.unlink()
        raise UserError(f"the expert solved {suite} task {task_id} only {written} times in {3 * count}: try another --seed, "
                        "or give recorded demonstrations with --demos")
    temporary.replace(path)
    return path


def read_demonstrations(path, task_id, limit=5, image_size=64) -> list[Episode]:
    """The first `limit` demonstrations of a LIBERO file, official or ours, one frame a control step."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: {path.parent} must hold LIBERO's <task name>_demo.hdf5 files, one a task")
    try:
        with h5py.File(path, "r") as file:
            data = file["data"]
            instruction = json.loads(data.attrs["problem_info"])["language_instruction"]
            names = sorted((name for name in data if name.startswith("demo_")), key=lambda name: int(name[5:]))
            episodes = [read_demonstration(data[name], task_id, instruction, image_size) for name in names[:limit]]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole LIBERO demonstration file ({error}): delete it and download or make it "
                        "again") from None
    if len(episodes) < limit:
        raise UserError(f"{path} holds {len(episodes)} demonstrations, {limit} are wanted: set --num_demos {len(episodes)} "
                        "or get another file")
    return episodes


def read_demonstration(demo, task_id, instruction, image_size) -> Episode:
    """One HDF5 group as an Episode: frames upright and smaller, steps that command nothing dropped."""
    obs = demo["obs"]
    actions = demo["actions"][1:].astype(np.float32)  # action 0 led to the first frame                (T-1, 7)
    views = np.stack([obs[name][:, ::-1] for name in ("agentview_rgb", "eye_in_hand_rgb")], axis=1)  # (T, V, H, W, 3)
    states = np.concatenate([obs[name][:] for name in ("ee_pos", "ee_ori", "gripper_states")], axis=1)  # (T, 8)
    success = demo["rewards"][:].astype(bool)  # (T,)
    T = len(actions) + 1
    if actions.shape != (T - 1, 7) or states.shape != (T, 8) or len(views) != T or len(success) != T or T < 2:
        raise ValueError(f"{demo.name} has actions {actions.shape}, states {states.shape} and {len(views)} frames")
    if success.sum() == 1:  # official files mark the last row only, and were recorded until the goal had held ten steps
        success[-10:] = True
    kept, gripper = [], None
    for t, action in enumerate(actions):  # as OpenVLA does: no motion and no new gripper command is no step
        if np.linalg.norm(action[:6]) >= 1e-4 or (gripper is not None and action[6] != gripper):
            kept.append(t)
            gripper = action[6]
    frames = [*kept, T - 1]
    return Episode(images=shrink(views[frames], image_size), states=states[frames].astype(np.float32),
                   actions=actions[kept], success=success[frames], stride=1, task_id=task_id, instruction=instruction,
                   source="demo", seed=int(demo.attrs.get("seed", demo.name.rsplit("_", 1)[1])))


def main():
    """Print how often the expert succeeds on fresh placements, without drawing anything."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tries", type=int, default=5, help="placements a task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first placement")
    parser.add_argument("--disturb", action=argparse.BooleanOptionalAction, default=True, help="push the arm now and then")
    args = parser.parse_args()
    print(f"{'task':60} success     steps   seconds")
    for task_id in range(load_suite(args.suite).n_tasks):
        task = LiberoTask(args.suite, task_id)
        start = time.time()
        episodes = [expert_episode(task, args.seed + i, args.disturb, render=False) for i in range(args.tries)]
        lengths = [len(rows["actions"]) for rows in episodes if rows is not None]
        print(f"{task.name:60} {len(lengths):3} of {args.tries:3} {np.mean(lengths or [np.nan]):7.0f} "
              f"{(time.time() - start) / args.tries:9.1f}", flush=True)
        task.close()


if __name__ == "__main__":
    with clear_errors():
        main()
