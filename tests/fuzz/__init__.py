"""Attacks on the way of a bundle in: mutated bundles over real HTTP, and the parsers by themselves.

`make fuzz N=100000 SEED=7` submits mutants to one real server process and judges each answer;
`make fuzz-parsers SECONDS=60` lets atheris look for paths through the five parsers. The mutators
do not know the oracle, the oracle does not know the mutators, and neither uses the server's code.
"""
