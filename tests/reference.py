"""An independent straight-line drafter, from the equations: plain arithmetic on a state dict, token by token.

It shares nothing with the code under test: nothing of the package is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEADS = ["vanilla", "gated", "rnn", "none"]


@dataclass
class ReferenceDrafter:
    """Weights and the numbers in the equations."""

    weights: dict[str, torch.Tensor]  # names as in DeepSpec's files
    embedding: torch.Tensor  # (V, d), already scaled where the target scales
    lm_head: torch.Tensor  # (V, d)
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    theta: float
    gamma: int
    mask_id: int
    head_type: str  # "none", "vanilla", "gated", "rnn"
    confidence_with_markov: bool
    draft_ids: torch.Tensor | None = None  # target id of each draft id
    activation: str = "silu"
    first_slot: int = 0  # 1 where the anchor's own slot predicts nothing
    sees: dict[int, Callable[[int, int, int], bool]] | None = None  # layer -> whether a query sees a key, from positions and the anchor's
    softcap: float | None = None
    rotated: float = 1.0  # share of the pairs that are rotated

    def rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight."""
        return x / math.sqrt(float((x * x).mean()) + self.eps) * weight

    def rope(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotate pair (i, i + D/2) by position * theta^(-2i/D)."""
        half = self.head_dim // 2
        out = x.clone()
        for i in range(int(self.rotated * self.head_dim // 2)):
            angle = torch.tensor(float(position)) * (1.0 / self.theta ** torch.tensor(2.0 * i / self.head_dim))
            c, s = torch.cos(angle), torch.sin(angle)
            out[i] = x[i] * c - x[i + half] * s
            out[i + half] = x[i + half] * c + x[i] * s
        return out

    def act(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return x / (1.0 + torch.exp(-x))
        cubic = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)  # gelu, tanh form
        return 0.5 * x * (1.0 + torch.tanh(cubic))

    def key_value(self, layer: int, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one token, `(kv_heads, head_dim)`."""
        w = self.weights
        k = (w[f"layers.{layer}.self_attn.k_proj.weight"] @ x).view(self.num_kv_heads, self.head_dim)
        v = (w[f"layers.{layer}.self_attn.v_proj.weight"] @ x).view(self.num_kv_heads, self.head_dim)
        norm = w[f"layers.{layer}.self_attn.k_norm.weight"]
        return torch.stack([self.rope(self.rms(k[j], norm), position) for j in range(self.num_kv_heads)]), v

    def context(self, taps: torch.Tensor) -> torch.Tensor:
        """Eq. 2, token by token: `(S, d)` from taps `(S, m * d)`."""
        w = self.weights
        return torch.stack([self.rms(w["fc.weight"] @ tap, w["hidden_norm.weight"]) for tap in taps])

    def hidden(self, anchor: int, taps: torch.Tensor) -> torch.Tensor:
        """h_1..h_gamma, `(gamma, d)`: the anchor stands at position S, after S context tokens with positions 0..S-1."""
        w = self.weights
        context = self.context(taps)
        start = len(taps)
        xs = [self.embedding[anchor]] + [self.embedding[self.mask_id]] * (self.gamma + self.first_slot - 1)
        for layer in range(self.num_layers):
            name = f"layers.{layer}"
            pairs = [self.key_value(layer, context[t], t) for t in range(start)]
            normed = [self.rms(x, w[f"{name}.input_layernorm.weight"]) for x in xs]
            pairs += [self.key_value(layer, a, start + k) for k, a in enumerate(normed)]
            new = []
            every, sees = pairs, (self.sees or {}).get(layer)
            for k, (x, a) in enumerate(zip(xs, normed, strict=True)):
                pairs = every if sees is None else [pair for t, pair in enumerate(every) if sees(start + k, t, start)]
                q = (w[f"{name}.self_attn.q_proj.weight"] @ a).view(self.num_heads, self.head_dim)
                outputs = []
                for j in range(self.num_heads):
                    shared = j * self.num_kv_heads // self.num_heads
                    query = self.rope(self.rms(q[j], w[f"{name}.self_attn.q_norm.weight"]), start + k)
                    scores = torch.stack([query @ key[shared] for key, _ in pairs]) / math.sqrt(self.head_dim)
                    probabilities = torch.exp(scores - scores.max())
                    probabilities = probabilities / probabilities.sum()
                    outputs.append(sum(p * value[shared] for p, (_, value) in zip(probabilities, pairs, strict=True)))
                x = x + w[f"{name}.self_attn.o_proj.weight"] @ torch.cat(outputs)
                b = self.rms(x, w[f"{name}.post_attention_layernorm.weight"])
                gate = self.act(w[f"{name}.mlp.gate_proj.weight"] @ b)
                new.append(x + w[f"{name}.mlp.down_proj.weight"] @ (gate * (w[f"{name}.mlp.up_proj.weight"] @ b)))
            xs = new
        return torch.stack([self.rms(x, w["norm.weight"]) for x in xs[self.first_slot :]])

    def base_logits(self, h: torch.Tensor) -> torch.Tensor:
        """U, `(gamma, V_draft)`."""
        rows = self.lm_head if self.draft_ids is None else self.lm_head[self.draft_ids]
        u = torch.stack([rows @ h_k for h_k in h])
        return u if self.softcap is None else self.softcap * torch.tanh(u / self.softcap)

    def bias(self, previous: int, h_k: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B_k, `(V_draft,)`, and the next state: Eqs. 5 and 6."""
        w = self.weights
        if self.head_type == "none":
            return torch.zeros(()), state
        w1, w2 = w["markov_head.markov_w1.weight"], w["markov_head.markov_w2.weight"]
        e, r = w1[previous], w1.shape[1]
        if self.head_type == "vanilla":
            return w2 @ e, state
        if self.head_type == "gated":
            z = w["markov_head.gate_proj.weight"] @ torch.cat([h_k, e]) + w["markov_head.gate_proj.bias"]
            return w2 @ (e / (1.0 + torch.exp(-z))), state
        z = w["markov_head.joint_proj.weight"] @ torch.cat([state, e, h_k]) + w["markov_head.joint_proj.bias"]
        g = 1.0 / (1.0 + torch.exp(-z[:r]))
        return w2 @ torch.tanh(z[2 * r :]), g * state + (1.0 - g) * torch.tanh(z[r : 2 * r])

    def chain(self, anchor: int, h: torch.Tensor, forced: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
        """Greedy x_1..x_gamma (target ids), or after `forced` ones, and the logits U_k + B_k, `(gamma, V_draft)`."""
        u = self.base_logits(h)
        rank = self.weights["markov_head.markov_w1.weight"].shape[1] if self.head_type != "none" else 1
        state, previous, tokens, logits = torch.zeros(rank), anchor, [], []
        for k in range(self.gamma):
            b, state = self.bias(previous, h[k], state)
            logits.append(u[k] + b)
            best = int(logits[-1].argmax())
            best = best if self.draft_ids is None else int(self.draft_ids[best])
            tokens.append(best)
            previous = best if forced is None else forced[k]
        return tokens, torch.stack(logits)

    def confidence(self, anchor: int, tokens: list[int], h: torch.Tensor) -> torch.Tensor:
        """Logits of c_k, `(gamma,)`: Eq. 7."""
        w, previous, out = self.weights, [anchor, *tokens[:-1]], []
        for k in range(self.gamma):
            feature = h[k]
            if self.confidence_with_markov:
                feature = torch.cat([feature, w["markov_head.markov_w1.weight"][previous[k]]])
            out.append(w["confidence_head.proj.weight"][0] @ feature + w["confidence_head.proj.bias"][0])
        return torch.stack(out)


@dataclass
class Gemma4Reference(ReferenceDrafter):
    """The same with a Gemma 4 stack: four norms a layer, unscaled scores, normed values, a scalar a layer."""

    def key_value(self, layer: int, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        w, name = self.weights, f"layers.{layer}.self_attn"
        k = (w[f"{name}.k_proj.weight"] @ x).view(self.num_kv_heads, self.head_dim)
        v = k if f"{name}.v_proj.weight" not in w else (w[f"{name}.v_proj.weight"] @ x).view(self.num_kv_heads, self.head_dim)
        one = torch.ones(self.head_dim)
        keys = [self.rope(self.rms(k[j], w[f"{name}.k_norm.weight"]), position) for j in range(self.num_kv_heads)]
        return torch.stack(keys), torch.stack([self.rms(v[j], one) for j in range(self.num_kv_heads)])

    def hidden(self, anchor: int, taps: torch.Tensor) -> torch.Tensor:
        w, context, start = self.weights, self.context(taps), len(taps)
        xs = [self.embedding[anchor]] + [self.embedding[self.mask_id]] * (self.gamma - 1)
        for layer in range(self.num_layers):
            name = f"layers.{layer}"
            normed = [self.rms(x, w[f"{name}.input_layernorm.weight"]) for x in xs]
            pairs = [self.key_value(layer, c, t) for t, c in enumerate([*context, *normed])]
            new = []
            for k, (x, a) in enumerate(zip(xs, normed, strict=True)):
                q = (w[f"{name}.self_attn.q_proj.weight"] @ a).view(self.num_heads, self.head_dim)
                outputs = []
                for j in range(self.num_heads):
                    shared = j * self.num_kv_heads // self.num_heads
                    query = self.rope(self.rms(q[j], w[f"{name}.self_attn.q_norm.weight"]), start + k)
                    probabilities = torch.softmax(torch.stack([query @ key[shared] for key, _ in pairs]), 0)
                    outputs.append(sum(p * value[shared] for p, (_, value) in zip(probabilities, pairs, strict=True)))
                attended = w[f"{name}.self_attn.o_proj.weight"] @ torch.cat(outputs)
                x = x + self.rms(attended, w[f"{name}.post_attention_layernorm.weight"])
                b = self.rms(x, w[f"{name}.pre_feedforward_layernorm.weight"])
                gate = self.act(w[f"{name}.mlp.gate_proj.weight"] @ b)
                fed = w[f"{name}.mlp.down_proj.weight"] @ (gate * (w[f"{name}.mlp.up_proj.weight"] @ b))
                new.append((x + self.rms(fed, w[f"{name}.post_feedforward_layernorm.weight"])) * w[f"{name}.layer_scalar"])
            xs = new
        return torch.stack([self.rms(x, w["norm.weight"]) for x in xs])


def reference_of(drafter: Any, target: Any) -> ReferenceDrafter:
    """The reference with the weights of a drafter and of its target."""
    config, embedding = drafter.config, target.get_input_embeddings()
    return ReferenceDrafter(
        weights={name: tensor.detach() for name, tensor in drafter.state_dict().items()},
        embedding=embedding(torch.arange(config.vocab_size)).detach(),
        lm_head=target.get_output_embeddings().weight.detach(),
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
        gamma=config.block_size,
        mask_id=config.mask_token_id,
        head_type="none" if config.markov_rank == 0 else config.markov_head_type,
        confidence_with_markov=bool(config.confidence_head_with_markov),
        draft_ids=drafter.draft_token_ids,
        activation=config.hidden_act,
    )
