"""The run folder: locks, stages, checkpoints, the log, and the one training loop that every stage shares.

A stage's product is written to `<stage>.tmp/` and renamed to `<stage>/` when it is complete, so a killed run goes on
where it was with the same command. Weights and optimiser state are safetensors, everything else is JSON: nothing is
ever unpickled. Of several processes, rank 0 alone writes, episodes apart. All randomness of a training step comes from
one generator seeded by (seed, step), dropout's too, so a checkpoint needs no random state and a resumed run equals a
straight one.
"""
from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import distributed
from muon import Muon


class UserError(Exception):
    """Something the user can mend. The message is one line that says what to do; the program exits with code 2."""


@contextmanager
def clear_errors():
    """Turn what a user can mend into one line on stderr and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(_say(error))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; the same command goes on from what is kept", code=130))
    except torch.OutOfMemoryError as error:
        sys.exit(_say(f"{str(error).split('. ')[0]}: raise --clone.accumulate (or another stage's) or lower "
                      "--ppo.microbatch and --ppo.groups, then run the same command"))
    except (OSError, SafetensorError) as error:  # safetensors tells no number: of what it writes, the disk is full
        if getattr(error, "errno", errno.ENOSPC) not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(_say(f"{error}: free space or choose an --output_dir that you may write to, then run the same command"))
    except RuntimeError:
        if distributed.first_to_fail():
            raise
        sys.exit(2)  # torn down by another process, which has said why


def _say(message, code=2) -> int:
    if distributed.first_to_fail():
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def whole_file(path):
    """Yield a temporary path, renamed to `path` at the end: a reader sees the old file or the new one, never half of it."""
    temporary = Path(path).with_name(Path(path).name + ".writing")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    if distributed.rank():
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(json.dumps(value, indent=2))


def read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: is the path right, and was that run or stage finished?") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not readable JSON (truncated?): delete its folder and run the same command") from None


def _write_tensors(path, tensors):
    if distributed.rank():
        return
    with whole_file(path) as file:
        save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, file)


def _read_tensors(path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is the path right, and was that run or stage finished?") from None
    except SafetensorError:
        raise UserError(f"{path} is not a whole safetensors file (truncated?): delete its folder and run the same "
                        "command") from None


def learned(module) -> dict[str, torch.Tensor]:
    """The state dict without parameters that are frozen: whoever made the module can make those again."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {key: value for key, value in module.state_dict().items() if key not in frozen}


