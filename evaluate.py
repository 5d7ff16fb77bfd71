"""Evaluation in both worlds: true LIBERO on the benchmark's initial states, and the imagined world from the same frames.

One set of true episodes serves both stops. "Oracle stop": the simulator ends the episode, so the task counts as done if
its goal held at any control step. "Self stop": the reflector ends the episode (its `StopRule`, or the step limit), and the
goal must hold in that very frame. An episode is played until both are known or the limit is reached. With `--stop none`
it always goes on to the limit, and tells as well whether the goal holds there: what a policy without a reflector has.

Protocol: 10 settling steps, the benchmark's initial states in their order, the suite's step limit, whole chunks open
loop, greedy, standard meshes. The report names it. An episode depends on its initial state and `--seed` alone, to the bit:
neither on the number of processes nor on what was played before.

    python evaluate.py --checkpoint runs/libero_object --task libero_object --episodes 50    # the standard protocol
    python evaluate.py --checkpoint runs/a runs/b --policy post_trained                      # paired; seeds: mean, std
    python evaluate.py --world runs/libero_object --episodes 10             # how far its imagination can be believed

Shapes: B episodes, T time in chunks, V camera views, L action-chunk length, C, H, W image.
"""
from __future__ import annotations

import os
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import report
from distributed import gather, shard
from episodes import ChunkData, Episode, load_episodes
from fidelity import frame_scores, hand_apart, imagine_episodes, measure
from intervals import STOPS, over_seeds, summarize
from libero_env import RENDER_SIZE, SETTLE_STEPS, LiberoVectorEnv, initial_states, load_suite, step_limit
from openvla import load_policy
from playing import play
from ppo import rollout
from reflector import Reflector, StopRule
from runs import Run, UserError, check_settings, clear_errors, read_json, set_autocast, write_json
from starts import LiberoContext, placements, start_pools, true_starts
from virtual_env import VirtualEnv, VirtualEnvConfig
from world_model import WorldModel

REMEDY = "choose another --output_dir, or delete that folder"
AT_ONCE = 64  # episodes that are imagined together: each has noise of its own, however many there are
TEST_SEED = 50_000_000  # placements of the episodes that measure a virtual environment: nothing else uses them


@dataclass
class EvaluateConfig:
    episodes: int = 5  # episodes a task and policy, from the benchmark's first initial states on (50 at most)
    imagine: bool = True  # also play every policy in the imagined world, from the same first frames
    stop: StopRule = field(default_factory=lambda: StopRule(confirm=2))  # self stop in the true world
    videos: int = 1  # film strips a task: the true rollout above, the imagined one below


