"""Promises of distributed.py: two processes learn what one does. torchrun starts this file with a folder to write to."""
import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import distributed
from episodes import ChunkData, CloneData, Episode
from evaluate import imagine_policy
from policy import Policy, anchor_loss, clone_loss
from ppo import PPOConfig, improve
from reflector import Reflector, StopRule, reflector_loss
from runs import FitConfig, fit, step_generator
from test_playing import CONTEXTS, Env, played
from tiny_models import CAMERAS, L, NORMALIZER, POLICY, REFLECTOR, SIZE, WORLD
from virtual_env import VirtualEnv, VirtualEnvConfig
from world_model import WorldModel, grasp_loss, world_model_loss

torch.set_num_threads(1)
CPU = torch.device("cpu")
STEPS = FitConfig(steps=4, batch_size=7, lr=0.1, warmup=1, save_every=4)  # 7: no two parts are alike


def episodes():
    random = np.random.default_rng(0)

    def one(number, T):
        states = np.tile(np.array([0, 0, 0.3, 3.1, 0, 0, 0.03, -0.03], np.float32), (T + 1, 1))
        states[:, :3] += random.normal(0, 0.02, (T + 1, 3))
        return Episode(random.integers(0, 256, (T + 1, 2, 3, SIZE, SIZE), dtype=np.uint8), states,
                       random.uniform(-1, 1, (T * L - 2, 7)).astype(np.float32), random.random(T + 1) > 0.5, L, number % 2,
                       f"task {number % 2}", "explore", number)
    return [one(number, T) for number, T in enumerate((3, 5, 4, 6))]  # the last chunk of each is cut short


class Bright:
    """Takes a bright picture for a success."""
    def score(self, first, previous, current, instruction, fingers):
        return torch.sigmoid((current.float().mean(dim=(1, 2, 3, 4)) - 127.5) / 2)


