"""A model as lm-evaluation-harness asks it. Imports lm_eval, of the extra `eval`."""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from megafusion.config import parse_config
from megafusion.errors import UserError
from megafusion.evaluate.perplexity import text_hidden
from megafusion.generate.generation import UNKNOWN_LENGTH, Generation
from megafusion.generate.pipeline import TransfusionPipeline
from megafusion.generate.row import Request
from megafusion.objective.config import SamplingConfig
from megafusion.sequence.document import Segment

MAX_GEN_TOKS = 256
"""Tokens of an answer for which the task names no limit, as of lm-eval's `hf`."""


class LMEvalModel(TemplateLM):
    """The text path of a pipeline: likelihoods by passes over whole rows, answers by the key-value cache.

    Image ids, codes and rows of a padded vocabulary are no text: they have no probability. A row is bos and a
    text; one beyond the model's rows loses its beginning, and in an answer's prompt bos is kept. Other than
    lm-eval's `hf`, loglikelihood_rolling does not count bos itself, which `hf` predicts where its tokenizer
    writes one. seeds: of sampled answers, one for each request.
    """

    def __init__(self, pipeline: TransfusionPipeline, seeds: Sequence[int] = ()):
        super().__init__()
        self.seeds = seeds
        self.max_length = pipeline.config.sequence_length or UNKNOWN_LENGTH
        self._pipeline, self._ids = pipeline, pipeline.tokenizer
        self._is_text_V = torch.zeros(pipeline.config.model.vocab_size, dtype=torch.bool)
        self._is_text_V[: self._ids.num_text_ids] = True
        self._is_text_V[self._ids.image_ids(len(pipeline.sizes))] = False

    @property
    def eot_token_id(self) -> int:
        return self._ids.eos

    @property
    def prefix_token_id(self) -> int:
        return self._ids.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text as it is, after bos unless add_special_tokens is False."""
        ids = self._ids.encode(string)
        return ids if add_special_tokens is False else [self._ids.bos, *ids]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, in nats, and whether greedy decoding writes it."""
        for texts, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"lm: {texts!r:.200}: a continuation of {len(continuation)} tokens, where 1 to "
                    f"{self.max_length}, the model's rows, can be measured; change the task"
                )
        rows = [(context + rest)[-(self.max_length + 1) :] for _, context, rest in requests]
        hidden_BSD = text_hidden(self._pipeline.model, [row[:-1] for row in rows])
        is_text_V = self._is_text_V.to(hidden_BSD.device)
        answers = []
        for (_, _, continuation), row, hidden_SD in zip(requests, rows, hidden_BSD, strict=True):
            end, target_C = len(row) - 1, torch.tensor(continuation, device=hidden_SD.device)
            logits_CV: Tensor = self._pipeline.model.tail.head(hidden_SD[end - len(continuation) : end])
            nats_CV = logits_CV.float().masked_fill(~is_text_V, -torch.inf).log_softmax(-1)
            nats = nats_CV.gather(1, target_C[:, None]).double().sum()
            answers.append((float(nats), bool((nats_CV.argmax(-1) == target_C).all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats, in windows as long as the model's rows."""
        windows = [
            (number, (None, *make_disjoint_window(window)))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        nats = [0.0] * len(requests)
        for start in range(0, len(windows), len(requests)):
            chosen = windows[start : start + len(requests)]
            found = self._loglikelihood_tokens([window for _, window in chosen])
            for (number, _), (own, _) in zip(chosen, found, strict=True):
                nats[number] += own
        return nats

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of the task's stop texts, eos or the limit of tokens."""
        pipeline = self._pipeline
        seeds = self.seeds or [0] * len(requests)
        asked = []
        for request, seed in zip(requests, seeds, strict=True):
            context, options = request.args
            asked.append(self._request(context, options, seed))
        # One position more, which is for the eos of a document in training.
        parts = pipeline.model, pipeline.tokenizer, pipeline.codec
        answers = Generation(*parts, asked, self.max_length + 1, streams_text=False).run()
        return ["".join(map(str, answer)) for answer in answers]

    def _request(self, context: str, task_options: dict[str, Any], seed: int) -> Request:
        options = dict(normalize_gen_kwargs(task_options, MAX_GEN_TOKS))
        options.pop("do_sample", None)  # temperature is 0 where it is false
        options["stop"] = [text for text in options.pop("until") if text]
        options["max_new_tokens"] = options.pop("max_gen_toks")
        sampling = parse_config(SamplingConfig, options, "lm: generation_kwargs of a task")
        room = self.max_length - 1 - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"lm: max_gen_toks {sampling.max_new_tokens} of a task leaves no room for its prompt in "
                f"the model's rows of {self.max_length}; set max_gen_toks in generation_kwargs"
            )
        prompt = [Segment("tokens", ids)] if (ids := self._ids.encode(context)[-room:]) else []
        return Request(prompt, sampling, seed, max_images=0)


class RecordedAnswers(LM):
    """Answers that were measured before. answers: by kind, arguments and answer of each request, in order."""

    def __init__(self, answers: dict[str, list[tuple[tuple, Any]]]):
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return [tuple(answer) for answer in self._recorded("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        return self._recorded("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        return self._recorded("generate_until", requests)

    def _recorded(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        found = self._answers[kind]
        if [args for args, _ in found] != [request.args for request in requests]:
            raise UserError(f"lm: a task asks otherwise each time; make it without random numbers ({kind})")
        return [answer for _, answer in found]
