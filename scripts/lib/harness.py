"""harness.py -- a run of ours as a model of EleutherAI's lm-evaluation-harness.

That library (pip install lm-eval) brings the tasks and how they are counted; here are the three
questions that it asks a model.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from lib.program import ROOT, need
from lib.scoring import Scorer


def harness_model(base: type, scorer: Scorer) -> object:
    """A model for lm_eval.simple_evaluate; `base` is lm_eval.api.model.LM."""

    class Model(base):
        def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
            return scorer.score([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
            return [-scorer.text_nats(request.args[0]) for request in requests]

        def generate_until(self, requests: Sequence) -> list[str]:
            made = []
            for request in requests:
                context, options = request.args
                until = options.get("until") or []
                most = options.get("max_gen_toks", scorer.size // 2)
                made.append(scorer.continue_text(context, until, most))
            return made

    return Model()


@contextmanager
def without_our_programs() -> Iterator[None]:
    """The harness imports a package called evaluate, which must not find scripts/evaluate.py."""
    before = list(sys.path)
    sys.path[:] = [folder for folder in before if Path(folder).resolve() != ROOT / "scripts"]
    try:
        yield
    finally:
        sys.path[:] = before


def run_harness(scorer: Scorer, tasks: Sequence[str], limit: int | None) -> dict[str, dict]:
    """The harness's figures by task. Raises UserError where the library is not installed."""
    with without_our_programs():
        lm_eval: ModuleType = need("lm_eval", "--harness", "pip install lm-eval")
        base = need("lm_eval.api.model", "--harness", "pip install lm-eval").LM
        model = harness_model(base, scorer)
        return lm_eval.simple_evaluate(model=model, tasks=list(tasks), limit=limit)["results"]