def save_model(folder, module, config: dict, whole=True):
    """Write `model.safetensors` (whole=False: without frozen parameters) and `config.json` into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_tensors(Path(folder) / "model.safetensors", module.state_dict() if whole else learned(module))
    write_json(Path(folder) / "config.json", config)


def find_model(name: str | Path, flag="", **patterns) -> Path:
    """A folder as it is; the text "owner/name", where there is no such folder, from the Hugging Face hub (once).

    flag: of the command line, for the error. patterns: of the files, as `snapshot_download` takes them.
    """
    folder = Path(name)
    if folder.is_dir() or not isinstance(name, str):
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{flag}{name} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(name, **patterns))
    except Exception as error:  # the hub's client raises what its HTTP library raises
        raise UserError(f"{flag}{name} is no folder here and cannot be had from the hub ({type(error).__name__}): check "
                        "the name and the network, or give a folder") from None


def load_pretrained(name, what, make, arguments, whole=True):
    """`make(*arguments(its config.json))` with the weights of a folder or hub id; what: "policy", ..., for the error."""
    folder = find_model(name)
    saved = read_json(folder / "config.json")
    try:
        values = arguments(saved)
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no {what} of this version ({error}): train it again") from error
    return load_weights(folder, make(*values), whole)


def load_weights(folder, module, whole=True):
    """Load `folder/model.safetensors` into `module`; keys and shapes must match those that `save_model` wrote."""
    path = Path(folder) / "model.safetensors"
    try:
        _fill(module, _read_tensors(path), whole)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not fit its config.json: {detail}") from None
    return module


def _fill(module, weights, whole):
    """load_state_dict; RuntimeError where a key is missing (whole=False: one of `learned`) or unknown."""
    missing, unknown = module.load_state_dict(weights, strict=whole)
    wrong = unknown + [key for key in missing if key in learned(module)]
    if wrong:
        raise RuntimeError(f"keys differ\n{wrong[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# The run folder
# ---------------------------------------------------------------------------------------------------------------------
class Run:
    """A folder with one sub-folder a stage, a log of JSON lines, and a lock that lets in one process at a time."""

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.folder} is or lies under a file: choose another --output_dir") from None
        self._stage = self.folder  # the unfinished stage's folder
        self._lock = open(self.folder / ".lock", "w")
        try:
            if distributed.rank() == 0:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder} is in use by another process: wait for it, or choose another "
                            "--output_dir") from None

    def path(self, stage) -> Path:
        return self.folder / stage

    def done(self, stage, settings) -> bool:
        """Is the stage finished? UserError if it was made, or begun, with other settings than today's."""
        check_settings(self.path(stage), settings)
        check_settings(self.folder / f"{stage}.tmp", settings)
        return self.path(stage).is_dir()

    def seconds(self) -> dict[str, float]:
        """Wall time of every stage, all its attempts added up that ended by themselves or by Ctrl-C."""
        path = self.folder / "seconds.json"
        return read_json(path) if path.exists() else {}

    @contextmanager
    def stage(self, name, settings, later=()):
        """Yield the stage's unfinished folder; rename it to its final name when the body ends without an error.

        later: stages that must not have been begun, since that was with what this one made before; finished ones are named.
        """
        for begun in filter(Path.is_dir, (self.folder / f"{stage}.tmp" for stage in later)):
            raise UserError(f"{begun} was begun with another {name} than this command makes: delete it")
        for stale in filter(Path.is_dir, (self.folder / stage for stage in later)):
            print(f"{stale} was made with another {name} than this command makes: delete it to have it made anew")
        unfinished, start = self.folder / f"{name}.tmp", time.time()
        before = self.seconds().get(name, 0.0) if unfinished.is_dir() else 0.0
        self._stage = unfinished
        check_settings(unfinished, settings, keep=True)
        unfinished.mkdir(exist_ok=True)
        distributed.barrier()
        try:
            yield unfinished
        except UserError:
            if distributed.rank() == 0 and [path.name for path in unfinished.iterdir()] == ["settings.json"]:
                shutil.rmtree(unfinished)  # nothing was done with what the user will now mend
            raise
        finally:
            write_json(self.folder / "seconds.json", self.seconds() | {name: round(before + time.time() - start, 1)})
        distributed.barrier()
        if distributed.rank() == 0:
            self._finish(name, unfinished)
        distributed.barrier()

    def _finish(self, name, unfinished):
        for leftover in [*unfinished.rglob("*.writing"), *unfinished.rglob("resume.*")]:
            leftover.unlink()
        shutil.rmtree(self.path(name), ignore_errors=True)
        os.replace(unfinished, self.path(name))

    def log(self, part, step, metrics):
        """Append one JSON line to the running stage's `log.jsonl`; part: what of the stage it is about."""
        if distributed.rank():
            return
        line, path = {"part": part, "step": step}, self._stage / "log.jsonl"
        read_lines(path)  # what a kill has cut short is taken off
        with open(path, "a") as file:
            file.write(json.dumps(line | {key: round(float(value), 6) for key, value in metrics.items()}) + "\n")


def check_settings(folder, settings: dict, keep=False, remedy="choose another --output_dir, or delete that folder and "
                   "those of the later stages"):
    """UserError if `folder/settings.json` holds other settings; keep: then it holds these."""
    path = folder / "settings.json"
    made = flags(read_json(path)) if path.exists() else {}
    now = flags(json.loads(json.dumps(settings)))
    for key in sorted(made.keys() | now.keys() if made else ()):
        if made.get(key) != now.get(key):
            raise UserError(f"{folder} was made with --{key} {made.get(key)}, this command says {now.get(key)}: {remedy}")
    if keep:
        write_json(path, settings)


def read_lines(path) -> list[dict]:
    """The lines of a JSON lines file. A last one that a kill has cut short is taken off the file."""
    text = path.read_text() if path.exists() else ""
    if not text.endswith("\n") and text:
        text = text[:text.rfind("\n") + 1]
        with whole_file(path) as file:
            file.write_text(text)
    return [json.loads(line) for line in text.splitlines()]


def read_log(folder) -> dict[tuple[str, int], dict]:
    """{(part, step): what the stages of a run, finished or not, logged of it last}."""
    return {(line["part"], line["step"]): line for path in sorted(folder.glob("*/log.jsonl")) for line in read_lines(path)}


