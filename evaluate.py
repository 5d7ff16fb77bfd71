"""Evaluation in both worlds: true LIBERO on the benchmark's initial states, and the imagined world from the same frames.

One set of true episodes serves both stops. "Oracle stop": the simulator ends the episode, so the task counts as done if
its goal held at any control step. "Self stop": the reflector ends the episode (its `StopRule`, or the step limit), and the
goal must hold in that very frame. An episode is played until both are known or the limit is reached.

Protocol: 10 settling steps, the benchmark's initial states in their order, the suite's step limit, whole chunks open
loop, greedy, standard meshes. Success rates come with Wilson 95 % intervals; two policies are compared on the same
states by McNemar's exact test.

    python evaluate.py --checkpoint runs/libero_object --episodes 10        # more episodes than the training run took
    python evaluate.py --checkpoint runs/libero_object --benchmark          # speeds, nothing else
    python evaluate.py --world runs/libero_object --episodes 10             # how far its imagination can be believed

Shapes: B episodes, T time in chunks, V camera views, L action-chunk length, C, H, W image.
"""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

import report
from episodes import ChunkData, Episode, load_episodes
from fidelity import frame_scores, imagine_episodes, measure
from libero_env import LiberoContext, LiberoVectorEnv, initial_states, load_suite, step_limit
from policy import Policy
from ppo import rollout
from reflector import Reflector, StopRule
from runs import UserError, clear_errors, read_json, step_generator, write_json
from world_model import VirtualEnv, VirtualEnvConfig, WorldModel, world_model_loss

TEST_SEED = 50_000_000  # placements of the episodes that measure a virtual environment: nothing else uses them


@dataclass
class EvaluateConfig:
    episodes: int = 5  # episodes a task and policy, from the benchmark's first initial states on (50 at most)
    imagine: bool = True  # also play every policy in the imagined world, from the same first frames
    videos: int = 1  # film strips a task: the true rollout above, the imagined one below


def pick_device(name) -> torch.device:
    """"auto" is the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_policies(folder, device) -> dict[str, Policy]:
    """The policies that a run holds: `cloned`, and `post_trained` if its imagine stage is done."""
    stages = {"cloned": Path(folder) / "clone", "post_trained": Path(folder) / "imagine"}
    found = {name: Policy.from_pretrained(path).to(device).eval() for name, path in stages.items() if path.is_dir()}
    if not found:
        raise UserError(f"{folder} holds no trained policy (clone/): run train.py first, or give another --checkpoint")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# True episodes
# ---------------------------------------------------------------------------------------------------------------------
def play(policy, env: LiberoVectorEnv, contexts, folder, source, seed, temperatures=None) -> list[dict]:
    """Play every context once in the true simulator; one `.npz` and one line of `episodes.jsonl` an episode.

    temperatures: one for each context, multiplying the policy's scale b; None plays greedily.

    Finished episodes are kept and not played again. Tasks are played num_envs at a time, one a process, because a
    simulator takes seconds to build. Returns all lines, in the order of `contexts`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = {line["file"]: line for line in lines}
    files = [f"task{context.task_id:02d}_seed{context.seed:06d}{f'_{context.take}' if context.take else ''}.npz"
             for context in contexts]
    todo = [episode for episode in zip(files, contexts, temperatures or [1.0] * len(contexts)) if episode[0] not in lines]
    tasks = sorted({context.task_id for _, context, _ in todo})
    with tqdm(total=len(contexts), initial=len(contexts) - len(todo), desc=folder.name.removesuffix(".tmp"),
              unit="episode") as bar:
        for first in range(0, len(tasks), env.num_envs):
            queues = [[episode for episode in todo if episode[1].task_id == task]
                      for task in tasks[first:first + env.num_envs]]
            batch = [episode for row in zip_longest(*queues) for episode in row if episode]
            _, starts, heat = zip(*batch)
            played = rollout(policy, env, starts, temperatures is None, heat, step_generator(seed, tasks[first]),
                             progress=bar.update)
            for row, (file, context, _) in enumerate(batch):
                lines[file] = save_episode(played, row, folder / file, context, source, env)
                with open(path, "a") as log:
                    log.write(json.dumps(lines[file]) + "\n")
    return [lines[file] for file in files]


