"""The whole loop on the real simulator: all seven stages with the tiny preset, stop and resume, and bad input."""
import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file

import benchmark
import evaluate
import train
from intervals import wilson_interval
from openvla_tiny import write_checkpoint
from config import parse
from runs import UserError, clear_errors, read_log
from vlm_tiny import tiny_encoder, tiny_vae, tiny_vlm

ROOT = Path(__file__).parent.parent
TINY = ["--preset", "tiny", "--device", "cpu"]
ON_GPU = ["--preset", "tiny", "--device", "pretend"]  # with the fixture `gpu`


def run(script, *arguments):
    """In a process of its own, as a user would."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def call(script, *arguments):
    """The same within this process, which saves the seconds that starting one takes."""
    arguments = [str(value) for value in arguments]
    if script == "train.py":
        train.train(parse(arguments))
    else:
        evaluate.main(tyro.cli(evaluate.Arguments, args=arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run through all seven stages, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    process = run("train.py", *TINY, "--output_dir", folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder, process


def copy_of(finished, tmp_path, without=()):
    """A copy of the finished run that lacks some stages."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for stage in without:
        shutil.rmtree(folder / stage)
    return folder


def test_the_run_leaves_a_report_results_and_pictures(finished):
    folder, process = finished
    results = json.loads((folder / "results.json").read_text())
    assert results["task"] == "libero_object" and results["preset"] == "tiny" and results["seed"] == 0
    for policy in ("cloned", "post_trained"):
        for stop in ("oracle_stop", "self_stop"):
            cell = results["policies"][policy][stop]
            assert cell["episodes"] == 2 and cell["rate"] == cell["successes"] / 2
            assert np.allclose(cell["ci95"], wilson_interval(cell["successes"], 2))
        assert results["imagined"][policy]["episodes"] == 2 and results["per_task"][policy]["1"]["imagined"]["episodes"] == 1
    assert set(results["paired"]["post_trained - cloned"]["oracle_stop"]) == {"difference", "ci95", "mcnemar_p"}
    assert list(results["stages"]) == ["demonstrate", "clone", "explore", "simulate", "reflect", "imagine", "evaluate"]
    steps = results["control_steps"]
    looks = [json.loads(line)["steps"] for path in (folder / "imagine").glob("validate_*/episodes.jsonl")
             for line in path.read_text().splitlines()]
    assert len(looks) == 2 * 2, "before RL and after, an episode of two tasks each"
    log = [json.loads(line) for line in (folder / "imagine" / "log.jsonl").read_text().splitlines() if '"validate"' in line]
    assert [look["step"] for look in log] == [0, 2]
    assert all({"true_success", "imagined_success", "hand_apart_mm_1"} <= set(look) for look in log)
    seeds = {json.loads(line)["seed"] for line in (folder / "imagine" / "validate_0002" / "episodes.jsonl").read_text().splitlines()}
    assert min(seeds) >= 20_000_000, "the benchmark's states are for evaluation alone"
    assert len(seeds) == 2, "two tasks whose hands begin in the same places tell less than they seem to"
    assert steps["imagine"] == {"true": sum(looks), "imagined": steps["imagine"]["imagined"]}
    assert 0 < steps["imagine"]["imagined"] <= 2 * 8 * 24
    explored = [np.load(path)["actions"] for path in (folder / "explore").glob("*.npz")]
    assert steps["explore"]["true"] >= sum(map(len, explored)) > 0 and steps["demonstrate"]["true"] > 100
    report = (folder / "report.md").read_text()
    assert report.strip() in process.stdout and "settling steps | 10" in report and "pick up the cream cheese" in report
    for task in (0, 1):
        assert (folder / "evaluate" / "videos" / f"task{task:02d}_0.gif").stat().st_size > 10_000
    assert (folder / "curves.png").stat().st_size > 10_000
    for chatter in ("WARNING", "Traceback", "EGL", "macro file"):
        assert chatter not in process.stderr + process.stdout, process.stderr


def test_every_stage_shows_its_progress(finished):
    for stage in ("demonstrate", "clone", "explore", "simulate", "reflect", "imagine", "cloned", "post_trained"):
        assert re.search(rf"{stage}: 100%", finished[1].stderr), stage


