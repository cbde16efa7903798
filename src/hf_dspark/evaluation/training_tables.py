"""Tables and plots of what was measured about training: tau, matched drafters, domain shift, the step itself. Knows file layouts, no
models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_dspark.evaluation.tables import empty_plot, judged, machine_line, markdown_table, number, percent, save_plot

BASE = "dspark, 2 layers"
PLAIN = "dflash, 2 layers"
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def render_decoded(record: Mapping[str, Any]) -> str:
    """Tau by prompt set and temperature, and acceptance by block position over all sets."""
    temperatures = [key for key in record["decoded"] if key.startswith("T=")]
    sets = record["settings"]["sets"]
    kinds = [("decoded", ""), ("token_by_token", ", token by token"), ("without_copying", ", heads alone")]
    rows = [(record[kind][key], key, name) for kind, name in kinds for key in record.get(kind, {}) if key.startswith("T=")]
    gamma = max(len(record["decoded"][key]["acceptance"]) for key in temperatures)
    body = []
    for found, key, name in rows:
        values = [found["by_source"][one] for one in sets]
        mean = sum(values) / len(values)
        positions = [*found["acceptance"], *[None] * (gamma - len(found["acceptance"]))]
        body.append(
            [
                key.replace("=", " = ") + name,
                *(number(v, 2) for v in values),
                number(mean, 2),
                *(number(v, 2) for v in positions),
            ]
        )
    heading = ["", *sets, "mean of sets", *(f"c{k}" for k in range(1, gamma + 1))]
    settings = record["settings"]
    return (
        f"{markdown_table(heading, body)}\n\nDecoded tau, bonus token included; c1..c{gamma}: acceptance where all before it stood. "
        f"{settings['limit']} prompts a set, at most {settings['max_new_tokens']} new tokens, batches of {settings['batch_size']}, "
        f"target {settings['dtype']}, seed {record['seed']}. At T > 0 {judged(settings)}."
    )


def render_matched(record: Mapping[str, Any]) -> str:
    """Tau of every drafter by set, at each temperature, like the paper's Table 1; and the gain over DFlash."""
    drafters, sets = record["drafters"], record["settings"]["sets"]
    temperatures = record["settings"]["temperatures"]
    heading = ["drafter", "parameters", *(f"{name} {key}" for key in temperatures for name in [*sets, "mean"])]
    body = []
    for name, found in drafters.items():
        cells = [name, f"{found['parameters'] / 1e6:.1f} M"]
        for key in temperatures:
            part = found["decoded"][key]
            cells += [*(number(part["by_set"][s], 2) for s in sets), number(part["macro"], 2)]
        body.append(cells)
    told = []
    if BASE in drafters and PLAIN in drafters:
        for key in temperatures:
            ratio = drafters[BASE]["decoded"][key]["macro"] / drafters[PLAIN]["decoded"][key]["macro"] - 1
            told.append(f"{percent(ratio)} at {key.replace('=', ' = ')}")
    gain = f" DSpark over DFlash, mean of sets, 2 layers: {' and '.join(told)}." if told else ""
    settings = record["settings"]
    learnt = f"{_OPTIMIZERS[settings['training']['optimizer']]}, {settings['data']['rows']['train']:,} rows to learn from"
    return (
        f"{markdown_table(heading, body)}\n\nDecoded tau, bonus token included, {settings['prompts']} prompts a set, at most "
        f"{settings['max_new_tokens']} new tokens, at T > 0 {judged(settings)}. Each drafter: {settings['training']['steps']} steps of "
        f"{settings['training']['batch_size']} rows x at most {settings['training']['num_anchors']} anchors, "
        f"{learnt}, seed {settings['training']['seed']}.{gain} {machine_line(record)}"
    )


def render_positions(record: Mapping[str, Any]) -> str:
    """Conditional acceptance by block position of every drafter, like the paper's figures of decay along the block."""
    body = []
    gamma = 0
    for name, found in record["drafters"].items():
        for key in record["settings"]["temperatures"]:
            values = found["decoded"][key]["acceptance"]
            gamma = max(gamma, len(values))
            body.append([f"{name}, {key.replace('=', ' = ')}", *(number(v, 2) for v in values)])
    body = [line + ["-"] * (gamma + 1 - len(line)) for line in body]
    return markdown_table(["drafter", *(f"c{k}" for k in range(1, gamma + 1))], body)


