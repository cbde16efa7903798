"""What a training run's `recipe.json` says, as a table and as plots. Knows the layout of that file, no models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dspark.errors import DataError
from hf_dspark.evaluation.tables import empty_plot, machine_line, markdown_table, number, percent, save_plot

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon on the backbone's matrices, AdamW on the rest"}


def render_recipe(record: Mapping[str, Any]) -> str:
    """Facts of a training run, from the `recipe.json` of `hf-dspark train` or `hf-dspark finetune`."""
    shape, settings = record["arguments"].get("shape"), record["arguments"]["training"]
    facts = [*(_shape_facts(record, shape) if shape else _finetuning_facts(record)), *_data_facts(record["data"])]
    parts = f" in {settings['accumulation']} parts" if settings["accumulation"] > 1 else ""
    optimizer = _OPTIMIZERS[settings.get("optimizer", "adamw")]
    facts += [
        ("optimizer", f"{optimizer}, peak rate {settings['learning_rate']:g}, weight decay {settings['weight_decay']:g}"),
        ("a step", f"{settings['batch_size']} sequences{parts} x at most {settings['num_anchors']} anchors"),
        ("loss", _loss(settings)),
    ]
    if "result" in record:
        result = record["result"]
        length = f"{result['steps']:,} steps, {result['minutes']:.0f} minutes, {result['anchors']:,} anchors"
        facts.append(("run", f"{length}, {result['epochs']:.2f} passes over the data"))
        best = next((point for point in record.get("curve", []) if point["step"] == result["best_step"]), None)
        if best is not None:
            facts.append(("kept", f"step {best['step']:,}; {_kept(best)}"))
    else:
        facts.append(("run", "not finished"))
    table = markdown_table(["", ""], [list(fact) for fact in facts], right=False)
    return f"{table}\n\nTrained on {machine_line(record)} Seed {record['seed']}."


def _shape_facts(record: Mapping[str, Any], shape: Mapping[str, Any]) -> list[tuple[str, str]]:
    head = "none (DFlash)" if shape["head"] == "none" else f"{shape['head']}, rank {shape['rank']}"
    if shape["head"] != "none":
        head += f", started {'from the target' if shape['head_start'] == 'target' else 'at random'}"
    start = "the target's last layers" if shape["start"] == "target" else "random weights"
    if "started_from_step" in record:
        start = f"step {record['started_from_step']} of an earlier run"
    elif "started_from" in record:
        start = record["started_from"]
    vocabulary = "the target's"
    covered = record.get("draft_vocabulary")
    if covered is not None:
        vocabulary = f"{shape['draft_vocab']:,} tokens, {percent(covered['share'])} of held-out response tokens"
    mask = f"`{shape['mask_token']}` (id {record['mask_token_id']})" if shape["mask_token"] is not None else f"id {record['mask_token_id']}"
    return [
        ("backbone", f"{shape['layers']} layers, started from {start}; taps {', '.join(map(str, record.get('taps', [])))}"),
        ("block", f"{shape['block_size']} tokens; mask token {mask}"),
        ("sequential head", head),
        ("draft vocabulary", vocabulary),
        ("size", f"{record['parameters'] / 1e6:.1f} M parameters, {record['weight_bytes'] / 1e6:.1f} MB"),
    ]


def _finetuning_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora = record.get("lora")
    kind = "all weights" if lora is None else f"LoRA of rank {lora['rank']} on {', '.join(lora['targets'])}"
    trained, every = record["trainable_parameters"], record["parameters"]
    return [
        ("base", f"{record['base']}, fingerprint `{record['base_fingerprint'][:16]}`"),
        (
            "trained",
            f"{kind}: {trained / 1e6:.2f} M of {every / 1e6:.1f} M parameters ({percent(trained / every)})",
        ),
    ]


def _data_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows, tokens = data["rows"], data["response_tokens"]
    by_temperature = ", ".join(f"{count:,} at T = {t}" for t, count in data["by_temperature"].items())
    ordered = sorted(data["by_source"].items(), key=lambda item: (-item[1], item[0]))
    facts = [
        ("rows for training", f"{rows['train']:,} ({tokens['train']:,} response tokens): {by_temperature}"),
        ("by kind", ", ".join(f"{source} {count:,}" for source, count in ordered)),
        ("rows held out", f"{rows['held_out']:,}"),
    ]
    thinking = {folder["thinking"] for folder in data["folders"] if folder.get("thinking") is not None}
    if thinking:
        told = (
            "off: expect fewer accepted tokens where the target thinks" if thinking == {False} else "on" if thinking == {True} else "both"
        )
        facts.append(("thinking mode of the data", told))
    return facts


def _loss(settings: Mapping[str, Any]) -> str:
    soft = f" ({percent(settings['soft_labels'])} of it against p_t)" if settings["soft_labels"] else ""
    ce = f"{settings['ce_start']:g} falling to {settings['ce_end']:g} over {percent(settings['ce_anneal'])} of the run"
    return f"CE{soft} {ce}, L1 {settings['total_variation']:g}, confidence {settings['confidence']:g}, decay {settings['decay']:g}"


def plot_curve(record: Mapping[str, Any], path: Path) -> None:
    """Draws a training run's held-out tau over its minutes into a PNG: dotted teacher-forced, solid really decoded.

    Raises:
        DataError: if matplotlib is not installed, or the run has no curve yet.
    """
    curve = record.get("curve") or []
    if not curve:
        raise DataError("the recipe has no training curve; it is written when the run ends")
    figure, axes = empty_plot()
    colours: dict[str, str] = {}
    for index, key in enumerate(sorted({key for point in curve for key in point if key.startswith("T=")})):
        colours[key] = f"C{index}"
        points = [(point["minutes"], point[key][_metric(key)]) for point in curve if key in point]
        axes.plot(*zip(*points, strict=True), ":", color=colours[key], label=f"T = {key[2:]}, teacher-forced")
    decoded = [(point["minutes"], point["decoded"]) for point in curve if point.get("decoded")]
    for key in sorted({key for _, figures in decoded for key in figures if key.startswith("T=")}):
        points = [(minutes, figures[key]["tau"]) for minutes, figures in decoded if figures.get(key)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colours.get(key), label=f"T = {key[2:]}, decoded")
    axes.set(xlabel="minutes", ylabel="tau, held out")
    save_plot(figure, axes, path)


def _kept(point: Mapping[str, Any]) -> str:
    forced = ", ".join(
        f"tau {number(point[key][_metric(key)], 2)} at T = {key[2:]}" for key in sorted(k for k in point if k.startswith("T="))
    )
    told = [f"held out, teacher-forced: {forced or 'no temperatures'}"]
    if decoded := point.get("decoded"):
        taus = ", ".join(f"{number(decoded[key]['tau'], 2)} at T = {key[2:]}" for key in sorted(k for k in decoded if k.startswith("T=")))
        told.append(f"decoded on {decoded['prompts']} held-out prompts: tau {taus}")
    return "; ".join(told)


def _metric(key: str) -> str:
    return "tau_greedy" if key == "T=0" else "tau_sampled"
