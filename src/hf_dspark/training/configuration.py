"""What a user chooses: hyper-parameters of a run, the shape of a drafter, how responses are made. Loads no torch; the command line is made
from these fields."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_dspark.errors import DataError

SHORTEST_SELF_PROMPT = 3  # tokens that a self-prompt adds to its opening at least


Limit = float | None
_RANGES = {
    "least": ("at least", operator.ge), "above": ("above", operator.gt), "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


def option(
    default: Any, help: str, *, flag: str | None = None, least: Limit = None, most: Limit = None, above: Limit = None, below: Limit = None
) -> Any:
    """A dataclass field that is an option of the command line too, named `flag` or after the field. Its range has its ends, `least` and
    `most`, or lacks them, `above` and `below`."""
    return field(default=default, metadata={"help": help, "flag": flag, "least": least, "most": most, "above": above, "below": below})


def _check(record: Any, error: type[ValueError] = ValueError) -> None:
    """Refuse a field that is out of its range or none of its choices."""
    hints = get_type_hints(type(record))
    for one in fields(record):
        value, hint = getattr(record, one.name), hints[one.name]
        if get_origin(hint) is Literal:
            fits, allowed = value in get_args(hint), ", ".join(get_args(hint))
        else:
            limits = [(*_RANGES[name], one.metadata[name]) for name in _RANGES if one.metadata.get(name) is not None]
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            fits = all(holds(v, limit) for v in values for _, holds, limit in limits)
            allowed = " and ".join(f"{words} {limit}" for words, _, limit in limits)
        if not fits:
            raise error(f"{one.name} is {value!r}; allowed: {allowed}. Correct this option.")


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of L = a_ce CE + a_tv sum_k w_k ||p_d - p_t||_1 + a_conf BCE, with w_k = exp(-(k - 1) / decay).

    Source: paper Eqs. 8-12 and the released recipe (0.1, 0.9, 1.0; decay 4.0 at block 7). Differs: `soft_labels` is ours, the share of the
    cross entropy taken against the target's whole distribution p_t instead of against the one token of the data.
    """

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0  # tokens after which a position's weight has fallen to 1/e
    soft_labels: float = 0.0


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters of one run; exactly one of `steps` and `minutes` sets its length and its schedule.

    With `steps` a resumed run repeats the uninterrupted one exactly (same machine, same thread count). With `minutes` the schedule follows
    the elapsed share of that wall-clock time, evaluation and checkpoints included, over all resumes, and no two runs are the same.

    Source: paper section 3.2 (warm-up 4%, clip 1.0, loss weights). Differs: the cross entropy starts with weight 1.0, since its initial
    value is 15 to 56 nats and the gradient of the L1 distance nearly vanishes there.

    Raises:
        ValueError: naming the field that is out of range.
    """

    steps: int | None = option(None, "Length of the run in steps; a resumed run repeats the uninterrupted one.", least=1)
    minutes: float | None = option(None, "Length of the run by the clock.", above=0)
    batch_size: int = option(8, "Rows a step, over all processes.", least=1)
    accumulation: int = option(1, "Parts that a process runs its rows of a step in, to bound memory.", least=1)
    num_anchors: int = option(64, "Blocks a row at most.", flag="--anchors", least=1)
    learning_rate: float = option(1.5e-3, "Peak learning rate; warm-up, then cosine to 0.", flag="--lr", above=0, below=math.inf)
    warmup: float = option(0.04, "Share of the run with a rising rate.", least=0, below=1)
    clip: float = option(1.0, "Largest gradient norm.", above=0)
    optimizer: Literal["adamw", "muon"] = option("adamw", "adamw, or muon: Muon on the backbone's matrices, AdamW on the others.")
    weight_decay: float = option(0.0, "Decoupled.", least=0)
    ce_start: float = option(1.0, "Weight of the cross entropy at the start ..", least=0)
    ce_end: float = option(0.1, ".. and at the end of its annealing.", least=0)
    ce_anneal: float = option(0.3, "Share of the run over which it falls.", least=0, below=1)
    total_variation: float = option(0.9, "Weight of the L1 distance.", least=0)
    confidence: float = option(1.0, "Weight of the confidence head's loss.", least=0)
    decay: float = option(4.0, "Decay of the loss along the block, in tokens.", above=0)
    soft_labels: float = option(0.0, "Share of the CE taken against the target's distribution.", least=0, most=1)
    chunk_positions: int = option(256, "Block positions whose logits exist at one time: bounds memory.", flag="--chunk", least=1)
    states_memory_gib: float = option(
        0.0,
        "GiB of memory of each process that may hold the target's states for later passes over the data. Nothing goes to disk.",
        flag="--states-memory",
        least=0,
        below=math.inf,
    )
    checkpoint_minutes: float = option(5.0, "Minutes between checkpoints.", above=0)
    evaluation_minutes: float = option(10.0, "Minutes between evaluations.", above=0)
    evaluation_rows: int = option(64, "Held-out rows of evaluations on the way; the last takes all.", least=1)
    evaluation_anchors: int = 32
    log_every: int = 10
    seed: int = option(0, "The same seed gives the same run.", least=0)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"steps is {self.steps} and minutes is {self.minutes}; allowed: exactly one of them. Set the other to None.")
        _check(self)

    def learning_rate_at(self, fraction: float) -> float:
        """Learning rate at an elapsed share of the run in [0, 1]: linear warm-up, then cosine to 0."""
        if fraction < self.warmup:
            return self.learning_rate * fraction / self.warmup
        done = min(1.0, (fraction - self.warmup) / (1 - self.warmup))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def loss_weights_at(self, fraction: float) -> LossWeights:
        """Loss coefficients at an elapsed share of the run in [0, 1]."""
        share = min(1.0, fraction / self.ce_anneal) if self.ce_anneal else 1.0
        cross_entropy = self.ce_start + (self.ce_end - self.ce_start) * share
        return LossWeights(cross_entropy, self.total_variation, self.confidence, self.decay, self.soft_labels)


@dataclass(frozen=True)
class DrafterShape:
    """What a fresh drafter looks like and where its weights start; a `ValueError` names the field that is out of range."""

    layers: int = option(2, "Backbone layers.", least=1)
    block_size: int = option(7, "Tokens drafted a round; 1 is a one-token drafter in the manner of MTP-1.", least=1)
    head: Literal["vanilla", "gated", "rnn", "none"] = option("vanilla", "Sequential head: vanilla, gated, rnn, or none (DFlash).")
    rank: int = option(256, "Rank of the sequential head; for a drafter without one give --head none.", least=1)
    taps: tuple[int, ...] | None = option(None, "A target layer to read; give it again for more. Default: five, spread.")
    mask_token: str | None = option(None, "Token or id that text does not use. Default: chosen from the tokenizer.")
    draft_vocab: int | None = option(None, "Draft only the so many most frequent tokens. Default: all.", least=1)
    start: Literal["target", "random"] = option("target", "Backbone from the `target`'s last layers, or `random`.")
    head_start: Literal["target", "random"] = option("target", "Sequential head from the `target`'s own next-token logits, or `random`.")

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Opening:
    """How the target is made to write a prompt of its own."""

    source: str = "self"  # domain of the prompts that come of it
    begin: str = ""  # the first words of the user's turn, which the target finishes
    system: str | None = None  # in front of it; the prompt is later answered without
    weight: float = 1.0  # how often it is chosen, relative to the others


@dataclass(frozen=True)
class DataSettings:
    """How responses are made, the same for a folder's life but for the counts; a `DataError` names the field that is out of range."""

    temperatures: tuple[float, ...] = option(
        (0.0,), "Of responses; give several to mix, one a prompt. Default: 0.", flag="--temperature", least=0, below=math.inf
    )
    top_p: float = option(1.0, "Nucleus: above 0, at most 1 (all tokens).", above=0, most=1)
    max_new_tokens: int = option(256, "New tokens a response at most.", least=1)
    max_prompt_tokens: int = option(768, "Longer prompts are skipped (counted).", least=1)
    seed: int = option(0, "The same seed gives the same output.", least=0)
    thinking: bool = option(False, "Let the chat template switch thinking on.", flag="--thinking")
    held_out: float = option(0.04, "Share of prompts to be held out, recorded for training.", least=0, below=1)
    self_prompts: int = option(0, "Prompts that the target writes itself (Magpie).", flag="--self-prompt", least=0)
    self_temperature: float = option(0.8, "Temperature at which it writes prompts.", above=0, below=math.inf)
    self_tokens: int = option(96, "Tokens of a prompt it writes; longer ones are rejected.", least=SHORTEST_SELF_PROMPT + 1)
    openings: tuple[Opening, ...] = (Opening(),)

    def __post_init__(self) -> None:
        _check(self, DataError)
        if not self.temperatures or not self.openings:
            raise DataError(f"temperatures is {self.temperatures}, openings is {self.openings}; allowed: one or more. Correct them.")
