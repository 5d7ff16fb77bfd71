"""What an OpenVLA-OFT policy needs of a card: bytes of weights, gradients, Adam and activations, without any weights.

Everything is counted from shapes on torch's meta device: the real `openvla.OpenVLAPolicy`, its real forward pass, and what
autograd would keep of it. Not counted: CUDA itself (about 1 GB), the allocator's fragments, the world simulator and the
reflector (under 1 GB at 64 pixels). OFT's authors report 16 GB for inference, 25 GB for LoRA at batch 1, 62 GB at batch 8.

Shapes: B samples in a forward pass, V views, L action-chunk length, A action dimensions, D width, N tokens.

Try it:  python openvla_memory.py --batch 1 8
"""
from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import torch
import tyro

from encoders import check_memory, size_of
from episodes import Normalizer
from openvla import FULL_SIZE, OpenVLAPolicy
from policy import PolicyConfig
from ppo import add_lora
from runs import clear_errors

USES = {"inference": "inference", "evaluate": "evaluation, which holds two policies", "scale": "training the scale head",
        "lora": "RL or fine-tuning by LoRA", "checkpointed": "the same, gradient checkpointing"}
TOKENS = 604  # of a sample: two views, state, a prompt, the slots


@dataclass
class Arguments:
    """Print what an OpenVLA-OFT policy of full size needs."""
    batch: tuple[int, ...] = (1, 4, 8)  # samples in a forward pass: --clone.batch_size, --ppo.microbatch
    rank: int = 32  # of LoRA
    cards: tuple[int, ...] = (24, 48, 80, 141)  # GB


def memory(sizes, batch, rank, dtype="bfloat16") -> dict[str, int]:
    """{one of USES: bytes} at `batch` samples in a forward pass, for a checkpoint's config.json `sizes`."""
    with torch.device("meta"):
        policy = OpenVLAPolicy(PolicyConfig(dtype=dtype), sizes, Normalizer([-1.0] * 7, [1.0] * 7, [-1.0] * 8, [1.0] * 8))
    D, wide = policy.backbone.config.hidden_size, policy.backbone.config.intermediate_size
    passing = batch * TOKENS * (4 * wide + 8 * D) * policy.dtype.itemsize  # one layer at a time, nothing is kept
    counted = {"inference": size_of(policy) + passing, "evaluate": 2 * size_of(policy) + passing,
               "scale": trained_size(policy) + passing}
    add_lora(policy, rank)
    kept, layers = activations(policy, batch), policy.backbone.config.num_hidden_layers
    recomputed = kept / layers + layers * batch * TOKENS * D * policy.dtype.itemsize  # one layer, and the inputs of all
    return counted | {"lora": trained_size(policy) + kept, "checkpointed": trained_size(policy) + recomputed}


def trained_size(policy) -> int:
    """Bytes of its parameters, of their gradients and of two moments of Adam."""
    return size_of(policy) + 3 * sum(4 * p.numel() for p in policy.parameters() if p.requires_grad)


def activations(policy, batch) -> int:
    """Bytes that a forward pass of a policy on the meta device keeps for the backward pass."""
    weights, kept, D = {p.untyped_storage()._cdata for p in policy.parameters()}, {}, policy.backbone.config.hidden_size
    policy.embedded = lambda words, slots: (torch.zeros(batch, 31 + slots, D, dtype=policy.dtype, device="meta"),
                                            torch.full((batch, 1), 30 + slots))  # prompts have about 30 tokens

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    images, state = torch.zeros(batch, 2, 3, 64, 64, device="meta"), torch.zeros(batch, 8, device="meta")
    # A fused attention kernel keeps four tensors as large as q, and so does this product.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            patch("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, **_: q * k * v):
        policy.features(images, state, [""] * batch)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def check_training(policy, batch, rank, device, flag, held=False):
    """UserError where training with `batch` samples in a forward pass (`flag` sets it) does not fit `device`.

    held: beside a copy of what is trained (`ppo.reference_of`). Of an image-text model of any build, activations are not
    counted: it is refused where nothing could help.
    """
    rank, needed, remedy = policy.config.lora_rank or rank, trained_size(policy), "take a smaller model or a larger card"
    if isinstance(policy, OpenVLAPolicy):
        checkpointed = policy.config.gradient_checkpointing
        use = ("checkpointed" if checkpointed else "lora") if rank else "scale"
        needed = memory(policy.sizes, batch, rank or 1, policy.config.dtype)[use]
        remedy = (f"lower {flag}, {'' if checkpointed else 'add --policy.gradient_checkpointing, '}or take a larger card "
                  "(python openvla_memory.py)")
    needed += sum(4 * p.numel() for p in policy.parameters() if p.requires_grad) if held else 0
    there = size_of(policy) if policy.device.type == device.type else 0
    check_memory(needed - there, device, f"to train with {batch} samples at once", remedy)


def main(arguments: Arguments):
    print(f"{'':38} batch       GB  fits a card of")
    for batch in arguments.batch:
        for use, needed in memory(FULL_SIZE, batch, arguments.rank).items():
            cards = [f"{card} GB" for card in arguments.cards if needed / 1e9 < 0.95 * card - 1]  # CUDA itself, fragments
            print(f"{USES[use]:38} {batch:5} {needed / 1e9:8.1f}  {', '.join(cards) or 'none of them'}")
    print("Weights, gradients, Adam and what the forward pass keeps; the world simulator and the reflector come on top.")


if __name__ == "__main__":
    with clear_errors():
        main(tyro.cli(Arguments, use_underscores=True))
