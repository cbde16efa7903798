"""What is exported for speculators, judged by speculators' own classes; needs its package (`make` installs it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dspark.checkpoints.convert import convert
from hf_dspark.models.modeling_dspark import DSparkDrafter
from tests.models.drafting import draft
from tests.tiny import HIDDEN, tiny_drafter, tiny_target

pytest.importorskip("speculators", reason="the package speculators is not installed")

ANCHOR, BLOCK = 9, 5


def theirs(folder: Path, target: Any) -> Any:
    """speculators' own model from an exported folder, with the target's matrices in place of a verifier's download."""
    from speculators import SpeculatorModelConfig
    from speculators.models.dspark import DSparkDraftModel

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.speculators_config.verifier.name_or_path = None
    config.transformer_layer_config._attn_implementation = "eager"
    model = DSparkDraftModel.from_pretrained(folder, config=config).float().eval()
    model.embed_tokens.load_state_dict({"weight": target.get_input_embeddings().weight})
    rows = target.get_output_embeddings().weight
    if model.t2d is not None:
        rows = rows[model.t2d.to(torch.bool)]
    model.lm_head.load_state_dict({"weight": rows})
    return model


@pytest.mark.parametrize(("head", "reduced"), [("vanilla", True), ("gated", False), ("rnn", True)])
def test_speculators_own_classes_give_our_logits(tmp_path, head: str, reduced: bool) -> None:
    """Hidden states, logits with the head's bias and confidences of one block: the exported folder in its classes gives ours."""
    target = tiny_target("qwen3")
    ids = torch.arange(1, 97, 2) if reduced else None
    drafter = tiny_drafter(target, head, draft_token_ids=ids)
    folder = convert(drafter, tmp_path / "made", "speculators", target=target)
    judge = theirs(folder, target)
    length, taps_width = 20, len(drafter.config.target_layer_ids) * HIDDEN
    generator = torch.Generator().manual_seed(3)
    taps = torch.randn(1, length, taps_width, generator=generator)
    tokens = torch.randint(4, 97, (1, length), generator=generator)
    loss_mask = torch.zeros(1, length)
    loss_mask[0, ANCHOR] = 1
    with torch.no_grad():
        backbone = type(judge)._backbone_forward
        backbone = getattr(backbone, "__wrapped__", backbone)
        unused, positions = (torch.randn(1, length, HIDDEN), torch.zeros(1, length, dtype=torch.long)), torch.arange(length)[None]
        hidden, logits, *_ = backbone(judge, taps, tokens, loss_mask, *unused, positions, max_anchors=1)
        previous = tokens[:, ANCHOR : ANCHOR + BLOCK]
        embedded = judge.markov_head.prev_embeddings(previous)
        expected = logits + judge.markov_head.block_bias(prev_token_ids=previous, hidden_states=hidden, prev_emb=embedded)
        confidence = judge.confidence_head(torch.cat((hidden, embedded), -1))
        h = draft(drafter, [taps[0, :ANCHOR]], [int(tokens[0, ANCHOR])])
        own = drafter.base_logits(h) + drafter.markov_head.project(drafter.markov_head.block(previous, h))
    torch.testing.assert_close(h, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drafter.confidence(h, previous), confidence.reshape(1, BLOCK), rtol=1e-4, atol=1e-4)


def test_export_holds_what_speculators_saves_and_no_more(tmp_path) -> None:
    """Its own save_pretrained of the loaded export writes the tensor names that the export has; loading its file gives our weights back."""
    target = tiny_target("qwen3")
    drafter = tiny_drafter(target, draft_token_ids=torch.arange(1, 97, 2))
    folder = convert(drafter, tmp_path / "made", "speculators", target=target)
    theirs(folder, target).save_pretrained(tmp_path / "again")
    exported, again = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(exported)
    loaded = DSparkDrafter.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in drafter.state_dict().items())
