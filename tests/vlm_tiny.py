"""Tiny random image-text models of the classes of real ones, in the files of real ones."""
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = "<pad> <unk> <image> <row> <end> <one> the first previous current view is task done: pick up milk soup".split()


def tiny_vlm(folder, kind):
    """A random LLaVA, or the Idefics3 of which SmolVLM is one, saved to disk with its processor."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>",
                                                 additional_special_tokens=["<image>"])
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = transformers.LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, **sizes).to_dict()
    torch.manual_seed(0)
    if kind == "llava":
        pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = transformers.LlavaProcessor(pictures, words, patch_size=8, num_additional_image_tokens=1,
                                                vision_feature_select_strategy="default")
        vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **sizes).to_dict()
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=2))
    else:
        pictures = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 16}, do_image_splitting=False,
                                                          max_image_size={"longest_edge": 16})
        words.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<global-img>"]})
        processor = transformers.Idefics3Processor(pictures, words, image_seq_len=1, chat_template=(
            "{% for part in messages[0].content %}{% if part.type == 'image' %}<image>{% else %} {{ part.text }}"
            "{% endif %}{% endfor %} <end>"))
        vision = dict(image_size=16, patch_size=8, **sizes)
        model = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(
            vision_config=vision, text_config=text | {"vocab_size": len(words)}, image_token_id=2, scale_factor=2))
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return str(folder)