def test_true_episodes_of_both_policies_start_from_the_same_benchmark_states(finished):
    lines = {name: [json.loads(line) for line in (finished[0] / "evaluate" / name / "episodes.jsonl").read_text().split("\n")
                    if line] for name in ("cloned", "post_trained")}
    assert all(line["steps"] <= 64 for rows in lines.values() for line in rows), "--max_steps"
    starts = [[(line["task_id"], line["seed"]) for line in rows] for rows in lines.values()]
    assert sorted(starts[0]) == sorted(starts[1]) == [(0, 0), (1, 0)]
    first = [np.load(finished[0] / "evaluate" / name / "task00_seed000000.npz")["images"][0] for name in lines]
    assert np.array_equal(*first)


def test_the_same_command_again_skips_everything_and_prints_the_same_report(finished):
    before = (finished[0] / "report.md").read_text()
    stamp = (finished[0] / "clone" / "model.safetensors").stat().st_mtime_ns
    process = run("train.py", *TINY, "--output_dir", finished[0])
    assert process.returncode == 0 and before.strip() in process.stdout
    assert (finished[0] / "clone" / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_policy_hears_the_benchmarks_words_whatever_a_demonstration_file_says(finished, tmp_path):
    for path in (finished[0] / "demonstrate").glob("*_demo.hdf5"):
        with h5py.File(shutil.copy(path, tmp_path), "r+") as file:
            file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "pick the akita black bowl"})
    call("train.py", *TINY, "--demos", tmp_path, "--stages", "demonstrate", "--output_dir", tmp_path / "run")
    heard, ours = ({str(np.load(path)["instruction"]) for path in (folder / "demonstrate" / "episodes").glob("*.npz")}
                   for folder in (tmp_path / "run", finished[0]))
    assert heard == ours and len(ours) == 2


