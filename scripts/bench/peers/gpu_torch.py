"""transformers' models in torch as contestants on one GPU, their weights random; TRL's trainers where it is installed.

Full fine-tuning is bf16's autocast around fp32 weights. Attention is flash-attn's where that is installed, else torch's
`scaled_dot_product_attention`, which takes a flash kernel by itself.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from harness import Absent, timed

Json = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = "flash_attention_2" if find_spec("flash_attn") and DEVICE == "cuda" else "sdpa"


def sft(
    hf: Json,
    rows: int,
    length: int,
    steps: int,
    *,
    lora: bool = False,
    four: bool = False,
    remat: bool = False,
    compiled: bool = False,
) -> Json:
    """A step on random tokens, all learned."""
    model = adapted(hf, four=four) if lora else built(hf, torch.float32)
    if remat:
        model.gradient_checkpointing_enable()
    call, update = compiling(model) if compiled else model, updating(model)
    tokens = drawn(hf, (rows, length))

    def step() -> float:
        with autocast():
            loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        update()
        return loss.item()

    return peak(timed(step, steps, rows * length))


def dpo(hf: Json, rows: int, length: int, steps: int, *, compiled: bool = False) -> Json:
    """Pairs of which the second half is learned; the reference, held in bf16, scores them in each step."""
    model, before = built(hf, torch.float32), built(hf, torch.bfloat16).requires_grad_(False)
    calls = [compiling(one) if compiled else one for one in (model, before)]
    tokens, update = drawn(hf, (2 * rows, length)), updating(model)

    def sums(call: Any) -> torch.Tensor:
        logits = call(input_ids=tokens, use_cache=False, logits_to_keep=length - length // 2 + 1).logits
        return logps(logits[:, :-1], tokens[:, length // 2 :]).sum(1).view(rows, 2)

    def step() -> float:
        with autocast():
            with torch.no_grad():
                reference = sums(calls[1])
            ratios = sums(calls[0]) - reference
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
        loss.backward()
        update()
        return loss.item()

    return peak(timed(step, steps, 2 * rows * length))


def grpo(hf: Json, prompts: int, group: int, asked: int, new: int, micro: int, steps: int) -> Json:
    """`generate` draws all completions at once, which are trained on `micro` at a time."""
    model = built(hf, torch.float32)
    update, given = updating(model), drawn(hf, (prompts, asked)).repeat_interleave(group, 0)
    advantages = torch.linspace(-1, 1, group, device=DEVICE).repeat(prompts)
    options: Json = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new}

    def step() -> float:
        with torch.no_grad(), autocast():
            ids = model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **options)
        total = 0.0
        for part, weight in zip(ids.split(micro), advantages.split(micro), strict=True):
            with autocast():
                logits = model(input_ids=part, use_cache=False, logits_to_keep=new + 1).logits
                found = logps(logits[:, :-1], part[:, asked:])
            # The ratio to the policy that drew is 1, and its gradient that of the log-probs.
            loss = -(torch.exp(found - found.detach()) * weight[:, None]).sum() / (len(ids) * new)
            loss.backward()
            total += loss.item()
        update()
        return total

    return peak(timed(step, steps, len(given) * new))


def compiling(model: Any) -> Any:
    """torch.compile, which compiles C++ on the way."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Absent("torch.compile finds no C++ compiler")
    return torch.compile(model)


def built(hf: Json, dtype: torch.dtype) -> Any:
    """A model of random weights on the device."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**hf)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION
        ).train()


def adapted(hf: Json, *, four: bool) -> Any:
    """With PEFT's adapters, on weights in bf16 or in bitsandbytes' 4 bits."""
    if missing := [name for name in ("peft", *["bitsandbytes"] * four) if not find_spec(name)]:
        raise Absent(f"{' and '.join(missing)} not installed")
    import peft
    from peers.gpu_ntjax import RANK

    model = built(hf, torch.bfloat16)
    if four:
        _quantise(model)
    return peft.get_peft_model(model, peft.LoraConfig(**RANK, task_type="CAUSAL_LM"))


def _quantise(model: Any) -> None:
    """Every linear map inside the layers in NF4, as transformers' integration leaves them."""
    import bitsandbytes

    for name, linear in [*model.model.layers.named_modules()]:
        if not isinstance(linear, torch.nn.Linear):
            continue
        outer, _, own = name.rpartition(".")
        sizes = linear.in_features, linear.out_features
        four = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = linear.weight.detach()
        four.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
        setattr(model.model.layers.get_submodule(outer), own, four)
    model.is_loaded_in_4bit = True  # by which PEFT knows


def updating(model: Any) -> Any:
    """Clips, updates and clears: the end of a step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B, T] of logits [B, T, V], a row at a time: never a second whole array in fp32."""
    rows = zip(logits, targets, strict=True)
    return torch.stack([-torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in rows])


def autocast() -> Any:
    return torch.autocast(DEVICE, torch.bfloat16)


def drawn(hf: Json, shape: tuple[int, ...]) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(10, hf["vocab_size"], shape, device=DEVICE)


def peak(found: Json) -> Json:
    """With the device's peak of memory."""
    if DEVICE == "cpu":
        return found
    return {**found, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
