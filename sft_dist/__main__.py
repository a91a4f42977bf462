"""`python -m sft_dist` and `deepspeed --module sft_dist` start here."""

from sft_dist.cli import main

if __name__ == "__main__":
    main()
