"""`python -m steersman`, as `torchrun -m steersman` starts it: the `steersman` command."""

from steersman.cli import main

if __name__ == "__main__":
    main()
