"""What transformers itself answers: the independent reference for the tiny model."""

from __future__ import annotations

from functools import cache

from engines import TINY_DEEPSEEK

from dynamo_ray import models


def answers_of_transformers(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The tiny DeepSeek's greedy continuation of each prompt, in fp32 on this process's CPU."""
    return [list(answer) for answer in _answers(tuple(map(tuple, prompts)), num_tokens)]


@cache
def _answers(prompts: tuple[tuple[int, ...], ...], num_tokens: int) -> list[list[int]]:
    """Once for each set of prompts: more than one module asks for the same."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(models.prepare(TINY_DEEPSEEK), dtype=torch.float32)
    answers = []
    for ids in prompts:
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=-1,
            pad_token_id=0,
            do_sample=False,
        )
        answers.append(output[0][len(ids) :].tolist())
    assert len({token for tokens in answers for token in tokens}) > 50, "degenerate answers hide errors"
    return answers
