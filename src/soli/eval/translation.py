"""Lines in, translations out, by a model whose tokenizer has <|en|> and <|zh|>; and how good translations are.

The lines may be endless: at most a window of them is held. What comes before a line that cannot be translated is
translated first; then the line's SoliError is raised. chrF and BLEU are sacrebleu's, corpus-wide and per source, BLEU
on its `zh` and `13a` tokens; the translations that they score are greedy unless a beam search is asked for.
"""

import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from soli.analysis.notebook_views import html_text
from soli.data.text import Language, language_of
from soli.engine.beam_search import BeamSearchParams, beam_search_params
from soli.engine.engine import Engine
from soli.engine.offline import answer_all, limits_for
from soli.engine.request import Answer, EngineStats, Request
from soli.engine.sampler import GREEDY, SamplingParams
from soli.engine.text_model import TextModel
from soli.errors import SoliError
from soli.eval.scoring import Pair
from soli.sections import shown

BLEU_TOKENS = {"zh": "zh", "en": "13a"}


@dataclass(frozen=True)
class Translation:
    """One line and its translation. An empty line has no direction and no answer, and stays empty."""

    source: str
    text: str
    to: Language | None
    answer: Answer | None = None

    def __repr__(self) -> str:
        ending = "" if self.answer is None else f", {self.answer.summary}"
        return f"<{shown(self.source)} to {self.to}: {shown(self.text)}{ending}>"

    def _repr_html_(self) -> str:
        return html_text(f"{self.source}\n{self.text}") + (self.answer.routing_map() if self.answer else "")


@dataclass(frozen=True)
class Quality:
    """sacrebleu's chrF2 and BLEU, 0 to 100, over `count` sentences, and the signature to compare them by."""

    chrf: float
    bleu: float
    count: int
    signature: str


@dataclass(frozen=True)
class Direction:
    """One direction of translation: overall, by source, and a few examples (text, translation, reference)."""

    overall: Quality
    by_source: dict[str, Quality]
    examples: list[tuple[str, str, str]] = field(default_factory=list)


class Translator:
    """How to translate. `to` None: Chinese to English, anything else to Chinese.

    `max_new_tokens` None allows as many as a translation may need, within the model's positions. `batch_size` lines are
    translated together. `speculate`: draft with the model's MTP module. `beam_search`: search for the likeliest
    translation instead of sampling; None decodes greedily or as `sampling` says.
    """

    def __init__(
        self,
        text_model: TextModel,
        to: Language | None = None,
        sampling: SamplingParams = GREEDY,
        max_new_tokens: int | None = None,
        trace: bool = False,
        batch_size: int = 32,
        speculate: bool = False,
        beam_search: BeamSearchParams | None = None,
    ) -> None:
        self.text_model, self.to, self.trace = text_model, to, trace
        self._sampling, self._max_new_tokens, self._beam_search = sampling, max_new_tokens, beam_search
        width = 1
        if beam_search is not None:
            beam_search.check_vocabulary(text_model.model.config.vocab_size, text_model.stop_ids)
            width = beam_search.beam_width
        self._engine = Engine(text_model, limits_for(text_model, batch_size, speculate=speculate, beam_width=width))

    def translate(
        self, lines: Iterable[str], window: int | None = None, on_answer: Callable[[int], None] | None = None
    ) -> Iterator[Translation]:
        """One Translation per line, in order; `window` and `on_answer` as in `answer_all`."""
        pending: deque[tuple[str, Language | None]] = deque()  # the lines whose answers have not come back

        def requests() -> Iterator[Request | None]:
            for number, line in enumerate(lines, start=1):
                to = translation_target(line, self.to)
                request = None if to is None else self._request(_normalised(line), to, f"line {number}")
                pending.append((line, to))
                yield request

        for answer in answer_all(self._engine, requests(), window, on_answer):
            source, to = pending.popleft()
            yield Translation(source, "" if answer is None else one_line(answer.text), to, answer)

    def stats(self) -> EngineStats:
        """The engine's metrics."""
        return self._engine.stats()

    def _request(self, text: str, to: Language, where: str) -> Request:
        prompt = self.text_model.tokenizer.translation_prompt(text, to)
        return Request(
            prompt_ids=tuple(prompt),
            max_new_tokens=self._limit(prompt, where),
            sampling=self._sampling,
            stop_ids=self.text_model.stop_ids,
            trace=self.trace,
            beam_search=self._beam_search,
        )

    def _limit(self, prompt: Sequence[int], where: str) -> int:
        remaining = self.text_model.remaining_tokens(prompt, where)
        if self._max_new_tokens is None:
            return enough(remaining, prompt)
        if self._max_new_tokens > remaining:
            raise SoliError(
                f"{where} has {len(prompt)} tokens and {self._max_new_tokens} more are requested, but the model has "
                f"{self.text_model.positions} positions: shorten the line or lower max_new_tokens to {remaining}"
            )
        return self._max_new_tokens


