"""Measuring speed: `octavo bench offline` (an engine in this process) and `octavo bench serve`
(any OpenAI-compatible server).

`workloads` and `loads` say what is asked for, `report` what was measured. Nothing here imports
torch but `offline`, and nothing but `client`, `serve` and `plot` needs the extra `octavo[bench]`.
"""