def train_all(folder, accumulate=1, device=CPU):
    """Every kind of training and of playing, tiny: {name: change of the weights}, and what else must be alike.

    By plain gradient descent: Adam blows rounding up to whole steps where a gradient is nearly zero. One iteration of RL:
    in the second one, rounding of imagined pictures to 8 bits would do the same.
    """
    config, data, log, weights = replace(STEPS, accumulate=accumulate), ChunkData(episodes(), L, device), {}, {}

    def learn(name, model, make_batch, loss_fn):
        (folder / name).mkdir(parents=True, exist_ok=True)
        before = vector(model)
        with mock.patch("torch.optim.AdamW", torch.optim.SGD):
            fit(name, model, make_batch, loss_fn, config, folder / name, 0, device,
                lambda name, step, metrics: log.update({name: metrics}))
        weights[name] = vector(model) - before

    torch.manual_seed(0)
    world, reflector = WorldModel(WORLD, CAMERAS, NORMALIZER).to(device), Reflector(REFLECTOR).to(device)
    clone_data = CloneData(episodes(), NORMALIZER, L, device)
    learn("clone", Policy(POLICY, NORMALIZER).to(device), lambda step, generator: clone_data.batch(7, generator), clone_loss)
    learn("simulate", world, lambda step, generator: data.world_batch(7, generator, transitions=21), world_model_loss)
    learn("grasp", world.grasp_predictor, lambda step, generator: data.grasp_batch(7, generator),
          lambda _, batch, generator, rows: grasp_loss(world, batch, generator, rows))
    learn("reflect", reflector, lambda step, generator: data.frame_batch(7, generator), reflector_loss)

    ppo = PPOConfig(groups=3, group_size=3, minibatch=5, microbatch=3, warmup=1, epochs=2, explore_chunks=2, anchor_batch=2,
                    hold=0.1)  # towards another policy: at full weight ratios leave the band, on whose edge rounding tells
    torch.manual_seed(1)  # as every stage does before it draws a network
    mine, dream = distributed.shard(range(3)), WorldModel(WORLD, CAMERAS, NORMALIZER).to(device)
    policy = Policy(POLICY, NORMALIZER).to(device)
    before, start = vector(policy), copy.deepcopy(policy)
    env = VirtualEnv(dream, Bright(), VirtualEnvConfig(horizon=3, stop=StopRule(0.8, 1)), len(mine) * 3, 3, mine[0] * 3, 9)
    log["imagine"] = improve(policy, torch.optim.SGD(policy.parameters(), 3e-4), env, lambda count, generator: data.starts(
        [data.index[i] for i in torch.randint(len(data.index), (count,), generator=generator)]), ppo, step_generator(0, 0),
                             partial(anchor_loss, data=clone_data, size=7, microbatch=3), Policy(POLICY, NORMALIZER).to(device))
    weights["imagine"] = vector(policy) - before

    log["episodes"] = [name for name, _ in played(folder / "explore", Env(2), CONTEXTS[:7])]
    starts = data.starts(data.index[:5])
    with mock.patch("evaluate.AT_ONCE", 2 if accumulate > 1 else 64):
        stopped, states = imagine_policy(start, dream, Bright(), starts, 3, VirtualEnvConfig(stop=StopRule(0.7, 1)))
    log["stopped"], log["lasted"] = stopped.tolist(), list(map(len, states))
    log["apart"] = max(float((other - weights[name]).abs().max()) for name in weights
                       for other in distributed.gather(weights[name]))
    return weights, log


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def torchrun(processes, script, *arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                           str(script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(weights, log) of one process, and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    process = torchrun(2, __file__, folder / "two")
    assert process.returncode == 0, process.stderr
    one = train_all(folder / "one")
    two = load_file(folder / "two" / "weights.safetensors"), json.loads((folder / "two" / "log.json").read_text())
    return folder, one, two


@pytest.mark.parametrize("name", ["clone", "simulate", "grasp", "reflect", "imagine"])
def test_two_processes_learn_what_one_does(results, name):
    _, (one, log), (two, other) = results
    assert (one[name] - two[name]).abs().max() < 1e-5
    assert (one[name] - two[name]).norm() < 1e-2 * one[name].norm() and one[name].norm() > 1e-3
    for key, value in log[name].items():
        if not key.endswith("_noise"):  # thirds of the batch by noise level: each part has its own
            assert other[name][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_processes_stay_together_bit_for_bit(results):
    assert results[2][1]["apart"] == 0


def test_uneven_episodes_are_shared_out_without_loss_and_played_alike(results):
    folder, (_, one), (_, two) = results
    assert len(one["episodes"]) == 7 and two["episodes"] == one["episodes"]
    assert two["stopped"] == one["stopped"] and two["lasted"] == one["lasted"] and len(set(one["stopped"])) == 2
    lines = [json.loads(line) for line in (folder / "two" / "explore" / "episodes.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == sorted(one["episodes"])
    for name in one["episodes"]:
        a, b = (Episode.load(folder / run / "explore" / name) for run in ("one", "two"))
        assert np.array_equal(a.actions, b.actions)


def test_accumulated_parts_learn_what_the_whole_batch_does(results, tmp_path):
    weights, log = train_all(tmp_path, accumulate=3)
    assert log["stopped"] == results[1][1]["stopped"] and log["lasted"] == results[1][1]["lasted"], "imagined two at a time"
    for name in ("clone", "simulate", "grasp", "reflect"):
        assert (weights[name] - results[1][0][name]).abs().max() < 1e-5, name


def test_an_error_in_one_process_ends_all_with_one_line(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import distributed, runs\n"
                      "with runs.clear_errors():\n"
                      "    distributed.start()\n"
                      "    if distributed.rank() == 1: raise runs.UserError('the disk of rank 1 is full')\n"
                      "    distributed.barrier()\n"
                      "    print('went on')\n")
    process = torchrun(2, script)
    ours = process.stderr.split("ChildFailedError")[0]
    assert process.returncode != 0 and ours.count("error: the disk of rank 1 is full") == 1
    assert "went on" not in process.stdout and "barrier" not in ours, ours


if __name__ == "__main__":
    distributed.start()
    folder = Path(sys.argv[1])
    weights, log = train_all(folder)
    if distributed.rank() == 0:
        save_file(weights, folder / "weights.safetensors")
        (folder / "log.json").write_text(json.dumps(log))