def flags(values, prefix="") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}: the names of the command line's flags."""
    return {key: value for name, inner in values.items() for key, value in
            (flags(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
AUTOCAST = ["cuda"]  # device types on which the world simulator's U-Net runs in bfloat16


def step_generator(seed, step, device="cpu") -> torch.Generator:
    """The source of all randomness of training step `step`."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % 2**63)


def save_resume(folder, step, model, optimizer):
    """Weights (but for frozen ones), optimiser state and step, in one safetensors file."""
    tensors = {f"model.{key}": value for key, value in learned(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    Path(folder).mkdir(exist_ok=True)
    _write_tensors(Path(folder) / "resume.safetensors", tensors | {"step": torch.tensor(step)})


def load_resume(folder, model, optimizer) -> int:
    """Restore what `save_resume` wrote and return its step; 0 where there is nothing to resume."""
    path = Path(folder) / "resume.safetensors"
    if not path.exists():
        return 0
    tensors = _read_tensors(path)
    step, optimizer_state = int(tensors.pop("step")), {}
    for key in [key for key in tensors if key.startswith("optimizer.")]:
        _, index, name = key.split(".")
        optimizer_state.setdefault(int(index), {})[name] = tensors.pop(key)
    try:
        _fill(model, {key.removeprefix("model."): value for key, value in tensors.items()}, whole=False)
    except RuntimeError:
        raise UserError(f"{path} is of another configuration: delete {folder} and run the same command") from None
    optimizer.load_state_dict(optimizer.state_dict() | {"state": optimizer_state})
    return step


def autocast(device):
    """Bfloat16 where `AUTOCAST` says so. For networks alone: camera geometry in it would be off by a pixel."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in AUTOCAST)


def set_autocast(bf16):
    """From now on as a run's `--bf16` says: auto, on or off."""
    AUTOCAST[:] = {"auto": ["cuda"], "on": ["cuda", "cpu"], "off": []}[bf16]


def parts(batch, accumulate) -> list[tuple[slice, float]]:
    """This process's rows of a batch in `accumulate` slices, and what the mean over each weighs in the mean over all.

    A batch is a dictionary of values with B rows; where it has "valid", means are over what is valid.
    """
    B, count = len(next(iter(batch.values()))), accumulate * distributed.world_size()
    if B < count:
        raise UserError(f"a batch of {B} cannot be cut into {count} parts: raise its --*.batch_size or lower --*.accumulate")
    slices = [slice(B * part // count, B * (part + 1) // count) for part in range(count)]
    valid = batch["valid"] if "valid" in batch else torch.ones(B)
    return [(rows, float(valid[rows].sum() / valid.sum().clamp(min=1))) for rows in distributed.shard(slices)]


@dataclass
class FitConfig:
    """Supervised training of one component: Muon or AdamW, linear warm-up, cosine decay."""
    steps: int = 1000  # optimiser steps
    batch_size: int = 32  # samples a step, of all processes together
    accumulate: int = 1  # parts that a process's share of them is cut into: gradients add up, so it is memory alone
    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear warm-up
    muon: bool = False  # orthogonal updates for matrices and kernels (muon.py); off: AdamW for all
    weight_decay: float = 0.01  # decoupled weight decay
    max_grad_norm: float = 1.0  # gradient norm above which gradients are scaled down
    save_every: int = 250  # steps between resume checkpoints and log lines


def fit(name, model, make_batch, loss_fn, config: FitConfig, folder, seed, device, log):
    """Minimise `loss_fn(model, batch, generator, rows) -> (loss, metrics)`; the loop behind clone, simulate and reflect.

    make_batch(step, generator): a training batch, B first; generator lives on the CPU and is a function of (seed, step).
    loss_fn draws from its generator for the whole batch and returns the mean over the samples `rows`, a slice.
    log(name, step, metrics): receives the metrics averaged since the last call, every `save_every` steps.
    Raises UserError at the first loss that is not finite.
    """
    optimizer = Muon(model, config.lr, config.weight_decay) if config.muon else torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first, sums = load_resume(folder, model, optimizer), {}
    model.train()
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, desc=name, unit="step", mininterval=1)
    for step in progress:
        warm = min(1.0, (step + 1) / max(1, config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        torch.manual_seed(step_generator(seed + 1 + distributed.rank(), step).initial_seed())  # of dropout, drawn row by row
        batch = make_batch(step, step_generator(seed, step))
        optimizer.zero_grad(set_to_none=True)
        for rows, weight in parts(batch, config.accumulate):
            loss, metrics = loss_fn(model, batch, step_generator(seed, step, device), rows)
            if not math.isfinite(loss.item()):
                raise UserError(f"the loss of '{name}' is {loss.item()} at step {step}: delete {folder} and start again "
                                "with a lower --*.lr")
            (loss * weight).backward()
            for key, value in metrics.items():
                total, count = sums.get(key, (0.0, 0.0))
                sums[key] = (total + weight * float(value), count + weight)
        distributed.sum_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            everyone = distributed.gather(sums)
            means = {key: sum(part[key][0] for part in everyone if key in part) /
                     sum(part[key][1] for part in everyone if key in part) for key in sums}
            log(name, step + 1, means)
            progress.set_postfix({key: f"{value:.4g}" for key, value in list(means.items())[:3]})
            sums = {}
            save_resume(folder, step + 1, model, optimizer)
    return model.eval()
