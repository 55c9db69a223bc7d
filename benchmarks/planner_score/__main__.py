"""Scores the planner's cost model on a table of published measurements.

    python benchmarks/planner_score TABLE.csv [--json] [--leave-out]

Step time, memory, the order of layouts, and what does not fit, by source; docs/guide/planner.md
says what the figures mean. --leave-out also fits without each source in turn (a minute). Ends with
status 2 and one line for a table that cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from planner_score.fit import leave_one_out
from planner_score.score import score_table, summary, text
from shoal.errors import UserError


def main() -> None:
    """Print the scores of the table named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="a CSV table of published measurements")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--leave-out", action="store_true", help="also fit without each source")
    given = parser.parse_args()
    try:
        result = summary(score_table(given.table))
        if given.leave_out:
            result["left_out"] = leave_one_out(given.table)
    except UserError as error:
        print(f"planner_score: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    print(json.dumps(result, indent=1) if given.json else text(result))


if __name__ == "__main__":
    main()
