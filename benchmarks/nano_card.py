"""Score the bundled model and write its card: figures, curve, load, examples; nothing in it is typed by hand.

    python benchmarks/nano_card.py --run runs/nano-gpu --data data/nano-zh-en [--before FOLDER N ...]

Reads the run's metrics and resolved recipe, and what gpu/train_nano.py left where a GPU trained; runs `soli eval` and
`soli routing` on the held-out files, and writes benchmarks/results/nano.json, soli/models/nano/README.md and
its curve.png. `--before` scores an earlier bundled model on the same files, or reads what `soli eval --json` said of
it; the first one's figures stand beside the new ones for each source. `--averaged`: the model is a mean of the run's
checkpoints, which had seen all of its tokens; `--drafts`: the run in which its MTP modules were trained. Of a run on a
CPU: with as many threads (OMP_NUM_THREADS) as the training had, for the utilisation is the run's FLOP/s over the rate
of its matrix products, measured now; of one on a GPU it is their share of what the card's maker states.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

from soli.analysis.parameters import training_flops
from soli.plan.throughput import measure_device, stated_peak
from soli.recipes.nano_corpus.sources.catalogue import SOURCES
from soli.train.settings import SECTIONS, TrainSettings, read_settings

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
MODEL = ROOT / "src" / "soli" / "models" / "nano"
LICENCES = {source.label: source.licence for source in SOURCES} | {
    # By `soli data build nano-zh-en --extra`, from public repositories.
    "tatoeba-gh": "CC-BY-2.0-FR, tatoeba.org and its contributors",
    "python-docs-gh": "PSF-2.0, Chinese CC0",
    "xquad-gh": "CC-BY-SA-4.0",
}


def soli_json(*arguments: str) -> Any:
    """What `soli ... --json` printed."""
    process = subprocess.run(
        [sys.executable, "-m", "soli", *arguments, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(process.stdout)


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The run's steps and evaluations, in order."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r for r in rows if r["kind"] == "step"], [r for r in rows if r["kind"] == "evaluation"]


def draw_curve(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], file: Path) -> None:
    """Loss, held-out bits per byte and the worst layer's violation over tokens, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    at = [s["tokens"] / 1e6 for s in steps]
    left.plot(at, [s["loss"] for s in steps], label="next token", color="#2b6cb0", lw=1)
    left.plot(at, [s["mtp"] or math.nan for s in steps], label="one further (MTP)", color="#c05621", lw=1)
    heldout = [e for e in evaluations if "loss" in e]
    left.plot([e["tokens"] / 1e6 for e in heldout], [e["loss"] for e in heldout], "k.-", label="held-out")
    left.set(xlabel="million tokens", ylabel="nats per token", title="Loss")
    left.legend()
    for layer in steps[-1]["load"]:
        loads = [s["load"].get(layer, {}).get("max_violation", math.nan) for s in steps]  # none before MTP begins
        right.plot(at, loads, lw=1, label=layer)
    right.set(xlabel="million tokens", title="Load: largest over mean, less 1", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def read_recipe(run: Path) -> TrainSettings:
    """The recipe that the run began with, every default resolved."""
    recipe = json.loads((run / "recipe.resolved.json").read_text(encoding="utf-8"))
    return read_settings({name: recipe[name] for name in (*SECTIONS, "model") if name in recipe})


def score(model: str, data: Path) -> dict[str, Any]:
    """What `soli eval` says of a model on the held-out pairs and texts."""
    files = ["--pairs", str(data / "heldout.tsv"), "--text", str(data / "heldout_mono.tsv")]
    scores: dict[str, Any] = soli_json("eval", model, *files)
    return scores


def read_scores(model: Path, data: Path) -> dict[str, Any]:
    """Those of a model folder, measured now, or those in a JSON file."""
    if not model.is_file():
        return score(str(model), data)
    scores: dict[str, Any] = json.loads(model.read_text(encoding="utf-8"))
    return scores


def measure(data: Path) -> dict[str, Any]:
    """Scores on the held-out pairs and texts, and which experts prefer which language."""
    scores = score("nano", data)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "heldout.txt"
        rows = [line.split("\t") for line in (data / "heldout.tsv").read_text(encoding="utf-8").splitlines()]
        texts.write_text("".join(f"{zh}\n{en}\n" for _, zh, en in rows[::8]), encoding="utf-8")
        routing = soli_json("routing", str(texts), "--png", str(MODEL / "experts.png"))
    return {"eval": scores, "preferences": count_preferences(routing)}


def count_preferences(routing: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Per layer: how many experts prefer Chinese, how many English, beyond chance."""
    layers: dict[str, dict[str, int]] = {}
    for expert in routing["preferences"]:
        layer = layers.setdefault(expert["layer"], {"zh": 0, "en": 0, "experts": 0})
        layer["experts"] += 1
        if expert["prefers"]:
            layer[expert["prefers"]] += 1
    return layers


def quality(scores: dict[str, Any]) -> dict[str, Any]:
    """The figures of `soli eval` that sum a model up."""
    return {
        **{name: scores["directions"][name]["overall"] for name in ("en-zh", "zh-en")},
        "bits_per_byte": scores["on_text"]["bits_per_byte"]["all"],
        "mtp_acceptance": scores["on_pairs"]["mtp_acceptance"],
    }


def utilisation(run: Path, settings: TrainSettings, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the run was and its median step: its model FLOP/s over what the processor does on the recipe's products
    alone, of a GPU over the bf16 peak that its maker states."""
    speed = statistics.median(step["tokens_per_second"] for step in steps)
    flops = [flops_per_token(settings, step) for step in steps]
    work = statistics.median(step["tokens_per_second"] * own for step, own in zip(steps, flops, strict=True))
    speed_and_flops = {"tokens_per_second": speed, "flops_per_token": statistics.mean(flops)}
    gpu_result = run / "gpu_train_nano.json"
    if gpu_result.is_file():
        machine = json.loads(gpu_result.read_text(encoding="utf-8"))["hardware"]
        peak = stated_peak(machine["gpu"])
        assert peak is not None
        where = {"machine": f"one {machine['gpu']}", "date": machine["date"], "commit": machine["commit"]}
        return {**speed_and_flops, **where, "peak_tflops": peak, "mfu": work / 1e12 / peak}
    devices = [measure_device(settings) for _ in range(5)]
    device = max(devices, key=lambda device: device.tflops)  # other processes may be at work
    here = record.hardware()
    return {
        **speed_and_flops,
        "machine": f"{device.threads} of {here['cores']} cores of {here['cpu']}",
        "date": here["date"],
        "commit": here["commit"],
        "measured_tflops": device.tflops,
        "mfu": work / 1e12 / device.tflops,
    }


def flops_per_token(settings: TrainSettings, step: dict[str, Any]) -> int:
    """Of a step, which may have been before the MTP modules were trained."""
    return training_flops(settings.model, settings.schedule.sequence_length, mtp=bool(step["mtp"]))


def exported_tokens(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], save_every: int) -> int:
    """Tokens that the exported checkpoint had seen: of those saved, that with the lowest held-out loss."""
    saved = [e for e in evaluations if "loss" in e and (e["step"] % save_every == 0 or e["step"] == steps[-1]["step"])]
    return int(min(saved, key=lambda e: e["loss"])["tokens"])


def by_source(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """chrF of each direction and source."""
    return {
        name: {source: row["chrf"] for source, row in direction["by_source"].items()}
        for name, direction in scores["directions"].items()
    }


def summarise(
    measurements: dict[str, Any],
    steps: list[dict[str, Any]],
    tokens_seen: int,
    tokens_drafts: int,
    model_bytes: int,
    training: dict[str, Any],
    before: list[dict[str, Any]],
) -> dict[str, Any]:
    """What benchmarks/results/nano.json holds; the README's table reads `figures`."""
    scores, last = measurements["eval"], steps[-1]
    return {
        "hardware": record.hardware(),
        "figures": {
            **quality(scores),
            "tokens_seen": tokens_seen,
            "tokens_run": last["tokens"],
            "tokens_drafts": tokens_drafts,
            "hours": float(f"{last['seconds'] / 3600:.3g}"),
            "bytes": model_bytes,
        },
        "training": training,
        "preferences": measurements["preferences"],
        "eval": scores,
        "before": before,
    }


def card(result: dict[str, Any], steps: list[dict[str, Any]], data: Path) -> str:
    """The model card in Markdown."""
    figures, scores = result["figures"], result["eval"]
    sources = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    names = sorted(sources["sources"], key=lambda name: -sources["sources"][name]["tokens"])
    parameter_counts, training = soli_json("count", "nano"), result["training"]
    flop = training["flops_per_token"] * figures["tokens_run"]
    fill = {
        "total": f"{parameter_counts['total'] / 1e6:.1f}",
        "activated": f"{parameter_counts['activated'] / 1e6:.1f}",
        "tokens_seen": f"{figures['tokens_seen'] / 1e6:.1f}",
        "tokens_run": f"{figures['tokens_run'] / 1e6:.1f}",
        "drafts": f"{figures['tokens_drafts'] / 1e6:.1f}",
        "took": record.duration(figures["hours"]),
        "machine": training["machine"],
        "speed": f"{training['tokens_per_second']:,.0f}",
        "mfu": utilised(training),
        "versions": "\n".join(version_rows(result)),
        "flop": f"{flop:.1e}".replace("e+", " x 10^"),
        "corpus": f"{sources['train_tokens'] / 1e6:.1f}",
        "megabytes": f"{figures['bytes'] / 1e6:.1f}",
        "quality": "\n".join(quality_rows(scores["directions"], result["before"])),
        "signature": scores["directions"]["en-zh"]["overall"]["signature"],
        "signature_en": scores["directions"]["zh-en"]["overall"]["signature"],
        "bits": ", ".join(f"{name} {bits:.3f}" for name, bits in scores["on_text"]["bits_per_byte"].items()),
        "mtp_pairs": f"{100 * scores['on_pairs']['mtp_acceptance']:.1f}",
        "mtp_text": f"{100 * scores['on_text']['mtp_acceptance']:.1f}",
        "load": "\n".join(load_rows(scores["on_pairs"]["load"], result["preferences"])),
        "examples": "\n".join(example_rows(scores["directions"])),
        "sources": "\n".join(source_row(name, sources["sources"][name]) for name in names),
    }
    return string.Template((BENCHMARKS / "nano_card.md").read_text(encoding="utf-8")).substitute(fill)


def utilised(training: dict[str, Any]) -> str:
    if "peak_tflops" in training:
        return (
            f"{100 * training['mfu']:.1f} % of the {training['peak_tflops']:.0f} TFLOP/s that its maker states in bf16"
        )
    return f"{100 * training['mfu']:.0f} % of {training['measured_tflops']:.2f} TFLOP/s in its matrix products alone"


def version_rows(result: dict[str, Any]) -> list[str]:
    """The earlier bundled models and this one."""
    models = [("before", figures) for figures in result["before"]] + [("this model", result["figures"])]
    rows = []
    for name, figures in models:
        zh, en = figures["en-zh"], figures["zh-en"]
        rows.append(
            f"| {name} | {figures['tokens_seen'] / 1e6:.1f} M | {zh['chrf']:.1f} | {zh['bleu']:.1f} "
            f"| {en['chrf']:.1f} | {en['bleu']:.1f} | {figures['bits_per_byte']:.3f} "
            f"| {100 * figures['mtp_acceptance']:.1f} % |"
        )
    return rows


def quality_rows(directions: dict[str, Any], before: list[dict[str, Any]]) -> list[str]:
    """One table row per source, then one for all; chrF of the first earlier model in brackets."""
    to_zh, to_en = directions["en-zh"], directions["zh-en"]
    sources = list(to_zh["by_source"])
    rows = [(source, to_zh["by_source"][source], to_en["by_source"][source]) for source in sources]
    rows.append(("**all**", to_zh["overall"], to_en["overall"]))

    def earlier(direction: str, source: str) -> str:
        if not before:
            return ""
        first = before[0]
        chrf = first["by_source"][direction].get(source) if source in sources else first[direction]["chrf"]
        return "" if chrf is None else f" ({chrf:.1f})"

    return [
        f"| {name} | {zh['count']:,} | {zh['chrf']:.1f}{earlier('en-zh', name)} | {zh['bleu']:.1f} "
        f"| {en['chrf']:.1f}{earlier('zh-en', name)} | {en['bleu']:.1f} |"
        for name, zh, en in rows
    ]


def load_rows(loads: list[dict[str, Any]], preferences: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"| {load['layer']} | {load['max_violation']:.2f} | {len(load['dead_experts'])} "
        f"| {preferences[load['layer']]['zh']} | {preferences[load['layer']]['en']} |"
        for load in loads
        if load["layer"] in preferences
    ]


def example_rows(directions: dict[str, Any]) -> list[str]:
    """The first few examples of each direction as they came: none is chosen."""
    picked = [*directions["en-zh"]["examples"][:5], *directions["zh-en"]["examples"][:5]]
    return [f"| {' | '.join(text.replace('|', '/')[:160] for text in row)} |" for row in picked]


def source_row(name: str, counts: dict[str, int]) -> str:
    return f"| {name} | {LICENCES[name]} | {counts['tokens'] / 1e6:.2f} M |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "nano-gpu")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "nano-zh-en")
    parser.add_argument(
        "--before",
        nargs=2,
        action="append",
        default=[],
        metavar=("FOLDER", "TOKENS"),
        help="an earlier bundled model, or the JSON of its scores, and the tokens it had seen",
    )
    parser.add_argument("--initial-tokens", type=int, default=0, help="tokens which the run's initial weights had seen")
    parser.add_argument("--averaged", action="store_true", help="the model is a mean of the run's last checkpoints")
    parser.add_argument("--drafts", type=Path, help="the run in which the MTP modules were trained alone afterwards")
    arguments = parser.parse_args()
    steps, evaluations = read_metrics(arguments.run)
    settings = read_recipe(arguments.run)
    training = utilisation(arguments.run, settings, steps)
    last = steps[-1]["tokens"]
    exported = last if arguments.averaged else exported_tokens(steps, evaluations, settings.run.save_every)
    tokens_seen = arguments.initial_tokens + exported
    draw_curve(steps, evaluations, MODEL / "curve.png")
    measurements = measure(arguments.data)
    before = [
        {**quality(scores), "by_source": by_source(scores), "tokens_seen": int(tokens)}
        for model, tokens in arguments.before
        for scores in [read_scores(Path(model), arguments.data)]
    ]
    model_bytes = (MODEL / "model.safetensors").stat().st_size
    tokens_drafts = read_metrics(arguments.drafts)[0][-1]["tokens"] if arguments.drafts else 0
    result = summarise(measurements, steps, tokens_seen, tokens_drafts, model_bytes, training, before)
    record.write("nano", result)
    (MODEL / "README.md").write_text(card(result, steps, arguments.data), encoding="utf-8")
    print(json.dumps(result["figures"], indent=1))


if __name__ == "__main__":
    main()
