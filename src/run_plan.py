"""
What a recipe family costs, before anything runs: tokens, FLOPs, hours, dollars and memory of every phase.

    python src/run_plan.py recipes --gpu h200 --gpus 8 --usd-per-gpu-hour 1.96 --max-usd 1000
    python src/run_plan.py recipes/tiny --gpu cpu --calibrate
"""

from adamba.kept_help import KeepingParser, print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import argparse
import math
import signal
from pathlib import Path

from adamba.budget.phases import read_plan
from adamba.budget.price import ASSUMED_MFU, Machine
from adamba.budget.table import print_plan
from adamba.errors import UserError, user_errors
from adamba.gpus import CPU, GPUS, find_gpu


def arguments() -> argparse.Namespace:
    parser = KeepingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, help="folder of recipes")
    parser.add_argument("--gpu", default="h200", help=f"{', '.join([*GPUS, CPU])}; {CPU} needs --calibrate")
    parser.add_argument("--gpus", type=int, default=8, help="how many")
    parser.add_argument("--usd-per-gpu-hour", type=float, default=1.96, help="price of one")
    parser.add_argument("--max-usd", type=float, default=None, help="the budget; exit code 2 above it")
    parser.add_argument("--mfu", type=float, default=None, help=f"share of the rated speed (default {ASSUMED_MFU})")
    parser.add_argument("--calibrate", action="store_true", help="measure the MFU of each phase on this machine")
    return parser.parse_args()


@user_errors()
def main() -> None:
    args = arguments()
    for key, low in (("gpus", 1), ("usd_per_gpu_hour", 0), ("max_usd", 0), ("mfu", 1e-6)):
        value = getattr(args, key)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{key.replace('_', '-')}: {value:g} must be {low:g} or more")
    if args.mfu is not None and (args.mfu > 1 or args.calibrate):
        raise UserError(f"--mfu: {args.mfu:g} must be at most 1, and is not given with --calibrate, which measures it")
    phases = read_plan(args.family)
    mfu = args.mfu or ASSUMED_MFU
    if args.calibrate:
        from adamba.budget.calibrate import measure  # loads torch's training code; nothing else here needs it

        gpu, mfu = measure(phases, args.gpu)
    elif args.gpu == CPU:
        raise UserError(f"--gpu: {CPU} has no rated speed; add --calibrate")
    else:
        gpu = find_gpu(args.gpu)
    machine = Machine(gpu, args.gpus, args.usd_per_gpu_hour, mfu)
    print_plan(args.family, phases, machine, args.max_usd)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it in silence, as it ends other tools that print
    main()
