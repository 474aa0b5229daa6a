"""A small GPT-2 of Hugging Face transformers with random weights: `aicc run examples/gpt2.py`, `aicc dump-ir examples/gpt2.py`.

Nothing is downloaded: the weights come from a seed.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(vocab_size=1024, n_positions=128, n_embd=128, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
example_inputs = {"input_ids": torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))}
