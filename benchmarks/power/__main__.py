"""Power posteriors p(z|x)^a: low temperature, SIR, SMC, suffix and block-wise Metropolis-Hastings, and an amortised q.

    python -m benchmarks.power --exact --output results/power
    python -m benchmarks.power --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/data/gsm8k \
        --output results/smollm2/power

Results are written as they come; the command, given again, goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging as hf_logging

from amortlm import LanguageModel

from . import exact, real, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--exact", action="store_true", help="enumerable supports on the embedded model")
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/gsm8k"), help="train.jsonl and test.jsonl"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    if args.exact:
        exact.run(args.output)
    else:
        run = real.Run(LanguageModel.from_pretrained(args.model), args.output, args.data)
        run.all()
        (args.output / "README.md").write_text(report.page(run.record), encoding="utf-8")


if __name__ == "__main__":
    main()