def save_episode(played, row, path, context, source, env) -> dict:
    """Write one row of a rollout as an `Episode`; return its line of `episodes.jsonl`."""
    T = int(played.valid[row].sum())
    success = played.success[row, :T].cpu().numpy()
    score = played.score[row, :T].cpu().numpy()
    whole = min(T, env.max_steps // env.chunk_size)  # a last chunk that the step limit cut short is not kept
    Episode(images=played.images[row, :whole + 1].cpu().numpy(), states=played.states[row, :whole + 1].cpu().numpy(),
            actions=played.env_actions[row, :whole].flatten(0, 1).cpu().numpy(),
            success=np.concatenate([[False], success[:whole]]), stride=env.chunk_size, task_id=context.task_id,
            instruction=played.instruction[row], source=source, seed=context.seed).save(path)
    stops = np.flatnonzero(env.rule.stops(score)) if env.rule else []
    stop = int(stops[0]) if len(stops) else T - 1
    return {"file": path.name, "task_id": context.task_id, "seed": context.seed, "chunks": T,
            "oracle_stop": bool(played.reward[row] > 0), "self_stop": bool(success[stop]),
            "stopped_at": stop + 1 if len(stops) else None,
            "score": [None if np.isnan(value) else round(float(value), 3) for value in score]}


def evaluate_policies(policies, reflector, suite, task_ids, episodes, folder, image_size, chunk_size, num_procs, rule,
                      device) -> dict[str, list[dict]]:
    """Every policy on the same benchmark states. -> {policy: lines of `play`}."""
    contexts = []
    for task in task_ids:
        states = initial_states(suite, task)
        if episodes > len(states):
            raise UserError(f"{suite} has {len(states)} initial states a task: --episodes must not be above that")
        contexts += [LiberoContext(task, seed=i, init_state=states[i]) for i in range(episodes)]
    env = LiberoVectorEnv(suite, num_procs, image_size, chunk_size, stop="both", reflector=reflector, rule=rule,
                          device=device)
    try:
        return {name: play(policy, env, contexts, Path(folder) / name, "evaluate", seed=0)
                for name, policy in policies.items()}
    finally:
        env.close()


def compare(lines: dict[str, list[dict]]) -> dict:
    """Success rates with intervals, and the paired comparison of the first two policies."""
    results = {"policies": {}, "paired": {}}
    for stop in ("oracle_stop", "self_stop"):
        success = {name: np.array([line[stop] for line in rows]) for name, rows in lines.items()}
        for name, values in success.items():
            results["policies"].setdefault(name, {})[stop] = proportion(values)
        if {"cloned", "post_trained"} <= success.keys():
            before, after = success["cloned"], success["post_trained"]
            difference, interval = report.paired_difference(before, after)
            results["paired"][stop] = {"difference": difference, "ci95": list(interval),
                                       "mcnemar_p": report.mcnemar_exact(before, after)}
    return results


def proportion(values) -> dict:
    successes, episodes = int(np.sum(values)), len(values)
    return {"successes": successes, "episodes": episodes, "rate": successes / episodes,
            "ci95": list(report.wilson_interval(successes, episodes))}


# ---------------------------------------------------------------------------------------------------------------------
# The imagined world
# ---------------------------------------------------------------------------------------------------------------------
def imagined_success(policy, world, reflector, starts, horizon, rule) -> np.ndarray:
    """(B,) bool: does the reflector stop the greedy, imagined rollout from each `StartContext` within `horizon`?"""
    env = VirtualEnv(world, reflector, VirtualEnvConfig(horizon=horizon, stop=rule, shared_noise=False), len(starts))
    return rollout(policy, env, starts, greedy=True).terminated.cpu().numpy()


def film(world, reflector, episode, path, title):
    """A GIF and a PNG strip of a true episode above its imagination."""
    chunk_size = world.config.chunk_size
    (imagined,), (imagined_scores,) = imagine_episodes(world, reflector, [episode])
    (scores,) = frame_scores(reflector, [episode], chunk_size)
    frames = [np.moveaxis(images, 2, -1) for images in (episode.chunks(chunk_size).images, imagined.images)]
    all_scores = scores, np.concatenate([scores[:1], imagined_scores])  # frames: (T+1, V, H, W, 3)
    report.film_strip(path.with_suffix(".gif"), *frames, *all_scores, title, bool(episode.success.any()))
    report.contact_sheet(path.with_suffix(".png"), *frames, *all_scores, title, bool(episode.success.any()))


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------
def benchmark(policies, world, reflector, suite, task_id, episodes, image_size, num_procs, device) -> dict:
    """Imagined against true control steps a second with the same views, training samples and episodes a minute."""
    policy, L = list(policies.values())[-1], world.config.chunk_size
    data = ChunkData(episodes, L, device)
    starts = (data.starts([(k, 0) for k in range(len(data.tracks))]) * 32)[:32]
    env = VirtualEnv(world, reflector, VirtualEnvConfig(horizon=8, stop=StopRule(eta=2.0)), len(starts), 8)
    seconds, played = _timed(lambda: rollout(policy, env, starts))
    imagined = int(played.valid.sum()) * L / seconds
    true_env = LiberoVectorEnv(suite, num_procs, image_size, L, max_steps=8 * L, device=device)
    try:
        contexts = [LiberoContext(task_id, seed) for seed in range(num_procs)]
        true_env.reset(contexts)  # builds the simulators
        seconds, played = _timed(lambda: rollout(policy, true_env, contexts))
    finally:
        true_env.close()
    true = int(played.valid.sum()) * L / seconds
    optimizer = torch.optim.AdamW(world.parameters(), lr=0.0)

    def train_step():
        loss, _ = world_model_loss(world, data.world_batch(16, step_generator(0, 0)), step_generator(0, 0, device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train_step()
    seconds, _ = _timed(lambda: [train_step() for _ in range(4)])
    return {"imagined_steps_per_s": imagined, "true_steps_per_s": true, "imagined_over_true": imagined / true,
            "world_training_samples_per_s": 64 / seconds,
            "full_length_episodes_per_minute_and_core": 60 * true / step_limit(suite) / num_procs}


def _timed(work):
    start = time.perf_counter()
    value = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment, measured
# ---------------------------------------------------------------------------------------------------------------------
def measure_world(arguments, run, trained, suite, task_ids, policy, world, reflector, rule, num_procs, device):
    """Play test episodes in the true simulator, imagine them, write and print what `fidelity.measure` finds."""
    folder = Path(arguments.output_dir or run / f"world_{arguments.episodes}")
    contexts = [LiberoContext(task, TEST_SEED + i) for task in task_ids for i in range(arguments.episodes)]
    heat = [arguments.temperatures[context.seed % len(arguments.temperatures)] for context in contexts]
    sizes, explored = policy.config, trained["explore"]
    env = LiberoVectorEnv(suite, num_procs, sizes.image_size, sizes.chunk_size, linger=explored["linger"],
                          mesh_cell=explored["mesh_cell"], device=device)
    try:
        play(policy, env, contexts, folder, "test", TEST_SEED, heat)
    finally:
        env.close()
    library = load_episodes(run / "demonstrate" / "episodes") + load_episodes(run / "explore")
    measured = measure(world, reflector, policy, load_episodes(folder), library, rule, folder)
    write_json(folder / "fidelity.json", measured)
    report.fidelity_plots(folder / "fidelity.png", measured)
    text = report.fidelity_report(measured)
    (folder / "fidelity.md").write_text(text)
    print(text + f"\nWritten to {folder}: fidelity.json, fidelity.md, fidelity.png, best.png, median.png, worst.png")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Arguments:
    """Evaluate the policies of a run on true LIBERO, or (--world) how far its imagination can be believed."""
    checkpoint: str = ""  # the run folder that train.py made: evaluate its policies
    world: str = ""  # the run folder that train.py made: measure its virtual environment, and nothing else
    task: str = ""  # suite to evaluate on; empty: the one it was trained on
    task_ids: tuple[int, ...] = ()  # tasks of the suite; empty: those it was trained on
    episodes: int = 5  # episodes a task and policy (50 at most); with --world: test episodes a task
    temperatures: tuple[float, ...] = (1.0, 4.0)  # with --world: noise of the test episodes, taken in turn
    num_procs: int = 0  # simulator processes; 0: one a core
    output_dir: str = ""  # where results go; empty: <run>/eval_<suite>_<episodes>, or <run>/world_<episodes>
    device: str = "auto"  # "auto", "cpu", "cuda"
    benchmark: bool = False  # print speeds and do nothing else


def main(arguments: Arguments):
    if bool(arguments.checkpoint) == bool(arguments.world):
        raise UserError("give the run folder that train.py made, as --checkpoint RUN or as --world RUN")
    run, device = Path(arguments.checkpoint or arguments.world), pick_device(arguments.device)
    trained = read_json(run / "config.json")
    suite = arguments.task or trained["task"]
    load_suite(suite)
    task_ids = list(arguments.task_ids or (trained["task_ids"] if suite == trained["task"] else range(10)))
    policies, num_procs = load_policies(run, device), arguments.num_procs or os.cpu_count() or 1
    reflector = Reflector.from_pretrained(run / "reflect").to(device).eval()
    sizes, rule = next(iter(policies.values())).config, StopRule(**trained["virtual"]["stop"])
    if arguments.benchmark or arguments.world:
        world = WorldModel.from_pretrained(run / "simulate").to(device).eval()
    if arguments.benchmark:
        speeds = benchmark(policies, world, reflector, suite, task_ids[0], load_episodes(run / "explore")[:4],
                           sizes.image_size, num_procs, device)
        print("\n".join(f"{name:45s} {value:10.2f}" for name, value in speeds.items()))
        return
    if arguments.world:
        measure_world(arguments, run, trained, suite, task_ids, policies["cloned"], world, reflector, rule, num_procs,
                      device)
        return
    folder = Path(arguments.output_dir or run / f"eval_{suite}_{arguments.episodes}")
    start = time.time()
    lines = evaluate_policies(policies, reflector, suite, task_ids, arguments.episodes, folder, sizes.image_size,
                              sizes.chunk_size, num_procs, rule, device)
    seconds, count = time.time() - start, sum(map(len, lines.values()))
    results = {"task": suite, "preset": trained["preset"], "seed": trained["seed"]} | compare(lines) | {
        "stages": {"evaluate": seconds}, "eval_s": seconds, "eval_ep_s": seconds / count}
    write_json(folder / "results.json", results)
    print(report.results_table(results))


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Arguments))
