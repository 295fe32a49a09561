"""Command line of the lm-evaluation-harness, with the additional model `tokengrow`.

    python -m tokengrow.evaluation.harness_cli --model tokengrow --model_args source=DIR --tasks ...

Later versions of the harness load the entry point `lm_eval.models` of installed packages. Version
0.4.13 does not, so this module registers the model and then calls the harness.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from tokengrow.errors import UserError
from tokengrow.evaluation import harness as harness  # the import registers the model


def main() -> None:
    """Run `lm_eval` with the arguments of this process."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"tokengrow: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