def translation_request(text_model: TextModel, text: str, to: Language | None) -> tuple[list[int], int]:
    """The prompt for one text, as one line, and as many new tokens as its translation may need. Rejects what is empty
    or too long."""
    line = _normalised(text)
    if not line:
        raise SoliError("the text is empty: give something to translate")
    prompt = text_model.tokenizer.translation_prompt(line, to or target_of(line))
    return prompt, enough(text_model.remaining_tokens(prompt, "the text"), prompt)


def translation_beams(
    text_model: TextModel, beam_width: int | None, length_penalty: float | None, gives_way: bool = False
) -> BeamSearchParams | None:
    """The beam search that a translation has; None for one beam, which is no search. What is not given is as in the
    model's generation_config.json, unless another decoding was asked for, to which that `gives_way`."""
    default = None if gives_way or beam_width == 1 else text_model.beam_search
    if default is None and (beam_width or 1) == 1 and length_penalty is not None:
        raise SoliError("length_penalty is for several beams: give their number too")
    params = beam_search_params(default or BeamSearchParams(1), beam_width, length_penalty)
    return params if params.beam_width > 1 else None


def translation_target(text: str, to: Language | None) -> Language | None:
    """The language that a text is translated to: `to`, or by its script; None for an empty text."""
    text = _normalised(text)
    return (to or target_of(text)) if text else None


def target_of(text: str) -> Language:
    """Chinese goes to English, anything else to Chinese."""
    return "en" if language_of(text) == "zh" else "zh"


def enough(remaining: int, prompt: Sequence[int]) -> int:
    """How many tokens a translation may take, of those that remain."""
    return min(remaining, 32 + 3 * len(prompt))


def _normalised(line: str) -> str:
    return " ".join(unicodedata.normalize("NFC", line).split())


def one_line(text: str) -> str:
    """White space as single spaces, control characters removed: a model must not control the terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())


def evaluate_direction(
    text_model: TextModel,
    pairs: Sequence[Pair],
    to: Language,
    batch_size: int = 32,
    on_answer: Callable[[int], None] | None = None,
    beam_search: BeamSearchParams | None = None,
) -> Direction:
    """Translates one side of every pair, greedily or by a beam search, and scores it against the other."""
    translator = Translator(text_model, to=to, batch_size=batch_size, beam_search=beam_search)
    source, target = (2, 1) if to == "zh" else (1, 2)
    texts = [pair[source] for pair in pairs]
    references = [pair[target] for pair in pairs]
    translations = [translation.text for translation in translator.translate(texts, on_answer=on_answer)]
    by_source = {}
    for name in sorted({pair[0] for pair in pairs}):
        rows = [row for row, pair in enumerate(pairs) if pair[0] == name]
        own_references = [references[row] for row in rows]
        by_source[name] = translation_quality([translations[row] for row in rows], own_references, to)
    examples = list(zip(texts, translations, references, strict=True))[:: max(1, len(pairs) // 8)]
    return Direction(translation_quality(translations, references, to), by_source, examples)


def translation_quality(translations: Sequence[str], references: Sequence[str], to: Language) -> Quality:
    """Corpus chrF and BLEU of translations into `to`."""
    from sacrebleu.metrics import BLEU, CHRF

    chrf, bleu = CHRF(), BLEU(tokenize=BLEU_TOKENS[to])
    chrf_score, bleu_score = (float(metric.corpus_score(translations, [references]).score) for metric in (chrf, bleu))
    signature = f"chrF {chrf.get_signature()}, BLEU {bleu.get_signature()}"
    return Quality(chrf_score, bleu_score, len(translations), signature)