def test_rl_stopped_after_two_iterations_and_resumed_equals_a_straight_run_of_four(
        finished, tmp_path, monkeypatch, capsys):
    four = ["train.py", *TINY, "--stages", "imagine", "--ppo.iterations", 4, "--ppo.lora_rank", 2, "--validate.every", 0, "--output_dir"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight = copy_of(finished, tmp_path / "a", ["imagine", "evaluate"])
    call(*four, straight)
    stopped = copy_of(finished, tmp_path / "b", ["imagine", "evaluate"])
    improve, played = train.improve, []

    def twice(*args):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(1)
        return improve(*args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end, clear_errors():
        patched.setattr(train, "improve", twice)
        call(*four, stopped)
    assert end.value.code == 130 and "goes on" in capsys.readouterr().err and not (stopped / "imagine").exists()
    del end  # its traceback holds the folder's lock
    gc.collect()
    call(*four, stopped)
    a, b = (load_file(folder / "imagine" / "model.safetensors") for folder in (straight, stopped))
    assert all(torch.equal(a[key], b[key]) for key in a)
    start = load_file(straight / "clone" / "model.safetensors")
    assert any(not torch.equal(a[key], start[key]) for key in a), "RL changed nothing"


def test_rl_runs_in_the_true_simulator_with_the_same_code(finished, gpu, tmp_path):
    folder = copy_of(finished, tmp_path, ["imagine", "evaluate"])
    call("train.py", *ON_GPU, "--stages", "imagine", "--rl_env", "libero", "--ppo.iterations", 1, "--ppo.groups", 1,
         "--ppo.group_size", 2, "--validate.every", 0, "--start.contact", 0, "--start.midway", 1, "--output_dir", folder)
    assert (folder / "imagine" / "model.safetensors").exists()
    steps = read_log(folder)["imagine", 1]["control_steps"]
    assert steps > 2 * 3 * 8 and steps % 16 == 0, "two rollouts of three chunks, and what both repeat to come to their start"


def test_the_rival_clones_the_explored_successes_too(finished, tmp_path):
    folder = copy_of(finished, tmp_path, ["imagine", "evaluate"])
    for path in (folder / "explore").glob("*.npz"):  # the tiny policy has none: make one
        arrays = dict(np.load(path))
        arrays["success"] = np.zeros_like(arrays["success"])
        arrays["success"][-1] = path.name == "task00_seed100001.npz"
        np.savez(path, **arrays)
    command = ["train.py", *TINY, "--stages", "imagine", "--rl_env", "none", "--output_dir", folder]
    worlds = {name: (folder / name).rename(tmp_path / name) for name in ("simulate", "reflect")}
    call(*command)
    for name, path in worlds.items():  # RL needs what the rival doesn't
        path.rename(folder / name)
    first = load_file(folder / "imagine" / "model.safetensors")
    path = folder / "explore" / "task01_seed100001.npz"  # of the other task; numbers 0 are held out
    arrays = dict(np.load(path))
    arrays["success"][-1] = True
    np.savez(path, **arrays)
    shutil.rmtree(folder / "imagine")
    call(*command)
    again = load_file(folder / "imagine" / "model.safetensors")
    assert any(not torch.equal(first[key], again[key]) for key in first), "another success must change what is cloned"
    for iterations in (0, 1):  # RL starts where the rival ends
        shutil.rmtree(folder / "imagine")
        call(*command[:-4], "--filtered_cloning", "--ppo.iterations", iterations, "--validate.every", 0, "--ppo.lr_heads", 1,
             *command[-2:])
        last = load_file(folder / "imagine" / "model.safetensors")
        assert all(torch.equal(last[key], again[key]) for key in again) == (iterations == 0)


def test_a_refresh_explores_with_the_last_policy_and_keeps_data_and_weights(finished, tmp_path):
    folder = tmp_path / "refreshed"
    stages = ["demonstrate", "clone", "explore", "simulate", "reflect"]
    call("train.py", *TINY, "--refresh", finished[0], "--stages", *stages, "--output_dir", folder,
         "--simulate.steps", 0, "--drift.steps", 0, "--grasp.steps", 0, "--reflect.steps", 0)
    base, names = finished[0], lambda path: {file.name for file in (path / "explore").glob("*.npz")}
    assert names(base) < names(folder) and len(names(folder)) == 2 * len(names(base))
    for stage in ("clone", "simulate"):  # without a training step the weights are those of the run before
        a, b = (load_file(path / stage / "model.safetensors") for path in (base, folder))
        assert all(torch.equal(a[key], b[key]) for key in a), stage
    new = [np.load(folder / "explore" / name) for name in names(folder) - names(base)]
    assert all(episode["seed"] >= 101_000 for episode in new)
    with pytest.raises(UserError, match="finished run folder"):
        call("train.py", *TINY, "--refresh", tmp_path / "none", "--output_dir", tmp_path / "r")
    for flags, words in ((["--task", "libero_goal"], "--task libero_object"), (["--policy.width", 32], "--policy.width 64")):
        with pytest.raises(UserError, match=f"{words}, this command says .*: say the same"):
            call("train.py", *TINY, *flags, "--refresh", finished[0], "--output_dir", tmp_path / "r")
    with pytest.raises(UserError, match="learned from there cannot be held out"):
        call("train.py", *TINY, "--explore.held_out", 2, "--refresh", finished[0], "--output_dir", tmp_path / "r")


def test_a_world_simulator_may_start_from_any_of_ours(finished, tmp_path):
    folder = copy_of(finished, tmp_path, ["simulate", "reflect", "imagine", "evaluate"])
    command = ["train.py", *TINY, "--stages", "simulate", "--simulate.steps", 0, "--drift.steps", 0, "--grasp.steps", 0,
               "--output_dir", folder, "--init_world"]
    with pytest.raises(UserError, match=f"--init_world {tmp_path / 'none'} is neither a folder"):
        call(*command, tmp_path / "none")
    call(*command, finished[0] / "simulate")
    a, b = (load_file(path / "simulate" / "model.safetensors") for path in (finished[0], folder))
    assert all(torch.equal(a[key], b[key]) for key in a)


FEW = ["--clone.steps", 2, "--clone.batch_size", 2, "--ppo.iterations", 1, "--ppo.groups", 1, "--ppo.group_size", 2,
       "--validate.every", 0]


def test_every_stage_runs_on_pretrained_models(finished, gpu, tmp_path):
    """An OpenVLA-OFT checkpoint as policy, an encoder and a VAE for the simulator, an image-text model as reflector."""
    folder = copy_of(finished, tmp_path, ["clone", "explore", "simulate", "reflect", "imagine", "evaluate"])
    call("train.py", *ON_GPU, *FEW, "--policy.backbone", write_checkpoint(tmp_path / "openvla"), "--ppo.lora_rank", 2,
         "--policy.gradient_checkpointing", "--world_model.vae", tiny_vae(tmp_path / "vae"), "--world_model.patch", 1,
         "--world_model.encoders", tiny_encoder(tmp_path / "dino", "dinov2"), "--reflector.backbone",
         tiny_vlm(tmp_path / "vlm", "llava"), "--simulate.steps", 2, "--drift.steps", 2, "--reflect.steps", 2,
         "--explore.episodes", 2, "--explore.grasps", 0, "--explore.releases", 0, "--max_steps", 24, "--evaluate.videos", 0,
         "--output_dir", folder)
    start, end = (load_file(folder / stage / "model.safetensors") for stage in ("clone", "imagine"))
    assert all(name.startswith("scale_head.") for name in start) and any(name.endswith("q_proj.b") for name in end)
    assert json.loads((folder / "results.json").read_text())["imagined"]["post_trained"]["episodes"] == 2


def test_an_image_text_model_is_cloned_and_post_trained_as_the_policy(finished, tmp_path):
    folder = copy_of(finished, tmp_path, ["clone", "imagine", "evaluate"])
    call("train.py", *TINY, *FEW, "--stages", "clone", "imagine", "--policy.backbone",
         tiny_vlm(tmp_path / "vlm", "idefics3"), "--ppo.lora_rank", 2, "--output_dir", folder)
    start, end = (load_file(folder / stage / "model.safetensors") for stage in ("clone", "imagine"))
    assert all(name.startswith(("scale_head.", "action_head.")) for name in start) and any(name.endswith("q_proj.b") for name in end)


def test_the_policy_that_truly_succeeds_most_often_is_kept_and_a_tie_goes_to_the_earlier(finished, tmp_path, monkeypatch):
    seen = []

    def look(config, run, policy, folder, device):
        folder.mkdir()
        seen.append({name: value.clone() for name, value in policy.state_dict().items()})
        return {"true_success": next(rates), "imagined_success": 0.5}

    monkeypatch.setattr(train, "validate", look)
    for every, values, best in ((1, [0.5, 0.7, 0.7, 0.6], 1), (1, [0.8, 0.7, 0.7, 0.8], 0), (2, [0.5, 0.4, 0.6], 2)):
        rates, folder = iter(values), copy_of(finished, tmp_path / f"{best}", ["imagine", "evaluate"])
        seen.clear()
        call("train.py", *TINY, "--stages", "imagine", "--ppo.iterations", 3, "--ppo.lr_backbone", 1e-2,
             "--validate.every", every, "--output_dir", folder)  # the last iteration is looked at, whatever it divides
        kept = load_file(folder / "imagine" / "model.safetensors")
        assert [all(torch.equal(kept[key], weights[key]) for key in kept) for weights in seen] == [
            i == best for i in range(len(values))]


def test_evaluate_is_a_command_of_its_own_that_goes_on_where_it_was(finished):
    command = ["evaluate.py", "--checkpoint", finished[0], "--task_ids", 0, "--device", "cpu", "--videos", 1,
               "--max_steps", 64, "--episodes"]
    first = run(*command, 1)
    assert first.returncode == 0, first.stderr
    folder = finished[0] / "eval_libero_object"
    for wrong, words in (([finished[0] / "imagine"], "not that of one of its stages"), ([finished[0], "--task_ids", 0, 0], "twice"),
                         ([finished[0], "--temperatures", 4.0], "takes --sample")):
        with pytest.raises(UserError, match=words):
            call("evaluate.py", "--checkpoint", *wrong)
    lines = (folder / "post_trained" / "episodes.jsonl").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["policies"]["cloned"]["self_stop"]["episodes"] == 1 and results["per_task"]["cloned"].keys() == {"0"}
    report = (folder / "report.md").read_text()
    for words in ("settling steps | 10", "step limit | 64", "mujoco 3", "robosuite 1", "greedy", "pick up the alphabet soup",
                  "false stop rate"):
        assert words in report, words
    info = json.loads((folder / "cloned" / "eval_info.json").read_text())
    assert Path(info["overall"]["video_paths"][0]).stat().st_size > 10_000 and info["overall"]["eval_s"] > 1
    call(*command, 1, "--policy", "post_trained")
    assert (folder / "post_trained" / "episodes.jsonl").read_text() == lines
    call(*command, 2, "--policy", "post_trained")
    longer = (folder / "post_trained" / "episodes.jsonl").read_text()
    assert longer.startswith(lines) and len(longer.splitlines()) == 2
    call(*command, 1, "--policy", "cloned", "--stop", "none", "--output_dir", folder / "never")
    assert "| at the step limit |" in (folder / "never" / "report.md").read_text()
    (line,) = [json.loads(line) for line in (folder / "never" / "cloned" / "episodes.jsonl").read_text().splitlines()]
    assert line["chunks"] == 8 and line["no_stop"] == bool(line["success"][-1])
    with pytest.raises(UserError, match="--sample False"):
        call(*command, 2, "--output_dir", folder, "--sample")


def test_the_same_seed_gives_the_same_episodes_whatever_the_number_of_processes(finished, tmp_path):
    """To the bit, noise included, on two tasks of a suite whose fixtures are placed anew at every reset."""
    command = ["evaluate.py", "--checkpoint", finished[0], "--task", "libero_spatial", "--task_ids", 0, 5, "--episodes", 1,
               "--policy", "cloned", "--sample", "--stop", "oracle", "--max_steps", 64, "--device", "cpu"]
    for count in (1, 2):
        call(*command, "--num_procs", count, "--output_dir", tmp_path / str(count))
    for path in (tmp_path / "1" / "cloned").glob("*.npz"):
        a, b = (np.load(tmp_path / count / "cloned" / path.name) for count in "12")
        assert all(np.array_equal(a[key], b[key]) for key in a.files), path.name
    lines = [json.loads(line) for line in (tmp_path / "1" / "cloned" / "episodes.jsonl").read_text().splitlines()]
    assert sorted((line["task_id"], line["seed"]) for line in lines) == [(0, 0), (5, 0)]


def test_two_checkpoints_are_compared_on_the_same_states(finished, tmp_path, capsys):
    other = copy_of(finished, tmp_path, ["reflect"])
    command = ["evaluate.py", "--checkpoint", finished[0], other, "--task_ids", 1, "--episodes", 1, "--policy", "cloned",
               "--max_steps", 64, "--device", "cpu", "--output_dir", tmp_path / "both", "--stop"]
    with pytest.raises(UserError, match="copy has no reflector.*add --stop oracle"):
        call(*command, "self")
    shutil.copytree(finished[0] / "reflect", other / "reflect")
    call(*command, "self")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert results["paired"] == {"copy/cloned - tiny/cloned": results["paired"]["copy/cloned - tiny/cloned"]}
    assert "over_seeds" not in results, "one seed twice: a run and its ablation"
    a, b = ((tmp_path / "both" / name / "cloned" / "task01_seed000000.npz").read_bytes() for name in ("tiny", "copy"))
    assert a == b
    config = json.loads((other / "config.json").read_text())
    for changed, words in (({"task": "libero_goal"}, "differ in --task"),
                           ({"evaluate": {"stop": {"eta": 0.5, "confirm": 9}}}, "differ in --evaluate.stop")):
        (other / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UserError, match=words):
            call(*command, "self")
    (other / "config.json").write_text(json.dumps(config | {"seed": 1}))
    capsys.readouterr()
    call(*command, "self")
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert results["over_seeds"]["cloned"]["self_stop"]["std"] == 0 and "## Over seeds" in capsys.readouterr().out


def test_world_measures_the_imagination_on_episodes_of_its_own_and_goes_on_where_it_was(finished, gpu):
    command = ["evaluate.py", "--world", finished[0], "--task_ids", 0, "--episodes", 2, "--max_steps", 48, "--device", "pretend"]
    call(*command)
    folder = finished[0] / "world_2"
    measured = json.loads((folder / "fidelity.json").read_text())
    assert measured["episodes"] == 2 and measured["outcome"]["imagined frames"]["agreement"]["of"] == 2
    loop = measured["outcome"]["closed loop"]["agreement"]
    taken_up = len(list((folder / "closed_loop").glob("*.npz")))  # none where the tiny policy never closes its fingers
    assert loop["of"] == taken_up <= 1, "temperature 4 is left out"
    seeds = {json.loads(line)["seed"] for line in (finished[0] / "explore" / "episodes.jsonl").read_text().splitlines()}
    lines = (folder / "episodes.jsonl").read_text()
    assert not seeds & {json.loads(line)["seed"] for line in lines.splitlines()}, "tested on what it was trained on"
    for name in ("fidelity", "best", "median", "worst"):
        assert (folder / f"{name}.png").stat().st_size > 5_000
    call(*command)
    assert (folder / "episodes.jsonl").read_text() == lines
    for other, words in ((["--temperatures", 1.0], "temperatures"), (["--task_ids", 7], "what the run was trained on"),
                         (["--stop", "self"], "leave out --stop")):
        with pytest.raises(UserError, match=words):
            call(*command, *other)


def test_the_benchmark_compares_both_worlds_on_this_machine(finished, gpu, capsys):
    benchmark.main(benchmark.Arguments(str(finished[0]), device="pretend"))
    speed = {name: float(value) for name, value in (line.split() for line in capsys.readouterr().out.strip().split("\n")[-5:])}
    assert all(value > 0 for value in speed.values())
    assert speed["imagined_over_true"] == pytest.approx(speed["imagined_steps_per_s"] / speed["true_steps_per_s"], rel=0.05)


def test_rl_is_refused_in_a_world_that_was_hardly_trained(finished, tmp_path):
    folder = copy_of(finished, tmp_path, ["imagine", "evaluate"])
    process = run("train.py", *TINY, "--no-trust_world", "--stages", "imagine", "--output_dir", folder)
    refused(process, "cannot be trusted")


def test_the_virtual_environment_never_calls_the_true_simulator():
    code = "import sys, virtual_env, ppo, reflector, policy, episodes; assert not {'mujoco', 'robosuite', 'libero'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing lost
# ---------------------------------------------------------------------------------------------------------------------
def refused(process, words):
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr and words in process.stderr.strip().split("\n")[-1], process.stderr


def test_bad_names_and_folders_are_refused(tmp_path, capsys):
    refused(run("train.py", "--task", "libero_objects", "--output_dir", tmp_path / "a"), "libero_object")

    def says(words, command, *arguments):
        """As `refused`, within this process."""
        with pytest.raises(SystemExit) as end, clear_errors():
            call(*command, *arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err.strip().split("\n")[-1]

    training, evaluation = ["train.py", *TINY], ["evaluate.py"]
    says("from 0 to 9", training, "--task_ids", 12, "--output_dir", tmp_path / "b")
    says("add demonstrate to --stages", training, "--stages", "clone", "--output_dir", tmp_path / "c")
    says("--ppo.lora_rank 32", training, "--policy.backbone", "a/b", "--output_dir", tmp_path / "d")
    says("not a folder", training, "--demos", tmp_path / "none", "--output_dir", tmp_path / "e")
    says("does not exist", evaluation, "--checkpoint", tmp_path / "nothing")
    says("at least a chunk, 8", training, "--max_steps", 7, "--output_dir", tmp_path / "b")
    says("1 or more", evaluation, "--checkpoint", tmp_path / "nothing", "--episodes", 0)
    says("one number or more", evaluation, "--world", tmp_path / "nothing", "--temperatures")
    with h5py.File(tmp_path / "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo.hdf5", "w") as file:
        file.create_group("data")
    says("demonstration file", training, "--demos", tmp_path, "--output_dir", tmp_path / "f")


def test_other_settings_and_damaged_files_are_refused_and_finished_stages_stay(finished, tmp_path):
    folder = copy_of(finished, tmp_path, ["evaluate", "imagine"])
    sizes = [f"--{part}.image_size=128" for part in ("policy", "world_model")]
    for other, words in ((["--policy.width", 32], "policy.width 64"), (["--task", "libero_goal"], "libero_object"),
                         (sizes, "policy.image_size 64")):
        with pytest.raises(UserError, match=words):
            call("train.py", *TINY, "--output_dir", folder, *other)
    assert json.loads((folder / "config.json").read_text())["task"] == "libero_object", "a refused command changes nothing"
    weights = folder / "simulate" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run("train.py", *TINY, "--output_dir", folder), "truncated")
    assert (folder / "clone" / "model.safetensors").exists() and (folder / "explore" / "episodes.jsonl").exists()