def plot_matched(record: Mapping[str, Any], folder: Path, stem: str = "matched") -> list[Path]:
    """Two PNGs whose names begin with `stem`: acceptance along the block (lines), and mean tau by layers (DSpark against DFlash).

    Raises:
        DataError: if matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drafters = record["drafters"]
    figure, axes = empty_plot()
    for name in (n for n in drafters if n.endswith("2 layers")):
        values = [float("nan") if v is None else v for v in drafters[name]["decoded"]["T=0"]["acceptance"]]
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
    axes.set(xlabel="block position", ylabel="conditional acceptance, T = 0", ylim=(0, 1))
    by_position = folder / f"{stem}_acceptance.png"
    save_plot(figure, axes, by_position)
    figure, axes = empty_plot()
    for kind in ("dspark", "dflash"):
        for key, style in (("T=0", "-"), ("T=1", ":")):
            points = [(n, drafters[label]) for n in (1, 2, 3) if (label := f"{kind}, {n} layer{'s' if n > 1 else ''}") in drafters]
            if points and all(key in found["decoded"] for _, found in points):
                axes.plot(
                    [n for n, _ in points],
                    [found["decoded"][key]["macro"] for _, found in points],
                    style,
                    marker="o",
                    markersize=3,
                    color="C0" if kind == "dspark" else "C1",
                    label=f"{kind}, {key.replace('=', ' = ')}",
                )
    axes.set(xlabel="backbone layers", ylabel="tau, mean of sets", xticks=[1, 2, 3])
    by_depth = folder / f"{stem}_layers.png"
    save_plot(figure, axes, by_depth)
    return [by_position, by_depth]


def render_shift(record: Mapping[str, Any]) -> str:
    """Tau of every drafter on the new and the old domain, with what its fine-tuning trained and took."""
    sets, temperatures = record["settings"]["sets"], record["settings"]["temperatures"]
    heading = ["drafter", "trained", "stored", "minutes", *(f"{name} {key}" for key in temperatures for name in sets)]
    body = []
    for name, found in record["drafters"].items():
        trained = "-" if found["trained_parameters"] is None else f"{found['trained_parameters'] / 1e6:.2f} M"
        cells = [name, trained, f"{found['stored_bytes'] / 1e6:.1f} MB", number(found["minutes"], 1)]
        for key in temperatures:
            cells += [number(found["decoded"][key]["by_source"].get(s), 2) for s in sets]
        body.append(cells)
    settings = record["settings"]
    return (
        f"{markdown_table(heading, body)}\n\nDecoded tau, bonus token included; {settings['prompts']} prompts a set at most, the new "
        f"domain's held out from fine-tuning; at most {settings['max_new_tokens']} new tokens, at T > 0 {judged(settings)}, "
        f"seed {record['seed']}. "
        f"{machine_line(record)}"
    )


def render_training(record: Mapping[str, Any]) -> str:
    """Anchors a second and peak memory of our training step and of the programs that it was compared with."""
    shape = record["shape"]
    body = []
    for name, ours in record["ours"].items():
        vocabulary = "whole vocabulary" if name == "full" else f"{name} vocabulary"
        body.append(
            [
                f"hf_dspark, {vocabulary}",
                number(ours["anchors_per_s"], 0),
                number(ours["anchors_per_s_without_target"], 0),
                number(ours["peak_rss_bytes"] / 2**30, 2),
                "",
                "",
            ]
        )
    for other in record.get("others", []):
        ratio = other["ratios"]["full"]
        body.append(
            [
                other["what"],
                "-",
                number(other["anchors_per_s"]["median"], 0),
                number(other["peak_rss_bytes"] / 2**30, 2),
                number(ratio["anchors_per_s"], 2),
                number(ratio["anchors_per_s_without_target"], 2),
            ]
        )
    heading = ["training step", "anchors/s", "target's pass apart", "peak GiB", "ours over it", "target's pass apart"]
    return (
        f"{markdown_table(heading, body)}\n\n{shape['batch_size']} rows of {shape['length_tokens']} tokens, at most "
        f"{shape['num_anchors']} anchors each, {shape['num_hidden_layers']} layers, block {shape['block_size']}, rank "
        f"{shape['markov_rank']}. {machine_line(record)}"
    )
