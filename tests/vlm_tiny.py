"""Tiny random models of the classes of real ones, in the files of real ones."""
import torch
import transformers
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "<pad> <unk> <image> <row> <end> <one> the first previous current view is task done: pick up milk soup".split()
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def tiny_vlm(folder, kind):
    """A random LLaVA, or the Idefics3 of which SmolVLM is one, saved to disk with its processor."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>",
                                                 additional_special_tokens=["<image>"])
    text = transformers.LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, **SIZES).to_dict()
    torch.manual_seed(0)
    if kind == "llava":
        pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = transformers.LlavaProcessor(pictures, words, patch_size=8, num_additional_image_tokens=1,
                                                vision_feature_select_strategy="default")
        vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **SIZES).to_dict()
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=2))
    else:
        pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 16}, do_image_splitting=False,
                                                          max_image_size={"longest_edge": 16})
        words.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<global-img>"]})
        processor = transformers.Idefics3Processor(pictures, words, image_seq_len=1, chat_template=(
            "{% for part in messages[0].content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}"
            "{% endif %}{% endfor %} <end>"))
        vision = dict(image_size=16, patch_size=8, **SIZES)
        model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(
            vision_config=vision, text_config=text | {"vocab_size": len(words)}, image_token_id=2, scale_factor=2))
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return str(folder)


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


def tiny_vae(folder):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
                        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1)
    vae.save_pretrained(folder)
    return str(folder)
