"""The plan of a model as one value: as JSON, and as the lines that `soli plan` prints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from soli.plan.check import Measurement
from soli.plan.inference import TYPICAL_SKEW, MachineRates, Prediction, predict_decode
from soli.plan.inference_plan import Division, GpuSplit, PlannedModel, Speed, Upgrade
from soli.plan.sizes import ModelSizes
from soli.quantities import scaled

Lines = list[tuple[str, str]]


@dataclass(frozen=True)
class PlanReport:
    """`sources` says where each figure of the machine is from; `formats`: by name, (sizes, speed for each of
    `memories`). `speed` None: the model does not fit. `routing_tokens`: from how many tokens it is known which experts
    are chosen; where that is not known, `typical` is the speed with TYPICAL_SKEW."""

    model: PlannedModel
    sizes: ModelSizes
    division: Division
    speed: Speed | None
    machine: MachineRates
    sources: Mapping[str, str]
    prompt: int
    skew: float
    memories: list[int]
    formats: Mapping[str, tuple[ModelSizes, list[Speed | None]]]
    upgrades: list[Upgrade]
    gpu: GpuSplit | None = None
    check: Measurement | None = None
    routing_tokens: int | None = None
    typical: Speed | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes, rates per second, null where the model does not fit."""
        sizes, division, speed = self.sizes, self.division, self.speed
        document: dict[str, Any] = {
            "model": self.model.name,
            "format": sizes.format,
            "fits": division.fits,
            "fits_in_memory": division.fits and division.slots == division.experts,
            "needed_bytes": division.needed,
            "memory_bytes": division.memory,
            "total_bytes": sizes.total_bytes,
            "index_bytes": self.model.index_bytes,
            "resident_bytes": sizes.resident_bytes,
            "latent_cache_bytes": division.latent_cache,
            "scratch_bytes": division.scratch,
            "expert_bytes": sizes.expert_bytes,
            "experts": division.experts,
            "experts_in_memory": division.slots,
            "expert_share": division.share,
            "mtp_bytes": sizes.mtp_bytes,
            "decode_tokens_per_second": speed and speed.decode.tokens_per_second,
            "prefill_tokens_per_second": speed and speed.prompt.tokens_per_second,
            "bound": speed and speed.decode.bound,
            "prefill_bound": speed and speed.prompt.bound,
            "prompt_tokens": self.prompt,
            "skew": self.skew,
            "routing_tokens": self.routing_tokens,
            "typical_decode_tokens_per_second": self.typical and self.typical.decode.tokens_per_second,
            "decode": speed and _prediction(speed.decode),
            "prefill": speed and _prediction(speed.prompt),
            "parts": sizes.parts,
            "machine": {**vars(self.machine), "sources": dict(self.sources)},
            "formats": [self._format(name, *row) for name, row in self.formats.items()],
            "upgrades": self.upgrades,
            "buy_next": self.buy_next,
        }
        if self.gpu is not None:
            document["gpu"] = {**vars(self.gpu), "supported": False}
        if self.check is not None:
            document["check"] = {**vars(self.check), **self._errors()}
        return document

    @property
    def buy_next(self) -> str | None:
        """Of more memory and a faster disk, what brings more; None where neither brings a tenth."""
        useful = [upgrade for upgrade in self.upgrades if upgrade.resource in ("memory", "disk")]
        if not useful:
            return None
        now = self.speed.decode.tokens_per_second if self.speed else 0.0
        best = max(useful, key=lambda upgrade: upgrade.decode_tokens_per_second)
        return best.resource if best.decode_tokens_per_second > 1.1 * now else None

    def lines(self) -> Lines:
        """(label, text) below the table of parts."""
        lines = [("machine", self._machine()), ("fits", self._fits())]
        if self.speed is not None:
            decode, prompt = self.speed.decode, self.speed.prompt
            lines += [
                ("decode", f"{rate(decode)}, bound by {decode.bound}: {_read(decode, 'per token')}"),
                *self._typical(),
                (
                    "prompt",
                    f"{rate(prompt)}, {prompt.tokens} tokens in {seconds(prompt.seconds)}, bound by {prompt.bound}",
                ),
                ("predicted", self._assumption()),
            ]
        lines += [("next", self._next())]
        if self.gpu is not None:
            lines.append(("one GPU", self._gpu()))
        return lines

    def check_lines(self) -> Lines:
        """Prediction and measurement side by side."""
        check, speed = self.check, self.speed
        assert check is not None and speed is not None
        errors = self._errors()
        rows = [
            ("decode", speed.decode.tokens_per_second, check.decode_tokens_per_second, errors["decode_error"]),
            ("prompt", speed.prompt.tokens_per_second, check.prefill_tokens_per_second, errors["prefill_error"]),
        ]
        lines = [
            (name, f"{number(predicted)} tokens/s predicted, {number(measured)} measured: {100 * error:+.0f} %")
            for name, predicted, measured, error in rows
        ]
        if "decode_error_at_measured_reads" in errors:
            error = errors["decode_error_at_measured_reads"]
            at_reads = number(check.decode_tokens_per_second * (1 + error))
            read = f"the bytes that this run read, at {per_second(check.disk_rate or self.machine.disk_rate)}"
            lines.append(("", f"{at_reads} tokens/s predicted for {read}: {100 * error:+.0f} %"))
        reads = f"{scaled(speed.decode.disk_bytes, 'B')} per token predicted, {scaled(check.disk_bytes_per_token, 'B')}"
        tokens = f"{check.new_tokens} tokens after a prompt of {check.prompt_tokens}, with a warm cache"
        return [*lines, ("reads", f"{reads} measured; {tokens}")]

    def _errors(self) -> dict[str, float]:
        """How far the prediction is from the measurement, as a share of it."""
        assert self.check is not None and self.speed is not None
        measured = self.check.decode_tokens_per_second
        errors = {
            "decode_error": self.speed.decode.tokens_per_second / measured - 1,
            "prefill_error": self.speed.prompt.tokens_per_second / self.check.prefill_tokens_per_second - 1,
        }
        if self.division.slots < self.division.experts:  # how evenly experts are chosen is the model's and the text's
            demand = self.sizes.config.num_experts_per_tok * self.sizes.layers * self.sizes.expert_bytes
            hit_rate = max(0.0, 1 - self.check.disk_bytes_per_token / demand)
            machine = replace(self.machine, disk_rate=self.check.disk_rate or self.machine.disk_rate)
            at_reads = predict_decode(self.sizes, machine, self.division.share, self.prompt, hit_rate)
            errors["decode_error_at_measured_reads"] = at_reads.tokens_per_second / measured - 1
        return errors

    def _format(self, name: str, sizes: ModelSizes, speeds: list[Speed | None]) -> dict[str, Any]:
        return {
            "name": name,
            "format": sizes.format,
            "total_bytes": sizes.total_bytes,
            "resident_bytes": sizes.resident_bytes,
            "speeds": [
                {
                    "memory_bytes": memory,
                    "fits": speed is not None,
                    "decode_tokens_per_second": speed and speed.decode.tokens_per_second,
                    "prefill_tokens_per_second": speed and speed.prompt.tokens_per_second,
                    "bound": speed and speed.decode.bound,
                }
                for memory, speed in zip(self.memories, speeds, strict=True)
            ],
        }

    def _machine(self) -> str:
        machine, sources = self.machine, self.sources
        products = machine.flop_rates[self.sizes.format]
        return (
            f"{scaled(self.division.memory, 'B')} of memory for Soli ({sources['memory']}) at "
            f"{per_second(machine.memory_rate)} ({sources['memory_rate']}), disk {per_second(machine.disk_rate)} "
            f"({sources['disk_rate']}), products {products / 1e12:.3g} TFLOP/s ({sources['flop_rates']})"
        )

    def _fits(self) -> str:
        sizes, division = self.sizes, self.division
        if not division.fits:
            return f"no: {division.needed:,} bytes ({scaled(division.needed, 'B')}) of memory are needed"
        beside = (
            f"{scaled(division.resident, 'B')} weights that stay, {scaled(division.latent_cache, 'B')} latent cache, "
            f"{scaled(division.scratch, 'B')} scratch"
        )
        if division.slots == division.experts:
            return f"yes, all of it: {beside}, {scaled(sizes.expert_bytes * division.experts, 'B')} experts"
        share = f"{division.slots:,} of {division.experts:,} experts ({100 * division.share:.1f} %)"
        return f"yes, partly: {beside}, and room for {share}; the others are read from disk as they are needed"

    def _assumption(self) -> str:
        if self.division.slots == self.division.experts:
            return "one request, nothing is read from disk once the experts have been read"
        routing = (
            f"experts chosen as by {self.routing_tokens:,} tokens of earlier runs" if self.routing_tokens is not None
            else f"experts chosen as often as 1/rank^{self.skew:g}, the most frequent in memory" if self.skew
            else "experts chosen evenly, which is the lower bound"
        )  # fmt: skip
        hits = self.speed.decode.hit_rate if self.speed else 0.0
        return f"one request, a warm cache, {100 * hits:.1f} % of a token's experts in memory: {routing}"

    def _typical(self) -> Lines:
        if self.typical is None or self.division.slots == self.division.experts:
            return []
        return [("", f"{rate(self.typical.decode)} where experts are chosen as unevenly as was measured (--skew "
                     f"{TYPICAL_SKEW:g})")]  # fmt: skip

    def _next(self) -> str:
        if not self.upgrades:
            return f"more memory: {scaled(self.division.needed, 'B')} are needed before anything runs"
        now = self.speed.decode.tokens_per_second if self.speed else None
        texts = []
        for upgrade in self.upgrades:
            value = scaled(upgrade.value, "B")
            what = {
                "memory": f"{value} of memory",
                "disk": f"a disk of {value}/s",
                "memory rate": f"memory of {value}/s",
            }[upgrade.resource]
            gain = "" if now is None else f" ({100 * (upgrade.decode_tokens_per_second / now - 1):+.0f} %)"
            texts.append(f"{what}: {number(upgrade.decode_tokens_per_second)} tokens/s{gain}")
        advice = {"memory": "more memory", "disk": "a faster disk", None: "neither memory nor disk"}[self.buy_next]
        return f"{advice}. " + "; ".join(texts)

    def _gpu(self) -> str:
        assert self.gpu is not None
        gpu = self.gpu
        size = f"{scaled(gpu.needed_bytes, 'B')} of {scaled(gpu.gpu_bytes, 'B')}"
        split = f"attention and all but experts on the GPU, {size}"
        experts = f"experts in memory, {scaled(gpu.expert_bytes, 'B')}"
        if gpu.decode_tokens_per_second is None:
            short = "the GPU is too small" if not gpu.fits_gpu else "memory is too small"
            return f"{split}, {experts}: {short}. Other programs run this split, Soli does not"
        bound = f"at most {number(gpu.decode_tokens_per_second)} tokens/s by bandwidth"
        return f"{split}, {experts}: {bound}. Other programs run this split, Soli does not"


def number(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate(prediction: Prediction) -> str:
    """Tokens per second."""
    return f"{number(prediction.tokens_per_second)} tokens/s"


def per_second(value: float) -> str:
    """A rate of bytes."""
    return f"{scaled(value, 'B')}/s"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def _read(prediction: Prediction, unit: str) -> str:
    size = prediction.disk_bytes / (1 if prediction.tokens == 1 else prediction.tokens)
    return f"{scaled(size, 'B')} read from disk {unit}"


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        **vars(prediction),
        "tokens_per_second": prediction.tokens_per_second,
        "bound": prediction.bound,
    }
