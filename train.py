"""World-Env (arXiv 2509.24948, CVPR 2026 as RehearseVLA): improve a VLA policy by reinforcement learning in imagination.

    demonstrate ─► clone ─► explore ─► simulate ─► reflect ─► imagine ─► evaluate
    5 demos/task   policy   episodes   world       reward,    RLOO+PPO   true LIBERO,
                            + failures simulator   stop       (Alg. 1)   before and after

Every stage reads what earlier stages left under runs/libero_object/ and leaves its own folder there. A finished stage is
skipped; a killed run goes on where it was with the same command. To redo a stage, delete its folder and those after it.

    python train.py --task libero_object                                   # everything, 40 to 85 minutes on two cores
    python train.py --task libero_object --preset tiny                     # all stages on two tasks in minutes
"""
from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import report
from config import STAGES, VALIDATE_SEED, TrainConfig, parse, stage_settings
from demonstrations import collect_demonstrations, read_demonstrations, suite_cameras
from distributed import barrier, gather, in_processes, rank, shard, world_size
from episodes import ChunkData, CloneData, Episode, Normalizer, load_episodes
from evaluate import evaluate_policies, film_some, imagine_policy, load_policies, pick_device, protocol
from fidelity import (check_trust, frame_logits, frame_scores, hand_apart, horizon_errors, imagine_episodes, imagined_copies,
                      outcome_agreement, reflector_quality)
from geometry import Cameras
from intervals import proportion, summarize
from libero_env import load_suite, step_limit
from openvla import load_policy, pretrained_policy
from openvla_memory import check_training
from playing import control_steps, play, play_groups
from policy import Policy, anchor_loss, clone_loss
from ppo import add_lora, improve, make_optimizer, merge_lora, reference_of, rollout
from reflector import Reflector, calibrate, reflector_loss
from runs import (Run, UserError, check_settings, clear_errors, find_model, fit, load_resume, load_weights, read_json,
                  read_lines, read_log, save_resume, set_autocast, step_generator, write_json)
from starts import LiberoContext, placements, short_tries
from world_model import Library, WorldModel, grasp_loss, world_model_loss
from worlds import (compiled, demonstrations, explored, frozen, half_imagined, load_world, true_env, true_world,
                    virtual_world)