def pick_device(name) -> torch.device:
    """"auto" is the GPU where there is one."""
    try:
        return torch.zeros(1, device=("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown one, and for one that is not there
        raise UserError(f"--device {name} cannot be had ({str(error).splitlines()[0]}): choose auto, cpu or cuda") from None


def load_model(kind, folder, device):
    """A world model or a reflector that a stage has saved, ready for use."""
    return kind.from_pretrained(folder).to(device).eval()


def load_policies(folder, device, which="both") -> dict:
    """The policies that a run holds: `cloned`, and `post_trained` if its imagine stage is done; or one of the two."""
    stages = {"cloned": Path(folder) / "clone", "post_trained": Path(folder) / "imagine"}
    found = {name: load_policy(path, device).eval() for name, path in stages.items() if path.is_dir()
             and which in (name, "both")}
    if not found:
        raise UserError(f"{folder} holds no {'trained' if which == 'both' else which} policy: run train.py first, or give "
                        "another --checkpoint")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# True LIBERO, the protocol
# ---------------------------------------------------------------------------------------------------------------------
def evaluate_policies(policies, reflector, suite, task_ids, episodes, folder, image_size, chunk_size, num_procs, rule,
                      device, max_steps=0, stop="both", sample=False, seed=0) -> dict[str, list[dict]]:
    """Every policy on the same benchmark states. -> {policy: lines of `play`}."""
    contexts = []
    for task in task_ids:
        states = initial_states(suite, task)
        if episodes > len(states):
            raise UserError(f"{suite} has {len(states)} initial states a task: --episodes must not be above that")
        contexts += [LiberoContext(task, seed=i, init_state=states[i]) for i in range(episodes)]
    if stop == "oracle":
        reflector = rule = None  # nobody asks them
    env, lines = None, {}
    try:
        for name, policy in policies.items():
            settings = {"task": suite, "stop": stop, "sample": sample, "seed": seed if sample else None,
                        "max_steps": max_steps, "rule": rule and asdict(rule), "weights": fingerprint(policy),
                        "reflector": reflector and fingerprint(reflector), "versions": versions()}
            check_settings(Path(folder) / name, settings, keep=True, remedy=REMEDY)
            env = env or LiberoVectorEnv(suite, num_procs, image_size, chunk_size, max_steps, stop, reflector=reflector,
                                         rule=rule, device=device)
            lines[name] = play(policy, env, contexts, Path(folder) / name, "evaluate", seed,
                               [1.0] * len(contexts) if sample else None)
        return lines
    finally:
        if env:
            env.close()


def fingerprint(module) -> str:
    """Tells weights apart."""
    value = 0
    for tensor in module.state_dict().values():
        value = zlib.crc32(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def versions() -> dict[str, str]:
    """Of what the true simulator is made of."""
    benchmark = metadata.packages_distributions().get("libero", [])[:1]  # none where it is not an installed package
    return {name: metadata.version(name) for name in ("mujoco", "robosuite", *benchmark)}


def protocol(suite, task_ids, sizes, rule, episodes, max_steps=0, stop="both", sample=False, seed=0) -> dict:
    """What the report says of how the episodes were played, and the tasks' sentences."""
    ends = {"oracle": "at the first chunk in which the goal was reached, or ", "self": "when the reflector stops, or ",
            "both": "when the goal was reached and the reflector has stopped, or ", "none": ""}
    told = {"suite": suite, "tasks": len(task_ids), "episodes a task": episodes,
            "initial states": f"the benchmark's first {episodes}, in order", "settling steps": SETTLE_STEPS,
            "step limit": step_limit(suite, max_steps),
            "actions": f"chunks of {sizes.chunk_size} control steps, whole, open loop, "
            + (f"sampled (seed {seed})" if sample else "greedy"),
            "pictures": f"{sizes.image_size} pixels, drawn with {max(RENDER_SIZE, sizes.image_size)}; standard meshes",
            "an episode ends": f"{ends[stop]}at the step limit",
            "the reflector": "is not asked" if stop == "oracle" else
            f"stops at {rule.confirm} frames in a row above {rule.eta}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items())}
    return {"protocol": told, "instructions": {str(task): load_suite(suite).get_task(task).language for task in task_ids}}


def eval_info(rows, suite, stop, videos) -> dict:
    """The results of one policy under LeRobot's names (`eval_info.json`); videos: {task: paths}."""
    key, seconds = STOPS[stop][0], sum(line["seconds"] for line in rows)

    def metrics(lines):
        done = [line[key] for line in lines]
        return {"avg_sum_reward": float(np.mean(done)), "avg_max_reward": float(np.mean(done)),
                "pc_success": 100 * float(np.mean(done)), "n_episodes": len(done)}
    paths = [path for task in videos.values() for path in task]
    tasks = {line["task_id"]: [other for other in rows if other["task_id"] == line["task_id"]] for line in rows}
    return {"per_task": [{"task_group": suite, "task_id": task, "metrics": {
                "sum_rewards": [float(line[key]) for line in lines], "max_rewards": [float(line[key]) for line in lines],
                "successes": [line[key] for line in lines], "seeds": [line["seed"] for line in lines],
                "video_paths": videos.get(task, [])}} for task, lines in tasks.items()],
            "per_group": {suite: metrics(rows) | {"video_paths": paths}},
            "overall": metrics(rows) | {"eval_s": seconds, "eval_ep_s": seconds / len(rows), "video_paths": paths}}


# ---------------------------------------------------------------------------------------------------------------------
# The imagined world
# ---------------------------------------------------------------------------------------------------------------------
def imagine_policy(policy, world, reflector, starts, horizon, virtual) -> tuple[np.ndarray, list[np.ndarray]]:
    """The greedy policy in imagination from each `StartContext`: (B,) bool, does the reflector stop it within `horizon`
    chunks? And where the robot went until then, B arrays (T+1, 8)."""
    mine, stopped, states = shard(range(len(starts))), [np.zeros(0, bool)], []
    for part in (mine[i:i + AT_ONCE] for i in range(0, len(mine), AT_ONCE)):
        env = VirtualEnv(world, reflector, replace(virtual, horizon=horizon, shared_noise=False), len(part),
                         first=part[0], total=len(starts))
        played = rollout(policy, env, [starts[i] for i in part], greedy=True)
        stopped.append(played.terminated.cpu().numpy())
        states += [path[:1 + count].cpu().numpy() for path, count in zip(played.states, played.valid.sum(1).tolist())]
    return np.concatenate(sum(gather(stopped), [])), sum(gather(states), [])


def film(world, reflector, episode, path, title, success, eta):
    """A GIF and a PNG strip of a true episode above its imagination (world None: the true one alone)."""
    data = episode.chunks(episode.stride)
    frames = [np.moveaxis(data.images, 2, -1), None]  # (T+1, V, H, W, 3)
    scores = [frame_scores(reflector, [episode], episode.stride)[0] if reflector else np.full(len(frames[0]), np.nan), None]
    if world is not None:
        (imagined,), (imagined_scores,) = imagine_episodes(world, reflector, [episode])
        frames[1], scores[1] = np.moveaxis(imagined.images, 2, -1), np.concatenate([scores[0][:1], imagined_scores])
    report.film_strip(path.with_suffix(".gif"), *frames, *scores, title, success, eta)
    report.contact_sheet(path.with_suffix(".png"), *frames, *scores, title, success, eta)


def film_some(rows, folder, to, count, world, reflector, eta) -> dict[int, list[str]]:
    """Film the first `count` episodes of every task, from lines of `play` in `folder`, into `to`; -> {task: paths}."""
    videos = {}
    for line in tqdm([line for line in rows if line["seed"] < count], desc="videos", unit="episode", disable=not count):
        to.mkdir(exist_ok=True)
        path, episode = to / f"task{line['task_id']:02d}_{line['seed']}", Episode.load(folder / line["file"])
        film(world, reflector, episode, path, episode.instruction, line["oracle_stop"], eta)
        videos.setdefault(line["task_id"], []).append(str(path.with_suffix(".gif")))
    return videos


# ---------------------------------------------------------------------------------------------------------------------
# The virtual environment, measured
# ---------------------------------------------------------------------------------------------------------------------
def measure_world(arguments, run, trained, suite, task_ids, num_procs, device):
    """Play test episodes in the true simulator, imagine them, write and print what `fidelity.measure` finds."""
    policy = load_policies(run, device, "cloned")["cloned"]
    world, reflector = load_model(WorldModel, run / "simulate", device), load_model(Reflector, run / "reflect", device)
    folder = Path(arguments.output_dir or run / f"world_{arguments.episodes}")
    lock = Run(folder)
    explored, hottest, L = trained["explore"], trained["start"]["hottest"], policy.config.chunk_size
    virtual = VirtualEnvConfig(trained["virtual"]["horizon"], StopRule(**trained["virtual"]["stop"]))
    check_settings(folder, {"task": suite, "temperatures": arguments.temperatures, "max_steps": arguments.max_steps,
                            "virtual": asdict(virtual), "hottest": hottest, "weights": fingerprint(policy),
                            "versions": versions()}, keep=True, remedy=REMEDY)
    contexts = placements(TEST_SEED, task_ids, arguments.episodes)
    temperatures = [arguments.temperatures[context.seed % len(arguments.temperatures)] for context in contexts]
    env = LiberoVectorEnv(suite, num_procs, policy.config.image_size, L, step_limit(suite, arguments.max_steps, L),
                          linger=explored["linger"], mesh_cell=explored["mesh_cell"], device=device)
    with closing(env):
        lines = play(policy, env, contexts, folder, "test", TEST_SEED, temperatures)
        test = [Episode.load(folder / line["file"]) for line in lines]
        mild = [episode for episode in test if episode.temperature <= hottest]
        closed = closed_loop(policy, world, reflector, env, mild, folder / "closed_loop", virtual)
    library = load_episodes(run / "demonstrate" / "episodes") + [episode for episode in load_episodes(run / "explore")
                                                                 if not episode.held_out(explored["held_out"])]
    measured = measure(world, reflector, policy, test, library, virtual.stop, folder, closed)
    write_json(folder / "fidelity.json", measured)
    report.fidelity_plots(folder / "fidelity.png", measured)
    text = report.fidelity_report(measured)
    (folder / "fidelity.md").write_text(text)
    print(text + f"\nWritten to {folder}: fidelity.json, fidelity.md, fidelity.png, best.png, median.png, worst.png")


def closed_loop(policy, world, reflector, env, episodes, folder, virtual):
    """The greedy policy goes on, once in each world, from where RL starts: just before the first grasp of an episode.

    -> its successes in imagination, the true ones, and `hand_apart`.
    """
    L = env.chunk_size
    data = ChunkData(episodes, L, env.device, every_offset=False)
    grasps = [frame for (kind, _), frames in start_pools(data).items() if kind == "contact" for frame in frames]
    starts = list({k: (k, t) for k, t in reversed(grasps)}.values())  # the first of every episode
    lines = play(policy, env, true_starts(data, starts, virtual.horizon * L), folder, "closed loop", TEST_SEED)
    went = [Episode.load(folder / line["file"]).chunks(L).states[t:] for line, (_, t) in zip(lines, starts)]
    stopped, imagined = imagine_policy(policy, world, reflector, data.starts(starts), virtual.horizon, virtual)
    return stopped, [line["oracle_stop"] for line in lines], hand_apart(went, imagined)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Arguments:
    """Evaluate the policies of runs on true LIBERO, or (--world) how far a run's imagination can be believed."""
    checkpoint: tuple[str, ...] = ()  # run folders that train.py made; two are compared pairwise, different seeds summed up
    world: str = ""  # the run folder that train.py made: measure its virtual environment, and nothing else
    task: str = ""  # suite to evaluate on, any that the benchmark knows; empty: the one it was trained on
    task_ids: tuple[int, ...] = ()  # tasks of the suite; empty: those it was trained on, or all of another suite
    policy: Literal["cloned", "post_trained", "both"] = "both"  # which policies of a run
    episodes: int = 5  # episodes a task and policy (50 at most); with --world: test episodes a task
    stop: Literal["oracle", "self", "both", "none"] = "both"  # what ends an episode: goal, reflector, both, the limit alone
    max_steps: int = 0  # control steps after which an episode is cut off; 0: the suite's limit, the standard protocol
    sample: bool = False  # draw actions from the policy's distribution instead of taking its mode
    seed: int = 0  # of the noise of --sample; nothing else is random
    videos: int = 0  # filmed episodes a task and policy
    temperatures: tuple[float, ...] = (1.0, 4.0)  # with --world: noise of the test episodes, taken in turn
    num_procs: int = 0  # simulator processes; 0: one a core
    output_dir: str = ""  # where results go; empty: <run>/eval_<suite>, or <run>/world_<episodes>
    device: str = "auto"  # "auto", "cpu", "cuda"


def main(arguments: Arguments):
    if bool(arguments.checkpoint) == bool(arguments.world):
        raise UserError("give the run folder that train.py made, as --checkpoint RUN or as --world RUN")
    if arguments.episodes < 1 or min(arguments.videos, arguments.num_procs, arguments.max_steps) < 0:
        raise UserError("--episodes must be 1 or more, --videos, --num_procs and --max_steps 0 or more")
    if min(arguments.temperatures, default=-1) < 0:
        raise UserError("--temperatures must be one number or more, none below 0")
    runs, device = [Path(run) for run in arguments.checkpoint or [arguments.world]], pick_device(arguments.device)
    trained = [read_json(run / "config.json") for run in runs]
    if not all("stages" in config for config in trained):
        raise UserError("give the run folder, runs/libero_object for example, not that of one of its stages")
    unused = [name for name in ("policy", "stop", "sample", "seed", "videos")
              if arguments.world and getattr(arguments, name) != getattr(Arguments, name)]
    if unused:
        raise UserError(f"--world measures with the cloned policy, by both worlds' verdicts: leave out --{unused[0]}")
    if arguments.checkpoint and arguments.temperatures != Arguments.temperatures:
        raise UserError("--temperatures are those of --world's test episodes: --checkpoint takes --sample, at temperature 1")
    if 0 < arguments.max_steps < trained[0]["policy"]["chunk_size"]:
        raise UserError("--max_steps must be 0 (the suite's limit) or at least a chunk")
    suite = arguments.task or trained[0]["task"]
    count = load_suite(suite).n_tasks
    task_ids = list(arguments.task_ids or (trained[0]["task_ids"] if suite == trained[0]["task"] else range(count)))
    if arguments.world and (suite != trained[0]["task"] or not set(task_ids) <= set(trained[0]["task_ids"])):
        raise UserError(f"--world measures what the run was trained on: --task {trained[0]['task']}, --task_ids of "
                        f"{' '.join(map(str, trained[0]['task_ids']))}")
    if not task_ids:
        raise UserError(f"{suite} has no tasks in the installed benchmark: choose another --task")
    if len(set(task_ids)) < len(task_ids):
        raise UserError("--task_ids names a task twice")
    for task in task_ids:
        if not 0 <= task < count:
            raise UserError(f"{suite} has no task {task}: --task_ids takes numbers from 0 to {count - 1}")
    num_procs = arguments.num_procs or len(os.sched_getaffinity(0))
    set_autocast(trained[0]["bf16"])
    if arguments.checkpoint:
        evaluate_runs(arguments, runs, trained, suite, task_ids, num_procs, device)
    else:
        measure_world(arguments, runs[0], trained[0], suite, task_ids, num_procs, device)


def evaluate_runs(arguments, runs, trained, suite, task_ids, num_procs, device):
    """Play, summarise, write results.json, report.md and one eval_info.json a policy."""
    names = [run.resolve().name for run in runs]
    names = [name if names.count(name) == 1 else f"{run.resolve().parent.name}_{name}" for run, name in zip(runs, names)]
    if len(set(names)) < len(names):
        raise UserError("the folders after --checkpoint need different names")
    base = "_".join([f"eval_{suite}", *[arguments.stop] * (arguments.stop != "both"), *["sampled"] * arguments.sample])
    default = runs[0] / base if len(runs) == 1 else runs[0].parent / f"{base}_{'_'.join(names)}"
    output = Path(arguments.output_dir or default)
    rule = StopRule(**trained[0]["evaluate"]["stop"])
    for config in trained[1:]:
        for key in ("task", "task_ids"):
            if config[key] != trained[0][key] and not getattr(arguments, key):
                raise UserError(f"these runs differ in --{key}: say on which to evaluate")
        for section, key in (("evaluate", "stop"), ("policy", "image_size"), ("policy", "chunk_size")):
            if config[section][key] != trained[0][section][key]:
                raise UserError(f"these runs differ in --{section}.{key}: evaluate each with a command of its own")
    for run in runs if arguments.stop != "oracle" else ():
        if not (run / "reflect").is_dir():
            raise UserError(f"{run} has no reflector, which self stop asks: add --stop oracle")
    lines, locks = {}, [Run(output)]
    for run, name, config in zip(runs, names, trained):
        policies = load_policies(run, device, arguments.policy)
        reflector = None
        if arguments.stop != "oracle":
            reflector = load_model(Reflector, run / "reflect", device)
        sizes = next(iter(policies.values())).config
        folder = output if len(runs) == 1 else output / name if arguments.output_dir else run / base
        locks += [Run(folder)] if folder != output else []
        lines[name] = evaluate_policies(policies, reflector, suite, task_ids, arguments.episodes, folder, sizes.image_size,
                                        sizes.chunk_size, num_procs, rule, device, arguments.max_steps, arguments.stop,
                                        arguments.sample, arguments.seed)
        world = None
        if arguments.videos and reflector and suite == config["task"] and (run / "simulate").is_dir():
            world = load_model(WorldModel, run / "simulate", device)
        for policy, rows in lines[name].items():
            videos = film_some(rows, folder / policy, folder / policy / "videos", arguments.videos, world, reflector,
                               rule.eta)
            write_json(folder / policy / "eval_info.json", eval_info(rows, suite, arguments.stop, videos))
    flat, pairs = lines[names[0]], None
    if len(runs) > 1:  # the policies of a run against each other; with two runs also each against its namesake
        flat = {f"{name}/{policy}": rows for name in names for policy, rows in lines[name].items()}
        pairs = [(f"{name}/cloned", f"{name}/post_trained") for name in names if len(lines[name]) == 2]
        if len(runs) == 2:
            pairs += [tuple(f"{name}/{policy}" for name in names) for policy in lines[names[0]] if policy in lines[names[1]]]
    seconds = sum(line["seconds"] for rows in flat.values() for line in rows)
    results = {"task": suite, "preset": ", ".join(sorted({config["preset"] for config in trained})),
               "seed": ", ".join(str(config["seed"]) for config in trained),
               **protocol(suite, task_ids, sizes, rule, arguments.episodes, arguments.max_steps, arguments.stop,
                          arguments.sample, arguments.seed), **summarize(flat, rule, arguments.stop, pairs)}
    if len({config["seed"] for config in trained}) == len(runs) > 1:  # not a run and its ablation
        results["over_seeds"] = over_seeds(lines, arguments.stop)
    results |= {"stages": {"evaluate": seconds}, "eval_s": seconds, "eval_ep_s": seconds / sum(map(len, flat.values()))}
    write_json(output / "results.json", results)
    text = report.results_table(results)
    (output / "report.md").write_text(text)
    print(text + f"\nWritten to {output}: report.md, results.json; beside the episodes: eval_info.json")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Arguments, use_underscores=True))
