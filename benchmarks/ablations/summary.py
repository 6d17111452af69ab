"""What the finished ablations say: a JSON in results/, a table per experiment, and the figure of experiment (e).

Arms are compared by pairs: the difference between an arm and the experiment's first, seed by seed, for arms of one seed
read the same windows. Intervals are 95 %, Student's t over seeds: with three of them, 2.5 times the standard
deviation. They cover the draw of first weights and the order of the data, not another corpus.

    python benchmarks/ablations/summary.py [--finished FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import record
from ablations.arms import ARMS, BASELINE, EXPERIMENTS, RECIPE, arm_settings, flops_per_token
from ablations.run import FINISHED, LAST, TOKENS, read_lines

from soli.analysis.parameters import count

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile, 1 .. 9 degrees
FIGURES = {
    "loss": "held-out loss, nats per token",
    "bits_per_byte": "held-out bits per byte",
    "train_violation": "max violation, last steps",
    "heldout_violation": "max violation, held-out",
    "train_idle": "experts without tokens per step",
    "heldout_idle": "experts without tokens, held-out",
    "mtp_acceptance": "MTP acceptance",
}
PICTURE = record.ROOT / "docs" / "number-of-experts.png"
RunsByArm = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> figures


def by_arm(lines: Sequence[Mapping[str, Any]], budget: int) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The runs of one length, by arm and seed."""
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line["budget"] == budget and line["arm"] in ARMS:
            runs.setdefault(line["arm"], {})[line["seed"]] = line
    return runs


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation, and half of the 95 % interval of the mean; the last two None for a single value."""
    several = len(values) > 1
    deviation = statistics.stdev(values) if several else None
    half = None if deviation is None else STUDENT[len(values) - 2] * deviation / len(values) ** 0.5
    return {"mean": statistics.mean(values), "deviation": deviation, "interval": half, "seeds": len(values)}


def summarise_arm(runs: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure over seeds, and the loss less the reference's, over the seeds that both have."""
    measured = {key: [run[key] for run in runs.values() if key in run] for key in FIGURES}
    summary: dict[str, Any] = {key: spread(values) for key, values in measured.items() if values}
    shared = sorted(runs.keys() & reference.keys())
    if shared and runs is not reference:
        summary["loss_less_first"] = spread([runs[seed]["loss"] - reference[seed]["loss"] for seed in shared])
    return summary


def summarise(runs: RunsByArm) -> dict[str, Any]:
    """Every experiment whose first arm is there: arm by arm, the first one first."""
    result = {}
    for name, experiment in EXPERIMENTS.items():
        first = runs.get(experiment.arms[0], {})
        arms = {arm: summarise_arm(runs[arm], first) for arm in experiment.arms if arm in runs}
        if first:
            result[name] = {"question": experiment.question, "first": experiment.arms[0], "arms": arms}
    return result


def describe(arm: str, budget: int) -> dict[str, Any]:
    """What an arm is and costs."""
    settings = arm_settings(arm, budget)
    parameters, tokens = count(settings.model), settings.schedule.total_tokens
    sizes = {"parameters": parameters.total, "activated": parameters.activated, "tokens": tokens}
    changes = dict(ARMS[arm].changes)
    return {"what": ARMS[arm].what, "changes": changes, **sizes, "flops": tokens * flops_per_token(settings)}


def table(experiment: Mapping[str, Any]) -> str:
    """An experiment as Markdown: a row per arm."""
    violation = "violation, training / held-out"
    head = ["arm", "loss", "less the first's", "bits per byte", violation, "without tokens", "acceptance"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for name, arm in experiment["arms"].items():
        violation = f"{_mean(arm, 'train_violation', 2)} / {_mean(arm, 'heldout_violation', 2)}"
        idle = f"{_mean(arm, 'train_idle', 1)} / {_mean(arm, 'heldout_idle', 1)}"
        difference = _with_interval(arm["loss_less_first"], "+") if "loss_less_first" in arm else ""
        cells = [ARMS[name].what, _with_interval(arm["loss"]), difference, _mean(arm, "bits_per_byte", 3)]
        lines.append(f"| {' | '.join([*cells, violation, idle, _mean(arm, 'mtp_acceptance', 3)])} |")
    return "\n".join(lines)


def _mean(arm: Mapping[str, Any], key: str, digits: int) -> str:
    return f"{arm[key]['mean']:.{digits}f}" if key in arm else "–"


def _with_interval(value: Mapping[str, Any], sign: str = "") -> str:
    half = value["interval"]
    return f"{value['mean']:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def draw(experiment: Mapping[str, Any], runs: RunsByArm, budget: int, file: Path) -> None:
    """Loss less the dense model's of the same seed over the number of experts: each seed, the mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = {name: arm for name, arm in experiment["arms"].items() if "loss_less_first" in arm}
    experts = [arm_settings(name, budget).model.n_routed_experts for name in arms]
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    dense = runs[experiment["first"]]
    seeds = sorted(set(dense).intersection(*(runs[name] for name in arms)))
    for seed in seeds:
        losses = [runs[name][seed]["loss"] - dense[seed]["loss"] for name in arms]
        axis.plot(experts, losses, "o-", color="0.65", lw=1, ms=3, label="one seed" if seed == seeds[0] else None)
    pairs = [arm["loss_less_first"] for arm in arms.values()]
    means, halves = [pair["mean"] for pair in pairs], [pair["interval"] or 0.0 for pair in pairs]
    axis.errorbar(experts, means, halves, fmt="o-", color="tab:blue", lw=2, capsize=4, label="mean, 95 % interval")
    axis.axhline(0, color="tab:orange", label="dense")
    axis.set_xscale("log", base=2)
    axis.set_xticks(experts, [str(number) for number in experts])
    axis.set_xlabel("routed experts, of which a token uses 4")
    axis.set_ylabel("held-out loss less the dense model's,\nnats per token")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120, format="png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finished", type=Path, default=FINISHED, help="what run.py left")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the baseline, as given to run.py")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--output", default="ablations", help="name of the JSON in results/")
    options = parser.parse_args(arguments)
    lines = read_lines(options.finished)
    by_arm_and_seed = by_arm(lines, options.tokens)
    if not by_arm_and_seed:
        parser.error(f"{options.finished} holds no run of {options.tokens:,} tokens; train with run.py first")
    experiments = summarise(by_arm_and_seed)
    hardware = record.hardware() | {"commit": ", ".join(sorted({line["commit"] for line in lines}))}
    size = {"tokens": options.tokens, "last_steps": LAST, "recipe": RECIPE, "figures": FIGURES}
    arms = {arm: describe(arm, options.tokens) for arm in ARMS if arm in by_arm_and_seed}
    runs = [run for arm in arms for run in by_arm_and_seed[arm].values()]
    result = {"hardware": hardware, "size": size, "arms": arms, "experiments": experiments, "runs": runs}
    file = record.write(options.output, result)
    for name, experiment in experiments.items():
        print(f"({name}) {experiment['question']}\n\n{table(experiment)}\n")
    if BASELINE in by_arm_and_seed and "dense" in by_arm_and_seed:
        draw(experiments["e"], by_arm_and_seed, options.tokens, options.picture)
    print(f"written to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
