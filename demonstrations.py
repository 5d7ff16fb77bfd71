"""Demonstrations of the scripted expert (expert.py), and LIBERO's own HDF5 files, written and read.

The paper clones from five human demonstrations a task. Those files are read where the user has them; if not,
the expert makes files of the same layout (a departure: scripted, not human). The arm is pushed now and then;
`actions` in the files hold what the expert wanted (the policy learns that), `executed_actions` what the arm was
told (the world simulator learns that).

Two things to know about LIBERO's files:
1. Row t holds action t and the observation AFTER it (create_dataset.py; LIBERO issue 54), but `states` holds
   the simulator BEFORE it. The reader pairs each frame with the action that follows it. Our files open with
   one more settling step, so that the first frame is in them too.
2. Pictures are stored as OpenGL leaves them, upside down.

Shapes: T rows of a file, V camera views, H, W image.
Try it:  python demonstrations.py --task libero_object --tries 5
"""
from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import h5py
import numpy as np

from episodes import Episode
from expert import Expert
from geometry import Cameras
from libero_env import NO_OP, RENDER_SIZE, LiberoTask, load_suite, shrink, step_limit
from runs import UserError, clear_errors, whole_file

PUSH_RATE = 0.06  # probability, at a control step, that a burst of (full) pushes starts
SKILLS = {"on", "in", "open", "close", "turnon"}  # kinds of goals that the expert reaches
DONE_STEPS = 9  # a demonstration ends when its goal has held this long: it shows what "done" looks like


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
        if not expert.bears:
            pushes = 0
        elif disturb and pushes == 0 and rng.random() < PUSH_RATE / expert.bears:  # the gentler, the more often
            pushes, push = rng.integers(2, 6), rng.normal(size=6)
            push[:3] *= rng.uniform(0.5, 1.5) / np.linalg.norm(push[:3])
            push[3:] *= 0.2
        if pushes:
            executed[:6] += expert.bears * push
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
    for predicate in {goal[0] for goal in task.env.env.parsed_problem["goal_state"]} - SKILLS:
        raise UserError(f"the scripted expert has no skill for '{predicate}' ({task.instruction}): leave {task_id} out of "
                        "--task_ids, or give recorded demonstrations (--demos)")
    path = Path(folder) / f"{task.name}_demo.hdf5"
    lengths = []
    with whole_file(path) as temporary, h5py.File(temporary, "w") as file:
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
            raise UserError(f"the scripted expert solved {suite} task {task_id} only {len(lengths)} times in "
                            f"{3 * count} tries: use another --seed, or recorded demonstrations (--demos)")
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
    """One group of a file as an Episode: frames upright and smaller, steps in which nothing happens dropped."""
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
    for t, action in enumerate(actions):
        # OpenVLA's rule: no motion and no new gripper command is no step. It replays what is left; here frames are cut out
        # of the recording, so fingers that are still closing keep their steps, too.
        fingers = np.abs(states[t + 1, 6:] - states[t, 6:]).max()
        if np.linalg.norm(action[:6]) >= 1e-4 or (gripper is not None and action[6] != gripper) or fingers > 5e-4:
            kept.append(t)
            gripper = action[6]
    frames = [*kept, T - 1]
    return Episode(images=shrink(views[frames, :, ::-1], image_size), states=states[frames],
                   actions=actions[kept], success=success[frames], stride=1, task_id=task_id,
                   instruction=instruction, source="demo", seed=int(demo.attrs.get("seed", demo.name.split("_")[-1])),
                   executed=executed[kept])


def suite_cameras(suite, seed=0) -> Cameras:
    """Where the cameras of all the suite's tasks are, from one simulator for every kind of scene."""
    benchmark, scenes, kinds = load_suite(suite), {}, []
    for task_id in range(benchmark.n_tasks):
        goal_file = Path(benchmark.get_task_bddl_file_path(task_id)).read_text()
        kinds.append(re.search(r"\(problem (\w+)\)", goal_file)[1])
        if kinds[-1] not in scenes:
            task = LiberoTask(suite, task_id)
            task.reset(seed=seed)
            scenes[kinds[-1]] = task.cameras()
            task.close()
    return Cameras.of_tasks([scenes[kind] for kind in kinds])


def main():
    """Print how often the scripted expert succeeds on fresh placements. Nothing is drawn or written."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--task", default="libero_object", help="LIBERO suite")
    parser.add_argument("--tries", type=int, default=5, help="placements a task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first placement")
    parser.add_argument("--disturb", action=argparse.BooleanOptionalAction, default=True, help="push the arm")
    args = parser.parse_args()
    print(f"{'task':58} success    steps  seconds")
    for task_id in range(load_suite(args.task).n_tasks):
        task, start = LiberoTask(args.task, task_id), time.time()
        seeds = range(args.seed, args.seed + args.tries)
        episodes = [expert_episode(task, seed, args.disturb, render=False) for seed in seeds]
        lengths = [len(rows["actions"]) for rows in episodes if rows is not None]
        print(f"{task.name:58} {len(lengths):2} of {args.tries:2} {np.mean(lengths or [np.nan]):8.0f} "
              f"{(time.time() - start) / args.tries:8.1f}", flush=True)
        task.close()


if __name__ == "__main__":
    with clear_errors():
        main()
