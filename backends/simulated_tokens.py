"""What the simulated engine says: each token a function of the weights, the adapter and every token before it."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from backends.engine import TokenLogprob
from backends.simulated_args import SimulatedArgs


def first_state(weights: str, lora: str | None) -> int:
    """Before any token; 0 for the weights that the engine was started with (`weights` is empty) and no adapter."""
    return zlib.crc32(f"{weights}\0{lora or ''}".encode()) if weights or lora else 0


def fold(tokens: Sequence[int], state: int) -> int:
    """A 32-bit fold over tokens; folding a then b equals folding a+b."""
    return zlib.crc32(array("I", tokens).tobytes(), state)


def next_token(state: int, seed: int | None, position: int, args: SimulatedArgs) -> int:
    mixed = state if seed is None else hash((state, seed, position))
    return args.token_low + (mixed * 2_654_435_761 >> 8) % (args.token_high - args.token_low + 1)


def logprob(token: int, num_top: int, args: SimulatedArgs) -> TokenLogprob:
    """Half the mass on the chosen token, halving for each alternative after it."""
    span = args.token_high - args.token_low + 1
    others = [args.token_low + (token - args.token_low + i) % span for i in range(min(num_top, span))]
    return TokenLogprob(token, -0.6931, [(other, -0.6931 * (i + 1)) for i, other in enumerate(others)])
