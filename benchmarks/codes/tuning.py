"""Fine-tunes a model on text of another domain."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hata_weights.rotation import SEED

LENGTH, BATCH = 1024, 8  # of a step
LOSSES = "losses.json"  # in the model's folder, when that is complete


def tune(
    model: str, tokens: Tensor, tests: dict[str, list[Tensor]], out: Path, steps: int, rate: float, device: str
) -> None:
    """Fine-tunes all weights on random pieces of ``tokens`` with AdamW; writes the model and its losses.

    Weights and moments are float32, products bfloat16 on a GPU. The rate rises over the first tenth of the steps, and
    falls to zero along a cosine. The losses are those of each test before and after.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    dtype = network.dtype
    network = network.to(device, torch.float32)
    low = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu")
    before = [loss_on(network, sequences, low) for sequences in tests.values()]
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    draw = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / (steps / 10)) * (1 + math.cos(math.pi * step / steps)) / 2
        starts = torch.randint(len(tokens) - LENGTH + 1, (BATCH,), generator=draw).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts]).to(device)
        with low:
            loss = network(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"tuning, step {step + 1} of {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    network.to(dtype)
    after = [loss_on(network, sequences, low) for sequences in tests.values()]
    network.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    losses = {name: [round(b, 4), round(a, 4)] for name, b, a in zip(tests, before, after, strict=True)}
    (out / LOSSES).write_text(json.dumps(losses))


def loss_on(network: Any, sequences: Sequence[Tensor], low: torch.autocast) -> float:
    """The mean next-token loss over pieces of a step's length."""
    network.eval()
    pieces = [piece.unsqueeze(0).to(network.device) for tokens in sequences for piece in tokens.split(LENGTH)]
    with torch.no_grad(), low:
        return fmean(float(network(input_ids=x, labels=x).loss) for x in pieces if x.shape[1] > 1)