def train(config: TrainConfig):
    """Run the chosen stages in the method's order and print the report."""
    suite = load_suite(config.task)
    config = replace(config, task_ids=tuple(config.task_ids) or tuple(range(suite.n_tasks)),
                     num_procs=max(1, (config.num_procs or len(os.sched_getaffinity(0))) // world_size()))
    if not set(config.task_ids) <= set(range(suite.n_tasks)):
        raise UserError(f"{config.task} has no such task: --task_ids takes numbers from 0 to {suite.n_tasks - 1}")
    if config.policy.backbone and not (config.ppo.lora_rank or config.policy.lora_rank):
        raise UserError("billions of parameters are post-trained by LoRA: add --ppo.lora_rank 32 to --policy.backbone")
    if config.init_world:
        find_model(config.init_world, "--init_world ")
    device, run = pick_device(config.device), Run(config.output_dir)
    settings = {name: stage_settings(config, name) for name in STAGES}
    done = {name: run.done(name, settings[name]) for name in STAGES}
    write_json(run.folder / "config.json", asdict(config))  # not before all settings are found to be the run's
    set_autocast(config.bf16)
    print(f"{config.task}, {len(config.task_ids)} tasks, preset {config.preset}, seed {config.seed}, on {device} with "
          f"{world_size()} x {config.num_procs} simulator processes -> {run.folder}")
    needless = ("simulate", "reflect") if config.rl_env == "none" and "evaluate" not in config.stages else ()
    for name, step in zip(STAGES, (demonstrate, clone, explore, simulate, reflect, imagine, evaluate)):
        if done[name] or name in needless and name not in config.stages:
            continue
        if name in config.stages:
            with run.stage(name, settings[name], STAGES[STAGES.index(name) + 1:]) as folder:
                step(config, run, folder, device)
        elif any(later in config.stages for later in STAGES[STAGES.index(name):]):
            raise UserError(f"{run.path(name)} is missing: add {name} to --stages")
    if run.path("evaluate").is_dir() and rank() == 0:
        report.write_run(run, config, control_steps(run, config))


# ---------------------------------------------------------------------------------------------------------------------
# 1 demonstrate, 2 clone, 3 explore
# ---------------------------------------------------------------------------------------------------------------------
def demonstrate(config, run, folder, device):
    """Five demonstrations a task, from the scripted expert or from the user's files, and where the cameras are."""
    if config.refresh:
        return keep("demonstrate", config, folder)
    tasks = {task: load_suite(config.task).get_task(task) for task in config.task_ids}
    source = Path(config.demos) if config.demos else folder
    if not config.demos:
        missing = [task for task in shard(config.task_ids) if not (folder / f"{tasks[task].name}_demo.hdf5").exists()]
        arguments = [(config.task, task, config.num_demos, config.seed, folder, config.explore.mesh_cell,
                      config.policy.image_size) for task in missing]
        in_processes(collect_demonstrations, arguments, config.num_procs, "demonstrate", "task")
    elif not source.is_dir():
        raise UserError(f"--demos {source} is not a folder: give the one that holds LIBERO's *_demo.hdf5 files")
    barrier()
    if rank():
        return  # the rest is quick
    episodes = [replace(episode, instruction=task.language)  # official files say it in other words than the benchmark asks
                for number, task in tasks.items() for episode in read_demonstrations(
                    source / f"{task.name}_demo.hdf5", number, config.num_demos, config.policy.image_size)]
    (folder / "episodes").mkdir(exist_ok=True)
    for number, episode in enumerate(episodes):
        episode.save(folder / "episodes" / f"{number:04d}.npz")
    write_json(folder / "normalizer.json", Normalizer.fit(episodes).to_dict())
    write_json(folder / "cameras.json", suite_cameras(config.task, config.seed).to_dict())


def clone(config, run, folder, device):
    """Supervised training of the policy and its Laplace scale head on the demonstrations.

    A pretrained policy (`--policy.backbone`) stays as it is but for the scale head, or is fine-tuned by LoRA.
    """
    if config.refresh:
        return keep("clone", config, folder)
    normalizer = Normalizer.from_dict(read_json(run.path("demonstrate") / "normalizer.json"))
    torch.manual_seed(config.seed)
    if config.policy.backbone:
        policy = pretrained_policy(config.policy, config.task, normalizer)
        at_once = -(-config.clone.batch_size // (config.clone.accumulate * world_size()))
        check_training(policy, at_once, config.policy.lora_rank, device, "--clone.batch_size or raise --clone.accumulate")
    else:
        policy = Policy(config.policy, normalizer)
    fit_clone("clone", compiled(policy.to(device), config), demonstrations(run), config, run, folder, device)
    policy.save_pretrained(folder)


def keep(stage, config, folder):
    """A refresh takes this stage from the run that it goes on from."""
    source = Path(config.refresh) / stage
    if not source.is_dir():
        raise UserError(f"{source} is missing: --refresh takes a finished run folder")
    if stage == "explore" and read_json(source / "settings.json")["explore"]["held_out"] < config.explore.held_out:
        raise UserError(f"{source} has a lower --explore.held_out: what was learned from there cannot be held out here")
    if stage != "explore":  # what is taken must be what this command says
        free = {name: read_json(source / "settings.json")[name] for name in ("refresh", "seed")}
        check_settings(source, stage_settings(config, stage) | free, remedy="say the same, or --refresh another run")
    if rank() == 0:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("settings.json", "episodes.jsonl"), dirs_exist_ok=True)
        if (source / "episodes.jsonl").exists():  # last: it says that the episodes are there
            shutil.copy(source / "episodes.jsonl", folder)
    barrier()


def first_policy(config, run, device):
    """Where exploration and RL begin: the cloned policy, or the last one of the run that is refreshed."""
    return compiled(load_policy(Path(config.refresh) / "imagine" if config.refresh else run.path("clone"), device), config)


def fit_clone(name, policy, episodes, config, run, folder, device):
    data = CloneData(episodes, policy.normalizer, config.policy.chunk_size, device)
    fit(name, policy, lambda _, generator: data.batch(config.clone.batch_size, generator), clone_loss, config.clone, folder,
        config.seed, device, run.log)


def explore(config, run, folder, device):
    """The cloned policy acts in the true simulator with a ~ Laplace(loc, b * temperature); then, with RL's noise, for near
    misses, more grasps and releases without the rest of an episode. Everything is kept."""
    policy, levels = first_policy(config, run, device), config.explore.temperatures
    first = 100_000 * (config.seed + 1)
    if config.refresh:  # its episodes are kept; the new ones open another thousand
        if not gather((folder / "episodes.jsonl").exists())[0]:  # rank 0 decides: it copies
            keep("explore", config, folder)
        before = read_lines(Path(config.refresh) / "explore" / "episodes.jsonl")
        first = 1000 * (1 + max(line["seed"] for line in before) // 1000)
    contexts = [LiberoContext(task, first + number) for task in config.task_ids for number in range(config.explore.episodes)]
    with closing(true_env(config, device, config.explore.linger, config.explore.stride)) as env:
        temperatures = [levels[x.seed % 1000 % len(levels)] for x in contexts]
        lines = play(policy, env, contexts, folder, "explore", config.seed, temperatures)
        tries = short_tries([Episode.load(folder / line["file"]) for line in lines], config)
        temperatures = [levels[(x.seed + x.take) % len(levels)] for x in tries]
        play(policy, env, tries, folder, "try", config.seed, temperatures, chunk_noise=True,
             persistence=config.explore.persistence)
    print(f"explore: {sum(line['oracle_stop'] for line in lines)} of {len(lines)} episodes succeeded")


# ---------------------------------------------------------------------------------------------------------------------
# 4 simulate, 5 reflect
# ---------------------------------------------------------------------------------------------------------------------
def simulate(config, run, folder, device):
    """The world simulator, trained on demonstrations + exploration. Then it imagines all of that itself (same actions, same
    states): from its own pictures it learns to find back to the true ones, and from new copies what the fingers close on, as
    reflect does, for in imagination nothing else will be seen. Its error on held-out episodes is kept."""
    normalizer = Normalizer.from_dict(read_json(run.path("demonstrate") / "normalizer.json"))
    cameras = Cameras.from_dict(read_json(run.path("demonstrate") / "cameras.json"))
    training, held_out = explored(config, run)
    recorded, L = demonstrations(run) + training, config.policy.chunk_size
    data = ChunkData(recorded, L, device)
    torch.manual_seed(config.seed)
    world = compiled(WorldModel(config.world_model, cameras, normalizer).to(device), config)
    world.library = Library.of(data, normalizer) if config.world_model.neighbours else None
    if config.refresh or config.init_world:
        load_weights(find_model(config.init_world or Path(config.refresh) / "simulate", "--init_world "), world)
    fit("simulate", world, lambda _, generator: data.world_batch(config.simulate.batch_size, generator),
        world_model_loss, config.simulate, folder, config.seed, device, run.log)
    copies = ChunkData(imagined_copies(world, recorded, folder / "drift"), L, device, truth=recorded)
    fit("drift", world, half_imagined(data.world_batch, copies.world_batch, config.drift.batch_size), world_model_loss,
        config.drift, folder / "drift", config.seed, device, run.log)
    copies = ChunkData(imagined_copies(world, recorded, folder / "imagined"), L, device)
    fit("grasp", world.grasp_predictor, half_imagined(data.grasp_batch, copies.grasp_batch, config.grasp.batch_size),
        lambda _, batch, generator, rows: grasp_loss(world, batch, generator, rows), config.grasp, folder / "grasp",
        config.seed, device, run.log)
    if rank():
        return
    world.save_pretrained(folder)
    write_json(folder / "held_out.json", horizon_errors(world, held_out, horizons=(1, 5, 10), every=4))


def reflect(config, run, folder, device):
    """The reflector, trained on true frames and on the world simulator's copies of them, which bear the true labels.

    Calibrated on the held-out episodes, true and imagined; their quality is kept.
    """
    training, held_out = explored(config, run)
    world = frozen(WorldModel, run.path("simulate"), config, device)
    L = config.policy.chunk_size
    true = ChunkData(demonstrations(run) + training, L, device)
    imagined = ChunkData(load_episodes(run.path("simulate") / "imagined"), L, device)
    torch.manual_seed(config.seed)
    reflector = compiled(Reflector(config.reflector).to(device), config)
    if config.refresh:
        load_weights(Path(config.refresh) / "reflect", reflector)
    fit("reflect", reflector, half_imagined(true.frame_batch, imagined.frame_batch, config.reflect.batch_size),
        reflector_loss, config.reflect, folder, config.seed, device, run.log)
    if rank():
        return
    worlds = {"true": held_out, "imagined": imagine_episodes(world, None, held_out, seed=1)[0]}
    everything = held_out + imagine_episodes(world, None, held_out, seed=1, true_states=True)[0]
    labels = torch.cat([torch.from_numpy(episode.chunks(L).success).float() for episode in everything])
    calibrate(reflector, torch.cat(frame_logits(reflector, everything, L)).cpu(), labels)
    reflector.save_pretrained(folder)
    quality, rule = {}, config.virtual.stop
    for name, episodes in worlds.items():
        scores = frame_scores(reflector, episodes, L)
        quality[name] = reflector_quality(reflector, episodes, L, rule, scores)
        quality[name]["outcome"] = outcome_agreement([values[1:] for values in scores], held_out, rule)
    write_json(folder / "held_out.json", quality)


# ---------------------------------------------------------------------------------------------------------------------
# 6 imagine
# ---------------------------------------------------------------------------------------------------------------------
def imagine(config, run, folder, device):
    """RLOO + PPO (Algorithm 1) in the virtual environment, by flag after filtered cloning; two baselines by `rl_env`."""
    if config.rl_env == "virtual" and not config.trust_world:
        check_trust(read_json(run.path("simulate") / "held_out.json"), read_json(run.path("reflect") / "held_out.json"))
    if min(config.ppo.groups, config.ppo.anchor_batch) < world_size():
        raise UserError(f"{world_size()} processes cannot share {config.ppo.groups} groups, or {config.ppo.anchor_batch} "
                        "steps of demonstrations: raise --ppo.groups and --ppo.anchor_batch")
    policy = first_policy(config, run, device)
    if config.policy.backbone and config.ppo.lora_rank:  # what filtered cloning trains, too
        torch.manual_seed(config.seed)
        add_lora(policy, config.ppo.lora_rank)
    if config.filtered_cloning or config.rl_env == "none":
        successes = [episode for episode in explored(config, run)[0] if episode.achieved]
        fit_clone("filtered", policy, demonstrations(run) + successes, config, run, folder / "filtered", device)
    if config.rl_env == "none":
        return policy.save_pretrained(folder)
    torch.manual_seed(config.seed)
    if config.ppo.lora_rank:
        add_lora(policy, config.ppo.lora_rank)
    if config.policy.backbone:
        check_training(policy, config.ppo.microbatch, config.ppo.lora_rank, device, "--ppo.microbatch", held=True)
    optimizer = make_optimizer(policy, config.ppo)
    reference = reference_of(policy) if config.ppo.hold else None
    first = load_resume(folder, policy, optimizer)

    def validated(iteration):
        kept = folder / f"validate_{iteration:04d}"
        run.log("validate", iteration, validate(config, run, policy, kept, device))
        save_resume(kept, iteration, policy, optimizer)
    env, draw = virtual_world(config, run, device) if config.rl_env == "virtual" else true_world(config, run, device)
    data = CloneData(demonstrations(run), policy.normalizer, config.policy.chunk_size, device)
    anchor = partial(anchor_loss, data=data, size=config.ppo.anchor_batch, microbatch=config.ppo.microbatch)
    with closing(env):
        if config.validate.every and not first:
            validated(0)
        for iteration in tqdm(range(first, config.ppo.iterations), initial=first, total=config.ppo.iterations,
                              desc="imagine", unit="iteration"):
            if config.rl_env == "virtual":
                env.reset_noise(iteration)
            metrics = improve(policy, optimizer, env, draw, config.ppo, step_generator(config.seed, iteration), anchor,
                              reference, rollout if config.rl_env == "virtual" else play_groups)
            done, every = iteration + 1, config.validate.every
            run.log("imagine", done, metrics)
            if every and (done % every == 0 or done == config.ppo.iterations):
                validated(done)
            save_resume(folder, done, policy, optimizer)
    barrier()
    success = {step: record["true_success"] for (part, step), record in read_log(run.folder).items()
             if part == "validate" and (folder / f"validate_{step:04d}" / "resume.safetensors").exists()}
    if success:
        best = max(success, key=lambda step: (success[step], -step))
        load_resume(folder / f"validate_{best:04d}", policy, optimizer)
        print(f"imagine: the policy of iteration {best} is kept; true success by iteration: {success}")
    if not config.policy.backbone:  # a pretrained policy's changes stay apart from its gigabytes
        merge_lora(policy)
    policy.save_pretrained(folder)


def validate(config, run, policy, folder, device) -> dict:
    """Success of the greedy policy in both worlds, from the same first frames, and how far apart its hand is in the two."""
    contexts = placements(VALIDATE_SEED, config.task_ids, config.validate.episodes)
    with closing(true_env(config, device)) as env:
        lines = play(policy, env, contexts, folder, "validate", config.seed)
    data = ChunkData(load_episodes(folder), config.policy.chunk_size, device)
    stopped, states = imagine_policy(policy, *load_world(config, run, device), data.first_starts(),
                                     env.max_steps // env.chunk_size, config.virtual)
    return {"true_success": sum(line["oracle_stop"] for line in lines) / len(lines), "imagined_success": stopped.mean(),
            **hand_apart([track.states for track in data.tracks], states)}


# ---------------------------------------------------------------------------------------------------------------------
# 7 evaluate
# ---------------------------------------------------------------------------------------------------------------------
def evaluate(config, run, folder, device):
    """Cloned and post-trained policy in both worlds, from the same benchmark states; film strips of both worlds."""
    world, reflector = load_world(config, run, device)
    policies, sizes, limit = load_policies(run.folder, device), config.policy, step_limit(config.task, config.max_steps)
    lines = evaluate_policies(policies, reflector, config.task, config.task_ids, config.evaluate.episodes, folder,
                              sizes.image_size, sizes.chunk_size, config.num_procs, config.evaluate.stop, device,
                              config.max_steps)
    results = summarize(lines, config.evaluate.stop) | {"imagined": {}} | protocol(
        config.task, config.task_ids, sizes, config.evaluate.stop, config.evaluate.episodes, config.max_steps)
    if config.evaluate.imagine:
        starts = ChunkData(load_episodes(folder / "cloned"), sizes.chunk_size, device).first_starts()
        for name, policy in tqdm(policies.items(), desc="evaluate in imagination", unit="policy"):
            stopped, _ = imagine_policy(policy, world, reflector, starts, limit // sizes.chunk_size, config.virtual)
            results["imagined"][name] = proportion(stopped)
            for task, rates in results["per_task"][name].items():
                rates["imagined"] = proportion([done for done, start in zip(stopped, starts) if start.task_id == int(task)])
    if rank():
        return
    (folder / "videos").mkdir(exist_ok=True)
    last = list(policies)[-1]
    film_some(lines[last], folder / last, folder / "videos", config.evaluate.videos, world, reflector,
              config.evaluate.stop.eta)
    write_json(folder / "results.json", results)


if __name__ == "__main__":
    with clear_errors():
        distributed.start()
        train(parse(sys.argv[1:]))
