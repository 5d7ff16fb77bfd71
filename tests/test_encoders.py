"""Promises of encoders.py: tiny random models of the real classes, saved to disk and loaded as the real ones are."""
import pytest
import torch
import transformers

from encoders import GridEncoder, Injection, PretrainedEncoder
from runs import UserError
from test_world_model import CAMERAS, NORMALIZER, TINY, VirtualEnv, VirtualEnvConfig, make_actions, make_contexts, play
from world_model import WorldModel

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def tiny_encoder(folder, kind):
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, **SIZES)
    if kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
        processor = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    elif kind == "clip":
        text = dict(vocab_size=64, max_position_embeddings=8, **SIZES)
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        text = dict(vocab_size=64, max_position_embeddings=8, **SIZES)
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_tokens_are_those_of_the_model_behind_its_own_processor(kind, tmp_path):
    name = tiny_encoder(tmp_path, kind)
    encoder = PretrainedEncoder(name)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModel.from_pretrained(name).eval()
    model = getattr(model, "vision_model", model)
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    inputs = processor(images=list(images), do_rescale=False, do_resize=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    tokens = encoder(images * 2 - 1)
    assert tokens.shape[2] == 16 and torch.allclose(tokens, expected, atol=1e-4)
    assert not list(encoder.parameters()) and not encoder.state_dict()
    assert encoder(torch.rand(1, 3, 16, 16)).shape == (1, *tokens.shape[1:]), "other sizes are brought to the model's"


def test_a_model_that_is_none_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="world_model.encoders"):
        PretrainedEncoder(str(tmp_path))


def test_tokens_of_views_and_encoders_are_told_apart_and_keep_their_order(tmp_path):
    torch.manual_seed(0)
    injection = Injection(("ours", tiny_encoder(tmp_path, "dinov2")), 32)
    images = torch.rand(2, 2, 3, 32, 32)
    tokens = injection(images)
    assert tokens.shape == (2, 2 * 16 + 2 * 17, 32)  # 4x4 tokens of ours, 4x4 + 1 of DINOv2
    images[:, 1] = 0
    changed = (injection(images) != tokens).any(dim=2).all(dim=0)
    assert changed.tolist() == [False] * 16 + [True] * 16 + [False] * 17 + [True] * 17
    assert (injection(images[:, [0, 0]])[:, :16] != injection(images[:, [0, 0]])[:, 16:32]).any()


def test_the_token_grid_has_a_place_for_every_eight_pixels():
    assert GridEncoder(32)(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 32)


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_the_simulator_attends_to_them_and_is_saved_without_the_frozen_ones(kind, tmp_path):
    name = "ours" if kind == "ours" else tiny_encoder(tmp_path / "encoder", kind)
    torch.manual_seed(0)
    model = WorldModel(TINY.__class__(**{**vars(TINY), "encoders": (name,), "ray_maps": True}), CAMERAS, NORMALIZER).eval()
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1)
    model.save_pretrained(tmp_path / "world")
    again = WorldModel.from_pretrained(tmp_path / "world").eval()
    contexts, actions = make_contexts(2), make_actions(2, 2)
    one, two = (play(VirtualEnv(m, None, VirtualEnvConfig(), 2), contexts, actions) for m in (model, again))
    assert torch.equal(one, two) and not any("frozen" in key for key in model.state_dict())
    with torch.no_grad():
        model.injection.view += 3 * torch.randn_like(model.injection.view)
    assert not torch.equal(one, play(VirtualEnv(model, None, VirtualEnvConfig(), 2), contexts, actions))
