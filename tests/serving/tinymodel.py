"""A model folder as servers get them, small enough for tests: random weights, a byte-level tokenizer, a chat template.

The answers are noise, but greedy noise that one token can change: enough to see that nothing has touched a request.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools><tool_call></tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CORPUS = ["The capital of France is Paris, and the quick brown fox jumps over the lazy dog.", '{"name": "f", "n": [1, 2]}'] * 4
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
WORDS = 320
VOCAB = WORDS + len(SPECIAL)
END = VOCAB - 1


def save(folder: Path, max_len: int = 2048) -> Path:
    """Write the model; a step of it takes a millisecond."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    assert backend.get_vocab_size() == VOCAB
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=max_len, tie_word_embeddings=False,
        bos_token_id=WORDS, eos_token_id=END, pad_token_id=None)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(0.0, 1.2 / weight.shape[-1] ** 0.5)
        model.lm_head.weight.normal_(0.0, 2.0 / 48**0.5)
    model.save_pretrained(folder)
    return folder
