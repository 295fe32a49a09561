"""The harness's own command line, with `--model tokengrow` in it.

    python -m tokengrow.evaluation.harness_cli --model tokengrow --model_args source=DIR --tasks ...

A harness that looks for models in installed packages finds it under the entry point
`lm_eval.models`; 0.4.13 does not yet, so this registers it and calls the harness.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from tokengrow.errors import UserError
from tokengrow.evaluation import harness as harness  # imported, its model is registered


def main() -> None:
    """Runs `lm_eval` with the arguments of this program."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"tokengrow: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
