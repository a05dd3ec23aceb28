"""`python -m ctxlib`, which `accelerate launch -m ctxlib` needs."""

from ctxlib.commands.cli import main

if __name__ == "__main__":
    main()
