"""`python -m cfsfl_fast`, so that torchrun works."""

from cfsfl_fast.cli import main

if __name__ == "__main__":
    main()
