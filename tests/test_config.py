"""Promises of config.py: presets whose parts fit together, flags on top of them, and sizes that must be one."""
import pytest
import torch

import config
from policy import Policy
from reflector import Reflector
from runs import UserError
from test_world_model import toy_batch
from tiny_models import CAMERAS, NORMALIZER
from world_model import WorldModel, world_model_loss


def test_a_flag_beside_a_preset_wins():
    assert config.parse(["--preset", "tiny", "--clone.steps", "7"]).clone.steps == 7
    assert config.parse(["--clone.steps", "7", "--preset=tiny"]).num_demos == config.tiny().num_demos != 5
    assert config.parse([]) == config.TrainConfig(output_dir="runs/libero_object")
    assert config.parse(["--preset", "tiny"]).output_dir == "runs/libero_object_tiny", "tiny is tried in a folder of its own"


@pytest.mark.parametrize("flag", ["--policy.image_size=128", "--world_model.chunk_size=4"])
def test_sizes_that_differ_are_one_clear_line(flag):
    with pytest.raises(UserError, match=flag.replace("=", " ") + ".*same value"):
        config.parse([flag])


@pytest.mark.parametrize("flags", ["--explore.held_out=0", "--explore.held_out=17", "--evaluate.episodes=0",
                                   "--evaluate.episodes=51"])
def test_nothing_to_test_on_is_one_clear_line(flags):
    with pytest.raises(UserError, match="--explore.held_out.*above 0"):
        config.parse([flags])


@pytest.mark.parametrize("flag, least", [
    ("num_demos", 1), ("validate.episodes", 1), ("validate.every", 0), ("ppo.microbatch", 1), ("ppo.group_size", 2),
    ("virtual.horizon", 1), ("virtual.stop.confirm", 1),
    ("reflect.batch_size", 2), ("clone.batch_size", 1), ("clone.accumulate", 1), ("simulate.save_every", 1)])
def test_too_little_of_something_is_one_clear_line(flag, least):
    assert config.parse([f"--{flag}", str(least)])
    with pytest.raises(UserError, match=f"--{flag} must be {least} or more"):
        config.parse([f"--{flag}", str(least - 1)])


@pytest.mark.parametrize("flags, words", [(["--seed", "-1"], "0 to 198"), (["--seed", "199"], "0 to 198"),
                                          (["--task_ids", "3", "0", "3"], "twice"),
                                          (["--drift.batch_size", "15"], "even"), (["--explore.stride", "3"], "divide a chunk"),
                                          (["--policy.views", "1"], "must be 2"),
                                          (["--policy.action_dim", "6"], "--policy.action_dim 7")])
def test_seeds_tasks_and_sizes_that_would_fail_later_are_one_clear_line(flags, words):
    with pytest.raises(UserError, match=words):
        config.parse(flags)


def test_the_highest_seed_explores_nothing_that_validation_or_tests_play():
    from evaluate import TEST_SEED
    from train import VALIDATE_SEED
    assert 100_000 * (config.parse(["--seed", "198"]).seed + 1) + 100_000 <= min(VALIDATE_SEED, TEST_SEED)


def test_a_stage_is_made_anew_where_what_it_was_measured_with_changes():
    plain, other = config.parse([]), config.parse(["--virtual.stop.eta", "0.7"])
    changed = {name for name in config.STAGES if config.stage_settings(plain, name) != config.stage_settings(other, name)}
    assert changed == {"reflect", "imagine"}, "held-out verdicts decide whether RL may start"


def test_a_task_has_a_thousand_placements_of_its_own_for_exploration():
    assert config.parse(["--explore.episodes", "968"]).explore.grasps == 32
    with pytest.raises(UserError, match="--explore.grasps.*lower"):
        config.parse(["--explore.episodes", "969"])


def test_the_medium_preset_goes_on_from_what_the_small_one_has_explored():
    small, medium = config.parse([]), config.parse(["--preset", "medium"])
    same = [config.stage_settings(small, name) == config.stage_settings(medium, name) for name in config.STAGES]
    assert same == [True, True, True, False, False, False, True]
    assert WorldModel(medium.world_model, CAMERAS, NORMALIZER)


def test_the_large_preset_paints_and_reads_pictures_of_256_pixels():
    large = config.parse(["--preset", "large", "--policy.chunk_size", "4", "--world_model.chunk_size", "4"])
    batch, world = toy_batch(1, size=256), WorldModel(large.world_model, CAMERAS, NORMALIZER)
    loss, _ = world_model_loss(world, batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(parameter.grad is not None for parameter in world.unet.parameters())
    assert Reflector(large.reflector)(batch["memory"][:, :3], ["pick up the milk"], torch.zeros(1, 3, 8)).shape == (1, 3)
    obs = {"images": batch["memory"][:, -1], "state": batch["memory_states"][:, -1], "instruction": ["pick up the milk"]}
    assert Policy(large.policy, NORMALIZER)(obs).loc.shape == (1, 4, 7)
