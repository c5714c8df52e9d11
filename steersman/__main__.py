"""`python -m steersman`, as `torchrun -m steersman` starts it: the `steersman` command."""

import sys

if __name__ == "__main__":
    try:
        from steersman.cli import main
    except KeyboardInterrupt:
        sys.stderr.write("steersman: interrupted\n")
        sys.exit(130)
    main()
