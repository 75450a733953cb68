"""`python -m saccade.cli`, and so `torchrun -m saccade.cli train …`."""

from . import main

if __name__ == "__main__":
    main()
