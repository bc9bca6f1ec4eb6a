"""Small language models with random weights, of the classes of the real ones."""

import torch
import transformers

from vaelab.embedded import train_language


def tokenizer(template=True):
    """The world's tokenizer, with LLaVA's chat template or without one."""
    made = train_language.new_tokenizer()
    if not template:
        made.chat_template = None
    return made


def llama(vocabulary, **changes):
    """Llama."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**size, "num_key_value_heads": 2, "vocab_size": vocabulary, **changes})
    )


def mpt(vocabulary):
    """MPT, whose attention has no positions but ALiBi."""
    return transformers.MptForCausalLM(
        transformers.MptConfig(
            d_model=16, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=128, vocab_size=vocabulary
        )
    )


ARCHITECTURES = {"llama": llama, "mpt": mpt}


def save(architecture, folder, template=True):
    """Save a model with its tokenizer and say where."""
    words = tokenizer(template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ARCHITECTURES[architecture](len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
