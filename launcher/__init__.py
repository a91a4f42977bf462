"""sft-launch: start the ranks of an sft-dist run and watch over them. Standard library only; it knows
sft-dist by its command line (`python -m sft_dist VERB ...`), by `sft-dist config --json` and by the
outcome.json of a run folder, and never imports it."""
