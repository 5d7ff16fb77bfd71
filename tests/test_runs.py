"""Promises of the run folder and of the training loop."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distributed
import runs
from policy import Policy
from reflector import Reflector
from runs import (FitConfig, Run, UserError, fit, load_pretrained, load_resume, load_weights, read_json, read_log,
                  save_model, save_resume, step_generator, whole_file, write_json)
from tiny_models import CAMERAS, NORMALIZER, POLICY, REFLECTOR, WORLD
from world_model import WorldModel

CPU = torch.device("cpu")


def train_line(folder, steps, total=8, lr=0.1, width=1, muon=False, dropout=0.0):
    """Fit y = 2x for `steps` of `total` steps, resuming what `folder` holds. The schedule is that of `total` steps."""
    torch.manual_seed(0)
    model = nn.Linear(width, width)

    def batch(step, generator):
        if step >= steps:
            raise KeyboardInterrupt
        x = torch.randn(4, width, generator=generator)
        return {"x": x, "y": 2 * x}

    def loss_fn(model, batch, generator, rows):
        noise = 0.01 * torch.randn(4, 1, generator=generator)
        loss = (model(nn.functional.dropout(batch["x"], dropout)) + noise - batch["y"])[rows].square().mean()
        return loss, {"loss": loss.item()}

    config = FitConfig(steps=total, lr=lr, warmup=2, save_every=2, muon=muon)
    try:
        fit("line", model, batch, loss_fn, config, folder, 0, CPU, lambda *_: None)
    except KeyboardInterrupt:
        pass
    return model


@pytest.mark.parametrize("how", [{}, {"width": 40, "muon": True}, {"width": 8, "dropout": 0.5}], ids=["adamw", "muon", "dropout"])
def test_stop_and_resume_equals_a_straight_run_bit_for_bit(how, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    straight = train_line(tmp_path / "a", 8, **how)
    train_line(tmp_path / "b", 5, **how)  # killed in step 5; the last checkpoint is of step 4
    resumed = train_line(tmp_path / "b", 8, **how)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_resume_restores_weights_optimizer_and_step(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_resume(tmp_path, 7, model, optimizer)
    other = nn.Linear(2, 2)
    restored = torch.optim.Adam(other.parameters(), lr=0.1)
    assert load_resume(tmp_path, other, restored) == 7
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(restored.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    with pytest.raises(UserError, match="another configuration"):
        load_resume(tmp_path, nn.Linear(3, 3), torch.optim.Adam(nn.Linear(3, 3).parameters()))


def test_a_loss_that_is_not_finite_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="start again with a lower"):
        train_line(tmp_path, 8, lr=float("inf"))


def test_step_generators_differ_by_seed_and_step():
    draws = {(seed, step): torch.rand(1, generator=step_generator(seed, step)).item()
             for seed in range(3) for step in range(50)}
    assert len(set(draws.values())) == len(draws)


def test_a_stage_appears_only_when_it_is_complete(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        with run.stage("clone", {"seed": 0}) as folder:
            (folder / "half.txt").write_text("x")
            1 / 0
    assert not run.done("clone", {"seed": 0})
    with run.stage("clone", {"seed": 0}) as folder:
        assert (folder / "half.txt").exists(), "work done before the failure is kept"
        (folder / "resume.safetensors").write_text("x")
    assert run.done("clone", {"seed": 0}) and not (run.path("clone") / "resume.safetensors").exists()
    assert run.seconds()["clone"] >= 0


def test_a_stage_made_with_other_settings_is_refused(tmp_path):
    run = Run(tmp_path)
    with run.stage("clone", {"clone": {"lr": 0.1}}):
        pass
    with pytest.raises(UserError, match="clone.lr 0.1, this command says 0.2"):
        run.done("clone", {"clone": {"lr": 0.2}})


def test_a_command_that_is_refused_before_it_did_anything_leaves_no_stage_behind(tmp_path):
    run = Run(tmp_path)
    for files in ([], ["episode.npz"]):
        with pytest.raises(UserError, match="no such folder"), run.stage("demonstrate", {"demos": "typo"}) as folder:
            for name in files:
                (folder / name).write_text("work")
            raise UserError("no such folder")
        assert (tmp_path / "demonstrate.tmp").exists() == bool(files)
    with pytest.raises(UserError, match="demos typo"):  # begun with other settings: refused before anything is written
        run.done("demonstrate", {"demos": "right"})


def test_a_stage_is_not_made_anew_below_one_that_was_begun(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ZeroDivisionError), run.stage("explore", {}) as folder:
        (folder / "episode.npz").write_text("of the old clone")
        1 / 0
    with pytest.raises(UserError, match="explore.tmp was begun with another clone.*delete it"):
        with run.stage("clone", {}, ("explore", "simulate")):
            pass
    assert not run.path("clone").exists()


def test_a_finished_stage_that_is_out_of_date_is_named(tmp_path, capsys):
    run = Run(tmp_path)
    for name, later in (("evaluate", ()), ("imagine", ("evaluate",))):
        with run.stage(name, {}, later):
            assert ("evaluate was made with another imagine" in capsys.readouterr().out) == bool(later)


def test_the_seconds_are_those_of_the_stage_that_is_there(tmp_path, monkeypatch):
    run, clock = Run(tmp_path), [0.0]
    monkeypatch.setattr("runs.time.time", lambda: clock[0])
    for ends, want in ((False, 1), (True, 2), (True, 1)):  # stopped, gone on, made anew
        try:
            with run.stage("clone", {}) as folder:
                (folder / "half.txt").write_text("x")
                clock[0] += 1
                1 / ends
        except ZeroDivisionError:
            pass
        assert run.seconds() == {"clone": want}


def test_files_where_folders_should_be_are_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another --output_dir"):
            Run(path)
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "file" / "config.json")


def test_a_second_process_cannot_use_the_same_run_folder(tmp_path):
    code = ("import sys; from runs import Run, clear_errors\n"
            "with clear_errors(): Run(sys.argv[1])")
    run = Run(tmp_path)
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert other.returncode == 2 and "in use by another process" in other.stderr and "Traceback" not in other.stderr
    del run
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_weights_come_back_bit_equal_and_bad_files_are_one_clear_line(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_model(tmp_path, model, {"width": 3})
    assert torch.equal(load_weights(tmp_path, other).weight, model.weight)
    assert read_json(tmp_path / "config.json") == {"width": 3}
    with pytest.raises(UserError, match="does not fit"):
        load_weights(tmp_path, nn.Linear(4, 2))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_weights(tmp_path, other)
    (tmp_path / "config.json").write_text('{"width": ')
    with pytest.raises(UserError, match="truncated"):
        read_json(tmp_path / "config.json")


def test_what_breaks_off_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file") as unfinished:
        unfinished.write_text("ne")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_full_disk_is_one_clear_line():
    for error in ("OSError(errno.ENOSPC, 'No space left on device', 'runs/x')", "SafetensorError('I/O error: no space')"):
        code = f"import errno; from runs import SafetensorError, clear_errors\nwith clear_errors(): raise {error}"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert process.returncode == 2 and process.stderr.count("\n") == 1 and "free space" in process.stderr, error


def test_the_log_is_json_lines(tmp_path):
    run, line = Run(tmp_path), {"part": "drift", "step": 3, "loss": 0.5}
    with run.stage("simulate", {}) as folder:
        (folder / "log.jsonl").write_text(json.dumps({"part": "simulate", "step": 2}) + '\n{"part": "si')  # killed
        run.log("drift", 3, {"loss": torch.tensor(0.5)})
        assert [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()][1:] == [line]
    assert read_log(tmp_path) == {("simulate", 2): {"part": "simulate", "step": 2}, ("drift", 3): line}
    with (tmp_path / "simulate" / "log.jsonl").open("a") as file:
        file.write('{"part": "drift", "step": 3, "loss": 99}\n')  # a resumed run comes to a step again
    assert read_log(tmp_path)["drift", 3]["loss"] == 99
    shutil.rmtree(tmp_path / "simulate")  # as a user does before the stage is made again
    assert not read_log(tmp_path)
    write_json(tmp_path / "deep" / "x.json", [1])
    assert read_json(tmp_path / "deep" / "x.json") == [1]


MODELS = {"policy": lambda: Policy(POLICY, NORMALIZER), "world model": lambda: WorldModel(WORLD, CAMERAS, NORMALIZER),
          "reflector": lambda: Reflector(REFLECTOR)}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_another_version_is_one_clear_line(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    for key, other in ("views", "eyes"), ("normalizer", "scales"), ("cameras", "eyes"):
        if f'"{key}"' in saved:
            (tmp_path / "config.json").write_text(saved.replace(f'"{key}"', f'"{other}"'))
            with pytest.raises(UserError, match=f"holds no {kind} of this version .*: train it again"):
                type(model).from_pretrained(tmp_path)


def test_a_mistake_in_a_models_own_code_is_not_called_another_version(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(KeyError, match="mistake"):
        load_pretrained(tmp_path, "policy", lambda: {}["mistake"], lambda saved: [])


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_ours_is_read_from_the_hub_by_its_name(kind, tmp_path, monkeypatch):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "cache")
    monkeypatch.setattr(runs, "snapshot_download", lambda name: {"me/mine": str(tmp_path / "cache")}[name])
    for name in ("me/mine", str(tmp_path / "cache"), tmp_path / "cache"):
        loaded = type(model).from_pretrained(name).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_a_model_that_is_nowhere_is_one_clear_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(runs, "snapshot_download", offline)
    with pytest.raises(UserError, match="cannot be had from the hub .ConnectionError.: check the name and the network"):
        runs.find_model("me/mine")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        runs.find_model("runs/mine/clone")
    assert runs.find_model(Path("runs/mine")) == Path("runs/mine"), "a stage that is missing is not looked for on the hub"


def test_processes_do_not_import_the_script_that_starts_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join((
        "print('imported')", "import os, sys", f"sys.path.insert(0, {str(Path(runs.__file__).parent)!r})",
        "from distributed import in_processes", "if __name__ == '__main__':", "    in_processes(os.getenv, [('HOME',)], 1, 'ask', 'name')",
        "    print(os.path.basename(__file__))")))
    process = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert process.stdout.split() == ["imported", "script.py"], process.stderr


def test_the_first_process_that_fails_is_heard_at_once(tmp_path):
    """Not after all that wait in the queue."""
    slow = [(["sh", "-c", f"sleep 0.2; touch {tmp_path / str(number)}"],) for number in range(20)]
    with pytest.raises(subprocess.CalledProcessError):
        distributed.in_processes(subprocess.check_call, [(["false"],), *slow], 1, "call", "call")
    assert len(list(tmp_path.iterdir())) < 5
