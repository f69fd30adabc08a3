"""A tokenizer small enough to be trained while a test starts, with the chat templates that matter.

Byte-level BPE over a few sentences: 400 ids at most, any text can be encoded, and newlines merge, so that
tokens do cross the places where turns meet. Ids are the same whatever the template.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Template = Literal["chatml", "llama2", "generation", "thinking"]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = [
    "The sea is wide and the sky is blue. What is the capital of France? The capital of France is Paris.",
    "user assistant system\nHello, how are you today?\n\nI am well, thank you. And you?\n\n",
    "1 + 1 = 2, 2 + 3 = 5.\n\n\nAdd the numbers: 12, 7 and 30.\n\tdef add(a, b):\n\t\treturn a + b\n",
    "### Instruction:\n\n### Input:\n\n### Response:\n [INST] question [/INST] answer <<SYS>>\n<</SYS>>\n\n",
]

# As SmolLM2's: a conversation without a system turn is given one.
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As Llama 2's: no role tokens, the system turn inside the first user turn, </s> only after an answer.
LLAMA2 = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if m['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' </s>' }}{% endif %}"
    "{% endfor %}"
)

# ChatML that marks what the assistant wrote; the newline after a turn is outside the mark.
GENERATION = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As Qwen3's: the answer after the last question opens with a thought, earlier answers do not, so that the
# first turns of a conversation are rendered otherwise alone than followed by more turns.
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "generation": GENERATION, "thinking": THINKING}


@cache
def _trained() -> str:
    """The tokenizer as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: Template | None = "chatml") -> PreTrainedTokenizerFast:
    """A fresh tokenizer of at most 400 ids: pad 0, `<|im_start|>` 1, `<|im_end|>` 2, `<s>` 3, `</s>` 4.

    End of sequence is `</s>` for "llama2", `<|endoftext|>` (0, also padding) without a template, else
    `<|im_end|>`.
    """
    eos = {"llama2": "</s>", None: "<|endoftext|>"}.get(template, "<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token=eos,
        pad_token="<|endoftext|>",
        bos_token="<s>" if template == "llama2" else None,
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def tiny_model(folder: Path, template: Template | None = "chatml", seed: int = 0) -> Path:
    """Writes a Llama of some 40,000 random weights, with the tiny tokenizer, as a Hugging Face folder."""
    import jax

    from ntjax.hf.folder import save_params
    from ntjax.hf.tokenizer import save_generation_config, save_tokenizer
    from ntjax.models import build
    from ntjax.params import initial

    tokenizer = tiny_tokenizer(template)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = build(hf)
    params = initial(model.specs, jax.random.key(seed))
    folder.mkdir(parents=True, exist_ok=True)
    save_params(folder, params, model.specs, dtype="float32", config=model.hf)
    save_tokenizer(tokenizer, folder)
    save_generation_config(folder, None, tokenizer)
    return folder


if __name__ == "__main__":  # python -m tests.tiny FOLDER
    import sys

    tiny_model(Path(sys.argv[1]))
