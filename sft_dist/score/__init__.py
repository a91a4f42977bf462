"""The verb `score`: log Pr of what conversations say, and of given candidate answers, by one model or several.

`verb` is the order of things, `models` what is asked, `conversations` and `candidates` the two kinds of data,
`forwards` how a block is dealt to ranks, `output` what is on disk while it grows, `summary` what is printed.
"""
